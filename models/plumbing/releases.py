"""What released teachers prescribe: one table, by network class, config, scheduler and folder.

Two releases of one class can want different settings, and a wrong one trains without complaint.
So `recognise` looks a --teacher up in RELEASES, `flags.parse` takes the row's settings as
defaults, and the run prints which row that was and what the command line overrides.

A teacher that was itself distilled has its guidance in its weights and its scores only at a few
noise levels. `distilled` names such a teacher; the run starts with a warning.
"""

import os
import re
from dataclasses import dataclass, field

from models.files import load_json
from models.networks import network_class, trellis_path
from models.plumbing.teachers import network_folder, scheduler_folder
from models.worlds import WORLDS


@dataclass(frozen=True)
class Release:
    """One row of RELEASES.

    name       as its authors call it
    network    name of the network's class here
    facts      what the folder must say, {key: value}: a key of config.json, "scheduler.KEY" of
               scheduler_config.json, or "two_networks", whether the root has transformer_2/
    settings   {flag: default}, guidance as uncond + scale (cond - uncond); of a flag that a script
               does not have, nothing is taken
    source     of the settings, in words
    distilled  in words, how it was distilled; None: it was not
    """

    name: str
    network: str
    facts: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    source: str = ""
    distilled: str | None = None


WAN, Z_IMAGE = "WanTransformer3DModel", "ZImageTransformer2DModel"
PIXART, DIT = "PixArtTransformer2DModel", "DiTTransformer2DModel"
COGVIDEOX = "CogVideoXTransformer3DModel"
QWEN_IMAGE, LUMINA_2 = "QwenImageTransformer2DModel", "Lumina2Transformer2DModel"
UNET, ADM = "UNet2DConditionModel", "UNetModel"
TRELLIS_STAGES = ("SparseStructureFlowModel", "SLatFlowModel")
WAN_1B = {"num_layers": 30, "num_attention_heads": 12, "in_channels": 16}
WAN_14B = {"num_layers": 40, "num_attention_heads": 40, "in_channels": 16, "image_dim": None}
# Text-to-video few-step students of Wan are trained at shift 5 (Self-Forcing 2506.08009, Phased DMD
# 2510.27684), which is also sample_shift of wan/configs for 2.1 and for 2.2's 5B. The folders of
# diffusers say 3, for 480p.
WAN_SHIFT = 5.0
XL_2 = {"num_layers": 28, "num_attention_heads": 16, "num_embeds_ada_norm": 1000}
# pipeline.json of TRELLIS-image-large, both stages: 25 Euler steps, rescale_t 3, cfg_strength 5 as
# (1 + w) cond - w uncond, for t in [.5, 1]. rescale_t is this repository's shift. In mdt_dist.py,
# whose flags these are, the teacher is sampled so, and its student at shift 1.
TRELLIS_SAMPLES = {"teacher_shift": 3.0, "teacher_guidance_interval": [0.5, 1.0]}

RELEASES = (
    # Z-Image's pipeline adds guidance as cond + g (cond - uncond), so our scale is g + 1.
    Release(
        "Z-Image-Turbo",
        Z_IMAGE,
        {"dim": 3840, "scheduler.shift": 3.0},
        {"timestep_shift": 3.0, "guidance_scale": 1.0},
        "its scheduler's shift, its card's guidance",
        distilled="8 steps without guidance",
    ),
    # Tongyi-MAI/Z-Image: scheduler shift 6. Its card recommends guidance 3 to 5, here 4 to 6.
    Release(
        "Z-Image",
        Z_IMAGE,
        {"dim": 3840, "scheduler.shift": 6.0},
        {"timestep_shift": 3.0, "guidance_scale": 5.0},
        "shift: an author in Z-Image's issue 74, its scheduler has 6; guidance: 4 in its card",
    ),
    # Qwen/Qwen-Image: its scheduler has a shift that grows with the image, 2 at 1024 x 1024.
    Release(
        "Qwen-Image",
        QWEN_IMAGE,
        {"num_layers": 60, "num_attention_heads": 24, "joint_attention_dim": 3584},
        {"timestep_shift": 3.0, "guidance_scale": 4.0, "guidance_rescale": "patch"},
        "shift: Phased DMD 2510.27684; true_cfg_scale of its card; QwenImagePipeline rescales",
    ),
    # Alpha-VLLM/Lumina-Image-2.0: its pipeline rescales guidance by rows (cfg_normalization), which
    # Decoupled DMD's Eq. 4 does not.
    Release(
        "Lumina-Image 2.0",
        LUMINA_2,
        {"num_layers": 26, "hidden_size": 2304, "cap_feat_dim": 2304},
        {"timestep_shift": 6.0, "guidance_scale": 4.0},
        "its scheduler's shift, Lumina2Pipeline's guidance",
    ),
    Release(
        "Wan 2.1 T2V 1.3B",
        WAN,
        {**WAN_1B, "image_dim": None},
        {"timestep_shift": WAN_SHIFT, "guidance_scale": 5.0},
        "guidance of its card for diffusers; 6 in the README of Wan2.1",
    ),
    Release(
        "Wan 2.2 T2V A14B",
        WAN,
        {**WAN_14B, "two_networks": True},
        {"timestep_shift": WAN_SHIFT, "guidance_scale": 4.0},
        "Phased DMD 2510.27684 and its many-step samples; wan/configs: shift 12, guidance 3 and 4",
    ),
    Release(
        "Wan 2.1 T2V 14B",
        WAN,
        {**WAN_14B, "two_networks": False},
        {"timestep_shift": WAN_SHIFT, "guidance_scale": 5.0},
        "sample_shift and sample_guide_scale of wan/configs",
    ),
    Release(
        "Wan 2.2 TI2V 5B",
        WAN,
        {"num_layers": 30, "num_attention_heads": 24, "in_channels": 48},
        {"timestep_shift": WAN_SHIFT, "guidance_scale": 5.0},
        "wan/configs/wan_ti2v_5B.py",
    ),
    # VP times have no shift.
    Release(
        "PixArt-LCM",
        PIXART,
        {"scheduler._class_name": "LCMScheduler"},
        {"timestep_shift": 1.0, "guidance_scale": 1.0},
        "guidance_scale 0.0 in its card",
        distilled="a consistency model with guidance in its weights, 2 to 8 steps",
    ),
    Release(
        "PixArt-Sigma",
        PIXART,
        {"num_layers": 28, "sample_size": 128, "use_additional_conditions": False},
        {"timestep_shift": 1.0, "guidance_scale": 4.5},
        "guidance of PixArtSigmaPipeline",
    ),
    *(
        Release(
            f"PixArt-alpha {8 * size}",
            PIXART,
            {"num_layers": 28, "sample_size": size},
            {"timestep_shift": 1.0, "guidance_scale": 4.5},
            "guidance of PixArtAlphaPipeline",
        )
        for size in (32, 64, 128)
    ),
    # What the papers of the methods guide with is in papers.py. 1.5 is the shape of 1.1 to 1.5.
    *(
        Release(
            name,
            UNET,
            {"cross_attention_dim": width, "in_channels": 4},
            {"timestep_shift": 1.0, "guidance_scale": scale},
            "guidance of its pipeline",
        )
        for name, width, scale in (
            ("Stable Diffusion 1.5", 768, 7.5),
            ("Stable Diffusion 2.1", 1024, 7.5),
            ("SDXL base 1.0", 2048, 5.0),
        )
    ),
    # facebook/DiT-XL-2-256 and -512: the paper's pictures and DiTPipeline have guidance 4.
    *(
        Release(
            f"DiT-XL/2 {8 * size}",
            DIT,
            {**XL_2, "sample_size": size, "convention": convention},
            {"timestep_shift": 1.0, "guidance_scale": 1.5},
            "guidance of DiT 2212.09748, Tables 2 and 3",
        )
        for size in (32, 64)
        for convention in (None, "dit")
    ),
    Release(
        "SiT",
        DIT,
        {"convention": "sit", "num_embeds_ada_norm": 1000},
        {"timestep_shift": 1.0, "guidance_scale": 1.5},
        "guidance of SiT 2401.08740, Table 1",
    ),
    Release(
        "LFM ImageNet",
        DIT,
        {"convention": "lfm", "num_embeds_ada_norm": 1000},
        {"timestep_shift": 1.0, "guidance_scale": 1.5},
        "cfg_scale of VinAIResearch/LFM",
    ),
    Release(
        "LFM",
        DIT,
        {"convention": "lfm", "num_embeds_ada_norm": 0},
        {"timestep_shift": 1.0, "guidance_scale": 1.0},
        "data without classes",
    ),
    # LFM's and ADM's U-Nets, and EDM's: of ADM and EDM no label was dropped in training.
    *(
        Release(
            name,
            ADM,
            {"convention": convention, **classes},
            {"timestep_shift": 1.0, "guidance_scale": scale},
            source,
        )
        for name, convention, classes, scale, source in (
            ("LFM ADM ImageNet", "lfm", {"num_classes": 1000}, 1.25, "CFG of LFM's test_args"),
            ("LFM ADM", "lfm", {"num_classes": 0}, 1.0, "data without classes"),
            ("ADM ImageNet", "adm", {"num_classes": 1000}, 1.0, "trained with every label"),
            ("EDM ImageNet 64", "edm", {"num_classes": 1000}, 1.0, "trained with every label"),
        )
    ),
    Release(
        "CogVideoX-2B",
        COGVIDEOX,
        {"num_layers": 30, "num_attention_heads": 30, "in_channels": 16},
        {"timestep_shift": 1.0, "guidance_scale": 6.0},
        "guidance of its card and of CogVideoXPipeline",
    ),
    # microsoft/TRELLIS-image-large: DINOv2's tokens of width 1024. TRELLIS-text-*: CLIP's of 768.
    *(
        Release(
            f"TRELLIS {kind} {stage}",
            network,
            {"cond_channels": width},
            {"guidance_scale": 1.0 + w, **TRELLIS_SAMPLES},
            f"cfg_strength {w} of {where}",
        )
        for network, stage in zip(TRELLIS_STAGES, ("structure", "latents"))
        for kind, width, w, where in (
            ("image", 1024, 5.0, "pipeline.json"),
            ("text", 768, 7.5, "example_text.py"),
        )
    ),
)

# A name with one of these words is that of a distilled model. Where they end matters only for two:
# "fast" and "hyper" begin other words too.
DISTILLED = re.compile(
    r"(?i)(?<![a-z])(turbo|lightning|lcm|distill|dmd|causvid|self-?forcing|mdt-dist|fastwan"
    r"|fasthunyuan|(?:fast|hyper)(?![a-z]))"
)
# Methods of ours whose result still is a many-step model with guidance of its own.
KEEP_GUIDANCE = ("latent_fm", "linvideo")


def facts_of(teacher):
    """What a --teacher folder says about itself -> (class name or None, {key: value}, names).

    names: of the folder, and of _name_or_path. A world, or what is no network, has no class. Raises
    UserError for JSON that cannot be read.
    """
    root = teacher.rstrip("/")
    folder = network_folder(root)
    described = (trellis_path(folder) or os.path.join(folder, "config")) + ".json"
    if teacher in WORLDS or not os.path.isfile(described):
        return None, {}, []
    config = load_json(described)
    facts = dict(config.get("args", config))
    parent = os.path.dirname(os.path.abspath(folder))
    facts["two_networks"] = os.path.isdir(os.path.join(parent, "transformer_2"))
    beside, student = scheduler_folder(root, folder), os.path.join(folder, "sampler.json")
    if os.path.isfile(student):
        facts["made_by"] = load_json(student).get("method")
    elif beside:
        scheduler = load_json(os.path.join(beside, "scheduler_config.json"))
        facts |= {f"scheduler.{key}": value for key, value in scheduler.items()}
    return network_class(config), facts, [*folder_names(root), str(config.get("_name_or_path"))]


def folder_names(root):
    """The names that a --teacher path may have from its model, not from where it is kept."""
    parts = os.path.abspath(root).split(os.sep)
    names = [name for name in parts if name.startswith("models--")]  # the cache of huggingface_hub
    if not os.path.isdir(root):  # DIR/NAME in TRELLIS's layout
        names.append(parts.pop())
    while parts[-1].startswith("transformer") or parts[-1] in ("unet", "student", "ckpts"):
        parts.pop()
    return [*names, parts[-1]]


def recognise(teacher):
    """--teacher -> its Release, or None for a world, our own small networks, and what is unknown.

    A student of ours counts as the release that it was made from; see `distilled`.
    """
    network, facts, _ = facts_of(teacher)
    for release in RELEASES:
        same = all(facts.get(key) == value for key, value in release.facts.items())
        if release.network == network and same:
            return release
    return None


def distilled(teacher):
    """How a --teacher was distilled, in words, or None."""
    network, facts, names = facts_of(teacher)
    maker = facts.get("made_by")
    if maker:
        return None if maker in KEEP_GUIDANCE else f"a few-step student that {maker}.py made"
    release = recognise(teacher)
    if release and release.distilled:
        return release.distilled
    if facts.get("time_cond_proj_dim") or facts.get("guidance_embeds"):
        return "its config has an input for the guidance scale"
    if facts.get("scheduler._class_name") == "LCMScheduler":
        return "its scheduler is LCMScheduler"
    found = [DISTILLED.search(name.split("/")[-1]) for name in names if network]
    return next((f"its name has {match.group(1)!r}" for match in found if match), None)


def settings_of(teacher):
    """-> (name of the release or None, {flag: default}). A student of ours has no guidance left."""
    release = recognise(teacher)
    if facts_of(teacher)[1].get("made_by") and distilled(teacher):
        return release and f"a student of {release.name}", {"guidance_scale": 1.0}
    return (release.name, release.settings) if release else (None, {})


def warning(teacher, loras=()):
    """One line about a distilled teacher, or about LoRA files that make it one; else None."""
    how, what = distilled(teacher), teacher
    for path in loras:
        found = DISTILLED.search(os.path.basename(os.path.abspath(path)))
        if found and not how:
            how, what = f"its name has {found.group(1)!r}", path
    return how and (
        f"warning: {what} is distilled ({how}): its weights hold guidance already, so that more "
        "is guidance twice, and it knows only the noise levels of its few steps; better distil the "
        "model that it was made from"
    )
