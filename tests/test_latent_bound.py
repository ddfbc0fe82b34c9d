"""The Wasserstein bound of latent flow matching (tests/latent_bound.py).

Each term against another way to compute it, the inequality on every case, and where the printed
form fails.
"""

import math

import latent_bound
import latent_claims
import pytest
import torch
from latent_bound import COUNTEREXAMPLE, PCA, generated, slope, terms

from latent_fm import dormand_prince
from models.networks.autoencoders import PatchPCA
from models.worlds.measures import frechet_distance


@pytest.mark.parametrize("case", PCA, ids=str)
def test_bound_holds_for_pca(case):
    """The printed form, the sharper and the looser one, and that of latents hold on each case.

    Twice the printed form is above the triangle's.
    """
    r = terms(**case)
    assert r.w2 <= r.sharper + 1e-9 and r.sharper <= r.printed + 1e-9
    assert r.printed <= r.triangle + 1e-9 <= 2 * r.printed + 2e-9
    assert r.w2_latent <= r.latent + 1e-9 and r.w2 <= r.triangle + 1e-9
    assert r.w2 == pytest.approx(r.delta + r.lipschitz_decoder**2 * r.w2_latent)  # Pythagoras


@pytest.mark.parametrize(
    "e1, e2, eps, w2, printed, sharper",
    [
        (0, 0, 0, 0.25, 0.25, 0.25),
        (0.1, 0, 0.01 * 2 / 3, 0.2862, 0.904, 0.3815),
        (0, 0.1, 0.01, 0.3121, 1.053, 0.4675),
        (0.3, -0.2, 0.1, 0.704, 14.89, 1.898),
        (-0.5, 0.5, 0.41667, 4.544, 91.25, 16.19),
    ],
)
def test_values(e1, e2, eps, w2, printed, sharper):
    """Numbers computed once with another program.

    eps of a unit Gaussian is e1^2 2/3 + e2^2 by hand.
    """
    r = terms(0, 1, e1, e2, 2.0, 0.25)
    assert r.eps == pytest.approx(e1**2 * 2 / 3 + e2**2, abs=1e-9)
    assert r.eps == pytest.approx(eps, rel=1e-4, abs=1e-9)
    assert (r.w2, r.printed, r.sharper) == pytest.approx((w2, printed, sharper), rel=1e-3)


def test_exact_velocity_costs_only_the_autoencoder():
    r = terms(0.7, 0.6, 0, 0, 3.0, 0.4)
    assert r.eps == 0 and r.w2 == pytest.approx(0.4, abs=1e-9) and r.printed == pytest.approx(0.4)


def test_printed_form_fails_for_a_biased_decoder():
    """It lacks the product of decoder error and velocity error.

    W2^2 is above it, but below the triangle's form and below twice the printed one.
    """
    r = terms(**COUNTEREXAMPLE)
    assert (r.w2, r.printed, r.triangle) == pytest.approx((1.1285, 1.0502, 1.498), abs=1e-3)
    assert r.printed < r.w2 < r.triangle <= 2 * r.printed


@pytest.mark.parametrize(
    "m, s, e1, e2", [(0, 1, 0.1, 0.1), (-0.5, 0.3, -0.4, 0.2), (2, 1.5, 0.3, 0)]
)
def test_generated_gaussian(m, s, e1, e2):
    """Mean and width of the flow, against the solver of latent_fm.py on two points.

    The width is s e^(-e1), by integrating a_t + e1.
    """
    z = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def velocity(z, t):
        return -m + slope(t, s) * (z - (1 - t) * m) + e1 * z + e2

    out, _ = dormand_prince(velocity, z, 1e-10, 1e-10)
    mean, std = generated(m, s, e1, e2)
    assert float(out[0]) == pytest.approx(mean, abs=1e-7)
    assert float(out[1] - out[0]) == pytest.approx(std, abs=1e-7)
    assert std == pytest.approx(s * math.exp(-e1), rel=1e-8)


def test_eps_is_the_excess_of_the_loss():
    """eps = mean of |v - w|^2 over the path, by Monte Carlo on samples of q_t."""
    m, s, e1, e2 = -0.5, 0.3, 0.7, 0.2
    g = torch.Generator().manual_seed(0)
    z0 = m + s * torch.randn(400000, generator=g, dtype=torch.float64)
    z1 = torch.randn(400000, generator=g, dtype=torch.float64)
    t = torch.rand(400000, generator=g, dtype=torch.float64)
    z = (1 - t) * z0 + t * z1
    assert terms(m, s, e1, e2).eps == pytest.approx(float((e1 * z + e2).square().mean()), rel=0.01)


def test_terms_of_a_fitted_patch_pca():
    """Gaussian pictures of one patch through PatchPCA.

    Delta^2 is what the eigen-decomposition discards. W2^2 of the decoded flow, by the Fréchet
    distance of the two Gaussians in pixels, is what `terms` says and below the bound.
    """

    def orthonormal(rows, seed):
        g = torch.Generator().manual_seed(seed)
        return torch.linalg.qr(torch.randn(rows, 4, generator=g, dtype=torch.float64))[0]

    values = torch.tensor([4.0, 0.6, 0.25, 0.1], dtype=torch.float64)
    q, exact = orthonormal(4, 3), orthonormal(1000, 4)
    # sample mean 0, covariance the identity
    exact = torch.linalg.qr(exact - exact.mean(0))[0] * 1000**0.5
    x = (exact * values.sqrt() @ q.T).reshape(-1, 1, 2, 2)
    pca = PatchPCA(1, 2, 1).double().fit(x)
    delta = float((pca.decode(pca.posterior(x)[0]) - x).square().sum((1, 2, 3)).mean())
    assert delta == pytest.approx(0.95, rel=1e-5)
    assert float(pca.variances[1:].sum()) == pytest.approx(0.95, rel=1e-5)
    w = pca.rows.double()  # (1, 4)
    for e1, e2 in ((0.1, 0.0), (-0.3, 0.2)):
        mean, std = generated(0, 1, e1, e2)  # latents over their std 2 are N(0, 1)
        made_mean, made_cov = 2 * mean * w[0], 4 * std**2 * w.T @ w
        got = frechet_distance(made_mean, made_cov, torch.zeros(4), q * values @ q.T)
        r = terms(0, 1, e1, e2, 2.0, delta)
        assert got == pytest.approx(r.w2, rel=1e-4) and got <= r.sharper <= r.printed


def test_mixture_in_one_dimension():
    """Exact transport of a mixture by sorted quantiles: the latent bound holds, far from tight.

    It holds with one-sided slopes too.
    """
    means, std = torch.tensor([-1.5, 0.0, 1.0], dtype=torch.float64), 0.4

    def velocity(z, t, e=0.0):
        S = (1 - t) ** 2 * std**2 + t**2
        d = z - (1 - t) * means  # (n, 3)
        r = (-(d**2) / (2 * S)).softmax(1)
        return (r * (-means + (t - (1 - t) * std**2) / S * d)).sum(1, keepdim=True) + e

    level = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    z1 = torch.special.ndtri(level)[:, None]  # quantiles of noise; 1-D flows keep their order
    e, grid = 0.1, torch.linspace(-4, 4, 401, dtype=torch.float64)
    exact, _ = dormand_prince(velocity, z1, 1e-8, 1e-8)
    made, _ = dormand_prince(lambda z, t: velocity(z, t, e), z1, 1e-8, 1e-8)
    w2 = float((exact - made).square().mean())
    times = latent_bound.T[::10]
    rises = [velocity(grid[:, None], float(t))[:, 0].diff() for t in times]
    slopes = torch.stack([rise / (grid[1] - grid[0]) for rise in rises])  # (201, 400)
    L = float(slopes.abs().max())
    one_sided = latent_bound.integral((-slopes.min(1).values).clamp_min(0), times)
    assert e**2 < w2 <= math.exp(1 + 2 * one_sided) * e**2 <= math.exp(1 + 2 * L) * e**2
    assert math.exp(1 + 2 * L) * e**2 > 100 * w2  # vacuous


def test_table_and_plot(tmp_path):
    text = latent_bound.table()
    assert text.count("| yes |") == len(PCA) and text.count("| **no** |") == 1
    latent_bound.plot(str(tmp_path / "bound.png"))
    assert (tmp_path / "bound.png").read_bytes()[:4] == b"\x89PNG"


# ---- claims that need no training ----------------------------------------------------------------


def test_latents_are_cheaper_than_pixels():
    """On f = 4 latents the same network has 16 times fewer tokens and 12 times fewer operations."""
    latent = latent_claims.flops(latent_claims.network((12, 8, 8)))
    pixel = latent_claims.flops(latent_claims.network((3, 32, 32)))
    assert 12 < pixel / latent < 40
    blocks = 2 * 16 * 4 * (12 * 128**2 + 2 * 16 * 128)  # L (12 N D^2 + 2 N^2 D) multiply-adds
    assert blocks < latent < 1.2 * blocks


def test_thin_directions_cost_evaluations():
    """At a fixed tolerance Dormand-Prince needs more evaluations the thinner the data are.

    This is why latents of unit variance need fewer.
    """
    data = [torch.tensor([[-s], [s]], dtype=torch.float64) for s in (1.0, 0.1, 0.01)]
    nfe = [latent_claims.gaussian_evaluations(x)[1e-5][0] for x in data]
    assert nfe == sorted(nfe) and nfe[0] < 45 and nfe[2] > 1.5 * nfe[0]
