"""Z-Image text-to-image transformer, a single-stream DiT (2511.22699), with diffusers' parameter
names.

An image latent (16 channels, 8x smaller sides) is cut into patches of 2x2; the prompt is given as
Qwen3's features of its tokens. Two short stacks of blocks refine each of them alone, of which only
the image's sees the time. Then both pass as one sequence, image first, through the main blocks:
self-attention over everything, with a 3-D rotary position, and a gated MLP, with an RMSNorm before
and after each of the two. Time enters as scale and tanh gate; there is no shift.

    net = ZImageTransformer2DModel(**Z_IMAGE_6B)
    v = net(x_t, t, text=prompts, text_mask=mask)      # t = 0 data, t = 1 noise; v = eps - x0

    symbol     meaning                                                    shape
    x          latent at time t, (VAE's - shift_factor) * scaling_factor  (B, 16, H, W)
    t          time in [0, 1], after the shift                            (B,)
    text       Qwen3 features, hidden_states[-2]                          (B, L, 2560)
    text_mask  true or 1 where text is a token of the prompt              (B, L)
    h          N image tokens, row by row, then M prompt tokens           (B, N + M, D)

Image and prompt are each filled up to a multiple of 32 tokens with a learned token, which takes
part like any other. What a shorter prompt of the batch lacks beyond its own multiple of 32 is
masked: each row is computed as if it were alone.

State dicts load into `diffusers.ZImageTransformer2DModel`, and back, unconverted. Its clock runs
from 0 = noise to 1 = data and its output is x0 - eps; `ZImageTransformer2DModel.forward` reverses
both, and nothing else does. The two ends of a real pipeline, prompts to features and latents to
images, are commands:

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

# The released sizes, Tongyi-MAI/Z-Image-Turbo and Tongyi-MAI/Z-Image.
Z_IMAGE_6B = dict(
    all_patch_size=[2],
    all_f_patch_size=[1],
    in_channels=16,
    dim=3840,
    n_layers=30,
    n_refiner_layers=2,
    n_heads=30,
    n_kv_heads=30,
    norm_eps=1e-5,
    qk_norm=True,
    cap_feat_dim=2560,
    siglip_feat_dim=None,
    rope_theta=256.0,
    t_scale=1000.0,
    axes_dims=[32, 48, 48],
    axes_lens=[1536, 512, 512],
)
MULTIPLE = 32  # image and prompt are filled up to a multiple of this many tokens
TIME_DIM = 256  # width of the time embedding; a narrower model's is its own width
QK_EPS = 1e-5  # epsilon of the norms of q and k, whatever norm_eps is


# ---- pieces --------------------------------------------------------------------------------------


def fill_up(n):
    """The next multiple of 32 from n on; n int or tensor of int."""
    return -(-n // MULTIPLE) * MULTIPLE


class TimeEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, dim) float32."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, dim))

    def forward(self, t):
        with torch.autocast(t.device.type, enabled=False):
            waves = sinusoid(t, 256)  # which multiplies by 1000
            return self.mlp(waves.to(self.mlp[0].weight.dtype)).float()


class Attention(nn.Module):
    """Multi-head self-attention without biases, with q and k normalised in each head."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (lora.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList(
            [lora.Linear(dim, dim, bias=False)]
        )  # "to_out.0" in checkpoints
        self.norm_q, self.norm_k = (RMSNorm(dim // heads, eps=QK_EPS) for _ in range(2))

    def forward(self, h, mask, rotary, adapter=None, share=None):
        """h (B, N, dim) -> (B, N, dim).

        mask (B, 1, 1, N) or None; rotary = (cos, sin), each ([B,] N, 1, D/2); share: see
        `attention`.
        """
        layers = (self.to_q, self.to_k, self.to_v)
        q, k, v = (to(h, adapter).unflatten(-1, (self.heads, -1)) for to in layers)  # (B, N, H, D)
        q, k = rotate(self.norm_q(q), *rotary), rotate(self.norm_k(k), *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # rounded once, after norm and rotation
        out = attention(q, k, v, mask, share)
        return self.to_out[0](out.flatten(2), adapter)


class FeedForward(nn.Module):
    """SwiGLU without biases: w2(silu(w1 h) * w3 h). (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim):
        super().__init__()
        hidden = 8 * dim // 3
        self.w1 = lora.Linear(dim, hidden, bias=False)
        self.w2 = lora.Linear(hidden, dim, bias=False)
        self.w3 = lora.Linear(dim, hidden, bias=False)

    def forward(self, h, adapter=None):
        return self.w2(F.silu(self.w1(h, adapter)) * self.w3(h, adapter), adapter)


class Block(nn.Module):
    """Self-attention and MLP, each between two norms.

    modulated: whether the time scales the input of each and gates its output; in the blocks that
    refine prompts it does not. Norms, modulation and residual sums are float32.
    """

    def __init__(self, dim, heads, eps, modulated=True):
        super().__init__()
        self.attention, self.feed_forward = Attention(dim, heads), FeedForward(dim)
        self.attention_norm1, self.attention_norm2 = RMSNorm(dim, eps=eps), RMSNorm(dim, eps=eps)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(dim, eps=eps), RMSNorm(dim, eps=eps)
        self.adaLN_modulation = None
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.Linear(min(dim, TIME_DIM), 4 * dim))

    def forward(self, h, mask, rotary, share, time, adapter=None):
        """h (B, N, D) -> (B, N, D); time (B, TIME_DIM) float32, the others as in Attention."""
        scale, gate, mlp_scale, mlp_gate = 0.0, 1.0, 0.0, 1.0
        if self.adaLN_modulation is not None:
            # Each (B, 1, D).
            scale, gate, mlp_scale, mlp_gate = modulation(self.adaLN_modulation, time, 4)
            gate, mlp_gate = gate.tanh(), mlp_gate.tanh()

        z = (self.attention_norm1(h) * (1 + scale)).to(h.dtype)
        z = self.attention_norm2(self.attention(z, mask, rotary, adapter, share))
        h = (h.float() + gate * z).to(h.dtype)

        z = (self.ffn_norm1(h) * (1 + mlp_scale)).to(h.dtype)
        z = self.ffn_norm2(self.feed_forward(z, adapter))
        return (h.float() + mlp_gate * z).to(h.dtype)


class FinalLayer(nn.Module):
    """Tokens to patches, scaled by the time. (B, N, dim) -> (B, N, dim_out)."""

    def __init__(self, dim, dim_out):
        super().__init__()
        self.norm_final = LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, dim_out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(dim, TIME_DIM), dim))

    def forward(self, h, time):
        """h (B, N, dim), time (B, TIME_DIM) float32 -> (B, N, dim_out)."""
        (scale,) = modulation(self.adaLN_modulation, time, 1)  # (B, 1, D)
        return self.linear((self.norm_final(h) * (1 + scale)).to(h.dtype))


# ---- the model -----------------------------------------------------------------------------------


class ZImageTransformer2DModel(nn.Module):
    """Z-Image. Keyword arguments are the keys of diffusers' config.json, kept in `self.config`.

    nheads, which the released Turbo config has beside n_heads, is only checked: diffusers ignores
    it. Raises ValueError for a config that this file does not implement. Source: Z-Image
    2511.22699. Names, epsilons and what is float32 are those of diffusers, against which tests
    compare it on the same random weights.
    """

    prediction = "flow_v"
    default_shift = 3.0  # Turbo's. Only a fallback: a checkpoint's scheduler/ folder comes first.
    latent_shape = (16, 128, 128)  # 1024 x 1024
    cond_names = ("text", "text_mask")
    sequence = None
    # In layers, noise_refiner and context_refiner.
    lora_targets = (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )
    # In LoRA files of programs that use Z-Image's own names.
    lora_aliases = {"attention.to_out.0": "attention.out"}

    def __init__(
        self,
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=3840,
        n_layers=30,
        n_refiner_layers=2,
        n_heads=30,
        n_kv_heads=30,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=2560,
        siglip_feat_dim=None,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=(32, 48, 48),
        axes_lens=(1024, 512, 512),
        nheads=None,
    ):
        super().__init__()
        self.config = {
            k: v for k, v in locals().items() if k not in ("self", "__class__", "nheads")
        }
        for name in ("all_patch_size", "all_f_patch_size", "axes_dims", "axes_lens"):
            self.config[name] = list(self.config[name])  # what JSON gives back
        if len(all_patch_size) != 1 or list(all_f_patch_size) != [1]:
            raise ValueError(
                f"all_patch_size = {list(all_patch_size)} with all_f_patch_size = "
                f"{list(all_f_patch_size)} is not implemented; "
                "Z-Image has one patch size, [2] with [1]"
            )
        if siglip_feat_dim is not None:
            raise ValueError(
                f"siglip_feat_dim = {siglip_feat_dim} means the omni variant, which is not "
                "implemented; use a text-to-image checkpoint (siglip_feat_dim null)"
            )
        if n_kv_heads != n_heads or nheads not in (None, n_heads):
            raise ValueError(
                f"n_heads = {n_heads} with n_kv_heads = {n_kv_heads}, nheads = {nheads} is not "
                "implemented; all are equal"
            )
        if not qk_norm or t_scale != 1000:
            raise ValueError(
                f"qk_norm = {qk_norm} with t_scale = {t_scale} is not implemented; "
                "Z-Image has true and 1000"
            )
        if dim % n_heads or sum(axes_dims) != dim // n_heads or any(d % 2 for d in axes_dims):
            raise ValueError(
                f"axes_dims = {list(axes_dims)} must be even and sum to the width of a head, "
                f"dim / n_heads = {dim} / {n_heads}"
            )
        if len(axes_dims) != 3 or len(axes_lens) != 3:
            raise ValueError(
                f"axes_dims = {list(axes_dims)} and axes_lens = {list(axes_lens)} "
                "must have three entries"
            )

        self.patch_size, self.text_dim = all_patch_size[0], cap_feat_dim
        key = f"{self.patch_size}-1"  # part of the names of parameters
        self.latent_shape = (in_channels, *self.latent_shape[1:])
        patch_dim = self.patch_size**2 * in_channels
        self.all_x_embedder = nn.ModuleDict({key: nn.Linear(patch_dim, dim)})
        self.all_final_layer = nn.ModuleDict({key: FinalLayer(dim, patch_dim)})
        self.t_embedder = TimeEmbedder(min(dim, TIME_DIM))
        self.cap_embedder = nn.Sequential(
            RMSNorm(cap_feat_dim, eps=norm_eps), nn.Linear(cap_feat_dim, dim)
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, dim))

        def blocks(n, modulated=True):
            return nn.ModuleList([Block(dim, n_heads, norm_eps, modulated) for _ in range(n)])

        self.noise_refiner = blocks(n_refiner_layers)
        self.context_refiner = blocks(n_refiner_layers, modulated=False)
        self.layers = blocks(n_layers)
        self.gradient_checkpointing = False

    @staticmethod
    def lora_key(name):
        """layers.0.attention.to_q -> diffusion_model.layers.0.attention.to_q, its name in a file.

        Two programs read this name. diffusers' ZImagePipeline.load_lora_weights removes the prefix
        (loaders/lora_conversion_utils.py); ComfyUI, where q, k and v are one layer, knows these
        names under it (comfy/lora.py, comfy/utils.py: z_image_to_diffusers).
        """
        return f"diffusion_model.{name}"

    def forward(self, x, t, text, text_mask, return_features=False, adapter=None):
        """Flow velocity v = eps - x0, like x, in x's dtype.

        x (B, in_channels, H, W); t (B,) float in [0, 1], t = 0 data, t = 1 noise; text (B, L,
        cap_feat_dim); text_mask (B, L) bool or integer, true for the tokens of each prompt, at
        least one. Computed in the weights' dtype or in autocast's. return_features=True: the
        image's tokens (B, N, D) after layers[n_layers // 2] instead, and nothing after it is run.
        adapter: a name of models/networks/lora.py, None = the bare network. Raises ValueError, one
        line with cause and remedy, for shapes that do not fit and an unknown adapter.
        """
        lengths = self._check(x, t, text, text_mask)
        lora.check(self, adapter)
        p, key = self.patch_size, f"{self.patch_size}-1"
        rows, columns = (size // p for size in x.shape[2:])
        N, M = rows * columns, fill_up(max(lengths))
        P = fill_up(N)  # h is N image tokens, P - N that fill up, and M of the prompts
        n = torch.tensor(lengths, device=x.device)[:, None]  # (B, 1), number of prompt tokens
        index = torch.arange(M, device=x.device)
        time = self.t_embedder(1 - t.float())  # Z-Image's clock: 0 = noise, 1 = data

        h = x.unflatten(3, (columns, p)).unflatten(2, (rows, p))  # (B, C, H/p, p, W/p, p)
        h = h.permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, C)
        embed = self.all_x_embedder[key]
        h = embed(h.flatten(3).flatten(1, 2).to(embed.weight.dtype))  # (B, N, D)
        pad = self.x_pad_token.to(h.dtype).expand(len(x), P - N, -1)
        h = torch.cat([h, pad], dim=1)  # (B, P, D)

        # A prompt's tokens move to the front, in their order; then cut or fill up to M.
        first = (~text_mask.bool()).int().argsort(dim=1, stable=True)
        c = F.pad(text.take_along_dim(first[..., None], 1), (0, 0, 0, M - text.shape[1]))
        norm, embed = self.cap_embedder
        c = embed(norm(c).to(embed.weight.dtype))  # (B, M, D)
        c = torch.where((index < n)[..., None], c, self.cap_pad_token.to(c.dtype))

        # Positions on three axes. The filled-up prompt is at 1, 2, ... of the first. The image is
        # at the next place of the first and at its rows and columns on the others. What fills it
        # up is at 0.
        position = torch.zeros(len(x), P + M, 3, dtype=torch.long, device=x.device)
        position[:, :N, 0] = fill_up(n) + 1
        row, column = torch.arange(rows, device=x.device), torch.arange(columns, device=x.device)
        position[:, :N, 1:] = torch.cartesian_prod(row, column)
        position[:, P:, 0] = index + 1
        # Each (B, P + M, 1, D/2).
        cos, sin = rope(position, self.config["axes_dims"], self.config["rope_theta"])

        # If all prompts fill up to M, nothing needs a mask, and attention is faster without one.
        mask = mask_c = None
        if any(fill_up(k) < M for k in lengths):
            mask_c = (index < fill_up(n))[:, None, None]  # (B, 1, 1, M)
            mask = F.pad(mask_c, (P, 0), value=True)  # (B, 1, 1, P + M)

        def run(block, *inputs):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                return checkpoint(block, *inputs, time, adapter, use_reentrant=False)
            return block(*inputs, time, adapter)

        # Spread over ranks are the image's tokens, and later all; the prompt alone is short.
        share = share_of(self.sequence, P)
        h, *rotary = (split_tokens(z, share) for z in (h, cos[:, :P], sin[:, :P]))
        for block in self.noise_refiner:
            h = run(block, h, None, rotary, share)
        for block in self.context_refiner:
            c = run(block, c, mask_c, [cos[:, P:], sin[:, P:]], None)
        h = torch.cat([gather_tokens(h, share), c], dim=1)
        share = share_of(self.sequence, P + M)
        h, *rotary = (split_tokens(z, share) for z in (h, cos, sin))
        for i, block in enumerate(self.layers):
            h = run(block, h, mask, rotary, share)
            if return_features and i == len(self.layers) // 2:
                return gather_tokens(h, share)[:, :N]

        h = gather_tokens(h, share)
        out = self.all_final_layer[key](h[:, :N], time)  # (B, N, p*p*C)
        return -unpatchify(out, (rows, columns), (p, p)).to(x.dtype)  # Z-Image's own is x0 - eps

    def _check(self, x, t, text, text_mask):
        """-> number of tokens of each prompt. Raises ValueError for what forward cannot take."""
        c, p = self.config, self.patch_size
        check_image(x, c["in_channels"], p)
        check_time(t, x)
        check_text(text, x, self.text_dim)
        check_mask("text_mask", text_mask, text)
        lengths = text_mask.bool().sum(1).tolist()
        if not all(lengths):
            raise ValueError(
                f"text_mask has no token in row {lengths.index(0)}; "
                "an empty prompt has those of the chat template"
            )
        needs = [fill_up(max(lengths)) + 2, *(size // p for size in x.shape[2:])]
        if any(need > most for need, most in zip(needs, c["axes_lens"], strict=True)):
            raise ValueError(
                f"H, W = {tuple(x.shape[2:])} with {max(lengths)} prompt tokens need {needs} "
                f"positions, axes_lens has {c['axes_lens']}; pass a smaller x or a shorter text"
            )
        return lengths
