"""models/networks/pixart.py: what is particular to it.

The rest is in test_transformers.py and test_pipeline.py.
"""

import pytest
import torch
from helpers import PIXART_SCHEDULER, fill, quiet, relative, save_tiny_pixart
from released import PIXART

import tdm
from models.diffusion import VP, guide, sample_ode, step_grid, to_x0_eps
from models.files import save_json
from models.networks.pixart import PIXART_512, PIXART_1024, PixArtTransformer2DModel
from models.plumbing import report
from models.plumbing.run import Run
from models.plumbing.teachers import (
    describe_schedule,
    load_teacher,
    start_teacher,
    starting_network,
    trainable,
)

TINY, noise = PIXART.tiny, PIXART.reference
TINY_1024 = dict(TINY, sample_size=128)


@pytest.mark.parametrize("config", [TINY, TINY_1024], ids=["512", "1024"])
@pytest.mark.parametrize("index", [0, 1, 249, 499, 502, 749, 998, 999])
def test_clock_at_the_indices(config, index):
    """Index i is t = (i + 1) / 1000: equal there, and visibly different at its neighbours."""
    ours, reference = PIXART.pair(config)
    call = dict(PIXART.inputs(config, (4, 4), [3]), t=torch.tensor([(index + 1) / 1000]))
    with torch.no_grad():
        eps = ours(**call)
        assert relative(eps, noise(reference, **call, index=torch.tensor([index]))) <= 1e-5
        for other in (index - 1, index + 1):
            assert relative(eps, noise(reference, **call, index=torch.tensor([other]))) > 1e-4


@pytest.mark.parametrize("t", [0.0, 1e-4, 0.0015, 0.50037, 0.99951])
def test_clock_between_the_indices(t):
    ours, reference = PIXART.pair(TINY_1024)
    call = dict(PIXART.inputs(TINY_1024, (4, 4), [3]), t=torch.tensor([t]))
    with torch.no_grad():
        eps = ours(**call)
        assert relative(eps, noise(reference, **call, index=torch.tensor([1000 * t - 1]))) <= 1e-5
        assert relative(ours(**{**call, "t": call["t"] + 5e-4}), eps) > 1e-4


def test_clock_of_another_table_of_betas(tmp_path, monkeypatch):
    """With n = 500 betas index i is t = (i + 1) / 500; a clock of 1000 asks for twice the index.

    So it is for the teacher, what starts from it, and a saved student that is sampled.
    """
    flags = save_tiny_pixart(tmp_path, 512)
    scheduler = {**PIXART_SCHEDULER, "num_train_timesteps": 500}
    save_json(scheduler, str(tmp_path / "scheduler" / "scheduler_config.json"))
    quiet(monkeypatch)
    out = ["--output_dir", str(tmp_path / "run")]
    tdm.main([*flags, *out, "--max_train_steps", "1", "--train_batch_size", "2"])
    args = tdm.parse_args([*flags, "--student_init", str(tmp_path / "run")])
    teacher = start_teacher(args)
    copied = trainable(args, teacher.net, "student", torch.device("cpu"))
    started = starting_network(args, teacher)
    again = ["--sample", str(tmp_path / "run"), "--output_dir", str(tmp_path / "samples")]
    sampled = report.load_student(Run(tdm.parse_args([*again, *flags[2:4]]), "tdm"))[0]
    call = PIXART.inputs(teacher.net.config, (4, 4), [3])
    call["t"] = torch.tensor([0.5])
    for net in (teacher.net, copied, started, sampled):
        reference = PIXART.theirs(**net.config).eval()
        reference.load_state_dict(net.state_dict())
        with torch.no_grad():
            eps = net(**call)
            assert relative(eps, noise(reference, **call, index=torch.tensor([249]))) <= 1e-5
            assert relative(eps, noise(reference, **call, index=torch.tensor([499]))) > 1e-3


def test_diffusers_keeps_no_part_of_it_in_float32():
    """So a bfloat16 teacher is bfloat16 throughout, unlike Wan's."""
    assert not PIXART.theirs._keep_in_fp32_modules
    assert not getattr(PixArtTransformer2DModel, "keep_float32", ())


def test_eps_is_the_first_half_of_the_channels():
    """The second half, a learned variance, is dropped: its weights get no gradient."""
    ours, reference = PIXART.pair(TINY)
    call = PIXART.inputs(TINY, (4, 6), [5, 9])
    with torch.no_grad():
        index, mask = 1000 * call["t"] - 1, call["mask"]
        out = reference(call["x"], call["text"], index, encoder_attention_mask=mask).sample
    assert out.shape[1] == 8
    eps = ours(**call)
    assert relative(eps, out[:, :4]) <= 1e-5 < 1e-1 < relative(eps, out[:, 4:])
    eps.square().sum().backward()
    grad = ours.proj_out.weight.grad.view(4, 8, -1)  # (pixels of a patch, channels, D)
    assert grad[:, :4].abs().sum(-1).all() and not grad[:, 4:].any()


def test_size_of_the_image_is_taken_from_x():
    """Only where the config says so. Height and width are different inputs, in pixels."""
    for config, changes in ((TINY, False), (TINY_1024, True)):
        net = fill(PixArtTransformer2DModel(**config))
        sizes = ((32, 32), (32, 48), (48, 32), (64, 64))
        called = {size: net.adaln_single(torch.tensor([0.5]), *size)[0] for size in sizes}
        different = [relative(called[a], called[b]) > 1e-2 for a in called for b in called if a < b]
        assert all(different) if changes else not any(different)
        seen = []
        net.adaln_single.register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(args[1:])
        )
        net(**PIXART.inputs(config, (4, 6), [3]))
        assert seen == [(32, 48)]


def test_the_mask_marks_tokens_anywhere():
    """If it marks none, all count alike, as in diffusers, and nothing is NaN."""
    ours, reference = PIXART.pair()
    call = PIXART.inputs(lengths=[5, 2, 8])
    text, mask = call["text"], call["mask"]
    with torch.no_grad():
        eps = ours(**call)
        assert relative(ours(**{**call, "text": text.flip(1), "mask": mask.flip(1)}), eps) < 1e-5
        assert relative(ours(**{**call, "mask": torch.ones_like(mask)}), eps) > 1e-2
        empty = {**call, "mask": mask & torch.tensor([True, False, True])[:, None]}
        # The bias of -10000 rounds the scores.
        assert relative(ours(**empty), noise(reference, **empty)) < 1e-3


def test_positions_are_added_in_float32_and_rounded_once():
    ours, reference = PIXART.pair(TINY_1024)
    x, table = PIXART.inputs(TINY_1024)["x"].bfloat16(), reference.pos_embed.pos_embed
    ours.to(torch.bfloat16)
    reference.to(torch.bfloat16)
    reference.pos_embed.pos_embed = table  # ours has no buffer that could be rounded
    with torch.no_grad():
        assert (ours.pos_embed(x) == reference.pos_embed(x)).float().mean() > 0.99


@pytest.mark.parametrize(
    "config", [PIXART_512, PIXART_1024, TINY_1024], ids=["512", "1024", "tiny-1024"]
)
def test_what_follows_from_the_size(config):
    with torch.device("meta"):
        short = dict(config, num_layers=1)
        ours, reference = PixArtTransformer2DModel(**short), PIXART.theirs(**short)
    assert ours.latent_shape == (4, config["sample_size"], config["sample_size"])
    assert ours.pos_embed.base == reference.pos_embed.base_size
    assert ours.pos_embed.scale == reference.pos_embed.interpolation_scale
    # Positions keep tokens so large that outputs would not show this one.
    assert ours.norm_out.eps == reference.norm_out.eps


# ---- schedule and sampling -----------------------------------------------------------------------


def test_schedule_is_read_from_the_released_scheduler_or_else_pixarts(tmp_path):
    """A network that predicts the noise does not get a flow schedule by default: without a
    scheduler/ folder it has its own."""
    diffusers = pytest.importorskip("diffusers")
    save_tiny_pixart(tmp_path, 512)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(PIXART_SCHEDULER)
    abar = scheduler.alphas_cumprod.double()
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    for folder in (tmp_path, tmp_path / "transformer", None):
        if folder is None:
            (tmp_path / "transformer").rename(tmp_path / "alone")
            (tmp_path / "scheduler" / "scheduler_config.json").unlink()
            folder = tmp_path / "alone"
        teacher = load_teacher(str(folder))
        assert isinstance(teacher.schedule, VP)
        assert (teacher.prediction, teacher.shift) == ("eps", 1.0)
        assert describe_schedule(teacher.schedule) == {
            "type": "vp",
            "betas": "linear",
            "n": 1000,
            "zero_snr": False,
            "beta_start": 1e-4,
            "beta_end": 0.02,
        }
        torch.testing.assert_close(teacher.schedule.alpha(t) ** 2, abar, rtol=1e-4, atol=0)


@pytest.mark.parametrize("config", [TINY, TINY_1024], ids=["512", "1024"])
@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_sampling_is_that_of_the_pipeline(config, scale):
    """Euler on the ODE is PixArtAlphaPipeline with DDIM at the times 999, 749, 499 and 249."""
    diffusers = pytest.importorskip("diffusers")
    ours, reference = PIXART.pair(config)
    call = PIXART.inputs(config, (4, 6), [5, 9])
    null = PIXART.inputs(config, (4, 6), [9, 1], seed=5)
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    pipe = diffusers.PixArtAlphaPipeline(None, None, None, reference, scheduler)
    pipe.set_progress_bar_config(disable=True)
    want = pipe(
        negative_prompt=None,
        prompt_embeds=call["text"],
        prompt_attention_mask=call["mask"],
        negative_prompt_embeds=null["text"],
        negative_prompt_attention_mask=null["mask"],
        latents=call["x"],
        height=32,
        width=48,
        num_inference_steps=4,
        guidance_scale=scale,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    schedule = PixArtTransformer2DModel.default_schedule

    def predict(x, t):
        cond, uncond = (ours(x, t, text=c["text"], mask=c["mask"]) for c in (call, null))
        eps, level = guide(cond, uncond, scale), (schedule.alpha(t), schedule.sigma(t))
        return to_x0_eps(eps, ours.prediction, x, *level)

    x = sample_ode(predict, schedule, call["x"], step_grid(4, ours.default_shift), "euler")
    print(f"difference {relative(x, want):.1e}")
    assert relative(x, want) < 1e-4 and relative(call["x"], want) > 0.1


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 4, 1, 4, 4)), r"pass a latent \(B, 4, H, W\)"),
        (dict(x=torch.zeros(2, 8, 4, 4)), r"pass a latent \(B, 4, H, W\)"),
        (dict(x=torch.zeros(2, 4, 5, 4)), "do not divide into patches of 2 x 2"),
        (dict(x=torch.zeros(2, 4, 4, 7)), "do not divide into patches"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    PIXART.refuses(message, **change)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(norm_type="ada_norm_zero"),
            "norm_type = 'ada_norm_zero' is not implemented; PixArt has 'ada_norm_single'",
        ),
        (dict(dropout=0.1), "dropout = 0.1"),
        (dict(attention_bias=False), "attention_bias = False"),
        (dict(activation_fn="geglu"), "activation_fn = 'geglu'"),
        (dict(num_embeds_ada_norm=None), "num_embeds_ada_norm = None"),
        (dict(upcast_attention=True), "upcast_attention = True"),
        (dict(norm_elementwise_affine=True), "norm_elementwise_affine = True"),
        (dict(attention_type="gated"), "attention_type = 'gated'"),
        (dict(double_self_attention=True), "double_self_attention = True"),
        (dict(only_cross_attention=True), "only_cross_attention = True"),
        (dict(num_vector_embeds=8), "num_vector_embeds = 8"),
        (dict(use_linear_projection=True), "use_linear_projection = True"),
        (dict(caption_channels=None), "caption_channels = None with cross_attention_dim = 24"),
        (dict(cross_attention_dim=10), "attention_head_dim = 24"),
        (
            dict(out_channels=6),
            "out_channels = 6 is not implemented; "
            "PixArt has in_channels = 4 or, with a learned variance, twice that",
        ),
        (dict(attention_head_dim=6, cross_attention_dim=18), "18 must be a multiple of 4"),
        (
            dict(num_attention_heads=2, cross_attention_dim=16, sample_size=128),
            "16 must be a multiple of 4, and of 3 with use_additional_conditions",
        ),
    ],
)
def test_wrong_configs_are_named(change, message):
    PIXART.refuses(message, config=change)
