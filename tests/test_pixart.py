"""models/pixart.py equals diffusers on the same random weights; clock, channels, masks, errors, adapters, pipeline ends."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dmd
from helpers import PIXART_SCHEDULER, TINY_PIXART, fill, read_log, refusal_of, relative, save_tiny_pixart, word_tokenizer
from models import io, lora, pixart
from models.diffusion import VP, guide, sample_ode, step_grid, to_x0_eps
from models.pipeline import decode_images
from models.pixart import PIXART_512, PIXART_1024, PixArtTransformer2DModel

TINY = dict(num_attention_heads=3, attention_head_dim=8, cross_attention_dim=24, caption_channels=10, num_layers=3, sample_size=64)
TINY_1024 = dict(TINY, sample_size=128)
# Name: (config, (H, W), tokens of each prompt). What is left out of a config follows from sample_size.
CASES = {
    "512": (TINY, (4, 6), [5, 9]),
    "512_tall": (TINY, (10, 4), [1, 7, 3]),
    "1024": (TINY_1024, (4, 6), [5, 9]),
    "1024_tall": (TINY_1024, (12, 2), [8, 2]),
    "trained_size": (dict(TINY, sample_size=8), (8, 8), [4, 4]),
    "sigma": (dict(TINY, sample_size=128, use_additional_conditions=False, interpolation_scale=2), (6, 4), [3, 6]),
    "512_sized": (dict(TINY, use_additional_conditions=True, interpolation_scale=1.5, num_layers=1), (4, 10), [3]),
    "no_variance": (dict(TINY, out_channels=None, in_channels=5), (4, 4), [2, 5]),
    "big_eps": (dict(TINY, norm_eps=0.05), (4, 4), [7, 4]),
    "patch_1": (dict(TINY, patch_size=1, in_channels=3, out_channels=6, sample_size=7), (3, 5), [2, 4]),
    "wider": (dict(TINY, num_attention_heads=2, attention_head_dim=20, cross_attention_dim=40, num_layers=2), (4, 8), [6, 2]),
}


def inputs(config, size, lengths, seed=1):
    """-> dict of x, t, text, mask; the padding of text is no zeros, so that whoever looks at it is seen. t is between indices."""
    g, B, L = torch.Generator().manual_seed(seed), len(lengths), max(lengths) + 2
    return dict(x=torch.randn(B, config.get("in_channels", 4), *size, generator=g), t=torch.rand(B, generator=g),
                text=torch.randn(B, L, config["caption_channels"], generator=g), mask=torch.arange(L) < torch.tensor(lengths)[:, None])


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("diffusers").PixArtTransformer2DModel


def pair(theirs, config):
    ours = fill(PixArtTransformer2DModel(**config))
    reference = theirs(**config).eval()
    reference.load_state_dict(ours.state_dict())  # strict: same names, same shapes
    return ours, reference


def noise(reference, x, t, text, mask, index=None):
    """eps of a network of diffusers as PixArtAlphaPipeline asks for it: its clock, the size in pixels, the first half of the channels."""
    H, W = (8 * size for size in x.shape[2:])
    sizes = {"resolution": torch.tensor([[H, W]] * len(x)).to(x.dtype), "aspect_ratio": torch.tensor([[H / W]] * len(x)).to(x.dtype)}
    index = 1000 * t - 1 if index is None else index
    out = reference(x, text, index, added_cond_kwargs=sizes, encoder_attention_mask=mask).sample
    return out.chunk(2, dim=1)[0] if out.shape[1] == 2 * x.shape[1] else out


# ---- the same function as diffusers ------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_equal_to_diffusers(theirs, case):
    config, size, lengths = CASES[case]
    ours, reference = pair(theirs, config)
    call = inputs(config, size, lengths)
    leaves = [{**call, **{k: call[k].clone().requires_grad_() for k in ("x", "text")}} for _ in range(2)]

    eps, eps_theirs = ours(**leaves[0]), noise(reference, **leaves[1])
    assert eps.shape == eps_theirs.shape == call["x"].shape and eps_theirs.std() > 0.1  # a dead network would agree with anything
    weight = torch.randn(eps.shape, generator=torch.Generator().manual_seed(2))
    (eps * weight).sum().backward()
    (eps_theirs * weight).sum().backward()
    errors = {"eps": relative(eps, eps_theirs), **{f"deps/d{k}": relative(leaves[0][k].grad, leaves[1][k].grad) for k in ("x", "text")}}
    print(case, " ".join(f"{k} {e:.1e}" for k, e in errors.items()))
    assert max(errors.values()) <= 1e-5
    assert not leaves[0]["text"].grad[~call["mask"]].any() and leaves[0]["text"].grad[call["mask"]].abs().sum(-1).all()
    parameters = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        want = parameters[name].grad
        assert torch.allclose(p.grad, want, rtol=1e-4, atol=1e-4 * max(1, want.abs().max())), name


@pytest.mark.parametrize("config", [TINY, TINY_1024], ids=["512", "1024"])
@pytest.mark.parametrize("index", [0, 1, 249, 499, 502, 749, 998, 999])
def test_clock_at_the_indices(theirs, config, index):
    """Index i is t = (i + 1) / 1000: equal there, and its neighbours are seen to be others."""
    ours, reference = pair(theirs, config)
    call = dict(inputs(config, (4, 4), [3]), t=torch.tensor([(index + 1) / 1000]))
    with torch.no_grad():
        eps = ours(**call)
        assert relative(eps, noise(reference, **call, index=torch.tensor([index]))) <= 1e-5
        for other in (index - 1, index + 1):
            assert relative(eps, noise(reference, **call, index=torch.tensor([other]))) > 1e-4


@pytest.mark.parametrize("t", [0.0, 1e-4, 0.0015, 0.50037, 0.99951])
def test_clock_between_the_indices(theirs, t):
    ours, reference = pair(theirs, TINY_1024)
    call = dict(inputs(TINY_1024, (4, 4), [3]), t=torch.tensor([t]))
    with torch.no_grad():
        eps = ours(**call)
        assert relative(eps, noise(reference, **call, index=torch.tensor([1000 * t - 1]))) <= 1e-5
        assert relative(ours(**{**call, "t": call["t"] + 5e-4}), eps) > 1e-4


def test_eps_is_the_first_half_of_the_channels(theirs):
    """And the second half, a learned variance, is nowhere: its weights change nothing and get no gradient."""
    ours, reference = pair(theirs, TINY)
    call = inputs(TINY, (4, 6), [5, 9])
    with torch.no_grad():
        out = reference(call["x"], call["text"], 1000 * call["t"] - 1, encoder_attention_mask=call["mask"]).sample
    assert out.shape[1] == 8
    eps = ours(**call)
    assert relative(eps, out[:, :4]) <= 1e-5 < 1e-1 < relative(eps, out[:, 4:])
    eps.square().sum().backward()
    grad = ours.proj_out.weight.grad.view(4, 8, -1)  # (pixels of a patch, channels, D)
    assert grad[:, :4].abs().sum(-1).all() and not grad[:, 4:].any()


def test_size_of_the_image_is_read_off_x(theirs):
    """Only where the config says so; height and width are told apart, in pixels. Positions make up for nothing here: they are zero."""
    for config, changes in ((TINY, False), (TINY_1024, True)):
        net = fill(PixArtTransformer2DModel(**config))
        called = {size: net.adaln_single(torch.tensor([0.5]), *size)[0] for size in ((32, 32), (32, 48), (48, 32), (64, 64))}
        different = [relative(called[a], called[b]) > 1e-2 for a in called for b in called if a < b]
        assert all(different) if changes else not any(different)
        seen = []
        net.adaln_single.register_forward_hook(lambda m, args, out: seen.append(args[1:]))
        net(**inputs(config, (4, 6), [3]))
        assert seen == [(32, 48)]


def test_padding_is_never_seen(theirs):
    """Only the tokens that the mask names, wherever they stand. Without any, all count alike, as in diffusers, and nothing is NaN."""
    ours, reference = pair(theirs, TINY)
    call = inputs(TINY, (4, 6), [5, 2, 8])
    text, mask = call["text"], call["mask"]
    with torch.no_grad():
        eps = ours(**call)
        for i in range(3):
            one = {k: a[i:i + 1] for k, a in call.items()}
            alone = {**one, "text": text[i:i + 1][:, mask[i]], "mask": mask[i:i + 1][:, mask[i]]}
            assert relative(ours(**alone), eps[i:i + 1]) < 1e-5
        assert torch.equal(ours(**{**call, "text": text.masked_fill(~mask[..., None], 30.0)}), eps)
        assert torch.equal(ours(**{**call, "mask": mask.long()}), eps) and torch.equal(ours(**{**call, "mask": 2 * mask.int()}), eps)
        assert relative(ours(**{**call, "text": text.flip(1), "mask": mask.flip(1)}), eps) < 1e-5
        assert relative(ours(**{**call, "mask": torch.ones_like(mask)}), eps) > 1e-2
        empty = {**call, "mask": mask & torch.tensor([True, False, True])[:, None]}
        assert relative(ours(**empty), noise(reference, **empty)) < 1e-3  # the bias of -10000 rounds the scores


def test_bfloat16_as_close_to_float32_as_diffusers(theirs):
    config, size, lengths = CASES["1024"]
    ours, reference = pair(theirs, config)
    call = inputs(config, size, lengths)
    low_call = {k: a if k in ("t", "mask") else a.bfloat16() for k, a in call.items()}
    error = lambda v, exact: ((v.float() - exact).norm() / exact.norm()).item()  # noqa: E731
    with torch.no_grad():
        exact = ours(**call)
        modulation = ours.adaln_single(call["t"], 32, 48)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = error(ours(**call), exact)
            assert all(torch.equal(a, b) for a, b in zip(modulation, ours.adaln_single(call["t"], 32, 48)))  # stays float32
        table = reference.pos_embed.pos_embed
        ours.to(torch.bfloat16), reference.to(torch.bfloat16)
        reference.pos_embed.pos_embed = table  # ours has no buffer to be rounded
        low, low_theirs = ours(**low_call), noise(reference, **low_call, index=1000 * call["t"] - 1)
        tokens = [net.pos_embed(low_call["x"]) for net in (ours, reference)]
        assert (tokens[0] == tokens[1]).float().mean() > 0.99  # positions are added in float32 and rounded once
        assert low.dtype == torch.bfloat16 and ours(**call).dtype == torch.float32  # float32 ODE states, bfloat16 weights
    low, low_theirs = error(low, exact), error(low_theirs, exact)
    print(f"errors: autocast {autocast:.1e}, bfloat16 weights {low:.1e}, diffusers' {low_theirs:.1e}")
    assert 0 < autocast < 0.03 and low < 1.5 * low_theirs + 1e-3 and low < 0.05


@pytest.mark.parametrize("config, parameters, sized", [(PIXART_512, 610_856_096, False), (PIXART_1024, 611_349_152, True)], ids=["512", "1024"])
def test_released_sizes_have_diffusers_names_and_shapes(theirs, config, parameters, sized):
    with torch.device("meta"):
        ours, reference = PixArtTransformer2DModel(**config), theirs(**config)
    shapes = {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    assert shapes == {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert ("adaln_single.emb.resolution_embedder.linear_1.weight" in shapes) == sized
    assert shapes["transformer_blocks.27.attn2.to_k.weight"] == (1152, 1152) and shapes["proj_out.weight"] == (32, 1152)
    assert not list(ours.buffers())  # nothing that meta construction or .to(bfloat16) could spoil
    assert set(ours.config) == {k for k in reference.config if not k.startswith("_")}
    assert all(ours.config[k] == config[k] == reference.config[k] for k in config)
    assert ours.latent_shape == (4, config["sample_size"], config["sample_size"])
    assert (ours.pos_embed.base, ours.pos_embed.scale) == (reference.pos_embed.base_size, reference.pos_embed.interpolation_scale)
    assert ours.norm_out.eps == reference.norm_out.eps  # positions keep tokens too large for outputs to show it


def test_defaults_of_the_config_are_diffusers(theirs):
    with torch.device("meta"):
        ours, reference = PixArtTransformer2DModel(caption_channels=8), theirs(caption_channels=8)
    assert ours.config == {k: v for k, v in reference.config.items() if not k.startswith("_")}


def test_weights_and_config_of_diffusers_load_here(theirs, tmp_path):
    """A folder that diffusers wrote, and with the class's old name and the further keys that the released configs have."""
    reference = fill(theirs(**TINY))
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    old = {"double_self_attention": False, "num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False}
    for more in ({}, {"_class_name": "Transformer2DModel", **old}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
        net, _ = io.load_network(str(tmp_path))
        call = inputs(TINY, (4, 4), [3, 6])
        with torch.no_grad():
            assert relative(net(**call), noise(reference, **call)) <= 1e-5
    assert net.config == json.loads(json.dumps(net.config)) and not set(old) & set(net.config)
    PixArtTransformer2DModel(**net.config).load_state_dict(reference.state_dict())


# ---- schedule and sampling ---------------------------------------------------------------------------------


def test_schedule_is_read_from_the_released_scheduler_or_else_pixarts(tmp_path):
    """A network that predicts the noise must not meet a flow schedule: without a scheduler/ folder it brings its own."""
    diffusers = pytest.importorskip("diffusers")
    save_tiny_pixart(tmp_path, 512)
    abar = diffusers.DPMSolverMultistepScheduler.from_config(PIXART_SCHEDULER).alphas_cumprod.double()
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    for folder in (tmp_path, tmp_path / "transformer", None):
        if folder is None:
            (tmp_path / "transformer").rename(tmp_path / "alone")
            (tmp_path / "scheduler" / "scheduler_config.json").unlink()
            folder = tmp_path / "alone"
        teacher = io.load_teacher(str(folder), ())
        assert isinstance(teacher.schedule, VP) and (teacher.prediction, teacher.shift) == ("eps", 1.0)
        assert io.describe_schedule(teacher.schedule) == {"type": "vp", "betas": "linear", "n": 1000, "zero_snr": False, "beta_start": 1e-4,
                                                          "beta_end": 0.02}
        torch.testing.assert_close(teacher.schedule.alpha(t) ** 2, abar, rtol=1e-4, atol=0)


@pytest.mark.parametrize("config", [TINY, TINY_1024], ids=["512", "1024"])
@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_sampling_is_that_of_the_pipeline(theirs, config, scale):
    """Euler on the ODE from t = 1 to 0 is PixArtAlphaPipeline with DDIM at the times 999, 749, 499, 249."""
    diffusers = pytest.importorskip("diffusers")
    ours, reference = pair(theirs, config)
    call, null = inputs(config, (4, 6), [5, 9]), inputs(config, (4, 6), [9, 1], seed=5)
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, timestep_spacing="trailing")
    pipe = diffusers.PixArtAlphaPipeline(None, None, None, reference, scheduler)
    pipe.set_progress_bar_config(disable=True)
    want = pipe(negative_prompt=None, prompt_embeds=call["text"], prompt_attention_mask=call["mask"], negative_prompt_embeds=null["text"],
                negative_prompt_attention_mask=null["mask"], latents=call["x"], height=32, width=48, num_inference_steps=4, guidance_scale=scale,
                use_resolution_binning=False, output_type="latent").images
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    schedule = PixArtTransformer2DModel.default_schedule

    def predict(x, t):
        cond, uncond = (ours(x, t, text=c["text"], mask=c["mask"]) for c in (call, null))
        return to_x0_eps(guide(cond, uncond, scale), ours.prediction, x, schedule.alpha(t), schedule.sigma(t))
    x = sample_ode(predict, schedule, call["x"], step_grid(4, ours.default_shift), "euler")
    print(f"difference {relative(x, want):.1e}")
    assert relative(x, want) < 1e-4 and relative(call["x"], want) > 0.1


# ---- what the training scripts rely on ---------------------------------------------------------------------


def test_features_are_the_middle_block_and_change_nothing():
    net = fill(PixArtTransformer2DModel(**TINY))  # three blocks: the middle one is index 1
    call, seen = inputs(TINY, (6, 10), [5, 4]), []
    net.transformer_blocks[1].register_forward_hook(lambda block, args, out: seen.append(out))
    with torch.no_grad():
        eps, features = net(**call, return_features=True)
        assert torch.equal(eps, net(**call))
    assert features.shape == (2, 15, 24) and torch.equal(features, seen[0])


def test_gradient_checkpointing_gives_the_same_gradients(monkeypatch):
    calls, original = [], pixart.checkpoint
    monkeypatch.setattr(pixart, "checkpoint", lambda *a, **k: calls.append(k) or original(*a, **k))
    net, call, gradients = fill(PixArtTransformer2DModel(**TINY_1024)), inputs(TINY_1024, (4, 6), [5, 4]), []
    for net.gradient_checkpointing in (False, True):
        net.zero_grad()
        leaf = call["x"].clone().requires_grad_()
        net(**{**call, "x": leaf}).square().sum().backward()
        gradients.append([leaf.grad] + [p.grad.clone() for p in net.parameters()])
    assert calls == [{"use_reentrant": False}] * 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    with torch.no_grad():
        net(**call)
    assert len(calls) == 3  # sampling does not checkpoint


def test_class_facts():
    net = PixArtTransformer2DModel
    assert net.prediction == "eps" and net.default_shift == 1.0 and net.latent_shape == (4, 64, 64)
    assert net.cond_names == ("text", "mask") and net(**TINY).text_dim == 10 and net(**TINY_1024).latent_shape == (4, 128, 128)


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(2, 4, 1, 4, 4)), r"pass a latent \(B, 4, H, W\)"), (dict(x=torch.zeros(2, 8, 4, 4)), r"pass a latent \(B, 4, H, W\)"),
    (dict(x=torch.zeros(2, 4, 5, 4)), "do not divide into patches of 2 x 2"), (dict(x=torch.zeros(2, 4, 4, 7)), "do not divide into patches"),
    (dict(t=torch.tensor(0.5)), r"pass floats in \[0, 1\] of shape \(2,\)"), (dict(t=torch.tensor([500, 999])), r"torch.int64 \(2,\); pass floats"),
    (dict(text=torch.zeros(2, 7, 11)), r"pass \(2, L, 10\)"), (dict(text=torch.zeros(1, 7, 10)), r"pass \(2, L, 10\)"),
    (dict(text=torch.zeros(2, 10)), r"pass \(2, L, 10\)"),
    (dict(mask=torch.ones(2, 6, dtype=torch.bool)), r"mask is torch.bool \(2, 6\); pass bool or integers of shape \(2, 7\)"),
    (dict(mask=torch.ones(2, 7)), r"mask is torch.float32 \(2, 7\); pass bool or integers"), (dict(adapter="a"), "no adapter is called 'a'")])
def test_wrong_inputs_are_named(change, message):
    net = PixArtTransformer2DModel(**TINY)
    with pytest.raises(ValueError, match=message) as error:
        net(**{**inputs(TINY, (4, 4), [5, 4]), **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(norm_type="ada_norm_zero"), "norm_type = 'ada_norm_zero' is not implemented; PixArt has 'ada_norm_single'"),
    (dict(dropout=0.1), "dropout = 0.1"), (dict(attention_bias=False), "attention_bias = False"),
    (dict(activation_fn="geglu"), "activation_fn = 'geglu'"),
    (dict(num_embeds_ada_norm=None), "num_embeds_ada_norm = None"), (dict(upcast_attention=True), "upcast_attention = True"),
    (dict(norm_elementwise_affine=True), "norm_elementwise_affine = True"), (dict(attention_type="gated"), "attention_type = 'gated'"),
    (dict(double_self_attention=True), "double_self_attention = True"), (dict(only_cross_attention=True), "only_cross_attention = True"),
    (dict(num_vector_embeds=8), "num_vector_embeds = 8"), (dict(use_linear_projection=True), "use_linear_projection = True"),
    (dict(caption_channels=None), "caption_channels = None with cross_attention_dim = 24"), (dict(cross_attention_dim=10), "attention_head_dim = 24"),
    (dict(out_channels=6), "out_channels = 6 is not implemented; PixArt has in_channels = 4 or, with a learned variance, twice that"),
    (dict(attention_head_dim=6, cross_attention_dim=18), "18 must be a multiple of 4"),
    (dict(num_attention_heads=2, cross_attention_dim=16, sample_size=128), "16 must be a multiple of 4, and of 3 with use_additional_conditions")])
def test_wrong_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        PixArtTransformer2DModel(**dict(TINY, **change))
    assert "\n" not in str(error.value)


# ---- adapters ----------------------------------------------------------------------------------------------


def adapted(theirs):
    """-> our network with a trained adapter "a", a network of diffusers with the same base, the arguments of a call."""
    ours, reference = pair(theirs, TINY)
    torch.manual_seed(1)
    lora.add(ours, "a", rank=3, alpha=1.5)
    with torch.no_grad():
        for p in lora.parameters(ours, "a"):
            p += 0.3 * torch.randn(p.shape)
    return ours, reference, inputs(TINY, (4, 6), [5, 4])


def test_peft_loads_our_adapter_into_diffusers(theirs, tmp_path):
    """The same function as ours, and every tensor of the file arrives. diffusers has no method of its own for it."""
    peft = pytest.importorskip("peft")
    net, reference, call = adapted(theirs)
    assert not hasattr(reference, "load_lora_adapter") and not hasattr(pytest.importorskip("diffusers").PixArtAlphaPipeline, "load_lora_weights")
    lora.save(net, "a", str(tmp_path / "adapter_model.safetensors"))
    peft.LoraConfig(r=3, lora_alpha=3, target_modules=list(net.lora_targets)).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 2 * 3 * 10 and stored["base_model.model.transformer_blocks.2.ff.net.0.proj.lora_A.weight"].shape == (3, 24)
    loaded = peft.PeftModel.from_pretrained(reference, tmp_path)
    with torch.no_grad():
        eps, bare = net(**call, adapter="a"), net(**call)
        assert relative(eps, noise(loaded, **call)) <= 1e-5 and relative(bare, eps) > 1e-2
    arrived = [p for k, p in loaded.named_parameters() if ".lora_" in k]
    assert len(arrived) == len(stored) and all(p.any() for p in arrived)


def test_we_load_what_peft_saves(theirs, tmp_path):
    peft = pytest.importorskip("peft")
    net, reference, call = adapted(theirs)
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0", "net.2"], init_lora_weights=False)
    model = peft.get_peft_model(reference, config)
    model.save_pretrained(tmp_path)
    lora.load(net, "theirs", str(tmp_path / "adapter_model.safetensors"))
    with torch.no_grad():
        eps = noise(model, **call)
        assert relative(net(**call, adapter="theirs"), eps) <= 1e-5 and relative(net(**call), eps) > 1e-2


# ---- a run on it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant, class_name", [(512, "PixArtTransformer2DModel"), (1024, "Transformer2DModel")])
def test_student_of_a_run_loads_in_diffusers(theirs, tmp_path, variant, class_name):
    """A pipeline root as teacher, also under the class's old name: the student is a component of diffusers, the schedule PixArt's."""
    (tmp_path / "teacher").mkdir()
    flags = save_tiny_pixart(tmp_path / "teacher", variant, class_name)
    dmd.main([*flags, "--train_batch_size", "3", "--max_train_steps", "2", "--guidance_scale", "2", "--output_dir", str(tmp_path / "run")])
    folder = tmp_path / "run" / "student"
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "teacher" / "transformer" / "config.json").read_text())
    sampler = json.loads((folder / "sampler.json").read_text())
    assert sampler["times"] == [1.0, 0.5] and sampler["prediction"] == "eps"
    assert sampler["schedule"] == io.describe_schedule(PixArtTransformer2DModel.default_schedule)
    ours, reference = io.load_network(str(folder))[0], theirs.from_pretrained(folder).eval()
    call = inputs(TINY_PIXART, (4, 6), [5, 4])
    with torch.no_grad():
        eps = ours(**call)
        assert relative(eps, noise(reference, **call)) <= 1e-5 and eps.std() > 0.01
    start = load_file(tmp_path / "teacher" / "transformer" / io.WEIGHTS)
    assert all(not torch.equal(v, start[k]) for k, v in ours.state_dict().items())  # every parameter was trained
    assert len(read_log(tmp_path / "run")) == 2
    assert load_file(tmp_path / "run" / "samples.safetensors")["x0"].shape == (2, 4, 4, 6)


@pytest.mark.parametrize("how, says", [
    ("wrong width", "are 12 wide (unconditional 12), the teacher takes 16"), ("no mask", "lacks 'cond.mask'"),
    ("float mask", "mask is torch.float32"), ("mask of another length", "pass bool or integers of shape (1, 9)"),
    ("no prompts", "needs --prompts"), ("odd shape", "do not divide into patches"),
    ("another network", "does not describe a Transformer2DModel: norm_type = 'ada_norm_zero' is not implemented")])
def test_wrong_input_is_refused_before_training(tmp_path, capsys, how, says):
    flags = save_tiny_pixart(tmp_path, 512, "Transformer2DModel")
    path, config = tmp_path / "prompts.safetensors", tmp_path / "transformer" / "config.json"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    if how == "wrong width":
        tensors = {k: v[..., :12].contiguous() if k.endswith("text") else v for k, v in tensors.items()}
    elif how == "no mask":
        del tensors["cond.mask"]
    elif how == "float mask":
        tensors = {k: v.float() for k, v in tensors.items()}
    elif how == "mask of another length":
        tensors = {k: v[:, :8].contiguous() if k.endswith("mask") else v for k, v in tensors.items()}
    elif how == "no prompts":
        del flags[2:4]
    elif how == "odd shape":
        flags += ["--sample_shape", "4", "4", "5"]
    elif how == "another network":
        config.write_text(json.dumps({**json.loads(config.read_text()), "norm_type": "ada_norm_zero"}))
    save_file(tensors, path)
    assert says in refusal_of(capsys, dmd.main, *flags, "--max_train_steps", "2", "--output_dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---- the ends of a real pipeline ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A PixArtAlphaPipeline of tiny random networks and a word-level tokenizer, saved -> (pipeline, folder)."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    tokenizer = word_tokenizer(["<pad>", "</s>", "<unk>"], end="</s>", eos_token="</s>")
    torch.manual_seed(0)
    encoder = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(tokenizer), d_model=10, d_kv=4, d_ff=24, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
        norm_num_groups=4, scaling_factor=0.18215)
    pipe = diffusers.PixArtAlphaPipeline(tokenizer, encoder.eval(), fill(vae), fill(diffusers.PixArtTransformer2DModel(**TINY)),
                                         diffusers.DPMSolverMultistepScheduler.from_config(PIXART_SCHEDULER))
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("pixart") / "pipeline"
    pipe.save_pretrained(folder)
    return pipe, folder


def test_encode_prompts_as_pixart_pipeline(pipeline):
    pipe, folder = pipeline
    prompts = ["a cat runs", "  A Dog a cat RUNS fast ", "dog"]
    for negative, length in (("", 120), ("Fast dog", 120), ("", 3)):  # the last cuts
        with torch.no_grad():
            text, mask, null, null_mask = pipe.encode_prompt(prompts, negative_prompt=negative, max_sequence_length=length)
        ours = pixart.encode_prompts(folder, prompts, negative, max_length=length)
        assert ours["cond.text"].shape == (3, length, 10) and ours["uncond.text"].shape == (1, length, 10)
        assert relative(ours["cond.text"], text) < 1e-5 and relative(ours["uncond.text"], null[:1]) < 1e-5
        assert {v.dtype for k, v in ours.items() if "mask" in k} == {torch.bool}
        assert torch.equal(ours["cond.mask"], mask.bool()) and torch.equal(ours["uncond.mask"], null_mask[:1].bool())
        assert ours["cond.mask"].sum(1).tolist() == [min(length, n) for n in (4, 7, 2)]
    with torch.no_grad():
        text, _, null, _ = pipe.encode_prompt(prompts)  # both with the pipeline's own defaults
    ours = pixart.encode_prompts(folder, prompts)
    assert relative(ours["cond.text"], text) < 1e-5 and relative(ours["uncond.text"], null[:1]) < 1e-5


def test_decode_as_pixart_pipeline(pipeline):
    """The scaling factor is that of the config: 0.18215 here, 0.13025 in PixArt-Sigma."""
    pipe, folder = pipeline
    call = inputs(TINY, (4, 6), [3, 5])
    settings = dict(negative_prompt=None, prompt_embeds=call["text"], prompt_attention_mask=call["mask"], latents=call["x"], height=16, width=24,
                    num_inference_steps=2, guidance_scale=1.0, use_resolution_binning=False)
    x0, images = (pipe(**settings, output_type=kind).images for kind in ("latent", "pt"))
    ours = decode_images(folder, x0)
    assert ours.shape == (2, 3, 8, 12) and ours.dtype == torch.uint8 and ours.float().std() > 1
    assert (ours.float() - 255 * images).abs().max() <= 0.51
    with torch.no_grad():
        plain = pipe.image_processor.postprocess(pipe.vae.decode(x0).sample, output_type="pt")
    assert (ours.float() - 255 * plain).abs().max() > 2  # the scale is seen


def test_command_line(pipeline, tmp_path, capsys):
    """What encode writes is what the scripts' --prompts and the network take; decode writes PNGs."""
    text, output = tmp_path / "prompts.txt", tmp_path / "new" / "prompts.safetensors"
    text.write_text("A cat\n\n a dog runs\n", encoding="utf-8")
    encode = ["encode", "--teacher", str(pipeline[1]), "--prompts_txt", str(text), "--output", str(output)]
    pixart.main(encode)
    net = fill(PixArtTransformer2DModel(**TINY))
    prompts = io.Prompts(str(output), net.cond_names, {"text": net.text_dim})
    cond, uncond = prompts.rows(torch.tensor([1, 0]), "cpu"), prompts.unconditional(2, "cpu")
    assert cond["text"].shape == (2, 120, 10) and cond["mask"].sum(1).tolist() == [4, 3] and uncond["mask"].sum(1).tolist() == [1, 1]
    x, t = torch.randn(2, 4, 4, 4), torch.ones(2)
    assert relative(net(x, t, **uncond), net(x, t, **cond)) > 1e-3

    latents, images = tmp_path / "samples.safetensors", tmp_path / "images"
    save_file({"x0": torch.randn(2, 4, 2, 3)}, latents)
    decode = ["decode", "--teacher", str(pipeline[1]), "--latents", str(latents), "--output", str(images)]
    pixart.main(decode)
    assert sorted(p.name for p in images.iterdir()) == ["000.png", "001.png"]
    with pytest.importorskip("PIL.Image").open(images / "001.png") as image:
        assert image.size == (6, 4) and image.mode == "RGB"  # (W', H')

    save_file({"x0": torch.zeros(1, 3, 2, 2)}, latents)
    assert "this VAE needs (B, 4, H, W)" in refusal_of(capsys, pixart.main, *decode)
    assert "pass a diffusers pipeline folder" in refusal_of(capsys, pixart.main, *encode, "--teacher", str(tmp_path))
