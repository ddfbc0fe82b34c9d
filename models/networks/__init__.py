"""The networks, the contract that they keep, and their files.

Each architecture has a file of its own. It is written out in plain PyTorch, uses the parameter
names of the library that it comes from (diffusers or TRELLIS), and loads that library's
checkpoints unconverted. NETWORKS maps class names, as configs state them, to classes.

THE CONTRACT. Scripts and plumbing rely on the following and on nothing else. tests/test_networks.py
checks it for every network here that denoises. An attribute stands on the class, or on the instance
where it depends on the config.

    attribute               meaning
    prediction              what forward returns, one of models.diffusion.PREDICTIONS
    default_shift           timestep shift of the sampler, a float; 1.0 is none
    default_schedule        noise schedule, models.diffusion.VP or Flow; left out for Flow
    latent_shape            (C, ...), the shape of one sample; on a class, the released one's
    cond_names              names of the conditioning arguments of forward, a tuple of str
    num_classes             with "label" in cond_names: K classes 0 .. K-1, and K is the null label
    text_dim                with "text" in cond_names: width of the text features
    pooled_dim              with "pooled" in cond_names: its width
    config                  keyword arguments that build the network again, type(net)(**net.config);
                            values as JSON gives them back, since config.json holds them
    gradient_checkpointing  bool, may be set: recompute blocks in backward instead of storing them
    lora_targets            endings of the names of the layers that an adapter changes by default

  Optional:
    lora_key(name)          name in an adapter file of a layer, or of any module with parameters or
                            parameter that is not called weight or bias (models/networks/lora.py)
    self_attentions         modules, in order, whose attribute `attend(q, k, v)` mixes the tokens
                            and may be replaced; q, k, v (B, N, heads, head_dim), and share= where
                            `sequence` is set (models/networks/sequence.py). Their dict `attends`
                            has what replaces it in calls with an adapter, by its name
    heads, head_dim         sizes of each of those
    sequence                None, or the ranks that share the tokens of each sample; a network
                            without it cannot be spread over ranks
    sparse                  True: samples are points, x is (N, C), and forward also takes `coords`
    uncond_names            of cond_names, those whose unconditional twin is stored and not zeros
    current_name(key)       today's name of a parameter that old files store as key
    if_copies_differ        where state_dict has a parameter under several names: the remedy for a
                            file in which these are not equal
    keep_float32            parts of names, such as "time_embedder": parameters with one of them
                            stay float32 when the network becomes bfloat16 (to_dtype), as in
                            diffusers' from_pretrained, and compute in float32, also under autocast
    lora_aliases            {ending of a layer's name: what some LoRA files call it}
    gathered                modules that are gathered one at a time where ranks share the network
                            (models/plumbing/sharding.py); left out for the elements of its lists

prediction, default_schedule, default_shift and latent_shape are fallbacks: what a checkpoint's
scheduler/ folder or the command line says comes first.

    forward(x, t, **cond, return_features=False, adapter=None)

    argument          meaning                                                 shape
    x                 noised samples                                          (B, *latent_shape)
    t                 time after the shift, 0 = data, 1 = noise; floats       (B,)
    label             classes, integers; None = the null label                (B,)
    text, tokens      features of prompts or of images                        (B, L, D)
    mask, text_mask   true where text is a token of the prompt                (B, L) bool or int
    pooled            one feature of the whole prompt (SDXL)                  (B, P)
    size              sizes of the image and its crop, in pixels (SDXL)       (B, 6)
    context           a picture beside x (DiT with context_channels)          (B, C', *size)
    coords            where sparse: sample, x, y, z of each point             (N, 4) int
    steps             an index or count of student steps; None = not given.   (B,)
                      Only a network with steps_cond in its config takes it
    return_features   True: return the output of block depth // 2, counted    (B, N, D), or (M, D)
                      from 0, in place of the prediction, and stop there; of  where sparse
                      a U-Net, that of its lowest level
    adapter           name of an adapter (models/networks/lora.py); None =
                      the bare network
    returns           the prediction                                          (B, *latent_shape)

Each conditioning input has an unconditional twin of the same shape: the null label, a stored
prompt, zeros for context and for tokens of images. Clock, sign and scale of a checkpoint are
converted inside forward and nowhere else. Samples of a batch do not influence one another.
Released architectures also take other sizes than latent_shape, if they divide into patches.
Parameters may be float32 or bfloat16; the output of released architectures has x's dtype, and what
scales every token is float32. forward raises ValueError, one line with cause and remedy, for
shapes and dtypes that do not fit, an unknown adapter, and `steps` that the network cannot take;
__init__ does so for a config that is not implemented. Layers that adapters may change are
lora.Linear. An architecture may have more inputs than these, but they must be optional.

WanTwoNetworks keeps the contract without being in NETWORKS: it is built of two networks, not of a
config. Autoencoders (models/networks/autoencoders.py; SparseStructureEncoder,
SparseStructureDecoder, SLatMeshDecoder) have a config and files too, but do not denoise and have no
`prediction`.
docs/adding.md has an example.
"""

import hashlib
import os
import re

import torch

from models.files import TensorWriter, UserError, load_json, open_tensors, save_json
from models.networks import lora
from models.networks.adm import UNetModel
from models.networks.autoencoders import AutoencoderKL, Identity, PatchPCA
from models.networks.cogvideox import CogVideoXTransformer3DModel
from models.networks.dit import DiT
from models.networks.dit_imagenet import DiTTransformer2DModel
from models.networks.lumina2 import Lumina2Transformer2DModel
from models.networks.pixart import PixArtTransformer2DModel
from models.networks.qwen_image import QwenImageTransformer2DModel
from models.networks.ring_dit import RingDiT
from models.networks.ring_mlp import RingMLP
from models.networks.trellis import (
    SLatFlowModel,
    SparseStructureDecoder,
    SparseStructureEncoder,
    SparseStructureFlowModel,
)
from models.networks.trellis_mesh import SLatMeshDecoder
from models.networks.unet import UNet2DConditionModel
from models.networks.wan import WanTransformer3DModel, WanTwoNetworks
from models.networks.z_image import ZImageTransformer2DModel
from models.shards import allocate, own_rows, rows_in, whole_tensor

NETWORKS = {
    "DiT": DiT,
    "RingDiT": RingDiT,
    "RingMLP": RingMLP,
    "WanTransformer3DModel": WanTransformer3DModel,
    "ZImageTransformer2DModel": ZImageTransformer2DModel,
    "PixArtTransformer2DModel": PixArtTransformer2DModel,
    "QwenImageTransformer2DModel": QwenImageTransformer2DModel,
    "Lumina2Transformer2DModel": Lumina2Transformer2DModel,
    "DiTTransformer2DModel": DiTTransformer2DModel,
    "CogVideoXTransformer3DModel": CogVideoXTransformer3DModel,
    "UNet2DConditionModel": UNet2DConditionModel,
    "UNetModel": UNetModel,
    "AutoencoderKL": AutoencoderKL,
    "PatchPCA": PatchPCA,
    "Identity": Identity,
    "SparseStructureFlowModel": SparseStructureFlowModel,
    "SparseStructureEncoder": SparseStructureEncoder,
    "SparseStructureDecoder": SparseStructureDecoder,
    "SLatFlowModel": SLatFlowModel,
    "SLatMeshDecoder": SLatMeshDecoder,
    # The name of PixArt's and DiT's class in older versions of diffusers and in the released
    # configs; network_class decides which of the two it is.
    "Transformer2DModel": PixArtTransformer2DModel,
    # Names in TRELLIS's released configs. Those classes differ only in how they save memory there.
    "ElasticSLatFlowModel": SLatFlowModel,
    "ElasticSLatMeshDecoder": SLatMeshDecoder,
}
TRELLIS = (
    *(SparseStructureFlowModel, SLatFlowModel),
    *(SparseStructureEncoder, SparseStructureDecoder, SLatMeshDecoder),
)
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
SHARD_BYTES = 5 * 10**9  # of a file; larger ones are awkward to move about


# ---- which files a network has -------------------------------------------------------------------


def trellis_names(folder):
    """Names of the networks in TRELLIS's layout, NAME.json + NAME.safetensors, in a folder."""
    if not os.path.isdir(folder):
        return []
    names = [n.removesuffix(".json") for n in sorted(os.listdir(folder)) if n.endswith(".json")]
    return [n for n in names if os.path.isfile(os.path.join(folder, n + ".safetensors"))]


def trellis_path(source):
    """DIR/NAME of a network in TRELLIS's layout, or None if source is none.

    source: that path, one of its two files, or a folder with exactly one such pair, which is what
    save_network leaves.
    """
    if os.path.isdir(source):
        if os.path.isfile(os.path.join(source, "config.json")):
            return None
        names = trellis_names(source)
        return os.path.join(source, names[0]) if len(names) == 1 else None
    path = source.removesuffix(".json").removesuffix(".safetensors")
    return path if os.path.isfile(path + ".json") or os.path.isfile(path + ".safetensors") else None


def weight_files(folder):
    """The safetensors files of a component -> {file: [keys], or None for all}. Raises UserError."""
    path = trellis_path(folder)
    if path and not os.path.isfile(path + ".safetensors") and os.path.isfile(path + ".pt"):
        raise UserError(
            f"{path}.safetensors does not exist, only a pickle ({os.path.basename(path)}.pt); "
            "pickles can run code and are never loaded: convert it"
        )
    if path:
        return {path + ".safetensors": None}
    if os.path.isfile(os.path.join(folder, INDEX)):
        index, files = os.path.join(folder, INDEX), {}
        names = load_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f"{index} has no weight_map of names: copy or download it again")
        for key, name in names.items():
            files.setdefault(os.path.join(folder, os.path.basename(name)), []).append(key)
        return files
    if os.path.isfile(os.path.join(folder, WEIGHTS)):
        return {os.path.join(folder, WEIGHTS): None}
    endings = (".bin", ".pt", ".pth", ".ckpt")
    pickles = [n for n in sorted(os.listdir(folder)) if n.endswith(endings)]
    if pickles:
        raise UserError(
            f"{folder} has only a pickle ({pickles[0]}); "
            f"pickles can run code and are never loaded: convert it to {WEIGHTS}"
        )
    variants = [n for n in sorted(os.listdir(folder)) if n.startswith(WEIGHTS.split(".")[0])]
    if variants:
        raise UserError(
            f"{folder} has no {WEIGHTS}, only a variant ({', '.join(variants[:3])}): give each "
            f"file its plain name, as {WEIGHTS} or {INDEX}"
        )
    raise UserError(f"{folder} has no {WEIGHTS} and no {INDEX}")


def is_stored_in_bf16(folder):
    """Whether most tensors of a component's first weight file are in bfloat16. Raises UserError."""
    with open_tensors(next(iter(weight_files(folder)))) as f:
        kinds = [f.get_slice(key).get_dtype() for key in f.keys()]
    return 2 * kinds.count("BF16") > len(kinds)


def weights_hash(folder):
    """Short hash of a component's weight files. It is the key of what was measured with them."""
    digest = hashlib.sha256()
    for path in sorted(weight_files(folder)):
        with open(path, "rb") as f:
            while chunk := f.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def config_file(folder):
    """The JSON file that describes a component. Raises UserError, which names networks nearby."""
    path = trellis_path(folder)
    if path and not os.path.isfile(path + ".json"):
        around = os.path.dirname(path) or "."
        there = os.path.isfile(os.path.join(around, "config.json"))
        raise UserError(
            f"{folder} is a file of weights without a description: give "
            + (around if there else "the folder of a network, with its config.json")
        )
    if path:
        return path + ".json"
    snapshots = os.path.join(folder, "snapshots")
    if os.path.isdir(snapshots) and os.listdir(snapshots):  # the cache of Hugging Face's hub
        newest = sorted(os.scandir(snapshots), key=lambda entry: entry.stat().st_mtime)[-1]
        raise UserError(f"{folder} is a cache with the checkpoint in it: give {newest.path}")
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder")
    if os.path.isfile(os.path.join(folder, "pipeline.json")):
        inside = [os.path.join("ckpts", n) for n in trellis_names(os.path.join(folder, "ckpts"))]
        such = f" ({', '.join(inside)} in it are such)" if inside else ""
        raise UserError(
            f"{folder} is a TRELLIS root of several networks: give the path of one{such}"
        )
    described = os.path.join(folder, "config.json")
    if not os.path.isfile(described):
        names = sorted(os.listdir(folder))
        inside = [n for n in names if os.path.isfile(os.path.join(folder, n, "config.json"))]
        inside += trellis_names(folder)
        such = f" ({', '.join(inside)} in it are such)" if inside else ""
        raise UserError(
            f"{folder} has no config.json: give the folder of one network{such}"
            ", or a pipeline root with model_index.json"
        )
    return described


# ---- configs -------------------------------------------------------------------------------------


def config_class(config):
    """Name of the class that a config describes: TRELLIS's "name", or diffusers' "_class_name"."""
    return config.get("name" if "args" in config else "_class_name")


def network_class(config):
    """Name of the class here that a config describes, or of the unknown class that it names.

    Older names of diffusers and TRELLIS are resolved.
    """
    name = config_class(config)
    if not isinstance(name, str):
        return None
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        name = "DiTTransformer2DModel"
    return NETWORKS[name].__name__ if name in NETWORKS else name


def own_entries(net):
    """Entries of a student's config that its teacher's may lack: linear layers, and its clock."""
    names = ("linear_layers", "feature_map", "feature_dim", "t_scale")
    return {name: net.config[name] for name in names if name in net.config}


def network_config(net):
    """The config.json of one of our networks, or TRELLIS's json: class name and arguments."""
    name = type(net).__name__
    if isinstance(net, TRELLIS):
        return {"name": name, "args": net.config}
    return {"_class_name": name, **net.config}


# What constructors meet in arguments of another kind than they expect.
NO_CONFIG = (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError)


def refuse_huge(arguments):
    """Raises ValueError for numbers that no network has, with which building one would not end.

    arguments: of a network's class; a count of layers, or a list of counts, is at most 1,000.
    """
    for key, value in arguments.items():
        most = 1000 if re.search("layers|depth|blocks", key) else 2**24
        for n in value if isinstance(value, list) else [value]:
            if isinstance(n, (int, float)) and not abs(n) <= most:
                raise ValueError(f"{key} = {value!r:.80}")


def network_from_config(config, where):
    """Build the network that a config describes. Raises UserError, which begins with `where`.

    config is diffusers' ("_class_name" among the arguments; other keys that start with _ are the
    library's own notes) or TRELLIS's ("name" beside "args").
    """
    name = network_class(config)
    if name not in NETWORKS:
        raise UserError(f"{where}: unknown network class {name!r}; known are {', '.join(NETWORKS)}")
    if "args" in config:
        arguments = config["args"]
    else:
        arguments = {k: v for k, v in config.items() if not k.startswith("_")}
    try:
        refuse_huge(arguments)
        return NETWORKS[name](**arguments)
    except NO_CONFIG as e:
        text = str(e).splitlines()[0][:300] if str(e) else type(e).__name__
        raise UserError(f"{where} does not describe a {config_class(config)}: {text}") from None


def network_of(folder):
    """The network of a component folder, without its weights. Raises UserError."""
    described = config_file(folder)
    return network_from_config(load_json(described), described)


# ---- loading -------------------------------------------------------------------------------------


def to_dtype(net, dtype):
    """Parameters become dtype, those of keep_float32 at least float32.  -> net.

    Buffers and adapters keep their dtype, unlike with net.to(dtype).
    """
    keep, wanted = set(getattr(net, "keep_float32", ())), {}
    for name, p in lora.base_parameters(net).items():
        kept = not keep.isdisjoint(name.split("."))
        wanted[id(p)] = torch.promote_types(dtype, torch.float32) if kept else dtype
    return net._apply(lambda x: x.to(wanted.get(id(x), x.dtype)))  # which FSDP2 takes note of


def on_cpu(net):
    """The place of a network of one process: memory on the CPU, without values.  -> net"""
    return allocate(net, "cpu")


def load_network(folder, dtype=torch.float32, place=on_cpu, weights=True):
    """Read one component -> (network in eval mode, config).

    folder: a component folder as diffusers writes it (config.json and safetensors, in one file or
    in shards), or what trellis_path takes. dtype: see to_dtype. place: a function that gives the
    network memory, and may share it out over ranks (`Run.place`). It is built on the meta device,
    and each rank reads its own rows of every tensor straight into their place. weights False: it
    stays there, and nothing but its config need exist. Raises UserError for a checkpoint that is
    missing, truncated, a pickle or does not match its config.
    """
    described = config_file(folder)
    config = load_json(described)
    with torch.device("meta"):
        net = network_from_config(config, described)
    if not weights:
        return net.eval(), config
    files = weight_files(folder)
    refuse_larger(net, files, described)
    net = place(to_dtype(net, dtype))
    read_weights(net, files, folder, os.path.basename(described), config_class(config))
    return net.eval(), config


def refuse_larger(net, files, described):
    """Raises UserError before memory is taken for more numbers than the files have bytes."""
    for path in files:
        open_tensors(path)  # whether it is there, and whole
    numbers, there = sum(p.numel() for p in net.parameters()), sum(map(os.path.getsize, files))
    if numbers > there:
        raise UserError(
            f"{described} describes {numbers:,} numbers, and its weights are {there:,} bytes: the "
            "checkpoint does not match its config"
        )


@torch.no_grad()
def read_weights(net, files, folder, what, kind):
    """Fill a network from {file: [keys], or None for all}, each rank its own rows.

    folder, what, kind: the component's, its config's file name and class, for messages. Raises
    UserError.
    """
    own = net.state_dict(keep_vars=True)
    current_name = getattr(net, "current_name", str)  # str leaves a key as it is
    seen, first = set(), {}
    for path, keys in files.items():
        with open_tensors(path) as f:
            stored = set(f.keys())
            missing = sorted(set(keys or ()) - stored)
            if missing:
                raise UserError(
                    f"{path} lacks {missing[0]!r}, which the index places there: "
                    "copy the shard again"
                )
            for key in sorted(stored):
                name = current_name(key)
                if name not in own:
                    raise UserError(f"{path} has {key!r}, which a {kind} of this {what} does not")
                rows = rows_of_file(f, path, key, own[name], what)
                original = first.setdefault(id(own[name]), name)
                there = own_rows(own[name])
                if original != name and not torch.equal(there, rows.to(there)):
                    raise UserError(
                        f"{path}: {key!r} differs from {original!r}, and this network has one for "
                        f"both: {net.if_copies_differ}"
                    )
                there.copy_(rows)
                if there.is_floating_point() and not there.isfinite().all():
                    raise UserError(
                        f"{path}: {key!r} has numbers that are not finite: copy or download it "
                        "again, or give another checkpoint"
                    )
                seen.add(name)
    missing = sorted(set(own) - seen)
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UserError(
            f"{folder} lacks {missing[0]!r}{more}: the checkpoint does not match its {what}"
        )


def rows_of_file(file, path, key, p, what):
    """The rows of a stored tensor that this rank holds of the parameter p. Raises UserError."""
    stored = file.get_slice(key)
    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if p.is_floating_point() and (dtype[0] in "IU" or dtype == "BOOL"):
        raise UserError(
            f"{path}: {key!r} holds integers ({dtype}), the numbers of a quantised checkpoint: "
            "give one in float32, float16 or bfloat16"
        )
    if shape != tuple(p.shape):
        raise UserError(f"{path}: {key!r} has shape {shape}, {what} asks for {tuple(p.shape)}")
    return rows_in(p, stored if shape else file.get_tensor(key))


def load_two_networks(root, dtype=torch.float32, place=on_cpu, weights=True):
    """Read a pipeline root with transformer/ and transformer_2/ (Wan 2.2 A14B).

    -> (WanTwoNetworks in eval mode, config of transformer/, config of transformer_2/). weights: see
    `load_network`. Raises UserError.
    """
    index = os.path.join(root, "model_index.json")
    boundary = load_json(index).get("boundary_ratio")
    if not isinstance(boundary, (int, float)) or not 0 < boundary < 1:
        raise UserError(
            f"{index}: boundary_ratio is {boundary!r}, and a two-network teacher changes networks "
            "at one within (0, 1): restore it from the source of the checkpoint"
        )
    if not os.path.isdir(os.path.join(root, "transformer")):
        raise UserError(
            f"{root} has transformer_2/ but no transformer/: a two-network teacher needs both"
        )
    high, config = load_network(os.path.join(root, "transformer"), dtype, place, weights)
    low, config_2 = load_network(os.path.join(root, "transformer_2"), dtype, place, weights)
    try:
        return WanTwoNetworks(high, low, boundary).eval(), config, config_2
    except ValueError as e:
        raise UserError(f"{root}: {e}") from None


# ---- saving --------------------------------------------------------------------------------------


def save_network(
    net, config, folder, state_dict=None, shard_bytes=SHARD_BYTES, dtype=None, write=True
):
    """Write a network's config and weights, without adapters, tensor by tensor, each file
    atomically.

    config: as network_config gives it, or as load_network read it. state_dict: tensors to write
    instead of the network's own. dtype: of floats in the files; None is each tensor's own. write:
    whether this rank writes; of a sharded network all ranks call this, and one writes. In
    diffusers' layout weights are split, with an index, above shard_bytes. A config of TRELLIS's
    gives CLASS.json and CLASS.safetensors, never split, in the tensors' own dtype: TRELLIS itself
    halves what it wants halved when it loads, and a student that a low learning rate moved only a
    little would lose that difference in float16.
    """
    if write:
        os.makedirs(folder, exist_ok=True)
    tensors = lora.base_state_dict(net) if state_dict is None else state_dict
    if "args" in config:
        path = os.path.join(folder, config_class(config))
        write_whole(tensors, path + ".safetensors" if write else None)
        if write:
            save_json(config, path + ".json")
        return
    shards, size = [{}], 0
    for key, value in tensors.items():
        n = value.numel() * stored_dtype(value, dtype).itemsize
        if shards[-1] and size + n > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += n
    names = [WEIGHTS]
    if len(shards) > 1:
        numbers = [f"-{i + 1:05d}-of-{len(shards):05d}" for i in range(len(shards))]
        names = [WEIGHTS.replace(".safetensors", f"{number}.safetensors") for number in numbers]
    # Several take minutes: they wait under hidden names, lest a run that is killed leave some old
    # and some new.
    places = [os.path.join(folder, name if len(names) == 1 else f".{name}") for name in names]
    for place, shard in zip(places, shards):
        write_whole(shard, place if write else None, dtype)
    if write:
        for place, name in zip(places, names):
            os.replace(place, os.path.join(folder, name))
        save_index(folder, names, shards, dtype)
        save_json(config, os.path.join(folder, "config.json"))


def stored_dtype(value, dtype):
    """What a tensor is written as: dtype if that is given and the tensor is of floats."""
    return dtype if dtype and value.is_floating_point() else value.dtype


def write_whole(tensors, path, dtype=None):
    """{name: tensor, perhaps sharded} as one file; only one of them is gathered at a time.

    path: None on ranks that only take part.
    """
    about = {k: (stored_dtype(v, dtype), v.shape) for k, v in tensors.items()}
    with TensorWriter(path, about, {"format": "pt"}) as file:
        for key, value in tensors.items():
            file.write(key, whole_tensor(value))


def save_index(folder, names, shards, dtype):
    """The index of weights in several files. What an earlier save left goes: with another number of
    files it would be read in place of this one."""
    written = set(names)
    if len(names) > 1:
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        values = [v for shard in shards for v in shard.values()]
        total = sum(v.numel() * stored_dtype(v, dtype).itemsize for v in values)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        save_json(index, os.path.join(folder, INDEX))
        written.add(INDEX)
    for name in os.listdir(folder):
        if name.startswith("diffusion_pytorch_model") and name not in written:
            os.remove(os.path.join(folder, name))
