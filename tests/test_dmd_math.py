"""dmd.py against the papers' formulas: gradient, normaliser, fake score, GAN, rollout, and who is updated when (as in decoupled_dmd.py)."""

import copy
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import (
    ROOT,
    Diary,
    both,
    each,
    has_gradient,
    one_step,
    perturbed,
    read_log,
    ring_network,
    ring_run,
)

import dmd
import tdm
from models.diffusion import (
    VP,
    Flow,
    add_noise,
    from_x0_eps,
    predict_x0,
    predict_x0_eps,
    sample_ode,
    step_grid,
    to_x0_eps,
    unshift,
)
from models.draws import Draws
from models.files import TrainingError, load_json, load_tensors, save_tensors
from models.networks import load_network, network_config, save_network
from models.networks.dit import DiT
from models.networks.ring_mlp import RingMLP
from models.plumbing import teachers
from models.plumbing.data import Conditions
from models.plumbing.teachers import load_teacher
from models.worlds import load_world
from models.worlds.ring import RingTeacher

KINDS = ("x0", "eps", "flow_v", "vp_v")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_dit(seed=0, depth=4):
    torch.manual_seed(seed)
    return perturbed(
        DiT(size=(4, 4), patch=(2, 2), channels=1, dim=32, depth=depth, num_classes=3),
        seed,
        std=0.2,
    )


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64),
        torch.as_tensor(b, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


# ---- the matching loss -------------------------------------------------------------------------------------------


def gradient_of(loss_function, x, g):
    x = x.clone().requires_grad_(True)
    loss = loss_function(x, g)
    return torch.autograd.grad(loss, x)[0], float(loss.detach())


def test_matching_loss_has_gradient_g_over_numel():
    """d/dx of the pseudo-loss is g / numel(x) and its value 0.5 mean g^2 (2311.18828, Alg. 2)."""
    x, g = normal(5, 3, 4), normal(5, 3, 4, seed=1)
    got, value = gradient_of(dmd.distribution_matching_loss, x, g)
    close(got, g / g.numel(), 1e-12)
    assert value == pytest.approx(0.5 * float(g.square().mean()), rel=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, g: F.mse_loss(x, (x - g).detach()),  # no 0.5
        lambda x, g: 0.5 * F.mse_loss(x, (x - g).detach(), reduction="sum"),
        lambda x, g: 0.5 * F.mse_loss(x, x - g),  # no stop-gradient
        lambda x, g: 0.5 * F.mse_loss(x, (x + g).detach()),  # wrong sign
    ],
    ids=["no half", "sum", "no stop-gradient", "sign"],
)
def test_matching_loss_identity_tells_wrong_variants(wrong):
    """The identity above is sharp: the usual mistakes violate it."""
    x, g = normal(5, 3, 4), normal(5, 3, 4, seed=1)
    assert not torch.allclose(gradient_of(wrong, x, g)[0], g / g.numel(), rtol=1e-3)


# ---- the gradient ------------------------------------------------------------------------------------------------


def test_gradient_is_equation_7_with_equation_8():
    """w_t a_t (s_fake - s_real), with w_t = (s^2 / a) C S / ||mu_real - x||_1, is a_t times our gradient (the dropped a_t)."""
    x, mu_r, mu_f, x_t = (normal(4, 3, 5, seed=k) for k in range(4))
    for schedule in (Flow(), VP()):
        t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
        a, s = schedule.alpha(t), schedule.sigma(t)
        score = [from_x0_eps("score", *to_x0_eps(mu, "x0", x_t, a, s), a, s) for mu in (mu_f, mu_r)]
        w = (s**2 / a) * 15 / (mu_r - x).abs().sum((1, 2))
        want = (w * a)[:, None, None] * (score[0] - score[1])
        close(a[:, None, None] * dmd.distribution_matching_gradient(x, mu_r, mu_f), want, 1e-9)


def test_normaliser_is_per_sample():
    """Changing sample i leaves the gradient of sample j bit-equal; a whole-batch mean does not pass."""

    def whole_batch(x, x0_real, x0_fake):
        return (x0_fake - x0_real) / (x - x0_real).abs().mean()

    x, mu_r, mu_f = (normal(4, 3, 5, seed=k) for k in range(3))
    others = [0, 2, 3]
    moved = x.clone()
    moved[1] *= 100
    kept = dmd.distribution_matching_gradient(x, mu_r, mu_f)[others]
    assert torch.equal(dmd.distribution_matching_gradient(moved, mu_r, mu_f)[others], kept)
    assert torch.equal(
        dmd.distribution_matching_gradient(x[others], mu_r[others], mu_f[others]), kept
    )
    assert not torch.allclose(
        whole_batch(moved, mu_r, mu_f)[others], whole_batch(x, mu_r, mu_f)[others]
    )


def test_gradient_is_dimensionless():
    """Scaling x, mu_real and mu_fake together leaves the gradient unchanged, also per sample."""
    x, mu_r, mu_f = (normal(4, 3, 5, seed=k) for k in range(3))
    k = torch.tensor([0.01, 1.0, 7.0, 1000.0], dtype=torch.float64)[:, None, None]
    close(
        dmd.distribution_matching_gradient(k * x, k * mu_r, k * mu_f),
        dmd.distribution_matching_gradient(x, mu_r, mu_f),
        1e-12,
    )


def test_normaliser_is_the_distance_of_x_not_of_x_t():
    """The L1 target is the clean student sample x: the mean of |g (x - mu_real) / (mu_fake - mu_real)| is 1 with x, not with x_t."""
    x, mu_r, mu_f, eps = (normal(2, 3, 5, seed=k) for k in range(4))
    g = dmd.distribution_matching_gradient(x, mu_r, mu_f)
    weight = (g / (mu_f - mu_r)).flatten(1)[:, 0]
    x_t = add_noise(Flow(), x, eps, torch.tensor([0.5, 0.9], dtype=torch.float64))
    close(weight * (x - mu_r).abs().flatten(1).mean(1), torch.ones(2))
    assert not torch.allclose(
        weight * (x_t - mu_r).abs().flatten(1).mean(1),
        torch.ones(2, dtype=torch.float64),
        rtol=0.05,
    )


def test_gradient_is_a_finite_constant():
    """No graph is attached, and a teacher that agrees with x exactly does not divide by zero."""
    x = normal(2, 3).requires_grad_(True)
    assert not dmd.distribution_matching_gradient(x, x * 2, x * 3).requires_grad
    assert torch.equal(
        dmd.distribution_matching_gradient(x, x, x), torch.zeros(2, 3, dtype=torch.float64)
    )


@pytest.mark.parametrize("guidance, zero", [(1, True), (1.5, False)])
def test_no_gradient_when_fake_equals_teacher(guidance, zero):
    """At initialisation fake == teacher: the student's gradient is exactly 0 without guidance, and is not with it."""
    teacher = small_dit().requires_grad_(False)
    student, fake = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher)
    z, eps, t = (
        normal(6, 1, 4, 4, dtype=torch.float32),
        normal(6, 1, 4, 4, seed=1, dtype=torch.float32),
        torch.linspace(0.1, 0.9, 6),
    )
    cond, uncond = {"label": torch.arange(6) % 3}, {"label": torch.full((6,), 3)}
    x = predict_x0(student, Flow(), "flow_v", z, torch.ones(6), **cond)
    x_t = add_noise(Flow(), x.detach(), eps, t)
    mu_r = dmd.guided_x0(teacher, Flow(), "flow_v", x_t, t, cond, uncond, guidance)
    g = dmd.distribution_matching_gradient(
        x, mu_r, predict_x0(fake, Flow(), "flow_v", x_t, t, **cond)
    )
    dmd.distribution_matching_loss(x, g).backward()
    largest = max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None)
    assert (not g.any() and largest == 0) if zero else (g.abs().max() > 1e-3 and largest > 1e-6)


def test_guided_x0_calls_and_values():
    """Guidance 1 is the conditional prediction itself in one call; otherwise two calls, uncond + k (cond - uncond)."""
    calls = []

    def net(x, t, label):
        calls.append(label[0].item())
        return x * label[:, None]

    x, t = normal(3, 2), torch.full((3,), 0.5, dtype=torch.float64)
    cond, uncond = {"label": torch.ones(3)}, {"label": torch.zeros(3)}
    plain = dmd.guided_x0(net, Flow(), "flow_v", x, t, cond, uncond, 1)
    assert calls == [1.0] and torch.equal(plain, x - 0.5 * x)
    guided = dmd.guided_x0(net, Flow(), "flow_v", x, t, cond, uncond, 4.0)
    assert calls == [1.0, 1.0, 0.0]
    close(guided, x + 4 * (plain - x))


# ---- Gaussians, where everything is known --------------------------------------------------------------------------


def posterior_mean(x_t, m, c, a, s):
    """E[x0 | x_t] for data N(m, c^2)."""
    return m + a * c**2 / (a**2 * c**2 + s**2) * (x_t - a * m)


def test_score_difference_is_the_kl_gradient_of_gaussians():
    """E[a (s_fake - s_real) dG/d(m, c)] is the gradient of KL(N(am, a^2c^2+s^2) || N(am0, a^2c0^2+s^2)): .56228, -.42448 here."""
    m, c, m0, c0, a, s = (
        torch.tensor(v, dtype=torch.float64) for v in (0.7, 0.6, -0.2, 1.1, 0.8, 0.5)
    )
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(20))
    weights = weights / weights.sum()
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    w = weights[:, None] * weights
    x_t = a * (m + c * z) + s * eps
    mu_f, mu_r = posterior_mean(x_t, m, c, a, s), posterior_mean(x_t, m0, c0, a, s)
    a_rows, s_rows = a.expand(20), s.expand(20)
    score_f, score_r = (
        from_x0_eps("score", *to_x0_eps(mu, "x0", x_t, a_rows, s_rows), a_rows, s_rows)
        for mu in (mu_f, mu_r)
    )
    close(score_f - score_r, a * (mu_f - mu_r) / s**2)
    by_score = [float((w * a * (score_f - score_r) * dG).sum()) for dG in (1, z)]

    mc = torch.stack([m, c]).requires_grad_(True)
    v1, v2 = a**2 * mc[1] ** 2 + s**2, a**2 * c0**2 + s**2
    kl = 0.5 * (torch.log(v2 / v1) + (v1 + (a * mc[0] - a * m0) ** 2) / v2 - 1)
    close(by_score, torch.autograd.grad(kl, mc)[0])
    assert by_score == pytest.approx([0.56228, -0.42448], abs=5e-6)


def unit_nodes(n):
    """n fixed equally weighted nodes with the normal's quantiles and exactly mean 0, variance 1."""
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return z / z.square().mean().sqrt()


@pytest.mark.parametrize("with_fake_score", [True, False])
def test_without_the_fake_score_the_student_collapses(with_fake_score):
    """G(z) = m + c z descending our gradient: with the exact fake score c settles at the data's std, with mu_fake = x it decays to 0."""
    m0, c0 = -0.2, 1.1
    z, eps = (
        v.reshape(1, -1) for v in torch.meshgrid(unit_nodes(40), unit_nodes(40), indexing="ij")
    )
    t = torch.tensor(
        [0.2, 0.5, 0.8], dtype=torch.float64
    )  # three noise levels, each a row of 1600 nodes
    a, s = (1 - t)[:, None], t[:, None]
    mc = torch.tensor([0.7, 0.6], dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        m, c = mc
        x = (m + c * z).expand(3, -1)
        x_t = (a * x + s * eps).detach()
        mu_f = posterior_mean(x_t, m, c, a, s) if with_fake_score else x
        g = dmd.distribution_matching_gradient(x, posterior_mean(x_t, m0, c0, a, s), mu_f)
        mc.data -= 0.1 * torch.autograd.grad(dmd.distribution_matching_loss(x, g), mc)[0]
    m, c = mc.tolist()
    assert m == pytest.approx(m0, abs=1e-3)
    assert c == pytest.approx(c0, abs=1e-2) if with_fake_score else abs(c) < 1e-3


# ---- the fake score ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [Flow(), VP()], ids=["flow", "vp"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.15, 0.6, 0.9])
def test_fake_score_optimum_is_the_posterior_mean(schedule, kind, t):
    """On N(m, c^2) the best network w x_t + b under fake_score_loss, read as x0, is E[x0 | x_t], whatever it predicts."""
    m, c = 0.7, 0.6
    z, eps = (
        v.reshape(-1, 1) for v in torch.meshgrid(unit_nodes(30), unit_nodes(30), indexing="ij")
    )
    x, times = m + c * z, torch.full((900,), t, dtype=torch.float64)

    def loss(wb):
        net = lambda x_t, t: DoubleOutput.apply_to(wb[0] * x_t + wb[1])  # noqa: E731
        return dmd.fake_score_loss(net, schedule, kind, x, eps, times, {})

    zero = torch.zeros(2, dtype=torch.float64)
    slope, curvature = (
        torch.autograd.functional.jacobian(loss, zero),
        torch.autograd.functional.hessian(loss, zero),
    )
    w, b = -torch.linalg.solve(curvature, slope)  # the loss is quadratic in (w, b): one Newton step
    a, s, x_t = schedule.alpha(times), schedule.sigma(times), add_noise(schedule, x, eps, times)
    mu = to_x0_eps(w * x_t + b, kind, x_t, a, s)[0]
    close(mu, posterior_mean(x_t, m, c, a[:, None], s[:, None]), 1e-9)


class DoubleOutput(torch.Tensor):
    """Output whose .float() keeps float64, so that identities can be checked beyond float32."""

    @staticmethod
    def apply_to(x):
        return x.as_subclass(DoubleOutput)

    def float(self):
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize(
    "kind, schedule, weight",
    [
        ("x0", VP(), lambda a, s: 1 + 0 * a),
        ("eps", VP(), lambda a, s: (a / s) ** 2),
        ("vp_v", VP(), lambda a, s: 1 / s**2),
        ("score", VP(), lambda a, s: a**2 / s**4),
        ("flow_v", Flow(), lambda a, s: 1 / s**2),
        ("eps", Flow(), lambda a, s: (a / s) ** 2),
    ],
    ids=["x0", "eps", "vp_v", "score", "flow_v", "eps of flow"],
)
def test_fake_score_loss_is_a_weighted_x0_loss(kind, schedule, weight):
    """Regressing eps is the x0 loss times (a / s)^2, either velocity 1 / s^2, the score a^2 / s^4: the teacher's own weighting."""
    x, eps, t = (
        normal(6, 2, 3),
        normal(6, 2, 3, seed=1),
        torch.linspace(0.1, 0.9, 6, dtype=torch.float64),
    )
    a, s, x_t = schedule.alpha(t), schedule.sigma(t), add_noise(schedule, x, eps, t)
    output = normal(6, 2, 3, seed=2)
    seen = {}

    def net(x_t, t, label):
        seen.update(x_t=x_t, t=t, label=label)
        return DoubleOutput.apply_to(output)

    loss = dmd.fake_score_loss(net, schedule, kind, x, eps, t, {"label": 5})
    mu = to_x0_eps(output, kind, x_t, a, s)[0]
    close(loss, (weight(a, s)[:, None, None] * (mu - x).square()).mean(), 1e-9)
    assert torch.equal(seen["x_t"], x_t) and torch.equal(seen["t"], t) and seen["label"] == 5


# ---- rollout and sampler -----------------------------------------------------------------------------------------


class Counting(nn.Module):
    """The exact ring velocity, or another network, with a diary of its inputs."""

    def __init__(self, net=None):
        super().__init__()
        self.net, self.seen = net or RingTeacher(), []

    def forward(self, x, t, label=None):
        self.seen.append((x.detach().clone(), t.clone()))
        return self.net(x, t, label)


def setting(steps, dtype=torch.float64):
    times, z = step_grid(steps, 3.0)[:-1], normal(5, 2, dtype=dtype)
    return (
        times,
        z,
        {"label": torch.arange(5) % 4},
        lambda i: normal(5, 2, seed=100 + i, dtype=dtype),
    )


@pytest.mark.parametrize("renoise", ["sde", "ode"])
@pytest.mark.parametrize("N", [1, 2, 4])
def test_call_counts(N, renoise):
    """A rollout to step k costs k calls, the sampler N, none of them guided; noise is drawn between calls only, never after the last."""
    times, z, cond, _ = setting(N)
    for k in range(N):
        student = Counting()
        dmd.rollout(student, Flow(), "flow_v", z, times[: k + 1], cond, renoise, lambda i: z)
        assert len(student.seen) == k
        predict_x0(student, Flow(), "flow_v", z, z.new_full((5,), times[k]), **cond)
        assert len(student.seen) == k + 1  # a training sample at step k
    student, drawn = Counting(), []
    dmd.sample(student, Flow(), "flow_v", z, times, cond, renoise, lambda i: drawn.append(i) or z)
    assert len(student.seen) == N and drawn == (list(range(N - 1)) if renoise == "sde" else [])
    assert [float(t[0]) for _, t in student.seen] == times


def test_rollout_of_no_step_is_the_noise_itself():
    """k = 0 hands back z, bit for bit, also where the schedule's alpha(1) is not 0."""
    z = normal(3, 2)
    for schedule in (Flow(), VP()):
        assert torch.equal(dmd.rollout(None, schedule, "eps", z, [1.0], {}, "sde", None), z)


def test_one_step_sampler_is_one_call():
    """N = 1: the sample is predict_x0 at t = 1, without any noise added."""
    times, z, cond, fresh = setting(1)
    got = dmd.sample(RingTeacher(), Flow(), "flow_v", z, times, cond, "sde", fresh)
    assert torch.equal(
        got,
        predict_x0(RingTeacher(), Flow(), "flow_v", z, torch.ones(5, dtype=torch.float64), **cond),
    )


@pytest.mark.parametrize("renoise", ["sde", "ode"])
def test_training_rollout_visits_the_sampler_s_states(renoise):
    """Backward simulation: with the same noise, the training input at step k is bit-equal to the state the sampler is in."""
    times, z, cond, fresh = setting(4, torch.float32)
    student = Counting(perturbed(RingMLP(dim=32), std=0.2))
    x0 = dmd.sample(student, Flow(), "flow_v", z, times, cond, renoise, fresh)
    visited = list(student.seen)
    for k in range(4):
        x_t = dmd.rollout(student, Flow(), "flow_v", z, times[: k + 1], cond, renoise, fresh)
        assert torch.equal(x_t, visited[k][0]) and torch.equal(
            visited[k][1], z.new_full((5,), times[k])
        )
    with torch.no_grad():
        assert torch.equal(
            x0, predict_x0(student, Flow(), "flow_v", x_t, z.new_full((5,), times[3]), **cond)
        )


def test_sde_adds_fresh_noise_and_ode_keeps_the_implied_noise():
    """ "sde": x_{t'} = a' x0 + s' fresh; "ode" is the Euler solver on the same times, and DDIM under VP."""
    times, z, cond, fresh = setting(2)
    t0, t1 = (z.new_full((5,), t) for t in times)
    x0, _ = predict_x0_eps(RingTeacher(), Flow(), "flow_v", z, t0, **cond)
    close(
        dmd.rollout(RingTeacher(), Flow(), "flow_v", z, times, cond, "sde", fresh),
        add_noise(Flow(), x0, fresh(0), t1),
    )
    times, z, cond, fresh = setting(4)
    for schedule in (Flow(), VP()):
        predict = lambda x, t: predict_x0_eps(RingTeacher(), schedule, "vp_v", x, t, **cond)  # noqa: E731, B023
        euler = sample_ode(predict, schedule, z, times + [0.0], "euler")
        close(dmd.sample(RingTeacher(), schedule, "vp_v", z, times, cond, "ode", fresh), euler)


def test_sampler_of_an_exact_student_has_the_data_s_law():
    """With exact conditional sampling at each call, alpha x0 + sigma fresh is a draw of x_t: moments of the states agree with the data."""
    m, c, n = 0.7, 0.4, 40000
    times, g = [1.0, 0.8, 0.4], torch.Generator().manual_seed(3)

    def student(
        x, t
    ):  # draws x0 ~ p(x0 | x_t), the N-step optimum, and returns the velocity that says so
        a, s = 1 - t[:, None], t[:, None]
        std = c * s / (a**2 * c**2 + s**2).sqrt()
        x0 = posterior_mean(x, m, c, a, s) + std * torch.randn(x.shape, generator=g, dtype=x.dtype)
        return (x - x0) / s

    x = dmd.sample(
        student,
        Flow(),
        "flow_v",
        normal(n, 1),
        times,
        {},
        "sde",
        lambda i: normal(n, 1, seed=50 + i),
    )
    assert float(x.mean()) == pytest.approx(m, abs=0.01) and float(x.std()) == pytest.approx(
        c, abs=0.01
    )


def test_gradient_stops_at_the_rollout():
    """The student's gradient at step k is that of its k-th call with the input held constant, not that of the whole chain."""
    times, z, cond, fresh = setting(3, torch.float32)
    student = perturbed(RingMLP(dim=32), std=0.2)

    def gradient(make_input):
        student.zero_grad()
        predict_x0(
            student, Flow(), "flow_v", make_input(), z.new_full((5,), times[2]), **cond
        ).square().mean().backward()
        return torch.cat(
            [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        ).clone()

    roll = lambda: dmd.rollout(student, Flow(), "flow_v", z, times, cond, "sde", fresh)  # noqa: E731
    constant = roll().detach()
    with torch.no_grad():
        simulated = roll()
    assert not simulated.requires_grad
    assert torch.equal(gradient(lambda: simulated), gradient(lambda: constant))
    assert not torch.allclose(gradient(lambda: constant), gradient(roll))


def test_sample_teacher_is_the_guided_ode():
    """sample_teacher follows uncond + k (cond - uncond) in velocity space, Heun or Euler, at twice the calls."""
    times, z, cond, _ = setting(6)
    ring, uncond = Counting(), {"label": torch.full((5,), 4)}
    got = dmd.sample_teacher(ring, Flow(), "flow_v", z, times + [0.0], cond, uncond, 2.0, "heun")
    assert len(ring.seen) == 2 * (2 * 6 - 1)

    def predict(x, t):
        v_c, v_u = (RingTeacher()(x, t, c["label"]) for c in (cond, uncond))
        return to_x0_eps(v_u + 2 * (v_c - v_u), "flow_v", x, 1 - t, t)

    close(got, sample_ode(predict, Flow(), z, times + [0.0], "heun"), 1e-9)


# ---- GAN ---------------------------------------------------------------------------------------------------------


def test_gan_losses_at_zero_logits():
    """Undecided logits cost 2 ln 2 and ln 2; each loss falls in the direction its player wants."""
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    close(dmd.discriminator_loss(zero, zero), 2 * math.log(2), 1e-12)
    close(dmd.generator_gan_loss(zero), math.log(2), 1e-12)
    assert (
        dmd.discriminator_loss(logit_real=one, logit_fake=-one)
        < dmd.discriminator_loss(zero, zero)
        < dmd.discriminator_loss(-one, one)
    )
    assert dmd.generator_gan_loss(one) < dmd.generator_gan_loss(zero)
    r, f = normal(3), normal(3, seed=1)  # cross-entropy with real = 1, fake = 0
    ce = F.binary_cross_entropy_with_logits
    (
        close(dmd.discriminator_loss(r, f), ce(r, one) + ce(f, zero)),
        close(dmd.generator_gan_loss(f), ce(f, one)),
    )


def gan_setting():
    student, fake = small_dit(1), small_dit(2)
    torch.manual_seed(0)
    head, cond = dmd.GanHead(32), {"label": torch.arange(4) % 3}
    noise = [normal(4, 1, 4, 4, seed=k, dtype=torch.float32) for k in range(4)]
    return student, fake, head, cond, noise, torch.linspace(0.2, 0.8, 4)


def test_discriminator_turn_trains_head_and_encoder_only():
    """L_D reaches the head and the fake's layers up to the middle block, nothing after it, and not the student."""
    student, fake, head, cond, (z, real, e1, e2), t = gan_setting()
    with torch.no_grad():
        x = predict_x0(student, Flow(), "flow_v", z, torch.ones(4), **cond)
    logits = [dmd.gan_logit(fake, head, Flow(), y, e, t, cond) for y, e in ((real, e1), (x, e2))]
    assert logits[0].shape == (4,)
    dmd.discriminator_loss(*logits).backward()
    trained = {n for n, p in fake.named_parameters() if p.grad is not None and p.grad.any()}
    after = tuple(f"blocks.{i}." for i in range(len(fake.blocks) // 2 + 1, len(fake.blocks))) + (
        "final",
        "skip",
    )
    assert trained == {n for n, _ in fake.named_parameters() if not n.startswith(after)}
    assert all(
        p.grad is None or not p.grad.any()
        for n, p in fake.named_parameters()
        if n.startswith(after)
    )
    assert all(p.grad.any() for p in head.parameters()) and not has_gradient(student)


def test_generator_turn_passes_through_the_frozen_fake():
    """With fake and head frozen the GAN loss still moves x, through the noising (a factor alpha), and leaves no gradient in either."""
    _, fake, head, cond, (x, _, eps, _), t = gan_setting()
    fake.requires_grad_(False), head.requires_grad_(False)
    x.requires_grad_(True)
    dmd.generator_gan_loss(dmd.gan_logit(fake, head, Flow(), x, eps, t, cond)).backward()
    assert (
        (x.grad.flatten(1).abs().amax(1) > 0).all()
        and not has_gradient(fake)
        and not has_gradient(head)
    )
    x_t = add_noise(Flow(), x.detach(), eps, t).requires_grad_(True)
    dmd.generator_gan_loss(head(fake(x_t, t, return_features=True, **cond))).backward()
    torch.testing.assert_close(x.grad, (1 - t)[:, None, None, None] * x_t.grad)


def test_gan_sees_noised_samples():
    """The logit is of x_t, real or fake alike: at t = 1 under flow it depends on the noise only."""
    _, fake, head, cond, (x, other, e1, _), _ = gan_setting()
    with torch.no_grad():
        one, half = torch.ones(4), torch.full((4,), 0.5)
        assert torch.equal(
            *(dmd.gan_logit(fake, head, Flow(), y, e1, one, cond) for y in (x, other))
        )
        assert not torch.allclose(
            *(dmd.gan_logit(fake, head, Flow(), y, e1, half, cond) for y in (x, other))
        )


# ---- the training loop -------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("R", [1, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fake_is_updated_R_times_per_student_update(monkeypatch, tmp_path, script, R, accumulation):
    """Each step is R fake updates then one student update, whatever the accumulation, and every fake update sees fresh samples."""
    diary = ring_run(
        monkeypatch,
        script,
        tmp_path,
        "--fake_update_ratio",
        str(R),
        "--gradient_accumulation_steps",
        str(accumulation),
    )
    assert diary.updates == ([("fake-score", "fake")] * R + [("student", "student")]) * 3
    assert len(diary.fake_samples) == 3 * R * accumulation
    assert len({tuple(x.flatten().tolist()) for x in diary.fake_samples}) == len(diary.fake_samples)


def test_matching_step_in_the_loop(monkeypatch, tmp_path):
    """Teacher and fake see the same x_t = a x + s eps at t in the shifted dm_range, the teacher guided, the fake not; the fake score
    itself is trained over all of shifted [0, 1]."""
    matched, teacher_calls, fake_times = [], [], []

    def on_guided(real, net, schedule, kind, x_t, t, cond, uncond, scale):
        teacher_calls.append((x_t, t, cond, uncond, scale))
        return real(net, schedule, kind, x_t, t, cond, uncond, scale)

    def on_gradient(real, x, x0_real, x0_fake):
        x_t, t, cond, uncond, scale = teacher_calls[-1]
        eps = (x_t - (1 - t)[:, None] * x) / t[:, None]
        fake = predict_x0(diary.fake, Flow(), "flow_v", x_t, t, **cond)
        velocity = [RingTeacher()(x_t, t, c["label"]) for c in (cond, uncond)]
        want = x_t - t[:, None] * (velocity[1] + 2.0 * (velocity[0] - velocity[1]))
        assert scale == 2.0 and (cond["label"] < 4).all() and (uncond["label"] == 4).all()
        torch.testing.assert_close(x0_fake, fake), torch.testing.assert_close(x0_real, want)
        matched.append((unshift(t, 3.0), eps.detach()))
        return real(x, x0_real, x0_fake)

    def on_fake_loss(real, fake, schedule, kind, x, eps, t, cond):
        fake_times.append(unshift(t, 3.0))
        return real(fake, schedule, kind, x, eps, t, cond)

    diary = Diary(monkeypatch, dmd)
    for name, spy in (
        ("guided_x0", on_guided),
        ("distribution_matching_gradient", on_gradient),
        ("fake_score_loss", on_fake_loss),
    ):
        diary.wrap(monkeypatch, dmd, name, spy)
    dmd.main(
        [
            "--teacher",
            "ring",
            "--output_dir",
            str(tmp_path),
            "--max_train_steps",
            "20",
            "--train_batch_size",
            "64",
            "--guidance_scale",
            "2",
            "--timestep_shift",
            "3",
            "--fake_update_ratio",
            "1",
            "--dm_range",
            "0.3",
            "0.6",
        ]
    )
    u, eps = (torch.cat(v) for v in zip(*matched))
    assert len(u) == 20 * 64 and 0.299 < u.min() < 0.31 and 0.59 < u.max() < 0.601
    assert eps.mean().abs() < 0.1 and abs(eps.std() - 1) < 0.1
    assert (
        torch.cat(fake_times).min() < 0.02
        and torch.cat(fake_times).max() > 0.98
        and abs(torch.cat(fake_times).mean() - 0.5) < 0.04
    )


def test_real_input_is_noised_data_with_its_own_label(monkeypatch, tmp_path):
    """The ablation --student_input real: past the first step the student starts from noised data, under that data's label."""
    student_inputs = []

    def on_predict(real, net, schedule, kind, x_t, t, label, **told):
        if net is diary.student and t[0] < 0.3:
            student_inputs.append((x_t, label))
        return real(net, schedule, kind, x_t, t, label=label, **told)

    diary = Diary(monkeypatch, dmd)
    real_predict = dmd.predict_x0
    monkeypatch.setattr(
        dmd, "predict_x0", lambda *args, **cond: on_predict(real_predict, *args, **cond)
    )
    dmd.main(
        [
            "--teacher",
            "ring",
            "--output_dir",
            str(tmp_path),
            "--max_train_steps",
            "12",
            "--train_batch_size",
            "32",
            "--student_steps",
            "8",
            "--student_input",
            "real",
            "--fake_update_ratio",
            "1",
        ]
    )
    assert {length for length, _ in diary.rollouts} == {0}
    x_t, label = (torch.cat(v) for v in zip(*student_inputs))
    nearest = torch.cdist(x_t.double(), RingTeacher().means).argmin(1) % 4
    assert (nearest == label).double().mean() > 0.7  # chance is 0.25


def expected_student_loss(nets, gan=0.0, regression=0.0, no_fake=False, folder=None):
    """The student's loss of step 0 written out once more from the draws (its gradient is what counts)."""
    draw = Draws(0, 0, "student", range(8))
    z, eps, label = draw.normal("z", (2,)), draw.normal("eps", (2,)), draw.integer("cond", 4)
    t = draw.spread("u", 0.02, 0.98)
    x = z - nets["student"](z, torch.ones(8), label)
    x_t = (1 - t[:, None]) * x + t[:, None] * eps
    real = x_t - t[:, None] * RingTeacher()(x_t, t, label)
    fake = x if no_fake else x_t - t[:, None] * nets["fake"](x_t, t, label)
    g = ((fake - real) / (x - real).abs().mean(1, keepdim=True)).detach()
    loss = (g * x).sum() / x.numel()
    if gan:
        t, eps = draw.spread("u_gan")[:, None], draw.normal("eps_gan", (2,))
        features = nets["fake"]((1 - t) * x + t * eps, t[:, 0], label, return_features=True)
        loss = loss + gan * F.softplus(-nets["head"](features)).mean()
    if regression:
        pairs = load_tensors(str(folder / "state" / "pairs.safetensors"))
        i = draw.integer("pair", 16)
        y = pairs["z"][i] - nets["student"](pairs["z"][i], torch.ones(8), pairs["index"][i])
        loss = loss + regression * (y - pairs["y"][i]).square().mean()
    return loss


@pytest.mark.parametrize(
    "flags, terms",
    [
        ([], {}),
        (["--gan_weight", "0.3"], {"gan": 0.3}),
        (["--no_fake_score"], {"no_fake": True}),
        (
            ["--regression_weight", "0.25", "--regression_pairs", "16", "--teacher_steps", "2"],
            {"regression": 0.25},
        ),
    ],
)
def test_student_gradient_in_the_loop(monkeypatch, tmp_path, flags, terms):
    """What reaches the student's weights in a real step: matching, GAN, regression and the ablation, each with its own draws, labels and sign."""
    diary = one_step(monkeypatch, dmd, tmp_path, *flags)
    nets, grads = diary.at["student"]
    want = torch.autograd.grad(
        expected_student_loss(nets, folder=tmp_path, **terms), list(nets["student"].parameters())
    )
    for a, b in zip(grads["student"], want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    if "regression" in terms:  # the pairs are the teacher's ODE: two Heun steps from z
        pairs, teacher = load_tensors(str(tmp_path / "state" / "pairs.safetensors")), RingTeacher()
        x = pairs["z"]
        for t, s in ((1.0, 0.5), (0.5, 0.0)):
            v = teacher(x, torch.full((16,), t), pairs["index"])
            euler = x + (s - t) * v
            x = (
                euler
                if s == 0
                else x + (s - t) / 2 * (v + teacher(euler, torch.full((16,), s), pairs["index"]))
            )
        torch.testing.assert_close(pairs["y"], x, rtol=1e-4, atol=1e-5)


@both
def test_fake_and_discriminator_gradient_in_the_loop(monkeypatch, tmp_path, script):
    """The fake's turn: denoising of student samples plus w_D times the discriminator, real data under its own labels, three noise levels."""
    diary = one_step(
        monkeypatch,
        script,
        tmp_path,
        "--gan_weight",
        "0.3",
        "--gan_weight_d",
        "0.2",
        "--student_steps",
        "1",
        "--seed",
        "1",
    )
    nets, grads = diary.at["fake-score"]
    draw = Draws(1, 0, 0, range(8))
    z, label = draw.normal("z", (2,)), draw.integer("cond", 4)
    x = (z - nets["student"](z, torch.ones(8), label)).detach()
    t, eps = draw.spread("u")[:, None], draw.normal("eps", (2,))
    loss = (nets["fake"]((1 - t) * x + t * eps, t[:, 0], label) - (eps - x)).square().mean()
    data, data_label = load_world("ring").data(20000, 1000004)
    i = draw.integer("real_gan", 20000)
    for name, x0, y, sign in (("fake", x, label, 1), ("real", data[i], data_label[i], -1)):
        t, eps = draw.spread(f"u_gan_{name}")[:, None], draw.normal(f"eps_gan_{name}", (2,))
        features = nets["fake"]((1 - t) * x0 + t * eps, t[:, 0], y, return_features=True)
        loss = loss + 0.2 * F.softplus(sign * nets["head"](features)).mean()
    parameters = [*nets["fake"].parameters(), *nets["head"].parameters()]
    for a, b in zip([*grads["fake"], *grads["head"]], torch.autograd.grad(loss, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@each
def test_ema_and_rates_in_the_loop(monkeypatch, tmp_path, script):
    """student/ holds the EMA, warmed up as (1 + n) / (4 + n); both rates warm up and fall, each its own."""
    rates, weights = {"student": [], "fake-score": []}, []

    def on_update(real, optimizers, max_norm, what, loss):
        rates[what].append(optimizers[0].param_groups[0]["lr"])
        norm = real(optimizers, max_norm, what, loss)
        if what == "student":
            weights.append([p.detach().clone() for p in diary.student.parameters()])
        return norm

    diary = Diary(monkeypatch, script)
    diary.wrap(monkeypatch, script, "update", on_update)
    script.main(
        [
            "--teacher",
            "ring",
            "--output_dir",
            str(tmp_path),
            "--max_train_steps",
            "4",
            "--train_batch_size",
            "8",
            "--fake_update_ratio",
            "1",
            "--lr_warmup_steps",
            "2",
            "--lr_decay_share",
            "0.5",
            "--learning_rate",
            "1e-2",
            "--learning_rate_fake",
            "3e-2",
            "--ema_decay",
            "0.45",
            "--student_steps",
            "1",
        ]
    )
    assert rates["student"] == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3]) and rates[
        "fake-score"
    ] == pytest.approx([1.5e-2, 3e-2, 3e-2, 1.5e-2])
    ema = [p.detach().clone() for p in ring_network(0).parameters()]
    for decay, now in zip((0.25, 0.4, 0.45, 0.45), weights):
        ema = [decay * a + (1 - decay) * b for a, b in zip(ema, now)]
    saved = load_network(str(tmp_path / "student"))[0]
    for a, b in zip(saved.parameters(), ema):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each
def test_report_of_a_world(monkeypatch, tmp_path, script):
    """report.json's rows: calls counted with guidance, fd_excess against the data row, fd_teacher against the teacher's samples."""
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    script.main(
        [
            "--teacher",
            "ring",
            "--output_dir",
            str(tmp_path),
            "--max_train_steps",
            "2",
            "--train_batch_size",
            "8",
            "--teacher_steps",
            "4",
            "--guidance_scale",
            "2",
            "--student_steps",
            "2",
        ]
    )
    report = load_json(str(tmp_path / "report.json"))
    rows = {r["name"]: r for r in report["results"]}
    assert {n: r["nfe"] for n, r in rows.items()} == {
        "data": 0,
        "teacher": 14,
        "teacher_same_steps": 4,
        "student": 2,
    }
    assert (
        all(r["fd_excess"] == pytest.approx(r["fd"] - rows["data"]["fd"]) for r in rows.values())
        and rows["data"]["fd_excess"] == 0
    )
    assert (
        rows["student"]["fd_teacher"] > 10 and rows["teacher_same_steps"]["fd_teacher"] > 10
    )  # untrained, and two Euler steps
    assert (
        rows["teacher"]["fd"] < rows["teacher_same_steps"]["fd"]
        and report["steps"] == 2
        and report["seed"] == 0
    )
    assert {"patch_swd", "accuracy", "diversity"} <= set(rows["student"])


def test_no_fake_score_never_updates_the_fake(monkeypatch, tmp_path):
    """The ablation trains the student alone; the fake keeps its initial weights."""
    diary = ring_run(monkeypatch, dmd, tmp_path, "--no_fake_score")
    assert diary.updates == [("student", "student")] * 3
    assert all(
        torch.equal(a, b) for a, b in zip(diary.fake.parameters(), ring_network(0).parameters())
    )


@each
def test_accumulation_is_a_larger_batch(monkeypatch, tmp_path, script):
    """Two micro-batches of 8 are one batch of 16: the same rows are drawn and the same weights result."""
    flags = [] if script is tdm else ["--gan_weight", "0.1"]
    one = ring_run(monkeypatch, script, tmp_path / "one", *flags, batch=16)
    monkeypatch.undo()
    two = ring_run(
        monkeypatch, script, tmp_path / "two", *flags, "--gradient_accumulation_steps", "2"
    )
    assert one.norms == pytest.approx(
        two.norms, rel=1e-3
    )  # before clipping: Adam alone would forgive a wrong scale
    assert any(
        not torch.equal(a, b)
        for a, b in zip(one.student.hidden.parameters(), ring_network(0).hidden.parameters())
    )
    for a, b in zip(
        [*one.student.parameters(), *one.fake.parameters()],
        [*two.student.parameters(), *two.fake.parameters()],
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        for name in a:
            if name.startswith(("loss", "cos")) or name in ("g", "mean", "std"):
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3, abs=1e-5), name


@both
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_multi_step_training_simulates_the_student(monkeypatch, tmp_path, script, precision):
    """N = 3: every training input is a rollout of 0 to 2 steps without gradient, one length for the batch, and the call after it
    sends gradients to every weight (under autocast too, where weights cast during the rollout must not be reused)."""
    diary = ring_run(
        monkeypatch,
        script,
        tmp_path,
        "--student_steps",
        "3",
        "--mixed_precision",
        precision,
        "--fake_update_ratio",
        "1",
        steps=6,
    )
    lengths, gradient_on = zip(*diary.rollouts)
    assert len(lengths) == 12 and set(lengths) == {0, 1, 2} and not any(gradient_on)
    assert all(
        g["student_all"] for (what, _), g in zip(diary.updates, diary.grads) if what == "student"
    )


@both
@pytest.mark.parametrize("shared", [False, True])
def test_fake_is_told_the_step_of_its_samples(monkeypatch, tmp_path, script, shared):
    """N = 3: the fake starts as the teacher's function whatever it is told, then gets the number of rollout steps behind its samples, in
    all of its calls; with --shared_fake nothing. The student and what is saved of it know of no step."""
    told, start = [], {}

    def on_fake_loss(real, fake, schedule, kind, x, eps, t, cond):
        if not start:
            start.update(fake=copy.deepcopy(fake), student=copy.deepcopy(diary.student))
        told.append((len(diary.rollouts) - 1, cond.get("steps")))
        return real(fake, schedule, kind, x, eps, t, cond)

    def on_predict(net, schedule, kind, x_t, t, **cond):
        if net is diary.fake:
            told.append((len(diary.rollouts) - 1, cond.get("steps")))
        assert net is diary.fake or "steps" not in cond
        return real_predict(net, schedule, kind, x_t, t, **cond)

    diary, real_predict = Diary(monkeypatch, script), script.predict_x0
    diary.wrap(monkeypatch, script, "fake_score_loss", on_fake_loss)
    monkeypatch.setattr(script, "predict_x0", on_predict)
    script.main(
        [
            "--teacher",
            "ring",
            "--output_dir",
            str(tmp_path),
            "--max_train_steps",
            "8",
            "--train_batch_size",
            "4",
            "--student_steps",
            "3",
            "--fake_update_ratio",
            "1",
            *(["--shared_fake"] if shared else []),
        ]
    )
    assert len(told) == 16 and {length for length, _ in diary.rollouts} == {0, 1, 2}
    for i, steps in told:
        assert (
            steps is None
            if shared
            else (steps == diary.rollouts[i][0]).all() and steps.shape == (4,)
        )
    x, t, label = normal(5, 2, dtype=torch.float32), torch.rand(5), torch.arange(5) % 4
    extra = {} if shared else {"steps": torch.tensor([0.0, 1, 2, 0, 1])}
    assert torch.equal(start["fake"](x, t, label, **extra), start["student"](x, t, label))
    assert shared or diary.fake.steps.weight.abs().max() > 0
    assert load_network(str(tmp_path / "student"))[1]["steps_cond"] is False


@both
def test_stop_gradients_in_the_real_loop(monkeypatch, tmp_path, script):
    """With the GAN on, a fake turn leaves no gradient in the student, a student turn none in fake or head, and neither any in the
    teacher, whose weights end bit-equal to the file."""
    teacher = small_dit(depth=2)
    save_network(teacher, network_config(teacher), str(tmp_path / "teacher"))
    save_tensors(
        {"x0": normal(20, 1, 4, 4, dtype=torch.float32), "cond.label": torch.arange(20) % 3},
        str(tmp_path / "data.safetensors"),
    )
    diary = Diary(monkeypatch, script)
    script.main(
        [
            "--teacher",
            str(tmp_path / "teacher"),
            "--data",
            str(tmp_path / "data.safetensors"),
            "--output_dir",
            str(tmp_path / "run"),
            "--max_train_steps",
            "2",
            "--train_batch_size",
            "4",
            "--gan_weight",
            "0.1",
            "--checkpointing_steps",
            "1000",
        ]
    )
    assert len(diary.updates) == 6
    for (what, _), has in zip(diary.updates, diary.grads):
        fake_turn = what == "fake-score"
        assert (has["fake"], has["head"], has["student"], has["teacher"]) == (
            fake_turn,
            fake_turn,
            not fake_turn,
            False,
        )
    assert not any(p.requires_grad for p in diary.teacher.net.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(diary.teacher.net.parameters(), teacher.parameters())
    )
    for net in (diary.student, diary.fake):
        assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), teacher.parameters()))


def test_regression_pairs_are_teacher_samples(tmp_path):
    """DMD v1's (z, y): y is the teacher's ODE sample from z, in whatever batches, and a second call reads the file."""
    path = str(tmp_path / "pairs.safetensors")
    args = dmd.parse_args(
        [
            "--teacher",
            "ring",
            "--regression_pairs",
            "10",
            "--teacher_steps",
            "4",
            "--train_batch_size",
            "4",
        ]
    )
    teacher = load_teacher("ring", dmd.WORLDS)
    conditions = Conditions(args, RingMLP())
    z, y, index = dmd.make_regression_pairs(
        args, teacher, conditions, (2,), torch.device("cpu"), path
    )
    want = dmd.sample_teacher(
        teacher.net, Flow(), "flow_v", z, step_grid(4), *conditions.pick(index, "cpu"), 1.0, "heun"
    )
    torch.testing.assert_close(y, want)
    again = dmd.make_regression_pairs(args, None, conditions, (2,), None, path)
    assert all(torch.equal(a, b) for a, b in zip(again, (z, y, index)))


def test_update_clips_and_refuses_what_is_not_finite():
    """update clips to max_grad_norm, returns the norm before clipping, and stops on NaN before any weight moves."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.tensor([3.0, 4.0])
    assert dmd.update([optimizer], 1.0, "student", torch.tensor(0.0)) == pytest.approx(5)
    torch.testing.assert_close(p.data, torch.tensor([0.4, 1.2]))
    assert p.grad is None
    for loss, grad in ((float("nan"), 1.0), (0.0, float("inf"))):
        p.grad = torch.tensor([grad, 0.0])
        with pytest.raises(TrainingError, match="not finite"):
            dmd.update([optimizer], 1.0, "student", torch.tensor(loss))
        torch.testing.assert_close(p.data, torch.tensor([0.4, 1.2]))


# ---- draws -------------------------------------------------------------------------------------------------------


def test_draws_belong_to_rows():
    """Row i's numbers depend on (seed, step, inner, name, i) alone: any split, order or number of ranks gives the same."""
    whole = Draws(5, 3, 0, range(8))
    for rows in ([3], [7, 0, 3], range(4, 8)):
        part = Draws(5, 3, 0, rows)
        i = torch.tensor(list(rows))
        assert torch.equal(part.normal("z", (3, 7)), whole.normal("z", (3, 7))[i])
        assert torch.equal(part.uniform("u", 0.2, 0.4), whole.uniform("u", 0.2, 0.4)[i])
        assert torch.equal(part.spread("t", 0.2, 0.4), whole.spread("t", 0.2, 0.4)[i])
        assert torch.equal(part.integer("k", 1000), whole.integer("k", 1000)[i])
    assert torch.equal(whole.normal("z", (2,)), whole.normal("z", (2,)))  # no hidden state


def test_draws_differ_in_every_part_of_their_key():
    """Another seed, step, inner update or name is another stream."""
    base = Draws(5, 3, 0, range(4)).normal("z", (4,))
    others = [
        Draws(6, 3, 0, range(4)),
        Draws(5, 4, 0, range(4)),
        Draws(5, 3, 1, range(4)),
        Draws(5, 3, "student", range(4)),
    ]
    for x in [d.normal("z", (4,)) for d in others] + [Draws(5, 3, 0, range(4)).normal("eps", (4,))]:
        assert (x != base).all()


def test_draws_are_equal_across_processes():
    """Another process with another PYTHONHASHSEED draws the same numbers."""
    code = "from models.io import Draws; d = Draws(5, 'pairs', 0, range(3)); print(d.normal('z', (2,)).tolist(), d.agreed('k', 10**6))"
    env = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout
    d = Draws(5, "pairs", 0, range(3))
    assert out.strip() == f"{d.normal('z', (2,)).tolist()} {d.agreed('k', 10**6)}"


def test_draws_have_the_right_law():
    """Across 4,000 rows: normal moments, uniform quantiles, integers alike, and no correlation between neighbouring rows, names or steps."""
    n = 4000
    draw = Draws(0, 1, 0, range(n))
    x, u, k = draw.normal("z", (3,)), draw.uniform("u"), draw.integer("k", 10)
    assert x.mean(0).abs().max() < 4 / n**0.5 and (x.var(0) - 1).abs().max() < 4 * (2 / n) ** 0.5
    assert (
        u.sort().values - (torch.arange(n) + 0.5) / n
    ).abs().max() < 1.95 / n**0.5  # Kolmogorov-Smirnov at 0.1 %
    assert (
        0 <= u.min()
        and u.max() < 1
        and (k.bincount(minlength=10) - n / 10).abs().max() < 4 * (n * 0.09) ** 0.5
    )
    assert len(x[:, 0].unique()) > n - 5
    neighbour = [x.roll(1, 0), Draws(0, 2, 0, range(n)).normal("z", (3,)), draw.normal("eps", (3,))]
    for y in neighbour:
        assert ((x.T @ y) / n).abs().max() < 4 / n**0.5
    assert (x.T @ x / n - torch.eye(3)).triu(1).abs().max() < 4 / n**0.5


def test_spread_is_uniform_per_row_and_even_over_a_batch():
    """Over 4,000 steps any one row is uniform, whatever the step before drew; within any batch no gap is wider than three times the mean."""
    n = 4000
    u = torch.stack(
        [Draws(0, step, 0, [0, 5, 63]).spread("u", 0.02, 0.98) for step in range(n)]
    )  # (n, 3)
    assert u.min() >= 0.02 and u.max() <= 0.98
    quantile = 0.02 + 0.96 * (torch.arange(n) + 0.5) / n
    assert (u.sort(0).values - quantile[:, None]).abs().max() < 1.95 / n**0.5
    steps = (u[1:, 0] - 0.5) * (u[:-1, 0] - 0.5)
    assert steps.mean().abs() < 4 * (0.96**2 / 12) / n**0.5
    for B in (4, 64, 96):
        for step in range(20):
            batch = Draws(1, step, "student", range(7 * B, 8 * B)).spread("u").sort().values
            gaps = torch.cat([batch.diff(), batch[:1] + 1 - batch[-1:]])
            assert gaps.max() < 3 / B, (B, step)


def test_agreed_ignores_rows():
    """One integer for all ranks: whatever the rows, and spread over its range across steps."""
    assert len({Draws(0, 7, 0, rows).agreed("k", 1000) for rows in ([0], [5, 6], range(64))}) == 1
    counts = torch.tensor([Draws(0, step, 0, [0]).agreed("k", 4) for step in range(2000)]).bincount(
        minlength=4
    )
    assert (counts - 500).abs().max() < 4 * (2000 * 3 / 16) ** 0.5
