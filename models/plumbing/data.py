"""What a run reads: prompts, conditions, real images and latents, banks of trajectories.

Large files are never read whole: a row is read from disk when a step asks for it.
"""

import math
import os

import torch
import torch.nn.functional as F

from models.draws import stable_hash
from models.files import UserError, load_json, open_own, open_tensors, save_json, save_tensors
from models.plumbing.loading import drawn, index_path, open_pictures
from models.plumbing.sets import is_set
from models.prompts import open_prompts
from models.worlds import WORLDS, load_world

# ---- conditions ----------------------------------------------------------------------------------


class Prompts:
    """--prompts FILE.safetensors: cond.NAME (N, ...) and uncond.NAME (1, ...), read row by row.

    The file may be a set of shards, and have its rows without padding (models/prompts.py).
    Attributes: n, the number of prompts; names, those of the network's inputs.
    """

    def __init__(self, path, names, widths):
        """names: the conditioning inputs that the network takes.

        widths: {name: the last dimension that the network takes, None for any}. Raises UserError.
        """
        self.file, self.names = open_prompts(path), names
        for name in names:
            self._check(path, name, widths.get(name))
        self.cond = {n: Rows(self.file, f"cond.{n}", path).check() for n in names}
        counts = {len(rows) for rows in self.cond.values()}
        if len(counts) != 1:
            raise UserError(
                f"{path}: the cond.* tensors disagree on the number of prompts: {sorted(counts)}"
            )
        self.n = counts.pop()

    def _check(self, path, name, width):
        """Raises UserError for a pair cond.NAME, uncond.NAME that is missing or misshapen."""
        keys = set(self.file.keys())
        for key in (f"cond.{name}", f"uncond.{name}"):
            if key not in keys:
                there = ", ".join(sorted(keys)) or "nothing"
                raise UserError(f"{path} lacks {key!r}; it has {there}")
        kind = self.file.get_slice(f"cond.{name}").get_dtype()
        if name in ("text", "tokens", "pooled") and "F" not in kind:
            raise UserError(
                f"{path}: cond.{name} is {kind}: wanted features in F32, F16 or BF16, as "
                "python -m models.encode writes them"
            )
        shape = self.file.get_slice(f"cond.{name}").get_shape()
        un = self.file.get_slice(f"uncond.{name}").get_shape()
        if width and (shape[-1] != width or un[-1] != width):
            raise UserError(
                f"{path}: {name!r} embeddings are {shape[-1]} wide (unconditional {un[-1]}), "
                f"the teacher takes {width}"
            )
        if not shape[0] or un[0] != 1 or shape[1:] != un[1:]:
            raise UserError(
                f"{path}: cond.{name} is {shape} and uncond.{name} {un}; "
                "wanted (N, ...) with N >= 1 and (1, ...) alike"
            )
        Rows(self.file, f"uncond.{name}", path).check()

    def fingerprint(self, most=2**28):
        """A short hash of all prompts and of the unconditional one.

        Where they have more than so many numbers it is of 64 of them, and of how many there are.
        """
        some = torch.arange(self.n)
        if sum(math.prod(rows.shape) for rows in self.cond.values()) > most:
            some = torch.linspace(0, self.n - 1, min(64, self.n)).long()
        parts = [*(self.rows(i, "cpu") for i in some.split(64)), self.unconditional(1, "cpu")]
        sums = [x.double().sum(-1).tolist() for part in parts for x in part.values()]
        return f"{stable_hash(self.n, *sums):08x}"

    def rows(self, index, device):
        """index (B,) -> {name: (B, ...)}; float inputs as float32."""
        return {k: v[index].to(device) for k, v in self.cond.items()}

    def unconditional(self, n, device):
        """The unconditional inputs, repeated n times: {name: (n, ...)}."""
        one = {k: as_float32(self.file.get_tensor(f"uncond.{k}")).to(device) for k in self.names}
        return {k: v.expand(n, *v.shape[1:]) for k, v in one.items()}


def refuse_other_encoder(file, net, where):
    """Raises UserError for prompts that models.encode made for another class of transformer.

    file: what open_prompts gives. T5 of PixArt and of CogVideoX and Wan's umT5 are equally wide.
    """
    made_for, name = (file.metadata() or {}).get("for", "").split(), type(net).__name__
    others = [taker for taker in made_for if "Transformer" in taker]
    if others and "Transformer" in name and name not in others:
        raise UserError(
            f"{where} was encoded for a {others[0]}, and the teacher is a {name}: encode it with "
            "this teacher"
        )


class Conditions:
    """Where a network's conditions come from: class labels drawn evenly, or rows of --prompts.

    cond and uncond are dicts of the network's inputs with the same keys, each (B, ...). uncond is
    the null label, or the unconditional prompt.
    """

    def __init__(self, args, net):
        """net: a network whose cond_names say what it takes. Raises UserError."""
        self.prompts = None
        if "label" not in net.cond_names:
            if not args.prompts:
                raise UserError(
                    f"a {type(net).__name__} teacher needs --prompts FILE.safetensors with "
                    + " and ".join(f"cond.{n}, uncond.{n}" for n in net.cond_names)
                )
            widths = {n: getattr(net, f"{n}_dim", None) for n in ("text", "pooled")}
            self.prompts = Prompts(args.prompts, net.cond_names, widths)
            refuse_other_encoder(self.prompts.file, net, f"--prompts {args.prompts}")
        elif args.prompts:
            raise UserError(
                f"--prompts: the teacher is a {type(net).__name__} and takes class labels, "
                "not prompts"
            )
        self.classes = getattr(net, "num_classes", 0)

    @property
    def count(self):
        """How many classes or prompts there are, at least 1."""
        return self.prompts.n if self.prompts else max(1, self.classes)

    def index(self, draw):
        """Which class or prompt each row of a batch gets.  (B,) int64, on the CPU."""
        return draw.integer("cond", self.count)

    def draw(self, draw):
        """A batch of conditions for these rows, on the device of the draws.  -> cond, uncond."""
        return self.pick(self.index(draw), draw.device)

    def pick(self, index, device):
        """The classes or prompts with these numbers.  index (B,) int64 -> cond, uncond."""
        if self.prompts:
            return self.prompts.rows(index, device), self.prompts.unconditional(len(index), device)
        null = torch.full_like(index, self.classes)
        return {"label": index.to(device)}, {"label": null.to(device)}

    def preview(self, n):
        """Numbers for n pictures: all classes in turn, or the first prompts.  (n,) int64."""
        return torch.arange(n) % self.count


class DataConditions:
    """Conditions that belong to the items of a data set: the rows of --data's cond.NAME.

    For sparse data the points (coords) of the item come too; of more items than rows, item i has
    row i modulo their number, as the samples of a dense network have. Unconditional is uncond.NAME
    (1, ...) of the same file, and zeros where it has none.
    """

    prompts = None

    def __init__(self, data, cond, source, net, flag="data"):
        """data: x0 (N, ...) or SparseRows, None for conditions alone. cond: {name: (N, ...)}.

        source: the --data (flag) they come from. net: its `uncond_names`, where it has such, are
        inputs whose unconditional twin is no zeros. Raises UserError for a file without one, or one
        of another shape.
        """
        self.points = data if isinstance(data, SparsePlaces) else None
        self.cond = cond
        needed = getattr(net, "uncond_names", ())
        self.uncond = read_unconditional(source, cond, needed, flag)

    def unconditional(self, cond):
        """The unconditional twin of a batch of cond, {name: (B, ...)}, on the same device."""
        for name in self.uncond:
            self.uncond[name] = self.uncond[name].to(cond[name].device)
        return {k: self.uncond.get(k, torch.zeros_like(v)).expand_as(v) for k, v in cond.items()}

    def pick(self, index, device):
        """index (B,) int64 -> cond, uncond."""
        cond = {k: v[index % len(v)].to(device) for k, v in self.cond.items()}
        at = {"coords": self.points.places(index).to(device)} if self.points else {}
        return {**cond, **at}, {**self.unconditional(cond), **at}

    def preview(self, n):
        """The first n items of the data.  (n,) int64."""
        items = self.points if self.points else next(iter(self.cond.values()))
        return torch.arange(n) % len(items)


def load_conditions(source, net, flag="data", points=None):
    """The conditions of --sample, in FILE.safetensors alone.  -> DataConditions.

    source: what the flag names, data or prompts. net: whose cond_names are read. points:
    SparsePlaces, where the network works on points. Raises UserError.
    """
    keys = [f"cond.{name}" for name in net.cond_names]
    where = f"--{flag} {source}"
    if not str(source).endswith(".safetensors"):
        raise UserError(
            f"{where}: a {type(net).__name__} is sampled from FILE.safetensors with "
            f"{' and '.join(keys)}, which python -m models.encode writes: give it as --prompts"
        )
    file = open_prompts(source)
    refuse_other_encoder(file, net, where)
    there, rows = set(file.keys()), {}
    for key, name in zip(keys, net.cond_names):
        if key not in there or file.get_slice(key).get_shape()[:1] in ([], [0]):
            raise UserError(
                f"{where}: no {key} with at least one row, as python -m models.encode "
                f"writes it; it has {', '.join(sorted(there)) or 'nothing'}"
            )
        rows[name] = Rows(file, key, where).check()
    if len({len(values) for values in rows.values()}) > 1:
        raise UserError(f"{where}: {' and '.join(keys)} disagree on the number of rows")
    return DataConditions(points, rows, source, net, flag)


def load_places(source, size):
    """--data of --sample for a network of points: where they lie, in FILE.safetensors.

    size: of the grid.  -> SparsePlaces. Raises UserError.
    """
    if not str(source).endswith(".safetensors"):
        raise UserError(
            f"--data {source}: a network of points is sampled at those of FILE.safetensors, coords "
            "and offsets, as python -m models.meshes --structures writes them"
        )
    file = open_tensors(source)
    there = set(file.keys())
    if not {"coords", "offsets"} <= there:
        raise UserError(
            f"--data {source}: no coords and offsets, as python -m models.meshes --structures "
            f"writes them; it has {', '.join(sorted(there)) or 'nothing'}"
        )
    return SparsePlaces(file, f"--data {source}", size)


def read_unconditional(source, cond, needed=(), flag="data"):
    """uncond.NAME of FILE.safetensors, for the names that it has.  -> {name: (1, ...)}, float32.

    source: what --data (flag) names; only a file has such tensors. cond: {name: (N, ...)}. needed:
    names that must be there. Raises UserError.
    """
    file = open_prompts(source) if str(source).endswith(".safetensors") else None
    there, found = set(file.keys()) if file else set(), {}
    for name, values in cond.items():
        shape, key = (1, *values.shape[1:]), f"uncond.{name}"
        if key not in there and name in needed:
            raise UserError(
                f"--{flag} {source}: no {key} {shape}, the features of an empty prompt, from which "
                "a text teacher's guidance leads away: python -m models.encode --teacher ROOT "
                f"--prompts_txt FILE writes it beside cond.{name}; add it to this file"
            )
        if key not in there:
            continue
        row = Rows(file, key, f"--{flag} {source}")
        if row.shape != shape:
            raise UserError(
                f"--{flag} {source}: {key} is {row.shape} and cond.{name} {tuple(values.shape)}; "
                f"give {key} the shape {shape}"
            )
        found[name] = row[torch.zeros(1, dtype=torch.long)]
    return found


@torch.no_grad()
def try_network(net, teacher, device, **more):
    """One call before any training, where wrong shapes and prompts show.

    -> what net returns for one sample of the teacher's shape and conditions. Raises UserError.
    """
    cond, _ = teacher.conditions.pick(torch.zeros(1, dtype=torch.long), device)
    x = torch.zeros(1, *teacher.shape, device=device)
    if "coords" in cond:
        x = torch.zeros(len(cond["coords"]), teacher.shape[0], device=device)
    try:
        return net(x, torch.ones(1, device=device), **cond, **more)
    except ValueError as e:
        raise UserError(str(e)) from None


# ---- --data --------------------------------------------------------------------------------------


def load_data(
    source, size=None, pool=20000, seed=0, flat=False, maps=None, sparse=False, crop="lanczos",
    **reading,
):  # fmt: skip
    """What --data names, with its conditions.

    source: a world's name, a set of pictures (see sets.py), or FILE.safetensors. The file has x0
            (N, ...) or, for points of a grid, coords (M, 3), feats (M, C) and offsets (N + 1,), and
            beside either cond.NAME (N, ...).
    size:   side of the images of a folder, or of the grid; None means 32, or any.
    pool:   number of items drawn from a world. They differ from every set that measures use.
    flat, maps, crop: of pictures, see loading.open_pictures, and `reading` goes there as well.
            maps=True asks a world for its own. They become cond["map"].
    sparse: whether points are welcome; otherwise they are refused.

    -> x0: float32 (N, ...), Decoded images uint8 (N, 3, size, size), or Rows or SparseRows of the
    file; cond: {"label": (N,) int64, ...}; class names or None. Raises UserError.
    """
    if source in WORLDS:
        return load_world_data(load_world(source), pool, seed, maps)
    if is_set(source):
        x0, label, names, maps = open_pictures(source, size or 32, flat, maps, crop, **reading)
        cond = {"label": label} if maps is None else {"label": label, "map": maps}
        return x0, cond, names
    if not source.endswith(".safetensors"):
        worlds = ", ".join(WORLDS)
        raise UserError(
            f"--data {source}: neither an embedded world ({worlds}), a folder, a .zip, .tar, "
            ".parquet, .mdb or .npz, nor a .safetensors file"
        )
    return *load_data_file(source, size, sparse), None


def load_world_data(world, pool, seed, maps):
    """`pool` items of a world, for `load_data`. maps: whether it is asked for maps too."""
    seed = seed + 1000003  # the sets that measures use have smaller seeds
    if maps:
        x0, label, maps = world.scenes(pool, seed)
        return x0, {"label": label, "map": maps}, world.class_names
    x0, label = world.data(pool, seed)
    return x0, {"label": label}, world.class_names


def load_data_file(source, size, sparse):
    """FILE.safetensors, for `load_data`.  -> Rows or SparseRows, cond. Raises UserError."""
    file = open_tensors(source)
    keys = set(file.keys())
    if {"coords", "feats", "offsets"} <= keys and "x0" not in keys:
        if not sparse:
            raise UserError(
                f"--data {source}: coords, feats and offsets are points of a grid, "
                "which are not welcome here: give a tensor x0 (N, ...)"
            )
        x0, counted = SparseRows(file, f"--data {source}", size), "offsets"
    elif "x0" in keys and file.get_slice("x0").get_shape()[:1] not in ([], [0]):
        x0, counted = Rows(file, "x0", f"--data {source}"), "x0"
        refuse_kind(source, x0.check())
    else:
        raise UserError(
            f"--data {source}: no tensor called x0 with at least one row, nor coords, feats and "
            f"offsets; it has {', '.join(sorted(keys)) or 'nothing'}"
        )
    names = [k for k in file.keys() if k.startswith("cond.")]
    cond = {k[5:]: Rows(file, k, f"--data {source}").check() for k in names}
    for k, v in cond.items():
        if len(v) != len(x0):
            raise UserError(f"--data {source}: cond.{k} has {len(v)} rows, {counted} has {len(x0)}")
    if "label" in cond:
        cond["label"] = whole_labels(source, cond["label"])
    return x0, cond


def whole_labels(source, rows):
    """cond.label of a file -> (N,) int64. Raises UserError for what is no class number."""
    kind = rows.slice.get_dtype()
    if len(rows.shape) != 1 or kind[0] not in "IU":
        raise UserError(
            f"--data {source}: cond.label is {kind} {rows.shape}: wanted integers (N,), one class "
            "number an item"
        )
    return rows[torch.arange(len(rows))].long()


def refuse_kind(source, rows):
    """Raises UserError unless x0 of a file is of floats, or of bytes, which are pixels."""
    kind = rows.slice.get_dtype()
    if kind != "U8" and "F" not in kind:
        raise UserError(
            f"--data {source}: x0 is {kind}: wanted floats, or bytes (U8) for pixels of 0 to 255"
        )
    if kind == "U8" and len(rows.shape) == 4 and rows.shape[1] not in (1, 3):
        raise UserError(
            f"--data {source}: x0 is bytes (U8), which are pixels (N, 1 or 3, H, W), but "
            f"{rows.shape}: give latents as floats, and channels before rows"
        )


def refuse_bytes_as_floats(where, x, most=2.0):
    """Raises UserError for pixels from 0 to 255 in a tensor of floats. x: Rows.

    most: the largest of numbers from 0 on that may be meant so.
    """
    some = x[torch.linspace(0, len(x) - 1, min(64, len(x))).long()]
    if some.is_floating_point() and some.min() >= 0 and some.max() > most:
        raise UserError(
            f"{where}: x0 goes from {some.min():.3g} to {some.max():.3g}: give pixels as bytes "
            "(U8) of 0 to 255, or as floats within [-1, 1]"
        )


class Rows:
    """A tensor of an open safetensors file, read row by row.

    rows[index (B,)] -> (B, ...), floats as float32. len(rows), rows.shape and rows.dim() are those
    of the whole tensor. Raises UserError for a row that is not finite, as features of a float16
    text encoder can be.
    """

    def __init__(self, file, key, where="the file"):
        """where: what that error begins with."""
        self.slice, self.key, self.where = file.get_slice(key), key, where
        self.shape = tuple(self.slice.get_shape())

    def __len__(self):
        return self.shape[0]

    def dim(self):
        return len(self.shape)

    def __getitem__(self, index):
        # Converted one by one: under autocast, torch.cat refuses float16.
        rows = torch.cat([as_float32(self.slice[i : i + 1]) for i in index.tolist()])
        if rows.is_floating_point() and not rows.isfinite().all():
            wrong = rows.reshape(len(rows), -1).isfinite().all(1).logical_not()
            raise UserError(
                f"{self.where}: row {int(index[wrong][0])} of {self.key} has numbers that are not "
                "finite: make it again in float32 or bfloat16, or take it out"
            )
        return rows

    def check(self, most=2**34):
        """Read every row once, where that is at most so many numbers, to find a wrong one early.

        A mask needs a token in every row. Raises UserError.
        """
        for part in torch.arange(len(self)).split(64) if math.prod(self.shape) <= most else ():
            rows = self[part]
            if self.key.endswith("mask") and not rows.flatten(1).any(1).all():
                empty = int(part[~rows.flatten(1).any(1)][0])
                raise UserError(
                    f"{self.where}: row {empty} of {self.key} is false everywhere, a prompt "
                    "without a token: encode it again, at least its end is one"
                )
        return self


class SparsePlaces:
    """Items that are points of a grid: item i is rows offsets[i] to offsets[i + 1] of the file.

    places(index (B,)) -> coords (n, 4) int64 of the points of these items; a row is the item's
    place in index, then x, y and z. Coordinates are read once as a whole at the start, so that a
    broken file is refused before any training.
    """

    def __init__(self, file, where, size=None):
        """file: an open safetensors file with coords (M, 3) and offsets (N + 1,).

        where: what an error message begins with. size: points must lie within 0..size-1 on each
        axis; None sets no upper limit. Raises UserError.
        """
        self.coords = file.get_slice("coords")
        self._check_shapes(file, where)
        self.offsets = self._checked_offsets(where, file.get_tensor("offsets"))
        self._check_range(where, size)

    def _check_shapes(self, file, where):
        shape, dtype = self.coords.get_shape(), self.coords.get_dtype()
        if len(shape) != 2 or shape[1] != 3 or dtype[0] not in "IU":
            raise UserError(f"{where}: coords is {dtype} {shape}; wanted integers (M, 3)")

    def _checked_offsets(self, where, offsets):
        """offsets, a tensor -> list of N + 1 ints."""
        if offsets.dim() != 1 or len(offsets) < 2 or offsets.is_floating_point():
            raise UserError(
                f"{where}: offsets is {offsets.dtype} {list(offsets.shape)}; "
                "wanted N + 1 integers, N >= 1"
            )
        offsets, rows = offsets.long().tolist(), self.coords.get_shape()[0]
        if offsets[0] != 0 or offsets[-1] != rows:
            raise UserError(
                f"{where}: offsets go from {offsets[0]} to {offsets[-1]}; "
                f"wanted 0 to the {rows} rows of coords"
            )
        for i, (first, end) in enumerate(zip(offsets[:-1], offsets[1:])):
            if first >= end:
                raise UserError(
                    f"{where}: offsets must grow, but {end} follows {first} "
                    f"(sample {i} has no points)"
                )
        return offsets

    def _check_range(self, where, size):
        part = 2**22  # rows that are read at a time
        for start in range(0, self.coords.get_shape()[0], part):
            coords = self.coords[start : start + part].long()
            low, high = int(coords.min()), int(coords.max())
            if low < 0 or (size is not None and high >= size):
                largest = "" if size is None else size - 1
                raise UserError(
                    f"{where}: coords go from {low} to {high}; they must be within 0..{largest}"
                )

    def __len__(self):
        return len(self.offsets) - 1

    def spans(self, index):
        """The rows of each of these items.  -> list of slices"""
        return [slice(self.offsets[i], self.offsets[i + 1]) for i in index.tolist()]

    def places(self, index):
        parts = enumerate(self.spans(index))
        return torch.cat([F.pad(self.coords[span].long(), (1, 0), value=i) for i, span in parts])


class SparseRows(SparsePlaces):
    """Such items with features: rows[index (B,)] -> feats (n, C) float32 and coords (n, 4) int64.

    Features are read when they are asked for.
    """

    def __init__(self, file, where, size=None):
        """file: with feats (M, C) beside the others. Raises UserError."""
        self.feats = file.get_slice("feats")
        super().__init__(file, where, size)
        Rows(file, "feats", where).check()

    def _check_shapes(self, file, where):
        shape, feats = self.coords.get_shape(), self.feats.get_shape()
        dtype = self.coords.get_dtype()
        right = len(shape) == 2 and shape[1] == 3 and dtype[0] in "IU"
        if not right or len(feats) != 2 or feats[0] != shape[0]:
            raise UserError(
                f"{where}: coords is {dtype} {shape} and feats {feats}; "
                "wanted integers (M, 3) and (M, C)"
            )

    def __getitem__(self, index):
        feats = torch.cat([as_float32(self.feats[span]) for span in self.spans(index)])
        return feats, self.places(index)


def ragged(x, coords):
    """A sparse batch as the tensors of a file that --data reads.

    x (M, C), coords (M, 4) -> {"coords": (M, 3) int32, "feats": (M, C), "offsets": (N + 1,)}.
    """
    ends = coords[:, 0].bincount().cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    return {"coords": coords[:, 1:].int(), "feats": x, "offsets": offsets}


def as_float32(x):
    """Floats of any precision -> float32; integers unchanged."""
    return x.float() if x.is_floating_point() else x


def to_unit(x):
    """uint8 images -> float32 in [-1, 1]; floats unchanged, as float32."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()


def spread_rows(n, most):
    """Up to `most` of n row numbers, evenly spread: folders are sorted by class.  (m,) int64"""
    m = min(n, most)
    return torch.arange(m) * n // m


# ---- --data for a teacher ------------------------------------------------------------------------


def in_space_of(world, shape, x0):
    """Items x0 of a world as a teacher whose samples have this shape knows them: a latent teacher's
    are latents."""
    latent = getattr(world, "latent_shape", None)
    return world.space.to_latents(x0) if latent and shape == latent else x0


def load_real_data(args, teacher):
    """--data or the world's own data, with conditions of the teacher's names.

    For a teacher without classes all items have the label 0, which is its null label.
    -> x0 (N, ...), cond {name: (N, ...)}. Raises UserError where labels, classes or shapes are not
    the teacher's.
    """
    world, base, shape = teacher.world, teacher.base, teacher.shape
    source, classless = args.data or world.name, getattr(base, "num_classes", None) == 0
    crop = cut_of(teacher.folder)
    how = dict(flat=classless, crop=crop, **reading_of(args))
    found = load_data(source, shape[-1], seed=args.seed, **how)
    data, cond, class_names = found
    if isinstance(data, Rows):
        refuse_bytes_as_floats(f"--data {source}", data)
        refuse_other_encoder(open_tensors(source), base, f"--data {source}")
    if classless:
        cond, class_names = {"label": torch.zeros(len(data), dtype=torch.long)}, None
    if source in WORLDS:
        data = in_space_of(world, shape, data)
    known = teacher.config.get("class_names") or getattr(world, "class_names", None)
    if class_names and known and list(class_names) != list(known):
        raise UserError(
            f"--data {source}: its classes are {', '.join(class_names)}, the teacher's "
            f"{', '.join(known)}: labels would mean other things"
        )
    label = cond.get("label") if "label" in base.cond_names else None
    if label is not None and not 0 <= label.min() <= label.max() < max(1, base.num_classes):
        raise UserError(
            f"--data {source}: labels from {label.min()} to {label.max()}, the teacher has "
            f"classes 0 to {base.num_classes - 1}"
        )
    if tuple(data.shape[1:]) != shape or set(cond) != set(base.cond_names):
        raise UserError(
            f"--data: items are {tuple(data.shape[1:])} with {sorted(cond)}, "
            f"the teacher takes {shape} with {list(base.cond_names)}"
        )
    return data, cond


def reading_of(args):
    """How the flags say that a set of pictures is read, for `load_data`."""
    if not hasattr(args, "workers"):  # a script that takes no pictures
        return {}
    named = args.data and is_set(args.data)
    index = index_path(args) if named else None
    return dict(class_in_name=args.class_in_name, workers=args.workers, index=index)


def cut_of(folder):
    """How the images were cut that a network of latent_fm.py was trained on; one of CROPS.

    folder: the network's, None for a closed form.
    """
    path = os.path.join(folder or "", "sampler.json")
    return load_json(path).get("crop", "lanczos") if os.path.isfile(path) else "lanczos"


def real_batches(args, teacher, device):
    """Batches of --data or of the world's own data, as `load_real_data` reads them.

    -> a function (draw, name) -> x0 (B, ...), images in [-1, 1] or latents; cond. name: of the
    draw, so that two batches of a step are independent. Raises UserError.
    """
    data, cond = load_real_data(args, teacher)

    def batch(draw, name):
        i = draw.integer(name, len(data))
        return to_unit(drawn(data, draw, name, i)), {k: v[i].to(device) for k, v in cond.items()}

    return batch


def load_paired_data(args, teacher, sparse):
    """What velocity matching noises: --data or the world's own, with the conditions of each item.

    sparse: whether the network takes points of a grid.
    -> x0 (N, ...) or SparseRows; cond, as in `load_real_data`. Raises UserError.
    """
    base, shape = teacher.base, teacher.shape
    if not args.data and not teacher.world:
        tensors = "coords, feats, offsets" if sparse else "x0"
        names = " and ".join(f"cond.{n}" for n in base.cond_names)
        raise UserError(
            f"--data: a {type(base).__name__} teacher needs FILE.safetensors with {tensors} "
            f"and {names}"
        )
    if not sparse:
        return load_real_data(args, teacher)
    data, cond, _ = load_data(args.data, shape[-1], sparse=True)
    if not isinstance(data, SparseRows):
        raise UserError(
            f"--data {args.data}: this {type(base).__name__} works on points: "
            "give coords, feats and offsets, not x0"
        )
    channels = data[torch.zeros(1, dtype=torch.long)][0].shape[1]
    if channels != shape[0] or set(cond) != set(base.cond_names):
        raise UserError(
            f"--data: points have {channels} channels, with {sorted(cond)}; the teacher takes "
            f"{shape[0]}, with {list(base.cond_names)}"
        )
    return data, cond


# ---- banks ---------------------------------------------------------------------------------------


def refuse_other_files(folder, path):
    """Raises UserError where files would be written between others, or such taken for one's own.

    path: of the description that the folder lacks.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if any(".tmp-" not in name for name in names):
        raise UserError(
            f"{folder} has files, and no {os.path.basename(path)} that says what they were made "
            "with: name another folder, or empty this one"
        )


class Bank:
    """A folder of trajectories in numbered files, written once and read state by state.

    Each file, 00000.safetensors and so on, holds the same tensors of `batch` rows: index (rows,),
    and x, v, ... (rows, K, ...), where K is the number of states of a trajectory.
    """

    def __init__(self, folder, about, size, batch, create):
        """about: {name: value} of what the bank is made with, kept in bank.json.

        size: rows of all files together. batch: rows of one file. create: whether to make the
        folder. Raises UserError for a folder that was made with something else.
        """
        self.folder, self.size, self.batch = folder, size, batch
        path, about = os.path.join(folder, "bank.json"), {**about, "batch": batch}
        if os.path.isfile(path):
            old = load_json(path)
            changed = [k for k in about if old.get(k) != about[k]]
            if changed:
                raise UserError(
                    f"--bank {folder} was made with another {', '.join(changed)}: "
                    "name another folder, or remove this one"
                )
        elif create:
            refuse_other_files(folder, path)
            os.makedirs(folder, exist_ok=True)
            save_json(about, path)

    @property
    def parts(self):
        """How many files a whole bank has."""
        return -(-self.size // self.batch)

    def path(self, part):
        """The file of this number."""
        return os.path.join(self.folder, f"{part:05d}.safetensors")

    def rows_of(self, part):
        """The rows, of all, that the file of this number holds.  -> range"""
        return range(part * self.batch, min(self.size, (part + 1) * self.batch))

    def missing(self):
        """Numbers of the files that are not there yet."""
        return [part for part in range(self.parts) if not os.path.isfile(self.path(part))]

    def write(self, part, tensors):
        """Write the file of this number, atomically.  tensors: {"index": (rows,), "x": ..., ...}"""
        save_tensors(tensors, self.path(part))

    def open(self, count=None, most=2**32):
        """Open all files, for `rows`.  -> self. Raises UserError for one that is not whole.

        count: of prompts or classes, which index is within. Where all are at most so many numbers,
        they are read once to find one that is not finite; otherwise when they are asked for.
        """
        self.files = [open_own(self.path(part)) for part in range(self.parts)]
        first = None
        for part, file in enumerate(self.files):
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            first = first or shapes
            right = {"index", "x", "v"} <= shapes.keys() == first.keys()
            right = right and all(s[:1] == [len(self.rows_of(part))] for s in shapes.values())
            right = right and min(len(s) for name, s in shapes.items() if name != "index") > 1
            if not right or any(s[1:] != first[name][1:] for name, s in shapes.items()):
                raise self.broken(part, "is not a whole part of a bank")
            self.check_index(part, count)
        few = sum(map(math.prod, first.values())) * self.parts <= most
        for part, file in enumerate(self.files if few else ()):
            for name in first:
                self.check_finite(part, name, file.get_tensor(name).float())
        return self

    def broken(self, part, why):
        """The UserError for the file of this number."""
        return UserError(f"{self.path(part)} {why}: remove it, and it is made again")

    def check_index(self, part, count):
        """Raises UserError for conditions that are not there. count: how many are."""
        index = self.files[part].get_tensor("index")
        whole, index = not index.is_floating_point(), index.long()
        if not whole or index.min() < 0 or index.max() >= (count or 2**62):
            raise self.broken(part, "has an index that is no prompt's and no class's")

    def check_finite(self, part, name, values):
        """Raises UserError unless these values of a tensor of a file are."""
        if not values.isfinite().all():
            raise self.broken(part, f"has numbers in {name} that are not finite")

    def rows(self, row, state):
        """One state of each of B trajectories.

        row, state (B,) int64 -> {"index": (B,) int64, "x", "v", ...: (B, ...) float32}.
        """
        where = [
            (self.files[r // self.batch], r % self.batch, k)
            for r, k in zip(row.tolist(), state.tolist())
        ]
        found = {"index": torch.stack([file.get_slice("index")[r] for file, r, _ in where])}
        for name in self.files[0].keys():
            if name != "index":
                states = [file.get_slice(name)[r, k].float() for file, r, k in where]
                found[name] = torch.stack(states)
                for r, values in zip(row.tolist(), states):
                    self.check_finite(r // self.batch, name, values)
        return found
