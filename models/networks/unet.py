"""The U-Net of Stable Diffusion (2112.10752) and SDXL (2307.01952), with diffusers' names.

An image latent (4 channels, 8x smaller sides) passes down through levels of half the size each, and
up again. A level is a row of ResNet blocks, which time shifts, each followed by a transformer over
the pixels: self-attention, cross-attention to the prompt's CLIP tokens, GEGLU. What the way down
computes at a level is concatenated to what the way up has there. Both models are
variance-preserving and predict the noise; Stable Diffusion 2.1 predicts v, which its scheduler/
folder says.

    net = UNet2DConditionModel(**SD_1_5)
    eps = net(x_t, t, text=prompts)                # x_t = alpha(t) x0 + sigma(t) eps; t = 1 noise
    net = UNet2DConditionModel(**SDXL)
    eps = net(x_t, t, text=prompts, pooled=pooled, size=size)

    symbol   meaning                                                        shape
    x        latent at time t, the VAE's * scaling_factor                   (B, 4, H, W)
    t        time in [0, 1]; index i of n betas is t = (i + 1) / n          (B,)
    text     CLIP features, 768 wide, in SDXL 2048 of two encoders          (B, L, D)
    pooled   SDXL: the second encoder's feature of the whole prompt         (B, 1280)
    size     SDXL: height and width of the original image, top and left of  (B, 6)
             the crop, height and width of the image, all in pixels
    h        channels of a level, or its pixels as tokens, row by row       (B, C, H, W), (B, N, C)
    emb      embedding of time, and of pooled and size                      (B, E)

State dicts load into `diffusers.UNet2DConditionModel`, and back, unconverted. Its clock is the
index of its betas, of which every release has n = 1000; `forward` converts ours, and nothing else
does. Another n goes into `clock_steps`.

In configs `attention_head_dim` is the number of heads, of all levels or a list with each level's:
8 in Stable Diffusion 1.5, whose heads differ in width, and 5, 10, 20 in SDXL, with 64 channels
each. upcast_attention (2.1) asks for softmax in float32; fused attention computes it so anyway.

The two ends of a real pipeline, prompts to features and latents to images, are commands:

    python -m models.encode --teacher FOLDER --prompts_txt prompts.txt --output prompts.safetensors
    python -m models.decode --teacher FOLDER --latents samples.safetensors --output runs/images
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.diffusion import VP, sinusoid
from models.networks import lora
from models.networks.layers import (
    LayerNorm,
    TwoLayers,
    attention,
    check_image,
    check_text,
    check_time,
)

DOWN, UP = "DownBlock2D", "UpBlock2D"  # levels without transformers
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
# stable-diffusion-v1-5/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1 (768 x 768, v) and
# stabilityai/stable-diffusion-xl-base-1.0.
SD_1_5 = dict(
    sample_size=64,
    in_channels=4,
    out_channels=4,
    down_block_types=[CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    up_block_types=[UP, CROSS_UP, CROSS_UP, CROSS_UP],
    block_out_channels=[320, 640, 1280, 1280],
    layers_per_block=2,
    norm_num_groups=32,
    norm_eps=1e-5,
    cross_attention_dim=768,
    transformer_layers_per_block=1,
    attention_head_dim=8,
    use_linear_projection=False,
    upcast_attention=False,
    addition_embed_type=None,
    addition_time_embed_dim=None,
    projection_class_embeddings_input_dim=None,
)
SD_2_1 = dict(
    SD_1_5,
    sample_size=96,
    cross_attention_dim=1024,
    attention_head_dim=[5, 10, 20, 20],
    use_linear_projection=True,
    upcast_attention=True,
)
SDXL = dict(
    SD_1_5,
    sample_size=128,
    down_block_types=[DOWN, CROSS_DOWN, CROSS_DOWN],
    up_block_types=[CROSS_UP, CROSS_UP, UP],
    block_out_channels=[320, 640, 1280],
    cross_attention_dim=2048,
    transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20],
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
# Keys that must have these values; null counts as false, zero or null.
FIXED = dict(
    center_input_sample=False,
    flip_sin_to_cos=True,
    freq_shift=0,
    mid_block_type="UNetMidBlock2DCrossAttn",
    only_cross_attention=False,
    downsample_padding=1,
    mid_block_scale_factor=1,
    dropout=0.0,
    act_fn="silu",
    reverse_transformer_layers_per_block=None,
    encoder_hid_dim=None,
    encoder_hid_dim_type=None,
    num_attention_heads=None,
    dual_cross_attention=False,
    class_embed_type=None,
    num_class_embeds=None,
    resnet_time_scale_shift="default",
    resnet_skip_time_act=False,
    resnet_out_scale_factor=1.0,
    time_embedding_type="positional",
    time_embedding_dim=None,
    time_embedding_act_fn=None,
    timestep_post_act=None,
    time_cond_proj_dim=None,
    conv_in_kernel=3,
    conv_out_kernel=3,
    attention_type="default",
    class_embeddings_concat=False,
    mid_block_only_cross_attention=None,
    cross_attention_norm=None,
)
SIZES = 6  # numbers of `size`


# ---- pieces --------------------------------------------------------------------------------------


class GroupNorm(nn.GroupNorm):
    """GroupNorm that is computed and returned in float32, whatever input and weights are."""

    def forward(self, h):
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(h.float(), self.num_groups, weight, bias, self.eps)


class ResnetBlock2D(nn.Module):
    """Two convolutions, and between them a shift by time."""

    def __init__(self, dim_in, dim, emb, groups, eps):
        super().__init__()
        self.norm1 = GroupNorm(groups, dim_in, eps)
        self.conv1 = nn.Conv2d(dim_in, dim, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb, dim)
        self.norm2 = GroupNorm(groups, dim, eps)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(dim_in, dim, 1) if dim_in != dim else nn.Identity()

    def forward(self, h, emb):
        """h (B, dim_in, H, W), emb (B, E) float32 -> (B, dim, H, W)."""
        shift = self.time_emb_proj(F.silu(emb).to(self.time_emb_proj.weight.dtype))  # (B, dim)
        z = self.conv1(F.silu(self.norm1(h)).to(h.dtype)) + shift[..., None, None]
        z = self.conv2(F.silu(self.norm2(z)).to(h.dtype))
        return self.conv_shortcut(h) + z


class Attention(nn.Module):
    """Multi-head attention of tokens to a context; q, k and v have no bias."""

    def __init__(self, dim, heads, context):
        super().__init__()
        self.heads = heads
        self.to_q = lora.Linear(dim, dim, bias=False)
        self.to_k, self.to_v = (lora.Linear(context, dim, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([lora.Linear(dim, dim)])  # "to_out.0" in checkpoints

    def forward(self, h, context, adapter=None):
        """h (B, N, dim), context (B, M, context) -> (B, N, dim)."""
        q, k, v = self.to_q(h, adapter), self.to_k(context, adapter), self.to_v(context, adapter)
        q, k, v = (z.unflatten(-1, (self.heads, -1)) for z in (q, k, v))  # (B, N, heads, D)
        return self.to_out[0](attention(q, k, v).flatten(2), adapter)


class GEGLU(nn.Module):
    """A linear layer whose second half gates the first (2002.05202). (B, N, dim) -> (B, N, out)."""

    def __init__(self, dim, dim_out):
        super().__init__()
        self.proj = lora.Linear(dim, 2 * dim_out)

    def forward(self, h, adapter=None):
        value, gate = self.proj(h, adapter).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, N, dim) -> (B, N, dim). net.1 is empty: it is dropout in diffusers, and holds a place."""

    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), lora.Linear(4 * dim, dim))

    def forward(self, h, adapter=None):
        return self.net[2](self.net[0](h, adapter), adapter)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, MLP."""

    def __init__(self, dim, heads, context):
        super().__init__()
        self.norm1, self.attn1 = LayerNorm(dim), Attention(dim, heads, dim)
        self.norm2, self.attn2 = LayerNorm(dim), Attention(dim, heads, context)
        self.norm3, self.ff = LayerNorm(dim), FeedForward(dim)

    def forward(self, h, context, adapter=None):
        """h (B, N, dim), context (B, L, context) -> (B, N, dim)."""
        z = self.norm1(h).to(h.dtype)
        h = h + self.attn1(z, z, adapter)
        h = h + self.attn2(self.norm2(h).to(h.dtype), context, adapter)
        return h + self.ff(self.norm3(h).to(h.dtype), adapter)


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a level. linear: the layers before and behind them are
    linear, else convolutions of one pixel, which differ in the shape of their weights alone."""

    def __init__(self, dim, heads, depth, context, groups, linear):
        super().__init__()
        self.norm = GroupNorm(groups, dim, 1e-6)
        self.proj_in = lora.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)
        blocks = [BasicTransformerBlock(dim, heads, context) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = lora.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)

    def forward(self, h, context, adapter=None, recompute=False):
        """h (B, dim, H, W), context (B, L, context) -> (B, dim, H, W). recompute: see `call`."""
        z = self.norm(h).to(h.dtype)
        if isinstance(self.proj_in, nn.Conv2d):
            z = self.proj_in(z).flatten(2).transpose(1, 2)  # (B, N, dim)
        else:
            z = self.proj_in(z.flatten(2).transpose(1, 2), adapter)
        for block in self.transformer_blocks:
            z = call(block, recompute, z, context, adapter)
        if isinstance(self.proj_out, nn.Conv2d):
            return h + self.proj_out(z.transpose(1, 2).unflatten(2, h.shape[2:]))
        return h + self.proj_out(z, adapter).transpose(1, 2).unflatten(2, h.shape[2:])


def call(module, recompute, *inputs):
    """module(*inputs). recompute: in the backward pass once more, instead of storing what is in
    it."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


class Downsample2D(nn.Module):
    """(B, dim, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, h):
        return self.conv(h)


class Upsample2D(nn.Module):
    """(B, dim, H, W) -> (B, dim, *size): pixels are repeated, then smoothed."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, h, size):
        return self.conv(F.interpolate(h, size=size, mode="nearest"))


# ---- levels --------------------------------------------------------------------------------------


class Level(nn.Module):
    """ResNet blocks with these numbers of channels before them, and as many transformers.

    attend: the arguments of each Transformer2DModel, None for a level without.
    """

    def __init__(self, dims_in, dim, resnet, attend, attentions):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D(d, dim, **resnet) for d in dims_in])
        self.attentions = nn.ModuleList()  # of no parameters: checkpoints do not see it
        if attend:
            made = [Transformer2DModel(dim, **attend) for _ in range(attentions)]
            self.attentions.extend(made)


class DownLevel(Level):
    """On the way down. last: nothing is below it."""

    def __init__(self, dim_in, dim, layers, resnet, attend, last):
        super().__init__([dim_in] + [dim] * (layers - 1), dim, resnet, attend, layers)
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(dim)])

    def forward(self, h, emb, context, adapter=None, recompute=False):
        """h (B, dim_in, H, W) -> what goes down (B, dim, ...), and what the way up gets, a list."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = call(resnet, recompute, h, emb)
            if self.attentions:
                h = self.attentions[i](h, context, adapter, recompute)
            skips.append(h)
        for sample in self.downsamplers:
            h = sample(h)
            skips.append(h)
        return h, skips


class MidLevel(Level):
    """The lowest level: a transformer between two ResNet blocks. Its output is `features`."""

    def __init__(self, dim, resnet, attend):
        super().__init__([dim, dim], dim, resnet, attend, 1)

    def forward(self, h, emb, context, adapter=None, recompute=False):
        """h (B, dim, H, W) -> (B, dim, H, W)."""
        h = call(self.resnets[0], recompute, h, emb)
        h = self.attentions[0](h, context, adapter, recompute)
        return call(self.resnets[1], recompute, h, emb)


class UpLevel(Level):
    """On the way up. below: channels of what comes from there; skips: of what is concatenated."""

    def __init__(self, below, dim, skips, resnet, attend, last):
        dims_in = [a + b for a, b in zip([below] + [dim] * (len(skips) - 1), skips, strict=True)]
        super().__init__(dims_in, dim, resnet, attend, len(skips))
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(dim)])

    def forward(self, h, skips, size, emb, context, adapter=None, recompute=False):
        """h (B, below, H, W), skips: (B, ., H, W) each -> (B, dim, *size)."""
        for i, resnet in enumerate(self.resnets):
            h = call(resnet, recompute, torch.cat([h, skips[i]], dim=1), emb)
            if self.attentions:
                h = self.attentions[i](h, context, adapter, recompute)
        for sample in self.upsamplers:
            h = sample(h, size)
        return h


# ---- the model -----------------------------------------------------------------------------------


def check_config(given):
    """Raises ValueError, one line, for a config that is not implemented. given: the arguments."""
    for name, value in FIXED.items():
        if given[name] != value and (given[name] or value):
            raise ValueError(
                f"{name} = {given[name]!r} is not implemented; Stable Diffusion has {value!r}"
            )
    channels, out = given["in_channels"], given["out_channels"]
    if channels != out:
        raise ValueError(
            f"in_channels = {channels} with out_channels = {out} is not implemented (9 are those "
            "of inpainting, 8 of editing and upscaling): give a text-to-image model"
        )
    levels = len(given["block_out_channels"])
    for name, plain in (("down_block_types", DOWN), ("up_block_types", UP)):
        kinds = (plain, f"CrossAttn{plain}")
        wrong = [kind for kind in given[name] if kind not in kinds]
        if wrong:
            raise ValueError(f"{name}: {wrong[0]!r} is not implemented, only {' and '.join(kinds)}")
        if len(given[name]) != levels:
            raise ValueError(f"{name} has {len(given[name])} entries, block_out_channels {levels}")
    for name in ("attention_head_dim", "transformer_layers_per_block", "layers_per_block"):
        value = given[name]
        whole = [value] * levels if isinstance(value, int) else value
        if not all(isinstance(n, int) and n > 0 for n in whole) or len(whole) != levels:
            raise ValueError(
                f"{name} = {value!r} is not implemented: give an integer, or {levels} of them"
            )
    for name in ("sample_size", "norm_num_groups"):
        if given[name] is None:
            raise ValueError(f"{name} = null is not implemented: give an integer")
    if not isinstance(given["cross_attention_dim"], int):
        raise ValueError(
            f"cross_attention_dim = {given['cross_attention_dim']!r} is not implemented: give one "
            "integer for all levels"
        )
    heads = per_level(given["attention_head_dim"], levels)
    for dim, n in zip(given["block_out_channels"], heads, strict=True):
        if dim % n or dim % given["norm_num_groups"]:
            raise ValueError(
                f"block_out_channels: {dim} do not divide into attention_head_dim = {n} heads and "
                f"norm_num_groups = {given['norm_num_groups']}"
            )
    if given["block_out_channels"][0] % 2:
        raise ValueError("block_out_channels: the first must be even, for the sinusoids of time")


def check_addition(kind, width, ids):
    """The width of `pooled`, 0 without it. Raises ValueError, one line. kind, width and ids:
    addition_embed_type, projection_class_embeddings_input_dim and addition_time_embed_dim."""
    if kind not in (None, "text_time"):
        raise ValueError(
            f"addition_embed_type = {kind!r} is not implemented, only null and 'text_time'"
        )
    if kind and width == 5 * (ids or 0) + 1280:
        raise ValueError(
            f"projection_class_embeddings_input_dim = {width} is of SDXL's refiner, which gets an "
            "aesthetic score and five numbers in all and finishes what the base has begun: give "
            "the base, stable-diffusion-xl-base-1.0"
        )
    if kind and (not width or not ids or ids % 2 or width <= SIZES * ids):
        raise ValueError(
            f"projection_class_embeddings_input_dim = {width} must be larger than {SIZES} * "
            f"addition_time_embed_dim = {ids}, which is even: both are of addition_embed_type "
            "'text_time'"
        )
    return width - SIZES * ids if kind else 0


def per_level(value, levels):
    """An integer for all levels, or a list of one for each.  -> list"""
    return [value] * levels if isinstance(value, int) else list(value)


def check_row(name, given, x, width, floats):
    """Raises ValueError unless `given` is (B, width), one row for each of x."""
    wanted = given is not None and given.shape == (x.shape[0], width)
    if not wanted or floats and not given.is_floating_point():
        got = "missing" if given is None else f"{given.dtype} {tuple(given.shape)}"
        kind = "floats" if floats else "numbers"
        raise ValueError(f"{name} is {got}; pass {kind} of shape ({x.shape[0]}, {width})")


class UNet2DConditionModel(nn.Module):
    """Stable Diffusion's U-Net. Keyword arguments are the keys of diffusers' config.json; those
    that it may choose are kept in `self.config`.

    Raises ValueError for a config that this file does not implement. Source: Stable Diffusion
    2112.10752, SDXL 2307.01952. Names, epsilons and the order of operations are those of diffusers,
    against which tests compare it on the same random weights.
    """

    # Only fallbacks: a checkpoint's scheduler/ folder comes first.
    prediction = "eps"
    default_schedule = VP("scaled_linear", 0.00085, 0.012)
    default_shift = 1.0
    clock_steps = 1000  # entries of the schedule's table; a teacher with another table has its own
    latent_shape = (4, 64, 64)  # 512 x 512; an instance has that of its config
    cond_names = ("text",)  # an instance of SDXL also has "pooled" and "size"
    lora_targets = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "attn2.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    )

    def __init__(
        self,
        sample_size=64,
        in_channels=4,
        out_channels=4,
        center_input_sample=False,
        flip_sin_to_cos=True,
        freq_shift=0,
        down_block_types=(CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=(UP, CROSS_UP, CROSS_UP, CROSS_UP),
        only_cross_attention=False,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        downsample_padding=1,
        mid_block_scale_factor=1,
        dropout=0.0,
        act_fn="silu",
        norm_num_groups=32,
        norm_eps=1e-5,
        cross_attention_dim=1280,
        transformer_layers_per_block=1,
        reverse_transformer_layers_per_block=None,
        encoder_hid_dim=None,
        encoder_hid_dim_type=None,
        attention_head_dim=8,
        num_attention_heads=None,
        dual_cross_attention=False,
        use_linear_projection=False,
        class_embed_type=None,
        addition_embed_type=None,
        addition_time_embed_dim=None,
        num_class_embeds=None,
        upcast_attention=False,
        resnet_time_scale_shift="default",
        resnet_skip_time_act=False,
        resnet_out_scale_factor=1.0,
        time_embedding_type="positional",
        time_embedding_dim=None,
        time_embedding_act_fn=None,
        timestep_post_act=None,
        time_cond_proj_dim=None,
        conv_in_kernel=3,
        conv_out_kernel=3,
        projection_class_embeddings_input_dim=None,
        attention_type="default",
        class_embeddings_concat=False,
        mid_block_only_cross_attention=None,
        cross_attention_norm=None,
        addition_embed_type_num_heads=64,  # of another kind of added condition
    ):
        super().__init__()
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        given = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
        check_config(given)
        self.config = {k: v for k, v in given.items() if k in SD_1_5}
        ids = addition_time_embed_dim
        self.pooled_dim = check_addition(
            addition_embed_type, projection_class_embeddings_input_dim, ids
        )
        side = [sample_size] * 2 if isinstance(sample_size, int) else sample_size
        self.latent_shape = (in_channels, *side)
        self.text_dim = cross_attention_dim
        dims = list(block_out_channels)
        emb = 4 * dims[0]
        self.conv_in = nn.Conv2d(in_channels, dims[0], 3, padding=1)
        self.time_embedding = TwoLayers(dims[0], emb, nn.SiLU())
        if self.pooled_dim:
            self.cond_names = ("text", "pooled", "size")
            self.add_embedding = TwoLayers(projection_class_embeddings_input_dim, emb, nn.SiLU())
        self.build_levels(emb)
        self.conv_norm_out = GroupNorm(norm_num_groups, dims[0], norm_eps)
        self.conv_out = nn.Conv2d(dims[0], out_channels, 3, padding=1)
        self.lora_aliases = dict(original_names(self))
        self.gradient_checkpointing = False

    def build_levels(self, emb):
        """down_blocks, mid_block and up_blocks, by the config. emb: width of time's embedding."""
        c = self.config
        dims, n = c["block_out_channels"], len(c["block_out_channels"])
        layers = per_level(c["layers_per_block"], n)
        resnet = dict(emb=emb, groups=c["norm_num_groups"], eps=c["norm_eps"])
        heads, depths = c["attention_head_dim"], c["transformer_layers_per_block"]
        attends = [
            dict(
                heads=head,
                depth=depth,
                context=self.text_dim,
                groups=c["norm_num_groups"],
                linear=c["use_linear_projection"],
            )
            for head, depth in zip(per_level(heads, n), per_level(depths, n), strict=True)
        ]
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, dim_in = [dims[0]], dims[0]  # channels of what the way up gets
        for i, dim in enumerate(dims):
            attend = attends[i] if c["down_block_types"][i] == CROSS_DOWN else None
            last = i == n - 1
            self.down_blocks.append(DownLevel(dim_in, dim, layers[i], resnet, attend, last))
            skips += [dim] * (layers[i] + (not last))
            dim_in = dim
        self.mid_block = MidLevel(dims[-1], resnet, attends[-1])
        below = dims[-1]
        for i, kind in enumerate(c["up_block_types"]):
            level = n - 1 - i
            attend = attends[level] if kind == CROSS_UP else None
            taken = [skips.pop() for _ in range(layers[level] + 1)]
            up = UpLevel(below, dims[level], taken, resnet, attend, last=level == 0)
            self.up_blocks.append(up)
            below = dims[level]

    @property
    def gathered(self):
        """What is gathered one at a time where the network is shared out over ranks: its levels
        are too unequal (one of SDXL's has half of all parameters)."""
        kinds = ResnetBlock2D, BasicTransformerBlock
        return [module for module in self.modules() if isinstance(module, kinds)]

    @staticmethod
    def lora_key(name):
        """down_blocks.0... -> unet.down_blocks.0..., its name in a file.

        StableDiffusionPipeline.load_lora_weights takes such names, and so does SDXL's.
        """
        return f"unet.{name}"

    def embed(self, t, pooled, size):
        """What shifts every block: time, and SDXL's pooled and size.  -> emb (B, E) float32."""
        # Autocast must not lower the precision: float32 weights give float32. bfloat16 weights
        # compute in bfloat16, as in diffusers.
        dtype = self.time_embedding.linear_1.weight.dtype
        with torch.autocast(t.device.type, enabled=False):
            clock = self.clock_steps * t.float() - 1  # the index of the betas, n - 1 = noise
            waves = sinusoid(clock, self.conv_in.out_channels, scale=1.0)
            emb = self.time_embedding(waves.to(dtype))
            if self.pooled_dim:
                ids = self.config["addition_time_embed_dim"]
                waves = sinusoid(size.flatten(), ids, scale=1.0)
                given = torch.cat([pooled.float(), waves.unflatten(0, size.shape).flatten(1)], 1)
                emb = emb + self.add_embedding(given.to(dtype))
        return emb.float()

    def forward(self, x, t, text, pooled=None, size=None, return_features=False, adapter=None):
        """The noise eps in x = alpha(t) x0 + sigma(t) eps, like x, in x's dtype; or v, where the
        checkpoint's scheduler says so.

        x (B, in_channels, H, W), of any size; t (B,) float in [0, 1], also between the indices of
        the betas; text (B, L, cross_attention_dim); pooled (B, pooled_dim) and size (B, 6) in
        pixels where cond_names has them. Computed in the weights' dtype or in autocast's.
        return_features=True: the output (B, N, D) of mid_block instead, and nothing after it is
        run. adapter: a name of models/networks/lora.py, None = the bare network. Raises ValueError,
        one line with cause and remedy, for shapes that do not fit and an unknown adapter.
        """
        check_image(x, self.config["in_channels"], 1)
        check_time(t, x)
        check_text(text, x, self.text_dim)
        if self.pooled_dim:
            check_row("pooled", pooled, x, self.pooled_dim, floats=True)
            check_row("size", size, x, SIZES, floats=False)
        elif pooled is not None or size is not None:
            raise ValueError("this network takes no pooled and no size: pass text alone")
        lora.check(self, adapter)
        emb = self.embed(t, pooled, size)
        h = self.conv_in(x.to(self.conv_in.weight.dtype))  # (B, C, H, W)
        how = emb, text.to(self.conv_in.weight.dtype), adapter, self.gradient_checkpointing

        skips = [h]
        for level in self.down_blocks:
            h, more = level(h, *how)
            skips += more
        h = self.mid_block(h, *how)
        if return_features:
            return h.flatten(2).transpose(1, 2)  # (B, N, D)
        for level in self.up_blocks:
            taken = [skips.pop() for _ in level.resnets]
            size_above = skips[-1].shape[2:] if skips else None  # odd sizes were rounded up
            h = level(h, taken, size_above, *how)

        out = self.conv_out(F.silu(self.conv_norm_out(h)).to(h.dtype))
        return out.to(x.dtype)


# ---- names in LoRA files -------------------------------------------------------------------------


def original_names(net):
    """Pairs (name of a linear layer of a transformer, what it is called in the original U-Net).

    kohya's files for SDXL have these: down_blocks.1.attentions.0 is input_blocks.4.1 there.
    """
    places, count = {}, 0
    for i, level in enumerate(net.down_blocks):
        for j in range(len(level.resnets)):
            places[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{count + 1 + j}.1."
        count += len(level.resnets) + 1
    places["mid_block.attentions.0."], count = "middle_block.1.", 0
    for i, level in enumerate(net.up_blocks):
        for j in range(len(level.resnets)):
            places[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{count + j}.1."
        count += len(level.resnets)
    for name in lora.linears(net):
        for here, there in places.items():
            if name.startswith(here):
                yield name, there + name.removeprefix(here)
