"""Turn prompts or images into the features that a teacher is conditioned on, before training.

    python -m models.encode --teacher FOLDER --prompts_txt prompts.txt --output prompts.safetensors
    python -m models.encode --images FOLDER --output tokens.safetensors

The first form takes a diffusers pipeline folder of Wan, Z-Image, PixArt-alpha or PixArt-Sigma. The
class that model_index.json names, or without that file the class of the transformer, decides how
prompts are encoded and the defaults of --negative_prompt and --max_length. The second form is
TRELLIS's; --teacher may name its root, but nothing is read there: the image encoder is elsewhere.

The output is what the scripts take as --prompts: one row of "cond.*" for each prompt or image, and
a single row of "uncond.*". Only the functions here need transformers, which training never imports.
"""

import html
import importlib
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from models.decode import load, require
from models.files import UserError, load_json, save_tensors
from models.networks import trellis_path
from models.plumbing.flags import Parser, number
from models.plumbing.run import run_main


@torch.no_grad()
def encode_t5(kind, pipeline_folder, prompts, max_length):
    """Features of prompts (list of N str) by the T5 encoder of class `kind`; longer ones are cut.

    Returns text (N, max_length, D) in the encoder's dtype and mask (N, max_length) bool, true for
    a prompt's tokens, on the CPU. Raises UserError if a library or folder is missing.
    """
    tokenizer = load("transformers", "AutoTokenizer", pipeline_folder, "tokenizer")
    encoder = load("transformers", kind, pipeline_folder, "text_encoder", dtype="auto")
    settings = dict(padding="max_length", max_length=max_length, truncation=True)
    rows = []
    for prompt in prompts:  # one at a time: 512 x 4096 activations through 24 layers
        tokens = tokenizer([prompt], return_tensors="pt", **settings).to(encoder.device)
        features = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state  # (1, L, D)
        rows.append((features.cpu(), tokens.attention_mask.bool().cpu()))
    text, mask = (torch.cat(part) for part in zip(*rows, strict=True))
    return text, mask


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


def encode_wan(pipeline_folder, prompts, negative_prompt=NEGATIVE_PROMPT, max_length=512):
    """UMT5 features of prompts (list of N str), as WanPipeline computes them; longer ones are cut.

    Returns {"cond.text": (N, max_length, D), "uncond.text": (1, max_length, D)} on the CPU in the
    encoder's dtype; D = 4096 in Wan. Rows after a prompt's last token are zero: Wan has no mask and
    is trained that way. Raises UserError if a library or folder is missing.
    """
    cleaned = [clean_prompt(prompt) for prompt in [*prompts, negative_prompt]]
    text, keep = encode_t5("UMT5EncoderModel", pipeline_folder, cleaned, max_length)
    text = text.masked_fill(~keep[..., None], 0)
    return {"cond.text": text[:-1], "uncond.text": text[-1:]}


@torch.no_grad()
def encode_z_image(pipeline_folder, prompts, negative_prompt="", max_length=512):
    """Qwen3 features of prompts (list of N str), as ZImagePipeline computes them; longer are cut.

    Returns {"cond.text": (N, L, D), "cond.text_mask": (N, L) bool, "uncond.text": (1, L, D),
    "uncond.text_mask": (1, L) bool} on the CPU, text in the encoder's dtype. D = 2560 in Z-Image;
    L is the longest prompt's number of tokens, with those of the chat template, and at most
    max_length. Raises UserError if a library or folder is missing.
    """
    tokenizer = load("transformers", "AutoTokenizer", pipeline_folder, "tokenizer")
    encoder = load("transformers", "AutoModel", pipeline_folder, "text_encoder", dtype="auto")
    template = dict(tokenize=False, add_generation_prompt=True, enable_thinking=True)
    settings = dict(max_length=max_length, truncation=True, return_tensors="pt")
    rows = []
    for prompt in [*prompts, negative_prompt]:  # one at a time, so there is no padding to mask
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **template)
        tokens = tokenizer([text], **settings).to(encoder.device)
        output = encoder(tokens.input_ids, tokens.attention_mask, output_hidden_states=True)
        rows.append(output.hidden_states[-2][0].cpu())  # (n, D), before the last layer
    text = pad_sequence(rows, batch_first=True)  # (N + 1, L, D)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
    cond = {"cond.text": text[:-1], "cond.text_mask": mask[:-1]}
    return cond | {"uncond.text": text[-1:], "uncond.text_mask": mask[-1:]}


def encode_pixart(pipeline_folder, prompts, negative_prompt="", max_length=120):
    """T5 features of prompts (list of N str), as PixArtAlphaPipeline computes them; longer are cut.

    Returns {"cond.text": (N, max_length, D), "cond.mask": (N, max_length) bool, "uncond.text":
    (1, max_length, D), "uncond.mask": (1, max_length) bool} on the CPU, text in the encoder's
    dtype; D = 4096 in PixArt. Prompts become lower case and are stripped; the pipeline's
    clean_caption, which also removes URLs and the like, is for scraped captions and not used.
    PixArt-Sigma has max_length 300. Raises UserError if a library or folder is missing.
    """
    cleaned = [prompt.lower().strip() for prompt in [*prompts, negative_prompt]]
    text, mask = encode_t5("T5EncoderModel", pipeline_folder, cleaned, max_length)
    cond = {"cond.text": text[:-1], "cond.mask": mask[:-1]}
    return cond | {"uncond.text": text[-1:], "uncond.mask": mask[-1:]}


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
}


def teacher_class(folder):
    """The class of a diffusers pipeline or of its transformer, or "TRELLIS". Raises UserError."""
    for name in ("model_index.json", "transformer/config.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and "_class_name" in (config := load_json(path)):
            return str(config["_class_name"])
    inside = [os.path.join(folder, name) for name in ("pipeline.json", "ckpts")]
    if any(map(os.path.exists, inside)) or trellis_path(folder):
        return "TRELLIS"
    fault = "has no model_index.json, transformer/config.json or pipeline.json"
    raise UserError(
        f"--teacher {folder} {fault if os.path.isdir(folder) else 'is not a folder'}: pass a "
        "diffusers pipeline folder, or TRELLIS's root"
    )


def encode_text(folder, prompts_txt, negative_prompt=None, max_length=None):
    """Features of a text file's prompts, by the class of the teacher; None is that class's default.

    Raises UserError for a folder or file that does not fit.
    """
    name = teacher_class(folder)
    if name not in TEXT_TEACHERS:
        remedy = "pass one of these" if name != "TRELLIS" else "pass --images instead"
        known = ", ".join(n for n in TEXT_TEACHERS if n.endswith("Pipeline"))
        raise UserError(f"--teacher {folder} is {name}, and --prompts_txt is for {known}: {remedy}")
    encode, *defaults = TEXT_TEACHERS[name]
    negative_prompt = defaults[0] if negative_prompt is None else negative_prompt
    max_length = max_length or defaults[1]
    if max_length is None:
        raise UserError(
            f"--teacher {folder} has no model_index.json to tell PixArt-alpha from PixArt-Sigma: "
            "pass --max_length 120 for alpha, 300 for Sigma"
        )
    try:
        lines = Path(prompts_txt).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts_txt {prompts_txt} as UTF-8: {error}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts_txt {prompts_txt} holds no prompt; write one prompt a line")
    try:
        return encode(folder, prompts, negative_prompt, max_length)
    except (OSError, ValueError) as error:  # an incomplete tokenizer or text_encoder folder
        raise UserError(f"--teacher {folder}: {error}") from None


def main(argv=None):
    p = Parser(prog="python -m models.encode", description=__doc__.partition("\n")[0])
    p.add_argument("--teacher", help="diffusers pipeline folder; with --images optional")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts_txt", help="UTF-8 text file, one prompt a line")
    source.add_argument("--images", help="folder of images, one for each object, no background")
    p.add_argument("--output", required=True, help="safetensors file to write: cond.*, uncond.*")
    p.add_argument("--negative_prompt", help="prompt of uncond.*; if left out, the pipeline's own")
    p.add_argument("--max_length", type=number(int, 1), help="tokens per prompt, the rest is cut")
    p.add_argument("--dinov2", help=f"encoder of --images, folder or name; if left out, {DINOV2}")
    args = p.parse_args(argv)
    used = "--prompts_txt" if args.images is None else "--images"
    for flag in ("dinov2",) if args.images is None else ("negative_prompt", "max_length"):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} has no effect with {used}: leave it out")
    if args.images is None and args.teacher is None:
        raise UserError("--prompts_txt needs --teacher: pass a diffusers pipeline folder")
    if args.images is None:
        tensors = encode_text(args.teacher, args.prompts_txt, args.negative_prompt, args.max_length)
    elif args.teacher is None or teacher_class(args.teacher) == "TRELLIS":
        tensors = encode_trellis_images(args.images, args.dinov2 or DINOV2)
    else:
        raise UserError(
            f"--teacher {args.teacher} is {teacher_class(args.teacher)}, and --images is for "
            "TRELLIS: pass its root, or --prompts_txt instead of --images"
        )
    try:
        os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
        save_tensors(tensors, args.output)
    except OSError as error:
        raise UserError(f"cannot write --output {args.output}: {error}; name a new file") from None
    shapes = ", ".join(f"{k} {tuple(v.shape)} {v.dtype}" for k, v in tensors.items())
    print(f"{args.output}: {shapes}")


if __name__ == "__main__":
    run_main(main)
