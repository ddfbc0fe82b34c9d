"""A small diffusion transformer over N-D patches (DiT 2212.09748): images now, video and voxels with more axes.

adaLN-Zero conditioning, qk-norm (RMS, per head), axial RoPE plus a learned position per patch, head dimension 32,
sinusoidal time on 1000 t. One addition: a gated copy of the input, skip(t) x_t per channel, joins the output. Near t = 1 the
velocity is eps - x0, most of it noise that the network has just been given; carried through the LayerNorms instead, that noise
comes back imperfectly, and a one-step sample shows the difference as grain. The network's input is x_t (B, C, *size), t (B,) in
[0, 1] with 1 = noise; its output is the flow velocity v = eps - x0 of the same shape. A network with context_channels also sees a
picture's worth of them beside x_t (LFM 2307.08698: a masked image, a segmentation map). In comments: N patches, D width, H heads.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels.linear_attention import use_linear_attention
from models import lora
from models.diffusion import sinusoid

HEAD_DIM = 32


def attention(q, k, v):
    """Softmax attention, the one function every block calls.  q, k, v (B, N, H, 32) -> (B, N, H, 32)."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # (B, H, N, 32)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def patchify(x, patch):
    """(B, C, *size) -> (B, N, C * prod(patch)); inside a patch channels come first, then the axes in order."""
    B, C, *size = x.shape
    grid = [s // p for s, p in zip(size, patch)]
    split = [n for g, p in zip(grid, patch) for n in (g, p)]  # g0, p0, g1, p1, ...
    x = x.reshape(B, C, *split)
    axes = range(len(patch))
    x = x.permute(0, *[2 + 2 * i for i in axes], 1, *[3 + 2 * i for i in axes])  # (B, *grid, C, *patch)
    return x.flatten(1 + len(patch)).flatten(1, len(patch))


def unpatchify(tokens, channels, size, patch):
    """Inverse of patchify: (B, N, C * prod(patch)) -> (B, C, *size)."""
    grid = [s // p for s, p in zip(size, patch)]
    n = len(patch)
    x = tokens.reshape(tokens.shape[0], *grid, channels, *patch)
    x = x.permute(0, n + 1, *[a for i in range(n) for a in (1 + i, n + 2 + i)])  # (B, C, g0, p0, g1, p1, ...)
    return x.reshape(tokens.shape[0], channels, *size)


def axial_rope(grid, base=100.0):
    """Rotation angles: the head's 16 pairs are shared out evenly over the axes, left-over pairs stay unrotated.

    grid: patches per axis -> cos, sin, each (N, 1, 16). Base 100, not 10^4: these grids are a few patches wide.
    """
    pairs = HEAD_DIM // 2
    per_axis = pairs // len(grid)
    freq = base ** (-torch.arange(per_axis, dtype=torch.float32) / per_axis)
    where = torch.meshgrid(*[torch.arange(g, dtype=torch.float32) for g in grid], indexing="ij")
    angle = torch.cat([w.reshape(-1, 1) * freq for w in where], dim=1)  # (N, per_axis * axes)
    angle = F.pad(angle, (0, pairs - angle.shape[1]))[:, None]  # (N, 1, 16)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x[..., i], x[..., i + 16]).  x (B, N, H, 32); cos, sin (N, 1, 16)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def modulate(x, shift, scale):
    """x (B, N, D); shift, scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, dim, cond_dim):
        super().__init__()
        self.heads = dim // HEAD_DIM
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = lora.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM, eps=1e-6), nn.RMSNorm(HEAD_DIM, eps=1e-6)
        self.proj = lora.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(lora.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), lora.Linear(4 * dim, dim))
        self.modulation = nn.Linear(cond_dim, 6 * dim)
        self.attend = attention  # swap this attribute to give one block another attention

    def forward(self, x, c, cos, sin, adapter=None):  # x (B, N, D), c (B, cond_dim)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        qkv = self.qkv(modulate(self.norm1(x), shift1, scale1), adapter)  # (B, N, 3 D)
        q, k, v = qkv.unflatten(-1, (3, self.heads, HEAD_DIM)).unbind(2)  # (B, N, H, 32)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        x = x + gate1[:, None] * self.proj(self.attend(q, k, v).flatten(2), adapter)
        first, act, second = self.mlp  # called one by one: nn.Sequential hands no second argument down
        return x + gate2[:, None] * second(act(first(modulate(self.norm2(x), shift2, scale2), adapter)), adapter)


class DiT(nn.Module):
    """Args: size and patch (tuples of the same length), channels, width dim (a multiple of 32), depth, num_classes
    (0: no labels; row num_classes is the null label), cond_dim (width of the conditioning vector), steps_cond (adds
    a zero-initialised embedding of `steps`), linear_layers (indices of blocks whose attention is linear, with this feature_map:
    students of linvideo.py), context_channels (0: takes no context), context_width (a learnt 1x1 convolution without bias first
    brings the context to so many channels; None: as it is), t_scale (what the sinusoids multiply t by). world and class_names are
    only recorded. Raises ValueError.
    """

    prediction = "flow_v"
    default_shift = 1.0
    cond_names = ("label",)
    lora_targets = ("qkv", "proj", "mlp.0", "mlp.2")  # of every block

    def __init__(self, size=(16, 16), patch=(4, 4), channels=3, dim=128, depth=4, num_classes=10, cond_dim=None,
                 steps_cond=False, world=None, class_names=None, linear_layers=None, feature_map="hedgehog", context_channels=0, context_width=None,
                 t_scale=1000.0):
        super().__init__()
        self.config = dict(size=list(size), patch=list(patch), channels=channels, dim=dim, depth=depth,
                           num_classes=num_classes, cond_dim=cond_dim, steps_cond=steps_cond, world=world,
                           class_names=class_names)
        if context_channels:
            self.config |= dict(context_channels=context_channels, context_width=context_width)
            self.cond_names = ("label", "context")
        if t_scale != 1000:
            self.config["t_scale"] = t_scale
        if dim % HEAD_DIM:
            raise ValueError(f"DiT width must be a multiple of {HEAD_DIM}, got {dim}")
        if len(size) != len(patch) or any(s % p for s, p in zip(size, patch)):
            raise ValueError(f"DiT size {tuple(size)} is not divisible into patches {tuple(patch)}")
        self.size, self.patch, self.channels, self.num_classes = tuple(size), tuple(patch), channels, num_classes
        self.latent_shape, self.heads, self.head_dim = (channels, *self.size), dim // HEAD_DIM, HEAD_DIM
        cond_dim = cond_dim or dim
        grid = [s // p for s, p in zip(size, patch)]
        patch_dim = channels * int(torch.tensor(patch).prod())
        context_dim = (context_width or context_channels) * int(torch.tensor(patch).prod())
        N = int(torch.tensor(grid).prod())

        self.t_scale, self.context_channels = t_scale, context_channels
        self.project = nn.Conv2d(context_channels, context_width, 1, bias=False) if context_channels and context_width else nn.Identity()
        self.embed = nn.Linear(patch_dim + context_dim, dim)
        self.position = nn.Parameter(torch.randn(1, N, dim) * 0.02)
        self.time = nn.Sequential(nn.Linear(128, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))
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
            use_linear_attention(self, linear_layers, feature_map)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=1.0)  # as loud as the time embedding from the start
        # adaLN-Zero: every block starts as the identity, the network starts at 0, and `steps` starts without effect
        zero = [b.modulation for b in self.blocks] + [self.final_modulation, self.final, self.skip]
        for module in zero + ([self.steps] if steps_cond else []):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def self_attentions(self):
        """The modules whose attribute `attend` is a layer's self-attention, in order."""
        return list(self.blocks)

    def forward(self, x, t, label=None, steps=None, return_features=False, adapter=None, context=None):
        """x (B, C, *size), t (B,), label (B,) int64 or None = null, steps (B,), context (B, context_channels, *size) -> velocity (B, C, *size).

        return_features=True gives (velocity, middle block's tokens (B, N, D)); adapter names one of models/lora.py, None the
        bare network. Raises ValueError for a wrong shape, an unknown adapter, and steps or context that the network does not take or lacks.
        """
        lora.check(self, adapter)
        if x.shape[1:] != self.latent_shape:
            raise ValueError(f"DiT expects x of shape (B, {', '.join(map(str, self.latent_shape))}), got {tuple(x.shape)}")
        want = (len(x), self.context_channels, *self.size) if self.context_channels else None
        if (None if context is None else tuple(context.shape)) != want:
            raise ValueError(f"this DiT takes {'no context' if want is None else f'context of shape {want}'}, got "
                             f"{'none' if context is None else tuple(context.shape)}")
        c = self.time(sinusoid(t * (self.t_scale / 1000), 128).to(self.embed.weight.dtype))  # (B, cond_dim)
        if self.label is not None:
            if label is None:
                label = torch.full((x.shape[0],), self.num_classes, device=x.device)
            c = c + self.label(label)
        if steps is not None:
            if self.steps is None:
                raise ValueError("this DiT was built without steps_cond=True and cannot take `steps`")
            c = c + self.steps(sinusoid(steps.float() / 1000, 128).to(c.dtype))  # sinusoid multiplies by 1000
        c = F.silu(c)

        seen = x if context is None else torch.cat([x, self.project(context.to(self.embed.weight.dtype)).to(x.dtype)], 1)
        h = self.embed(patchify(seen, self.patch).to(c.dtype)) + self.position  # (B, N, D)
        features = None
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, c, self.rope_cos, self.rope_sin, adapter, use_reentrant=False)
            else:
                h = block(h, c, self.rope_cos, self.rope_sin, adapter)
            if i == len(self.blocks) // 2:
                features = h
        shift, scale = self.final_modulation(c).chunk(2, dim=1)
        v = unpatchify(self.final(modulate(self.final_norm(h), shift, scale)), self.channels, self.size, self.patch)
        v = v + self.skip(c).reshape(-1, self.channels, *[1] * len(self.size)) * x.to(v.dtype)  # (B, C, *size)
        return (v, features) if return_features else v
