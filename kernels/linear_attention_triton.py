"""The device's side of linear_attention.py: three Triton kernels and their tiles.

Equations (1) to (5) are those at the top of linear_attention.py, and so are the symbols; the host's
side is linear_attention_ops.py. Without triton this file has the table of tiles alone.

Verified: the kernels against a float64 oracle under Triton's interpreter (TRITON_INTERPRET=1).
Not verified: this version on any GPU, and that the tiles fit where docs/results/kernels.md does not
list them as compiled; its predecessor's results and times on an H100 are marked as such there.
"""

import math

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch path does without
    triton = None

TINY = 1e-12  # smallest feature of a positive map, as in linear_attention.py


# ---- the kernels ---------------------------------------------------------------------------------
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
# so reduce_kernel is (1) and (4), backward_kernel (3) and (5), and apply_kernel (2). Rows
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
    def reduce_kernel(
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
    def apply_kernel(
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
    def backward_kernel(
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
            row = (b * N + n) * H + h  # as in apply_kernel
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
INTERPRET = triton is not None and not isinstance(reduce_kernel, triton.runtime.JITFunction)


# ---- tiles ---------------------------------------------------------------------------------------

# Rows per tile, warps, pipeline stages, and programs that fit on a multiprocessor at a time. The
# first table with the line, whose shared memory a device has, is used. Tiles are those of which the
# compiled kernels spill no register in their loop, but for the few that docs/results/kernels.md
# lists, and have the fewest instructions a row; untimed. "wide": a size above 64, one half; "two
# halves": hedgehog with more than 64 features in each; "narrow halves": with up to 64, but wider
# inputs.
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
