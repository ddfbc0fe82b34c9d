"""The host's side of linear_attention.py: launches of the kernels, and operators made of them.

Two operators, `sums` for the keys, Equation (1), and `apply` for the queries, (2), between which
the sums of other ranks may be added; each has its gradient, (3) to (5), as an operator of its own.
They are registered with torch.library, so that torch.compile and activation checkpointing take
them whole. Equations and symbols are those at the top of linear_attention.py.
"""

import functools
from typing import Optional

import torch

if __package__:
    from . import linear_attention_triton as chip
else:  # a copy that is in no package
    import linear_attention_triton as chip

INTERPRET, KERNELS, TILES, triton = chip.INTERPRET, chip.KERNELS, chip.TILES, chip.triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that the kernels take


# ---- what fits -----------------------------------------------------------------------------------


def dot_dtype(dtype):
    """dtype of the operands of tl.dot (table in linear_attention_triton.py).

    The interpreter multiplies bfloat16 wrongly (it takes the raw bits), so there it is widened.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 and not INTERPRET else torch.float32


def halves_of(feature_map):
    """How many softmaxes a feature map has side by side, each of which the kernels treat alone."""
    return 2 if feature_map == "hedgehog" else 1


def padded(size):
    """The power of two that a size is padded to in the kernels; tl.dot takes 16 and more."""
    power = 16
    while power < size:
        power *= 2
    return power


def tiles(kernel, C, F, D, halves, dtype, shared):
    """A line of TILES for one of KERNELS, or None where such a program does not fit."""
    line = "2 bytes, " if dtype == torch.bfloat16 else "4 bytes, "
    if max(C, F, D) <= 64:
        line += "up to 64"
    elif halves == 1:
        line += "wide"
    else:
        line += "two halves" if F > 64 else "narrow halves"
    for least, table in TILES.items():
        if shared >= least and line in table:
            return table[line][KERNELS.index(kernel)]
    return None


def shared_memory(device):
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return max(TILES)  # the interpreter's
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0)


@functools.cache
def cannot_start():
    """Why Triton cannot be used on this machine's GPU, or None: it compiles a little C first."""
    try:
        triton.runtime.driver.active.get_current_device()
    except Exception as e:  # no compiler, no headers, a home that cannot be written, ...
        first = (str(e).splitlines() or [""])[0] or type(e).__name__
        return f"triton cannot start ({first}): it needs a C compiler and Python's headers"
    return None


def why_not(q, v, feature_map, w_q):
    """Why the kernels cannot take such inputs, or None where they can."""
    if triton is None:
        return "triton is not installed"
    if not (q.is_cuda or INTERPRET):
        return (
            "q must be on a CUDA device (or set TRITON_INTERPRET=1 before triton is imported), "
            f"got {q.device}"
        )
    if q.is_cuda and not torch.compiler.is_compiling() and cannot_start():
        return cannot_start()
    if q.dtype not in DTYPES:
        return f"q must be float32, bfloat16 or float16, got {q.dtype}"
    if max(q.shape[1], 0 if v is None else v.shape[1]) > 2**30:
        return "the kernels count at most 2^30 rows"
    C, D = q.shape[3], q.shape[3] if v is None else v.shape[3]
    E = C if w_q is None else w_q.shape[2]
    halves = halves_of(feature_map)
    for name, size in (("q", C), ("w_q", E), ("v", D)):
        if size > 128:
            return f"{name} must have a head size of at most 128, got {size}"
    sizes, shared = [padded(size) for size in (C, E, D)], shared_memory(q.device)
    if any(tiles(name, *sizes, halves, q.dtype, shared) is None for name in KERNELS):
        return (
            f"{feature_map} at head size {max(sizes)} in {q.dtype} needs more than this device's "
            f"{shared // 1024} KB of shared memory, or registers"
        )
    return None


# ---- launches ------------------------------------------------------------------------------------


def constants(kernel, feature_map, C, E, D, dtype, has_w, shared):
    """What a kernel is compiled for, besides its own flags.

    kernel: one of KERNELS; C, E, D: columns of x, of xW, of y; shared: bytes.
    -> dict of constexprs and options, programs per multiprocessor.
    """
    halves = halves_of(feature_map)
    sizes = [padded(size) for size in (C, E, D)]
    rows, warps, stages, programs = tiles(kernel, *sizes, halves, dtype, shared)
    const = dict(zip(("C", "F", "D"), sizes))
    const |= dict(C_WIDTH=C, F_WIDTH=E, D_WIDTH=D, HALVES=halves, HAS_W=has_w, MAP=feature_map)
    tl = chip.tl
    const["DOT"] = tl.bfloat16 if dot_dtype(dtype) == torch.bfloat16 else tl.float32
    const["PRECISION"] = "ieee" if dtype == torch.float32 else "tf32"
    const |= dict(ROWS=rows, num_warps=warps, num_stages=stages)
    return const | dict(enable_fp_fusion=True), programs  # from Triton 3.10 on not the default


def _launch(kernel, name, x, w, D, feature_map, num_splits, halves=1):
    """How to launch a kernel over the rows of x (B, N, H, C), `halves` programs a split.

    num_splits 0: as many as programs run at the same time; tests pass others.
    -> a function of the kernel's tensors, of which None stands for any, strides and flags; the
    number of splits; the padded columns of xW and of y.
    """
    B, N, H, C = x.shape
    E, shared = C if w is None else w.shape[2], shared_memory(x.device)
    const, programs = constants(name, feature_map, C, E, D, x.dtype, w is not None, shared)
    count = -(-N // const["ROWS"])
    if not num_splits:
        processors = 4
        if x.device.type == "cuda":
            processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        num_splits = min(count, max(1, processors * programs // (B * H * halves)))
    rows = -(-count // num_splits) * const["ROWS"]

    def launch(arguments, strides, **flags):
        arguments = [x if argument is None else argument for argument in arguments]
        grid = (B * H * halves * num_splits,)
        kernel[grid](*arguments, N, H, num_splits, rows, *strides, **flags, **const)

    return launch, num_splits, const["F"], const["D"]


def _cast(w, x):
    """A projection in the dtype in which x is multiplied, or None."""
    return None if w is None else w.to(dot_dtype(x.dtype)).contiguous()


def _padded_w(w):
    """w (H, C, E) with zeros up to the sizes of the kernels, or None."""
    if w is None or w.shape[1:] == (padded(w.shape[1]), padded(w.shape[2])):
        return w
    C, E = w.shape[1:]
    return torch.nn.functional.pad(w, (0, padded(E) - E, 0, padded(C) - C))


def _strides(a):
    """Strides of weights a over batch and heads; (0, 0) for None."""
    if a is None:
        return 0, 0
    return a.stride()[:2] if a.dim() == 3 else (a.stride(0), 0)


def _reduce(x, y, w, feature_map, num_splits, scale, a=None, c=None):
    """scale S and scale z of the table in linear_attention_triton.py.

    x (B, N, H, C) and y (B, N, H, D).
    w: from _cast; a (B, N) or (B, H, N), None: 1; c (B, H, N) of queries, None: keys.
    -> (B, H, halves (F D + F)) float32: S flattened, and z behind it.
    """
    halves = halves_of(feature_map)
    name, D = "reduce", y.shape[3]
    launch, splits, F, D = _launch(
        chip.reduce_kernel, name, x, w, D, feature_map, num_splits, halves
    )
    shape = x.shape[0], x.shape[2], splits, halves * F * (D + 1)
    sums = torch.empty(shape, device=x.device, dtype=torch.float32)
    strides = (*x.stride(), *y.stride(), *_strides(a))
    flags = dict(WEIGHTED=a is not None, QUERY=c is not None)
    launch([x, y, _padded_w(w), a, c, sums, scale], strides, **flags)
    # Every program of the next kernel would read all splits if it added them up itself: for 12
    # heads of hedgehog at 128, 264 programs times 11 splits of 132 KB, as many bytes as q, k, v, o.
    return sums.sum(2)


def passes(need, halves, F, shared):
    """Which gradients (of x, y, w) one launch of the backward kernel writes, for each launch.

    Hedgehog's wide halves need 200 KB for those of keys and values at a time, and 144 for either.
    """
    if halves * F <= 128 or shared >= 227 * 1024:
        return [need]
    parts = [need[0], False, need[2]], [False, need[1], False]
    return [part for part in parts if any(part)] or [need]


def _gradients(x, y, w, sums, feature_map, num_splits, scale, need, a=None, o=None):
    """Eq. (5), or with o (3), of rows x (B, N, H, C) and y (B, N, H, D), through the feature map.

    need: which of the gradients of x, y and w are wanted. -> [dx, dy, dw], empty where they are
    not, and c (B, H, N) of queries.
    """
    B, N, H, C = x.shape
    name = "backward k" if o is None else "backward q"
    launch, _, F, _ = _launch(chip.backward_kernel, name, x, w, y.shape[3], feature_map, num_splits)
    dx, dy = (
        torch.empty(t.shape if n else 0, device=x.device, dtype=x.dtype)
        for t, n in zip((x, y), need)
    )
    E = C if w is None else w.shape[2]
    du = torch.empty((B, N, H, E) if need[2] else 0, device=x.device, dtype=dot_dtype(x.dtype))
    c = torch.empty((B, H, N) if o is not None else 0, device=x.device, dtype=torch.float32)
    strides = (*x.stride(), *y.stride(), *_strides(a))
    flags = dict(WEIGHTED=a is not None, QUERY=o is not None)
    arguments = [x, y, o, _padded_w(w), sums, a, c, dx, du, dy, scale]
    halves = halves_of(feature_map)
    for part in passes(need, halves, F, shared_memory(x.device)):
        launch(arguments, strides, **flags, **dict(zip(("WRITE_X", "WRITE_Y", "WRITE_U"), part)))
    dw = x.new_empty(0)
    if need[2]:  # dW = sum_n x_n^T du_n is S with the identity for phi
        whole = _reduce(x, du, None, "none", num_splits, 1.0).sum(0)
        F, D = padded(C), padded(E)
        dw = whole[:, : F * D].view(H, F, D)[:, :C, :E].contiguous()
    return [dx, dy, dw], c


# ---- registered operators ------------------------------------------------------------------------


@torch.library.custom_op("linear_attention::sums", mutates_args=())
def _sums(
    k: torch.Tensor,
    v: torch.Tensor,
    w_k: Optional[torch.Tensor],
    a: Optional[torch.Tensor],
    feature_map: str,
    count: int,
    num_splits: int,
) -> torch.Tensor:
    """Eq. (1) by the kernels, N = count, weights a (B, N) or None.

    -> sums (B, H, halves (F D + F)).
    """
    with torch.cuda.device_of(k):
        return _reduce(k, v, _cast(w_k, k), feature_map, num_splits, 1 / count, a)


@_sums.register_fake
def _(k, v, w_k, a, feature_map, count, num_splits):
    F, D = padded(k.shape[3] if w_k is None else w_k.shape[2]), padded(v.shape[3])
    size = halves_of(feature_map) * F * (D + 1)
    return k.new_empty(k.shape[0], k.shape[2], size, dtype=torch.float32)


@torch.library.custom_op("linear_attention::sums_backward", mutates_args=())
def _sums_backward(
    d_sums: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w_k: Optional[torch.Tensor],
    a: Optional[torch.Tensor],
    feature_map: str,
    count: int,
    num_splits: int,
    need: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eq. (5) by the kernels.  -> dk, dv, dw_k, each empty where `need` says no."""
    with torch.cuda.device_of(k):
        w, rest = _cast(w_k, k), (feature_map, num_splits, 1 / count, need, a)
        dk, dv, dw = _gradients(k, v, w, d_sums.contiguous(), *rest)[0]
    return dk, dv, dw.to(w_k.dtype) if need[2] else dw


@_sums_backward.register_fake
def _(d_sums, k, v, w_k, a, feature_map, count, num_splits, need):
    return _empty_gradients((k, v, w_k), need)


def _empty_gradients(inputs, need):
    """What an operator of gradients returns, without the numbers."""
    return tuple(
        torch.empty(x.shape, device=x.device, dtype=x.dtype) if n else inputs[0].new_empty(0)
        for x, n in zip(inputs, need)
    )


def _sums_autograd(ctx, d_sums):
    need = [ctx.needs_input_grad[i] for i in (0, 1, 2)]
    grads = _sums_backward(d_sums, *ctx.saved_tensors, *ctx.options, need)
    dk, dv, dw = (x if n else None for x, n in zip(grads, need))
    return dk, dv, dw, None, None, None, None


def _sums_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


_sums.register_autograd(_sums_autograd, setup_context=_sums_context)


@torch.library.custom_op("linear_attention::apply", mutates_args=())
def _apply(
    q: torch.Tensor,
    w_q: Optional[torch.Tensor],
    sums: torch.Tensor,
    D: int,
    feature_map: str,
    eps: float,
    num_splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (2) by the kernels.  -> o (B, N, H, D), 1 / d (B, H, N) float32."""
    B, N, H, _ = q.shape
    with torch.cuda.device_of(q):
        w = _cast(w_q, q)
        launch, *_ = _launch(chip.apply_kernel, "apply", q, w, D, feature_map, num_splits)
        o = q.new_empty(B, N, H, D)
        over_d = torch.empty(B, H, N, device=q.device, dtype=torch.float32)
        launch([q, _padded_w(w), sums.contiguous(), o, over_d, eps], q.stride())
    return o, over_d


@_apply.register_fake
def _(q, w_q, sums, D, feature_map, eps, num_splits):
    B, N, H, _ = q.shape
    return q.new_empty(B, N, H, D), q.new_empty(B, H, N, dtype=torch.float32)


@torch.library.custom_op("linear_attention::apply_backward", mutates_args=())
def _apply_backward(
    g: torch.Tensor,
    q: torch.Tensor,
    w_q: Optional[torch.Tensor],
    sums: torch.Tensor,
    o: torch.Tensor,
    over_d: torch.Tensor,
    feature_map: str,
    num_splits: int,
    need: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eqs. (3) and (4) by the kernels.

    g: dL/do -> dq, dw_q, d_sums, each empty where `need` says no.
    """
    w, rest = _cast(w_q, q), (feature_map, num_splits, 1.0)
    with torch.cuda.device_of(q):
        # first, because this launch writes c = -delta, which Eq. (4) needs
        (dq, _, dw), c = _gradients(q, g, w, sums, *rest, [need[0], False, need[1]], over_d, o)
        d_sums = q.new_empty(0)
        if need[2]:
            d_sums = _reduce(q, g, w, *rest, over_d, c)
    return dq, dw.to(w_q.dtype) if need[1] else dw, d_sums


@_apply_backward.register_fake
def _(g, q, w_q, sums, o, over_d, feature_map, num_splits, need):
    return _empty_gradients((q, w_q, sums), need)


def _apply_autograd(ctx, g, _):
    """Gradients of the inputs of _apply; of its outputs only o is ever differentiated."""
    need = [ctx.needs_input_grad[i] for i in (0, 1, 2)]
    grads = _apply_backward(g, *ctx.saved_tensors, ctx.feature_map, ctx.num_splits, need)
    dq, dw, d_sums = (x if n else None for x, n in zip(grads, need))
    return dq, dw, d_sums, None, None, None, None


def _apply_context(ctx, inputs, output):
    q, w_q, sums, _, ctx.feature_map, _, ctx.num_splits = inputs
    ctx.save_for_backward(q, w_q, sums, *output)


_apply.register_autograd(_apply_autograd, setup_context=_apply_context)


def by_kernels(q, k, v, feature_map, w_q, w_k, eps, a=None, share=None, num_splits=0):
    """The function by the kernels: the sums of the keys, those of other ranks, the queries."""
    N = k.shape[1] if share is None else share.N
    sums = _sums(k, v, w_k, a, feature_map, N, num_splits)
    if share is not None:
        sums = share.sum(sums)
    return _apply(q, w_q, sums, v.shape[3], feature_map, eps, num_splits)[0]
