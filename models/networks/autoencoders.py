"""Autoencoders: between pixels and the latents that a generator works on.

    Identity        pixels themselves (f = 1)
    PatchPCA        principal components of square patches: linear, orthonormal, fitted in a second
    AutoencoderKL   Stable Diffusion's (latent diffusion 2112.10752), with diffusers' names

All three have posterior(x) -> mean, logvar; decode(latent); normalise and denormalise, between the
autoencoder's own latents and about unit variance; and factor, f. models/networks/latent_space.py
puts numbers measured on the data on top. The encoder gives a Gaussian for each place of the
latent.

    vae = load_vae(FOLDER)              # latent_space.py: a vae/ folder, or a pipeline that has one
    z = vae.to_latents(x, noise)        # x in [-1, 1]; the training data of a latent model
    x = vae.to_pixels(z)

    symbol         meaning                                                   shape
    x              pixels in [-1, 1]                                         (B, 3, H, W)
    mean, logvar   of the posterior N(mean, exp(logvar))                     (B, C, H/f, W/f)
    latent         mean + exp(logvar / 2) noise, the autoencoder's own       (B, C, H/f, W/f)
    z              normalised latent, what a generator sees                  (B, C, H/f, W/f)

For AutoencoderKL f is 8, C is 4 (Stable Diffusion, DiT, SiT, LFM, PixArt) or 16 (Stable Diffusion
3, Flux, Z-Image), and z = (latent - shift_factor) scaling_factor. Its state dicts load into
`diffusers.AutoencoderKL`, and back, unconverted; older ones also load here, whose attention says
query, key, value and proj_attn. It computes in its weights' dtype: give float32, since some of
these decoders overflow in float16.
"""

import torch
import torch.nn.functional as F
from torch import nn

# stabilityai/sd-vae-ft-mse and sd-vae-ft-ema, whose encoder is that of Stable Diffusion 1.
SD_VAE = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
    act_fn="silu",
    latent_channels=4,
    norm_num_groups=32,
    sample_size=256,
    scaling_factor=0.18215,
    shift_factor=None,
    latents_mean=None,
    latents_std=None,
    force_upcast=True,
    use_quant_conv=True,
    use_post_quant_conv=True,
    mid_block_add_attention=True,
)
EPS = 1e-6  # of every GroupNorm
LOGVAR = (-30.0, 20.0)  # AutoencoderKL's log-variance is clamped to this range
NO_NOISE = -30.0  # log-variance of an encoder that adds no noise
# Old names of the layers of the attention.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# ---- without a network ---------------------------------------------------------------------------


class Identity(nn.Module):
    """No autoencoder: x (B, channels, ...) is its own latent."""

    factor = 1

    def __init__(self, channels=3):
        super().__init__()
        self.config = dict(channels=channels)

    def posterior(self, x):
        """x -> mean, logvar, like x: itself, without noise."""
        return x, torch.full_like(x, NO_NOISE)

    def decode(self, latent):
        return latent

    def normalise(self, latent):
        return latent

    denormalise = normalise


class PatchPCA(nn.Module):
    """The leading principal components of patches of channels x patch x patch pixels.

    latent = W (p - m) for each patch p, where W has latent_channels orthonormal rows, and decode
    gives W^T latent + m. Hence E D = 1, and D E is the orthogonal projection that has the least
    mean square error among all of its rank. Raises ValueError for more components than a patch has
    pixels.
    """

    def __init__(self, channels=3, patch=4, latent_channels=12):
        super().__init__()
        self.config = dict(channels=channels, patch=patch, latent_channels=latent_channels)
        self.factor, dim = patch, channels * patch**2
        if not 1 <= latent_channels <= dim:
            raise ValueError(
                f"a patch of {channels} x {patch} x {patch} pixels has 1 to {dim} components, "
                f"not {latent_channels}"
            )
        self.register_buffer("centre", torch.zeros(dim))  # m
        self.register_buffer("rows", torch.zeros(latent_channels, dim))  # W
        # All eigenvalues. The sum of those that are not kept is a patch's squared error, Delta^2.
        self.register_buffer("variances", torch.zeros(dim))

    @torch.no_grad()
    def fit(self, x):
        """Set W and m from the patches of x (n, channels, H, W) by one eigen-decomposition -> self.

        Raises ValueError for sides that do not divide into patches.
        """
        p = self.patches(x).movedim(1, -1).flatten(0, -2).double()  # (n h w, dim)
        centre = p.mean(0)
        values, vectors = torch.linalg.eigh((p - centre).T @ (p - centre) / len(p))  # ascending
        rows = vectors.flip(1).T[: self.config["latent_channels"]]
        # The largest entry of a row is positive, so that signs do not depend on the machine.
        rows = rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        self.centre.copy_(centre)
        self.rows.copy_(rows)
        self.variances.copy_(values.flip(0).clamp_min(0))
        return self

    def patches(self, x):
        """x (B, channels, H, W) -> (B, dim, H/f, W/f). Raises ValueError for a wrong shape."""
        channels, f = self.config["channels"], self.factor
        if x.dim() != 4 or x.shape[1] != channels or any(size % f for size in x.shape[2:]):
            raise ValueError(
                f"x is {tuple(x.shape)}; patches of {f} need (B, {channels}, H, W) with sides that "
                "divide by it"
            )
        return F.pixel_unshuffle(x, f)

    def posterior(self, x):
        """x (B, channels, H, W) -> mean, logvar, each (B, latent_channels, H/f, W/f): no noise."""
        p = self.patches(x) - self.centre.to(x)[:, None, None]
        mean = torch.einsum("cd,bdhw->bchw", self.rows.to(x), p)
        return mean, torch.full_like(mean, NO_NOISE)

    def decode(self, latent):
        """(B, latent_channels, h, w) -> pixels (B, channels, f h, f w)."""
        p = torch.einsum("cd,bchw->bdhw", self.rows.to(latent), latent)
        p = p + self.centre.to(latent)[:, None, None]
        return F.pixel_shuffle(p, self.factor)

    def normalise(self, latent):
        return latent

    denormalise = normalise


# ---- pieces of AutoencoderKL ---------------------------------------------------------------------


class Resnet(nn.Module):
    """Two convolutions beside a shortcut. (B, channels_in, h, w) -> (B, channels, h, w)."""

    def __init__(self, channels_in, channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, EPS)
        self.norm2 = nn.GroupNorm(groups, channels, EPS)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        same = channels_in == channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)

    def forward(self, h):
        residual = self.conv1(F.silu(self.norm1(h)))
        return self.conv_shortcut(h) + self.conv2(F.silu(self.norm2(residual)))


class Attention(nn.Module):
    """Self-attention of all places with one head, added to its input. Keeps (B, channels, h, w)."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # "to_out.0" in checkpoints

    def forward(self, h):
        places = self.group_norm(h).flatten(2).transpose(1, 2)  # (B, h*w, channels)
        # q, k, v (B, 1, h*w, channels)
        q, k, v = (to(places)[:, None] for to in (self.to_q, self.to_k, self.to_v))
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])  # (B, h*w, channels)
        return h + out.transpose(1, 2).unflatten(2, h.shape[2:])


class Downsample(nn.Module):
    """Halve the sides: (B, C, h, w) -> (B, C, h/2, w/2).

    The padding of one row and one column of zeros is below and to the right.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, h):
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides: (B, C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h):
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """Resnets at one size, then halving (down) or doubling (up), if any."""

    def __init__(self, channels_in, channels, layers, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            [Resnet(channels if i else channels_in, channels, groups) for i in range(layers)]
        )
        self.downsamplers = nn.ModuleList([Downsample(channels)] * down)
        self.upsamplers = nn.ModuleList([Upsample(channels)] * up)

    def forward(self, h):
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            h = layer(h)
        return h


class MidBlock(nn.Module):
    """Resnet, attention if any, resnet, at the smallest size. Keeps (B, channels, h, w)."""

    def __init__(self, channels, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)] * attention)

    def forward(self, h):
        for layer in [self.resnets[0], *self.attentions, self.resnets[1]]:
            h = layer(h)
        return h


class Encoder(nn.Module):
    """Pixels (B, channels_in, H, W) -> mean and log-variance, (B, 2 latent_channels, H/f, W/f).

    AutoencoderKL applies quant_conv to its output.
    """

    def __init__(self, channels_in, latent_channels, widths, layers, groups, attention):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(channels_in, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                Stage(widths[max(i - 1, 0)], w, layers, groups, down=i < last)
                for i, w in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for stage in self.down_blocks:
            h = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """A latent (B, latent_channels, h, w) -> pixels (B, channels_out, f h, f w).

    AutoencoderKL applies post_quant_conv to its input.
    """

    def __init__(self, latent_channels, channels_out, widths, layers, groups, attention):
        super().__init__()
        widths, last = widths[::-1], len(widths) - 1  # from the smallest size to the largest
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, attention)
        self.up_blocks = nn.ModuleList(
            [
                Stage(widths[max(i - 1, 0)], w, layers + 1, groups, up=i < last)
                for i, w in enumerate(widths)
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], channels_out, 3, padding=1)

    def forward(self, latent):
        h = self.mid_block(self.conv_in(latent))
        for stage in self.up_blocks:
            h = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


# ---- AutoencoderKL -------------------------------------------------------------------------------


class AutoencoderKL(nn.Module):
    """Keyword arguments are the keys of diffusers' config.json, kept in `self.config`.

    sample_size and force_upcast change nothing. Raises ValueError for a config that this file does
    not implement. Source: latent diffusion 2112.10752. Names, epsilons, padding and clamp are
    those of diffusers, against which tests compare it on the same random weights.
    """

    def __init__(
        self,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(64,),
        layers_per_block=1,
        act_fn="silu",
        latent_channels=4,
        norm_num_groups=32,
        sample_size=32,
        scaling_factor=0.18215,
        shift_factor=None,
        latents_mean=None,
        latents_std=None,
        force_upcast=True,
        use_quant_conv=True,
        use_post_quant_conv=True,
        mid_block_add_attention=True,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        for name in ("down_block_types", "up_block_types", "block_out_channels"):
            self.config[name] = list(self.config[name])  # what JSON gives back
        widths = self.config["block_out_channels"]
        kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        for name, kind in kinds.items():
            if self.config[name] != [kind] * len(widths):
                raise ValueError(
                    f"{name} = {self.config[name]} is not implemented; "
                    f"it must be {kind!r} for each of block_out_channels = {widths}"
                )
        for name, value in (("act_fn", "silu"), ("latents_mean", None), ("latents_std", None)):
            if self.config[name] != value:
                raise ValueError(
                    f"{name} = {self.config[name]!r} is not implemented; "
                    f"this autoencoder has {value!r}"
                )
        if not widths or any(width % norm_num_groups for width in widths):
            raise ValueError(
                f"block_out_channels = {widths} must be multiples of "
                f"norm_num_groups = {norm_num_groups}, and one at least"
            )
        if not layers_per_block >= 1:
            raise ValueError(f"layers_per_block = {layers_per_block} must be at least 1")
        if not isinstance(scaling_factor, (int, float)) or not scaling_factor > 0:
            raise ValueError(f"scaling_factor = {scaling_factor!r} must be a number above 0")

        self.factor = 2 ** (len(widths) - 1)  # f, sides of the image over sides of its latent
        shape = widths, layers_per_block, norm_num_groups, mid_block_add_attention
        self.encoder = Encoder(in_channels, latent_channels, *shape)
        self.decoder = Decoder(latent_channels, out_channels, *shape)
        self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()
        if use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        if use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.register_load_state_dict_pre_hook(rename_old)

    @staticmethod
    def current_name(key):
        """....query.weight of an attention -> ....to_q.weight; other names stay as they are."""
        path, layer, kind = f"..{key}".rsplit(".", 2)
        if ".attentions." in path and layer in OLD_NAMES:
            return f"{path}.{OLD_NAMES[layer]}.{kind}"[2:]
        return key

    def posterior(self, x):
        """Pixels x (B, in_channels, H, W) -> mean, logvar, each (B, latent_channels, H/f, W/f).

        logvar is clamped to LOGVAR. Raises ValueError for shapes that do not fit.
        """
        channels, f = self.config["in_channels"], self.factor
        if x.dim() != 4 or x.shape[1] != channels or not x.is_floating_point():
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)}; "
                f"pass pixels in [-1, 1], floats of shape (B, {channels}, H, W)"
            )
        if any(size % f or not size for size in x.shape[2:]):
            raise ValueError(f"H, W = {tuple(x.shape[2:])} are not multiples of {f}; crop or pad x")
        moments = self.quant_conv(self.encoder(x.to(self.encoder.conv_in.weight.dtype)))
        mean, logvar = moments.to(x.dtype).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR)

    def encode(self, x, noise=None):
        """Pixels x (B, in_channels, H, W) -> the VAE's own latents (B, latent_channels, H/f, W/f).

        x is in [-1, 1]; the result has its dtype. noise: standard normal of the latent's shape, a
        torch.Generator to draw it from, or None for the mode, which is the mean. Raises ValueError
        for shapes that do not fit.
        """
        mean, logvar = self.posterior(x)
        if noise is None:
            return mean
        if isinstance(noise, torch.Generator):
            where = {"device": noise.device, "dtype": mean.dtype}
            noise = torch.randn(mean.shape, generator=noise, **where).to(mean.device)
        if noise.shape != mean.shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}; "
                f"pass {tuple(mean.shape)}, that of the latent"
            )
        return mean + (logvar / 2).exp() * noise

    def decode(self, latent):
        """The VAE's own latents (B, latent_channels, h, w) -> pixels (B, out_channels, f h, f w).

        They are in [-1, 1] up to overshoot and have the latent's dtype. Raises ValueError for
        shapes that do not fit.
        """
        channels = self.config["latent_channels"]
        if latent.dim() != 4 or latent.shape[1] != channels or not latent.is_floating_point():
            raise ValueError(
                f"the latent is {latent.dtype} {tuple(latent.shape)}; "
                f"pass floats of shape (B, {channels}, h, w)"
            )
        h = self.post_quant_conv(latent.to(self.decoder.conv_in.weight.dtype))
        return self.decoder(h).to(latent.dtype)

    def normalise(self, latent):
        """The VAE's own latents -> z, what a generator sees. Any shape."""
        return (latent - (self.config["shift_factor"] or 0.0)) * self.config["scaling_factor"]

    def denormalise(self, z):
        """Inverse of normalise."""
        return z / self.config["scaling_factor"] + (self.config["shift_factor"] or 0.0)

    def to_latents(self, x, noise=None):
        """Pixels in [-1, 1] -> z (B, latent_channels, H/f, W/f); noise is that of encode."""
        return self.normalise(self.encode(x, noise))

    def to_pixels(self, z):
        """z (B, latent_channels, h, w) -> pixels (B, out_channels, f h, f w), about in [-1, 1]."""
        return self.decode(self.denormalise(z))


def rename_old(vae, state_dict, prefix, *_):
    """Hook of load_state_dict: replace old names of the attention's layers by today's, in place."""
    for key in [k for k in state_dict if k.startswith(prefix) and vae.current_name(k) != k]:
        state_dict[vae.current_name(key)] = state_dict.pop(key)
