"""Lumina-Image 2.0 text-to-image transformer, a single-stream DiT (2503.21758), with diffusers'
parameter names.

An image latent (16 channels, 8x smaller sides) is cut into patches of 2x2; the prompt is given as
Gemma-2's features of its tokens. Two short stacks of blocks refine each of them alone, of which
only the image's sees the time. Then both pass as one sequence through the main blocks:
self-attention over everything, with a 3-D rotary position and fewer heads of keys and values than
of queries, and a gated MLP, with an RMSNorm before and after each of the two. Time enters as scale
and tanh gate; there is no shift.

    net = Lumina2Transformer2DModel(**LUMINA_2)
    v = net(x_t, t, text=prompts, mask=mask)      # t = 0 data, t = 1 noise; v = eps - x0

    symbol   meaning                                                        shape
    x        latent at time t, (VAE's - shift_factor) * scaling_factor      (B, 16, H, W)
    t        time in [0, 1], after the shift                                (B,)
    text     Gemma-2 features, hidden_states[-2]                            (B, L, 2304)
    mask     true or 1 where text is a token of the prompt                  (B, L)
    h        M prompt tokens, then N image tokens, row by row               (B, M + N, D)

A prompt that is shorter than the longest of the batch, M, is filled up and masked, so that each row
is computed as if it were alone. diffusers puts the image right behind each prompt instead, which is
the same sequence in another order.

State dicts load into `diffusers.Lumina2Transformer2DModel`, and back, unconverted. Its clock runs
from 0 = noise to 1 = data and its output is x0 - eps; `Lumina2Transformer2DModel.forward` reverses
both, and nothing else does. Adapter files have diffusers' names, transformer.NAME.

The two ends of a real pipeline, prompts to features and latents to images, are commands:

    python -m models.encode --teacher FOLDER --prompts_txt prompts.txt --output prompts.safetensors
    python -m models.decode --teacher FOLDER --latents samples.safetensors --output runs/images
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.diffusion import sinusoid
from models.networks import lora
from models.networks.layers import (
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
    unpatchify,
)
from models.networks.sequence import gather_tokens, share_of, split_tokens

# The released size, Alpha-VLLM/Lumina-Image-2.0.
LUMINA_2 = dict(
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=None,
    hidden_size=2304,
    num_layers=26,
    num_refiner_layers=2,
    num_attention_heads=24,
    num_kv_heads=8,
    multiple_of=256,
    ffn_dim_multiplier=None,
    norm_eps=1e-5,
    scaling_factor=1.0,
    axes_dim_rope=[32, 32, 32],
    axes_lens=[300, 512, 512],
    cap_feat_dim=2304,
)
QK_EPS = 1e-5  # epsilon of the norms of q and k, whatever norm_eps is
THETA = 10000.0
WAVES = 256  # width of the sinusoids of time
TIME_DIM = 1024  # width of the time embedding; a narrower model's is its own width


# ---- pieces --------------------------------------------------------------------------------------


class TimeCaptionEmbedder(nn.Module):
    """Time and prompts as the blocks take them."""

    def __init__(self, dim, text_dim, eps):
        super().__init__()
        self.timestep_embedder = TwoLayers(WAVES, min(dim, TIME_DIM), nn.SiLU())
        self.caption_embedder = nn.Sequential(RMSNorm(text_dim, eps=eps), nn.Linear(text_dim, dim))

    def time(self, t):
        """t (B,), 0 = noise, 1 = data -> (B, TIME_DIM) float32."""
        # Every block's scale and gate come from here: autocast must not lower their precision.
        with torch.autocast(t.device.type, enabled=False):
            waves = sinusoid(t / 1000, WAVES)  # which multiplies by 1000; Lumina's waves do not
            dtype = self.timestep_embedder.linear_1.weight.dtype
            return self.timestep_embedder(waves.to(dtype)).float()

    def caption(self, text):
        """text (B, M, text_dim) -> (B, M, dim)."""
        norm, linear = self.caption_embedder
        return linear(norm(text).to(linear.weight.dtype))


class Attention(nn.Module):
    """Multi-head self-attention without biases, with q and k normalised in each head.

    Several heads of queries share a head of keys and values.
    """

    def __init__(self, dim, heads, kv_heads):
        super().__init__()
        self.heads, self.shared = heads, heads // kv_heads
        size = dim // heads
        self.to_q = lora.Linear(dim, dim, bias=False)
        self.to_k, self.to_v = (lora.Linear(dim, kv_heads * size, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList(
            [lora.Linear(dim, dim, bias=False)]
        )  # "to_out.0" in checkpoints
        self.norm_q, self.norm_k = (RMSNorm(size, eps=QK_EPS) for _ in range(2))

    def forward(self, h, mask, rotary, adapter=None, share=None):
        """h (B, N, dim) -> (B, N, dim).

        mask (B, 1, 1, N) or None; rotary = (cos, sin), each (B, N, 1, D/2); share: see `attention`.
        """
        q = self.to_q(h, adapter).unflatten(-1, (self.heads, -1))  # (B, N, H, D)
        k, v = (to(h, adapter).unflatten(-1, (-1, q.shape[-1])) for to in (self.to_k, self.to_v))
        q, k = rotate(self.norm_q(q), *rotary), rotate(self.norm_k(k), *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # rounded once, after norm and rotation
        k, v = (z.repeat_interleave(self.shared, dim=2) for z in (k, v))
        return self.to_out[0](attention(q, k, v, mask, share).flatten(2), adapter)


class FeedForward(nn.Module):
    """SwiGLU without biases: linear_2(silu(linear_1 h) * linear_3 h). (B, N, dim) -> same."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.linear_1 = lora.Linear(dim, hidden, bias=False)
        self.linear_2 = lora.Linear(hidden, dim, bias=False)
        self.linear_3 = lora.Linear(dim, hidden, bias=False)

    def forward(self, h, adapter=None):
        gate = F.silu(self.linear_1(h, adapter))
        return self.linear_2(gate * self.linear_3(h, adapter), adapter)


class ModulatedNorm(nn.Module):
    """The first norm of a block, with the layer that makes all of its modulation from the time."""

    def __init__(self, dim, eps):
        super().__init__()
        self.linear = nn.Linear(min(dim, TIME_DIM), 4 * dim)
        self.norm = RMSNorm(dim, eps=eps)

    def forward(self, h, time):
        """h (B, N, D), time (B, TIME_DIM) -> h, its gate, the MLP's scale and gate, all float32."""
        scale, gate, mlp_scale, mlp_gate = modulation(self.linear, F.silu(time), 4)
        return self.norm(h) * (1 + scale), gate.tanh(), mlp_scale, mlp_gate.tanh()


class Block(nn.Module):
    """Self-attention and MLP, each between two norms.

    modulated: whether the time scales the input of each and gates its output; in the blocks that
    refine prompts it does not. Norms, modulation and residual sums are float32.
    """

    def __init__(self, dim, heads, kv_heads, hidden, eps, modulated=True):
        super().__init__()
        self.attn, self.feed_forward = Attention(dim, heads, kv_heads), FeedForward(dim, hidden)
        self.modulated = modulated
        self.norm1 = ModulatedNorm(dim, eps) if modulated else RMSNorm(dim, eps=eps)
        self.norm2, self.ffn_norm1, self.ffn_norm2 = (RMSNorm(dim, eps=eps) for _ in range(3))

    def forward(self, h, mask, rotary, share, time, adapter=None):
        """h (B, N, D) -> (B, N, D); time (B, TIME_DIM) float32, the others as in Attention."""
        gate, mlp_scale, mlp_gate = 1.0, 0.0, 1.0
        if self.modulated:
            z, gate, mlp_scale, mlp_gate = self.norm1(h, time)
        else:
            z = self.norm1(h)
        z = self.norm2(self.attn(z.to(h.dtype), mask, rotary, adapter, share))
        h = (h.float() + gate * z).to(h.dtype)

        z = (self.ffn_norm1(h) * (1 + mlp_scale)).to(h.dtype)
        z = self.ffn_norm2(self.feed_forward(z, adapter))
        return (h.float() + mlp_gate * z).to(h.dtype)


class FinalLayer(nn.Module):
    """Tokens to patches, scaled by the time. h (B, N, dim), time float32 -> (B, N, dim_out)."""

    def __init__(self, dim, dim_out):
        super().__init__()
        self.linear_1 = nn.Linear(min(dim, TIME_DIM), dim)
        self.norm = LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.linear_2 = nn.Linear(dim, dim_out)

    def forward(self, h, time):
        (scale,) = modulation(self.linear_1, F.silu(time), 1)  # (B, 1, D)
        return self.linear_2((self.norm(h) * (1 + scale)).to(h.dtype))


# ---- the model -----------------------------------------------------------------------------------


class Lumina2Transformer2DModel(nn.Module):
    """Lumina-Image 2.0. Keyword arguments are the keys of diffusers' config.json, kept in
    `self.config`.

    Raises ValueError for a config that this file does not implement. Source: Lumina-Image 2.0
    2503.21758. Names and epsilons are those of diffusers, against which tests compare it on the
    same random weights.
    """

    prediction = "flow_v"
    default_shift = 6.0  # Only a fallback: a checkpoint's scheduler/ folder comes first.
    latent_shape = (16, 128, 128)  # 1024 x 1024; an instance has that of its config
    cond_names = ("text", "mask")
    sequence = None
    # In layers, noise_refiner and context_refiner.
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "feed_forward.linear_1",
        "feed_forward.linear_2",
        "feed_forward.linear_3",
    )

    def __init__(
        self,
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=None,
        hidden_size=2304,
        num_layers=26,
        num_refiner_layers=2,
        num_attention_heads=24,
        num_kv_heads=8,
        multiple_of=256,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=(32, 32, 32),
        axes_lens=(300, 512, 512),
        cap_feat_dim=1024,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        for name in ("axes_dim_rope", "axes_lens"):
            self.config[name] = list(self.config[name])  # what JSON gives back
        self._check_config()
        dim, text_dim = hidden_size, cap_feat_dim
        hidden = 4 * dim if ffn_dim_multiplier is None else int(ffn_dim_multiplier * 4 * dim)
        hidden = -(-hidden // multiple_of) * multiple_of  # rounded up

        self.latent_shape = (in_channels, sample_size, sample_size)
        self.patch_size, self.text_dim = patch_size, text_dim
        patch_dim = patch_size**2 * in_channels
        self.x_embedder = nn.Linear(patch_dim, dim)
        self.time_caption_embed = TimeCaptionEmbedder(dim, text_dim, norm_eps)

        kv_heads = num_kv_heads or num_attention_heads

        def blocks(n, modulated=True):
            how = dim, num_attention_heads, kv_heads, hidden, norm_eps, modulated
            return nn.ModuleList([Block(*how) for _ in range(n)])

        self.noise_refiner = blocks(num_refiner_layers)
        self.context_refiner = blocks(num_refiner_layers, modulated=False)
        self.layers = blocks(num_layers)
        self.norm_out = FinalLayer(dim, patch_dim)
        self.gradient_checkpointing = False

    def _check_config(self):
        """Raises ValueError for what this file does not implement."""
        c = self.config
        if c["out_channels"] not in (None, c["in_channels"]):
            raise ValueError(
                f"out_channels = {c['out_channels']} is not implemented; Lumina-Image 2.0 has as "
                f"many as in_channels = {c['in_channels']}"
            )
        dim, heads = c["hidden_size"], c["num_attention_heads"]
        kv_heads = c["num_kv_heads"] or heads
        if heads % kv_heads:
            raise ValueError(f"num_kv_heads = {kv_heads} must divide num_attention_heads = {heads}")
        axes = c["axes_dim_rope"]
        if dim % heads or sum(axes) != dim // heads or any(d % 2 for d in axes):
            raise ValueError(
                f"axes_dim_rope = {axes} must be even and sum to the width of a head, "
                f"hidden_size / num_attention_heads = {dim} / {heads}"
            )
        if len(axes) != 3 or len(c["axes_lens"]) != 3:
            raise ValueError(
                f"axes_dim_rope = {axes} and axes_lens = {c['axes_lens']} must have three entries"
            )

    def forward(self, x, t, text, mask, return_features=False, adapter=None):
        """Flow velocity v = eps - x0, like x, in x's dtype.

        x (B, in_channels, H, W); t (B,) float in [0, 1], t = 0 data, t = 1 noise; text (B, L,
        cap_feat_dim); mask (B, L) bool or integer, true for the tokens of each prompt, at least
        one. Computed in the weights' dtype or in autocast's. return_features=True: the image's
        tokens (B, N, D) after layers[num_layers // 2] instead, and nothing after it is run.
        adapter: a name of models/networks/lora.py, None = the bare network. Raises ValueError, one
        line with cause and remedy, for shapes that do not fit and an unknown adapter.
        """
        lengths = self._check(x, t, text, mask)
        lora.check(self, adapter)
        p = self.patch_size
        rows, columns = (size // p for size in x.shape[2:])
        N, M = rows * columns, max(lengths)
        n = torch.tensor(lengths, device=x.device)[:, None]  # (B, 1), number of prompt tokens
        time = self.time_caption_embed.time(1 - t.float())  # Lumina's clock: 0 = noise, 1 = data

        h = x.unflatten(3, (columns, p)).unflatten(2, (rows, p))  # (B, C, H/p, p, W/p, p)
        h = h.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, p*p*C)
        h = self.x_embedder(h.to(self.x_embedder.weight.dtype))  # (B, N, D)
        # A prompt's tokens move to the front, in their order.
        first = (~mask.bool()).int().argsort(dim=1, stable=True)[:, :M]
        c = self.time_caption_embed.caption(text.take_along_dim(first[..., None], 1))  # (B, M, D)

        # Positions on three axes. The prompt is at 0, 1, ... of the first. The image is at the next
        # place of the first and at its rows and columns on the others.
        index = torch.arange(M, device=x.device)
        position = torch.zeros(len(x), M + N, 3, dtype=torch.long, device=x.device)
        position[:, :M, 0], position[:, M:, 0] = index, n
        row, column = torch.arange(rows, device=x.device), torch.arange(columns, device=x.device)
        position[:, M:, 1:] = torch.cartesian_prod(row, column)
        # Each (B, M + N, 1, D/2).
        cos, sin = rope(position, self.config["axes_dim_rope"], THETA)

        # If all prompts are M long, nothing needs a mask, and attention is faster without one.
        keep = keep_c = None
        if min(lengths) < M:
            keep_c = (index < n)[:, None, None]  # (B, 1, 1, M)
            keep = F.pad(keep_c, (0, N), value=True)  # (B, 1, 1, M + N)

        def run(block, *inputs):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                return checkpoint(block, *inputs, time, adapter, use_reentrant=False)
            return block(*inputs, time, adapter)

        # Spread over ranks are the image's tokens, and later all; the prompt alone is short.
        share = share_of(self.sequence, N)
        h, *rotary = (split_tokens(z, share) for z in (h, cos[:, M:], sin[:, M:]))
        for block in self.noise_refiner:
            h = run(block, h, None, rotary, share)
        for block in self.context_refiner:
            c = run(block, c, keep_c, [cos[:, :M], sin[:, :M]], None)
        h = torch.cat([c, gather_tokens(h, share)], dim=1)
        share = share_of(self.sequence, M + N)
        h, *rotary = (split_tokens(z, share) for z in (h, cos, sin))
        for i, block in enumerate(self.layers):
            h = run(block, h, keep, rotary, share)
            if return_features and i == len(self.layers) // 2:
                return gather_tokens(h, share)[:, M:]

        out = self.norm_out(gather_tokens(h, share)[:, M:], time)  # (B, N, p*p*C)
        return -unpatchify(out, (rows, columns), (p, p)).to(x.dtype)  # Lumina's own is x0 - eps

    def _check(self, x, t, text, mask):
        """-> number of tokens of each prompt. Raises ValueError for what forward cannot take."""
        c, p = self.config, self.patch_size
        check_image(x, c["in_channels"], p)
        check_time(t, x)
        check_text(text, x, self.text_dim)
        check_mask("mask", mask, text)
        lengths = mask.bool().sum(1).tolist()
        if not all(lengths):
            raise ValueError(
                f"mask has no token in row {lengths.index(0)}; "
                "an empty prompt has those of the system's sentence"
            )
        needs = [max(lengths) + 1, *(size // p for size in x.shape[2:])]
        if any(need > most for need, most in zip(needs, c["axes_lens"], strict=True)):
            raise ValueError(
                f"H, W = {tuple(x.shape[2:])} with {max(lengths)} prompt tokens need {needs} "
                f"positions, axes_lens has {c['axes_lens']}; pass a smaller x or a shorter text"
            )
        return lengths
