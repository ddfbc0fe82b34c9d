"""Pictures of docs/kernels.md."""

import math
import os

from docs.draw import logs
from docs.draw.svg import Canvas, words


def draw(folder):
    diagram().save(f"{folder}/kernels-diagram")
    speed().save(f"{folder}/kernels-speed")
    roundings().save(f"{folder}/kernels-roundings")
    mistakes().save(f"{folder}/kernels-wrong")


# ---- the diagram ---------------------------------------------------------------------------------


def strip(c, x, y, width, label, height=18, splits=4, tiles=5, at=7, kind="sample"):
    """N rows of a tensor, from left to right: splits with gaps between them, cut into tiles.

    Tile number `at` is filled. -> where its middle lies.
    """
    gap = 7
    tile = (width - gap * (splits - 1)) / (splits * tiles)

    def left(i):
        return x + i * tile + i // tiles * gap

    def shape(colour, theme):
        found = words(x - 8, y + height / 2 + 5, label, colour(kind), "end", 14)
        for i in range(splits * tiles):
            fill = colour(kind) if i == at else theme["panel"]
            found += (
                f'<rect x="{left(i):.1f}" y="{y}" width="{tile:.1f}" height="{height}" '
                f'fill="{fill}" stroke="{theme["faint"]}"/>'
            )
        return found

    c.shapes.append(shape)
    return left(at) + tile / 2


def panel(c, x, y, width, height, title, lines, kind="sample"):
    """A launch: its title in bold ink, and below it one formula a line."""

    def shape(colour, theme):
        found = (
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" '
            f'fill="{theme["panel"]}" stroke="{colour(kind)}" stroke-width="1.8"/>'
        )
        found += words(x + width / 2, y + 20, title, theme["faint"], "middle", 12)
        return found + "".join(
            words(x + width / 2, y + 42 + 20 * i, line, colour(kind), "middle", 14)
            for i, line in enumerate(lines)
        )

    c.shapes.append(shape)


def diagram():
    """The two passes of the forward, and the launches of the backward."""
    c = Canvas(900, 546)
    c.text(
        24, 28, "Pass 1: sums over the keys. A program owns a split and walks through its tiles."
    )
    strip(c, 44, 46, 350, "k")
    at = strip(c, 44, 72, 350, "v")
    panel(
        c, 44, 118, 350, 80, "on chip: W in shared memory, S and z in registers",
        ["u = k W,  φ = softmax(±u)", "S += φ^T v / N,   z += Σ φ / N"], "student",
    )  # fmt: skip
    c.arrow((at, 92), (at, 114))
    c.box("S", 464, 158, "S, z")
    c.text(464, 190, "the splits'", anchor="middle", size=12)
    c.text(464, 205, "sums, added", anchor="middle", size=12)
    c.arrow((398, 158), "S")
    c.text(560, 28, "Pass 2: outputs. S is read once, queries stream by.")
    at = strip(c, 560, 59, 316, "q")
    panel(
        c, 560, 118, 316, 80, "on chip: W, S and z in shared memory",
        ["u = q W,  φ = softmax(±u)", "d = φ · z + ε,   o = φ S / d"], "student",
    )  # fmt: skip
    c.arrow((at, 79), (at, 114))
    c.arrow("S", (556, 158))
    c.arrow((at, 202), (at, 236))
    strip(c, 560, 240, 316, "o")
    strip(c, 560, 266, 316, "d", height=8)
    c.text(44, 246, "Features φ, twice as wide as q and k, are never written to memory.")
    c.text(44, 265, "For the backward pass q, k, v, o, d, S and z are kept.")

    c.text(24, 322, "Backward, with g = ∂L/∂o: the features are computed again; launches in order.")
    launches = [  # what it reads, what it computes, which gradient it writes
        (
            "backward, q",
            "q, g, o, d, S, z",
            "δ = g · o|dφ_q = (S g − δ z) / d|dq = du_q W_q^T",
            "dq",
        ),
        ("sums, q", "q, g, d, δ", "dS = Σ φ_q^T g / d / N|dz = −Σ φ_q δ / d / N", ""),
        ("backward, k", "k, v, dS, dz", "dv = dS^T φ_k|dφ_k = dS v + dz|dk = du_k W_k^T", "dk, dv"),
        ("sums, x and du", "q, k, du_q, du_k", "dW_q = Σ q^T du_q|dW_k = Σ k^T du_k", ""),
    ]
    for i, (title, reads, lines, writes) in enumerate(launches):
        x = 24 + 224 * i
        panel(c, x, 372, 180, 100, title, lines.split("|"), "gradient")
        c.text(x + 90, 350, reads, anchor="middle", size=12)
        c.arrow((x + 90, 355), (x + 90, 368))
        if writes:
            c.arrow((x + 90, 476), (x + 90, 494), kind="gradient")
            c.text(x + 90, 508, writes, "gradient", "middle", 14)
    for i, carried in enumerate(["δ", "dS, dz", "du_k"]):
        x = 204 + 224 * i
        c.arrow((x + 3, 420), (x + 41, 420), kind="gradient")
        c.text(x + 22, 410, carried, "gradient", "middle")
    c.arrow((60, 476), (786, 476), kind="gradient", via=[(60, 528), (786, 528)])
    c.text(340, 519, "du_q", "gradient", "middle")
    return c


# ---- charts --------------------------------------------------------------------------------------


def loglog(c, x, y, width, height, title, series, low, high, first=256, last=65536, every=2):
    """Curves over tokens, both axes logarithmic, each with its name at its right end.

    series: [(name, [(tokens, value), ...], kind)]. every: tokens are written at every power of 4 if
    2, of 2 if 1.
    """

    def place(tokens, value):
        across = math.log2(max(tokens, first) / first) / math.log2(last / first)
        up = math.log(min(max(value, low), high) / low) / math.log(high / low)
        return x + across * width, y + height - up * height

    def shape(colour, theme):
        found = (
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" '
            f'fill="{theme["panel"]}" stroke="{theme["line"]}"/>'
        )
        found += words(x, y - 10, title, theme["ink"], "start", 13)
        for k in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1):
            to = place(first, 10.0**k)[1]
            power = f"{10.0**k:g}" if abs(k) < 3 else f"10^{{{k}}}"
            found += f'<path d="M{x} {to:.1f} H{x + width}" stroke="{theme["line"]}" fill="none"/>'
            found += words(x - 6, to + 4, power, theme["faint"], "end", 11)
        for k in range(round(math.log2(first)), round(math.log2(last)) + 1, every):
            at = place(2**k, low)[0]
            found += f'<path d="M{at:.1f} {y} V{y + height}" stroke="{theme["line"]}" fill="none"/>'
            found += words(at, y + height + 15, f"{2**k:,}", theme["faint"], "middle", 11)
        found += words(x + width / 2, y + height + 32, "tokens", theme["faint"], "middle", 11)
        names = []
        for name, points, kind in series:
            where = [place(*p) for p in points]
            path = "M" + " L".join(f"{a:.1f} {b:.1f}" for a, b in where)
            found += f'<path d="{path}" fill="none" stroke="{colour(kind)}" stroke-width="1.8"/>'
            found += "".join(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.4" fill="{colour(kind)}"/>'
                for a, b in where
            )
            names.append((where[-1][1], name, kind))
        below = -math.inf
        for at, name, kind in sorted(names):  # names that would overlap move down
            below = max(at, below + 15)
            found += words(x + width + 8, below + 4, name, colour(kind), "start", 12)
        return found

    c.shapes.append(shape)


def read(name, column):
    return logs.read(name, column, "tokens")


def speed():
    """Milliseconds on an H100, from the tables of docs/results/kernels.md."""
    c = Canvas(900, 330)
    for i, (what, suffix) in enumerate([("forward", ""), ("forward and backward", "_step")]):
        series = [
            ("softmax (SDPA)", read("kernels-speed", f"sdpa{suffix}"), "wrong"),
            ("with launches", read("kernels-speed", f"launched{suffix}"), "gradient"),
            ("linear", read("kernels-speed", f"kernels{suffix}"), "student"),
        ]
        loglog(c, 56 + 450 * i, 40, 270, 230, f"{what}, ms", series, 0.01, 100, 1024, 131072)
    return c


def roundings():
    """Error of bfloat16 kernels without any mistake, and with sums that are kept in bfloat16."""
    c = Canvas(900, 330)
    names = [("dk", "wrong"), ("dw_k", "gradient"), ("dq", "fake"), ("dv", "teacher")]
    series = [(n.replace("w_", "W_"), read("kernels-roundings", n), kind) for n, kind in names]
    series.append(("o", read("kernels-roundings", "o"), "student"))
    loglog(c, 70, 40, 280, 230, "healthy: relative error, bfloat16", series, 1e-3, 1e-2)
    series = [
        ("sums in bfloat16", read("kernels-wrong", "sums_in_bfloat16"), "wrong"),
        ("o as it should be", read("kernels-wrong", "kernels"), "student"),
    ]
    loglog(c, 480, 40, 280, 230, "sick: relative error of o", series, 1e-4, 10)
    return c


def mistakes():
    """Error of o against tokens, each curve with one mistake and otherwise exact."""
    c = Canvas(900, 430)
    series = [
        ("normaliser left out", "no_normaliser", "wrong"),
        ("softmax over the tokens", "softmax_over_tokens", "fake"),
        ("sums in bfloat16", "sums_in_bfloat16", "gradient"),
        ("ε added to the sum, not the mean", "eps_on_the_sum", "teacher"),
        ("8 rows of padding counted", "padding_counted", "noise"),
        ("no mistake: the kernels in bfloat16", "kernels", "student"),
        ("no mistake: float32", "float32", "sample"),
    ]
    series = [(name, read("kernels-wrong", column), kind) for name, column, kind in series]
    loglog(c, 80, 40, 540, 330, "relative error of o", series, 1e-8, 10, every=1)
    return c


# ---- what the charts show ------------------------------------------------------------------------

LENGTHS = [2**k - 8 for k in range(8, 17)]  # none is a multiple of a tile; 32,760 is Wan's


def wrong(folder):
    """Compute the errors of roundings and of mistakes on the CPU, in float64; half a minute."""
    errors, floors = zip(*(errors_at(N) for N in LENGTHS), strict=True)
    write(folder, "kernels-wrong", errors)
    write(folder, "kernels-roundings", floors)
    draw(folder)


def write(folder, name, rows):
    """rows: dicts of errors, one for each of LENGTHS."""
    os.makedirs(f"{folder}/logs", exist_ok=True)
    with open(f"{folder}/logs/{name}.csv", "w") as f:
        print("tokens", *rows[0], sep=",", file=f)
        for N, row in zip(LENGTHS, rows, strict=True):
            print(N, *(f"{e:.3g}" if e else "" for e in row.values()), sep=",", file=f)


def errors_at(N, D=128, tile=32, eps=1e-3):
    """Relative errors, in Frobenius norm, at N tokens of one head: hedgehog with W.

    -> {mistake: error of o}, {name of o or a gradient: error of the kernels' roundings}.
    """
    import torch

    from kernels import linear_attention as la
    from tests.test_linear_attention import by_equations, errors, inputs, normal, relative

    def rounding(a):
        return a.bfloat16().double()

    x = [rounding(a) for a in inputs("hedgehog", 1, N, 1, D)]
    g = rounding(normal(1, N, 1, D, seed=8))
    exact = by_equations(x, g, "hedgehog", 0.0)
    floor = errors(by_equations(x, g, "hedgehog", 0.0, rounding), exact)

    q, k, v, w_q, w_k = (a[0, :, 0] if a.dim() == 4 else a[0] for a in x)  # (N, D) and (D, D)

    def phi(u):
        return torch.cat([u.softmax(-1), (-u).softmax(-1)], -1)

    def over_tokens(u):
        return torch.cat([u.softmax(0), (-u).softmax(0)], -1)

    def out(phi_q, S, z, eps=0.0):
        return phi_q @ S / (phi_q @ z + eps)[:, None]

    phi_q, phi_k = phi(q @ w_q), phi(k @ w_k)
    S, z = phi_k.T @ v / N, phi_k.mean(0)
    o = out(phi_q, S, z)
    S_16, z_16 = torch.zeros_like(S), torch.zeros_like(z)
    for a in range(0, N, tile):
        some = rounding(phi_k[a : a + tile])
        S_16 = rounding(S_16 + some.T @ v[a : a + tile] / N)
        z_16 = rounding(z_16 + some.sum(0) / N)
    zero_rows = phi(torch.zeros(-N % tile, D, dtype=q.dtype))
    wide_q, wide_k = over_tokens(q @ w_q), over_tokens(k @ w_k)
    single = [torch.cat([u, -u], -1).softmax(-1) for u in (q @ w_q, k @ w_k)]
    narrow = [a.float() for a in x]
    found = {
        "kernels": floor["o"],
        "float32": relative(
            la.linear_attention_reference(*narrow[:3], "hedgehog", *narrow[3:]), exact[0]
        ),
        "sums_in_bfloat16": relative(out(rounding(phi_q), S_16, z_16), o),
        "no_normaliser": relative(phi_q @ S, o),
        "eps_on_the_sum": relative(out(phi_q, S, z, eps * LENGTHS[0] / N), out(phi_q, S, z, eps)),
        "padding_counted": relative(out(phi_q, S, z + zero_rows.sum(0) / N), o),
        "softmax_over_tokens": relative(out(wide_q, wide_k.T @ v, wide_k.sum(0)), o),
        "one_softmax": relative(out(single[0], single[1].T @ v, single[1].sum(0)), o),
    }
    return found, floor
