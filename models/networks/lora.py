"""Low-rank adapters (LoRA 2106.09685): several small sets of trainable weights on a frozen network.

    y = W x + b + (alpha / rank) B A x      A (rank, in) random; B (out, rank) zero at the start, so
                                            that a new adapter has no effect

    lora.add(net, "student", rank=64, alpha=8)       # net.lora_targets get an A and a B each
    v = net(x, t, label=label, adapter="student")    # the adapted network
    v = net(x, t, label=label)                       # the bare one, whatever adapters there are
    optimizer = torch.optim.AdamW(lora.parameters(net, "student"))
    lora.save(net, "student", "student.safetensors")

The adapter is an argument of every call, which each layer receives. It is not a state of the
network that is switched between calls: a checkpointed block runs a second time during backward,
when such a switch would already point to the next adapter, and would then recompute another
function than the one that is differentiated. W never changes, so `net.requires_grad_(False)`
before `add` leaves only adapters to train.

Files hold X.lora_A.weight and X.lora_B.weight with alpha / rank multiplied into lora_B, so that a
program that knows nothing of alpha adds B A. X is net.lora_key(layer) where the network has that
method (Wan, Z-Image: names that ComfyUI and load_lora_weights of diffusers' pipelines take;
PixArt: ComfyUI and peft), otherwise transformer.LAYER. `load` reads both.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.files import open_tensors, save_tensors


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
    own = state_dict(net, name)
    wrong = sorted(set(own) ^ set(tensors)) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        raise ValueError(
            f"the state of adapter {name!r} does not fit this {type(net).__name__}: {wrong[0]!r}"
        )
    for key, value in own.items():
        value.copy_(tensors[key])


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
    for key, a in adapters(net, name).items():
        W = net.get_submodule(key).weight
        wide = torch.promote_types(W.dtype, torch.float32)
        W.copy_(W.to(wide) + a.scale * (a.B.to(wide) @ a.A.to(wide)))
    remove(net, name)


def base_state_dict(net):
    """net.state_dict() without adapters: what a checkpoint of the network itself holds."""
    inside = tuple(f"{key}.lora." for key, layer in linears(net).items() if layer.lora is not None)
    return {k: v for k, v in net.state_dict().items() if not k.startswith(inside)}


# ---- files ---------------------------------------------------------------------------------------


def file_key(net, key):
    """The name of a layer in an adapter file, without .lora_A.weight."""
    return net.lora_key(key) if hasattr(net, "lora_key") else f"transformer.{key}"


def save(net, name, path, metadata=None):
    """Write one adapter as a safetensors file, atomically: float32, alpha / rank in lora_B.

    metadata: {str: str} for the file's header, beside rank and alpha, which are always there.
    Raises ValueError for an unknown name.
    """
    tensors = {}
    for key, a in adapters(net, name).items():
        where = file_key(net, key)
        tensors[f"{where}.lora_A.weight"] = a.A.float()
        tensors[f"{where}.lora_B.weight"] = (a.scale * a.B).float()
    header = {
        **(metadata or {}),
        "format": "pt",
        "rank": str(a.rank),
        "alpha": f"{a.alpha:.12g}",
        "scale": "alpha / rank is multiplied into lora_B",
    }
    save_tensors(tensors, path, header)


def load(net, name, path):
    """Add the adapter of a file as `name` -> the file's metadata.

    The rank is the file's, and alpha = rank, because lora_B is already scaled. The network stays
    untouched unless the whole file fits. Raises ValueError, one line that begins with the file's
    name, for a key that belongs to no layer (.alpha among them: the lora_B of such a file is not
    scaled), an A without its B, and shapes that do not fit; UserError for a file that is missing
    or damaged.
    """
    _refuse_name(net, name)
    layers = {file_key(net, key): key for key in linears(net)}
    layers.update({f"transformer.{key}": key for key in linears(net)})  # diffusers' own naming
    found = {}
    with open_tensors(path) as f:
        metadata = f.metadata() or {}
        for stored in f.keys():
            where, part = stored, None
            for end in (".lora_A.weight", ".lora_B.weight"):
                if stored.endswith(end):
                    where, part = stored.removesuffix(end), end[6]
            if part is None or where not in layers:
                raise ValueError(
                    f"{path} has {stored!r}, "
                    f"which is no adapter of a layer of this {type(net).__name__}"
                )
            found.setdefault(layers[where], {})[part] = f.get_tensor(stored).float()
    if not found:
        raise ValueError(f"{path} holds no adapter")
    for key, pair in found.items():
        if len(pair) != 2:
            raise ValueError(
                f"{path} has lora_{''.join(pair)} but not both halves for {key!r}: "
                "copy or save it again"
            )
    rank = next(iter(found.values()))["A"].shape[0]
    for key, pair in found.items():
        layer = net.get_submodule(key)
        want = {"A": (rank, layer.in_features), "B": (layer.out_features, rank)}
        for part in "AB":
            if tuple(pair[part].shape) != want[part]:
                raise ValueError(
                    f"{path}: lora_{part} of {key!r} has shape {tuple(pair[part].shape)}, "
                    f"this network takes {want[part]}"
                )
    for key, layer in linears(net).items():
        if key in found:
            _attach(layer, name, found[key]["A"], found[key]["B"], alpha=rank)
    return metadata
