"""models/networks/wan.py: what is particular to it, its two networks, roots that hold them.

The rest is in test_transformers.py and test_pipeline.py.
"""

import copy
import json
import math
import types

import pytest
import torch
from helpers import alone, fill, read_log, relative
from released import WAN
from safetensors.torch import load_file, save_file

import dmd
from models.diffusion import Diffusion, Flow
from models.files import UserError, save_json
from models.networks import layers, load_network, lora, network_config, save_network, to_dtype
from models.networks.wan import WAN_5B, WAN_A14B, WanTransformer3DModel, WanTwoNetworks
from models.plumbing.teachers import freeze_teacher, is_small, load_teacher

TINY = dict(WAN.tiny, num_layers=2)


def test_rows_of_a_batch_do_not_mix():
    net = fill(WanTransformer3DModel(**TINY))
    x, t, text = WAN.inputs(TINY, (2, 4, 4), [4] * 3).values()
    with torch.no_grad():
        rows = torch.cat([net(x[i : i + 1], t[i : i + 1], text=text[i : i + 1]) for i in range(3)])
        assert (net(x, t, text=text) - rows).abs().max() < 1e-5


def test_attend_can_be_swapped_in_one_block():
    net = fill(WanTransformer3DModel(**TINY))
    x, t, text = WAN.inputs(TINY, (3, 4, 6), [3] * 2).values()
    seen = {}

    def uniform(q, k, v):  # attends to every token alike
        seen.update(q=q, k=k, v=v)
        return v.mean(1, keepdim=True).expand_as(v)

    with torch.no_grad():
        before = net(x, t, text=text)
        net.blocks[1].attn1.attend = uniform
        after = net(x, t, text=text)
        assert (before - after).abs().max() > 1e-2
        assert net.blocks[0].attn1.attend is layers.attention
        assert all(z.shape == (2, 18, 2, 12) for z in seen.values())

        # Rebuild what it should have seen: normalise, then rotate the pairs of channels by the
        # token's frame, row and column.
        inner = {}
        attn = net.blocks[1].attn1
        attn.to_q.register_forward_hook(lambda m, a, out: inner.update(q=out))
        net(x, t, text=text)
        q = inner["q"]
        q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6) * attn.norm_q.weight
        q = q.view(2, 3, 2, 3, 2, 12)  # (B, frame, row, column, head, 4 + 4 + 4 channels)
        for frame, row, column in [(0, 0, 0), (2, 0, 0), (0, 1, 0), (1, 1, 2)]:
            expected = q[:, frame, row, column].clone()  # (B, H, 12)
            for pair_index in range(6):
                position = (frame, row, column)[pair_index // 2]
                angle = torch.tensor(position / 10000 ** (pair_index % 2 * 2 / 4))
                real, imaginary = 2 * pair_index, 2 * pair_index + 1
                z = torch.complex(expected[..., real], expected[..., imaginary])
                z = z * torch.polar(torch.ones(()), angle)
                expected[..., real], expected[..., imaginary] = z.real, z.imag
            assert (seen["q"][:, frame * 6 + row * 3 + column] - expected).abs().max() < 1e-5

    module = torch.nn.Module()
    net.blocks[0].attn1.attend = module  # a module is registered like any other
    assert dict(net.named_modules())["blocks.0.attn1.attend"] is module


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 4, 6, 6)), r"pass a latent \(B, 4, T, H, W\)"),
        (dict(x=torch.zeros(2, 3, 2, 4, 4)), r"3 channels; pass \(B, 4, T, H, W\)"),
        (dict(x=torch.zeros(2, 4, 2, 5, 4)), r"do not divide into patches \(1, 2, 2\)"),
        (dict(x=torch.zeros(2, 4, 2, 4, 7)), r"do not divide into patches \(1, 2, 2\)"),
        (dict(x=torch.zeros(2, 4, 33, 2, 2)), r"rope_max_seq_len = 32"),
        (dict(config=dict(image_dim=1280)), "image_dim = 1280 means image-to-video"),
        (
            dict(config=dict(added_kv_proj_dim=5120)),
            "added_kv_proj_dim = 5120 means image-to-video",
        ),
        (dict(config=dict(patch_size=[2, 2])), "give frames, rows and columns"),
        (dict(config=dict(pos_embed_seq_len=514)), "pos_embed_seq_len = 514 means image-to-video"),
        (dict(config=dict(qk_norm="layer_norm")), "qk_norm = 'layer_norm' is not implemented"),
        (
            dict(config=dict(attention_head_dim=9)),
            "attention_head_dim 9 and freq_dim 16 must be even",
        ),
    ],
)
def test_wrong_inputs_and_configs_are_named(change, message):
    WAN.refuses(message, **change)


def test_image_to_video_is_refused(tmp_path):
    """A component of Wan2.2-I2V-A14B has no image_dim: its channels tell, 36 in and 16 out.

    It is refused when it is loaded, in one line, and not by the first call.
    """
    config = dict(TINY, in_channels=12)
    WAN.refuses("in_channels = 12 with 4 out means image-to-video", config=config)
    net = WanTransformer3DModel(**TINY)
    save_network(net, {**network_config(net), "in_channels": 12}, str(tmp_path))
    with pytest.raises(UserError, match="config.json .*means image-to-video") as error:
        load_teacher(str(tmp_path))
    assert "\n" not in str(error.value)


# ---- bfloat16 weights ----------------------------------------------------------------------------


def kept_by_diffusers(net):
    """Names of our parameters that diffusers' class keeps in float32."""
    keep = set(WAN.theirs._keep_in_fp32_modules)
    return {name for name, _ in net.named_parameters() if keep & set(name.split("."))}


def test_bfloat16_weights_as_in_diffusers(tmp_path):
    """What from_pretrained(bfloat16) of diffusers leaves in float32 stays so here.

    The outputs then differ from float32's by no more than diffusers', and by less than with all
    weights in bfloat16.
    """
    ours, reference = WAN.pair(dict(TINY, num_layers=4))
    reference.save_pretrained(tmp_path)
    theirs = type(reference).from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    low = load_network(str(tmp_path), torch.bfloat16)[0]
    dtypes = {name: p.dtype for name, p in theirs.named_parameters()}
    assert {name: p.dtype for name, p in low.named_parameters()} == dtypes
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == kept_by_diffusers(ours)
    assert {"scale_shift_table", "blocks.0.norm2.weight"} < kept
    assert "condition_embedder.time_embedder.linear_1.weight" in kept
    assert "condition_embedder.time_proj.weight" not in kept

    rounded, errors = copy.deepcopy(ours).bfloat16(), {}
    with torch.no_grad():
        for seed in range(8):
            call = WAN.inputs(TINY, (3, 4, 6), [5, 5], seed)
            want = ours(**call)
            half = {k: v if k == "t" else v.bfloat16() for k, v in call.items()}
            made = {
                "ours": low(**half),
                "diffusers": WAN.reference(theirs, **half),
                "all bfloat16": rounded(**half),
            }
            for name, v in made.items():
                error = (v.float() - want).square().mean() / want.square().mean()
                errors[name] = errors.get(name, 0.0) + float(error) ** 0.5 / 8
    print(errors)
    assert errors["ours"] <= 1.05 * errors["diffusers"]
    assert errors["ours"] < 0.98 * errors["all bfloat16"]


@pytest.mark.parametrize("autocast", [False, True])
def test_kept_parameters_compute_in_float32(monkeypatch, autocast):
    """The first layers of the time and every norm, also under autocast."""
    net = to_dtype(fill(WanTransformer3DModel(**TINY)), torch.bfloat16)
    seen, modules = {}, dict(net.named_modules())
    names = [n for n in modules if n.split(".")[-1] in ("norm1", "norm2", "norm3", "linear_1")]
    for name in names:
        modules[name].register_forward_hook(
            lambda m, a, out, name=name: seen.update({name: (a[0].dtype, out.dtype)})
        )
    call = WAN.inputs(TINY, (2, 4, 4), [3] * 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        net(**call)
    assert set(seen) == set(names)
    for name, (given, got) in seen.items():
        if "text_embedder" not in name:
            assert got == torch.float32, name
        if "time_embedder" in name:
            assert given == torch.float32, name


def test_a_teacher_is_cast_by_the_same_rule(monkeypatch):
    """freeze_teacher on a GPU under bf16, which the CPU stands for here: it is not cast there."""
    net = fill(WanTransformer3DModel(**TINY))
    args = types.SimpleNamespace(mixed_precision="bf16")
    teacher = types.SimpleNamespace(net=net, base=net)
    monkeypatch.setattr(type(net), "to", lambda self, device: self)
    run = alone(args)
    freeze_teacher(run, teacher)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    run.device = torch.device("cuda")
    freeze_teacher(run, teacher)
    kept = {name for name, p in net.named_parameters() if p.dtype == torch.float32}
    assert kept == kept_by_diffusers(net) and not any(p.requires_grad for p in net.parameters())


# ---- two networks (Wan 2.2 A14B) -----------------------------------------------------------------


def test_a14b_is_what_the_conversion_script_of_diffusers_says():
    """Its entry for Wan2.2-T2V-A14B (scripts/convert_wan_to_diffusers.py), for both networks."""
    assert WAN_A14B == dict(
        added_kv_proj_dim=None,
        attention_head_dim=128,
        cross_attn_norm=True,
        eps=1e-6,
        ffn_dim=13824,
        freq_dim=256,
        in_channels=16,
        num_attention_heads=40,
        num_layers=40,
        out_channels=16,
        patch_size=[1, 2, 2],
        qk_norm="rms_norm_across_heads",
        text_dim=4096,
        image_dim=None,
        # These are not in it: they are the defaults of the class.
        rope_max_seq_len=1024,
        pos_embed_seq_len=None,
    )


def two_networks(boundary=0.75, **changes):
    config = dict(TINY, **changes)
    high, low = (fill(WanTransformer3DModel(**config), seed=seed) for seed in (3, 4))
    return WanTwoNetworks(high, low, boundary).eval()


# Times of a batch of five, and the rows that the high-noise network must get at boundary 0.75.
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
    x, _, text = WAN.inputs(TINY, (2, 4, 4), [3] * 5).values()
    x.requires_grad_()
    t = torch.tensor(times)
    seen = {"high": [], "low": []}
    for name in seen:
        getattr(two, name).register_forward_hook(
            lambda m, a, out, name=name: seen[name].append(len(a[0]))
        )
    v = two(x, t, text=text)
    low_rows = [i for i in range(5) if i not in high_rows]
    # One call with these rows, or none at all.
    assert seen["high"] == [len(high_rows)] * bool(high_rows)
    assert seen["low"] == [len(low_rows)] * bool(low_rows)
    features = two(x, t, text=text, return_features=True)
    assert v.shape == x.shape and features.shape[0] == 5

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
        want = alone(leaf, t[rows], text=text[rows])
        middle = alone(leaf, t[rows], text=text[rows], return_features=True)
        assert torch.equal(v[rows], want) and torch.equal(features[rows], middle)
        (want * weight[rows]).sum().backward()
        assert torch.equal(x.grad[rows], leaf.grad) and leaf.grad.any()
        pairs = zip(gradients, alone.parameters(), strict=True)
        assert all(torch.equal(g, p.grad) for g, p in pairs)


def test_boundary_like_wan_pipeline():
    """diffusers compares the scheduler's times with boundary_ratio * 1000. So do we: each time near
    it is on the same side."""
    for boundary in (0.875, 0.9):
        two = two_networks(boundary)
        used = []
        two.high.register_forward_hook(lambda m, a, out, used=used: used.append(True))
        x, _, text = WAN.inputs(TINY, (1, 2, 2), [1]).values()
        for step in (0, 1, 874, 875, 876, 899, 900, 901, 1000):
            used.clear()
            two(x, torch.tensor([step / 1000]), text=text)
            assert bool(used) == (step >= boundary * 1000), (boundary, step)


def test_two_networks_look_like_one():
    two = two_networks()
    for name in ("prediction", "cond_names", "lora_targets"):
        assert getattr(two, name) == getattr(WanTransformer3DModel, name)
    assert two.default_shift == 12.0 and two.boundary == 0.75
    assert two.latent_shape == two.high.latent_shape
    assert two.config["text_dim"] == 10 and two.config["in_channels"] == 4
    assert not two.gradient_checkpointing
    two.gradient_checkpointing = True
    assert two.gradient_checkpointing
    assert two.high.gradient_checkpointing and two.low.gradient_checkpointing
    two.gradient_checkpointing = False
    assert not two.high.gradient_checkpointing and not two.low.gradient_checkpointing
    x, _, text = WAN.inputs(TINY, (2, 4, 4), [3] * 2).values()
    with pytest.raises(ValueError, match=r"pass floats in \[0, 1\] of shape \(2,\)"):
        two(x, torch.tensor(0.5), text=text)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: two_networks(0.0), r"boundary = 0.0; .* within \(0, 1\)"),
        (lambda: two_networks(1.0), r"boundary = 1.0; .* within \(0, 1\)"),
        (lambda: two_networks(in_channels=36), "in_channels = 36 with 4 out means image-to-video"),
        (
            lambda: WanTwoNetworks(two_networks().high, two_networks(ffn_dim=48).low, 0.5),
            "ffn_dim = 32 and 48",
        ),
        (
            lambda: WanTwoNetworks(torch.nn.Linear(1, 1), two_networks().low, 0.5),
            "a Linear cannot be one",
        ),
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
        config = {**network_config(net), "_diffusers_version": "0.35.0"}
        save_network(net, config, str(root / name))
    save_json(index, str(root / "model_index.json"))
    if shift is not None:
        scheduler = {
            "_class_name": "UniPCMultistepScheduler",
            "use_flow_sigmas": True,
            "flow_shift": shift,
        }
        (root / "scheduler").mkdir()
        save_json(scheduler, str(root / "scheduler" / "scheduler_config.json"))
    return str(root)


def test_a_root_with_two_networks_is_loaded(tmp_path):
    two = two_networks()
    root = save_root(tmp_path / "a14b", two, shift=3.0)
    teacher = load_teacher(root + "/", two_networks=True)
    x, _, text = WAN.inputs(TINY, (2, 4, 4), [3] * 5).values()
    t = torch.tensor([0.2, 1.0, 0.75, 0.0, 0.7])
    assert type(teacher.net) is WanTwoNetworks and not teacher.net.training
    assert teacher.net.boundary == 0.75
    assert torch.equal(teacher.net(x, t, text=text), two(x, t, text=text))
    assert teacher.folder == root and teacher.label == "a14b" and teacher.world_name is None
    config = {**network_config(two.high), "_diffusers_version": "0.35.0"}
    assert teacher.config == teacher.config_2 == config
    assert isinstance(teacher.schedule, Flow)
    assert (teacher.prediction, teacher.shift) == ("flow_v", 3.0)
    low = load_teacher(root, dtype=torch.bfloat16, two_networks=True).net
    kept = {name for name, p in low.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        f"{side}.{name}" for side in ("high", "low") for name in kept_by_diffusers(two.high)
    }
    assert {p.dtype for p in low.parameters()} == {torch.float32, torch.bfloat16}
    assert load_teacher(save_root(tmp_path / "b", two), two_networks=True).shift == 12.0
    assert is_small(root) is False

    # One of its networks alone, and anything else that is one network, load as such.
    one = load_teacher(root + "/transformer_2", two_networks=True)
    assert type(one.net) is WanTransformer3DModel and one.config_2 is None
    assert one.folder.endswith("transformer_2")
    assert one.shift == 3.0 and torch.equal(one.net.proj_out.weight, two.low.proj_out.weight)
    assert load_teacher("ring", two_networks=True).config_2 is None


def test_what_wan_pipeline_saves_is_loaded(tmp_path):
    """The same root, written by diffusers itself; there the first network is for t >= boundary."""
    diffusers = pytest.importorskip("diffusers")
    two = two_networks()
    reference = [WAN.theirs(**TINY).eval() for _ in range(2)]
    for net, ours in zip(reference, (two.high, two.low), strict=True):
        net.load_state_dict(ours.state_dict())
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=reference[0],
        transformer_2=reference[1],
        boundary_ratio=0.75,
    )
    for component in ("transformer", "transformer_2", "scheduler"):
        getattr(pipe, component).save_pretrained(tmp_path / component)
    pipe.save_config(tmp_path)  # model_index.json; save_pretrained would want every component
    teacher = load_teacher(str(tmp_path), two_networks=True)
    x, _, text = WAN.inputs(TINY, (2, 4, 4), [3] * 2).values()
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
        with pytest.raises(UserError, match=message) as error:
            load_teacher(root, **{"two_networks": True, **keywords})
        assert "\n" not in str(error.value) and root in str(error.value)

    refused("two-network teacher .*give one of its component folders", two_networks=False)
    index = tmp_path / "root" / "model_index.json"
    good = json.loads(index.read_text())
    for wrong in (None, 0, 1, 1.5, -0.1, "0.875", True, float("nan")):
        save_json({**good, "boundary_ratio": wrong}, str(index))
        refused("boundary_ratio is .* within \\(0, 1\\)")
    save_json({k: v for k, v in good.items() if k != "boundary_ratio"}, str(index))
    refused("boundary_ratio is None")
    save_json(good, str(index))

    other = two_networks(ffn_dim=48).low
    save_network(other, network_config(other), root + "/transformer_2")
    refused("the two networks differ: ffn_dim = 32 and 48")
    (tmp_path / "root" / "transformer_2" / "config.json").unlink()
    refused("transformer_2 has no config.json")
    (tmp_path / "root" / "transformer").rename(tmp_path / "elsewhere")
    refused("has transformer_2/ but no transformer/")
    assert is_small(root) is False


# ---- Wan 2.2 TI2V 5B -----------------------------------------------------------------------------

TINY_5B = dict(TINY, in_channels=48, out_channels=48)
LATENT_5B = (48, 3, 4, 6)


def with_token_times(net, x, t, text):
    """diffusers' network, called with a time for each token, as its pipeline does for this one."""
    tokens = x[0, 0].numel() // (net.config.patch_size[1] * net.config.patch_size[2])
    return net(x, (1000 * t)[:, None].expand(-1, tokens), text).sample


@pytest.mark.parametrize(
    "changes, size, lengths",
    [
        ({}, (3, 6, 10), [5, 5, 5]),
        (dict(num_attention_heads=3, attention_head_dim=16, num_layers=1), (1, 2, 6), [1, 1]),
        (dict(eps=0.05, freq_dim=30, ffn_dim=44), (5, 4, 2), [7, 7]),
    ],
)
def test_5b_is_diffusers_with_a_time_for_each_token(changes, size, lengths):
    config = {**TINY_5B, **changes}
    ours, reference = WAN.pair(config)
    calls = [WAN.inputs(config, size, lengths) for _ in range(2)]
    leaves = [
        {**c, "x": c["x"].requires_grad_(), "text": c["text"].requires_grad_()} for c in calls
    ]
    out, want = ours(**leaves[0]), with_token_times(reference, **leaves[1])
    assert want.std() > 0.1 and WAN.error(out, want) <= 1e-5
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    for name in ("x", "text"):
        assert relative(leaves[0][name].grad, leaves[1][name].grad) <= 1e-5
    parameters = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, parameters[name].grad, rtol=1e-4, atol=1e-4), name


def test_5b_has_its_own_shape_and_settings(tmp_path):
    with torch.device("meta"):
        assert WanTransformer3DModel(**WAN_5B).latent_shape == (48, 31, 44, 80)
        assert WanTransformer3DModel(**WAN_A14B).latent_shape == (16, 21, 60, 104)
    root, prompts = save_5b(tmp_path / "5b")
    teacher = load_teacher(root)
    assert teacher.shift == 5.0 and teacher.net.latent_shape == (48, 31, 44, 80)
    assert isinstance(teacher.schedule, Flow) and teacher.prediction == "flow_v"


def test_image_conditioning_of_5b_is_refused():
    """Its times of tokens, of which the first frame's would be 0."""
    WAN.refuses("image-to-video, which is not implemented; pass one", t=torch.rand(2, 12))


def save_5b(root):
    """A pipeline root that diffusers wrote, and a file of prompts.  -> their paths"""
    diffusers = pytest.importorskip("diffusers")
    pipe = pipeline_of_5b(diffusers)
    pipe.transformer.save_pretrained(root / "transformer")
    pipe.scheduler.save_pretrained(root / "scheduler")
    pipe.save_config(root)
    g = torch.Generator().manual_seed(1)
    prompts = {
        "cond.text": torch.randn(3, 5, 10, generator=g),
        "uncond.text": torch.zeros(1, 5, 10),
    }
    save_file(prompts, str(root / "prompts.safetensors"))
    return str(root), str(root / "prompts.safetensors")


def pipeline_of_5b(diffusers, scheduler=None):
    torch.manual_seed(0)
    net = fill(WAN.theirs(**TINY_5B))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5 if p.dim() > 1 else 1.0)
    scheduler = scheduler or diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    rest = dict(tokenizer=None, text_encoder=None, vae=None, expand_timesteps=True)
    pipe = diffusers.WanPipeline(**rest, scheduler=scheduler, transformer=net)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled_by(pipe, z, cond, uncond, steps, scale=1.0):
    return pipe(
        prompt_embeds=cond,
        negative_prompt_embeds=uncond.expand(len(cond), -1, -1),
        latents=z.clone(),
        num_inference_steps=steps,
        guidance_scale=scale,
        num_frames=4 * (z.shape[2] - 1) + 1,
        height=16 * z.shape[3],
        width=16 * z.shape[4],
        output_type="latent",
    ).frames


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_sampling_5b_is_that_of_its_pipeline(tmp_path, scale):
    """Euler of ours on the teacher's own grid, and WanPipeline with expand_timesteps.

    Its scheduler, UniPC, is a multistep rule; Euler's has UniPC's levels.
    """
    diffusers = pytest.importorskip("diffusers")
    root, prompts = save_5b(tmp_path / "root")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe, seen = pipeline_of_5b(diffusers, scheduler), []
    pipe.transformer.register_forward_pre_hook(
        lambda m, args, call: seen.append(call["timestep"]), with_kwargs=True
    )
    stored, g = load_file(prompts), torch.Generator().manual_seed(3)
    cond, uncond = stored["cond.text"][:2], stored["uncond.text"]
    z = torch.randn(2, *LATENT_5B, generator=g)
    teacher, set_timesteps = load_teacher(root), scheduler.set_timesteps
    raw = [1 - k * 0.999 / 6 for k in range(6)]
    scheduler.set_timesteps = lambda n, device=None, **_: set_timesteps(sigmas=raw, device=device)
    want = sampled_by(pipe, z, cond, uncond, 6, scale)
    assert {t.shape for t in seen} == {(2, 18)}
    unipc = diffusers.UniPCMultistepScheduler.from_pretrained(root, subfolder="scheduler")
    unipc.set_timesteps(6)
    grid = teacher.grid(6)
    for levels in (scheduler.sigmas, unipc.sigmas):
        assert torch.allclose(levels, torch.tensor(grid), atol=2e-6)
    given = {"text": cond}, {"text": uncond.expand(2, -1, -1)}
    ours = teacher.diffusion.sample(teacher.net, z, grid, *given, scale, "euler")
    assert relative(ours, want) <= 1e-4 and relative(z, want) > 0.1


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "adapter"])
def test_distilling_5b(tmp_path, rank):
    """Two updates of dmd.py. The student samples in diffusers' pipeline as it does here."""
    diffusers = pytest.importorskip("diffusers")
    root, prompts = save_5b(tmp_path / "root")
    flags = ["--teacher", root, "--prompts", prompts, "--max_train_steps", "2"]
    flags += ["--sample_shape", *map(str, LATENT_5B), "--teacher_steps", "2"]
    flags += ["--train_batch_size", "2", "--student_steps", "2", "--preview_samples", "2"]
    flags += ["--fake_update_ratio", "1"]
    flags += ["--learning_rate", "1e-2", "--renoise", "ode", "--output_dir", str(tmp_path / "run")]
    if rank:
        flags += ["--lora_rank", str(rank), "--fake_lora_rank", str(rank)]
    dmd.main(flags)
    log = read_log(tmp_path / "run")
    assert len(log) == 2
    assert all(math.isfinite(float(row[key])) for row in log for key in ("loss_fake", "loss_dm"))
    folder = tmp_path / "run" / "student"
    dmd.main(["--sample", str(folder), "--prompts", prompts, "--output_dir", str(tmp_path / "x")])
    again = load_file(tmp_path / "x" / "samples.safetensors")["x0"]
    assert again.shape[1:] == LATENT_5B and again.isfinite().all()

    pipe = pipeline_of_5b(
        diffusers, diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    )
    if rank:
        net = load_network(root + "/transformer")[0]
        lora.load(net, "a", str(folder / "adapter.safetensors"))
        net = lora.Adapted(net, "a")
        pipe.load_lora_weights(str(folder / "adapter.safetensors"))
    else:
        net = load_network(str(folder))[0]
        pipe.transformer = WAN.theirs.from_pretrained(folder).eval()
    times = json.loads((folder / "sampler.json").read_text())["times"]
    set_timesteps = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda n, device=None, **_: set_timesteps(
        sigmas=times, device=device
    )
    stored, g = load_file(prompts), torch.Generator().manual_seed(3)
    z, cond = torch.randn(2, *LATENT_5B, generator=g), stored["cond.text"][:2]
    want = sampled_by(pipe, z, cond, stored["uncond.text"], len(times))
    at = Diffusion(Flow(), "flow_v"), lambda name: z, times, {"text": cond}, "ode"
    with torch.no_grad():
        ours, untrained = (dmd.sample(n, *at) for n in (net, load_teacher(root).net))
    assert relative(ours, want) <= 1e-4 and relative(untrained, want) > 1e-3
