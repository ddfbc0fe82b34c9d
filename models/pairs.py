"""Images or videos with captions as rows of --data for a text teacher: latents and features.

models/encode.py has the command. Everything is read and written one by one, so that a set of any
size needs little memory, and the same command goes on with an interrupted one. The latents are
samples of the autoencoder's posterior, normalised as the teacher sees them (models/vaes.py).
"""

import json
import math
import os
import re
import shutil
import sys
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from models.draws import Draws
from models.files import UserError, fsync_folder, load_json
from models.libraries import device
from models.plumbing.data import to_unit
from models.plumbing.images import files_below, is_image, read_frames
from models.plumbing.loading import is_passing
from models.plumbing.sets import Folder, is_set, is_text, open_set
from models.progress import progress
from models.prompts import PARTIAL, header_bytes, read_header
from models.vaes import latent_shape
from models.videos import is_video, read_video, video_library

# ---- images, videos and their captions -----------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A picture of a set that is no folder (sets.py), in place of a path."""

    source: Any
    name: str
    place: tuple

    def __str__(self):
        return self.source.name_of(self.name)

    def picture(self):
        """-> PIL image in RGB. Raises what Pillow raises, and ValueError."""
        return self.source.picture(self.source.read(self.name, self.place))


def find_pairs(folder, captions=None, frames=1):
    """All images of a folder, or of another form of sets.py, with their captions.

    captions: FILE.json, {"NAME": "CAPTION"}, or FILE.jsonl with file_name and text in each line;
    None: a .txt of the same name beside each image, or what the set's form has. frames above 1:
    also video files, and folders of frames, which have a caption of their own. What has captions
    but is not there is named on stderr.
    -> [(path, or Packed, and caption)], sorted by path or as the set has them. Raises UserError,
    also for an image without a caption.
    """
    if os.path.exists(folder) and is_set(folder):
        source = opened(folder)
        if not isinstance(source, Folder):
            return packed_pairs(source, captions, frames)
    if not os.path.isdir(folder):
        raise UserError(f"--images {folder} is not a folder; put images with captions in one")
    known = by_name(read_captions(captions) if captions else read_texts(folder))
    paths = list(find_items(folder, known, frames))
    what = "images" if frames == 1 else "images or videos"
    if not paths:
        raise UserError(f"--images {folder} holds no {what}")
    if films := [path for path in paths if is_video(path)]:
        video_library(f"--images {folder}: {os.path.relpath(films[0], folder)}")
    keys = [caption_key(folder, path, captions) for path in paths]
    where = f"--captions {captions}" if captions else "a .txt of the same name beside it"
    bare = [path for key, path in zip(keys, paths) if not known.get(key)]
    if bare:
        raise UserError(
            f"--images {folder}: {len(bare)} of {len(paths)} {what} have no caption or an empty "
            f"one, such as {os.path.relpath(bare[0], folder)}: write it into {where}, or take the "
            "image out"
        )
    name_lost(captions or folder, known.keys() - set(keys), folder)
    return [(path, known[key]) for key, path in zip(keys, paths)]


def name_lost(source, lost, folder):
    """Say which captions of a source have no image."""
    if lost:
        without = f"{len(lost)} without an image in {folder}, such as that of {min(lost)}"
        print(f"{source}: captions are left out, {without}", file=sys.stderr)


def opened(path):
    """The set that --images names. Raises UserError."""
    try:
        source = open_set(path, flat=True)
        source.members()
    except UserError as e:
        raise UserError(str(e).replace("--data ", "--images ", 1)) from None
    return source


def packed_pairs(source, captions, frames):
    """`find_pairs` of a set that is no folder."""
    where = f"--images {source.path}"
    if frames > 1:
        raise UserError(f"{where} is {source.kind}, of pictures: give --frames 1, or a folder")
    known = by_name(read_captions(captions) if captions else source.captions())
    found = [Packed(source, *member) for member in source.members() if is_picture(source, member)]
    bare = [item for item in found if not known.get(composed(item.name), "").strip()]
    if not found:
        raise UserError(f"{where} holds no images")
    if bare:
        raise UserError(
            f"{where}: {len(bare)} of {len(found)} images have no caption or an empty one, such "
            f"as {bare[0].name}: write it into NAME.txt beside NAME.jpg, into a column called text "
            "of parquet files, or into --captions FILE"
        )
    there = {composed(item.name) for item in found}
    name_lost(captions or source.path, known.keys() - there, source.path)
    return [(item, one_line(known[composed(item.name)])) for item in found]


def is_picture(source, member):
    """Whether a member of a set is to be a picture: in archives other files lie beside them."""
    return not hasattr(source, "inside") or is_image(member[0])


def about(folder, path):
    """What tells a picture, or a folder of frames, from another one, for a fingerprint.

    -> list that JSON can hold
    """
    if isinstance(path, Packed):
        stat = os.stat(path.source.files[path.place[0]])
        return [path.name, *path.place, stat.st_size, stat.st_mtime_ns]
    files = files_below(path) if os.path.isdir(path) else [path]
    stats = [(os.path.relpath(file, folder), os.stat(file)) for file in files]
    return [part for name, stat in stats for part in (name, stat.st_size, stat.st_mtime_ns)]


def caption_key(folder, path, captions):
    """By what the caption of an image is found: its name below the folder, for .txt the stem."""
    name = composed(os.path.relpath(path, folder))
    return name if captions or os.path.isdir(path) else os.path.splitext(name)[0]


def find_items(folder, known, frames):
    """Paths of the images below a folder, for `find_pairs`. known: its captions by their keys."""
    whole = set()  # folders of frames
    for path in files_below(folder):
        inside = composed(os.path.relpath(os.path.dirname(path), folder))
        if frames > 1 and inside in known and is_image(path):
            if inside not in whole:
                yield os.path.dirname(path)
            whole.add(inside)
        elif is_image(path) or (frames > 1 and is_video(path)):
            yield path


def one_line(text):
    return " ".join(text.split())


def read_texts(folder):
    """The captions in .txt files below a folder -> {name without .txt: caption}."""
    found = {}
    for path in files_below(folder):
        if is_text(path):
            with open(path, encoding="utf-8-sig", errors="replace") as f:
                found[os.path.relpath(path, folder)[: -len(".txt")]] = one_line(f.read())
    return found


def read_captions(path):
    """--captions FILE -> {name of an image: caption}. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            if path.endswith(".json"):
                known = dict(json.load(f))
            else:
                rows = [json.loads(line) for line in f if line.strip()]
                known = {row["file_name"]: row["text"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"--captions {path}: {type(e).__name__}: {e}; wanted FILE.json with "
            '{"NAME": "CAPTION"}, or file_name and text in each line of FILE.jsonl'
        ) from None
    if not all(isinstance(text, str) for text in known.values()):
        raise UserError(f'--captions {path}: wanted {{"NAME": "CAPTION"}}, with one text each')
    return {os.path.normpath(name): one_line(text) for name, text in known.items()}


def composed(name):
    """A name in one of the two ways in which Unicode writes an accent; file systems differ."""
    return unicodedata.normalize("NFC", name)


def by_name(captions):
    """{name: caption}, to be asked with composed names."""
    return {composed(name): text for name, text in captions.items()}


# ---- pixels --------------------------------------------------------------------------------------


def in_order(name):
    """By which names are sorted so that 2.png comes before 10.png."""
    parts = re.split(r"(\d+)", name)  # text and digits in turns
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def frames_of(path, frames, fps):
    """The first frames of an image, a video or a folder of images.  -> PIL images, at most so many

    fps: of `read_video`. Raises what Pillow or the library for videos raises.
    """
    if isinstance(path, Packed):
        return [path.picture()]
    if os.path.isdir(path):
        names = sorted(filter(is_image, os.listdir(path)), key=in_order)
        return [read_frames(os.path.join(path, name))[0] for name in names[:frames]]
    return read_video(path, frames, fps) if is_video(path) else read_frames(path, frames)


def read_pixels(path, size, frames, fps=None):
    """The first frames of an image or video, the centre of the shape of size (H, W).

    fps: frames a second that are taken of a video file, None: all of them.
    -> uint8 (3, H, W) for one frame, else (3, frames, H, W); and (6,) int64 as SDXL has it: height
    and width before, top and left of what was cut out, in pixels of the scaled image, H and W.
    Raises what `frames_of` raises, and ValueError for a file with fewer frames.
    """
    read = frames_of(path, frames, fps)
    if len(read) < frames:
        raise ValueError(f"it has {len(read)} frames, --frames wants {frames}")
    before = read[0].height, read[0].width
    scale = max(new / old for new, old in zip(size, before))
    corner = [round((old * scale - new) / 2) for new, old in zip(size, before)]
    lanczos = Image.Resampling.LANCZOS
    cut = [np.array(ImageOps.fit(image, size[::-1], lanczos)) for image in read]
    x = torch.from_numpy(np.stack(cut)).permute(3, 0, 1, 2)
    return x[:, 0] if frames == 1 else x, torch.tensor([*before, *corner, *size])


def check_shape(space, size, frames, folder):
    """Raises UserError for --resolution and --frames that an autoencoder or network cannot take.

    space: of models/vaes.py. folder: the teacher's, for its network's patches.
    """
    if frames > 1 and not space.step:
        raise UserError(f"--frames {frames}: this teacher makes images, leave it out")
    if frames > 1 and (frames - 1) % space.step:
        some = ", ".join(str(1 + k * space.step) for k in range(3))
        raise UserError(f"--frames {frames}: this teacher's videos have {some}, ... frames")
    multiple = space.factor * patch_of(folder)
    if any(side % multiple for side in size):
        raise UserError(f"--resolution {size[0]} {size[1]}: sides must be multiples of {multiple}")


def patch_of(folder):
    """The side of the patches that a pipeline's network cuts latents into; of a U-Net, 1."""
    path = os.path.join(folder, "transformer", "config.json")
    config = load_json(path) if os.path.isfile(path) else {}
    patch = config.get("patch_size") or config.get("all_patch_size") or 1
    return patch[-1] if isinstance(patch, list) else patch


# ---- the file ------------------------------------------------------------------------------------


class RowWriter:
    """A safetensors file whose tensors are written row by row, never as a whole in memory.

    with RowWriter(path, {"fingerprint": "..."}) as file:
        file.add("x0", torch.float16, (n, 4, 32, 32))
        file.write("x0", i, row)            # in any order
        file.note("a line")                 # what is written is safe, and file.notes has the line
    The file is there, complete, when the block ends without an error. Otherwise what was noted is
    in the folder path.partial, and the next RowWriter of this path begins with these rows and
    notes. It must add the same tensors. models/prompts.py has another one's refusal, by the
    fingerprint (`refuse_other`).
    """

    HEADER = 4096  # bytes that are kept for names and shapes

    def __init__(self, path, metadata):
        self.path, self.metadata, self.tensors, self.end = path, metadata, {}, 0
        self.folder = path + PARTIAL
        os.makedirs(self.folder, exist_ok=True)
        self.tmp = os.path.join(self.folder, os.path.basename(path))
        goes_on = (read_header(self.tmp) or {}).get("__metadata__") == metadata
        self.file = open(self.tmp, "r+b" if goes_on else "w+b")
        notes = os.path.join(self.folder, "notes")
        self.journal = open(notes, "a+b" if goes_on else "w+b")  # of bytes, alike on all systems
        self.journal.seek(0)
        text = self.journal.read()
        whole = text[: text.rfind(b"\n") + 1]  # without a line that a killed process began
        self.notes = whole.decode().split("\n")[:-1]
        self.journal.truncate(len(whole))

    def add(self, name, dtype, shape):
        """A further tensor, behind those that are there. dtype: one of DTYPES."""
        row = dtype.itemsize * math.prod(shape[1:])
        self.tensors[name] = dtype, list(shape), self.end, row
        self.end += shape[0] * row
        self._write_header()

    def cut(self, rows):
        """The tensor that was added last has only so many rows after all."""
        name, (dtype, shape, begin, row) = list(self.tensors.items())[-1]
        self.tensors[name] = dtype, [rows, *shape[1:]], begin, row
        self.end = begin + rows * row

    def write(self, name, i, value):
        """Row i of a tensor. value: of the row's shape, and converted to its type."""
        dtype, shape, begin, row = self.tensors[name]
        value = value.detach().to("cpu", dtype).contiguous().expand(shape[1:])
        self.file.seek(8 + self.HEADER + begin + i * row)
        self.file.write(value.reshape(-1).view(torch.uint8).numpy().tobytes())

    def note(self, line):
        self.file.flush()
        self.notes.append(line)
        self.journal.write(f"{line}\n".encode())
        self.journal.flush()

    def _write_header(self):
        shapes = {name: (dtype, shape) for name, (dtype, shape, *_) in self.tensors.items()}
        text = header_bytes(shapes, self.metadata)[8:].ljust(self.HEADER)
        self.file.seek(0)
        self.file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.journal.close()
        if not error:
            self._write_header()
            self.file.truncate(8 + self.HEADER + self.end)
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        if not error:
            os.replace(self.tmp, self.path)
            fsync_folder(os.path.dirname(self.path) or ".")
        if not error or not self.notes:
            shutil.rmtree(self.folder, ignore_errors=True)


def write_pairs(file, pairs, space, size, frames, text_rows):
    """Encode and write x0, cond.NAME (N, ...) and uncond.NAME (1, ...); what fails is skipped.

    file: a RowWriter. pairs: see find_pairs. space: of models/vaes.py. text_rows(captions) -> what
    the network takes, {NAME: (...)}, for each of them and for the negative prompt behind them;
    "size" among it (SDXL) becomes that of each image. Raises UserError.
    """
    shape = latent_shape(space, size, frames)
    file.add("x0", torch.float16, (len(pairs), *shape))
    write_latents(file, pairs, size, frames, space, shape)
    kept = [caption for (_, caption), note in zip(pairs, file.notes) if note != SKIPPED]
    if not kept:
        file.notes.clear()  # nothing to go on with
        raise UserError(f"none of the {len(pairs)} images could be read")
    file.cut(len(kept))
    write_captions(file, kept, len(file.notes) - len(pairs), text_rows)


# Notes of an image that cannot be read and of a caption; of other images their six numbers.
SKIPPED, ENCODED = "skipped", "encoded"


def write_latents(file, pairs, size, frames, space, shape):
    """Those of the images without a note, each of which is noted."""
    done = min(len(file.notes), len(pairs))
    row = done - file.notes[:done].count(SKIPPED)
    if done:
        print(f"{file.path}: going on after {done} of {len(pairs)} images", flush=True)
    for path, _ in progress(pairs[done:], "latents", total=len(pairs), initial=done):
        try:
            x, six = read_pixels(path, size, frames, space.fps)
        except Exception as e:  # Pillow and the others raise errors of many kinds
            if is_passing(e):
                raise
            why = one_line(f"{type(e).__name__}: {e}")[:200]  # ffmpeg says much
            print(f"skipped {path}: {why}", file=sys.stderr)
            file.note(SKIPPED)
            continue
        draw = Draws(0, "posterior", 0, [row])  # the same on every machine
        noise = draw.normal("posterior", shape).to(device())
        file.write("x0", row, space.to_latents(to_unit(x)[None].to(device()), noise)[0])
        file.note(" ".join(map(str, six.tolist())))
        row += 1


def write_captions(file, captions, done, text_rows):
    """cond.NAME and uncond.NAME, see `write_pairs`; of the captions, so many are done."""
    for name, value in next(text_rows([])).items():
        file.add(f"cond.{name}", value.dtype, (len(captions), *value.shape))
        file.add(f"uncond.{name}", value.dtype, (1, *value.shape))
        file.write(f"uncond.{name}", 0, value)
    sizes = [note for note in file.notes if note not in (SKIPPED, ENCODED)]
    rows = zip(range(done, len(captions)), text_rows(captions[done:]))
    for i, row in progress(rows, "captions", total=len(captions), initial=done):
        if "size" in row:
            row["size"] = torch.tensor(list(map(int, sizes[i].split())))
        for name, value in row.items():
            file.write(f"cond.{name}", i, value)
        file.note(ENCODED)
