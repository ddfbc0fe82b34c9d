"""Turn prompts or images into the features that a teacher is conditioned on, before training.

    python -m models.encode --teacher FOLDER --prompts_txt prompts.txt --output prompts.safetensors
    python -m models.encode --images FOLDER --output tokens.safetensors
    python -m models.encode --teacher FOLDER --images FOLDER --resolution 512 \\
        --output data.safetensors

The first form takes a diffusers pipeline folder of a teacher that has prompts (Wan, Z-Image,
PixArt, CogVideoX, Qwen-Image, Lumina-Image 2.0, Stable Diffusion, SDXL), or the root of one of
TRELLIS's text models. The class that model_index.json names, or without that file the class of the
network, decides how prompts are encoded and the defaults of --negative_prompt and --max_length
(models/text_encoders.py). The second form is for TRELLIS's image models; --teacher may name their
root. TRELLIS's encoders of prompts and images are not in its root: --clip, --dinov2. The third form
makes real data for a GAN on the teachers of the first: images, or with --frames videos, and a
caption for each of them, through the pipeline's autoencoder (models/pairs.py, models/vaes.py).

The output is what the scripts take as --prompts: one row of "cond.*" for each prompt or image, and
a single row of "uncond.*". The third form's has "x0" beside, and is what they take as --data, too.
The first form's has prompts without their padding, in shards beyond --shard_gb (models/prompts.py).
Both go to disk as they are encoded, and the same command goes on with an interrupted one.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from PIL import Image

from models import pairs as pairing
from models.files import DTYPES, UserError
from models.files import fingerprint as hash_of_files
from models.image_tokens import DINOV2, ImageTokens, prepare_image
from models.libraries import device, require
from models.plumbing.flags import Parser, number
from models.plumbing.run import run_main, writing
from models.progress import progress
from models.prompts import PromptWriter, is_complete, open_prompts, refuse_other
from models.text_encoders import CLIP, FAMILIES, ask, padded_rows, teacher_class
from models.vaes import find_autoencoder, load_autoencoder

# ---- images of TRELLIS ---------------------------------------------------------------------------


def image_paths(folder):
    """The images in a folder, sorted by name, each of which can be used.  -> paths.

    All are looked at before the first is encoded. Raises UserError.
    """
    if not os.path.isdir(folder):
        raise UserError(f"--images {folder} is not a folder; put one image for each object in one")
    paths = [os.path.join(folder, n) for n in sorted(os.listdir(folder)) if not n.startswith(".")]
    paths = [path for path in paths if os.path.isfile(path)]
    if not paths:
        raise UserError(f"--images {folder} holds no files; put one image for each object in it")
    for path in progress(paths, "looking at images", leave=False, delay=2):
        read_image(path)
    return paths


def read_image(path):
    """-> uint8 (3, 518, 518). Raises UserError: skipping one would shift all rows after it."""
    try:
        with Image.open(path) as image:
            return prepare_image(image)
    except Exception as e:  # Pillow raises many kinds
        why = f"{type(e).__name__}: {e}"
        raise UserError(
            f"{path} is not an image that can be used ({why}): repair it or take it out"
        ) from None


def encode_trellis_images(folder, output, dinov2=DINOV2):
    """Write DINOv2 tokens of the images in a folder, sorted by name, as TrellisImageTo3DPipeline's.

    dinov2: a transformers folder, or a name that is downloaded. The file has "cond.tokens"
    (N, 1374, 1024) and "uncond.tokens" (1, 1374, 1024) zeros in float16, the precision in which
    TRELLIS uses them (models/image_tokens.py). An interrupted command goes on, image by image.
    -> {name: shape and dtype}. Raises UserError.
    """
    require("transformers")
    paths = image_paths(folder)
    names = [os.path.basename(path) for path in paths]
    folders = [dinov2] if os.path.isdir(dinov2) else []
    fingerprint = fingerprint_of(names, [hash_of_files(paths), str(dinov2)], folders)
    if is_complete(output, fingerprint):
        print(f"{output} is there already, of the same images: remove it to encode them again")
        return stored_shapes(output)
    refuse_other(output, fingerprint)
    encoder = ImageTokens(dinov2, device())
    shape = encoder.length, encoder.width
    with pairing.RowWriter(output, {"fingerprint": fingerprint}) as file:
        file.add("cond.tokens", torch.float16, (len(paths), *shape))
        file.add("uncond.tokens", torch.float16, (1, *shape))
        file.write("uncond.tokens", 0, torch.zeros(shape))
        done = len(file.notes)
        for i in progress(range(done, len(paths)), "images"):
            file.write("cond.tokens", i, encoder(read_image(paths[i])[None])[0])
            file.note(i)
    return stored_shapes(output)


# ---- prompts to disk -----------------------------------------------------------------------------

SHARD_GB = 5.0  # as in diffusers


def read_prompts(prompts_txt):
    """The lines of a text file that are not blank -> {number of the line, from 1: str}.

    Raises UserError.
    """
    try:
        text = Path(prompts_txt).read_text(encoding="utf-8-sig")  # without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts_txt {prompts_txt} as UTF-8: {error}") from None
    prompts = {i: line for i, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not prompts:
        raise UserError(f"--prompts_txt {prompts_txt} holds no prompt; write one prompt a line")
    return prompts


def fingerprint_of(prompts, settings, folders):
    """A hash of prompts, settings and text encoder, equal where a file may be gone on with.

    settings: what JSON can hold. folders: of the tokenizer and encoder, with the names of files.
    """
    names = [(folder, p) for folder in map(Path, folders) for p in sorted(folder.rglob("*"))]
    files = [(str(path.relative_to(folder)), path) for folder, path in names if path.is_file()]
    content = hash_of_files(path for _, path in files)
    about = json.dumps([prompts, settings, [name for name, _ in files], content])
    return hashlib.sha256(about.encode()).hexdigest()[:32]


def count_tokens(encoder, prompts, names, max_length):
    """The tokens of each prompt, uncut, as a list; a line is printed where some will be cut.

    names: of the prompts, for that line.
    """
    parts = progress(range(0, len(prompts), 1024), "tokens", leave=False, delay=2)
    counts = [n for i in parts for n in encoder.count(prompts[i : i + 1024])]
    cut = [name for name, n in zip(names, counts, strict=True) if n > max_length]
    if cut:
        print(
            f"{len(cut)} of {len(prompts)} prompts have more than {max_length} tokens and are "
            f"cut, {cut[0]} first"
        )
    return counts


def sides(resolution):
    """--resolution -> [H, W]. Raises UserError."""
    if len(resolution) > 2:
        raise UserError(
            f"--resolution {' '.join(map(str, resolution))}: give H W, or one number for squares"
        )
    return (resolution * 2)[:2]


def encode_text(args):
    """--prompts_txt: write --output, or go on with it.  -> {name: shape and dtype}

    Prompts are counted first, then encoded --batch_size at a time, each batch to disk before the
    next. Raises UserError for a folder or file that does not fit.
    """
    flags = dict(clip=args.clip, resolution=args.resolution and sides(args.resolution))
    asked = ask(args.teacher, args.negative_prompt, args.max_length, **flags)
    lines = read_prompts(args.prompts_txt)
    prompts, shard_gb = list(lines.values()), args.shard_gb or SHARD_GB
    fingerprint = fingerprint_of(prompts, [*asked.settings(), shard_gb], asked.folders())
    if is_complete(args.output, fingerprint):
        print(
            f"{args.output} is there already, of the same prompts and settings: remove it to "
            "encode them again"
        )
        return stored_shapes(args.output)
    refuse_other(args.output, fingerprint)
    with blamed_on(args.teacher):
        encoder = asked.load()
        names = [f"line {i}" for i in lines]
        kept = asked.kept(count_tokens(encoder, prompts, names, asked.max_length))
        null, mask = encoder.negative(asked.negative)
    name, *beside = null
    uncond = null[name][0][mask[0]]
    metadata = {"padded_to": str(asked.length([*kept, len(uncond)]))}
    metadata |= {"mask": asked.family.mask, "fingerprint": fingerprint, **asked.takers()}
    shape = name, torch.tensor(kept), uncond, metadata, int(shard_gb * 1e9)
    with PromptWriter(args.output, *shape, {k: null[k][0] for k in beside}) as writer:
        write_text(writer, prompts, encoder, args.batch_size or 1, args.teacher)
    return stored_shapes(args.output)


def write_text(writer, prompts, encoder, batch_size, folder):
    """Encode the prompts that the writer does not have, and give it the tokens of each.

    Batches are those of an uninterrupted run: the first may have prompts that are there already.
    """
    done = writer.done
    if done:
        print(f"{writer.path}: going on after {done} of {len(prompts)} prompts", flush=True)
    with progress(text="prompts", total=len(prompts), initial=done) as bar:
        for first in range(done - done % batch_size, len(prompts), batch_size):
            with blamed_on(folder):
                found, mask = encoder.features(prompts[first : first + batch_size])
            name, *beside = found
            for i, keep in enumerate(mask):
                refuse_overflow(found[name][i], folder)
                if first + i >= done:
                    writer.write(found[name][i][keep], **{k: found[k][i] for k in beside})
                    bar.update()


def refuse_overflow(features, folder):
    """Raises UserError for features that are not finite, as float16 can make them."""
    if not features.isfinite().all():
        raise UserError(
            f"--teacher {folder}: its text encoder makes numbers that are not finite, in "
            f"{features.dtype}: save its weights in bfloat16 or float32"
        )


def stored_shapes(path):
    """What batches of these prompts will be -> {name: shape and dtype}."""
    file, types = open_prompts(path), {name: dtype for dtype, name in DTYPES.items()}
    slices = {key: file.get_slice(key) for key in sorted(file.keys())}
    return {k: f"{tuple(v.get_shape())} {types[v.get_dtype()]}" for k, v in slices.items()}


@contextlib.contextmanager
def blamed_on(folder):
    """Errors inside are those of a folder with an incomplete tokenizer, text_encoder or vae."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"--teacher {folder}: {' '.join(str(error).split())}") from None


# ---- images with captions ------------------------------------------------------------------------


def encode_pairs(args):
    """--images with captions, for a teacher of prompts: write --output.  -> {name: shape}

    Raises UserError.
    """
    asked = ask(args.teacher, args.negative_prompt, args.max_length)
    if args.resolution is None:
        raise UserError("--images with captions: give --resolution H W, or one number for squares")
    size, frames = sides(args.resolution), args.frames or 1
    if "resolution" in asked.flags:
        asked.flags["resolution"] = size
    pairs = pairing.find_pairs(args.images, args.captions, frames)
    space = load_autoencoder(args.vae or args.teacher, "vae" if args.vae else "teacher")
    pairing.check_shape(space, size, frames, args.teacher)
    with blamed_on(args.teacher):
        encoder = asked.load()
        names, captions = zip(*pairs)
        counts = count_tokens(encoder, list(captions), names, asked.max_length)
        counts += encoder.count([asked.negative or ""])
    length = asked.length(asked.kept(counts))

    def text_rows(captions):
        with blamed_on(args.teacher):
            for row in padded_rows(asked, encoder, captions, length):
                refuse_overflow(next(iter(row.values())), args.teacher)
                yield row

    fingerprint = fingerprint_of_pairs(args, pairs, asked, [size, frames, length])
    if is_complete(args.output, fingerprint):
        print(
            f"{args.output} is there already, of the same images and settings: remove it to "
            "encode them again"
        )
        return stored_shapes(args.output)
    refuse_other(args.output, fingerprint)
    about = {"fingerprint": fingerprint, **asked.takers()}
    with pairing.RowWriter(args.output, about) as file:
        pairing.write_pairs(file, pairs, space, size, frames, text_rows)
    return stored_shapes(args.output)


def fingerprint_of_pairs(args, pairs, asked, settings):
    """A hash of images, captions and settings, equal where a file may be gone on with."""
    folders = [find_autoencoder(args.vae or args.teacher)[0], *asked.folders()]
    files = [[caption, *pairing.about(args.images, path)] for path, caption in pairs]
    return fingerprint_of(files, [*asked.settings(), *settings], folders)


# What is read, and which of the optional flags have an effect then.
FORMS = {
    "--prompts_txt": (
        *("negative_prompt", "max_length", "clip", "resolution"),
        *("batch_size", "shard_gb"),
    ),
    "--images without a teacher of prompts": ("dinov2",),
    "--images with captions": (
        *("captions", "resolution", "frames", "vae"),
        *("negative_prompt", "max_length"),
    ),
}


def form_of(args):
    """Which of FORMS the flags ask for. Raises UserError for flags that do not go together."""
    prompts, images, pairs = FORMS
    form = prompts
    if args.images is not None:
        name = teacher_class(args.teacher) if args.teacher else "TRELLIS"
        form = images if name == "TRELLIS" else pairs
        if form == pairs and (name not in FAMILIES or not FAMILIES[name].folders):
            raise UserError(
                f"--teacher {args.teacher} is {name}, and --images is for TRELLIS's image models "
                "and for the pipelines that take prompts: pass their root, or --prompts_txt instead"
            )
    elif args.teacher is None:
        raise UserError("--prompts_txt needs --teacher: pass a diffusers pipeline folder")
    for flag in {flag for flags in FORMS.values() for flag in flags} - set(FORMS[form]):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} has no effect with {form}: leave it out")
    return form


# fmt: off
def parse_args(argv):
    p = Parser(prog="python -m models.encode", description=(__doc__ or "").partition("\n")[0])
    add = p.add_argument
    add("--teacher", help="diffusers pipeline folder; with --images of TRELLIS optional")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts_txt", help="UTF-8 text file, one prompt a line")
    source.add_argument("--images", help="folder of images: for TRELLIS one for each object, "
        "without background; for teachers of prompts with captions, also a .zip, .tar shards or "
        "parquet files")
    add("--output", required=True, help="safetensors file to write: cond.*, uncond.*, and x0")
    add("--negative_prompt", help="prompt of uncond.*; if left out, the pipeline's own")
    add("--max_length", type=number(int, 1), help="tokens per prompt, the rest is cut")
    add("--batch_size", type=number(int, 1), help="prompts that are encoded together, faster on a "
        "GPU; more than 1 changes the last bits of the features; if left out, 1")
    add("--shard_gb", type=number(float, above=0), help="size beyond which prompts are written as "
        f"several files and OUTPUT.index.json; if left out, {SHARD_GB:g}")
    add("--dinov2", help=f"encoder of --images, folder or name; if left out, {DINOV2}")
    add("--clip", help="encoder of prompts for TRELLIS, folder or name; if left out, that "
        f"of the root's pipeline.json, else {CLIP}")
    add("--captions", metavar="FILE", help='captions of --images: FILE.json, {"NAME": "CAPTION"}, '
        "or FILE.jsonl with file_name and text; if left out, NAME.txt beside each image, caption "
        "or text of NAME.json in tar shards, the column text of parquet files")
    add("--resolution", type=number(int, 8), nargs="+", metavar="PIXELS",
        help="H W of --images with captions, or one number; their centre is cut out. Of SDXL's "
        "size, with --prompts_txt, if left out, 1024")
    add("--frames", type=number(int, 1), help="of each video (animated image, video file or folder "
        "of frames), for Wan and CogVideoX: 1, 5, 9, ...; if left out, 1")
    add("--vae", metavar="FOLDER", help="autoencoder of --images with captions, where it is not "
        "in --teacher")
    return p.parse_args(argv)
# fmt: on


def main(argv=None):
    args = parse_args(argv)
    form = form_of(args)
    if os.path.isdir(args.output):
        raise UserError(f"--output {args.output} is a folder: name a new file")
    with writing(args.output, "name a new file"):
        os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
        if form == "--images with captions":
            shapes = encode_pairs(args)
        elif form == "--prompts_txt":
            shapes = encode_text(args)
        else:
            shapes = encode_trellis_images(args.images, args.output, args.dinov2 or DINOV2)
    print(f"{args.output}: {', '.join(f'{k} {shape}' for k, shape in shapes.items())}")


if __name__ == "__main__":
    run_main(main, "the same command goes on with what is written")
