"""The image autoencoder of Stable Diffusion (latent diffusion, 2112.10752), with diffusers' parameter names.

Generators of images work on latents with 8x smaller sides. The encoder gives a Gaussian for each place of the latent,
the decoder turns a latent back into pixels; what a generator sees is that latent, shifted and scaled to about unit variance.

    vae = load_vae(FOLDER)                     # a vae/ folder, or a pipeline's that holds one
    z = vae.to_latents(x, noise)               # x in [-1, 1]; the training data of a latent model
    x = vae.to_pixels(z)

    symbol    meaning                                                                         shape
    x         pixels in [-1, 1]                                                               (B, 3, H, W)
    mean      of the posterior N(mean, exp(logvar)); so is logvar, clamped to [-30, 20]       (B, C, H/8, W/8)
    latent    mean + exp(logvar / 2) noise, the VAE's own                                     (B, C, H/8, W/8)
    z         (latent - shift_factor) scaling_factor, what a generator sees                   (B, C, H/8, W/8)

C is 4 (Stable Diffusion, DiT, SiT, LFM, PixArt) or 16 (Stable Diffusion 3, Flux, Z-Image). State dicts load into
`diffusers.AutoencoderKL`, and back, unconverted; here also those of old, whose attention says query, key, value and
proj_attn. Both halves run in the weights' dtype: give float32, since some of these decoders overflow in float16.
"""
import os

import torch
import torch.nn.functional as F
from torch import nn

from models import io

# stabilityai/sd-vae-ft-mse and sd-vae-ft-ema, which have the encoder of Stable Diffusion 1 in common.
SD_VAE = dict(
    in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[128, 256, 512, 512], layers_per_block=2, act_fn="silu", latent_channels=4, norm_num_groups=32, sample_size=256,
    scaling_factor=0.18215, shift_factor=None, latents_mean=None, latents_std=None, force_upcast=True, use_quant_conv=True,
    use_post_quant_conv=True, mid_block_add_attention=True,
)
EPS = 1e-6  # of every GroupNorm
LOGVAR = (-30.0, 20.0)
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of the attention's layers


# ---- pieces ------------------------------------------------------------------------------------------------


class Resnet(nn.Module):
    """Two convolutions beside a shortcut. (B, channels_in, h, w) -> (B, channels, h, w)."""

    def __init__(self, channels_in, channels, groups):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels_in, EPS), nn.GroupNorm(groups, channels, EPS)
        self.conv1, self.conv2 = nn.Conv2d(channels_in, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, h):
        residual = self.conv1(F.silu(self.norm1(h)))
        return self.conv_shortcut(h) + self.conv2(F.silu(self.norm2(residual)))


class Attention(nn.Module):
    """Self-attention of all places with one head, added to its input. (B, channels, h, w) -> the same."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # the checkpoint says "to_out.0"

    def forward(self, h):
        places = self.group_norm(h).flatten(2).transpose(1, 2)  # (B, h*w, channels)
        q, k, v = (to(places)[:, None] for to in (self.to_q, self.to_k, self.to_v))  # (B, 1, h*w, channels)
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])  # (B, h*w, channels)
        return h + out.transpose(1, 2).unflatten(2, h.shape[2:])


class Downsample(nn.Module):
    """Half the sides; the odd row and column of zeros are below and to the right. (B, C, h, w) -> (B, C, h/2, w/2)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, h):
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the sides. (B, C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h):
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """Resnets at one size, then a change of size where there is one."""

    def __init__(self, channels_in, channels, layers, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(channels if i else channels_in, channels, groups) for i in range(layers)])
        self.downsamplers = nn.ModuleList([Downsample(channels)] * down)
        self.upsamplers = nn.ModuleList([Upsample(channels)] * up)

    def forward(self, h):
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            h = layer(h)
        return h


class MidBlock(nn.Module):
    """Resnet, attention where there is one, resnet, at the smallest size. (B, channels, h, w) -> the same."""

    def __init__(self, channels, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)] * attention)

    def forward(self, h):
        for layer in [self.resnets[0], *self.attentions, self.resnets[1]]:
            h = layer(h)
        return h


class Encoder(nn.Module):
    """Pixels to mean and log-variance, before quant_conv. (B, channels_in, H, W) -> (B, 2 latent_channels, H/f, W/f)."""

    def __init__(self, channels_in, latent_channels, widths, layers, groups, attention):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(channels_in, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([Stage(widths[max(i - 1, 0)], w, layers, groups, down=i < last) for i, w in enumerate(widths)])
        self.mid_block = MidBlock(widths[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for stage in self.down_blocks:
            h = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """A latent, after post_quant_conv, to pixels. (B, latent_channels, h, w) -> (B, channels_out, f h, f w)."""

    def __init__(self, latent_channels, channels_out, widths, layers, groups, attention):
        super().__init__()
        widths, last = widths[::-1], len(widths) - 1  # from the smallest size to the largest
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, attention)
        self.up_blocks = nn.ModuleList([Stage(widths[max(i - 1, 0)], w, layers + 1, groups, up=i < last) for i, w in enumerate(widths)])
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], channels_out, 3, padding=1)

    def forward(self, latent):
        h = self.mid_block(self.conv_in(latent))
        for stage in self.up_blocks:
            h = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


# ---- the model ---------------------------------------------------------------------------------------------


class AutoencoderKL(nn.Module):
    """Keyword arguments are the keys of diffusers' config.json, kept in `self.config`; sample_size and force_upcast change nothing.

    Raises ValueError for a config this file does not implement. Source: latent diffusion 2112.10752; names, epsilons, padding and
    clamp as in diffusers, against which tests compare it on the same random weights.
    """

    def __init__(
        self, in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(64,), layers_per_block=1, act_fn="silu", latent_channels=4, norm_num_groups=32, sample_size=32,
        scaling_factor=0.18215, shift_factor=None, latents_mean=None, latents_std=None, force_upcast=True, use_quant_conv=True,
        use_post_quant_conv=True, mid_block_add_attention=True,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        for name in ("down_block_types", "up_block_types", "block_out_channels"):
            self.config[name] = list(self.config[name])  # what JSON gives back
        widths = self.config["block_out_channels"]
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if self.config[name] != [kind] * len(widths):
                raise ValueError(f"{name} = {self.config[name]} is not implemented; it must be {kind!r} for each of block_out_channels = {widths}")
        for name, value in (("act_fn", "silu"), ("latents_mean", None), ("latents_std", None)):
            if self.config[name] != value:
                raise ValueError(f"{name} = {self.config[name]!r} is not implemented; this autoencoder has {value!r}")
        if not widths or any(width % norm_num_groups for width in widths):
            raise ValueError(f"block_out_channels = {widths} must be multiples of norm_num_groups = {norm_num_groups}, and one at least")
        if not layers_per_block >= 1:
            raise ValueError(f"layers_per_block = {layers_per_block} must be at least 1")
        if not isinstance(scaling_factor, (int, float)) or not scaling_factor > 0:
            raise ValueError(f"scaling_factor = {scaling_factor!r} must be a number above 0")

        self.factor = 2 ** (len(widths) - 1)  # f, sides of the image over sides of its latent
        shape = widths, layers_per_block, norm_num_groups, mid_block_add_attention
        self.encoder = Encoder(in_channels, latent_channels, *shape)
        self.decoder = Decoder(latent_channels, out_channels, *shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else nn.Identity()
        self.register_load_state_dict_pre_hook(rename_old)

    @staticmethod
    def current_name(key):
        """encoder.mid_block.attentions.0.query.weight -> encoder.mid_block.attentions.0.to_q.weight; other names as they are."""
        path, layer, kind = f"..{key}".rsplit(".", 2)
        return f"{path}.{OLD_NAMES[layer]}.{kind}"[2:] if ".attentions." in path and layer in OLD_NAMES else key

    def posterior(self, x):
        """Pixels x (B, in_channels, H, W) -> mean, logvar, each (B, latent_channels, H/f, W/f), logvar within LOGVAR. Raises ValueError."""
        channels, f = self.config["in_channels"], self.factor
        if x.dim() != 4 or x.shape[1] != channels or not x.is_floating_point():
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; pass pixels in [-1, 1], floats of shape (B, {channels}, H, W)")
        if any(size % f or not size for size in x.shape[2:]):
            raise ValueError(f"H, W = {tuple(x.shape[2:])} are not multiples of {f}; crop or pad x")
        moments = self.quant_conv(self.encoder(x.to(self.encoder.conv_in.weight.dtype)))
        mean, logvar = moments.to(x.dtype).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR)

    def encode(self, x, noise=None):
        """Pixels to the VAE's own latents. x (B, in_channels, H, W) in [-1, 1] -> (B, latent_channels, H/f, W/f), in x's dtype.

        noise: standard normal (B, latent_channels, H/f, W/f), a torch.Generator to draw it from, or None for the mode, the mean.
        Raises ValueError for shapes that do not fit.
        """
        mean, logvar = self.posterior(x)
        if noise is None:
            return mean
        if isinstance(noise, torch.Generator):
            noise = torch.randn(mean.shape, generator=noise, device=noise.device, dtype=mean.dtype).to(mean.device)
        if noise.shape != mean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; pass {tuple(mean.shape)}, that of the latent")
        return mean + (logvar / 2).exp() * noise

    def decode(self, latent):
        """The VAE's own latents (B, latent_channels, h, w) to pixels (B, out_channels, f h, f w), in [-1, 1] up to overshoot, in latent's dtype.

        Raises ValueError for shapes that do not fit.
        """
        channels = self.config["latent_channels"]
        if latent.dim() != 4 or latent.shape[1] != channels or not latent.is_floating_point():
            raise ValueError(f"the latent is {latent.dtype} {tuple(latent.shape)}; pass floats of shape (B, {channels}, h, w)")
        return self.decoder(self.post_quant_conv(latent.to(self.decoder.conv_in.weight.dtype))).to(latent.dtype)

    def normalise(self, latent):
        """The VAE's own latents -> z, what a generator sees. Any shape."""
        return (latent - (self.config["shift_factor"] or 0.0)) * self.config["scaling_factor"]

    def denormalise(self, z):
        """Inverse of normalise."""
        return z / self.config["scaling_factor"] + (self.config["shift_factor"] or 0.0)

    def to_latents(self, x, noise=None):
        """Pixels in [-1, 1] -> z (B, latent_channels, H/f, W/f); noise as in encode. Raises ValueError."""
        return self.normalise(self.encode(x, noise))

    def to_pixels(self, z):
        """z (B, latent_channels, h, w) -> pixels (B, out_channels, f h, f w), in [-1, 1] up to overshoot. Raises ValueError."""
        return self.decode(self.denormalise(z))


def rename_old(vae, state_dict, prefix, *_):
    """What load_state_dict asks first: old names of the attention's layers become today's, in place."""
    for key in [k for k in state_dict if k.startswith(prefix) and vae.current_name(k) != k]:
        state_dict[vae.current_name(key)] = state_dict.pop(key)


def load_vae(folder, dtype=torch.float32):
    """The AutoencoderKL of a component folder, or of a pipeline root with vae/ -> net in eval mode. Raises UserError."""
    inside = os.path.join(folder, "vae")
    vae, config = io.load_network(inside if os.path.isdir(inside) else folder, dtype)
    if not isinstance(vae, AutoencoderKL):
        raise io.UserError(f"{folder} is a {config['_class_name']}, not an AutoencoderKL: give its pipeline's vae/")
    return vae
