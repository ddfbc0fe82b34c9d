"""linvideo.py against the paper's formulas (2510.08318): mixed attention, count and regulariser of r, conversion, scores of flows, Eq. 11 to 13, the bank's
trajectories."""

import argparse
import copy
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY_WAN, dit_inputs, fill, perturbed, small_dit
from test_dmd_math import close, normal

from kernels import linear_attention as kernels
from kernels.linear_attention import LinearAttention, features, use_linear_attention
from linvideo import (
    MixedAttention,
    chosen_layers,
    constraint,
    convert,
    flow_matching_loss,
    matching_gradient,
    matching_loss,
    mix_attention,
    regularizer,
    smallest,
    trajectory,
)
from models.diffusion import Flow, guide, sample_teacher, step_grid
from models.files import UserError
from models.networks import dit, network_from_config, wan
from models.networks.wan import WanTransformer3DModel
from models.plumbing.data import Bank

MAPS = kernels.FEATURE_MAPS[:-1]


def dit_case():
    net = perturbed(small_dit(depth=4), std=0.2)
    x, t, label = dit_inputs(net)
    return net, lambda n: n(x, t, label)


def wan_case():
    net = fill(WanTransformer3DModel(**{**TINY_WAN, "num_layers": 4}))
    x, text = (
        normal(3, 4, 2, 4, 6, dtype=torch.float32),
        normal(3, 5, 16, seed=1, dtype=torch.float32),
    )
    return net, lambda n: n(x, torch.tensor([0.2, 0.7, 1.0]), text)


every_net = pytest.mark.parametrize("case", [dit_case, wan_case], ids=["dit", "wan"])


def qkv(B=2, N=7, H=3, D=4, dtype=torch.float64):
    return tuple(normal(B, N, H, D, seed=s, dtype=dtype) for s in (1, 2, 3))


def linear_layer(feature_map="hedgehog", heads=3, dim=4, random=True):
    layer = LinearAttention(heads, dim, feature_map).double()
    if random:
        with torch.no_grad():
            for seed, p in enumerate(layer.parameters()):
                p.copy_(normal(*p.shape, seed=10 + seed))
    return layer


def mixed_layer(r, feature_map="hedgehog"):
    layer = MixedAttention(dit.attention, 3, 4, feature_map, r).double()
    layer.linear, layer.r.data = linear_layer(feature_map), torch.tensor(r, dtype=torch.float64)
    return layer


# ---- mixed attention ---------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("feature_map", MAPS)
def test_r_one_is_the_teacher_bit_for_bit(case, feature_map):
    """While mixing and once fixed to softmax, whatever the linear branch's weights; r below one is another function."""
    net, call = case()
    with torch.no_grad():
        want, student = call(net), copy.deepcopy(net)
        mixed = mix_attention(student, feature_map, 1.0)
        for i, m in enumerate(mixed):
            for p in m.linear.parameters():
                p.copy_(normal(*p.shape, seed=i))
        assert torch.equal(call(student), want)
        mixed[1].r.fill_(0.9)
        assert not torch.allclose(call(student), want, rtol=1e-4, atol=1e-5)
        for m in mixed:
            m.fix(linear=False)
        assert torch.equal(call(student), want)
        mixed[2].fix(linear=True)
        assert not torch.allclose(call(student), want, rtol=1e-4, atol=1e-5)


def test_r_one_is_softmax_in_every_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        q, k, v = qkv(dtype=dtype)
        out = MixedAttention(dit.attention, 3, 4, "hedgehog", 1.0)(q, k, v)
        assert out.dtype == dtype and torch.equal(out, dit.attention(q, k, v))
        assert MixedAttention(dit.attention, 3, 4, "hedgehog", 0.3)(q, k, v).dtype == dtype


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("r", [0.0, 0.25, 0.9, 1.0])
def test_mixture_and_its_gradient(r, feature_map):
    """Eq. 8, and d/dr is softmax minus linear, contracted with the incoming gradient; each branch's own gradient is its share."""
    layer, (q, k, v), up = mixed_layer(r, feature_map), qkv(), normal(2, 7, 3, 4, seed=5)
    soft, linear = (
        F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v))).transpose(1, 2),
        layer.linear(q, k, v),
    )
    out = layer(q, k, v)
    close(out, r * soft + (1 - r) * linear, 1e-12)
    (out * up).sum().backward()
    close(layer.r.grad, ((soft - linear) * up).sum().detach(), 1e-10)
    want = (
        torch.autograd.grad(((1 - r) * linear * up).sum(), list(layer.linear.parameters()))
        if feature_map == "hedgehog"
        else []
    )
    for p, g in zip(layer.linear.parameters(), want, strict=True):
        close(p.grad, g, 1e-12)


@pytest.mark.parametrize("linear", [True, False])
def test_a_fixed_layer_calls_one_branch(linear):
    """The other is not called; r is 0 or 1, has no gradient and gets none; state_dict knows that it is decided."""
    layer, (q, k, v), calls = mixed_layer(0.4), qkv(), []
    layer.softmax = lambda *a: calls.append("softmax") or dit.attention(*a)
    layer.linear.register_forward_hook(lambda *a: calls.append("linear"))
    layer(q, k, v).sum().backward()
    assert sorted(calls) == ["linear", "softmax"] and layer.r.grad is not None and not layer.decided
    layer.fix(linear)
    assert (
        layer.r == 1 - linear
        and not layer.r.requires_grad
        and layer.r.grad is None
        and layer.state_dict()["decided"]
    )
    calls.clear()
    assert torch.equal(layer(q, k, v), layer.linear(q, k, v) if linear else dit.attention(q, k, v))
    assert set(calls) == ({"linear"} if linear else {"softmax"})


@every_net
def test_mixing_touches_self_attention_alone(case):
    """One r and one identity W pair per layer, nothing shared between layers; Wan's attention to the text stays a function."""
    net, _ = case()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    mixed = mix_attention(net, "hedgehog", 0.8)
    assert len(mixed) == 4 and all(
        place.attend is m for place, m in zip(net.self_attentions, mixed)
    )
    new = {k: v for k, v in net.state_dict().items() if k not in before}
    assert (
        len(new) == 4 * 4
        and all(".attend." in k for k in new)
        and all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    )
    assert len({v.data_ptr() for v in net.parameters()}) == len(list(net.parameters()))
    for m in mixed:
        assert (
            m.r.shape == ()
            and m.r.item() == pytest.approx(0.8)
            and m.r.requires_grad
            and not m.decided
        )
        for w in (m.linear.w_q, m.linear.w_k):
            assert torch.equal(w, torch.eye(net.head_dim).expand(net.heads, -1, -1))
    if isinstance(net, WanTransformer3DModel):
        assert all(block.attn2.attend is wan.attention for block in net.blocks)


# ---- linear attention, as the layer that a student keeps ------------------------------------------------------------------


@pytest.mark.parametrize("feature_map", ["hedgehog", "softmax", "elu"])
def test_weights_of_a_query_sum_to_one(feature_map):
    """v = 1 gives 1, values stay inside each channel's range, and it is (A / row sum) v with A = phi(q) phi(k)^T."""
    layer, (q, k, v) = linear_layer(feature_map), qkv()
    close(layer(q, k, torch.ones_like(v)), torch.ones(2, 7, 3, 4), 1e-13)
    out = layer(q, k, v)
    assert (out <= v.amax(1, keepdim=True) + 1e-12).all() and (
        out >= v.amin(1, keepdim=True) - 1e-12
    ).all()
    A = torch.einsum(
        "bnhf,bmhf->bhnm", features(q, feature_map, layer.w_q), features(k, feature_map, layer.w_k)
    )
    assert (A > 0).all()
    close(out, torch.einsum("bhnm,bmhd->bnhd", A / A.sum(-1, keepdim=True), v), 1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
def test_order_of_keys_does_not_matter(feature_map):
    """Keys with their values in another order: the same; values alone: not. Queries in another order: outputs in that order."""
    layer, (q, k, v), order = linear_layer(feature_map), qkv(), torch.tensor([3, 0, 6, 2, 5, 1, 4])
    out = layer(q, k, v)
    close(layer(q, k[:, order], v[:, order]), out, 1e-12)
    close(layer(q[:, order], k, v), out[:, order], 1e-12)
    assert not torch.allclose(layer(q, k, v[:, order]), out, rtol=1e-2)


def test_hedgehog_by_hand():
    """Eq. 6: two softmaxes, each sums to 1; W = 0 is mean(v); (W_q, W_k) -> -(W_q, W_k) changes nothing, one of them does; W starts as the identity,
    with queries and keys of their own."""
    layer, (q, k, v) = linear_layer(), qkv()
    phi = features(q, "hedgehog", layer.w_q)
    u = torch.einsum("bnhd,hde->bnhe", q, layer.w_q)
    close(phi, torch.cat([u.softmax(-1), (-u).softmax(-1)], -1), 1e-13)
    (
        close(phi[..., :4].sum(-1), torch.ones(2, 7, 3), 1e-13),
        close(phi[..., 4:].sum(-1), torch.ones(2, 7, 3), 1e-13),
    )
    out = layer(q, k, v)
    with torch.no_grad():
        layer.w_q.neg_()
        assert not torch.allclose(layer(q, k, v), out, rtol=1e-2)
        layer.w_k.neg_()
        close(layer(q, k, v), out, 1e-12)
        layer.w_q.zero_(), layer.w_k.zero_()
        close(layer(q, k, v), v.mean(1, keepdim=True).expand_as(v), 1e-13)
    start, own = linear_layer(random=False), kernels.linear_attention(q, k, v)  # no W: the identity
    close(start(q, k, v), own, 1e-13)
    with torch.no_grad():
        start.w_k.mul_(2)
    assert not torch.allclose(start(q, k, v), own, rtol=1e-2)
    assert [name for name, _ in start.named_parameters()] == ["w_q", "w_k"] and not list(
        linear_layer("elu").parameters()
    )


def test_refused_linear_layers():
    net = small_dit()
    for layers in ([3], [-1], [0, 0], [True], [1.0], ["1"]):
        with pytest.raises(ValueError, match="are not different layers of 0 to 2"):
            use_linear_attention(net, layers)
        with pytest.raises(ValueError, match="linear_layers"):
            small_dit(linear_layers=layers)
    for feature_map in ("none", "taylor"):
        with pytest.raises(ValueError, match="feature_map must be one of"):
            small_dit(linear_layers=[0], feature_map=feature_map)
    assert "linear_layers" not in net.config and net.blocks[0].attend is dit.attention


# ---- how many layers, and which ------------------------------------------------------------------------------------------


def r_of(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def gradient(f, r):
    return torch.autograd.grad(f, r)[0]


@pytest.mark.parametrize(
    "r, linear",
    [
        ([0.9, 0.6, 0.51], 0),
        ([0.9, 0.49, 0.6], 1),
        ([0.1, 0.2, 0.8], 2),
        ([0.0, 0.3, 0.4], 3),
        ([1.0, 0.0, 1.0], 1),
    ],
)
@pytest.mark.parametrize("target", [1, 2, 3])
def test_constraint_counts_linear_layers(r, linear, target):
    """Value by rounding, gradient -2 (count - target) in every layer alike (straight through). As printed, sum round(r) - target, it would count
    the others: another value, and zero elsewhere. Without the straight-through it has no gradient at all."""
    r = r_of(*r)
    value = constraint(r, target)
    assert value.item() == (linear - target) ** 2
    close(gradient(value, r), torch.full((3,), -2.0 * (linear - target)), 1e-13)
    printed = (r.detach().round().sum() - target) ** 2
    assert (printed == value) == ((3 - linear - target) ** 2 == (linear - target) ** 2)
    assert not (1 - r.detach().round()).requires_grad


def test_constraint_pulls_the_count_to_the_target():
    """From all softmax descent lowers every r, from all linear it raises every r, and at the target it does nothing; flipped, it would run away."""
    for start, target, direction in ((0.9, 3, 1), (0.1, 1, -1), (0.1, 4, 0)):
        r = r_of(*[start] * 4)
        assert (gradient(constraint(r, target), r).sign() == direction).all()
    r = r_of(0.9, 0.8, 0.7, 0.6)
    for _ in range(100):
        r = (r - 0.01 * gradient(constraint(r, 2), r)).detach().requires_grad_(True)
    assert (
        smallest(r.detach(), 4) == [0, 1, 2, 3] and 1 <= (r < 0.5).sum() <= 3
    )  # about the target, where rounding flips


@pytest.mark.parametrize("alpha", [1.5, 2.0, 4.0, 20.0])
def test_regularizer(alpha):
    """Eq. 10: 0 at 0 and 1, N at one half, symmetric; alpha = 2 is 4 sum r (1 - r). Its gradient: none at one half, -2 alpha at 1, +2 alpha at 0; for
    large alpha flat in between."""
    (
        close(regularizer(r_of(0, 1, 1), alpha).detach(), 0.0, 1e-13),
        close(regularizer(r_of(0.5, 0.5, 0.5), alpha).detach(), 3.0, 1e-13),
    )
    r = r_of(0.1, 0.35, 0.8)
    value = regularizer(r, alpha)
    (
        close(value.detach(), sum(1 - abs(2 * x - 1) ** alpha for x in (0.1, 0.35, 0.8)), 1e-13),
        close(regularizer(1 - r, alpha).detach(), value.detach(), 1e-13),
    )
    if alpha == 2:
        close(value.detach(), (4 * r * (1 - r)).sum().detach(), 1e-13)
    r = r_of(0, 0.5, 1)
    close(gradient(regularizer(r, alpha), r), torch.tensor([2 * alpha, 0, -2 * alpha]), 1e-13)
    r = r_of(0.7, 0.3)
    g = gradient(regularizer(r, alpha), r)
    close(g[0], -g[1], 1e-12)
    assert g[0] < 0 < g[1] and (g[1] < 1e-5) == (alpha == 20)


def test_when_a_layer_can_leave_one():
    """At r = 1 the sum of both pulls r down exactly where the target is above alpha: why alpha's start belongs below the target."""
    for target, alpha in ((16, 20.0), (16, 12.0), (3, 4.0), (4, 3.5)):
        r = r_of(*[1.0] * 30)
        close(
            gradient(constraint(r, target) + regularizer(r, alpha), r),
            torch.full((30,), 2 * target - 2 * alpha),
            1e-12,
        )


def test_smallest():
    """Exactly `target`, in order of the layers, of equal ones the first, whatever kind of numbers."""
    r = [0.5, 0.2, 0.9, 0.2, 0.2, 0.5]
    assert [smallest(r, n) for n in range(7)] == [
        [],
        [1],
        [1, 3],
        [1, 3, 4],
        [0, 1, 3, 4],
        [0, 1, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
    ]
    assert smallest(torch.tensor(r), 4) == smallest([torch.tensor(x) for x in r], 4) == [0, 1, 3, 4]
    assert (
        smallest([1.0] * 5, 2) == [0, 1]
        and smallest([0.3, 0.2, 0.1], 2) == [1, 2]
        and all(type(i) is int for i in smallest(torch.tensor(r), 3))
    )


def choose(count, *select, target=None, seed=0):
    return chosen_layers(
        argparse.Namespace(select=list(select), target_layers=target, seed=seed), count
    )


def test_chosen_layers():
    assert (
        choose(8, "learned") == (4, None)
        and choose(9, "learned") == (4, None)
        and choose(1, "learned") == (1, None)
    )
    assert choose(8, "learned", target=8) == (8, None)
    assert (
        choose(8, "first", target=3) == (3, [0, 1, 2])
        and choose(8, "last", target=3) == (3, [5, 6, 7])
        and choose(8, "last", target=8)[1] == list(range(8))
    )
    assert (
        choose(8, "uniform") == (4, [1, 3, 5, 7])
        and choose(30, "uniform", target=3) == (3, [5, 15, 25])
        and choose(3, "uniform", target=3)[1] == [0, 1, 2]
    )
    assert (
        choose(8, "6", "1", "5") == (3, [1, 5, 6])
        and choose(8, "7") == (1, [7])
        and choose(8, "0", "3", target=2) == (2, [0, 3])
    )
    drawn = [choose(8, "random", target=3, seed=seed)[1] for seed in range(12)]
    assert (
        all(len(set(x)) == 3 and x == sorted(x) and 0 <= x[0] and x[-1] < 8 for x in drawn)
        and len(set(map(tuple, drawn))) > 6
    )
    assert choose(8, "random", target=3, seed=5)[1] == drawn[5] and set(sum(drawn, [])) == set(
        range(8)
    )


@pytest.mark.parametrize(
    "select, target, says",
    [
        (["8"], None, "different layers of 0 to 7"),
        (["1", "1"], None, "--select 1 1: give one of learned, first"),
        (["-1"], None, "layers of 0 to 7"),
        (["first", "2"], None, "--select first 2"),
        (["best"], None, "--select best"),
        (["1.0"], None, "--select 1.0"),
        (["\u00b2"], None, "--select"),
        (["1", "2"], 3, "names 2 layer(s), --target_layers says 3"),
        (
            ["learned"],
            9,
            "--target_layers 9: this network has 8 self-attention layer(s): give 1 to 8",
        ),
        (["first"], 0, "--target_layers 0"),
    ],
)
def test_refused_choices(select, target, says):
    with pytest.raises(UserError) as error:
        choose(8, *select, target=target)
    assert says in str(error.value)


# ---- conversion ----------------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("layers", [[1, 3], [0], [0, 1, 2, 3]], ids=str)
def test_convert(case, layers, monkeypatch):
    """The mixed network with these r at 0 and the others at 1: one branch each, counted in calls; no weight of the other left; the config builds the
    same network again; the mixed network is as it was."""
    net, call = case()
    original = copy.deepcopy(net)
    mixed = mix_attention(net, "hedgehog", 0.7)
    with torch.no_grad():
        for i, m in enumerate(mixed):
            for s, p in enumerate(m.linear.parameters()):
                p.copy_(normal(*p.shape, seed=20 + 2 * i + s))
    before, out = {k: v.clone() for k, v in net.state_dict().items()}, call(net)
    student = convert(net, layers, "hedgehog")
    assert (
        all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        and torch.equal(call(net), out)
        and "linear_layers" not in net.config
    )
    assert student.config == {**original.config, "linear_layers": layers, "feature_map": "hedgehog"}
    state, places = (
        student.state_dict(),
        [name for name, m in student.named_modules() if isinstance(m, LinearAttention)],
    )
    assert len(places) == len(layers) and not any(
        isinstance(m, MixedAttention) for m in student.modules()
    )
    assert set(state) == {
        *original.state_dict(),
        *(f"{p}.{w}" for p in places for w in ("w_q", "w_k")),
    }
    assert not {v.data_ptr() for v in state.values()} & {
        v.data_ptr() for v in net.state_dict().values()
    }
    for i, m in enumerate(mixed):
        m.fix(linear=i in layers)
    calls, kernel, softmax = [], kernels.linear_attention, F.scaled_dot_product_attention
    monkeypatch.setattr(
        kernels, "linear_attention", lambda *a: calls.append("linear") or kernel(*a)
    )
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *a, **k: calls.append("softmax") or softmax(*a, **k),
    )
    got = call(student)
    if isinstance(
        student, WanTransformer3DModel
    ):  # after each self-attention comes the one to the text
        assert set(calls[1::2]) == {"softmax"}
        calls = calls[::2]
    assert calls == ["linear" if i in layers else "softmax" for i in range(4)]
    assert torch.equal(got, call(net))
    again = network_from_config({"_class_name": type(net).__name__, **student.config}, "test")
    again.load_state_dict(state)
    assert torch.equal(call(again), got)


@every_net
def test_converted_features_other_than_hedgehog(case):
    """They have no weights, and are recorded."""
    net, call = case()
    mix_attention(net, "elu", 0.7)[2].fix(linear=True)
    student = convert(net, [2], "elu")
    assert (
        student.config["feature_map"] == "elu"
        and student.self_attentions[2].attend.feature_map == "elu"
    )
    assert not any(".attend." in k for k in student.state_dict())
    for i in (0, 1, 3):
        net.self_attentions[i].attend.fix(linear=False)
    assert torch.equal(call(student), call(net))


# ---- scores of flows, Eq. 12 and 13 --------------------------------------------------------------------------------------

TIMES = torch.tensor([0.02, 0.3, 0.5, 0.8, 0.97], dtype=torch.float64)


def gaussian(mean, variance):
    """Data N(mean, variance) -> its velocity and score at (x (B, d), t (B,))."""

    def moments(x, t):
        t = t[:, None]
        away, total = x - (1 - t) * mean, (1 - t) ** 2 * variance + t**2
        return t, away, total

    def velocity(x, t):
        t, away, total = moments(x, t)
        return t / total * away - (
            mean + (1 - t) * variance / total * away
        )  # E[eps | x] - E[x0 | x]

    def score(x, t):
        _, away, total = moments(x, t)
        return -away / total

    return velocity, score


TEACHER, STUDENT = (
    gaussian(torch.tensor([0.3, -1.0], dtype=torch.float64), 0.5),
    gaussian(torch.tensor([0.8, -1.5], dtype=torch.float64), 2.0),
)


def test_score_of_a_flow():
    x = normal(5, 2)
    for velocity, score in (TEACHER, STUDENT):
        close(
            score(x, TIMES),
            -(x + (1 - TIMES[:, None]) * velocity(x, TIMES)) / TIMES[:, None],
            1e-11,
        )


def test_matching_gradient_is_a_difference_of_scores():
    """s-hat - s of two Gaussians: the student's minus the teacher's. Signs, the missing weight and its inverse are something else."""
    x = normal(5, 2, seed=1)
    v_teacher, v_student = TEACHER[0](x, TIMES), STUDENT[0](x, TIMES)
    want, bare = STUDENT[1](x, TIMES) - TEACHER[1](x, TIMES), v_teacher - v_student
    close(matching_gradient(x, v_teacher, v_student, TIMES), want, 1e-11)
    ratio = (TIMES / (1 - TIMES))[:, None]
    for wrong in (-want, bare, ratio * bare, bare / TIMES[:, None]):
        assert not torch.allclose(wrong, want, rtol=0.05)
    close(
        matching_gradient(x[2:3], v_teacher[2:3], v_student[2:3], TIMES[2:3]), want[2:3], 1e-11
    )  # a sample's own time


def test_matching_gradient_pulls_samples_to_the_teacher():
    """x - g of a shifted Gaussian of the same width moves from the student's mean towards the teacher's, and by gradient descent arrives there."""
    t, mean = torch.tensor([0.4], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    teacher = gaussian(torch.tensor([1.0]), 1.0)[0]
    for _ in range(
        200
    ):  # the student's mean, from which its velocity follows; its sample at the mean of q_t
        student, x = gaussian(mean, 1.0)[0], 0.6 * mean
        mean = mean - matching_gradient(x, teacher(x, t), student(x, t), t)
    close(mean, torch.ones(1, 1), 1e-6)


def test_weights_of_the_matching_gradient():
    """unit: bare velocities; dmd: of x0 over its mean distance, sample by sample, so of mean size one whatever the scale; equal: zero, not NaN."""
    x, a, b = normal(5, 3, 4), normal(5, 3, 4, seed=1), normal(5, 3, 4, seed=2)
    t = TIMES[:, None, None]
    close(matching_gradient(x, a, b, TIMES, "eq13"), (1 - t) / t * (a - b), 1e-13)
    close(matching_gradient(x, a, b, TIMES, "unit"), a - b, 1e-13)
    x0_student, x0_teacher = x - t * b, x - t * a
    got = matching_gradient(x, a, b, TIMES, "dmd")
    close(
        got,
        (x0_student - x0_teacher) / (x0_student - x0_teacher).abs().mean((1, 2), keepdim=True),
        1e-10,
    )
    (
        close(matching_gradient(x, 7 * a, 7 * b, TIMES, "dmd"), got, 1e-12),
        close(got.abs().mean((1, 2)), torch.ones(5), 1e-12),
    )
    for weight in ("eq13", "unit", "dmd"):
        assert torch.equal(matching_gradient(x, a, a, TIMES, weight), torch.zeros_like(x))
        a_, b_ = a.clone().requires_grad_(True), b.clone().requires_grad_(True)
        assert not matching_gradient(x, a_, b_, TIMES, weight).requires_grad


def slope(f, x):
    x = x.clone().requires_grad_(True)
    loss = f(x)
    return torch.autograd.grad(loss, x)[0], loss.item()


def test_matching_loss_has_gradient_g():
    """g / numel and 1/2 mean g^2. The well-known wrong variants differ."""
    x, g = normal(4, 3, 2), normal(4, 3, 2, seed=1)
    got, value = slope(lambda x: matching_loss(x, g), x)
    close(got, g / g.numel(), 1e-12)
    assert value == pytest.approx(0.5 * float(g.square().mean()), rel=1e-12)
    wrong = {
        "no stop-gradient": lambda x: 0.5 * (x - (x - g)).square().mean(),
        "sign": lambda x: 0.5 * (x - (x + g).detach()).square().mean(),
        "no half": lambda x: (x - (x - g).detach()).square().mean(),
        "sum": lambda x: 0.5 * (x - (x - g).detach()).square().sum(),
    }
    for name, f in wrong.items():
        assert not torch.allclose(slope(f, x)[0], got, rtol=0.05), name
    assert not torch.allclose(
        slope(lambda x: matching_loss(x, x * g), x)[0],
        torch.autograd.functional.jvp(lambda x: x * g, x, g)[1],
    )  # g is a constant


class Tiny(torch.nn.Module):
    """A smooth velocity field, float64."""

    def __init__(self, seed, width=8):
        super().__init__()
        self.a, self.b = (
            torch.nn.Parameter(normal(*shape, seed=seed + i))
            for i, shape in enumerate([(4, width), (width, 3)])
        )
        self.calls = []

    def forward(self, x, t, **cond):
        self.calls.append(types.SimpleNamespace(x=x, t=t, cond=cond, graph=torch.is_grad_enabled()))
        return torch.tanh(torch.cat([x, t[:, None]], 1) @ self.a) @ self.b


def near(net, distance=0.3):
    other = copy.deepcopy(net)
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            p += distance * normal(*p.shape, seed=50 + i)
    return other


def anytime(student, teacher, x, t, s, weight="eq13", through=False):
    """Gradient in the student's weights of one step's ADM as linvideo.py composes it -> [tensors], loss."""
    x_hat = x + (s - t)[:, None] * student(x, t)
    with torch.set_grad_enabled(through):
        v_teacher, v_student = teacher(x_hat, s), student(x_hat, s)
    if through:  # the wrong variant: the score is differentiated too
        g = ((1 - s) / s)[:, None] * (v_teacher - v_student)
        loss = (x_hat * g).mean()
    else:
        loss = matching_loss(x_hat, matching_gradient(x_hat, v_teacher, v_student, s, weight))
    return torch.autograd.grad(loss, list(student.parameters())), loss.item()


def test_gradient_in_the_weights_is_equation_12():
    """E[(s-hat - s) dx_hat/dv dv/dtheta] with dx_hat/dv = s - t, by hand; not through the scores, not with dx_hat/dv = t - s or 1."""
    teacher = Tiny(0)
    student, x, t = (
        near(teacher),
        normal(6, 3, seed=9),
        torch.tensor([0.3, 0.5, 0.6, 0.8, 0.9, 1.0], dtype=torch.float64),
    )
    s = t - torch.tensor([0.1, 0.05, 0.3, 0.2, 0.01, 0.25], dtype=torch.float64)
    got, loss = anytime(student, teacher, x, t, s)
    with torch.no_grad():
        x_hat = x + (s - t)[:, None] * student(x, t)
        scores = [
            -(x_hat + (1 - s[:, None]) * net(x_hat, s)) / s[:, None] for net in (student, teacher)
        ]
    g = scores[0] - scores[1]

    def by_hand(factor):
        return torch.autograd.grad(
            student(x, t), list(student.parameters()), factor * g / g.numel()
        )

    for a, b in zip(got, by_hand((s - t)[:, None])):
        close(a, b, 1e-12)
    assert loss == pytest.approx(0.5 * float(g.square().mean()), rel=1e-10)
    for wrong in (
        by_hand((t - s)[:, None]),
        by_hand(1.0),
        anytime(student, teacher, x, t, s, through=True)[0],
    ):
        assert not torch.allclose(wrong[0], got[0], rtol=0.05)


@pytest.mark.parametrize("weight", ["eq13", "unit", "dmd"])
def test_no_gradient_where_student_is_teacher(weight):
    teacher = Tiny(0)
    grads, loss = anytime(
        copy.deepcopy(teacher),
        teacher,
        normal(6, 3),
        torch.full((6,), 0.8),
        torch.full((6,), 0.6),
        weight,
    )
    assert loss == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_small_steps_are_regression(t):
    """dt -> 0: direction of the regression onto the teacher's velocity at x_t (Eq. 7), length dt (1 - t) / t of it, both up to O(dt)."""
    teacher = Tiny(0)
    student, x, at = near(teacher), normal(16, 3, seed=9), torch.full((16,), t, dtype=torch.float64)
    error = student(x, at) - teacher(x, at).detach()
    mse = torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(0.5 * error.square().mean(), list(student.parameters()))
        ]
    )
    off = []
    for dt in (1e-1, 1e-2, 1e-3, 1e-4):
        adm = torch.cat([g.flatten() for g in anytime(student, teacher, x, at, at - dt)[0]])
        off.append(
            (
                1 - float(F.cosine_similarity(adm, mse, dim=0)),
                abs(float(adm.norm() / mse.norm()) / (dt * (1 - t) / t) - 1),
            )
        )
    cosines, ratios = zip(*off)
    assert (
        cosines[-1] < 1e-6
        and ratios[-1] < 2e-3
        and ratios[2] > 5 * ratios[3]
        and cosines[0] > 50 * cosines[2]
    )


# ---- trajectories of the teacher, training of the critic -----------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 3.0])
def test_trajectory_is_the_teachers_sampler(scale):
    """The states are those of Euler's sampler, guided; the velocity beside each is the conditional one there, and the unconditional one if guided."""
    net, z, grid = Tiny(0), normal(5, 3), step_grid(6, 2.0)
    velocity = lambda x, t, shift=0.0: Tiny.forward(net, x + shift, t)  # noqa: E731
    bank = trajectory(velocity, z, grid, {"shift": 0.5}, {"shift": -0.5}, scale)
    assert set(bank) == {"x", "v"} | ({"v_uncond"} if scale != 1 else set())
    assert all(v.shape == (5, 6, 3) and not v.requires_grad for v in bank.values()) and torch.equal(
        bank["x"][:, 0], z
    )
    x = z
    for i in range(6):
        t = torch.full((5,), grid[i], dtype=torch.float64)
        cond, uncond = velocity(x, t, 0.5).detach(), velocity(x, t, -0.5).detach()
        close(bank["x"][:, i], x, 1e-13), close(bank["v"][:, i], cond, 1e-13)
        if scale != 1:
            close(bank["v_uncond"][:, i], uncond, 1e-13)
        x = x + (grid[i + 1] - grid[i]) * guide(cond, uncond, scale)
    close(
        sample_teacher(
            velocity, Flow(), "flow_v", z, grid, {"shift": 0.5}, {"shift": -0.5}, scale, "euler"
        ),
        x,
        1e-12,
    )
    assert not any(call.graph for call in net.calls[:6])


def test_flow_matching_loss():
    """|v(x_t, t) - (eps - x0)|^2, mean, at x_t = (1 - t) x0 + t eps, with its condition; it differentiates the network."""
    net, x0, eps, t = Tiny(0), normal(5, 3), normal(5, 3, seed=1), TIMES
    loss = flow_matching_loss(net, x0, eps, t, {"label": 4})
    (call,) = net.calls
    close(call.x, (1 - t)[:, None] * x0 + t[:, None] * eps, 1e-14)
    assert torch.equal(call.t, t) and call.cond == {"label": 4}
    close(loss.detach(), (net(call.x, t).detach() - (eps - x0)).square().mean(), 1e-13)
    assert all(g.any() for g in torch.autograd.grad(loss, list(net.parameters())))
    velocity = gaussian(torch.zeros(3, dtype=torch.float64), 1.0)[
        0
    ]  # N(0, 1): the best field leaves E|eps - x0|^2 - E|v|^2 = 1 / (t^2 + (1 - t)^2)
    x0, eps, t = (
        normal(40000, 3),
        normal(40000, 3, seed=1),
        torch.full((40000,), 0.3, dtype=torch.float64),
    )
    best = flow_matching_loss(lambda x, t: velocity(x, t), x0, eps, t, {})
    assert (
        float(best) == pytest.approx(1 / (0.09 + 0.49), rel=0.02)
        and flow_matching_loss(lambda x, t: 1.1 * velocity(x, t), x0, eps, t, {}) > best
    )


# ---- the bank's files -----------------------------------------------------------------------------------------------------


def open_bank(folder, create=True, **changes):
    return Bank(str(folder), {**dict(seed=0, grid=[1.0, 0.5, 0.0]), **changes}, 7, 3, create)


def test_bank_gives_back_what_was_put_in(tmp_path):
    """Seven rows in files of three; each row and state where it belongs, as float32; missing files are counted and only those."""
    bank = open_bank(tmp_path / "bank")
    assert [list(bank.rows_of(part)) for part in range(3)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6],
    ] and bank.missing() == [0, 1, 2]
    x, v, index = normal(7, 2, 4).half(), normal(7, 2, 4, seed=1).half(), torch.arange(7) * 10
    for part in (2, 0):
        rows = list(bank.rows_of(part))
        bank.write(part, {"index": index[rows], "x": x[rows], "v": v[rows]})
    assert bank.missing() == [1]
    with pytest.raises(UserError, match="00001.safetensors does not exist"):
        bank.open()
    bank.write(1, {"index": index[3:6], "x": x[3:6], "v": v[3:6]})
    row, state = torch.tensor([6, 0, 3, 3, 2, 5]), torch.tensor([1, 0, 0, 1, 1, 0])
    for opened in (bank.open(), open_bank(tmp_path / "bank", create=False).open()):
        got = opened.rows(row, state)
        assert set(got) == {"index", "x", "v"} and got["x"].dtype == got["v"].dtype == torch.float32
        assert (
            torch.equal(got["index"], index[row])
            and torch.equal(got["x"], x[row, state].float())
            and torch.equal(got["v"], v[row, state].float())
        )


def test_bank_refuses_others_and_broken_files(tmp_path):
    bank = open_bank(tmp_path / "bank")
    for part in range(3):
        n = len(bank.rows_of(part))
        bank.write(
            part,
            {"index": torch.zeros(n).long(), "x": torch.zeros(n, 2, 4), "v": torch.zeros(n, 2, 4)},
        )
    with pytest.raises(
        UserError, match="was made with another seed, grid: name another folder, or remove this one"
    ):
        open_bank(tmp_path / "bank", grid=[1.0, 0.0], seed=1)
    with pytest.raises(UserError, match="another batch"):
        Bank(str(tmp_path / "bank"), dict(seed=0, grid=[1.0, 0.5, 0.0]), 7, 4, True)
    open_bank(tmp_path / "nothing", create=False)
    assert not (tmp_path / "nothing").exists()
    path = tmp_path / "bank" / "00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(UserError, match="00001.safetensors is truncated"):
        open_bank(tmp_path / "bank").open()
    for broken in (
        {"index": torch.zeros(2).long(), "x": torch.zeros(2, 2, 4), "v": torch.zeros(2, 2, 4)},
        {"index": torch.zeros(3).long(), "x": torch.zeros(3, 2, 4)},
    ):
        bank.write(1, broken)
        with pytest.raises(UserError, match="00001.safetensors is not a whole part of a bank"):
            open_bank(tmp_path / "bank").open()
