"""latent_fm.py where the answer is known: Gaussian and mixture data, the solvers' orders, guidance, autoencoders, masks and maps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import perturbed, small_dit

import latent_fm
from latent_fm import dormand_prince, flow_matching_loss, sample
from models.diffusion import from_x0_eps, guide, to_x0_eps
from models.networks.autoencoders import Identity, PatchPCA
from models.networks.latent_space import LatentSpace, load_space, space_beside
from models.worlds import load_world
from models.worlds.masks import draw_mask, draw_masks
from models.worlds.shapes import Shapes, overlap


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Gaussian:
    """Exact velocity of data N(m, s^2) in every dimension, in the shape of a network."""

    num_classes = 0

    def __init__(self, m, s):
        self.m, self.s = m, s

    def __call__(self, z, t, label=None):
        t = t.reshape(-1, *[1] * (z.dim() - 1)) if torch.is_tensor(t) else t
        S = (1 - t) ** 2 * self.s**2 + t**2
        return -self.m + (t - (1 - t) * self.s**2) / S * (z - (1 - t) * self.m)


class Mixture:
    """Exact velocity of a 1-D mixture of Gaussians; class k is component k, the null label K all of them."""

    means, stds, weights = (
        torch.tensor(v, dtype=torch.float64)
        for v in ([-1.5, 0.2, 1.4], [0.4, 0.25, 0.5], [0.3, 0.5, 0.2])
    )
    num_classes = 3

    def log_parts(self, z, t):
        """log of w_k N(z; (1 - t) m_k, S_k).  z (n, 1), t (n,) -> (n, 3)."""
        t = t[:, None]
        S = (1 - t) ** 2 * self.stds**2 + t**2
        return self.weights.log() - (z - (1 - t) * self.means) ** 2 / (2 * S) - S.log() / 2

    def __call__(self, z, t, label=None):
        parts = self.log_parts(z, t)
        if label is not None:
            parts = parts.masked_fill(
                (torch.arange(3) != label[:, None]) & (label[:, None] < 3), -torch.inf
            )
        t = t[:, None]
        S = (1 - t) ** 2 * self.stds**2 + t**2
        return (
            parts.softmax(1)
            * (-self.means + (t - (1 - t) * self.stds**2) / S * (z - (1 - t) * self.means))
        ).sum(1, keepdim=True)


# ---- the loss and its optimum ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("m, s", [(0.0, 1.0), (0.5, 0.6)])
def test_loss_floor_is_pi_s_over_2(m, s):
    """The exact velocity of N(m, s^2) has loss pi s / 2, the integral of s^2 / S_t; a zero network pays 1 + m^2 + s^2; an error e adds e^2."""
    n = 400000
    x0, eps, t = (
        m + s * normal(n, 1),
        normal(n, 1, seed=1),
        torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
    )
    exact = Gaussian(m, s)
    loss = lambda net: float(flow_matching_loss(net, x0.float(), eps.float(), t.float(), {})[0])  # noqa: E731
    floor = loss(lambda x, t: exact(x, t))
    assert floor == pytest.approx(math.pi * s / 2, rel=0.01)
    assert loss(lambda x, t: 0 * x) == pytest.approx(1 + m**2 + s**2, rel=0.01)
    for e in (0.2, -0.3):
        assert loss(lambda x, t: exact(x, t) + e) - floor == pytest.approx(e**2, abs=4e-3)


@pytest.mark.parametrize("s", [0.0, 1e-5, 0.3])
def test_sigma_min_path(s):
    """x_t ends at the noise itself, starts at x0 + s eps, and the target is its slope; s = 0 is the paper's path to the bit."""
    x0, eps, seen = normal(4, 3), normal(4, 3, seed=1), []

    def net(x, t):
        seen.append(x)
        return torch.zeros_like(x)

    target = [
        flow_matching_loss(net, x0, eps, torch.full((4,), t, dtype=torch.float64), {}, s)[1]
        for t in (0.0, 1.0, 0.4, 0.4 + 1e-6)
    ]
    torch.testing.assert_close(seen[0], x0 + s * eps)
    torch.testing.assert_close(seen[1], eps)
    slope = (seen[3] - seen[2]) / 1e-6
    torch.testing.assert_close(target[2], slope.square().mean(1), rtol=1e-5, atol=1e-5)
    if s == 0:
        paper = []
        flow_matching_loss(
            lambda x, t: paper.append(x) or x,
            x0,
            eps,
            torch.full((4,), 0.4, dtype=torch.float64),
            {},
        )
        assert torch.equal(paper[0], seen[2]) and torch.equal(
            paper[0], 0.6 * x0 + torch.tensor(0.4, dtype=torch.float64) * eps
        )


@pytest.mark.parametrize("label", [None, 1])
def test_mixture_velocity_is_that_of_its_score(label):
    """v = -(z + t score) / (1 - t), the score by autograd of the mixture's density: the fixture is right, with labels too."""
    net, z, t = (
        Mixture(),
        normal(9, 1).requires_grad_(True),
        torch.linspace(0.05, 0.95, 9, dtype=torch.float64),
    )
    parts = net.log_parts(z, t)
    log_p = parts.logsumexp(1) if label is None else parts[:, label]
    (score,) = torch.autograd.grad(log_p.sum(), z)
    v = net(z, t, None if label is None else torch.full((9,), label)).detach()
    torch.testing.assert_close(v, -(z.detach() + t[:, None] * score) / (1 - t[:, None]))


def test_zero_initialised_network_pays_the_noise():
    """A new DiT says exactly 0, with context too, so its first loss is mean (eps - x0)^2."""
    for context in ({}, dict(context_channels=3, context_width=2), dict(context_channels=3)):
        net = small_dit(size=(6, 6), patch=(3, 3), **context)
        x0, eps, t = (
            normal(8, 2, 6, 6).float(),
            normal(8, 2, 6, 6, seed=1).float(),
            torch.linspace(0, 1, 8),
        )
        cond = {"context": normal(8, 3, 6, 6, seed=2).float()} if context else {}
        assert not net(x0, t, **cond).any()
        assert float(flow_matching_loss(net, x0, eps, t, cond)[0].detach()) == pytest.approx(
            float((eps - x0).square().mean())
        )


# ---- solvers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_one_euler_step_is_the_mean(solver):
    """From t = 1 one step returns E[x0] whatever the noise (Heun's only step is Euler); a point is reached exactly with any number of steps;
    two steps do not reach a Gaussian's exact map m + s z1: the paths are curved."""
    z = normal(50, 2) * 2
    assert (sample(Gaussian(0.7, 0.4), z, None, 1, solver=solver) - 0.7).abs().max() < 1e-12
    mix = Mixture()
    mean = float((mix.weights * mix.means).sum())
    assert (sample(mix, z[:, :1], torch.full((50,), 3), 1, 1.0, solver) - mean).abs().max() < 1e-12
    point = Gaussian(0.7, 1e-9)
    for n in (2, 7):
        assert (sample(point, z, None, n, solver="euler") - 0.7).abs().max() < 1e-7
    assert (
        sample(Gaussian(0.7, 0.4), z, None, 2, solver="euler") - (0.7 + 0.4 * z)
    ).abs().max() > 0.05


def test_dopri5_reaches_the_closed_form():
    """z0 = m + s z1 within the tolerance; the calls counted are the calls made, 2 and 6 a step tried; tighter costs more and errs less."""
    z, errors, counts = normal(20, 2), [], []
    for tol in (1e-3, 1e-5, 1e-8):
        net, seen, calls = Gaussian(0.7, 0.3), [], []
        field = lambda z, t, label=None: seen.append(0) or net(z, t)  # noqa: E731, B023
        field.num_classes = 0
        x = sample(field, z, None, solver="dopri5", atol=tol, rtol=tol, calls=calls)
        errors.append(float((x - (0.7 + 0.3 * z)).abs().max())), counts.append(calls[0])
        assert calls[0] == len(seen) and (calls[0] - 2) % 6 == 0
        assert errors[-1] < 10 * tol
    assert errors == sorted(errors, reverse=True) and counts == sorted(counts)
    forth = dormand_prince(
        lambda z, t: Gaussian(0.7, 0.3)(z, t), x, 1e-8, 1e-8, start=0.0, end=1.0
    )[0]
    assert (forth - z).abs().max() < 1e-6  # and back


def test_dopri5_stops_where_float32_cannot_follow():
    with pytest.raises(ValueError, match="raise atol"):
        dormand_prince(
            lambda z, t: Gaussian(0.7, 0.3)(z, t) + 1e-3 * torch.randn_like(z),
            normal(20, 2).float(),
            1e-12,
            1e-12,
        )
    with pytest.raises(ValueError, match="not finite"):
        dormand_prince(lambda z, t: z / (t > 0.5), normal(20, 2))


def fixed_step(f, x, t, h):
    """One Dormand-Prince step from its table -> the solution of order 5, the difference of the two solutions."""
    k = [f(x, t)]
    for node, weights in zip(latent_fm.NODES, latent_fm.STAGES):
        last = x + h * sum(w * k_i for w, k_i in zip(weights, k))
        k.append(f(last, t + node * h))
    return last, h * sum(w * k_i for w, k_i in zip(latent_fm.DIFFERENCE, k))


def test_orders():
    """On the mixture, halving the step: Euler gains 2, Heun 4, Dormand-Prince's two solutions 2^5 and 2^4 (local errors 2^6, 2^5)."""
    assert [sum(w) for w in latent_fm.STAGES] == pytest.approx(
        list(latent_fm.NODES), abs=1e-14
    ) and abs(sum(latent_fm.DIFFERENCE)) < 1e-15
    net, z, null = Mixture(), normal(40, 1), torch.full((40,), 3)
    field = lambda x, t: net(x, torch.full((len(x),), t, dtype=torch.float64), null[: len(x)])  # noqa: E731
    exact, _ = dormand_prince(field, z, 1e-11, 1e-11)
    for solver, order, ns in (("euler", 1, (64, 128)), ("heun", 2, (32, 64))):
        a, b = ((sample(net, z, null, n, 1.0, solver) - exact).square().mean().sqrt() for n in ns)
        assert math.log2(a / b) == pytest.approx(order, abs=0.15), solver
    local, difference = [], []
    for h in (-0.04, -0.02):
        x, d = fixed_step(field, z, 0.5, h)
        (
            local.append(
                (x - dormand_prince(field, z, 1e-13, 1e-13, 0.5, 0.5 + h)[0]).square().mean().sqrt()
            ),
            difference.append(d.square().mean().sqrt()),
        )
    assert math.log2(local[0] / local[1]) == pytest.approx(6, abs=0.5) and math.log2(
        difference[0] / difference[1]
    ) == pytest.approx(5, abs=0.4)
    x = z
    for i in range(8):
        x = fixed_step(field, x, 1 - i / 8, -1 / 8)[0]
    y = z
    for i in range(16):
        y = fixed_step(field, y, 1 - i / 16, -1 / 16)[0]
    assert (
        3.8
        < math.log2((x - exact).square().mean().sqrt() / (y - exact).square().mean().sqrt())
        < 6.5
    )


def test_direction():
    """t = 1 is noise. The field of the other convention (data at 1), v'(z, t) = -v(z, 1 - t), integrated in its own direction gives the same sample;
    handed to our sampler as it is, it does not."""
    net, z = Gaussian(0.7, 0.3), normal(30, 2)
    other = lambda z, t, label=None: -net(z, 1 - t)  # noqa: E731
    other.num_classes = 0
    forth, _ = dormand_prince(lambda z, t: other(z, t), z, 1e-8, 1e-8, start=0.0, end=1.0)
    assert (forth - (0.7 + 0.3 * z)).abs().max() < 1e-6
    assert (sample(other, z, None, 16) - (0.7 + 0.3 * z)).abs().max() > 0.5


# ---- guidance ----------------------------------------------------------------------------------------------------------


def test_guidance_identities():
    """gamma 1 and 0 are the two fields to the bit, for one call; guiding v, eps, x0 or the score is the same; v_c - v_u = -t / (1 - t) grad log p(c | z)."""
    net, z, t, label = (
        Mixture(),
        normal(9, 1).requires_grad_(True),
        torch.linspace(0.05, 0.95, 9, dtype=torch.float64),
        torch.arange(9) % 3,
    )
    v_c, v_u = (net(z.detach(), t, k) for k in (label, torch.full((9,), 3)))
    for gamma, want in ((1, v_c), (0, v_u)):
        sizes = []
        counted = lambda x, t, label: sizes.append(len(x)) or net(x, t, label)  # noqa: E731, B023
        assert torch.equal(
            latent_fm.guided_velocity(counted, z.detach(), t, label, 3, gamma), want
        ) and sizes == [9]
    guided = latent_fm.guided_velocity(net, z.detach(), t, label, 3, 2.5)
    torch.testing.assert_close(guided, v_u + 2.5 * (v_c - v_u))
    for kind in ("x0", "eps", "score", "vp_v"):
        c, u = (
            from_x0_eps(kind, *to_x0_eps(v, "flow_v", z.detach(), 1 - t, t), 1 - t, t)
            for v in (v_c, v_u)
        )
        back = from_x0_eps(
            "flow_v", *to_x0_eps(guide(c, u, 2.5), kind, z.detach(), 1 - t, t), 1 - t, t
        )
        torch.testing.assert_close(back, guided, rtol=1e-8, atol=1e-8)
    log_posterior = net.log_parts(z, t).log_softmax(1)[torch.arange(9), label]
    (slope,) = torch.autograd.grad(log_posterior.sum(), z)
    torch.testing.assert_close(v_c - v_u, -(t / (1 - t))[:, None] * slope)


def test_conversions_by_hand():
    """x0 = z - t v, eps = z + (1 - t) v, score = -eps / t: the formulas of this path, and back."""
    z, v, t = normal(9, 4), normal(9, 4, seed=1), torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    x0, eps = to_x0_eps(v, "flow_v", z, 1 - t, t)
    (
        torch.testing.assert_close(x0, z - t[:, None] * v),
        torch.testing.assert_close(eps, z + (1 - t[:, None]) * v),
    )
    score = from_x0_eps("score", x0, eps, 1 - t, t)
    torch.testing.assert_close(-(z + t[:, None] * score) / (1 - t[:, None]), v)


def test_guidance_has_an_interior_optimum():
    """W2^2 to p(x0 | c) in closed form: 0 at gamma = 1 with the exact field, growing to both sides, while the spread shrinks as gamma grows."""
    net, level = Mixture(), (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    z, label = torch.special.ndtri(level)[:, None], torch.full((200,), 1)
    want = net.means[1] + net.stds[1] * z
    w2, std = {}, {}
    for gamma in (0.0, 0.5, 1.0, 1.5, 2.0, 4.0):
        x = sample(net, z, label, 64, gamma).sort(0).values
        w2[gamma], std[gamma] = float((x - want).square().mean()), float(x.std())
    assert (
        w2[1.0] < 1e-3
        and w2[0.0] > w2[0.5] > 10 * w2[1.0]
        and w2[4.0] > w2[2.0] > w2[1.5] > 2 * w2[1.0]
    )
    assert list(std.values()) == sorted(std.values(), reverse=True)


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_guidance_interval(solver):
    """Guided only within the interval: none at all and everywhere are the plain and the guided sampler; one call where off, twice the batch where on."""
    net, z, label, sizes = Mixture(), normal(10, 1), torch.arange(10) % 3, []

    def field(x, t, label=None):
        sizes.append((len(x), float(t[0])))
        return net(x, t, label)

    field.num_classes = 3
    run = lambda scale, interval: sample(field, z, label, 8, scale, solver, interval=interval)  # noqa: E731
    assert torch.equal(run(3.0, (0.0, 1.0)), run(3.0, [0, 1])) and not torch.equal(
        run(3.0, (0.0, 1.0)), run(1.0, (0.0, 1.0))
    )
    torch.testing.assert_close(run(3.0, (0.3, 0.3001)), run(1.0, (0.0, 1.0)), rtol=1e-3, atol=1e-3)
    sizes.clear()
    run(3.0, (0.2, 0.7))
    assert (
        all(n == (20 if 0.2 <= t <= 0.7 else 10) for n, t in sizes)
        and len({n for n, _ in sizes}) == 2
    )


def test_sampling_never_drops_labels():
    """Dropout belongs to training: a train-mode network is asked for the labels given, and the null label is index K."""
    net, asked = perturbed(small_dit()), []
    net.train().register_forward_hook(
        lambda m, args, kwargs, out: asked.append(kwargs["label"]), with_kwargs=True
    )
    label = torch.tensor([0, 1, 2])
    sample(net, normal(3, 2, 6, 4).float(), label, 3, 2.0)
    assert (
        all(torch.equal(a, torch.cat([label, torch.full((3,), 3)])) for a in asked)
        and len(asked) == 5
    )


# ---- autoencoders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    return Shapes().data(60, 3)[0]


def test_patch_pca_identities(pictures):
    """Orthonormal rows; encoding a decoded latent changes nothing; the error is what the discarded eigenvalues say and less than of any other rows."""
    pca = PatchPCA(3, 4, 6).fit(pictures)
    torch.testing.assert_close(pca.rows @ pca.rows.T, torch.eye(6), atol=1e-5, rtol=0)
    z, logvar = pca.posterior(pictures)
    assert z.shape == (60, 6, 8, 8) and (logvar == -30).all()
    free = normal(3, 6, 8, 8).float()
    torch.testing.assert_close(pca.posterior(pca.decode(free))[0], free, atol=1e-5, rtol=1e-5)
    back = pca.decode(z)
    torch.testing.assert_close(pca.decode(pca.posterior(back)[0]), back, atol=1e-5, rtol=1e-5)
    error = float((back - pictures).square().sum() / (60 * 64))  # of a patch
    assert error == pytest.approx(float(pca.variances[6:].sum()), rel=1e-3)
    assert (
        z.transpose(0, 1).flatten(1).var(1) - pca.variances[:6]
    ).abs().max() < 0.01 * pca.variances[0]
    other = PatchPCA(3, 4, 6).fit(pictures)
    other.rows.copy_(torch.linalg.qr(normal(48, 6).float())[0].T)
    assert (
        float((other.decode(other.posterior(pictures)[0]) - pictures).square().sum() / (60 * 64))
        > error
    )
    with pytest.raises(ValueError, match="1 to 48 components"):
        PatchPCA(3, 4, 49)
    with pytest.raises(ValueError, match="divide"):
        pca.posterior(pictures[:, :, :30])


@pytest.mark.parametrize("how", ["none", "scale", "channel"])
def test_latent_norm(pictures, how, tmp_path):
    """channel: mean 0 and std 1 in each; scale: one factor, mean square 1, no shift; both undone by to_pixels and by a folder read back."""
    space = LatentSpace(PatchPCA(3, 4, 6).fit(pictures))
    plain = space.to_latents(pictures)
    z = space.measure_norm([space.own_moments(x) for x in pictures.split(25)], how).to_latents(
        pictures
    )
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    if how == "channel":
        assert mean.abs().max() < 1e-4 and (std - 1).abs().max() < 1e-3
    elif how == "scale":
        assert (
            float(z.square().mean()) == pytest.approx(1, rel=1e-4)
            and ((plain / z) / (plain / z).median() - 1).abs().max() < 1e-3
        )
    else:
        assert torch.equal(z, plain) and space.mean is None
    torch.testing.assert_close(
        space.to_pixels(z), space.autoencoder.decode(plain), atol=1e-4, rtol=1e-4
    )
    space.save(str(tmp_path / "run" / "autoencoder"))
    (tmp_path / "run" / "student").mkdir()
    again = space_beside(str(tmp_path / "run" / "student"))
    (
        torch.testing.assert_close(again.to_latents(pictures), z),
        torch.testing.assert_close(again.to_pixels(z), space.to_pixels(z)),
    )
    assert space_beside(str(tmp_path / "nothing" / "student")) is None
    assert isinstance(load_space(str(tmp_path / "run" / "autoencoder")).autoencoder, PatchPCA)


def test_identity_space():
    space, x = LatentSpace(Identity(3)), normal(2, 3, 4, 4)
    assert (
        space.trivial
        and torch.equal(space.to_latents(x), x)
        and torch.equal(space.to_pixels(x), x)
        and space.factor == 1
    )


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
    torch.testing.assert_close(
        space.to_latents(x, noise), ((2 * x + 0.5 * noise - 0.1) * 3 - 0.2) / 4
    )
    torch.testing.assert_close(space.to_latents(x), ((2 * x - 0.1) * 3 - 0.2) / 4)
    torch.testing.assert_close(space.to_pixels(space.to_latents(x)), x)


def test_world_reads_its_own_latents():
    """The shipped space: latents of unit mean square; measures and pictures of latents are those of the decoded pixels; maps follow the shapes."""
    world = load_world("shapes")
    x, label, maps = world.scenes(60, 5)
    again = world.data(60, 5)
    assert torch.equal(again[0], x) and torch.equal(again[1], label)
    z = world.space.to_latents(x)
    assert tuple(z.shape[1:]) == world.latent_shape and float(z.square().mean()) == pytest.approx(
        1, abs=0.1
    )
    torch.testing.assert_close(world.look(z)[0], world.look(world.space.to_pixels(z))[0])
    assert np.array_equal(
        world.picture(z), world.picture(world.space.to_pixels(z))
    ) and not np.array_equal(world.picture(z), world.picture(x))
    assert set(maps.unique().tolist()) == set(range(7))
    for m, k in zip(maps, label):
        assert set(m.unique().tolist()) == {0, int(k) + 1}
    iou = overlap(world.foreground(x), maps > 0)
    assert (
        float(iou.mean()) > 0.9
        and float(overlap(world.foreground(x), (maps > 0).roll(1, 0)).mean()) < 0.6
    )
    with pytest.raises(Exception, match="no teacher ships"):
        world.teacher_folder()


# ---- masks and maps ------------------------------------------------------------------------------------------------------


def test_masks():
    """Zeros and ones, never empty, both kinds, the same for the same seed alone, in proportion to the side."""
    masks = draw_masks(64, range(60))
    assert masks.shape == (60, 1, 64, 64) and set(masks.unique().tolist()) == {0.0, 1.0}
    share = masks.mean((1, 2, 3))
    assert share.min() > 0 and 0.05 < share.mean() < 0.5 and share.max() < 0.95
    assert (
        torch.equal(draw_masks(64, [7, 3])[1], masks[3])
        and len({m.numpy().tobytes() for m in masks}) == 60
    )
    large = np.mean([draw_mask(256, np.random.default_rng(s)).mean() for s in range(60)])
    assert large == pytest.approx(float(share.mean()), abs=0.08)


def test_inpainting_context(pictures):
    """Black holes: what is under them does not matter; the mask is -1 and 1 at latent size, a cell counts if any pixel is a hole."""
    space, x = LatentSpace(PatchPCA(3, 4, 6).fit(pictures)), pictures[:3]
    mask = torch.zeros(3, 1, 32, 32)
    mask[0, 0, 5, 6], mask[1, 0, 8:20, 4:9] = 1, 1  # a single pixel; a box
    c = latent_fm.inpainting_context(space, x, mask)
    assert c.shape == (3, 7, 8, 8) and set(c[:, 6].unique().tolist()) == {-1.0, 1.0}
    assert (
        (c[0, 6] == 1).nonzero().tolist() == [[1, 1]]
        and int((c[1, 6] == 1).sum()) == 3 * 2
        and not (c[2, 6] == 1).any()
    )
    torch.testing.assert_close(
        c[:, :6], space.to_latents(torch.where(mask > 0, -1.0, x)), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(latent_fm.inpainting_context(space, torch.where(mask > 0, 0.9, x), mask), c)
    torch.testing.assert_close(
        c[2, :6], space.to_latents(x)[2], atol=1e-5, rtol=1e-5
    )  # no hole: the image's own latents


def test_composite_is_exact(pictures):
    """Known pixels to the bit, whatever the sample; the sample in the holes; an empty mask returns the image."""
    made, mask = pictures.flip(0) * 1.3 + 0.01, draw_masks(32, range(60))
    out = latent_fm.composite(made, pictures, mask)
    hole = mask.expand_as(out) > 0
    assert torch.equal(out[~hole], pictures[~hole]) and torch.equal(out[hole], made[hole])
    assert torch.equal(
        latent_fm.composite(made * torch.nan, pictures, torch.zeros_like(mask)), pictures
    )


def test_semantic_context():
    """The share of each class in each cell, which is three bilinear halvings of the one-hot map; 255 counts for no class."""
    maps = torch.randint(0, 4, (3, 32, 32), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    c = latent_fm.semantic_context(maps, 4, 8)
    h = F.one_hot(maps.long(), 4).movedim(-1, 1).float()
    for _ in range(3):
        h = F.interpolate(h, scale_factor=0.5, mode="bilinear")
    torch.testing.assert_close(c, h)
    torch.testing.assert_close(c.sum(1), torch.ones(3, 4, 4))
    maps[0] = 255
    assert not latent_fm.semantic_context(maps, 4, 8)[0].any()


def test_projection_is_trained():
    """The 1x1 convolution of maps has a gradient (the official code's has none) and is in the weights that are saved; averaging before it is
    the same as after."""
    net = perturbed(small_dit(size=(6, 6), patch=(3, 3), context_channels=4, context_width=2))
    x0, eps, t, c = (
        normal(5, 2, 6, 6).float(),
        normal(5, 2, 6, 6, seed=1).float(),
        torch.linspace(0.1, 0.9, 5),
        torch.rand(5, 4, 6, 6),
    )
    flow_matching_loss(net, x0, eps, t, {"context": c})[0].backward()
    assert (
        net.project.weight.grad.abs().max() > 1e-6
        and "project.weight" in net.state_dict()
        and net.project.weight.shape == (2, 4, 1, 1)
    )
    fine = torch.rand(2, 4, 12, 12)
    torch.testing.assert_close(
        net.project(F.avg_pool2d(fine, 2)), F.avg_pool2d(net.project(fine), 2)
    )


def test_network_sees_its_context():
    """It changes the velocity, at its place alone in what is embedded; one without, or with another shape, is refused in one line."""
    net = perturbed(small_dit(size=(6, 6), patch=(3, 3), context_channels=3))
    x, t, c = (
        normal(2, 2, 6, 6).float(),
        torch.tensor([0.3, 0.8]),
        normal(2, 3, 6, 6, seed=1).float(),
    )
    with torch.no_grad():
        assert net(x, t, context=c).shape == x.shape and not torch.allclose(
            net(x, t, context=c), net(x, t, context=c.flip(0))
        )
    for wrong in (None, c[:, :2], c[:1]):
        with pytest.raises(ValueError, match="takes context of shape"):
            net(x, t, context=wrong)
    with pytest.raises(ValueError, match="takes no context"):
        small_dit(size=(6, 6), patch=(3, 3))(x, t, context=c)
    assert net.cond_names == ("label", "context") and type(net)(**net.config).context_channels == 3


@pytest.mark.parametrize("scale", [1.0, 1000.0, 30.0])
def test_t_scale(scale):
    """t_scale s at time t is the usual network at time t s / 1000; 1000 leaves no trace in the config."""
    net = perturbed(small_dit(t_scale=scale))
    usual = small_dit()
    usual.load_state_dict(net.state_dict())
    x, t, label = normal(3, 2, 6, 4).float(), torch.tensor([0.2, 0.5, 1.0]), torch.arange(3)
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, label), usual(x, t * scale / 1000, label))
    assert ("t_scale" in net.config) == (scale != 1000) and type(net)(**net.config).t_scale == scale
