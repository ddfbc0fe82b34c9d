"""Stops 1 and 2: what a score is, and why one step of the teacher fails."""

import torch

from docs.tour.common import DIFFUSION, TEACHER, data, labels, noise, verdict
from docs.tour.plane import BLUE, DARK, Plane, grid, save
from models.diffusion import step_grid


def score(path):
    """The teacher's arrows at four noise levels, over noised data: of all classes, and of one.

    In each panel half of the arrows are shorter than 0.2: only directions compare across panels.
    """
    rows = []
    for whose, label in ("all data", None), ("class east-west", 0):
        rows.append([])
        for t in (0.05, 0.2, 0.4, 0.8):
            x0, own = data(400, with_labels=True)
            x_t = DIFFUSION.add_noise(x0, noise(400), t)
            x_t = x_t if label is None else x_t[own == label]
            panel = Plane(f"{whose}, t = {t:g}").dots(x_t, DARK)
            by = to_data(grid(), t, label)
            rows[-1].append(panel.arrows(grid(), by * (0.2 / by.norm(dim=1).median()), BLUE))
    save(path, rows)


def to_data(x_t, t, label=None):
    """sigma^2 times the score: from a noised point to the mean of what it may have been.

    sigma^2 grad log p(x_t) = alpha E[x0 | x_t] - x_t (Tweedie).  (n, 2) -> (n, 2).
    """
    label = label if label is None else torch.full((len(x_t),), label)
    return (1 - t) * DIFFUSION.x0(TEACHER, x_t, t, label=label) - x_t


def few_steps(path):
    """The exact teacher in 1, 2, 4, 8 and 63 calls from the same noise, with its ways there."""
    z, panels = noise(400), []
    for calls in (1, 2, 4, 8, 63):
        states = teacher_states(z, calls)
        x = states[-1]
        panel = Plane("1 call" if calls == 1 else f"{calls} calls", verdict(x)).discs()
        panels.append(
            panel.paths(states[:, 100:148], DARK, 3).dots(x, radius=0.022 if calls > 1 else 0.06)
        )
    save(path, [panels])


@torch.no_grad()
def teacher_states(z, calls):
    """Euler's method for the exact teacher from noise z (n, 2).  -> (calls + 1, n, 2)."""
    states, times = [z], step_grid(calls)
    for t, s in zip(times[:-1], times[1:]):
        v = TEACHER(states[-1], torch.full((len(z),), t), labels(len(z)))
        states.append(states[-1] + (s - t) * v)
    return torch.stack(states)
