"""What data cost a run of latent_fm.py: a step with cached latents, and a second start.

    python -m tests.bench_data                       # 20,000 pictures, batch 160

Prints processor milliseconds of a batch of 160 latents of 4 x 32 x 32 with their labels, from a
cache as --cache_latents writes it, and how much of that is the posterior's noise; and of a first
and a second start on a folder of small PNGs, to the first batch, each in a process of its own: the
seconds, what the process has grown by, and how many pictures were opened. The second start of a
cached run opens none.
"""

import argparse
import multiprocessing
import os
import resource
import time
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import latent_fm
from models.draws import Draws
from models.networks.autoencoders import PatchPCA
from models.networks.latent_space import LatentSpace
from models.plumbing import latents, sets
from models.plumbing.run import Run
from models.plumbing.training_data import load_training_data

CLASSES, SIDE = 10, 16
LATENT = (4, 32, 32)


def write_pictures(folder, n):
    """n PNGs of SIDE pixels in class folders, unless they are there."""
    if os.path.isdir(folder) and len(os.listdir(folder)) == CLASSES:
        return
    rng = np.random.default_rng(0)
    for k in range(CLASSES):
        os.makedirs(f"{folder}/{k}", exist_ok=True)
    for i in range(n):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{folder}/{i % CLASSES}/{i:06d}.png", compress_level=0)


def random_cache(folder, n):
    """A LatentCache of n posteriors of the size that Stable Diffusion's encoder gives for 256."""
    cache = latents.LatentCache(folder, n, {"made": "at random"})
    cache.begin()
    g = torch.Generator().manual_seed(0)
    for part in cache.missing():
        rows = min(n, (part + 1) * latents.ROWS) - part * latents.ROWS
        moments = torch.randn(rows, 2, 2, *LATENT, generator=g).abs().half()
        latents.save_tensors({"moments": moments}, cache.path(part))
    return cache.open()


def step_cost(folder, batch, steps=20):
    """Processor milliseconds of a batch from a cache, and of its noise.  -> medians of so many"""
    n = 2 * latents.ROWS
    cache, x = random_cache(folder, n), torch.zeros(n, 1)
    data = SimpleNamespace(x=x, label=torch.arange(n) % CLASSES, num_classes=CLASSES)
    space = SimpleNamespace(autoencoder=None, normed=lambda z, sd: (z, sd))  # as of a VAE
    args = SimpleNamespace(hflip=True, task="class", label_dropout=0.1)
    found = []
    for step in range(steps):
        draw = Draws(0, step, 0, range(batch))
        draw.shape = LATENT
        times = [time.process_time()]
        latent_fm.training_batch(args, draw, data, space, cache)
        times.append(time.process_time())
        draw.noise("posterior")
        times.append(time.process_time())
        found.append(1000 * np.diff(times))
    return np.median(found, axis=0).tolist()


def start(args, folder):
    """From flags to the first batch, as latent_fm.train does it.

    -> seconds, MB that the process has grown by at most, pictures that were opened.
    """
    opened, real = [], sets.read_frames

    def counted(found, *rest):
        opened.append(1)
        return real(found, *rest)

    sets.read_frames = counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    try:
        flags = ["--data", folder, "--resolution", str(SIDE), "--autoencoder", "pca"]
        flags += ["--pca_patch", "4", "--pca_channels", "4", "--cache_latents", f"{folder}-latents"]
        flags += ["--train_batch_size", str(args.batch), "--output_dir", f"{args.output}/run"]
        args = latent_fm.parse_args(flags)
        run = Run(args, "latent_fm")
        data = load_training_data(args, None)
        space = LatentSpace(PatchPCA(3, 4, 4))  # whose weights do not matter here
        cache = latents.cache_latents(run, data.x, space, latent_fm.describe_encoder(args, space))
        cache.rows(torch.arange(run.B), None, "cpu")
    finally:
        sets.read_frames = real
    seconds = time.perf_counter() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return seconds, grown / 1024, len(opened)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = p.add_argument
    add("--pictures", type=int, default=20000, help="in the folder")
    add("--batch", type=int, default=160, help="rows of a step")
    add("--output", default="runs/bench_data", help="folder of pictures and caches")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(1)
    print("| what | |\n|---|---|")
    cost, noise = step_cost(f"{args.output}/cache", args.batch)
    print(f"| a step of {args.batch} cached latents, processor ms | {cost:.1f} |")
    print(f"| of which the posterior's noise | {noise:.1f} |", flush=True)
    folder = f"{args.output}/pictures"
    write_pictures(folder, args.pictures)
    for which in ("first", "second"):
        with multiprocessing.get_context("fork").Pool(1) as process:
            seconds, grown, opened = process.apply(start, (args, folder))
        print(
            f"| {which} start on {args.pictures:,} pictures: seconds, MB more, pictures opened "
            f"| {seconds:.1f}, {grown:.0f}, {opened:,} |"
        )


if __name__ == "__main__":
    main()
