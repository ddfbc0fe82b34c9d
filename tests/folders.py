"""Folders of released teachers without their weights, and small ones with random weights.

    save_config("Wan 2.1 T2V 1.3B", root)      # config.json, scheduler/ and what else is read first

Each is a pipeline root or, for TRELLIS, DIR/NAME, as `--teacher` takes it. --dry_run needs no more.
"""

import os
from dataclasses import dataclass, field

import torch

from models.files import save_json, save_tensors
from models.networks import NETWORKS, network_config, save_network
from models.networks.adm import EDM_IMAGENET_64
from models.networks.cogvideox import COGVIDEOX_2B
from models.networks.dit_imagenet import DIT_XL_2, DIT_XL_2_512
from models.networks.lumina2 import LUMINA_2
from models.networks.pixart import PIXART_512, PIXART_1024
from models.networks.qwen_image import QWEN_IMAGE
from models.networks.trellis import SLAT_FLOW_L, SS_FLOW_L
from models.networks.unet import SD_1_5, SDXL
from models.networks.wan import WAN_1_3B, WAN_5B, WAN_14B
from models.networks.z_image import Z_IMAGE_6B
from tests.schedulers import PIXART as DPM_SOLVER
from tests.schedulers import SCHEDULERS

WAN, Z_IMAGE = "WanTransformer3DModel", "ZImageTransformer2DModel"
PIXART, DIT = "PixArtTransformer2DModel", "DiTTransformer2DModel"
COGVIDEOX = "CogVideoXTransformer3DModel"
UNET = "UNet2DConditionModel"
QWEN, LUMINA = "QwenImageTransformer2DModel", "Lumina2Transformer2DModel"
STRUCTURE, LATENTS = "SparseStructureFlowModel", "SLatFlowModel"
FLOW = SCHEDULERS["Wan 2.1 T2V 1.3B"]


@dataclass(frozen=True)
class Config:
    """network: its class; config: its arguments; scheduler: of the folder; pair: two networks;
    text: tokens of a prompt; boundary: of a pair."""

    network: str
    config: dict
    scheduler: dict = field(default_factory=dict)
    pair: bool = False
    text: int = 512


def wan(heads, width, ffn, layers):
    """A Wan of another size."""
    sizes = dict(num_attention_heads=heads, attention_head_dim=width, ffn_dim=ffn)
    return Config(WAN, dict(WAN_1_3B, num_layers=layers, text_dim=256, **sizes), FLOW, text=64)


CONFIGS = {
    "Wan 2.1 T2V 1.3B": Config(WAN, WAN_1_3B, SCHEDULERS["Wan 2.1 T2V 1.3B"]),
    "Wan 2.1 T2V 14B": Config(WAN, WAN_14B, SCHEDULERS["Wan 2.1 T2V 14B"]),
    "Wan 2.2 TI2V 5B": Config(WAN, WAN_5B, SCHEDULERS["Wan 2.2 TI2V 5B"]),
    "Wan 2.2 T2V A14B": Config(WAN, WAN_14B, SCHEDULERS["Wan 2.2 T2V A14B"], pair=True),
    "Z-Image": Config(Z_IMAGE, Z_IMAGE_6B, SCHEDULERS["Z-Image"]),
    "Qwen-Image": Config(QWEN, QWEN_IMAGE, SCHEDULERS["Qwen-Image"]),
    "Lumina-Image 2.0": Config(LUMINA, LUMINA_2, SCHEDULERS["Lumina-Image 2.0"], text=256),
    "PixArt-alpha 512": Config(PIXART, PIXART_512, DPM_SOLVER, text=120),
    "PixArt-alpha 1024": Config(PIXART, PIXART_1024, DPM_SOLVER, text=120),
    "Stable Diffusion 1.5": Config(UNET, SD_1_5, SCHEDULERS["Stable Diffusion 1.5"], text=77),
    "SDXL base 1.0": Config(UNET, SDXL, SCHEDULERS["SDXL base 1.0"], text=77),
    "DiT-XL/2 256": Config(DIT, DIT_XL_2, SCHEDULERS["DiT-XL/2 256"]),
    "DiT-XL/2 512": Config(DIT, DIT_XL_2_512, SCHEDULERS["DiT-XL/2 512"]),
    "SiT-XL/2 256": Config(DIT, dict(DIT_XL_2, out_channels=4, convention="sit")),
    "EDM ImageNet 64": Config("UNetModel", EDM_IMAGENET_64),
    "CogVideoX-2B": Config(COGVIDEOX, COGVIDEOX_2B, SCHEDULERS["CogVideoX-2B"], text=226),
    "TRELLIS image structure": Config(STRUCTURE, SS_FLOW_L, text=1374),
    "TRELLIS image latents": Config(LATENTS, SLAT_FLOW_L, text=1374),
    # of no release: what a processor can train in seconds
    "tiny Wan": wan(4, 64, 1024, 6),  # 7 million parameters
    "middle Wan": wan(6, 64, 1536, 6),  # 15 million
    "tiny Wan pair": Config(WAN, wan(4, 64, 1024, 6).config, FLOW, pair=True, text=64),
}


def save_config(name, root, weights=False):
    """Write the folder of one of CONFIGS.  -> what --teacher takes. weights: random ones too."""
    about, root = CONFIGS[name], str(root)
    if about.network in (STRUCTURE, LATENTS):
        os.makedirs(root, exist_ok=True)
        save_json({"name": about.network, "args": about.config}, os.path.join(root, "flow.json"))
        return os.path.join(root, "flow")
    parts = ["transformer", "transformer_2"] if about.pair else ["transformer"]
    parts = ["unet"] if about.network == UNET else parts
    for part in parts:
        folder = os.path.join(root, part)
        os.makedirs(folder, exist_ok=True)
        if weights:
            torch.manual_seed(len(part))
            net = NETWORKS[about.network](**about.config)
            save_network(net, network_config(net), folder)
        else:
            config = {"_class_name": about.network, **about.config}
            save_json(config, os.path.join(folder, "config.json"))
    if about.scheduler:
        os.makedirs(os.path.join(root, "scheduler"), exist_ok=True)
        where = os.path.join(root, "scheduler", "scheduler_config.json")
        save_json(about.scheduler, where)
    index = {"boundary_ratio": 0.875} if about.pair else {}
    save_json(index, os.path.join(root, "model_index.json"))
    return root


def save_conditions(name, path, rows=4):
    """A file of random prompts (--prompts) for one of CONFIGS, or of --data for TRELLIS's
    structures.  -> the flags."""
    about, g = CONFIGS[name], torch.Generator().manual_seed(0)
    if about.network in (DIT, "UNetModel"):
        return []
    if about.network == STRUCTURE:
        tokens = torch.randn(rows, about.text, about.config["cond_channels"], generator=g)
        x0 = torch.randn(rows, 8, *[about.config["resolution"]] * 3, generator=g)
        save_tensors({"x0": x0, "cond.tokens": tokens}, path)
        return ["--data", path]
    widths = {WAN: about.config.get("text_dim"), Z_IMAGE: 2560, PIXART: 4096, COGVIDEOX: 4096}
    widths |= {QWEN: 3584, LUMINA: 2304}
    width = widths.get(about.network) or about.config["cross_attention_dim"]
    text = torch.randn(rows + 1, about.text, width, generator=g).bfloat16()
    tensors = {"cond.text": text[:rows], "uncond.text": text[rows:]}
    mask = {Z_IMAGE: "text_mask", PIXART: "mask", QWEN: "mask", LUMINA: "mask"}
    mask = mask.get(about.network)
    if about.config.get("addition_embed_type"):
        for kind, count in (("cond", rows), ("uncond", 1)):
            tensors[f"{kind}.pooled"] = torch.randn(count, 1280, generator=g)
            tensors[f"{kind}.size"] = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * count)
    if mask:
        ones = torch.ones(rows + 1, about.text, dtype=torch.bool)
        tensors |= {f"cond.{mask}": ones[:rows], f"uncond.{mask}": ones[rows:]}
    save_tensors(tensors, path)
    return ["--prompts", path]
