"""Numbers of the papers' claims that need no training: Gaussians, mixtures and the ring's formulas.

Each function returns the pairs (left, right) of a claim of tests/claimed.py, one for each case. The
losses are the scripts' own; the laws around them are those of the tests. Half a minute in all.
"""

import functools
from unittest import mock

import latent_bound
import latent_claims
import test_decoupled_math as decoupled
import test_latent_fm_math as flows
import test_linvideo_math as linear
import test_mdt_math as transport
import test_phased_math as phased
import test_tdm_math as trajectories
import torch
from numpy.polynomial.legendre import leggauss
from test_dmd_math import OneLevel, mean_error, normal, posterior_mean, unit_nodes
from torch.utils.flop_counter import FlopCounterMode

import decoupled_dmd
import dmd
import latent_fm
import linvideo
import mdt_dist
import phased_dmd
import tdm
from kernels.linear_attention import linear_attention_reference
from models.diffusion import VP, Diffusion, Flow, from_x0_eps, guide, to_x0_eps, transition
from models.worlds import load_world
from models.worlds.ring import RingTeacher

FLOW_X0, FLOW_V, NONE = Diffusion(Flow(), "x0"), Diffusion(Flow(), "flow_v"), ({}, {}, {})


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def off(a, b):
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


# ---- DMD -----------------------------------------------------------------------------------------


def kl_gradient():
    """The student's gradient against that of KL(N(a m, a^2 c^2 + s^2) | the data's), in m and c."""
    pairs, (a, s), nodes = [], times(0.8, 0.5), unit_nodes(24)
    z, eps = (v.reshape(-1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    for m, c, m0, c0 in ((0.7, 0.6, -0.2, 1.1), (0.0, 1.5, 0.4, 0.8), (-1.0, 0.3, 0.0, 1.0)):
        teacher, fake = (
            lambda x_t, t, m=m, c=c: posterior_mean(x_t, m, c, a, s) for m, c in ((m0, c0), (m, c))
        )
        x, t = m + c * z, torch.zeros(len(z), dtype=torch.float64)
        _, g, mu_real, _ = dmd.dmd_loss(
            x, teacher, fake, Diffusion(OneLevel(), "x0"), eps, t, *NONE, 1
        )
        scores = a / s**2 * g * mean_error(x, mu_real)  # s_fake - s_real
        got = torch.stack([(a * scores).mean(), (a * scores * z).mean()])
        law = times(m, c).requires_grad_(True)
        v, v0 = a**2 * law[1] ** 2 + s**2, a**2 * c0**2 + s**2
        kl = 0.5 * (torch.log(v0 / v) + (v + (a * law[0] - a * m0) ** 2) / v0 - 1)
        pairs.append((off(got, torch.autograd.grad(kl, law)[0]), 1e-6))
    return pairs


def collapse():
    """Spread of a Gaussian student that descends the real score alone, and of one with the fake."""
    m0, c0, nodes = -0.2, 1.1, unit_nodes(20)
    z, eps = (v.reshape(1, -1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    at_t = FLOW_X0, eps.expand(3, -1), times(0.2, 0.5, 0.8)

    def network(m, c):
        return lambda x_t, t: posterior_mean(x_t, m, c, 1 - t[:, None], t[:, None])

    def spread(with_fake):
        law = times(0.7, 0.6).requires_grad_(True)
        for _ in range(200):
            m, c = law
            x = (m + c * z).expand(3, -1)
            if with_fake:
                loss, *_ = dmd.dmd_loss(x, network(m0, c0), network(m, c), *at_t, *NONE, 1)
            else:
                loss, *_ = dmd.dmd_loss_without_fake(x, network(m0, c0), *at_t, {}, {}, 1)
            law.data -= 0.1 * torch.autograd.grad(loss, law)[0]
        return abs(float(law[1].detach()))

    return [(spread(False), spread(True))]


def pull_by_level():
    """How unequally noise levels pull: largest over smallest mean |g|, Eq. 8 against two others.

    The others are sigma / alpha and sigma^3 / alpha (v1, Tab. 2) in place of Eq. 8's w_t; x is
    between the ring and its middle, and the fake knows its law.
    """
    ring, levels, n = RingTeacher(), (0.1, 0.3, 0.5, 0.7, 0.9), 4000
    x, eps = 0.5 * normal(n, 2), normal(n, 2, seed=1)
    teacher = lambda x_t, t: FLOW_V.x0(ring, x_t, t)  # noqa: E731
    fake = lambda x_t, t: posterior_mean(x_t, 0.0, 0.5, 1 - t[:, None], t[:, None])  # noqa: E731
    sizes = []
    for level in levels:
        t = torch.full((n,), level, dtype=torch.float64)
        _, g, mu_real, mu_fake = dmd.dmd_loss(x, teacher, fake, FLOW_X0, eps, t, *NONE, 1)
        apart, a = (mu_fake - mu_real).abs().mean(), 1 - level
        by_sigma = a / level * apart  # w_t a_t (s_fake - s_real) with w_t = sigma / alpha
        sizes.append(torch.stack([g.abs().mean(), by_sigma, level**2 * by_sigma]))
    spread = (torch.stack(sizes).max(0).values / torch.stack(sizes).min(0).values).tolist()
    return [(spread[0], spread[1]), (spread[0], spread[2])]


# ---- Phased DMD ----------------------------------------------------------------------------------

LEVELS = [(0.5, 0.7), (0.8333, 0.86)]  # s, t


def fake_errors(target):
    """How far the optimum of a fake's target is from the teacher's way to state the score."""
    errors, x_t = [], torch.linspace(-1.2, 1.2, 25, dtype=torch.float64)[None]
    for schedule in (Flow(), VP()):
        for s, t in LEVELS:
            s, t = times(s), times(t)
            (a, b), alpha, sigma = transition(schedule, s, t), schedule.alpha(t), schedule.sigma(t)
            score = phased.STUDENT.noised(a, b).score(x_t[0])[None]
            want = phased.wanted_output("flow_v", score, x_t, alpha, sigma)
            got = phased.conditional_mean(
                target, Diffusion(schedule, "flow_v"), phased.STUDENT, s, t, x_t
            )
            errors.append(off(got, want))
    return errors


def unbiased_target():
    return [(error, 1e-6) for error in fake_errors(phased_dmd.subinterval_target)]


def naive_target():
    """The same of eps - x_s, against a thousandth."""
    return [(1e-3, error) for error in fake_errors(phased_dmd.naive_target)]


def perfect_student(target):
    """Largest gradient at any sample of a student that already has the data's law at s."""
    largest = []
    for end in phased.PHASES[:-1]:
        s, t = phased.noise_levels(end)
        z, eps = phased.grid(16, 2)
        std = (((1 - s[0]) * 1.1) ** 2 + s[0] ** 2).sqrt()
        x_s, eps = ((1 - s[0]) * -0.2 + std * z).expand(3, -1), eps.expand(3, -1)
        (a, b), alpha, sigma = transition(Flow(), s, t), 1 - t, t
        x_t = a[:, None] * x_s + b[:, None] * eps
        real = posterior_mean(x_t, -0.2, 1.1, alpha[:, None], sigma[:, None])
        w, bias = phased.fitted_by_loss(FLOW_V, x_s, eps, s, t, target=target)
        fake = to_x0_eps(w * x_t + bias, "flow_v", x_t, alpha, sigma)[0]
        g = phased_dmd.paper_direction(x_s, real, fake, FLOW_V, s, t)
        largest.append(float(g.abs().max()))
    return largest


def rests_at_the_data():
    both = perfect_student(phased_dmd.subinterval_target), perfect_student(phased_dmd.naive_target)
    return list(zip(*both))


def subinterval_kl():
    """Eq. 10's gradient of a Gaussian student against differences of its KL at t."""
    pairs = []
    for s, t in ((0.5, 0.7), (0.625, 0.95), (0.8333, 0.86)):
        got, want = phased.gradients(Flow(), times(s), times(t), phased_dmd.paper_direction)
        pairs.append((off(got, want), 1e-5))
    return pairs


def clamped_loss():
    """Largest expected loss of the best fake near s, with Eq. 13's clamp and without.

    Data N(0, 1): Var(y | x_t) = t^2 / (b^2 V_t) (1 + s^2 / (1 - s)^2) for flow.
    """
    pairs = []
    for end in phased.PHASES[:-1]:
        u = torch.logspace(-4, -0.01, 200, dtype=torch.float64)
        s, t = torch.full_like(u, end), end + (1 - end) * u
        b2 = transition(Flow(), s, t)[1] ** 2
        noise = t**2 / (b2 * ((1 - t) ** 2 + t**2)) * (1 + s**2 / (1 - s) ** 2)
        weighted = phased_dmd.taper(FLOW_V, s, t) * noise
        pairs.append((float(weighted.max()), float(noise.max())))
    return pairs


# ---- Decoupled DMD -------------------------------------------------------------------------------


def two_terms():
    """g_dm + g_ca at one level against DMD's guided gradient, on the ring, by guidance scale."""
    ring, n, pairs = RingTeacher(std=0.3), 500, []
    x, eps, t = normal(n, 2), normal(n, 2, seed=1), torch.linspace(0.05, 0.95, n).double()
    label = torch.arange(n) % 4
    known, null = {"label": label}, {"label": torch.full_like(label, 4)}
    fake = lambda x_t, t, label: torch.tanh(x_t)  # noqa: E731
    for alpha in (1.5, 3.0, 8.0):
        at_t, conds = (eps, t), (known, null, known)
        teacher = lambda x_t, t, label: FLOW_V.x0(ring, x_t, t, label=label)  # noqa: E731
        _, g_dm, g_ca, *_ = decoupled_dmd.decoupled_dmd_loss(
            x, teacher, fake, FLOW_X0, at_t, at_t, *conds, alpha
        )
        _, g, mu_real, _ = dmd.dmd_loss(x, teacher, fake, FLOW_X0, *at_t, *conds, alpha)
        pairs.append((off(g_dm + g_ca, g * mean_error(x, mu_real)), 1e-6))
    return pairs


@functools.cache
def resting_mean(schedule, knows_step=True):
    """Mean of the last of four free steps' outputs, where the script's gradients vanish."""
    return float(decoupled.resting_means(schedule, knows_step=knows_step)[3])


def from_guided(schedule, knows_step=True):
    """How far that is from the guided teacher's mean, 1.40; the data's is 1."""
    return abs(resting_mean(schedule, knows_step) - decoupled.guided_mean())


def full_rests_like_shared():
    return [(abs(resting_mean("full") - resting_mean("shared")), 0.01 * resting_mean("shared"))]


def hybrid_beats_shared():
    return [(from_guided("hybrid"), from_guided("shared"))]


def constrained_beats_shared():
    return [(from_guided("constrained"), from_guided("shared"))]


def hybrid_beats_constrained():
    return [(from_guided("hybrid"), from_guided("constrained"))]


def hybrid_saturates_less():
    return [(resting_mean("hybrid"), resting_mean("constrained"))]


def printed_hybrid_keeps_guidance():
    """As printed the fake does not know the step; 1 is the data's mean, without any guidance."""
    return [(1.0, resting_mean("hybrid", knows_step=False))]


# ---- TDM -----------------------------------------------------------------------------------------


def one_step_is_dmd():
    """K = 1: the student's gradient on the ring against DMD's without its normaliser."""
    ring, n = RingTeacher(), 400
    x, eps, tau = normal(n, 2), normal(n, 2, seed=1), torch.linspace(0.05, 0.95, n).double()
    teacher = lambda x_t, t: FLOW_V.x0(ring, x_t, t)  # noqa: E731
    fake = lambda x_t, t: torch.tanh(x_t)  # noqa: E731
    _, g, *_ = tdm.tdm_loss_variant(
        x, x, teacher, fake, FLOW_X0, eps, 0 * tau, tau, *NONE, 1, loss="l2"
    )
    _, want, mu_real, _ = dmd.dmd_loss(x, teacher, fake, FLOW_X0, eps, tau, *NONE, 1)
    return [(off(g, want * mean_error(x, mu_real)), 1e-6)]


def score_errors(fresh=False, target="importance"):
    """Relative error of the fake's gain at each step before the last, Gaussian data, two settings.

    fresh: trained at noised x and asked at noised-on x_s, without importance sampling.
    """
    errors = []
    for name in ("demo", "flow"):
        T = trajectories.Trajectory(*trajectories.SETTINGS[name], 1.0)
        if fresh:
            x = T.land(T.h)[1]
            fake = trajectories.best_fake(T.schedule, x, x, T.eps, 0 * T.s, T.tau)
        else:
            fake = T.fake(T.h, target=target)
        error = T.by_step(fake / trajectories.real_gain(T.schedule, T.tau, 1.0) - 1)
        errors += error[:-1].abs().max(1).values.tolist()
    return errors


def importance_sampling_helps():
    return list(zip(score_errors(), score_errors(fresh=True)))


def fake_is_the_score():
    return [(error, 0.01) for error in score_errors()]


def last_step_is_right():
    """Variance of the samples of Gaussian students trained by the exact expected gradient."""
    C = times(0.25, 1.0, 4.0)
    schedule, grid = trajectories.SETTINGS["flow"]
    _, ratio = trajectories.descend(schedule, grid, C, "importance", steps=120)
    return [(abs(float(r) - 1), 0.02) for r in ratio[:, -1]]


def shared_fake_is_a_mixture():
    """Two step counts that meet at one tau: the one fake's best answer against either's score."""
    tau, x_tau, schedule = 0.7, torch.linspace(-2, 2, 9, dtype=torch.float64), Flow()
    laws, rows, scores = [(0.3, 0.8, 0.3), (0.7, -0.5, 0.6)], [], []
    a, b = (float(v) for v in transition(schedule, times(0.5), times(tau)))
    for share, m, c in laws:  # share, mean and standard deviation of x_s at s = .5
        rows.append((share, 0.5, lambda z, m=m, c=c: (m + c * z, z)))
        scores.append((a * m - x_tau) / (a**2 * c**2 + b**2))
    shared = -trajectories.pointwise_best(schedule, x_tau, rows, "exact", tau) / tau
    return [(0.1, off(shared, score)) for score in scores]


# ---- LinVideo ------------------------------------------------------------------------------------


def difference_of_scores():
    """Eq. 13 against the scores of two Gaussians, at five times."""
    t = times(0.1, 0.3, 0.5, 0.7, 0.95)
    x = normal(5, 2)
    (v, score), (v_hat, score_hat) = linear.TEACHER, linear.STUDENT
    g = linvideo.matching_gradient(v(x, t), v_hat(x, t), t, "eq13")
    want = score_hat(x, t) - score(x, t)
    return [(off(a, b), 1e-6) for a, b in zip(g, want)]


def kl_is_a_regression():
    """KL(q_s | p_s) of two Gaussian flows against int_s^1 (1 - t) / t E |v_hat - v|^2 dt.

    The expectation is over the student's own states. A thousandth against their relative distance.
    """
    p, q, nodes = (0.3, 0.5), (0.8, 2.0), unit_nodes(400)
    fields = [linear.gaussian(times(m), v)[0] for m, v in (p, q)]
    at, weights = (torch.from_numpy(v) for v in leggauss(100))

    def law(of, t):
        return (1 - t) * of[0], (1 - t) ** 2 * of[1] + t**2

    pairs = []
    for s in (0.05, 0.2, 0.7):
        t = s + (1 - s) * (at + 1) / 2
        mean, variance = law(q, t)
        x = (mean[:, None] + variance.sqrt()[:, None] * nodes).reshape(-1, 1)
        every = t.repeat_interleave(len(nodes))
        v, v_hat = (field(x, every) for field in fields)
        g = linvideo.matching_gradient(v, v_hat, every, "eq13")
        inside = (g * (v - v_hat)).reshape(len(t), -1).mean(1)
        integral = float(((1 - s) / 2 * weights * inside).sum())
        (m, v), (m_hat, v_hat) = law(p, times(s)), law(q, times(s))
        kl = float(0.5 * (v_hat / v + (m_hat - m) ** 2 / v - 1 + (v / v_hat).log()))
        pairs.append((1e-3, abs(integral / kl - 1)))
    return pairs


def undecided(regularizer):
    """How many of 30 r's are in (.1, .9) after a selection, for three sizes of the task's pull.

    With the paper's lambda, exponents and rounding. Half of one is added, so that none can be
    compared with none.
    """
    with mock.patch.object(linear, "regularizer", regularizer):
        of = (
            linear.selected(linvideo.constraint, 0.01, (20.0, 2.0), c) for c in (1e-5, 1e-4, 1e-3)
        )
        return [0.5 + count for count, _ in of]


def regulariser_decides():
    without = undecided(lambda r, alpha: 0 * r.sum())
    return list(zip(undecided(linvideo.regularizer), without))


def flops(function, *inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def linear_in_tokens():
    """FLOPs at twice the tokens over FLOPs: linear attention's against softmax attention's."""
    pairs, softmax = [], lambda q, k, v: (q @ k.mT).softmax(-1) @ v
    for n in (256, 1024, 2048):
        shapes = [torch.ones(1, 1, size, 16) for size in (n, 2 * n)]
        ratio = [
            flops(attend, *[shapes[1]] * 3) / flops(attend, *[shapes[0]] * 3)
            for attend in (linear_attention_reference, softmax)
        ]
        pairs.append(tuple(ratio))
    return pairs


# ---- MDT-dist ------------------------------------------------------------------------------------


def transport_identity():
    """phi + t dphi/dt of a Gaussian's exact transport against the velocity (Eq. 12)."""
    x, t = transport.marginal_points(), transport.T
    v = transport.gaussian_velocity(x, t)
    d = mdt_dist.time_derivative(transport.gaussian_transport, x, t, v, {}, None)
    u = transport.gaussian_transport(x, t) + t[:, None] * d
    return [(off(a, b), 1e-6) for a, b in zip(u, v)]


def finite_difference():
    """The same with Eq. 14's difference, dt = .01: root mean square, and 1 % of v's."""
    x, t = transport.marginal_points(), transport.T
    v = transport.gaussian_velocity(x, t)
    d = mdt_dist.time_derivative(transport.gaussian_transport, x, t, v, {}, 0.01)
    error = transport.gaussian_transport(x, t) + t[:, None] * d - v
    size = v.square().mean(1).sqrt()
    return list(zip(error.square().mean(1).sqrt().tolist(), (0.01 * size).tolist()))


def transport_error_is_bounded():
    """Theorem 1 for wrong students of a Gaussian: |t phi - transport|^2 against M t^2 at t = 1.

    M is the largest |u - v|^2 on the way of each trajectory, by an exact derivative.
    """
    pairs, ways = [], torch.linspace(1e-3, 1, 200, dtype=torch.float64)
    z = normal(200, 1)
    for e, w in ((0.1, 1.0), (0.3, 3.0), (1.0, 9.0)):

        def wrong(x, t, e=e, w=w):
            bend = torch.sin(w * t[:, None]) * torch.tanh(x)
            return transport.gaussian_transport(x, t) + e * bend

        largest = torch.zeros(len(z), dtype=torch.float64)
        for t in ways:
            t = t.repeat(len(z))
            mean, std = transport.marginal(z, t)
            x = mean + std * z  # the trajectory of z
            v = transport.gaussian_velocity(x, t)
            d = mdt_dist.time_derivative(wrong, x, t, v, {}, None)
            residual = (wrong(x, t) + t[:, None] * d - v).square()[:, 0]
            largest = torch.maximum(largest, residual)
        one = torch.ones(len(z), dtype=torch.float64)
        error = (wrong(z, one) - transport.gaussian_transport(z, one)).square()
        pairs.append((float(error.mean()), float(largest.max())))
    return pairs


def errors_shrink(law):
    """0 against the least share of itself by which velocity matching moves an error of phi back."""
    gram, form, _ = transport.forms(law)
    return [(0.0, transport.least_eigenvalue(form, gram))]


def errors_shrink_uniform():
    return errors_shrink("uniform")


def errors_shrink_logit_normal():
    return errors_shrink("logit_normal")


def unlike_consistency():
    """A hundredth against 1 - cosine of consistency distillation's gradient and VM's, by level."""
    W = normal(3, 3, seed=8).requires_grad_()
    net = lambda x, t: torch.tanh(x @ W + 2 * t[:, None])  # noqa: E731
    x0, z, v = (normal(50, 3, seed=i) for i in range(3))
    pairs = []
    for level in (0.3, 0.5, 0.8):
        t = torch.full((50,), level, dtype=torch.float64)
        batch = net, lambda x, t: v, x0, z, t, {}, {}, 1, 0.01
        ours, other = (
            torch.autograd.grad(loss(*batch)[0], W)[0].flatten()
            for loss in (mdt_dist.velocity_matching, mdt_dist.consistency_distillation)
        )
        cosine = torch.nn.functional.cosine_similarity(ours, other, 0)
        pairs.append((0.01, 1 - float(cosine)))
    return pairs


def distillation_is_the_kl():
    """1 - cosine of Eq. 17's gradient and the KL's in (a, b), phi(z) = a z + b, by level.

    The student at (x_t, t) is the velocity of its own samples' law, as the paper assumes.
    """
    M, S, pairs, nodes = transport.M, transport.S, [], unit_nodes(12)
    z, z2 = (v.reshape(-1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    for t in (0.1, 0.5, 0.9):
        law = times(0.35, -0.2).requires_grad_(True)
        a, b = law
        mean, var = -(1 - t) * b, ((1 - t) * (1 - a)) ** 2 + t**2
        m, s2 = (1 - t) * M, ((1 - t) * S) ** 2 + t**2
        kl = 0.5 * (var / s2 + (mean - m) ** 2 / s2 - 1 - (var / s2).log())

        def student(x, time, a=a, b=b):
            if (time == 1).all():
                return a * x + b
            return transport.gaussian_velocity(x, time, -b, 1 - a)  # of its own samples' law

        level = torch.full((len(z),), t, dtype=torch.float64)
        batch = student, transport.gaussian_velocity, z, z2, level, {}, {}, 1
        none = lambda student, x_t, *rest: 0 * x_t  # noqa: E731  # so that u is that velocity
        with mock.patch.object(mdt_dist, "time_derivative", none):
            loss, _ = mdt_dist.velocity_distillation(*batch)
        got, want = (torch.autograd.grad(f, law)[0] for f in (loss, kl))
        cosine = torch.nn.functional.cosine_similarity(got, want, 0)
        pairs.append((1 - float(cosine), 1e-6))
    return pairs


# ---- LFM -----------------------------------------------------------------------------------------


def bound(cases):
    return [(r.w2, r.printed) for r in (latent_bound.terms(**case) for case in cases)]


def bound_of_pca():
    return bound(latent_bound.PCA[1:])  # the first has no error, and equality


def bound_of_biased_decoder():
    return bound([latent_bound.COUNTEREXAMPLE])


def guided_velocity_is_guided_noise():
    """Guidance of the velocity against guidance of eps, x0 and score, on a mixture."""
    net, t, label = flows.Mixture(), flows.times(), torch.arange(9) % 3
    z, null, pairs = normal(9, 1), torch.full((9,), 3), []
    guided = latent_fm.guided_velocity(net, z, t, label, 3, 2.5)
    v_c, v_u = net(z, t, label), net(z, t, null)
    for kind in ("eps", "x0", "score"):
        c, u = (
            from_x0_eps(kind, *to_x0_eps(v, "flow_v", z, 1 - t, t), 1 - t, t) for v in (v_c, v_u)
        )
        x0, eps = to_x0_eps(guide(c, u, 2.5), kind, z, 1 - t, t)
        pairs.append((off(from_x0_eps("flow_v", x0, eps, 1 - t, t), guided), 1e-6))
    return pairs


@functools.cache
def guided_samples():
    """Of class 1 of a mixture, from the exact velocity: {gamma: W2^2 to p(x0 | c), spread}."""
    net, level = flows.Mixture(), (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    z, label, found = torch.special.ndtri(level)[:, None], torch.full((200,), 1), {}
    want = net.means[1] + net.stds[1] * z
    for gamma in (0.0, 1.0, 1.5, 2.0):
        x = latent_fm.sample(net, z, label, 64, gamma).sort(0).values
        found[gamma] = float((x - want).square().mean()), float(x.std())
    return found


def guidance_narrows():
    found = guided_samples()
    return [(found[high][1], found[low][1]) for low, high in ((0.0, 1.0), (1.0, 1.5), (1.5, 2.0))]


def guidance_comes_nearer():
    found = guided_samples()
    return [(found[gamma][0], found[1.0][0]) for gamma in (1.5, 2.0)]


def latents_are_cheaper():
    """Ten times the operations on the world's latents against those on its pixels."""
    latent, pixel = (latent_claims.network(shape) for shape in ((12, 8, 8), (3, 32, 32)))
    return [(10 * latent_claims.flops(latent), latent_claims.flops(pixel))]


def latents_need_fewer_calls():
    """Evaluations of Dormand-Prince on the Gaussian with the data's moments: latents, pixels.

    Three noises; 2,000 shapes.
    """
    world = load_world("shapes")
    x = world.data(2000, 31)[0]
    spaces = world.space.to_latents(x), x
    counts = [latent_claims.gaussian_evaluations(a, (1e-5,), seeds=(0, 1, 2)) for a in spaces]
    return list(zip(*(count[1e-5] for count in counts)))
