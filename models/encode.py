"""Turn prompts or images into the features that a teacher is conditioned on, before training.

    python -m models.encode --teacher FOLDER --prompts_txt prompts.txt --output prompts.safetensors
    python -m models.encode --images FOLDER --output tokens.safetensors
    python -m models.encode --teacher FOLDER --images FOLDER --resolution 512 \\
        --output data.safetensors

The first form takes a diffusers pipeline folder of Wan, Z-Image, PixArt-alpha or PixArt-Sigma, or
the root of one of TRELLIS's text models. The class that model_index.json names, or without that
file the class of the transformer, decides how prompts are encoded and the defaults of
--negative_prompt and --max_length. The second form is for TRELLIS's image models; --teacher may
name their root. TRELLIS's encoders of prompts and images are not in its root: --clip, --dinov2. The
third form makes real data for a GAN on the teachers of the first: images, or for Wan animated ones
with --frames, and a caption for each of them, through the pipeline's autoencoder (models/pairs.py).

The output is what the scripts take as --prompts: one row of "cond.*" for each prompt or image, and
a single row of "uncond.*". The third form's has "x0" beside, and is what they take as --data, too.
The first form's has prompts without their padding, in shards beyond --shard_gb (models/prompts.py);
they go to disk as they are encoded, and the same command goes on with an interrupted one.
Only the functions here need transformers, which training never imports.
"""

import contextlib
import functools
import hashlib
import html
import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from models import pairs as pairing
from models.files import DTYPES, UserError, load_json, save_tensors
from models.libraries import load, require
from models.networks import trellis_path
from models.networks.trellis import CLIP_WIDTH
from models.plumbing.flags import Parser, number
from models.plumbing.run import run_main
from models.prompts import PromptWriter, is_complete, open_prompts, refuse_other
from models.vaes import find_autoencoder, load_autoencoder


class Encoder(NamedTuple):
    """A text encoder with its tokenizer.

    count(prompts, B of them) -> the tokens of each, a list.
    features(prompts) -> text (B, L, D) in the encoder's dtype and mask (B, L) bool, true for the
    prompts' tokens, which come first, on the CPU. Several are padded to the longest of them. None
    sees the padding or another prompt, so that only the last bits depend on B.
    """

    count: Callable
    features: Callable


def load_t5(kind, clean, pipeline_folder, max_length):
    """The T5 encoder of class `kind`. clean: a function of each prompt; longer ones are cut.

    A single prompt is padded to max_length, as in the pipelines. -> Encoder. Raises UserError if a
    library or folder is missing.
    """
    tokenizer = load("transformers", "AutoTokenizer", pipeline_folder, "tokenizer")
    encoder = load("transformers", kind, pipeline_folder, "text_encoder", dtype="auto")
    tokenizer.padding_side = "right"
    settings = dict(max_length=max_length, truncation=True)

    def count(prompts):
        return [len(ids) for ids in tokenizer(list(map(clean, prompts)), **settings).input_ids]

    @torch.no_grad()
    def features(prompts):
        padding = "max_length" if len(prompts) == 1 else "longest"
        texts = list(map(clean, prompts))
        tokens = tokenizer(texts, padding=padding, return_tensors="pt", **settings)
        ids, mask = tokens.input_ids.to(encoder.device), tokens.attention_mask.to(encoder.device)
        return encoder(ids, mask).last_hidden_state.cpu(), mask.bool().cpu()

    return Encoder(count, features)


def together(rows):
    """Rows {name: (L, D) or (L,)}, the last of which is the negative prompt's, as a file has them.

    -> {"cond.NAME": (N, L, ...), "uncond.NAME": (1, L, ...)}; shorter rows end with zeros.
    """
    rows = list(rows)
    stacked = {k: pad_sequence([row[k] for row in rows], batch_first=True) for k in rows[0]}
    cond = {f"cond.{k}": v[:-1] for k, v in stacked.items()}
    return cond | {f"uncond.{k}": v[-1:] for k, v in stacked.items()}


# The negative prompt that Wan samples with by default (wan/configs/shared_config.py).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
    "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，"
    "畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def clean_prompt(text):
    """Clean a prompt as WanPipeline does: repair (ftfy, where installed), unescape, one line."""
    try:
        text = importlib.import_module("ftfy").fix_text(text)
    except ImportError:
        pass  # optional in diffusers too: it only matters for text that was decoded wrongly
    text = html.unescape(html.unescape(text))  # twice: "&amp;lt;" occurs in scraped captions
    return re.sub(r"\s+", " ", text).strip()


def load_wan(pipeline_folder, max_length):
    """-> Encoder, see `load_t5`."""
    return load_t5("UMT5EncoderModel", clean_prompt, pipeline_folder, max_length)


def wan_rows(pipeline_folder, prompts, max_length):
    """{"text": (max_length, D)} of each prompt, see `encode_wan`."""
    features = load_wan(pipeline_folder, max_length).features
    for prompt in prompts:
        text, keep = features([prompt])
        yield {"text": text[0].masked_fill(~keep[0][:, None], 0)}


def encode_wan(pipeline_folder, prompts, negative_prompt=NEGATIVE_PROMPT, max_length=512):
    """UMT5 features of prompts (list of N str), as WanPipeline computes them; longer ones are cut.

    Returns {"cond.text": (N, max_length, D), "uncond.text": (1, max_length, D)} on the CPU in the
    encoder's dtype; D = 4096 in Wan. Rows after a prompt's last token are zero: Wan has no mask and
    is trained that way. Raises UserError if a library or folder is missing.
    """
    return together(wan_rows(pipeline_folder, [*prompts, negative_prompt], max_length))


def z_image_tokens(tokenizer, prompts, max_length, **settings):
    """Prompts in Qwen3's chat template, at most max_length tokens each.  -> input_ids, ..."""
    template = dict(tokenize=False, add_generation_prompt=True, enable_thinking=True)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **template)
        for prompt in prompts
    ]
    return tokenizer(texts, max_length=max_length, truncation=True, **settings)


def load_z_image(pipeline_folder, max_length):
    """Qwen3, whose tokens do not see those behind them.  -> Encoder

    Raises UserError if a library or folder is missing.
    """
    tokenizer = load("transformers", "AutoTokenizer", pipeline_folder, "tokenizer")
    encoder = load("transformers", "AutoModel", pipeline_folder, "text_encoder", dtype="auto")
    tokenizer.padding_side = "right"

    def count(prompts):
        return [len(ids) for ids in z_image_tokens(tokenizer, prompts, max_length).input_ids]

    @torch.no_grad()
    def features(prompts):
        settings = dict(padding=len(prompts) > 1, return_tensors="pt")
        tokens = z_image_tokens(tokenizer, prompts, max_length, **settings).to(encoder.device)
        output = encoder(tokens.input_ids, tokens.attention_mask, output_hidden_states=True)
        text = output.hidden_states[-2].cpu()  # (B, L, D), before the last layer
        return text, tokens.attention_mask.bool().cpu()

    return Encoder(count, features)


def z_image_rows(pipeline_folder, prompts, max_length):
    """{"text": (n, D), "text_mask": (n,)} of each prompt's n tokens, see `encode_z_image`."""
    features = load_z_image(pipeline_folder, max_length).features
    for prompt in prompts:
        text, mask = features([prompt])
        yield {"text": text[0], "text_mask": mask[0]}


def encode_z_image(pipeline_folder, prompts, negative_prompt="", max_length=512):
    """Qwen3 features of prompts (list of N str), as ZImagePipeline computes them; longer are cut.

    Returns {"cond.text": (N, L, D), "cond.text_mask": (N, L) bool, "uncond.text": (1, L, D),
    "uncond.text_mask": (1, L) bool} on the CPU, text in the encoder's dtype. D = 2560 in Z-Image;
    L is the longest prompt's number of tokens, with those of the chat template, and at most
    max_length. Raises UserError if a library or folder is missing.
    """
    return together(z_image_rows(pipeline_folder, [*prompts, negative_prompt], max_length))


def load_pixart(pipeline_folder, max_length):
    """-> Encoder, see `load_t5`."""

    def clean(prompt):
        return prompt.lower().strip()

    return load_t5("T5EncoderModel", clean, pipeline_folder, max_length)


def pixart_rows(pipeline_folder, prompts, max_length):
    """{"text": (max_length, D), "mask": (max_length,)} of each prompt, see `encode_pixart`."""
    features = load_pixart(pipeline_folder, max_length).features
    for prompt in prompts:
        text, mask = features([prompt])
        yield {"text": text[0], "mask": mask[0]}


def encode_pixart(pipeline_folder, prompts, negative_prompt="", max_length=120):
    """T5 features of prompts (list of N str), as PixArtAlphaPipeline computes them; longer are cut.

    Returns {"cond.text": (N, max_length, D), "cond.mask": (N, max_length) bool, "uncond.text":
    (1, max_length, D), "uncond.mask": (1, max_length) bool} on the CPU, text in the encoder's
    dtype; D = 4096 in PixArt. Prompts become lower case and are stripped; the pipeline's
    clean_caption, which also removes URLs and the like, is for scraped captions and not used.
    PixArt-Sigma has max_length 300. Raises UserError if a library or folder is missing.
    """
    return together(pixart_rows(pipeline_folder, [*prompts, negative_prompt], max_length))


DINOV2 = "facebook/dinov2-with-registers-large"
SIDE, LANCZOS = 518, Image.Resampling.LANCZOS  # pixels: 37 x 37 patches of 14


def prepare_image(image):
    """A PIL image as TRELLIS prepares it for DINOv2 -> uint8 (3, 518, 518), RGB.

    With transparency: the square around the opaque part, 1.2 times as large, on black. Without:
    the whole image, stretched to a square (TRELLIS first removes the background with rembg, so do
    that before). Raises ValueError if nothing is opaque.
    """
    image = ImageOps.exif_transpose(image)
    transparency = "A" in image.getbands() or "transparency" in image.info
    image = image.convert("RGBA" if transparency else "RGB")
    if image.mode == "RGBA" and image.getextrema()[3][0] < 255:
        y, x = (np.asarray(image)[..., 3] > 0.8 * 255).nonzero()
        if not len(x):
            raise ValueError("nothing in it is opaque")
        half = int(1.2 * max(np.ptp(x), np.ptp(y))) // 2
        middle = (x.min() + x.max()) / 2, (y.min() + y.max()) / 2
        box = tuple(float(m + side * half) for side in (-1, 1) for m in middle)
        rgba = np.asarray(image.crop(box).resize((SIDE, SIDE), LANCZOS), np.float32) / 255
        pixels = (rgba[..., :3] * rgba[..., 3:] * 255).astype(np.uint8)
    else:
        pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), LANCZOS))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def read_images(folder):
    """The images in a folder, sorted by name -> list of uint8 (3, 518, 518). Raises UserError."""
    if not os.path.isdir(folder):
        raise UserError(f"--images {folder} is not a folder; put one image for each object in one")
    paths = [os.path.join(folder, n) for n in sorted(os.listdir(folder)) if not n.startswith(".")]
    paths = [path for path in paths if os.path.isfile(path)]
    if not paths:
        raise UserError(f"--images {folder} holds no files; put one image for each object in it")
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(prepare_image(image))
        except Exception as e:  # Pillow raises many kinds; skipping one would shift all rows after
            why = f"{type(e).__name__}: {e}"
            raise UserError(
                f"{path} is not an image that can be used ({why}): repair it or take it out"
            ) from None
    return images


@torch.no_grad()
def encode_trellis_images(folder, dinov2=DINOV2):
    """DINOv2 tokens of the images in a folder, sorted by name, as TrellisImageTo3DPipeline's.

    dinov2: a transformers folder, or a name that is downloaded. Returns {"cond.tokens":
    (N, 1374, 1024), "uncond.tokens": (1, 1374, 1024) zeros} on the CPU in float16, the precision in
    which TRELLIS uses them: class token, 4 registers, 37 x 37 patches row by row, taken before the
    model's last norm and normalised without weights. Raises UserError.
    """
    library, images = require("transformers"), read_images(folder)
    try:
        model = library.Dinov2WithRegistersModel.from_pretrained(dinov2).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--dinov2 {dinov2} cannot be loaded: {error}") from None
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.layernorm = nn.Identity()
    mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]  # ImageNet's, per channel
    std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    rows = []
    for pixels in images:
        h = model(((pixels / 255 - mean) / std)[None].to(model.device)).last_hidden_state
        rows.append(F.layer_norm(h, h.shape[-1:]).half().cpu())  # (1, L, D)
    tokens = torch.cat(rows)
    return {"cond.tokens": tokens, "uncond.tokens": torch.zeros_like(tokens[:1])}


CLIP, CLIP_TOKENS = "openai/clip-vit-large-patch14", 77  # its name, and as many as it has places


def clip_name(root, clip=None):
    """The folder or name of CLIP: clip, else what pipeline.json in root names, else CLIP."""
    described = os.path.join(root, "pipeline.json")
    if clip is None and os.path.isfile(described):
        clip = load_json(described).get("args", {}).get("text_cond_model")
    return str(clip or CLIP)


def load_clip(root, max_length, clip=None):
    """CLIP, which sees its padding: all of max_length tokens count.  -> Encoder

    clip: of `encode_trellis_text`. Raises UserError.
    """
    library, clip = require("transformers"), clip_name(root, clip)
    if max_length > CLIP_TOKENS:
        raise UserError(f"--max_length {max_length}: CLIP takes at most {CLIP_TOKENS} tokens")
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(clip)
        model = library.CLIPTextModel.from_pretrained(clip, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--clip {clip} cannot be loaded: {error}") from None
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = dict(padding="max_length", max_length=max_length, truncation=True)

    @torch.no_grad()
    def features(prompts):
        ids = tokenizer(prompts, return_tensors="pt", **settings).input_ids
        text = model(ids.to(model.device)).last_hidden_state.half().cpu()
        return text, torch.ones(text.shape[:2], dtype=torch.bool)

    return Encoder(lambda prompts: [max_length] * len(prompts), features)


def encode_trellis_text(root, prompts, negative_prompt="", max_length=CLIP_TOKENS, clip=None):
    """CLIP's tokens of prompts (list of N str), as TrellisTextTo3DPipeline's; longer ones are cut.

    clip: a transformers folder, or a name that is downloaded; None: the one that pipeline.json in
    root names, else CLIP. Returns {"cond.tokens": (N, max_length, 768), "uncond.tokens": (1,
    max_length, 768)} on the CPU in float16, the precision in which TRELLIS uses them: all tokens
    after the model's last norm, also those of the padding, for TRELLIS has no mask. Raises
    UserError.
    """
    features = load_clip(root, max_length, clip).features
    rows = [features([prompt])[0] for prompt in [*prompts, negative_prompt]]  # each (1, L, D)
    return {"cond.tokens": torch.cat(rows[:-1]), "uncond.tokens": rows[-1]}


# By the class of the pipeline, or of the transformer where there is no model_index.json: function,
# default negative prompt, default tokens per prompt (None: PixArt-alpha and PixArt-Sigma differ in
# it but not in their transformer's class).
TEXT_TEACHERS = {
    "WanPipeline": (encode_wan, NEGATIVE_PROMPT, 512),
    "WanTransformer3DModel": (encode_wan, NEGATIVE_PROMPT, 512),
    "ZImagePipeline": (encode_z_image, "", 512),
    "ZImageTransformer2DModel": (encode_z_image, "", 512),
    "PixArtAlphaPipeline": (encode_pixart, "", 120),
    "PixArtSigmaPipeline": (encode_pixart, "", 300),
    "PixArtTransformer2DModel": (encode_pixart, "", None),
    "Transformer2DModel": (encode_pixart, "", None),  # its name in older versions of diffusers
    "TrellisTextTo3DPipeline": (encode_trellis_text, "", CLIP_TOKENS),
}


def teacher_class(folder):
    """The class of a diffusers pipeline or of its transformer, "TrellisTextTo3DPipeline" for a root
    or a network of TRELLIS's text models, or "TRELLIS" for the others. Raises UserError.
    """
    for name in ("model_index.json", "transformer/config.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and "_class_name" in (config := load_json(path)):
            return str(config["_class_name"])
    inside = [os.path.join(folder, name) for name in ("pipeline.json", "ckpts")]
    if any(map(os.path.exists, inside)) or trellis_path(folder):
        return "TrellisTextTo3DPipeline" if takes_text(folder) else "TRELLIS"
    fault = "has no model_index.json, transformer/config.json or pipeline.json"
    raise UserError(
        f"--teacher {folder} {fault if os.path.isdir(folder) else 'is not a folder'}: pass a "
        "diffusers pipeline folder, or TRELLIS's root"
    )


def takes_text(path):
    """Whether TRELLIS's root, or one of its networks, is conditioned on prompts."""
    network, described = trellis_path(path), os.path.join(path, "pipeline.json")
    if network and os.path.isfile(network + ".json"):
        return load_json(network + ".json").get("args", {}).get("cond_channels") == CLIP_WIDTH
    return os.path.isfile(described) and "text_cond_model" in load_json(described).get("args", {})


def settings_of(folder, negative_prompt=None, max_length=None, clip=None):
    """How the prompts of a teacher are encoded, with the defaults of its class in place of None.

    clip: of `encode_trellis_text`. -> function, negative prompt, tokens a prompt. Raises UserError
    for a folder that does not fit.
    """
    name = teacher_class(folder)
    if name not in TEXT_TEACHERS:
        remedy = "pass one of these" if name != "TRELLIS" else "pass --images instead"
        known = ", ".join(n for n in TEXT_TEACHERS if n.endswith("Pipeline"))
        raise UserError(f"--teacher {folder} is {name}, and --prompts_txt is for {known}: {remedy}")
    encode, *defaults = TEXT_TEACHERS[name]
    if encode is encode_trellis_text:
        encode = functools.partial(encode, clip=clip)
    elif clip is not None:
        raise UserError(
            f"--clip has no effect with a {name}, which has its own encoder: leave it out"
        )
    negative_prompt = defaults[0] if negative_prompt is None else negative_prompt
    max_length = max_length or defaults[1]
    if max_length is None:
        raise UserError(
            f"--teacher {folder} has no model_index.json to tell PixArt-alpha from PixArt-Sigma: "
            "pass --max_length 120 for alpha, 300 for Sigma"
        )
    return encode, negative_prompt, max_length


@contextlib.contextmanager
def blamed_on(folder):
    """Errors inside are those of a folder with an incomplete tokenizer, text_encoder or vae."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"--teacher {folder}: {error}") from None


# ---- prompts to disk -----------------------------------------------------------------------------


class Stored(NamedTuple):
    """How the prompts of a text encoder are stored; models/prompts.py has the file.

    load(folder, max_length) -> Encoder. name, mask: the network's inputs, mask "" where it takes
    none. full: whether a batch has max_length tokens, and not those of the longest prompt.
    """

    load: Callable
    name: str
    mask: str
    full: bool


# What T5 makes of PixArt's padding is left out: the network's mask gives it no weight at all.
STORED = {
    encode_wan: Stored(load_wan, "text", "", True),
    encode_z_image: Stored(load_z_image, "text", "text_mask", False),
    encode_pixart: Stored(load_pixart, "text", "mask", True),
    encode_trellis_text: Stored(load_clip, "tokens", "", True),
}
SHARD_GB = 5.0  # as in diffusers


def read_prompts(prompts_txt):
    """The lines of a text file that are not blank -> list of str. Raises UserError."""
    try:
        lines = Path(prompts_txt).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts_txt {prompts_txt} as UTF-8: {error}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts_txt {prompts_txt} holds no prompt; write one prompt a line")
    return prompts


def fingerprint_of(prompts, settings, folders):
    """A hash of prompts, settings and text encoder, equal where a file may be gone on with.

    settings: what JSON can hold. folders: of the tokenizer and encoder; of each file, the name,
    the size, and the first and last megabyte.
    """
    found = hashlib.sha256(json.dumps([prompts, settings]).encode())
    for folder in map(Path, folders):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = path.stat().st_size
            found.update(f"{path.relative_to(folder)} {size} ".encode())
            with open(path, "rb") as f:
                found.update(f.read(2**20))
                f.seek(max(0, size - 2**20))
                found.update(f.read())
    return found.hexdigest()[:32]


def encode_text(args):
    """--prompts_txt: write --output, or go on with it.  -> {name: shape and dtype}

    Prompts are counted first, then encoded --batch_size at a time, each batch to disk before the
    next. Raises UserError for a folder or file that does not fit.
    """
    chosen = args.negative_prompt, args.max_length, args.clip
    encode, negative, max_length = settings_of(args.teacher, *chosen)
    prompts = read_prompts(args.prompts_txt)
    stored = STORED[getattr(encode, "func", encode)]
    shard_gb, folders = args.shard_gb or SHARD_GB, ["tokenizer", "text_encoder"]
    folders = [os.path.join(args.teacher, name) for name in folders]
    settings = [stored[1:], negative, max_length, shard_gb]
    load_encoder = stored.load
    if load_encoder is load_clip:
        clip = clip_name(args.teacher, args.clip)
        folders = [clip] if os.path.isdir(clip) else []
        settings += [] if folders else [clip]
        load_encoder = functools.partial(load_clip, clip=clip)
    fingerprint = fingerprint_of(prompts, settings, folders)
    if is_complete(args.output, fingerprint):
        print(
            f"{args.output} is there already, of the same prompts and settings: remove it to "
            "encode them again"
        )
        return stored_shapes(args.output)
    refuse_other(args.output, fingerprint)
    with blamed_on(args.teacher):
        encoder = load_encoder(args.teacher, max_length)
        batches = tqdm(range(0, len(prompts), 1024), desc="tokens", leave=False, delay=2)
        lengths = [n for i in batches for n in encoder.count(prompts[i : i + 1024])]
        text, mask = encoder.features([negative])
    null = text[0][mask[0]]
    padded_to = max_length if stored.full else max(len(null), *lengths)
    metadata = {"padded_to": str(padded_to), "mask": stored.mask, "fingerprint": fingerprint}
    shape = stored.name, torch.tensor(lengths), null
    with PromptWriter(args.output, *shape, metadata, int(shard_gb * 1e9)) as writer:
        write_text(writer, prompts, encoder, args.batch_size or 1, args.teacher)
    return stored_shapes(args.output)


def write_text(writer, prompts, encoder, batch_size, folder):
    """Encode the prompts that the writer does not have, and give it the tokens of each.

    Batches are those of an uninterrupted run: the first may have prompts that are there already.
    """
    done = writer.done
    if done:
        print(f"{writer.path}: going on after {done} of {len(prompts)} prompts", flush=True)
    with tqdm(desc="prompts", total=len(prompts), initial=done) as bar:
        for first in range(done - done % batch_size, len(prompts), batch_size):
            with blamed_on(folder):
                text, mask = encoder.features(prompts[first : first + batch_size])
            for i, (row, keep) in enumerate(zip(text, mask), first):
                if i >= done:
                    writer.write(row[keep])
                    bar.update()


def stored_shapes(path):
    """What batches of these prompts will be -> {name: shape and dtype}."""
    file, types = open_prompts(path), {name: dtype for dtype, name in DTYPES.items()}
    slices = {key: file.get_slice(key) for key in sorted(file.keys())}
    return {k: f"{tuple(v.get_shape())} {types[v.get_dtype()]}" for k, v in slices.items()}


# ---- images with captions ------------------------------------------------------------------------


ROWS = {encode_wan: wan_rows, encode_z_image: z_image_rows, encode_pixart: pixart_rows}


def encode_pairs(args):
    """--images with captions, for a teacher of prompts: write --output.  -> {name: shape}

    Raises UserError.
    """
    encode, negative, max_length = settings_of(args.teacher, args.negative_prompt, args.max_length)
    if args.resolution is None:
        raise UserError("--images with captions: give --resolution H W, or one number for squares")
    size, frames = (args.resolution * 2)[:2], args.frames or 1
    pairs = pairing.find_pairs(args.images, args.captions, frames)
    flag = "vae" if args.vae else "teacher"
    space = load_autoencoder(args.vae or args.teacher, flag)
    pairing.check_shape(space, size, frames, args.teacher)
    length = max_length
    if encode is encode_z_image:  # the one whose rows are as long as their prompts
        tokenizer = load("transformers", "AutoTokenizer", args.teacher, "tokenizer")
        prompts = [negative, *(caption for _, caption in pairs)]
        length = max(map(len, z_image_tokens(tokenizer, prompts, max_length).input_ids))

    def text_rows(captions):
        with blamed_on(args.teacher):
            for row in ROWS[encode](args.teacher, [*captions, negative], max_length):
                padded = {k: v.new_zeros(length, *v.shape[1:]) for k, v in row.items()}
                for k, v in row.items():
                    padded[k][: len(v)] = v
                yield padded

    fingerprint = fingerprint_of_pairs(args, pairs, [size, frames, negative, max_length])
    if is_complete(args.output, fingerprint):
        print(
            f"{args.output} is there already, of the same images and settings: remove it to "
            "encode them again"
        )
        return stored_shapes(args.output)
    refuse_other(args.output, fingerprint)
    with pairing.RowWriter(args.output, {"fingerprint": fingerprint}) as file:
        pairing.write_pairs(file, pairs, space, size, frames, text_rows)
    return stored_shapes(args.output)


def fingerprint_of_pairs(args, pairs, settings):
    """A hash of images, captions and settings, equal where a file may be gone on with."""
    folders = [find_autoencoder(args.vae or args.teacher)[0]]
    for kind in ("tokenizer", "text_encoder"):  # SDXL has two of each
        folders += sorted(Path(args.teacher).glob(f"{kind}*"))
    stats = [os.stat(path) for path, _ in pairs]
    files = [
        [os.path.relpath(path, args.images), caption, stat.st_size, stat.st_mtime_ns]
        for (path, caption), stat in zip(pairs, stats)
    ]
    return fingerprint_of(files, settings, folders)


# What is read, and which of the optional flags have an effect then.
FORMS = {
    "--prompts_txt": ("negative_prompt", "max_length", "clip", "batch_size", "shard_gb"),
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
        if form == pairs and TEXT_TEACHERS.get(name, [None])[0] not in ROWS:
            raise UserError(
                f"--teacher {args.teacher} is {name}, and --images is for TRELLIS's image models "
                "and for Wan, Z-Image and PixArt: pass their root, or --prompts_txt instead"
            )
    elif args.teacher is None:
        raise UserError("--prompts_txt needs --teacher: pass a diffusers pipeline folder")
    for flag in {flag for flags in FORMS.values() for flag in flags} - set(FORMS[form]):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} has no effect with {form}: leave it out")
    return form


# fmt: off
def parse_args(argv):
    p = Parser(prog="python -m models.encode", description=__doc__.partition("\n")[0])
    add = p.add_argument
    add("--teacher", help="diffusers pipeline folder; with --images of TRELLIS optional")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts_txt", help="UTF-8 text file, one prompt a line")
    source.add_argument("--images", help="folder of images: for TRELLIS one for each object, "
        "without background; for teachers of prompts with captions")
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
        "or FILE.jsonl with file_name and text; if left out, NAME.txt beside each image")
    add("--resolution", type=number(int, 8), nargs="+", metavar="PIXELS",
        help="H W of --images with captions, or one number; their centre is cut out")
    add("--frames", type=number(int, 1), help="of each animated image, for Wan: 1, 5, 9, ...; "
        "if left out, 1")
    add("--vae", metavar="FOLDER", help="autoencoder of --images with captions, where it is not "
        "in --teacher")
    return p.parse_args(argv)
# fmt: on


def main(argv=None):
    args = parse_args(argv)
    form = form_of(args)
    try:
        os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
        if form == "--images with captions":
            shapes = encode_pairs(args)
        elif form == "--prompts_txt":
            shapes = encode_text(args)
        else:
            tensors = encode_trellis_images(args.images, args.dinov2 or DINOV2)
            save_tensors(tensors, args.output)
            shapes = {k: f"{tuple(v.shape)} {v.dtype}" for k, v in tensors.items()}
    except OSError as error:
        raise UserError(f"cannot write --output {args.output}: {error}; name a new file") from None
    print(f"{args.output}: {', '.join(f'{k} {shape}' for k, shape in shapes.items())}")


if __name__ == "__main__":
    run_main(main)
