"""Seconds of a student step of any script, split among networks, backward passes and updates.

    python -m tests.bench dmd [--steps 20] [-- any flags of dmd.py]

Runs the script's own main in a temporary folder and times it from outside, with hooks on the
networks that it trains and on its teacher, and wrappers around backward and Run.update. A GPU is
waited for at both ends of every part; the scripts themselves never wait. The first five steps are
dropped, and the run is stopped before it saves or measures anything. The rows of the table:

    a network      its forward calls, with or without gradient, and how many there are in a step
    ... update     the backward passes before an update and the update itself
    other          the rest of a step: draws, arithmetic of losses, moving averages, the log
    total          a step from its first draw to its row in log.csv

with mean and standard deviation over the steps. Compare two commits in one sitting, as a ratio.
"""

import argparse
import contextlib
import importlib
import os
import statistics
import sys
import tempfile
import time
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from models.files import UserError  # noqa: E402
from models.networks import lora  # noqa: E402
from models.plumbing.run import Run, run_main  # noqa: E402

SCRIPTS = "dmd phased_dmd decoupled_dmd tdm linvideo latent_fm mdt_dist".split()
SKIPPED = 5  # steps at the start, slower than the others: memory is allocated, kernels are chosen


class Enough(Exception):
    """All steps that are asked for have been measured."""


def now():
    """Seconds, once everything that the GPU was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Seconds of every part of a step.

    Parts do not overlap: what is called inside a part belongs to it. So a call of the base through
    an adapter is the adapter's, and what a backward pass computes again is the backward pass's.
    Nothing is counted outside of steps.
    """

    def __init__(self):
        self.names = {}  # network: its name
        self.steps = []  # {part: seconds} of each step, with "total"
        self.calls = []  # {network's name: calls} of each step
        self.part = None  # what is being timed, and since when
        self.began = None  # when the current step began, None between steps

    def watch(self, name, net):
        """Time the calls of a network from now on. One that has a name keeps it."""
        if net in self.names:
            return
        self.names[net] = name
        if isinstance(net, nn.Module):  # a copy of it has these hooks too, but no name
            net.register_forward_pre_hook(lambda net, args: self.enter(net))
            net.register_forward_hook(lambda net, args, output: self.leave(net))

    def enter(self, who):
        """who: a network, or the name of another part."""
        known = who in self.names or isinstance(who, str)
        if known and self.part is None and self.began is not None:
            self.part = who, now()

    def leave(self, who):
        if self.part is None or self.part[0] is not who:
            return
        name = self.names.get(who, who)
        self.seconds[name] = self.seconds.get(name, 0.0) + now() - self.part[1]
        self.counts[name] = self.counts.get(name, 0) + 1
        self.part = None

    def begin_step(self):
        self.seconds, self.counts, self.began = {}, {}, now()

    def end_step(self):
        total = now() - self.began
        self.seconds["other"] = total - sum(self.seconds.values())
        self.seconds["total"] = total
        self.steps.append(self.seconds)
        names = set(self.names.values())
        self.calls.append({name: n for name, n in self.counts.items() if name in names})
        self.began = None

    # ---- around functions of the run and of the script

    def on_start(self, real, run, **state):
        real(run, **state)
        for name, net in state.items():
            if isinstance(net, (nn.Module, lora.Adapted)):
                self.watch(name, net)

    def on_freeze_teacher(self, real, args, teacher, *rest, **more):
        real(args, teacher, *rest, **more)
        self.watch("teacher", teacher.net)

    def on_start_phase(self, real, args, phases, phase, *rest):
        """phased_dmd.py: the networks come with their phases."""
        trained = real(args, phases, phase, *rest)
        for name in ("expert", "fake"):
            if getattr(phase, name) is not None:
                self.watch(name, getattr(phase, name))
        return trained

    def on_adapted(self, real, net, *args, **cond):
        self.enter(net)
        output = real(net, *args, **cond)
        self.leave(net)
        return output

    def on_backward(self, real, *args, **kwargs):
        self.enter("backward")
        real(*args, **kwargs)
        self.leave("backward")

    def on_update(self, real, run, optimizers, what):
        name = f"{what} update"
        self.enter(name)
        real(run, optimizers, what)
        self.leave(name)
        if self.began is not None:
            self.seconds[name] += self.seconds.pop("backward", 0.0)

    def on_steps(self, real, run, *args, **kwargs):
        for step in real(run, *args, **kwargs):
            self.begin_step()
            yield step

    def on_end_step(self, real, run, step, *args, **kwargs):
        time_to_save = real(run, step, *args, **kwargs)
        self.end_step()
        if step + 1 >= run.args.max_train_steps:
            raise Enough
        return time_to_save


def hooked(stopwatch, script):
    """A context in which the stopwatch sees what the script does."""

    def around(target, name, function):
        real = getattr(target, name)

        def wrapped(*args, **kwargs):
            return function(real, *args, **kwargs)

        return mock.patch.object(target, name, wrapped)

    stack = contextlib.ExitStack()
    places = [
        (Run, "start", stopwatch.on_start),
        (Run, "steps", stopwatch.on_steps),
        (Run, "update", stopwatch.on_update),
        (Run, "end_step", stopwatch.on_end_step),
        (torch.Tensor, "backward", stopwatch.on_backward),
        (script, "freeze_teacher", stopwatch.on_freeze_teacher),
        (script, "start_phase", stopwatch.on_start_phase),
        (lora.Adapted, "__call__", stopwatch.on_adapted),
    ]
    for target, name, function in places:
        if target and hasattr(target, name):
            stack.enter_context(around(target, name, function))
    return stack


def measure(name, steps, flags=()):
    """Run a script for SKIPPED + steps student steps.  -> its Stopwatch, without the first five.

    flags: of the script; they may shorten the run. Raises UserError where no step is left.
    """
    script, stopwatch = importlib.import_module(name), Stopwatch()
    with tempfile.TemporaryDirectory() as folder, hooked(stopwatch, script):
        length = f"--max_train_steps {SKIPPED + steps} --checkpointing_steps 1000000"
        length += " --preview_every 0"  # nor is a film of the ring a part of a step
        out = ["--output_dir", os.path.join(folder, "run")]
        with contextlib.suppress(Enough):
            script.main([*out, *length.split(), *flags])
    stopwatch.steps, stopwatch.calls = stopwatch.steps[SKIPPED:], stopwatch.calls[SKIPPED:]
    if not stopwatch.steps:
        raise UserError(f"the first {SKIPPED} steps are not measured: let the run be longer")
    return stopwatch


def print_table(stopwatch):
    """One line for each part that took part."""
    steps, calls = stopwatch.steps, stopwatch.calls
    parts = list(dict.fromkeys(part for step in steps for part in step))
    networks = [name for name in dict.fromkeys(stopwatch.names.values()) if name in parts]
    updates = [part for part in parts if part.endswith(" update")]
    whole = statistics.mean(step["total"] for step in steps)
    print(f"{'':16s} {'s/step':>8s}    {'std':>6s} {'share':>8s}   calls/step")
    for part in [*networks, *updates, "other", "total"]:
        seconds = [step.get(part, 0.0) for step in steps]
        mean = statistics.mean(seconds)
        std = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
        row = f"{part:16s} {mean:8.4f} +- {std:6.4f} {100 * mean / whole:6.1f} %"
        if part in networks:
            row += f"   {statistics.mean(step.get(part, 0) for step in calls):.3g}"
        print(row)


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Flags after -- go to the script."
    )
    p.add_argument("script", choices=SCRIPTS, help="which script")
    skipped = f"student steps measured, after {SKIPPED} that are not"
    p.add_argument("--steps", type=int, default=20, help=skipped)
    argv = [*(sys.argv[1:] if argv is None else argv), "--"]
    end = argv.index("--")
    args, given = p.parse_args(argv[:end]), argv[end + 1 : -1]
    stopwatch = measure(args.script, args.steps, given)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    where = f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"\n{' '.join([args.script, *given])}: {len(stopwatch.steps)} steps, {where}")
    print_table(stopwatch)


if __name__ == "__main__":
    run_main(main)
