"""PixArt-alpha text-to-image transformer (2310.00426), with diffusers' parameter names.

An image latent (4 channels, 8x smaller sides) is cut into patches of 2x2 with fixed 2-D sine
positions. Every token passes through blocks of self-attention over the image, cross-attention to
the prompt's T5 tokens, and an MLP. Time enters only as shift, scale and gate (AdaLN-single: one
projection for all blocks, to which each adds a table of its own). The model is variance-preserving
and predicts the noise.

    net = PixArtTransformer2DModel(**PIXART_512)
    eps = net(x_t, t, text=prompts, mask=mask)      # x_t = alpha(t) x0 + sigma(t) eps; t = 1 noise

    symbol   meaning                                                        shape
    x        latent at time t, the VAE's * scaling_factor                   (B, 4, H, W)
    t        time in [0, 1]; index i of n betas is t = (i + 1) / n          (B,)
    text     T5 features                                                    (B, L, 4096)
    mask     true or 1 where text is a token of the prompt                  (B, L)
    h        tokens, N = H/2 * W/2, row by row                              (B, N, D)

The 1024 variant is also conditioned on the image's height, width and their ratio. They are fixed
for a run, so they are no arguments: `forward` takes them from x, in pixels, as diffusers' pipeline
does.

State dicts load into `diffusers.PixArtTransformer2DModel`, and back, unconverted. Its clock is the
index of its betas, of which every release has n = 1000; `AdaLNSingle.forward` converts ours, and
nothing else does. Another n goes into `clock_steps`. Its output has 8 channels, the
noise and a learned variance, which nothing here uses and `forward` drops. PixArt-Sigma
(2403.04692) is the same transformer. The two ends of a real pipeline, prompts to features and
latents to images, are commands:

    python -m models.encode --teacher FOLDER --prompts_txt prompts.txt --output prompts.safetensors
    python -m models.decode --teacher FOLDER --latents samples.safetensors --output runs/images
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.diffusion import VP, sinusoid
from models.networks import lora
from models.networks.layers import (
    Attention,
    FeedForward,
    LayerNorm,
    TwoLayers,
    check_image,
    check_mask,
    check_text,
    check_time,
    unpatchify,
)
from models.networks.sequence import gather_tokens, share_of, split_tokens

# The released sizes, PixArt-alpha/PixArt-XL-2-512x512 and PixArt-XL-2-1024-MS. What is None
# follows from sample_size: interpolation_scale is 1 and 2, and only the larger one is conditioned
# on the image's size (use_additional_conditions).
PIXART_512 = dict(
    num_attention_heads=16,
    attention_head_dim=72,
    in_channels=4,
    out_channels=8,
    num_layers=28,
    dropout=0.0,
    norm_num_groups=32,
    cross_attention_dim=1152,
    attention_bias=True,
    sample_size=64,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    upcast_attention=False,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    norm_eps=1e-6,
    interpolation_scale=None,
    use_additional_conditions=None,
    caption_channels=4096,
    attention_type="default",
)
PIXART_1024 = dict(PIXART_512, sample_size=128)
# Keys that must have these values. The last four are only in configs of older versions of
# diffusers, the released ones among them.
FIXED = dict(
    dropout=0.0,
    attention_bias=True,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    upcast_attention=False,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    attention_type="default",
    double_self_attention=False,
    only_cross_attention=False,
    num_vector_embeds=None,
    use_linear_projection=False,
)
PIXELS = 8  # sides of an image over sides of its latent
TIME_DIM = 256  # width of the sinusoids of time and size


# ---- pieces --------------------------------------------------------------------------------------


def sine_positions(rows, columns, dim, base, scale, device):
    """Fixed positions of tokens, (rows * columns, dim) float32: of the column, then of the row.

    Each axis is stretched to the `base` tokens that the model was trained with, and divided by
    scale.
    """

    def axis(n):
        position = torch.arange(n, device=device) * (base / n / scale)
        return sinusoid(position / 1000, dim // 2).roll(
            dim // 4, dims=1
        )  # (n, dim / 2), sines first

    column, row = axis(columns).expand(rows, -1, -1), axis(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1)


class PatchEmbed(nn.Module):
    """Patches to tokens, with their positions. (B, C, H, W) -> (B, N, dim)."""

    def __init__(self, channels, dim, patch, base, scale):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.base, self.scale = base, scale

    def forward(self, x):
        h = self.proj(x.to(self.proj.weight.dtype))  # (B, dim, H/p, W/p)
        # (N, dim)
        position = sine_positions(*h.shape[2:], h.shape[1], self.base, self.scale, x.device)
        return (h.flatten(2).transpose(1, 2) + position).to(h.dtype)


class AdaLNSingle(nn.Module):
    """Time, and if `sized` the image's size, to the modulation of all blocks."""

    def __init__(self, dim, sized):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TwoLayers(TIME_DIM, dim, nn.SiLU())})
        if sized:  # height, width and ratio have a third of the width each
            self.emb["resolution_embedder"] = TwoLayers(TIME_DIM, dim // 3, nn.SiLU())
            self.emb["aspect_ratio_embedder"] = TwoLayers(TIME_DIM, dim // 3, nn.SiLU())
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, t, height, width, clock_steps=1000):
        """t (B,) in [0, 1], height and width in pixels -> time, modulation.

        time (B, D) and modulation (B, 6, D) are float32. clock_steps: n, the number of betas.
        """

        def embed(name, x):
            waves = sinusoid(x / 1000, TIME_DIM)  # which multiplies by 1000
            return self.emb[name](waves.to(self.linear.weight.dtype))

        # Every block's scale and gate come from here, so autocast must not lower their precision:
        # float32 weights give float32. bfloat16 weights compute in bfloat16, as in diffusers.
        with torch.autocast(t.device.type, enabled=False):
            # PixArt's clock is the index, n - 1 = noise.
            time = embed("timestep_embedder", clock_steps * t.float() - 1)  # (B, D)
            if "resolution_embedder" in self.emb:
                sizes = torch.tensor([height, width, height / width], device=t.device)
                resolution = embed("resolution_embedder", sizes[:2])
                ratio = embed("aspect_ratio_embedder", sizes[2:])
                time = time + torch.cat([resolution, ratio]).flatten()  # (B, D) + (D,)
            modulation = self.linear(F.silu(time))
        return time.float(), modulation.float().unflatten(1, (6, -1))


class Block(nn.Module):
    """Self-attention, cross-attention, MLP. Norms, modulation and residual sums are float32."""

    def __init__(self, dim, heads, eps):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = Attention(dim, heads)
        self.attn2 = Attention(dim, heads)
        self.norm2 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ff = FeedForward(dim, 4 * dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, h, context, bias, modulation, adapter=None, share=None):
        """h (B, N, D), context (B, L, D), modulation (B, 6, D) float32 -> (B, N, D).

        bias (B, 1, 1, L) is added to the logits of cross-attention; share: see `attention`.
        """
        table = self.scale_shift_table.float() + modulation  # (B, 6, D)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.chunk(6, dim=1)  # each (B, 1, D)

        z = (self.norm1(h) * (1 + scale) + shift).to(h.dtype)
        h = (h.float() + self.attn1(z, z, adapter=adapter, share=share) * gate).to(h.dtype)

        # Neither normalised, gated nor modulated.
        h = h + self.attn2(h, context, adapter=adapter, mask=bias).to(h.dtype)

        z = (self.norm2(h) * (1 + mlp_scale) + mlp_shift).to(h.dtype)
        return (h.float() + self.ff(z, adapter) * mlp_gate).to(h.dtype)


# ---- the model -----------------------------------------------------------------------------------


class PixArtTransformer2DModel(nn.Module):
    """PixArt. Keyword arguments are the keys of diffusers' config.json, kept in `self.config`.

    Those that only old configs have (the last four) are checked and dropped: diffusers ignores
    them. Raises ValueError for a config that this file does not implement. Source: PixArt-alpha
    2310.00426. Names, epsilons and what is float32 are those of diffusers, against which tests
    compare it on the same random weights.
    """

    # Only fallbacks: a checkpoint's scheduler/ folder comes first.
    prediction = "eps"
    default_schedule = VP("linear", 0.0001, 0.02)
    default_shift = 1.0
    clock_steps = 1000  # entries of the schedule's table; a teacher with another table has its own
    latent_shape = (4, 64, 64)  # 512 x 512; an instance has that of its config
    cond_names = ("text", "mask")
    sequence = None
    lora_targets = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "attn2.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    )

    def __init__(
        self,
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        dropout=0.0,
        norm_num_groups=32,
        cross_attention_dim=1152,
        attention_bias=True,
        sample_size=128,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        upcast_attention=False,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        interpolation_scale=None,
        use_additional_conditions=None,
        caption_channels=None,
        attention_type="default",
        double_self_attention=False,
        only_cross_attention=False,
        num_vector_embeds=None,
        use_linear_projection=False,
    ):
        super().__init__()
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config = {k: v for k, v in given.items() if k in PIXART_512}
        for name, value in FIXED.items():
            if given[name] != value:
                raise ValueError(
                    f"{name} = {given[name]!r} is not implemented; PixArt has {value!r}"
                )
        dim = num_attention_heads * attention_head_dim
        if caption_channels is None or cross_attention_dim != dim:
            raise ValueError(
                f"caption_channels = {caption_channels} with cross_attention_dim = "
                f"{cross_attention_dim} is not implemented; PixArt projects captions to the "
                f"blocks' width, num_attention_heads * attention_head_dim = {dim}"
            )
        if out_channels not in (None, in_channels, 2 * in_channels):
            raise ValueError(
                f"out_channels = {out_channels} is not implemented; PixArt has in_channels = "
                f"{in_channels} or, with a learned variance, twice that"
            )
        sized = use_additional_conditions
        if sized is None:
            sized = sample_size == 128
        if dim % 4 or sized and dim % 3:
            raise ValueError(
                f"num_attention_heads * attention_head_dim = {dim} must be a multiple of 4, "
                "and of 3 with use_additional_conditions"
            )
        scale = max(sample_size // 64, 1) if interpolation_scale is None else interpolation_scale

        self.latent_shape = (in_channels, sample_size, sample_size)
        self.patch_size, self.text_dim = patch_size, caption_channels
        self.pos_embed = PatchEmbed(in_channels, dim, patch_size, sample_size // patch_size, scale)
        self.adaln_single = AdaLNSingle(dim, sized)
        self.caption_projection = TwoLayers(caption_channels, dim, nn.GELU(approximate="tanh"))
        self.transformer_blocks = nn.ModuleList(
            [Block(dim, num_attention_heads, norm_eps) for _ in range(num_layers)]
        )
        self.norm_out = LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, (out_channels or in_channels) * patch_size**2)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.gradient_checkpointing = False

    @staticmethod
    def lora_key(name):
        """transformer_blocks.0... -> base_model.model.transformer_blocks.0..., its name in a file.

        diffusers by itself loads no adapters into PixArt: neither PixArtAlphaPipeline nor this
        transformer has a method for it (0.42). These are the names of peft, whose PeftModel has
        one, and ComfyUI knows them (comfy/lora.py).
        """
        return f"base_model.model.{name}"

    def forward(self, x, t, text, mask, return_features=False, adapter=None):
        """The noise eps in x = alpha(t) x0 + sigma(t) eps, like x, in x's dtype.

        x (B, in_channels, H, W); t (B,) float in [0, 1], also between the indices of the betas;
        text (B, L, caption_channels); mask (B, L) bool or integer, true for the tokens of each
        prompt. Computed in the weights' dtype or in autocast's. return_features=True: the output
        (B, N, D) of block num_layers // 2 instead, and nothing after it is run. adapter: a name of
        models/networks/lora.py, None = the bare network. Raises ValueError, one line with cause
        and remedy, for shapes that do not fit and an unknown adapter.
        """
        check_image(x, self.config["in_channels"], self.patch_size)
        check_time(t, x)
        check_text(text, x, self.text_dim)
        check_mask("mask", mask, text)
        lora.check(self, adapter)
        grid = [size // self.patch_size for size in x.shape[2:]]  # rows, columns of tokens
        sides = (PIXELS * size for size in x.shape[2:])
        time, modulation = self.adaln_single(t, *sides, clock_steps=self.clock_steps)
        h = self.pos_embed(x)  # (B, N, D)
        text = text.to(self.caption_projection.linear_1.weight.dtype)
        context = self.caption_projection(text)  # (B, L, D)
        # (B, 1, 1, L); finite, so that a mask without any token gives no NaN.
        bias = -10000.0 * (~mask.bool())[:, None, None].to(context.dtype)

        share = share_of(self.sequence, h.shape[1])
        h = split_tokens(h, share)
        inputs = context, bias, modulation, adapter, share
        for i, block in enumerate(self.transformer_blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, *inputs, use_reentrant=False)
            else:
                h = block(h, *inputs)
            if return_features and i == len(self.transformer_blocks) // 2:
                return gather_tokens(h, share)

        table = self.scale_shift_table.float() + time[:, None]  # (B, 2, D)
        shift, scale = table.chunk(2, dim=1)  # each (B, 1, D)
        out = self.proj_out((self.norm_out(h) * (1 + scale) + shift).to(h.dtype))  # (B, N, p*p*C)
        out = unpatchify(gather_tokens(out, share), grid, [self.patch_size] * 2)  # (B, 8, H, W)
        return out[:, : x.shape[1]].to(x.dtype)  # (B, 4, H, W), without the variance
