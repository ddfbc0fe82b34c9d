"""models/z_image.py equals diffusers on the same random weights; masks, clock, errors, adapters, pipeline ends."""
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import decoupled_dmd
from helpers import TINY_Z_IMAGE, fill, read_log, refusal_of, relative, save_tiny_z_image, word_tokenizer
from models import io, lora, z_image
from models.diffusion import step_grid
from models.pipeline import decode_images
from models.z_image import Z_IMAGE_6B, ZImageTransformer2DModel

TINY = dict(in_channels=4, dim=36, n_layers=3, n_refiner_layers=2, n_heads=3, n_kv_heads=3, cap_feat_dim=10, axes_dims=[4, 4, 4],
            axes_lens=[128, 16, 16])
# Name: (config, (H, W), tokens of each prompt). Image and prompts are each filled up to a multiple of 32 tokens.
CASES = {
    "nothing_masked": (TINY, (4, 6), [5, 9]),
    "around_32": (TINY, (6, 10), [31, 32, 33]),
    "far_apart": (dict(TINY, n_refiner_layers=1), (2, 4), [70, 1, 64, 40]),
    "nothing_filled_up": (TINY, (8, 16), [32, 32]),
    "large_image": (dict(TINY, n_layers=2), (12, 14), [3, 65]),
    "big_eps": (dict(TINY, norm_eps=0.05), (4, 4), [7, 40]),
    "uneven_axes": (dict(TINY, n_heads=2, n_kv_heads=2, axes_dims=[8, 4, 6], rope_theta=50.0), (6, 8), [12, 33]),
    "patch_1": (dict(TINY, all_patch_size=[1], in_channels=3), (3, 5), [2, 34]),
    "patch_3": (dict(TINY, all_patch_size=[3]), (6, 9), [30]),
    "wider_than_its_time": (dict(TINY, dim=270, n_layers=1, n_refiner_layers=1, axes_dims=[30, 30, 30]), (4, 4), [4, 33]),
}


def inputs(config, size, lengths, seed=1):
    """-> dict of x, t, text, text_mask; the padding of text is no zeros, so that whoever looks at it is seen."""
    g, B, L = torch.Generator().manual_seed(seed), len(lengths), max(lengths) + 2
    return dict(x=torch.randn(B, config["in_channels"], *size, generator=g), t=torch.rand(B, generator=g),
                text=torch.randn(B, L, config["cap_feat_dim"], generator=g), text_mask=torch.arange(L) < torch.tensor(lengths)[:, None])


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("diffusers").ZImageTransformer2DModel


def pair(theirs, config):
    ours = fill(ZImageTransformer2DModel(**config))
    reference = theirs(**config).eval()
    reference.load_state_dict(ours.state_dict())  # strict: same names, same shapes
    return ours, reference


def velocity(reference, x, t, text, text_mask):
    """Flow velocity of a network of diffusers: lists instead of padding, one frame, its clock 1 - t, its sign x0 - eps."""
    p = reference.config.all_patch_size[0]
    out = reference(list(x.unsqueeze(2)), 1 - t, [row[keep] for row, keep in zip(text, text_mask)], patch_size=p).sample
    return -torch.stack(out).squeeze(2)


# ---- the same function as diffusers ------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_equal_to_diffusers(theirs, case):
    config, size, lengths = CASES[case]
    ours, reference = pair(theirs, config)
    call = inputs(config, size, lengths)
    leaves = [{**call, **{k: call[k].clone().requires_grad_() for k in ("x", "text")}} for _ in range(2)]

    v, v_theirs = ours(**leaves[0]), velocity(reference, **leaves[1])
    assert v.shape == v_theirs.shape == call["x"].shape and v_theirs.std() > 0.1  # a dead network would agree with anything
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(2))
    (v * weight).sum().backward()
    (v_theirs * weight).sum().backward()
    errors = {"v": relative(v, v_theirs), **{f"dv/d{k}": relative(leaves[0][k].grad, leaves[1][k].grad) for k in ("x", "text")}}
    print(case, " ".join(f"{k} {e:.1e}" for k, e in errors.items()))
    assert max(errors.values()) <= 1e-5
    assert not leaves[0]["text"].grad[~call["text_mask"]].any() and leaves[0]["text"].grad[call["text_mask"]].abs().sum(-1).all()
    parameters = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        want = torch.zeros_like(p) if parameters[name].grad is None else parameters[name].grad
        assert torch.allclose(p.grad if p.grad is not None else torch.zeros_like(p), want, rtol=1e-4, atol=1e-4 * max(1, want.abs().max())), name


def test_epsilon_of_the_last_norm(theirs):
    """Seen where tokens arrive there small: a faint embedding of the image, and blocks that add nothing."""
    ours = fill(ZImageTransformer2DModel(**TINY))
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p *= 1e-3 if name.startswith("all_x_embedder") else 0.0 if "adaLN_modulation.0" in name else 1.0
    reference = theirs(**TINY).eval()
    reference.load_state_dict(ours.state_dict())
    call = inputs(TINY, (4, 6), [5])
    with torch.no_grad():
        v = ours(**call)
        assert relative(v, velocity(reference, **call)) <= 1e-5
        ours.all_final_layer["2-1"].norm_final.eps *= 2
        assert relative(ours(**call), v) > 1e-2


@pytest.mark.parametrize("t", [0.0, 1e-4, 0.5, 0.999, 1.0])
def test_times(theirs, t):
    ours, reference = pair(theirs, TINY)
    call = dict(inputs(TINY, (4, 4), [3]), t=torch.tensor([t]))
    with torch.no_grad():
        v = ours(**call)
        assert relative(v, velocity(reference, **call)) <= 1e-5
        assert t < 0.01 or relative(ours(**{**call, "t": call["t"] / 2}), v) > 1e-2


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_sign_and_clock_are_those_of_the_pipeline(theirs, scale):
    """Euler steps of dx/dt = v from t = 1 to 0 in the velocity of ours are what ZImagePipeline does. Its guidance g is our g + 1."""
    diffusers = pytest.importorskip("diffusers")
    ours, reference = pair(theirs, TINY)
    call, null = inputs(TINY, (4, 6), [5, 40]), inputs(TINY, (4, 6), [3, 3], seed=5)
    listed = [[row[keep] for row, keep in zip(c["text"], c["text_mask"])] for c in (call, null)]
    pipe = diffusers.ZImagePipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, reference)
    pipe.set_progress_bar_config(disable=True)
    want = pipe(prompt_embeds=listed[0], negative_prompt_embeds=listed[1], latents=call["x"], height=32, width=48, num_inference_steps=3,
                guidance_scale=scale, output_type="latent").images
    x, grid = call["x"], step_grid(3, ZImageTransformer2DModel.default_shift)
    with torch.no_grad():
        for t, t_next in zip(grid[:-1], grid[1:]):
            cond, uncond = (ours(x, torch.full((2,), t), text=c["text"], text_mask=c["text_mask"]) for c in (call, null))
            x = x + (t_next - t) * (uncond + (scale + 1) * (cond - uncond))
    assert relative(x, want) < 1e-3 and relative(call["x"], want) > 0.1  # (1000 - 1000 t) / 1000 rounds otherwise than 1 - t


def test_padding_is_never_seen():
    """Nor where it stands: only the tokens that the mask names, in their order, in any company."""
    net = fill(ZImageTransformer2DModel(**TINY))
    call = inputs(TINY, (4, 6), [5, 33, 40])
    text, keep = call["text"], call["text_mask"]
    with torch.no_grad():
        v = net(**call)
        for i in range(3):
            one = {k: a[i:i + 1] for k, a in call.items()}
            alone = {**one, "text": text[i:i + 1][:, keep[i]], "text_mask": keep[i:i + 1][:, keep[i]]}
            assert relative(net(**alone), v[i:i + 1]) < 1e-5
        assert torch.equal(net(**{**call, "text": text.masked_fill(~keep[..., None], 1e6)}), v)
        assert torch.equal(net(**{**call, "text_mask": keep.long()}), v) and torch.equal(net(**{**call, "text_mask": 2 * keep.int()}), v)
        left = torch.stack([torch.cat([row[~k], row[k]]) for row, k in zip(text, keep)])  # padding before the tokens
        assert torch.equal(net(**{**call, "text": left, "text_mask": keep.flip(1)}), v)
        holes = torch.zeros(3, 84, dtype=torch.bool)
        holes[:, ::2] = keep
        assert torch.equal(net(**{**call, "text": text.repeat_interleave(2, dim=1), "text_mask": holes}), v)
        longer = F.pad(text, (0, 0, 0, 60)), F.pad(keep, (0, 60))
        assert torch.equal(net(**{**call, "text": longer[0], "text_mask": longer[1]}), v)


def test_a_mask_is_used_only_where_prompts_fill_up_differently(monkeypatch):
    """Attention without one is faster, and the same."""
    seen, original = [], z_image.attention
    monkeypatch.setattr(z_image, "attention", lambda q, k, v, mask: seen.append(mask) or original(q, k, v, mask))
    net = fill(ZImageTransformer2DModel(**TINY))
    with torch.no_grad():
        net(**inputs(TINY, (4, 4), [5, 32, 17]))
        assert len(seen) == 7 and all(m is None for m in seen)
        seen.clear()
        net(**inputs(TINY, (4, 4), [5, 33]))
    assert [m if m is None else tuple(m.shape) for m in seen] == [None] * 2 + [(2, 1, 1, 64)] * 2 + [(2, 1, 1, 96)] * 3
    assert seen[-1].sum(-1).flatten().tolist() == [64, 96] and seen[-1][0, 0, 0, :64].all()


def test_bfloat16_as_close_to_float32_as_diffusers(theirs, monkeypatch):
    config, size, lengths = CASES["around_32"]
    ours, reference = pair(theirs, config)
    call = inputs(config, size, lengths)
    low_call = {k: a if k in ("t", "text_mask") else a.bfloat16() for k, a in call.items()}
    angles, original = [], z_image.rotate
    monkeypatch.setattr(z_image, "rotate", lambda q, cos, sin: angles.append((cos, sin)) or original(q, cos, sin))
    error = lambda v, exact: ((v.float() - exact).norm() / exact.norm()).item()  # noqa: E731
    with torch.no_grad():
        exact = ours(**call)
        time = ours.t_embedder(call["t"])
        parts = z_image.modulation(ours.layers[0].adaLN_modulation, time, 4)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = error(ours(**call), exact)
            assert torch.equal(time, ours.t_embedder(call["t"]))  # time and modulation stay float32
            assert all(torch.equal(a, b) for a, b in zip(parts, z_image.modulation(ours.layers[0].adaLN_modulation, time, 4)))
        ours.to(torch.bfloat16), reference.to(torch.bfloat16)
        low, low_theirs = ours(**low_call), velocity(reference, **low_call)
        assert low.dtype == torch.bfloat16 and ours(**call).dtype == torch.float32  # float32 ODE states, bfloat16 weights
    calls = [angles[i:i + 14] for i in range(0, len(angles), 14)]  # q and k of seven blocks: float32, autocast, bfloat16 twice
    assert len(calls) == 4 and all(torch.equal(a, b) for c in calls for pair in zip(c, calls[0]) for a, b in zip(*pair))  # never rounded
    low, low_theirs = error(low, exact), error(low_theirs, exact)
    print(f"errors: autocast {autocast:.1e}, bfloat16 weights {low:.1e}, diffusers' {low_theirs:.1e}")
    assert 0 < autocast < 0.03 and low < 1.5 * low_theirs + 1e-3 and low < 0.05


def test_released_size_has_diffusers_names_and_shapes(theirs):
    with torch.device("meta"):
        ours, reference = ZImageTransformer2DModel(**Z_IMAGE_6B), theirs(**Z_IMAGE_6B)
        default = ZImageTransformer2DModel(), theirs()
    shapes = {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    assert shapes == {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    assert shapes["layers.29.feed_forward.w1.weight"] == (10240, 3840) and shapes["all_x_embedder.2-1.weight"] == (3840, 64)
    assert sum(p.numel() for p in ours.parameters()) == 6_154_908_736
    assert not list(ours.buffers())  # nothing that meta construction or .to(bfloat16) could spoil
    assert set(ours.config) == {k for k in reference.config if not k.startswith("_")}
    assert all(ours.config[k] == Z_IMAGE_6B[k] == reference.config[k] for k in Z_IMAGE_6B)
    assert default[0].config == {k: list(v) if isinstance(v, tuple) else v for k, v in default[1].config.items() if not k.startswith("_")}


def test_weights_and_config_of_diffusers_load_here(theirs, tmp_path):
    """A folder that diffusers wrote, with the further key nheads of the released Turbo config."""
    reference = fill(theirs(**TINY))
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for more in ({}, {"nheads": 3}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
        net, _ = io.load_network(str(tmp_path))
        call = inputs(TINY, (4, 4), [3, 36])
        with torch.no_grad():
            assert relative(net(**call), velocity(reference, **call)) <= 1e-5
    assert net.config == json.loads(json.dumps(net.config)) and "nheads" not in net.config
    ZImageTransformer2DModel(**net.config).load_state_dict(reference.state_dict())


# ---- what the training scripts rely on ---------------------------------------------------------------------


def test_features_are_the_middle_block_and_change_nothing():
    net = fill(ZImageTransformer2DModel(**TINY))  # three blocks: the middle one is index 1
    call, seen = inputs(TINY, (6, 10), [5, 40]), []
    net.layers[1].register_forward_hook(lambda block, args, out: seen.append(out))
    with torch.no_grad():
        v, features = net(**call, return_features=True)
        assert torch.equal(v, net(**call))
    assert features.shape == (2, 15, 36) and torch.equal(features, seen[0][:, :15])  # of the image alone, nothing that fills up


def test_gradient_checkpointing_gives_the_same_gradients(monkeypatch):
    calls, original = [], z_image.checkpoint
    monkeypatch.setattr(z_image, "checkpoint", lambda *a, **k: calls.append(k) or original(*a, **k))
    net, call, gradients = fill(ZImageTransformer2DModel(**TINY)), inputs(TINY, (4, 6), [5, 40]), []
    for net.gradient_checkpointing in (False, True):
        net.zero_grad()
        leaf = call["x"].clone().requires_grad_()
        net(**{**call, "x": leaf}).square().sum().backward()
        gradients.append([leaf.grad] + [p.grad.clone() for p in net.parameters()])
    assert calls == [{"use_reentrant": False}] * 7
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    with torch.no_grad():
        net(**call)
    assert len(calls) == 7  # sampling does not checkpoint


def test_class_facts():
    net = ZImageTransformer2DModel
    assert net.prediction == "flow_v" and net.default_shift == 3.0 and net.latent_shape == (16, 128, 128)
    assert net.cond_names == ("text", "text_mask") and net(**TINY).text_dim == 10


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(2, 4, 1, 4, 4)), r"pass a latent \(B, 4, H, W\)"), (dict(x=torch.zeros(2, 3, 4, 4)), r"pass a latent \(B, 4, H, W\)"),
    (dict(x=torch.zeros(2, 4, 5, 4)), "do not divide into patches of 2 x 2"), (dict(x=torch.zeros(2, 4, 4, 7)), "do not divide into patches"),
    (dict(x=torch.zeros(2, 4, 34, 4)), r"need \[66, 17, 2\] positions, axes_lens has \[128, 16, 16\]"),
    (dict(x=torch.zeros(2, 4, 4, 34)), r"need \[66, 2, 17\] positions"),
    (dict(text=torch.zeros(2, 97, 10), text_mask=torch.ones(2, 97, dtype=torch.bool)), r"97 prompt tokens need \[130, 2, 2\] positions"),
    (dict(t=torch.tensor(0.5)), r"pass floats in \[0, 1\] of shape \(2,\)"), (dict(t=torch.tensor([500, 999])), r"torch.int64 \(2,\); pass floats"),
    (dict(text=torch.zeros(2, 42, 11)), r"pass \(2, L, 10\)"), (dict(text=torch.zeros(1, 42, 10)), r"pass \(2, L, 10\)"),
    (dict(text=torch.zeros(2, 10)), r"pass \(2, L, 10\)"),
    (dict(text_mask=torch.ones(2, 41, dtype=torch.bool)), r"torch.bool \(2, 41\); pass bool or integers of shape \(2, 42\)"),
    (dict(text_mask=torch.ones(2, 42)), r"torch.float32 \(2, 42\); pass bool or integers"),
    (dict(text_mask=torch.tensor([[1], [0]]).expand(2, 42)), "no token in row 1"), (dict(adapter="a"), "no adapter is called 'a'")])
def test_wrong_inputs_are_named(change, message):
    net = ZImageTransformer2DModel(**TINY)
    with pytest.raises(ValueError, match=message) as error:
        net(**{**inputs(TINY, (4, 4), [5, 40]), **change})
    assert "\n" not in str(error.value)


def test_largest_inputs_are_taken(theirs):
    """The refusals start exactly where diffusers runs out of positions."""
    ours, reference = pair(theirs, dict(TINY, axes_lens=[66, 3, 2]))
    call = inputs(TINY, (6, 4), [64])
    with torch.no_grad():
        assert relative(ours(**call), velocity(reference, **call)) <= 1e-5
    for most, size in (([65, 3, 2], (6, 4)), ([66, 3, 2], (8, 4)), ([66, 3, 2], (6, 6))):
        ours, reference = pair(theirs, dict(TINY, axes_lens=most))
        call = inputs(TINY, size, [64])
        with pytest.raises(ValueError, match="positions"):
            ours(**call)
        with pytest.raises(IndexError):
            velocity(reference, **call)


@pytest.mark.parametrize("change, message", [
    (dict(all_patch_size=[2, 4], all_f_patch_size=[1, 1]), r"all_patch_size = \[2, 4\] .* one patch size"),
    (dict(all_f_patch_size=[2]), r"all_f_patch_size = \[2\] is not implemented"),
    (dict(siglip_feat_dim=1152), "siglip_feat_dim = 1152 means the omni variant"),
    (dict(n_kv_heads=1), "n_heads = 3 with n_kv_heads = 1"), (dict(nheads=4), "nheads = 4 is not implemented"),
    (dict(qk_norm=False), "qk_norm = False"), (dict(t_scale=1.0), "t_scale = 1.0"),
    (dict(axes_dims=[4, 4, 6]), "sum to the width of a head"), (dict(axes_dims=[3, 5, 4]), "must be even"), (dict(n_heads=5, n_kv_heads=5), "36 / 5"),
    (dict(axes_dims=[6, 6]), "three entries"), (dict(axes_lens=[64, 64]), "three entries")])
def test_wrong_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        ZImageTransformer2DModel(**dict(TINY, **change))
    assert "\n" not in str(error.value)


# ---- adapters ----------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(theirs):
    """-> our network with a trained adapter "a", a ZImagePipeline of diffusers with the same base, the arguments of a call."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    ours, reference = pair(theirs, TINY)
    torch.manual_seed(1)
    lora.add(ours, "a", rank=3, alpha=1.5)
    with torch.no_grad():
        for p in lora.parameters(ours, "a"):
            p += 0.3 * torch.randn(p.shape)
    return ours, diffusers.ZImagePipeline(None, None, None, None, reference), inputs(TINY, (4, 6), [5, 40])


def test_pipeline_of_diffusers_loads_our_adapter(adapted, tmp_path):
    """The same velocities as ours, and every tensor of the file arrives."""
    net, pipe, call = adapted
    lora.save(net, "a", str(tmp_path / "a.safetensors"))
    stored = load_file(tmp_path / "a.safetensors")
    assert len(stored) == 2 * 7 * 7 and all(k.startswith("diffusion_model.") for k in stored)
    assert stored["diffusion_model.context_refiner.1.feed_forward.w3.lora_A.weight"].shape == (3, 36)
    pipe.load_lora_weights(str(tmp_path / "a.safetensors"), adapter_name="ours")
    with torch.no_grad():
        v, bare = net(**call, adapter="a"), net(**call)
        assert relative(v, velocity(pipe.transformer, **call)) <= 1e-5 and relative(bare, v) > 1e-2
    loaded = {k: p for k, p in pipe.transformer.named_parameters() if ".lora_" in k}
    assert len(loaded) == len(stored) and all(p.any() for p in loaded.values())


def test_we_load_what_diffusers_saves(adapted, tmp_path):
    """An adapter made by peft in their network, saved by their pipeline class, computes the same in ours."""
    peft = pytest.importorskip("peft")
    net, pipe, call = adapted
    torch.manual_seed(4)
    pipe.transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0", "w2"], init_lora_weights=False))
    state = peft.get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(str(tmp_path), transformer_lora_layers=state, weight_name="theirs.safetensors")
    lora.load(net, "theirs", str(tmp_path / "theirs.safetensors"))
    with torch.no_grad():
        v = velocity(pipe.transformer, **call)
        assert relative(net(**call, adapter="theirs"), v) <= 1e-5 and relative(net(**call), v) > 1e-2


# ---- a run on it -------------------------------------------------------------------------------------------


def test_student_of_a_run_loads_in_diffusers(theirs, tmp_path):
    """A pipeline root as teacher: shift from its scheduler/, masks from the prompts file, and the student is a diffusers component."""
    (tmp_path / "teacher").mkdir()
    flags = save_tiny_z_image(tmp_path / "teacher")
    decoupled_dmd.main([*flags, "--train_batch_size", "3", "--max_train_steps", "2", "--guidance_scale", "2", "--output_dir", str(tmp_path / "run")])
    folder = tmp_path / "run" / "student"
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "teacher" / "transformer" / "config.json").read_text())
    assert json.loads((folder / "sampler.json").read_text())["times"] == pytest.approx([1.0, 0.75])  # shift(0.5, 3)
    ours, reference = io.load_network(str(folder))[0], theirs.from_pretrained(folder).eval()
    call = inputs(TINY_Z_IMAGE, (4, 6), [5, 40])
    with torch.no_grad():
        v = ours(**call)
        assert relative(v, velocity(reference, **call)) <= 1e-5 and v.std() > 0.01
    start = load_file(tmp_path / "teacher" / "transformer" / io.WEIGHTS)
    assert all(not torch.equal(v, start[k]) for k, v in ours.state_dict().items())  # every parameter was trained
    assert len(read_log(tmp_path / "run")) == 2
    assert load_file(tmp_path / "run" / "samples.safetensors")["x0"].shape == (2, 4, 4, 6)


@pytest.mark.parametrize("how, says", [
    ("wrong width", "are 12 wide (unconditional 12), the teacher takes 16"), ("no mask", "lacks 'cond.text_mask'"),
    ("float mask", "text_mask is torch.float32"), ("empty prompt", "no token in row 0"), ("no prompts", "needs --prompts"),
    ("mask of another length", "pass bool or integers of shape (1, 36)"), ("odd shape", "do not divide into patches")])
def test_wrong_prompts_are_refused_before_training(tmp_path, capsys, how, says):
    flags = save_tiny_z_image(tmp_path, width=12 if how == "wrong width" else 16)
    path = tmp_path / "prompts.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    if how == "no mask":
        del tensors["cond.text_mask"]
    elif how == "float mask":
        tensors = {k: v.float() for k, v in tensors.items()}
    elif how == "empty prompt":
        tensors["cond.text_mask"][0] = False
    elif how == "mask of another length":
        tensors = {k: v[:, :35].contiguous() if k.endswith("mask") else v for k, v in tensors.items()}
    elif how == "no prompts":
        del flags[2:4]
    elif how == "odd shape":
        flags += ["--sample_shape", "4", "4", "5"]
    save_file(tensors, path)
    assert says in refusal_of(capsys, decoupled_dmd.main, *flags, "--max_train_steps", "2", "--output_dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---- the ends of a real pipeline ---------------------------------------------------------------------------

# Like Qwen3's: whose turn it is, and an empty thought where thinking is off.
CHAT = ("{% for m in messages %}<start> {{ m.role }} {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<start> assistant {% if not enable_thinking %}<think> {% endif %}{% endif %}")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A ZImagePipeline of tiny random networks and a word-level tokenizer, saved -> (pipeline, folder)."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    tokenizer = word_tokenizer(["<pad>", "<unk>", "<start>", "<end>", "<think>", "user", "assistant"], eos_token="<end>")
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    encoder = transformers.Qwen3Model(transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=10, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=6))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
        norm_num_groups=4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    pipe = diffusers.ZImagePipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), fill(vae), encoder.eval(), tokenizer,
                                    fill(diffusers.ZImageTransformer2DModel(**TINY)))
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("z_image") / "pipeline"
    pipe.save_pretrained(folder)
    return pipe, folder


def test_encode_prompts_as_z_image_pipeline(pipeline):
    pipe, folder = pipeline
    prompts = ["a cat runs", "a dog a cat runs fast", "dog"]
    for negative, length in (("", 512), ("fast dog", 512), ("", 7)):  # the last cuts
        with torch.no_grad():  # a list of its own: the pipeline writes its chat template into the list it is given
            cond, uncond = pipe.encode_prompt(list(prompts), negative_prompt=[negative] * 3, max_sequence_length=length)
        ours = z_image.encode_prompts(folder, prompts, negative, max_length=length)
        counts = [min(length, n + 5) for n in (3, 6, 1)]
        assert [len(row) for row in cond] == counts
        assert ours["cond.text"].shape == (3, max(counts), 10) and ours["uncond.text"].shape == (1, max(counts), 10)
        assert {k: v.dtype for k, v in ours.items() if "mask" in k} == {"cond.text_mask": torch.bool, "uncond.text_mask": torch.bool}
        for part, want in (("cond", cond), ("uncond", uncond[:1])):
            for text, keep, row in zip(ours[part + ".text"], ours[part + ".text_mask"], want):
                assert keep.sum() == len(row) and keep[:len(row)].all() and relative(text[keep], row) < 1e-5 and not text[~keep].any()
    assert z_image.encode_prompts(folder, prompts)["uncond.text_mask"].sum() == 5  # '' by default: the chat template alone


def test_decode_latents_as_z_image_pipeline(pipeline):
    pipe, folder = pipeline
    call = inputs(TINY, (4, 6), [3, 5])
    listed = [row[keep] for row, keep in zip(call["text"], call["text_mask"])]
    settings = dict(prompt_embeds=listed, latents=call["x"], height=8, width=12, num_inference_steps=1, guidance_scale=0.0)
    x0, images = (pipe(**settings, output_type=kind).images for kind in ("latent", "pt"))
    ours = decode_images(folder, x0)
    assert ours.shape == (2, 3, 8, 12) and ours.dtype == torch.uint8 and ours.float().std() > 1
    assert (ours.float() - 255 * images).abs().max() <= 0.51
    with torch.no_grad():
        plain = pipe.image_processor.postprocess(pipe.vae.decode(x0).sample, output_type="pt")
    assert (ours.float() - 255 * plain).abs().max() > 2  # scale and shift are seen
    for wrong in (x0[:, :3], x0[:, :, None]):
        with pytest.raises(ValueError, match=r"this VAE needs \(B, 4, H, W\)"):
            decode_images(folder, wrong)


def test_command_line(pipeline, tmp_path):
    """What encode writes is what the scripts' --prompts and the network take; decode writes PNGs."""
    text, output = tmp_path / "prompts.txt", tmp_path / "new" / "prompts.safetensors"
    text.write_text("a cat\n\n a dog runs\n", encoding="utf-8")
    z_image.main(["encode", "--teacher", str(pipeline[1]), "--prompts_txt", str(text), "--output", str(output)])
    assert [p.name for p in output.parent.iterdir()] == ["prompts.safetensors"]
    net = fill(ZImageTransformer2DModel(**TINY))
    prompts = io.Prompts(str(output), net.cond_names, {"text": net.text_dim})
    cond, uncond = prompts.rows(torch.tensor([1, 0]), "cpu"), prompts.unconditional(2, "cpu")
    assert cond["text_mask"].sum(1).tolist() == [8, 7] and uncond["text_mask"].sum(1).tolist() == [5, 5]
    x, t = torch.randn(2, 4, 4, 4), torch.ones(2)
    assert relative(net(x, t, **uncond), net(x, t, **cond)) > 1e-3

    latents, images = tmp_path / "samples.safetensors", tmp_path / "images"
    save_file({"x0": torch.randn(2, 4, 2, 3)}, latents)
    z_image.main(["decode", "--teacher", str(pipeline[1]), "--latents", str(latents), "--output", str(images)])
    assert sorted(p.name for p in images.iterdir()) == ["000.png", "001.png"]
    with pytest.importorskip("PIL.Image").open(images / "001.png") as image:
        assert image.size == (6, 4) and image.mode == "RGB"  # (W', H')


def test_wrong_input_is_one_line_and_exit_code_2(pipeline, tmp_path, capsys, monkeypatch):
    (tmp_path / "tokenizer").mkdir(), (tmp_path / "vae").mkdir()
    (tmp_path / "p.txt").write_text("a cat\n"), (tmp_path / "junk").write_bytes(b"junk")
    save_file({"x0": torch.zeros(1, 3, 2, 2)}, tmp_path / "x0"), save_file({"y": torch.zeros(1)}, tmp_path / "y")
    encode, decode = ["encode", "--prompts_txt", str(tmp_path / "p.txt")], ["decode", "--latents", str(tmp_path / "x0")]

    def line(flags, teacher):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            z_image.main([*flags, "--teacher", str(teacher), "--output", str(tmp_path / "out")])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1 and not (tmp_path / "out").exists()
        return lines[0]

    assert "pass a diffusers pipeline folder" in line(encode, tmp_path / "none")
    assert "--teacher" in line(encode, tmp_path) and "--teacher" in line(decode, tmp_path)  # an empty tokenizer/, an empty vae/
    assert "this VAE needs (B, 4, H, W)" in line(decode, pipeline[1])
    assert "cannot read --latents" in line([*decode[:2], str(tmp_path / "junk")], pipeline[1])
    assert "has no tensor x0" in line([*decode[:2], str(tmp_path / "y")], pipeline[1])
    assert "cannot read --prompts_txt" in line([*encode[:2], str(tmp_path / "none.txt")], pipeline[1])
    assert "--max_length is 0" in line([*encode, "--max_length", "0"], pipeline[1])
    for name in ("transformers", "diffusers"):
        monkeypatch.setitem(sys.modules, name, None)  # import then raises ImportError, as when absent
    assert "pip install transformers" in line(encode, pipeline[1]) and "pip install diffusers" in line(decode, pipeline[1])
