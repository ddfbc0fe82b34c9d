"""Parts that several of the released transformers share, and the checks of what they are called
with.

Norms are computed in float32 and return it, whatever the weights are; linear layers run in the
weights' dtype, or in autocast's. Layers that adapters may change take the adapter's name as an
argument. In comments: B batch, N tokens, M tokens of a context, H heads, D width (of a head, in
attention).
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.networks import lora

# ---- attention and rotary positions --------------------------------------------------------------


def attention(q, k, v, mask=None, share=None):
    """softmax(q k^T / sqrt(D)) v. q (B, N, H, D), k and v (B, M, H, D) -> (B, N, H, D).

    mask (B, 1, 1, M): bool, False for a key that no query sees; or of q's dtype, added to
    q k^T / sqrt(D); or None. share: where q, k and v are of this rank's tokens alone (sequence.py);
    the mask is then still of all of them.
    """
    if share is not None:
        q, k, v = share.heads(torch.stack([q, k, v]))  # all tokens of some heads
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, N, D)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)  # (B, N, H, D)
    return out if share is None else share.tokens(out)


def given(**arguments):
    """Those that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def rope(position, dims, theta):
    """cos and sin of rotary angles, each (..., 1, sum(dims) / 2) float32; position (..., axes) int.

    The channels of a head are pairs (0, 1), (2, 3), ...; the first dims[0] / 2 pairs are rotated
    according to position[..., 0], the next dims[1] / 2 according to position[..., 1], and so on.
    The angles are recomputed at every call and are no buffer: `.to(bfloat16)` would round a
    buffer, and construction on the meta device would lose it.
    """
    real = torch.float32 if position.device.type == "mps" else torch.float64  # MPS has no float64
    angles = []
    for axis, dim in enumerate(dims):
        channel = torch.arange(0, dim, 2, dtype=real, device=position.device)  # (dim/2,)
        frequency = theta ** -(channel / dim)
        angles.append(position[..., axis, None] * frequency)  # (..., dim/2)
    angle = torch.cat(angles, dim=-1).unsqueeze(-2)  # (..., 1, sum(dims)/2)
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """Rotate each channel pair (2i, 2i + 1) of x (B, N, H, D) by its token's angle.

    cos, sin: ([B,] N, 1, D/2), as rope gives them.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (B, N, H, D/2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)  # (B, N, H, D)


# ---- layers --------------------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    """LayerNorm that is computed and returned in float32, whatever input and weights are."""

    def forward(self, x):
        w, b = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())
        return F.layer_norm(x.float(), self.normalized_shape, w, b, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMSNorm that is computed and returned in float32, whatever input and weights are."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


class Attention(nn.Module):
    """Multi-head attention. q and k are normalised over all heads together, unless eps is None.

    `attend(q, k, v)` on (B, N, H, D) mixes the tokens and can be replaced in any block, by a
    function or a module: `net.blocks[i].attn1.attend = linear_attention`. It is called with q and
    k after norm and rotation, and also with the mask or the share, if there is one. attends:
    {adapter: what takes its place in calls with that adapter}; modules there are not this one's
    parameters.
    """

    def __init__(self, dim, heads, eps=None):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (lora.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([lora.Linear(dim, dim)])  # "to_out.0" in checkpoints
        self.norm_q, self.norm_k = (
            nn.Identity() if eps is None else RMSNorm(dim, eps=eps) for _ in range(2)
        )
        self.attend, self.attends = attention, {}

    def forward(self, h, context, rope=None, adapter=None, mask=None, share=None):
        """h (B, N, dim) attends to context (B, M, dim) -> (B, N, dim).

        rope = (cos, sin) or None; mask and share as in `attention`.
        """
        q, k = self.norm_q(self.to_q(h, adapter)), self.norm_k(self.to_k(context, adapter))
        v = self.to_v(context, adapter)
        q, k, v = (z.unflatten(-1, (self.heads, -1)) for z in (q, k, v))  # (B, N, H, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k = q.to(v.dtype), k.to(v.dtype)  # rounded once, after norm and rotation
        attend = self.attends.get(adapter, self.attend)
        out = attend(q, k, v, **given(mask=mask, share=share))
        return self.to_out[0](out.flatten(2), adapter)  # (B, N, dim)


class GELU(nn.Module):
    """A linear layer, then the tanh-approximated GELU. (B, N, dim) -> (B, N, dim_out)."""

    def __init__(self, dim, dim_out):
        super().__init__()
        self.proj = lora.Linear(dim, dim_out)

    def forward(self, h, adapter=None):
        return F.gelu(self.proj(h, adapter), approximate="tanh")


class FeedForward(nn.Module):
    """(B, N, dim) -> (B, N, dim). net.1 is empty: it is dropout in diffusers, and holds a place."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.net = nn.Sequential(GELU(dim, hidden), nn.Identity(), lora.Linear(hidden, dim))

    def forward(self, h, adapter=None):
        # One by one, because nn.Sequential passes no second argument on.
        return self.net[2](self.net[0](h, adapter), adapter)


class TwoLayers(nn.Module):
    """linear_2(act(linear_1(x))). (..., dim_in) -> (..., dim)."""

    def __init__(self, dim_in, dim, act):
        super().__init__()
        self.linear_1, self.act, self.linear_2 = nn.Linear(dim_in, dim), act, nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(self.act(self.linear_1(x)))


def modulation(net, time, parts):
    """net(time) in equal parts, each (B, 1, ...) float32; time (B, D) float32.

    Autocast must not lower the precision of what scales every token: float32 weights give float32.
    bfloat16 weights compute in bfloat16, as in diffusers.
    """
    with torch.autocast(time.device.type, enabled=False):
        time = time.to(next(net.parameters()).dtype)
        return net(time).float()[:, None].chunk(parts, dim=-1)


def unpatchify(tokens, grid, patch):
    """(B, prod(grid), prod(patch) * C), channels last in a patch -> (B, C, *sizes).

    Each of the sizes is grid * patch on its axis. models/networks/dit.py has patches with the
    channels first.
    """
    n, sizes = len(grid), [g * p for g, p in zip(grid, patch, strict=True)]
    x = tokens.unflatten(2, (*patch, -1)).unflatten(1, grid)  # (B, *grid, *patch, C)
    axes = [axis for i in range(n) for axis in (1 + i, 1 + n + i)]  # g0, p0, g1, p1, ...
    x = x.permute(0, 2 * n + 1, *axes)  # (B, C, g0, p0, g1, p1, ...)
    return x.reshape(*x.shape[:2], *sizes)


# ---- a picture beside x --------------------------------------------------------------------------


def context_layer(channels, width):
    """What brings a context to `width` channels: a 1x1 convolution that is trained; width None or
    0: nothing does. Raises ValueError for a width without a context."""
    if width and not channels:
        raise ValueError(f"context_width = {width} needs context_channels")
    return nn.Conv2d(channels, width, 1, bias=False) if channels and width else nn.Identity()


def with_context(layer, x, context, channels):
    """x and, in further channels, its context.  -> (B, C + C', H, W)

    layer: of `context_layer`. x (B, C, H, W); context (B, channels, H, W), None where channels is
    0. Raises ValueError for another one.
    """
    want = (len(x), channels, *x.shape[2:]) if channels else None
    got = None if context is None else tuple(context.shape)
    if got != want:
        takes = "no context" if want is None else f"context of shape {want}"
        raise ValueError(f"this network takes {takes}, got {'none' if got is None else got}")
    if context is None:
        return x
    if isinstance(layer, nn.Conv2d):
        context = layer(context.to(layer.weight.dtype))
    return torch.cat([x, context.to(x.dtype)], dim=1)


# ---- checks of the arguments of forward ----------------------------------------------------------


def check_time(t, x):
    """Raises ValueError unless x and t (B,) are floats, one t for each row of x."""
    check_floats(x)
    if t.shape != x.shape[:1] or not t.is_floating_point():
        raise ValueError(
            f"t is {t.dtype} {tuple(t.shape)}; pass floats in [0, 1] of shape ({x.shape[0]},)"
        )


def check_floats(x):
    """Raises ValueError for integers, to which a prediction would be rounded."""
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; pass floats")


def check_label(label, x, num_classes):
    """Raises ValueError unless label (B,) is integers, one for each row of x."""
    floats = label.is_floating_point() or label.dtype == torch.bool
    if label.shape != x.shape[:1] or floats:
        raise ValueError(
            f"label is {label.dtype} {tuple(label.shape)}; "
            f"pass classes 0 to {num_classes}, integers of shape ({x.shape[0]},)"
        )


def check_text(text, x, width):
    """Raises ValueError unless text (B, L, width) has one row for each of x."""
    if text.dim() != 3 or text.shape[0] != x.shape[0] or text.shape[2] != width:
        raise ValueError(f"text has shape {tuple(text.shape)}; pass ({x.shape[0]}, L, {width})")


def check_mask(name, mask, text):
    """Raises ValueError unless mask (B, L) is bool or integers, one for each token of text."""
    if mask.shape != text.shape[:2] or mask.is_floating_point():
        raise ValueError(
            f"{name} is {mask.dtype} {tuple(mask.shape)}; "
            f"pass bool or integers of shape {tuple(text.shape[:2])}"
        )


def check_image(x, channels, patch):
    """Raises ValueError unless x (B, channels, H, W) divides into patches of patch x patch."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}; pass a latent (B, {channels}, H, W)")
    if any(size % patch for size in x.shape[2:]):
        raise ValueError(
            f"H, W = {tuple(x.shape[2:])} do not divide into patches of {patch} x {patch}; "
            "crop or pad x"
        )
