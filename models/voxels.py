"""The embedded world `voxels`: 16^3 occupancy of ten parametric solids, what the 3-D method distils with nothing to download.

x0[n, 0, z, y, x] in [-1, 1]: -1 empty, 1 full, z up. The class is the solid; place, turn about the vertical axis, a slight tilt, size and two
proportions vary. A voxel's value falls linearly over one voxel from inside to outside, by the distance from its centre to the surface, as the
clips' edges do: for flat faces that is the covered volume, it costs one evaluation where supersampling needs eight or more, and a flow learns
it better than hard bits, which say nothing of where between two voxels the surface lies. Measures of shape threshold at 0, half covered.
"""
import functools

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from models.toy import FeatureWorld

SIDE = 16
# class -> by which part of a full turn about the vertical axis it looks the same (0: by any)
SOLIDS = {"ellipsoid": 2, "box": 2, "torus": 0, "cylinder": 0, "cross": 4, "stairs": 1, "table": 2, "chair": 1, "cone": 0, "arch": 2}
PARAMETERS = 9  # a solid is u (9,) in [-1, 1]: place (x, y, z), turn (periodic), tilt about x and about y, size, two proportions
TURN, TILT = 3, 0.15  # the column of u that is periodic; largest tilt in radians
THIN = 1.0  # voxels, half the thickness of legs and plates, whatever the size: thinner ones would break up on the grid
CENTRES = np.stack(np.meshgrid(*[np.arange(SIDE, dtype=np.float32) - 7.5] * 3, indexing="ij")[::-1]).reshape(3, -1)  # (3, 4096): x, y, z of each voxel


# ---- solids ------------------------------------------------------------------------------------------------------


def between(u, low, high):
    """u in [-1, 1] -> [low, high]."""
    return low + (u + 1) / 2 * (high - low)


def half_extents(kind, u):
    """Half of the bounding box along the solid's own axes, in voxels.  u (n, 9) -> (n, 3) float32."""
    p, q, one = u[:, 7], u[:, 8], np.ones(len(u), np.float32)
    x, y, z = {"ellipsoid": (5.4 * one, between(p, 3.2, 5.4), between(q, 3.2, 5.4)),
               "box": (4.8 * one, between(p, 2.4, 4.8), between(q, 2.4, 5.4)),
               "torus": (6.3 * one, 6.3 * one, between(q, 1.5, 2.3)),  # p: how much of the radius is tube
               "cylinder": (between(p, 2.6, 5.0), between(p, 2.6, 5.0), between(q, 3.0, 6.2)),
               "cross": (5.4 * one, 5.4 * one, between(q, 4.2, 6.0)),  # p: thickness of the bars
               "stairs": (5.0 * one, between(p, 2.4, 4.4), between(q, 3.6, 5.4)),
               "table": (5.0 * one, between(p, 3.6, 5.0), between(q, 3.6, 5.6)),
               "chair": (4.0 * one, between(p, 3.4, 4.4), 6.3 * one),  # q: height of the seat
               "cone": (between(p, 3.6, 5.6), between(p, 3.6, 5.6), between(q, 4.0, 6.2)),
               "arch": (5.4 * one, between(p, 1.4, 2.8), between(q, 5.0, 6.2))}[kind]
    return between(u[:, 6], 0.8, 1.0)[:, None] * np.stack([x, y, z], 1)


def box(x, y, z, hx, hy, hz):
    """Negative inside a box about the origin; in front of a face it is the distance to it."""
    return np.maximum(np.maximum(np.abs(x) - hx, np.abs(y) - hy), np.abs(z) - hz)


def signed_distance(kind, x, y, z, h, u):
    """Distance in voxels to the surface, negative inside (near the surface; elsewhere a bound).  x, y, z (n, 4096) along the solid's own axes, its half
    extents h (n, 3), u (n, 9) -> (n, 4096)."""
    hx, hy, hz = h[:, 0, None], h[:, 1, None], h[:, 2, None]
    p, q = u[:, 7, None], u[:, 8, None]
    if kind == "ellipsoid":
        k = np.sqrt((x / hx) ** 2 + (y / hy) ** 2 + (z / hz) ** 2)
        return k * (k - 1) / np.maximum(np.sqrt((x / hx**2) ** 2 + (y / hy**2) ** 2 + (z / hz**2) ** 2), 1e-6)
    if kind == "box":
        return box(x, y, z, hx, hy, hz)
    if kind == "torus":
        tube = between(p, 0.21, 0.3) * hx
        return np.sqrt((np.sqrt(x**2 + y**2) - (hx - tube)) ** 2 + (z * tube / hz) ** 2) - tube
    if kind == "cylinder":
        return np.maximum(np.sqrt(x**2 + y**2) - hx, np.abs(z) - hz)
    if kind == "cross":
        bar = between(p, THIN, 1.8)
        return np.minimum(np.minimum(box(x, y, z, hx, bar, bar), box(x, y, z, bar, hy, bar)), box(x, y, z, bar, bar, hz))
    if kind == "stairs":  # three steps, the highest at x = hx
        steps = [box(x - i / 3 * hx, y, z - (i - 2) / 3 * hz, (3 - i) / 3 * hx, hy, (i + 1) / 3 * hz) for i in range(3)]
        return np.minimum(np.minimum(steps[0], steps[1]), steps[2])
    if kind == "table":
        legs = box(np.abs(x) - hx + THIN, np.abs(y) - hy + THIN, z, THIN, THIN, hz)
        return np.minimum(legs, box(x, y, z - hz + THIN, hx, hy, THIN))
    if kind == "chair":  # the back at x = -hx
        seat = between(q, -0.25, 0.1) * hz
        legs = box(np.abs(x) - hx + THIN, np.abs(y) - hy + THIN, z - (seat - hz) / 2, THIN, THIN, (seat + hz) / 2)
        back = box(x + hx - THIN, y, z - (seat + hz) / 2, THIN, hy, (hz - seat) / 2)
        return np.minimum(np.minimum(legs, back), box(x, y, z - seat, hx, hy, THIN))
    if kind == "cone":  # its tip is cut off where it is THIN
        r, fall = np.sqrt(x**2 + y**2), (hx - THIN) / (2 * hz)
        return np.maximum((r - THIN - fall * (hz - z)) / np.sqrt(1 + fall**2), np.abs(z) - hz)
    opening = 0.55 * hx  # arch: half the width of the doorway, round on top
    inside = np.sqrt(x**2 + np.maximum(z - (hz - opening - 2 * THIN), 0) ** 2) - opening
    return np.maximum(box(x, y, z, hx, hy, hz), -inside)


def pose(kind, u):
    """-> half extents (n, 3), rotation (n, 3, 3) from the solid's axes to the grid's, centre (n, 3) such that the solid stays inside the grid."""
    n, h = len(u), half_extents(kind, u)
    turn, about_x, about_y = np.pi * u[:, TURN], TILT * u[:, 4], TILT * u[:, 5]
    zero, one = np.zeros(n, np.float32), np.ones(n, np.float32)
    matrix = lambda *rows: np.stack(rows, 1).reshape(n, 3, 3)  # noqa: E731
    rotation = (matrix(np.cos(about_y), zero, np.sin(about_y), zero, one, zero, -np.sin(about_y), zero, np.cos(about_y))
                @ matrix(one, zero, zero, zero, np.cos(about_x), -np.sin(about_x), zero, np.sin(about_x), np.cos(about_x))
                @ matrix(np.cos(turn), -np.sin(turn), zero, np.sin(turn), np.cos(turn), zero, zero, zero, one))
    room = np.maximum(0, 7.8 - (np.abs(rotation) @ h[:, :, None])[:, :, 0])  # (n, 3): what the turned bounding box leaves
    return h, rotation, u[:, :3] * room


def occupancy(kind, u, batch=32):
    """Covered share of each voxel.  u (n, 9) float32 -> (n, 4096) float32 in [0, 1]; small batches stay in the processor's cache."""
    u = u.astype(np.float32)
    out = np.empty((len(u), SIDE**3), np.float32)
    for i in range(0, len(u), batch):
        h, rotation, centre = pose(kind, u[i:i + batch])
        own = np.swapaxes(rotation, 1, 2) @ (CENTRES - centre[:, :, None])  # (batch, 3, 4096)
        out[i:i + batch] = np.clip(0.5 - signed_distance(kind, own[:, 0], own[:, 1], own[:, 2], h, u[i:i + batch]), 0, 1)
    return out


def fit(kind, target, u, rounds=6):
    """Levenberg-Marquardt on the parameters, so that the solid's occupancy meets the target's in least squares.
    target (n, 4096) in [0, 1], u (n, 9) to start from -> u (n, 9)."""
    damping, step = np.full(len(u), 1.0), 0.02
    now = occupancy(kind, u)
    for _ in range(rounds):
        slope = np.stack([(occupancy(kind, u + step * e) - now) / step for e in np.eye(PARAMETERS)], 1)  # (n, 9, 4096)
        residual = target - now
        normal = slope @ np.swapaxes(slope, 1, 2) + damping[:, None, None] * np.eye(PARAMETERS)
        moved = u + np.linalg.solve(normal, slope @ residual[:, :, None])[:, :, 0]
        moved = np.where(np.arange(PARAMETERS) == TURN, moved, moved.clip(-1, 1))
        there = occupancy(kind, moved)
        better = ((target - there) ** 2).sum(1) < (residual**2).sum(1)
        u, now = np.where(better[:, None], moved, u), np.where(better[:, None], there, now)
        damping = np.where(better, damping / 4, damping * 8)
    return u


# ---- measures ----------------------------------------------------------------------------------------------------


def overlap(a, b):
    """Intersection over union of two sets of voxels, 0 where either is empty.  a, b (n, 4096) bool -> (n,)."""
    return (a & b).sum(1) / np.maximum((a | b).sum(1), 1)


def connected(full):
    """Whether the occupied voxels are one piece, joined by faces, edges or corners: a flood from the first of them reaches all.
    full (n, 16, 16, 16) bool -> (n,) bool."""
    flat = full.reshape(len(full), -1)
    flood = np.zeros_like(flat)
    flood[np.arange(len(full)), flat.argmax(1)] = flat.any(1)
    flood = flood.reshape(full.shape)
    reached = -1
    while reached != (reached := flood.sum()):
        for axis in (1, 2, 3):  # one voxel further along each axis, then only what is occupied
            lower, upper = (tuple([slice(None)] * axis + [s]) for s in (slice(None, -1), slice(1, None)))
            before = flood.copy()
            flood[upper] |= before[lower]
            flood[lower] |= before[upper]
        flood &= full
    return flat.any(1) & (flood == full).reshape(len(full), -1).all(1)


def voxel_patches(x, size=4, per_item=8, seed=0):
    """Random size^3 patches with their mean taken out.  x (n, 1, 16, 16, 16) -> (n * per_item, size^3)."""
    g = torch.Generator().manual_seed(seed)
    windows = x[:, 0].unfold(1, size, 1).unfold(2, size, 1).unfold(3, size, 1)  # (n, 13, 13, 13, size, size, size)
    at = torch.randint(0, windows.shape[1], (per_item, 3, len(x)), generator=g)
    p = torch.cat([windows[torch.arange(len(x)), i, j, k] for i, j, k in at]).flatten(1)
    return p - p.mean(1, keepdim=True)


class Classifier(nn.Module):
    """As models/toy.py's, with convolutions over three axes."""

    def __init__(self, num_classes, factors):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv3d(1, 16, 3, stride=2, padding=1), nn.Conv3d(16, 24, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv3d(24, 40, 3, stride=2, padding=1), nn.Conv3d(40, 48, 3, stride=2, padding=1)
        self.features = nn.Linear(48 * 8, 128)
        self.classes, self.factors = nn.Linear(128, num_classes), nn.Linear(128, factors)

    def forward(self, x):
        """x (B, 1, 16, 16, 16) in [-1, 1] -> features (B, 128), class logits, factors."""
        h = F.silu(self.conv2(F.silu(self.conv1(x))))  # (B, 24, 8, 8, 8)
        h = F.silu(self.conv4(F.silu(self.conv3(h))))  # (B, 48, 2, 2, 2)
        f = F.silu(self.features(h.flatten(1)))
        return f, self.classes(f), self.factors(f)


# ---- pictures ----------------------------------------------------------------------------------------------------


@functools.cache
def rays(side):
    """For each of side^2 parallel rays, seen from above a corner: the voxels it enters, nearest first, and the face it enters each by.

    -> voxel (side^2, 48) in 0..4095, or 4096 outside the grid; face (side^2, 48): 0, 1, 2 for a face towards x, y, z.
    """
    forward = -np.array([0.74, 0.52, 0.6])  # the eye is at positive x, y and z
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    at = (np.arange(side) + 0.5) / side * 26.4 - 13.2  # voxels: a full grid just fits
    start = (at[None, :, None] * right - at[:, None, None] * up).reshape(-1, 3) - 20 * forward  # (side^2, 3)
    planes = np.arange(SIDE + 1) - 8.0
    when = ((planes - start[:, :, None]) / forward[:, None])[:, :, 1:]  # (side^2, 3, 16): the far side of the grid is no entrance
    order = when.reshape(len(start), -1).argsort(1)
    face, when = order // SIDE, np.take_along_axis(when.reshape(len(start), -1), order, 1)
    inside = np.floor(start[:, None] + (when[:, :, None] + 1e-4) * forward + 8).astype(int)  # (side^2, 48, 3): x, y, z just behind the plane
    voxel = (inside[..., 2] * SIDE + inside[..., 1]) * SIDE + inside[..., 0]
    return np.where(((inside >= 0) & (inside < SIDE)).all(-1), voxel, SIDE**3), face


def render_solids(full, side=96, fine=2):
    """Shaded cubes, seen from above a corner.  full (n, 4096) bool -> (n, side, side, 3) uint8."""
    voxel, face = rays(side * fine)
    n = len(full)
    hit = np.concatenate([full, np.zeros((n, 1), bool)], 1)[:, voxel]  # (n, pixels, 48)
    first, seen = hit.argmax(2), hit.any(2)
    pixel = np.arange(len(voxel))
    what = np.where(seen, voxel[pixel, first] * 3 + face[pixel, first], -1).reshape(n, side * fine, side * fine)  # which face of which cube
    shade = np.array([0.62, 0.4, 0.97])[what % 3]  # faces towards x, y, up
    edge = np.zeros(what.shape, bool)
    edge[:, 1:] |= what[:, 1:] != what[:, :-1]
    edge[:, :, 1:] |= what[:, :, 1:] != what[:, :, :-1]
    shade = np.where(edge, 0.86 * shade, shade)
    colour = np.where((what >= 0)[..., None], shade[..., None] * np.array([150, 190, 235]) + 12, 255)
    return colour.reshape(n, side, fine, side, fine, 3).mean((2, 4)).round().astype(np.uint8)


# ---- the world ---------------------------------------------------------------------------------------------------


class Voxels(FeatureWorld):
    name, shape, num_classes, factors = "voxels", (1, SIDE, SIDE, SIDE), len(SOLIDS), 10
    class_names = list(SOLIDS)
    video = False  # five axes, and yet no frames

    def new_classifier(self):
        return Classifier(self.num_classes, self.factors)

    def render(self, label, rng):
        """label (n,) -> float32 (n, 1, 16, 16, 16), factors (n, 10): centre x, y, z, both tilts, size, both proportions, and the turn as a point on
        a circle that it goes round as often as the solid looks the same in a full turn; each of about unit size."""
        u = rng.uniform(-1, 1, (len(label), PARAMETERS)).astype(np.float32)
        x0, factors = np.empty((len(u), SIDE**3), np.float32), np.empty((len(u), self.factors), np.float32)
        for k, (kind, fold) in enumerate(SOLIDS.items()):
            of = np.flatnonzero(label == k)
            for i in np.array_split(of, 1 + len(of) // 1000):
                x0[i] = 2 * occupancy(kind, u[i]) - 1
            turn = fold * np.pi * u[of, TURN, None]
            factors[of] = np.concatenate([pose(kind, u[of])[2] / 3, u[of, 4:], np.cos(turn), np.sin(turn)], 1)
        return x0.reshape(len(u), *self.shape), factors

    def patches(self, x, seed):
        return voxel_patches(x, seed=seed)

    @functools.cached_property
    def bank(self):
        """Solids to start fits from, class by class -> u (K, 3000, 9), which voxels they fill (K, 3000, 4096) bool."""
        u = np.random.default_rng(20).uniform(-1, 1, (self.num_classes, 3000, PARAMETERS)).astype(np.float32)
        return u, np.stack([occupancy(kind, u[k]) > 0.5 for k, kind in enumerate(SOLIDS)])

    def nearest(self, x, label, starts=4):
        """The solid of the sample's class that meets it best: the bank's best by overlap, then fitted.  x (n, *shape), label (n,) -> IoU (n,)."""
        x = x.float().cpu().clamp(-1, 1).flatten(1).numpy()
        full, label, best = x > 0, label.cpu().numpy(), np.zeros(len(x))
        for k, kind in enumerate(SOLIDS):
            of = np.flatnonzero(label == k)
            u, solids = self.bank[0][k], self.bank[1][k].astype(np.float32)
            both = full[of].astype(np.float32) @ solids.T  # (n, 3000) voxels in common
            iou = both / np.maximum(full[of].sum(1)[:, None] + solids.sum(1) - both, 1)
            for i in np.argsort(-iou, 1)[:, :starts].T:
                fitted = fit(kind, (x[of] + 1) / 2, u[i])
                best[of] = np.maximum(best[of], np.maximum(overlap(occupancy(kind, fitted) > 0.5, full[of]), iou[np.arange(len(of)), i]))
        return best

    def measure(self, x, label):
        """The measures of every world, and: iou, mean overlap with the nearest solid of the class, of 500 samples at most; connected, share in one piece."""
        full = (x.float().cpu() > 0)[:, 0].numpy()
        return {**super().measure(x, label), "iou": float(self.nearest(x[:500], label[:500]).mean()), "connected": float(connected(full).mean())}

    def picture(self, x):
        """Solids (n, 1, 16, 16, 16) side by side, full where x > 0.  -> (96, 96 n, 3) uint8."""
        return np.concatenate(list(render_solids((x.float().cpu() > 0).flatten(1).numpy())), 1)
