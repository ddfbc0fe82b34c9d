"""What every stop of the tour starts from: the exact teacher, networks, batches, measures."""

import copy
import functools
import math

import torch

from docs.tour.plane import INSIDE, MEANS
from models.diffusion import Diffusion, Flow, step_grid
from models.worlds.ring import Ring, RingTeacher, fit_ring_network

TEACHER, DIFFUSION = RingTeacher(), Diffusion(Flow(), "flow_v")
BATCH = 256


@functools.cache
def fitted(updates):
    """The small network that every student and fake of the tour starts from."""
    return fit_ring_network(TEACHER, steps=updates)


def networks(count=2, updates=600):
    """Copies of one small network that has been fitted to the teacher: student, fake, ..."""
    return [copy.deepcopy(fitted(updates)) for _ in range(count)]


def adam(net, rate):
    """The scripts' optimiser on the ring."""
    return torch.optim.AdamW(net.parameters(), rate, betas=(0.0, 0.99), fused=True)


def rate_left(update, updates):
    """The share of the learning rate that is left: whole, then falling to 0 over the last 70 %."""
    return min(1.0, (1 - update / updates) / 0.7)


def step(optimizer, loss, left=1.0):
    """One update. left: how much of the learning rate is left."""
    group = optimizer.param_groups[0]
    full = group.setdefault("full", group["lr"])
    group["lr"] = full * left
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def labels(n):
    """(n,) classes, in turn."""
    return torch.arange(n) % TEACHER.num_classes


def noise(n=BATCH):
    """(n, 2) standard normal."""
    return torch.randn(n, 2)


def levels(low=0.0, high=1.0, n=BATCH):
    """(n,) noise levels, evenly spread over [low, high] in a random order."""
    return low + (high - low) * (torch.randperm(n) + torch.rand(1)) / n


def data(n, with_labels=False):
    """n points of the ring, of the classes in turn.  -> (n, 2), or also their labels (n,)."""
    seed = int(torch.randint(2**31, ()))
    x, label = Ring().data(n, seed, labels(n))
    return (x, label) if with_labels else x


def teacher_samples(z, steps=32, teacher=TEACHER):
    """The teacher's samples from noise z, of the classes in turn, in 2 steps - 1 calls."""
    cond = {"label": labels(len(z))}
    return DIFFUSION.sample(teacher, z, step_grid(steps), cond, {}, 1.0, "heun")


def inside(x):
    """The share of points in the grey discs, within 3 standard deviations of a mode's mean."""
    return float((torch.cdist(x, MEANS).min(1)[0] < INSIDE).float().mean())


def width(x):
    """The standard deviation of a mode, from medians, so that stragglers do not count.

    The points nearest to the same mode belong together; the distance from their middle has the
    median sqrt(2 log 2) standard deviations.
    """
    nearest = torch.cdist(x, MEANS).argmin(1)
    parts = [x[nearest == k] for k in nearest.unique()]
    distances = torch.cat([(part - part.median(0)[0]).norm(dim=1) for part in parts])
    return float(distances.median()) / math.sqrt(2 * math.log(2))


def verdict(x):
    """The two numbers below a panel of samples; of data they are 99 % and 0.10."""
    return f"in the discs {inside(x):.0%}, width {width(x):.2f}"
