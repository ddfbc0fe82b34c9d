"""Wan 2.1 and 2.2 text-to-video transformers (Wan team, 2503.20314), with diffusers' parameter names.

A video latent (16 channels, 4x fewer frames, 8x smaller sides) is cut into patches of 1x2x2, and every token
passes through blocks of: self-attention over all tokens of the clip with a 3-D rotary position,
cross-attention to the prompt's 512 UMT5 tokens, and an MLP. Time enters only as shift, scale and gate of the
norms (AdaLN).

    net = WanTransformer3DModel(**WAN_1_3B)
    v = net(x_t, t, text=prompts)      # t = 0 data, t = 1 noise; v = eps - x0

Wan 2.2 A14B is two such networks, one for high noise and one for low: `WanTwoNetworks`, called alike.

    symbol   meaning                                                    shape
    x        latent at time t, normalised as the VAE's config says      (B, 16, T, H, W)
    t        time in [0, 1], after the shift                            (B,)
    text     UMT5 features, padding set to zero (there is no mask)      (B, L, 4096)
    h        tokens, N = T * (H / 2) * (W / 2), in order T, H, W        (B, N, D)

State dicts load into `diffusers.WanTransformer3DModel`, and back, unconverted. diffusers' clock runs to 1000;
`sinusoid` multiplies ours by 1000, the only place that does. The last part of the file is the two ends of a
real pipeline, prompts to features and latents to pixels, the only code here that needs transformers and
diffusers:

    python -m models.wan encode --teacher FOLDER --prompts_txt prompts.txt --output prompts.safetensors
    python -m models.wan decode --teacher FOLDER --latents samples.safetensors --output runs/videos
"""
import html
import importlib
import math
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.linear_attention import use_linear_attention
from models import lora, pipeline
from models.diffusion import sinusoid

# The released text-to-video sizes, Wan-AI/Wan2.1-T2V-{1.3B,14B}-Diffusers.
WAN_1_3B = dict(
    patch_size=[1, 2, 2], num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16,
    text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=30, cross_attn_norm=True,
    qk_norm="rms_norm_across_heads", eps=1e-6, image_dim=None, added_kv_proj_dim=None, rope_max_seq_len=1024,
    pos_embed_seq_len=None,
)
WAN_14B = dict(WAN_1_3B, num_attention_heads=40, ffn_dim=13824, num_layers=40)
# Each of the two networks of Wan-AI/Wan2.2-T2V-A14B-Diffusers, which change at boundary_ratio 0.875. The
# image-to-video A14B (boundary_ratio 0.9) differs in in_channels = 36, noise + 4 of mask + 16 of the first
# frame; those extra inputs are not implemented here.
WAN_A14B = dict(WAN_14B)


# ---- pieces ------------------------------------------------------------------------------------------------


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v. q (B, N, H, D), k and v (B, M, H, D) -> (B, N, H, D).

    mask (B, 1, 1, M) bool: False for a key that nobody sees; or of q's dtype, added to q k^T / sqrt(D); or None.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, N, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)  # (B, N, H, D)


def rope(position, dims, theta):
    """cos and sin of rotary angles, each (..., 1, sum(dims) / 2) float32; position (..., axes) int.

    A head's channels are pairs (0, 1), (2, 3), ...; the first dims[0] / 2 pairs turn with position[..., 0],
    the next dims[1] / 2 with position[..., 1], and so on. Recomputed at every call, not a buffer:
    `.to(bfloat16)` would round a buffer's angles, and building on the meta device would lose it.
    """
    real = torch.float32 if position.device.type == "mps" else torch.float64  # MPS has no float64
    angles = []
    for axis, dim in enumerate(dims):
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=real, device=position.device) / dim)  # (dim/2,)
        angles.append(position[..., axis, None] * frequency)  # (..., dim/2)
    angle = torch.cat(angles, dim=-1).unsqueeze(-2)  # (..., 1, sum(dims)/2)
    return angle.cos().float(), angle.sin().float()


def rope_3d(frames, height, width, head_dim, device):
    """rope of a clip's tokens, each (N, 1, head_dim / 2), N = frames*height*width, in the order T, H, W.

    Row and column have 2 * (head_dim // 6) channels, the frame the rest.
    """
    side = 2 * (head_dim // 6)
    axes = [torch.arange(n, device=device) for n in (frames, height, width)]
    return rope(torch.cartesian_prod(*axes), (head_dim - 2 * side, side, side), 10000.0)


def rotate(x, cos, sin):
    """Turn each channel pair (2i, 2i+1) of x (B, N, H, D) by its token's angle; cos, sin ([B,] N, 1, D/2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, H, D/2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)  # (B, N, H, D)


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed and returned in float32 whatever the input and the weights are."""

    def forward(self, x):
        w, b = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())
        return F.layer_norm(x.float(), self.normalized_shape, w, b, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed and returned in float32 whatever the input and the weights are."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


class Attention(nn.Module):
    """Multi-head attention with q and k normalised over all heads together ("rms_norm_across_heads"), eps None: not.

    `attend(q, k, v)` on (B, N, H, D) does the mixing and can be replaced per block, by a function or module:
    `net.blocks[i].attn1.attend = linear_attention`. It sees q and k after norm and rotation, and a mask where there is one.
    """

    def __init__(self, dim, heads, eps=None):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = lora.Linear(dim, dim), lora.Linear(dim, dim), lora.Linear(dim, dim)
        self.to_out = nn.ModuleList([lora.Linear(dim, dim)])  # a list because the checkpoint says "to_out.0"
        self.norm_q, self.norm_k = (nn.Identity() if eps is None else RMSNorm(dim, eps=eps) for _ in range(2))
        self.attend = attention

    def forward(self, h, context, rope=None, adapter=None, mask=None):
        """h (B, N, dim) asks, context (B, M, dim) answers -> (B, N, dim). rope = (cos, sin) or None, mask as in attention."""
        q, k = self.norm_q(self.to_q(h, adapter)), self.norm_k(self.to_k(context, adapter))
        v = self.to_v(context, adapter)
        q, k, v = (z.unflatten(-1, (self.heads, -1)) for z in (q, k, v))  # (B, N, H, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        more = () if mask is None else (mask,)
        out = self.attend(q.to(v.dtype), k.to(v.dtype), v, *more)  # rounded once, after norm and rotation
        return self.to_out[0](out.flatten(2), adapter)  # (B, N, dim)


class GELU(nn.Module):
    """Linear, then tanh-approximated GELU. (B, N, dim) -> (B, N, dim_out)."""

    def __init__(self, dim, dim_out):
        super().__init__()
        self.proj = lora.Linear(dim, dim_out)

    def forward(self, h, adapter=None):
        return F.gelu(self.proj(h, adapter), approximate="tanh")


class FeedForward(nn.Module):
    """(B, N, dim) -> (B, N, dim). net.1 is empty (dropout in diffusers): checkpoints say net.0 and net.2."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.net = nn.Sequential(GELU(dim, hidden), nn.Identity(), lora.Linear(hidden, dim))

    def forward(self, h, adapter=None):
        return self.net[2](self.net[0](h, adapter), adapter)  # nn.Sequential hands no second argument down


class TwoLayers(nn.Module):
    """linear_2(act(linear_1(x))). (..., dim_in) -> (..., dim)."""

    def __init__(self, dim_in, dim, act):
        super().__init__()
        self.linear_1, self.act, self.linear_2 = nn.Linear(dim_in, dim), act, nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(self.act(self.linear_1(x)))


class ConditionEmbedder(nn.Module):
    """Time and prompt to the model's width."""

    def __init__(self, dim, freq_dim, text_dim):
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLayers(freq_dim, dim, nn.SiLU())
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLayers(text_dim, dim, nn.GELU(approximate="tanh"))

    def forward(self, t, text):
        """t (B,) in [0, 1], text (B, L, text_dim) -> time (B, D), modulation (B, 6, D), context (B, L, D)."""
        waves = sinusoid(t, self.freq_dim)  # (B, freq_dim) t in [0, 1] becomes Wan's 0..1000 here
        # Every block's scale and gate come from here, so autocast must not lower the precision: float32
        # weights give float32. bfloat16 weights stay bfloat16, as in diffusers.
        with torch.autocast(t.device.type, enabled=False):
            time = self.time_embedder(waves.to(self.time_embedder.linear_1.weight.dtype))  # (B, D)
            modulation = self.time_proj(F.silu(time.to(self.time_proj.weight.dtype)))  # (B, 6D)
        context = self.text_embedder(text.to(self.text_embedder.linear_1.weight.dtype))  # (B, L, D)
        return time.float(), modulation.float().unflatten(1, (6, -1)), context


class Block(nn.Module):
    """Self-attention, cross-attention, MLP. Norms, modulation and residual sums are float32."""

    def __init__(self, dim, ffn_dim, heads, cross_attn_norm, eps):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = Attention(dim, heads, eps)
        self.attn2 = Attention(dim, heads, eps)
        self.norm2 = LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, ffn_dim)
        self.norm3 = LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, h, context, modulation, rope, adapter=None):
        """h (B, N, D), context (B, L, D), modulation (B, 6, D) float32, rope = (cos, sin) -> (B, N, D)."""
        table = self.scale_shift_table.float() + modulation  # (B, 6, D)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.chunk(6, dim=1)  # each (B, 1, D)

        z = (self.norm1(h) * (1 + scale) + shift).to(h.dtype)
        h = (h.float() + self.attn1(z, z, rope, adapter) * gate).to(h.dtype)

        z = self.norm2(h).to(h.dtype)
        h = h + self.attn2(z, context, adapter=adapter).to(h.dtype)  # neither gated nor modulated

        z = (self.norm3(h) * (1 + mlp_scale) + mlp_shift).to(h.dtype)
        return (h.float() + self.ffn(z, adapter) * mlp_gate).to(h.dtype)


# Layers of a block that models/lora.py adapts, and their names in Wan's own checkpoints.
NATIVE_NAMES = {
    **{f"attn1.{ours}": f"self_attn.{o}" for ours, o in zip(("to_q", "to_k", "to_v", "to_out.0"), "qkvo")},
    **{f"attn2.{ours}": f"cross_attn.{o}" for ours, o in zip(("to_q", "to_k", "to_v", "to_out.0"), "qkvo")},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def lora_key(name):
    """blocks.0.attn1.to_q -> diffusion_model.blocks.0.self_attn.q, a layer's name in an adapter file.

    Both sides know this one: diffusers' WanPipeline.load_lora_weights converts keys that start with
    diffusion_model. (loaders/lora_conversion_utils.py), and ComfyUI, whose Wan has these names, takes
    diffusion_model.LAYER.lora_A.weight for any model (comfy/lora.py, comfy/weight_adapter/lora.py).
    models/lora.py reads it back by asking for the key of each of the network's layers.
    """
    blocks, i, layer = name.split(".", 2)
    return f"diffusion_model.{blocks}.{i}.{NATIVE_NAMES[layer]}"


def check_time(t, x):
    """Raises ValueError unless t (B,) is floats, one for each row of x."""
    if t.shape != x.shape[:1] or not t.is_floating_point():
        raise ValueError(f"t is {t.dtype} {tuple(t.shape)}; pass floats in [0, 1] of shape ({x.shape[0]},)")


def check_text(text, x, width):
    """Raises ValueError unless text (B, L, width) has one row for each of x."""
    if text.dim() != 3 or text.shape[0] != x.shape[0] or text.shape[2] != width:
        raise ValueError(f"text has shape {tuple(text.shape)}; pass ({x.shape[0]}, L, {width})")


def check_mask(name, mask, text):
    """Raises ValueError unless mask (B, L) is bool or integers, one for each token of text (B, L, D)."""
    if mask.shape != text.shape[:2] or mask.is_floating_point():
        raise ValueError(f"{name} is {mask.dtype} {tuple(mask.shape)}; pass bool or integers of shape {tuple(text.shape[:2])}")


def check_image(x, channels, patch):
    """Raises ValueError unless x (B, channels, H, W) divides into patches of patch x patch."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}; pass a latent (B, {channels}, H, W)")
    if any(size % patch for size in x.shape[2:]):
        raise ValueError(f"H, W = {tuple(x.shape[2:])} do not divide into patches of {patch} x {patch}; crop or pad x")


def unpatchify(tokens, grid, patch):
    """(B, prod(grid), prod(patch) * C), channels last in a patch -> (B, C, *sizes), size = grid * patch on each axis."""
    n, sizes = len(grid), [g * p for g, p in zip(grid, patch)]
    x = tokens.unflatten(2, (*patch, -1)).unflatten(1, grid)  # (B, *grid, *patch, C)
    x = x.permute(0, 2 * n + 1, *(axis for i in range(n) for axis in (1 + i, 1 + n + i)))  # (B, C, g0, p0, g1, p1, ...)
    return x.reshape(*x.shape[:2], *sizes)


# ---- the model ---------------------------------------------------------------------------------------------


class WanTransformer3DModel(nn.Module):
    """Wan 2.1 text-to-video. Keyword arguments are the keys of diffusers' config.json, kept in `self.config`.

    One addition: linear_layers, indices of blocks whose self-attention is linear, with this feature_map (students of linvideo.py).
    image_dim, added_kv_proj_dim and pos_embed_seq_len belong to image-to-video checkpoints and must be None.
    Raises ValueError for a config this file does not implement. Source: Wan 2503.20314; names, epsilons and
    what is float32 as in diffusers, against which tests compare it on the same random weights.
    """

    prediction = "flow_v"
    # Wan's generate.py samples text-to-video at shift 5; diffusers advises 3
    # at 480p and 5 at 720p. Only a fallback: a checkpoint's scheduler/ folder comes first.
    default_shift = 5.0
    latent_shape = (16, 21, 60, 104)  # 81 frames of 480 x 832
    cond_names = ("text",)
    lora_targets = tuple(NATIVE_NAMES)
    lora_key = staticmethod(lora_key)

    def __init__(
        self, patch_size=(1, 2, 2), num_attention_heads=40, attention_head_dim=128, in_channels=16,
        out_channels=16, text_dim=4096, freq_dim=256, ffn_dim=13824, num_layers=40, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=1e-6, image_dim=None, added_kv_proj_dim=None,
        rope_max_seq_len=1024, pos_embed_seq_len=None, linear_layers=None, feature_map="hedgehog",
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__", "linear_layers", "feature_map")}
        self.config["patch_size"] = list(patch_size)  # what JSON gives back
        for name in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if self.config[name] is not None:
                raise ValueError(
                    f"{name} = {self.config[name]} means image-to-video, which is not implemented; "
                    f"use a text-to-video checkpoint ({name} null)"
                )
        if qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm = {qk_norm!r} is not implemented; Wan uses 'rms_norm_across_heads'")
        if attention_head_dim % 2 or freq_dim % 2:
            raise ValueError(f"attention_head_dim {attention_head_dim} and freq_dim {freq_dim} must be even")

        dim = num_attention_heads * attention_head_dim
        self.patch_size, self.out_channels, self.text_dim = tuple(patch_size), out_channels or in_channels, text_dim
        self.patch_embedding = nn.Conv3d(in_channels, dim, self.patch_size, stride=self.patch_size)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim)
        self.blocks = nn.ModuleList(
            [Block(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps) for _ in range(num_layers)]
        )
        self.norm_out = LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, self.out_channels * math.prod(self.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False
        self.heads, self.head_dim = num_attention_heads, attention_head_dim
        if linear_layers is not None:
            use_linear_attention(self, linear_layers, feature_map)

    @property
    def self_attentions(self):
        """The modules whose attribute `attend` is a layer's self-attention, in order."""
        return [block.attn1 for block in self.blocks]

    def forward(self, x, t, text, return_features=False, adapter=None):
        """Flow velocity v = eps - x0.

        x (B, in_channels, T, H, W); t (B,) float in [0, 1], t = 0 data, t = 1 noise; text (B, L, text_dim).
        Returns v (B, out_channels, T, H, W) in x's dtype, computed in the weights' dtype or in autocast's.
        With return_features=True returns (v, features): the output of block num_layers // 2, (B, N, D).
        adapter names one of models/lora.py, None the bare network. Raises ValueError, one line naming cause
        and remedy, for shapes that do not fit and for an unknown adapter.
        """
        self._check(x, t, text)
        lora.check(self, adapter)
        grid = [size // p for size, p in zip(x.shape[2:], self.patch_size)]  # frames, rows, columns of tokens
        rope = rope_3d(*grid, self.config["attention_head_dim"], x.device)
        time, modulation, context = self.condition_embedder(t, text)

        h = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))  # (B, D, T, H/2, W/2)
        h = h.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, context, modulation, rope, adapter, use_reentrant=False)
            else:
                h = block(h, context, modulation, rope, adapter)
            if i == len(self.blocks) // 2:
                features = h

        shift, scale = (self.scale_shift_table.float() + time[:, None]).chunk(2, dim=1)  # each (B, 1, D)
        h = self.proj_out((self.norm_out(h) * (1 + scale) + shift).to(h.dtype))  # (B, N, pt*ph*pw*C)
        v = unpatchify(h, grid, self.patch_size).to(x.dtype)  # (B, C, T, H, W)
        return (v, features) if return_features else v

    def _check(self, x, t, text):
        c = self.config
        if x.dim() != 5:
            raise ValueError(f"x has shape {tuple(x.shape)}; pass a latent (B, {c['in_channels']}, T, H, W)")
        if x.shape[1] != c["in_channels"]:
            raise ValueError(f"x has {x.shape[1]} channels; pass (B, {c['in_channels']}, T, H, W)")
        if any(size % p for size, p in zip(x.shape[2:], self.patch_size)):
            raise ValueError(
                f"T, H, W = {tuple(x.shape[2:])} do not divide into patches {self.patch_size}; crop or pad x"
            )
        if any(size // p > c["rope_max_seq_len"] for size, p in zip(x.shape[2:], self.patch_size)):
            raise ValueError(
                f"T, H, W = {tuple(x.shape[2:])} need more than rope_max_seq_len = {c['rope_max_seq_len']} "
                "positions on one axis; pass a smaller x or raise rope_max_seq_len"
            )
        check_time(t, x)
        check_text(text, x, c["text_dim"])


class WanTwoNetworks(nn.Module):
    """Wan 2.2 A14B: `high` (folder transformer/) where t >= boundary, `low` (transformer_2/) where t < boundary.

    Called like one WanTransformer3DModel; `config` is that of each of the two. models/lora.py on this network
    adapts both; `high` and `low` can be called, adapted and saved alone, and an adapter file is of one of them.
    Raises ValueError for a boundary outside (0, 1), networks that differ, image-to-video.
    """

    prediction = "flow_v"
    # sample_shift of wan/configs/wan_t2v_A14B.py. Only a fallback, as above.
    default_shift = 12.0
    latent_shape = WanTransformer3DModel.latent_shape
    cond_names = WanTransformer3DModel.cond_names
    lora_targets = WanTransformer3DModel.lora_targets

    def __init__(self, high, low, boundary):
        super().__init__()
        if not 0 < boundary < 1:
            raise ValueError(f"boundary = {boundary}; the networks change at a time within (0, 1)")
        for net in (high, low):
            if not isinstance(net, WanTransformer3DModel):
                raise ValueError(f"a {type(net).__name__} cannot be one of Wan's two networks")
        differ = [f"{k} = {v} and {low.config[k]}" for k, v in high.config.items() if v != low.config[k]]
        if differ:
            raise ValueError(f"the two networks differ: {', '.join(differ)}")
        if high.config["in_channels"] != high.out_channels:
            raise ValueError(
                f"in_channels = {high.config['in_channels']} with {high.out_channels} out means image-to-video, "
                "which is not implemented; use a text-to-video checkpoint"
            )
        self.high, self.low, self.boundary, self.config = high, low, float(boundary), high.config
        self.text_dim = high.text_dim

    @property
    def gradient_checkpointing(self):
        return self.high.gradient_checkpointing and self.low.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on):
        self.high.gradient_checkpointing = self.low.gradient_checkpointing = on

    def lora_key(self, name):
        raise ValueError("an adapter file is of one network: save and load those of .high and .low one by one")

    def forward(self, x, t, text, return_features=False, adapter=None):
        """Flow velocity as WanTransformer3DModel gives it, each row from the network its t belongs to.

        A network sees its own rows only, and does not run without any. An adapter must exist in every network
        that runs: the bare network in its place would be another function. Raises ValueError as there.
        """
        self.high._check(x, t, text)
        is_high = t >= self.boundary  # (B,)
        if is_high.all():
            return self.high(x, t, text, return_features, adapter)
        if not is_high.any():
            return self.low(x, t, text, return_features, adapter)
        rows = [is_high.nonzero()[:, 0], (~is_high).nonzero()[:, 0]]  # of each network
        parts = [
            net(x[i], t[i], text[i], return_features=True, adapter=adapter)
            for net, i in zip((self.high, self.low), rows)
        ]
        back = torch.cat(rows).argsort()  # where each row of the batch is among the parts
        v, features = (torch.cat(part)[back] for part in zip(*parts))
        return (v, features) if return_features else v


# ---- the ends of a real pipeline: prompts to features, latents to pixels -----------------------------------
# Files, flags and the libraries these need, transformers and diffusers, are models/pipeline.py's business.

# The negative prompt that Wan samples with by default (wan/configs/shared_config.py).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def clean_prompt(text):
    """What WanPipeline does to a prompt first: repair (ftfy, where installed), unescape, one line."""
    try:
        text = importlib.import_module("ftfy").fix_text(text)
    except ImportError:
        pass  # optional in diffusers too: only matters for text that was decoded wrongly
    text = html.unescape(html.unescape(text))  # twice: "&amp;lt;" occurs in scraped captions
    return re.sub(r"\s+", " ", text).strip()


def encode_prompts(pipeline_folder, prompts, negative_prompt=NEGATIVE_PROMPT, max_length=512):
    """UMT5 features of prompts (list of N str), as WanPipeline computes them.

    Returns {"cond.text": (N, max_length, D), "uncond.text": (1, max_length, D)} on the CPU in the encoder's
    dtype, D = 4096 in Wan. Rows after a prompt's last token are zero: Wan has no mask and is trained so.
    Longer prompts are cut. Runs on the GPU where there is one. Raises UserError if a library or folder is missing.
    """
    cleaned = [clean_prompt(prompt) for prompt in [*prompts, negative_prompt]]
    text, keep = pipeline.encode_t5("UMT5EncoderModel", pipeline_folder, cleaned, max_length)
    text = text.masked_fill(~keep[..., None], 0)
    return {"cond.text": text[:-1], "uncond.text": text[-1:]}


@torch.no_grad()
def decode_latents(pipeline_folder, x0):
    """Pixels of normalised latents x0 (B, 16, T, H, W) -> uint8 (B, 4T - 3, 3, 8H, 8W) on the CPU.

    The VAE's own latents are x0 * latents_std + latents_mean per channel (its config). Decoded in float32,
    one video at a time, on the GPU where there is one. Raises ValueError for wrong shapes, UserError if
    a library or folder is missing.
    """
    vae = pipeline.load("diffusers", "AutoencoderKLWan", pipeline_folder, "vae", torch_dtype=torch.float32)
    if x0.dim() != 5 or x0.shape[1] != vae.config.z_dim:
        raise ValueError(f"x0 has shape {tuple(x0.shape)}; this VAE needs (B, {vae.config.z_dim}, T, H, W)")
    mean, std = (
        torch.tensor(stat, device=vae.device).view(1, -1, 1, 1, 1)
        for stat in (vae.config.latents_mean, vae.config.latents_std)
    )
    videos = []
    for row in x0.split(1):
        pixels = vae.decode(row.to(vae.device, torch.float32) * std + mean).sample  # (1, 3, T', H', W'), [-1, 1]
        videos.append(pipeline.to_bytes(pixels).transpose(1, 2))
    return torch.cat(videos)  # (B, T', 3, H', W')


def main(argv=None):
    parser, decode = pipeline.parser("wan", "GIFs", "cond.text, uncond.text", "(B, 16, T, H, W)", NEGATIVE_PROMPT)
    decode.add_argument("--fps", type=float, default=16, help="frames per second")
    args = parser.parse_args(argv)
    if args.command == "decode" and args.fps <= 0:
        decode.error(f"--fps is {args.fps}; pass a positive number (Wan: 16)")

    def save(video, path):
        first, *rest = [pipeline.to_image(frame) for frame in video]
        first.save(path, save_all=True, append_images=rest, duration=1000 / args.fps, loop=0)

    pipeline.run(args, encode_prompts, decode_latents, "gif", save)


if __name__ == "__main__":
    main()
