"""Stop 7: phases. An expert for each interval of noise, and what its fake has to regress."""

import torch

import phased_dmd
from docs.tour.common import (
    BATCH,
    DIFFUSION,
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
from docs.tour.plane import DARK, Plane, save

COND, MIDDLE = {"label": labels(BATCH)}, 0.5  # where the first phase ends
RATIO = 5


def phases(path, updates=200):
    """Two experts of one step each; and the first of them with a fake that takes x_s for clean."""
    first, fake, second, fake_2, wrong, fake_3 = networks(6)
    train(first, fake, [], updates)
    train(wrong, fake_3, [], updates, target=phased_dmd.naive_target)
    train(second, fake_2, [first], updates)
    z, t = noise(400), MIDDLE
    right, naive, x = (samples(experts, z) for experts in ([first], [wrong], [first, second]))
    exact = DIFFUSION.add_noise(data(400), noise(400), t)
    panels = [
        Plane(f"data, noised to s = {t:g}", spread(exact)).dots(exact, DARK),
        Plane("expert 1, from noise to s", spread(right)).dots(right),
        Plane("the same, fake's target naive", spread(naive)).dots(naive),
        Plane("expert 2, from s to data", verdict(x)).discs().dots(x),
    ]
    save(path, [panels])


def train(expert, fake, before, updates, target=phased_dmd.subinterval_target):
    """One phase: the last expert is trained, those before it are frozen.

    Its samples x_s, at the end of its step, are compared at levels t in (s, 1). The clean sample
    that the last step of all makes is s = 0, which is DMD.
    """
    move, follow = adam(expert, 5e-4), adam(fake, 1e-3)
    times = [1.0, MIDDLE, 0.0][: len(before) + 2]
    end = torch.full((BATCH,), times[-1])
    lowest = max(times[-1], 0.02)

    def land():
        with torch.no_grad():
            x_in = phased_dmd.rollout(before, DIFFUSION, noise(), times[:-1], COND)
        return phased_dmd.student_step(expert, DIFFUSION, x_in, *times[-2:], COND)

    for update in range(updates):
        left = rate_left(update, updates)
        x_s, x0 = land()
        t = levels(lowest + 0.02 * (1 - lowest), 0.98)
        at = DIFFUSION, noise(), end, t, COND, {}, COND, 1.0, phased_dmd.normalized_direction
        step(move, phased_dmd.phased_dmd_loss(x_s, x0, TEACHER, fake, *at)[0], left)
        for _ in range(RATIO):
            with torch.no_grad():
                x_s, _ = land()
            t = levels(times[-1] + 1e-3, 1.0)
            how = COND, target, phased_dmd.inner_taper
            loss = phased_dmd.fake_score_loss(fake, DIFFUSION, x_s, noise(), end, t, *how)
            step(follow, loss, left)


def samples(experts, z):
    """Where these experts bring noise: to the middle, or to data."""
    cond, times = {"label": labels(len(z))}, [1.0, MIDDLE, 0.0][: len(experts) + 1]
    with torch.no_grad():
        return phased_dmd.rollout(experts, DIFFUSION, z, times, cond)


def spread(x):
    """The standard deviation of a panel's points, in words."""
    return f"spread {x.std():.2f}"
