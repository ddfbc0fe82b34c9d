"""Speed of a video transformer with softmax attention and with half of its layers linear.

    python -m tests.linvideo_speed              # a small Wan on a CPU, Wan 1.3B's widths on a GPU

Weights are random, and everything is measured in one run. For each number of tokens it prints the
milliseconds of one block with either attention and of one call of either network (medians of
several calls), and ratios of whole samples: 50 calls of the teacher over 50 and over 4 calls of the
student. The paper's figures for Wan at 32,760 and 75,600 tokens on an H100 are 1.43 to 1.71 and
15.9 to 20.9, which include the text encoder and the VAE; here they are left out.
"""

import argparse
import os
import statistics
import sys
import time
from functools import partial

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from kernels.linear_attention import use_linear_attention  # noqa: E402
from models.networks.wan import WAN_1_3B, WanTransformer3DModel, rope_3d  # noqa: E402


def milliseconds(call, device, repeats):
    """Milliseconds of call(): the median of `repeats` calls, after one that is not counted."""
    took = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took[1:])


def parse_args(argv=None):
    gpu = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    grids = ["4x8x8", "4x16x16", "8x16x16", "16x16x16", "8x32x32"]
    if gpu:
        grids = ["21x30x52", "21x45x80"]
    grid_help = "frames x rows x columns of tokens"
    p.add_argument("--grids", nargs="+", default=grids, help=grid_help)
    p.add_argument(
        "--layers",
        type=int,
        default=30 if gpu else 4,
        help="blocks; every other one is linear in the student",
    )
    p.add_argument("--repeats", type=int, default=5, help="calls whose median counts")
    return p.parse_args(argv)


@torch.no_grad()
def main():
    args, gpu = parse_args(), torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    small = dict(num_attention_heads=4, attention_head_dim=64, ffn_dim=1024, text_dim=64)
    config = {**WAN_1_3B, **({} if gpu else small), "num_layers": args.layers}
    dtype = torch.bfloat16 if gpu else torch.float32
    teacher, student = (WanTransformer3DModel(**config).to(device, dtype).eval() for _ in range(2))
    use_linear_attention(student, list(range(1, args.layers, 2)))
    student.to(device, dtype)
    name = torch.cuda.get_device_name() if gpu else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}; "
        f"{args.layers} layers, {config['num_attention_heads']} heads of "
        f"{config['attention_head_dim']}"
    )
    print(
        "| tokens | softmax block | linear block | ratio | teacher's call | student's call "
        "| sample, 50 calls each | teacher's 50 over student's 4 |"
    )
    print("|" + "---|" * 8)
    for grid in args.grids:
        f, h, w = map(int, grid.split("x"))
        x = torch.randn(1, 16, f, 2 * h, 2 * w, device=device, dtype=dtype)
        t = torch.full((1,), 0.5, device=device)
        text = torch.randn(1, 512, config["text_dim"], device=device, dtype=dtype)
        rope = rope_3d(f, h, w, config["attention_head_dim"], device)
        _, modulation, context = student.condition_embedder(t, text)
        tokens = torch.randn(1, f * h * w, context.shape[2], device=device, dtype=dtype)
        of_block = (tokens, context, modulation, rope)
        softmax = milliseconds(partial(student.blocks[0], *of_block), device, args.repeats)
        linear = milliseconds(partial(student.blocks[1], *of_block), device, args.repeats)
        slow = milliseconds(partial(teacher, x, t, text), device, args.repeats)
        fast = milliseconds(partial(student, x, t, text), device, args.repeats)
        print(
            f"| {f * h * w:,} | {softmax:.1f} ms | {linear:.1f} ms | {softmax / linear:.2f} "
            f"| {slow:.1f} ms | {fast:.1f} ms | {slow / fast:.2f} "
            f"| {50 * slow / (4 * fast):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
