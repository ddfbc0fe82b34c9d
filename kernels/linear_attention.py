"""Linear attention without a causal mask: a torch reference, and Triton kernels in both directions.

Softmax attention weighs key j for query i by exp(q_i . k_j) and costs O(N^2). Linear attention
weighs it by phi(q_i) . phi(k_j), where the positive feature map phi gives f numbers. The keys and
values then enter through two sums that all queries share,

    S = 1/N sum_j phi(k_j)^T v_j   (f, D)        z = 1/N sum_j phi(k_j)   (f,)                   (1)
    d_i = phi(q_i) . z + eps                     o_i = phi(q_i) S / d_i                          (2)

and the cost is O(N f D). Dividing both sums by the number of keys N changes nothing but the meaning
of eps: it is relative to a denominator that does not grow with the sequence, so training on short
sequences and sampling long ones need no other eps. The gradient, with g_i = dL/do_i and
delta_i = g_i . o_i, is (derived here; the tests check it against autograd of the quadratic form)

    dphi(q_i) = (S g_i - delta_i z) / d_i                                                        (3)
    dS = 1/N sum_i phi(q_i)^T (g_i / d_i)        dz = -1/N sum_i phi(q_i) delta_i / d_i          (4)
    dphi(k_j) = dS v_j + dz                      dv_j = dS^T phi(k_j)                            (5)

(4) is (1) with queries in place of keys, g / d in place of v and -delta / d in place of 1, so one
kernel serves both. The gradient of a projection, dW = sum_n x_n^T du_n, is the same sum again.

    feature_map   phi(x), x of D numbers                              f     eps by default
    "hedgehog"    softmax(x W) and softmax(-x W), two separate        2D    0      LinVideo
                  softmaxes; W (D, D) per head                                     2510.08318, Eq. 6
    "softmax"     softmax(x)                                          D     0
    "elu"         elu(x) + 1                                          D     0      Katharopoulos
                                                                                   2006.16236, Eq. 7
    "relu"        max(x, 0)                                           D     1e-6
    "none"        x: q and k are features already (B, N, H, f)        f     1e-6

Softmax and elu features are positive and are clamped at 1e-12, so that d > 0 and eps may be 0: the
rows of the attention matrix sum to exactly one. relu and given features can vanish together, which
is why they need an eps; pass eps=0 with features that you know to be positive.

Use.

    from kernels.linear_attention import linear_attention
    # q, k, v (B, N, H, D); w_q, w_k (H, D, D); o (B, N, H, D)
    o = linear_attention(q, k, v, w_q=w_q, w_k=w_k)

LinearAttention, at the end of the file, is the module. To copy it without the kernels, take
`features`, `linear_attention_reference`, FEATURE_MAPS, TINY and EPS too, and call the reference in
its forward, with eps=EPS[feature_map].

q, k and v may be views with any strides, such as those of a fused projection: nothing is copied.
Triton runs on CUDA for float32, bfloat16 and float16 and for sizes 16, 32, 64 and 128 (given
features also 256). Everything else runs the torch reference. Sums are in float32 on both paths, and
in float64 for float64 inputs. The Triton path saves inputs, o, d, S and z, never the features; it
is bitwise reproducible (partial sums, no atomics); it is registered with torch.library, so that
torch.compile(fullgraph=True) and activation checkpointing take it as one operator; and it has first
derivatives only. This file needs torch, and triton where there is one.

Verified: the kernels against a float64 oracle, under Triton's interpreter (TRITON_INTERPRET=1) and
compiled on an H100, where their tiles were chosen; figures in docs/results/kernels.md. Not
verified: any other GPU.

Symbols: B batch, N rows (tokens; queries and keys may differ in number), H heads, D head size, f
features.
"""

import math
from typing import Optional

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch path does without
    triton = None

FEATURE_MAPS = ("hedgehog", "softmax", "relu", "elu", "none")
EPS = {"hedgehog": 0.0, "softmax": 0.0, "elu": 0.0, "relu": 1e-6, "none": 1e-6}
TINY = 1e-12  # smallest feature of a positive map
SIZES = (16, 32, 64, 128)  # head sizes that the kernels take
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that the kernels take
# Bytes of shared memory that a program of size 128 may need: what sm_90 and sm_100 have.
SHARED = 227 * 1024


# ---- torch reference -----------------------------------------------------------------------------


def features(x, feature_map, w=None):
    """phi(x).  x (B, N, H, D) -> (B, N, H, f).

    w (H, D, D) is the projection of "hedgehog", None the identity. Raises ValueError for an unknown
    feature map.
    """
    if feature_map == "hedgehog":  # Eq. 6 of LinVideo: the two halves are normalised separately
        u = x if w is None else torch.einsum("bnhd,hde->bnhe", x, w)
        return torch.cat([u.softmax(-1), (-u).softmax(-1)], dim=-1).clamp_min(TINY)  # (B, N, H, 2D)
    if feature_map == "softmax":
        return x.softmax(-1).clamp_min(TINY)
    if feature_map == "elu":
        return (torch.nn.functional.elu(x) + 1).clamp_min(TINY)
    if feature_map == "relu":
        return x.relu()
    if feature_map == "none":
        return x
    raise ValueError(f"feature_map must be one of {FEATURE_MAPS}, got {feature_map!r}")


def linear_attention_reference(
    q, k, v, feature_map="hedgehog", w_q=None, w_k=None, eps=0.0, chunk=4096, share=None
):
    """Eqs. (1) and (2) in torch on any device, `chunk` rows at a time.

    q (B, N_q, H, D), k, v (B, N, H, D) -> (B, N_q, H, D) in the dtype of q. Computes in float32, or
    in float64 for float64 inputs, also under autocast. Differentiable by autograd. share: see
    `linear_attention`.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    w_q, w_k = (None if w is None else w.to(wide) for w in (w_q, w_k))
    N = k.shape[1] if share is None else share.N
    with torch.autocast(q.device.type, enabled=False):
        S, z = 0, 0
        for a in range(0, k.shape[1], chunk):
            phi = features(k[:, a : a + chunk].to(wide), feature_map, w_k)  # (B, n, H, f)
            S = S + torch.einsum("bnhf,bnhd->bhfd", phi, v[:, a : a + chunk].to(wide)) / N
            z = z + phi.sum(1) / N  # (B, H, f)
        if share is not None:  # the keys of other ranks, by one all-reduce
            S, z = share.sum(torch.cat([S, z[..., None]], dim=-1)).tensor_split([-1], dim=-1)
            z = z[..., 0]
        out = []
        for a in range(0, q.shape[1], chunk):
            phi = features(q[:, a : a + chunk].to(wide), feature_map, w_q)
            d = torch.einsum("bnhf,bhf->bnh", phi, z) + eps
            out.append((torch.einsum("bnhf,bhfd->bnhd", phi, S) / d[..., None]).to(q.dtype))
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def quadratic_oracle(q, k, v, feature_map="hedgehog", w_q=None, w_k=None, eps=0.0):
    """The same through the (N_q, N) attention matrix, for tests: O(N^2) time and memory.

    Computes in the dtype of the inputs.
    """
    phi_q, phi_k = features(q, feature_map, w_q), features(k, feature_map, w_k)
    A = torch.einsum("bnhf,bmhf->bhnm", phi_q, phi_k) / k.shape[1]
    return torch.einsum("bhnm,bmhd->bnhd", A / (A.sum(-1, keepdim=True) + eps), v)


# ---- Triton kernels ------------------------------------------------------------------------------
#
# A program owns a range of rows (a "split") of one (batch, head) and walks through it ROWS at a
# time. Features come in blocks of F columns: one block, or two for hedgehog (the halves of both
# signs) and for 256 given features. S (f, D) and z (f,) lie one behind the other in one float32
# tensor, "sums" (B, H, f D + f). DOT is the dtype of the operands of tl.dot, and PRECISION says how
# float32 operands are multiplied:
#
#     inputs      DOT         PRECISION
#     bfloat16    bfloat16    (unused)
#     float16     float32     "tf32": the mantissa of float16, with the range that features of 1e-12
#                             and gradients over d need
#     float32     float32     "ieee"
#
# Accumulators, softmaxes, z, d and delta are float32. Offsets that grow with batch or sequence are
# int64: 75,600 tokens of 40 heads of 128 pass 2^31 elements at a batch of 6.

if triton is not None:
    _TINY = tl.constexpr(TINY)

    @triton.jit
    def _load(X, x_n, x_d, rows, cols, keep):
        """Load a tile, with zeros where keep is false.  -> (rows, cols)."""
        return tl.load(X + rows[:, None] * x_n + cols[None, :] * x_d, mask=keep[:, None], other=0.0)

    @triton.jit
    def _place(program, N, H, splits, rows_per_split):
        """Where this program works; a split beyond N has no rows.

        -> split, batch * H + head, batch, head, first row, row after the last.
        """
        split = program % splits
        bh = (program // splits).to(tl.int64)
        start = split.to(tl.int64) * rows_per_split
        return split, bh, bh // H, bh % H, start, tl.minimum(start + rows_per_split, N)

    @triton.jit
    def _second_block(X, u, x_n, x_d, rows, f, keep, MAP: tl.constexpr, F: tl.constexpr):
        """Input of the second block of features: -u for hedgehog, else the next F columns of X.

        -> (rows, F) float32.
        """
        if MAP == "hedgehog":
            u = -u
        else:
            u = _load(X + F * x_d, x_n, x_d, rows, f, keep).to(tl.float32)
        return u

    @triton.jit
    def _softmax(u):
        """Softmax over the columns of a tile."""
        e = tl.exp(u - tl.max(u, 1)[:, None])
        return e / tl.sum(e, 1)[:, None]

    @triton.jit
    def _features(u, MAP: tl.constexpr):
        """phi of a tile u (rows, F) in float32, for hedgehog one half of it.

        Rows that do not exist (all zeros) have features too, such as 1 / F.
        """
        if MAP == "hedgehog" or MAP == "softmax":
            phi = tl.maximum(_softmax(u), _TINY)
        elif MAP == "elu":
            phi = tl.maximum(tl.where(u > 0, u + 1, tl.exp(tl.minimum(u, 0.0))), _TINY)
        elif MAP == "relu":
            phi = tl.maximum(u, 0.0)
        else:
            phi = u
        return phi

    @triton.jit
    def _features_backward(u, dphi, MAP: tl.constexpr):
        """dL/du from dL/dphi, both (rows, F); a clamped feature passes no gradient."""
        if MAP == "hedgehog" or MAP == "softmax":
            p = _softmax(u)
            dphi = tl.where(p >= _TINY, dphi, 0.0)
            du = p * (dphi - tl.sum(dphi * p, 1)[:, None])
        elif MAP == "elu":
            e = tl.exp(tl.minimum(u, 0.0))
            du = tl.where(e >= _TINY, dphi * e, 0.0)  # e = 1 for u > 0
        elif MAP == "relu":
            du = tl.where(u > 0, dphi, 0.0)
        else:
            du = dphi
        return du

    @triton.jit
    def _reduce_kernel(
        X,  # (B, N, H, f)
        Y,  # (B, N, H, D)
        W,  # (H, F, F), read with HAS_W
        DEN,  # d (B H, N), read with WEIGHTED
        DELTA,  # (B H, N), read with WEIGHTED
        SUMS,  # (B H, splits, f D + f) float32, written
        scale,
        N,
        H,
        splits,
        rows_per_split,
        x_b,  # strides of X and Y
        x_n,
        x_h,
        x_d,
        y_b,
        y_n,
        y_h,
        y_d,
        MAP: tl.constexpr,
        F: tl.constexpr,
        D: tl.constexpr,
        BLOCKS: tl.constexpr,
        HAS_W: tl.constexpr,
        WEIGHTED: tl.constexpr,
        DOT: tl.constexpr,
        PRECISION: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Eq. (1) or (4): this split's share of scale sum phi(x)^T y and of scale sum phi(x) c.

        c = 1; with WEIGHTED, y / d takes the place of y, and c = -delta / d. A program computes one
        block of features: that of the second block finds X and Y in the cache, and the sums S of
        both would fill the registers. A split beyond the last row writes zeros.
        """
        block = tl.program_id(0) % BLOCKS
        program = tl.program_id(0) // BLOCKS
        split, bh, b, h, start, stop = _place(program, N, H, splits, rows_per_split)
        X += b * x_b + h * x_h
        Y += b * y_b + h * y_h
        if MAP == "none":
            X += block * F * x_d
        rows, f, c = tl.arange(0, ROWS), tl.arange(0, F), tl.arange(0, D)
        if HAS_W:
            w = tl.load(W + h * F * F + f[:, None] * F + f[None, :])
        acc, z = tl.zeros((F, D), tl.float32), tl.zeros((F,), tl.float32)
        for n in range(start, stop, ROWS):
            keep = rows < stop - n
            y = _load(Y + n * y_n, y_n, y_d, rows, c, keep)
            weight = keep.to(tl.float32)  # rows that do not exist weigh 0, and there y = 0
            if WEIGHTED:
                over_d = 1 / tl.load(DEN + bh * N + n + rows, mask=keep, other=1.0)
                weight = -tl.load(DELTA + bh * N + n + rows, mask=keep, other=0.0) * over_d
                y = y.to(tl.float32) * over_d[:, None]
            x = _load(X + n * x_n, x_n, x_d, rows, f, keep).to(DOT)
            if HAS_W:
                u = tl.dot(x, w, input_precision=PRECISION)
            else:
                u = x.to(tl.float32)
            if MAP == "hedgehog":
                u = tl.where(block == 0, u, -u)
            # the same rounded features enter S and z, so that their roundings cancel in part
            phi = _features(u, MAP).to(DOT)
            acc = tl.dot(tl.trans(phi), y.to(DOT), acc, input_precision=PRECISION)
            z += tl.sum(phi.to(tl.float32) * weight[:, None], 0)
        SUMS += (bh * splits + split) * (BLOCKS * F * (D + 1))
        tl.store(SUMS + block * (F * D) + f[:, None] * D + c[None, :], acc * scale)
        tl.store(SUMS + BLOCKS * F * D + block * F + f, z * scale)

    @triton.jit
    def _apply_kernel(
        X,  # q (B, N, H, f)
        W,  # (H, F, F), read with HAS_W
        SUMS,  # S and z, (B H, f D + f) float32
        OUT,  # o (B, N, H, D), written
        DEN,  # d (B H, N) float32, written
        eps,
        N,
        H,
        splits,
        rows_per_split,
        x_b,  # strides of X and OUT
        x_n,
        x_h,
        x_d,
        o_b,
        o_n,
        o_h,
        o_d,
        MAP: tl.constexpr,
        F: tl.constexpr,
        D: tl.constexpr,
        BLOCKS: tl.constexpr,
        HAS_W: tl.constexpr,
        RESIDENT: tl.constexpr,
        DOT: tl.constexpr,
        PRECISION: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Eq. (2) for this split's queries.

        With RESIDENT, W and S are loaded once and stay in shared memory while rows stream through.
        """
        _, bh, b, h, start, stop = _place(tl.program_id(0), N, H, splits, rows_per_split)
        X += b * x_b + h * x_h
        OUT += b * o_b + h * o_h
        S = SUMS + bh * (BLOCKS * F * (D + 1))
        Z = S + BLOCKS * F * D
        rows, f, c = tl.arange(0, ROWS), tl.arange(0, F), tl.arange(0, D)
        at_s = f[:, None] * D + c[None, :]
        if RESIDENT:
            s0 = tl.load(S + at_s).to(DOT)
            if BLOCKS == 2:
                s1 = tl.load(S + F * D + at_s).to(DOT)
        W += h * F * F
        at_w = f[:, None] * F + f[None, :]
        if HAS_W and RESIDENT:
            w = tl.load(W + at_w)
        for n in range(start, stop, ROWS):
            keep = rows < stop - n
            x = _load(X + n * x_n, x_n, x_d, rows, f, keep).to(DOT)
            if HAS_W:
                if not RESIDENT:
                    w = tl.load(W + at_w)
                u = tl.dot(x, w, input_precision=PRECISION)
            else:
                u = x.to(tl.float32)
            phi = _features(u, MAP).to(DOT)
            if not RESIDENT:
                s0 = tl.load(S + at_s).to(DOT)
            acc = tl.dot(phi, s0, input_precision=PRECISION)
            d = tl.sum(phi.to(tl.float32) * tl.load(Z + f)[None, :], 1) + eps
            if BLOCKS == 2:
                u = _second_block(X + n * x_n, u, x_n, x_d, rows, f, keep, MAP, F)
                phi = _features(u, MAP).to(DOT)
                if not RESIDENT:
                    s1 = tl.load(S + F * D + at_s).to(DOT)
                acc = tl.dot(phi, s1, acc, input_precision=PRECISION)
                d += tl.sum(phi.to(tl.float32) * tl.load(Z + F + f)[None, :], 1)
            d = tl.where(keep, d, 1.0)  # no 0 / 0 in rows that do not exist
            o = (acc / d[:, None]).to(OUT.dtype.element_ty)
            tl.store(OUT + n * o_n + rows[:, None] * o_n + c[None, :] * o_d, o, mask=keep[:, None])
            tl.store(DEN + bh * N + n + rows, d, mask=keep)

    @triton.jit
    def _backward_kernel(
        X,  # q or k (B, N, H, f)
        Y,  # dL/do or v (B, N, H, D)
        OUT,  # o (B, N, H, D), read with QUERY
        W,  # (H, F, F), read with HAS_W
        SUMS,  # S and z or dS and dz, (B H, f D + f) float32
        DEN,  # d (B H, N), read with QUERY
        DELTA,  # (B H, N), written with QUERY
        DX,  # (B, N, H, f), written
        DU,  # (B, N, H, F), written with WRITE_U
        DV,  # (B, N, H, D), written without QUERY
        N,
        H,
        splits,
        rows_per_split,
        x_b,  # strides of X, Y and OUT; DX, DU and DV are contiguous
        x_n,
        x_h,
        x_d,
        y_b,
        y_n,
        y_h,
        y_d,
        o_b,
        o_n,
        o_h,
        o_d,
        MAP: tl.constexpr,
        F: tl.constexpr,
        D: tl.constexpr,
        BLOCKS: tl.constexpr,
        HAS_W: tl.constexpr,
        QUERY: tl.constexpr,
        WRITE_U: tl.constexpr,
        RESIDENT: tl.constexpr,
        DOT: tl.constexpr,
        PRECISION: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Eq. (3) or (5) for this split's rows, then through the feature map: du, and dx = du W^T.

        With QUERY, X = q, Y = dL/do and SUMS = S and z: Eq. (3), and delta is written. Otherwise
        X = k, Y = v and SUMS = dS and dz: Eq. (5), and dv is written. DU, of dtype DOT, is what dW
        needs.
        """
        _, bh, b, h, start, stop = _place(tl.program_id(0), N, H, splits, rows_per_split)
        X += b * x_b + h * x_h
        Y += b * y_b + h * y_h
        OUT += b * o_b + h * o_h
        S = SUMS + bh * (BLOCKS * F * (D + 1))
        Z = S + BLOCKS * F * D
        rows, f, c = tl.arange(0, ROWS), tl.arange(0, F), tl.arange(0, D)
        at_s = f[:, None] * D + c[None, :]
        if RESIDENT:
            s0 = tl.load(S + at_s).to(DOT)
            if BLOCKS == 2:
                s1 = tl.load(S + F * D + at_s).to(DOT)
        W += h * F * F
        at_w = f[:, None] * F + f[None, :]
        if HAS_W and RESIDENT:
            w = tl.load(W + at_w)
        for n in range(start, stop, ROWS):
            keep = rows < stop - n
            # in a contiguous (B, N, H, .) tensor, where this head's next row is H rows further on
            row = (b * N + n) * H + h
            y = _load(Y + n * y_n, y_n, y_d, rows, c, keep)
            if QUERY:
                o = _load(OUT + n * o_n, o_n, o_d, rows, c, keep)
                delta = tl.sum(y.to(tl.float32) * o.to(tl.float32), 1)
                tl.store(DELTA + bh * N + n + rows, delta, mask=keep)
                over_d = 1 / tl.load(DEN + bh * N + n + rows, mask=keep, other=1.0)
            y = y.to(DOT)
            x = _load(X + n * x_n, x_n, x_d, rows, f, keep).to(DOT)
            if HAS_W:
                if not RESIDENT:
                    w = tl.load(W + at_w)
                u = tl.dot(x, w, input_precision=PRECISION)
            else:
                u = x.to(tl.float32)
            for block in tl.static_range(BLOCKS):
                if not RESIDENT:
                    s = tl.load(S + block * F * D + at_s).to(DOT)
                elif block == 0:
                    s = s0
                else:
                    s = s1
                if block == 1:
                    u = _second_block(X + n * x_n, u, x_n, x_d, rows, f, keep, MAP, F)
                if not QUERY:
                    phi = _features(u, MAP).to(DOT)
                    if block == 0:
                        dv = tl.dot(phi, s, input_precision=PRECISION)
                    else:
                        dv = tl.dot(phi, s, dv, input_precision=PRECISION)
                dphi = tl.dot(y, tl.trans(s), input_precision=PRECISION)
                # loaded before the loop, z would hold registers all along
                z = tl.load(Z + block * F + f)
                if QUERY:
                    dphi = (dphi - delta[:, None] * z[None, :]) * over_d[:, None]
                else:
                    dphi += z[None, :]
                du_block = _features_backward(u, dphi, MAP)
                if MAP == "none":
                    at = DX + row * (BLOCKS * F) + block * F
                    at = at + rows[:, None] * (H * BLOCKS * F) + f[None, :]
                    tl.store(at, du_block.to(DX.dtype.element_ty), mask=keep[:, None])
                elif block == 0:
                    du = du_block
                else:
                    du -= du_block  # the second half sees -u
            if not QUERY:
                at = DV + row * D + rows[:, None] * (H * D) + c[None, :]
                tl.store(at, dv.to(DV.dtype.element_ty), mask=keep[:, None])
            if MAP != "none":
                at = row * F + rows[:, None] * (H * F) + f[None, :]
                if WRITE_U:
                    tl.store(DU + at, du.to(DOT), mask=keep[:, None])
                if HAS_W:
                    if not RESIDENT:
                        w = tl.load(W + at_w)
                    du = tl.dot(du.to(DOT), tl.trans(w), input_precision=PRECISION)
                tl.store(DX + at, du.to(DX.dtype.element_ty), mask=keep[:, None])


# With TRITON_INTERPRET=1 kernels run on CPU tensors.
INTERPRET = triton is not None and not isinstance(_reduce_kernel, triton.runtime.JITFunction)


def dot_dtype(dtype):
    """dtype of the operands of tl.dot (table above).

    The interpreter multiplies bfloat16 wrongly (it takes the raw bits), so there it is widened.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 and not INTERPRET else torch.float32


# Rows per tile, warps and pipeline stages. The bfloat16 lines are the fastest found on an H100 at
# sizes 128 and 64 (docs/results/kernels.md); the others are not tuned. A block is one of features.
KERNELS = ("reduce", "apply", "backward q", "backward k")
# fmt: off
TILES = {
    # operands, size             reduce        apply         backward q    backward k
    "4 bytes, 128":             ((16, 8, 2),   (16, 8, 1),   (16, 8, 1),   (16, 8, 1)),
    "4 bytes, smaller":         ((32, 4, 2),   (32, 4, 2),   (32, 4, 2),   (32, 4, 2)),
    "2 bytes, 128, 2 blocks":   ((32, 4, 3),   (128, 8, 3),  (32, 8, 1),   (32, 8, 2)),
    "2 bytes, 128, 1 block":    ((64, 4, 2),   (64, 8, 2),   (32, 8, 1),   (64, 4, 2)),
    "2 bytes, smaller":         ((128, 4, 2),  (64, 4, 2),   (64, 4, 2),   (64, 4, 2)),
}
# fmt: on


def launch_config(kernel, F, D, blocks, dtype):
    """Rows per tile, warps and pipeline stages of one of KERNELS, as constexprs and options.

    RESIDENT (not of "reduce") says whether W and S stay in shared memory while the rows stream
    through. Operands of 4 bytes do not fit beside each other at size 128, so there S is read again
    for every tile.
    """
    wide, narrow_dtype = max(F, D) == 128, dtype == torch.bfloat16
    if not wide:
        line = "2 bytes, smaller" if narrow_dtype else "4 bytes, smaller"
    elif not narrow_dtype:
        line = "4 bytes, 128"
    else:
        line = "2 bytes, 128, 2 blocks" if blocks == 2 else "2 bytes, 128, 1 block"
    rows, warps, stages = TILES[line][KERNELS.index(kernel)]
    resident = {} if kernel == "reduce" else {"RESIDENT": narrow_dtype or not wide}
    return dict(ROWS=rows, num_warps=warps, num_stages=stages, **resident)


def split_rows(N, const, programs, num_splits, device):
    """Number of splits that the rows are cut into, and the rows of one, a multiple of the tile.

    The rule is about two programs per multiprocessor, or four of sizes below 128. const: what
    constants() gives; programs: how many one split takes; num_splits: 0 for the rule.
    """
    tiles = -(-N // const["ROWS"])
    if not num_splits:
        processors = 4
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = processors * (2 if max(const["F"], const["D"]) == 128 else 4)
        num_splits = min(tiles, -(-wanted // programs))
    return num_splits, -(-tiles // num_splits) * const["ROWS"]


def _blocks(feature_map, width):
    """Feature columns of one block, and the number of blocks, for a q or k of this width."""
    if feature_map == "hedgehog":
        return width, 2
    if feature_map == "none" and width == 256:
        return 128, 2
    return width, 1


def constants(kernel, feature_map, width, D, dtype, has_w):
    """What a kernel is compiled for, besides its own flags.  -> dict of constexprs and options.

    kernel: one of KERNELS; width: the columns of x; D: those of y or o.
    """
    F, blocks = _blocks(feature_map, width)
    return dict(
        MAP=feature_map,
        F=F,
        D=D,
        BLOCKS=blocks,
        HAS_W=has_w,
        DOT=tl.bfloat16 if dot_dtype(dtype) == torch.bfloat16 else tl.float32,
        PRECISION="ieee" if dtype == torch.float32 else "tf32",
        **launch_config(kernel, F, D, blocks, dtype),
    )


def _reduce(x, y, w, feature_map, num_splits, scale, den=None, delta=None):
    """Launch the sums of Eq. (1), or with den and delta those of Eq. (4), times scale.

    x (B, N, H, f), y (B, N, H, D), den and delta (B, H, N) -> (B, H, f D + f) float32: the sum of
    phi(x_n)^T y_n (f, D), flattened, and behind it the sum of phi(x_n) (f,).
    """
    B, N, H, _ = x.shape
    D = y.shape[3]
    const = constants("reduce", feature_map, x.shape[3], D, x.dtype, w is not None)
    f = const["F"] * const["BLOCKS"]
    programs = B * H * const["BLOCKS"]
    splits, rows_per_split = split_rows(N, const, programs, num_splits, x.device)
    sums = torch.empty(B, H, splits, f * D + f, device=x.device, dtype=torch.float32)
    _reduce_kernel[(programs * splits,)](
        x,
        y,
        x if w is None else w,
        sums if den is None else den,
        sums if delta is None else delta,
        sums,
        scale,
        N,
        H,
        splits,
        rows_per_split,
        *x.stride(),
        *y.stride(),
        WEIGHTED=den is not None,
        **const,
    )
    return sums.sum(2)


# ---- registered operators ------------------------------------------------------------------------


@torch.library.custom_op("linear_attention::forward", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w_q: Optional[torch.Tensor],
    w_k: Optional[torch.Tensor],
    feature_map: str,
    eps: float,
    num_splits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eqs. (1) and (2) by the kernels.

    -> o (B, N_q, H, D), d (B, H, N_q) float32, S and behind it z (B, H, f D + f) float32.
    num_splits 0 is the rule of split_rows; tests pass others.
    """
    B, N, H, _ = q.shape
    D, dot = v.shape[3], dot_dtype(q.dtype)
    w_q, w_k = (None if w is None else w.to(dot).contiguous() for w in (w_q, w_k))
    with torch.cuda.device_of(q):
        sums = _reduce(k, v, w_k, feature_map, num_splits, 1 / k.shape[1])
        o, d = q.new_empty(B, N, H, D), torch.empty(B, H, N, device=q.device, dtype=torch.float32)
        const = constants("apply", feature_map, q.shape[3], D, q.dtype, w_q is not None)
        splits, rows_per_split = split_rows(N, const, B * H, num_splits, q.device)
        _apply_kernel[(B * H * splits,)](
            q,
            q if w_q is None else w_q,
            sums,
            o,
            d,
            eps,
            N,
            H,
            splits,
            rows_per_split,
            *q.stride(),
            *o.stride(),
            **const,
        )
    return o, d, sums


@_forward.register_fake
def _(q, k, v, w_q, w_k, feature_map, eps, num_splits):
    B, N, H, width = q.shape
    f, D = width * (2 if feature_map == "hedgehog" else 1), v.shape[3]
    return (
        q.new_empty(B, N, H, D),
        q.new_empty(B, H, N, dtype=torch.float32),
        q.new_empty(B, H, f * D + f, dtype=torch.float32),
    )


@torch.library.custom_op("linear_attention::backward", mutates_args=())
def _backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w_q: Optional[torch.Tensor],
    w_k: Optional[torch.Tensor],
    o: torch.Tensor,
    d: torch.Tensor,
    sums: torch.Tensor,
    feature_map: str,
    num_splits: int,
    need_w_q: bool,
    need_w_k: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eqs. (3) to (5) by the kernels.

    g: dL/do; o, d, sums: what _forward returned -> dq, dk, dv, dw_q, dw_k, the last two empty where
    they are not needed.
    """
    dot = dot_dtype(q.dtype)
    cast_q, cast_k = (None if w is None else w.to(dot).contiguous() for w in (w_q, w_k))
    delta = torch.empty_like(d)
    dq, dk, dv = (torch.empty(x.shape, device=q.device, dtype=q.dtype) for x in (q, k, v))

    def rows(query, x, y, w, sums, dx, need_w):
        """Launch the backward kernel.  -> du (B, N, H, F), or None where W needs no gradient."""
        B, N, H, _ = x.shape
        kernel = "backward q" if query else "backward k"
        const = constants(kernel, feature_map, x.shape[3], v.shape[3], x.dtype, w is not None)
        splits, rows_per_split = split_rows(N, const, B * H, num_splits, q.device)
        du = torch.empty(x.shape, device=q.device, dtype=dot) if need_w else None
        _backward_kernel[(B * H * splits,)](
            x,
            y,
            o,
            x if w is None else w,
            sums,
            d,
            delta,
            dx,
            dx if du is None else du,
            dv,
            N,
            H,
            splits,
            rows_per_split,
            *x.stride(),
            *y.stride(),
            *o.stride(),
            QUERY=query,
            WRITE_U=need_w,
            **const,
        )
        return du

    def weights(x, du, w):
        """dW = sum_n x_n^T du_n over batch and rows: the reduction with the identity for phi."""
        if du is None:
            return q.new_empty(0)
        sums = _reduce(x, du, None, "none", num_splits, 1.0)[..., : -x.shape[3]]  # without z
        return sums.sum(0).view(w.shape).to(w.dtype)

    with torch.cuda.device_of(q):
        # the queries come first, because their launch writes delta, which Eq. (4) needs
        du_q = rows(True, q, g, cast_q, sums, dq, need_w_q)
        d_sums = _reduce(q, g, cast_q, feature_map, num_splits, 1 / k.shape[1], d, delta)
        du_k = rows(False, k, v, cast_k, d_sums, dk, need_w_k)
        return dq, dk, dv, weights(q, du_q, w_q), weights(k, du_k, w_k)


@_backward.register_fake
def _(g, q, k, v, w_q, w_k, o, d, sums, feature_map, num_splits, need_w_q, need_w_k):
    dq, dk, dv = (torch.empty(x.shape, device=q.device, dtype=q.dtype) for x in (q, k, v))
    dw_q, dw_k = (
        torch.empty(w.shape, device=q.device, dtype=w.dtype) if need else q.new_empty(0)
        for w, need in ((w_q, need_w_q), (w_k, need_w_k))
    )
    return dq, dk, dv, dw_q, dw_k


def _setup_context(ctx, inputs, output):
    q, k, v, w_q, w_k, ctx.feature_map, _, ctx.num_splits = inputs
    ctx.save_for_backward(q, k, v, w_q, w_k, *output)


def _autograd(ctx, g, *_):
    """Gradients of the eight inputs of _forward; of its outputs only o is ever differentiated."""
    need = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
    dq, dk, dv, *dw = _backward(g, *ctx.saved_tensors, ctx.feature_map, ctx.num_splits, *need)
    dw_q, dw_k = (x if n else None for x, n in zip(dw, need, strict=True))
    return dq, dk, dv, dw_q, dw_k, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


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
        if isinstance(w, torch.Tensor):
            fits = w.shape == (H, D, D) and w.is_floating_point() and w.device == q.device
            got = f"{tuple(w.shape)}, {w.dtype}, {w.device}"
        else:
            fits, got = False, type(w).__name__
        if not fits:
            raise ValueError(
                f"{name} must be a floating-point tensor (H, D, D) = {(H, D, D)} on {q.device}, "
                f"got {got}"
            )


def _refusal(q, v, feature_map):
    """The reason why the kernels cannot run these inputs, naming the argument, or None."""
    widths = SIZES + (256,) if feature_map == "none" else SIZES
    if triton is None:
        return "triton is not installed"
    if not (q.is_cuda or INTERPRET):
        return (
            "q must be on a CUDA device (or set TRITON_INTERPRET=1 before triton is imported), "
            f"got {q.device}"
        )
    if q.dtype not in DTYPES:
        return f"q must be float32, bfloat16 or float16, got {q.dtype}"
    if q.shape[3] not in widths:
        return f"q must have a head size in {widths}, got {q.shape[3]}"
    if v.shape[3] not in SIZES:
        return f"v must have a head size in {SIZES}, got {v.shape[3]}"
    return None


def linear_attention(
    q, k, v, feature_map="hedgehog", w_q=None, w_k=None, eps=None, backend=None, share=None
):
    """o_i = phi(q_i) S / (phi(q_i) . z + eps): Eqs. (1) and (2) at the top of this file.

    q (B, N_q, H, D), k (B, N, H, D), v (B, N, H, D_v), of one floating dtype and with any strides
    -> (B, N_q, H, D_v) of that dtype, differentiable in q, k, v, w_q and w_k.

    feature_map  "hedgehog", "softmax", "relu", "elu" or "none" (q and k are features already).
    w_q, w_k     (H, D, D), u = x W, for "hedgehog" alone, of any floating dtype; None: identity.
    eps          added to the denominator, which is divided by N; None: 0 for positive maps, 1e-6
                 for "relu" and "none".
    backend      "triton", "torch", or None: Triton where it can run (a CUDA device, a supported
                 size and dtype, for size 128 the shared memory of sm_90), else torch.
    share        where other ranks have further keys and queries: an object with N, how many keys
                 there are in all, and sum(x), which adds x up over the ranks
                 (models/networks/sequence.py). The torch reference runs then, also on a GPU: the
                 kernels keep their sums to themselves.

    Raises ValueError, naming the argument, for shapes, dtypes or devices that do not fit, for an
    unknown name, an empty tensor or a projection of a map that has none, and for backend="triton"
    with inputs that the kernels do not take.
    """
    if eps is None:
        eps = EPS.get(feature_map, 0.0) if isinstance(feature_map, str) else 0.0
    _check(q, k, v, feature_map, w_q, w_k, eps)
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend must be None, 'torch' or 'triton', got {backend!r}")
    refusal = None if backend == "torch" else _refusal(q, v, feature_map)
    if share is not None:
        refusal = "share: the kernels know of one rank's keys"
    if backend == "triton" and refusal:
        raise ValueError(f"backend='triton': {refusal}")
    fits = q.is_cuda
    if fits and max(q.shape[3], v.shape[3]) >= 128:
        # where a program has too little shared memory for size 128, only backend="triton" tries
        properties = torch.cuda.get_device_properties(q.device)
        fits = getattr(properties, "shared_memory_per_block_optin", 0) >= SHARED
    if backend == "triton" or (backend is None and fits and not refusal):
        return _forward(q, k, v, w_q, w_k, feature_map, float(eps), 0)[0]
    return linear_attention_reference(q, k, v, feature_map, w_q, w_k, eps, share=share)


# ---- in a network --------------------------------------------------------------------------------


class LinearAttention(torch.nn.Module):
    """linear_attention as a module, in place of a softmax attention of q, k, v (B, N, H, D).

    With "hedgehog" it owns w_q and w_k (H, D, D), which start as the identity (zeros would give
    mean(v) for every query). Raises ValueError for an unknown feature map and for "none".
    """

    whole = True  # over several ranks every one keeps all of it: it is small

    def __init__(self, heads, head_dim, feature_map="hedgehog"):
        super().__init__()
        if feature_map not in FEATURE_MAPS[:-1]:
            raise ValueError(f"feature_map must be one of {FEATURE_MAPS[:-1]}, got {feature_map!r}")
        self.feature_map = feature_map
        for name in ("w_q", "w_k"):
            w = None
            if feature_map == "hedgehog":
                w = torch.nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))  # (H, D, D)
            self.register_parameter(name, w)

    def forward(self, q, k, v, share=None):
        """q, k, v (B, N, H, D) -> (B, N, H, D); share: see linear_attention."""
        return linear_attention(q, k, v, self.feature_map, self.w_q, self.w_k, share=share)


def use_linear_attention(net, layers, feature_map="hedgehog"):
    """Give each of these self-attention layers of net a new LinearAttention.

    net has self_attentions (modules that call their attribute `attend` on q, k, v), heads and
    head_dim; layers are indices from 0. The choice is written to net.config, from which such a
    network is built again. Raises ValueError for an index out of range or named twice.
    """
    places = net.self_attentions
    wrong = [i for i in layers if type(i) is not int or not 0 <= i < len(places)]
    if wrong or len(set(layers)) < len(layers):
        raise ValueError(
            f"linear_layers {list(layers)} are not different layers of 0 to {len(places) - 1}"
        )
    for i in layers:
        places[i].attend = LinearAttention(net.heads, net.head_dim, feature_map)
    net.config |= {"linear_layers": sorted(layers), "feature_map": feature_map}
