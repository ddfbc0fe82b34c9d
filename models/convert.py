r"""Turn official weights of DiT, SiT, LFM, ADM and EDM into a folder for --teacher, and back.

    python -m models.convert --input DiT-XL-2-256x256.safetensors --output DiT-XL-2
    python -m models.convert --input SiT-XL-2-256.safetensors --output SiT-XL-2 \
        --prediction flow_v --noise_at 0
    python -m models.convert --input LFM-B-2.safetensors --output LFM-B-2 \
        --prediction flow_v --noise_at 1
    python -m models.convert --input celeba_f8_adm.safetensors --output LFM-CelebA \
        --prediction flow_v --noise_at 1 --sample_size 32
    python -m models.convert --input edm-imagenet-64.safetensors --output EDM-64 --prediction edm
    python -m models.convert --export runs/latent_fm-FOLDER --output official.safetensors

The folder has diffusers' layout: transformer/, scheduler/ and model_index.json. Beside them is
sampler.json, by which latent_fm.py --sample draws from it; --init trains on. The official names and
the clocks are in models/networks/dit_imagenet.py and adm.py. A pickle (.pth, .pt) is never read:
who trusts its source makes it a safetensors file by two lines in an environment of their own,

    import torch; from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in torch.load("model.pth").items()}, "lfm.safetensors")
"""

import os
import shutil

import torch

from models.diffusion import VP, step_grid
from models.files import UserError, load_tensors, save_json, save_tensors, temporary
from models.networks import load_network, network_config, save_network
from models.networks.adm import (
    UNetModel,
    adm_config,
    edm_config,
    from_adm,
    from_edm,
    to_adm,
    to_edm,
)
from models.networks.dit_imagenet import (
    DiTTransformer2DModel,
    from_official,
    official_config,
    to_official,
)
from models.plumbing.flags import Parser, number
from models.plumbing.run import run_main, writing
from models.plumbing.teachers import describe_schedule, network_folder

CONVENTIONS = {None: "dit", 0: "sit", 1: "lfm"}  # by --noise_at
DDIM = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "clip_sample": False,
    "prediction_type": "epsilon",
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
# How the released samples are made; guidance is 1 for networks without classes. In our own time.
SAMPLES = {
    "dit": dict(rule="heun", steps=50, guidance_scale=1.5),  # DDPM in 250 steps there
    "sit": dict(rule="dopri5", steps=50, guidance_scale=1.5),
    "lfm": dict(rule="dopri5", steps=50, guidance_scale=1.5),
    "adm": dict(rule="heun", steps=50, guidance_scale=1.0),  # never trained without its label
    "edm": dict(rule="heun", steps=40, guidance_scale=1.0),
}


def read_official(args):
    """The official state dict in --input -> network of ours. Raises UserError."""
    state, heads = load_tensors(args.input), args.num_attention_heads
    convention = "edm" if args.prediction == "edm" else CONVENTIONS[args.noise_at]
    names = {key.removeprefix("module.").removeprefix("model.") for key in state}
    is_edm = any(name.startswith("enc.") for name in names)
    is_adm = any(name.startswith("input_blocks.") for name in names)
    shown = {"sample_size": is_edm or "pos_embed" in names, "num_attention_heads": is_edm}
    for flag, idle in {**shown, "new_attention_order": not is_adm}.items():
        if getattr(args, flag) and idle:
            raise UserError(f"--{flag}: the weights of {args.input} leave no choice: leave it out")
    try:
        if convention == "edm" and not is_edm:
            raise ValueError("--prediction edm is for EDM's DhariwalUNet: name its weights")
        if is_edm or is_adm:
            convention = "adm" if convention == "dit" else convention
            if is_edm and convention == "adm":
                raise ValueError(
                    "--prediction eps is not what a DhariwalUNet has: give --prediction edm, or "
                    "for LFM's --prediction flow_v --noise_at 1"
                )
            if convention == "sit":
                raise ValueError("--noise_at 0 is for SiT, and this is ADM's U-Net: give 1")
            if is_edm:
                config = edm_config(state, convention)
                kind, weights = UNetModel, from_edm(state, config)
            else:
                config = adm_config(state, convention, args.sample_size, heads)
                config["use_new_attention_order"] = args.new_attention_order
                kind, weights = UNetModel, from_adm(state)
        else:
            config = official_config(state, convention, args.sample_size, heads)
            kind, weights = DiTTransformer2DModel, from_official(state)
        with torch.device("meta"):
            net = kind(**config)
        if net.context_channels not in (0, net.latent_shape[0] + 1):
            raise ValueError(
                f"it sees {net.context_channels} channels beside a sample of "
                f"{net.latent_shape[0]}: only LFM's inpainting is known, with one more than that"
            )
        net.load_state_dict(weights, assign=True)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--input {args.input}: {' '.join(str(error).split())}") from None
    return net


def cosine_betas(n=1000):
    """guided-diffusion's --noise_schedule cosine (2102.09672, Eq. 17), up to .999.  -> n floats."""
    t = torch.arange(n + 1, dtype=torch.float64) / n
    abar = ((t + 0.008) / 1.008 * torch.pi / 2).cos() ** 2
    return (1 - abar[1:] / abar[:-1]).clamp_max(0.999).tolist()


def schedule_of(net, args):
    """-> the schedule that a network was trained with, and its scheduler_config.json.

    Raises UserError for a --noise_schedule of a network that has no choice.
    """
    name, is_adm = args.noise_schedule, getattr(net, "convention", None) == "adm"
    if name and not is_adm:
        raise UserError(
            f"--noise_schedule {name}: ADM's networks of noise have a choice, others have none: "
            "leave it out"
        )
    if is_adm and (name or ("cosine" if args.new_attention_order else "linear")) == "cosine":
        betas = cosine_betas()
        return VP(betas), {**DDIM, "trained_betas": betas}
    return net.default_schedule, FLOW if net.prediction == "flow_v" else DDIM


def sampler_of(net, schedule):
    """sampler.json of a converted network, as a run of latent_fm.py would have left it."""
    how, classes = SAMPLES[net.convention], net.num_classes
    scale = how["guidance_scale"]
    if net.convention == "lfm" and isinstance(net, UNetModel):  # its ADM, by test_args
        scale = 1.25
    return {
        "method": "latent_fm",
        "prediction": net.prediction,
        "schedule": describe_schedule(schedule),
        "times": step_grid(how["steps"])[:-1],
        "timestep_shift": 1.0,
        "rule": how["rule"],
        "guidance_scale": scale if classes else 1.0,
        "task": "inpaint" if net.context_channels else "class" if classes else "uncond",
        "crop": "adm",
    }


def save_pipeline(net, schedule, scheduler, folder):
    """Write transformer/, scheduler/, sampler.json and model_index.json into a new folder, which is
    there when all of it is.

    schedule, scheduler: of `schedule_of`.
    """
    index = {"_class_name": "DiTPipeline"}
    if net.prediction == "flow_v" or isinstance(net, UNetModel):
        index = {}  # diffusers has no pipeline for velocities of classes, nor for ADM
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    index["transformer"] = ["diffusers", type(net).__name__]
    tmp = temporary(os.path.normpath(folder))
    try:
        save_network(net, network_config(net), os.path.join(tmp, "transformer"))
        save_json(sampler_of(net, schedule), os.path.join(tmp, "sampler.json"))
        os.makedirs(os.path.join(tmp, "scheduler"))
        save_json(scheduler, os.path.join(tmp, "scheduler", "scheduler_config.json"))
        save_json(index, os.path.join(tmp, "model_index.json"))
        os.rename(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def export(args):
    """--export FOLDER: write the network in it under its official names. Raises UserError."""
    net, _ = load_network(network_folder(args.export))
    where = f"--export {args.export}"
    layouts = {DiTTransformer2DModel: ["dit"], UNetModel: ["adm", "edm"]}.get(type(net))
    if layouts is None:
        raise UserError(
            f"{where} is a {type(net).__name__}: only DiTTransformer2DModel and UNetModel have "
            "official names of another kind"
        )
    layout = args.layout or layouts[0]
    if layout not in layouts:
        raise UserError(
            f"--layout {layout}: a {type(net).__name__} has {' or '.join(layouts)}: give that"
        )
    try:
        state = {"dit": to_official, "adm": to_adm, "edm": to_edm}[layout](net)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    save_tensors({key: value.contiguous() for key, value in state.items()}, args.output)
    print(f"{args.output}: {len(state)} tensors with the official names of {layout}")


# fmt: off
def parse_args(argv):
    p = Parser(prog="python -m models.convert", description=(__doc__ or "").partition("\n")[0])
    add = p.add_argument
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", help="safetensors file of the official state dict, of the EMA "
        "where there is a choice")
    source.add_argument("--export", metavar="FOLDER", help="the other way: a run of latent_fm.py, "
        "a student or a converted folder")
    add("--output", required=True, help="new folder: transformer/, scheduler/, model_index.json; "
        "with --export a safetensors file")
    add("--prediction", choices=["eps", "flow_v", "edm"], default="eps",
        help="eps: DiT, ADM; flow_v: a velocity, SiT or LFM; edm: EDM's preconditioning")
    add("--noise_at", type=int, choices=[0, 1],
        help="with flow_v, the checkpoint's time of pure noise: 0 (SiT) or 1 (LFM)")
    add("--sample_size", type=number(int, 1), help="side of the latent (of ADM, of the image), "
        "needed where the file does not show it, as ADM's and those without pos_embed")
    add("--num_attention_heads", type=number(int, 1), help="needed for widths other than those of "
        "S, B, L and XL; of ADM, if left out, 4 with flow_v (LFM) and at 128 x 128, else 64 "
        "channels each")
    add("--new_attention_order", action="store_true", help="of ADM: its "
        "use_new_attention_order, as of its ImageNet model at 64 x 64")
    add("--noise_schedule", choices=["linear", "cosine"], help="of ADM with eps; if left out, "
        "cosine with --new_attention_order, as that model has it, else linear")
    add("--layout", choices=["dit", "adm", "edm"], help="with --export, of a U-Net: "
        "guided-diffusion's names (adm, the default) or EDM's")
    return p.parse_args(argv)
# fmt: on


def main(argv=None):
    args = parse_args(argv)
    if os.path.exists(args.output):
        what = "file" if args.export else "folder"
        raise UserError(f"--output {args.output} exists: name a new {what}")
    if args.layout and not args.export:
        raise UserError("--layout has an effect only with --export: leave it out")
    described = "noise_at sample_size num_attention_heads new_attention_order noise_schedule"
    for flag in described.split():
        given = getattr(args, flag)
        if args.export and given is not None and given is not False:
            raise UserError(f"--{flag} describes the file of --input: leave it out with --export")
    if (args.prediction == "flow_v") != (args.noise_at is not None):
        raise UserError(
            "--prediction flow_v goes with --noise_at 0 (SiT) or 1 (LFM), and only with it: "
            "velocity models do not agree on which end of their time is noise"
        )
    with writing(args.output, f"name a new {'file' if args.export else 'folder'}"):
        os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
        if args.export:
            return export(args)
        net = read_official(args)
        save_pipeline(net, *schedule_of(net, args), args.output)
    count = sum(parameter.numel() for parameter in net.parameters())
    print(
        f"{args.output}: {count:,} parameters, {net.num_classes} classes, latents "
        f"{net.latent_shape}, predicts {net.prediction}, convention {net.convention}"
    )


if __name__ == "__main__":
    run_main(main, "give the command again")
