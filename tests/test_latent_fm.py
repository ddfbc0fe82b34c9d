"""latent_fm.py: the loss, guidance, the sampler, runs with resume, and folders of images nobody prepared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ENV, ROOT, perturbed
from helpers import dit_inputs as inputs
from helpers import small_dit as small
from PIL import Image
from safetensors.torch import load_file, save_file

import dmd
import latent_fm
from models.diffusion import Flow, ode_calls, predict_x0_eps, sample_ode, step_grid
from models.networks import WEIGHTS, load_network
from models.networks.dit import DiT
from models.pictures import picture
from models.plumbing import report
from models.plumbing.data import load_data, to_unit
from models.plumbing.run import run_main
from models.worlds import load_world
from models.worlds.measures import balanced_labels
from models.worlds.ring import RingTeacher

TINY = [
    "--max_train_steps",
    "6",
    "--train_batch_size",
    "4",
    "--width",
    "32",
    "--depth",
    "2",
    "--cond_dim",
    "16",
    "--sample_steps",
    "2",
    "--checkpointing_steps",
    "2",
    "--lr_warmup_steps",
    "2",
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the method --------------------------------------------------------------------------------------------------------


def test_flow_matching_loss_of_the_zero_network():
    """A network that says 0 pays mean |eps - x0|^2, which is 2 on unit data; also sample by sample."""
    net = small(size=(12, 12), patch=(4, 4))
    x0, eps, t = (
        normal(64, 2, 12, 12),
        normal(64, 2, 12, 12, seed=1),
        torch.rand(64, generator=torch.Generator().manual_seed(2)),
    )
    loss, error = latent_fm.flow_matching_loss(
        net, x0, eps, t, {"label": torch.zeros(64, dtype=torch.long)}
    )
    torch.testing.assert_close(error, (eps - x0).square().mean((1, 2, 3)))
    torch.testing.assert_close(loss.detach(), error.mean())
    assert float(loss.detach()) == pytest.approx(2, abs=0.06) and not error.requires_grad


def test_flow_matching_loss_noises_along_the_line():
    """The network sees x_t = (1 - t) x0 + t eps with t and cond, and the right answer costs nothing."""
    x0, eps, t = normal(6, 3), normal(6, 3, seed=1), torch.linspace(0, 1, 6)
    seen = {}

    def net(x, t, label):
        seen.update(x=x, t=t, label=label)
        return eps - x0

    loss, error = latent_fm.flow_matching_loss(net, x0, eps, t, {"label": 7})
    assert loss == 0 and not error.any() and seen["label"] == 7 and torch.equal(seen["t"], t)
    torch.testing.assert_close(seen["x"], (1 - t[:, None]) * x0 + t[:, None] * eps)
    assert torch.equal(seen["x"][0], x0[0]) and torch.equal(seen["x"][-1], eps[-1])


@pytest.mark.parametrize("p_u", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_at_the_stated_rate(p_u):
    """A share p_u becomes the null label, independent of the class; the rest stay; 0 and 1 mean never and always."""
    n = 40000
    label, coin = torch.arange(n) % 10, torch.rand(n, generator=torch.Generator().manual_seed(0))
    got = latent_fm.drop_labels(label, coin, p_u, 10)
    dropped = got == 10
    assert torch.equal(got[~dropped], label[~dropped]) and got.dtype == torch.int64
    assert float(dropped.double().mean()) == pytest.approx(
        p_u, abs=4 * (p_u * (1 - p_u) / n) ** 0.5
    )
    for k in range(10):
        assert float(dropped[label == k].double().mean()) == pytest.approx(
            p_u, abs=4.5 * (p_u * (1 - p_u) / n * 10) ** 0.5
        )


def test_guided_velocity():
    """v_u + gamma (v_c - v_u): gamma 1 is the conditional call itself, 0 the unconditional one, in between and beyond linear."""
    net = perturbed(small())
    x, t, label = inputs(net)
    with torch.no_grad():
        v_c, v_u = net(x, t, label), net(x, t)
        assert torch.equal(
            latent_fm.guided_velocity(net, x, t, label, 3, 1), v_c
        ) and not torch.allclose(v_c, v_u)
        for gamma in (0.0, 0.5, 1.0001, 3.0):
            torch.testing.assert_close(
                latent_fm.guided_velocity(net, x, t, label, 3, gamma),
                v_u + gamma * (v_c - v_u),
                rtol=1e-4,
                atol=1e-4,
            )


@pytest.mark.parametrize("scale, rows", [(1.0, 5), (2.0, 10)])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_sampler_is_the_guided_ode(scale, rows, solver):
    """sample integrates the guided velocity from noise over the shifted grid: ode_calls calls, on twice the batch when guided."""
    net, sizes = perturbed(small()), []
    net.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    z, _, label = inputs(net)
    got = latent_fm.sample(net, z, label, 4, scale, solver, 3.0)
    assert sizes == [rows] * ode_calls(4, solver) and not got.requires_grad
    with torch.no_grad():
        velocity = lambda x, t: net(x, t) + scale * (net(x, t, label) - net(x, t))  # noqa: E731
        want = sample_ode(
            lambda x, t: predict_x0_eps(velocity, Flow(), "flow_v", x, t),
            Flow(),
            z,
            step_grid(4, 3.0),
            solver,
        )
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_optimum_is_the_exact_velocity():
    """On the ring the closed-form velocity has a lower loss than itself with any error added, and by the error's square."""
    world, g = load_world("ring"), torch.Generator().manual_seed(0)
    x0, label = world.data(40000, 1)
    eps, t = torch.randn(40000, 2, generator=g), torch.rand(40000, generator=g) * 0.9 + 0.05
    exact = RingTeacher()
    for error in (0.2, -0.3):
        losses = [
            float(
                latent_fm.flow_matching_loss(
                    lambda x, t, label: exact(x, t, label) + e, x0, eps, t, {"label": label}
                )[0]
            )
            for e in (0.0, error)
        ]
        assert losses[1] - losses[0] == pytest.approx(error**2, abs=0.012)


def test_sampler_of_the_exact_velocity_draws_the_data():
    world, label = load_world("ring"), balanced_labels(2000, 4)
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    net = RingTeacher()
    net.num_classes = 4
    good = world.measure(latent_fm.sample(net, z, label, 32), label)
    assert good["accuracy"] > 0.99 and good["fd"] < 12  # x 1000; data against data is 1 to 3
    assert world.measure(latent_fm.sample(net, z, label, 1, solver="euler"), label)["fd"] > 300


# ---- runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 tiny images in a file, 3 classes."""
    path = tmp_path_factory.mktemp("data") / "data.safetensors"
    x0 = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_file({"x0": x0, "cond.label": torch.arange(24) % 3}, path)
    return str(path)


def state(folder):
    last = sorted((Path(folder) / "state").glob("step-*"))[-1]
    return {
        **load_file(last / "state.safetensors"),
        **{f"s.{k}": v for k, v in load_file(Path(folder) / "student" / WEIGHTS).items()},
    }


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resume_is_bit_equal(tmp_path, data, optimizer, monkeypatch):
    """Stopped in step 5 and resumed from step 4, with either optimiser; log.csv has every step once."""
    flags = [*TINY, "--data", data, "--optimizer", optimizer, "--logit_normal"]
    latent_fm.main([*flags, "--output_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as m:
        calls, real = [], latent_fm.flow_matching_loss

        def dies(*args):
            calls.append(0)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return real(*args)

        m.setattr(latent_fm, "flow_matching_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            latent_fm.main([*flags, "--output_dir", str(tmp_path / "broken")])
    latent_fm.main(
        [*flags, "--output_dir", str(tmp_path / "broken"), "--resume_from_checkpoint", "latest"]
    )
    a, b = state(tmp_path / "whole"), state(tmp_path / "broken")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = (tmp_path / "broken" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2", "3", "4", "5", "6"]


def test_two_ranks_are_one_process_with_twice_the_batch(tmp_path, data):
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launch, batch in (("one", [sys.executable], "8"), ("two", ranks, "4")):
        done = subprocess.run(
            [
                *launch,
                str(ROOT / "latent_fm.py"),
                *TINY,
                "--data",
                data,
                "--optimizer",
                "adamw",
                "--train_batch_size",
                batch,
                "--output_dir",
                str(tmp_path / name),
            ],
            capture_output=True,
            text=True,
            env=ENV,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    logs = [
        np.genfromtxt(tmp_path / n / "log.csv", delimiter=",", names=True) for n in ("one", "two")
    ]
    np.testing.assert_allclose(logs[0]["loss"], logs[1]["loss"], rtol=1e-4)
    np.testing.assert_allclose(logs[0]["grad_norm"], logs[1]["grad_norm"], rtol=1e-3)


def test_a_saved_teacher_is_sampled_and_distilled(tmp_path, data, capsys):
    """latent_fm.py's folder is a --teacher of dmd.py, and --sample of either refuses the other's student by name."""
    latent_fm.main(
        [*TINY, "--data", data, "--output_dir", str(tmp_path / "teacher"), "--save_fp16"]
    )
    tensors = load_file(tmp_path / "teacher" / "student" / WEIGHTS)
    assert {v.dtype for v in tensors.values()} == {torch.float16}
    latent_fm.main(
        ["--sample", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "samples")]
    )
    assert (tmp_path / "samples" / "samples.png").is_file()
    dmd.main(
        [
            "--teacher",
            str(tmp_path / "teacher"),
            "--output_dir",
            str(tmp_path / "student"),
            "--max_train_steps",
            "2",
            "--train_batch_size",
            "4",
            "--teacher_steps",
            "2",
            "--preview_samples",
            "3",
        ]
    )
    assert json.loads((tmp_path / "student" / "student" / "config.json").read_text())["size"] == [
        8,
        8,
    ]
    for script, folder, maker in ((dmd, "teacher", "latent_fm"), (latent_fm, "student", "dmd")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: script.main(["--sample", str(tmp_path / folder)]))
        assert (
            stop.value.code == 2
            and f"was made by {maker}: sample it with python {maker}.py" in capsys.readouterr().err
        )


def test_wrong_data(tmp_path, capsys, data):
    """One line and exit code 2 for data that cannot be trained on."""
    (
        (tmp_path / "empty").mkdir(),
        (tmp_path / "flat").mkdir(),
        (tmp_path / "junk" / "a").mkdir(parents=True),
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "x.png")
    (tmp_path / "junk" / "a" / "x.png").write_bytes(b"not a picture")
    save_file({"x0": torch.zeros(3, 1, 8, 8)}, tmp_path / "unlabelled.safetensors")
    save_file({"y": torch.zeros(3)}, tmp_path / "nothing.safetensors")
    save_file(
        {"x0": torch.zeros(3, 1, 8, 8), "cond.label": torch.tensor([0, 2, 2])},
        tmp_path / "gap.safetensors",
    )
    save_file(
        {"x0": torch.zeros(3, 5), "cond.label": torch.tensor([0, 1, 2])},
        tmp_path / "points.safetensors",
    )
    save_file(
        {"x0": torch.zeros(3, 1, 8, 8), "cond.label": torch.zeros(2)},
        tmp_path / "short.safetensors",
    )
    for flags, says in (
        (["--data", str(tmp_path / "empty")], "no class subfolders"),
        (["--data", str(tmp_path / "flat")], "no class subfolders"),
        (
            ["--data", str(tmp_path / "junk")],
            "no readable image in 1 class subfolders (1 files skipped)",
        ),
        (["--data", str(tmp_path / "unlabelled.safetensors")], "no cond.label"),
        (["--data", str(tmp_path / "nothing.safetensors")], "no tensor called x0"),
        (["--data", str(tmp_path / "gap.safetensors")], "must use every class"),
        (["--data", str(tmp_path / "points.safetensors")], "wanted images"),
        (["--data", str(tmp_path / "short.safetensors")], "cond.label has 2 rows, x0 has 3"),
        (["--data", "nowhere"], "--data nowhere"),
        (["--data", data, "--patch_size", "3"], "not divisible into patches"),
        (["--data", data, "--width", "40"], "multiple of 32"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: latent_fm.main([*TINY, *flags, "--output_dir", str(tmp_path / "run")]))
        error = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and says in error[-1] and error[-1].startswith("error: "), (
            flags,
            error,
        )
        assert not (tmp_path / "run").exists()


# ---- pictures nobody prepared --------------------------------------------------------------------------------------------


def test_every_kind_of_image_file(tmp_path, capsys):
    """What Pillow opens becomes RGB in [-1, 1] with the right colours; what it does not is named and skipped."""
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    red = Image.new("RGB", (40, 24), (200, 30, 10))
    red.save(folder / "01-rgb.png")
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "02-palette.png")
    Image.fromarray((ramp.astype(np.uint16) * 257)).save(folder / "03-16bit.png")
    Image.fromarray(ramp).save(folder / "04-grey.png")
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(
        folder / "05-transparent.png"
    )  # black under full transparency: white
    Image.new("RGB", (1, 1), (200, 30, 10)).save(folder / "06-one-pixel.png")
    red.save(folder / "07.jpg", quality=95)
    red.save(folder / "08.gif", save_all=True, append_images=[Image.new("RGB", (40, 24), "blue")])
    red.convert("CMYK").save(folder / "09-cmyk.jpg", quality=95)
    Image.new("LA", (16, 16), (0, 0)).save(folder / "10-grey-alpha.png")
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([0, 0, 0] * 256)
    palette.save(folder / "11-palette-transparent.png", transparency=0)
    Image.new("1", (16, 16), 1).save(folder / "12-one-bit.png")
    Image.fromarray(np.full((16, 16), 65535, np.int32)).save(folder / "13-32bit.tif")
    turned = Image.new("RGB", (32, 16), "white")
    turned.paste((0, 0, 0), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    turned.save(folder / "14-exif.jpg", exif=exif, quality=95)
    whole = (folder / "01-rgb.png").read_bytes()
    (folder / "15-cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "16-empty.png").write_bytes(b"")
    (folder / "17-text.png").write_text("hello")
    os.symlink(folder / "01-rgb.png", folder / "18-link.png")
    os.symlink(folder / "nowhere.png", folder / "19-dangling.png")
    (tmp_path / "images" / "b").mkdir()  # a class without images has no label
    (tmp_path / "images" / "c" / "deep").mkdir(parents=True)
    red.save(tmp_path / "images" / "c" / "deep" / "x.png")
    x, cond, names = load_data(str(tmp_path / "images"), (), 16)
    error = capsys.readouterr().err
    assert [line.split(":")[0].split("/")[-1] for line in error.splitlines()] == [
        "15-cut.png",
        "16-empty.png",
        "17-text.png",
        "19-dangling.png",
    ]
    assert all(line.startswith("skipped ") for line in error.splitlines())
    assert (
        x.shape == (15, 3, 16, 16)
        and x.dtype == torch.uint8
        and cond["label"].tolist() == [0] * 14 + [1]
        and names == ["a", "c"]
    )
    colour = torch.tensor([200.0, 30, 10])
    for i, tolerance in ((0, 0), (1, 3), (5, 0), (6, 6), (7, 4), (8, 6), (14, 0)):
        assert (x[i].float().mean((1, 2)) - colour).abs().max() <= tolerance, i
    for i in (2, 3):
        assert (x[i][0].float() - torch.from_numpy(ramp).float()).abs().max() <= 1
    for i in (4, 9, 10, 11, 12):
        assert x[i].min() == 255, i
    assert (
        x[13].float()[:, :6].mean() < 10 and x[13].float()[:, 10:].mean() > 245
    )  # the dark half, left in the file, is on top
    unit = to_unit(x)
    assert unit.min() >= -1 and unit.max() == 1


def test_a_folder_of_images_trains_end_to_end(tmp_path):
    for name, colour in (("red", (200, 30, 10)), ("blue", (10, 30, 200))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20 + i, 20), tuple(c + 5 * i for c in colour)).save(
                tmp_path / "images" / name / f"{i}.png"
            )
    (tmp_path / "images" / "red" / "broken.png").write_bytes(b"")
    latent_fm.main(
        [
            *TINY,
            "--data",
            str(tmp_path / "images"),
            "--resolution",
            "8",
            "--output_dir",
            str(tmp_path / "run"),
        ]
    )
    net, config = load_network(str(tmp_path / "run" / "student"))
    assert (
        isinstance(net, DiT)
        and config["class_names"] == ["blue", "red"]
        and net.latent_shape == (3, 8, 8)
        and config["world"] is None
    )
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.size[0] == 20 * (8 * 3 + 2)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["results"] == []


def test_data_row_shows_items_of_each_class(tmp_path, monkeypatch):
    """The data row of samples.png from a file read row by row: tile i is an item of class i % K, no item twice while there are others."""
    x0 = torch.linspace(-1, 1, 12).reshape(12, 1, 1, 1).expand(12, 3, 8, 8).contiguous()
    label = torch.tensor([0, 1, 1, 0] * 3)
    save_file({"x0": x0, "cond.label": label}, tmp_path / "data.safetensors")
    shown, real = [], picture
    monkeypatch.setattr(
        report, "picture", lambda x, world=None: shown.append(x.clone()) or real(x, world)
    )
    latent_fm.main(
        [
            "--data",
            str(tmp_path / "data.safetensors"),
            "--output_dir",
            str(tmp_path / "run"),
            "--max_train_steps",
            "1",
            "--train_batch_size",
            "2",
            "--width",
            "32",
            "--depth",
            "1",
            "--sample_steps",
            "1",
        ]
    )
    index = [int((x0[:, 0, 0, 0] - v).abs().argmin()) for v in shown[0][:, 0, 0, 0]]
    assert sorted(index[:12]) == list(range(12)) and all(
        label[j] == k for j, k in zip(index, balanced_labels(20, 2))
    )
