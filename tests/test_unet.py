"""models/networks/unet.py against diffusers, and runs of the scripts that its papers train it with.

The contract is in test_networks.py.
"""

import inspect
import json

import pytest
import torch
from helpers import fill, quiet, refusal_of, relative
from safetensors.torch import load_file, save_file
from test_networks import TINY_SD, TINY_SDXL

import dmd
import tdm
from models.diffusion import VP, step_grid
from models.networks import load_network, lora
from models.networks.sequence import use_sequence
from models.networks.unet import (
    SD_1_5,
    SD_2_1,
    SDXL,
    BasicTransformerBlock,
    ResnetBlock2D,
    UNet2DConditionModel,
)
from models.plumbing.sharding import blocks_of
from models.plumbing.teachers import load_teacher, network_folder
from models.shards import gathered_parts
from tests.schedulers import SCHEDULERS

diffusers = pytest.importorskip("diffusers")

TINY_V = dict(TINY_SD, attention_head_dim=[1, 2, 2, 4], use_linear_projection=True)
TINY_V |= dict(upcast_attention=True)
UNEVEN = dict(TINY_SDXL, layers_per_block=[1, 2, 3], up_block_types=TINY_SD["up_block_types"][:3])
TINY = {"SD 1.5": TINY_SD, "v": TINY_V, "SDXL": TINY_SDXL, "uneven": UNEVEN}
configs = pytest.mark.parametrize("config", [pytest.param(c, id=k) for k, c in TINY.items()])
SCHEDULER = dict(  # as released, where no test says otherwise
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    steps_offset=1,
    clip_sample=False,
)


def inputs(config, size=(8, 8), B=3, seed=1):
    """Arguments of a call, t between the indices."""
    g = torch.Generator().manual_seed(seed)
    call = dict(
        x=torch.randn(B, 4, *size, generator=g),
        t=torch.rand(B, generator=g),
        text=torch.randn(B, 5, config["cross_attention_dim"], generator=g),
    )
    if config["addition_embed_type"]:
        call["pooled"] = torch.randn(B, 5, generator=g)
        call["size"] = torch.randint(0, 1025, (B, 6), generator=g)
    return call


def theirs(net, x, t, text, pooled=None, size=None, index=None):
    """The same call of diffusers' network."""
    more = {} if pooled is None else dict(text_embeds=pooled, time_ids=size)
    index = 1000 * t - 1 if index is None else index
    return net(x, index, text, added_cond_kwargs=more).sample


def pair(config):
    """-> ours and diffusers', with the same weights."""
    ours = fill(UNet2DConditionModel(**config))
    reference = diffusers.UNet2DConditionModel(**config).eval()
    reference.load_state_dict(ours.state_dict())  # strict: same names, same shapes
    return ours, reference


# ---- parity --------------------------------------------------------------------------------------


@configs
@pytest.mark.parametrize("size", [(16, 16), (15, 18), (9, 7)])
def test_equal_to_diffusers(config, size):
    """Outputs up to 1e-5, gradients of every weight and of x up to 1e-4."""
    ours, reference = pair(config)
    call, gradients = inputs(config, size), []
    for net, forward in ((ours, lambda net, **c: net(**c)), (reference, theirs)):
        leaf = call["x"].clone().requires_grad_()
        out = forward(net, **{**call, "x": leaf})
        (out * call["x"].flip(0)).sum().backward()
        gradients.append({k: p.grad for k, p in net.named_parameters()} | {"x": leaf.grad})
        gradients[-1]["output"] = out.detach()
    own, want = gradients
    assert relative(own.pop("output"), want.pop("output")) <= 1e-5
    assert own.keys() == want.keys() and all(g.any() for g in want.values())
    assert max(relative(own[k], want[k]) for k in own) <= 1e-4


@pytest.mark.parametrize(
    "config, parameters",
    [(SD_1_5, 859_520_964), (SD_2_1, 865_910_724), (SDXL, 2_567_463_684)],
    ids=["SD 1.5", "SD 2.1", "SDXL"],
)
def test_released_sizes_have_diffusers_names_and_shapes(config, parameters):
    with torch.device("meta"):
        ours, reference = UNet2DConditionModel(**config), diffusers.UNet2DConditionModel(**config)
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (ours, reference)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert ours.latent_shape == (4, config["sample_size"], config["sample_size"])
    assert ours.cond_names == (("text", "pooled", "size") if config is SDXL else ("text",))
    assert ours.text_dim == config["cross_attention_dim"]
    assert ours.pooled_dim == (1280 if config is SDXL else 0)


def test_defaults_of_the_config_are_diffusers():
    own, other = (
        {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items()}
        for cls in (UNet2DConditionModel, diffusers.UNet2DConditionModel)
    )
    assert own.keys() == other.keys()
    assert {k for k in own if own[k] != other[k]} == {"sample_size"}  # theirs needs none


def test_epsilons_are_diffusers():
    """Outputs of random networks, whose activations are large, would hardly show them."""
    nets = pair(dict(TINY_SDXL, norm_eps=1e-4))
    own, want = ({k: m.eps for k, m in net.named_modules() if hasattr(m, "eps")} for net in nets)
    assert own == want and set(own.values()) == {1e-4, 1e-5, 1e-6}


def test_diffusers_keeps_no_part_of_it_in_float32():
    assert not diffusers.UNet2DConditionModel._keep_in_fp32_modules
    assert not getattr(UNet2DConditionModel, "keep_float32", ())


@configs
def test_bfloat16_as_close_to_float32_as_diffusers(config):
    ours, reference = pair(config)
    call = inputs(config)
    with torch.no_grad():
        want = ours(**call)
        reference.to(torch.bfloat16)
        given = {k: v.bfloat16() if k in ("x", "text", "pooled") else v for k, v in call.items()}
        other = theirs(reference, **given).float()
        out = ours.to(torch.bfloat16)(**call)
    assert out.dtype == torch.float32
    assert (out - want).norm() <= 1.1 * (other - want).norm()


@pytest.mark.parametrize("index", [0, 249, 399, 998, 999])
def test_clock_at_the_indices(index):
    """Index i is t = (i + 1) / 1000, with n = 500 betas (i + 1) / 500; its neighbours differ."""
    ours, reference = pair(TINY_SDXL)
    for n in (1000, 500):
        i = index * n // 1000
        ours.clock_steps = n
        call = dict(inputs(TINY_SDXL, B=1), t=torch.tensor([(i + 1) / n]))
        with torch.no_grad():
            eps = ours(**call)
            assert relative(eps, theirs(reference, **call, index=i)) <= 1e-5
            for other in (i - 1, i + 1):
                assert relative(eps, theirs(reference, **call, index=other)) > 1e-4


def test_features_are_the_lowest_level_s_pixels():
    ours, reference = pair(TINY_SDXL)
    call, kept = inputs(TINY_SDXL, (12, 8)), []
    reference.mid_block.register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        theirs(reference, **call)
        features = ours(**call, return_features=True)
    assert features.shape == (3, 3 * 2, 16) == (*features.shape[:2], kept[0].shape[1])
    assert relative(features.mT.unflatten(2, (3, 2)), kept[0]) <= 1e-5


# ---- sampling ------------------------------------------------------------------------------------


def pipeline(net, scheduler):
    """Stable Diffusion's pipeline, or SDXL's, without text encoders and VAE."""
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if net.config.addition_embed_type:
        none |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        pipe = diffusers.StableDiffusionXLPipeline(unet=net, scheduler=scheduler, **none)
    else:
        none |= dict.fromkeys(("safety_checker", "feature_extractor"))
        pipe = diffusers.StableDiffusionPipeline(
            unet=net, scheduler=scheduler, requires_safety_checker=False, **none
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled_by(pipe, call, null, steps, scale, **more):
    """What a pipeline makes of these latents and prompts, as latents."""
    H, W = (8 * side for side in call["x"].shape[2:])
    given = dict(prompt_embeds=call["text"], negative_prompt_embeds=null["text"])
    if "pooled" in call:
        given |= dict(pooled_prompt_embeds=call["pooled"])
        given |= dict(negative_pooled_prompt_embeds=null["pooled"])
    size = dict(height=H, width=W, output_type="latent", num_inference_steps=steps)
    return pipe(latents=call["x"], guidance_scale=scale, **given, **size, **more).images


def sized(call):
    """With the sizes that SDXL's pipeline gives: those of the image, nothing cut off."""
    H, W = (8 * side for side in call["x"].shape[2:])
    return {**call, "size": torch.tensor([[H, W, 0, 0, H, W]] * len(call["x"]))}


RELEASES = {"SD 1.5": "Stable Diffusion 1.5", "v": "Stable Diffusion 2.1", "SDXL": "SDXL base 1.0"}


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("scale, steps", [(1.0, 4), (7.5, 6)])
def test_many_steps_are_the_pipeline_s(name, scale, steps, tmp_path):
    """Euler of ours on the teacher's own grid, and the pipeline with the released scheduler.

    Stable Diffusion 1.5 has PNDM, a multistep rule; DDIM has its steps with the same file.
    """
    released = SCHEDULERS[RELEASES[name]]
    scheduler = getattr(diffusers, released["_class_name"]).from_config(released)
    _, reference = pair(TINY[name])
    pipeline(reference, scheduler).save_pretrained(tmp_path)
    if name == "SD 1.5":
        scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    call, null = (inputs(TINY[name], (8, 16), B=2, seed=seed) for seed in (1, 5))
    if name == "SDXL":
        call, null = sized(call), sized(null)
    want = sampled_by(pipeline(reference, scheduler), call, null, steps, scale)
    teacher = load_teacher(str(tmp_path))
    grid = teacher.grid(steps)
    assert grid[0] == {4: 0.752, 6: 0.832}[steps] and len(grid) == steps + 1
    assert grid[-1] == (0.0 if name == "SDXL" else 0.001)
    conds = [{k: c[k] for k in teacher.net.cond_names} for c in (call, null)]
    x = teacher.diffusion.sample(teacher.net, call["x"], grid, *conds, scale, "euler")
    print(f"difference {relative(x, want):.1e}")
    assert relative(x, want) < 1e-4 and relative(call["x"], want) > 0.1
    even = step_grid(steps), *conds, scale, "euler"
    assert relative(teacher.diffusion.sample(teacher.net, call["x"], *even), want) > 1e-2


# ---- adapters ------------------------------------------------------------------------------------


def adapted(config):
    """-> ours with a trained adapter "a", diffusers' without, arguments of a call."""
    ours, reference = pair(config)
    torch.manual_seed(2)
    lora.add(ours, "a", rank=3, alpha=12)
    with torch.no_grad():
        for p in lora.parameters(ours, "a"):
            p += 0.3 * torch.randn(p.shape)
    return ours, reference, inputs(config)


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL"])
def test_diffusers_loads_our_adapter(name, tmp_path):
    pytest.importorskip("peft")
    ours, reference, call = adapted(TINY[name])
    path = str(tmp_path / "adapter.safetensors")
    lora.save(ours, "a", path)
    scheduler = diffusers.DDIMScheduler(**SCHEDULER)
    pipeline(reference, scheduler).load_lora_weights(path, adapter_name="ours")
    with torch.no_grad():
        out = ours(**call, adapter="a")
        assert relative(out, theirs(reference, **call)) <= 1e-5 < 1e-2 < relative(ours(**call), out)
    arrived = [p for k, p in reference.named_parameters() if ".lora_" in k]
    assert len(arrived) == len(load_file(path)) and all(p.any() for p in arrived)


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL"])
def test_we_load_what_diffusers_saves(name, tmp_path):
    """With alpha in its header, and of SDXL also the layers before and behind the blocks."""
    peft = pytest.importorskip("peft")
    ours, reference, call = adapted(TINY[name])
    torch.manual_seed(4)
    layers = ["to_q", "to_out.0", "ff.net.2"] + (["proj_in"] if name == "SDXL" else [])
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False)
    reference.add_adapter(config)
    pipe = pipeline(reference, diffusers.DDIMScheduler(**SCHEDULER))
    pipe.save_lora_weights(
        str(tmp_path),
        unet_lora_layers=peft.get_peft_model_state_dict(reference),
        unet_lora_adapter_metadata=config.to_dict() | {"target_modules": layers},
        weight_name="adapter_model.safetensors",
    )
    lora.load(ours, "theirs", str(tmp_path / "adapter_model.safetensors"))
    with torch.no_grad():
        want = theirs(reference, **call)
        assert relative(ours(**call, adapter="theirs"), want) <= 1e-5
        assert relative(ours(**call), want) > 1e-2


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL"])
def test_a_kohya_file_loads(name, tmp_path):
    """lora_unet_ with _ for dots; SDXL's has the names of the original U-Net."""
    ours, _, call = adapted(TINY[name])
    tensors = {}
    for key, a in lora.adapters(ours, "a").items():
        there = "lora_unet_" + ours.lora_aliases[key] if name == "SDXL" else f"lora_unet_{key}"
        there = there.replace(".", "_")
        tensors[f"{there}.lora_down.weight"] = a.A.detach().clone()
        tensors[f"{there}.lora_up.weight"] = a.B.detach().clone()
        tensors[f"{there}.alpha"] = torch.tensor(12.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    lora.load(ours, "b", str(tmp_path / "kohya.safetensors"))
    with torch.no_grad():
        assert relative(ours(**call, adapter="b"), ours(**call, adapter="a")) <= 1e-5


def test_a_kohya_file_of_convolutions_is_merged(tmp_path):
    """sd-scripts also adapts the 1x1 convolutions around SD 1.5's transformers: (r, C, 1, 1)."""
    net, key = UNet2DConditionModel(**TINY_SD), "down_blocks.0.attentions.0.proj_in"
    want = {name: p.clone() for name, p in net.named_parameters()}
    o, i = net.get_submodule(key).weight.shape[:2]
    A, B = torch.randn(2, i, 1, 1), torch.randn(o, 2, 1, 1)
    name = f"lora_unet_{key.replace('.', '_')}"
    tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
    save_file({**tensors, f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "k.safetensors")
    with pytest.raises(ValueError, match="proj_in.*merge the file into the weights"):
        lora.load(net, "a", str(tmp_path / "k.safetensors"))
    lora.merge_file(net, str(tmp_path / "k.safetensors"))
    want[f"{key}.weight"] += 0.5 * torch.einsum("orxy,rixy->oixy", B, A)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, want[name], msg=name)


def test_names_of_the_original_u_net():
    """As in kohya's files for SDXL 1.0: its two transformers a level, ten blocks in the lowest."""
    with torch.device("meta"):
        names = UNet2DConditionModel(**SDXL).lora_aliases
    rest = "transformer_blocks.1.attn1.to_q"
    for here, there in (
        ("down_blocks.1.attentions.0", "input_blocks.4.1"),
        ("down_blocks.2.attentions.1", "input_blocks.8.1"),
        ("mid_block.attentions.0", "middle_block.1"),
        ("up_blocks.0.attentions.0", "output_blocks.0.1"),
        ("up_blocks.1.attentions.2", "output_blocks.5.1"),
    ):
        assert names[f"{here}.{rest}"] == f"{there}.{rest}"
    assert len(names) == 2 * 11 + 70 * 10 and len(set(names.values())) == len(names)


# ---- over ranks ----------------------------------------------------------------------------------


def test_what_is_gathered_at_a_time_is_small():
    """ResNet blocks and transformer blocks, of the middle too; what is left belongs to the root."""
    with torch.device("meta"):
        net = UNet2DConditionModel(**SDXL)
    parts = blocks_of(net)
    assert parts == gathered_parts(net) and len(parts) == 17 + 70
    assert any(part in parts for part in net.mid_block.attentions[0].transformer_blocks)
    assert all(isinstance(part, (ResnetBlock2D, BasicTransformerBlock)) for part in parts)
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert max(sizes) < 0.02 * 2_567_463_684 and sum(sizes) > 0.97 * 2_567_463_684


# ---- runs ----------------------------------------------------------------------------------------


def save_root(root, name):
    """A pipeline root that diffusers wrote, prompts, data -> flags of a run."""
    _, reference = pair(TINY[name])
    kind = "v_prediction" if name == "v" else "epsilon"
    scheduler = diffusers.DDIMScheduler(**SCHEDULER, prediction_type=kind)
    pipeline(reference, scheduler).save_pretrained(root)
    g, tensors = torch.Generator().manual_seed(1), {}
    for where, rows in (("cond", 4), ("uncond", 1)):
        tensors[f"{where}.text"] = torch.randn(rows, 5, 10, generator=g)
        if name == "SDXL":
            tensors[f"{where}.pooled"] = torch.randn(rows, 5, generator=g)
            tensors[f"{where}.size"] = torch.tensor([[64, 64, 0, 0, 64, 64]] * rows)
    save_file(tensors, root / "prompts.safetensors")
    real = {k: v for k, v in tensors.items() if k.startswith("cond.")}
    save_file({"x0": torch.randn(4, 4, 8, 8, generator=g), **real}, root / "data.safetensors")
    prompts = ["--prompts", str(root / "prompts.safetensors")]
    short = "--max_train_steps 2 --train_batch_size 2 --teacher_steps 0 --preview_samples 2"
    return ["--teacher", str(root), *prompts, *short.split()], prompts


RUNS = {  # of those that test_released_pairs.py does not make, and of some that it does with --long
    "dmd GAN": (dmd, "SDXL", "--student_steps 2 --gan_weight 5e-3 --fake_update_ratio 1"),
    "dmd v": (dmd, "v", "--student_steps 2 --fake_update_ratio 1"),
    "tdm adapters": (tdm, "SD 1.5", "--student_steps 2 --lora_rank 2 --fake_lora_rank 2"),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, tmp_path):
    """Two updates from a folder of diffusers; saved, loaded there too, and sampled again."""
    script, model, flags = RUNS[name]
    root, out, again = (tmp_path / part for part in ("root", "run", "again"))
    root.mkdir()
    given, prompts = save_root(root, model)
    more = ["--data", str(root / "data.safetensors")] if "gan_weight" in flags else []
    script.main([*given, *flags.split(), *more, "--output_dir", str(out)])
    x = load_file(out / "samples.safetensors")["x0"]
    assert x.shape[1:] == (4, 8, 8) and x.isfinite().all()
    script.main(["--sample", str(out), "--output_dir", str(again), *prompts])
    torch.testing.assert_close(
        load_file(again / "samples.safetensors")["x0"][: len(x)], x, rtol=1e-3, atol=1e-3
    )
    if "lora_rank" in flags:
        pytest.importorskip("peft")
        reference = diffusers.UNet2DConditionModel.from_pretrained(root / "unet")
        net = load_network(str(root / "unet"))[0]
        lora.load(net, "a", str(out / "student" / "adapter.safetensors"))
        pipe = pipeline(reference, diffusers.DDIMScheduler(**SCHEDULER))
        pipe.load_lora_weights(str(out / "student" / "adapter.safetensors"))
        reference = pipe.unet
    else:
        net = load_network(str(out / "student"))[0]
        reference = diffusers.UNet2DConditionModel.from_pretrained(out / "student").eval()
        before = load_network(str(root / "unet"))[0].state_dict()
        assert any(not torch.equal(v, before[k]) for k, v in net.state_dict().items())
    call = inputs(TINY[model])
    with torch.no_grad():
        adapter = {"adapter": "a"} if "lora_rank" in flags else {}
        assert relative(net(**call, **adapter), theirs(reference, **call)) <= 1e-5


def test_one_step_at_index_399_in_the_pipeline(tmp_path, monkeypatch):
    """DMD2's one-step SDXL: noise is shown as if it were at t = .4."""
    quiet(monkeypatch)
    given, _ = save_root(tmp_path, "SDXL")
    out = tmp_path / "run"
    once = "--student_times 0.4 --max_train_steps 1 --fake_update_ratio 1"
    dmd.main([*given, *once.split(), "--output_dir", str(out)])
    assert json.loads((out / "student" / "sampler.json").read_text())["times"] == [0.4]
    scheduler = diffusers.LCMScheduler.from_pretrained(out / "student", subfolder="scheduler")
    net = load_network(str(out / "student"))[0]
    reference = diffusers.UNet2DConditionModel.from_pretrained(out / "student").eval()
    call = sized(inputs(TINY_SDXL))
    want = sampled_by(pipeline(reference, scheduler), call, call, 1, 1.0, timesteps=[399])
    diffusion, cond = load_teacher(str(tmp_path)).diffusion, {k: call[k] for k in net.cond_names}
    x = dmd.sample(net, diffusion, {"z": call["x"]}.get, [0.4], cond)
    assert relative(x, want) <= 1e-4


def test_roots_have_unet_in_place_of_transformer(tmp_path, capsys, monkeypatch):
    quiet(monkeypatch)
    flags, _ = save_root(tmp_path, "v")
    assert network_folder(str(tmp_path)) == str(tmp_path / "unet")
    teacher = load_teacher(str(tmp_path))
    assert teacher.prediction == "vp_v" and isinstance(teacher.schedule, VP)
    assert load_teacher(str(tmp_path / "unet")).prediction == "vp_v"
    line = refusal_of(capsys, tdm.main, *flags, "--sample_shape", "3", "8", "8")
    assert "pass a latent (B, 4, H, W)" in line
    tensors = load_file(tmp_path / "prompts.safetensors")
    wide = {k: torch.cat([v, v], 2) for k, v in tensors.items()}
    save_file(wide, tmp_path / "prompts.safetensors")
    line = refusal_of(capsys, tdm.main, *flags, "--output_dir", str(tmp_path / "run"))
    assert "20 wide" in line and "the teacher takes 10" in line


def test_prompts_of_another_width(tmp_path, capsys, monkeypatch):
    quiet(monkeypatch)
    flags, _ = save_root(tmp_path, "SDXL")
    path, out = tmp_path / "prompts.safetensors", ["--output_dir", str(tmp_path / "run")]
    tensors = load_file(path)
    for name, message in (
        ("pooled", "'pooled' embeddings are 10 wide (unconditional 10), the teacher takes 5"),
        ("size", "size is torch.int64 (1, 12); pass numbers of shape (1, 6)"),
    ):
        wide = {k: torch.cat([v, v], 1) if name in k else v for k, v in tensors.items()}
        save_file(wide, path)
        assert message in refusal_of(capsys, dmd.main, *flags, *out)
    save_file({k: v for k, v in tensors.items() if "pooled" not in k}, path)
    assert "lacks 'cond.pooled'" in refusal_of(capsys, dmd.main, *flags, *out)


def test_tokens_are_not_spread_over_ranks():
    with pytest.raises(ValueError, match="a UNet2DConditionModel cannot spread its tokens"):
        use_sequence(UNet2DConditionModel(**TINY_SD), None)


# ---- refusals ------------------------------------------------------------------------------------


REFINER = dict(  # what stabilityai/stable-diffusion-xl-refiner-1.0 has of its own
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2560,
)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(in_channels=9), "in_channels = 9 with out_channels = 4 is not implemented"),
        (dict(class_embed_type="timestep"), "class_embed_type = 'timestep' is not implemented"),
        (dict(num_class_embeds=4), "num_class_embeds = 4"),
        (dict(encoder_hid_dim=8), "encoder_hid_dim = 8"),
        (dict(time_cond_proj_dim=256), "time_cond_proj_dim = 256"),
        (dict(mid_block_type="UNetMidBlock2D"), "mid_block_type = 'UNetMidBlock2D'"),
        (dict(mid_block_type=None), "mid_block_type = None"),
        (dict(act_fn="gelu"), "act_fn = 'gelu'"),
        (dict(num_attention_heads=8), "num_attention_heads = 8"),
        (dict(resnet_time_scale_shift="scale_shift"), "resnet_time_scale_shift = 'scale_shift'"),
        (dict(down_block_types=["SimpleCrossAttnDownBlock2D"] * 4), "only DownBlock2D and Cross"),
        (dict(up_block_types=["AttnUpBlock2D"] * 4), "'AttnUpBlock2D' is not implemented, only Up"),
        (dict(up_block_types=["UpBlock2D"] * 3), "has 3 entries, block_out_channels 4"),
        (dict(cross_attention_dim=[8, 8, 8, 8]), "give one integer for all levels"),
        (dict(attention_head_dim=[2, 2]), r"attention_head_dim = \[2, 2\] .* or 4 of them"),
        (dict(attention_head_dim=5), "8 do not divide into attention_head_dim = 5 heads"),
        (dict(norm_num_groups=5), "norm_num_groups = 5"),
        (dict(norm_num_groups=None), "norm_num_groups = null is not implemented"),
        (dict(sample_size=None), "sample_size = null is not implemented"),
        (dict(transformer_layers_per_block=[1, 1, 1, [1, 2]]), "transformer_layers_per_block"),
        (dict(addition_embed_type="text"), "addition_embed_type = 'text' is not implemented"),
        (dict(addition_embed_type="text_time"), "projection_class_embeddings_input_dim = None"),
        (REFINER, "projection_class_embeddings_input_dim = 2560 is of SDXL's refiner"),
    ],
)
def test_wrong_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        UNet2DConditionModel(**{**TINY_SD, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(3, 9, 8, 8)), r"pass a latent \(B, 4, H, W\)"),
        (dict(pooled=None), r"pooled is missing; pass floats of shape \(3, 5\)"),
        (dict(pooled=torch.zeros(3, 5).long()), "pooled is torch.int64"),
        (dict(size=torch.zeros(3, 5)), r"size is torch.float32 \(3, 5\); pass numbers of"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        UNet2DConditionModel(**TINY_SDXL)(**{**inputs(TINY_SDXL), **change})
    assert "\n" not in str(error.value)


def test_inputs_that_it_does_not_take():
    call = {**inputs(TINY_SD), "pooled": torch.zeros(3, 5)}
    with pytest.raises(ValueError, match="takes no pooled and no size"):
        UNet2DConditionModel(**TINY_SD)(**call)
