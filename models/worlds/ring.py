"""The world `ring`: 8 Gaussians on the unit circle, 4 classes of two opposite modes each.

Everything is known in closed form: the score, x0 and the velocity at any noise level, with and
without a label. So the teacher is a formula. A student needs weights, though: fit_ring_network
regresses a small network onto the formula, and distilling that takes seconds. A method that changes
a teacher's attention needs one with attention as well: fit_ring_transformer.
"""

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

from models.diffusion import expand
from models.networks.ring_dit import RingDiT
from models.networks.ring_mlp import RingMLP
from models.worlds.measures import (
    BLUR,
    balanced_labels,
    blurred,
    moments_distance,
    pairwise_diversity,
    sliced_wasserstein,
)

COLOURS = "#d64541", "#266eb4", "#2e8b57", "#965aa0"  # of the classes, in pictures


class RingTeacher(nn.Module):
    """Exact flow velocity: a mixture of isotropic Gaussians stays one under x_t = (1-t) x0 + t eps.

    Given mode k with mean m_k and standard deviation c, x_t ~ N((1-t) m_k, S) with
    S = (1-t)^2 c^2 + t^2, and E[x0 | x_t, k] = m_k + (1-t) c^2 / S (x_t - (1-t) m_k).
    """

    prediction, default_shift, cond_names, latent_shape = "flow_v", 1.0, ("label",), (2,)

    def __init__(self, modes=8, num_classes=4, std=0.1):
        super().__init__()
        angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
        means = torch.stack([angle.cos(), angle.sin()], 1)  # (modes, 2), radius 1
        self.register_buffer("means", means)
        self.std, self.num_classes = std, num_classes
        self.config = dict(modes=modes, num_classes=num_classes, std=std)

    def members(self, label):
        """Which modes a label allows: mode k is of class k mod K, and the null label K allows all.

        label (B,) -> (B, modes) bool.
        """
        mode = torch.arange(len(self.means), device=label.device)
        return (mode % self.num_classes == label[:, None]) | (label[:, None] == self.num_classes)

    def posterior(self, x, alpha, sigma, label=None):
        """log p(x) and E[x0 | x] of noised data x = alpha x0 + sigma eps, for any schedule.

        x (B, 2), alpha, sigma (B,), label (B,) or None -> (B,), (B, 2), in x's dtype.
        """
        if label is None:
            label = torch.full((len(x),), self.num_classes, device=x.device)
        m, a, s = self.means.to(x), expand(alpha, x), expand(sigma, x)
        S = a**2 * self.std**2 + s**2  # (B, 1)
        diff = x[:, None] - a[..., None] * m  # (B, modes, 2)
        logit = -diff.square().sum(-1) / (2 * S)
        allowed = self.members(label)
        logit = logit.masked_fill(~allowed, -torch.inf)
        log_p = logit.logsumexp(1) - allowed.sum(1).to(x).log() - torch.log(2 * math.pi * S[:, 0])
        weight = logit.softmax(1)  # (B, modes)
        x0 = (weight[..., None] * (m + (a * self.std**2 / S)[..., None] * diff)).sum(1)
        return log_p, x0

    def forward(self, x, t, label=None):
        """v = eps - x0 = (x - x0) / t, whose limit at t = 0 is taken at t = 1e-5.

        x (B, 2), t (B,), label (B,) or None -> (B, 2).
        """
        t = t.to(x).clamp_min(1e-5)
        _, x0 = self.posterior(x, 1 - t, t, label)
        return (x - x0) / expand(t, x)


class Ring:
    """The world; `exact` is its RingTeacher. A class is named after the directions of its modes."""

    name, shape, num_classes = "ring", (2,), 4
    class_names = ["east-west", "north-east", "north-south", "north-west"]

    def __init__(self):
        self.exact = RingTeacher()

    def draw(self, n, generator):
        """n points of all modes alike, from a torch Generator.  -> (n, 2) float32, (n,) int64."""
        mode = torch.randint(0, len(self.exact.means), (n,), generator=generator)
        noise = torch.randn(n, 2, generator=generator)
        return self.exact.means[mode].float() + self.exact.std * noise, mode % self.num_classes

    def data(self, n, seed, label=None):
        """n points of the labels (n,) given, or of labels drawn evenly.

        -> (n, 2) float32, (n,) int64.
        """
        g = torch.Generator().manual_seed(seed)
        x, drawn = self.draw(n, g)
        if label is None:
            return x, drawn
        mode = label + self.num_classes * torch.randint(0, 2, (n,), generator=g)
        noise = torch.randn(n, 2, generator=g)
        return self.exact.means[mode].float() + self.exact.std * noise, label

    def teacher(self):
        """A new RingTeacher."""
        return RingTeacher()

    def moments(self, x, label):
        """Means and covariances class by class, in units of 1/1000 squared: fd is then x 1000.

        Over all classes together, which is what label None asks for, a lost mode would hardly show.
        -> (4, 2), (4, 2, 2) float64, or (1, 2), (1, 2, 2).
        """
        x = x.double().cpu() * 1000**0.5
        groups = [x] if label is None else [x[label == k] for k in range(self.num_classes)]
        return torch.stack([g.mean(0) for g in groups]), torch.stack([g.T.cov() for g in groups])

    def reference(self, by_class=True):
        """Moments of 50,000 points of data."""
        x, label = self.data(50000, 987654321, balanced_labels(50000, self.num_classes))
        return self.moments(x, label if by_class else None)

    def measure(self, x, label):
        """fd and patch_swd (x 1000, a point is its own patch), accuracy, log_p and diversity.

        A point counts for its label if the nearest mode is of that class; log_p is exact.
        x (n, 2), label (n,) or None -> {name: float}.
        """
        x = x.double().cpu()
        if label is None:
            swd = sliced_wasserstein(x, self.data(len(x), 123456789)[0])
            fd = moments_distance(self.moments(x, None), self.reference(by_class=False))
            return {"fd": fd, "patch_swd": 1000 * swd}
        label = label.cpu()
        ref, ref_label = self.data(4000, 987654321, balanced_labels(4000, self.num_classes))
        nearest = torch.cdist(x, self.exact.means).argmin(1) % self.num_classes
        swd = sliced_wasserstein(x, self.data(len(x), 123456789, label)[0])
        spread = pairwise_diversity(x, label, self.num_classes)
        ref_spread = pairwise_diversity(ref, ref_label, self.num_classes)
        # log p(c | y) = log p(y | c) - log p(y) - log K of y = x + BLUR eps, all classes alike
        noisy, alpha = blurred(x), torch.ones(len(x)).to(x)
        sigma = torch.full((len(x),), BLUR).to(x)
        log_p_label = self.exact.posterior(noisy, alpha, sigma, label)[0]
        log_p_any = self.exact.posterior(noisy, alpha, sigma)[0]
        log_p = log_p_label - log_p_any - math.log(self.num_classes)
        return {
            "fd": moments_distance(self.moments(x, label), self.reference()),
            "patch_swd": 1000 * swd,
            "accuracy": float((nearest == label).double().mean()),
            "log_p": float(log_p.mean()),
            "diversity": float((spread / ref_spread).mean()),
        }

    def picture(self, x, side=220):
        """Scatter plot, coloured by the nearest mode's class.  (n, 2) -> (side, side, 3) uint8."""
        image = Image.new("RGB", (side, side), "white")
        draw = ImageDraw.Draw(image)
        nearest = torch.cdist(x.double().cpu(), self.exact.means).argmin(1) % self.num_classes
        pixels = (x.cpu().clamp(-1.6, 1.6) + 1.6) / 3.2 * side
        for (px, py), k in zip(pixels.tolist(), nearest.tolist(), strict=True):
            draw.ellipse([px - 1.5, side - py - 1.5, px + 1.5, side - py + 1.5], fill=COLOURS[k])
        return np.asarray(image)


def fit_ring_transformer(teacher, seed=0, steps=400, batch=128):
    """The same with a RingDiT, which has attention."""
    return fit_ring_network(teacher, seed, steps, batch, RingDiT)


def fit_ring_network(teacher, seed=0, steps=1500, batch=512, network=RingMLP):
    """Regress a network onto the closed-form velocity, with one label in five dropped.

    network: its class.  -> the network, the same for the same seed; torch's global generator stays
    as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = network(num_classes=teacher.num_classes)
    g = torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        x0, label = Ring().draw(batch, g)
        label = torch.where(torch.rand(batch, generator=g) < 0.2, teacher.num_classes, label)
        t = torch.rand(batch, generator=g)
        x = expand(1 - t, x0) * x0 + expand(t, x0) * torch.randn(batch, 2, generator=g)
        loss = F.mse_loss(net(x, t, label=label), teacher(x, t, label=label))
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net
