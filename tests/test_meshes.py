"""TRELLIS's mesh decoder, FlexiCubes, PLY and GLB, and the command models.meshes.

Meshes are closed surfaces on random grids; the decoder is a second implementation on dense grids;
the files are read again by a parser written here, and by trimesh where it is installed.
"""

import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, refusal_of, relative
from PIL import Image
from safetensors.torch import load_file, save_file
from test_trellis import (
    DECODER,
    SLAT,
    SS,
    at,
    line,
    network,
    normed,
    place_of,
    points,
    sparse_conv,
    to_grid,
)

import mdt_dist
from models import encode, flexicubes, mesh_files, meshes
from models.files import save_json
from models.flexicubes import CORNERS, Mesh, extract, voxel_mesh
from models.networks import load_network
from models.networks.trellis import (
    SLatFlowModel,
    SparseStructureDecoder,
    SparseStructureFlowModel,
    occupied,
)
from models.networks.trellis_mesh import SLAT_MESH_B, SLatMeshDecoder

MESH = dict(
    resolution=8,
    model_channels=256,
    latent_channels=3,
    num_blocks=2,
    num_heads=4,
    window_size=4,
    representation_config={"use_color": True},
)


# ---- FlexiCubes ----------------------------------------------------------------------------------


def edges_of(mesh):
    """-> whether every edge has a triangle on either side; the most triangles on one side; the
    volume inside."""
    f = mesh.faces
    ends = torch.cat([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]])
    there, count = ends.unique(dim=0, return_counts=True)
    closed = torch.equal(there, ends.flip(1).unique(dim=0))
    a, b, c = mesh.vertices.double()[f].unbind(1)
    volume = (a * torch.linalg.cross(b, c)).sum() / 6
    return closed, int(count.max()), float(volume)


def whole_grid(R):
    """All cubes of a grid and where their corners lie.  -> (R^3, 3), (R^3, 8, 3) in 0..R."""
    coords = torch.cartesian_prod(*[torch.arange(R)] * 3)
    return coords, coords[:, None] + CORNERS


def test_a_ball_is_a_ball():
    """Without weights: closed, its radius and volume, triangles that face outwards."""
    R = 20
    coords, corners = whole_grid(R)
    features = torch.zeros(len(coords), 53)
    features[:, :8] = (corners / R - 0.5).norm(dim=2) - 0.3 + 1 / R
    given = features[:, :8].amin(1) < 2 / R  # what is not given is outside
    mesh = extract(features[given], coords[given], R)
    closed, most, volume = edges_of(mesh)
    assert closed and most == 1 and mesh.colours is None
    assert (mesh.vertices.norm(dim=1) - 0.3).abs().max() < 0.005
    assert volume == pytest.approx(4 / 3 * math.pi * 0.027, rel=0.04)


def test_any_signs_give_a_closed_surface(monkeypatch):
    """Random signs with random weights, displacements and colours: every case of a cube occurs, and
    no edge has four triangles. Without the exchange of cases some would."""
    R, g = 11, torch.Generator().manual_seed(1)
    s = torch.randn(R + 1, R + 1, R + 1, generator=g)
    for axis in range(3):  # outside at the border, where quads would lack a cube
        s.movedim(axis, 0)[[0, -1]] = 1
    coords, corners = whole_grid(R)
    features = torch.randn(len(coords), 101, generator=g)
    features[:, :8] = s[corners.unbind(-1)] + 1 / R
    mesh = extract(features, coords, R)
    closed, most, volume = edges_of(mesh)
    assert closed and most == 1 and volume > 0.1
    assert mesh.colours.shape == mesh.vertices.shape and 0 < mesh.colours.min()
    assert mesh.colours.max() < 1

    def plain(inside, cubes, resolution):
        return (inside.long() << torch.arange(8)).sum(1)

    monkeypatch.setattr(flexicubes, "cases_of", plain)
    assert edges_of(extract(features, coords, R))[1] > 1


def test_a_crossing_is_where_the_paper_puts_it():
    """One cube with one corner inside: u_e = (s_b a_b x_a - s_a a_a x_b) / (s_b a_b - s_a a_a),
    and the vertex is their mean by beta. The eight cubes around that corner make a box."""
    R, g = 4, torch.Generator().manual_seed(0)
    coords, corners = whole_grid(R)
    middle = (corners == 2).all(2)
    features = torch.randn(len(coords), 53, generator=g)
    features[:, :8] = torch.where(middle, -0.5, 0.25) + 1 / R
    features[:, 8:32] = 0
    mesh = extract(features, coords, R)
    assert mesh.vertices.shape == (8, 3) and mesh.faces.shape == (12, 3)
    assert edges_of(mesh)[:2] == (True, 1)
    first = int((coords == 1).all(1).nonzero())  # its corner 7 is the middle
    beta = 1 + 0.99 * features[first, -21:-9].tanh()
    alpha = 1 + 0.99 * features[first, -9:-1].tanh()
    want, total = torch.zeros(3), 0
    for e, (i, j) in enumerate(flexicubes.EDGES.tolist()):
        if 7 not in (i, j):
            continue
        other = i + j - 7
        inner, outer = -0.5 * alpha[7], 0.25 * alpha[other]
        crossing = (outer * torch.full((3,), 2.0) - inner * (1.0 + CORNERS[other])) / (
            outer - inner
        )
        want, total = want + beta[e] * crossing, total + beta[e]
    want = want / total / R - 0.5
    assert (mesh.vertices - want).norm(dim=1).min() < 1e-5


def test_nothing_inside_is_no_mesh():
    mesh = extract(torch.ones(3, 53), torch.arange(9).view(3, 3), 16)
    assert mesh.vertices.shape == (0, 3) and mesh.faces.shape == (0, 3)


def test_voxels_are_boxes():
    """Two touching boxes and one apart: closed, of their volume."""
    mesh = voxel_mesh(torch.tensor([[0, 0, 0], [1, 0, 0], [3, 3, 3]]), 4)
    closed, most, volume = edges_of(mesh)
    assert closed and most == 1 and volume == pytest.approx(3 / 64)
    assert len(mesh.faces) == 2 * (10 + 6) and len(mesh.vertices) == 12 + 8
    assert mesh.vertices.min() == -0.5 and mesh.vertices.max() == 0.5


# ---- the decoder ---------------------------------------------------------------------------------


def plain_group_norm(W, name, x):
    y = F.group_norm(x.T[None], 32, W[name + ".weight"], W[name + ".bias"], 1e-5)
    return y[0].T


def plain_decoder(W, c, x, xyz):
    """One object.  x (n, C), xyz (n, 3) -> features and places of the fine voxels."""
    D, H, R = c["model_channels"], c["num_heads"], c["resolution"]
    h = line(W, "input_layer", x) + torch.stack([place_of(p, D) for p in xyz.tolist()])
    for i in range(c["num_blocks"]):
        z, name = normed(h), f"blocks.{i}"
        qkv = line(W, name + ".attn.to_qkv", z).view(len(z), 3, H, D // H)
        window = (xyz + (c["window_size"] // 2 if i % 2 else 0)) // c["window_size"]
        same = (window[:, None] == window).all(2)
        q, k, v = qkv.permute(1, 2, 0, 3)
        score = (q @ k.transpose(1, 2) / (D // H) ** 0.5).masked_fill(~same, -math.inf)
        mixed = (score.softmax(-1) @ v).transpose(0, 1).reshape(len(z), D)
        h = h + line(W, name + ".attn.to_out", mixed)
        z = F.gelu(line(W, name + ".mlp.mlp.0", normed(h)), approximate="tanh")
        h = h + line(W, name + ".mlp.mlp.2", z)
    for i in range(2):
        name, R = f"upsample.{i}", 2 * R
        grid = to_grid(torch.ones(len(xyz), 1), xyz, R // 2)
        z = to_grid(F.silu(plain_group_norm(W, name + ".act_layers.0", h)), xyz, R // 2)
        old = to_grid(h, xyz, R // 2)
        twice = lambda a: F.interpolate(a, scale_factor=2)  # noqa: E731
        xyz = twice(grid)[0, 0].nonzero()
        z = sparse_conv(W, name + ".out_layers.0.conv", at(twice(z), xyz), xyz, R)
        z = F.silu(plain_group_norm(W, name + ".out_layers.1", z))
        z = sparse_conv(W, name + ".out_layers.3.conv", z, xyz, R)
        kernel = W[name + ".skip_connection.conv.weight"].flatten(1)
        h = z + at(twice(old), xyz) @ kernel.T + W[name + ".skip_connection.conv.bias"]
    return line(W, "out_layer", h), xyz


@torch.no_grad()
def test_the_decoder_is_the_plain_one():
    """Two objects at once, and each of them alone."""
    net = network(SLatMeshDecoder, MESH)
    coords = points((30, 9), 8)
    x = torch.randn(39, 3, generator=torch.Generator().manual_seed(0))
    features, fine = net(x, coords)
    assert features.shape == (64 * 39, 101) and fine.shape == (64 * 39, 4)
    W = net.state_dict()
    for sample in range(2):
        mine, own = coords[:, 0] == sample, fine[:, 0] == sample
        want, xyz = plain_decoder(W, net.config, x[mine], coords[mine, 1:])
        order = (fine[own][:, 1:] @ torch.tensor([32 * 32, 32, 1])).argsort()  # nonzero's
        assert torch.equal(fine[own][order, 1:], xyz)
        assert relative(features[own][order], want) < 1e-4
    with pytest.raises(ValueError, match="points lie outside of 0..7"):
        net(x, coords + 1)
    with pytest.raises(ValueError, match=re.escape("pass (N, 3) at (N, 4)")):
        net(x[:, :2], coords)


def test_names_and_shapes_of_the_released_decoder():
    """Those of slat_dec_mesh_swin8_B_64l8m256c_fp16."""
    with torch.device("meta"):
        net = SLatMeshDecoder(**SLAT_MESH_B)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    want = {"input_layer": (768, 8), "out_layer": (101, 96)}
    for i in range(12):
        want |= {f"blocks.{i}.attn.to_qkv": (2304, 768), f"blocks.{i}.attn.to_out": (768, 768)}
        want |= {f"blocks.{i}.mlp.mlp.0": (3072, 768), f"blocks.{i}.mlp.mlp.2": (768, 3072)}
    for i, (wide, narrow) in enumerate([(768, 192), (192, 96)]):
        want |= {f"upsample.{i}.act_layers.0": (wide,)}
        want |= {f"upsample.{i}.out_layers.0.conv": (narrow, 3, 3, 3, wide)}
        want |= {f"upsample.{i}.out_layers.1": (narrow,)}
        want |= {f"upsample.{i}.out_layers.3.conv": (narrow, 3, 3, 3, narrow)}
        want |= {f"upsample.{i}.skip_connection.conv": (narrow, 1, 1, 1, wide)}
    bias = {f"{name}.bias": shape[:1] for name, shape in want.items()}
    assert shapes == {f"{name}.weight": shape for name, shape in want.items()} | bias


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(attn_mode="full"), "attn_mode = 'full' is not implemented"),
        (dict(pe_mode="rope"), "pe_mode = 'rope' is not implemented"),
        (dict(model_channels=64), "model_channels = 64 is not a multiple of 256"),
    ],
)
def test_decoders_that_are_not_implemented(change, message):
    with pytest.raises(ValueError, match=message):
        SLatMeshDecoder(**{**MESH, **change})


# ---- files ---------------------------------------------------------------------------------------


def read_glb(path):
    """-> the JSON, and {name of an attribute or "indices": array}, read as glTF 2.0 says."""
    data = path.read_bytes()
    assert data[:4] == b"glTF" and data[4:8] == b"\2\0\0\0"
    assert int.from_bytes(data[8:12], "little") == len(data)
    chunks, i = {}, 12
    while i < len(data):
        size, kind = int.from_bytes(data[i : i + 4], "little"), data[i + 4 : i + 8]
        assert size % 4 == 0
        chunks[kind], i = data[i + 8 : i + 8 + size], i + 8 + size
    scene, body = json.loads(chunks[b"JSON"]), chunks.get(b"BIN\0", b"")
    assert scene["asset"]["version"] == "2.0"
    arrays = {}
    for mesh in scene.get("meshes", []):
        assert scene["scenes"][scene["scene"]]["nodes"] == [0] and scene["nodes"][0]["mesh"] == 0
        assert scene["buffers"] == [{"byteLength": len(body)}]
        (primitive,) = mesh["primitives"]
        for name, number in {**primitive["attributes"], "indices": primitive["indices"]}.items():
            accessor = scene["accessors"][number]
            view = scene["bufferViews"][accessor["bufferView"]]
            kind = {5126: "<f4", 5125: "<u4"}[accessor["componentType"]]
            width = {"SCALAR": 1, "VEC3": 3}[accessor["type"]]
            assert view["byteOffset"] % 4 == 0
            assert view["byteLength"] == 4 * width * accessor["count"]
            values = np.frombuffer(body, kind, width * accessor["count"], view["byteOffset"])
            arrays[name] = values.reshape(-1, width)
            if name == "POSITION":
                assert np.allclose(accessor["min"], arrays[name].min(0))
                assert np.allclose(accessor["max"], arrays[name].max(0))
    return scene, arrays


def read_ply(path):
    """-> vertices (K, 3), colours (K, 3) or None, faces (T, 3)."""
    head, body = path.read_bytes().split(b"end_header\n", 1)
    lines = head.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    K, T = (int(v.split()[2]) for v in lines if v.startswith("element"))
    kinds = {"float": "<f4", "uchar": "u1"}
    fields = [v.split()[1:] for v in lines if v.startswith("property") and "list" not in v]
    rows = np.frombuffer(body, [(name, kinds[kind]) for kind, name in fields], K)
    faces = np.frombuffer(body, [("n", "u1"), ("v", "<i4", 3)], T, rows.nbytes)
    assert rows.nbytes + faces.nbytes == len(body) and (faces["n"] == 3).all()
    place, colour = (
        np.stack([rows[n] for n in names if n in rows.dtype.names] or [[]], 1)
        for names in ("xyz", ("red", "green", "blue"))
    )
    return place, colour if len(fields) > 3 else None, faces["v"]


def tetrahedron():
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    faces = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    colours = torch.tensor([[0.0, 0.5, 1], [1, 0, 0], [0, 1, 0], [0.02, 0, 1]])
    return Mesh(vertices, faces, colours)


def test_files_hold_the_mesh(tmp_path):
    """z up in PLY, y up in GLB; screens' colours in PLY, linear light in GLB; normals outwards."""
    mesh, glb, ply = tetrahedron(), tmp_path / "a.glb", tmp_path / "a.ply"
    mesh_files.save_glb(mesh, str(glb))
    mesh_files.save_ply(mesh, str(ply))
    _, arrays = read_glb(glb)
    x, y, z = arrays["POSITION"].T
    assert np.array_equal(np.stack([x, -z, y], 1), mesh.vertices.numpy())
    assert np.array_equal(arrays["indices"].reshape(-1, 3), mesh.faces.numpy())
    assert np.allclose(np.linalg.norm(arrays["NORMAL"], axis=1), 1)
    assert ((arrays["POSITION"] - arrays["POSITION"].mean(0)) * arrays["NORMAL"]).sum(1).min() > 0
    assert np.allclose(arrays["COLOR_0"][0], [0, 0.2140, 1], atol=1e-4)
    assert np.allclose(arrays["COLOR_0"][3, 0], 0.02 / 12.92)
    vertices, colours, faces = read_ply(ply)
    assert np.array_equal(vertices, mesh.vertices.numpy())
    assert np.array_equal(faces, mesh.faces.numpy())
    assert colours[0].tolist() == [0, 128, 255]
    for path in (glb, ply):
        opened_by_trimesh(path, mesh)


def opened_by_trimesh(path, mesh):
    """Where it is installed."""
    try:
        import trimesh
    except ImportError:
        return
    found = trimesh.load(path, force="mesh", process=False)
    assert len(found.vertices) == len(mesh.vertices) and len(found.faces) == len(mesh.faces)
    assert found.is_watertight and found.volume > 0


def test_an_empty_mesh_is_a_file(tmp_path):
    mesh = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long))
    mesh_files.save_glb(mesh, str(tmp_path / "a.glb"))
    mesh_files.save_ply(mesh, str(tmp_path / "a.ply"))
    assert read_glb(tmp_path / "a.glb")[1] == {}
    assert len(read_ply(tmp_path / "a.ply")[0]) == 0


# ---- the command ---------------------------------------------------------------------------------

STATS = {"mean": [0.1, -0.2, 0.3], "std": [2.0, 1.0, 0.5]}
NAMES = {
    "sparse_structure_flow_model": SparseStructureFlowModel,
    "slat_flow_model": SLatFlowModel,
    "sparse_structure_decoder": SparseStructureDecoder,
    "slat_decoder_mesh": SLatMeshDecoder,
}
RELEASED = {  # as TRELLIS-image-large calls the files
    "sparse_structure_flow_model": "ss_flow_img_dit_L_16l8_fp16",
    "slat_flow_model": "slat_flow_img_dit_L_64l8p2_fp16",
    "sparse_structure_decoder": "ss_dec_conv3d_16l8_fp16",
    "slat_decoder_mesh": "slat_dec_mesh_swin8_B_64l8m256c_fp16",
}


def save_whole_root(root, cond_channels=10, names=NAMES):
    """TRELLIS's root with tiny networks that fit together: a grid of 8^3 and latents of 2^3."""
    (root / "ckpts").mkdir(parents=True)
    configs = {
        SparseStructureFlowModel: {**SS, "resolution": 2, "cond_channels": cond_channels},
        SLatFlowModel: {**SLAT, "cond_channels": cond_channels},
        SparseStructureDecoder: DECODER,
        SLatMeshDecoder: MESH,
    }
    for name, cls in names.items():
        path = str(root / "ckpts" / RELEASED[name])
        save_json({"name": cls.__name__, "args": configs[cls]}, path + ".json")
        save_file(network(cls, configs[cls]).state_dict(), path + ".safetensors")
    models = {name: f"ckpts/{RELEASED[name]}" for name in names}
    args = {"models": models, "slat_normalization": STATS}
    save_json({"name": "TrellisImageTo3DPipeline", "args": args}, str(root / "pipeline.json"))
    return root


DECODERS = {name: NAMES[name] for name in ("sparse_structure_decoder", "slat_decoder_mesh")}


def test_latents_become_points_and_meshes(tmp_path, capsys):
    """Points are what the decoder says; features are denormalised before the mesh decoder."""
    root = save_whole_root(tmp_path / "TRELLIS", names=DECODERS)
    g, structures = torch.Generator().manual_seed(0), str(tmp_path / "s.safetensors")
    x0 = torch.randn(2, 3, 2, 2, 2, generator=g)
    save_file({"x0": x0}, structures)
    output = str(tmp_path / "new" / "points.safetensors")
    teacher = ["--teacher", str(root)]
    meshes.main([*teacher, "--structures", structures, "--output", output])
    assert "2 object(s) of" in capsys.readouterr().out
    stored = load_file(output)
    decoder = load_network(str(root / "ckpts" / RELEASED["sparse_structure_decoder"]))[0]
    with torch.no_grad():
        want = occupied(decoder(x0))
    assert torch.equal(stored["coords"].long(), want[:, 1:])
    assert stored["offsets"].diff().tolist() == want[:, 0].bincount().tolist()

    folder = tmp_path / "voxels"
    meshes.main(["--points", output, "--voxels", "--output", str(folder), "--format", "ply"])
    vertices, colours, _ = read_ply(folder / "001.ply")
    assert colours is None and -0.5 <= vertices.min() and vertices.max() < 0

    latents, n = str(tmp_path / "l.safetensors"), 20
    coords = points((n,), 8)
    feats = torch.randn(n, 3, generator=g)
    at_points = {"coords": coords[:, 1:].int().contiguous(), "offsets": torch.tensor([0, n])}
    save_file({**at_points, "feats": feats}, latents)
    path = str(root / "ckpts" / RELEASED["slat_decoder_mesh"])
    meshes.main([*teacher, "--points", latents, "--output", str(tmp_path / "glb")])
    mesh = load_network(path)[0]
    mean, std = (torch.tensor(STATS[name]) for name in ("mean", "std"))
    with torch.no_grad():
        features, fine = mesh(feats * std + mean, coords)
    want = extract(features, fine[:, 1:], 32)
    _, arrays = read_glb(tmp_path / "glb" / "000.glb")
    assert len(want.faces) > 100 and arrays["indices"].size == want.faces.numel()
    assert np.allclose(arrays["POSITION"][:, 0], want.vertices[:, 0], atol=1e-5)


def test_wrong_input_is_one_line(tmp_path, capsys):
    """Each message says what to give instead."""
    root = save_whole_root(tmp_path / "TRELLIS", names=DECODERS)
    tensors = {
        "s": {"x0": torch.randn(1, 3, 2, 2, 2)},
        "flat": {"x0": torch.randn(1, 3)},
        "none": {"y": torch.zeros(1)},
        "p": {"coords": torch.zeros(1, 3).int(), "offsets": torch.tensor([0, 1])},
    }
    tensors["wide"] = {**tensors["p"], "feats": torch.zeros(1, 4)}
    tensors["f"] = {**tensors["p"], "feats": torch.zeros(1, 3)}
    for name, found in tensors.items():
        save_file(found, str(tmp_path / name))
    bare = tmp_path / "bare"
    save_whole_root(bare, names={})
    bad = save_whole_root(tmp_path / "bad", names=DECODERS)
    described = json.loads((bad / "pipeline.json").read_text())
    described["args"]["slat_normalization"] = {"mean": [0.0], "std": [1.0]}
    save_json(described, str(bad / "pipeline.json"))
    (tmp_path / "file").write_text("")
    mesh = root / "ckpts" / RELEASED["slat_decoder_mesh"]
    decoder = load_network(str(root / "ckpts" / RELEASED["sparse_structure_decoder"]))[0]
    empty = {k: v.clone() for k, v in decoder.state_dict().items()}
    empty["out_layer.2.bias"] -= 1e6
    void = save_whole_root(tmp_path / "void", names=DECODERS)
    path = void / "ckpts" / (RELEASED["sparse_structure_decoder"] + ".safetensors")
    save_file(empty, str(path))
    cases = {
        f"--teacher {root} --structures flat --output o.safetensors": "x0 has shape (1, 3), and",
        f"--teacher {root} --structures none --output o.safetensors": "has no tensor x0, but y",
        f"--teacher {void} --structures s --output o.safetensors": "row 0 of x0 occupies no voxel",
        f"--teacher {bare} --structures s --output o.safetensors": "names no sparse_structure_dec",
        f"--teacher {mesh} --structures s --output o.safetensors": "is a SLatMeshDecoder: give",
        f"--teacher {root} --structures s --output o": "points go to FILE.safetensors",
        f"--teacher {root} --points p --output o": "wanted coords, offsets, feats",
        f"--teacher {root} --points wide --output o": "feats has 4 channels, the mesh decoder",
        f"--teacher {bad} --points f --output o": "mean and std of its latents have 1 and 1",
        f"--teacher {root} --points f --output file/o": "cannot write --output",
        "--points p --output o": "--teacher: give TRELLIS's root",
        "--structures s --voxels --output o": "--voxels is for --points",
        "--points p --voxels --teacher t --output o": "--voxels needs no decoder",
    }
    for flags, message in cases.items():
        flags = [str(tmp_path / f) if f in tensors else f for f in shlex.split(flags)]
        flags[-1] = str(tmp_path / flags[-1])
        error = refusal_of(capsys, meshes.main, *flags)
        assert message in error, error
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.safetensors").exists()


# ---- from a picture to a mesh --------------------------------------------------------------------


def save_tiny_dinov2(folder):
    """A random encoder of DINOv2's kind, of width 8."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=518,
        patch_size=14,
        num_register_tokens=4,
    )
    transformers.Dinov2WithRegistersModel(config).save_pretrained(folder)
    return str(folder)


def lines_of_page():
    """The commands of docs/mdt_dist.md from pictures to meshes, in order."""
    page = (ROOT / "docs" / "mdt_dist.md").read_text()
    block = page.split("**From a picture to a mesh.**")[1].split("```bash\n")[1].split("```")[0]
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [re.sub(r"\s+#.*", "", line) for line in lines]


@pytest.mark.long
def test_from_a_picture_to_a_mesh(tmp_path, monkeypatch):
    """Both stages distilled from a tiny random root, then the page's commands, to a GLB that
    opens."""
    monkeypatch.chdir(tmp_path)
    dinov2 = save_tiny_dinov2(tmp_path / "dinov2")
    root = save_whole_root(tmp_path / "TRELLIS-image-large", cond_channels=8)
    (tmp_path / "FOLDER").mkdir()
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[10:30, 20:50] = [200, 100, 50, 255]
    Image.fromarray(pixels).save(tmp_path / "FOLDER" / "a.png")
    g, tokens = torch.Generator().manual_seed(0), torch.randn(4, 5, 8)
    save_file({"x0": torch.randn(4, 3, 2, 2, 2, generator=g), "cond.tokens": tokens}, "d")
    ragged = {
        "coords": points((6,) * 4, 8)[:, 1:].int().contiguous(),
        "feats": torch.randn(24, 3, generator=g),
        "offsets": torch.arange(0, 25, 6),
    }
    save_file({**ragged, "cond.tokens": tokens}, "e.safetensors")
    (tmp_path / "d").rename("d.safetensors")
    for stage, data in (("sparse_structure_flow_model", "d"), ("slat_flow_model", "e")):
        flags = f"--teacher {root}/ckpts/{RELEASED[stage]} --data {data}.safetensors "
        flags += "--max_train_steps 2 --train_batch_size 2 --preview_samples 2 --teacher_steps 2"
        mdt_dist.main(flags.split())
    for command in lines_of_page():
        words = shlex.split(command)
        main = {"mdt_dist.py": mdt_dist, "models.encode": encode, "models.meshes": meshes}
        at_command = 1 if words[1] != "-m" else 2
        more = ["--dinov2", dinov2] if words[at_command] == "models.encode" else []
        more = ["--preview_samples", "2"] if words[at_command] == "mdt_dist.py" else more
        main[words[at_command]].main([*words[at_command + 1 :], *more])
    for i in range(2):
        _, arrays = read_glb(tmp_path / "runs" / "meshes" / f"{i:03d}.glb")
        assert len(arrays["indices"]) > 100 and "COLOR_0" in arrays
        assert np.isfinite(arrays["POSITION"]).all() and abs(arrays["POSITION"]).max() <= 0.52
