"""decoupled_dmd.py against the paper's formulas (2511.22677 v1): the two terms and their sum, what each of them does, their noise levels, Eq. 7, the sampler."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import perturbed, ring_network
from test_dmd_math import (
    DoubleOutput,
    close,
    has_gradient,
    normal,
    posterior_mean,
    small_dit,
    unit_nodes,
)

import decoupled_dmd
import dmd
from decoupled_dmd import (
    decoupled_gradients,
    distribution_matching_loss,
    fake_score_loss,
    mean_variance_loss,
    noise_ranges,
    rollout,
    sample,
)
from models.diffusion import (
    VP,
    Flow,
    add_noise,
    guide,
    guided_x0,
    predict_x0,
    predict_x0_eps,
    sample_ode,
    shift,
    step_grid,
    to_x0_eps,
    unshift,
)
from models.draws import Draws
from models.worlds.ring import RingTeacher

NULL = 4  # the ring's null label
SCALES = (0.0, 1.0, 1.5, 3.0, 8.0)
NORMALIZERS = ("none", "shared", "branch")
FOUR = ("shared", "full", "constrained", "hybrid")

flow_and_vp = pytest.mark.parametrize("schedule", [Flow(), VP()], ids=["flow", "vp"])


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def mean_error(x, x0):
    """mean |x - x0| per sample, ready to divide by.  (B, ...) -> (B, 1, ...)."""
    return (x - x0).abs().mean(tuple(range(1, x.dim())), keepdim=True)


def overlapping(**changes):
    """A ring whose classes overlap, so that log p(c | x) is not flat."""
    return RingTeacher(**{**dict(std=0.45), **changes})


def oracle(ring, schedule):
    """The ring's exact network under any schedule; predicts x0."""
    return lambda x_t, t, label=None: ring.posterior(
        x_t, schedule.alpha(t), schedule.sigma(t), label
    )[1]


def log_p(ring, schedule, x_t, t, label=None):
    """log p_t(x_t | label), (B,); without a label log p_t(x_t)."""
    return ring.posterior(x_t, schedule.alpha(t), schedule.sigma(t), label)[0]


def log_p_class(ring, schedule, x_t, t, label):
    """log p_t(label | x_t) by Bayes with equal priors, up to their constant.  (B,)."""
    return log_p(ring, schedule, x_t, t, label) - log_p(ring, schedule, x_t, t)


def gradient(function, x):
    """d sum(function(x)) / dx, of a function that treats each row by itself."""
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(function(x).sum(), x)[0]


# ---- Eq. 6: the two terms and their sum ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 5), (4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_terms_add_up_to_dmd_s_gradient(scale, shape):
    """-Delta_DM = fake - cond, -Delta_CA = (alpha - 1) (uncond - cond); at one level their sum is fake - guided, and over DMD's normaliser
    it is dmd.py's gradient with the guided teacher, for any numbers and any alpha."""
    x, cond, uncond, fake = (normal(*shape, seed=k) for k in range(4))
    guided = guide(cond, uncond, scale)
    g_dm, g_ca = decoupled_gradients(x, cond, fake, cond, uncond, scale)
    close(g_dm, fake - cond, 1e-13), close(g_ca, (scale - 1) * (uncond - cond), 1e-13)
    close(g_dm + g_ca, fake - guided, 1e-12)
    shared = decoupled_gradients(x, cond, fake, cond, uncond, scale, "shared", guided)
    close(sum(shared), dmd.distribution_matching_gradient(x, guided, fake), 1e-12)
    (
        close(shared[0] * mean_error(x, guided), g_dm, 1e-12),
        close(shared[1] * mean_error(x, guided), g_ca, 1e-12),
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda c, u, f, a: (
            f - c,
            a * (u - c),
        ),  # the other convention of guidance, cond + w (cond - uncond)
        lambda c, u, f, a: (f - c, (a - 1) * (c - u)),
        lambda c, u, f, a: (f - guide(c, u, a), (a - 1) * (u - c)),  # guidance counted twice
        lambda c, u, f, a: (f - u, (a - 1) * (u - c)),
    ],
    ids=["alpha for alpha - 1", "sign", "guided in both", "unconditional DM"],
)
def test_decomposition_tells_wrong_variants(wrong):
    """The identity above is sharp: the usual mistakes violate it."""
    cond, uncond, fake = (normal(4, 3, 5, seed=k) for k in range(3))
    assert not torch.allclose(
        sum(wrong(cond, uncond, fake, 3.0)), fake - guide(cond, uncond, 3.0), rtol=1e-2
    )


def networks(which):
    """A teacher, a fake that differs from it, the null label and the kind of their prediction, all in float64."""
    if which == "ring":
        return RingTeacher(), perturbed(ring_network(), std=0.2).double(), NULL, "flow_v"
    return (
        small_dit(1, 2).double(),
        small_dit(2, 2).double(),
        3,
        {"flow dit": "flow_v", "vp dit": "eps"}[which],
    )


def draws(which, n=6):
    """-> x, eps (n, ...), t (n,), cond, uncond for these networks, float64."""
    shape, null = ((2,), NULL) if which == "ring" else ((1, 4, 4), 3)
    x, eps, t = (
        normal(n, *shape),
        normal(n, *shape, seed=1),
        torch.linspace(0.15, 0.9, n, dtype=torch.float64),
    )
    return x, eps, t, {"label": torch.arange(n) % null}, {"label": torch.full((n,), null)}


every_network = pytest.mark.parametrize("which", ["ring", "flow dit", "vp dit"])


@every_network
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_terms_add_up_through_networks(which, scale):
    """The same with the same draws through real networks: one level, one noise, the teacher called with and without condition."""
    teacher, fake, _, kind = networks(which)
    schedule = VP() if which == "vp dit" else Flow()
    x, eps, t, cond, uncond = draws(which)
    with torch.no_grad():
        x_t = add_noise(schedule, x, eps, t)
        x0_cond, x0_uncond = (
            predict_x0(teacher, schedule, kind, x_t, t, **c) for c in (cond, uncond)
        )
        x0_fake = predict_x0(fake, schedule, kind, x_t, t, **cond)
        x0_guided = guided_x0(teacher, schedule, kind, x_t, t, cond, uncond, scale)
    assert x0_guided.dtype == torch.float64 and not torch.allclose(x0_cond, x0_uncond)
    g_dm, g_ca = decoupled_gradients(
        x, x0_cond, x0_fake, x0_cond, x0_uncond, scale, "shared", x0_guided
    )
    close(g_dm + g_ca, dmd.distribution_matching_gradient(x, x0_guided, x0_fake), 1e-12)
    close(
        sum(decoupled_gradients(x, x0_cond, x0_fake, x0_cond, x0_uncond, scale)),
        x0_fake - x0_guided,
        1e-12,
    )
    assert bool(g_ca.any()) == (scale != 1)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_without_guidance_there_is_no_ca(normalizer):
    """alpha = 1: g_ca is zero whatever CA's level is, and what is left is DM."""
    x, real, fake, cond, uncond = (normal(4, 3, 5, seed=k) for k in range(5))
    g_dm, g_ca = decoupled_gradients(x, real, fake, cond, uncond, 1, normalizer, real)
    assert not g_ca.any()
    close(g_dm * (1 if normalizer == "none" else mean_error(x, real)), fake - real, 1e-12)


def test_sides_belong_to_their_own_levels():
    """With separate levels DM reads x0_real and x0_fake alone, CA x0_cond and x0_uncond alone, and CA grows as alpha - 1."""
    x, real, fake, cond, uncond, other = (normal(4, 3, 5, seed=k) for k in range(6))
    for normalizer in ("none", "branch"):
        g_dm, g_ca = decoupled_gradients(x, real, fake, cond, uncond, 3.0, normalizer)
        assert torch.equal(
            decoupled_gradients(x, real, fake, other, other, 5.0, normalizer)[0], g_dm
        )
        assert torch.equal(
            decoupled_gradients(x, other, other, cond, uncond, 3.0, normalizer)[1], g_ca
        )
        close(decoupled_gradients(x, real, fake, cond, uncond, 5.0, normalizer)[1], 2 * g_ca, 1e-12)


# ---- normalisers ---------------------------------------------------------------------------------------------------


def test_branch_divides_each_term_by_the_conditional_error_of_its_own_level():
    """g_dm over mean|x - x0_real|, g_ca over mean|x - x0_cond|, per sample; neither by the other's, the guided, the unconditional or x_t's."""
    x, real, fake, cond, uncond = (normal(4, 3, 5, seed=k) * (1 + k) for k in range(5))
    g_dm, g_ca = decoupled_gradients(x, real, fake, cond, uncond, 3.0, "branch")
    close(g_dm, (fake - real) / mean_error(x, real), 1e-12)
    close(g_ca, 2 * (uncond - cond) / mean_error(x, cond), 1e-12)
    for other in (cond, uncond, guide(cond, uncond, 3.0), fake):
        assert (
            (mean_error(x, other) / mean_error(x, real) - 1).abs() > 0.03
        ).all()  # so the above tells them apart


@pytest.mark.parametrize("normalizer", ["shared", "branch"])
def test_normalisers_are_per_sample(normalizer):
    """Blowing up sample 1 leaves the others bit-equal, also where they come without it; scaling x and all x0 of a sample leaves its gradients."""
    tensors = [normal(4, 3, 5, seed=k) for k in range(6)]

    def gradients(x, real, fake, cond, uncond, guided):
        return torch.stack(
            decoupled_gradients(x, real, fake, cond, uncond, 3.0, normalizer, guided)
        )

    others, moved = [0, 2, 3], tensors[0].clone()
    moved[1] *= 100
    kept = gradients(*tensors)
    assert torch.equal(gradients(moved, *tensors[1:])[:, others], kept[:, others])
    assert torch.equal(gradients(*(v[others] for v in tensors)), kept[:, others])
    k = times(0.01, 1, 7, 1000)[:, None, None]
    close(gradients(*(k * v for v in tensors)), kept, 1e-12)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradients_are_finite_constants(normalizer):
    """No graph whatever comes in, and a teacher that agrees with x exactly divides nothing by zero: no term, or a large finite one."""
    x = normal(3, 2).requires_grad_(True)
    for g in decoupled_gradients(x, 2 * x, 3 * x, 4 * x, 5 * x, 3.0, normalizer, 6 * x):
        assert not g.requires_grad and g.grad_fn is None
    x = x.detach()
    for fake in (x, x + 1):
        g_dm, g_ca = decoupled_gradients(x, x, fake, x, 2 * fake - x, 3.0, normalizer, x)
        assert g_dm.isfinite().all() and g_ca.isfinite().all()
        assert bool(g_dm.any()) == bool(g_ca.any()) == (fake is not x)


# ---- Alg. 1's loss, and where gradients go ---------------------------------------------------------------------------


def test_matching_loss_has_gradient_minus_delta_over_numel():
    """d/dx of the surrogate is g / numel, i.e. -Delta / numel; its value 0.5 mean g^2; dmd.py's, bit for bit. The usual mistakes differ."""

    def of(loss_function):
        leaf = x.clone().requires_grad_(True)
        loss = loss_function(leaf, g)
        return torch.autograd.grad(loss, leaf)[0], loss.detach()

    x, real, fake, cond, uncond = (normal(5, 3, 4, seed=k) for k in range(5))
    g = sum(decoupled_gradients(x, real, fake, cond, uncond, 3.0))
    delta = (real - fake) + 2 * (cond - uncond)  # the paper's, with alpha = 3
    got, value = of(distribution_matching_loss)
    close(got, -delta / x.numel(), 1e-12), close(value, 0.5 * delta.square().mean(), 1e-12)
    assert torch.equal(value, of(dmd.distribution_matching_loss)[1])
    for wrong in (
        lambda x, g: F.mse_loss(x, (x - g).detach()),
        lambda x, g: 0.5 * F.mse_loss(x, (x - g).detach(), reduction="sum"),
        lambda x, g: 0.5 * F.mse_loss(x, x - g),
        lambda x, g: 0.5 * F.mse_loss(x, (x + g).detach()),
    ):
        assert not torch.allclose(of(wrong)[0], -delta / x.numel(), rtol=1e-3)


@every_network
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradient_reaches_the_student_alone(which, normalizer):
    """Teacher and fake, with weights that could learn and graphs that are open, get none; the student's is its own vector-Jacobian product with g / numel."""
    teacher, fake, _, kind = networks(which)
    schedule = VP() if which == "vp dit" else Flow()
    if which == "ring":
        teacher = perturbed(ring_network(5), std=0.2).double()
    student = copy.deepcopy(fake)
    z, eps, t, cond, uncond = draws(which)
    one = torch.full_like(t, 0.8)
    x = predict_x0(student, schedule, kind, z, one, **cond)
    x_t = add_noise(schedule, x, eps, t)
    x0_cond, x0_uncond = (predict_x0(teacher, schedule, kind, x_t, t, **c) for c in (cond, uncond))
    x0_fake = predict_x0(fake, schedule, kind, x_t, t, **cond)
    assert x0_cond.requires_grad and x0_fake.requires_grad
    g_dm, g_ca = decoupled_gradients(
        x, x0_cond, x0_fake, x0_cond, x0_uncond, 3.0, normalizer, guide(x0_cond, x0_uncond, 3.0)
    )
    assert not g_dm.requires_grad and not g_ca.requires_grad
    distribution_matching_loss(x, g_dm + g_ca).backward()
    assert not has_gradient(teacher) and not has_gradient(fake)
    got = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    again = copy.deepcopy(fake)
    predict_x0(again, schedule, kind, z, one, **cond).backward((g_dm + g_ca) / x.numel())
    want = {n: p.grad for n, p in again.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys() and any(v.abs().max() > 1e-6 for v in got.values())
    for n in got:
        close(
            got[n], want[n], 1e-6 if "dit" in which else 1e-10
        )  # the DiT turns queries and keys in float32


@every_network
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_the_first_update_is_pure_ca(which, normalizer):
    """fake = deepcopy(teacher): g_dm is exactly 0 at any level, so the sum is g_ca, and DM alone moves nothing. A guided fake or real score would."""
    teacher, _, _, kind = networks(which)
    schedule = VP() if which == "vp dit" else Flow()
    fake = copy.deepcopy(teacher)
    x, eps, t_dm, cond, uncond = draws(which)
    t_ca = 0.6 * t_dm
    with torch.no_grad():
        x_dm, x_ca = add_noise(schedule, x, eps, t_dm), add_noise(schedule, x, -eps, t_ca)
        real, x0_fake = (
            predict_x0(net, schedule, kind, x_dm, t_dm, **cond) for net in (teacher, fake)
        )
        x0_cond, x0_uncond = (
            predict_x0(teacher, schedule, kind, x_ca, t_ca, **c) for c in (cond, uncond)
        )
        guided = guided_x0(teacher, schedule, kind, x_dm, t_dm, cond, uncond, 3.0)
    g_dm, g_ca = decoupled_gradients(x, real, x0_fake, x0_cond, x0_uncond, 3.0, normalizer, guided)
    assert not g_dm.any() and (g_ca.flatten(1).abs().amax(1) > 0).all()
    assert torch.equal(g_dm + g_ca, g_ca)
    leaf = x.clone().requires_grad_(True)
    assert not torch.autograd.grad(distribution_matching_loss(leaf, g_dm), leaf)[0].any()
    assert decoupled_gradients(x, guided, x0_fake, x0_cond, x0_uncond, 3.0, normalizer, guided)[
        0
    ].any()


# ---- one draw or two: the mean is the same, but for a normaliser that couples the terms ----------------------------------


@flow_and_vp
@pytest.mark.parametrize("normalizer, same", [("none", True), ("branch", True), ("shared", False)])
def test_mean_gradient_of_one_draw_and_of_two(schedule, normalizer, same):
    """Over a grid of levels and noises, E[g_dm + g_ca] of "full" (all pairs) is that of "shared" (the diagonal): each term reads its own draw alone,
    also over its own error. Not over DMD's normaliser, which divides CA by DM's draw."""
    teacher, other = oracle(overlapping(), schedule), oracle(overlapping(std=0.7), schedule)
    u, eps = torch.linspace(0.05, 0.95, 7, dtype=torch.float64), normal(5, 2)
    level, noise = (
        v.flatten() for v in torch.meshgrid(torch.arange(7), torch.arange(5), indexing="ij")
    )  # 35 draws
    x, label = times(0.9, -0.3), torch.ones(1, dtype=torch.int64)

    def mean_gradient(dm, ca):
        """dm, ca (n,): which of the 35 draws each term gets.  -> (2,)."""
        n = len(dm)
        rows = {
            name: (add_noise(schedule, x.expand(n, -1), eps[noise[i]], u[level[i]]), u[level[i]])
            for name, i in (("dm", dm), ("ca", ca))
        }
        c, null = label.expand(n), torch.full((n,), NULL)
        real, fake, cond, uncond = (
            teacher(*rows["dm"], c),
            other(*rows["dm"], c),
            teacher(*rows["ca"], c),
            teacher(*rows["ca"], null),
        )
        guided = guide(real, teacher(*rows["dm"], null), 3.0)
        return sum(
            decoupled_gradients(x.expand(n, -1), real, fake, cond, uncond, 3.0, normalizer, guided)
        ).mean(0)

    one = mean_gradient(torch.arange(35), torch.arange(35))
    two = mean_gradient(
        *(v.flatten() for v in torch.meshgrid(torch.arange(35), torch.arange(35), indexing="ij"))
    )
    if same:
        close(one, two, 1e-12)
    else:
        assert (one - two).norm() > 0.01 * one.norm()


# ---- what CA does: it climbs log p(c | x) --------------------------------------------------------------------------------


def ring_points(schedule, n=40):
    """-> x_t (n, 2), t (n,), label (n,), cond and uncond of an overlapping ring, its ring."""
    ring, t = overlapping(), torch.linspace(0.05, 0.9, n, dtype=torch.float64)
    label = torch.arange(n) % NULL
    x0 = ring.means[label + NULL * (torch.arange(n) // NULL % 2)] + 0.45 * normal(n, 2)
    x_t = add_noise(schedule, x0, normal(n, 2, seed=1), t)
    return ring, x_t, t, label, {"label": label}, {"label": torch.full((n,), NULL)}


@flow_and_vp
@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_ca_is_the_gradient_of_log_p_class(schedule, scale):
    """cond - uncond = sigma^2 / alpha grad log p_t(c | x), so g_ca = -(scale - 1) sigma^2 / alpha grad log p_t(c | x): a step down g_ca raises it."""
    ring, x_t, t, label, cond, uncond = ring_points(schedule)
    x0_cond, x0_uncond = (
        predict_x0(oracle(ring, schedule), schedule, "x0", x_t, t, **c) for c in (cond, uncond)
    )
    climb = gradient(lambda x: log_p_class(ring, schedule, x, t, label), x_t)
    factor = (schedule.sigma(t) ** 2 / schedule.alpha(t))[:, None]
    close(x0_cond - x0_uncond, factor * climb, 1e-10)
    if isinstance(schedule, Flow):  # the paper's (1 - tau)^2 / tau, with tau = 1 - t
        close(factor[:, 0], t**2 / (1 - t))
        assert torch.allclose(
            predict_x0(ring, schedule, "flow_v", x_t, t, **cond), x0_cond, rtol=1e-10, atol=1e-12
        )
    zero = torch.zeros_like(x_t)
    g_ca = decoupled_gradients(x_t, zero, zero, x0_cond, x0_uncond, scale)[1]
    close(g_ca, -(scale - 1) * factor * climb, 1e-10)
    assert climb.norm(dim=1).min() > 1e-4
    step = 1e-3 * g_ca / g_ca.norm(dim=1, keepdim=True)
    before, down, up = (
        log_p_class(ring, schedule, x, t, label) for x in (x_t, x_t - step, x_t + step)
    )
    assert (down > before).all() and (up < before).all()


@flow_and_vp
def test_ca_of_all_classes_weighs_out(schedule):
    """sum_c p_t(c | x) g_ca,c = 0, as sum_c p(c | x) x0_c is the unconditional x0; with equal weights it is not."""
    ring, x_t, t, *_ = ring_points(schedule)
    labels = [torch.full((len(t),), c) for c in range(NULL)]
    p = torch.stack([log_p(ring, schedule, x_t, t, c) for c in labels]).softmax(0)[
        ..., None
    ]  # (4, n, 1)
    close(
        p[..., 0].log(),
        torch.stack([log_p_class(ring, schedule, x_t, t, c) for c in labels]) - math.log(NULL),
        1e-10,
    )
    net = oracle(ring, schedule)
    uncond, zero = net(x_t, t), torch.zeros_like(x_t)
    g_ca = torch.stack(
        [decoupled_gradients(x_t, zero, zero, net(x_t, t, c), uncond, 3.0)[1] for c in labels]
    )
    close((p * g_ca).sum(0), zero, 1e-12)
    assert g_ca.mean(0).norm(dim=1).max() > 0.01


@flow_and_vp
@pytest.mark.parametrize("scale", [1.5, 4.0])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_fixed_point_of_one_level_is_the_tilted_density(schedule, scale, normalizer):
    """At one shared level the gradient vanishes where the fake's score is that of p_t(x | c) p_t(c | x)^(alpha - 1); not for p_t(x | c) itself, where
    DM's does, nor for another power."""
    ring, x_t, t, label, cond, uncond = ring_points(schedule)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x0_cond, x0_uncond = (
        predict_x0(oracle(ring, schedule), schedule, "x0", x_t, t, **c) for c in (cond, uncond)
    )
    x = normal(*x_t.shape, seed=7)

    def terms(power):
        tilted = lambda y: (
            log_p(ring, schedule, y, t, label) + power * log_p_class(ring, schedule, y, t, label)
        )  # noqa: E731
        x0_fake = to_x0_eps(gradient(tilted, x_t), "score", x_t, alpha, sigma)[0]
        return decoupled_gradients(
            x,
            x0_cond,
            x0_fake,
            x0_cond,
            x0_uncond,
            scale,
            normalizer,
            guide(x0_cond, x0_uncond, scale),
        )

    g_dm, g_ca = terms(scale - 1)
    close(g_dm + g_ca, torch.zeros_like(x), 1e-9)
    assert g_ca.norm(dim=1).mean() > 0.02
    for power in (0, scale):
        assert sum(terms(power)).norm(dim=1).mean() > 0.02
    close(terms(0)[0], torch.zeros_like(x), 1e-9)


# ---- the fake, and DM's fixed point ------------------------------------------------------------------------------------


def fitted(schedule, kind, x, eps, t, features):
    """The network sum_k w_k features(x_t)_k that fake_score_loss likes best.  features: (B, d) -> (B, f).  -> x_t -> (B, d), its output."""
    f = features(x).shape[1]

    def loss(w):
        return fake_score_loss(
            lambda x_t, t: DoubleOutput.apply_to(features(x_t) @ w.reshape(f, -1)),
            schedule,
            kind,
            x,
            eps,
            t,
            {},
        )

    zero = torch.zeros(f * x.shape[1], dtype=torch.float64)
    slope, curvature = (
        torch.autograd.functional.jacobian(loss, zero),
        torch.autograd.functional.hessian(loss, zero),
    )
    w = -torch.linalg.solve(curvature, slope).reshape(f, -1)  # quadratic in w: one Newton step
    return lambda x_t: features(x_t) @ w


def affine(x_t):
    return torch.cat([torch.ones_like(x_t[:, :1]), x_t], 1)


@flow_and_vp
@pytest.mark.parametrize("kind", ["x0", "eps", "flow_v", "vp_v"])
@pytest.mark.parametrize("level", [0.15, 0.9])
def test_fake_s_optimum_is_the_posterior_mean(schedule, kind, level):
    """On N(m, c^2) the best affine network under fake_score_loss, read as x0, is E[x0 | x_t] whatever it predicts; then g_dm is 0 for a teacher of
    the same law, and not for another's."""
    m, c = 0.7, 0.6
    z, eps = (
        v.reshape(-1, 1) for v in torch.meshgrid(unit_nodes(30), unit_nodes(30), indexing="ij")
    )
    x, t = m + c * z, torch.full((900,), level, dtype=torch.float64)
    alpha, sigma, x_t = schedule.alpha(t), schedule.sigma(t), add_noise(schedule, x, eps, t)
    fake = to_x0_eps(fitted(schedule, kind, x, eps, t, affine)(x_t), kind, x_t, alpha, sigma)[0]
    real = posterior_mean(x_t, m, c, alpha[:, None], sigma[:, None])
    close(fake, real, 1e-9)
    zero = torch.zeros_like(x)
    close(decoupled_gradients(x, real, fake, zero, zero, 1.0)[0], zero, 1e-9)
    elsewhere = posterior_mean(x_t, m + 0.3, c, alpha[:, None], sigma[:, None])
    g_dm = decoupled_gradients(x, elsewhere, fake, zero, zero, 1.0)[0]
    assert (g_dm < 0).all()  # the student walks down it, towards the larger mean


def test_fake_is_trained_on_the_sample_noised_to_the_given_level_with_the_condition():
    """What the network is asked: add_noise(x, eps, t), t, and all of cond; the loss is the mean over every value, dmd.py's, without gradient in x."""
    x, eps, t, output = (
        normal(6, 2, 3),
        normal(6, 2, 3, seed=1),
        torch.linspace(0.1, 0.9, 6, dtype=torch.float64),
        normal(6, 2, 3, seed=2),
    )
    seen = {}

    def net(x_t, t, **cond):
        seen.update(x_t=x_t, t=t, **cond)
        return DoubleOutput.apply_to(output)

    for schedule, kind, target in (
        (Flow(), "flow_v", eps - x),
        (VP(), "eps", eps),
        (VP(), "x0", x),
    ):
        loss = fake_score_loss(net, schedule, kind, x, eps, t, {"label": 5, "steps": 2})
        close(loss, (output - target).square().mean(), 1e-12)
        assert torch.equal(loss, dmd.fake_score_loss(net, schedule, kind, x, eps, t, {"label": 5}))
        assert torch.equal(seen["x_t"], add_noise(schedule, x, eps, t)) and torch.equal(
            seen["t"], t
        )
        assert (seen["label"], seen["steps"]) == (5, 2)


@flow_and_vp
@pytest.mark.parametrize("kind", ["flow_v", "eps"])
def test_dm_is_at_rest_on_average_for_a_perfect_student(schedule, kind):
    """Student = p(x | c) of an uneven mixture, the fake the best affine one: g_dm is not 0, but E[g_dm] and E[g_dm x_t] are. They are not with
    a fake fitted to all classes, with an unconditional or with a guided real score."""
    n, ring = (
        40000,
        RingTeacher(modes=5, num_classes=2, std=0.3),
    )  # class 0 has modes 0, 2, 4: not symmetric about the origin
    g = torch.Generator().manual_seed(0)
    t, z, eps = (
        torch.full((n,), 0.45, dtype=torch.float64),
        normal(n, 2, seed=1),
        normal(n, 2, seed=2),
    )
    x, everything = (
        ring.means[torch.tensor(modes)[torch.randint(0, len(modes), (n,), generator=g)]] + 0.3 * z
        for modes in ([0, 2, 4], [0, 1, 2, 3, 4])
    )
    x_t, alpha, sigma, zero = (
        add_noise(schedule, x, eps, t),
        schedule.alpha(t),
        schedule.sigma(t),
        torch.zeros(n, 2, dtype=torch.float64),
    )
    cond, uncond = (oracle(ring, schedule)(x_t, t, torch.full((n,), c)) for c in (0, 2))

    def moments(samples, real):
        """|E[g_dm]| and |E[g_dm x_t]|, largest entry, and E|g_dm|."""
        fake = to_x0_eps(
            fitted(schedule, kind, samples, eps, t, affine)(x_t), kind, x_t, alpha, sigma
        )[0]
        g_dm = decoupled_gradients(x, real, fake, zero, zero, 1.0)[0]
        return float((affine(x_t).T @ g_dm / n).abs().max()), float(g_dm.abs().mean())

    mean, size = moments(x, cond)
    assert size > 0.05 and mean < 0.008  # 40,000 draws of about 0.4
    for samples, real in ((everything, cond), (x, uncond), (x, guide(cond, uncond, 3.0))):
        assert moments(samples, real)[0] > 0.03


# ---- Eq. 7, mean and variance ------------------------------------------------------------------------------------------

TARGET = (0.075, 0.81)  # the paper's, SDXL latents


def kl(m, v, mean, variance):
    return torch.distributions.kl_divergence(
        torch.distributions.Normal(m, v.sqrt()),
        torch.distributions.Normal(*times(mean, variance**0.5)),
    )


def standard(*shape, seed=0):
    """Images with exactly mean 0 and variance 1 each."""
    x = normal(shape[0], *shape[1:], seed=seed).flatten(1)
    x = x - x.mean(1, keepdim=True)
    return (x / x.square().mean(1, keepdim=True).sqrt()).reshape(shape)


@pytest.mark.parametrize(
    "shape", [(3, 7), (2, 3, 4), (1, 2, 3, 2)], ids=["C H (L)", "C H W", "C T H W"]
)
def test_mean_variance_is_the_kl_of_each_image(shape):
    """(1 / B) sum_i KL(N(m_i, v_i) || N(mean, variance)), with v_i over 1 / n and both over all values of image i. Not reversed, not over n - 1."""
    x = normal(5, *shape) * times(0.3, 0.7, 1, 1.5, 3).reshape(5, *[1] * len(shape)) + 0.2
    m, v = x.flatten(1).mean(1), x.flatten(1).var(1, correction=0)
    got = mean_variance_loss(x, *TARGET)
    assert got.shape == ()
    close(got, kl(m, v, *TARGET).mean(), 1e-12)
    close(got, (0.5 * ((v + (m - 0.075) ** 2) / 0.81 - 1 - torch.log(v / 0.81))).mean(), 1e-12)
    normals = (
        torch.distributions.Normal(*times(0.075, 0.9)),
        torch.distributions.Normal(m, v.sqrt()),
    )
    for wrong in (
        torch.distributions.kl_divergence(*normals).mean(),
        kl(m, x.flatten(1).var(1), *TARGET).mean(),
        kl(m, v, *TARGET).sum(),
        kl(m.mean(), v.mean(), *TARGET),
        kl(m, v, 0.075, 0.9).mean(),
    ):
        assert abs(float(got - wrong)) > 1e-3


def test_mean_variance_rests_at_the_target():
    """Value and gradient vanish where each image has the target's mean and variance, and nowhere near."""
    x = (0.9 * standard(4, 2, 3, 3) + 0.075).requires_grad_(True)
    loss = mean_variance_loss(x, *TARGET)
    close(loss, 0, 1e-14), close(torch.autograd.grad(loss, x)[0], torch.zeros(4, 2, 3, 3), 1e-14)
    for wider, off in ((1.1, 0), (0.9, 0), (1, 0.1)):
        y = (0.9 * wider * standard(4, 2, 3, 3) + 0.075 + off).requires_grad_(True)
        loss = mean_variance_loss(y, *TARGET)
        slope = torch.autograd.grad(loss, y)[0]
        assert loss > 1e-3
        assert mean_variance_loss(y - 5 * slope, *TARGET) < loss


def test_mean_variance_sees_each_image_not_the_pool():
    """Two kinds of image whose pooled mean and variance are the target's, 0 if pooled: bright and dark ones, or loud and quiet ones."""
    for offsets, scales in (
        (times(0.4, -0.4), 0.81 - 0.16),
        (times(0, 0), times(0.81 + 0.5, 0.81 - 0.5)),
    ):
        x = (
            standard(2, 2, 3, 3)
            * (torch.as_tensor(scales).double().sqrt() * torch.ones(2).double())[
                :, None, None, None
            ]
            + offsets[:, None, None, None]
            + 0.075
        )
        pooled = kl(x.mean(), x.var(correction=0), *TARGET)
        close(pooled, 0, 1e-12)
        assert mean_variance_loss(x, *TARGET) > 0.05
        close(
            mean_variance_loss(x, *TARGET),
            (mean_variance_loss(x[:1], *TARGET) + mean_variance_loss(x[1:], *TARGET)) / 2,
            1e-12,
        )


def test_mean_variance_of_points_is_that_of_the_batch():
    """Points (B, 2) have no inside: mean and variance are those of all 2 B coordinates; zero, with its gradient, at the target."""
    x = 1.4 * normal(50, 2) + 0.3
    close(mean_variance_loss(x, *TARGET), kl(x.mean(), x.var(correction=0), *TARGET), 1e-12)
    close(mean_variance_loss(x, *TARGET), mean_variance_loss(x.reshape(1, 50, 2), *TARGET), 1e-12)
    x = (0.9 * standard(1, 50, 2)[0] + 0.075).requires_grad_(True)
    loss = mean_variance_loss(x, *TARGET)
    close(loss, 0, 1e-14), close(torch.autograd.grad(loss, x)[0], torch.zeros(50, 2), 1e-14)


@pytest.mark.parametrize("shape", [(3, 2, 2, 3), (4, 2)], ids=["images", "points"])
def test_mean_variance_gradient(shape):
    """By finite differences, and (x - m) (1 / variance - 1 / v) + (m - mean) / variance over B n: nothing in it is held constant."""
    x = (1.5 * normal(*shape) + 0.4).requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x: mean_variance_loss(x, *TARGET), x, eps=1e-6, atol=1e-8, rtol=1e-6
    )
    rows = x.detach().flatten(1) if len(shape) > 2 else x.detach().reshape(1, -1)
    m, v = rows.mean(1, keepdim=True), rows.var(1, correction=0, keepdim=True)
    want = ((rows - m) * (1 / 0.81 - 1 / v) + (m - 0.075) / 0.81) / rows.numel()
    close(
        torch.autograd.grad(mean_variance_loss(x, *TARGET), x)[0].flatten(), want.flatten(), 1e-12
    )


def test_mean_variance_of_flat_images_is_finite():
    """A variance of 0 counts as 1e-8: a large finite loss that still pulls the mean."""
    x = torch.full((2, 1, 3, 3), 0.5, dtype=torch.float64).requires_grad_(True)
    loss = mean_variance_loss(x, *TARGET)
    close(loss, kl(times(0.5), times(1e-8), *TARGET)[0], 1e-10)
    close(torch.autograd.grad(loss, x)[0], torch.full_like(x, 0.425 / 0.81 / 18))


class Pictures:
    """A world of 2,000 images whose means and variances are known."""

    @staticmethod
    def data(n, seed):
        bright, loud = (
            (torch.arange(n) % 2 * 2 - 1).double(),
            (torch.arange(n) // 2 % 2 * 2 - 1).double(),
        )
        return standard(n, 1, 2, 3) * (0.5 + 0.3 * loud).sqrt()[:, None, None, None] + (
            0.1 + bright
        )[:, None, None, None], None


def test_targets_of_a_world_are_averages_over_images():
    """Eq. 7's targets: the mean over images of each one's mean, .1, and of each one's variance, .5; the pool's variance would be 1.5. For points the pool's."""
    assert decoupled_dmd.world_moments(Pictures) == pytest.approx((0.1, 0.5), rel=1e-9)
    points = type(
        "Points", (), {"data": staticmethod(lambda n, seed: (2 * normal(n, 2) + 1, None))}
    )
    x = points.data(2000, 0)[0]
    assert decoupled_dmd.world_moments(points) == pytest.approx(
        (float(x.mean()), float(x.var(correction=0))), rel=1e-9
    )


# ---- noise levels (Sec. 4.3) -------------------------------------------------------------------------------------------

EVERY_STEP = [(N, k) for N in (1, 4, 8) for k in range(N)]
every_step = pytest.mark.parametrize("N, k", EVERY_STEP)
FULL = (0.0, 1.0)


def drawn(schedule, N, k, s, dm_range=FULL, ca_range=FULL, n=200):
    """Levels as the training loop draws them: spread over the range, then shifted.  -> t_dm, t_ca (n,) float64."""
    range_dm, range_ca = noise_ranges(schedule, 1 - k / N, dm_range, ca_range)
    draw = Draws(0, k, "student", range(n))
    return shift(draw.spread("u", *range_dm).double(), s), shift(
        draw.spread("u_ca", *range_ca).double(), s
    )


def test_ranges_of_the_four_schedules():
    """ "shared" and "full" leave both ranges alone, "hybrid" bounds CA's by u_k, "constrained" both; each range is cut, not replaced."""
    dm, ca = (0.02, 0.98), (0.1, 0.9)
    for u_k in (0.25, 0.5, 0.75):
        cut = lambda r: (r[0], min(r[1], u_k))  # noqa: E731, B023
        assert noise_ranges("shared", u_k, dm, ca) == noise_ranges("full", u_k, dm, ca) == (dm, ca)
        assert (
            noise_ranges("constrained", u_k, dm, ca)
            == (cut(dm), cut(ca))
            == ((0.02, u_k), (0.1, u_k))
        )
        assert noise_ranges("hybrid", u_k, dm, ca) == (dm, cut(ca))
    assert noise_ranges("hybrid", 0.5, dm, (0.1, 0.3)) == (
        dm,
        (0.1, 0.3),
    )  # below the bound already
    assert noise_ranges("constrained", 0.5, (0.1, 0.3), (0.2, 0.4)) == ((0.1, 0.3), (0.2, 0.4))
    assert noise_ranges("hybrid", 0.5, dm, (0.6, 0.9))[1] == (
        0.5,
        0.5,
    )  # nothing left: its upper end stays on the bound


@every_step
@pytest.mark.parametrize("s", [1.0, 2.0, 3.0])
def test_ca_never_sees_more_noise_than_the_input(N, k, s):
    """After the shift t_ca <= times[k], in "constrained" and "hybrid", and it goes all the way up to it; with "constrained" t_dm too, with the others
    DM covers everything. The house's times[k] is shift(u_k)."""
    t_k = step_grid(N, s)[k]
    assert t_k == pytest.approx(shift(1 - k / N, s), rel=1e-12)
    close(unshift(times(t_k), s), [1 - k / N])
    bounded = {
        "shared": (False, False),
        "full": (False, False),
        "constrained": (True, True),
        "hybrid": (False, True),
    }
    for schedule, which in bounded.items():
        for t, below in zip(drawn(schedule, N, k, s), which):
            top = t_k if below else 1.0
            assert t.min() >= 0 and t.max() <= top
            u, reach = unshift(t, s), unshift(times(top), s)
            even = (
                (torch.arange(200, dtype=torch.float64) + 0.5) / 200 * reach
            )  # uniform before the shift, from 0 to the bound
            assert (u.sort().values - even).abs().max() < 0.02 * reach


@every_step
@pytest.mark.parametrize("s", [1.0, 2.0, 3.0])
def test_paper_s_direction_is_the_house_s(N, k, s):
    """The paper's t = 1 - u: grid k / N, tau drawn in [t_pre, 1], then t / (t + s (1 - t)). One minus ours, and tau_CA >= its generator time."""

    def paper_shift(t):
        return t / (t + s * (1 - t))

    assert paper_shift(times(0.0, 1.0)).tolist() == [0, 1] and (
        s != 3 or paper_shift(0.75) == pytest.approx(0.5)
    )
    t_pre, v = k / N, torch.linspace(0, 1, 11, dtype=torch.float64)
    (lo, hi), (lo_ca, hi_ca) = noise_ranges("hybrid", 1 - t_pre, FULL, FULL)
    tau_dm, tau_ca = paper_shift(v), paper_shift(t_pre + (1 - t_pre) * v)
    (
        close(1 - shift(hi - (hi - lo) * v, s), tau_dm, 1e-12),
        close(1 - shift(hi_ca - (hi_ca - lo_ca) * v, s), tau_ca, 1e-12),
    )
    generator_time = paper_shift(t_pre)
    assert (
        1 - step_grid(N, s)[k] == pytest.approx(generator_time) and (tau_ca >= generator_time).all()
    )
    assert (1 - drawn("hybrid", N, k, s)[1] >= generator_time - 1e-12).all()


@pytest.mark.parametrize("s", [2.0, 3.0])
@pytest.mark.parametrize("N, k", [(N, k) for N, k in EVERY_STEP if k])
def test_bound_belongs_before_the_shift(N, k, s):
    """Cutting at the shifted time and shifting once more exceeds the input's level; the raw range left unshifted, or the paper's time not turned round,
    has another law."""
    t_k = step_grid(N, s)[k]
    twice = drawn("hybrid", N, N * (1 - t_k), s)[1]  # u_k = times[k], already shifted
    assert twice.max() > t_k
    right = drawn("hybrid", N, k, s)[1]
    not_at_all = drawn("hybrid", N, k, 1.0)[1]  # u <= u_k, seen by networks as it is
    clipped = drawn("full", N, k, s)[1].clamp_max(t_k)  # piles up on the bound
    turned = unshift(drawn("hybrid", N, k, 1.0)[1], s)  # the shift of the other direction
    for wrong in (twice, not_at_all, clipped, turned):
        assert (wrong.sort().values - right.sort().values).abs().max() > 0.02 * t_k


def test_own_ranges_are_cut_by_the_bound():
    """--ca_range and --dm_range hold together with the bound: levels in [LO, min(HI, u_k)] before the shift."""
    for schedule, dm_top, ca_top in (
        ("full", 0.7, 0.9),
        ("hybrid", 0.7, 0.5),
        ("constrained", 0.5, 0.5),
    ):
        t_dm, t_ca = drawn(schedule, 4, 2, 3.0, (0.1, 0.7), (0.3, 0.9))
        for t, lo, hi in ((t_dm, 0.1, dm_top), (t_ca, 0.3, ca_top)):
            u = unshift(t, 3.0)
            assert lo - 1e-6 <= u.min() < lo + 0.02 and hi - 0.02 < u.max() <= hi + 1e-6


@pytest.mark.parametrize(
    "dm, ca", [(FULL, FULL), ((0.02, 0.98), (0.1, 0.9)), ((0.3, 1.0), (0.95, 1.0))]
)
def test_one_step_knows_one_schedule(dm, ca):
    """N = 1, or the first step of any: hybrid, constrained and full draw from the same ranges."""
    assert (
        noise_ranges("full", 1.0, dm, ca)
        == noise_ranges("constrained", 1.0, dm, ca)
        == noise_ranges("hybrid", 1.0, dm, ca)
        == (dm, ca)
    )
    for N in (1, 4):
        for a, b, c in zip(*(drawn(schedule, N, 0, 3.0, dm, ca) for schedule in FOUR[1:])):
            assert torch.equal(a, b) and torch.equal(b, c)


# ---- the sampler -------------------------------------------------------------------------------------------------------


def test_steps_of_z_image():
    """Eight steps at shift 3: 1, .9545, .9, .8333, .75, .6429, .5, .3, 0."""
    assert step_grid(8, 3.0) == pytest.approx(
        [1, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0], rel=1e-12, abs=0
    )
    assert [round(t, 4) for t in step_grid(8, 3.0)] == [
        1,
        0.9545,
        0.9,
        0.8333,
        0.75,
        0.6429,
        0.5,
        0.3,
        0,
    ]


class Diary:
    """The ring's exact network under a schedule, which notes what it was called with; predicts x0."""

    def __init__(self, schedule):
        self.net, self.seen = oracle(overlapping(), schedule), []

    def __call__(self, x_t, t, label):
        self.seen.append((x_t.clone(), t.clone(), label))
        return self.net(x_t, t, label)


def setting(N, s=3.0):
    return (
        step_grid(N, s)[:-1],
        normal(6, 2, seed=9),
        {"label": torch.arange(6) % NULL},
        lambda i: normal(6, 2, seed=100 + i),
    )


def forbidden(i):
    raise AssertionError("asked for noise")


@flow_and_vp
@pytest.mark.parametrize("renoise", ["sde", "ode"])
@pytest.mark.parametrize("N", [1, 2, 4, 8])
def test_calls_of_the_sampler(schedule, renoise, N):
    """N steps are N calls, all with the condition, at the grid's times; a rollout over k + 1 times makes k of them and ends in the state that the sampler
    calls the network with next. "sde" asks for noise between calls, by index, "ode" never."""
    grid, z, cond, fresh = setting(N)
    student, asked = Diary(schedule), []
    noise = (lambda i: asked.append(i) or fresh(i)) if renoise == "sde" else forbidden
    sample(student, schedule, "x0", z, grid, cond, renoise, noise)
    assert len(student.seen) == N and asked == (list(range(N - 1)) if renoise == "sde" else [])
    assert [float(t[0]) for _, t, _ in student.seen] == grid and all(
        (t == t[0]).all() and t.shape == (6,) for _, t, _ in student.seen
    )
    assert all(
        torch.equal(label, cond["label"]) and (label < NULL).all() for _, _, label in student.seen
    )
    assert torch.equal(student.seen[0][0], z)
    for k in range(N):
        own = Diary(schedule)
        x_in = rollout(own, schedule, "x0", z, grid[: k + 1], cond, renoise, fresh)
        assert len(own.seen) == k and torch.equal(x_in, student.seen[k][0])
    assert torch.equal(rollout(None, schedule, "x0", z, grid[:1], {}, renoise, forbidden), z)


@flow_and_vp
def test_sde_takes_the_noise_it_is_given(schedule):
    """x_{t'} = alpha' x0 + sigma' fresh(i), with the index of the step just made; the sample is the last call's x0, nothing added. Without `fresh`
    torch's own generator is used."""
    grid, z, cond, fresh = setting(3)
    net, x_t = oracle(overlapping(), schedule), z
    for i, t in enumerate(grid):
        x0 = net(x_t, z.new_full((6,), t), cond["label"])
        if i < 2:
            t_next = times(grid[i + 1])
            x_t = float(schedule.alpha(t_next)) * x0 + float(schedule.sigma(t_next)) * fresh(i)
    close(sample(net, schedule, "x0", z, grid, cond, "sde", fresh), x0, 1e-12)
    torch.manual_seed(5)
    noises = [torch.randn_like(z) for _ in range(2)]
    torch.manual_seed(5)
    got = sample(net, schedule, "x0", z, grid, cond)  # "sde" is the default
    assert torch.equal(got, sample(net, schedule, "x0", z, grid, cond, "sde", lambda i: noises[i]))
    assert not torch.allclose(got, sample(net, schedule, "x0", z, grid, cond, "sde", fresh))


@flow_and_vp
def test_ode_is_euler(schedule):
    """ "ode" keeps the noise that the student implies: Euler for flow, DDIM for VP, on the same times."""
    grid, z, cond, _ = setting(4)
    net = oracle(overlapping(), schedule)
    predict = lambda x, t: predict_x0_eps(net, schedule, "x0", x, t, **cond)  # noqa: E731
    close(
        sample(net, schedule, "x0", z, grid, cond, "ode", forbidden),
        sample_ode(predict, schedule, z, grid + [0.0], "euler"),
        1e-12,
    )
    if isinstance(schedule, Flow):
        x, ring = z, overlapping()
        for t, t_next in zip(grid, grid[1:]):
            x = x + (t_next - t) * ring(x, z.new_full((6,), t), cond["label"])
        close(rollout(net, schedule, "x0", z, grid, cond, "ode", forbidden), x, 1e-12)


def test_sampler_leaves_no_graph():
    """sample runs without gradients, whatever the network; a rollout leaves that to its caller."""
    student = perturbed(ring_network(), std=0.2).double()
    grid, z, cond, fresh = setting(3)
    assert not sample(student, Flow(), "flow_v", z, grid, cond, "sde", fresh).requires_grad
    assert rollout(student, Flow(), "flow_v", z, grid, cond, "sde", fresh).requires_grad
