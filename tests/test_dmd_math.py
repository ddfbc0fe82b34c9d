"""dmd.py against the papers' formulas: loss and gradient, fake score, GAN, rollout, update order.

What decoupled_dmd.py and tdm.py have in common with it is tested here for all of them.
"""

import copy
import inspect
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
    quiet,
    read_log,
    ring_flags,
    ring_network,
    ring_run,
)

import dmd
import tdm
from models.diffusion import (
    VP,
    Diffusion,
    Flow,
    add_noise,
    from_x0_eps,
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
from models.plumbing.run import Run
from models.plumbing.teachers import start_teacher
from models.worlds import load_world
from models.worlds.ring import RingTeacher

KINDS = ("x0", "eps", "flow_v", "vp_v")
FLOW_X0, FLOW_V = Diffusion(Flow(), "x0"), Diffusion(Flow(), "flow_v")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_dit(seed=0, depth=4):
    torch.manual_seed(seed)
    net = DiT(size=(4, 4), patch=(2, 2), channels=1, dim=32, depth=depth, num_classes=3)
    return perturbed(net, seed, std=0.2)


def close(a, b, tolerance=1e-10):
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def mean_error(x, x0):
    """mean |x - x0| of each sample, ready to divide by.  (B, ...) -> (B, 1, ...)."""
    return (x - x0).abs().mean(tuple(range(1, x.dim())), keepdim=True)


def network_of(x0, diffusion):
    """A network of the diffusion's kind whose output, read as x0, is x0(x_t, t, **cond)."""

    def net(x_t, t, **cond):
        mu, alpha, sigma = (
            x0(x_t, t, **cond),
            diffusion.schedule.alpha(t),
            diffusion.schedule.sigma(t),
        )
        eps = to_x0_eps(mu, "x0", x_t, alpha, sigma)[1]
        return from_x0_eps(diffusion.prediction, mu, eps, alpha, sigma)

    return net


def seeing(mu, diffusion=FLOW_X0):
    """A network that sees mu (B, ...) as the x0 of whatever it is given."""
    return network_of(lambda x_t, t, **cond: mu, diffusion)


def levels(n):
    return torch.linspace(0.1, 0.9, n, dtype=torch.float64)


def loss_of(x, mu_real, mu_fake, diffusion=FLOW_X0):
    """dmd_loss of networks that see mu_real and mu_fake, without guidance.  -> loss, g."""
    nets = seeing(mu_real, diffusion), seeing(mu_fake, diffusion)
    eps = normal(*x.shape, seed=99)
    return dmd.dmd_loss(x, *nets, diffusion, eps, levels(9)[: len(x)], {}, {}, {}, 1)[:2]


def gradient_of(x, mu_real, mu_fake):
    """g of dmd_loss."""
    return loss_of(x, mu_real, mu_fake)[1]


# ---- the matching loss ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [Flow(), VP()], ids=["flow", "vp"])
def test_matching_loss_is_algorithm_2(schedule, kind):
    """d/dx of the loss is g / numel(x) and its value 0.5 mean g^2 (2311.18828, Alg. 2).

    g = (mu_fake - mu_real) / mean|x - mu_real|, whatever the networks predict.
    """
    x, mu_r, mu_f = (normal(5, 3, 4, seed=k) for k in range(3))
    x.requires_grad_(True)
    loss, g = loss_of(x, mu_r, mu_f, Diffusion(schedule, kind))
    close(g, (mu_f - mu_r) / mean_error(x.detach(), mu_r), 1e-9)
    close(torch.autograd.grad(loss, x)[0], g / g.numel(), 1e-12)
    close(loss.detach(), 0.5 * g.square().mean(), 1e-12)


def test_loss_without_the_fake_score_is_the_same_with_mu_fake_at_x():
    """--no_fake_score, value and gradient; only the teacher is called."""
    x, mu_r, eps = (normal(5, 3, 4, seed=k) for k in (0, 1, 99))
    x.requires_grad_(True)
    loss, g, *_ = dmd.dmd_loss_without_fake(x, seeing(mu_r), FLOW_X0, eps, levels(9)[:5], {}, {}, 1)
    close(g, (x.detach() - mu_r) / mean_error(x.detach(), mu_r), 1e-12)
    close(torch.autograd.grad(loss, x)[0], g / g.numel(), 1e-12)
    want, g_want = loss_of(x, mu_r, x.detach())
    assert torch.equal(loss, want) and torch.equal(g, g_want) and not g.requires_grad


WRONG_LOSSES = {
    "no half": lambda x, g: F.mse_loss(x, (x - g).detach()),
    "sum": lambda x, g: 0.5 * F.mse_loss(x, (x - g).detach(), reduction="sum"),
    "no stop-gradient": lambda x, g: 0.5 * F.mse_loss(x, x - g),
    "sign": lambda x, g: 0.5 * F.mse_loss(x, (x + g).detach()),
}


@pytest.mark.parametrize("wrong", WRONG_LOSSES.values(), ids=WRONG_LOSSES)
def test_matching_loss_identity_tells_wrong_variants(wrong):
    """The identity above is sharp: the usual mistakes violate it."""
    x, mu_r, mu_f = (normal(5, 3, 4, seed=k) for k in range(3))
    g = gradient_of(x, mu_r, mu_f)
    x.requires_grad_(True)
    got = torch.autograd.grad(wrong(x, g), x)[0]
    assert not torch.allclose(got, g / g.numel(), rtol=1e-3)


# ---- the gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [Flow(), VP()], ids=["flow", "vp"])
def test_gradient_is_equation_7_with_equation_8(schedule):
    """w_t a_t (s_fake - s_real), with w_t = (s^2 / a) C S / ||mu_real - x||_1, is a_t times g.

    a_t is the factor that both papers' pseudo-code drops. The networks predict scores.
    """
    x, score_r, score_f, eps = (normal(4, 3, 5, seed=k) for k in range(4))
    t, diffusion = (
        torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64),
        Diffusion(schedule, "score"),
    )
    a, s = schedule.alpha(t), schedule.sigma(t)
    nets = (lambda x_t, t: score_r), (lambda x_t, t: score_f)
    _, g, *_ = dmd.dmd_loss(x, *nets, diffusion, eps, t, {}, {}, {}, 1)
    mu_r = to_x0_eps(score_r, "score", add_noise(schedule, x, eps, t), a, s)[0]
    w = (s**2 / a) * 15 / (mu_r - x).abs().sum((1, 2))
    close(a[:, None, None] * g, (w * a)[:, None, None] * (score_f - score_r), 1e-9)


def test_normaliser_is_per_sample():
    """Changing sample i leaves the gradient of sample j bit-equal; a batch's mean does not pass."""

    def whole_batch(x, mu_real, mu_fake):
        return (mu_fake - mu_real) / (x - mu_real).abs().mean()

    x, mu_r, mu_f, eps = (normal(4, 3, 5, seed=k) for k in range(4))
    others, moved, t = [0, 2, 3], x.clone(), levels(4)
    moved[1] *= 100

    def gradient(x, rows):
        nets = seeing(mu_r[rows]), seeing(mu_f[rows])
        return dmd.dmd_loss(x[rows], *nets, FLOW_X0, eps[rows], t[rows], {}, {}, {}, 1)[1]

    kept = gradient(x, slice(None))[others]
    assert torch.equal(gradient(moved, slice(None))[others], kept)
    assert torch.equal(gradient(x, others), kept)
    wrong = [whole_batch(v, mu_r, mu_f)[others] for v in (moved, x)]
    assert not torch.allclose(*wrong)


def test_gradient_is_dimensionless():
    """Scaling x, mu_real and mu_fake together leaves the gradient unchanged, also per sample."""
    x, mu_r, mu_f = (normal(4, 3, 5, seed=k) for k in range(3))
    k = torch.tensor([0.01, 1.0, 7.0, 1000.0], dtype=torch.float64)[:, None, None]
    close(gradient_of(k * x, k * mu_r, k * mu_f), gradient_of(x, mu_r, mu_f), 1e-12)


def test_normaliser_is_the_distance_of_x_not_of_x_t():
    """The mean of |g (x - mu_real) / (mu_fake - mu_real)| is 1 with the clean x, not with x_t."""
    x, mu_r, mu_f, eps = (normal(2, 3, 5, seed=k) for k in range(4))
    t, one = torch.tensor([0.5, 0.9], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    _, g, *_ = dmd.dmd_loss(x, seeing(mu_r), seeing(mu_f), FLOW_X0, eps, t, {}, {}, {}, 1)
    weight = (g / (mu_f - mu_r)).flatten(1)[:, 0]
    x_t = add_noise(Flow(), x, eps, t)
    close(weight * (x - mu_r).abs().flatten(1).mean(1), one)
    assert not torch.allclose(weight * (x_t - mu_r).abs().flatten(1).mean(1), one, rtol=0.05)


def test_gradient_is_a_finite_constant():
    """No graph is attached, and a teacher that agrees with x exactly does not divide by zero."""
    x = normal(2, 3).requires_grad_(True)
    for loss, g in (
        loss_of(x, x * 2, x * 3),
        dmd.dmd_loss_without_fake(x, seeing(x * 2), FLOW_X0, x, levels(2), {}, {}, 1)[:2],
    ):
        assert not g.requires_grad and g.grad_fn is None
        close(torch.autograd.grad(loss, x)[0], g / 6, 1e-12)  # nothing through the x of mu
    assert torch.equal(gradient_of(x, x, x), torch.zeros(2, 3, dtype=torch.float64))
    assert gradient_of(x, x, x + 1).isfinite().all()


@pytest.mark.parametrize("guidance, zero", [(1, True), (1.5, False)])
def test_no_gradient_when_fake_equals_teacher(guidance, zero):
    """At the start fake == teacher: the student's gradient is exactly 0 without guidance alone."""
    teacher = small_dit().requires_grad_(False)
    student, fake = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher)
    z, eps = (normal(6, 1, 4, 4, seed=k, dtype=torch.float32) for k in range(2))
    cond, uncond = {"label": torch.arange(6) % 3}, {"label": torch.full((6,), 3)}
    x = FLOW_V.x0(student, z, 1.0, **cond)
    at_t = FLOW_V, eps, torch.linspace(0.1, 0.9, 6), cond, uncond
    loss, g, *_ = dmd.dmd_loss(x, teacher, fake, *at_t, cond, guidance)
    loss.backward()
    assert not has_gradient(fake) and not has_gradient(teacher)
    largest = max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None)
    if zero:
        assert not g.any() and largest == 0
    else:
        assert g.abs().max() > 1e-3 and largest > 1e-6


@pytest.mark.parametrize("scale", [1, 4.0])
def test_teacher_is_guided_and_the_fake_is_not(scale):
    """Who is called in dmd_loss, in order, at which x_t and t, and under which condition."""
    calls = []

    def recorded(who, slope):
        def net(x_t, t, label, steps=None):
            calls.append((who, x_t, t, label, steps))
            return x_t * (slope + label.double()[:, None])

        return net

    x, eps, t = normal(3, 2), normal(3, 2, seed=1), levels(3)
    cond, uncond = {"label": torch.ones(3)}, {"label": torch.zeros(3)}
    fake_cond = {"label": torch.full((3,), 2.0), "steps": torch.full((3,), 7.0)}
    nets = recorded("teacher", 0.5), recorded("fake", 0.1)
    _, g, *_ = dmd.dmd_loss(x, *nets, FLOW_X0, eps, t, cond, uncond, fake_cond, scale)
    x_t = add_noise(Flow(), x, eps, t)
    assert [who for who, *_ in calls] == ["teacher"] * (1 if scale == 1 else 2) + ["fake"]
    assert all(torch.equal(c[1], x_t) and torch.equal(c[2], t) for c in calls)
    assert [float(c[3][0]) for c in calls] == ([1.0, 2.0] if scale == 1 else [1.0, 0.0, 2.0])
    assert all(c[4] is None for c in calls[:-1]) and (calls[-1][4] == 7).all()
    mu_real = 0.5 * x_t + scale * (1.5 * x_t - 0.5 * x_t)
    close(g, (2.1 * x_t - mu_real) / mean_error(x, mu_real))


def test_guided_x0_calls_and_values():
    """Guidance 1 is the conditional prediction in one call, else uncond + k (cond - uncond)."""
    calls = []

    def net(x, t, label):
        calls.append(label[0].item())
        return x * label[:, None]

    x, t = normal(3, 2), torch.full((3,), 0.5, dtype=torch.float64)
    cond, uncond = {"label": torch.ones(3)}, {"label": torch.zeros(3)}
    plain = FLOW_V.guided_x0(net, x, t, cond, uncond, 1)
    assert calls == [1.0] and torch.equal(plain, x - 0.5 * x)
    guided = FLOW_V.guided_x0(net, x, t, cond, uncond, 4.0)
    assert calls == [1.0, 1.0, 0.0]
    close(guided, x + 4 * (plain - x))


# ---- Gaussians, where everything is known --------------------------------------------------------


def posterior_mean(x_t, m, c, a, s):
    """E[x0 | x_t] for data N(m, c^2)."""
    return m + a * c**2 / (a**2 * c**2 + s**2) * (x_t - a * m)


class OneLevel:
    """A noise schedule with alpha = .8 and sigma = .5 at all times."""

    def alpha(self, t):
        return torch.full_like(t, 0.8)

    def sigma(self, t):
        return torch.full_like(t, 0.5)


def test_score_difference_is_the_kl_gradient_of_gaussians():
    """E[a (s_fake - s_real) dG/d(m, c)] is a KL's gradient in (m, c), .56228, -.42448 here.

    The KL is that of N(am, a^2c^2+s^2) from N(am0, a^2c0^2+s^2). The score difference is read off
    dmd_loss's g.
    """
    values = (0.7, 0.6, -0.2, 1.1, 0.8, 0.5)
    m, c, m0, c0, a, s = (torch.tensor(v, dtype=torch.float64) for v in values)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(20))
    weights = weights / weights.sum()
    z, eps = (v.reshape(400, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    w = (weights[:, None] * weights).reshape(400, 1)
    x, t = m + c * z, torch.zeros(400, dtype=torch.float64)
    x_t = a * x + s * eps
    teacher, fake = (
        lambda x_t, t, m=m, c=c: posterior_mean(x_t, m, c, a, s) for m, c in ((m0, c0), (m, c))
    )
    mu_f, mu_r = fake(x_t, t), teacher(x_t, t)
    rows = (
        torch.full((400,), 0.8, dtype=torch.float64),
        torch.full((400,), 0.5, dtype=torch.float64),
    )
    score_f, score_r = (
        from_x0_eps("score", *to_x0_eps(mu, "x0", x_t, *rows), *rows) for mu in (mu_f, mu_r)
    )
    at_t = Diffusion(OneLevel(), "x0"), eps, t
    _, g, *_ = dmd.dmd_loss(x, teacher, fake, *at_t, {}, {}, {}, 1)
    close(score_f - score_r, a * (mu_f - mu_r) / s**2)
    close(a / s**2 * g * mean_error(x, mu_r), score_f - score_r)
    difference = a / s**2 * g * mean_error(x, mu_r)
    by_score = [float((w * a * difference * dG).sum()) for dG in (1, z)]

    mc = torch.stack([m, c]).requires_grad_(True)
    v1, v2 = a**2 * mc[1] ** 2 + s**2, a**2 * c0**2 + s**2
    kl = 0.5 * (torch.log(v2 / v1) + (v1 + (a * mc[0] - a * m0) ** 2) / v2 - 1)
    close(by_score, torch.autograd.grad(kl, mc)[0])
    assert by_score == pytest.approx([0.56228, -0.42448], abs=5e-6)


def unit_nodes(n):
    """n equally weighted nodes: the normal's quantiles, with exactly mean 0 and variance 1."""
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return z / z.square().mean().sqrt()


@pytest.mark.parametrize("with_fake_score", [True, False])
def test_without_the_fake_score_the_student_collapses(with_fake_score):
    """G(z) = m + c z descends the script's losses.

    With the exact fake score c settles at the data's std, with mu_fake = x it decays to 0.
    """
    m0, c0, nodes = -0.2, 1.1, unit_nodes(40)
    z, eps = (v.reshape(1, -1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)  # three levels, 1600 nodes at each
    at_t = FLOW_X0, eps.expand(3, -1), t, {}, {}
    mc = torch.tensor([0.7, 0.6], dtype=torch.float64, requires_grad=True)

    def network(m, c):
        return lambda x_t, t: posterior_mean(x_t, m, c, 1 - t[:, None], t[:, None])

    for _ in range(400):
        m, c = mc
        x = (m + c * z).expand(3, -1)
        if with_fake_score:
            loss, *_ = dmd.dmd_loss(x, network(m0, c0), network(m, c), *at_t, {}, 1)
        else:
            loss, *_ = dmd.dmd_loss_without_fake(x, network(m0, c0), *at_t, 1)
        mc.data -= 0.1 * torch.autograd.grad(loss, mc)[0]
    m, c = mc.tolist()
    assert m == pytest.approx(m0, abs=1e-3)
    if with_fake_score:
        assert c == pytest.approx(c0, abs=1e-2)
    else:
        assert abs(c) < 1e-3


# ---- the fake score ------------------------------------------------------------------------------


class DoubleOutput(torch.Tensor):
    """Output whose .float() keeps float64, so that identities can be checked beyond float32."""

    @staticmethod
    def apply_to(x):
        return x.as_subclass(DoubleOutput)

    def float(self):
        return self.as_subclass(torch.Tensor)


@both
@pytest.mark.parametrize("schedule", [Flow(), VP()], ids=["flow", "vp"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.15, 0.6, 0.9])
def test_fake_score_optimum_is_the_posterior_mean(script, schedule, kind, t):
    """On N(m, c^2) the best network w x_t + b under fake_score_loss, read as x0, is E[x0 | x_t]."""
    m, c, nodes, diffusion = 0.7, 0.6, unit_nodes(30), Diffusion(schedule, kind)
    z, eps = (v.reshape(-1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    x, times = m + c * z, torch.full((900,), t, dtype=torch.float64)

    def loss(wb):
        def net(x_t, t):
            return DoubleOutput.apply_to(wb[0] * x_t + wb[1])

        return script.fake_score_loss(net, diffusion, x, eps, times, {})

    zero = torch.zeros(2, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(loss, zero)
    curvature = torch.autograd.functional.hessian(loss, zero)
    w, b = -torch.linalg.solve(curvature, slope)  # the loss is quadratic: one Newton step
    a, s, x_t = schedule.alpha(times), schedule.sigma(times), add_noise(schedule, x, eps, times)
    mu = to_x0_eps(w * x_t + b, kind, x_t, a, s)[0]
    close(mu, posterior_mean(x_t, m, c, a[:, None], s[:, None]), 1e-9)


WEIGHTINGS = {
    "x0": ("x0", VP(), lambda a, s: 1 + 0 * a),
    "eps": ("eps", VP(), lambda a, s: (a / s) ** 2),
    "vp_v": ("vp_v", VP(), lambda a, s: 1 / s**2),
    "score": ("score", VP(), lambda a, s: a**2 / s**4),
    "flow_v": ("flow_v", Flow(), lambda a, s: 1 / s**2),
    "eps of flow": ("eps", Flow(), lambda a, s: (a / s) ** 2),
}


@both
@pytest.mark.parametrize("kind, schedule, weight", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_fake_score_loss_is_a_weighted_x0_loss(script, kind, schedule, weight):
    """Regressing eps is the x0 loss times (a / s)^2, either velocity 1 / s^2, the score a^2 / s^4.

    That is the teacher's own weighting.
    """
    x, eps, output = (normal(6, 2, 3, seed=k) for k in range(3))
    t = levels(6)
    a, s, x_t = schedule.alpha(t), schedule.sigma(t), add_noise(schedule, x, eps, t)
    seen = {}

    def net(x_t, t, label):
        seen.update(x_t=x_t, t=t, label=label)
        return DoubleOutput.apply_to(output)

    loss = script.fake_score_loss(net, Diffusion(schedule, kind), x, eps, t, {"label": 5})
    mu = to_x0_eps(output, kind, x_t, a, s)[0]
    close(loss, (weight(a, s)[:, None, None] * (mu - x).square()).mean(), 1e-9)
    assert torch.equal(seen["x_t"], x_t) and torch.equal(seen["t"], t) and seen["label"] == 5


@both
def test_fake_score_loss_sends_nothing_into_the_sample(script):
    """Whoever copies it may give it samples that still have their graph."""
    x, eps = normal(3, 2).requires_grad_(True), normal(3, 2, seed=1)
    net = nn.Linear(2, 2).double()
    script.fake_score_loss(lambda x_t, t: net(x_t), FLOW_V, x, eps, levels(3), {}).backward()
    assert x.grad is None and has_gradient(net)


# ---- rollout and sampler -------------------------------------------------------------------------


class Counting(nn.Module):
    """The exact ring velocity, or another network, with a diary of its inputs."""

    def __init__(self, net=None):
        super().__init__()
        self.net, self.seen = net or RingTeacher(), []

    def forward(self, x, t, label=None):
        self.seen.append((x.detach().clone(), t.clone()))
        return self.net(x, t, label)


class Noise:
    """name -> noise of 5 points: "z" and "renoise0", "renoise1", ...; notes what is asked for."""

    def __init__(self, dtype=torch.float64):
        self.dtype, self.asked = dtype, []

    def __call__(self, name):
        self.asked.append(name)
        seed = 0 if name == "z" else 100 + int(name.removeprefix("renoise"))
        return normal(5, 2, seed=seed, dtype=self.dtype)


def setting(steps, dtype=torch.float64):
    """-> times, z, cond, noise."""
    noise = Noise(dtype)
    return step_grid(steps, 3.0)[:-1], noise("z"), {"label": torch.arange(5) % 4}, Noise(dtype)


@pytest.mark.parametrize("renoise", ["sde", "ode"])
@pytest.mark.parametrize("N", [1, 2, 4])
def test_call_counts(N, renoise):
    """A rollout to step k costs k calls, the sampler N, none of them guided.

    Noise is drawn between calls only, never after the last.
    """
    times, z, cond, _ = setting(N)
    for k in range(N):
        student = Counting()
        dmd.rollout(student, FLOW_V, Noise(), times[: k + 1], cond, renoise)
        assert len(student.seen) == k
        FLOW_V.x0(student, z, times[k], **cond)
        assert len(student.seen) == k + 1  # a training sample at step k
    student, noise = Counting(), Noise()
    dmd.sample(student, FLOW_V, noise, times, cond, renoise)
    between = [f"renoise{i}" for i in range(N - 1)] if renoise == "sde" else []
    assert len(student.seen) == N and noise.asked == ["z", *between]
    assert [float(t[0]) for _, t in student.seen] == times


def test_rollout_of_no_step_is_the_noise_itself():
    """k = 0 hands back z, bit for bit, also where the schedule's alpha(1) is not 0."""
    z = normal(3, 2)
    for schedule in (Flow(), VP()):
        got = dmd.rollout(None, Diffusion(schedule, "eps"), lambda name: z, [1.0], {}, "sde")
        assert torch.equal(got, z)


def test_one_step_sampler_is_one_call():
    """N = 1: the sample is the network's x0 at t = 1, without any noise added."""
    times, z, cond, noise = setting(1)
    got = dmd.sample(RingTeacher(), FLOW_V, noise, times, cond, "sde")
    assert torch.equal(got, FLOW_V.x0(RingTeacher(), z, torch.ones(5, dtype=torch.float64), **cond))


@pytest.mark.parametrize("renoise", ["sde", "ode"])
def test_training_rollout_visits_the_sampler_s_states(renoise):
    """Backward simulation: with the same noise the training input at step k is the sampler's state.

    It is so to the bit.
    """
    times, z, cond, noise = setting(4, torch.float32)
    student = Counting(perturbed(RingMLP(dim=32), std=0.2))
    x0 = dmd.sample(student, FLOW_V, noise, times, cond, renoise)
    visited = list(student.seen)
    for k in range(4):
        x_in = dmd.rollout(student, FLOW_V, noise, times[: k + 1], cond, renoise)
        assert torch.equal(x_in, visited[k][0])
        assert torch.equal(visited[k][1], z.new_full((5,), times[k]))
    with torch.no_grad():
        assert torch.equal(x0, FLOW_V.x0(student, x_in, times[3], **cond))


def test_sde_adds_fresh_noise_and_ode_keeps_the_implied_noise():
    """Rule "sde" is x_{t'} = a' x0 + s' fresh; "ode" is Euler, which is DDIM under VP."""
    times, z, cond, noise = setting(2)
    x0, _ = FLOW_V.x0_eps(RingTeacher(), z, times[0], **cond)
    got = dmd.rollout(RingTeacher(), FLOW_V, noise, times, cond, "sde")
    close(got, add_noise(Flow(), x0, noise("renoise0"), z.new_full((5,), times[1])))
    times, z, cond, noise = setting(4)
    for schedule in (Flow(), VP()):
        diffusion = Diffusion(schedule, "vp_v")

        def predict(x, t, diffusion=diffusion):
            return diffusion.x0_eps(RingTeacher(), x, t, **cond)

        euler = sample_ode(predict, schedule, z, times + [0.0], "euler")
        close(dmd.sample(RingTeacher(), diffusion, noise, times, cond, "ode"), euler)


def test_sampler_of_an_exact_student_has_the_data_s_law():
    """With exact conditional sampling at each call, alpha x0 + sigma fresh is a draw of x_t.

    So the moments of the samples agree with the data.
    """
    m, c, n = 0.7, 0.4, 40000
    times, g = [1.0, 0.8, 0.4], torch.Generator().manual_seed(3)
    seeds = {"z": 0, "renoise0": 50, "renoise1": 51}

    def student(x, t):
        """Draws x0 ~ p(x0 | x_t), the optimum of N steps, and returns the velocity of it."""
        a, s = 1 - t[:, None], t[:, None]
        std = c * s / (a**2 * c**2 + s**2).sqrt()
        noise = torch.randn(x.shape, generator=g, dtype=x.dtype)
        return (x - (posterior_mean(x, m, c, a, s) + std * noise)) / s

    def noise(name):
        return normal(n, 1, seed=seeds[name])

    x = dmd.sample(student, FLOW_V, noise, times, {}, "sde")
    assert float(x.mean()) == pytest.approx(m, abs=0.01)
    assert float(x.std()) == pytest.approx(c, abs=0.01)


def test_gradient_stops_at_the_rollout():
    """The student's gradient at step k is that of its k-th call with the input held constant.

    It is not that of the whole chain.
    """
    times, _, cond, noise = setting(3, torch.float32)
    student = perturbed(RingMLP(dim=32), std=0.2)

    def gradient(make_input):
        student.zero_grad()
        FLOW_V.x0(student, make_input(), times[2], **cond).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    def roll():
        return dmd.rollout(student, FLOW_V, noise, times, cond, "sde")

    constant = roll().detach()
    with torch.no_grad():
        simulated = roll()
    assert not simulated.requires_grad
    assert torch.equal(gradient(lambda: simulated), gradient(lambda: constant))
    assert not torch.allclose(gradient(lambda: constant), gradient(roll))


def test_teacher_s_sampler_is_the_guided_ode():
    """Diffusion.sample follows uncond + k (cond - uncond) in velocity space, at twice the calls."""
    times, z, cond, _ = setting(6)
    ring, uncond = Counting(), {"label": torch.full((5,), 4)}
    got = FLOW_V.sample(ring, z, times + [0.0], cond, uncond, 2.0, "heun")
    assert len(ring.seen) == 2 * (2 * 6 - 1)

    def predict(x, t):
        v_c, v_u = (RingTeacher()(x, t, c["label"]) for c in (cond, uncond))
        return to_x0_eps(v_u + 2 * (v_c - v_u), "flow_v", x, 1 - t, t)

    close(got, sample_ode(predict, Flow(), z, times + [0.0], "heun"), 1e-9)


# ---- GAN -----------------------------------------------------------------------------------------


@both
def test_gan_losses_at_zero_logits(script):
    """Undecided logits cost 2 ln 2 and ln 2; each loss falls the way that its player wants."""
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    close(script.discriminator_loss(zero, zero), 2 * math.log(2), 1e-12)
    close(script.generator_loss(zero), math.log(2), 1e-12)
    right = script.discriminator_loss(logit_real=one, logit_fake=-one)
    assert right < script.discriminator_loss(zero, zero) < script.discriminator_loss(-one, one)
    assert script.generator_loss(one) < script.generator_loss(zero)
    r, f = normal(3), normal(3, seed=1)  # cross-entropy with real = 1, fake = 0
    cross_entropy = F.binary_cross_entropy_with_logits
    close(script.discriminator_loss(r, f), cross_entropy(r, one) + cross_entropy(f, zero))
    close(script.generator_loss(f), cross_entropy(f, one))


def gan_setting():
    """-> student, fake, head, cond, four noises, t."""
    student, fake = small_dit(1), small_dit(2)
    torch.manual_seed(0)
    head, cond = dmd.GanHead(32), {"label": torch.arange(4) % 3}
    noise = [normal(4, 1, 4, 4, seed=k, dtype=torch.float32) for k in range(4)]
    return student, fake, head, cond, noise, torch.linspace(0.2, 0.8, 4)


@both
def test_discriminator_loss_on_trains_head_and_encoder_only(script):
    """L_D reaches the head and the fake's layers up to the middle block, nothing after it.

    Nor does it reach the student. It is the loss of two logits, each with noise of its own.
    """
    student, fake, head, cond, (z, real, _, _), _ = gan_setting()
    draw = Draws(0, 0, 0, range(4), shape=(1, 4, 4), timestep_shift=2.0)
    other = {"label": torch.tensor([2, 2, 0, 1])}
    with torch.no_grad():
        x = FLOW_V.x0(student, z, 1.0, **cond)
    noise, noise_real = draw.eps_t("_gan_fake"), draw.eps_t("_gan_real")
    both_samples = x, noise, cond, real, noise_real, other
    loss = script.discriminator_loss_on(fake, head, FLOW_V, *both_samples)
    logits = [
        script.gan_logit(fake, head, FLOW_V, y, *n, c)
        for y, n, c in ((real, noise_real, other), (x, noise, cond))
    ]
    assert logits[0].shape == (4,)
    assert torch.equal(loss, script.discriminator_loss(*logits))
    loss.backward()
    trained = {n for n, p in fake.named_parameters() if p.grad is not None and p.grad.any()}
    last = [f"blocks.{i}." for i in range(len(fake.blocks) // 2 + 1, len(fake.blocks))]
    after = (*last, "final", "skip")
    assert trained == {n for n, _ in fake.named_parameters() if not n.startswith(after)}
    assert all(p.grad is None for n, p in fake.named_parameters() if n.startswith(after))
    assert all(p.grad.any() for p in head.parameters()) and not has_gradient(student)


@both
def test_generator_turn_passes_through_the_frozen_fake(script):
    """With fake and head frozen the GAN loss moves x through the noising, a factor alpha.

    It leaves no gradient in either network.
    """
    _, fake, head, cond, (x, _, eps, _), t = gan_setting()
    fake.requires_grad_(False)
    head.requires_grad_(False)
    x.requires_grad_(True)
    script.generator_loss(script.gan_logit(fake, head, FLOW_V, x, eps, t, cond)).backward()
    assert (x.grad.flatten(1).abs().amax(1) > 0).all()
    assert not has_gradient(fake) and not has_gradient(head)
    x_t = add_noise(Flow(), x.detach(), eps, t).requires_grad_(True)
    script.generator_loss(head(fake(x_t, t, return_features=True, **cond))).backward()
    torch.testing.assert_close(x.grad, (1 - t)[:, None, None, None] * x_t.grad)


@both
def test_gan_sees_noised_samples(script):
    """The logit is of x_t, real or fake alike: at t = 1 under flow it is of the noise only."""
    _, fake, head, cond, (x, other, eps, _), _ = gan_setting()

    def logits(level):
        t = torch.full((4,), level)
        return [script.gan_logit(fake, head, FLOW_V, y, eps, t, cond) for y in (x, other)]

    with torch.no_grad():
        assert torch.equal(*logits(1.0))
        assert not torch.allclose(*logits(0.5))


def test_head_is_float32_under_autocast():
    """Its matmuls, its logit and their gradients, where autocast would make them bfloat16.

    A cast of the features alone does not pass: autocast undoes it.
    """
    torch.manual_seed(0)
    head, seen = dmd.GanHead(32), []
    features = normal(4, 7, 32, dtype=torch.float32).requires_grad_(True)
    for layer in head.net:
        layer.register_forward_hook(lambda layer, given, out: seen.append(out.dtype))
    want = head(features)
    slope = torch.autograd.grad(want.sum(), features)[0]

    def cast_alone(features):
        return head.net(features.float()).mean((1, 2))

    for forward, right in ((head, True), (cast_alone, False)):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            got = forward(features)
            loss = dmd.generator_loss(got)
        matmuls = {dtype for layer, dtype in zip(head.net, seen) if isinstance(layer, nn.Linear)}
        assert matmuls == {torch.float32 if right else torch.bfloat16}
        assert (got.dtype == loss.dtype == torch.float32) == right
        assert torch.equal(got, want) == right
        assert torch.equal(torch.autograd.grad(got.sum(), features)[0], slope) == right


# ---- the training loop ---------------------------------------------------------------------------


@each
@pytest.mark.parametrize("R", [1, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fake_is_updated_R_times_per_student_update(monkeypatch, tmp_path, script, R, accumulation):
    """Each step is one update of the student, then R of the fake, whatever the accumulation.

    No two fake updates see the same samples.
    """
    flags = f"--fake_update_ratio {R} --gradient_accumulation_steps {accumulation}".split()
    diary = ring_run(monkeypatch, script, tmp_path, *flags)
    assert diary.updates == (["student"] + ["fake"] * R) * 3
    assert len(diary.fake_samples) == 3 * R * accumulation
    different = {tuple(x.flatten().tolist()) for x in diary.fake_samples}
    assert len(different) == len(diary.fake_samples)


def notes_of(samples, noise, given):
    """What of the arguments of a loss belongs to a sample, and its noise: lists of tensors."""
    cond = given["fake_cond"] if "fake_cond" in given else given["cond"]
    assert "steps" in cond
    of_it = [given[name].detach() for name in ("x", "x_s", "s") if name in given]
    samples.append([*of_it, *(cond[name] for name in sorted(cond))])
    noise.append(given["at_dm"] if "at_dm" in given else (given["eps"],))


@each
@pytest.mark.parametrize("reuse", [True, False])
def test_first_fake_update_sees_the_student_s_samples(monkeypatch, tmp_path, script, reuse):
    """The first fake update of a step sees what the student's update just before it was made of.

    That is micro-batch by micro-batch, with its conditions and steps (tdm.py: with where it landed)
    and under noise of its own. The others see fresh samples; with --no-reuse_samples all do.
    """
    losses = {dmd: "dmd_loss", tdm: "tdm_loss_variant"}
    made, seen = ([], []), ([], [])  # (samples, noise) of every micro-batch of student and fake

    def noting(notes):
        def before(real, *args, **kwargs):
            notes_of(*notes, inspect.signature(real).bind(*args, **kwargs).arguments)
            return real(*args, **kwargs)

        return before

    diary = Diary(monkeypatch, script)
    diary.wrap(monkeypatch, script, losses.get(script, "decoupled_dmd_loss"), noting(made))
    diary.wrap(monkeypatch, script, "fake_score_loss", noting(seen))
    flags = "--fake_update_ratio 3 --gradient_accumulation_steps 2 --learning_rate 0.01".split()
    flags += ["--student_steps", *(["1", "2", "4"] if script is tdm else ["3"])]
    script.main(ring_flags(tmp_path, 4, 8, *flags, *([] if reuse else ["--no-reuse_samples"])))
    assert len(made[0]) == 4 * 2 and len(seen[0]) == 4 * 3 * 2

    def same(a, b):
        return all(torch.equal(v, w) for v, w in zip(a, b, strict=True))

    for n, (samples, noise) in enumerate(zip(*seen)):
        step, inner, micro = n // 6, n // 2 % 3, n % 2
        of_student = [i for i, others in enumerate(made[0]) if same(samples, others)]
        assert of_student == ([2 * step + micro] if reuse and inner == 0 else [])
        assert sum(same(samples, others) for others in seen[0]) == 1
        for eps, *_ in made[1]:
            assert not (noise[0] == eps).any()


def test_matching_step_in_the_loop(monkeypatch, tmp_path):
    """Teacher and fake see the same x_t = a x + s eps at t in dm_range, a range of t.

    The teacher is guided and the fake is not. The fake itself is trained over all of shifted
    [0, 1].
    """
    matched, fake_times = [], []

    def on_dmd_loss(
        real, x, teacher, fake, diffusion, eps, t, cond, uncond, fake_cond, guidance_scale
    ):
        assert teacher is diary.teacher.net and fake is diary.fake and guidance_scale == 2.0
        assert (cond["label"] < 4).all() and (uncond["label"] == 4).all() and fake_cond == cond
        before = len(diary.turns[-1])
        at_t = diffusion, eps, t, cond, uncond, fake_cond, guidance_scale
        loss, g, *scores = real(x, teacher, fake, *at_t)
        calls, x_t = diary.turns[-1][before:], (1 - t)[:, None] * x.detach() + t[:, None] * eps
        assert [c.who for c in calls] == ["teacher", "teacher", "fake"]
        for c, label in zip(calls, (cond["label"], uncond["label"], cond["label"])):
            torch.testing.assert_close(c.x_t, x_t)
            assert torch.equal(c.t, t) and torch.equal(c.label, label) and not c.graph
        with torch.no_grad():
            velocity = [RingTeacher()(x_t, t, c["label"]) for c in (cond, uncond)]
            mu_real = x_t - t[:, None] * (velocity[1] + 2.0 * (velocity[0] - velocity[1]))
            mu_fake = x_t - t[:, None] * fake(x_t, t, cond["label"])
            seen = diffusion.guided_x0(teacher, x_t, t, cond, uncond, 2.0)
            torch.testing.assert_close(seen, mu_real)
            torch.testing.assert_close(diffusion.x0(fake, x_t, t, **fake_cond), mu_fake)
        for score, mu in zip(scores, (mu_real, mu_fake), strict=True):
            torch.testing.assert_close(score, mu)
        want = (mu_fake - mu_real) / mean_error(x.detach(), mu_real)
        torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-5)
        matched.append((t, eps))
        return loss, g, *scores

    def on_fake_loss(real, fake, diffusion, x, eps, t, cond):
        fake_times.append(unshift(t, 3.0))
        return real(fake, diffusion, x, eps, t, cond)

    diary = Diary(monkeypatch, dmd)
    diary.wrap(monkeypatch, dmd, "dmd_loss", on_dmd_loss)
    diary.wrap(monkeypatch, dmd, "fake_score_loss", on_fake_loss)
    flags = "--guidance_scale 2 --timestep_shift 3 --fake_update_ratio 1 --dm_range 0.3 0.6"
    dmd.main(ring_flags(tmp_path, 20, 64, *flags.split()))
    t, eps = (torch.cat(v) for v in zip(*matched))
    assert len(t) == 20 * 64 and 0.3 <= t.min() < 0.31 and 0.59 < t.max() <= 0.6
    assert eps.mean().abs() < 0.1 and abs(eps.std() - 1) < 0.1
    u = torch.cat(fake_times)
    assert u.min() < 0.02 and u.max() > 0.98 and abs(u.mean() - 0.5) < 0.04


@pytest.mark.parametrize("s", [1, 3, 5, 6])
def test_range_of_the_matching_loss_is_stated_in_t(monkeypatch, tmp_path, s):
    """DMD2's [.02, .98] of t, whatever the shift; in between the levels are uniform in u.

    Bounds on u would leave out more of the clean end: with shift 6 the cleanest t would be .109.
    """
    levels = []

    def on_dmd_loss(real, x, teacher, fake, diffusion, eps, t, *rest):
        levels.append(t)
        return real(x, teacher, fake, diffusion, eps, t, *rest)

    diary = Diary(monkeypatch, dmd)
    diary.wrap(monkeypatch, dmd, "dmd_loss", on_dmd_loss)
    dmd.main(ring_flags(tmp_path, 4, 256, "--timestep_shift", str(s)))
    low, high = unshift(0.02, s), unshift(0.98, s)
    for t in levels:
        assert 0.02 <= t.min() < 0.02 + s / 256 < 0.045 and 0.975 < t.max() <= 0.98
        even = low + (high - low) * (torch.arange(256) + 0.5) / 256
        assert (unshift(t, float(s)).sort().values - even).abs().max() < 0.51 / 256


@both
def test_levels_of_one_batch_are_independent(monkeypatch, tmp_path, script):
    """The discriminator's levels of student samples and of real ones, and CA's and DM's.

    Two lattices with one offset in all rows would pass every test of either alone.
    """
    pairs = []

    def on_discriminator(real, fake, head, diffusion, x, noise, cond, x_real, noise_real, *rest):
        pairs.append((noise[1], noise_real[1]))
        return real(fake, head, diffusion, x, noise, cond, x_real, noise_real, *rest)

    def on_loss(real, x, teacher, fake, diffusion, at_dm, at_ca, *rest):
        pairs.append((at_dm[1], at_ca[1]))
        return real(x, teacher, fake, diffusion, at_dm, at_ca, *rest)

    diary = Diary(monkeypatch, script)
    diary.wrap(monkeypatch, script, "discriminator_loss_on", on_discriminator)
    if script is not dmd:
        diary.wrap(monkeypatch, script, "decoupled_dmd_loss", on_loss)
    more = "--gan_weight 0.1 --guidance_scale 2 --student_steps 1 --timestep_shift 1".split()
    script.main(ring_flags(tmp_path, 4, 256, *more))
    assert len(pairs) > 4
    for one, other in pairs:
        offset = (one - other) % 1
        assert 0.2 < offset.std() < 0.4  # of uniform numbers: 0.29
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 4 / 256**0.5


def test_real_input_is_noised_data_with_its_own_label(monkeypatch, tmp_path):
    """--student_input real: past the first step the student starts from noised data.

    It gets the label of that data.
    """
    flags = "--student_steps 8 --student_input real --fake_update_ratio 2".split()
    diary = ring_run(monkeypatch, dmd, tmp_path, *flags, steps=12, batch=32)
    assert not diary.rollouts
    calls = [c for turn in diary.turns for c in turn if c.who == "student"]
    x_in, label = (torch.cat([getattr(c, n)[c.t < 0.3] for c in calls]) for n in ("x_t", "label"))
    nearest = torch.cdist(x_in.double(), RingTeacher().means).argmin(1) % 4
    assert (nearest == label).double().mean() > 0.7  # chance is 0.25


def expected_student_loss(nets, dm=1.0, gan=0.0, regression=0.0, no_fake=False, folder=None):
    """The student's loss of step 0 written out from the draws; its gradient is what counts."""
    draw = Draws(0, 0, "student", range(8))
    z, eps = draw.normal("z", (2,)), draw.normal("eps", (2,))
    label, t = draw.integer("cond", 4), draw.spread("u", 0.02, 0.98)
    x = z - nets["student"](z, torch.ones(8), label)
    x_t = (1 - t[:, None]) * x + t[:, None] * eps
    real = x_t - t[:, None] * RingTeacher()(x_t, t, label)
    fake = x if no_fake else x_t - t[:, None] * nets["fake"](x_t, t, label)
    g = ((fake - real) / (x - real).abs().mean(1, keepdim=True)).detach()
    loss = dm * (g * x).sum() / x.numel()
    if gan:
        t, eps = draw.spread("u_gan")[:, None], draw.normal("eps_gan", (2,))
        x_t = (1 - t) * x + t * eps
        features = nets["fake"](x_t, t[:, 0], label, return_features=True)
        loss = loss + gan * F.softplus(-nets["head"](features)).mean()
    if regression:
        pairs = load_tensors(str(folder / "state" / "pairs.safetensors"))
        i = draw.integer("pair", 16)
        z, label = pairs["z"][i], pairs["index"][i]
        y = z - nets["student"](z, torch.ones(8), label)
        loss = loss + regression * (y - pairs["y"][i]).square().mean()
    return loss


def gan_norm(nets, gan):
    """|d loss_gan / d x| of step 0, times the weight."""
    draw = Draws(0, 0, "student", range(8))
    z, label = draw.normal("z", (2,)), draw.integer("cond", 4)
    x = (z - nets["student"](z, torch.ones(8), label)).detach().requires_grad_(True)
    t, eps = draw.spread("u_gan")[:, None], draw.normal("eps_gan", (2,))
    features = nets["fake"]((1 - t) * x + t * eps, t[:, 0], label, return_features=True)
    loss = gan * F.softplus(-nets["head"](features)).mean()
    return float(torch.autograd.grad(loss, x)[0].norm())


TERMS = {
    "": {},
    "--gan_weight 0.3": {"gan": 0.3},
    "--no_fake_score": {"no_fake": True},
    "--regression_weight 0.25 --regression_pairs 16 --teacher_steps 2": {"regression": 0.25},
    "--dm_weight 0.5 --gan_weight 0.3": {"dm": 0.5, "gan": 0.3},
    "--dm_weight 0.5 --no_fake_score": {"dm": 0.5, "no_fake": True},
    "--dm_weight 0 --gan_weight 0.3": {"dm": 0, "gan": 0.3},
    "--dm_weight 0 --regression_weight 0.25 --regression_pairs 16 --teacher_steps 2": {
        "dm": 0,
        "regression": 0.25,
    },
}


@pytest.mark.parametrize("flags, terms", TERMS.items(), ids=TERMS)
def test_student_gradient_in_the_loop(monkeypatch, tmp_path, flags, terms):
    """What reaches the student's weights in a real step: matching, GAN, regression, the ablation.

    Each has its own draws, labels and sign.
    """
    diary = one_step(monkeypatch, dmd, tmp_path, *flags.split())
    nets, grads = diary.at["student"]
    loss = expected_student_loss(nets, folder=tmp_path, **terms)
    want = torch.autograd.grad(loss, list(nets["student"].parameters()))
    for a, b in zip(grads["student"], want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    (row,) = read_log(tmp_path)
    matched = terms.get("dm", 1) > 0
    assert {"loss_dm", "g_dm", "dm_cos", "dm_rel_gap"} & set(row) == (
        {"loss_dm", "g_dm", "dm_cos", "dm_rel_gap"} if matched else set()
    )
    pairs = "regression" in terms  # else nobody asks the teacher
    assert ("teacher" in {c.who for c in diary.turns[0]}) == (matched or pairs)
    assert (
        ("loss_fake" in row)
        == ("fake" in diary.updates)
        == dmd.needs_fake(dmd.parse_args(["--teacher", "ring", *flags.split()]))
    )
    if "gan" in terms:
        # what the GAN alone sends into x, whatever --dm_weight is
        assert float(row["g_gan"]) == pytest.approx(gan_norm(nets, terms["gan"]), rel=1e-3)
    if "regression" in terms:  # the pairs are the teacher's ODE: two Heun steps from z
        pairs = load_tensors(str(tmp_path / "state" / "pairs.safetensors"))
        x, teacher = pairs["z"], RingTeacher()
        for t, s in ((1.0, 0.5), (0.5, 0.0)):
            v = teacher(x, torch.full((16,), t), pairs["index"])
            euler = x + (s - t) * v
            if s == 0:
                x = euler
            else:
                v_next = teacher(euler, torch.full((16,), s), pairs["index"])
                x = x + (s - t) / 2 * (v + v_next)
        torch.testing.assert_close(pairs["y"], x, rtol=1e-4, atol=1e-5)


@both
def test_fake_and_discriminator_gradient_in_the_loop(monkeypatch, tmp_path, script):
    """The fake's turn: denoising of student samples plus w_D times the discriminator's loss.

    The samples are those of the student's turn, by the weights that it had then. Real data come
    under their own labels, and there are three noise levels.
    """
    flags = "--gan_weight 0.3 --gan_weight_d 0.2 --student_steps 1 --seed 1".split()
    diary = one_step(monkeypatch, script, tmp_path, *flags)
    (nets, grads), before = diary.at["fake"], Draws(1, 0, "student", range(8))
    z, label = before.normal("z", (2,)), before.integer("cond", 4)
    x = (z - diary.at["student"][0]["student"](z, torch.ones(8), label)).detach()
    draw = Draws(1, 0, 0, range(8))
    t, eps = draw.spread("u")[:, None], draw.normal("eps", (2,))
    prediction = nets["fake"]((1 - t) * x + t * eps, t[:, 0], label)
    loss = (prediction - (eps - x)).square().mean()
    data, data_label = load_world("ring").data(20000, 1000004)
    i = draw.integer("real_gan", 20000)
    for name, x0, y, sign in (("fake", x, label, 1), ("real", data[i], data_label[i], -1)):
        t, eps = draw.spread(f"u_gan_{name}")[:, None], draw.normal(f"eps_gan_{name}", (2,))
        features = nets["fake"]((1 - t) * x0 + t * eps, t[:, 0], y, return_features=True)
        loss = loss + 0.2 * F.softplus(sign * nets["head"](features)).mean()
    parameters = [*nets["fake"].parameters(), *nets["head"].parameters()]
    got, want = [*grads["fake"], *grads["head"]], torch.autograd.grad(loss, parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@each
def test_ema_and_rates_in_the_loop(monkeypatch, tmp_path, script):
    """student/ holds the EMA, warmed up as (1 + n) / (4 + n); both rates warm up and fall."""
    rates, weights = {"student": [], "fake": []}, []

    def on_update(real, run, optimizer, what):
        rates[what].append(optimizer.param_groups[0]["lr"])
        real(run, optimizer, what)
        if what == "student":
            weights.append([p.detach().clone() for p in diary.student.parameters()])

    diary = Diary(monkeypatch, script)
    diary.wrap(monkeypatch, Run, "update", on_update)
    flags = """--fake_update_ratio 1 --lr_warmup_steps 2 --lr_decay_share 0.5 --learning_rate 1e-2
        --learning_rate_fake 3e-2 --ema_decay 0.45 --student_steps 1"""
    script.main(ring_flags(tmp_path, 4, 8, *flags.split()))
    assert rates["student"] == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3])
    assert rates["fake"] == pytest.approx([1.5e-2, 3e-2, 3e-2, 1.5e-2])
    ema = [p.detach().clone() for p in ring_network(0).parameters()]
    for decay, now in zip((0.25, 0.4, 0.45, 0.45), weights, strict=True):
        ema = [decay * a + (1 - decay) * b for a, b in zip(ema, now)]
    saved = load_network(str(tmp_path / "student"))[0]
    for a, b in zip(saved.parameters(), ema):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each
def test_report_of_a_world(monkeypatch, tmp_path, script):
    """report.json's rows: calls counted with guidance, fd_excess against the data's row.

    fd_teacher is against the teacher's samples.
    """
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    flags = "--teacher_steps 4 --guidance_scale 2 --student_steps 2".split()
    script.main(ring_flags(tmp_path, 2, 8, *flags))
    report = load_json(str(tmp_path / "report.json"))
    rows = {r["name"]: r for r in report["results"]}
    calls = {"data": 0, "teacher": 14, "teacher_same_steps": 4, "student": 2}
    assert {n: r["nfe"] for n, r in rows.items()} == calls
    floor = rows["data"]["fd"]
    assert all(r["fd_excess"] == pytest.approx(r["fd"] - floor) for r in rows.values())
    assert rows["data"]["fd_excess"] == 0
    for name in ("student", "teacher_same_steps"):  # untrained, and two Euler steps
        assert rows[name]["fd_teacher"] > 10
    assert rows["teacher"]["fd"] < rows["teacher_same_steps"]["fd"]
    assert report["steps"] == 2 and report["seed"] == 0
    assert {"patch_swd", "accuracy", "diversity"} <= set(rows["student"])


def test_no_fake_score_never_updates_the_fake(monkeypatch, tmp_path):
    """The ablation trains the student alone; the fake keeps its initial weights, unused."""
    diary = ring_run(monkeypatch, dmd, tmp_path, "--no_fake_score")
    assert diary.updates == ["student"] * 3
    assert not any(c.who == "fake" for turn in diary.turns for c in turn)
    assert not {"loss_fake", "norm_fake"} & set(read_log(tmp_path)[0])
    for a, b in zip(diary.fake.parameters(), ring_network(0).parameters(), strict=True):
        assert torch.equal(a, b)


@each
def test_accumulation_is_a_larger_batch(monkeypatch, tmp_path, script):
    """Two micro-batches of 8 are one batch of 16: the same rows are drawn, the same weights result.

    The gradient norms are compared before clipping: Adam alone would forgive a wrong scale.
    """
    flags = [] if script is tdm else ["--gan_weight", "0.1"]
    one = ring_run(monkeypatch, script, tmp_path / "one", *flags, batch=16)
    monkeypatch.undo()
    flags += ["--gradient_accumulation_steps", "2"]
    two = ring_run(monkeypatch, script, tmp_path / "two", *flags)
    assert one.norms == pytest.approx(two.norms, rel=1e-3)
    start = ring_network(0).hidden.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(one.student.hidden.parameters(), start))
    for of_one, of_two in ((one.student, two.student), (one.fake, two.fake)):
        for a, b in zip(of_one.parameters(), of_two.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
    compared = set()
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name.startswith(("loss", "cos")) or name in ("g", "mean", "std"):
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3, abs=1e-5), name
                compared.add(name)
    assert {"loss_fake", "mean", "std"} < compared


@both
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_multi_step_training_simulates_the_student(monkeypatch, tmp_path, script, precision):
    """N = 3, --one_step: every training input is a rollout of 0 to 2 steps, one length for a batch.

    It is without gradient. The call after it sends gradients to every weight, under autocast too,
    where weights that were cast during the rollout must not be used again.
    """
    flags = f"--student_steps 3 --mixed_precision {precision} --fake_update_ratio 2".split()
    flags += ["--one_step"]
    diary = ring_run(monkeypatch, script, tmp_path, *flags, steps=6)
    lengths, gradient_on = zip(*diary.rollouts)
    assert len(lengths) == 12 and set(lengths) == {0, 1, 2} and not any(gradient_on)
    of_student = [g for what, g in zip(diary.updates, diary.grads) if what == "student"]
    assert len(of_student) == 6 and all(g["student_all"] for g in of_student)


@both
@pytest.mark.parametrize("shared", [False, True])
def test_fake_is_conditioned_on_the_step_of_its_samples(monkeypatch, tmp_path, script, shared):
    """N = 3: in all of its calls the fake gets the number of rollout steps behind its samples.

    So it does in the discriminator's calls, also for real samples. It starts as the teacher's
    function whatever the step; with --shared_fake it has no such input. The student, and what is
    saved of it, knows of no step.
    """
    start = {}

    def on_start(real, run, **state):
        start.update({name: copy.deepcopy(state[name]) for name in ("student", "fake")})
        return real(run, **state)

    diary = Diary(monkeypatch, script)
    diary.wrap(monkeypatch, Run, "start", on_start)
    flags = "--student_steps 3 --fake_update_ratio 2 --gan_weight 0.1 --one_step".split()
    flags += ["--shared_fake"] if shared else []
    script.main(ring_flags(tmp_path, 8, 4, *flags))
    lengths = [length for length, _ in diary.rollouts]
    assert set(lengths) == {0, 1, 2}
    turns = diary.turns[:-1]
    assert len(turns) == 24 and len(lengths) == 16
    for i, turn in enumerate(turns):  # the student's, the fake's on its samples, and on fresh ones
        length = lengths[i // 3 * 2 + (i % 3 == 2)]
        of_fake = [c.steps for c in turn if c.who == "fake"]
        assert len(of_fake) == (3 if i % 3 else 2)
        if shared:
            assert of_fake == [None] * len(of_fake)
        else:
            assert all((steps == length).all() and steps.shape == (4,) for steps in of_fake)
        assert all(c.steps is None for c in turn if c.who != "fake")
    x, t, label = normal(5, 2, dtype=torch.float32), torch.rand(5), torch.arange(5) % 4
    extra = {} if shared else {"steps": torch.tensor([0.0, 1, 2, 0, 1])}
    assert torch.equal(start["fake"](x, t, label, **extra), start["student"](x, t, label))
    assert shared or diary.fake.steps.weight.abs().max() > 0
    assert load_network(str(tmp_path / "student"))[1]["steps_cond"] is False


@both
def test_a_batch_has_all_steps(monkeypatch, tmp_path, script):
    """N = 3, batches of 6: two samples for each step, made by the student's own steps before it.

    The fake is conditioned on the step of every sample, and the call with gradient is at its time.
    With a step of its own for every sample four-step students of the glyphs come to a third of the
    distance in as many updates (docs/results/dmd.md).
    """
    flags = "--student_steps 3 --fake_update_ratio 2".split()
    diary, grid = (
        ring_run(monkeypatch, script, tmp_path, *flags, steps=4, batch=6),
        [1.0, 2 / 3, 1 / 3],
    )
    for turn in diary.turns[:-1]:
        *steps, last = [c for c in turn if c.who == "student"] or [None]
        if last is None:
            continue  # the fake's turn on the student's samples
        k = torch.tensor([min(range(3), key=lambda i: abs(grid[i] - t)) for t in last.t.tolist()])
        assert sorted(k.tolist()) == [0, 0, 1, 1, 2, 2]
        # the steps before: those of rows beyond it, each at the grid's time
        assert [len(c.t) for c in steps] == [4, 2]
        for i, c in enumerate(steps):
            assert not c.graph and torch.allclose(c.t, torch.tensor(grid[i]))
            assert torch.equal(c.label, last.label[k > i])
        for c in turn:
            assert c.who != "fake" or torch.equal(c.steps.long(), k)


@pytest.mark.parametrize("k", [[0, 1, 2, 2], [0, 0, 0, 0], [2, 0, 2, 1]])
@both
def test_rollout_of_rows(script, k):
    """Row b is where a rollout of k_b steps alone would be; where no row goes on, one is computed
    for the other ranks' sake and thrown away."""
    x, calls, times = normal(4, 2), [], [1.0, 0.7, 0.4]

    def net(x_t, t, label):
        calls.append(len(x_t))
        return x_t * label[:, None] * t[:, None].double()

    def noise(name):
        return x if name == "z" else normal(4, 2, seed=len(name) + int(name[-1]))

    cond, diffusion = {"label": torch.arange(4.0)}, Diffusion(Flow(), "flow_v")
    got = script.rollout(net, diffusion, noise, times, cond, "sde", torch.tensor(k))
    assert calls == [max(1, sum(n > i for n in k)) for i in range(2)]
    for b, n in enumerate(k):
        alone = script.rollout(net, diffusion, noise, times[: n + 1], cond, "sde")
        assert torch.equal(got[b], alone[b])


@both
def test_stop_gradients_in_the_real_loop(monkeypatch, tmp_path, script):
    """A fake turn leaves no gradient in the student, a student turn none in fake or head.

    So it is with the GAN on. Neither leaves any in the teacher, whose weights end bit-equal to the
    file.
    """
    teacher = small_dit(depth=2)
    save_network(teacher, network_config(teacher), str(tmp_path / "teacher"))
    x0 = normal(20, 1, 4, 4, dtype=torch.float32)
    data = str(tmp_path / "data.safetensors")
    save_tensors({"x0": x0, "cond.label": torch.arange(20) % 3}, data)
    diary = Diary(monkeypatch, script)
    flags = f"""--teacher {tmp_path}/teacher --data {data} --output_dir {tmp_path}/run
        --max_train_steps 2 --train_batch_size 4 --gan_weight 0.1 --checkpointing_steps 1000"""
    script.main(flags.split())
    assert len(diary.updates) == 6
    for what, has in zip(diary.updates, diary.grads):
        of_fake = what == "fake"
        assert (has["fake"], has["head"], has["student"]) == (of_fake, of_fake, not of_fake)
        assert not has["teacher"]
    assert not any(p.requires_grad for p in diary.teacher.net.parameters())
    kept = zip(diary.teacher.net.parameters(), teacher.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in kept)
    for net in (diary.student, diary.fake):
        assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), teacher.parameters()))


# ---- DMD v1's pairs, and the update --------------------------------------------------------------


def run_of(folder, *flags):
    """A Run of dmd.py on the ring that has opened its output folder."""
    run = Run(dmd.parse_args(["--teacher", "ring", "--output_dir", str(folder), *flags]), "dmd")
    run.start()
    return run


def test_regression_pairs_are_teacher_samples(monkeypatch, tmp_path):
    """DMD v1's (z, y): y is the teacher's ODE sample from z, in whatever batches.

    A resumed run reads the file. A run that starts afresh makes new pairs, since those that are
    there may be of other flags.
    """
    quiet(monkeypatch)
    flags = "--regression_pairs 10 --teacher_steps 4 --train_batch_size 4".split()
    run = run_of(tmp_path / "run", *flags)
    teacher = start_teacher(run)
    teacher.conditions = Conditions(run.args, teacher.base)

    def made(teacher):
        return {k: v[torch.arange(10)] for k, v in dmd.teacher_pairs(run, teacher).items()}

    pairs = made(teacher)
    z, y, index = (pairs[name] for name in ("z", "y", "index"))
    assert z.shape == y.shape == (10, 2) and index.shape == (10,)
    cond, uncond = teacher.conditions.pick(index, "cpu")
    want = FLOW_V.sample(teacher.net, z, step_grid(4), cond, uncond, 1.0, "heun")
    torch.testing.assert_close(y, want)
    path = tmp_path / "run" / "state" / "pairs.safetensors"
    stale = {name: v + 1 for name, v in pairs.items()}
    save_tensors(stale, str(path))
    run.first = 3  # resumed
    again = made(None)
    assert all(torch.equal(again[name], stale[name]) for name in pairs)
    run.first = 0
    anew = made(teacher)
    assert all(torch.equal(anew[name], pairs[name]) for name in pairs)


def test_update_clips_and_the_step_refuses_what_is_not_finite(tmp_path):
    """Run.update clips to max_grad_norm and notes the norm before clipping.

    end_step stops the run on a loss or norm that is not finite, with its name and the number of
    the update, before anything of that update is logged or saved.
    """
    run = run_of(tmp_path / "run", "--max_grad_norm", "1")
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([p], lr=1.0)
    step = next(run.steps())
    p.grad = torch.tensor([3.0, 4.0])
    run.update(optimizer, "student")
    torch.testing.assert_close(p.data, torch.tensor([0.4, 1.2]))
    assert p.grad is None
    run.end_step(step)
    assert float(read_log(tmp_path / "run")[0]["norm_student"]) == pytest.approx(5)
    for loss, grad, says in (
        (float("nan"), 1.0, "not finite at update 7: loss_dm = nan; no state is saved yet"),
        (0.0, float("inf"), "not finite at update 7: norm_student = inf; no state is saved yet"),
    ):
        step = next(run.steps(6))
        run.note(loss_dm=torch.tensor(loss))
        p.grad = torch.tensor([grad, 0.0])
        run.update(optimizer, "student")
        with pytest.raises(TrainingError, match=says):
            run.end_step(step)
        assert len(read_log(tmp_path / "run")) == 1


# ---- draws ---------------------------------------------------------------------------------------


def test_draws_belong_to_rows():
    """Row i's numbers depend on (seed, step, inner, name, i) alone, on no split, order or rank.

    Those of `spread` depend on how many rows there are too.
    """
    whole = Draws(5, 3, 0, range(8))
    for rows in ([3], [7, 0, 3], range(4, 8)):
        part = Draws(5, 3, 0, rows, total=8)
        i = torch.tensor(list(rows))
        assert torch.equal(part.normal("z", (3, 7)), whole.normal("z", (3, 7))[i])
        assert torch.equal(part.uniform("u", 0.2, 0.4), whole.uniform("u", 0.2, 0.4)[i])
        assert torch.equal(part.spread("t", 0.2, 0.4), whole.spread("t", 0.2, 0.4)[i])
        assert torch.equal(part.integer("k", 1000), whole.integer("k", 1000)[i])
    assert torch.equal(whole.normal("z", (2,)), whole.normal("z", (2,)))  # no hidden state


def test_draws_differ_in_every_part_of_their_key():
    """Another seed, step, inner update or name is another stream."""
    base = Draws(5, 3, 0, range(4)).normal("z", (4,))
    keys = (6, 3, 0), (5, 4, 0), (5, 3, 1), (5, 3, "student")
    others = [Draws(*key, range(4)).normal("z", (4,)) for key in keys]
    for x in [*others, Draws(5, 3, 0, range(4)).normal("eps", (4,))]:
        assert (x != base).all()


def test_draws_are_equal_across_processes():
    """Another process with another PYTHONHASHSEED draws the same numbers."""
    code = (
        "from models.draws import Draws; d = Draws(5, 'pairs', 0, range(3)); "
        "print(d.normal('z', (2,)).tolist(), d.agreed('k', 10**6))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    d = Draws(5, "pairs", 0, range(3))
    assert out.stdout.strip() == f"{d.normal('z', (2,)).tolist()} {d.agreed('k', 10**6)}"


def test_draws_have_the_right_law():
    """Over 4,000 rows: normal moments, uniform quantiles, integers alike.

    There is no correlation between neighbouring rows, names or steps.
    """
    n = 4000
    draw = Draws(0, 1, 0, range(n))
    x, u, k = draw.normal("z", (3,)), draw.uniform("u"), draw.integer("k", 10)
    assert x.mean(0).abs().max() < 4 / n**0.5
    assert (x.var(0) - 1).abs().max() < 4 * (2 / n) ** 0.5
    quantiles = (torch.arange(n) + 0.5) / n
    assert (u.sort().values - quantiles).abs().max() < 1.95 / n**0.5  # Kolmogorov-Smirnov, 0.1 %
    assert 0 <= u.min() and u.max() < 1
    assert (k.bincount(minlength=10) - n / 10).abs().max() < 4 * (n * 0.09) ** 0.5
    assert len(x[:, 0].unique()) > n - 5
    next_step = Draws(0, 2, 0, range(n)).normal("z", (3,))
    for y in (x.roll(1, 0), next_step, draw.normal("eps", (3,))):
        assert ((x.T @ y) / n).abs().max() < 4 / n**0.5
    assert (x.T @ x / n - torch.eye(3)).triu(1).abs().max() < 4 / n**0.5


def test_spread_is_uniform_per_row_and_even_over_a_batch():
    """Over 4,000 steps any one row is uniform, whatever the step before drew.

    All rows of an update together, on however many ranks, have equal gaps.
    """
    n = 4000
    rows = [Draws(0, step, 0, [0, 5, 63]).spread("u", 0.02, 0.98) for step in range(n)]
    u = torch.stack(rows)  # (n, 3)
    assert u.min() >= 0.02 and u.max() <= 0.98
    quantile = 0.02 + 0.96 * (torch.arange(n) + 0.5) / n
    assert (u.sort(0).values - quantile[:, None]).abs().max() < 1.95 / n**0.5
    steps = (u[1:, 0] - 0.5) * (u[:-1, 0] - 0.5)
    assert steps.mean().abs() < 4 * (0.96**2 / 12) / n**0.5
    for B in (4, 64, 96):
        for step in range(20):
            ranks = range(0, B // 4), range(B // 4, B)
            parts = [Draws(1, step, "student", rows, total=B).spread("u") for rows in ranks]
            batch = torch.cat(parts).sort().values
            gaps = torch.cat([batch.diff(), batch[:1] + 1 - batch[-1:]])
            torch.testing.assert_close(gaps, torch.full((B,), 1 / B), rtol=1e-3, atol=0)


def test_agreed_ignores_rows():
    """One integer for all ranks, whatever the rows, and spread over its range across steps."""
    rows = ([0], [5, 6], range(64))
    assert len({Draws(0, 7, 0, r).agreed("k", 1000) for r in rows}) == 1
    drawn = torch.tensor([Draws(0, step, 0, [0]).agreed("k", 4) for step in range(2000)])
    counts = drawn.bincount(minlength=4)
    assert (counts - 500).abs().max() < 4 * (2000 * 3 / 16) ** 0.5
