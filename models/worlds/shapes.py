"""The world `shapes`: 3x32x32 pictures of one coloured shape on a dark background, with maps.

The class is the kind of shape. Position, size and both colours vary. A segmentation map has 0 for
background and 1 + class for the shape. The world ships a patch-PCA autoencoder (f = 4, 48 -> 12
numbers a patch), and takes that space's latents (12x8x8) wherever it takes pixels, so that scripts
which distil a latent teacher need not know of it. `python -m models.worlds shapes` makes everything
in models/worlds/shapes/ anew.
"""

import functools

import numpy as np
import torch
import torch.nn as nn

from models.files import UserError
from models.networks.autoencoders import PatchPCA
from models.networks.latent_space import LatentSpace, load_space
from models.pictures import tile
from models.worlds.clips import SPEEDS, shape_distance
from models.worlds.features import Classifier, FeatureWorld

SIDE, PATCH, LATENT_CHANNELS = 32, 4, 12


def render_shapes(label, rng):
    """Draw shapes.  label (n,) int, rng a numpy Generator -> x, factors, map.

    x float32 (n, 3, 32, 32) in [-1, 1]; factors float32 (n, 9) in about [-1, 1]: x, y, size, the
    shape's colour (3), the background's (3); map uint8 (n, 32, 32).
    """
    n, label = len(label), np.asarray(label)
    r, where = rng.uniform(8, 11, n), rng.uniform(-1, 1, (n, 2))
    # the whole shape stays in the picture
    middle = (SIDE - 1) / 2 + where * ((SIDE - 1) / 2 - 1.2 * r)[:, None]
    hue, saturation, value = rng.uniform(0, 1, n), rng.uniform(0.25, 1, n), rng.uniform(0.8, 1, n)
    # HSV -> RGB
    spread = np.stack([np.abs((hue * 6 + k) % 6 - 3) - 1 for k in (0, 4, 2)], 1).clip(0, 1)
    colour = value[:, None] * (1 + saturation[:, None] * (spread - 1))
    colour = colour.astype(np.float32)  # bright, (n, 3) in [0, 1]
    background = rng.uniform(0, 0.3, (n, 3)).astype(np.float32)
    grid = np.arange(SIDE, dtype=np.float32)
    cover = np.empty((n, SIDE, SIDE), np.float32)
    for k, kind in enumerate(SPEEDS):
        of = label == k
        x = (grid[None, None, :] - middle[of, 0, None, None]).astype(np.float32)
        y = (grid[None, :, None] - middle[of, 1, None, None]).astype(np.float32)
        distance = shape_distance(kind, x, y, r[of, None, None].astype(np.float32))
        cover[of] = np.clip(0.5 - distance, 0, 1)  # edges one pixel soft
    x = background[:, :, None, None] + cover[:, None] * (colour - background)[:, :, None, None]
    size = (r - 9.5)[:, None] / 1.5
    factors = np.concatenate([where, size, 2 * colour - 1, background / 0.15 - 1], 1)
    maps = np.where(cover > 0.5, 1 + label[:, None, None], 0)
    return (2 * x - 1).astype(np.float32), factors.astype(np.float32), maps.astype(np.uint8)


class Shapes(FeatureWorld):
    """One bright shape on a dark plain background, measured as pixels or as latents of `space`."""

    name, shape, num_classes, factors = "shapes", (3, SIDE, SIDE), len(SPEEDS), 9
    class_names = list(SPEEDS)
    map_classes = 1 + len(SPEEDS)

    def render(self, label, rng):
        """label (n,) -> float32 (n, 3, 32, 32), factors (n, 9) as in render_shapes."""
        return render_shapes(label, rng)[:2]

    def scenes(self, n, seed, label=None):
        """The items and labels of data() for the same arguments, and their segmentation maps.

        -> (n, 3, 32, 32), (n,), (n, 32, 32) uint8: 0 is background, 1 + class the shape.
        """
        rng = np.random.default_rng(seed)
        label = rng.integers(0, self.num_classes, n) if label is None else np.asarray(label)
        x, _, maps = render_shapes(label, rng)
        return torch.from_numpy(x), torch.from_numpy(label).long(), torch.from_numpy(maps)

    def new_classifier(self):
        """The classifier, untrained. It is made for 16x16, so 2x2 pixels become channels."""
        return nn.Sequential(nn.PixelUnshuffle(2), Classifier(12, self.num_classes, self.factors))

    def teacher_folder(self):
        """Raises UserError: no teacher ships, latent_fm.py trains one."""
        raise UserError(
            "no teacher ships for shapes: python latent_fm.py trains one in minutes, "
            "then give --teacher runs/latent_fm-shapes"
        )

    @functools.cached_property
    def space(self):
        """The shipped patch-PCA space, of unit mean square."""
        return load_space(self.folder("autoencoder"))

    @functools.cached_property
    def latent_shape(self):
        """Of that space: (12, 8, 8)."""
        return (LATENT_CHANNELS, SIDE // PATCH, SIDE // PATCH)

    def pixels(self, x):
        """Decode latents of the shipped space; pixels stay.  -> (n, 3, 32, 32) on the CPU."""
        x = x.float().cpu()
        return self.space.to_pixels(x) if tuple(x.shape[1:]) == self.latent_shape else x

    def look(self, x):
        """Run the classifier.  Pixels or latents -> features (n, 128), class logits (n, K)."""
        return super().look(self.pixels(x))

    def measure(self, x, label):
        """The measures of every world.  x: pixels or latents (n, ...), label (n,) -> dict."""
        return super().measure(self.pixels(x), label)

    def picture(self, x):
        """Pictures (n, 3, 32, 32) or latents, side by side and doubled -> (66, 66 n, 3) uint8."""
        return tile(self.pixels(x), 2)

    def foreground(self, x):
        """Which pixels are the shape's, judged from the picture alone.

        These differ from the border's colour by more than half of the least contrast that data
        have.  x (n, 3, 32, 32) or latents -> bool (n, 32, 32).
        """
        x = self.pixels(x).clamp(-1, 1)
        border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2)
        border = border.median(2).values  # (n, 3)
        return (x - border[:, :, None, None]).abs().amax(1) > 0.5


def overlap(a, b):
    """Intersection over union of each image, 1 if both are empty.  a, b bool (n, H, W) -> (n,)."""
    union = (a | b).flatten(1).sum(1)
    return torch.where(union == 0, 1.0, (a & b).flatten(1).sum(1) / union.clamp_min(1))


def build_autoencoder(world, n=4000, seed=20):
    """Write autoencoder/ in the world's folder: patch-PCA of n items, all channels scaled alike."""
    x = world.data(n, seed)[0]
    space = LatentSpace(PatchPCA(3, PATCH, LATENT_CHANNELS).fit(x))
    space.measure_norm([space.own_moments(x)], "scale")
    space.save(world.folder("autoencoder"))
    error = (space.to_pixels(space.to_latents(x)) - x).square().mean()
    print(
        f"autoencoder: mean squared error {error:.4f} of a variance of {x.var():.4f}; "
        f"channel std {float(space.std[0]):.4f}"
    )
