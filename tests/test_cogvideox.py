"""models/networks/cogvideox.py and its schedule: equal to diffusers' network, schedulers, pipeline.

test_networks.py has the contract, test_sequence.py its tokens on several ranks.
"""

import json
import math

import pytest
import torch
from helpers import fill, read_log, refusal_of, relative
from released import COGVIDEOX
from safetensors.torch import load_file, save_file

import dmd
import linvideo
from models.diffusion import VP, Diffusion
from models.files import save_json
from models.networks import load_network, lora, to_dtype
from models.networks.cogvideox import COGVIDEOX_2B, CogVideoXTransformer3DModel
from models.plumbing.schedulers import read_scheduler
from models.plumbing.teachers import describe_schedule, load_teacher, read_sampler, read_schedule
from tests.schedulers import COGVIDEOX_SCHEDULER

TINY, SIZE = COGVIDEOX.tiny, (4, 2, 4, 6)

# Name: (changes of the config, size of the latent, number of tokens of each prompt).
CASES = {
    "another size than trained": ({}, (3, 6, 10), [5, 5, 5]),
    "trained size": (dict(sample_frames=9), (3, 4, 6), [5, 5]),
    "more heads": (
        dict(num_attention_heads=5, num_layers=2, max_text_seq_length=3),
        (1, 8, 2),
        [3, 3],
    ),
    "scaled positions": (
        dict(spatial_interpolation_scale=1.3, temporal_interpolation_scale=0.7, norm_eps=0.05),
        (5, 2, 8),
        [5, 5],
    ),
    "norms without weights": (dict(norm_elementwise_affine=False), (2, 4, 4), [5]),
    "patch 1": (
        dict(patch_size=1, in_channels=3, out_channels=3, attention_head_dim=24, time_embed_dim=7),
        (2, 3, 5),
        [5, 5],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_diffusers(case):
    changes, size, lengths = CASES[case]
    config = {**TINY, **changes}
    ours, reference = COGVIDEOX.pair(config)
    calls = [COGVIDEOX.inputs(config, size, lengths) for _ in range(2)]
    leaves = [
        {**c, "x": c["x"].requires_grad_(), "text": c["text"].requires_grad_()} for c in calls
    ]
    out, want = ours(**leaves[0]), COGVIDEOX.reference(reference, **leaves[1])
    assert out.shape == want.shape == calls[0]["x"].shape and want.std() > 0.1
    assert (out - want).abs().max() <= 1e-5
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    for name in ("x", "text"):
        assert relative(leaves[0][name].grad, leaves[1][name].grad) <= 1e-5
    parameters = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, parameters[name].grad, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("index", [0, 249, 499, 999])
def test_clock_at_the_indices(index):
    """Index i is t = (i + 1) / 1000: equal there, and visibly different at its neighbours."""
    ours, reference = COGVIDEOX.pair()
    call = dict(COGVIDEOX.inputs(), t=torch.full((2,), (index + 1) / 1000))
    with torch.no_grad():
        v = ours(**call)
        for other in (index - 1, index, index + 1):
            want = COGVIDEOX.reference(reference, **call, index=torch.tensor([other] * 2))
            assert relative(v, want) <= 1e-5 if other == index else relative(v, want) > 1e-4


def test_bfloat16_as_close_to_float32_as_diffusers():
    """diffusers keeps no part in float32. Under autocast the modulation stays float32."""
    assert not COGVIDEOX.theirs._keep_in_fp32_modules
    ours, reference = COGVIDEOX.pair()
    call = COGVIDEOX.inputs()
    half = {k: v if k == "t" else v.bfloat16() for k, v in call.items()}
    seen = []
    for module in (ours.transformer_blocks[0].norm1, ours.norm_out):
        module.linear.register_forward_hook(lambda m, args, out: seen.append(out.dtype))

    def error(v):
        return ((v.float() - want).norm() / want.norm()).item()

    with torch.no_grad():
        want = ours(**call)
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            assert 0 < error(ours(**call)) < 0.03
        assert seen == [torch.float32] * 2
        to_dtype(ours, torch.bfloat16)
        low, theirs = ours(**half), COGVIDEOX.reference(reference.bfloat16(), **half)
        assert low.dtype == torch.bfloat16 and ours(**call).dtype == torch.float32
    assert error(low) < 1.5 * error(theirs) + 1e-3 and error(low) < 0.05


# ---- names, shapes and configs -------------------------------------------------------------------


def test_the_release_has_diffusers_names_and_shapes():
    with torch.device("meta"):
        ours, reference = COGVIDEOX.net(**COGVIDEOX_2B), COGVIDEOX.theirs(**COGVIDEOX_2B)
        default, theirs = COGVIDEOX.net(), COGVIDEOX.theirs()
    shapes = {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    assert shapes == {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    assert shapes["transformer_blocks.29.norm1.linear.weight"] == (6 * 1920, 512)
    assert sum(p.numel() for p in ours.parameters()) == 1_693_783_872
    assert not list(ours.buffers())
    assert ours.latent_shape == CogVideoXTransformer3DModel.latent_shape == (16, 13, 60, 90)
    for a, b in ((ours, reference), (default, theirs)):
        assert a.config == {k: v for k, v in b.config.items() if not k.startswith("_")}


def test_what_diffusers_saves_loads_here_and_back(tmp_path):
    reference = fill(COGVIDEOX.theirs(**TINY))
    reference.save_pretrained(tmp_path)
    net, call = load_network(str(tmp_path))[0], COGVIDEOX.inputs()
    with torch.no_grad():
        assert relative(net(**call), COGVIDEOX.reference(reference, **call)) <= 1e-5
    assert net.latent_shape == SIZE and net.text_dim == 10


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 4, 6, 6)), r"pass a latent \(B, 4, T, H, W\)"),
        (dict(x=torch.zeros(2, 2, 4, 4, 6)), r"pass a latent \(B, 4, T, H, W\)"),
        (dict(x=torch.zeros(2, 4, 2, 5, 4)), r"H, W = \(5, 4\) do not divide into patches of 2 x"),
        (dict(text=torch.zeros(2, 4, 10)), r"text has 4 tokens, .*; pass \(2, 5, 10\)"),
        (dict(text=torch.zeros(2, 5, 11)), r"pass \(2, L, 10\)"),
        (dict(t=torch.tensor([999, 0])), r"pass floats in \[0, 1\]"),
        (dict(adapter="a"), "no adapter is called 'a'"),
        (
            dict(config=dict(use_rotary_positional_embeddings=True)),
            "use_rotary_positional_embeddings = True is not implemented; use CogVideoX-2B",
        ),
        (dict(config=dict(patch_size_t=2)), "patch_size_t = 2 is not implemented"),
        (dict(config=dict(ofs_embed_dim=512)), "ofs_embed_dim = 512 is not implemented"),
        (dict(config=dict(in_channels=8)), "in_channels = 8 with 4 out means image-to-video"),
        (dict(config=dict(attention_head_dim=12)), "= 24 must be a multiple of 16"),
        (dict(config=dict(activation_fn="geglu")), "activation_fn = 'geglu' is not implemented"),
    ],
)
def test_wrong_inputs_and_configs_are_named(change, message):
    COGVIDEOX.refuses(message, **change)


# ---- the schedule --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("snr_shift", [1.0, 3.0, 0.5, None])
def test_alphas_are_those_of_the_scheduler(tmp_path, name, zero_snr, snr_shift):
    """Also where the file leaves the shift out, which is then 3; and after sampler.json."""
    kind = getattr(pytest.importorskip("diffusers"), name)
    given = {} if snr_shift is None else {"snr_shift_scale": snr_shift}
    theirs = kind(rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction", **given)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    config = json.loads(path.read_text())
    if snr_shift is None:
        del config["snr_shift_scale"]
    path.write_text(json.dumps(config))
    schedule, prediction, shift = read_scheduler(str(tmp_path))
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    assert (schedule.alpha(t) ** 2 - theirs.alphas_cumprod).abs().max() < 1e-9
    assert prediction == "vp_v" and shift is None
    again = read_schedule(json.loads(json.dumps(describe_schedule(schedule))))
    assert torch.equal(again.sqrt_abar, schedule.sqrt_abar)
    assert ("SNR / " in schedule.describe()) == (snr_shift != 1)


def test_only_its_own_schedulers_shift_the_snr(tmp_path):
    """Other classes of diffusers ignore the key; the network alone has the release's schedule."""
    config = {**COGVIDEOX_SCHEDULER, "_class_name": "DDIMScheduler"}
    save_json(config, str(tmp_path / "scheduler_config.json"))
    assert read_scheduler(str(tmp_path))[0].snr_shift == 1
    save_json(COGVIDEOX_SCHEDULER, str(tmp_path / "scheduler_config.json"))
    released, own = read_scheduler(str(tmp_path))[0], CogVideoXTransformer3DModel.default_schedule
    assert torch.equal(released.sqrt_abar, own.sqrt_abar) and own.sqrt_abar[-1] == 0
    with pytest.raises(ValueError, match="snr_shift must be above 0"):
        VP(snr_shift=0.0)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_other_schedulers_get_the_betas_of_a_shifted_snr(zero_snr):
    diffusers = pytest.importorskip("diffusers")
    schedule = VP(zero_snr=zero_snr, snr_shift=3.0)
    theirs = diffusers.DDIMScheduler(**json.loads(json.dumps(schedule.in_diffusers())))
    assert (theirs.alphas_cumprod - schedule.sqrt_abar**2).abs().max() < 1e-6


# ---- sampling and training -----------------------------------------------------------------------


def pipeline(scheduler):
    """CogVideoXPipeline of diffusers around a tiny network, small enough not to multiply the
    rounding of float32."""
    diffusers = pytest.importorskip("diffusers")
    net = fill(COGVIDEOX.theirs(**TINY))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.7 if p.dim() > 1 else 1.0)
    pipe = diffusers.CogVideoXPipeline(None, None, None, net, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_root(root):
    """A pipeline root that diffusers wrote, and a file of prompts.  -> flags of a run"""
    diffusers = pytest.importorskip("diffusers")
    pipe = pipeline(diffusers.CogVideoXDDIMScheduler.from_config(COGVIDEOX_SCHEDULER))
    pipe.transformer.save_pretrained(root / "transformer")
    pipe.scheduler.save_pretrained(root / "scheduler")
    pipe.save_config(root)
    g = torch.Generator().manual_seed(1)
    text = torch.randn(4, 5, 10, generator=g)
    save_file({"cond.text": text[:3], "uncond.text": text[3:]}, root / "prompts.safetensors")
    return ["--teacher", str(root), "--prompts", str(root / "prompts.safetensors")]


def sampled_by(pipe, z, cond, uncond, steps, scale=1.0):
    """Latents of the pipeline, (B, C, T, H, W), from z."""
    return pipe(
        prompt_embeds=cond,
        negative_prompt_embeds=uncond.expand(len(cond), -1, -1),
        latents=z.transpose(1, 2).clone(),
        num_inference_steps=steps,
        guidance_scale=scale,
        num_frames=4 * (z.shape[2] - 1) + 1,
        height=8 * z.shape[3],
        width=8 * z.shape[4],
        output_type="latent",
    ).frames.transpose(1, 2)


def noise_and_prompts(root):
    """-> z (2, *SIZE), cond (2, 5, 10), uncond (1, 5, 10)"""
    stored = load_file(root / "prompts.safetensors")
    z = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(3))
    return z, stored["cond.text"][:2], stored["uncond.text"]


@pytest.mark.parametrize("steps, scale", [(4, 1.0), (4, 6.0), (10, 2.0)])
def test_sampling_is_that_of_the_pipeline(tmp_path, steps, scale):
    """Euler of ours on the teacher's own grid, and CogVideoXPipeline with its scheduler."""
    save_root(tmp_path)
    z, cond, uncond = noise_and_prompts(tmp_path)
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CogVideoXDDIMScheduler.from_pretrained(tmp_path / "scheduler")
    want = sampled_by(pipeline(scheduler), z, cond, uncond, steps, scale)
    teacher = load_teacher(str(tmp_path))
    grid = teacher.grid(steps)
    assert scheduler.timesteps.tolist() == [round(1000 * t) - 1 for t in grid[:-1]]
    assert teacher.prediction == "vp_v" and teacher.schedule.snr_shift == 3.0
    given = {"text": cond}, {"text": uncond.expand(2, -1, -1)}
    ours = teacher.diffusion.sample(teacher.net, z, grid, *given, scale, "euler")
    assert relative(ours, want) <= 1e-4 and relative(z, want) > 0.1
    plain = Diffusion(VP(zero_snr=True), "vp_v")  # without the shift it is another sample
    assert relative(plain.sample(teacher.net, z, grid, *given, scale, "euler"), want) > 1e-2


@pytest.mark.parametrize("rule", ["ode", "sde"])
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "adapter"])
def test_distilling(monkeypatch, tmp_path, rank, rule):
    """Two updates of dmd.py, saved, reloaded, sampled.

    In CogVideoXPipeline, with the scheduler saved beside it, the student samples as it does here.
    """
    diffusers = pytest.importorskip("diffusers")
    root, folder = tmp_path / "root", tmp_path / "run" / "student"
    flags = [*save_root(root), "--max_train_steps", "2", "--teacher_steps", "2"]
    flags += ["--train_batch_size", "2", "--student_steps", "2", "--preview_samples", "2"]
    flags += ["--fake_update_ratio", "1", "--learning_rate", "1e-2", "--renoise", rule]
    flags += ["--lora_rank", str(rank), "--fake_lora_rank", str(rank)] if rank else []
    dmd.main([*flags, "--output_dir", str(tmp_path / "run")])
    log = read_log(tmp_path / "run")
    assert len(log) == 2
    assert all(math.isfinite(float(row[key])) for row in log for key in ("loss_fake", "loss_dm"))
    dmd.main(["--sample", str(folder), *flags[2:4], "--output_dir", str(tmp_path / "again")])
    samples = load_file(tmp_path / "again" / "samples.safetensors")["x0"]
    assert samples.shape[1:] == SIZE and samples.isfinite().all()

    sampler, schedule, prediction, _ = read_sampler(folder)
    assert schedule.snr_shift == 3.0 and schedule.zero_snr and sampler["times"] == [1.0, 0.5]
    kind = {"ode": diffusers.DDIMScheduler, "sde": diffusers.LCMScheduler}[rule]
    pipe = pipeline(kind.from_pretrained(folder / "scheduler"))
    if rank:
        net = load_network(str(root / "transformer"))[0]
        lora.load(net, "a", str(folder / "adapter.safetensors"))
        net = lora.Adapted(net, "a")
        pipe.load_lora_weights(str(folder / "adapter.safetensors"))
    else:
        net = load_network(str(folder))[0]
        pipe.transformer = COGVIDEOX.theirs.from_pretrained(folder).eval()
    z, cond, uncond = noise_and_prompts(root)
    fresh = torch.randn(z.shape, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: fresh.transpose(1, 2)
    )
    want = sampled_by(pipe, z, cond, uncond, 2)
    at = Diffusion(schedule, prediction), {"z": z, "renoise0": fresh}.get, sampler["times"]
    with torch.no_grad():
        ours, untrained = (
            dmd.sample(n, *at, {"text": cond}, rule) for n in (net, load_teacher(str(root)).net)
        )
    assert relative(ours, want) <= 1e-5 and relative(untrained, want) > 1e-3


def test_adapters_pass_both_ways(tmp_path):
    """diffusers loads every tensor of our file, and we what its pipeline class saves."""
    peft = pytest.importorskip("peft")
    ours, reference = COGVIDEOX.pair()
    call, path = COGVIDEOX.inputs(), tmp_path / "ours.safetensors"
    torch.manual_seed(1)
    lora.add(ours, "a", rank=3, alpha=1.5)
    with torch.no_grad():
        for p in lora.parameters(ours, "a"):
            p += 0.3 * torch.randn(p.shape)
    lora.save(ours, "a", str(path))
    stored = load_file(path)
    assert len(stored) == 2 * 3 * 6
    assert stored["transformer.transformer_blocks.2.ff.net.2.lora_B.weight"].shape == (32, 3)
    pipe = pipeline(None)
    pipe.transformer = reference
    pipe.load_lora_weights(str(path), adapter_name="ours")
    arrived = [p for name, p in reference.named_parameters() if ".lora_" in name]
    assert len(arrived) == len(stored) and all(p.any() for p in arrived)
    with torch.no_grad():
        want = ours(**call, adapter="a")
        assert relative(COGVIDEOX.reference(reference, **call), want) <= 1e-5
        assert relative(ours(**call), want) > 1e-2

    second = COGVIDEOX.pair()[1]
    layers = ["to_q", "to_out.0", "net.0.proj"]
    second.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=4, target_modules=layers, init_lora_weights=False)
    )
    type(pipe).save_lora_weights(
        str(tmp_path),
        transformer_lora_layers=peft.get_peft_model_state_dict(second),
        weight_name="theirs.safetensors",
    )
    lora.load(ours, "theirs", str(tmp_path / "theirs.safetensors"))
    with torch.no_grad():
        want = COGVIDEOX.reference(second, **call)
        assert relative(ours(**call, adapter="theirs"), want) <= 1e-5


def test_linvideo_says_why_it_refuses(tmp_path, capsys):
    error = refusal_of(capsys, linvideo.main, *save_root(tmp_path))
    assert "predicts vp_v; the score of Eq. 13 is a flow's" in error and "such as Wan" in error


def test_prompts_of_another_length_are_refused_before_training(tmp_path, capsys):
    flags = save_root(tmp_path / "root")
    path = tmp_path / "root" / "prompts.safetensors"
    save_file({k: v[:, :4].contiguous() for k, v in load_file(path).items()}, path)
    flags += ["--max_train_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert "text has 4 tokens" in refusal_of(capsys, dmd.main, *flags)
    assert not (tmp_path / "run").exists()
