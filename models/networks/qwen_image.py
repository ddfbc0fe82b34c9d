"""Qwen-Image text-to-image transformer, a double-stream MMDiT (2508.02324), with diffusers'
parameter names.

An image latent (16 channels, 8x smaller sides) is cut into patches of 2x2; the prompt is given as
Qwen2.5-VL's features of its tokens. Image and prompt are two streams with weights of their own.
They meet only in attention, which runs over the tokens of both with a 3-D rotary position: the
image is centred at 0, and the prompt follows on the diagonal behind the image's corner. Time enters
as shift, scale and gate of both streams.

    net = QwenImageTransformer2DModel(**QWEN_IMAGE)
    v = net(x_t, t, text=prompts, mask=mask)      # t = 0 data, t = 1 noise; v = eps - x0

    symbol   meaning                                                        shape
    x        latent at time t, (VAE's - mean) / std of each channel         (B, 16, H, W)
    t        time in [0, 1], after the shift                                (B,)
    text     Qwen2.5-VL features, the last hidden state                     (B, L, 3584)
    mask     true or 1 where text is a token of the prompt                  (B, L)
    h        N = H/2 * W/2 tokens of the image, row by row                  (B, N, D)
    c        tokens of the prompt                                           (B, L, D)

diffusers' transformer and pipeline hold the latent packed, (B, N, 64), and its config counts these
64 as in_channels. `QwenImageTransformer2DModel.forward` packs and unpacks, and nothing else does.
State dicts load into `diffusers.QwenImageTransformer2DModel`, and back, unconverted. Adapter files
have diffusers' names, transformer.NAME, which ComfyUI knows too (comfy/lora.py).

The two ends of a real pipeline, prompts to features and latents to images, are commands:

    python -m models.encode --teacher FOLDER --prompts_txt prompts.txt --output prompts.safetensors
    python -m models.decode --teacher FOLDER --latents samples.safetensors --output runs/images
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.networks import lora
from models.networks.dit import patchify, unpatchify
from models.networks.layers import (
    FeedForward,
    LayerNorm,
    RMSNorm,
    TwoLayers,
    attention,
    check_image,
    check_mask,
    check_text,
    check_time,
    modulation,
    rope,
    rotate,
)
from models.networks.sequence import gather_tokens, share_of, split_tokens

# The released size, Qwen/Qwen-Image.
QWEN_IMAGE = dict(
    patch_size=2,
    in_channels=64,
    out_channels=16,
    num_layers=60,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=3584,
    guidance_embeds=False,
    axes_dims_rope=[16, 56, 56],
    zero_cond_t=False,
    use_additional_t_cond=False,
    use_layer3d_rope=False,
)
# Keys of other members of the family: models for editing, for layers, and distilled ones.
OTHERS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
EPS = 1e-6  # of every norm
THETA = 10000.0
TIME_DIM = 256  # width of the sinusoids of time


# ---- pieces --------------------------------------------------------------------------------------


def waves_of(t):
    """Sinusoidal features of 1000 t, as `sinusoid` has them. t (B,) -> (B, TIME_DIM) float32.

    diffusers multiplies by 1000 last. With t = 1 the angle is 1000, where that rounding shows.
    """
    i = torch.arange(TIME_DIM // 2, device=t.device, dtype=torch.float32)
    frequency = torch.exp(-math.log(10000.0) * i / (TIME_DIM // 2))
    angle = 1000 * (t.float()[:, None] * frequency)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, dim) float32."""

    def __init__(self, dim):
        super().__init__()
        self.timestep_embedder = TwoLayers(TIME_DIM, dim, nn.SiLU())

    def forward(self, t):
        # Every block's scale and gate come from here: autocast must not lower their precision.
        with torch.autocast(t.device.type, enabled=False):
            dtype = self.timestep_embedder.linear_1.weight.dtype
            return self.timestep_embedder(waves_of(t).to(dtype)).float()


class JointAttention(nn.Module):
    """Multi-head self-attention over prompt and image together, q and k normalised in each head.

    The layers called add_* and *_added_* are the prompt's.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (lora.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(dim // heads, eps=EPS) for _ in range(2))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            lora.Linear(dim, dim) for _ in range(3)
        )
        self.norm_added_q, self.norm_added_k = (RMSNorm(dim // heads, eps=EPS) for _ in range(2))
        self.to_out = nn.ModuleList([lora.Linear(dim, dim)])  # "to_out.0" in checkpoints
        self.to_add_out = lora.Linear(dim, dim)

    def forward(self, h, c, mask, rotary, shares, adapter=None):
        """h (B, N, dim), c (B, L, dim) -> both changed.

        mask (B, 1, 1, L + N), prompt first, or None; rotary: (cos, sin) of the image and of the
        prompt, each (N or L, 1, D/2); shares: this rank's Share of either's tokens, or None, None.
        """
        of_image = (self.to_q, self.to_k, self.to_v), (self.norm_q, self.norm_k)
        of_text = (
            (self.add_q_proj, self.add_k_proj, self.add_v_proj),
            (self.norm_added_q, self.norm_added_k),
        )

        def qkv(z, layers, norms, rotary, share):
            q, k, v = (to(z, adapter).unflatten(-1, (self.heads, -1)) for to in layers)
            q, k = (rotate(norm(y), *rotary) for norm, y in zip(norms, (q, k)))
            # Rounded once, after norm and rotation.
            all_three = torch.stack([q.to(v.dtype), k.to(v.dtype), v])  # (3, B, N, H, D)
            return all_three if share is None else share.heads(all_three)

        image, text = (
            qkv(h, *of_image, rotary[0], shares[0]),
            qkv(c, *of_text, rotary[1], shares[1]),
        )
        out = attention(*torch.cat([text, image], dim=2), mask)  # (B, L + N, H, D)
        out_c, out_h = out.split([text.shape[2], image.shape[2]], dim=1)
        if shares[0] is not None:
            out_h, out_c = shares[0].tokens(out_h), shares[1].tokens(out_c)
        return self.to_out[0](out_h.flatten(2), adapter), self.to_add_out(out_c.flatten(2), adapter)


class Block(nn.Module):
    """Joint attention, then an MLP for each stream. Norms, modulation and sums are float32."""

    def __init__(self, dim, heads):
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.attn = JointAttention(dim, heads)
        self.img_mlp, self.txt_mlp = FeedForward(dim, 4 * dim), FeedForward(dim, 4 * dim)
        self.img_norm1, self.img_norm2, self.txt_norm1, self.txt_norm2 = (
            LayerNorm(dim, EPS, elementwise_affine=False) for _ in range(4)
        )

    def forward(self, h, c, mask, rotary, shares, time, adapter=None):
        """h (B, N, D), c (B, L, D), time (B, D) float32 -> h, c; others as in JointAttention."""
        # Each (B, 1, D): of attention, then of the MLP.
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(self.img_mod, time, 6)
        shift_c, scale_c, gate_c, *mlp_c = modulation(self.txt_mod, time, 6)

        z_h = (self.img_norm1(h) * (1 + scale) + shift).to(h.dtype)
        z_c = (self.txt_norm1(c) * (1 + scale_c) + shift_c).to(c.dtype)
        z_h, z_c = self.attn(z_h, z_c, mask, rotary, shares, adapter)
        h = (h.float() + gate * z_h).to(h.dtype)
        c = (c.float() + gate_c * z_c).to(c.dtype)

        z_h = (self.img_norm2(h) * (1 + mlp_scale) + mlp_shift).to(h.dtype)
        h = (h.float() + mlp_gate * self.img_mlp(z_h, adapter)).to(h.dtype)
        shift_c, scale_c, gate_c = mlp_c
        z_c = (self.txt_norm2(c) * (1 + scale_c) + shift_c).to(c.dtype)
        c = (c.float() + gate_c * self.txt_mlp(z_c, adapter)).to(c.dtype)
        return h, c


class FinalNorm(nn.Module):
    """A norm that the time scales and shifts. h (B, N, dim), time (B, dim) -> (B, N, dim)."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)
        self.norm = LayerNorm(dim, EPS, elementwise_affine=False)

    def forward(self, h, time):
        scale, shift = modulation(self.linear, F.silu(time), 2)  # each (B, 1, D)
        return (self.norm(h) * (1 + scale) + shift).to(h.dtype)


# ---- the model -----------------------------------------------------------------------------------


class QwenImageTransformer2DModel(nn.Module):
    """Qwen-Image. Keyword arguments are the keys of diffusers' config.json, kept in `self.config`.

    pooled_projection_dim, which configs of older versions of diffusers have, is dropped: nothing
    uses it. Raises ValueError for a config that this file does not implement. Source: Qwen-Image
    2508.02324. Names and epsilons are those of diffusers, against which tests compare it on the
    same random weights.
    """

    prediction = "flow_v"
    default_shift = 3.0  # Phased DMD's. Only a fallback: a checkpoint's scheduler/ comes first.
    latent_shape = (16, 128, 128)  # 1024 x 1024
    cond_names = ("text", "mask")
    sequence = None
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )

    def __init__(
        self,
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=60,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=3584,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
        zero_cond_t=False,
        use_additional_t_cond=False,
        use_layer3d_rope=False,
        pooled_projection_dim=None,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k in QWEN_IMAGE}
        self.config["axes_dims_rope"] = list(axes_dims_rope)  # what JSON gives back
        for name in OTHERS:
            if self.config[name]:
                raise ValueError(
                    f"{name} = {self.config[name]} is not implemented; Qwen-Image, which makes "
                    "images from text alone, has false"
                )
        if patch_size**2 * (out_channels or in_channels) != in_channels:
            raise ValueError(
                f"in_channels = {in_channels} with out_channels = {out_channels} and patch_size = "
                f"{patch_size} is not implemented; in_channels is patch_size^2 times the other"
            )
        if len(axes_dims_rope) != 3 or sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(
                f"axes_dims_rope = {list(axes_dims_rope)} must have three entries and sum to "
                f"attention_head_dim = {attention_head_dim}"
            )
        if any(d % 2 for d in axes_dims_rope):
            raise ValueError(f"axes_dims_rope = {list(axes_dims_rope)} must be even")

        dim = num_attention_heads * attention_head_dim
        self.channels = in_channels // patch_size**2  # of a latent
        self.latent_shape = (self.channels, *self.latent_shape[1:])
        self.patch_size, self.text_dim = patch_size, joint_attention_dim
        self.time_text_embed = TimeEmbedder(dim)
        self.txt_norm = RMSNorm(joint_attention_dim, eps=EPS)
        self.img_in, self.txt_in = nn.Linear(in_channels, dim), nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            [Block(dim, num_attention_heads) for _ in range(num_layers)]
        )
        self.norm_out = FinalNorm(dim)
        self.proj_out = nn.Linear(dim, in_channels)
        self.gradient_checkpointing = False

    def forward(self, x, t, text, mask, return_features=False, adapter=None):
        """Flow velocity v = eps - x0, like x, in x's dtype.

        x (B, C, H, W), unpacked; t (B,) float in [0, 1], t = 0 data, t = 1 noise; text (B, L,
        joint_attention_dim); mask (B, L) bool or integer, true for the tokens of each prompt.
        Computed in the weights' dtype or in autocast's. return_features=True: the image's tokens
        (B, N, D) after block num_layers // 2 instead, and nothing after it is run. adapter: a name
        of models/networks/lora.py, None = the bare network. Raises ValueError, one line with cause
        and remedy, for shapes that do not fit and an unknown adapter.
        """
        check_image(x, self.channels, self.patch_size)
        check_time(t, x)
        check_text(text, x, self.text_dim)
        check_mask("mask", mask, text)
        lora.check(self, adapter)
        patch, dtype = (self.patch_size, self.patch_size), self.img_in.weight.dtype
        time = self.time_text_embed(t.float())  # (B, D)
        h = self.img_in(patchify(x, patch).to(dtype))  # (B, N, D)
        c = self.txt_in(self.txt_norm(text).to(dtype))  # (B, L, D)
        rows, columns = (size // self.patch_size for size in x.shape[2:])
        rotary = self._rotary(rows, columns, text.shape[1], x.device)

        joint = self._joint_mask(mask.bool(), h.shape[1])
        shares = [share_of(self.sequence, z.shape[1]) for z in (h, c)]
        h, c = (split_tokens(z, share) for z, share in zip((h, c), shares))
        rotary = [
            [split_tokens(a, share, dim=0) for a in pair] for pair, share in zip(rotary, shares)
        ]

        inputs = joint, rotary, shares, time, adapter
        for i, block in enumerate(self.transformer_blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h, c = checkpoint(block, h, c, *inputs, use_reentrant=False)
            else:
                h, c = block(h, c, *inputs)
            if return_features and i == len(self.transformer_blocks) // 2:
                return gather_tokens(h, shares[0])

        out = self.proj_out(self.norm_out(gather_tokens(h, shares[0]), time))  # (B, N, p*p*C)
        return unpatchify(out, self.channels, x.shape[2:], patch).to(x.dtype)

    def _joint_mask(self, keep, N):
        """keep (B, L) bool -> (B, 1, 1, L + N), or None if nothing is masked: that is faster."""
        if keep.all():
            return None
        return torch.cat([keep, keep.new_ones(len(keep), N)], dim=1)[:, None, None]

    def _rotary(self, rows, columns, length, device):
        """(cos, sin) of the image's tokens, and of a prompt of this length.

        Positions of the image are (0, row, column), of which (0, 0, 0) is its centre. Those of the
        prompt have the same number on all axes, from half of the image's longer side on.
        """
        row = torch.arange(rows, device=device) - (rows - rows // 2)
        column = torch.arange(columns, device=device) - (columns - columns // 2)
        image = torch.cartesian_prod(torch.zeros_like(row[:1]), row, column)  # (N, 3)
        text = max(rows // 2, columns // 2) + torch.arange(length, device=device)
        dims = self.config["axes_dims_rope"]
        return rope(image, dims, THETA), rope(text[:, None].expand(-1, 3), dims, THETA)
