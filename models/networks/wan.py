"""Wan 2.1 and 2.2 text-to-video transformers (2503.20314), with diffusers' parameter names.

A video latent (16 channels, 4x fewer frames, 8x smaller sides; of Wan 2.2's 5B 48 channels, 16x
smaller sides) is cut into patches of 1x2x2. Every token passes through blocks of self-attention
over all tokens of the clip, with a 3-D rotary position; cross-attention to the prompt's 512 UMT5
tokens; and an MLP. Time enters only as shift, scale and gate of the norms (AdaLN).

    net = WanTransformer3DModel(**WAN_1_3B)
    v = net(x_t, t, text=prompts)      # t = 0 data, t = 1 noise; v = eps - x0

Wan 2.2 A14B is two such networks, one for high and one for low noise: `WanTwoNetworks`, which is
called in the same way.

    symbol   meaning                                                    shape
    x        latent at time t, normalised as the VAE's config says      (B, C, T, H, W)
    t        time in [0, 1], after the shift                            (B,)
    text     UMT5 features, padding set to zero (there is no mask)      (B, L, 4096)
    h        tokens, N = T * (H / 2) * (W / 2), in order T, H, W        (B, N, D)

State dicts load into `diffusers.WanTransformer3DModel`, and back, unconverted. diffusers' clock
runs to 1000; `sinusoid` multiplies ours by 1000, and nothing else does. The two ends of a real
pipeline, prompts to features and latents to videos, are commands:

    python -m models.encode --teacher FOLDER --prompts_txt prompts.txt --output prompts.safetensors
    python -m models.decode --teacher FOLDER --latents samples.safetensors --output runs/videos
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.linear_attention import use_linear_attention
from models.diffusion import sinusoid
from models.networks import lora
from models.networks.layers import (
    Attention,
    FeedForward,
    LayerNorm,
    TwoLayers,
    check_text,
    check_time,
    rope,
    unpatchify,
)
from models.networks.sequence import gather_tokens, share_of, split_tokens
from models.shards import on_some_rank

# The released text-to-video sizes, Wan-AI/Wan2.1-T2V-{1.3B,14B}-Diffusers.
WAN_1_3B = dict(
    patch_size=[1, 2, 2],
    num_attention_heads=12,
    attention_head_dim=128,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    freq_dim=256,
    ffn_dim=8960,
    num_layers=30,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    eps=1e-6,
    image_dim=None,
    added_kv_proj_dim=None,
    rope_max_seq_len=1024,
    pos_embed_seq_len=None,
)
WAN_14B = dict(WAN_1_3B, num_attention_heads=40, ffn_dim=13824, num_layers=40)
# Each of the two networks of Wan-AI/Wan2.2-T2V-A14B-Diffusers, between which boundary_ratio =
# 0.875 decides. The image-to-video A14B (boundary_ratio 0.9) has in_channels = 36: 16 of noise, 4
# of a mask, 16 of the first frame. Those extra inputs are not implemented here.
WAN_A14B = dict(WAN_14B)
# Wan-AI/Wan2.2-TI2V-5B-Diffusers: the same transformer over the latents of another VAE. Its
# pipeline (expand_timesteps) gives each token a time of its own, so that the first frame of
# image-to-video can stay at 0. From text alone all of them are t, and the network is that of one
# time for a sample: so t stays (B,) here, and times for tokens are refused.
WAN_5B = dict(WAN_1_3B, num_attention_heads=24, in_channels=48, out_channels=48, ffn_dim=14336)
LATENT_SHAPE_5B = (48, 31, 44, 80)  # 121 frames of 704 x 1280


# ---- pieces --------------------------------------------------------------------------------------


def rope_3d(frames, height, width, head_dim, device):
    """cos and sin for the tokens of a clip, each (N, 1, head_dim / 2), N = frames * height * width.

    Tokens are in the order T, H, W. Row and column have 2 * (head_dim // 6) channels each, and the
    frame has the rest.
    """
    side = 2 * (head_dim // 6)
    axes = [torch.arange(n, device=device) for n in (frames, height, width)]
    return rope(torch.cartesian_prod(*axes), (head_dim - 2 * side, side, side), 10000.0)


class ConditionEmbedder(nn.Module):
    """Time and prompt to the model's width."""

    def __init__(self, dim, freq_dim, text_dim):
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLayers(freq_dim, dim, nn.SiLU())
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLayers(text_dim, dim, nn.GELU(approximate="tanh"))

    def forward(self, t, text):
        """t (B,) in [0, 1], text (B, L, text_dim) -> time, modulation, context.

        time (B, D) and modulation (B, 6, D) are float32; context is (B, L, D).
        """
        waves = sinusoid(t, self.freq_dim)  # (B, freq_dim); t becomes Wan's 0..1000 in here
        # Every block's scale and gate come from here, so autocast must not lower their precision.
        # time_embedder is float32 also among bfloat16 weights (keep_float32), and time_proj is
        # bfloat16 there, as in diffusers.
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

    def forward(self, h, context, modulation, rope, adapter=None, share=None):
        """h (B, N, D), context (B, L, D), modulation (B, 6, D) float32 -> (B, N, D).

        rope = (cos, sin), as rope_3d gives it; share: see `attention`.
        """
        table = self.scale_shift_table.float() + modulation  # (B, 6, D)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.chunk(6, dim=1)  # each (B, 1, D)

        z = (self.norm1(h) * (1 + scale) + shift).to(h.dtype)
        h = (h.float() + self.attn1(z, z, rope, adapter, share=share) * gate).to(h.dtype)

        z = self.norm2(h).to(h.dtype)
        h = h + self.attn2(z, context, adapter=adapter).to(h.dtype)  # neither gated nor modulated

        z = (self.norm3(h) * (1 + mlp_scale) + mlp_shift).to(h.dtype)
        return (h.float() + self.ffn(z, adapter) * mlp_gate).to(h.dtype)


# Layers of a block that adapters change, and their names in Wan's own checkpoints.
NATIVE_NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
# The rest of a block, and what is outside the blocks. LoRA files of other programs may have full
# differences of these. Wan and diffusers number a block's norms in another order.
OTHER_NATIVE_NAMES = {
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "norm2": "norm3",
    "scale_shift_table": "modulation",
}
NATIVE_NAMES_OUTSIDE = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}


def lora_key(name):
    """blocks.0.attn1.to_q -> diffusion_model.blocks.0.self_attn.q, its name in an adapter file.

    Two programs read this name. diffusers' WanPipeline.load_lora_weights converts keys that start
    with diffusion_model. (loaders/lora_conversion_utils.py); ComfyUI, whose Wan has these names,
    accepts diffusion_model.LAYER.lora_A.weight for any model (comfy/lora.py,
    comfy/weight_adapter/lora.py). name: of a module, or of a parameter that is not called weight or
    bias; what Wan's own checkpoints do not have keeps its name.
    """
    if not name.startswith("blocks."):
        return f"diffusion_model.{NATIVE_NAMES_OUTSIDE.get(name, name)}"
    blocks, i, layer = name.split(".", 2)
    native = NATIVE_NAMES.get(layer) or OTHER_NATIVE_NAMES.get(layer, layer)
    return f"diffusion_model.{blocks}.{i}.{native}"


# ---- the model -----------------------------------------------------------------------------------


class WanTransformer3DModel(nn.Module):
    """Wan. Keyword arguments are the keys of diffusers' config.json, kept in `self.config`.

    One addition: linear_layers, indices of the blocks whose self-attention is linear, with this
    feature_map and feature_dim (students of linvideo.py). image_dim, added_kv_proj_dim and
    pos_embed_seq_len belong to image-to-video checkpoints and must be None. Raises ValueError for a
    config that this file does not implement. Source: Wan 2503.20314. Names, epsilons and what is
    float32 are those of diffusers, against which tests compare it on the same random weights.
    """

    prediction = "flow_v"
    # Wan's generate.py samples text-to-video at shift 5; diffusers advises 3 at 480p and 5 at 720p.
    # Only a fallback: a checkpoint's scheduler/ folder comes first.
    default_shift = 5.0
    # 81 frames of 480 x 832; an instance with 48 channels has that of the 5B.
    latent_shape = (16, 21, 60, 104)
    cond_names = ("text",)
    sequence = None
    # As _keep_in_fp32_modules of diffusers' class, whose `rope` has no parameters here.
    keep_float32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    lora_targets = tuple(NATIVE_NAMES)
    lora_key = staticmethod(lora_key)

    def __init__(
        self,
        patch_size=(1, 2, 2),
        num_attention_heads=40,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=4096,
        freq_dim=256,
        ffn_dim=13824,
        num_layers=40,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        image_dim=None,
        added_kv_proj_dim=None,
        rope_max_seq_len=1024,
        pos_embed_seq_len=None,
        linear_layers=None,
        feature_map="hedgehog",
        feature_dim=None,
    ):
        super().__init__()
        self.config = {
            k: v
            for k, v in locals().items()
            if k not in ("self", "__class__", "linear_layers", "feature_map", "feature_dim")
        }
        self.config["patch_size"] = list(patch_size)  # what JSON gives back
        for name in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if self.config[name] is not None:
                raise ValueError(
                    f"{name} = {self.config[name]} means image-to-video, which is not implemented; "
                    f"use a text-to-video checkpoint ({name} null)"
                )
        if (out_channels or in_channels) < in_channels:
            raise ValueError(
                f"in_channels = {in_channels} with {out_channels} out means image-to-video, which "
                "is not implemented; use a text-to-video checkpoint"
            )
        if len(patch_size) != 3:
            raise ValueError(f"patch_size = {list(patch_size)}: give frames, rows and columns")
        if qk_norm != "rms_norm_across_heads":
            raise ValueError(
                f"qk_norm = {qk_norm!r} is not implemented; Wan uses 'rms_norm_across_heads'"
            )
        if attention_head_dim % 2 or freq_dim % 2:
            raise ValueError(
                f"attention_head_dim {attention_head_dim} and freq_dim {freq_dim} must be even"
            )

        dim = num_attention_heads * attention_head_dim
        self.patch_size, self.text_dim = tuple(patch_size), text_dim
        self.latent_shape = (in_channels, *self.latent_shape[1:])
        if in_channels == WAN_5B["in_channels"]:
            self.latent_shape = LATENT_SHAPE_5B
        self.out_channels = out_channels or in_channels
        self.patch_embedding = nn.Conv3d(in_channels, dim, self.patch_size, stride=self.patch_size)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim)
        self.blocks = nn.ModuleList(
            [
                Block(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps)
                for _ in range(num_layers)
            ]
        )
        self.norm_out = LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, self.out_channels * math.prod(self.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False
        self.heads, self.head_dim = num_attention_heads, attention_head_dim
        if linear_layers is not None:
            use_linear_attention(self, linear_layers, feature_map, feature_dim)

    @property
    def self_attentions(self):
        """The modules whose attribute `attend` is a block's self-attention, in order."""
        return [block.attn1 for block in self.blocks]

    def forward(self, x, t, text, return_features=False, adapter=None):
        """Flow velocity v = eps - x0, (B, out_channels, T, H, W), in x's dtype.

        x (B, in_channels, T, H, W); t (B,) float in [0, 1], t = 0 data, t = 1 noise; text (B, L,
        text_dim). Computed in the weights' dtype or in autocast's. return_features=True: the output
        (B, N, D) of block num_layers // 2 instead, and nothing after it is run. adapter: a name of
        models/networks/lora.py, None = the bare network. Raises ValueError, one line with cause and
        remedy, for shapes that do not fit and an unknown adapter.
        """
        self._check(x, t, text)
        lora.check(self, adapter)
        # Frames, rows and columns of tokens.
        grid = [size // p for size, p in zip(x.shape[2:], self.patch_size, strict=True)]
        rope = rope_3d(*grid, self.config["attention_head_dim"], x.device)
        time, modulation, context = self.condition_embedder(t, text)

        h = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))  # (B, D, T, H/2, W/2)
        h = h.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)
        share = share_of(self.sequence, h.shape[1])
        h = split_tokens(h, share)
        inputs = context, modulation, [split_tokens(z, share, dim=0) for z in rope], adapter, share
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, *inputs, use_reentrant=False)
            else:
                h = block(h, *inputs)
            if return_features and i == len(self.blocks) // 2:
                return gather_tokens(h, share)

        table = self.scale_shift_table.float() + time[:, None]  # (B, 2, D)
        shift, scale = table.chunk(2, dim=1)  # each (B, 1, D)
        h = (self.norm_out(h) * (1 + scale) + shift).to(h.dtype)
        h = gather_tokens(self.proj_out(h), share)  # (B, N, pt*ph*pw*C)
        return unpatchify(h, grid, self.patch_size).to(x.dtype)  # (B, C, T, H, W)

    def _check(self, x, t, text):
        """Raises ValueError for what forward cannot take."""
        c = self.config
        if x.dim() != 5:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; pass a latent (B, {c['in_channels']}, T, H, W)"
            )
        if x.shape[1] != c["in_channels"]:
            raise ValueError(f"x has {x.shape[1]} channels; pass (B, {c['in_channels']}, T, H, W)")
        sizes = list(zip(x.shape[2:], self.patch_size, strict=True))
        if any(size % p for size, p in sizes):
            raise ValueError(
                f"T, H, W = {tuple(x.shape[2:])} do not divide into patches {self.patch_size}; "
                "crop or pad x"
            )
        if any(size // p > c["rope_max_seq_len"] for size, p in sizes):
            raise ValueError(
                f"T, H, W = {tuple(x.shape[2:])} need more than rope_max_seq_len = "
                f"{c['rope_max_seq_len']} positions on one axis; "
                "pass a smaller x or raise rope_max_seq_len"
            )
        if t.dim() == 2:
            raise ValueError(
                f"t has shape {tuple(t.shape)}: times of single tokens are for image-to-video, "
                f"which is not implemented; pass one for each sample, ({x.shape[0]},)"
            )
        check_time(t, x)
        check_text(text, x, c["text_dim"])


class WanTwoNetworks(nn.Module):
    """Wan 2.2 A14B: `high` (folder transformer/) for t >= boundary, `low` (transformer_2/) below
    it.

    It is called like one WanTransformer3DModel; `config` is that of each of the two. An adapter
    added to this network is added to both. `high` and `low` can be called, adapted and saved
    alone, and an adapter file belongs to one of them. Raises ValueError for a boundary outside (0,
    1), networks that differ, and image-to-video.
    """

    prediction = "flow_v"
    default_shift = 12.0  # sample_shift of wan/configs/wan_t2v_A14B.py; only a fallback, as above
    latent_shape = WanTransformer3DModel.latent_shape
    cond_names = WanTransformer3DModel.cond_names
    keep_float32 = WanTransformer3DModel.keep_float32
    lora_targets = WanTransformer3DModel.lora_targets

    def __init__(self, high, low, boundary):
        super().__init__()
        if not 0 < boundary < 1:
            raise ValueError(f"boundary = {boundary}; the networks change at a time within (0, 1)")
        for net in (high, low):
            if not isinstance(net, WanTransformer3DModel):
                raise ValueError(f"a {type(net).__name__} cannot be one of Wan's two networks")
        differ = [
            f"{k} = {high.config.get(k)} and {low.config.get(k)}"
            for k in {**high.config, **low.config}
            if high.config.get(k) != low.config.get(k)
        ]
        if differ:
            raise ValueError(f"the two networks differ: {', '.join(differ)}")
        self.high, self.low, self.boundary = high, low, float(boundary)
        self.config, self.text_dim = high.config, high.text_dim
        self.latent_shape = high.latent_shape

    @property
    def networks(self):
        """The two of them, each of which is shared out over ranks by itself."""
        return [self.high, self.low]

    @property
    def gradient_checkpointing(self):
        """That of both networks."""
        return self.high.gradient_checkpointing and self.low.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on):
        self.high.gradient_checkpointing = self.low.gradient_checkpointing = on

    def lora_key(self, name):
        """Raises ValueError: the names in an adapter file are those of one network."""
        raise ValueError(
            "an adapter file is of one network: save and load those of .high and .low one by one"
        )

    def forward(self, x, t, text, return_features=False, adapter=None):
        """What WanTransformer3DModel returns, each row from the network that its t belongs to.

        A network is given its own rows only, and does not run if it has none. An adapter must
        exist in every network that runs, since the bare network in its place would be another
        function. Networks that are shared out over ranks run on all of them where one has rows for
        them: then a rank without any gives one, whose result is not used. Raises ValueError as
        there.
        """
        self.high._check(x, t, text)
        is_high = t >= self.boundary  # (B,)
        of_high, of_low = is_high.nonzero()[:, 0], (~is_high).nonzero()[:, 0]  # indices of rows
        runs_high, runs_low = on_some_rank(self.high, len(of_high) > 0, len(of_low) > 0)
        if not runs_low:
            return self.high(x, t, text, return_features, adapter)
        if not runs_high:
            return self.low(x, t, text, return_features, adapter)
        parts = []
        for net, own in ((self.high, of_high), (self.low, of_low)):
            i = own if len(own) else of_high.new_zeros(1)  # a row that another rank's call needs
            out = net(x[i], t[i], text[i], return_features, adapter)
            parts.append(out[: len(own)])
        back = torch.cat([of_high, of_low]).argsort()  # where each row of the batch is in parts
        return torch.cat(parts)[back]
