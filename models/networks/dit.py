"""A small diffusion transformer over patches of any dimension: images, video, voxels (DiT
2212.09748).

Blocks have adaLN-Zero conditioning, heads of 32 channels with RMS-normalised q and k, and an axial
rotary position beside a learned one per patch. One addition to DiT: a gated copy of the input,
skip(t) x_t per channel, joins the output. Near t = 1 the velocity is eps - x0, most of which is
noise that the network was just given. Passed through the LayerNorms instead, that noise comes back
inexact, and a one-step sample shows the difference as grain.

    net = DiT(size=(16, 16), patch=(4, 4), channels=3, num_classes=10)
    v = net(x_t, t, label=classes)      # t = 0 data, t = 1 noise; v = eps - x0

    symbol    meaning                                                         shape
    x         sample at time t                                                (B, C, *size)
    t         time in [0, 1]                                                  (B,)
    label     class 0 .. K-1, K = null (unconditional)                        (B,)
    context   optional: a picture beside x, such as a masked image or a       (B, C', *size)
              segmentation map (LFM 2307.08698)
    h         tokens, N = prod(size) / prod(patch)                            (B, N, D)

In comments H is the number of heads.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels.linear_attention import use_linear_attention
from models.diffusion import sinusoid
from models.networks import lora
from models.networks.layers import (
    attention,
    check_label,
    check_time,
    context_layer,
    given,
    with_context,
)
from models.networks.sequence import gather_tokens, share_of, split_tokens

HEAD_DIM = 32


# ---- patches and positions -----------------------------------------------------------------------


def patchify(x, patch):
    """(B, C, *size) -> (B, N, C * prod(patch)). In a patch channels come first, then the axes."""
    B, C, *size = x.shape
    split = [
        n for s, p in zip(size, patch, strict=True) for n in (s // p, p)
    ]  # g0, p0, g1, p1, ...
    x = x.reshape(B, C, *split)
    axes = range(len(patch))
    x = x.permute(0, *[2 + 2 * i for i in axes], 1, *[3 + 2 * i for i in axes])
    # (B, *grid, C, *patch)
    return x.flatten(1 + len(patch)).flatten(1, len(patch))


def unpatchify(tokens, channels, size, patch):
    """Inverse of patchify: (B, N, C * prod(patch)) -> (B, C, *size)."""
    grid = [s // p for s, p in zip(size, patch, strict=True)]
    n = len(patch)
    x = tokens.reshape(tokens.shape[0], *grid, channels, *patch)
    x = x.permute(0, n + 1, *[a for i in range(n) for a in (1 + i, n + 2 + i)])
    # (B, C, g0, p0, g1, p1, ...)
    return x.reshape(tokens.shape[0], channels, *size)


def axial_rope(grid, base=100.0):
    """Rotary tables [cos, cos] and [-sin, sin], each (N, 1, 32).

    grid: the number of patches on each axis. A head's 16 pairs (i, i + 16) are shared out evenly
    among the axes, and pairs left over stay unrotated. The base is 100, not 10^4, because these
    grids are only a few patches wide. On the CPU, also while a network is built on the meta device.
    """
    pairs = HEAD_DIM // 2
    per_axis = pairs // len(grid)
    on_cpu = dict(dtype=torch.float32, device="cpu")
    freq = base ** (-torch.arange(per_axis, **on_cpu) / per_axis)
    where = torch.meshgrid(*[torch.arange(g, **on_cpu) for g in grid], indexing="ij")
    angle = torch.cat([w.reshape(-1, 1) * freq for w in where], dim=1)  # (N, per_axis * axes)
    angle = F.pad(angle, (0, pairs - angle.shape[1]))[:, None]  # (N, 1, 16)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """Rotate the pairs (x[..., i], x[..., i + 16]). x (B, N, H, 32); tables of `axial_rope`."""
    y = x.float()
    return torch.addcmul(y * cos, y.roll(HEAD_DIM // 2, -1), sin).to(x.dtype)


# ---- the network ---------------------------------------------------------------------------------


def modulate(x, shift, scale):
    """x (B, N, D) scaled and shifted; shift, scale (B, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Block(nn.Module):
    """Self-attention and MLP, each modulated and gated by the conditioning vector (adaLN-Zero)."""

    def __init__(self, dim, cond_dim):
        super().__init__()
        self.heads = dim // HEAD_DIM
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = lora.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM, eps=1e-6), nn.RMSNorm(HEAD_DIM, eps=1e-6)
        self.proj = lora.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        # GELU by erf: its tanh form takes three times as long on a CPU
        self.mlp = nn.Sequential(lora.Linear(dim, 4 * dim), nn.GELU(), lora.Linear(4 * dim, dim))
        self.modulation = nn.Linear(cond_dim, 6 * dim)
        self.attend = attention  # may be replaced, to give this block another attention, also
        self.attends = {}  # in calls with an adapter alone: {adapter: module, not a parameter here}

    def forward(self, x, c, cos, sin, adapter=None, share=None):
        """x (B, N, D), c (B, cond_dim), cos and sin (N, 1, 32) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        qkv = self.qkv(modulate(self.norm1(x), shift1, scale1), adapter)  # (B, N, 3 D)
        q, k, v = qkv.unflatten(-1, (3, self.heads, HEAD_DIM)).unbind(2)  # (B, N, H, 32)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        attend = self.attends.get(adapter, self.attend)
        mixed = attend(q, k, v, **given(share=share)).flatten(2)
        x = torch.addcmul(x, gate1[:, None], self.proj(mixed, adapter))
        first, act, second = self.mlp  # one by one: nn.Sequential passes no second argument on
        h = first(modulate(self.norm2(x), shift2, scale2), adapter)
        return torch.addcmul(x, gate2[:, None], second(act(h), adapter))


class DiT(nn.Module):
    """Keyword arguments, kept in `self.config`:

    size, patch       sides of a sample and of a patch, tuples of the same length
    channels          C, of a sample
    dim, depth        width, a multiple of 32, and number of blocks
    num_classes       K, 0 = no labels
    cond_dim          width of the conditioning vector, None = dim
    steps_cond        add an embedding of `steps`, which starts at zero
    linear_layers     indices of blocks whose attention is linear, None = none, and
    feature_map       their feature map (students of linvideo.py), and
    feature_dim       the columns of its projections, None = the head size
    context_channels  C', channels of the context, 0 = no context
    context_width     a learned 1x1 convolution first brings the context to so many channels;
                      None = the context as it is
    t_scale           what t is multiplied by in the sinusoids
    world, class_names are only recorded

    Raises ValueError for sizes that do not fit together. A new network returns 0.
    """

    prediction = "flow_v"
    default_shift = 1.0
    cond_names = ("label",)
    sequence = None
    lora_targets = ("qkv", "proj", "mlp.0", "mlp.2")  # in every block

    def __init__(
        self,
        size=(16, 16),
        patch=(4, 4),
        channels=3,
        dim=128,
        depth=4,
        num_classes=10,
        cond_dim=None,
        steps_cond=False,
        world=None,
        class_names=None,
        linear_layers=None,
        feature_map="hedgehog",
        context_channels=0,
        context_width=None,
        t_scale=1000.0,
        feature_dim=None,
    ):
        super().__init__()
        self.config = dict(
            size=list(size),
            patch=list(patch),
            channels=channels,
            dim=dim,
            depth=depth,
            num_classes=num_classes,
            cond_dim=cond_dim,
            steps_cond=steps_cond,
            world=world,
            class_names=class_names,
        )
        if context_channels:
            self.config |= dict(context_channels=context_channels, context_width=context_width)
            self.cond_names = ("label", "context")
        if t_scale != 1000:
            self.config["t_scale"] = t_scale
        if dim % HEAD_DIM:
            raise ValueError(f"DiT width must be a multiple of {HEAD_DIM}, got {dim}")
        if len(size) != len(patch) or any(s % p for s, p in zip(size, patch, strict=True)):
            raise ValueError(f"DiT size {tuple(size)} is not divisible into patches {tuple(patch)}")
        self.size, self.patch, self.channels = tuple(size), tuple(patch), channels
        self.num_classes, self.context_channels = num_classes, context_channels
        self.t_scale = t_scale
        self.latent_shape = (channels, *self.size)
        self.heads, self.head_dim = dim // HEAD_DIM, HEAD_DIM
        cond_dim = cond_dim or dim
        grid = [s // p for s, p in zip(size, patch, strict=True)]
        patch_dim = channels * math.prod(patch)
        context_dim = (context_width or context_channels) * math.prod(patch)

        self.project = context_layer(context_channels, context_width)
        self.embed = nn.Linear(patch_dim + context_dim, dim)
        self.position = nn.Parameter(torch.randn(1, math.prod(grid), dim) * 0.02)
        self.time = nn.Sequential(
            nn.Linear(128, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)
        )
        self.label = nn.Embedding(num_classes + 1, cond_dim) if num_classes else None
        self.steps = nn.Linear(128, cond_dim) if steps_cond else None
        self.blocks = nn.ModuleList([Block(dim, cond_dim) for _ in range(depth)])
        self.final_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(cond_dim, 2 * dim)
        self.final = nn.Linear(dim, patch_dim)
        self.skip = nn.Linear(cond_dim, channels)
        cos, sin = axial_rope(grid)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.gradient_checkpointing = False
        if linear_layers is not None:
            use_linear_attention(self, linear_layers, feature_map, feature_dim)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=1.0)  # as large as the time embedding
        # adaLN-Zero: every block starts as the identity, the network starts at 0, and `steps`
        # starts without effect.
        zero = [b.modulation for b in self.blocks] + [self.final_modulation, self.final, self.skip]
        for module in zero + ([self.steps] if steps_cond else []):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def self_attentions(self):
        """The modules whose attribute `attend` is a block's self-attention, in order."""
        return list(self.blocks)

    def forward(
        self, x, t, label=None, steps=None, return_features=False, adapter=None, context=None
    ):
        """Flow velocity v = eps - x0, (B, C, *size).

        x (B, C, *size); t (B,) float in [0, 1]; label (B,) integer or None = null; steps (B,);
        context (B, context_channels, *size). return_features=True: the output (B, N, D) of block
        depth // 2 instead, and nothing after it is run. adapter: a name of
        models/networks/lora.py, None = the bare network. Raises ValueError for shapes that do not
        fit, an unknown adapter, and steps or context that the network lacks or does not take.
        """
        lora.check(self, adapter)
        shape = (self.channels, *self.size)
        if x.shape[1:] != shape:
            raise ValueError(
                f"DiT expects x of shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}"
            )
        check_time(t, x)
        waves = sinusoid(t * (self.t_scale / 1000), 128)  # sinusoid multiplies by 1000
        c = self.time(waves.to(self.embed.weight.dtype))  # (B, cond_dim)
        if self.label is not None:
            if label is None:
                label = torch.full((x.shape[0],), self.num_classes, device=x.device)
            check_label(label, x, self.num_classes)
            c = c + self.label(label)
        if steps is not None:
            if self.steps is None:
                raise ValueError(
                    "this DiT was built without steps_cond=True and cannot take `steps`"
                )
            c = c + self.steps(sinusoid(steps.float() / 1000, 128).to(c.dtype))
        c = F.silu(c)

        seen = with_context(self.project, x, context, self.context_channels)
        h = self.embed(patchify(seen, self.patch).to(c.dtype)) + self.position  # (B, N, D)
        share = share_of(self.sequence, h.shape[1])
        h = split_tokens(h, share)
        rope = [split_tokens(z, share, dim=0) for z in (self.rope_cos, self.rope_sin)]
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, c, *rope, adapter, share, use_reentrant=False)
            else:
                h = block(h, c, *rope, adapter, share)
            if return_features and i == len(self.blocks) // 2:
                return gather_tokens(h, share)
        shift, scale = self.final_modulation(c).chunk(2, dim=1)
        h = self.final(modulate(self.final_norm(h), shift, scale))  # (B, N, C * prod(patch))
        v = unpatchify(gather_tokens(h, share), self.channels, self.size, self.patch)
        gate = self.skip(c).reshape(-1, self.channels, *[1] * len(self.size))
        return v + gate * x.to(v.dtype)  # (B, C, *size)
