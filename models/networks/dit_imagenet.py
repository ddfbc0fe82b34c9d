"""The ImageNet transformer of DiT (2212.09748), SiT and LFM, with diffusers' parameter names.

An image latent (4 channels, 8x smaller sides) is cut into patches of 2x2 with fixed 2-D sine
positions. Every token passes through blocks of self-attention and an MLP. Time and class enter
only as shift, scale and gate (adaLN-Zero: the gates start at zero). The small DiT that this
repository trains itself is in models/networks/dit.py.

    net = DiTTransformer2DModel(**DIT_XL_2)
    eps = net(x_t, t, label=classes)      # x_t = alpha(t) x0 + sigma(t) eps; t = 1 noise

    symbol   meaning                                                        shape
    x        latent at time t, the VAE's * scaling_factor                   (B, 4, H, W)
    t        time in [0, 1]; index i of 1000 betas is t = (i + 1) / 1000    (B,)
    label    class 0 .. K-1, K = null (unconditional)                       (B,)
    h        tokens, N = H/2 * W/2, row by row                              (B, N, D)

State dicts load into `diffusers.DiTTransformer2DModel`, and back, unconverted. There each block
has embedders of time and class of its own, which are equal in all released checkpoints; the paper
has them once. Here all blocks share one module: it is trained once and counted once, and state_dict
has it under the name of every block. A checkpoint whose copies differ, because diffusers trained
them apart, needs shared_embedders = false in its config.json, a key that diffusers ignores. The
final layer uses those of block 0. DiT and SiT have 8 output channels, of which nothing here uses
the last 4; `forward` drops them. Dropping labels in training is the script's business.

Five kinds of checkpoint have this shape. They differ in the clock that the sinusoids of time see,
in the frequencies 10000^(-i / last), i = 0 .. 127, of these, and in the output. `convention` says
which kind it is, and the two ends of `forward` convert, so that everything outside has this
repository's time and sign:

    convention   checkpoint          clock        last   output      here
    None         diffusers' DiT      1000 t - 1   127    eps         eps
    "dit"        official DiT        1000 t - 1   128    eps         eps
    "sit"        official SiT        1 - t        128    x0 - eps    v = -output; its noise is at 0
    "lfm"        official LFM        t            128    eps - x0    v = output; its noise is at 1
    "flow"       latent_fm.py's own  1000 t       128    eps - x0    v = output

diffusers' frequencies are not those that DiT was trained with: 127 instead of 128 moves some of
its sines by up to 3 rad at t = 1. A folder of diffusers is therefore computed as diffusers does,
whereas official weights that models/convert.py converted keep their own convention, in
config.json, as a key that diffusers ignores with a warning. To make diffusers compute the same,
set `block.norm1.emb.time_proj.downscale_freq_shift = 0` in all blocks of its network, and pass the
clock above as `timestep`.

    python -m models.convert --input DiT-XL-2-256x256.safetensors --output DiT-XL-2
    python -m models.convert --input SiT-XL-2-256.safetensors --output SiT-XL-2 \\
        --prediction flow_v --noise_at 0
    python -m models.convert --input LFM-B-2.safetensors --output LFM-B-2 \\
        --prediction flow_v --noise_at 1

The command reads official names (from_official lists them), writes a folder that --teacher loads,
and never reads a pickle.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.diffusion import VP, Flow
from models.networks import lora
from models.networks.layers import (
    Attention,
    FeedForward,
    LayerNorm,
    TwoLayers,
    check_image,
    check_label,
    check_time,
    context_layer,
    unpatchify,
    with_context,
)
from models.networks.pixart import PatchEmbed, sine_positions
from models.networks.sequence import gather_tokens, share_of, split_tokens

# The paper's sizes at 256 x 256; facebook/DiT-XL-2-256 and DiT-XL-2-512 are DIT_XL_2 and
# DIT_XL_2_512.
DIT_XL_2 = dict(
    num_attention_heads=16,
    attention_head_dim=72,
    in_channels=4,
    out_channels=8,
    num_layers=28,
    dropout=0.0,
    norm_num_groups=32,
    attention_bias=True,
    sample_size=32,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    upcast_attention=False,
    norm_type="ada_norm_zero",
    norm_elementwise_affine=False,
    norm_eps=1e-5,
)
DIT_XL_2_512 = dict(DIT_XL_2, sample_size=64)
DIT_L_2 = dict(DIT_XL_2, attention_head_dim=64, num_layers=24)
DIT_B_2 = dict(DIT_XL_2, num_attention_heads=12, attention_head_dim=64, num_layers=12)
# Keys that must have these values. Those from double_self_attention on are only in configs of older
# versions of diffusers, the released ones among them.
FIXED = dict(
    dropout=0.0,
    attention_bias=True,
    activation_fn="gelu-approximate",
    upcast_attention=False,
    norm_type="ada_norm_zero",
    norm_elementwise_affine=False,
    double_self_attention=False,
    only_cross_attention=False,
    cross_attention_dim=None,
    num_vector_embeds=None,
    use_linear_projection=False,
    attention_type="default",
    caption_channels=None,
    interpolation_scale=None,
    use_additional_conditions=None,
)
TIME_DIM = 256  # width of the sinusoids of time
# name: (a, b) of the clock a t + b, `last` of the frequencies, sign of the output, prediction
CONVENTIONS = {
    None: (1000.0, -1.0, 127, 1, "eps"),
    "dit": (1000.0, -1.0, 128, 1, "eps"),
    "sit": (-1.0, 1.0, 128, -1, "flow_v"),
    "lfm": (1.0, 0.0, 128, 1, "flow_v"),
    "flow": (1000.0, 0.0, 128, 1, "flow_v"),
}
# Number of heads of the official widths S, B, L and XL: weights do not show it.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


# ---- pieces --------------------------------------------------------------------------------------


def time_features(t, convention):
    """Cosines, then sines, of a checkpoint's clock. t (B,) in [0, 1] -> (B, TIME_DIM) float32.

    Nothing else depends on the clock.
    """
    a, b, last, *_ = CONVENTIONS[convention]
    i = torch.arange(TIME_DIM // 2, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(10000.0) * i / last)
    angle = (a * t.float() + b)[:, None] * frequency  # (B, TIME_DIM / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Condition(nn.Module):
    """Time and class to one vector, the sum of two embeddings."""

    def __init__(self, dim, num_classes):
        super().__init__()
        self.timestep_embedder = TwoLayers(TIME_DIM, dim, nn.SiLU())
        self.class_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, dim)})

    def forward(self, features, label):
        """features (B, TIME_DIM) of time, label (B,) -> (B, D) in the weights' dtype."""
        time = self.timestep_embedder(features.to(self.timestep_embedder.linear_1.weight.dtype))
        return time + self.class_embedder["embedding_table"](label)


class AdaLNZero(nn.Module):
    """Modulation of one block by time and class, and its first norm. emb: a Condition."""

    def __init__(self, dim, emb):
        super().__init__()
        self.emb, self.linear = emb, nn.Linear(dim, 6 * dim)
        self.norm = LayerNorm(dim, 1e-6, elementwise_affine=False)

    def forward(self, features, label):
        """-> shift, scale, gate of the attention, then of the MLP, each (B, 1, D) float32."""
        # Autocast must not lower the precision of scales and gates: float32 weights give float32.
        # bfloat16 weights compute in bfloat16, as in diffusers.
        with torch.autocast(features.device.type, enabled=False):
            modulation = self.linear(F.silu(self.emb(features, label)))  # (B, 6D)
        return modulation.float()[:, None].chunk(6, dim=2)


class Block(nn.Module):
    """Self-attention and MLP. Norms, modulation and residual sums are float32."""

    def __init__(self, dim, heads, emb, eps):
        super().__init__()
        self.norm1 = AdaLNZero(dim, emb)
        self.attn1 = Attention(dim, heads)
        self.norm3 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ff = FeedForward(dim, 4 * dim)

    def forward(self, h, features, label, adapter=None, share=None):
        """h (B, N, D), features (B, TIME_DIM) of time, label (B,) -> (B, N, D)."""
        # Each (B, 1, D).
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(features, label)

        z = (self.norm1.norm(h) * (1 + scale) + shift).to(h.dtype)
        h = (h.float() + self.attn1(z, z, adapter=adapter, share=share) * gate).to(h.dtype)

        z = (self.norm3(h) * (1 + mlp_scale) + mlp_shift).to(h.dtype)
        return (h.float() + self.ff(z, adapter) * mlp_gate).to(h.dtype)


# ---- the model -----------------------------------------------------------------------------------


class DiTTransformer2DModel(nn.Module):
    """DiT. Keyword arguments are the keys of diffusers' config.json, kept in `self.config`.

    Additions: convention, kept there unless it is None; shared_embedders, kept there where it is
    false; context_channels and context_width, as in models/networks/dit.py, kept there where there
    is a context, whose channels in_channels then counts too. Keys that only old configs have are
    checked and dropped: diffusers ignores them. A new network is initialised as adaLN-Zero: it
    returns 0. Raises ValueError for a config that this file does not implement. Source: DiT
    2212.09748. Names, epsilons and what is float32 are those of diffusers, against which tests
    compare it on the same random weights, as they do against the official layout written out in a
    test.
    """

    # Only fallbacks: a checkpoint's scheduler/ folder comes first. Instances whose convention is
    # one of velocities have "flow_v" and Flow().
    prediction = "eps"
    default_schedule = VP("linear", 0.0001, 0.02)
    default_shift = 1.0
    latent_shape = (4, 32, 32)  # 256 x 256; an instance has that of its config
    cond_names = ("label",)
    sequence = None
    if_copies_differ = 'put "shared_embedders": false into its config.json'
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
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=None,
        num_layers=28,
        dropout=0.0,
        norm_num_groups=32,
        attention_bias=True,
        sample_size=32,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        upcast_attention=False,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=1e-5,
        double_self_attention=False,
        only_cross_attention=False,
        cross_attention_dim=None,
        num_vector_embeds=None,
        use_linear_projection=False,
        attention_type="default",
        caption_channels=None,
        interpolation_scale=None,
        use_additional_conditions=None,
        convention=None,
        shared_embedders=True,
        context_channels=0,
        context_width=None,
    ):
        super().__init__()
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config = {k: v for k, v in given.items() if k in DIT_XL_2}
        if convention is not None:
            self.config["convention"] = convention
        if not shared_embedders:
            self.config["shared_embedders"] = False
        if context_channels:
            self.config |= dict(context_channels=context_channels, context_width=context_width)
            self.cond_names = ("label", "context")
        channels = in_channels - (context_width or context_channels)  # of a sample
        for name, value in FIXED.items():
            if given[name] != value:
                raise ValueError(f"{name} = {given[name]!r} is not implemented; DiT has {value!r}")
        dim = num_attention_heads * attention_head_dim
        if convention not in CONVENTIONS:
            raise ValueError(
                f"convention = {convention!r} is unknown; "
                f"known are {', '.join(map(repr, CONVENTIONS))}"
            )
        if out_channels not in (None, channels, 2 * channels) or channels < 1:
            raise ValueError(
                f"out_channels = {out_channels} is not implemented; DiT has in_channels = "
                f"{channels} or, with a learned variance, twice that"
            )
        if num_embeds_ada_norm is None or num_embeds_ada_norm < 0:
            raise ValueError(
                f"num_embeds_ada_norm = {num_embeds_ada_norm} must be the number of classes, "
                "0 for none"
            )
        if dim % 4:
            raise ValueError(
                f"num_attention_heads * attention_head_dim = {dim} must be a multiple of 4"
            )
        if sample_size % patch_size:
            raise ValueError(
                f"sample_size = {sample_size} does not divide into patches of "
                f"{patch_size} x {patch_size}"
            )

        self.convention = convention
        *_, self.sign, self.prediction = CONVENTIONS[convention]
        if self.prediction == "flow_v":
            self.default_schedule = Flow()
        self.num_classes, self.patch_size = num_embeds_ada_norm, patch_size
        self.context_channels = context_channels
        self.latent_shape = (channels, sample_size, sample_size)
        self.project = context_layer(context_channels, context_width)
        self.pos_embed = PatchEmbed(in_channels, dim, patch_size, sample_size // patch_size, 1)
        copies = 1 if shared_embedders else num_layers
        embedders = [Condition(dim, num_embeds_ada_norm) for _ in range(copies)]
        self.transformer_blocks = nn.ModuleList(
            [
                Block(dim, num_attention_heads, embedders[i % copies], norm_eps)
                for i in range(num_layers)
            ]
        )
        self.norm_out = LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(dim, 2 * dim)  # shift and scale of norm_out
        self.proj_out_2 = nn.Linear(dim, (out_channels or channels) * patch_size**2)
        self.gradient_checkpointing = False
        self._initialise()

    def _initialise(self):
        """As in DiT: Xavier; small embedders, alike in all blocks; modulation and output zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        embedders = [block.norm1.emb for block in self.transformer_blocks]
        for parameters in zip(*(emb.parameters() for emb in embedders), strict=True):
            if parameters[0].dim() > 1:
                nn.init.normal_(parameters[0], std=0.02)
            for p in parameters[1:]:
                p.data.copy_(parameters[0].data)
        modulations = [block.norm1.linear for block in self.transformer_blocks]
        for layer in [*modulations, self.proj_out_1, self.proj_out_2]:
            nn.init.zeros_(layer.weight)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """nn.Module's, which also raises ValueError where copies of a shared embedder differ."""
        first = {}
        for name, value in self.state_dict(keep_vars=True).items():
            original = first.setdefault(id(value), name)
            there = name in state_dict and original in state_dict
            if there and not torch.equal(state_dict[name], state_dict[original]):
                raise ValueError(
                    f"{name!r} differs from {original!r}, and this network has one for both: "
                    f"{self.if_copies_differ}"
                )
        return super().load_state_dict(state_dict, strict, assign)

    @staticmethod
    def lora_key(name):
        """transformer_blocks.0... -> base_model.model.transformer_blocks.0..., its name in a file.

        diffusers by itself loads no adapters into DiT: neither DiTPipeline nor this transformer
        has a method for it (0.42). These are the names of peft, whose PeftModel has one.
        """
        return f"base_model.model.{name}"

    def forward(self, x, t, label=None, return_features=False, adapter=None, context=None):
        """The noise eps in x = alpha(t) x0 + sigma(t) eps, like x, in x's dtype.

        With convention "sit", "lfm" or "flow" it is the flow velocity v = eps - x0. x (B, C, H, W),
        C = in_channels without those of the context (B, context_channels, H, W); t (B,) float in
        [0, 1], t = 0 data, t = 1 noise; label (B,) integer, None or num_classes for the null label.
        Computed in the weights' dtype or in autocast's. return_features=True: the output (B, N, D)
        of block num_layers // 2 instead, and nothing after it is run. adapter: a name of
        models/networks/lora.py, None = the bare network. Raises ValueError, one line with cause and
        remedy, for shapes that do not fit and an unknown adapter.
        """
        check_image(x, self.latent_shape[0], self.patch_size)
        check_time(t, x)
        if label is None:
            label = torch.full(t.shape, self.num_classes, device=x.device)
        check_label(label, x, self.num_classes)
        lora.check(self, adapter)
        grid = [size // self.patch_size for size in x.shape[2:]]  # rows, columns of tokens
        features_t = time_features(t, self.convention)  # (B, TIME_DIM)
        seen = with_context(self.project, x, context, self.context_channels)
        h = self.pos_embed(seen)  # (B, N, D)
        share = share_of(self.sequence, h.shape[1])
        h = split_tokens(h, share)

        for i, block in enumerate(self.transformer_blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, features_t, label, adapter, share, use_reentrant=False)
            else:
                h = block(h, features_t, label, adapter, share)
            if return_features and i == len(self.transformer_blocks) // 2:
                return gather_tokens(h, share)

        with torch.autocast(x.device.type, enabled=False):
            table = self.proj_out_1(F.silu(self.transformer_blocks[0].norm1.emb(features_t, label)))
        shift, scale = table.float()[:, None].chunk(2, dim=2)  # each (B, 1, D)
        out = self.proj_out_2((self.norm_out(h) * (1 + scale) + shift).to(h.dtype))  # (B, N, p*p*C)
        out = unpatchify(gather_tokens(out, share), grid, [self.patch_size] * 2)  # (B, 8, H, W)
        return self.sign * out[:, : x.shape[1]].to(x.dtype)  # (B, 4, H, W), without the variance


# ---- the official layout -------------------------------------------------------------------------

# Names of layers in DiT, SiT and LFM, and here. The embedders are there once and here in each
# block.
OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
INNER = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")  # the thirds of the rows of attn.qkv, in order


def official_depth(state):
    """Number of blocks of an official state dict."""
    blocks = (int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    return 1 + max(blocks, default=-1)


def from_official(state):
    """State dict of an official DiT, SiT or LFM (a DiT there) -> that of DiTTransformer2DModel.

    The numbers are the same under other names: the order of shift, scale and gate, of the output's
    channels in a patch, and of sines and cosines does not differ. A prefix "module." is removed,
    and pos_embed, which is fixed, is checked and dropped. Raises ValueError for a key that is none
    of theirs, and for other positions.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    position = state.pop("pos_embed", None)
    if position is not None and not is_sine_position(position):
        raise ValueError(
            f"pos_embed {tuple(position.shape)} is not the fixed sine positions of a square, "
            "row by row: these were trained otherwise"
        )
    depth, out = official_depth(state), {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        block = inner = None
        if layer.startswith("blocks.") and layer.count(".") > 1:
            _, block, inner = layer.split(".", 2)
        if layer in OUTER:
            out[f"{OUTER[layer]}.{kind}"] = value
        elif layer in EMBEDDERS:
            for i in range(depth):
                name = f"transformer_blocks.{i}.norm1.emb.{EMBEDDERS[layer]}.{kind}"
                out[name] = value.clone()
        elif inner == "attn.qkv":
            for name, third in zip(QKV, value.chunk(3), strict=True):
                out[f"transformer_blocks.{block}.{name}.{kind}"] = third.clone()
        elif inner in INNER:
            out[f"transformer_blocks.{block}.{INNER[inner]}.{kind}"] = value
        else:
            raise ValueError(f"{key!r} is no parameter of an official DiT, SiT or LFM")
    return out


def is_sine_position(position):
    """Whether pos_embed (1, N, D) has the fixed positions of a square of tokens, up to rounding."""
    side = math.isqrt(position.shape[1])
    if side**2 != position.shape[1]:
        return False
    fixed = sine_positions(side, side, position.shape[2], side, 1, "cpu")
    return bool((fixed - position[0].float()).abs().max() <= 1e-3)


def to_official(net):
    """Inverse of from_official: a DiTTransformer2DModel -> its official state dict, on the CPU.

    pos_embed is in it. Raises ValueError where the blocks' embedders differ, as with
    shared_embedders = false: the official layout has one for all; and for a context's projection.
    """
    if net.config.get("context_width"):
        raise ValueError("its context has a projection, for which the official layout has no name")
    state = {key: value.detach().cpu() for key, value in lora.base_state_dict(net).items()}
    rows, dim = net.pos_embed.base, net.proj_out_1.in_features
    out = {"pos_embed": sine_positions(rows, rows, dim, rows, 1, "cpu")[None]}
    for kind in ("weight", "bias"):
        out |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for theirs, ours in OUTER.items()}
        for theirs, ours in EMBEDDERS.items():
            end = f"norm1.emb.{ours}.{kind}"
            copies = [value for key, value in state.items() if key.endswith(end)]
            if any(not torch.equal(copy, copies[0]) for copy in copies):
                raise ValueError(
                    f"the blocks' {ours} differ: these were trained apart, "
                    "and the official layout has one for all blocks"
                )
            out |= {f"{theirs}.{kind}": copy for copy in copies[:1]}
        for i in range(len(net.transformer_blocks)):
            names = (*QKV, *INNER.values())
            ours = {name: state[f"transformer_blocks.{i}.{name}.{kind}"] for name in names}
            out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([ours[name] for name in QKV])
            out |= {f"blocks.{i}.{name}.{kind}": ours[INNER[name]] for name in INNER}
    return out


def official_config(state, convention, sample_size=None, num_attention_heads=None):
    """Keyword arguments of DiTTransformer2DModel for an official state dict, from its shapes.

    sample_size is that of pos_embed, if there is one; num_attention_heads is that of the official
    width, unless given. Raises ValueError for what neither of them shows.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
        rows = len(state["y_embedder.embedding_table.weight"])
        outputs = len(state["final_layer.linear.weight"])
    except KeyError as error:
        raise ValueError(f"no tensor {error}: an official DiT, SiT or LFM has one") from None
    if "pos_embed" in state:
        sample_size = patch * math.isqrt(state["pos_embed"].shape[1])
    heads = num_attention_heads or HEADS.get(dim)
    if sample_size is None or heads is None:
        what = "sample_size" if sample_size is None else "num_attention_heads"
        raise ValueError(f"these weights of width {dim} do not show {what}: give it")
    if dim % heads:
        raise ValueError(f"num_attention_heads = {heads} does not divide the width {dim}")
    context = channels - outputs // patch**2  # of LFM's inpainting networks
    return dict(
        DIT_XL_2,
        num_attention_heads=heads,
        attention_head_dim=dim // heads,
        in_channels=channels,
        out_channels=outputs // patch**2,
        num_layers=official_depth(state),
        sample_size=sample_size,
        patch_size=patch,
        num_embeds_ada_norm=rows - 1,
        norm_eps=1e-6,
        convention=convention,
        **({"context_channels": context} if context > 0 else {}),
    )
