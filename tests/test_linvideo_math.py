"""linvideo.py against the formulas of its paper (2510.08318).

Mixed attention, the count and the regulariser of r, conversion, scores of flow models, Eq. 11 to
13 and their variants, and the bank's trajectories.
"""

import argparse
import copy
import math
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY_WAN, alone, dit_inputs, fill, perturbed, small_dit
from numpy.polynomial.hermite_e import hermegauss
from numpy.polynomial.legendre import leggauss
from test_dmd_math import close, normal

from kernels import linear_attention as kernels
from kernels.linear_attention import LinearAttention, features, use_linear_attention
from linvideo import (
    MixedAttention,
    adm_loss,
    adm_variant_loss,
    bank_states,
    chosen_layers,
    constraint,
    convert,
    dmd_baseline_loss,
    exponents,
    flow_matching_loss,
    matching_gradient,
    matching_loss,
    mix_attention,
    own_state,
    parse_args,
    r_is_held,
    regression_loss,
    regularizer,
    smallest,
    soft_constraint,
    step_to_x_hat,
    trajectory,
    wrong_selection,
)
from models.diffusion import Flow, guide, sample_teacher, step_grid
from models.draws import Draws
from models.files import UserError
from models.networks import network_from_config
from models.networks.layers import attention
from models.networks.wan import WanTransformer3DModel
from models.plumbing.data import Bank
from models.plumbing.flags import refuse

MAPS = kernels.FEATURE_MAPS[:-1]


def dit_case():
    net = perturbed(small_dit(depth=4), std=0.2)
    x, t, label = dit_inputs(net)
    return net, lambda n: n(x, t, label)


def wan_case():
    net = fill(WanTransformer3DModel(**{**TINY_WAN, "num_layers": 4}))
    x = normal(3, 4, 2, 4, 6, dtype=torch.float32)
    text = normal(3, 5, 16, seed=1, dtype=torch.float32)
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
    layer = MixedAttention(attention, 3, 4, feature_map, r).double()
    layer.linear = linear_layer(feature_map)
    layer.r.data = torch.tensor(r, dtype=torch.float64)
    return layer


# ---- mixed attention -----------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("feature_map", MAPS)
def test_r_one_is_the_teacher_bit_for_bit(case, feature_map):
    """While mixing and once fixed to softmax, whatever the weights of the linear attention.

    With an r below one, and with a layer fixed to linear attention, it is another function.
    """
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
        out = MixedAttention(attention, 3, 4, "hedgehog", 1.0)(q, k, v)
        assert out.dtype == dtype and torch.equal(out, attention(q, k, v))
        assert MixedAttention(attention, 3, 4, "hedgehog", 0.3)(q, k, v).dtype == dtype


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("r", [0.0, 0.25, 0.9, 1.0])
def test_mixture_and_its_gradient(r, feature_map):
    """Eq. 8. The derivative by r is softmax minus linear, contracted with the incoming gradient.

    The weights of the linear attention get its share of the gradient.
    """
    layer, (q, k, v), up = mixed_layer(r, feature_map), qkv(), normal(2, 7, 3, 4, seed=5)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    soft = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    linear = layer.linear(q, k, v)
    out = layer(q, k, v)
    close(out, r * soft + (1 - r) * linear, 1e-12)
    (out * up).sum().backward()
    close(layer.r.grad, ((soft - linear) * up).sum().detach(), 1e-10)
    parameters, want = list(layer.linear.parameters()), []
    assert bool(parameters) == (feature_map == "hedgehog")
    if parameters:
        want = torch.autograd.grad(((1 - r) * linear * up).sum(), parameters)
    for p, g in zip(parameters, want, strict=True):
        close(p.grad, g, 1e-12)


@pytest.mark.parametrize("linear", [True, False])
def test_a_fixed_layer_calls_one_branch(linear):
    """The other is not called; r is 0 or 1 and has no gradient; state_dict says that it is so."""
    layer, (q, k, v), calls = mixed_layer(0.4), qkv(), []
    layer.softmax = lambda *a: calls.append("softmax") or attention(*a)
    layer.linear.register_forward_hook(lambda *a: calls.append("linear"))
    layer(q, k, v).sum().backward()
    assert sorted(calls) == ["linear", "softmax"]
    assert layer.r.grad is not None and not layer.decided
    layer.fix(linear)
    assert layer.r == 1 - linear and not layer.r.requires_grad and layer.r.grad is None
    assert layer.state_dict()["decided"]
    calls.clear()
    want = layer.linear(q, k, v) if linear else attention(q, k, v)
    assert torch.equal(layer(q, k, v), want)
    assert set(calls) == ({"linear"} if linear else {"softmax"})


@every_net
def test_mixing_touches_self_attention_alone(case):
    """One r and one identity W pair for each layer, and no storage shared between layers.

    Wan's attention to the text stays a function.
    """
    net, _ = case()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    mixed = mix_attention(net, "hedgehog", 0.8)
    assert [place.attend for place in net.self_attentions] == mixed and len(mixed) == 4
    new = {k: v for k, v in net.state_dict().items() if k not in before}
    assert len(new) == 4 * 4 and all(".attend." in k for k in new)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    assert len({v.data_ptr() for v in net.parameters()}) == len(list(net.parameters()))
    for m in mixed:
        assert m.r.shape == () and m.r.item() == pytest.approx(0.8)
        assert m.r.requires_grad and not m.decided
        for w in (m.linear.w_q, m.linear.w_k):
            assert torch.equal(w, torch.eye(net.head_dim).expand(net.heads, -1, -1))
    if isinstance(net, WanTransformer3DModel):
        assert all(block.attn2.attend is attention for block in net.blocks)


# ---- linear attention, as the layer that a student keeps -----------------------------------------


@pytest.mark.parametrize("feature_map", ["hedgehog", "softmax", "elu"])
def test_weights_of_a_query_sum_to_one(feature_map):
    """v = 1 gives 1, and values stay inside each channel's range.

    It is (A / row sum) v with A = phi(q) phi(k)^T.
    """
    layer, (q, k, v) = linear_layer(feature_map), qkv()
    close(layer(q, k, torch.ones_like(v)), torch.ones(2, 7, 3, 4), 1e-13)
    out = layer(q, k, v)
    assert (out <= v.amax(1, keepdim=True) + 1e-12).all()
    assert (out >= v.amin(1, keepdim=True) - 1e-12).all()
    phi_q, phi_k = features(q, feature_map, layer.w_q), features(k, feature_map, layer.w_k)
    A = torch.einsum("bnhf,bmhf->bhnm", phi_q, phi_k)
    assert (A > 0).all()
    close(out, torch.einsum("bhnm,bmhd->bnhd", A / A.sum(-1, keepdim=True), v), 1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
def test_order_of_keys_does_not_matter(feature_map):
    """Keys and their values in another order change nothing, values alone do.

    Queries in another order give the outputs in that order.
    """
    layer, (q, k, v) = linear_layer(feature_map), qkv()
    order, out = torch.tensor([3, 0, 6, 2, 5, 1, 4]), layer(q, k, v)
    close(layer(q, k[:, order], v[:, order]), out, 1e-12)
    close(layer(q[:, order], k, v), out[:, order], 1e-12)
    assert not torch.allclose(layer(q, k, v[:, order]), out, rtol=1e-2)


def test_hedgehog_by_hand():
    """Eq. 6: two softmaxes, each of which sums to 1.

    W = 0 gives mean(v). (W_q, W_k) -> -(W_q, W_k) changes nothing, one sign alone does. W starts as
    the identity, with one for queries and one for keys.
    """
    layer, (q, k, v) = linear_layer(), qkv()
    phi = features(q, "hedgehog", layer.w_q)
    u = torch.einsum("bnhd,hde->bnhe", q, layer.w_q)
    close(phi, torch.cat([u.softmax(-1), (-u).softmax(-1)], -1), 1e-13)
    close(phi[..., :4].sum(-1), torch.ones(2, 7, 3), 1e-13)
    close(phi[..., 4:].sum(-1), torch.ones(2, 7, 3), 1e-13)
    out = layer(q, k, v)
    with torch.no_grad():
        layer.w_q.neg_()
        assert not torch.allclose(layer(q, k, v), out, rtol=1e-2)
        layer.w_k.neg_()
        close(layer(q, k, v), out, 1e-12)
        layer.w_q.zero_()
        layer.w_k.zero_()
        close(layer(q, k, v), v.mean(1, keepdim=True).expand_as(v), 1e-13)
    start, own = linear_layer(random=False), kernels.linear_attention(q, k, v)  # W the identity
    close(start(q, k, v), own, 1e-13)
    with torch.no_grad():
        start.w_k.mul_(2)
    assert not torch.allclose(start(q, k, v), own, rtol=1e-2)
    assert [name for name, _ in start.named_parameters()] == ["w_q", "w_k"]
    assert not list(linear_layer("elu").parameters())


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
    assert "linear_layers" not in net.config and net.blocks[0].attend is attention


# ---- how many layers, and which ------------------------------------------------------------------


def r_of(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def gradient(f, r):
    return torch.autograd.grad(f, r)[0]


R_AND_COUNTS = [
    ([0.9, 0.6, 0.51], 0),
    ([0.9, 0.49, 0.6], 1),
    ([0.1, 0.2, 0.8], 2),
    ([0.0, 0.3, 0.4], 3),
    ([1.0, 0.0, 1.0], 1),
]


@pytest.mark.parametrize("r, linear", R_AND_COUNTS)
@pytest.mark.parametrize("target", [1, 2, 3])
def test_constraint_counts_linear_layers(r, linear, target):
    """Its value counts by rounding; its gradient is -2 (count - target) in every layer alike.

    As printed, sum round(r) - target, it would count the other layers: another value, and zero
    elsewhere. Without straight-through it would have no gradient at all.
    """
    r = r_of(*r)
    value = constraint(r, target)
    assert value.item() == (linear - target) ** 2
    close(gradient(value, r), torch.full((3,), -2.0 * (linear - target)), 1e-13)
    printed = (r.detach().round().sum() - target) ** 2
    assert (printed == value) == ((3 - linear - target) ** 2 == (linear - target) ** 2)
    assert not (1 - r.detach().round()).requires_grad


def test_constraint_pulls_the_count_to_the_target():
    """Too few linear layers lower every r, too many raise every r, and at the target nothing moves.

    With the other sign the count would run away.
    """
    for start, target, direction in ((0.9, 3, 1), (0.1, 1, -1), (0.1, 4, 0)):
        r = r_of(*[start] * 4)
        assert (gradient(constraint(r, target), r).sign() == direction).all()
    r = r_of(0.9, 0.8, 0.7, 0.6)
    for _ in range(100):
        r = (r - 0.01 * gradient(constraint(r, 2), r)).detach().requires_grad_(True)
    assert smallest(r.detach(), 4) == [0, 1, 2, 3]
    assert 1 <= (r < 0.5).sum() <= 3  # about the target, where rounding flips


@pytest.mark.parametrize("alpha", [1.5, 2.0, 4.0, 20.0])
def test_regularizer(alpha):
    """Eq. 10: 0 at 0 and 1, N at one half, and symmetric; with alpha = 2 it is 4 sum r (1 - r).

    Its gradient is 0 at one half, -2 alpha at 1 and +2 alpha at 0; a large alpha is flat between.
    """
    close(regularizer(r_of(0, 1, 1), alpha).detach(), 0.0, 1e-13)
    close(regularizer(r_of(0.5, 0.5, 0.5), alpha).detach(), 3.0, 1e-13)
    r = r_of(0.1, 0.35, 0.8)
    value = regularizer(r, alpha)
    close(value.detach(), sum(1 - abs(2 * x - 1) ** alpha for x in (0.1, 0.35, 0.8)), 1e-13)
    close(regularizer(1 - r, alpha).detach(), value.detach(), 1e-13)
    if alpha == 2:
        close(value.detach(), (4 * r * (1 - r)).sum().detach(), 1e-13)
    r = r_of(0, 0.5, 1)
    close(gradient(regularizer(r, alpha), r), torch.tensor([2 * alpha, 0, -2 * alpha]), 1e-13)
    r = r_of(0.7, 0.3)
    g = gradient(regularizer(r, alpha), r)
    close(g[0], -g[1], 1e-12)
    assert g[0] < 0 < g[1] and (g[1] < 1e-5) == (alpha == 20)


@pytest.mark.parametrize("count", ["round", "soft"])
@pytest.mark.parametrize("start", [1.0, 0.9, 0.7, 0.5])
def test_when_all_r_are_held_at_one(count, start):
    """Both pulls together raise an r above one half exactly where `r_is_held` says so.

    At r = 1 that is where alpha is not below the target. At .9 it is not: there the paper's 20
    pulls with .58 and 4 with 4.1, so 20 lets any target go, and 4 holds the ones below 3.
    """
    of_count = {"round": constraint, "soft": soft_constraint}[count]
    for target in (1, 2, 3, 4, 16, 22):
        for alpha in (2.0, 3.5, 4.0, 12.0, 20.0):
            args = argparse.Namespace(r_init=start, count=count, no_regularizer=False)
            r = r_of(*[start] * 30)
            pull = gradient(of_count(r, target) + regularizer(r, alpha), r)[0].item()
            assert r_is_held(args, 30, target, alpha) == (start > 0.5 and pull <= 1e-9)
            if start == 1:
                assert pull == pytest.approx(2 * target - 2 * alpha)
                assert (pull <= 0) == (alpha >= target)
            args.no_regularizer = True
            assert not r_is_held(args, 30, target, alpha)
    if (start, count) == (0.9, "round"):
        r = r_of(0.9)
        pulls = [-gradient(regularizer(r, alpha), r).item() for alpha in (20.0, 4.0)]
        assert pulls == pytest.approx([0.576, 4.096], rel=1e-2)


def test_default_exponents():
    """From 4 to 2, but from 20 where 4 would hold every r; the command line goes first."""
    args = argparse.Namespace(r_init=0.9, count="round", no_regularizer=False, alpha=None)
    assert [exponents(args, 8, n)[0] for n in (1, 2, 3, 4, 8)] == [20, 20, 4, 4, 4]
    args.count = "soft"  # at .9 it counts .8 of 8 layers as linear already
    assert [exponents(args, 8, n)[0] for n in (1, 2, 3, 4)] == [20, 20, 4, 4]
    assert exponents(args, 30, 16) == (4.0, 2.0)
    args.alpha = [7.0, 3.0]
    assert exponents(args, 8, 1) == (7.0, 3.0)


def test_soft_count():
    """sum (1 - r) counts without rounding, and its gradient is -2 (count - target) in every layer.

    For r of 0 and 1 it is Eq. 9.
    """
    r = r_of(0.9, 0.6, 0.5, 0.25)
    close(soft_constraint(r, 2).detach(), (1.75 - 2) ** 2, 1e-13)
    close(gradient(soft_constraint(r, 2), r), torch.full((4,), 0.5), 1e-13)
    hard = r_of(0, 1, 1, 0)
    for target in (1, 2, 3):
        close(soft_constraint(hard, target).detach(), constraint(hard, target).detach(), 1e-13)


def selected(of_count, weight, alpha, cost, layers=30, target=16, updates=900):
    """Selection alone: layer l costs (1 - r) c_l, whose gradient has noise of its own size.

    c_l ~ U(0, 2 cost), Adam at 1e-2, r from .9. -> how many r end within (.1, .9), and which share
    of the cheapest layers is among the `target` smallest.
    """
    generator = torch.Generator().manual_seed(0)
    c = 2 * cost * torch.rand(layers, generator=generator)
    r = torch.full((layers,), 0.9, requires_grad=True)
    adam = torch.optim.Adam([r], 1e-2, betas=(0.9, 0.99))
    for update in range(updates):
        power = alpha[0] + (alpha[1] - alpha[0]) * update / (updates - 1)
        (g,) = torch.autograd.grad(of_count(r, target) + regularizer(r, power), r)
        r.grad = weight * g + c * (torch.randn(layers, generator=generator) - 1)
        adam.step()
        with torch.no_grad():
            r.clamp_(0, 1)
    r = r.detach()
    right = set(c.argsort()[:target].tolist()) & set(smallest(r, target))
    return int(((r > 0.1) & (r < 0.9)).sum()), len(right) / target


@pytest.mark.parametrize("cost", [1e-5, 1e-4, 1e-3])
def test_released_defaults_decide_the_layers(cost):
    """30 layers, of which 16 become linear: at the end every r has an end, and the right ones.

    The size of the objective's gradient on a released model's r is not known, so this holds over
    two orders of magnitude. With rounding and the paper's lambda and exponents all 30 stay between:
    the count's gradient is the same for all r, Adam makes steps of one size of it, and all go to
    one half together, where the count changes its sign at every update and Eq. 10 has no slope.
    """
    args = parse_args(["--teacher", "/nowhere/Wan2.1-T2V-1.3B-Diffusers"])
    assert args.count == "soft"
    alpha = exponents(args, 30, 16)
    undecided, right = selected(soft_constraint, args.selection_weight, alpha, cost)
    assert undecided <= 1 and right > 0.9
    undecided, _ = selected(constraint, 0.01, (20.0, 2.0), cost)
    assert undecided > (29 if cost < 1e-3 else 5)
    assert cost > 1e-5 or selected(constraint, 0.001, (4.0, 2.0), cost)[0] > 20


def test_smallest():
    """Exactly `target`, in the layers' order, the first of equal ones, for numbers of any kind."""
    r = [0.5, 0.2, 0.9, 0.2, 0.2, 0.5]
    want = [[], [1], [1, 3], [1, 3, 4], [0, 1, 3, 4], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert [smallest(r, n) for n in range(7)] == want
    assert smallest(torch.tensor(r), 4) == smallest([torch.tensor(x) for x in r], 4) == want[4]
    assert smallest([1.0] * 5, 2) == [0, 1] and smallest([0.3, 0.2, 0.1], 2) == [1, 2]
    assert all(type(i) is int for i in smallest(torch.tensor(r), 3))


def choose(count, *select, target=None, seed=0):
    """What these flags choose in a network of `count` layers, or why they are refused."""
    args = argparse.Namespace(select=list(select), target_layers=target, seed=seed)
    refuse(wrong_selection(args, count))
    return chosen_layers(args, count)


def test_chosen_layers():
    assert choose(8, "learned") == choose(9, "learned") == (4, None)
    assert choose(1, "learned") == (1, None)
    assert choose(8, "learned", target=8) == (8, None)
    assert choose(8, "first", target=3) == (3, [0, 1, 2])
    assert choose(8, "last", target=3) == (3, [5, 6, 7])
    assert choose(8, "last", target=8)[1] == list(range(8))
    assert choose(8, "uniform") == (4, [1, 3, 5, 7])
    assert choose(30, "uniform", target=3) == (3, [5, 15, 25])
    assert choose(3, "uniform", target=3)[1] == [0, 1, 2]
    assert choose(8, "6", "1", "5") == (3, [1, 5, 6])
    assert choose(8, "7") == (1, [7])
    assert choose(8, "0", "3", target=2) == (2, [0, 3])
    drawn = [choose(8, "random", target=3, seed=seed)[1] for seed in range(12)]
    assert all(len(set(x)) == 3 and x == sorted(x) and 0 <= x[0] and x[-1] < 8 for x in drawn)
    assert len(set(map(tuple, drawn))) > 6
    assert choose(8, "random", target=3, seed=5)[1] == drawn[5]
    assert set(sum(drawn, [])) == set(range(8))


TOO_MANY = "--target_layers 9: this network has 8 self-attention layer(s): give 1 to 8"
REFUSED = [
    (["8"], None, "different layers of 0 to 7"),
    (["1", "1"], None, "--select 1 1: give one of learned, first"),
    (["-1"], None, "layers of 0 to 7"),
    (["first", "2"], None, "--select first 2"),
    (["best"], None, "--select best"),
    (["1.0"], None, "--select 1.0"),
    (["\u00b2"], None, "--select"),
    (["1", "2"], 3, "names 2 layer(s), --target_layers says 3"),
    (["learned"], 9, TOO_MANY),
    (["first"], 0, "--target_layers 0"),
]


@pytest.mark.parametrize("select, target, says", REFUSED)
def test_refused_choices(select, target, says):
    with pytest.raises(UserError) as error:
        choose(8, *select, target=target)
    assert says in str(error.value)


# ---- conversion ----------------------------------------------------------------------------------


def mixed_net(net):
    """Mix all attention of net, with random weights in the linear one.  -> the layers."""
    mixed = mix_attention(net, "hedgehog", 0.7)
    with torch.no_grad():
        for i, m in enumerate(mixed):
            for s, p in enumerate(m.linear.parameters()):
                p.copy_(normal(*p.shape, seed=20 + 2 * i + s))
    return mixed


@every_net
@pytest.mark.parametrize("layers", [[1, 3], [0], [0, 1, 2, 3]], ids=str)
def test_convert(case, layers, monkeypatch):
    """The mixed network with r = 0 in these layers and r = 1 in the others, one call for each.

    No weight of the other kind is left, the config builds the same network again, and the mixed
    network is as it was.
    """
    net, call = case()
    original, mixed = copy.deepcopy(net), mixed_net(net)
    before, out = {k: v.clone() for k, v in net.state_dict().items()}, call(net)
    student = convert(alone(), net, layers, "hedgehog")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(call(net), out) and "linear_layers" not in net.config
    added = {"linear_layers": layers, "feature_map": "hedgehog"}
    assert student.config == {**original.config, **added}
    state = student.state_dict()
    places = [name for name, m in student.named_modules() if isinstance(m, LinearAttention)]
    assert len(places) == len(layers)
    assert not any(isinstance(m, MixedAttention) for m in student.modules())
    own = {f"{place}.{w}" for place in places for w in ("w_q", "w_k")}
    assert set(state) == {*original.state_dict(), *own}
    shared = {v.data_ptr() for v in state.values()}
    assert not shared & {v.data_ptr() for v in net.state_dict().values()}
    for i, m in enumerate(mixed):
        m.fix(linear=i in layers)
    calls, kernel, softmax = [], kernels.linear_attention, F.scaled_dot_product_attention
    counted = {
        (kernels, "linear_attention"): lambda *a, **k: calls.append("linear") or kernel(*a, **k),
        (F, "scaled_dot_product_attention"): lambda *a, **k: (
            calls.append("softmax") or softmax(*a, **k)
        ),
    }
    for place, function in counted.items():
        monkeypatch.setattr(*place, function)
    got = call(student)
    if isinstance(student, WanTransformer3DModel):
        assert set(calls[1::2]) == {"softmax"}  # after each self-attention comes the text's
        calls = calls[::2]
    assert calls == ["linear" if i in layers else "softmax" for i in range(4)]
    assert torch.equal(got, call(net))
    again = network_from_config({"_class_name": type(net).__name__, **student.config}, "test")
    again.load_state_dict(state)
    assert torch.equal(call(again), got)


@every_net
def test_half_the_feature_width(case):
    """--feature_dim: in the mixed layers, in the student, in its config, and out of that again."""
    net, call = case()
    E = net.head_dim // 2
    mixed = mix_attention(net, "hedgehog", 0.7, E)
    assert mixed[2].linear.w_q.shape == (net.heads, net.head_dim, E)
    for i, m in enumerate(mixed):
        m.fix(linear=i == 2)
    student = convert(alone(), net, [2], "hedgehog", E)
    assert student.config["feature_dim"] == E and torch.equal(call(student), call(net))
    again = network_from_config({"_class_name": type(net).__name__, **student.config}, "test")
    again.load_state_dict(student.state_dict())
    assert torch.equal(call(again), call(student))
    for wrong in (0, net.head_dim + 1, 2.5, "4"):
        config = {"_class_name": type(net).__name__, **student.config, "feature_dim": wrong}
        with pytest.raises(UserError, match="feature_dim must be 1 to the head size"):
            network_from_config(config, "test")


@pytest.mark.parametrize("net", ["RingDiT", "CogVideoXTransformer3DModel"])
def test_other_networks_take_a_feature_width(net):
    small = {
        "RingDiT": dict(tokens=4, dim=32, depth=2, num_classes=3),
        "CogVideoXTransformer3DModel": dict(
            num_layers=1, num_attention_heads=2, attention_head_dim=16, text_embed_dim=8,
            time_embed_dim=8,
        ),
    }[net]  # fmt: skip
    config = {"_class_name": net, **small, "linear_layers": [0], "feature_dim": 8}
    built = network_from_config(config, "test")
    assert built.config["feature_dim"] == 8 and built.config["linear_layers"] == [0]
    assert built.self_attentions[0].attend.w_k.shape == (built.heads, built.head_dim, 8)


def test_the_critics_loss_sends_nothing_into_the_samples():
    x0, weight = torch.ones(2, 3, requires_grad=True), torch.ones((), requires_grad=True)
    t = torch.tensor([0.3, 0.6])
    flow_matching_loss(lambda x, t: weight * x, x0, torch.zeros(2, 3), t, {}).backward()
    assert x0.grad is None and weight.grad != 0


@pytest.mark.parametrize("r", [0.9, 0.3])
def test_the_weights_of_both_kinds_sum_to_one_in_bfloat16(r):
    """Where both agree the layer is exact, and r has no gradient."""
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = MixedAttention(lambda *a: x, 3, 4, "hedgehog", r)
    layer.linear.forward = lambda *a: x
    out = layer(x, x, x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, x)
    out.float().square().sum().backward()
    assert layer.r.grad.abs() < 1e-3


def test_both_kinds_of_attention_get_the_same_tensors():
    """A mixed layer computes both from one q, k and v: none is copied on the way."""
    seen, x = [], qkv(dtype=torch.float32)
    layer = MixedAttention(lambda *a: seen.append(a) or attention(*a), 3, 4, "hedgehog", 0.5)
    layer.linear.register_forward_pre_hook(lambda module, a: seen.append(a))
    layer(*x)
    assert all(a is b is c for a, b, c in zip(*seen, x, strict=True)) and len(seen) == 2


@every_net
def test_converted_features_other_than_hedgehog(case):
    """They have no weights, and the config records them."""
    net, call = case()
    mix_attention(net, "elu", 0.7)[2].fix(linear=True)
    student = convert(alone(), net, [2], "elu")
    assert student.config["feature_map"] == "elu"
    assert student.self_attentions[2].attend.feature_map == "elu"
    assert not any(".attend." in k for k in student.state_dict())
    for i in (0, 1, 3):
        net.self_attentions[i].attend.fix(linear=False)
    assert torch.equal(call(student), call(net))


# ---- scores of flows, Eq. 12 and 13 --------------------------------------------------------------

TIMES = torch.tensor([0.02, 0.3, 0.5, 0.8, 0.97], dtype=torch.float64)


def gaussian(mean, variance):
    """Data N(mean, variance) -> its velocity and its score at (x (B, d), t (B,))."""

    def moments(x, t):
        t = t[:, None]
        return t, x - (1 - t) * mean, (1 - t) ** 2 * variance + t**2

    def velocity(x, t):
        t, away, total = moments(x, t)
        x0 = mean + (1 - t) * variance / total * away  # E[x0 | x]
        return t / total * away - x0  # E[eps | x] - E[x0 | x]

    def score(x, t):
        _, away, total = moments(x, t)
        return -away / total

    return velocity, score


TEACHER = gaussian(torch.tensor([0.3, -1.0], dtype=torch.float64), 0.5)
STUDENT = gaussian(torch.tensor([0.8, -1.5], dtype=torch.float64), 2.0)


def test_score_of_a_flow():
    x = normal(5, 2)
    for velocity, score in (TEACHER, STUDENT):
        by_velocity = -(x + (1 - TIMES[:, None]) * velocity(x, TIMES)) / TIMES[:, None]
        close(score(x, TIMES), by_velocity, 1e-11)


def test_matching_gradient_is_a_difference_of_scores():
    """s-hat - s of two Gaussians: the student's minus the teacher's, each at its sample's own time.

    The other sign, no weight and the inverse weight are something else.
    """
    x = normal(5, 2, seed=1)
    v, v_hat = TEACHER[0](x, TIMES), STUDENT[0](x, TIMES)
    want, bare = STUDENT[1](x, TIMES) - TEACHER[1](x, TIMES), v - v_hat
    close(matching_gradient(v, v_hat, TIMES, "eq13"), want, 1e-11)
    ratio = (TIMES / (1 - TIMES))[:, None]
    for wrong in (-want, bare, ratio * bare, bare / TIMES[:, None]):
        assert not torch.allclose(wrong, want, rtol=0.05)
    close(matching_gradient(v[2:3], v_hat[2:3], TIMES[2:3], "eq13"), want[2:3], 1e-11)


def test_adm_g_is_a_difference_of_scores():
    """The whole loss on two Gaussians: g is s-hat - s at the state that the student's step reaches.

    At x_t, or at time t, it would be something else.
    """
    x, t = normal(5, 2, seed=1), TIMES + 0.02
    loss, g, v, v_hat = adm_loss(STUDENT[0], TEACHER[0], x, t, TIMES, {})
    x_hat = x - 0.02 * STUDENT[0](x, t)
    close(g, STUDENT[1](x_hat, TIMES) - TEACHER[1](x_hat, TIMES), 1e-11)
    close(loss, 0.5 * g.square().mean(), 1e-12)
    close(v, TEACHER[0](x_hat, TIMES), 1e-12)
    close(v_hat, STUDENT[0](x_hat, TIMES), 1e-12)
    for at, time in ((x, TIMES), (x_hat, t)):
        assert not torch.allclose(STUDENT[1](at, time) - TEACHER[1](at, time), g, rtol=1e-3)


def test_matching_gradient_pulls_samples_to_the_teacher():
    """x - g moves from the student's mean to the teacher's, and by gradient descent arrives there.

    Both are Gaussians of the same width.
    """
    t, mean = torch.tensor([0.4], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    teacher = gaussian(torch.tensor([1.0]), 1.0)[0]
    for _ in range(200):  # the student's mean, and its sample at the mean of q_t
        student, x = gaussian(mean, 1.0)[0], 0.6 * mean
        mean = mean - matching_gradient(teacher(x, t), student(x, t), t, "eq13")
    close(mean, torch.ones(1, 1), 1e-6)


def test_weights_of_the_matching_gradient():
    """ "unit" is the bare difference of velocities, "dmd" that of x0 over its mean distance.

    The latter goes sample by sample, so that g has mean size one whatever the scale. Where both
    velocities are equal g is zero, not NaN, and g is a constant.
    """
    x, a, b = normal(5, 3, 4), normal(5, 3, 4, seed=1), normal(5, 3, 4, seed=2)
    t = TIMES[:, None, None]
    close(matching_gradient(a, b, TIMES, "eq13"), (1 - t) / t * (a - b), 1e-13)
    close(matching_gradient(a, b, TIMES, "unit"), a - b, 1e-13)
    away = (x - t * b) - (x - t * a)  # the student's x0 minus the teacher's
    got = matching_gradient(a, b, TIMES, "dmd")
    close(got, away / away.abs().mean((1, 2), keepdim=True), 1e-10)
    close(matching_gradient(7 * a, 7 * b, TIMES, "dmd"), got, 1e-12)
    close(got.abs().mean((1, 2)), torch.ones(5), 1e-12)
    for weight in ("eq13", "unit", "dmd"):
        assert torch.equal(matching_gradient(a, a, TIMES, weight), torch.zeros_like(a))
        a_, b_ = a.clone().requires_grad_(True), b.clone().requires_grad_(True)
        assert not matching_gradient(a_, b_, TIMES, weight).requires_grad


def slope(f, x):
    x = x.clone().requires_grad_(True)
    loss = f(x)
    return torch.autograd.grad(loss, x)[0], loss.item()


def test_matching_loss_has_gradient_g():
    """g / numel, and the value 1/2 mean g^2. The well-known wrong variants differ."""
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
    through_g = torch.autograd.functional.jvp(lambda x: x * g, x, g)[1]
    assert not torch.allclose(slope(lambda x: matching_loss(x, x * g), x)[0], through_g)


class Tiny(torch.nn.Module):
    """A smooth velocity field, float64."""

    def __init__(self, seed, width=8):
        super().__init__()
        self.a = torch.nn.Parameter(normal(4, width, seed=seed))
        self.b = torch.nn.Parameter(normal(width, 3, seed=seed + 1))
        self.calls = []

    def forward(self, x, t, **cond):
        call = types.SimpleNamespace(x=x, t=t, cond=cond, graph=torch.is_grad_enabled())
        self.calls.append(call)
        return torch.tanh(torch.cat([x, t[:, None]], 1) @ self.a) @ self.b


def near(net, distance=0.3):
    other = copy.deepcopy(net)
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            p += distance * normal(*p.shape, seed=50 + i)
    return other


def grads(loss, net):
    return torch.autograd.grad(loss, list(net.parameters()))


def variant(student, teacher, x, t, s, weight="eq13", score=None, v=None, beside=0.0, cond=None):
    """adm_variant_loss with these flags."""
    args = argparse.Namespace(weight=weight, regression_weight=beside)
    return adm_variant_loss(args, student, teacher, score or student, x, v, t, s, cond or {})


T = torch.tensor([0.3, 0.5, 0.6, 0.8, 0.9, 1.0], dtype=torch.float64)
S = T - torch.tensor([0.1, 0.05, 0.3, 0.2, 0.01, 0.25], dtype=torch.float64)


def test_gradient_in_the_weights_is_equation_12():
    """E[(s-hat - s) dx_hat/dv_hat dv_hat/dtheta] with dx_hat/dv_hat = s - t, by hand.

    Not with the scores differentiated, and not with dx_hat/dv_hat = t - s or 1.
    """
    teacher = Tiny(0)
    student, x = near(teacher), normal(6, 3, seed=9)
    loss, g, _, _ = adm_loss(student, teacher, x, T, S, {})
    got = grads(loss, student)
    with torch.no_grad():
        x_hat = x + (S - T)[:, None] * student(x, T)
        scores = []
        for net in (student, teacher):
            scores.append(-(x_hat + (1 - S[:, None]) * net(x_hat, S)) / S[:, None])
    want = scores[0] - scores[1]
    close(g, want, 1e-12)

    def by_hand(factor):
        up = factor * want / want.numel()
        return torch.autograd.grad(student(x, T), list(student.parameters()), up)

    for a, b in zip(got, by_hand((S - T)[:, None]), strict=True):
        close(a, b, 1e-12)
    assert loss.item() == pytest.approx(0.5 * float(want.square().mean()), rel=1e-10)
    x_hat = x + (S - T)[:, None] * student(x, T)
    through = ((1 - S) / S)[:, None] * (teacher(x_hat, S) - student(x_hat, S))
    wrong = [by_hand((T - S)[:, None]), by_hand(1.0), grads((x_hat * through).mean(), student)]
    for gradient in wrong:
        assert not torch.allclose(gradient[0], got[0], rtol=0.05)


def test_adm_calls():
    """The student once with a graph; teacher and student without, at the same x_hat and time s."""
    teacher = Tiny(0)
    student = near(teacher)
    student.calls, cond = [], {"label": 4}
    adm_loss(student, teacher, normal(6, 3, seed=9), T, S, cond)
    first, own = student.calls
    (frozen,) = teacher.calls
    assert first.graph and not own.graph and not frozen.graph
    assert torch.equal(first.t, T) and torch.equal(own.t, S) and torch.equal(frozen.t, S)
    assert torch.equal(own.x, frozen.x) and first.cond == own.cond == frozen.cond == cond


def test_variants_of_adm():
    """With Eq. 13's weight the variant is adm_loss itself; other weights change g alone.

    A critic stands for the student's own velocity at x_hat, and the regression is that of the same
    call onto v.
    """
    teacher, x, v = Tiny(0), normal(6, 3, seed=9), normal(6, 3, seed=10)
    student, critic = near(teacher), Tiny(5)
    loss, *found = adm_loss(student, teacher, x, T, S, {})
    same, *same_found = variant(student, teacher, x, T, S)
    assert torch.equal(loss, same) and all(map(torch.equal, found, same_found))
    assert all(map(torch.equal, grads(loss, student), grads(same, student)))
    x_hat = (x + (S - T)[:, None] * student(x, T)).detach()
    at_x_hat = {name: net(x_hat, S).detach() for name, net in
                (("teacher", teacher), ("student", student), ("critic", critic))}  # fmt: skip
    for weight in ("unit", "dmd"):
        want = matching_gradient(at_x_hat["teacher"], at_x_hat["student"], S, weight)
        close(variant(student, teacher, x, T, S, weight)[1], want, 1e-12)
    by_critic, g, v_real, v_fake = variant(student, teacher, x, T, S, score=critic)
    assert torch.equal(v_real, at_x_hat["teacher"]) and torch.equal(v_fake, at_x_hat["critic"])
    want = matching_gradient(at_x_hat["teacher"], at_x_hat["critic"], S, "eq13")
    close(g, want, 1e-12)
    assert torch.autograd.grad(by_critic, critic.a, allow_unused=True) == (None,)
    loss = variant(student, teacher, x, T, S)[0]
    with_both = variant(student, teacher, x, T, S, v=v, beside=2.0)[0]
    regression = regression_loss(student, x, v, T, {})[0]
    close(with_both.detach(), (loss + 2.0 * regression).detach(), 1e-12)
    both = grads(loss + 2.0 * regression, student)
    for a, b in zip(grads(with_both, student), both, strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("weight", ["eq13", "velocity", "unit", "dmd"])
def test_no_gradient_where_student_is_teacher(weight):
    teacher = Tiny(0)
    student, x = copy.deepcopy(teacher), normal(6, 3)
    t, s = torch.full((6,), 0.8), torch.full((6,), 0.6)
    losses = [variant(student, teacher, x, t, s, weight)[0]]
    if weight == "eq13":
        losses.append(adm_loss(student, teacher, x, t, s, {})[0])
    for loss in losses:
        assert loss == 0 and not any(g.any() for g in grads(loss, student))


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_small_steps_are_regression(t):
    """For s -> t the gradient has the direction of the regression onto the teacher's velocity.

    (Eq. 7.) Its length is (t - s) (1 - t) / t of the regression's, both up to O(t - s).
    """
    teacher = Tiny(0)
    student, x, at = near(teacher), normal(16, 3, seed=9), torch.full((16,), t, dtype=torch.float64)
    v_t = teacher(x, at).detach()
    loss, error, v, v_hat = regression_loss(student, x, v_t, at, {})
    assert v is v_t and not v_hat.requires_grad
    close((v_hat - v).detach(), error.detach(), 1e-13)
    close(loss.detach(), 0.5 * error.square().mean().detach(), 1e-13)
    close(error.detach(), (student(x, at) - teacher(x, at)).detach(), 1e-13)
    mse, off = torch.cat([g.flatten() for g in grads(loss, student)]), []
    for dt in (1e-1, 1e-2, 1e-3, 1e-4):
        loss = adm_loss(student, teacher, x, at, at - dt, {})[0]
        adm = torch.cat([g.flatten() for g in grads(loss, student)])
        ratio = float(adm.norm() / mse.norm()) / (dt * (1 - t) / t)
        off.append((1 - float(F.cosine_similarity(adm, mse, dim=0)), abs(ratio - 1)))
    cosines, ratios = zip(*off)
    assert cosines[-1] < 1e-6 and ratios[-1] < 2e-3
    assert ratios[2] > 5 * ratios[3] and cosines[0] > 50 * cosines[2]


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_small_steps_with_the_weight_velocity(t):
    """For s -> t the gradient is that of regression at the same states, in length too.

    That is --state policy, where x_hat is a state of the student's own.
    """
    teacher = Tiny(0)
    student, x, at = near(teacher), normal(16, 3, seed=9), torch.full((16,), t, dtype=torch.float64)
    loss, *_ = regression_loss(student, x, teacher(x, at).detach(), at, {})
    want = torch.cat([g.flatten() for g in grads(loss, student)])
    off = []
    for dt in (1e-1, 1e-2, 1e-3):
        loss, *_ = variant(student, teacher, x, at, at - dt, "velocity")
        got = torch.cat([g.flatten() for g in grads(loss, student)])
        off.append(float((got - want).norm() / want.norm()))
    assert off[2] < 1e-2 and off[1] > 5 * off[2]


def test_kl_divergence_is_a_regression_at_the_students_states():
    """KL(q_s | p_s) = int_s^1 (1 - t) / t E |v_hat - v|^2 dt over x_t of the student's own flow.

    And its mean over s is int_0^1 (1 - t) E |v_hat - v|^2 dt. This is why the limit of Eq. 11 to 13
    is a regression at the student's states. At the teacher's states, or with other weights, the
    integral is another number. Two Gaussians, whose flows' laws are known at every t.
    """
    p, q = (0.3, 0.5), (0.8, 2.0)  # mean and variance of the data of teacher and student
    fields = [gaussian(torch.tensor([m], dtype=torch.float64), v)[0] for m, v in (p, q)]

    def law(of, t):  # of x_t
        return (1 - t) * of[0], (1 - t) ** 2 * of[1] + t**2

    def kl(s):
        (m, v), (m_hat, v_hat) = law(p, s), law(q, s)
        return 0.5 * (v_hat / v + (m_hat - m) ** 2 / v - 1 + (v / v_hat).log())

    def by_matching_gradient(t, at=q):
        """E g (v - v_hat), which is (1 - t) / t E |v_hat - v|^2: five points make it exact."""
        nodes, weights = hermegauss(5)
        mean, variance = law(at, t)
        x = mean[:, None] + variance.sqrt()[:, None] * torch.from_numpy(nodes)
        v, v_hat = (f(x.reshape(-1, 1), t.repeat_interleave(5)) for f in fields)
        g = matching_gradient(v, v_hat, t.repeat_interleave(5), "eq13")
        share = torch.from_numpy(weights / weights.sum())
        return ((g * (v - v_hat)).view(-1, 5) * share).sum(1)

    def integral(f, s):
        nodes, weights = (torch.from_numpy(x) for x in leggauss(200))
        return ((1 - s) / 2 * weights * f(s + (1 - s) * (nodes + 1) / 2)).sum()

    for s in (0.05, 0.2, 0.7):
        want = kl(torch.tensor(s, dtype=torch.float64))
        close(integral(by_matching_gradient, s), want, 1e-9)
        wrong = [
            integral(lambda t: by_matching_gradient(t, p), s),  # the teacher's states
            integral(lambda t: by_matching_gradient(t) * t / (1 - t), s),  # without the weight
            integral(lambda t: by_matching_gradient(t) * t, s),  # with 1 - t
        ]
        assert all(abs(x / want - 1) > 0.03 for x in wrong)
    close(integral(lambda t: t * by_matching_gradient(t), 0.0), integral(kl, 0.0), 1e-8)


def test_the_identity_needs_the_students_own_score():
    """A velocity off by .1 x is not that of its own law, and the two sides differ by half.

    The teacher's data are N(0, .25), of variance S at t; from t = 1 on the error shrinks the
    student's samples by exp(-.1 (1 - t)).
    """

    def variance(t):
        return ((1 - t) ** 2 * 0.25 + t**2) * math.exp(-0.2 * (1 - t))

    s, ratio = 0.05, math.exp(-0.2 * 0.95)
    nodes, weights = leggauss(200)
    t = s + (1 - s) * (nodes + 1) / 2
    f = [(1 - x) / x * 0.01 * variance(x) for x in t]
    integral = (1 - s) / 2 * float((weights * f).sum())
    assert 0.5 * (ratio - 1 - math.log(ratio)) == pytest.approx(0.0085, abs=5e-5)  # KL(q_s | p_s)
    assert integral == pytest.approx(0.0043, abs=5e-5)


class Levels(torch.nn.Module):
    """One velocity for every point of a grid and zero elsewhere, whatever x is."""

    def __init__(self, grid):
        super().__init__()
        self.grid = torch.tensor(grid)
        self.v = torch.nn.Parameter(torch.zeros(len(grid)))

    def forward(self, x, t, **cond):
        at = (t[:, None] == self.grid[None]).float()
        return (at @ self.v)[:, None].expand_as(x)


def shares(state, weight, last_level=None, rows=4000, steps=20):
    """Shares of the gradient by level, where the teacher's velocity is everywhere one above.

    A bank of zeros over 20 steps shifted by 2. last_level: the wrong variant that begins at all
    levels.  -> (levels,), and the sizes of one row's gradient over their mean (rows,).
    """
    grid = step_grid(steps, 2.0)
    args = argparse.Namespace(state=state, weight=weight, part=1.0, min_time=0.02)
    args.sampling_steps, args.guidance_scale, args.regression_weight = steps, 1.0, 0.0
    student, draw = Levels(grid), Draws(0, 0, 0, range(rows))
    conditions = types.SimpleNamespace(pick=lambda index, device: ({}, {}))
    teacher = types.SimpleNamespace(conditions=conditions, shift=2.0)
    zeros = torch.zeros(rows, 1)
    bank = types.SimpleNamespace(size=1, rows=lambda *a: dict(index=zeros, x=zeros, v=1 + zeros))

    def one(x, t, **cond):
        return torch.ones_like(x)

    if state == "policy":
        x_t, v_t, t, cond, _ = bank_states(args, draw, bank, teacher, grid)
        loss, *_ = regression_loss(student, x_t, v_t, t, cond)
        s = t - 1
    else:
        x_t, v_t, t, s, cond = step_to_x_hat(args, draw, student, teacher, bank, grid)
        if last_level:
            x_t, v_t, t, _, k = bank_states(args, draw, bank, teacher, grid)
            s = t + draw.uniform("part") * (torch.tensor(grid)[k + 1] - t)
            s = s.clamp_min(0.02)
        loss, *_ = adm_variant_loss(args, student, one, student, x_t, v_t, t, s, cond)
    (g,) = torch.autograd.grad(loss, student.v)
    return (g / g.sum())[:-1]


def effective(share):
    return 1 / share.square().sum().item()


def test_share_of_the_gradient_by_level():
    """20 levels: which velocities learn. Regression, and so --state policy, weights all alike.

    So does the weight "velocity", which leaves out the last level alone. Eq. 13's weight at a
    random part of a step puts nearly all on few levels; where the sampler's last step is a part
    too, two thirds are on it alone. "unit" still has the length of the steps in it.
    """
    policy = shares("policy", "velocity")
    close(policy, torch.full((20,), 0.05), 1e-5)
    for state in ("part", "step"):
        velocity = shares(state, "velocity")
        assert velocity[-1] == 0
        assert velocity[:-1].min() > 0.9 / 19 and velocity[:-1].max() < 1.1 / 19
    eq13 = shares("part", "eq13")
    assert eq13[-1] == 0 and eq13[14:].sum() > 0.7 and effective(eq13) < 8
    unit = shares("part", "unit")
    assert unit[-1] == 0 and 15 < effective(unit) < 18.5
    wrong = shares("part", "eq13", last_level=True)
    assert 0.6 < wrong[-1] < 0.72 and wrong[15:].sum() > 0.9 and effective(wrong) < 2.6


def test_the_weight_velocity_has_no_random_factor():
    """A row's gradient does not depend on how far its random step goes; with "unit" it does.

    The velocities are constants here.
    """
    t, sizes = torch.full((64,), 0.5), {}
    s = t - 0.1 * Draws(0, 0, 0, range(64)).uniform("part")
    for weight in ("velocity", "unit"):
        net = types.SimpleNamespace(v=torch.zeros(64, 1, requires_grad=True))

        def student(x, at, net=net):
            return torch.where((at == 0.5)[:, None], net.v, 0 * x)

        loss, *_ = variant(student, lambda x, at: 0 * x + 1, torch.zeros(64, 1), t, s, weight)
        sizes[weight] = torch.autograd.grad(loss, net.v)[0].abs()
    assert sizes["velocity"].std() < 1e-6 * sizes["velocity"].mean()
    assert sizes["unit"].std() > 0.4 * sizes["unit"].mean()


def test_losses_are_float32_under_autocast():
    """With networks that answer in bfloat16 the losses are those of their answers in float32."""
    weight = normal(3, 3, dtype=torch.float32)

    def student(x, t, **cond):
        return x @ weight * t[:, None].to(torch.bfloat16)

    def teacher(x, t, **cond):
        return 0.5 * student(x, t)

    x, t, s = normal(6, 3, dtype=torch.float32), T.float(), S.float()
    losses = {
        "adm": lambda: adm_loss(student, teacher, x, t, s, {}),
        "velocity": lambda: variant(student, teacher, x, t, s, "velocity"),
        "unit": lambda: variant(student, teacher, x, t, s, "unit", v=x, beside=0.5),
        "regression": lambda: regression_loss(student, x, 0.5 * x, t, {}),
        "dmd": lambda: dmd_baseline_loss(x, teacher, student, x.flip(0), s, {}),
        "critic": lambda: (flow_matching_loss(student, x, x.flip(0), t, {}),),
    }
    for name, f in losses.items():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            found = f()
        assert all(value.dtype == torch.float32 for value in found), name
        if len(found) == 4:
            loss, g, v, v_hat = found
            rounded = [value.bfloat16().float() for value in (v, v_hat)]
            assert torch.equal(v, rounded[0]) or name == "regression"
            assert torch.equal(v_hat, rounded[1])
            extra = 0.5 * 0.5 * (student(x, t) - x).square().mean() if name == "unit" else 0.0
            assert loss.item() == pytest.approx(float(0.5 * g.square().mean() + extra), rel=1e-2)


# ---- the DMD baseline and its critic -------------------------------------------------------------


def test_dmd_baseline_loss():
    """g = (x0 of the critic - x0 of the teacher) / mean |x0 - x0 of the teacher|, at x_t.

    It reaches x0 alone, and neither network is differentiated.
    """
    teacher, critic, cond = Tiny(0), Tiny(2), {"label": 4}
    x0 = normal(5, 3).requires_grad_(True)
    eps, t = normal(5, 3, seed=1), TIMES
    loss, g, v, v_critic = dmd_baseline_loss(x0, teacher, critic, eps, t, cond)
    x_t = (1 - t)[:, None] * x0.detach() + t[:, None] * eps
    (call,), (other,) = teacher.calls, critic.calls
    for at in (call, other):
        close(at.x, x_t, 1e-14)
        assert torch.equal(at.t, t) and at.cond == cond and not at.graph
    close(v, teacher(x_t, t).detach(), 1e-13)
    close(v_critic, critic(x_t, t).detach(), 1e-13)
    real, fake = (x_t - t[:, None] * net(x_t, t).detach() for net in (teacher, critic))
    want = (fake - real) / (x0.detach() - real).abs().mean(1, keepdim=True)
    close(g, want, 1e-11)
    close(torch.autograd.grad(loss, x0)[0], want / want.numel(), 1e-11)
    close(loss.detach(), 0.5 * want.square().mean(), 1e-11)


def test_flow_matching_loss():
    """|v(x_t, t) - (eps - x0)|^2, mean, at x_t = (1 - t) x0 + t eps, with its condition.

    It differentiates the network, and is least for the velocity of the samples' distribution.
    """
    net, x0, eps, t = Tiny(0), normal(5, 3), normal(5, 3, seed=1), TIMES
    loss = flow_matching_loss(net, x0, eps, t, {"label": 4})
    (call,) = net.calls
    close(call.x, (1 - t)[:, None] * x0 + t[:, None] * eps, 1e-14)
    assert torch.equal(call.t, t) and call.cond == {"label": 4}
    close(loss.detach(), (net(call.x, t).detach() - (eps - x0)).square().mean(), 1e-13)
    assert all(g.any() for g in grads(loss, net))
    # N(0, 1): the best field leaves E|eps - x0|^2 - E|v|^2 = 1 / (t^2 + (1 - t)^2)
    velocity = gaussian(torch.zeros(3, dtype=torch.float64), 1.0)[0]
    x0, eps = normal(40000, 3), normal(40000, 3, seed=1)
    t = torch.full((40000,), 0.3, dtype=torch.float64)
    best = flow_matching_loss(lambda x, t: velocity(x, t), x0, eps, t, {})
    assert float(best) == pytest.approx(1 / (0.09 + 0.49), rel=0.02)
    assert flow_matching_loss(lambda x, t: 1.1 * velocity(x, t), x0, eps, t, {}) > best


# ---- trajectories of the teacher, and the bank's files -------------------------------------------


@pytest.mark.parametrize("scale", [1, 3.0])
def test_trajectory_is_the_teachers_sampler(scale):
    """The states are those of Euler's sampler, guided.

    Beside each is the conditional velocity there and, under guidance, the unconditional one.
    """
    net, z, grid = Tiny(0), normal(5, 3), step_grid(6, 2.0)

    def velocity(x, t, shift=0.0):
        return Tiny.forward(net, x + shift, t)

    conditions = {"shift": 0.5}, {"shift": -0.5}
    bank = trajectory(velocity, z, grid, *conditions, scale)
    assert set(bank) == {"x", "v"} | ({"v_uncond"} if scale != 1 else set())
    assert all(v.shape == (5, 6, 3) and not v.requires_grad for v in bank.values())
    assert torch.equal(bank["x"][:, 0], z)
    x = z
    for i in range(6):
        t = torch.full((5,), grid[i], dtype=torch.float64)
        cond, uncond = velocity(x, t, 0.5).detach(), velocity(x, t, -0.5).detach()
        close(bank["x"][:, i], x, 1e-13)
        close(bank["v"][:, i], cond, 1e-13)
        if scale != 1:
            close(bank["v_uncond"][:, i], uncond, 1e-13)
        x = x + (grid[i + 1] - grid[i]) * guide(cond, uncond, scale)
    end = sample_teacher(velocity, Flow(), "flow_v", z, grid, *conditions, scale, "euler")
    close(end, x, 1e-12)
    assert not any(call.graph for call in net.calls[:6])


@pytest.mark.parametrize("scale", [1, 3.0])
def test_trajectory_of_the_student_with_the_teachers_velocities(scale):
    """The states are those of the student's sampler, guided; the velocities there the teacher's."""
    teacher, student = Tiny(0), near(Tiny(0))
    z, grid = normal(5, 3), step_grid(6, 2.0)

    def shifted(net):
        return lambda x, t, shift=0.0: Tiny.forward(net, x + shift, t)

    conditions = {"shift": 0.5}, {"shift": -0.5}
    nets = shifted(teacher), shifted(student)
    own = trajectory(nets[0], z, grid, *conditions, scale, sampler=nets[1])
    of_student = trajectory(nets[1], z, grid, *conditions, scale)
    assert torch.equal(own["x"], of_student["x"]) and set(own) == set(of_student)
    for i in range(6):
        t = torch.full((5,), grid[i], dtype=torch.float64)
        names = [("v", 0.5)] + ([("v_uncond", -0.5)] if scale != 1 else [])
        for name, shift in names:
            close(own[name][:, i], nets[0](own["x"][:, i], t, shift).detach(), 1e-13)
            assert not torch.allclose(own[name][:, i], of_student[name][:, i], rtol=1e-2)
    assert not any(call.graph for call in (*teacher.calls[:6], *student.calls[:6]))


def test_a_state_of_the_students_own_trajectory_for_every_row():
    """--state rollout: rows stop at places of their own, evenly spread, not all at the same."""
    net, grid, draw = near(Tiny(0)), step_grid(6, 2.0), Draws(0, 0, 0, range(8), shape=(3,))
    args = argparse.Namespace(sampling_steps=6, guidance_scale=1.0)
    conditions = types.SimpleNamespace(draw=lambda draw: ({}, {}))
    teacher = types.SimpleNamespace(conditions=conditions)
    student = net.float()
    x, t, t_next, _ = own_state(args, draw, student, teacher, grid)
    k = 1 + draw.spread_integer("i", 4)
    assert sorted(k.tolist()) == [1, 1, 2, 2, 3, 3, 4, 4]
    z = draw.noise("z")
    for row in range(8):
        state = z[row, None]
        for a, b in zip(grid[: k[row]], grid[1:]):
            state = state + (b - a) * student(state, torch.tensor([a])).detach()
        close(x[row, None], state, 1e-5)
        assert t[row] == torch.tensor(grid[k[row]])
        assert t_next[row] == torch.tensor(grid[k[row] + 1])


def test_draws_of_states():
    """Evenly spread over the range and on the CPU: the integer part of `spread`'s share of it."""
    draw = Draws(3, 5, "student", range(32))
    for high in (1, 4, 50):
        k = draw.spread_integer("state", high)
        assert k.dtype == torch.int64 and k.device.type == "cpu" and k.shape == (32,)
        want = (draw.spread("state") * high).floor().long().clamp(max=high - 1)
        assert torch.equal(k, want) and 0 <= k.min() and k.max() < high
    counts = draw.spread_integer("state", 4).bincount(minlength=4)
    assert counts.min() >= 7 and counts.max() <= 9


def open_bank(folder, create=True, **changes):
    about = {**dict(seed=0, grid=[1.0, 0.5, 0.0]), **changes}
    return Bank(str(folder), about, 7, 3, create)


def test_bank_gives_back_what_was_put_in(tmp_path):
    """Seven rows in files of three: each row and state is where it belongs, as float32.

    Missing files are counted, and only those.
    """
    bank = open_bank(tmp_path / "bank")
    assert [list(bank.rows_of(part)) for part in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert bank.missing() == [0, 1, 2]
    x, v = normal(7, 2, 4).half(), normal(7, 2, 4, seed=1).half()
    index = torch.arange(7) * 10
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
        assert set(got) == {"index", "x", "v"}
        assert got["x"].dtype == got["v"].dtype == torch.float32
        assert torch.equal(got["index"], index[row])
        assert torch.equal(got["x"], x[row, state].float())
        assert torch.equal(got["v"], v[row, state].float())


def test_bank_refuses_others_and_broken_files(tmp_path):
    bank = open_bank(tmp_path / "bank")
    for part in range(3):
        n = len(bank.rows_of(part))
        x = torch.zeros(n, 2, 4)
        bank.write(part, {"index": torch.zeros(n).long(), "x": x, "v": x.clone()})
    other = "was made with another seed, grid: name another folder, or remove this one"
    with pytest.raises(UserError, match=other):
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
    two, three = torch.zeros(2, 2, 4), torch.zeros(3, 2, 4)
    too_short = {"index": torch.zeros(2).long(), "x": two, "v": two.clone()}
    no_v = {"index": torch.zeros(3).long(), "x": three}
    for broken in (too_short, no_v):
        bank.write(1, broken)
        with pytest.raises(UserError, match="00001.safetensors is not a whole part of a bank"):
            open_bank(tmp_path / "bank").open()
