"""The U-Net of ADM (2105.05233): guided-diffusion's UNetModel, and EDM's DhariwalUNet.

An image or latent passes down through levels of half the size each, and up again. A level is a row
of residual blocks, whose second norm time and class scale and shift, some with self-attention
behind them; what the way down computes is concatenated to what the way up has. The released
networks of LFM (2307.08698) for faces, LSUN and ImageNet have this shape, ADM's own on ImageNet,
and EDM's (2206.00364) on ImageNet at 64 x 64.

    net = UNetModel(**LFM_ADM)
    v = net(x_t, t, label=classes)        # x_t = (1 - t) x0 + t eps; t = 1 noise

    symbol   meaning                                                          shape
    x        image, or latent of the VAE * scaling_factor, at time t          (B, C, H, W)
    t        time in [0, 1]                                                   (B,)
    label    class 0 .. K-1; K adds nothing, as zeros do in EDM               (B,)
    h        channels of a level                                              (B, D, H, W)
    emb      embedding of time and class                                      (B, 4 model_channels)

Names are guided-diffusion's. Its 1x1 convolutions of attention, weights (3D, D, 1), are linear
layers here, (3D, D), so that adapters can change them; `from_adm` and `to_adm` convert, and nothing
else differs. DhariwalUNet is the same function at the sizes of every release: it orders the rows of
qkv otherwise, transposes the class embedding and has other names (`from_edm`, `to_edm`), and below
128 channels its norms have fewer groups, which is refused. What trains with dropout elsewhere
trains without it here.

Kinds of checkpoint differ in the clock that the sinusoids of time see, and in the output. The two
ends of `forward` convert:

    convention   checkpoint               clock          output           here
    "adm"        guided-diffusion         1000 t - 1     eps, variance    eps
    "lfm"        LFM                      t              eps - x0         v = output
    "flow"       latent_fm.py's own       1000 t         eps - x0         v = output
    "edm"        EDM's preconditioning    ln(sigma) / 4  see `forward`    v; sigma = t / (1 - t)

    python -m models.convert --input celeba_f8_adm.safetensors --output LFM-CelebA \\
        --prediction flow_v --noise_at 1 --sample_size 32
    python -m models.convert --input edm-imagenet-64.safetensors --output EDM-64 --prediction edm
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.diffusion import VP, Flow, sinusoid
from models.networks import lora
from models.networks.layers import (
    attention,
    check_image,
    check_label,
    check_time,
    context_layer,
    with_context,
)
from models.networks.unet import GroupNorm, call

GROUPS = 32  # of every norm
# name: (a, b) of the clock a t + b, prediction; EDM's clock is another one
CONVENTIONS = {
    "adm": (1000.0, -1.0, "eps"),
    "lfm": (1.0, 0.0, "flow_v"),
    "flow": (1000.0, 0.0, "flow_v"),
    "edm": (None, None, "flow_v"),
}
SIGMA_DATA, SIGMAS = 0.5, (0.002, 80.0)  # EDM's; it trains and samples within these noise levels

# LFM's networks for latents of 32 x 32. FFHQ, LSUN bedroom and ImageNet have EDM's form; CelebA-HQ
# (256 and 512, there with latents of 64 x 64) and LSUN church guided-diffusion's.
LFM_ADM = dict(
    image_size=32,
    in_channels=4,
    model_channels=256,
    out_channels=4,
    num_res_blocks=2,
    attention_resolutions=[2, 4, 8],
    channel_mult=[1, 2, 3, 4],
    num_classes=0,
    num_heads=1,
    num_head_channels=64,
    use_scale_shift_norm=True,
    resblock_updown=True,
    use_new_attention_order=False,
    convention="lfm",
)
PLAIN = dict(num_heads=4, num_head_channels=-1, resblock_updown=False)
LFM_ADM_CELEBA = dict(LFM_ADM, channel_mult=[1, 2, 2, 2], attention_resolutions=[16, 8], **PLAIN)
LFM_ADM_CELEBA_512 = dict(LFM_ADM_CELEBA, image_size=64, channel_mult=[1, 2, 2, 2, 4])
LFM_ADM_CHURCH = dict(LFM_ADM, attention_resolutions=[16, 8], **PLAIN)
LFM_NETWORKS = {  # names of ours
    "ADM": LFM_ADM,
    "ADM-CelebA": LFM_ADM_CELEBA,
    "ADM-CelebA-512": LFM_ADM_CELEBA_512,
    "ADM-church": LFM_ADM_CHURCH,
}
EDM_IMAGENET_64 = dict(
    LFM_ADM,
    image_size=64,
    in_channels=3,
    model_channels=192,
    out_channels=3,
    num_res_blocks=3,
    num_classes=1000,
    convention="edm",
)


# ---- pieces --------------------------------------------------------------------------------------


class Downsample(nn.Module):
    """(B, D, H, W) -> (B, D, H/2, W/2)."""

    def __init__(self, dim):
        super().__init__()
        self.op = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, h):
        return self.op(h)


class Upsample(nn.Module):
    """(B, D, H, W) -> (B, D, 2H, 2W): pixels are repeated, then smoothed."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, h):
        return self.conv(doubled(h))


def doubled(h):
    """Each pixel four times. (B, D, H, W) -> (B, D, 2H, 2W)"""
    return F.interpolate(h, scale_factor=2, mode="nearest")


def halved(h):
    """The mean of 2 x 2 pixels. (B, D, H, W) -> (B, D, H/2, W/2)"""
    return F.avg_pool2d(h, 2)


class ResBlock(nn.Module):
    """Two convolutions. resample: `halved` or `doubled` where the block changes the size, or None.

    scale_shift: time and class scale and shift the second norm's output; else they are added before
    it.
    """

    def __init__(self, dim_in, dim, emb, scale_shift, resample=None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(
            GroupNorm(GROUPS, dim_in), nn.SiLU(), nn.Conv2d(dim_in, dim, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, (1 + scale_shift) * dim))
        self.out_layers = nn.Sequential(  # the empty one is dropout in checkpoints
            GroupNorm(GROUPS, dim), nn.SiLU(), nn.Identity(), nn.Conv2d(dim, dim, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(dim_in, dim, 1) if dim_in != dim else nn.Identity()
        zero(self.out_layers[3])

    def forward(self, h, emb):
        """h (B, dim_in, H, W), emb (B, E) float32 -> (B, dim, ...)."""
        # Autocast must not lower the precision of scales: float32 weights give float32.
        with torch.autocast(h.device.type, enabled=False):
            emb = self.emb_layers(emb.to(self.emb_layers[1].weight.dtype))  # (B, dim or 2 dim)
        emb = emb.float()[..., None, None]
        z = F.silu(self.in_layers[0](h)).to(h.dtype)
        if self.resample:
            z, h = self.resample(z), self.resample(h)
        z = self.in_layers[2](z)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            normed = self.out_layers[0](z) * (1 + scale) + shift
        else:
            normed = self.out_layers[0](z + emb)
        return self.skip_connection(h) + self.out_layers[3](F.silu(normed).to(z.dtype))


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a level. new_order: rows of qkv are q of all heads, then k,
    then v; else q, k and v of the first head, of the second, and so on."""

    def __init__(self, dim, heads, new_order):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = GroupNorm(GROUPS, dim)
        self.qkv, self.proj_out = lora.Linear(dim, 3 * dim), lora.Linear(dim, dim)
        zero(self.proj_out)

    def forward(self, h, adapter=None):
        """(B, D, H, W) -> the same."""
        z = self.norm(h).to(h.dtype).flatten(2).mT  # (B, N, D)
        shape, axis = ((3, self.heads, -1), 2) if self.new_order else ((self.heads, 3, -1), 3)
        q, k, v = self.qkv(z, adapter).unflatten(2, shape).unbind(axis)  # (B, N, heads, D / heads)
        z = self.proj_out(attention(q, k, v).flatten(2), adapter)
        return h + z.mT.unflatten(2, h.shape[2:])


class Row(nn.Sequential):
    """A residual block, and what stands behind it before the next skip."""

    def forward(self, h, emb, adapter=None):
        """h (B, ., H, W), emb (B, E) -> (B, D, ...)."""
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, AttentionBlock):
                h = layer(h, adapter)
            else:
                h = layer(h)
        return h


def zero(layer):
    """A layer whose output is 0 at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


# ---- the model -----------------------------------------------------------------------------------


class UNetModel(nn.Module):
    """ADM's U-Net. Keyword arguments are those of guided-diffusion's class, kept in `self.config`:

    image_size               side of a sample; others that divide are taken too
    in_channels              C, and those of the context
    model_channels           width of the first level, a multiple of 32; channel_mult: of each level
    out_channels             C, or 2 C with a learned variance, which is dropped
    num_res_blocks           of a level on the way down; there is one more on the way up
    attention_resolutions    halvings of the levels with attention: 1, 2, 4, ...
    num_classes              K, 0 without
    num_heads                of attention; num_head_channels, unless -1, is the width of each
    use_scale_shift_norm, resblock_updown, use_new_attention_order   as there

    Additions: convention (see above); context_channels and context_width, as in
    models/networks/dit.py. Raises ValueError for what does not fit together. A new network returns
    0 (with convention "edm" only its inner part does).
    """

    # An instance whose convention is one of velocities has "flow_v" and Flow().
    prediction = "eps"
    default_schedule = VP("linear", 0.0001, 0.02)
    default_shift = 1.0
    latent_shape = (4, 32, 32)
    cond_names = ("label",)
    lora_targets = ("qkv", "proj_out")

    def __init__(
        self,
        image_size=32,
        in_channels=4,
        model_channels=256,
        out_channels=4,
        num_res_blocks=2,
        attention_resolutions=(2, 4, 8),
        channel_mult=(1, 2, 3, 4),
        num_classes=0,
        num_heads=1,
        num_head_channels=-1,
        use_scale_shift_norm=True,
        resblock_updown=False,
        use_new_attention_order=False,
        convention="adm",
        context_channels=0,
        context_width=None,
    ):
        super().__init__()
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        given = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
        added = given.pop("context_channels"), given.pop("context_width")
        self.config = given
        if context_channels:
            self.config |= dict(context_channels=added[0], context_width=added[1])
            self.cond_names = ("label", "context")
        channels = in_channels - (context_width or context_channels)
        check_config(given, channels)
        self.convention, self.context_channels = convention, context_channels
        *_, self.prediction = CONVENTIONS[convention]
        if self.prediction == "flow_v":
            self.default_schedule = Flow()
        self.num_classes = num_classes
        self.latent_shape = (channels, image_size, image_size)
        emb = 4 * model_channels
        self.project = context_layer(context_channels, context_width)
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb)
        )
        self.label_emb = nn.Embedding(num_classes, emb) if num_classes else None
        self.build_levels(emb)
        first = channel_mult[0] * model_channels
        last = nn.Conv2d(first, out_channels, 3, padding=1)
        self.out = nn.Sequential(GroupNorm(GROUPS, first), nn.SiLU(), last)
        zero(self.out[2])
        self.gradient_checkpointing = False

    def build_levels(self, emb):
        """input_blocks, middle_block and output_blocks, by the config. emb: width of emb."""
        c = self.config
        dims, n = [m * c["model_channels"] for m in c["channel_mult"]], c["num_res_blocks"]
        new_order, scale_shift = c["use_new_attention_order"], c["use_scale_shift_norm"]

        def res(dim_in, dim, resample=None):
            return ResBlock(dim_in, dim, emb, scale_shift, resample)

        def attend(dim):
            width = c["num_head_channels"]
            return AttentionBlock(dim, c["num_heads"] if width == -1 else dim // width, new_order)

        def row(dim_in, dim, level):
            attentive = 2**level in c["attention_resolutions"]
            return Row(res(dim_in, dim), *([attend(dim)] if attentive else []))

        self.input_blocks = nn.ModuleList([Row(nn.Conv2d(c["in_channels"], dims[0], 3, padding=1))])
        skips = [dims[0]]  # channels of what the way up gets
        for level, dim in enumerate(dims):
            for _ in range(n):
                self.input_blocks.append(row(skips[-1], dim, level))
                skips.append(dim)
            if level < len(dims) - 1:
                smaller = res(dim, dim, halved) if c["resblock_updown"] else Downsample(dim)
                self.input_blocks.append(Row(smaller))
                skips.append(dim)
        self.middle_block = Row(res(dim, dim), attend(dim), res(dim, dim))
        self.output_blocks, below = nn.ModuleList(), dim
        for level, dim in reversed(list(enumerate(dims))):
            for _ in range(n + 1):
                self.output_blocks.append(row(below + skips.pop(), dim, level))
                below = dim
            if level:
                larger = res(dim, dim, doubled) if c["resblock_updown"] else Upsample(dim)
                self.output_blocks[-1].append(larger)

    @property
    def gathered(self):
        """What is gathered one at a time where the network is shared out over ranks."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    @staticmethod
    def lora_key(name):
        """input_blocks.4.1.qkv -> base_model.model.input_blocks.4.1.qkv, peft's name in a file."""
        return f"base_model.model.{name}"

    def embed(self, clock, label):
        """Time and class. clock (B,), label (B,) or None -> emb (B, 4 model_channels) float32."""
        dtype = self.time_embed[0].weight.dtype
        with torch.autocast(clock.device.type, enabled=False):
            waves = sinusoid(clock, self.config["model_channels"], scale=1.0)
            emb = self.time_embed(waves.to(dtype))
            if self.label_emb is not None and label is not None:
                known = (label != self.num_classes)[:, None]
                rows = self.label_emb(label.where(known[:, 0], 0))  # which refuses other labels
                emb = emb + torch.where(known, rows, torch.zeros_like(rows))
        return emb.float()

    def forward(self, x, t, label=None, return_features=False, adapter=None, context=None):
        """The flow velocity v = eps - x0, or with convention "adm" eps, like x, in x's dtype.

        x (B, C, H, W), whose sides divide by 2 once for each level after the first; t (B,) float in
        [0, 1], t = 0 data, t = 1 noise; label (B,) integer, None or num_classes for the null label;
        context (B, context_channels, H, W) where there is one. Computed in the weights' dtype or in
        autocast's. return_features=True: the output (B, N, D) of middle_block instead, and nothing
        after it is run. adapter: a name of models/networks/lora.py, None = the bare network. Raises
        ValueError, one line with cause and remedy, for shapes that do not fit.

        With convention "edm", EDM's denoiser D of (x / (1 - t), sigma), its Eq. 7, is in v,

            v = (x - D) / t = ((t - a s^2) z - s F(z, ln(sigma) / 4)) / r,

        where a = 1 - t, sigma = t / a, s = SIGMA_DATA, r^2 = t^2 + a^2 s^2 and z = x / r.
        """
        check_image(x, self.latent_shape[0], 2 ** (len(self.config["channel_mult"]) - 1))
        check_time(t, x)
        if label is not None:
            check_label(label, x, self.num_classes)
        lora.check(self, adapter)
        z, clock = x, t.float()
        if self.convention == "edm":
            a, s = 1 - clock, SIGMA_DATA
            r = (clock**2 + (a * s) ** 2).sqrt()
            z = x / r[:, None, None, None].to(x.dtype)
            sigma = (clock / a.clamp_min(1e-9)).clamp(*SIGMAS)
            scale, shift = (clock - a * s**2) / r, -s / r  # v = scale z + shift F
            clock = sigma.log() / 4
        else:
            rate, offset, _ = CONVENTIONS[self.convention]
            clock = rate * clock + offset
        emb = self.embed(clock, label)
        seen = with_context(self.project, z, context, self.context_channels)
        out = self.inside(seen, emb, return_features, adapter)
        if return_features:
            return out
        out = out[:, : x.shape[1]]
        if self.convention == "edm":
            scale, shift = (v[:, None, None, None] for v in (scale, shift))
            return (scale * z.float() + shift * out.float()).to(x.dtype)
        return out.to(x.dtype)

    def inside(self, x, emb, return_features, adapter):
        """The U-Net itself. x (B, in_channels, H, W) -> (B, out_channels, H, W), or features."""
        h, skips, recompute = x.to(self.out[2].weight.dtype), [], self.gradient_checkpointing
        for row in self.input_blocks:
            h = call(row, recompute, h, emb, adapter)
            skips.append(h)
        h = call(self.middle_block, recompute, h, emb, adapter)
        if return_features:
            return h.flatten(2).mT  # (B, N, D)
        for row in self.output_blocks:
            h = call(row, recompute, torch.cat([h, skips.pop()], dim=1), emb, adapter)
        return self.out[2](F.silu(self.out[0](h)).to(h.dtype))


def check_config(c, channels):
    """Raises ValueError, one line, for a config that is not implemented. c: as in self.config.

    channels: of a sample.
    """
    if c["convention"] not in CONVENTIONS:
        known = ", ".join(map(repr, CONVENTIONS))
        raise ValueError(f"convention = {c['convention']!r} is unknown; known are {known}")
    if channels < 1 or c["out_channels"] not in (channels, 2 * channels):
        raise ValueError(
            f"out_channels = {c['out_channels']} is not implemented; ADM has as many as a sample, "
            f"{channels}, or, with a learned variance, twice that"
        )
    mult, n = c["channel_mult"], c["num_res_blocks"]
    if not all(isinstance(m, int) and m > 0 for m in [*mult, n]) or not mult:
        raise ValueError(f"channel_mult = {mult} and num_res_blocks = {n} must be whole, above 0")
    if c["image_size"] % 2 ** (len(mult) - 1):
        raise ValueError(
            f"image_size = {c['image_size']} cannot be halved {len(mult) - 1} times, once for each "
            f"entry of channel_mult = {mult} but one"
        )
    width = c["model_channels"]
    if width % GROUPS:
        raise ValueError(f"model_channels = {width} must be a multiple of {GROUPS}")
    levels = [m for i, m in enumerate(mult) if 2**i in c["attention_resolutions"]]
    per_head = c["num_head_channels"]
    for dim in (m * width for m in [*levels, mult[-1]]):
        if per_head == 0 or dim % (c["num_heads"] if per_head == -1 else per_head):
            raise ValueError(
                f"{dim} channels do not divide into num_heads = {c['num_heads']} or "
                f"num_head_channels = {per_head}"
            )


# ---- the official layouts ------------------------------------------------------------------------

ONE_BY_ONE = ("qkv.weight", "proj_out.weight")  # convolutions of one pixel there, linear here


def from_adm(state):
    """State dict of guided-diffusion's UNetModel -> that of ours. A prefix "module." is removed."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    flat = {k: v.flatten(1) for k, v in state.items() if k.endswith(ONE_BY_ONE)}
    return state | flat


def to_adm(net):
    """Inverse of from_adm: a UNetModel -> its official state dict, on the CPU.

    The projection of a context is in none of the official layouts: it is refused (ValueError).
    """
    state = {key: value.detach().cpu() for key, value in lora.base_state_dict(net).items()}
    if any(key.startswith("project.") for key in state):
        raise ValueError("its context has a projection, for which the official layout has no name")
    return state | {k: v[..., None] for k, v in state.items() if k.endswith(ONE_BY_ONE)}


def adm_config(state, convention, image_size, heads=None):
    """Keyword arguments of UNetModel for a state dict of guided-diffusion's, from its shapes.

    image_size and heads are not in them; heads None: 4, LFM's, or 64 channels each, ADM's. Raises
    ValueError.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if image_size is None:
        raise ValueError("ADM's weights do not show sample_size: give it")
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    try:
        width, channels = shapes["time_embed.0.weight"][1], shapes["input_blocks.0.0.weight"][1]
        outputs = shapes["out.2.weight"][0]
        mult, rates, n, blocks = up_levels(shapes)
        emb = shapes["middle_block.0.emb_layers.1.weight"][0]
        dim = shapes["middle_block.0.out_layers.3.weight"][0]
    except KeyError as error:
        raise ValueError(f"no tensor {error}: ADM's network has one") from None
    if heads is None and (convention == "lfm" or image_size == 128):
        heads = 4  # as in the flags of LFM's, and of ADM's ImageNet model at 128 x 128
    context = channels - outputs if channels > outputs else 0
    return dict(
        image_size=image_size,
        in_channels=channels,
        model_channels=width,
        out_channels=outputs,
        num_res_blocks=n,
        attention_resolutions=rates,
        channel_mult=[m // width for m in mult],
        num_classes=shapes.get("label_emb.weight", (0,))[0],
        num_heads=heads or 1,
        num_head_channels=-1 if heads else 64,
        use_scale_shift_norm=emb == 2 * dim,
        resblock_updown=blocks,
        use_new_attention_order=False,
        convention=convention,
        **({"context_channels": context} if context else {}),
    )


def up_levels(shapes):
    """What the way up shows of ADM's levels, from the shapes of a state dict.

    -> widths of the levels, halvings of those with attention, num_res_blocks, whether residual
    blocks change the size. Raises KeyError.
    """
    count = 1 + max((int(k.split(".")[1]) for k in shapes if k.startswith("output_b")), default=-1)
    ends, residual = [], False
    for i in range(count):
        inside = {k.split(".", 3)[3] for k in shapes if k.startswith(f"output_blocks.{i}.")}
        later = [
            k for k in shapes if k.startswith((f"output_blocks.{i}.1", f"output_blocks.{i}.2"))
        ]
        blocks = any(".in_layers." in k for k in later)
        if blocks or "conv.weight" in inside:
            ends, residual = [*ends, i], residual or blocks
    n = (ends or [count - 1])[0]
    rows = range(count - 1, -1, -(n + 1))  # the last of each level, from the first level on
    mult = [shapes[f"output_blocks.{i}.0.out_layers.3.weight"][0] for i in rows]
    rates = [2**k for k, i in enumerate(rows) if f"output_blocks.{i}.1.qkv.weight" in shapes]
    return mult, rates, n, residual


# Parts of a block of EDM's, and where they are in ours: in the residual block or its attention.
EDM_BLOCK = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
EDM_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}
EDM_OUTER = {
    "map_layer0": "time_embed.0",
    "map_layer1": "time_embed.2",
    "map_label": "label_emb",
    "out_norm": "out.0",
    "out_conv": "out.2",
}


def edm_places(config):
    """{module of EDM's: ours} for the network of this config, and pairs (theirs, ours) of blocks.

    -> {layer of theirs: layer of ours}, for every layer that may have parameters.
    """
    levels, n = len(config["channel_mult"]), config["num_res_blocks"]
    sides = [config["image_size"] >> level for level in range(levels)]
    names = [f"{side}x{side}" for side in sides]
    blocks, i = {}, 0  # of theirs: its residual block, its attention
    for level, name in enumerate(names):
        if level:
            blocks[f"enc.{name}_down"], i = (f"input_blocks.{i + 1}.0", None), i + 1
        for k in range(n):
            i += 1
            blocks[f"enc.{name}_block{k}"] = f"input_blocks.{i}.0", f"input_blocks.{i}.1"
    blocks[f"dec.{names[-1]}_in0"] = "middle_block.0", "middle_block.1"
    blocks[f"dec.{names[-1]}_in1"] = "middle_block.2", None
    for j, level in enumerate(reversed(range(levels))):
        if j:
            attends = 2 ** (level + 1) in config["attention_resolutions"]
            blocks[f"dec.{names[level]}_up"] = (
                f"output_blocks.{j * (n + 1) - 1}.{1 + attends}",
                None,
            )
        for k in range(n + 1):
            row = f"output_blocks.{j * (n + 1) + k}"
            blocks[f"dec.{names[level]}_block{k}"] = f"{row}.0", f"{row}.1"
    places = {f"enc.{names[0]}_conv": "input_blocks.0.0", **EDM_OUTER}
    for theirs, (block, attends) in blocks.items():
        places |= {f"{theirs}.{a}": f"{block}.{b}" for a, b in EDM_BLOCK.items()}
        if attends:
            places |= {f"{theirs}.{a}": f"{attends}.{b}" for a, b in EDM_ATTENTION.items()}
    return places


def edm_names(state):
    """The state dict without prefixes and without the fixed filters of EDM's resampling.

    Raises ValueError for other filters than the mean of 2 x 2 pixels.
    """
    state = {k.removeprefix("module.").removeprefix("model."): v for k, v in state.items()}
    for key in [k for k in state if k.endswith("resample_filter")]:
        fixed = state.pop(key)
        if fixed.shape[-2:] != (2, 2) or not torch.allclose(fixed.float(), torch.tensor(0.25)):
            raise ValueError(f"{key} is no mean of 2 x 2 pixels: this is no network of ADM's form")
    return state


def edm_config(state, convention):
    """Keyword arguments of UNetModel for a DhariwalUNet's state dict, from its shapes.

    Raises ValueError.
    """
    shapes = {key: tuple(value.shape) for key, value in edm_names(state).items()}
    sides = sorted({int(k[4:].split("x")[0]) for k in shapes if k.startswith("enc.")})[::-1]
    name = "enc.{0}x{0}_block{1}.{2}.weight"
    try:
        width, side = shapes["map_layer0.weight"][1], sides[0]
        channels = shapes[f"enc.{side}x{side}_conv.weight"][1]
        outputs = shapes["out_conv.weight"][0]
        mult = [shapes[name.format(s, 0, "conv1")][0] // width for s in sides]
    except (KeyError, IndexError) as error:
        raise ValueError(f"no tensor {error}: DhariwalUNet has one") from None
    if width < 4 * GROUPS:
        raise ValueError(
            f"{width} channels: below {4 * GROUPS} EDM's norms have fewer groups than ADM's, "
            f"which have {GROUPS}: convert a network as wide as the released ones"
        )
    context = channels - outputs if channels > outputs else 0
    return dict(
        LFM_ADM,
        image_size=side,
        in_channels=channels,
        model_channels=width,
        out_channels=outputs,
        num_res_blocks=sum(name.format(side, k, "conv1") in shapes for k in range(100)),
        attention_resolutions=[side // s for s in sides if name.format(s, 0, "qkv") in shapes],
        channel_mult=mult,
        num_classes=shapes.get("map_label.weight", (0, 0))[1],
        convention=convention,
        **({"context_channels": context} if context else {}),
    )


def from_edm(state, config):
    """State dict of EDM's DhariwalUNet -> that of ours. config: of `edm_config`.

    Raises ValueError for a key that is none of its own.
    """
    places, out = edm_places(config), {}
    for key, value in edm_names(state).items():
        layer, _, kind = key.rpartition(".")
        if layer not in places:
            raise ValueError(f"{key!r} is no parameter of DhariwalUNet, or is not used in sampling")
        if layer == "map_label":
            value = value.mT.contiguous()
        if layer.endswith((".qkv", ".proj")):
            value = value.flatten(1) if kind == "weight" else value
        if layer.endswith(".qkv"):  # of a head: q, k and v of each channel in turn
            heads = len(value) // 3 // config["num_head_channels"]
            value = value.unflatten(0, (heads, -1, 3)).transpose(1, 2).flatten(0, 2)
        out[f"{places[layer]}.{kind}"] = value
    return out


def to_edm(net):
    """Inverse of from_edm, on the CPU. Raises ValueError for a network of another form."""
    c, state = net.config, to_adm(net)
    if c["num_head_channels"] != 64 or not c["resblock_updown"] or c["use_new_attention_order"]:
        raise ValueError("DhariwalUNet has 64 channels a head and residual blocks that resample")
    out = {}
    for theirs, ours in edm_places(c).items():
        for kind in ("weight", "bias"):
            value = state.get(f"{ours}.{kind}")
            if value is None:
                continue
            if theirs == "map_label":
                value = value.mT.contiguous()
            if theirs.endswith(".qkv"):
                heads = len(value) // 3 // 64
                value = value.unflatten(0, (heads, 3, -1)).transpose(1, 2).flatten(0, 2)
            if theirs.endswith((".qkv", ".proj")) and kind == "weight":
                value = value[..., None]
            out[f"{theirs}.{kind}"] = value
        if theirs.endswith(("_down.conv0", "_down.skip", "_up.conv0", "_up.skip")):
            out[f"{theirs}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    return out
