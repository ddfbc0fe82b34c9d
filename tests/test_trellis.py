"""models/trellis.py against a second implementation on dense grids, TRELLIS's files, sparse data, tokens of images.

The second implementation reads a state dict by its names, computes sparse convolutions as dense ones on the whole grid, and treats one sample at a time.
"""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import fill, read_log, refusal_of, relative
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import dmd
from models import encode
from models.diffusion import Flow
from models.draws import Draws
from models.encode import encode_trellis_images
from models.files import UserError, save_json
from models.networks import load_network, lora, network_config, save_network, trellis, weights_hash
from models.networks.trellis import (
    SLAT_FLOW_L,
    SS_DECODER,
    SS_ENCODER,
    SS_FLOW_L,
    ElasticSLatFlowModel,
    SLatFlowModel,
    SparseStructureDecoder,
    SparseStructureEncoder,
    SparseStructureFlowModel,
    occupied,
    per_point,
    per_sample_mean,
)
from models.plumbing.data import Prompts, load_data
from models.plumbing.teachers import is_small, load_student_init, load_teacher

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
    """Different voxels of a grid in random order, counts[i] of sample i -> coords (N, 4)."""
    g = torch.Generator().manual_seed(seed)
    everywhere = torch.cartesian_prod(*[torch.arange(side)] * 3)
    chosen = [everywhere[torch.randperm(side**3, generator=g)[:n]] for n in counts]
    return torch.cat([F.pad(c, (1, 0), value=i) for i, c in enumerate(chosen)])


def inputs(cls, config=None, counts=(40, 90, 7), seed=1):
    """-> arguments of a call."""
    c, g, B = config or CLASSES[cls], torch.Generator().manual_seed(seed), len(counts)
    call = dict(
        t=torch.rand(B, generator=g), tokens=torch.randn(B, 5, c["cond_channels"], generator=g)
    )
    if cls is SparseStructureFlowModel:
        return dict(call, x=torch.randn(B, c["in_channels"], *[c["resolution"]] * 3, generator=g))
    return dict(
        call,
        x=torch.randn(sum(counts), c["in_channels"], generator=g),
        coords=points(counts, c["resolution"]),
    )


def network(cls, config=None):
    """Weights that hide nothing; gamma, which fill does not know, is around 1."""
    net = fill(cls(**(config or CLASSES[cls])))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("gamma"):
                p.add_(1)
    return net


# ---- the second implementation -----------------------------------------------------------------------------


def normed(x, w=None, b=None, eps=1e-6):
    """Over the last axis."""
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps) ** 0.5
    return y if w is None else y * w + b


def line(W, name, x):
    return x @ W[name + ".weight"].T + W[name + ".bias"]


def heads_of(W, name, x, gamma, H, norm):
    """x (n, D) -> (H, n, D / H), each head with norm 8 * gamma if its channels are 64."""
    x = x.view(len(x), H, -1).transpose(0, 1)
    if norm:
        x = (
            x
            / (x * x).sum(-1, keepdim=True).sqrt()
            * W[f"{name}.{gamma}.gamma"][:, None]
            * x.shape[-1] ** 0.5
        )
    return x


def mixed(W, name, x, context, H, norm):
    """Attention of one sample, x (n, D)."""
    if context is None:
        q, k, v = (
            line(W, name + ".to_qkv", x)[:, i * x.shape[1] : (i + 1) * x.shape[1]] for i in range(3)
        )
    else:
        q, kv = line(W, name + ".to_q", x), line(W, name + ".to_kv", context)
        k, v = kv[:, : x.shape[1]], kv[:, x.shape[1] :]
    q, k, v = (
        heads_of(W, name, q, "q_rms_norm", H, norm),
        heads_of(W, name, k, "k_rms_norm", H, norm),
        heads_of(W, name, v, "", H, False),
    )
    p = torch.softmax(torch.einsum("hnd,hmd->hnm", q, k) / q.shape[-1] ** 0.5, -1)
    return line(W, name + ".to_out", torch.einsum("hnm,hmd->nhd", p, v).reshape(len(x), -1))


def torso(W, c, h, tokens, time):
    """The blocks on one sample, h (n, D), time (D,)."""
    H = c.get("num_heads") or c["model_channels"] // c["num_head_channels"]
    for i in range(c["num_blocks"]):
        b = f"blocks.{i}"
        sh, sc, g, sh2, sc2, g2 = line(W, b + ".adaLN_modulation.1", F.silu(time)).view(6, -1)
        h = h + g * mixed(W, b + ".self_attn", normed(h) * (1 + sc) + sh, None, H, c["qk_rms_norm"])
        h = h + mixed(
            W,
            b + ".cross_attn",
            normed(h, W[b + ".norm2.weight"], W[b + ".norm2.bias"]),
            tokens,
            H,
            c.get("qk_rms_norm_cross"),
        )
        z = F.gelu(line(W, b + ".mlp.mlp.0", normed(h) * (1 + sc2) + sh2), approximate="tanh")
        h = h + g2 * line(W, b + ".mlp.mlp.2", z)
    return h


def time_of(W, t):
    """One t -> (D,)."""
    angle = (
        1000 * t * torch.exp(torch.arange(128) * (-math.log(10000) / 128))
    )  # float32 like TRELLIS's: a rounded frequency times 1000 is seen
    z = torch.cat([torch.cos(angle), torch.sin(angle)]).to(W["out_layer.weight"].dtype)
    return line(W, "t_embedder.mlp.2", F.silu(line(W, "t_embedder.mlp.0", z)))


def place_of(xyz, D):
    """One place -> (D,)."""
    f = D // 3 // 2
    waves = [fn(v / 10000 ** (i / f)) for v in xyz for fn in (math.sin, math.cos) for i in range(f)]
    return torch.tensor(waves + [0.0] * (D - len(waves)))


def plain_ss(W, c, x, t, tokens):
    p, R, rows = c["patch_size"], c["resolution"], []
    for x1, t1, k1 in zip(x, t, tokens):
        cells = [(i, j, k) for i in range(R // p) for j in range(R // p) for k in range(R // p)]
        h = torch.stack(
            [
                x1[:, i * p : i * p + p, j * p : j * p + p, k * p : k * p + p].reshape(-1)
                for i, j, k in cells
            ]
        )
        h = line(W, "input_layer", h) + torch.stack(
            [place_of(cell, c["model_channels"]) for cell in cells]
        )
        h = line(W, "out_layer", normed(torso(W, c, h, k1, time_of(W, t1)), eps=1e-5))
        y = torch.zeros(c["out_channels"], R, R, R, dtype=x.dtype)
        for (i, j, k), v in zip(cells, h):
            y = y.clone()
            y[:, i * p : i * p + p, j * p : j * p + p, k * p : k * p + p] = v.view(-1, p, p, p)
        rows.append(y)
    return torch.stack(rows)


def to_grid(x, xyz, R):
    """(n, C), (n, 3) -> (1, C, R, R, R), zero elsewhere."""
    return (
        torch.zeros(R, R, R, x.shape[1], dtype=x.dtype)
        .index_put(tuple(xyz.T), x)
        .permute(3, 0, 1, 2)[None]
    )


def at(grid, xyz):
    return grid[0][:, xyz[:, 0], xyz[:, 1], xyz[:, 2]].T


def sparse_conv(W, name, x, xyz, R):
    kernel = W[name + ".weight"].permute(0, 4, 1, 2, 3)
    return at(F.conv3d(to_grid(x, xyz, R), kernel, W[name + ".bias"], padding=1), xyz)


def sparse_res(W, name, x, xyz, R, time):
    scale, shift = line(W, name + ".emb_layers.1", F.silu(time)).view(2, -1)
    h = sparse_conv(
        W,
        name + ".conv1.conv",
        F.silu(normed(x, W[name + ".norm1.weight"], W[name + ".norm1.bias"])),
        xyz,
        R,
    )
    h = sparse_conv(W, name + ".conv2.conv", F.silu(normed(h) * (1 + scale) + shift), xyz, R)
    return h + (
        line(W, name + ".skip_connection", x) if name + ".skip_connection.weight" in W else x
    )


def plain_slat(W, c, x, t, tokens, coords):
    out, stages, more = (
        torch.zeros(len(x), c["out_channels"], dtype=x.dtype),
        len(c["io_block_channels"]),
        c.get("num_io_res_blocks", 2) - 1,
    )
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
            # what TRELLIS calls the mean includes the zero it starts from
            h = torch.zeros(len(code), h.shape[1], dtype=h.dtype).scatter_reduce(
                0, parent[:, None].expand(-1, h.shape[1]), h, "mean", include_self=True
            )
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
    return normed(x.permute(0, 2, 3, 4, 1), W[name + ".weight"], W[name + ".bias"], 1e-5).permute(
        0, 4, 1, 2, 3
    )


def conv(W, name, x, **k):
    return F.conv3d(x, W[name + ".weight"], W[name + ".bias"], **{"padding": 1, **k})


def dense_res(W, name, x):
    h = conv(W, name + ".conv1", F.silu(channel_norm(W, name + ".norm1", x)))
    return x + conv(W, name + ".conv2", F.silu(channel_norm(W, name + ".norm2", h)))


def plain_encoder(W, c, x):
    h = conv(W, "input_layer", x)
    for i, kind in enumerate("rrdrrdrr"):
        h = (
            dense_res(W, f"blocks.{i}", h)
            if kind == "r"
            else conv(W, f"blocks.{i}.conv", h, stride=2, padding=0)
        )
    for i in range(2):
        h = dense_res(W, f"middle_block.{i}", h)
    return conv(W, "out_layer.2", F.silu(channel_norm(W, "out_layer.0", h)))[
        :, : c["latent_channels"]
    ]


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
    """Relative errors of output and gradients, of float inputs and of every parameter, between both implementations."""
    net.to(dtype).zero_grad()
    leaves = [
        {
            k: v.to(dtype, copy=True).requires_grad_() if k in ("x", "tokens") else v
            for k, v in call.items()
        }
        for _ in range(2)
    ]
    W = {k: v.detach().clone().requires_grad_() for k, v in net.state_dict().items()}
    out, want = net(**leaves[0]), plain(W, net.config, **leaves[1])
    assert (
        out.shape == want.shape and out.dtype == dtype and want.std() > 0.1
    )  # a dead network would agree with anything
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    return {
        "out": relative(out, want),
        **{
            k: relative(leaves[0][k].grad, leaves[1][k].grad)
            for k in leaves[0]
            if leaves[0][k].requires_grad
        },
        **{name: relative(p.grad, W[name].grad) for name, p in net.named_parameters()},
    }


def compare(net, plain, call):
    """float32: output and gradients by the inputs within 1e-5, by parameters 1e-4 (sums over many points); float64: all within 1e-6, which
    leaves room for features of time and place, float32 in either."""
    low, high = (errors_of(net, plain, call, dtype) for dtype in (torch.float32, torch.float64))
    ends = {k: e for k, e in low.items() if k in ("out", *call)}
    print(
        f"{type(net).__name__}: float32 {' '.join(f'{k} {e:.1e}' for k, e in ends.items())}, parameters {max(low.values()):.1e}, float64 {max(high.values()):.1e}"
    )
    assert max(ends.values()) <= 1e-5 and max(low.values()) <= 1e-4, low
    assert max(high.values()) <= 1e-6, high


# ---- the same function -------------------------------------------------------------------------------------


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
    config = {**SS, **changes}
    compare(
        network(SparseStructureFlowModel, config),
        plain_ss,
        inputs(SparseStructureFlowModel, config),
    )


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
    """The encoder gives the posterior's mean: half of the last layer has no gradient."""
    x = (torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    z = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for cls, plain, call in (
        (SparseStructureEncoder, plain_encoder, x),
        (SparseStructureDecoder, plain_decoder, z),
    ):
        net = network(cls)
        compare(net, plain, {"x": call})
        used = net.out_layer[2].weight.grad.flatten(1).abs().sum(1) > 0
        assert used.tolist() == (
            [True] * 3 + [False] * 3 if cls is SparseStructureEncoder else [True]
        )


def test_occupied_voxels_become_points():
    logits = torch.full((2, 1, 3, 4, 5), -1.0)
    logits[0, 0, 2, 3, 4] = logits[1, 0, 0, 1, 0] = logits[1, 0, 0, 1, 3] = 0.5
    logits[0, 0, 0, 0, 0] = 0.0
    assert occupied(logits).tolist() == [[0, 2, 3, 4], [1, 0, 1, 0], [1, 0, 1, 3]]


@pytest.mark.parametrize("count", [64, 23, 1])
def test_submanifold_convolution_is_the_dense_one_on_occupied_voxels(count):
    """On a full grid everywhere, else with zeros for the empty voxels and no output there; two samples do not see each other."""
    xyz = points([count, count], 4)
    layer, g = trellis.SubmanifoldConv(3, 5), torch.Generator().manual_seed(0)
    x = torch.randn(2 * count, 3, generator=g).requires_grad_()
    dense = torch.zeros(2, 4, 4, 4, 3).index_put(tuple(xyz.T), x).permute(0, 4, 1, 2, 3)
    want = F.conv3d(dense, layer.weight.permute(0, 4, 1, 2, 3), layer.bias, padding=1).permute(
        0, 2, 3, 4, 1
    )[tuple(xyz.T)]
    out, weight = (
        layer(x, trellis.make_grid(xyz, 4).neighbours),
        torch.randn(2 * count, 5, generator=g),
    )
    leaves = [x, layer.weight, layer.bias]
    got, expected = (torch.autograd.grad((y * weight).sum(), leaves) for y in (out, want))
    assert max(relative(a, b) for a, b in zip([out, *got], [want, *expected])) <= 1e-5


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
        slat |= (
            {f"{name}.skip_connection.weight": (b, a), f"{name}.skip_connection.bias": (b,)}
            if a != b
            else {}
        )
    cases = (
        (SparseStructureFlowModel, SS_FLOW_L, 559_737_864, 489),
        (SLatFlowModel, SLAT_FLOW_L, 600_432_520, 526),
        (SparseStructureEncoder, SS_ENCODER, 59_298_192, 74),
        (SparseStructureDecoder, SS_DECODER, 73_671_201, 74),
    )
    for (cls, config, values, keys), want in zip(cases, (ss, slat, None, None)):
        with torch.device("meta"):
            net = cls(**config)
        shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
        assert (sum(math.prod(s) for s in shapes.values()), len(shapes)) == (values, keys)
        assert want is None or shapes == want
        assert config.items() <= net.config.items() and net.config == json.loads(
            json.dumps(net.config)
        )
    assert shapes["blocks.2.conv.weight"] == (1024, 512, 3, 3, 3) and shapes[
        "out_layer.0.weight"
    ] == (32,)


# ---- sparse batches ----------------------------------------------------------------------------------------


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


def test_order_of_points_means_nothing():
    net, call = network(SLatFlowModel), inputs(SLatFlowModel)
    order = torch.randperm(
        len(call["x"]), generator=torch.Generator().manual_seed(3)
    )  # also mixes the samples
    with torch.no_grad():
        other = {**call, "x": call["x"][order], "coords": call["coords"][order].int()}
        out, same = net(**call), net(**other)
        features, same_features = (net(**c, return_features=True) for c in (call, other))
    assert relative(same, out[order]) <= 1e-5 and relative(same_features, features) <= 1e-5


def test_what_samples_have_reaches_their_points_and_back():
    coords = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 2, 0, 0]], dtype=torch.int32)
    assert per_point(torch.tensor([5.0, 7.0]), coords).tolist() == [[7.0], [5.0], [7.0]]
    assert per_point(torch.tensor([[1.0, 2], [3, 4]]), coords).tolist() == [
        [3.0, 4.0],
        [1.0, 2.0],
        [3.0, 4.0],
    ]
    assert per_sample_mean(torch.tensor([[1.0, 3], [2, 4], [5, 7]]), coords, 2).tolist() == [
        3.0,
        4.0,
    ]


# ---- what training relies on -------------------------------------------------------------------------------


@flows
def test_forward_mode_derivative_is_that_of_finite_differences(monkeypatch, cls):
    """Along x and along t, in float64; as a training script asks for it, without reverse mode."""

    def exact_sinusoid(
        t, dim
    ):  # the network's own is float32, too coarse for small differences of t
        angle = 1000 * t[:, None] * 10000.0 ** -(torch.arange(dim // 2, dtype=t.dtype) / (dim // 2))
        return torch.cat([angle.cos(), angle.sin()], dim=1)

    net, call = (
        network(cls).double(),
        {k: v.double() if v.is_floating_point() else v for k, v in inputs(cls).items()},
    )
    x, t = call.pop("x"), call.pop("t").clamp(0.1, 0.9)
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4))
    rate = torch.tensor([1.0, 2.0, -1.0], dtype=x.dtype)
    f = lambda x, t: net(x, t, **call)  # noqa: E731
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
    monkeypatch.setattr(trellis, "checkpoint", lambda *a, **k: calls.append(k) or original(*a, **k))
    net, call, gradients = network(cls), inputs(cls), []
    for net.gradient_checkpointing in (False, True):
        net.zero_grad()
        leaf = call["x"].clone().requires_grad_()
        net(**{**call, "x": leaf}).square().sum().backward()
        gradients.append([leaf.grad] + [p.grad.clone() for p in net.parameters()])
    assert calls == [{"use_reentrant": False}] * (3 if cls is SparseStructureFlowModel else 7)
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
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
    if cls is SLatFlowModel:  # without padding
        merged = torch.cat([call["coords"][:, :1], call["coords"][:, 1:] // 2], 1).unique(dim=0)
        seen = [torch.cat([h[i, : (merged[:, 0] == i).sum()] for i in range(3)]) for h in seen]
    assert features.shape == (
        (3, 64, 32) if cls is SparseStructureFlowModel else (len(merged), 32)
    ) and torch.equal(features, seen[0])


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
    assert len(stored) == 2 * 7 * 3 and stored[
        "transformer.blocks.2.mlp.mlp.2.lora_A.weight"
    ].shape == (2, 128)
    net(**call, adapter="a").square().sum().backward()
    assert all(p.grad.any() for p in lora.parameters(net, "a"))


@flows
def test_low_precision(cls):
    """bfloat16 weights and autocast stay near float32; what scales every token, and the places of tokens, do not lose precision."""
    net, call, time = (
        network(cls),
        inputs(cls),
        torch.randn(3, 32, generator=torch.Generator().manual_seed(6)),
    )
    with torch.no_grad():
        exact, conditions = (
            net(**call),
            lambda: [
                net.t_embedder(call["t"]),
                *trellis.modulation(net.blocks[0].adaLN_modulation, time, 6),
            ],
        )
        before = conditions()
        error = lambda out: ((out.float() - exact).norm() / exact.norm()).item()  # noqa: E731
        with torch.autocast("cpu", torch.bfloat16):
            assert 0 < error(net(**call)) < 0.03
            assert all(torch.equal(a, b) for a, b in zip(before, conditions(), strict=True))
        for p in net.parameters():
            p.data = p.data.bfloat16()
        low = net(**{**call, "x": call["x"].bfloat16(), "tokens": call["tokens"].bfloat16()})
        assert (
            low.dtype == torch.bfloat16
            and 0 < error(low) < 0.05
            and net(**call).dtype == torch.float32
        )


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
    assert (
        cls(**c).latent_shape == (3, *[c["resolution"]] * 3)
        and ElasticSLatFlowModel is SLatFlowModel
    )
    assert [round(m, 5) for m in trellis.SLAT_MEAN] == [
        -2.16875,
        -0.00435,
        -0.13352,
        -0.08418,
        -0.52712,
        0.72387,
        -1.14145,
        1.20394,
    ]
    assert [round(s, 5) for s in trellis.SLAT_STD] == [
        2.37765,
        2.38638,
        2.12442,
        2.17486,
        2.66394,
        2.37119,
        2.62174,
        2.68452,
    ]


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


# ---- files -------------------------------------------------------------------------------------------------


def half(tensors):
    """As TRELLIS stores a network: float16 in the blocks' layers alone."""
    torso = [
        k
        for k in tensors
        if "blocks." in k and "norm" not in k or "middle_block" in k and "norm" not in k
    ]
    return {k: v.half() if k in torso else v for k, v in tensors.items()}


def save_root(root, classes=CLASSES):
    """A TRELLIS root: pipeline.json, and each network under ckpts/. -> {class: path without suffix}"""
    (root / "ckpts").mkdir(exist_ok=True)
    paths = {}
    for cls, config in classes.items():
        paths[cls] = str(root / "ckpts" / f"{cls.__name__.lower()}_fp16")
        name = "ElasticSLatFlowModel" if cls is SLatFlowModel else cls.__name__
        save_json({"name": name, "args": {**config, "use_fp16": True}}, paths[cls] + ".json")
        save_file(half(network(cls).state_dict()), paths[cls] + ".safetensors")
    save_json(
        {
            "name": "TrellisImageTo3DPipeline",
            "args": {"models": {k.__name__: f"ckpts/{k.__name__.lower()}_fp16" for k in classes}},
        },
        str(root / "pipeline.json"),
    )
    return paths


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_files_load(tmp_path, cls, dtype):
    """With or without suffix; fixed features of places keep float32."""
    path, want = save_root(tmp_path, {cls: CLASSES[cls]})[cls], half(network(cls).state_dict())
    assert {v.dtype for v in want.values()} == {torch.float16, torch.float32}
    for source in (path, path + ".json", path + ".safetensors", str(tmp_path / "ckpts")):
        net, config = load_network(source, dtype)
        assert (
            config == json.loads(open(path + ".json").read())
            and not net.training
            and config["args"].items() <= net.config.items()
        )
        state = net.state_dict()
        assert all(
            v.dtype == (torch.float32 if k == "pos_emb" else dtype)
            and torch.equal(v, want[k].to(v.dtype))
            for k, v in state.items()
        )
    if hasattr(net, "prediction"):
        call, exact = inputs(cls), network(cls)
        with torch.no_grad():
            assert relative(net(**call), exact(**call)) < (2e-2 if dtype is torch.float32 else 0.1)


@each
def test_what_we_save_is_read_back_and_keeps_the_layout(tmp_path, cls):
    """CLASS.json with no added keys and CLASS.safetensors with exactly the network's tensors, without adapters."""
    net, config = load_network(save_root(tmp_path, {cls: CLASSES[cls]})[cls])
    if hasattr(net, "lora_targets"):
        lora.add(net, "a", rank=1, alpha=1)
    folder = tmp_path / "student"
    save_network(net, config, str(folder))
    name = config["name"]
    assert sorted(p.name for p in folder.iterdir()) == [f"{name}.json", f"{name}.safetensors"]
    assert json.loads((folder / f"{name}.json").read_text()) == config and set(config) == {
        "name",
        "args",
    }
    assert set(load_file(folder / f"{name}.safetensors")) == set(cls(**CLASSES[cls]).state_dict())
    for source in (str(folder), str(folder / name)):
        again, config_again = load_network(source)
        assert config_again == config and all(
            torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items()
        )
        assert weights_hash(source) == weights_hash(str(folder))
    assert network_config(again) == {"name": cls.__name__, "args": again.config}


@pytest.mark.parametrize(
    "how, message",
    [
        ("no json", ".json does not exist"),
        ("no weights", "ss_fp16.safetensors does not exist"),
        ("truncated", "truncated or not a safetensors file"),
        ("pickle", "is a pickle, not safetensors"),
        ("pt beside json", "only a pickle (ss_fp16.pt); pickles can run code and are never loaded"),
        ("broken json", "is not readable JSON"),
        ("list", "is not a JSON object"),
        ("class", "unknown network class 'SLatMeshDecoder'"),
        ("no args", "unknown network class None"),
        ("args no dict", "does not describe a SparseStructureFlowModel"),
        ("unknown key", "unexpected keyword argument 'depth'"),
        ("no key", "missing 1 required positional argument: 'resolution'"),
        ("rope", "pe_mode = 'rope' is not implemented"),
        ("width", "has shape (192,), ss_fp16.json asks for (288,)"),
        (
            "more blocks",
            "lacks 'blocks.3.adaLN_modulation.1.bias' and 19 more tensors: the checkpoint does not match its ss_fp16.json",
        ),
        (
            "fewer blocks",
            "has 'blocks.2.adaLN_modulation.1.bias', which a SparseStructureFlowModel of this ss_fp16.json does not",
        ),
        ("nothing", "is not a folder"),
        (
            "two pairs",
            "has no config.json: give the folder of one network (slat_fp16, ss_fp16 in it are such)",
        ),
        (
            "root",
            "is a TRELLIS root of several networks: give the path of one (ckpts/slat_fp16, ckpts/ss_fp16 in it are such)",
        ),
    ],
)
def test_bad_files_end_in_one_line(tmp_path, how, message):
    (tmp_path / "ckpts").mkdir()
    path = str(tmp_path / "ckpts" / "ss_fp16")
    config, weights = (
        {"name": "SparseStructureFlowModel", "args": dict(SS, use_fp16=True)},
        half(network(SparseStructureFlowModel).state_dict()),
    )
    change = {
        "rope": dict(pe_mode="rope"),
        "unknown key": dict(depth=3),
        "more blocks": dict(num_blocks=4),
        "fewer blocks": dict(num_blocks=2),
    }.get(how, {})
    config["args"] |= change
    if how == "no key":
        del config["args"]["resolution"]
    elif how == "class":
        config["name"] = "SLatMeshDecoder"
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
        for suffix in {"no json": [".json"], "nothing": [".json", ".safetensors"]}.get(
            how, [".safetensors"]
        ):
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
            (tmp_path / "ckpts" / f"slat_fp16{suffix}").write_bytes(
                open(path + suffix, "rb").read()
            )
        source = str(tmp_path / "ckpts") if how == "two pairs" else str(tmp_path)
        save_json({"args": {"models": {}}}, str(tmp_path / "pipeline.json"))
    with pytest.raises(UserError) as error:
        load_network(source)
    assert message in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_a_component_is_a_teacher(tmp_path):
    paths = save_root(tmp_path)
    for cls in (SparseStructureFlowModel, SLatFlowModel):
        teacher = load_teacher(paths[cls], ())
        assert (
            isinstance(teacher.schedule, Flow)
            and (teacher.prediction, teacher.shift) == ("flow_v", 3.0)
            and teacher.world_name is None
        )
        assert (teacher.folder, teacher.label) == (
            paths[cls],
            f"{cls.__name__.lower()}_fp16",
        ) and isinstance(teacher.net, cls)
        assert not is_small(paths[cls], ())
        assert load_student_init(paths[cls], teacher.net).config == teacher.net.config
    for source, message in (
        (paths[SparseStructureDecoder], "SparseStructureDecoder, which does not denoise"),
        (str(tmp_path), "is a TRELLIS root"),
        (str(tmp_path / "ckpts" / "missing"), "neither an embedded world"),
    ):
        with pytest.raises(UserError, match=message):
            load_teacher(source, ())


def test_a_run_leaves_a_student_in_the_same_layout(tmp_path, capsys):
    """The first stage is dense: a script made for images distils it, conditioned on tokens from a file as encode writes it, and refuses the second."""
    path = save_root(tmp_path)[SparseStructureFlowModel]
    g = torch.Generator().manual_seed(0)
    save_file(
        {
            "cond.tokens": torch.randn(4, 5, 10, generator=g).half(),
            "uncond.tokens": torch.zeros(1, 5, 10).half(),
        },
        str(tmp_path / "tokens.safetensors"),
    )
    flags = [
        "--teacher",
        path,
        "--prompts",
        str(tmp_path / "tokens.safetensors"),
        "--teacher_steps",
        "2",
        "--preview_samples",
        "2",
        "--student_steps",
        "2",
        "--learning_rate",
        "1e-4",
        "--learning_rate_fake",
        "2e-4",
        "--max_train_steps",
        "2",
        "--train_batch_size",
        "2",
        "--guidance_scale",
        "2",
    ]
    dmd.main([*flags, "--output_dir", str(tmp_path / "run")])
    folder = tmp_path / "run" / "student"
    assert sorted(p.name for p in folder.iterdir()) == [
        "SparseStructureFlowModel.json",
        "SparseStructureFlowModel.safetensors",
        "sampler.json",
    ]
    assert json.loads((folder / "SparseStructureFlowModel.json").read_text()) == json.loads(
        open(path + ".json").read()
    )
    student, start = load_network(str(folder))[0], load_network(path)[0]
    moved = {
        k for k, v in student.state_dict().items() if not torch.equal(v, start.state_dict()[k])
    }
    assert moved == set(student.state_dict()) - {"pos_emb"} and len(read_log(tmp_path / "run")) == 2
    assert load_teacher(str(tmp_path / "run"), ()).shift == 3.0
    assert "coords is missing" in refusal_of(
        capsys,
        dmd.main,
        *flags[:1],
        save_root(tmp_path)[SLatFlowModel],
        *flags[2:],
        "--output_dir",
        str(tmp_path / "slat"),
    )
    assert not (tmp_path / "slat").exists()
    dmd.main(
        [
            "--sample",
            str(folder),
            "--prompts",
            str(tmp_path / "tokens.safetensors"),
            "--preview_samples",
            "2",
            "--output_dir",
            str(tmp_path / "drawn"),
        ]
    )
    assert load_file(tmp_path / "drawn" / "samples.safetensors")["x0"].shape == (2, 3, 4, 4, 4)


# ---- data --------------------------------------------------------------------------------------------------


def sparse_file(path, **change):
    """Three samples of 4, 1 and 6 points."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "coords": points((4, 1, 6), 8)[:, 1:].to(torch.int16).contiguous(),
        "feats": torch.randn(11, 3, generator=g).half(),
        "offsets": torch.tensor([0, 4, 5, 11]),
        "cond.tokens": torch.randn(3, 5, 10, generator=g).half(),
    }
    tensors.update(change)
    save_file({k: v for k, v in tensors.items() if v is not None}, str(path))
    return {k: v for k, v in tensors.items() if v is not None}


def test_sparse_data_is_read_sample_by_sample(tmp_path):
    stored = sparse_file(tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="points of a grid, which are not welcome here"):
        load_data(str(tmp_path / "d.safetensors"), (), 8)
    x0, cond, names = load_data(str(tmp_path / "d.safetensors"), (), 8, sparse=True)
    assert len(x0) == 3 and set(cond) == {"tokens"} and names is None
    feats, coords = x0[torch.tensor([2, 0, 2])]
    rows = torch.tensor([*range(5, 11), *range(4), *range(5, 11)])
    assert feats.dtype == torch.float32 and torch.equal(feats, stored["feats"][rows].float())
    assert coords.dtype == torch.int64 and torch.equal(coords[:, 1:], stored["coords"][rows].long())
    assert coords[:, 0].tolist() == [0] * 6 + [1] * 4 + [2] * 6
    assert torch.equal(cond["tokens"][torch.tensor([2])], stored["cond.tokens"][2:].float())
    net = network(SLatFlowModel)
    assert net(feats, torch.rand(3), cond["tokens"][torch.tensor([2, 0, 2])], coords).shape == (
        16,
        3,
    )


def test_dense_data_is_read_with_its_tokens(tmp_path):
    save_file(
        {"x0": torch.randn(4, 3, 4, 4, 4), "cond.tokens": torch.randn(4, 5, 10).half()},
        str(tmp_path / "d.safetensors"),
    )
    x0, cond, _ = load_data(str(tmp_path / "d.safetensors"), ())
    index = torch.tensor([3, 1])
    assert network(SparseStructureFlowModel)(
        x0[index], torch.rand(2), cond["tokens"][index]
    ).shape == (2, 3, 4, 4, 4)


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
        load_data(str(path), (), 8, sparse=True)
    assert message in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_noise_of_points_belongs_to_samples():
    both = Draws(0, 5, 0, [3, 4]).points("eps", [6, 2], 3)
    assert both.shape == (8, 3) and torch.equal(both[6:], Draws(0, 5, 0, [4]).points("eps", [2], 3))
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
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8)).save(
        tmp_path / "images" / "a.png"
    )
    output = tmp_path / "new" / "tokens.safetensors"
    flags = ["--images", str(tmp_path / "images"), "--output", str(output)]
    encode.main([*flags, "--dinov2", str(dinov2)])
    assert "cond.tokens (2, 1374, 8) torch.float16" in capsys.readouterr().out
    stored = load_file(tmp_path / "new" / "tokens.safetensors")
    assert (
        set(stored) == {"cond.tokens", "uncond.tokens"}
        and not stored["uncond.tokens"].any()
        and stored["uncond.tokens"].shape == (1, 1374, 8)
    )

    import transformers

    model = transformers.Dinov2WithRegistersModel.from_pretrained(dinov2).eval()
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406])[:, None, None],
        torch.tensor([0.229, 0.224, 0.225])[:, None, None],
    )
    # opaque: x 20..49, y 10..19; middle (34.5, 14.5), side int(1.2 * 29) = 34
    cropped = (
        Image.fromarray(rgba)
        .crop((17.5, -2.5, 51.5, 31.5))
        .resize((518, 518), Image.Resampling.LANCZOS)
    )
    cropped = np.asarray(cropped).astype(np.float32) / 255
    plain = np.asarray(
        Image.open(tmp_path / "images" / "a.png").resize((518, 518), Image.Resampling.LANCZOS)
    )
    want = [plain, (cropped[..., :3] * cropped[..., 3:] * 255).astype(np.uint8)]
    for pixels, row in zip(want, stored["cond.tokens"]):
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


def test_a_root_or_a_network_of_it_is_a_teacher_to_encode_for(dinov2, tmp_path):
    """--teacher changes nothing with --images: the image encoder is not among TRELLIS's files."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "images" / "a.png")
    path = save_root(tmp_path, {SparseStructureFlowModel: SS})[SparseStructureFlowModel]
    flags = ["--images", str(tmp_path / "images"), "--dinov2", str(dinov2)]
    want = encode_trellis_images(tmp_path / "images", dinov2)
    for i, teacher in enumerate((tmp_path, path)):
        output = str(tmp_path / f"{i}.safetensors")
        encode.main(["--teacher", str(teacher), *flags, "--output", output])
        stored = load_file(output)
        assert stored.keys() == want.keys()
        assert all(torch.equal(stored[key], want[key]) for key in want)
