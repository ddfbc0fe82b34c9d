"""models/networks/lumina2.py, and runs on it."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import fill, read_log, refusal_of, relative
from released import (
    LUMINA2,
    assert_equal_to_diffusers,
    assert_released_size,
    assert_student,
    sampled,
    save_root,
)
from safetensors.torch import load_file

import decoupled_dmd
import dmd
from models.diffusion import Diffusion, Flow
from models.networks import load_network, lora, lumina2
from models.networks.layers import modulation
from models.networks.lumina2 import Lumina2Transformer2DModel
from models.plumbing.teachers import load_teacher

TINY = LUMINA2.tiny
LAYERS = 7 * (3 + 2 + 2)  # that adapters change


def teacher_at(root):
    return save_root(LUMINA2, root, "Lumina2Pipeline", {"shift": 6.0})


def pipeline_of(net, scheduler=None):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.Lumina2Pipeline(net, scheduler, None, None, None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, x, cond, uncond=None, **how):
    """What the pipeline makes of the noise x (B, C, H, W) -> (B, C, H, W)."""
    names = {"text": "prompt_embeds", "mask": "prompt_attention_mask"}
    given = {names[k]: v for k, v in cond.items()}
    given |= {f"negative_{names[k]}": v for k, v in (uncond or {}).items()}
    H, W = x.shape[2:]
    how |= dict(latents=x, height=8 * H, width=8 * W, output_type="latent")
    return pipe(**given, **how).images


def conditions(lengths, seed=1):
    call = LUMINA2.inputs(lengths=lengths, seed=seed)
    return {name: call[name] for name in ("text", "mask")}


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, size, lengths",
    [
        ({}, (4, 6), [5, 9]),
        (dict(num_layers=2, num_refiner_layers=1), (10, 14), [7, 1, 3]),
        (dict(num_kv_heads=4, norm_eps=0.05), (2, 12), [4, 4]),  # no mask
        (dict(num_attention_heads=6, num_kv_heads=2, axes_dim_rope=[2, 4, 2]), (4, 2), [30, 2]),
        (dict(ffn_dim_multiplier=0.7, multiple_of=24), (6, 4), [3, 6]),
        (dict(patch_size=1, in_channels=3, num_kv_heads=1), (3, 5), [2, 8]),
    ],
)
def test_equal_to_diffusers(changes, size, lengths):
    assert_equal_to_diffusers(LUMINA2, changes, size, lengths)


def test_equal_to_diffusers_with_a_wider_model_than_its_time():
    wide = dict(hidden_size=1056, axes_dim_rope=[88, 88, 88], num_layers=1, num_refiner_layers=1)
    assert_equal_to_diffusers(LUMINA2, wide, (2, 4), [3, 5])


@pytest.mark.parametrize("t", [0.0, 1e-4, 0.5, 0.999, 1.0])
def test_times(t):
    ours, reference = LUMINA2.pair()
    call = dict(LUMINA2.inputs(lengths=[3]), t=torch.tensor([t]))
    with torch.no_grad():
        out = ours(**call)
        assert relative(out, LUMINA2.reference(reference, **call)) <= 1e-5
        assert relative(ours(**{**call, "t": 1 - call["t"]}), out) > 1e-3 or t == 0.5


def test_released_size():
    assert_released_size(LUMINA2, lumina2.LUMINA_2, 2_609_769_152)


def test_padding_is_never_seen():
    """Each row is computed as if it were alone, and where its tokens lie does not matter."""
    net, call = fill(Lumina2Transformer2DModel(**TINY)), LUMINA2.inputs(lengths=[5, 2, 8])
    text, mask = call["text"], call["mask"]
    with torch.no_grad():
        out = net(**call)
        for i in range(3):
            alone = {k: a[i : i + 1] for k, a in call.items()}
            alone |= {"text": text[i : i + 1][:, mask[i]], "mask": mask[i : i + 1][:, mask[i]]}
            assert relative(net(**alone), out[i : i + 1]) < 1e-5
        other = text.masked_fill(~mask[..., None], 1e6)
        assert torch.equal(net(**{**call, "text": other}), out)
        assert torch.equal(net(**{**call, "mask": 2 * mask.int()}), out)
        rows = zip(text, mask, strict=True)
        left = torch.stack([torch.cat([row[~k], row[k]]) for row, k in rows])
        assert torch.equal(net(**{**call, "text": left, "mask": mask.flip(1)}), out)
        longer = {"text": F.pad(text, (0, 0, 0, 60)), "mask": F.pad(mask, (0, 60))}
        assert torch.equal(net(**{**call, **longer}), out)


def test_bfloat16_as_close_to_float32_as_diffusers():
    ours, reference = LUMINA2.pair()
    call = LUMINA2.inputs(size=(6, 10))
    with torch.no_grad():
        exact = ours(**call)
        for p in [*ours.parameters(), *reference.parameters()]:
            p.data = p.data.bfloat16()
        low = {k: a if k in ("t", "mask") else a.bfloat16() for k, a in call.items()}
        errors = [
            ((out.float() - exact).norm() / exact.norm()).item()
            for out in (ours(**low), LUMINA2.reference(reference, **low))
        ]
        assert ours(**call).dtype == torch.float32  # float32 ODE states work
    assert errors[0] < 1.5 * errors[1] + 1e-3 and errors[0] < 0.05


def test_what_scales_tokens_is_float32_under_autocast():
    net, call = fill(LUMINA2.net(**TINY)), LUMINA2.inputs()
    t = call["t"]
    with torch.no_grad():
        exact, before = (
            net(**call),
            modulation(net.layers[0].norm1.linear, net.time_caption_embed.time(t), 4),
        )
        with torch.autocast("cpu", torch.bfloat16):
            low, after = (
                net(**call),
                modulation(net.layers[0].norm1.linear, net.time_caption_embed.time(t), 4),
            )
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert 0 < (low - exact).norm() / exact.norm() < 0.03


def test_a_folder_of_diffusers_loads_here(tmp_path):
    reference, call = fill(LUMINA2.theirs(**TINY)), LUMINA2.inputs()
    reference.save_pretrained(tmp_path)
    net, config = load_network(str(tmp_path))
    with torch.no_grad():
        assert relative(net(**call), LUMINA2.reference(reference, **call)) <= 1e-5
    assert TINY.items() <= net.config.items() and net.latent_shape == (4, 8, 8)
    assert json.loads(json.dumps(net.config)) == net.config


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 3, 4, 4)), r"pass a latent \(B, 4, H, W\)"),
        (dict(x=torch.zeros(2, 4, 1, 4, 4)), r"pass a latent \(B, 4, H, W\)"),
        (dict(x=torch.zeros(2, 4, 5, 4)), "do not divide into patches of 2 x 2"),
        (dict(x=torch.zeros(2, 4, 34, 4)), r"need \[6, 17, 2\] positions, axes_lens has"),
        (
            dict(text=torch.zeros(2, 64, 10), mask=torch.ones(2, 64, dtype=torch.bool)),
            r"64 prompt tokens need \[65, 2, 3\] positions",
        ),
        (dict(mask=torch.tensor([[1], [0]]).expand(2, 7)), "no token in row 1"),
        (dict(t=torch.tensor([500, 999])), r"torch.int64 \(2,\); pass floats"),
        (dict(text=torch.zeros(2, 7, 11)), r"pass \(2, L, 10\)"),
        (dict(mask=torch.ones(2, 3, dtype=torch.bool)), r"of shape \(2, 7\)"),
        (dict(adapter="a"), "no adapter is called 'a'"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    LUMINA2.refuses(message, **change)


def test_largest_inputs_are_taken():
    """They are refused exactly from where diffusers runs out of positions."""
    ours, reference = LUMINA2.pair(dict(TINY, axes_lens=[6, 2, 3]))
    call = LUMINA2.inputs(TINY, (4, 6), [5])
    with torch.no_grad():
        assert relative(ours(**call), LUMINA2.reference(reference, **call)) <= 1e-5
        for lens in ([5, 2, 3], [6, 1, 3], [6, 2, 2]):
            ours, reference = LUMINA2.pair(dict(TINY, axes_lens=lens))
            with pytest.raises(ValueError, match="positions"):
                ours(**call)
            with pytest.raises(RuntimeError, match="out of bounds"):
                LUMINA2.reference(reference, **call)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(out_channels=8), "out_channels = 8 is not implemented"),
        (dict(num_kv_heads=3), "num_kv_heads = 3 must divide num_attention_heads = 4"),
        (dict(axes_dim_rope=[4, 4, 6]), "sum to the width of a head"),
        (dict(axes_dim_rope=[3, 5, 4]), "must be even"),
        (dict(num_attention_heads=5, num_kv_heads=5), "48 / 5"),
        (dict(axes_dim_rope=[6, 6]), "three entries"),
        (dict(axes_lens=[64, 64]), "three entries"),
    ],
)
def test_wrong_configs_are_named(change, message):
    LUMINA2.refuses(message, config=change)


def test_the_pipeline_loads_our_adapter(tmp_path):
    """It computes our function, and every tensor of the file arrives."""
    pytest.importorskip("peft")
    (ours, reference), call = LUMINA2.pair(), LUMINA2.inputs()
    torch.manual_seed(1)
    lora.add(ours, "a", rank=3, alpha=1.5)
    with torch.no_grad():
        for p in lora.parameters(ours, "a"):
            p += 0.3 * torch.randn(p.shape)
    lora.save(ours, "a", str(tmp_path / "a.safetensors"))
    pipeline_of(reference).load_lora_weights(str(tmp_path / "a.safetensors"), adapter_name="ours")
    with torch.no_grad():
        out = ours(**call, adapter="a")
        assert relative(out, LUMINA2.reference(reference, **call)) <= 1e-5
        assert relative(ours(**call), out) > 1e-2
    arrived = [p for k, p in reference.named_parameters() if ".lora_" in k]
    assert len(arrived) == len(load_file(tmp_path / "a.safetensors")) == 2 * LAYERS
    assert all(p.any() for p in arrived)


# ---- its sampling, and runs on it ----------------------------------------------------------------

ADAPTERS = "--lora_rank 2 --fake_lora_rank 2".split()


@pytest.mark.parametrize("over, normalised", [(None, False), ("row", True)])
def test_many_steps_are_the_pipelines(tmp_path, over, normalised):
    """Its scheduler and its guidance, with and without its cfg_normalization."""
    diffusers = pytest.importorskip("diffusers")
    teacher_at(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert (teacher.shift, teacher.prediction, teacher.terminal) == (6.0, "flow_v", None)
    reference = LUMINA2.theirs.from_pretrained(tmp_path / "transformer").eval()
    load = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained
    pipe = pipeline_of(reference, load(tmp_path, subfolder="scheduler"))
    cond, uncond, x = conditions([5, 8]), conditions([8, 2], 5), LUMINA2.inputs(seed=7)["x"]
    how = dict(num_inference_steps=4, guidance_scale=2.5)
    want, other = (
        latents_of(pipe, x, cond, uncond, cfg_normalization=n, **how)
        for n in (normalised, not normalised)
    )
    flow = Diffusion(Flow(), "flow_v", over)
    ours = flow.sample(teacher.net, x, teacher.grid(4), cond, uncond, 2.5, "euler")
    assert relative(ours, want) <= 1e-4 and relative(ours, other) > 1e-2


@pytest.mark.parametrize("script", [dmd, decoupled_dmd])
def test_a_student_of_a_run(tmp_path, script):
    """Saved, loaded by diffusers and sampled again."""
    flags, run = teacher_at(tmp_path / "teacher"), tmp_path / "run"
    script.main([*flags, "--output_dir", str(run)])
    assert_student(LUMINA2, run, tmp_path / "teacher")
    assert all(math.isfinite(float(row["loss_fake"])) for row in read_log(run))
    again, own = sampled(script, run, tmp_path / "teacher" / "prompts.safetensors")
    assert own.shape == (2, 4, 4, 6)
    torch.testing.assert_close(again, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", [dmd, decoupled_dmd])
def test_adapters_of_a_run(tmp_path, script):
    """The pipeline loads the file, and --sample finds the teacher again."""
    pytest.importorskip("peft")
    flags, run = teacher_at(tmp_path / "teacher"), tmp_path / "run"
    script.main([*flags, *ADAPTERS, "--output_dir", str(run)])
    reference = LUMINA2.theirs.from_pretrained(tmp_path / "teacher" / "transformer")
    path = run / "student" / "adapter.safetensors"
    pipeline_of(reference).load_lora_weights(str(path), adapter_name="ours")
    assert len(load_file(path)) == 2 * LAYERS
    again, own = sampled(script, run, tmp_path / "teacher" / "prompts.safetensors")
    torch.testing.assert_close(again, own, rtol=1e-4, atol=1e-5)


def test_wrong_shapes_of_a_run_are_one_line(tmp_path, capsys):
    flags = teacher_at(tmp_path)
    shape = ["--sample_shape", "4", "4", "5"]
    assert "do not divide into patches" in refusal_of(capsys, decoupled_dmd.main, *flags, *shape)
