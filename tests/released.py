"""The transformers with released weights, and how each is compared with its class in diffusers."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from helpers import fill, relative

from models.networks import cogvideox, pixart, wan, z_image


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
            x=torch.randn(B, config.get("in_channels", 4), *size, generator=g),
            t=torch.rand(B, generator=g),
            text=torch.randn(B, L, config[self.width], generator=g),
        )
        if self.mask:
            call[self.mask] = torch.arange(L) < torch.tensor(lengths)[:, None]
        return call

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
# Those whose pipelines models/encode.py knows; test_cogvideox.py has the other.
MODELS = {"wan": WAN, "z_image": Z_IMAGE, "pixart": PIXART}
