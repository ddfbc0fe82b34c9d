"""Linear attention without a causal mask: a torch reference, and Triton kernels in both directions.

Softmax attention weighs key j for query i by exp(q_i . k_j) and costs O(N^2). Linear attention
weighs it by phi(q_i) . phi(k_j), where the positive feature map phi gives f numbers. The keys and
values then enter through two sums that all queries share,

    S = 1/N sum_j phi(k_j)^T v_j   (f, D)        z = 1/N sum_j phi(k_j)   (f,)                   (1)
    d_i = phi(q_i) . z + eps                     o_i = phi(q_i) S / d_i                          (2)

and the cost is O(N f D). Dividing both sums by the number of keys N changes nothing but the meaning
of eps: it is relative to a denominator that does not grow with the sequence, so the same eps
serves short training sequences and long sampled ones. The gradient, with g_i = dL/do_i and
delta_i = g_i . o_i, is (derived here; the tests check it against autograd of the quadratic form)

    dphi(q_i) = (S g_i - delta_i z) / d_i                                                        (3)
    dS = sum_i phi(q_i)^T g_i / d_i              dz = -sum_i phi(q_i) delta_i / d_i              (4)
    dphi(k_j) = 1/N (dS v_j + dz)                dv_j = 1/N dS^T phi(k_j)                        (5)

(4) is (1), and (3) is (5), with queries in place of keys and other weights, so one kernel serves
both of a pair. The gradient of a projection, dW = sum_n x_n^T du_n, is such a sum again.

    feature_map   phi(x), x of D numbers                              f     eps by default
    "hedgehog"    softmax(x W) and softmax(-x W), two separate        2E    0      LinVideo
                  softmaxes; W (D, E) per head, E = D in the paper                 2510.08318, Eq. 6
    "softmax"     softmax(x)                                          D     0
    "elu"         elu(x) + 1                                          D     0      Katharopoulos
                                                                                   2006.16236, Eq. 7
    "relu"        max(x, 0)                                           D     1e-6
    "none"        x: q and k are features already (B, N, H, f)        f     1e-6

Softmax and elu features of keys are clamped at 1e-12, so that d > 0 and eps may be 0: the rows of
the attention matrix sum to exactly one. Of queries only elu's are clamped: all of them can vanish,
while one of a softmax's is at least 1 / D. relu and given features can vanish together, which is
why they need an eps; pass eps=0 with features that you know to be positive.

Use.

    from kernels.linear_attention import linear_attention
    # q, k, v (B, N, H, D); w_q, w_k (H, D, D); o (B, N, H, D)
    o = linear_attention(q, k, v, w_q=w_q, w_k=w_k)

LinearAttention, at the end of the file, is the module. A copy of this file alone needs torch and
runs the reference. The kernels are in linear_attention_triton.py, what launches them and makes
operators of them in linear_attention_ops.py: for a GPU copy all three, into one folder.

q, k and v may be views with any strides, such as those of a fused projection: nothing is copied.
Keys may have a mask. Triton runs on CUDA for bfloat16 at head sizes up to 128, and for
float32 and float16 up to 64, as far as shared memory goes; sizes that are no powers of two
are padded on the chip. Everything else runs the torch reference; backend_for says which of the two
it will be. Sums are in float32 on both paths, and in float64 for float64 inputs.
The Triton path saves inputs, o, 1 / d, S and z, never the features; it computes no gradient that is
not asked for; it is bitwise reproducible (partial sums, no atomics); torch.compile(fullgraph=True)
and activation checkpointing take it; and it has first derivatives only.

Symbols: B batch, N rows (tokens; queries and keys may differ in number), H heads, D head size, f
features.
"""

import math
import time
import warnings
from types import SimpleNamespace

import torch
from torch.autograd.forward_ad import unpack_dual

try:
    if __package__:
        from . import linear_attention_ops as ops
    else:  # a copy that is in no package
        import linear_attention_ops as ops
except ImportError as e:
    if "linear_attention_ops" not in str(e):
        raise
    ops = None  # this is a copy of the file alone

FEATURE_MAPS = ("hedgehog", "softmax", "relu", "elu", "none")
EPS = {"hedgehog": 0.0, "softmax": 0.0, "elu": 0.0, "relu": 1e-6, "none": 1e-6}
TINY = 1e-12  # smallest feature of a positive map


# ---- torch reference -----------------------------------------------------------------------------


def features(x, feature_map, w=None, query=False):
    """phi(x).  x (B, N, H, D) -> (B, N, H, f).

    w (H, D, E) is the projection of "hedgehog", None the identity. query: leave out the clamp of
    softmaxes, which only keys need. Raises ValueError for an unknown feature map.
    """
    if feature_map == "hedgehog":  # Eq. 6 of LinVideo: the two halves are normalised separately
        u = x if w is None else torch.einsum("bnhd,hde->bnhe", x, w)
        phi = torch.cat([u.softmax(-1), (-u).softmax(-1)], dim=-1)  # (B, N, H, 2E)
        return phi if query else phi.clamp_min(TINY)
    if feature_map == "softmax":
        return x.softmax(-1) if query else x.softmax(-1).clamp_min(TINY)
    if feature_map == "elu":
        # not elu(x) + 1, whose digits cancel where x is far below 0
        return torch.where(x > 0, x + 1, x.clamp_max(0).exp()).clamp_min(TINY)
    if feature_map == "relu":
        return x.relu()
    if feature_map == "none":
        return x
    raise ValueError(f"feature_map must be one of {FEATURE_MAPS}, got {feature_map!r}")


def linear_attention_reference(
    q,
    k,
    v,
    feature_map="hedgehog",
    w_q=None,
    w_k=None,
    eps=0.0,
    chunk=4096,
    share=None,
    key_weights=None,
):
    """Eqs. (1) and (2) in torch on any device, `chunk` rows at a time.

    q (B, N_q, H, D), k, v (B, N, H, D) -> (B, N_q, H, D) in the dtype of q. Computes in float32, or
    in float64 for float64 inputs, also under autocast. Differentiable by autograd. share: see
    `linear_attention`. key_weights (B, N): what the features of each key are multiplied by. eps: 0
    suits features that cannot all vanish; relu and none need one above 0.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    w_q, w_k = (None if w is None else w.to(wide) for w in (w_q, w_k))
    N = k.shape[1] if share is None else share.N
    with torch.autocast(q.device.type, enabled=False):
        S, z = 0, 0
        for a in range(0, k.shape[1], chunk):
            phi = features(k[:, a : a + chunk].to(wide), feature_map, w_k)  # (B, n, H, f)
            if key_weights is not None:
                phi = phi * key_weights[:, a : a + chunk, None, None]
            S = S + torch.einsum("bnhf,bnhd->bhfd", phi, v[:, a : a + chunk].to(wide)) / N
            z = z + phi.sum(1) / N  # (B, H, f)
        if share is not None:  # the keys of other ranks, by one all-reduce
            S, z = share.sum(torch.cat([S, z[..., None]], dim=-1)).tensor_split([-1], dim=-1)
            z = z[..., 0]
        out = []
        for a in range(0, q.shape[1], chunk):
            phi = features(q[:, a : a + chunk].to(wide), feature_map, w_q, query=True)
            d = torch.einsum("bnhf,bhf->bnh", phi, z) + eps
            out.append((torch.einsum("bnhf,bhfd->bnhd", phi, S) / d[..., None]).to(q.dtype))
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def quadratic_oracle(q, k, v, feature_map="hedgehog", w_q=None, w_k=None, eps=0.0):
    """The same through the (N_q, N) attention matrix, for tests: O(N^2) time and memory.

    Computes in the dtype of the inputs.
    """
    phi_q = features(q, feature_map, w_q, query=True)
    phi_k = features(k, feature_map, w_k)
    A = torch.einsum("bnhf,bmhf->bhnm", phi_q, phi_k) / k.shape[1]
    return torch.einsum("bhnm,bmhd->bnhd", A / (A.sum(-1, keepdim=True) + eps), v)


# ---- the public function -------------------------------------------------------------------------


def _check(q, k, v, feature_map, w_q, w_k, eps):
    """Raise ValueError, naming the argument, unless the equations make sense for these inputs."""
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {FEATURE_MAPS}, got {feature_map!r}")
    if not (isinstance(eps, (int, float)) and 0 <= eps < math.inf):
        raise ValueError(f"eps must be a finite number >= 0, got {eps!r}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor (B, N, H, D), got {got}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must have q's dtype and device ({q.dtype}, {q.device}), "
                f"got {x.dtype}, {x.device}"
            )
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has batch size {x.shape[0]}, q has {q.shape[0]}")
        if x.shape[2] != q.shape[2]:
            raise ValueError(f"{name} has {x.shape[2]} heads, q has {q.shape[2]}")
        if 0 in x.shape:
            raise ValueError(f"{name} is empty: shape {tuple(x.shape)}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has head size {k.shape[3]}, q has {q.shape[3]}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v has {v.shape[1]} rows, k has {k.shape[1]}")
    H, D = q.shape[2:]
    for name, w in (("w_q", w_q), ("w_k", w_k)):
        if w is None:
            continue
        if feature_map != "hedgehog":
            raise ValueError(f"{name} was given, but feature_map {feature_map!r} has no projection")
        if not isinstance(w, torch.Tensor):
            raise ValueError(f"{name} must be a tensor (H, D, E), got {type(w).__name__}")
        right = w.shape[:2] == (H, D) and w.dim() == 3 and w.shape[2] > 0
        if not right or not w.is_floating_point() or w.device != q.device:
            raise ValueError(
                f"{name} must be a floating-point tensor (H, D, E) = {(H, D, 'E')} on "
                f"{q.device}, got {tuple(w.shape)}, {w.dtype}, {w.device}"
            )
    E = [D if w is None else w.shape[2] for w in (w_q, w_k)]
    if E[0] != E[1]:
        raise ValueError(f"w_k gives {E[1]} features a half, w_q {E[0]}")


def _key_weights(mask, k, share):
    """Weights a (B, N) of the keys, whose mean over all ranks is 1, from a mask; or None.

    Keys that are masked weigh nothing, as if they were not given.
    """
    if mask is None:
        return None
    B, N = k.shape[:2]
    if not isinstance(mask, torch.Tensor) or mask.device != k.device:
        raise ValueError(f"mask must be a tensor on {k.device}")
    if mask.shape == (B,) and mask.dtype in (torch.int32, torch.int64) and share is None:
        mask = torch.arange(N, device=k.device) < mask[:, None]
    if mask.shape != (B, N) or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool (B, N) = {(B, N)}, or lengths (B,) without a share, "
            f"got {tuple(mask.shape)}, {mask.dtype}"
        )
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    kept, total = mask.sum(1, dtype=wide), N
    if share is not None:
        kept, total = share.sum(kept), share.N
    return mask.contiguous() * (total / kept)[:, None]


def _why_not(q, v, feature_map, w_q):
    """Why the kernels cannot take such inputs, or None where they can."""
    if ops is None:
        return "linear_attention_ops.py and linear_attention_triton.py are not there"
    return ops.why_not(q, v, feature_map, w_q)


def backend_for(q, v=None, feature_map="hedgehog", w_q=None):
    """Which back end linear_attention takes on its own for such inputs, and why not the other.

    q (B, N, H, D), v (B, N, H, D_v), None: like q; w_q as there. Only shapes, dtype and device
    matter; a call with tangents runs torch all the same. -> ("triton", None) or ("torch", a
    sentence).
    """
    why = _why_not(q, v, feature_map, w_q)
    if why is None and ops.INTERPRET:
        why = "under TRITON_INTERPRET=1 the kernels are slow, and run where backend='triton' asks"
    return ("torch", why) if why else ("triton", None)


_faster = {}  # what faster_backend has timed: the back end of each kind of call


def faster_backend(q, k, v, feature_map="hedgehog", w_q=None, w_k=None, calls=5):
    """The back end that was faster for such a call when the first of its kind was timed.

    Arguments are those of linear_attention. Calls are of one kind if shapes, dtypes, device,
    torch's precision of products and wanted gradients are the same; lengths may differ below the
    same powers of two, and strides and a mask do not count. What is timed is `calls` calls in a
    row, with their backward passes where a gradient is wanted, after one that compiles. In float32,
    whose exact products are slow in Triton too, either may be the faster.
    -> "torch", also where the kernels cannot; or "triton", also while torch compiles, and for an
    unknown kind while a CUDA graph is captured and under torch.func's transforms.
    """
    if backend_for(q, v, feature_map, w_q)[0] == "torch":
        return "torch"
    if torch.compiler.is_compiling():
        return "triton"
    tensors = [q, k, v, w_q, w_k]
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    shapes = [None if x is None else (*x.shape[::2], x.shape[-1], x.dtype) for x in tensors]
    lengths = q.shape[1].bit_length(), k.shape[1].bit_length()
    kind = q.device, torch.get_float32_matmul_precision(), feature_map, *needs, *shapes, *lengths
    if kind not in _faster:
        captured = q.is_cuda and torch.cuda.is_current_stream_capturing()
        if captured or torch._C._functorch.is_functorch_wrapped_tensor(q):
            return "triton"
        x = [x if x is None else x.detach().requires_grad_(n) for x, n in zip(tensors, needs)]
        # hooks of its own: those of activation checkpointing would count what is saved here
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
            time_of = {b: _seconds(b, x, feature_map, needs, calls) for b in ("torch", "triton")}
        _faster[kind] = min(time_of, key=time_of.get)
    return _faster[kind]


def _seconds(backend, x, feature_map, needs, calls):
    """Seconds of so many calls in a row, launches included; infinity where memory runs out."""
    wanted = [t for t, n in zip(x, needs) if n]

    def call():
        o = linear_attention(*x[:3], feature_map, *x[3:], backend=backend)
        if wanted:
            torch.autograd.grad(o, wanted, g)

    def wait():
        if g.is_cuda:
            torch.cuda.synchronize(g.device)

    g = x[0].new_ones(*x[0].shape[:3], x[2].shape[3])
    try:
        call()
        wait()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return math.inf
    return time.perf_counter() - began


def _has_tangents(*tensors):
    """Whether forward-mode derivatives pass through: of those the kernels would know nothing.

    A compiled function runs uncompiled under torch.func.jvp, so that it is asked there too.
    """
    if torch.compiler.is_compiling():
        return False
    return any(x is not None and unpack_dual(x).tangent is not None for x in tensors)


_warned = set()  # reasons of which a warning has been given


def linear_attention(
    q,
    k,
    v,
    feature_map="hedgehog",
    w_q=None,
    w_k=None,
    eps=None,
    backend=None,
    share=None,
    mask=None,
):
    """o_i = phi(q_i) S / (phi(q_i) . z + eps): Eqs. (1) and (2) at the top of this file.

    q (B, N_q, H, D), k (B, N, H, D), v (B, N, H, D_v), of one floating dtype and with any strides
    -> (B, N_q, H, D_v) of that dtype, differentiable in q, k, v, w_q and w_k.

    feature_map  "hedgehog", "softmax", "relu", "elu" or "none" (q and k are features already).
    w_q, w_k     (H, D, E), u = x W, for "hedgehog" alone, of any floating dtype; None: identity.
    eps          added to the denominator, which is divided by N; None: 0 for positive maps, 1e-6
                 for "relu" and "none".
    backend      "triton", "torch", or None: what backend_for says, and torch for forward-mode
                 derivatives (torch.func.jvp), which the kernels do not have. A call on a GPU that
                 runs torch because the kernels cannot warns once of the reason. "faster": what
                 faster_backend finds, without a share; two runs may then differ as the two do.
    share        where other ranks have further keys and queries: an object with N, how many keys
                 there are in all, and sum(x), which adds x up over the ranks, differentiably
                 (models/networks/sequence.py; linear_attention_over_ranks).
    mask         which keys count: (B, N) bool, or how many of the first, (B,) integers. The others
                 weigh nothing, as if they were not given, but their numbers must be finite; where
                 no key counts the result is NaN.

    Raises ValueError, naming the argument, for shapes, dtypes or devices that do not fit, for an
    unknown name, an empty tensor or a projection of a map that has none, and for backend="triton"
    with inputs that the kernels do not take.
    """
    if eps is None:
        eps = EPS.get(feature_map, 0.0) if isinstance(feature_map, str) else 0.0
    _check(q, k, v, feature_map, w_q, w_k, eps)
    if backend not in (None, "torch", "triton", "faster"):
        raise ValueError(f"backend must be None, 'torch', 'triton' or 'faster', got {backend!r}")
    a = _key_weights(mask, k, share)
    forward_mode = _has_tangents(q, k, v, w_q, w_k)
    if backend == "faster":  # ranks that share keys have to agree: their sums are laid out alike
        timed = share is None and not forward_mode
        timed = timed and backend_for(q, v, feature_map, w_q)[0] == "triton"
        backend = faster_backend(q, k, v, feature_map, w_q, w_k) if timed else None
    if backend == "triton":
        why = _why_not(q, v, feature_map, w_q)
        if forward_mode:
            why = "the kernels have no forward-mode derivatives: use backend='torch'"
        if why:
            raise ValueError(f"backend='triton': {why}")
    elif backend is None and not forward_mode:
        backend, why = backend_for(q, v, feature_map, w_q)
    else:
        backend, why = "torch", None
    if backend == "triton":
        return ops.by_kernels(q, k, v, feature_map, w_q, w_k, float(eps), a, share)
    if q.is_cuda and why and why not in _warned and not torch.compiler.is_compiling():
        _warned.add(why)
        warnings.warn(f"linear_attention runs in torch, not in Triton: {why}", stacklevel=2)
    return linear_attention_reference(
        q, k, v, feature_map, w_q, w_k, eps, share=share, key_weights=a
    )


class _AllReduce(torch.autograd.Function):
    """The sum over ranks, of x and of its gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, total = group, x.contiguous().clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, g):
        return _AllReduce.apply(g, ctx.group), None


def linear_attention_over_ranks(q, k, v, group=None, N=None, **options):
    """linear_attention where each rank of a group has tokens of its own (context parallelism).

    q (B, n_q, H, D), k and v (B, n, H, D): this rank's. N: how many keys all ranks have together,
    None: n times the ranks. options: of linear_attention. One all-reduce, of S and z, whose size
    does not depend on N; one more in the backward, of dS and dz.
    -> o (B, n_q, H, D) of this rank's queries, differentiable: gradients are those of the sum of
    all ranks' losses.
    """
    share = SimpleNamespace(
        N=N or k.shape[1] * torch.distributed.get_world_size(group),
        sum=lambda x: _AllReduce.apply(x, group),
    )
    return linear_attention(q, k, v, share=share, **options)


# ---- in a network --------------------------------------------------------------------------------


class LinearAttention(torch.nn.Module):
    """linear_attention as a module, in place of a softmax attention of q, k, v (B, N, H, D).

    With "hedgehog" it owns w_q and w_k (H, D, E), E = feature_dim or D. At E = D they start as the
    identity (zeros would give mean(v) for every query); below, channels i, i + E, ... are added up,
    so that every channel, and with it every axis of the rotary positions, has a part. E = D / 2
    gives D features in all and halves the arithmetic. Raises ValueError for an unknown feature map,
    for "none", and for a feature_dim that is not 1 to D or is of a map without projections.
    """

    whole = True  # over several ranks every one keeps all of it: it is small

    def __init__(self, heads, head_dim, feature_map="hedgehog", feature_dim=None):
        super().__init__()
        if feature_map not in FEATURE_MAPS[:-1]:
            raise ValueError(f"feature_map must be one of {FEATURE_MAPS[:-1]}, got {feature_map!r}")
        if feature_dim is not None and feature_map != "hedgehog":
            raise ValueError(f"feature_dim is for 'hedgehog', not for {feature_map!r}")
        E = head_dim if feature_dim is None else feature_dim
        if type(E) is not int or not 1 <= E <= head_dim:
            raise ValueError(f"feature_dim must be 1 to the head size, {head_dim}, got {E!r}")
        self.feature_map = feature_map
        for name in ("w_q", "w_k"):
            w = None
            if feature_map == "hedgehog":
                copies = -(-head_dim // E)
                w = torch.eye(E).repeat(copies, 1)[:head_dim] / copies**0.5  # (D, E)
                w = torch.nn.Parameter(w.repeat(heads, 1, 1))  # (H, D, E)
            self.register_parameter(name, w)

    def forward(self, q, k, v, share=None, mask=None):
        """q, k, v (B, N, H, D) -> (B, N, H, D); share, mask: see linear_attention."""
        return linear_attention(
            q, k, v, self.feature_map, self.w_q, self.w_k, share=share, mask=mask
        )


def use_linear_attention(net, layers, feature_map="hedgehog", feature_dim=None):
    """Give each of these self-attention layers of net a new LinearAttention.

    net has self_attentions (modules that call their attribute `attend` on q, k, v), heads and
    head_dim; layers are indices from 0. The choice is written to net.config, from which such a
    network is built again. Raises ValueError for an index out of range or named twice, and for what
    LinearAttention refuses.
    """
    places = net.self_attentions
    wrong = [i for i in layers if type(i) is not int or not 0 <= i < len(places)]
    if wrong or len(set(layers)) < len(layers):
        raise ValueError(
            f"linear_layers {list(layers)} are not different layers of 0 to {len(places) - 1}"
        )
    for i in layers:
        places[i].attend = LinearAttention(net.heads, net.head_dim, feature_map, feature_dim)
    net.config |= {"linear_layers": sorted(layers), "feature_map": feature_map}
    if feature_dim is not None:
        net.config["feature_dim"] = feature_dim
