"""tdm.py against the paper's formulas (2503.06674 v2): step and bridge, importance weight, what either fake target learns, Eq. 6 and 11, the sampler."""

import copy
import inspect
import math

import pytest
import torch
from test_decoupled_math import draws, every_network, networks
from test_dmd_math import DoubleOutput, close, has_gradient, normal

import dmd
from models.diffusion import (
    VP,
    Flow,
    add_noise,
    expand,
    from_x0_eps,
    guided_x0,
    noise_on,
    predict_x0,
    predict_x0_eps,
    step_grid,
    to_x0_eps,
    transition,
)
from models.worlds.ring import RingTeacher
from tdm import (
    fake_score_loss,
    importance_weight,
    sample,
    step_slope,
    student_step,
    trajectory_matching_loss,
)

KINDS = ("x0", "eps", "flow_v", "vp_v", "score")
LOSSES = ("pseudo_huber", "demo", "l2")
SCHEDULES = {"flow": Flow(), "vp": VP(), "vp, zero terminal snr": VP(zero_snr=True)}
LINEAR = VP("linear", 1e-4, 2e-2)
DEMO_GRID = [0.9, 0.675, 0.45, 0.225, 0.0]  # K = 4 from T = 900 of 1000

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_kind = pytest.mark.parametrize("kind", KINDS)

# Two rows with mean square 1 and mean product 0: coefficients times these have exactly the second moments of independent normals, which is
# what a sample of many dimensions tends to. A batch whose items are such rows makes each item's loss an expectation, without sampling.
Z, EPS = (torch.tensor([row], dtype=torch.float64) for row in ([1, 1, -1, -1], [1, -1, 1, -1]))


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def bridge(schedule, shape=(3, 2)):
    """Six steps t -> s with a level tau between, t = 1 among them, and random rows.  -> t, s, tau (6,), x_t, prediction, eps (6, *shape)."""
    t, s = times(0.3, 0.5, 0.75, 0.75, 0.9375, 1.0), times(0.0, 0.25, 0.5, 0.0, 0.8333, 0.75)
    tau = s + times(0.1, 0.02, 0.9, 0.4, 0.5, 0.6) * (t - s)
    return t, s, tau, *(normal(6, *shape, seed=k) for k in range(3))


def constant(prediction):
    """A network that says this whatever it is asked."""
    return lambda x_t, t: prediction


# ---- one step --------------------------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("kind", ["x0", "flow_v", "vp_v"])
def test_step_is_ddim(schedule, kind):
    """x_s = alpha_s x0 + sigma_s eps-hat with the noise that x_t and x0 imply, whatever the network predicts; with noise given, with that."""
    t, s, _, x_t, x0, noise = bridge(schedule)
    alpha, sigma, alpha_s, sigma_s = (
        expand(v, x_t)
        for v in (schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s))
    )
    eps_hat = (x_t - alpha * x0) / sigma
    net = constant(from_x0_eps(kind, x0, eps_hat, alpha.flatten(), sigma.flatten()))
    x_s, clean = student_step(net, schedule, kind, x_t, t, s, {})
    close(clean, x0, 1e-12), close(x_s, alpha_s * x0 + sigma_s * eps_hat, 1e-12)
    x_s, clean = student_step(net, schedule, kind, x_t, t, s, {}, noise)
    close(clean, x0, 1e-12), close(x_s, alpha_s * x0 + sigma_s * noise, 1e-12)


@every_schedule
def test_step_to_zero_is_the_clean_prediction(schedule):
    """t -> 0 returns x0 exactly, with or without noise; t -> t returns x_t."""
    t, _, _, x_t, v, noise = bridge(schedule)
    for extra in (None, noise):
        x_s, x0 = student_step(constant(v), schedule, "vp_v", x_t, t, 0 * t, {}, extra)
        assert torch.equal(x_s, x0)
    close(student_step(constant(v), schedule, "vp_v", x_t, t, t, {})[0], x_t, 1e-13)


def test_step_of_flow_is_euler():
    """x_s = x_t - (t - s) v."""
    t, s, _, x_t, v, _ = bridge(Flow())
    close(
        student_step(constant(v), Flow(), "flow_v", x_t, t, s, {})[0],
        x_t - expand(t - s, x_t) * v,
        1e-13,
    )


@every_schedule
def test_landing_moves_with_the_clean_prediction(schedule):
    """At fixed x_t the Jacobian of x_s in x0 is A times the identity, A = alpha_s - sigma_s alpha_t / sigma_t > 0, (t - s) / t for flow and 1 at
    s = 0: a loss on x0 pulls x_s the same way. With fresh noise it is alpha_s."""
    t, s, _, x_t, x0, noise = bridge(schedule, (2,))
    A = schedule.alpha(s) - schedule.sigma(s) * schedule.alpha(t) / schedule.sigma(t)
    assert (A > 0).all() and (A[s == 0] == 1).all()
    for extra, factor in ((None, A), (noise, schedule.alpha(s))):
        J = torch.autograd.functional.jacobian(
            lambda x: student_step(constant(x), schedule, "x0", x_t, t, s, {}, extra)[0].flatten(),
            x0,
        )
        close(J.reshape(12, 12), torch.diag(factor.repeat_interleave(2)), 1e-12)
    if isinstance(schedule, Flow):
        close(A, (t - s) / t, 1e-13)


def test_landing_factors_of_the_demo():
    """A at T = 900, K = 4, linear betas: .083 .263 .525 1 from the noise on."""
    t, s = times(*DEMO_GRID[:-1]), times(*DEMO_GRID[1:])
    A = torch.autograd.functional.jacobian(
        lambda x: student_step(constant(x), LINEAR, "x0", EPS[0, :], t, s, {})[0],
        torch.ones(4, dtype=torch.float64),
    )
    close(A.diagonal(), times(0.083, 0.263, 0.525, 1.0), 2e-3)


# ---- the bridge and the importance weight ----------------------------------------------------------------------------


def mixed_noise(schedule, t, s, tau, x_t, x0, eps):
    """eps_mix = (a sigma_s eps-hat + b eps) / sigma_tau, written out."""
    eps_hat = (x_t - expand(schedule.alpha(t), x0) * x0) / expand(schedule.sigma(t), x0)
    a, b = transition(schedule, s, tau)
    return (
        expand(a * schedule.sigma(s) / schedule.sigma(tau), x0) * eps_hat
        + expand(b / schedule.sigma(tau), x0) * eps
    )


def log_weight(eps, eps_mix):
    return (eps.square().flatten(1).mean(1) - eps_mix.square().flatten(1).mean(1)) / 2


@every_schedule
def test_bridge_is_one_noising_of_x0(schedule):
    """a x_s + b eps == alpha_tau x0 + sigma_tau eps_mix. Without sigma_s (an old bug of the demo) it is not."""
    t, s, tau, x_t, x0, eps = bridge(schedule)
    x_s, clean = student_step(constant(x0), schedule, "x0", x_t, t, s, {})
    x_tau = noise_on(schedule, x_s, eps, s, tau)
    close(
        x_tau,
        add_noise(schedule, clean, mixed_noise(schedule, t, s, tau, x_t, x0, eps), tau),
        1e-12,
    )
    a, b = transition(schedule, s, tau)
    eps_hat = predict_x0_eps(constant(x0), schedule, "x0", x_t, t)[1]
    missing = (
        expand(a / schedule.sigma(tau), x0) * eps_hat + expand(b / schedule.sigma(tau), x0) * eps
    )
    off = (x_tau - add_noise(schedule, clean, missing, tau)).flatten(1).abs().amax(1)
    assert (off[s > 0] > 1e-3).all() and off.max() > 0.5


@every_schedule
def test_importance_weight_is_the_demo_s(schedule):
    """exp((mean eps^2 - mean eps_mix^2) / 2) per sample, eps_mix from the step's own noise. Its inverse, a sum for the mean, no half and a
    weight of the whole batch differ."""
    t, s, tau, x_t, x0, eps = bridge(schedule)
    x_tau = noise_on(
        schedule, student_step(constant(x0), schedule, "x0", x_t, t, s, {})[0], eps, s, tau
    )
    got, log = (
        importance_weight(schedule, x_tau, x0, eps, tau),
        log_weight(eps, mixed_noise(schedule, t, s, tau, x_t, x0, eps)),
    )
    assert got.shape == (6,)
    close(got, log.exp(), 1e-11)
    assert got.min() < 0.95 and got.max() > 1.05  # so that these differ
    for wrong in (-log, 6 * log, 2 * log, log.mean().expand(6)):
        assert not torch.allclose(got, wrong.exp(), rtol=0.05)
    assert torch.equal(
        importance_weight(schedule, x_tau[2:4], x0[2:4], eps[2:4], tau[2:4]), got[2:4]
    )


@every_schedule
def test_importance_weight_at_the_clean_end_is_one(schedule):
    """s = 0: x_s is x0, eps_mix is eps, nothing to reweight."""
    tau, x0, eps = times(0.05, 0.3, 0.8, 1.0), normal(4, 3), normal(4, 3, seed=1)
    close(
        importance_weight(schedule, noise_on(schedule, x0, eps, 0 * tau, tau), x0, eps, tau),
        torch.ones(4),
        1e-10,
    )


@every_schedule
def test_bridge_of_fresh_noise(schedule):
    """Where eps-hat is independent standard noise E[eps_mix^2] = 1, and at many dimensions the weight is 1; on a trajectory, where it is not, it is
    not."""
    s, tau = times(0.1, 0.25, 0.5, 0.75, 0.9), times(0.4, 0.26, 0.74, 0.9, 1.0)
    eps_hat, eps = Z.expand(5, -1), EPS.expand(5, -1)
    x0 = normal(5, 4)
    for factor in (1.0, 0.7):
        x_tau = noise_on(schedule, add_noise(schedule, x0, factor * eps_hat, s), eps, s, tau)
        alpha, sigma = expand(schedule.alpha(tau), x0), expand(schedule.sigma(tau), x0)
        square = ((x_tau - alpha * x0) / sigma).square().mean(1)
        weight = importance_weight(schedule, x_tau, x0, eps, tau)
        if factor == 1:
            close(square, torch.ones(5), 1e-11), close(weight, torch.ones(5), 1e-11)
        else:
            share = (
                transition(schedule, s, tau)[0] * schedule.sigma(s) / schedule.sigma(tau)
            ) ** 2  # of eps-hat in eps_mix
            close(weight, ((1 - 0.7**2) * share / 2).exp(), 1e-11)


@every_schedule
def test_bridge_closes_at_its_lower_end(schedule):
    """tau -> s: b -> 0, x_tau -> x_s, and the weight goes to that of eps-hat against eps; at tau = s exactly so."""
    s, x0, eps_hat, eps = (
        times(0.25, 0.5, 0.75),
        normal(3, 4),
        normal(3, 4, seed=1),
        normal(3, 4, seed=2),
    )
    x_s = add_noise(schedule, x0, eps_hat, s)
    assert torch.equal(noise_on(schedule, x_s, eps, s, s), x_s)
    close(importance_weight(schedule, x_s, x0, eps, s), log_weight(eps, eps_hat).exp(), 1e-10)
    errors = [
        float((noise_on(schedule, x_s, eps, s, s + gap) - x_s).abs().max())
        for gap in (1e-2, 1e-4, 1e-6)
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2] and errors[2] < 1e-2  # as sqrt(gap)


def bend(x):
    """A student's clean prediction, far from linear."""
    return 0.8 * torch.tanh(2 * x) + 0.3 * torch.sin(3 * x)


@every_schedule
@pytest.mark.parametrize("tau", [0.55, 0.6, 0.74])
def test_weight_of_one_dimension_is_the_density_ratio(schedule, tau):
    """d = 1: the weight is q(x_tau | x0) / q(x_tau | x_s) up to the constant sigma_tau / b, which its missing normalisers are: weighted means over
    the bridge are means over freshly noised x0. The inverse weight and no weight are not."""
    x_t, eps = (
        v.reshape(-1, 1)
        for v in torch.meshgrid(
            torch.linspace(-7, 7, 85, dtype=torch.float64),
            torch.linspace(-30, 30, 601, dtype=torch.float64),
            indexing="ij",
        )
    )
    n = len(x_t)
    t, s, tau = (torch.full((n,), v, dtype=torch.float64) for v in (0.75, 0.5, tau))
    x_s, x0 = student_step(lambda x, t: bend(x), schedule, "x0", x_t, t, s, {})
    x_tau = noise_on(schedule, x_s, eps, s, tau)
    weight = importance_weight(schedule, x_tau, x0, eps, tau)

    def mean(value, log_density, log_weight=0.0):
        p = (
            log_density[:, 0] + log_weight
        ).exp()  # (n,), any constant cancels but in the mean of 1
        return (p[:, None] * value).sum() / p.sum()

    base = -(x_t**2) / 2
    fresh = add_noise(schedule, x0, eps, tau)
    b_share = transition(schedule, s, tau)[1][0] / schedule.sigma(tau)[0]
    density = base - eps**2 / 2
    close(mean(weight[:, None], density), 1 / b_share, 1e-6)
    for f in (torch.sin, torch.square, lambda x: x * x0, lambda x: torch.cos(2 * x + x0)):
        want = mean(f(fresh), density)
        close(mean(f(x_tau), density, weight.log()), want, 1e-6)
    assert abs(mean(x_tau * x0, density) - mean(fresh * x0, density)) > 0.01


# ---- the fake score's loss -------------------------------------------------------------------------------------------


def in_own_space(kind, x0, eps, alpha, sigma, output):
    """Mean square error of a network's output per sample, in the space of its prediction.  -> (B,)."""
    return (output - from_x0_eps(kind, x0, eps, alpha, sigma)).square().flatten(1).mean(1)


@every_schedule
@every_kind
def test_fake_loss_is_equation_7(schedule, kind):
    """The network's output against x0 in its own space, or in x0 times min(SNR, 5), weighted sample by sample; "exact": against the
    bridge's score, times (b / sigma_tau)^2, or |b / sigma_tau eps_psi - eps|^2."""
    t, s, tau, x_t, x0, eps = bridge(schedule)
    output = normal(6, 3, 2, seed=5)
    x_s = student_step(constant(x0), schedule, "x0", x_t, t, s, {})[0]
    alpha, sigma, (a, b) = schedule.alpha(tau), schedule.sigma(tau), transition(schedule, s, tau)
    x_tau = expand(a, x0) * x_s + expand(b, x0) * eps
    eps_mix = mixed_noise(schedule, t, s, tau, x_t, x0, eps)
    x0_fake, eps_fake = to_x0_eps(output, kind, x_tau, alpha, sigma)
    weight, snr = log_weight(eps, eps_mix).exp(), (alpha / sigma) ** 2
    assert (snr > 5).any() and (snr < 5).any()
    got = {
        name: fake_score_loss(
            constant(output), schedule, kind, x_s, x0, eps, s, tau, {}, *name.split()
        )
        for name in ("importance network", "importance snr", "exact network", "exact snr")
    }
    error = (x0_fake - x0).square().flatten(1).mean(1)
    close(
        got["importance network"],
        (weight * in_own_space(kind, x0, eps_mix, alpha, sigma, output)).mean(),
        1e-10,
    )
    close(got["importance snr"], (weight * snr.clamp(max=5) * error).mean(), 1e-10)
    close(got["exact snr"], (expand(b / sigma, eps) * eps_fake - eps).square().mean(), 1e-10)
    y_eps = (
        expand(sigma / b, eps) * eps
    )  # the score -eps / b as noise, and the x0 that goes with it at x_tau
    y_x0 = (x_tau - expand(sigma, eps) * y_eps) / expand(alpha, eps)
    close(
        got["exact network"],
        ((b / sigma) ** 2 * in_own_space(kind, y_x0, y_eps, alpha, sigma, output)).mean(),
        1e-8,
    )
    close(
        fake_score_loss(
            constant(output), schedule, kind, x_s, x0, eps, s, tau, {}, weight="snr", max_snr=1e9
        ),
        (weight * snr * error).mean(),
        1e-10,
    )
    assert torch.equal(
        fake_score_loss(constant(output), schedule, kind, x_s, x0, eps, s, tau, {}),
        got["importance network"],
    )  # the default


@every_schedule
def test_fake_is_asked_at_x_tau(schedule):
    """It sees a x_s + b eps, level tau and its conditions, in one call, for either target."""
    t, s, tau, x_s, x0, eps = bridge(schedule)
    for target in ("importance", "exact"):
        calls = []
        fake_score_loss(
            lambda *args, **cond: calls.append((*args, cond)) or args[0],
            schedule,
            "x0",
            x_s,
            x0,
            eps,
            s,
            tau,
            {"label": 3},
            target,
        )
        ((x_tau, level, cond),) = calls
        assert (
            torch.equal(x_tau, noise_on(schedule, x_s, eps, s, tau))
            and torch.equal(level, tau)
            and cond == {"label": 3}
        )


def best_gain(loss_of):
    """Minimiser over g (n,) of a quadratic loss in which each g_i has its own term.  loss_of: g (n, 1) -> scalar."""
    n = loss_of.rows

    def slope(value):
        g = torch.full((n, 1), value, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(loss_of(g), g)[0][:, 0]

    zero, one = slope(0.0), slope(1.0)
    return zero / (zero - one)


def best_fake(schedule, x_s, x0, eps, s, tau, kind="x0", **flags):
    """The linear network that minimises fake_score_loss, for each item of the batch, as gain of its x0: x0_fake = gain x_tau.  (B,)."""
    loss_of = lambda g: fake_score_loss(
        lambda x_t, t: g * x_t, schedule, kind, x_s, x0, eps, s, tau, {}, **flags
    )  # noqa: E731
    loss_of.rows = len(x_s)
    one = torch.ones(len(x_s), 1, dtype=torch.float64)
    return to_x0_eps(
        best_gain(loss_of)[:, None] * one, kind, one, schedule.alpha(tau), schedule.sigma(tau)
    )[0][:, 0]


def variance(schedule, t, C):
    """Of data N(0, C) noised to t."""
    return schedule.alpha(t) ** 2 * C + schedule.sigma(t) ** 2


def real_gain(schedule, tau, C):
    """The teacher: x0_real = gain x_tau."""
    return schedule.alpha(tau) * C / variance(schedule, tau, C)


class Trajectory:
    """Every step of a linear student's trajectory on data N(0, C), at several levels tau each, one item of a batch per (step, level): t, s, tau (n,),
    x_t (n, 4), the student's gain h (n,) with x0 = h x_t, and eps (n, 4). Matched: h takes variance(t) to variance(s)."""

    def __init__(self, schedule, grid, C, inside=(0.1, 0.5, 0.9)):
        t, s = times(*grid[:-1]), times(*grid[1:])
        self.g = (variance(schedule, s, C) / variance(schedule, t, C)).sqrt()
        A = schedule.alpha(s) - schedule.sigma(s) * schedule.alpha(t) / schedule.sigma(t)
        h = (self.g - schedule.sigma(s) / schedule.sigma(t)) / A
        self.steps, self.levels, self.schedule, self.C = len(t), len(inside), schedule, C
        self.t, self.s, self.h, self.g = (
            v.repeat_interleave(self.levels) for v in (t, s, h, self.g)
        )
        self.tau = self.s + times(*inside).repeat(self.steps) * (self.t - self.s)
        self.x_t = variance(schedule, self.t, C).sqrt()[:, None] * Z
        self.eps = EPS.expand(len(self.t), -1)

    def land(self, h):
        return student_step(
            lambda x, t: h[:, None] * x, self.schedule, "x0", self.x_t, self.t, self.s, {}
        )

    def fake(self, h, **flags):
        x_s, x0 = (v.detach() for v in self.land(h))
        return best_fake(self.schedule, x_s, x0, self.eps, self.s, self.tau, **flags)

    def gradient(self, h, fake, loss="l2"):
        """Of the student's expected loss in its gain, for every (step, level).  (n,)."""
        h = h.clone().requires_grad_(True)
        x_s, x0 = self.land(h)
        x_tau = noise_on(self.schedule, x_s, self.eps, self.s, self.tau).detach()
        x0_real, x0_fake = (
            real_gain(self.schedule, self.tau, self.C)[:, None] * x_tau,
            fake[:, None] * x_tau,
        )
        return torch.autograd.grad(trajectory_matching_loss(x0, x0_real, x0_fake, loss), h)[
            0
        ] * len(h)

    def by_step(self, v):
        return v.reshape(self.steps, self.levels)


SETTINGS = {
    "demo": (LINEAR, DEMO_GRID),
    "flow": (Flow(), step_grid(4)),
    "flow, shift 2": (Flow(), step_grid(4, 2.0)),
    "vp": (VP(), step_grid(4)),
}
every_setting = pytest.mark.parametrize("schedule, grid", SETTINGS.values(), ids=SETTINGS)


@every_setting
@pytest.mark.parametrize("C", [1.0, 4.0])
@every_kind
def test_exact_fake_is_the_score_and_leaves_a_matched_trajectory(schedule, grid, C, kind):
    """The step's gain takes the teacher's law at t to its law at s; target "exact" then learns the teacher's own score at every step and level, and the
    student's expected gradient vanishes."""
    T = Trajectory(schedule, grid, C)
    close(T.land(T.h)[0], variance(schedule, T.s, C).sqrt()[:, None] * Z, 1e-10)
    fake = T.fake(T.h, target="exact", kind=kind)
    close(fake, real_gain(schedule, T.tau, C), 1e-9)
    assert T.gradient(T.h, fake).abs().max() < 1e-9


@every_setting
@pytest.mark.parametrize("C", [1.0, 4.0])
@pytest.mark.parametrize("weight", ["network", "snr"])
@every_kind
def test_importance_fake_is_biased_before_the_last_step(schedule, grid, C, weight, kind):
    """Its optimum is E[x0 | x_tau] along the trajectory, off the score by h g V_t / (alpha_s C) - 1 whatever tau, weight and prediction: too small a
    gain, so the student's gradient at a matched trajectory widens inner steps; 0 at the last."""
    T = Trajectory(schedule, grid, C)
    fake = T.fake(T.h, weight=weight, kind=kind)
    error = T.by_step(fake / real_gain(schedule, T.tau, C) - 1)
    close(
        error,
        T.by_step(T.h * T.g * variance(schedule, T.t, C) / (schedule.alpha(T.s) * C) - 1),
        1e-8,
    )
    assert (error[:-1] < -0.02).all() and error[-1].abs().max() < 1e-9
    slope = T.by_step(T.gradient(T.h, fake))
    assert (slope[:-1] < 0).all() and slope[0].min() < -1e-3 and slope[-1].abs().max() < 1e-9


@pytest.mark.parametrize(
    "name, C, want",
    [
        ("demo", 1.0, (-0.415, -0.349, -0.218, 0)),
        ("demo", 4.0, (-0.411, -0.303, -0.112, 0)),
        ("flow", 1.0, (-0.487, -0.236, -0.079, 0)),
        ("flow", 4.0, (-0.454, -0.133, -0.025, 0)),
        ("vp", 1.0, (-0.352, -0.256, -0.144, 0)),
        ("flow, shift 2", 1.0, (-0.497, -0.301, -0.177, 0)),
    ],
)
def test_size_of_the_importance_fake_s_bias(name, C, want):
    """Relative errors of its gain, from the noise on; and with many dimensions the weight is at least 1 and close to it."""
    T = Trajectory(*SETTINGS[name], C)
    error = T.by_step(T.fake(T.h) / real_gain(T.schedule, T.tau, C) - 1)
    close(error, times(*want)[:, None].expand(-1, 3), 1e-3)
    x_s, x0 = T.land(T.h)
    weight = T.by_step(
        importance_weight(
            T.schedule, noise_on(T.schedule, x_s, T.eps, T.s, T.tau), x0, T.eps, T.tau
        )
    )
    assert weight.min() > 1 - 1e-9 and weight[:-1].max() < (
        1.2 if C == 1 and name == "demo" else 1.5
    )
    close(weight[-1], torch.ones(3), 1e-9)


@every_setting
@pytest.mark.parametrize("target", ["exact", "importance"])
def test_fake_of_freshly_noised_samples_is_wrong_before_the_last_step(schedule, grid, target):
    """Without importance sampling (fake trained at noised x0, asked at noised-on x_s) either target learns the score of x0's own noisings, whose gain is
    far too small at the first steps."""
    T = Trajectory(schedule, grid, 1.0)
    x0 = T.land(T.h)[1]
    fresh = best_fake(schedule, x0, x0, T.eps, 0 * T.s, T.tau, target=target)
    close(fresh, real_gain(schedule, T.tau, T.h**2 * variance(schedule, T.t, 1.0)), 1e-9)
    error = T.by_step(fresh / real_gain(schedule, T.tau, 1.0) - 1)
    assert (error[:-1] < -0.01).all() and error[-1].abs().max() < 1e-9
    if grid == DEMO_GRID:
        close(error[:2], times(-1.0, -0.94)[:, None].expand(-1, 3), 0.02)
        close(error[2, [0, 2]], times(-0.46, -0.6), 0.03)


def pointwise_best(schedule, x, rows, target):
    """What an unrestricted fake, not told which row a sample is of, answers at x_tau = x: minimiser of the expected loss over the rows' densities.

    rows: (share, s, x_t -> x_s, x0) with x_t standard normal and d = 1. x (m,), one level tau for all.  -> function of tau: eps (m,).
    """

    def at(tau):
        zero, one = (
            torch.zeros(len(x), dtype=torch.float64),
            torch.zeros(len(x), dtype=torch.float64),
        )
        for share, s, land in rows:
            x_t = torch.linspace(-10, 10, 801, dtype=torch.float64)
            x_s, x0 = land(x_t)
            point = lambda v: torch.full((len(x) * len(x_t),), v, dtype=torch.float64)  # noqa: E731
            a, b = (float(v) for v in transition(schedule, times(s), times(tau)))
            eps = (x[:, None] - a * x_s) / b  # (m, 801)
            density = share / b * torch.exp(-(eps**2) / 2 - x_t**2 / 2)
            for value, total in ((0.0, zero), (1.0, one)):
                says = torch.full((eps.numel(), 1), value, dtype=torch.float64, requires_grad=True)
                loss = fake_score_loss(
                    lambda *_: says,
                    schedule,
                    "eps",
                    x_s.expand_as(eps).reshape(-1, 1),
                    x0.expand_as(eps).reshape(-1, 1),
                    eps.reshape(-1, 1),
                    point(s),
                    point(tau),
                    {},
                    target,
                )
                total += (
                    torch.autograd.grad(loss, says)[0].reshape(eps.shape) * eps.numel() * density
                ).sum(1)
        return zero / (zero - one)

    return at


@pytest.mark.parametrize("schedule", [Flow(), VP()], ids=["flow", "vp"])
@pytest.mark.parametrize(
    "s", [(0.5, 0.5), (0.0, 0.5)], ids=["steps of K = 2 and 4", "steps of K = 1 and 2"]
)
def test_fake_that_is_not_told_k_learns_the_mixture(schedule, s):
    """Two step counts whose samples meet at one tau with different laws: the fake's best answer is the score of their mixture, i.e. the two scores weighted
    by share and density at x (Eq. 9): wrong for either, and not their mean. Where the two steps begin at different s, the loss of "exact" also weighs
    each by its b^2. Told K, each is its own."""
    tau, x = 0.7, torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)
    sigma = float(schedule.sigma(times(tau)))
    laws = [(0.3, s[0], 0.8, 0.3), (0.7, s[1], -0.5, 0.6)]  # share, s, mean and std of x_s
    rows = [(share, at, lambda z, m=m, c=c: (m + c * z, z)) for share, at, m, c in laws]
    score, density, square = [], [], []
    for share, at, m, c in laws:
        a, b = (float(v) for v in transition(schedule, times(at), times(tau)))
        std = math.hypot(a * c, b)
        (
            score.append((a * m - x) / std**2),
            density.append(share / std * torch.exp(-(((x - a * m) / std) ** 2) / 2)),
            square.append(b**2),
        )
    told = [-pointwise_best(schedule, x, [row], "exact")(tau) / sigma for row in rows]
    close(told[0], score[0], 1e-8), close(told[1], score[1], 1e-8)
    shared = -pointwise_best(schedule, x, rows, "exact")(tau) / sigma
    weight = [p * b for p, b in zip(density, square)]
    close(shared, (weight[0] * score[0] + weight[1] * score[1]) / (weight[0] + weight[1]), 1e-8)
    mixture = (density[0] * score[0] + density[1] * score[1]) / (density[0] + density[1])
    assert (
        (shared - mixture).abs().max() < 1e-8
        if s[0] == s[1]
        else (shared - mixture).abs().max() > 0.01
    )
    for wrong in (score[0], score[1], 0.3 * score[0] + 0.7 * score[1]):
        assert (shared - wrong).abs().max() > 0.1


@pytest.mark.parametrize("schedule", [Flow(), VP()], ids=["flow", "vp"])
def test_pointwise_optima_of_a_bent_student(schedule):
    """A student far from linear, d = 1, step .75 -> .5: "exact" learns the score of x_tau, "importance" that of x0 noised afresh to tau (the ratio is not
    tempered in one dimension); the two differ."""
    tau, x, t, s = 0.65, torch.linspace(-1.5, 1.5, 13, dtype=torch.float64), 0.75, 0.5
    sigma, alpha = float(schedule.sigma(times(tau))), float(schedule.alpha(times(tau)))

    def land(z):
        rows = z[:, None]
        x_s, x0 = student_step(
            lambda x, t: bend(x),
            schedule,
            "x0",
            rows,
            torch.full_like(z, t),
            torch.full_like(z, s),
            {},
        )
        return x_s[:, 0], x0[:, 0]

    z = torch.linspace(-10, 10, 801, dtype=torch.float64)
    x_s, x0 = land(z)
    a, b = (float(v) for v in transition(schedule, times(s), times(tau)))

    def score(mean, std):
        p = torch.exp(-((x[:, None] - mean) ** 2) / (2 * std**2) - z**2 / 2)
        return (p * (mean - x[:, None])).sum(1) / (std**2 * p.sum(1))

    got = {
        target: -pointwise_best(schedule, x, [(1.0, s, land)], target)(tau) / sigma
        for target in ("exact", "importance")
    }
    close(got["exact"], score(a * x_s, b), 1e-8)
    close(got["importance"], score(alpha * x0, sigma), 1e-8)
    assert (got["exact"] - got["importance"]).abs().max() > 0.1


# ---- K = 1 is DMD ----------------------------------------------------------------------------------------------------


@every_schedule
@every_kind
def test_fake_loss_of_the_last_step_is_dmd_s(schedule, kind):
    """s = 0: weight 1 and eps_mix = eps, so both targets in the network's space are dmd.py's fake loss; "exact" with weight "snr" is its loss
    in eps."""
    tau, x0, eps = times(0.1, 0.4, 0.7, 0.95), normal(4, 3), normal(4, 3, seed=1)
    net = lambda x_t, t: torch.sin(x_t) + expand(t, x_t) * x_t  # noqa: E731
    double = lambda x_t, t: DoubleOutput.apply_to(net(x_t, t))  # noqa: E731
    want = dmd.fake_score_loss(double, schedule, kind, x0, eps, tau, {})
    close(fake_score_loss(net, schedule, kind, x0, x0, eps, 0 * tau, tau, {}), want, 1e-10)
    as_eps = lambda x_t, t: DoubleOutput.apply_to(
        to_x0_eps(net(x_t, t), kind, x_t, schedule.alpha(t), schedule.sigma(t))[1]
    )  # noqa: E731
    close(fake_score_loss(net, schedule, kind, x0, x0, eps, 0 * tau, tau, {}, "exact"), want, 1e-10)
    close(
        fake_score_loss(net, schedule, kind, x0, x0, eps, 0 * tau, tau, {}, "exact", "snr"),
        dmd.fake_score_loss(as_eps, schedule, "eps", x0, eps, tau, {}),
        1e-10,
    )


@every_network
def test_one_step_student_is_dmd_s(which):
    """From z at t = 1 with the same draws: same sample, same x_tau, and the student's gradient under "l2" is dmd.py's but for its normaliser; the fake's
    gradient is dmd.py's."""
    teacher, fake, _, kind = networks(which)
    schedule = VP() if which == "vp dit" else Flow()
    z, eps, tau, cond, _ = draws(which)
    one = torch.ones_like(tau)
    student = copy.deepcopy(fake)
    tolerance = 1e-10 if which == "ring" else 1e-6  # the DiT turns queries and keys in float32

    def gradients(net, loss):
        return {
            n: g
            for (n, _), g in zip(
                net.named_parameters(),
                torch.autograd.grad(loss, list(net.parameters()), allow_unused=True),
            )
            if g is not None
        }

    x_s, x0 = student_step(student, schedule, kind, z, one, 0 * one, cond)
    x = predict_x0(
        student,
        schedule,
        kind,
        dmd.rollout(student, schedule, kind, z, [1.0], cond, "sde", None),
        one,
        **cond,
    )
    assert torch.equal(x_s, x0) and torch.equal(x0, x)
    with torch.no_grad():
        x_tau = noise_on(schedule, x_s, eps, 0 * tau, tau)
        assert torch.equal(x_tau, add_noise(schedule, x, eps, tau))
        real, guess = (
            predict_x0(teacher, schedule, kind, x_tau, tau, **cond),
            predict_x0(fake, schedule, kind, x_tau, tau, **cond),
        )
        g = dmd.distribution_matching_gradient(x, real, guess)
        g = g * (x - real).abs().flatten(1).mean(1).reshape(
            -1, *[1] * (x.dim() - 1)
        )  # without Eq. 8's normaliser
    got, want = (
        gradients(student, trajectory_matching_loss(x0, real, guess, "l2")),
        gradients(student, dmd.distribution_matching_loss(x, g)),
    )
    assert got.keys() == want.keys() and max(v.abs().max() for v in got.values()) > 1e-6
    for n in got:
        close(got[n], want[n], tolerance)
    double = lambda x_t, t, **cond: DoubleOutput.apply_to(fake(x_t, t, **cond))  # noqa: E731
    got = gradients(
        fake, fake_score_loss(fake, schedule, kind, x.detach(), x.detach(), eps, 0 * tau, tau, cond)
    )
    want = gradients(fake, dmd.fake_score_loss(double, schedule, kind, x.detach(), eps, tau, cond))
    assert got.keys() == want.keys()
    for n in got:
        close(got[n], want[n], max(1e-8, tolerance))


# ---- the student's loss ----------------------------------------------------------------------------------------------


def pull(x0, real, fake, loss):
    """Gradient of the loss in x0, as the script's is: with x0 in x0 alone."""
    leaf = x0.clone().requires_grad_(True)
    return torch.autograd.grad(trajectory_matching_loss(leaf, real, fake, loss), leaf)[0]


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 5), (4, 2, 3, 2)], ids=str)
def test_l2_gradient_is_the_score_difference(shape):
    """dL/dx0 = -(x0_real - x0_fake) / numel whatever x0 is, its value half their mean square, and DMD's up to its normaliser."""
    x0, real, fake = (normal(*shape, seed=k) for k in range(3))
    for x in (x0, 100 * x0, real):
        close(pull(x, real, fake, "l2"), -(real - fake) / x.numel(), 1e-12)
    close(trajectory_matching_loss(x0, real, fake, "l2"), (real - fake).square().mean() / 2, 1e-12)
    error = (x0 - real).abs().flatten(1).mean(1)
    close(
        pull(x0, real, fake, "l2") / expand(error, x0),
        dmd.distribution_matching_gradient(x0, real, fake) / x0.numel(),
        1e-12,
    )


@every_setting
@pytest.mark.parametrize("renoise", ["ode", "sde"])
def test_slope_is_the_step_s_derivative(schedule, grid, renoise):
    """A = dx_s / dx0 at fixed x_t, by autograd; positive, 1 for the last step to clean data, (t - s) / t for a deterministic flow step."""
    t, s = times(*grid[:-1]), times(*grid[1:])
    x_t, noise, x0 = (
        normal(len(t), 3),
        normal(len(t), 3, seed=1),
        normal(len(t), 3, seed=2).requires_grad_(True),
    )
    x_s, _ = student_step(
        lambda x, t: x0, schedule, "x0", x_t, t, s, {}, noise if renoise == "sde" else None
    )
    want = torch.autograd.grad(x_s.sum(), x0)[0][:, 0]
    close(step_slope(schedule, t, s, renoise), want, 1e-10)
    assert (want > 0).all() and abs(want[-1] - schedule.alpha(s[-1:])) < 1e-4
    if isinstance(schedule, Flow) and renoise == "ode":
        close(want, (t - s) / t, 1e-10)


def test_loss_is_of_x_s():
    """With the slope, Eq. 11 and squares are those of x_s minus sg(x_s + A (x0_real - x0_fake)), their gradient in x0 goes through x_s; the demo's is of x0."""
    schedule, t, s = Flow(), times(1.0, 0.6, 0.3), times(0.7, 0.2, 0.0)
    x_t, x0, real, fake = (normal(3, 4, seed=k) for k in range(4))
    leaf, A = x0.clone().requires_grad_(True), step_slope(schedule, t, s)
    x_s, _ = student_step(lambda x, t: leaf, schedule, "x0", x_t, t, s, {})
    r = x_s - (x_s + A[:, None] * (real - fake)).detach()
    c = 0.00054 * 2
    for loss, want in (
        ("l2", 0.5 * r.square().mean()),
        ("pseudo_huber", ((r.square().sum(1) + c**2).sqrt() - c).mean()),
    ):
        other = x0.clone().requires_grad_(True)
        got = trajectory_matching_loss(other, real, fake, loss, A)
        close(got, want, 1e-10)
        close(
            torch.autograd.grad(got, other)[0],
            torch.autograd.grad(want, leaf, retain_graph=True)[0],
            1e-10,
        )
    assert torch.equal(
        trajectory_matching_loss(x0, real, fake, "demo", A),
        trajectory_matching_loss(x0, real, fake, "demo"),
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_default_loss_and_values(loss):
    """Eq. 11 is the default; every loss is 0 where teacher and fake agree, positive elsewhere, and symmetric in them but for the normaliser."""
    x0, real, fake = (normal(4, 3, seed=k) for k in range(3))
    assert torch.equal(
        trajectory_matching_loss(x0, real, fake),
        trajectory_matching_loss(x0, real, fake, "pseudo_huber"),
    )
    assert trajectory_matching_loss(x0, real, real, loss).abs() < 1e-12
    assert trajectory_matching_loss(x0, real, fake, loss) > 0.1
    assert inspect.signature(trajectory_matching_loss).parameters["loss"].default == "pseudo_huber"


@every_network
@pytest.mark.parametrize("loss", LOSSES)
def test_no_pull_where_fake_is_the_teacher(which, loss):
    """fake = deepcopy(teacher), guidance 1: exactly no gradient, at any step. Guidance w leaves (w - 1) (f_c - f_0) to pull along."""
    teacher, _, _, kind = networks(which)
    schedule = VP() if which == "vp dit" else Flow()
    fake = copy.deepcopy(teacher)
    x, eps, t, cond, uncond = draws(which)
    s = 0.5 * t
    with torch.no_grad():
        x_tau, tau = noise_on(schedule, x, eps, s, 0.8 * t), 0.8 * t
        x0_fake = predict_x0(fake, schedule, kind, x_tau, tau, **cond)
        c, u = (predict_x0(teacher, schedule, kind, x_tau, tau, **v) for v in (cond, uncond))
        guided = {
            w: guided_x0(teacher, schedule, kind, x_tau, tau, cond, uncond, w) for w in (1.0, 3.5)
        }
    assert not pull(x, guided[1.0], x0_fake, loss).any()
    got = pull(x, guided[3.5], x0_fake, loss)
    if loss == "l2":
        close(got, -2.5 * (c - u) / x.numel(), 1e-12)
    moved = (c - u).flatten(1).abs().amax(1) > 1e-3
    assert moved.any() and (((got * (c - u)).flatten(1).sum(1))[moved] < 0).all()


def test_pseudo_huber_gradient_is_a_direction():
    """Eq. 11: per sample (1 / B of) r / sqrt(|r|^2 + c^2), c = .00054 sqrt(d): length below 1 and near it for large r, |r| / c for small; each sample by
    itself. One root per batch, or per element, is not that."""
    B, shape = 5, (3, 4)
    c = 0.00054 * 12**0.5
    unit = normal(B, *shape) / expand(normal(B, *shape).flatten(1).norm(dim=1), normal(B, *shape))
    size = c * times(1e-4, 0.1, 1.0, 10.0, 1e5)
    x0, real = normal(B, *shape, seed=1), normal(B, *shape, seed=2)
    fake = real - expand(size, unit) * unit  # x0 is pulled along unit
    g = -B * pull(x0, real, fake, "pseudo_huber")
    want = size / (size**2 + c**2).sqrt()
    close(g.flatten(1).norm(dim=1), want, 1e-9)
    close(g, expand(want, unit) * unit, 1e-9)
    assert (g.flatten(1).norm(dim=1) <= 1).all() and g[4].norm() > 0.999999
    close(g[0].norm(), size[0] / c, 1e-8)
    close(trajectory_matching_loss(x0, real, fake), ((size**2 + c**2).sqrt() - c).mean(), 1e-9)
    alone = pull(x0[2:3], real[2:3], fake[2:3], "pseudo_huber")
    close(alone / B, pull(x0, real, fake, "pseudo_huber")[2:3], 1e-12)


@pytest.mark.parametrize(
    "shape, c", [((4, 64, 64), 0.0691), ((4, 128, 128), 0.138), ((16, 13, 60, 90), 0.572)], ids=str
)
def test_pseudo_huber_constant_of_real_latents(shape, c):
    """iCT's c for the sizes the paper trains at: the loss of a residual of length c is (sqrt 2 - 1) c."""
    d = math.prod(shape)
    x0 = torch.zeros(1, *shape, dtype=torch.float64)
    real = torch.full_like(x0, c / d**0.5)
    close(trajectory_matching_loss(x0, real, x0), (2**0.5 - 1) * c, 0.003 * c)


def test_demo_loss_is_element_wise_over_dmd_s_normaliser():
    """(sqrt(r^2 + 1e-6) - 1e-3) / mean|x0 - x0_real| per sample, the latter a constant and of the real, not of the fake."""
    x0, real, fake = (normal(4, 3, 5, seed=k) * (1 + k) for k in range(3))
    fake[0, 0] = real[0, 0] + 1e-3 * normal(5, seed=7)  # where the root is rounded
    r = fake - real
    error = (x0 - real).abs().mean((1, 2), keepdim=True)
    close(
        trajectory_matching_loss(x0, real, fake, "demo"),
        (((r**2 + 1e-6).sqrt() - 1e-3) / error).mean(),
        1e-12,
    )
    close(pull(x0, real, fake, "demo"), r / (r**2 + 1e-6).sqrt() / error / r.numel(), 1e-12)
    large = r.abs() > 1
    close(
        (pull(x0, real, fake, "demo") * r.numel())[large],
        (dmd.distribution_matching_gradient(x0, real, fake) / r.abs())[large],
        1e-5,
    )
    others, moved = [0, 2, 3], x0.clone()
    moved[1] *= 100
    assert torch.equal(
        pull(moved, real, fake, "demo")[others], pull(x0, real, fake, "demo")[others]
    )
    assert (
        pull(real, real, fake, "demo").isfinite().all() and not pull(real, real, real, "demo").any()
    )


@every_setting
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("width, sign", [(1.2, 1), (0.8, -1)], ids=["too wide", "too narrow"])
def test_one_step_mends_a_gaussian_student(schedule, grid, loss, width, sign):
    """x_s too wide shrinks under one step of gradient descent, too narrow grows, at every step and level; teacher and fake exchanged do the opposite."""
    T = Trajectory(schedule, grid, 1.0)
    A = schedule.alpha(T.s) - schedule.sigma(T.s) * schedule.alpha(T.t) / schedule.sigma(T.t)
    h = (width * T.g - schedule.sigma(T.s) / schedule.sigma(T.t)) / A
    fake = T.fake(h, target="exact")
    before = T.land(h)[0].square().mean(1)
    close(before, width**2 * variance(schedule, T.s, 1.0), 1e-9)
    step = 1e-4 * T.gradient(h, fake, loss)
    assert (sign * (T.land(h - step)[0].square().mean(1) - before) < 0).all()
    assert (
        sign * (T.land(h + step)[0].square().mean(1) - before) > 0
    ).all()  # l2's and Huber's gradients are odd in the score difference
    x0, real, guess = normal(3, 4), normal(3, 4, seed=1), normal(3, 4, seed=2)
    if loss != "demo":
        close(pull(x0, real, guess, loss), -pull(x0, guess, real, loss), 1e-12)


class Remembered:
    """A schedule that looks each batch of times up once."""

    def __init__(self, schedule):
        self.schedule, self.known = schedule, {}

    def alpha(self, t):
        return self.recall(self.schedule.alpha, t)

    def sigma(self, t):
        return self.recall(self.schedule.sigma, t)

    def recall(self, function, t):
        key = function.__name__, tuple(t.tolist())
        if key not in self.known:
            self.known[key] = function(t)
        return self.known[key]


def descend(schedule, grid, C, target, steps=200):
    """Scalar-gain students on data of variances C (n,), trained by the exact expected gradient, averaged over three levels of each step, with the best
    linear fake at each level after each update.  -> the student as a network, and E[x^2] where each of the K steps lands over the data's there (n, K)."""
    K, n, inside = len(grid) - 1, len(C), times(0.2, 0.5, 0.9)
    L = len(inside)
    t, s = (times(*v)[None, :, None].expand(n, K, L).flatten() for v in (grid[:-1], grid[1:]))
    tau = s + inside.repeat(n * K) * (t - s)
    by_row = lambda v: v[..., None].expand(n, K, L).reshape(-1, 1)  # (n, K) -> (n * K * L, 1)
    real, eps = (
        real_gain(schedule, tau, C[:, None, None].expand(n, K, L).flatten())[:, None],
        EPS.expand(n * K * L, -1),
    )
    column = {v: i for i, v in enumerate(grid[:-1])}
    h = (
        torch.stack([real_gain(schedule, torch.full_like(C, v), C) for v in grid[:-1]], 1) + 0.1
    )  # from the teacher, but flow's says 0 at t = 1: a saddle
    student = lambda x, t: h[:, column[float(t[0])], None] * x

    def visited():
        states = [Z.expand(n, -1)]
        for a, b in zip(grid, grid[1:]):
            states.append(
                student_step(
                    student, schedule, "x0", states[-1], times(a).expand(n), times(b).expand(n), {}
                )[0]
            )
        return torch.stack(states, 1)  # (n, K + 1, 4)

    for _ in range(steps):
        inputs = visited()[:, :-1]
        x_t, leaf = (
            inputs[:, :, None].expand(n, K, L, 4).reshape(-1, 4),
            h.clone().requires_grad_(True),
        )
        x_s, x0 = student_step(lambda x, t: by_row(leaf) * x, schedule, "x0", x_t, t, s, {})
        fake = best_fake(schedule, x_s.detach(), x0.detach(), eps, s, tau, target=target)[:, None]
        x_tau = noise_on(schedule, x_s, eps, s, tau).detach()
        slope = torch.autograd.grad(
            trajectory_matching_loss(x0, real * x_tau, fake * x_tau, "l2"), leaf
        )[0]
        h = h - 2 * n * K * slope / inputs.square().mean(-1)
    want = torch.stack([variance(schedule, torch.full_like(C, v), C) for v in grid[1:]], 1)
    return student, visited()[:, 1:].square().mean(-1) / want


@pytest.mark.parametrize(
    "schedule, grid",
    [
        (Flow(), step_grid(1)),
        (Flow(), step_grid(2)),
        (VP(), step_grid(1)),
        (VP(), step_grid(2)),
        *SETTINGS.values(),
    ],
    ids=["flow, 1", "flow, 2", "vp, 1", "vp, 2", *SETTINGS],
)
@pytest.mark.parametrize("target", ["exact", "importance"])
def test_trained_gaussian_students_have_the_data_s_variance(schedule, grid, target):
    """Data of variance .25, 1 and 4: the sampled variance is right within 1 % with either fake, that of all other landings with the exact one only: the
    importance fake makes them too wide, the last but one most."""
    C = times(0.25, 1.0, 4.0)
    student, ratio = descend(Remembered(schedule), grid, C, target)
    x = sample(student, schedule, "x0", Z.expand(3, -1), grid, {})
    assert ((x.square().mean(1) / C - 1).abs() < 0.01).all() and (
        (ratio[:, -1] - 1).abs() < 0.01
    ).all()
    if target == "exact":
        assert ((ratio - 1).abs() < 0.01).all()
    else:
        assert (ratio[:, :-1] > 1.001).all() and (ratio[:, :-1].diff(dim=1) > 0).all()
        if grid == DEMO_GRID:
            (
                close(ratio[1], times(1.007, 1.072, 1.265, 1.0), 5e-3),
                close(ratio[2], times(1.025, 1.196, 1.343, 1.0), 1.5e-2),
            )


# ---- where gradients go ----------------------------------------------------------------------------------------------


@every_network
@pytest.mark.parametrize("loss", LOSSES)
def test_student_s_loss_reaches_the_student_alone(which, loss):
    """Teacher and fake, with open graphs and reached through x_tau too, get no gradient; the student's is its vector-Jacobian product with dL/dx0."""
    teacher, fake, _, kind = networks(which)
    schedule = VP() if which == "vp dit" else Flow()
    if which == "ring":
        teacher = copy.deepcopy(fake)
        with torch.no_grad():
            next(teacher.parameters()).mul_(1.5)
    student = copy.deepcopy(fake)
    z, eps, t, cond, uncond = draws(which)
    s, tau = 0.5 * t, 0.8 * t
    x_s, x0 = student_step(student, schedule, kind, z, t, s, cond)
    x_tau = noise_on(schedule, x_s, eps, s, tau)
    real, guess = (
        guided_x0(teacher, schedule, kind, x_tau, tau, cond, uncond, 2.0),
        predict_x0(fake, schedule, kind, x_tau, tau, **cond),
    )
    assert real.requires_grad and guess.requires_grad
    trajectory_matching_loss(x0, real, guess, loss).backward()
    assert not has_gradient(teacher) and not has_gradient(fake)
    got = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    again = copy.deepcopy(fake)
    student_step(again, schedule, kind, z, t, s, cond)[1].backward(
        pull(x0.detach(), real.detach(), guess.detach(), loss)
    )
    want = {n: p.grad for n, p in again.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys() and any(v.abs().max() > 1e-6 for v in got.values())
    for n in got:
        close(got[n], want[n], 1e-10 if which == "ring" else 1e-5)


@every_network
@pytest.mark.parametrize("target", ["importance", "exact"])
def test_fake_s_loss_reaches_the_fake_alone(which, target):
    """On detached samples every weight of the fake and nobody else's gets a gradient."""
    _, fake, _, kind = networks(which)
    schedule = VP() if which == "vp dit" else Flow()
    student = copy.deepcopy(fake)
    z, eps, t, cond, _ = draws(which)
    x_s, x0 = (v.detach() for v in student_step(student, schedule, kind, z, t, 0.5 * t, cond))
    for weight in ("network", "snr"):
        fake.zero_grad(set_to_none=True)
        fake_score_loss(
            fake, schedule, kind, x_s, x0, eps, 0.5 * t, 0.8 * t, cond, target, weight
        ).backward()
        assert not has_gradient(student) and all(p.grad is not None for p in fake.parameters())


# ---- no signal left at t = 1 -----------------------------------------------------------------------------------------


def test_zero_terminal_snr():
    """alpha(1) = 0 and v-prediction: x0 = -v at t = 1, and step, bridge, weight, losses and sample are finite, also with tau = 1 and s = tau = 1; an
    eps-prediction says nothing there and is not."""
    schedule = VP(zero_snr=True)
    net = lambda x_t, t: torch.sin(x_t) + 0.1  # noqa: E731
    z, eps, one = normal(4, 3), normal(4, 3, seed=1), torch.ones(4, dtype=torch.float64)
    s = times(0.0, 0.5, 0.999, 1.0)
    x_s, x0 = student_step(net, schedule, "vp_v", z, one, s, {})
    close(x0, -net(z, one), 1e-13), close(x_s, add_noise(schedule, x0, z, s), 1e-13)
    x_tau = noise_on(schedule, x_s, eps, s, one)
    assert torch.equal(x_tau[:3], eps[:3]) and torch.equal(x_tau[3], x_s[3])
    weight = importance_weight(schedule, x_tau, x0, eps, one)
    close(weight[:3], torch.ones(3), 1e-13)
    assert weight.isfinite().all()
    for flags in ({}, {"weight": "snr"}, {"target": "exact"}, {"target": "exact", "weight": "snr"}):
        leaf = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
        level = (
            s.clamp(max=0.999) if flags == {"target": "exact"} else s
        )  # a step never lands at pure noise
        loss = fake_score_loss(
            lambda x_t, t: net(x_t, t) + leaf,
            schedule,
            "vp_v",
            x_s,
            x0,
            eps,
            level,
            one,
            {},
            **flags,
        )
        assert loss.isfinite() and torch.autograd.grad(loss, leaf)[0].isfinite().all()
    for loss in LOSSES:
        assert pull(x0, predict_x0(net, schedule, "vp_v", x_tau, one), x0, loss).isfinite().all()
    for K in (1, 2, 4):
        assert sample(net, schedule, "vp_v", z, step_grid(K), {}).isfinite().all()
    assert not student_step(net, schedule, "eps", z, one, s, {})[0].isfinite().all()


# ---- the sampler -----------------------------------------------------------------------------------------------------


class Spy:
    """A network that keeps what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, **cond):
        assert not torch.is_grad_enabled()
        self.calls.append((x_t.clone(), t, cond))
        return torch.sin(3 * x_t) + expand(t, x_t)


@every_schedule
@pytest.mark.parametrize("K", [1, 2, 4])
def test_sampler_follows_the_grid(schedule, K):
    """K calls at grid[0] ... grid[K - 1], conditioned, none without condition, each from where the one before landed; twice the same."""
    z, grid, cond, net = (
        normal(3, 2),
        step_grid(K, 2.0),
        {"label": torch.arange(3), "steps": torch.full((3,), float(K))},
        Spy(),
    )
    x = sample(net, schedule, "vp_v", z, grid, cond)
    assert len(net.calls) == K and all(
        c is not None and c.keys() == cond.keys() and c["label"] is cond["label"]
        for _, _, c in net.calls
    )
    assert [t.tolist() for _, t, _ in net.calls] == [[t] * 3 for t in grid[:-1]]
    assert torch.equal(net.calls[0][0], z)
    want = z
    with torch.no_grad():
        for i, (t, s) in enumerate(zip(grid, grid[1:])):
            assert torch.equal(net.calls[i][0], want)
            x0, eps = predict_x0_eps(Spy(), schedule, "vp_v", want, times(t).expand(3))
            want = add_noise(schedule, x0, eps, times(s).expand(3))
    assert torch.equal(x, want) and torch.equal(x, x0)  # the last call's clean prediction
    assert not x.requires_grad and torch.equal(sample(Spy(), schedule, "vp_v", z, grid, cond), x)


@every_schedule
def test_sampler_draws_noise_only_if_given_some(schedule):
    """No generator is touched; with fresh, its i-th noise goes into the i-th landing, and only x0 comes out of the last."""
    z, grid, noise = normal(3, 2), step_grid(3), normal(3, 3, 2, seed=4)
    state = torch.get_rng_state()
    x, asked = sample(Spy(), schedule, "vp_v", z, grid, {}), []
    stochastic = sample(Spy(), schedule, "vp_v", z, grid, {}, lambda i: asked.append(i) or noise[i])
    assert torch.equal(torch.get_rng_state(), state) and asked[:2] == [0, 1]
    want = z
    with torch.no_grad():
        for i, (t, s) in enumerate(zip(grid, grid[1:])):
            x0 = predict_x0(Spy(), schedule, "vp_v", want, times(t).expand(3))
            want = add_noise(schedule, x0, noise[i], times(s).expand(3))
    assert (
        torch.equal(stochastic, want)
        and torch.equal(want, x0)
        and not torch.allclose(x, stochastic, rtol=0.01)
    )


def test_sampler_of_an_exact_teacher_approaches_its_law():
    """The ring's own network in 64 deterministic steps has the ring's modes: within three stds of one, nearly always."""
    ring = RingTeacher()
    x = sample(
        ring, Flow(), "flow_v", normal(400, 2), step_grid(64), {"label": torch.arange(400) % 4}
    )
    distance = torch.cdist(x, ring.means)
    assert (distance.min(1).values < 3 * ring.std).double().mean() > 0.95
    assert (distance.argmin(1) % 4 == torch.arange(400) % 4).double().mean() > 0.99
