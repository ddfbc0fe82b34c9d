"""Teachers, the networks that start from them, and how a saved student is described.

--teacher is a world's name, a component folder, a pipeline root with model_index.json, a run folder
of ours or DIR/NAME in TRELLIS's layout. Prediction, betas and shift come from sampler.json (ours),
else from the folder's scheduler/, else from the network's class.
"""

import copy
import hashlib
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.diffusion import PREDICTIONS, VP, Diffusion, Flow, step_grid
from models.draws import stable_hash
from models.files import UserError, fingerprint, load_json, path_inside
from models.networks import (
    is_stored_in_bf16,
    load_network,
    load_two_networks,
    lora,
    network_config,
    on_cpu,
    to_dtype,
    trellis_path,
    weight_files,
    weights_hash,
)
from models.plumbing.schedulers import (
    MOST_STEPS,
    PREDICTION_TYPES,
    check_schedule,
    is_number,
    read_scheduler,
    read_spacing,
)
from models.shards import whole_tensor
from models.worlds import WORLDS, load_world
from models.worlds.ring import fit_ring_network, fit_ring_transformer


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
    terminal      the time before 0 where its own many-step grid ends, or None (`step_grid`)
    spacing       how its scheduler lays that grid (models/plumbing/schedulers.py), None: evenly
    over          how its guidance is rescaled, or None (models/diffusion.py)
    world_name    the embedded world that its samples belong to, or None; label: a short name
    shape         of one sample
    conditions    where cond comes from (models/plumbing/data.py)
    real          batches of real samples for a GAN, or None (`real_batches`)
    loras         LoRA files that were merged into the weights
    stored_in_bf16   whether its files are in bfloat16
    files         a short hash of the files of weights and adapters, None for a world
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
    real: Any = None
    loras: tuple = ()
    stored_in_bf16: bool = False
    files: str | None = None
    terminal: float | None = None
    spacing: Any = None
    over: str | None = None

    @property
    def diffusion(self):
        return Diffusion(self.schedule, self.prediction, self.over)

    def grid(self, steps):
        """The times of its own samples in so many steps; those of a student are `step_grid`."""
        raw = self.spacing and self.spacing.times(steps)
        return step_grid(steps, self.shift, self.terminal, raw)

    @property
    def world(self):
        """The embedded world itself, or None."""
        return load_world(self.world_name) if self.world_name in WORLDS else None

    def fingerprint(self):
        """Short hash of the weights, the LoRA files among them: the key of what is measured."""
        if self.folder is None:  # fitted in this run
            own = lora.base_state_dict(self.net)
            values = [whole_tensor(v).cpu().numpy() for v in own.values()]
            values = [v.tobytes() for v in values]
            return hashlib.sha256(b"".join(values)).hexdigest()[:16]
        own = weights_hash(self.folder)
        if not self.loras:
            return own
        digest = hashlib.sha256(own.encode())
        for path in self.loras:
            with open(path, "rb") as f:
                while chunk := f.read(1 << 24):
                    digest.update(chunk)
        return digest.hexdigest()[:16]


# ---- finding and loading -------------------------------------------------------------------------


def teacher_fingerprint(name):
    """Short hashes of the files of --teacher that is no world: weights; and what describes them.

    They read a part of large files only (`files.fingerprint`). Raises UserError.
    """
    root = find_folder(name)
    folder, two = network_folder(root), os.path.join(root, "transformer_2")
    weights, described = [], [os.path.join(root, "model_index.json")]
    for part in (folder, *([two] if os.path.isdir(two) else [])):
        weights += sorted(weight_files(part))
        path = trellis_path(part)
        described.append(path + ".json" if path else os.path.join(part, "config.json"))
        described.append(os.path.join(part, "sampler.json"))
    described.append(os.path.join(scheduler_folder(root, folder) or root, "scheduler_config.json"))
    found = ([path for path in paths if os.path.isfile(path)] for paths in (weights, described))
    return tuple(map(fingerprint, found))


def student_folder(folder):
    """A run folder of ours -> its student/; any other folder -> itself."""
    inside = os.path.join(folder, "student")
    return inside if os.path.isdir(inside) else folder


def network_folder(folder):
    """The component that a --teacher folder stands for.

    A pipeline root's transformer/ or unet/, a run's student/, or the folder itself.
    """
    if os.path.isfile(os.path.join(folder, "model_index.json")):
        names = [n for n in ("transformer", "unet") if os.path.isdir(os.path.join(folder, n))]
        return os.path.join(folder, (names or ["transformer"])[0])
    return student_folder(folder)


def is_small(name):
    """Whether --teacher is a world or one of our own small networks: they share default flags."""
    folder = network_folder(name)
    config, sampler = (os.path.join(folder, f"{what}.json") for what in ("config", "sampler"))
    if name not in WORLDS and not os.path.isfile(config) and os.path.isfile(sampler):
        base = load_json(sampler).get("base", "")  # of a student that is adapters
        return is_small(base) if base in WORLDS or os.path.isdir(base) else False
    kind = load_json(config).get("_class_name") if os.path.isfile(config) else None
    return name in WORLDS or kind in ("DiT", "RingDiT", "RingMLP")


# Networks whose pipelines let a shift depend on the number of the image's patches.
COUNTS_PATCHES = ("QwenImageTransformer2DModel", "ZImageTransformer2DModel")


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


def load_teacher(
    name, dtype=torch.float32, two_networks=False, place=on_cpu, shape=None, weights=True
):
    """Resolve --teacher -> Teacher, without base, shape and conditions. Raises UserError.

    two_networks: whether a root with transformer_2/ is accepted (its net is a WanTwoNetworks) or
    refused. place, weights: see `load_network`. shape: of a sample, on which the shift may depend;
    None: the network's own.
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
        net, config, config_2 = load_two_networks(root, dtype, place, weights)
    else:
        net, config = load_network(folder, dtype, place, weights)
    if not hasattr(net, "prediction"):
        raise UserError(
            f"{folder} is a {type(net).__name__}, which does not denoise: "
            "give a diffusion or flow network"
        )
    schedule, prediction, shift, terminal, spacing = how_it_was_trained(net, root, folder, shape)
    set_clock(net, schedule)
    label = name if name in WORLDS else os.path.basename(os.path.abspath(root))
    where = root if two else folder
    world_name = config.get("world")
    teacher = Teacher(net, config, where, schedule, prediction, shift, world_name, label, config_2)
    teacher.terminal = terminal
    teacher.spacing = spacing
    teacher.stored_in_bf16 = weights and is_stored_in_bf16(folder)
    return teacher


def scheduler_folder(root, folder):
    """The scheduler/ of a pipeline root or beside a component, or None."""
    beside = os.path.dirname(os.path.abspath(folder))
    for where in (os.path.join(root, "scheduler"), os.path.join(beside, "scheduler")):
        if os.path.isfile(os.path.join(where, "scheduler_config.json")):
            return where
    return None


def how_it_was_trained(net, root, folder, shape=None):
    """-> schedule, prediction, shift, terminal, spacing: from sampler.json, or scheduler/, or the
    network's class.

    sampler.json is only in students of ours. Their own scheduler/ is written for other programs.
    shape: of a sample, None: the network's own.
    """
    if os.path.isfile(os.path.join(folder, "sampler.json")):
        return *read_sampler(folder)[1:], None, None
    where = scheduler_folder(root, folder)
    if not where:
        schedule = getattr(net, "default_schedule", Flow())
        return schedule, net.prediction, net.default_shift, None, None
    tokens = None
    if type(net).__name__ in COUNTS_PATCHES:
        tokens = math.prod(size // net.patch_size for size in (shape or net.latent_shape)[1:])
    schedule, prediction, shift = read_scheduler(where, tokens)
    terminal = load_json(os.path.join(where, "scheduler_config.json")).get("shift_terminal")
    return schedule, prediction, shift or net.default_shift, terminal, read_spacing(where)


def set_clock(net, schedule):
    """A clock that is the index of the betas (PixArt's) has as many steps as there are betas.

    Raises UserError for a network whose clock counts another number.
    """
    if isinstance(schedule, VP) and hasattr(net, "clock_steps"):
        net.clock_steps = schedule.n
        return
    counted = getattr(net, "default_schedule", None)
    if isinstance(schedule, VP) and isinstance(counted, VP) and schedule.n != counted.n:
        raise UserError(
            f"num_train_timesteps of the scheduler is {schedule.n}, and a {type(net).__name__} "
            f"counts {counted.n} here: give a checkpoint that was trained with as many"
        )


# ---- starting from a teacher ---------------------------------------------------------------------


def start_teacher(run, two_networks=False, attention=False, in_bf16=True):
    """--teacher, with --timestep_shift and --sample_shape if given -> Teacher, without conditions.

    It is on the run's device, shared out over its ranks. The files of --teacher_lora are merged
    into it. Make copies of its base before `freeze_teacher`, which may round its weights.
    attention: where the teacher is a closed form, a transformer that is fitted to it takes its
    place, for a method that replaces the teacher's attention. in_bf16: as there; where nothing is
    copied its weights are rounded as they are read. Raises UserError.
    """
    args = run.args
    dtype = torch.float32
    if in_bf16 and rounds_teacher(run) and only_adapters(args):
        dtype = torch.bfloat16
    teacher = load_teacher(args.teacher, dtype, two_networks, run.place, args.sample_shape)
    if args.teacher_lora:
        merge_loras(teacher, args.teacher_lora)
    teacher.files = base_fingerprint(args)
    teacher.base = teacher.net
    if not teacher.config and attention:
        teacher.net = teacher.base = run.place(fit_ring_transformer(teacher.net, args.seed))
    elif not teacher.config:
        teacher.base = run.place(fit_ring_network(teacher.net, args.seed))
    return as_flags_say(teacher, args)


def as_flags_say(teacher, args):
    """The Teacher, with --timestep_shift, --sample_shape, --guidance_rescale. Raises UserError."""
    teacher.config = teacher.config or network_config(teacher.base)
    if args.timestep_shift is not None:
        teacher.shift = args.timestep_shift
    teacher.shape = tuple(args.sample_shape or teacher.base.latent_shape)
    teacher.over = rescaling(getattr(args, "guidance_rescale", None), teacher.shape)
    refuse_empty_guidance(teacher, args)
    return teacher


# Flags of guidance, which needs a null label.
GUIDANCE = ("guidance_scale", "guidance_vm", "guidance_vd", "student_guidance")


def keeps_labels(config, sampler):
    """Whether training never dropped a label, so that the null label is a random vector: so say
    latent_fm.py's sampler.json and, of released U-Nets, their convention."""
    return sampler.get("label_dropout") == 0 or config.get("convention") in ("adm", "edm")


def refuse_empty_guidance(teacher, args):
    """Raises UserError for guidance of a teacher that knows no unconditional velocity.

    It has one class, or no null label that means anything (`keeps_labels`).
    """
    given = [f for f in GUIDANCE if getattr(args, f, 1) not in (None, 1)]
    if not given or "label" not in teacher.base.cond_names:
        return
    described = teacher.folder and os.path.join(teacher.folder, "sampler.json")
    sampler = load_json(described) if described and os.path.isfile(described) else {}
    flag, scale = given[0], getattr(args, given[0])
    if not getattr(teacher.base, "num_classes", 1):
        raise UserError(f"--{flag} {scale:g}: the teacher has no classes: give --{flag} 1")
    if keeps_labels(teacher.config, sampler):
        raise UserError(
            f"--{flag} {scale:g}: the teacher was trained with every label, and its null label is "
            f"random: give --{flag} 1"
        )


def rescaling(over, shape):
    """--guidance_rescale -> Teacher.over. Raises UserError for samples that have no such parts."""
    if over in (None, "none"):
        return None
    if len(shape) != 3 or any(size % 2 for size in shape[1:]):
        raise UserError(
            f"--guidance_rescale {over} is for images (C, H, W) of even sides, samples are "
            f"{tuple(shape)}: give --guidance_rescale none"
        )
    return over


def merge_loras(teacher, sources):
    """Add LoRA files to the teacher's weights, one after the other. Raises UserError.

    sources: files, or folders of peft's; for two networks one of each, high noise first.
    """
    nets = [teacher.net] * len(sources)
    if teacher.config is None:
        raise UserError(
            f"--teacher_lora: {teacher.label} is a closed form without weights: leave it out"
        )
    if hasattr(teacher.net, "boundary"):
        nets = [teacher.net.high, teacher.net.low]
    if len(nets) != len(sources):
        raise UserError(
            f"--teacher_lora: {teacher.label} has two networks, for high and for low noise: give "
            f"a file for each, in this order, instead of {len(sources)}"
        )
    for net, source in zip(nets, sources):
        teacher.loras += (merge_lora(net, source, "--teacher_lora"),)


def merge_lora(net, source, flag):
    """Add a LoRA file, or that of a folder of peft's, to net's weights.  -> its absolute path.

    flag: the one that named it, for messages. Raises UserError.
    """
    path = lora.adapter_file(source)
    pickles = (".bin", ".pt", ".pth", ".ckpt")
    pickled = os.path.join(source, "adapter_model.bin")
    if path is None and (os.path.isfile(pickled) or source.endswith(pickles)):
        raise UserError(
            f"{flag} {source} is a pickle; pickles can run code and are never loaded: convert it "
            "to adapter_model.safetensors"
        )
    if path is None:
        raise UserError(f"{flag} {source}: neither a .safetensors file nor a folder of peft's")
    try:
        lora.merge_file(net, path)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None
    return os.path.abspath(path)


def rounds_teacher(run):
    """Whether a frozen teacher is kept in bfloat16."""
    return run.args.mixed_precision == "bf16" and run.device.type != "cpu"


def only_adapters(args):
    """Whether nothing is trained but adapters, so that no copy is made of the teacher's weights."""
    return bool(getattr(args, "lora_rank", 0) and getattr(args, "fake_lora_rank", 1))


def freeze_teacher(run, teacher, in_bf16=True):
    """Nothing of the teacher is trained, but for the adapters that others have on its network.

    With --mixed_precision bf16 its weights are bfloat16 on a GPU, but for those that the
    architecture keeps in float32. in_bf16: False leaves all of them in float32.
    """
    if in_bf16 and rounds_teacher(run):
        to_dtype(teacher.net, torch.bfloat16)
    for net in (teacher.net, teacher.base):
        run.compile_blocks(net.to(run.device).eval())
        for p in lora.base_parameters(net).values():
            p.requires_grad_(False)


def starting_network(run, teacher):
    """What the student starts from, for `trainable`: what --student_init names, or the teacher.

    With --lora_rank it is the teacher's network, and a LoRA file becomes an adapter of it, as which
    the student's begins. Raises UserError.
    """
    args = run.args
    if not args.student_init:
        return teacher.base
    if args.lora_rank:
        load_start(args, teacher.base, "student", args.student_init)
        return teacher.base
    return network_from(run, args.student_init, teacher, teacher.base)


def adapter_of(source):
    """The LoRA file that --student_init means, or None.

    That is a file itself, the one in a folder of peft's, or the adapter that a run of ours left.
    """
    for name in ("adapter.safetensors", "adapter"):
        inside = os.path.join(student_folder(source), name)
        if os.path.exists(inside):
            return lora.adapter_file(inside)
    return lora.adapter_file(source)


def load_start(args, net, name, source):
    """Load a LoRA file of --student_init as the adapter that `trainable` lets `name` begin as.

    -> what it is called in the meantime. Raises UserError.
    """
    path, given = adapter_of(source), f"{name}_given"
    if path is None:
        raise UserError(
            f"--student_init {source} starts full networks, not adapters: give --lora_rank 0 with "
            "it"
        )
    try:
        lora.load(net, given, path)
    except ValueError as error:
        raise UserError(f"--student_init: {error}") from None
    rank = max(a.rank for a in lora.adapters(net, given).values())
    if rank > args.lora_rank:
        raise UserError(f"--student_init: {path} has rank {rank}: give --lora_rank {rank}")
    return given


def network_from(run, source, teacher, base):
    """The network that --student_init names, for a student that would else start from base.

    source: a folder with a network of base's architecture, also one with linear attention; or a
    LoRA file, which is merged into a copy of base. Raises UserError.
    """
    path = adapter_of(source)
    if path:
        net = run.copy_of(base, torch.float32)
        merge_lora(net, path, "--student_init")
        return net
    net, _ = load_network(student_folder(source), place=run.place)
    shapes = [
        {k: v.shape for k, v in lora.base_state_dict(n).items() if ".attend." not in k}
        for n in (net, base)
    ]  # without the weights of linear attention, which a teacher does not have
    if type(net) is not type(base) or shapes[0] != shapes[1]:
        raise UserError(
            f"--student_init {source}: this {type(net).__name__} does not have the "
            f"shapes of the teacher's {type(base).__name__}; student and fake are copies "
            "of the teacher's network"
        )
    set_clock(net, teacher.schedule)
    return net


# ---- what is trained: copies of networks, or adapters on them. Nothing else copies a network -----


def trainable(run, net, name, rank=0, step_input=False):
    """What a script trains, in float32: a copy of net, or where rank > 0 an adapter of net itself.

    The adapter is called `name` in net, has no effect at first unless `load_start` gave it one, and
    comes as a lora.Adapted; net's own weights stay as they are. name: also the key of the seed with
    which it is drawn. step_input: a copy also takes `steps` (see with_step_input). Raises
    UserError.
    """
    args = run.args
    if not rank:
        new = with_step_input(run, net) if step_input else run.copy_of(net, torch.float32)
        new.requires_grad_(True).train()
        new.gradient_checkpointing = args.gradient_checkpointing
        return run.compile_blocks(new)
    torch.manual_seed(stable_hash(args.seed, name))
    lora.add(net, name, rank, args.lora_alpha)
    given = f"{name}_given"
    if given in lora.names(net):
        try:
            lora.start_from(net, name, given)
        except ValueError as error:
            raise UserError(f"--student_init: {error}") from None
        lora.remove(net, given)
    net.gradient_checkpointing = args.gradient_checkpointing
    return lora.Adapted(net, name)


def new_student(run, teacher, step_input=False):
    """The student of a script that has one: a copy or, with --lora_rank, an adapter on the teacher.

    See `starting_network` for what it starts from, and `trainable`. Raises UserError.
    """
    start = starting_network(run, teacher)
    return trainable(run, start, "student", run.args.lora_rank, step_input)


def average_of(run, net, name="ema"):
    """Where the moving average of net's weights is kept, which starts as net; frozen.

    net: of `trainable`. A copy of it, or another adapter, `name`, of the same network; net itself
    where there is no average (--ema_decay 0).
    """
    if not run.args.ema_decay:
        return net
    if isinstance(net, lora.Adapted):
        lora.twin(net.net, name, net.adapter)
        twin = lora.Adapted(net.net, name, copy.deepcopy(net.more))
        return twin.requires_grad_(False).eval()
    return run.copy_of(net).requires_grad_(False).eval()


def merged_copy(run, net):
    """An Adapted -> a network in float32 with the adapter in its weights, without adapters."""
    new = run.copy_of(net.net, torch.float32)
    lora.add_to(new, net.net, net.adapter)
    return new


def with_step_input(run, net):
    """A float32 copy of net that also takes `steps` (B,), through a new layer that is zero at
    first, so that it begins as the same function."""

    def blank(net):
        with torch.device("meta"):
            return type(net)(**{**net.config, "steps_cond": True})

    new = run.copy_of(net, torch.float32, blank)
    for p in new.steps.parameters():
        nn.init.zeros_(p)
    return new


# ---- sampler.json and scheduler/: how a saved student samples ------------------------------------

# Networks that a pipeline of diffusers samples.
PIPELINES = (
    "WanTransformer3DModel",
    "WanTwoNetworks",
    "ZImageTransformer2DModel",
    "PixArtTransformer2DModel",
    "DiTTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "QwenImageTransformer2DModel",
    "Lumina2Transformer2DModel",
    "UNet2DConditionModel",
)
# Those whose pipelines make the steps 1 ... 1 / N themselves; to others the times must be given.
OWN_STEPS = ("ZImageTransformer2DModel", "QwenImageTransformer2DModel", "Lumina2Transformer2DModel")


def describe_schedule(schedule):
    """A schedule as JSON, for sampler.json."""
    if isinstance(schedule, Flow):
        return {"type": "flow"}
    table = {"betas": schedule.betas, "n": schedule.n, "zero_snr": schedule.zero_snr}
    ends = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    shift = {"snr_shift": schedule.snr_shift} if schedule.snr_shift != 1 else {}
    return {"type": "vp", **table, **ends, **shift}


def read_schedule(s):
    """Inverse of describe_schedule."""
    if s["type"] == "flow":
        return Flow()
    ends = s["beta_start"], s["beta_end"]
    return VP(s["betas"], *ends, s["n"], s["zero_snr"], s.get("snr_shift", 1.0))


def scheduler_config(net, schedule, sampler):
    """scheduler_config.json with which diffusers samples a student as sampler.json says, or None.

    net: the network, or one of its architecture; schedule: its noise schedule; sampler: what
    sampler.json holds. None where diffusers has no pipeline, or no scheduler with these steps.
    docs/elsewhere.md has the lines that use it.
    """
    name = type(net).__name__
    known = name in PIPELINES and getattr(net, "convention", None) in (None, "dit")
    if not known or "linear_layers" in getattr(net, "config", {}):
        return None
    times, s = sampler["times"], sampler["timestep_shift"]
    fresh_noise = sampler["rule"] == "renoise"
    if isinstance(schedule, Flow):
        if sampler["prediction"] != "flow_v":
            return None
        own_steps = name in OWN_STEPS and times == step_grid(len(times), s)[:-1]
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": s if own_steps else 1.0,
            "stochastic_sampling": fresh_noise,
            "use_dynamic_shifting": False,
        }
    prediction = PREDICTION_TYPES.get(sampler["prediction"])
    regular = times == step_grid(len(times))[:-1] and schedule.n % len(times) == 0
    whole = all(abs(schedule.n * t - round(schedule.n * t)) < 1e-6 for t in times)
    if prediction is None or not (whole if fresh_noise else regular):
        return None
    table = {**schedule.in_diffusers(), "prediction_type": prediction}
    # Trailing steps and LCM's have no offset, but Stable Diffusion's pipeline warns of another one.
    table |= {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1}
    if fresh_noise:
        # This scaling makes its c_skip 0 and its c_out 1: the next step then starts from the
        # prediction itself, as it does here.
        steps = {"original_inference_steps": len(times), "timestep_scaling": 1e6}
        return {"_class_name": "LCMScheduler", **table, **steps}
    return {"_class_name": "DDIMScheduler", **table, "timestep_spacing": "trailing"}


def wrong_entries(s):
    """Entries of sampler.json that no student of ours has: pairs (wrong, what)."""
    times, shape, schedule = s["times"], s.get("sample_shape", [1]), s["schedule"]
    yield s["prediction"] not in PREDICTIONS, f"prediction {s['prediction']!r}"
    right = isinstance(times, list) and 0 < len(times) <= MOST_STEPS
    right = right and all(is_number(t, 0, 1) for t in times)
    right = right and all(a > b for a, b in zip(times, times[1:]))
    yield not right, f"times {times!r:.80} do not descend within (0, 1]"
    yield not is_number(s["timestep_shift"], 0, 1e6), f"timestep_shift {s['timestep_shift']!r}"
    for key in ("method", "rule"):
        yield not isinstance(s[key], str), f"{key} {s[key]!r}"
    right = isinstance(shape, list) and all(is_number(n, 0, 2**20, (int,)) for n in shape)
    yield not right or not 0 < math.prod(shape) <= 2**32, f"sample_shape {shape!r:.80}"
    if schedule["type"] == "vp":
        yield not is_number(schedule["n"], 1, MOST_STEPS, (int,)), f"schedule of {schedule['n']!r}"
        ends = schedule["beta_start"], schedule["beta_end"]
        yield not all(b is None or is_number(b, 0, 1) for b in ends), f"betas from {ends}"
    yield schedule["type"] not in ("vp", "flow"), f"schedule {schedule['type']!r}"
    for count, grid in s.get("grids", {}).items():  # of every count of tdm.py
        right = isinstance(grid, list) and count == str(len(grid) - 1) and len(grid) > 1
        right = right and all(is_number(t, -1, 1) for t in grid) and grid[-1] == 0
        right = right and all(a > b for a, b in zip(grid, grid[1:]))
        yield not right, f"the grid of {count} step(s), {grid!r:.80}"
    if s["method"] == "tdm":
        own = times if not s["grids"] else s["grids"].get(str(len(times)), [])[:-1]
        yield own != times or not s["grids"], f"grids {s['grids']!r:.80} without that of its times"
        yield not isinstance(s["steps_cond"], bool), f"steps_cond {s['steps_cond']!r}"
    scale = s["guidance_scale"] if s["method"] == "mdt_dist" else s.get("guidance_scale", 1.0)
    yield not is_number(scale, -1e6, 1e6), f"guidance_scale {scale!r}"
    experts = s.get("experts", [])
    yield not isinstance(experts, list), f"experts {experts!r:.80}"
    for e in [*experts, *([s] if s.get("lora_rank") and not experts else [])]:
        path_inside("its folder", e["weights"], "weights")
        steps = e.get("steps", 1)
        yield not is_number(steps, 0, len(times), (int,)), f"an expert of {steps!r} steps"
    rank = s.get("lora_rank", 0)
    yield not is_number(rank, -1, 2**16, (int,)), f"lora_rank {rank!r}"
    if rank:
        right = isinstance(s["base"], str) and is_number(s["seed"], -1, 2**63, (int,))
        yield not right, f"base {s['base']!r} and seed {s['seed']!r}"


def read_sampler(folder):
    """sampler.json of a student folder -> (dict, schedule, prediction, shift); raises UserError."""
    path = os.path.join(folder, "sampler.json")
    s = load_json(path)
    if "told_steps" in s:  # its name in students from before
        s["steps_cond"] = s.pop("told_steps")
    try:
        for wrong, what in wrong_entries(s):
            if wrong:
                raise ValueError(what)
        schedule = read_schedule(s["schedule"])
        check_schedule(schedule)
        return s, schedule, s["prediction"], float(s["timestep_shift"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, UserError) as e:
        raise UserError(
            f"{path} is not a sampler description of ours ({type(e).__name__}: {e})"
        ) from None


def describe_adapters(args, teacher):
    """What sampler.json says of a student that is adapters: which network they belong on."""
    base = args.teacher if args.teacher in WORLDS else os.path.abspath(args.teacher)
    more = {"teacher_lora": list(teacher.loras)} if teacher.loras else {}
    more |= {"base_fingerprint": teacher.files} if teacher.files else {}
    return {"lora_rank": args.lora_rank, "base": base, "seed": args.seed, **more}


def base_fingerprint(args):
    """A short hash of the weights of --teacher, if it is a folder, and of --teacher_lora.

    None for a world without adapters.
    """
    files = [lora.adapter_file(source) or source for source in args.teacher_lora or ()]
    own = "" if args.teacher in WORLDS else teacher_fingerprint(args.teacher)[0]
    return own + (fingerprint(files) if files else "") or None


def wrong_base(args, folder, saved):
    """--teacher with --sample of adapters: pairs (wrong, why). saved: sampler.json of folder."""
    base = saved["base"]
    found = args.teacher or base in WORLDS or os.path.isdir(base) or trellis_path(base)
    why = f"the adapters of {folder} belong on {base}, which is not there: name that teacher with "
    yield not found, why + "--teacher"


def saved_teacher(run, saved, two_networks=False):
    """The frozen teacher that the adapters of a saved student belong on.

    run: with the flags of --sample, of which --teacher and --teacher_lora may name another place.
    saved: its sampler.json. Raises UserError.
    """
    run = copy.copy(run)
    args = run.args = copy.copy(run.args)
    args.teacher = args.teacher or saved["base"]
    args.teacher_lora = args.teacher_lora or saved.get("teacher_lora")
    args.seed = saved["seed"]  # the network that stands for a closed-form teacher is fitted with it
    teacher, known = start_teacher(run, two_networks), saved.get("base_fingerprint")
    if known and teacher.files and known != teacher.files:
        raise UserError(
            f"{args.teacher} is not the teacher of these adapters, its weights are others; the "
            f"adapters belong on {saved['base']} as it was, name that with --teacher"
        )
    freeze_teacher(run, teacher)
    return teacher


def load_adapter(net, name, path, saved):
    """A saved adapter onto its network.  -> Adapted. Raises UserError, also for another network."""
    try:
        lora.load(net, name, lora.adapter_file(path) or path)
    except ValueError as error:
        raise UserError(
            f"{error}; the adapters belong on {saved['base']}, name it with --teacher"
        ) from None
    return lora.Adapted(net, name)


def read_own_sampler(sample, method):
    """--sample: a run or student folder -> its student folder and what read_sampler gives.

    What models.convert wrote is such a folder too, of latent_fm.py. Raises UserError, also for a
    student that another script made.
    """
    folder = student_folder(sample)
    sampler, *rest = read_sampler(folder)
    if sampler["method"] != method:
        maker = sampler["method"]
        raise UserError(f"{sample} was made by {maker}: sample it with python {maker}.py --sample")
    return folder, sampler, *rest
