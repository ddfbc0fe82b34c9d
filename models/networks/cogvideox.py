"""CogVideoX-2B text-to-video transformer (2408.06072), with diffusers' parameter names.

A video latent (16 channels, 4x fewer frames, 8x smaller sides) is cut into patches of 1x2x2 with
fixed 3-D sine positions. The prompt's 226 T5 tokens and the tokens of the video form one sequence,
prompt first, through blocks of self-attention over both and an MLP. Both share all weights but one:
the layer that makes shift, scale and gate from the time has an output for each of the two streams
("expert" AdaLN). The model is variance-preserving and predicts v.

    net = CogVideoXTransformer3DModel(**COGVIDEOX_2B)
    v = net(x_t, t, text=prompts)    # x_t = alpha(t) x0 + sigma(t) eps; v = alpha eps - sigma x0

    symbol   meaning                                                        shape
    x        latent at time t, the VAE's * scaling_factor                   (B, 16, T, H, W)
    t        time in [0, 1]; index i of n betas is t = (i + 1) / n          (B,)
    text     T5 features of all 226 tokens, padding too: there is no mask   (B, M, 4096)
    h        tokens, M of the prompt, then N = T * H/2 * W/2 in order       (B, M + N, D)
             T, H, W

diffusers has videos as (B, T, C, H, W); these are (B, C, T, H, W), as everywhere here. State dicts
load into `diffusers.CogVideoXTransformer3DModel`, and back, unconverted. Its clock is the index of
its betas, of which the release has n = 1000; `forward` converts ours, and nothing else does.
Another n goes into `clock_steps`. The betas have an SNR that is divided by 3, and none at the end:
VP(zero_snr=True, snr_shift=3.0). CogVideoX-5B and 1.5 have rotary positions, which are not
implemented.

The two ends of a real pipeline, prompts to features and latents to videos, are commands:

    python -m models.encode --teacher FOLDER --prompts_txt prompts.txt --output prompts.safetensors
    python -m models.decode --teacher FOLDER --latents samples.safetensors --output runs/videos
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.linear_attention import use_linear_attention
from models.diffusion import VP, sinusoid
from models.networks import lora
from models.networks.dit import unpatchify
from models.networks.layers import (
    Attention,
    FeedForward,
    LayerNorm,
    TwoLayers,
    check_text,
    check_time,
    given,
)
from models.networks.sequence import gather_tokens, share_of, split_tokens

# THUDM/CogVideoX-2b: 49 frames of 480 x 720. sample_frames counts pixels' frames, the other two
# sides are those of the latent.
COGVIDEOX_2B = dict(
    num_attention_heads=30,
    attention_head_dim=64,
    in_channels=16,
    out_channels=16,
    flip_sin_to_cos=True,
    freq_shift=0,
    time_embed_dim=512,
    ofs_embed_dim=None,
    text_embed_dim=4096,
    num_layers=30,
    dropout=0.0,
    attention_bias=True,
    sample_width=90,
    sample_height=60,
    sample_frames=49,
    patch_size=2,
    patch_size_t=None,
    temporal_compression_ratio=4,
    max_text_seq_length=226,
    activation_fn="gelu-approximate",
    timestep_activation_fn="silu",
    norm_elementwise_affine=True,
    norm_eps=1e-5,
    spatial_interpolation_scale=1.875,
    temporal_interpolation_scale=1.0,
    use_rotary_positional_embeddings=False,
    use_learned_positional_embeddings=False,
    patch_bias=True,
)
# Keys that must have these values. The rotary 5B differs in the last three, 1.5 in patch_size_t,
# their image-to-video models in ofs_embed_dim and in_channels.
FIXED = dict(
    flip_sin_to_cos=True,
    freq_shift=0,
    dropout=0.0,
    attention_bias=True,
    activation_fn="gelu-approximate",
    timestep_activation_fn="silu",
    ofs_embed_dim=None,
    patch_size_t=None,
    patch_bias=True,
    use_rotary_positional_embeddings=False,
    use_learned_positional_embeddings=False,
)
QK_EPS = 1e-6  # of the norms of q and k; the others have norm_eps


# ---- pieces --------------------------------------------------------------------------------------


def sine_positions(frames, rows, columns, dim, space_scale, time_scale, device):
    """Fixed positions of the N tokens of a clip, (N, dim) float32, in the order T, H, W.

    A quarter of the channels tells the frame, the next three eighths the column, the last the row;
    the frame is divided by time_scale, the other two by space_scale.
    """

    def waves(position, dim):
        return sinusoid(position / 1000, dim).roll(dim // 2, dims=1)  # sines first

    axes = [torch.arange(n, device=device) for n in (frames, rows, columns)]
    frame, row, column = torch.cartesian_prod(*axes).unbind(1)  # each (N,)
    column, row = (waves(z / space_scale, 3 * dim // 8) for z in (column, row))
    return torch.cat([waves(frame / time_scale, dim // 4), column, row], dim=1)


def streams(x, M):
    """x (B, M + N, D) -> prompt (B, M, D), video (B, N, D)."""
    return x[:, :M], x[:, M:]


class PatchEmbed(nn.Module):
    """Prompt and patches to tokens, with the positions of patches."""

    def __init__(self, config, dim):
        super().__init__()
        p = config["patch_size"]
        self.proj = nn.Conv2d(config["in_channels"], dim, p, stride=p)
        self.text_proj = nn.Linear(config["text_embed_dim"], dim)
        self.scales = config["spatial_interpolation_scale"], config["temporal_interpolation_scale"]

    def forward(self, x, text):
        """x (B, C, T, H, W), text (B, M, text_embed_dim) -> (B, M + N, dim)."""
        dtype = self.proj.weight.dtype
        frames = x.to(dtype).transpose(1, 2)  # (B, T, C, H, W)
        h = self.proj(frames.flatten(0, 1))  # (B T, dim, H/2, W/2)
        position = sine_positions(x.shape[2], *h.shape[2:], h.shape[1], *self.scales, x.device)
        h = h.flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2]).flatten(1, 2)  # (B, N, dim)
        return torch.cat([self.text_proj(text.to(dtype)), (h + position).to(h.dtype)], dim=1)


class ExpertNorm(nn.Module):
    """LayerNorm, then shift and scale of the time, which differ between prompt and video."""

    def __init__(self, time_dim, dim, eps, affine):
        super().__init__()
        self.linear = nn.Linear(time_dim, 6 * dim)
        self.norm = LayerNorm(dim, eps, elementwise_affine=affine)

    def forward(self, h, time, M):
        """h (B, M + N, D), time (B, E) -> the same shape and dtype, and two gates (B, 1, D).

        The gates are float32, the prompt's first.
        """
        # What scales every token comes from here, so autocast must not lower its precision.
        with torch.autocast(h.device.type, enabled=False):
            table = self.linear(F.silu(time.to(self.linear.weight.dtype))).float()  # (B, 6D)
        video, prompt = table[:, None].chunk(2, dim=2)  # each (B, 1, 3D)
        parts, gates = [], []
        for part, own in zip(streams(h, M), (prompt, video)):
            shift, scale, gate = own.chunk(3, dim=2)
            parts.append((self.norm(part) * (1 + scale) + shift).to(h.dtype))
            gates.append(gate)
        return torch.cat(parts, dim=1), gates


class JointAttention(Attention):
    """Self-attention over prompt and video, with q and k normalised in each head."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.norm_q, self.norm_k = (LayerNorm(dim // heads, QK_EPS) for _ in range(2))

    def forward(self, h, adapter=None, share=None):
        """h (B, M + N, D) -> the same; share: see `attention`."""
        layers = self.to_q, self.to_k, self.to_v
        q, k, v = (to(h, adapter).unflatten(-1, (self.heads, -1)) for to in layers)
        q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        attend = self.attends.get(adapter, self.attend)
        return self.to_out[0](attend(q, k, v, **given(share=share)).flatten(2), adapter)


class Block(nn.Module):
    """Self-attention and MLP. Norms, modulation and residual sums are float32."""

    def __init__(self, dim, time_dim, heads, eps, affine):
        super().__init__()
        self.norm1 = ExpertNorm(time_dim, dim, eps, affine)
        self.attn1 = JointAttention(dim, heads)
        self.norm2 = ExpertNorm(time_dim, dim, eps, affine)
        self.ff = FeedForward(dim, 4 * dim)

    def forward(self, h, time, M, adapter=None, share=None):
        """h (B, M + N, D), of whose tokens the first M are the prompt's; time (B, E) -> like h."""

        def gated(out, gates):
            parts = zip(streams(h, M), streams(out, M), gates)
            return torch.cat([a.float() + b * gate for a, b, gate in parts], dim=1).to(h.dtype)

        z, gates = self.norm1(h, time, M)
        h = gated(self.attn1(z, adapter, share), gates)
        z, gates = self.norm2(h, time, M)
        return gated(self.ff(z, adapter), gates)


class LastNorm(nn.Module):
    """The norm before the output, with shift and scale of the time."""

    def __init__(self, time_dim, dim, eps, affine):
        super().__init__()
        self.linear = nn.Linear(time_dim, 2 * dim)
        self.norm = LayerNorm(dim, eps, elementwise_affine=affine)

    def forward(self, h, time):
        """h (B, N, D), time (B, E) -> (B, N, D) float32."""
        with torch.autocast(h.device.type, enabled=False):
            table = self.linear(F.silu(time.to(self.linear.weight.dtype))).float()
        shift, scale = table[:, None].chunk(2, dim=2)  # each (B, 1, D)
        return self.norm(h) * (1 + scale) + shift


# ---- the model -----------------------------------------------------------------------------------


class CogVideoXTransformer3DModel(nn.Module):
    """CogVideoX-2B. Keyword arguments are the keys of diffusers' config.json, in `self.config`.

    One addition: linear_layers, indices of the blocks whose self-attention is linear, with this
    feature_map and feature_dim (students of linvideo.py). Raises ValueError for a config that this
    file does not implement. Source: CogVideoX 2408.06072. Names, epsilons and what is float32 are
    those of diffusers, against which tests compare it on the same random weights.
    """

    # Only fallbacks: a checkpoint's scheduler/ folder comes first.
    prediction = "vp_v"
    default_schedule = VP("scaled_linear", 0.00085, 0.012, zero_snr=True, snr_shift=3.0)
    default_shift = 1.0
    clock_steps = 1000  # entries of the schedule's table; a teacher with another table has its own
    latent_shape = (16, 13, 60, 90)  # 49 frames of 480 x 720; an instance has that of its config
    cond_names = ("text",)
    sequence = None
    lora_targets = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    )

    def __init__(
        self,
        num_attention_heads=30,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        flip_sin_to_cos=True,
        freq_shift=0,
        time_embed_dim=512,
        ofs_embed_dim=None,
        text_embed_dim=4096,
        num_layers=30,
        dropout=0.0,
        attention_bias=True,
        sample_width=90,
        sample_height=60,
        sample_frames=49,
        patch_size=2,
        patch_size_t=None,
        temporal_compression_ratio=4,
        max_text_seq_length=226,
        activation_fn="gelu-approximate",
        timestep_activation_fn="silu",
        norm_elementwise_affine=True,
        norm_eps=1e-5,
        spatial_interpolation_scale=1.875,
        temporal_interpolation_scale=1.0,
        use_rotary_positional_embeddings=False,
        use_learned_positional_embeddings=False,
        patch_bias=True,
        linear_layers=None,
        feature_map="hedgehog",
        feature_dim=None,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k in COGVIDEOX_2B}
        dim = num_attention_heads * attention_head_dim
        check_config(self.config, dim)
        frames = (sample_frames - 1) // temporal_compression_ratio + 1
        self.latent_shape = (in_channels, frames, sample_height, sample_width)
        self.patch_size, self.text_dim = patch_size, text_embed_dim
        self.patch_embed = PatchEmbed(self.config, dim)
        self.time_embedding = TwoLayers(dim, time_embed_dim, nn.SiLU())
        norm = norm_eps, norm_elementwise_affine
        self.transformer_blocks = nn.ModuleList(
            [Block(dim, time_embed_dim, num_attention_heads, *norm) for _ in range(num_layers)]
        )
        self.norm_final = LayerNorm(dim, norm_eps, elementwise_affine=norm_elementwise_affine)
        self.norm_out = LastNorm(time_embed_dim, dim, *norm)
        self.proj_out = nn.Linear(dim, out_channels * patch_size**2)
        self.gradient_checkpointing = False
        self.heads, self.head_dim = num_attention_heads, attention_head_dim
        if linear_layers is not None:
            use_linear_attention(self, linear_layers, feature_map, feature_dim)

    @property
    def self_attentions(self):
        """The modules whose attribute `attend` is a block's self-attention, in order.

        Its tokens are those of the prompt, then those of the video.
        """
        return [block.attn1 for block in self.transformer_blocks]

    @staticmethod
    def lora_key(name):
        """transformer_blocks.0... -> transformer.transformer_blocks.0..., its name in a file.

        CogVideoXPipeline.load_lora_weights takes the names of peft after "transformer.", the name
        of the component (loaders/lora_pipeline.py).
        """
        return f"transformer.{name}"

    def forward(self, x, t, text, return_features=False, adapter=None):
        """v = alpha(t) eps - sigma(t) x0, like x, in x's dtype.

        x (B, in_channels, T, H, W); t (B,) float in [0, 1], also between the indices of the betas;
        text (B, max_text_seq_length, text_embed_dim). Computed in the weights' dtype or in
        autocast's. return_features=True: the output of block num_layers // 2 instead, of the video
        alone, (B, N, D), and nothing after it is run. adapter: a name of models/networks/lora.py,
        None = the bare network. Raises ValueError, one line with cause and remedy, for shapes that
        do not fit and an unknown adapter.
        """
        self._check(x, t, text)
        lora.check(self, adapter)
        h = self.patch_embed(x, text)  # (B, M + N, D)
        # CogVideoX's clock is the index, n - 1 = noise. sinusoid multiplies by 1000.
        waves = sinusoid((self.clock_steps * t.float() - 1) / 1000, h.shape[2])
        # Under autocast as well in the weights' dtype, like all that scales the tokens.
        with torch.autocast(t.device.type, enabled=False):
            time = self.time_embedding(
                waves.to(self.time_embedding.linear_1.weight.dtype)
            )  # (B, E)

        M = text.shape[1]
        share = share_of(self.sequence, h.shape[1])
        h, own_M = split_tokens(h, share), M
        if share is not None:  # of the M tokens of the prompt, those that this rank has
            own_M = min(max(M - sum(share.sizes[: share.rank]), 0), h.shape[1])
        for i, block in enumerate(self.transformer_blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, time, own_M, adapter, share, use_reentrant=False)
            else:
                h = block(h, time, own_M, adapter, share)
            if return_features and i == len(self.transformer_blocks) // 2:
                return gather_tokens(h, share)[:, M:]

        z = self.norm_out(self.norm_final(h), time).to(h.dtype)
        out = gather_tokens(self.proj_out(z), share)[:, M:]  # (B, N, C p p)
        p = self.patch_size
        return unpatchify(out, self.config["out_channels"], x.shape[2:], (1, p, p)).to(x.dtype)

    def _check(self, x, t, text):
        """Raises ValueError for what forward cannot take."""
        channels, p, M = (
            self.config[k] for k in ("in_channels", "patch_size", "max_text_seq_length")
        )
        if x.dim() != 5 or x.shape[1] != channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; pass a latent (B, {channels}, T, H, W)"
            )
        if any(size % p for size in x.shape[3:]):
            raise ValueError(
                f"H, W = {tuple(x.shape[3:])} do not divide into patches of {p} x {p}; "
                "crop or pad x"
            )
        check_time(t, x)
        check_text(text, x, self.text_dim)
        if text.shape[1] != M:
            raise ValueError(
                f"text has {text.shape[1]} tokens, and CogVideoX reads its padding too; pass "
                f"({x.shape[0]}, {M}, {self.text_dim})"
            )


def check_config(config, dim):
    """Raises ValueError for a config that this file does not implement. dim: width of the blocks"""
    for name, value in FIXED.items():
        if config[name] != value:
            raise ValueError(
                f"{name} = {config[name]!r} is not implemented; use CogVideoX-2B, which has "
                f"{value!r}"
            )
    if config["out_channels"] != config["in_channels"]:
        raise ValueError(
            f"in_channels = {config['in_channels']} with {config['out_channels']} out means "
            "image-to-video, which is not implemented; use a text-to-video checkpoint"
        )
    if dim % 16:
        raise ValueError(
            f"num_attention_heads * attention_head_dim = {dim} must be a multiple of 16, for the "
            "positions"
        )
