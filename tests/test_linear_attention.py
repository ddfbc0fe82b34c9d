"""kernels/linear_attention.py: the torch reference and the Triton kernels against a float64 oracle.

The kernels run under Triton's interpreter, which must be chosen before triton is imported. So their
cases run in a process of their own, which the fixture `interpreted` starts as
`python tests/test_linear_attention.py`: it prints one JSON line per case, and each case is a test
here. In that process every torch.empty is filled with NaN, so that a number which a kernel forgets
to write shows.
"""

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # the interpreter's process
    sys.path.insert(0, str(ROOT))
    os.environ["TRITON_INTERPRET"] = "1"

import helpers  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from kernels import bench_linear_attention  # noqa: E402
from kernels import linear_attention as la  # noqa: E402
from kernels import linear_attention_ops as ops  # noqa: E402
from kernels import linear_attention_triton as chip  # noqa: E402
from kernels.linear_attention import linear_attention, quadratic_oracle  # noqa: E402
from models.networks.wan import WanTransformer3DModel  # noqa: E402

EPS, linear_attention_reference = la.EPS, la.linear_attention_reference
needs_triton = pytest.mark.skipif(ops.triton is None, reason="triton is not installed")
needs_compiler = pytest.mark.skipif(
    not shutil.which("gcc") and not os.environ.get("CC"), reason="torch.compile needs a C compiler"
)


def normal(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def inputs(
    feature_map="hedgehog",
    B=2,
    N=7,
    H=3,
    D=5,
    N_q=None,
    D_v=None,
    projections=True,
    dtype=torch.float64,
):
    """-> [q, k, v] or, for hedgehog with projections, [q, k, v, w_q, w_k], W of unit gain."""
    x = [
        normal(B, n, H, d, seed=s, dtype=dtype)
        for s, (n, d) in enumerate([(N_q or N, D), (N, D), (N, D_v or D)])
    ]
    if feature_map == "none":
        x[:2] = [a.abs() for a in x[:2]]  # given features: positive here
    if feature_map == "hedgehog" and projections:
        x += [normal(H, D, D, seed=s, dtype=dtype) / D**0.5 for s in (3, 4)]
    return x


def relative(a, b):
    """Relative error of a against b in Frobenius norm."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- the reference -------------------------------------------------------------------------------

MAPS = [
    ("hedgehog", True),
    ("hedgehog", False),
    ("softmax", False),
    ("elu", False),
    ("relu", False),
    ("none", False),
]


@pytest.mark.parametrize("feature_map, projections", MAPS)
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_reference_is_the_quadratic_form(feature_map, projections, eps):
    """O(N) sums equal the explicit attention matrix in float64, for any chunking.

    The numbers of queries and of value columns differ from those of the keys.
    """
    x = inputs(feature_map, N=11, N_q=6, D_v=4, projections=projections)
    q, k, v, *w = x
    eps = eps or EPS[feature_map]
    expected = quadratic_oracle(q, k, v, feature_map, *w, eps=eps)
    for chunk in (1, 3, 4, 11, 4096):
        got = linear_attention_reference(q, k, v, feature_map, *w, eps=eps, chunk=chunk)
        assert got.shape == (2, 6, 3, 4)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("feature_map", la.FEATURE_MAPS)
def test_oracle_is_the_double_sum(feature_map):
    """The oracle itself, by loops over queries and keys.

    o_i = sum_j a_ij v_j / (sum_j a_ij + N eps) with a_ij = phi(q_i) . phi(k_j).
    """
    q, k, v, *w = inputs(feature_map, B=1, N=4, H=2, D=3)
    got = quadratic_oracle(q, k, v, feature_map, *w, eps=0.1)
    phi = {
        "softmax": lambda u: u.exp() / u.exp().sum(),
        "relu": lambda u: u.clamp_min(0),
        "none": lambda u: u,
        "elu": lambda u: torch.where(u > 0, u + 1, u.exp()),
        "hedgehog": lambda u: torch.cat([u.exp() / u.exp().sum(), (-u).exp() / (-u).exp().sum()]),
    }
    for h, i in itertools.product(range(2), range(4)):
        up, down = torch.zeros(3, dtype=torch.float64), 4 * 0.1
        for j in range(4):
            x, y = q[0, i, h], k[0, j, h]
            if w:
                x, y = x @ w[0][h], y @ w[1][h]
            a = phi[feature_map](x) @ phi[feature_map](y)
            up, down = up + a * v[0, j, h], down + a
        torch.testing.assert_close(got[0, i, h], up / down)


def masked_difference(backend, dtype):
    """Largest difference of masked keys from keys that are cut off, and of lengths from a mask."""
    q, k, v, *w = inputs(B=2, N=9, H=1, D=8, dtype=dtype)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 0]]).bool()

    def call(q, k, v, mask=None):
        o = linear_attention(q, k, v, "hedgehog", *w, eps=0.2, backend=backend, mask=mask)
        return [o, *torch.autograd.grad(o.square().sum(), w)]

    w = [a.requires_grad_() for a in w]
    worst = 0
    for i, m in enumerate(mask):
        one = [a[i : i + 1] for a in (q, k, v)]
        got = call(*one, mask=m[None])
        expected = call(one[0], one[1][:, m], one[2][:, m])
        worst = max([worst, *((a - b).abs().max().item() for a, b in zip(got, expected))])
    lengths = call(q[1:], k[1:], v[1:], mask=torch.tensor([4]))
    worst = max(worst, (lengths[0] - got[0]).abs().max().item())
    # a mask whose batch is its last dimension in memory
    pairs = zip(call(q, k, v, mask=mask), call(q, k, v, mask=mask.t().contiguous().t()))
    return max([worst, *((a - b).abs().max().item() for a, b in pairs)])


def test_masked_keys_are_as_if_cut_off():
    """Outputs and gradients, with an eps, which is relative to the mean over keys that count."""
    assert masked_difference("torch", torch.float64) < 1e-12


def test_weights_of_keys_go_with_their_chunk():
    q, k, v, *w = inputs(B=2, N=9, H=1, D=8, dtype=torch.float64)
    weights = torch.rand(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, parts = (
        linear_attention_reference(q, k, v, "hedgehog", *w, chunk=chunk, key_weights=weights)
        for chunk in (9, 4)
    )
    assert (whole - parts).abs().max() < 1e-12


@pytest.mark.parametrize("feature_map, projections", MAPS)
def test_reference_gradients(feature_map, projections):
    """gradcheck in float64, over several chunks, of q, k, v and both projections."""
    x = inputs(feature_map, B=1, N=5, H=2, D=3, N_q=4, projections=projections)
    x = [a.requires_grad_() for a in x]

    def call(q, k, v, *w):
        return linear_attention_reference(q, k, v, feature_map, *w, eps=0.05, chunk=2)

    assert torch.autograd.gradcheck(call, x)


def test_hedgehog_is_two_softmaxes():
    """Eq. 6 of LinVideo: the halves are softmaxes of xW and -xW, and each head has its own W."""
    x, w = normal(2, 5, 3, 4), normal(3, 4, 4, seed=1)
    phi = la.features(x, "hedgehog", w)
    assert phi.shape == (2, 5, 3, 8)
    for h in range(3):
        u = x[:, :, h] @ w[h]
        torch.testing.assert_close(phi[:, :, h], torch.cat([u.softmax(-1), (-u).softmax(-1)], -1))
        torch.testing.assert_close(phi[:, :, h, :4].sum(-1), torch.ones(2, 5, dtype=x.dtype))
    identity = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    assert torch.equal(la.features(x, "hedgehog"), la.features(x, "hedgehog", identity))


@pytest.mark.parametrize("feature_map", ["hedgehog", "softmax", "elu"])
def test_positive_features_are_clamped(feature_map):
    """exp(-1000) is 0 in any dtype: such features stay at 1e-12, and pass no gradient."""
    x = torch.tensor([[-1000.0, 0.0, 500.0, -1000.0]], requires_grad=True)
    phi = la.features(x[:, None, None], feature_map)
    assert phi.min() == torch.tensor(1e-12)
    phi.sum().backward()
    assert x.grad[0, 0] == 0 and x.grad.isfinite().all()


def test_eps_is_relative_to_the_mean_denominator():
    """With every key twice attention is the same, so eps weighs no less in longer sequences.

    And o (d + eps) is phi(q) S, whatever eps.
    """
    q, k, v, *w = inputs()
    once = linear_attention(q, k, v, w_q=w[0], w_k=w[1], eps=0.2)
    k_twice, v_twice = torch.cat([k, k], 1), torch.cat([v, v], 1)
    twice = linear_attention(q, k_twice, v_twice, w_q=w[0], w_k=w[1], eps=0.2)
    torch.testing.assert_close(once, twice)
    plain = linear_attention(q, k, v, w_q=w[0], w_k=w[1])
    phi_q, phi_k = la.features(q, "hedgehog", w[0]), la.features(k, "hedgehog", w[1])
    d = torch.einsum("bnhf,bhf->bnh", phi_q, phi_k.mean(1))[..., None]
    torch.testing.assert_close(once * (d + 0.2), plain * d)


def test_default_eps():
    """0 for positive maps, so that constant values come back exactly; 1e-6 for relu and "none".

    Queries without any feature then give 0 and not NaN.
    """
    for feature_map in ("hedgehog", "softmax", "elu"):
        q, k, v = inputs(feature_map, projections=False)
        ones = torch.ones_like(v)
        got = linear_attention(q, k, ones, feature_map)
        torch.testing.assert_close(got, ones, rtol=0, atol=1e-14)
    q, k, v = inputs("relu")
    assert torch.equal(linear_attention(-q.abs(), k, v, "relu"), torch.zeros_like(v))
    q, k = q.abs(), k.abs()
    for feature_map in ("relu", "none"):
        got = linear_attention(q, k, v, feature_map)
        assert torch.equal(got, linear_attention_reference(q, k, v, feature_map, eps=1e-6))
        assert not torch.equal(got, linear_attention(q, k, v, feature_map, eps=0))


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
def test_reference_accumulates_in_float32(dtype, bound):
    """Half precision goes in and out, float32 is between, also under autocast.

    All that is lost is the rounding of the output.
    """
    x = inputs(N=300, D=16, dtype=torch.float32)
    q, k, v, *w = [a.to(dtype) for a in x[:3]] + x[3:]
    wide = [a.double() for a in (q, k, v, *w)]
    exact = quadratic_oracle(*wide[:3], "hedgehog", *wide[3:])
    got = linear_attention(q, k, v, "hedgehog", *w)
    assert got.dtype == dtype and relative(got, exact) < bound
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(linear_attention(q, k, v, "hedgehog", *w), got)
    from_float32 = linear_attention(q.float(), k.float(), v.float(), "hedgehog", *w)
    assert torch.equal(got, from_float32.to(dtype))


def test_views_are_not_copied_and_float64_stays():
    """Views give what their copies give, and float64 comes back.

    q is a view of a fused (B, N, 3, H, D) projection, k of a (B, H, N, D) tensor, v is expanded.
    """
    qkv = normal(2, 9, 3, 4, 5)
    q, k, v = qkv.unbind(2)
    k, v = k.transpose(1, 2).contiguous().transpose(1, 2), v[:, :1].expand(-1, 9, -1, -1)
    got = linear_attention(q, k, v)
    assert got.dtype == torch.float64
    assert torch.equal(got, linear_attention(q.clone(), k.clone(), v.clone()))


# ---- properties, of the reference here and of the kernels below ----------------------------------


@functools.cache
def properties(backend, N=33, D=16, dtype=torch.float32):
    """Properties that need no oracle, {name: (value, bound)}: each value is at most its bound."""
    q, k, v, w_q, w_k = (a.requires_grad_() for a in inputs(B=2, N=N, H=2, D=D, dtype=dtype))

    def call(q, k, v, w_q=w_q, w_k=w_k):
        return linear_attention(q, k, v, "hedgehog", w_q, w_k, backend=backend)

    def gradients(o, *x):
        return torch.autograd.grad(o, x, normal(*o.shape, seed=9, dtype=dtype))

    def largest(a):
        return a.detach().abs().max().item()

    found = {}
    o = call(q, k, v)
    grads = gradients(o, q, k, v, w_q, w_k)
    found["v = 1 gives 1"] = largest(call(q, k, torch.ones_like(v)) - 1), 2e-6
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    found["order of keys does not matter"] = largest(call(q, k[:, order], v[:, order]) - o), 2e-6
    found["order of queries is kept"] = largest(call(q[:, order], k, v) - o[:, order]), 2e-6
    mean = v.mean(1, keepdim=True)
    found["W = 0 gives mean(v)"] = largest(call(q, k, v, 0 * w_q, 0 * w_k) - mean), 2e-6
    both_negative = largest(call(q, k, v, -w_q, -w_k) - o)
    found["(W_q, W_k) -> (-W_q, -W_k) changes nothing"] = both_negative, 2e-6
    found["-W_q alone does"] = -largest(call(q, k, v, -w_q) - o), -1e-3
    big = (1000 * q).detach().requires_grad_()
    o_big = call(big, k, v)
    found["|q| = 1e3 stays in the hull of v"] = largest(o_big) - largest(v), 1e-5
    infinite = sum((~g.isfinite()).sum().item() for g in gradients(o_big, big, k, v, w_q, w_k))
    found["and its gradients are finite"] = infinite, 0
    # the features of queries and keys do not meet: all that is left of d is the clamp
    far = torch.eye(D, dtype=dtype)[0] * 1e3
    q_far, k_far = far.expand_as(q), far.roll(1).expand_as(k)
    o_far = linear_attention(q_far, k_far, v, "softmax", backend=backend)
    found["disjoint features give a mean of v, not NaN"] = largest(o_far - mean), 1e-3
    again = call(q, k, v)
    pairs = zip((o, *grads), (again, *gradients(again, q, k, v, w_q, w_k)), strict=True)
    found["bitwise equal twice"] = sum(not torch.equal(a, b) for a, b in pairs), 0
    d_o = normal(*o.shape, seed=9, dtype=dtype)
    found["sum over keys of dv is the sum of dO"] = largest(grads[2].sum(1) - d_o.sum(1)), 1e-4
    return found


@pytest.mark.parametrize("name", list(properties("torch")))
def test_property_of_the_reference(name):
    value, bound = properties("torch")[name]
    assert value <= bound, f"{name}: {value} > {bound}"


@pytest.mark.parametrize("shift", [0, 12, 20])
def test_elu_keeps_its_digits_far_below_zero(shift):
    """elu(x) + 1 in float32 has none left at -17: then o was off by a fifth."""
    x = [a - shift for a in inputs("elu", N=9)[:3]]
    got = linear_attention(*(a.float() for a in x), "elu")
    assert relative(got.double(), linear_attention(*x, "elu")) < 1e-6
    y = x[0].float().requires_grad_()
    slope = torch.autograd.grad(la.features(y, "elu").sum(), y)[0]
    assert relative(slope.double(), torch.where(x[0] > 0, 1.0, x[0].exp())) < 1e-6


# ---- torch.compile and checkpointing -------------------------------------------------------------


@needs_compiler
def test_compiles_as_one_graph_on_the_cpu():
    """torch.compile(fullgraph=True), forward and backward, equals eager."""
    x = [a.requires_grad_() for a in inputs(N=40, D=16, dtype=torch.float32)]
    torch._dynamo.reset()

    def call(*x):
        return linear_attention(*x[:3], "hedgehog", *x[3:])

    got, expected = torch.compile(call, fullgraph=True)(*x), call(*x)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(o.square().sum(), x) for o in (got, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def checkpointed(backend):
    """Largest difference between the gradients with and without activation checkpointing."""
    x = [a.requires_grad_() for a in inputs(N=20, D=16, dtype=torch.float32)]

    def call(*x):
        return linear_attention(*x[:3], "hedgehog", *x[3:], backend=backend)

    plain = torch.autograd.grad(call(*x).square().sum(), x)
    again = torch.autograd.grad(checkpoint(call, *x, use_reentrant=False).square().sum(), x)
    return max((a - b).abs().max().item() for a, b in zip(plain, again, strict=True))


def test_checkpointing_changes_nothing():
    assert checkpointed("torch") == 0


# ---- wrong input ---------------------------------------------------------------------------------

x, X64 = normal(2, 8, 3, 16, dtype=torch.float32), normal(2, 8, 3, 16)
W = normal(3, 16, 16, dtype=torch.float32)
WRONG = {
    "v has 4 heads": dict(v=normal(2, 8, 4, 16, dtype=torch.float32)),
    "k has 1 heads": dict(k=x[:, :, :1], v=x[:, :, :1]),
    "k has batch size 1": dict(k=x[:1], v=x[:1]),
    "v has batch size 3": dict(v=normal(3, 8, 3, 16, dtype=torch.float32)),
    "k has head size 8": dict(k=x[..., :8]),
    "v has 7 rows, k has 8": dict(v=x[:, :7]),
    "q must be a floating-point tensor": dict(q=torch.ones(2, 8, 3, 16, dtype=torch.int64)),
    "k must be a floating-point tensor": dict(k=torch.ones(2, 8, 3, 16, dtype=torch.int32)),
    "v must have q's dtype": dict(v=X64),
    "q must be a tensor": dict(q=x[0]),
    "v must be a tensor (B, N, H, D), got list": dict(v=[1.0]),
    "q is empty": dict(q=x[:, :0]),
    "k is empty": dict(k=x[:, :0], v=x[:, :0]),
    "feature_map must be one of": dict(feature_map="exp"),
    "feature_map must be one of ('hedgehog', 'softmax', 'relu', 'elu', 'none'), got None": dict(
        feature_map=None
    ),
    "w_q must be a floating-point tensor (H, D, E) = (3, 16, 'E')": dict(w_q=W[:2]),
    "w_k must be a floating-point tensor (H, D, E) = (3, 16, 'E')": dict(w_k=W[0]),
    "w_k gives 16 features a half, w_q 8": dict(w_q=W[..., :8], w_k=W),
    "mask must be bool (B, N) = (2, 8)": dict(mask=torch.ones(2, 7, dtype=torch.bool)),
    "w_q was given, but feature_map 'softmax'": dict(w_q=W, feature_map="softmax"),
    "w_k was given, but feature_map 'none'": dict(w_k=W, feature_map="none"),
    "eps must be a finite number >= 0": dict(eps=-1e-6),
    "eps must be a finite number >= 0, got nan": dict(eps=float("nan")),
    "backend must be None, 'torch', 'triton' or 'faster'": dict(backend="cuda"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_named(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_attention(**{**dict(q=x, k=x, v=x), **WRONG[message]})


def test_triton_is_refused_on_the_cpu_and_not_needed():
    """Asked for by name, Triton says why not; otherwise the reference runs at any head size."""
    if ops.triton is not None and not ops.INTERPRET:
        with pytest.raises(ValueError, match="q must be on a CUDA device"):
            linear_attention(x, x, x, backend="triton")
    for D in (3, 24, 256):
        y = normal(1, 4, 2, D)
        torch.testing.assert_close(linear_attention(y, y, y), quadratic_oracle(y, y, y))


def test_backend_for_says_what_runs(monkeypatch):
    """By shared memory, size and dtype; devices are pretended: nothing is launched."""
    monkeypatch.setattr(ops, "triton", ops.triton or True)
    monkeypatch.setattr(ops, "INTERPRET", True)
    shared = {"H100": 227, "A100": 163, "RTX 4090": 99}
    found = {}
    for card, size in shared.items():
        monkeypatch.setattr(ops, "shared_memory", lambda device, size=size: size * 1024)
        for D, w, dtype in (
            (128, None, "bfloat16"),
            (128, 64, "bfloat16"),
            (72, None, "bfloat16"),
            (64, None, "float32"),
            (128, None, "float32"),
            (130, None, "bfloat16"),
        ):
            q = torch.empty(1, 1, 1, D, dtype=getattr(torch, dtype))
            w = w and torch.empty(1, D, w)
            found[card, D, w is not None, dtype] = ops.why_not(q, None, "hedgehog", w)
            # under the interpreter torch runs, as a call with backend=None does
            assert la.backend_for(q, w_q=w)[0] == "torch"
    torch_runs = {key for key, name in found.items() if name}
    both = {("RTX 4090", D, w, "bfloat16") for D, w in ((128, False), (128, True), (72, False))}
    never = {(c, 128, False, "float32") for c in shared} | {
        (c, 130, False, "bfloat16") for c in shared
    }
    assert torch_runs == both | never


@pytest.fixture
def pretended_kernels(monkeypatch):
    """Kernels that are the reference, and how slow the backward pass of either back end is.

    -> list of what runs, {back end: seconds}
    """
    ran, slow = [], {"triton": 0.0, "torch": 0.0}
    reference = la.linear_attention_reference

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            ran.append(ctx.name + " backward")
            time.sleep(slow[ctx.name])
            return g, None

    def pretended(name):
        def call(q, k, v, feature_map, w_q, w_k, eps, *_, **__):
            ran.append(name)
            o = reference(q, k, v, feature_map, w_q, w_k, eps)
            return Slow.apply(o, name) if o.requires_grad else o

        return call

    monkeypatch.setattr(ops, "why_not", lambda *_: None)
    monkeypatch.setattr(ops, "INTERPRET", False)
    monkeypatch.setattr(ops, "by_kernels", pretended("triton"))
    monkeypatch.setattr(la, "linear_attention_reference", pretended("torch"))
    monkeypatch.setattr(la, "_faster", {})
    return ran, slow


def test_faster_backend_times_once(pretended_kernels):
    """Each kind of call once, with its backward pass; the kernels are pretended, by the reference.

    Another length below the same power of two, and other numbers, are not timed again.
    """
    ran, slow = pretended_kernels
    x = [normal(1, 5, 2, 16).requires_grad_() for _ in range(3)]
    slow["triton"] = 0.02
    assert la.faster_backend(*x) == "torch"
    assert ran == 6 * ["torch", "torch backward"] + 6 * ["triton", "triton backward"]
    slow |= {"triton": 0.0, "torch": 0.02}  # too late for this kind of call, but not for another
    ran.clear()
    six = [normal(1, 6, 2, 16).requires_grad_() for _ in range(3)]
    assert la.faster_backend(*six) == "torch" and not ran
    linear_attention(*six, backend="faster")
    assert ran == ["torch"]
    nine = [normal(1, 9, 2, 16).requires_grad_() for _ in range(3)]
    assert la.faster_backend(*nine) == "triton"
    with torch.no_grad():
        ran.clear()
        assert la.faster_backend(*x) in ("torch", "triton")
        assert ran == 6 * ["torch"] + 6 * ["triton"]
        ran.clear()
        assert la.faster_backend(*x, "relu") and len(ran) == 12
    assert all(t.grad is None for t in (*x, *six, *nine))
    share = SimpleNamespace(N=5, sum=lambda sums: sums)
    ran.clear()
    linear_attention(*x, backend="faster", share=share)  # torch is timed the faster one here
    assert ran == ["triton"]


def test_faster_backend_inside_of_what_torch_does(pretended_kernels, monkeypatch):
    """Checkpointing, torch.func, a graph that is captured, and memory that runs out."""
    ran, slow = pretended_kernels
    slow["triton"] = 0.01
    x = [normal(1, 5, 2, 16).requires_grad_() for _ in range(3)]

    def call(*x):
        return linear_attention(*x, backend="faster")

    o = checkpoint(call, *x, use_reentrant=False)
    got = torch.autograd.grad(o.sum(), x)
    assert ran[:24].count("triton") == 6 and ran[24:] and "triton" not in ran[24:]
    expected = torch.autograd.grad(linear_attention(*x, backend="torch").sum(), x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))

    nine = [normal(1, 9, 2, 16) for _ in range(3)]
    ran.clear()
    torch.func.vmap(lambda a: call(a, *nine[1:]))(torch.stack([nine[0]] * 2))
    assert ran == ["triton"] and len(la._faster) == 1

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    slow |= {"triton": 0.0}
    monkeypatch.setattr(la, "linear_attention_reference", no_memory)
    assert la.faster_backend(*nine) == "triton" and len(la._faster) == 2


def test_a_gpu_where_triton_cannot_compile(monkeypatch):
    """Without gcc its driver raises at the first use: torch runs, and the reason is named."""

    def no_compiler():
        raise RuntimeError("Failed to find C compiler. Please specify via CC.\nmore")

    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=no_compiler))
    fake = SimpleNamespace(runtime=SimpleNamespace(driver=driver))
    monkeypatch.setattr(ops, "triton", fake)
    ops.cannot_start.cache_clear()
    q = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 5, 2, 64))
    assert ops.why_not(q, None, "softmax", None) == (
        "triton cannot start (Failed to find C compiler. Please specify via CC.): "
        "it needs a C compiler and Python's headers"
    )
    ops.cannot_start.cache_clear()
    driver.active.get_current_device = lambda: 0
    assert ops.cannot_start() is None
    ops.cannot_start.cache_clear()


def test_faster_warns_where_the_kernels_cannot(monkeypatch):
    """It then is as no back end named: nothing is timed."""
    asked = []
    monkeypatch.setattr(la, "faster_backend", lambda *_: asked.append(1))
    x = normal(1, 5, 2, 16)
    assert torch.equal(linear_attention(x, x, x, backend="faster"), linear_attention(x, x, x))
    assert not asked


@pytest.mark.skipif(ops.triton is None or ops.INTERPRET, reason="needs triton")
@pytest.mark.parametrize("name", ["reduce", "apply", "backward"])
def test_no_kernel_is_compiled_anew_for_another_length(name):
    """Of the numbers only strides make kernels of their own: where they are 1, or divide by 16."""
    kernel = getattr(chip, f"{name}_kernel")
    tensors = {"X", "Y", "W", "A", "COEFF", "SUMS", "OUT", "OVER_D", "DX", "DU", "DY"}
    may = [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)]
    numbers = set(may) - tensors - {"scale", "eps"}  # which are floats, and those never are
    assert numbers and all(re.fullmatch("[xy]_[bnhd]", name) for name in numbers), numbers


def test_feature_dim_of_the_module():
    """W (H, D, E): orthonormal columns that meet every channel, the identity at E = D."""
    for E in (8, 5, 16):
        attend = la.LinearAttention(3, 16, feature_dim=E)
        assert attend.w_q.shape == (3, 16, E) and (attend.w_q.sum(-1) > 0).all()
        if 16 % E == 0:
            torch.testing.assert_close(attend.w_q[0].T @ attend.w_q[0], torch.eye(E))
        assert attend(x, x, x).shape == x.shape
    assert torch.equal(la.LinearAttention(1, 16).w_k[0], torch.eye(16))
    for wrong in (0, 17, 2.0):
        with pytest.raises(ValueError, match="feature_dim must be 1 to the head size, 16"):
            la.LinearAttention(3, 16, feature_dim=wrong)
    with pytest.raises(ValueError, match="feature_dim is for 'hedgehog'"):
        la.LinearAttention(3, 16, "elu", feature_dim=8)


def test_a_copy_of_the_file_alone_runs_the_reference(tmp_path):
    """Beside a script of another project, which may have a package `kernels` of its own."""
    assert la.TINY == chip.TINY
    shutil.copy(la.__file__, tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    (tmp_path / "script.py").write_text(
        """
import torch
from linear_attention import LinearAttention, backend_for, linear_attention

q, k, v = torch.randn(3, 2, 7, 3, 16).unbind()
attend = LinearAttention(3, 16)
attend(q, k, v).sum().backward()
assert attend.w_q.grad.abs().sum() > 0
assert backend_for(q)[0] == "torch"
try:
    linear_attention(q, k, v, backend="triton")
except ValueError as e:
    print(e)
"""
    )
    run = [sys.executable, "script.py"]
    done = subprocess.run(run, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "linear_attention_ops.py and linear_attention_triton.py are not there" in done.stdout


@pytest.mark.parametrize("where", [".", "own/attention"])
def test_all_three_files_are_copied(tmp_path, where):
    """Into no package or into any, beside an installed package `kernels` of another make."""
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("get_kernel = None\n")
    folder = tmp_path / where
    folder.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "kernels").glob("linear_attention*.py"):
        shutil.copy(path, folder)
    place = "" if where == "." else where.replace("/", ".") + "."
    code = f"""
import torch, kernels
from {place}linear_attention import linear_attention, ops
q, k, v = torch.randn(3, 2, 7, 3, 16).unbind()
assert linear_attention(q, k, v, feature_map="elu").shape == q.shape
print(ops.__name__, ops.chip.__name__, kernels.__file__)
"""
    env = {**environment(), "PYTHONPATH": str(tmp_path / "site")}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = " ".join(f"{place}linear_attention_{name}" for name in ("ops", "triton"))
    assert done.stdout.startswith(names) and str(tmp_path / "site") in done.stdout


def test_works_without_triton():
    """Where triton cannot be imported the reference runs; backend='triton' says what is missing."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from kernels.linear_attention import linear_attention
x = torch.randn(1, 5, 2, 16)
linear_attention(x, x, x).sum()
try:
    linear_attention(x, x, x, backend="triton")
except ValueError as e:
    print(e)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    assert "triton is not installed" in done.stdout, done.stderr[-2000:]


# ---- the kernels, interpreted --------------------------------------------------------------------
#
# A case is: feature map, projections, N_q, N, D, D_v, splits (0: the rule), layout, eps (None: the
# default), dtype.


def square(feature_map, projections, N, D, splits, layout):
    """A case with as many queries as keys and values as wide as keys, in float32."""
    return (feature_map, projections, N, N, D, D, splits, layout, None, "float32")


CASES = {
    **{
        f"hedgehog N={N} D={D} splits={s}": square("hedgehog", True, N, D, s, layout)
        for N, D, s, layout in [
            (1, 16, 1, "plain"),
            (1, 32, 7, "fused"),
            (15, 16, 2, "heads first"),
            (16, 32, 7, "padded"),
            (17, 16, 1, "fused"),
            (17, 64, 2, "strided"),
            (197, 32, 1, "padded"),
            (197, 16, 7, "fused"),
            (300, 64, 7, "padded"),
            (70, 24, 0, "heads first"),
        ]
    },
    **{
        f"{m} N={N} D={D} splits={s}": square(m, False, N, D, s, layout)
        for m, N, D, s, layout in [
            ("hedgehog", 197, 16, 2, "fused"),
            ("softmax", 1, 16, 7, "plain"),
            ("softmax", 197, 32, 7, "padded"),
            ("softmax", 300, 64, 2, "fused"),
            ("relu", 17, 32, 1, "heads first"),
            ("relu", 300, 16, 7, "padded"),
            ("elu", 15, 16, 2, "padded"),
            ("elu", 197, 32, 2, "strided"),
            ("none", 16, 16, 1, "fused"),
            ("none", 197, 16, 7, "padded"),
        ]
    },
    "more keys than queries": ("hedgehog", True, 17, 70, 16, 16, 2, "padded", None, "float32"),
    "more queries than keys": ("softmax", False, 70, 17, 16, 16, 2, "padded", None, "float32"),
    "values wider than keys": ("hedgehog", True, 40, 33, 16, 32, 2, "padded", None, "float32"),
    "large eps": ("hedgehog", True, 40, 33, 16, 16, 2, "fused", 0.5, "float32"),
    "large eps, relu": ("relu", False, 40, 33, 16, 16, 1, "fused", 0.1, "float32"),
    "size 72": ("hedgehog", True, 17, 40, 72, 80, 2, "padded", None, "bfloat16"),
    "size 24, softmax": ("softmax", False, 17, 40, 24, 40, 2, "padded", None, "float32"),
    "size 24, elu": ("elu", False, 17, 40, 24, 24, 2, "padded", None, "float32"),
    "128 given features": ("none", False, 17, 33, 128, 16, 2, "padded", None, "bfloat16"),
    "float16": ("hedgehog", True, 70, 70, 32, 32, 2, "fused", None, "float16"),
    "float16, softmax": ("softmax", False, 70, 70, 32, 32, 2, "fused", None, "float16"),
    "bfloat16": ("hedgehog", True, 70, 70, 32, 32, 2, "fused", None, "bfloat16"),
}
# where a GPU rounds to bfloat16, the interpreter truncates
BOUNDS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
NAMES = ("o", "dq", "dk", "dv", "dw_q", "dw_k")


def lay_out(x, layout):
    """The same (B, N, H, D) numbers as a view with other strides, inside a larger tensor of NaN."""
    B, N, H, D = x.shape
    buffer, view = {
        "plain": ((B, N, H, D), lambda a: a),
        "fused": ((B, N, 3, H, D), lambda a: a[:, :, 1]),
        "heads first": ((B, H, N, D), lambda a: a.transpose(1, 2)),
        "padded": ((B + 1, N + 5, H + 1, D + 3), lambda a: a[:B, 2 : 2 + N, :H, 3:]),
        "strided": ((B, 2 * N, H, 2 * D), lambda a: a[:, ::2, :, ::2]),
    }[layout]
    a = view(torch.full(buffer, float("nan"), dtype=x.dtype, device=x.device))
    a.copy_(x)
    return a


def run_case(feature_map, projections, N_q, N, D, D_v, splits, layout, eps, dtype, device="cpu"):
    """Errors of o and all gradients against the oracle, {name: (error, bound)} in Frobenius norm.

    The bound is tolerance (|reference| + |dO| / 10), where the tolerance is that of BOUNDS.
    """
    dtype = getattr(torch, dtype)
    eps = EPS[feature_map] if eps is None else eps
    x = [a.to(device) for a in inputs(feature_map, 2, N, 2, D, N_q, D_v, projections)]
    w = [a.float().requires_grad_() for a in x[3:]]
    x = [lay_out(a.to(dtype), layout).requires_grad_() for a in x[:3]] + w
    w = w or [None, None]
    o = ops.by_kernels(*x[:3], feature_map, *w, eps, num_splits=splits)
    g = lay_out(normal(*o.shape, seed=8).to(device, dtype), layout)
    got = [o, *torch.autograd.grad(o, x, g)]
    y = [a.detach().double().requires_grad_() for a in x]
    ref = quadratic_oracle(*y[:3], feature_map, *y[3:], eps=eps)
    expected = [ref, *torch.autograd.grad(ref, y, g.double())]
    tolerance = BOUNDS[str(dtype)[6:]]
    found = {}
    for name, a, b in zip(NAMES[: len(got)], got, expected, strict=True):
        assert a.shape == b.shape, (name, a.shape)
        assert a.dtype == (torch.float32 if name[:2] == "dw" else dtype), (name, a.dtype)
        bound = tolerance * b.norm().item() + tolerance / 10 * g.double().norm().item()
        found[name] = (a.double() - b).norm().item(), bound
    return found


def registration():
    """opcheck of both operators, torch.compile around them, checkpointing, and what they save.

    -> {name: (value, bound)}.
    """
    x = [a.requires_grad_() for a in inputs(N=9, H=2, D=16, dtype=torch.float32)]
    qkv = [a.detach() for a in x[:3]]
    checks = ("test_schema", "test_faketensor")
    more_checks = ("test_autograd_registration", "test_aot_dispatch_dynamic")

    def failures(operator, args, checks):
        result = torch.library.opcheck(operator, args, test_utils=checks, raise_exception=False)
        return sum(v != "SUCCESS" for v in result.values())

    def largest_difference(a, b):
        return max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))

    def call(*x):
        return linear_attention(*x[:3], "hedgehog", *x[3:], backend="triton")

    found = {}
    for name, w in (("with W", x[3:]), ("without W", [None, None])):
        q, k, v = qkv
        args = (*x[1:3], w[1], None, "hedgehog", 9, 2)
        found[f"opcheck sums {name}"] = failures(ops._sums, args, checks + more_checks), 0
        sums = ops._sums(k, v, w[1], None, "hedgehog", 9, 2).detach()
        need = [True, False, w[1] is not None]
        args = (sums, k, v, w[1], None, "hedgehog", 9, 2, need)
        found[f"opcheck gradients of sums {name}"] = failures(ops._sums_backward, args, checks), 0
        args = (sums, k.bfloat16(), v.bfloat16(), w[1], None, "hedgehog", 9, 2, [True, True, False])
        found[f"and of a frozen W {name}"] = failures(ops._sums_backward, args, checks), 0
        args = (x[0], w[0], sums.requires_grad_(), 16, "hedgehog", 0.0, 2)
        found[f"opcheck apply {name}"] = failures(ops._apply, args, checks + more_checks), 0
        sums, g = sums.detach(), torch.randn(2, 9, 2, 16)
        saved = ops._apply(q, w[0], sums, 16, "hedgehog", 0.0, 2)
        args = (g, q, w[0], sums, *saved, "hedgehog", 2, [False, w[0] is not None, True])
        found[f"opcheck gradients of apply {name}"] = failures(ops._apply_backward, args, checks), 0
    expected = call(*x)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*x)
    grads = [torch.autograd.grad(o.square().sum(), x) for o in (got, expected)]
    difference = largest_difference((got, *grads[0]), (expected, *grads[1]))
    found["torch.compile(fullgraph=True)"] = difference, 1e-6
    found["checkpoint"] = checkpointed("triton"), 0
    kept = []

    def keep(a):
        kept.append(a.numel())
        return a

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda a: a):
        long = [a.requires_grad_() for a in inputs(B=1, N=300, H=1, D=16, dtype=torch.float32)]
        call(*long)
    found["no features are saved"] = max(kept), 300 * 16
    found["masked keys are as if cut off"] = masked_difference("triton", torch.float32), 2e-6
    found["dk and dv by launches of their own"] = on_160_kb(), 1e-5
    found["offsets beyond 2^31"] = beyond_int32(), 1e-6
    found["only what is asked for is computed"] = asked_for(), 0
    found["graphs for five lengths"] = graphs_for_lengths(), 2
    found["blocks of Wan, each one graph"] = compiled_wan(), 1e-6
    frozen = torch.autograd.grad(call(*x[:3], *[a.detach() for a in x[3:]]).square().sum(), x[:3])
    found["frozen W, same gradients"] = largest_difference(frozen, grads[1][:3]), 1e-6
    return found


def beyond_int32():
    """Difference between tensors whose rows and batches lie 2^31 elements apart and their copies.

    The memory is reserved and hardly touched.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False
    far = torch.empty(3 * 2**30 + 2**20, dtype=torch.float16)  # 6 GB, of which a few pages exist
    torch.utils.deterministic.fill_uninitialized_memory = True
    worst = 0
    for shape, stride in (
        ((3, 2, 1, 16), (2**30 + 64, 16, 16, 1)),
        ((1, 40, 1, 16), (0, 71 * 10**6, 16, 1)),  # also from row to row of one tile
        ((1, 2, 1, 64), (0, 1, 0, 36 * 2**20)),  # and from column to column
    ):
        x = far.as_strided(shape, stride)
        x.copy_(normal(*shape))
        got, expected = (
            ops.by_kernels(a, a, a, "softmax", None, None, 0.0, num_splits=1)
            for a in (x, x.clone(memory_format=torch.contiguous_format))
        )
        worst = max(worst, (got - expected).abs().max().item())
    return worst


def on_160_kb():
    """Largest difference between gradients where dk and dv share a launch and where they do not."""
    x = [a.requires_grad_() for a in inputs(B=1, N=17, H=1, D=128, dtype=torch.bfloat16)]
    whole, grads = ops.shared_memory, []
    for size in (227, 160):
        ops.shared_memory = lambda device, size=size: size * 1024
        o = linear_attention(*x[:3], "hedgehog", *x[3:], backend="triton")
        grads.append(torch.autograd.grad(o.float().square().sum(), x))
    ops.shared_memory = whole
    return max((a - b).float().abs().max().item() for a, b in zip(*grads, strict=True))


def graphs_for_lengths():
    """How many graphs torch.compile makes of calls of five lengths: one, and one for any length."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    call = torch.compile(
        functools.partial(linear_attention, backend="triton"), fullgraph=True, backend=counter
    )
    for N in (9, 10, 12, 15, 33):
        call(*inputs(N=N, H=1, D=16, dtype=torch.float32)[:3])
    return counter.frame_count


def compiled_wan():
    """Largest difference that torch.compile(fullgraph=True) of every block makes, gradients too.

    The kernels are operators in it, which it does not look into.
    """
    net = helpers.fill(WanTransformer3DModel(**helpers.TINY_WAN, linear_layers=[0, 1]))
    for place in net.self_attentions:
        m = place.attend
        del place.attend
        place.attend = functools.partial(linear_attention, w_q=m.w_q, w_k=m.w_k, backend="triton")
    x, t = normal(2, net.config["in_channels"], 2, 4, 6, dtype=torch.float32), torch.rand(2)
    text = normal(2, 5, net.config["text_dim"], dtype=torch.float32)
    found, weights = [], list(net.parameters())
    for compiled in (False, True):
        for block in net.blocks if compiled else ():
            block.compile(fullgraph=True, backend="aot_eager")
        out = net(x, t, text=text)
        grads = torch.autograd.grad(out.square().mean(), weights, allow_unused=True)
        found.append([out, *(g for g in grads if g is not None)])
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


def asked_for():
    """How many gradients are computed that nobody asked for, or are wrong when asked for alone."""
    x = inputs(N=9, H=1, D=16, dtype=torch.float32)
    every = [a.clone().requires_grad_() for a in x]
    call = functools.partial(ops.by_kernels, feature_map="hedgehog", eps=0.0, num_splits=1)
    o = call(*every[:3], w_q=every[3], w_k=every[4])
    expected, wrong = torch.autograd.grad(o.square().sum(), every), 0
    for i in range(5):
        one = [a.clone().requires_grad_(i == j) for j, a in enumerate(x)]
        o = call(*one[:3], w_q=one[3], w_k=one[4])
        wrong += not torch.equal(torch.autograd.grad(o.square().sum(), one[i])[0], expected[i])
    sums = ops._sums(x[1], x[2], x[4], None, "hedgehog", 9, 1)
    for need in ([True, False, False], [False, True, False], [False, False, True]):
        got = ops._sums_backward(sums, x[1], x[2], x[4], None, "hedgehog", 9, 1, need)
        wrong += [g.numel() > 0 for g in got] != need
    return wrong


def refusals():
    """backend="triton" with what the kernels do not take, {name: (0 if refused by name, 0)}."""
    found = {}
    q130, v130 = (normal(2, 8, 3, 130, dtype=torch.float32) for _ in range(2))
    for what, y, v, message in (
        ("q of 130", q130, q130, "q must have a head size of at most 128, got 130"),
        ("v of 130", x, v130, "v must have a head size of at most 128, got 130"),
        ("float64", X64, X64, "q must be float32, bfloat16 or float16"),
        (
            "float32 of 128",
            q130[..., :128],
            q130[..., :128],
            "needs more than this device's 227 KB",
        ),
    ):
        try:
            linear_attention(y, y, v, backend="triton")
            said = "nothing"
        except ValueError as e:
            said = str(e)
        found[f"refuses {what}"] = int(message not in said), 0
    return {**found, **forward_mode()}


def forward_mode():
    """torch.func.jvp has the reference's derivative, and backend="triton" is refused there.

    The operators have no forward mode, and torch would leave their tangents out without a word.
    """
    primals = inputs(N=9, D=16)[:3]
    tangents = [normal(*a.shape, seed=s) for s, a in enumerate(primals, 5)]

    def jvp(backend):
        def call(*x):
            return linear_attention(*x, backend=backend)

        return torch.func.jvp(call, tuple(primals), tuple(tangents))[1]

    h = 1e-6
    ends = (linear_attention(*(p + s * h * t for p, t in zip(primals, tangents))) for s in (1, -1))
    expected = next(ends).sub(next(ends)) / (2 * h)
    found = {f"jvp by {name}": (relative(jvp(name), expected), 1e-7) for name in (None, "torch")}
    said = "nothing"
    try:
        primals, tangents = ([a.float() for a in x] for x in (primals, tangents))
        jvp("triton")
    except ValueError as e:
        said = str(e)
    found["jvp is refused by name"] = int("no forward-mode derivatives" not in said), 0
    compiled = torch.compile(
        functools.partial(linear_attention, backend="triton"), backend="aot_eager"
    )
    try:
        torch.func.jvp(compiled, tuple(primals), tuple(tangents))
        said = "nothing"
    except ValueError as e:
        said = str(e)
    found["and of a compiled function"] = int("no forward-mode derivatives" not in said), 0
    own = relative(jvp(None), expected)
    return {**found, "jvp of float32, which Triton takes otherwise": (own, 1e-4)}


GROUPS = {
    "properties": lambda: properties("triton"),
    "registration": registration,
    "refusals": refusals,
}


LONG = [  # half of the interpreter's minute, left out without --long
    "registration",
    "hedgehog N=300 D=16 splits=2",
    "hedgehog N=300 D=32 splits=0",
    "hedgehog N=197 D=16 splits=2",
    "relu N=300 D=16 splits=7",
]
EVERY = [*CASES, *GROUPS]


def interpreter_main(left_out):
    """Print a JSON line per case: case, found {name: [value, bound]} or error, seconds."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    assert torch.empty(3).isnan().all() and ops.INTERPRET
    cases = {name: functools.partial(run_case, *case) for name, case in CASES.items()}
    for name, run in {**cases, **GROUPS}.items():
        if name in left_out:
            continue
        begin, line = time.time(), {"case": name}
        try:
            line["found"] = run()
        except Exception:
            line["error"] = traceback.format_exc()[-3000:]
        line["seconds"] = round(time.time() - begin, 2)
        print("RESULT " + json.dumps(line), flush=True)


def environment(**changes):
    """This process's environment for a child on one thread, with no GPU and no interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return {**env, **fixed, **changes}


def exceeded(found):
    """What lies above its bound.  {name: (value, bound)} -> {name: text}."""
    return {
        name: f"{value:.3g} > {bound:.3g}"
        for name, (value, bound) in found.items()
        if not value <= bound
    }


@pytest.fixture(scope="module")
def interpreted(request):
    """One run of this file under the interpreter, {case: its line}."""
    left_out = [] if request.config.getoption("--long") else LONG
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), *left_out],
        capture_output=True,
        text=True,
        timeout=1200,
        env=environment(TRITON_INTERPRET="1"),
    )
    printed = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    lines = [json.loads(line.removeprefix("RESULT ")) for line in printed]
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return {line["case"]: line for line in lines}


@needs_triton
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.long) if c in LONG else c for c in EVERY]
)
def test_kernels(interpreted, case):
    """o and all gradients agree with the oracle; properties, registration, refusals of Triton."""
    line = interpreted[case]
    assert "error" not in line, line["error"]
    assert line["found"] and not exceeded(line["found"]), exceeded(line["found"])


# ---- the kernels on a GPU ------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(
    ops.triton is None or ops.INTERPRET or not torch.cuda.is_available(), reason="needs a GPU"
)


@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_kernels_on_a_gpu(case):
    """The interpreter's cases, compiled."""
    wrong = exceeded(run_case(*CASES[case], device="cuda"))
    assert not wrong, wrong


@needs_gpu
def test_float32_by_the_faster_on_a_gpu(monkeypatch):
    """Either back end is right; which is faster is this card's affair, and is asked once."""
    monkeypatch.setattr(la, "_faster", {})
    x = [normal(1, 600, 4, 64, dtype=torch.float32).cuda().requires_grad_() for _ in range(3)]
    assert la.backend_for(x[0])[0] == "triton"
    o = linear_attention(*x, backend="faster")
    assert list(la._faster.values())[0] in ("torch", "triton")
    assert relative(o.double(), quadratic_oracle(*(t.double() for t in x))) < 1e-5
    linear_attention(*x, backend="faster")
    assert len(la._faster) == 1


def by_equations(x, g, feature_map, eps, rounding=lambda a: a):
    """o and all gradients by Eqs. (1) to (5), each of their lines once.

    In the dtype of x = [q, k, v, w_q, w_k] and of g = dL/do. rounding stands where the kernels
    round to bfloat16: the error that it causes is what kernels without another mistake have.
    """
    q, k, v, *w = x
    D, N = q.shape[-1], k.shape[1]

    def project(a, i):
        return torch.einsum("bnhd,hde->bnhe", a, w[i]) if w else a

    def back(u, dphi, i):
        """Through the feature map.  -> dL/dx, dL/dW or None."""
        du = 0
        for sign, d in zip((1, -1), dphi.split(D, -1), strict=False):  # one half or two
            if feature_map in ("hedgehog", "softmax"):
                p = (sign * u).softmax(-1)
                du = du + sign * (p * (d - (p * d).sum(-1, keepdim=True)))
            else:
                du = du + sign * (d * u.clamp_max(0).exp())
        du = rounding(du)
        if not w:
            return du, None
        dx = rounding(torch.einsum("bnhe,hde->bnhd", du, w[i]))
        return dx, torch.einsum("bnhd,bnhe->hde", (q, k)[i], du)

    u_q, u_k = project(q, 0), project(k, 1)
    phi_q, phi_k = (rounding(la.features(u, feature_map)) for u in (u_q, u_k))  # (B, N, H, f)
    S, z = rounding(torch.einsum("bnhf,bnhd->bhfd", phi_k, v) / N), phi_k.sum(1) / N
    d = torch.einsum("bnhf,bhf->bnh", phi_q, z)[..., None] + eps
    o = rounding(torch.einsum("bnhf,bhfd->bnhd", phi_q, S) / d)
    delta = (g * o).sum(-1, keepdim=True)
    dS = rounding(torch.einsum("bnhf,bnhd->bhfd", phi_q, rounding(g / d)) / N)
    dz = -(phi_q * delta / d).sum(1) / N
    dq, dw_q = back(u_q, (torch.einsum("bhfd,bnhd->bnhf", S, g) - delta * z[:, None]) / d, 0)
    dk, dw_k = back(u_k, torch.einsum("bhfd,bnhd->bnhf", dS, v) + dz[:, None], 1)
    dv = rounding(torch.einsum("bhfd,bnhf->bnhd", dS, phi_k))
    return [o, dq, dk, dv] + ([dw_q, dw_k] if w else [])


@pytest.mark.parametrize("feature_map", ["hedgehog", "softmax", "elu"])
def test_equations(feature_map):
    """Eqs. (1) to (5), as the file prints them, give the quadratic form and autograd's gradient."""
    x = [a.requires_grad_() for a in inputs(feature_map, N=9, N_q=6)]
    o = quadratic_oracle(*x[:3], feature_map, *x[3:], eps=0.1)
    g = normal(*o.shape, seed=8)
    got = by_equations([a.detach() for a in x], g, feature_map, 0.1)
    for a, b in zip(got, [o, *torch.autograd.grad(o, x, g)], strict=True):
        torch.testing.assert_close(a, b)


def errors(got, expected):
    """Relative errors of o and the gradients, {name: float}."""
    triples = zip(NAMES[: len(got)], got, expected, strict=True)
    return {name: relative(a, b) for name, a, b in triples}


@needs_gpu
@pytest.mark.parametrize(
    "feature_map, D", [("hedgehog", 128), ("softmax", 128), ("hedgehog", 64), ("elu", 64)]
)
def test_long_sequences_on_a_gpu(feature_map, D):
    """bfloat16 at Wan's 32,760 tokens: o and all gradients err by the kernels' roundings alone.

    The error of those roundings is computed in float64 by `by_equations`.
    """
    x = [a.cuda() for a in inputs(feature_map, 1, 32760, 2, D, dtype=torch.float32)]
    # W holds the numbers that the kernels multiply
    w = [a.bfloat16().float().requires_grad_() for a in x[3:]]
    x = [a.bfloat16().requires_grad_() for a in x[:3]] + w
    y = [a.detach().double() for a in x]
    g = normal(1, 32760, 2, D, seed=8).to("cuda", torch.bfloat16)
    o = linear_attention(*x[:3], feature_map, *x[3:], backend="triton")
    expected = by_equations(y, g.double(), feature_map, 0.0)
    found = errors([o, *torch.autograd.grad(o, x, g)], expected)
    rounded = by_equations(y, g.double(), feature_map, 0.0, lambda a: a.bfloat16().double())
    floor = errors(rounded, expected)
    print(feature_map, D, {name: f"{found[name]:.2e} of {floor[name]:.2e}" for name in found})
    assert all(found[name] <= 1.15 * floor[name] for name in found), (found, floor)


# ---- compiled without a GPU, and the benchmark ---------------------------------------------------


def bench(*flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "kernels" / "bench_linear_attention.py"), *flags],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )


needs_assembler = pytest.mark.skipif(
    ops.triton is None
    or ops.INTERPRET
    or not list((Path(ops.triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*")),
    reason="no triton, or one without NVIDIA's assembler",
)
SHARED = {"sm_90": 227, "sm_80": 163, "sm_89": 99}  # KB
# the releases of Triton whose code the tiles were chosen by; others may spill a little
NO_SPILLS = ops.triton is not None and ops.triton.__version__.startswith("3.9.")
# bytes a thread that launches of sizes and maps outside the papers spill, found and left
# (docs/results/kernels.md): (feature map, D, E), architecture, launch
SPILLS = {
    (("elu", 128, None), "sm_90", "reduce q"): 16,
    (("hedgehog", 72, 72), "sm_80", "apply"): 8,
    (("hedgehog", 80, 80), "sm_90", "apply"): 8,
    (("hedgehog", 80, 80), "sm_80", "apply"): 8,
    (("hedgehog", 80, 40), "sm_90", "backward q"): 16,
    (("hedgehog", 80, 40), "sm_90", "backward k"): 8,
    (("hedgehog", 96, 96), "sm_90", "apply"): 88,
    (("hedgehog", 96, 96), "sm_80", "apply"): 8,
    (("hedgehog", 96, 48), "sm_90", "backward q"): 16,
    (("hedgehog", 96, 48), "sm_90", "backward k"): 8,
}


def compiled_case(arch, case, monkeypatch, folder):
    """Compile one case of EVERY_CASE: no spills but SPILLS, and shared memory suffices.

    Into a folder of its own, lest an older compilation of the same source is read.
    -> names of the launches.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    launches = []
    for r in bench_linear_attention.compile_case(*case, arch):
        launches.append(r["launch"])
        known = SPILLS.get((case, arch, r["launch"]))
        if NO_SPILLS:
            assert r["loop_spills"] == 0 or known, r
        assert r["spills"] <= ((known or 8) if NO_SPILLS else 256), r
        assert r["shared"] <= SHARED[arch] * 1024 and 16 <= r["regs"] <= 255, r
        assert 50 < r["instructions"] < 4000, r
    return launches


LAUNCHES = ["reduce k", "apply", "backward q", "reduce q", "backward k"]


@needs_assembler
def test_kernels_compile_for_sm_90(monkeypatch, tmp_path):
    """Every launch of a training step of Hedgehog at D = 128, compiled for an H100 without one."""
    case = "hedgehog", 128, 128
    assert compiled_case("sm_90", case, monkeypatch, tmp_path) == [*LAUNCHES, "dW"]


@needs_assembler
@pytest.mark.long
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("case", bench_linear_attention.EVERY_CASE)
def test_every_tile_compiles(arch, case, monkeypatch, tmp_path):
    """All maps and head sizes; Hedgehog of more than 64 columns does not fit 99 KB."""
    launches = compiled_case(arch, case, monkeypatch, tmp_path)
    launches = list(dict.fromkeys(name.split(":")[0] for name in launches))
    fits = arch != "sm_89" or case[0] != "hedgehog" or case[1] <= 64
    assert launches[:5] == (LAUNCHES if fits else []), launches


def test_loop_instructions():
    """The loop from the farthest backward branch's target on, its inner loop included."""
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   FFMA R1, R2, R3, R4 ;
        /*0020*/              @!P0 FADD.FTZ R1, R2, R3 ;
        /*0030*/               @P1 BRA 0x20 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8] ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
    """
    counts = bench_linear_attention.loop_instructions(sass)
    assert counts == {"FFMA": 1, "FADD": 1, "BRA": 2, "HGMMA": 1}


def test_floors_of_the_benchmark():
    """Wan's length on an H100 by hand: 403 MB to move, 77 GFLOP, 201 million exponentials."""
    shape = (1, 32760, 12, 128, "hedgehog", 2)
    for rates, seconds in (
        ((3.0e12, 1e30, 1e30), 402.6e6 / 3.0e12),
        ((1e30, 7e14, 1e30), 77.29e9 / 7e14),
        ((1e30, 1e30, 3.6e12), 201.3e6 / 3.6e12),
    ):
        assert bench_linear_attention.floors(*shape, rates)["forward"] == pytest.approx(
            seconds, rel=1e-3
        )
    step = bench_linear_attention.floors(*shape, (1e30, 1.0, 1e30))["step"]
    assert step == pytest.approx(12 * 32760 * (8 * 2 * 128 * 128 + 6 * 2 * 256 * 128))
    assert bench_linear_attention.floors(*shape[:4], "relu", 2, (1e30, 1e30, 1.0))["step"] < 1e-9


def test_benchmark_runs_on_the_cpu(tmp_path):
    """Each length has a row for the reference and for SDPA, with times and bandwidths, as in JSON.

    The crossover is printed and stored too.
    """
    flags = "--lengths 32,64 --heads 1 --head_dim 16 --repeats 1 --seconds 0.01".split()
    done = bench(*flags, "--json", str(tmp_path / "b" / "b.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "b" / "b.json").read_text())
    assert [(r["N"], r["method"]) for r in result["rows"]] == [
        (N, m) for N in (32, 64) for m in ("torch", "sdpa math", "sdpa flash")
    ]
    for r in result["rows"]:
        gbs = 4 * r["N"] * 16 * 4 / r["forward_s"] / 1e9
        assert r["forward_gbs"] == pytest.approx(gbs) and r["step_s"] > 0
    assert [c["what"] for c in result["crossover"]] == ["forward", "forward + backward"]
    assert "torch beats every SDPA backend" in done.stdout


@pytest.mark.parametrize(
    "flags",
    [
        ["--lengths", "0"],
        ["--heads", "a"],
        ["--methods", "triton,magic"],
        ["--compile", "sm_12"],
        ["--dtype", "int8"],
        ["--n", "4"],
        ["--graph", "--device", "cpu"],
        ["--sass"],
        ["--every"],
        ["--methods", "triton,fla", "--device", "cpu"],
        ["--head_dim", "64", "--compile", "sm_90"],
    ],
)
def test_benchmark_refuses_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit) as e:
        bench_linear_attention.parse_args(flags)
    assert e.value.code == 2 and flags[0] in capsys.readouterr().err


def test_crossover_is_the_length_from_which_on_it_wins():
    """Not the first win: 16 wins, 32 loses, from 64 on it wins against the best backend."""
    methods = ("torch", "sdpa math", "sdpa flash")
    times = {16: (1, 2, 3), 32: (4, 3, 9), 64: (5, 9, 6), 128: (6, 20, 30)}
    rows = [
        dict(N=N, method=m, forward_s=t)
        for N, ts in times.items()
        for m, t in zip(methods, ts, strict=True)
    ]
    assert bench_linear_attention.crossover(rows, "torch") == 64
    assert bench_linear_attention.crossover(rows[:6], "torch") is None
    # where the memory does not suffice for ours and does for theirs, ours does not win
    failed = [r for r in rows if (r["N"], r["method"]) != (128, "torch")]
    assert bench_linear_attention.crossover(failed, "torch") is None
    without = [r for r in rows if r["N"] < 128 or r["method"] == "torch"]
    assert bench_linear_attention.crossover(without, "torch") == 64


def test_memory_that_does_not_suffice_for_the_inputs_is_a_row(monkeypatch):
    args = bench_linear_attention.parse_args("--lengths 8 --head_dim 4 --device cpu".split())

    def full(*shape, generator):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "randn", full)
    row = bench_linear_attention.measure(None, 8, 2, args, "cpu", (1, 1, 1))
    assert row == {"error": "RuntimeError: out of memory"}


if __name__ == "__main__":
    interpreter_main(sys.argv[1:])
