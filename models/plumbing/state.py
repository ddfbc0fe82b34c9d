"""state/: what a run is resumed from, and what a resumed run may change.

Every rank writes what it holds, tensor by tensor, to a file of its own; one rename makes the whole
a checkpoint. Any number of ranks reads it again. The files are plain safetensors: rows that are a
part of a tensor are named in the header's "rows", {name: [number of the first row, shape of the
whole]}. torch.distributed.checkpoint has such a writer too, but that one makes each file in memory
before it writes it.
"""

import contextlib
import json
import math
import os
import re
import shutil

import torch
from torch import nn

from models.draws import stable_hash
from models.files import (
    TensorWriter,
    UserError,
    fingerprint,
    fsync_folder,
    load_json,
    open_tensors,
    save_json,
)
from models.networks import lora
from models.networks.latent_space import BUILT_IN
from models.plumbing.images import files_below
from models.plumbing.teachers import teacher_fingerprint
from models.prompts import INDEX, shards_of
from models.shards import first_row, holds, own_rows, rows_in
from models.worlds import WORLDS

# ---- writing -------------------------------------------------------------------------------------


def named_tensors(thing, prefix):
    """All that has to be kept of a network, an adapter or an optimiser: {prefix.NAME: tensor}.

    They share memory with it. A tensor that a network has under several names comes once.
    """
    if isinstance(thing, torch.optim.Optimizer):
        state = thing.state_dict()["state"]
        found = {f"{i}.{k}": torch.as_tensor(v) for i, s in state.items() for k, v in s.items()}
    elif isinstance(thing, nn.Module):
        first = {}
        for name, value in thing.state_dict(keep_vars=True).items():
            first.setdefault(id(value), (name, value))
        found = dict(first.values())
    else:
        found = thing.state_dict()
    return {f"{prefix}.{name}": value for name, value in found.items()}


def state_file(folder, rank, ranks):
    """The file of this rank in the folder of a checkpoint that was made on so many."""
    number = f"-{rank + 1:05d}-of-{ranks:05d}" if ranks > 1 else ""
    return os.path.join(folder, f"state{number}.safetensors")


def write_own_part(path, things):
    """What this rank holds of {name: network, adapter or optimiser}, one tensor at a time."""
    tensors = {}
    for name, thing in things.items():
        tensors |= named_tensors(thing, name)
    mine = {k: v for k, v in tensors.items() if holds(v)}
    about = {k: (v.dtype, own_rows(v).shape) for k, v in mine.items()}
    parts = {k: v for k, v in mine.items() if own_rows(v).shape != v.shape}
    rows = {k: [first_row(v), list(v.shape)] for k, v in parts.items()}
    with TensorWriter(path, about, {"rows": json.dumps(rows)}) as file:
        for k, v in mine.items():
            file.write(k, own_rows(v))


def save_state(output_dir, step, things, info, rank=0, wait_for_all=lambda: None, keep=2):
    """state/step-NNNNNNN/ appears in one rename, complete or not at all; old ones then go.

    things: {name: network, adapter or optimiser}. info: for state.json, with world_size. All ranks
    call it, and wait for one another by wait_for_all.
    """
    root = os.path.join(output_dir, "state")
    tmp, final = os.path.join(root, f".tmp-{step}"), os.path.join(root, f"step-{step:07d}")
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(tmp)
    wait_for_all()
    try:
        write_own_part(state_file(tmp, rank, info["world_size"]), things)
        wait_for_all()
        if rank:
            return
        save_json({"step": step, **info}, os.path.join(tmp, "state.json"))
    except OSError:  # a full disk: the older states stay
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    remove_state(final)
    os.replace(tmp, final)
    fsync_folder(root)
    remove_later_states(output_dir, step)
    for old in complete_states(output_dir)[:-keep]:
        remove_state(os.path.join(root, old))


def remove_state(folder):
    """It goes by one rename, too: one that is half-deleted must not look whole."""
    root, name = os.path.split(folder)
    gone = os.path.join(root, f".tmp-old-{name}")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):  # there is none
        os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_later_states(output_dir, step):
    """States of more updates than this go: the run was resumed from an earlier one, and makes those
    updates anew. `latest` would take them for its own.

    As long as the run has none that is not later, they stay.  -> names of those that went
    """
    states = complete_states(output_dir)
    later = [name for name in states if updates_of(name) > step]
    if later == states:
        return []
    for name in later:
        remove_state(os.path.join(output_dir, "state", name))
    return later


# ---- reading -------------------------------------------------------------------------------------


class SavedState:
    """The tensors of a checkpoint. Nothing is read before it is asked for, and then only the rows
    that this rank holds. Raises UserError for a file that is missing or truncated."""

    def __init__(self, folder, ranks):
        """folder: of the checkpoint; ranks: how many it was made on."""
        self.folder, self.places = folder, {}
        for rank in range(ranks):
            try:
                file = open_tensors(state_file(folder, rank, ranks))
            except UserError as e:
                raise UserError(
                    f"{e}, or resume with --resume_from_checkpoint from an earlier "
                    "step's folder beside it"
                ) from None
            rows = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():
                first, shape = rows.get(name, (0, file.get_slice(name).get_shape()))
                self.places.setdefault(name, (tuple(shape), []))[1].append((first, file))

    def names(self, prefix):
        """The names of a network or an optimiser, without the prefix."""
        return [k[len(prefix) + 1 :] for k in self.places if k.startswith(prefix + ".")]

    def has(self, prefix):
        """Whether there is a network or an optimiser of this name."""
        return bool(self.names(prefix))

    def shape(self, name):
        """Of the whole tensor."""
        return self.places[name][0]

    def fill(self, name, tensor):
        """Read this rank's rows of a tensor into their place. Raises UserError."""
        shape, parts = self.places.get(name, (None, []))
        if shape != tuple(tensor.shape):
            has = "has none" if shape is None else f"has {shape}"
            raise UserError(f"{self.folder}: {name} is {tuple(tensor.shape)} here, the state {has}")
        own = own_rows(tensor)
        if not own.dim() or len(parts) == 1 and parts[0][0] == 0:
            stored = parts[0][1].get_slice(name) if own.dim() else parts[0][1].get_tensor(name)
            if not own.dim() or tuple(stored.get_shape()) == shape:
                own.copy_(rows_in(tensor, stored))
                return
        begin, left = first_row(tensor), own.shape[0]
        for first, file in parts:
            stored = file.get_slice(name)
            a = max(begin, first)
            b = min(begin + own.shape[0], first + stored.get_shape()[0])
            if a < b:
                own[a - begin : b - begin].copy_(stored[a - first : b - first])
                left -= b - a
        if left:
            raise UserError(f"{self.folder}: {left} rows of {name} are in none of its files")


@torch.no_grad()
def unpack(thing, name, saved):
    """Fill a network or an adapter from what was saved under this name. Raises UserError."""
    own = named_tensors(thing, name)
    extra = sorted({f"{name}.{k}" for k in saved.names(name)} - own.keys())
    if extra:
        raise UserError(f"{saved.folder} has {extra[0]}, and this run's network does not")
    for key, tensor in own.items():
        saved.fill(key, tensor)


@torch.no_grad()
def unpack_optimizer(optimizer, name, saved):
    """The same for an optimiser; parameter groups keep the values of this run's flags."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for key in saved.names(name):
        i, what = key.split(".")
        p, shape = parameters[int(i)], saved.shape(f"{name}.{key}")
        value = torch.zeros_like(p) if shape == tuple(p.shape) else torch.zeros(shape)
        saved.fill(f"{name}.{key}", value)
        state.setdefault(int(i), {})[what] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def updates_of(name):
    """The number of updates in the name of a state, step-NNNNNNN."""
    return int(name.removeprefix("step-"))


def complete_states(output_dir):
    """Names of the complete states of a run, the oldest first; a list.

    Under any other name, as step-0000200-good, a user may keep one there.
    """
    root = os.path.join(output_dir, "state")
    names = os.listdir(root) if os.path.isdir(root) else []
    names = [n for n in names if re.fullmatch(r"step-\d+", n)]
    whole = [n for n in names if os.path.isfile(os.path.join(root, n, "state.json"))]
    return sorted(whole, key=updates_of)


def resumable(output_dir, resume, updates):
    """The newest state of a run, and what to give as --resume_from_checkpoint to go on from it.

    resume: that flag of this process. updates: how many the newest state of this run is of; those
    of more are of the run that it left when it was resumed.  -> two texts; None, None without one
    """
    states = complete_states(output_dir)
    if states and updates_of(states[-1]) <= updates:
        return states[-1], "latest"
    return (resume, resume) if resume != "latest" else (None, None)


def find_state(output_dir, resume):
    """--resume_from_checkpoint -> folder of a complete state, or None. Raises UserError."""
    if resume is None:
        return None
    if resume != "latest":
        if not os.path.isfile(os.path.join(resume, "state.json")):
            raise UserError(f"--resume_from_checkpoint {resume}: no state.json there{near(resume)}")
        return resume
    states = complete_states(output_dir)
    return os.path.join(output_dir, "state", states[-1]) if states else None


def near(folder):
    """The newest state of a run, for who has named the run's folder, or its state/; in words."""
    for run in (folder, os.path.dirname(os.path.abspath(folder))):
        states = complete_states(run)
        if states:
            return f": give {os.path.join(run, 'state', states[-1])}"
    return ""


def read_info(folder, method=None):
    """state.json of a checkpoint -> dict. method: the script that goes on with it, None: any.

    Raises UserError for one that no run of this script has written.
    """
    path = os.path.join(folder, "state.json")
    info = load_json(path)
    made = info.get("method", method)
    if method and made != method:
        raise UserError(
            f"{folder} is a state of {made}.py, and this is {method}.py: go on with it by {made}.py"
        )
    flags, ranks = info.get("flags"), info.get("world_size", 1)
    right = isinstance(flags, dict) and isinstance(info.get("changes", []), list)
    right = right and all(type(info.get(k, 0.0)) in (int, float) for k in ("step", "seconds"))
    counts = [info.get("step"), ranks]
    if right:
        counts += [*(flags.get(k) for k in BATCH), flags.get("sequence_ranks", 1)]
    right = right and all(type(n) is int and 0 <= n <= 10**9 for n in counts)
    if not right or 0 in counts[1:] or max(counts[1:]) > 10**6 or ranks % counts[-1]:
        raise UserError(
            f"{path} is damaged: copy it again, or resume with --resume_from_checkpoint from an "
            "earlier step's folder beside it"
        )
    return {"seconds": 0.0, **info}


# ---- what a resumed run may change ---------------------------------------------------------------

# Flags that change no gradient: where things go, what is shown, how the end of a run samples, what
# memory it takes; and settings, a line of text. They are not kept in state.json.
FREE_TO_CHANGE = set(
    "output_dir max_train_steps preset resume_from_checkpoint checkpointing_steps sample settings "
    "remeasure_teacher preview_samples preview_every max_minutes gradient_checkpointing compile "
    "save_fp16 lora_dtype shard_ranks save_dtype dry_run device_memory device_tflops "
    "sample_steps solver atol rtol guidance_interval workers "
    "student_guidance teacher_shift teacher_guidance_interval "
    "bank".split()  # a folder that refuses another teacher's
)

# Flags that somebody may have to change in a run that goes on: how far and how often networks are
# updated and averaged, and what the terms of a loss weigh, so that a GAN can be added after
# convergence at lower rates. A change is printed and kept in state.json. All others must stay: they
# decide what the state's tensors are, what is drawn and read, or what a term pulls towards.
MAY_CHANGE = set(
    "learning_rate learning_rate_fake learning_rate_features learning_rate_r learning_rate_muon "
    "lr_warmup_steps lr_decay_share lr_schedule lr_final max_grad_norm weight_decay "
    "ema_decay ema_start fake_update_ratio "
    "dm_weight gan_weight gan_weight_d regression_weight mean_variance_weight selection_weight "
    "vm_weight vd_loss_weight".split()
)

# What only one term needs may change while the weight of that term is 0, before or after.
OF_A_TERM = {
    "data": "gan_weight",
    "mean_variance_target": "mean_variance_weight",
    "teacher_steps": "regression_weight",
}

# What in these scripts is shown, and in others trained.
ONLY_SHOWN = {
    "mdt_dist": {"student_steps", "guidance_scale"},
    "latent_fm": {"guidance_scale"},
    "linvideo": {"teacher_steps"},
}

# Together with the number of ranks, over --sequence_ranks, these make an update's samples, whose
# number must stay.
BATCH = ("train_batch_size", "gradient_accumulation_steps")


def flags_to_save(args):
    """The flags that state.json keeps."""
    return {k: v for k, v in vars(args).items() if k not in FREE_TO_CHANGE}


def batch_flags(args):
    """{flag of BATCH: its value}."""
    return {k: getattr(args, k) for k in BATCH}


def keep_batch(info, args, world_size):
    """The command that a run was started with goes on, on another number of ranks, with as many
    samples an update: --gradient_accumulation_steps changes, where that alone can do it.

    info: state.json; its "command" has these flags as that run was given them.
    """
    saved = {k: info["flags"][k] for k in BATCH}
    if batch_flags(args) not in (saved, info.get("command")) or "world_size" not in info:
        return
    groups = info["world_size"] // info["flags"].get("sequence_ranks", 1)
    samples = math.prod(saved.values()) * groups
    together = args.train_batch_size * (world_size // args.sequence_ranks)
    if samples % together == 0:
        args.gradient_accumulation_steps = samples // together


INPUTS = "teacher teacher_lora prompts data maps map_names autoencoder dinov2".split()


def inputs_of(args):
    """Fingerprints of the files that a run reads, {flag: text}; those of worlds are none.

    A teacher or an autoencoder is its weights and what describes them, LoRA files, prompts and
    data are files, or what a folder holds. Raises UserError.
    """
    found = {}
    for flag in INPUTS:
        name = getattr(args, flag, None)
        if not name or name in WORLDS or name in BUILT_IN:
            continue
        if flag == "dinov2" and not os.path.isdir(name):  # it is downloaded
            continue
        if flag == "teacher":
            found[flag] = "".join(teacher_fingerprint(name))
            continue
        if flag == "teacher_lora":
            paths = [lora.adapter_file(source) or source for source in name]
        elif os.path.isdir(name):
            found[flag] = folder_fingerprint(name)
            continue
        else:
            index = name.removesuffix(INDEX) + INDEX
            shards = shards_of(index) if os.path.isfile(index) else []
            folder = os.path.dirname(name)
            paths = [os.path.join(folder, shard["file"]) for shard in shards] or [name]
        found[flag] = fingerprint(path for path in paths if os.path.isfile(path))
    return found


DESCRIBED = ("dataset.json", "config.json", "latents.json")


def folder_fingerprint(folder, most=4096):
    """A short hash of a folder: names and sizes of all its files, and content of at most so many.

    Those are spread evenly over the folder; descriptions are always among them. What a file browser
    leaves there does not count.
    """
    paths = [path for path in files_below(folder) if not is_clutter(os.path.basename(path))]
    about = [(os.path.relpath(p, folder), os.path.getsize(p)) for p in paths if os.path.isfile(p)]
    some = paths[:: -(-len(paths) // most) or 1]
    some += [path for path in paths if os.path.basename(path) in DESCRIBED]
    pieces = max(2, min(64, most // max(1, len(some))))
    content = fingerprint((p for p in some if os.path.isfile(p)), pieces)
    return f"{stable_hash(*about):08x}-{content}"  # without the dash hidden files counted, too


def is_clutter(name):
    """Whether a file is hidden, as .DS_Store is, or Windows' previews."""
    return name.startswith(".") or name.lower() == "thumbs.db"


def saved_flags(info):
    """The flags of a checkpoint that count. info: its state.json."""
    saved = {"sequence_ranks": 1}  # in runs from before there was this flag
    saved |= {RENAMED.get(k, k): v for k, v in info["flags"].items() if k not in FREE_TO_CHANGE}
    return saved


RENAMED = {"untold": "no_steps_cond"}  # flags that had another name in runs from before


def unused_flags(saved, now):
    """Flags whose term is off, before or after. saved, now: {flag: value}."""
    unused = {k for k, term in OF_A_TERM.items() if 0 in (saved.get(term), now.get(term))}
    if "real" in (saved.get("student_input"), now.get("student_input")):
        unused.discard("data")  # dmd.py's states are noised data
    return unused


def same_inputs(info, inputs, args):
    """Which of a run's inputs are the files that they were, wherever they are now.

    info: state.json. inputs: of `inputs_of`. Raises UserError for other content, unless it is of a
    term that is off.
    """
    before, unused = info.get("inputs", {}), unused_flags(saved_flags(info), flags_to_save(args))
    known = [flag for flag in inputs if flag in before and flag not in unused]
    known = [flag for flag in known if len(before[flag]) == len(inputs[flag])]  # of today's kind
    for flag in known:
        if before[flag] != inputs[flag]:
            given = getattr(args, flag)
            given = given if isinstance(given, str) else " ".join(given)
            raise UserError(
                f"--{flag} {given}: these are not the files that the run began with: "
                f"restore them, or begin a run of its own in another --output_dir"
            )
    return set(known)


def changes_on_resume(info, args, world_size, same=frozenset()):
    """What a resumed run changes, of what it may change. info: state.json of its checkpoint.

    same: of `same_inputs`, flags whose files may have moved.
    -> [{"what": "--flag" or "ranks", "was": value, "is": value, "update": the first with it}].
    Raises UserError for a change that would not go on with the same run.
    """
    saved, now = saved_flags(info), flags_to_save(args)
    if info["step"] > args.max_train_steps:
        raise UserError(
            f"the checkpoint is at step {info['step']}, beyond --max_train_steps "
            f"{args.max_train_steps}: give at least {info['step']}"
        )
    shown = ONLY_SHOWN.get(str(info.get("method")), set())
    if "regression_weight" not in now:  # then teacher samples are measured and shown, no more
        shown = shown | {"teacher_steps"}
    names = sorted((set(saved) | set(now)) - shown)
    changed = [k for k in names if saved.get(k) != now.get(k)]
    free = MAY_CHANGE | unused_flags(saved, now) | same | {*BATCH, "sequence_ranks"}
    if saved.get("cache_latents") and now.get("cache_latents"):
        free.add("cache_latents")  # a folder that refuses other latents
    wrong = [f"--{k} was {saved.get(k)!r} and is {now.get(k)!r}" for k in changed if k not in free]
    if wrong:
        raise UserError(
            f"cannot resume with other flags: {'; '.join(wrong)}. "
            "Give the old values or another --output_dir"
        )
    ranks = info.get("world_size", world_size)
    refuse_other_batch(saved, ranks, args, world_size)
    found = [(f"--{k}", saved.get(k), now.get(k)) for k in changed]
    found += [("number of ranks", ranks, world_size)] if ranks != world_size else []
    first = info["step"] + 1
    return [{"what": k, "was": was, "is": value, "update": first} for k, was, value in found]


def refuse_other_batch(saved, ranks, args, world_size):
    """Raises UserError where an update would see another number of samples than before.

    saved: flags of the checkpoint, ranks: how many it was made on. On any number of ranks the same
    samples are drawn, and their mean gradient is the same.
    """
    micro, parts = (saved[k] for k in BATCH)
    samples = micro * parts * (ranks // saved["sequence_ranks"])
    groups = world_size // args.sequence_ranks  # of ranks that have the same samples
    if args.train_batch_size * args.gradient_accumulation_steps * groups == samples:
        return
    before = f"updates were of {samples} samples (--train_batch_size {micro}, "
    before += f"--gradient_accumulation_steps {parts}, {ranks} rank(s))"
    if samples % groups:
        fitting = [n for n in range(1, min(samples, 4096) + 1) if samples % n == 0]
        fitting = [n * args.sequence_ranks for n in fitting]
        fitting = ", ".join(map(str, fitting))
        raise UserError(f"{before}, which {world_size} ranks cannot share: use one of {fitting}")
    each = samples // groups
    fit = max(n for n in range(1, micro + 1) if each % n == 0)  # no larger: it may fill the memory
    raise UserError(
        f"{before}: on {world_size} rank(s) resume with --train_batch_size {fit} "
        f"--gradient_accumulation_steps {each // fit}"
    )
