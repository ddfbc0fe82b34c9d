"""mdt_dist.py against closed forms: the transport of a Gaussian and of a point, velocity matching and distillation, their stop-gradients, d_norm, guidance,
the baselines and the sampler. Each identity is also put to the wrong variants that come to mind, which must fail it.
"""

import pytest
import torch
from helpers import perturbed

import mdt_dist as mdt
from models.diffusion import Flow, expand, from_x0_eps, to_x0_eps
from models.networks.dit import DiT

T = torch.tensor([0.15, 0.4, 0.7, 0.95], dtype=torch.float64)
M, S = 0.8, 0.6  # mean and standard deviation of the Gaussian data


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64),
        torch.as_tensor(b, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


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


# ---- the transport and its derivative ----------------------------------------------------------------------------


def test_transport_of_a_gaussian_satisfies_equation_12():
    """u = phi + t dphi/dt along the teacher's velocity is that velocity; at t -> 0 phi is the velocity; from t = 1 it ends in the data's law."""
    x = marginal_points()
    v = gaussian_velocity(x, T)
    u = gaussian_transport(x, T) + T[:, None] * mdt.time_derivative(
        gaussian_transport, x, T, v, {}, None
    )
    close(u, v, 1e-12)
    other = gaussian_transport(x, T) + T[:, None] * mdt.time_derivative(
        gaussian_transport, x, T, v + 0.3, {}, None
    )
    assert (other - v).abs().min() > 0.01  # along another velocity it is not
    still = gaussian_transport(x, T) + T[:, None] * mdt.time_derivative(
        gaussian_transport, x, T, 0 * v, {}, None
    )
    assert (still - v).abs().max() > 0.1  # nor is the derivative in t alone
    tiny = torch.full((4,), 1e-6, dtype=torch.float64)
    close(gaussian_transport(x, tiny), gaussian_velocity(x, tiny), 1e-4)
    z = normal(100_000, 1)
    end = z - gaussian_transport(z, torch.ones(len(z), dtype=torch.float64))
    assert abs(end.mean() - M) < 0.01 and abs(end.std() - S) < 0.01


def test_finite_difference_is_of_first_order_and_backward():
    """The residual halves with dt; Alg. 1's form, phi at t in front, errs about half as much as the product rule's difference."""
    x = marginal_points(n=400)
    v = gaussian_velocity(x, T)

    def residual(dt, product=False):
        d = mdt.time_derivative(gaussian_transport, x, T, v, {}, dt)
        phi = gaussian_transport(x, T)
        before = phi - dt * d
        u = (
            (T[:, None] * phi - (T[:, None] - dt) * before) / dt
            if product
            else phi + T[:, None] * d
        )
        return (u - v).square().mean().sqrt()

    for dt in (0.02, 0.01, 0.005):
        assert residual(dt) / residual(dt / 2) == pytest.approx(2, rel=0.06)
        assert 1.5 < residual(dt, product=True) / residual(dt) < 4
    seen = []
    mdt.time_derivative(lambda x, t: seen.append((x, t)) or x, x, T, v, {}, 0.01, phi=x)
    ((x_s, s),) = seen  # one call if phi is known, at the earlier point of the trajectory
    close(x_s, x - 0.01 * v), close(s, T - 0.01)


def test_finite_difference_meets_the_exact_derivative_of_a_network():
    """torch.func.jvp under sdpa_kernel(MATH) is the limit of the difference, for the network of the embedded teachers; neither leaves a gradient."""
    torch.manual_seed(0)
    net = perturbed(
        DiT(size=(4, 4, 4), patch=(2, 2, 2), channels=1, dim=32, depth=2, num_classes=3), std=0.2
    ).double()
    x, v, cond = normal(3, 1, 4, 4, 4), normal(3, 1, 4, 4, 4, seed=1), {"label": torch.arange(3)}
    t = torch.tensor([0.2, 0.5, 0.9])
    exact = mdt.time_derivative(net, x, t, v, cond, None)

    def difference(
        dt,
    ):  # small: weights at random let the fast sines of the network's clock through
        with torch.no_grad():
            return mdt.time_derivative(net, x, t, v, cond, dt)

    errors = [(difference(dt) - exact).norm() / exact.norm() for dt in (2e-4, 1e-4)]
    assert errors[1] < 0.15 and errors[0] / errors[1] == pytest.approx(2, rel=0.3)
    assert (
        not exact.requires_grad and not mdt.time_derivative(net, x, t, v, cond, 0.01).requires_grad
    )


def test_straight_transport_has_no_residual():
    """All data at one point: phi = v, constant along its straight trajectories; the difference and the loss vanish, one step lands where many do."""
    point = normal(1, 7, seed=3)
    net = lambda x, t: (x - point) / expand(t, x)  # noqa: E731
    x = (1 - T[:, None]) * point + T[:, None] * normal(4, 7)
    v = net(x, T)
    for dt in (0.01, 0.1, None):
        d = mdt.time_derivative(net, x, T, v, {}, dt)
        close(d, torch.zeros_like(x), 1e-11)
        close(mdt.velocity_matching_loss(net(x, T), v, d, T), 0.0, 1e-20)
    z = normal(5, 7, seed=4)
    for grid in ([1.0, 0.0], [1.0, 0.5, 0.0], [1.0, 0.8, 0.3, 0.1, 0.0]):
        close(mdt.sample(net, z, grid, {}, {}), point.expand(5, 7))


def test_residual_is_the_velocity_mismatch_through_the_endpoint_map():
    """u - w = J (v_S - w) for any network and any tangent w, J = dx0/dx_t, v_S the velocity along which the network's own x0 stays; w = v_S: u = v_S."""
    x, w = normal(4, 3), normal(4, 3, seed=1)
    end = lambda x, t: x - t * small_net(x[None], t[None])[0]  # noqa: E731
    J = torch.stack([torch.func.jacrev(end, 0)(x[i], T[i]) for i in range(4)])
    v_S = torch.stack(
        [torch.linalg.solve(J[i], -torch.func.jacrev(end, 1)(x[i], T[i])) for i in range(4)]
    )
    u = lambda w: small_net(x, T) + T[:, None] * mdt.time_derivative(small_net, x, T, w, {}, None)  # noqa: E731
    close(u(w) - w, (J @ (v_S - w)[..., None])[..., 0])
    close(u(v_S), v_S)
    assert (
        u(w) - v_S
    ).abs().max() > 0.1  # u is not the network's own velocity, whatever the tangent


def test_velocity_and_score():
    """v = -x / (1 - t) - t / (1 - t) score for a Gaussian, and so u - v = -t / (1 - t) (score - score) (App. A.2), by the conversions of models/diffusion.py."""
    x = marginal_points()
    for m, s in ((M, S), (-0.3, 1.4)):
        v, (mean, std) = gaussian_velocity(x, T, m, s), marginal(x, T, m, s)
        score = -(x - mean) / std**2
        close(v, -x / (1 - T[:, None]) - T[:, None] / (1 - T[:, None]) * score)
        close(
            score,
            from_x0_eps(
                "score",
                *to_x0_eps(v, "flow_v", x, Flow().alpha(T), Flow().sigma(T)),
                Flow().alpha(T),
                Flow().sigma(T),
            ),
        )
        close(score, -(x + (1 - T[:, None]) * v) / T[:, None])


# ---- velocity matching -------------------------------------------------------------------------------------------


def gradient(loss, inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)


def test_velocity_matching_is_regression_onto_a_constant():
    """Value mean |phi + t d - v|^2 (Eq. 13), gradient 2 (phi + t d - v) / numel into phi alone."""
    phi, v, d = (normal(4, 3, seed=i).requires_grad_() for i in range(3))
    r = (phi + T[:, None] * d - v).detach()
    loss = mdt.velocity_matching_loss(phi, v, d, T)
    close(loss.detach(), r.square().mean())
    into = gradient(loss, (phi, v, d))
    close(into[0], 2 * r / r.numel())
    assert into[1] is None and into[2] is None
    for wrong in (
        (phi - (v + T[:, None] * d).detach()),
        (phi - v.detach() + T[:, None] * (d + phi)),
        (phi - (v - d).detach()),
    ):  # sign; graph in d; no t
        assert not torch.allclose(gradient(wrong.square().mean(), phi)[0], into[0], rtol=1e-2)


def test_at_the_start_the_residual_is_the_derivative_alone():
    """Student = teacher without guidance: phi - (v - t d) = t d."""
    x = marginal_points()
    v = gaussian_velocity(x, T)
    d = mdt.time_derivative(gaussian_velocity, x, T, v, {}, 0.01, phi=v)
    close(mdt.velocity_matching_loss(v, v, d, T), (T[:, None] * d).square().mean())
    assert d.abs().mean() > 0.1  # which a curved trajectory has


@pytest.mark.parametrize("edge", [0.0, 0.1])
def test_consistency_distillation_is_velocity_matching_with_weight_t_dt(edge):
    """At one t the gradient of the consistency loss is (t - edge) dt times velocity matching's with the product rule's difference, exactly; with Alg. 1's
    difference the directions agree nearly, and without the weight or at unequal t they do not."""
    dt, W = 0.01, normal(3, 3, seed=8).requires_grad_()
    net = lambda x, t: torch.tanh(x @ W + 2 * expand(t, x))  # noqa: E731
    x, v = normal(5, 3), normal(5, 3, seed=1)

    def gradients(t):
        t, low = (
            torch.full((5,), t, dtype=torch.float64),
            torch.full((5,), edge, dtype=torch.float64),
        )
        phi, x_s = net(x, t), x - dt * v
        phi_s = net(x_s, t - dt)
        cm = gradient(mdt.consistency_loss(x, phi, x_s, phi_s, t, t - dt, low), W)[0]
        d = (
            (t - low)[:, None] * phi - (t - dt - low)[:, None] * phi_s
        ) / dt - phi  # the product rule's, over t - edge below
        vm = gradient(mdt.velocity_matching_loss(phi, v, d / (t - low)[:, None], t - low), W)[0]
        paper = gradient(
            mdt.velocity_matching_loss(
                phi, v, mdt.time_derivative(net, x, t, v, {}, dt, phi), t - low
            ),
            W,
        )[0]
        return cm, vm, paper

    for t in (0.3, 0.8):
        cm, vm, paper = gradients(t)
        close(cm, (t - edge) * dt * vm, 1e-12)
        assert torch.nn.functional.cosine_similarity(
            cm.flatten(), paper.flatten(), 0
        ) > 0.998 and not torch.allclose(paper, vm, rtol=1e-4)
    assert not torch.allclose(
        gradients(0.3)[0] / gradients(0.3)[1], gradients(0.8)[0] / gradients(0.8)[1], rtol=0.1
    )


def test_consistency_loss_stops_the_gradient_below():
    """No gradient into the lower point, and at edge 0 the loss is that of f = x - t phi."""
    phi, phi_s, x, x_s, zero = (
        normal(4, 3).requires_grad_(),
        normal(4, 3, seed=1).requires_grad_(),
        normal(4, 3, seed=2),
        normal(4, 3, seed=3),
        torch.zeros_like(T),
    )
    loss = mdt.consistency_loss(x, phi, x_s, phi_s, T, T - 0.01, zero)
    close(
        loss.detach(),
        (x - T[:, None] * phi - x_s + (T[:, None] - 0.01) * phi_s).detach().square().mean(),
    )
    assert gradient(loss, (phi, phi_s))[1] is None


# ---- velocity distillation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_weights_of_velocity_distillation_against_the_gaussian_kl(t):
    """One-step samples z - phi(z), phi = a z + b, are Gaussian. With u and v the two marginals' velocities, weight "kl" gives the gradient of KL(p_t | q_t) in
    a and b exactly; "paper" t / (1 - t) times that, "code" 2 t / (1 - t)^2 times. Expectations over z and z'' by the four points +-1, exact for products."""
    a, b = (
        torch.tensor(0.35, dtype=torch.float64, requires_grad=True),
        torch.tensor(-0.2, dtype=torch.float64, requires_grad=True),
    )
    z, z2 = (
        torch.tensor(v, dtype=torch.float64)[:, None] for v in ([1.0, 1, -1, -1], [1.0, -1, 1, -1])
    )
    level = torch.full((4,), t, dtype=torch.float64)
    mean, var = -(1 - t) * b, ((1 - t) * (1 - a)) ** 2 + t**2
    m, s2 = (1 - t) * M, ((1 - t) * S) ** 2 + t**2
    kl = 0.5 * (var / s2 + (mean - m) ** 2 / s2 - 1 - (var / s2).log())
    want = torch.stack(gradient(kl, (a, b)))
    phi = a * z + b
    x_t = ((1 - t) * (z - phi) + t * z2).detach()
    r = gaussian_velocity(x_t, level, -b.item(), 1 - a.item()) - gaussian_velocity(x_t, level)
    got = {
        w: torch.stack(
            gradient(mdt.velocity_distillation_loss(a * z + b, r, level, weight=w), (a, b))
        )
        for w in ("kl", "paper", "code")
    }
    (
        close(got["kl"], want),
        close(got["paper"], t / (1 - t) * want),
        close(got["code"], 2 * t / (1 - t) ** 2 * want),
    )
    assert (
        not torch.allclose(got["kl"], -want)
        and not torch.allclose(got["paper"], want, rtol=0.05)
        or t == 0.5
    )


def test_velocity_distillation_moves_the_one_step_sample_alone():
    """Value: weighted mean r^2 / numel; gradient w r / numel into phi(z', 1) alone (the square trick of the code)."""
    for weight, w in (
        ("code", torch.full_like(T, 2.0)),
        ("paper", 1 - T),
        ("kl", (1 - T) ** 2 / T),
    ):
        phi, r = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
        loss = mdt.velocity_distillation_loss(phi, r, T, weight=weight)
        close(loss.detach(), (w[:, None] / 2 * r.detach().square()).mean())
        into = gradient(loss, (phi, r))
        close(into[0], w[:, None] * r.detach() / r.numel())
        assert into[1] is None
    assert not torch.allclose(
        gradient((r.detach() + phi).square().mean(), phi)[0], 2 * r.detach() / r.numel()
    )  # without the second stop-gradient


def test_velocity_distillation_rests_at_the_exact_transport():
    """Student = exact transport: u = v everywhere, also at its own samples; with a difference up to O(dt). The teacher itself does not rest: its residual is t dv/dt."""
    z = normal(4, 50)
    x = (1 - T[:, None]) * (z - gaussian_transport(z, torch.ones_like(T))) + T[:, None] * normal(
        4, 50, seed=1
    )
    v = gaussian_velocity(x, T)
    r = {
        (net, dt): net(x, T) + T[:, None] * mdt.time_derivative(net, x, T, v, {}, dt) - v
        for net in (gaussian_transport, gaussian_velocity)
        for dt in (None, 0.01)
    }
    assert (
        r[gaussian_transport, None].abs().max() < 1e-12
        and r[gaussian_transport, 0.01].square().mean().sqrt() < 0.01
    )
    assert r[gaussian_velocity, None].square().mean().sqrt() > 0.2


# ---- d_norm ------------------------------------------------------------------------------------------------------


def test_norm_bounds_the_whole_sample():
    """|t d| < 1 for a sample of any size; far above .1 its scale does not matter, far below it grows by 10 at most."""
    for size in (3, 300, 30_000):
        d = 7 * normal(4, size)
        n = mdt.normalised(d, 4)
        assert ((T[:, None] * n).norm(dim=1) < 1).all() and (n.norm(dim=1) > 0.8).all()
        close(mdt.normalised(1e6 * d, 4), d / d.norm(dim=1, keepdim=True), 1e-6)
        close(mdt.normalised(1e-9 * d, 4), 1e-8 * d, 1e-6)
    assert mdt.normalised(d, 4, d_norm=None) is d
    assert (
        mdt.normalised(7 * normal(1, 30_000), 1).square().mean().sqrt() < 0.0058
    )  # each element is hardly moved


def test_rms_norm_does_not_depend_on_the_size():
    """d / (rms + .1): the same for a sample and for many copies of it side by side; the whole-sample norm is not."""
    d = normal(4, 30)
    wide = d.repeat(1, 9)
    close(mdt.normalised(wide, 4, d_norm="rms")[:, :30], mdt.normalised(d, 4, d_norm="rms"))
    close(mdt.normalised(d, 4, d_norm="rms"), d / (d.square().mean(1, keepdim=True).sqrt() + 0.1))
    assert not torch.allclose(mdt.normalised(wide, 4)[:, :30], mdt.normalised(d, 4), rtol=0.1)


@pytest.mark.parametrize("d_norm", [0.1, 0.5, "rms"])
def test_norm_is_per_sample_and_the_same_for_points(d_norm):
    """Changing sample 1 leaves the others' bit-equal, which a norm over the batch would not; the points of a full grid, in any order, get what the dense grid does."""
    d = normal(4, 2, 3, 3, 3)
    other = d.clone()
    other[1] *= 100
    kept = [0, 2, 3]
    assert torch.equal(
        mdt.normalised(other, 4, d_norm=d_norm)[kept], mdt.normalised(d, 4, d_norm=d_norm)[kept]
    )
    assert not torch.allclose((other / other.norm())[kept], (d / d.norm())[kept])
    side = torch.arange(3)
    coords = torch.cartesian_prod(torch.arange(4), side, side, side)[
        torch.randperm(4 * 27, generator=torch.Generator().manual_seed(0))
    ]
    at = coords.unbind(1)
    points = lambda x: x.movedim(1, -1)[at]  # noqa: E731
    close(mdt.normalised(points(d), 4, coords, d_norm), points(mdt.normalised(d, 4, d_norm=d_norm)))
    phi, v = normal(4, 2, 3, 3, 3, seed=1), normal(4, 2, 3, 3, 3, seed=2)
    close(
        mdt.velocity_matching_loss(points(phi), points(v), points(d), T, coords),
        mdt.velocity_matching_loss(phi, v, d, T),
    )
    for weight in ("code", "paper", "kl"):
        close(
            mdt.velocity_distillation_loss(points(phi), points(d), T, coords, weight),
            mdt.velocity_distillation_loss(phi, d, T, weight=weight),
        )
    low = torch.full_like(T, 0.1)
    close(
        mdt.consistency_loss(
            points(phi), points(v), points(d), points(phi), T, T - 0.01, low, coords
        ),
        mdt.consistency_loss(phi, v, d, phi, T, T - 0.01, low),
    )


def test_norm_of_samples_of_unequal_size():
    """Sparse samples have as many elements as points times channels."""
    coords = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 3]])
    d = normal(4, 2)
    norm, elements = mdt.sample_norm(d, 2, coords)
    (
        close(norm, torch.stack([d[[0, 2, 3]].norm(), d[1].norm()])),
        close(elements, torch.tensor([6.0, 2.0])),
    )


# ---- guidance, sampler -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [-1.0, 0.0, 2.5, 40.0])
def test_guidance_is_the_papers_in_another_form(w):
    """uncond + (1 + w)(cond - uncond) = (1 + w) cond - w uncond; w = 0 makes one call, w = -1 is unconditional."""
    calls = []
    net = lambda x, t, c: calls.append(c) or x * c  # noqa: E731
    x = normal(4, 3)
    got = mdt.velocity(net, x, T, {"c": 3.0}, {"c": -2.0}, 1 + w)
    close(got, (1 + w) * 3 * x - w * -2 * x, 1e-12)
    assert calls == ([3.0] if w == 0 else [3.0, -2.0])
    assert w == 0 or not torch.allclose(
        mdt.velocity(net, x, T, {"c": 3.0}, {"c": -2.0}, w), got
    )  # w itself is no scale


def test_two_euler_steps_inflate_and_renoising_does_not():
    """With the exact transport of N(M, S^2): one step is exact; two Euler steps give M + S (1 + S) / sqrt(1 + S^2) z, too wide; noising the clean prediction afresh
    gives M + S / sqrt(1 + S^2) (S z + z2), of standard deviation S."""
    z, fresh = normal(6, 3), normal(6, 3, seed=1)
    close(mdt.sample(gaussian_transport, z, [1.0, 0.0], {}, {}), M + S * z)
    close(
        mdt.sample(gaussian_transport, z, [1.0, 0.5, 0.0], {}, {}),
        M + S * (1 + S) / (1 + S**2) ** 0.5 * z,
    )
    close(
        mdt.sample(gaussian_transport, z, [1.0, 0.5, 0.0], {}, {}, 1.0, lambda i: fresh),
        M + S / (1 + S**2) ** 0.5 * (S * z + fresh),
    )


def test_sampler_of_points():
    """Points take their sample's time and guidance like a dense sample."""
    coords = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [0, 2, 0, 0]])
    seen = []

    def net(x, t, c, coords):
        seen.append((c, t.tolist()))
        return mdt.per_element(t, x, coords) * x * c

    z = normal(3, 2)
    got = mdt.sample(
        net, z, [1.0, 0.5, 0.0], {"c": 1.0, "coords": coords}, {"c": 0.0, "coords": coords}, 2.0
    )
    close(got, 0 * z), assert_calls(seen)


def assert_calls(seen):
    assert seen == [(c, [t, t]) for t in (1.0, 0.5) for c in (1.0, 0.0)]
