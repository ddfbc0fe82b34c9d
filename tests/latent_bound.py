"""The Wasserstein bound of LFM (arXiv 2307.08698) term by term, where every term has a closed form: Gaussian data, linear fields, PCA.

    python -m tests.latent_bound [--plot docs/latent-bound.png]

As printed, with q_t the law of z_t, v its exact velocity and w the network's:
    W2^2(p0, p0_hat) <= Delta^2 + L_g^2 e^(1 + 2 L) eps,    eps = int_0^1 E_{z ~ q_t} |v - w|^2 dt
Delta^2 = E|x - g(f(x))|^2 of encoder f and decoder g, L_g the decoder's Lipschitz constant, L that of w in z, uniform in t. (The printed
integrand has w at another point than v; read so it is not the training objective.) What can be proved, by coupling both flows at the same
noise, Young and Gronwall:
    latents          W2^2(q0, q0_hat) <= e^(1 + 2 L) eps
    any decoder      W2(p0, p0_hat) <= Delta + L_g e^(1/2 + L) eps^(1/2)                                         "triangle"
    PCA              the printed form, because the residual x - g(f(x)) is orthogonal to the decoder's range     "printed"
    either, sharper  the integral of max(0, -slope of w) in place of L: integrating towards the data only negative slopes spread errors
The printed form fails for a biased decoder (COUNTEREXAMPLE); twice its right side always holds.
"""

import argparse
import io as bytes_io
import math
import os
import sys
import types

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from models.files import atomic_write  # noqa: E402

T = torch.linspace(0, 1, 2001, dtype=torch.float64)


def slope(t, s):
    """a_t of the exact velocity -m + a_t (z - (1 - t) m) of N(m, s^2): (t - (1 - t) s^2) / S_t, S_t = (1 - t)^2 s^2 + t^2."""
    return (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)


def integral(values, t=T):
    """Simpson's rule on the grid."""
    h = t[1] - t[0]
    return float(
        h / 3 * (values[0] + values[-1] + 4 * values[1:-1:2].sum() + 2 * values[2:-1:2].sum())
    )


def generated(m, s, e1, e2, n=500):
    """Mean and standard deviation at t = 0 of the flow of w = v + e1 z + e2 from N(0, 1) at t = 1, by RK4 on its mean and log-std."""

    def rates(t, mean):
        a = slope(t, s) + e1
        return a * mean - m - slope(t, s) * (1 - t) * m + e2, a

    mean, log_std, h = 0.0, 0.0, -1 / n
    for i in range(n, 0, -1):
        t = i / n
        k1, l1 = rates(t, mean)
        k2, l2 = rates(t + h / 2, mean + h / 2 * k1)
        k3, _ = rates(t + h / 2, mean + h / 2 * k2)
        k4, l4 = rates(t + h, mean + h * k3)
        mean, log_std = (
            mean + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4),
            log_std + h / 6 * (l1 + 4 * l2 + l4),
        )
    return mean, math.exp(log_std)


def terms(m, s, e1, e2, scale=1.0, discarded=0.0, bias=0.0):
    """Every term for a latent N(m, s^2) of one number, w = v + e1 z + e2, and the decoder g(z) = scale z + bias into the data's first
    coordinate x_1 = scale z; `discarded` is the variance of the coordinates that the encoder drops.  -> namespace of floats."""
    S, a = (1 - T) ** 2 * s**2 + T**2, slope(T, s)
    eps = integral(e1**2 * (S + (1 - T) ** 2 * m**2) + 2 * e1 * e2 * (1 - T) * m + e2**2)
    L, one_sided = float((a + e1).abs().max()), integral((-(a + e1)).clamp_min(0))
    mean, std = generated(m, s, e1, e2)
    delta = discarded + bias**2
    w2 = (
        (scale * (mean - m) + bias) ** 2 + (scale * (std - s)) ** 2 + discarded
    )  # Gaussians along one axis, a point along the others
    return types.SimpleNamespace(
        delta=delta,
        lipschitz_decoder=scale,
        lipschitz=L,
        one_sided=one_sided,
        eps=eps,
        w2_latent=(mean - m) ** 2 + (std - s) ** 2,
        w2=w2,
        latent=math.exp(1 + 2 * L) * eps,
        printed=delta + scale**2 * math.exp(1 + 2 * L) * eps,
        sharper=delta + scale**2 * math.exp(1 + 2 * one_sided) * eps,
        triangle=(delta**0.5 + scale * math.exp(0.5 + L) * eps**0.5) ** 2,
    )


# data N(0, diag(4, .25)), PCA to one number of unit variance; then latents of other means and widths
PCA = [
    dict(m=m, s=s, e1=e1, e2=e2, scale=2.0, discarded=0.25)
    for m, s, e1, e2 in (
        (0, 1, 0, 0),
        (0, 1, 0.1, 0),
        (0, 1, 0, 0.1),
        (0, 1, 0.3, -0.2),
        (0, 1, -0.5, 0.5),
        (1, 1, 0.2, 0.1),
        (-0.5, 0.3, 0.1, 0.1),
        (2, 1.5, -0.2, 0.3),
    )
]
COUNTEREXAMPLE = dict(
    m=0, s=1, e1=0, e2=-0.05, bias=1.0
)  # x ~ N(0, 1), f the identity, g(z) = z + 1
COLUMNS = ("delta", "eps", "lipschitz", "w2", "sharper", "printed", "triangle")


def table():
    head = (
        "m, s, e1, e2",
        "Delta^2",
        "eps",
        "L",
        "W2^2",
        "sharper",
        "printed",
        "triangle^2",
        "printed holds",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in (*PCA, COUNTEREXAMPLE):
        r = terms(**case)
        name = ", ".join(f"{case[k]:g}" for k in ("m", "s", "e1", "e2")) + (
            " (g = z + 1)" if case.get("bias") else ""
        )
        lines.append(
            "| "
            + " | ".join(
                [
                    name,
                    *(f"{getattr(r, c):.4g}" for c in COLUMNS),
                    "yes" if r.w2 <= r.printed + 1e-9 else "**no**",
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def plot(path):
    """W2^2 and the three right sides against the size of the velocity's error, PCA (left) and a decoder biased by 1 (right); both axes logarithmic."""
    W, H, pad, font = 460, 330, 46, ImageFont.load_default()
    image = Image.new("RGB", (2 * W, H), "white")
    draw = ImageDraw.Draw(image)
    sizes = [0.005 * 1.35**i for i in range(18)]
    panels = (
        (
            "PCA autoencoder, w = v + e (z - 1)",
            lambda e: dict(m=0, s=1, e1=e, e2=-e, scale=2.0, discarded=0.25),
            (0.2, 100),
        ),
        (
            "decoder biased by 1, w = v - e",
            lambda e: dict(m=0, s=1, e1=0, e2=-e, bias=1.0),
            (0.9, 100),
        ),
    )
    lines = (
        ("w2", "W2^2", (20, 20, 20)),
        ("sharper", "sharper", (25, 140, 75)),
        ("printed", "printed", (205, 60, 45)),
        ("triangle", "triangle^2", (60, 100, 190)),
    )
    for p, (title, case, (low, high)) in enumerate(panels):
        rows = [terms(**case(e)) for e in sizes]
        px = lambda e: (
            p * W + pad + (W - pad - 14) * math.log(e / sizes[0]) / math.log(sizes[-1] / sizes[0])
        )  # noqa: E731, B023
        py = lambda v: (
            H - 34 - (H - 64) * math.log(min(max(v, low), high) / low) / math.log(high / low)
        )  # noqa: E731, B023
        draw.text((p * W + pad, 6), title, fill="black", font=font)
        for v in (1, 10, 100):
            draw.line([p * W + pad, py(v), (p + 1) * W - 14, py(v)], fill=(225, 225, 225))
            draw.text((p * W + 12, py(v) - 6), str(v), fill="black", font=font)
        for e in (0.01, 0.1):
            draw.text((px(e) - 8, H - 28), f"{e:g}", fill="black", font=font)
        draw.text((p * W + W // 2 - 40, H - 14), "error e of w", fill="black", font=font)
        for i, (name, text, colour) in enumerate(lines):
            draw.line(
                [(px(e), py(getattr(r, name))) for e, r in zip(sizes, rows)],
                fill=colour,
                width=3 if name == "w2" else 2,
            )
            draw.text((p * W + pad + 8, 24 + 13 * i), text, fill=colour, font=font)
    data = bytes_io.BytesIO()
    image.save(data, "PNG")
    atomic_write(path, data.getvalue())


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--plot", default=None, help="PNG to write")
    args = p.parse_args()
    print(table())
    if args.plot:
        plot(args.plot)
