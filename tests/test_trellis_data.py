"""models/trellis_data.py: a folder in TRELLIS-500K's layout, with a drawn view for every object."""

import csv
import json
import types

import numpy as np
import pytest
import torch
from helpers import read_log, refusal_of
from PIL import Image
from test_meshes import STATS, save_tiny_dinov2
from test_trellis import CLASSES, points, save_root

import mdt_dist
from models import trellis_data
from models.draws import Draws
from models.files import UserError, load_json, save_json
from models.image_tokens import ImageTokens, prepare_image
from models.networks import load_network
from models.networks.trellis import SLatFlowModel, SparseStructureFlowModel
from models.trellis_data import Points, Structures, is_trellis_set, objects_of, open_trellis_set

STAGES = pytest.mark.parametrize(
    "cls", [SparseStructureFlowModel, SLatFlowModel], ids=["structure", "slat"]
)
SHA = ["aa", "bb", "cc", "low", "large", "unrendered", "missing"]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return save_tiny_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="module")
def set_500k(tmp_path_factory):
    """Three objects that can be used, of two views each, and four that cannot."""
    root, g = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    for kind in ("ss_latents", "latents"):
        (root / kind / "encoder").mkdir(parents=True)
    rows = []
    for i, name in enumerate(SHA):
        score, voxels = (4.0 if name == "low" else 6.0), (40000 if name == "large" else 6)
        rows.append({"sha256": name, "aesthetic_score": score, "num_voxels": voxels})
        if name != "missing":
            mean = g.standard_normal((3, 4, 4, 4)).astype(np.float32)
            np.savez(root / "ss_latents" / "encoder" / f"{name}.npz", mean=mean)
            coords = points((6,), 8, seed=i)[:, 1:].numpy().astype(np.uint8)
            feats = g.standard_normal((6, 3)).astype(np.float32)
            np.savez(root / "latents" / "encoder" / f"{name}.npz", coords=coords, feats=feats)
        if name != "unrendered":
            folder = root / "renders_cond" / name
            folder.mkdir(parents=True)
            for view in range(2):
                pixels = np.zeros((20, 20, 4), np.uint8)
                pixels[4:16, 4:16] = [40 * i, 200 * view, 90, 255]
                Image.fromarray(pixels).save(folder / f"{view:03d}.png")
            frames = [{"file_path": f"{view:03d}.png"} for view in range(2)]
            save_json({"frames": frames}, str(folder / "transforms.json"))
    with open(root / "metadata.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


def teacher_of(tmp_path, cls, width=8):
    """A stage whose root has statistics of the latent.  -> its path"""
    path = save_root(tmp_path, {cls: {**CLASSES[cls], "cond_channels": width}})[cls]
    pipeline = load_json(str(tmp_path / "pipeline.json"))
    pipeline["args"]["slat_normalization"] = STATS
    save_json(pipeline, str(tmp_path / "pipeline.json"))
    return path


@STAGES
def test_objects_and_views(set_500k, dinov2, tmp_path, capsys, cls):
    """What is left out is counted; latents by name; tokens of the first view, or of one drawn."""
    path = teacher_of(tmp_path, cls)
    net = load_network(path)[0]
    assert is_trellis_set(str(set_500k)) and not is_trellis_set(str(tmp_path))
    data, cond = open_trellis_set(str(set_500k), net, path, dinov2, "cpu")
    out = capsys.readouterr().out
    sparse = cls is SLatFlowModel
    large = "1 of more than 32768 points, " if sparse else ""
    text = f"{len(data)} objects; left out: 1 with no aesthetic score of 4.5 or more, "
    text += f"{large}1 without views, 1 without a latent"
    assert text in out and len(data) == (3 if sparse else 4)
    index = torch.tensor([2, 0])
    if cls is SLatFlowModel:
        feats, coords = data[index]
        stored = [np.load(set_500k / "latents" / "encoder" / f"{n}.npz") for n in ("cc", "aa")]
        want = np.concatenate([(f["feats"] - STATS["mean"]) / STATS["std"] for f in stored])
        assert np.allclose(feats, want, atol=1e-6)
        assert coords[:, 0].tolist() == [0] * 6 + [1] * 6
        assert np.array_equal(coords[:6, 1:], stored[0]["coords"])
        assert torch.equal(data.places(index), coords)
    else:
        stored = np.load(set_500k / "ss_latents" / "encoder" / "cc.npz")["mean"]
        assert torch.equal(data[index][0], torch.from_numpy(stored))
    views, encoder = cond["tokens"], ImageTokens(dinov2, "cpu")
    assert views.shape == (len(data), 1374, 8)
    want = {}
    for view in range(2):
        with Image.open(set_500k / "renders_cond" / "cc" / f"{view:03d}.png") as image:
            want[view] = encoder(prepare_image(image)[None])[0]
    assert torch.equal(views[torch.tensor([2])][0], want[0])
    assert not torch.allclose(want[0], want[1])
    drawn = views.drawn(Draws(0, 0, "student", range(8)), torch.full((8,), 2))
    kinds = [[torch.allclose(x, want[v], atol=1e-5) for v in range(2)] for x in drawn]
    assert all(sum(kind) == 1 for kind in kinds) and {*map(tuple, kinds)} == {
        (True, False), (False, True),
    }  # fmt: skip


def test_a_run_on_such_a_folder(set_500k, dinov2, tmp_path):
    """The second stage: the log has its points, and the report the distance to the teacher."""
    path = teacher_of(tmp_path, SLatFlowModel)
    run = tmp_path / "run"
    flags = f"--teacher {path} --data {set_500k} --dinov2 {dinov2} --output_dir {run} "
    flags += "--max_train_steps 1 --train_batch_size 2 --preview_samples 2 --teacher_steps 3 "
    mdt_dist.main([*flags.split(), "--guidance_vm", "1", "--guidance_vd", "1"])
    assert float(read_log(run)[0]["points"]) == 6
    rows = {row["name"]: row for row in load_json(str(run / "report.json"))["results"]}
    assert list(rows) == ["teacher", "teacher_same_steps", "teacher_1", "student", "student_1"]
    assert [row["nfe"] for row in rows.values()] == [6, 4, 2, 4, 2]
    assert "paired_mse" not in rows.pop("teacher")
    assert all(row["paired_mse"] > 0 and row["samples"] == 2 for row in rows.values())


def test_wrong_folders(set_500k, tmp_path, capsys, monkeypatch):
    """One line each, with the remedy; DINOv2 is not needed for it."""
    tiny = types.SimpleNamespace(width=8, length=5)
    monkeypatch.setattr(trellis_data, "ImageTokens", lambda dinov2, device: tiny)
    cls = SparseStructureFlowModel
    (tmp_path / "wide").mkdir()
    path, wide = teacher_of(tmp_path, cls), teacher_of(tmp_path / "wide", cls, width=10)
    (tmp_path / "text").mkdir()
    text = teacher_of(tmp_path / "text", cls, width=768)
    flags = ["--dinov2", "tiny", "--output_dir", str(tmp_path / "run"), "--teacher"]

    def refused(teacher, data, *more):
        return refusal_of(capsys, mdt_dist.main, *flags, teacher, "--data", str(data), *more)

    assert "makes tokens of width 8, the teacher takes 10" in refused(wide, set_500k)
    assert "this teacher takes tokens of prompts" in refused(text, set_500k)
    empty = tmp_path / "set"
    empty.mkdir()
    (empty / "metadata.csv").write_text("sha256\naa\n")
    assert "ss_latents/ has 0 folders (none), one for each encoder" in refused(path, empty)
    (empty / "ss_latents" / "encoder").mkdir(parents=True)
    error = refused(path, empty)
    assert "no object of metadata.csv can be used (1 without a latent)" in error
    (empty / "metadata.csv").write_text("name\naa\n")
    assert "has no column sha256" in refused(path, empty)
    assert "--dinov2: it is for --data FOLDER" in refused("ring", "ring")  # before any loading
    assert not (tmp_path / "run").exists()
    net = load_network(path)[0]
    with monkeypatch.context() as m:
        m.setattr(trellis_data, "LATENTS", {"sparse_structure": "latents"})
        with pytest.raises(UserError, match="cannot be read .*mean"):
            open_trellis_set(str(set_500k), net, path, "tiny", "cpu")
    net.latent_shape = (4, 4, 4, 4)
    with pytest.raises(UserError, match="latents are .3, 4, 4, 4., the teacher takes"):
        open_trellis_set(str(set_500k), net, path, "tiny", "cpu")
    slat = load_network(save_root(tmp_path / "text", {SLatFlowModel: CLASSES[SLatFlowModel]})[
        SLatFlowModel])[0]  # fmt: skip
    with pytest.raises(UserError, match="aa has coords .6, 3. and feats .6, 3."):
        open_trellis_set(str(set_500k), slat, str(tmp_path / "no" / "ckpts" / "x"), "tiny", "cpu")
    views = set_500k / "renders_cond" / "aa" / "transforms.json"
    kept = views.read_text()
    views.write_text(json.dumps({"frames": []}))
    try:
        with pytest.raises(UserError, match="a view in .*aa is of no use|cannot be used"):
            trellis_data.Views(str(set_500k), ["aa"], None).pixels("aa", 0)
    finally:
        views.write_text(kept)


def test_a_score_that_is_not_there(tmp_path):
    """As TRELLIS's filter has it: a blank cell is no score, and no column asks for none."""
    for name in ("a", "b", "c", "d"):
        (tmp_path / "renders_cond" / name).mkdir(parents=True)
        save_json({"frames": []}, str(tmp_path / "renders_cond" / name / "transforms.json"))
        np.savez(tmp_path / f"{name}.npz", mean=np.zeros(1))
    for header, want in (("sha256,aesthetic_score", ["a"]), ("sha256,num_voxels", list("abcd"))):
        (tmp_path / "metadata.csv").write_text(f"{header}\na,5\nb,\nc,nan\nd,4\n")
        said = []
        assert objects_of(str(tmp_path), str(tmp_path), 9, said.append) == want


def test_a_later_object_of_another_shape(tmp_path):
    """In the middle of training: a line that names the file."""
    for i, side in enumerate((4, 4, 3)):
        np.savez(tmp_path / f"s{i}.npz", mean=np.zeros((2, side, side, side), np.float32))
        where = dict(coords=np.zeros((6, side - 1), np.uint8), feats=np.zeros((6, 2), np.float32))
        np.savez(tmp_path / f"p{i}.npz", **where)
    structures = Structures(str(tmp_path), ["s0", "s1", "s2"])
    places = Points(str(tmp_path), ["p0", "p1", "p2"], (torch.zeros(2), torch.ones(2)))
    assert structures[torch.tensor([0, 1])].shape == (2, 2, 4, 4, 4)
    assert places[torch.tensor([1])][0].shape == (6, 2)
    for data, name in ((structures, "s2"), (places, "p2")):
        with pytest.raises(UserError, match=f"{name}.npz is not like the other latents"):
            data[torch.tensor([0, 2])]


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_views_of_more_than_8_bits(mode):
    """16 bits and floats are not clipped, as for all other pictures."""
    ramp = np.linspace(0, 1, 64)[None].repeat(64, 0)
    values = (65535 * ramp).astype(np.uint16) if mode == "I;16" else ramp.astype(np.float32)
    eight = Image.fromarray((255 * ramp).round().astype(np.uint8))
    pixels = prepare_image(Image.fromarray(values)).float()
    assert (pixels - prepare_image(eight).float()).abs().max() <= 2
