"""Networks over several ranks: torch's own FSDP2, and what has to act on whole gradients.

    mesh = make_mesh(device, shard_ranks)       # None with one rank, where all of this does nothing
    shard(net, mesh)                            # every block, then the rest
    norm = clip(parameters, limit)              # of the gradients of all rows on all ranks

A rank keeps 1 / shard_ranks of every parameter, gradient and moment. A block is gathered when it is
called, forwards and backwards, and let go behind it. Gradients are averaged over all ranks as they
come. All ranks therefore call the same networks in the same order: whatever decides about a call
(a student's step, the length of a roll-out, which of two networks) is the same on all of them.

Parameters that are added later (adapters, the mixed attention of linvideo.py) stay whole on every
rank; `average_whole` averages their gradients.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models.files import UserError
from models.shards import (
    allocate,
    blank_copy,
    copy_weights,
    gathered_parts,
    has_parameters,
    own_rows,
)


def make_mesh(device, shard_ranks=None):
    """The ranks as a mesh: networks are shared out over shard_ranks neighbours, of which every
    group has all rows (HSDP).

    shard_ranks: None means the ranks of a node.  -> a DeviceMesh; None with one rank. Raises
    UserError.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return None
    each = shard_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    refuse_shares(each, ranks)
    if each == ranks:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (ranks // each, each), mesh_dim_names=names)


def blocks_of(net):
    """The parts of a network that are gathered one at a time (`gathered_parts`), and before these
    what several of them have in common."""
    blocks = [b for part in getattr(net, "networks", [net]) for b in gathered_parts(part)]
    seen, common = set(), []
    for block in blocks:
        for module in block.modules():
            inside = any(module in other.modules() for other in common)
            if module in seen and has_parameters(module) and not inside:
                common.append(module)
        seen |= set(block.modules())
    return common + blocks


def shard(net, mesh):
    """Share out the parameters of net, of each of its networks if it has several.

    net may be on the meta device. Modules whose attribute `whole` is true stay whole.
    """
    for part in getattr(net, "networks", [net]):
        blank = blank_copy(part)
        kept = [m for m in part.modules() if getattr(m, "whole", False)]
        kept = {p for module in kept for p in module.parameters()}
        for module in [*blocks_of(part), part]:
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
            type(module).__name__ = type(module).__name__.removeprefix("FSDP")  # for messages
        vars(part)["blank"] = [blank]  # in a list, so that it is no submodule
        parameters = {name: p for name, p in part.named_parameters() if p not in kept}
        whole = [name for name, p in parameters.items() if not isinstance(p, DTensor)]
        assert not whole, f"not shared out: {whole}"


def refuse_shares(each, ranks):
    """Raises UserError where networks cannot be shared out over every `each` of several ranks."""
    if ranks > 1 and ranks % each:
        fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise UserError(f"--shard_ranks {each} does not divide {ranks} ranks: use one of {fitting}")


def refuse_groups(n, ranks):
    """Raises UserError where so many ranks do not divide into groups of n."""
    if ranks % n:
        fitting = [str(m) for m in range(1, n) if ranks % m == 0]
        raise UserError(
            f"--sequence_ranks {n}: {ranks} rank(s) do not divide into groups of {n}: use one of "
            f"{', '.join(fitting)}, or start a multiple of {n} with torchrun"
        )


def place(net, device, mesh):
    """Memory for net on the device, shared out over the mesh if there is one.  -> net

    On the meta device net gets memory without values; otherwise its values stay.
    """
    if mesh is not None:
        shard(net, mesh)
    return allocate(net, device)


def copy_of(net, device, mesh, dtype=None, change=None):
    """A network with net's weights and memory of its own.

    dtype: None keeps each parameter's. change: a function that is given the blank copy and returns
    what is to be filled. -> network
    """
    new = blank_copy(net)
    for p in new.parameters() if dtype else ():
        p.data = p.data.to(dtype)
    new = place(new if change is None else change(new), device, mesh)
    copy_weights(new, net)
    return new


# ---- gradients -----------------------------------------------------------------------------------


@torch.no_grad()
def average_whole(parameters):
    """Average over ranks the gradients of parameters that every rank has whole, in one message per
    dtype; FSDP2 has averaged those of the others."""
    if not dist.is_initialized():
        return
    grads = [p.grad for p in parameters if not isinstance(p, DTensor)]
    for dtype in dict.fromkeys(g.dtype for g in grads):
        some = [g for g in grads if g.dtype == dtype]
        flat = torch.cat([g.reshape(-1) for g in some])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([g.numel() for g in some])
        torch._foreach_copy_(some, [part.view_as(g) for part, g in zip(parts, some, strict=True)])


@torch.no_grad()
def clip(parameters, limit):
    """Scale the gradients of these parameters, a list, so that their common norm is at most limit.

    The norm is that of all rows on all ranks.  -> it, before, a scalar tensor.
    """
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    whole = [p.grad for p in parameters if not isinstance(p, DTensor)]
    grads = [own_rows(p.grad) for p in sharded]
    norm = nn.utils.get_total_norm(whole) if whole else None
    if sharded:
        squared = nn.utils.get_total_norm(grads).square()
        mesh = sharded[0].device_mesh
        dist.all_reduce(squared, group=mesh.get_group("shard"))
        norm = squared.sqrt() if norm is None else (squared + norm.square()).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads + whole, factor)
    return norm


@torch.no_grad()
def move_average(averages, parameters, weight):
    """averages += weight (parameters - averages), each rank its rows."""
    torch._foreach_lerp_([own_rows(a) for a in averages], [own_rows(p) for p in parameters], weight)


# ---- agreement -----------------------------------------------------------------------------------


def largest_over_ranks(value, device="cpu"):
    """The largest of a number over ranks, so that all of them decide alike.  -> float"""
    if not dist.is_initialized():
        return float(value)
    value = torch.as_tensor(value, device=device).double()
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)
