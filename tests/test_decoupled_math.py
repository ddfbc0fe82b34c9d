"""decoupled_dmd.py against the paper's formulas (2511.22677 v1).

The two terms and their sum, what each of them does, their noise levels, Eq. 7, and the sampler.
"""

import copy
import math

import guided_parts
import pytest
import torch
from helpers import perturbed, ring_network
from test_dmd_math import (
    WRONG_LOSSES,
    DoubleOutput,
    close,
    has_gradient,
    mean_error,
    network_of,
    normal,
    posterior_mean,
    small_dit,
    unit_nodes,
)

import decoupled_dmd
import dmd
from decoupled_dmd import (
    ablated_loss,
    decoupled_dmd_loss,
    fake_score_loss,
    mean_variance_loss,
    mean_variance_target,
    noise_ranges,
    rollout,
    sample,
)
from models.diffusion import (
    VP,
    Diffusion,
    Flow,
    add_noise,
    guide,
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
FLOW_X0, FLOW_V = Diffusion(Flow(), "x0"), Diffusion(Flow(), "flow_v")

flow_and_vp = pytest.mark.parametrize("schedule", [Flow(), VP()], ids=["flow", "vp"])


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def parse(flags):
    return decoupled_dmd.parse_args(["--teacher", "ring", *flags.split()])


def overlapping(**changes):
    """A ring whose classes overlap, so that log p(c | x) is not flat."""
    return RingTeacher(**{**dict(std=0.45), **changes})


def oracle(ring, schedule):
    """The ring's exact network under any schedule; predicts x0."""

    def net(x_t, t, label=None):
        return ring.posterior(x_t, schedule.alpha(t), schedule.sigma(t), label)[1]

    return net


def log_p(ring, schedule, x_t, t, label=None):
    """log p_t(x_t | label), (B,); without a label log p_t(x_t)."""
    return ring.posterior(x_t, schedule.alpha(t), schedule.sigma(t), label)[0]


def log_p_class(ring, schedule, x_t, t, label):
    """log p_t(label | x_t) by Bayes with equal priors, up to their constant.  (B,)."""
    return log_p(ring, schedule, x_t, t, label) - log_p(ring, schedule, x_t, t)


@torch.enable_grad()
def gradient(function, x):
    """d sum(function(x)) / dx, of a function that treats each row by itself."""
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(function(x).sum(), x)[0]


# ---- the loss with networks, and with numbers in their place -------------------------------------


def student_loss(
    x, teacher, fake, diffusion, at_dm, at_ca, cond, uncond, fake_cond, scale, flags=""
):
    """What train calls with these flags.  -> loss, g_dm, g_ca.

    Where no term is off and nothing is normalised, `decoupled_dmd_loss`, after a check that
    `ablated_loss` is the same to the bit; otherwise the latter.
    """
    terms = decoupled_dmd.Terms(parse(f"--guidance_scale {scale} {flags}"))
    at_t = diffusion, at_dm, at_ca, cond, uncond, fake_cond, scale
    ablated = ablated_loss(x, teacher, fake, *at_t, terms)
    if terms.dm and "--no_ca" not in flags and terms.normalizer == "none":
        plain = decoupled_dmd_loss(x, teacher, fake, *at_t)
        assert all(torch.equal(a, b) for a, b in zip(plain, ablated, strict=True))
        assert terms.as_in_paper or scale == 1
        return plain[:3]
    assert not terms.as_in_paper
    return ablated[:3]


class Numbers:
    """Networks that return given x0 whatever x_t is, at DM's level .7 and at CA's level .4.

    real and null, cond and uncond: the teacher with and without the condition, at DM's and at CA's
    level. Without cond and uncond both terms share one level and one noise.
    """

    def __init__(self, x, real, fake, null=None, cond=None, uncond=None):
        rows = len(x)
        self.x, self.fake_x0 = x, fake
        self.x0 = {("c", 0.7): real, ("u", 0.7): null, ("c", 0.4): cond, ("u", 0.4): uncond}
        self.at_dm = normal(*x.shape, seed=98), torch.full((rows,), 0.7, dtype=torch.float64)
        self.at_ca = self.at_dm
        if cond is not None:
            level = torch.full((rows,), 0.4, dtype=torch.float64)
            self.at_ca = normal(*x.shape, seed=99), level

    def teacher(self, x_t, t, side):
        return self.x0[side, float(t[0])]

    def fake(self, x_t, t, side):
        assert side == "c" and float(t[0]) == 0.7
        return self.fake_x0

    def loss(self, scale, flags=""):
        """-> loss, g_dm, g_ca of the script."""
        sides = {"side": "c"}, {"side": "u"}, {"side": "c"}
        at_t = FLOW_X0, self.at_dm, self.at_ca, *sides, scale
        return student_loss(self.x, self.teacher, self.fake, *at_t, flags)

    def dmd_loss(self, scale):
        """-> loss, g of dmd.py at DM's level."""
        sides = {"side": "c"}, {"side": "u"}, {"side": "c"}
        at_t = FLOW_X0, *self.at_dm, *sides, scale
        return dmd.dmd_loss(self.x, self.teacher, self.fake, *at_t)[:2]


# ---- Eq. 6: the two terms and their sum ----------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 5), (4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_terms_add_up_to_dmd_s_gradient(scale, shape):
    """-Delta_DM = fake - cond, -Delta_CA = (alpha - 1) (uncond - cond), for any numbers and alpha.

    At one level their sum is fake - guided, and over DMD's normaliser it is dmd.py's gradient with
    the guided teacher.
    """
    x, cond, uncond, fake = (normal(*shape, seed=k) for k in range(4))
    guided, numbers = guide(cond, uncond, scale), Numbers(x, cond, fake, uncond)
    _, g_dm, g_ca = numbers.loss(scale)
    close(g_dm, fake - cond, 1e-13)
    close(g_ca, (scale - 1) * (uncond - cond), 1e-13)
    close(g_dm + g_ca, fake - guided, 1e-12)
    loss_dmd, g = numbers.dmd_loss(scale)
    close((g_dm + g_ca) / mean_error(x, guided), g, 1e-12)
    loss, *shared = numbers.loss(scale, "--normalizer shared")
    close(sum(shared), g, 1e-12)
    close(loss, loss_dmd, 1e-12)
    close(shared[0] * mean_error(x, guided), g_dm, 1e-12)
    close(shared[1] * mean_error(x, guided), g_ca, 1e-12)


WRONG_TERMS = {
    # the other convention of guidance, cond + w (cond - uncond)
    "alpha for alpha - 1": lambda c, u, f, a: (f - c, a * (u - c)),
    "sign": lambda c, u, f, a: (f - c, (a - 1) * (c - u)),
    "guided in both": lambda c, u, f, a: (f - guide(c, u, a), (a - 1) * (u - c)),
    "unconditional DM": lambda c, u, f, a: (f - u, (a - 1) * (u - c)),
}


@pytest.mark.parametrize("wrong", WRONG_TERMS.values(), ids=WRONG_TERMS)
def test_decomposition_tells_wrong_variants(wrong):
    """The identity above is sharp: the usual mistakes violate it."""
    cond, uncond, fake = (normal(4, 3, 5, seed=k) for k in range(3))
    got, want = sum(wrong(cond, uncond, fake, 3.0)), fake - guide(cond, uncond, 3.0)
    assert not torch.allclose(got, want, rtol=1e-2)


def networks(which):
    """A teacher, a fake that differs from it, the null label, what they predict; in float64."""
    if which == "ring":
        return RingTeacher(), perturbed(ring_network(), std=0.2).double(), NULL, "flow_v"
    kind = {"flow dit": "flow_v", "vp dit": "eps"}[which]
    return small_dit(1, 2).double(), small_dit(2, 2).double(), 3, kind


def draws(which, n=6):
    """-> x, eps (n, ...), t (n,), cond, uncond for these networks, float64."""
    shape, null = ((2,), NULL) if which == "ring" else ((1, 4, 4), 3)
    t = torch.linspace(0.15, 0.9, n, dtype=torch.float64)
    cond, uncond = {"label": torch.arange(n) % null}, {"label": torch.full((n,), null)}
    return normal(n, *shape), normal(n, *shape, seed=1), t, cond, uncond


def diffusion_of(which):
    return Diffusion(VP(), "eps") if which == "vp dit" else FLOW_V


every_network = pytest.mark.parametrize("which", ["ring", "flow dit", "vp dit"])


@every_network
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_terms_add_up_through_networks(which, scale):
    """The same through real networks: one level, one noise, with and without the condition."""
    teacher, fake, *_ = networks(which)
    (x, eps, t, cond, uncond), diffusion = draws(which), diffusion_of(which)
    at_t = eps, t
    with torch.no_grad():
        x_t = add_noise(diffusion.schedule, x, eps, t)
        mu_cond, mu_uncond = (diffusion.x0(teacher, x_t, t, **c) for c in (cond, uncond))
        mu_fake = diffusion.x0(fake, x_t, t, **cond)
        guided = diffusion.guided_x0(teacher, x_t, t, cond, uncond, scale)
        g = dmd.dmd_loss(x, teacher, fake, diffusion, *at_t, cond, uncond, cond, scale)[1]
    assert guided.dtype == torch.float64 and not torch.allclose(mu_cond, mu_uncond)
    both = diffusion, at_t, at_t, cond, uncond, cond, scale
    _, g_dm, g_ca = student_loss(x, teacher, fake, *both)
    close(g_dm + g_ca, mu_fake - guided, 1e-12)
    close((g_dm + g_ca) / mean_error(x, guided), g, 1e-12)
    _, *shared = student_loss(x, teacher, fake, *both, "--normalizer shared")
    close(sum(shared), g, 1e-12)
    assert bool(g_ca.any()) == bool(shared[1].any()) == (scale != 1)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_without_guidance_there_is_no_ca(normalizer):
    """alpha = 1: g_ca is zero whatever CA's level is, and what is left is DM."""
    numbers = Numbers(*(normal(4, 3, 5, seed=k) for k in range(6)))
    x, real, fake = numbers.x, numbers.x0["c", 0.7], numbers.fake_x0
    _, g_dm, g_ca = numbers.loss(1.0, f"--normalizer {normalizer}")
    assert not g_ca.any()
    error = 1 if normalizer == "none" else mean_error(x, real)
    close(g_dm * error, fake - real, 1e-12)


def test_sides_belong_to_their_own_levels():
    """With separate levels DM sees teacher and fake at its own, CA the teacher at its own.

    CA grows as alpha - 1.
    """
    x, real, fake, null, cond, uncond, other = (normal(4, 3, 5, seed=k) for k in range(7))
    for normalizer in ("none", "branch"):
        flags = f"--normalizer {normalizer}"
        _, g_dm, g_ca = Numbers(x, real, fake, null, cond, uncond).loss(3.0, flags)
        _, of_dm, _ = Numbers(x, real, fake, other, other, other).loss(5.0, flags)
        _, _, of_ca = Numbers(x, other, other, other, cond, uncond).loss(3.0, flags)
        assert torch.equal(of_dm, g_dm) and torch.equal(of_ca, g_ca)
        twice = Numbers(x, real, fake, null, cond, uncond).loss(5.0, flags)[2]
        close(twice, 2 * g_ca, 1e-12)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_terms_that_are_off(normalizer):
    """--no_ca and --no_dm leave the other term as it is, and the loss its own.

    With --observer DM's gradient is what it would have been, and the loss is CA's all the same.
    """
    numbers = Numbers(*(normal(4, 3, 5, seed=k) for k in range(6)))
    flags, zero = f"--normalizer {normalizer}", torch.zeros(4, 3, 5, dtype=torch.float64)
    _, g_dm, g_ca = numbers.loss(3.0, flags)
    for off, terms, moved in (
        ("--no_ca", (g_dm, zero), g_dm),
        ("--no_dm", (zero, g_ca), g_ca),
        ("--no_dm --observer", (g_dm, g_ca), g_ca),
        ("--no_dm --no_ca --gan_weight 1", (zero, zero), zero),
    ):
        loss, *got = numbers.loss(3.0, f"{flags} {off}")
        assert all(torch.equal(a, b) for a, b in zip(got, terms, strict=True)), off
        close(loss, 0.5 * moved.square().mean(), 1e-12)


# ---- normalisers ---------------------------------------------------------------------------------


def test_branch_divides_each_term_by_the_conditional_error_of_its_own_level():
    """g_dm over mean|x - real|, g_ca over mean|x - cond|, per sample.

    Neither is divided by the other's error, the guided, the unconditional, or that of x_t.
    """
    x, real, fake, cond, uncond = (normal(4, 3, 5, seed=k) * (1 + k) for k in range(5))
    numbers = Numbers(x, real, fake, uncond, cond, uncond)
    _, g_dm, g_ca = numbers.loss(3.0, "--normalizer branch")
    close(g_dm, (fake - real) / mean_error(x, real), 1e-12)
    close(g_ca, 2 * (uncond - cond) / mean_error(x, cond), 1e-12)
    for other in (cond, uncond, guide(cond, uncond, 3.0), fake):  # so the above tells them apart
        assert ((mean_error(x, other) / mean_error(x, real) - 1).abs() > 0.03).all()


def test_shared_divides_both_terms_by_the_guided_error_at_dm_s_level():
    """That is DMD's Eq. 8, also where CA has a level of its own."""
    x, real, fake, null, cond, uncond = (normal(4, 3, 5, seed=k) for k in range(6))
    error = mean_error(x, guide(real, null, 3.0))
    numbers = Numbers(x, real, fake, null, cond, uncond)
    _, g_dm, g_ca = numbers.loss(3.0, "--normalizer shared")
    close(g_dm, (fake - real) / error, 1e-12)
    close(g_ca, 2 * (uncond - cond) / error, 1e-12)
    for other in (real, cond, guide(cond, uncond, 3.0)):
        assert ((mean_error(x, other) / error - 1).abs() > 0.03).all()


@pytest.mark.parametrize("normalizer", ["shared", "branch"])
def test_normalisers_are_per_sample(normalizer):
    """Blowing up sample 1 leaves the others bit-equal, also where they come without it.

    Scaling x and all x0 of a sample leaves its gradients.
    """
    tensors = [normal(4, 3, 5, seed=k) for k in range(6)]

    def gradients(*tensors):
        return torch.stack(Numbers(*tensors).loss(3.0, f"--normalizer {normalizer}")[1:])

    others, moved = [0, 2, 3], tensors[0].clone()
    moved[1] *= 100
    kept = gradients(*tensors)
    assert torch.equal(gradients(moved, *tensors[1:])[:, others], kept[:, others])
    assert torch.equal(gradients(*(v[others] for v in tensors)), kept[:, others])
    k = times(0.01, 1, 7, 1000)[:, None, None]
    close(gradients(*(k * v for v in tensors)), kept, 1e-12)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradients_are_finite_constants(normalizer):
    """No graph whatever comes in, and nothing divided by zero by a teacher that agrees with x.

    Such a teacher leaves no term, or a large finite one.
    """
    x, flags = normal(3, 2).requires_grad_(True), f"--normalizer {normalizer}"
    loss, *terms = Numbers(*(k * x for k in (1, 2, 3, 6, 4, 5))).loss(3.0, flags)
    assert not any(g.requires_grad or g.grad_fn for g in terms)
    close(torch.autograd.grad(loss, x)[0], sum(terms) / 6, 1e-12)
    x = x.detach()
    for fake in (x, x + 1):
        _, g_dm, g_ca = Numbers(x, x, fake, x, x, 2 * fake - x).loss(3.0, flags)
        assert g_dm.isfinite().all() and g_ca.isfinite().all()
        assert bool(g_dm.any()) == bool(g_ca.any()) == (fake is not x)


# ---- Alg. 1's loss, and where gradients go -------------------------------------------------------


def test_matching_loss_has_gradient_minus_delta_over_numel():
    """d/dx of the loss is g / numel, i.e. -Delta / numel; its value is 0.5 mean g^2.

    The usual mistakes differ.
    """
    x, real, fake, null, cond, uncond = (normal(5, 3, 4, seed=k) for k in range(6))
    x.requires_grad_(True)
    loss, g_dm, g_ca = Numbers(x, real, fake, null, cond, uncond).loss(3.0)
    delta = (real - fake) + 2 * (cond - uncond)  # the paper's, with alpha = 3
    close(torch.autograd.grad(loss, x)[0], -delta / x.numel(), 1e-12)
    close(loss.detach(), 0.5 * delta.square().mean(), 1e-12)
    for wrong in WRONG_LOSSES.values():
        got = torch.autograd.grad(wrong(x, g_dm + g_ca), x)[0]
        assert not torch.allclose(got, -delta / x.numel(), rtol=1e-3)


@every_network
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradient_reaches_the_student_alone(which, normalizer):
    """Teacher and fake get none, though their weights could learn.

    The student's is its own vector-Jacobian product with g / numel.
    """
    teacher, fake, *_ = networks(which)
    if which == "ring":
        teacher = perturbed(ring_network(5), std=0.2).double()
    student, again, diffusion = copy.deepcopy(fake), copy.deepcopy(fake), diffusion_of(which)
    z, eps, t, cond, uncond = draws(which)
    assert all(p.requires_grad for net in (teacher, fake) for p in net.parameters())
    x = diffusion.x0(student, z, 0.8, **cond)
    at_t = diffusion, (eps, t), (eps, t), cond, uncond, cond, 3.0
    flags = f"--normalizer {normalizer}"
    loss, g_dm, g_ca = student_loss(x, teacher, fake, *at_t, flags)
    assert not g_dm.requires_grad and not g_ca.requires_grad
    loss.backward()
    assert not has_gradient(teacher) and not has_gradient(fake)
    got = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    diffusion.x0(again, z, 0.8, **cond).backward((g_dm + g_ca) / x.numel())
    want = {n: p.grad for n, p in again.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys() and any(v.abs().max() > 1e-6 for v in got.values())
    for n in got:  # the DiT rotates queries and keys in float32
        close(got[n], want[n], 1e-6 if "dit" in which else 1e-10)


@every_network
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_the_first_update_is_pure_ca(which, normalizer):
    """fake = deepcopy(teacher): g_dm is exactly 0 at any level, so the sum is g_ca.

    DM alone moves nothing. A guided real score would.
    """
    teacher, diffusion, flags = (
        networks(which)[0],
        diffusion_of(which),
        f"--normalizer {normalizer}",
    )
    fake = copy.deepcopy(teacher)
    x, eps, t, cond, uncond = draws(which)
    at_t = diffusion, (eps, t), (-eps, 0.6 * t), cond, uncond, cond, 3.0
    with torch.no_grad():
        _, g_dm, g_ca = student_loss(x, teacher, fake, *at_t, flags)
    assert not g_dm.any() and (g_ca.flatten(1).abs().amax(1) > 0).all()
    assert torch.equal(g_dm + g_ca, g_ca)
    leaf = x.clone().requires_grad_(True)
    loss = student_loss(leaf, teacher, fake, *at_t, f"{flags} --no_ca")[0]
    assert not torch.autograd.grad(loss, leaf)[0].any()

    def guided(x_t, t, label):
        return guide(teacher(x_t, t, label), teacher(x_t, t, uncond["label"]), 3.0)

    with torch.no_grad():
        assert student_loss(x, guided, fake, *at_t, flags)[1].any()


# ---- one draw or two: the mean is the same, but for a normaliser that couples the terms ----------


@flow_and_vp
@pytest.mark.parametrize("normalizer, same", [("none", True), ("branch", True), ("shared", False)])
def test_mean_gradient_of_one_draw_and_of_two(schedule, normalizer, same):
    """Over a grid of draws, E[g_dm + g_ca] of "full" (all pairs) is that of "shared" (diagonal).

    Each term reads its own draw alone, also over its own error. Not so over DMD's normaliser, which
    divides CA by DM's draw.
    """
    teacher, other = (oracle(overlapping(std=std), schedule) for std in (0.45, 0.7))
    u, eps = torch.linspace(0.05, 0.95, 7, dtype=torch.float64), normal(5, 2)
    level, noise = torch.meshgrid(torch.arange(7), torch.arange(5), indexing="ij")
    level, noise, x = level.flatten(), noise.flatten(), times(0.9, -0.3)  # 35 draws

    def mean_gradient(dm, ca):
        """dm, ca (n,): which of the 35 draws each term gets.  -> (2,)."""
        n = len(dm)
        at_dm, at_ca = ((eps[noise[i]], u[level[i]]) for i in (dm, ca))
        if torch.equal(dm, ca):
            at_ca = at_dm
        cond, uncond = (
            {"label": torch.ones(n, dtype=torch.int64)},
            {"label": torch.full((n,), NULL)},
        )
        at_t = Diffusion(schedule, "x0"), at_dm, at_ca, cond, uncond, cond, 3.0
        flags = f"--normalizer {normalizer}"
        _, g_dm, g_ca = student_loss(x.expand(n, -1), teacher, other, *at_t, flags)
        return (g_dm + g_ca).mean(0)

    i = torch.arange(35)
    one = mean_gradient(i, i)
    two = mean_gradient(*(v.flatten() for v in torch.meshgrid(i, i, indexing="ij")))
    if same:
        close(one, two, 1e-12)
    else:
        assert (one - two).norm() > 0.01 * one.norm()


# ---- what CA does: it climbs log p(c | x) --------------------------------------------------------


class RingPoints:
    """n noised points of an overlapping ring, and the script's gradients there, at one level.

    x0, eps, x_t (n, 2), t, label (n,); teacher predicts x0.
    """

    def __init__(self, schedule, n=40):
        self.schedule, self.ring = schedule, overlapping()
        self.teacher = oracle(self.ring, schedule)
        self.t = torch.linspace(0.05, 0.9, n, dtype=torch.float64)
        self.label = torch.arange(n) % NULL
        mode = self.label + NULL * (torch.arange(n) // NULL % 2)
        self.x0, self.eps = self.ring.means[mode] + 0.45 * normal(n, 2), normal(n, 2, seed=1)
        self.x_t = add_noise(schedule, self.x0, self.eps, self.t)
        self.uncond = {"label": torch.full((n,), NULL)}

    def gradients(self, scale, fake=None, label=None, flags=""):
        """-> g_dm, g_ca. fake: a network of x0 (None: the teacher); label: another condition."""
        cond = {"label": self.label if label is None else label}
        at_t = self.eps, self.t
        at_t = Diffusion(self.schedule, "x0"), at_t, at_t, cond, self.uncond, cond, scale
        return student_loss(self.x0, self.teacher, fake or self.teacher, *at_t, flags)[1:]


@flow_and_vp
@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_ca_is_the_gradient_of_log_p_class(schedule, scale):
    """cond - uncond = sigma^2 / alpha grad log p_t(c | x), and g_ca is -(scale - 1) times that.

    So a step down g_ca raises log p_t(c | x).
    """
    points = RingPoints(schedule)
    ring, x_t, t, label = points.ring, points.x_t, points.t, points.label
    mu_cond, mu_uncond = (points.teacher(x_t, t, c) for c in (label, points.uncond["label"]))
    climb = gradient(lambda x: log_p_class(ring, schedule, x, t, label), x_t)
    factor = (schedule.sigma(t) ** 2 / schedule.alpha(t))[:, None]
    close(mu_cond - mu_uncond, factor * climb, 1e-10)
    if isinstance(schedule, Flow):  # the paper's (1 - tau)^2 / tau, with tau = 1 - t
        close(factor[:, 0], t**2 / (1 - t))
        exact = FLOW_V.x0(ring, x_t, t, label=label)
        assert torch.allclose(exact, mu_cond, rtol=1e-10, atol=1e-12)
    _, g_ca = points.gradients(scale)
    close(g_ca, -(scale - 1) * factor * climb, 1e-10)
    assert climb.norm(dim=1).min() > 1e-4
    step = 1e-3 * g_ca / g_ca.norm(dim=1, keepdim=True)
    places = (x_t, x_t - step, x_t + step)
    before, down, up = (log_p_class(ring, schedule, x, t, label) for x in places)
    assert (down > before).all() and (up < before).all()


@flow_and_vp
def test_ca_of_all_classes_weighs_out(schedule):
    """sum_c p_t(c | x) g_ca,c = 0, as sum_c p(c | x) x0_c is the unconditional x0.

    With equal weights it is not.
    """
    points = RingPoints(schedule)
    at = points.ring, schedule, points.x_t, points.t
    labels = [torch.full((len(points.t),), c) for c in range(NULL)]
    p = torch.stack([log_p(*at, c) for c in labels]).softmax(0)[..., None]  # (4, n, 1)
    by_bayes = torch.stack([log_p_class(*at, c) for c in labels]) - math.log(NULL)
    close(p[..., 0].log(), by_bayes, 1e-10)
    g_ca = torch.stack([points.gradients(3.0, label=c)[1] for c in labels])
    close((p * g_ca).sum(0), torch.zeros_like(points.x_t), 1e-12)
    assert g_ca.mean(0).norm(dim=1).max() > 0.01


@flow_and_vp
@pytest.mark.parametrize("scale", [1.5, 4.0])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_fixed_point_of_one_level_is_the_tilted_density(schedule, scale, normalizer):
    """At one level the gradient is 0 where the fake's score is that of a tilted density.

    That density is p_t(x | c) p_t(c | x)^(alpha - 1). The gradient is not 0 for p_t(x | c) itself,
    where DM's is, nor for another power.
    """
    points = RingPoints(schedule)
    ring, t, label = points.ring, points.t, points.label
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)

    def terms(power):
        def tilted(y):
            sharper = power * log_p_class(ring, schedule, y, t, label)
            return log_p(ring, schedule, y, t, label) + sharper

        def fake(x_t, t, label):
            return to_x0_eps(gradient(tilted, x_t), "score", x_t, alpha, sigma)[0]

        return points.gradients(scale, fake, flags=f"--normalizer {normalizer}")

    zero = torch.zeros_like(points.x_t)
    g_dm, g_ca = terms(scale - 1)
    close(g_dm + g_ca, zero, 1e-9)
    assert g_ca.norm(dim=1).mean() > 0.02
    for power in (0, scale):
        assert sum(terms(power)).norm(dim=1).mean() > 0.02
    close(terms(0)[0], zero, 1e-9)


# ---- the fake, and DM's fixed point --------------------------------------------------------------


def fitted(diffusion, x, eps, t, features):
    """The network sum_k w_k features(x_t)_k that fake_score_loss likes best.

    features: (B, d) -> (B, f).  -> a network (x_t, t, **cond) -> (B, d).
    """
    f = features(x).shape[1]

    def loss(w):
        def net(x_t, t):
            return DoubleOutput.apply_to(features(x_t) @ w.reshape(f, -1))

        return fake_score_loss(net, diffusion, x, eps, t, {})

    zero = torch.zeros(f * x.shape[1], dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(loss, zero)
    curvature = torch.autograd.functional.hessian(loss, zero)
    w = -torch.linalg.solve(curvature, slope).reshape(f, -1)  # quadratic in w: one Newton step
    return lambda x_t, t, **cond: features(x_t) @ w


def affine(x_t):
    return torch.cat([torch.ones_like(x_t[:, :1]), x_t], 1)


def dm_gradient(x, teacher, fake, diffusion, eps, t, cond=None):
    """g_dm of the script at this level.  teacher, fake: networks of the diffusion's kind."""
    at_t, cond = (eps, t), cond or {}
    return student_loss(x, teacher, fake, diffusion, at_t, at_t, cond, cond, cond, 1.0)[1]


@flow_and_vp
@pytest.mark.parametrize("kind", ["x0", "eps", "flow_v", "vp_v"])
@pytest.mark.parametrize("level", [0.15, 0.9])
def test_fake_s_optimum_is_the_posterior_mean(schedule, kind, level):
    """On N(m, c^2) the best affine network under fake_score_loss, read as x0, is E[x0 | x_t].

    Then g_dm is 0 for a teacher of the same law, and not for one of another law.
    """
    m, c, nodes, diffusion = 0.7, 0.6, unit_nodes(30), Diffusion(schedule, kind)
    z, eps = (v.reshape(-1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    x, t = m + c * z, torch.full((900,), level, dtype=torch.float64)
    x_t = add_noise(schedule, x, eps, t)
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    fake = fitted(diffusion, x, eps, t, affine)
    close(diffusion.x0(fake, x_t, t), posterior_mean(x_t, m, c, a, s), 1e-9)
    same, elsewhere = (
        network_of(lambda x_t, t, m=m: posterior_mean(x_t, m, c, a, s), diffusion)
        for m in (m, m + 0.3)
    )
    close(dm_gradient(x, same, fake, diffusion, eps, t), torch.zeros_like(x), 1e-9)
    # the student walks down it, towards the larger mean
    assert (dm_gradient(x, elsewhere, fake, diffusion, eps, t) < 0).all()


def test_fake_is_trained_on_the_noised_sample_with_its_condition():
    """What the network is asked: add_noise(x, eps, t), t, and all of cond.

    The loss is the mean over every value; it is dmd.py's.
    """
    x, eps, output = (normal(6, 2, 3, seed=k) for k in range(3))
    t, seen = torch.linspace(0.1, 0.9, 6, dtype=torch.float64), {}

    def net(x_t, t, **cond):
        seen.update(x_t=x_t, t=t, **cond)
        return DoubleOutput.apply_to(output)

    targets = (Flow(), "flow_v", eps - x), (VP(), "eps", eps), (VP(), "x0", x)
    for schedule, kind, target in targets:
        diffusion = Diffusion(schedule, kind)
        loss = fake_score_loss(net, diffusion, x, eps, t, {"label": 5, "steps": 2})
        close(loss, (output - target).square().mean(), 1e-12)
        assert torch.equal(seen["x_t"], add_noise(schedule, x, eps, t))
        assert torch.equal(seen["t"], t) and (seen["label"], seen["steps"]) == (5, 2)
        assert torch.equal(loss, dmd.fake_score_loss(net, diffusion, x, eps, t, {"label": 5}))


@flow_and_vp
@pytest.mark.parametrize("kind", ["flow_v", "eps"])
def test_dm_is_at_rest_on_average_for_a_perfect_student(schedule, kind):
    """Student = p(x | c) of an uneven mixture, the fake the best affine one.

    g_dm is not 0, but E[g_dm] and E[g_dm x_t] are. They are not with a fake fitted to all classes,
    with an unconditional or with a guided real score.
    """
    n, diffusion = 40000, Diffusion(schedule, kind)
    ring = RingTeacher(modes=5, num_classes=2, std=0.3)  # class 0: modes 0, 2, 4, off centre
    g = torch.Generator().manual_seed(0)
    t, eps = torch.full((n,), 0.45, dtype=torch.float64), normal(n, 2, seed=2)
    z, exact = normal(n, 2, seed=1), oracle(ring, schedule)

    def points(modes):
        chosen = torch.tensor(modes)[torch.randint(0, len(modes), (n,), generator=g)]
        return ring.means[chosen] + 0.3 * z

    x, everything = points([0, 2, 4]), points([0, 1, 2, 3, 4])
    x_t = add_noise(schedule, x, eps, t)

    def seen(x_t, t, scale):
        label = [torch.full((n,), c) for c in (0, 2)]
        return guide(exact(x_t, t, label[0]), exact(x_t, t, label[1]), scale)

    def moments(samples, scale):
        """|E[g_dm]| and |E[g_dm x_t]|, largest entry, and E|g_dm|."""
        teacher = network_of(lambda x_t, t: seen(x_t, t, scale), diffusion)
        fake = fitted(diffusion, samples, eps, t, affine)
        g_dm = dm_gradient(x, teacher, fake, diffusion, eps, t)
        return float((affine(x_t).T @ g_dm / n).abs().max()), float(g_dm.abs().mean())

    mean, size = moments(x, 1.0)
    assert size > 0.05 and mean < 0.008  # 40,000 draws of about 0.4
    for samples, scale in ((everything, 1.0), (x, 0.0), (x, 3.0)):  # 0: unconditional
        assert moments(samples, scale)[0] > 0.03


# ---- Eq. 7, mean and variance --------------------------------------------------------------------

TARGET = (0.075, 0.81)  # the paper's, SDXL latents


def kl(m, v, mean, variance):
    target = torch.distributions.Normal(*times(mean, variance**0.5))
    return torch.distributions.kl_divergence(torch.distributions.Normal(m, v.sqrt()), target)


def standard(*shape, seed=0):
    """Images with exactly mean 0 and variance 1 each."""
    x = normal(shape[0], *shape[1:], seed=seed).flatten(1)
    x = x - x.mean(1, keepdim=True)
    return (x / x.square().mean(1, keepdim=True).sqrt()).reshape(shape)


@pytest.mark.parametrize(
    "shape", [(3, 7), (2, 3, 4), (1, 2, 3, 2)], ids=["C L", "C H W", "C T H W"]
)
def test_mean_variance_is_the_kl_of_each_image(shape):
    """(1 / B) sum_i KL(N(m_i, v_i) || N(mean, variance)), m_i and v_i over all values of image i.

    Not reversed, and v_i is over 1 / n, not over 1 / (n - 1).
    """
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
    """Value and gradient are 0 where each image has the target's moments, and nowhere near."""
    x = (0.9 * standard(4, 2, 3, 3) + 0.075).requires_grad_(True)
    loss = mean_variance_loss(x, *TARGET)
    close(loss.detach(), 0, 1e-14)
    close(torch.autograd.grad(loss, x)[0], torch.zeros(4, 2, 3, 3), 1e-14)
    for wider, off in ((1.1, 0), (0.9, 0), (1, 0.1)):
        y = (0.9 * wider * standard(4, 2, 3, 3) + 0.075 + off).requires_grad_(True)
        loss = mean_variance_loss(y, *TARGET)
        slope = torch.autograd.grad(loss, y)[0]
        assert loss > 1e-3
        assert mean_variance_loss(y - 5 * slope, *TARGET) < loss


def test_mean_variance_sees_each_image_not_the_pool():
    """Two kinds of image whose pooled moments are the target's, where a pooled loss would be 0.

    They are bright and dark ones, or loud and quiet ones.
    """
    one = torch.ones(2, dtype=torch.float64)
    for offsets, variances in (
        (times(0.4, -0.4), (0.81 - 0.16) * one),
        (times(0, 0), times(0.81 + 0.5, 0.81 - 0.5)),
    ):
        scales, offsets = (v[:, None, None, None] for v in (variances.sqrt(), offsets))
        x = standard(2, 2, 3, 3) * scales + offsets + 0.075
        close(kl(x.mean(), x.var(correction=0), *TARGET), 0, 1e-12)
        assert mean_variance_loss(x, *TARGET) > 0.05
        apart = [mean_variance_loss(image, *TARGET) for image in x.split(1)]
        close(mean_variance_loss(x, *TARGET), sum(apart) / 2, 1e-12)


def test_mean_variance_of_points_is_that_of_the_batch():
    """Points (B, 2) have no inside: mean and variance are those of all 2 B coordinates.

    The loss is zero, with its gradient, at the target.
    """
    x = 1.4 * normal(50, 2) + 0.3
    got = mean_variance_loss(x, *TARGET)
    close(got, kl(x.mean(), x.var(correction=0), *TARGET), 1e-12)
    close(got, mean_variance_loss(x.reshape(1, 50, 2), *TARGET), 1e-12)
    x = (0.9 * standard(1, 50, 2)[0] + 0.075).requires_grad_(True)
    loss = mean_variance_loss(x, *TARGET)
    close(loss.detach(), 0, 1e-14)
    close(torch.autograd.grad(loss, x)[0], torch.zeros(50, 2), 1e-14)


@pytest.mark.parametrize("shape", [(3, 2, 2, 3), (4, 2)], ids=["images", "points"])
def test_mean_variance_gradient(shape):
    """By finite differences, and in closed form: nothing in the loss is held constant.

    (x - m) (1 / variance - 1 / v) + (m - mean) / variance, over B n.
    """
    x = (1.5 * normal(*shape) + 0.4).requires_grad_(True)
    tolerance = dict(eps=1e-6, atol=1e-8, rtol=1e-6)
    assert torch.autograd.gradcheck(lambda x: mean_variance_loss(x, *TARGET), x, **tolerance)
    rows = x.detach().flatten(1) if len(shape) > 2 else x.detach().reshape(1, -1)
    m, v = rows.mean(1, keepdim=True), rows.var(1, correction=0, keepdim=True)
    want = ((rows - m) * (1 / 0.81 - 1 / v) + (m - 0.075) / 0.81) / rows.numel()
    got = torch.autograd.grad(mean_variance_loss(x, *TARGET), x)[0]
    close(got.flatten(), want.flatten(), 1e-12)


def test_mean_variance_of_flat_images_is_finite():
    """A variance of 0 counts as 1e-8: a large finite loss that still pulls the mean."""
    x = torch.full((2, 1, 3, 3), 0.5, dtype=torch.float64).requires_grad_(True)
    loss = mean_variance_loss(x, *TARGET)
    close(loss.detach(), kl(times(0.5), times(1e-8), *TARGET)[0], 1e-10)
    close(torch.autograd.grad(loss, x)[0], torch.full_like(x, 0.425 / 0.81 / 18))


class Pictures:
    """A world of 2,000 images whose means and variances are known."""

    @staticmethod
    def data(n, seed):
        i = torch.arange(n)
        bright, loud = ((v % 2 * 2 - 1).double()[:, None, None, None] for v in (i, i // 2))
        return standard(n, 1, 2, 3) * (0.5 + 0.3 * loud).sqrt() + 0.1 + bright, None


class Points:
    """A world of points."""

    @staticmethod
    def data(n, seed):
        return 2 * normal(n, 2) + 1, None


def test_targets_of_a_world_are_averages_over_images():
    """Eq. 7's targets: mean over images of each one's mean, .1, and of each one's variance, .5.

    The pool's variance would be 1.5. For points they are the pool's. Flags come first.
    """
    args = parse("--mean_variance_weight 1")
    assert mean_variance_target(args, Pictures) == pytest.approx((0.1, 0.5), rel=1e-9)
    x = Points.data(2000, 0)[0]
    pool = float(x.mean()), float(x.var(correction=0))
    assert mean_variance_target(args, Points) == pytest.approx(pool, rel=1e-9)
    given = parse("--mean_variance_weight 1 --mean_variance_target 0.075 0.81")
    assert mean_variance_target(given, Pictures) == [0.075, 0.81]
    assert mean_variance_target(parse(""), None) is None  # off: nothing is measured


# ---- noise levels (Sec. 4.3) ---------------------------------------------------------------------

EVERY_STEP = [(N, k) for N in (1, 4, 8) for k in range(N)]
every_step = pytest.mark.parametrize("N, k", EVERY_STEP)
FULL = (0.0, 1.0)


def drawn(schedule, N, k, s, dm_range=FULL, ca_range=FULL, n=200):
    """Levels as the training loop draws them: spread over the range, then shifted.

    -> t_dm, t_ca (n,) float64.
    """
    range_dm, range_ca = noise_ranges(schedule, 1 - k / N, dm_range, ca_range)
    draw = Draws(0, k, "student", range(n))
    u_dm, u_ca = draw.spread("u", *range_dm), draw.spread("u_ca", *range_ca)
    return shift(u_dm.double(), s), shift(u_ca.double(), s)


def test_ranges_of_the_four_schedules():
    """Schedules "shared" and "full" leave both ranges alone, "hybrid" bounds CA's by u_k.

    "constrained" bounds both. Each range is cut, not replaced.
    """
    dm, ca = (0.02, 0.98), (0.1, 0.9)
    for u_k in (0.25, 0.5, 0.75):
        assert noise_ranges("shared", u_k, dm, ca) == noise_ranges("full", u_k, dm, ca) == (dm, ca)
        assert noise_ranges("constrained", u_k, dm, ca) == ((0.02, u_k), (0.1, u_k))
        assert noise_ranges("hybrid", u_k, dm, ca) == (dm, (0.1, u_k))
    assert noise_ranges("hybrid", 0.5, dm, (0.1, 0.3)) == (
        dm,
        (0.1, 0.3),
    )  # below the bound already
    low = (0.1, 0.3), (0.2, 0.4)
    assert noise_ranges("constrained", 0.5, *low) == low
    # nothing is left of the range: its upper end stays on the bound
    assert noise_ranges("hybrid", 0.5, dm, (0.6, 0.9))[1] == (0.5, 0.5)


@every_step
@pytest.mark.parametrize("s", [1.0, 2.0, 3.0])
def test_ca_never_sees_more_noise_than_the_input(N, k, s):
    """After the shift t_ca <= times[k] in "constrained" and "hybrid", and it goes all the way up.

    With "constrained" that holds of t_dm too, with the others DM covers everything. times[k] is
    shift(u_k).
    """
    t_k = step_grid(N, s)[k]
    assert t_k == pytest.approx(shift(1 - k / N, s), rel=1e-12)
    close(unshift(times(t_k), s), [1 - k / N])
    bounded = {"shared": (False, False), "full": (False, False)}
    bounded |= {"constrained": (True, True), "hybrid": (False, True)}
    for schedule, which in bounded.items():
        for t, below in zip(drawn(schedule, N, k, s), which):
            top = t_k if below else 1.0
            assert t.min() >= 0 and t.max() <= top
            u, reach = unshift(t, s), unshift(times(top), s)
            # uniform before the shift, from 0 to the bound
            even = (torch.arange(200, dtype=torch.float64) + 0.5) / 200 * reach
            assert (u.sort().values - even).abs().max() < 0.02 * reach


@every_step
@pytest.mark.parametrize("s", [1.0, 2.0, 3.0])
def test_paper_s_direction_is_the_house_s(N, k, s):
    """The paper's t = 1 - u: grid k / N, tau in [t_pre, 1], then t / (t + s (1 - t)).

    It is one minus ours, and tau_CA >= its generator's time.
    """

    def paper_shift(t):
        return t / (t + s * (1 - t))

    assert paper_shift(times(0.0, 1.0)).tolist() == [0, 1]
    assert s != 3 or paper_shift(0.75) == pytest.approx(0.5)
    t_pre, v = k / N, torch.linspace(0, 1, 11, dtype=torch.float64)
    (lo, hi), (lo_ca, hi_ca) = noise_ranges("hybrid", 1 - t_pre, FULL, FULL)
    tau_dm, tau_ca = paper_shift(v), paper_shift(t_pre + (1 - t_pre) * v)
    close(1 - shift(hi - (hi - lo) * v, s), tau_dm, 1e-12)
    close(1 - shift(hi_ca - (hi_ca - lo_ca) * v, s), tau_ca, 1e-12)
    generator_time = paper_shift(t_pre)
    assert 1 - step_grid(N, s)[k] == pytest.approx(generator_time)
    assert (tau_ca >= generator_time).all()
    assert (1 - drawn("hybrid", N, k, s)[1] >= generator_time - 1e-12).all()


@pytest.mark.parametrize("s", [2.0, 3.0])
@pytest.mark.parametrize("N, k", [(N, k) for N, k in EVERY_STEP if k])
def test_bound_belongs_before_the_shift(N, k, s):
    """Cutting at the shifted time and shifting once more exceeds the input's level.

    The raw range left unshifted, clipping, and the paper's time not turned round give other laws.
    """
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
    """--ca_range and --dm_range hold together with the bound: u in [LO, min(HI, u_k)]."""
    tops = {"full": (0.7, 0.9), "hybrid": (0.7, 0.5), "constrained": (0.5, 0.5)}
    for schedule, (dm_top, ca_top) in tops.items():
        t_dm, t_ca = drawn(schedule, 4, 2, 3.0, (0.1, 0.7), (0.3, 0.9))
        for t, lo, hi in ((t_dm, 0.1, dm_top), (t_ca, 0.3, ca_top)):
            u = unshift(t, 3.0)
            assert lo - 1e-6 <= u.min() < lo + 0.02 and hi - 0.02 < u.max() <= hi + 1e-6


OWN_RANGES = [(FULL, FULL), ((0.02, 0.98), (0.1, 0.9)), ((0.3, 1.0), (0.95, 1.0))]


@pytest.mark.parametrize("dm, ca", OWN_RANGES)
def test_one_step_knows_one_schedule(dm, ca):
    """N = 1, or the first step of any: hybrid, constrained and full draw from the same ranges."""
    for schedule in ("full", "constrained", "hybrid"):
        assert noise_ranges(schedule, 1.0, dm, ca) == (dm, ca)
    for N in (1, 4):
        for a, b, c in zip(*(drawn(schedule, N, 0, 3.0, dm, ca) for schedule in FOUR[1:])):
            assert torch.equal(a, b) and torch.equal(b, c)


# ---- where the terms come to rest ----------------------------------------------------------------
#
# Exact scores and students that are free: p(x | c) = N(1, .25) and p(x) = N(0, 1.25) in every
# dimension, the outputs of the four steps N(m_k, c_k^2) whatever the input. Guidance 3, shift 2.

CLASS, ALL = (1.0, 0.5), (0.0, 1.25**0.5)  # mean, standard deviation


def gaussian(mean, std, x_t, t):
    """E[x0 | x_t] under flow for x0 of N(mean, std^2).  x_t (B, n), t (B,)."""
    return posterior_mean(x_t, mean, std, 1 - t[:, None], t[:, None])


def gaussian_teacher(x_t, t, known):
    return gaussian(*(CLASS if known else ALL), x_t, t)


def mixture(m, c):
    """The exact fake of all steps' outputs together, in as many dimensions as x_t has."""

    def net(x_t, t, known):
        a, s = 1 - t[:, None], t[:, None]
        log_p = [
            torch.distributions.Normal(a * mean, (a**2 * std**2 + s**2).sqrt()).log_prob(x_t).sum(1)
            for mean, std in zip(m, c)
        ]
        outputs = torch.stack([gaussian(mean, std, x_t, t) for mean, std in zip(m, c)])
        return (torch.stack(log_p).softmax(0)[..., None] * outputs).sum(0)

    return net


def samples_of(knows_step, n_levels=32):
    """-> z, eps_dm, eps_ca (B, n) and B raw levels that fill (0, 1).

    Where the fake knows the step nothing joins the dimensions, and they serve as nodes of a
    quadrature, which is exact for a gradient that is linear. A mixture joins them: 16 dimensions
    then, and four pairs of opposite samples at each level.
    """
    level = (torch.arange(n_levels, dtype=torch.float64) + 0.5) / n_levels
    if knows_step:
        nodes = torch.meshgrid(unit_nodes(8), unit_nodes(8), indexing="ij")
        z, eps = (v.reshape(1, 64).expand(n_levels, 64) for v in nodes)
        return z, eps, eps, level
    half = [normal(4 * n_levels, 16, seed=seed) for seed in range(3)]
    return *(torch.cat([v, -v]) for v in half), level.repeat(8)


def resting_means(schedule, normalizer="none", knows_step=True, updates=100, rate=1.0):
    """Descend the script's gradients in (m_k, c_k) until they are 0.  -> m (4,)."""
    z, eps_dm, eps_ca, level = samples_of(knows_step)
    m, c = times(1, 1, 1, 1), times(0.5, 0.5, 0.5, 0.5)
    known, unknown = {"known": True}, {"known": False}
    flags = parse(f"--normalizer {normalizer} --guidance_scale 3")
    loss, terms = ablated_loss, [decoupled_dmd.Terms(flags)]
    if normalizer == "none":
        loss, terms = decoupled_dmd_loss, []
    for _ in range(updates):
        for k in range(4):
            ranges = noise_ranges(schedule, 1 - k / 4, FULL, FULL)
            at_dm, at_ca = (
                (eps, shift(lo + (hi - lo) * level, 2.0))
                for eps, (lo, hi) in zip((eps_dm, eps_ca), ranges)
            )
            fake = mixture(m[k : k + 1], c[k : k + 1]) if knows_step else mixture(m, c)
            at_t = at_dm, at_dm if schedule == "shared" else at_ca
            x, conds = m[k] + c[k] * z, (known, unknown, known)
            _, g_dm, g_ca, *_ = loss(x, gaussian_teacher, fake, FLOW_X0, *at_t, *conds, 3.0, *terms)
            m[k] -= rate * (g_dm + g_ca).mean()
            c[k] = (c[k] - rate * ((g_dm + g_ca) * z).mean()).clamp_min(1e-3)
    return m


RESTING = {  # schedule, normaliser, whether the fake knows the step: means after steps 1 to 4
    ("shared", "none", True): (2.174, 2.174, 2.174, 2.174),
    ("full", "none", True): (2.174, 2.174, 2.174, 2.174),
    ("constrained", "none", True): (2.174, 1.929, 1.589, 1.267),
    ("hybrid", "none", True): (2.174, 1.867, 1.487, 1.150),
    ("shared", "branch", True): (1.952, 1.952, 1.952, 1.952),
    ("constrained", "branch", True): (1.952, 1.755, 1.509, 1.253),
    ("hybrid", "branch", True): (1.952, 1.743, 1.476, 1.109),
    ("shared", "none", False): (2.174, 2.174, 2.174, 2.174),
    ("constrained", "none", False): (2.49, 1.98, 1.57, 1.24),
    ("hybrid", "none", False): (2.52, 1.97, 1.40, 0.82),
    ("constrained", "branch", False): (2.13, 1.77, 1.47, 1.21),
    ("hybrid", "branch", False): (2.14, 1.80, 1.41, 0.83),
}


@pytest.mark.parametrize("case, means", RESTING.items(), ids=lambda v: " ".join(map(str, v)))
def test_where_free_students_rest(case, means):
    """The table of docs/decoupled_dmd.md. The guided teacher's mean is 1.40, the data's 1.

    The sampler shows the last step's output. Constrained leaves it two thirds of the guidance,
    hybrid under two fifths, and less than none where the fake does not know the step.
    """
    schedule, normalizer, knows_step = case
    more = dict(updates=250, rate=0.1) if normalizer == "branch" else {}
    m = resting_means(schedule, normalizer, knows_step, **more)
    close(m, means, 2e-3 if knows_step else 0.03)
    one, (guided, _) = 1.0, guided_moments()
    assert guided == pytest.approx(1.40, abs=0.005)
    last = float(m[3])
    if schedule in ("shared", "full"):
        assert last > guided + 0.5  # guidance is overshot
    elif schedule == "constrained":
        assert 0.5 < (last - one) / (guided - one) < 0.7
    else:
        share = (last - one) / (guided - one)
        assert 0.25 < share < 0.4 if knows_step else share < -0.3


def guided_moments():
    """Mean and standard deviation of the guided teacher's samples, 64 Heun steps.

    Its ODE is affine: z = 0 ends at the mean, and z = 1 a standard deviation from there.
    """
    z, conds = times(0.0, 1.0)[:, None], ({"known": True}, {"known": False})
    x = FLOW_X0.sample(gaussian_teacher, z, step_grid(64, 2.0), *conds, 3.0, "heun")
    return float(x[0]), float(x[1] - x[0])


def rest(schedule, k, weight):
    """m_k where E[g_dm] + E[g_ca] = 0, with this weight of CA, if the fake knows the step.

    E[g_dm] = (m - 1) (1 - a K_c) and E[g_ca] = weight (a K_u m - 1 - a K_c (m - 1)), averaged over
    the levels of each. K = a v / (a^2 v + s^2), for the variance v of one class and of all.
    """
    level = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    pulls = []
    for lo, hi in noise_ranges(schedule, 1 - k / 4, FULL, FULL):
        t = shift(lo + (hi - lo) * level, 2.0)
        a = 1 - t
        pulls.append([(a**2 * v / (a**2 * v + t**2)).mean() for v in (CLASS[1] ** 2, ALL[1] ** 2)])
    (at_dm, _), (known, unknown) = pulls
    return float((1 - at_dm + weight * (1 - known)) / (1 - at_dm - weight * (known - unknown)))


@pytest.mark.parametrize("schedule", FOUR)
def test_resting_means_in_closed_form(schedule):
    """The script's gradients rest where the formula says, and elsewhere with CA's weight alpha."""
    means = resting_means(schedule)
    close(means, [rest(schedule, k, 2.0) for k in range(4)], 1e-6)
    assert all(abs(rest(schedule, k, 3.0) - m) > 0.02 for k, m in enumerate(means))


def test_more_guidance_hardly_helps_the_last_step_of_hybrid():
    """Guidance 3, 5, 7, 9: its last step's CA acts at clean levels alone, where it is small."""
    last = [rest("hybrid", 3, alpha - 1) for alpha in (3, 5, 7, 9)]
    assert last == pytest.approx([1.150, 1.226, 1.273, 1.304], abs=0.001)
    assert all(rest("constrained", 3, alpha - 1) > m for alpha, m in zip((3, 5, 7, 9), last))


def test_one_weight_of_ca_keeps_the_guidance_if_levels_are_shared():
    """--schedule shared --ca_weight .27: every step rests at the guided teacher's mean, 1.40.

    With levels of their own no weight does that: where the last step is there, the first is beyond.
    """
    (goal, _), low, high = guided_moments(), 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rest("shared", 0, 2 * middle) < goal else (low, middle)
    assert low == pytest.approx(0.272, abs=0.002)
    assert [rest("shared", k, 2 * low) for k in range(4)] == pytest.approx([goal] * 4, abs=1e-6)
    assert rest("constrained", 3, 2 * 4.65) == pytest.approx(goal, abs=0.005)
    assert rest("constrained", 0, 2 * 4.65) > goal + 2.0
    assert rest("hybrid", 3, 2 * 4.65) < goal - 0.07


def pulls(mean, std, weight, most, n_levels=512):
    """E[g] and E[g z], which move mean and spread of N(mean, std^2): CA on u in [0, most]."""
    z, eps_dm, eps_ca, level = samples_of(True, n_levels)
    x, conds = mean + std * z, ({"known": True}, {"known": False}, {"known": True})
    at = ((eps_dm, shift(level, 2.0)), (eps_ca, shift(most * level, 2.0)))
    fake = mixture([mean], [std])
    out = decoupled_dmd_loss(x, gaussian_teacher, fake, FLOW_X0, *at, *conds, 1 + 2 * weight)
    g = out[1] + out[2]
    return float(g.mean()), float((g * z).mean())


def test_less_ca_at_clean_levels_alone_keeps_mean_and_spread_of_guidance():
    """--schedule full --ca_range 0 .693 --ca_weight .404: both moments are the guided teacher's.

    At all levels a weight that is right for the mean, .272, leaves nearly three times its spread.
    """
    mean, std = guided_moments()
    assert std == pytest.approx(0.1, abs=0.002)
    of_mean, of_spread = pulls(mean, std, 0.404, 0.693)
    assert abs(of_mean) < 2e-3 and abs(of_spread) < 1e-4
    of_mean, of_spread = pulls(mean, std, 0.272, 1.0)  # below 0: it widens
    assert abs(of_mean) < 1e-3 and of_spread < -0.008
    assert abs(pulls(mean, 0.279, 0.272, 1.0)[1]) < 1e-4
    assert pulls(mean, std, 0.404, 0.8)[0] < -0.05  # too much of it moves the mean on
    assert pulls(mean, std, 0.3, 0.6)[0] > 0.1  # too little does not get there


# ---- the sampler ---------------------------------------------------------------------------------


def test_steps_of_z_image():
    """Eight steps at shift 3: 1, .9545, .9, .8333, .75, .6429, .5, .3, 0."""
    want = [1, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0]
    assert step_grid(8, 3.0) == pytest.approx(want, rel=1e-12, abs=0)
    rounded = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]
    assert [round(t, 4) for t in step_grid(8, 3.0)] == rounded


class Diary:
    """The ring's exact network under a schedule, which notes its calls; predicts x0."""

    def __init__(self, schedule):
        self.net, self.seen = oracle(overlapping(), schedule), []

    def __call__(self, x_t, t, label):
        self.seen.append((x_t.clone(), t.clone(), label))
        return self.net(x_t, t, label)


def noise(name):
    """Noise of 6 points: "z" and "renoise0", "renoise1", ..."""
    return normal(6, 2, seed=9 if name == "z" else 100 + int(name.removeprefix("renoise")))


def only_z(name):
    assert name == "z", f"asked for {name}"
    return noise(name)


def setting(N, s=3.0):
    """-> grid, z, cond."""
    return step_grid(N, s)[:-1], noise("z"), {"label": torch.arange(6) % NULL}


@flow_and_vp
@pytest.mark.parametrize("renoise", ["sde", "ode"])
@pytest.mark.parametrize("N", [1, 2, 4, 8])
def test_calls_of_the_sampler(schedule, renoise, N):
    """N steps are N calls, all with the condition, at the grid's times.

    A rollout over k + 1 times makes k of them and ends in the state that the sampler calls the
    network with next. "sde" asks for noise between calls, by index, "ode" never.
    """
    (grid, z, cond), diffusion = setting(N), Diffusion(schedule, "x0")
    student, asked = Diary(schedule), []

    def noted(name):
        asked.append(name)
        return noise(name)

    sample(student, diffusion, noted, grid, cond, renoise)
    between = [f"renoise{i}" for i in range(N - 1)] if renoise == "sde" else []
    assert len(student.seen) == N and asked == ["z", *between]
    assert [float(t[0]) for _, t, _ in student.seen] == grid
    assert all((t == t[0]).all() and t.shape == (6,) for _, t, _ in student.seen)
    for _, _, label in student.seen:
        assert torch.equal(label, cond["label"]) and (label < NULL).all()
    assert torch.equal(student.seen[0][0], z)
    for k in range(N):
        own = Diary(schedule)
        x_in = rollout(own, diffusion, noise, grid[: k + 1], cond, renoise)
        assert len(own.seen) == k and torch.equal(x_in, student.seen[k][0])
    assert torch.equal(rollout(None, diffusion, only_z, grid[:1], {}, renoise), z)


@flow_and_vp
def test_sde_takes_the_noise_it_is_given(schedule):
    """x_{t'} = alpha' x0 + sigma' fresh, with the index of the step just made; it is the default.

    The sample is the last call's x0, with nothing added.
    """
    (grid, z, cond), diffusion = setting(3), Diffusion(schedule, "x0")
    net, x_t = oracle(overlapping(), schedule), z
    for i, t in enumerate(grid):
        x0 = net(x_t, z.new_full((6,), t), cond["label"])
        if i < 2:
            t_next = times(grid[i + 1])
            alpha, sigma = float(schedule.alpha(t_next)), float(schedule.sigma(t_next))
            x_t = alpha * x0 + sigma * noise(f"renoise{i}")
    got = sample(net, diffusion, noise, grid, cond, "sde")
    close(got, x0, 1e-12)
    assert torch.equal(sample(net, diffusion, noise, grid, cond), got)
    other = sample(net, diffusion, lambda name: noise(name) + (name != "z"), grid, cond, "sde")
    assert not torch.allclose(got, other)


@flow_and_vp
def test_ode_is_euler(schedule):
    """Rule "ode" keeps the noise that the student implies: Euler for flow, DDIM for VP."""
    (grid, z, cond), diffusion = setting(4), Diffusion(schedule, "x0")
    net = oracle(overlapping(), schedule)

    def predict(x, t):
        return diffusion.x0_eps(net, x, t, **cond)

    euler = sample_ode(predict, schedule, z, grid + [0.0], "euler")
    close(sample(net, diffusion, only_z, grid, cond, "ode"), euler, 1e-12)
    if isinstance(schedule, Flow):
        x, ring = z, overlapping()
        for t, t_next in zip(grid, grid[1:]):
            x = x + (t_next - t) * ring(x, z.new_full((6,), t), cond["label"])
        close(rollout(net, diffusion, only_z, grid, cond, "ode"), x, 1e-12)


def test_sampler_leaves_no_graph():
    """sample runs without gradients, whatever the network; a rollout leaves that to its caller."""
    student, (grid, _, cond) = perturbed(ring_network(), std=0.2).double(), setting(3)
    assert not sample(student, FLOW_V, noise, grid, cond, "sde").requires_grad
    assert rollout(student, FLOW_V, noise, grid, cond, "sde").requires_grad


# ---- tests/guided_parts.py -----------------------------------------------------------------------


def test_parts_of_the_distance_to_the_guided_teacher():
    """Means 3 along the way of 4 that guidance leads, and 2 beside it; deviations 1 and 3."""
    eye = torch.eye(3, dtype=torch.float64)
    start, goal = (times(0, 0, 1), eye), (times(4, 0, 1), eye)
    row = guided_parts.parts((times(3, 2, 1), 9 * eye), goal, start)
    assert list(row) == guided_parts.COLUMNS
    close(list(row.values()), [5 + 12, 5, 12, 0.75, 4], 1e-9)
    assert guided_parts.parts(start, goal, start)["kept"] == 0
    close(list(guided_parts.parts(goal, goal, start).values()), [0, 0, 0, 1, 0], 1e-9)
