"""The world `clips`: 1x8x16x16 grey videos of one shape moving in a straight line.

The class fixes the shape and the distribution of its speed, so that a student which draws the right
shapes at the wrong speeds is found out.
"""

import numpy as np
import torch

from models.pictures import tile
from models.worlds.features import FeatureWorld

# class -> share of clips that stand still, lowest and highest speed of the others, pixels per frame
SPEEDS = {
    "disc": (0.0, 0.8, 1.3),
    "ring": (0.0, 0.3, 0.7),
    "square": (0.5, 0.5, 1.1),
    "triangle": (0.25, 0.3, 1.3),
    "plus": (0.5, 0.3, 0.7),
    "bar": (0.0, 0.5, 1.1),
}
MOVING = 0.2  # pixels per frame; slower clips count as still


def shape_distance(kind, x, y, r):
    """Signed distance in pixels to the outline of a shape, negative inside.

    x, y: the point relative to the shape's centre, y down; r: the shape's size. Arrays broadcast.
    """
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
    """One grey shape on a plain darker background, 8 frames of 16x16, at constant velocity.

    The class fixes the shape and the distribution of its speed (SPEEDS). The middle of its path,
    its direction, its size and both greys vary.
    """

    name, shape, num_classes, factors = "clips", (1, 8, 16, 16), len(SPEEDS), 7
    class_names = list(SPEEDS)

    def render(self, label, rng):
        """label (n,) -> float32 (n, 1, 8, 16, 16) in [-1, 1], factors (n, 7).

        The factors, each in about [-1, 1], are the middle of the path x, y, the velocity x, y, the
        size and both greys.
        """
        n = len(label)
        still, low, high = np.array(list(SPEEDS.values()))[label].T
        speed = np.where(rng.uniform(0, 1, n) < still, 0.0, rng.uniform(low, high))
        angle = rng.uniform(0, 2 * np.pi, n)
        v = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)  # (n, 2) pixels per frame
        r = rng.uniform(2.2, 3.2, n)
        # the whole path stays in the picture
        room = np.maximum(0.0, 7.5 - 1.2 * r[:, None] - 3.5 * np.abs(v))
        where = rng.uniform(-1, 1, (n, 2))
        ink, paper = rng.uniform(0.1, 1, n), rng.uniform(-1, -0.4, n)
        middle = 7.5 + where * room
        grid = np.arange(16.0)
        x0 = np.empty((n, 8, 16, 16), np.float32)
        for frame in range(8):
            centre = middle + (frame - 3.5) * v  # (n, 2)
            x = grid[None, None, :] - centre[:, 0, None, None]
            y = grid[None, :, None] - centre[:, 1, None, None]
            for k, kind in enumerate(SPEEDS):
                of = label == k
                distance = shape_distance(kind, x[of], y[of], r[of, None, None])
                cover = np.clip(0.5 - distance, 0, 1)  # (., 16, 16), edges one pixel soft
                x0[of, frame] = paper[of, None, None] + cover * (ink - paper)[of, None, None]
        size = (r - 2.7)[:, None] / 0.5
        greys = [(ink - 0.55)[:, None] / 0.45, (paper + 0.7)[:, None] / 0.3]
        factors = np.concatenate([(middle - 7.5) / 5, v / 1.3, size, *greys], 1)
        return x0[:, None], factors.astype(np.float32)

    def speed(self, x):
        """Distance that the ink's centre of mass travels, in pixels per frame.

        Ink is what is brighter than the background, whose grey is the median of the corners'.
        x (n, 1, 8, 16, 16) -> (n,).
        """
        x = x.float().cpu().clamp(-1, 1)[:, 0]  # (n, 8, 16, 16)
        corners = [x[..., 0, 0], x[..., 0, -1], x[..., -1, 0], x[..., -1, -1]]
        paper = torch.stack(corners, -1).median(-1).values.median(-1).values
        # (n, 8, 16, 16); anything fainter than 0.15 is grain
        ink = (x - paper[:, None, None, None] - 0.15).clamp_min(0)
        total = ink.sum((2, 3)).clamp_min(1e-6)
        grid = torch.arange(16.0)
        centre = torch.stack([(ink * grid).sum((2, 3)), (ink * grid[:, None]).sum((2, 3))], -1)
        centre = centre / total[..., None]  # (n, 8, 2)
        return centre.diff(dim=1).norm(dim=-1).mean(1)

    def measure(self, x, label):
        """The measures of every world and two more.  x (n, 1, 8, 16, 16), label (n,) -> dict.

        motion: mean speed over that of data. moving: share of clips that are faster than MOVING.
        """
        speed = self.speed(x)
        label = None if label is None else label.cpu()
        data = self.speed(self.data(len(x), 123456789, label)[0])
        return {
            **super().measure(x, label),
            "motion": float(speed.mean() / data.mean()),
            "moving": float((speed > MOVING).double().mean()),
        }

    def picture(self, x):
        """Clips (n, 1, T, 16, 16) -> one column per clip, up to four frames from top to bottom."""
        T = x.shape[2]
        frames = np.linspace(0, T - 1, min(4, T)).round().astype(int)
        return np.concatenate([tile(x[:, :, i]) for i in frames])
