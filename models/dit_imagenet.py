"""The diffusion transformer of ImageNet (DiT, 2212.09748), with diffusers' parameter names; also SiT's and LFM's.

An image latent (4 channels, 8x smaller sides: models/vae.py) is cut into patches of 2x2 with fixed 2-D sine positions,
and every token passes through blocks of self-attention and an MLP. Time and class enter only as shift, scale and gate
(adaLN-Zero: gates start at zero). The small DiT that this repository trains by itself is models/dit.py.

    net = DiTTransformer2DModel(**DIT_XL_2)
    eps = net(x_t, t, label=classes)      # t = 0 data, t = 1 noise; x_t = alpha(t) x0 + sigma(t) eps

    symbol   meaning                                                             shape
    x        latent at time t, the VAE's * scaling_factor                        (B, 4, H, W)
    t        time in [0, 1]; index i of the 1000 betas is t = (i + 1) / 1000     (B,)
    label    class 0 .. K-1, K = null (unconditional)                            (B,)
    h        tokens, N = H/2 * W/2, row by row                                   (B, N, D)

State dicts load into `diffusers.DiTTransformer2DModel`, and back, unconverted. There every block has embedders of time and
class of its own, which are equal in what is released; the final layer uses those of block 0. DiT and SiT have 8 output
channels, of which nothing here uses the last 4; `forward` drops them. Label dropout is the training script's business.

Five kinds of checkpoint have this shape. They differ in the clock that the sines of time see, in the sines' frequencies
10000^(-i / last), i = 0 .. 127, and in what comes out. `convention` says whose they are; the two edges of `forward` turn
ours into theirs, so that everything between and outside is in this repository's time and sign:

    convention   checkpoint           clock         last   output          in ours
    None         diffusers' DiT       1000 t - 1    127    eps             eps
    "dit"        official DiT         1000 t - 1    128    eps             eps
    "sit"        official SiT         1 - t         128    x0 - eps        v = -output; its t = 0 is noise
    "lfm"        official LFM         t             128    eps - x0        v = output; its t = 1 is noise, as here
    "flow"       latent_fm.py's own   1000 t        128    eps - x0        v = output

diffusers' frequencies are not those that DiT was trained with: 127 for 128 moves some of its sines by up to 3 rad at t = 1.
A folder of diffusers is therefore computed as diffusers does, and `convert` writes official weights with their own convention,
in config.json as a key that diffusers ignores with a warning. Setting `block.norm1.emb.time_proj.downscale_freq_shift = 0` in
all blocks of its network, and handing it the clock above as `timestep`, makes diffusers compute the same.

    python -m models.dit_imagenet convert --input DiT-XL-2-256x256.safetensors --output DiT-XL-2
    python -m models.dit_imagenet convert --input SiT-XL-2-256.safetensors --output SiT-XL-2 --prediction flow_v --noise_at 0
    python -m models.dit_imagenet convert --input LFM-B-2.safetensors --output LFM-B-2 --prediction flow_v --noise_at 1

`convert` reads official names (from_official says which), writes a folder that --teacher loads, and never reads a pickle.
"""
import math
import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models import io, lora
from models.diffusion import VP, Flow
from models.pixart import PatchEmbed, sine_positions
from models.wan import Attention, FeedForward, LayerNorm, TwoLayers, check_image, check_time, unpatchify

# The paper's sizes at 256 x 256; facebook/DiT-XL-2-256 and DiT-XL-2-512 are DIT_XL_2 and DIT_XL_2_512.
DIT_XL_2 = dict(
    num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, dropout=0.0, norm_num_groups=32,
    attention_bias=True, sample_size=32, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, upcast_attention=False,
    norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=1e-5,
)
DIT_XL_2_512 = dict(DIT_XL_2, sample_size=64)
DIT_L_2 = dict(DIT_XL_2, attention_head_dim=64, num_layers=24)
DIT_B_2 = dict(DIT_XL_2, num_attention_heads=12, attention_head_dim=64, num_layers=12)
# Keys that must have these values; those of the last two lines are only in configs of older versions of diffusers, among them the released ones.
FIXED = dict(
    dropout=0.0, attention_bias=True, activation_fn="gelu-approximate", upcast_attention=False, norm_type="ada_norm_zero",
    norm_elementwise_affine=False, double_self_attention=False, only_cross_attention=False, cross_attention_dim=None, num_vector_embeds=None,
    use_linear_projection=False, attention_type="default", caption_channels=None, interpolation_scale=None, use_additional_conditions=None,
)
TIME_DIM = 256  # width of the sine features of time
# name: (a, b) of the clock a t + b, last of the frequencies, sign of the output, prediction
CONVENTIONS = {
    None: (1000.0, -1.0, 127, 1, "eps"),
    "dit": (1000.0, -1.0, 128, 1, "eps"),
    "sit": (-1.0, 1.0, 128, -1, "flow_v"),
    "lfm": (1.0, 0.0, 128, 1, "flow_v"),
    "flow": (1000.0, 0.0, 128, 1, "flow_v"),
}
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the official widths S, B, L, XL, which the weights do not tell


# ---- pieces ------------------------------------------------------------------------------------------------


def time_features(t, convention):
    """Cosines, then sines, of the clock. t (B,) in [0, 1] -> (B, TIME_DIM) float32; the only place that knows a checkpoint's clock."""
    a, b, last, *_ = CONVENTIONS[convention]
    frequency = torch.exp(-math.log(10000.0) * torch.arange(TIME_DIM // 2, dtype=torch.float32, device=t.device) / last)
    angle = (a * t.float() + b)[:, None] * frequency  # (B, TIME_DIM / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Condition(nn.Module):
    """Time and class to one vector."""

    def __init__(self, dim, num_classes):
        super().__init__()
        self.timestep_embedder = TwoLayers(TIME_DIM, dim, nn.SiLU())
        self.class_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, dim)})

    def forward(self, features, label):
        """features (B, TIME_DIM) of time, label (B,) -> (B, D) in the weights' dtype."""
        time = self.timestep_embedder(features.to(self.timestep_embedder.linear_1.weight.dtype))
        return time + self.class_embedder["embedding_table"](label)


class AdaLNZero(nn.Module):
    """Time and class to what modulates one block, with embedders of its own, and the norm before its attention."""

    def __init__(self, dim, num_classes):
        super().__init__()
        self.emb, self.linear = Condition(dim, num_classes), nn.Linear(dim, 6 * dim)
        self.norm = LayerNorm(dim, 1e-6, elementwise_affine=False)

    def forward(self, features, label):
        """-> shift, scale, gate of attention, then of the MLP, each (B, 1, D) float32."""
        # Autocast must not lower the precision of scales and gates: float32 weights give float32. bfloat16 weights stay
        # bfloat16, as in diffusers.
        with torch.autocast(features.device.type, enabled=False):
            modulation = self.linear(F.silu(self.emb(features, label)))  # (B, 6D)
        return modulation.float()[:, None].chunk(6, dim=2)


class Block(nn.Module):
    """Self-attention and MLP. Norms, modulation and residual sums are float32."""

    def __init__(self, dim, heads, num_classes, eps):
        super().__init__()
        self.norm1 = AdaLNZero(dim, num_classes)
        self.attn1 = Attention(dim, heads)
        self.norm3 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ff = FeedForward(dim, 4 * dim)

    def forward(self, h, features, label, adapter=None):
        """h (B, N, D), features (B, TIME_DIM) of time, label (B,) -> (B, N, D)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(features, label)  # each (B, 1, D)

        z = (self.norm1.norm(h) * (1 + scale) + shift).to(h.dtype)
        h = (h.float() + self.attn1(z, z, adapter=adapter) * gate).to(h.dtype)

        z = (self.norm3(h) * (1 + mlp_scale) + mlp_shift).to(h.dtype)
        return (h.float() + self.ff(z, adapter) * mlp_gate).to(h.dtype)


# ---- the model ---------------------------------------------------------------------------------------------


class DiTTransformer2DModel(nn.Module):
    """DiT. Keyword arguments are the keys of diffusers' config.json, kept in `self.config`, and convention, kept there unless None.

    Keys that only old configs have are checked and dropped: diffusers ignores them. Raises ValueError for a config this file does not
    implement. A new network is adaLN-Zero's: its output is 0. Source: DiT 2212.09748; names, epsilons and what is float32 as in
    diffusers, against which tests compare it on the same random weights, and against the official layout written out in the test.
    """

    # Only fallbacks: a checkpoint's scheduler/ folder comes first. With a convention of velocities: "flow_v" and Flow().
    prediction = "eps"
    default_schedule = VP("linear", 0.0001, 0.02)
    default_shift = 1.0
    latent_shape = (4, 32, 32)  # 256 x 256; of a network: its config's
    cond_names = ("label",)
    lora_targets = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")

    def __init__(
        self, num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=None, num_layers=28, dropout=0.0, norm_num_groups=32,
        attention_bias=True, sample_size=32, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, upcast_attention=False,
        norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=1e-5, double_self_attention=False, only_cross_attention=False,
        cross_attention_dim=None, num_vector_embeds=None, use_linear_projection=False, attention_type="default", caption_channels=None,
        interpolation_scale=None, use_additional_conditions=None, convention=None,
    ):
        super().__init__()
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config = {k: v for k, v in given.items() if k in DIT_XL_2 or k == "convention" and v is not None}
        for name, value in FIXED.items():
            if given[name] != value:
                raise ValueError(f"{name} = {given[name]!r} is not implemented; DiT has {value!r}")
        dim = num_attention_heads * attention_head_dim
        if convention not in CONVENTIONS:
            raise ValueError(f"convention = {convention!r} is unknown; known are {', '.join(map(repr, CONVENTIONS))}")
        if out_channels not in (None, in_channels, 2 * in_channels):
            raise ValueError(
                f"out_channels = {out_channels} is not implemented; DiT has in_channels = {in_channels} or, with a learned variance, twice that"
            )
        if num_embeds_ada_norm is None or num_embeds_ada_norm < 0:
            raise ValueError(f"num_embeds_ada_norm = {num_embeds_ada_norm} must be the number of classes, 0 for none")
        if dim % 4:
            raise ValueError(f"num_attention_heads * attention_head_dim = {dim} must be a multiple of 4")
        if sample_size % patch_size:
            raise ValueError(f"sample_size = {sample_size} does not divide into patches of {patch_size} x {patch_size}")

        self.convention, (*_, self.sign, self.prediction) = convention, CONVENTIONS[convention]
        if self.prediction == "flow_v":
            self.default_schedule = Flow()
        self.num_classes, self.patch_size, self.latent_shape = num_embeds_ada_norm, patch_size, (in_channels, sample_size, sample_size)
        self.pos_embed = PatchEmbed(in_channels, dim, patch_size, sample_size // patch_size, 1)
        self.transformer_blocks = nn.ModuleList([Block(dim, num_attention_heads, num_embeds_ada_norm, norm_eps) for _ in range(num_layers)])
        self.norm_out = LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(dim, 2 * dim)  # shift and scale of norm_out
        self.proj_out_2 = nn.Linear(dim, (out_channels or in_channels) * patch_size**2)
        self.gradient_checkpointing = False
        self._initialise()

    def _initialise(self):
        """As DiT: matrices by Xavier, embedders small and the same in all blocks, adaLN and the output zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        embedders = [block.norm1.emb for block in self.transformer_blocks]
        for parameters in zip(*(emb.parameters() for emb in embedders)):
            if parameters[0].dim() > 1:
                nn.init.normal_(parameters[0], std=0.02)
            for p in parameters[1:]:
                p.data.copy_(parameters[0].data)
        for layer in [*(block.norm1.linear for block in self.transformer_blocks), self.proj_out_1, self.proj_out_2]:
            nn.init.zeros_(layer.weight)

    @staticmethod
    def lora_key(name):
        """transformer_blocks.0.attn1.to_q -> base_model.model.transformer_blocks.0.attn1.to_q, a layer's name in an adapter file.

        diffusers loads no adapters into DiT by itself: neither DiTPipeline nor this transformer has a method for it (0.42). These are
        the names of peft, whose PeftModel does.
        """
        return f"base_model.model.{name}"

    def forward(self, x, t, label=None, return_features=False, adapter=None):
        """The noise eps in x = alpha(t) x0 + sigma(t) eps, or with convention "sit" or "lfm" the flow velocity v = eps - x0.

        x (B, in_channels, H, W); t (B,) float in [0, 1], t = 0 data, t = 1 noise; label (B,) integer, None or num_classes for the null
        label. Returns eps or v like x, in x's dtype, computed in the weights' dtype or in autocast's. With return_features=True returns
        (eps or v, features): the output of block num_layers // 2, (B, N, D). adapter names one of models/lora.py, None the bare network.
        Raises ValueError, one line naming cause and remedy, for shapes that do not fit and for an unknown adapter.
        """
        check_image(x, self.config["in_channels"], self.patch_size)
        check_time(t, x)
        if label is None:
            label = torch.full(t.shape, self.num_classes, device=x.device)
        if label.shape != t.shape or label.is_floating_point() or label.dtype == torch.bool:
            raise ValueError(f"label is {label.dtype} {tuple(label.shape)}; pass classes 0 to {self.num_classes}, integers of shape {tuple(t.shape)}")
        lora.check(self, adapter)
        grid = [size // self.patch_size for size in x.shape[2:]]  # rows, columns of tokens
        features_t = time_features(t, self.convention)  # (B, TIME_DIM)
        h = self.pos_embed(x)  # (B, N, D)

        for i, block in enumerate(self.transformer_blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, features_t, label, adapter, use_reentrant=False)
            else:
                h = block(h, features_t, label, adapter)
            if i == len(self.transformer_blocks) // 2:
                features = h

        with torch.autocast(x.device.type, enabled=False):
            shift, scale = self.proj_out_1(F.silu(self.transformer_blocks[0].norm1.emb(features_t, label))).float()[:, None].chunk(2, dim=2)
        out = self.proj_out_2((self.norm_out(h) * (1 + scale) + shift).to(h.dtype))  # (B, N, p*p*C)
        out = self.sign * unpatchify(out, grid, [self.patch_size] * 2)[:, :x.shape[1]].to(x.dtype)  # (B, 4, H, W), without the variance
        return (out, features) if return_features else out


# ---- the official layout -----------------------------------------------------------------------------------

# Layers of DiT, SiT and LFM, and their names here. Of the embedders there, once, here every block has a copy.
OUTER = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2"}
EMBEDDERS = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2",
             "y_embedder.embedding_table": "class_embedder.embedding_table"}
INNER = {"attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "adaLN_modulation.1": "norm1.linear"}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")  # the three thirds of attn.qkv's rows, in this order


def from_official(state):
    """State dict of an official DiT, SiT or LFM (a DiT there) -> state dict of DiTTransformer2DModel: the same numbers under other names.

    The order of shift, scale and gate, of the output's channels in a patch, and of sines and cosines is the same. A prefix "module." goes;
    pos_embed too, after a look: it is fixed. Raises ValueError for a key that is none of theirs, and for other positions.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    position = state.pop("pos_embed", None)
    if position is not None:
        side = math.isqrt(position.shape[1])
        if side**2 != position.shape[1] or (sine_positions(side, side, position.shape[2], side, 1, "cpu") - position[0].float()).abs().max() > 1e-3:
            raise ValueError(f"pos_embed {tuple(position.shape)} is not the fixed sine positions of a square, row by row: these were trained otherwise")
    depth = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=-1)
    out = {}
    for key, value in state.items():
        layer, kind = key.rpartition(".")[::2]
        block, inner = (layer.split(".", 2)[1:] if layer.startswith("blocks.") and layer.count(".") > 1 else (None, None))
        if layer in OUTER:
            out[f"{OUTER[layer]}.{kind}"] = value
        elif layer in EMBEDDERS:
            out |= {f"transformer_blocks.{i}.norm1.emb.{EMBEDDERS[layer]}.{kind}": value.clone() for i in range(depth)}
        elif inner == "attn.qkv":
            out |= {f"transformer_blocks.{block}.{name}.{kind}": third.clone() for name, third in zip(QKV, value.chunk(3))}
        elif inner in INNER:
            out[f"transformer_blocks.{block}.{INNER[inner]}.{kind}"] = value
        else:
            raise ValueError(f"{key!r} is no parameter of an official DiT, SiT or LFM")
    return out


def to_official(net):
    """Inverse of from_official: a DiTTransformer2DModel -> its state dict under official names, with pos_embed, on the CPU.

    Raises ValueError where the blocks' embedders differ, as after training them apart: the official layout has one for all.
    """
    state = {key: value.detach().cpu() for key, value in lora.base_state_dict(net).items()}
    rows, dim = net.pos_embed.base, net.proj_out_1.in_features
    out = {"pos_embed": sine_positions(rows, rows, dim, rows, 1, "cpu")[None]}
    for kind in ("weight", "bias"):
        out |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for theirs, ours in OUTER.items()}
        for theirs, ours in EMBEDDERS.items():
            copies = [value for key, value in state.items() if key.endswith(f"norm1.emb.{ours}.{kind}")]
            if any(not torch.equal(copy, copies[0]) for copy in copies):
                raise ValueError(f"the blocks' {ours} differ: these were trained apart, and the official layout has one for all blocks")
            out |= {f"{theirs}.{kind}": copy for copy in copies[:1]}
        for i in range(len(net.transformer_blocks)):
            ours = {name: state[f"transformer_blocks.{i}.{name}.{kind}"] for name in (*QKV, *INNER.values())}
            out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([ours[name] for name in QKV])
            out |= {f"blocks.{i}.{name}.{kind}": ours[INNER[name]] for name in INNER}
    return out


def official_config(state, convention, sample_size=None, num_attention_heads=None):
    """What the constructor needs for an official state dict, read off its shapes.

    sample_size is read off pos_embed where there is one, the heads are those of the official width. Raises ValueError where neither tells.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
        rows, outputs = len(state["y_embedder.embedding_table.weight"]), len(state["final_layer.linear.weight"])
    except KeyError as error:
        raise ValueError(f"no tensor {error}: an official DiT, SiT or LFM has one") from None
    if "pos_embed" in state:
        sample_size = patch * math.isqrt(state["pos_embed"].shape[1])
    heads = num_attention_heads or HEADS.get(dim)
    if sample_size is None or heads is None:
        raise ValueError(f"{'sample_size' if sample_size is None else 'num_attention_heads'} is not told by these weights of width {dim}: give it")
    if dim % heads:
        raise ValueError(f"num_attention_heads = {heads} does not divide the width {dim}")
    depth = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=-1)
    return dict(
        DIT_XL_2, num_attention_heads=heads, attention_head_dim=dim // heads, in_channels=channels, out_channels=outputs // patch**2, num_layers=depth,
        sample_size=sample_size, patch_size=patch, num_embeds_ada_norm=rows - 1, norm_eps=1e-6, convention=convention,
    )


def convert(args):
    """The command: an official file -> a folder with transformer/, scheduler/ and model_index.json. Raises UserError."""
    if (args.prediction == "flow_v") != (args.noise_at is not None):
        raise io.UserError("--prediction flow_v goes with --noise_at 0 (SiT) or 1 (LFM), and only with it: velocities have no clock in common")
    if os.path.exists(args.output):
        raise io.UserError(f"--output {args.output} exists: name a new folder")
    state = io.load_tensors(args.input)
    try:
        config = official_config(state, {None: "dit", 0: "sit", 1: "lfm"}[args.noise_at], args.sample_size, args.num_attention_heads)
        with torch.device("meta"):
            net = DiTTransformer2DModel(**config)
        net.load_state_dict(from_official(state), assign=True)
    except (ValueError, RuntimeError) as error:
        raise io.UserError(f"--input {args.input}: {error}") from None
    io.save_network(net, io.network_config(net), os.path.join(args.output, "transformer"))
    if args.prediction == "eps":
        index = {"_class_name": "DiTPipeline"}
        scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
                     "clip_sample": False, "prediction_type": "epsilon"}
    else:
        index = {}  # diffusers has no pipeline for these
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    os.makedirs(os.path.join(args.output, "scheduler"))
    io.save_json(scheduler, os.path.join(args.output, "scheduler", "scheduler_config.json"))
    index |= {"scheduler": ["diffusers", scheduler["_class_name"]], "transformer": ["diffusers", type(net).__name__]}
    io.save_json(index, os.path.join(args.output, "model_index.json"))
    print(f"{args.output}: {sum(p.numel() for p in net.parameters()):,} parameters, {net.num_classes} classes, latents {net.latent_shape}, "
          f"predicts {net.prediction}, convention {net.convention}")


def parse_args(argv=None):
    p = io.Parser(prog="python -m models.dit_imagenet", description="Official DiT, SiT and LFM weights to a folder for --teacher.")
    command = p.add_subparsers(dest="command", required=True).add_parser("convert", help="official names to diffusers' layout")
    command.add_argument("--input", required=True, help="safetensors file with the official state dict, the EMA's where there is a choice")
    command.add_argument("--output", required=True, help="folder to write: transformer/, scheduler/, model_index.json")
    command.add_argument("--prediction", choices=["eps", "flow_v"], default="eps", help="eps: DiT; flow_v: a velocity, SiT or LFM")
    command.add_argument("--noise_at", type=int, choices=[0, 1], default=None, help="of flow_v: the checkpoint's time of pure noise, 0 (SiT) or 1 (LFM)")
    command.add_argument("--sample_size", type=io.number(int, 1), default=None, help="side of the latent, where the file has no pos_embed")
    command.add_argument("--num_attention_heads", type=io.number(int, 1), default=None, help="for widths other than S, B, L and XL")
    return p.parse_args(argv)


if __name__ == "__main__":
    io.run(lambda: convert(parse_args()))
