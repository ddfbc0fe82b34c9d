"""Can a network learn the flow of data from noisy samples x_s? Fig. 2 of Phased DMD (2510.27684).

    python -m tests.phased_fig2 [--output docs/phased-fig2.png] [--seeds 0 1 2]

Data are the four points -1, 0, 1, 2, equally likely. Three small networks learn the flow's velocity
from scratch:

    full      from clean x0, t in (0, 1]: ordinary flow matching
    unbiased  from x_s alone, s = 0.5, t in (0.5, 1]: the subinterval target and its weight (Eq. 13)
    naive     from x_s alone, t in (0.5, 1]: eps - x_s, which takes x_s for data

Each then draws 200 Euler trajectories from the same noise, in steps of 1/100 from t = 1 to 0, or to
s for the last two. Measured is the root mean square distance at t = s to the exact ODE, whose
velocity is known in closed form. A seed takes about five seconds on one thread.
"""

import argparse
import os
import sys
import time

import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from models.diffusion import Diffusion, Flow, sample_ode  # noqa: E402
from phased_dmd import fake_score_loss, naive_target, no_taper  # noqa: E402

POINTS = torch.tensor([-1.0, 0.0, 1.0, 2.0])
S = 0.5  # the noise level that only the full model goes below
STEPS, TRAJECTORIES = 100, 200
MODELS = {
    "full": dict(s=0.0, weight=no_taper),
    "unbiased": dict(s=S),
    "naive": dict(s=S, target=naive_target, weight=no_taper),
}
COLOURS = {"full": (125, 135, 150), "unbiased": (25, 140, 75), "naive": (205, 60, 45)}


class Velocity(nn.Module):
    """x (B, 1), t (B,) -> velocity (B, 1)."""

    def __init__(self, width=64):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 1),
        )

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], 1))


def exact_x0_eps(x, t):
    """E[x0 | x_t] and E[eps | x_t] of the four points mu_k.  x (B, 1), t (B,) -> (B, 1), (B, 1).

    x0 = sum_k softmax_k(-(x - (1 - t) mu_k)^2 / 2 t^2) mu_k.
    """
    t = t[:, None]
    x0 = torch.softmax(-((x - (1 - t) * POINTS) ** 2) / (2 * t**2), 1) @ POINTS.to(x.dtype)[:, None]
    return x0, (x - (1 - t) * x0) / t


def exact_velocity(x, t):
    """E[eps - x0 | x_t], what flow matching learns.  x (B, 1), t (B,) -> (B, 1)."""
    x0, eps = exact_x0_eps(x, t)
    return eps - x0


def train(seed, s, iterations=3000, batch=256, lr=1e-2, **variant):
    """Fit a velocity network to x_s = (1 - s) x0 + s noise by fake_score_loss.  -> the network.

    t is uniform in (s, 1]; s = 0 is ordinary flow matching. variant: target and weight of the loss.
    """
    torch.manual_seed(seed)
    net, level, diffusion = Velocity(), torch.full((batch,), s), Diffusion(Flow(), "flow_v")
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        x_s = (1 - s) * POINTS[torch.randint(4, (batch, 1))] + s * torch.randn(batch, 1)
        t, eps = 1 - (1 - s) * torch.rand(batch), torch.randn(batch, 1)
        loss = fake_score_loss(net, diffusion, x_s, eps, level, t, {}, **variant)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
    return net


@torch.no_grad()
def euler(velocity, noise, end):
    """Euler steps of 1 / STEPS from t = 1 to end.  noise (n, 1) -> trajectory (steps + 1, n)."""
    x, path = noise, [noise]
    for i in range(round(STEPS * (1 - end))):
        x = x - velocity(x, torch.full((len(x),), 1 - i / STEPS, dtype=x.dtype)) / STEPS
        path.append(x)
    return torch.cat(path, 1).T


def experiment(seed=0, iterations=3000):
    """Train the three models and follow their trajectories.

    -> {name: RMSE at t = s to the exact ODE}, {name: trajectories (steps + 1, TRAJECTORIES)}.
    "euler" in the first is the exact velocity in the same steps: the error of the solver alone.
    """
    noise = torch.randn(TRAJECTORIES, 1, generator=torch.Generator().manual_seed(1000 + seed))
    grid = [1 - (1 - S) * i / 500 for i in range(501)]  # from 1 to s
    exact = sample_ode(exact_x0_eps, Flow(), noise, grid)[:, 0]
    paths = {}
    for name, how in MODELS.items():
        net = train(seed, iterations=iterations, **how)
        paths[name] = euler(net, noise, 0.0 if name == "full" else S)
    at_s = {name: path[round(STEPS * (1 - S))] for name, path in paths.items()}
    at_s["euler"] = euler(exact_velocity, noise, S)[-1]
    return {name: float((x - exact).square().mean().sqrt()) for name, x in at_s.items()}, paths


# ---- the picture ---------------------------------------------------------------------------------


def draw(path, rmse, paths, shown=40, zoom=3):
    """Draw three panels with t from 1 to 0: full, unbiased over full, naive over full.

    Every fifth trajectory is drawn, in the order of their noise, so that one can tell the two sets
    apart. The picture is drawn `zoom` times larger and then reduced.
    """
    width, height, left, top, gap, low, high = 430, 430, 50, 48, 20, -3.0, 3.4
    size = (zoom * (left + 3 * width + 2 * gap + 16), zoom * (top + height + 50))
    sheet = Image.new("RGB", size, "white")
    pen, ink, pale = ImageDraw.Draw(sheet), (40, 40, 40), (220, 220, 220)
    every = len(paths["full"][0]) // shown
    order = paths["full"][0].argsort()[every // 2 :: every]

    def text(x, y, words, anchor, size=15, fill=ink):
        pen.text((zoom * x, zoom * y), words, fill, ImageFont.load_default(zoom * size), anchor)

    titles = {
        "full": "full: trained on clean data",
        "unbiased": f"unbiased target of x_s: RMSE {rmse['unbiased']:.3f}",
        "naive": f"naive target eps - x_s: RMSE {rmse['naive']:.3f}",
    }
    for panel, (name, title) in enumerate(titles.items()):
        right = left + panel * (width + gap)

        def place(t, x, right=right):
            down = (high - x) / (high - low) * height
            return zoom * (right + (1 - t) * width), zoom * (top + down)

        def curves(trajectories, colour, thick, place=place):
            for one in trajectories[:, order].T.tolist():
                points = [place(1 - i / STEPS, x) for i, x in enumerate(one)]
                pen.line(points, colour, thick, joint="curve")

        for x in range(-3, 4):
            pen.line([place(1, x), place(0, x)], pale, zoom)
            if panel == 0:
                text(left - 8, place(1, x)[1] / zoom, str(x), "rm")
        curves(paths["full"], COLOURS["full"], zoom * 3 // 2)
        if panel:
            curves(paths[name], COLOURS[name], zoom * 3 // 2)
            at_s = place(S, high)[0]
            for y in range(0, height, 10):  # a dashed line where the samples x_s are
                pen.line([at_s, zoom * (top + y), at_s, zoom * (top + y + 5)], ink, zoom)
            text(right + width * (1 - S) + 6, top + height - 8, "t = s", "ls")
        pen.rectangle([*place(1, high), *place(0, low)], outline=(150, 150, 150), width=zoom)
        for x in POINTS.tolist():
            px, py = place(0, x)
            pen.ellipse([px - 5 * zoom, py - 5 * zoom, px + 5 * zoom, py + 5 * zoom], ink)
        for t in (1, 0.75, 0.5, 0.25, 0):
            px, py = place(t, low)
            pen.line([px, py, px, py + 5 * zoom], ink, zoom)
            text(px / zoom, top + height + 9, f"{t:g}", "mt")
        text(right + width / 2, top + height + 29, "t", "mt")
        text(right + width / 2, top - 16, title, "ms", 19, COLOURS[name])
    text(12, top + height / 2 - 34, "x", "lm")
    sheet = sheet.resize((sheet.width // zoom, sheet.height // zoom), Image.LANCZOS)
    sheet = sheet.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    sheet.save(path, optimize=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--output",
        default=None,
        help="PNG of the first seed's trajectories; none is drawn if left out",
    )
    p.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="seeds of networks, batches and noise; one table row each",
    )
    args = p.parse_args()
    torch.set_num_threads(1)
    names = (*MODELS, "euler")
    print(f"RMSE at t = {S:g} to the exact ODE ('euler': exact velocity, same steps)")
    print("".join(f"{n:>10s}" for n in ("seed", *names, "seconds")))
    for i, seed in enumerate(args.seeds):
        began = time.perf_counter()
        rmse, paths = experiment(seed)
        numbers = "".join(f"{rmse[n]:10.4f}" for n in names)
        print(f"{seed:10d}{numbers}{time.perf_counter() - began:10.1f}", flush=True)
        if args.output and i == 0:
            draw(args.output, rmse, paths)


if __name__ == "__main__":
    main()
