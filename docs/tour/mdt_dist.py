"""Stop 11: marginal-data transport. One call for a whole path, and why the law of t matters."""

import torch

import mdt_dist
from docs.tour.common import (
    TEACHER,
    adam,
    data,
    labels,
    levels,
    networks,
    noise,
    rate_left,
    step,
    verdict,
)
from docs.tour.plane import BLUE, GREEN, RED, Plane, save
from docs.tour.teacher import teacher_states
from models.diffusion import logit_normal

BATCH, DT = 128, 0.01
COND = {"label": labels(BATCH)}


def transport(path, updates=500):
    """One-step samples of students that saw all t alike, or mostly noisy ones; how far off."""
    z, panels = noise(400), []
    exact = teacher_states(z, 63)
    panels.append(Plane("the teacher's transport", verdict(exact[-1])).discs())
    panels[0].paths(exact[:, 100:132], BLUE, 3).dots(exact[-1])
    missed = Plane("one call from t: off by", "left t = 0 (data), right t = 1; top 0.5")
    for row, (name, law, colour) in enumerate(LAWS):
        (student,) = networks(1)
        train(student, law, updates)
        x = samples(student, z)
        panel = Plane(f"{name}: 1 call", verdict(x)).discs()
        panels.append(panel.paths(torch.stack([z, x])[:, 100:132], colour, 3).dots(x))
        missed.curve(misses(student, exact), colour, 0.5, name, row)
    save(path, [[*panels, missed]])


def uniform(n):
    """Every t alike (Alg. 1)."""
    return DT + (1 - DT) * levels(n=n)


def mostly_noise(n):
    """The sigmoid of N(1, 1), which the released code draws: one in six below 1/2."""
    return DT + (1 - DT) * logit_normal(torch.randn(n), 1.0, 1.0)


LAWS = ("t uniform", uniform, GREEN), ("t logit-normal", mostly_noise, RED)


def train(student, law, updates):
    """MDT-dist (Alg. 1): velocity matching at data, velocity distillation at own samples."""
    optimizer = adam(student, 3e-4)
    for update in range(updates):
        at = COND, {}, 1.0
        x0, t = data(BATCH), law(BATCH)
        loss = mdt_dist.velocity_matching(student, TEACHER, x0, noise(BATCH), t, *at, DT)[0]
        z1, z2, t = noise(BATCH), noise(BATCH), law(BATCH)
        loss = loss + mdt_dist.velocity_distillation(student, TEACHER, z1, z2, t, *at, DT)[0]
        step(optimizer, loss, rate_left(update, updates))


def samples(student, z):
    """One call: x = z - phi(z, 1)."""
    cond = {"label": labels(len(z))}
    return mdt_dist.sample(student, {"z": z}.__getitem__, [1.0], cond, {})


@torch.no_grad()
def misses(student, states):
    """From every state of the teacher's paths one call to the end: how far from the path's own end?

    states (calls + 1, n, 2), from noise to data -> the median distance at each, from data on.
    """
    calls, cond = len(states) - 1, {"label": labels(states.shape[1])}
    found = []
    for i, x_t in enumerate(states[:-1]):
        x = mdt_dist.sample(student, {"z": x_t}.__getitem__, [1 - i / calls], cond, {})
        found.append(float((x - states[-1]).norm(dim=1).median()))
    return [0.0, *reversed(found)]
