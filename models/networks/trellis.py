"""TRELLIS (2412.01506), image or text to 3-D in two stages, with its own parameter names.

The first stage makes the sparse structure, i.e. which of 64^3 voxels an object occupies: a flow
transformer on the dense latent of that grid, and a convolutional decoder to occupancy. The second
makes the structured latent (SLAT), a feature for each occupied voxel: a flow transformer on the
occupied points alone, between sparse convolution blocks that merge 2x2x2 voxels at the entry and
split them at the exit. Both attend to the DINOv2 tokens of an image; time enters as shift, scale
and gate (AdaLN).

    net = SparseStructureFlowModel(**SS_FLOW_L)
    v = net(x_t, t, tokens=tokens)                  # t = 0 data, t = 1 noise; v = eps - x0
    points = occupied(decoder(x0))                  # decoder: a SparseStructureDecoder
    net = SLatFlowModel(**SLAT_FLOW_L)
    v = net(x_t, t, tokens=tokens, coords=points)

    symbol   meaning                                                             shape
    x        first stage: the encoder's latent, not normalised                   (B, 8, 16, 16, 16)
    x        second stage: (feature - SLAT_MEAN) / SLAT_STD of a batch's points  (N, 8)
    coords   of each point: its sample's index in the batch; x, y, z in 0..63    (N, 4) int
    t        time in [0, 1] of each sample, after the shift                      (B,)
    tokens   of an image: DINOv2's; their unconditional twin is zeros            (B, L, 1024)
             of a prompt: CLIP's; their twin is the tokens of the empty prompt   (B, 77, 768)

A sparse batch is thus two plain tensors, with rows in any order. `per_point` repeats what belongs
to a sample for each of its points, x_t = (1 - per_point(t, coords)) x0 + per_point(t, coords) eps,
and `per_sample_mean` goes back. coords stays fixed along a trajectory, as text does: it is an
argument beside tokens, and the same for the unconditional twin.

State dicts and files (models/networks/__init__.py) load into TRELLIS, and back, unconverted.
Released weights are float16 within the blocks; here they become the network's dtype, and use_fp16
is only kept for TRELLIS. Its clock runs to 1000; `sinusoid` multiplies ours by 1000, and nothing
else does. Forward-mode AD (torch.func.jvp) works under sdpa_kernel(SDPBackend.MATH), since fused
attention does not support it. Tokens of images and of prompts are made by a command:

    python -m models.encode --images FOLDER --output tokens.safetensors
    python -m models.encode --teacher TRELLIS-text-large --prompts_txt prompts.txt --output ...

and of samples meshes are made by models/meshes.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.diffusion import sinusoid
from models.networks import lora
from models.networks.dit import patchify, unpatchify
from models.networks.layers import attention, check_floats, check_time, given
from models.networks.sequence import gather_tokens, share_of, split_tokens

# The networks of microsoft/TRELLIS-image-large.
SS_FLOW_L = dict(
    resolution=16,
    in_channels=8,
    out_channels=8,
    model_channels=1024,
    cond_channels=1024,
    num_blocks=24,
    num_heads=16,
    mlp_ratio=4,
    patch_size=1,
    pe_mode="ape",
    qk_rms_norm=True,
    use_fp16=True,
)
SLAT_FLOW_L = dict(
    SS_FLOW_L, resolution=64, patch_size=2, num_io_res_blocks=2, io_block_channels=[128]
)
SS_ENCODER = dict(
    in_channels=1,
    latent_channels=8,
    num_res_blocks=2,
    num_res_blocks_middle=2,
    channels=[32, 128, 512],
    use_fp16=True,
)
SS_DECODER = dict(
    out_channels=1,
    latent_channels=8,
    num_res_blocks=2,
    num_res_blocks_middle=2,
    channels=[512, 128, 32],
    use_fp16=True,
)
# Of each channel of the structured latent, from the same checkpoint: the second stage is trained on
# (feature - mean) / std.
SLAT_MEAN = (
    -2.1687545776367188,
    -0.004347046371549368,
    -0.13352349400520325,
    -0.08418072760105133,
    -0.5271206498146057,
    0.7238689064979553,
    -1.1414450407028198,
    1.2039363384246826,
)
SLAT_STD = (
    2.377650737762451,
    2.386378288269043,
    2.124418020248413,
    2.1748552322387695,
    2.663944721221924,
    2.371192216873169,
    2.6217446327209473,
    2.684523105621338,
)
FIXED = dict(pe_mode="ape", share_mod=False)  # the values in all released networks
CLIP_WIDTH = 768  # of tokens of prompts: openai/clip-vit-large-patch14
TIME_DIM = 256  # width of the sinusoids of time


# ---- pieces of both transformers -----------------------------------------------------------------


def wide(x):
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def positions(place, dim):
    """Fixed features of places (N, 3) -> (N, dim) float32.

    Each axis has dim // 6 sines, then as many cosines; zeros fill up the rest.
    """
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
    """LayerNorm computed and returned in at least float32, whatever input and weights are."""

    def forward(self, x):
        w, b = (None, None) if self.weight is None else (wide(self.weight), wide(self.bias))
        return F.layer_norm(wide(x), self.normalized_shape, w, b, self.eps)


class HeadNorm(nn.Module):
    """RMS norm of each head, with a weight per head and channel. Keeps (B, N, H, D), in at least
    float32."""

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
        waves = sinusoid(t, TIME_DIM)  # t in [0, 1] becomes TRELLIS's 0..1000 in here
        return modulation(self.mlp, waves, 1)[0]


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves (context_dim None) or to a context.

    `attend(q, k, v)` on (B, N, H, D) mixes the tokens and can be replaced, as in layers.Attention.
    It is also called with the mask or the share, if there is one.
    """

    def __init__(self, dim, heads, qk_norm, context_dim=None):
        super().__init__()
        self.heads = heads
        if context_dim is None:
            self.to_qkv = lora.Linear(dim, 3 * dim)
        else:
            self.to_q, self.to_kv = lora.Linear(dim, dim), lora.Linear(context_dim, 2 * dim)
        self.q_rms_norm, self.k_rms_norm = (
            HeadNorm(heads, dim // heads) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.to_out = lora.Linear(dim, dim)
        self.attend = attention

    def forward(self, h, context=None, mask=None, adapter=None, share=None):
        """h (B, N, dim), context (B, M, context_dim) or None -> (B, N, dim).

        mask (B, 1, 1, M) bool or None: False for a key that no query sees. share: see `attention`.
        """

        def split(x, parts):
            return x.unflatten(-1, (parts, self.heads, -1)).unbind(2)  # each (B, N, H, D)

        if context is None:
            q, k, v = split(self.to_qkv(h, adapter), 3)
        else:
            (q,), (k, v) = split(self.to_q(h, adapter), 1), split(self.to_kv(context, adapter), 2)
        q, k = self.q_rms_norm(q).to(v.dtype), self.k_rms_norm(k).to(v.dtype)
        out = self.attend(q, k, v, **given(mask=mask, share=share))
        return self.to_out(out.flatten(2), adapter)  # (B, N, dim)


class FeedForward(nn.Module):
    """(B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.mlp = nn.Sequential(
            lora.Linear(dim, hidden), nn.GELU(approximate="tanh"), lora.Linear(hidden, dim)
        )

    def forward(self, h, adapter=None):
        first, act, second = self.mlp  # one by one: nn.Sequential passes no second argument on
        return second(act(first(h, adapter)), adapter)


class Block(nn.Module):
    """Self-attention, cross-attention, MLP.

    Norms, modulation and residual sums are in at least float32.
    """

    def __init__(self, dim, context_dim, heads, mlp_ratio, qk_norm, qk_norm_cross):
        super().__init__()
        self.norm1 = LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.self_attn = Attention(dim, heads, qk_norm)
        self.norm2 = LayerNorm(dim, 1e-6)
        self.cross_attn = Attention(dim, heads, qk_norm_cross, context_dim)
        self.norm3 = LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, h, context, time, mask=None, adapter=None, share=None):
        """h (B, N, D), context (B, L, context_dim), time (B, D) -> (B, N, D).

        mask (B, 1, 1, N) bool or None: False for padding. share: see `attention`.
        """
        table = [m[:, None] for m in modulation(self.adaLN_modulation, time, 6)]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table  # each (B, 1, D)

        z = (self.norm1(h) * (1 + scale) + shift).to(h.dtype)
        mixed = self.self_attn(z, mask=mask, adapter=adapter, share=share)
        h = (wide(h) + mixed * gate).to(h.dtype)

        z = self.norm2(h).to(h.dtype)
        h = h + self.cross_attn(z, context, adapter=adapter).to(h.dtype)  # not gated or modulated

        z = (self.norm3(h) * (1 + mlp_scale) + mlp_shift).to(h.dtype)
        return (wide(h) + self.mlp(z, adapter) * mlp_gate).to(h.dtype)


class Transformer(nn.Module):
    """What the two flow models share: time, blocks and attributes."""

    prediction = "flow_v"
    # rescale_t of both samplers in TRELLIS-image-large's pipeline.json; its training has no shift.
    default_shift = 3.0
    cond_names = ("tokens",)
    lora_targets = (
        "self_attn.to_qkv",
        "self_attn.to_out",
        "cross_attn.to_q",
        "cross_attn.to_kv",
        "cross_attn.to_out",
        "mlp.mlp.0",
        "mlp.mlp.2",
    )

    def __init__(self, config):
        """config: locals() of a subclass's __init__, whose entries are its keyword arguments.

        Raises ValueError for what this file does not implement.
        """
        super().__init__()
        c = self.config = {k: v for k, v in config.items() if k not in ("self", "__class__")}
        for name, value in FIXED.items():
            if c[name] != value:
                raise ValueError(
                    f"{name} = {c[name]!r} is not implemented; "
                    f"TRELLIS's released networks have {value!r}"
                )
        dim = c["model_channels"]
        heads = c["num_heads"] or dim // c["num_head_channels"]
        if dim % heads:
            raise ValueError(f"model_channels = {dim} does not divide into {heads} heads")
        if c["resolution"] % c["patch_size"]:
            raise ValueError(
                f"resolution = {c['resolution']} does not divide into patches of {c['patch_size']}"
            )
        self.latent_shape = (c["in_channels"], *[c["resolution"]] * 3)
        self.uncond_names = ("tokens",) if c["cond_channels"] == CLIP_WIDTH else ()
        self.t_embedder = TimeEmbedder(dim)
        shape = (
            c["cond_channels"],
            heads,
            c["mlp_ratio"],
            c["qk_rms_norm"],
            c["qk_rms_norm_cross"],
        )
        self.blocks = nn.ModuleList([Block(dim, *shape) for _ in range(c["num_blocks"])])
        self.gradient_checkpointing = c["use_checkpoint"]

    def _run(self, block, *args):
        """block(*args), which backward computes again if gradient_checkpointing is set."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _run_blocks(self, h, tokens, time, mask, adapter, until_middle, share=None):
        """h (B, N, D), tokens (B, L, cond_channels) -> output of the last block, (B, N, D).

        until_middle: stop after block num_blocks // 2 and return its output.
        """
        context = tokens.to(self.out_layer.weight.dtype)
        for i, block in enumerate(self.blocks):
            h = self._run(block, h, context, time, mask, adapter, share)
            if until_middle and i == len(self.blocks) // 2:
                break
        return h

    def _last(self, h):
        """(..., D') -> (..., channels)."""
        h = F.layer_norm(wide(h), h.shape[-1:])  # epsilon 1e-5, unlike that of the blocks
        return self.out_layer(h.to(self.out_layer.weight.dtype))

    def _check(self, x, t, tokens, adapter):
        """Raises ValueError for arguments that neither forward can take."""
        width = self.config["cond_channels"]
        if tokens.dim() != 3 or tokens.shape[2] != width:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; pass (B, L, {width})")
        check_floats(x)
        check_time(t, tokens)
        lora.check(self, adapter)


def pipeline_entry(net, path, steps, timestep_shift, guidance_scale):
    """What "args" of TRELLIS's pipeline.json must say for a flow model with another sampler's grid.

    path: DIR/NAME of the network's files. steps, timestep_shift, guidance_scale: of an Euler
    sampler as here.  -> a dict like "args", whose "models" has one entry. TRELLIS's sampler moves x
    by -(t - s) v from t to s, without sigma_min, over the same shifted times (rescale_t); its
    guidance is (1 + w) cond - w uncond, w = guidance_scale - 1, for t within cfg_interval. An empty
    interval is one call a step.
    """
    interval = [1.0, 0.0] if guidance_scale == 1 else [0.0, 1.0]
    params = {"steps": steps, "rescale_t": timestep_shift}
    params |= {"cfg_strength": round(guidance_scale - 1, 6), "cfg_interval": interval}
    name = "FlowEulerGuidanceIntervalSampler"
    sampler = {"name": name, "args": {"sigma_min": 1e-5}, "params": params}
    return {"models": {f"{net.stage}_flow_model": path}, f"{net.stage}_sampler": sampler}


# ---- first stage: the sparse structure -----------------------------------------------------------


class SparseStructureFlowModel(Transformer):
    """Flow transformer on the dense latent.

    Keyword arguments are the "args" of TRELLIS's json, kept in `self.config`. Raises ValueError
    for a config that this file does not implement. Names, epsilons and what is float32 are those
    of TRELLIS.
    """

    latent_shape = (8, 16, 16, 16)
    stage = "sparse_structure"  # its name in pipeline.json
    sequence = None

    def __init__(
        self,
        resolution,
        in_channels,
        model_channels,
        cond_channels,
        out_channels,
        num_blocks,
        num_heads=None,
        num_head_channels=64,
        mlp_ratio=4,
        patch_size=2,
        pe_mode="ape",
        use_fp16=False,
        use_checkpoint=False,
        share_mod=False,
        qk_rms_norm=False,
        qk_rms_norm_cross=False,
    ):
        super().__init__(locals())
        self.patch = (patch_size,) * 3
        self.input_layer = nn.Linear(in_channels * patch_size**3, model_channels)
        self.out_layer = nn.Linear(model_channels, out_channels * patch_size**3)
        side = torch.arange(resolution // patch_size)
        place = torch.cartesian_prod(side, side, side)
        self.register_buffer("pos_emb", positions(place, model_channels))  # (N, D); in files too

    def forward(self, x, t, tokens, return_features=False, adapter=None):
        """Flow velocity v = eps - x0, like x but with out_channels, in x's dtype.

        x (B, in_channels, R, R, R); t (B,) float in [0, 1]; tokens (B, L, cond_channels). Computed
        in the weights' dtype or in autocast's. return_features=True: the output (B, N, D) of block
        num_blocks // 2 instead, N = (R / patch_size)^3, and nothing after it is run. adapter: a
        name of models/networks/lora.py, None = the bare network. Raises ValueError, one line with
        cause and remedy, for shapes that do not fit and an unknown adapter.
        """
        self._check(x, t, tokens, adapter)
        want = (len(tokens), *self.latent_shape)
        if x.shape != want:
            raise ValueError(f"x has shape {tuple(x.shape)}; pass {want}")
        h = self.input_layer(patchify(x, self.patch).to(self.input_layer.weight.dtype))  # (B, N, D)
        h = (h + self.pos_emb).to(h.dtype)
        share = share_of(self.sequence, h.shape[1])
        h, time = split_tokens(h, share), self.t_embedder(t)
        h = self._run_blocks(h, tokens, time, None, adapter, return_features, share)
        if return_features:
            return gather_tokens(h, share)
        v = gather_tokens(self._last(h), share)
        v = unpatchify(v, self.config["out_channels"], x.shape[2:], self.patch)
        return v.to(x.dtype)


class ChannelNorm(LayerNorm):
    """LayerNorm over the channels of (B, C, X, Y, Z), epsilon 1e-5, returned in x's dtype."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).to(x.dtype)


class ResBlock(nn.Module):
    """Two convolutions, added to the input. Keeps (B, C, X, Y, Z)."""

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
    """(B, C, X, Y, Z) -> (B, C', 2X, 2Y, 2Z).

    A convolution makes the eight children of a voxel, with x as the outermost axis.
    """

    def __init__(self, channels, out_channels):
        super().__init__()
        self.conv = nn.Conv3d(channels, 8 * out_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv(x).unflatten(1, (-1, 2, 2, 2))  # (B, C', 2, 2, 2, X, Y, Z)
        return h.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6).flatten(4, 5).flatten(2, 3)


def res_blocks(channels, blocks, change):
    """`blocks` ResBlocks at each of the widths `channels`, and change(from, to) between widths."""
    layers = []
    for i, width in enumerate(channels):
        if i:
            layers.append(change(channels[i - 1], width))
        layers += [ResBlock(width) for _ in range(blocks)]
    return nn.ModuleList(layers)


class SparseStructureEncoder(nn.Module):
    """Occupancy to latent, the mean of the posterior.

    Keyword arguments are the "args" of TRELLIS's json, kept in `self.config`. Raises ValueError for
    another norm than LayerNorm.
    """

    def __init__(
        self,
        in_channels,
        latent_channels,
        num_res_blocks,
        channels,
        num_res_blocks_middle=2,
        norm_type="layer",
        use_fp16=False,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_norm(norm_type)
        self.input_layer = nn.Conv3d(in_channels, channels[0], 3, padding=1)
        self.blocks = res_blocks(channels, num_res_blocks, Downsample)
        self.middle_block = nn.Sequential(
            *[ResBlock(channels[-1]) for _ in range(num_res_blocks_middle)]
        )
        self.out_layer = nn.Sequential(
            ChannelNorm(channels[-1]),
            nn.SiLU(),
            nn.Conv3d(channels[-1], 2 * latent_channels, 3, padding=1),
        )

    def forward(self, x):
        """x (B, 1, 64, 64, 64), 1 where occupied and else 0 -> (B, 8, 16, 16, 16) in x's dtype."""
        h = self.input_layer(x.to(self.input_layer.weight.dtype))
        for block in self.blocks:
            h = block(h)
        mean, _ = self.out_layer(self.middle_block(h)).chunk(
            2, dim=1
        )  # _: log-variance, unused here
        return mean.to(x.dtype)


class SparseStructureDecoder(nn.Module):
    """Latent to logits of occupancy.

    Keyword arguments are the "args" of TRELLIS's json, kept in `self.config`. Raises ValueError for
    another norm than LayerNorm.
    """

    def __init__(
        self,
        out_channels,
        latent_channels,
        num_res_blocks,
        channels,
        num_res_blocks_middle=2,
        norm_type="layer",
        use_fp16=False,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_norm(norm_type)
        self.input_layer = nn.Conv3d(latent_channels, channels[0], 3, padding=1)
        self.middle_block = nn.Sequential(
            *[ResBlock(channels[0]) for _ in range(num_res_blocks_middle)]
        )
        self.blocks = res_blocks(channels, num_res_blocks, Upsample)
        self.out_layer = nn.Sequential(
            ChannelNorm(channels[-1]),
            nn.SiLU(),
            nn.Conv3d(channels[-1], out_channels, 3, padding=1),
        )

    def forward(self, x):
        """x (B, 8, 16, 16, 16) -> (B, 1, 64, 64, 64) in x's dtype, positive where occupied."""
        h = self.middle_block(self.input_layer(x.to(self.input_layer.weight.dtype)))
        for block in self.blocks:
            h = block(h)
        return self.out_layer(h).to(x.dtype)


def check_norm(norm_type):
    """Raises ValueError for another norm than LayerNorm."""
    if norm_type != "layer":
        raise ValueError(
            f"norm_type = {norm_type!r} is not implemented; "
            "TRELLIS's released networks have 'layer'"
        )


def occupied(logits):
    """Points for the second stage: the positive among logits (B, 1, R, R, R) -> coords (N, 4)
    int64.

    They are ordered by sample, x, y, z.
    """
    return (logits[:, 0] > 0).nonzero()


# ---- sparse batches ------------------------------------------------------------------------------


def per_point(a, coords):
    """Repeat what belongs to samples for their points: a (B, ...), coords (N, 4) -> (N, ...).

    a (B,) gives (N, 1), which can scale (N, C).
    """
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
    # (27, N): index of the point at x + i - 1, y + j - 1, z + k - 1, for i, j, k of the kernel in
    # order; N if there is none.
    neighbours: torch.Tensor
    # (N,): index of the voxel, twice as large, that a point lies in; set by coarsen.
    parent: torch.Tensor | None = None


def make_grid(coords, resolution):
    """coords (N, 4) int64, x, y, z in 0..resolution-1 -> Grid.

    Raises ValueError if two points of a sample coincide.
    """
    N, device = len(coords), coords.device
    side = resolution + 2  # a border of empty voxels, so that each key belongs to one place
    place = torch.tensor([side**3, side**2, side, 1], device=device)
    key, order = ((coords + torch.tensor([0, 1, 1, 1], device=device)) * place).sum(dim=1).sort()
    if (key[1:] == key[:-1]).any():
        raise ValueError("two points of a sample have the same coordinates; pass each voxel once")
    step = torch.arange(-1, 2, device=device)
    offset = (torch.cartesian_prod(step, step, step) * place[1:]).sum(dim=1)  # (27,)
    wanted = key + offset[:, None]  # (27, N)
    found = torch.searchsorted(key, wanted).clamp(max=N - 1)
    neighbours = torch.empty_like(wanted)
    neighbours[:, order] = torch.where(key[found] == wanted, order[found], N)
    return Grid(coords, neighbours)


def coarsen(grid, resolution):
    """The Grid of the voxels twice as large, ordered by sample. resolution: that of the result.

    Sets grid.parent.
    """
    halved = torch.cat([grid.coords[:, :1], grid.coords[:, 1:] // 2], dim=1)
    coords, grid.parent = halved.unique(dim=0, return_inverse=True)
    return make_grid(coords, resolution)


def pool(x, parent, count):
    """Sum over the voxels in a larger one / (their number + 1): x (N, C), parent (N,) -> (count,
    C).

    This is not their mean: TRELLIS's mean counts the zero that its sum starts from as a voxel, and
    its weights were trained with that.
    """
    number = parent.bincount(minlength=count)[:, None] + 1
    return x.new_zeros(count, x.shape[1]).index_add(0, parent, x) / number.to(x.dtype)


class SubmanifoldConv(nn.Module):
    """3^3 convolution over occupied voxels alone: others count as zero and have no output."""

    def __init__(self, channels, out_channels):
        super().__init__()
        bound = 1 / math.sqrt(27 * channels)  # as nn.Conv3d starts
        self.weight = nn.Parameter(
            torch.empty(out_channels, 3, 3, 3, channels).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))

    def forward(self, x, neighbours):
        """x (N, channels), neighbours (27, N) of a Grid -> (N, out_channels), at least float32."""
        x = F.pad(x, (0, 0, 0, 1))  # a last row of zeros, where there is no neighbour
        y = wide(self.bias)
        for index, weight in zip(neighbours, self.weight.flatten(1, 3).unbind(1), strict=True):
            # In this order backward keeps x once, not gathered 27 times.
            y = y + F.linear(x, weight).index_select(0, index)
        return y


class SparseResBlock(nn.Module):
    """Two convolutions, the second of which is modulated by time, and a shortcut.

    resample: -1 if the points are merged before it, 1 if they are split, else 0.
    """

    def __init__(self, channels, time_dim, out_channels, resample=0):
        super().__init__()
        self.resample = resample
        self.norm1 = LayerNorm(channels, 1e-6)
        self.norm2 = LayerNorm(out_channels, 1e-6, elementwise_affine=False)
        self.conv1 = nn.ModuleDict({"conv": SubmanifoldConv(channels, out_channels)})
        self.conv2 = nn.ModuleDict({"conv": SubmanifoldConv(out_channels, out_channels)})
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * out_channels))
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Linear(channels, out_channels)

    def forward(self, x, time, grid):
        """x (N, channels) at the points of grid, time (B, D) -> (N, out_channels)."""
        scale, shift = (per_point(m, grid.coords) for m in modulation(self.emb_layers, time, 2))
        h = self.conv1["conv"](F.silu(self.norm1(x)).to(x.dtype), grid.neighbours)
        h = F.silu(self.norm2(h) * (1 + scale) + shift).to(x.dtype)
        h = self.conv2["conv"](h, grid.neighbours)
        return (h + self.skip_connection(x)).to(x.dtype)


# ---- second stage: the structured latent ---------------------------------------------------------


class SLatFlowModel(Transformer):
    """Flow transformer on the points of the sparse structure.

    Keyword arguments are the "args" of TRELLIS's json, kept in `self.config`. In the blocks,
    samples are padded to the one with most points and the padding is masked, so a batch of similar
    sizes costs least. Raises ValueError for a config that this file does not implement. Names,
    epsilons and what is float32 are those of TRELLIS.
    """

    latent_shape = (8, 64, 64, 64)  # channels, and the grid in which the points lie
    sparse = True  # x are points, and forward takes coords
    stage = "slat"  # its name in pipeline.json

    def __init__(
        self,
        resolution,
        in_channels,
        model_channels,
        cond_channels,
        out_channels,
        num_blocks,
        num_heads=None,
        num_head_channels=64,
        mlp_ratio=4,
        patch_size=2,
        num_io_res_blocks=2,
        io_block_channels=None,
        pe_mode="ape",
        use_fp16=False,
        use_checkpoint=False,
        use_skip_connection=True,
        share_mod=False,
        qk_rms_norm=False,
        qk_rms_norm_cross=False,
    ):
        super().__init__(locals())
        widths, D = list(io_block_channels or ()), model_channels
        if not widths or 2 ** len(widths) != patch_size:
            raise ValueError(
                f"io_block_channels = {io_block_channels} with patch_size = {patch_size} is not "
                "implemented; pass one width for each halving"
            )
        self.input_layer = nn.Linear(in_channels, widths[0])
        self.out_layer = nn.Linear(widths[0], out_channels)
        more, joined = num_io_res_blocks - 1, 2 if use_skip_connection else 1
        self.input_blocks, self.out_blocks = nn.ModuleList(), nn.ModuleList()
        for width, following in zip(widths, [*widths[1:], D], strict=True):
            self.input_blocks.extend(SparseResBlock(width, D, width) for _ in range(more))
            self.input_blocks.append(SparseResBlock(width, D, following, resample=-1))
        for width, before in zip(widths[::-1], [D, *widths[:0:-1]], strict=True):
            self.out_blocks.append(SparseResBlock(joined * before, D, width, resample=1))
            self.out_blocks.extend(SparseResBlock(joined * width, D, width) for _ in range(more))

    def forward(self, x, t, tokens, coords=None, return_features=False, adapter=None):
        """Flow velocity v = eps - x0 of each point, (N, out_channels), in x's dtype.

        x (N, in_channels), the points of all samples in any order; t (B,) float in [0, 1]; tokens
        (B, L, cond_channels); coords (N, 4) int, never None: each point's sample in 0..B-1 and its
        x, y, z in 0..resolution-1, no place twice. Computed in the weights' dtype or in
        autocast's. return_features=True: the output (M, D) of block num_blocks // 2 for the merged
        points instead, ordered by sample, x, y, z, and nothing after it is run. adapter: a name of
        models/networks/lora.py, None = the bare network. Raises ValueError, one line with cause
        and remedy, for arguments that do not fit and an unknown adapter.
        """
        self._check(x, t, tokens, adapter)
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
        h = self._run_blocks(h, tokens, time, mask, adapter, return_features)
        h = h.flatten(0, 1).index_select(0, slot)
        if return_features:
            return h

        for block in self.out_blocks:
            skip = skips.pop()
            h = torch.cat([h, skip], dim=1) if self.config["use_skip_connection"] else h
            if block.resample:
                grids.pop()
                h = h.index_select(0, grids[-1].parent)
            h = self._run(block, h, time, grids[-1])

        return self._last(h).to(x.dtype)

    def _check_points(self, x, coords, samples):
        """Raises ValueError unless x and coords are the points of so many samples."""
        channels, R = self.latent_shape[:2]
        if coords is None:
            raise ValueError(
                "coords is missing; pass the points of the sparse structure, "
                "without which this network has no places to work at"
            )
        if x.dim() != 2 or x.shape[1] != channels or not len(x):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; pass the points of all samples, (N, {channels})"
            )
        if coords.shape != (len(x), 4) or coords.is_floating_point():
            raise ValueError(
                f"coords is {coords.dtype} {tuple(coords.shape)}; "
                f"pass integers of shape ({len(x)}, 4): sample, x, y, z"
            )
        low, high = coords.amin(dim=0).tolist(), coords.amax(dim=0).tolist()
        if min(low) < 0 or high[0] >= samples or max(high[1:]) >= R:
            raise ValueError(
                f"coords go from {low} to {high}; samples must be within 0..{samples - 1}, "
                f"x, y, z within 0..{R - 1}"
            )
        empty = (coords[:, 0].long().bincount(minlength=samples) == 0).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"sample {empty[0]} of the batch has no points; leave it out")


def pad_samples(h, row, samples):
    """Tokens of all samples to a padded batch.

    h (M, D), ordered by sample; row (M,) int64, the sample of each -> padded (B, longest, D), with
    zeros for padding; slot (M,), the place of each token in padded.flatten(0, 1); mask (B, 1, 1,
    longest) bool, False for padding, or None if there is none.
    """
    length = row.bincount(minlength=samples)  # (B,)
    longest, start = int(length.max()), length.cumsum(0) - length
    slot = row * longest + torch.arange(len(row), device=row.device) - start[row]
    padded = h.new_zeros(samples * longest, h.shape[1]).index_add(0, slot, h)
    padded = padded.unflatten(0, (samples, longest))
    if len(row) == samples * longest:
        return padded, slot, None
    mask = torch.arange(longest, device=row.device) < length[:, None]  # (B, longest)
    return padded, slot, mask[:, None, None]
