"""What one network costs, found without allocating it: bytes and FLOPs of a call and its gradient.

    net = on_meta(lambda: WanTransformer3DModel(**WAN_14B))
    cost = measure(net, call=Call(batch=1, shape=(16, 21, 90, 160), text=512), bf16=True)
    cost.saved, cost.backward, cost.flops

The network is built on PyTorch's meta device, which knows shapes alone. Copies of it with two and
with three blocks then run under FakeTensorMode, where every operation is dispatched but computes
nothing, and the numbers of all its blocks follow on a straight line: its blocks are alike. Networks
with up to four blocks run whole. What is counted:

    bytes   storages that are alive at the same time, weights apart, operation by operation, so that
            temporaries and what a checkpointed block computes again are among them
    FLOPs   of matrix products, convolutions and attention, two for a multiplication and an addition

The fake device is the processor, on which attention takes a fused kernel that saves q, k, v, the
output and one number a row, as on a GPU, and never N x N numbers. Differences remain: work space
inside a kernel is not seen, and linear attention is counted as PyTorch computes it, which keeps
more than the kernel of a GPU. Numbers are for one device that holds the whole network and all
tokens.
"""

import contextlib
import copy
import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from models.networks import lora, trellis
from models.shards import gathered_parts

# ---- what is alive, and what is computed ---------------------------------------------------------


def attention_flops(q, k, v):
    """Both products of one attention call; q (B, H, N, D), k and v (B, H, M, D)."""
    B, H, N, D = q.shape
    return 2 * B * H * N * k.shape[2] * (D + v.shape[3])


class Meter(TorchDispatchMode):
    """Bytes alive and FLOPs of what runs inside; tensors in `known` are not counted.

    now, peak: bytes; flops.
    """

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.seen = {t.untyped_storage()._cdata for t in known}

    def gone(self, key, size):
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.seen:
                self.seen.add(key)
                weakref.finalize(storage, self.gone, key, size)
                self.now += size
        self.peak = max(self.peak, self.now)
        self.flops += flops_of(function, args, kwargs or {}, out)
        return out


def flops_of(function, args, kwargs, out):
    """FLOPs of one operation. A fused attention's backward pass counts as twice its forward pass,
    although it computes the products q k^T once more."""
    name = function.name()
    if "scaled_dot_product" in name:
        backward = "backward" in name
        return (2 if backward else 1) * attention_flops(*args[backward : backward + 3])
    count = flop_registry.get(getattr(function, "overloadpacket", None))
    return count(*args, **kwargs, out_val=out) if count else 0


# ---- networks without memory ---------------------------------------------------------------------


def on_meta(build):
    """build() on the meta device, whose tensors have shapes and no memory."""
    with torch.device("meta"):
        return build().eval()


def as_fake(net):
    """Give a network of the meta device fake tensors; for use under FakeTensorMode.  -> net."""
    made = {}

    def fake(tensor):
        if id(tensor) not in made:  # shared parameters stay shared
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return made[id(tensor)]

    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                grad = p.requires_grad
                module._parameters[name] = nn.Parameter(fake(p), requires_grad=grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return net


def blocks_of(net):
    """Lists of blocks of a network: its direct children that are ModuleLists."""
    return [child for child in net.children() if isinstance(child, nn.ModuleList) and len(child)]


def with_blocks(net, count):
    """A copy of a network whose longest list of blocks has only its first `count` blocks."""
    longest = max(blocks_of(net), key=len)
    rest = list(longest[count:])
    del longest[count:]  # before the copy, which then is a small one
    new = copy.deepcopy(net)
    longest.extend(rest)
    return new


def size_of(parameters):
    """Their bytes."""
    return sum(p.numel() * p.element_size() for p in parameters)


# ---- a call --------------------------------------------------------------------------------------

TEXT = {  # tokens of a prompt
    "WanTransformer3DModel": 512,
    "ZImageTransformer2DModel": 512,
    "CogVideoXTransformer3DModel": 226,
    "QwenImageTransformer2DModel": 512,
    "Lumina2Transformer2DModel": 256,
    "UNet2DConditionModel": 77,
}
IMAGE_TOKENS, CLIP_TOKENS = 1374, 77  # of TRELLIS's image and text models
POINTS = 20_000  # of a shape in TRELLIS's second stage
MERGED = 4  # of them make one token there: cells of 2 x 2 x 2 along a surface


@dataclass(frozen=True)
class Call:
    """One call of a network.

    batch: samples; shape: of one, (C, ...); text: tokens of a prompt, None for what the released
    pipeline has; points: of a sample where samples are sparse.
    """

    batch: int
    shape: tuple
    text: int | None = None
    points: int = POINTS

    def inputs(self, net):
        """-> x, t, cond for a network: tensors of these shapes, under FakeTensorMode fake ones."""
        B, kind = self.batch, type(net).__name__
        x, cond = torch.empty(B, *self.shape), {}
        for name in net.cond_names:
            if name == "label":
                cond[name] = torch.zeros(B, dtype=torch.long)
            elif name == "text":
                cond[name] = torch.empty(B, self.text or TEXT.get(kind, 120), net.text_dim)
            elif name in ("mask", "text_mask"):
                cond[name] = torch.ones(B, self.text or TEXT.get(kind, 120), dtype=torch.bool)
            elif name == "pooled":
                cond[name] = torch.empty(B, net.pooled_dim)
            elif name == "size":
                cond[name] = torch.empty(B, 6)
            elif name == "tokens":
                width = net.config["cond_channels"]
                length = CLIP_TOKENS if width == trellis.CLIP_WIDTH else IMAGE_TOKENS
                cond[name] = torch.empty(B, self.text or length, width)
            elif name == "context":
                cond[name] = torch.empty(B, net.context_channels, *self.shape[1:])
        if getattr(net, "sparse", False):
            x = torch.empty(B * self.points, self.shape[0])
            cond["coords"] = torch.zeros(len(x), 4, dtype=torch.long)
        return x, torch.empty(B), cond


@contextlib.contextmanager
def shapes_alone(net, batch):
    """Where a network looks at values, which fake tensors do not have: prompts count as full, and
    every MERGED points of a sparse sample become one token."""
    if type(net).__name__ in ("ZImageTransformer2DModel", "Lumina2Transformer2DModel"):
        net._check = lambda x, t, text, mask: [text.shape[1]] * len(x)  # they count tokens
    if hasattr(net, "_joint_mask"):  # Qwen-Image's, None for full prompts
        net._joint_mask = lambda keep, N: None
    replaced = {}
    if getattr(net, "sparse", False):
        net._check_points = lambda *_: None
        replaced = dict(make_grid=grid, coarsen=coarser, pool=pooled, pad_samples=padded(batch))
    real = {name: getattr(trellis, name) for name in replaced}
    try:
        for name, value in replaced.items():
            setattr(trellis, name, value)
        yield
    finally:
        for name, value in real.items():
            setattr(trellis, name, value)


def grid(coords, resolution):
    """trellis.make_grid of points that are not known."""
    return trellis.Grid(coords, torch.zeros(27, len(coords), dtype=torch.long))


def coarser(grid_of_points, resolution):
    """trellis.coarsen, with MERGED points a voxel."""
    N = len(grid_of_points.coords)
    grid_of_points.parent = torch.zeros(N, dtype=torch.long)
    return grid(torch.zeros(-(-N // MERGED), 4, dtype=torch.long), resolution)


def pooled(x, parent, count):
    """trellis.pool, whose count of children depends on values."""
    number = torch.ones(count, 1)
    return x.new_zeros(count, x.shape[1]).index_add(0, parent, x) / number.to(x.dtype)


def padded(batch):
    """trellis.pad_samples for samples of equal size."""

    def pad(h, row, samples):
        slot = torch.arange(len(row))
        longest = -(-len(row) // batch)
        h = h.new_zeros(batch * longest, h.shape[1]).index_add(0, slot, h)
        return h.unflatten(0, (batch, longest)), slot, None

    return pad


# ---- the measurement -----------------------------------------------------------------------------


@dataclass
class Cost:
    """What a network costs. Bytes and FLOPs are of one call with the batch that was measured.

    parameters, trained    how many there are, and how many of them get a gradient
    weights                bytes of all of them
    block, outside         bytes of the largest block, and of what is in no block
    forward                largest number of bytes alive during a call without gradient
    saved_all              what a call with gradient keeps until its backward pass, without
                           checkpointing
    saved                  the same with checkpointing, where that is asked for
    backward               largest number of bytes alive during both, gradients of weights apart
    flops                  of a call without gradient
    flops_backward         of a backward pass
    flops_again            of what checkpointing computes a second time
    """

    parameters: int = 0
    trained: int = 0
    weights: int = 0
    block: int = 0
    outside: int = 0
    forward: float = 0
    saved_all: float = 0
    saved: float = 0
    backward: float = 0
    flops: float = 0
    flops_backward: float = 0
    flops_again: float = 0


MEASURED = "forward saved_all saved backward flops flops_backward flops_again".split()


def adapted(net, rank, name="adapter"):
    """Give a network of the meta device an adapter, the only thing in it that is trained."""
    net.requires_grad_(False)
    with torch.device("meta"):
        lora.add(net, name, rank, 1.0)
    return net


def measure(net, call, bf16=False, checkpointing=False, adapter=None, gradient=True):
    """-> Cost of a network of the meta device.

    call: a Call. bf16: under autocast to bfloat16. checkpointing: gradient_checkpointing.
    adapter: the name of the one that is called. gradient: whether it is asked for; without it only
    what a call without gradient costs is measured.
    """
    lists = blocks_of(net)
    blocks = gathered_parts(net)
    in_blocks = {id(p) for block in blocks for p in block.parameters()}
    parameters = list(net.parameters())
    cost = Cost(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        weights=size_of(parameters),
        block=max((size_of(block.parameters()) for block in blocks), default=0),
        outside=size_of(p for p in parameters if id(p) not in in_blocks),
    )
    how = call, bf16, checkpointing, adapter, gradient
    depth = max(map(len, lists), default=0)
    if depth <= 4 or hasattr(net, "gathered"):  # the rows of a U-Net are not alike
        return with_numbers(cost, trace(copy.deepcopy(net), *how))
    two, three = (trace(with_blocks(net, n), *how) for n in (2, 3))
    return with_numbers(cost, [b + (b - a) * (depth - 3) for a, b in zip(two, three)])


def with_numbers(cost, numbers):
    """cost with what was measured, in MEASURED's order."""
    for name, number in zip(MEASURED, numbers):
        setattr(cost, name, number)
    return cost


def trace(net, call, bf16, checkpointing, adapter, gradient):
    """-> the numbers of MEASURED, for the blocks that net has. net is a copy, and is used up."""
    with FakeTensorMode():
        as_fake(net)
        more = {"adapter": adapter} if adapter else {}
        x, t, cond = call.inputs(net)

        def run():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                return net(x, t, **cond, **more)

        with shapes_alone(net, call.batch):
            known = [*net.parameters(), *net.buffers(), x, t, *cond.values()]
            net.gradient_checkpointing = False
            with torch.no_grad(), Meter(known) as plain:
                run()
            if not gradient:
                return plain.peak, 0, 0, 0, plain.flops, 0, 0
            for p in net.parameters():  # a gradient goes as soon as it is there: others count them
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(forget)
            stored = backward_pass(run, known)
            again = stored
            if checkpointing:
                net.gradient_checkpointing = True
                again = backward_pass(run, known)
    backward = stored["flops"] - plain.flops
    recomputed = again["flops"] - stored["flops"]
    kept = stored["saved"], again["saved"], again["peak"]
    return plain.peak, *kept, plain.flops, backward, recomputed


def forget(parameter):
    parameter.grad = None


def backward_pass(run, known):
    """run() and its backward pass -> {"saved": bytes alive between the two, "peak", "flops"}."""
    with Meter(known) as meter:
        out = run()
        saved = meter.now
        out.backward(torch.empty_like(out))
        del out
    return {"saved": saved, "peak": meter.peak, "flops": meter.flops}
