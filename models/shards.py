"""Networks whose parameters are shared out over ranks, and networks that have no weights yet.

FSDP2 keeps a parameter as a DTensor, of which every rank holds consecutive rows. `whole_tensor`
gathers it, and everything else here works on the rows of this rank alone. A plain tensor is its own
only part, so that one process runs the same code.
"""

import copy

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def own_rows(x):
    """The part of a tensor that this rank holds, which shares its memory.  -> plain tensor."""
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


def first_row(x):
    """The number of the first row that this rank holds of x."""
    if not isinstance(x, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return offset[0]


def rows_in(x, of):
    """The rows of a whole tensor `of` that this rank holds of x, which has its shape.

    of: a tensor, or a slice of a safetensors file, of which only these rows are read.
    """
    own = own_rows(x)
    if not own.dim():
        return of  # a number, which is a tensor already
    if not isinstance(x, DTensor):
        return of[:]
    first = first_row(x)
    return of[min(first, x.shape[0]) : first + own.shape[0]]


def whole_tensor(x):
    """All rows of x, gathered. Every rank calls it at the same time."""
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


def holds(x):
    """Whether this rank is the one that writes its part of x: of several with the same rows, one.

    A tensor that all ranks have whole belongs to rank 0.
    """
    if not isinstance(x, DTensor):
        return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    place = x.device_mesh.get_coordinate()
    copies = [i for i, how in zip(place, x.placements, strict=True) if how.is_replicate()]
    return not any(copies)


def gathered_parts(net):
    """The modules of a network that are gathered one at a time: what it names itself (`gathered`),
    or the elements of its lists."""
    lists = [child for child in net.children() if isinstance(child, nn.ModuleList)]
    parts = getattr(net, "gathered", None) or [block for blocks in lists for block in blocks]
    return [part for part in parts if has_parameters(part)]


def has_parameters(module):
    """Whether there is anything to share out."""
    return any(True for _ in module.parameters())


def on_some_rank(net, *each):
    """Whether something is so on any of the ranks that net is shared out over.  -> list of bool.

    Ranks have to call such a network together, also one that has nothing for it.
    """
    p = next(net.parameters())
    if not isinstance(p, DTensor):
        return list(each)
    flags = torch.tensor([float(value) for value in each], device=own_rows(p).device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


# ---- networks without weights --------------------------------------------------------------------


def blank_copy(net):
    """A copy of net whose parameters are on the meta device: they take no memory.

    Buffers are copied, adapters left out. net may be sharded, which a plain deepcopy refuses:
    `shard` of models/plumbing/sharding.py has kept a blank copy of the whole network for it.
    """
    known = {id(p): on_meta(p) for p in net.parameters()}
    for module in net.modules():
        if "blank" in vars(module):
            known[id(module)] = catch_up(copy.deepcopy(module.blank[0]), module)
        if module._modules.get("lora") is not None:
            known[id(module.lora)] = None
        if "attends" in vars(module):  # of adapters too
            known[id(module.attends)] = {}
    return known[id(net)] if id(net) in known else copy.deepcopy(net, known)


def on_meta(p):
    """A parameter of the same shape and dtype without memory."""
    return nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)


def catch_up(new, net):
    """Give a blank copy what the network that it was made of got since: settings, and modules that
    are not sharded, such as a student's linear attention.  -> new."""
    settings = (bool, int, float, str, tuple, list, dict)
    for name, value in vars(net).items():
        kept = name == "sequence" or isinstance(value, settings)
        if kept and name[0] != "_" and name not in ("blank", "attends"):
            setattr(new, name, copy.deepcopy(value))
    for name, child in net.named_children():
        if name == "lora":
            continue
        if isinstance(child, type(new._modules.get(name))):
            catch_up(new._modules[name], child)
        else:
            vars(new).pop(name, None)  # nn.Module refuses a module under a plain attribute's name
            setattr(new, name, blank_copy(child))
    return new


def allocate(net, device):
    """Memory on the device for what is on the meta device, not initialised; the rest moves there.
    -> net"""
    return net._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))


@torch.no_grad()
def copy_weights(new, net):
    """Let new begin with net's parameters and buffers, which may be of another dtype.

    Both are sharded alike, or net is whole. Parameters that net lacks are left as they are.
    """
    own = dict(new.named_parameters()) | dict(new.named_buffers())
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if name in own:
            same = type(own[name].data) is type(value.data)
            part = own_rows(value) if same else rows_in(own[name], value.detach())
            own_rows(own[name]).copy_(part)
