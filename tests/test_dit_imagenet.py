"""models/networks/dit_imagenet.py: equal to diffusers, and to the official network written out
here.

Also clocks, signs, files, models/convert.py and a run on it.
"""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import launch
from helpers import ROOT, fill, read_log, refusal_of, relative
from safetensors.torch import load_file, save_file

import dmd
import latent_fm
from models import convert
from models.diffusion import VP, Flow, guide, sample_ode, step_grid, to_x0_eps
from models.files import UserError, save_json
from models.networks import WEIGHTS, dit_imagenet, load_network, lora, network_config, save_network
from models.networks.autoencoders import AutoencoderKL
from models.networks.dit_imagenet import (
    DIT_B_2,
    DIT_L_2,
    DIT_XL_2,
    DIT_XL_2_512,
    DiTTransformer2DModel,
    from_official,
    official_config,
    to_official,
)
from models.plumbing.run import Run
from models.plumbing.state import SavedState, named_tensors, save_state, unpack
from models.plumbing.teachers import describe_schedule, load_teacher

TINY = dict(
    num_attention_heads=3,
    attention_head_dim=8,
    out_channels=8,
    num_layers=3,
    sample_size=8,
    num_embeds_ada_norm=5,
)
CASES = {  # changes of the config, sides of the latent
    "plain": ({}, (8, 8)),
    "another_size": ({}, (12, 12)),
    "no_variance": (dict(out_channels=None, in_channels=5), (8, 8)),
    "big_eps": (dict(norm_eps=0.05), (8, 8)),
    "patch_1": (dict(patch_size=1, in_channels=3, out_channels=6, sample_size=5), (5, 5)),
    "patch_4": (dict(patch_size=4, num_layers=1), (8, 8)),
    "wider": (dict(num_attention_heads=2, attention_head_dim=20, num_layers=2), (8, 8)),
    "no_classes": (dict(num_embeds_ada_norm=0, num_layers=2), (8, 8)),
}
# scheduler/scheduler_config.json of facebook/DiT-XL-2-256, and the keys that its config.json has
# beside those of today's class.
SCHEDULER = dict(
    _class_name="DDIMScheduler",
    beta_start=0.0001,
    beta_end=0.02,
    beta_schedule="linear",
    clip_sample=False,
    num_train_timesteps=1000,
)
OLD = {
    "_class_name": "Transformer2DModel",
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
}


def theirs(config):
    return pytest.importorskip("diffusers").DiTTransformer2DModel(**config).eval()


def noise(net, x, t, label, index=None):
    """As DiTPipeline calls it: its clock, and the first half of the channels if there are two."""
    out = net(x, 1000 * t - 1 if index is None else index, label).sample
    return out[:, : x.shape[1]]


def inputs(config=TINY, size=(8, 8), n=3, seed=1):
    """Arguments of a call: x, t between indices, label with the null label last."""
    g, K = torch.Generator().manual_seed(seed), config["num_embeds_ada_norm"]
    return dict(
        x=torch.randn(n, config.get("in_channels", 4), *size, generator=g),
        t=torch.rand(n, generator=g),
        label=torch.tensor([*(i % max(K, 1) for i in range(n - 1)), K]),
    )


def pair(config=TINY, **more):
    """-> ours and diffusers', with the same weights."""
    ours, reference = fill(DiTTransformer2DModel(**config, **more)), theirs(config)
    reference.load_state_dict(ours.state_dict())  # strict: same names, same shapes
    return ours, reference


# ---- the same function as diffusers --------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
def test_equal_to_diffusers(case, shared):
    """The function and its gradients. That of a shared embedder is the sum over its copies'."""
    changes, size = CASES[case]
    config = {**TINY, **changes}
    ours, reference = pair(config, shared_embedders=shared)
    calls = [inputs(config, size) for _ in range(2)]
    for call in calls:
        call["x"].requires_grad_()
    out, want = ours(**calls[0]), noise(reference, **calls[1])
    assert out.shape == want.shape == calls[0]["x"].shape and want.std() > 0.1
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    errors = {
        "out": relative(out, want),
        "dout/dx": relative(calls[0]["x"].grad, calls[1]["x"].grad),
    }
    print(case, " ".join(f"{k} {e:.1e}" for k, e in errors.items()))
    assert max(errors.values()) <= 1e-5
    parameters = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        copies = [name]
        if shared and ".norm1.emb." in name:
            end = name.partition(".norm1.emb.")[2]
            copies = [other for other in parameters if other.endswith(f".norm1.emb.{end}")]
            assert len(copies) == config["num_layers"]
        want = sum(parameters[copy].grad for copy in copies)
        assert torch.allclose(p.grad, want, rtol=1e-4, atol=1e-4 * max(1, want.abs().max())), name


@pytest.mark.parametrize("index", [0, 1, 249, 499, 502, 749, 998, 999])
def test_clock_at_the_indices(index):
    """Index i is t = (i + 1) / 1000: equal there, and visibly different at its neighbours."""
    ours, reference = pair()
    call = dict(inputs(n=2), t=torch.tensor([(index + 1) / 1000] * 2))
    with torch.no_grad():
        eps = ours(**call)
        assert relative(eps, noise(reference, **call, index=torch.tensor([index] * 2))) <= 1e-5
        for other in (index - 1, index + 1):
            assert relative(eps, noise(reference, **call, index=torch.tensor([other] * 2))) > 1e-4


@pytest.mark.parametrize("t", [0.0, 1e-4, 0.0015, 0.50037, 0.99951])
def test_clock_between_the_indices(t):
    ours, reference = pair()
    call = dict(inputs(n=2), t=torch.tensor([t] * 2))
    with torch.no_grad():
        eps = ours(**call)
        assert relative(eps, noise(reference, **call)) <= 1e-5
        assert relative(ours(**{**call, "t": call["t"] + 5e-4}), eps) > 1e-4


def test_eps_is_the_first_half_of_the_channels():
    """The second half, a learned variance, is dropped: its weights get no gradient."""
    ours, reference = pair()
    call = inputs()
    with torch.no_grad():
        out = reference(call["x"], 1000 * call["t"] - 1, call["label"]).sample
    eps = ours(**call)
    assert out.shape[1] == 8
    assert relative(eps, out[:, :4]) <= 1e-5 < 1e-1 < relative(eps, out[:, 4:])
    eps.square().sum().backward()
    grad = ours.proj_out_2.weight.grad.view(4, 8, -1)  # (pixels of a patch, channels, D)
    assert grad[:, :4].abs().sum(-1).all() and not grad[:, 4:].any()


def test_null_label_is_the_last_row_and_the_default():
    ours, _ = pair()
    call = inputs()
    with torch.no_grad():
        null = ours(**{**call, "label": torch.full((3,), 5)})
        assert torch.equal(ours(call["x"], call["t"]), null)
        label = torch.full((3,), 5, dtype=torch.int32)
        assert torch.equal(ours(**{**call, "label": label}), null)
        for k in range(5):
            assert relative(ours(**{**call, "label": torch.full((3,), k)}), null) > 1e-2
        ours.train()  # diffusers drops labels by itself; here the scripts do, by draws of samples
        assert torch.equal(ours(**call), ours(**call))


def embedding_table(block):
    return block.norm1.emb.class_embedder.get_submodule("embedding_table").weight


def test_embedders_apart_are_those_of_each_block_and_the_last_layer_has_those_of_the_first():
    ours, reference = pair(shared_embedders=False)
    call = inputs()
    with torch.no_grad():
        for i in range(3):
            before = ours(**call)
            for net in (ours, reference):
                embedding_table(net.transformer_blocks[i]).neg_()
            assert relative(ours(**call), before) > 1e-2
            assert relative(ours(**call), noise(reference, **call)) <= 1e-5


def test_bfloat16_as_close_to_float32_as_diffusers():
    ours, reference = pair()
    call = inputs()
    low_call = {**call, "x": call["x"].bfloat16()}

    def error(out, exact):
        return ((out.float() - exact).norm() / exact.norm()).item()

    with torch.no_grad():
        exact, seen = ours(**call), []
        ours.proj_out_1.register_forward_hook(
            lambda layer, args, out: seen.append((args[0].dtype, out.dtype))
        )
        features = dit_imagenet.time_features(call["t"], None)
        norm1 = ours.transformer_blocks[0].norm1
        before = norm1(features, call["label"])
        with torch.autocast("cpu", torch.bfloat16):
            autocast = error(ours(**call), exact)
            after = norm1(features, call["label"])
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert seen == [(torch.float32, torch.float32)]
        # Not the buffers: positions are float32 in diffusers too.
        for p in [*ours.parameters(), *reference.parameters()]:
            p.data = p.data.bfloat16()
        low, low_theirs = ours(**low_call), noise(reference, **low_call)
        assert low.dtype == torch.bfloat16 and ours(**call).dtype == torch.float32
    low, low_theirs = error(low, exact), error(low_theirs, exact)
    print(f"errors: autocast {autocast:.1e}, bfloat16 {low:.1e}, diffusers' {low_theirs:.1e}")
    assert 0 < autocast < 0.03 and low < 1.5 * low_theirs + 1e-3 and low < 0.05


# ---- names, shapes and configs -------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, parameters, official",
    [
        pytest.param(DIT_B_2, 147_439_904, 130_512_416, id="b-2"),
        pytest.param(DIT_L_2, 511_609_888, 458_102_816, id="l-2"),
        pytest.param(DIT_XL_2, 749_826_464, 675_129_632, id="xl-2-256"),
        pytest.param(DIT_XL_2_512, 749_826_464, 676_014_368, id="xl-2-512"),
        pytest.param(dict(DIT_B_2, out_channels=4), 147_427_600, 130_500_112, id="lfm-b-2"),
        pytest.param(
            dict(DIT_L_2, out_channels=4, num_embeds_ada_norm=0),
            487_017_488,
            457_062_416,
            id="lfm-l-2-unconditional",
        ),
    ],
)
def test_released_sizes_have_diffusers_names_and_shapes(config, parameters, official):
    """parameters: their number in diffusers, which has the embedders in each block. official: in
    the official layout, which has them once, as we do, and the fixed positions."""
    with torch.device("meta"):
        ours, reference = DiTTransformer2DModel(**config), theirs(config)
    shapes = {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    assert shapes == {k: tuple(v.shape) for k, v in reference.state_dict().items()}
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    rows, side = config["num_embeds_ada_norm"] + 1, config["sample_size"]
    table = "transformer_blocks.11.norm1.emb.class_embedder.embedding_table.weight"
    assert shapes[table] == (rows, dim)
    assert shapes["proj_out_2.weight"] == (4 * config["out_channels"], dim)
    assert sum(p.numel() for p in reference.parameters()) == parameters
    assert sum(p.numel() for p in ours.parameters()) + (side // 2) ** 2 * dim == official
    assert not list(ours.buffers())
    assert ours.latent_shape == (4, side, side) and ours.num_classes == rows - 1
    assert set(ours.config) == {k for k in reference.config if not k.startswith("_")}
    assert all(ours.config[k] == config[k] == reference.config[k] for k in config)
    assert ours.pos_embed.base == reference.pos_embed.base_size
    assert ours.norm_out.eps == reference.norm_out.eps
    first, theirs_first = ours.transformer_blocks[0], reference.transformer_blocks[0]
    assert first.norm1.norm.eps == theirs_first.norm1.norm.eps


def test_defaults_of_the_config_are_diffusers():
    with torch.device("meta"):
        ours, reference = DiTTransformer2DModel(), theirs({})
    assert ours.config == {k: v for k, v in reference.config.items() if not k.startswith("_")}
    assert ours.config == json.loads(json.dumps(ours.config))


def test_class_facts():
    net = DiTTransformer2DModel
    assert (net.prediction, net.default_shift) == ("eps", 1.0)
    assert (net.latent_shape, net.cond_names) == ((4, 32, 32), ("label",))
    predictions = {None: "eps", "dit": "eps", "sit": "flow_v", "lfm": "flow_v", "flow": "flow_v"}
    for convention, prediction in predictions.items():
        net = DiTTransformer2DModel(**TINY, convention=convention)
        assert net.prediction == prediction
        assert isinstance(net.default_schedule, Flow if prediction == "flow_v" else VP)
        assert net.config.get("convention") == convention
        assert ("convention" in net.config) == (convention is not None)


def test_a_new_network_is_adaln_zeros():
    """Its output is 0, each block is the identity, all blocks have the same embedders, and nothing
    else is zero."""
    net, call = DiTTransformer2DModel(**TINY), inputs()
    out, features = net(**call), net(**call, return_features=True)
    assert not out.any() and torch.equal(features, net.pos_embed(call["x"]))
    to_official(net)  # raises where the embedders differ
    zero = {name for name, p in net.named_parameters() if name.endswith("weight") and not p.any()}
    assert zero == {
        *(f"transformer_blocks.{i}.norm1.linear.weight" for i in range(3)),
        "proj_out_1.weight",
        "proj_out_2.weight",
    }
    std = embedding_table(net.transformer_blocks[2]).std().item()
    assert std == pytest.approx(0.02, rel=0.2)


def test_weights_and_config_of_diffusers_load_here(tmp_path):
    """A folder that diffusers wrote loads, also with the class and keys of released configs.

    Copies of the embedders that differ are refused, and the remedy works.
    """
    (ours, reference), call = pair(), inputs()
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for more in ({}, OLD):
        (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
        net, _ = load_network(str(tmp_path))
        with torch.no_grad():
            assert relative(net(**call), noise(reference, **call)) <= 1e-5
        assert net.config == ours.config and type(net) is DiTTransformer2DModel
    fill(reference).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="this network has one for both: put .shared_embedders.: f"):
        load_network(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "shared_embedders": False}))
    net, _ = load_network(str(tmp_path))
    with torch.no_grad():
        assert relative(net(**call), noise(reference, **call)) <= 1e-5
    assert net.config == {**ours.config, "shared_embedders": False}
    (tmp_path / "config.json").write_text(json.dumps({**config, **OLD, "num_vector_embeds": 8}))
    message = (
        "does not describe a Transformer2DModel: "
        "num_vector_embeds = 8 is not implemented; DiT has None"
    )
    with pytest.raises(UserError, match=message):
        load_network(str(tmp_path))


# ---- what the training scripts rely on -----------------------------------------------------------


def trained(net, steps=3):
    """The network after a few updates of AdamW, as latent_fm.py makes them."""
    args = latent_fm.parse_args(["--data", "x", "--network", "DiT-B/2", "--learning_rate", "1e-2"])
    (optimizer,), _ = latent_fm.build_optimizers(args, net)
    for seed in range(steps):
        net(**inputs(seed=seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def is_shared(net):
    """Whether all blocks have the very same embedders."""
    return len({id(block.norm1.emb) for block in net.transformer_blocks}) == 1


def test_shared_embedders_stay_one_through_training_copies_and_files(tmp_path):
    """Counted, updated and averaged once, and exported to the official layout afterwards."""
    net, optimizer = trained(fill(DiTTransformer2DModel(**TINY, convention="flow")))
    names = [name for name, _ in net.named_parameters() if ".norm1.emb." in name]
    assert len(names) == 5 and all(name.startswith("transformer_blocks.0.") for name in names)
    assert len(optimizer.state) == len(list(net.parameters()))
    official = to_official(net)
    assert official["y_embedder.embedding_table.weight"].shape == (6, 24)
    keys = [key for key in net.state_dict() if ".norm1.emb." in key]
    assert len(keys) == 5 * len(net.transformer_blocks)  # in diffusers' layout
    save_network(net, network_config(net), str(tmp_path))
    again, _ = load_network(str(tmp_path))
    copied, averaged = copy.deepcopy(net), copy.deepcopy(net)
    for other in (again, copied, averaged):
        assert is_shared(other)
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in other.state_dict().items())
    trained(copied)
    flags = SimpleNamespace(
        ema_decay=0.9,
        output_dir="x",
        train_batch_size=1,
        gradient_accumulation_steps=1,
        sequence_ranks=1,
    )
    Run(flags, "x").update_ema(averaged, copied, step=100)
    for key, value in averaged.state_dict().items():
        want = 0.9 * net.state_dict()[key] + 0.1 * copied.state_dict()[key]
        torch.testing.assert_close(value, want)
    assert sum(".norm1.emb." in key for key in named_tensors(net, "net")) == 5  # once in a state
    info = dict(world_size=1)
    save_state(str(tmp_path), 1, {"net": net}, info)
    unpack(copied, "net", SavedState(str(tmp_path / "state" / "step-0000001"), 1))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in copied.state_dict().items())
    assert is_shared(copied)


def test_features_are_the_middle_block_s():
    net, call, seen = pair()[0], inputs(), []
    middle = net.transformer_blocks[1]  # of three
    middle.register_forward_hook(lambda block, args, out: seen.append(out))
    with torch.no_grad():
        net(**call)
        features = net(**call, return_features=True)
    assert features.shape == (3, 16, 24) and torch.equal(features, seen[0])


def test_gradient_checkpointing_gives_the_same_gradients(monkeypatch):
    calls, original = [], dit_imagenet.checkpoint

    def checkpoint(*args, **keywords):
        calls.append(keywords)
        return original(*args, **keywords)

    monkeypatch.setattr(dit_imagenet, "checkpoint", checkpoint)
    net, call, gradients = pair()[0], inputs(), []
    for net.gradient_checkpointing in (False, True):
        net.zero_grad()
        leaf = call["x"].clone().requires_grad_()
        net(**{**call, "x": leaf}).square().sum().backward()
        gradients.append([leaf.grad] + [p.grad.clone() for p in net.parameters()])
    assert calls == [{"use_reentrant": False}] * 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with torch.no_grad():
        net(**call)
    assert len(calls) == 3  # sampling does not checkpoint


def test_adapters_pass_to_peft_and_back(tmp_path):
    peft = pytest.importorskip("peft")
    net, reference = pair()
    call, path = inputs(), tmp_path / "adapter_model.safetensors"
    torch.manual_seed(1)
    lora.add(net, "a", rank=3, alpha=1.5)
    with torch.no_grad():
        for p in lora.parameters(net, "a"):
            p += 0.3 * torch.randn(p.shape)
    lora.save(net, "a", str(path))
    assert len(load_file(path)) == 2 * 3 * 6 and not hasattr(reference, "load_lora_adapter")
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=list(net.lora_targets))
    config.save_pretrained(tmp_path)
    adapted = peft.PeftModel.from_pretrained(reference, tmp_path)
    lora.load(net, "b", str(path))
    with torch.no_grad():
        out, bare = net(**call, adapter="a"), net(**call)
        assert relative(out, noise(adapted, **call)) <= 1e-5 and relative(bare, out) > 1e-2
        assert relative(net(**call, adapter="b"), out) <= 1e-6


# ---- the official layout -------------------------------------------------------------------------


def official_state(depth=3, dim=24, patch=2, channels=4, outputs=8, rows=6, side=4, seed=0):
    """A state dict as DiT, SiT and LFM store it, with random weights that hide nothing."""
    shapes = {
        "x_embedder.proj": (dim, channels, patch, patch),
        "t_embedder.mlp.0": (dim, 256),
        "t_embedder.mlp.2": (dim, dim),
        "final_layer.linear": (patch * patch * outputs, dim),
        "final_layer.adaLN_modulation.1": (2 * dim, dim),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * dim, dim),
            f"blocks.{i}.attn.proj": (dim, dim),
            f"blocks.{i}.mlp.fc1": (4 * dim, dim),
            f"blocks.{i}.mlp.fc2": (dim, 4 * dim),
            f"blocks.{i}.adaLN_modulation.1": (6 * dim, dim),
        }
    shapes = {
        **{f"{name}.weight": shape for name, shape in shapes.items()},
        **{f"{name}.bias": shape[:1] for name, shape in shapes.items()},
        "y_embedder.embedding_table.weight": (rows, dim),
    }
    g = torch.Generator().manual_seed(seed)
    state = {name: 0.15 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return state | {"pos_embed": official_positions(side, dim)}


def official_positions(side, dim):
    """(1, side^2, dim): a token's column has the first half of the channels, its row the second.

    Each half is sines, then cosines.
    """
    out = np.zeros((side, side, dim))
    for row in range(side):
        for column in range(side):
            for half, place in enumerate((column, row)):
                angles = place / 10000 ** (np.arange(dim // 4) / (dim // 4))
                waves = np.concatenate([np.sin(angles), np.cos(angles)])
                out[row, column, half * dim // 2 : (half + 1) * dim // 2] = waves
    return torch.from_numpy(out.reshape(1, side * side, dim)).float()


def official_forward(state, x, t, y, heads=3):
    """DiT written out, with the official names, one sample and one head at a time.

    In float64, except for the angles. t: what the network's sines get. -> all channels of the
    output.
    """
    w = {k: v.double() for k, v in state.items()}
    dim, channels, p, _ = w["x_embedder.proj.weight"].shape
    depth, side = sum(k.endswith("qkv.weight") for k in w), x.shape[2] // p

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(h):
        return h / (1 + (-h).exp())

    def gelu(h):
        return h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    def norm(h):
        h = h - h.mean(-1, keepdim=True)
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    images = []
    for image, time, label in zip(x.double(), t.float(), y, strict=True):
        angles = (time * torch.exp(-math.log(10000) * torch.arange(128) / 128)).double()
        waves = torch.cat([angles.cos(), angles.sin()])
        c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
        c = c + w["y_embedder.embedding_table.weight"][label]
        rows = []
        for i in range(side):
            for j in range(side):
                patch = image[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
                token = (w["x_embedder.proj.weight"] * patch).sum((1, 2, 3))
                rows.append(token + w["x_embedder.proj.bias"])
        h = torch.stack(rows) + w["pos_embed"][0]
        for b in range(depth):
            modulation = linear(f"blocks.{b}.adaLN_modulation.1", silu(c))
            parts = [modulation[i * dim : (i + 1) * dim] for i in range(6)]
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
            # (N, q of all heads, k of all heads, v of all heads)
            qkv = linear(f"blocks.{b}.attn.qkv", norm(h) * (1 + scale_msa) + shift_msa)
            out, width = [], dim // heads
            for head in range(heads):
                first = [i * dim + head * width for i in range(3)]
                q, k, v = (qkv[:, start : start + width] for start in first)
                out.append((q @ k.T / math.sqrt(width)).softmax(-1) @ v)
            h = h + gate_msa * linear(f"blocks.{b}.attn.proj", torch.cat(out, dim=1))
            hidden = linear(f"blocks.{b}.mlp.fc1", norm(h) * (1 + scale_mlp) + shift_mlp)
            h = h + gate_mlp * linear(f"blocks.{b}.mlp.fc2", gelu(hidden))
        final = linear("final_layer.adaLN_modulation.1", silu(c))
        h = linear("final_layer.linear", norm(h) * (1 + final[dim:]) + final[:dim])
        outputs = h.shape[1] // p**2
        picture = torch.zeros(outputs, side * p, side * p, dtype=torch.float64)
        for n, token in enumerate(h):
            for a in range(p):
                for b in range(p):
                    first = (a * p + b) * outputs
                    pixel = token[first : first + outputs]
                    picture[:, n // side * p + a, n % side * p + b] = pixel
        images.append(picture)
    return torch.stack(images)


# convention: output channels of the official network, and its output in our convention at our t.
# SiT's noise is at t = 0, and its velocity is x0 - eps.
OFFICIAL = {
    "dit": (8, lambda s, x, t, y: official_forward(s, x, 1000 * t - 1, y)),
    "sit": (8, lambda s, x, t, y: -official_forward(s, x, 1 - t, y)),
    "lfm": (4, lambda s, x, t, y: official_forward(s, x, t, y)),
}
official = pytest.mark.parametrize("convention", OFFICIAL)


def from_state(state, convention):
    net = DiTTransformer2DModel(**official_config(state, convention, num_attention_heads=3))
    net.load_state_dict(from_official(state))  # strict
    return net.eval()


@official
def test_official_weights_compute_the_official_function(convention):
    """Compared with the plain network above: names, thirds of qkv, order of shift, scale and gate,
    positions, channels of a patch, clock, frequencies and sign."""
    outputs, answer = OFFICIAL[convention]
    state, call = official_state(outputs=outputs), inputs()
    net = from_state(state, convention)
    with torch.no_grad():
        out = net(**call)
    want = answer(state, call["x"], call["t"], call["label"])[:, :4]
    print(convention, f"{relative(out, want):.1e}")
    assert relative(out, want) <= 1e-5 and want.std() > 0.1
    for other in {None, *OFFICIAL} - {convention}:  # another convention gives another output
        with torch.no_grad():
            net.convention, net.sign = other, dit_imagenet.CONVENTIONS[other][3]
            assert relative(net(**call), want) > 1e-3, other


@pytest.mark.parametrize("convention", ["dit", "sit"])
def test_official_weights_at_the_ends_of_time(convention):
    _, answer = OFFICIAL[convention]
    state = official_state()
    net = from_state(state, convention)
    for t in (0.0, 0.001, 0.999, 1.0):
        call = dict(inputs(n=2), t=torch.tensor([t, t]))
        with torch.no_grad():
            want = answer(state, call["x"], call["t"], call["label"])[:, :4]
            assert relative(net(**call), want) <= 1e-5


def test_velocities_lead_from_noise_to_data():
    """For data at one point c, the optimal SiT gives x0 - eps at 1 - t, and LFM eps - x0 at t.

    One Euler step in our time ends in c.
    """
    c = torch.full((2, 4, 8, 8), 0.7)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1.0, 1.0])
    velocities = {"sit": lambda x, s: (c - x) / (1 - s[0]), "lfm": lambda x, s: (x - c) / s[0]}
    for convention, official_velocity in velocities.items():
        a, b, _, sign, kind = dit_imagenet.CONVENTIONS[convention]
        v = sign * official_velocity(x, a * t + b)
        x0, eps = to_x0_eps(v, kind, x, Flow().alpha(t), Flow().sigma(t))
        torch.testing.assert_close(x0, c)
        torch.testing.assert_close(eps, x)


@official
def test_names_pass_both_ways(convention):
    """Bit by bit, also from names with the prefix of a wrapped module and without positions."""
    state = official_state(outputs=OFFICIAL[convention][0])
    net = from_state(state, convention)
    back = to_official(net)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], v) for k, v in state.items() if k != "pos_embed")
    torch.testing.assert_close(back["pos_embed"], state["pos_embed"], atol=1e-6, rtol=0)
    wrapped = from_official({f"module.{k}": v for k, v in state.items() if k != "pos_embed"})
    assert wrapped.keys() == net.state_dict().keys()
    assert all(torch.equal(wrapped[k], v) for k, v in net.state_dict().items())
    apart = DiTTransformer2DModel(**net.config, shared_embedders=False)
    apart.load_state_dict(net.state_dict())
    assert to_official(apart).keys() == state.keys()
    with torch.no_grad():
        apart.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias += 1
    message = "the blocks' timestep_embedder.linear_2 differ: these were trained apart"
    with pytest.raises(ValueError, match=message):
        to_official(apart)
    with pytest.raises(ValueError, match="this network has one for both"):
        net.load_state_dict(apart.state_dict())


def test_state_dicts_of_official_networks_have_these_names_and_shapes():
    """DiT-XL/2 at 256: what we make of the official shapes is what diffusers has."""
    state = official_state(depth=2, dim=1152, rows=1001, side=16)
    state = {k: v.to("meta") for k, v in state.items()}
    with torch.device("meta"):
        net = DiTTransformer2DModel(**DIT_XL_2)
    changes = {"num_layers": 2, "norm_eps": 1e-6, "convention": "dit"}
    assert official_config(state, "dit") == {**DIT_XL_2, **changes}
    state.pop("pos_embed")
    made = {k: v.shape for k, v in from_official(state).items()}
    assert made == {
        k: v.shape
        for k, v in net.state_dict().items()
        if not k.startswith("transformer_blocks.") or int(k.split(".")[1]) < 2
    }
    for dim, heads in ((384, 6), (768, 12), (1024, 16), (1152, 16)):
        config = official_config(official_state(depth=1, dim=dim, rows=1, side=2), "lfm")
        assert config["num_attention_heads"] == heads


@official
def test_diffusers_computes_the_same_once_its_frequencies_are_the_official_ones(convention):
    """As the file's docstring says: the state dict loads there, and one number in each block
    differs."""
    state, call = official_state(outputs=OFFICIAL[convention][0]), inputs()
    net = from_state(state, convention)
    reference = theirs({k: v for k, v in net.config.items() if k != "convention"})
    reference.load_state_dict(net.state_dict())
    a, b, _, sign, _ = dit_imagenet.CONVENTIONS[convention]
    arguments = dict(x=call["x"], t=None, label=call["label"], index=a * call["t"] + b)
    with torch.no_grad():
        out, before = net(**call), sign * noise(reference, **arguments)
        for block in reference.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        after = sign * noise(reference, **arguments)
    print(f"{convention}: differs by {relative(before, out):.1e}, then {relative(after, out):.1e}")
    assert relative(after, out) <= 1e-5
    assert relative(before, out) > (0.1 if convention == "dit" else 1e-4)
    i = torch.arange(128).double()
    frequency = [torch.exp(-math.log(1e4) * i / last) for last in (127, 128)]
    assert 2.8 < 999 * (frequency[0] - frequency[1]).abs().max() < 3  # rad at t = 1


# ---- the command ---------------------------------------------------------------------------------


def run_convert(*flags):
    convert.main(list(map(str, flags)))


@pytest.mark.parametrize(
    "convention, flags, prediction",
    [
        ("dit", [], "eps"),
        ("sit", ["--prediction", "flow_v", "--noise_at", "0"], "flow_v"),
        ("lfm", ["--prediction", "flow_v", "--noise_at", "1"], "flow_v"),
    ],
)
def test_converted_folders_are_teachers(tmp_path, convention, flags, prediction):
    outputs, answer = OFFICIAL[convention]
    state, call = official_state(outputs=outputs), inputs()
    save_file(state, tmp_path / "official.safetensors")
    files = ["--input", tmp_path / "official.safetensors", "--output", tmp_path / "out"]
    run_convert(*files, "--num_attention_heads", "3", *flags)
    schedule = VP("linear", 1e-4, 0.02) if prediction == "eps" else Flow()
    want = answer(state, call["x"], call["t"], call["label"])[:, :4]
    for part in ("out", "out/transformer"):
        teacher = load_teacher(str(tmp_path / part))
        assert (teacher.prediction, teacher.shift) == (prediction, 1.0)
        assert teacher.config["convention"] == convention
        assert describe_schedule(teacher.schedule) == describe_schedule(schedule)
        with torch.no_grad():
            assert relative(teacher.net(**call), want) <= 1e-5
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    assert index.get("_class_name") == ("DiTPipeline" if prediction == "eps" else None)
    (tmp_path / "out" / "scheduler" / "scheduler_config.json").unlink()  # then the network's own
    teacher = load_teacher(str(tmp_path / "out"))
    assert teacher.prediction == prediction and type(teacher.schedule) is type(schedule)


def test_the_command_runs_and_refuses_in_one_line(tmp_path):
    save_file(official_state(rows=1, outputs=4), tmp_path / "lfm.safetensors")
    given = ["--num_attention_heads", "3", "--prediction", "flow_v"]
    given += ["--input", tmp_path / "lfm.safetensors"]

    def run(*flags):
        return launch(ROOT / "models" / "convert.py", [*given, *flags], cwd=ROOT)

    done = run("--output", tmp_path / "out", "--noise_at", "1")
    assert done.returncode == 0, done.stderr
    assert "0 classes, latents (4, 8, 8), predicts flow_v, convention lfm" in done.stdout
    net, _ = load_network(str(tmp_path / "out" / "transformer"))
    assert net.num_classes == 0  # an unconditional LFM: its one row is the null label
    assert net.cond_names == ("label",)
    for done, says in (
        (run("--output", tmp_path / "new"), "--prediction flow_v goes with --noise_at"),
        (run("--output", tmp_path / "lfm.safetensors" / "x", "--noise_at", "1"), "cannot write"),
    ):
        assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr
        assert done.stderr.count("\n") == 1


def without(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


def with_tensors(**tensors):
    return lambda state: state | {k.replace("__", "."): v for k, v in tensors.items()}


def with_positions(change):
    return lambda state: state | {"pos_embed": change(state["pos_embed"]).contiguous()}


def column_by_column(position):
    return position.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize(
    "change, flags, message",
    [
        (
            with_tensors(projectors__0__weight=torch.zeros(2)),
            [],
            "'projectors.0.weight' is no parameter of an official DiT",
        ),
        (
            with_tensors(blocks__0__attn__q_norm__weight=torch.zeros(2)),
            [],
            "'blocks.0.attn.q_norm.weight' is no parameter",
        ),
        (without("blocks.1.attn.qkv.bias"), [], "Missing key"),
        (without("x_embedder.proj.weight"), [], "no tensor 'x_embedder.proj.weight'"),
        (
            with_positions(lambda position: position + 0.1 * torch.eye(16, 24)),
            [],
            "not the fixed sine positions of a square",
        ),
        (with_positions(column_by_column), [], "not the fixed sine positions"),
        (without("pos_embed"), [], "these weights of width 24 do not show sample_size: give it"),
        (
            dict,
            ["--num_attention_heads", "5"],
            "num_attention_heads = 5 does not divide the width 24",
        ),
        (
            dict,
            ["--num_attention_heads", None],
            "these weights of width 24 do not show num_attention_heads: give it",
        ),
        (
            with_tensors(
                final_layer__linear__weight=torch.zeros(24, 24),
                final_layer__linear__bias=torch.zeros(24),
            ),
            [],
            "out_channels = 6 is not implemented",
        ),
        (dict, ["--noise_at", "1"], "--prediction flow_v goes with --noise_at"),
        (dict, ["--output", "."], "exists: name a new folder"),
        (None, [], "is a pickle, not safetensors"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, capsys, change, flags, message):
    path = tmp_path / "official.safetensors"
    if change:
        save_file(change(official_state()), path)
    else:
        torch.save(official_state(), path)
    given = {
        "--input": str(path),
        "--output": str(tmp_path / "out"),
        "--num_attention_heads": "3",
        **dict(zip(flags[::2], flags[1::2], strict=True)),
    }
    flags = [f for pair in given.items() if pair[1] is not None for f in pair]
    assert message in refusal_of(capsys, convert.main, *flags)
    assert not (tmp_path / "out").exists()


# ---- sampling, and a run on it -------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_sampling_and_decoding_are_those_of_the_pipeline(scale):
    """Euler on the ODE, then our AutoencoderKL, is DiTPipeline with DDIM at 999, 749, 499, 249."""
    diffusers = pytest.importorskip("diffusers")
    config = dict(TINY, num_embeds_ada_norm=1000)  # the pipeline's null label is 1000
    ours, reference = pair(config)
    vae = fill(
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[8, 12],
            norm_num_groups=4,
        )
    )
    their_vae = diffusers.AutoencoderKL(**vae.config).eval()
    their_vae.load_state_dict(vae.state_dict())
    settings = {k: v for k, v in SCHEDULER.items() if k != "_class_name"}
    scheduler = diffusers.DDIMScheduler(**settings, timestep_spacing="trailing")
    pipe = diffusers.DiTPipeline(reference, their_vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    label = torch.tensor([3, 700])
    want = pipe(
        label.tolist(),
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(1),
        num_inference_steps=4,
        output_type="pt",
    ).images
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    schedule, grid = ours.default_schedule, step_grid(4, ours.default_shift)

    def predict(x, t):
        eps = guide(ours(x, t, label), ours(x, t), scale)
        return to_x0_eps(eps, ours.prediction, x, schedule.alpha(t), schedule.sigma(t))

    with torch.no_grad():
        pixels = vae.to_pixels(sample_ode(predict, schedule, x, grid, "euler"))
    got = (pixels / 2 + 0.5).clamp(0, 1)
    print(f"difference {relative(got, want):.1e}")
    assert relative(got, want) < 1e-4
    assert 0.1 < want.std() and ((want > 0) & (want < 1)).float().mean() > 0.2


def save_tiny(root, convention):
    """Flags of a run whose teacher is a pipeline root like facebook/DiT-XL-2-256, or convert's."""
    if convention is None:
        net = fill(DiTTransformer2DModel(**TINY))
        config = {**net.config, "_diffusers_version": "0.12.0.dev0", **OLD}
        save_network(net, config, str(root / "transformer"))
        (root / "scheduler").mkdir()
        save_json(SCHEDULER, str(root / "scheduler" / "scheduler_config.json"))
        index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "Transformer2DModel"]}
        save_json(index, str(root / "model_index.json"))
    else:
        official = root.with_suffix(".safetensors")
        save_file(official_state(outputs=OFFICIAL[convention][0]), official)
        flags = ["--input", official, "--output", root, "--num_attention_heads", "3"]
        if convention != "dit":
            flags += ["--prediction", "flow_v", "--noise_at", "0" if convention == "sit" else "1"]
        run_convert(*flags)
    flags = f"--teacher {root} --teacher_steps 2 --preview_samples 2"
    return f"{flags} --learning_rate 1e-4 --learning_rate_fake 2e-4".split()


@pytest.mark.parametrize("convention", [None, "dit", "sit"])
def test_student_of_a_run_loads_in_diffusers(tmp_path, convention):
    """After two guided updates of DMD, the student is a component that diffusers loads and that
    computes the same there, with its own clock."""
    if convention is None:
        (tmp_path / "teacher").mkdir()
    flags = save_tiny(tmp_path / "teacher", convention)
    flags += "--train_batch_size 3 --max_train_steps 2 --guidance_scale 2 --student_steps 2".split()
    dmd.main([*flags, "--output_dir", str(tmp_path / "run")])
    folder = tmp_path / "run" / "student"
    config = json.loads((tmp_path / "teacher" / "transformer" / "config.json").read_text())
    assert json.loads((folder / "config.json").read_text()) == config
    stored = json.loads((folder / "sampler.json").read_text())
    prediction, schedule = "eps", VP("linear", 1e-4, 0.02)
    if convention == "sit":
        prediction, schedule = "flow_v", Flow()
    assert stored["prediction"] == prediction
    assert stored["schedule"] == describe_schedule(schedule)
    assert stored["times"] == pytest.approx([1.0, 0.5])
    ours, _ = load_network(str(folder))
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DiTTransformer2DModel.from_pretrained(folder).eval()
    call = inputs()
    a, b, last, sign, _ = dit_imagenet.CONVENTIONS[convention]
    for block in reference.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 128 - last
    with torch.no_grad():
        out = ours(**call)
        want = sign * noise(reference, call["x"], None, call["label"], index=a * call["t"] + b)
    assert relative(out, want) <= 1e-5 and out.std() > 0.01
    start = load_file(tmp_path / "teacher" / "transformer" / WEIGHTS)
    trained = ours.state_dict()
    assert not any(torch.equal(v, start[k]) for k, v in trained.items())  # every parameter moved
    to_official(ours)  # the blocks' embedders are still one
    assert len(read_log(tmp_path / "run")) == 2
    assert load_file(tmp_path / "run" / "samples.safetensors")["x0"].shape == (2, 4, 8, 8)
    flags = ["--sample", str(tmp_path / "run"), "--preview_samples", "2"]
    dmd.main([*flags, "--output_dir", str(tmp_path / "samples")])
    assert (tmp_path / "samples" / "samples.png").exists()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(x=torch.zeros(3, 8, 8, 8)),
            r"x has shape \(3, 8, 8, 8\); pass a latent \(B, 4, H, W\)",
        ),
        (dict(x=torch.zeros(3, 4, 8, 7)), "do not divide into patches"),
        (dict(t=torch.tensor(0.5)), r"pass floats in \[0, 1\] of shape \(3,\)"),
        (dict(t=torch.tensor([1, 2, 3])), "torch.int64"),
        (
            dict(label=torch.zeros(2, dtype=torch.long)),
            r"label is torch.int64 \(2,\); pass classes 0 to 5, integers of shape \(3,\)",
        ),
        (dict(label=torch.zeros(3)), "label is torch.float32"),
        (dict(adapter="a"), "no adapter is called 'a'"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        DiTTransformer2DModel(**TINY)(**{**inputs(), **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(norm_type="ada_norm_single"),
            "norm_type = 'ada_norm_single' is not implemented; DiT has 'ada_norm_zero'",
        ),
        (dict(dropout=0.1), "dropout = 0.1"),
        (dict(attention_bias=False), "attention_bias = False"),
        (dict(activation_fn="geglu"), "activation_fn = 'geglu'"),
        (dict(upcast_attention=True), "upcast_attention = True"),
        (dict(norm_elementwise_affine=True), "norm_elementwise_affine = True"),
        (dict(cross_attention_dim=8), "cross_attention_dim = 8"),
        (dict(double_self_attention=True), "double_self_attention"),
        (dict(only_cross_attention=True), "only_cross_attention"),
        (dict(num_vector_embeds=8), "num_vector_embeds"),
        (dict(caption_channels=8), "caption_channels"),
        (dict(use_linear_projection=True), "use_linear_projection"),
        (dict(attention_type="gated"), "attention_type"),
        (
            dict(num_embeds_ada_norm=None),
            "num_embeds_ada_norm = None must be the number of classes",
        ),
        (dict(sample_size=9), "sample_size = 9 does not divide"),
        (
            dict(out_channels=6),
            "out_channels = 6 is not implemented; "
            "DiT has in_channels = 4 or, with a learned variance, twice that",
        ),
        (dict(attention_head_dim=6), "18 must be a multiple of 4"),
        (
            dict(convention="edm"),
            "convention = 'edm' is unknown; known are None, 'dit', 'sit', 'lfm'",
        ),
    ],
)
def test_wrong_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        DiTTransformer2DModel(**{**TINY, **change})
    assert "\n" not in str(error.value)
