"""Embedded worlds: data, a teacher and a yardstick in one place, so that every script runs with nothing to download.

    ring     8 Gaussians on a circle, 4 classes of two opposite modes each; every score, x0 and velocity in closed form
    glyphs   3x16x16 colour digits drawn with Pillow's own font; position, size, slant, weight and both colours vary
    clips    1x8x16x16 grey videos of one shape moving in a straight line; the class fixes the shape and the law of its speed
    shapes   3x32x32 pictures of one coloured shape, with segmentation maps and an autoencoder (models/shapes.py)
    voxels   1x16x16x16 occupancy of ten parametric solids (models/voxels.py)

A world has: name, shape (C, ...), num_classes, class_names, data(n, seed) -> (x0, label), a closed-form teacher() or a
teacher_folder(), measure(x, label) -> {"fd", "patch_swd", "accuracy", "log_p", "diversity", ...}, and picture(x) -> (H, W, 3) uint8, one row.
`python -m models.toy glyphs` (or clips, voxels) retrains that world's classifier and rewrites its reference statistics in models/glyphs/.
"""
import functools
import math
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from models import io, lora
from models.diffusion import expand, sinusoid

WORLDS = ("ring", "glyphs", "clips", "shapes", "voxels")


@functools.cache
def load_world(name):
    """-> the world called `name`; raises ValueError for another name."""
    if name not in WORLDS:
        raise ValueError(f"no embedded world is called {name!r}; there are {', '.join(WORLDS)}")
    if name == "shapes":
        from models.shapes import Shapes  # that file uses this one

        return Shapes()
    if name == "voxels":
        from models.voxels import Voxels  # that file uses this one

        return Voxels()
    return {"ring": Ring, "glyphs": Glyphs, "clips": Clips}[name]()


# ---- measures ----------------------------------------------------------------------------------------------------


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), the squared W2 of two Gaussians (1706.08500).  float."""
    w, q = torch.linalg.eigh(cov1.double())
    root = (q * w.clamp_min(0).sqrt()) @ q.T  # symmetric square root of C1
    cross = torch.linalg.eigvalsh(root @ cov2.double() @ root).clamp_min(0).sqrt().sum()
    return float((mean1 - mean2).double().square().sum() + cov1.double().trace() + cov2.double().trace() - 2 * cross)


def moments_distance(a, b):
    """Mean Fréchet distance over groups.  a, b: pairs (means (G, d), covs (G, d, d)) -> float."""
    return sum(frechet_distance(*group) for group in zip(*a, *b)) / len(a[0])


def sliced_wasserstein(a, b, directions=128, seed=0):
    """Sliced W2 of two equally large point sets a, b (n, d): root mean square over random directions.  float."""
    unit = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit = unit / unit.norm(dim=0)
    pa, pb = (x.double() @ unit for x in (a, b))  # (n, directions)
    return float((pa.sort(0).values - pb.sort(0).values).square().mean().sqrt())


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'|, zero on average for equal laws.  a, b (n, d) -> float."""
    a, b = a.double(), b.double()
    return float(2 * torch.cdist(a, b).mean() - torch.pdist(a).mean() - torch.pdist(b).mean())


BLUR = 0.5  # clean classes do not overlap and log p(c | x) is 0 for all of them: how sharply a sample shows its class is read under noise


def blurred(x):
    """x + BLUR eps, the same eps for the same shape."""
    return x + BLUR * torch.randn(x.shape, generator=torch.Generator().manual_seed(11)).to(x)


def pairwise_diversity(features, label, num_classes):
    """Mean pairwise feature distance within each class.  features (n, d), label (n,) -> (num_classes,)."""
    out = torch.zeros(num_classes, dtype=torch.float64)
    for k in range(num_classes):
        f = features[label == k].double()
        out[k] = torch.pdist(f).mean() if len(f) > 1 else 0.0
    return out


def balanced_labels(n, num_classes):
    """n labels, each class equally often: 0, 1, ..., K - 1, 0, 1, ...  (n,) int64."""
    return torch.arange(n) % num_classes


# ---- ring --------------------------------------------------------------------------------------------------------


class RingTeacher(nn.Module):
    """Exact flow velocity of the ring: a mixture of isotropic Gaussians stays one under x_t = (1-t) x0 + t eps.

    Given mode k, x_t ~ N((1-t) m_k, S) with S = (1-t)^2 c^2 + t^2 and E[x0 | x_t, k] = m_k + (1-t) c^2 / S (x_t - (1-t) m_k).
    """

    prediction, default_shift, cond_names, latent_shape = "flow_v", 1.0, ("label",), (2,)

    def __init__(self, modes=8, num_classes=4, std=0.1):
        super().__init__()
        angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
        self.register_buffer("means", torch.stack([angle.cos(), angle.sin()], 1))  # (modes, 2), radius 1
        self.std, self.num_classes = std, num_classes
        self.config = dict(modes=modes, num_classes=num_classes, std=std)

    def members(self, label):
        """Which modes a label allows: mode k belongs to class k mod 4, the null label to all.  (B, modes) bool."""
        mode = torch.arange(len(self.means), device=label.device)
        return (mode % self.num_classes == label[:, None]) | (label[:, None] == self.num_classes)

    def posterior(self, x, alpha, sigma, label=None):
        """log p_t(x) and E[x0 | x] for any alpha, sigma (B,): x (B, 2) -> (B,), (B, 2), in x's dtype."""
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
        """x (B, 2), t (B,) -> v = eps - x0 = (x - x0) / t; the limit at t = 0 is taken at t = 1e-5."""
        t = t.to(x).clamp_min(1e-5)
        _, x0 = self.posterior(x, 1 - t, t, label)
        return (x - x0) / expand(t, x)


class RingMLP(nn.Module):
    """A trainable stand-in for RingTeacher: 3 hidden layers, time and label added to the first."""

    prediction, default_shift, cond_names, latent_shape = "flow_v", 1.0, ("label",), (2,)

    def __init__(self, dim=128, depth=3, num_classes=4, steps_cond=False, world="ring"):
        super().__init__()
        self.config = dict(dim=dim, depth=depth, num_classes=num_classes, steps_cond=steps_cond, world=world)
        self.num_classes = num_classes
        self.embed, self.time = nn.Linear(2, dim), nn.Linear(64, dim)
        self.label = nn.Embedding(num_classes + 1, dim)
        self.steps = nn.Linear(64, dim) if steps_cond else None
        self.hidden = nn.ModuleList([lora.Linear(dim, dim) for _ in range(depth)])
        self.lora_targets = tuple(f"hidden.{i}" for i in range(depth))
        self.final = nn.Linear(dim, 2)
        self.gradient_checkpointing = False
        if steps_cond:
            nn.init.zeros_(self.steps.weight)
            nn.init.zeros_(self.steps.bias)

    def forward(self, x, t, label=None, steps=None, return_features=False, adapter=None):
        """x (B, 2), t (B,), label (B,) -> velocity (B, 2); features are (B, 1, dim); adapter: a name of models/lora.py or None."""
        lora.check(self, adapter)
        if x.shape[1:] != self.latent_shape:
            raise ValueError(f"RingMLP expects points (B, 2), got {tuple(x.shape)}")
        if label is None:
            label = torch.full((x.shape[0],), self.num_classes, device=x.device)
        dtype = self.embed.weight.dtype
        h = self.embed(x.to(dtype)) + self.time(sinusoid(t, 64, max_period=1000.0).to(dtype)) + self.label(label)
        if steps is not None:
            if self.steps is None:
                raise ValueError("this RingMLP was built without steps_cond=True and cannot take `steps`")
            h = h + self.steps(sinusoid(steps.float() / 1000, 64, max_period=1000.0).to(dtype))
        features = None
        for i, layer in enumerate(self.hidden):
            h = layer(F.silu(h), adapter)
            if i == len(self.hidden) // 2:
                features = h[:, None]
        v = self.final(F.silu(h))
        return (v, features) if return_features else v


def fit_ring_network(teacher, seed=0, steps=1500, batch=512):
    """Regress a RingMLP onto the closed-form velocity (labels dropped one time in five): a student needs weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = RingMLP(num_classes=teacher.num_classes)
    g = torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        x0, label = load_world("ring").draw(batch, g)
        label = torch.where(torch.rand(batch, generator=g) < 0.2, teacher.num_classes, label)
        t = torch.rand(batch, generator=g)
        x = expand(1 - t, x0) * x0 + expand(t, x0) * torch.randn(batch, 2, generator=g)
        loss = F.mse_loss(net(x, t, label=label), teacher(x, t, label=label))
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net


class Ring:
    name, shape, num_classes = "ring", (2,), 4
    class_names = ["east-west", "north-east", "north-south", "north-west"]

    def __init__(self):
        self.exact = RingTeacher()

    def draw(self, n, generator):
        mode = torch.randint(0, len(self.exact.means), (n,), generator=generator)
        noise = torch.randn(n, 2, generator=generator)
        return self.exact.means[mode].float() + self.exact.std * noise, mode % self.num_classes

    def data(self, n, seed, label=None):
        """n points with labels drawn, or with the labels (n,) given.  -> (n, 2) float32, (n,) int64."""
        g = torch.Generator().manual_seed(seed)
        x, drawn = self.draw(n, g)
        if label is None:
            return x, drawn
        mode = label + self.num_classes * torch.randint(0, 2, (n,), generator=g)
        return self.exact.means[mode].float() + self.exact.std * torch.randn(n, 2, generator=g), label

    def teacher(self):
        return RingTeacher()

    def moments(self, x, label):
        """Means and covariances class by class (over all classes together a lost mode would hide), in units of
        0.001 squared so that fd is printed x 1000.  -> (4, 2), (4, 2, 2) float64."""
        groups = [x[label == k].double().cpu() * 1000**0.5 for k in range(self.num_classes)]
        return torch.stack([g.mean(0) for g in groups]), torch.stack([g.T.cov() for g in groups])

    def reference(self):
        return self.moments(*self.data(50000, 987654321, balanced_labels(50000, self.num_classes)))

    def measure(self, x, label):
        """x (n, 2), label (n,) -> fd and patch_swd (both x 1000; a point is its own patch), accuracy, mean log p(c | x + BLUR eps), diversity."""
        x, label = x.double().cpu(), label.cpu()
        ref, ref_label = self.data(4000, 987654321, balanced_labels(4000, self.num_classes))
        nearest = torch.cdist(x, self.exact.means).argmin(1) % self.num_classes
        swd = sliced_wasserstein(x, self.data(len(x), 123456789, label)[0])
        diversity = pairwise_diversity(x, label, self.num_classes) / pairwise_diversity(ref, ref_label, self.num_classes)
        noisy, level = blurred(x), (torch.ones(len(x)).to(x), torch.full((len(x),), BLUR).to(x))
        log_p = self.exact.posterior(noisy, *level, label)[0] - self.exact.posterior(noisy, *level)[0] - math.log(self.num_classes)
        return {"fd": moments_distance(self.moments(x, label), self.reference()), "patch_swd": 1000 * swd,
                "accuracy": float((nearest == label).double().mean()), "log_p": float(log_p.mean()), "diversity": float(diversity.mean())}

    def picture(self, x, side=220):
        """Scatter plot, colour = nearest mode's class.  (n, 2) -> (side, side, 3) uint8."""
        image = Image.new("RGB", (side, side), "white")
        draw = ImageDraw.Draw(image)
        colours = [(214, 69, 65), (38, 110, 180), (46, 139, 87), (150, 90, 160)]
        nearest = torch.cdist(x.double().cpu(), self.exact.means).argmin(1) % self.num_classes
        for (px, py), k in zip(((x.cpu().clamp(-1.6, 1.6) + 1.6) / 3.2 * side).tolist(), nearest.tolist()):
            draw.ellipse([px - 1.5, side - py - 1.5, px + 1.5, side - py + 1.5], fill=colours[k])
        return np.asarray(image)


# ---- glyphs ------------------------------------------------------------------------------------------------------

SUPERSAMPLE = 4  # glyphs are drawn at 64x64 and box-filtered to 16x16


@functools.cache
def _font(size):
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError) as e:
        raise RuntimeError("Pillow lacks FreeType, so it has no scalable built-in font: install a Pillow >= 10.1 wheel") from e


def render_glyphs(label, rng):
    """Draw digits.  label (n,) ints, rng numpy Generator -> uint8 (n, 3, 16, 16), factors float32 (n, 11) in about [-1, 1]:
    x, y, size, slant, weight, glyph colour (3), background (3)."""
    n, side = len(label), 16 * SUPERSAMPLE
    u = rng.uniform(-1, 1, (n, 5))  # x, y, size, slant, weight
    hue, saturation, value = rng.uniform(0, 1, n), rng.uniform(0.25, 1, n), rng.uniform(0.8, 1, n)
    spread = np.stack([np.abs((hue * 6 + k) % 6 - 3) - 1 for k in (0, 4, 2)], 1).clip(0, 1)  # HSV -> RGB
    colour = (value[:, None] * (1 + saturation[:, None] * (spread - 1))).astype(np.float32)  # bright, (n, 3) in [0, 1]
    background = rng.uniform(0, 0.3, (n, 3)).astype(np.float32)  # dark
    coverage = np.empty((n, 16, 16), np.float32)
    for i in range(n):
        dx, dy, size, slant, weight = u[i]
        canvas = Image.new("L", (side, side))
        ImageDraw.Draw(canvas).text(
            (side / 2, side / 2), str(int(label[i])), fill=255, font=_font(int(round(54 + 8 * size))),
            anchor="mm", stroke_width=int(round(1 + weight)))
        shear = 0.25 * slant  # output (x, y) reads input (x + shear (y - c) - dx, y - dy)
        canvas = canvas.transform(
            (side, side), Image.Transform.AFFINE, (1, shear, -shear * side / 2 - 7 * dx, 0, 1, -5 * dy),
            resample=Image.Resampling.BILINEAR)
        coverage[i] = np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / 255
    c = coverage[:, None]  # (n, 1, 16, 16)
    rgb = c * colour[:, :, None, None] + (1 - c) * background[:, :, None, None]
    factors = np.concatenate([u, 2 * colour - 1, background / 0.15 - 1], 1).astype(np.float32)
    return np.round(rgb * 255).astype(np.uint8), factors


class Classifier(nn.Module):
    """Convolutional net whose 128 features feed a class head and a head for the world's factors of variation.

    The second head is why the features see colour, position and slant at all: a classifier alone learns to forget
    them, and `fd` and `diversity` would then miss a student that draws every digit in one colour.
    """

    def __init__(self, channels, num_classes, factors):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 32, 3, padding=1), nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(48, 64, 3, padding=1), nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.features = nn.Linear(64 * 16, 128)
        self.classes, self.factors = nn.Linear(128, num_classes), nn.Linear(128, factors)

    def forward(self, x):
        """x (B, C, [T,] 16, 16) in [-1, 1], frames taken as channels -> features (B, 128), class logits, factors."""
        h = F.silu(self.conv2(F.silu(self.conv1(x.flatten(1, -3)))))  # (B, 48, 8, 8)
        h = F.silu(self.conv4(F.silu(self.conv3(h))))  # (B, 64, 4, 4)
        f = F.silu(self.features(h.flatten(1)))
        return f, self.classes(f), self.factors(f)


def image_patches(x, size=4, per_image=8, seed=0):
    """Random size x size patches with each channel's mean taken out, so that grain on plain areas is not drowned by
    the colour of the area. Frames of a video count as channels.  x (n, C, [T,] H, W) -> (n * per_image, C * [T *] size * size)."""
    g = torch.Generator().manual_seed(seed)
    x = x.flatten(1, -3)
    n, C, H, W = x.shape
    windows = x.unfold(2, size, 1).unfold(3, size, 1)  # (n, C, H', W', size, size)
    i, j = (torch.randint(0, L - size + 1, (per_image, n), generator=g) for L in (H, W))
    p = torch.cat([windows[torch.arange(n), :, a, b] for a, b in zip(i, j)])  # (n * per_image, C, size, size)
    return (p - p.mean((2, 3), keepdim=True)).flatten(1)


class FeatureWorld:
    """What the worlds with a shipped teacher share: a classifier's features as yardstick. A subclass has name, shape,
    num_classes, class_names, factors (how many) and render(label, rng) -> x0 float32, factors (n, factors) in about [-1, 1]."""

    def data(self, n, seed, label=None):
        """n items in [-1, 1] with labels drawn, or with the labels given.  -> (n, *shape) float32, (n,) int64."""
        rng = np.random.default_rng(seed)
        label = rng.integers(0, self.num_classes, n) if label is None else np.asarray(label)
        return torch.from_numpy(self.render(label, rng)[0]), torch.from_numpy(label).long()

    def folder(self, name):
        return os.path.join(os.path.dirname(os.path.abspath(__file__)), self.name, name)

    def teacher_folder(self):
        return self.folder("teacher")

    def new_classifier(self):
        """The classifier, untrained."""
        return Classifier(math.prod(self.shape[:-2]), self.num_classes, self.factors)

    def patches(self, x, seed):
        """x (n, *shape) -> (m, d), small patches that show grain."""
        return image_patches(x, seed=seed)

    @functools.cached_property
    def classifier(self):
        net = self.new_classifier()
        net.load_state_dict({k: v.float() for k, v in load_file(self.folder("classifier.safetensors")).items()})
        return net.eval().requires_grad_(False)

    @functools.cached_property
    def reference(self):
        """mean (128,), cov (128, 128) of 50,000 data items' features and within-class distance (K,), float64."""
        return load_file(self.folder("reference.safetensors"))

    def moments(self, x, label):
        """Mean and covariance of the features, one group.  -> (1, 128), (1, 128, 128) float64."""
        f = self.look(x)[0].double()
        return f.mean(0)[None], f.T.cov()[None]

    def look(self, x):
        """x (n, *shape) -> features (n, 128), logits (n, K), in batches on the CPU; pixels clipped to [-1, 1]."""
        out = [self.classifier(b.float().cpu().clamp(-1, 1))[:2] for b in x.split(500)]
        return torch.cat([f for f, _ in out]), torch.cat([c for _, c in out])

    def measure(self, x, label):
        """x (n, *shape), label (n,) -> fd, patch_swd (x 1000, against n fresh data items), accuracy, diversity."""
        label, (f, logits), ref = label.cpu(), self.look(x), self.reference
        x_blurred = blurred(x.float().cpu().clamp(-1, 1))
        fresh = self.data(len(x), 123456789, label)[0]
        swd = sliced_wasserstein(self.patches(x.float().cpu().clamp(-1, 1), seed=1), self.patches(fresh, seed=2))
        moments = f.double().mean(0)[None], f.double().T.cov()[None]
        return {"fd": moments_distance(moments, (ref["mean"][None], ref["cov"][None])),
                "patch_swd": 1000 * swd, "accuracy": float((logits.argmax(1) == label).double().mean()),
                "log_p": -float(F.cross_entropy(torch.cat([self.classifier(b)[1] for b in x_blurred.split(500)]), label)),
                "diversity": float((pairwise_diversity(f, label, self.num_classes) / ref["diversity"]).mean())}


class Glyphs(FeatureWorld):
    name, shape, num_classes, factors = "glyphs", (3, 16, 16), 10, 11
    class_names = [str(i) for i in range(10)]

    def render(self, label, rng):
        pixels, factors = render_glyphs(label, rng)
        return pixels.astype(np.float32) / np.float32(127.5) - 1, factors

    def picture(self, x):
        return io.tile(x)


# ---- clips -------------------------------------------------------------------------------------------------------

# class -> share of clips that stand still, slowest and fastest speed of the others in pixels per frame
SPEEDS = {"disc": (0.0, 0.8, 1.3), "ring": (0.0, 0.3, 0.7), "square": (0.5, 0.5, 1.1), "triangle": (0.25, 0.3, 1.3),
          "plus": (0.5, 0.3, 0.7), "bar": (0.0, 0.5, 1.1)}
MOVING = 0.2  # pixels per frame: a clip below counts as still


def shape_distance(kind, x, y, r):
    """Signed distance in pixels (negative inside) from (x, y), relative to the shape's centre, to its outline; r is its size."""
    if kind == "disc":
        return np.hypot(x, y) - r
    if kind == "ring":
        return np.abs(np.hypot(x, y) - 0.8 * r) - 0.25 * r
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r
    if kind == "triangle":  # pointing up: the base, and both flanks
        return np.maximum(y - 0.75 * r, 0.894 * np.abs(x) - 0.447 * (y + 1.1 * r))
    if kind == "plus":
        a, b = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(a - 1.1 * r, b - 0.35 * r)
    return np.maximum(np.abs(x) - 1.2 * r, np.abs(y) - 0.4 * r)  # bar


class Clips(FeatureWorld):
    """One grey shape on a plain darker background, 8 frames of 16x16, moving in a straight line at constant speed.

    The class fixes the shape and the law of its speed (SPEEDS); the middle of its path, direction, size and both greys vary.
    """

    name, shape, num_classes, factors = "clips", (1, 8, 16, 16), len(SPEEDS), 7
    class_names = list(SPEEDS)

    def render(self, label, rng):
        """label (n,) -> float32 (n, 1, 8, 16, 16), factors (n, 7): middle x, y, velocity x, y, size, both greys, each in about [-1, 1]."""
        n = len(label)
        still, low, high = np.array(list(SPEEDS.values()))[label].T
        speed = np.where(rng.uniform(0, 1, n) < still, 0.0, rng.uniform(low, high))
        angle = rng.uniform(0, 2 * np.pi, n)
        v = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)  # (n, 2) pixels per frame
        r = rng.uniform(2.2, 3.2, n)
        room = np.maximum(0.0, 7.5 - 1.2 * r[:, None] - 3.5 * np.abs(v))  # so that the whole path stays in the picture
        where = rng.uniform(-1, 1, (n, 2))
        ink, paper = rng.uniform(0.1, 1, n), rng.uniform(-1, -0.4, n)
        middle = 7.5 + where * room
        grid = np.arange(16.0)
        x0 = np.empty((n, 8, 16, 16), np.float32)
        for frame in range(8):
            centre = middle + (frame - 3.5) * v  # (n, 2)
            x, y = grid[None, None, :] - centre[:, 0, None, None], grid[None, :, None] - centre[:, 1, None, None]
            for k, kind in enumerate(SPEEDS):
                of = label == k
                cover = np.clip(0.5 - shape_distance(kind, x[of], y[of], r[of, None, None]), 0, 1)  # (., 16, 16), edges one pixel soft
                x0[of, frame] = paper[of, None, None] + cover * (ink - paper)[of, None, None]
        factors = np.concatenate([(middle - 7.5) / 5, v / 1.3, (r - 2.7)[:, None] / 0.5, (ink - 0.55)[:, None] / 0.45,
                                  (paper + 0.7)[:, None] / 0.3], 1)
        return x0[:, None], factors.astype(np.float32)

    def speed(self, x):
        """Pixels per frame that the ink's centre of mass travels, seen from the corners' mean grey.  x (n, 1, 8, 16, 16) -> (n,)."""
        x = x.float().cpu().clamp(-1, 1)[:, 0]  # (n, 8, 16, 16)
        paper = torch.stack([x[..., 0, 0], x[..., 0, -1], x[..., -1, 0], x[..., -1, -1]], -1).median(-1).values.median(-1).values
        ink = (x - paper[:, None, None, None] - 0.15).clamp_min(0)  # (n, 8, 16, 16); what is fainter is grain
        total = ink.sum((2, 3)).clamp_min(1e-6)
        grid = torch.arange(16.0)
        centre = torch.stack([(ink * grid).sum((2, 3)), (ink * grid[:, None]).sum((2, 3))], -1) / total[..., None]  # (n, 8, 2)
        return centre.diff(dim=1).norm(dim=-1).mean(1)

    def measure(self, x, label):
        """The measures of every world, and: motion, mean speed over data's; moving, share of clips faster than MOVING."""
        speed = self.speed(x)
        data = self.speed(self.data(len(x), 123456789, label.cpu())[0])
        return {**super().measure(x, label), "motion": float(speed.mean() / data.mean()), "moving": float((speed > MOVING).double().mean())}

    def picture(self, x):
        """Clips (n, 1, T, 16, 16) -> one column per clip, up to four frames from top to bottom."""
        T = x.shape[2]
        return np.concatenate([io.tile(x[:, :, i]) for i in np.linspace(0, T - 1, min(4, T)).round().astype(int)])


def build_reference(world, steps=3000, batch=128, seed=1, items=60000):
    """Train the world's classifier and write classifier.safetensors (fp16) and reference.safetensors; about 4 minutes."""
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
        noisy = x[i] + torch.randn_like(x[i]) * torch.rand(batch, *[1] * len(world.shape)) * 0.1  # samples are never exactly clean
        _, logits, guess = net(noisy)
        loss = F.cross_entropy(logits, y[i]) + F.mse_loss(guess, z[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    net.eval().requires_grad_(False)
    io.save_tensors({k: v.half() for k, v in net.state_dict().items()}, world.folder("classifier.safetensors"))
    x, y = world.data(50000, seed + 1, np.arange(50000) % world.num_classes)  # from here on with the fp16-rounded weights that ship
    vars(world).pop("classifier", None)  # of an earlier file
    f = world.look(x)[0].double()
    io.save_tensors({"mean": f.mean(0), "cov": f.T.cov(), "diversity": pairwise_diversity(f[:20000], y[:20000], world.num_classes)},
                 world.folder("reference.safetensors"))
    print("2,000 further items:", world.measure(*world.data(2000, seed + 2, balanced_labels(2000, world.num_classes))))


if __name__ == "__main__":
    build_reference(load_world(sys.argv[1]))
