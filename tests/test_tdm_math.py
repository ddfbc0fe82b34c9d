"""tdm.py against the paper's formulas (2503.06674 v2).

A step of the trajectory and how its landing point is noised on, the importance weight, what either
target teaches the fake, the student's loss (Eq. 6 and 11), and the sampler.
"""

import copy
import functools
import inspect
import math
import types

import pytest
import tdm_fakes
import torch
from test_decoupled_math import diffusion_of, draws, every_network, networks
from test_dmd_math import DoubleOutput, close, has_gradient, normal, seeing

import dmd
import tdm
from models.diffusion import (
    VP,
    Diffusion,
    Flow,
    add_noise,
    expand,
    from_x0_eps,
    noise_on,
    shift,
    step_grid,
    to_x0_eps,
    transition,
    unshift,
)
from models.draws import Draws
from models.worlds.ring import RingTeacher
from tdm import (
    Segment,
    chosen_fake_loss,
    exact_fake_loss,
    exact_fake_loss_of_eps,
    fake_score_loss,
    importance_weight,
    noise_level,
    regresses_x_s,
    sample,
    snr_fake_loss,
    step_slope,
    student_step,
    tdm_loss,
    tdm_loss_variant,
    trajectory,
    trajectory_matching_loss,
)

KINDS = ("x0", "eps", "flow_v", "vp_v", "score")
LOSSES = ("pseudo_huber", "demo", "l2")
SCHEDULES = {"flow": Flow(), "vp": VP(), "vp, zero terminal snr": VP(zero_snr=True)}
LINEAR = VP("linear", 1e-4, 2e-2)
DEMO_GRID = [0.9, 0.675, 0.45, 0.225, 0.0]  # K = 4 from T = 900 of 1000
FLOW_X0, FLOW_V = Diffusion(Flow(), "x0"), Diffusion(Flow(), "flow_v")

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_loss = pytest.mark.parametrize("loss", LOSSES)

# Two rows with mean square 1 and mean product 0: multiples of them have exactly the second moments
# of independent normals, which is what a sample of many dimensions tends to. A batch whose items
# are such rows makes each item's loss an expectation, without sampling.
Z, EPS = (torch.tensor([row], dtype=torch.float64) for row in ([1, 1, -1, -1], [1, -1, 1, -1]))


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def bridge(schedule, shape=(3, 2)):
    """Six steps t -> s with a level tau between, one of them from t = 1, and random rows.

    -> t, s, tau (6,), x_in, x, eps (6, *shape).
    """
    t, s = times(0.3, 0.5, 0.75, 0.75, 0.9375, 1.0), times(0.0, 0.25, 0.5, 0.0, 0.8333, 0.75)
    tau = s + times(0.1, 0.02, 0.9, 0.4, 0.5, 0.6) * (t - s)
    return t, s, tau, *(normal(6, *shape, seed=k) for k in range(3))


def constant(prediction):
    """A network that predicts this whatever it is asked."""
    return lambda x_t, t, **cond: prediction


def step_to(schedule, x, x_in, t, s, noise=None):
    """The step of a student that predicts x.  -> x_s, x."""
    return student_step(constant(x), Diffusion(schedule, "x0"), x_in, t, s, {}, noise)


# ---- one step ------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("kind", ["x0", "flow_v", "vp_v"])
def test_step_is_ddim(schedule, kind):
    """x_s = alpha_s x + sigma_s eps-hat, whatever the network predicts.

    eps-hat is the noise that x_in and x imply, or the noise that is given.
    """
    t, s, _, x_in, x, noise = bridge(schedule)
    alpha_s, sigma_s = expand(schedule.alpha(s), x), expand(schedule.sigma(s), x)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    eps_hat = (x_in - expand(alpha, x) * x) / expand(sigma, x)
    net = constant(from_x0_eps(kind, x, eps_hat, alpha, sigma))
    for given, eps in ((None, eps_hat), (noise, noise)):
        x_s, clean = student_step(net, Diffusion(schedule, kind), x_in, t, s, {}, given)
        close(clean, x, 1e-12)
        close(x_s, alpha_s * x + sigma_s * eps, 1e-12)


@every_schedule
def test_step_to_zero_is_the_clean_prediction(schedule):
    """A step t -> 0 returns x exactly, with or without noise; t -> t returns x_in."""
    t, _, _, x_in, v, noise = bridge(schedule)
    diffusion = Diffusion(schedule, "vp_v")
    for given in (None, noise):
        x_s, x = student_step(constant(v), diffusion, x_in, t, 0 * t, {}, given)
        assert torch.equal(x_s, x)
    close(student_step(constant(v), diffusion, x_in, t, t, {})[0], x_in, 1e-13)


def test_step_of_flow_is_euler():
    """x_s = x_in - (t - s) v."""
    t, s, _, x_in, v, _ = bridge(Flow())
    x_s, _ = student_step(constant(v), FLOW_V, x_in, t, s, {})
    close(x_s, x_in - expand(t - s, x_in) * v, 1e-13)


@every_schedule
def test_landing_moves_with_the_clean_prediction(schedule):
    """With x_in fixed the Jacobian of x_s in x is A times the identity, so both move alike.

    A = alpha_s - sigma_s alpha_t / sigma_t > 0, which is (t - s) / t for flow and 1 at s = 0. With
    fresh noise it is alpha_s.
    """
    t, s, _, x_in, x, noise = bridge(schedule, (2,))
    A = schedule.alpha(s) - schedule.sigma(s) * schedule.alpha(t) / schedule.sigma(t)
    assert (A > 0).all() and (A[s == 0] == 1).all()
    for given, factor in ((None, A), (noise, schedule.alpha(s))):

        def landing(x, given=given):
            return step_to(schedule, x, x_in, t, s, given)[0].flatten()

        J = torch.autograd.functional.jacobian(landing, x)
        close(J.reshape(12, 12), torch.diag(factor.repeat_interleave(2)), 1e-12)
    if isinstance(schedule, Flow):
        close(A, (t - s) / t, 1e-13)


def test_landing_factors_of_the_demo():
    """A at T = 900, K = 4, linear betas: .083 .263 .525 1 from the noise on."""
    t, s = times(*DEMO_GRID[:-1]), times(*DEMO_GRID[1:])
    x = torch.ones(4, dtype=torch.float64)
    A = torch.autograd.functional.jacobian(lambda x: step_to(LINEAR, x, EPS[0], t, s)[0], x)
    close(A.diagonal(), times(0.083, 0.263, 0.525, 1.0), 2e-3)


# ---- the trajectory's levels ---------------------------------------------------------------------


@pytest.mark.parametrize("timestep_shift", [1.0, 2.2, 5.0])
@pytest.mark.parametrize("T", [1.0, 0.9, 0.3])
def test_trajectory_is_uniform_in_raw_time_from_T(timestep_shift, T):
    """K + 1 levels from T, a level after the shift, to 0: u_i = u_T i / K (Eq. 8).

    From T = 1 they are those of every sampler here, to the bit. Grids of K = 1, 2, 4 nest.
    """
    grids = {K: trajectory(K, timestep_shift, T) for K in (1, 2, 4)}
    assert grids[4][::2] == grids[2] and grids[4][::4] == grids[1] == [T, 0.0]
    u = [unshift(t, timestep_shift) for t in grids[4]]
    assert u == pytest.approx([u[0] * v for v in (1, 0.75, 0.5, 0.25, 0)], rel=1e-12)
    if T == 1:
        assert grids[4] == step_grid(4, timestep_shift)
    else:  # T before the shift would begin elsewhere
        assert timestep_shift == 1 or abs(shift(T, timestep_shift) - T) > 0.01


def test_trajectory_of_the_demo():
    """T = 900 of 1000 indices: the inputs 899, 674, 449 and 224.

    There an error of the noise is 60 times as large in x; at index 999 it is 157 times.
    """
    grid = trajectory(4, 1.0, 0.9)
    assert grid == pytest.approx(DEMO_GRID)
    assert [round(1000 * t - 1) for t in grid[:-1]] == [899, 674, 449, 224]
    error = LINEAR.sigma(times(0.9, 1.0)) / LINEAR.alpha(times(0.9, 1.0))
    close(error, times(60.0, 157.0), 5e-3)


@pytest.mark.parametrize("timestep_shift", [1.0, 2.0, 5.0, 6.0])
@pytest.mark.parametrize(
    "flags", ["", "--max_time 0.9", "--tau_range to_noise", "--tau_range last_to_noise"]
)
def test_levels_of_a_step_fill_its_interval(timestep_shift, flags):
    """tau is uniform in raw time between s and t, but for 2 % of t - s, in t, at either end.

    So a single step is matched from t = .02 to .98 whatever the shift. With 2 % of raw time its
    cleanest .093 would be left out under shift 5. "to_noise": up to T instead of t, and
    "last_to_noise" for the last step alone.
    """
    args, n = tdm.parse_args(flags.split()), 1000
    grid = {K: trajectory(K, timestep_shift, args.max_time) for K in (1, 4)}
    for K, k in ((1, 0), (4, 0), (4, 1), (4, 3)):
        t, s = grid[K][k : k + 2]
        segment = Segment(None, torch.full((n,), t), torch.full((n,), s), (), {}, {})
        draw, teacher = Draws(0, 0, 0, range(n)), types.SimpleNamespace(shift=timestep_shift)
        tau = noise_level(args, draw, teacher, segment)
        up = args.tau_range == "to_noise" or args.tau_range == "last_to_noise" and k == K - 1
        top = args.max_time if up else t
        low, high = s + 0.02 * (top - s), top - 0.02 * (top - s)
        assert tau.min() >= low - 1e-6 and tau.max() <= high + 1e-6
        u, (a, b) = unshift(tau, timestep_shift), (unshift(v, timestep_shift) for v in (low, high))
        even = a + (b - a) * (torch.arange(n) + 0.5) / n
        torch.testing.assert_close(u.sort().values, even, rtol=0, atol=0.6 * (b - a) / n + 1e-6)


# ---- noising on, and the importance weight -------------------------------------------------------


def mixed_noise(schedule, t, s, tau, x_in, x, eps):
    """eps_mix = (a sigma_s eps-hat + b eps) / sigma_tau, written out."""
    eps_hat = (x_in - expand(schedule.alpha(t), x) * x) / expand(schedule.sigma(t), x)
    a, b = transition(schedule, s, tau)
    sigma = schedule.sigma(tau)
    return expand(a * schedule.sigma(s) / sigma, x) * eps_hat + expand(b / sigma, x) * eps


def log_weight(eps, eps_mix):
    return (eps.square().flatten(1).mean(1) - eps_mix.square().flatten(1).mean(1)) / 2


def weight_of(schedule, x, x_s, eps, s, tau):
    """The importance weights inside fake_score_loss, read off a fake that is wrong by k.  (n,)."""
    k = torch.ones(len(x), dtype=torch.float64, requires_grad=True)

    def fake(x_tau, tau):
        return x + expand(k, x)

    loss = fake_score_loss(fake, Diffusion(schedule, "x0"), x, x_s, eps, s, tau, {})
    return torch.autograd.grad(loss, k)[0] * len(x) / 2


@every_schedule
def test_bridge_is_one_noising_of_x(schedule):
    """a x_s + b eps == alpha_tau x + sigma_tau eps_mix; without sigma_s, once a bug of the demo's,
    it is not."""
    t, s, tau, x_in, x, eps = bridge(schedule)
    x_tau = noise_on(schedule, step_to(schedule, x, x_in, t, s)[0], eps, s, tau)
    eps_mix = mixed_noise(schedule, t, s, tau, x_in, x, eps)
    close(x_tau, add_noise(schedule, x, eps_mix, tau), 1e-12)
    a, b = transition(schedule, s, tau)
    eps_hat = to_x0_eps(x, "x0", x_in, schedule.alpha(t), schedule.sigma(t))[1]
    wrong = (expand(a, x) * eps_hat + expand(b, x) * eps) / expand(schedule.sigma(tau), x)
    off = (x_tau - add_noise(schedule, x, wrong, tau)).flatten(1).abs().amax(1)
    assert (off[s > 0] > 1e-3).all() and off.max() > 0.5


@every_schedule
def test_importance_weight_is_the_demo_s(schedule):
    """exp((mean eps^2 - mean eps_mix^2) / 2) of each sample by itself.

    eps_mix has the step's own noise in it. The inverse, a sum for the mean, no half and one weight
    for the batch differ.
    """
    t, s, tau, x_in, x, eps = bridge(schedule)
    x_s = step_to(schedule, x, x_in, t, s)[0]
    eps_mix = mixed_noise(schedule, t, s, tau, x_in, x, eps)
    got, log = weight_of(schedule, x, x_s, eps, s, tau), log_weight(eps, eps_mix)
    assert got.shape == (6,)
    close(got, log.exp(), 1e-11)
    close(importance_weight(eps, eps_mix), log.exp(), 1e-12)
    assert got.min() < 0.95 and got.max() > 1.05  # so that these differ
    for wrong in (-log, 6 * log, 2 * log, log.mean().expand(6)):
        assert not torch.allclose(got, wrong.exp(), rtol=0.05)
    two = slice(2, 4)
    alone = weight_of(schedule, x[two], x_s[two], eps[two], s[two], tau[two])
    close(alone, got[two], 1e-13)
    assert torch.equal(
        importance_weight(eps[two], eps_mix[two]), importance_weight(eps, eps_mix)[two]
    )


@every_schedule
def test_importance_weight_at_the_clean_end_is_one(schedule):
    """s = 0: x_s is x, eps_mix is eps, nothing to reweight."""
    tau, x, eps = times(0.05, 0.3, 0.8, 1.0), normal(4, 3), normal(4, 3, seed=1)
    close(weight_of(schedule, x, x, eps, 0 * tau, tau), torch.ones(4), 1e-10)


@every_schedule
def test_bridge_of_fresh_noise(schedule):
    """Where eps-hat is independent standard noise E[eps_mix^2] = 1.

    So with many dimensions the weight is 1. On a trajectory, where eps-hat is not that, it is not.
    """
    s, tau = times(0.1, 0.25, 0.5, 0.75, 0.9), times(0.4, 0.26, 0.74, 0.9, 1.0)
    eps_hat, eps, x = Z.expand(5, -1), EPS.expand(5, -1), normal(5, 4)
    for factor in (1.0, 0.7):
        x_s = add_noise(schedule, x, factor * eps_hat, s)
        x_tau = noise_on(schedule, x_s, eps, s, tau)
        alpha, sigma = expand(schedule.alpha(tau), x), expand(schedule.sigma(tau), x)
        square = ((x_tau - alpha * x) / sigma).square().mean(1)
        weight = weight_of(schedule, x, x_s, eps, s, tau)
        # how much of eps_mix's variance eps-hat has
        share = (transition(schedule, s, tau)[0] * schedule.sigma(s) / schedule.sigma(tau)) ** 2
        close(weight, ((1 - factor**2) * share / 2).exp(), 1e-11)
        if factor == 1:
            close(square, torch.ones(5), 1e-11)
            close(weight, torch.ones(5), 1e-11)


@every_schedule
def test_bridge_closes_at_its_lower_end(schedule):
    """tau -> s: b -> 0, x_tau -> x_s, and the weight becomes that of eps-hat against eps."""
    s = times(0.25, 0.5, 0.75)
    x, eps_hat, eps = (normal(3, 4, seed=k) for k in range(3))
    x_s = add_noise(schedule, x, eps_hat, s)
    assert torch.equal(noise_on(schedule, x_s, eps, s, s), x_s)
    close(weight_of(schedule, x, x_s, eps, s, s), log_weight(eps, eps_hat).exp(), 1e-10)
    gaps = 1e-2, 1e-4, 1e-6
    errors = [float((noise_on(schedule, x_s, eps, s, s + gap) - x_s).abs().max()) for gap in gaps]
    assert errors[0] > 5 * errors[1] > 25 * errors[2] and errors[2] < 1e-2  # as sqrt(gap)


def bend(x):
    """A student's clean prediction, far from linear."""
    return 0.8 * torch.tanh(2 * x) + 0.3 * torch.sin(3 * x)


@every_schedule
@pytest.mark.parametrize("tau", [0.55, 0.6, 0.74])
def test_weight_of_one_dimension_is_the_density_ratio(schedule, tau):
    """d = 1: the weight is q(x_tau | x) / q(x_tau | x_s) up to the constant sigma_tau / b.

    That constant is its missing normalisers. So weighted means over noised-on x_s are means over
    freshly noised x; without the weight they are not.
    """
    nodes = torch.linspace(-7, 7, 85), torch.linspace(-30, 30, 601)
    grid = torch.meshgrid(*(v.double() for v in nodes), indexing="ij")
    x_in, eps = (v.reshape(-1, 1) for v in grid)
    t, s, tau = (torch.full((len(x_in),), v, dtype=torch.float64) for v in (0.75, 0.5, tau))
    x_s, x = step_to(schedule, bend(x_in), x_in, t, s)
    x_tau, fresh = noise_on(schedule, x_s, eps, s, tau), add_noise(schedule, x, eps, tau)
    weight = weight_of(schedule, x, x_s, eps, s, tau)
    density = (-(x_in**2) / 2 - eps**2 / 2)[:, 0].exp()

    def mean(value, weight=1.0):
        """Under the density times weight, normalised."""
        p = density * weight
        return (p[:, None] * value).sum() / p.sum()

    b_share = transition(schedule, s, tau)[1][0] / schedule.sigma(tau)[0]
    close(mean(weight[:, None]), 1 / b_share, 1e-6)
    for f in (torch.sin, torch.square, lambda v: v * x, lambda v: torch.cos(2 * v + x)):
        close(mean(f(x_tau), weight), mean(f(fresh)), 1e-6)
    assert abs(mean(x_tau * x) - mean(fresh * x)) > 0.01


# ---- the fake score's loss -----------------------------------------------------------------------


@functools.cache
def arguments(target, weight, noise="bridge"):
    """tdm.py's flags with these choices about the fake."""
    choices = f"--fake_target {target} --fake_weight {weight} --fake_noise {noise}"
    return tdm.parse_args(["--teacher", "ring", *choices.split()])


def fake_loss(fake, diffusion, x, x_s, eps, s, tau, cond, target="importance", weight="network"):
    """What train calls with --fake_target and --fake_weight.  -> scalar."""
    at_tau = x, x_s, eps, s, tau, cond
    return chosen_fake_loss(arguments(target, weight), fake, diffusion, *at_tau)


FAKE_LOSSES = {
    ("importance", "network"): fake_score_loss,
    ("importance", "snr"): snr_fake_loss,
    ("exact", "network"): lambda fake, diffusion, x, *rest: exact_fake_loss(fake, diffusion, *rest),
    ("exact", "snr"): lambda fake, diffusion, x, *rest: exact_fake_loss_of_eps(
        fake, diffusion, *rest
    ),
}


@pytest.mark.parametrize("target, weight", FAKE_LOSSES)
def test_flags_choose_the_fake_s_loss(target, weight):
    """chosen_fake_loss is the function that --fake_target and --fake_weight name, to the bit.

    --fake_noise fresh: of x noised from 0 instead of x_s noised on. Without flags it is Eq. 7.
    """
    t, s, tau, x_in, x, eps = bridge(Flow())
    x_s, loss = step_to(Flow(), x, x_in, t, s)[0], FAKE_LOSSES[target, weight]
    nets = (lambda x_tau, tau: torch.sin(x_tau) + expand(tau, x_tau)), FLOW_V
    want = loss(*nets, x, x_s, eps, s, tau, {})
    assert torch.equal(fake_loss(*nets, x, x_s, eps, s, tau, {}, target, weight), want)
    fresh = chosen_fake_loss(arguments(target, weight, "fresh"), *nets, x, x_s, eps, s, tau, {})
    assert torch.equal(fresh, loss(*nets, x, x, eps, 0 * s, tau, {}))
    assert not torch.isclose(fresh, want, rtol=0.01)
    plain = chosen_fake_loss(tdm.parse_args([]), *nets, x, x_s, eps, s, tau, {})
    assert torch.equal(plain, fake_score_loss(*nets, x, x_s, eps, s, tau, {}))


def in_own_space(kind, x, eps, alpha, sigma, output):
    """Mean square error of a network's output per sample, in the space of its prediction.  (B,)."""
    return (output - from_x0_eps(kind, x, eps, alpha, sigma)).square().flatten(1).mean(1)


@every_schedule
@every_kind
def test_fake_loss_is_equation_7(schedule, kind):
    """The network's output against x in its own space, or in x0 times min(SNR, 5), weighted.

    Each sample has its importance weight. "exact": against the score of x_tau given x_s, times
    (b / sigma_tau)^2, or |b / sigma_tau eps_fake - eps|^2.
    """
    t, s, tau, x_in, x, eps = bridge(schedule)
    output, diffusion = normal(6, 3, 2, seed=5), Diffusion(schedule, kind)
    x_s = step_to(schedule, x, x_in, t, s)[0]
    alpha, sigma, (a, b) = schedule.alpha(tau), schedule.sigma(tau), transition(schedule, s, tau)
    x_tau = expand(a, x) * x_s + expand(b, x) * eps
    eps_mix = mixed_noise(schedule, t, s, tau, x_in, x, eps)
    x0_fake, eps_fake = to_x0_eps(output, kind, x_tau, alpha, sigma)
    weight, snr = log_weight(eps, eps_mix).exp(), (alpha / sigma) ** 2
    assert (snr > 5).any() and (snr < 5).any()

    def loss(*which):
        return fake_loss(constant(output), diffusion, x, x_s, eps, s, tau, {}, *which)

    own = in_own_space(kind, x, eps_mix, alpha, sigma, output)
    error = (x0_fake - x).square().flatten(1).mean(1)
    close(loss("importance", "network"), (weight * own).mean(), 1e-10)
    close(loss("importance", "snr"), (weight * snr.clamp(max=5) * error).mean(), 1e-10)
    want = (expand(b / sigma, eps) * eps_fake - eps).square().mean()
    close(loss("exact", "snr"), want, 1e-10)
    y_eps = expand(sigma / b, eps) * eps  # the score -eps / b as noise
    y_x0 = (x_tau - expand(sigma, eps) * y_eps) / expand(alpha, eps)  # and the x0 that goes with it
    own = in_own_space(kind, y_x0, y_eps, alpha, sigma, output)
    close(loss("exact", "network"), ((b / sigma) ** 2 * own).mean(), 1e-8)
    at_tau = x, x_s, eps, s, tau, {}
    unclamped = snr_fake_loss(constant(output), diffusion, *at_tau, max_snr=1e9)
    close(unclamped, (weight * snr * error).mean(), 1e-10)
    assert torch.equal(loss(), fake_score_loss(constant(output), diffusion, *at_tau))  # the default
    assert torch.equal(loss(), loss("importance", "network"))


@every_schedule
def test_fake_is_asked_at_x_tau(schedule):
    """It sees a x_s + b eps, level tau and its conditions, in one call, whatever the loss."""
    t, s, tau, x_s, x, eps = bridge(schedule)
    for which in FAKE_LOSSES:
        calls = []

        def fake(x_tau, tau, calls=calls, **cond):
            calls.append((x_tau, tau, cond))
            return x_tau

        at_tau = x, x_s, eps, s, tau, {"label": 3}
        fake_loss(fake, Diffusion(schedule, "x0"), *at_tau, *which)
        ((x_tau, level, cond),) = calls
        assert torch.equal(x_tau, noise_on(schedule, x_s, eps, s, tau))
        assert torch.equal(level, tau) and cond == {"label": 3}


def best_gain(loss_of, n):
    """Minimiser over g (n,) of a quadratic loss in which each g_i has a term of its own.

    loss_of: g (n, 1) -> scalar.
    """

    def slope(value):
        g = torch.full((n, 1), value, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(loss_of(g), g)[0][:, 0]

    zero, one = slope(0.0), slope(1.0)
    return zero / (zero - one)


def best_fake(schedule, x, x_s, eps, s, tau, kind="x0", **which):
    """The linear network with the least fake loss, for each item of the batch.

    -> the gain of its x0, mu_fake = gain x_tau.  (n,).
    """

    def loss_of(g):
        at_tau = x, x_s, eps, s, tau, {}
        return fake_loss(lambda x_tau, tau: g * x_tau, Diffusion(schedule, kind), *at_tau, **which)

    one, gain = torch.ones(len(x), 1, dtype=torch.float64), best_gain(loss_of, len(x))
    alpha, sigma = schedule.alpha(tau), schedule.sigma(tau)
    return to_x0_eps(gain[:, None] * one, kind, one, alpha, sigma)[0][:, 0]


def variance(schedule, t, C):
    """Of data N(0, C) noised to t."""
    return schedule.alpha(t) ** 2 * C + schedule.sigma(t) ** 2


def real_gain(schedule, tau, C):
    """The exact teacher: mu_real = gain x_tau."""
    return schedule.alpha(tau) * C / variance(schedule, tau, C)


def gains(gain):
    """The network x0 = gain x_tau.  gain (n,)."""
    return lambda x_tau, tau, **cond: gain[:, None] * x_tau


class Trajectory:
    """Every step of a linear student on data N(0, C), at several levels tau each.

    A batch has one item for each (step, level): t, s, tau (n,), x_in, eps (n, 4), and h, g (n,). h
    is the gain of the matched student, x = h x_in: its step multiplies x_in by g, which takes
    variance(t) to variance(s).
    """

    def __init__(self, schedule, grid, C, inside=(0.1, 0.5, 0.9)):
        t, s = times(*grid[:-1]), times(*grid[1:])
        g = (variance(schedule, s, C) / variance(schedule, t, C)).sqrt()
        h = (g - schedule.sigma(s) / schedule.sigma(t)) / step_slope(schedule, t, s)
        self.steps, self.levels, self.schedule, self.C = len(t), len(inside), schedule, C
        self.t, self.s, self.h, self.g = (v.repeat_interleave(len(inside)) for v in (t, s, h, g))
        self.slope = step_slope(schedule, self.t, self.s)
        self.tau = self.s + times(*inside).repeat(self.steps) * (self.t - self.s)
        self.x_in = variance(schedule, self.t, C).sqrt()[:, None] * Z
        self.eps = EPS.expand(len(self.t), -1)

    def land(self, h):
        """-> x_s, x of the student with these gains."""
        return step_to(self.schedule, h[:, None] * self.x_in, self.x_in, self.t, self.s)

    def fake(self, h, **which):
        x_s, x = (v.detach() for v in self.land(h))
        return best_fake(self.schedule, x, x_s, self.eps, self.s, self.tau, **which)

    def gradient(self, h, fake, loss="l2", slope=None):
        """Of the student's expected loss in its gain, for every (step, level).  (n,)."""
        h = h.clone().requires_grad_(True)
        x_s, x = self.land(h)
        nets = gains(real_gain(self.schedule, self.tau, self.C)), gains(fake)
        at_tau = Diffusion(self.schedule, "x0"), self.eps, self.s, self.tau, {}, {}, {}, 1
        value, _ = student_loss(x, x_s, *nets, *at_tau, loss=loss, slope=slope)
        return torch.autograd.grad(value, h)[0] * len(h)

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
    """On the matched trajectory target "exact" learns the teacher's score at every level.

    The student's expected gradient then vanishes, also that of the paper's loss of x_s.
    """
    T = Trajectory(schedule, grid, C)
    close(T.land(T.h)[0], variance(schedule, T.s, C).sqrt()[:, None] * Z, 1e-10)
    fake = T.fake(T.h, target="exact", kind=kind)
    close(fake, real_gain(schedule, T.tau, C), 1e-9)
    assert T.gradient(T.h, fake).abs().max() < 1e-9
    assert T.gradient(T.h, fake, "l2", T.slope).abs().max() < 1e-9
    assert T.gradient(T.h, fake, "pseudo_huber", T.slope).abs().max() < 1e-6  # divided by c


@every_setting
@pytest.mark.parametrize("C", [1.0, 4.0])
@pytest.mark.parametrize("weight", ["network", "snr"])
@every_kind
def test_importance_fake_is_biased_before_the_last_step(schedule, grid, C, weight, kind):
    """Its optimum is E[x | x_tau] along the trajectory, off the score by h g V_t / (alpha_s C) - 1.

    So it is whatever tau, weight and prediction. The gain is too small, and so the student's
    gradient at a matched trajectory widens inner steps; at the last the error is 0.
    """
    T = Trajectory(schedule, grid, C)
    fake = T.fake(T.h, weight=weight, kind=kind)
    error = T.by_step(fake / real_gain(schedule, T.tau, C) - 1)
    want = T.h * T.g * variance(schedule, T.t, C) / (schedule.alpha(T.s) * C) - 1
    close(error, T.by_step(want), 1e-8)
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
    """Relative errors of its gain, from the noise on.

    With many dimensions the weight is at least 1 and close to it.
    """
    T = Trajectory(*SETTINGS[name], C)
    error = T.by_step(T.fake(T.h) / real_gain(T.schedule, T.tau, C) - 1)
    close(error, times(*want)[:, None].expand(-1, 3), 1e-3)
    x_s, x = T.land(T.h)
    weight = T.by_step(weight_of(T.schedule, x, x_s, T.eps, T.s, T.tau))
    most = 1.2 if C == 1 and name == "demo" else 1.5
    assert weight.min() > 1 - 1e-9 and weight[:-1].max() < most
    close(weight[-1], torch.ones(3), 1e-9)


@every_setting
@pytest.mark.parametrize("target", ["exact", "importance"])
def test_fake_of_freshly_noised_samples_is_wrong_before_the_last_step(schedule, grid, target):
    """Without importance sampling the fake is trained at noised x, and asked at noised-on x_s.

    Either target then learns the score of x's own noisings, whose gain is far too small at the
    first steps.
    """
    T = Trajectory(schedule, grid, 1.0)
    x = T.land(T.h)[1]
    fresh = best_fake(schedule, x, x, T.eps, 0 * T.s, T.tau, target=target)
    close(fresh, real_gain(schedule, T.tau, T.h**2 * variance(schedule, T.t, 1.0)), 1e-9)
    error = T.by_step(fresh / real_gain(schedule, T.tau, 1.0) - 1)
    assert (error[:-1] < -0.01).all() and error[-1].abs().max() < 1e-9
    if grid == DEMO_GRID:
        close(error[:2], times(-1.0, -0.94)[:, None].expand(-1, 3), 0.02)
        close(error[2, [0, 2]], times(-0.46, -0.6), 0.03)


def pointwise_best(schedule, x_tau, rows, target, tau):
    """What the best of all fakes answers where it does not know which row a sample is of.

    It minimises the expected loss over the rows' densities. rows: (share, s, x_in -> x_s, x) with
    x_in standard normal, d = 1; x_tau (m,), one level tau for all.  -> eps (m,).
    """
    zero, one = (torch.zeros(len(x_tau), dtype=torch.float64) for _ in range(2))
    x_in = torch.linspace(-10, 10, 801, dtype=torch.float64)
    level = torch.full((len(x_tau) * len(x_in),), tau, dtype=torch.float64)
    for share, s, land in rows:
        x_s, x = land(x_in)
        a, b = (float(v) for v in transition(schedule, times(s), times(tau)))
        eps = (x_tau[:, None] - a * x_s) / b  # (m, 801)
        density = share / b * torch.exp(-(eps**2) / 2 - x_in**2 / 2)
        flat = [v.expand_as(eps).reshape(-1, 1) for v in (x, x_s, eps)]
        for value, total in ((0.0, zero), (1.0, one)):
            says = torch.full((eps.numel(), 1), value, dtype=torch.float64, requires_grad=True)
            at_tau = *flat, torch.full_like(level, s), level, {}
            loss = fake_loss(constant(says), Diffusion(schedule, "eps"), *at_tau, target)
            slope = torch.autograd.grad(loss, says)[0].reshape(eps.shape) * eps.numel()
            total += (slope * density).sum(1)
    return zero / (zero - one)


@pytest.mark.parametrize("schedule", [Flow(), VP()], ids=["flow", "vp"])
@pytest.mark.parametrize(
    "s", [(0.5, 0.5), (0.0, 0.5)], ids=["steps of K = 2 and 4", "steps of K = 1 and 2"]
)
def test_fake_that_is_not_conditioned_on_k_learns_the_mixture(schedule, s):
    """Samples of two step counts meet at one tau with different laws.

    The fake's best answer is the score of their mixture (Eq. 9): the two scores weighted by share
    and density at x_tau, which is wrong for either, and not their mean. Where the two steps begin
    at different s, the loss of "exact" also weighs each by its b^2. Conditioned on K, each has its
    own.
    """
    tau, x_tau = 0.7, torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)
    sigma = float(schedule.sigma(times(tau)))
    laws = [(0.3, s[0], 0.8, 0.3), (0.7, s[1], -0.5, 0.6)]  # share, s, mean and std of x_s
    rows = [(share, at, lambda z, m=m, c=c: (m + c * z, z)) for share, at, m, c in laws]
    score, density, square = [], [], []
    for share, at, m, c in laws:
        a, b = (float(v) for v in transition(schedule, times(at), times(tau)))
        std = math.hypot(a * c, b)
        score.append((a * m - x_tau) / std**2)
        density.append(share / std * torch.exp(-(((x_tau - a * m) / std) ** 2) / 2))
        square.append(b**2)
    for row, want in zip(rows, score):
        close(-pointwise_best(schedule, x_tau, [row], "exact", tau) / sigma, want, 1e-8)
    shared = -pointwise_best(schedule, x_tau, rows, "exact", tau) / sigma
    weight = [p * b for p, b in zip(density, square)]
    close(shared, (weight[0] * score[0] + weight[1] * score[1]) / (weight[0] + weight[1]), 1e-8)
    mixture = (density[0] * score[0] + density[1] * score[1]) / (density[0] + density[1])
    off = (shared - mixture).abs().max()
    assert off < 1e-8 if s[0] == s[1] else off > 0.01
    for wrong in (score[0], score[1], 0.3 * score[0] + 0.7 * score[1]):
        assert (shared - wrong).abs().max() > 0.1


@pytest.mark.parametrize("schedule", [Flow(), VP()], ids=["flow", "vp"])
def test_pointwise_optima_of_a_bent_student(schedule):
    """A student far from linear, d = 1, step .75 -> .5.

    "exact" learns the score of x_tau, "importance" that of x noised afresh to tau (in one dimension
    the ratio is not tempered); the two differ.
    """
    tau, t, s, x_tau = 0.65, 0.75, 0.5, torch.linspace(-1.5, 1.5, 13, dtype=torch.float64)
    sigma, alpha = float(schedule.sigma(times(tau))), float(schedule.alpha(times(tau)))

    def land(z):
        ends = torch.full_like(z, t), torch.full_like(z, s)
        x_s, x = step_to(schedule, bend(z)[:, None], z[:, None], *ends)
        return x_s[:, 0], x[:, 0]

    z = torch.linspace(-10, 10, 801, dtype=torch.float64)
    x_s, x = land(z)
    a, b = (float(v) for v in transition(schedule, times(s), times(tau)))

    def score(mean, std):
        p = torch.exp(-((x_tau[:, None] - mean) ** 2) / (2 * std**2) - z**2 / 2)
        return (p * (mean - x_tau[:, None])).sum(1) / (std**2 * p.sum(1))

    got = {
        target: -pointwise_best(schedule, x_tau, [(1.0, s, land)], target, tau) / sigma
        for target in ("exact", "importance")
    }
    close(got["exact"], score(a * x_s, b), 1e-8)
    close(got["importance"], score(alpha * x, sigma), 1e-8)
    assert (got["exact"] - got["importance"]).abs().max() > 0.1


# ---- K = 1 is DMD --------------------------------------------------------------------------------


def doubled(net):
    """The network with an output that dmd.py's .float() leaves in float64."""
    return lambda x_t, t, **cond: DoubleOutput.apply_to(net(x_t, t, **cond))


@every_schedule
@every_kind
def test_fake_loss_of_the_last_step_is_dmd_s(schedule, kind):
    """s = 0: weight 1 and eps_mix = eps, so both targets are dmd.py's in the network's space.

    "exact" with weight "snr" is dmd.py's loss in eps.
    """
    tau, x, eps = times(0.1, 0.4, 0.7, 0.95), normal(4, 3), normal(4, 3, seed=1)
    diffusion, at_tau = Diffusion(schedule, kind), (x, x, eps, 0 * tau, tau, {})

    def net(x_t, t):
        return torch.sin(x_t) + expand(t, x_t) * x_t

    def as_eps(x_t, t):
        return diffusion.x0_eps(net, x_t, t)[1]

    want = dmd.fake_score_loss(doubled(net), diffusion, x, eps, tau, {})
    close(fake_score_loss(net, diffusion, *at_tau), want, 1e-10)
    close(fake_loss(net, diffusion, *at_tau, "exact"), want, 1e-10)
    want = dmd.fake_score_loss(doubled(as_eps), Diffusion(schedule, "eps"), x, eps, tau, {})
    close(fake_loss(net, diffusion, *at_tau, "exact", "snr"), want, 1e-10)


def gradients(net, value, outputs=None):
    """{name: gradient} of what has one.  outputs: the cotangent, where value is no scalar."""
    names, parameters = zip(*net.named_parameters())
    grads = torch.autograd.grad(value, parameters, outputs, allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(names, grads) if g is not None}


def assert_close_gradients(got, want, tolerance):
    assert got.keys() == want.keys() and max(g.abs().max() for g in want.values()) > 1e-6
    for name in want:
        close(got[name], want[name], tolerance)


class Asked:
    """A network, with what it was asked: pairs (x_t, t)."""

    def __init__(self, net):
        self.net, self.calls = net, []

    def __call__(self, x_t, t, **cond):
        self.calls.append((x_t, t))
        return self.net(x_t, t, **cond)


@every_network
def test_one_step_student_is_dmd_s(which):
    """From z at t = 1 with the same draws the sample and x_tau are dmd.py's.

    The student's gradient under "l2" is dmd.py's but for its normaliser; the fake's is dmd.py's.
    """
    teacher, fake, *_ = networks(which)
    (z, eps, tau, cond, uncond), diffusion = draws(which), diffusion_of(which)
    one, student = torch.ones_like(tau), copy.deepcopy(fake)
    tolerance = 1e-10 if which == "ring" else 1e-6  # the DiT turns queries and keys in float32

    x_s, x = student_step(student, diffusion, z, one, 0 * one, cond)
    x_in = dmd.rollout(student, diffusion, lambda name: z, [1.0], cond, "sde")
    x_dmd = diffusion.x0(student, x_in, 1.0, **cond)
    assert torch.equal(x_s, x) and torch.equal(x, x_dmd)

    asked = [[Asked(teacher), Asked(fake)] for _ in range(2)]
    at_tau = eps, 0 * tau, tau, cond, uncond, cond, 3.0
    loss, g, *_ = tdm_loss_variant(x, x_s, *asked[0], diffusion, *at_tau, loss="l2")
    loss_dmd, g_dmd, *_ = dmd.dmd_loss(
        x_dmd, *asked[1], diffusion, eps, tau, cond, uncond, cond, 3.0
    )
    for ours, theirs in zip(*asked):
        assert len(ours.calls) == len(theirs.calls) > 0
        for (x_t, t), (x_t_dmd, t_dmd) in zip(ours.calls, theirs.calls):
            assert torch.equal(x_t, x_t_dmd) and torch.equal(t, t_dmd) and torch.equal(t, tau)
    with torch.no_grad():
        x_tau = add_noise(diffusion.schedule, x, eps, tau)
        mu_real = diffusion.guided_x0(teacher, x_tau, tau, cond, uncond, 3.0)
        error = expand((x - mu_real).abs().flatten(1).mean(1), x)  # Eq. 8's normaliser
    close(g, error * g_dmd, 1e-12)
    pull_dmd = error * torch.autograd.grad(loss_dmd, x_dmd, retain_graph=True)[0]
    want = gradients(student, x_dmd, pull_dmd)
    assert_close_gradients(gradients(student, loss), want, tolerance)

    x = x.detach()
    got = gradients(fake, fake_score_loss(fake, diffusion, x, x, eps, 0 * tau, tau, cond))
    loss_dmd = dmd.fake_score_loss(doubled(fake), diffusion, x, eps, tau, cond)
    assert_close_gradients(got, gradients(fake, loss_dmd), max(1e-8, tolerance))


# ---- the student's loss --------------------------------------------------------------------------


def student_loss(x, x_s, *at_tau, loss="pseudo_huber", slope=None):
    """The loss that train calls with --loss, and with a slope for --regress x_s.  -> loss, g.

    at_tau: the arguments that tdm_loss and tdm_loss_variant share.
    """
    if loss == "pseudo_huber" and slope is not None:
        value, g, *mu = tdm_loss(x_s, *at_tau, slope)
    else:
        value, g, *mu = tdm_loss_variant(x, x_s, *at_tau, loss=loss, slope=slope)
    assert torch.equal(g, mu[1] - mu[0]) and not any(v.requires_grad for v in (g, *mu))
    return value, g


def loss_of(x, mu_real, mu_fake, loss="pseudo_huber", slope=None):
    """The student's loss of networks that see mu_real and mu_fake, whatever x_tau is.

    x_s is slope times x, plus something that does not depend on x, as a step makes it.
    """
    nets, n = (seeing(mu_real), seeing(mu_fake)), len(x)
    one = torch.ones(n, dtype=x.dtype)
    x_s = expand(one if slope is None else slope, x) * x + normal(*x.shape, seed=98)
    levels = (torch.full((n,), v, dtype=torch.float64) for v in (0.3, 0.6))
    at_tau = *nets, FLOW_X0, normal(*x.shape, seed=99), *levels, {}, {}, {}, 1
    value, g = student_loss(x, x_s, *at_tau, loss=loss, slope=slope)
    assert torch.equal(g, mu_fake.detach() - mu_real.detach())
    matching = trajectory_matching_loss(x, mu_real, mu_fake, loss, slope)
    close(value, matching, 1e-9)
    if slope is None:
        assert torch.equal(value, matching)
        whole, *_ = tdm_loss(x, *at_tau, one)  # Eq. 11 of x is tdm_loss of x with a slope of 1
        assert loss != "pseudo_huber" or torch.equal(value, whole)
    return value


def pull(x, mu_real, mu_fake, loss, slope=None):
    """Gradient of the student's loss in x."""
    leaf = x.clone().requires_grad_(True)
    return torch.autograd.grad(loss_of(leaf, mu_real, mu_fake, loss, slope), leaf)[0]


def dmd_g(x, mu_real, mu_fake):
    """dmd.py's gradient: the difference over mean|x - mu_real|."""
    n = len(x)
    eps, t = normal(*x.shape, seed=99), torch.full((n,), 0.6, dtype=torch.float64)
    return dmd.dmd_loss(x, seeing(mu_real), seeing(mu_fake), FLOW_X0, eps, t, {}, {}, {}, 1)[1]


@every_network
@pytest.mark.parametrize("renoise", ["ode", "sde"])
def test_tdm_loss_is_the_variant_with_the_paper_s_choices(which, renoise):
    """Through real networks: loss, g and the student's gradient.

    tdm_loss moves x_s itself, the variant x by the slope. Without the slope it is another loss.
    """
    teacher, fake, *_ = networks(which)
    (z, eps, t, cond, uncond), diffusion = draws(which), diffusion_of(which)
    student, s, tau = copy.deepcopy(fake), 0.5 * t, 0.8 * t
    noise = normal(*z.shape, seed=7) if renoise == "sde" else None
    x_s, x = student_step(student, diffusion, z, t, s, cond, noise)
    slope = step_slope(diffusion.schedule, t, s, renoise)
    at_tau = teacher, fake, diffusion, eps, s, tau, cond, uncond, cond, 3.0
    loss, *of_loss = tdm_loss(x_s, *at_tau, slope)
    variant, *rest = tdm_loss_variant(x, x_s, *at_tau, loss="pseudo_huber", slope=slope)
    close(loss, variant, 1e-9)
    assert len(of_loss) == 3 and all(map(torch.equal, of_loss, rest))  # g, mu_real, mu_fake
    tolerance = 1e-9 if which == "ring" else 1e-6  # the DiT turns queries and keys in float32
    assert_close_gradients(gradients(student, loss), gradients(student, variant), tolerance)
    of_x, *_ = tdm_loss_variant(x, x_s, *at_tau, loss="pseudo_huber")
    assert not torch.isclose(loss, of_x, rtol=0.01)


def batch_root(r, c):
    """Wrong: one root for the whole batch."""
    return (r.square().sum() + c**2).sqrt() - c


def sample_roots(r, c):
    """Eq. 11: one root for each sample."""
    return ((r.square().flatten(1).sum(1) + c**2).sqrt() - c).mean()


REGRESSIONS = {  # x_s, x, A = dx_s / dx, d = mu_real - mu_fake -> the loss's residual, its metric
    "as printed": (lambda x_s, x, A, d: x_s - (x_s + A * d).detach(), sample_roots),
    "x": (lambda x_s, x, A, d: x - (x + d).detach(), sample_roots),
    "sign": (lambda x_s, x, A, d: x_s - (x_s - A * d).detach(), sample_roots),
    "target without A": (lambda x_s, x, A, d: x_s - (x_s + d).detach(), sample_roots),
    "A twice": (lambda x_s, x, A, d: A * (x_s - (x_s + A * d).detach()), sample_roots),
    "no stop-gradient": (lambda x_s, x, A, d: x_s - (x_s + A * d), sample_roots),
    "one root": (lambda x_s, x, A, d: x_s - (x_s + A * d).detach(), batch_root),
}


@every_network
@pytest.mark.parametrize("renoise", ["ode", "sde"])
@pytest.mark.parametrize("wrong", list(REGRESSIONS)[1:])
def test_gradient_is_that_of_regressing_x_s(which, renoise, wrong):
    """The student's weights get the gradient of regressing x_s on sg(x_s + A (mu_real - mu_fake)).

    That is Eq. 6 as printed, written out. It reaches the weights through x, A times the direction
    of the residual; without x_s's graph there is none. The usual mistakes have another gradient.
    """
    teacher, fake, *_ = networks(which)
    (z, eps, t, cond, uncond), diffusion = draws(which), diffusion_of(which)
    schedule, s, tau = diffusion.schedule, 0.5 * t, 0.8 * t
    student = copy.deepcopy(fake)
    noise = normal(*z.shape, seed=7) if renoise == "sde" else None
    x_s, x = student_step(student, diffusion, z, t, s, cond, noise)
    slope = step_slope(schedule, t, s, renoise)
    at_tau = teacher, fake, diffusion, eps, s, tau, cond, uncond, cond, 3.0
    loss, g, *_ = tdm_loss(x_s, *at_tau, slope)
    got = gradients(student, loss)
    tolerance = 1e-9 if which == "ring" else 1e-6
    frozen = [copy.deepcopy(net).requires_grad_(False) for net in (teacher, fake)]
    assert not tdm_loss(x_s.detach(), *frozen, *at_tau[2:], slope)[0].requires_grad

    x_tau = noise_on(schedule, x_s, eps, s, tau)
    mu_real = diffusion.guided_x0(teacher, x_tau, tau, cond, uncond, 3.0)
    d = mu_real - diffusion.x0(fake, x_tau, tau, **cond)
    close(g, -d.detach(), 1e-12)
    c = 0.00054 * math.prod(x.shape[1:]) ** 0.5

    def literal(name):
        residual, metric = REGRESSIONS[name]
        return metric(residual(x_s, x, expand(slope, x), d), c)

    want = gradients(student, literal("as printed"))
    close(loss, literal("as printed"), 1e-10)
    assert_close_gradients(got, want, tolerance)
    r = -expand(slope, x) * d.detach()
    root = (r.square().flatten(1).sum(1) + c**2).sqrt()
    through_x = gradients(student, x, expand(slope / root / len(x), x) * r)
    assert_close_gradients(got, through_x, tolerance)
    mistaken = gradients(student, literal(wrong))
    off = sum((want[k] - mistaken[k]).square().sum() for k in want).sqrt()
    norm = sum(v.square().sum() for v in want.values()).sqrt()
    if wrong == "target without A":  # the direction hardly knows the length of r, the value does
        assert not torch.isclose(literal(wrong), loss, rtol=0.01)
    else:
        assert off > 0.01 * norm


@pytest.mark.parametrize("scale", [1, 4.0])
@pytest.mark.parametrize("whole", [True, False], ids=["tdm_loss", "tdm_loss_variant"])
def test_teacher_is_guided_and_the_fake_is_not(whole, scale):
    """Who is called, in order, at which x_tau and tau, under which condition; none with a graph."""
    calls = []

    def recorded(who, slope):
        def net(x_t, t, label, steps=None):
            calls.append((who, x_t, t, label, steps, torch.is_grad_enabled()))
            return x_t * (slope + label.double()[:, None])

        return net

    x, x_s, eps = (normal(3, 2, seed=k) for k in range(3))
    s, tau = times(0.0, 0.2, 0.5), times(0.1, 0.4, 0.9)
    cond, uncond = {"label": torch.ones(3)}, {"label": torch.zeros(3)}
    fake_cond = {"label": torch.full((3,), 2.0), "steps": torch.full((3,), 4.0)}
    nets = recorded("teacher", 0.5), recorded("fake", 0.1)
    at_tau = FLOW_X0, eps, s, tau, cond, uncond, fake_cond, scale
    if whole:
        _, g, mu_real, mu_fake = tdm_loss(x_s, *nets, *at_tau, torch.ones(3))
    else:
        _, g, mu_real, mu_fake = tdm_loss_variant(x, x_s, *nets, *at_tau, loss="demo")
    x_tau = noise_on(Flow(), x_s, eps, s, tau)
    assert [who for who, *_ in calls] == ["teacher"] * (1 if scale == 1 else 2) + ["fake"]
    assert all(torch.equal(c[1], x_tau) and torch.equal(c[2], tau) and not c[5] for c in calls)
    assert [float(c[3][0]) for c in calls] == ([1.0, 2.0] if scale == 1 else [1.0, 0.0, 2.0])
    assert all(c[4] is None for c in calls[:-1]) and (calls[-1][4] == 4).all()
    close(mu_real, 0.5 * x_tau + scale * x_tau, 1e-12)  # guided
    close(mu_fake, 2.1 * x_tau, 1e-12)
    close(g, mu_fake - mu_real, 1e-12)


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 5), (4, 2, 3, 2)], ids=str)
def test_l2_gradient_is_the_score_difference(shape):
    """dL/dx = -(mu_real - mu_fake) / numel whatever x is, and L half their mean square difference.

    It is DMD's up to its normaliser.
    """
    x, real, fake = (normal(*shape, seed=k) for k in range(3))
    for at in (x, 100 * x, real):
        close(pull(at, real, fake, "l2"), -(real - fake) / x.numel(), 1e-12)
    close(loss_of(x, real, fake, "l2"), (real - fake).square().mean() / 2, 1e-12)
    error = (x - real).abs().flatten(1).mean(1)
    got = pull(x, real, fake, "l2") / expand(error, x)
    close(got, dmd_g(x, real, fake) / x.numel(), 1e-12)


@every_setting
@pytest.mark.parametrize("renoise", ["ode", "sde"])
def test_slope_is_the_step_s_derivative(schedule, grid, renoise):
    """A = dx_s / dx with x_in fixed, by autograd.

    It is positive, 1 for the last step to clean data, (t - s) / t for a deterministic flow step.
    """
    t, s = times(*grid[:-1]), times(*grid[1:])
    x_in, noise, x = (normal(len(t), 3, seed=k) for k in range(3))
    x.requires_grad_(True)
    x_s, _ = step_to(schedule, x, x_in, t, s, noise if renoise == "sde" else None)
    want = torch.autograd.grad(x_s.sum(), x)[0][:, 0]
    close(step_slope(schedule, t, s, renoise), want, 1e-10)
    assert (want > 0).all() and abs(want[-1] - schedule.alpha(s[-1:])) < 1e-4
    if isinstance(schedule, Flow) and renoise == "ode":
        close(want, (t - s) / t, 1e-10)


OUTPUT_MOVES_X = {  # |dx / d output| for what networks predict
    "x0": lambda alpha, sigma: torch.ones_like(alpha),
    "eps": lambda alpha, sigma: sigma / alpha,
    "score": lambda alpha, sigma: sigma**2 / alpha,
    "flow_v": lambda alpha, sigma: sigma / (alpha + sigma),
    "vp_v": lambda alpha, sigma: sigma,
}
NO_SNR = SCHEDULES["vp, zero terminal snr"]
TEACHERS = {  # schedule, prediction, shift, T
    "PixArt": (LINEAR, "eps", 1.0, 1.0),
    "PixArt from T = .9": (LINEAR, "eps", 1.0, 0.9),
    "Stable Diffusion": (VP(), "eps", 1.0, 1.0),
    "score": (VP(), "score", 1.0, 1.0),
    **{f"vp_v, {n}": (v, "vp_v", 1.0, 1.0) for n, v in (("linear", LINEAR), ("no snr", NO_SNR))},
    **{f"x0, {n}": (v, "x0", 1.0, 1.0) for n, v in (("linear", LINEAR), ("no snr", NO_SNR))},
    **{f"x0, flow, shift {s:g}": (Flow(), "x0", s, 1.0) for s in (1.0, 2.0, 6.0)},
    **{f"flow, shift {s:g}": (Flow(), "flow_v", s, 1.0) for s in (1.0, 2.0, 3.0, 5.0, 6.0)},
}
UNEVEN = {  # (teacher, what is regressed): how much the strongest step pulls over the weakest
    ("PixArt", "x0"): 165.0,
    ("PixArt from T = .9", "x0"): 72.5,
    ("Stable Diffusion", "x0"): 21.1,
    ("score", "x0"): 36.9,
    ("x0, linear", "x_s"): 19.4,
    ("vp_v, linear", "x_s"): 13.4,
    ("flow, shift 6", "x_s"): 12.7,
}


def pulls(schedule, kind, grid, of_x_s):
    """How strongly each step's samples pull on the network's output under Eq. 11.

    -> by autograd through the step, and by hand, (K,) each.
    """
    t, s = times(*grid[:-1]), times(*grid[1:])
    output, x_in, eps, mu_real, mu_fake = (normal(len(t), 64, seed=k) for k in range(5))
    diffusion, A = Diffusion(schedule, kind), step_slope(schedule, t, s)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)

    def sees(mu):
        def net(x_tau, tau):
            level = schedule.alpha(tau), schedule.sigma(tau)
            return from_x0_eps(kind, mu, to_x0_eps(mu, "x0", x_tau, *level)[1], *level)

        return net

    output.requires_grad_(True)
    x_s, x = student_step(constant(output), diffusion, x_in, t, s, {})
    at_tau = sees(mu_real), sees(mu_fake), diffusion, eps, s, 0.5 * (s + t), {}, {}, {}, 1
    loss, _ = student_loss(x, x_s, *at_tau, slope=A if of_x_s else None)
    got = torch.autograd.grad(loss, output)[0].norm(dim=1) * len(t)
    moved = A if of_x_s else torch.ones_like(A)
    size = moved * (mu_real - mu_fake).norm(dim=1)
    direction = size / (size**2 + (0.00054 * 8) ** 2).sqrt()  # nearly 1
    return got, OUTPUT_MOVES_X[kind](alpha, sigma) * moved * direction


@pytest.mark.parametrize("which", TEACHERS)
def test_no_step_of_four_drowns_the_others(which):
    """By default the four steps pull on the network's output within a factor of 10 of each other.

    Regressing the other of x and x_s, the strongest may pull 165 times as hard as the weakest.
    """
    schedule, kind, timestep_shift, T = TEACHERS[which]
    grid = trajectory(4, timestep_shift, T)
    for world in ("ring", "glyphs", "clips", "no world"):
        args = tdm.parse_args(["--teacher", world])
        got, want = pulls(schedule, kind, grid, regresses_x_s(args, kind))
        close(got, want, 1e-9)
        assert got.max() < 10 * got.min()
    for regress in ("x0", "x_s"):
        of_x_s = regresses_x_s(tdm.parse_args(["--regress", regress]), kind)
        assert of_x_s == (regress == "x_s")
        got, want = pulls(schedule, kind, grid, of_x_s)
        close(got, want, 1e-9)
        if (which, regress) in UNEVEN:
            assert float(got.max() / got.min()) == pytest.approx(UNEVEN[which, regress], rel=0.02)


class NearlyRight(torch.nn.Module):
    """A network that is right for data N(0, 1) up to a small part, which has all its weights."""

    def __init__(self, schedule, kind, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.schedule, self.kind = schedule, kind
        layers = torch.nn.Linear(17, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16)
        self.wrong = torch.nn.Sequential(*layers).double()

    def forward(self, x_t, t):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        unit = x_t / expand(alpha**2 + sigma**2, x_t)
        x0, eps = expand(alpha, x_t) * unit, expand(sigma, x_t) * unit
        right = from_x0_eps(self.kind, x0, eps, alpha, sigma)
        return right + self.wrong(torch.cat([unit, t[:, None]], 1))


def weights_gradients(schedule, kind, grid, of_x_s, n=256):
    """Norms of the gradient in a student's weights, of samples that are all at one step.  (K,)."""
    student, fake, teacher = (NearlyRight(schedule, kind, seed) for seed in range(3))
    diffusion, norms = Diffusion(schedule, kind), []
    for k, (t, s) in enumerate(zip(grid, grid[1:])):
        t, s = (torch.full((n,), v, dtype=torch.float64) for v in (t, s))
        z, eps = (normal(n, 16, seed=2 * k + i) for i in range(2))
        x_in = expand(variance(schedule, t, 1.0).sqrt(), z) * z
        x_s, x = student_step(student, diffusion, x_in, t, s, {})
        tau, slope = s + 0.5 * (t - s), step_slope(schedule, t, s) if of_x_s else None
        at_tau = teacher, fake, diffusion, eps, s, tau, {}, {}, {}, 1
        loss, _ = student_loss(x, x_s, *at_tau, slope=slope)
        grads = torch.autograd.grad(loss, list(student.parameters()))
        norms.append(torch.stack([g.norm() for g in grads]).norm())
    return torch.stack(norms)


@pytest.mark.parametrize("which", TEACHERS)
def test_no_step_of_four_drowns_the_others_in_the_weights(which):
    """The same of gradients in a network's weights, whatever it predicts."""
    schedule, kind, timestep_shift, T = TEACHERS[which]
    grid = trajectory(4, timestep_shift, T)
    by_default = weights_gradients(*(schedule, kind, grid), regresses_x_s(tdm.parse_args([]), kind))
    assert by_default.max() < 10 * by_default.min()
    for regress in ("x0", "x_s"):
        if (which, regress) in UNEVEN:
            uneven = weights_gradients(schedule, kind, grid, regress == "x_s")
            assert uneven.max() > 10 * uneven.min()


def test_what_is_regressed_by_default():
    """x_s where the network predicts noise, else x; x where x itself is matched."""
    for kind in KINDS:
        assert regresses_x_s(tdm.parse_args([]), kind) == (kind in ("eps", "score"))
        assert not regresses_x_s(tdm.parse_args(["--match", "clean"]), kind)


def test_loss_is_of_x_s():
    """With the slope Eq. 11 and squares are those of x_s - sg(x_s + A (mu_real - mu_fake)).

    Their gradient in x goes through x_s. The demo's loss is of x.
    """
    t, s = times(1.0, 0.6, 0.3), times(0.7, 0.2, 0.0)
    x_in, x, real, fake = (normal(3, 4, seed=k) for k in range(4))
    leaf, A = x.clone().requires_grad_(True), step_slope(Flow(), t, s)
    x_s, _ = step_to(Flow(), leaf, x_in, t, s)
    r = x_s - (x_s + A[:, None] * (real - fake)).detach()
    c = 0.00054 * 2
    wanted = {"l2": 0.5 * r.square().mean()}
    wanted["pseudo_huber"] = ((r.square().sum(1) + c**2).sqrt() - c).mean()
    for loss, want in wanted.items():
        close(loss_of(x, real, fake, loss, A), want, 1e-10)
        through_x_s = torch.autograd.grad(want, leaf, retain_graph=True)[0]
        close(pull(x, real, fake, loss, A), through_x_s, 1e-10)
    demo = [loss_of(x, real, fake, "demo", slope) for slope in (A, None)]
    assert torch.equal(*demo)


@every_loss
def test_default_loss_and_values(loss):
    """Eq. 11 is the default; every loss is 0 where teacher and fake agree, positive elsewhere."""
    x, real, fake = (normal(4, 3, seed=k) for k in range(3))
    default = trajectory_matching_loss(x, real, fake)
    assert torch.equal(default, loss_of(x, real, fake, "pseudo_huber"))
    assert inspect.signature(trajectory_matching_loss).parameters["loss"].default == "pseudo_huber"
    assert tdm.parse_args([]).loss == "pseudo_huber"
    assert loss_of(x, real, real, loss).abs() < 1e-12
    assert loss_of(x, real, fake, loss) > 0.1


@every_network
@every_loss
def test_no_pull_where_fake_is_the_teacher(which, loss):
    """fake = deepcopy(teacher), guidance 1: exactly no gradient, at any step.

    Guidance w leaves (w - 1) (mu_cond - mu_uncond) to pull along.
    """
    teacher, *_ = networks(which)
    (x, eps, t, cond, uncond), diffusion = draws(which), diffusion_of(which)
    s, tau = 0.5 * t, 0.8 * t

    def gradient(scale, slope=None):
        leaf, nets = x.clone().requires_grad_(True), (teacher, copy.deepcopy(teacher))
        at_tau = *nets, diffusion, eps, s, tau, cond, uncond, cond, scale
        value, _ = student_loss(leaf, leaf, *at_tau, loss=loss, slope=slope)
        return torch.autograd.grad(value, leaf)[0]

    assert not gradient(1.0).any() and not gradient(1.0, step_slope(diffusion.schedule, t, s)).any()
    with torch.no_grad():
        x_tau = noise_on(diffusion.schedule, x, eps, s, tau)
        c, u = (diffusion.x0(teacher, x_tau, tau, **v) for v in (cond, uncond))
    got = gradient(3.5)
    if loss == "l2":
        close(got, -2.5 * (c - u) / x.numel(), 1e-12)
    moved = (c - u).flatten(1).abs().amax(1) > 1e-3
    assert moved.any() and ((got * (c - u)).flatten(1).sum(1)[moved] < 0).all()


def test_pseudo_huber_gradient_is_a_direction():
    """Eq. 11 gives each sample r / sqrt(|r|^2 + c^2) / B by itself, c = .00054 sqrt(d).

    Its length is below 1 and near it for large r, |r| / c for small r. One root per batch, or per
    element, is not that.
    """
    B, shape = 5, (3, 4)
    c = 0.00054 * 12**0.5
    unit = normal(B, *shape) / expand(normal(B, *shape).flatten(1).norm(dim=1), normal(B, *shape))
    size = c * times(1e-4, 0.1, 1.0, 10.0, 1e5)
    x, real = normal(B, *shape, seed=1), normal(B, *shape, seed=2)
    fake = real - expand(size, unit) * unit  # x is pulled along unit
    g = -B * pull(x, real, fake, "pseudo_huber")
    want = size / (size**2 + c**2).sqrt()
    close(g.flatten(1).norm(dim=1), want, 1e-9)
    close(g, expand(want, unit) * unit, 1e-9)
    assert (g.flatten(1).norm(dim=1) <= 1).all() and g[4].norm() > 0.999999
    close(g[0].norm(), size[0] / c, 1e-8)
    close(loss_of(x, real, fake), ((size**2 + c**2).sqrt() - c).mean(), 1e-9)
    alone = pull(x[2:3], real[2:3], fake[2:3], "pseudo_huber")
    close(alone / B, pull(x, real, fake, "pseudo_huber")[2:3], 1e-12)


@pytest.mark.parametrize(
    "shape, c", [((4, 64, 64), 0.0691), ((4, 128, 128), 0.138), ((16, 13, 60, 90), 0.572)], ids=str
)
def test_pseudo_huber_constant_of_real_latents(shape, c):
    """iCT's c for the sizes the paper trains at: a residual of length c costs (sqrt 2 - 1) c."""
    d = math.prod(shape)
    x = torch.zeros(1, *shape, dtype=torch.float64)
    real = torch.full_like(x, c / d**0.5)
    close(loss_of(x, real, x), (2**0.5 - 1) * c, 0.003 * c)


def test_demo_loss_is_element_wise_over_dmd_s_normaliser():
    """(sqrt(r^2 + 1e-6) - 1e-3) / mean|x - mu_real| per sample.

    The latter is a constant, and of the teacher, not of the fake.
    """
    x, real, fake = (normal(4, 3, 5, seed=k) * (1 + k) for k in range(3))
    fake[0, 0] = real[0, 0] + 1e-3 * normal(5, seed=7)  # where the root is rounded
    r = fake - real
    error = (x - real).abs().mean((1, 2), keepdim=True)
    want = (((r**2 + 1e-6).sqrt() - 1e-3) / error).mean()
    close(loss_of(x, real, fake, "demo"), want, 1e-12)
    got = pull(x, real, fake, "demo")
    close(got, r / (r**2 + 1e-6).sqrt() / error / r.numel(), 1e-12)
    large = r.abs() > 1
    close((got * r.numel())[large], (dmd_g(x, real, fake) / r.abs())[large], 1e-5)
    others, moved = [0, 2, 3], x.clone()
    moved[1] *= 100
    assert torch.equal(pull(moved, real, fake, "demo")[others], got[others])
    assert pull(real, real, fake, "demo").isfinite().all()
    assert not pull(real, real, real, "demo").any()


@every_setting
@every_loss
@pytest.mark.parametrize("width, sign", [(1.2, 1), (0.8, -1)], ids=["too wide", "too narrow"])
def test_one_step_mends_a_gaussian_student(schedule, grid, loss, width, sign):
    """x_s too wide shrinks under one step of gradient descent, too narrow grows.

    It does so at every step and level, whether x or x_s is regressed; teacher and fake exchanged do
    the opposite.
    """
    T = Trajectory(schedule, grid, 1.0)
    h = (width * T.g - schedule.sigma(T.s) / schedule.sigma(T.t)) / T.slope
    fake = T.fake(h, target="exact")
    before = T.land(h)[0].square().mean(1)
    close(before, width**2 * variance(schedule, T.s, 1.0), 1e-9)
    for slope in (None, T.slope):
        step = 1e-4 * T.gradient(h, fake, loss, slope)
        assert (sign * (T.land(h - step)[0].square().mean(1) - before) < 0).all()
        # teacher and fake exchanged pull the other way, as is checked below
        assert (sign * (T.land(h + step)[0].square().mean(1) - before) > 0).all()
    x, real, guess = (normal(3, 4, seed=k) for k in range(3))
    if loss != "demo":
        close(pull(x, real, guess, loss), -pull(x, guess, real, loss), 1e-12)


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
    """Students of one gain a step, trained by the exact expected gradient on data N(0, C), C (n,).

    The gradient is averaged over three levels of each step; after each update the fake is the best
    linear one at each level.  -> the student as a network, and E[x_s^2] where each of the K steps
    lands over the data's there (n, K).
    """
    K, n, inside = len(grid) - 1, len(C), times(0.2, 0.5, 0.9)
    L, diffusion = len(inside), Diffusion(schedule, "x0")
    t, s = (times(*v)[None, :, None].expand(n, K, L).flatten() for v in (grid[:-1], grid[1:]))
    tau = s + inside.repeat(n * K) * (t - s)
    real = real_gain(schedule, tau, C[:, None, None].expand(n, K, L).flatten())
    eps = EPS.expand(n * K * L, -1)
    column = {v: i for i, v in enumerate(grid[:-1])}
    # starts near the teacher, not at it: flow's teacher predicts 0 at t = 1, which is a saddle
    h = torch.stack([real_gain(schedule, torch.full_like(C, v), C) for v in grid[:-1]], 1) + 0.1

    def by_row(v):
        """(n, K) -> (n * K * L, 1)."""
        return v[..., None].expand(n, K, L).reshape(-1, 1)

    def student(x, t):
        return h[:, column[float(t[0])], None] * x

    def visited():
        """The states of the trajectory, (n, K + 1, 4)."""
        states = [Z.expand(n, -1)]
        for a, b in zip(grid, grid[1:]):
            ends = times(a).expand(n), times(b).expand(n)
            states.append(student_step(student, diffusion, states[-1], *ends, {})[0])
        return torch.stack(states, 1)

    for _ in range(steps):
        inputs, leaf = visited()[:, :-1], h.clone().requires_grad_(True)
        x_in = inputs[:, :, None].expand(n, K, L, 4).reshape(-1, 4)
        x_s, x = step_to(schedule, by_row(leaf) * x_in, x_in, t, s)
        fake = best_fake(schedule, x.detach(), x_s.detach(), eps, s, tau, target=target)
        at_tau = diffusion, eps, s, tau, {}, {}, {}, 1
        loss, *_ = tdm_loss_variant(x, x_s, gains(real), gains(fake), *at_tau, loss="l2")
        slope = torch.autograd.grad(loss, leaf)[0]
        h = h - 2 * n * K * slope / inputs.square().mean(-1)
    want = torch.stack([variance(schedule, torch.full_like(C, v), C) for v in grid[1:]], 1)
    return student, visited()[:, 1:].square().mean(-1) / want


SHORT = {
    "flow, 1": (Flow(), step_grid(1)),
    "flow, 2": (Flow(), step_grid(2)),
    "vp, 1": (VP(), step_grid(1)),
    "vp, 2": (VP(), step_grid(2)),
}


@pytest.mark.parametrize(
    "schedule, grid", [*SHORT.values(), *SETTINGS.values()], ids=[*SHORT, *SETTINGS]
)
@pytest.mark.parametrize("target", ["exact", "importance"])
def test_trained_gaussian_students_have_the_data_s_variance(schedule, grid, target):
    """Data of variance .25, 1 and 4: the sampled variance is right within 1 % with either fake.

    That of all other landings is right with the exact one only: the importance fake makes them too
    wide, the last but one most.
    """
    C, schedule = times(0.25, 1.0, 4.0), Remembered(schedule)
    student, ratio = descend(schedule, grid, C, target)
    x = sample(student, Diffusion(schedule, "x0"), lambda name: Z.expand(3, -1), grid, {})
    assert ((x.square().mean(1) / C - 1).abs() < 0.01).all()
    assert ((ratio[:, -1] - 1).abs() < 0.01).all()
    if target == "exact":
        assert ((ratio - 1).abs() < 0.01).all()
    else:
        assert (ratio[:, :-1] > 1.001).all() and (ratio[:, :-1].diff(dim=1) > 0).all()
        if grid == DEMO_GRID:
            close(ratio[1], times(1.007, 1.072, 1.265, 1.0), 5e-3)
            close(ratio[2], times(1.025, 1.196, 1.343, 1.0), 1.5e-2)


# ---- where gradients go --------------------------------------------------------------------------


def grads_of(net):
    """{name: what backward left}."""
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@every_network
@every_loss
@pytest.mark.parametrize("regress", ["x0", "x_s"])
def test_student_s_loss_reaches_the_student_alone(which, loss, regress):
    """Teacher and fake, trainable and reached through x_tau too, get no gradient.

    The student's is its vector-Jacobian product with dL/dx.
    """
    teacher, fake, *_ = networks(which)
    (z, eps, t, cond, uncond), diffusion = draws(which), diffusion_of(which)
    if which == "ring":
        teacher = copy.deepcopy(fake)
        with torch.no_grad():
            next(teacher.parameters()).mul_(1.5)
    student, again, s, tau = copy.deepcopy(fake), copy.deepcopy(fake), 0.5 * t, 0.8 * t
    slope = step_slope(diffusion.schedule, t, s) if regress == "x_s" else None
    x_s, x = student_step(student, diffusion, z, t, s, cond)
    at_tau = diffusion, eps, s, tau, cond, uncond, cond, 2.0
    value, _ = student_loss(x, x_s, teacher, fake, *at_tau, loss=loss, slope=slope)
    value.backward(retain_graph=True)
    assert not has_gradient(teacher) and not has_gradient(fake)
    got = grads_of(student)

    x_tau = noise_on(diffusion.schedule, x_s, eps, s, tau)
    real = diffusion.guided_x0(teacher, x_tau, tau, cond, uncond, 2.0)
    guess = diffusion.x0(fake, x_tau, tau, **cond)
    assert real.requires_grad and guess.requires_grad
    student.zero_grad(set_to_none=True)
    trajectory_matching_loss(x, real, guess, loss, slope).backward()  # open graphs change nothing
    assert not has_gradient(teacher) and not has_gradient(fake)

    x_again = student_step(again, diffusion, z, t, s, cond)[1]
    x_again.backward(pull(x.detach(), real.detach(), guess.detach(), loss, slope))
    tolerance = 1e-10 if which == "ring" else 1e-5
    assert_close_gradients(got, grads_of(again), tolerance)
    assert_close_gradients(grads_of(student), grads_of(again), tolerance)


@every_network
@pytest.mark.parametrize("target", ["importance", "exact"])
def test_fake_s_loss_reaches_the_fake_alone(which, target):
    """On detached samples every weight of the fake and nobody else's gets a gradient."""
    _, fake, *_ = networks(which)
    (z, eps, t, cond, _), diffusion = draws(which), diffusion_of(which)
    student = copy.deepcopy(fake)
    x_s, x = (v.detach() for v in student_step(student, diffusion, z, t, 0.5 * t, cond))
    for weight in ("network", "snr"):
        fake.zero_grad(set_to_none=True)
        at_tau = x, x_s, eps, 0.5 * t, 0.8 * t, cond
        fake_loss(fake, diffusion, *at_tau, target, weight).backward()
        assert not has_gradient(student) and all(p.grad is not None for p in fake.parameters())
    attached = student_step(student, diffusion, z, t, 0.5 * t, cond)[::-1]  # x, x_s with a graph
    fake_score_loss(fake, diffusion, *attached, eps, 0.5 * t, 0.8 * t, cond).backward()
    assert not has_gradient(student)


# ---- no signal left at t = 1 ---------------------------------------------------------------------


def test_zero_terminal_snr():
    """alpha(1) = 0 and v-prediction: x = -v at t = 1, and everything is finite.

    That is step, noising on, weight, losses and sample, also with tau = 1 and s = tau = 1. An eps
    prediction says nothing there, and what comes of it is not finite.
    """
    schedule, diffusion = SCHEDULES["vp, zero terminal snr"], Diffusion(VP(zero_snr=True), "vp_v")
    z, eps, one = normal(4, 3), normal(4, 3, seed=1), torch.ones(4, dtype=torch.float64)
    s = times(0.0, 0.5, 0.999, 1.0)

    def net(x_t, t, **cond):
        return torch.sin(x_t) + 0.1

    x_s, x = student_step(net, diffusion, z, one, s, {})
    close(x, -net(z, one), 1e-13)
    close(x_s, add_noise(schedule, x, z, s), 1e-13)
    x_tau = noise_on(schedule, x_s, eps, s, one)
    assert torch.equal(x_tau[:3], eps[:3]) and torch.equal(x_tau[3], x_s[3])
    weight = weight_of(schedule, x, x_s, eps, s, one)
    close(weight[:3], torch.ones(3), 1e-13)
    assert weight.isfinite().all()
    for which in FAKE_LOSSES:
        leaf, level = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True), s
        if which == ("exact", "network"):
            level = s.clamp(max=0.999)  # a step never lands at pure noise
        at_tau = x, x_s, eps, level, one, {}
        loss = fake_loss(lambda x, t, leaf=leaf: net(x, t) + leaf, diffusion, *at_tau, *which)
        assert loss.isfinite() and torch.autograd.grad(loss, leaf)[0].isfinite().all()
    real = diffusion.x0(net, x_tau, one)
    for loss in LOSSES:
        assert pull(x, real, x, loss).isfinite().all()
        for slope in (None, step_slope(schedule, one, s)):
            leaf = x.clone().requires_grad_(True)
            x_s, _ = step_to(schedule, leaf, z, one, s)
            at_tau = net, constant(0 * x), diffusion, eps, s, one, {}, {}, {}, 1
            value, _ = student_loss(leaf, x_s, *at_tau, loss=loss, slope=slope)
            assert value.isfinite() and torch.autograd.grad(value, leaf)[0].isfinite().all()
    for K in (1, 2, 4):
        assert sample(net, diffusion, lambda name: z, step_grid(K), {}).isfinite().all()
    of_eps = student_step(net, Diffusion(schedule, "eps"), z, one, s, {})[0]
    assert not of_eps.isfinite().all()


# ---- the sampler ---------------------------------------------------------------------------------


class Spy:
    """A network that keeps what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, **cond):
        assert not torch.is_grad_enabled()
        self.calls.append((x_t.clone(), t, cond))
        return torch.sin(3 * x_t) + expand(t, x_t)


class Noise:
    """name -> noise of 3 rows, and the names that were asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, name):
        self.asked.append(name)
        seed = 0 if name == "z" else 4 + int(name.removeprefix("renoise"))
        return normal(3, 2, seed=seed)


@every_schedule
@pytest.mark.parametrize("K", [1, 2, 4])
def test_sampler_follows_the_grid(schedule, K):
    """K calls at grid[0] ... grid[K - 1], all of them conditioned.

    Each starts where the one before landed; the same noise gives the same sample.
    """
    grid, net, diffusion = step_grid(K, 2.0), Spy(), Diffusion(schedule, "vp_v")
    cond = {"label": torch.arange(3), "steps": torch.full((3,), float(K))}
    x = sample(net, diffusion, Noise(), grid, cond)
    assert len(net.calls) == K
    for _, _, c in net.calls:
        assert c.keys() == cond.keys() and all(c[name] is cond[name] for name in cond)
    assert [t.tolist() for _, t, _ in net.calls] == [[t] * 3 for t in grid[:-1]]
    want = Noise()("z")
    assert torch.equal(net.calls[0][0], want)
    with torch.no_grad():
        for i, (t, s) in enumerate(zip(grid, grid[1:])):
            assert torch.equal(net.calls[i][0], want)
            x0, eps = diffusion.x0_eps(Spy(), want, times(t).expand(3))
            want = add_noise(schedule, x0, eps, times(s).expand(3))
    assert torch.equal(x, want) and torch.equal(x, x0)  # the last call's clean prediction
    assert not x.requires_grad
    assert torch.equal(sample(Spy(), diffusion, Noise(), grid, cond), x)


@every_schedule
def test_sampler_draws_fresh_noise_only_if_asked_to(schedule):
    """No generator is touched. With "sde" its i-th noise goes into the i-th landing.

    Only x0 comes out of the last step.
    """
    grid, diffusion, state = step_grid(3), Diffusion(schedule, "vp_v"), torch.get_rng_state()
    noise, fresh = Noise(), Noise()
    x = sample(Spy(), diffusion, noise, grid, {})
    stochastic = sample(Spy(), diffusion, fresh, grid, {}, "sde")
    assert torch.equal(torch.get_rng_state(), state)
    assert noise.asked == ["z"] and fresh.asked == ["z", "renoise0", "renoise1", "renoise2"]
    want = noise("z")
    with torch.no_grad():
        for i, (t, s) in enumerate(zip(grid, grid[1:])):
            x0 = diffusion.x0(Spy(), want, times(t).expand(3))
            want = add_noise(schedule, x0, noise(f"renoise{i}"), times(s).expand(3))
    assert torch.equal(stochastic, want) and torch.equal(want, x0)
    assert not torch.allclose(x, stochastic, rtol=0.01)


def test_sampler_of_an_exact_teacher_approaches_its_law():
    """The ring's own network in 64 deterministic steps has the ring's modes.

    Nearly all samples are within three stds of one, and of one of their own class.
    """
    ring, label = RingTeacher(), torch.arange(400) % 4
    x = sample(ring, FLOW_V, lambda name: normal(400, 2), step_grid(64), {"label": label})
    distance = torch.cdist(x, ring.means)
    assert (distance.min(1).values < 3 * ring.std).double().mean() > 0.95
    assert (distance.argmin(1) % 4 == label).double().mean() > 0.99


def test_rows_go_to_the_fake_of_their_own_count():
    """Of tests/tdm_fakes.py, whatever the step k, and gradients to that fake alone."""

    class Scaled(torch.nn.Module):
        def __init__(self, K):
            super().__init__()
            self.K = torch.nn.Parameter(torch.tensor(float(K)))

        def forward(self, x, t, steps, label):
            return self.K * x + steps[:, None] + label[:, None]

    grids = {1: 0, 2: 0, 4: 0}
    K, k = torch.tensor([4, 1, 2, 4, 2]), torch.tensor([3, 0, 1, 0, 0])
    steps = tdm.fake_steps_input(grids, K, k, (True, True)).float()
    fakes = tdm_fakes.FakePerCount({n: Scaled(n) for n in grids})
    x, label = normal(5, 3).float(), torch.arange(5)
    found = fakes(x, torch.zeros(5), steps=steps, label=label)
    close(found, K[:, None] * x + steps[:, None] + label[:, None], 1e-6)
    found[1:3].sum().backward()
    grads = {n: fake.K.grad for n, fake in fakes.fakes.items()}
    assert grads["4"] is None or grads["4"] == 0
    close(grads["1"], x[1].sum(), 1e-5)
    close(grads["2"], x[2].sum(), 1e-5)
