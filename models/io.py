"""Everything a run needs that no paper would mention: flags, draws, checkpoints, resume, logs, pictures.

If deleting a call to this file changes a gradient, that call is in the wrong place: methods live in the scripts.
Wrong input raises UserError, which `run` turns into one line on stderr and exit code 2.
"""
import argparse
import copy
import csv
import hashlib
import importlib
import io
import json
import os
import resource
import shutil
import sys
import time
import types
import warnings
import zlib

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from models import lora
from models.diffusion import PREDICTIONS, VP, Flow

NETWORKS = {"DiT": "models.dit", "RingMLP": "models.toy", "WanTransformer3DModel": "models.wan",
            "ZImageTransformer2DModel": "models.z_image", "PixArtTransformer2DModel": "models.pixart", "Transformer2DModel": "models.pixart",
            "DiTTransformer2DModel": "models.dit_imagenet", "AutoencoderKL": "models.vae",
            "PatchPCA": "models.latent_space", "Identity": "models.latent_space",
            "SparseStructureFlowModel": "models.trellis", "SparseStructureEncoder": "models.trellis", "SparseStructureDecoder": "models.trellis",
            "SLatFlowModel": "models.trellis", "ElasticSLatFlowModel": "models.trellis"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
SHARD_BYTES = 10 * 10**9  # diffusers' default shard size


class UserError(Exception):
    """Wrong input: the message names the cause and the remedy in one line. Exit code 2."""


class TrainingError(Exception):
    """Training cannot go on (a loss is not finite). Exit code 1."""


def run(main):
    """Call main() and turn the two errors above into one line on stderr and the exit code. A rank that is done ends at once: the process
    group's threads still run, and now and then one of them aborts a process whose interpreter is being torn down."""
    try:
        main()
        if torch.distributed.is_initialized():
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)
    except (UserError, TrainingError) as e:
        if os.environ.get("RANK", "0") == "0":  # every rank stops, one speaks
            print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(e, UserError) else 1) from None


# ---- flags ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, and a single line for a wrong flag."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        print(f"error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def number(kind, low=None, high=None, above=None):
    """An argparse type: kind (int or float) within [low, high], or greater than `above`; NaN and infinity never pass."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n integer' if kind is int else ' number'}") from None
        if value - value != 0 or (low is not None and value < low) or (high is not None and value > high) or (
                above is not None and value <= above):
            bounds = [f">= {low}"] * (low is not None) + [f"> {above}"] * (above is not None) + [f"<= {high}"] * (high is not None)
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds) or 'finite'}, got {text}")
        return value
    return parse


def add_run_flags(p):
    """Flags that mean the same in every script: where things go, how long, how much memory."""
    p.add_argument("--output_dir", default=None, help="where everything is written (default: runs/<method>-<teacher>); "
                   "an existing one is renamed DIR.1")
    p.add_argument("--max_train_steps", type=number(int, 1), default=1000, help="student updates")
    p.add_argument("--train_batch_size", type=number(int, 1), default=64, help="samples per rank and micro-batch")
    p.add_argument("--gradient_accumulation_steps", type=number(int, 1), default=1, help="micro-batches per update")
    p.add_argument("--learning_rate", type=number(float, above=0), default=1e-3, help="AdamW learning rate")
    p.add_argument("--lr_warmup_steps", type=number(int, 0), default=0, help="updates of linear warm-up")
    p.add_argument("--max_grad_norm", type=number(float, above=0), default=10.0, help="gradient norm is clipped to this")
    p.add_argument("--ema_decay", type=number(float, 0, 0.999999), default=0.0, help="EMA of the student's weights; 0 = off")
    p.add_argument("--guidance_scale", type=number(float, 0), default=1.0, help="uncond + scale (cond - uncond); 1 = off")
    p.add_argument("--timestep_shift", type=number(float, above=0), default=None,
                   help="t = s u / (1 + (s-1) u) in training and grids; None: the teacher's own")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of every draw")
    p.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="bf16: networks under autocast")
    p.add_argument("--gradient_checkpointing", action="store_true", help="recompute blocks in backward: less memory")
    p.add_argument("--resume_from_checkpoint", default=None, metavar="latest|PATH", help="go on from OUTPUT_DIR/state")
    p.add_argument("--checkpointing_steps", type=number(int, 1), default=100, help="student updates between saves")
    p.add_argument("--sample", default=None, metavar="FOLDER", help="no training: load this saved student, write samples")


# ---- draws belong to samples, not ranks --------------------------------------------------------------------------


def stable_hash(*key):
    """crc32 of the key's text: the same in every process, unlike Python's hash."""
    return zlib.crc32(repr(key).encode())


class Draws:
    """Random numbers of one update. Row i's are a function of (seed, step, inner update, name, global row) alone, so
    they do not depend on the number of ranks, on the device, or on where a run was resumed."""

    def __init__(self, seed, step, inner, rows, device="cpu"):
        self.key, self.rows, self.device = (seed, step, inner), list(rows), device

    def _rows(self, name, shape, dtype, fill):
        out, generator = torch.empty(len(self.rows), *shape, dtype=dtype), torch.Generator()
        prefix = stable_hash(*self.key, name)
        for row, view in zip(self.rows, out.unbind(0)):
            generator.manual_seed(zlib.crc32(b"%d" % row, prefix))  # crc32 goes on where the prefix ended
            fill(view, generator)
        return out.to(self.device)

    def normal(self, name, shape):
        """(rows, *shape) standard normal, float32."""
        return self._rows(name, shape, torch.float32, lambda v, g: v.normal_(generator=g))

    def points(self, name, counts, channels):
        """(sum of counts, channels) standard normal, float32: counts[i] points of row i, one row after the other."""
        generator, parts = torch.Generator(), []
        for row, n in zip(self.rows, counts, strict=True):
            generator.manual_seed(stable_hash(*self.key, name, row))
            parts.append(torch.randn(n, channels, generator=generator))
        return torch.cat(parts).to(self.device)

    def uniform(self, name, low=0.0, high=1.0):
        """(rows,) float32."""
        return self._rows(name, (), torch.float32, lambda v, g: v.uniform_(low, high, generator=g))

    def spread(self, name, low=0.0, high=1.0):
        """(rows,) float32, each uniform in [low, high), all together evenly spread: one offset drawn for all rows, plus the
        row times the golden ratio (Variational Diffusion Models, 2107.00630 App. I.1, with a step that suits any batch size).
        For noise levels: a batch that covers them evenly gives a calmer gradient with the same mean."""
        offset = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(stable_hash(*self.key, name)))
        u = (offset + torch.tensor(self.rows, dtype=torch.float64) * (5 ** 0.5 - 1) / 2) % 1
        return (low + (high - low) * u).float().to(self.device)

    def integer(self, name, high):
        """(rows,) int64 in [0, high)."""
        return self._rows(name, (), torch.int64, lambda v, g: v.random_(0, high, generator=g))

    def agreed(self, name, high):
        """One int in [0, high), the same for every row and on every rank."""
        return int(torch.randint(0, high, (), generator=torch.Generator().manual_seed(stable_hash(*self.key, name))))


# ---- files ---------------------------------------------------------------------------------------------------------


def atomic_write(path, data):
    """Write bytes so that `path` holds the old or the new content whatever happens: temporary, fsync, rename."""
    tmp = f"{path}.tmp-{os.getpid()}"
    with open(tmp, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)
    fsync_folder(os.path.dirname(path) or ".")


def fsync_folder(folder):
    """Make renames in this folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save_json(value, path):
    atomic_write(path, (json.dumps(value, indent=2) + "\n").encode())


def load_json(path):
    """One JSON object from a file -> dict; raises UserError."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as e:
        raise UserError(f"{path} is not readable JSON ({e}): restore it from the source of the checkpoint") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: restore it from the source of the checkpoint")
    return value


def save_tensors(tensors, path, metadata=None):
    """Atomic safetensors file; tensors are made contiguous and moved to the CPU."""
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    atomic_write(path, safetensors_bytes(tensors, metadata=metadata))


def open_tensors(path):
    """safe_open(path) with a readable error for anything that is not a whole safetensors file."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        with open(path, "rb") as f:
            head = f.read(2)
        if head in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04"):
            raise UserError(f"{path} is a pickle, not safetensors; pickles can run code and are never loaded: convert it") from None
        raise UserError(f"{path} is truncated or not a safetensors file ({e}): copy or download it again") from None


def load_tensors(path):
    """All tensors of a safetensors file on the CPU; raises UserError."""
    with open_tensors(path) as f:
        return {k: f.get_tensor(k) for k in f.keys()}


# ---- networks in their own library's layout ------------------------------------------------------------------------


def trellis_names(folder):
    """Names of the networks in TRELLIS's layout, NAME.json + NAME.safetensors, that lie in a folder."""
    names = [n.removesuffix(".json") for n in sorted(os.listdir(folder)) if n.endswith(".json")] if os.path.isdir(folder) else []
    return [n for n in names if os.path.isfile(os.path.join(folder, n + ".safetensors"))]


def trellis_path(source):
    """DIR/NAME of a network in that layout. source: this path, one of its two files, or a folder with one such pair, which is what
    save_network leaves; anything else: None."""
    if os.path.isdir(source):
        names = [] if os.path.isfile(os.path.join(source, "config.json")) else trellis_names(source)
        return os.path.join(source, names[0]) if len(names) == 1 else None
    path = source.removesuffix(".json").removesuffix(".safetensors")
    return path if os.path.isfile(path + ".json") or os.path.isfile(path + ".safetensors") else None


def weight_files(folder):
    """The safetensors files of a component, {file: [keys] or None}; raises UserError."""
    path = trellis_path(folder)
    if path and not os.path.isfile(path + ".safetensors") and os.path.isfile(path + ".pt"):
        raise UserError(f"{path}.safetensors does not exist, only a pickle ({os.path.basename(path)}.pt); pickles can run code and are never loaded: "
                        "convert it")
    if path:
        return {path + ".safetensors": None}
    if os.path.isfile(os.path.join(folder, INDEX)):
        files = {}
        for key, name in load_json(os.path.join(folder, INDEX)).get("weight_map", {}).items():
            files.setdefault(os.path.join(folder, os.path.basename(name)), []).append(key)
        return files
    if os.path.isfile(os.path.join(folder, WEIGHTS)):
        return {os.path.join(folder, WEIGHTS): None}
    pickles = [n for n in sorted(os.listdir(folder)) if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise UserError(f"{folder} has only a pickle ({pickles[0]}); pickles can run code and are never loaded: "
                        f"convert it to {WEIGHTS}")
    raise UserError(f"{folder} has no {WEIGHTS} and no {INDEX}")


def config_class(config):
    """The class of a network that a config is of."""
    return config.get("name" if "args" in config else "_class_name")


def network_from_config(config, where):
    """Build the architecture that a config names: diffusers' "_class_name" among its arguments (other keys that start with _ are the library's
    own notes), or TRELLIS's "name" beside "args"."""
    name = config_class(config)
    if name not in NETWORKS:
        raise UserError(f"{where}: unknown network class {name!r}; known are {', '.join(NETWORKS)}")
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        name = "DiTTransformer2DModel"  # older versions of diffusers had one class for both
    kwargs = config["args"] if "args" in config else {k: v for k, v in config.items() if not k.startswith("_")}
    try:
        return getattr(importlib.import_module(NETWORKS[name]), name)(**kwargs)
    except (TypeError, ValueError) as e:
        raise UserError(f"{where} does not describe a {name}: {e}") from None


def load_network(folder, dtype=torch.float32):
    """Read one component -> (net in eval mode, config). folder: a component folder of diffusers' (config.json + safetensors, single or
    sharded), or what trellis_path takes. Parameters become dtype, buffers stay as they are.

    Raises UserError for a missing, truncated, mismatched or pickled checkpoint, before any weight is used.
    """
    path = trellis_path(folder)
    if not path and not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder")
    described = path + ".json" if path else os.path.join(folder, "config.json")
    if not path and os.path.isfile(os.path.join(folder, "pipeline.json")):
        inside = [os.path.join("ckpts", n) for n in trellis_names(os.path.join(folder, "ckpts"))]
        raise UserError(f"{folder} is a TRELLIS root of several networks: give the path of one" + (f" ({', '.join(inside)} in it are such)" if inside else ""))
    if not path and not os.path.isfile(described):
        inside = [n for n in sorted(os.listdir(folder)) if os.path.isfile(os.path.join(folder, n, "config.json"))] + trellis_names(folder)
        raise UserError(f"{folder} has no config.json: give the folder of one network" + (f" ({', '.join(inside)} in it are such)" if inside else "")
                        + ", or a pipeline root with model_index.json")
    config = load_json(described)
    files = weight_files(folder)
    net, what = network_from_config(config, described), os.path.basename(described)
    for p in net.parameters():
        p.data = p.data.to(dtype)
    expected, seen, current_name = net.state_dict(), set(), getattr(net, "current_name", str)  # str: a name as it is
    for path, keys in files.items():
        with open_tensors(path) as f:
            stored = set(f.keys())
            missing = sorted(set(keys or ()) - stored)
            if missing:
                raise UserError(f"{path} lacks {missing[0]!r}, which the index places there: copy the shard again")
            for key in sorted(stored):
                name = current_name(key)
                if name not in expected:
                    raise UserError(f"{path} has {key!r}, which a {config_class(config)} of this {what} does not")
                tensor = f.get_tensor(key)
                if tensor.shape != expected[name].shape:
                    raise UserError(f"{path}: {key!r} has shape {tuple(tensor.shape)}, {what} asks for {tuple(expected[name].shape)}")
                with torch.no_grad():
                    expected[name].copy_(tensor)
                seen.add(name)
    missing = sorted(set(expected) - seen)
    if missing:
        raise UserError(f"{folder} lacks {missing[0]!r}" + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
                        + f": the checkpoint does not match its {what}")
    return net.eval(), config


def network_config(net):
    """The config.json of a network of ours, or TRELLIS's json: class name + constructor arguments."""
    name = type(net).__name__
    return {"name": name, "args": net.config} if NETWORKS[name] == "models.trellis" else {"_class_name": name, **net.config}


def save_network(net, config, folder, state_dict=None, shard_bytes=SHARD_BYTES):
    """Write config.json and safetensors (sharded with an index above shard_bytes), each file atomically. Without adapters.

    With a config of TRELLIS's: CLASS.json and CLASS.safetensors, never sharded, in the network's own dtype (TRELLIS halves what it wants
    halved as it loads; a student that a low learning rate moved little would lose that in float16).
    """
    os.makedirs(folder, exist_ok=True)
    tensors = state_dict if state_dict is not None else lora.base_state_dict(net)
    if "args" in config:
        path = os.path.join(folder, config_class(config))
        save_tensors(tensors, path + ".safetensors", {"format": "pt"})
        save_json(config, path + ".json")
        return
    shards, size = [{}], 0
    for key, value in tensors.items():
        n = value.numel() * value.element_size()
        if shards[-1] and size + n > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key], size = value, size + n
    if len(shards) == 1:
        save_tensors(shards[0], os.path.join(folder, WEIGHTS), {"format": "pt"})
    else:
        weight_map = {}
        for i, shard in enumerate(shards):
            name = WEIGHTS.replace(".safetensors", f"-{i + 1:05d}-of-{len(shards):05d}.safetensors")
            save_tensors(shard, os.path.join(folder, name), {"format": "pt"})
            weight_map.update(dict.fromkeys(shard, name))
        total = sum(v.numel() * v.element_size() for v in tensors.values())
        save_json({"metadata": {"total_size": total}, "weight_map": weight_map}, os.path.join(folder, INDEX))
    written = set(weight_map.values()) | {INDEX} if len(shards) > 1 else {WEIGHTS}
    for name in os.listdir(folder):  # an earlier save with another number of shards would win over this one
        if name.startswith("diffusion_pytorch_model") and name not in written:
            os.remove(os.path.join(folder, name))
    save_json(config, os.path.join(folder, "config.json"))


def weights_hash(folder):
    """Short hash of a component's weight files, to key what was measured with them."""
    digest = hashlib.sha256()
    for path in sorted(weight_files(folder)):
        with open(path, "rb") as f:
            while chunk := f.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def read_scheduler(folder):
    """A diffusers scheduler/ folder -> (schedule, prediction, shift or None); raises UserError."""
    c = load_json(os.path.join(folder, "scheduler_config.json"))
    if "FlowMatch" in c.get("_class_name", "") or c.get("use_flow_sigmas") or c.get("prediction_type") == "flow_prediction":
        return Flow(), "flow_v", float(c.get("shift") or c.get("flow_shift") or 1.0)
    kind = {"epsilon": "eps", "v_prediction": "vp_v", "sample": "x0"}.get(c.get("prediction_type", "epsilon"))
    if kind is None or c.get("beta_schedule") not in ("linear", "scaled_linear"):
        raise UserError(f"{folder}: prediction_type {c.get('prediction_type')!r} with beta_schedule {c.get('beta_schedule')!r} "
                        "is not supported (linear or scaled_linear; epsilon, v_prediction or sample; or a flow scheduler)")
    if not {"beta_start", "beta_end"} <= set(c):
        raise UserError(f"{folder}: scheduler_config.json lacks beta_start or beta_end: restore it from the source of the checkpoint")
    zero_snr = bool(c.get("rescale_betas_zero_snr"))
    if zero_snr and kind == "eps":
        raise UserError(f"{folder}: an eps network says nothing about x0 at zero terminal SNR: use v_prediction or sample")
    return VP(c["beta_schedule"], c["beta_start"], c["beta_end"], c.get("num_train_timesteps", 1000), zero_snr), kind, None


def student_folder(folder):
    """A run folder of ours -> its student/; any other folder -> itself."""
    return os.path.join(folder, "student") if os.path.isdir(os.path.join(folder, "student")) else folder


def network_folder(folder):
    """The component that a --teacher folder stands for: a pipeline root's transformer/, a run's student/, or the folder itself."""
    return os.path.join(folder, "transformer") if os.path.isfile(os.path.join(folder, "model_index.json")) else student_folder(folder)


def load_two_networks(root, dtype=torch.float32):
    """Read a pipeline root with transformer/ and transformer_2/ (Wan 2.2 A14B) -> (WanTwoNetworks, config of each). Raises UserError."""
    from models.wan import WanTwoNetworks  # as network_from_config: only the class that is asked for

    index = os.path.join(root, "model_index.json")
    boundary = load_json(index).get("boundary_ratio")
    if not isinstance(boundary, (int, float)) or not 0 < boundary < 1:
        raise UserError(f"{index}: boundary_ratio is {boundary!r}, and a two-network teacher changes networks at one within (0, 1): "
                        "restore it from the source of the checkpoint")
    if not os.path.isdir(os.path.join(root, "transformer")):
        raise UserError(f"{root} has transformer_2/ but no transformer/: a two-network teacher needs both")
    (high, config), (low, config_2) = (load_network(os.path.join(root, name), dtype) for name in ("transformer", "transformer_2"))
    try:
        return WanTwoNetworks(high, low, boundary).eval(), config, config_2
    except ValueError as e:
        raise UserError(f"{root}: {e}") from None


def load_teacher(name, worlds, dtype=torch.float32, two_networks=False):
    """Resolve --teacher: a world's name, a component folder, a pipeline root, a run folder of ours, or ckpts/NAME in a TRELLIS root.

    two_networks: whether a root with transformer_2/ is welcome (its net is a WanTwoNetworks) or refused. Raises UserError.
    -> namespace(net, config, config_2, folder or None, schedule, prediction, shift, world_name or None, label). Of two networks,
    config is transformer/'s, config_2 transformer_2/'s (else None), and folder the root, which holds no weights itself.
    """
    if name in worlds:
        from models.toy import load_world  # the worlds use this file too

        world = load_world(name)
        if not hasattr(world, "teacher_folder"):  # a closed form, no checkpoint
            net = world.teacher()
            return types.SimpleNamespace(net=net, config=None, config_2=None, folder=None, schedule=Flow(), prediction=net.prediction,
                                         shift=net.default_shift, world_name=name, label=name)
        folder = world.teacher_folder()
    else:
        folder = name.rstrip("/")
        if not os.path.isdir(folder) and not trellis_path(folder):
            raise UserError(f"--teacher {name}: neither an embedded world ({', '.join(worlds)}) nor a folder")
        if os.path.isdir(folder) and not os.listdir(folder):
            raise UserError(f"--teacher {name}: the folder is empty")
    root, config_2 = folder, None
    two = os.path.isfile(os.path.join(root, "model_index.json")) and os.path.isdir(os.path.join(root, "transformer_2"))
    if two and not two_networks:
        raise UserError(f"{root} is a two-network teacher (transformer_2/): give one of its component folders")
    folder = network_folder(root)
    if two:
        net, config, config_2 = load_two_networks(root, dtype)
    else:
        net, config = load_network(folder, dtype)
    if not hasattr(net, "prediction"):
        raise UserError(f"{folder} is a {type(net).__name__}, which does not denoise: give a diffusion or flow network")
    schedule, prediction, timestep_shift = getattr(net, "default_schedule", Flow()), net.prediction, net.default_shift
    scheduler = next((s for s in (os.path.join(root, "scheduler"), os.path.join(os.path.dirname(os.path.abspath(folder)), "scheduler"))
                      if os.path.isfile(os.path.join(s, "scheduler_config.json"))), None)
    if scheduler:
        schedule, prediction, own_shift = read_scheduler(scheduler)
        timestep_shift = own_shift or timestep_shift
    elif os.path.isfile(os.path.join(folder, "sampler.json")):
        schedule, prediction, timestep_shift = read_sampler(folder)[1:]
    return types.SimpleNamespace(net=net, config=config, config_2=config_2, folder=root if two else folder, schedule=schedule,
                                 prediction=prediction, shift=timestep_shift, world_name=config.get("world"), label=name if name in worlds else
                                 os.path.basename(os.path.abspath(root)))


def load_student_init(folder, like):
    """--student_init: a network of the teacher's architecture to start from, or one that linvideo.py gave linear attention -> net.
    Raises UserError if it is not `like` the teacher's."""
    net, _ = load_network(student_folder(folder))
    shapes = [{k: v.shape for k, v in lora.base_state_dict(n).items() if ".attend." not in k} for n in (net, like)]  # linear attention's own
    if type(net) is not type(like) or shapes[0] != shapes[1]:
        raise UserError(f"--student_init {folder}: this {type(net).__name__} does not have the shapes of the teacher's {type(like).__name__}; "
                        "student and fake are copies of the teacher's network")
    return net


def told_steps(net):
    """-> a copy of net that also takes `steps`, through a new layer that is zero at first: still net's function."""
    told = type(net)(**{**net.config, "steps_cond": True}).to(next(net.parameters()).device)
    told.load_state_dict(net.state_dict(), strict=False)
    return told


def start_teacher(args, worlds, two_networks=False):
    """--teacher, with --timestep_shift if given -> its namespace as load_teacher's, and .base: the network that student and
    fake are copies of, or adapters on. That is the teacher's own, except that a closed-form teacher has no weights and .base is fitted to it."""
    from models.toy import fit_ring_network

    teacher = load_teacher(args.teacher, worlds, two_networks=two_networks)
    teacher.base = teacher.net if teacher.config else fit_ring_network(teacher.net, args.seed)
    if not teacher.config:
        teacher.config = network_config(teacher.base)
    if args.timestep_shift is not None:
        teacher.shift = args.timestep_shift
    return teacher


def freeze_teacher(args, teacher, device):
    """Nothing of the teacher is trained; in bf16 its weights are so too."""
    if args.mixed_precision == "bf16" and device.type == "cuda":
        for p in teacher.net.parameters():  # before they are on the GPU; the buffers (rotary angles) stay float32
            p.data = p.data.bfloat16()
    for net in (teacher.net, teacher.base):
        net.to(device).requires_grad_(False).eval()


def tells_step(args, net):
    """Whether the fake, a network like net, is told which of several student steps made its samples."""
    return args.student_steps > 1 and not args.shared_fake and "steps_cond" in net.config


def load_networks(args, worlds, device, tells=None):
    """-> teacher namespace, student, fake: copies of teacher.base, except that --student_init may start the student elsewhere.
    tells(net) -> whether the student and whether the fake also take `steps`; if left out the student does not, and the fake by tells_step."""
    teacher = start_teacher(args, worlds)
    told = tells(teacher.base) if tells else (False, tells_step(args, teacher.base))
    starts = load_student_init(args.student_init, teacher.base) if args.student_init else teacher.base, teacher.base
    student, fake = (told_steps(net) if takes else copy.deepcopy(net) for net, takes in zip(starts, told))
    for net in (student, fake):
        net.to(device).requires_grad_(True).train()
        net.gradient_checkpointing = args.gradient_checkpointing
    freeze_teacher(args, teacher, device)
    return teacher, student, fake


def is_small(name, worlds):
    """Whether --teacher is a world or a folder with one of our own small networks: they share default flags."""
    config = os.path.join(network_folder(name), "config.json")
    return name in worlds or os.path.isfile(config) and load_json(config).get("_class_name") in ("DiT", "RingMLP")


def describe_schedule(schedule):
    """A schedule as JSON, for sampler.json."""
    if isinstance(schedule, Flow):
        return {"type": "flow"}
    return {"type": "vp", "betas": schedule.name, "n": schedule.n, "zero_snr": schedule.zero_snr,
            "beta_start": schedule.beta_start, "beta_end": schedule.beta_end}


def read_sampler(folder):
    """sampler.json of a student folder -> (dict, schedule, prediction, shift); raises UserError."""
    path = os.path.join(folder, "sampler.json")
    s = load_json(path)
    try:
        kind = s["schedule"]
        schedule = Flow() if kind["type"] == "flow" else VP(kind["betas"], kind["beta_start"], kind["beta_end"], kind["n"], kind["zero_snr"])
        if s["prediction"] not in PREDICTIONS:
            raise ValueError(f"prediction {s['prediction']!r}")
        times = [float(t) for t in s["times"]]
        if not times or any(a <= b for a, b in zip(times, times[1:])) or not (0 < times[-1] and times[0] <= 1):
            raise ValueError(f"times {times} do not descend within (0, 1]")
        return s, schedule, s["prediction"], float(s["timestep_shift"])
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} is not a sampler description of ours ({type(e).__name__}: {e})") from None


def read_own_sampler(sample, method):
    """--sample: a run or student folder -> its student folder and what read_sampler gives. Raises UserError also for another script's."""
    folder = student_folder(sample)
    sampler, *rest = read_sampler(folder)
    if sampler["method"] != method:
        raise UserError(f"{sample} was made by {sampler['method']}: sample it with python {sampler['method']}.py --sample")
    return folder, sampler, *rest


# ---- conditioning and data -----------------------------------------------------------------------------------------


class Prompts:
    """--prompts FILE.safetensors: cond.NAME (N, ...) and uncond.NAME (1, ...), read row by row from disk."""

    def __init__(self, path, names, widths):
        """names: the conditioning inputs the network takes; widths: {name: required last dimension}."""
        self.file, self.names = open_tensors(path), names
        keys = set(self.file.keys())
        for name in names:
            for key in (f"cond.{name}", f"uncond.{name}"):
                if key not in keys:
                    raise UserError(f"{path} lacks {key!r}; it has {', '.join(sorted(keys)) or 'nothing'}")
            shape, un = (self.file.get_slice(f"{p}.{name}").get_shape() for p in ("cond", "uncond"))
            want = widths.get(name)
            if want and (shape[-1] != want or un[-1] != want):
                raise UserError(f"{path}: {name!r} embeddings are {shape[-1]} wide (unconditional {un[-1]}), the teacher takes {want}")
            if not shape[0] or un[0] != 1 or shape[1:] != un[1:]:
                raise UserError(f"{path}: cond.{name} is {shape} and uncond.{name} {un}; wanted (N, ...) with N >= 1 and (1, ...) alike")
        counts = {self.file.get_slice(f"cond.{n}").get_shape()[0] for n in names}
        if len(counts) != 1:
            raise UserError(f"{path}: the cond.* tensors disagree on the number of prompts: {sorted(counts)}")
        self.n = counts.pop()

    def fingerprint(self):
        """Short hash of number, first, last and unconditional prompt: tells two files apart without reading all."""
        ends = [self.rows(torch.tensor([0, self.n - 1]), "cpu"), self.unconditional(1, "cpu")]
        return f"{stable_hash(self.n, *(x.double().sum(-1).tolist() for end in ends for x in end.values())):08x}"

    def rows(self, index, device):
        """index (B,) -> {name: (B, ...)}; float inputs as float32."""
        return {name: Rows(self.file, f"cond.{name}")[index].to(device) for name in self.names}

    def unconditional(self, n, device):
        """The unconditional inputs repeated n times, {name: (n, ...)}."""
        one = {k: as_float32(self.file.get_tensor(f"uncond.{k}")).to(device) for k in self.names}
        return {k: v.expand(n, *v.shape[1:]) for k, v in one.items()}


class Conditions:
    """Where cond comes from: class labels drawn evenly, or rows of --prompts. Each has its unconditional twin."""

    def __init__(self, args, net):
        self.prompts = None
        if "label" not in net.cond_names:
            if not args.prompts:
                raise UserError(f"a {type(net).__name__} teacher needs --prompts FILE.safetensors with "
                                   + " and ".join(f"cond.{n}, uncond.{n}" for n in net.cond_names))
            self.prompts = Prompts(args.prompts, net.cond_names, {"text": getattr(net, "text_dim", None)})
        elif args.prompts:
            raise UserError(f"--prompts: the teacher is a {type(net).__name__} and takes class labels, not prompts")
        self.classes = getattr(net, "num_classes", 0)

    def index(self, draw):
        """Which class or prompt each of these rows gets.  (B,) int64."""
        return draw.integer("cond", self.prompts.n if self.prompts else max(1, self.classes))

    def draw(self, draw, device):
        """A batch of conditions for these rows.  -> cond, uncond, dicts of (B, ...)."""
        return self.pick(self.index(draw), device)

    def pick(self, index, device):
        if self.prompts:
            return self.prompts.rows(index, device), self.prompts.unconditional(len(index), device)
        return {"label": index.to(device)}, {"label": torch.full_like(index, self.classes).to(device)}

    def preview(self, n):
        """Balanced classes, or the first n prompts.  (n,) int64."""
        return torch.arange(n) % (self.prompts.n if self.prompts else max(1, self.classes))


class DataConditions:
    """Conditions that come with the data: rows of --data's cond.*, and for sparse data the points of the same sample. Unconditional: zeros."""

    prompts = None

    def __init__(self, data, cond):
        self.points, self.cond = data if isinstance(data, SparseRows) else None, cond

    def pick(self, index, device):
        cond = {k: v[index].to(device) for k, v in self.cond.items()}
        at = {"coords": self.points[index][1].to(device)} if self.points else {}
        return {**cond, **at}, {**{k: torch.zeros_like(v) for k, v in cond.items()}, **at}

    def preview(self, n):
        """The first n samples of the data.  (n,) int64."""
        return torch.arange(n) % len(next(iter(self.cond.values())))


@torch.no_grad()
def try_network(net, conditions, shape, device, **more):
    """One call before any training, where wrong shapes and prompts show -> what net returns for one sample.  Raises UserError."""
    cond, _ = conditions.pick(torch.zeros(1, dtype=torch.long), device)
    x = torch.zeros(len(cond["coords"]), shape[0], device=device) if "coords" in cond else torch.zeros(1, *shape, device=device)
    try:
        return net(x, torch.ones(1, device=device), **cond, **more)
    except ValueError as e:
        raise UserError(str(e)) from None


def as_float32(x):
    return x.float() if x.is_floating_point() else x


def read_image(path, size):
    """Decode one image of any kind to RGB (3, size, size) uint8: first frame, EXIF turned, 16-bit scaled to 8,
    transparency laid on white, shorter side resized to `size`, centre crop. Raises what Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", message=".*Palette images with Transparency.*")
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: Pillow's own convert() would clip it
                values = np.asarray(image, np.float64)
                image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_map(path, size, image):
    """Decode one segmentation map, a grey, palette or one-bit PNG whose values are class numbers -> uint8 (size, size), cropped as
    read_image crops `image`. Raises ValueError for colours, classes above 255, and another shape than the image's, and what Pillow raises."""
    with Image.open(image) as picture:
        want = picture.size[::-1] if picture.getexif().get(0x0112, 1) >= 5 else picture.size  # as seen, turned by EXIF
    with Image.open(path) as plan:
        plan.load()
        if plan.mode not in ("L", "P", "1") and not plan.mode.startswith("I"):
            raise ValueError(f"a map of mode {plan.mode}: save class numbers as a grey or palette PNG")
        if abs(plan.width * want[1] - plan.height * want[0]) > max(*want, *plan.size):
            raise ValueError(f"the map is {plan.width} x {plan.height}, its image {want[0]} x {want[1]}")
        values = np.asarray(plan).astype(np.int64)
        if values.min() < 0 or values.max() > 255:
            raise ValueError(f"a map with class {values.max() if values.max() > 255 else values.min()}: classes are 0 to 254, 255 is none")
        plan = Image.fromarray(values.astype(np.uint8))
        return torch.from_numpy(np.array(ImageOps.fit(plan, (size, size), Image.Resampling.NEAREST)))


def read_image_folder(folder, size, flat=False, maps=None):
    """Images in class subfolders -> (x uint8 (N, 3, size, size), label int64 (N,), class names, maps uint8 (N, size, size) or None).

    Unreadable files are named and skipped; a file reached twice through links counts once. flat: a folder without subfolders is one
    class. maps: a folder with a PNG of the same relative name for each image. Raises UserError when nothing is left.
    """
    classes = sorted(d for d in os.listdir(folder) if os.path.isdir(os.path.join(folder, d)) and not d.startswith("."))
    if not classes and not flat:
        raise UserError(f"--data {folder}: no class subfolders; put images in {folder}/<class>/...")
    x, label, names, plans, seen, skipped = [], [], [], [], set(), []
    for name in classes or [""]:
        before = len(x)
        for where, _, files in sorted(os.walk(os.path.join(folder, name))):
            for file in sorted(files):
                path = os.path.join(where, file)
                real = os.path.realpath(path)
                if real in seen:
                    continue
                seen.add(real)
                try:
                    image = read_image(path, size)
                    if maps:
                        plans.append(read_map(os.path.join(maps, os.path.splitext(os.path.relpath(path, folder))[0] + ".png"), size, path))
                    x.append(image)
                    label.append(len(names))
                except Exception as e:  # Pillow's decoders raise many kinds; whatever the file does, the run goes on
                    skipped.append(path)
                    print(f"skipped {path}: {type(e).__name__}: {' '.join(str(e).split())}", file=sys.stderr)
        if len(x) > before:
            names.append(name or os.path.basename(os.path.abspath(folder)))
    if not x:
        with_map = f" with a map in {maps}" if maps else ""
        where = f"{len(classes)} class subfolders" if classes else "it"
        raise UserError(f"--data {folder}: no readable image{with_map} in {where} ({len(skipped)} files skipped)")
    return torch.stack(x), torch.tensor(label), names, torch.stack(plans) if maps else None


def load_data(source, worlds, size=None, pool=20000, seed=0, flat=False, maps=None, sparse=False):
    """--data: a world's name, a folder of images in class subfolders, or FILE.safetensors with x0 (N, ...) or, for points of a grid,
    coords (M, 3), feats (M, C), offsets (N + 1,); beside either cond.NAME (N, ...). size: side of images, or of the grid; sparse: whether
    points are welcome or refused. flat, maps: of folders, see read_image_folder; maps True asks a world for its own. They become cond["map"].

    -> (x0 float32 (N, ...), uint8 images or SparseRows, {"label": (N,)} or other cond, class names or None). Raises UserError.
    """
    if source in worlds:
        from models.toy import load_world

        world = load_world(source)
        if maps:
            x0, label, plans = world.scenes(pool, seed + 1000003)
            return x0, {"label": label, "map": plans}, world.class_names
        x0, label = world.data(pool, seed + 1000003)  # apart from every measuring set
        return x0, {"label": label}, world.class_names
    if os.path.isdir(source):
        x0, label, names, plans = read_image_folder(source, size or 32, flat, maps)
        return x0, {"label": label, **({} if plans is None else {"map": plans})}, names
    if not source.endswith(".safetensors"):
        raise UserError(f"--data {source}: neither an embedded world ({', '.join(worlds)}), a folder, nor a .safetensors file")
    file = open_tensors(source)
    if {"coords", "feats", "offsets"} <= set(file.keys()) and "x0" not in file.keys():
        if not sparse:
            raise UserError(f"--data {source}: coords, feats and offsets are points of a grid, which are not welcome here: give a tensor x0 (N, ...)")
        x0 = SparseRows(file, f"--data {source}", size)
    elif "x0" in file.keys() and file.get_slice("x0").get_shape()[:1] not in ([], [0]):
        x0 = Rows(file, "x0")
    else:
        raise UserError(f"--data {source}: no tensor called x0 with at least one row, nor coords, feats and offsets; "
                        f"it has {', '.join(sorted(file.keys())) or 'nothing'}")
    cond = {k[5:]: Rows(file, k) for k in file.keys() if k.startswith("cond.")}
    for k, v in cond.items():
        if len(v) != len(x0):
            raise UserError(f"--data {source}: cond.{k} has {len(v)} rows, {'offsets' if isinstance(x0, SparseRows) else 'x0'} has {len(x0)}")
    if "label" in cond:
        cond["label"] = cond["label"][torch.arange(len(x0))].long()
    return x0, cond, None


class Rows:
    """A tensor of an open safetensors file, read row by row: rows[index (B,)] -> (B, ...), floats as float32."""

    def __init__(self, file, key):
        self.slice = file.get_slice(key)
        self.shape = tuple(self.slice.get_shape())

    def __len__(self):
        return self.shape[0]

    def dim(self):
        return len(self.shape)

    def __getitem__(self, index):
        return as_float32(torch.cat([self.slice[i:i + 1] for i in index.tolist()]))


class SparseRows:
    """Samples that are points of a grid: coords (M, 3) int and feats (M, C), sample i from row offsets[i] to offsets[i + 1].

    rows[index (B,)] -> feats (n, C) float32 and coords (n, 4) int64 of these samples' points: place in index, then x, y, z. Features
    are read when asked for; coords once as a whole, so that a broken file (UserError, one line) is seen before any training.
    """

    def __init__(self, file, where, size=None):
        """where: what an error begins with; size: points must lie within 0..size-1 on each axis, None: within 0..infinity."""
        self.feats, self.coords = file.get_slice("feats"), file.get_slice("coords")
        self.offsets, shape, feats = file.get_tensor("offsets"), self.coords.get_shape(), self.feats.get_shape()
        if len(shape) != 2 or shape[1] != 3 or self.coords.get_dtype()[0] not in "IU" or len(feats) != 2 or feats[0] != shape[0]:
            raise UserError(f"{where}: coords is {self.coords.get_dtype()} {shape} and feats {feats}; wanted integers (M, 3) and (M, C)")
        if self.offsets.dim() != 1 or len(self.offsets) < 2 or self.offsets.is_floating_point():
            raise UserError(f"{where}: offsets is {self.offsets.dtype} {list(self.offsets.shape)}; wanted N + 1 integers, N >= 1")
        self.offsets = self.offsets.long().tolist()
        if self.offsets[0] != 0 or self.offsets[-1] != shape[0]:
            raise UserError(f"{where}: offsets go from {self.offsets[0]} to {self.offsets[-1]}; wanted 0 to the {shape[0]} rows of coords")
        empty = next((i for i in range(len(self)) if self.offsets[i] >= self.offsets[i + 1]), None)
        if empty is not None:
            raise UserError(f"{where}: offsets must grow, but {self.offsets[empty + 1]} follows {self.offsets[empty]} (sample {empty} has no points)")
        for start in range(0, shape[0], 2**22):
            part = self.coords[start:start + 2**22].long()
            low, high = int(part.min()), int(part.max())
            if low < 0 or size is not None and high >= size:
                raise UserError(f"{where}: coords go from {low} to {high}; they must be within 0..{'' if size is None else size - 1}")

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, index):
        spans = [slice(self.offsets[i], self.offsets[i + 1]) for i in index.tolist()]
        coords = [torch.nn.functional.pad(self.coords[span].long(), (1, 0), value=place) for place, span in enumerate(spans)]
        return as_float32(torch.cat([self.feats[span] for span in spans])), torch.cat(coords)


class Bank:
    """A folder of files 00000.safetensors, ... with the same tensors (rows, K, ...) in each, written once and read state by state."""

    def __init__(self, folder, about, size, batch, create):
        """about: what the bank was made with, kept in bank.json: another one's is refused. size: rows of all files, batch: of one. Raises UserError."""
        self.folder, self.size, self.batch = folder, size, batch
        path, about = os.path.join(folder, "bank.json"), {**about, "batch": batch}
        if os.path.isfile(path):
            old = load_json(path)
            changed = [k for k in about if old.get(k) != about[k]]
            if changed:
                raise UserError(f"--bank {folder} was made with another {', '.join(changed)}: name another folder, or remove this one")
        elif create:
            os.makedirs(folder, exist_ok=True)
            save_json(about, path)

    def path(self, part):
        return os.path.join(self.folder, f"{part:05d}.safetensors")

    def rows_of(self, part):
        return range(part * self.batch, min(self.size, (part + 1) * self.batch))

    def missing(self):
        """Numbers of the files that are not there yet."""
        return [part for part in range(-(-self.size // self.batch)) if not os.path.isfile(self.path(part))]

    def write(self, part, tensors):
        save_tensors(tensors, self.path(part))

    def open(self):
        """Raises UserError for a file that is not whole or lacks a tensor."""
        self.files = [open_tensors(self.path(part)) for part in range(-(-self.size // self.batch))]
        for part, file in enumerate(self.files):
            if not {"index", "x", "v"} <= set(file.keys()) or file.get_slice("x").get_shape()[0] != len(self.rows_of(part)):
                raise UserError(f"{self.path(part)} is not a whole part of a bank: remove it, and it is made again")
        return self

    def rows(self, row, state):
        """row, state (B,) -> {"index": (B,) int64, "x", "v", ...: (B, ...) float32}."""
        of = [(self.files[r // self.batch], r % self.batch, i) for r, i in zip(row.tolist(), state.tolist())]
        return {"index": torch.stack([f.get_slice("index")[r] for f, r, _ in of]),
                **{name: torch.stack([f.get_slice(name)[r, i].float() for f, r, i in of]) for name in self.files[0].keys() if name != "index"}}


def load_real_data(args, worlds, world, teacher, shape):
    """--data or the world's own data, for a GAN -> x0 (N, ...), cond of the teacher's names. Raises UserError where labels, classes or shapes are
    not the teacher's."""
    source = args.data or world.name
    data, cond, class_names = load_data(source, worlds, shape[-1], seed=args.seed)
    if source in worlds and shape == getattr(world, "latent_shape", None):  # a latent teacher of that world
        data = world.space.to_latents(data)
    known = teacher.config.get("class_names") or getattr(world, "class_names", None)
    if class_names and known and list(class_names) != list(known):
        raise UserError(f"--data {source}: its classes are {', '.join(class_names)}, the teacher's {', '.join(known)}: labels would mean other things")
    if "label" in cond and not 0 <= cond["label"].min() <= cond["label"].max() < teacher.base.num_classes:
        raise UserError(f"--data {source}: labels from {cond['label'].min()} to {cond['label'].max()}, the teacher has classes 0 to "
                        f"{teacher.base.num_classes - 1}")
    if tuple(data.shape[1:]) != shape or set(cond) != set(teacher.base.cond_names):
        raise UserError(f"--data: items are {tuple(data.shape[1:])} with {sorted(cond)}, the teacher takes {shape} with {list(teacher.base.cond_names)}")
    return data, cond


def load_paired_data(args, worlds, world, teacher, shape, sparse):
    """--data or the world's own: what velocity matching noises -> x0 (N, ...) or, for a sparse network, SparseRows; cond. As load_real_data. Raises UserError."""
    if not args.data and not world:
        raise UserError(f"--data: a {type(teacher.base).__name__} teacher needs FILE.safetensors with {'coords, feats, offsets' if sparse else 'x0'} and "
                        + " and ".join(f"cond.{n}" for n in teacher.base.cond_names))
    if not sparse:
        return load_real_data(args, worlds, world, teacher, shape)
    data, cond, _ = load_data(args.data, worlds, shape[-1], sparse=True)
    if not isinstance(data, SparseRows):
        raise UserError(f"--data {args.data}: this {type(teacher.base).__name__} works on points: give coords, feats and offsets, not x0")
    channels = data[torch.zeros(1, dtype=torch.long)][0].shape[1]
    if channels != shape[0] or set(cond) != set(teacher.base.cond_names):
        raise UserError(f"--data: points have {channels} channels, with {sorted(cond)}; the teacher takes {shape[0]}, with {list(teacher.base.cond_names)}")
    return data, cond


def ragged(x, coords):
    """A sparse batch as the tensors of a file: coords (M, 3), feats (M, C), offsets (N + 1,), as --data has them."""
    counts = coords[:, 0].bincount().cumsum(0)
    return {"coords": coords[:, 1:].int(), "feats": x, "offsets": torch.cat([counts.new_zeros(1), counts])}


def to_unit(x):
    """uint8 images -> float32 in [-1, 1]; floats unchanged."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()


# ---- output folder, log, resume ------------------------------------------------------------------------------------


def default_output_dir(method, source, sampled):
    """runs/<method>-<teacher or data>; what --sample draws from a run's student goes to runs/<that run>-samples."""
    if sampled is None:
        return os.path.join("runs", f"{method}-{os.path.basename(os.path.abspath(source))}")
    path = os.path.abspath(sampled)
    run = os.path.dirname(path) if os.path.basename(path) == "student" else path  # runs/dmd-glyphs/student -> dmd-glyphs
    return os.path.join("runs", os.path.basename(run) + "-samples")


def refuse_output_dir(path, sampling=False):
    """Raises UserError where nothing can be written, and for --sample where samples would replace a run's own."""
    there = os.path.abspath(path)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        raise UserError(f"--output_dir {path}: {there} is not a folder that can be written to")
    if os.path.commonpath([os.path.abspath(path), os.getcwd()]) == os.path.abspath(path):
        raise UserError(f"--output_dir {path} holds the current folder: name a folder of its own")
    if sampling and os.path.exists(os.path.join(path, "report.json")):
        raise UserError(f"--output_dir {path} is a run with samples of its own: name another folder for those of --sample")


def prepare_output_dir(path, resume):
    """Create the folder; without --resume_from_checkpoint an existing one is renamed PATH.1, PATH.2, ... With it, what a killed
    run left half-written is removed."""
    path = os.path.normpath(path)  # "runs/x/" could not be renamed to "runs/x/.1"
    refuse_output_dir(path)
    if os.path.isdir(path) and os.listdir(path) and not resume:
        n = 1
        while os.path.exists(f"{path}.{n}"):
            n += 1
        os.rename(path, f"{path}.{n}")
        print(f"{path} existed and is now {path}.{n}")
    os.makedirs(os.path.join(path, "state"), exist_ok=True)
    for where, folders, files in os.walk(path):
        for name in [f for f in files if ".tmp-" in f]:
            os.remove(os.path.join(where, name))
        for name in [d for d in folders if d.startswith(".tmp-")]:
            shutil.rmtree(os.path.join(where, name))


def pack_optimizer(optimizer, prefix):
    """AdamW state as named tensors for a safetensors file."""
    return {f"{prefix}.{i}.{k}": torch.as_tensor(v) for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}


def unpack_optimizer(optimizer, prefix, tensors):
    """Inverse of pack_optimizer; parameter groups keep the values of this run's flags."""
    state = {}
    for key, value in tensors.items():
        if key.startswith(prefix + "."):
            i, name = key[len(prefix) + 1:].split(".")
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def pack_module(module, prefix):
    return {f"{prefix}.{k}": v for k, v in module.state_dict().items()}


def unpack_module(module, prefix, tensors):
    module.load_state_dict({k[len(prefix) + 1:]: v for k, v in tensors.items() if k.startswith(prefix + ".")})


def save_state(output_dir, step, tensors, info, keep=2):
    """state/step-NNNNNNN/ appears in one rename, complete or not at all; older ones beyond `keep` are removed after."""
    root = os.path.join(output_dir, "state")
    tmp, final = os.path.join(root, f".tmp-{step}"), os.path.join(root, f"step-{step:07d}")
    shutil.rmtree(tmp, ignore_errors=True)
    os.makedirs(tmp)
    save_tensors(tensors, os.path.join(tmp, "state.safetensors"))
    save_json({"step": step, **info}, os.path.join(tmp, "state.json"))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(tmp, final)
    fsync_folder(root)
    for old in sorted(n for n in os.listdir(root) if n.startswith("step-"))[:-keep]:
        shutil.rmtree(os.path.join(root, old), ignore_errors=True)


def find_state(output_dir, resume):
    """--resume_from_checkpoint -> folder of a complete state, or None to start fresh. Raises UserError."""
    if resume is None:
        return None
    if resume != "latest":
        if not os.path.isfile(os.path.join(resume, "state.json")):
            raise UserError(f"--resume_from_checkpoint {resume}: no state.json there")
        return resume
    root = os.path.join(output_dir, "state")
    done = sorted(n for n in (os.listdir(root) if os.path.isdir(root) else []) if n.startswith("step-"))
    if not done:
        print(f"no complete checkpoint under {root}: starting fresh")
        return None
    return os.path.join(root, done[-1])


FREE_TO_CHANGE = {"output_dir", "max_train_steps", "resume_from_checkpoint", "checkpointing_steps", "sample", "remeasure_teacher",
                  "preview_samples"}


def check_same_flags(info, args):
    """info: state.json. Flags that alter the loss must be those of the interrupted run; each changed one is named. Raises UserError."""
    saved = info["flags"]
    now = {k: v for k, v in vars(args).items() if k not in FREE_TO_CHANGE}
    changed = [f"--{k} was {saved.get(k)!r} and is {now.get(k)!r}" for k in sorted(set(saved) | set(now)) if saved.get(k) != now.get(k)]
    if info["step"] > args.max_train_steps:
        raise UserError(f"the checkpoint is at step {info['step']}, beyond --max_train_steps {args.max_train_steps}: give at least {info['step']}")
    if changed:
        raise UserError(f"cannot resume with other flags: {'; '.join(changed)}. Give the old values or another --output_dir")


def flags_to_save(args):
    return {k: v for k, v in vars(args).items() if k not in FREE_TO_CHANGE}


def resume(args, modules, optimizers):
    """--resume_from_checkpoint: fill modules {name: module} and optimizers {name: optimizer} from that state -> its step and the seconds spent so far,
    0 and 0.0 for a fresh start.  Raises UserError."""
    state = find_state(args.output_dir, args.resume_from_checkpoint)
    if not state:
        return 0, 0.0
    info, tensors = load_json(os.path.join(state, "state.json")), load_tensors(os.path.join(state, "state.safetensors"))
    check_same_flags(info, args)
    for name, module in modules.items():
        unpack_module(module, name, tensors)
    for name, optimizer in optimizers.items():
        unpack_optimizer(optimizer, name, tensors)
    return info["step"], info["seconds"]


def save_for_resume(args, step, modules, optimizers, seconds):
    """The state that resume reads, for the same modules and optimizers."""
    tensors = {}
    for name, module in modules.items():
        tensors |= pack_module(module, name)
    for name, optimizer in optimizers.items():
        tensors |= pack_optimizer(optimizer, name)
    save_state(args.output_dir, step, tensors, {"flags": flags_to_save(args), "seconds": seconds})


class Log:
    """log.csv: one row a step, flushed; on resume it is cut back to the resumed step."""

    def __init__(self, output_dir, step=0):
        self.path, self.columns = os.path.join(output_dir, "log.csv"), None
        kept = []
        if step and os.path.isfile(self.path):
            with open(self.path, newline="") as f:
                rows = list(csv.reader(f))
            if rows:
                self.columns = rows[0]
                kept = [r for r in rows[1:] if len(r) == len(self.columns) and r[0].isdigit() and int(r[0]) <= step]
        text = io.StringIO()
        if self.columns:
            csv.writer(text).writerows([self.columns, *kept])
        atomic_write(self.path, text.getvalue().encode())
        self.file = open(self.path, "a", newline="")

    def write(self, row):
        """row: {"step": int, name: number, ...}, the same names every time."""
        if self.columns is None:
            self.columns = list(row)
            csv.writer(self.file).writerow(self.columns)
        csv.writer(self.file).writerow([f"{row[c]:.6g}" if isinstance(row[c], float) else row[c] for c in self.columns])
        self.file.flush()


class Stopwatch:
    """Seconds of a step by network. watch(part) charges the time since the last call to that part; GPUs are waited for."""

    def __init__(self, device):
        self.device = device

    def restart(self):
        self.seconds, self.last = dict.fromkeys(("data", "student", "fake", "teacher"), 0.0), time.perf_counter()

    def __call__(self, part):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now

    def columns(self):
        return {f"{part}_s": seconds for part, seconds in self.seconds.items()}


def peak_memory_mb(device):
    """Peak memory in MiB: of the GPU's allocator, or of the process on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---- pictures --------------------------------------------------------------------------------------------------------


def picture(x, world=None, zoom=3):
    """One row of samples as (H, W, 3) uint8. A world draws its own; (n, 3, H, W) is taken as RGB in [-1, 1]; other
    latents are shown as their first three channels, each scaled by its standard deviation. Videos (n, C, T, H, W) become
    filmstrips of up to five frames."""
    if world is not None:
        return world.picture(x)
    x = x.float().cpu()
    if x.dim() == 5:  # (n, C, T, H, W) -> (n * up to 5, C, H, W)
        x = x[:, :, torch.linspace(0, x.shape[2] - 1, min(5, x.shape[2])).round().long()].transpose(1, 2).flatten(0, 1)
    if x.shape[1] != 3:
        x = x[:, :3] if x.shape[1] > 3 else x[:, :1].expand(-1, 3, -1, -1)
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (3 * x.std((0, 2, 3), keepdim=True) + 1e-6)
    return tile(x, zoom)


def tile(x, zoom=3):
    """Images (n, 1 or 3, H, W) in [-1, 1] -> one row of tiles, (H zoom + 2, n (W zoom + 2), 3) uint8."""
    tiles = ((x.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    tiles = tiles.repeat(zoom, 1).repeat(zoom, 2)
    return np.concatenate(list(np.pad(tiles, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)), axis=1)


def sheet(rows):
    """Labelled rows, [(text, (H, W, 3) uint8), ...] -> one image, the text above each row."""
    font, bar = ImageFont.load_default(), 16
    width = max(a.shape[1] for _, a in rows)
    image = Image.new("RGB", (width, sum(a.shape[0] + bar for _, a in rows)), "white")
    draw, y = ImageDraw.Draw(image), 0
    for text, a in rows:
        draw.text((4, y + 2), text, fill="black", font=font)
        image.paste(Image.fromarray(a), (0, y + bar))
        y += bar + a.shape[0]
    return image


def save_grid(path, rows):
    """The sheet of these rows as a PNG."""
    data = io.BytesIO()
    sheet(rows).save(data, "PNG")
    atomic_write(path, data.getvalue())


def save_gif(path, rows, world=None, ms=120):
    """Labelled rows of videos, [(text, (n, C, T, H, W)), ...] -> an endlessly looping GIF of their sheet."""
    images = [sheet([(text, picture(x[:, :, i:i + 1], world)) for text, x in rows]) for i in range(rows[0][1].shape[2])]
    data = io.BytesIO()
    images[0].save(data, "GIF", save_all=True, append_images=images[1:], duration=ms, loop=0)
    atomic_write(path, data.getvalue())


def print_table(results):
    """The short table a run ends with: one line a row of report.json."""
    columns = [c for c in ("name", "nfe", "fd", "fd_excess", "fd_teacher", "patch_swd", "accuracy", "diversity", "motion", "moving", "hole_mse", "mean_fill",
                               "shuffled", "known_error", "iou", "iou_shuffled", "connected", "ms_per_sample")
               if any(c in r for r in results)]
    cells = [columns] + [["" if r.get(c) is None else f"{r[c]:.3g}" if isinstance(r.get(c), float) else str(r[c]) for c in columns]
                         for r in results]
    for row in cells:
        print("  ".join(text.ljust(max(len(r[i]) for r in cells)) for i, text in enumerate(row)).rstrip())
