"""Adapters: what they compute, that calls do not disturb one another, and the files of other
programs."""

import copy
import importlib
import json

import pytest
import torch
from helpers import TINY_PIXART, TINY_Z_IMAGE, alone, dit_inputs, perturbed, small_dit
from released import pixart_noise, z_image_velocity
from safetensors.torch import load_file, save_file

from models.files import UserError, open_tensors
from models.networks import WEIGHTS, load_network, lora, network_config, save_network
from models.networks.pixart import PixArtTransformer2DModel
from models.networks.ring_mlp import RingMLP
from models.networks.wan import WanTransformer3DModel, WanTwoNetworks, lora_key
from models.networks.z_image import ZImageTransformer2DModel
from models.plumbing.teachers import start_teacher, starting_network
from models.worlds import load_world

TINY_WAN = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=10,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=32,
)


def networks():
    """-> {name: (network, arguments of a call)}; each weight matters, and the base is frozen."""
    g = torch.Generator().manual_seed(3)
    dit = perturbed(small_dit())
    x, t, label = dit_inputs(dit, 4)
    torch.manual_seed(0)
    wan, ring = perturbed(WanTransformer3DModel(**TINY_WAN)), perturbed(RingMLP(dim=16))
    z_image = perturbed(ZImageTransformer2DModel(**TINY_Z_IMAGE))
    image, caption = torch.randn(2, 4, 4, 6, generator=g), torch.randn(2, 40, 16, generator=g)
    mask = torch.arange(40) < torch.tensor([[5], [40]])
    pixart = perturbed(PixArtTransformer2DModel(**TINY_PIXART))
    video, text = torch.randn(2, 4, 2, 4, 6, generator=g), torch.randn(2, 3, 10, generator=g)
    return {
        "dit": (dit.requires_grad_(False), dict(x=x, t=t, label=label)),
        "wan": (wan.requires_grad_(False), dict(x=video, t=torch.tensor([0.3, 0.95]), text=text)),
        "z_image": (
            z_image.requires_grad_(False),
            dict(x=image, t=torch.tensor([0.3, 0.95]), text=caption, text_mask=mask),
        ),
        "pixart": (
            pixart.requires_grad_(False),
            dict(x=image, t=torch.tensor([0.3, 0.95]), text=caption, mask=mask),
        ),
        "ring": (
            ring.requires_grad_(False),
            dict(x=torch.randn(4, 2, generator=g), t=t, label=label),
        ),
    }


@pytest.fixture(params=["dit", "wan", "z_image", "pixart", "ring"])
def frozen(request):
    return networks()[request.param]


def trained(net, name, rank=3, alpha=6, seed=1, **more):
    """Add an adapter whose B is no longer zero."""
    torch.manual_seed(seed)
    lora.add(net, name, rank, alpha, **more)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora.parameters(net, name):
            p += 0.2 * torch.randn(p.shape, generator=g)
    return net


def gradients(net, name):
    return [p.grad for p in lora.parameters(net, name)]


# ---- what an adapter computes --------------------------------------------------------------------


def test_layer_is_the_formula():
    """y = W x + b + (alpha / rank) B A x, against the product written out.

    With another name, or none, it is the plain layer.
    """
    torch.manual_seed(0)
    layer = lora.Linear(5, 7).double()
    plain, x = torch.nn.Linear(5, 7).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())  # the same names, as nn.Linear
    net = torch.nn.ModuleDict({"one": layer})
    trained(net, "a", rank=2, alpha=5, targets=["one"])
    A, B = lora.parameters(net, "a")
    assert A.shape == (2, 5) and B.shape == (7, 2) and A.dtype == B.dtype == torch.float32
    product = torch.einsum("ki,or,ri->ko", x.flatten(0, 1), B.double(), A.double())
    want = plain(x) + 2.5 * product.view(2, 3, 7)
    torch.testing.assert_close(layer(x, "a"), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer(x), plain(x)) and torch.equal(layer(x, "b"), plain(x))
    lora.merge(net, "a")
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_fresh_adapter_is_the_base_bit_for_bit(frozen):
    net, call = frozen
    before = net(**call)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(5)
    lora.add(net, "student", rank=3, alpha=8)
    assert torch.equal(net(**call, adapter="student"), before) and torch.equal(net(**call), before)
    A, B = lora.parameters(net, "student")[:2]
    bound = A.shape[1] ** -0.5
    assert not B.any() and 0.8 * bound < A.abs().max() <= bound and A.std() > 0.3 * bound
    base = lora.base_state_dict(net)
    assert list(base) == list(start) and all(torch.equal(base[k], start[k]) for k in start)
    assert len(net.state_dict()) == len(start) + len(lora.parameters(net, "student"))
    again = copy.deepcopy(net)
    lora.remove(again, "student")
    assert list(again.state_dict()) == list(start) and lora.names(again) == []
    torch.manual_seed(5)
    lora.add(again, "other", rank=3, alpha=8)
    pairs = zip(lora.parameters(again, "other"), lora.parameters(net, "student"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


QKV = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {
    "dit": {f"blocks.{i}.{k}" for i in range(3) for k in ("qkv", "proj", "mlp.0", "mlp.2")},
    "ring": {"hidden.0", "hidden.1", "hidden.2"},
    "wan": {
        f"blocks.{i}.{k}"
        for i in range(2)
        for k in (*(f"attn{n}.{q}" for n in "12" for q in QKV), "ffn.net.0.proj", "ffn.net.2")
    },
    "pixart": {
        f"transformer_blocks.{i}.{k}"
        for i in range(2)
        for k in (*(f"attn{n}.{q}" for n in "12" for q in QKV), "ff.net.0.proj", "ff.net.2")
    },
    "z_image": {
        f"{stack}.{k}"
        for stack in ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
        for k in (*(f"attention.{q}" for q in QKV), *(f"feed_forward.w{n}" for n in "123"))
    },
}


@pytest.mark.parametrize("name, layers", TARGETS.items(), ids=list(TARGETS))
def test_default_targets_all_take_part(name, layers):
    """Each target has an A and a B, and each of these changes the output."""
    net, call = networks()[name]
    trained(net, "a")
    assert set(lora.adapters(net, "a")) == layers
    net(**call, adapter="a").square().mean().backward()
    assert all(g is not None and g.any() for g in gradients(net, "a"))


def test_merge_equals_the_call(frozen):
    net, call = frozen
    net.double()
    call = {k: v.double() if v.is_floating_point() else v for k, v in call.items()}
    trained(trained(net, "a", rank=2, alpha=3), "b", seed=2)
    want, bare, other = net(**call, adapter="a"), net(**call), lora.state_dict(net, "b")
    keep = copy.deepcopy(net)
    lora.merge(net, "a")
    assert (want - bare).abs().max() > 1e-2
    # Rotations, norms and times stay float32.
    torch.testing.assert_close(net(**call), want, rtol=0, atol=2e-6)
    assert lora.names(net) == ["b"]
    assert all(torch.equal(v, other[k]) for k, v in lora.state_dict(net, "b").items())
    for key, a in lora.adapters(keep, "a").items():
        W = keep.get_submodule(key).weight + a.alpha / a.rank * a.B.double() @ a.A.double()
        torch.testing.assert_close(net.get_submodule(key).weight, W, rtol=1e-13, atol=1e-13)


def test_adapters_share_a_base_and_do_not_touch_each_other(frozen):
    net, call = frozen
    bare = net(**call)
    alone = {
        name: trained(copy.deepcopy(net), name, seed=seed)(**call, adapter=name)
        for seed, name in enumerate(["student", "fake"])
    }
    for seed, name in enumerate(["student", "fake"]):
        trained(net, name, seed=seed)
    for name in ("fake", "student", "fake"):
        assert torch.equal(net(**call, adapter=name), alone[name])
        assert torch.equal(net(**call), bare)
    assert (alone["student"] - alone["fake"]).abs().max() > 1e-2


def test_gradients_reach_the_called_adapter_only(frozen):
    net, call = frozen
    trained(trained(net, "student"), "fake", seed=2)
    x = call["x"].clone().requires_grad_()
    net(**{**call, "x": x}, adapter="student").square().mean().backward()
    assert x.grad.any() and all(g.any() for g in gradients(net, "student"))
    reached = {k for k, p in net.named_parameters() if p.grad is not None}
    assert reached == {k for k in net.state_dict() if ".lora.student." in k}
    net(**{**call, "x": x}).sum().backward()  # through the bare, frozen network into its input
    assert {k for k, p in net.named_parameters() if p.grad is not None} == reached


def switched(net):
    """The mistake: an adapter that is a state of the network. -> a call that sets it and leaves it
    set."""
    state = {}
    for layer in lora.linears(net).values():

        def forward(x, adapter=None, layer=layer):
            return lora.Linear.forward(layer, x, state["adapter"])

        layer.forward = forward

    def call(adapter, **inputs):
        state["adapter"] = adapter
        return net(**inputs)

    return call


@pytest.mark.parametrize("name", ["dit", "wan", "z_image", "pixart"])
def test_two_adapters_in_one_backward_with_checkpointing(name):
    """Blocks are computed again in backward, after both calls: each then needs its own adapter.

    A state that is switched between calls does not give it to them.
    """

    def run(checkpointing, wrong=False):
        net, inputs = networks()[name]
        trained(trained(net, "student"), "fake", seed=2)
        net.gradient_checkpointing = checkpointing
        call = switched(net) if wrong else net
        # The first block has something to differentiate, as when the input is a sample.
        inputs["x"].requires_grad_()
        losses = [call(**inputs, adapter=a).square().mean() for a in ("student", "fake")]
        sum(losses).backward()
        assert all(p.grad is None for k, p in net.named_parameters() if ".lora." not in k)
        return [inputs["x"].grad, *gradients(net, "student"), *gradients(net, "fake")]

    want = run(False)
    assert all(g is not None and g.any() for g in want)
    assert all(torch.equal(a, b) for a, b in zip(run(True), want, strict=True))
    # Without checkpointing the mistake does not show.
    assert all(torch.equal(a, b) for a, b in zip(run(False, wrong=True), want, strict=True))
    assert not all(
        b is not None and torch.allclose(a, b, rtol=1e-2)
        for a, b in zip(want, run(True, wrong=True), strict=True)
    )


def test_low_precision(frozen):
    """bfloat16 weights beside float32 adapters, and autocast, stay near float32.

    The gradients of the adapters are float32.
    """
    net, call = frozen
    exact = trained(copy.deepcopy(net), "a")(**call, adapter="a")
    with torch.autocast("cpu", torch.bfloat16):
        auto = trained(copy.deepcopy(net), "a")(**call, adapter="a")
    trained(net.to(torch.bfloat16), "a")
    assert {p.dtype for p in lora.parameters(net, "a")} == {torch.float32}
    low = net(**call, adapter="a")
    low.float().square().mean().backward()
    assert all(g.dtype == torch.float32 and g.any() for g in gradients(net, "a"))
    moved = (exact - net(**call).float()).norm()
    for v in (auto, low):
        error = (v.float() - exact).norm()
        assert 0 < error < 0.1 * exact.norm() and error < 0.5 * moved


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_compiles_in_one_piece(name):
    net, call = networks()[name]
    trained(net, "a")
    fast = torch.compile(net, backend="aot_eager", fullgraph=True)
    for adapter in ("a", None):
        torch.testing.assert_close(fast(**call, adapter=adapter), net(**call, adapter=adapter))


# ---- training state ------------------------------------------------------------------------------


def test_training_state_round_trip(frozen):
    net, call = frozen
    trained(net, "a")
    state = {k: v.clone() for k, v in lora.state_dict(net, "a").items()}
    # In one fixed order.
    assert [v.shape for v in state.values()] == [p.shape for p in lora.parameters(net, "a")]
    other = copy.deepcopy(net)
    lora.remove(other, "a")
    lora.add(other, "a", rank=3, alpha=6)
    assert not torch.equal(other(**call, adapter="a"), net(**call, adapter="a"))
    lora.load_state_dict(other, "a", state)
    assert torch.equal(other(**call, adapter="a"), net(**call, adapter="a"))
    assert all(p.requires_grad for p in lora.parameters(other, "a"))
    first = next(iter(state))
    for wrong in (
        {k: v for k, v in state.items() if k != first},
        {**state, "more.A": state[first]},
        {**state, first: state[first][:1]},
    ):
        with pytest.raises(ValueError, match="does not fit"):
            lora.load_state_dict(other, "a", wrong)


def test_a_base_checkpoint_has_no_adapters(frozen, tmp_path):
    net, call = frozen
    bare = net(**call)
    trained(net, "a")
    save_network(net, network_config(net), str(tmp_path))
    assert not any("lora" in k for k in load_file(tmp_path / WEIGHTS))
    again, _ = load_network(str(tmp_path))
    assert torch.equal(again(**call), bare) and lora.names(again) == []


# ---- refusals ------------------------------------------------------------------------------------


def one_line(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(w in text for w in words), text


def test_unknown_names_and_targets_are_refused(frozen):
    net, call = frozen
    one_line(lambda: net(**call, adapter="student"), "'student'", "has none")
    trained(net, "fake")
    one_line(lambda: net(**call, adapter="student"), "'student'", type(net).__name__, "has fake")
    for f in (lora.parameters, lora.state_dict, lora.remove, lora.merge, lora.adapters):
        one_line(lambda f=f: f(net, "student"), "'student'")
    one_line(lambda: lora.save(net, "student", "never.safetensors"), "'student'")
    one_line(lambda: lora.add(net, "fake", 2, 2), "already")
    one_line(lambda: lora.add(net, "b", 0, 2), "at least 1")
    one_line(lambda: lora.add(net, "b", 2, 2, targets=[]), "empty list")
    first = net.lora_targets[0]
    one_line(lambda: lora.add(net, "b", 2, 2, targets=[first, "nowhere"]), "'nowhere'")
    # A part of a name is not its ending.
    one_line(lambda: lora.add(net, "b", 2, 2, targets=[first[1:]]), "no layer")
    for name in ("", "a.b", "keys", "training"):
        one_line(lambda name=name: lora.add(net, name, 2, 2), "cannot name an adapter")
    assert lora.names(net) == ["fake"]


def test_a_layer_that_is_no_target_passes_through():
    net, call = networks()["dit"]
    trained(net, "a", targets=["blocks.1.qkv"])
    assert set(lora.adapters(net, "a")) == {"blocks.1.qkv"}
    assert not torch.allclose(net(**call, adapter="a"), net(**call))


# ---- files ---------------------------------------------------------------------------------------


def test_save_and_load(frozen, tmp_path):
    """The file holds A and (alpha / rank) B under the documented names.

    Loaded, it is the same function, bit for bit with scale 2.
    """
    net, call = frozen
    trained(net, "a", rank=3, alpha=6)
    path = str(tmp_path / "a.safetensors")
    lora.save(net, "a", path, {"phase": "2"})
    stored = load_file(path)
    first = next(iter(lora.adapters(net, "a")))
    prefix = {
        "blocks.0.attn1.to_q": "diffusion_model.blocks.0.self_attn.q",
        "noise_refiner.0.attention.to_q": "diffusion_model.noise_refiner.0.attention.to_q",
        "transformer_blocks.0.attn1.to_q": "base_model.model.transformer_blocks.0.attn1.to_q",
    }.get(first, "transformer." + first)
    A, B = lora.parameters(net, "a")[:2]
    assert len(stored) == len(lora.parameters(net, "a"))
    assert {v.dtype for v in stored.values()} == {torch.float32}
    assert torch.equal(stored[f"{prefix}.lora_A.weight"], A)
    assert torch.equal(stored[f"{prefix}.lora_B.weight"], 2 * B)
    want = net(**call, adapter="a")
    metadata = lora.load(net, "b", path)
    # The file's own alpha is its rank: its strength is 1.
    assert [metadata[k] for k in ("rank", "alpha", "trained_alpha", "phase")] == list("3362")
    assert torch.equal(net(**call, adapter="b"), want)
    assert torch.equal(net(**call, adapter="a"), want)
    assert {(a.rank, a.alpha) for a in lora.adapters(net, "b").values()} == {(3, 3.0)}
    lora.save(net, "b", str(tmp_path / "b.safetensors"))
    assert all(torch.equal(v, stored[k]) for k, v in load_file(tmp_path / "b.safetensors").items())

    # The same under diffusers' own names.
    renamed = {
        f"transformer.{key}.lora_{part}.weight": getattr(a, part).detach().clone()
        for key, a in lora.adapters(net, "b").items()
        for part in "AB"
    }
    save_file(renamed, tmp_path / "c.safetensors")
    lora.load(net, "c", str(tmp_path / "c.safetensors"))
    assert torch.equal(net(**call, adapter="c"), want)


def test_names_of_wan_in_files():
    assert lora_key("blocks.0.attn1.to_q") == "diffusion_model.blocks.0.self_attn.q"
    assert lora_key("blocks.39.attn2.to_out.0") == "diffusion_model.blocks.39.cross_attn.o"
    assert lora_key("blocks.12.ffn.net.0.proj") == "diffusion_model.blocks.12.ffn.0"
    assert lora_key("blocks.12.ffn.net.2") == "diffusion_model.blocks.12.ffn.2"
    net = WanTransformer3DModel(**TINY_WAN)
    assert len({lora_key(key) for key in lora.linears(net)}) == len(lora.linears(net)) == 20


def test_bad_files_are_refused(tmp_path):
    net, _ = networks()["wan"]
    trained(net, "a")
    path = tmp_path / "a.safetensors"
    lora.save(net, "a", str(path))
    good = {k: v.clone() for k, v in load_file(path).items()}
    start = {k: v.clone() for k, v in net.state_dict().items()}
    q = "diffusion_model.blocks.0.self_attn.q"
    A, B = q + ".lora_A.weight", q + ".lora_B.weight"
    elsewhere = "diffusion_model.blocks.7.self_attn.q.lora_A.weight"

    def refused(tensors, *words, both=True, metadata=None):
        save_file(tensors, path, metadata)
        one_line(lambda: lora.load(net, "b", str(path)), str(path), *words)
        if both:
            one_line(lambda: lora.merge_file(net, str(path)), str(path), *words)

    refused({**good, elsewhere: torch.zeros(3, 24)}, "blocks.7")
    for unknown in (
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",  # of a text encoder
        "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight",  # of image-to-video
        q + ".dora_scale",
        q + ".lora_magnitude_vector",
        q + ".hada_w1_a",
        q + ".lora_mid.weight",
        q + ".weight",
        "no_prefix.diff",
    ):
        refused({**good, unknown: torch.zeros(3, 24)}, repr(unknown))
    half = {k: v for k, v in good.items() if k != B}
    refused(half, "lora_A", "both halves", "blocks.0.attn1.to_q")
    refused({**half, A.replace("_A", "_down"): good[A].clone()}, "twice", "lora_down")
    only_alpha = {k: v for k, v in half.items() if k != A}
    refused({**only_alpha, q + ".alpha": torch.tensor(4.0)}, "alpha", "both halves")
    refused({**good, A: torch.zeros(3, 23)}, "lora_A", "(3, 23)", "(3, 24)")
    refused({**good, B: torch.zeros(24, 4)}, "lora_B", "(24, 4)", "(24, 3)")
    refused({**good, A: torch.zeros(3)}, "(3,)")
    refused({**good, q + ".diff": torch.zeros(24, 23)}, "blocks.0.attn1.to_q.weight", "(24, 23)")
    refused({"blocks.0.norm1.diff": torch.zeros(24)}, "'blocks.0.norm1.diff'")  # has no weights
    convolution = {f"patch_embedding.lora_{p}.weight": torch.zeros(3, 4) for p in "AB"}
    refused(convolution, "patch_embedding", "no linear layer")
    refused(good, "lora_adapter_metadata", metadata={"lora_adapter_metadata": "{"})
    refused({}, "no adapter")
    # What an adapter cannot carry can be merged.
    head = {
        f"head.head.lora_{p}.weight": torch.zeros(s) for p, s in (("A", (3, 24)), ("B", (16, 3)))
    }
    refused({**good, **head}, "proj_out", "--teacher_lora", both=False)
    refused({**good, q + ".diff_b": torch.zeros(24)}, "attn1.to_q.bias", both=False)
    one_line(lambda: lora.load(net, "a", str(path)), "already")
    path.write_bytes(b"junk")
    for call in (lambda: lora.load(net, "b", str(path)), lambda: lora.merge_file(net, str(path))):
        with pytest.raises(UserError, match="truncated or not a safetensors file"):
            call()
    with pytest.raises(UserError, match="does not exist"):
        lora.load(net, "b", str(tmp_path / "none.safetensors"))
    assert all(torch.equal(v, start[k]) for k, v in net.state_dict().items())
    assert lora.names(net) == ["a"]


# ---- files of other programs ---------------------------------------------------------------------


def pairs_of(net, seed=5, ranks=(2, 3, 5), alphas=(4.0, 1.5), outside=()):
    """{layer: (A, B, alpha)} of all layers that take adapters, and of the linear layers outside
    the blocks that are named, of several ranks and strengths."""
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for i, key in enumerate([*lora.linears(net), *outside]):
        out_features, in_features = net.get_submodule(key).weight.shape
        r = ranks[i % len(ranks)]
        A, B = torch.randn(r, in_features, generator=g), torch.randn(out_features, r, generator=g)
        pairs[key] = 0.3 * A, 0.3 * B, alphas[i % len(alphas)]
    return pairs


def native(key):
    return lora_key(key).removeprefix("diffusion_model.")


def kohya_file(net, pairs, name=lambda key: "lora_unet_" + native(key).replace(".", "_")):
    """As kohya's musubi-tuner writes it, and its successors under other names."""
    tensors = {}
    for key, (A, B, alpha) in pairs.items():
        tensors |= {f"{name(key)}.lora_down.weight": A, f"{name(key)}.lora_up.weight": B}
        tensors[f"{name(key)}.alpha"] = torch.tensor(alpha)
    return tensors


def merged(net, path):
    net = copy.deepcopy(net)
    lora.merge_file(net, str(path))
    return net


def largest(a, b):
    return float((a - b).detach().abs().max())


def test_a_kohya_file_as_diffusers_reads_it(pipeline, tmp_path):
    """lora_unet_ with _ for dots, lora_down and lora_up, a rank and an alpha of its own a layer.

    Loaded as an adapter, or merged, it gives the velocities of WanPipeline.load_lora_weights. With
    alpha taken for the rank, or the header's ss_network_alpha for alpha, it would not.
    """
    net, call = networks()["wan"]
    pairs, path = pairs_of(net), tmp_path / "k.safetensors"
    save_file(kohya_file(net, pairs), path, {"ss_network_alpha": "64", "ss_network_dim": "2"})
    pipe = pipeline(net)
    pipe.load_lora_weights(str(path), adapter_name="theirs")
    with torch.no_grad():
        want = pipe.transformer(call["x"], 1000 * call["t"], call["text"]).sample
        bare = net(**call)
        lora.load(net, "b", str(path))
        assert largest(net(**call, adapter="b"), want) <= 1e-5 < 1e-2 < largest(bare, want)
        lora.remove(net, "b")
        assert largest(merged(net, path)(**call), want) <= 1e-5
        no_alpha = {k: v for k, v in kohya_file(net, pairs).items() if not k.endswith(".alpha")}
        save_file(no_alpha, path, {"ss_network_alpha": "64"})
        assert largest(merged(net, path)(**call), want) > 1e-2
    ranks = {key: a.rank for key, a in lora.adapters(loaded(net, pairs, tmp_path), "c").items()}
    assert ranks == {key: len(A) for key, (A, _, _) in pairs.items()}


def loaded(net, pairs, tmp_path):
    """net with these pairs loaded as adapter c."""
    save_file(kohya_file(net, pairs), tmp_path / "c.safetensors")
    lora.load(net, "c", str(tmp_path / "c.safetensors"))
    return net


OUTSIDE = [
    f"condition_embedder.{name}"
    for name in (
        *(f"text_embedder.linear_{n}" for n in "12"),
        *(f"time_embedder.linear_{n}" for n in "12"),
        "time_proj",
    )
]


def test_a_file_with_full_differences_as_diffusers_reads_it(pipeline, tmp_path):
    """LightX2V's and CausVid's files: pairs also outside the blocks, .diff_b of biases, .diff of
    the head. Merged, they give the velocities of WanPipeline.load_lora_weights.

    The bare names of Wan2.2-Lightning, without a prefix, are the same file.
    """
    net, call = networks()["wan"]
    # diffusers reads no alpha outside the blocks, so here alpha is the rank there.
    pairs = pairs_of(net) | {
        key: (A, B, float(len(A)))
        for key, (A, B, _) in pairs_of(net, outside=OUTSIDE).items()
        if key in OUTSIDE
    }
    g = torch.Generator().manual_seed(7)
    tensors = kohya_file(net, pairs, native)
    tensors = {k: v for k, v in tensors.items() if k.startswith("blocks.") or ".alpha" not in k}
    for key in pairs:
        bias = net.get_submodule(key).bias
        tensors[f"{native(key)}.diff_b"] = 0.3 * torch.randn(bias.shape, generator=g)
    tensors["head.head.diff"] = 0.1 * torch.randn(net.proj_out.weight.shape, generator=g)
    tensors["head.head.diff_b"] = 0.1 * torch.randn(net.proj_out.bias.shape, generator=g)
    prefixed = {f"diffusion_model.{k}": v.contiguous() for k, v in tensors.items()}
    path, bare_names = tmp_path / "d.safetensors", tmp_path / "bare.safetensors"
    save_file(prefixed, path)
    save_file(tensors, bare_names)
    pipe = pipeline(net)
    pipe.load_lora_weights(str(path), adapter_name="theirs")
    with torch.no_grad():
        want = pipe.transformer(call["x"], 1000 * call["t"], call["text"]).sample
        got = merged(net, path)(**call)
        assert largest(got, want) <= 2e-5 < 1e-2 < largest(net(**call), want)
        assert torch.equal(merged(net, bare_names)(**call), got)
        for part in (".diff", ".diff_b", ".alpha"):
            less = {k: v for k, v in prefixed.items() if not k.endswith(part)}
            save_file(less, path)
            assert largest(merged(net, path)(**call), want) > 1e-3, part


def test_full_differences_of_norms_and_modulation(tmp_path):
    """diffusers drops these; ComfyUI and LightX2V add them, and so do we.

    Wan's own norm3 is diffusers' norm2, and modulation is scale_shift_table, of a block and of the
    head. Sums of bfloat16 weights are taken in float32 and rounded once.
    """
    net, _ = networks()["wan"]
    names = {
        "blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "blocks.0.cross_attn.norm_k.diff": "blocks.0.attn2.norm_k.weight",
        "blocks.0.diff_m": "blocks.0.scale_shift_table",
        "blocks.1.modulation.diff": "blocks.1.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
        "blocks.0.ffn.2.diff": "blocks.0.ffn.net.2.weight",
        # and under diffusers' names
        "transformer.blocks.1.attn2.norm_q.diff": "blocks.1.attn2.norm_q.weight",
        "transformer.proj_out.diff_b": "proj_out.bias",
    }
    g, start = torch.Generator().manual_seed(2), net.state_dict()
    differences = {k: torch.randn(start[p].shape, generator=g) for k, p in names.items()}
    save_file(differences, tmp_path / "n.safetensors", {"by": "hand"})
    for dtype in (torch.float32, torch.bfloat16):
        other = copy.deepcopy(net).to(dtype)
        start = {k: v.clone() for k, v in other.state_dict().items()}
        assert lora.merge_file(other, str(tmp_path / "n.safetensors")) == {"by": "hand"}
        want = dict(start)
        for key, name in names.items():
            want[name] = (start[name].float() + differences[key]).to(dtype)
        assert all(torch.equal(v, want[k]) for k, v in other.state_dict().items())


SPELLINGS = [  # of a layer's name, of its two halves
    (lambda key: "base_model.model." + key, ".lora_A.weight", ".lora_B.weight"),
    (lambda key: "base_model.model." + key, ".lora_A.default.weight", ".lora_B.default.weight"),
    (lambda key: "transformer." + key, ".lora.down.weight", ".lora.up.weight"),
    (lambda key: key, ".lora_down.weight", ".lora_up.weight"),
    (lambda key: "model.diffusion_model." + key, ".lora_A.weight", ".lora_B.weight"),
    (lambda key: "lora_unet_" + key.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"),
    (
        lambda key: "lora_transformer_" + key.replace(".", "_"),
        ".lora_down.weight",
        ".lora_up.weight",
    ),
]


@pytest.mark.parametrize("name, A_end, B_end", SPELLINGS)
def test_spellings_of_names(frozen, tmp_path, name, A_end, B_end):
    """The same adapter under every spelling, with each network's own names and, of Wan, those of
    its authors; and as bfloat16."""
    net, call = frozen
    trained(net, "a", rank=3, alpha=6)
    want = net(**call, adapter="a")
    others = [str, native] if isinstance(net, WanTransformer3DModel) else [str]
    for i, own in enumerate(others):
        tensors = {}
        for key, a in lora.adapters(net, "a").items():
            tensors[name(own(key)) + A_end] = a.A.detach().clone()
            tensors[name(own(key)) + B_end] = a.scale * a.B.detach()
        path = str(tmp_path / f"{i}.safetensors")
        save_file(tensors, path)
        lora.load(net, f"b{i}", path)
        assert torch.equal(net(**call, adapter=f"b{i}"), want)
        save_file({k: v.bfloat16() for k, v in tensors.items()}, path)
        lora.load(net, f"c{i}", path)
        error = (net(**call, adapter=f"c{i}") - want).norm() / (want - net(**call)).norm()
        assert 0 < error < 0.02


def test_z_image_files_as_diffusers_reads_them(tmp_path):
    """kohya's names, and to_out.0 called out, as ZImagePipeline.load_lora_weights reads them."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    net, call = networks()["z_image"]
    pairs = pairs_of(net)
    names = (
        lambda key: "lora_unet_" + key.replace(".", "_"),
        lambda key: "diffusion_model." + key.replace("to_out.0", "out"),
    )
    for i, name in enumerate(names):
        path = tmp_path / f"{i}.safetensors"
        save_file(kohya_file(net, pairs, name), path)
        theirs = diffusers.ZImageTransformer2DModel(**TINY_Z_IMAGE).eval()
        theirs.load_state_dict(net.state_dict())
        pipe = diffusers.ZImagePipeline(None, None, None, None, theirs)
        pipe.load_lora_weights(str(path), adapter_name="theirs")
        with torch.no_grad():
            want = z_image_velocity(theirs, **call)
            got = merged(net, path)(**call)
        assert largest(got, want) <= 1e-4 < 1e-2 < largest(net(**call), want)


@pytest.mark.parametrize("rslora", [False, True])
def test_strength_in_the_metadata(pipeline, tmp_path, rslora):
    """WanPipeline.save_lora_weights writes alpha into the header only, with exceptions by layer.

    Read without it, the adapter would have another strength.
    """
    peft = pytest.importorskip("peft")
    net, call = networks()["wan"]
    pipe = pipeline(net)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        use_rslora=rslora,
        target_modules=["to_q", "to_v", "ffn.net.2"],
        rank_pattern={"ffn.net.2": 2},
        alpha_pattern={"attn1.to_v": 3},
        init_lora_weights=False,
    )
    pipe.transformer.add_adapter(config, adapter_name="theirs")
    x = call["x"], 1000 * call["t"], call["text"]
    with torch.no_grad():
        want = pipe.transformer(*x).sample
    pipe.save_lora_weights(
        str(tmp_path),
        transformer_lora_layers=peft.get_peft_model_state_dict(
            pipe.transformer, adapter_name="theirs"
        ),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    path = str(tmp_path / "pytorch_lora_weights.safetensors")
    again = pipeline(net)
    again.load_lora_weights(path)
    with torch.no_grad():
        assert largest(again.transformer(*x).sample, want) <= 1e-5
        lora.load(net, "b", path)
        assert largest(net(**call, adapter="b"), want) <= 1e-5 < 1e-2 < largest(net(**call), want)
        bare = load_file(path)  # as read before: alpha = rank
        save_file(bare, tmp_path / "bare.safetensors")
        lora.load(net, "c", str(tmp_path / "bare.safetensors"))
        assert largest(net(**call, adapter="c"), want) > 1e-2
    scales = {key: a.scale for key, a in lora.adapters(net, "b").items()}
    root = 2.0 if rslora else 4.0  # of the rank 4, or the rank
    assert scales["blocks.0.attn2.to_v"] == pytest.approx(16 / root)
    assert scales["blocks.0.attn1.to_v"] == pytest.approx(3 / root)
    assert scales["blocks.0.ffn.net.2"] == pytest.approx(16 / (2**0.5 if rslora else 2))


def pixart_of_diffusers(net):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.PixArtTransformer2DModel(**TINY_PIXART).eval()
    theirs.load_state_dict(lora.base_state_dict(net))
    return theirs


def test_a_folder_of_pefts(tmp_path):
    """What PeftModel.save_pretrained writes: alpha is in adapter_config.json beside the weights."""
    peft = pytest.importorskip("peft")
    net, call = networks()["pixart"]
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "ff.net.2"])
    config.init_lora_weights = False
    theirs = peft.get_peft_model(pixart_of_diffusers(net), config)
    theirs.save_pretrained(tmp_path)
    path = lora.adapter_file(str(tmp_path))
    assert path == str(tmp_path / "adapter_model.safetensors")
    lora.load(net, "b", path)
    with torch.no_grad():
        want = pixart_noise(theirs, **call)
        assert largest(net(**call, adapter="b"), want) <= 1e-5 < 1e-2 < largest(net(**call), want)
        (tmp_path / "adapter_config.json").unlink()
        lora.load(net, "c", path)
        assert largest(net(**call, adapter="c"), want) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_for_peft(tmp_path, dtype):
    """PeftModel.from_pretrained loads what save_peft writes, with layers of different rank, into
    diffusers' PixArt; a missing adapter_config.json would stop it."""
    peft = pytest.importorskip("peft")
    net, call = networks()["pixart"]
    trained(net, "a", rank=3, alpha=12, targets=["attn1.to_q", "ff.net.2"])
    net.transformer_blocks[0].attn1.to_q.lora["a"] = lora.Adapter(
        torch.randn(2, 24, generator=torch.Generator().manual_seed(1)), torch.ones(24, 2), 1.0
    )
    lora.save_peft(net, "a", str(tmp_path), {"phase": "2"}, dtype)
    theirs = peft.PeftModel.from_pretrained(pixart_of_diffusers(net), tmp_path)
    lora.load(net, "b", lora.adapter_file(str(tmp_path)))
    with torch.no_grad():
        want, bare = net(**call, adapter="a"), net(**call)
        got, back = pixart_noise(theirs, **call), net(**call, adapter="b")
    assert largest(got, back) <= 1e-5
    close = 1e-5 if dtype == torch.float32 else 0.02 * largest(want, bare)
    assert largest(got, want) <= close and largest(want, bare) > 1e-2
    assert {v.dtype for v in load_file(tmp_path / "adapter_model.safetensors").values()} == {dtype}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert (
        config["rank_pattern"] == config["alpha_pattern"] == {"transformer_blocks.0.attn1.to_q": 2}
    )
    assert lora.is_for_peft(net) and not lora.is_for_peft(networks()["wan"][0])


def test_which_paths_are_lora_files(tmp_path):
    """A file by its ending, a folder of peft's, but no network, also in TRELLIS's layout."""
    assert lora.adapter_file("some/where.safetensors") == "some/where.safetensors"
    assert lora.adapter_file(str(tmp_path)) is None and lora.adapter_file("ring") is None
    path = str(tmp_path / "net.safetensors")
    (tmp_path / "net.json").write_text('{"name": "SLatFlowModel", "args": {}}')
    assert lora.adapter_file(path) is None
    for note in ('{"description": ""}', "no JSON", "[]"):  # of a program that keeps such files
        (tmp_path / "net.json").write_text(note)
        assert lora.adapter_file(path) == path
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert lora.adapter_file(str(tmp_path)) == str(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("script", ["dmd", "decoupled_dmd", "tdm", "linvideo", "mdt_dist"])
def test_every_distillation_script_takes_lora_files(tmp_path, script):
    """--teacher_lora is merged into the teacher, --student_init FILE into the copy that the student
    starts from; the teacher does not change with it."""
    world = "voxels" if script == "mdt_dist" else "clips"
    net = load_network(load_world(world).teacher_folder())[0]
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    for i, path in enumerate(paths):
        trained(net, "a", rank=2, seed=i)
        lora.save(net, "a", path)
        lora.remove(net, "a")
    flags = ["--teacher", world, "--teacher_lora", paths[0], "--student_init", paths[1]]
    args = importlib.import_module(script).parse_args(flags)
    teacher = start_teacher(alone(args))
    start = starting_network(alone(args), teacher)
    lora.merge_file(net, paths[0])
    for key, v in net.state_dict().items():
        assert torch.equal(v, teacher.net.state_dict()[key])
    lora.merge_file(net, paths[1])
    for key, v in net.state_dict().items():
        assert torch.equal(v, start.state_dict()[key])
    moved = [not torch.equal(v, teacher.net.state_dict()[k]) for k, v in start.state_dict().items()]
    assert sum(moved) == len(lora.linears(net))


def test_an_adapter_begins_as_another(frozen, tmp_path):
    """start_from: the same function from a smaller rank on, all of it trainable; layers without a
    counterpart begin without effect. A larger rank and other layers are refused."""
    net, call = frozen
    target = net.lora_targets[0]
    trained(net, "small", rank=2, alpha=5)
    trained(net, "other", rank=2, alpha=5, targets=[target], seed=3)
    for name, rank, alpha in (("same", 2, 5), ("large", 4, 3)):
        for other in ("small", "other"):
            torch.manual_seed(4)
            lora.add(net, f"{name}_{other}", rank, alpha)
            drawn = {k: v.clone() for k, v in lora.state_dict(net, f"{name}_{other}").items()}
            lora.start_from(net, f"{name}_{other}", other)
            a, b = (net(**call, adapter=n) for n in (f"{name}_{other}", other))
            assert largest(a, b) <= 2e-5 < 1e-3 < largest(b, net(**call))
            for key, v in lora.state_dict(net, f"{name}_{other}").items():
                if key.endswith(".A") and rank > 2:
                    assert torch.equal(v[2:], drawn[key][2:])
    torch.manual_seed(4)
    lora.add(net, "tiny", 1, 1)
    one_line(lambda: lora.start_from(net, "tiny", "small"), "rank 2", "'tiny'")
    lora.add(net, "few", 2, 1, targets=[target])
    one_line(lambda: lora.start_from(net, "few", "small"), "does not change")


@pytest.fixture
def pipeline():
    """-> make(high, low): a WanPipeline of diffusers around two networks with our weights."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")

    def make(*nets):
        theirs = [diffusers.WanTransformer3DModel(**TINY_WAN).eval() for _ in nets]
        for a, b in zip(theirs, nets, strict=True):
            a.load_state_dict(lora.base_state_dict(b))
        return diffusers.WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=None,
            transformer=theirs[0],
            transformer_2=theirs[1] if len(theirs) == 2 else None,
            boundary_ratio=0.875,
        )

    return make


def test_wan_pipeline_of_diffusers_loads_the_file(pipeline, tmp_path):
    """It does so into transformer/ and into transformer_2/ (Wan 2.2), and computes our velocities.

    Every tensor of the file arrives.
    """
    nets = [trained(networks()["wan"][0], "a", alpha=1.5 * seed, seed=seed) for seed in (1, 2)]
    call, paths = networks()["wan"][1], [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    pipe = pipeline(*nets)
    for net, path in zip(nets, paths, strict=True):
        lora.save(net, "a", path)
    pipe.load_lora_weights(paths[0], adapter_name="ours")
    pipe.load_lora_weights(paths[1], adapter_name="ours", load_into_transformer_2=True)
    for net, theirs in zip(nets, (pipe.transformer, pipe.transformer_2), strict=True):
        with torch.no_grad():
            ours, bare = net(**call, adapter="a"), net(**call)
            v = theirs(call["x"], 1000 * call["t"], call["text"]).sample
        error, effect = (ours - v).abs().max(), (ours - bare).abs().max()
        print(f"difference {error:.1e}, effect of the adapter {effect:.1e}")
        assert error <= 1e-5 < 1e-2 < effect
        loaded = {k: p for k, p in theirs.named_parameters() if ".lora_" in k}
        assert len(loaded) == len(lora.parameters(net, "a"))
        assert all(p.any() for p in loaded.values())


def test_two_networks_are_adapted_together_and_saved_apart(tmp_path):
    (high, call), (low, _) = networks()["wan"], networks()["wan"]
    two = WanTwoNetworks(high, perturbed(low, seed=9), 0.875)
    trained(two, "a")
    assert len(lora.parameters(two, "a")) == 2 * len(lora.parameters(two.high, "a"))
    assert not torch.allclose(two(**call, adapter="a"), two(**call))
    one_line(lambda: lora.save(two, "a", str(tmp_path / "a.safetensors")), "one network")
    one_line(lambda: lora.load(two, "b", str(tmp_path / "a.safetensors")), "one network")
    want = two(**call, adapter="a")
    for net, name in ((two.high, "high"), (two.low, "low")):
        lora.save(net, "a", str(tmp_path / name))
        lora.load(net, "b", str(tmp_path / name))
    assert torch.equal(two(**call, adapter="b"), want)
    lora.remove(two.low, "b")
    # The bare network does not silently take over on some rows.
    one_line(lambda: two(**call, adapter="b"), "'b'")
    # A network that does not run does not need the adapter.
    two(call["x"], torch.tensor([0.9, 1.0]), call["text"], adapter="b")


def test_bias_of_a_pair_has_the_pairs_strength(tmp_path):
    """peft's lora_bias: y = W x + b + (alpha / rank) (B A x + the bias of B), summed in float32."""
    layer = lora.Linear(6, 4).to(torch.bfloat16)
    net = torch.nn.ModuleDict({"one": layer})
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 6, generator=g), 0.01 * torch.randn(4, 2, generator=g)
    bias, before = torch.randn(4, generator=g), {k: v.clone() for k, v in net.state_dict().items()}
    tensors = {"one.lora_A.weight": A, "one.lora_B.weight": B, "one.lora_B.bias": bias}
    tensors |= {"one.alpha": torch.tensor(5.0), "one.diff_b": torch.ones(4)}
    save_file(tensors, tmp_path / "l.safetensors")
    lora.merge_file(net, str(tmp_path / "l.safetensors"))
    wants = {"one.weight": 2.5 * B @ A, "one.bias": 2.5 * bias + 1}
    for key, value in net.state_dict().items():
        assert torch.equal(value, (before[key].float() + wants[key]).bfloat16()), key
        twice = before[key] + wants[key].bfloat16()  # rounded before it is added
        assert key == "one.bias" or not torch.equal(value, twice)


@pytest.mark.parametrize("alpha, text", [(0.3, "0.3"), (12.3456789, "12.3456789"), (64, "64")])
def test_the_trained_alpha_is_written_as_it_was(tmp_path, alpha, text):
    net, _ = networks()["dit"]
    trained(net, "a", rank=2, alpha=alpha)
    lora.save(net, "a", str(tmp_path / "a"))
    with open_tensors(str(tmp_path / "a")) as f:
        assert f.metadata()["trained_alpha"] == text


def test_metadata_is_plain_text_that_others_ignore(tmp_path):
    """Header values are strings. There is no lora_adapter_metadata, which diffusers would take for
    peft's settings."""
    net, _ = networks()["dit"]
    trained(net, "a", rank=2, alpha=0.3)
    lora.save(net, "a", str(tmp_path / "a"), {"times": json.dumps([1.0, 0.5])})
    with open_tensors(str(tmp_path / "a")) as f:
        m = f.metadata()
    assert (m["rank"], m["alpha"], m["trained_alpha"]) == ("2", "2", "0.3")
    assert json.loads(m["times"]) == [1.0, 0.5]
    assert "lora_adapter_metadata" not in m


def test_a_twin_is_as_strong_as_its_pattern():
    """Rank 2 and alpha 5: the average of an adapter, which is what student/ holds."""
    net = torch.nn.Sequential()
    net.layer = lora.Linear(3, 4)
    lora._attach(net.layer, "a", torch.randn(2, 3), torch.randn(4, 2), alpha=5.0)
    lora.twin(net, "b", "a")
    first, second = net.layer.lora["a"], net.layer.lora["b"]
    assert first.scale == second.scale == 2.5
    assert torch.equal(first.A, second.A) and torch.equal(first.B, second.B)
