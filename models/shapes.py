"""The world `shapes`: 3x32x32 pictures of one coloured shape on a plain dark background, with segmentation maps.

The class is the kind of shape; position, size and both colours vary. A map has 0 for background and 1 + class for the shape. The
world ships a patch-PCA autoencoder (f = 4, 48 -> 12 numbers a patch), and takes that space's latents (12x8x8) wherever it takes pixels,
so that scripts which distil a latent teacher need not know of it. `python -m models.shapes` makes everything in models/shapes/ anew.
"""
import functools

import numpy as np
import torch
import torch.nn as nn

from models import io
from models.latent_space import LatentSpace, PatchPCA, load_space
from models.toy import SPEEDS, Classifier, FeatureWorld, build_reference, shape_distance

SIDE, PATCH, LATENT_CHANNELS = 32, 4, 12


def render_shapes(label, rng):
    """label (n,) ints -> x float32 (n, 3, 32, 32) in [-1, 1], factors (n, 9) in about [-1, 1]: x, y, size, colour (3), background (3);
    map uint8 (n, 32, 32)."""
    n = len(label)
    r, where = rng.uniform(8, 11, n), rng.uniform(-1, 1, (n, 2))
    middle = (SIDE - 1) / 2 + where * ((SIDE - 1) / 2 - 1.2 * r)[:, None]  # the whole shape stays in the picture
    hue, saturation, value = rng.uniform(0, 1, n), rng.uniform(0.25, 1, n), rng.uniform(0.8, 1, n)
    spread = np.stack([np.abs((hue * 6 + k) % 6 - 3) - 1 for k in (0, 4, 2)], 1).clip(0, 1)  # HSV -> RGB
    colour = (value[:, None] * (1 + saturation[:, None] * (spread - 1))).astype(np.float32)  # bright, (n, 3) in [0, 1]
    background = rng.uniform(0, 0.3, (n, 3)).astype(np.float32)
    grid = np.arange(SIDE, dtype=np.float32)
    cover = np.empty((n, SIDE, SIDE), np.float32)
    for k, kind in enumerate(SPEEDS):
        of = np.asarray(label) == k
        x, y = (grid[None, None, :] - middle[of, 0, None, None]).astype(np.float32), (grid[None, :, None] - middle[of, 1, None, None]).astype(np.float32)
        cover[of] = np.clip(0.5 - shape_distance(kind, x, y, r[of, None, None].astype(np.float32)), 0, 1)  # edges one pixel soft
    x = background[:, :, None, None] + cover[:, None] * (colour - background)[:, :, None, None]
    factors = np.concatenate([where, (r - 9.5)[:, None] / 1.5, 2 * colour - 1, background / 0.15 - 1], 1).astype(np.float32)
    return (2 * x - 1).astype(np.float32), factors, np.where(cover > 0.5, 1 + np.asarray(label)[:, None, None], 0).astype(np.uint8)


class Shapes(FeatureWorld):
    name, shape, num_classes, factors = "shapes", (3, SIDE, SIDE), len(SPEEDS), 9
    class_names = list(SPEEDS)
    map_classes = 1 + len(SPEEDS)

    def render(self, label, rng):
        return render_shapes(label, rng)[:2]

    def scenes(self, n, seed, label=None):
        """n items as data() gives them for the same arguments, with maps.  -> (n, 3, 32, 32), (n,), maps (n, 32, 32) uint8."""
        rng = np.random.default_rng(seed)
        label = rng.integers(0, self.num_classes, n) if label is None else np.asarray(label)
        x, _, maps = render_shapes(label, rng)
        return torch.from_numpy(x), torch.from_numpy(label).long(), torch.from_numpy(maps)

    def new_classifier(self):
        """The worlds' classifier on 2x2 pixels taken as channels: it was made for 16x16."""
        return nn.Sequential(nn.PixelUnshuffle(2), Classifier(12, self.num_classes, self.factors))

    def teacher_folder(self):
        raise io.UserError("no teacher ships for shapes: python latent_fm.py trains one in minutes, then give --teacher runs/latent_fm-shapes")

    @functools.cached_property
    def space(self):
        """The shipped patch-PCA space, of unit mean square."""
        return load_space(self.folder("autoencoder"))

    @functools.cached_property
    def latent_shape(self):
        return (LATENT_CHANNELS, SIDE // PATCH, SIDE // PATCH)

    def pixels(self, x):
        """Latents of the shipped space -> pixels; pixels stay.  (n, ...) -> (n, 3, 32, 32) on the CPU."""
        x = x.float().cpu()
        return self.space.to_pixels(x) if tuple(x.shape[1:]) == self.latent_shape else x

    def look(self, x):
        return super().look(self.pixels(x))

    def measure(self, x, label):
        return super().measure(self.pixels(x), label)

    def picture(self, x):
        return io.tile(self.pixels(x), 2)

    def foreground(self, x):
        """Which pixels are the shape's, from the picture alone: further than half the least contrast from the border's colour.
        x (n, 3, 32, 32) or latents -> bool (n, 32, 32)."""
        x = self.pixels(x).clamp(-1, 1)
        border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2).median(2).values  # (n, 3)
        return (x - border[:, :, None, None]).abs().amax(1) > 0.5


def overlap(a, b):
    """Intersection over union, image by image; two empty ones agree.  a, b bool (n, H, W) -> (n,)."""
    union = (a | b).flatten(1).sum(1)
    return torch.where(union == 0, 1.0, (a & b).flatten(1).sum(1) / union.clamp_min(1))


def build_autoencoder(world, n=4000, seed=20):
    """models/shapes/autoencoder/: patch-PCA of n items, and one scale for all channels."""
    x = world.data(n, seed)[0]
    space = LatentSpace(PatchPCA(3, PATCH, LATENT_CHANNELS).fit(x))
    space.measure_norm([space.own_moments(x)], "scale")
    space.save(world.folder("autoencoder"))
    error, variance = (space.to_pixels(space.to_latents(x)) - x).square().mean(), x.var()
    print(f"autoencoder: mean squared error {error:.4f} of a variance of {variance:.4f}; channel std {float(space.std[0]):.4f}")


if __name__ == "__main__":
    build_autoencoder(Shapes())
    build_reference(Shapes(), steps=1500, batch=64, items=20000)
