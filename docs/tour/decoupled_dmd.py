"""Stop 8: the two halves of guided DMD. CFG augmentation runs away, matching holds it."""

from types import SimpleNamespace

import torch

import decoupled_dmd
from docs.tour.common import (
    BATCH,
    DIFFUSION,
    TEACHER,
    adam,
    inside,
    labels,
    levels,
    networks,
    noise,
    rate_left,
    step,
)
from docs.tour.plane import Plane, save_film

COND, UNCOND = {"label": labels(BATCH)}, {"label": torch.full((BATCH,), TEACHER.num_classes)}
SCALE, RATIO = 3.0, 5
SHOWN = 0, 2, 4, 6, 8, 11, 14, 18, 23, 30, 40, 55, 75, 100, 130, 160  # updates of the frames


def guidance(path, updates=SHOWN[-1]):
    """A film of three students: CFG augmentation alone, matching alone, and both."""
    z, films = noise(400), {}
    for name, no_dm, no_ca in (
        ("augmentation", True, False),
        ("matching", False, True),
        ("both", False, False),
    ):
        student, fake = networks()
        film = films[name] = []

        def see(update, student=student, film=film):
            if update in SHOWN:
                with torch.no_grad():
                    film.append(DIFFUSION.x0(student, z, 1.0, label=labels(400)))

        train(student, fake, updates, no_dm, no_ca, see)
    sheets = [
        [[Plane(f"{name}, {update}", where(x)).discs().dots(x) for name, x in zip(films, frame)]]
        for update, frame in zip(SHOWN, zip(*films.values()))
    ]
    save_film(path, sheets)


def where(x):
    """Below a panel: how many samples lie in the discs, and how far out the median is."""
    return f"in the discs {inside(x):.0%}, median radius {x.norm(dim=1).median():,.1f}"


def train(student, fake, updates, no_dm, no_ca, see):
    """A one-step student by `decoupled_dmd.ablated_loss`; without matching there is no fake."""
    move, follow = adam(student, 5e-4), adam(fake, 1e-3)
    flags = dict(no_dm=no_dm, no_ca=no_ca, guidance_scale=SCALE, observer=False, gan_weight=0)
    terms = decoupled_dmd.Terms(SimpleNamespace(**flags, normalizer="none", ca_weight=1))
    for update in range(updates):
        left = rate_left(update, updates)
        see(update)
        x = DIFFUSION.x0(student, noise(), 1.0, **COND)
        at_dm, at_ca = ((noise(), levels(0.02, 0.98)) for _ in range(2))
        how = DIFFUSION, at_dm, at_ca, COND, UNCOND, COND, SCALE, terms
        step(move, decoupled_dmd.ablated_loss(x, TEACHER, fake, *how)[0], left)
        for _ in range(0 if no_dm else RATIO):
            with torch.no_grad():
                x = DIFFUSION.x0(student, noise(), 1.0, **COND)
            loss = decoupled_dmd.fake_score_loss(fake, DIFFUSION, x, noise(), levels(), COND)
            step(follow, loss, left)
    see(updates)
