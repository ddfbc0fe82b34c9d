"""Holes for inpainting: random strokes or boxes, of the kind that LaMa (2109.07161) and LFM use.

Half of the masks are 1 to 11 broken lines of 1 to 5 segments, the other half are 1 to 3 boxes. The
lengths of the segments, the widths of the brush and the sides of the boxes are those of LFM at
256 x 256 pixels (10 to 70, 5 to 24 and 30 to 100 pixels), in proportion to the side. The directions
of the segments are uniform here.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw


def draw_mask(side, rng):
    """One mask.  rng a numpy Generator -> uint8 (side, side), 1 = hole, never empty."""
    image, unit = Image.new("L", (side, side)), side / 256
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.5:
        for _ in range(rng.integers(1, 12)):
            x, y = rng.uniform(0, side, 2)
            brush = max(1, round(rng.uniform(5, 24) * unit))
            half = brush / 2
            for _ in range(rng.integers(1, 6)):
                angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(10, 70) * unit
                end = [x + length * np.cos(angle), y + length * np.sin(angle)]
                to_x, to_y = np.clip(end, 0, side - 1)
                draw.line([x, y, to_x, to_y], fill=1, width=brush)
                draw.ellipse([to_x - half, to_y - half, to_x + half, to_y + half], fill=1)
                x, y = to_x, to_y
    else:
        for _ in range(rng.integers(1, 4)):
            w, h = rng.uniform(30, 100, 2) * unit
            x, y = (rng.uniform(10 * unit, side - 10 * unit - s) for s in (w, h))
            draw.rectangle([x, y, x + w, y + h], fill=1)
    return np.asarray(image)


def draw_masks(side, seeds):
    """One mask per seed, which depends on that seed alone.

    seeds: ints -> float32 (n, 1, side, side) of 0 and 1, 1 = hole.
    """
    masks = [draw_mask(side, np.random.default_rng(int(s))) for s in seeds]
    return torch.from_numpy(np.stack(masks))[:, None].float()
