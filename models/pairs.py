"""Images or short videos with captions as rows of --data for a text teacher: latents and features.

models/encode.py has the command. Everything is read and written one by one, so that a set of any
size needs little memory. The latents are samples of the autoencoder's posterior, normalised as the
teacher sees them.
"""

import json
import os
import sys

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from models.decode import device, load
from models.draws import Draws
from models.files import RowWriter, UserError, load_json
from models.networks.latent_space import load_vae, vae_folder
from models.plumbing.data import files_below, is_image, read_frames, to_unit

# ---- images and their captions -------------------------------------------------------------------


def find_pairs(folder, captions=None):
    """All images below a folder with their captions.  -> [(path, caption)], sorted by path.

    captions: FILE.json, {"NAME": "CAPTION"}, or FILE.jsonl with file_name and text in each line;
    None: a .txt of the same name beside each image. Raises UserError, also for an image without.
    """
    if not os.path.isdir(folder):
        raise UserError(f"--images {folder} is not a folder; put images with captions in one")
    paths = [path for path in files_below(folder) if is_image(path)]
    if not paths:
        raise UserError(f"--images {folder} holds no images")
    names = [os.path.relpath(path, folder) for path in paths]
    known = read_captions(captions) if captions else None
    texts = [known.get(name) if known else read_text(path) for name, path in zip(names, paths)]
    bare = [name for name, text in zip(names, texts) if not text]
    if bare:
        where = f"--captions {captions}" if captions else "a .txt of the same name beside it"
        raise UserError(
            f"--images {folder}: {len(bare)} of {len(names)} images have no caption, such as "
            f"{bare[0]}: write it into {where}, or take the image out"
        )
    return list(zip(paths, texts))


def read_text(image):
    """The caption in the .txt beside an image, or None."""
    path = os.path.splitext(image)[0] + ".txt"
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as f:
        return " ".join(f.read().split())


def read_captions(path):
    """--captions FILE -> {name of an image: caption}. Raises UserError."""
    if path.endswith(".json"):
        known = load_json(path)
    else:
        try:
            with open(path, encoding="utf-8") as f:
                rows = [json.loads(line) for line in f if line.strip()]
            known = {row["file_name"]: row["text"] for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"--captions {path}: {type(e).__name__}: {e}; wanted FILE.json with "
                '{"NAME": "CAPTION"}, or file_name and text in each line of FILE.jsonl'
            ) from None
    if not all(isinstance(text, str) for text in known.values()):
        raise UserError(f'--captions {path}: wanted {{"NAME": "CAPTION"}}, with one text each')
    return known


def read_pixels(path, size, frames):
    """The first frames of an image, the centre of the shape of size (H, W).

    -> uint8 (3, H, W) for one frame, else (3, frames, H, W). Raises what Pillow raises, and
    ValueError for a file with fewer frames.
    """
    read = read_frames(path, frames)
    if len(read) < frames:
        raise ValueError(f"it has {len(read)} frames, --frames wants {frames}")
    lanczos = Image.Resampling.LANCZOS
    cut = [np.array(ImageOps.fit(image, size[::-1], lanczos)) for image in read]
    x = torch.from_numpy(np.stack(cut)).permute(3, 0, 1, 2)
    return x[:, 0] if frames == 1 else x


# ---- latents -------------------------------------------------------------------------------------


def load_encoder(folder, size, frames):
    """The autoencoder of a pipeline.  -> function (uint8 pixels, row number): latent (C, ...)

    AutoencoderKL encodes images. AutoencoderKLWan encodes videos of 1, 5, 9, ... frames, and needs
    diffusers. Raises UserError for another, and for sizes that it does not take.
    """
    inside = vae_folder(folder)
    path = os.path.join(inside, "config.json")
    name = str(load_json(path).get("_class_name"))
    if name not in ("AutoencoderKL", "AutoencoderKLWan"):
        raise UserError(f"{inside} is {name}: give --vae with AutoencoderKL or AutoencoderKLWan")
    if name == "AutoencoderKL" and frames > 1:
        raise UserError(f"--frames {frames}: an AutoencoderKL encodes images, leave it out")
    if (frames - 1) % 4:
        raise UserError(f"--frames {frames}: Wan's autoencoder takes 1, 5, 9, ... frames")
    if name == "AutoencoderKL":
        encode, factor = image_encoder(inside)
    else:
        encode, factor = video_encoder(inside)
    if any(side % factor for side in size):
        raise UserError(f"--resolution {size[0]} {size[1]}: sides must be multiples of {factor}")
    return encode


def image_encoder(folder):
    """-> encode, pixels a side of one latent pixel. For AutoencoderKL."""
    vae = load_vae(folder).to(device())

    @torch.no_grad()
    def encode(x, row):
        mean, logvar = vae.posterior(to_unit(x)[None].to(device()))
        return vae.normalise(mean + (logvar / 2).exp() * noise(row, mean))[0]

    return encode, vae.factor


def video_encoder(folder):
    """The same for AutoencoderKLWan."""
    parent, name = os.path.split(os.path.abspath(folder))
    vae = load("diffusers", "AutoencoderKLWan", parent, name, torch_dtype=torch.float32)
    mean, std = (
        torch.tensor(stat, device=device()).view(-1, 1, 1, 1)
        for stat in (vae.config.latents_mean, vae.config.latents_std)
    )

    @torch.no_grad()
    def encode(x, row):
        x = x if x.dim() == 4 else x[:, None]
        posterior = vae.encode(to_unit(x)[None].to(device())).latent_dist
        return (posterior.mean + posterior.std * noise(row, posterior.mean))[0].sub(mean) / std

    return encode, vae.spatial_compression_ratio


def noise(row, like):
    """Standard normal for this row, the same on every machine.  -> (1, ...) like `like`"""
    return Draws(0, "posterior", 0, [row]).normal("posterior", like.shape[1:]).to(like)


# ---- the file ------------------------------------------------------------------------------------


def write_pairs(output, pairs, size, frames, encode, text_rows, length):
    """Encode and write x0, cond.NAME (N, ...) and uncond.NAME (1, ...); what fails is skipped.

    pairs: see find_pairs. encode: see load_encoder. text_rows(captions) -> for each of them and for
    the negative prompt behind them {NAME: (n, ...)}, n at most length. -> {name: shape}. Raises
    UserError.
    """
    kept = []
    with RowWriter(output) as file:
        for path, caption in tqdm(pairs, desc="latents"):
            try:
                x = read_pixels(path, size, frames)
            except Exception as e:  # Pillow raises errors of many kinds
                print(f"skipped {path}: {type(e).__name__}: {e}", file=sys.stderr)
                continue
            latent = encode(x, len(kept))
            if not kept:
                file.add("x0", torch.float16, (len(pairs), *latent.shape))
            file.write("x0", len(kept), latent)
            kept.append(caption)
        if not kept:
            raise UserError(f"none of the {len(pairs)} images could be read")
        file.cut(len(kept))
        rows = tqdm(text_rows(kept), desc="captions", total=len(kept) + 1)
        for i, row in enumerate(rows):
            for name, value in row.items():
                shape = (length, *value.shape[1:])
                if i == 0:
                    file.add(f"cond.{name}", value.dtype, (len(kept), *shape))
                    file.add(f"uncond.{name}", value.dtype, (1, *shape))
                padded = value.new_zeros(shape)
                padded[: len(value)] = value
                kind, at = ("cond", i) if i < len(kept) else ("uncond", 0)
                file.write(f"{kind}.{name}", at, padded)
    return {name: tuple(shape) for name, (_, shape, *_) in file.tensors.items()}
