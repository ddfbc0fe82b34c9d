"""The yardstick of the worlds with a shipped teacher: features of a small classifier.

FeatureWorld holds what these worlds share, build_reference makes the files that it reads. A world's
files lie in the folder of its name beside this file: classifier.safetensors (fp16),
reference.safetensors (moments of 50,000 items' features) and, unless stated otherwise, teacher/.
"""

import functools
import math
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from models.files import save_tensors
from models.worlds.measures import (
    balanced_labels,
    blurred,
    image_patches,
    moments_distance,
    pairwise_diversity,
    sliced_wasserstein,
)


class Classifier(nn.Module):
    """Convolutional net whose 128 features feed two heads: classes, and the factors of variation.

    The second head is why the features see colour, position and slant at all: a network trained on
    classes alone learns to ignore them, and `fd` and `diversity` would then miss a student that
    draws every digit in one colour.
    """

    def __init__(self, channels, num_classes, factors):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.features = nn.Linear(64 * 16, 128)
        self.classes = nn.Linear(128, num_classes)
        self.factors = nn.Linear(128, factors)

    def forward(self, x):
        """x (B, C, [T,] 16, 16) in [-1, 1] -> features (B, 128), class logits, factors.

        The frames of a video are taken as channels.
        """
        h = F.silu(self.conv2(F.silu(self.conv1(x.flatten(1, -3)))))  # (B, 48, 8, 8)
        h = F.silu(self.conv4(F.silu(self.conv3(h))))  # (B, 64, 4, 4)
        f = F.silu(self.features(h.flatten(1)))
        return f, self.classes(f), self.factors(f)


class FeatureWorld:
    """A world that is measured by the features of its classifier.

    A subclass has name, shape, num_classes and class_names (see the contract in __init__.py),
    `factors`, the number of its factors of variation, and two methods: picture(x), and
    render(label, rng), from label (n,) int and a numpy Generator -> x0 (n, *shape) float32 in
    [-1, 1], factors (n, factors) in about [-1, 1].
    """

    def data(self, n, seed, label=None):
        """n items of the labels given, or of labels drawn evenly; see the contract.

        -> x0 (n, *shape) float32 in [-1, 1], label (n,) int64.
        """
        rng = np.random.default_rng(seed)
        label = rng.integers(0, self.num_classes, n) if label is None else np.asarray(label)
        return torch.from_numpy(self.render(label, rng)[0]), torch.from_numpy(label).long()

    def folder(self, name):
        """Path of a file or folder that ships with this world."""
        return os.path.join(os.path.dirname(os.path.abspath(__file__)), self.name, name)

    def teacher_folder(self):
        """The shipped teacher's folder: config.json, weights and sampler.json."""
        return self.folder("teacher")

    def new_classifier(self):
        """The classifier, untrained."""
        return Classifier(math.prod(self.shape[:-2]), self.num_classes, self.factors)

    def patches(self, x, seed):
        """Small patches that show grain.  x (n, *shape) -> (m, d)."""
        return image_patches(x, seed=seed)

    @functools.cached_property
    def classifier(self):
        """The shipped classifier, in float32."""
        net = self.new_classifier()
        weights = load_file(self.folder("classifier.safetensors"))
        net.load_state_dict({k: v.float() for k, v in weights.items()})
        return net.eval().requires_grad_(False)

    @functools.cached_property
    def reference(self):
        """Statistics of 50,000 data items' features, {name: float64 tensor}.

        mean (128,), cov (128, 128), and diversity (K,), the mean distance within each class.
        """
        return load_file(self.folder("reference.safetensors"))

    def moments(self, x, label):
        """Mean and covariance of the features, one group: (1, 128) and (1, 128, 128) float64."""
        f = self.look(x)[0].double()
        return f.mean(0)[None], f.T.cov()[None]

    def look(self, x):
        """Run the classifier in batches on the CPU, on values clipped to [-1, 1].

        x (n, *shape) -> features (n, 128), class logits (n, K).
        """
        out = [self.classifier(b.float().cpu().clamp(-1, 1))[:2] for b in x.split(500)]
        return torch.cat([f for f, _ in out]), torch.cat([c for _, c in out])

    def measure(self, x, label):
        """fd, patch_swd, accuracy, log_p and diversity; see the contract.

        patch_swd compares with n fresh data items.  x (n, *shape), label (n,) or None -> {name:
        float}.
        """
        (f, logits), ref = self.look(x), self.reference
        label = None if label is None else label.cpu()
        x = x.float().cpu().clamp(-1, 1)
        fresh = self.data(len(x), 123456789, label)[0]
        swd = sliced_wasserstein(self.patches(x, seed=1), self.patches(fresh, seed=2))
        moments = f.double().mean(0)[None], f.double().T.cov()[None]
        fd = moments_distance(moments, (ref["mean"][None], ref["cov"][None]))
        if label is None:
            return {"fd": fd, "patch_swd": 1000 * swd}
        logits_blurred = torch.cat([self.classifier(b)[1] for b in blurred(x).split(500)])
        diversity = pairwise_diversity(f, label, self.num_classes) / ref["diversity"]
        return {
            "fd": fd,
            "patch_swd": 1000 * swd,
            "accuracy": float((logits.argmax(1) == label).double().mean()),
            "log_p": -float(F.cross_entropy(logits_blurred, label)),
            "diversity": float(diversity.mean()),
        }


def build_reference(world, steps=3000, batch=128, seed=1, items=60000):
    """Train the world's classifier and rewrite its two files, in about 4 minutes.

    Writes classifier.safetensors (fp16) and reference.safetensors in the world's folder.
    """
    torch.manual_seed(seed)
    os.makedirs(world.folder(""), exist_ok=True)
    rng = np.random.default_rng(seed)
    label = rng.integers(0, world.num_classes, items)
    x, z = (torch.from_numpy(a) for a in world.render(label, rng))
    y = torch.from_numpy(label)
    net = world.new_classifier()
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        i = torch.randint(0, len(x), (batch,))
        # samples of a network are never exactly clean, so the classifier learns under weak noise
        noise = torch.randn_like(x[i]) * torch.rand(batch, *[1] * len(world.shape)) * 0.1
        _, logits, guess = net(x[i] + noise)
        loss = F.cross_entropy(logits, y[i]) + F.mse_loss(guess, z[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    net.eval().requires_grad_(False)
    weights = {k: v.half() for k, v in net.state_dict().items()}
    save_tensors(weights, world.folder("classifier.safetensors"))
    # from here on with the weights that ship, which are rounded to fp16
    vars(world).pop("classifier", None)  # an earlier file's, if it was loaded
    x, y = world.data(50000, seed + 1, np.arange(50000) % world.num_classes)
    f = world.look(x)[0].double()
    diversity = pairwise_diversity(f[:20000], y[:20000], world.num_classes)
    reference = {"mean": f.mean(0), "cov": f.T.cov(), "diversity": diversity}
    save_tensors(reference, world.folder("reference.safetensors"))
    label = balanced_labels(2000, world.num_classes)
    print("2,000 further items:", world.measure(*world.data(2000, seed + 2, label)))
