"""Turn latents, such as the samples.safetensors of a run, into GIFs of videos or PNGs of images.

    python -m models.decode --teacher FOLDER --latents samples.safetensors --output runs/pictures

The autoencoder in FOLDER decides how. FOLDER is a diffusers pipeline with vae/ (AutoencoderKLWan or
AutoencoderKL), a run of ours with autoencoder/ beside student/, or the folder of an AutoencoderKL.
Only pipelines need diffusers. models/encode.py is the other end.
"""

import functools
import importlib
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from models.files import UserError, load_json, load_tensors
from models.networks.latent_space import load_space
from models.plumbing.flags import Parser, number
from models.plumbing.run import run_main


def require(library):
    """Import an optional library. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(library)
    except ImportError:
        raise UserError(
            f"{library} is not installed; it is needed to encode prompts and images, and to decode "
            f"latents: pip install {library}"
        ) from None


def load(library, kind, pipeline_folder, component, **keywords):
    """library.kind.from_pretrained(pipeline_folder/component); networks in eval mode, on any GPU.

    Raises UserError for a missing library or folder, and the library's own errors for bad files.
    """
    cls, path = getattr(require(library), kind), Path(pipeline_folder) / component
    if not path.is_dir():
        raise UserError(f"no folder {path}; pass a diffusers pipeline folder, with {component}/")
    loaded = cls.from_pretrained(str(path), local_files_only=True, **keywords)
    if isinstance(loaded, nn.Module):
        loaded.to(device()).eval()
    return loaded


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def to_bytes(pixels):
    """Pixels in [-1, 1], as autoencoders give them -> uint8 on the CPU, same shape."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu()


def check_latents(x0, channels, sides):
    """Raises ValueError unless x0 is (B, channels, *sides)."""
    if x0.dim() != 2 + len(sides) or x0.shape[1] != channels:
        raise ValueError(
            f"x0 has shape {tuple(x0.shape)}; this VAE needs (B, {channels}, {', '.join(sides)})"
        )


@torch.no_grad()
def decode_wan(pipeline_folder, x0):
    """Pixels of normalised latents x0 (B, C, T, H, W) -> uint8 (B, 4T - 3, 3, fH, fW) on the CPU.

    C = 16 and f = 8; of Wan 2.2's 5B C = 48 and f = 16. The VAE's own latents are x0 * latents_std
    + latents_mean per channel (its config). Decoded in float32, one video at a time. Raises
    ValueError for a wrong shape of x0, UserError if a library or folder is missing.
    """
    vae = load("diffusers", "AutoencoderKLWan", pipeline_folder, "vae", torch_dtype=torch.float32)
    check_latents(x0, vae.config.z_dim, ("T", "H", "W"))
    mean, std = (
        torch.tensor(stat, device=vae.device).view(1, -1, 1, 1, 1)
        for stat in (vae.config.latents_mean, vae.config.latents_std)
    )
    videos = []
    for row in x0.split(1):
        pixels = vae.decode(row.to(vae.device, torch.float32) * std + mean).sample
        videos.append(to_bytes(pixels).transpose(1, 2))  # from (1, 3, T', H', W')
    return torch.cat(videos)


@torch.no_grad()
def decode_images(pipeline_folder, x0):
    """Pixels of image latents x0 (B, C, H, W) -> uint8 (B, 3, 8H, 8W) on the CPU.

    The VAE's own latents are x0 / scaling_factor + shift_factor (its config; no shift_factor: 0).
    Decoded in float32, one image at a time. Raises ValueError for a wrong shape of x0, UserError if
    a library or folder is missing.
    """
    vae = load("diffusers", "AutoencoderKL", pipeline_folder, "vae", torch_dtype=torch.float32)
    c = vae.config
    check_latents(x0, c.latent_channels, ("H", "W"))
    images = []
    for row in x0.split(1):
        latent = row.to(vae.device, torch.float32) / c.scaling_factor + (c.shift_factor or 0.0)
        images.append(to_bytes(vae.decode(latent).sample))
    return torch.cat(images)


def decode_in_space(folder, x0):
    """Pixels of latents x0 (B, C, H, W) of a latent space of ours -> uint8 (B, 3, fH, fW).

    folder is what load_space takes. Decoded in float32, one image at a time. Raises ValueError for
    a wrong shape of x0 or an autoencoder that makes no images, UserError for wrong files.
    """
    space = load_space(str(folder)).to(device())
    config = space.autoencoder.config
    check_latents(x0, config.get("latent_channels", config.get("channels")), ("H", "W"))
    rows = [space.to_pixels(row.to(device(), torch.float32)) for row in x0.split(1)]
    pixels = to_bytes(torch.cat(rows))
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"its pixels have {pixels.shape[1]} channels; pictures have 1 or 3")
    return pixels.expand(-1, 3, -1, -1)


# By the class of a pipeline's vae/: function, and the kind of file that shows what it returns.
DECODERS = {"AutoencoderKLWan": (decode_wan, "gif"), "AutoencoderKL": (decode_images, "png")}


def choose_decoder(folder):
    """The autoencoder of a --teacher folder -> function of x0, "gif" or "png". Raises UserError."""
    root = Path(folder).resolve()
    vae, own = root / "vae" / "config.json", root / "config.json"
    if vae.is_file():
        name = str(load_json(vae).get("_class_name"))
        if name not in DECODERS:
            raise UserError(
                f"--teacher {folder}: its vae/ is {name}, which cannot be decoded here: pass a "
                f"pipeline folder with {' or '.join(DECODERS)}"
            )
        decode, suffix = DECODERS[name]
        return functools.partial(decode, folder), suffix
    run = root.parent if root.name == "student" else root
    for space in (root, run / "autoencoder"):
        if (space / "latents.json").is_file():
            return functools.partial(decode_in_space, space), "png"
    if own.is_file() and load_json(own).get("_class_name") == "AutoencoderKL":
        return functools.partial(decode_in_space, root), "png"
    fault = "has no autoencoder" if root.is_dir() else "is not a folder"
    raise UserError(
        f"--teacher {folder} {fault}: pass a diffusers pipeline folder with vae/, a run "
        "of ours with autoencoder/, or the folder of an AutoencoderKL"
    )


def to_image(pixels):
    """uint8 (3, H, W) -> PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def save_picture(pixels, path, fps):
    """uint8 (3, H, W) as a PNG, or (T, 3, H, W) as an endless GIF, by the ending of path."""
    if path.suffix == ".png":
        to_image(pixels).save(path)
    else:
        first, *rest = [to_image(frame) for frame in pixels]
        first.save(path, save_all=True, append_images=rest, duration=1000 / fps, loop=0)


def main(argv=None):
    p = Parser(prog="python -m models.decode", description=__doc__.partition("\n")[0])
    p.add_argument("--teacher", required=True, help="pipeline folder, run of ours or autoencoder")
    p.add_argument("--latents", required=True, help="safetensors file with x0 (B, C, [T,] H, W)")
    p.add_argument("--output", required=True, help="folder for the pictures 000, 001, ...")
    p.add_argument("--fps", type=number(float, above=0), help="of a GIF; if left out, Wan's 16")
    args = p.parse_args(argv)
    decode, suffix = choose_decoder(args.teacher)
    if args.fps is not None and suffix != "gif":
        raise UserError(
            f"--fps is for videos, and --teacher {args.teacher} makes images: leave it out"
        )
    try:
        x0 = load_tensors(args.latents).get("x0")
    except UserError as error:
        raise UserError(f"cannot read --latents: {error}") from None
    if x0 is None:
        raise UserError(
            f"--latents {args.latents} has no tensor x0; write the latents under that key"
        )
    try:
        decoded = decode(x0)
    except (OSError, ValueError) as error:  # a wrong shape of x0, an incomplete vae/
        raise UserError(f"--teacher {args.teacher}, --latents {args.latents}: {error}") from None
    try:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        for i, pixels in enumerate(decoded):
            path = Path(args.output) / f"{i:03d}.{suffix}"
            save_picture(pixels, path, args.fps or 16)
            print(path)
    except OSError as error:
        raise UserError(
            f"cannot write --output {args.output}: {error}; name a new folder"
        ) from None


if __name__ == "__main__":
    run_main(main)
