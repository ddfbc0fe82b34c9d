"""Time of a sample of TRELLIS's structure flow at its real size, teacher against student.

    python -m tests.mdt_speed                   # seconds on a GPU; an hour or more on two cores

Weights are random. A step takes two calls where guidance acts and else one. The teacher takes 25
steps, guided at all of them or at those with t in TRELLIS's interval [.5, 1] of times shifted by 3,
which are 19 of 25. The student takes two steps or one, guided, which is mdt_dist.py's default for
released teachers, or not. The paper's figures, on an A800 and with both stages and the decoders
included, are 9.0x in one step a stage and 6.5x in two.
"""

import argparse
import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from models.diffusion import step_grid  # noqa: E402
from models.networks.trellis import SS_FLOW_L, SparseStructureFlowModel  # noqa: E402


@torch.no_grad()
def main():
    gpu = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--repeats", type=int, default=5 if gpu else 1, help="samples whose median counts"
    )
    p.add_argument(
        "--tokens",
        type=int,
        default=1374,
        help="image tokens: DINOv2 of 518 x 518 pixels with registers gives 1,374",
    )
    args = p.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    with torch.device(device):
        net = SparseStructureFlowModel(**SS_FLOW_L).to(dtype).eval()
        x = torch.randn(1, *net.latent_shape)
        tokens = torch.randn(1, args.tokens, SS_FLOW_L["cond_channels"], dtype=dtype)
    interval = sum(0.5 <= t <= 1 for t in step_grid(25, 3.0)[:-1])
    rows = {
        "teacher, 25 steps, guided at all": 50,
        f"teacher, 25 steps, guided at {interval}": 25 + interval,
        "student, 2 steps, guided": 4,
        "student, 1 step, guided": 2,
        "student, 2 steps, not guided": 2,
        "student, 1 step, not guided": 1,
    }
    name = torch.cuda.get_device_name() if gpu else "CPU"
    parameters = sum(w.numel() for w in net.parameters())
    print(
        f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}; "
        f"{parameters:,} parameters, {args.tokens} image tokens, batch 1"
    )

    def sample(calls):
        for _ in range(calls):
            net(x, torch.full((1,), 0.5, device=device), tokens)
        if gpu:
            torch.cuda.synchronize()

    sample(1)
    print("| sampler | network calls | ms per sample | teacher's over it |\n|---|---|---|---|")
    slowest = None
    for name, calls in rows.items():
        took = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            sample(calls)
            took.append(time.perf_counter() - began)
        took = statistics.median(took)
        slowest = slowest or took
        print(f"| {name} | {calls} | {1000 * took:.1f} | {slowest / took:.1f} |", flush=True)


if __name__ == "__main__":
    main()
