"""The text encoders of the teachers that take prompts, each as its pipeline in diffusers uses it.

    asked = ask(folder)                          # which family it is, and that family's defaults
    encoder = asked.load()
    encoder.count(["a cat", "a dog runs"])       # [3, 4], tokens
    encoder.features(["a cat", "a dog runs"])    # {"text": (2, 4, D)}, mask (2, 4)
    encoder.negative(asked.negative)             # the same of the one negative prompt

FAMILIES, at the end, is the table of them by the class of the pipeline or network; above it stands
one short function for each. What they give is what the networks take: text (B, L, D), in SDXL
pooled (B, P) and size (B, 6) beside it, and a mask (B, L) of the tokens where the network has one.
models/encode.py has the command. Only what is loaded here needs transformers.
"""

import functools
import html
import importlib
import itertools
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models.files import UserError, load_json
from models.libraries import device, load, load_pretrained, require
from models.networks import trellis_path
from models.networks.trellis import CLIP_WIDTH


class Encoder(NamedTuple):
    """One or two text encoders with their tokenizers, on the CPU or on a GPU.

    count(prompts, B of them) -> the tokens of each, uncut, a list.
    features(prompts) -> {NAME: (B, ...)} in the encoder's dtype and mask (B, L) bool, on the CPU.
    The first NAME is the tokens' features (B, L, D); others belong to the whole prompt. The mask is
    true for the rows that are kept, which come first. What a prompt gives does not depend on the
    others, but for the last bits, which depend on their number.
    negative(prompt) -> the same for the negative prompt, B = 1.
    """

    count: Callable
    features: Callable
    negative: Callable


def load_tokenizer(folder, component="tokenizer"):
    """Its padding comes behind the prompt, as everything here expects. Raises UserError."""
    inside = os.listdir(os.path.join(folder, component))
    if "tokenizer.json" not in inside and any(name.endswith(".model") for name in inside):
        require("sentencepiece")  # a file of T5's that transformers only reads with both
        require("google.protobuf", "protobuf")
    tokenizer = load("transformers", "AutoTokenizer", folder, component)
    tokenizer.padding_side = "right"
    return tokenizer


def later(kind, folder, component="text_encoder"):
    """A function that loads a text encoder, of transformers' class `kind`, when first called.

    So prompts are counted, and refused, before gigabytes are read.
    """
    return functools.cache(
        lambda: load("transformers", kind, folder, component, torch_dtype="auto")
    )


def counter(tokenizer, prepare=str, drop=0):
    """-> Encoder.count. prepare: a function of each prompt; drop: tokens that are left out."""

    def count(prompts):
        # verbose: no warning that a prompt is longer than the model takes, it will be cut.
        found = tokenizer(list(map(prepare, prompts)), verbose=False).input_ids
        return [len(ids) - drop for ids in found]

    return count


# ---- encoders that do not see their padding ------------------------------------------------------


def masked_encoder(tokenizer, network, max_length, prepare, layer=None, drop=0):
    """An encoder that is given a mask over the padding.  -> Encoder

    network: a function that returns it. prepare: a function of each prompt, whose result is
    tokenized, and cut to max_length tokens. layer: of the hidden states, None for the last one,
    after its norm. drop: how many tokens at the beginning are of a template and left out.
    """
    settings = dict(padding=True, max_length=max_length + drop, truncation=True)

    @torch.no_grad()
    def features(prompts, prepare=prepare):
        texts = list(map(prepare, prompts))
        tokens = tokenizer(texts, return_tensors="pt", **settings).to(device())
        how = {} if layer is None else dict(output_hidden_states=True)
        output = network()(tokens.input_ids, attention_mask=tokens.attention_mask, **how)
        text = output.last_hidden_state if layer is None else output.hidden_states[layer]
        return {"text": text[:, drop:].cpu()}, tokens.attention_mask[:, drop:].bool().cpu()

    count = counter(tokenizer, prepare, drop)
    return Encoder(count, features, lambda prompt: features([prompt]))


def clean_prompt(text):
    """Clean a prompt as WanPipeline does: repair (ftfy, where installed), unescape, one line."""
    try:
        text = importlib.import_module("ftfy").fix_text(text)
    except ImportError:
        pass  # optional in diffusers too; it repairs wrongly decoded text and straightens quotes
    text = html.unescape(html.unescape(text))  # twice: "&amp;lt;" occurs in scraped captions
    return re.sub(r"\s+", " ", text).strip()


def load_wan(folder, max_length):
    """umT5, as in WanPipeline; D = 4096. Behind a prompt the network sees zeros."""
    network = later("UMT5EncoderModel", folder)
    return masked_encoder(load_tokenizer(folder), network, max_length, clean_prompt)


def load_pixart(folder, max_length):
    """T5, as in PixArtAlphaPipeline and PixArtSigmaPipeline; D = 4096.

    Their clean_caption, which also removes URLs and the like, is for scraped captions and not used.
    """
    network = later("T5EncoderModel", folder)

    def prepare(prompt):
        return prompt.lower().strip()

    return masked_encoder(load_tokenizer(folder), network, max_length, prepare)


def load_z_image(folder, max_length):
    """Qwen 3, as in ZImagePipeline: its chat template, before the last layer; D = 2560."""
    settings = dict(tokenize=False, add_generation_prompt=True, enable_thinking=True)
    tokenizer, network = load_tokenizer(folder), later("AutoModel", folder)

    def prepare(prompt):
        message = {"role": "user", "content": prompt}
        return tokenizer.apply_chat_template([message], **settings)

    return masked_encoder(tokenizer, network, max_length, prepare, layer=-2)


# QwenImagePipeline's template, and how many tokens it has before the prompt.
QWEN_IMAGE_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_IMAGE_BEFORE = 34


def load_qwen_image(folder, max_length):
    """Qwen 2.5 VL without images, as in QwenImagePipeline; D = 3584.

    The tokens of the template before the prompt are left out. The model without its head has the
    same last hidden states, and makes no logits of 150,000 words for every token.
    """
    whole = later("Qwen2_5_VLForConditionalGeneration", folder)
    tokenizer, prepare = load_tokenizer(folder), QWEN_IMAGE_TEMPLATE.format
    return masked_encoder(
        tokenizer, lambda: whole().model, max_length, prepare, drop=QWEN_IMAGE_BEFORE
    )


# Lumina2Pipeline's system prompt, and what stands between it and a prompt.
LUMINA2_SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts. <Prompt Start> "
)


def load_lumina2(folder, max_length):
    """Gemma 2, as in Lumina2Pipeline: before the last layer; D = 2304.

    The system prompt stands before every prompt, and not before the negative one.
    """

    def prepare(prompt):
        return LUMINA2_SYSTEM + prompt

    network = later("AutoModel", folder)
    encoder = masked_encoder(load_tokenizer(folder), network, max_length, prepare, layer=-2)
    return encoder._replace(negative=lambda prompt: encoder.features([prompt], prepare=str))


# ---- encoders that see their padding, all of whose rows count ------------------------------------


def padded_ids(tokenizer, prompts, max_length):
    """(B, max_length) on the device; longer prompts are cut."""
    settings = dict(padding="max_length", max_length=max_length, truncation=True)
    return tokenizer(prompts, return_tensors="pt", **settings).input_ids.to(device())


def unmasked_encoder(tokenizer, network, max_length, name="text", dtype=None):
    """An encoder that is given no mask.  -> Encoder, whose features are called `name`

    network: a function that returns it. dtype: of the features, None for the encoder's.
    """

    @torch.no_grad()
    def features(prompts):
        text = network()(padded_ids(tokenizer, prompts, max_length)).last_hidden_state
        text = text.to(dtype or text.dtype).cpu()
        return {name: text}, torch.ones(text.shape[:2], dtype=torch.bool)

    return Encoder(counter(tokenizer), features, lambda prompt: features([prompt]))


def load_cogvideox(folder, max_length):
    """T5, as in CogVideoXPipeline; D = 4096. It is given no mask."""
    network = later("T5EncoderModel", folder)
    return unmasked_encoder(load_tokenizer(folder), network, max_length)


def load_stable_diffusion(folder, max_length):
    """CLIP, as in StableDiffusionPipeline; D = 768, in 2.1 1024.

    2.1's encoder is saved without its last layer, which makes the last one the penultimate.
    """
    network = later("CLIPTextModel", folder)
    return unmasked_encoder(load_tokenizer(folder), network, max_length)


SDXL_RESOLUTION = 1024, 1024


def load_sdxl(folder, max_length, resolution=None):
    """Two CLIPs, as in StableDiffusionXLPipeline: text, 768 + 1280 wide, pooled (B, 1280), size.

    text is what both have before their last layers, side by side; pooled is the second's feature of
    the whole prompt. size (B, 6) is the height and width of the original image, top and left of the
    crop, height and width of the target: all of it resolution (H, W), and no crop. The negative
    prompt None has zeros in text and pooled.
    """
    first, second = load_tokenizer(folder), load_tokenizer(folder, "tokenizer_2")
    network = later("CLIPTextModel", folder)
    network_2 = later("CLIPTextModelWithProjection", folder, "text_encoder_2")
    height, width = resolution or SDXL_RESOLUTION
    size = torch.tensor([[height, width, 0, 0, height, width]])

    @torch.no_grad()
    def features(prompts):
        pairs = ((first, network), (second, network_2))
        outputs = [
            net()(padded_ids(tokenizer, prompts, max_length), output_hidden_states=True)
            for tokenizer, net in pairs
        ]
        text = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        text, pooled = (x.to(network_2().dtype).cpu() for x in (text, outputs[1].text_embeds))
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        return {"text": text, "pooled": pooled, "size": size.repeat(len(text), 1)}, mask

    def negative(prompt):
        found, mask = features([prompt or ""])
        if prompt is None:
            found |= {name: torch.zeros_like(found[name]) for name in ("text", "pooled")}
        return found, mask

    counts = counter(first), counter(second)
    return Encoder(
        lambda prompts: list(map(max, *(c(prompts) for c in counts))), features, negative
    )


CLIP, CLIP_TOKENS = "openai/clip-vit-large-patch14", 77  # its name, and as many as it has places


def clip_name(root, clip=None):
    """The folder or name of CLIP: clip, else what pipeline.json in root names, else CLIP."""
    described = os.path.join(root, "pipeline.json")
    if clip is None and os.path.isfile(described):
        clip = load_json(described).get("args", {}).get("text_cond_model")
    return str(clip or CLIP)


def load_trellis(root, max_length, clip=None):
    """CLIP, as in TrellisTextTo3DPipeline: "tokens", in float16, in which TRELLIS uses them.

    clip: a transformers folder, or a name that is downloaded; None: see `clip_name`. Raises
    UserError.
    """
    library, clip = require("transformers"), clip_name(root, clip)
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(clip)
        model = load_pretrained(library.CLIPTextModel, clip, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"--clip {clip} cannot be loaded: {error}") from None
    return unmasked_encoder(tokenizer, lambda: model, max_length, "tokens", torch.float16)


# ---- the table -----------------------------------------------------------------------------------

# The negative prompt that Wan samples with by default (wan/configs/shared_config.py).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
    "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，"
    "畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


class Family(NamedTuple):
    """Teachers whose prompts are encoded alike.

    load(folder, max_length, **flags) -> Encoder. flags: of the command, which load takes.
    max_length: the default, tokens of a prompt. most: as many as the encoder or the network has
    places for; fixed: and no fewer.
    negative: the default negative prompt.
    mask: the network's name for the mask, "" where it takes none.
    padded_to: how many tokens a prompt has in a batch: "max_length" with zeros behind its own, or
    "longest", as many as the longest prompt of the file, or "encoded", max_length with what the
    encoder makes of the padding.
    folders: of a pipeline, that load reads.
    """

    load: Callable
    max_length: int | None
    padded_to: str
    mask: str = ""
    negative: str = ""
    most: int | None = None
    fixed: bool = False
    flags: tuple = ()
    folders: tuple = ("tokenizer", "text_encoder")


WAN = Family(load_wan, 512, "max_length", negative=NEGATIVE_PROMPT)
# Positions of the released networks, axes_lens: 1536, of which two are left behind a text that is
# filled up to a multiple of 32, and Lumina's 300 with one for time.
Z_IMAGE = Family(load_z_image, 512, "longest", mask="text_mask", most=1504)
# What T5 makes of PixArt's padding is left out: the network's mask gives it no weight at all.
PIXART = Family(load_pixart, 120, "max_length", mask="mask")
COGVIDEOX = Family(load_cogvideox, 226, "encoded", most=226, fixed=True)
# 512 is of QwenImagePipeline's call, at most 1024 too; " " is the negative prompt of its card.
QWEN_IMAGE = Family(load_qwen_image, 512, "longest", mask="mask", negative=" ", most=1024)
LUMINA2 = Family(load_lumina2, 256, "longest", mask="mask", most=299)
STABLE_DIFFUSION = Family(load_stable_diffusion, CLIP_TOKENS, "encoded", most=CLIP_TOKENS)
SDXL_FOLDERS = "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"
SDXL = STABLE_DIFFUSION._replace(load=load_sdxl, flags=("resolution",), folders=SDXL_FOLDERS)
TRELLIS = STABLE_DIFFUSION._replace(load=load_trellis, flags=("clip",), folders=())

# By the class of the pipeline, or of the network where there is no model_index.json.
FAMILIES = {
    "WanPipeline": WAN,
    "WanTransformer3DModel": WAN,
    "ZImagePipeline": Z_IMAGE,
    "ZImageTransformer2DModel": Z_IMAGE,
    "PixArtAlphaPipeline": PIXART,
    "PixArtSigmaPipeline": PIXART._replace(max_length=300),
    "PixArtTransformer2DModel": PIXART._replace(max_length=None),  # alpha or Sigma, it is one class
    "Transformer2DModel": PIXART._replace(max_length=None),  # its name in older diffusers
    "CogVideoXPipeline": COGVIDEOX,
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "QwenImagePipeline": QWEN_IMAGE,
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "Lumina2Pipeline": LUMINA2,
    "Lumina2Text2ImgPipeline": LUMINA2,  # its name in older diffusers
    "Lumina2Transformer2DModel": LUMINA2,
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": SDXL,
    "TrellisTextTo3DPipeline": TRELLIS,
}


# ---- which family a folder is of -----------------------------------------------------------------


def teacher_class(folder):
    """The class of a diffusers pipeline or of its network, "TrellisTextTo3DPipeline" for a root
    or a network of TRELLIS's text models, or "TRELLIS" for the others. Raises UserError.
    """
    for name in ("model_index.json", "transformer/config.json", "unet/config.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and "_class_name" in (config := load_json(path)):
            if name == "unet/config.json":  # one class has both models' U-Nets
                is_xl = config.get("addition_embed_type") == "text_time"
                return "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"
            return str(config["_class_name"])
    inside = [os.path.join(folder, name) for name in ("pipeline.json", "ckpts")]
    if any(map(os.path.exists, inside)) or trellis_path(folder):
        return "TrellisTextTo3DPipeline" if takes_text(folder) else "TRELLIS"
    fault = "has no model_index.json, transformer/config.json, unet/config.json or pipeline.json"
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


def zeros_for_empty(folder):
    """Whether SDXL's negative prompt, where none is given, is zeros: model_index.json says so."""
    path = os.path.join(folder, "model_index.json")
    index = load_json(path) if os.path.isfile(path) else {}
    return bool(index.get("force_zeros_for_empty_prompt", True))  # as in the pipeline


class Asked(NamedTuple):
    """How the prompts of one teacher are to be encoded: see `ask`."""

    folder: str
    name: str  # of the class
    family: Family
    negative: str | None
    max_length: int
    flags: dict

    def load(self):
        """-> Encoder. Raises UserError for a library or folder that is missing."""
        parts = self.family.folders
        missing = [n for n in parts if not os.path.isdir(os.path.join(self.folder, n))]
        if missing:
            raise UserError(
                f"--teacher {self.folder}: a {self.name} encodes prompts with {', '.join(parts)}, "
                f"and there is no {' and no '.join(missing)}: pass a whole pipeline folder"
            )
        return self.family.load(self.folder, self.max_length, **self.flags)

    def folders(self):
        """The folders of tokenizers and text encoders, as far as they are on this machine."""
        found = [os.path.join(self.folder, name) for name in self.family.folders]
        found += [self.flags["clip"]] if "clip" in self.flags else []
        return [folder for folder in found if os.path.isdir(folder)]

    def settings(self):
        """All that the features depend on besides the encoder's files, as JSON can hold it."""
        family = self.family
        return [family.mask, family.padded_to, self.negative, self.max_length, self.flags]

    def takers(self):
        """Classes of pipelines and networks that take such features, as metadata of their file."""
        same = [name for name, family in FAMILIES.items() if family.load is self.family.load]
        return {"for": " ".join(same)}

    def kept(self, counts):
        """Tokens of prompts -> how many rows of features are kept of each."""
        if self.family.padded_to == "encoded":
            return [self.max_length] * len(counts)
        return [min(n, self.max_length) for n in counts]

    def length(self, kept):
        """kept: of all prompts, the negative one too -> the tokens of a prompt in a batch."""
        return max(kept) if self.family.padded_to == "longest" else self.max_length


def ask(folder, negative_prompt=None, max_length=None, **flags):
    """How the prompts of a teacher are encoded, with the defaults of its class in place of None.

    flags: resolution and clip, which only some families take, None where they were not given.
    Raises UserError for a folder or flags that do not fit.
    """
    name = teacher_class(folder)
    if name not in FAMILIES:
        remedy = "pass one of these" if name != "TRELLIS" else "pass --images instead"
        known = ", ".join(n for n in FAMILIES if n.endswith("Pipeline"))
        raise UserError(f"--teacher {folder} is {name}, and --prompts_txt is for {known}: {remedy}")
    family = FAMILIES[name]
    for flag in flags.keys() - set(family.flags):
        if flags[flag] is not None:
            raise UserError(f"--{flag} has no effect with a {name}: leave it out")
    flags = {flag: flags.get(flag) for flag in family.flags}
    if "clip" in flags:
        flags["clip"] = clip_name(folder, flags["clip"])
    if negative_prompt is None and not (family is SDXL and zeros_for_empty(folder)):
        negative_prompt = family.negative
    max_length = max_length or family.max_length
    if max_length is None:
        raise UserError(
            f"--teacher {folder} has no model_index.json to tell PixArt-alpha from PixArt-Sigma: "
            "pass --max_length 120 for alpha, 300 for Sigma"
        )
    if family.most and max_length > family.most or family.fixed and max_length != family.most:
        takes = "exactly" if family.fixed else "at most"
        raise UserError(
            f"--max_length {max_length}: a {name} takes {takes} {family.most} tokens: leave it out"
        )
    return Asked(str(folder), name, family, negative_prompt, max_length, flags)


def padded_rows(asked, encoder, prompts, length):
    """What a network takes, for each prompt and for the negative one behind them, one by one.

    length: of `Asked.length`. -> an iterator of {"text": (length, D), the mask's name: (length,)
    bool where the network takes one, and in SDXL "pooled": (P,), "size": (6,)}, on the CPU.
    """
    each = (encoder.features([prompt]) for prompt in prompts)
    null = (encoder.negative(prompt) for prompt in [asked.negative])
    for found, _ in itertools.chain(each, null):  # alone, so that there is no padding yet
        row = {name: value[0] for name, value in found.items()}
        name = next(iter(row))
        n = len(row[name])
        row[name] = F.pad(row[name], (0, 0, 0, length - n))
        yield row | ({asked.family.mask: torch.arange(length) < n} if asked.family.mask else {})
