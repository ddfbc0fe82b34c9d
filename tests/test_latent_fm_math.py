"""latent_fm.py where the answer is known.

Gaussian and mixture data, the solvers' orders, guidance, autoencoders, masks and maps.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import perturbed, small_dit

import latent_fm
from latent_fm import (
    dormand_prince,
    euler,
    flow_matching_loss,
    flow_matching_loss_sigma_min,
    guided_velocity,
    sample,
)
from models.diffusion import from_x0_eps, guide, to_x0_eps
from models.networks.autoencoders import AutoencoderKL, Identity, PatchPCA
from models.networks.latent_space import LatentSpace, load_space, space_beside
from models.plumbing.data import spread_rows, to_unit
from models.worlds import load_world
from models.worlds.masks import draw_mask, draw_masks
from models.worlds.shapes import Shapes, overlap

FIELD = dict(size=(6, 6), patch=(3, 3))  # of a small network


def normal(*shape, seed=0):
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(low=0.05, high=0.95, n=9):
    return torch.linspace(low, high, n, dtype=torch.float64)


def distance(a, b):
    """Root mean square of a - b."""
    return (a - b).square().mean().sqrt()


class Gaussian:
    """The exact velocity of data N(m, s^2) in every dimension, called like a network."""

    num_classes = 0

    def __init__(self, m, s):
        self.m, self.s = m, s

    def __call__(self, z, t, label=None):
        t = t.reshape(-1, *[1] * (z.dim() - 1)) if torch.is_tensor(t) else t
        S = (1 - t) ** 2 * self.s**2 + t**2
        return -self.m + (t - (1 - t) * self.s**2) / S * (z - (1 - t) * self.m)


class Mixture:
    """The exact velocity of a 1-D mixture of Gaussians, called like a network.

    Class k is component k, and the null label, K, is the whole mixture.
    """

    means = torch.tensor([-1.5, 0.2, 1.4], dtype=torch.float64)
    stds = torch.tensor([0.4, 0.25, 0.5], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    num_classes = 3

    def log_parts(self, z, t):
        """log of w_k N(z; (1 - t) m_k, S_k).  z (n, 1), t (n,) -> (n, 3)."""
        t = t[:, None]
        S = (1 - t) ** 2 * self.stds**2 + t**2
        return self.weights.log() - (z - (1 - t) * self.means) ** 2 / (2 * S) - S.log() / 2

    def __call__(self, z, t, label=None):
        parts = self.log_parts(z, t)
        if label is not None:
            others = (torch.arange(3) != label[:, None]) & (label[:, None] < 3)
            parts = parts.masked_fill(others, -torch.inf)
        t = t[:, None]
        S = (1 - t) ** 2 * self.stds**2 + t**2
        slope = (t - (1 - t) * self.stds**2) / S
        velocities = -self.means + slope * (z - (1 - t) * self.means)
        return (parts.softmax(1) * velocities).sum(1, keepdim=True)


# ---- the loss and its optimum --------------------------------------------------------------------


@pytest.mark.parametrize("m, s", [(0.0, 1.0), (0.5, 0.6)])
def test_loss_floor_is_pi_s_over_2(m, s):
    """The exact velocity of N(m, s^2) has loss pi s / 2, which is the integral of s^2 / S_t.

    A network that says 0 has 1 + m^2 + s^2, and an error e adds e^2.
    """
    n, g = 400000, torch.Generator().manual_seed(2)
    x0, eps = (m + s * normal(n, 1)).float(), normal(n, 1, seed=1).float()
    t = torch.rand(n, generator=g, dtype=torch.float64).float()
    exact = Gaussian(m, s)

    def loss(net):
        return float(flow_matching_loss(net, x0, eps, t, {})[0])

    floor = loss(lambda x, t: exact(x, t))
    assert floor == pytest.approx(math.pi * s / 2, rel=0.01)
    assert loss(lambda x, t: 0 * x) == pytest.approx(1 + m**2 + s**2, rel=0.01)
    for e in (0.2, -0.3):
        wrong = loss(lambda x, t, e=e: exact(x, t) + e)
        assert wrong - floor == pytest.approx(e**2, abs=4e-3)


@pytest.mark.parametrize("s", [0.0, 1e-5, 0.3])
def test_sigma_min_path(s):
    """x_t starts at x0 + s eps and ends at the noise itself, and the target is its slope.

    s = 0 is the paper's path to the last bit.
    """
    x0, eps, seen = normal(4, 3), normal(4, 3, seed=1), []

    def net(x, t):
        seen.append(x)
        return torch.zeros_like(x)

    target = []
    for t in (0.0, 1.0, 0.4, 0.4 + 1e-6):
        t = torch.full((4,), t, dtype=torch.float64)
        target.append(flow_matching_loss_sigma_min(net, x0, eps, t, {}, s)[1])
    torch.testing.assert_close(seen[0], x0 + s * eps)
    torch.testing.assert_close(seen[1], eps)
    slope = (seen[3] - seen[2]) / 1e-6
    torch.testing.assert_close(target[2], slope.square().mean(1), rtol=1e-5, atol=1e-5)
    if s == 0:
        t = torch.full((4,), 0.4, dtype=torch.float64)
        _, paper = flow_matching_loss(net, x0, eps, t, {})
        assert torch.equal(seen[-1], seen[2]) and torch.equal(paper, target[2])
        assert torch.equal(seen[-1], 0.6 * x0 + torch.tensor(0.4, dtype=torch.float64) * eps)


@pytest.mark.parametrize("label", [None, 1])
def test_mixture_velocity_is_that_of_its_score(label):
    """v = -(z + t score) / (1 - t), with the score by autograd of the mixture's density.

    So the fixture is right, with labels too.
    """
    net, z, t = Mixture(), normal(9, 1).requires_grad_(True), times()
    parts = net.log_parts(z, t)
    log_p = parts.logsumexp(1) if label is None else parts[:, label]
    (score,) = torch.autograd.grad(log_p.sum(), z)
    v = net(z, t, None if label is None else torch.full((9,), label)).detach()
    torch.testing.assert_close(v, -(z.detach() + t[:, None] * score) / (1 - t[:, None]))


def test_zero_initialised_network_pays_the_noise():
    """A new DiT says exactly 0, with context too, so its first loss is mean (eps - x0)^2."""
    for context in ({}, dict(context_channels=3, context_width=2), dict(context_channels=3)):
        net = small_dit(**FIELD, **context)
        x0, eps = normal(8, 2, 6, 6).float(), normal(8, 2, 6, 6, seed=1).float()
        t = torch.linspace(0, 1, 8)
        cond = {"context": normal(8, 3, 6, 6, seed=2).float()} if context else {}
        assert not net(x0, t, **cond).any()
        loss = float(flow_matching_loss(net, x0, eps, t, cond)[0].detach())
        assert loss == pytest.approx(float((eps - x0).square().mean()))


# ---- solvers -------------------------------------------------------------------------------------


def test_euler_is_algorithm_2():
    """x + (s - t) v(x, t) from each time to the next; the sampler's Euler is the same."""
    net, x, grid = Mixture(), normal(9, 1), [1.0, 0.7, 0.2, 0.0]
    want = x
    for t, s in zip(grid[:-1], grid[1:]):
        want = want + (s - t) * net(want, torch.full((9,), t, dtype=torch.float64))
    torch.testing.assert_close(euler(net, x, grid), want)
    null, even = torch.full((9,), 3), [1.0, 0.75, 0.5, 0.25, 0.0]
    assert torch.equal(sample(net, x, null, 4, solver="euler"), euler(net, x, even))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_one_euler_step_is_the_mean(solver):
    """From t = 1 one step returns E[x0] whatever the noise (Heun's only step is Euler's).

    A point is reached exactly with any number of steps. Two steps do not reach a Gaussian's exact
    map m + s z1: the paths are curved.
    """
    z = normal(50, 2) * 2
    assert (sample(Gaussian(0.7, 0.4), z, None, 1, solver=solver) - 0.7).abs().max() < 1e-12
    mix = Mixture()
    mean = float((mix.weights * mix.means).sum())
    assert (sample(mix, z[:, :1], torch.full((50,), 3), 1, 1.0, solver) - mean).abs().max() < 1e-12
    point = Gaussian(0.7, 1e-9)
    for n in (2, 7):
        assert (sample(point, z, None, n, solver="euler") - 0.7).abs().max() < 1e-7
    two = sample(Gaussian(0.7, 0.4), z, None, 2, solver="euler")
    assert (two - (0.7 + 0.4 * z)).abs().max() > 0.05


def test_dopri5_reaches_the_closed_form():
    """z0 = m + s z1 within the tolerance, and back.

    The calls counted are the calls made: 2, and 6 for each step tried. A tighter tolerance costs
    more and errs less.
    """
    z, errors, counts = normal(20, 2), [], []
    net = Gaussian(0.7, 0.3)
    for tol in (1e-3, 1e-5, 1e-8):
        seen, calls = [], []

        def field(z, t, label=None, seen=seen):
            seen.append(0)
            return net(z, t)

        field.num_classes = 0
        x = sample(field, z, None, solver="dopri5", atol=tol, rtol=tol, calls=calls)
        errors.append(float((x - (0.7 + 0.3 * z)).abs().max()))
        counts.append(calls[0])
        assert calls[0] == len(seen) and (calls[0] - 2) % 6 == 0
        assert errors[-1] < 10 * tol
    assert errors == sorted(errors, reverse=True) and counts == sorted(counts)
    back, _ = dormand_prince(net, x, 1e-8, 1e-8, start=0.0, end=1.0)
    assert (back - z).abs().max() < 1e-6


def test_dopri5_stops_where_float32_cannot_follow():
    net = Gaussian(0.7, 0.3)

    def noisy(z, t):
        return net(z, t) + 1e-3 * torch.randn_like(z)

    with pytest.raises(ValueError, match="raise atol"):
        dormand_prince(noisy, normal(20, 2).float(), 1e-12, 1e-12)
    with pytest.raises(ValueError, match="not finite"):
        dormand_prince(lambda z, t: z / (t > 0.5), normal(20, 2))


def fixed_step(f, x, t, h):
    """One Dormand-Prince step from its table.

    -> the solution of order 5, the difference of the two solutions.
    """
    k = [f(x, t)]
    for node, weights in zip(latent_fm.NODES, latent_fm.STAGES):
        last = x + h * sum(w * k_i for w, k_i in zip(weights, k))
        k.append(f(last, t + node * h))
    return last, h * sum(w * k_i for w, k_i in zip(latent_fm.DIFFERENCE, k))


def test_orders():
    """On the mixture, halving the step makes Euler 2 and Heun 4 times as accurate.

    Dormand-Prince's two solutions gain 2^5 and 2^4 (their local errors 2^6 and 2^5).
    """
    sums = [sum(w) for w in latent_fm.STAGES]
    assert sums == pytest.approx(list(latent_fm.NODES), abs=1e-14)
    assert abs(sum(latent_fm.DIFFERENCE)) < 1e-15
    net, z, null = Mixture(), normal(40, 1), torch.full((40,), 3)

    def field(x, t):
        return net(x, torch.full((len(x),), t, dtype=torch.float64), null[: len(x)])

    exact, _ = dormand_prince(field, z, 1e-11, 1e-11)
    for solver, order, ns in (("euler", 1, (64, 128)), ("heun", 2, (32, 64))):
        a, b = (distance(sample(net, z, null, n, 1.0, solver), exact) for n in ns)
        assert math.log2(a / b) == pytest.approx(order, abs=0.15), solver
    local, difference = [], []
    for h in (-0.04, -0.02):
        x, d = fixed_step(field, z, 0.5, h)
        local.append(distance(x, dormand_prince(field, z, 1e-13, 1e-13, 0.5, 0.5 + h)[0]))
        difference.append(distance(d, 0))
    assert math.log2(local[0] / local[1]) == pytest.approx(6, abs=0.5)
    assert math.log2(difference[0] / difference[1]) == pytest.approx(5, abs=0.4)
    x = z
    for i in range(8):
        x, _ = fixed_step(field, x, 1 - i / 8, -1 / 8)
    y = z
    for i in range(16):
        y, _ = fixed_step(field, y, 1 - i / 16, -1 / 16)
    assert 3.8 < math.log2(distance(x, exact) / distance(y, exact)) < 6.5


def test_direction():
    """t = 1 is noise.

    The velocity of the other convention (data at 1), v'(z, t) = -v(z, 1 - t), integrated in its own
    direction gives the same sample. Given to our sampler as it is, it does not.
    """
    net, z = Gaussian(0.7, 0.3), normal(30, 2)

    def other(z, t, label=None):
        return -net(z, 1 - t)

    other.num_classes = 0
    forth, _ = dormand_prince(other, z, 1e-8, 1e-8, start=0.0, end=1.0)
    assert (forth - (0.7 + 0.3 * z)).abs().max() < 1e-6
    assert (sample(other, z, None, 16) - (0.7 + 0.3 * z)).abs().max() > 0.5


# ---- guidance ------------------------------------------------------------------------------------


def test_flags_of_sampling_reach_the_sampler():
    flags = "--sample_steps 7 --guidance_scale 3 --solver dopri5 --timestep_shift 2 "
    flags += "--guidance_interval 0.1 0.9 --atol 1e-3 --rtol 1e-2"
    found = latent_fm.sampler_settings(latent_fm.parse_args(flags.split()))
    about = dict(steps=7, guidance_scale=3.0, solver="dopri5", timestep_shift=2.0)
    assert found == about | dict(interval=[0.1, 0.9], atol=1e-3, rtol=1e-2)


def test_guidance_identities():
    """gamma 1 and 0 are the two velocities to the last bit, for one call.

    Guiding v, eps, x0 or the score is the same, and v_c - v_u = -t / (1 - t) grad log p(c | z).
    """
    net, t, label = Mixture(), times(), torch.arange(9) % 3
    z = normal(9, 1).requires_grad_(True)
    v_c, v_u = (net(z.detach(), t, k) for k in (label, torch.full((9,), 3)))
    for gamma, want in ((1, v_c), (0, v_u)):
        sizes = []

        def counted(x, t, label, sizes=sizes):
            sizes.append(len(x))
            return net(x, t, label)

        got = guided_velocity(counted, z.detach(), t, label, 3, gamma)
        assert torch.equal(got, want) and sizes == [9]
    guided = guided_velocity(net, z.detach(), t, label, 3, 2.5)
    torch.testing.assert_close(guided, v_u + 2.5 * (v_c - v_u))
    for kind in ("x0", "eps", "score", "vp_v"):
        c, u = (
            from_x0_eps(kind, *to_x0_eps(v, "flow_v", z.detach(), 1 - t, t), 1 - t, t)
            for v in (v_c, v_u)
        )
        x0, eps = to_x0_eps(guide(c, u, 2.5), kind, z.detach(), 1 - t, t)
        back = from_x0_eps("flow_v", x0, eps, 1 - t, t)
        torch.testing.assert_close(back, guided, rtol=1e-8, atol=1e-8)
    log_posterior = net.log_parts(z, t).log_softmax(1)[torch.arange(9), label]
    (slope,) = torch.autograd.grad(log_posterior.sum(), z)
    torch.testing.assert_close(v_c - v_u, -(t / (1 - t))[:, None] * slope)


def test_conversions_by_hand():
    """x0 = z - t v, eps = z + (1 - t) v, score = -eps / t: the formulas of this path, and back."""
    z, v, t = normal(9, 4), normal(9, 4, seed=1), times()
    x0, eps = to_x0_eps(v, "flow_v", z, 1 - t, t)
    torch.testing.assert_close(x0, z - t[:, None] * v)
    torch.testing.assert_close(eps, z + (1 - t[:, None]) * v)
    score = from_x0_eps("score", x0, eps, 1 - t, t)
    torch.testing.assert_close(-(z + t[:, None] * score) / (1 - t[:, None]), v)


def test_guidance_has_an_interior_optimum():
    """W2^2 to p(x0 | c), in closed form, is 0 at gamma = 1 with the exact velocity.

    It grows to both sides, while the spread shrinks as gamma grows.
    """
    net, level = Mixture(), (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    z, label = torch.special.ndtri(level)[:, None], torch.full((200,), 1)
    want = net.means[1] + net.stds[1] * z
    w2, std = {}, {}
    for gamma in (0.0, 0.5, 1.0, 1.5, 2.0, 4.0):
        x = sample(net, z, label, 64, gamma).sort(0).values
        w2[gamma], std[gamma] = float((x - want).square().mean()), float(x.std())
    assert w2[1.0] < 1e-3
    assert w2[0.0] > w2[0.5] > 10 * w2[1.0]
    assert w2[4.0] > w2[2.0] > w2[1.5] > 2 * w2[1.0]
    assert list(std.values()) == sorted(std.values(), reverse=True)


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_guidance_interval(solver):
    """Guided within the interval only: one call where it is off, twice the batch where it is on.

    Everywhere is the guided sampler, and nowhere the plain one.
    """
    net, z, label, sizes = Mixture(), normal(10, 1), torch.arange(10) % 3, []

    def field(x, t, label=None):
        sizes.append((len(x), float(t[0])))
        return net(x, t, label)

    def run(scale, interval):
        return sample(field, z, label, 8, scale, solver, interval=interval)

    field.num_classes = 3
    everywhere, plain = run(3.0, (0.0, 1.0)), run(1.0, (0.0, 1.0))
    assert torch.equal(everywhere, run(3.0, [0, 1])) and not torch.equal(everywhere, plain)
    torch.testing.assert_close(run(3.0, (0.3, 0.3001)), plain, rtol=1e-3, atol=1e-3)
    sizes.clear()
    run(3.0, (0.2, 0.7))
    assert all(n == (20 if 0.2 <= t <= 0.7 else 10) for n, t in sizes)
    assert len({n for n, _ in sizes}) == 2


@pytest.mark.parametrize("steps, ends", [(5, (0.0, 0.8)), (10, (0.7, 1.0)), (10, (0.0, 0.3))])
def test_guidance_interval_has_its_ends(steps, ends):
    """Times of the grid that are equal to an end, up to the rounding of float32, are within."""
    net, guided = Mixture(), []

    def field(x, t, label=None):
        guided.append(len(x) == 20)
        return net(x.double(), t.double(), label).to(x.dtype)

    field.num_classes = 3
    label = torch.arange(10) % 3
    sample(field, normal(10, 1).float(), label, steps, 3.0, "euler", interval=ends)
    low, high = (round(steps * end) for end in ends)
    assert guided == [low <= i <= high for i in range(steps, 0, -1)]


def test_networks_without_labels_and_contexts_under_guidance():
    """label None is not passed on; of a guided call both halves see the context."""
    seen = []

    def plain(x, t):
        return -x

    def painted(x, t, label, context):
        seen.append(context)
        return -x

    z = normal(4, 1, 2, 2)
    assert torch.isfinite(sample(plain, z, None, 2)).all()
    painted.num_classes = 3
    context = normal(4, 2, 2, 2)
    sample(painted, z, torch.arange(4) % 3, 2, 2.0, "euler", context=context)
    assert all(torch.equal(c, torch.cat([context, context])) for c in seen) and len(seen) == 2


def test_sampling_never_drops_labels():
    """Dropout belongs to training: a network in train mode is asked for the labels given.

    The null label is number K.
    """
    net, asked = perturbed(small_dit()), []
    net.train().register_forward_hook(
        lambda module, args, kwargs, out: asked.append(kwargs["label"]), with_kwargs=True
    )
    label = torch.tensor([0, 1, 2])
    sample(net, normal(3, 2, 6, 4).float(), label, 3, 2.0)
    both = torch.cat([label, torch.full((3,), 3)])
    assert all(torch.equal(a, both) for a in asked) and len(asked) == 5


# ---- autoencoders --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    return Shapes().data(60, 3)[0]


def test_what_is_measured_on_some_items_is_measured_on_all_classes():
    """A folder is sorted by class: 4,000 of 10,000 items, spread over all of them."""
    some = spread_rows(10_000, 4000)
    assert len(some.unique()) == 4000 and some.max() < 10_000
    assert (some // 1000).unique().tolist() == list(range(10))
    assert spread_rows(30, 4000).tolist() == list(range(30))


def test_a_sorted_set_s_space_knows_its_last_class():
    """4,000 black items and then 1,000 white ones: the PCA's mean, and the channels' means.

    Of the first 4,000 the PCA has mean -1, and what --latent_norm centres stays off by .4.
    """
    x = torch.zeros(5000, 1, 4, 4, dtype=torch.uint8)
    x[4000:] = 255
    args = latent_fm.parse_args("--autoencoder pca --latent_norm channel --pool 100".split())
    data = SimpleNamespace(x=x)
    space = latent_fm.build_space(args, None, data)
    assert float(space.autoencoder.centre.mean()) == pytest.approx(-0.6, abs=0.01)
    latent_fm.measure_norm(args, data, space, None, "cpu")
    z = space.to_latents(to_unit(x))
    assert float(z.mean()) == pytest.approx(0, abs=0.01)


def test_patch_pca_identities(pictures):
    """The rows are orthonormal, and encoding a decoded latent changes nothing.

    The error is what the discarded eigenvalues say, and less than that of any other rows.
    """
    pca = PatchPCA(3, 4, 6).fit(pictures)
    torch.testing.assert_close(pca.rows @ pca.rows.T, torch.eye(6), atol=1e-5, rtol=0)
    z, logvar = pca.posterior(pictures)
    assert z.shape == (60, 6, 8, 8) and (logvar == -30).all()
    free = normal(3, 6, 8, 8).float()
    torch.testing.assert_close(pca.posterior(pca.decode(free))[0], free, atol=1e-5, rtol=1e-5)
    back = pca.decode(z)
    torch.testing.assert_close(pca.decode(pca.posterior(back)[0]), back, atol=1e-5, rtol=1e-5)

    def error_of(decoded):  # the squared error of a patch
        return float((decoded - pictures).square().sum() / (60 * 64))

    assert error_of(back) == pytest.approx(float(pca.variances[6:].sum()), rel=1e-3)
    variances = z.transpose(0, 1).flatten(1).var(1)
    assert (variances - pca.variances[:6]).abs().max() < 0.01 * pca.variances[0]
    other = PatchPCA(3, 4, 6).fit(pictures)
    other.rows.copy_(torch.linalg.qr(normal(48, 6).float())[0].T)
    assert error_of(other.decode(other.posterior(pictures)[0])) > error_of(back)
    with pytest.raises(ValueError, match="1 to 48 components"):
        PatchPCA(3, 4, 49)
    with pytest.raises(ValueError, match="divide"):
        pca.posterior(pictures[:, :, :30])


@pytest.mark.parametrize("how", ["none", "scale", "channel"])
def test_latent_norm(pictures, how, tmp_path):
    """channel: mean 0 and std 1 in each channel. scale: one factor, mean square 1, no shift.

    to_pixels undoes both, and so does a folder that is read back.
    """
    space = LatentSpace(PatchPCA(3, 4, 6).fit(pictures))
    plain = space.to_latents(pictures)
    space.measure_norm([space.own_moments(x) for x in pictures.split(25)], how)
    z = space.to_latents(pictures)
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    if how == "channel":
        assert mean.abs().max() < 1e-4 and (std - 1).abs().max() < 1e-3
    elif how == "scale":
        factor = plain / z
        assert float(z.square().mean()) == pytest.approx(1, rel=1e-4)
        assert (factor / factor.median() - 1).abs().max() < 1e-3
    else:
        assert torch.equal(z, plain) and space.mean is None
    decoded = space.autoencoder.decode(plain)
    torch.testing.assert_close(space.to_pixels(z), decoded, atol=1e-4, rtol=1e-4)
    space.save(str(tmp_path / "run" / "autoencoder"))
    (tmp_path / "run" / "student").mkdir()
    again = space_beside(str(tmp_path / "run" / "student"))
    torch.testing.assert_close(again.to_latents(pictures), z)
    torch.testing.assert_close(again.to_pixels(z), space.to_pixels(z))
    assert space_beside(str(tmp_path / "nothing" / "student")) is None
    assert isinstance(load_space(str(tmp_path / "run" / "autoencoder")).autoencoder, PatchPCA)


def test_identity_space():
    space, x = LatentSpace(Identity(3)), normal(2, 3, 4, 4)
    assert space.trivial and space.factor == 1
    assert torch.equal(space.to_latents(x), x) and torch.equal(space.to_pixels(x), x)


def test_shape_of_the_pixels_of_a_latent():
    """For images through a PCA or a VAE, and for pixels, voxels and points themselves."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 4],
        norm_num_groups=4,
    )
    for autoencoder, latent, pixels in (
        (PatchPCA(3, 4, 12), (12, 8, 8), (3, 32, 32)),
        (vae, (4, 6, 8), (3, 12, 16)),
        (Identity(1), (1, 16, 16, 16), (1, 16, 16, 16)),
        (Identity(2), (2,), (2,)),
    ):
        space = LatentSpace(autoencoder)
        assert space.pixel_shape(latent) == pixels
        assert space.to_pixels(torch.zeros(1, *latent)).shape[1:] == pixels


def test_posterior_is_sampled():
    """z = (mean + sd noise) normalised, through scale, shift and our own mean and std."""

    class Noisy(Identity):
        def posterior(self, x):
            return 2 * x, torch.full_like(x, 2 * math.log(0.5))

        def normalise(self, latent):
            return (latent - 0.1) * 3

        def denormalise(self, latent):
            return latent / 3 + 0.1

        def decode(self, latent):
            return latent / 2

    space = LatentSpace(Noisy(1), torch.tensor([0.2]), torch.tensor([4.0]))
    x, noise = normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1)
    want = ((2 * x + 0.5 * noise - 0.1) * 3 - 0.2) / 4
    torch.testing.assert_close(space.to_latents(x, noise), want)
    torch.testing.assert_close(space.to_latents(x), ((2 * x - 0.1) * 3 - 0.2) / 4)
    torch.testing.assert_close(space.to_pixels(space.to_latents(x)), x)


def test_world_reads_its_own_latents():
    """The shipped space has latents of unit mean square.

    Measures and pictures of latents are those of the decoded pixels, and maps follow the shapes.
    """
    world = load_world("shapes")
    x, label, maps = world.scenes(60, 5)
    again = world.data(60, 5)
    assert torch.equal(again[0], x) and torch.equal(again[1], label)
    z = world.space.to_latents(x)
    assert tuple(z.shape[1:]) == world.latent_shape
    assert float(z.square().mean()) == pytest.approx(1, abs=0.1)
    decoded = world.space.to_pixels(z)
    torch.testing.assert_close(world.look(z)[0], world.look(decoded)[0])
    assert np.array_equal(world.picture(z), world.picture(decoded))
    assert not np.array_equal(world.picture(z), world.picture(x))
    assert set(maps.unique().tolist()) == set(range(7))
    for m, k in zip(maps, label):
        assert set(m.unique().tolist()) == {0, int(k) + 1}
    found = world.foreground(x)
    assert float(overlap(found, maps > 0).mean()) > 0.9
    assert float(overlap(found, (maps > 0).roll(1, 0)).mean()) < 0.6
    with pytest.raises(Exception, match="no teacher ships"):
        world.teacher_folder()


# ---- masks and maps ------------------------------------------------------------------------------


def test_masks():
    """Zeros and ones, never empty, of both kinds, in proportion to the side.

    A mask depends on its seed alone.
    """
    masks = draw_masks(64, range(60))
    assert masks.shape == (60, 1, 64, 64) and set(masks.unique().tolist()) == {0.0, 1.0}
    share = masks.mean((1, 2, 3))
    assert share.min() > 0 and 0.05 < share.mean() < 0.5 and share.max() < 0.95
    assert torch.equal(draw_masks(64, [7, 3])[1], masks[3])
    assert len({m.numpy().tobytes() for m in masks}) == 60
    large = np.mean([draw_mask(256, np.random.default_rng(s)).mean() for s in range(60)])
    assert large == pytest.approx(float(share.mean()), abs=0.08)


def test_inpainting_context(pictures):
    """Holes are black, so what is under them does not matter.

    The mask is -1 and 1 at latent size, and a cell is a hole if any of its pixels is one.
    """
    space, x = LatentSpace(PatchPCA(3, 4, 6).fit(pictures)), pictures[:3]
    mask = torch.zeros(3, 1, 32, 32)
    mask[0, 0, 5, 6] = 1  # a single pixel
    mask[1, 0, 8:20, 4:9] = 1  # a box
    c = latent_fm.inpainting_context(space, x, mask)
    assert c.shape == (3, 7, 8, 8) and set(c[:, 6].unique().tolist()) == {-1.0, 1.0}
    holes = c[:, 6] == 1
    assert holes[0].nonzero().tolist() == [[1, 1]]
    assert int(holes[1].sum()) == 3 * 2 and not holes[2].any()
    black = space.to_latents(torch.where(mask > 0, -1.0, x))
    torch.testing.assert_close(c[:, :6], black, atol=1e-5, rtol=1e-5)
    assert torch.equal(latent_fm.inpainting_context(space, torch.where(mask > 0, 0.9, x), mask), c)
    # without a hole: the image's own latents
    torch.testing.assert_close(c[2, :6], space.to_latents(x)[2], atol=1e-5, rtol=1e-5)


def test_composite_is_exact(pictures):
    """Known pixels are kept to the last bit, whatever the sample; holes show the sample.

    An empty mask returns the image.
    """
    made, mask = pictures.flip(0) * 1.3 + 0.01, draw_masks(32, range(60))
    out = latent_fm.composite(made, pictures, mask)
    hole = mask.expand_as(out) > 0
    assert torch.equal(out[~hole], pictures[~hole]) and torch.equal(out[hole], made[hole])
    empty = torch.zeros_like(mask)
    assert torch.equal(latent_fm.composite(made * torch.nan, pictures, empty), pictures)


def test_semantic_context():
    """The share of each class in each cell is three bilinear halvings of the one-hot map.

    255 counts for no class.
    """
    g = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 4, (3, 32, 32), generator=g).to(torch.uint8)
    c = latent_fm.semantic_context(maps, 4, 8)
    h = F.one_hot(maps.long(), 4).movedim(-1, 1).float()
    for _ in range(3):
        h = F.interpolate(h, scale_factor=0.5, mode="bilinear")
    torch.testing.assert_close(c, h)
    torch.testing.assert_close(c.sum(1), torch.ones(3, 4, 4))
    maps[0] = 255
    assert not latent_fm.semantic_context(maps, 4, 8)[0].any()


def test_projection_is_trained():
    """The 1x1 convolution of maps has a gradient (the official code's has none) and is saved.

    Averaging before it is the same as after it.
    """
    net = perturbed(small_dit(**FIELD, context_channels=4, context_width=2))
    x0, eps = normal(5, 2, 6, 6).float(), normal(5, 2, 6, 6, seed=1).float()
    t, c = torch.linspace(0.1, 0.9, 5), torch.rand(5, 4, 6, 6)
    flow_matching_loss(net, x0, eps, t, {"context": c})[0].backward()
    assert net.project.weight.grad.abs().max() > 1e-6
    assert "project.weight" in net.state_dict() and net.project.weight.shape == (2, 4, 1, 1)
    fine = torch.rand(2, 4, 12, 12)
    before, after = net.project(F.avg_pool2d(fine, 2)), F.avg_pool2d(net.project(fine), 2)
    torch.testing.assert_close(before, after)


def test_network_sees_its_context():
    """It changes the velocity.

    A call without it, or with another shape, is refused in one line, and so is a context that a
    network does not take.
    """
    net = perturbed(small_dit(**FIELD, context_channels=3))
    x, t = normal(2, 2, 6, 6).float(), torch.tensor([0.3, 0.8])
    c = normal(2, 3, 6, 6, seed=1).float()
    with torch.no_grad():
        v = net(x, t, context=c)
        assert v.shape == x.shape and not torch.allclose(v, net(x, t, context=c.flip(0)))
    for wrong in (None, c[:, :2], c[:1]):
        with pytest.raises(ValueError, match="takes context of shape"):
            net(x, t, context=wrong)
    with pytest.raises(ValueError, match="takes no context"):
        small_dit(**FIELD)(x, t, context=c)
    assert net.cond_names == ("label", "context") and type(net)(**net.config).context_channels == 3


@pytest.mark.parametrize("scale", [1.0, 1000.0, 30.0])
def test_t_scale(scale):
    """t_scale s at time t is the usual network at time t s / 1000.

    1000, the usual value, leaves no trace in the config.
    """
    net = perturbed(small_dit(t_scale=scale))
    usual = small_dit()
    usual.load_state_dict(net.state_dict())
    x, t, label = normal(3, 2, 6, 4).float(), torch.tensor([0.2, 0.5, 1.0]), torch.arange(3)
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, label), usual(x, t * scale / 1000, label))
    assert ("t_scale" in net.config) == (scale != 1000) and type(net)(**net.config).t_scale == scale
