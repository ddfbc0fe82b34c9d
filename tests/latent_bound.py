"""The Wasserstein bound of LFM (arXiv 2307.08698) term by term, where all have a closed form.

    python -m tests.latent_bound [--plot docs/latent-bound.png]

That is so for Gaussian data, linear velocity fields and PCA. The bound as printed, with q_t the
distribution of z_t, v its exact velocity and w the network's, is

    W2^2(p0, p0_hat) <= Delta^2 + L_g^2 e^(1 + 2 L) eps,   eps = int_0^1 E_{z ~ q_t} |v - w|^2 dt

where Delta^2 = E|x - g(f(x))|^2 of encoder f and decoder g, L_g is the decoder's Lipschitz constant
and L that of w in z, uniform in t. (The printed integrand has w at another point than v; read that
way it is not the training objective.) By coupling both flows at the same noise, Young's inequality
and Gronwall's, one can prove

    latents          W2^2(q0, q0_hat) <= e^(1 + 2 L) eps
    any decoder      W2(p0, p0_hat) <= Delta + L_g e^(1/2 + L) eps^(1/2)               "triangle"
    PCA              the printed form, because the residual x - g(f(x)) is
                     orthogonal to the decoder's range                                 "printed"
    either, sharper  the integral of max(0, -slope of w) in place of L, since on the
                     way to the data only negative slopes spread errors                "sharper"

The printed form fails for a biased decoder (COUNTEREXAMPLE); twice its right side always holds.
"""

import argparse
import io
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
    """a_t of the exact velocity -m + a_t (z - (1 - t) m) of data N(m, s^2).

    a_t = (t - (1 - t) s^2) / S_t with S_t = (1 - t)^2 s^2 + t^2.
    """
    return (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)


def integral(values, t=T):
    """Simpson's rule on the grid t."""
    h = t[1] - t[0]
    inner = 4 * values[1:-1:2].sum() + 2 * values[2:-1:2].sum()
    return float(h / 3 * (values[0] + values[-1] + inner))


def generated(m, s, e1, e2, n=500):
    """Mean and standard deviation at t = 0 of the flow of w = v + e1 z + e2 from N(0, 1) at t = 1.

    By the Runge-Kutta method of order 4, in n steps, on the mean and the log of the deviation.
    """

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
        mean = mean + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        log_std = log_std + h / 6 * (l1 + 4 * l2 + l4)
    return mean, math.exp(log_std)


def terms(m, s, e1, e2, scale=1.0, discarded=0.0, bias=0.0):
    """Every term for a latent N(m, s^2) of one number, and w = v + e1 z + e2.

    The decoder is g(z) = scale z + bias, into the data's first coordinate x_1 = scale z;
    `discarded` is the variance of the coordinates that the encoder drops.  -> namespace of floats.
    """
    S, a = (1 - T) ** 2 * s**2 + T**2, slope(T, s)
    eps = integral(e1**2 * (S + (1 - T) ** 2 * m**2) + 2 * e1 * e2 * (1 - T) * m + e2**2)
    L, one_sided = float((a + e1).abs().max()), integral((-(a + e1)).clamp_min(0))
    mean, std = generated(m, s, e1, e2)
    delta = discarded + bias**2
    # two Gaussians along one axis, a Gaussian against a point along the others
    w2 = (scale * (mean - m) + bias) ** 2 + (scale * (std - s)) ** 2 + discarded
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


# data N(0, diag(4, .25)), PCA to one number of unit variance; then other latent means and widths
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
# x ~ N(0, 1), f the identity, g(z) = z + 1
COUNTEREXAMPLE = dict(m=0, s=1, e1=0, e2=-0.05, bias=1.0)
COLUMNS = ("delta", "eps", "lipschitz", "w2", "sharper", "printed", "triangle")


def table():
    """The terms of all cases as a Markdown table."""
    names = ("Delta^2", "eps", "L", "W2^2", "sharper", "printed", "triangle^2")  # of COLUMNS
    head = ("m, s, e1, e2", *names, "printed holds")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in (*PCA, COUNTEREXAMPLE):
        r = terms(**case)
        name = ", ".join(f"{case[k]:g}" for k in ("m", "s", "e1", "e2"))
        name += " (g = z + 1)" if case.get("bias") else ""
        holds = "yes" if r.w2 <= r.printed + 1e-9 else "**no**"
        cells = [name, *(f"{getattr(r, c):.4g}" for c in COLUMNS), holds]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path):
    """Draw W2^2 and the three right sides against the size of the velocity's error.

    PCA is on the left, a decoder biased by 1 on the right; both axes are logarithmic.
    """
    W, H, pad, font = 460, 330, 46, ImageFont.load_default()
    image = Image.new("RGB", (2 * W, H), "white")
    draw = ImageDraw.Draw(image)
    sizes = [0.005 * 1.35**i for i in range(18)]
    pca = [terms(0, 1, e, -e, scale=2.0, discarded=0.25) for e in sizes]
    biased = [terms(0, 1, 0, -e, bias=1.0) for e in sizes]
    panels = (
        ("PCA autoencoder, w = v + e (z - 1)", pca, 0.2),
        ("decoder biased by 1, w = v - e", biased, 0.9),
    )
    lines = (
        ("w2", "W2^2", (20, 20, 20)),
        ("sharper", "sharper", (25, 140, 75)),
        ("printed", "printed", (205, 60, 45)),
        ("triangle", "triangle^2", (60, 100, 190)),
    )
    for p, (title, rows, low) in enumerate(panels):

        def px(e, left=p * W + pad):
            share = math.log(e / sizes[0]) / math.log(sizes[-1] / sizes[0])
            return left + (W - pad - 14) * share

        def py(v, low=low, high=100):
            share = math.log(min(max(v, low), high) / low) / math.log(high / low)
            return H - 34 - (H - 64) * share

        draw.text((p * W + pad, 6), title, fill="black", font=font)
        for v in (1, 10, 100):
            draw.line([p * W + pad, py(v), (p + 1) * W - 14, py(v)], fill=(225, 225, 225))
            draw.text((p * W + 12, py(v) - 6), str(v), fill="black", font=font)
        for e in (0.01, 0.1):
            draw.text((px(e) - 8, H - 28), f"{e:g}", fill="black", font=font)
        draw.text((p * W + W // 2 - 40, H - 14), "error e of w", fill="black", font=font)
        for i, (name, text, colour) in enumerate(lines):
            points = [(px(e), py(getattr(r, name))) for e, r in zip(sizes, rows, strict=True)]
            draw.line(points, fill=colour, width=3 if name == "w2" else 2)
            draw.text((p * W + pad + 8, 24 + 13 * i), text, fill=colour, font=font)
    data = io.BytesIO()
    image.save(data, "PNG")
    atomic_write(path, data.getvalue())


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--plot", default=None, help="PNG to write")
    args = p.parse_args()
    print(table())
    if args.plot:
        plot(args.plot)
