"""models/diffusion.py against independent formulas.

Schedules, predictions, guidance, time and the ODE sampler.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from models.diffusion import (
    PREDICTIONS,
    VP,
    Flow,
    add_noise,
    from_x0_eps,
    guide,
    logit_normal,
    ode_calls,
    ode_step,
    predict_x0,
    predict_x0_eps,
    sample_ode,
    shift,
    sinusoid,
    step_grid,
    to_x0_eps,
    transition,
    unshift,
)
from models.worlds.ring import RingTeacher

SCHEDULES = {
    "flow": Flow(),
    "linear": VP("linear", 1e-4, 0.02),
    "scaled_linear": VP(),
    "zero_snr": VP(zero_snr=True),
    "shifted": VP(zero_snr=True, snr_shift=3.0),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
every_vp = pytest.mark.parametrize("name", ["linear", "scaled_linear", "zero_snr"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- predictions ---------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("first, second", list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_any_prediction_converts_to_any_other_and_back(schedule, first, second):
    """x0, eps, flow v, VP v and score say the same: (x0, eps) -> first -> second -> (x0, eps)."""
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    x0, eps = normal(19, 2, 3), normal(19, 2, 3, seed=1)
    a, s, x_t = schedule.alpha(t), schedule.sigma(t), add_noise(schedule, x0, eps, t)
    one = to_x0_eps(from_x0_eps(first, x0, eps, a, s), first, x_t, a, s)
    two = to_x0_eps(from_x0_eps(second, *one, a, s), second, x_t, a, s)
    close(two[0], x0)
    close(two[1], eps)


@every_schedule
@pytest.mark.parametrize("kind", ["flow_v", "vp_v"])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_velocities_convert_at_both_ends(schedule, kind, t):
    """The velocities give x0 and eps at t = 0 and t = 1 too, where alpha or sigma may vanish."""
    x0, eps, t = normal(4, 3), normal(4, 3, seed=1), torch.full((4,), t, dtype=torch.float64)
    a, s = schedule.alpha(t), schedule.sigma(t)
    got = to_x0_eps(from_x0_eps(kind, x0, eps, a, s), kind, add_noise(schedule, x0, eps, t), a, s)
    close(got[0], x0)
    close(got[1], eps)


def test_predictions_equal_their_textbook_formulas():
    """flow v = eps - x0, VP v = a eps - s x0, score = -(x_t - a x0) / s^2, each worked by hand."""
    x0, eps, a, s = (torch.tensor([v], dtype=torch.float64) for v in (2.0, -1.0, 0.8, 0.6))
    x_t = 0.8 * 2 - 0.6
    close(from_x0_eps("flow_v", x0, eps, a, s), [-3.0])
    close(from_x0_eps("vp_v", x0, eps, a, s), [-0.8 - 1.2])
    close(from_x0_eps("score", x0, eps, a, s), [-(x_t - 0.8 * 2) / 0.36])
    close(from_x0_eps("x0", x0, eps, a, s), [2.0])
    close(from_x0_eps("eps", x0, eps, a, s), [-1.0])


def test_differences_of_predictions():
    """s_f - s_r = a (mu_f - mu_r) / s^2 = -(eps_f - eps_r) / s, and mu_f - mu_r = -s (v_f - v_r).

    The last holds for flow.
    """
    t = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    for schedule in SCHEDULES.values():
        a, s, x_t = schedule.alpha(t), schedule.sigma(t), normal(8)
        pairs = [to_x0_eps(normal(8, seed=k), "x0", x_t, a, s) for k in (1, 2)]
        (mu_f, eps_f), (mu_r, eps_r) = pairs
        score_f, score_r = (from_x0_eps("score", *p, a, s) for p in pairs)
        close(score_f - score_r, a * (mu_f - mu_r) / s**2, 1e-8)
        close(score_f - score_r, -(eps_f - eps_r) / s, 1e-8)
        if isinstance(schedule, Flow):
            v_f, v_r = (from_x0_eps("flow_v", *p, a, s) for p in pairs)
            close(mu_f - mu_r, -s * (v_f - v_r))


def test_unknown_prediction_is_refused():
    """A prediction outside PREDICTIONS raises ValueError in both directions."""
    one = torch.ones(1)
    with pytest.raises(ValueError, match="prediction"):
        to_x0_eps(one, "v", one, one, one)
    with pytest.raises(ValueError, match="prediction"):
        from_x0_eps("v", one, one, one, one)


def test_predict_x0_runs_the_network_and_keeps_the_wider_dtype():
    """predict_x0 passes conditions on and converts; a bf16 network leaves the state in float32."""
    x_t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.5, 1.0])

    def net(x, t, label):
        return (x * label[:, None]).bfloat16()

    label = torch.tensor([1.0, 2.0, 3.0])
    x0, eps = predict_x0_eps(net, Flow(), "flow_v", x_t, t, label=label)
    v = (x_t * label[:, None]).bfloat16().float()
    assert x0.dtype == torch.float32
    close(x0, x_t - t[:, None] * v, 1e-6)
    close(eps, x_t + (1 - t)[:, None] * v, 1e-6)
    assert torch.equal(predict_x0(net, Flow(), "flow_v", x_t, t, label=label), x0)
    for kind in PREDICTIONS:  # also where the prediction itself is one of the two
        found = predict_x0_eps(net, Flow(), kind, x_t, torch.full([3], 0.5), label=label)
        assert [x.dtype for x in found] == [torch.float32] * 2


# ---- schedules -----------------------------------------------------------------------------------


def independent_abar(name, n=1000):
    """alpha-bar by a plain Python loop; zero_snr by Algorithm 1 of Lin et al., as printed there."""
    abar, product = [], 1.0
    for i in range(n):
        w = i / (n - 1)
        if name == "linear":
            beta = 1e-4 + w * (0.02 - 1e-4)
        else:
            beta = (math.sqrt(0.00085) * (1 - w) + math.sqrt(0.012) * w) ** 2
        product *= 1 - beta
        abar.append(product)
    if name == "zero_snr":
        root = [math.sqrt(v) for v in abar]
        abar = [((r - root[-1]) * root[0] / (root[0] - root[-1])) ** 2 for r in root]
    return torch.tensor(abar, dtype=torch.float64)


def index_times(n=1000, dtype=torch.float64):
    return (torch.arange(n, dtype=torch.float64) + 1).to(dtype) / n


@every_vp
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_vp_table_equals_an_independent_product(name, dtype, tolerance):
    """alpha((i + 1) / n)^2 is alpha-bar of index i, and sigma^2 = 1 - alpha-bar.

    For every table and in both precisions.
    """
    want, t = independent_abar(name), index_times(dtype=dtype)
    close(SCHEDULES[name].alpha(t).double() ** 2, want, tolerance)
    close(SCHEDULES[name].sigma(t).double() ** 2, 1 - want, tolerance)


@every_vp
def test_vp_table_equals_diffusers(name):
    """The tables are diffusers' DDIMScheduler.alphas_cumprod, including rescale_betas_zero_snr."""
    scheduler = pytest.importorskip("diffusers").DDIMScheduler
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    if name == "linear":
        betas = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    theirs = scheduler(**betas, rescale_betas_zero_snr=name == "zero_snr").alphas_cumprod.double()
    close(SCHEDULES[name].alpha(index_times()) ** 2, theirs, 3e-6)


def test_stable_diffusion_constants():
    """Stable Diffusion's known values of alpha-bar, which has no zero terminal SNR."""
    schedule = SCHEDULES["scaled_linear"]
    known = {999: 0.00466, 980: 0.00584, 749: 0.0566, 499: 0.2777, 399: 0.4261, 249: 0.6754}
    for index, abar in known.items():
        t = torch.tensor([(index + 1) / 1000], dtype=torch.float64)
        digits = len(str(abar).split(".")[1])
        assert schedule.alpha(t).item() ** 2 == pytest.approx(abar, abs=0.5 * 10**-digits)
    one = torch.ones(1, dtype=torch.float64)
    assert schedule.alpha(one).item() == pytest.approx(0.0683, abs=5e-5)
    assert schedule.sigma(one).item() == pytest.approx(0.9977, abs=5e-5)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_t_zero_is_exactly_clean(schedule, dtype):
    """alpha(0) is 1 and sigma(0) is 0, bit for bit, so that add_noise returns x0 itself."""
    zero, x0 = torch.zeros(2, dtype=dtype), normal(2, 3).to(dtype)
    assert torch.equal(schedule.alpha(zero), zero + 1) and torch.equal(schedule.sigma(zero), zero)
    assert torch.equal(add_noise(schedule, x0, 100 * x0, zero), x0)


@pytest.mark.parametrize("name", ["flow", "zero_snr"])
def test_zero_terminal_snr_ends_in_pure_noise(name):
    """With zero terminal SNR (and for flow) alpha(1) is 0 exactly: x_1 is the noise itself."""
    one, eps = torch.ones(2), torch.randn(2, 3)
    assert torch.equal(SCHEDULES[name].alpha(one), torch.zeros(2))
    assert torch.equal(add_noise(SCHEDULES[name], 100 * eps, eps, one), eps)


@every_schedule
def test_alpha_falls_and_sigma_rises_without_jumps(schedule):
    """alpha falls strictly, sigma rises strictly, and neither jumps, also between the indices."""
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    assert alpha.diff().abs().max() < 2e-3
    knots = torch.arange(1000, dtype=torch.float64) / 1000  # 0, then indices 0 to 998
    assert (schedule.alpha(knots) - schedule.alpha(knots + 1e-9)).abs().max() < 1e-6
    assert (schedule.alpha(knots[1:]) - schedule.alpha(knots[1:] - 1e-9)).abs().max() < 1e-6
    if not isinstance(schedule, Flow):
        close(alpha**2 + sigma**2, torch.ones_like(t), 1e-12)


def test_vp_refuses_other_beta_names():
    """A beta table that is not implemented raises ValueError instead of falling back."""
    with pytest.raises(ValueError, match="scaled_linear"):
        VP("cosine")


@every_schedule
def test_transition_kernel_composes(schedule):
    """a_{t|s} alpha_s = alpha_t, a^2 sigma_s^2 + b^2 = sigma_t^2, and r -> s -> t is r -> t.

    From s = 0 it is add_noise.
    """
    times = [[0.0, 0.1, 0.3], [0.2, 0.45, 0.5], [0.6, 0.7, 0.9]]
    r, s, t = torch.tensor(times, dtype=torch.float64)
    a_rs, b_rs = transition(schedule, r, s)
    a_st, b_st = transition(schedule, s, t)
    a_rt, b_rt = transition(schedule, r, t)
    close(a_st * schedule.alpha(s), schedule.alpha(t))
    close(a_st**2 * schedule.sigma(s) ** 2 + b_st**2, schedule.sigma(t) ** 2)
    close(a_st * a_rs, a_rt)
    close(a_st**2 * b_rs**2 + b_st**2, b_rt**2)
    close(a_rt[0], schedule.alpha(t)[0])
    close(b_rt[0], schedule.sigma(t)[0])


@every_schedule
def test_transition_to_the_same_time_is_the_identity(schedule):
    """s = t: a = 1 and b = 0 exactly."""
    t = torch.linspace(0, 0.99, 12, dtype=torch.float64)
    a, b = transition(schedule, t, t)
    assert torch.equal(a, torch.ones_like(t)) and torch.equal(b, torch.zeros_like(t))


# ---- guidance ------------------------------------------------------------------------------------


def test_guidance_forms():
    """u + k (c - u) is c at k = 1 and u at k = 0; other code's form c + w (c - u) is k = w + 1."""
    c, u = normal(5), normal(5, seed=1)
    close(guide(c, u, 1.0), c)
    close(guide(c, u, 0.0), u)
    for w in (0.5, 3.0, 3.5):
        close(guide(c, u, w + 1), c + w * (c - u))
        assert not torch.allclose(guide(c, u, w), c + w * (c - u))
    assert torch.equal(guide(c, c, 7.5), c)


@every_schedule
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_guiding_any_prediction_is_guiding_x0(schedule, kind):
    """The weights sum to one, so guidance in any of the five spaces gives the same x0."""
    t, x_t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), normal(3, 2)
    a, s = schedule.alpha(t), schedule.sigma(t)
    c, u = (to_x0_eps(normal(3, 2, seed=k), "x0", x_t, a, s) for k in (1, 2))
    guided = guide(from_x0_eps(kind, *c, a, s), from_x0_eps(kind, *u, a, s), 4.0)
    close(to_x0_eps(guided, kind, x_t, a, s)[0], guide(c[0], u[0], 4.0), 1e-9)


# ---- time ----------------------------------------------------------------------------------------


def test_shift_of_the_four_step_grid():
    """Shift 5 takes 1, .75, .5, .25 to 1, .9375, .8333, .625, the four steps of Wan students."""
    for u, t in ((1.0, 1.0), (0.75, 0.9375), (0.5, 5 / 6), (0.25, 0.625), (0.0, 0.0)):
        assert shift(u, 5.0) == pytest.approx(t, abs=1e-12)
    assert step_grid(4, 5.0) == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0], abs=1e-12)


@pytest.mark.parametrize("s", [0.2, 1.0, 3.0, 8.0])
def test_unshift_inverts_shift(s):
    """unshift(shift(u)) = u, it equals shift by 1 / s, and shift keeps the order and both ends."""
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    close(unshift(shift(u, s), s), u, 1e-12)
    close(unshift(u, s), shift(u, 1 / s), 1e-12)
    assert (shift(u, s).diff() > 0).all()
    assert shift(u, s)[0] == 0 and shift(u, s)[-1] == 1
    raised = shift(u, s) - u
    assert ((raised if s >= 1 else -raised) >= -1e-12).all()


def test_shift_is_a_change_of_snr():
    """For flow t' / (1 - t') = s t / (1 - t): the shift divides alpha / sigma by s everywhere."""
    u = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    close(shift(u, 3.0) / (1 - shift(u, 3.0)), 3 * u / (1 - u))


@pytest.mark.parametrize("s", [1.0, 1.15, 3.0, 5.0, 12.0])
def test_step_grid_runs_from_one_to_zero(s):
    """steps + 1 strictly descending times from exactly 1 to exactly 0; zero steps are refused."""
    for steps in (1, 2, 7):
        grid = step_grid(steps, s)
        assert len(grid) == steps + 1 and grid[0] == 1.0 and grid[-1] == 0.0
        assert all(a > b for a, b in itertools.pairwise(grid))
    with pytest.raises(ValueError, match="at least 1"):
        step_grid(0, s)


def test_logit_normal_is_the_sigmoid_of_a_normal():
    """u = sigmoid(mean + std n): the median is sigmoid(mean) and u stays within (0, 1)."""
    u = logit_normal(normal(9).sort().values, 0.5, 2.0)
    close(torch.log(u / (1 - u)), 0.5 + 2.0 * normal(9).sort().values)
    assert logit_normal(torch.zeros(1)).item() == 0.5


def test_sinusoid_is_cos_then_sin_of_thousand_t():
    """cos and sin of 1000 t at dim / 2 geometric frequencies, from 1 to about 1 / max_period."""
    t = torch.tensor([0.0, 0.25, 1.0])
    got = sinusoid(t, 8, max_period=1e4)
    angle = 1000 * t.double()[:, None] * 1e4 ** (-torch.arange(4, dtype=torch.float64) / 4)
    close(got, torch.cat([angle.cos(), angle.sin()], 1), 1e-4)


# ---- sampling ------------------------------------------------------------------------------------


def gaussian_denoiser(schedule, m, c):
    """Exact (x0, eps) of data N(m, c^2): E[x0 | x_t] = m + a c^2 / (a^2 c^2 + s^2) (x_t - a m)."""

    def predict(x, t):
        a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        x0 = m + a * c**2 / (a**2 * c**2 + s**2) * (x - a * m)
        return x0, (x - a * x0) / s

    return predict


def even_grid(schedule, steps):
    """Times at which tau = sigma / (alpha + sigma) is evenly spaced, as the flow schedule's are."""
    t = torch.linspace(0, 1, 20001, dtype=torch.float64) ** 2
    tau = schedule.sigma(t) / (schedule.alpha(t) + schedule.sigma(t))
    return np.interp(np.linspace(float(tau[-1]), 0, steps + 1), tau.numpy(), t.numpy()).tolist()


def gaussian_errors(schedule, solver, grids, m=0.7, c=0.4):
    """Largest error of the known map a_1 m + sqrt(a_1^2 c^2 + s_1^2) z -> m + c z, one per grid."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    one = torch.ones(1, dtype=torch.float64)
    a, s = schedule.alpha(one), schedule.sigma(one)
    start = a * m + (a**2 * c**2 + s**2).sqrt() * z
    exact = gaussian_denoiser(schedule, m, c)
    ends = (sample_ode(exact, schedule, start, grid, solver) for grid in grids)
    return [float((x - (m + c * z)).abs().max()) for x in ends]


@every_schedule
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_ode_transports_a_gaussian(schedule, solver, order):
    """Under the exact denoiser of N(m, c^2) the ODE ends in m + c z, for flow and VP alike.

    In y = x / (alpha + sigma) one Heun step serves them all at second order, and Euler (for VP:
    DDIM) at first.
    """
    error = gaussian_errors(schedule, solver, [even_grid(schedule, n) for n in (50, 100)])
    assert error[1] < (2e-2 if solver == "euler" else 5e-4)
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "shifted"])
def test_ode_converges_on_the_uniform_grid(name):
    """The error vanishes on step_grid's times too.

    For VP it does so at first order, because sigma is about sqrt(t) in the last interval. With a
    shifted SNR sigma begins higher, and with it the error.
    """
    schedule = SCHEDULES[name]
    error = gaussian_errors(schedule, "heun", [step_grid(n) for n in (25, 100)])
    assert error[1] < 0.03 and error[1] < error[0] / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["x0", "flow_v", "vp_v"])
def test_zero_snr_sampling_is_finite(kind, dtype):
    """With alpha(1) = 0 samples are finite, for every prediction that is defined there."""
    schedule = SCHEDULES["zero_snr"]
    exact = gaussian_denoiser(schedule, 0.7, 0.4)

    def predict(x, t):
        a, s = schedule.alpha(t), schedule.sigma(t)
        return to_x0_eps(from_x0_eps(kind, *exact(x, t), a, s), kind, x, a, s)

    z = torch.linspace(-2, 2, 9, dtype=dtype)[:, None]
    for solver in ("euler", "heun"):
        x = sample_ode(predict, schedule, z, step_grid(50), solver)
        assert x.dtype == dtype and x.isfinite().all() and (x - (0.7 + 0.4 * z)).abs().max() < 0.1


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_order_of_the_solvers_on_the_ring(solver, order):
    """Halving the step halves Euler's error and quarters Heun's, on the ring's exact velocity."""
    ring, label = RingTeacher(), torch.arange(48) % 5  # four classes and the null label
    z = normal(48, 2)

    def predict(x, t):
        return to_x0_eps(ring(x, t, label), "flow_v", x, 1 - t, t)

    truth = sample_ode(predict, Flow(), z, step_grid(2000), "heun")
    ends = [sample_ode(predict, Flow(), z, step_grid(n), solver) for n in (100, 200, 400)]
    error = [(x - truth).norm(dim=1).median() for x in ends]
    rates = [math.log2(a / b) for a, b in itertools.pairwise(error)]
    assert all(abs(rate - order) < 0.3 for rate in rates), rates


def test_euler_steps_are_euler_and_ddim():
    """ode_step is x + (s - t) v for flow, and DDIM (eta = 0) for VP."""
    x0, eps = normal(3, 2), normal(3, 2, seed=1)
    t, s = torch.full((3,), 0.8, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    close(ode_step(Flow(), x0, eps, s), add_noise(Flow(), x0, eps, t) + (0.5 - 0.8) * (eps - x0))
    abar = independent_abar("scaled_linear")
    close(ode_step(VP(), x0, eps, s), abar[499].sqrt() * x0 + (1 - abar[499]).sqrt() * eps)


def test_one_euler_step_returns_the_data_mean():
    """At t = 1 a flow model's x0 is E[x0]: one Euler step maps every noise to its class's mean."""
    one_mode_each = RingTeacher(modes=3, num_classes=3)  # class k is the Gaussian at means[k]
    label = torch.tensor([0, 1, 2, 3])  # 3: unconditional, whose mean is the origin

    def predict(x, t):
        return to_x0_eps(one_mode_each(x, t, label), "flow_v", x, 1 - t, t)

    got = sample_ode(predict, Flow(), normal(4, 2), step_grid(1), "euler")
    close(got, torch.cat([one_mode_each.means, torch.zeros(1, 2)]))


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ode_calls_equals_the_calls_made(solver, steps):
    """ode_calls counts the calls of sample_ode: N for Euler, 2 N - 1 for Heun, never at t = 0."""
    times = []

    def predict(x, t):
        times.append(float(t[0]))
        return x * 0, x

    sample_ode(predict, Flow(), torch.ones(2, 1), step_grid(steps), solver)
    assert len(times) == ode_calls(steps, solver) and min(times) > 0 and times[0] == 1.0


def test_heun_ends_with_eulers_step_where_a_grid_ends_above_zero():
    """At 1 / n, where a scheduler with set_alpha_to_one false leaves its samples: as many calls."""
    times = []

    def predict(x, t):
        times.append(float(t[0]))
        return x * 0, x

    sample_ode(predict, Flow(), torch.ones(2, 1), [1.0, 0.5, 0.001], "heun")
    assert times == [1.0, 0.5, 0.5] and len(times) == ode_calls(2, "heun")


def test_unknown_solver_is_refused():
    """A misspelt solver raises ValueError before any call."""
    with pytest.raises(ValueError, match="solver"):
        sample_ode(None, Flow(), torch.ones(1, 1), [1.0, 0.0], "rk4")


def test_noise_has_the_stated_moments():
    """x_t = alpha x0 + sigma eps on numbers, and per-sample t broadcasts over any shape."""
    x0, eps = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    rows = zip(t.numpy(), x0.numpy(), eps.numpy(), strict=True)
    want = np.stack([(1 - u) * a + u * b for u, a, b in rows])
    close(add_noise(Flow(), x0, eps, t), torch.from_numpy(want))


# ---- corners -------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.08, 0.01])
def test_step_grid_starts_at_exactly_one_for_small_shifts(s):
    """step_grid's first time is 1 itself for any shift, as sampler.json requires."""
    assert step_grid(2, s)[0] == 1.0


@pytest.mark.parametrize("name", ["flow", "zero_snr"])
def test_transition_at_pure_noise_is_finite(name):
    """transition(1, 1) is the identity also where alpha(1) = 0."""
    one = torch.ones(1)
    a, b = transition(SCHEDULES[name], one, one)
    assert torch.equal(a, one) and torch.equal(b, one * 0)
