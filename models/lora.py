"""Low-rank adapters (LoRA 2106.09685): several small trainable sets of weights on one frozen network.

    y = W x + b + (alpha / rank) B A x        A (rank, in) random, B (out, rank) zero at first: the adapter starts as nothing

    lora.add(net, "student", rank=64, alpha=8)       # net: any of models/; net.lora_targets gets an A and a B
    v = net(x, t, label=label, adapter="student")    # the adapted network
    v = net(x, t, label=label)                       # the bare one, whatever adapters there are
    optimizer = torch.optim.AdamW(lora.parameters(net, "student"))
    lora.save(net, "student", "student.safetensors")

The adapter is an argument of every call, handed down to each layer, never a state of the network that is switched between calls:
a checkpointed block runs again during backward, when a switch would already stand on the next adapter, and would recompute another
function than the one it differentiates. W stays as it is, so `net.requires_grad_(False)` before `add` leaves only adapters to train.

Files hold X.lora_A.weight and X.lora_B.weight with alpha / rank multiplied into lora_B, so that a program that knows nothing of
alpha adds B A. X is net.lora_key(layer) where the network has that method (Wan, Z-Image: names that both ComfyUI and
load_lora_weights of diffusers' pipelines take; PixArt: ComfyUI and peft), otherwise transformer.LAYER. Both ways of naming are read.
"""
import torch
from torch import nn
from torch.nn import functional as F


class Adapter(nn.Module):
    """One layer's A (rank, in) and B (out, rank), and the alpha they were added with."""

    def __init__(self, A, B, alpha):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.rank, self.alpha = A.shape[0], float(alpha)
        self.scale = self.alpha / self.rank


class Linear(nn.Linear):
    """nn.Linear, with the same parameters and names, that can carry adapters: `lora` is None or {name: Adapter}."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora = None

    def forward(self, x, adapter=None):
        """x (..., in) -> (..., out). A name that this layer has no adapter of changes nothing: `check` is the network's business."""
        y = F.linear(x, self.weight, self.bias)
        if adapter is None or self.lora is None or adapter not in self.lora:
            return y
        a = self.lora[adapter]
        # float32 weights next to a bfloat16 network compute in its dtype, as under autocast; their gradients are float32 again
        return y + a.scale * F.linear(F.linear(x, a.A.to(x.dtype)), a.B.to(x.dtype))


# ---- which layers --------------------------------------------------------------------------------------------------


def linears(net):
    """{name: layer} of all layers that can carry an adapter, in the network's order."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, Linear)}


def names(net):
    """Names of the adapters of a network, sorted."""
    return sorted({name for layer in linears(net).values() for name in layer.lora or ()})


def check(net, adapter):
    """What a network's forward asks first. Raises ValueError for a name that no layer knows; None is always fine."""
    if adapter is not None and not any(isinstance(m, Linear) and m.lora is not None and adapter in m.lora for m in net.modules()):
        raise ValueError(f"no adapter is called {adapter!r}; this {type(net).__name__} has {', '.join(names(net)) or 'none'}")


def adapters(net, name):
    """{layer's name: Adapter} of one adapter, in the network's order. Raises ValueError if there is none."""
    check(net, name)
    return {key: layer.lora[name] for key, layer in linears(net).items() if layer.lora is not None and name in layer.lora}


def _refuse_name(net, name):
    if name in names(net):
        raise ValueError(f"this {type(net).__name__} already has an adapter called {name!r}")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):  # it becomes a part of parameters' names
        raise ValueError(f"{name!r} cannot name an adapter: use letters, digits and _, and nothing that nn.ModuleDict has already, such as keys")


def _attach(layer, name, A, B, alpha):
    if layer.lora is None:
        layer.lora = nn.ModuleDict()
    layer.lora[name] = Adapter(A.to(layer.weight.device), B.to(layer.weight.device), alpha)


# ---- adding, training, ending --------------------------------------------------------------------------------------


def add(net, name, rank, alpha, targets=None):
    """Give layers an adapter called `name`, in float32, trainable, and without effect as long as its B is zero.

    Call it after net.to(dtype), which would convert adapters too.
    targets: endings of layers' names; None: net.lora_targets. A is uniform in +-1/sqrt(in), as nn.Linear starts, drawn on the CPU
    from torch's global generator, so that the same seed gives the same adapter on every device.
    Raises ValueError for rank < 1, a name in use, and a target that matches no layer.
    """
    if rank < 1:
        raise ValueError(f"an adapter's rank must be at least 1, got {rank}")
    _refuse_name(net, name)
    targets = net.lora_targets if targets is None else tuple(targets)
    found = {t: [key for key in linears(net) if key == t or key.endswith("." + t)] for t in targets}
    empty = [t for t, keys in found.items() if not keys]
    if empty or not found:
        raise ValueError(f"no layer of this {type(net).__name__} that takes adapters is called "
                         f"{', '.join(map(repr, empty)) or 'by an empty list of targets'}")
    wanted = {key for keys in found.values() for key in keys}
    for key, layer in linears(net).items():
        if key in wanted:
            A = torch.empty(rank, layer.in_features, dtype=torch.float32).uniform_(-1, 1) / layer.in_features ** 0.5
            _attach(layer, name, A, torch.zeros(layer.out_features, rank, dtype=torch.float32), alpha)


def parameters(net, name):
    """[A, B, A, B, ...] in the network's order: what an optimizer takes. Raises ValueError for an unknown name."""
    return [p for a in adapters(net, name).values() for p in (a.A, a.B)]


def state_dict(net, name):
    """{LAYER.A, LAYER.B: tensor} as trained, alpha / rank not multiplied in: for a run's own state."""
    return {f"{key}.{part}": getattr(a, part).detach() for key, a in adapters(net, name).items() for part in "AB"}


def load_state_dict(net, name, tensors):
    """Inverse of state_dict for an adapter that was added before. Raises ValueError for other layers or shapes."""
    own = state_dict(net, name)
    wrong = sorted(set(own) ^ set(tensors)) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        raise ValueError(f"the state of adapter {name!r} does not fit this {type(net).__name__}: {wrong[0]!r}")
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
    """W += (alpha / rank) B A, summed in at least float32, and the adapter is gone. Raises ValueError for an unknown name."""
    for key, a in adapters(net, name).items():
        W = net.get_submodule(key).weight
        wide = torch.promote_types(W.dtype, torch.float32)
        W.copy_(W.to(wide) + a.scale * (a.B.to(wide) @ a.A.to(wide)))
    remove(net, name)


def base_state_dict(net):
    """net.state_dict() without any adapter: what a checkpoint of the network itself holds."""
    inside = tuple(f"{key}.lora." for key, layer in linears(net).items() if layer.lora is not None)
    return {k: v for k, v in net.state_dict().items() if not k.startswith(inside)}


# ---- files ---------------------------------------------------------------------------------------------------------


def file_key(net, key):
    """A layer's name in a file."""
    return net.lora_key(key) if hasattr(net, "lora_key") else f"transformer.{key}"


def save(net, name, path, metadata=None):
    """Write one adapter as a safetensors file, atomically: float32, alpha / rank multiplied into lora_B.

    metadata: more {str: str} for the file's header, which also tells rank and alpha. Raises ValueError for an unknown name.
    """
    from models import io  # only files need it, and it needs base_state_dict

    tensors = {}
    for key, a in adapters(net, name).items():
        where = file_key(net, key)
        tensors[f"{where}.lora_A.weight"], tensors[f"{where}.lora_B.weight"] = a.A.float(), (a.scale * a.B).float()
    io.save_tensors(tensors, path, {**(metadata or {}), "format": "pt", "rank": str(a.rank), "alpha": f"{a.alpha:.12g}",
                                    "scale": "alpha / rank is multiplied into lora_B"})


def load(net, name, path):
    """Add the adapter of a file as `name`: rank as in the file and alpha = rank, for lora_B is already scaled. -> the file's metadata.

    The network is untouched unless all of the file fits. Raises ValueError, one line naming the file, for a key that is no layer's
    (also .alpha: the scale of such a file is not in lora_B), an A without its B, and shapes that do not fit; io.UserError for a
    file that is missing or damaged.
    """
    from models import io

    _refuse_name(net, name)
    layers = {file_key(net, key): key for key in linears(net)}
    layers.update({f"transformer.{key}": key for key in linears(net)})  # diffusers' own naming
    with io.open_tensors(path) as f:
        metadata, found = f.metadata() or {}, {}
        for stored in f.keys():
            where, part = next(((stored[:-len(end)], end[6]) for end in (".lora_A.weight", ".lora_B.weight") if stored.endswith(end)),
                               (stored, None))
            if part is None or where not in layers:
                raise ValueError(f"{path} has {stored!r}, which is no adapter of a layer of this {type(net).__name__}")
            found.setdefault(layers[where], {})[part] = f.get_tensor(stored).float()
    if not found:
        raise ValueError(f"{path} holds no adapter")
    for key, pair in found.items():
        if len(pair) != 2:
            raise ValueError(f"{path} has lora_{''.join(pair)} but not both halves for {key!r}: copy or save it again")
    rank = next(iter(found.values()))["A"].shape[0]
    for key, pair in found.items():
        layer = net.get_submodule(key)
        want = {"A": (rank, layer.in_features), "B": (layer.out_features, rank)}
        for part in "AB":
            if tuple(pair[part].shape) != want[part]:
                raise ValueError(f"{path}: lora_{part} of {key!r} has shape {tuple(pair[part].shape)}, this network takes {want[part]}")
    for key, layer in linears(net).items():
        if key in found:
            _attach(layer, name, found[key]["A"], found[key]["B"], alpha=rank)
    return metadata
