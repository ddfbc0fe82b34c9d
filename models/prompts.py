"""Prompts as they lie on disk: rows as long as their prompts, in one file or in several shards.

    cond.offsets  (N + 1,)  int64: prompt i is rows offsets[i] to offsets[i + 1] of cond.NAME
    uncond.NAME   (n, D)    the negative prompt's tokens
    cond.NAME     (M, D)    the tokens of all prompts, one prompt after the other
    metadata      padded_to, the tokens of a prompt in a batch, zeros behind its own; mask, the name
                  under which the network takes the mask of a prompt's own, "" where it takes none;
                  beside, names of what a prompt has once (SDXL's pooled and size), as cond.NAME
                  (N, P) and uncond.NAME (1, P), left out where there are none

Where no prompt is shorter and there is no mask, nothing is to be left out, and the tensors are
uncond.NAME (1, L, D) and cond.NAME (N, L, D) without offsets. Files of that form with masks beside
them, which have the padding in them, are read too.

What is larger than a shard lies in FILE-00001-of-00007.safetensors and so on, each a file of this
form with its own offsets, beside FILE.safetensors.index.json, which names them. FILE.safetensors
names them all. While they are written they lie in the folder FILE.safetensors.partial.
"""

import bisect
import contextlib
import json
import math
import os
import re
import shutil

import torch

from models.files import DTYPES, UserError, fsync_folder, load_json, open_tensors, save_json

INDEX, PARTIAL = ".index.json", ".partial"

# ---- writing -------------------------------------------------------------------------------------


def split_rows(lengths, most):
    """Consecutive prompts with at most `most` tokens together, or one.  -> [(first, end)]

    lengths: (N,) int64, the tokens of each prompt.
    """
    ends, shards = lengths.cumsum(0), []
    while not shards or shards[-1][1] < len(lengths):
        first = shards[-1][1] if shards else 0
        before = int(ends[first - 1]) if first else 0
        end = int(torch.searchsorted(ends, before + most, right=True))
        shards.append((first, max(first + 1, end)))
    return shards


def header_bytes(tensors, metadata):
    """The beginning of a safetensors file. tensors: {name: (dtype, shape)}, in the data's order."""
    about, end = {"__metadata__": metadata}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        about[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(about).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text


def bytes_of(x):
    """The bytes of a tensor on the CPU, as safetensors has them."""
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class PromptWriter:
    """Prompts, written one after the other; what is on disk already is gone on with.

    with PromptWriter(path, "text", lengths, uncond, metadata, shard_bytes) as writer:
        for row in rows[writer.done :]:
            writer.write(row)           # (its length, D)
    The file, or the index, is there when the block ends without an error. The header of a shard is
    written first, as all lengths are known, and rows are appended: the size of what a killed
    process leaves behind tells which prompts are whole. What a prompt has once has its place before
    all rows, and is written before the prompt's own.
    """

    def __init__(self, path, name, lengths, uncond, metadata, shard_bytes, beside=None):
        """lengths: (N,) int64. uncond: (n, D), the negative prompt's tokens. metadata: strings.

        metadata has padded_to, mask and fingerprint. shard_bytes: the most of a shard's tokens, up
        to the last prompt. beside: {NAME: (P,)}, what the negative prompt has once. Raises
        UserError for an interrupted run that had others.
        """
        self.path, self.name, self.lengths = path, name, lengths
        self.uncond, self.metadata, self.file = uncond.cpu(), metadata, None
        # Larger numbers first, so that all of them are aligned.
        self.beside = dict(sorted((beside or {}).items(), key=lambda pair: -pair[1].itemsize))
        if self.beside:
            self.metadata = {**metadata, "beside": " ".join(self.beside)}
        self.row = uncond[0].numel() * uncond.dtype.itemsize  # bytes of a token
        padded_to = int(metadata["padded_to"])
        same = bool((lengths == padded_to).all()) and len(uncond) == padded_to
        self.dense = same and not metadata["mask"]
        self.shards = split_rows(lengths, shard_bytes // self.row)
        self.done = self._find()

    def shard_name(self, k):
        base, many = os.path.basename(self.path), len(self.shards)
        stem = base.removesuffix(".safetensors")
        return base if many == 1 else f"{stem}-{k + 1:05d}-of-{many:05d}.safetensors"

    def head(self, k):
        """How shard k begins: header and offsets, as bytes; {name: where its tensor begins}."""
        first, end = self.shards[k]
        lengths, shape = self.lengths[first:end], list(self.uncond.shape[1:])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        dtype, tokens = self.uncond.dtype, int(offsets[-1])
        if self.dense:
            tensors, offsets = {}, offsets[:0]
            un, cond = [1, *self.uncond.shape], [end - first, *self.uncond.shape]
        else:
            tensors = {"cond.offsets": (torch.int64, [len(offsets)])}
            un, cond = list(self.uncond.shape), [tokens, *shape]
        for name, value in self.beside.items():
            for key, rows in ((f"uncond.{name}", 1), (f"cond.{name}", end - first)):
                tensors[key] = (value.dtype, [rows, *value.shape])
        tensors |= {f"uncond.{self.name}": (dtype, un), f"cond.{self.name}": (dtype, cond)}
        header, at = header_bytes(tensors, self.metadata), {}
        place = len(header)
        for name, (dtype, shape) in tensors.items():
            at[name], place = place, place + dtype.itemsize * math.prod(shape)
        return header + bytes_of(offsets), at

    def _place(self, k):
        """Where shard k is, or is to be: a run may have been killed while it moved its shards."""
        name = self.shard_name(k)
        partial = os.path.join(self.path + PARTIAL, name)
        moved = os.path.join(os.path.dirname(self.path), name)
        if os.path.exists(partial) or not os.path.exists(moved):
            return partial
        whole = self.row * int(self.lengths[slice(*self.shards[k])].sum())
        head, at = self.head(k)
        with open(moved, "rb") as f:
            known = f.read(len(head)) == head
        size = at[f"cond.{self.name}"] + whole
        return moved if known and os.path.getsize(moved) == size else partial

    def _find(self):
        """How many prompts lie whole on disk; a part of another one is cut off."""
        refuse_other(self.path, self.metadata["fingerprint"])
        for k, (first, end) in enumerate(self.shards):
            path, (head, at) = self._place(k), self.head(k)
            before = at[f"cond.{self.name}"]
            if not os.path.exists(path) or os.path.getsize(path) < before:
                return first
            with open(path, "rb") as f:
                if f.read(len(head)) != head:
                    raise other_run(self.path)
            tokens = (os.path.getsize(path) - before) // self.row
            ends = self.lengths[first:end].cumsum(0)
            whole = int(torch.searchsorted(ends, tokens, right=True))
            if whole < end - first:
                os.truncate(path, before + self.row * (int(ends[whole - 1]) if whole else 0))
                return first + whole
        return len(self.lengths)

    def _open(self, k):
        """Shard k, begun if it is not on disk yet."""
        os.makedirs(self.path + PARTIAL, exist_ok=True)
        head, self.at = self.head(k)
        is_new = self.done == self.shards[k][0]
        self.file = open(self._place(k), "wb" if is_new else "r+b")
        if is_new:
            self.file.write(head)
            for name, value in [*self.beside.items(), (self.name, self.uncond)]:
                self.file.seek(self.at[f"uncond.{name}"])  # what is skipped is zero
                self.file.write(bytes_of(value))

    def write(self, text, **beside):
        """The next prompt's tokens, (its length, D), and what it has once, each (P,)."""
        k = bisect.bisect_right([first for first, _ in self.shards], self.done) - 1
        (first, end), length = self.shards[k], int(self.lengths[self.done])
        wanted = {self.name: self.uncond.new_empty(length, *self.uncond.shape[1:]), **self.beside}
        for name, value in {self.name: text, **beside}.items():
            like = wanted.pop(name)
            if value.shape != like.shape or value.dtype != like.dtype:
                raise ValueError(
                    f"prompt {self.done}: {name} is {value.dtype} {tuple(value.shape)}: not "
                    f"{like.dtype} {tuple(like.shape)}"
                )
        if wanted:
            raise ValueError(f"prompt {self.done}: no {' and no '.join(wanted)}")
        if self.file is None:
            self._open(k)
        for name, value in beside.items():
            row = value.numel() * value.itemsize
            self.file.seek(self.at[f"cond.{name}"] + row * (self.done - first))
            self.file.write(bytes_of(value))
        self.file.seek(0, os.SEEK_END)
        self.file.write(bytes_of(text))
        self.file.flush()
        self.done += 1
        if self.done == end:
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if self.file:  # something went wrong; what is whole is for another time
            self.file.close()
        if not error:
            self._finish()

    def _finish(self):
        """All prompts are there: give them their place, instead of what was there."""
        folder, index = os.path.dirname(self.path) or ".", self.path + INDEX
        names = [self.shard_name(k) for k in range(len(self.shards))]
        stale = set()
        if os.path.exists(index):
            with contextlib.suppress(UserError):  # of an index that is broken
                stale = {entry["file"] for entry in shards_of(index)}
            os.remove(index)
        entries = []
        for k, (name, (first, end)) in enumerate(zip(names, self.shards)):
            place, final = self._place(k), os.path.join(folder, name)
            if place != final:
                os.replace(place, final)
            entries.append({"file": name, "rows": end - first, "bytes": os.path.getsize(final)})
        fsync_folder(folder)
        if len(names) > 1:
            total = {"total_size": sum(entry["bytes"] for entry in entries)}
            save_json({"metadata": {**total, **self.metadata}, "shards": entries}, index)
            stale.add(os.path.basename(self.path))
        for name in stale - set(names):
            if os.path.exists(os.path.join(folder, name)):
                os.remove(os.path.join(folder, name))
        shutil.rmtree(self.path + PARTIAL, ignore_errors=True)


def read_header(path):
    """The header of a safetensors file, whole or not -> dict; None where it has none yet."""
    try:
        with open(path, "rb") as f:
            return json.loads(f.read(min(2**27, int.from_bytes(f.read(8), "little"))))
    except (OSError, ValueError):
        return None


def other_run(path):
    return UserError(
        f"{path}{PARTIAL} is of an interrupted python -m models.encode with other prompts or "
        "settings: give that command again, remove the folder, or name another --output"
    )


def refuse_other(path, fingerprint):
    """Raises UserError if what an interrupted run left behind for path has another fingerprint."""
    folder = path + PARTIAL
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        header = read_header(os.path.join(folder, name))
        if header and header.get("__metadata__", {}).get("fingerprint") != fingerprint:
            raise other_run(path)


def is_complete(path, fingerprint):
    """Whether the prompts at path are whole and have this fingerprint."""
    try:
        return (open_prompts(path).metadata() or {}).get("fingerprint") == fingerprint
    except UserError:
        return False


# ---- reading -------------------------------------------------------------------------------------


class PaddedRows:
    """A tensor of one or more shards, with its padding: read like a slice of safe_open.

    rows[a:b] -> (b - a, L, D) of these prompts, read from disk now.
    """

    def __init__(self, slices, offsets, length):
        """slices: of each shard, (M, D), or (n, L, D) where offsets are None.

        offsets: of each shard, (n + 1,) int64. length: L.
        """
        self.slices, self.offsets = slices, offsets
        counts = [s.get_shape()[0] if o is None else len(o) - 1 for s, o in zip(slices, offsets)]
        self.starts = [sum(counts[:k]) for k in range(len(counts))]
        shape = slices[0].get_shape()
        self.shape = [sum(counts), *(shape[1:] if offsets[0] is None else [length, *shape[1:]])]

    def get_shape(self):
        return self.shape

    def get_dtype(self):
        return self.slices[0].get_dtype()

    def row(self, i):
        """The tokens of prompt i, (its length, D)."""
        k = bisect.bisect_right(self.starts, i) - 1
        i, rows, offsets = i - self.starts[k], self.slices[k], self.offsets[k]
        if offsets is None:
            return rows[i : i + 1][0]
        begin, end = offsets[i : i + 2].tolist()
        return rows[begin:end]

    def __getitem__(self, rows):
        index = range(*rows.indices(self.shape[0]))
        padded = self.slices[0][0:0].new_zeros(len(index), *self.shape[1:])
        for place, i in zip(padded, index):  # no torch.stack: autocast refuses it for float16
            text = self.row(i)
            place[: len(text)] = text
        return padded


class MaskRows:
    """The mask of prompts, made from their lengths: rows[a:b] -> (b - a, L) bool."""

    def __init__(self, lengths, length):
        self.lengths, self.shape = lengths, [len(lengths), length]

    def get_shape(self):
        return self.shape

    def get_dtype(self):
        return "BOOL"

    def __getitem__(self, rows):
        return torch.arange(self.shape[1]) < self.lengths[rows][:, None]


class PromptFile:
    """Prompts without their padding, or in shards, with the methods of one padded safe_open."""

    def __init__(self, where, files):
        """where: what error messages begin with. files: the open shards. Raises UserError."""
        self.about, self.slices = files[0].metadata() or {}, {}
        if any((f.metadata() or {}) != self.about for f in files):
            raise UserError(f"{where}: its shards are of different encodings: encode all again")
        keys = set(files[0].keys())
        if any(set(f.keys()) != keys for f in files):
            raise broken(where, "its shards have different tensors")
        beside = keys if "cond.offsets" not in keys else self.once(keys)
        for key in sorted(beside):
            parts = [f.get_slice(key) for f in files]
            parts = parts if key.startswith("cond.") else parts[:1]
            self.slices[key] = PaddedRows(parts, [None] * len(parts), None)
        if "cond.offsets" not in keys:
            return
        if not self.about.get("padded_to", "").isdecimal():
            raise broken(where, "no padded_to in its metadata")
        offsets = [f.get_tensor("cond.offsets") for f in files]
        for key in sorted(keys - beside - {"cond.offsets"}):
            parts, at = [f.get_slice(key) for f in files], offsets
            if not key.startswith("cond."):  # one row, the same in all shards
                parts, at = parts[:1], [torch.tensor([0, parts[0].get_shape()[0]])]
            self._add(where, key, parts, at)

    def once(self, keys):
        """Those of the keys that a prompt has once."""
        names = self.about.get("beside", "").split()
        return {key for key in keys if key.partition(".")[2] in names}

    def _add(self, where, key, slices, offsets):
        """The rows called key, and the mask that goes with them."""
        length, mask = int(self.about["padded_to"]), self.about.get("mask")
        check_offsets(where, slices, offsets, length)
        self.slices[key] = PaddedRows(slices, offsets, length)
        if mask:
            lengths = torch.cat([at.diff() for at in offsets])
            self.slices[f"{key.partition('.')[0]}.{mask}"] = MaskRows(lengths, length)

    def keys(self):
        return list(self.slices)

    def metadata(self):
        return self.about

    def get_slice(self, key):
        return self.slices[key]

    def get_tensor(self, key):
        return self.slices[key][:]


def broken(where, why):
    return UserError(
        f"{where} is not as python -m models.encode writes it ({why}): encode it again"
    )


def check_offsets(where, slices, offsets, length):
    """Raises UserError unless offsets grow from 0 to the rows of each shard, by at most length."""
    for rows, at in zip(slices, offsets):
        if at.dtype != torch.int64 or at.dim() != 1 or len(at) < 2:
            raise broken(where, f"offsets are {at.dtype} {list(at.shape)}")
        if at[0] != 0 or at[-1] != rows.get_shape()[0]:
            raise broken(where, f"offsets from {at[0]} to {at[-1]}, {rows.get_shape()[0]} rows")
        if at.diff().min() < 1 or at.diff().max() > length:
            raise broken(where, f"prompts of {at.diff().min()} to {at.diff().max()} tokens")


def shards_of(index):
    """The entries of an index -> [{"file", "rows", "bytes"}]. Raises UserError."""
    entries = load_json(index).get("shards")
    right = isinstance(entries, list) and entries and all(isinstance(e, dict) for e in entries)
    for key, kind in {"file": str, "rows": int, "bytes": int}.items():
        right = right and all(type(entry.get(key)) is kind for entry in entries)
    if not right or any(os.path.basename(e["file"]) != e["file"] for e in entries):
        raise broken(index, "no list of shards")
    return entries


def open_prompts(path):
    """Prompts as one padded safe_open: keys(), get_slice(key), get_tensor(key), metadata().

    path: one file, the name of a set of shards, or its index. Only headers and offsets are read.
    Raises UserError for files that are missing, truncated or not of one set.
    """
    path = str(path)
    index = path if path.endswith(INDEX) else path + INDEX
    if os.path.isfile(index) and index != path and os.path.isfile(path):
        raise UserError(
            f"{path} and {index} are both there, and either may be meant: remove the other"
        )
    if os.path.isfile(index):
        return PromptFile(index.removesuffix(INDEX), open_shards(index))
    if not os.path.isfile(path) and os.path.isdir(path + PARTIAL):
        raise UserError(
            f"{path} is not finished: give the python -m models.encode that left {path}{PARTIAL} "
            "again, and it goes on"
        )
    refuse_unencoded(path)
    file = open_tensors(path)
    numbered = re.search(r"-\d{5}-of-\d{5}(?=\.safetensors$)", path)
    if numbered and "fingerprint" in (file.metadata() or {}):
        stem = path[: numbered.start()]
        whole = stem if os.path.isfile(stem + INDEX) else f"{stem}.safetensors"
        raise UserError(f"{path} is one shard of several: pass {whole}, the name of them all")
    return PromptFile(path, [file]) if "cond.offsets" in file.keys() else file


def refuse_unencoded(path):
    """Raises UserError for a folder, and for prompts that are still text."""
    if os.path.isdir(path):
        inside = [name for name in sorted(os.listdir(path)) if name.endswith(".safetensors")]
        inside = f": give a file, such as {os.path.join(path, inside[0])}" if inside else ""
        raise UserError(f"{path} is a folder, not a file of encoded prompts{inside}")
    texts = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
    if os.path.isfile(path) and path.lower().endswith(texts):
        raise UserError(
            f"{path} is no safetensors file: python -m models.encode makes one of a list of prompts"
        )


def open_shards(index):
    """The files that an index names -> list of safe_open. Raises UserError."""
    files, entries = [], shards_of(index)
    for k, entry in enumerate(entries, 1):
        path = os.path.join(os.path.dirname(index), entry["file"])
        of = f"shard {k} of {len(entries)} of {index}"
        if not os.path.isfile(path):
            raise UserError(f"{path}, {of}, does not exist: copy it again, or encode all again")
        if os.path.getsize(path) != entry["bytes"]:
            raise UserError(
                f"{path}, {of}, has {os.path.getsize(path)} bytes instead of {entry['bytes']}: "
                "copy it again, or encode all again"
            )
        files.append(open_tensors(path))
    return files
