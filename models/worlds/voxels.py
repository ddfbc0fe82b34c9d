"""The world `voxels`: 16^3 occupancy of ten parametric solids, for the 3-D method.

x0[n, 0, z, y, x] is in [-1, 1], where -1 is empty and 1 is full, and z points up. The class is the
solid. Its place, its turn about the vertical axis, a slight tilt, its size and two proportions
vary.

A voxel's value falls linearly over one voxel from inside to outside, by the distance from its
centre to the surface, as the edges of the clips do. For flat faces along the grid this is the
covered volume. It costs one evaluation where supersampling needs eight or more, and a flow learns
it better than hard bits, which do not say where between two voxels the surface lies. Measures of
shape threshold at 0, where a voxel is half covered.
"""

import functools

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from models.worlds.features import FeatureWorld

SIDE = 16
# class -> how often it looks the same in a full turn about the vertical axis (0: at any angle)
SOLIDS = {
    "ellipsoid": 2,
    "box": 2,
    "torus": 0,
    "cylinder": 0,
    "cross": 4,
    "stairs": 1,
    "table": 2,
    "chair": 1,
    "cone": 0,
    "arch": 2,
}
# A solid is u (9,) in [-1, 1]: place (x, y, z), turn (periodic), tilt about x and about y, size,
# and two proportions, p and q below.
PARAMETERS = 9
TURN, TILT = 3, 0.15  # the column of u that is periodic; the largest tilt in radians
# Half the thickness of legs and plates in voxels, whatever the size: thinner ones would break up on
# the grid.
THIN = 1.0
AXIS = np.arange(SIDE, dtype=np.float32) - 7.5
# (3, 4096): x, y, z of the centre of each voxel
CENTRES = np.stack(np.meshgrid(AXIS, AXIS, AXIS, indexing="ij")[::-1]).reshape(3, -1)


# ---- solids --------------------------------------------------------------------------------------


def between(u, low, high):
    """Map u in [-1, 1] linearly to [low, high]."""
    return low + (u + 1) / 2 * (high - low)


def half_extents(kind, u):
    """Half the sides of the bounding box along the solid's own axes, in voxels.

    u (n, 9) -> (n, 3) float32.
    """
    p, q, one = u[:, 7], u[:, 8], np.ones(len(u), np.float32)
    x, y, z = {
        "ellipsoid": (5.4 * one, between(p, 3.2, 5.4), between(q, 3.2, 5.4)),
        "box": (4.8 * one, between(p, 2.4, 4.8), between(q, 2.4, 5.4)),
        "torus": (6.3 * one, 6.3 * one, between(q, 1.5, 2.3)),  # p: how much of the radius is tube
        "cylinder": (between(p, 2.6, 5.0), between(p, 2.6, 5.0), between(q, 3.0, 6.2)),
        "cross": (5.4 * one, 5.4 * one, between(q, 4.2, 6.0)),  # p: thickness of the bars
        "stairs": (5.0 * one, between(p, 2.4, 4.4), between(q, 3.6, 5.4)),
        "table": (5.0 * one, between(p, 3.6, 5.0), between(q, 3.6, 5.6)),
        "chair": (4.0 * one, between(p, 3.4, 4.4), 6.3 * one),  # q: height of the seat
        "cone": (between(p, 3.6, 5.6), between(p, 3.6, 5.6), between(q, 4.0, 6.2)),
        "arch": (5.4 * one, between(p, 1.4, 2.8), between(q, 5.0, 6.2)),
    }[kind]
    return between(u[:, 6], 0.8, 1.0)[:, None] * np.stack([x, y, z], 1)


def box(x, y, z, hx, hy, hz):
    """Negative inside a box about the origin; in front of a face it is the distance to that face.

    x, y, z: the point; hx, hy, hz: half the sides. Arrays broadcast.
    """
    return np.maximum(np.maximum(np.abs(x) - hx, np.abs(y) - hy), np.abs(z) - hz)


def signed_distance(kind, x, y, z, h, u):
    """Signed distance in voxels to the surface, negative inside; far from it only a bound.

    x, y, z (n, 4096): points along the solid's own axes; h (n, 3): its half extents; u (n, 9)
    -> (n, 4096).
    """
    hx, hy, hz = h[:, 0, None], h[:, 1, None], h[:, 2, None]
    p, q = u[:, 7, None], u[:, 8, None]
    if kind == "ellipsoid":
        k = np.sqrt((x / hx) ** 2 + (y / hy) ** 2 + (z / hz) ** 2)
        slope = np.sqrt((x / hx**2) ** 2 + (y / hy**2) ** 2 + (z / hz**2) ** 2)
        return k * (k - 1) / np.maximum(slope, 1e-6)
    if kind == "box":
        return box(x, y, z, hx, hy, hz)
    if kind == "torus":
        tube = between(p, 0.21, 0.3) * hx
        return np.sqrt((np.sqrt(x**2 + y**2) - (hx - tube)) ** 2 + (z * tube / hz) ** 2) - tube
    if kind == "cylinder":
        return np.maximum(np.sqrt(x**2 + y**2) - hx, np.abs(z) - hz)
    if kind == "cross":
        bar = between(p, THIN, 1.8)
        flat = np.minimum(box(x, y, z, hx, bar, bar), box(x, y, z, bar, hy, bar))
        return np.minimum(flat, box(x, y, z, bar, bar, hz))
    if kind == "stairs":  # three steps, the highest at x = hx
        steps = [
            box(x - i / 3 * hx, y, z - (i - 2) / 3 * hz, (3 - i) / 3 * hx, hy, (i + 1) / 3 * hz)
            for i in range(3)
        ]
        return np.minimum(np.minimum(steps[0], steps[1]), steps[2])
    if kind == "table":
        legs = box(np.abs(x) - hx + THIN, np.abs(y) - hy + THIN, z, THIN, THIN, hz)
        return np.minimum(legs, box(x, y, z - hz + THIN, hx, hy, THIN))
    if kind == "chair":  # the back at x = -hx
        seat = between(q, -0.25, 0.1) * hz
        x_leg, y_leg = np.abs(x) - hx + THIN, np.abs(y) - hy + THIN
        legs = box(x_leg, y_leg, z - (seat - hz) / 2, THIN, THIN, (seat + hz) / 2)
        back = box(x + hx - THIN, y, z - (seat + hz) / 2, THIN, hy, (hz - seat) / 2)
        return np.minimum(np.minimum(legs, back), box(x, y, z - seat, hx, hy, THIN))
    if kind == "cone":  # its tip is cut off where it is THIN
        r, fall = np.sqrt(x**2 + y**2), (hx - THIN) / (2 * hz)
        return np.maximum((r - THIN - fall * (hz - z)) / np.sqrt(1 + fall**2), np.abs(z) - hz)
    opening = 0.55 * hx  # arch: half the width of the doorway, round on top
    inside = np.sqrt(x**2 + np.maximum(z - (hz - opening - 2 * THIN), 0) ** 2) - opening
    return np.maximum(box(x, y, z, hx, hy, hz), -inside)


def rotate(axis, angle):
    """Rotation matrices about the axis x, y or z (0, 1, 2).  angle (n,) in radians -> (n, 3, 3)."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.tile(np.eye(3, dtype=angle.dtype), (len(angle), 1, 1))
    matrix[:, i, i] = matrix[:, j, j] = np.cos(angle)
    matrix[:, j, i] = np.sin(angle)
    matrix[:, i, j] = -np.sin(angle)
    return matrix


def pose(kind, u):
    """Where the solids are.  u (n, 9) -> half extents (n, 3), rotation (n, 3, 3), centre (n, 3).

    The rotation takes the solid's axes to the grid's; the centre keeps the solid inside the grid.
    """
    h = half_extents(kind, u)
    turn, about_x, about_y = np.pi * u[:, TURN], TILT * u[:, 4], TILT * u[:, 5]
    rotation = rotate(1, about_y) @ rotate(0, about_x) @ rotate(2, turn)
    # what the rotated bounding box leaves free on either side, (n, 3)
    room = np.maximum(0, 7.8 - (np.abs(rotation) @ h[:, :, None])[:, :, 0])
    return h, rotation, u[:, :3] * room


def occupancy(kind, u, batch=32):
    """Covered share of each voxel.  u (n, 9) float32 -> (n, 4096) float32 in [0, 1].

    Computed `batch` solids at a time, which stay in the processor's cache.
    """
    u = u.astype(np.float32)
    out = np.empty((len(u), SIDE**3), np.float32)
    for i in range(0, len(u), batch):
        h, rotation, centre = pose(kind, u[i : i + batch])
        own = np.swapaxes(rotation, 1, 2) @ (CENTRES - centre[:, :, None])  # (batch, 3, 4096)
        x, y, z = own[:, 0], own[:, 1], own[:, 2]
        distance = signed_distance(kind, x, y, z, h, u[i : i + batch])
        out[i : i + batch] = np.clip(0.5 - distance, 0, 1)
    return out


def fit(kind, target, u, rounds=6):
    """Fit the parameters to a target's occupancy, in least squares, by Levenberg-Marquardt.

    target (n, 4096) in [0, 1], u (n, 9) to start from -> u (n, 9), which never fits worse than the
    start.
    """
    damping, step = np.full(len(u), 1.0), 0.02
    now = occupancy(kind, u)
    for _ in range(rounds):
        slopes = [(occupancy(kind, u + step * e) - now) / step for e in np.eye(PARAMETERS)]
        slope = np.stack(slopes, 1)  # (n, 9, 4096)
        residual = target - now
        normal = slope @ np.swapaxes(slope, 1, 2) + damping[:, None, None] * np.eye(PARAMETERS)
        moved = u + np.linalg.solve(normal, slope @ residual[:, :, None])[:, :, 0]
        moved = np.where(np.arange(PARAMETERS) == TURN, moved, moved.clip(-1, 1))
        there = occupancy(kind, moved)
        better = ((target - there) ** 2).sum(1) < (residual**2).sum(1)
        u, now = np.where(better[:, None], moved, u), np.where(better[:, None], there, now)
        damping = np.where(better, damping / 4, damping * 8)
    return u


# ---- measures ------------------------------------------------------------------------------------


def overlap(a, b):
    """Intersection over union of sets of voxels, 0 where both are empty.

    a, b (n, 4096) bool -> (n,).
    """
    return (a & b).sum(1) / np.maximum((a | b).sum(1), 1)


def connected(full):
    """Whether the occupied voxels are one piece, joined by faces, edges or corners.

    A flood from the first occupied voxel must reach all.  full (n, 16, 16, 16) bool -> (n,) bool,
    False for an empty grid.
    """
    flat = full.reshape(len(full), -1)
    flood = np.zeros_like(flat)
    flood[np.arange(len(full)), flat.argmax(1)] = flat.any(1)
    flood = flood.reshape(full.shape)
    reached = -1
    while reached != flood.sum():
        reached = flood.sum()
        for axis in (1, 2, 3):  # spread by one voxel along each axis, then keep what is occupied
            lower = (slice(None),) * axis + (slice(None, -1),)
            upper = (slice(None),) * axis + (slice(1, None),)
            before = flood.copy()
            flood[upper] |= before[lower]
            flood[lower] |= before[upper]
        flood &= full
    return flat.any(1) & (flood == full).reshape(len(full), -1).all(1)


def voxel_patches(x, size=4, per_item=8, seed=0):
    """Random size^3 patches, their mean subtracted.

    x (n, 1, 16, 16, 16) -> (n * per_item, size^3).
    """
    g = torch.Generator().manual_seed(seed)
    # (n, 13, 13, 13, size, size, size)
    windows = x[:, 0].unfold(1, size, 1).unfold(2, size, 1).unfold(3, size, 1)
    at = torch.randint(0, windows.shape[1], (per_item, 3, len(x)), generator=g)
    p = torch.cat([windows[torch.arange(len(x)), i, j, k] for i, j, k in at]).flatten(1)
    return p - p.mean(1, keepdim=True)


class Classifier(nn.Module):
    """The classifier of worlds/features.py with convolutions over three axes."""

    def __init__(self, num_classes, factors):
        super().__init__()
        self.conv1 = nn.Conv3d(1, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv3d(16, 24, 3, padding=1)
        self.conv3 = nn.Conv3d(24, 40, 3, stride=2, padding=1)
        self.conv4 = nn.Conv3d(40, 48, 3, stride=2, padding=1)
        self.features = nn.Linear(48 * 8, 128)
        self.classes = nn.Linear(128, num_classes)
        self.factors = nn.Linear(128, factors)

    def forward(self, x):
        """x (B, 1, 16, 16, 16) in [-1, 1] -> features (B, 128), class logits, factors."""
        h = F.silu(self.conv2(F.silu(self.conv1(x))))  # (B, 24, 8, 8, 8)
        h = F.silu(self.conv4(F.silu(self.conv3(h))))  # (B, 48, 2, 2, 2)
        f = F.silu(self.features(h.flatten(1)))
        return f, self.classes(f), self.factors(f)


# ---- pictures ------------------------------------------------------------------------------------


@functools.cache
def rays(side):
    """The voxels that each of side^2 parallel rays enters, nearest first, seen from above a corner.

    -> voxel (side^2, 48) in 0..4095, or 4096 outside the grid; face (side^2, 48), the face by which
    the ray enters it: 0, 1, 2 for a face towards x, y, z.
    """
    forward = -np.array([0.74, 0.52, 0.6])  # the eye is at positive x, y and z
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    at = (np.arange(side) + 0.5) / side * 26.4 - 13.2  # voxels: a full grid just fits
    start = (at[None, :, None] * right - at[:, None, None] * up).reshape(-1, 3)
    start = start - 20 * forward  # (side^2, 3)
    planes = np.arange(SIDE + 1) - 8.0
    # (side^2, 3, 16): the plane on the far side of the grid is no entrance
    when = ((planes - start[:, :, None]) / forward[:, None])[:, :, 1:]
    order = when.reshape(len(start), -1).argsort(1)
    face, when = order // SIDE, np.take_along_axis(when.reshape(len(start), -1), order, 1)
    # (side^2, 48, 3): x, y, z of the voxel just behind the plane
    inside = np.floor(start[:, None] + (when[:, :, None] + 1e-4) * forward + 8).astype(int)
    voxel = (inside[..., 2] * SIDE + inside[..., 1]) * SIDE + inside[..., 0]
    return np.where(((inside >= 0) & (inside < SIDE)).all(-1), voxel, SIDE**3), face


def render_solids(full, side=96, fine=2):
    """Shaded cubes seen from above a corner, each pixel the mean of fine^2 rays.

    full (n, 4096) bool -> (n, side, side, 3) uint8.
    """
    voxel, face = rays(side * fine)
    n = len(full)
    hit = np.concatenate([full, np.zeros((n, 1), bool)], 1)[:, voxel]  # (n, pixels, 48)
    first, seen = hit.argmax(2), hit.any(2)
    pixel = np.arange(len(voxel))
    what = np.where(seen, voxel[pixel, first] * 3 + face[pixel, first], -1)
    what = what.reshape(n, side * fine, side * fine)  # which face of which cube
    shade = np.array([0.62, 0.4, 0.97])[what % 3]  # faces towards x, y, up
    edge = np.zeros(what.shape, bool)
    edge[:, 1:] |= what[:, 1:] != what[:, :-1]
    edge[:, :, 1:] |= what[:, :, 1:] != what[:, :, :-1]
    shade = np.where(edge, 0.86 * shade, shade)
    cubes = shade[..., None] * np.array([150, 190, 235]) + 12
    colour = np.where((what >= 0)[..., None], cubes, 255)
    return colour.reshape(n, side, fine, side, fine, 3).mean((2, 4)).round().astype(np.uint8)


# ---- the world -----------------------------------------------------------------------------------


class Voxels(FeatureWorld):
    """One solid in a grid of 16 x 16 x 16 voxels."""

    name, shape, num_classes, factors = "voxels", (1, SIDE, SIDE, SIDE), len(SOLIDS), 10
    class_names = list(SOLIDS)
    video = False  # five axes with the batch, and yet no frames

    def new_classifier(self):
        """The classifier, untrained."""
        return Classifier(self.num_classes, self.factors)

    def render(self, label, rng):
        """label (n,) -> float32 (n, 1, 16, 16, 16) in [-1, 1], factors (n, 10) of about unit size.

        The factors are the centre x, y, z, both tilts, the size, both proportions, and the turn as
        a point on a circle. It goes round as often as the solid looks the same in a full turn.
        """
        u = rng.uniform(-1, 1, (len(label), PARAMETERS)).astype(np.float32)
        x0 = np.empty((len(u), SIDE**3), np.float32)
        factors = np.empty((len(u), self.factors), np.float32)
        for k, (kind, fold) in enumerate(SOLIDS.items()):
            of = np.flatnonzero(label == k)
            for i in np.array_split(of, 1 + len(of) // 1000):
                x0[i] = 2 * occupancy(kind, u[i]) - 1
            turn = fold * np.pi * u[of, TURN, None]
            centre = pose(kind, u[of])[2]
            factors[of] = np.concatenate([centre / 3, u[of, 4:], np.cos(turn), np.sin(turn)], 1)
        return x0.reshape(len(u), *self.shape), factors

    def patches(self, x, seed):
        """Small patches that show grain.  x (n, 1, 16, 16, 16) -> (m, 64)."""
        return voxel_patches(x, seed=seed)

    @functools.cached_property
    def bank(self):
        """Solids from which fits start, by class: u (K, 3000, 9) and full (K, 3000, 4096) bool."""
        rng = np.random.default_rng(20)
        u = rng.uniform(-1, 1, (self.num_classes, 3000, PARAMETERS)).astype(np.float32)
        return u, np.stack([occupancy(kind, u[k]) > 0.5 for k, kind in enumerate(SOLIDS)])

    def nearest(self, x, label, starts=4):
        """Overlap of each sample with the solid of its class that meets it best.

        The `starts` solids of the bank with the largest overlap are fitted to the sample, and the
        best of all counts.  x (n, *shape), label (n,) -> intersection over union (n,).
        """
        x = x.float().cpu().clamp(-1, 1).flatten(1).numpy()
        full, label, best = x > 0, label.cpu().numpy(), np.zeros(len(x))
        for k, kind in enumerate(SOLIDS):
            of = np.flatnonzero(label == k)
            u, solids = self.bank[0][k], self.bank[1][k].astype(np.float32)
            both = full[of].astype(np.float32) @ solids.T  # (n, 3000) voxels in common
            iou = both / np.maximum(full[of].sum(1)[:, None] + solids.sum(1) - both, 1)
            for i in np.argsort(-iou, 1)[:, :starts].T:
                fitted = fit(kind, (x[of] + 1) / 2, u[i])
                iou_fitted = overlap(occupancy(kind, fitted) > 0.5, full[of])
                iou_start = iou[np.arange(len(of)), i]
                best[of] = np.maximum(best[of], np.maximum(iou_fitted, iou_start))
        return best

    def measure(self, x, label):
        """The measures of every world and two more.  x (n, *shape), label (n,) -> dict.

        iou: mean overlap with the nearest solid of the class, over the first 500 samples.
        connected: share of samples that are one piece.
        """
        full = (x.float().cpu() > 0)[:, 0].numpy()
        found = super().measure(x, label)
        if label is not None:
            found["iou"] = float(self.nearest(x[:500], label[:500]).mean())
        return {**found, "connected": float(connected(full).mean())}

    def picture(self, x):
        """Solids (n, 1, 16, 16, 16) side by side, full where x > 0.  -> (96, 96 n, 3) uint8."""
        return np.concatenate(list(render_solids((x.float().cpu() > 0).flatten(1).numpy())), 1)
