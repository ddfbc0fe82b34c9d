"""The transformers with released weights, and how each is compared with its class in diffusers."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from helpers import fill, relative, save_tiny_image_root
from safetensors.torch import load_file

from models.networks import cogvideox, load_network, lumina2, pixart, qwen_image, wan, z_image


def wan_velocity(net, x, t, text):
    return net(x, 1000 * t, text).sample


def z_image_velocity(net, x, t, text, text_mask):
    """diffusers takes lists, no padding, and one frame; its clock is 1 - t, its sign x0 - eps."""
    rows = [row[keep] for row, keep in zip(text, text_mask, strict=True)]
    patch = net.config.all_patch_size[0]
    out = net(list(x.unsqueeze(2)), 1 - t, rows, patch_size=patch).sample
    return -torch.stack(out).squeeze(2)


def pixart_noise(net, x, t, text, mask, index=None):
    """As PixArtAlphaPipeline calls it: its clock, sizes in pixels, the first half of channels."""
    H, W = (8 * size for size in x.shape[2:])
    sizes = {
        "resolution": torch.tensor([[H, W]] * len(x)).to(x.dtype),
        "aspect_ratio": torch.tensor([[H / W]] * len(x)).to(x.dtype),
    }
    index = 1000 * t - 1 if index is None else index
    out = net(x, text, index, added_cond_kwargs=sizes, encoder_attention_mask=mask).sample
    return out.chunk(2, dim=1)[0] if out.shape[1] == 2 * x.shape[1] else out


def cogvideox_v(net, x, t, text, index=None):
    """diffusers has frames before channels; its clock is the index."""
    index = 1000 * t - 1 if index is None else index
    return net(x.transpose(1, 2), text, index).sample.transpose(1, 2)


def qwen_image_velocity(net, x, t, text, mask):
    """As QwenImagePipeline calls it: packed, with the number of patches of an image."""
    B, C, H, W = x.shape
    p = net.config.patch_size
    h = x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)
    shapes = [[(1, H // p, W // p)]] * B
    out = net(h, text, mask, t, shapes).sample.view(B, H // p, W // p, C, p, p)
    return out.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def lumina2_velocity(net, x, t, text, mask):
    """As Lumina2Pipeline calls it: its clock is 1 - t, its sign x0 - eps."""
    return -net(x, 1 - t, text, mask).sample


@dataclass(frozen=True, eq=False)
class Released:
    module: ModuleType
    name: str  # of the class, here and in diffusers
    tiny: dict  # a config with three (main) blocks
    reference: Callable  # (network of diffusers, arguments of ours) -> output in our convention
    size: tuple  # of a small latent, without the channels
    lengths: list  # numbers of tokens of two prompts
    width: str  # key of the config that holds the width of the text
    mask: str | None = None  # argument that marks the tokens of a prompt

    def net(self, **config):
        return getattr(self.module, self.name)(**config)

    @property
    def theirs(self):
        return getattr(pytest.importorskip("diffusers"), self.name)

    def inputs(self, config=None, size=None, lengths=None, seed=1):
        """Arguments of a call: x, t between indices, text, and the mask if there is one.

        The padding of text is not zero, so a network that reads it is found out.
        """
        config, size, lengths = config or self.tiny, size or self.size, lengths or self.lengths
        g, B = torch.Generator().manual_seed(seed), len(lengths)
        L = max(lengths) + (2 if self.mask else 0)
        call = dict(
            x=torch.randn(B, self.channels(config), *size, generator=g),
            t=torch.rand(B, generator=g),
            text=torch.randn(B, L, config[self.width], generator=g),
        )
        if self.mask:
            call[self.mask] = torch.arange(L) < torch.tensor(lengths)[:, None]
        return call

    def channels(self, config):
        """Of a latent."""
        if self is QWEN_IMAGE:  # which counts those of a patch
            return config["in_channels"] // config.get("patch_size", 2) ** 2
        return config.get("in_channels", 4)

    def pair(self, config=None):
        """-> ours and diffusers', with the same weights."""
        ours = fill(self.net(**config or self.tiny))
        reference = self.theirs(**config or self.tiny).eval()
        reference.load_state_dict(ours.state_dict())  # strict: same names, same shapes
        return ours, reference

    def error(self, out, want):
        """Largest difference, as a share of the largest value; Wan's values are not small, so there
        it also counts as it is."""
        difference = (out - want).abs().max().item() if self is WAN else 0.0
        return max(relative(out, want), difference)

    def refuses(self, message, config=None, **change):
        """A small call with this change, or a network with this config, raises ValueError.

        Its text is one line and matches message.
        """
        with pytest.raises(ValueError, match=message) as error:
            net = self.net(**{**self.tiny, **(config or {})})
            if config is None:
                net(**{**self.inputs(), **change})
        assert "\n" not in str(error.value)


WAN = Released(
    wan,
    "WanTransformer3DModel",
    dict(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=10,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    ),
    wan_velocity,
    (2, 4, 6),
    [5, 5],
    "text_dim",
)
Z_IMAGE = Released(
    z_image,
    "ZImageTransformer2DModel",
    dict(
        in_channels=4,
        dim=36,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=10,
        axes_dims=[4, 4, 4],
        axes_lens=[128, 16, 16],
    ),
    z_image_velocity,
    (4, 6),
    [5, 40],
    "cap_feat_dim",
    "text_mask",
)
PIXART = Released(
    pixart,
    "PixArtTransformer2DModel",
    dict(
        num_attention_heads=3,
        attention_head_dim=8,
        cross_attention_dim=24,
        caption_channels=10,
        num_layers=3,
        sample_size=64,
    ),
    pixart_noise,
    (4, 6),
    [5, 4],
    "caption_channels",
    "mask",
)
COGVIDEOX = Released(
    cogvideox,
    "CogVideoXTransformer3DModel",
    dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=12,
        text_embed_dim=10,
        num_layers=3,
        max_text_seq_length=5,
        sample_width=6,
        sample_height=4,
        sample_frames=5,
    ),
    cogvideox_v,
    (2, 4, 6),
    [5, 5],
    "text_embed_dim",
)
QWEN_IMAGE = Released(
    qwen_image,
    "QwenImageTransformer2DModel",
    dict(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=3,
        joint_attention_dim=10,
        axes_dims_rope=[4, 4, 4],
    ),
    qwen_image_velocity,
    (4, 6),
    [5, 4],
    "joint_attention_dim",
    "mask",
)
LUMINA2 = Released(
    lumina2,
    "Lumina2Transformer2DModel",
    dict(
        sample_size=8,
        in_channels=4,
        hidden_size=48,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=[4, 4, 4],
        axes_lens=[64, 16, 16],
        cap_feat_dim=10,
    ),
    lumina2_velocity,
    (4, 6),
    [5, 4],
    "cap_feat_dim",
    "mask",
)
# Those of test_transformers.py and test_pipeline.py; the others have test files of their own.
MODELS = {"wan": WAN, "z_image": Z_IMAGE, "pixart": PIXART}


# ---- what the files of single networks share -----------------------------------------------------


def assert_equal_to_diffusers(model, changes, size, lengths):
    """Output to 1e-5, all gradients to 1e-4, for tiny networks with the same random weights."""
    config = {**model.tiny, **changes}
    (ours, reference), call = model.pair(config), model.inputs(config, size, lengths)
    calls = [
        {**call, **{k: call[k].clone().requires_grad_() for k in ("x", "text")}} for _ in range(2)
    ]
    out, want = ours(**calls[0]), model.reference(reference, **calls[1])
    assert out.shape == want.shape == call["x"].shape and want.std() > 0.1
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    for result in (out, want):
        (result * weight).sum().backward()
    assert model.error(out, want) <= 1e-5
    for name in ("x", "text"):
        assert relative(calls[0][name].grad, calls[1][name].grad) <= 1e-5, name
    keep, gradient = call[model.mask], calls[0]["text"].grad
    assert not gradient[~keep].any() and gradient[keep].abs().sum(-1).all()
    parameters = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        want = parameters[name].grad
        assert (p.grad is None) == (want is None), name
        if want is not None:
            assert torch.allclose(p.grad, want, rtol=1e-4, atol=1e-4 * max(1, want.abs().max()))


def assert_released_size(model, config, parameters):
    """Names, shapes and number of parameters are diffusers', and so are the keys of the config."""
    with torch.device("meta"):
        ours, reference = model.net(**config), model.theirs(**config)
    shapes = {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    assert shapes == {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert sum(p.numel() for p in reference.parameters()) == parameters
    assert not list(ours.buffers())  # nothing that meta construction or .to(bfloat16) could spoil
    theirs = {k: v for k, v in reference.config.items() if not k.startswith("_")}
    assert set(ours.config) == set(theirs) and ours.config == {k: theirs[k] for k in config}


def save_root(model, root, pipeline, scheduler):
    """A tiny teacher and its prompts, the last of which is the unconditional one -> flags."""
    root.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(9) < torch.tensor([4, 9, 1, 6, 7, 2])[:, None]
    text = torch.randn(6, 9, model.tiny[model.width], generator=g)
    prompts = {"cond.text": text[:5], "cond.mask": mask[:5]}
    prompts |= {"uncond.text": text[5:], "uncond.mask": mask[5:]}
    how = model.name, pipeline, {"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler}
    flags = save_tiny_image_root(root, fill(model.net(**model.tiny)), *how, prompts)
    return [*flags, *"--train_batch_size 3 --max_train_steps 2 --guidance_scale 2".split()]


def assert_student(model, run, teacher, still=()):
    """student/ of a run is a network that diffusers loads and that computes the same there.

    still: beginnings of the names of parameters that need not have moved.
    """
    ours = load_network(str(run / "student"))[0]
    reference = model.theirs.from_pretrained(run / "student").eval()
    call = model.inputs()
    with torch.no_grad():
        out = ours(**call)
        assert model.error(out, model.reference(reference, **call)) <= 1e-5 and out.std() > 0.01
    start = load_network(str(teacher / "transformer"))[0].state_dict()
    same = {k for k, v in ours.state_dict().items() if torch.equal(v, start[k])}
    assert all(k.startswith(tuple(still)) for k in same), same


def sampled(script, run, prompts, *flags):
    """--sample of a run in a process that knows nothing of it -> its samples and the run's own."""
    out = run.parent / f"{run.name}-samples"
    argv = ["--sample", str(run), "--prompts", str(prompts), "--preview_samples", "2", *flags]
    script.main([*argv, "--output_dir", str(out)])
    return [load_file(d / "samples.safetensors")["x0"] for d in (out, run)]
