"""The contract of networks (models/networks/__init__.py), for every network there that denoises."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY_PIXART, TINY_WAN, TINY_Z_IMAGE, fill, perturbed
from released import COGVIDEOX, LUMINA2, QWEN_IMAGE
from test_adding import examples
from torch import nn

from models import networks
from models.diffusion import PREDICTIONS, VP, Flow
from models.networks import (
    NETWORKS,
    WEIGHTS,
    load_network,
    lora,
    network_config,
    save_network,
    trellis_path,
)
from models.networks.adm import UNetModel
from models.networks.autoencoders import AutoencoderKL, Identity, PatchPCA
from models.networks.cogvideox import CogVideoXTransformer3DModel
from models.networks.dit import DiT
from models.networks.dit_imagenet import DiTTransformer2DModel
from models.networks.lumina2 import Lumina2Transformer2DModel
from models.networks.pixart import PixArtTransformer2DModel
from models.networks.qwen_image import QwenImageTransformer2DModel
from models.networks.ring_dit import RingDiT
from models.networks.ring_mlp import RingMLP
from models.networks.trellis import (
    SLatFlowModel,
    SparseStructureDecoder,
    SparseStructureEncoder,
    SparseStructureFlowModel,
)
from models.networks.trellis_mesh import SLatMeshDecoder
from models.networks.unet import SD_1_5, SDXL, UNet2DConditionModel
from models.networks.wan import WanTransformer3DModel, WanTwoNetworks
from models.networks.z_image import ZImageTransformer2DModel
from models.plumbing import run as run_module
from models.plumbing.run import Run

B, L = 3, 5  # samples of a call, tokens of a prompt

TINY_WAN_3 = dict(TINY_WAN, num_layers=3)
Mixer = examples()[1].Mixer  # the example of docs/adding.md
TINY_PIXART_3 = dict(TINY_PIXART, num_layers=3)
TINY_DIT_IMAGENET = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    out_channels=8,
    num_layers=3,
    sample_size=8,
    num_embeds_ada_norm=4,
)
TINY_SD = dict(
    SD_1_5,
    sample_size=8,
    block_out_channels=[8, 12, 16, 16],
    norm_num_groups=4,
    cross_attention_dim=10,
    attention_head_dim=2,
)
TINY_SDXL = dict(
    SDXL,
    sample_size=8,
    block_out_channels=[8, 12, 16],
    norm_num_groups=4,
    cross_attention_dim=10,
    transformer_layers_per_block=[1, 1, 2],
    attention_head_dim=[1, 2, 2],
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=53,
)
TINY_ADM = dict(
    image_size=8,
    model_channels=32,
    num_res_blocks=1,
    attention_resolutions=[2],
    channel_mult=[1, 1],
    num_classes=4,
    num_head_channels=16,
    convention="flow",
)
TINY_DIT = dict(size=(6, 4), patch=(3, 2), channels=2, dim=64, depth=3, num_classes=4)
TINY_SS = dict(
    resolution=8,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    cond_channels=12,
    num_blocks=3,
    num_heads=2,
    patch_size=2,
    qk_rms_norm=True,
)
TINY_STAGES = dict(latent_channels=2, num_res_blocks=1, num_res_blocks_middle=1)


@dataclass(frozen=True)
class Case:
    cls: type
    config: dict
    size: tuple  # sides of a sample, without its channels
    channels: int
    blocks: str  # the attribute that holds the blocks, of which there are three
    tokens: int  # number of tokens of one sample in features
    parts: tuple = ()  # first, middle and a later part, where these are not the three blocks

    @property
    def three(self):
        return self.parts or tuple(f"{self.blocks}.{i}" for i in range(3))

    def net(self, **changes):
        """The network, with noise on every weight, so that no layer that starts at zero hides
        anything."""
        torch.manual_seed(0)
        return perturbed(self.cls(**{**self.config, **changes}))


U_NET = ("down_blocks.0", "mid_block", "up_blocks.0")
ADM = ("input_blocks.1", "middle_block", "output_blocks.0")
CASES = {
    "DiT": Case(DiT, TINY_DIT, (6, 4), 2, "blocks", 4),
    "DiT-context": Case(
        DiT, dict(TINY_DIT, context_channels=2, context_width=3), (6, 4), 2, "blocks", 4
    ),
    "RingMLP": Case(RingMLP, dict(dim=32), (), 2, "hidden", 1),
    "RingDiT": Case(RingDiT, dict(tokens=4, depth=3), (), 2, "blocks", 4),
    "WanTransformer3DModel": Case(WanTransformer3DModel, TINY_WAN_3, (2, 4, 6), 4, "blocks", 12),
    "ZImageTransformer2DModel": Case(
        ZImageTransformer2DModel, dict(TINY_Z_IMAGE, n_layers=3), (4, 6), 4, "layers", 6
    ),
    "PixArtTransformer2DModel": Case(
        PixArtTransformer2DModel, TINY_PIXART_3, (4, 6), 4, "transformer_blocks", 6
    ),
    "QwenImageTransformer2DModel": Case(
        QwenImageTransformer2DModel, QWEN_IMAGE.tiny, (4, 6), 4, "transformer_blocks", 6
    ),
    "Lumina2Transformer2DModel": Case(
        Lumina2Transformer2DModel, LUMINA2.tiny, (4, 6), 4, "layers", 6
    ),
    "DiTTransformer2DModel": Case(
        DiTTransformer2DModel, TINY_DIT_IMAGENET, (8, 8), 4, "transformer_blocks", 16
    ),
    "DiTTransformer2DModel-context": Case(
        DiTTransformer2DModel,
        dict(TINY_DIT_IMAGENET, in_channels=7, out_channels=4)
        | dict(convention="flow", context_channels=2, context_width=3),
        (8, 8),
        4,
        "transformer_blocks",
        16,
    ),
    "UNetModel": Case(
        UNetModel,
        dict(TINY_ADM, in_channels=6, context_channels=2),
        (8, 6),
        4,
        "input_blocks",
        12,
        ADM,
    ),
    "CogVideoXTransformer3DModel": Case(
        CogVideoXTransformer3DModel,
        dict(COGVIDEOX.tiny, max_text_seq_length=L),
        (2, 4, 6),
        4,
        "transformer_blocks",
        12,
    ),
    "UNet2DConditionModel": Case(UNet2DConditionModel, TINY_SD, (8, 7), 4, "down_blocks", 1, U_NET),
    "UNet2DConditionModel-SDXL": Case(
        UNet2DConditionModel, TINY_SDXL, (8, 5), 4, "down_blocks", 4, U_NET
    ),
    "SparseStructureFlowModel": Case(SparseStructureFlowModel, TINY_SS, (8, 8, 8), 4, "blocks", 64),
    "SLatFlowModel": Case(SLatFlowModel, dict(TINY_SS, io_block_channels=[16]), (), 4, "blocks", 0),
    "docs/adding.md": Case(
        Mixer,
        dict(side=6, patch=2, channels=2, dim=16, depth=3, num_classes=4),
        (6, 6),
        2,
        "blocks",
        9,
    ),
}
# These have config and files as well, but do not denoise.
OTHERS = {
    AutoencoderKL: dict(
        block_out_channels=[8, 8],
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    ),
    PatchPCA: dict(channels=3, patch=2, latent_channels=4),
    SLatMeshDecoder: dict(resolution=4, model_channels=256, latent_channels=3, num_blocks=1),
    Identity: dict(channels=3),
    SparseStructureEncoder: dict(TINY_STAGES, in_channels=1, channels=[4, 8]),
    SparseStructureDecoder: dict(TINY_STAGES, out_channels=1, channels=[8, 4]),
}
SMALL = (DiT, RingDiT, RingMLP)  # ours; the others are released architectures

each = pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in CASES.items()])


def points(samples):
    """coords of `samples` sparse samples with 4, 5, 6, ... points, in the grid of TINY_SS."""
    g = torch.Generator().manual_seed(3)
    rows = []
    for i in range(samples):
        place = torch.randperm(8**3, generator=g)[: 4 + i]
        sample = torch.full_like(place, i)
        rows.append(torch.stack([sample, place // 64, place // 8 % 8, place % 8]))
    return torch.cat(rows, dim=1).T


def condition(net, name, x, generator):
    """A value for one of cond_names."""
    if name == "label":
        return torch.arange(B) % net.num_classes
    if name == "text":
        return torch.randn(B, L, net.text_dim, generator=generator)
    if name == "tokens":
        return torch.randn(B, L, net.config["cond_channels"], generator=generator)
    if name == "pooled":
        return torch.randn(B, net.pooled_dim, generator=generator)
    if name == "size":
        return torch.randint(0, 1024, (B, 6), generator=generator)
    if name in ("mask", "text_mask"):
        return torch.arange(L) < torch.tensor([2, L, 1])[:, None]
    if name == "context":
        return torch.randn(B, net.config["context_channels"], *x.shape[2:], generator=generator)
    raise AssertionError(f"no value for the conditioning argument {name!r}: add one here")


def call_of(case, net):
    """Arguments of a call of B samples, by name."""
    g = torch.Generator().manual_seed(1)
    call = {"t": torch.tensor([0.05, 0.6, 1.0])}
    if getattr(net, "sparse", False):
        call["coords"] = points(B)
        call["x"] = torch.randn(len(call["coords"]), case.channels, generator=g)
    else:
        call["x"] = torch.randn(B, case.channels, *case.size, generator=g)
    return call | {name: condition(net, name, call["x"], g) for name in net.cond_names}


def two_networks():
    return WanTwoNetworks(*(perturbed(WanTransformer3DModel(**TINY_WAN_3), k) for k in (0, 1)), 0.5)


def trained_adapter(net, name="a"):
    """Add an adapter that changes the network."""
    torch.manual_seed(2)
    lora.add(net, name, rank=2, alpha=4)
    with torch.no_grad():
        for p in lora.parameters(net, name):
            p += 0.3 * torch.randn(p.shape)


# ---- what is covered -----------------------------------------------------------------------------


def test_every_network_is_covered():
    """Each class in NETWORKS denoises and has a case here, or is explicitly of another kind."""
    covered = {case.cls for case in CASES.values()} | set(OTHERS)
    assert set(NETWORKS.values()) == covered - {Mixer}
    for cls in NETWORKS.values():
        assert hasattr(cls, "prediction") == (cls not in OTHERS)
    for name, cls in NETWORKS.items():
        alias = {"Transformer2DModel", "ElasticSLatFlowModel", "ElasticSLatMeshDecoder"}
        assert name == cls.__name__ or name in alias


# ---- attributes ----------------------------------------------------------------------------------


def check_attributes(net):
    assert net.prediction in PREDICTIONS
    assert isinstance(net.default_shift, float) and net.default_shift > 0
    schedule = getattr(net, "default_schedule", Flow())
    assert isinstance(schedule, (Flow, VP))
    assert isinstance(schedule, Flow) == (net.prediction == "flow_v")
    assert isinstance(net.latent_shape, tuple) and len(net.latent_shape) >= 1
    assert all(isinstance(n, int) and n > 0 for n in net.latent_shape)
    assert isinstance(net.cond_names, tuple) and net.cond_names
    assert all(isinstance(name, str) for name in net.cond_names)
    if "label" in net.cond_names:
        assert isinstance(net.num_classes, int) and net.num_classes > 0
    if "text" in net.cond_names:
        assert isinstance(net.text_dim, int) and net.text_dim > 0
    assert net.gradient_checkpointing is False
    assert isinstance(net.lora_targets, tuple) and net.lora_targets
    layers = lora.linears(net)
    for target in net.lora_targets:
        assert any(key == target or key.endswith("." + target) for key in layers), target


@each
def test_attributes(case):
    net = case.net()
    check_attributes(net)
    names = {lora.file_key(net, key) for key in lora.linears(net)}
    assert len(names) == len(lora.linears(net)) and all(isinstance(n, str) for n in names)
    assert getattr(net, "current_name", str)("a.name.of.today") == "a.name.of.today"


def test_attributes_of_two_networks():
    check_attributes(two_networks())


def test_two_networks_that_differ_are_refused():
    """Whichever of the two has a key that the other lacks."""
    with torch.device("meta"):
        one, other = (WanTransformer3DModel(**TINY_WAN, linear_layers=n) for n in (None, [0]))
    for pair in ((one, other), (other, one)):
        with pytest.raises(ValueError, match="the two networks differ: linear_layers"):
            WanTwoNetworks(*pair, 0.5)


def test_latents_have_the_channels_of_the_config():
    """Of another autoencoder than the released one's. Qwen-Image's channels are of 2 x 2 places."""
    for case in CASES.values():
        shape, channels = case.net().latent_shape, case.config.get("in_channels", 0)
        context, packed = case.config.get("context_channels"), case.cls.__name__[:4] == "Qwen"
        if channels and not context:
            assert shape[0] * (4 if packed else 1) == channels, case.cls.__name__


@pytest.mark.parametrize("label", [-1, 5, 1000])
def test_classes_that_there_are_not(label):
    """They are not taken for the null label, which is number 4."""
    for name in ("UNetModel", "DiT", "DiTTransformer2DModel"):
        net = CASES[name].net()
        call = call_of(CASES[name], net)
        assert net.num_classes == 4
        with pytest.raises((IndexError, ValueError)):
            net(**{**call, "label": torch.full((B,), label)})


@each
def test_config_is_json_and_builds_the_network_again(case):
    changes = [{}]
    if "steps_cond" in case.net().config:
        changes.append({"steps_cond": True})
    if hasattr(case.net(), "self_attentions"):
        changes.append({"linear_layers": [1]})
    for change in changes:
        net = case.net(**change)
        assert json.loads(json.dumps(net.config)) == net.config
        assert change.items() <= net.config.items()
        again = case.cls(**net.config)
        assert again.config == net.config
        shapes = [{k: v.shape for k, v in n.state_dict().items()} for n in (net, again)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("cls", OTHERS)
def test_config_of_the_others(cls):
    net = cls(**OTHERS[cls])
    assert json.loads(json.dumps(net.config)) == net.config
    assert cls(**net.config).config == net.config


@each
def test_unknown_config_keys_are_refused(case):
    with pytest.raises(TypeError):
        case.cls(**case.config, no_such_key=1)


# ---- forward -------------------------------------------------------------------------------------


@each
def test_output_has_the_input_s_shape(case):
    """Also with bfloat16 weights; there a released architecture returns x's dtype."""
    net = case.net()
    call = call_of(case, net)
    with torch.no_grad():
        out = net(**call)
        assert out.shape == call["x"].shape and out.dtype == torch.float32
        assert out.isfinite().all() and out.std() > 1e-3
        for p in net.parameters():
            p.data = p.data.bfloat16()
        low = net(**call)
    assert low.shape == out.shape
    assert low.dtype == (torch.bfloat16 if case.cls in SMALL else torch.float32)
    assert ((low.float() - out).norm() / out.norm()).item() < 0.1


@each
def test_samples_do_not_influence_one_another(case):
    net = case.net()
    call = call_of(case, net)
    sample = call["coords"][:, 0] if "coords" in call else torch.arange(B)
    with torch.no_grad():
        out = net(**call)
        for i in range(B):
            rows = sample == i
            one = {k: v[rows] if k in ("x", "coords") else v[i : i + 1] for k, v in call.items()}
            if "coords" in one:
                one["coords"] = one["coords"] - torch.tensor([i, 0, 0, 0])
            torch.testing.assert_close(net(**one), out[rows], rtol=1e-4, atol=1e-5)


@each
def test_every_input_matters(case):
    """A change of x, t or one condition, such as its unconditional twin, changes the result."""
    net = case.net()
    call = call_of(case, net)
    twins = {"label": torch.full((B,), getattr(net, "num_classes", 0)), "t": 1 - call["t"]}
    for name in ("x", "text", "tokens", "context", "pooled", "size"):
        if name in call:
            twins[name] = torch.zeros_like(call[name])
    for name in ("mask", "text_mask"):
        if name in call:
            twins[name] = torch.ones_like(call[name])
    with torch.no_grad():
        out = net(**call)
        for name in call:
            if name == "coords":
                continue
            other = net(**{**call, name: twins[name]})
            assert other.shape == out.shape and (other - out).abs().max() > 1e-4, name
        if "label" in call:
            null = net(**{**call, "label": twins["label"]})
            assert torch.equal(null, net(**{**call, "label": None}))


@each
def test_steps(case):
    """Only with steps_cond in its config does a network take `steps`; new, it ignores them."""
    net = case.net()
    call = call_of(case, net)
    if "steps_cond" not in net.config:
        with pytest.raises(TypeError, match="steps"):
            net(**call, steps=torch.ones(B))
        return
    assert net.config["steps_cond"] is False
    with pytest.raises(ValueError, match="steps_cond"):
        net(**call, steps=torch.ones(B))
    with torch.no_grad():
        assert torch.equal(net(**call, steps=None), net(**call))
        new = case.cls(**{**case.config, "steps_cond": True})
        assert torch.equal(new(**call, steps=torch.ones(B)), new(**call))
        net = case.net(steps_cond=True)
        one, two = (net(**call, steps=torch.full((B,), k)) for k in (1, 2))
        assert not torch.equal(one, two) and torch.equal(net(**call), net(**call, steps=None))


def wrong_calls(call):
    """{what is wrong: changes of a call}, none of which a network may take."""
    wrong = {
        "channels": {"x": torch.cat([call["x"], call["x"][:, :1]], dim=1)},
        "x in integers": {"x": (3 * call["x"]).long()},
        "axes": {"x": call["x"][..., None]},
        "t without axis": {"t": torch.tensor(0.5)},
        "t of one sample": {"t": call["t"][:1]},
        "t of more samples": {"t": torch.rand(B + 1)},
        "t in integers": {"t": torch.tensor([0, 500, 999])},
        "adapter": {"adapter": "missing"},
    }
    if "label" in call:
        wrong["label of one sample"] = {"label": call["label"][:1]}
        wrong["label in floats"] = {"label": call["label"].float()}
        wrong["label one-hot"] = {"label": torch.eye(4)[call["label"]].long()}
    for name in {"text", "tokens"} & set(call):
        wrong[f"{name} wider"] = {name: torch.cat([call[name], call[name][..., :1]], dim=2)}
        wrong[f"{name} without tokens"] = {name: call[name][:, 0]}
        wrong[f"{name} of one sample"] = {name: call[name][:1]}
    for name in {"mask", "text_mask"} & set(call):
        wrong[f"{name} shorter"] = {name: call[name][:, :-1]}
        wrong[f"{name} in floats"] = {name: call[name].float()}
    for name in {"pooled", "size"} & set(call):
        wrong[f"no {name}"] = {name: None}
        wrong[f"{name} wider"] = {name: torch.cat([call[name], call[name][:, :1]], dim=1)}
        wrong[f"{name} of one sample"] = {name: call[name][:1]}
    if "context" in call:
        wrong["no context"] = {"context": None}
        wrong["context channels"] = {"context": call["context"][:, :1]}
    if "coords" in call:
        wrong["no coords"] = {"coords": None}
        wrong["coords of fewer points"] = {"coords": call["coords"][:-1]}
        wrong["coords in floats"] = {"coords": call["coords"].float()}
        wrong["a point twice"] = {"coords": call["coords"][[0, *range(len(call["x"]) - 1)]]}
    return wrong


def check_refusals(net, call):
    with torch.no_grad():
        net(**call)
        for what, change in wrong_calls(call).items():
            with pytest.raises(ValueError) as error:
                net(**{**call, **change})
                pytest.fail(f"{type(net).__name__} takes a call that is wrong: {what}")
            assert "\n" not in str(error.value) and len(str(error.value)) > 20, what


@each
def test_wrong_calls_are_refused_in_one_line(case):
    net = case.net()
    check_refusals(net, call_of(case, net))


def test_wrong_calls_of_two_networks_are_refused():
    net = two_networks()
    check_refusals(net, call_of(CASES["WanTransformer3DModel"], net))


# ---- features ------------------------------------------------------------------------------------


def of_image(out):
    """What a block returns; of two streams the image's."""
    return out[0] if isinstance(out, tuple) else out


class Watch:
    """Names of the modules that ran, in the order in which they ended, and the outputs of one."""

    def __init__(self, net, keep):
        self.ran, self.kept = [], []
        for name, module in net.named_modules():
            if name:
                module.register_forward_hook(
                    lambda module, args, out, name=name: self.ran.append(name)
                )
        net.get_submodule(keep).register_forward_hook(
            lambda module, args, out: self.kept.append(of_image(out).detach())
        )

    def clear(self):
        self.ran.clear()
        self.kept.clear()


def as_features(case, out, call):
    """Output of the middle block in a full pass -> what return_features has to give."""
    if case.cls is RingMLP:
        return out[:, None]
    if case.cls in (UNet2DConditionModel, UNetModel):
        return out.flatten(2).mT
    if case.cls is ZImageTransformer2DModel:
        return out[:, : case.tokens]  # the image's tokens alone
    if case.cls is CogVideoXTransformer3DModel:
        return out[:, L:]  # the video's, which the prompt's precede
    if case.cls is Lumina2Transformer2DModel:
        return out[:, -case.tokens :]
    if case.cls is SLatFlowModel:  # without what pads a sample
        merged = torch.cat([call["coords"][:, :1], call["coords"][:, 1:] // 2], 1).unique(dim=0)
        return torch.cat([out[i, : (merged[:, 0] == i).sum()] for i in range(B)])
    return out


@pytest.mark.parametrize("adapter", [None, "a"])
@pytest.mark.parametrize("checkpointing", [False, True])
@each
def test_features_are_the_middle_block_s_and_nothing_runs_after_it(case, checkpointing, adapter):
    net = case.net()
    call = call_of(case, net)
    trained_adapter(net)
    call["adapter"] = adapter
    first, middle, last = case.three
    assert case.parts or middle == f"{case.blocks}.{len(getattr(net, case.blocks)) // 2}"
    watch = Watch(net, middle)

    with torch.no_grad():
        net(**call)
    full, want = list(watch.ran), as_features(case, watch.kept[0], call)
    assert last in full

    net.gradient_checkpointing = checkpointing
    for grad in (False, True):
        watch.clear()
        with torch.set_grad_enabled(grad):
            features = net(**call, return_features=True)
        assert features.shape == want.shape and torch.equal(features, want)
        if case.cls is not SLatFlowModel:
            assert features.shape[:2] == (B, case.tokens) and features.dim() == 3
        assert watch.ran == full[: len(watch.ran)] and watch.ran[-1] == middle
        later = set(full) - set(watch.ran)
        assert last in later

    features.square().sum().backward()
    assert not later & set(watch.ran)  # nor when backward computes blocks again
    first, last = (net.get_submodule(name) for name in (first, last))
    assert any(p.grad is not None for p in first.parameters())
    shared = {id(p) for p in first.parameters()}  # blocks may share an embedder of the conditions
    own = [p for p in last.parameters() if id(p) not in shared]
    assert own and all(p.grad is None for p in own)


@each
def test_features_have_the_same_gradients_with_checkpointing(case):
    net = case.net()
    call = call_of(case, net)
    trained_adapter(net)
    gradients = []
    for checkpointing in (False, True):
        net.gradient_checkpointing = checkpointing
        net.zero_grad()
        leaf = call["x"].clone().requires_grad_()
        net(**{**call, "x": leaf}, return_features=True, adapter="a").square().sum().backward()
        assert leaf.grad.any()
        gradients.append([leaf.grad, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_features_of_two_networks():
    """Each row has the features of its own network, whose later blocks do not run."""
    net, case = two_networks(), CASES["WanTransformer3DModel"]
    call = call_of(case, net)
    ran = []
    for name, module in net.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: ran.append(name))
    with torch.no_grad():
        features = net(**call, return_features=True)
        assert {"high.blocks.1", "low.blocks.1"} <= set(ran)
        later = [f"{k}.{m}" for k in ("high", "low") for m in ("blocks.2", "norm_out", "proj_out")]
        assert not any(name.startswith(tuple(later)) for name in ran)
        high = call["t"] >= 0.5
        for alone, rows in ((net.high, high), (net.low, ~high)):
            part = {k: v[rows] for k, v in call.items()}
            assert torch.equal(alone(**part, return_features=True), features[rows])


# ---- what training does with them ----------------------------------------------------------------


@each
def test_gradient_checkpointing_changes_nothing(case):
    net = case.net()
    call = call_of(case, net)
    trained_adapter(net)
    results = []
    for checkpointing in (False, True):
        net.gradient_checkpointing = checkpointing
        for adapter in (None, "a"):
            net.zero_grad()
            leaf = call["x"].clone().requires_grad_()
            out = net(**{**call, "x": leaf}, adapter=adapter)
            out.square().sum().backward()
            assert leaf.grad.any()
            own = [p.grad for p in net.parameters() if p.grad is not None]
            results.append([out.detach(), leaf.grad, *own])
    for a, b in ((0, 2), (1, 3)):
        assert len(results[a]) == len(results[b]) > 4
        assert all(torch.equal(x, y) for x, y in zip(results[a], results[b], strict=True))
    assert not torch.equal(results[0][0], results[1][0])  # the adapter does something


@each
def test_adapters(case, tmp_path):
    """A new one has no effect, a trained one has, and a file of it gives the same function."""
    net = case.net()
    call = call_of(case, net)
    lora.add(net, "new", rank=2, alpha=1)
    trained_adapter(net, "trained")
    path = str(tmp_path / "adapter.safetensors")
    with torch.no_grad():
        bare = net(**call)
        assert torch.equal(net(**call, adapter="new"), bare)
        trained = net(**call, adapter="trained")
        assert (trained - bare).abs().max() > 1e-3
        lora.save(net, "trained", path)
        lora.load(net, "again", path)
        torch.testing.assert_close(net(**call, adapter="again"), trained, rtol=1e-4, atol=1e-5)
        assert torch.equal(net(**call), bare)


@each
def test_attention_can_be_replaced(case):
    """Where self_attentions is offered: one for each block, called with (B, N, heads, head_dim)."""
    net = case.net()
    if not hasattr(net, "self_attentions"):
        assert not hasattr(net, "head_dim")
        return
    call, seen = call_of(case, net), []
    assert len(net.self_attentions) == len(getattr(net, case.blocks))

    def mean(q, k, v):
        seen.append({q.shape, k.shape, v.shape})
        return v.mean(1, keepdim=True).expand_as(v)

    with torch.no_grad():
        before = net(**call)
        net.self_attentions[1].attend = mean
        after = net(**call)
    prompt = L if case.cls is CogVideoXTransformer3DModel else 0  # which is in the sequence there
    assert seen == [{(B, prompt + case.tokens, net.heads, net.head_dim)}]
    assert (after - before).abs().max() > 1e-4


# ---- files ---------------------------------------------------------------------------------------


def round_trip(net, folder):
    save_network(net, network_config(net), str(folder))
    again, config = load_network(str(folder))
    assert type(again) is type(net) and again.config == net.config and not again.training
    assert config == network_config(net) == network_config(again)
    tensors, stored = lora.base_state_dict(net), again.state_dict()
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[k], stored[k]) for k in tensors)
    assert (folder / WEIGHTS).is_file() != bool(trellis_path(str(folder)))
    return again


@each
def test_files(case, tmp_path, monkeypatch):
    """What save_network writes, without adapters, load_network reads: the same function."""
    monkeypatch.setitem(NETWORKS, case.cls.__name__, case.cls)  # for the example
    net = case.net()
    call = call_of(case, net)
    trained_adapter(net)
    again = round_trip(net, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**call), net(**call))


@pytest.mark.parametrize("cls", OTHERS)
def test_files_of_the_others(cls, tmp_path):
    round_trip(perturbed(cls(**OTHERS[cls])), tmp_path)


def test_shards_of_a_network_are_of_one_save(tmp_path, monkeypatch):
    """A save that ends in the middle of several files leaves all of them as they were."""
    small = dict(size=(8, 8), patch=(4, 4), channels=1, dim=32, depth=2, num_classes=2)
    nets = [fill(DiT(**small), seed) for seed in (0, 1)]
    folder, about = str(tmp_path), network_config(nets[0])
    save_network(nets[0], about, folder, shard_bytes=20000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) > 4 and not any(name.startswith(".") for name in before)
    real, written = networks.write_whole, []

    def killed(tensors, path, *more):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        real(tensors, path, *more)

    monkeypatch.setattr(networks, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        save_network(nets[1], about, folder, shard_bytes=20000)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    monkeypatch.setattr(networks, "write_whole", real)
    save_network(nets[1], about, folder, shard_bytes=20000)
    assert {path.name for path in tmp_path.iterdir()} == before.keys()
    again, _ = load_network(folder)
    state = nets[1].state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


# ---- --compile -----------------------------------------------------------------------------------


class Width(nn.Module):
    """A block of a U-Net: each has its own width, and so takes a graph of its own."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return self.layer(x)


def test_every_block_of_a_class_is_compiled(monkeypatch):
    """Also the ninth: torch keeps eight graphs of a class, and would run the rest as it is."""
    graphs = []

    def compile_here(block):
        count = torch.compile(block.forward, backend=lambda g, _: graphs.append(g) or g.forward)
        block.forward = count

    net = nn.Module()
    net.blocks = nn.ModuleList(Width(n) for n in range(2, 14))
    monkeypatch.setattr(Width, "compile", compile_here)
    monkeypatch.setattr(run_module, "blocks_of", lambda net: net.blocks)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch._dynamo.reset()
    Run.compile_blocks(SimpleNamespace(args=SimpleNamespace(compile=True)), net)
    for n, block in enumerate(net.blocks, 2):
        block(torch.ones(1, n))
    assert len(graphs) == 12
