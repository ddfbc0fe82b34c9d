"""Seconds of a student step of any script, split among networks, backward passes and updates.

    python -m tests.bench dmd [--steps 20] [-- any flags of dmd.py]
    python -m tests.bench --shape wan-1.3b-480p dmd [--tflops 989] [-- any flags of dmd.py]
    python -m tests.bench dmd --dmd2 DIR        # beside a peer's own code (tests/bench_peers.py);
                                                # also --fastgen, --before; of tdm.py --tdm_demo

Runs the script's own main in a temporary folder and times it from outside, with hooks on the
networks that it trains and on its teacher, and wrappers around backward and Run.update. A GPU is
waited for at both ends of every part; the scripts themselves never wait. The first five steps are
dropped, and the run is stopped before it saves or measures anything. The rows of the table:

    a network      its forward calls, with or without gradient, and how many there are in a step
    ... update     the backward passes before an update and the update itself
    other          the rest of a step: draws, arithmetic of losses, moving averages, the log
    total          a step from its first draw to its row in log.csv

with mean and standard deviation over the steps. Below it stands a step's arithmetic, as --dry_run
reckons it, and its share of what a product of two matrices reaches, which is multiplied after every
step; on a CPU both are of processor time, so that other work on the machine counts little. It is
meant for one thread (OMP_NUM_THREADS=1). Compare two commits in one sitting, with --before.

--shape makes the teacher: a released config with random weights, in bfloat16 where there is a GPU,
or a small one of no release for a processor, with random prompts. One step is dropped, and what the
run needs is compared with what --dry_run says: peak memory, and model FLOPs over the seconds as a
share of the device's peak. Memory is the GPU allocator's, or what the process grew by beyond what
it had before main; for that start it with MALLOC_MMAP_THRESHOLD_=100000 in the environment, so
that the C library gives back what is freed. Large networks are made on the GPU directly.
"""

import argparse
import contextlib
import gc
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
from models.files import UserError, load_json  # noqa: E402
from models.networks import config_file, lora, network_from_config, to_dtype  # noqa: E402
from models.networks.wan import WanTwoNetworks  # noqa: E402
from models.plumbing import dry_run, teachers  # noqa: E402
from models.plumbing.footprint import on_meta  # noqa: E402
from models.plumbing.run import Run, run_main  # noqa: E402
from models.plumbing.work import matmul_rate  # noqa: E402
from tests import bench_peers  # noqa: E402
from tests.folders import save_conditions, save_config  # noqa: E402

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
        self.memory = None  # a Memory, whose peak is of the steps alone
        self.clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        self.spent = []  # seconds of each step by this clock,
        self.rates = None  # and a list: FLOP/s of a product of matrices after each step

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
        self.seconds, self.counts, self.began, self.began_cpu = {}, {}, now(), self.clock()

    def end_step(self):
        total = now() - self.began
        self.spent.append(self.clock() - self.began_cpu)
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
            if self.memory and not self.steps:
                self.memory.forget_peak()  # that of loading
            self.begin_step()
            yield step

    def on_end_step(self, real, run, step, *args, **kwargs):
        time_to_save = real(run, step, *args, **kwargs)
        self.end_step()
        if self.rates is not None:
            self.rates.append(matmul_rate(run.args.mixed_precision, 1, self.clock))
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


def measure(name, steps, flags=(), skipped=SKIPPED, memory=None, rates=None):
    """Run a script for skipped + steps student steps.  -> its Stopwatch, without the first ones.

    flags: of the script; they may shorten the run. memory: a Memory, for the steps' peak. rates: a
    list, for FLOP/s beside the steps. Raises UserError where no step is left.
    """
    script, stopwatch = importlib.import_module(name), Stopwatch()
    stopwatch.memory, stopwatch.rates = memory, rates
    with tempfile.TemporaryDirectory() as folder, hooked(stopwatch, script):
        length = f"--max_train_steps {skipped + steps} --checkpointing_steps 1000000"
        length += " --preview_every 0"  # nor is a film of the ring a part of a step
        out = ["--output_dir", os.path.join(folder, "run")]
        with contextlib.suppress(Enough):
            script.main([*out, *length.split(), *flags])
    for per_step in (stopwatch.steps, stopwatch.calls, stopwatch.spent, rates or []):
        del per_step[:skipped]
    if not stopwatch.steps:
        raise UserError(f"the first {skipped} steps are not measured: let the run be longer")
    return stopwatch


# ---- released shapes -----------------------------------------------------------------------------

# name: (of tests/folders.py, flags). Small ones have weights in files, large ones make them.
SHAPES = {
    "wan-tiny": ("tiny Wan", "--sample_shape 16 1 16 16 --train_batch_size 4"),
    "wan-middle": ("middle Wan", "--sample_shape 16 1 16 16 --train_batch_size 2"),
    "wan-tiny-pair": ("tiny Wan pair", "--sample_shape 16 1 16 16 --train_batch_size 4"),
    "wan-1.3b-480p": ("Wan 2.1 T2V 1.3B", "--sample_shape 16 21 60 104 --mixed_precision bf16"),
    "wan-14b-480p": ("Wan 2.1 T2V 14B", "--sample_shape 16 21 60 104 --mixed_precision bf16"),
    "z-image-1024": ("Z-Image", "--sample_shape 16 128 128 --mixed_precision bf16"),
    "pixart-512": ("PixArt-alpha 512", "--sample_shape 4 64 64 --mixed_precision bf16"),
    "trellis-ss": ("TRELLIS image structure", "--mixed_precision bf16"),
}
# The bank of linvideo.py is not a part of a step: the shortest there is.
EXTRA = {"linvideo": "--bank_size 1 --sampling_steps 2"}


def plan_of(name, flags, ranks=1, device=None):
    """-> what --dry_run reckons for a script with these flags, a Plan."""
    script = importlib.import_module(name)
    args = script.parse_args(list(flags))
    build, attention = getattr(script, "planned_network", None), name == "linvideo"
    net = on_meta(lambda: build(args)) if build else dry_run.teacher_network(args, attention)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return dry_run.Plan(args, net, *script.cost(args), ranks, device)


def random_weights(stack):
    """Let teachers be made on the GPU with random weights, from config.json alone."""

    def load_network(folder, dtype=torch.float32, **_):
        described = config_file(folder)
        config = load_json(described)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            net = to_dtype(network_from_config(config, described), dtype)
        return net.eval(), config

    def load_two_networks(root, dtype=torch.float32, **_):
        parts = [
            load_network(os.path.join(root, n), dtype) for n in ("transformer", "transformer_2")
        ]
        (high, config), (low, config_2) = parts
        return WanTwoNetworks(high, low, 0.875), config, config_2

    replaced = dict(load_network=load_network, load_two_networks=load_two_networks)
    replaced |= dict(weights_hash=lambda folder: "random", is_stored_in_bf16=lambda folder: False)
    for name, function in replaced.items():
        stack.enter_context(mock.patch.object(teachers, name, function))


class Memory:
    """Bytes that a run takes beyond what there was before: of the GPU's allocator, or of the
    process, without the pages of files (libraries are read as they are used)."""

    def __init__(self):
        warm_up()
        gc.collect()
        if torch.cuda.is_available():
            self.before = torch.cuda.memory_allocated()
            return
        now = process_bytes()
        self.before, self.files = now["VmRSS"], now["RssFile"]

    @staticmethod
    def forget_peak():
        """The peak begins anew."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")

    def peak(self):
        """Bytes at most since `forget_peak`, beyond those at the beginning."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self.before
        now = process_bytes()
        return now["VmHWM"] - self.before - (now["RssFile"] - self.files)


def warm_up():
    """One update of a layer: libraries are imported and have their work space."""
    layer = nn.TransformerEncoderLayer(512, 8, batch_first=True)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    nn.Conv3d(16, 64, (1, 2, 2), stride=(1, 2, 2))(torch.randn(2, 16, 4, 16, 16)).sum().backward()
    layer(torch.randn(4, 256, 512)).sum().backward()
    optimizer.step()


def process_bytes():
    """{name: bytes} of /proc/self/status."""
    with open("/proc/self/status") as f:
        words = [line.split() for line in f]
    return {w[0].rstrip(":"): 1024 * int(w[1]) for w in words if w[-1] == "kB"}


def measure_shape(name, shape, steps=2, given=()):
    """Run a script at one of SHAPES.  -> its Stopwatch, bytes at its peak, and its Plan."""
    release, flags = SHAPES[shape]
    small = release.split()[0] in ("tiny", "middle")
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        teacher = save_config(release, os.path.join(root, "teacher"), weights=small)
        conditions = save_conditions(release, os.path.join(root, "conditions.safetensors"))
        flags = ["--teacher", teacher, *conditions, *flags.split(), *EXTRA.get(name, "").split()]
        flags += given
        importlib.import_module(name)
        if not small:
            random_weights(stack)
        memory = Memory()
        stopwatch = measure(name, steps, flags, skipped=1, memory=memory)
        return stopwatch, memory.peak(), plan_of(name, flags)


def print_shape(stopwatch, used, plan, tflops):
    """What --shape adds to the table."""
    seconds = statistics.mean(step["total"] for step in stopwatch.steps)
    model, again = plan.flops()
    print(f"model {model / 1e12:.5g} TFLOP an update, recomputed {again / 1e12:.5g} TFLOP")
    share = model / seconds / (tflops * 1e12)
    print(f"{seconds:.4g} seconds an update: {100 * share:.3g} % of {tflops:g} TFLOP/s")
    print(f"memory {used / 1e9:.4g} GB, predicted {plan.peak() / 1e9:.4g} GB")


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


def print_share(stopwatch, plan):
    """A step's arithmetic, and its share of what a product of matrices reaches.

    plan's FLOPs are a mean over steps, some of which may do more than others: so is the share.
    """
    flops, n = sum(plan.flops()), len(stopwatch.spent)
    if not flops:
        return
    possible = [s * rate for s, rate in zip(stopwatch.spent, stopwatch.rates, strict=True)]
    _, low, high = bench_peers.spread([flops / each for each in possible])
    kind = "seconds" if torch.cuda.is_available() else "seconds of processor time"
    print(f"work: {flops / 1e12:.3g} TFLOP a step, {statistics.mean(stopwatch.spent):.3g} {kind}:")
    print(
        f"{n * flops / sum(possible):.2f} [{low:.2f}, {high:.2f}] of a product of matrices, "
        f"which reaches {statistics.median(stopwatch.rates) / 1e9:.4g} GFLOP/s"
    )


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Flags after -- go to the script."
    )
    p.add_argument("script", choices=SCRIPTS, help="which script")
    skipped = f"student steps measured, after {SKIPPED} that are not"
    p.add_argument("--steps", type=int, default=None, help=f"{skipped} (20; with --shape 2)")
    p.add_argument("--shape", choices=SHAPES, default=None, help="a teacher with random weights")
    peak = "the device's peak, of which model FLOPs are a share (H100: 989)"
    p.add_argument("--tflops", type=float, default=dry_run.H100, help=peak)
    for flag, (*_, whose, _train, _flags) in bench_peers.PEERS.items():
        p.add_argument(f"--{flag}", metavar="DIR", help=f"compare with a checkout of {whose}")
    argv = [*(sys.argv[1:] if argv is None else argv), "--"]
    end = argv.index("--")
    args, given = p.parse_args(argv[:end]), argv[end + 1 : -1]
    for flag in bench_peers.PEERS:
        if getattr(args, flag):
            return bench_peers.beside(
                flag, getattr(args, flag), args.script, args.steps or 20, given
            )
    if args.shape:
        stopwatch, *shown = measure_shape(args.script, args.shape, args.steps or 2, given)
    else:
        stopwatch = measure(args.script, args.steps or 20, given, rates=[])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    where = f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"\n{' '.join([args.script, *given])}: {len(stopwatch.steps)} steps, {where}")
    print_table(stopwatch)
    if args.shape:
        print_shape(stopwatch, *shown, args.tflops)
    else:
        print_share(stopwatch, plan_of(args.script, given))


if __name__ == "__main__":
    run_main(main)
