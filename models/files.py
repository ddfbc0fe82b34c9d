"""Safe files and the two errors of a run.

Files are JSON or safetensors, never pickles, and are never left half-written.
"""

import json
import os

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes


class UserError(Exception):
    """Wrong input: the message names the cause and the remedy in one line. Exit code 2."""


class TrainingError(Exception):
    """Training cannot go on (a loss is not finite). Exit code 1."""


def atomic_write(path, data):
    """Write bytes so that, whatever happens, `path` holds either the old or the new content.

    The bytes go to a temporary file beside it, which is flushed to disk and renamed.
    """
    tmp = f"{path}.tmp-{os.getpid()}"
    with open(tmp, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)
    fsync_folder(os.path.dirname(path) or ".")


def fsync_folder(folder):
    """Flush the folder's entries to disk, so that renames in it survive a power cut."""
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
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as e:
        raise UserError(
            f"{path} is not readable JSON ({e}): restore it from the source of the checkpoint"
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"{path} is not a JSON object: restore it from the source of the checkpoint"
        )
    return value


def save_tensors(tensors, path, metadata=None):
    """Write an atomic safetensors file of {name: tensor}; metadata is a dict of strings."""
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    atomic_write(path, safetensors_bytes(tensors, metadata=metadata))


def open_tensors(path):
    """safe_open(path), with a UserError for anything that is not a whole safetensors file."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        with open(path, "rb") as f:
            head = f.read(2)
        if head in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04"):
            raise UserError(
                f"{path} is a pickle, not safetensors; pickles can run code and are never loaded: "
                "convert it"
            ) from None
        raise UserError(
            f"{path} is truncated or not a safetensors file ({e}): copy or download it again"
        ) from None


def load_tensors(path):
    """All tensors of a safetensors file -> {name: tensor on the CPU}. Raises UserError."""
    with open_tensors(path) as f:
        return {k: f.get_tensor(k) for k in f.keys()}
