"""models/networks/trellis.py: against a second implementation on dense grids, and TRELLIS's files.

Also sparse data and tokens of images. The second implementation reads a state dict by its names,
computes sparse convolutions as dense ones on the whole grid, and treats one sample at a time.
"""

import json
import math
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import alone, fill, read_log, refusal_of, relative, word_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import dmd
from models import encode
from models.diffusion import Flow
from models.draws import Draws
from models.files import UserError, load_json, save_json
from models.image_tokens import ImageTokens, prepare_image
from models.networks import (
    NETWORKS,
    load_network,
    lora,
    network_config,
    save_network,
    trellis,
    weights_hash,
)
from models.networks.trellis import (
    SLAT_FLOW_L,
    SS_DECODER,
    SS_ENCODER,
    SS_FLOW_L,
    SLatFlowModel,
    SparseStructureDecoder,
    SparseStructureEncoder,
    SparseStructureFlowModel,
    occupied,
    per_point,
    per_sample_mean,
    pipeline_entry,
)
from models.plumbing.data import Prompts, load_data
from models.plumbing.teachers import is_small, load_teacher, starting_network

BOTH = dict(
    in_channels=3,
    out_channels=3,
    model_channels=32,
    cond_channels=10,
    num_blocks=3,
    num_heads=2,
    pe_mode="ape",
    qk_rms_norm=True,
)
SS = dict(BOTH, resolution=4, patch_size=1)
SLAT = dict(BOTH, resolution=8, patch_size=2, io_block_channels=[8])
ENCODER = dict(in_channels=1, latent_channels=3, num_res_blocks=2, channels=[4, 6, 8])
DECODER = dict(out_channels=1, latent_channels=3, num_res_blocks=2, channels=[8, 6, 4])
CLASSES = {
    SparseStructureFlowModel: SS,
    SLatFlowModel: SLAT,
    SparseStructureEncoder: ENCODER,
    SparseStructureDecoder: DECODER,
}
flows = pytest.mark.parametrize(
    "cls", [SparseStructureFlowModel, SLatFlowModel], ids=["ss", "slat"]
)
each = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def points(counts, side, seed=0):
    """Distinct voxels of a grid in random order, counts[i] of sample i -> coords (N, 4)."""
    g = torch.Generator().manual_seed(seed)
    everywhere = torch.cartesian_prod(*[torch.arange(side)] * 3)
    chosen = [everywhere[torch.randperm(side**3, generator=g)[:n]] for n in counts]
    return torch.cat([F.pad(c, (1, 0), value=i) for i, c in enumerate(chosen)])


def inputs(cls, config=None, counts=(40, 90, 7), seed=1):
    """Arguments of a call, by name."""
    c, g, B = config or CLASSES[cls], torch.Generator().manual_seed(seed), len(counts)
    call = dict(
        t=torch.rand(B, generator=g), tokens=torch.randn(B, 5, c["cond_channels"], generator=g)
    )
    if cls is SparseStructureFlowModel:
        return dict(call, x=torch.randn(B, c["in_channels"], *[c["resolution"]] * 3, generator=g))
    x = torch.randn(sum(counts), c["in_channels"], generator=g)
    return dict(call, x=x, coords=points(counts, c["resolution"]))


def network(cls, config=None):
    """A network with weights that hide nothing. gamma, which fill does not know, is around 1."""
    net = fill(cls(**(config or CLASSES[cls])))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("gamma"):
                p.add_(1)
    return net


# ---- the second implementation -------------------------------------------------------------------


def normed(x, w=None, b=None, eps=1e-6):
    """Layer norm over the last axis."""
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps) ** 0.5
    return y if w is None else y * w + b


def line(W, name, x):
    return x @ W[name + ".weight"].T + W[name + ".bias"]


def heads_of(W, name, x, gamma, H, norm):
    """x (n, D) -> (H, n, D / H), each head scaled to norm sqrt(D / H), times gamma."""
    x = x.view(len(x), H, -1).transpose(0, 1)
    if not norm:
        return x
    unit = x / (x * x).sum(-1, keepdim=True).sqrt()
    return unit * W[f"{name}.{gamma}.gamma"][:, None] * x.shape[-1] ** 0.5


def mixed(W, name, x, context, H, norm):
    """Attention of one sample, x (n, D)."""
    if context is None:
        D, qkv = x.shape[1], line(W, name + ".to_qkv", x)
        q, k, v = (qkv[:, i * D : (i + 1) * D] for i in range(3))
    else:
        q, kv = line(W, name + ".to_q", x), line(W, name + ".to_kv", context)
        k, v = kv[:, : x.shape[1]], kv[:, x.shape[1] :]
    q = heads_of(W, name, q, "q_rms_norm", H, norm)
    k = heads_of(W, name, k, "k_rms_norm", H, norm)
    v = heads_of(W, name, v, "", H, False)
    p = torch.softmax(torch.einsum("hnd,hmd->hnm", q, k) / q.shape[-1] ** 0.5, -1)
    return line(W, name + ".to_out", torch.einsum("hnm,hmd->nhd", p, v).reshape(len(x), -1))


def torso(W, c, h, tokens, time):
    """The blocks on one sample, h (n, D), time (D,)."""
    H = c.get("num_heads") or c["model_channels"] // c["num_head_channels"]
    for i in range(c["num_blocks"]):
        b = f"blocks.{i}"
        sh, sc, g, sh2, sc2, g2 = line(W, b + ".adaLN_modulation.1", F.silu(time)).view(6, -1)
        h = h + g * mixed(W, b + ".self_attn", normed(h) * (1 + sc) + sh, None, H, c["qk_rms_norm"])
        z = normed(h, W[b + ".norm2.weight"], W[b + ".norm2.bias"])
        h = h + mixed(W, b + ".cross_attn", z, tokens, H, c.get("qk_rms_norm_cross"))
        z = F.gelu(line(W, b + ".mlp.mlp.0", normed(h) * (1 + sc2) + sh2), approximate="tanh")
        h = h + g2 * line(W, b + ".mlp.mlp.2", z)
    return h


def time_of(W, t):
    """One t -> (D,)."""
    # float32, as in TRELLIS: the rounding of a frequency shows when it is multiplied by 1000.
    angle = 1000 * t * torch.exp(torch.arange(128) * (-math.log(10000) / 128))
    z = torch.cat([torch.cos(angle), torch.sin(angle)]).to(W["out_layer.weight"].dtype)
    return line(W, "t_embedder.mlp.2", F.silu(line(W, "t_embedder.mlp.0", z)))


def place_of(xyz, D):
    """One place -> (D,)."""
    f = D // 3 // 2
    waves = [fn(v / 10000 ** (i / f)) for v in xyz for fn in (math.sin, math.cos) for i in range(f)]
    return torch.tensor(waves + [0.0] * (D - len(waves)))


def plain_ss(W, c, x, t, tokens):
    p, R, rows = c["patch_size"], c["resolution"], []
    for x1, t1, k1 in zip(x, t, tokens, strict=True):
        cells = [(i, j, k) for i in range(R // p) for j in range(R // p) for k in range(R // p)]
        at_cell = [(slice(None), *(slice(n * p, n * p + p) for n in cell)) for cell in cells]
        h = line(W, "input_layer", torch.stack([x1[cell].reshape(-1) for cell in at_cell]))
        h = h + torch.stack([place_of(cell, c["model_channels"]) for cell in cells])
        h = line(W, "out_layer", normed(torso(W, c, h, k1, time_of(W, t1)), eps=1e-5))
        y = torch.zeros(c["out_channels"], R, R, R, dtype=x.dtype)
        for cell, v in zip(at_cell, h, strict=True):
            y = y.clone()
            y[cell] = v.view(-1, p, p, p)
        rows.append(y)
    return torch.stack(rows)


def to_grid(x, xyz, R):
    """(n, C), (n, 3) -> (1, C, R, R, R), zero elsewhere."""
    grid = torch.zeros(R, R, R, x.shape[1], dtype=x.dtype).index_put(tuple(xyz.T), x)
    return grid.permute(3, 0, 1, 2)[None]


def at(grid, xyz):
    return grid[0][:, xyz[:, 0], xyz[:, 1], xyz[:, 2]].T


def sparse_conv(W, name, x, xyz, R):
    kernel = W[name + ".weight"].permute(0, 4, 1, 2, 3)
    return at(F.conv3d(to_grid(x, xyz, R), kernel, W[name + ".bias"], padding=1), xyz)


def sparse_res(W, name, x, xyz, R, time):
    scale, shift = line(W, name + ".emb_layers.1", F.silu(time)).view(2, -1)
    h = F.silu(normed(x, W[name + ".norm1.weight"], W[name + ".norm1.bias"]))
    h = sparse_conv(W, name + ".conv1.conv", h, xyz, R)
    h = sparse_conv(W, name + ".conv2.conv", F.silu(normed(h) * (1 + scale) + shift), xyz, R)
    if name + ".skip_connection.weight" in W:
        x = line(W, name + ".skip_connection", x)
    return h + x


def plain_slat(W, c, x, t, tokens, coords):
    out = torch.zeros(len(x), c["out_channels"], dtype=x.dtype)
    stages, more = len(c["io_block_channels"]), c.get("num_io_res_blocks", 2) - 1
    join = c.get("use_skip_connection", True)
    for b in range(len(t)):
        mine = (coords[:, 0] == b).nonzero()[:, 0]
        time, R, block, skips, levels = time_of(W, t[b]), c["resolution"], 0, [], []
        xyz, h = coords[mine, 1:], line(W, "input_layer", x[mine])
        for _ in range(stages):
            for _ in range(more):
                h = sparse_res(W, f"input_blocks.{block}", h, xyz, R, time)
                block += 1
                skips.append(h)
            code = (xyz // 2) @ torch.tensor([R * R, R, 1])
            code, parent = code.unique(return_inverse=True)
            levels.append((xyz, R, parent))
            # What TRELLIS calls the mean includes the zero that it starts from.
            start, index = torch.zeros(len(code), h.shape[1], dtype=h.dtype), parent[:, None]
            index = index.expand(-1, h.shape[1])
            h = start.scatter_reduce(0, index, h, "mean", include_self=True)
            xyz, R = torch.stack([code // (R * R), code // R % R, code % R], 1), R // 2
            h = sparse_res(W, f"input_blocks.{block}", h, xyz, R, time)
            block += 1
            skips.append(h)
        h = h + torch.stack([place_of(p, c["model_channels"]) for p in xyz.tolist()])
        h, block = torso(W, c, h, tokens[b], time), 0
        for xyz, R, parent in levels[::-1]:
            for up in range(more + 1):
                h = torch.cat([h, skips.pop()], 1) if join else h
                h = h[parent] if up == 0 else h
                h = sparse_res(W, f"out_blocks.{block}", h, xyz, R, time)
                block += 1
        out = out.index_put((mine,), line(W, "out_layer", normed(h, eps=1e-5)))
    return out


def channel_norm(W, name, x):
    last = x.permute(0, 2, 3, 4, 1)
    return normed(last, W[name + ".weight"], W[name + ".bias"], 1e-5).permute(0, 4, 1, 2, 3)


def conv(W, name, x, **k):
    return F.conv3d(x, W[name + ".weight"], W[name + ".bias"], **{"padding": 1, **k})


def dense_res(W, name, x):
    h = conv(W, name + ".conv1", F.silu(channel_norm(W, name + ".norm1", x)))
    return x + conv(W, name + ".conv2", F.silu(channel_norm(W, name + ".norm2", h)))


def plain_encoder(W, c, x):
    h = conv(W, "input_layer", x)
    for i, kind in enumerate("rrdrrdrr"):
        if kind == "r":
            h = dense_res(W, f"blocks.{i}", h)
        else:
            h = conv(W, f"blocks.{i}.conv", h, stride=2, padding=0)
    for i in range(2):
        h = dense_res(W, f"middle_block.{i}", h)
    h = conv(W, "out_layer.2", F.silu(channel_norm(W, "out_layer.0", h)))
    return h[:, : c["latent_channels"]]


def plain_decoder(W, c, x):
    h = conv(W, "input_layer", x)
    for i in range(2):
        h = dense_res(W, f"middle_block.{i}", h)
    for i, kind in enumerate("rrurrurr"):
        if kind == "r":
            h = dense_res(W, f"blocks.{i}", h)
        else:
            z = conv(W, f"blocks.{i}.conv", h)
            h = torch.zeros(len(z), z.shape[1] // 8, *(2 * s for s in z.shape[2:]), dtype=z.dtype)
            for k in range(8):  # channel 8 * C' + 4 a + 2 b + c becomes the child (a, b, c)
                h = h.clone()
                h[:, :, k // 4 :: 2, k // 2 % 2 :: 2, k % 2 :: 2] = z[:, k::8]
    return conv(W, "out_layer.2", F.silu(channel_norm(W, "out_layer.0", h)))


def errors_of(net, plain, call, dtype):
    """Relative errors between both implementations, by name: output, gradients of float inputs and
    of every parameter."""
    net.to(dtype).zero_grad()
    leaves = [dict(call), dict(call)]
    floats = [k for k in call if k in ("x", "tokens")]
    for k in floats:
        for leaf in leaves:
            leaf[k] = call[k].to(dtype, copy=True).requires_grad_()
    W = {k: v.detach().clone().requires_grad_() for k, v in net.state_dict().items()}
    out, want = net(**leaves[0]), plain(W, net.config, **leaves[1])
    assert out.shape == want.shape and out.dtype == dtype
    assert want.std() > 0.1  # a dead network would agree with anything
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    return {
        "out": relative(out, want),
        **{k: relative(leaves[0][k].grad, leaves[1][k].grad) for k in floats},
        **{name: relative(p.grad, W[name].grad) for name, p in net.named_parameters()},
    }


def compare(net, plain, call):
    """float32: output and gradients of the inputs within 1e-5, of parameters, which are sums over
    many points, within 1e-4. float64: all within 1e-6, because features of time and place are
    float32."""
    low, high = (errors_of(net, plain, call, dtype) for dtype in (torch.float32, torch.float64))
    ends = {k: e for k, e in low.items() if k in ("out", *call)}
    text = " ".join(f"{k} {e:.1e}" for k, e in ends.items())
    largest = f"parameters {max(low.values()):.1e}, float64 {max(high.values()):.1e}"
    print(f"{type(net).__name__}: float32 {text}, {largest}")
    assert max(ends.values()) <= 1e-5 and max(low.values()) <= 1e-4, low
    assert max(high.values()) <= 1e-6, high


# ---- the same function ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(patch_size=2, mlp_ratio=3),
        dict(qk_rms_norm_cross=True, in_channels=2, out_channels=4),
        dict(qk_rms_norm=False, num_heads=None, num_head_channels=8),
        dict(model_channels=20, num_blocks=1),
    ],
    ids=["plain", "patch_2", "cross_norm", "no_norm", "odd_width"],
)
def test_structure_flow_is_the_plain_one(changes):
    config, cls = {**SS, **changes}, SparseStructureFlowModel
    compare(network(cls, config), plain_ss, inputs(cls, config))


@pytest.mark.parametrize(
    "changes, counts",
    [
        ({}, (40, 90, 7)),
        ({}, (512, 1)),
        (
            dict(qk_rms_norm_cross=True, in_channels=2, out_channels=4, num_io_res_blocks=3),
            (30, 30),
        ),
        (dict(num_io_res_blocks=1, use_skip_connection=False), (25,)),
        (dict(patch_size=4, io_block_channels=[6, 12], num_blocks=1), (60, 20)),
    ],
    ids=["plain", "full_and_one_point", "three_res_blocks", "no_skip", "two_halvings"],
)
def test_latent_flow_is_the_plain_one(changes, counts):
    config = {**SLAT, **changes}
    compare(network(SLatFlowModel, config), plain_slat, inputs(SLatFlowModel, config, counts))


def test_encoder_and_decoder_are_the_plain_ones():
    """The encoder gives the mean of the posterior: half of the last layer has no gradient."""
    x = (torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    z = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    cases = (
        (SparseStructureEncoder, plain_encoder, x, [True] * 3 + [False] * 3),
        (SparseStructureDecoder, plain_decoder, z, [True]),
    )
    for cls, plain, call, rows in cases:
        net = network(cls)
        compare(net, plain, {"x": call})
        used = net.out_layer[2].weight.grad.flatten(1).abs().sum(1) > 0
        assert used.tolist() == rows


def test_occupied_voxels_become_points():
    logits = torch.full((2, 1, 3, 4, 5), -1.0)
    logits[0, 0, 2, 3, 4] = logits[1, 0, 0, 1, 0] = logits[1, 0, 0, 1, 3] = 0.5
    logits[0, 0, 0, 0, 0] = 0.0
    assert occupied(logits).tolist() == [[0, 2, 3, 4], [1, 0, 1, 0], [1, 0, 1, 3]]


@pytest.mark.parametrize("count", [64, 23, 1])
def test_submanifold_convolution_is_the_dense_one_on_occupied_voxels(count):
    """Empty voxels count as zero and have no output. Two samples do not see each other."""
    xyz = points([count, count], 4)
    layer, g = trellis.SubmanifoldConv(3, 5), torch.Generator().manual_seed(0)
    x = torch.randn(2 * count, 3, generator=g).requires_grad_()
    dense = torch.zeros(2, 4, 4, 4, 3).index_put(tuple(xyz.T), x).permute(0, 4, 1, 2, 3)
    want = F.conv3d(dense, layer.weight.permute(0, 4, 1, 2, 3), layer.bias, padding=1)
    want = want.permute(0, 2, 3, 4, 1)[tuple(xyz.T)]
    out = layer(x, trellis.make_grid(xyz, 4).neighbours)
    weight = torch.randn(2 * count, 5, generator=g)
    leaves = [x, layer.weight, layer.bias]
    got, expected = (torch.autograd.grad((y * weight).sum(), leaves) for y in (out, want))
    pairs = zip([out, *got], [want, *expected], strict=True)
    assert max(relative(a, b) for a, b in pairs) <= 1e-5


def test_neighbours_are_found_by_place():
    coords = points([30, 50], 5)
    where = {tuple(c): i for i, c in enumerate(coords.tolist())}
    steps = [(i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]
    want = [
        [where.get((b, x + i, y + j, z + k), 80) for b, x, y, z in coords.tolist()]
        for i, j, k in steps
    ]
    assert trellis.make_grid(coords, 5).neighbours.tolist() == want


def test_names_shapes_and_counts_of_the_released_sizes():
    """TRELLIS's own: 559,737,864 and 600,432,520 values."""
    D, blocks = 1024, {}
    for i in range(24):
        lines = {
            "self_attn.to_qkv": (3 * D, D),
            "self_attn.to_out": (D, D),
            "cross_attn.to_q": (D, D),
            "cross_attn.to_kv": (2 * D, D),
            "cross_attn.to_out": (D, D),
            "mlp.mlp.0": (4 * D, D),
            "mlp.mlp.2": (D, 4 * D),
            "adaLN_modulation.1": (6 * D, D),
        }
        for name, shape in lines.items():
            blocks |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        blocks |= {f"blocks.{i}.norm2.weight": (D,), f"blocks.{i}.norm2.bias": (D,)}
        blocks |= {f"blocks.{i}.self_attn.{n}_rms_norm.gamma": (16, 64) for n in "qk"}
    for i, shape in ((0, (D, 256)), (2, (D, D))):
        blocks |= {f"t_embedder.mlp.{i}.weight": shape, f"t_embedder.mlp.{i}.bias": (D,)}
    ss = {
        **blocks,
        "pos_emb": (4096, D),
        "input_layer.weight": (D, 8),
        "input_layer.bias": (D,),
        "out_layer.weight": (8, D),
        "out_layer.bias": (8,),
    }
    slat = {
        **blocks,
        "input_layer.weight": (128, 8),
        "input_layer.bias": (128,),
        "out_layer.weight": (8, 128),
        "out_layer.bias": (8,),
    }
    for name, a, b in (
        ("input_blocks.0", 128, 128),
        ("input_blocks.1", 128, D),
        ("out_blocks.0", 2 * D, 128),
        ("out_blocks.1", 256, 128),
    ):
        slat |= {
            f"{name}.norm1.weight": (a,),
            f"{name}.norm1.bias": (a,),
            f"{name}.emb_layers.1.weight": (2 * b, D),
            f"{name}.emb_layers.1.bias": (2 * b,),
            f"{name}.conv1.conv.weight": (b, 3, 3, 3, a),
            f"{name}.conv1.conv.bias": (b,),
            f"{name}.conv2.conv.weight": (b, 3, 3, 3, b),
            f"{name}.conv2.conv.bias": (b,),
        }
        if a != b:
            slat |= {f"{name}.skip_connection.weight": (b, a), f"{name}.skip_connection.bias": (b,)}
    cases = (
        (SparseStructureFlowModel, SS_FLOW_L, 559_737_864, 489),
        (SLatFlowModel, SLAT_FLOW_L, 600_432_520, 526),
        (SparseStructureEncoder, SS_ENCODER, 59_298_192, 74),
        (SparseStructureDecoder, SS_DECODER, 73_671_201, 74),
    )
    for (cls, config, values, keys), want in zip(cases, (ss, slat, None, None), strict=True):
        with torch.device("meta"):
            net = cls(**config)
        shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
        assert (sum(math.prod(s) for s in shapes.values()), len(shapes)) == (values, keys)
        assert want is None or shapes == want
        assert config.items() <= net.config.items()
        assert net.config == json.loads(json.dumps(net.config))
    assert shapes["blocks.2.conv.weight"] == (1024, 512, 3, 3, 3)
    assert shapes["out_layer.0.weight"] == (32,)


# ---- sparse batches ------------------------------------------------------------------------------


def test_a_ragged_batch_is_each_sample_alone():
    net, call = network(SLatFlowModel), inputs(SLatFlowModel)
    with torch.no_grad():
        out = net(**call)
        for i in range(3):
            mine = call["coords"][:, 0] == i
            alone = dict(
                x=call["x"][mine],
                t=call["t"][i : i + 1],
                tokens=call["tokens"][i : i + 1],
                coords=call["coords"][mine] * torch.tensor([0, 1, 1, 1]),
            )
            assert relative(net(**alone), out[mine]) <= 1e-5
        other = {
            **call,
            "t": call["t"].clone().index_fill_(0, torch.tensor([1]), 0.9),
            "tokens": call["tokens"] * torch.tensor([1.0, -1, 1])[:, None, None],
        }
        changed = (net(**other) - out).abs().amax(dim=1) > 1e-3
        assert torch.equal(changed, call["coords"][:, 0] == 1)


def test_order_of_points_does_not_matter():
    """Nor the order of samples among them."""
    net, call = network(SLatFlowModel), inputs(SLatFlowModel)
    order = torch.randperm(len(call["x"]), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        other = {**call, "x": call["x"][order], "coords": call["coords"][order].int()}
        out, same = net(**call), net(**other)
        features, same_features = (net(**c, return_features=True) for c in (call, other))
    assert relative(same, out[order]) <= 1e-5 and relative(same_features, features) <= 1e-5


def test_values_of_samples_reach_their_points_and_back():
    coords = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 2, 0, 0]], dtype=torch.int32)
    assert per_point(torch.tensor([5.0, 7.0]), coords).tolist() == [[7.0], [5.0], [7.0]]
    pairs = per_point(torch.tensor([[1.0, 2], [3, 4]]), coords)
    assert pairs.tolist() == [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]
    means = per_sample_mean(torch.tensor([[1.0, 3], [2, 4], [5, 7]]), coords, 2)
    assert means.tolist() == [3.0, 4.0]


# ---- what training relies on ---------------------------------------------------------------------


@flows
def test_forward_mode_derivative_is_that_of_finite_differences(monkeypatch, cls):
    """Along x and along t, in float64, without reverse mode, as a training script takes it."""

    # The network's own sinusoid is float32, too coarse for small differences of t.
    def exact_sinusoid(t, dim):
        angle = 1000 * t[:, None] * 10000.0 ** -(torch.arange(dim // 2, dtype=t.dtype) / (dim // 2))
        return torch.cat([angle.cos(), angle.sin()], dim=1)

    net = network(cls).double()
    call = {k: v.double() if v.is_floating_point() else v for k, v in inputs(cls).items()}
    x, t = call.pop("x"), call.pop("t").clamp(0.1, 0.9)
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4))
    rate = torch.tensor([1.0, 2.0, -1.0], dtype=x.dtype)

    def f(x, t):
        return net(x, t, **call)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        out, with_own = torch.func.jvp(f, (x, t), (v, rate))
        assert torch.equal(out, f(x, t))
        monkeypatch.setattr(trellis, "sinusoid", exact_sinusoid)
        assert relative(torch.func.jvp(f, (x, t), (v, rate))[1], with_own) < 1e-3
        for dx, dt in ((v, 0 * rate), (0 * v, rate), (v, rate)):
            h = 1e-6
            want = (f(x + h * dx, t + h * dt) - f(x - h * dx, t - h * dt)) / (2 * h)
            got = torch.func.jvp(f, (x, t), (dx, dt))[1]
            assert want.abs().max() > 0.1 and relative(got, want) < 1e-5


@flows
def test_gradient_checkpointing_gives_the_same_gradients(monkeypatch, cls):
    calls, original = [], trellis.checkpoint

    def checkpoint(*args, **keywords):
        calls.append(keywords)
        return original(*args, **keywords)

    monkeypatch.setattr(trellis, "checkpoint", checkpoint)
    net, call, gradients = network(cls), inputs(cls), []
    for net.gradient_checkpointing in (False, True):
        net.zero_grad()
        leaf = call["x"].clone().requires_grad_()
        net(**{**call, "x": leaf}).square().sum().backward()
        gradients.append([leaf.grad] + [p.grad.clone() for p in net.parameters()])
    assert calls == [{"use_reentrant": False}] * (3 if cls is SparseStructureFlowModel else 7)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    before = len(calls)
    with torch.no_grad():
        net(**call)
    assert len(calls) == before  # sampling does not checkpoint
    assert cls(**{**CLASSES[cls], "use_checkpoint": True}).gradient_checkpointing


@flows
def test_features_are_the_middle_block_s(cls):
    net, call, seen = network(cls), inputs(cls), []
    net.blocks[1].register_forward_hook(lambda block, args, out: seen.append(out))
    with torch.no_grad():
        net(**call)
        features = net(**call, return_features=True)
    want, shape = seen[0], (3, 64, 32)
    if cls is SLatFlowModel:  # without padding
        merged = torch.cat([call["coords"][:, :1], call["coords"][:, 1:] // 2], 1).unique(dim=0)
        want = torch.cat([want[i, : (merged[:, 0] == i).sum()] for i in range(3)])
        shape = (len(merged), 32)
    assert features.shape == shape and torch.equal(features, want)


@flows
def test_adapters_are_saved_and_loaded(cls, tmp_path):
    net, call = network(cls), inputs(cls)
    lora.add(net, "a", rank=2, alpha=3)
    with torch.no_grad():
        bare = net(**call)
        assert torch.equal(net(**call, adapter="a"), bare)
        for p in lora.parameters(net, "a"):
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5))
        out = net(**call, adapter="a")
        assert relative(out, bare) > 1e-2 and torch.equal(net(**call), bare)
        lora.save(net, "a", str(tmp_path / "a.safetensors"))
        other = network(cls)
        lora.load(other, "b", str(tmp_path / "a.safetensors"))
        assert relative(other(**call, adapter="b"), out) < 1e-5
    stored = load_file(tmp_path / "a.safetensors")
    assert len(stored) == 2 * 7 * 3
    assert stored["transformer.blocks.2.mlp.mlp.2.lora_A.weight"].shape == (2, 128)
    net(**call, adapter="a").square().sum().backward()
    assert all(p.grad.any() for p in lora.parameters(net, "a"))


@flows
def test_low_precision(cls):
    """bfloat16 weights and autocast stay near float32. What scales every token, and the places of
    tokens, lose no precision."""
    net, call = network(cls), inputs(cls)
    time = torch.randn(3, 32, generator=torch.Generator().manual_seed(6))

    def conditions():
        modulation = trellis.modulation(net.blocks[0].adaLN_modulation, time, 6)
        return [net.t_embedder(call["t"]), *modulation]

    def error(out):
        return ((out.float() - exact).norm() / exact.norm()).item()

    with torch.no_grad():
        exact, before = net(**call), conditions()
        with torch.autocast("cpu", torch.bfloat16):
            assert 0 < error(net(**call)) < 0.03
            assert all(torch.equal(a, b) for a, b in zip(before, conditions(), strict=True))
        for p in net.parameters():
            p.data = p.data.bfloat16()
        low = net(**{**call, "x": call["x"].bfloat16(), "tokens": call["tokens"].bfloat16()})
        assert low.dtype == torch.bfloat16 and 0 < error(low) < 0.05
        assert net(**call).dtype == torch.float32


@pytest.mark.parametrize(
    "cls, facts",
    [
        (SparseStructureFlowModel, ("flow_v", 3.0, (8, 16, 16, 16), ("tokens",))),
        (SLatFlowModel, ("flow_v", 3.0, (8, 64, 64, 64), ("tokens",))),
    ],
)
def test_class_facts(cls, facts):
    assert (cls.prediction, cls.default_shift, cls.latent_shape, cls.cond_names) == facts
    c = CLASSES[cls]
    assert cls(**c).latent_shape == (3, *[c["resolution"]] * 3)
    assert NETWORKS["ElasticSLatFlowModel"] is SLatFlowModel
    # fmt: off
    assert [round(m, 5) for m in trellis.SLAT_MEAN] == [
        -2.16875, -0.00435, -0.13352, -0.08418, -0.52712, 0.72387, -1.14145, 1.20394,
    ]
    assert [round(s, 5) for s in trellis.SLAT_STD] == [
        2.37765, 2.38638, 2.12442, 2.17486, 2.66394, 2.37119, 2.62174, 2.68452,
    ]
    # fmt: on


COORDS = points((40, 90, 7), 8)


@pytest.mark.parametrize(
    "cls, change, message",
    [
        *(
            (cls, *case)
            for cls in (SparseStructureFlowModel, SLatFlowModel)
            for case in [
                (dict(t=torch.tensor(0.5)), r"pass floats in \[0, 1\] of shape \(3,\)"),
                (dict(t=torch.tensor([1, 500, 999])), "torch.int64"),
                (
                    dict(tokens=torch.zeros(3, 5, 11)),
                    r"tokens has shape \(3, 5, 11\); pass \(B, L, 10\)",
                ),
                (dict(tokens=torch.zeros(3, 10)), r"pass \(B, L, 10\)"),
                (dict(tokens=torch.zeros(2, 5, 10)), r"of shape \(2,\)"),
                (dict(adapter="a"), "no adapter is called 'a'"),
            ]
        ),
        (
            SparseStructureFlowModel,
            dict(x=torch.zeros(3, 3, 4, 4, 5)),
            r"x has shape \(3, 3, 4, 4, 5\); pass \(3, 3, 4, 4, 4\)",
        ),
        (SparseStructureFlowModel, dict(x=torch.zeros(2, 3, 4, 4, 4)), r"pass \(3, 3, 4, 4, 4\)"),
        (
            SLatFlowModel,
            dict(coords=None),
            "coords is missing; pass the points of the sparse structure",
        ),
        (
            SLatFlowModel,
            dict(x=torch.zeros(137, 4)),
            r"x has shape \(137, 4\); pass the points of all samples, \(N, 3\)",
        ),
        (SLatFlowModel, dict(x=torch.zeros(0, 3), coords=COORDS[:0]), r"x has shape \(0, 3\)"),
        (
            SLatFlowModel,
            dict(coords=COORDS[:, 1:]),
            r"coords is torch.int64 \(137, 3\); pass integers of shape \(137, 4\)",
        ),
        (SLatFlowModel, dict(coords=COORDS.float()), "coords is torch.float32"),
        (SLatFlowModel, dict(coords=COORDS[:-1]), r"\(136, 4\)"),
        (
            SLatFlowModel,
            dict(coords=COORDS + torch.tensor([0, 0, 0, 1])),
            r"coords go from .* to .*x, y, z within 0..7",
        ),
        (SLatFlowModel, dict(coords=COORDS - torch.tensor([0, 0, 1, 0])), "x, y, z within 0..7"),
        (
            SLatFlowModel,
            dict(coords=COORDS + torch.tensor([1, 0, 0, 0])),
            "samples must be within 0..2",
        ),
        (
            SLatFlowModel,
            dict(coords=COORDS.clone().index_fill_(0, torch.tensor([4, 9]), 0)),
            "two points of a sample have the same coordinates",
        ),
        (
            SLatFlowModel,
            dict(t=torch.rand(4), tokens=torch.zeros(4, 5, 10)),
            "sample 3 of the batch has no points",
        ),
    ],
)
def test_wrong_inputs_are_named(cls, change, message):
    with pytest.raises(ValueError, match=message) as error:
        cls(**CLASSES[cls])(**{**inputs(cls), **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "cls, change, message",
    [
        *(
            (cls, *case)
            for cls in (SparseStructureFlowModel, SLatFlowModel)
            for case in [
                (
                    dict(pe_mode="rope"),
                    "pe_mode = 'rope' is not implemented; TRELLIS's released networks have 'ape'",
                ),
                (dict(share_mod=True), "share_mod = True"),
                (dict(num_heads=5), "model_channels = 32 does not divide into 5 heads"),
                (dict(resolution=5, patch_size=2), "resolution = 5 does not divide"),
            ]
        ),
        (
            SLatFlowModel,
            dict(io_block_channels=None),
            "io_block_channels = None with patch_size = 2",
        ),
        (
            SLatFlowModel,
            dict(io_block_channels=[8, 8]),
            r"io_block_channels = \[8, 8\] with patch_size = 2",
        ),
        (SparseStructureEncoder, dict(norm_type="group"), "norm_type = 'group'"),
        (SparseStructureDecoder, dict(norm_type="group"), "norm_type = 'group'"),
    ],
)
def test_wrong_configs_are_named(cls, change, message):
    with pytest.raises(ValueError, match=message) as error:
        cls(**{**CLASSES[cls], **change})
    assert "\n" not in str(error.value)


# ---- pipeline.json -------------------------------------------------------------------------------


def trellis_euler(net, noise, cond, uncond, steps, cfg_strength, cfg_interval, rescale_t):
    """TRELLIS's Euler sampler, written from its mathematics, with the params of pipeline.json.

    u = 1, ..., 0 in equal steps, t = r u / (1 + (r - 1) u). x moves by -(t - s) v. The path's
    sigma_min, x_t = (1 - t) x_0 + (sigma_min + (1 - sigma_min) t) eps, enters its predictions of
    x_0 alone, and not x.  -> x_0, the number of network calls.
    """
    u = np.linspace(1, 0, steps + 1)
    t, x, calls = rescale_t * u / (1 + (rescale_t - 1) * u), noise, 0
    samples = len(next(iter(cond.values())))
    for above, below in zip(t[:-1], t[1:], strict=True):
        clock = torch.full((samples,), 1000 * float(above)) / 1000  # what ours multiply by 1000
        with torch.no_grad():
            v, calls = net(x, clock, **cond), calls + 1
            if cfg_interval[0] <= above <= cfg_interval[1]:
                negative, calls = net(x, clock, **uncond), calls + 1
                v = (1 + cfg_strength) * v - cfg_strength * negative
        x = x - float(above - below) * v
    return x, calls


@pytest.mark.parametrize("scale", [1, 1.1, 6])
@flows
def test_pipeline_entry_is_of_the_stage_and_of_our_grid(cls, scale):
    """The path and the sampler of one stage, under TRELLIS's names; no second call unguided."""
    entry = pipeline_entry(network(cls), "ckpts/student", 2, 1.0, scale)
    stage = "sparse_structure" if cls is SparseStructureFlowModel else "slat"
    assert entry.pop("models") == {f"{stage}_flow_model": "ckpts/student"}
    sampler = entry.pop(f"{stage}_sampler")
    assert not entry and sampler["name"] == "FlowEulerGuidanceIntervalSampler"
    params = sampler["params"]
    assert sampler["args"] == {"sigma_min": 1e-5} and params["cfg_strength"] == round(scale - 1, 3)
    assert (params["steps"], params["rescale_t"]) == (2, 1.0)
    low, high = params["cfg_interval"]
    assert all((low <= t <= high) is (scale != 1) for t in (1.0, 0.5, 0.0))


# ---- files ---------------------------------------------------------------------------------------


def half(tensors):
    """As TRELLIS stores a network: float16 only in layers of the blocks, other than norms."""

    def halved(key):
        return "norm" not in key and ("blocks." in key or "middle_block" in key)

    return {k: v.half() if halved(k) else v for k, v in tensors.items()}


def save_root(root, classes=CLASSES):
    """Write a TRELLIS root: pipeline.json, and each network under ckpts/. -> {class: path without
    suffix}."""
    (root / "ckpts").mkdir(exist_ok=True)
    paths = {}
    for cls, config in classes.items():
        paths[cls] = str(root / "ckpts" / f"{cls.__name__.lower()}_fp16")
        name = "ElasticSLatFlowModel" if cls is SLatFlowModel else cls.__name__
        save_json({"name": name, "args": {**config, "use_fp16": True}}, paths[cls] + ".json")
        save_file(half(network(cls, config).state_dict()), paths[cls] + ".safetensors")
    models = {cls.__name__: f"ckpts/{cls.__name__.lower()}_fp16" for cls in classes}
    pipeline = {"name": "TrellisImageTo3DPipeline", "args": {"models": models}}
    save_json(pipeline, str(root / "pipeline.json"))
    return paths


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_files_load(tmp_path, cls, dtype):
    """By their path with or without suffix. Fixed features of places keep float32."""
    path, want = save_root(tmp_path, {cls: CLASSES[cls]})[cls], half(network(cls).state_dict())
    assert {v.dtype for v in want.values()} == {torch.float16, torch.float32}
    for source in (path, path + ".json", path + ".safetensors", str(tmp_path / "ckpts")):
        net, config = load_network(source, dtype)
        assert config == load_json(path + ".json") and not net.training
        assert config["args"].items() <= net.config.items()
        for k, v in net.state_dict().items():
            assert v.dtype == (torch.float32 if k == "pos_emb" else dtype)
            assert torch.equal(v, want[k].to(v.dtype))
    if hasattr(net, "prediction"):
        call, exact = inputs(cls), network(cls)
        with torch.no_grad():
            assert relative(net(**call), exact(**call)) < (2e-2 if dtype is torch.float32 else 0.1)


@each
def test_what_we_save_is_read_back_and_keeps_the_layout(tmp_path, cls):
    """CLASS.json with no key added, and CLASS.safetensors with exactly the network's tensors,
    without adapters."""
    net, config = load_network(save_root(tmp_path, {cls: CLASSES[cls]})[cls])
    if hasattr(net, "lora_targets"):
        lora.add(net, "a", rank=1, alpha=1)
    folder = tmp_path / "student"
    save_network(net, config, str(folder))
    name = config["name"]
    assert sorted(p.name for p in folder.iterdir()) == [f"{name}.json", f"{name}.safetensors"]
    assert load_json(str(folder / f"{name}.json")) == config and set(config) == {"name", "args"}
    assert set(load_file(folder / f"{name}.safetensors")) == set(cls(**CLASSES[cls]).state_dict())
    for source in (str(folder), str(folder / name)):
        again, config_again = load_network(source)
        assert config_again == config
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())
        assert weights_hash(source) == weights_hash(str(folder))
    assert network_config(again) == {"name": cls.__name__, "args": again.config}


@pytest.mark.parametrize(
    "how, message",
    [
        ("no json", "is a file of weights without a description"),
        ("no weights", "ss_fp16.safetensors does not exist"),
        ("truncated", "truncated or not a safetensors file"),
        ("pickle", "is a pickle, not safetensors"),
        ("pt beside json", "only a pickle (ss_fp16.pt); pickles can run code and are never loaded"),
        ("broken json", "is not readable JSON"),
        ("list", "is not a JSON object"),
        ("class", "unknown network class 'SLatRadianceFieldDecoder'"),
        ("no args", "unknown network class None"),
        ("args no dict", "does not describe a SparseStructureFlowModel"),
        ("unknown key", "unexpected keyword argument 'depth'"),
        ("no key", "missing 1 required positional argument: 'resolution'"),
        ("rope", "pe_mode = 'rope' is not implemented"),
        ("width", "has shape (192,), ss_fp16.json asks for (288,)"),
        (
            "more blocks",
            "lacks 'blocks.3.adaLN_modulation.1.bias' and 19 more tensors: "
            "the checkpoint does not match its ss_fp16.json",
        ),
        (
            "fewer blocks",
            "has 'blocks.2.adaLN_modulation.1.bias', "
            "which a SparseStructureFlowModel of this ss_fp16.json does not",
        ),
        ("nothing", "is not a folder"),
        (
            "two pairs",
            "has no config.json: "
            "give the folder of one network (slat_fp16, ss_fp16 in it are such)",
        ),
        (
            "root",
            "is a TRELLIS root of several networks: "
            "give the path of one (ckpts/slat_fp16, ckpts/ss_fp16 in it are such)",
        ),
    ],
)
def test_bad_files_end_in_one_line(tmp_path, how, message):
    (tmp_path / "ckpts").mkdir()
    path = str(tmp_path / "ckpts" / "ss_fp16")
    config = {"name": "SparseStructureFlowModel", "args": dict(SS, use_fp16=True)}
    weights = half(network(SparseStructureFlowModel).state_dict())
    changes = {
        "rope": dict(pe_mode="rope"),
        "unknown key": dict(depth=3),
        "more blocks": dict(num_blocks=4),
        "fewer blocks": dict(num_blocks=2),
    }
    config["args"] |= changes.get(how, {})
    if how == "no key":
        del config["args"]["resolution"]
    elif how == "class":
        config["name"] = "SLatRadianceFieldDecoder"
    elif how == "no args":
        del config["args"]
    elif how == "args no dict":
        config["args"] = [3]
    elif how == "width":
        config["args"]["model_channels"] = 48
    save_json(config, path + ".json")
    save_file(weights, path + ".safetensors")
    text, source = open(path + ".json").read(), path
    if how in ("no json", "no weights", "pt beside json", "nothing"):
        missing = {"no json": [".json"], "nothing": [".json", ".safetensors"]}
        for suffix in missing.get(how, [".safetensors"]):
            (tmp_path / "ckpts" / f"ss_fp16{suffix}").unlink()
        if how == "pt beside json":
            torch.save(weights, path + ".pt")
    elif how == "truncated":
        data = open(path + ".safetensors", "rb").read()
        open(path + ".safetensors", "wb").write(data[: len(data) // 2])
    elif how == "pickle":
        torch.save(weights, path + ".safetensors")
    elif how in ("broken json", "list"):
        open(path + ".json", "w").write(text[:-4] if how == "broken json" else "[1]")
    elif how in ("two pairs", "root"):
        for suffix in (".json", ".safetensors"):
            shutil.copyfile(path + suffix, tmp_path / "ckpts" / f"slat_fp16{suffix}")
        source = str(tmp_path / "ckpts") if how == "two pairs" else str(tmp_path)
        save_json({"args": {"models": {}}}, str(tmp_path / "pipeline.json"))
    with pytest.raises(UserError) as error:
        load_network(source)
    assert message in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_a_component_is_a_teacher(tmp_path):
    paths = save_root(tmp_path)
    for cls in (SparseStructureFlowModel, SLatFlowModel):
        teacher = load_teacher(paths[cls])
        assert isinstance(teacher.schedule, Flow) and isinstance(teacher.net, cls)
        assert (teacher.prediction, teacher.shift) == ("flow_v", 3.0)
        assert teacher.world_name is None and teacher.folder == paths[cls]
        assert teacher.label == f"{cls.__name__.lower()}_fp16"
        assert not is_small(paths[cls])
        teacher.base, args = (
            teacher.net,
            types.SimpleNamespace(student_init=paths[cls], lora_rank=0),
        )
        student = starting_network(alone(args), teacher)
        assert student.config == teacher.net.config and student is not teacher.net
    for source, message in (
        (paths[SparseStructureDecoder], "SparseStructureDecoder, which does not denoise"),
        (str(tmp_path), "is a TRELLIS root"),
        (str(tmp_path / "ckpts" / "missing"), "neither an embedded world"),
    ):
        with pytest.raises(UserError, match=message):
            load_teacher(source)


def test_a_run_leaves_a_student_in_the_same_layout(tmp_path, capsys):
    """The first stage is dense: a script for images distils it, conditioned on tokens from a file
    as encode writes it. It refuses the second stage."""
    path = save_root(tmp_path)[SparseStructureFlowModel]
    tokens = str(tmp_path / "tokens.safetensors")
    cond = torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(0)).half()
    save_file({"cond.tokens": cond, "uncond.tokens": torch.zeros(1, 5, 10).half()}, tokens)
    flags = f"--prompts {tokens} --teacher_steps 2 --preview_samples 2 --student_steps 2 "
    flags += "--learning_rate 1e-4 --learning_rate_fake 2e-4 --max_train_steps 2 "
    flags = (flags + "--train_batch_size 2 --guidance_scale 2").split()
    dmd.main([*flags, "--teacher", path, "--output_dir", str(tmp_path / "run")])
    folder, name = tmp_path / "run" / "student", "SparseStructureFlowModel"
    files = [f"{name}.json", f"{name}.safetensors", "sampler.json"]
    assert sorted(p.name for p in folder.iterdir()) == files
    assert load_json(str(folder / files[0])) == load_json(path + ".json")
    student, start = (load_network(p)[0].state_dict() for p in (str(folder), path))
    moved = {k for k, v in student.items() if not torch.equal(v, start[k])}
    assert moved == set(student) - {"pos_emb"} and len(read_log(tmp_path / "run")) == 2
    assert load_teacher(str(tmp_path / "run")).shift == 3.0
    second = ["--teacher", save_root(tmp_path)[SLatFlowModel], "--output_dir"]
    message = refusal_of(capsys, dmd.main, *flags, *second, str(tmp_path / "slat"))
    assert "coords is missing" in message and not (tmp_path / "slat").exists()
    flags = ["--sample", str(folder), "--prompts", tokens, "--preview_samples", "2"]
    dmd.main([*flags, "--output_dir", str(tmp_path / "drawn")])
    assert load_file(tmp_path / "drawn" / "samples.safetensors")["x0"].shape == (2, 3, 4, 4, 4)


# ---- data ----------------------------------------------------------------------------------------


def sparse_file(path, **change):
    """Three samples of 4, 1 and 6 points."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "coords": points((4, 1, 6), 8)[:, 1:].to(torch.int16).contiguous(),
        "feats": torch.randn(11, 3, generator=g).half(),
        "offsets": torch.tensor([0, 4, 5, 11]),
        "cond.tokens": torch.randn(3, 5, 10, generator=g).half(),
    }
    tensors = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    save_file(tensors, str(path))
    return tensors


def test_sparse_data_is_read_sample_by_sample(tmp_path):
    stored = sparse_file(tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="points of a grid, which are not welcome here"):
        load_data(str(tmp_path / "d.safetensors"), 8)
    x0, cond, names = load_data(str(tmp_path / "d.safetensors"), 8, sparse=True)
    assert len(x0) == 3 and set(cond) == {"tokens"} and names is None
    feats, coords = x0[torch.tensor([2, 0, 2])]
    rows = torch.tensor([*range(5, 11), *range(4), *range(5, 11)])
    assert feats.dtype == torch.float32 and torch.equal(feats, stored["feats"][rows].float())
    assert coords.dtype == torch.int64 and torch.equal(coords[:, 1:], stored["coords"][rows].long())
    assert coords[:, 0].tolist() == [0] * 6 + [1] * 4 + [2] * 6
    assert torch.equal(cond["tokens"][torch.tensor([2])], stored["cond.tokens"][2:].float())
    tokens = cond["tokens"][torch.tensor([2, 0, 2])]
    assert network(SLatFlowModel)(feats, torch.rand(3), tokens, coords).shape == (16, 3)


def test_dense_data_is_read_with_its_tokens(tmp_path):
    stored = {"x0": torch.randn(4, 3, 4, 4, 4), "cond.tokens": torch.randn(4, 5, 10).half()}
    save_file(stored, str(tmp_path / "d.safetensors"))
    x0, cond, _ = load_data(str(tmp_path / "d.safetensors"))
    index = torch.tensor([3, 1])
    out = network(SparseStructureFlowModel)(x0[index], torch.rand(2), cond["tokens"][index])
    assert out.shape == (2, 3, 4, 4, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(offsets=torch.tensor([0, 5, 4, 11])),
            "offsets must grow, but 4 follows 5 (sample 1 has no points)",
        ),
        (dict(offsets=torch.tensor([0, 4, 4, 11])), "offsets must grow, but 4 follows 4"),
        (
            dict(offsets=torch.tensor([0, 4, 5, 10])),
            "offsets go from 0 to 10; wanted 0 to the 11 rows of coords",
        ),
        (dict(offsets=torch.tensor([1, 4, 5, 11])), "offsets go from 1 to 11"),
        (dict(offsets=torch.tensor([0])), "wanted N + 1 integers, N >= 1"),
        (
            dict(offsets=torch.tensor([0.0, 4, 5, 11])),
            "offsets is torch.float32 [4]; wanted N + 1 integers",
        ),
        (dict(offsets=torch.tensor([[0, 11]])), "wanted N + 1"),
        (
            dict(feats=torch.zeros(10, 3)),
            "coords is I16 [11, 3] and feats [10, 3]; wanted integers (M, 3) and (M, C)",
        ),
        (dict(feats=torch.zeros(11)), "and feats [11]"),
        (dict(coords=torch.zeros(11, 4, dtype=torch.int32)), "coords is I32 [11, 4]"),
        (dict(coords=torch.zeros(11, 3)), "coords is F32 [11, 3]"),
        (dict(coords=torch.full((11, 3), 8)), "coords go from 8 to 8; they must be within 0..7"),
        (dict(coords=torch.full((11, 3), -1)), "coords go from -1 to -1"),
        ({"cond.tokens": torch.zeros(2, 5, 10)}, "cond.tokens has 2 rows, offsets has 3"),
        (dict(feats=None), "nor coords, feats and offsets; it has cond.tokens, coords, offsets"),
        ("truncated", "truncated or not a safetensors file"),
    ],
)
def test_broken_sparse_data_ends_in_one_line(tmp_path, change, message):
    path = tmp_path / "d.safetensors"
    sparse_file(path, **({} if change == "truncated" else change))
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError) as error:
        load_data(str(path), 8, sparse=True)
    assert message in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_noise_of_points_belongs_to_samples():
    both = Draws(0, 5, 0, [3, 4]).points("eps", [6, 2], 3)
    assert both.shape == (8, 3)
    assert torch.equal(both[6:], Draws(0, 5, 0, [4]).points("eps", [2], 3))
    same_size = Draws(0, 5, 0, [3, 4]).points("eps", [6, 6], 3)
    assert torch.equal(same_size[:6], both[:6]) and not torch.equal(same_size[6:], both[:6])
    others = [
        Draws(0, 6, 0, [3]).points("eps", [6], 3),
        Draws(1, 5, 0, [3]).points("eps", [6], 3),
        Draws(0, 5, 0, [3]).points("z", [6], 3),
    ]
    assert not any(torch.equal(both[:6], o) for o in others)
    many = Draws(0, 5, 0, [0, 1]).points("eps", [5000, 5000], 4)
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


# ---- tokens of images ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    transformers, folder = pytest.importorskip("transformers"), tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=518,
        patch_size=14,
        num_register_tokens=4,
    )
    model = transformers.Dinov2WithRegistersModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    model.save_pretrained(folder)
    return folder


def test_tokens_are_those_of_trellis(dinov2, tmp_path, capsys):
    """Images by name; class token, registers, patches, before the last norm, normalised without
    weights; the file is one that --prompts takes."""
    (tmp_path / "images").mkdir()
    rgba = np.zeros((40, 60, 4), np.uint8)
    rgba[10:20, 20:50] = [200, 100, 50, 255]
    rgba[0, 0, 3] = 100  # too faint to count
    Image.fromarray(rgba).save(tmp_path / "images" / "b.png")
    noise = np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / "a.png")
    output = tmp_path / "new" / "tokens.safetensors"
    flags = ["--images", str(tmp_path / "images"), "--output", str(output)]
    encode.main([*flags, "--dinov2", str(dinov2)])
    assert "cond.tokens (2, 1374, 8) torch.float16" in capsys.readouterr().out
    stored = load_file(tmp_path / "new" / "tokens.safetensors")
    assert set(stored) == {"cond.tokens", "uncond.tokens"}
    assert not stored["uncond.tokens"].any() and stored["uncond.tokens"].shape == (1, 1374, 8)

    transformers = pytest.importorskip("transformers")
    model = transformers.Dinov2WithRegistersModel.from_pretrained(dinov2).eval()
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    # Opaque are x 20..49, y 10..19: the middle is (34.5, 14.5), and the side int(1.2 * 29) = 34.
    cropped = Image.fromarray(rgba).crop((17.5, -2.5, 51.5, 31.5))
    cropped = np.asarray(cropped.resize((518, 518), Image.Resampling.LANCZOS))
    cropped = cropped.astype(np.float32) / 255
    plain = Image.open(tmp_path / "images" / "a.png")
    plain = np.asarray(plain.resize((518, 518), Image.Resampling.LANCZOS))
    want = [plain, (cropped[..., :3] * cropped[..., 3:] * 255).astype(np.uint8)]
    for pixels, row in zip(want, stored["cond.tokens"], strict=True):
        x = (torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1) - mean) / std
        with torch.no_grad():
            h = model(x[None], output_hidden_states=True).hidden_states[-1][0]
            first = model.embeddings(x[None])[0]
        assert torch.equal(first[1:5], model.embeddings.register_tokens[0])
        assert (normed(h, eps=1e-5) - row.float()).abs().max() < 5e-3
    assert (stored["cond.tokens"][0] - stored["cond.tokens"][1]).abs().max() > 0.1
    Prompts(str(tmp_path / "new" / "tokens.safetensors"), ("tokens",), {})


@pytest.mark.parametrize(
    "how, message",
    [
        ("no folder", "is not a folder"),
        ("empty", "holds no files"),
        ("text", "is not an image that can be used"),
        ("transparent", "nothing in it is opaque"),
        ("no model", "cannot be loaded"),
        ("no transformers", "transformers is not installed"),
    ],
)
def test_wrong_images_end_in_one_line(dinov2, tmp_path, capsys, monkeypatch, how, message):
    images, model = tmp_path / "images", str(dinov2)
    images.mkdir()
    (images / ".hidden").write_text("not looked at")
    if how == "text":
        (images / "a.png").write_text("no image")
    elif how != "empty":
        Image.new("RGBA", (4, 4), "red" if how == "no model" else None).save(images / "a.png")
    if how == "no transformers":
        monkeypatch.setitem(sys.modules, "transformers", None)
    elif how == "no model":
        model = str(tmp_path)
    source = tmp_path / "none" if how == "no folder" else images
    flags = ["--images", str(source), "--output", str(tmp_path / "t.safetensors")]
    assert message in refusal_of(capsys, encode.main, *flags, "--dinov2", model)
    assert not (tmp_path / "t.safetensors").exists()


# ---- tokens of prompts ---------------------------------------------------------------------------


def save_tiny_clip(folder):
    """A random text encoder of CLIP's kind and width, which knows a few words."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["<pad>", "<unk>", "</s>"], "</s>")
    shape = dict(hidden_size=768, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    special = dict(bos_token_id=1, eos_token_id=2)
    config = transformers.CLIPTextConfig(vocab_size=len(tokenizer), **special, **shape)
    model = transformers.CLIPTextModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def save_text_root(root, clip, classes=(SparseStructureFlowModel,)):
    """The root of a text model of TRELLIS: CLIP's width, and the encoder's name in pipeline.json.

    -> {class: path without suffix}.
    """
    paths = save_root(root, {cls: {**CLASSES[cls], "cond_channels": 768} for cls in classes})
    pipeline = load_json(str(root / "pipeline.json"))
    pipeline["args"]["text_cond_model"] = str(clip)
    save_json(pipeline | {"name": "TrellisTextTo3DPipeline"}, str(root / "pipeline.json"))
    return paths


def test_tokens_of_prompts_are_those_of_trellis(clip, tmp_path, capsys):
    """CLIP's last hidden states of 77 tokens, the padding unmasked; unconditional is the empty
    prompt, not zeros. The root names the encoder, and --clip overrides it."""
    path = save_text_root(tmp_path, clip)[SparseStructureFlowModel]
    (tmp_path / "p.txt").write_text("a cat\n\na dog runs fast\n")
    flags = ["--prompts_txt", str(tmp_path / "p.txt"), "--output"]
    for teacher, more in ((tmp_path, []), (path, ["--clip", str(clip)])):
        output = str(tmp_path / "new" / "tokens.safetensors")
        encode.main(["--teacher", str(teacher), *flags, output, *more])
        assert "uncond.tokens (1, 77, 768) torch.float16" in capsys.readouterr().out
        stored = load_file(output)
        assert stored.keys() == {"cond.tokens", "uncond.tokens"}
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPTextModel.from_pretrained(clip).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(clip)(
        ["a cat", "a dog runs fast", ""], padding="max_length", max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        plain = model(input_ids=tokens.input_ids).last_hidden_state
        masked = model(tokens.input_ids, tokens.attention_mask).last_hidden_state
    got = torch.cat([stored["cond.tokens"], stored["uncond.tokens"]]).float()
    torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-3)
    assert relative(masked, plain) > 0.02 and got[2].abs().mean() > 0.1
    negative = ["--negative_prompt", "a dog runs fast"]
    encode.main(["--teacher", str(tmp_path), *flags, output, *negative])
    assert torch.equal(load_file(output)["uncond.tokens"][0], stored["cond.tokens"][1])


@pytest.mark.parametrize(
    "how, message",
    [
        ("image root", "is TRELLIS, and --prompts_txt is for"),
        ("no encoder", "--clip"),
        ("too long", "--max_length 99: a TrellisTextTo3DPipeline takes at most 77 tokens"),
        ("with images", "--clip has no effect with --images"),
        ("other teacher", "--clip has no effect with a WanPipeline"),
        ("images of a text model", "and --images is for TRELLIS's image models"),
    ],
)
def test_wrong_flags_for_tokens_of_prompts_end_in_one_line(clip, tmp_path, capsys, how, message):
    save_text_root(tmp_path, clip)
    (tmp_path / "p.txt").write_text("a cat\n")
    flags = ["--teacher", str(tmp_path), "--prompts_txt", str(tmp_path / "p.txt")]
    if how == "image root":
        save_root(tmp_path, {SparseStructureFlowModel: SS})
    elif how == "no encoder":
        flags += ["--clip", str(tmp_path)]
    elif how == "too long":
        flags += ["--max_length", "99"]
    elif how == "other teacher":
        save_json({"_class_name": "WanPipeline"}, str(tmp_path / "model_index.json"))
        flags += ["--clip", str(clip)]
    else:
        more = ["--clip", str(clip)] if how == "with images" else ["--teacher", str(tmp_path)]
        flags = ["--images", str(tmp_path), *more]
    output = tmp_path / "out.safetensors"
    assert message in refusal_of(capsys, encode.main, *flags, "--output", str(output))
    assert not output.exists()


def test_a_root_or_a_network_of_it_is_a_teacher_to_encode_for(dinov2, tmp_path):
    """--teacher changes nothing with --images: the image encoder is not among TRELLIS's files."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "images" / "a.png")
    path = save_root(tmp_path, {SparseStructureFlowModel: SS})[SparseStructureFlowModel]
    flags = ["--images", str(tmp_path / "images"), "--dinov2", str(dinov2)]
    with Image.open(tmp_path / "images" / "a.png") as image:
        tokens = ImageTokens(dinov2, "cpu")(prepare_image(image)[None]).half()
    want = {"cond.tokens": tokens, "uncond.tokens": torch.zeros_like(tokens)}
    for i, teacher in enumerate((tmp_path, path)):
        output = str(tmp_path / f"{i}.safetensors")
        encode.main(["--teacher", str(teacher), *flags, "--output", output])
        stored = load_file(output)
        assert stored.keys() == want.keys()
        assert all(torch.equal(stored[key], want[key]) for key in want)


def test_images_are_encoded_one_by_one_and_gone_on_with(dinov2, tmp_path, monkeypatch, capsys):
    """What an interrupted command has encoded is not encoded again; a broken image is named."""
    (tmp_path / "images").mkdir()
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / "images" / f"{i}.png")
    flags = ["--images", str(tmp_path / "images"), "--dinov2", str(dinov2), "--output"]
    encode.main([*flags, str(tmp_path / "whole.safetensors")])
    seen, real = [], ImageTokens.__call__

    def tokens(self, pixels):
        seen.append(len(pixels))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(self, pixels)

    monkeypatch.setattr(ImageTokens, "__call__", tokens)
    output = str(tmp_path / "new.safetensors")
    with pytest.raises(KeyboardInterrupt):
        encode.main([*flags, output])
    encode.main([*flags, output])
    assert seen == [1] * 4
    whole, new = load_file(tmp_path / "whole.safetensors"), load_file(output)
    assert whole.keys() == new.keys() and all(torch.equal(whole[k], new[k]) for k in whole)
    capsys.readouterr()
    encode.main([*flags, output])
    assert len(seen) == 4 and "is there already" in capsys.readouterr().out
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    line = refusal_of(capsys, encode.main, *flags, str(tmp_path / "other.safetensors"))
    assert "1.png is not an image that can be used" in line
