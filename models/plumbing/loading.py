"""The pictures of --data: found once, decoded when a batch needs them, never all in memory.

`open_pictures` looks once at every picture, which costs as much as decoding all of them, and stores
what it found: names, places, classes, sums of the contents, which files cannot be read. A later
start on the same files reads this index and opens no picture. In training `drawn` gives the rows of
a micro-batch, and threads decode those of the next update meanwhile: which rows these are is known,
since draws are a function of the update's number. Pillow decodes outside Python's lock.
"""

import errno
import hashlib
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from models.files import UserError, open_tensors, path_inside, save_tensors
from models.plumbing.images import as_bytes, read_map, to_square
from models.plumbing.sets import Folder, list_set, open_set, renumbered
from models.progress import progress

KEPT = 2**28  # bytes: a set whose rows are no more than this stays in memory once it is decoded
WORKERS = 8


# ---- rows by their numbers, and rows ahead of time -----------------------------------------------


class Decoded:
    """Rows that are decoded when they are asked for.

    rows[index (B,)] -> uint8 (B, *shape[1:]); rows[i], i an int -> one of them. len(rows),
    rows.shape and rows.dim() are those of all rows together. `ahead` decodes rows before they are
    asked for; `sum`, a text, tells other contents or another cut apart.
    """

    dtype = torch.uint8

    def __init__(self, decode, shape, workers, sum=""):
        """decode: row number -> uint8 tensor; threads call it. shape: (N, ...) of all rows."""
        self.decode, self.shape, self.sum = decode, tuple(shape), sum
        self.kept = {} if math.prod(shape) <= KEPT else None
        self.ahead = Ahead(self, workers)

    def __len__(self):
        return self.shape[0]

    def dim(self):
        return len(self.shape)

    def __getitem__(self, index):
        if isinstance(index, int):
            return self.row(index)
        out = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8)
        for future in self.ahead.fill(out, index):
            future.result()
        return out

    def row(self, i):
        """Row i (an int) -> (*shape[1:])."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        if self.kept is None:
            return self.decode(i)
        if i not in self.kept:
            self.kept[i] = self.decode(i)
        return self.kept[i]


class Ahead:
    """The rows of a micro-batch; those of the same micro-batch of the next update are begun.

    An update that is never made, after the last or in a method that skips some, has its rows
    decoded and dropped. waited: seconds that `rows` has waited for threads.
    """

    def __init__(self, decoded, workers):
        self.decoded, self.workers, self.pool = decoded, workers, None
        self.coming, self.waited = {}, 0.0

    def fill(self, out, index):
        """Decode rows index (B,) into out (B, ...) by threads.  -> futures, to be waited for"""
        if self.pool is None:
            self.pool = ThreadPoolExecutor(self.workers, "pictures")

        def one(k, i):
            out[k] = self.decoded.row(i)

        return [self.pool.submit(one, k, i) for k, i in enumerate(index.tolist())]

    def begin(self, draw, index):
        """-> a batch (B, ...), in pinned memory where it goes to a GPU; what fills it."""
        pinned = draw.device.type == "cuda"
        shape = len(index), *self.decoded.shape[1:]
        out = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        return out, self.fill(out, index)

    def rows(self, draw, name, index):
        """The rows index (B,) that draw.integer(name, N) gave, on the device of the draws."""
        began, step = time.perf_counter(), draw.key[1]
        after = draw.after()
        asked, next_time = ((d.key, name, d.rows[0]) for d in (draw, after))
        self.coming = {k: v for k, v in self.coming.items() if k[0][1] >= step}
        out, futures = self.coming.pop(asked, None) or self.begin(draw, index)
        self.coming[next_time] = self.begin(after, after.integer(name, len(self.decoded)))
        for future in futures:
            future.result()
        self.waited += time.perf_counter() - began
        return out.to(draw.device, non_blocking=True)


def drawn(rows, draw, name, index):
    """Rows of a set for a micro-batch.  -> (B, ...), as they are stored, on the draws' device.

    rows: Decoded, or what index (B,) = draw.integer(name, len(rows)) goes into. Those of the next
    update are begun where the draws are of one.
    """
    if isinstance(rows, Decoded) and isinstance(draw.key[1], int):
        return rows.ahead.rows(draw, name, index)
    return rows[index].to(draw.device)


def tell_waiting(run, rows):
    """Print how long training has waited for pictures, where that is more than 5 per cent of it."""
    waited, seconds = rows.ahead.waited if isinstance(rows, Decoded) else 0.0, run.seconds()
    if waited > max(1, 0.05 * seconds):
        run.say(
            f"training waited {waited:.0f} of {seconds:.0f} s for pictures to be decoded: give "
            "more --workers, or --cache_latents"
        )


# ---- what is found in a set ----------------------------------------------------------------------


@dataclass
class Found:
    """The readable pictures of a set, in the order of their numbers.

    names, places    of sets.py, places (N, 4) int64
    label            (N,) int64; classes: their names
    sums             (N,) int64, of each picture's bytes
    sides            (4,) int64: the least and the largest width, then height
    most             the largest class of the maps but 255; -1 without
    skipped          names of what could not be read
    """

    names: list
    places: Any
    label: Any
    classes: list
    sums: Any
    sides: Any
    most: int
    skipped: list

    def save(self, path, stamp):
        """Write an index. stamp: what it is an index of."""
        blob = json.dumps(self.names).encode()  # names in an LMDB may hold any byte
        names = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        about = dict(stamp=stamp, classes=self.classes, most=self.most, skipped=self.skipped)
        tensors = dict(places=self.places, label=self.label, sums=self.sums, sides=self.sides)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_tensors({"names": names, **tensors}, path, {"about": json.dumps(about)})


def load_found(path, stamp):
    """The index at this path -> Found, None where there is none or of other files."""
    try:
        file = open_tensors(path)
        about = json.loads((file.metadata() or {})["about"])
        if about.pop("stamp") != stamp:
            return None
        names = json.loads(bytes(file.get_tensor("names").numpy()))
        tensors = {k: file.get_tensor(k) for k in ("places", "label", "sums", "sides")}
        return Found(names=names, **tensors, **about)
    except (UserError, KeyError, ValueError, TypeError):
        return None


def stamp_of(files, *how):
    """A hash of names, sizes and times of files, and of how they are read.

    Also of the time at which a file was last put in its place: files of one size and date may have
    been exchanged.
    """
    digest = hashlib.sha256(repr(how).encode())
    for path in files:
        try:
            about = os.stat(path)
        except OSError:  # a link to nothing
            continue
        line = f"{path}\0{about.st_size}\0{about.st_mtime_ns}\0{about.st_ctime_ns}\0"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def map_of(maps, name, where):
    """The path of a picture's map: a PNG of the same relative name."""
    return path_inside(maps, os.path.splitext(name)[0] + ".png", where)


def look_at(source, name, place, maps):
    """Read and decode a picture, and its map.  -> sum of the bytes, width, height, largest class.

    Raises what Pillow raises, and ValueError.
    """
    found = source.read(name, place)
    picture, most = source.picture(found), -1
    if maps:
        known = read_map(map_of(maps, name, source.where), None, picture)
        most = max(known[known != 255].tolist(), default=-1)
    digest = hashlib.blake2b(found, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True), *picture.size, most


# What the system says of too many open files and of a disk that does not answer.
PASSING = {errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOTCONN}


def is_passing(error):
    """Whether it is no fault of the picture that was read, but of the disk or of memory."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in PASSING


def look_at_all(source, members, maps, workers):
    """`look_at` for every member; over several ranks each looks at its own.  -> (N, 5) int64

    A row is what `look_at` gives and 1, or zeros for one that cannot be read, which is named.
    Raises OSError where the disk or the system is at fault.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    seen = torch.zeros(len(members), 5, dtype=torch.int64)

    def look(k):
        try:
            return k, (*look_at(source, *members[k], maps), 1), None
        except Exception as e:  # Pillow raises errors of many kinds; the run goes on after all
            if is_passing(e):
                raise
            return k, (0,) * 5, f"{type(e).__name__}: {' '.join(str(e).split())}"

    own = range(rank, len(members), ranks)
    with ThreadPoolExecutor(workers) as pool:
        how = dict(disable=rank > 0 or len(own) < 2000)
        for first in progress(range(0, len(own), 256), "index of --data, in 256s", **how):
            for k, row, why in pool.map(look, own[first : first + 256]):
                seen[k] = torch.tensor(row)
                if why:
                    print(f"skipped {source.name_of(members[k][0])}: {why}", file=sys.stderr)
    return summed(seen)


def summed(x):
    """A tensor of the CPU summed over ranks."""
    if not dist.is_initialized():
        return x
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    x = x.to(device)
    dist.all_reduce(x)
    return x.cpu()


def find(source, flat, class_in_name, maps, workers):
    """List a set and look at every picture.  -> Found. Raises UserError where nothing is left."""
    members, labels, classes, fixed = list_set(source, flat, class_in_name)
    seen = look_at_all(source, members, maps, workers)
    whole = seen[:, 4].bool()
    if not whole.any():
        with_map = f" with a map in {maps}" if maps else ""
        inside = "it" if flat else f"{len(classes)} class subfolders"
        raise UserError(
            f"--data {source.path}: no readable image{with_map} in {inside} "
            f"({len(members)} files skipped)"
        )
    good = whole.nonzero()[:, 0].tolist()
    if maps:
        refuse_shared_maps(source, [members[k][0] for k in good], maps)
    label, (sums, wide, high, most) = torch.tensor(labels)[whole], seen[whole, :4].T
    if not fixed:
        label, classes = renumbered(label, classes)
    return Found(
        names=[members[k][0] for k in good],
        places=torch.tensor([members[k][1] for k in good]),
        label=label,
        classes=list(classes),
        sums=torch.tensor(sums.tolist()),
        sides=torch.stack([wide.min(), wide.max(), high.min(), high.max()]),
        most=int(most.max()),
        skipped=[members[k][0] for k in (~whole).nonzero()[:, 0].tolist()],
    )


def refuse_shared_maps(source, names, maps):
    """Raises UserError where two pictures, such as x.png and x.jpg, would have the same map."""
    first = {}
    for name in names:
        path = map_of(maps, name, source.where)
        other = first.setdefault(path, name)
        if other != name:
            raise UserError(
                f"{source.where}: {other} and {name} would share the map {path}: rename one of "
                "them, and give it a map of its own"
            )


def indexed(source, index, flat, class_in_name, maps, workers):
    """`find`, or what it found last time.  -> Found

    index: the file that keeps it, None for none. All ranks look again if one of them has to.
    """
    if isinstance(source, Folder):
        source.members()  # which files there are
    theirs = [map_of(maps, name, source.where) for name, _ in source.members()] if maps else []
    stamp = stamp_of([*source.files, *theirs], flat, class_in_name, source.kind)
    found = load_found(index, stamp) if index else None
    if bool(summed(torch.tensor(float(found is None)))):
        found = find(source, flat, class_in_name, maps, workers)
        if index and (not dist.is_initialized() or dist.get_rank() == 0):
            try:
                found.save(index, stamp)
            except OSError as e:
                print(f"the index {index} cannot be written ({e}): the next start looks at all "
                      "pictures again", file=sys.stderr)  # fmt: skip
    return found


def index_path(args):
    """Where the index of --data is kept: beside the run's folder, for all runs there.  -> path"""
    source, folder = os.path.abspath(args.data), os.path.dirname(os.path.abspath(args.output_dir))
    how = source, getattr(args, "task", None), getattr(args, "maps", None), args.class_in_name
    name = f"{os.path.basename(source)}-{hashlib.sha256(repr(how).encode()).hexdigest()[:8]}"
    return os.path.join(folder, "indexes", f"{name}.safetensors")


def open_pictures(
    path, size, flat=False, maps=None, crop="lanczos", class_in_name=False, workers=WORKERS,
    index=None,
):  # fmt: skip
    """The pictures of a set as squares, with their classes, and their maps if there are any.

    flat: without classes. maps: a folder with a PNG of the same relative name for each picture.
    crop: see images.CROPS. class_in_name: see sets.list_set. index: see `indexed`.
    -> x, Decoded (N, 3, size, size); label (N,) int64; names of the classes; maps, Decoded
    (N, size, size) whose `most` is their largest class, or None. What cannot be read is named on
    stderr and skipped, a file that is reached twice through links counts once, and a class without
    pictures gets no label. Raises UserError.
    """
    source = open_set(path, flat)
    found = indexed(source, index, flat, class_in_name, maps, workers)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(describe(source, found, flat))

    def picture(i):
        name, place = found.names[i], tuple(found.places[i].tolist())
        try:
            return as_bytes(to_square(source.picture(source.read(name, place)), size, crop))
        except Exception as e:
            raise changed(source, name, e) from None

    def numbers(i):
        name = found.names[i]
        try:
            return read_map(map_of(maps, name, source.where), size)
        except Exception as e:
            raise changed(source, name, e) from None

    digest = hashlib.sha256(found.sums.numpy().tobytes()).hexdigest()
    shape = (len(found.names), 3, size, size)
    x = Decoded(picture, shape, workers, f"{digest} {size} {crop}")
    numbers = Decoded(numbers, (shape[0], size, size), workers) if maps else None
    if maps:
        numbers.most = found.most
    return x, found.label, found.classes, numbers


def changed(source, name, error):
    """The UserError for a picture that could be read when the index was made."""
    return UserError(
        f"{source.name_of(name)} was read before and cannot be read now "
        f"({type(error).__name__}: {error}): restore it and go on, or begin anew without it"
    )


def describe(source, found, flat):
    """What a set has, in a line."""
    wide, widest, high, highest = found.sides.tolist()
    sizes = f"{wide} x {high}"
    if (wide, high) != (widest, highest):
        sizes = f"{wide} to {widest} pixels wide and {high} to {highest} high"
    classes = "without classes" if flat else f"of {len(found.classes)} classes"
    skipped = f", {len(found.skipped)} skipped" if found.skipped else ""
    skipped += f", such as {found.skipped[0]}" if found.skipped else ""
    text = f"{source.where}: {source.kind} with {len(found.names):,} pictures {classes}, {sizes}"
    return text + skipped
