"""What latent_fm.py trains on: items, labels and segmentation maps, checked against its --task."""

import json
import re
from dataclasses import dataclass
from typing import Any

import torch

from models.files import UserError
from models.plumbing.data import Rows, load_data, reading_of, refuse_bytes_as_floats
from models.plumbing.latents import Posteriors, is_posteriors
from models.plumbing.loading import Decoded


@dataclass
class TrainingData:
    """What a run trains on.

    x             pixels (N, ...), uint8 or in [-1, 1]; a tensor, Rows of a file, or Decoded
    label         (N,) int64, or None
    num_classes   of the labels, 0 for tasks without; class_names: a list of them, or None
    maps          class numbers (N, H, W), or None; map_classes: how many there are
    map_mirror    (256,) int64, what each class of a map is in a mirror; None without --hflip
    """

    x: Any
    label: Any = None
    num_classes: int = 0
    class_names: list | None = None
    maps: Any = None
    map_classes: int = 0
    map_mirror: Any = None


def load_training_data(args, world):
    """--data and --maps -> TrainingData. Raises UserError for what --task cannot train on.

    world: the embedded world that --data names, or None.
    """
    where, with_context = f"--data {args.data}", args.task in ("inpaint", "semantic")
    if not world and is_posteriors(args.data):
        return load_posteriors(args, where)
    maps = args.maps or bool(world)  # a world has its own
    maps = maps if args.task == "semantic" else None
    flat = args.task != "class"  # without classes, images need no subfolders
    how = dict(flat=flat, maps=maps, crop=args.crop, **reading_of(args))
    found = load_data(args.data, args.resolution, args.pool, args.seed, **how)
    x, cond, class_names = found
    data = TrainingData(x, cond.get("label"))
    if isinstance(x, Rows):
        refuse_bytes_as_floats(where, x, most=0.5)
    if isinstance(x, Rows) and x.dim() == 4 and x.shape[1] > 4 and x.shape[3] in (1, 3, 4):
        raise UserError(f"{where}: x0 is {x.shape}: give images as (N, C, H, W), channels first")
    if args.task == "class" and data.label is None:
        raise UserError(
            f"{where}: no cond.label tensor, which --task class needs; --task uncond does without"
        )
    if x.dim() != 4 and (not world or with_context):
        raise UserError(f"{where}: x0 is {tuple(x.shape)}; wanted images (N, C, H, W)")
    if args.task == "class":
        data.num_classes, data.class_names = count_classes(where, world, data.label), class_names
    if args.task == "semantic":
        data.maps, data.map_classes = check_maps(where, world, x, cond.get("map"))
        if args.hflip:
            data.map_mirror = mirror_classes(map_names(args, world, data.map_classes))
    return data


def load_posteriors(args, where):
    """Latents that were made elsewhere, for `load_training_data`."""
    if args.hflip or args.cache_latents or args.task not in ("class", "uncond"):
        raise UserError(
            f"{where} has latents, not pictures: leave --hflip and --cache_latents out, and give "
            "--task class or uncond"
        )
    x = Posteriors(args.data, args.autoencoder, flat=args.task == "uncond")
    data = TrainingData(x, x.label)
    if args.task == "class" and x.label is None:
        raise UserError(f"{where}: no cond.label tensor: give it, or --task uncond")
    if args.task == "class":
        data.num_classes, data.class_names = count_classes(where, None, x.label), x.classes
    return data


def count_classes(where, world, label):
    """The number of classes of label (N,). Raises UserError for a class without items."""
    num_classes = world.num_classes if world else int(label.max()) + 1
    if int(label.min()) < 0 or len(label.unique()) < num_classes:
        raise UserError(
            f"{where}: cond.label must use every class from 0 to its largest, {num_classes - 1}; "
            "renumber the classes"
        )
    return num_classes


NO_CLASS = "{where}: every map is 255, no class, everywhere: give maps with classes"


def check_maps(where, world, x, maps):
    """-> maps (N, H, W) as a tensor, number of their classes. Raises UserError for others."""
    want = (len(x), *x.shape[2:])
    if maps is None or tuple(maps.shape) != want:
        raise UserError(
            f"{where}: --task semantic needs cond.map, class numbers (N, H, W) = {want}"
        )
    if isinstance(maps, Decoded):
        if maps.most < 0:
            raise UserError(NO_CLASS.format(where=where))
        return maps, 1 + maps.most
    if isinstance(maps, Rows):  # a file's maps are read whole: they are one byte a pixel
        maps = maps[torch.arange(len(maps))]
    if maps.is_floating_point() or int(maps.min()) < 0 or int(maps.max()) > 255:
        raise UserError(f"{where}: cond.map must hold integers, 0 to 254, or 255 for none")
    known = maps[maps != 255]
    if not len(known):
        raise UserError(NO_CLASS.format(where=where))
    return maps, getattr(world, "map_classes", None) or 1 + int(known.max())


def map_names(args, world, classes):
    """Names of the maps' classes, from --map_names; a world's have no sides. Raises UserError."""
    if world:
        return []
    try:
        with open(args.map_names, encoding="utf-8") as f:
            names = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(f"--map_names {args.map_names} is not readable JSON: {e}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'--map_names {args.map_names}: wanted a list, ["background", "skin", ...]')
    if len(names) < classes:
        raise UserError(
            f"--map_names {args.map_names} names {len(names)} classes, and the maps have {classes}"
        )
    return names


SIDES = {"l": "r", "r": "l", "left": "right", "right": "left"}  # as words of a class's name


def mirror_classes(names):
    """What each class becomes in a mirror: l_brow is r_brow, left_arm right_arm, skin itself.

    names: of the classes 0, 1, ..., of which a map can have 256. -> (256,) int64. Raises UserError
    for a side without the other.
    """
    mirror, there = torch.arange(256), [name.lower() for name in names[:256]]
    for k, name in enumerate(there):
        words = re.split(r"([ _-]+)", name)
        other = "".join(SIDES.get(word, word) for word in words)
        if other not in there:
            raise UserError(f"--map_names: {name!r} has no {other!r}, which it is in a mirror")
        mirror[k] = k if other == name else there.index(other)
    return mirror
