"""models/vaes.py: latents and pixels of every released autoencoder are those of its pipeline."""

import functools

import pytest
import torch
from pipelines import make_pipeline

from models.vaes import latent_shape, load_autoencoder


def unpacked(z, H, W):
    """Qwen-Image's packed latents (1, N, 4 C) -> (1, C, H, W), patch by patch."""
    z = z.unflatten(1, (H // 2, W // 2)).unflatten(3, (-1, 2, 2))
    return z.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


# Of each family: z's shape and, where its pipeline has another, that of the latents it takes; how
# to make ours of its latents; what else its pipeline is called with.
QUICK = dict(num_inference_steps=2, guidance_scale=1.0)
IMAGE = dict(QUICK, height=16, width=32)
FAMILIES = {
    "sd15": ((4, 8, 16), None, None, IMAGE),
    "sdxl": ((4, 8, 16), None, None, IMAGE),
    "pixart": ((4, 8, 16), None, None, dict(IMAGE, use_resolution_binning=False)),
    "z_image": ((4, 4, 6), None, None, dict(QUICK, height=8, width=12)),
    "lumina2": ((4, 4, 6), None, None, dict(QUICK, height=32, width=48, system_prompt="")),
    "qwen_image": ((4, 2, 4), (2, 16), functools.partial(unpacked, H=2, W=4), dict(IMAGE)),
    "wan": ((16, 2, 2, 4), None, None, dict(IMAGE, num_frames=5)),
    "wan_5b": ((48, 2, 2, 4), None, None, dict(QUICK, height=32, width=64, num_frames=5)),
    "cogvideox": (
        (4, 3, 2, 4),
        (3, 4, 2, 4),
        lambda z: z.transpose(1, 2),
        dict(IMAGE, num_frames=9),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_as_the_pipeline(tmp_path, family):
    """Pixels are what the pipeline makes of the same latents, and latents are made the other way.

    The second part needs the first: encoding and decoding must be what the autoencoder alone does.
    """
    shape, theirs, ours, flags = FAMILIES[family]
    pipe, g = make_pipeline(family), torch.Generator().manual_seed(0)
    pipe.vae.save_pretrained(tmp_path / "vae")
    start = torch.randn(1, *(theirs or shape), generator=g)
    made = [pipe("a cat", latents=start, output_type=kind, **flags)[0] for kind in ("latent", "pt")]
    z, want = (ours or torch.Tensor.clone)(made[0]), made[1]
    space = load_autoencoder(str(tmp_path))
    x = space.to_pixels(z)
    assert z.shape[1:] == shape and want.std() > 0.01
    video = want if want.dim() == 5 else want.unsqueeze(1)  # (1, F, 3, H, W)
    got = x.transpose(1, 2) if x.dim() == 5 else x.unsqueeze(1)
    assert (((got / 2 + 0.5).clamp(0, 1)) - video).abs().max() < 1e-5
    with torch.no_grad():
        plain = pipe.vae.decode(z.unsqueeze(2) if family == "qwen_image" else z).sample
    assert (plain.reshape(x.shape) - x).abs().max() > 1e-3  # the normalisation is seen

    x, noise = 2 * torch.rand(x.shape, generator=g) - 1, torch.randn(1, *shape, generator=g)
    with torch.no_grad():
        frames = x.unsqueeze(2) if family == "qwen_image" else x
        law = pipe.vae.encode(frames).latent_dist
        own = law.mean + law.std * noise.reshape(law.mean.shape)
        want = [pipe.vae.decode(latent).sample.reshape(x.shape) for latent in (law.mean, own)]
    for given, pixels in zip((None, noise), want):
        z = space.to_latents(x, given)
        assert z.shape[1:] == shape == latent_shape(space, x.shape[-2:], x.shape[-3])
        assert (space.to_pixels(z) - pixels).abs().max() < 1e-5
