"""AutoencoderKL (models/networks/autoencoders.py).

It equals diffusers, files pass both ways, the posterior is a Gaussian, and latents are normalised
as pipelines do it.
"""

import json

import pytest
import torch
from helpers import fill, refusal_of, relative, save_tiny_teacher
from safetensors.torch import load_file, save_file

import dmd
from models.files import UserError, save_json
from models.networks import WEIGHTS, network_config, save_network
from models.networks.autoencoders import OLD_NAMES, SD_VAE, AutoencoderKL
from models.networks.latent_space import load_vae


def config_of(*widths, **changes):
    return dict(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=list(widths),
        **{**dict(norm_num_groups=4), **changes},
    )


TINY = config_of(8, 12, 16, 16, layers_per_block=2)
SIXTEEN = config_of(
    8,
    8,
    12,
    16,
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=1.5,
    shift_factor=0.06,
)
CASES = {
    "sd": TINY,
    "sixteen": SIXTEEN,
    "no_attention": {**TINY, "mid_block_add_attention": False},
    "only_quant_conv": {**TINY, "use_post_quant_conv": False},
    "only_post_quant_conv": {**TINY, "use_quant_conv": False},
    "other_channels": {**TINY, "in_channels": 1, "out_channels": 2, "latent_channels": 3},
    "one_size": config_of(12, layers_per_block=3),
    "two_groups": config_of(6, 10, norm_num_groups=2),
}


def theirs(config):
    return pytest.importorskip("diffusers").AutoencoderKL(**config).eval()


def pair(config=TINY):
    """-> ours and diffusers', of the same weights."""
    ours, reference = fill(AutoencoderKL(**config)), theirs(config)
    reference.load_state_dict(ours.state_dict())  # strict: same names, same shapes
    return ours, reference


def pixels(config=TINY, n=2, size=(24, 16), seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, config.get("in_channels", 3), *size, generator=g) * 2 - 1


def normal(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the same function as diffusers --------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_equal_to_diffusers(case):
    """Both halves, and their gradients by the input and by every parameter."""
    ours, reference = pair(CASES[case])
    x = [pixels(CASES[case]).requires_grad_() for _ in range(2)]
    mean, logvar = ours.posterior(x[0])
    want = reference.encode(x[1]).latent_dist
    latents = [normal(*mean.shape).requires_grad_() for _ in range(2)]
    out, want_out = ours.decode(latents[0]), reference.decode(latents[1]).sample
    channels, sides = CASES[case].get("latent_channels", 4), x[0].shape[2:]
    assert mean.shape == (2, channels, *(s // ours.factor for s in sides))
    assert out.shape == (2, CASES[case].get("out_channels", 3), 24, 16)
    assert min(mean.std(), logvar.std(), out.std()) > 0.1
    parts = {3: (mean, want.mean), 4: (logvar, want.logvar), 5: (out, want_out)}
    for seed, both in parts.items():
        for part in both:
            weight = normal(*part.shape, seed=seed)
            (part * weight).sum().backward(retain_graph=True)
    errors = {
        "mean": relative(mean, want.mean),
        "logvar": relative(logvar, want.logvar),
        "pixels": relative(out, want_out),
        "dx": relative(x[0].grad, x[1].grad),
        "dlatent": relative(latents[0].grad, latents[1].grad),
    }
    print(case, " ".join(f"{k} {e:.1e}" for k, e in errors.items()))
    assert max(errors.values()) <= 1e-5
    parameters = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        want = parameters[name].grad
        assert torch.allclose(p.grad, want, rtol=1e-4, atol=1e-4 * max(1, want.abs().max())), name


def test_logvar_is_clamped_as_in_diffusers():
    ours, reference = pair()
    with torch.no_grad():
        for net in (ours, reference):
            net.quant_conv.weight *= 200
        logvar, want = ours.posterior(pixels())[1], reference.encode(pixels()).latent_dist.logvar
    assert (logvar == -30).any() and (logvar == 20).any() and relative(logvar, want) <= 1e-5
    assert ((logvar > -30) & (logvar < 20)).any()


def test_dtypes_are_the_weights_inside_and_the_inputs_outside():
    ours, reference = pair()
    x, z = pixels(), normal(2, 4, 3, 2)
    with torch.no_grad():
        exact = ours.decode(z)
        ours.bfloat16()
        reference.bfloat16()
        low, want = ours.decode(z.bfloat16()), reference.decode(z.bfloat16()).sample
        assert low.dtype == torch.bfloat16
        assert ours.decode(z).dtype == ours.encode(x).dtype == torch.float32

    def error(out):
        return ((out.float() - exact).norm() / exact.norm()).item()

    print(f"errors: bfloat16 {error(low):.1e}, diffusers' {error(want):.1e}")
    assert 0 < error(low) < 1.5 * error(want) + 1e-3 and error(low) < 0.1


# ---- the posterior and the scale -----------------------------------------------------------------


def test_sample_is_mean_plus_deviation_times_noise():
    """The noise is given, or drawn by a generator as in diffusers; None gives the mode."""
    ours, reference = pair()
    x, noise = pixels(), normal(2, 4, 3, 2, seed=3)
    with torch.no_grad():
        mean, logvar = ours.posterior(x)
        want = reference.encode(x).latent_dist
        assert torch.equal(ours.encode(x), mean) and relative(mean, want.mode()) <= 1e-5
        torch.testing.assert_close(ours.encode(x, noise), mean + logvar.exp().sqrt() * noise)
        drawn = ours.encode(x, torch.Generator().manual_seed(4))
        assert relative(drawn, want.sample(torch.Generator().manual_seed(4))) <= 1e-5
        assert torch.equal(drawn, ours.encode(x, torch.Generator().manual_seed(4)))
        assert relative(drawn, ours.encode(x, torch.Generator().manual_seed(5))) > 1e-2


def test_samples_have_the_mean_and_variance_of_the_posterior():
    ours, n = pair()[0], 4000
    x = pixels(n=1, size=(8, 8))
    with torch.no_grad():
        mean, logvar = ours.posterior(x)
        drawn = ours.encode(x.expand(n, -1, -1, -1), torch.Generator().manual_seed(0))
    z = (drawn.double() - mean) / logvar.double().exp().sqrt()
    assert logvar.std() > 0.1  # the deviations differ from one another, so a wrong one shows
    assert (z.mean(0).abs() < 5 / n**0.5).all()
    assert ((z.var(0) - 1).abs() < 5 * (2 / n) ** 0.5).all()
    correlation = torch.corrcoef(z.flatten(1).T) - torch.eye(4)
    assert correlation.abs().max() < 5 / n**0.5


@pytest.mark.parametrize("config, shift", [(TINY, 0.0), (SIXTEEN, 0.06)], ids=["sd", "sixteen"])
def test_scale_and_shift_are_those_of_pipelines(config, shift):
    """latent -> (latent - shift) * scale, and back before decoding; shift_factor None is 0."""
    ours, reference = pair(config)
    x, scale = pixels(config), config.get("scaling_factor", 0.18215)
    latent = normal(2, config.get("latent_channels", 4), 3, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours.denormalise(ours.normalise(latent)), latent)
        torch.testing.assert_close(ours.normalise(latent), (latent - shift) * scale)
        posterior = reference.encode(x).latent_dist
        z = ours.to_latents(x, torch.Generator().manual_seed(4))
        drawn = posterior.sample(torch.Generator().manual_seed(4))
        assert relative(z, (drawn - shift) * scale) <= 1e-5
        assert relative(ours.to_latents(x), (posterior.mode() - shift) * scale) <= 1e-5
        assert relative(ours.to_pixels(z), reference.decode(z / scale + shift).sample) <= 1e-5


# ---- names, shapes and files ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, tensors, parameters",
    [
        pytest.param(SD_VAE, 248, 83_653_863, id="sd-vae-ft-mse"),
        pytest.param(
            dict(SD_VAE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
            244,
            83_819_683,
            id="16-channels",
        ),
    ],
)
def test_released_sizes_have_diffusers_names_and_shapes(config, tensors, parameters):
    with torch.device("meta"):
        ours, reference = AutoencoderKL(**config), theirs(config)
    shapes = {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    assert shapes == {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    assert len(shapes) == tensors
    assert shapes["encoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
    shortcut = "decoder.up_blocks.2.resnets.0.conv_shortcut.weight"
    assert shapes[shortcut] == (256, 512, 1, 1)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert not list(ours.buffers()) and ours.factor == 8
    assert set(ours.config) == {k for k in reference.config if not k.startswith("_")}
    assert all(ours.config[k] == config[k] == reference.config[k] for k in config)


def test_defaults_of_the_config_are_diffusers():
    ours = AutoencoderKL().config
    assert ours == {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in theirs({}).config.items()
        if not k.startswith("_")
    }
    assert ours == json.loads(json.dumps(ours))


def test_files_pass_both_ways(tmp_path):
    """A vae/ that diffusers wrote, by its own folder or its pipeline's; and one that we wrote."""
    diffusers = pytest.importorskip("diffusers")
    reference, x = fill(theirs(TINY)), pixels()
    reference.save_pretrained(tmp_path / "root" / "vae")
    with torch.no_grad():
        want = reference.encode(x).latent_dist.mean
        for folder in ("root", "root/vae", "root/"):
            vae = load_vae(str(tmp_path / folder))
            assert relative(vae.encode(x), want) <= 1e-5 and not vae.training
        save_network(vae, network_config(vae), str(tmp_path / "ours"))
        back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
        assert relative(back.encode(x).latent_dist.mean, want) <= 1e-6
    low = load_vae(str(tmp_path / "root"), torch.bfloat16)
    assert low.quant_conv.weight.dtype == torch.bfloat16


def test_old_names_of_the_attention_are_accepted(tmp_path):
    """A folder as sd-vae-ft-mse was uploaded: old names, and a config without what came later.

    load_state_dict takes them too; what we save has today's names.
    """
    ours, x = pair()[0], pixels()
    old = {new: name for name, new in OLD_NAMES.items()}

    def old_name(key):
        for new in old:
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old[new]}.")
        return key

    state = {old_name(k): v for k, v in ours.state_dict().items()}
    assert len(set(state) - set(ours.state_dict())) == 16
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in state
    save_file(state, tmp_path / WEIGHTS)
    later = (
        "shift_factor",
        "latents_mean",
        "latents_std",
        "force_upcast",
        "use_quant_conv",
        "use_post_quant_conv",
        "mid_block_add_attention",
        "scaling_factor",
    )
    config = {k: v for k, v in network_config(ours).items() if k not in later}
    save_json(config, str(tmp_path / "config.json"))
    loaded, by_hand = load_vae(str(tmp_path)), AutoencoderKL(**TINY)
    kept = dict(state)
    by_hand.load_state_dict(state)
    assert state.keys() == kept.keys()  # the caller's dict does not change
    for vae in (loaded, by_hand):
        assert all(torch.equal(v, ours.state_dict()[k]) for k, v in vae.state_dict().items())
    assert loaded.config == ours.config
    theirs = pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(tmp_path)
    with torch.no_grad():
        latent = ours.encode(x)
        assert relative(theirs.decode(latent).sample, ours.decode(latent)) <= 1e-5
    save_network(loaded, network_config(loaded), str(tmp_path / "new"))
    assert load_file(tmp_path / "new" / WEIGHTS).keys() == ours.state_dict().keys()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(act_fn="relu"), "act_fn = 'relu' is not implemented; this autoencoder has 'silu'"),
        (dict(latents_mean=[0.0] * 4), "latents_mean"),
        (dict(latents_std=[1.0] * 4), "latents_std"),
        (
            dict(down_block_types=["DownEncoderBlock2D"] * 3),
            r"down_block_types = .* must be 'DownEncoderBlock2D'",
        ),
        (
            dict(up_block_types=["UpDecoderBlock2D"] * 3 + ["AttnUpDecoderBlock2D"]),
            "up_block_types = .* is not implemented",
        ),
        (
            dict(norm_num_groups=32),
            r"block_out_channels = \[8, 12, 16, 16\] must be multiples of norm_num_groups = 32",
        ),
        (dict(layers_per_block=0), "layers_per_block = 0"),
        (dict(scaling_factor=None), "scaling_factor = None"),
        (dict(scaling_factor=0.0), "scaling_factor = 0.0"),
        (config_of(), "and one at least"),
    ],
)
def test_wrong_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        AutoencoderKL(**{**TINY, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda vae: vae.encode(torch.zeros(3, 8, 8)),
            r"x is torch.float32 \(3, 8, 8\); "
            r"pass pixels in \[-1, 1\], floats of shape \(B, 3, H, W\)",
        ),
        (
            lambda vae: vae.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),
            r"x is torch.uint8 \(1, 3, 8, 8\); pass pixels",
        ),
        (
            lambda vae: vae.decode(torch.zeros(1, 4, 8, 8, dtype=torch.uint8)),
            r"the latent is torch.uint8",
        ),
        (lambda vae: vae.encode(torch.zeros(1, 4, 8, 8)), r"floats of shape \(B, 3, H, W\)"),
        (
            lambda vae: vae.encode(torch.zeros(1, 3, 8, 12)),
            r"H, W = \(8, 12\) are not multiples of 8; crop or pad x",
        ),
        (lambda vae: vae.to_latents(torch.zeros(1, 3, 9, 8)), "are not multiples of 8"),
        (lambda vae: vae.encode(torch.zeros(1, 3, 0, 8)), "are not multiples of 8"),
        (
            lambda vae: vae.encode(torch.zeros(2, 3, 8, 8), torch.zeros(1, 4, 1, 1)),
            r"noise has shape \(1, 4, 1, 1\); pass \(2, 4, 1, 1\)",
        ),
        (
            lambda vae: vae.decode(torch.zeros(1, 8, 2, 2)),
            r"the latent is torch.float32 \(1, 8, 2, 2\); pass floats of shape \(B, 4, h, w\)",
        ),
        (lambda vae: vae.to_pixels(torch.zeros(4, 2, 2)), r"floats of shape \(B, 4, h, w\)"),
    ],
)
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(AutoencoderKL(**TINY))
    assert "\n" not in str(error.value)


def test_wrong_folders_are_refused(tmp_path, capsys):
    vae = AutoencoderKL(**TINY)
    save_network(vae, network_config(vae), str(tmp_path / "root" / "vae"))
    save_tiny_teacher(tmp_path / "net")
    with pytest.raises(UserError, match="is a DiT, not an AutoencoderKL"):
        load_vae(str(tmp_path / "net"))
    flags = ["--teacher", str(tmp_path / "root" / "vae"), "--output_dir", str(tmp_path / "run")]
    message = refusal_of(capsys, dmd.main, *flags)
    assert "is a AutoencoderKL, which does not denoise" in message
    path = tmp_path / "root" / "vae" / WEIGHTS
    state = load_file(path)
    save_file({k: v for k, v in state.items() if "to_q" not in k}, path)
    lacks = "lacks 'decoder.mid_block.attentions.0.to_q.bias' and 3 more tensors"
    with pytest.raises(UserError, match=lacks):
        load_vae(str(tmp_path / "root"))
    save_file({**state, "decoder.mid_block.attentions.0.query.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(UserError, match="'decoder.mid_block.attentions.0.query.weight' has shape"):
        load_vae(str(tmp_path / "root"))
