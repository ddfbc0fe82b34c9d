"""What LFM (arXiv 2307.08698) claims about latent flow matching, on the world `shapes`.

Each command prints a Markdown table.

    # cost of latents against pixels, with the same network
    python -m tests.latent_claims cost
    # evaluations of Dormand-Prince on the Gaussian fit of pixels and latents
    python -m tests.latent_claims nfe
    # fd against evaluations, Euler and Heun, three sets of noise
    python -m tests.latent_claims quality runs/latent_fm-shapes
    # fd against evaluations: Heun on shifted grids, Dormand-Prince at several tolerances
    python -m tests.latent_claims solvers runs/latent_fm-shapes
    # accuracy, fd, diversity and pixel std against gamma
    python -m tests.latent_claims guidance runs/latent_fm-shapes
"""

import argparse
import os
import statistics
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from latent_fm import dormand_prince, flow_matching_loss, sample  # noqa: E402
from models.diffusion import ode_calls  # noqa: E402
from models.networks import load_network  # noqa: E402
from models.networks.dit import DiT  # noqa: E402
from models.networks.latent_space import space_beside  # noqa: E402
from models.plumbing import report  # noqa: E402
from models.plumbing.teachers import student_folder  # noqa: E402
from models.worlds import load_world  # noqa: E402
from models.worlds.measures import balanced_labels  # noqa: E402


def network(shape, patch=2):
    """A DiT with random weights for samples (C, H, W)."""
    torch.manual_seed(0)
    width = dict(dim=128, depth=4, num_classes=6, cond_dim=48)
    return DiT(size=shape[1:], patch=[patch] * 2, channels=shape[0], **width)


def flops(net, batch=1):
    """Floating-point operations of one call for one sample, counted and not timed."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(batch, *net.latent_shape), torch.ones(batch))
    return counter.get_total_flops() / batch


def seconds_a_step(net, batch=16, repeats=3):
    """Processor seconds of loss and gradient, the least of a few repeats."""
    x, t, took = torch.randn(batch, *net.latent_shape), torch.rand(batch), []
    for _ in range(repeats):
        began = time.process_time()
        flow_matching_loss(net, x, torch.randn_like(x), t, {})[0].backward()
        took.append(time.process_time() - began)
    return min(took)


def gaussian_evaluations(x, tols=(1e-5,), batch=4, seeds=(0,)):
    """Evaluations of Dormand-Prince on the exact field of a Gaussian, solved in its own axes.

    The Gaussian has the mean and covariance of x (n, ...).
    -> {tolerance: [one count for each seed of the noise]}.
    """
    x = x.flatten(1).double()
    mean = x.mean(0)
    var, q = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    var = var.clamp_min(0)

    def v(z, t):
        y = (z - (1 - t) * mean) @ q
        return y * ((t - (1 - t) * var) / ((1 - t) ** 2 * var + t**2).clamp_min(1e-30)) @ q.T - mean

    generators = [torch.Generator().manual_seed(s) for s in seeds]
    noise = [torch.randn(batch, x.shape[1], generator=g, dtype=torch.float64) for g in generators]
    # a direction without variance has no velocity at t = 0, so the solver ends at t = 1e-3
    return {tol: [dormand_prince(v, z, tol, tol, end=1e-3)[1] for z in noise] for tol in tols}


def load(run):
    """The network of a run of latent_fm.py, its latent space, and the world."""
    folder = student_folder(run)
    net, config = load_network(folder)
    return net, space_beside(folder), load_world("shapes")


def measured(loaded, keywords, n, seed, calls=None):
    """Measures of n samples from a seed's noise.

    loaded: what `load` returned; keywords: of latent_fm.sample; calls: as there.
    -> {column: float}.
    """
    net, space, world = loaded
    label = balanced_labels(n, world.num_classes)
    z = torch.randn(n, *net.latent_shape, generator=torch.Generator().manual_seed(seed))

    def draw(a, b):
        return space.to_pixels(sample(net, z[a:b], label[a:b], calls=calls, **keywords))

    x = report.many(draw, n)[0]
    return {**world.measure(x, label), "pixel std": float(x.std())}


def rows(run, settings, n=600, seeds=(0, 1, 2)):
    """Measure samples under several settings, with mean and range over the seeds of the noise.

    settings: [(name, evaluations, keywords of latent_fm.sample)] -> Markdown lines.
    """
    net, space, world = load(run)
    columns = ("fd", "accuracy", "diversity", "patch_swd", "pixel std")
    lines = ["| | evaluations | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for name, nfe, keywords in settings:
        calls = []
        found = [measured((net, space, world), keywords, n, seed, calls) for seed in seeds]
        cells = []
        for c in columns:
            values = [f[c] for f in found]
            mean = f"{statistics.mean(values):.3g}"
            cells.append(f"{mean} ({min(values):.3g} to {max(values):.3g})")
        nfe = nfe or f"{statistics.mean(calls):.0f}"  # an adaptive solver's, over its batches
        lines.append(f"| {name} | {nfe} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr)
    return lines


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", choices=["cost", "nfe", "quality", "solvers", "guidance"])
    help_run = "run of latent_fm.py, for quality, solvers and guidance"
    p.add_argument("run", nargs="?", default="runs/latent_fm-shapes", help=help_run)
    args = p.parse_args()
    world = load_world("shapes")
    if args.what == "cost":
        latent, pixel = network(world.latent_shape), network(world.shape)
        print("| | tokens | FLOP a call | s a step of 16 |\n|---|---|---|---|")
        for name, net in (("latent", latent), ("pixel", pixel)):
            tokens = (net.size[0] // 2) ** 2
            print(f"| {name} | {tokens} | {flops(net):.3g} | {seconds_a_step(net):.3g} |")
    elif args.what == "nfe":
        x = world.data(8000, 31)[0]
        z = world.space.to_latents(x)
        print("| | 1e-3 | 1e-5 |\n|---|---|---|")
        for name, a in (
            ("latents, one scale (shipped)", z),
            ("latents, channels of unit variance", z / z.std((0, 2, 3), keepdim=True)),
            ("pixels", x),
        ):
            counts = gaussian_evaluations(a, (1e-3, 1e-5), seeds=(0, 1, 2)).values()
            cells = [", ".join(map(str, n)) for n in counts]
            print(f"| {name} | " + " | ".join(cells) + " |")
    elif args.what == "quality":
        settings = [
            (solver, ode_calls(n, solver), dict(steps=n, solver=solver))
            for solver, ns in (("euler", (1, 3, 7, 15)), ("heun", (2, 4, 8)))
            for n in ns
        ]
        print("\n".join(rows(args.run, settings)))
    elif args.what == "solvers":
        settings = [
            (f"heun, shift {s:g}", ode_calls(n, "heun"), dict(steps=n, timestep_shift=s))
            for n in (4, 6, 8, 16, 32)
            for s in ((0.5, 1.0, 1.5, 2.0, 3.0) if n < 16 else (1.0,))
        ]
        settings += [
            (f"dopri5, {tol:g}", None, dict(solver="dopri5", atol=tol, rtol=tol))
            for tol in (1e-1, 1e-2, 1e-3, 1e-5)
        ]
        print("\n".join(rows(args.run, settings, n=2000, seeds=(0,))))
    else:
        settings = []
        for g in (0.0, 1.0, 1.5, 2.0):
            calls = ode_calls(8, "heun") * (1 if g in (0, 1) else 2)  # twice where guidance acts
            settings.append((f"gamma {g:g}", calls, dict(steps=8, guidance_scale=g)))
        print("\n".join(rows(args.run, settings)))


if __name__ == "__main__":
    main()
