"""A data set in the layout of TRELLIS-500K, as TRELLIS's own tools write it.

    ROOT/metadata.csv                       sha256, aesthetic_score, ...: a row an object
    ROOT/ss_latents/MODEL/SHA.npz           mean (8, 16, 16, 16): what the first stage learns
    ROOT/latents/MODEL/SHA.npz              coords (n, 3), feats (n, 8): what the second stage does
    ROOT/renders_cond/SHA/transforms.json   frames, each with the file_path of a view

An object is used if its latent and its views are there, its aesthetic score is not below 4.5 and,
in the second stage, it has at most 32,768 points, as TRELLIS trains on them. A batch gets one view
of each object, drawn anew every time, as DINOv2's tokens, which are made while training: stored
tokens of 24 views would take 67 MB an object. Features of the second stage are normalised as
TRELLIS's samples are.
"""

import csv
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from models.files import UserError, load_json
from models.image_tokens import ImageTokens, prepare_image
from models.networks.trellis import SLAT_MEAN, SLAT_STD
from models.plumbing.data import SparsePlaces

LEAST_SCORE, MOST_POINTS = 4.5, 32768  # of TRELLIS's configs of both stages
LATENTS = {"sparse_structure": "ss_latents", "slat": "latents"}  # by the stage of a network


def is_trellis_set(folder):
    """Whether a folder is of this layout."""
    return bool(folder) and os.path.isfile(os.path.join(folder, "metadata.csv"))


def normalization(root):
    """Mean and standard deviation of the structured latent's channels, (C,) each.

    root: TRELLIS's folder, whose pipeline.json has them; elsewhere they are TRELLIS-image-large's.
    """
    described = os.path.join(root, "pipeline.json")
    args = load_json(described).get("args", {}) if os.path.isfile(described) else {}
    stored = args.get("slat_normalization", {"mean": SLAT_MEAN, "std": SLAT_STD})
    return torch.tensor(stored["mean"]), torch.tensor(stored["std"])


def open_trellis_set(root, net, teacher, dinov2, device, say=print):
    """The objects of a set for one stage of TRELLIS.  -> data, {"tokens": Views}

    net: a network of that stage. teacher: its path, ROOT/ckpts/NAME. data: Structures, or of the
    second stage Points. say: prints a line. Raises UserError.
    """
    if net.uncond_names:
        raise UserError(
            f"--data {root} has views, and this teacher takes tokens of prompts: join them with "
            "the latents in one FILE.safetensors"
        )
    kind = LATENTS[net.stage]
    models = sorted(os.listdir(os.path.join(root, kind))) if is_there(root, kind) else []
    if len(models) != 1:
        raise UserError(
            f"--data {root}: {kind}/ has {len(models)} folders ({', '.join(models) or 'none'}), "
            "one for each encoder: leave the one there whose latents the teacher makes"
        )
    folder = os.path.join(root, kind, models[0])
    names = objects_of(root, folder, MOST_POINTS if net.stage == "slat" else math.inf, say)
    if net.stage == "slat":
        data = Points(folder, names, normalization(os.path.dirname(os.path.dirname(teacher))))
    else:
        data = Structures(folder, names)
    data.check(root, net)
    views = Views(root, names, ImageTokens(dinov2, device))
    width = net.config["cond_channels"]
    if views.encoder.width != width:
        raise UserError(
            f"--dinov2 {dinov2} makes tokens of width {views.encoder.width}, the teacher takes "
            f"{width}: give the encoder that it was trained with"
        )
    return data, {"tokens": views}


def is_there(root, *names):
    """Whether there is such a folder."""
    return os.path.isdir(os.path.join(root, *names))


def objects_of(root, folder, most, say=print):
    """The objects of metadata.csv that can be used, in its order.  -> [sha256]. Raises UserError.

    folder: of their latents. most: points of one. What is left out is counted in a line.
    """
    path = os.path.join(root, "metadata.csv")
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    if not rows or "sha256" not in rows[0]:
        raise UserError(f"{path} has no column sha256: make it with TRELLIS's dataset_toolkits")
    found, left, scored = [], {}, "aesthetic_score" in rows[0]
    for row in rows:
        name = row["sha256"] or "no name"
        score = number(row, "aesthetic_score", float("nan")) if scored else LEAST_SCORE
        views = os.path.join(root, "renders_cond", name, "transforms.json")
        wrong = {
            "without a latent": not os.path.isfile(os.path.join(folder, name + ".npz")),
            "without views": not os.path.isfile(views),
            f"with no aesthetic score of {LEAST_SCORE} or more": not score >= LEAST_SCORE,
            f"of more than {most} points": number(row, "num_voxels", 0) > most,
        }
        why = next((reason for reason, is_so in wrong.items() if is_so), None)
        if why:
            left[why] = left.get(why, 0) + 1
        else:
            found.append(name)
    text = ", ".join(f"{n} {why}" for why, n in left.items()) or "none"
    if not found:
        raise UserError(
            f"--data {root}: no object of metadata.csv can be used ({text}): encode latents and "
            "render views with TRELLIS's dataset_toolkits"
        )
    say(f"--data {root}: {len(found)} objects; left out: {text}")
    return found


def number(row, column, default):
    """A number of a row of metadata.csv; default where it has none."""
    try:
        return float(row.get(column) or default)
    except ValueError:
        return default


def read_npz(folder, name, keys):
    """Arrays of one object's file as tensors.  Raises UserError."""
    path = os.path.join(folder, name + ".npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = [torch.from_numpy(np.asarray(file[key])) for key in keys]
    except Exception as error:  # numpy raises many kinds for damaged files
        raise UserError(f"{path} cannot be read ({error}): encode it again") from None
    if not all(x.isfinite().all() for x in found if x.is_floating_point()):
        raise UserError(f"{path} has numbers that are not finite: encode it again")
    return found


def unlike(folder, name):
    """The UserError of an object whose arrays are of another shape than the first's."""
    path = os.path.join(folder, name + ".npz")
    return UserError(f"{path} is not like the other latents there: encode it again")


class Structures:
    """Latents of the first stage, read when they are asked for: data[index (B,)] -> (B, C, R, R, R)
    float32."""

    def __init__(self, folder, names):
        self.folder, self.names = folder, names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        names = [self.names[i] for i in index.tolist()]
        rows = [read_npz(self.folder, name, ["mean"])[0] for name in names]
        for name, row in zip(names, rows):
            if row.shape != rows[0].shape:
                raise unlike(self.folder, name)
        return torch.stack(rows).float()

    def check(self, root, net):
        """Raises UserError for latents of another shape than the network's."""
        shape = tuple(self[torch.tensor([0])].shape[1:])
        if shape != net.latent_shape:
            raise UserError(
                f"--data {root}: latents are {shape}, the teacher takes {net.latent_shape}: give "
                "those of its own encoder"
            )


class Points(SparsePlaces):
    """Latents of the second stage: data[index (B,)] -> feats (n, C) float32, normalised, and coords
    (n, 4) int64; see SparseRows."""

    def __init__(self, folder, names, stats):
        """stats: mean and standard deviation of each channel."""
        self.folder, self.names = folder, names
        self.mean, self.std = stats

    def __len__(self):
        return len(self.names)

    def places(self, index):
        return self[index][1]

    def __getitem__(self, index):
        feats, coords = [], []
        for place, i in enumerate(index.tolist()):
            at, rows = read_npz(self.folder, self.names[i], ["coords", "feats"])
            if at.shape != (len(rows), 3) or rows.shape[1:] != self.mean.shape or not len(rows):
                raise unlike(self.folder, self.names[i])
            coords.append(F.pad(at.long(), (1, 0), value=place))
            feats.append((rows.float() - self.mean) / self.std)
        return torch.cat(feats), torch.cat(coords)

    def check(self, root, net):
        """Raises UserError for points that the network does not take."""
        name, channels = self.names[0], net.latent_shape[0]
        at, rows = read_npz(self.folder, name, ["coords", "feats"])
        right = at.shape == (len(rows), 3) and rows.shape == (len(rows), channels)
        if not right or len(self.mean) != channels or not len(rows):
            raise UserError(
                f"--data {root}: {name} has coords {tuple(at.shape)} and feats "
                f"{tuple(rows.shape)}, the teacher takes (n, 3) and (n, {channels}): give latents "
                "of its own encoder"
            )


class Views:
    """Tokens of views, made when they are asked for: views[index (B,)] -> (B, L, D) float32.

    That is of each object's first view, and `drawn` takes any of them at random.
    """

    def __init__(self, root, names, encoder):
        self.root, self.names, self.encoder = os.path.join(root, "renders_cond"), names, encoder

    def __len__(self):
        return len(self.names)

    @property
    def shape(self):
        return len(self), self.encoder.length, self.encoder.width

    def __getitem__(self, index):
        return self.tokens(index, torch.zeros_like(index))

    def drawn(self, draw, index):
        """One view of each object at random, on the device of the draws.  -> (B, L, D)"""
        return self.tokens(index, draw.integer("view", 2**31 - 1)).to(draw.device)

    def tokens(self, index, view):
        """index, view (B,): the latter modulo the object's number of views.  -> (B, L, D)"""
        pairs = zip(index.tolist(), view.tolist())
        return self.encoder(torch.stack([self.pixels(self.names[i], n) for i, n in pairs]))

    def pixels(self, name, view):
        """One view, prepared for DINOv2.  -> uint8 (3, 518, 518). Raises UserError."""
        folder = os.path.join(self.root, name)
        frames = load_json(os.path.join(folder, "transforms.json")).get("frames") or []
        try:
            path = os.path.join(folder, os.path.basename(frames[view % len(frames)]["file_path"]))
            with Image.open(path) as image:
                return prepare_image(image)
        except Exception as error:  # of Pillow, and of what is no list of frames
            raise UserError(
                f"a view in {folder} cannot be used ({error}): render it again"
            ) from None
