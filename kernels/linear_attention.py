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
the attention matrix sum to exactly one. Of queries only elu's are, which can all vanish; one of a
softmax is at least 1 / D. relu and given features can vanish together, which is why they need an
eps; pass eps=0 with features that you know to be positive.

Use.

    from kernels.linear_attention import linear_attention
    # q, k, v (B, N, H, D); w_q, w_k (H, D, D); o (B, N, H, D)
    o = linear_attention(q, k, v, w_q=w_q, w_k=w_k)

LinearAttention, at the end of the file, is the module. To copy it without the kernels, take
`features`, `linear_attention_reference`, FEATURE_MAPS, TINY and EPS too, and call the reference in
its forward, with eps=EPS[feature_map].

q, k and v may be views with any strides, such as those of a fused projection: nothing is copied.
Keys may have a mask. Triton runs on CUDA for bfloat16 at head sizes up to 128, and for
float32 and float16 up to 64, as far as shared memory goes (TILES); sizes that are no powers of two
are padded on the chip. Everything else runs the torch reference; backend_for says which of the two
it will be. Sums are in float32 on both paths, and in float64 for float64 inputs.
The Triton path saves inputs, o, 1 / d, S and z, never the features; it computes no gradient that is
not asked for; it is bitwise reproducible (partial sums, no atomics); it is registered with
torch.library, so that torch.compile(fullgraph=True) and activation checkpointing take it as
operators; and it has first derivatives only. This file needs torch, and triton where there is one.

Verified: the kernels against a float64 oracle under Triton's interpreter (TRITON_INTERPRET=1).
Not verified: this version on any GPU, and that the tiles fit where docs/results/kernels.md does not
list them as compiled; its predecessor's results and times on an H100 are marked as such there.

Symbols: B batch, N rows (tokens; queries and keys may differ in number), H heads, D head size, f
features.
"""

import math
import warnings
from types import SimpleNamespace
from typing import Optional

import torch
from torch.autograd.forward_ad import unpack_dual

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch path does without
    triton = None

FEATURE_MAPS = ("hedgehog", "softmax", "relu", "elu", "none")
EPS = {"hedgehog": 0.0, "softmax": 0.0, "elu": 0.0, "relu": 1e-6, "none": 1e-6}
TINY = 1e-12  # smallest feature of a positive map
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that the kernels take


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
    `linear_attention`. key_weights (B, N): what the features of each key are multiplied by.
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


# ---- Triton kernels ------------------------------------------------------------------------------
#
# Eqs. (1) to (5) are two shapes of loop over the rows of one side, keys or queries, where a row has
# a weight a and a coefficient c:
#
#                          x    y         a          c
#     keys                 k    v         1          1             (with a mask: a = 0 or 1)
#     queries, backward    q    dL/do     1 / d      -delta
#
#     sums                 S, z   = sum a phi(x)^T y, sum a c phi(x)             (1) and (4)
#     a row's gradients    dphi   = a (S y + c z),  dy = a S^T phi(x)            (3) and (5)
#
# so _reduce_kernel is (1) and (4), _backward_kernel (3) and (5), and _apply_kernel (2). Rows
# that do not exist have a = 0.
#
# A program owns a range of rows (a "split") of one (batch, head) and walks through it ROWS at a
# time. W and S are loaded once and stay in shared memory. x has C columns, phi(x) F (hedgehog: F in
# each half), y D: powers of two; where the real width is smaller, columns are padded with zeros and
# their features are 0 for queries, so that they meet nothing. S and z of a half lie one behind the
# other, and so do the halves, in one float32 tensor, "sums" (B, H, halves (F D + F)). DOT is the
# dtype of the operands of tl.dot, and PRECISION says how float32 operands are multiplied:
#
#     inputs      DOT         PRECISION
#     bfloat16    bfloat16    (unused)
#     float16     float32     "tf32": the mantissa of float16, with the range that features of 1e-12
#                             and gradients over d need
#     float32     float32     "ieee"
#
# Accumulators, softmaxes, z, d and delta are float32. Rows are int32, and offsets of rows and
# batches int64: 75,600 tokens of 40 heads of 128 pass 2^31 elements at a batch of 6. Divisions and
# normalisers are one number a row, never one an element: these loops are bound by the number of
# instructions, not by memory (docs/results/kernels.md).

if triton is not None:
    _TINY, _LOG2E = tl.constexpr(TINY), tl.constexpr(math.log2(math.e))
    # numbers that change from call to call, for which no kernel is compiled anew
    _jit = triton.jit(do_not_specialize=["N", "H", "splits", "rows_per_split", "a_b", "a_h"])

    @triton.jit
    def _load(X, x_n, x_d, rows, keep, WIDTH: tl.constexpr, COLS: tl.constexpr):
        """(rows, COLS) of X; zeros where keep is false and in columns from WIDTH on."""
        cols, mask = tl.arange(0, COLS), keep[:, None]
        if WIDTH < COLS:
            mask = mask & (cols < WIDTH)[None, :]
        return tl.load(
            X + rows[:, None].to(tl.int64) * x_n + cols[None, :].to(tl.int64) * x_d,
            mask=mask,
            other=0.0,
        )

    @triton.jit
    def _store(X, tile, x_n, x_d, rows, keep, WIDTH: tl.constexpr, COLS: tl.constexpr):
        """The inverse of _load."""
        cols, mask = tl.arange(0, COLS), keep[:, None]
        if WIDTH < COLS:
            mask = mask & (cols < WIDTH)[None, :]
        at = X + rows[:, None] * x_n + cols[None, :] * x_d
        tl.store(at, tile.to(X.dtype.element_ty), mask=mask)

    @triton.jit
    def _place(program, N, H, splits, rows_per_split):
        """Where this program works; a split beyond N has no rows.

        -> split, batch * H + head, batch, head, first row, row after the last.
        """
        split = program % splits
        bh = (program // splits).to(tl.int64)
        start = split * rows_per_split
        return split, bh, bh // H, bh % H, start, tl.minimum(start + rows_per_split, N)

    @triton.jit
    def _exp(u, WIDTH: tl.constexpr, F: tl.constexpr):
        """exp(u - max u) of each row of a tile, and its sum: softmax(u) before the division."""
        if WIDTH < F:
            u = tl.where((tl.arange(0, F) < WIDTH)[None, :], u, float("-inf"))
        e = tl.exp2(u * _LOG2E - (tl.max(u, 1) * _LOG2E)[:, None])
        return e, tl.sum(e, 1)

    @triton.jit
    def _features(u, a, KEY: tl.constexpr, MAP: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr):
        """a phi of a tile u (rows, F) in float32, for hedgehog one half of it; a (rows,)."""
        if MAP == "hedgehog" or MAP == "softmax":
            e, total = _exp(u, WIDTH, F)
            phi = e * (a / total)[:, None]
            if KEY:
                phi = tl.maximum(phi, (a * _TINY)[:, None])
        elif MAP == "elu":
            phi = tl.where(u > 0, u + 1, tl.exp2(tl.minimum(u, 0.0) * _LOG2E))
            phi = tl.maximum(phi, _TINY) * a[:, None]
            if WIDTH < F:
                phi = tl.where((tl.arange(0, F) < WIDTH)[None, :], phi, 0.0)
        elif MAP == "relu":
            phi = tl.maximum(u, 0.0) * a[:, None]
        else:
            phi = u * a[:, None]
        return phi

    @triton.jit
    def _features_backward(
        u, dphi, a, KEY: tl.constexpr, MAP: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr
    ):
        """a dL/du of a tile from dL/dphi, both (rows, F); a clamped feature passes no gradient."""
        if MAP == "hedgehog" or MAP == "softmax":
            e, total = _exp(u, WIDTH, F)
            if KEY:
                e = tl.where(e >= (total * _TINY)[:, None], e, 0.0)
            r = 1 / total
            mean = tl.sum(e * dphi, 1) * r
            du = e * (dphi * (a * r)[:, None] - (mean * a * r)[:, None])
        elif MAP == "elu":
            e = tl.exp2(tl.minimum(u, 0.0) * _LOG2E)  # 1 for u > 0
            du = tl.where(e >= _TINY, dphi * e, 0.0) * a[:, None]
        elif MAP == "relu":
            du = tl.where(u > 0, dphi, 0.0) * a[:, None]
        else:
            du = dphi * a[:, None]
        return du

    @_jit
    def _reduce_kernel(
        X,  # (B, N, H, C)
        Y,  # (B, N, H, D)
        W,  # (H, C, F), read with HAS_W
        A,  # a (B, [H,] N), read with WEIGHTED
        COEFF,  # c (B, H, N), read with QUERY
        SUMS,  # (B, H, splits, halves (F D + F)) float32, written
        scale,
        N,
        H,
        splits,
        rows_per_split,
        x_b,  # strides of X, Y and A
        x_n,
        x_h,
        x_d,
        y_b,
        y_n,
        y_h,
        y_d,
        a_b,
        a_h,
        WEIGHTED: tl.constexpr,
        QUERY: tl.constexpr,
        MAP: tl.constexpr,
        C: tl.constexpr,
        F: tl.constexpr,
        D: tl.constexpr,
        C_WIDTH: tl.constexpr,
        F_WIDTH: tl.constexpr,
        D_WIDTH: tl.constexpr,
        HALVES: tl.constexpr,
        HAS_W: tl.constexpr,
        DOT: tl.constexpr,
        PRECISION: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Eq. (1) or (4): this split's share of scale S and scale z.

        A program computes one half of hedgehog's features: the other half's program finds X and Y
        in the cache, and the sums of both would fill the registers. A split without rows writes
        zeros.
        """
        half, program = tl.program_id(0) % HALVES, tl.program_id(0) // HALVES
        split, bh, b, h, start, stop = _place(program, N, H, splits, rows_per_split)
        X += b * x_b + h * x_h
        Y += b * y_b + h * y_h
        A += b * a_b + h * a_h
        SUMS += ((bh * splits + split) * HALVES + half) * (F * (D + 1))
        rows, f, c = tl.arange(0, ROWS), tl.arange(0, F), tl.arange(0, D)
        if HAS_W:
            w = tl.load(W + h * (C * F) + tl.arange(0, C)[:, None] * F + f[None, :])
            if HALVES == 2:
                w = tl.where(half == 0, w, -w)  # x (-W) = -u
        acc, z = tl.zeros((F, D), tl.float32), tl.zeros((8, F), tl.float32)
        for n in range(start, stop, ROWS):
            at = n + rows
            keep = at < stop
            x = _load(X, x_n, x_d, at, keep, C_WIDTH, C).to(DOT)
            y = _load(Y, y_n, y_d, at, keep, D_WIDTH, D).to(DOT)
            if HAS_W:
                u = tl.dot(x, w, input_precision=PRECISION)
            else:
                u = x.to(tl.float32)
                if HALVES == 2:
                    u = tl.where(half == 0, u, -u)
            if WEIGHTED:
                a = tl.load(A + at, mask=keep, other=0.0)
            else:
                a = keep.to(tl.float32)
            phi = _features(u, a, not QUERY, MAP, F_WIDTH, F)
            acc = tl.dot(tl.trans(phi.to(DOT)), y, acc, input_precision=PRECISION)
            if QUERY:
                phi *= tl.load(COEFF + bh * N + at, mask=keep, other=0.0)[:, None]
            z += tl.sum(tl.reshape(phi, (ROWS // 8, 8, F)), 0)
        tl.store(SUMS + f[:, None] * D + c[None, :], acc * scale)
        tl.store(SUMS + F * D + f, tl.sum(z, 0) * scale)

    @_jit
    def _apply_kernel(
        X,  # q (B, N, H, C)
        W,  # (H, C, F), read with HAS_W
        SUMS,  # S and z (B, H, halves (F D + F)) float32
        OUT,  # o (B, N, H, D), written
        OVER_D,  # 1 / d (B, H, N) float32, written
        eps,
        N,
        H,
        splits,
        rows_per_split,
        x_b,  # strides of X; OUT is contiguous
        x_n,
        x_h,
        x_d,
        MAP: tl.constexpr,
        C: tl.constexpr,
        F: tl.constexpr,
        D: tl.constexpr,
        C_WIDTH: tl.constexpr,
        F_WIDTH: tl.constexpr,
        D_WIDTH: tl.constexpr,
        HALVES: tl.constexpr,
        HAS_W: tl.constexpr,
        DOT: tl.constexpr,
        PRECISION: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Eq. (2) for this split's queries, whose softmaxes are divided by their sums last.

        With e = exp(u - max u), e' = exp(min u - u) and r = sum e' / sum e, numerator and
        denominator of o are both multiplied by sum e': (e S r + e' S') / (e.z r + e'.z').
        """
        _, bh, b, h, start, stop = _place(tl.program_id(0), N, H, splits, rows_per_split)
        X += b * x_b + h * x_h
        S = SUMS + bh * (HALVES * F * (D + 1))
        Z, S2 = S + F * D, S + F * (D + 1)
        rows, f = tl.arange(0, ROWS), tl.arange(0, F)
        tile = f[:, None] * D + tl.arange(0, D)[None, :]
        s = tl.load(S + tile).to(DOT)
        if HALVES == 2:
            s2 = tl.load(S2 + tile).to(DOT)
        if HAS_W:
            w = tl.load(W + h * (C * F) + tl.arange(0, C)[:, None] * F + f[None, :])
        for n in range(start, stop, ROWS):
            at = n + rows
            keep = at < stop
            x = _load(X, x_n, x_d, at, keep, C_WIDTH, C).to(DOT)
            if HAS_W:
                u = tl.dot(x, w, input_precision=PRECISION)
            else:
                u = x.to(tl.float32)
            total = tl.full((ROWS,), 1.0, tl.float32)  # phi below is total times too large
            if MAP == "hedgehog" or MAP == "softmax":
                phi, total = _exp(u, F_WIDTH, F)
            else:
                phi = _features(u, total, False, MAP, F_WIDTH, F)
            d = tl.sum(phi * tl.load(Z + f)[None, :], 1)
            dot = phi.to(DOT)
            if HALVES == 1:
                acc = tl.dot(dot, s, input_precision=PRECISION)
            else:  # both softmaxes before both products, so that no accumulator holds registers
                r = 1 / total
                phi, total = _exp(-u, F_WIDTH, F)
                r *= total
                d = d * r + tl.sum(phi * tl.load(S2 + F * D + f)[None, :], 1)
                acc = tl.dot(dot, s, input_precision=PRECISION) * r[:, None]
                acc = tl.dot(phi.to(DOT), s2, acc, input_precision=PRECISION)
            over_d = 1 / (d + eps * total)
            # in a contiguous (B, N, H, .) tensor, where this head's next row is H rows further on
            row = (b * N + n) * H + h
            o = acc * over_d[:, None]
            _store(OUT + row * D_WIDTH, o, H * D_WIDTH, 1, rows, keep, D_WIDTH, D)
            tl.store(OVER_D + bh * N + n + rows, over_d * total, mask=keep)

    @_jit
    def _backward_kernel(
        X,  # q or k (B, N, H, C)
        Y,  # dL/do or v (B, N, H, D)
        OUT,  # o (B, N, H, D), read with QUERY
        W,  # (H, C, F), read with HAS_W
        SUMS,  # S and z, or dS and dz (B, H, halves (F D + F)) float32
        A,  # a (B, [H,] N), read with WEIGHTED
        COEFF,  # c = -delta (B, H, N), written with QUERY
        DX,  # (B, N, H, C), written with WRITE_X
        DU,  # (B, N, H, F), written with WRITE_U
        DY,  # (B, N, H, D), written with WRITE_Y
        scale,
        N,
        H,
        splits,
        rows_per_split,
        x_b,  # strides of X, Y and A; the others are contiguous
        x_n,
        x_h,
        x_d,
        y_b,
        y_n,
        y_h,
        y_d,
        a_b,
        a_h,
        WEIGHTED: tl.constexpr,
        QUERY: tl.constexpr,
        WRITE_X: tl.constexpr,
        WRITE_U: tl.constexpr,
        WRITE_Y: tl.constexpr,
        MAP: tl.constexpr,
        C: tl.constexpr,
        F: tl.constexpr,
        D: tl.constexpr,
        C_WIDTH: tl.constexpr,
        F_WIDTH: tl.constexpr,
        D_WIDTH: tl.constexpr,
        HALVES: tl.constexpr,
        HAS_W: tl.constexpr,
        DOT: tl.constexpr,
        PRECISION: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Eq. (3) or (5) for this split's rows, then through the feature map: du, and dx = du W^T.

        With QUERY c = -delta is computed and written first. DU, of dtype DOT, is what dW needs.
        What is not written is not computed either.
        """
        _, bh, b, h, start, stop = _place(tl.program_id(0), N, H, splits, rows_per_split)
        X += b * x_b + h * x_h
        Y += b * y_b + h * y_h
        A += b * a_b + h * a_h
        S = SUMS + bh * (HALVES * F * (D + 1))
        Z, S2 = S + F * D, S + F * (D + 1)
        rows, f = tl.arange(0, ROWS), tl.arange(0, F)
        tile = f[:, None] * D + tl.arange(0, D)[None, :]
        s = tl.load(S + tile).to(DOT)
        if HALVES == 2:
            s2 = tl.load(S2 + tile).to(DOT)
        if HAS_W:
            w = tl.load(W + h * (C * F) + tl.arange(0, C)[:, None] * F + f[None, :])
        for n in range(start, stop, ROWS):
            at = n + rows
            keep = at < stop
            row = (b * N + n) * H + h  # as in _apply_kernel
            y = _load(Y, y_n, y_d, at, keep, D_WIDTH, D)
            if QUERY:
                o = _load(OUT + row * D_WIDTH, H * D_WIDTH, 1, rows, keep, D_WIDTH, D)
                c = -tl.sum(y.to(tl.float32) * o.to(tl.float32), 1)
                tl.store(COEFF + bh * N + at, c, mask=keep)
            y = y.to(DOT)
            x = _load(X, x_n, x_d, at, keep, C_WIDTH, C).to(DOT)
            if WEIGHTED:
                a = tl.load(A + at, mask=keep, other=0.0) * scale
            else:
                a = keep.to(tl.float32) * scale
            if HAS_W:
                u = tl.dot(x, w, input_precision=PRECISION)
            else:
                u = x.to(tl.float32)
            if WRITE_Y:
                phi = _features(u, a, not QUERY, MAP, F_WIDTH, F)
                dy = tl.dot(phi.to(DOT), s, input_precision=PRECISION)
                if HALVES == 2:
                    phi = _features(-u, a, not QUERY, MAP, F_WIDTH, F)
                    dy = tl.dot(phi.to(DOT), s2, dy, input_precision=PRECISION)
                _store(DY + row * D_WIDTH, dy, H * D_WIDTH, 1, rows, keep, D_WIDTH, D)
            dphi = tl.dot(y, tl.trans(s), input_precision=PRECISION)
            z = tl.load(Z + f)[None, :]  # loaded before the loop it would hold registers all along
            dphi += c[:, None] * z if QUERY else z
            du = _features_backward(u, dphi, a, not QUERY, MAP, F_WIDTH, F)
            if HALVES == 2:  # the same of -u
                dphi = tl.dot(y, tl.trans(s2), input_precision=PRECISION)
                z = tl.load(S2 + F * D + f)[None, :]
                dphi += c[:, None] * z if QUERY else z
                du -= _features_backward(-u, dphi, a, not QUERY, MAP, F_WIDTH, F)
            if WRITE_U:
                _store(DU + row * F_WIDTH, du, H * F_WIDTH, 1, rows, keep, F_WIDTH, F)
            if WRITE_X:
                if HAS_W:
                    du = tl.dot(du.to(DOT), tl.trans(w), input_precision=PRECISION)
                _store(DX + row * C_WIDTH, du, H * C_WIDTH, 1, rows, keep, C_WIDTH, C)


# With TRITON_INTERPRET=1 kernels run on CPU tensors.
INTERPRET = triton is not None and not isinstance(_reduce_kernel, triton.runtime.JITFunction)


def dot_dtype(dtype):
    """dtype of the operands of tl.dot (table above).

    The interpreter multiplies bfloat16 wrongly (it takes the raw bits), so there it is widened.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 and not INTERPRET else torch.float32


# Rows per tile, warps, pipeline stages, and programs that fit on a multiprocessor at a time. The
# first table with the line, whose shared memory a device has, is used. Tiles are those of which the
# compiled kernels spill no register in their loop and have the fewest instructions a row; untimed
# (docs/results/kernels.md). "wide": a size above 64, one half; "two halves": hedgehog with more
# than 64 features in each; "narrow halves": with up to 64, but wider inputs.
KERNELS = ("reduce", "apply", "backward q", "backward k")
# fmt: off
TILES = {
    # bytes of shared memory          reduce         apply          backward q     backward k
    227 * 1024: {  # H100, B200
        "2 bytes, two halves":    ((32, 4, 3, 2), (64, 4, 1, 2), (32, 8, 1, 1), (32, 8, 1, 1)),
        "2 bytes, narrow halves": ((32, 4, 3, 3), (64, 4, 2, 2), (32, 4, 1, 2), (32, 4, 1, 2)),
        "2 bytes, wide":          ((32, 4, 3, 2), (64, 4, 2, 2), (64, 4, 1, 2), (64, 8, 1, 1)),
        "2 bytes, up to 64":      ((128, 4, 2, 4), (64, 4, 2, 4), (64, 4, 2, 4), (64, 4, 2, 4)),
    },
    160 * 1024: {  # A100
        "2 bytes, two halves":    ((64, 8, 1, 1), (64, 4, 1, 1), (32, 8, 1, 1), (32, 8, 1, 1)),
        "2 bytes, narrow halves": ((32, 4, 3, 3), (64, 4, 2, 2), (32, 4, 1, 2), (32, 4, 1, 1)),
        "2 bytes, wide":          ((64, 8, 2, 1), (64, 8, 2, 2), (32, 4, 1, 3), (64, 8, 1, 1)),
    },
    99 * 1024: {  # L40S, RTX 4090 and 5090
        "2 bytes, wide":          ((64, 8, 2, 1), (64, 8, 2, 1), (64, 8, 1, 1), (64, 8, 1, 1)),
        "2 bytes, up to 64":      ((64, 4, 2, 4), (64, 4, 2, 4), (64, 4, 2, 4), (64, 4, 2, 4)),
        "4 bytes, up to 64":      ((32, 4, 2, 4), (32, 4, 2, 4), (32, 4, 2, 4), (32, 4, 2, 4)),
    },
}
# fmt: on


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
    """scale S and scale z of the table above, for x (B, N, H, C) and y (B, N, H, D).

    w: from _cast; a (B, N) or (B, H, N), None: 1; c (B, H, N) of queries, None: keys.
    -> (B, H, halves (F D + F)) float32: S flattened, and z behind it.
    """
    halves = halves_of(feature_map)
    name, D = "reduce", y.shape[3]
    launch, splits, F, D = _launch(_reduce_kernel, name, x, w, D, feature_map, num_splits, halves)
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
    launch, _, F, _ = _launch(_backward_kernel, name, x, w, y.shape[3], feature_map, num_splits)
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
        launch, *_ = _launch(_apply_kernel, "apply", q, w, D, feature_map, num_splits)
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


def _by_kernels(q, k, v, feature_map, w_q, w_k, eps, a=None, share=None, num_splits=0):
    """The function by the kernels: the sums of the keys, those of other ranks, the queries."""
    N = k.shape[1] if share is None else share.N
    sums = _sums(k, v, w_k, a, feature_map, N, num_splits)
    if share is not None:
        sums = share.sum(sums)
    return _apply(q, w_q, sums, v.shape[3], feature_map, eps, num_splits)[0]


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
    if triton is None:
        return "triton is not installed"
    if not (q.is_cuda or INTERPRET):
        return (
            "q must be on a CUDA device (or set TRITON_INTERPRET=1 before triton is imported), "
            f"got {q.device}"
        )
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


def backend_for(q, v=None, feature_map="hedgehog", w_q=None):
    """Which back end linear_attention takes on its own for such inputs, and why not the other.

    q (B, N, H, D), v (B, N, H, D_v), None: like q; w_q as there. Only shapes, dtype and device
    matter; a call with tangents runs torch all the same. -> ("triton", None) or ("torch", a
    sentence).
    """
    why = _why_not(q, v, feature_map, w_q)
    if why is None and INTERPRET:
        why = "under TRITON_INTERPRET=1 the kernels are slow, and run where backend='triton' asks"
    return ("torch", why) if why else ("triton", None)


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
                 runs torch because the kernels cannot warns once of the reason.
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
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend must be None, 'torch' or 'triton', got {backend!r}")
    a = _key_weights(mask, k, share)
    forward_mode = _has_tangents(q, k, v, w_q, w_k)
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
        return _by_kernels(q, k, v, feature_map, w_q, w_k, float(eps), a, share)
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
