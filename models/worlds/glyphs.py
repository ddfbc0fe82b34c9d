"""The world `glyphs`: 3x16x16 colour digits, drawn with Pillow's own font.

The class is the digit. Position, size, slant, weight and both colours vary.
"""

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models.pictures import tile
from models.worlds.features import FeatureWorld

SUPERSAMPLE = 4  # glyphs are drawn at 64x64 and box-filtered to 16x16


@functools.cache
def _font(size):
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError) as e:
        raise RuntimeError(
            "Pillow lacks FreeType, so it has no scalable built-in font: "
            "install a Pillow >= 10.1 wheel"
        ) from e


def render_glyphs(label, rng):
    """Draw digits.  label (n,) int, rng a numpy Generator -> pixels, factors.

    pixels uint8 (n, 3, 16, 16); factors float32 (n, 11) in about [-1, 1]: x, y, size, slant,
    weight, the digit's colour (3), the background's (3).
    """
    n, side = len(label), 16 * SUPERSAMPLE
    u = rng.uniform(-1, 1, (n, 5))  # x, y, size, slant, weight
    hue, saturation, value = rng.uniform(0, 1, n), rng.uniform(0.25, 1, n), rng.uniform(0.8, 1, n)
    # HSV -> RGB
    spread = np.stack([np.abs((hue * 6 + k) % 6 - 3) - 1 for k in (0, 4, 2)], 1).clip(0, 1)
    colour = value[:, None] * (1 + saturation[:, None] * (spread - 1))
    colour = colour.astype(np.float32)  # bright, (n, 3) in [0, 1]
    background = rng.uniform(0, 0.3, (n, 3)).astype(np.float32)  # dark
    coverage = np.empty((n, 16, 16), np.float32)
    for i in range(n):
        dx, dy, size, slant, weight = u[i]
        canvas = Image.new("L", (side, side))
        ImageDraw.Draw(canvas).text(
            (side / 2, side / 2),
            str(int(label[i])),
            fill=255,
            font=_font(int(round(54 + 8 * size))),
            anchor="mm",
            stroke_width=int(round(1 + weight)),
        )
        shear = 0.25 * slant  # output (x, y) reads input (x + shear (y - c) - dx, y - dy)
        canvas = canvas.transform(
            (side, side),
            Image.Transform.AFFINE,
            (1, shear, -shear * side / 2 - 7 * dx, 0, 1, -5 * dy),
            resample=Image.Resampling.BILINEAR,
        )
        coverage[i] = np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / 255
    c = coverage[:, None]  # (n, 1, 16, 16)
    rgb = c * colour[:, :, None, None] + (1 - c) * background[:, :, None, None]
    factors = np.concatenate([u, 2 * colour - 1, background / 0.15 - 1], 1).astype(np.float32)
    return np.round(rgb * 255).astype(np.uint8), factors


class Glyphs(FeatureWorld):
    """Bright digits on a dark plain background."""

    name, shape, num_classes, factors = "glyphs", (3, 16, 16), 10, 11
    class_names = [str(i) for i in range(10)]

    def render(self, label, rng):
        """label (n,) -> float32 (n, 3, 16, 16) in [-1, 1], factors (n, 11) as in render_glyphs."""
        pixels, factors = render_glyphs(label, rng)
        return pixels.astype(np.float32) / np.float32(127.5) - 1, factors

    def picture(self, x):
        """Digits (n, 3, 16, 16) side by side, three times as large -> (50, 50 n, 3) uint8."""
        return tile(x)
