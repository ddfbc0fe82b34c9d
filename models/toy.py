"""Embedded worlds: data, a teacher and a yardstick in one place, so that every script runs with nothing to download.

    ring     8 Gaussians on a circle, 4 classes of two opposite modes each; every score, x0 and velocity in closed form
    glyphs   3x16x16 colour digits drawn with Pillow's own font; position, size, slant, weight and both colours vary

A world has: name, shape (C, ...), num_classes, class_names, data(n, seed) -> (x0, label), teacher(device),
measure(x, label) -> {"fd", "patch_swd", "accuracy", "diversity"}, and picture(x) -> (H, W, 3) uint8, one row.
`python -m models.toy` retrains the glyph classifier and rewrites the reference statistics in models/glyphs/.
"""
import functools
import math
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from models.diffusion import expand, sinusoid

GLYPHS_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "glyphs")
WORLDS = ("ring", "glyphs")


@functools.cache
def load_world(name):
    """-> the world called `name`; raises ValueError for another name."""
    if name not in WORLDS:
        raise ValueError(f"no embedded world is called {name!r}; there are {', '.join(WORLDS)}")
    return Ring() if name == "ring" else Glyphs()


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
        self.hidden = nn.ModuleList([nn.Linear(dim, dim) for _ in range(depth)])
        self.final = nn.Linear(dim, 2)
        self.gradient_checkpointing = False
        if steps_cond:
            nn.init.zeros_(self.steps.weight)
            nn.init.zeros_(self.steps.bias)

    def forward(self, x, t, label=None, steps=None, return_features=False):
        """x (B, 2), t (B,), label (B,) -> velocity (B, 2); features are (B, 1, dim)."""
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
            h = layer(F.silu(h))
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
        """x (n, 2), label (n,) -> fd and patch_swd (both x 1000; a point is its own patch), accuracy, diversity."""
        x, label = x.double().cpu(), label.cpu()
        ref, ref_label = self.data(4000, 987654321, balanced_labels(4000, self.num_classes))
        nearest = torch.cdist(x, self.exact.means).argmin(1) % self.num_classes
        swd = sliced_wasserstein(x, self.data(len(x), 123456789, label)[0])
        diversity = pairwise_diversity(x, label, self.num_classes) / pairwise_diversity(ref, ref_label, self.num_classes)
        return {"fd": moments_distance(self.moments(x, label), self.reference()), "patch_swd": 1000 * swd,
                "accuracy": float((nearest == label).double().mean()), "diversity": float(diversity.mean())}

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
FACTORS = 11  # x, y, size, slant, weight, glyph colour (3), background (3)


@functools.cache
def _font(size):
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError) as e:
        raise RuntimeError("Pillow lacks FreeType, so it has no scalable built-in font: install a Pillow >= 10.1 wheel") from e


def render_glyphs(label, rng):
    """Draw digits.  label (n,) ints, rng numpy Generator -> uint8 (n, 3, 16, 16), factors float32 (n, 11) in about [-1, 1]."""
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


class GlyphClassifier(nn.Module):
    """Convolutional net whose 128 features feed a class head and a head for the 11 factors of variation.

    The second head is why the features see colour, position and slant at all: a classifier alone learns to forget
    them, and `fd` and `diversity` would then miss a student that draws every digit in one colour.
    """

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(48, 64, 3, padding=1), nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.features = nn.Linear(64 * 16, 128)
        self.classes, self.factors = nn.Linear(128, num_classes), nn.Linear(128, FACTORS)

    def forward(self, x):
        """x (B, 3, 16, 16) in [-1, 1] -> features (B, 128), class logits (B, 10), factors (B, 11)."""
        h = F.silu(self.conv2(F.silu(self.conv1(x))))  # (B, 48, 8, 8)
        h = F.silu(self.conv4(F.silu(self.conv3(h))))  # (B, 64, 4, 4)
        f = F.silu(self.features(h.flatten(1)))
        return f, self.classes(f), self.factors(f)


def image_patches(x, size=4, per_image=8, seed=0):
    """Random size x size patches with each channel's mean taken out, so that grain on plain areas is not drowned by
    the colour of the area.  x (n, C, H, W) -> (n * per_image, C * size * size)."""
    g = torch.Generator().manual_seed(seed)
    n, C, H, W = x.shape
    windows = x.unfold(2, size, 1).unfold(3, size, 1)  # (n, C, H', W', size, size)
    i, j = (torch.randint(0, L - size + 1, (per_image, n), generator=g) for L in (H, W))
    p = torch.cat([windows[torch.arange(n), :, a, b] for a, b in zip(i, j)])  # (n * per_image, C, size, size)
    return (p - p.mean((2, 3), keepdim=True)).flatten(1)


class Glyphs:
    name, shape, num_classes = "glyphs", (3, 16, 16), 10
    class_names = [str(i) for i in range(10)]

    def data(self, n, seed, label=None):
        """n images in [-1, 1] with labels drawn, or with the labels given.  -> (n, 3, 16, 16) float32, (n,) int64."""
        rng = np.random.default_rng(seed)
        label = rng.integers(0, 10, n) if label is None else np.asarray(label)
        return torch.from_numpy(render_glyphs(label, rng)[0]).float() / 127.5 - 1, torch.from_numpy(label).long()

    def teacher_folder(self):
        return os.path.join(GLYPHS_DIR, "teacher")

    @functools.cached_property
    def classifier(self):
        net = GlyphClassifier()
        net.load_state_dict({k: v.float() for k, v in load_file(os.path.join(GLYPHS_DIR, "classifier.safetensors")).items()})
        return net.eval().requires_grad_(False)

    @functools.cached_property
    def reference(self):
        """mean (128,), cov (128, 128) of 50,000 data items' features and within-class distance (10,), float64."""
        return load_file(os.path.join(GLYPHS_DIR, "reference.safetensors"))

    def moments(self, x, label):
        """Mean and covariance of the features, one group.  -> (1, 128), (1, 128, 128) float64."""
        f = self.look(x)[0].double()
        return f.mean(0)[None], f.T.cov()[None]

    def look(self, x):
        """x (n, 3, 16, 16) -> features (n, 128), logits (n, 10), in batches on the CPU; pixels clipped to [-1, 1]."""
        out = [self.classifier(b.float().cpu().clamp(-1, 1))[:2] for b in x.split(500)]
        return torch.cat([f for f, _ in out]), torch.cat([c for _, c in out])

    def measure(self, x, label):
        """x (n, 3, 16, 16), label (n,) -> fd, patch_swd (x 1000, against n fresh data items), accuracy, diversity."""
        label, (f, logits), ref = label.cpu(), self.look(x), self.reference
        fresh = self.data(len(x), 123456789, label)[0]
        swd = sliced_wasserstein(image_patches(x.float().cpu().clamp(-1, 1), seed=1), image_patches(fresh, seed=2))
        moments = f.double().mean(0)[None], f.double().T.cov()[None]
        return {"fd": moments_distance(moments, (ref["mean"][None], ref["cov"][None])),
                "patch_swd": 1000 * swd, "accuracy": float((logits.argmax(1) == label).double().mean()),
                "diversity": float((pairwise_diversity(f, label, 10) / ref["diversity"]).mean())}

    def picture(self, x, zoom=3):
        """(n, 3, 16, 16) in [-1, 1] -> one row of tiles, (48 + 2, n * 50, 3) uint8."""
        tiles = ((x.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        tiles = tiles.repeat(zoom, 1).repeat(zoom, 2)
        return np.concatenate(list(np.pad(tiles, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)), axis=1)


def build_glyph_reference(steps=3000, batch=128, seed=1):
    """Train the classifier and write classifier.safetensors (fp16) and reference.safetensors; about 4 minutes."""
    from models.io import save_tensors  # only the builder writes files

    torch.manual_seed(seed)
    os.makedirs(GLYPHS_DIR, exist_ok=True)
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 10, 60000)
    pixels, factors = render_glyphs(label, rng)
    x, y, z = torch.from_numpy(pixels), torch.from_numpy(label), torch.from_numpy(factors)
    net = GlyphClassifier()
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        i = torch.randint(0, len(x), (batch,))
        noisy = x[i].float() / 127.5 - 1
        noisy = noisy + torch.randn_like(noisy) * torch.rand(batch, 1, 1, 1) * 0.1  # samples are never exactly clean
        _, logits, guess = net(noisy)
        loss = F.cross_entropy(logits, y[i]) + F.mse_loss(guess, z[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    net.eval().requires_grad_(False)
    save_tensors({k: v.half() for k, v in net.state_dict().items()}, os.path.join(GLYPHS_DIR, "classifier.safetensors"))
    world = Glyphs()  # from here on with the fp16-rounded weights that ship
    x, y = world.data(50000, seed + 1, np.arange(50000) % 10)
    f = world.look(x)[0].double()
    save_tensors({"mean": f.mean(0), "cov": f.T.cov(), "diversity": pairwise_diversity(f[:20000], y[:20000], 10)},
                 os.path.join(GLYPHS_DIR, "reference.safetensors"))
    print("2,000 further items:", world.measure(*world.data(2000, seed + 2, balanced_labels(2000, 10))))


if __name__ == "__main__":
    build_glyph_reference()
