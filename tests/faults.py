"""Runs that are killed, stopped and damaged at random moments, and have to end as if unbroken.

    python -m tests.faults --minutes 30          # all in turn, on one process and on two
    python -m tests.faults --minutes 5 dmd tdm   # these; exit code 1 if something was lost
    python -m tests.faults --shard_ranks 1 dmd   # two ranks with whole networks each, not halves

A case is a short run that meets one fault and is resumed: SIGKILL at a random moment, of one rank
where there are two; SIGKILL inside a save, at a random fsync or rename; SIGTERM; files that cannot
grow beyond a size, as on a full disk; a clock that is set back; a file cut, or with a bit flipped,
after a kill: of the newest state, of the bank of trajectories (linvideo), of cached latents
(latent_fm), or the prompts (dmd+prompts, a text teacher). The resumed run has to end, after at most
one refusal in one line whose advice gets past it, with the student and the state of the unbroken
run, bit for bit. A bit that is flipped among the numbers of a state, a bank or a cache cannot be
known from the file, nor in prompts before a state knows them: there it is enough that the run ends.
On two ranks networks are sharded over both. Samples at the end of runs are left out. What is
printed is the table of docs/trust.md, a row a script and number of ranks. For Linux: a case is a
fork.
"""

import argparse
import contextlib
import importlib
import io
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # tests.helpers imports forks
from models.plumbing import report, teachers  # noqa: E402
from models.plumbing.run import run_main  # noqa: E402
from tests.helpers import (  # noqa: E402
    assert_bit_equal,
    ring_dit,
    ring_network,
    save_tiny_teacher,
    save_tiny_wan,
    weights,
)

SHORT = "--max_train_steps 8 --train_batch_size 4 --checkpointing_steps 2 --seed 1".split()
CASES = {  # flags with which a script makes an update of the tiny teacher in no time
    "dmd": "--student_steps 2 --lr_decay_share 0",
    "decoupled_dmd": "--student_steps 2 --lr_decay_share 0",
    "tdm": "--student_steps 1 2 --lr_decay_share 0",
    "phased_dmd": "--student_steps 4 --phases 2 --lr_decay_share 0",
    "linvideo": "--bank_size 8 --bank_batch 4 --sampling_steps 4 --objective adm",
    "mdt_dist": "--teacher ring --lr_decay_share 0 --preview_every 0",
    "latent_fm": "--data ring --pool 200 --optimizer adamw --lr_warmup_steps 0 --preview_every 0",
    "dmd+prompts": "--student_steps 2 --lr_decay_share 0",
}
FAULTS = ("kill", "kill in a save", "term", "full disk", "clock", "damage")
INPUTS = {  # what else is damaged, in the folder of a case
    "linvideo": "run/bank",
    "latent_fm": "latents",
    "dmd+prompts": "text/prompts.safetensors",
}


def flags_of(script, root, ranks, shard_ranks=None):
    """The flags of a script, without its --output_dir. root: has teacher/, text/ and case/."""
    flags = [*SHORT, *CASES[script].split()]
    if script == "latent_fm":
        flags += ["--cache_latents", str(root / "case" / "latents")]
    elif script == "dmd+prompts":
        text = root / "case" / "text"
        flags += ["--teacher", str(text), "--prompts", str(text / "prompts.safetensors")]
        flags += "--sample_shape 4 2 4 6 --teacher_steps 1 --preview_samples 2".split()
    else:
        flags = [*SHORT, "--teacher_steps", "1", "--preview_samples", "2"]
        flags += ["--teacher", str(root / "teacher"), *CASES[script].split()]
    if ranks > 1 and shard_ranks:
        flags += ["--shard_ranks", str(shard_ranks)]
    return [*flags, "--train_batch_size", str(4 // ranks)]


# ---- processes -----------------------------------------------------------------------------------


def dies_in_a_save(n):
    """This process kills itself at its n-th fsync or rename."""
    left = [n]

    def counted(real):
        def call(*args):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)


def clock_set_back(after):
    """time.time goes back by a day so many seconds from now."""
    real, began = time.time, time.time()
    time.time = lambda: real() - 86400 * (real() > began + after)


def start(script, flags, folder, rank=0, ranks=1, port=0, arm=None):
    """Fork a process that runs a script, whose output goes to a file.  -> its id"""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        out = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb", 0)) for n in (1, 2))
        if ranks > 1:
            there = dict(RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os.environ.update({k: str(v) for k, v in there.items()})
        if arm:
            arm()
        module = importlib.import_module(script.split("+")[0])
        run_main(lambda: module.main(flags))
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code or 0)


def run(script, flags, folder, ranks, arm=None, fault=None, rng=None, duration=0.0):
    """A run on so many ranks, which one of them may not survive.

    fault: (signal, seconds until it). As torchrun does, the others are ended when one fails.  ->
    exit codes of all, what rank 0 said
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = [start(script, flags, folder, r, ranks, port, arm) for r in range(ranks)]
    began, codes, last = time.time(), {}, time.time() + 600
    victim = rng.choice(pids) if rng else pids[0]
    while len(codes) < ranks:
        for pid in [p for p in pids if p not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if fault and time.time() - began > fault[1]:
            if victim not in codes:
                os.kill(victim, fault[0])
            fault = None
        failed = [c for c in codes.values() if c]
        if (failed and time.time() > began) or time.time() > last:
            time.sleep(0.1)  # the others notice by themselves, or not
            for pid in [p for p in pids if p not in codes]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return list(codes.values()), (folder / "said-0").read_text(errors="replace")


# ---- a case --------------------------------------------------------------------------------------


def damage(place, rng):
    """Cut a file, or one in this folder, or flip one of its bits.  -> what was done, or None"""
    paths = sorted(p for p in place.rglob("*") if p.is_file() and ".tmp-" not in p.name)
    paths = [place] if place.is_file() else paths
    if not paths:
        return None
    path = rng.choice(paths)
    data, how = bytearray(path.read_bytes()), rng.choice(["cut", "flip"])
    if how == "cut":
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{how} {path.name}"


def broken_run(script, flags, folder, ranks, kind, rng, usual):
    """A run with a fault of this kind; usual: seconds, bytes of the largest file and calls of
    fsync that it would have.  -> its exit codes, what it said, what else was done to it"""
    seconds, size = usual
    when, arm, fault = rng.uniform(0.05, 1) * seconds, None, None
    if kind.startswith(("kill", "damage")):
        fault = signal.SIGKILL, when
    if kind == "term":
        fault = signal.SIGTERM, when
    if kind == "kill in a save":
        n = rng.randrange(1, 60)
        arm = lambda: dies_in_a_save(n)  # noqa: E731
    if kind == "full disk":
        most = rng.randrange(size // 4, size)
        arm = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # noqa: E731
    if kind == "clock":
        arm = lambda: clock_set_back(when)  # noqa: E731
    codes, said = run(script, flags, folder, ranks, arm, fault, rng)
    place = damaged_place(script, folder, kind)
    return codes, said, damage(place, rng) if place else None


def damaged_place(script, folder, kind):
    """The folder or file of which a case of this kind damages a part; None: nothing."""
    if kind == "damage of inputs":
        return folder / INPUTS[script]
    states = sorted((folder / "run" / "state").glob("step-*"))
    return states[-1] if states and kind == "damage" else None


def follow_advice(script, root, kind):
    """What the refusal of a damaged file names: an earlier state, the prompts as they were, or
    what was made once is made again."""
    folder = root / "case"
    place = damaged_place(script, folder, kind)
    if place.is_dir():
        shutil.rmtree(place)
    else:
        shutil.copy(root / "text" / place.name, place)


def fresh_folder(root):
    """root/case, empty but for the text teacher."""
    shutil.rmtree(root / "case", ignore_errors=True)
    (root / "case").mkdir()
    if (root / "text").exists():
        shutil.copytree(root / "text", root / "case" / "text")
    return root / "case"


def one_case(script, root, flags, ranks, kind, rng, want, usual):
    """-> "survived", "refused once", or what went wrong."""
    folder = fresh_folder(root)
    codes, said, done = broken_run(script, flags, folder, ranks, kind, rng, usual)
    if "Traceback" in said and ranks == 1:
        return f"a traceback after {kind}:\n{said[-1500:]}"
    if kind == "full disk" and any(codes) and "error: the disk is full" not in said and ranks == 1:
        return f"exit codes {codes} on a full disk:\n{said[-500:]}"
    again, refused = [*flags, "--resume_from_checkpoint", "latest"], False
    codes, said = run(script, again, folder, ranks)
    if set(codes) != {0} and done:
        error = [line for line in said.splitlines() if line.startswith("error: ")]
        if "Traceback" in said or len(error) != 1:
            return f"{done}: exit codes {codes}\n{said[-1500:]}"
        refused = True
        follow_advice(script, root, kind)
        codes, said = run(script, again, folder, ranks)
    if set(codes) != {0}:
        return f"lost after {kind}, {done}: exit codes {codes}\n{said[-1500:]}"
    left = [p for p in (folder / "run").rglob("*") if ".tmp-" in p.name]
    if left:
        return f"left behind after {kind}: {left}"
    if done and "flip" in done and not refused:
        return "survived"
    try:
        assert_bit_equal(weights(folder / "run"), want)
    except AssertionError:
        return f"differs after {kind}, {done}"
    return "refused once" if refused else "survived"


def prepare(script, root, flags, ranks):
    """The unbroken run -> its weights; seconds, and bytes of its largest file."""
    folder = fresh_folder(root)
    began = time.time()
    codes, said = run(script, flags, folder, ranks)
    assert set(codes) == {0}, said[-3000:]
    size = max(p.stat().st_size for p in (folder / "run").rglob("*") if p.is_file())
    return weights(folder / "run"), (time.time() - began, size)


def leave_out_samples():
    """What runs draw at their end takes longer than their updates."""
    for name in ("finish", "preview", "save_samples"):
        setattr(report, name, lambda *a, **k: None)
    for name in ("latent_fm", "linvideo", "mdt_dist"):  # which have one of their own
        importlib.import_module(name).finish = lambda *a, **k: None
    teachers.fit_ring_network = lambda teacher, seed: ring_network(seed)
    teachers.fit_ring_transformer = lambda teacher, seed: ring_dit(seed)


def test_script(script, ranks, root, until, rng, shard_ranks=None):
    """Cases until this time, at least one.

    -> {"faults": n, "kills": n of them, "survived": n, "refused once": n, "wrong": [texts]}
    """
    found = {"faults": 0, "kills": 0, "survived": 0, "refused once": 0, "wrong": []}
    kinds = list(FAULTS) + ["damage of inputs"] * (script in INPUTS)
    rng.shuffle(kinds)
    flags = [*flags_of(script, root, ranks, shard_ranks), "--output_dir", str(root / "case/run")]
    want, usual = prepare(script, root, flags, ranks)
    while time.time() < until or not found["faults"]:
        kind = kinds[found["faults"] % len(kinds)]
        found["faults"] += 1
        found["kills"] += kind.startswith(("kill", "damage"))
        result = one_case(script, root, flags, ranks, kind, rng, want, usual)
        if result in found:
            found[result] += 1
        else:
            found["wrong"].append(result)
            print(f"{script} on {ranks}: {result}", flush=True)
    return found


test_script.__test__ = False  # for pytest


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("script", nargs="*", choices=[*CASES, []], help="these (default: all)")
    p.add_argument("--minutes", type=float, default=30, help="of all together")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--shard_ranks", type=int, default=None, help="of the runs on two ranks")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    leave_out_samples()
    scripts, rng, wrong = args.script or list(CASES), random.Random(args.seed), 0
    columns = ("script", "ranks", "faults", "kills", "survived", "refused once", "wrong")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    share, end = 60 * args.minutes / (2 * len(scripts)), time.time()
    for script in scripts:
        for ranks in (1, 2):
            end += share
            with tempfile.TemporaryDirectory() as folder:
                save_tiny_teacher(Path(folder) / "teacher")
                if script == "dmd+prompts":
                    save_tiny_wan(Path(folder) / "text")
                r = test_script(script, ranks, Path(folder), end, rng, args.shard_ranks)
            wrong += len(r["wrong"])
            cells = [script, ranks, *(r[name] for name in columns[2:-1]), len(r["wrong"])]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
