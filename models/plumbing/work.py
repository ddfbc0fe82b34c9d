"""How much arithmetic a finished run was, and how near its updates came to what the machine does.

    the last line of dmd.py: work: 1,100 updates of 0.0203 TFLOP, 22.3 in all, in 4.9 minutes:
    76 GFLOP/s, 0.42 of the 183 that a product of matrices reaches here

Minutes differ from machine to machine, the work does not.
"""

import csv
import os
import time

import torch

from models.files import UserError
from models.plumbing.dry_run import planned

LEAST = 15.0  # seconds of updates; a shorter run says nothing about a machine


def work_done(args, *costs, **how):
    """Print the line above, on rank 0. The arguments are those of `dry_run`.

    The FLOPs of an update are those of --dry_run, what checkpointing computes again included. What
    comes before and after the updates (a bank, samples that are measured) is not in the minutes.
    """
    path = os.path.join(args.output_dir, "log.csv")
    if int(os.environ.get("RANK", 0)) or not os.path.isfile(path):
        return
    with open(path) as f:
        seconds = [float(row["seconds"]) for row in csv.DictReader(f) if row.get("seconds")]
    if sum(seconds) < LEAST:
        return
    try:
        flops = sum(planned(args, *costs, **how).flops())
    except UserError:  # as where its files have gone: the run itself is done all the same
        return
    if flops:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        how = sum(seconds), matmul_rate(args.mixed_precision), ranks
        print(describe(len(seconds), flops, *how))


def describe(updates, flops, seconds, rate, ranks=1):
    """The line. flops: of an update on one rank; rate: of a rank's machine, FLOP/s."""
    whole, a_rank = updates * flops, " a rank" if ranks > 1 else ""
    reached = whole / seconds
    return (
        f"work: {updates:,} updates of {flops / 1e12:.3g} TFLOP{a_rank}, "
        f"{ranks * whole / 1e12:.3g} in all, in {seconds / 60:.1f} minutes: "
        f"{reached / 1e9:.0f} GFLOP/s{a_rank}, {reached / rate:.2f} of the "
        f"{rate / 1e9:.0f} that a product of matrices reaches here"
    )


def matmul_rate(precision="no", repeats=5, clock=time.perf_counter):
    """FLOP/s of a product of two square matrices in the run's precision, the best of some.

    clock: time.process_time counts a CPU's own time, of all its threads.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, dtype = (8192 if device == "cuda" else 1024), torch.float32
    if precision == "bf16":
        dtype = torch.bfloat16
    a, best = torch.randn(size, size, dtype=dtype, device=device), 0.0
    for _ in range(repeats):
        began = clock()
        product = a @ a
        product[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 / (clock() - began))
    return best
