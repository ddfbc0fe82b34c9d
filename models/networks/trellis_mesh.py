"""TRELLIS's mesh decoder: a structured latent becomes the parameters of FlexiCubes.

A transformer on the occupied voxels of the 64^3 grid, whose attention stays within windows of 8^3
voxels that are shifted by half a window in every other block; two blocks that split each voxel into
8; and a layer that gives each of the resulting voxels of the 256^3 grid what models/flexicubes.py
makes triangles of. Source: microsoft/TRELLIS and its slat_dec_mesh_swin8_B_64l8m256c_fp16, whose
parameter names and order of channels these are.

    net = SLatMeshDecoder(**SLAT_MESH_B)
    features, coords = net(feats * std + mean, points)     # points (N, 4) as in trellis.py

    channels of a voxel    meaning
    0 .. 7                 signed distance at its 8 corners, less 1 / 256
    8 .. 31                displacement of these corners, before tanh          (8, 3)
    32 .. 79               with use_color: colour and normal, before sigmoid   (8, 6)
    the last 21            FlexiCubes' weights: 12 edges, 8 corners, 1 for the voxel
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.networks.trellis import (
    Attention,
    FeedForward,
    LayerNorm,
    SubmanifoldConv,
    make_grid,
    pad_samples,
    positions,
    wide,
)

# The decoder of microsoft/TRELLIS-image-large.
SLAT_MESH_B = dict(
    resolution=64,
    model_channels=768,
    latent_channels=8,
    num_blocks=12,
    num_heads=12,
    mlp_ratio=4,
    attn_mode="swin",
    window_size=8,
    use_fp16=True,
    representation_config=dict(use_color=True),
)
GROUPS = 32  # of the group norms


class WindowBlock(nn.Module):
    """Self-attention within each window, and an MLP."""

    def __init__(self, dim, heads, mlp_ratio, qk_norm):
        super().__init__()
        self.norm1 = LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads, qk_norm)
        self.norm2 = LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))

    def forward(self, h, window):
        """h (N, D); window (N,) int64, that of each point, from 0 without gaps -> (N, D)."""
        order = window.argsort(stable=True)
        rows = self.norm1(h).to(h.dtype)[order]
        padded, slot, mask = pad_samples(rows, window[order], int(window.max()) + 1)
        mixed = self.attn(padded, mask=mask).flatten(0, 1).index_select(0, slot)
        h = h + torch.empty_like(mixed).index_copy(0, order, mixed)
        return h + self.mlp(self.norm2(h).to(h.dtype))


def windows(coords, size, shift):
    """The window of each point, numbered from 0: cubes of `size` voxels, moved by -shift.

    coords (N, 4) int64 -> (N,) int64. Points of two samples are never in one window.
    """
    place = torch.cat([coords[:, :1], (coords[:, 1:] + shift) // size], dim=1)
    return place.unique(dim=0, return_inverse=True)[1]


class PointGroupNorm(nn.GroupNorm):
    """Group norm over the points of each sample and a group's channels, in at least float32."""

    def forward(self, h, sample):
        """h (N, C), sample (N,) int64 -> (N, C)."""
        groups = wide(h).unflatten(1, (self.num_groups, -1))  # (N, G, C / G)
        count = sample.bincount()[:, None] * groups.shape[2]

        def mean(x):  # (N, G, C / G) -> that of each point's sample (N, G, 1)
            sums = x.new_zeros(len(count), x.shape[1]).index_add(0, sample, x.sum(2))
            return (sums / count)[sample][..., None]

        centred = groups - mean(groups)
        normed = (centred / (mean(centred.square()) + self.eps).sqrt()).flatten(1)
        return (normed * wide(self.weight) + wide(self.bias)).to(h.dtype)


class PointwiseConv(nn.Module):
    """A linear layer whose weight is stored as that of a convolution with a kernel of 1^3."""

    def __init__(self, channels, out_channels):
        super().__init__()
        weight = nn.Linear(channels, out_channels).weight.detach()
        self.weight = nn.Parameter(weight[:, None, None, None].clone())
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):
        return F.linear(x, self.weight.flatten(1), self.bias)


class SubdivideBlock(nn.Module):
    """Splits each voxel into 8, with two convolutions among them and a shortcut."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.act_layers = nn.ModuleList([PointGroupNorm(GROUPS, channels)])
        first = nn.ModuleDict({"conv": SubmanifoldConv(channels, out_channels)})
        second = nn.ModuleDict({"conv": SubmanifoldConv(out_channels, out_channels)})
        norm = PointGroupNorm(GROUPS, out_channels)
        self.out_layers = nn.ModuleList([first, norm, nn.SiLU(), second])
        self.skip_connection = nn.ModuleDict({"conv": PointwiseConv(channels, out_channels)})

    def forward(self, x, coords, resolution):
        """x (N, C), coords (N, 4), resolution: after it -> (8 N, C'), (8 N, 4)."""
        h, dtype = F.silu(self.act_layers[0](x, coords[:, 0])), x.dtype
        coords = subdivided(coords)
        sample, neighbours = coords[:, 0], make_grid(coords, resolution).neighbours
        first, norm, act, second = self.out_layers
        h = first["conv"](h.repeat_interleave(8, 0), neighbours).to(dtype)
        h = second["conv"](act(norm(h, sample)), neighbours).to(dtype)
        return h + self.skip_connection["conv"](x).repeat_interleave(8, 0), coords


def subdivided(coords):
    """The 8 halves of each voxel, in order of x, y, z.  (N, 4) -> (8 N, 4)."""
    step = torch.arange(2, device=coords.device)
    corner = F.pad(torch.cartesian_prod(step, step, step), (1, 0))  # (8, 4)
    twice = coords * torch.tensor([1, 2, 2, 2], device=coords.device)
    return (twice[:, None] + corner).flatten(0, 1)


class SLatMeshDecoder(nn.Module):
    """The structured latent of objects to FlexiCubes' parameters.

    Keyword arguments are the "args" of TRELLIS's json, kept in `self.config`. Raises ValueError for
    a config that this file does not implement.
    """

    def __init__(
        self,
        resolution,
        model_channels,
        latent_channels,
        num_blocks,
        num_heads=None,
        num_head_channels=64,
        mlp_ratio=4,
        attn_mode="swin",
        window_size=8,
        pe_mode="ape",
        use_fp16=False,
        use_checkpoint=False,
        qk_rms_norm=False,
        representation_config=None,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        for name, value, known in (("attn_mode", attn_mode, "swin"), ("pe_mode", pe_mode, "ape")):
            if value != known:
                raise ValueError(
                    f"{name} = {value!r} is not implemented; TRELLIS's mesh decoder has {known!r}"
                )
        D = model_channels
        if D % (8 * GROUPS):
            raise ValueError(f"model_channels = {D} is not a multiple of {8 * GROUPS}")
        self.use_color = bool((representation_config or {}).get("use_color"))
        heads = num_heads or D // num_head_channels
        self.input_layer = nn.Linear(latent_channels, D)
        shape = D, heads, mlp_ratio, qk_rms_norm
        self.blocks = nn.ModuleList([WindowBlock(*shape) for _ in range(num_blocks)])
        self.upsample = nn.ModuleList([SubdivideBlock(D, D // 4), SubdivideBlock(D // 4, D // 8)])
        self.out_layer = nn.Linear(D // 8, 8 + 24 + 48 * self.use_color + 21)

    def forward(self, x, coords):
        """x (N, latent_channels), TRELLIS's features as they are, not normalised; coords (N, 4).

        -> features (64 N, channels), at least float32, and coords (64 N, 4) int64 in a grid of four
        times the resolution. Raises ValueError for points that do not fit.
        """
        channels, R = self.config["latent_channels"], self.config["resolution"]
        if x.dim() != 2 or x.shape[1] != channels or coords.shape != (len(x), 4) or not len(x):
            raise ValueError(
                f"points are {tuple(x.shape)} at {tuple(coords.shape)}; pass (N, {channels}) at "
                "(N, 4)"
            )
        coords = coords.long()
        if coords.min() < 0 or coords[:, 1:].max() >= R:
            raise ValueError(f"points lie outside of 0..{R - 1}: give those of a grid of {R}^3")
        h = self.input_layer(x.to(self.input_layer.weight.dtype))
        h = (h + positions(coords[:, 1:], h.shape[1])).to(h.dtype)
        size = self.config["window_size"]
        window = [windows(coords, size, size // 2 * odd) for odd in range(2)]
        for i, block in enumerate(self.blocks):
            h = block(h, window[i % 2])
        for block in self.upsample:
            R *= 2
            h, coords = block(h, coords, R)
        return wide(self.out_layer(h)), coords
