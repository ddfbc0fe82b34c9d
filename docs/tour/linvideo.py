"""Stop 10: linear attention. Its error, and its repair at the teacher's states and at its own."""

import copy

import torch

import linvideo
from docs.tour.common import TEACHER, adam, labels, noise, rate_left, step
from docs.tour.plane import BLUE, GREEN, Plane, save
from kernels.linear_attention import use_linear_attention
from models.diffusion import step_grid
from models.worlds.ring import fit_ring_transformer

GRID, BATCH = step_grid(10), 128
LABEL = labels(512)  # of a bank's trajectories


def attention(path, updates=60, fit=400):
    """Samples of softmax attention, of linear attention as it is, and repaired in two ways."""
    teacher = fit_ring_transformer(TEACHER, steps=fit)
    linear = copy.deepcopy(teacher)
    use_linear_attention(linear, range(4))
    nets = [("softmax attention", teacher), ("linear, untrained", linear)]
    for name, own in ("repaired, teacher's states", False), ("repaired, its own states", True):
        nets.append((name, repair(copy.deepcopy(linear), teacher, own, updates)))
    z, panels = noise(400), []
    target = walk(teacher, z)[-1]
    for name, net in nets:
        states = walk(net, z)
        apart = (states[-1] - target).norm(dim=1)
        panel = Plane(name, f"from the teacher's samples: {apart.mean():.3f}").discs()
        panel.paths(states[:, 100:132], BLUE if net is teacher else GREEN, 3)
        panels.append(panel.dots(states[-1]))
    save(path, [panels])


def repair(net, teacher, own, updates, fresh=128):
    """Regress the velocity onto the teacher's (Eq. 7), at states that the teacher or net reaches.

    A bank has 512 trajectories. Of its own the oldest quarter is made anew every ten updates.
    """
    bank = bank_of(teacher, noise(512), net if own else None)
    optimizer = adam(net, 1e-3)
    for update in range(updates):
        if own and update % 10 == 0:
            place = (torch.arange(fresh) + fresh * (update // 10)) % 512
            for name, made in bank_of(teacher, noise(fresh), net).items():
                bank[name][place] = made
        row, k = torch.randint(512, (BATCH,)), torch.randint(len(GRID) - 1, (BATCH,))
        x_t, v_t, t = bank["x"][row, k], bank["v"][row, k], torch.tensor(GRID)[k]
        loss = linvideo.regression_loss(net, x_t, v_t, t, {"label": LABEL[row]})[0]
        step(optimizer, loss, rate_left(update, updates))
    return net


def bank_of(teacher, z, sampler):
    """Trajectories of the teacher or of a sampler, with the teacher's velocities there."""
    return linvideo.trajectory(teacher, z, GRID, {"label": labels(len(z))}, {}, 1.0, sampler)


def walk(net, z):
    """The states of net's trajectory in 10 calls.  z (n, 2) -> (11, n, 2)."""
    found = linvideo.trajectory(net, z, GRID, {"label": labels(len(z))}, {}, 1.0)
    end = found["x"][:, -1] + (GRID[-1] - GRID[-2]) * found["v"][:, -1]
    return torch.cat([found["x"], end[:, None]], 1).transpose(0, 1)
