"""Sets of images on disk: samples that a run writes, and sets that models/metrics.py compares.

A set is one of

    FILE.npz            arr_0 uint8 (N, H, W, 3), where there are classes arr_1 int64 (N,); what
                        guided-diffusion's evaluator reads
    a folder            PNGs, JPEGs and what else Pillow opens, in subfolders too
    FILE.safetensors    x0 (N, 1 or 3, H, W): bytes, or floats in [-1, 1], as runs write it

Sets are read in batches and written in chunks, so that 50,000 images are never in memory at once.
"""

import contextlib
import io
import json
import os
import re
import shutil
import zipfile

import numpy as np
import torch
from PIL import Image

from models.files import (
    UserError,
    atomic_write,
    fingerprint,
    load_json,
    open_tensors,
    replacing,
    save_json,
    save_tensors,
)
from models.plumbing.images import files_below, is_image, read_frames, to_square
from models.progress import progress

# ---- reading -------------------------------------------------------------------------------------


def to_bytes(x):
    """Pixels (n, 1 or 3, H, W) in [-1, 1], up to overshoot -> uint8 (n, 3, H, W) on the CPU."""
    levels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    return levels.expand(-1, 3, -1, -1)


def open_images(path, flag, resolution=None, crop="lanczos"):
    """A set of images -> an object with

        n, size                       how many; (H, W)
        batches(rows, first)          uint8 (up to rows, 3, H, W), one after the other, from image
                                      `first` on
        fingerprint()                 a short hash of its content, and of how it is cut

    flag: what messages begin with. resolution: a side to which images of any size are cut, by one
    of CROPS of images.py; None: as they are, all of one size. Raises UserError.
    """
    path = str(path)
    if os.path.isdir(path):
        images = FolderImages(path, flag, resolution, crop)
    elif path.endswith(".npz"):
        images = NpzImages(path, flag, resolution, crop)
    elif path.endswith(".safetensors"):
        images = TensorImages(path, flag, resolution, crop)
    else:
        there = "is no such kind of file" if os.path.exists(path) else "does not exist"
        raise UserError(
            f"{flag} {path} {there}: give FILE.npz, a folder of images or FILE.safetensors"
        )
    if images.n < 2:
        raise UserError(f"{flag} {path} has {images.n} image(s); a comparison needs at least 2")
    return images


class Images:
    """What the three kinds share."""

    def __init__(self, path, flag, resolution, crop):
        self.path, self.where, self.resolution, self.crop = path, f"{flag} {path}", resolution, crop

    def cut(self, x):
        """uint8 (n, 3, H, W) -> the same cut to the resolution that is asked for."""
        side = self.resolution
        if not side or x.shape[2:] == (side, side):
            return x
        images = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in x)
        images = [np.array(to_square(image, side, self.crop)) for image in images]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def own_size(self, height, width):
        """(H, W) of what `batches` gives, of images of this size."""
        return (self.resolution, self.resolution) if self.resolution else (height, width)

    def files(self):
        """The files that hold the content."""
        return [self.path]

    def fingerprint(self):
        return f"{fingerprint(self.files())}-{self.resolution}-{self.crop}"


class FolderImages(Images):
    """Images of a folder and its subfolders, by name; other files are passed over, and so is the
    samples.png of a run beside a set that `write_set` or models.decode has made. Raises UserError
    for half of one.
    """

    def __init__(self, *about):
        super().__init__(*about)
        self.paths = [path for path in files_below(self.path) if is_image(path)]
        made = [os.path.join(self.path, name) for name in ("set.json", "decoded.json")]
        if any(map(os.path.isfile, made)):
            self.paths = [p for p in self.paths if os.path.basename(p).split(".")[0].isdecimal()]
            if os.path.isdir(os.path.join(self.path, "chunks")):
                raise UserError(f"{self.where} is not whole: go on with the command that writes it")
        self.n, self.size = len(self.paths), None
        if self.paths:
            self.size = self.own_size(*self.read(self.paths[0]).shape[1:])

    def files(self):
        return self.paths

    def read(self, path):
        """-> uint8 (3, H, W). Raises UserError for one that cannot be read, or of another size."""
        try:
            image = read_frames(path)[0]
        except (OSError, ValueError, IndexError, SyntaxError, Image.DecompressionBombError) as e:
            raise UserError(f"{self.where}: {path} cannot be read ({e}): remove it") from None
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if self.resolution:
            return self.cut(x[None])[0]
        if self.size and tuple(x.shape[1:]) != self.size:
            raise UserError(
                f"{self.where}: {path} has {x.shape[2]} x {x.shape[1]} pixels, others "
                f"{self.size[1]} x {self.size[0]}: cut all of them with --resolution N"
            )
        return x

    def batches(self, rows, first=0):
        for begin in range(first, self.n, rows):
            yield torch.stack([self.read(path) for path in self.paths[begin : begin + rows]])


class NpzImages(Images):
    """arr_0 of an npz, read piece by piece."""

    def __init__(self, *about):
        super().__init__(*about)
        with self.open() as (file, shape, dtype, fortran):
            right = dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and not fortran
            if not right:
                raise UserError(
                    f"{self.where}: arr_0 is {dtype} {shape}, wanted uint8 (N, H, W, 3), as "
                    "guided-diffusion's evaluator reads it: write it so"
                )
        self.n, *self.pixels = shape[:3]
        self.size = self.own_size(*self.pixels)

    def open(self):
        return npz_array(self.path, "arr_0", self.where)

    def batches(self, rows, first=0):
        one = 3 * self.pixels[0] * self.pixels[1]
        with self.open() as (file, *_):
            file.seek(first * one, os.SEEK_CUR)
            for begin in range(first, self.n, rows):
                count = min(rows, self.n - begin)
                data = file.read(count * one)
                if len(data) < count * one:
                    raise UserError(f"{self.where} is cut off: copy or make it again")
                x = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                yield self.cut(x.reshape(count, *self.pixels, 3).permute(0, 3, 1, 2))


@contextlib.contextmanager
def npz_array(path, name, where):
    """One array of an npz -> file, at its numbers; shape, dtype, whether it is in Fortran's order.

    Pickled objects are never loaded. Raises UserError.
    """
    names = npz_names(path, where)
    if name not in names:
        there = ", ".join(names) or "nothing"
        raise UserError(f"{where} has no {name}, but {there}: give an npz of images")
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        try:
            old = np.lib.format.read_magic(file) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if old else READ_LATER_HEADER
            shape, fortran, dtype = read(file)
        except ValueError as e:
            raise UserError(f"{where}: {name} is no array ({e}): make the file again") from None
        yield file, shape, dtype, fortran


READ_LATER_HEADER = np.lib.format.read_array_header_2_0


def npz_names(path, where):
    """Names of the arrays of an npz. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as e:
        raise UserError(f"{where} is no npz ({e}): copy or make it again") from None


class TensorImages(Images):
    """x0 of a safetensors file."""

    def __init__(self, *about):
        super().__init__(*about)
        file = open_tensors(self.path)
        if "x0" not in file.keys():
            there = ", ".join(sorted(file.keys())) or "nothing"
            raise UserError(f"{self.where} has no tensor x0, but {there}: write the images there")
        self.rows = file.get_slice("x0")
        shape = tuple(self.rows.get_shape())
        if len(shape) != 4 or shape[1] not in (1, 3):
            raise UserError(
                f"{self.where}: x0 is {shape}, and images are (N, 1 or 3, H, W): latents become "
                "images with python -m models.decode"
            )
        self.n, self.size = shape[0], self.own_size(*shape[2:])

    def batches(self, rows, first=0):
        for begin in range(first, self.n, rows):
            x = self.rows[begin : begin + rows]
            if x.dtype == torch.uint8:
                yield self.cut(x.expand(-1, 3, -1, -1))
                continue
            if not x.float().isfinite().all():
                raise UserError(f"{self.where}: x0 has numbers that are not finite: sample again")
            yield self.cut(to_bytes(x))


# ---- writing -------------------------------------------------------------------------------------


def write_set(run, draw, n, label=None, **about):
    """Write n images to the run's folder, as --format says: samples.npz, or 000000.png, ...

    All ranks call it. draw(first, last) -> pixels (last - first, 1 or 3, H, W) in [-1, 1] of rows
    that depend on nothing but their numbers, so that any number of ranks writes the same; each part
    of the run draws every so many-th chunk of --train_batch_size rows, and all of them call their
    networks equally often. label (n,) int64, or None: for arr_1, or dataset.json beside PNGs.
    about: what else decides how the images look. A chunk is one rename, or a file for each image:
    the same command goes on with an interrupted one. Raises UserError.
    """
    folder, kind, rows = run.folder, run.args.format or "npz", run.B
    about = {**about, "samples": n, "format": kind, "rows of a chunk": rows}
    begin_set(run, folder, about)
    chunks = [range(a, min(n, a + rows)) for a in range(0, n, rows)]
    missing = [chunk for chunk in chunks if not chunk_is_there(folder, kind, chunk)]
    if kind == "npz" and os.path.isfile(os.path.join(folder, "samples.npz")):
        missing = []
    run.wait_for_all()  # nobody writes before all have looked
    for i in progress(range(0, len(missing), run.parts), "images", disable=not run.main):
        mine, last = i + run.part, min(i + run.parts, len(missing)) - 1
        chunk = missing[min(mine, last)]  # a rank without one draws one for nothing
        with run.autocast(), torch.no_grad():
            x = draw(chunk.start, chunk.stop)
        bad = float(not x.isfinite().all())
        if any(run.mean_over_ranks(bad)):  # all ranks stop, and the first of them says why
            raise UserError(
                f"--sample {run.args.sample}: some of images {missing[i].start} to "
                f"{missing[last].stop - 1} are not finite: name the student of another step"
            )
        if mine < len(missing) and run.writes:
            write_chunk(folder, kind, chunk, to_bytes(x))
    run.wait_for_all()
    if run.main:
        end_set(folder, kind, chunks, label)
    run.wait_for_all()


def begin_set(run, folder, about):
    """Make the folder, or see that what is there was begun alike. Raises UserError."""
    path = os.path.join(folder, "set.json")
    there = os.listdir(folder) if os.path.isdir(folder) else []
    foreign = [n for n in there if n == "samples.npz" or re.fullmatch(r"\d{6}\.(png|jpg)", n)]
    if foreign and "set.json" not in there:
        raise UserError(
            f"--output_dir {folder} has images, such as {foreign[0]}, which are of no set of "
            "--samples: name another folder"
        )
    run.wait_for_all()  # nobody writes before all have looked
    if run.main:
        os.makedirs(os.path.join(folder, "chunks"), exist_ok=True)
        if not os.path.isfile(path):
            save_json(about, path)
    run.wait_for_all()
    old, about = load_json(path), json.loads(json.dumps(about))
    other = [name for name in {**about, **old} if old.get(name) != about.get(name)]
    if other:
        raise UserError(
            f"--output_dir {folder} has images that were made with other {', '.join(other)}: "
            "name another folder, or remove this one"
        )


def chunk_files(folder, kind, chunk):
    """Where the images of a chunk go."""
    if kind == "npz":
        return [os.path.join(folder, "chunks", f"{chunk.start:06d}.safetensors")]
    return [os.path.join(folder, f"{i:06d}.{kind}") for i in chunk]


def chunk_is_there(folder, kind, chunk):
    return all(os.path.isfile(path) for path in chunk_files(folder, kind, chunk))


def write_chunk(folder, kind, chunk, x):
    """x uint8 (n, 3, H, W)."""
    paths = chunk_files(folder, kind, chunk)
    if kind == "npz":
        save_tensors({"x": x}, paths[0])
        return
    how = {"quality": 95, "subsampling": 0} if kind == "jpg" else {}
    for path, image in zip(paths, x.permute(0, 2, 3, 1).numpy(), strict=True):
        data = io.BytesIO()
        Image.fromarray(image).save(data, {"jpg": "JPEG", "png": "PNG"}[kind], **how)
        atomic_write(path, data.getvalue())


def end_set(folder, kind, chunks, label):
    """All chunks are there: the file that holds them, or the labels beside them."""
    where = folder
    if kind == "npz":
        where = os.path.join(folder, "samples.npz")
        if not os.path.isfile(where):
            join_chunks(folder, chunks, label, where)
    elif label is not None:
        names = [[f"{i:06d}.{kind}", k] for i, k in enumerate(label.tolist())]
        save_json({"labels": names}, os.path.join(folder, "dataset.json"))
    shutil.rmtree(os.path.join(folder, "chunks"), ignore_errors=True)
    print(f"images: {chunks[-1].stop} in {where}")


def join_chunks(folder, chunks, label, path):
    """samples.npz of the chunks, one of them in memory."""
    files = [open_tensors(chunk_files(folder, "npz", chunk)[0]) for chunk in chunks]
    _, _, height, width = files[0].get_slice("x").get_shape()
    shape = (chunks[-1].stop, height, width, 3)
    with replacing(path) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            about = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, about)
            for file in files:
                array.write(file.get_tensor("x").permute(0, 2, 3, 1).contiguous().numpy().data)
        if label is not None:
            with archive.open("arr_1.npy", "w") as array:
                np.lib.format.write_array(array, label.numpy().astype(np.int64))
