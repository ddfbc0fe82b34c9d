"""models/networks/qwen_image.py, and what its pipeline asks of sampling: rescaled guidance, a shift
that depends on the size, a grid that ends early."""

import json
import math

import pytest
import torch
from helpers import fill, read_log, refusal_of, relative
from released import (
    QWEN_IMAGE,
    assert_equal_to_diffusers,
    assert_released_size,
    assert_student,
    sampled,
    save_root,
)
from safetensors.torch import load_file

import dmd
import phased_dmd
import tdm
from models.diffusion import Diffusion, Flow, guide, rescale, step_grid
from models.files import UserError
from models.networks import load_network, lora, qwen_image
from models.networks.layers import modulation
from models.networks.qwen_image import QwenImageTransformer2DModel
from models.plumbing.schedulers import dynamic_shift, read_scheduler
from models.plumbing.teachers import load_teacher
from tests.schedulers import SCHEDULERS

TINY = QWEN_IMAGE.tiny
SCHEDULER = SCHEDULERS["Qwen-Image"]
# What the last block does to the prompt's stream is not used any more, and has no gradient or 0.
STILL = ("attn.to_add_out", "txt_mlp", "attn.add_q_proj", "attn.norm_added_q")
STILL = tuple(f"transformer_blocks.2.{name}" for name in STILL)


def teacher_at(root, **scheduler):
    return save_root(QWEN_IMAGE, root, "QwenImagePipeline", {**SCHEDULER, **scheduler})


def pipeline_of(net, scheduler=None):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.QwenImagePipeline(scheduler, None, None, None, net)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, x, cond, uncond=None, **how):
    """What the pipeline makes of the noise x (B, C, H, W) -> (B, C, H, W)."""
    B, C, H, W = x.shape
    h = x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    given = dict(prompt_embeds=cond["text"], prompt_embeds_mask=cond["mask"])
    for name, value in (uncond or {}).items():
        name = {"text": "negative_prompt_embeds", "mask": "negative_prompt_embeds_mask"}[name]
        given[name] = value
    how |= dict(latents=h, height=8 * H, width=8 * W, output_type="latent")
    out = pipe(**given, **how).images.view(B, H // 2, W // 2, C, 2, 2)
    return out.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def conditions(lengths, seed=1):
    call = QWEN_IMAGE.inputs(lengths=lengths, seed=seed)
    return {name: call[name] for name in ("text", "mask")}


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, size, lengths",
    [
        ({}, (4, 6), [5, 9]),
        (dict(num_layers=2), (10, 14), [7, 1, 3]),  # odd numbers of rows and columns
        (dict(axes_dims_rope=[2, 4, 6], num_attention_heads=2), (2, 12), [4, 4]),  # no mask
        (dict(patch_size=1, in_channels=5, out_channels=5), (3, 5), [2, 30]),
    ],
)
def test_equal_to_diffusers(changes, size, lengths):
    assert_equal_to_diffusers(QWEN_IMAGE, changes, size, lengths)


@pytest.mark.parametrize("t", [0.0, 1e-4, 0.5, 0.999, 1.0])
def test_times(t):
    ours, reference = QWEN_IMAGE.pair()
    call = dict(QWEN_IMAGE.inputs(lengths=[3]), t=torch.tensor([t]))
    with torch.no_grad():
        want = QWEN_IMAGE.reference(reference, **call)
        assert relative(ours(**call), want) <= 1e-5


def test_released_size():
    assert_released_size(QWEN_IMAGE, qwen_image.QWEN_IMAGE, 20_430_401_088)


def test_padding_is_never_seen():
    """Each row is computed as if it were alone and without padding."""
    net, call = fill(QwenImageTransformer2DModel(**TINY)), QWEN_IMAGE.inputs(lengths=[5, 2, 8])
    text, mask = call["text"], call["mask"]
    with torch.no_grad():
        out = net(**call)
        for i in range(3):
            alone = {k: a[i : i + 1] for k, a in call.items()}
            alone |= {"text": text[i : i + 1][:, mask[i]], "mask": mask[i : i + 1][:, mask[i]]}
            assert relative(net(**alone), out[i : i + 1]) < 1e-5
        other = text.masked_fill(~mask[..., None], 30.0)
        assert torch.equal(net(**{**call, "text": other}), out)
        assert torch.equal(net(**{**call, "mask": 2 * mask.int()}), out)


def test_bfloat16_as_close_to_float32_as_diffusers():
    ours, reference = QWEN_IMAGE.pair()
    call = QWEN_IMAGE.inputs(size=(6, 10))
    with torch.no_grad():
        exact = ours(**call)
        for p in [*ours.parameters(), *reference.parameters()]:
            p.data = p.data.bfloat16()
        low = {k: a if k in ("t", "mask") else a.bfloat16() for k, a in call.items()}
        errors = [
            ((out.float() - exact).norm() / exact.norm()).item()
            for out in (ours(**low), QWEN_IMAGE.reference(reference, **low))
        ]
        assert ours(**call).dtype == torch.float32  # float32 ODE states work
    assert errors[0] < errors[1] + 1e-3 and errors[0] < 0.05


def test_what_scales_tokens_is_float32_under_autocast():
    net, call = fill(QWEN_IMAGE.net(**TINY)), QWEN_IMAGE.inputs()
    t = call["t"]
    with torch.no_grad():
        exact, before = (
            net(**call),
            modulation(net.transformer_blocks[0].img_mod, net.time_text_embed(t), 6),
        )
        with torch.autocast("cpu", torch.bfloat16):
            low, after = (
                net(**call),
                modulation(net.transformer_blocks[0].img_mod, net.time_text_embed(t), 6),
            )
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert 0 < (low - exact).norm() / exact.norm() < 0.03


def test_a_folder_of_diffusers_loads_here(tmp_path):
    """Also with the key that only configs of older versions have."""
    reference, call = fill(QWEN_IMAGE.theirs(**TINY)), QWEN_IMAGE.inputs()
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for more in ({}, {"pooled_projection_dim": 768}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
        net, _ = load_network(str(tmp_path))
        with torch.no_grad():
            assert relative(net(**call), QWEN_IMAGE.reference(reference, **call)) <= 1e-5
        assert TINY.items() <= net.config.items() and not set(more) & set(net.config)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 16, 4, 4)), r"pass a latent \(B, 4, H, W\)"),
        (dict(x=torch.zeros(2, 6, 16)), r"pass a latent \(B, 4, H, W\)"),
        (dict(x=torch.zeros(2, 4, 5, 4)), "do not divide into patches of 2 x 2"),
        (dict(t=torch.tensor([500, 999])), r"torch.int64 \(2,\); pass floats"),
        (dict(text=torch.zeros(2, 5, 11)), r"pass \(2, L, 10\)"),
        (dict(mask=torch.ones(2, 3, dtype=torch.bool)), r"of shape \(2, 7\)"),
        (dict(adapter="a"), "no adapter is called 'a'"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    QWEN_IMAGE.refuses(message, **change)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(guidance_embeds=True), "guidance_embeds = True is not implemented"),
        (dict(zero_cond_t=True), "zero_cond_t = True is not implemented"),
        (dict(use_additional_t_cond=True), "use_additional_t_cond = True"),
        (dict(use_layer3d_rope=True), "use_layer3d_rope = True"),
        (dict(out_channels=None), "in_channels = 16 with out_channels = None"),
        (dict(axes_dims_rope=[4, 4, 6]), "sum to attention_head_dim = 12"),
        (dict(axes_dims_rope=[6, 6]), "three entries"),
        (dict(axes_dims_rope=[3, 5, 4]), "must be even"),
    ],
)
def test_wrong_configs_are_named(change, message):
    QWEN_IMAGE.refuses(message, config=change)


def test_the_pipeline_loads_our_adapter(tmp_path):
    """It computes our function, and every tensor of the file arrives."""
    pytest.importorskip("peft")
    (ours, reference), call = QWEN_IMAGE.pair(), QWEN_IMAGE.inputs()
    torch.manual_seed(1)
    lora.add(ours, "a", rank=3, alpha=1.5)
    with torch.no_grad():
        for p in lora.parameters(ours, "a"):
            p += 0.3 * torch.randn(p.shape)
    lora.save(ours, "a", str(tmp_path / "a.safetensors"))
    pipeline_of(reference).load_lora_weights(str(tmp_path / "a.safetensors"), adapter_name="ours")
    with torch.no_grad():
        out = ours(**call, adapter="a")
        assert relative(out, QWEN_IMAGE.reference(reference, **call)) <= 1e-5
        assert relative(ours(**call), out) > 1e-2
    arrived = [p for k, p in reference.named_parameters() if ".lora_" in k]
    assert len(arrived) == len(load_file(tmp_path / "a.safetensors")) == 2 * 3 * 12
    assert all(p.any() for p in arrived)


# ---- its sampling --------------------------------------------------------------------------------


def test_rescaled_guidance():
    """By patch the norms are those of a packed token, by row those of the last axis."""
    g = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(2, 3, 4, 6, generator=g) for _ in range(2))
    guided = guide(cond, uncond, 4.0)

    def packed(x):
        return x.view(2, 3, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, 2, 3, 12)

    def formula(guided, cond):
        return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    by_patch, by_row = rescale(guided, cond, "patch"), rescale(guided, cond, "row")
    torch.testing.assert_close(packed(by_patch), formula(packed(guided), packed(cond)))
    torch.testing.assert_close(by_row, formula(guided, cond))
    assert relative(by_row, by_patch) > 0.1 and relative(guided, by_patch) > 0.1


def test_the_velocity_is_rescaled_and_not_x0():
    """x_t - t v with the rescaled v; guidance 1 is one call."""
    g = torch.Generator().manual_seed(0)
    x, *v = (torch.randn(2, 3, 4, 6, generator=g) for _ in range(3))
    calls = []

    def net(x_t, t, which):
        calls.append(which)
        return v[which]

    flow, how = Diffusion(Flow(), "flow_v", "patch"), (dict(which=0), dict(which=1))
    want = x - 0.5 * rescale(guide(*v, 4.0), v[0], "patch")
    torch.testing.assert_close(flow.guided_x0(net, x, 0.5, *how, 4.0), want)
    assert calls == [0, 1]
    torch.testing.assert_close(flow.guided_x0(net, x, 0.5, *how, 1.0), x - 0.5 * v[0])
    assert calls == [0, 1, 0]
    plain = Diffusion(Flow(), "flow_v").guided_x0(net, x, 0.5, *how, 4.0)
    torch.testing.assert_close(plain, x - 0.5 * guide(*v, 4.0))


@pytest.mark.parametrize("terminal", [None, 0.02, 0.1])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("shape", [(16, 128, 128), (16, 166, 166), (16, 104, 58)])
def test_grids_are_the_schedulers(shape, kind, terminal):
    """The shift that the pipeline computes from the size, a grid that ends at shift_terminal."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    config = {**SCHEDULER, "time_shift_type": kind, "shift_terminal": terminal}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    tokens = shape[1] // 2 * (shape[2] // 2)
    mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    shift = dynamic_shift(config, tokens)
    assert shift == pytest.approx(math.exp(mu) if kind == "exponential" else mu)
    for steps in (2, 4, 50):
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
        want = scheduler.sigmas.tolist()
        assert step_grid(steps, shift, terminal) == pytest.approx(want, abs=1e-6)
    assert step_grid(1, shift, terminal) == [1.0, 0.0]


def test_the_teacher_has_the_shift_of_its_size(tmp_path):
    teacher_at(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert teacher.terminal == 0.02 and teacher.prediction == "flow_v"
    assert teacher.shift == pytest.approx(math.exp(0.5 + 0.4 * (4096 - 256) / 7936))  # 2.0009
    teacher = load_teacher(str(tmp_path), shape=(4, 4, 6))
    assert teacher.shift == pytest.approx(math.exp(0.5 + 0.4 * (6 - 256) / 7936))
    assert teacher.grid(4)[-2] == pytest.approx(0.02) and teacher.grid(4)[-1] == 0


def test_what_is_not_supported_is_refused_by_name(tmp_path):
    teacher_at(tmp_path, use_karras_sigmas=True)
    with pytest.raises(UserError, match="use_karras_sigmas is not supported: set it to false"):
        load_teacher(str(tmp_path))
    with pytest.raises(UserError, match="use_dynamic_shifting"):  # of which image?
        teacher_at(tmp_path / "other")
        read_scheduler(str(tmp_path / "other" / "scheduler"))


def test_many_steps_are_the_pipelines(tmp_path):
    """Its scheduler, its guidance and its rescaling, from the files of a folder."""
    diffusers = pytest.importorskip("diffusers")
    teacher_at(tmp_path)
    teacher = load_teacher(str(tmp_path), shape=(4, 4, 6))
    reference = QWEN_IMAGE.theirs.from_pretrained(tmp_path / "transformer").eval()
    load = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained
    pipe = pipeline_of(reference, load(tmp_path, subfolder="scheduler"))
    cond, uncond, x = conditions([5, 8]), conditions([3, 2], 5), QWEN_IMAGE.inputs(seed=7)["x"]
    want = latents_of(pipe, x, cond, uncond, num_inference_steps=4, true_cfg_scale=2.5)
    for over, low, high in (("patch", 0, 1e-4), ("row", 1e-2, 9), (None, 1e-2, 9)):
        flow = Diffusion(Flow(), "flow_v", over)
        ours = flow.sample(teacher.net, x, teacher.grid(4), cond, uncond, 2.5, "euler")
        assert low <= relative(ours, want) <= high, over


# ---- runs on it ----------------------------------------------------------------------------------

RESCALED = ["--guidance_rescale", "patch", "--timestep_shift", "3"]
ADAPTERS = "--lora_rank 2 --fake_lora_rank 2".split()


@pytest.mark.parametrize("script", [dmd, tdm])
def test_a_student_of_a_run(tmp_path, capsys, script):
    """Saved, loaded by diffusers and sampled again; the run says that guidance is rescaled."""
    flags, run = teacher_at(tmp_path / "teacher"), tmp_path / "run"
    script.main([*flags, *RESCALED, "--output_dir", str(run)])
    assert "shift 3, guidance 2 rescaled by patch" in capsys.readouterr().out
    assert_student(QWEN_IMAGE, run, tmp_path / "teacher", STILL)
    assert all(math.isfinite(float(row["loss_fake"])) for row in read_log(run))
    again, own = sampled(script, run, tmp_path / "teacher" / "prompts.safetensors")
    assert own.shape == (2, 4, 4, 6)
    torch.testing.assert_close(again, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", [dmd, phased_dmd])
def test_adapters_of_a_run(tmp_path, script):
    """The pipeline loads each file, and --sample finds the teacher again."""
    pytest.importorskip("peft")
    flags, run = teacher_at(tmp_path / "teacher"), tmp_path / "run"
    script.main([*flags, *RESCALED, *ADAPTERS, "--output_dir", str(run)])
    names = ["adapter"] if script is dmd else ["expert1", "expert2"]
    reference = QWEN_IMAGE.theirs.from_pretrained(tmp_path / "teacher" / "transformer")
    for name in names:
        path = run / "student" / f"{name}.safetensors"
        pipeline_of(reference).load_lora_weights(str(path), adapter_name=name)
        assert len(load_file(path)) == 2 * 3 * 12
    again, own = sampled(script, run, tmp_path / "teacher" / "prompts.safetensors")
    torch.testing.assert_close(again, own, rtol=1e-4, atol=1e-5)


def test_phased_experts_in_full(tmp_path):
    flags, run = teacher_at(tmp_path / "teacher"), tmp_path / "run"
    phased_dmd.main([*flags, *RESCALED, "--output_dir", str(run)])
    assert len(read_log(run)) == 2
    again, own = sampled(phased_dmd, run, tmp_path / "teacher" / "prompts.safetensors")
    torch.testing.assert_close(again, own, rtol=1e-4, atol=1e-5)


def test_rescaling_reaches_the_loss(tmp_path):
    flags, moved = teacher_at(tmp_path / "teacher"), []
    for how in ("none", "patch"):
        run = tmp_path / how
        dmd.main([*flags, "--guidance_rescale", how, "--output_dir", str(run)])
        moved.append(load_network(str(run / "student"))[0].proj_out.weight)
    assert not torch.equal(*moved)


def test_samples_without_patches_are_not_rescaled(tmp_path, capsys):
    """What the message advises works."""
    flags = "--teacher ring --max_train_steps 1 --teacher_steps 0".split()
    flags += ["--output_dir", str(tmp_path / "run")]
    error = refusal_of(capsys, dmd.main, *flags, "--guidance_rescale", "patch")
    assert "is for images (C, H, W) of even sides, samples are (2,)" in error
    dmd.main([*flags, "--guidance_rescale", "none"])


def test_wrong_shapes_of_a_run_are_one_line(tmp_path, capsys):
    flags = teacher_at(tmp_path)
    shape = ["--sample_shape", "4", "4", "5"]
    assert "do not divide into patches" in refusal_of(capsys, dmd.main, *flags, *shape)
