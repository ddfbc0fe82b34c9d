"""phased_dmd.py against the paper's formulas (2510.27684 v3).

The kernel, the subinterval target and its weight, the matching direction, the phases.
"""

import types

import numpy as np
import pytest
import torch
from phased_fig2 import experiment
from test_dmd_math import DoubleOutput, close, normal, posterior_mean, unit_nodes

import dmd
import phased_dmd
from models.diffusion import (
    VP,
    Diffusion,
    Flow,
    add_noise,
    expand,
    from_x0_eps,
    shift,
    step_grid,
    to_x0_eps,
    transition,
    unshift,
)
from models.draws import Draws
from phased_dmd import (
    fake_score_loss,
    inner_taper,
    naive_target,
    no_taper,
    normalized_direction,
    paper_direction,
    phased_dmd_loss,
    subinterval_target,
    taper,
)


class Trigonometric:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): a third schedule; the formulas hold for any."""

    def alpha(self, t):
        return torch.cos(torch.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(torch.pi / 2 * t)


SCHEDULES = {
    "flow": Flow(),
    "vp": VP(),
    "vp, zero terminal snr": VP(zero_snr=True),
    "trigonometric": Trigonometric(),
}
KINDS = ("flow_v", "x0", "eps", "vp_v", "score")
# (s, t), some with b^2 < 0.1
LEVELS = [(0, 0.3), (0.2, 0.21), (0.5, 0.53), (0.5, 0.7), (0.625, 0.95), (0.8333, 0.84)]
LEVELS += [(0.8333, 0.9)]

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
flow_and_vp = pytest.mark.parametrize("schedule", [Flow(), VP()], ids=["flow", "vp"])


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def levels(schedule):
    """The levels as s, t, and alpha_s, sigma_s, alpha_t, sigma_t, a, b there.  (7,) each."""
    s, t = times(*LEVELS).T
    at_s, at_t = (schedule.alpha(s), schedule.sigma(s)), (schedule.alpha(t), schedule.sigma(t))
    return s, t, *at_s, *at_t, *transition(schedule, s, t)


def flow(kind="flow_v"):
    return Diffusion(Flow(), kind)


# ---- the kernel ----------------------------------------------------------------------------------


@every_schedule
def test_kernel_composes(schedule):
    """Noising from 0 to s and on to t is noising to t; likewise from any r < s (Eq. 2, 3).

    alpha_s a = alpha_t and a^2 sigma_s^2 + b^2 = sigma_t^2.
    """
    s, t, alpha_s, sigma_s, alpha_t, sigma_t, a, b = levels(schedule)
    close(alpha_s * a, alpha_t, 1e-13)
    close(a**2 * sigma_s**2 + b**2, sigma_t**2, 1e-13)
    for r in (0.5 * s, 0.9 * s):
        (a_rs, b_rs), (a_rt, b_rt) = transition(schedule, r, s), transition(schedule, r, t)
        close(a_rs * a, a_rt, 1e-12)
        close(a**2 * b_rs**2 + b**2, b_rt**2, 1e-12)


@every_schedule
def test_kernel_ends(schedule):
    """From s = 0 the kernel is the schedule, (alpha_t, sigma_t), exactly; to t = s it is (1, 0).

    The taper is 0 there, not 0 times infinity.
    """
    t = times(0.1, 0.5, 0.9, 1.0)
    a, b = transition(schedule, 0 * t, t)
    assert torch.equal(a, schedule.alpha(t)) and torch.equal(b, schedule.sigma(t))
    a, b = transition(schedule, t, t)
    assert (a == 1).all() and not b.any()
    assert torch.equal(taper(Diffusion(schedule, "flow_v"), t, t), torch.zeros_like(t))


def test_kernel_of_flow():
    """alpha_{t|s} = (1 - t) / (1 - s), sigma_{t|s}^2 = t^2 - ((1 - t) s / (1 - s))^2."""
    s, t, *_, a, b = levels(Flow())
    close(a, (1 - t) / (1 - s))
    close(b**2, t**2 - ((1 - t) * s / (1 - s)) ** 2)


# ---- the target ----------------------------------------------------------------------------------


@every_schedule
def test_target_is_equations_11_and_12(schedule):
    """flow_v: (alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 b) eps - x_s / alpha_s.

    x0: x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 b) eps. eps: sigma_t / b eps. score: the
    kernel's own, -eps / b.
    """
    s, t, alpha_s, sigma_s, alpha_t, sigma_t, _, b = (v[:, None, None] for v in levels(schedule))
    x_s, eps = normal(7, 2, 3), normal(7, 2, 3, seed=1)
    want = {
        "flow_v": (alpha_s**2 * sigma_t + alpha_t * sigma_s**2) / (alpha_s**2 * b) * eps
        - x_s / alpha_s,
        "x0": x_s / alpha_s - alpha_t * sigma_s**2 / (alpha_s**2 * b) * eps,
        "eps": sigma_t / b * eps,
        "score": -eps / b,
    }
    for kind, target in want.items():
        diffusion = Diffusion(schedule, kind)
        close(subinterval_target(diffusion, x_s, eps, s.flatten(), t.flatten()), target)


def test_target_of_flow():
    """[t + (1 - t) s^2 / (1 - s)^2] / b eps - x_s / (1 - s).

    The coefficients reach 6 and 15 at s = 5/6, 16 and 45 at s = 15/16.
    """
    s, t = times(*LEVELS).T
    x_s, eps = normal(7, 4), normal(7, 4, seed=1)
    b = (t**2 - ((1 - t) * s / (1 - s)) ** 2).sqrt()
    want = ((t + (1 - t) * s**2 / (1 - s) ** 2) / b)[:, None] * eps - x_s / (1 - s)[:, None]
    close(subinterval_target(flow(), x_s, eps, s, t), want)
    one, zero = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    s, t = times(5 / 6, 15 / 16), times(0.8436, 0.9409)  # where the taper sets in, b^2 = 0.1
    close(subinterval_target(flow(), one, zero, s, t)[:, 0], [-6, -16])
    close(subinterval_target(flow(), zero, one, s, t)[:, 0], [15, 45], 0.01)


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
def test_target_at_clean_level_is_ordinary_training(schedule, kind):
    """At s = 0, x_s is x0: the target is the usual one, bit for bit, and so is the naive one."""
    t, diffusion = times(0.1, 0.4, 0.7, 1.0), Diffusion(schedule, kind)
    x0, eps = normal(4, 3), normal(4, 3, seed=1)
    target = subinterval_target(diffusion, x0, eps, 0 * t, t)
    assert torch.equal(target, from_x0_eps(kind, x0, eps, schedule.alpha(t), schedule.sigma(t)))
    assert torch.equal(target, naive_target(diffusion, x0, eps, 0 * t, t))
    assert kind != "flow_v" or torch.equal(target, eps - x0)


@every_schedule
def test_target_at_pure_noise_is_finite(schedule):
    """At t = 1 (alpha = 0, b = 1, but for VP's rest) nothing divides by alpha_t.

    flow_v: eps - x_s / alpha_s. x0: x_s / alpha_s.
    """
    s, one = times(0.0, 0.5, 0.9), torch.ones(3, dtype=torch.float64)
    x_s, eps = normal(3, 4), normal(3, 4, seed=1)
    y = {k: subinterval_target(Diffusion(schedule, k), x_s, eps, s, one) for k in KINDS}
    assert all(target.isfinite().all() for target in y.values())
    if float(schedule.alpha(one[:1])) < 1e-12:
        close(y["flow_v"], eps - x_s / schedule.alpha(s)[:, None])
        close(y["x0"], x_s / schedule.alpha(s)[:, None])


@every_schedule
def test_targets_of_all_kinds_are_one_pair(schedule):
    """Each kind's target is the same split of x_t into x0 and eps.

    y_x = (x_t - sigma_t y_eps) / alpha_t and y_v = y_eps - y_x.
    """
    s, t, *_, alpha_t, sigma_t, a, b = levels(schedule)
    x_s, eps = normal(7, 4), normal(7, 4, seed=1)
    x_t = a[:, None] * x_s + b[:, None] * eps
    y = {k: subinterval_target(Diffusion(schedule, k), x_s, eps, s, t) for k in KINDS}
    close(y["x0"], (x_t - sigma_t[:, None] * y["eps"]) / alpha_t[:, None], 1e-9)
    close(y["flow_v"], y["eps"] - y["x0"])
    for kind in KINDS:
        x0, noise = to_x0_eps(y[kind], kind, x_t, alpha_t, sigma_t)
        close(x0, y["x0"], 1e-8)
        close(noise, y["eps"], 1e-8)


def test_target_in_single_precision():
    """float32 is enough where the taper lets a sample count.

    At s = 15/16 it is within 1e-4 of float64 for b^2 > 0.005.
    """
    t = torch.linspace(0.938, 1.0, 400, dtype=torch.float64)
    s, x_s, eps = torch.full_like(t, 15 / 16), normal(400, 5), normal(400, 5, seed=1)
    b = (t**2 - ((1 - t) * 15) ** 2).sqrt()  # s / (1 - s) = 15
    assert float(b.min()) ** 2 > 0.005
    exact = ((t + (1 - t) * 15**2) / b)[:, None] * eps - 16 * x_s
    got = subinterval_target(flow(), *(v.float() for v in (x_s, eps, s, t)))
    assert got.dtype == torch.float32
    assert ((got - exact).square().mean(1) / exact.square().mean(1)).sqrt().max() < 1e-4


# ---- what a fake score learns --------------------------------------------------------------------


class Mixture:
    """A Gaussian mixture on the line: weights, means, standard deviations (K,)."""

    def __init__(self, weight, mean, std):
        self.weight, self.mean, self.std = (
            torch.as_tensor(v, dtype=torch.float64) for v in (weight, mean, std)
        )

    def noised(self, a, b):
        """The law of a x + b eps."""
        return Mixture(self.weight, a * self.mean, (a**2 * self.std**2 + b**2).sqrt())

    def log_density(self, x):
        z = (x[..., None] - self.mean) / self.std
        unnormalised = torch.logsumexp(self.weight.log() - self.std.log() - 0.5 * z**2, -1)
        return unnormalised - 0.5 * np.log(2 * np.pi)

    def score(self, x):
        z = (x[..., None] - self.mean) / self.std
        share = torch.softmax(self.weight.log() - self.std.log() - 0.5 * z**2, -1)
        return (share * -z / self.std).sum(-1)

    def sample(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weight, n, replacement=True, generator=g)
        return self.mean[k] + self.std[k] * torch.randn(n, generator=g, dtype=torch.float64)


# A student's x_s. Its components are narrower than sigma_s, so there is no x0 with
# x_s = alpha_s x0 + sigma_s eps.
STUDENT = Mixture([0.2, 0.5, 0.3], [-0.6, 0.1, 0.9], [0.1, 0.2, 0.05])


def wanted_output(kind, score, x_t, alpha, sigma):
    """What a network of this kind says at x_t if grad log p_t there is score.

    It is the teacher's own convention (Eq. 5, assumption A2).
    """
    return from_x0_eps(kind, *to_x0_eps(score, "score", x_t, alpha, sigma), alpha, sigma)


def naive_output(kind, score, x_t, alpha, sigma, a, b):
    """What the naive target teaches instead.

    E[x_s | x_t] = (x_t + b^2 score) / a is taken for x0, and E[eps | x_t] = -b score for eps.
    """
    mean = (x_t + expand(b, x_t) ** 2 * score) / expand(a, x_t)
    return from_x0_eps(kind, mean, -expand(b, x_t) * score, alpha, sigma)


def z_scores(residual, x):
    """mean / standard error of residual f(x) for f = 1, x, sin x, x^2."""
    products = torch.stack([residual * f for f in (torch.ones_like(x), x, x.sin(), x**2)])
    return products.mean(1) / products.std(1) * len(x) ** 0.5


def regression_sample(schedule, s, t, n=400_000):
    """-> x_s, eps, x_t, the score at x_t, and the rows s, t, alpha_t, sigma_t, a, b.  (n,) each."""
    one = times(s), times(t)
    a, b = transition(schedule, *one)
    alpha, sigma = schedule.alpha(one[1]), schedule.sigma(one[1])
    x_s, eps = STUDENT.sample(n, 5), normal(n, seed=6)
    x_t = a * x_s + b * eps
    rows = (v.expand(n) for v in (*one, alpha, sigma, a, b))
    return x_s, eps, x_t, STUDENT.noised(a, b).score(x_t), *rows


three_schedules = pytest.mark.parametrize(
    "schedule", [Flow(), VP(), Trigonometric()], ids=["flow", "vp", "trigonometric"]
)


@three_schedules
@pytest.mark.parametrize("s, t", [(0.5, 0.7), (0.8333, 0.86)])
def test_target_is_unbiased_and_the_naive_one_is_not(schedule, s, t):
    """E[(y - v_true(x_t)) f(x_t)] = 0 for f = 1, x, sin x, x^2 (Eq. 11 and App. A), for all kinds.

    v_true is from the score of p(x_t) = int p(x_t | x_s) p(x_s); z < 3.5 at 400,000 samples.
    eps - x_s fails that, and passes against -x_t / a - (b + b^2 / a) grad log p(x_t), which is what
    it teaches.
    """
    x_s, eps, x_t, score, s, t, alpha, sigma, a, b = regression_sample(schedule, s, t)
    for kind in KINDS:
        diffusion = Diffusion(schedule, kind)
        true = wanted_output(kind, score, x_t, alpha, sigma)
        wrong = naive_output(kind, score, x_t, alpha, sigma, a, b)
        y = subinterval_target(diffusion, x_s, eps, s, t)
        naive = naive_target(diffusion, x_s, eps, s, t)
        assert z_scores(y - true, x_t).abs().max() < 3.5, kind
        assert z_scores(naive - true, x_t).abs().max() > 50, kind
        assert z_scores(naive - wrong, x_t).abs().max() < 3.5, kind
        if kind == "flow_v":
            close(wrong, -x_t / a - (b + b**2 / a) * score)
            close(true, -x_t / alpha - (sigma + sigma**2 / alpha) * score, 1e-9)


def conditional_mean(target, diffusion, law, s, t, x_t):
    """E[target | x_t] by the trapezoid rule over x_s of this law: the optimum of the regression.

    s, t (1,), x_t (1, n) -> (1, n).
    """
    a, b = transition(diffusion.schedule, s, t)
    x_s = torch.linspace(-6, 6, 6001, dtype=torch.float64)[:, None]  # (grid, 1)
    eps = (x_t - a * x_s) / b
    weight = torch.softmax(law.log_density(x_s) - 0.5 * eps**2, 0)  # p(x_s | x_t)
    y = target(diffusion, x_s.expand_as(eps)[None], eps[None], s, t)[0]
    return (weight * y).sum(0, keepdim=True)


@three_schedules
@pytest.mark.parametrize("s, t", [(0.5, 0.7), (0.8333, 0.86)])
def test_matching_direction_where_student_and_teacher_agree(schedule, s, t):
    """p_fake = p_real: with the optimum of the unbiased regression g = 0 everywhere.

    With the naive one v_fake - v_real = x_t (1/alpha_t - 1/a) + [(sigma_t + sigma_t^2/alpha_t) -
    (b + b^2/a)] grad log p, so that g pushes a perfect student away.
    """
    s, t, x_t = times(s), times(t), torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)[None]
    (a, b), alpha, sigma = transition(schedule, s, t), schedule.alpha(t), schedule.sigma(t)
    data = Mixture([0.25, 0.45, 0.3], [-1.5, 0.0, 1.0], [0.2, 0.1, 0.3])
    law = data.noised(schedule.alpha(s), schedule.sigma(s))  # data, noised to s
    score = law.noised(a, b).score(x_t)
    real, student = to_x0_eps(score, "score", x_t, alpha, sigma)[0], normal(1, 61)
    lam = alpha / (alpha * sigma + sigma**2)
    shifted = x_t * (1 / alpha - 1 / a) + ((sigma + sigma**2 / alpha) - (b + b**2 / a)) * score
    for kind in KINDS:
        diffusion = Diffusion(schedule, kind)
        unbiased, naive = (
            to_x0_eps(conditional_mean(target, diffusion, law, s, t, x_t), kind, x_t, alpha, sigma)[
                0
            ]
            for target in (subinterval_target, naive_target)
        )
        for direction in (paper_direction, normalized_direction):
            g = direction(student, real, unbiased, diffusion, s, t)
            assert g.abs().max() < 1e-7, kind
        if kind == "flow_v":
            g = paper_direction(student, real, naive, diffusion, s, t)
            close(g, -lam * a * shifted, 1e-7)
            assert g.abs().max() > 0.05


@every_schedule
def test_variance_of_the_target(schedule):
    """Data N(0, c^2): Var(y_v | x_t) in closed form, with V_t = alpha_t^2 c^2 + sigma_t^2.

    It is sigma_t^2 (alpha_t + sigma_t)^2 / (b^2 V_t) (c^2 + sigma_s^2 / alpha_s^2), for flow
    t^2 / (b^2 V_t) (c^2 + s^2 / (1 - s)^2): 26 at s = 5/6 and 226 at s = 15/16 at t = 1, where
    ordinary training has 1.
    """
    c, diffusion = 0.6, Diffusion(schedule, "flow_v")
    s, t, alpha_s, sigma_s, alpha_t, sigma_t, a, b = levels(schedule)
    z, eps = grid(30, 2)
    x_s = (alpha_s**2 * c**2 + sigma_s**2).sqrt()[:, None] * z
    x_t = a[:, None] * x_s + b[:, None] * eps
    y = subinterval_target(diffusion, x_s, eps.expand(7, -1), s, t)
    v = alpha_t**2 * c**2 + sigma_t**2
    got = (y - linear_fit(x_t, y)(x_t)).square().mean(1)
    want = sigma_t**2 * (alpha_t + sigma_t) ** 2 / (b**2 * v) * (c**2 + sigma_s**2 / alpha_s**2)
    close(got, want, 1e-8)
    if isinstance(schedule, Flow):
        close(got, t**2 / (b**2 * v) * (c**2 + s**2 / (1 - s) ** 2), 1e-8)
        s, one = times(0, 5 / 6, 15 / 16), torch.ones(3, dtype=torch.float64)
        x_s = (((1 - s) ** 2 + s**2).sqrt()[:, None]) * z  # c = 1
        y = subinterval_target(diffusion, x_s, eps.expand(3, -1), s, one)
        close((y - linear_fit(eps, y)(eps)).square().mean(1), [1, 26, 226])


# ---- the loss ----------------------------------------------------------------------------------


@every_schedule
def test_loss_is_equation_13(schedule):
    """clamp(1/b^2, 0, 10) ||b F - (e eps - b / alpha_s x_s)||^2, at x_t = a x_s + b eps.

    e = (alpha_s^2 sigma_t + alpha_t sigma_s^2) / alpha_s^2. That is min(1, 10 b^2) ||F - y_v||^2,
    and its mean over the batch is taken, each sample with its own s and t. Untapered it is Eq. 11.
    """
    s, t, alpha_s, sigma_s, alpha_t, sigma_t, a, b = levels(schedule)
    x_s, eps, output, seen = normal(7, 2, 3), normal(7, 2, 3, seed=1), normal(7, 2, 3, seed=2), {}

    def net(x_t, t, label):
        seen.update(x_t=x_t, t=t, label=label)
        return DoubleOutput.apply_to(output)

    diffusion = Diffusion(schedule, "flow_v")
    arguments = net, diffusion, x_s, eps, s, t, {"label": 5}
    loss = fake_score_loss(*arguments)
    assert torch.equal(seen["t"], t) and seen["label"] == 5
    close(seen["x_t"], a[:, None, None] * x_s + b[:, None, None] * eps, 1e-13)
    e = ((alpha_s**2 * sigma_t + alpha_t * sigma_s**2) / alpha_s**2)[:, None, None]
    f = b[:, None, None]
    residual = f * output - (e * eps - f / alpha_s[:, None, None] * x_s)
    close(loss, ((1 / b**2).clamp(0, 10)[:, None, None] * residual.square()).mean())
    y = subinterval_target(diffusion, x_s, eps, s, t)
    tapered = taper(diffusion, s, t)
    close(tapered, (10 * b**2).clamp_max(1), 1e-13)
    assert 0 < int((tapered < 0.999).sum()) < 7
    close(loss, (tapered[:, None, None] * (output - y).square()).mean())
    close(fake_score_loss(*arguments, weight=no_taper), (output - y).square().mean())
    naive = (tapered[:, None, None] * (output - (eps - x_s)).square()).mean()
    close(fake_score_loss(*arguments, target=naive_target), naive)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_at_clean_level_is_dmd_s(kind):
    """s = 0 without the taper is dmd.py's fake score loss (Eq. 8), whatever kind and schedule.

    With the taper it is weighted by min(1, 10 sigma_t^2); the default leaves it out there.
    """
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    x, eps, output = normal(6, 4), normal(6, 4, seed=1), normal(6, 4, seed=2)

    def net(x_t, t):
        return DoubleOutput.apply_to(output + x_t)

    for schedule in SCHEDULES.values():
        diffusion = Diffusion(schedule, kind)
        want = dmd.fake_score_loss(net, diffusion, x, eps, t, {})
        for weight in (no_taper, inner_taper):
            got = fake_score_loss(net, diffusion, x, eps, 0 * t, t, {}, weight=weight)
            close(got, want)
    y = from_x0_eps(kind, x, eps, 1 - t, t)
    error = (output + add_noise(Flow(), x, eps, t) - y).square().mean(1)
    got = fake_score_loss(net, flow(kind), x, eps, 0 * t, t, {})
    close(got, ((10 * t**2).clamp_max(1) * error).mean())


def test_taper_of_flow_acts_near_s_only():
    """b^2 < 0.1, where the taper acts, is the first 5 to 10 % of (s, 1).

    That is t < .55 from s = .5, t < .8436 from 5/6, t < .9409 from 15/16.
    """
    s = times(0.5, 5 / 6, 15 / 16)
    ends = times(0.55, 0.8436, 0.9409)
    close(taper(flow(), s, ends + 1e-4), torch.ones(3))
    assert (taper(flow(), s, ends - 1e-4) < 0.9999).all()
    share = (ends - s) / (1 - s)
    assert 0.05 < float(share.min()) and float(share.max()) < 0.1 + 1e-9
    t = times(0.51, 0.52, 0.53, 0.54)
    close(taper(flow(), 0 * t + 0.5, t), 10 * (t**2 - (1 - t) ** 2))  # sigma_{t|.5}^2 = 2 t - 1
    close(taper(flow(), 0 * t + 0.5, t, high=1.0), 2 * t - 1)


@every_schedule
def test_inner_taper_is_off_at_clean_level_only(schedule):
    """Row by row: Eq. 13's weight where s > 0, bit for bit, and 1 where s = 0, also at t = 0."""
    s, t = times((0.0, 0.05), (0.2, 0.21), (0.5, 0.53), (0.0, 0.0), (0.8333, 0.9)).T
    diffusion = Diffusion(schedule, "flow_v")
    got, full = inner_taper(diffusion, s, t), taper(diffusion, s, t)
    assert torch.equal(got[s > 0], full[s > 0]) and (got[s == 0] == 1).all()
    assert full[0] < 1 and torch.equal(no_taper(diffusion, s, t), torch.ones_like(t))
    assert (
        got.dtype == t.dtype and inner_taper(diffusion, s.float(), t.float()).dtype == torch.float
    )


# ---- Gaussians, where everything is known --------------------------------------------------------


def grid(n, dimensions):
    """n^dimensions equally weighted nodes with the normal's first two moments, also of products.

    -> `dimensions` rows (1, N).
    """
    return [v.reshape(1, -1) for v in torch.meshgrid(*[unit_nodes(n)] * dimensions, indexing="ij")]


def linear_fit(x, y):
    """Per row the least-squares line of y over x.  x, y (B, N) -> a function of (B, N)."""
    w = ((x - x.mean(1, True)) * y).mean(1, True) / (x - x.mean(1, True)).square().mean(1, True)
    return lambda x_new: y.mean(1, True) + w * (x_new - x.mean(1, True))


def fitted_by_loss(diffusion, x_s, eps, s, t, **variant):
    """The minimiser of fake_score_loss over networks w x_t + b with one (w, b) a row.

    x_s, eps (B, N), s, t (B,) -> w, b (B, 1).
    """

    def loss(wb):
        def net(x_t, t):
            return DoubleOutput.apply_to(wb[0] * x_t + wb[1])

        return fake_score_loss(net, diffusion, x_s, eps, s, t, {}, **variant)

    zero = torch.zeros(2, len(s), 1, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(loss, zero).flatten()
    curvature = torch.autograd.functional.hessian(loss, zero).reshape(len(slope), -1)
    # the loss is quadratic in (w, b): one Newton step
    return (-torch.linalg.solve(curvature, slope)).reshape(zero.shape)


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
def test_fake_score_optimum_is_the_posterior_mean(schedule, kind):
    """Data N(m, c^2), x_s made from it: the best w x_t + b under Eq. 13 is E[x0 | x_t].

    Read as x0, with and without the taper, though no x0 was seen. With the naive target it is
    E[x_s | x_t] passed off as x0, far off.
    """
    m, c, diffusion = 0.7, 0.6, Diffusion(schedule, kind)
    s, t, alpha_s, sigma_s, alpha_t, sigma_t, a, b = levels(schedule)
    z, noise, eps = grid(10, 3)
    x_s, eps = alpha_s[:, None] * (m + c * z) + sigma_s[:, None] * noise, eps.expand(7, -1)
    x_t = a[:, None] * x_s + b[:, None] * eps
    want = posterior_mean(x_t, m, c, alpha_t[:, None], sigma_t[:, None])

    def x0(**variant):
        weight, bias = fitted_by_loss(diffusion, x_s, eps, s, t, **variant)
        return to_x0_eps(weight * x_t + bias, kind, x_t, alpha_t, sigma_t)[0]

    close(x0(), want, 1e-7)
    close(x0(weight=no_taper), want, 1e-7)
    off = (x0(target=naive_target) - want).square().mean(1).sqrt()
    close(off[0], 0, 1e-9)  # s = 0
    assert off[1:].min() > 0.02


def kl(mean, variance, mean_real, variance_real):
    """KL(N(mean, variance) || N(mean_real, variance_real))."""
    distance = (variance + (mean - mean_real) ** 2) / variance_real
    return 0.5 * (torch.log(variance_real / variance) + distance - 1)


def noised_kl(m, kappa, m0, c0, schedule, s, t):
    """KL at t between x_s = m + kappa z, noised from s to t, and data N(m0, c0^2), noised to t."""
    (a, b), alpha, sigma = transition(schedule, s, t), schedule.alpha(t), schedule.sigma(t)
    return kl(a * m, a**2 * kappa**2 + b**2, alpha * m0, alpha**2 * c0**2 + sigma**2)


def loss_of(x_s, x0, real, fake, schedule, s, t, direction):
    """phased_dmd_loss where teacher and fake say these x0.  x_s, x0, real, fake (B, ...)."""
    networks = (lambda x_t, t: real), (lambda x_t, t: fake)
    at_t = Diffusion(schedule, "x0"), torch.zeros_like(x_s), s, t
    return phased_dmd_loss(x_s, x0, *networks, *at_t, {}, {}, {}, 1.0, direction)


def gaussian_student(schedule, s, t, m, kappa, m0, c0, target=subinterval_target):
    """A student x_s = m + kappa z with m, kappa leaves, one row a noise level.

    With the exact teacher of data N(m0, c0^2) and the fake that target teaches.
    -> m, kappa, x_s (B, N) with its graph, x0_real, x0_fake (B, N).
    """
    m, kappa = (times(v)[0].clone().requires_grad_(True) for v in (m, kappa))
    z, eps = grid(24, 2)
    x_s = (m + kappa * z).expand(len(s), -1)
    with torch.no_grad():
        (a, b), alpha, sigma = transition(schedule, s, t), schedule.alpha(t), schedule.sigma(t)
        x_t = a[:, None] * x_s + b[:, None] * eps
        y = target(Diffusion(schedule, "flow_v"), x_s, eps.expand_as(x_s), s, t)
        x0_fake = to_x0_eps(linear_fit(x_t, y)(x_t), "flow_v", x_t, alpha, sigma)[0]
        x0_real = posterior_mean(x_t, m0, c0, alpha[:, None], sigma[:, None])
        return m, kappa, x_s, x0_real, x0_fake


def gradients(schedule, s, t, direction, target=subinterval_target):
    """By the script's loss d/dm and d/dkappa of the student above, and the same of the KL at t.

    The latter by central differences.
    """
    m, kappa, m0, c0, h = 0.7, 0.6, -0.2, 1.1, 1e-5
    *leaves, x_s, real, fake = gaussian_student(schedule, s, t, m, kappa, m0, c0, target)
    loss = loss_of(x_s, x_s, real, fake, schedule, s, t, direction)[0]
    by_loss = torch.stack(torch.autograd.grad(loss, leaves))

    def at(m, kappa):
        return noised_kl(times(m), times(kappa), m0, c0, schedule, s, t)

    by_m = (at(m + h, kappa) - at(m - h, kappa)) / (2 * h)
    by_kappa = (at(m, kappa + h) - at(m, kappa - h)) / (2 * h)
    return by_loss, torch.cat([by_m, by_kappa])


KL_LEVELS = [(0.0, 0.4), (0.5, 0.7), (0.625, 0.95), (0.8333, 0.86)]


@every_schedule
@pytest.mark.parametrize("s, t", KL_LEVELS)
def test_direction_is_the_gradient_of_the_kl_at_t(schedule, s, t):
    """Eq. 10 for a student x_s = m + kappa z: the sign is right, and alpha_{t|s} is there once.

    E[g dx_s/dm], E[g dx_s/dkappa] with w = alpha_t alpha_{t|s} / (alpha_t sigma_t + sigma_t^2) and
    a fake fitted to Eq. 11 are d/dm, d/dkappa of
    KL(N(a m, a^2 kappa^2 + b^2) || N(alpha_t m0, alpha_t^2 c0^2 + sigma_t^2)).
    """
    by_loss, by_difference = gradients(schedule, times(s), times(t), paper_direction)
    close(by_loss, by_difference, 1e-7)


@pytest.mark.parametrize(
    "factor",
    [
        lambda a, alpha, sigma: a,
        lambda a, alpha, sigma: 1 / a,
        lambda a, alpha, sigma: -1,
        lambda a, alpha, sigma: 1 / alpha,
        lambda a, alpha, sigma: sigma,
        lambda a, alpha, sigma: 0.5,
    ],
    ids=["a twice", "no a", "sign", "no alpha_t", "1 / sigma_t", "half"],
)
@flow_and_vp
def test_kl_gradient_tells_wrong_factors(schedule, factor):
    """The identity above is sharp: each usual mistake in the weight moves it by more than 3 %."""
    s, t = times(0.5), times(0.7)
    wrong = factor(transition(schedule, s, t)[0], schedule.alpha(t), schedule.sigma(t))
    by_loss, by_difference = gradients(schedule, s, t, lambda *args: wrong * paper_direction(*args))
    assert ((by_loss - by_difference).abs() > 0.03 * by_difference.abs()).all()


@flow_and_vp
def test_kl_gradient_tells_the_naive_fake(schedule):
    """With the fake that eps - x_s teaches it is not the KL's gradient, but for s = 0."""
    for s, t in KL_LEVELS:
        by_loss, by_difference = gradients(
            schedule, times(s), times(t), paper_direction, naive_target
        )
        assert ((by_loss - by_difference).abs().max() > 0.05 * by_difference.abs().max()) == (s > 0)


# ---- the matching direction ----------------------------------------------------------------------


@every_schedule
def test_lambda_converts_velocity_and_score(schedule):
    """lambda_t = 1 / (sigma_t + sigma_t^2 / alpha_t): score = -lambda (v + x_t / alpha_t) (Eq. 5).

    score_fake - score_real = lambda (v_real - v_fake), and x0_fake - x0_real = sigma_t^2 / alpha_t
    (score_fake - score_real). For flow lambda = (1 - t) / t, x0 = x_t - t v, eps = x_t + (1 - t) v.
    """
    t = times(0.1, 0.3, 0.5, 0.7, 0.95)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t, v_real, v_fake = (normal(5, 3, seed=k) for k in range(3))
    lam = (1 / (sigma + sigma**2 / alpha))[:, None]
    pair = {
        name: to_x0_eps(v, "flow_v", x_t, alpha, sigma)
        for name, v in (("real", v_real), ("fake", v_fake))
    }
    score = {name: from_x0_eps("score", *p, alpha, sigma) for name, p in pair.items()}
    close(score["real"], -lam * (v_real + x_t / alpha[:, None]), 1e-9)
    close(score["fake"] - score["real"], lam * (v_real - v_fake), 1e-9)
    of_scores = (sigma**2 / alpha)[:, None] * (score["fake"] - score["real"])
    close(pair["fake"][0] - pair["real"][0], of_scores)
    close(wanted_output("flow_v", score["real"], x_t, alpha, sigma), v_real, 1e-9)
    if isinstance(schedule, Flow):
        close(lam[:, 0], (1 - t) / t)
        close(pair["real"][0], x_t - t[:, None] * v_real)
        close(pair["real"][1], x_t + (1 - t)[:, None] * v_real)
        close(pair["fake"][0] - pair["real"][0], t[:, None] * (v_real - v_fake))


@every_schedule
def test_paper_weight_is_equation_10(schedule):
    """g = lambda_t alpha_{t|s} (v_real - v_fake), through networks that predict velocities.

    For flow (1 - t)^2 / (t (1 - s)) (v_real - v_fake).
    """
    s, t, _, _, alpha, sigma, a, _ = levels(schedule)
    x_t, v_real, v_fake, x_s = (normal(7, 2, 3, seed=k) for k in range(4))
    real, fake = (to_x0_eps(v, "flow_v", x_t, alpha, sigma)[0] for v in (v_real, v_fake))
    diffusion = Diffusion(schedule, "flow_v")
    networks = (lambda x_t, t: v_real), (lambda x_t, t: v_fake)
    at_t = diffusion, normal(7, 2, 3, seed=4), s, t, {}, {}, {}
    loss = phased_dmd_loss(x_s, None, *networks, *at_t, 1.0)  # the paper's is the default
    by_loss = loss[1]
    for mu, want in zip(loss[2:], (real, fake), strict=True):
        x_in = diffusion.noise_on(x_s, at_t[1], s, t)
        velocity = v_real if want is real else v_fake
        close(mu, to_x0_eps(velocity, "flow_v", x_in, alpha, sigma)[0], 1e-9)
        assert not mu.requires_grad
    for g in (paper_direction(x_s, real, fake, diffusion, s, t), by_loss):
        close(g, (a * alpha / (alpha * sigma + sigma**2))[:, None, None] * (v_real - v_fake), 1e-9)
        if isinstance(schedule, Flow):
            close(g, ((1 - t) ** 2 / (t * (1 - s)))[:, None, None] * (v_real - v_fake), 1e-9)


@every_schedule
def test_normalized_direction(schedule):
    """(x0_fake - x0_real) / mean|x0_student - x0_real|, each sample by its own error.

    By the error of the student's x0, not of x_s. It is the paper's direction times a positive
    number a sample; with s = 0 and x0_student = x it is dmd.py's, bit for bit. It is a constant,
    and finite where student and teacher agree.
    """
    s, t, _, _, alpha, sigma, a, _ = levels(schedule)
    x_s, student, real, fake = (normal(7, 2, 3, seed=k) for k in range(4))
    x_s.requires_grad_(True)
    student.requires_grad_(True)
    _, g, *mu = loss_of(x_s, student, real, fake, schedule, s, t, normalized_direction)
    assert torch.equal(mu[0], real) and torch.equal(mu[1], fake)
    assert not g.requires_grad
    error = (student - real).abs().mean((1, 2)).detach()
    close(g, (fake - real) / error[:, None, None])
    _, paper, *_ = loss_of(x_s, student, real, fake, schedule, s, t, paper_direction)
    close(paper, (a * alpha / sigma**2 * error)[:, None, None] * g, 1e-9)
    assert not paper.requires_grad
    x = x_s.detach()
    networks = (lambda x_t, t: real), (lambda x_t, t: fake)
    diffusion = Diffusion(schedule, "x0")
    want = dmd.dmd_loss(x, *networks, diffusion, torch.zeros_like(x), t, {}, {}, {}, 1.0)[1]
    assert torch.equal(normalized_direction(x, real, fake, diffusion, 0 * t, t), want)
    assert not normalized_direction(x, x, x, diffusion, s, t).any()
    some = [1, 4]
    of_some = (v[some] for v in (student, real, fake))
    assert torch.equal(normalized_direction(*of_some, diffusion, s[some], t[some]), g[some])


@every_schedule
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_matching_loss_is_dmd_s(schedule, scale):
    """0.5 mean (x_s - sg(x_s - g))^2: its gradient in x_s is g / numel.

    With s = 0, x0 = x and the normalised direction value, gradient and g are dmd.py's, bit for bit,
    with the same calls of teacher and fake: noised sample, level, condition, guidance.
    """
    x, eps = normal(5, 3, 4).requires_grad_(True), normal(5, 3, 4, seed=1)
    t, calls = times(0.2, 0.4, 0.6, 0.8, 0.95), []

    def network(who):
        def net(x_t, t, label):
            calls.append((who, x_t, t, label))
            return torch.sin(x_t * (1 + label)) + len(who)

        return net

    networks = network("real"), network("the fake")
    conds = {"label": 1}, {"label": 2}, {"label": 3}
    diffusion = Diffusion(schedule, "flow_v")
    want, *of_want = dmd.dmd_loss(x, *networks, diffusion, eps, t, *conds, scale)
    of_dmd = calls.copy()
    calls.clear()
    at_t = diffusion, eps, 0 * t, t
    loss, *rest = phased_dmd_loss(x, x, *networks, *at_t, *conds, scale, normalized_direction)
    assert torch.equal(loss, want)
    assert all(torch.equal(a, b) for a, b in zip(rest, of_want, strict=True))  # g, mu_real, mu_fake
    g = rest[0]
    assert [c[0] for c in calls] == ["real"] * (1 if scale == 1 else 2) + ["the fake"]
    for ours, theirs in zip(calls, of_dmd, strict=True):
        assert ours[0] == theirs[0] and ours[3] == theirs[3] and not ours[1].requires_grad
        assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
    (slope,) = torch.autograd.grad(loss, x)
    close(slope, g / g.numel(), 1e-12)
    assert torch.equal(slope, torch.autograd.grad(want, x)[0])


@pytest.mark.parametrize("shifted, phases", [(5.0, 2), (3.0, 2), (5.0, 4)])
def test_where_the_gradient_enters(shifted, phases):
    """A step from t_j: dx_s/dv = -(t_j - s), dx_0/dv = -t_j. So phased_dmd_loss gives v
    -(t_j - s) g / numel, clean_sample_loss -t_j g / numel, whatever g is. Their values are equal.

    In the first of two phases at shift 5, .1667 : .1042 against 1 : .9375; the same where s = 0.
    """
    grid = step_grid(4, shifted)
    factors = {}
    for steps in phased_dmd.phase_steps(4, phases):
        for j in steps:
            s, x_in = grid[steps.stop], normal(3, 5, seed=j)
            v = normal(3, 5, seed=9).requires_grad_(True)
            net = lambda x, t, v=v: v  # noqa: E731
            x_s, x0 = phased_dmd.student_step(net, flow(), x_in, grid[j], s, {})
            real, fake = normal(3, 5, seed=7), normal(3, 5, seed=8)
            one = torch.ones(3, dtype=torch.float64)
            rows = Flow(), s * one, (s + (1 - s) / 2) * one
            loss, g, *_ = loss_of(x_s, x0, real, fake, *rows, normalized_direction)
            clean = phased_dmd.clean_sample_loss(x0, g)
            close(clean, loss, 1e-12)
            for name, value in (("x_s", loss), ("x0", clean)):
                (slope,) = torch.autograd.grad(value, v, retain_graph=True)
                factor = -float((slope * g).sum() / (g * g).sum()) * g.numel()
                close(slope, -factor * g / g.numel(), 1e-12)
                factors[name, j] = factor
            assert factors["x_s", j] == pytest.approx(grid[j] - s, rel=1e-12)
            assert factors["x0", j] == pytest.approx(grid[j], rel=1e-12)
            assert s > 0 or factors["x_s", j] == pytest.approx(factors["x0", j], rel=1e-12)
    if (shifted, phases) == (5.0, 2):
        assert [factors["x_s", j] for j in (0, 1)] == pytest.approx([0.1667, 0.1042], abs=1e-4)
        assert [factors["x0", j] for j in (0, 1)] == pytest.approx([1, 0.9375])


# ---- phases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [1.0, 3.0, 5.0, 6.0])
@pytest.mark.parametrize("steps, phases", [(4, 1), (4, 2), (4, 4), (8, 8)])
def test_levels_of_a_phase(shifted, steps, phases):
    """The fake's levels fill (s, 1); the student's are those of them with t in --dm_range.

    Both have u uniform there (Fig. 9), with the default range down to t = .02 whatever the shift
    (2 % of u would be t = .09 at shift 5) and up to 1, also where s is above .98.
    """
    grid, rows = step_grid(steps, shifted), 4096
    for k, own in enumerate(phased_dmd.phase_steps(steps, phases)):
        s = grid[own.stop]
        phase = types.SimpleNamespace(s=s, u_end=1 - own.stop / steps, t_min=0.0)
        draw = Draws(0, k, "student", range(rows), shape=(1,), timestep_shift=shifted)
        low, high = phased_dmd.parse_args([]).dm_range
        for bounds in ((), (low, high), (low, 0.999)):
            _, s_row, t = phased_dmd.noise_above(draw, phase, *bounds)
            assert torch.equal(s_row, torch.full((rows,), s)) and (t > s).all()
            t_low, t_high = bounds or (0.0, 1.0)
            ends = max(s, t_low), t_high
            u, (u_low, u_high) = unshift(t.double(), shifted), (unshift(v, shifted) for v in ends)
            share = (u - u_low) / (u_high - u_low)
            assert -1e-5 < share.min() < 3e-3 and 1 - 3e-3 < share.max() < 1 + 1e-5
            assert abs(share.mean() - 0.5) < 2e-3 and abs(share.var() - 1 / 12) < 1e-3


@pytest.mark.parametrize(
    "steps, phases, want",
    [
        (4, 1, [range(0, 4)]),
        (4, 2, [range(0, 2), range(2, 4)]),
        (4, 4, [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]),
        (3, 2, [range(0, 2), range(2, 3)]),
        (8, 3, [range(0, 3), range(3, 5), range(5, 8)]),
    ],
)
def test_phases_share_out_the_steps(steps, phases, want):
    """Every step belongs to one phase, in order, and the phases are as even as can be."""
    assert phased_dmd.phase_steps(steps, phases) == want


@pytest.mark.parametrize("updates", [4, 5, 7, 10])
@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_no_update_lies_between_two_phases(updates, K):
    """Each phase begins where the one before it ends, and the last ends with the run."""
    net, args = torch.nn.Identity(), types.SimpleNamespace(student_steps=4, phases=K)
    args.max_train_steps, args.student_init = updates, None
    teacher = types.SimpleNamespace(base=net, shift=3.0)
    phases = phased_dmd.plan_phases(types.SimpleNamespace(args=args), teacher)
    starts = [phase.start for phase in phases]
    assert starts == [0, *(phase.end for phase in phases[:-1])]
    assert phases[-1].end == updates and all(p.start < p.end for p in phases)


@pytest.mark.parametrize(
    "shifted, table",
    [
        (5, (1, 0.9375, 0.8333, 0.625, 0)),
        (3, (1, 0.9, 0.75, 0.5, 0)),
        (7, (1, 0.9545, 0.875, 0.7, 0)),
    ],
)
def test_timesteps(shifted, table):
    """t = S u / (1 + (S - 1) u) at u = 1, 3/4, 1/2, 1/4, 0.

    Table 1: shift 5 for Wan, 3 for Qwen; 7 puts s_1 on Wan 2.2's boundary .875.
    """
    assert step_grid(4, shifted) == pytest.approx(table, abs=5e-5)
    u = torch.linspace(0, 1, 5, dtype=torch.float64)
    close(shift(u, shifted), shifted * u / (1 + (shifted - 1) * u))
    # raw (1/2, 1) is (s_1, 1) of two phases
    assert shift(0.5, shifted) == step_grid(2, shifted)[1] == step_grid(4, shifted)[2]


def test_clamp_of_wan_22():
    """Phase 1 draws u in (1/2, 1) and clamps t = shift(u, 5) to the teacher's boundary.

    1/6 of draws land on .875 (T2V), 2/7 on .9 (I2V), and even there b^2 >= .375 from s_1 = .8333:
    no taper.
    """
    for boundary, atom, variance in ((0.875, 1 / 6, 0.375), (0.9, 2 / 7, 0.56)):
        assert (unshift(boundary, 5) - 0.5) / 0.5 == pytest.approx(atom)
        _, b = transition(Flow(), times(5 / 6), times(boundary))
        assert float(b) ** 2 == pytest.approx(variance)
        close(taper(flow(), times(5 / 6), times(boundary)), [1])


PHASES = step_grid(4, 5.0)[1:]  # where each of four phases ends: .9375, .8333, .625, 0


def noise_levels(s):
    """s three times, and three t in (s, 1) evenly spaced before the shift.  (3,) each."""
    u = unshift(s, 5.0)
    return torch.full((3,), s, dtype=torch.float64), shift(times(0.2, 0.5, 0.8) * (1 - u) + u, 5.0)


both_directions = pytest.mark.parametrize(
    "direction", [paper_direction, normalized_direction], ids=["paper", "normalized"]
)


@flow_and_vp
@both_directions
@pytest.mark.parametrize("s", PHASES)
def test_a_perfect_student_stays(schedule, direction, s):
    """x_s with the law of data noised to s, the fake the minimiser of Eq. 13: no gradient.

    At no sample, in no phase. The naive fake gives some, but for the last phase, where s = 0.
    """
    m0, c0, diffusion = -0.2, 1.1, Diffusion(schedule, "flow_v")
    s, t = noise_levels(s)
    alpha_s, sigma_s = float(schedule.alpha(s)[0]), float(schedule.sigma(s)[0])
    z, eps = grid(24, 2)
    std = (alpha_s**2 * c0**2 + sigma_s**2) ** 0.5
    x_s, eps = (alpha_s * m0 + std * z).expand(3, -1), eps.expand(3, -1)
    (a, b), alpha, sigma = transition(schedule, s, t), schedule.alpha(t), schedule.sigma(t)
    x_t = a[:, None] * x_s + b[:, None] * eps
    real = posterior_mean(x_t, m0, c0, alpha[:, None], sigma[:, None])
    largest = {}
    for target in (subinterval_target, naive_target):
        w, bias = fitted_by_loss(diffusion, x_s, eps, s, t, target=target)
        fake = to_x0_eps(w * x_t + bias, "flow_v", x_t, alpha, sigma)[0]
        largest[target] = float(direction(x_s, real, fake, diffusion, s, t).abs().max())
    assert largest[subinterval_target] < 1e-8
    assert largest[naive_target] > 1e-3 if s[0] > 0 else largest[naive_target] < 1e-8


@both_directions
@pytest.mark.parametrize("s", PHASES)
def test_a_wrong_student_gets_there(direction, s):
    """x_s = m + kappa z descending g, the fake refitted by Eq. 11 at each step, settles.

    In every phase at the law of data noised to s, (1 - s) m0 and sqrt((1 - s)^2 c0^2 + s^2). The
    naive fake leads elsewhere, to a smaller kappa, but for the last phase.
    """
    m0, c0 = -0.2, 1.1
    s, t = noise_levels(s)
    want = [float((1 - s[0]) * m0), float(((1 - s[0]) ** 2 * c0**2 + s[0] ** 2).sqrt())]
    a = (1 - t) / (1 - s)
    # about one over the slope of g in m
    rate = 1 / float((a**2).mean()) if direction is paper_direction else 1 - float(s[0])

    def settle(target, steps=150):
        m, kappa = 0.3, 0.5
        for _ in range(steps):
            *leaves, x_s, real, fake = gaussian_student(Flow(), s, t, m, kappa, m0, c0, target)
            loss = loss_of(x_s, x_s, real, fake, Flow(), s, t, direction)[0]
            slope = torch.autograd.grad(loss, leaves)
            m, kappa = m - rate * float(slope[0]), kappa - rate * float(slope[1])
        return m, kappa

    assert settle(subinterval_target) == pytest.approx(want, abs=1e-3)
    naive = settle(naive_target)
    assert (naive == pytest.approx(want, abs=1e-3)) == (s[0] == 0)
    assert s[0] == 0 or naive[1] < 0.95 * want[1]


# ---- the paper's experiment ----------------------------------------------------------------------


def test_figure_2():
    """Velocity networks of four points, trained from scratch on x_s at s = .5 (Fig. 2).

    With Eq. 13 their trajectories are the exact ODE's at t = s up to 0.06, with eps - x_s they are
    off by more than 0.1.
    """
    rmse, paths = experiment(seed=0, iterations=1500)
    assert rmse["euler"] < 0.01 and rmse["full"] < 0.06
    assert rmse["unbiased"] < 0.06 < 0.1 < rmse["naive"]
    assert paths["full"].shape == (101, 200)
    assert paths["unbiased"].shape == paths["naive"].shape == (51, 200)
    assert torch.equal(paths["full"][0], paths["naive"][0])


# ---- for who copies the pieces -------------------------------------------------------------------


def test_times_of_the_sampler_are_any_sequence_and_experts_one_a_step():
    """A NumPy array was added to, which left out the last step, as two experts of four did."""
    flow, z, times = Diffusion(Flow(), "flow_v"), torch.ones(2, 3), [1.0, 0.9, 0.5]
    want = phased_dmd.sample([half] * 3, flow, z, times, {})
    for given in (tuple(times), np.array(times), torch.tensor(times)):
        torch.testing.assert_close(phased_dmd.sample([half] * 3, flow, z, given, {}), want)
    with pytest.raises(ValueError, match="2 experts for 3 steps"):
        phased_dmd.sample([half] * 2, flow, z, times, {})


def half(x_t, t):
    return x_t / 2


def test_the_fakes_loss_sends_nothing_into_the_samples():
    x_s, at = torch.ones(2, 3, requires_grad=True), torch.tensor([0.5, 0.5])
    weight = torch.ones((), requires_grad=True)
    flow, eps = Diffusion(Flow(), "flow_v"), torch.zeros(2, 3)
    at = eps, at, at + 0.2, {}
    phased_dmd.fake_score_loss(lambda x, t: weight * x, flow, x_s, *at).backward()
    assert x_s.grad is None and weight.grad != 0
