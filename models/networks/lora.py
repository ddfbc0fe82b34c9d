"""Low-rank adapters (LoRA 2106.09685): several small sets of trainable weights on a frozen network.

    y = W x + b + (alpha / rank) B A x      A (rank, in) random; B (out, rank) zero at the start, so
                                            that a new adapter has no effect

    lora.add(net, "student", rank=64, alpha=8)       # net.lora_targets get an A and a B each
    v = net(x, t, label=label, adapter="student")    # the adapted network
    v = net(x, t, label=label)                       # the bare one, whatever adapters there are
    optimizer = torch.optim.AdamW(lora.parameters(net, "student"))
    lora.save(net, "student", "student.safetensors")

An Adapted is the network with one of its adapters, to be called and trained like a network.

The adapter is an argument of every call, which each layer receives. It is not a state of the
network that is switched between calls: a checkpointed block runs a second time during backward,
when such a switch would already point to the next adapter, and would then recompute another
function than the one that is differentiated. W never changes, so `net.requires_grad_(False)`
before `add` leaves only adapters to train.

Files of ours hold X.lora_A.weight and X.lora_B.weight with alpha / rank multiplied into lora_B, so
that a program that knows nothing of alpha adds B A. X is net.lora_key(layer) where the network has
that method (Wan, Z-Image: names that ComfyUI and load_lora_weights of diffusers' pipelines take;
Stable Diffusion: the latter's; PixArt: ComfyUI and peft), otherwise transformer.LAYER. `save`
writes one file, `save_peft` a folder for peft. `load` and `merge_file` also read what other
programs write; see "reading files" below.
"""

import json
import math
import os
import re

import torch
from torch import nn
from torch.nn import functional as F

from models.files import UserError, load_json, open_tensors, save_json, save_tensors
from models.shards import own_rows, rows_in


class Adapter(nn.Module):
    """A (rank, in) and B (out, rank) of one layer, and the alpha that they were added with."""

    def __init__(self, A, B, alpha):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.rank, self.alpha = A.shape[0], float(alpha)
        self.scale = self.alpha / self.rank


class Linear(nn.Linear):
    """nn.Linear, with the same parameters and names, that can carry adapters.

    Its attribute `lora` is None or a ModuleDict {name: Adapter}.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora = None

    def forward(self, x, adapter=None):
        """x (..., in) -> (..., out). A name of which this layer has no adapter has no effect here;
        the network's forward refuses unknown names with `check`."""
        y = F.linear(x, self.weight, self.bias)
        if adapter is None or self.lora is None or adapter not in self.lora:
            return y
        a = self.lora[adapter]
        # Beside bfloat16 weights, A and B in float32 are used in bfloat16, as under autocast; their
        # gradients are float32.
        return y + a.scale * F.linear(F.linear(x, a.A.to(x.dtype)), a.B.to(x.dtype))


# ---- which layers --------------------------------------------------------------------------------


def linears(net):
    """{name: layer} of all layers that can carry adapters, in the network's order."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, Linear)}


def names(net):
    """The names of a network's adapters, sorted."""
    return sorted({name for layer in linears(net).values() for name in layer.lora or ()})


def check(net, adapter):
    """Raises ValueError for a name that no layer of net knows; None passes. For forward."""
    if adapter is not None and not any(
        isinstance(m, Linear) and m.lora is not None and adapter in m.lora for m in net.modules()
    ):
        raise ValueError(
            f"no adapter is called {adapter!r}; "
            f"this {type(net).__name__} has {', '.join(names(net)) or 'none'}"
        )


def adapters(net, name):
    """{name of a layer: Adapter} for one adapter, in the network's order.

    Raises ValueError if there is none of this name.
    """
    check(net, name)
    return {
        key: layer.lora[name]
        for key, layer in linears(net).items()
        if layer.lora is not None and name in layer.lora
    }


def _refuse_name(net, name):
    """Raises ValueError for a name that a new adapter of net cannot have."""
    if name in names(net):
        raise ValueError(f"this {type(net).__name__} already has an adapter called {name!r}")
    # It becomes a part of the names of parameters.
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{name!r} cannot name an adapter: use letters, digits and _, "
            "and nothing that nn.ModuleDict has already, such as keys"
        )


def _attach(layer, name, A, B, alpha):
    if layer.lora is None:
        layer.lora = nn.ModuleDict()
    layer.lora[name] = Adapter(A.to(layer.weight.device), B.to(layer.weight.device), alpha)


# ---- adding, training, removing ------------------------------------------------------------------


def add(net, name, rank, alpha, targets=None):
    """Give layers an adapter called `name`: float32, trainable, without effect while its B is zero.

    targets: endings of the names of layers; None = net.lora_targets. A is uniform in +-1 /
    sqrt(in), as nn.Linear starts, and is drawn on the CPU from torch's global generator, so that a
    seed gives the same adapter on every device. Call it after net.to(dtype), which would convert
    adapters too. Raises ValueError for rank < 1, a name in use or unusable, and a target that
    matches no layer.
    """
    if rank < 1:
        raise ValueError(f"an adapter's rank must be at least 1, got {rank}")
    _refuse_name(net, name)
    targets = net.lora_targets if targets is None else tuple(targets)
    found = {t: [key for key in linears(net) if key == t or key.endswith("." + t)] for t in targets}
    empty = [t for t, keys in found.items() if not keys]
    if empty or not found:
        raise ValueError(
            f"no layer of this {type(net).__name__} that takes adapters is called "
            f"{', '.join(map(repr, empty)) or 'by an empty list of targets'}"
        )
    wanted = {key for keys in found.values() for key in keys}
    for key, layer in linears(net).items():
        if key in wanted:
            A = torch.empty(rank, layer.in_features, dtype=torch.float32).uniform_(-1, 1)
            B = torch.zeros(layer.out_features, rank, dtype=torch.float32)
            _attach(layer, name, A / layer.in_features**0.5, B, alpha)


def parameters(net, name):
    """[A, B, A, B, ...] in the network's order, for an optimizer.

    Raises ValueError for an unknown name.
    """
    return [p for a in adapters(net, name).values() for p in (a.A, a.B)]


def twin(net, name, other):
    """Add adapter `name` with the weights, ranks and strengths of `other`.

    Raises ValueError for a name in use or unusable, and for an unknown other.
    """
    _refuse_name(net, name)
    for key, a in adapters(net, other).items():
        A, B = a.A.detach().clone(), a.B.detach().clone()
        _attach(net.get_submodule(key), name, A, B, a.alpha)


def state_dict(net, name):
    """{LAYER.A, LAYER.B: tensor} as trained, without alpha / rank: for a run's own state."""
    return {
        f"{key}.{part}": getattr(a, part).detach()
        for key, a in adapters(net, name).items()
        for part in "AB"
    }


def load_state_dict(net, name, tensors):
    """Inverse of state_dict, into an adapter that was added before.

    Raises ValueError for other layers or shapes.
    """
    own = state_dict(net, name)  # shares memory with the adapter
    wrong = sorted(set(own) ^ set(tensors)) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        raise ValueError(
            f"the state of adapter {name!r} does not fit this {type(net).__name__}: {wrong[0]!r}"
        )
    for key, value in own.items():
        value.copy_(tensors[key])


@torch.no_grad()
def start_from(net, name, other):
    """Let adapter `name`, which was added before, begin as the function of adapter `other`.

    Where its rank is larger, the further rows of A stay as they were drawn and have no effect yet.
    Raises ValueError for a layer that `name` does not change, and for a rank that is too small.
    """
    mine = adapters(net, name)
    theirs = adapters(net, other)
    for key, b in theirs.items():
        if key not in mine:
            raise ValueError(f"adapter {name!r} does not change {key!r}, as {other!r} does")
        if b.rank > mine[key].rank:
            raise ValueError(
                f"{key!r} has rank {b.rank} in adapter {other!r}, more than the {mine[key].rank} "
                f"of {name!r}"
            )
    for key, a in mine.items():
        a.B.zero_()
        if key in theirs:
            b = theirs[key]
            a.A[: b.rank] = b.A
            a.B[:, : b.rank] = b.B * (b.scale / a.scale)


def remove(net, name):
    """Take an adapter away. Raises ValueError for an unknown name."""
    for key in adapters(net, name):
        layer = net.get_submodule(key)
        del layer.lora[name]
        if not len(layer.lora):
            layer.lora = None


@torch.no_grad()
def merge(net, name):
    """W += (alpha / rank) B A, summed in at least float32; then remove the adapter.

    Raises ValueError for an unknown name.
    """
    add_to(net, net, name)
    remove(net, name)


@torch.no_grad()
def add_to(net, other, name):
    """Add adapter `name` of another network of this architecture to net's weights, as `merge`."""
    for key, a in adapters(other, name).items():
        _add_product(net.get_submodule(key).weight, a.A, a.B, a.scale)


def _add_product(W, A, B, scale):
    """W += scale B A, summed in at least float32 and rounded once."""
    B, W = rows_in(W, B), own_rows(W)  # of a sharded W this rank's rows
    wide = torch.promote_types(W.dtype, torch.float32)
    A, B = A.to(W.device, wide), B.to(W.device, wide)
    W.copy_(W.to(wide) + scale * (B @ A).view_as(W))  # that of a 1x1 convolution has four axes


def base_parameters(net):
    """{name: parameter} of a network without those of adapters."""
    layers = linears(net).values()
    inside = {id(p) for layer in layers if layer.lora for p in layer.lora.parameters()}
    return {name: p for name, p in net.named_parameters() if id(p) not in inside}


def base_state_dict(net):
    """net.state_dict() without adapters: what a checkpoint of the network itself holds."""
    inside = tuple(f"{key}.lora." for key, layer in linears(net).items() if layer.lora is not None)
    return {k: v for k, v in net.state_dict().items() if not k.startswith(inside)}


# ---- an adapted network as one thing -------------------------------------------------------------


class Adapted:
    """A network called with one of its adapters: for a script, a network of its own.

        student = Adapted(net, "student")          # net has that adapter already, see `add`
        v = student(x, t, label=label)             # net(x, t, label=label, adapter="student")
        optimizer = torch.optim.AdamW(student.parameters())

    What is trained, frozen, saved and loaded through it is the adapter alone, and `more`, modules
    {name: module} that take part in calls with this adapter only (linear attention of linvideo.py).
    The network is frozen, may have other adapters and stays in eval mode. All other attributes,
    such as config and prediction, are the network's. It is no nn.Module, whose parameters would
    include the network's.
    """

    def __init__(self, net, adapter, more=None):
        self.net, self.adapter, self.more = net, adapter, nn.ModuleDict(more or {})

    def __getattr__(self, name):
        if name.startswith("__"):  # copy and pickle ask for these before there is a network
            raise AttributeError(name)
        return getattr(self.net, name)

    def __call__(self, x, t, **cond):
        return self.net(x, t, **cond, adapter=self.adapter)

    def parameters(self):
        return [*parameters(self.net, self.adapter), *self.more.parameters()]

    def requires_grad_(self, on=True):
        for p in self.parameters():
            p.requires_grad_(on)
        return self

    def train(self, on=True):
        self.more.train(on)
        return self

    def eval(self):
        return self.train(False)

    def state_dict(self):
        more = {f"more.{key}": value for key, value in self.more.state_dict().items()}
        return state_dict(self.net, self.adapter) | more

    def load_state_dict(self, tensors):
        """Raises ValueError for other layers or shapes, RuntimeError where `more` does not fit."""
        more = {k.removeprefix("more."): v for k, v in tensors.items() if k.startswith("more.")}
        own = {k: v for k, v in tensors.items() if not k.startswith("more.")}
        load_state_dict(self.net, self.adapter, own)
        self.more.load_state_dict(more)


# ---- writing files -------------------------------------------------------------------------------


def file_key(net, key):
    """The name of a layer in an adapter file, without .lora_A.weight."""
    return net.lora_key(key) if hasattr(net, "lora_key") else f"transformer.{key}"


def save(net, name, path, metadata=None, dtype=torch.float32):
    """Write one adapter as a safetensors file, atomically, with alpha / rank in lora_B.

    metadata: {str: str} for the file's header, beside the rank and the alpha of the file, which are
    the same, and the alpha that the adapter was trained with. dtype: of the tensors. Raises
    ValueError for an unknown name.
    """
    names = {key: file_key(net, key) for key in adapters(net, name)}
    _write(net, name, path, names, metadata, dtype)


def save_peft(net, name, folder, metadata=None, dtype=torch.float32):
    """Write one adapter as a folder that PeftModel.from_pretrained takes.

    adapter_model.safetensors is the file that `save` writes, under peft's names;
    adapter_config.json has lora_alpha = r, because lora_B is already scaled. Raises ValueError for
    an unknown name.
    """
    found = adapters(net, name)
    os.makedirs(folder, exist_ok=True)
    names = {key: f"base_model.model.{key}" for key in found}
    _write(net, name, os.path.join(folder, PEFT_WEIGHTS), names, metadata, dtype)
    ranks = {key: a.rank for key, a in found.items()}
    r = max(ranks.values())
    other = {key: rank for key, rank in ranks.items() if rank != r}
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "target_modules": sorted(found),
        "rank_pattern": other,
        "alpha_pattern": other,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    save_json(config, os.path.join(folder, PEFT_CONFIG))


def is_for_peft(net):
    """Whether a network's names in files are peft's: it has no other loader in diffusers."""
    return file_key(net, next(iter(linears(net)))).startswith("base_model.model.")


def saved_name(net, name):
    """What an adapter is saved as, beside others: a folder for peft, or a file."""
    return name if is_for_peft(net) else f"{name}.safetensors"


PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _write(net, name, path, names, metadata, dtype):
    """names: {layer: its name in the file}."""
    tensors, found = {}, adapters(net, name)
    for key, a in found.items():
        tensors[f"{names[key]}.lora_A.weight"] = a.A.to(dtype)
        tensors[f"{names[key]}.lora_B.weight"] = (a.scale * a.B).to(dtype)
    ranks = " ".join(map(str, sorted({a.rank for a in found.values()})))
    alphas = " ".join(f"{alpha:.12g}" for alpha in sorted({a.alpha for a in found.values()}))
    about = {"format": "pt", "rank": ranks, "alpha": ranks, "trained_alpha": alphas}
    scale = "the trained alpha / rank is multiplied into lora_B"
    save_tensors(tensors, path, {**(metadata or {}), **about, "scale": scale})


# ---- reading files -------------------------------------------------------------------------------
#
# A file's key is a layer's name and an ending. The name is the layer's own, or what the file_key of
# the network or its lora_aliases call it, after one of PREFIXES, or with _ for every dot after one
# of FLAT (kohya's sd-scripts and musubi-tuner). ENDINGS are peft's and kohya's; .diff, .diff_b and
# .diff_m are full differences of weight, bias and modulation (ComfyUI, LightX2V).
#
# The strength of a pair is alpha / rank. alpha is the file's .alpha, or what peft was configured
# with: lora_adapter_metadata in the header (save_lora_weights of diffusers) or adapter_config.json
# beside the file. Without either it is the rank. ss_network_alpha of kohya's header is no such
# source: files with it also have .alpha, unless a converter has multiplied that into the weights.

PREFIXES = ("diffusion_model.", "transformer.", "base_model.model.", "model.diffusion_model.", "")
FLAT = ("lora_unet_", "lora_unet__", "lora_transformer_")
ENDINGS = {  # {ending: what it is}; \.\w+ is the name that an adapter had in peft
    r"\.lora[_.](?:A|down)(?:\.\w+)?\.weight": "A",
    r"\.lora[_.](?:B|up)(?:\.\w+)?\.weight": "B",
    r"\.lora[_.](?:B|up)(?:\.\w+)?\.bias": "lora_B.bias",
    r"\.alpha": "alpha",
    r"\.diff": "weight",
    r"\.diff_b": "bias",
    r"\.diff_m": "modulation",
}


def adapter_file(source):
    """The LoRA file that a path stands for: itself, or that of a folder of peft's. None: no such.

    DIR/NAME.safetensors beside a DIR/NAME.json with name and args is a network in TRELLIS's layout,
    not a LoRA file; another JSON is a note of a program that keeps such files.
    """
    if os.path.isfile(os.path.join(source, PEFT_WEIGHTS)):
        return os.path.join(source, PEFT_WEIGHTS)
    stem = source.removesuffix(".safetensors")
    if stem == source or (os.path.isfile(stem + ".json") and is_trellis(stem + ".json")):
        return None
    return source


def is_trellis(path):
    """Whether a JSON file describes a network in TRELLIS's layout."""
    try:
        described = load_json(path)
    except UserError:  # no JSON at all
        return False
    return isinstance(described, dict) and {"name", "args"} <= described.keys()


def load(net, name, path):
    """Add the adapter of a LoRA file as `name` -> the file's metadata.

    Each layer has its rank and its strength from the file. The network stays untouched unless the
    whole file fits. Raises ValueError, one line that begins with the file's name, for a key that
    belongs to no layer, half a pair, shapes that do not fit, and full differences or layers that
    take no adapter, with which a file can only be merged; UserError for a file that is missing or
    damaged.
    """
    _refuse_name(net, name)
    pairs, differences, metadata = _read(net, path)
    wrong = [key for key in pairs if not isinstance(net.get_submodule(key), Linear)]
    if differences or wrong:
        what = next(iter(differences), None) or wrong[0]
        raise ValueError(
            f"{path} changes {what!r}, which no adapter can: merge the file into the weights "
            "(--teacher_lora, or --student_init with --lora_rank 0)"
        )
    if not pairs:
        raise ValueError(f"{path} holds no adapter")
    for key, layer in linears(net).items():
        if key in pairs:
            A, B, scale = pairs[key]
            _attach(layer, name, A, B, alpha=scale * len(A))
    return metadata


@torch.no_grad()
def merge_file(net, path):
    """W += (alpha / rank) B A and p += difference, for all that a LoRA file has.  -> its metadata.

    Sums are taken in at least float32. The network stays untouched unless the whole file fits.
    Raises ValueError and UserError as `load`, but takes full differences and every linear layer.
    """
    pairs, differences, metadata = _read(net, path)
    if not pairs and not differences:
        raise ValueError(f"{path} holds no adapter")
    for key, (A, B, scale) in pairs.items():
        _add_product(net.get_submodule(key).weight, A, B, scale)
    for key, difference in differences.items():
        p = net.get_parameter(key)
        difference, p = rows_in(p, difference), own_rows(p)
        wide = torch.promote_types(p.dtype, torch.float32)
        p.copy_(p.to(wide) + difference.to(p.device, wide))
    return metadata


def _read(net, path):
    """A LoRA file -> {layer: (A, B, strength)}, {parameter: its difference}, metadata.

    All float32, in the network's order. Raises ValueError and UserError as `load`.
    """
    shapes = {key: tuple(p.shape) for key, p in base_parameters(net).items()}
    found, places = {}, _places(net, shapes)
    with open_tensors(path) as f:
        metadata = f.metadata() or {}
        for stored in f.keys():
            key, part = _place(stored, places)
            if key is None:
                raise ValueError(
                    f"{path} has {stored!r}, which is no adapter of a layer of this "
                    f"{type(net).__name__}"
                )
            if part in found.setdefault(key, {}):
                raise ValueError(f"{path} has the {part} of {key!r} twice, once as {stored!r}")
            value = f.get_tensor(stored)
            if not value.is_floating_point() and part != "alpha":
                raise ValueError(
                    f"{path}: {stored!r} holds integers ({value.dtype}): give an adapter in "
                    "float32, float16 or bfloat16"
                )
            if part in ("A", "B") and value.dim() == 4 and value.shape[2:] == (1, 1):
                value = value.flatten(1)  # of a 1x1 convolution, as kohya's files have them
            found[key][part] = value.float()
            if not found[key][part].isfinite().all():
                raise ValueError(
                    f"{path}: {stored!r} has numbers that are not finite: copy it again"
                )
    settings, pairs, differences = _peft_settings(path, metadata), {}, {}
    for key in dict.fromkeys(places.values()):
        parts = found.get(key, {})
        if not parts.keys().isdisjoint({"A", "B", "alpha", "lora_B.bias"}):
            _check_pair(path, key, parts, shapes.get(f"{key}.weight", ()))
            strength = _strength(path, settings, key, len(parts["A"]), parts.get("alpha"))
            pairs[key] = parts["A"], parts["B"], strength
            if "lora_B.bias" in parts:
                parts["bias"] = strength * parts["lora_B.bias"] + parts.get("bias", 0.0)
        for part in {"weight", "bias"} & parts.keys():
            where = key if key in shapes and part == "weight" else f"{key}.{part}"
            _check_shape(path, where, parts[part], shapes.get(where), "the difference")
            differences[where] = parts[part]
    return pairs, differences, metadata


def _places(net, shapes):
    """{name in a file: module of the network, or parameter that is not called weight or bias}."""
    keys = [key.removesuffix(".weight").removesuffix(".bias") for key in shapes]
    places = {}
    for key in dict.fromkeys(keys):
        names = [key]
        if hasattr(net, "lora_key"):
            name = net.lora_key(key)
            names.append(name.removeprefix(next(p for p in PREFIXES if name.startswith(p))))
        for ending, other in getattr(net, "lora_aliases", {}).items():
            if key.endswith(ending):
                names.append(key.removesuffix(ending) + other)
        for name in names:
            for prefix in PREFIXES:
                places.setdefault(prefix + name, key)
            for prefix in FLAT:
                places.setdefault(prefix + name.replace(".", "_"), key)
    return places


def _place(stored, places):
    """A file's key -> which module or parameter it belongs to, and what it is.  (None, None): no
    such."""
    for ending, part in ENDINGS.items():
        match = re.fullmatch(f"(.+?){ending}", stored)
        if match:
            where = match[1] + (".modulation" if part == "modulation" else "")
            if where in places:
                return places[where], "weight" if part == "modulation" else part
    return None, None


def _check_pair(path, key, parts, shape):
    """Raises ValueError unless both halves are there and fit a weight of this shape."""
    if not {"A", "B"} <= parts.keys():
        there = next(part for part in ("A", "B", "alpha", "lora_B.bias") if part in parts)
        name = f"lora_{there}" if there in "AB" else there
        raise ValueError(
            f"{path} has {name} but not both halves for {key!r}: copy or save it again"
        )
    shape = shape[:2] if shape[2:] == (1, 1) else shape
    if len(shape) != 2:
        raise ValueError(f"{path} has an adapter of {key!r}, which is no linear layer")
    rank = len(parts["A"])
    if not rank:
        raise ValueError(f"{path}: the adapter of {key!r} has rank 0: copy or save it again")
    for part, want in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
        _check_shape(path, key, parts[part], want, f"lora_{part}")


def _check_shape(path, key, tensor, want, what):
    """want: a shape, None where the network has no such parameter. Raises ValueError."""
    if tuple(tensor.shape) != want:
        takes = "has no such parameter" if want is None else f"takes {want}"
        raise ValueError(
            f"{path}: {what} of {key!r} has shape {tuple(tensor.shape)}, this network {takes}"
        )


def _peft_settings(path, metadata):
    """What peft was configured with when the file was written; {} where that is not known."""
    text = metadata.get("lora_adapter_metadata")
    if text:
        try:
            settings = json.loads(text).items()
            return {k.removeprefix("transformer.").removeprefix("unet."): v for k, v in settings}
        except (ValueError, AttributeError):
            raise ValueError(
                f"{path}: lora_adapter_metadata in its header is no JSON object, and the "
                "strength of the adapter is in it: copy or save the file again"
            ) from None
    beside = os.path.join(os.path.dirname(path), PEFT_CONFIG)
    if os.path.basename(path) == PEFT_WEIGHTS and os.path.isfile(beside):
        return load_json(beside)
    return {}


def _strength(path, settings, key, rank, alpha):
    """alpha / rank of a layer. alpha: the file's tensor, or None. settings: peft's, or {}.

    Raises ValueError for settings that peft does not write.
    """
    try:
        if alpha is None and "lora_alpha" not in settings:
            return 1.0
        if alpha is None:
            patterns = (settings.get("alpha_pattern") or {}).items()
            own = [v for pattern, v in patterns if _matches(pattern, key)]
            alpha = own[0] if own else settings["lora_alpha"]
            rank = rank**0.5 if settings.get("use_rslora") else rank
        strength = float(alpha) / rank
    except (TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, re.error):
        strength = math.nan
    if not math.isfinite(strength):
        raise ValueError(f"{path}: the strength of {key!r} is no number: copy or save it again")
    return strength


def _matches(pattern, key):
    """Whether a layer is one of alpha_pattern's. Repeated groups, which could take for ever, are
    refused: raises ValueError."""
    if re.search(r"\)[*+{?]", pattern) or len(pattern) > 1000:
        raise ValueError(pattern)
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", key)
