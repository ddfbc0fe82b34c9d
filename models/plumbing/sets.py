"""Sets of pictures in the forms that people have: which pictures there are, and their classes.

    folders     a tree of images; with dataset.json, as EDM's and StyleGAN's dataset_tool write it
    FILE.zip    the same in an archive
    FILE.tar    webdataset: KEY.jpg beside KEY.cls or KEY.json; or a folder of such shards
    LMDB        LSUN's: a folder with data.mdb, or such a file; needs the library lmdb
    *.parquet   a column of encoded images and one of labels; needs the library pyarrow
    FILE.npz    arr_0 uint8 (N, H, W, 3), and arr_1 (N,) class numbers, as guided-diffusion writes

Nothing is unpacked: names in an archive are labels, never paths, and a picture's bytes are read
into memory when it is asked for. Every form is a class with the same attributes:

    path, kind  what --data names, and the form in words
    files       the real files, whose sizes and times tell whether the set has changed
    members()   -> [(name, place)] in a fixed order; place: 4 integers, where the bytes lie
    read()      name, place -> the encoded picture; threads may call it together
    picture()   what read gives -> PIL image in RGB
    labels      {name: class number} where the form has its own, else None; set by members()
    classes     names of these classes, or None
    captions()  {name: text} of the pictures that have one, in archives and parquet files: KEY.txt
                beside KEY.jpg, "caption" or "text" of KEY.json in tar shards, a column of texts
"""

import importlib
import json
import os
import re
import struct
import tarfile
import threading
import zipfile
import zlib
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from models.files import UserError, load_json, path_inside
from models.plumbing.images import class_folders, files_below, is_image, read_frames

LARGEST = 2**28  # bytes of one encoded picture: an archive of a few KB can claim to hold more
DESCRIBED = "dataset.json"
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
WITHOUT_CLASSES = "train without classes (latent_fm.py --task uncond takes all images of a folder)"


def is_missing(library, error):
    """Whether an ImportError is of the library itself, and not of something that it imports."""
    return library.startswith(error.name or "-")  # it, or the package that it is in


def require(library, what):
    """Import an optional library. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(library)
    except ImportError as e:
        if is_missing(library, e):
            raise UserError(f"{what} needs the library {library}: pip install {library}") from None
        raise UserError(
            f"{what} needs the library {library}, which is installed and cannot be imported ({e}): "
            f"pip install -U {library}"
        ) from None


def like_a_folder(name):
    """Sorts names as a walk through a tree meets them: a folder's files before its subfolders."""
    *folders, file = name.split("/")
    return [*((1, part) for part in folders), (0, file)]


def visible(name):
    """Whether no folder on the way is hidden, nor what macOS puts beside each file."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")[:-1])


def within_bounds(size):
    """Raises ValueError for more bytes than a picture may have."""
    if size > LARGEST:
        raise ValueError(f"{size:,} bytes, more than {LARGEST:,}")


def read_part(path, offset, size):
    """So many bytes of a file. Raises ValueError where it ends before."""
    within_bounds(size)
    with open(path, "rb") as f:
        f.seek(offset)
        found = f.read(size)
    if len(found) != size:
        raise ValueError("the file ends within it")
    return found


def is_text(name):
    """Whether the name is that of a caption."""
    return name.lower().endswith(".txt")


def decoded(found):
    """The bytes of a text file -> str."""
    return found.decode("utf-8-sig", "replace")  # without a byte order mark


def is_string(types, kind):
    """Whether a column of parquet holds texts. types: pyarrow.types."""
    return types.is_string(kind) or types.is_large_string(kind)


class Form:
    """What the forms share: encoded pictures without labels."""

    labels = classes = None

    def __init__(self, path, files):
        self.path, self.files, self.where = path, files, f"--data {path}"

    def name_of(self, name):
        """A picture's name in a message."""
        return f"{self.path}: {name}"

    def described(self):
        """What the set's dataset.json holds, a dict, or None."""
        return None

    def picture(self, found):
        return read_frames(found)[0]

    def captions(self):
        """{name: text}; once members() has been called."""
        return {}


class Folder(Form):
    """A tree of images. Class folders may be links; the order is that of a sorted walk."""

    kind = "a folder"

    def __init__(self, path, flat):
        super().__init__(path, None)
        self.flat = flat

    def name_of(self, name):
        return os.path.join(self.path, name)

    def members(self):
        if self.files is None:
            self.files = self.walk()
        names = [os.path.relpath(path, self.path).replace(os.sep, "/") for path in self.files]
        return [(name, (0, 0, 0, 0)) for name in names]

    def walk(self):
        """Paths of all files that may be pictures, and dataset.json."""
        if self.flat or os.path.isfile(os.path.join(self.path, DESCRIBED)):
            return list(files_below(self.path))
        tops = [os.path.join(self.path, name) for name in sorted(os.listdir(self.path))]
        paths, seen = list(filter(os.path.isfile, tops)), set()
        for name in class_folders(self.path):
            for path in files_below(os.path.join(self.path, name)):
                real = os.path.realpath(path)
                if real not in seen:  # links from one class to another
                    seen.add(real)
                    paths.append(path)
        return paths

    def described(self):
        path = os.path.join(self.path, DESCRIBED)
        return load_json(path) if os.path.isfile(path) else None

    def read(self, name, place):
        path = os.path.join(self.path, name)
        within_bounds(os.path.getsize(path))
        with open(path, "rb") as f:
            return f.read()


class Archive(Form):
    """What archives share: names that are no paths, and a folder around everything left out."""

    inside = None  # {name: place}, once members() has been called

    def members(self):
        """place: number of the file, offset, size, and for zips the method of compression."""
        found = {}
        for name, place in self.entries(self.where):
            path_inside(self.path, name, self.where)  # --maps holds files of the same names
            name = str(PurePosixPath(name.replace("\\", "/")))
            if visible(name):
                found[name] = place
        tops = {name.split("/")[0] for name in found}
        top = next(iter(tops), "") + "/"
        nested = [name for name in found if name.count("/") > 1]
        if len(tops) == 1 and (nested or top + DESCRIBED in found):
            if all(name.startswith(top) for name in found):
                found = {name.removeprefix(top): place for name, place in found.items()}
        self.inside = found
        return [(name, found[name]) for name in sorted(found, key=like_a_folder)]

    def described(self):
        if DESCRIBED not in self.inside:
            return None
        try:
            value = json.loads(self.read(DESCRIBED, self.inside[DESCRIBED]))
        except ValueError as e:
            raise UserError(
                f"{self.where}: its {DESCRIBED} is not readable JSON ({e}): pack it again"
            ) from None
        return value if isinstance(value, dict) else {}

    def read(self, name, place):
        part, offset, size, _ = place
        return read_part(self.files[part], offset, size)

    def captions(self):
        texts = {name[:-4]: place for name, place in self.inside.items() if is_text(name)}
        pictures = [name for name in self.inside if is_image(name)]
        there = [(name, os.path.splitext(name)[0]) for name in pictures]
        return {name: decoded(self.read(key, texts[key])) for name, key in there if key in texts}


class Zip(Archive):
    kind = "a zip"

    def entries(self, where):
        try:
            with zipfile.ZipFile(self.files[0]) as file:
                for info in file.infolist():
                    if not info.is_dir():
                        method = -1 if info.flag_bits & 1 else info.compress_type
                        place = (0, info.header_offset, info.compress_size, method)
                        yield info.filename, place
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
            raise UserError(f"{where} is not a whole zip ({e}): copy or pack it again") from None

    def read(self, name, place):
        part, offset, size, method = place
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("encrypted, or compressed by another method than deflate")
        head = read_part(self.files[part], offset, 30)
        name_and_extra = sum(struct.unpack("<HH", head[26:30]))
        found = read_part(self.files[part], offset + 30 + name_and_extra, size)
        if method == zipfile.ZIP_DEFLATED:
            try:
                found = zlib.decompressobj(-15).decompress(found, LARGEST + 1)
            except zlib.error as e:
                raise ValueError(f"broken in the zip: {e}") from None
            within_bounds(len(found))
        return found


class Tars(Archive):
    """Shards of webdataset: the files whose names begin alike, up to the first dot, are one row."""

    kind = "tar shards"
    TEXTS = ("cls", "json", "txt")

    def entries(self, where):
        for part, path in enumerate(self.files):
            try:
                with tarfile.open(path, "r:") as file:
                    for info in file:
                        file.members = []  # which it would keep
                        if info.isreg() and not info.issparse():
                            yield from self.entry(part, info)
            except (tarfile.TarError, OSError, ValueError) as e:
                raise UserError(
                    f"{where}: {os.path.basename(path)} is not a whole, uncompressed tar ({e}): "
                    "copy it again, or gunzip it"
                ) from None

    def entry(self, part, info):
        """A file of a shard: a text is remembered by its key, anything else is a member."""
        name, place = info.name.removeprefix("./"), (part, info.offset_data, info.size, 0)
        folder, _, file = name.rpartition("/")
        stem, _, ending = file.partition(".")
        key = part, folder, stem
        if ending.lower() in self.TEXTS and file != DESCRIBED and stem:
            self.texts.setdefault(key, {})[ending.lower()] = place
            return
        self.keys[place] = key
        if self.names.setdefault(name, part) != part:  # another shard counts from 0 again
            name = f"{folder}/{part}~{file}" if folder else f"{part}~{file}"
        yield name, place

    def members(self):
        self.texts, self.keys, self.names = {}, {}, {}  # texts, keys of members, first shards
        found = [member for member in super().members() if is_image(member[0])]  # no captions
        self.refuse_two(found)
        self.labels = self.own_labels(found) if self.texts else None
        return found

    def refuse_two(self, pictures):
        """Raises UserError for rows of several pictures, as KEY.jpg and KEY.mask.png, of which one
        is not to be learned. KEY.001.jpg and KEY.002.jpg are pictures of their own."""
        first = {}
        for name, place in pictures:
            ending = name.rsplit("/", 1)[-1].partition(".")[2]
            if re.match(r"\d", ending):
                continue
            other = first.setdefault(self.keys[place], name)
            if other != name:
                raise UserError(
                    f"{self.where}: {other} and {name} are two pictures of one row: make tars with "
                    "the one that is to be learned"
                )

    def own_labels(self, pictures):
        """Those of KEY.cls, or of "label" or "cls" in KEY.json.  None where there are none."""
        labels = {name: self.label_of(self.texts.get(self.keys[at], {})) for name, at in pictures}
        return {name: k for name, k in labels.items() if k is not None} or None

    def captions(self):
        found = {}
        for name, place in self.inside.items():
            texts = self.texts.get(self.keys[place], {})
            caption = self.caption_of(texts) if is_image(name) else None
            if caption is not None:
                found[name] = caption
        return found

    def caption_of(self, texts):
        """-> text, or None."""
        if "txt" in texts:
            return decoded(self.read("", texts["txt"]))
        try:
            value = json.loads(self.read("", texts["json"])) if "json" in texts else {}
        except ValueError:
            return None
        found = value.get("caption", value.get("text")) if isinstance(value, dict) else None
        return found if isinstance(found, str) else None

    def label_of(self, texts):
        """-> class number, or None."""
        try:
            if "cls" in texts:
                return int(self.read("", texts["cls"]))
            value = json.loads(self.read("", texts["json"])) if "json" in texts else {}
            found = value.get("label", value.get("cls")) if isinstance(value, dict) else None
            return found if type(found) is int else None
        except ValueError:
            return None


class Lmdb(Form):
    """LSUN's sets: each value is an encoded image, and its key the name."""

    kind, opened = "an LMDB", {}

    def __init__(self, path, file):
        super().__init__(path, [file])
        library = require("lmdb", f"{self.where}: an LMDB")
        how, real = dict(readonly=True, lock=False, readahead=False), os.path.realpath(file)
        try:
            if real not in self.opened:  # the library refuses to open one twice
                self.opened[real] = library.open(file, subdir=False, **how)
            self.file = self.opened[real]
        except library.Error as e:
            raise UserError(f"{self.where} is not a whole LMDB ({e}): copy it again") from None

    def members(self):
        with self.file.begin() as view:
            keys = view.cursor().iternext(values=False)
            return [(key.decode("utf-8", "surrogateescape"), (0, 0, 0, 0)) for key in keys]

    def read(self, name, place):
        with self.file.begin() as view:
            found = view.get(name.encode("utf-8", "surrogateescape"))
        within_bounds(len(found))
        return found


class Parquet(Form):
    """Files of rows with a column of encoded images, as the hub of Hugging Face has them.

    The image is the first column of bytes, or of structs with bytes; the label is `label`, `labels`
    or `cls`, the caption `text`, `caption` or `prompt`. A row is read with all of its row group,
    the last few of which are kept.
    """

    kind = "parquet files"
    KEPT = 4

    def __init__(self, path, files):
        super().__init__(path, files)
        self.arrow = require("pyarrow", f"{self.where}: parquet")
        self.parquet = require("pyarrow.parquet", f"{self.where}: parquet")
        self.groups, self.lock = {}, threading.Lock()
        self.image, self.label = self.columns(self.open(files[0]).schema_arrow)

    def open(self, path):
        """-> ParquetFile. Raises UserError."""
        try:
            return self.parquet.ParquetFile(path)
        except (self.arrow.ArrowException, OSError) as e:
            raise UserError(
                f"{self.where}: {os.path.basename(path)} is no parquet file ({e}): copy it again"
            ) from None

    def members(self):
        found, labels = [], {}
        for part, path in enumerate(self.files):
            file = self.open(path)
            if self.columns(file.schema_arrow) != (self.image, self.label):
                raise UserError(
                    f"{self.where}: {os.path.basename(path)} has other columns than "
                    f"{os.path.basename(self.files[0])}: name one of them, or move them apart"
                )
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                names = [f"{os.path.basename(path)}:{group}:{row:06d}" for row in range(rows)]
                found += [(name, (part, group, row, 0)) for row, name in enumerate(names)]
                if self.label:
                    column = file.read_row_group(group, [self.label]).column(0)
                    labels |= zip(names, column.to_pylist())
        right = all(type(k) is int and 0 <= k < 2**20 for k in labels.values())
        self.labels = labels if labels and right else None
        return found

    def captions(self):
        found, types = {}, self.arrow.types
        for path in self.files:
            file = self.open(path)
            strings = [f.name for f in file.schema_arrow if is_string(types, f.type)]
            column = next((name for name in ("text", "caption", "prompt") if name in strings), None)
            for group in range(file.num_row_groups if column else 0):
                texts = file.read_row_group(group, [column]).column(0).to_pylist()
                names = (f"{os.path.basename(path)}:{group}:{row:06d}" for row in range(len(texts)))
                found |= {n: text for n, text in zip(names, texts) if text is not None}
        return found

    def columns(self, schema):
        """Names of the columns of images and of labels, and self.classes. Raises UserError."""
        types, images = self.arrow.types, []
        for field in schema:
            inner = field.type
            if types.is_struct(inner) and inner.get_field_index("bytes") >= 0:
                inner = inner.field("bytes").type
            if types.is_binary(inner) or types.is_large_binary(inner):
                images.append(field.name)
        if not images:
            raise UserError(
                f"{self.where}: no column of encoded images; it has "
                f"{', '.join(schema.names)}: write one of bytes"
            )
        label = next((name for name in ("label", "labels", "cls") if name in schema.names), None)
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = about.get("info", {}).get("features", {}).get(label, {})
        self.classes = feature.get("names") if isinstance(feature, dict) else None
        return images[0], label

    def read(self, name, place):
        part, group, row, _ = place
        with self.lock:
            column = self.groups.pop((part, group), None)
            if column is None:
                file = self.open(self.files[part])
                column = file.read_row_group(group, [self.image]).column(0)
            self.groups[part, group] = column
            while len(self.groups) > self.KEPT:
                self.groups.pop(next(iter(self.groups)))
        found = column[row].as_py()
        found = found["bytes"] if isinstance(found, dict) else found
        if found is None:
            raise ValueError("no bytes in this row")
        within_bounds(len(found))
        return found


class Npz(Form):
    """Pixels themselves, as guided-diffusion's sampler writes them, read where they lie."""

    kind = "an npz"

    def __init__(self, path, files):
        super().__init__(path, files)
        where = self.where
        try:
            with zipfile.ZipFile(path) as file:
                infos = {info.filename: info for info in file.infolist()}
                if "arr_0.npy" not in infos:
                    raise UserError(f"{where}: no arr_0; it has {', '.join(infos) or 'nothing'}")
                stored = infos["arr_0.npy"].compress_type == zipfile.ZIP_STORED
                with file.open("arr_0.npy") as array:
                    self.shape = self.header(array)
                    inner = array.tell()
                self.numbers = None
                if "arr_1.npy" in infos:
                    within_bounds(infos["arr_1.npy"].file_size)
                    with file.open("arr_1.npy") as array:
                        self.numbers = np.lib.format.read_array(array, allow_pickle=False)
        except (zipfile.BadZipFile, OSError, ValueError) as e:
            raise UserError(f"{where} is not a whole npz of pixels ({e}): save it again") from None
        if not stored:
            raise UserError(
                f"{where} is compressed, so that no picture can be read alone: save it again by "
                "numpy.savez"
            )
        head = read_part(path, infos["arr_0.npy"].header_offset, 30)
        names = sum(struct.unpack("<HH", head[26:30]))
        self.begin = infos["arr_0.npy"].header_offset + 30 + names + inner

    def header(self, array):
        """-> the shape of arr_0. Raises ValueError unless it is uint8 (N, H, W, 3)."""
        version = np.lib.format.read_magic(array)
        read = np.lib.format.read_array_header_1_0
        read = read if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read(array)
        if kind != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise ValueError(f"arr_0 is {kind} {shape}, wanted uint8 (N, H, W, 3)")
        return shape

    def members(self):
        n, size = self.shape[0], int(np.prod(self.shape[1:]))
        names = [f"{i:08d}" for i in range(n)]
        if self.numbers is not None:
            if self.numbers.shape != (n,) or self.numbers.dtype.kind not in "iu":
                raise UserError(
                    f"{self.where}: arr_1 is {self.numbers.dtype} {self.numbers.shape}, "
                    f"wanted integers ({n},): save class numbers, or leave arr_1 out"
                )
            self.labels = dict(zip(names, self.numbers.tolist()))
        return [(name, (0, self.begin + i * size, size, 0)) for i, name in enumerate(names)]

    def read(self, name, place):
        return read_part(self.files[0], place[1], place[2])

    def picture(self, found):
        return Image.frombytes("RGB", (self.shape[2], self.shape[1]), found)


ENDINGS = (".zip", ".tar", ".parquet", ".mdb", ".npz")  # of files that are sets
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")


def is_set(source):
    """Whether --data names a set of pictures: a folder, or a file of one of the forms here."""
    return os.path.isdir(source) or source.lower().endswith((*ENDINGS, *COMPRESSED))


def open_set(path, flat):
    """The set that --data names. flat: without classes. Raises UserError."""
    where, names = f"--data {path}", [path]
    if not os.path.exists(path):
        raise UserError(f"{where} does not exist")
    if path.lower().endswith(COMPRESSED):
        raise UserError(f"{where}: no picture of it can be read alone: unpack it, or make it a zip")
    if os.path.isdir(path):
        names = sorted(n for n in os.listdir(path) if not n.startswith("."))
        if "data.mdb" in names:
            return Lmdb(path, os.path.join(path, "data.mdb"))
        names = [os.path.join(path, name) for name in names]
        if any(map(os.path.isdir, names)) or any(map(is_image, names)):
            return Folder(path, flat)
    for ending, form in ((".tar", Tars), (".parquet", Parquet)):
        parts = [name for name in names if name.lower().endswith(ending)]
        if parts:
            return form(path, parts)
    if os.path.isdir(path):
        return Folder(path, flat)
    if path.lower().endswith(".mdb"):
        return Lmdb(path, path)
    return (Zip if path.lower().endswith(".zip") else Npz)(path, [path])


# ---- classes -------------------------------------------------------------------------------------


def list_set(source, flat=False, class_in_name=False):
    """Which pictures a set has, and whose class each is.

    flat: all are one class. class_in_name: the class is what stands in a file's name before its
    first _, as guided-diffusion reads class_name.png.
    -> [(name, place)], their labels, names of the classes, whether numbers must stay (otherwise
    those of classes without a picture are given up). Raises UserError for unclear classes.
    """
    members, where = without_captions(source.members()), source.where
    if flat:
        members = [member for member in members if member[0] != DESCRIBED]
        name = os.path.basename(os.path.abspath(source.path))
        return members, [0] * len(members), [name], False
    if class_in_name:
        if members and not any(is_image(name) for name, _ in members):
            raise UserError(
                f"{where}: --class_in_name is for files with names of pictures, and {source.kind} "
                "has none: leave it out"
            )
        return classes_in_names(members, where)
    described = source.described()
    if described is not None:
        return classes_described(source, dict(members), described, where)
    if source.labels is not None:
        without = [name for name, _ in members if name not in source.labels]
        if without:
            raise UserError(
                f"{where}: {without[0]} has no class number in a .cls or .json beside it, and "
                f"others have: {WITHOUT_CLASSES}"
            )
        labels = [source.labels[name] for name, _ in members]
        if labels and min(labels) < 0:
            raise UserError(
                f"{where}: class {min(labels)}: classes are numbers from 0 on: save it so"
            )
        count = 1 + max(labels, default=0)
        names = source.classes or []
        names = list(names) if len(names) >= count else [str(k) for k in range(count)]
        return members, labels, names, True
    return classes_by_folder(source, members, where)


def renumbered(label, classes):
    """Numbers without gaps, for classes of which some have no items.  -> label (N,), names"""
    there, label = label.unique(return_inverse=True)
    return label, [classes[k] for k in there.tolist()]


def without_captions(members):
    """Members but for each NAME.txt that stands beside a picture of that name."""
    stems = {os.path.splitext(name)[0] for name, _ in members if is_image(name)}
    return [m for m in members if not (is_text(m[0]) and m[0][:-4] in stems)]


def classes_in_names(members, where):
    """class_name.png, for list_set."""
    members = [member for member in members if is_image(member[0])]
    files = [name.rsplit("/", 1)[-1] for name, _ in members]
    without = [file for file in files if "_" not in file]
    if without:
        raise UserError(
            f"{where}: --class_in_name, but {without[0]} has no _ behind a class: rename it, or "
            "leave the flag out"
        )
    theirs = [file.split("_")[0] for file in files]
    classes = sorted(set(theirs))
    number = {name: k for k, name in enumerate(classes)}
    return members, [number[name] for name in theirs], classes, False


def classes_described(source, members, described, where):
    """dataset.json, {"labels": [["00000/img00000000.png", 3], ...]}, for list_set."""
    where, rows = f"{where}: its {DESCRIBED}", described.get("labels")
    if rows is None:
        raise UserError(f"{where} has no labels: {WITHOUT_CLASSES}")
    right = isinstance(rows, list) and all(isinstance(r, list) and len(r) == 2 for r in rows)
    right = right and all(type(n) is str and type(k) is int and 0 <= k < 2**20 for n, k in rows)
    if not right:
        raise UserError(
            f'{where} wants "labels": [["FILE", CLASS], ...] with class numbers from 0 on: write '
            f"it so, or {WITHOUT_CLASSES}"
        )
    paths = [path_inside(source.path, name, where) for name, _ in rows]
    missing = [path for path, (name, _) in zip(paths, rows) if name not in members]
    if missing or not rows:
        first = f", the first {missing[0]}" if missing else ""
        raise UserError(f"{where} names {len(rows)} images, {len(missing)} are not there{first}")
    theirs = {}
    for name, k in rows:
        if theirs.setdefault(name, k) != k:
            raise UserError(
                f"{where} names {name} twice, with classes {theirs[name]} and {k}: leave one of "
                "them out"
            )
    classes = [str(k) for k in range(1 + max(k for _, k in rows))]
    return [(name, members[name]) for name, _ in rows], [k for _, k in rows], classes, True


def classes_by_folder(source, members, where):
    """The first folder on the way to a picture, for list_set."""
    inside = [member for member in members if "/" in member[0]]
    loose = [name for name, _ in members if "/" not in name and is_image(name)]
    classes = sorted({name.split("/")[0] for name, _ in inside})
    if isinstance(source, Folder):
        classes = class_folders(source.path)  # empty ones too
    if not classes and not isinstance(source, Folder):
        raise UserError(
            f"{where}: {source.kind} without labels or class folders: {WITHOUT_CLASSES}"
        )
    if not classes:
        raise UserError(f"{where}: no class subfolders; put images in {source.path}/<class>/...")
    deep = [name.count("/") > 1 for name, _ in inside if is_image(name)]
    if deep and all(deep) and SPLITS.issuperset(map(str.lower, classes)):
        first = [name for name in classes if name.lower().startswith("train")]
        inner = (first or classes)[0]
        if isinstance(source, Folder):
            inner = os.path.join(source.path, inner)
        raise UserError(
            f"{where}: {', '.join(classes)} look like parts of a set that have the classes inside: "
            f"give {inner}"
        )
    if all(re.fullmatch(r"\d{5}", name) for name in classes):
        raise UserError(
            f"{where}: its subfolders {classes[0]} ... look like parts of a large set, not like "
            f"classes: {WITHOUT_CLASSES}; if they are classes, put a letter before their numbers"
        )
    if loose:
        raise UserError(
            f"{where}: {len(loose)} images, such as {loose[0]}, lie beside the class subfolders "
            f"{', '.join(classes[:3])}...: move them into one of these or away, or else "
            f"{WITHOUT_CLASSES}"
        )
    number = {name: k for k, name in enumerate(classes)}
    return inside, [number[name.split("/")[0]] for name, _ in inside], classes, False
