"""Everything that the kernels' pages lack, measured on one GPU: tests, errors, times, targets.

    python -m tests.gpu_figures                # at most 13 minutes; into runs/gpu_figures
    python -m tests.gpu_figures --only hedgehog softmax elu

It needs requirements-dev.txt. Each part is a command of its own, whose output goes to the screen
and to PART.log; one that fails or takes too long does not keep the next from running. Targets are
those of docs/results/kernels.md. Exit code 0 where all parts ran and all targets are met, else 1.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kernels import linear_attention_ops as ops  # noqa: E402
from models.files import load_json  # noqa: E402

BENCH = "kernels.bench_linear_attention"
BRIEFLY = "--heads 12 --repeats 10 --seconds .3 --graph"
PYTEST = "pytest tests/test_linear_attention.py --long -q"
LONG = "tests/test_linear_attention.py::test_long_sequences_on_a_gpu"  # a part of its own
PARTS = {  # name: module and flags, and most seconds
    "cases": (f"{PYTEST} -n 4 --dist load -k on_a_gpu --deselect {LONG}", 200),
    "hedgehog": (
        f"{BENCH} {BRIEFLY} --lengths 1024,2048,4096,8192,32760 --methods triton,sdpa "
        "--sdpa flash,cudnn",
        120,
    ),
    "softmax": (f"{BENCH} {BRIEFLY} --lengths 32760 --feature_map softmax --methods triton", 60),
    "elu": (f"{BENCH} {BRIEFLY} --lengths 32760 --feature_map elu --methods triton", 60),
    "errors": (f"{PYTEST} -n 0 -s -k long_sequences_on_a_gpu", 100),
    "video": ("tests.linvideo_speed --layers 4", 100),
    "peer": (f"{BENCH} {BRIEFLY} --lengths 8192,32760 --methods fbi", 80),
    "float32": (
        f"{BENCH} {BRIEFLY} --lengths 1024,8192,32760 --head_dim 64 --dtype fp32 "
        "--methods triton,torch",
        60,
    ),
}
LENGTH, FROM = 32760, 2048  # tokens of the figures, and from where on SDPA is behind
FLOORS = {  # part: most floors in the forward pass, and with the backward pass
    "hedgehog": (1.7, 2.2),
    "softmax": (1.4, 1.4),
    "elu": (1.4, 1.4),
}


def command(part, folder):
    """The command of a part, as a list; times go to PART.json."""
    flags = PARTS[part][0].split()
    more = ["--json", str(Path(folder) / f"{part}.json")] if flags[0] == BENCH else []
    return [sys.executable, "-m", *flags, *more]


def run(part, folder):
    """Run a part, its output on the screen and in PART.log.  -> whether it came to its end."""
    began, limit = time.monotonic(), PARTS[part][1]
    print(f"\n==== {part}: {' '.join(command(part, folder)[1:])}", flush=True)
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    process = subprocess.Popen(command(part, folder), cwd=ROOT, start_new_session=True, **how)
    # with all that it has started, lest something of it goes on using the GPU
    late = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
    late.start()
    with open(Path(folder) / f"{part}.log", "w") as log:
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
    code = process.wait()
    late.cancel()
    seconds = time.monotonic() - began
    killed = f", ended after {limit} s" if code == -signal.SIGKILL else ""
    print(f"==== {part}: exit code {code}{killed}, {seconds:.0f} s", flush=True)
    return code == 0


def verdicts(part, figures):
    """Figures of a part beside its targets.  -> [(what, found, target, met)]; not measured: None.

    figures: what the benchmark writes.
    """
    rows = [r for r in figures["rows"] if r["method"] == "triton" and r["N"] == LENGTH]
    row, found = (rows or [{}])[0], []
    for name, most in zip(("forward", "step"), FLOORS[part]):
        if most is not None:
            floors = row.get(f"{name}_floors")
            met = floors is not None and floors <= most
            found.append((f"{part}, {name}, floors at {LENGTH:,} tokens", floors, most, met))
    for crossing in figures["crossover"]:
        if part == "hedgehog" and crossing["method"] == "triton":
            N, what = crossing["N"], f"{part}, {crossing['what']}: ahead of SDPA from N ="
            found.append((what, N, FROM, N is not None and N <= FROM))
    return found


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    p.add_argument("--output_dir", default="runs/gpu_figures", help="folder of logs and figures")
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        p.error(
            "no CUDA device here: what the kernels do without one is in docs/results/kernels.md"
        )
    if ops.triton is None or ops.INTERPRET:
        p.error("the kernels do not run compiled here: install triton, unset TRITON_INTERPRET")
    os.makedirs(args.output_dir, exist_ok=True)
    folder = os.path.abspath(args.output_dir)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    failed = [part for part in args.only if not run(part, folder)]
    print("\n| target | found | at most | |\n|---|---|---|---|")
    met = []
    for part in args.only:
        path = os.path.join(folder, f"{part}.json")
        if part in FLOORS and part not in failed and os.path.isfile(path):
            for what, found, most, ok in verdicts(part, load_json(path)):
                value = "none" if found is None else f"{found:.4g}"
                print(f"| {what} | {value} | {most:g} | {'met' if ok else 'not met'} |")
                met.append(ok)
    if failed:
        print(f"failed, see the logs in {folder}: {', '.join(failed)}")
    return 0 if all(met) and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
