"""Stop 9: trajectories. TDM's deterministic few-step student beside the teacher's paths."""

import torch

import tdm
from docs.tour.common import (
    BATCH,
    DIFFUSION,
    TEACHER,
    adam,
    labels,
    levels,
    networks,
    noise,
    rate_left,
    step,
    verdict,
)
from docs.tour.plane import BLUE, GREEN, Plane, save
from docs.tour.teacher import teacher_states

K, RATIO, COND = 2, 5, {"label": labels(BATCH)}
GRID = tdm.trajectory(K, 1.0)  # 1, .5, 0


def trajectories(path, updates=200):
    """The teacher in 63 calls and in 2, and the student in 2, from the same noise."""
    student, fake = networks()
    train(student, fake, updates)
    z = noise(400)
    panels = []
    for name, states, colour in (
        ("teacher, 63 calls", teacher_states(z, 63), BLUE),
        ("teacher, 2 calls", teacher_states(z, K), BLUE),
        ("student, 2 calls", student_states(student, z), GREEN),
    ):
        panel = Plane(name, verdict(states[-1])).discs()
        panels.append(panel.paths(states[:, 100:132], colour, 5).dots(states[-1]))
    save(path, [panels])


@torch.no_grad()
def student_states(student, z):
    """The states of the student's trajectory from noise z (n, 2).  -> (K + 1, n, 2)."""
    states, cond = [z], {"label": labels(len(z))}
    for t, s in zip(GRID[:-1], GRID[1:]):
        t, s = (torch.full((len(z),), at) for at in (t, s))
        states.append(tdm.student_step(student, DIFFUSION, states[-1], t, s, cond)[0])
    return torch.stack(states)


def train(student, fake, updates):
    """TDM: every sample is at a step of its own, k, and is matched within that step's levels."""
    move, follow = adam(student, 5e-4), adam(fake, 1e-3)
    k = torch.arange(BATCH) // TEACHER.num_classes % K
    t, s = torch.tensor(GRID)[k], torch.tensor(GRID)[k + 1]

    def land():
        """-> x_s and x of every sample's step, from inputs that the student made itself."""
        x_in = noise()
        with torch.no_grad():
            for i in range(K - 1):
                at = (torch.full((BATCH,), GRID[j]) for j in (i, i + 1))
                ahead = tdm.student_step(student, DIFFUSION, x_in, *at, COND)[0]
                x_in = torch.where((k > i)[:, None], ahead, x_in)
        return tdm.student_step(student, DIFFUSION, x_in, t, s, COND)

    for update in range(updates):
        left = rate_left(update, updates)
        x_s, x = land()
        tau = s + (t - s) * levels(0.02, 0.98)
        at = DIFFUSION, noise(), s, tau, COND, {}, COND, 1.0
        step(move, tdm.tdm_loss_variant(x, x_s, TEACHER, fake, *at)[0], left)
        for _ in range(RATIO):
            with torch.no_grad():
                x_s, x = land()
            tau = s + (t - s) * levels(0.02, 0.98)
            loss = tdm.fake_score_loss(fake, DIFFUSION, x, x_s, noise(), s, tau, COND)
            step(follow, loss, left)
