"""Teachers, the networks that start from them, and how a saved student is described.

--teacher is a world's name, a component folder, a pipeline root with model_index.json, a run folder
of ours or DIR/NAME in TRELLIS's layout. Prediction, betas and shift come from the folder's
scheduler/, else from sampler.json (ours), else from the network's class.
"""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch

from models.diffusion import PREDICTIONS, VP, Diffusion, Flow
from models.files import UserError, load_json
from models.networks import load_network, load_two_networks, lora, network_config, trellis_path
from models.worlds import WORLDS, load_world
from models.worlds.ring import fit_ring_network


@dataclass
class Teacher:
    """A frozen teacher, and what its samples are.

    net           called as net(x_t, t, **cond)
    base          the network that student and fake are copies of, or adapters on: net, except for a
                  closed-form teacher, which has no weights; there a network fitted to it
    config        of the network, as it goes into a student's folder; config_2: of the second
    network, if any
    folder        where the weights are, None for a closed form; of two networks the root
    schedule, prediction, shift       how it was trained
    world_name    the embedded world that its samples belong to, or None; label: a short name
    shape         of one sample
    conditions    where cond comes from (models/plumbing/data.py)
    """

    net: Any
    config: dict | None
    folder: str | None
    schedule: Any
    prediction: str
    shift: float
    world_name: str | None
    label: str
    config_2: dict | None = None
    base: Any = None
    shape: tuple = ()
    conditions: Any = None

    @property
    def diffusion(self):
        return Diffusion(self.schedule, self.prediction)

    @property
    def world(self):
        """The embedded world itself, or None."""
        return load_world(self.world_name) if self.world_name in WORLDS else None


# ---- finding and loading -------------------------------------------------------------------------


def student_folder(folder):
    """A run folder of ours -> its student/; any other folder -> itself."""
    inside = os.path.join(folder, "student")
    return inside if os.path.isdir(inside) else folder


def network_folder(folder):
    """The component that a --teacher folder stands for.

    A pipeline root's transformer/, a run's student/, or the folder itself.
    """
    if os.path.isfile(os.path.join(folder, "model_index.json")):
        return os.path.join(folder, "transformer")
    return student_folder(folder)


def is_small(name):
    """Whether --teacher is a world or one of our own small networks: they share default flags."""
    config = os.path.join(network_folder(name), "config.json")
    ours = os.path.isfile(config) and load_json(config).get("_class_name") in ("DiT", "RingMLP")
    return name in WORLDS or ours


def read_scheduler(folder):
    """A diffusers scheduler/ folder -> (schedule, prediction, shift or None); raises UserError."""
    c = load_json(os.path.join(folder, "scheduler_config.json"))
    is_flow = "FlowMatch" in c.get("_class_name", "") or c.get("use_flow_sigmas")
    if is_flow or c.get("prediction_type") == "flow_prediction":
        return Flow(), "flow_v", float(c.get("shift") or c.get("flow_shift") or 1.0)
    kinds = {"epsilon": "eps", "v_prediction": "vp_v", "sample": "x0"}
    prediction = kinds.get(c.get("prediction_type", "epsilon"))
    betas = c.get("beta_schedule")
    if prediction is None or betas not in ("linear", "scaled_linear"):
        raise UserError(
            f"{folder}: prediction_type {c.get('prediction_type')!r} with beta_schedule {betas!r} "
            "is not supported (linear or scaled_linear; epsilon, v_prediction or sample; or a "
            "flow scheduler)"
        )
    if not {"beta_start", "beta_end"} <= set(c):
        raise UserError(
            f"{folder}: scheduler_config.json lacks beta_start or beta_end: restore it from the "
            "source of the checkpoint"
        )
    zero_snr = bool(c.get("rescale_betas_zero_snr"))
    if zero_snr and prediction == "eps":
        raise UserError(
            f"{folder}: an eps network says nothing about x0 at zero terminal SNR: "
            "use v_prediction or sample"
        )
    n = c.get("num_train_timesteps", 1000)
    return VP(betas, c["beta_start"], c["beta_end"], n, zero_snr), prediction, None


def find_folder(name):
    """--teacher that is no closed form -> its folder. Raises UserError."""
    if name in WORLDS:
        return load_world(name).teacher_folder()
    folder = name.rstrip("/")
    if not os.path.isdir(folder) and not trellis_path(folder):
        worlds = ", ".join(WORLDS)
        raise UserError(f"--teacher {name}: neither an embedded world ({worlds}) nor a folder")
    if os.path.isdir(folder) and not os.listdir(folder):
        raise UserError(f"--teacher {name}: the folder is empty")
    return folder


def load_teacher(name, dtype=torch.float32, two_networks=False):
    """Resolve --teacher -> Teacher, without base, shape and conditions. Raises UserError.

    two_networks: whether a root with transformer_2/ is accepted (its net is a WanTwoNetworks) or
    refused.
    """
    if name == "ring":  # a closed form, no checkpoint
        net = load_world(name).teacher()
        return Teacher(net, None, None, Flow(), net.prediction, net.default_shift, name, name)
    root, config_2 = find_folder(name), None
    is_root = os.path.isfile(os.path.join(root, "model_index.json"))
    two = is_root and os.path.isdir(os.path.join(root, "transformer_2"))
    if two and not two_networks:
        raise UserError(
            f"{root} is a two-network teacher (transformer_2/): give one of its component folders"
        )
    folder = network_folder(root)
    if two:
        net, config, config_2 = load_two_networks(root, dtype)
    else:
        net, config = load_network(folder, dtype)
    if not hasattr(net, "prediction"):
        raise UserError(
            f"{folder} is a {type(net).__name__}, which does not denoise: "
            "give a diffusion or flow network"
        )
    schedule, prediction, shift = how_it_was_trained(net, root, folder)
    label = name if name in WORLDS else os.path.basename(os.path.abspath(root))
    where = root if two else folder
    world_name = config.get("world")
    return Teacher(net, config, where, schedule, prediction, shift, world_name, label, config_2)


def how_it_was_trained(net, root, folder):
    """-> schedule, prediction, shift: from scheduler/, or sampler.json, or the network's class."""
    beside = os.path.dirname(os.path.abspath(folder))
    for where in (os.path.join(root, "scheduler"), os.path.join(beside, "scheduler")):
        if os.path.isfile(os.path.join(where, "scheduler_config.json")):
            schedule, prediction, shift = read_scheduler(where)
            return schedule, prediction, shift or net.default_shift
    if os.path.isfile(os.path.join(folder, "sampler.json")):
        return read_sampler(folder)[1:]
    return getattr(net, "default_schedule", Flow()), net.prediction, net.default_shift


# ---- starting from a teacher ---------------------------------------------------------------------


def start_teacher(args, two_networks=False):
    """--teacher, with --timestep_shift and --sample_shape if given -> Teacher, without conditions.

    Make copies of its base before `freeze_teacher`. Raises UserError.
    """
    teacher = load_teacher(args.teacher, two_networks=two_networks)
    teacher.base = teacher.net
    if not teacher.config:
        teacher.base = fit_ring_network(teacher.net, args.seed)
        teacher.config = network_config(teacher.base)
    if args.timestep_shift is not None:
        teacher.shift = args.timestep_shift
    teacher.shape = tuple(args.sample_shape or teacher.base.latent_shape)
    return teacher


def freeze_teacher(args, teacher, device):
    """Nothing of the teacher is trained; with --mixed_precision bf16 its weights are bfloat16 on a
    GPU."""
    if args.mixed_precision == "bf16" and device.type == "cuda":
        for p in teacher.net.parameters():  # before the move; buffers (rotary angles) stay float32
            p.data = p.data.bfloat16()
    for net in (teacher.net, teacher.base):
        net.to(device).requires_grad_(False).eval()


def starting_network(args, teacher):
    """What the student is a copy of: --student_init's network, or the teacher's. Raises UserError.

    --student_init may be any network of the teacher's architecture, also one with linear attention.
    """
    if not args.student_init:
        return teacher.base
    net, _ = load_network(student_folder(args.student_init))
    shapes = [
        {k: v.shape for k, v in lora.base_state_dict(n).items() if ".attend." not in k}
        for n in (net, teacher.base)
    ]  # without the weights of linear attention, which a teacher does not have
    if type(net) is not type(teacher.base) or shapes[0] != shapes[1]:
        raise UserError(
            f"--student_init {args.student_init}: this {type(net).__name__} does not have the "
            f"shapes of the teacher's {type(teacher.base).__name__}; student and fake are copies "
            "of the teacher's network"
        )
    return net


def trainable_copy(args, net, device, step_input=False):
    """A copy of net that is trained. step_input: it also takes `steps` (see with_step_input)."""
    new = with_step_input(net) if step_input else copy.deepcopy(net)
    new.to(device).requires_grad_(True).train()
    new.gradient_checkpointing = args.gradient_checkpointing
    return new


def with_step_input(net):
    """A copy of net that also takes `steps` (B,), through a new layer that is zero at first.

    So at first it is the same function as net.
    """
    new = type(net)(**{**net.config, "steps_cond": True}).to(next(net.parameters()).device)
    new.load_state_dict(net.state_dict(), strict=False)
    return new


# ---- sampler.json: how a saved student samples ---------------------------------------------------


def describe_schedule(schedule):
    """A schedule as JSON, for sampler.json."""
    if isinstance(schedule, Flow):
        return {"type": "flow"}
    table = {"betas": schedule.name, "n": schedule.n, "zero_snr": schedule.zero_snr}
    ends = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    return {"type": "vp", **table, **ends}


def read_schedule(s):
    """Inverse of describe_schedule."""
    if s["type"] == "flow":
        return Flow()
    return VP(s["betas"], s["beta_start"], s["beta_end"], s["n"], s["zero_snr"])


def read_sampler(folder):
    """sampler.json of a student folder -> (dict, schedule, prediction, shift); raises UserError."""
    path = os.path.join(folder, "sampler.json")
    s = load_json(path)
    try:
        schedule = read_schedule(s["schedule"])
        if s["prediction"] not in PREDICTIONS:
            raise ValueError(f"prediction {s['prediction']!r}")
        times = [float(t) for t in s["times"]]
        descend = all(a > b for a, b in zip(times, times[1:]))
        if not times or not descend or not (0 < times[-1] and times[0] <= 1):
            raise ValueError(f"times {times} do not descend within (0, 1]")
        return s, schedule, s["prediction"], float(s["timestep_shift"])
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{path} is not a sampler description of ours ({type(e).__name__}: {e})"
        ) from None


def read_own_sampler(sample, method):
    """--sample: a run or student folder -> its student folder and what read_sampler gives.

    Raises UserError, also for a student that another script made.
    """
    folder = student_folder(sample)
    sampler, *rest = read_sampler(folder)
    if sampler["method"] != method:
        maker = sampler["method"]
        raise UserError(f"{sample} was made by {maker}: sample it with python {maker}.py --sample")
    return folder, sampler, *rest
