"""TRELLIS (2412.01506), image or text to 3-D in two stages, with its own parameter names: two flow transformers and a voxel autoencoder.

The first stage makes the sparse structure, which of 64^3 voxels an object occupies: a transformer on the dense latent
of that grid, and a convolutional decoder to occupancy. The second makes the structured latent (SLAT), a feature for each
occupied voxel: a transformer on the occupied points alone, within two sparse convolution blocks at either end that
merge and split 2x2x2 voxels. Both see an image by cross-attention to its DINOv2 tokens, and time as shift, scale, gate (AdaLN).

    net = SparseStructureFlowModel(**SS_FLOW_L)
    v = net(x_t, t, tokens=tokens)                      # t = 0 data, t = 1 noise; v = eps - x0, as in TRELLIS
    points = occupied(decoder(x0))                      # where a SparseStructureDecoder sees something
    net = SLatFlowModel(**SLAT_FLOW_L)
    v = net(x_t, t, tokens=tokens, coords=points)

    symbol   meaning                                                                   shape
    x        first stage: the encoder's latent, not normalised                         (B, 8, 16, 16, 16)
    x        second stage: (feature - SLAT_MEAN) / SLAT_STD of the points of a batch   (N, 8)
    coords   of each point: its sample's index in the batch, and x, y, z in 0..63      (N, 4) int
    t        time in [0, 1] of each sample, after the shift                            (B,)
    tokens   DINOv2 tokens; their unconditional twin is zeros                          (B, L, 1024)

A sparse batch is thus two plain tensors, its rows in any order. Whatever is said of samples reaches points by `per_point`:
x_t = (1 - per_point(t, coords)) x0 + per_point(t, coords) eps; `per_sample_mean` goes back. coords is fixed along a
trajectory, as text is: an argument beside tokens, the same for the unconditional twin.

State dicts and files (models/io.py) load into TRELLIS, and back, unconverted. Released weights are float16 within the blocks;
here they become the network's dtype, and use_fp16 is only kept for TRELLIS. Its clock runs to 1000; `sinusoid` multiplies ours by
1000, the only place that does. Forward-mode AD (torch.func.jvp) passes through under sdpa_kernel(SDPBackend.MATH): fused attention
has none. The last part of the file makes tokens of images, and needs transformers:

    python -m models.trellis encode --images FOLDER --output tokens.safetensors
"""
import importlib
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint

from models import io, lora
from models.diffusion import sinusoid
from models.dit import patchify, unpatchify
from models.wan import attention, check_time

# The networks of microsoft/TRELLIS-image-large.
SS_FLOW_L = dict(
    resolution=16, in_channels=8, out_channels=8, model_channels=1024, cond_channels=1024, num_blocks=24, num_heads=16, mlp_ratio=4,
    patch_size=1, pe_mode="ape", qk_rms_norm=True, use_fp16=True,
)
SLAT_FLOW_L = dict(SS_FLOW_L, resolution=64, patch_size=2, num_io_res_blocks=2, io_block_channels=[128])
SS_ENCODER = dict(in_channels=1, latent_channels=8, num_res_blocks=2, num_res_blocks_middle=2, channels=[32, 128, 512], use_fp16=True)
SS_DECODER = dict(out_channels=1, latent_channels=8, num_res_blocks=2, num_res_blocks_middle=2, channels=[512, 128, 32], use_fp16=True)
# Of each channel of the structured latent, from the same: the second stage is trained on (feature - mean) / std.
SLAT_MEAN = (-2.1687545776367188, -0.004347046371549368, -0.13352349400520325, -0.08418072760105133, -0.5271206498146057,
             0.7238689064979553, -1.1414450407028198, 1.2039363384246826)
SLAT_STD = (2.377650737762451, 2.386378288269043, 2.124418020248413, 2.1748552322387695, 2.663944721221924, 2.371192216873169,
            2.6217446327209473, 2.684523105621338)
FIXED = dict(pe_mode="ape", share_mod=False)  # keys that have these values in all released networks
TIME_DIM = 256  # width of the sine features of time


# ---- pieces of both transformers ---------------------------------------------------------------------------


def wide(x):
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def positions(place, dim):
    """Fixed features of places (N, 3) -> (N, dim) float32: of each axis dim // 6 sines, then as many cosines; zeros fill up."""
    waves = dim // 6
    frequency = 10000.0 ** -(torch.arange(waves, device=place.device) / waves)
    angle = place[..., None] * frequency  # (N, 3, waves)
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1), (0, dim - 6 * waves))


def modulation(layers, time, parts):
    """layers(time) in equal parts, each (B, D') in at least float32; time (B, D).

    Autocast must not lower the precision of what scales every token: float32 weights give float32.
    """
    with torch.autocast(time.device.type, enabled=False):
        return wide(layers(time.to(layers[-1].weight.dtype))).chunk(parts, dim=-1)


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed and returned in at least float32 whatever the input and the weights are."""

    def forward(self, x):
        w, b = (None, None) if self.weight is None else (wide(self.weight), wide(self.bias))
        return F.layer_norm(wide(x), self.normalized_shape, w, b, self.eps)


class HeadNorm(nn.Module):
    """RMS norm of each head with a weight per head and channel. (B, N, H, D) -> the same, in at least float32."""

    def __init__(self, heads, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, dim))

    def forward(self, x):
        return F.normalize(wide(x), dim=-1) * self.gamma * x.shape[-1] ** 0.5


class TimeEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, dim) in at least float32."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_DIM, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return modulation(self.mlp, sinusoid(t, TIME_DIM), 1)[0]  # t in [0, 1] becomes TRELLIS's 0..1000 in sinusoid


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves (context_dim None) or to a context.

    `attend(q, k, v)` on (B, N, H, D) does the mixing and can be replaced, as in models/wan.py; it sees a mask where there is one.
    """

    def __init__(self, dim, heads, qk_norm, context_dim=None):
        super().__init__()
        self.heads = heads
        if context_dim is None:
            self.to_qkv = lora.Linear(dim, 3 * dim)
        else:
            self.to_q, self.to_kv = lora.Linear(dim, dim), lora.Linear(context_dim, 2 * dim)
        self.q_rms_norm, self.k_rms_norm = (HeadNorm(heads, dim // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.to_out = lora.Linear(dim, dim)
        self.attend = attention

    def forward(self, h, context=None, mask=None, adapter=None):
        """h (B, N, dim), context (B, M, context_dim) or None, mask (B, 1, 1, M) bool or None, false: unseen -> (B, N, dim)."""
        def split(x, parts):
            return x.unflatten(-1, (parts, self.heads, -1)).unbind(2)  # each (B, N, H, D)

        if context is None:
            q, k, v = split(self.to_qkv(h, adapter), 3)
        else:
            (q,), (k, v) = split(self.to_q(h, adapter), 1), split(self.to_kv(context, adapter), 2)
        q, k = self.q_rms_norm(q).to(v.dtype), self.k_rms_norm(k).to(v.dtype)
        out = self.attend(q, k, v, *(() if mask is None else (mask,)))
        return self.to_out(out.flatten(2), adapter)  # (B, N, dim)


class FeedForward(nn.Module):
    """(B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.mlp = nn.Sequential(lora.Linear(dim, hidden), nn.GELU(approximate="tanh"), lora.Linear(hidden, dim))

    def forward(self, h, adapter=None):
        first, act, second = self.mlp  # called one by one: nn.Sequential hands no second argument down
        return second(act(first(h, adapter)), adapter)


class Block(nn.Module):
    """Self-attention, cross-attention, MLP. Norms, modulation and residual sums are at least float32."""

    def __init__(self, dim, context_dim, heads, mlp_ratio, qk_norm, qk_norm_cross):
        super().__init__()
        self.norm1 = LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.self_attn = Attention(dim, heads, qk_norm)
        self.norm2 = LayerNorm(dim, 1e-6)
        self.cross_attn = Attention(dim, heads, qk_norm_cross, context_dim)
        self.norm3 = LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, h, context, time, mask=None, adapter=None):
        """h (B, N, D), context (B, L, context_dim), time (B, D), mask (B, 1, 1, N) bool or None -> (B, N, D)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (m[:, None] for m in modulation(self.adaLN_modulation, time, 6))

        z = (self.norm1(h) * (1 + scale) + shift).to(h.dtype)
        h = (wide(h) + self.self_attn(z, mask=mask, adapter=adapter) * gate).to(h.dtype)

        z = self.norm2(h).to(h.dtype)
        h = h + self.cross_attn(z, context, adapter=adapter).to(h.dtype)  # neither gated nor modulated

        z = (self.norm3(h) * (1 + mlp_scale) + mlp_shift).to(h.dtype)
        return (wide(h) + self.mlp(z, adapter) * mlp_gate).to(h.dtype)


class Transformer(nn.Module):
    """What the two flow models share: time, blocks, facts about the class."""

    prediction = "flow_v"
    default_shift = 3.0  # rescale_t of both samplers in TRELLIS-image-large's pipeline.json; its networks are trained without
    cond_names = ("tokens",)
    lora_targets = ("self_attn.to_qkv", "self_attn.to_out", "cross_attn.to_q", "cross_attn.to_kv", "cross_attn.to_out", "mlp.mlp.0", "mlp.mlp.2")

    def __init__(self, config):
        """config: the keyword arguments of either. Raises ValueError for what this file does not implement."""
        super().__init__()
        c = self.config = {k: v for k, v in config.items() if k not in ("self", "__class__")}
        for name, value in FIXED.items():
            if c[name] != value:
                raise ValueError(f"{name} = {c[name]!r} is not implemented; TRELLIS's released networks have {value!r}")
        dim = c["model_channels"]
        heads = c["num_heads"] or dim // c["num_head_channels"]
        if dim % heads:
            raise ValueError(f"model_channels = {dim} does not divide into {heads} heads")
        if c["resolution"] % c["patch_size"]:
            raise ValueError(f"resolution = {c['resolution']} does not divide into patches of {c['patch_size']}")
        self.latent_shape = (c["in_channels"], *[c["resolution"]] * 3)
        self.t_embedder = TimeEmbedder(dim)
        self.blocks = nn.ModuleList([
            Block(dim, c["cond_channels"], heads, c["mlp_ratio"], c["qk_rms_norm"], c["qk_rms_norm_cross"]) for _ in range(c["num_blocks"])
        ])
        self.gradient_checkpointing = c["use_checkpoint"]

    def _run(self, block, *args):
        """block(*args), computed again in backward where gradient_checkpointing says so."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _run_blocks(self, h, tokens, time, mask, adapter):
        """h (B, N, D), tokens (B, L, cond_channels) -> the last block's output and the middle one's, each (B, N, D)."""
        context = tokens.to(self.out_layer.weight.dtype)
        for i, block in enumerate(self.blocks):
            h = self._run(block, h, context, time, mask, adapter)
            if i == len(self.blocks) // 2:
                features = h
        return h, features

    def _last(self, h):
        """(..., D') -> (..., channels)."""
        return self.out_layer(F.layer_norm(wide(h), h.shape[-1:]).to(self.out_layer.weight.dtype))  # eps 1e-5, unlike the blocks

    def _check(self, t, tokens, adapter):
        width = self.config["cond_channels"]
        if tokens.dim() != 3 or tokens.shape[2] != width:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; pass (B, L, {width})")
        check_time(t, tokens)
        lora.check(self, adapter)


# ---- first stage: the sparse structure ---------------------------------------------------------------------


class SparseStructureFlowModel(Transformer):
    """Flow transformer on the dense latent. Keyword arguments are the "args" of TRELLIS's json, kept in `self.config`.

    Raises ValueError for a config this file does not implement. Names, epsilons and what is float32 as in TRELLIS.
    """

    latent_shape = (8, 16, 16, 16)

    def __init__(
        self, resolution, in_channels, model_channels, cond_channels, out_channels, num_blocks, num_heads=None, num_head_channels=64,
        mlp_ratio=4, patch_size=2, pe_mode="ape", use_fp16=False, use_checkpoint=False, share_mod=False, qk_rms_norm=False,
        qk_rms_norm_cross=False,
    ):
        super().__init__(locals())
        self.patch = (patch_size,) * 3
        self.input_layer = nn.Linear(in_channels * patch_size**3, model_channels)
        self.out_layer = nn.Linear(model_channels, out_channels * patch_size**3)
        side = torch.arange(resolution // patch_size)
        self.register_buffer("pos_emb", positions(torch.cartesian_prod(side, side, side), model_channels))  # (N, D); files have it

    def forward(self, x, t, tokens, return_features=False, adapter=None):
        """Flow velocity v = eps - x0.

        x (B, in_channels, R, R, R); t (B,) float in [0, 1]; tokens (B, L, cond_channels). Returns v like x with out_channels, in x's
        dtype, computed in the weights' dtype or in autocast's. With return_features=True returns (v, features): the output of block
        num_blocks // 2, (B, N, D), N = (R / patch_size)^3. adapter names one of models/lora.py, None the bare network.
        Raises ValueError, one line naming cause and remedy, for shapes that do not fit and for an unknown adapter.
        """
        self._check(t, tokens, adapter)
        if x.shape != (len(tokens), *self.latent_shape):
            raise ValueError(f"x has shape {tuple(x.shape)}; pass ({len(tokens)}, {', '.join(map(str, self.latent_shape))})")
        h = self.input_layer(patchify(x, self.patch).to(self.input_layer.weight.dtype))  # (B, N, D)
        h = (h + self.pos_emb).to(h.dtype)
        h, features = self._run_blocks(h, tokens, self.t_embedder(t), None, adapter)
        v = unpatchify(self._last(h), self.config["out_channels"], x.shape[2:], self.patch).to(x.dtype)
        return (v, features) if return_features else v


class ChannelNorm(LayerNorm):
    """LayerNorm over the channels of (B, C, X, Y, Z), epsilon 1e-5, returned in x's dtype."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).to(x.dtype)


class ResBlock(nn.Module):
    """(B, C, X, Y, Z) -> the same shape."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1, self.conv2 = (nn.Conv3d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Downsample(nn.Module):
    """(B, C, X, Y, Z) -> (B, C', X/2, Y/2, Z/2)."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, 2, stride=2)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """(B, C, X, Y, Z) -> (B, C', 2X, 2Y, 2Z): a convolution makes the eight children of a voxel, x outermost."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.conv = nn.Conv3d(channels, 8 * out_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv(x).unflatten(1, (-1, 2, 2, 2))  # (B, C', 2, 2, 2, X, Y, Z)
        return h.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6).flatten(4, 5).flatten(2, 3)


def res_blocks(channels, blocks, change):
    """`blocks` ResBlocks at each of the widths `channels`, and change(from, to) between two of them."""
    layers = []
    for i, width in enumerate(channels):
        layers += [change(channels[i - 1], width)] if i else []
        layers += [ResBlock(width) for _ in range(blocks)]
    return nn.ModuleList(layers)


class SparseStructureEncoder(nn.Module):
    """Occupancy to latent, the mean of the posterior. Keyword arguments as above. Raises ValueError for other norms than LayerNorm."""

    def __init__(self, in_channels, latent_channels, num_res_blocks, channels, num_res_blocks_middle=2, norm_type="layer", use_fp16=False):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_norm(norm_type)
        self.input_layer = nn.Conv3d(in_channels, channels[0], 3, padding=1)
        self.blocks = res_blocks(channels, num_res_blocks, Downsample)
        self.middle_block = nn.Sequential(*[ResBlock(channels[-1]) for _ in range(num_res_blocks_middle)])
        self.out_layer = nn.Sequential(ChannelNorm(channels[-1]), nn.SiLU(), nn.Conv3d(channels[-1], 2 * latent_channels, 3, padding=1))

    def forward(self, x):
        """x (B, 1, 64, 64, 64), 1 where occupied and else 0 -> (B, 8, 16, 16, 16) in x's dtype."""
        h = self.input_layer(x.to(self.input_layer.weight.dtype))
        for block in self.blocks:
            h = block(h)
        h = self.out_layer(self.middle_block(h))
        return h.chunk(2, dim=1)[0].to(x.dtype)  # the other half is the log variance, which nothing here uses


class SparseStructureDecoder(nn.Module):
    """Latent to logits of occupancy. Keyword arguments as above. Raises ValueError for other norms than LayerNorm."""

    def __init__(self, out_channels, latent_channels, num_res_blocks, channels, num_res_blocks_middle=2, norm_type="layer", use_fp16=False):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_norm(norm_type)
        self.input_layer = nn.Conv3d(latent_channels, channels[0], 3, padding=1)
        self.middle_block = nn.Sequential(*[ResBlock(channels[0]) for _ in range(num_res_blocks_middle)])
        self.blocks = res_blocks(channels, num_res_blocks, Upsample)
        self.out_layer = nn.Sequential(ChannelNorm(channels[-1]), nn.SiLU(), nn.Conv3d(channels[-1], out_channels, 3, padding=1))

    def forward(self, x):
        """x (B, 8, 16, 16, 16) -> (B, 1, 64, 64, 64) in x's dtype, positive where occupied."""
        h = self.middle_block(self.input_layer(x.to(self.input_layer.weight.dtype)))
        for block in self.blocks:
            h = block(h)
        return self.out_layer(h).to(x.dtype)


def check_norm(norm_type):
    if norm_type != "layer":
        raise ValueError(f"norm_type = {norm_type!r} is not implemented; TRELLIS's released networks have 'layer'")


def occupied(logits):
    """Points of the second stage: logits (B, 1, R, R, R) -> coords (N, 4) int64 of those that are positive, sample by sample."""
    return (logits[:, 0] > 0).nonzero()


# ---- sparse batches ----------------------------------------------------------------------------------------


def per_point(a, coords):
    """What samples have, for each of their points: a (B, ...), coords (N, 4) -> (N, ...); a (B,) -> (N, 1), to scale (N, C)."""
    a = a.index_select(0, coords[:, 0].long())
    return a[:, None] if a.dim() == 1 else a


def per_sample_mean(x, coords, samples):
    """Mean over a sample's points and channels: x (N, C), coords (N, 4) -> (samples,)."""
    row = coords[:, 0].long()
    return x.new_zeros(samples).index_add(0, row, x.mean(dim=1)) / row.bincount(minlength=samples)


@dataclass
class Grid:
    """Occupied voxels at one resolution."""

    coords: torch.Tensor  # (N, 4) int64: sample, x, y, z
    neighbours: torch.Tensor  # (27, N): the point at x + i - 1, y + j - 1, z + k - 1 for i, j, k of the kernel in order; N for none
    parent: torch.Tensor | None = None  # (N,) the voxel twice as large that a point lies in, once that grid exists


def make_grid(coords, resolution):
    """coords (N, 4) int64, x, y, z in 0..resolution-1 -> Grid. Raises ValueError where two points of a sample coincide."""
    N, device, side = len(coords), coords.device, resolution + 2  # a border of empty voxels, so that a key is one place's
    place = torch.tensor([side**3, side**2, side, 1], device=device)
    key, order = ((coords + torch.tensor([0, 1, 1, 1], device=device)) * place).sum(dim=1).sort()
    if (key[1:] == key[:-1]).any():
        raise ValueError("two points of a sample have the same coordinates; pass each voxel once")
    step = torch.arange(-1, 2, device=device)
    wanted = key + (torch.cartesian_prod(step, step, step) * place[1:]).sum(dim=1)[:, None]  # (27, N)
    found = torch.searchsorted(key, wanted).clamp(max=N - 1)
    neighbours = torch.empty_like(wanted)
    neighbours[:, order] = torch.where(key[found] == wanted, order[found], N)
    return Grid(coords, neighbours)


def coarsen(grid, resolution):
    """The grid of the voxels twice as large, ordered by sample; resolution: its own. It becomes known as grid.parent."""
    coords, grid.parent = torch.cat([grid.coords[:, :1], grid.coords[:, 1:] // 2], dim=1).unique(dim=0, return_inverse=True)
    return make_grid(coords, resolution)


def pool(x, parent, count):
    """Sum over the voxels within a larger one / (their number + 1): x (N, C), parent (N,) -> (count, C).

    Not their mean: TRELLIS's mean counts the zero that it starts to sum from as a voxel, and its weights were trained so.
    """
    number = parent.bincount(minlength=count)[:, None] + 1
    return x.new_zeros(count, x.shape[1]).index_add(0, parent, x) / number.to(x.dtype)


class SubmanifoldConv(nn.Module):
    """Convolution with a 3^3 kernel over occupied voxels alone: others count as zero and get no output."""

    def __init__(self, channels, out_channels):
        super().__init__()
        bound = 1 / math.sqrt(27 * channels)  # as nn.Conv3d starts
        self.weight = nn.Parameter(torch.empty(out_channels, 3, 3, 3, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))

    def forward(self, x, neighbours):
        """x (N, channels), neighbours (27, N) of a Grid -> (N, out_channels), summed in at least float32."""
        x = F.pad(x, (0, 0, 0, 1))  # a last row of zeros, where there is no neighbour
        y = wide(self.bias)
        for index, weight in zip(neighbours, self.weight.flatten(1, 3).unbind(1)):
            y = y + F.linear(x, weight).index_select(0, index)  # in this order backward needs x once, not gathered 27 times
        return y


class SparseResBlock(nn.Module):
    """Two convolutions, the second modulated by time. `resample`: -1 after points were merged, 1 after they were split, else 0."""

    def __init__(self, channels, time_dim, out_channels, resample=0):
        super().__init__()
        self.resample = resample
        self.norm1 = LayerNorm(channels, 1e-6)
        self.norm2 = LayerNorm(out_channels, 1e-6, elementwise_affine=False)
        self.conv1 = nn.ModuleDict({"conv": SubmanifoldConv(channels, out_channels)})
        self.conv2 = nn.ModuleDict({"conv": SubmanifoldConv(out_channels, out_channels)})
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * out_channels))
        self.skip_connection = nn.Linear(channels, out_channels) if channels != out_channels else nn.Identity()

    def forward(self, x, time, grid):
        """x (N, channels) at the points of grid, time (B, D) -> (N, out_channels)."""
        scale, shift = (per_point(m, grid.coords) for m in modulation(self.emb_layers, time, 2))
        h = self.conv1["conv"](F.silu(self.norm1(x)).to(x.dtype), grid.neighbours)
        h = self.conv2["conv"](F.silu(self.norm2(h) * (1 + scale) + shift).to(x.dtype), grid.neighbours)
        return (h + self.skip_connection(x)).to(x.dtype)


# ---- second stage: the structured latent -------------------------------------------------------------------


class SLatFlowModel(Transformer):
    """Flow transformer on the points of the sparse structure. Keyword arguments are the "args" of TRELLIS's json, kept in `self.config`.

    Within the blocks samples are padded to the one with most points and the padding is masked, so a batch of like sizes costs least.
    Raises ValueError for a config this file does not implement. Names, epsilons and what is float32 as in TRELLIS.
    """

    latent_shape = (8, 64, 64, 64)  # channels, and the grid in which the points lie

    def __init__(
        self, resolution, in_channels, model_channels, cond_channels, out_channels, num_blocks, num_heads=None, num_head_channels=64,
        mlp_ratio=4, patch_size=2, num_io_res_blocks=2, io_block_channels=None, pe_mode="ape", use_fp16=False, use_checkpoint=False,
        use_skip_connection=True, share_mod=False, qk_rms_norm=False, qk_rms_norm_cross=False,
    ):
        super().__init__(locals())
        widths, D = list(io_block_channels or ()), model_channels
        if not widths or 2 ** len(widths) != patch_size:
            raise ValueError(f"io_block_channels = {io_block_channels} with patch_size = {patch_size} is not implemented; pass one width for each halving")
        self.input_layer = nn.Linear(in_channels, widths[0])
        self.out_layer = nn.Linear(widths[0], out_channels)
        more, joined = num_io_res_blocks - 1, 2 if use_skip_connection else 1
        self.input_blocks, self.out_blocks = nn.ModuleList(), nn.ModuleList()
        for width, following in zip(widths, [*widths[1:], D]):
            self.input_blocks.extend(SparseResBlock(width, D, width) for _ in range(more))
            self.input_blocks.append(SparseResBlock(width, D, following, resample=-1))
        for width, before in zip(widths[::-1], [D, *widths[:0:-1]]):
            self.out_blocks.append(SparseResBlock(joined * before, D, width, resample=1))
            self.out_blocks.extend(SparseResBlock(joined * width, D, width) for _ in range(more))

    def forward(self, x, t, tokens, coords=None, return_features=False, adapter=None):
        """Flow velocity v = eps - x0 of each point.

        x (N, in_channels), the points of all samples in any order; t (B,) float in [0, 1]; tokens (B, L, cond_channels); coords (N, 4)
        int, never None, each point's sample in 0..B-1 and its x, y, z in 0..resolution-1, no place twice. Returns v (N, out_channels) in x's dtype,
        computed in the weights' dtype or in autocast's. With return_features=True returns (v, features): the output of block
        num_blocks // 2 for the merged points, (M, D), ordered by sample, x, y, z. adapter names one of models/lora.py, None the bare
        network. Raises ValueError, one line naming cause and remedy, for input that does not fit and for an unknown adapter.
        """
        self._check(t, tokens, adapter)
        self._check_points(x, coords, len(t))
        time, skips, resolution = self.t_embedder(t), [], self.config["resolution"]
        grids = [make_grid(coords.long(), resolution)]  # from fine to coarse

        h = self.input_layer(x.to(self.input_layer.weight.dtype))
        for block in self.input_blocks:
            if block.resample:
                resolution //= 2
                grids.append(coarsen(grids[-1], resolution))
                h = pool(h, grids[-2].parent, len(grids[-1].coords))
            h = self._run(block, h, time, grids[-1])
            skips.append(h)

        h = (h + positions(grids[-1].coords[:, 1:], h.shape[1])).to(h.dtype)
        h, slot, mask = pad_samples(h, grids[-1].coords[:, 0], len(t))  # (B, M, D)
        h, features = (z.flatten(0, 1).index_select(0, slot) for z in self._run_blocks(h, tokens, time, mask, adapter))

        for block in self.out_blocks:
            skip = skips.pop()
            h = torch.cat([h, skip], dim=1) if self.config["use_skip_connection"] else h
            if block.resample:
                grids.pop()
                h = h.index_select(0, grids[-1].parent)
            h = self._run(block, h, time, grids[-1])

        v = self._last(h).to(x.dtype)
        return (v, features) if return_features else v

    def _check_points(self, x, coords, samples):
        channels, R = self.latent_shape[:2]
        if coords is None:
            raise ValueError("coords is missing; pass the points of the sparse structure, without which this network has no places to work at")
        if x.dim() != 2 or x.shape[1] != channels or not len(x):
            raise ValueError(f"x has shape {tuple(x.shape)}; pass the points of all samples, (N, {channels})")
        if coords.shape != (len(x), 4) or coords.is_floating_point():
            raise ValueError(f"coords is {coords.dtype} {tuple(coords.shape)}; pass integers of shape ({len(x)}, 4): sample, x, y, z")
        low, high = coords.amin(dim=0).tolist(), coords.amax(dim=0).tolist()
        if min(low) < 0 or high[0] >= samples or max(high[1:]) >= R:
            raise ValueError(f"coords go from {low} to {high}; samples must be within 0..{samples - 1}, x, y, z within 0..{R - 1}")
        empty = (coords[:, 0].long().bincount(minlength=samples) == 0).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"sample {empty[0]} of the batch has no points; leave it out")


ElasticSLatFlowModel = SLatFlowModel  # its name in the released configs; the other differs only in how TRELLIS saves memory


def pad_samples(h, row, samples):
    """h (M, D), ordered by sample; row (M,) int64, its sample -> (B, longest, D), zeros where a sample has no more; the place of
    each of the M in its first two dimensions together, (M,); mask (B, 1, 1, longest) bool of what is no padding, None without any."""
    length = row.bincount(minlength=samples)  # (B,)
    longest, start = int(length.max()), length.cumsum(0) - length
    slot = row * longest + torch.arange(len(row), device=row.device) - start[row]
    padded = h.new_zeros(samples * longest, h.shape[1]).index_add(0, slot, h).unflatten(0, (samples, longest))
    mask = (torch.arange(longest, device=row.device) < length[:, None])[:, None, None]
    return padded, slot, None if len(row) == samples * longest else mask


# ---- the first end of a real pipeline: images to tokens ----------------------------------------------------

SIDE = 518  # pixels: 37 x 37 patches of 14


def prepare_image(image):
    """One image for DINOv2 as TRELLIS prepares it: PIL -> uint8 (3, 518, 518), RGB.

    With transparency: the square around what is opaque, 1.2 times as large, on black. Without: all of it, stretched to a square
    (TRELLIS first removes the background with rembg: do that before). Raises ValueError if nothing is opaque.
    """
    image = ImageOps.exif_transpose(image)
    image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    if image.mode == "RGBA" and image.getextrema()[3][0] < 255:
        y, x = (np.asarray(image)[..., 3] > 0.8 * 255).nonzero()
        if not len(x):
            raise ValueError("nothing in it is opaque")
        half = int(1.2 * max(np.ptp(x), np.ptp(y))) // 2
        middle = (x.min() + x.max()) / 2, (y.min() + y.max()) / 2
        box = tuple(float(m + side * half) for side in (-1, 1) for m in middle)
        rgba = np.asarray(image.crop(box).resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float32) / 255
        pixels = (rgba[..., :3] * rgba[..., 3:] * 255).astype(np.uint8)
    else:
        pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


@torch.no_grad()
def encode_images(folder, dinov2):
    """DINOv2 tokens of the images in a folder, sorted by name, as TrellisImageTo3DPipeline.encode_image computes them.

    dinov2: a folder of transformers, or a name that it downloads. Returns {"cond.tokens": (N, 1374, 1024), "uncond.tokens": (1, 1374,
    1024) zeros} in float16, the precision in which TRELLIS uses them, on the CPU: the class token, 4 registers, 37 x 37 patches row by
    row, before the model's last norm and then normalised without weights. Runs on the GPU where there is one. Raises UserError, one line.
    """
    try:
        library = importlib.import_module("transformers")
    except ImportError:
        raise io.UserError("transformers is not installed; it is needed to make tokens of images: pip install transformers") from None
    if not os.path.isdir(folder):
        raise io.UserError(f"--images {folder} is not a folder")
    names = [n for n in sorted(os.listdir(folder)) if not n.startswith(".") and os.path.isfile(os.path.join(folder, n))]
    if not names:
        raise io.UserError(f"--images {folder} holds no files; put one image for each object in it")
    images = []
    for name in names:
        path = os.path.join(folder, name)
        try:
            with Image.open(path) as image:
                images.append(prepare_image(image))
        except Exception as e:  # Pillow's decoders raise many kinds; a row left out would shift all after it
            raise io.UserError(f"{path} is not an image that can be used ({type(e).__name__}: {e}): repair it or take it out") from None
    try:
        model = library.Dinov2WithRegistersModel.from_pretrained(dinov2).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    except (OSError, ValueError) as e:
        raise io.UserError(f"--dinov2 {dinov2} cannot be loaded: {e}") from None
    model.layernorm = nn.Identity()
    mean, std = (torch.tensor(c)[:, None, None] for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rows = []
    for pixels in images:
        h = model(((pixels / 255 - mean) / std)[None].to(model.device)).last_hidden_state  # (1, L, D)
        rows.append(F.layer_norm(h, h.shape[-1:]).half().cpu())
    tokens = torch.cat(rows)
    return {"cond.tokens": tokens, "uncond.tokens": torch.zeros_like(tokens[:1])}


def main(argv=None):
    parser = io.Parser(prog="python -m models.trellis", description="Images to the tokens that TRELLIS is conditioned on.")
    encode = parser.add_subparsers(dest="command", required=True).add_parser("encode", help="images to DINOv2 tokens")
    encode.add_argument("--images", required=True, help="folder of images, one for each object, with transparent or removed background")
    encode.add_argument("--output", required=True, help="safetensors file to write: cond.tokens (in the order of names), uncond.tokens")
    encode.add_argument("--dinov2", default="facebook/dinov2-with-registers-large", help="folder or name of DINOv2 ViT-L/14 with registers")
    args = parser.parse_args(argv)

    def run():
        tensors = encode_images(args.images, args.dinov2)
        os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
        io.save_tensors(tensors, args.output)
        print(f"{args.output}: " + ", ".join(f"{k} {tuple(v.shape)} {v.dtype}" for k, v in tensors.items()))
    io.run(run)


if __name__ == "__main__":
    main()
