"""latent_fm.py: the loss, guidance, the sampler, runs with resume, and folders of any images."""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import dit_inputs as inputs
from helpers import perturbed, refusal_of, saved_tensors
from helpers import small_dit as small
from PIL import Image
from safetensors.torch import load_file, save_file

import dmd
import latent_fm
from models.diffusion import Flow, ode_calls, predict_x0_eps, sample_ode, step_grid
from models.networks import WEIGHTS, load_network
from models.networks.dit import DiT
from models.networks.dit_imagenet import DIT_B_2
from models.pictures import picture
from models.plumbing import report
from models.plumbing.data import load_data, to_unit
from models.plumbing.run import run_main
from models.worlds import load_world
from models.worlds.measures import balanced_labels
from models.worlds.ring import RingTeacher

TINY = """--max_train_steps 6 --train_batch_size 4
    --sample_steps 2 --checkpointing_steps 2 --lr_warmup_steps 2""".split()
SIZES = "--width 32 --depth 2 --cond_dim 16".split()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(folder, *flags):
    """latent_fm.py with tiny sizes, into this folder."""
    sizes = [] if "DiT-B/2" in flags else SIZES  # which has its own
    latent_fm.main([*TINY, *sizes, *map(str, flags), "--output_dir", str(folder)])


# ---- the method ----------------------------------------------------------------------------------


def test_flow_matching_loss_of_the_zero_network():
    """A network that says 0 has loss mean |eps - x0|^2, which is 2 on unit data.

    This holds sample by sample too.
    """
    net = small(size=(12, 12), patch=(4, 4))
    x0, eps = normal(64, 2, 12, 12), normal(64, 2, 12, 12, seed=1)
    t = torch.rand(64, generator=torch.Generator().manual_seed(2))
    cond = {"label": torch.zeros(64, dtype=torch.long)}
    loss, error = latent_fm.flow_matching_loss(net, x0, eps, t, cond)
    torch.testing.assert_close(error, (eps - x0).square().mean((1, 2, 3)))
    torch.testing.assert_close(loss.detach(), error.mean())
    assert float(loss.detach()) == pytest.approx(2, abs=0.06) and not error.requires_grad


def test_flow_matching_loss_noises_along_the_line():
    """The network sees x_t = (1 - t) x0 + t eps, t and cond, and the right answer costs nothing."""
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
    """A share p_u becomes the null label, whatever the class, and the rest stays.

    0 and 1 mean never and always.
    """
    n = 40000
    label, coin = torch.arange(n) % 10, torch.rand(n, generator=torch.Generator().manual_seed(0))
    got = latent_fm.drop_labels(label, coin, p_u, 10)
    dropped = got == 10
    error = (p_u * (1 - p_u) / n) ** 0.5
    assert torch.equal(got[~dropped], label[~dropped]) and got.dtype == torch.int64
    assert float(dropped.double().mean()) == pytest.approx(p_u, abs=4 * error)
    for k in range(10):
        share = float(dropped[label == k].double().mean())
        assert share == pytest.approx(p_u, abs=4.5 * error * 10**0.5)


def test_guided_velocity():
    """v_u + gamma (v_c - v_u).

    gamma 1 is the conditional call itself and 0 the unconditional one; between and beyond them it
    is linear.
    """
    net = perturbed(small())
    x, t, label = inputs(net)
    with torch.no_grad():
        v_c, v_u = net(x, t, label), net(x, t)
        assert torch.equal(latent_fm.guided_velocity(net, x, t, label, 3, 1), v_c)
        assert not torch.allclose(v_c, v_u)
        for gamma in (0.0, 0.5, 1.0001, 3.0):
            got = latent_fm.guided_velocity(net, x, t, label, 3, gamma)
            torch.testing.assert_close(got, v_u + gamma * (v_c - v_u), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale, rows", [(1.0, 5), (2.0, 10)])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_sampler_is_the_guided_ode(scale, rows, solver):
    """sample integrates the guided velocity from noise over the shifted grid.

    It makes ode_calls calls, on twice the batch when guided.
    """
    net, sizes = perturbed(small()), []
    net.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    z, _, label = inputs(net)
    got = latent_fm.sample(net, z, label, 4, scale, solver, 3.0)
    assert sizes == [rows] * ode_calls(4, solver) and not got.requires_grad

    def velocity(x, t):
        return net(x, t) + scale * (net(x, t, label) - net(x, t))

    def predict(x, t):
        return predict_x0_eps(velocity, Flow(), "flow_v", x, t)

    with torch.no_grad():
        want = sample_ode(predict, Flow(), z, step_grid(4, 3.0), solver)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_optimum_is_the_exact_velocity():
    """On the ring the velocity in closed form has a lower loss than itself with any error added.

    The difference is the error's square.
    """
    world, g = load_world("ring"), torch.Generator().manual_seed(0)
    x0, label = world.data(40000, 1)
    eps, t = torch.randn(40000, 2, generator=g), torch.rand(40000, generator=g) * 0.9 + 0.05
    exact = RingTeacher()

    def loss(error):
        def net(x, t, label):
            return exact(x, t, label) + error

        return float(latent_fm.flow_matching_loss(net, x0, eps, t, {"label": label})[0])

    for error in (0.2, -0.3):
        assert loss(error) - loss(0.0) == pytest.approx(error**2, abs=0.012)


def test_sampler_of_the_exact_velocity_draws_the_data():
    world, label = load_world("ring"), balanced_labels(2000, 4)
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    net = RingTeacher()
    net.num_classes = 4
    good = world.measure(latent_fm.sample(net, z, label, 32), label)
    assert good["accuracy"] > 0.99 and good["fd"] < 12  # x 1000; data against data is 1 to 3
    assert world.measure(latent_fm.sample(net, z, label, 1, solver="euler"), label)["fd"] > 300


def test_loss_by_quarter_of_time():
    """Sums and numbers of the errors by quarter of t, over several batches; 0 and 1 count too."""
    totals = torch.zeros(4, 2)
    t = torch.tensor([0.0, 0.1, 0.25, 0.6, 0.99, 1.0])
    latent_fm.add_by_quarter(totals, t, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    latent_fm.add_by_quarter(totals, torch.tensor([0.3]), torch.tensor([7.0]))
    assert totals.tolist() == [[3.0, 2.0], [10.0, 2.0], [4.0, 1.0], [11.0, 2.0]]


def test_the_line_marked_paper_is_the_paper():
    """The command in the docstring parses, and no flag of it leaves the paper's algorithm."""
    lines = re.search(r"\n    paper +(python.*?)\n    \w", latent_fm.__doc__, re.S)[1]
    python, script, *flags = shlex.split(lines)
    assert (python, script) == ("python", "latent_fm.py")
    args = latent_fm.parse_args(flags)
    paper = dict(
        network="DiT-B/2",
        t_scale=1,
        sigma_min=0,
        label_dropout=0.1,
        logit_normal=False,
        timestep_shift=1,
        hflip=True,
        latent_norm="none",
        optimizer="adamw",
        learning_rate=1e-4,
        lr_warmup_steps=0,
        lr_decay_share=0,
        weight_decay=0,
        ema_decay=0,
        adam_betas=[0.9, 0.999],
        max_grad_norm=0,
        crop="adm",
        solver="dopri5",
        atol=1e-5,
        rtol=1e-5,
        guidance_scale=1.5,
    )
    assert {name: getattr(args, name) for name in paper} == paper


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 tiny images in a file, 3 classes."""
    path = tmp_path_factory.mktemp("data") / "data.safetensors"
    x0 = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_file({"x0": x0, "cond.label": torch.arange(24) % 3}, path)
    return str(path)


def state(folder):
    """All tensors of the last checkpoint and of student/."""
    last = sorted((Path(folder) / "state").glob("step-*"))[-1]
    student = load_file(Path(folder) / "student" / WEIGHTS)
    return saved_tensors(last) | {f"s.{k}": v for k, v in student.items()}


@pytest.mark.parametrize(
    "optimizer, network", [("muon", "small"), ("adamw", "small"), ("adamw", "DiT-B/2")]
)
def test_resume_is_bit_equal(tmp_path, data, optimizer, network, monkeypatch):
    """Stopped in step 5 and resumed from step 4, with either optimiser.

    log.csv has every step once. The paper's networks have embedders that all blocks share.
    """
    sizes = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8)
    monkeypatch.setitem(latent_fm.PAPER_NETWORKS, "DiT-B/2", {**DIT_B_2, **sizes})
    flags = ["--data", data, "--optimizer", optimizer, "--logit_normal", "--network", network]
    run(tmp_path / "whole", *flags)
    with monkeypatch.context() as m:
        calls, real = [], latent_fm.flow_matching_loss

        def dies(*args):
            calls.append(0)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return real(*args)

        m.setattr(latent_fm, "flow_matching_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", *flags)
    run(tmp_path / "broken", *flags, "--resume_from_checkpoint", "latest")
    a, b = state(tmp_path / "whole"), state(tmp_path / "broken")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = (tmp_path / "broken" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2", "3", "4", "5", "6"]


def test_a_saved_teacher_is_sampled_and_distilled(tmp_path, data, capsys):
    """latent_fm.py's folder is a --teacher of dmd.py.

    --sample of either script refuses the other's student by name.
    """
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    run(teacher, "--data", data, "--save_fp16")
    tensors = load_file(teacher / "student" / WEIGHTS)
    assert {v.dtype for v in tensors.values()} == {torch.float16}
    latent_fm.main(["--sample", str(teacher), "--output_dir", str(tmp_path / "samples")])
    assert (tmp_path / "samples" / "samples.png").is_file()
    short = "--max_train_steps 2 --train_batch_size 4 --teacher_steps 2 --preview_samples 3".split()
    dmd.main(["--teacher", str(teacher), "--output_dir", str(student), *short])
    assert json.loads((student / "student" / "config.json").read_text())["size"] == [8, 8]
    for script, folder, maker in ((dmd, teacher, "latent_fm"), (latent_fm, student, "dmd")):
        error = refusal_of(capsys, script.main, "--sample", str(folder))
        assert f"was made by {maker}: sample it with python {maker}.py" in error


def save_wrong_data(folder):
    """Data of many kinds that cannot be trained on."""
    (folder / "empty").mkdir()
    (folder / "flat").mkdir()
    (folder / "junk" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "flat" / "x.png")
    (folder / "junk" / "a" / "x.png").write_bytes(b"not a picture")
    images, labels = torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2])
    for name, tensors in {
        "unlabelled": {"x0": images},
        "nothing": {"y": torch.zeros(3)},
        "gap": {"x0": images, "cond.label": torch.tensor([0, 2, 2])},
        "points": {"x0": torch.zeros(3, 5), "cond.label": labels},
        "short": {"x0": images, "cond.label": torch.zeros(2)},
    }.items():
        save_file(tensors, folder / f"{name}.safetensors")


def test_wrong_data(tmp_path, capsys, data):
    """One line and exit code 2 for data that cannot be trained on."""
    save_wrong_data(tmp_path)
    wrong = [
        ("empty", "no class subfolders"),
        ("flat", "no class subfolders"),
        ("junk", "no readable image in 1 class subfolders (1 files skipped)"),
        ("unlabelled.safetensors", "no cond.label"),
        ("nothing.safetensors", "no tensor called x0"),
        ("gap.safetensors", "must use every class"),
        ("points.safetensors", "wanted images"),
        ("short.safetensors", "cond.label has 2 rows, x0 has 3"),
    ]
    wrong = [(["--data", str(tmp_path / name)], says) for name, says in wrong]
    wrong += [
        (["--data", "nowhere"], "--data nowhere"),
        (["--data", data, "--patch_size", "3"], "not divisible into patches"),
        (["--data", data, "--width", "40"], "multiple of 32"),
    ]
    for flags, says in wrong:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(lambda flags=flags: run(tmp_path / "run", *flags))
        error = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2, flags
        assert says in error[-1] and error[-1].startswith("error: "), (flags, error)
        assert not (tmp_path / "run").exists()


# ---- folders of images ---------------------------------------------------------------------------


def save_every_kind_of_image(folder, ramp):
    """Images a/01 to a/19 of all modes, some unreadable; b has none, c one in a subfolder."""
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    (folder / "c" / "deep").mkdir(parents=True)
    red, a = Image.new("RGB", (40, 24), (200, 30, 10)), folder / "a"
    red.save(a / "01-rgb.png")
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(a / "02-palette.png")
    Image.fromarray((ramp.astype(np.uint16) * 257)).save(a / "03-16bit.png")
    Image.fromarray(ramp).save(a / "04-grey.png")
    # black under full transparency, which shows as white
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(a / "05-transparent.png")
    Image.new("RGB", (1, 1), (200, 30, 10)).save(a / "06-one-pixel.png")
    red.save(a / "07.jpg", quality=95)
    red.save(a / "08.gif", save_all=True, append_images=[Image.new("RGB", (40, 24), "blue")])
    red.convert("CMYK").save(a / "09-cmyk.jpg", quality=95)
    Image.new("LA", (16, 16), (0, 0)).save(a / "10-grey-alpha.png")
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([0, 0, 0] * 256)
    palette.save(a / "11-palette-transparent.png", transparency=0)
    Image.new("1", (16, 16), 1).save(a / "12-one-bit.png")
    Image.fromarray(np.full((16, 16), 65535, np.int32)).save(a / "13-32bit.tif")
    turned, exif = Image.new("RGB", (32, 16), "white"), Image.Exif()
    turned.paste((0, 0, 0), (0, 0, 16, 16))
    exif[0x0112] = 6  # shown turned by 90 degrees
    turned.save(a / "14-exif.jpg", exif=exif, quality=95)
    whole = (a / "01-rgb.png").read_bytes()
    (a / "15-cut.png").write_bytes(whole[: len(whole) // 2])
    (a / "16-empty.png").write_bytes(b"")
    (a / "17-text.png").write_text("hello")
    os.symlink(a / "01-rgb.png", a / "18-link.png")
    os.symlink(a / "nowhere.png", a / "19-dangling.png")
    red.save(folder / "c" / "deep" / "x.png")


def test_every_kind_of_image_file(tmp_path, capsys):
    """What Pillow opens becomes RGB with the right colours; what it does not is named and skipped.

    A link to an image counts once, and a class without images gets no label.
    """
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    save_every_kind_of_image(tmp_path / "images", ramp)
    x, cond, names = load_data(str(tmp_path / "images"), 16)
    error = capsys.readouterr().err.splitlines()
    skipped = ["15-cut.png", "16-empty.png", "17-text.png", "19-dangling.png"]
    assert [line.split(":")[0].split("/")[-1] for line in error] == skipped
    assert all(line.startswith("skipped ") for line in error)
    assert x.shape == (15, 3, 16, 16) and x.dtype == torch.uint8
    assert cond["label"].tolist() == [0] * 14 + [1] and names == ["a", "c"]
    colour = torch.tensor([200.0, 30, 10])
    for i, tolerance in ((0, 0), (1, 3), (5, 0), (6, 6), (7, 4), (8, 6), (14, 0)):
        assert (x[i].float().mean((1, 2)) - colour).abs().max() <= tolerance, i
    for i in (2, 3):
        assert (x[i][0].float() - torch.from_numpy(ramp).float()).abs().max() <= 1
    for i in (4, 9, 10, 11, 12):
        assert x[i].min() == 255, i
    # the dark half, which is the left one in the file, is on top
    assert x[13].float()[:, :6].mean() < 10 and x[13].float()[:, 10:].mean() > 245
    unit = to_unit(x[torch.arange(15)])
    assert unit.min() >= -1 and unit.max() == 1


def test_a_folder_of_images_trains_end_to_end(tmp_path):
    for name, colour in (("red", (200, 30, 10)), ("blue", (10, 30, 200))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            image = Image.new("RGB", (20 + i, 20), tuple(c + 5 * i for c in colour))
            image.save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "red" / "broken.png").write_bytes(b"")
    run(tmp_path / "run", "--data", tmp_path / "images", "--resolution", 8)
    net, config = load_network(str(tmp_path / "run" / "student"))
    assert isinstance(net, DiT) and net.latent_shape == (3, 8, 8)
    assert config["class_names"] == ["blue", "red"] and config["world"] is None
    with Image.open(tmp_path / "run" / "samples.png") as shown:
        assert shown.size[0] == 20 * (8 * 3 + 2)
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["results"]
    assert [r["name"] for r in rows] == ["teacher", "guided"] and rows[0]["samples"] == 20
    assert all(r["patch_swd"] > 0 and r["diversity"] > 0 for r in rows)


def test_data_row_shows_items_of_each_class(tmp_path, monkeypatch):
    """The data row of samples.png, from a file that is read row by row.

    Column i shows an item of class i % K, and none is shown twice while there are others.
    """
    x0 = torch.linspace(-1, 1, 12).reshape(12, 1, 1, 1).expand(12, 3, 8, 8).contiguous()
    label = torch.tensor([0, 1, 1, 0] * 3)
    save_file({"x0": x0, "cond.label": label}, tmp_path / "data.safetensors")
    shown = []

    def spy(x, world=None):
        shown.append(x.clone())
        return picture(x, world)

    monkeypatch.setattr(report, "picture", spy)
    run(tmp_path / "run", "--data", tmp_path / "data.safetensors", "--max_train_steps", 1)
    index = [int((x0[:, 0, 0, 0] - v).abs().argmin()) for v in shown[0][:, 0, 0, 0]]
    assert sorted(index[:12]) == list(range(12))
    assert all(label[j] == k for j, k in zip(index, balanced_labels(20, 2)))
