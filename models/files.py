"""Safe files and the two errors of a run.

Files are JSON or safetensors, never pickles, and are never left half-written.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets

import torch
from safetensors import SafetensorError, safe_open


class UserError(Exception):
    """Wrong input: the message names the cause and the remedy in one line. Exit code 2.

    What a damaged file has in place of a name may be long: such a message loses its middle.
    """

    def __init__(self, text):
        super().__init__(text if len(text) < 1500 else f"{text[:700]} ... {text[-700:]}")


class TrainingError(Exception):
    """Training cannot go on (a loss is not finite). Exit code 1."""


def temporary(path):
    """A name beside path that nobody else writes to.

    Processes of two containers may have the same number, on one disk.
    """
    return f"{path}.tmp-{os.getpid()}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def replacing(path, mode="wb", **how):
    """A file to write, so that, whatever happens, `path` holds either the old or the new content.

    The bytes go to a temporary file beside it, which is flushed to disk and renamed when the block
    ends, and removed where it ends with an error. mode, how: as for `open`.
    """
    tmp = temporary(path)
    file = open(tmp, mode, **how)
    whole = False
    try:
        yield file
        whole = True
    finally:
        put_in_place(file, tmp, path, whole)


def put_in_place(file, tmp, path, whole, size=None):
    """Close a file that was written as tmp: it is path if it is whole and gets onto the disk.

    Otherwise it is removed, which on a full disk leaves room to go on with. size: bytes that it is
    to have, None: as many as it has.
    """
    try:
        if whole:
            if size is not None:
                file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        whole = False
        raise
    finally:
        with contextlib.suppress(OSError):  # closing flushes too
            file.close()
        if not whole:
            with contextlib.suppress(OSError):  # another rank may have removed its folder
                os.remove(tmp)
    if whole:
        os.replace(tmp, path)
        fsync_folder(os.path.dirname(path) or ".")


def atomic_write(path, data):
    """Write bytes as `replacing` does."""
    with replacing(path) as f:
        f.write(data)


def fsync_folder(folder):
    """Flush the folder's entries to disk, so that renames in it survive a power cut.

    Windows cannot open a folder, and some network disks refuse to flush one.
    """
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def save_json(value, path):
    """Write an atomic JSON file, indented."""
    atomic_write(path, (json.dumps(value, indent=2) + "\n").encode())


def load_json(path):
    """Read one JSON object -> dict. Raises UserError if there is none in the file, or no file."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError, OSError) as e:  # ValueError: no JSON, or no UTF-8
        raise UserError(
            f"{path} is not readable JSON ({e}): restore it from the source of the checkpoint"
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"{path} is not a JSON object: restore it from the source of the checkpoint"
        )
    return value


def fingerprint(paths, pieces=64, size=2**16):
    """A short hash of files: their sizes, and pieces spread over each of them.

    It tells other content apart without reading all of it; up to pieces * size bytes are all read.
    """
    digest = hashlib.sha256()
    for path in paths:
        length = os.path.getsize(path)
        digest.update(f"{length} ".encode())
        with open(path, "rb") as f:
            for k in range(pieces):
                at = k * size if length <= pieces * size else k * (length - size) // (pieces - 1)
                f.seek(at)
                digest.update(f.read(size))
    return digest.hexdigest()[:16]


def path_inside(folder, name, where):
    """The path of a file that another file names. where: that one, for the message.

    Raises UserError for a name that leads out of the folder.
    """
    parts = str(name).replace("\\", "/").split("/")
    drive = re.match(r"[A-Za-z]:", parts[0])  # of Windows
    if not isinstance(name, str) or os.path.isabs(name) or ".." in parts or drive:
        raise UserError(f"{where} names {name!r}, which is not in {folder}: name files inside it")
    return os.path.join(folder, name)


class TensorWriter:
    """A safetensors file that is written tensor by tensor: never more than one of them in memory.

    with TensorWriter(path, {name: (dtype, shape)}, metadata) as file:
        file.write(name, value)            # in any order
    The file is there, complete, when the block ends without an error, and otherwise is not. path
    None: nothing is written, for ranks that only take part in gathering a value.
    """

    def __init__(self, path, about, metadata=None):
        self.path, self.places, end = path, {}, 0
        header = {"__metadata__": metadata} if metadata else {}
        # the widest numbers first, so that each tensor begins at a multiple of its numbers' size
        for name in sorted(about, key=lambda k: (-about[k][0].itemsize, k)):
            dtype, shape = about[name]
            self.places[name] = dtype, tuple(shape), end
            size = dtype.itemsize * math.prod(shape)
            offsets = [end, end + size]
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.begin, self.size, self.written = 8 + len(text), end, set()
        if path is not None:
            self.tmp = temporary(path)
            self.file = open(self.tmp, "wb")
            self.file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name, value):
        """value: a tensor of the shape that was announced, converted to the dtype announced."""
        dtype, shape, place = self.places[name]
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, announced was {shape}")
        self.written.add(name)
        if self.path is None:
            return
        value = value.detach().to("cpu", dtype).contiguous()
        self.file.seek(self.begin + place)
        self.file.write(memoryview(value.reshape(-1).view(torch.uint8).numpy()))

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        missing = sorted(self.places.keys() - self.written)
        if self.path is None:
            return
        whole = not error and not missing
        put_in_place(self.file, self.tmp, self.path, whole, self.begin + self.size)
        if missing and not error:
            raise ValueError(f"{self.path}: {missing[0]!r} was never written")


def save_tensors(tensors, path, metadata=None):
    """Write an atomic safetensors file of {name: tensor}; metadata is a dict of strings.

    A tensor that has several names is written under each.
    """
    about = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    with TensorWriter(path, about, metadata) as file:
        for name, value in tensors.items():
            file.write(name, value)


DTYPES = {  # names of the file format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def open_tensors(path):
    """safe_open(path), with a UserError for anything that is not a whole safetensors file."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        head = first_bytes(path)
        if head in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04"):
            raise UserError(
                f"{path} is a pickle, not safetensors; pickles can run code and are never loaded: "
                "convert it"
            ) from None
        raise UserError(
            f"{path} is truncated or not a safetensors file ({e}): copy or download it again"
        ) from None


def start_of_data(path):
    """Where the header of a safetensors file ends, in bytes; its first tensor begins there."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def open_own(path):
    """`open_tensors` of a file that the run itself can make again."""
    try:
        return open_tensors(path)
    except UserError as e:
        if not os.path.isfile(path):
            raise
        raise UserError(f"{e}, or remove it, and it is made again") from None


def first_bytes(path):
    """Two of them. Raises UserError for a file that cannot be read."""
    try:
        with open(path, "rb") as f:
            return f.read(2)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): chmod it, or copy it") from None


def load_tensors(path):
    """All tensors of a safetensors file -> {name: tensor on the CPU}. Raises UserError."""
    with open_tensors(path) as f:
        return {k: f.get_tensor(k) for k in f.keys()}
