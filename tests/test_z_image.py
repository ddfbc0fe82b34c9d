"""models/networks/z_image.py: what is particular to it.

The rest is in test_transformers.py and test_pipeline.py.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import fill, relative
from released import Z_IMAGE

from models.diffusion import step_grid
from models.networks import load_network, z_image
from models.networks.z_image import ZImageTransformer2DModel

TINY, velocity = Z_IMAGE.tiny, Z_IMAGE.reference


def test_epsilon_of_the_last_norm():
    """It shows if tokens are small there: the embedding of the image is small, and blocks add
    nothing."""
    ours = fill(ZImageTransformer2DModel(**TINY))
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.startswith("all_x_embedder"):
                p *= 1e-3
            elif "adaLN_modulation.0" in name:
                p *= 0.0
    reference = Z_IMAGE.theirs(**TINY).eval()
    reference.load_state_dict(ours.state_dict())
    call = Z_IMAGE.inputs(TINY, (4, 6), [5])
    with torch.no_grad():
        v = ours(**call)
        assert relative(v, velocity(reference, **call)) <= 1e-5
        ours.all_final_layer["2-1"].norm_final.eps *= 2
        assert relative(ours(**call), v) > 1e-2


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_sign_and_clock_are_those_of_the_pipeline(scale):
    """Euler steps of dx/dt = v with our velocity, from t = 1 to 0, are what ZImagePipeline does.

    Its guidance g is our g + 1.
    """
    diffusers = pytest.importorskip("diffusers")
    ours, reference = Z_IMAGE.pair()
    call, null = Z_IMAGE.inputs(TINY, (4, 6), [5, 40]), Z_IMAGE.inputs(TINY, (4, 6), [3, 3], seed=5)
    listed = [
        [row[keep] for row, keep in zip(c["text"], c["text_mask"], strict=True)]
        for c in (call, null)
    ]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.ZImagePipeline(scheduler, None, None, None, reference)
    pipe.set_progress_bar_config(disable=True)
    want = pipe(
        prompt_embeds=listed[0],
        negative_prompt_embeds=listed[1],
        latents=call["x"],
        height=32,
        width=48,
        num_inference_steps=3,
        guidance_scale=scale,
        output_type="latent",
    ).images
    x, grid = call["x"], step_grid(3, ZImageTransformer2DModel.default_shift)
    with torch.no_grad():
        for t, t_next in zip(grid[:-1], grid[1:], strict=True):
            cond, uncond = (
                ours(x, torch.full((2,), t), text=c["text"], text_mask=c["text_mask"])
                for c in (call, null)
            )
            x = x + (t_next - t) * (uncond + (scale + 1) * (cond - uncond))
    # Not closer, because (1000 - 1000 t) / 1000 is rounded differently from 1 - t.
    assert relative(x, want) < 1e-3 and relative(call["x"], want) > 0.1


def test_bfloat16_weights_as_in_diffusers(tmp_path):
    """diffusers keeps nothing of Z-Image in float32, and neither do we."""
    _, reference = Z_IMAGE.pair()
    reference.save_pretrained(tmp_path)
    theirs = type(reference).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert not theirs._keep_in_fp32_modules and not hasattr(
        ZImageTransformer2DModel, "keep_float32"
    )
    low = load_network(str(tmp_path), torch.bfloat16)[0]
    for net in (theirs, low):
        assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


def test_the_place_of_a_prompts_tokens_does_not_matter():
    """Only which ones the mask marks, and their order."""
    net, call = fill(ZImageTransformer2DModel(**TINY)), Z_IMAGE.inputs(lengths=[5, 33, 40])
    text, keep = call["text"], call["text_mask"]
    with torch.no_grad():
        v = net(**call)
        # Padding before the tokens.
        pairs = zip(text, keep, strict=True)
        left = torch.stack([torch.cat([row[~k], row[k]]) for row, k in pairs])
        assert torch.equal(net(**{**call, "text": left, "text_mask": keep.flip(1)}), v)
        holes = torch.zeros(3, 84, dtype=torch.bool)
        holes[:, ::2] = keep
        doubled = {"text": text.repeat_interleave(2, dim=1), "text_mask": holes}
        assert torch.equal(net(**{**call, **doubled}), v)
        longer = F.pad(text, (0, 0, 0, 60)), F.pad(keep, (0, 60))
        assert torch.equal(net(**{**call, "text": longer[0], "text_mask": longer[1]}), v)


def test_a_mask_is_used_only_where_prompts_fill_up_differently(monkeypatch):
    """Attention without a mask is faster, and the same."""
    seen, original = [], z_image.attention

    def attention(q, k, v, mask, share=None):
        seen.append(mask)
        return original(q, k, v, mask, share)

    monkeypatch.setattr(z_image, "attention", attention)
    net = fill(ZImageTransformer2DModel(**TINY))
    with torch.no_grad():
        net(**Z_IMAGE.inputs(TINY, (4, 4), [5, 32, 17]))
        assert len(seen) == 7 and all(m is None for m in seen)
        seen.clear()
        net(**Z_IMAGE.inputs(TINY, (4, 4), [5, 33]))
    shapes = [m if m is None else tuple(m.shape) for m in seen]
    assert shapes == [None] * 2 + [(2, 1, 1, 64)] * 2 + [(2, 1, 1, 96)] * 3
    assert seen[-1].sum(-1).flatten().tolist() == [64, 96] and seen[-1][0, 0, 0, :64].all()


def test_rotations_are_never_rounded(monkeypatch):
    angles, original = [], z_image.rotate

    def rotate(q, cos, sin):
        angles.append((cos, sin))
        return original(q, cos, sin)

    monkeypatch.setattr(z_image, "rotate", rotate)
    net = fill(ZImageTransformer2DModel(**TINY))
    call = Z_IMAGE.inputs(size=(6, 10), lengths=[31, 32, 33])
    low = {k: a if k in ("t", "text_mask") else a.bfloat16() for k, a in call.items()}
    with torch.no_grad():
        net(**call)
        with torch.autocast("cpu", torch.bfloat16):
            net(**call)
        net.to(torch.bfloat16)
        net(**low)
        net(**call)
    # q and k of seven blocks, in four calls: float32, autocast, and bfloat16 twice.
    calls = [angles[i : i + 14] for i in range(0, len(angles), 14)]
    assert len(calls) == 4
    for c in calls:
        for (cos, sin), (cos_0, sin_0) in zip(c, calls[0], strict=True):
            assert torch.equal(cos, cos_0) and torch.equal(sin, sin_0)


def test_largest_inputs_are_taken():
    """They are refused exactly from where diffusers runs out of positions."""
    ours, reference = Z_IMAGE.pair(dict(TINY, axes_lens=[66, 3, 2]))
    call = Z_IMAGE.inputs(TINY, (6, 4), [64])
    with torch.no_grad():
        assert relative(ours(**call), velocity(reference, **call)) <= 1e-5
    for most, size in (([65, 3, 2], (6, 4)), ([66, 3, 2], (8, 4)), ([66, 3, 2], (6, 6))):
        ours, reference = Z_IMAGE.pair(dict(TINY, axes_lens=most))
        call = Z_IMAGE.inputs(TINY, size, [64])
        with pytest.raises(ValueError, match="positions"):
            ours(**call)
        with pytest.raises(IndexError):
            velocity(reference, **call)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 4, 1, 4, 4)), r"pass a latent \(B, 4, H, W\)"),
        (dict(x=torch.zeros(2, 3, 4, 4)), r"pass a latent \(B, 4, H, W\)"),
        (dict(x=torch.zeros(2, 4, 5, 4)), "do not divide into patches of 2 x 2"),
        (dict(x=torch.zeros(2, 4, 4, 7)), "do not divide into patches"),
        (
            dict(x=torch.zeros(2, 4, 34, 4)),
            r"need \[66, 17, 2\] positions, axes_lens has \[128, 16, 16\]",
        ),
        (dict(x=torch.zeros(2, 4, 4, 34)), r"need \[66, 2, 17\] positions"),
        (
            dict(text=torch.zeros(2, 97, 10), text_mask=torch.ones(2, 97, dtype=torch.bool)),
            r"97 prompt tokens need \[130, 2, 3\] positions",
        ),
        (dict(text_mask=torch.tensor([[1], [0]]).expand(2, 42)), "no token in row 1"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    Z_IMAGE.refuses(message, **change)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(all_patch_size=[2, 4], all_f_patch_size=[1, 1]),
            r"all_patch_size = \[2, 4\] .* one patch size",
        ),
        (dict(all_f_patch_size=[2]), r"all_f_patch_size = \[2\] is not implemented"),
        (dict(siglip_feat_dim=1152), "siglip_feat_dim = 1152 means the omni variant"),
        (dict(n_kv_heads=1), "n_heads = 3 with n_kv_heads = 1"),
        (dict(nheads=4), "nheads = 4 is not implemented"),
        (dict(qk_norm=False), "qk_norm = False"),
        (dict(t_scale=1.0), "t_scale = 1.0"),
        (dict(axes_dims=[4, 4, 6]), "sum to the width of a head"),
        (dict(axes_dims=[3, 5, 4]), "must be even"),
        (dict(n_heads=5, n_kv_heads=5), "36 / 5"),
        (dict(axes_dims=[6, 6]), "three entries"),
        (dict(axes_lens=[64, 64]), "three entries"),
    ],
)
def test_wrong_configs_are_named(change, message):
    Z_IMAGE.refuses(message, config=change)
