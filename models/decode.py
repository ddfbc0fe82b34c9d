"""Turn latents, such as the samples.safetensors of a run, into pictures or videos.

    python -m models.decode --teacher FOLDER --latents samples.safetensors --output runs/pictures

The autoencoder in FOLDER decides how. FOLDER is a diffusers pipeline with vae/ (models/vaes.py has
the classes), a run of ours with autoencoder/ beside student/, or the folder of an autoencoder.
Images become PNGs. Videos become GIFs, MP4s (--format mp4, where a library for them is installed:
models/videos.py) or folders of PNGs (--format png). Rows are read, decoded and written one by one;
an interrupted command goes on, and a folder with pictures of other latents is refused.
AutoencoderKL needs no library, the others diffusers. models/encode.py is the other end.
"""

import os
from pathlib import Path

import torch
from PIL import Image

from models.files import UserError, fingerprint, load_json, open_tensors, save_json
from models.libraries import device
from models.plumbing.flags import Parser, number
from models.plumbing.run import run_main, writing
from models.vaes import AUTOENCODERS, find_autoencoder, load_autoencoder
from models.videos import video_library, write_mp4


def to_bytes(pixels):
    """Pixels in [-1, 1], as autoencoders give them -> uint8 on the CPU, same shape."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu()


def open_latents(path):
    """The tensor x0 of --latents, to be read row by row.  -> a slice. Raises UserError."""
    try:
        file = open_tensors(path)
    except UserError as error:
        raise UserError(f"cannot read --latents: {error}") from None
    if "x0" not in file.keys():
        there = ", ".join(sorted(file.keys())) or "nothing"
        raise UserError(
            f"--latents {path} has no tensor x0, but {there}; write the latents under that key"
        )
    rows = file.get_slice("x0")
    if rows.get_shape()[:1] in ([], [0]):
        raise UserError(f"--latents {path}: x0 has no rows, {rows.get_shape()}: name another file")
    return rows


def check_latents(shape, space, teacher, path):
    """Raises UserError unless latents of this shape are a space's. teacher, path: the flags'."""
    sides = ["T", "H", "W"] if space.step else ["H", "W"]
    if len(shape) != 2 + len(sides) or shape[1] != space.channels or 0 in shape:
        raise UserError(
            f"--latents {path}: x0 has shape {tuple(shape)}, and the autoencoder of --teacher "
            f"{teacher} needs (B, {space.channels}, {', '.join(sides)}): name the teacher that "
            "these were sampled from"
        )


def decode_row(space, z, where):
    """Latents z (1, C, [T,] H, W) of a space -> uint8 ([F,] 3, H, W) on the CPU, in RGB.

    Decoded in float32. where: what messages begin with. Raises UserError for latents that are not
    finite, and for an autoencoder whose pixels are no pictures.
    """
    if not z.isfinite().all():
        raise UserError(f"{where} has numbers that are not finite: sample again, or take it out")
    pixels = space.to_pixels(z.to(device(), torch.float32))[0]
    if pixels.shape[0] not in (1, 3):
        raise UserError(f"{where} gives pixels of {len(pixels)} channels; pictures have 1 or 3")
    pixels = to_bytes(pixels).expand(3, *pixels.shape[1:])
    return pixels.transpose(0, 1) if space.step else pixels


def to_image(pixels):
    """uint8 (3, H, W) -> PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def save_picture(pixels, path, fps):
    """An image, uint8 (3, H, W), as a PNG; a video (F, 3, H, W) by the ending of path.

    .gif: endless; .mp4; none: a folder of PNGs. fps: frames a second, of the first two. Written
    under a hidden name and renamed, so that path is whole once it is there.
    """
    begun = path.with_name(f".begun-{path.name}")
    if path.suffix == ".png":
        to_image(pixels).save(begun)
    elif path.suffix == ".gif":
        first, *rest = [to_image(frame) for frame in pixels]
        times = [round(100 * i / fps) for i in range(len(pixels) + 1)]  # hundredths of a second
        lasts = [10 * (b - a) for a, b in zip(times, times[1:])]  # in a GIF's own steps
        first.save(begun, save_all=True, append_images=rest, duration=lasts, loop=0)
    elif path.suffix == ".mp4":
        write_mp4(str(begun), pixels.permute(0, 2, 3, 1).numpy(), fps)
    else:
        begun.mkdir(exist_ok=True)
        for i, frame in enumerate(pixels):
            to_image(frame).save(begun / f"{i:03d}.png")
    os.replace(begun, path)


def begin_folder(output, about):
    """Make the folder, or see that what it has was decoded alike. Raises UserError.

    about: of what the pictures are made, as JSON can hold it; it is kept beside them.
    """
    folder, there = Path(output), Path(output) / "decoded.json"
    if there.is_file():
        old = load_json(there)
        other = [name for name in about if old.get(name) != about[name]]
        if other:
            raise UserError(
                f"--output {output} has pictures of other {', '.join(other)}: name another folder, "
                "or remove this one"
            )
    elif folder.is_dir() and any(path.stem.isdecimal() for path in folder.iterdir()):
        raise UserError(
            f"--output {output} has pictures of something else: name another folder, or remove "
            "this one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_json(about, there)


def parse_args(argv):
    p = Parser(prog="python -m models.decode", description=(__doc__ or "").partition("\n")[0])
    add = p.add_argument
    add("--teacher", required=True, help="pipeline folder, run of ours or autoencoder")
    add("--latents", required=True, help="safetensors file with x0 (B, C, [T,] H, W)")
    add("--output", required=True, help="folder for the pictures 000, 001, ...")
    formats = "of videos: gif, mp4, or png, a folder of frames each; if left out, gif"
    add("--format", choices=("gif", "mp4", "png"), help=formats)
    rates = "if left out, Wan's 16 (5B: 24) or CogVideoX's 8"
    add("--fps", type=number(float, above=0), help=f"frames a second of a GIF or MP4; {rates}")
    return p.parse_args(argv)


def check_flags(args, videos):
    """Raises UserError for flags that have no effect, and for a library that is missing."""
    for flag in ("fps", "format"):
        if getattr(args, flag) is not None and not videos:
            raise UserError(
                f"--{flag} is for videos, and --teacher {args.teacher} makes images: leave it out"
            )
    if args.fps is not None and args.format == "png":
        raise UserError("--fps has no effect with --format png: leave it out")
    if args.fps and args.fps > 50 and args.format != "mp4":
        raise UserError(f"--fps {args.fps:g}: GIFs have at most 50: give less, or --format mp4")
    if args.format == "mp4":
        video_library("--format mp4")


def main(argv=None):
    args = parse_args(argv)
    place, name = find_autoencoder(args.teacher)
    videos = AUTOENCODERS.get(name, False)
    check_flags(args, videos)
    rows = open_latents(args.latents)
    space = load_autoencoder(args.teacher)
    check_latents(rows.get_shape(), space, args.teacher, args.latents)
    suffix = {"gif": ".gif", "mp4": ".mp4", "png": ""}[args.format or "gif"] if videos else ".png"
    fps = args.fps or space.fps
    files = sorted(str(path) for path in Path(place).iterdir() if path.is_file())
    about = {"latents": fingerprint([args.latents]), "autoencoder": fingerprint(files), "fps": fps}
    if hasattr(space, "digest"):  # of a run, whose weights may lie elsewhere
        about["autoencoder"] += space.digest()
    where = f"--latents {args.latents}: row"
    with writing(args.output, "name a new folder"):
        begin_folder(args.output, about)
        for i in range(rows.get_shape()[0]):
            path = Path(args.output) / f"{i:03d}{suffix}"
            if not path.exists():  # of the same latents, by a run that was interrupted
                save_picture(decode_row(space, rows[i : i + 1], f"{where} {i} of x0"), path, fps)
            print(path)


if __name__ == "__main__":
    run_main(main, "the same command goes on with what is written")
