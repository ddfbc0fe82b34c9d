"""What holds for every transformer with released weights.

It equals diffusers, files pass both ways, and training can rely on it.
"""

import json

import pytest
import torch
from helpers import (
    TINY_PIXART,
    TINY_WAN,
    TINY_Z_IMAGE,
    fill,
    read_log,
    refusal_of,
    relative,
    save_tiny_pixart,
    save_tiny_wan,
    save_tiny_z_image,
)
from released import MODELS, PIXART, WAN, Z_IMAGE
from safetensors.torch import load_file, save_file

import decoupled_dmd
import dmd
from models.diffusion import Flow
from models.networks import WEIGHTS, load_network, lora, z_image
from models.networks.pixart import PIXART_512, PIXART_1024, PixArtTransformer2DModel
from models.networks.wan import WAN_1_3B, WAN_5B, WAN_14B, WAN_A14B
from models.networks.z_image import Z_IMAGE_6B
from models.plumbing.teachers import describe_schedule

each = pytest.mark.parametrize(
    "model", [pytest.param(model, id=name) for name, model in MODELS.items()]
)
masked = pytest.mark.parametrize(
    "model", [pytest.param(model, id=model.module.__name__) for model in (Z_IMAGE, PIXART)]
)
P1024 = dict(PIXART.tiny, sample_size=128)  # what is left out of a config follows from sample_size

# Name: (changes of the config, size of the latent, number of tokens of each prompt).
CASES = {
    # One has a large eps, so that an ignored eps shows; another has as many prompt tokens as clip
    # tokens, so that a rotation of the prompt would show.
    WAN: {
        "plain": (dict(num_layers=2), (3, 6, 10), [5, 5]),
        "no_cross_attn_norm": (dict(cross_attn_norm=False), (1, 4, 6), [6, 6, 6]),
        "one_word": (
            dict(num_attention_heads=3, attention_head_dim=16, num_layers=2),
            (2, 2, 4),
            [1, 1],
        ),
        "more_out_channels": (
            dict(in_channels=5, out_channels=7, num_attention_heads=1, num_layers=1),
            (5, 4, 6),
            [3],
        ),
        "big_eps": (dict(eps=0.05, attention_head_dim=20, num_layers=2), (2, 6, 4), [4, 4]),
        "patch_2_1_3": (dict(patch_size=[2, 1, 3], num_layers=2), (4, 3, 6), [4, 4]),
    },
    # Image and prompts are each filled up to a multiple of 32 tokens.
    Z_IMAGE: {
        "nothing_masked": ({}, (4, 6), [5, 9]),
        "around_32": ({}, (6, 10), [31, 32, 33]),
        "far_apart": (dict(n_refiner_layers=1), (2, 4), [70, 1, 64, 40]),
        "nothing_filled_up": ({}, (8, 16), [32, 32]),
        "large_image": (dict(n_layers=2), (12, 14), [3, 65]),
        "big_eps": (dict(norm_eps=0.05), (4, 4), [7, 40]),
        "uneven_axes": (
            dict(n_heads=2, n_kv_heads=2, axes_dims=[8, 4, 6], rope_theta=50.0),
            (6, 8),
            [12, 33],
        ),
        "patch_1": (dict(all_patch_size=[1], in_channels=3), (3, 5), [2, 34]),
        "patch_3": (dict(all_patch_size=[3]), (6, 9), [30]),
        "wider_than_its_time": (
            dict(dim=270, n_layers=1, n_refiner_layers=1, axes_dims=[30, 30, 30]),
            (4, 4),
            [4, 33],
        ),
    },
    PIXART: {
        "512": ({}, (4, 6), [5, 9]),
        "512_tall": ({}, (10, 4), [1, 7, 3]),
        "1024": (dict(sample_size=128), (4, 6), [5, 9]),
        "1024_tall": (dict(sample_size=128), (12, 2), [8, 2]),
        "trained_size": (dict(sample_size=8), (8, 8), [4, 4]),
        "sigma": (
            dict(sample_size=128, use_additional_conditions=False, interpolation_scale=2),
            (6, 4),
            [3, 6],
        ),
        "512_sized": (
            dict(use_additional_conditions=True, interpolation_scale=1.5, num_layers=1),
            (4, 10),
            [3],
        ),
        "no_variance": (dict(out_channels=None, in_channels=5), (4, 4), [2, 5]),
        "big_eps": (dict(norm_eps=0.05), (4, 4), [7, 4]),
        "patch_1": (
            dict(patch_size=1, in_channels=3, out_channels=6, sample_size=7),
            (3, 5),
            [2, 4],
        ),
        "wider": (
            dict(
                num_attention_heads=2, attention_head_dim=20, cross_attention_dim=40, num_layers=2
            ),
            (4, 8),
            [6, 2],
        ),
    },
}


def case_of(model, case):
    """-> config, arguments of a call."""
    changes, size, lengths = CASES[model][case]
    config = {**model.tiny, **changes}
    return config, model.inputs(config, size, lengths)


# ---- the same function as diffusers --------------------------------------------------------------


@pytest.mark.parametrize(
    "model, case",
    [
        pytest.param(model, case, id=f"{name}-{case}")
        for name, model in MODELS.items()
        for case in CASES[model]
    ],
)
def test_equal_to_diffusers(model, case):
    config, call = case_of(model, case)
    ours, reference = model.pair(config)
    leaves = [
        {**call, **{k: call[k].clone().requires_grad_() for k in ("x", "text")}} for _ in range(2)
    ]

    out, want = ours(**leaves[0]), model.reference(reference, **leaves[1])
    B, C, *size = call["x"].shape
    assert out.shape == want.shape == (B, config["out_channels"] if model is WAN else C, *size)
    assert want.std() > 0.1  # a dead network would agree with anything
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    errors = {
        "out": model.error(out, want),
        **{f"dout/d{k}": relative(leaves[0][k].grad, leaves[1][k].grad) for k in ("x", "text")},
    }
    print(model.name, case, " ".join(f"{k} {e:.1e}" for k, e in errors.items()))
    assert max(errors.values()) <= 1e-5
    mask = call.get(model.mask, torch.ones(call["text"].shape[:2], dtype=torch.bool))
    text_gradient = leaves[0]["text"].grad
    assert not text_gradient[~mask].any() and text_gradient[mask].abs().sum(-1).all()
    parameters = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        got, want = (
            torch.zeros_like(p) if grad is None and model is Z_IMAGE else grad
            for grad in (p.grad, parameters[name].grad)
        )
        scale = 1 if model is WAN else max(1, want.abs().max())
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * scale), name


@pytest.mark.parametrize("t", [0.0, 1e-4, 0.5, 0.999, 1.0])
@each
def test_times(model, t):
    ours, reference = model.pair()
    call = dict(model.inputs(lengths=[3]), t=torch.tensor([t]))
    with torch.no_grad():
        out = ours(**call)
        assert model.error(out, model.reference(reference, **call)) <= 1e-5
        change = (ours(**{**call, "t": call["t"] / 2}) - out).abs().max()
        assert t < 0.01 or change > 1e-2 * max(1, out.abs().max())


@masked
def test_padding_is_never_seen(model):
    """Each row is computed as if it were alone and without padding."""
    lengths = [5, 33, 40] if model is Z_IMAGE else [5, 2, 8]
    net, call = fill(model.net(**model.tiny)), model.inputs(lengths=lengths)
    text, mask = call["text"], call[model.mask]
    with torch.no_grad():
        out = net(**call)
        for i in range(3):
            alone = {k: a[i : i + 1] for k, a in call.items()}
            alone["text"] = text[i : i + 1][:, mask[i]]
            alone[model.mask] = mask[i : i + 1][:, mask[i]]
            assert relative(net(**alone), out[i : i + 1]) < 1e-5
        other = text.masked_fill(~mask[..., None], 1e6 if model is Z_IMAGE else 30.0)
        assert torch.equal(net(**{**call, "text": other}), out)
        assert torch.equal(net(**{**call, model.mask: mask.long()}), out)
        assert torch.equal(net(**{**call, model.mask: 2 * mask.int()}), out)


# Of each: a case, what must stay float32 under autocast, and how large autocast's error may be.
LOW = {
    WAN: ("plain", lambda net, c: net.condition_embedder(c["t"], c["text"])[:2], 0.02),
    Z_IMAGE: (
        "around_32",
        lambda net, c: [
            net.t_embedder(c["t"]),
            *z_image.modulation(net.layers[0].adaLN_modulation, net.t_embedder(c["t"]), 4),
        ],
        0.03,
    ),
    PIXART: ("1024", lambda net, c: net.adaln_single(c["t"], 32, 48), 0.03),
}


@each
def test_bfloat16_as_close_to_float32_as_diffusers(model):
    case, conditions, most = LOW[model]
    config, call = case_of(model, case)
    ours, reference = model.pair(config)
    low_call = {k: a if k in ("t", model.mask) else a.bfloat16() for k, a in call.items()}

    def error(out, exact):
        return ((out.float() - exact).norm() / exact.norm()).item()

    with torch.no_grad():
        exact, before = ours(**call), conditions(ours, call)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = error(ours(**call), exact)
            after = conditions(ours, call)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        # Not the buffers: rotations and positions are float32 in diffusers too.
        for p in [*ours.parameters(), *reference.parameters()]:
            p.data = p.data.bfloat16()
        low, low_theirs = ours(**low_call), model.reference(reference, **low_call)
        # float32 ODE states work with bfloat16 weights.
        assert low.dtype == torch.bfloat16 and ours(**call).dtype == torch.float32
    low, low_theirs = error(low, exact), error(low_theirs, exact)
    print(f"errors: autocast {autocast:.1e}, bfloat16 {low:.1e}, diffusers' {low_theirs:.1e}")
    assert 0 < autocast < most and low < 1.5 * low_theirs + 1e-3 and low < 0.05


# ---- names, shapes and configs -------------------------------------------------------------------

PIXART_SHAPES = {
    "transformer_blocks.27.attn2.to_k.weight": (1152, 1152),
    "proj_out.weight": (32, 1152),
}
SIZED = "adaln_single.emb.resolution_embedder.linear_1.weight"


@pytest.mark.parametrize(
    "model, config, parameters, some",
    [
        pytest.param(WAN, WAN_1_3B, 1_418_996_800, {}, id="wan-1.3b"),
        pytest.param(WAN, WAN_14B, 14_288_491_584, {}, id="wan-14b"),
        pytest.param(WAN, WAN_5B, 4_999_787_712, {"proj_out.weight": (192, 3072)}, id="wan-5b"),
        pytest.param(WAN, WAN_A14B, 14_288_491_584, {}, id="wan-a14b"),
        pytest.param(
            Z_IMAGE,
            Z_IMAGE_6B,
            6_154_908_736,
            {
                "layers.29.feed_forward.w1.weight": (10240, 3840),
                "all_x_embedder.2-1.weight": (3840, 64),
            },
            id="z_image-6b",
        ),
        pytest.param(
            PIXART, PIXART_512, 610_856_096, {**PIXART_SHAPES, SIZED: None}, id="pixart-512"
        ),
        pytest.param(
            PIXART, PIXART_1024, 611_349_152, {**PIXART_SHAPES, SIZED: (384, 256)}, id="pixart-1024"
        ),
    ],
)
def test_released_sizes_have_diffusers_names_and_shapes(model, config, parameters, some):
    with torch.device("meta"):
        ours, reference = model.net(**config), model.theirs(**config)
    shapes = {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    assert shapes == {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    assert {k: shapes.get(k) for k in some} == some
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert not list(ours.buffers())  # nothing that meta construction or .to(bfloat16) could spoil
    assert set(ours.config) == {k for k in reference.config if not k.startswith("_")}
    assert all(ours.config[k] == config[k] == reference.config[k] for k in config)


@pytest.mark.parametrize(
    "model, config",
    [
        pytest.param(Z_IMAGE, {}, id="z_image"),
        pytest.param(PIXART, dict(caption_channels=8), id="pixart"),
    ],
)
def test_defaults_of_the_config_are_diffusers(model, config):
    with torch.device("meta"):
        ours, reference = model.net(**config), model.theirs(**config)
    assert ours.config == {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in reference.config.items()
        if not k.startswith("_")
    }


# Keys that released configs have beside those of today's class, whose name may be an older one.
OLD = {
    WAN: {},
    Z_IMAGE: {"nheads": 3},
    PIXART: {
        "_class_name": "Transformer2DModel",
        "double_self_attention": False,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_linear_projection": False,
    },
}


@each
def test_weights_and_config_of_diffusers_load_here(model, tmp_path):
    """A folder that diffusers wrote loads, also with the further keys of released configs.

    Configs survive JSON.
    """
    reference, ours = fill(model.theirs(**model.tiny)), model.net(**model.tiny)
    call = model.inputs()
    assert ours.config == json.loads(json.dumps(ours.config))
    assert model.tiny.items() <= ours.config.items()
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for more in ({}, OLD[model]):
        (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
        net, _ = load_network(str(tmp_path))
        with torch.no_grad():
            assert model.error(net(**call), model.reference(reference, **call)) <= 1e-5
        assert net.config == ours.config and not set(more) & set(net.config)
    model.net(**net.config).load_state_dict(reference.state_dict())


# ---- what the training scripts rely on -----------------------------------------------------------


# Of each: attribute with the main blocks, size of the latent, number of tokens.
@pytest.mark.parametrize(
    "model, blocks, size, tokens",
    [
        pytest.param(WAN, "blocks", (1, 4, 6), 6, id="wan"),
        pytest.param(Z_IMAGE, "layers", (6, 10), 15, id="z_image"),
        pytest.param(PIXART, "transformer_blocks", (6, 10), 15, id="pixart"),
    ],
)
def test_features_are_the_middle_block_s(model, blocks, size, tokens):
    net, call, seen = fill(model.net(**model.tiny)), model.inputs(size=size), []
    middle = getattr(net, blocks)[1]  # of three
    middle.register_forward_hook(lambda block, args, out: seen.append(out))
    with torch.no_grad():
        net(**call)
        features = net(**call, return_features=True)
    if model is Z_IMAGE:
        seen = [h[:, :tokens] for h in seen]  # of the image alone, without what fills it up
    assert features.shape == (2, tokens, 36 if model is Z_IMAGE else 24)
    assert torch.equal(features, seen[0])


@pytest.mark.parametrize(
    "model, config, blocks",
    [
        pytest.param(WAN, WAN.tiny, 3, id="wan"),
        pytest.param(Z_IMAGE, Z_IMAGE.tiny, 7, id="z_image"),
        pytest.param(PIXART, P1024, 3, id="pixart"),
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(monkeypatch, model, config, blocks):
    calls, original = [], model.module.checkpoint

    def checkpoint(*args, **keywords):
        calls.append(keywords)
        return original(*args, **keywords)

    monkeypatch.setattr(model.module, "checkpoint", checkpoint)
    net, call, gradients = fill(model.net(**config)), model.inputs(), []
    for net.gradient_checkpointing in (False, True):
        net.zero_grad()
        leaf = call["x"].clone().requires_grad_()
        net(**{**call, "x": leaf}).square().sum().backward()
        gradients.append([leaf.grad] + [p.grad.clone() for p in net.parameters()])
    assert calls == [{"use_reentrant": False}] * blocks
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with torch.no_grad():
        net(**call)
    assert len(calls) == blocks  # sampling does not checkpoint


@pytest.mark.parametrize(
    "model, facts",
    [
        pytest.param(WAN, ("flow_v", 5.0, (16, 21, 60, 104), ("text",)), id="wan"),
        pytest.param(Z_IMAGE, ("flow_v", 3.0, (16, 128, 128), ("text", "text_mask")), id="z_image"),
        pytest.param(PIXART, ("eps", 1.0, (4, 64, 64), ("text", "mask")), id="pixart"),
    ],
)
def test_class_facts(model, facts):
    net = getattr(model.module, model.name)
    assert (net.prediction, net.default_shift, net.latent_shape, net.cond_names) == facts
    assert net(**model.tiny).text_dim == 10


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(t=torch.tensor(0.5)), r"pass floats in \[0, 1\] of shape \(2,\)"),
        (dict(t=torch.tensor([500, 999])), r"torch.int64 \(2,\); pass floats in \[0, 1\]"),
        (dict(text=torch.zeros(2, 5, 11)), r"pass \(2, L, 10\)"),
        (dict(text=torch.zeros(1, 5, 10)), r"pass \(2, L, 10\)"),
        (dict(text=torch.zeros(2, 10)), r"pass \(2, L, 10\)"),
        (dict(adapter="a"), "no adapter is called 'a'"),
    ],
)
@each
def test_wrong_inputs_are_named(model, change, message):
    model.refuses(message, **change)


@masked
def test_wrong_masks_are_named(model):
    L = max(model.lengths) + 2
    model.refuses(
        rf"{model.mask} is torch.bool \(2, {L - 1}\); pass bool or integers of shape \(2, {L}\)",
        **{model.mask: torch.ones(2, L - 1, dtype=torch.bool)},
    )
    model.refuses(
        rf"{model.mask} is torch.float32 \(2, {L}\); pass bool or integers",
        **{model.mask: torch.ones(2, L)},
    )


# ---- adapters ------------------------------------------------------------------------------------


def adapted(model):
    """-> our network with a trained adapter "a", diffusers' with the same base, a call."""
    ours, reference = model.pair()
    torch.manual_seed(1)
    lora.add(ours, "a", rank=3, alpha=1.5)
    with torch.no_grad():
        for p in lora.parameters(ours, "a"):
            p += 0.3 * torch.randn(p.shape)
    return ours, reference, model.inputs()


def pipeline_around(model, reference):
    name = {WAN: "WanPipeline", Z_IMAGE: "ZImagePipeline"}[model]
    parts = dict(tokenizer=None, text_encoder=None, vae=None, scheduler=None)
    return getattr(pytest.importorskip("diffusers"), name)(**parts, transformer=reference)


# Of each: number of tensors in the file, and one of them with its shape. test_lora.py has Wan's,
# which goes into two networks.
@pytest.mark.parametrize(
    "model, tensors, name, shape",
    [
        pytest.param(
            Z_IMAGE,
            2 * 7 * 7,
            "diffusion_model.context_refiner.1.feed_forward.w3.lora_A.weight",
            (3, 36),
            id="z_image",
        ),
        pytest.param(
            PIXART,
            2 * 3 * 10,
            "base_model.model.transformer_blocks.2.ff.net.0.proj.lora_A.weight",
            (3, 24),
            id="pixart",
        ),
    ],
)
def test_diffusers_loads_our_adapter(model, tensors, name, shape, tmp_path):
    """It computes our function, and every tensor of the file arrives.

    For PixArt it is peft that loads it: diffusers has no method of its own.
    """
    peft = pytest.importorskip("peft")
    net, reference, call = adapted(model)
    path = tmp_path / "adapter_model.safetensors"
    lora.save(net, "a", str(path))
    stored = load_file(path)
    assert len(stored) == tensors and stored[name].shape == shape
    assert all(k.startswith(name.split(".")[0] + ".") for k in stored)
    if model is PIXART:
        diffusers = pytest.importorskip("diffusers")
        assert not hasattr(reference, "load_lora_adapter")
        assert not hasattr(diffusers.PixArtAlphaPipeline, "load_lora_weights")
        config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=list(net.lora_targets))
        config.save_pretrained(tmp_path)
        reference = peft.PeftModel.from_pretrained(reference, tmp_path)
    else:
        pipeline_around(model, reference).load_lora_weights(str(path), adapter_name="ours")
    with torch.no_grad():
        out, bare = net(**call, adapter="a"), net(**call)
        assert model.error(out, model.reference(reference, **call)) <= 1e-5
        assert relative(bare, out) > 1e-2
    arrived = [p for k, p in reference.named_parameters() if ".lora_" in k]
    assert len(arrived) == len(stored) and all(p.any() for p in arrived)


@pytest.mark.parametrize(
    "model, layers",
    [
        pytest.param(WAN, ["to_q", "to_k", "ffn.net.2"], id="wan"),
        pytest.param(Z_IMAGE, ["to_q", "to_out.0", "w2"], id="z_image"),
        pytest.param(PIXART, ["to_q", "to_out.0", "net.2"], id="pixart"),
    ],
)
def test_we_load_what_diffusers_saves(model, layers, tmp_path):
    """An adapter that peft made in their network computes the same in ours.

    Their pipeline class saves it, or else peft.
    """
    peft = pytest.importorskip("peft")
    net, reference, call = adapted(model)
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=layers, init_lora_weights=False)
    if model is PIXART:
        reference = peft.get_peft_model(reference, config)
        reference.save_pretrained(tmp_path)
    else:
        reference.add_adapter(config)
        type(pipeline_around(model, reference)).save_lora_weights(
            str(tmp_path),
            transformer_lora_layers=peft.get_peft_model_state_dict(reference),
            weight_name="adapter_model.safetensors",
        )
    lora.load(net, "theirs", str(tmp_path / "adapter_model.safetensors"))
    with torch.no_grad():
        want = model.reference(reference, **call)
        assert model.error(net(**call, adapter="theirs"), want) <= 1e-5
        assert relative(net(**call), want) > 1e-2


# ---- a run on it ---------------------------------------------------------------------------------

# shift(0.5, 3) = 0.75, with the shift of its scheduler/.
FLOW = dict(times=[1.0, 0.75], prediction="flow_v", schedule=describe_schedule(Flow()))
VP = dict(
    times=[1.0, 0.5],
    prediction="eps",
    schedule=describe_schedule(PixArtTransformer2DModel.default_schedule),
)


@pytest.mark.parametrize(
    "model, tiny, script, save, arguments, sampler",
    [
        pytest.param(WAN, TINY_WAN, dmd, save_tiny_wan, (), FLOW, id="wan-dmd"),
        pytest.param(WAN, TINY_WAN, decoupled_dmd, save_tiny_wan, (), FLOW, id="wan-decoupled_dmd"),
        pytest.param(
            Z_IMAGE, TINY_Z_IMAGE, decoupled_dmd, save_tiny_z_image, (), FLOW, id="z_image"
        ),
        pytest.param(PIXART, TINY_PIXART, dmd, save_tiny_pixart, (512,), VP, id="pixart-512"),
        pytest.param(
            PIXART,
            TINY_PIXART,
            dmd,
            save_tiny_pixart,
            (1024, "Transformer2DModel"),
            VP,
            id="pixart-1024-old-name",
        ),
    ],
)
def test_student_of_a_run_loads_in_diffusers(
    tmp_path, model, tiny, script, save, arguments, sampler
):
    """With a pipeline root as teacher and masks from the prompts file, the student is a component
    that diffusers loads, and that computes the same there."""
    (tmp_path / "teacher").mkdir()
    flags = save(tmp_path / "teacher", *arguments)
    flags += ["--train_batch_size", "3", "--max_train_steps", "2", "--guidance_scale", "2"]
    script.main([*flags, "--output_dir", str(tmp_path / "run")])
    folder = tmp_path / "run" / "student"
    config = json.loads((tmp_path / "teacher" / "transformer" / "config.json").read_text())
    assert json.loads((folder / "config.json").read_text()) == config
    stored = json.loads((folder / "sampler.json").read_text())
    assert stored["times"] == pytest.approx(sampler["times"])
    assert all(stored[k] == sampler[k] for k in ("prediction", "schedule"))
    ours, reference = load_network(str(folder))[0], model.theirs.from_pretrained(folder).eval()
    call = model.inputs(tiny)
    with torch.no_grad():
        out = ours(**call)
        assert model.error(out, model.reference(reference, **call)) <= 1e-5 and out.std() > 0.01
    start = load_file(tmp_path / "teacher" / "transformer" / WEIGHTS)
    trained = ours.state_dict()
    assert not any(torch.equal(v, start[k]) for k, v in trained.items())  # every parameter moved
    assert len(read_log(tmp_path / "run")) == 2
    assert load_file(tmp_path / "run" / "samples.safetensors")["x0"].shape == (2, 4, *model.size)


WRONG = [
    *(
        (model, how, says)
        for model in (Z_IMAGE, PIXART)
        for how, says in [
            ("wrong width", "are 12 wide (unconditional 12), the teacher takes 16"),
            ("no mask", f"lacks 'cond.{model.mask}'"),
            ("float mask", f"{model.mask} is torch.float32"),
            ("no prompts", "needs --prompts"),
            ("odd shape", "do not divide into patches"),
        ]
    ),
    (Z_IMAGE, "mask of another length", "pass bool or integers of shape (1, 36)"),
    (PIXART, "mask of another length", "pass bool or integers of shape (1, 9)"),
    (Z_IMAGE, "empty prompt", "row 0 of cond.text_mask is false everywhere"),
    (
        PIXART,
        "another network",
        "does not describe a Transformer2DModel: norm_type = 'ada_norm' is not implemented",
    ),
]


@pytest.mark.parametrize(
    "model, how, says", [pytest.param(*case, id=f"{case[0].mask}-{case[1]}") for case in WRONG]
)
def test_wrong_input_is_refused_before_training(tmp_path, capsys, model, how, says):
    if model is Z_IMAGE:
        script, flags = decoupled_dmd, save_tiny_z_image(tmp_path)
    else:
        script, flags = dmd, save_tiny_pixart(tmp_path, 512, "Transformer2DModel")
    path, config = tmp_path / "prompts.safetensors", tmp_path / "transformer" / "config.json"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    if how == "wrong width":
        for k in [k for k in tensors if k.endswith("text")]:
            tensors[k] = tensors[k][..., :12].contiguous()
    elif how == "no mask":
        del tensors[f"cond.{model.mask}"]
    elif how == "float mask":
        tensors = {k: v.float() for k, v in tensors.items()}
    elif how == "mask of another length":
        for k in [k for k in tensors if k.endswith("mask")]:
            tensors[k] = tensors[k][:, :-1].contiguous()
    elif how == "empty prompt":
        tensors[f"cond.{model.mask}"][0] = False
    elif how == "no prompts":
        del flags[2:4]
    elif how == "odd shape":
        flags += ["--sample_shape", "4", "4", "5"]
    elif how == "another network":
        config.write_text(json.dumps({**json.loads(config.read_text()), "norm_type": "ada_norm"}))
    save_file(tensors, path)
    flags += ["--max_train_steps", "2", "--output_dir", str(tmp_path / "run")]
    assert says in refusal_of(capsys, script.main, *flags)
    assert not (tmp_path / "run").exists()
