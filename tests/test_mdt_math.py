"""mdt_dist.py against closed forms: transport, velocity matching and distillation, the baselines.

The transports are those of a Gaussian and of a single point. Also tested are the stop-gradients,
d_norm, guidance and the sampler. The wrong variants that come to mind are put to each identity too,
and must fail it.
"""

import copy
from types import SimpleNamespace

import mdt_steps
import numpy as np
import pytest
import torch
from helpers import perturbed

import mdt_dist as mdt
from models.diffusion import Flow, expand, from_x0_eps, step_grid, to_x0_eps
from models.networks.dit import DiT
from models.plumbing.teachers import load_teacher

T = torch.tensor([0.15, 0.4, 0.7, 0.95], dtype=torch.float64)
M, S = 0.8, 0.6  # mean and standard deviation of the Gaussian data
NONE = {}, {}, 1  # cond, uncond, guidance scale of a network without conditions


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def differ(a, b, **tolerance):
    return not torch.allclose(a, b, **tolerance)


def marginal(x, t, m=M, s=S):
    """Mean and standard deviation of x_t = (1 - t) x0 + t z for x0 ~ N(m, s^2)."""
    return expand((1 - t) * m, x), expand((((1 - t) * s) ** 2 + t**2).sqrt(), x)


def gaussian_velocity(x, t, m=M, s=S):
    mean, std = marginal(x, t, m, s)
    return -m + (expand(t, x) - (1 - expand(t, x)) * s**2) / std**2 * (x - mean)


def gaussian_transport(x, t):
    """Average velocity from t to 0: the trajectory through x ends at M + S (x - mean) / std."""
    mean, std = marginal(x, t)
    return (x - (M + S * (x - mean) / std)) / expand(t, x)


def marginal_points(t=T, n=7, seed=0):
    """x_t on the marginal of each t, (B, n)."""
    z = normal(len(t), n, seed=seed)
    mean, std = marginal(z, t)
    return mean + std * z


def small_net(x, t, shift=0.0):
    """Any smooth map of (B, 3) and time that no formula knows."""
    W = normal(3, 3, seed=5)
    return torch.tanh(x @ W + 2 * expand(t, x)) + 0.3 * x * expand(t.cos(), x) + shift


def replay(*outputs):
    """A network that returns these outputs, one call after another, whatever its input."""
    left = list(outputs)
    return lambda *args, **cond: left.pop(0)


def gradient(loss, inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)


# ---- the transport and its derivative ------------------------------------------------------------


def test_transport_of_a_gaussian_satisfies_equation_12():
    """u = phi + t dphi/dt along the teacher's velocity is that velocity.

    At t -> 0 phi is the velocity, and from t = 1 it ends in the data's distribution.
    """
    x = marginal_points()
    v = gaussian_velocity(x, T)

    def u(w):
        d = mdt.time_derivative(gaussian_transport, x, T, w, {}, None)
        return gaussian_transport(x, T) + T[:, None] * d

    close(u(v), v, 1e-12)
    assert (u(v + 0.3) - v).abs().min() > 0.01  # along another velocity it is not
    assert (u(0 * v) - v).abs().max() > 0.1  # nor is the derivative in t alone
    tiny = torch.full((4,), 1e-6, dtype=torch.float64)
    close(gaussian_transport(x, tiny), gaussian_velocity(x, tiny), 1e-4)
    z = normal(100_000, 1)
    end = z - gaussian_transport(z, torch.ones(len(z), dtype=torch.float64))
    assert abs(end.mean() - M) < 0.01 and abs(end.std() - S) < 0.01


def test_finite_difference_is_of_first_order_and_backward():
    """The residual halves with dt.

    Alg. 1's form, with phi at t in front, errs about half as much as the product rule's difference.
    """
    x = marginal_points(n=400)
    v = gaussian_velocity(x, T)
    t = T[:, None]

    def residual(dt, product=False):
        d = mdt.time_derivative(gaussian_transport, x, T, v, {}, dt)
        phi = gaussian_transport(x, T)
        u = phi + t * d
        if product:
            u = (t * phi - (t - dt) * (phi - dt * d)) / dt
        return (u - v).square().mean().sqrt()

    for dt in (0.02, 0.01, 0.005):
        assert residual(dt) / residual(dt / 2) == pytest.approx(2, rel=0.06)
        assert 1.5 < residual(dt, product=True) / residual(dt) < 4
    seen = []
    mdt.time_derivative(lambda x, t: seen.append((x, t)) or x, x, T, v, {}, 0.01, phi=x)
    ((x_s, s),) = seen  # one call if phi is known, at the earlier point of the trajectory
    close(x_s, x - 0.01 * v)
    close(s, T - 0.01)


def test_finite_difference_meets_the_exact_derivative_of_a_network():
    """torch.func.jvp is the limit of the difference, for the network of the embedded teachers.

    Neither leaves a gradient.
    """
    torch.manual_seed(0)
    size = dict(size=(4, 4, 4), patch=(2, 2, 2), channels=1, dim=32, depth=2, num_classes=3)
    net = perturbed(DiT(**size), std=0.2).double()
    x, v, cond = normal(3, 1, 4, 4, 4), normal(3, 1, 4, 4, 4, seed=1), {"label": torch.arange(3)}
    t = torch.tensor([0.2, 0.5, 0.9])
    exact = mdt.time_derivative(net, x, t, v, cond, None)

    def difference(dt):
        return mdt.time_derivative(net, x, t, v, cond, dt)

    # dt is small: random weights let the fast sines of the network's clock through
    errors = [(difference(dt) - exact).norm() / exact.norm() for dt in (2e-4, 1e-4)]
    assert errors[1] < 0.15 and errors[0] / errors[1] == pytest.approx(2, rel=0.3)
    assert not exact.requires_grad and not difference(0.01).requires_grad
    torch.testing.assert_close(mdt.exact_derivative(net, x, t, v, cond), exact, rtol=0, atol=0)


@pytest.mark.parametrize("dt", [0.01, None], ids=["difference", "jvp"])
@pytest.mark.parametrize("loss", ["matching", "distillation"])
def test_derivative_is_float32_s_also_under_bf16(monkeypatch, loss, dt):
    """Under bfloat16 autocast both losses get the derivative of a float32 run, for a real network.

    Outputs rounded to bfloat16, divided by dt, would leave a cosine of about .5 at t = .3.
    """
    teacher = load_teacher("voxels")
    x0, label = teacher.world.data(4, 0)
    cond = {"label": label}
    z, z1 = (torch.randn(x0.shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    found, real = {}, mdt.time_derivative

    def spy(*args):
        found.setdefault(precise, []).append(real(*args))
        return found[precise][-1]

    monkeypatch.setattr(mdt, "time_derivative", spy)
    for level in (0.3, 0.9):
        t = torch.full((4,), level)
        for precise in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
                at = teacher.net, teacher.net
                if loss == "matching":
                    mdt.velocity_matching(*at, x0, z, t, cond, cond, 1, dt)
                else:
                    mdt.velocity_distillation(*at, z1, z, t, cond, cond, 1, dt)
    for exact, got in zip(found[True], found[False], strict=True):
        assert got.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(got.flatten(), exact.flatten(), 0)
        assert cosine > 0.99, cosine
        torch.testing.assert_close(got.square().mean(), exact.square().mean(), rtol=0.05, atol=0)


def test_straight_transport_has_no_residual():
    """All data at one point: phi = v is constant along its straight trajectories.

    The difference and the loss vanish, and one step lands where many do.
    """
    point = normal(1, 7, seed=3)
    net = lambda x, t: (x - point) / expand(t, x)  # noqa: E731
    x0, z = point.expand(4, 7), normal(4, 7)
    x = mdt.add_noise(x0, z, T)
    close(x, (1 - T[:, None]) * point + T[:, None] * z, 1e-15)
    for dt in (0.01, 0.1, None):
        close(mdt.time_derivative(net, x, T, net(x, T), {}, dt), torch.zeros_like(x), 1e-11)
        loss, residual = mdt.velocity_matching(net, net, x0, z, T, *NONE, dt)
        close(loss, 0.0, 1e-20)
        close(residual, torch.zeros_like(x), 1e-11)
    z = normal(5, 7, seed=4)
    for times in ([1.0], [1.0, 0.5], [1.0, 0.8, 0.3, 0.1]):
        close(mdt.sample(net, lambda name: z, times, {}, {}), point.expand(5, 7))


def test_residual_is_the_velocity_mismatch_through_the_endpoint_map():
    """u - w = J (v_S - w) for any network and any tangent w, where J = dx0/dx_t.

    v_S is the velocity along which the network's own x0 stays; with w = v_S, u = v_S.
    """
    x, w = normal(4, 3), normal(4, 3, seed=1)
    end = lambda x, t: x - t * small_net(x[None], t[None])[0]  # noqa: E731
    J = torch.stack([torch.func.jacrev(end, 0)(x[i], T[i]) for i in range(4)])
    rates = [torch.func.jacrev(end, 1)(x[i], T[i]) for i in range(4)]
    v_S = torch.stack([torch.linalg.solve(J[i], -rates[i]) for i in range(4)])

    def u(w):
        d = mdt.time_derivative(small_net, x, T, w, {}, None)
        return small_net(x, T) + T[:, None] * d

    close(u(w) - w, (J @ (v_S - w)[..., None])[..., 0])
    close(u(v_S), v_S)
    assert (u(w) - v_S).abs().max() > 0.1  # u depends on the tangent


def test_velocity_and_score():
    """v = -x / (1 - t) - t / (1 - t) score for a Gaussian.

    Hence u - v = -t / (1 - t) (score - score) (App. A.2), by the conversions of
    models/diffusion.py.
    """
    x, t = marginal_points(), T[:, None]
    alpha, sigma = Flow().alpha(T), Flow().sigma(T)
    for m, s in ((M, S), (-0.3, 1.4)):
        v, (mean, std) = gaussian_velocity(x, T, m, s), marginal(x, T, m, s)
        score = -(x - mean) / std**2
        close(v, -x / (1 - t) - t / (1 - t) * score)
        x0, eps = to_x0_eps(v, "flow_v", x, alpha, sigma)
        close(score, from_x0_eps("score", x0, eps, alpha, sigma))
        close(score, -(x + (1 - t) * v) / t)


# ---- velocity matching ---------------------------------------------------------------------------


def test_velocity_matching_is_regression_onto_a_constant():
    """Value mean |phi + t d - v|^2 (Eq. 13), gradient 2 (phi + t d - v) / numel into phi alone.

    d = (phi - phi below) / dt.
    """
    phi, v, below, x0, z = (normal(4, 3, seed=i).requires_grad_() for i in range(5))
    dt, t = 0.2, T[:, None]
    d = (phi - below) / dt
    r = (phi + t * d - v).detach()
    student, teacher = replay(phi, below), replay(v)
    loss, residual = mdt.velocity_matching(student, teacher, x0, z, T, *NONE, dt)
    close(loss.detach(), r.square().mean())
    close(residual, r)
    assert not residual.requires_grad
    into = gradient(loss, (phi, v, below, x0, z))
    close(into[0], 2 * r / r.numel())
    assert into[1:] == (None, None, None, None)
    d, v = d.detach(), v.detach()
    wrong_sign = phi - (v + t * d)
    graph_in_d = phi - v + t * (phi - below.detach()) / dt
    without_t = phi - (v - d)
    for wrong in (wrong_sign, graph_in_d, without_t):
        assert differ(gradient(wrong.square().mean(), phi)[0], into[0], rtol=1e-2)


def test_velocity_matching_asks_at_the_points_of_equation_14():
    """Teacher at x_t, twice with guidance; student there and at x_t - dt v, guided, at t - dt.

    The transport may end at an edge above 0, and d may be normalised: the target is
    v - (t - edge) d.
    """
    seen, x0, z, dt = [], normal(4, 3), normal(4, 3, seed=1), 0.1

    def network(who, net):
        return lambda x, t, c: seen.append((who, c, x, t)) or net(x, t) * c

    student, teacher = network("student", small_net), network("teacher", gaussian_velocity)
    edge = torch.full_like(T, 0.05)
    flags = {"c": 2.0}, {"c": -1.0}, 3.0, dt, 0.1, edge
    loss, residual = mdt.velocity_matching(student, teacher, x0, z, T, *flags)
    t = T[:, None]
    x_t = (1 - t) * x0 + t * z
    v = 3 * 2 * gaussian_velocity(x_t, T) - 2 * -1 * gaussian_velocity(x_t, T)
    want = [("student", 2.0, x_t, T), ("teacher", 2.0, x_t, T), ("teacher", -1.0, x_t, T)]
    want.append(("student", 2.0, x_t - dt * v, T - dt))
    assert [call[:2] for call in seen] == [call[:2] for call in want]
    for call, wanted in zip(seen, want, strict=True):
        close(call[2], wanted[2])
        close(call[3], wanted[3])
    phi = 2 * small_net(x_t, T)
    d = (phi - 2 * small_net(x_t - dt * v, T - dt)) / dt
    r = phi - v + (t - 0.05) * d / (d.norm(dim=1, keepdim=True) + 0.1)
    close(residual, r)
    close(loss, r.square().mean())


def test_at_the_start_the_residual_is_the_derivative_alone():
    """Student = teacher without guidance: phi - (v - t d) = t d."""
    x0, z = M + S * normal(4, 7), normal(4, 7, seed=1)
    x = mdt.add_noise(x0, z, T)
    v = gaussian_velocity(x, T)
    d = mdt.time_derivative(gaussian_velocity, x, T, v, {}, 0.01, phi=v)
    loss, residual = mdt.velocity_matching(gaussian_velocity, gaussian_velocity, x0, z, T, *NONE)
    close(loss, (T[:, None] * d).square().mean())
    close(residual, T[:, None] * d)
    assert d.abs().mean() > 0.1  # which a curved trajectory has


# ---- the baselines -------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [0.0, 0.1])
def test_consistency_distillation_is_velocity_matching_with_weight_t_dt(monkeypatch, edge):
    """At one t its gradient is (t - edge) dt times velocity matching's, exactly.

    That is with the product rule's difference. With Alg. 1's the directions agree nearly; without
    the weight, or at unequal t, they do not.
    """
    dt, W = 0.01, normal(3, 3, seed=8).requires_grad_()
    net = lambda x, t: torch.tanh(x @ W + 2 * expand(t, x))  # noqa: E731
    x0, z, v = normal(5, 3), normal(5, 3, seed=2), normal(5, 3, seed=1)

    def gradients(t):
        t, low = (torch.full((5,), value, dtype=torch.float64) for value in (t, edge))
        batch = net, lambda x, t: v, x0, z, t, *NONE, dt
        x = mdt.add_noise(x0, z, t)
        phi, phi_s = net(x, t).detach(), net(x - dt * v, t - dt).detach()
        above, below = (t - low)[:, None], (t - dt - low)[:, None]
        d = ((above * phi - below * phi_s) / dt - phi) / above  # the product rule's, over t - edge
        cm = gradient(mdt.consistency_distillation(*batch, low)[0], W)[0]
        paper = gradient(mdt.velocity_matching(*batch, None, low)[0], W)[0]
        with monkeypatch.context() as m:
            m.setattr(mdt, "time_derivative", lambda *args: d)
            vm = gradient(mdt.velocity_matching(*batch, None, low)[0], W)[0]
        return cm, vm, paper

    for t in (0.3, 0.8):
        cm, vm, paper = gradients(t)
        close(cm, (t - edge) * dt * vm, 1e-12)
        assert torch.nn.functional.cosine_similarity(cm.flatten(), paper.flatten(), 0) > 0.998
        assert differ(paper, vm, rtol=1e-4)
    (cm_low, vm_low, _), (cm_high, vm_high, _) = gradients(0.3), gradients(0.8)
    assert differ(cm_low / vm_low, cm_high / vm_high, rtol=0.1)


def test_consistency_distillation_stops_the_gradient_below():
    """No gradient into the lower point; at edge 0 the loss is that of f = x - t phi."""
    phi, phi_s, v = (normal(4, 3, seed=i).requires_grad_() for i in range(3))
    x0, z, t, dt = normal(4, 3, seed=3), normal(4, 3, seed=4), T[:, None], 0.01
    student, teacher = replay(phi, phi_s), replay(v)
    loss, residual = mdt.consistency_distillation(student, teacher, x0, z, T, *NONE, dt)
    x = (1 - t) * x0 + t * z
    x_s = x - dt * v
    close(loss.detach(), (x - t * phi - x_s + (t - dt) * phi_s).detach().square().mean())
    close(residual, (phi - v).detach())
    into = gradient(loss, (phi, phi_s, v))
    assert into[0] is not None and into[1:] == (None, None)


@pytest.mark.parametrize("ramp", [0.0, 0.4, 1.0])
def test_continuous_consistency_follows_its_normalised_tangent(ramp):
    """Gradient tangent / (its rms + .1) / numel into phi alone, tangent phi - v + ramp t d."""
    phi, v, below = (normal(4, 3, seed=i).requires_grad_() for i in range(3))
    x0, z, dt = normal(4, 3, seed=3), normal(4, 3, seed=4), 0.2
    student, teacher = replay(phi, below), replay(v)
    loss, tangent = mdt.continuous_consistency(student, teacher, x0, z, T, *NONE, dt, ramp)
    want = (phi - v + ramp * T[:, None] * (phi - below) / dt).detach()
    g = want / (want.square().mean(1, keepdim=True).sqrt() + 0.1)
    close(tangent, want)
    close(loss.detach(), g.square().mean() / 2)
    into = gradient(loss, (phi, v, below))
    close(into[0], g / g.numel())
    assert into[1:] == (None, None)


def test_edge_of_a_phase():
    """The largest of 0, 1/K, ..., (K-1)/K that is at most s; 0 with one phase, also below 0."""
    s = torch.tensor([-0.2, 0.0, 0.3, 0.34, 0.66, 0.67, 1.0])
    torch.testing.assert_close(mdt.edge_of(s, 3), torch.tensor([0, 0, 0, 1, 1, 2, 2]) / 3)
    assert torch.equal(mdt.edge_of(s, 1), torch.zeros(7))


def test_guidance_has_both_of_its_ends():
    """Times are sums, 1 - .9 for one, and an end that is typed is a tenth."""
    seen = []

    def net(x, t, on):
        seen.append(on)
        return torch.zeros_like(x)

    times = step_grid(10)[:-1]
    guided = [float(f"{times[i]:.1f}") for i in (9, 3)]
    assert guided[0] > times[9]  # so that it would be outside
    mdt.sample(net, lambda name: torch.zeros(1, 2), times, {"on": 1}, {"on": 0}, 2.0, guided=guided)
    assert seen == [1, 1, 1, *[1, 0] * 7]


@pytest.mark.parametrize("timestep_shift", [1.0, 3.0])
@pytest.mark.parametrize("K", [2, 3, 4])
def test_phases_are_the_steps_of_their_sampler(K, timestep_shift):
    """The exact transport to the end of t's phase, of N(0, .3^2), sampled in K steps is exact.

    In another number of steps it is not, and so those are refused.
    """

    def std(t):
        return ((1 - t) ** 2 * 0.09 + t**2).sqrt()

    def phi(x_t, t):
        edge = mdt.edge_of(t - 1e-4, K, timestep_shift)
        return x_t * ((1 - std(edge) / std(t)) / (t - edge))[:, None]

    def sample(steps):
        times = step_grid(steps, timestep_shift)[:-1]
        return mdt.sample(phi, lambda name: z, times, {}, {}, 1.0, "ode")

    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    close(sample(K), 0.3 * z, 1e-6)
    for steps in {1, 2, 3, 4} - {K}:
        assert (sample(steps) - 0.3 * z).abs().max() > 1e-3


# ---- velocity distillation -----------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_weights_of_velocity_distillation_against_the_gaussian_kl(monkeypatch, t):
    """Weight "kl" gives the gradient of KL(p_t | q_t) exactly, where u is p's own velocity.

    One-step samples z - phi(z), phi = a z + b, are Gaussian. "paper" gives t / (1 - t) times that
    gradient in a and b, "code" 2 t / (1 - t)^2 times. Expectations over z and z'' are taken by the
    four points +-1, which is exact for products.
    """
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.35, -0.2))
    signs = [1.0, 1, -1, -1], [1.0, -1, 1, -1]
    z, z2 = (torch.tensor(v, dtype=torch.float64)[:, None] for v in signs)
    level = torch.full((4,), t, dtype=torch.float64)
    mean, var = -(1 - t) * b, ((1 - t) * (1 - a)) ** 2 + t**2
    m, s2 = (1 - t) * M, ((1 - t) * S) ** 2 + t**2
    kl = 0.5 * (var / s2 + (mean - m) ** 2 / s2 - 1 - (var / s2).log())
    want = torch.stack(gradient(kl, (a, b)))

    def student(x, t):
        if (t == 1).all():
            return a * x + b
        return gaussian_velocity(x, t, -b, 1 - a)  # with a derivative of zero it is u

    monkeypatch.setattr(mdt, "time_derivative", lambda student, x_t, *args: 0 * x_t)
    got = {}
    for weight in ("kl", "paper", "code"):
        flags = 0.01, None, weight
        loss, r = mdt.velocity_distillation(student, gaussian_velocity, z, z2, level, *NONE, *flags)
        got[weight] = torch.stack(gradient(loss, (a, b)))
        x_t = ((1 - t) * (z - a * z - b) + t * z2).detach()
        u = gaussian_velocity(x_t, level, -b.item(), 1 - a.item())
        close(r, u - gaussian_velocity(x_t, level))
    close(got["kl"], want)
    close(got["paper"], t / (1 - t) * want)
    close(got["code"], 2 * t / (1 - t) ** 2 * want)
    assert differ(got["kl"], -want)
    assert t == 0.5 or differ(got["paper"], want, rtol=0.05)


def test_velocity_distillation_moves_the_one_step_sample_alone():
    """Value: weighted mean of r^2 / 2; gradient w r / numel into phi(z', 1) alone.

    The first weight, without a name, is the default: the paper's.
    """
    kinds = {None: 1 - T, "paper": 1 - T, "code": torch.full_like(T, 2.0), "kl": (1 - T) ** 2 / T}
    dt, t = 0.2, T[:, None]
    for weight, w in kinds.items():
        phi_z, phi, below, v, z1, z2 = (normal(4, 3, seed=i).requires_grad_() for i in range(6))
        named = {"weight": weight} if weight else {}
        student, teacher = replay(phi_z, phi, below), replay(v)
        loss, residual = mdt.velocity_distillation(student, teacher, z1, z2, T, *NONE, dt, **named)
        r = (phi + t * (phi - below) / dt - v).detach()
        close(residual, r)
        close(loss.detach(), (w[:, None] / 2 * r.square()).mean())
        into = gradient(loss, (phi_z, phi, below, v, z1, z2))
        close(into[0], w[:, None] * r / r.numel())
        assert into[1:] == (None,) * 5 and not residual.requires_grad
        close(mdt.distillation_weight(T, weight or "paper"), w)
    without_second_stop = gradient((r + phi_z).square().mean(), phi_z)[0]
    assert differ(without_second_stop, 2 * r / r.numel())


def test_velocity_distillation_asks_at_the_student_s_own_samples():
    """The student at (z', 1), then teacher, student and student below at x noised with z''."""
    seen, z1, z2, dt = [], normal(4, 3), normal(4, 3, seed=1), 0.1

    def network(who, net):
        return lambda x, t, c: seen.append((who, c, x, t)) or net(x, t) * c

    student, teacher = network("student", small_net), network("teacher", gaussian_velocity)
    mdt.velocity_distillation(student, teacher, z1, z2, T, {"c": 2.0}, {"c": -1.0}, 3.0, dt)
    one, t = torch.ones_like(T), T[:, None]
    x_t = (1 - t) * (z1 - 2 * small_net(z1, one)) + t * z2
    v = 8 * gaussian_velocity(x_t, T)  # -1 + 3 (2 + 1)
    want = [("student", 2.0, z1, one), ("teacher", 2.0, x_t, T), ("teacher", -1.0, x_t, T)]
    want += [("student", 2.0, x_t, T), ("student", 2.0, x_t - dt * v, T - dt)]
    assert [call[:2] for call in seen] == [call[:2] for call in want]
    for call, wanted in zip(seen, want, strict=True):
        close(call[2], wanted[2])
        close(call[3], wanted[3])


def test_velocity_distillation_rests_at_the_exact_transport():
    """Student = exact transport: u = v everywhere, also at its own samples.

    With a difference that holds up to O(dt). The teacher itself does not rest: its residual is
    t dv/dt.
    """
    z, z2 = normal(4, 50), normal(4, 50, seed=1)
    x = (1 - T[:, None]) * (z - gaussian_transport(z, torch.ones_like(T))) + T[:, None] * z2
    v = gaussian_velocity(x, T)
    r = {}
    for net in (gaussian_transport, gaussian_velocity):
        for dt in (None, 0.01):
            d = mdt.time_derivative(net, x, T, v, {}, dt)
            r[net, dt] = net(x, T) + T[:, None] * d - v
    assert r[gaussian_transport, None].abs().max() < 1e-12
    assert r[gaussian_transport, 0.01].square().mean().sqrt() < 0.01
    assert r[gaussian_velocity, None].square().mean().sqrt() > 0.2
    for dt in (None, 0.01):
        _, residual = mdt.velocity_distillation(
            gaussian_transport, gaussian_velocity, z, z2, T, *NONE, dt
        )
        close(residual, r[gaussian_transport, dt])


# ---- d_norm --------------------------------------------------------------------------------------


def test_norm_bounds_the_whole_sample():
    """|t d| < 1 for a sample of any size.

    Far above .1 the derivative's scale does not matter; far below it grows by 10 at most.
    """
    for size in (3, 300, 30_000):
        d = 7 * normal(4, size)
        n = mdt.normalised(d, 4)
        assert ((T[:, None] * n).norm(dim=1) < 1).all() and (n.norm(dim=1) > 0.8).all()
        close(mdt.normalised(1e6 * d, 4), d / d.norm(dim=1, keepdim=True), 1e-6)
        close(mdt.normalised(1e-9 * d, 4), 1e-8 * d, 1e-6)
    assert mdt.normalised(d, 4, d_norm=None) is d
    large = mdt.normalised(7 * normal(1, 30_000), 1)
    assert large.square().mean().sqrt() < 0.0058  # each element is hardly moved


def test_rms_norm_does_not_depend_on_the_size():
    """d / (rms + .1) is the same for a sample and for many copies of it side by side.

    The norm over the whole sample is not.
    """
    d = normal(4, 30)
    wide = d.repeat(1, 9)
    close(mdt.normalised(wide, 4, d_norm="rms")[:, :30], mdt.normalised(d, 4, d_norm="rms"))
    close(mdt.normalised(d, 4, d_norm="rms"), d / (d.square().mean(1, keepdim=True).sqrt() + 0.1))
    assert differ(mdt.normalised(wide, 4)[:, :30], mdt.normalised(d, 4), rtol=0.1)


def full_grid(samples, side):
    """coords of every place of the grid, in random order, and a function x -> its points there."""
    axis = torch.arange(side)
    coords = torch.cartesian_prod(torch.arange(samples), axis, axis, axis)
    coords = coords[torch.randperm(len(coords), generator=torch.Generator().manual_seed(0))]
    return coords, lambda x: x.movedim(1, -1)[coords.unbind(1)]


@pytest.mark.parametrize("d_norm", [0.1, 0.5, "rms"])
def test_norm_is_per_sample_and_the_same_for_points(d_norm):
    """Changing sample 1 leaves the others bit-equal, which a norm over the batch would not.

    The points of a full grid, in any order, get what the dense grid gets.
    """
    d = normal(4, 2, 3, 3, 3)
    other = d.clone()
    other[1] *= 100
    kept = [0, 2, 3]
    alone, beside = (mdt.normalised(x, 4, d_norm=d_norm)[kept] for x in (d, other))
    assert torch.equal(alone, beside)
    assert differ((other / other.norm())[kept], (d / d.norm())[kept])
    coords, points = full_grid(4, 3)
    close(mdt.normalised(points(d), 4, coords, d_norm), points(mdt.normalised(d, 4, d_norm=d_norm)))


@pytest.mark.parametrize("d_norm", [None, 0.1, "rms"])
def test_losses_of_the_points_of_a_full_grid_are_those_of_the_grid(d_norm):
    """Every loss and its residual, in every weight."""
    coords, points = full_grid(4, 3)
    x0, z, phi_z, phi, below, v = (normal(4, 2, 3, 3, 3, seed=i) for i in range(6))
    edge, dt, cond = torch.full_like(T, 0.1), 0.2, {"coords": coords}

    def check(loss, outputs, *more):
        student, teacher = replay(*outputs), replay(v)
        value, residual = loss(student, teacher, x0, z, T, *NONE, dt, *more)
        student, teacher = replay(*map(points, outputs)), replay(points(v))
        flags = cond, cond, 1, dt, *more
        at_points = loss(student, teacher, points(x0), points(z), T, *flags)
        close(at_points[0], value)
        close(at_points[1], points(residual))

    check(mdt.velocity_matching, (phi, below), d_norm, edge)
    for weight in ("code", "paper", "kl"):
        check(mdt.velocity_distillation, (phi_z, phi, below), d_norm, weight)
    check(mdt.consistency_distillation, (phi, below), edge)
    check(mdt.continuous_consistency, (phi, below), 0.7)


def test_norm_of_samples_of_unequal_size():
    """Sparse samples have as many elements as points times channels."""
    coords = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 3]])
    d = normal(4, 2)
    norm, elements = mdt.sample_norm(d, 2, coords)
    close(norm, torch.stack([d[[0, 2, 3]].norm(), d[1].norm()]))
    close(elements, torch.tensor([6.0, 2.0]))


# ---- guidance, sampler ---------------------------------------------------------------------------


@pytest.mark.parametrize("w", [-1.0, 0.0, 2.5, 40.0])
def test_guidance_is_the_papers_in_another_form(w):
    """uncond + (1 + w)(cond - uncond) = (1 + w) cond - w uncond.

    w = 0 makes one call, and w = -1 is unconditional.
    """
    calls = []
    net = lambda x, t, c: calls.append(c) or x * c  # noqa: E731
    x, conds = normal(4, 3), ({"c": 3.0}, {"c": -2.0})
    got = mdt.velocity(net, x, T, *conds, 1 + w)
    close(got, (1 + w) * 3 * x - w * -2 * x, 1e-12)
    assert calls == ([3.0] if w == 0 else [3.0, -2.0])
    assert w == 0 or differ(mdt.velocity(net, x, T, *conds, w), got)  # w itself is no scale


def test_two_euler_steps_inflate_and_renoising_does_not():
    """With the exact transport of N(M, S^2) one step is exact.

    Two Euler steps give M + S (1 + S) / sqrt(1 + S^2) z, which is too wide. Noising the predicted
    sample afresh gives M + S / sqrt(1 + S^2) (S z + z2), of standard deviation S.
    """
    noise = {"z": normal(6, 3), "renoise0": normal(6, 3, seed=1)}
    z, fresh, root = noise["z"], noise["renoise0"], (1 + S**2) ** 0.5

    def sampled(times, renoise="ode"):
        flags = noise.__getitem__, times, {}, {}, 1.0, renoise
        return mdt.sample(gaussian_transport, *flags)

    close(sampled([1.0]), M + S * z)
    close(sampled([1.0], "sde"), M + S * z)  # no noise after the last step
    close(sampled([1.0, 0.5]), M + S * (1 + S) / root * z)
    close(sampled([1.0, 0.5], "sde"), M + S / root * (S * z + fresh))


def test_the_exact_average_velocity_is_found_from_the_velocity():
    x = marginal_points()
    for t, row in zip(T, x):
        found = mdt_steps.exact(gaussian_velocity, 4000)(row[None], t[None])
        close(found, gaussian_transport(row[None], t[None]), 2e-3)


def test_a_step_that_is_wrong_is_told_from_the_other():
    """A Gaussian's exact transport with a wrong first step, and with a wrong second one.

    A wrong one is k times as long as it should be.
    """
    z, k = normal(4, 500), 1.3
    root = (1 + S**2) ** 0.5
    first = k * gaussian_transport(z, torch.ones(4, dtype=torch.float64))
    world = SimpleNamespace(measure=lambda x, label: {"x": x})
    conditions = SimpleNamespace(pick=lambda label, device: ({}, {}))

    def ends(student):
        def noise(a, b):
            return z[a:b]

        at = noise, torch.zeros(4), world, conditions
        rows = mdt_steps.step_rows(student, gaussian_velocity, *at, fine=1000)
        return {title: row["x"].double() for title, row in rows.items()}

    def long_at(*times):
        return lambda x, t: (k if float(t[0]) in times else 1) * gaussian_transport(x, t)

    def end_of(x):  # of the exact transport from 1/2, whose marginal is N(M / 2, (1 + S^2) / 4)
        return M + S * (x - M / 2) * 2 / root

    wide = M + S * (1 + S) / root * z
    right = ends(long_at())
    close(right["exact in both"], wide, 5e-3)
    close(right["student in both"], wide, 1e-5)
    close(right["student, then exact"], wide, 5e-3)
    half = torch.full((4,), 0.5, dtype=torch.float64)
    between = (z + M + S * z) / 2  # where the exact first step ends
    straight = between - gaussian_velocity(between, half) / 2
    close(right["student, then the teacher's velocity"], straight, 1e-5)
    wrong = ends(long_at(1.0))
    for title, row in right.items():
        if title.startswith("exact"):
            close(wrong[title], row, 1e-5)
    close(wrong["student in both"], end_of(z - first / 2), 1e-5)
    close(wrong["student, then exact"], end_of(z - first / 2), 5e-3)
    wrong = ends(long_at(0.5))
    close(wrong["student, then exact"], right["student, then exact"], 1e-5)
    close(wrong["exact, then student"], between - k / 2 * gaussian_transport(between, half), 5e-3)


def test_regression_learns_the_step_from_pure_noise():
    """phi*(z, 1) of a Gaussian is linear, z - (M + S z). The student itself stays as it was."""
    student = torch.nn.Linear(3, 3, dtype=torch.float64)
    before = copy.deepcopy(student.state_dict())

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = student

        def forward(self, x, t):
            assert bool((t == 1).all())
            return self.inner(x)

    z, label = normal(400, 3), torch.zeros(400)
    conditions = SimpleNamespace(pick=lambda label, device: ({}, {}))
    how = dict(updates=1500, rate=2e-2, fine=1000)
    taught = mdt_steps.regressed(
        Net(), gaussian_velocity, conditions, lambda a, b: z[a:b], label, **how
    )
    fresh = normal(50, 3, seed=5)
    close(taught(fresh, fresh.new_ones(50)), fresh - (M + S * fresh), 0.02)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_errors_of_the_transport_at_noised_data():
    x0, z = M + S * normal(64, 30), normal(64, 30, seed=1)
    nets = {"exact": gaussian_transport, "velocity": gaussian_velocity}
    nets["none"] = lambda x, t: torch.zeros_like(x)
    errors = mdt_steps.transport_errors(nets, gaussian_velocity, x0, z, {}, fine=1000)
    for t in mdt_steps.TIMES:
        at = torch.full((64,), t, dtype=torch.float64)
        x_t = mdt.add_noise(x0, z, at)
        phi = gaussian_transport(x_t, at)
        assert errors["exact"][t] < 1e-5
        for name in ("velocity", "none"):
            expected = (t * (nets[name](x_t, at) - phi)).square().mean()
            assert abs(errors[name][t] - expected) < 0.02 * expected + 1e-5


def test_sampler_of_points():
    """Points take their sample's time and guidance like a dense sample."""
    coords = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [0, 2, 0, 0]])
    seen = []

    def net(x, t, c, coords):
        seen.append((c, t.tolist()))
        return mdt.per_element(t, x, coords) * x * c

    z = normal(3, 2)
    cond, uncond = ({"c": c, "coords": coords} for c in (1.0, 0.0))
    got = mdt.sample(net, lambda name: z, [1.0, 0.5], cond, uncond, 2.0)
    close(got, 0 * z)
    assert seen == [(c, [t, t]) for t in (1.0, 0.5) for c in (1.0, 0.0)]


# ---- the law of t --------------------------------------------------------------------------------


def law_weight(law, t):
    """Density of t and its derivative: uniform, or the sigmoid of N(1, 1)."""
    if law == "uniform":
        return torch.ones_like(t), torch.zeros_like(t)
    y = t.logit() - 1
    w = torch.exp(-y.square() / 2) / (2 * torch.pi) ** 0.5 / (t * (1 - t))
    return w, w * (2 * t - t.logit()) / (t * (1 - t))


def forms(law):
    """Quadratic forms of e = sum_k a_k f_k with f_k = x^i t^j, all (12, 12), float64.

    e is an error of the student. -> E w e^2, E w e (e + t De), by the script's own derivative, and
    [w(1) E e(., 1)^2 + E (w - t w') e^2] / 2. E is over t in [0, 1] and x_t of the Gaussian data.
    """
    nodes, at = quadrature("legendre", 40), quadrature("hermite", 12)
    t = (nodes[0] + 1) / 2
    mean, std = marginal(t, t)
    x = (mean[:, None] + std[:, None] * 2**0.5 * at[0]).reshape(-1)  # (40 * 12,)
    share = (nodes[1][:, None] / 2 * at[1] / torch.pi**0.5).reshape(-1)
    t = t.repeat_interleave(12)
    v = gaussian_velocity(x[:, None], t)
    f, moved = [], []
    for i, j in [(i, j) for i in range(3) for j in range(4)]:
        feature = lambda x, t, i=i, j=j: x**i * t[:, None] ** j  # noqa: E731
        d = mdt.time_derivative(feature, x[:, None], t, v, {}, None)
        f.append(feature(x[:, None], t)[:, 0])
        moved.append((f[-1][:, None] + t[:, None] * d)[:, 0])
    f, moved = torch.stack(f), torch.stack(moved)
    w, slope = law_weight(law, t)
    gram = (f * w * share) @ f.T
    x1 = at[0] * 2**0.5  # at t = 1 the state is the noise
    ends = torch.stack([x1**i for i in range(3) for _ in range(4)])
    edge = law_weight(law, torch.ones(1, dtype=t.dtype))[0] if law == "uniform" else 0.0
    by_parts = edge * (ends * at[1] / torch.pi**0.5) @ ends.T + (f * (w - t * slope) * share) @ f.T
    return gram, (f * w * share) @ moved.T, by_parts / 2


def quadrature(kind, n):
    """Nodes and weights of Gauss's rule -> two float64 tensors."""
    rule = getattr(np.polynomial, kind)
    return [
        torch.from_numpy(a) for a in (rule.leggauss if kind == "legendre" else rule.hermgauss)(n)
    ]


def least_eigenvalue(form, gram):
    """Of the symmetric part of a form, relative to gram."""
    inverse = torch.linalg.inv(torch.linalg.cholesky(gram))
    return torch.linalg.eigvalsh(inverse @ (form + form.T) @ inverse.T / 2)[0].item()


def test_errors_of_velocity_matching_shrink_under_uniform_times_alone():
    """An error e of phi moves by -(e + t De): E w e (e + t De) >= 1/2 E w e^2 for uniform t.

    By parts it is [w(1) E e(., 1)^2 + E (w - t w') e^2] / 2, as D is the derivative along the flow
    that carries x_t. For logit-normal times w - t w' < 0 below t = .8, and some errors grow.
    """
    gram, form, by_parts = forms("uniform")
    close((form + form.T) / 2, by_parts, 1e-9)
    assert least_eigenvalue(form, gram) > 0.5 - 1e-6
    gram, form, by_parts = forms("logit_normal")
    close((form + form.T) / 2, by_parts, 1e-3)
    assert least_eigenvalue(form, gram) < -0.2
