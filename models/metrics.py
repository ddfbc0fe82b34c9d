"""Compare two sets of images: FID, sFID, KID, precision and recall, sliced Wasserstein of patches.

    python -m models.metrics --samples runs/dmd-FOLDER-samples/samples.npz --reference FOLDER \
        --inception inception.safetensors

A set is FILE.npz, a folder of images or FILE.safetensors (models/plumbing/image_sets.py). Features
are those of FID's Inception V3 (models/networks/inception.py), whose weights you bring:
docs/howto.md has the two lines that make the file. Without them the measures that need no network
remain. The reference may also be an npz of statistics: mu and sigma as pytorch-fid writes them, and
mu_s and sigma_s for sFID beside images, as in guided-diffusion's reference batches.

    fid          Frechet distance of features (1706.08500)                       lower is better
    sfid         the same of 17 x 17 maps, which show layout (2103.03841)        lower
    kid          squared MMD of features, cubic kernel, unbiased (1801.01401)    lower
    precision    samples inside the reference's manifold (1904.06991, k = 3)     higher
    recall       reference inside the samples' manifold                          higher
    patch_swd    1000 x sliced Wasserstein distance of 4 x 4 patches: grain      lower
    thumb_energy energy distance of 8 x 8 thumbnails: colour and layout          lower
    diversity    mean distance of two thumbnails, over that of the reference     1
"""

import hashlib
import json
import os

import numpy as np
import torch
import torch.nn.functional as F

from models.files import UserError, fingerprint, load_tensors, open_tensors, save_json, save_tensors
from models.libraries import device
from models.networks import inception
from models.plumbing.data import spread_rows
from models.plumbing.flags import Parser, number
from models.plumbing.image_sets import npz_array, npz_names, open_images
from models.plumbing.images import CROPS
from models.plumbing.run import run_main, writing
from models.progress import progress
from models.worlds.measures import (
    energy_distance,
    frechet_distance,
    image_patches,
    sliced_wasserstein,
)

# ---- distances -----------------------------------------------------------------------------------


class Moments:
    """Mean and covariance of rows that come in batches, in float64.

    Sums are taken about the first batch's mean, so that nothing cancels.
    """

    def __init__(self):
        self.n, self.origin = 0, None

    def add(self, x):
        """x (n, d)."""
        x = x.double()
        if self.origin is None:
            self.origin = x.mean(0)
            self.sum, self.square = torch.zeros_like(self.origin), x.new_zeros(*x.shape[1:] * 2)
        x = x - self.origin
        self.n += len(x)
        self.sum += x.sum(0)
        self.square += x.T @ x

    def result(self):
        """-> mean (d,), covariance (d, d) with n - 1 in the denominator, as numpy.cov."""
        mean = self.sum / self.n
        cov = (self.square - self.n * mean[:, None] * mean) / (self.n - 1)
        return self.origin + mean, cov


def cubic_kernel_sum(a, b, rows=2000):
    """The sum of (a_i . b_j / d + 1)^3 over all pairs.  a (n, d), b (m, d) -> float."""
    total = 0.0
    for x in a.double().split(rows):
        for y in b.double().split(rows):
            total += float((x @ y.T / a.shape[1] + 1).pow(3).sum())
    return total


def kernel_distance(a, b):
    """KID: the unbiased estimate of the squared MMD with the kernel (x . y / d + 1)^3.

    Over all pairs of different rows, which is the mean over all subsets of a size. It may come out
    negative.  a (n, d), b (m, d) -> float.
    """
    n, m = len(a), len(b)
    own = [
        cubic_kernel_sum(x, x) - float((x.double().square().sum(1) / x.shape[1] + 1).pow(3).sum())
        for x in (a, b)
    ]
    return own[0] / (n * (n - 1)) + own[1] / (m * (m - 1)) - 2 * cubic_kernel_sum(a, b) / (n * m)


def squared_distances(a, b):
    """a (n, d), b (m, d) -> (n, m) float64."""
    a, b = a.double(), b.double()
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    return (squares - 2 * a @ b.T).clamp_min(0)


def radii(x, k, rows=2000):
    """Squared distance of each row to its k-th nearest other one.  (n, d) -> (n,).

    Memory is that of rows x rows distances, however many there are.
    """
    found = []
    for i, part in enumerate(x.split(rows)):
        nearest = torch.full((len(part), k), float("inf"), dtype=torch.float64, device=x.device)
        for j, others in enumerate(x.split(rows)):
            distance = squared_distances(part, others)
            if i == j:
                distance.fill_diagonal_(float("inf"))
            both = torch.cat([nearest, distance], dim=1)
            nearest = both.topk(k, dim=1, largest=False).values
        found.append(nearest.amax(1))
    return torch.cat(found)


def share_inside(x, of, k=3, rows=2000):
    """The share of rows of x that lie within the k-nearest-neighbour ball of some row of `of`.

    Precision for samples x and real images `of`, recall the other way round (1904.06991, Eq. 1).
    x (n, d), of (m, d), m > k -> float.
    """
    balls = list(zip(of.split(rows), radii(of, k, rows).split(rows)))
    count = 0
    for part in x.split(rows):
        inside = torch.zeros(len(part), dtype=torch.bool, device=x.device)
        for centres, radius in balls:
            inside |= (squared_distances(part, centres) <= radius).any(1)
        count += int(inside.sum())
    return count / len(x)


# ---- features ------------------------------------------------------------------------------------

PART = 512  # images of one file of the cache


def load_inception(path):
    """--inception -> the network on the device. Raises UserError."""
    try:
        return inception.load(load_tensors(path)).to(device())
    except ValueError as e:
        raise UserError(
            f"--inception {path} is not FID's Inception: {e}; convert pt_inception-2015-12-05 of "
            "pytorch-fid, docs/howto.md has the two lines"
        ) from None


def cached_features(images, net, args):
    """Features of all images, in parts of PART that are stored as they are made.

    They lie in PATH.features/KEY, or under --cache; the key is made of the images' content, the
    weights and how images are resized, so that what changed is computed anew.
    -> paths of the parts: each has features (n, 2048) and spatial (n, 2023), float32.
    """
    key = [images.fingerprint(), fingerprint([args.inception]), args.resize, "spatial (h, w, c)"]
    key = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    beside = os.path.normpath(images.path) + ".features"
    folder = os.path.join(args.cache or beside, key)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder} cannot be made ({e}): name a place with --cache") from None
    paths = [os.path.join(folder, f"{i:05d}.safetensors") for i in range(-(-images.n // PART))]
    missing = [i for i, path in enumerate(paths) if not os.path.isfile(path)]
    if missing:
        first = missing[0]
        bar = progress(range(first, len(paths)), f"features of {images.path}")
        for i, x in zip(bar, images.batches(PART, first * PART)):
            if not os.path.isfile(paths[i]):
                save_tensors(compute_features(net, x, args), paths[i])
    return paths


@torch.no_grad()
def compute_features(net, x, args):
    """x uint8 (n, 3, H, W) -> {"features" (n, 2048), "spatial" (n, 2023)} on the CPU.

    spatial runs over rows, columns, channels, as in the statistics of guided-diffusion's files.
    """
    pairs = [net(part.to(device()), args.resize) for part in x.split(args.batch_size)]
    features, spatial = (torch.cat(parts).cpu() for parts in zip(*pairs))
    return {"features": features, "spatial": spatial.permute(0, 2, 3, 1).flatten(1)}


def read_features(paths):
    """-> features (N, 2048) on the device, and the moments of features and of spatial."""
    every, pooled, layout = [], Moments(), Moments()
    for path in paths:
        with open_tensors(path) as file:
            features, spatial = (file.get_tensor(k).to(device()) for k in ("features", "spatial"))
        if not features.isfinite().all():
            raise UserError(f"{path} has features that are not finite: remove it, and run again")
        every.append(features)
        pooled.add(features)
        layout.add(spatial)
    return torch.cat(every), pooled.result(), layout.result()


def read_statistics(path):
    """An npz of statistics -> {"mu": (d,), "sigma": (d, d), ...} in float64; {} for other sets.

    Raises UserError.
    """
    names = npz_names(path, f"--reference {path}") if str(path).endswith(".npz") else []
    found = {}
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        if name in names:
            with npz_array(path, name, f"--reference {path}") as (file, shape, dtype, fortran):
                numbers = np.frombuffer(file.read(), dtype)
            values = torch.from_numpy(numbers.reshape(shape, order="FC"[not fortran]).copy())
            found[name] = values.double()
    for mean, cov, d in (("mu", "sigma", inception.FEATURES), ("mu_s", "sigma_s", 7 * 17 * 17)):
        if mean not in found and cov not in found:
            continue
        shapes = [tuple(found[name].shape) if name in found else None for name in (mean, cov)]
        if shapes != [(d,), (d, d)]:
            raise UserError(
                f"--reference {path}: {mean} and {cov} are {shapes[0]} and {shapes[1]}, wanted "
                f"{(d,)} and {(d, d)}: give the statistics of FID's Inception"
            )
        if not (found[mean].isfinite().all() and found[cov].isfinite().all()):
            raise UserError(f"--reference {path}: {mean} or {cov} is not finite: make it again")
    return found


# ---- the measures --------------------------------------------------------------------------------


def measure_features(samples, reference, statistics, net, args):
    """fid, sfid, kid, precision and recall, as far as what is there goes.

    samples, reference: open sets; reference None where there are statistics alone.
    -> {name: float}
    """
    a, *moments_a = read_features(cached_features(samples, net, args))
    b, moments_b = None, [None, None]
    if reference:
        b, *moments_b = read_features(cached_features(reference, net, args))
    if "mu" in statistics:
        moments_b[0] = statistics["mu"].to(a.device), statistics["sigma"].to(a.device)
    if "mu_s" in statistics:
        moments_b[1] = statistics["mu_s"].to(a.device), statistics["sigma_s"].to(a.device)
    found = {}
    for name, own, other in zip(("fid", "sfid"), moments_a, moments_b):
        if other:
            found[name] = frechet_distance(*own, *other)
            print(f"{name:13}{found[name]:.5g}", flush=True)  # the rest may take long
    if b is not None:
        found["kid"] = kernel_distance(a, b)
        if min(len(a), len(b)) > 3:
            found["precision"], found["recall"] = share_inside(a, b), share_inside(b, a)
    return found


def look(images, most=5000, thumbs=2000):
    """-> patches (8 for each of up to `most` images, 48), thumbnails (up to `thumbs`, 192).

    Both of pixels in [-1, 1].
    """
    wanted = spread_rows(images.n, most)
    patches, small, first = [], [], 0
    for x in images.batches(PART):
        mine = wanted[(wanted >= first) & (wanted < first + len(x))] - first
        if len(mine):
            pixels = x[mine].float() / 127.5 - 1
            patches.append(image_patches(pixels, seed=first))
            small.append(F.adaptive_avg_pool2d(pixels, 8).flatten(1))
        first += len(x)
    small = torch.cat(small)
    return torch.cat(patches), small[spread_rows(len(small), thumbs)]


def measure_pixels(samples, reference):
    """patch_swd, thumb_energy and diversity, which need no network.  -> {name: float}"""
    fewer = min(5000, samples.n, reference.n)  # sliced Wasserstein takes equally many
    (patches_a, a), (patches_b, b) = (look(images, fewer) for images in (samples, reference))
    spread_a, spread_b = (float(torch.pdist(x.double()).mean()) for x in (a, b))
    return {
        "patch_swd": 1000 * sliced_wasserstein(patches_a, patches_b),
        "thumb_energy": energy_distance(a, b),
        "diversity": spread_a / spread_b if spread_b else float("nan"),
    }


# ---- the command ---------------------------------------------------------------------------------


def parse_args(argv):
    p = Parser(prog="python -m models.metrics", description=(__doc__ or "").partition("\n")[0])
    add = p.add_argument
    add("--samples", required=True, help="FILE.npz, folder or FILE.safetensors to be judged")
    add("--reference", required=True, help="the same of real images, or an npz with mu and sigma")
    add("--inception", metavar="FILE", help="weights of FID's Inception as safetensors; without "
        "them what needs features is left out")  # fmt: skip
    add("--resize", choices=["torch", "tf"], default="torch", help="how images reach 299 pixels: "
        "as pytorch-fid, or as TensorFlow, for numbers like guided-diffusion's")  # fmt: skip
    add("--resolution", type=number(int, 8), help="cut all images to squares of this side first")
    add("--crop", choices=CROPS, default="lanczos", help="how --resolution cuts")
    add("--batch_size", type=number(int, 1), default=64, help="images of one Inception call")
    add("--cache", metavar="FOLDER", help="for features; if left out, beside each set")
    add("--output", metavar="FILE", help="write the numbers there too, as JSON")
    return p.parse_args(argv)


def open_both(args):
    """-> samples, reference (None where it is statistics alone), statistics. Raises UserError."""
    how = args.resolution, args.crop
    samples = open_images(args.samples, "--samples", *how)
    statistics, reference = read_statistics(args.reference), None
    if "mu_s" in statistics and args.resize == "torch":
        raise UserError(
            f"--reference {args.reference} has mu_s, as guided-diffusion's files do, whose images "
            "TensorFlow enlarged: give --resize tf"
        )
    if "mu" not in statistics or "arr_0" in npz_names(args.reference, "--reference"):
        reference = open_images(args.reference, "--reference", *how)
        if samples.size != reference.size:
            sizes = [f"{s.size[1]} x {s.size[0]}" for s in (samples, reference)]
            raise UserError(
                f"--samples are {sizes[0]} and --reference {sizes[1]} pixels: cut both with "
                "--resolution N"
            )
    elif not args.inception:
        raise UserError(
            f"--reference {args.reference} has statistics of features alone: give --inception FILE"
        )
    return samples, reference, statistics


def main(argv=None):
    args = parse_args(argv)
    if args.output:
        if os.path.isdir(args.output):
            raise UserError(f"--output {args.output} is a folder: name a file")
        with writing(args.output, "name another"):
            os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    net = load_inception(args.inception) if args.inception else None
    samples, reference, statistics = open_both(args)
    found = {"samples": samples.n, "reference": reference.n if reference else None}
    if reference:
        found |= measure_pixels(samples, reference)
    if net:
        found |= measure_features(samples, reference, statistics, net, args)
    else:
        print(
            "no --inception FILE: fid, sfid, kid, precision and recall are left out; docs/howto.md "
            "says how to make the file"
        )
    for name, value in found.items():
        if value is not None and name not in ("fid", "sfid"):  # printed as they came
            print(f"{name:13}{value:.5g}" if isinstance(value, float) else f"{name:13}{value}")
    if args.output:
        save_json(found, args.output)


if __name__ == "__main__":
    run_main(main, "the same command goes on with the features that it has")
