"""The commands at the two ends of a real pipeline: `python -m models.NAME encode` and `decode`.

Prompts become text features before training, latents become pictures after it. What only one model does is in its own file; here is
what several share: flags, files, components of a diffusers pipeline folder, T5 text encoders and image VAEs. Only these ends need
transformers and diffusers, which `load` imports when it is called, so that training never does.
"""
import importlib
from pathlib import Path

import torch
from PIL import Image

from models import io


def load(library, kind, pipeline_folder, component, **keywords):
    """library.kind.from_pretrained(pipeline_folder/component), networks in eval mode on the GPU where there is one. Raises UserError where
    the library or the folder is missing, and what the library raises for a folder that it cannot read."""
    try:
        library = importlib.import_module(library)
    except ImportError:
        raise io.UserError(f"{library} is not installed; it is needed to encode prompts and decode latents: pip install {library}") from None
    path = Path(pipeline_folder) / component
    if not path.is_dir():
        raise io.UserError(f"no folder {path}; pass a diffusers pipeline folder, which holds model_index.json, {component}/ and others")
    loaded = getattr(library, kind).from_pretrained(str(path), local_files_only=True, **keywords)
    if isinstance(loaded, torch.nn.Module):
        loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return loaded


@torch.no_grad()
def encode_t5(kind, pipeline_folder, prompts, max_length):
    """Features of prompts (list of N str) by a T5 of this class -> text (N, max_length, D) in the encoder's dtype and mask (N, max_length)
    bool, true for the tokens of each prompt, on the CPU. Longer prompts are cut. Runs on the GPU where there is one. Raises UserError if
    a library or folder is missing."""
    tokenizer = load("transformers", "AutoTokenizer", pipeline_folder, "tokenizer")
    encoder = load("transformers", kind, pipeline_folder, "text_encoder", dtype="auto")
    rows = []
    for prompt in prompts:  # one at a time: 512 x 4096 activations through 24 layers
        tokens = tokenizer([prompt], padding="max_length", max_length=max_length, truncation=True, return_tensors="pt").to(encoder.device)
        features = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state  # (1, L, D)
        rows.append((features.cpu(), tokens.attention_mask.bool().cpu()))
    text, mask = (torch.cat(part) for part in zip(*rows))
    return text, mask


@torch.no_grad()
def decode_images(pipeline_folder, x0):
    """Pixels of image latents x0 (B, C, H, W) -> uint8 (B, 3, 8H, 8W) on the CPU.

    The VAE's own latents are x0 / scaling_factor + shift_factor (its config; no shift_factor: 0). Decoded in float32, one image at a
    time, on the GPU where there is one. Raises ValueError for wrong shapes, UserError if a library or folder is missing.
    """
    vae = load("diffusers", "AutoencoderKL", pipeline_folder, "vae", torch_dtype=torch.float32)
    c = vae.config
    if x0.dim() != 4 or x0.shape[1] != c.latent_channels:
        raise ValueError(f"x0 has shape {tuple(x0.shape)}; this VAE needs (B, {c.latent_channels}, H, W)")
    rows = [row.to(vae.device, torch.float32) / c.scaling_factor + (c.shift_factor or 0.0) for row in x0.split(1)]
    return torch.cat([to_bytes(vae.decode(row).sample) for row in rows])  # (B, 3, H', W')


def to_bytes(pixels):
    """Pixels in [-1, 1], as VAEs give them -> uint8 on the CPU, same shape."""
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu()


def to_image(pixels):
    """uint8 (3, H, W) -> PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def save_image(pixels, path):
    """uint8 (3, H, W) -> one file, of the kind that path ends with."""
    to_image(pixels).save(path)


# ---- the commands --------------------------------------------------------------------------------------------------


def parser(name, files, tensors, shape, negative_prompt, max_length=512):
    """Flags of `python -m models.<name>`: files that decode writes ("GIFs"), tensors that encode writes, shape of x0, defaults of two of
    encode's flags. -> parser, decode's own."""
    p = io.Parser(prog=f"python -m models.{name}", description=f"Prompts to text features, latents to {files}.")
    commands = p.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="prompts to text features, for --prompts of the scripts")
    decode = commands.add_parser("decode", help=f"latents to {files}")
    for command in (encode, decode):
        command.add_argument("--teacher", required=True, help="pipeline folder: tokenizer/, text_encoder/, vae/")
    encode.add_argument("--prompts_txt", required=True, help="UTF-8 text file, one prompt a line")
    encode.add_argument("--output", required=True, help=f"safetensors file to write: {tensors}")
    encode.add_argument("--negative_prompt", default=negative_prompt, help="of uncond.*")
    encode.add_argument("--max_length", type=int, default=max_length, help="tokens per prompt; longer prompts are cut")
    decode.add_argument("--latents", required=True, help=f"safetensors file with x0 {shape}")
    decode.add_argument("--output", required=True, help=f"folder for the {files} 000, 001, ...")
    return p, decode


def run(args, encode_prompts, decode_latents, suffix, save):
    """The command that args asks for; wrong input ends in one line on stderr and exit code 2."""
    io.run(lambda: encode(args, encode_prompts) if args.command == "encode" else decode(args, decode_latents, suffix, save))


def encode(args, encode_prompts):
    """Lines of --prompts_txt -> what encode_prompts makes of them, in --output. Raises UserError."""
    if args.max_length < 1:
        raise io.UserError(f"--max_length is {args.max_length}; pass at least 1")
    try:
        lines = Path(args.prompts_txt).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise io.UserError(f"cannot read --prompts_txt {args.prompts_txt} as UTF-8 text: {error}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise io.UserError(f"--prompts_txt {args.prompts_txt} holds no prompt; write one prompt a line")
    try:
        tensors = encode_prompts(args.teacher, prompts, args.negative_prompt, args.max_length)
    except (OSError, ValueError) as error:  # an incomplete tokenizer or text_encoder folder
        raise io.UserError(f"--teacher {args.teacher}: {error}") from None
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    io.save_tensors(tensors, args.output)
    print(f"{args.output}: " + ", ".join(f"{k} {tuple(v.shape)} {v.dtype}" for k, v in tensors.items()))


def decode(args, decode_latents, suffix, save):
    """x0 of --latents -> one file an item in --output, written by save(uint8 pixels, path). Raises UserError."""
    try:
        x0 = io.load_tensors(args.latents).get("x0")
    except io.UserError as error:
        raise io.UserError(f"cannot read --latents: {error}") from None
    if x0 is None:
        raise io.UserError(f"--latents {args.latents} has no tensor x0; write the latents under that key")
    try:
        decoded = decode_latents(args.teacher, x0)
    except (OSError, ValueError) as error:  # wrong shape of x0, incomplete vae folder
        raise io.UserError(f"--teacher {args.teacher}, --latents {args.latents}: {error}") from None
    Path(args.output).mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(decoded):
        path = Path(args.output) / f"{i:03d}.{suffix}"
        save(pixels, path)
        print(path)
