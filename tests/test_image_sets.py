"""--samples: sets of images of a saved student, of any script, rank by rank and after a kill."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import launch
from helpers import ROOT, killed, perturbed, refusal_of, small_dit
from PIL import Image
from safetensors.torch import load_file, save_file

import decoupled_dmd
import dmd
import latent_fm
import mdt_dist
import tdm
from models.files import UserError
from models.networks import network_config, save_network
from models.networks.autoencoders import PatchPCA
from models.networks.latent_space import LatentSpace
from models.plumbing import image_sets


def dit(seed):
    net = small_dit(seed, size=(16, 16), patch=(8, 8), channels=3, num_classes=10)
    return perturbed(net, seed)


def save_student(folder, method, **more):
    """A run folder with student/ of a small DiT for 10 classes, (3, 16, 16)."""
    net = dit(0)
    save_network(net, network_config(net), str(folder / "student"))
    sampler = {
        "method": method,
        "prediction": "flow_v",
        "schedule": {"type": "flow"},
        "times": [1.0, 0.5],
        "timestep_shift": 1.0,
        "rule": "renoise",
        "guidance_scale": 1.0,
        "sample_shape": [3, 16, 16],
        **more,
    }
    (folder / "student" / "sampler.json").write_text(json.dumps(sampler))
    return folder


def flags(run, out, n, *more):
    quick = ["--train_batch_size", "4", "--samples", n, "--output_dir", out]
    return [str(f) for f in ["--sample", run, *quick, *more]]


@pytest.fixture
def student(tmp_path):
    return save_student(tmp_path / "run", "dmd")


def read_npz(folder):
    with np.load(folder / "samples.npz") as f:
        return {name: f[name] for name in f.files}


def test_npz_png_and_jpg(tmp_path, student):
    """The evaluator's layout; the same images as PNGs and nearly as JPEGs, whose labels lie in
    dataset.json; and as samples.safetensors has them."""
    dmd.main(flags(student, tmp_path / "npz", 11))
    made = read_npz(tmp_path / "npz")
    assert list(made) == ["arr_0", "arr_1"] and made["arr_0"].shape == (11, 16, 16, 3)
    assert made["arr_0"].dtype == np.uint8 and made["arr_1"].dtype == np.int64
    assert made["arr_1"].tolist() == [*range(10), 0]
    assert sorted(os.listdir(tmp_path / "npz")) == ["samples.npz", "set.json"]
    for kind in ("png", "jpg"):
        dmd.main(flags(student, tmp_path / kind, 11, "--format", kind))
        read = [np.array(Image.open(p)) for p in sorted((tmp_path / kind).glob(f"*.{kind}"))]
        assert (
            np.abs(np.stack(read) - made["arr_0"].astype(float)).mean() < (kind == "jpg") * 9 + 1e-9
        )
        labels = json.loads((tmp_path / kind / "dataset.json").read_text())["labels"]
        assert labels == [[f"{i:06d}.{kind}", i % 10] for i in range(11)]
        Image.new("RGB", (99, 9)).save(tmp_path / kind / "samples.png")  # of --sample alone
        assert image_sets.open_images(tmp_path / kind, "--samples").n == 11
    dmd.main(
        ["--sample", str(student), "--preview_samples", "11", "--output_dir", str(tmp_path / "s")]
    )
    x = load_file(tmp_path / "s" / "samples.safetensors")["x0"]
    assert torch.equal(image_sets.to_bytes(x).permute(0, 2, 3, 1), torch.from_numpy(made["arr_0"]))


def test_random_labels(tmp_path, student):
    """They are drawn, of the seed alone, and the images are of them."""
    dmd.main(flags(student, tmp_path / "a", 40, "--labels", "random"))
    dmd.main(flags(student, tmp_path / "b", 20, "--labels", "random"))
    a, b = read_npz(tmp_path / "a"), read_npz(tmp_path / "b")
    counts = np.bincount(a["arr_1"], minlength=10)
    assert len(counts) == 10 and counts.std() > 0.5
    assert np.array_equal(a["arr_0"][:20], b["arr_0"]) and np.array_equal(
        a["arr_1"][:20], b["arr_1"]
    )
    dmd.main(flags(student, tmp_path / "c", 20))
    c = read_npz(tmp_path / "c")
    same = b["arr_1"] == c["arr_1"]
    assert 0 < same.sum() < 20
    assert [np.array_equal(x, y) for x, y in zip(b["arr_0"], c["arr_0"])] == same.tolist()


@pytest.mark.parametrize("n", [11, 3])
def test_two_ranks_write_what_one_writes(tmp_path, student, n):
    """Also where the second rank has nothing to do."""
    done = launch(ROOT / "dmd.py", flags(student, tmp_path / "two", n), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("images:") == 1
    dmd.main(flags(student, tmp_path / "one", n))
    one, two = read_npz(tmp_path / "one"), read_npz(tmp_path / "two")
    difference = np.abs(one["arr_0"].astype(int) - two["arr_0"])
    assert difference.max() <= 1 and difference.mean() < 1e-3  # a rounding on the edge
    assert np.array_equal(one["arr_1"], two["arr_1"])


@pytest.mark.parametrize("kind, name, n", [("npz", "chunks", 2), ("png", "000006.png", 1)])
def test_the_same_command_goes_on_after_a_kill(tmp_path, monkeypatch, student, kind, name, n):
    """Chunks that are there are kept and not drawn again."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    killed(tmp_path, "dmd", "replace", name, n, *flags(student, out, 11, "--format", kind))
    if kind == "png":
        with pytest.raises(UserError, match="is not whole: go on with the command"):
            image_sets.open_images(out, "--samples")
    drawn, real = [], dmd.sample

    def counted(student, diffusion, noise, *more):
        drawn.append(len(noise()))
        return real(student, diffusion, noise, *more)

    monkeypatch.setattr(dmd, "sample", counted)
    dmd.main(flags(student, out, 11, "--format", kind))
    assert drawn == [4, 3]
    dmd.main(flags(student, out, 11, "--format", kind))
    assert drawn == [4, 3]  # whole, so nothing is drawn
    dmd.main(flags(student, whole, 11, "--format", kind))
    left = [p for p in out.iterdir() if ".tmp-" not in p.name]
    assert sorted(p.name for p in left) == sorted(p.name for p in whole.iterdir())
    for path in whole.iterdir():
        if path.suffix != ".npz":  # zip files hold the time
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    if kind == "npz":
        assert all(np.array_equal(v, read_npz(whole)[k]) for k, v in read_npz(out).items())


def test_another_command_does_not_go_on(tmp_path, capsys, student):
    out = tmp_path / "out"
    dmd.main(flags(student, out, 5))
    for more in (["--seed", "1"], ["--labels", "random"], ["--format", "png"]):
        line = refusal_of(capsys, dmd.main, *flags(student, out, 5, *more))
        assert "has images that were made with other" in line
    assert "other samples" in refusal_of(capsys, dmd.main, *flags(student, out, 6))
    save_network(dit(1), network_config(dit(1)), str(student / "student"))
    assert "made with other student" in refusal_of(capsys, dmd.main, *flags(student, out, 5))


def test_other_scripts(tmp_path):
    """Their students write images too; tdm in the step count that is asked for."""
    save_student(tmp_path / "d", "decoupled_dmd")
    decoupled_dmd.main(flags(tmp_path / "d", tmp_path / "d-samples", 5))
    assert read_npz(tmp_path / "d-samples")["arr_0"].shape == (5, 16, 16, 3)
    grids = {"1": [1.0, 0.0], "2": [1.0, 0.5, 0.0]}
    save_student(tmp_path / "t", "tdm", grids=grids, steps_cond=False)
    for n in ("1", "2"):
        out = tmp_path / f"t{n}"
        tdm.main(flags(tmp_path / "t", out, 5, "--student_steps", n))
    one, two = (read_npz(tmp_path / name)["arr_0"] for name in ("t1", "t2"))
    assert one.shape == (5, 16, 16, 3) and not np.array_equal(one, two)


# ---- latent_fm -----------------------------------------------------------------------------------


def save_latent_run(folder):
    """A latent model with a patch-PCA autoencoder, (3, 32, 32) <- (12, 8, 8)."""
    x = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    space = LatentSpace(PatchPCA(3, 4, 12).fit(x))
    space.measure_norm([space.own_moments(x)], "scale")
    net = small_dit(size=(8, 8), patch=(4, 4), channels=12, num_classes=4)
    save_network(net, network_config(net), str(folder / "student"))
    space.save(str(folder / "autoencoder"))
    sampler = {"method": "latent_fm", "prediction": "flow_v", "schedule": {"type": "flow"}}
    sampler |= {"times": [1.0, 0.5], "timestep_shift": 1.0, "rule": "euler", "guidance_scale": 2.0}
    sampler |= {"task": "class", "data": "shapes"}
    (folder / "student" / "sampler.json").write_text(json.dumps(sampler))
    return space


def test_latents_are_decoded_and_data_reconstructed(tmp_path):
    space = save_latent_run(tmp_path / "run")
    latent_fm.main(flags(tmp_path / "run", tmp_path / "s", 6))
    made = read_npz(tmp_path / "s")
    assert made["arr_0"].shape == (6, 32, 32, 3) and made["arr_1"].tolist() == [0, 1, 2, 3, 0, 1]
    folder = tmp_path / "data" / "class"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 32, 32, 3), np.uint8)
    for i, image in enumerate(pictures):
        Image.fromarray(image).save(folder / f"{i}.png")
    more = ["--reconstruct", "--data", tmp_path / "data", "--resolution", "32"]
    latent_fm.main(
        [
            f
            for f in flags(tmp_path / "run", tmp_path / "r", 9, *more)
            if f not in ("--samples", "9")
        ]
    )
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    plain = image_sets.to_bytes(space.to_pixels(space.to_latents(x))).permute(0, 2, 3, 1)
    again = read_npz(tmp_path / "r")
    assert np.abs(again["arr_0"].astype(int) - plain.numpy()).max() <= 1
    assert again["arr_1"].tolist() == [0] * 5
    assert (
        np.abs(again["arr_0"].astype(int) - pictures).mean() > 5
    )  # an autoencoder loses something


# ---- refusals ------------------------------------------------------------------------------------


def test_what_is_no_image_is_refused(tmp_path, capsys, student):
    latents = save_student(tmp_path / "latents", "dmd", sample_shape=[4, 16, 16])
    line = refusal_of(capsys, dmd.main, *flags(latents, tmp_path / "x", 4))
    assert "samples are (4, 16, 16), which are no images: leave it out; --preview_samples N" in line
    solids = save_student(tmp_path / "solids", "mdt_dist", sample_shape=[1, 4, 4, 4])
    net = small_dit(0, size=(4, 4, 4), patch=(2, 2, 2), channels=1, num_classes=10)
    save_network(net, network_config(net), str(solids / "student"))
    line = refusal_of(capsys, mdt_dist.main, *flags(solids, tmp_path / "x", 4))
    assert "samples are (1, 4, 4, 4), which are no images: leave it out" in line
    line = refusal_of(capsys, dmd.main, "--samples", "4")
    assert "give --sample FOLDER with it" in line
    line = refusal_of(capsys, dmd.main, "--sample", str(student), "--format", "png")
    assert "--format is for sets of images: give --samples N with it" in line
    save_latent_run(tmp_path / "run")
    inpaint = json.loads((tmp_path / "run/student/sampler.json").read_text()) | {"task": "inpaint"}
    (tmp_path / "run/student/sampler.json").write_text(json.dumps(inpaint))
    line = refusal_of(capsys, latent_fm.main, *flags(tmp_path / "run", tmp_path / "x", 4))
    assert "--task inpaint fills pictures in" in line
    assert not (tmp_path / "x").exists()


def test_numbers_that_are_not_finite(tmp_path, monkeypatch, student):
    monkeypatch.setattr(dmd, "sample", lambda *a: torch.full((4, 3, 16, 16), float("nan")))
    with pytest.raises(UserError, match="some of images 0 to 3 are not finite"):
        dmd.main(flags(student, tmp_path / "x", 4))


def test_latents_are_not_reconstructed(tmp_path):
    """What --data has of them was encoded elsewhere, and there is no picture to compare with."""
    latents = str(tmp_path / "latents.safetensors")
    save_file({"mean": torch.zeros(3, 3, 8, 8), "std": torch.ones(3, 3, 8, 8)}, latents)
    for data, task, says in (
        (latents, "class", f"--reconstruct: --data {latents} has latents: give pictures"),
        (None, "class", "--data: --reconstruct needs pictures: give a folder of them"),
        (None, "inpaint", "--data: --task inpaint needs pictures: give a folder of them"),
    ):
        args = SimpleNamespace(data=data, reconstruct=task == "class", task=task)
        said = [why for wrong, why in latent_fm.wrong_pictures(args, True, None) if wrong]
        assert said == [says]
