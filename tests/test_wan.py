"""models/wan.py equals diffusers on the same random weights; shapes, errors, swaps, pipeline ends."""
import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import fill, word_tokenizer  # noqa: E402
from models import io, wan  # noqa: E402
from models.diffusion import Flow  # noqa: E402
from models.wan import WAN_1_3B, WAN_14B, WAN_A14B, WanTransformer3DModel, WanTwoNetworks  # noqa: E402

torch.set_num_threads(1)

TINY = dict(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=10, freq_dim=16,
    ffn_dim=32, num_layers=2, rope_max_seq_len=32,
)
MORE_OUT = dict(TINY, in_channels=5, out_channels=7, num_attention_heads=1, num_layers=1)
# Name: (config, B, (T, H, W), text length). One has a large eps, so that an ignored eps shows; another has as
# many prompt tokens as clip tokens, so that a rotation of the prompt would show.
CASES = {
    "plain": (TINY, 2, (3, 6, 10), 5),
    "no_cross_attn_norm": (dict(TINY, cross_attn_norm=False, num_layers=3), 3, (1, 4, 6), 6),
    "one_word": (dict(TINY, num_attention_heads=3, attention_head_dim=16), 2, (2, 2, 4), 1),
    "more_out_channels": (MORE_OUT, 1, (5, 4, 6), 3),
    "big_eps": (dict(TINY, eps=0.05, attention_head_dim=20), 2, (2, 6, 4), 4),
    "patch_2_1_3": (dict(TINY, patch_size=[2, 1, 3]), 2, (4, 3, 6), 4),
}


def inputs(config, B, size, L, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, config["in_channels"], *size, generator=g)
    t = torch.rand(B, generator=g)
    return x, t, torch.randn(B, L, config["text_dim"], generator=g)


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("diffusers").WanTransformer3DModel


def pair(theirs, config):
    ours = fill(WanTransformer3DModel(**config))
    reference = theirs(**config).eval()
    reference.load_state_dict(ours.state_dict())  # strict: same names, same shapes, both ways
    return ours, reference


# ---- the same function as diffusers ------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_equal_to_diffusers(theirs, case):
    config, B, size, L = CASES[case]
    ours, reference = pair(theirs, config)
    x, t, text = inputs(config, B, size, L)
    x_theirs = x.clone().requires_grad_()
    x.requires_grad_()

    v = ours(x, t, text=text)
    v_theirs = reference(x_theirs, 1000 * t, text).sample
    assert v.shape == v_theirs.shape == (B, config["out_channels"], *size)
    assert v_theirs.std() > 0.1  # a dead network would agree with anything
    difference = (v - v_theirs).abs().max().item()

    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(2))
    (v * weight).sum().backward()
    (v_theirs * weight).sum().backward()
    gradient = (x.grad - x_theirs.grad).abs().max().item()
    print(f"{case}: |v| diff {difference:.1e}, |dv/dx| diff {gradient:.1e}")
    assert difference <= 1e-5
    assert gradient <= 1e-5 * max(1, x_theirs.grad.abs().max().item())
    parameters = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, parameters[name].grad, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("t", [0.0, 1e-4, 0.5, 0.999, 1.0])
def test_clock_is_diffusers_over_1000(theirs, t):
    ours, reference = pair(theirs, TINY)
    x, _, text = inputs(TINY, 1, (1, 4, 4), 3)
    t = torch.tensor([t])
    with torch.no_grad():
        assert (ours(x, t, text=text) - reference(x, 1000 * t, text).sample).abs().max() <= 1e-5
        assert t.item() < 0.01 or (ours(x, t / 2, text=text) - ours(x, t, text=text)).abs().max() > 1e-2


def test_bfloat16_as_close_to_float32_as_diffusers(theirs):
    config, B, size, L = CASES["plain"]
    ours, reference = pair(theirs, config)
    x, t, text = inputs(config, B, size, L)
    error = lambda v, exact: ((v.float() - exact).norm() / exact.norm()).item()  # noqa: E731
    with torch.no_grad():
        exact = ours(x, t, text=text)
        time, modulation, _ = ours.condition_embedder(t, text)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = error(ours(x, t, text=text), exact)
            again = ours.condition_embedder(t, text)
        assert torch.equal(time, again[0]) and torch.equal(modulation, again[1])  # time stays float32
        ours.to(torch.bfloat16)
        low = ours(x.bfloat16(), t, text=text.bfloat16())
        assert low.dtype == torch.bfloat16
        assert ours(x, t, text=text).dtype == torch.float32  # float32 ODE states, bfloat16 weights
        rope = copy.deepcopy(reference.rope)
        reference.to(torch.bfloat16).rope = rope  # from_pretrained keeps it float32 too
        low_theirs = reference(x.bfloat16(), 1000 * t, text.bfloat16()).sample
    low, low_theirs = error(low, exact), error(low_theirs, exact)
    print(f"errors: autocast {autocast:.1e}, bfloat16 weights {low:.1e}, diffusers' {low_theirs:.1e}")
    assert 0 < autocast < 0.02 and low < 1.5 * low_theirs + 1e-3 and low < 0.05


@pytest.mark.parametrize(
    "config, parameters",
    [(WAN_1_3B, 1_418_996_800), (WAN_14B, 14_288_491_584), (WAN_A14B, 14_288_491_584)],
)
def test_released_sizes_have_diffusers_names_and_shapes(theirs, config, parameters):
    with torch.device("meta"):
        ours, reference = WanTransformer3DModel(**config), theirs(**config)
    shapes = {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    assert shapes == {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert not list(ours.buffers())  # nothing that meta construction or .to(bfloat16) could spoil
    assert set(ours.config) == {k for k in reference.config if not k.startswith("_")}
    assert all(ours.config[k] == config[k] == reference.config[k] for k in config)


def test_config_survives_json_and_rebuilds():
    net = WanTransformer3DModel(**TINY)
    config = json.loads(json.dumps(net.config))
    assert config == net.config and config["ffn_dim"] == 32 and config["patch_size"] == [1, 2, 2]
    WanTransformer3DModel(**config).load_state_dict(net.state_dict())


# ---- what the training scripts rely on ---------------------------------------------------------------------


def test_features_are_the_middle_block_and_change_nothing():
    config, B, (T, H, W), L = CASES["no_cross_attn_norm"]  # three blocks: the middle one is index 1
    net = fill(WanTransformer3DModel(**config))
    x, t, text = inputs(config, B, (T, H, W), L)
    seen = []
    net.blocks[1].register_forward_hook(lambda block, args, out: seen.append(out))
    with torch.no_grad():
        v, features = net(x, t, text=text, return_features=True)
        assert torch.equal(v, net(x, t, text=text))
    assert features.shape == (B, T * H * W // 4, 24) and torch.equal(features, seen[0])


def test_rows_of_a_batch_do_not_mix():
    net = fill(WanTransformer3DModel(**TINY))
    x, t, text = inputs(TINY, 3, (2, 4, 4), 4)
    with torch.no_grad():
        rows = torch.cat([net(x[i : i + 1], t[i : i + 1], text=text[i : i + 1]) for i in range(3)])
        assert (net(x, t, text=text) - rows).abs().max() < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients(monkeypatch):
    calls = []
    original = wan.checkpoint
    monkeypatch.setattr(wan, "checkpoint", lambda *a, **k: calls.append(k) or original(*a, **k))
    net = fill(WanTransformer3DModel(**TINY))
    x, t, text = inputs(TINY, 2, (2, 4, 4), 3)
    gradients = []
    for net.gradient_checkpointing in (False, True):
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        net(leaf, t, text=text).square().sum().backward()
        gradients.append([leaf.grad] + [p.grad.clone() for p in net.parameters()])
    assert calls == [{"use_reentrant": False}] * len(net.blocks)
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    with torch.no_grad():
        net(x, t, text=text)
    assert len(calls) == len(net.blocks)  # sampling does not checkpoint


def test_attend_can_be_swapped_in_one_block():
    net = fill(WanTransformer3DModel(**TINY))
    x, t, text = inputs(TINY, 2, (3, 4, 6), 3)
    seen = {}

    def uniform(q, k, v):  # attends to every token alike
        seen.update(q=q, k=k, v=v)
        return v.mean(1, keepdim=True).expand_as(v)

    with torch.no_grad():
        before = net(x, t, text=text)
        net.blocks[1].attn1.attend = uniform
        after = net(x, t, text=text)
        assert (before - after).abs().max() > 1e-2 and net.blocks[0].attn1.attend is wan.attention
        assert all(z.shape == (2, 18, 2, 12) for z in seen.values())

        # Rebuild what it should have seen: normalise, then turn the pairs of token (frame, row, column).
        inner = {}
        attn = net.blocks[1].attn1
        attn.to_q.register_forward_hook(lambda m, a, out: inner.update(q=out))
        net(x, t, text=text)
        q = inner["q"] * torch.rsqrt(inner["q"].square().mean(-1, keepdim=True) + 1e-6) * attn.norm_q.weight
        q = q.view(2, 3, 2, 3, 2, 12)  # (B, frame, row, column, head, channel); 12 channels = 4 + 4 + 4
        for frame, row, column in [(0, 0, 0), (2, 0, 0), (0, 1, 0), (1, 1, 2)]:
            expected = q[:, frame, row, column].clone()  # (B, H, 12)
            for pair_index in range(6):
                position = (frame, row, column)[pair_index // 2]
                turn = torch.polar(torch.ones(()), torch.tensor(position / 10000 ** (pair_index % 2 * 2 / 4)))
                z = torch.complex(expected[..., 2 * pair_index], expected[..., 2 * pair_index + 1]) * turn
                expected[..., 2 * pair_index], expected[..., 2 * pair_index + 1] = z.real, z.imag
            assert (seen["q"][:, frame * 6 + row * 3 + column] - expected).abs().max() < 1e-5

    module = torch.nn.Module()
    net.blocks[0].attn1.attend = module  # a module with parameters is registered like any other
    assert dict(net.named_modules())["blocks.0.attn1.attend"] is module


def test_class_facts():
    assert WanTransformer3DModel.prediction == "flow_v" and WanTransformer3DModel.cond_names == ("text",)
    assert WanTransformer3DModel.default_shift == 5.0
    assert WanTransformer3DModel.latent_shape == (16, 21, 60, 104)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 4, 6, 6)), r"pass a latent \(B, 4, T, H, W\)"),
        (dict(x=torch.zeros(2, 3, 2, 4, 4)), r"3 channels; pass \(B, 4, T, H, W\)"),
        (dict(x=torch.zeros(2, 4, 2, 5, 4)), r"do not divide into patches \(1, 2, 2\)"),
        (dict(x=torch.zeros(2, 4, 2, 4, 7)), r"do not divide into patches \(1, 2, 2\)"),
        (dict(x=torch.zeros(2, 4, 33, 2, 2)), r"rope_max_seq_len = 32"),
        (dict(t=torch.tensor(0.5)), r"pass floats in \[0, 1\] of shape \(2,\)"),
        (dict(t=torch.tensor([500, 999])), r"torch.int64 \(2,\); pass floats in \[0, 1\]"),
        (dict(text=torch.zeros(2, 5, 11)), r"pass \(2, L, 10\)"),
        (dict(text=torch.zeros(1, 5, 10)), r"pass \(2, L, 10\)"),
        (dict(text=torch.zeros(2, 10)), r"pass \(2, L, 10\)"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    net = WanTransformer3DModel(**TINY)
    x, t, text = inputs(TINY, 2, (2, 4, 4), 5)
    arguments = dict(dict(x=x, t=t, text=text), **change)
    with pytest.raises(ValueError, match=message) as error:
        net(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image_dim=1280), "image_dim = 1280 means image-to-video"),
        (dict(added_kv_proj_dim=5120), "added_kv_proj_dim = 5120 means image-to-video"),
        (dict(pos_embed_seq_len=514), "pos_embed_seq_len = 514 means image-to-video"),
        (dict(qk_norm="layer_norm"), "qk_norm = 'layer_norm' is not implemented"),
        (dict(attention_head_dim=9), "attention_head_dim 9 and freq_dim 16 must be even"),
    ],
)
def test_wrong_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        WanTransformer3DModel(**dict(TINY, **change))
    assert "\n" not in str(error.value)


# ---- two networks (Wan 2.2 A14B) ---------------------------------------------------------------------------


def test_a14b_is_what_the_conversion_script_of_diffusers_says():
    """Its entry for Wan2.2-T2V-A14B (scripts/convert_wan_to_diffusers.py), both networks alike."""
    assert WAN_A14B == dict(
        added_kv_proj_dim=None, attention_head_dim=128, cross_attn_norm=True, eps=1e-6, ffn_dim=13824,
        freq_dim=256, in_channels=16, num_attention_heads=40, num_layers=40, out_channels=16,
        patch_size=[1, 2, 2], qk_norm="rms_norm_across_heads", text_dim=4096,
        image_dim=None, rope_max_seq_len=1024, pos_embed_seq_len=None,  # not in it: the class's defaults
    )


def two_networks(boundary=0.75, **changes):
    config = dict(TINY, **changes)
    high, low = (fill(WanTransformer3DModel(**config), seed=seed) for seed in (3, 4))
    return WanTwoNetworks(high, low, boundary).eval()


# Times of a batch of five, and the rows that the high-noise network must see at boundary 0.75.
TIMES = [
    ([0.2, 1.0, 0.75, 0.0, 0.7499], [1, 2]),  # mixed; the boundary itself is high
    ([0.75, 0.8, 0.9, 1.0, 0.76], [0, 1, 2, 3, 4]),
    ([0.0, 0.1, 0.5, 0.7, 0.7499], []),
    ([0.9, 0.1, 0.1, 0.1, 0.1], [0]),
    ([0.1, 0.9, 0.9, 0.9, 0.9], [1, 2, 3, 4]),
]


@pytest.mark.parametrize("times, high_rows", TIMES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_row_is_computed_by_its_own_network(times, high_rows, checkpointing):
    two = two_networks()
    two.gradient_checkpointing = checkpointing
    x, _, text = inputs(TINY, 5, (2, 4, 4), 3)
    x.requires_grad_()
    t = torch.tensor(times)
    seen = {"high": [], "low": []}
    for name in seen:
        getattr(two, name).register_forward_hook(lambda m, a, out, name=name: seen[name].append(len(a[0])))
    v, features = two(x, t, text=text, return_features=True)
    low_rows = [i for i in range(5) if i not in high_rows]
    assert seen["high"] == [len(high_rows)] * bool(high_rows)  # one call with these rows, or none at all
    assert seen["low"] == [len(low_rows)] * bool(low_rows)
    assert torch.equal(v, two(x, t, text=text)) and v.shape == x.shape and features.shape[0] == 5

    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(2))
    (v * weight).sum().backward()
    for net, rows in ((two.high, high_rows), (two.low, low_rows)):
        gradients = [p.grad for p in net.parameters()]
        if not rows:
            assert all(g is None for g in gradients)
            continue
        alone = copy.deepcopy(net)
        alone.zero_grad()
        leaf = x.detach()[rows].requires_grad_()
        want, middle = alone(leaf, t[rows], text=text[rows], return_features=True)
        assert torch.equal(v[rows], want) and torch.equal(features[rows], middle)
        (want * weight[rows]).sum().backward()
        assert torch.equal(x.grad[rows], leaf.grad) and leaf.grad.any()
        assert all(torch.equal(g, p.grad) for g, p in zip(gradients, alone.parameters()))


def test_boundary_like_wan_pipeline(theirs):
    """diffusers compares the scheduler's times with boundary_ratio * 1000; the same side for every time near it."""
    for boundary in (0.875, 0.9):
        two = two_networks(boundary)
        used = []
        two.high.register_forward_hook(lambda m, a, out: used.append(True))
        x, _, text = inputs(TINY, 1, (1, 2, 2), 1)
        for step in (0, 1, 874, 875, 876, 899, 900, 901, 1000):
            used.clear()
            two(x, torch.tensor([step / 1000]), text=text)
            assert bool(used) == (step >= boundary * 1000), (boundary, step)


def test_two_networks_look_like_one():
    two = two_networks()
    for name in ("prediction", "cond_names", "latent_shape", "lora_targets"):
        assert getattr(two, name) == getattr(WanTransformer3DModel, name)
    assert two.default_shift == 12.0 and two.boundary == 0.75
    assert two.config["text_dim"] == 10 and two.config["in_channels"] == 4
    assert not two.gradient_checkpointing
    two.gradient_checkpointing = True
    assert two.gradient_checkpointing and two.high.gradient_checkpointing and two.low.gradient_checkpointing
    two.gradient_checkpointing = False
    assert not two.high.gradient_checkpointing and not two.low.gradient_checkpointing
    x, _, text = inputs(TINY, 2, (2, 4, 4), 3)
    with pytest.raises(ValueError, match=r"pass floats in \[0, 1\] of shape \(2,\)"):
        two(x, torch.tensor(0.5), text=text)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: two_networks(0.0), r"boundary = 0.0; .* within \(0, 1\)"),
        (lambda: two_networks(1.0), r"boundary = 1.0; .* within \(0, 1\)"),
        (lambda: two_networks(in_channels=36), "in_channels = 36 with 4 out means image-to-video"),
        (lambda: WanTwoNetworks(two_networks().high, two_networks(ffn_dim=48).low, 0.5), "ffn_dim = 32 and 48"),
        (lambda: WanTwoNetworks(torch.nn.Linear(1, 1), two_networks().low, 0.5), "a Linear cannot be one"),
    ],
)
def test_wrong_pairs_are_named(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def save_root(root, two, boundary_ratio=0.75, shift=None):
    """A pipeline root with two networks, as diffusers writes it."""
    root.mkdir()
    index = {"_class_name": "WanPipeline", "boundary_ratio": boundary_ratio}
    for name, net in (("transformer", two.high), ("transformer_2", two.low)):
        index[name] = ["diffusers", "WanTransformer3DModel"]
        config = {**io.network_config(net), "_diffusers_version": "0.35.0"}
        io.save_network(net, config, str(root / name))
    io.save_json(index, str(root / "model_index.json"))
    if shift is not None:
        scheduler = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": shift}
        (root / "scheduler").mkdir()
        io.save_json(scheduler, str(root / "scheduler" / "scheduler_config.json"))
    return str(root)


def test_a_root_with_two_networks_is_loaded(tmp_path):
    two = two_networks()
    root = save_root(tmp_path / "a14b", two, shift=3.0)
    teacher = io.load_teacher(root + "/", ("ring",), two_networks=True)
    x, _, text = inputs(TINY, 5, (2, 4, 4), 3)
    t = torch.tensor([0.2, 1.0, 0.75, 0.0, 0.7])
    assert type(teacher.net) is WanTwoNetworks and not teacher.net.training and teacher.net.boundary == 0.75
    assert torch.equal(teacher.net(x, t, text=text), two(x, t, text=text))
    assert teacher.folder == root and teacher.label == "a14b" and teacher.world_name is None
    assert teacher.config == teacher.config_2 == {**io.network_config(two.high), "_diffusers_version": "0.35.0"}
    assert isinstance(teacher.schedule, Flow) and (teacher.prediction, teacher.shift) == ("flow_v", 3.0)
    low = io.load_teacher(root, ("ring",), dtype=torch.bfloat16, two_networks=True).net
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert io.load_teacher(save_root(tmp_path / "b", two), ("ring",), two_networks=True).shift == 12.0
    assert io.is_small(root, ("ring",)) is False

    # one of its networks alone, and anything else that is one network, loads as before
    one = io.load_teacher(root + "/transformer_2", ("ring",), two_networks=True)
    assert type(one.net) is WanTransformer3DModel and one.config_2 is None and one.folder.endswith("transformer_2")
    assert one.shift == 3.0 and torch.equal(one.net.proj_out.weight, two.low.proj_out.weight)
    assert io.load_teacher("ring", ("ring",), two_networks=True).config_2 is None


def test_what_wan_pipeline_saves_is_loaded(theirs, tmp_path):
    """The same root written by diffusers itself, where the first network answers for t >= boundary."""
    diffusers = pytest.importorskip("diffusers")
    two = two_networks()
    reference = [theirs(**TINY).eval() for _ in range(2)]
    for net, ours in zip(reference, (two.high, two.low)):
        net.load_state_dict(ours.state_dict())
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=reference[0],
        transformer_2=reference[1], boundary_ratio=0.75,
    )
    for component in ("transformer", "transformer_2", "scheduler"):
        getattr(pipe, component).save_pretrained(tmp_path / component)
    pipe.save_config(tmp_path)  # save_pretrained wants every component; this is its model_index.json
    teacher = io.load_teacher(str(tmp_path), (), two_networks=True)
    x, _, text = inputs(TINY, 2, (2, 4, 4), 3)
    assert teacher.net.boundary == 0.75 and teacher.shift == 3.0
    for time, net in ((0.75, reference[0]), (0.7, reference[1])):
        t = torch.full((2,), time)
        with torch.no_grad():
            difference = teacher.net(x, t, text=text) - net(x, 1000 * t, text).sample
        assert difference.abs().max() <= 1e-5


def test_wrong_roots_are_refused(tmp_path):
    two = two_networks()
    root = save_root(tmp_path / "root", two)

    def refused(message, **keywords):
        with pytest.raises(io.UserError, match=message) as error:
            io.load_teacher(root, ("ring",), **{"two_networks": True, **keywords})
        assert "\n" not in str(error.value) and root in str(error.value)

    refused("two-network teacher .*give one of its component folders", two_networks=False)
    index = tmp_path / "root" / "model_index.json"
    good = json.loads(index.read_text())
    for wrong in (None, 0, 1, 1.5, -0.1, "0.875", True, float("nan")):
        io.save_json({**good, "boundary_ratio": wrong}, str(index))
        refused("boundary_ratio is .* within \\(0, 1\\)")
    io.save_json({k: v for k, v in good.items() if k != "boundary_ratio"}, str(index))
    refused("boundary_ratio is None")
    io.save_json(good, str(index))

    other = two_networks(ffn_dim=48).low
    io.save_network(other, io.network_config(other), root + "/transformer_2")
    refused("the two networks differ: ffn_dim = 32 and 48")
    (tmp_path / "root" / "transformer_2" / "config.json").unlink()
    refused("transformer_2 has no config.json")
    (tmp_path / "root" / "transformer").rename(tmp_path / "elsewhere")
    refused("has transformer_2/ but no transformer/")
    assert io.is_small(root, ("ring",)) is False


# ---- the ends of a real pipeline ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A WanPipeline of tiny random networks and a word-level tokenizer, saved -> (pipeline, folder)."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    tokenizer = word_tokenizer(["<pad>", "</s>", "<unk>"], end="</s>", eos_token="</s>")
    torch.manual_seed(0)
    encoder = transformers.UMT5EncoderModel(
        transformers.UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    )
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    transformer = diffusers.WanTransformer3DModel(**dict(TINY, text_dim=16, in_channels=16, out_channels=16))
    pipe = diffusers.WanPipeline(tokenizer, encoder.eval(), vae.eval(), scheduler, transformer)
    folder = tmp_path_factory.mktemp("wan") / "pipeline"
    pipe.save_pretrained(folder)
    return pipe, folder


def test_encode_prompts_as_wan_pipeline(pipeline):
    pipe, folder = pipeline
    prompts = ["a cat runs", "a  dog \n &amp;amp; a cat runs fast", "dog"]
    with torch.no_grad():
        cond, uncond = pipe.encode_prompt(prompts, "fast dog", max_sequence_length=12)
    ours = wan.encode_prompts(folder, prompts, "fast dog", max_length=12)
    assert ours["cond.text"].shape == (3, 12, 16) and ours["uncond.text"].shape == (1, 12, 16)
    assert (ours["cond.text"] - cond).abs().max() < 1e-5
    assert (ours["uncond.text"] - uncond[:1]).abs().max() < 1e-5
    lengths = (ours["cond.text"].abs().sum(-1) > 0).sum(1)
    assert lengths.tolist() == [4, 8, 2]  # the words and </s>; zeros after
    short = wan.encode_prompts(folder, prompts, max_length=3)
    assert short["cond.text"].shape == (3, 3, 16)  # longer prompts are cut


def test_decode_latents_as_wan_pipeline(pipeline):
    pipe, folder = pipeline
    x0 = torch.randn(2, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    video = wan.decode_latents(folder, x0)
    assert video.shape == (2, 5, 3, 32, 48) and video.dtype == torch.uint8
    with torch.no_grad():
        mean, std = torch.tensor(pipe.vae.config.latents_mean), torch.tensor(pipe.vae.config.latents_std)
        raw = pipe.vae.decode(x0 * std.view(1, 16, 1, 1, 1) + mean.view(1, 16, 1, 1, 1)).sample
        reference = pipe.video_processor.postprocess_video(raw, output_type="pt")  # (B, T', 3, H', W')
        plain = pipe.video_processor.postprocess_video(pipe.vae.decode(x0).sample, output_type="pt")
    assert video.float().std() > 1 and (video.float() - 255 * reference).abs().max() <= 0.51
    assert (video.float() - 255 * plain).abs().max() > 2  # the normalisation is seen
    with pytest.raises(ValueError, match=r"this VAE needs \(B, 16, T, H, W\)"):
        wan.decode_latents(folder, x0[:, :4])


def test_command_line(pipeline, tmp_path, capsys):
    _, folder = pipeline
    text, output = tmp_path / "prompts.txt", tmp_path / "new" / "prompts.safetensors"
    text.write_text("a cat\n\n a dog runs\n", encoding="utf-8")
    wan.main(["encode", "--teacher", str(folder), "--prompts_txt", str(text), "--output", str(output)])
    prompts = load_file(output)
    assert prompts["cond.text"].shape == (2, 512, 16) and prompts["uncond.text"].shape == (1, 512, 16)
    assert [p.name for p in output.parent.iterdir()] == ["prompts.safetensors"]

    latents, videos = tmp_path / "samples.safetensors", tmp_path / "videos"
    save_file({"x0": torch.randn(2, 16, 2, 2, 3)}, latents)
    wan.main(["decode", "--teacher", str(folder), "--latents", str(latents), "--output", str(videos)])
    with pytest.importorskip("PIL.Image").open(videos / "001.gif") as gif:
        assert gif.n_frames == 5 and gif.size == (24, 16)  # (W', H')


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    text, empty, junk = tmp_path / "p.txt", tmp_path / "empty.txt", tmp_path / "junk.safetensors"
    text.write_text("a cat\n"), empty.write_text("\n\n"), junk.write_bytes(b"junk")
    save_file({"y": torch.zeros(1)}, tmp_path / "y.safetensors")
    common = ["--teacher", str(tmp_path), "--output", str(tmp_path / "out")]

    def line(*arguments):
        with pytest.raises(SystemExit) as stop:
            wan.main([*arguments, *common])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        return error

    assert "cannot read --prompts_txt" in line("encode", "--prompts_txt", str(tmp_path / "none.txt"))
    assert "holds no prompt" in line("encode", "--prompts_txt", str(empty))
    assert "--max_length is 0" in line("encode", "--prompts_txt", str(text), "--max_length", "0")
    assert "cannot read --latents" in line("decode", "--latents", str(junk))
    assert "cannot read --latents" in line("decode", "--latents", str(tmp_path / "none.safetensors"))
    assert "has no tensor x0" in line("decode", "--latents", str(tmp_path / "y.safetensors"))
    assert "--fps is 0" in line("decode", "--latents", str(junk), "--fps", "0")

    for name in ("transformers", "diffusers"):
        monkeypatch.setitem(sys.modules, name, None)  # import then raises ImportError, as when absent
    save_file({"x0": torch.zeros(1, 16, 1, 2, 2)}, tmp_path / "x0.safetensors")
    assert "pip install transformers" in line("encode", "--prompts_txt", str(text))
    assert "pip install diffusers" in line("decode", "--latents", str(tmp_path / "x0.safetensors"))


def test_wrong_teacher_folder_is_one_line(pipeline, tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "p.txt").write_text("a cat\n")
    save_file({"x0": torch.zeros(1, 3, 1, 2, 2)}, tmp_path / "x0.safetensors")
    encode = ["encode", "--prompts_txt", str(tmp_path / "p.txt")]
    decode = ["decode", "--latents", str(tmp_path / "x0.safetensors")]
    for command, teacher, message in [
        (encode, tmp_path / "none", "pass a diffusers pipeline folder"),
        (encode, tmp_path, "--teacher"),  # an empty tokenizer/
        (decode, tmp_path, "--teacher"),  # an empty vae/
        (decode, pipeline[1], "this VAE needs (B, 16, T, H, W)"),
    ]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            wan.main([*command, "--teacher", str(teacher), "--output", str(tmp_path / "out")])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]
