r"""Turn the official weights of a DiT, SiT or LFM into a folder that --teacher takes.

    python -m models.convert --input DiT-XL-2-256x256.safetensors --output DiT-XL-2
    python -m models.convert --input SiT-XL-2-256.safetensors --output SiT-XL-2 \
        --prediction flow_v --noise_at 0
    python -m models.convert --input LFM-B-2.safetensors --output LFM-B-2 \
        --prediction flow_v --noise_at 1

The folder has diffusers' layout: transformer/, scheduler/ and model_index.json. The official names
and the clocks of the three are in models/networks/dit_imagenet.py.
"""

import os

import torch

from models.files import UserError, load_tensors, save_json
from models.networks import network_config, save_network
from models.networks.dit_imagenet import DiTTransformer2DModel, from_official, official_config
from models.plumbing.flags import Parser, number
from models.plumbing.run import run_main

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


def read_official(args):
    """The official state dict in --input -> network of ours. Raises UserError."""
    state, convention = load_tensors(args.input), CONVENTIONS[args.noise_at]
    try:
        config = official_config(state, convention, args.sample_size, args.num_attention_heads)
        with torch.device("meta"):
            net = DiTTransformer2DModel(**config)
        net.load_state_dict(from_official(state), assign=True)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--input {args.input}: {error}") from None
    return net


def save_pipeline(net, folder):
    """Write transformer/, scheduler/ and model_index.json of a network into a new folder."""
    scheduler, index = DDIM, {"_class_name": "DiTPipeline"}
    if net.prediction == "flow_v":
        scheduler, index = FLOW, {}  # diffusers has no pipeline for velocities of classes
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    index["transformer"] = ["diffusers", type(net).__name__]
    save_network(net, network_config(net), os.path.join(folder, "transformer"))
    os.makedirs(os.path.join(folder, "scheduler"))
    save_json(scheduler, os.path.join(folder, "scheduler", "scheduler_config.json"))
    save_json(index, os.path.join(folder, "model_index.json"))


def main(argv=None):
    p = Parser(prog="python -m models.convert", description=__doc__.partition("\n")[0])
    p.add_argument(
        "--input",
        required=True,
        help="safetensors file of the official state dict, of the EMA where there is a choice",
    )
    p.add_argument(
        "--output", required=True, help="new folder: transformer/, scheduler/, model_index.json"
    )
    p.add_argument(
        "--prediction",
        choices=["eps", "flow_v"],
        default="eps",
        help="eps: DiT; flow_v: a velocity, SiT or LFM",
    )
    p.add_argument(
        "--noise_at",
        type=int,
        choices=[0, 1],
        help="with flow_v, the checkpoint's time of pure noise: 0 (SiT) or 1 (LFM)",
    )
    p.add_argument(
        "--sample_size",
        type=number(int, 1),
        help="side of the latent, needed where the file has no pos_embed",
    )
    p.add_argument(
        "--num_attention_heads",
        type=number(int, 1),
        help="needed for widths other than those of S, B, L and XL",
    )
    args = p.parse_args(argv)
    if (args.prediction == "flow_v") != (args.noise_at is not None):
        raise UserError(
            "--prediction flow_v goes with --noise_at 0 (SiT) or 1 (LFM), and only with it: "
            "velocity models do not agree on which end of their time is noise"
        )
    if os.path.exists(args.output):
        raise UserError(f"--output {args.output} exists: name a new folder")
    net = read_official(args)
    try:
        save_pipeline(net, args.output)
    except OSError as error:
        raise UserError(
            f"cannot write --output {args.output}: {error}; name a new folder"
        ) from None
    count = sum(parameter.numel() for parameter in net.parameters())
    print(
        f"{args.output}: {count:,} parameters, {net.num_classes} classes, latents "
        f"{net.latent_shape}, predicts {net.prediction}, convention {net.convention}"
    )


if __name__ == "__main__":
    run_main(main)
