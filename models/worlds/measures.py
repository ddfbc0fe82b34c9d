"""Distances between sets of samples, which may be points, features or patches, as Python floats.

They compute in float64. What the worlds' measures share besides is here too: the noise under which
log p is read, the diversity within classes, and how patches are cut out of images.
"""

import torch
import torch.nn.functional as F

# Clean classes do not overlap, so log p(c | x) of a clean sample is 0 whatever it looks like. How
# sharply a sample shows its class is therefore read after adding noise of this standard deviation.
BLUR = 0.5


def frechet_distance(mean1, cov1, mean2, cov2):
    """Squared Wasserstein-2 distance of two Gaussians, as in FID (1706.08500).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2).  means (d,), covariances (d, d) -> float.
    """
    w, q = torch.linalg.eigh(cov1.double())
    root = (q * w.clamp_min(0).sqrt()) @ q.T  # symmetric square root of C1
    cross = torch.linalg.eigvalsh(root @ cov2.double() @ root).clamp_min(0).sqrt().sum()
    between = (mean1 - mean2).double().square().sum()
    return float(between + cov1.double().trace() + cov2.double().trace() - 2 * cross)


def moments_distance(a, b):
    """Mean Fréchet distance over groups.  a, b: pairs (means (G, d), covs (G, d, d)) -> float."""
    return sum(frechet_distance(*group) for group in zip(*a, *b, strict=True)) / len(a[0])


def sliced_wasserstein(a, b, directions=128, seed=0):
    """Sliced Wasserstein-2 distance of two equally large sets of points.

    It is the root mean square over random directions, fixed by the seed.  a, b (n, d) -> float.
    """
    g = torch.Generator().manual_seed(seed)
    unit = torch.randn(a.shape[1], directions, generator=g, dtype=torch.float64)
    unit = unit / unit.norm(dim=0)
    pa, pb = (x.double() @ unit for x in (a, b))  # (n, directions)
    return float((pa.sort(0).values - pb.sort(0).values).square().mean().sqrt())


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'|, which is zero on average for equal distributions.

    a (n, d), b (m, d) -> float.
    """
    a, b = a.double(), b.double()
    return float(2 * torch.cdist(a, b).mean() - torch.pdist(a).mean() - torch.pdist(b).mean())


def blurred(x):
    """x + BLUR eps, with the same eps whenever the shape is the same."""
    return x + BLUR * torch.randn(x.shape, generator=torch.Generator().manual_seed(11)).to(x)


def pairwise_diversity(features, label, num_classes):
    """Mean pairwise distance of features within each class, 0 for a class of one sample or none.

    features (n, d), label (n,) -> (num_classes,) float64.
    """
    out = torch.zeros(num_classes, dtype=torch.float64)
    for k in range(num_classes):
        f = features[label == k].double()
        out[k] = torch.pdist(f).mean() if len(f) > 1 else 0.0
    return out


def balanced_labels(n, num_classes):
    """n labels, each class equally often: 0, 1, ..., K - 1, 0, 1, ...  (n,) int64."""
    return torch.arange(n) % num_classes


def image_patches(x, size=4, per_image=8, seed=0):
    """Random size x size patches, each channel's mean subtracted.

    Without its mean, a patch of a plain area shows its grain and not its colour. Frames of a video
    count as channels.  x (n, C, [T,] H, W) -> (n * per_image, C * [T *] size * size).
    """
    g = torch.Generator().manual_seed(seed)
    x = x.flatten(1, -3)
    n, C, H, W = x.shape
    windows = x.unfold(2, size, 1).unfold(3, size, 1)  # (n, C, H', W', size, size)
    i, j = (torch.randint(0, L - size + 1, (per_image, n), generator=g) for L in (H, W))
    picked = [windows[torch.arange(n), :, a, b] for a, b in zip(i, j, strict=True)]
    p = torch.cat(picked)  # (n * per_image, C, size, size)
    return (p - p.mean((2, 3), keepdim=True)).flatten(1)


def thumbnails(x, side=8):
    """Images or videos averaged to side x side cells, frames as channels.

    x (n, C, [T,] H, W) -> (n, C * [T *] side * side).
    """
    return F.adaptive_avg_pool2d(x.flatten(1, -3), side).flatten(1)


def compared(x, other):
    """How one set of images, videos or latents differs from another that is no world's, n each.

    patch_swd, 1000 x the sliced Wasserstein distance of many patches of each, and diversity, the
    mean distance of two thumbnails in units of the other's; None for sets of one.
    x, other (n, C, [T,] H, W) -> {name: float or None}
    """
    size = min(4, *x.shape[-2:])
    patches = (image_patches(v, size, per_image=256, seed=k) for k, v in enumerate((x, other)))
    spread = [torch.pdist(thumbnails(v).double()) for v in (x, other)]
    alike = len(x) < 2 or not spread[1].any()
    return {
        "patch_swd": 1000 * sliced_wasserstein(*patches),
        "diversity": None if alike else float(spread[0].mean() / spread[1].mean()),
    }
