"""Latents on disk: those that --cache_latents makes, and those that were made elsewhere.

A cache has parts. Each part holds `moments` (rows, 1 or 2, 2, C, h, w) in half precision: of the
item and, with --hflip, of its mirror image, mean and standard deviation of the encoder's posterior.
All ranks write parts, and a run that was stopped goes on with those that are missing.
"""

import hashlib
import math
import os

import numpy as np
import torch

from models.files import (
    UserError,
    load_json,
    open_own,
    open_tensors,
    save_json,
    save_tensors,
    start_of_data,
)
from models.networks.latent_space import load_space
from models.plumbing.data import Rows, refuse_other_files, to_unit, whole_labels
from models.plumbing.images import files_below, is_image
from models.plumbing.loading import Decoded
from models.plumbing.sets import Folder, list_set, renumbered
from models.progress import progress

ROWS = 1024  # of a part


class LatentCache:
    """A folder of such parts.  about: {name: text} of what they were made with, in cache.json."""

    def __init__(self, folder, n, about):
        """n: how many items there are."""
        self.folder, self.n, self.about = folder, n, {**about, "items": str(n)}
        self.parts = -(-n // ROWS)

    def path(self, part):
        """The file of this number."""
        return os.path.join(self.folder, f"{part:05d}.safetensors")

    def missing(self):
        """Numbers of the parts that are not there."""
        return [part for part in range(self.parts) if not os.path.isfile(self.path(part))]

    def begin(self):
        """Make the folder where there is none. Raises UserError for one of other latents."""
        path = os.path.join(self.folder, "cache.json")
        if not os.path.isdir(self.folder) and os.path.exists(self.folder):
            raise UserError(f"--cache_latents {self.folder} is a file: name a folder")
        if not os.path.isfile(path):
            refuse_other_files(self.folder, path)
            os.makedirs(self.folder, exist_ok=True)
            save_json(self.about, path)

    def check(self):
        """Raises UserError for a folder of other latents."""
        there = load_json(os.path.join(self.folder, "cache.json"))
        other = [name for name in self.about if there.get(name) != self.about[name]]
        if other:
            raise UserError(
                f"--cache_latents {self.folder} was made with other {', '.join(other)}: "
                "name another folder, or remove this one and it is made again"
            )

    def open(self, most=2**32):
        """Open all parts, for `rows`.  -> self. Raises UserError for one that is not whole.

        Where all are at most so many numbers, they are read once to find one that is not finite;
        otherwise when they are asked for.
        """
        files = [open_own(self.path(part)) for part in range(self.parts)]
        found = [f.get_slice("moments") for f in files if list(f.keys()) == ["moments"]]
        counts = [moments.get_shape()[0] for moments in found]
        shapes = {tuple(moments.get_shape()[1:]) for moments in found}
        half = all(moments.get_dtype() == "F16" for moments in found)
        whole = len(found) == self.parts and len(shapes) == 1 and sum(counts) == self.n
        if not (whole and half) or any(k != ROWS for k in counts[:-1]):
            raise UserError(
                f"{self.folder} has parts of another cache: remove it, and it is made again"
            )
        self.shape = shapes.pop()  # (1 or 2, 2, C, h, w)
        self.starts = [start_of_data(self.path(part)) for part in range(self.parts)]
        few = self.n * math.prod(self.shape) <= most
        for part, moments in enumerate(found if few else ()):
            self.check_finite(part, moments[:])
        return self

    def check_finite(self, part, values):
        """Raises UserError unless these values of a part are."""
        if not values.isfinite().all():
            raise UserError(
                f"{self.path(part)} has numbers that are not finite: remove it, and it is made "
                "again"
            )

    def rows(self, index, flip, device):
        """Means and standard deviations of items index (B,), of the mirror images where flip (B,)
        says so; flip None: nowhere.  -> each (B, C, h, w) float32
        """
        views = torch.zeros_like(index) if flip is None else flip.long().cpu()
        half = torch.empty(len(index), *self.shape[1:], dtype=torch.float16)  # (B, 2, C, h, w)
        # into place: get_slice takes four times as long, and rows of a mapped file stay in memory
        for i, v, row in zip(index.tolist(), views.tolist(), half.numpy()):
            at = (i % ROWS * self.shape[0] + v) * row.nbytes
            with open(self.path(i // ROWS), "rb", buffering=0) as file:
                file.seek(self.starts[i // ROWS] + at)
                if file.readinto(row) != row.nbytes:
                    raise UserError(
                        f"{file.name} has become shorter: remove it, and it is made again"
                    )
        both = half.float()
        if not both.sum().isfinite():  # half precision cannot overflow it
            for i, values in zip(index.tolist(), both):
                self.check_finite(i // ROWS, values)
        both = both.to(device)
        return both[:, 0], both[:, 1]


def cache_latents(run, x, space, about):
    """Encode what is not encoded yet, each rank its parts.  -> LatentCache, open

    x: items (N, ...), Decoded, Rows or a tensor. about: what the latents depend on beside x, {name:
    text}. Raises UserError for a folder that was made of other items, in another order, or by
    another autoencoder.
    """
    args = run.args
    about = {**about, "hflip": str(args.hflip), "pixels": contents_of(x)}
    cache = LatentCache(args.cache_latents, len(x), about)
    if run.main:
        cache.begin()
    run.wait_for_all()  # nobody reads cache.json before it is whole
    cache.check()
    own = [part for part in cache.missing() if part % run.world_size == run.rank]
    for part in progress(own, "latents", disable=not run.main):
        index = torch.arange(part * ROWS, min(len(x), (part + 1) * ROWS))
        found = [encode(x[i], space, args.hflip, run.device) for i in index.split(run.B)]
        save_tensors({"moments": torch.cat(found)}, cache.path(part))
    run.wait_for_all()
    return cache.open()


@torch.no_grad()
def encode(x, space, hflip, device):
    """Items x (B, ...) -> (B, 1 or 2, 2, C, h, w) float16, on the CPU."""
    x = to_unit(x.to(device))
    views = [torch.stack(space.own_moments(v), 1) for v in ([x, x.flip(-1)] if hflip else [x])]
    return torch.stack(views, 1).half().cpu()


def contents_of(x):
    """A text that tells other items, or another order, apart: a cache belongs to what was encoded.

    Of pictures it is made of their files' bytes, when the index is.
    """
    if isinstance(x, Decoded):
        return x.sum
    digest = hashlib.sha256()
    for index in torch.arange(len(x)).split(256):
        digest.update(x[index].numpy())
    return digest.hexdigest()


# ---- made elsewhere ------------------------------------------------------------------------------


def is_posteriors(source):
    """Whether --data names means and standard deviations of an encoder's posterior."""
    if os.path.isdir(source):
        return is_latent(first_item(source))
    if not source.endswith(".safetensors") or not os.path.isfile(source):
        return False
    keys = open_tensors(source).keys()
    return {"mean", "std"} <= set(keys) and "x0" not in keys


def is_latent(path):
    """Whether the name is that of a .npy, and not of what macOS puts beside it."""
    return path.endswith(".npy") and not os.path.basename(path).startswith(".")


def first_item(folder):
    """Path of the first file that is a latent or a picture, "" where there is none."""
    return next((path for path in files_below(folder) if is_latent(path) or is_image(path)), "")


def refuse_no_autoencoder(source, autoencoder):
    """Raises UserError unless --autoencoder names one that can decode latents of other programs."""
    if autoencoder in ("identity", "pca"):
        raise UserError(
            f"--data {source} has latents: give --autoencoder FOLDER, of the AutoencoderKL "
            "that made them"
        )


def both_moments(path, like=None):
    """What a .npy has, (2 C, h, w). like: (C, h, w) of the others. Raises UserError."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not a whole .npy ({e}): copy it again") from None
    whole = found.dtype.kind == "f" and found.ndim == 3 and not len(found) % 2
    if not whole or (like and found.shape != (2 * like[0], *like[1:])):
        raise UserError(
            f"{path} is {found.dtype} {found.shape}, wanted floats (2 C, h, w) like the first: "
            "mean, then standard deviation"
        )
    return found


class Posteriors:
    """Posteriors of Stable Diffusion's encoder, as EDM2 and REPA store them, before any scaling.

    A folder with a .npy (2 C, h, w) an item, mean and then standard deviation, whose classes are
    those of dataset.json or the subfolders; or FILE.safetensors with mean and std (N, C, h, w) and
    cond.label (N,). rows() is that of a LatentCache; x[index] is decoded pictures, (B, 3, H, W) in
    [-1, 1], and x.shape theirs. label (N,) or None; classes: their names, or None.
    """

    def __init__(self, source, autoencoder, flat):
        """autoencoder: the folder of the one that decodes them. Raises UserError."""
        refuse_no_autoencoder(source, autoencoder)
        self.where, self.space = f"--data {source}", load_space(autoencoder)
        self.label = self.classes = None
        if os.path.isdir(source):
            members, labels, classes, fixed = list_set(Folder(source, flat), flat)
            every = [(name, k) for (name, _), k in zip(members, labels) if is_latent(name)]
            self.names = [os.path.join(source, name) for name, _ in every]
            label = torch.tensor([k for _, k in every])
            self.label, self.classes = (label, classes) if fixed else renumbered(label, classes)
            one, n = self.of_file(0).shape[1:], len(self.names)
            self.one = tuple(one)
            for i in progress(range(n), "look at --data", disable=n < 2000):
                self.of_file(i)
        else:
            file = open_tensors(source)
            self.mean, self.std = (Rows(file, k, self.where) for k in ("mean", "std"))
            one, n, self.names = self.mean.shape[1:], len(self.mean), None
            if self.std.shape != self.mean.shape or len(one) != 3:
                raise UserError(
                    f"{self.where}: mean is {self.mean.shape} and std {self.std.shape}, wanted "
                    "(N, C, h, w) twice"
                )
            for i in torch.arange(n).split(64):
                self.checked(self.where, torch.stack([self.mean[i], self.std[i]]))
            if "cond.label" in file.keys():
                self.label = whole_labels(source, Rows(file, "cond.label", self.where))
        self.one, self.shape = tuple(one), (n, *self.space.pixel_shape(tuple(one)))

    @staticmethod
    def shape_of_one(source, autoencoder):
        """(C, h, w) of its latents, by the first one or the file's header. Raises UserError."""
        refuse_no_autoencoder(source, autoencoder)
        if not os.path.isdir(source):
            return tuple(open_tensors(source).get_slice("mean").get_shape()[1:])
        found = both_moments(first_item(source))
        return (len(found) // 2, *found.shape[1:])

    def of_file(self, i):
        """-> (2, C, h, w) float32. Raises UserError for a file of another shape."""
        found = both_moments(self.names[i], self.one if i else None)
        found = torch.from_numpy(found.astype(np.float32)).unflatten(0, (2, -1))
        return self.checked(self.names[i], found)

    def checked(self, where, found):
        """found (2, ...): means and standard deviations. Raises UserError for what is neither."""
        if not found.isfinite().all():
            raise UserError(f"{where} has numbers that are not finite: copy or encode it again")
        if found[1].min() < 0:
            raise UserError(
                f"{where} has {found[1].min():.3g} for a standard deviation: store standard "
                "deviations, not logarithms of variances"
            )
        return found

    def __len__(self):
        return self.shape[0]

    def dim(self):
        return len(self.shape)

    def rows(self, index, flip, device):
        """Of items index (B,): what own_moments of the space gives, each (B, C, h, w)."""
        if self.names is None:
            found = torch.stack([self.mean[index], self.std[index]])
            mean, std = self.checked(self.where, found)
        else:
            mean, std = torch.stack([self.of_file(i) for i in index.tolist()], 1)
        normalise = self.space.autoencoder.normalise
        z = normalise(mean)
        return z.to(device), (normalise(mean + std) - z).to(device)

    @torch.no_grad()
    def __getitem__(self, index):
        return self.space.to_pixels(self.space.normed(*self.rows(index, None, "cpu"))[0])
