"""Checksums of everything that the scripts train, to freeze behaviour while code is moved.

Each script runs 3 updates of each of its main settings on tiny networks, on one rank and on two
(gloo, CPU). A setting's result is a checksum of every tensor under student/, of the newest full
state, and of samples.safetensors where there is one. Two source trees that behave alike give the
same checksums to the last bit: nothing here looks into a tree, it only calls `main(flags)` of its
scripts and reads the files that they leave. It is not a test: what changes a gradient on purpose
changes its checksums, and another machine or version of torch may change all of them.

    python tests/checksums.py record OLD_TREE old.json --fixtures FOLDER       # some minutes
    python tests/checksums.py record NEW_TREE new.json --fixtures FOLDER       # the same folder
    python tests/checksums.py compare old.json new.json                        # exit code 1: differ

    --only SUBSTRING    settings whose name has it, as "dmd gan" or "phased_dmd" (record, compare)
    --ranks 1 2         which numbers of ranks (record)
    --names N           how many tensors of a setting are named at most, 10 unless given (compare)

FOLDER holds the tiny teachers, prompts and data files. It is made by the first `record` that does
not find it (default: FILE-fixtures beside FILE.json), or by `fixtures FOLDER TREE`; both records
must use the same one. What the runs print goes to FILE-ranksN-rankR.log beside FILE.json. A setting
that raises is recorded as its error and does not stop the others.
"""

import argparse
import hashlib
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

# ---- settings ----------------------------------------------------------------------------------
# Flags that a script's settings have in common, then {name: more flags}; a later flag wins over an
# earlier one. @NAME is a file or folder of the fixtures, OUT the run's output folder. Rates and
# whatever else has a default that depends on the teacher are given, so that no default matters.
# The 3 updates of seed 34 draw different steps of a student, and layers that no rule selects.

COMMON = """--max_train_steps 3 --train_batch_size 4 --checkpointing_steps 3 --seed 34
    --gradient_accumulation_steps 1 --lr_warmup_steps 0 --max_grad_norm 10 --mixed_precision no
    --learning_rate 1e-3 --weight_decay 0.01 --lr_decay_share 0 --ema_decay 0.9 --guidance_scale 1
    """
DISTIL = (
    COMMON
    + """--teacher @dit --timestep_shift 2 --teacher_steps 0 --preview_samples 2
    --adam_betas 0.5 0.99 """
)
FAKE = DISTIL + "--learning_rate_fake 2e-3 --fake_update_ratio 2 "

WAN = "--teacher @wan --prompts @wan/prompts.safetensors --sample_shape 4 2 4 6 "
WAN_2 = WAN.replace("@wan", "@wan_two")
Z_IMAGE = "--teacher @z_image --prompts @z_image/prompts.safetensors --sample_shape 4 4 6 "
PIXART = "--teacher @pixart --prompts @pixart/prompts.safetensors --sample_shape 4 4 6 "
VP = "--teacher @vp/transformer "
GAN = "--gan_weight 0.5 --gan_weight_d 0.3 --data @data.safetensors "
RING = "--teacher ring --timestep_shift 1 "

EVERY = {  # of every script
    "accumulation": "--gradient_accumulation_steps 2",
    "bf16": "--mixed_precision bf16",
    "no ema": "--ema_decay 0",
    "checkpointing": "--gradient_checkpointing",
    "warmup and decay": "--lr_warmup_steps 2 --lr_decay_share 1 --max_grad_norm 0.1",
    "seed": "--seed 7",
}

DMD = {
    "plain": "",
    **EVERY,
    "guidance": "--guidance_scale 2",
    "4 steps": "--student_steps 4",
    "4 steps ode": "--student_steps 4 --renoise ode",
    "4 steps shared_fake": "--student_steps 4 --shared_fake",
    "4 steps bf16": "--student_steps 4 --mixed_precision bf16",
    "gan": GAN,
    "gan 4 steps": GAN + "--student_steps 4",
    "gan accumulation": GAN + "--gradient_accumulation_steps 2",
    "gan bf16": GAN + "--mixed_precision bf16",
    "regression": "--regression_weight 0.25 --regression_pairs 12 --teacher_steps 2",
    "regression guidance": "--regression_weight 0.25 --regression_pairs 6 --teacher_steps 2 "
    "--guidance_scale 2 --fake_update_ratio 1",
    "no_fake_score": "--no_fake_score",
    "real input": "--student_input real --student_steps 3 --data @data.safetensors",
    "dm_range": "--dm_range 0.3 0.6",
    "gan alone": GAN + "--dm_weight 0",
    "dm_weight": "--dm_weight 0.5",
    "student_times": "--student_times 0.9 0.4",
    "fake_init": "--fake_init @other",
    "student_init": "--student_init @other",
    "vp": VP + "--student_steps 2",
    "vp gan": VP + GAN + "--guidance_scale 2",
    "wan": WAN + "--student_steps 2 --guidance_scale 3",
    "wan checkpointing": WAN + "--student_steps 2 --gradient_checkpointing --mixed_precision bf16",
    "z_image": Z_IMAGE + "--student_steps 2 --guidance_scale 3",
    "pixart": PIXART + "--student_steps 2 --guidance_scale 3",
    "linear student_init": "--teacher @video --student_init @linear --student_steps 2",
    "ring": RING + "--student_steps 2",
}
DECOUPLED = {
    "plain": "",
    **EVERY,
    "unguided": "--guidance_scale 1",
    "1 step": "--student_steps 1",
    "shared": "--schedule shared",
    "full": "--schedule full",
    "constrained": "--schedule constrained",
    "normalizer shared": "--normalizer shared",
    "normalizer shared, shared": "--normalizer shared --schedule shared",
    "normalizer branch": "--normalizer branch",
    "normalizer branch, full": "--normalizer branch --schedule full",
    "no_ca": "--no_ca",
    "no_dm": "--no_dm",
    "no_dm mean_variance": "--no_dm --mean_variance_weight 0.5 --mean_variance_target 0.1 0.8",
    "no_dm observer": "--no_dm --observer",
    "mean_variance": "--mean_variance_weight 0.5 --mean_variance_target 0.1 0.8",
    "gan": GAN,
    "gan accumulation": GAN + "--gradient_accumulation_steps 2",
    "gan alone": GAN + "--no_dm --no_ca",
    "shared_fake": "--shared_fake",
    "ode": "--renoise ode",
    "ranges": "--ca_range 0.1 0.9 --dm_range 0.1 0.7",
    "student_init": "--student_init @other",
    "vp": VP,
    "wan": WAN + "--student_steps 2 --normalizer branch",
    "z_image": Z_IMAGE + "--student_steps 2",
    "ring": RING,
}
TDM = {
    "plain": "",
    **EVERY,
    "4 steps": "--student_steps 4",
    "no_steps_cond": "--no_steps_cond",
    "to_noise": "--tau_range to_noise",
    "clean": "--match clean",
    "exact": "--fake_target exact",
    "exact snr": "--fake_target exact --fake_weight snr",
    "snr": "--fake_weight snr",
    "fresh": "--fake_noise fresh",
    "demo": "--loss demo",
    "l2": "--loss l2",
    "x_s": "--regress x_s",
    "x_s l2": "--regress x_s --loss l2",
    "max_time": "--max_time 0.9",
    "sde": "--renoise sde",
    "sde x_s": "--renoise sde --regress x_s",
    "guidance": "--guidance_scale 3",
    "guidance accumulation": "--guidance_scale 3 --gradient_accumulation_steps 2",
    "student_init": "--student_init @other",
    "vp": VP,
    "vp x_s": VP + "--regress x_s",
    "vp exact": VP + "--fake_target exact --student_steps 2 4",
    "vp exact snr": VP + "--fake_target exact --fake_weight snr --student_steps 2 4",
    "pixart": PIXART + "--student_steps 4 --guidance_scale 3",
    "pixart bf16": PIXART + "--student_steps 1 2 --no_steps_cond --mixed_precision bf16",
    "wan": WAN + "--student_steps 2 --guidance_scale 3",
    "ring": RING,
}
PHASED = {
    "plain": "",
    **EVERY,
    "1 phase": "--phases 1",
    "4 phases": "--phases 4 --max_train_steps 4 --checkpointing_steps 4",
    "3 steps": "--student_steps 3",
    "no_truncation": "--no_truncation",
    "1 phase no_truncation": "--phases 1 --no_truncation",
    "naive": "--target naive",
    "taper all": "--taper all --phases 1 --timestep_shift 1",
    "taper none": "--taper none",
    "weight paper": "--dmd_weight paper",
    "previous": "--expert_init previous",
    "shared_fake": "--shared_fake",
    "lora": "--lora_rank 4",
    "lora no ema": "--lora_rank 4 --ema_decay 0",
    "lora previous": "--lora_rank 4 --expert_init previous",
    "lora both": "--lora_rank 4 --fake_lora_rank 4",
    "fake lora": "--fake_lora_rank 4",
    "guidance": "--guidance_scale 3",
    "student_init": "--student_init @other",
    "regress x0": "--regress x0",
    "dm_range": "--dm_range 0.3 0.6",
    "vp": VP + "--timestep_shift 1",
    "vp paper": VP + "--dmd_weight paper --guidance_scale 2",
    "wan": WAN + "--timestep_shift 5 --guidance_scale 3",
    "two networks": WAN_2 + "--timestep_shift 5 --guidance_scale 3",
    "two networks no ema": WAN_2 + "--timestep_shift 5 --ema_decay 0 --train_batch_size 1",
    "two networks previous": WAN_2 + "--timestep_shift 5 --phases 4 --expert_init previous "
    "--max_train_steps 4 --checkpointing_steps 4",
    "two networks lora": WAN_2 + "--timestep_shift 5 --lora_rank 4 --fake_lora_rank 4",
    "ring": RING,
}
ADM, CRITIC = (f"--objective {name} --state part --weight eq13 " for name in ("adm", "adm_critic"))
LINVIDEO = {
    "plain": "",
    **EVERY,
    "guidance": "--guidance_scale 2",
    "guidance step": ADM + "--guidance_scale 2 --state step --regression_weight 0.5",
    "guidance rollout": ADM + "--guidance_scale 2 --state rollout",
    "guidance critic": CRITIC + "--guidance_scale 2",
    "adm": ADM,
    "adm part": ADM + "--part 0.3",
    "adm step": ADM + "--state step",
    "adm jump": ADM + "--state jump",
    "adm rollout": ADM + "--state rollout",
    "adm policy": ADM + "--state policy --weight velocity",
    "adm velocity": ADM + "--weight velocity",
    "adm unit": ADM + "--weight unit",
    "adm dmd": ADM + "--weight dmd",
    "adm regression": ADM + "--regression_weight 0.5",
    "adm bf16": ADM + "--mixed_precision bf16",
    "adm accumulation": ADM + "--gradient_accumulation_steps 2",
    "critic": CRITIC,
    "critic step": CRITIC + "--state step --fake_update_ratio 2",
    "dmd": "--objective dmd",
    "dmd accumulation": "--objective dmd --fake_update_ratio 2 --gradient_accumulation_steps 2",
    "first": "--select first",
    "last": "--select last --target_layers 1",
    "uniform": "--select uniform",
    "random": "--select random",
    "list": "--select 3 0",
    "list adm": ADM + "--select 1 2 3 --target_layers 3",
    "no_regularizer": "--no_regularizer",
    "count soft": "--count soft",
    "at once": "--selection_share 0",
    "late": "--selection_share 1 --r_init 0.6 --learning_rate_r 0.3",
    "softmax": "--feature_map softmax",
    "relu": "--feature_map relu",
    "elu": "--feature_map elu",
    "image": "--teacher @dit",
    "wan": WAN + "--guidance_scale 3",
    "wan adm": WAN + ADM + "--mixed_precision bf16 --gradient_checkpointing",
}
STRUCTURE = """--teacher @trellis/ckpts/ss_flow --data @structure.safetensors --timestep_shift 3
    --teacher_steps 2 """
POINTS = """--teacher @trellis/ckpts/slat_flow --data @points.safetensors --timestep_shift 3
    --teacher_steps 2 """
MDT = {
    "plain": "",
    **EVERY,
    "vm": "--arm vm",
    "vd": "--arm vd",
    "cm": "--arm cm",
    "scm": "--arm scm",
    "scm jvp": "--arm scm --derivative jvp",
    "d_norm rms": "--d_norm rms",
    "d_norm 0.1": "--d_norm 0.1",
    "jvp": "--derivative jvp",
    "weight paper": "--vd_weight paper",
    "weight kl": "--vd_weight kl",
    "weights": "--vm_weight 0.5 --vd_loss_weight 2 --dt 0.03",
    "uniform": "--t_law uniform",
    "shared_noise": "--shared_noise",
    "guidance": "--guidance_vm 3 --guidance_vd 4 --guidance_scale 2 --student_guidance 2",
    "vm phases": "--arm vm --phases 2 --student_steps 2",
    "cm phases": "--arm cm --phases 2 --dt 0.2 --student_steps 2",
    "sde": "--renoise sde",
    "student_init": "--student_init @other",
    "structure": STRUCTURE + "--d_norm 0.1",
    "structure guidance": STRUCTURE + "--guidance_vm 3 --guidance_vd 4 --guidance_scale 2",
    "structure cm": STRUCTURE + "--arm cm",
    "structure bf16": STRUCTURE + "--data @structure_float.safetensors --mixed_precision bf16 "
    "--gradient_checkpointing",  # autocast on the CPU refuses float16 tokens
    "sparse": POINTS + "--d_norm 0.1",
    "sparse guidance": POINTS + "--guidance_vm 3 --guidance_vd 4 --student_guidance 2 --d_norm rms",
    "sparse accumulation": POINTS + "--gradient_accumulation_steps 2 --vd_weight kl",
    "sparse cm": POINTS + "--arm cm",
    "sparse scm": POINTS + "--arm scm --derivative jvp",
    "sparse sde": POINTS + "--renoise sde",
    "sparse bf16": POINTS + "--mixed_precision bf16 --gradient_checkpointing",
    "ring": RING + "--data ring",
}
PCA = "--autoencoder pca --pca_patch 4 --pca_channels 12 --patch_size 2 "
VAE = "--autoencoder @vae --patch_size 2 "
MAPS = "--task semantic --maps @maps "
CACHE = "--cache_latents OUT-latents "
LATENT = {
    "plain": "",
    **EVERY,
    "adamw": "--optimizer adamw",
    "label_dropout": "--label_dropout 1",
    "uncond": "--task uncond",
    "inpaint": "--task inpaint",
    "inpaint pca": "--task inpaint " + PCA,
    "inpaint vae": "--task inpaint --hflip " + VAE,
    "inpaint cache": "--task inpaint --hflip " + PCA + CACHE,
    "semantic": MAPS,
    "semantic pca": MAPS + "--hflip " + PCA,
    "semantic accumulation": MAPS + "--gradient_accumulation_steps 2",
    "pca": PCA,
    "pca scale": PCA + "--latent_norm scale",
    "pca channel": PCA + "--latent_norm channel",
    "pca cache": PCA + CACHE + "--latent_norm channel",
    "pca cache hflip": PCA + CACHE + "--hflip --latent_norm scale",
    "vae": VAE,
    "vae cache": VAE + CACHE + "--hflip --latent_norm channel",
    "hflip": "--hflip",
    "logit_normal": "--logit_normal --timestep_shift 3",
    "sigma_min": "--sigma_min 0.01",
    "t_scale": "--t_scale 1",
    "fp16": "--save_fp16",
    "latents": "--data @latents.safetensors --patch_size 2",
    "latents uncond": "--data @latents.safetensors --task uncond --patch_size 2",
    "points": "--data ring",
    "world shapes": "--data shapes --latent_norm scale " + PCA,
    "world clips": "--data clips --patch_size 2 4 4",
}
BANK = "--bank_size 8 --bank_batch 4 --sampling_steps 4 --target_layers 2 "
SETTINGS = {
    "dmd": (FAKE + "--student_steps 1 --renoise sde --dm_range 0.02 0.98 --gan_weight 0", DMD),
    "decoupled_dmd": (
        FAKE
        + """--student_steps 4 --guidance_scale 3 --schedule hybrid
        --normalizer none --renoise sde --dm_range 0.02 0.98 --gan_weight 0""",
        DECOUPLED,
    ),
    "tdm": (
        FAKE
        + """--student_steps 1 1 2 4 --tau_range segment --match noisy --loss pseudo_huber
        --fake_target importance --fake_weight network --fake_noise bridge --regress x0
        --renoise ode""",
        TDM,
    ),
    "phased_dmd": (
        FAKE
        + """--student_steps 4 --phases 2 --timestep_shift 3 --target subinterval
        --taper inner --dmd_weight normalized --dm_range 0.02 0.98 --expert_init teacher
        --lora_rank 0 --lora_alpha 8 --fake_lora_rank 0""",
        PHASED,
    ),
    "linvideo": (
        FAKE
        + BANK
        + """--teacher @video --fake_update_ratio 1 --objective mse
        --part 1 --min_time 0.15 --critic_steps 3 --select learned
        --feature_map hedgehog --selection_share 0.67 --selection_weight 0.05 --alpha 4 2
        --r_init 0.8 --learning_rate_r 0.02 --learning_rate_features 1e-2 --uncond_share 0.4""",
        LINVIDEO,
    ),
    "mdt_dist": (
        DISTIL
        + """--data @data.safetensors --student_steps 1 2 --arm mdt --d_norm none
        --derivative difference --dt 0.01 --vd_weight code --vm_weight 1 --vd_loss_weight 1
        --t_law logit_normal --guidance_vm 1 --guidance_vd 1 --student_guidance 1 --phases 1
        --tangent_warmup 2 --renoise ode""",
        MDT,
    ),
    "latent_fm": (
        COMMON
        + """--data @images --resolution 16 --pool 100 --task class --width 32
        --depth 1 --cond_dim 16 --patch_size 4 --network small --autoencoder identity
        --latent_norm none --optimizer muon --learning_rate_muon 0.02 --label_dropout 0.3
        --no-logit_normal --sigma_min 0 --t_scale 1000 --timestep_shift 1 --solver euler
        --sample_steps 1 --atol 1e-5 --rtol 1e-5 --guidance_interval 0 1""",
        LATENT,
    ),
}
SLOW = ("ring", "world shapes", "world clips")  # fits or measures for seconds: on one rank only
QUIET = 300  # seconds without a result after which the processes are ended
REPORTED = 3  # exit code of a rank that recorded an error and left the others


def setting_names(ranks, only=""):
    """Names of the settings that run on so many ranks, "SCRIPT NAME"."""
    names = [
        f"{script} {name}"
        for script, (_, settings) in SETTINGS.items()
        for name in settings
        if ranks == 1 or name not in SLOW
    ]
    return [name for name in names if only in name]


def flags_of(setting, fixtures, out):
    """-> script, its flags."""
    script, name = setting.split(" ", 1)
    base, settings = SETTINGS[script]
    flags = [
        os.path.join(fixtures, f[1:]) if f.startswith("@") else f.replace("OUT", out)
        for f in without_idle(script, f"{base} {settings[name]}".split())
    ]
    return script, [*flags, "--output_dir", out]


def without_idle(script, words):
    """The words less the flags that nothing reads beside the others, which a script refuses."""
    last = dict(pair for pair in zip(words, words[1:]) if pair[0].startswith("--"))
    objective, idle = last.get("--objective", ""), []
    if script == "linvideo" and objective not in ("adm_critic", "dmd"):
        idle += ["--learning_rate_fake", "--fake_update_ratio"]
    if objective != "adm_critic":
        idle += ["--critic_steps"]
    if not objective.startswith("adm") or last.get("--state") != "part":
        idle += ["--part"]
    if last.get("--arm") in ("vm", "cm", "scm"):
        idle += ["--vd_weight", "--vd_loss_weight"]
    if last.get("--arm") != "scm":
        idle += ["--tangent_warmup"]
    if last.get("--arm") == "vd":
        idle += ["--vm_weight", "--guidance_vm"]
    if last.get("--derivative") == "jvp":
        idle += ["--dt"]
    if script == "dmd" and last["--student_steps"] == "1":
        idle += ["--renoise"]
    if last.get("--phases") == "1":
        idle += ["--target", "--expert_init"]
    if last.get("--data") == "ring":
        idle += "--network --patch_size --width --depth --cond_dim --t_scale".split()
    if "--student_times" in last:
        idle += ["--student_steps"]
    if last.get("--optimizer") == "adamw":
        idle += ["--learning_rate_muon"]
    return [w for before, w in zip(["", *words], words) if not {before, w} & {*idle}]


# ---- fixtures ----------------------------------------------------------------------------------


def find(name, *modules):
    """The class of that name, in the first of these modules that exists."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError:
            pass
    raise ImportError(f"{name} is in none of {', '.join(modules)}")


def make_fixtures(folder, tree):
    """Tiny teachers, prompts and data files, from the networks and tests/helpers.py of a tree."""
    sys.path[:0] = [os.path.abspath(tree), os.path.join(os.path.abspath(tree), "tests")]
    import helpers
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    DiT = find("DiT", "models.networks.dit", "models.dit")
    AutoencoderKL = find("AutoencoderKL", "models.networks.autoencoders", "models.vae")
    trellis = "models.networks.trellis", "models.trellis"
    root, g = Path(folder), torch.Generator().manual_seed(1)
    root.mkdir(parents=True)

    def save(net, name):
        """A network in diffusers' layout."""
        (root / name).mkdir()
        config = {"_class_name": type(net).__name__, **net.config}
        (root / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = root / name / "diffusion_pytorch_model.safetensors"
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, str(weights))

    def dit(seed, std, **config):
        torch.manual_seed(seed)
        return helpers.perturbed(DiT(channels=1, dim=32, num_classes=3, **config), seed, std)

    # teachers
    helpers.save_tiny_teacher(root / "dit")
    helpers.save_tiny_vp_teacher(root / "vp")
    save(dit(5, 0.1, size=(4, 4), patch=(2, 2), depth=2), "other")  # for --student_init
    video = dict(size=(3, 4, 4), patch=(1, 2, 2), depth=4)
    save(dit(0, 0.2, **video), "video")
    save(dit(5, 0.2, **video, linear_layers=[1, 2], feature_map="hedgehog"), "linear")
    for name in ("wan", "wan_two", "z_image", "pixart"):
        (root / name).mkdir()
    helpers.save_tiny_wan(root / "wan")
    helpers.save_tiny_wan(root / "wan_two", boundary=0.875)
    helpers.save_tiny_z_image(root / "z_image")
    helpers.save_tiny_pixart(root / "pixart", 512)
    both = dict(
        in_channels=3,
        out_channels=3,
        model_channels=32,
        cond_channels=10,
        num_blocks=3,
        num_heads=2,
        pe_mode="ape",
        qk_rms_norm=True,
    )
    (root / "trellis" / "ckpts").mkdir(parents=True)
    for name, stored_as, class_name, more in (
        (
            "ss_flow",
            "SparseStructureFlowModel",
            "SparseStructureFlowModel",
            dict(resolution=4, patch_size=1),
        ),
        (
            "slat_flow",
            "ElasticSLatFlowModel",
            "SLatFlowModel",
            dict(resolution=8, patch_size=2, io_block_channels=[8]),
        ),
    ):
        path, config = root / "trellis" / "ckpts" / name, {**both, **more}
        net = helpers.fill(find(class_name, *trellis)(**config))
        state = {k: v + 1 if k.endswith("gamma") else v for k, v in net.state_dict().items()}
        half = {k: v.half() if "blocks." in k and "norm" not in k else v for k, v in state.items()}
        path.with_suffix(".json").write_text(json.dumps({"name": stored_as, "args": config}))
        save_file(half, str(path.with_suffix(".safetensors")))
    torch.manual_seed(0)
    save(
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            latent_channels=4,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[8, 8],
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.18215,
        ),
        "vae",
    )

    # data
    def normal(*shape):
        return torch.randn(*shape, generator=g)

    save_file(
        {"x0": normal(10, 1, 4, 4), "cond.label": torch.arange(10) % 3},
        str(root / "data.safetensors"),
    )
    save_file(
        {"x0": normal(12, 1, 8, 8), "cond.label": torch.arange(12) % 3},
        str(root / "latents.safetensors"),
    )
    x0, tokens = normal(6, 3, 4, 4, 4), normal(6, 5, 10)
    for name, stored in (("structure", tokens.half()), ("structure_float", tokens)):
        save_file({"x0": x0, "cond.tokens": stored}, str(root / f"{name}.safetensors"))
    counts, grid = [6, 9, 4, 11, 7, 5], torch.cartesian_prod(*[torch.arange(8)] * 3)
    coords = [grid[torch.randperm(len(grid), generator=g)[:n]] for n in counts]
    save_file(
        {
            "coords": torch.cat(coords).int(),
            "feats": normal(sum(counts), 3),
            "offsets": torch.tensor([0, *counts]).cumsum(0),
            "cond.tokens": tokens,
        },
        str(root / "points.safetensors"),
    )
    rng = np.random.default_rng(0)
    for i in range(16):  # a bright box on a dark ground, left or right, and the map of it
        side, width = ("left", "right")[i % 2], int(rng.integers(5, 9))
        image = np.full((16, 20, 3), rng.integers(0, 90, 3), np.uint8)
        plan, x = np.zeros((16, 20), np.uint8), int(rng.integers(1, 4)) + 8 * (i % 2)
        image[4:12, x : x + width], plan[4:12, x : x + width] = rng.integers(150, 255, 3), 1 + i % 2
        for kind, pixels in (("images", image), ("maps", plan)):
            (root / kind / side).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / kind / side / f"{i:03d}.png")


# ---- one rank of all settings ------------------------------------------------------------------


def tensor_sums(folder):
    """{"FILE NAME": checksum} of all tensors that a run left: student/, newest state, samples."""
    import torch
    from safetensors.torch import load_file

    out = Path(folder)
    files = {str(path.relative_to(out)): path for path in (out / "student").rglob("*.safetensors")}
    if not files:
        raise FileNotFoundError("nothing under student/")
    files["state"] = sorted((out / "state").glob("step-*"))[-1] / "state.safetensors"
    if (out / "samples.safetensors").is_file():
        files["samples"] = out / "samples.safetensors"
    sums = {}
    for name, path in sorted(files.items()):
        for key, v in sorted(load_file(path).items()):
            content = v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            about = f"{v.dtype} {tuple(v.shape)} ".encode()
            sums[f"{name} {key}"] = hashlib.sha256(about + content).hexdigest()[:12]
    return sums


def work(tree, fixtures, folder):
    """One rank: run the settings that FOLDER/settings.json lists, a line of results.R for each."""
    import torch

    sys.path.insert(0, tree)
    torch.set_num_threads(1)
    rank, ranks = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1)))
    settings = json.loads(Path(folder, "settings.json").read_text())
    with open(os.path.join(folder, f"results.{rank}"), "w") as results:
        for i, setting in enumerate(settings):
            out, began, run = os.path.join(folder, f"run{i}"), time.time(), None
            print(f"==== {setting}", flush=True)
            torch.manual_seed(0)  # should anything draw from it, other settings do not matter
            try:
                script, flags = flags_of(setting, fixtures, out)
                run = importlib.import_module(script).main
                run(flags)
                result, alone = tensor_sums(out) if rank == 0 else None, False
            except (Exception, SystemExit) as e:
                traceback.print_exc()
                result = f"{type(e).__name__}: {e}".replace(folder, "WORK")
                alone = run and not isinstance(e, SystemExit)  # wrong flags stop every rank alike
            print(f"==== {time.time() - began:.1f} s", flush=True)
            print(json.dumps([setting, result]), file=results, flush=True)
            if alone and ranks > 1:  # the other ranks may wait for this one
                os._exit(REPORTED)
            if rank == 0:
                shutil.rmtree(out, ignore_errors=True)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # without tearing the process group down, in which a rank may abort


# ---- record and compare ------------------------------------------------------------------------


def run_ranks(tree, fixtures, folder, settings, ranks, log):
    """Run these settings in `ranks` processes until they are done or one ends with an error.
    -> {setting: checksums or error}, of all or of the first few."""
    Path(folder, "settings.json").write_text(json.dumps(settings))
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes, paths = [], [Path(folder, f"results.{rank}") for rank in range(ranks)]
    for rank in range(ranks):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONPATH": "",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if ranks > 1:
            env |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
            }
        command = [sys.executable, os.path.abspath(__file__), "work", tree, fixtures, folder]
        with open(f"{log}-rank{rank}.log", "a") as f:
            processes.append(subprocess.Popen(command, env=env, cwd=folder, stdout=f, stderr=f))
    seen, last = 0, time.time()
    while any(p.poll() is None for p in processes):
        time.sleep(0.1)
        size = paths[0].stat().st_size if paths[0].exists() else 0
        seen, last = (size, time.time()) if size != seen else (seen, last)
        if time.time() - last > QUIET or any(p.poll() for p in processes):
            time.sleep(2)  # another rank may have its own error to report
            for p in processes:
                if p.poll() is None:
                    p.kill()
                    p.wait()
    results = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else []:
            setting, result = json.loads(line)
            if result is not None and not isinstance(results.get(setting), str):
                results[setting] = result
    codes = [p.returncode for p in processes]
    missing = [s for s in settings if s not in results]
    if missing and REPORTED not in codes:
        results[missing[0]] = f"the processes ended with exit codes {codes}"
    return results


def fingerprint(folder):
    """Checksum of all files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def record(tree, file, fixtures, only, ranks):
    """Run everything, write FILE.json."""
    import torch

    if not os.path.isdir(fixtures):
        subprocess.run(
            [sys.executable, os.path.abspath(__file__), "fixtures", fixtures, tree], check=True
        )
    log, began, all_results = os.path.splitext(file)[0], time.time(), {}
    os.makedirs(os.path.dirname(file), exist_ok=True)
    for n in ranks:
        todo, start = setting_names(n, only), time.time()
        for rank in range(n):
            open(f"{log}-ranks{n}-rank{rank}.log", "w").close()
        while todo:
            with tempfile.TemporaryDirectory() as folder:
                results = run_ranks(tree, fixtures, folder, todo, n, f"{log}-ranks{n}")
            all_results |= {f"{name}, {n} rank(s)": result for name, result in results.items()}
            todo = todo[max((todo.index(name) for name in results), default=len(todo)) + 1 :]
        mine = {k: v for k, v in all_results.items() if k.endswith(f", {n} rank(s)")}
        errors = {k: v for k, v in mine.items() if isinstance(v, str)}
        print(
            f"{len(mine)} settings on {n} rank(s), {len(errors)} with errors, "
            f"{time.time() - start:.0f} s"
        )
        for name, error in errors.items():
            print(f"  {name}: {error}")
    about = {
        "tree": tree,
        "fixtures": fingerprint(fixtures),
        "torch": torch.__version__,
        "seconds": round(time.time() - began),
    }
    Path(file).write_text(json.dumps({"about": about, "settings": all_results}, indent=1) + "\n")


def compare(file_a, file_b, only, most):
    """Print what differs, of each setting at most so many tensors. -> whether anything does."""
    a, b = (json.loads(Path(f).read_text()) for f in (file_a, file_b))
    for key in ("fixtures", "torch"):
        if a["about"][key] != b["about"][key]:
            print(f"note: {key} differ: {a['about'][key]} and {b['about'][key]}")
    a, b = ({k: v for k, v in x["settings"].items() if only in k} for x in (a, b))
    equal = errors = 0
    for name in dict.fromkeys([*a, *b]):
        if name not in a or name not in b:
            print(f"{name}: only in {file_a if name in a else file_b}")
        elif a[name] == b[name]:
            equal += 1
            errors += isinstance(a[name], str)
        elif isinstance(a[name], str) or isinstance(b[name], str):
            print(f"{name}:")
            for file, x in ((file_a, a[name]), (file_b, b[name])):
                print(f"    {file}: {x if isinstance(x, str) else f'{len(x)} tensors'}")
        else:
            tensors = sorted(a[name].keys() | b[name].keys())
            differ = [t for t in tensors if a[name].get(t) != b[name].get(t)]
            print(f"{name}: {len(differ)} of {len(tensors)} tensors")
            for t in differ[:most]:
                where = (
                    ""
                    if t in a[name] and t in b[name]
                    else ": only in " + (file_a if t in a[name] else file_b)
                )
                print(f"    {t}{where}")
            if len(differ) > most:
                print(f"    and {len(differ) - most} more")
    total = len(a.keys() | b.keys())
    print(f"{equal} of {total} settings equal" + (f", {errors} of them errors" if errors else ""))
    return equal < total or not total


def main():
    p = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    c = commands.add_parser("record", help="run the settings of a source tree, write checksums")
    c.add_argument("tree", metavar="TREE")
    c.add_argument("file", metavar="FILE.json")
    c.add_argument("--fixtures", default=None, metavar="FOLDER", help="default: FILE-fixtures")
    c.add_argument("--only", default="", metavar="SUBSTRING")
    c.add_argument("--ranks", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    c = commands.add_parser("compare", help="compare two recorded files")
    c.add_argument("file_a", metavar="FILE_A.json")
    c.add_argument("file_b", metavar="FILE_B.json")
    c.add_argument("--only", default="", metavar="SUBSTRING")
    c.add_argument("--names", type=int, default=10, metavar="N", help="of a setting, at most")
    c = commands.add_parser("fixtures", help="make the folder of tiny teachers and data files")
    c.add_argument("folder", metavar="FOLDER")
    c.add_argument("tree", metavar="TREE")
    c = commands.add_parser("work", help="one rank of a record; used by it")
    for name in ("tree", "fixtures", "folder"):
        c.add_argument(name)
    args = p.parse_args()
    if args.command == "record":
        fixtures = args.fixtures or os.path.splitext(args.file)[0] + "-fixtures"
        paths = [os.path.abspath(x) for x in (args.tree, args.file, fixtures)]
        record(*paths, args.only, args.ranks)
    elif args.command == "compare":
        sys.exit(int(compare(args.file_a, args.file_b, args.only, args.names)))
    elif args.command == "fixtures":
        make_fixtures(args.folder, args.tree)
    else:
        work(args.tree, args.fixtures, args.folder)


if __name__ == "__main__":
    main()
