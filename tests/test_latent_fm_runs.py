"""latent_fm.py as a user starts it: every task on the embedded world, folders of PNGs through an SD-shaped VAE, what is saved and refused."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import read_log, refusal_of
from PIL import Image
from safetensors.torch import load_file, save_file

import dmd
import latent_fm
from models.draws import Draws
from models.files import UserError, save_json
from models.networks import WEIGHTS, load_network, save_network
from models.networks.autoencoders import AutoencoderKL
from models.networks.dit_imagenet import DiTTransformer2DModel
from models.networks.latent_space import load_space
from models.plumbing import report
from models.plumbing.data import load_data, load_real_data, read_image, read_image_folder, to_unit
from models.plumbing.teachers import load_networks, load_teacher

TINY = [
    "--max_train_steps",
    "3",
    "--train_batch_size",
    "4",
    "--width",
    "32",
    "--depth",
    "1",
    "--cond_dim",
    "16",
    "--sample_steps",
    "2",
    "--checkpointing_steps",
    "2",
    "--lr_warmup_steps",
    "2",
]
VAE = dict(
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[8] * 4,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
    sample_size=32,
    scaling_factor=0.18215,
)  # f = 8, as Stable Diffusion's


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Measure 24 samples instead of thousands."""
    real, labels = report.many, latent_fm.balanced_labels
    monkeypatch.setattr(
        report, "many", lambda draw, n, batch=500: real(draw, 24 if n > 500 else n, batch)
    )
    for module in (latent_fm, report):
        monkeypatch.setattr(module, "balanced_labels", lambda n, k: labels(24 if n > 500 else n, k))


@pytest.fixture(scope="module")
def world_small():
    """shapes with 200 items to train on."""
    return ["--pool", "200"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """240 PNGs of 40 x 32 in two classes, maps of the same names, and a VAE in diffusers' layout -> root."""
    root, rng = tmp_path_factory.mktemp("real"), np.random.default_rng(0)
    for i in range(240):
        name, w = ("left", "right")[i % 2], int(rng.integers(8, 14))
        image = np.full((32, 40, 3), rng.integers(0, 90, 3), np.uint8)
        plan = np.zeros((32, 40), np.uint8)
        x = int(rng.integers(6, 10)) + (0 if name == "left" else 10)
        image[10:22, x : x + w], plan[10:22, x : x + w] = rng.integers(150, 255, 3), 1 + i % 2
        for kind, a in (("images", image), ("maps", plan)):
            (root / kind / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(a).save(root / kind / name / f"{i:03d}.png")
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE)
    save_network(
        vae,
        {"_class_name": "AutoencoderKL", "_diffusers_version": "0.35.0", **vae.config},
        str(root / "vae"),
    )
    return root


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


# ---- the embedded world --------------------------------------------------------------------------------------------------


def test_default_is_a_latent_class_model(tmp_path, world_small):
    """python latent_fm.py: shapes, patch-PCA, a grid, fd and accuracy in the report, the autoencoder beside the student."""
    latent_fm.main([*TINY, *world_small, "--output_dir", str(tmp_path / "run")])
    rows = {r["name"]: r for r in report_of(tmp_path / "run")["results"]}
    assert set(rows) == {"data", "reconstruction", "teacher", "guided", "euler_4", "euler_1"}
    assert all({"fd", "accuracy", "patch_swd", "diversity"} <= set(r) for r in rows.values())
    assert (
        rows["data"]["fd"] < rows["teacher"]["fd"]
        and rows["guided"]["nfe"] == 2 * rows["teacher"]["nfe"] == 6
    )
    net, config = load_network(str(tmp_path / "run" / "student"))
    assert (
        net.latent_shape == (12, 8, 8)
        and config["world"] == "shapes"
        and net.num_classes == 6
        and (tmp_path / "run" / "samples.png").is_file()
    )
    assert load_space(str(tmp_path / "run" / "autoencoder")).factor == 4
    assert len(read_log(tmp_path / "run")) == 3


def test_a_latent_teacher_is_distilled(tmp_path, world_small):
    """dmd.py --teacher of that run: measured and pictured in pixels, its student has the autoencoder beside it, and is sampled; with a GAN
    the world's data come as latents."""
    latent_fm.main([*TINY, *world_small, "--output_dir", str(tmp_path / "teacher")])
    dmd.main(
        [
            "--teacher",
            str(tmp_path / "teacher"),
            "--output_dir",
            str(tmp_path / "student"),
            "--max_train_steps",
            "1",
            "--train_batch_size",
            "4",
            "--teacher_steps",
            "0",
            "--preview_samples",
            "3",
        ]
    )
    assert {r["name"] for r in report_of(tmp_path / "student")["results"]} >= {"data", "student"}
    with Image.open(tmp_path / "student" / "samples.png") as picture:
        assert picture.size[0] == 3 * (32 * 2 + 2)
    a, b = (load_file(tmp_path / n / "autoencoder" / WEIGHTS) for n in ("teacher", "student"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    args = dmd.parse_args(["--teacher", str(tmp_path / "teacher")])
    teacher, student, _ = load_networks(args, dmd.WORLDS, torch.device("cpu"))
    data, _ = load_real_data(
        args, dmd.WORLDS, dmd.load_world("shapes"), teacher, student.latent_shape
    )
    assert tuple(data.shape[1:]) == (12, 8, 8) and data.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("task", ["uncond", "inpaint", "semantic"])
def test_tasks_on_the_world(tmp_path, world_small, task, capsys):
    """Each ends with its measures; known pixels stay exact; a run is sampled again with the solver asked for; dmd.py refuses what needs a context."""
    latent_fm.main([*TINY, *world_small, "--task", task, "--output_dir", str(tmp_path / "run")])
    rows = {r["name"]: r for r in report_of(tmp_path / "run")["results"]}
    net, config = load_network(str(tmp_path / "run" / "student"))
    assert net.num_classes == 0 and report_of(tmp_path / "run")["task"] == task
    assert (config.get("context_channels"), config.get("context_width")) == {
        "uncond": (None, None),
        "inpaint": (13, None),
        "semantic": (7, 12),
    }[task]
    row = rows["teacher"]
    if task == "uncond":
        assert "accuracy" not in row and row["fd"] > 0
    elif task == "inpaint":
        assert (
            row["known_error"] == 0 < row["known_mse_before"]
            and min(row["hole_mse"], row["mean_fill"], row["shuffled"]) > 0
        )
    else:
        assert 0 <= row["iou"] <= 1 and 0 <= row["iou_shuffled"] <= 1 and rows["data"]["iou"] > 0.9
    capsys.readouterr()
    latent_fm.main(
        [
            "--sample",
            str(tmp_path / "run"),
            "--solver",
            "dopri5",
            "--atol",
            "1e-2",
            "--rtol",
            "1e-2",
            "--output_dir",
            str(tmp_path / "again"),
        ]
    )
    out = capsys.readouterr().out
    assert (tmp_path / "again" / "samples.png").is_file() and not (
        tmp_path / "again" / "report.json"
    ).exists()
    nfe = float(
        out.splitlines()[-2].split()[1]
        if task != "uncond"
        else [line for line in out.splitlines() if line.startswith("teacher")][0].split()[1]
    )
    assert (nfe - 2) % 6 == 0 and nfe > 3
    assert "no labels to guide by" in refusal_of(
        capsys,
        latent_fm.main,
        "--sample",
        str(tmp_path / "run"),
        "--guidance_scale",
        "2",
        "--output_dir",
        str(tmp_path / "no"),
    )
    if task != "uncond":
        assert "takes context" in refusal_of(
            capsys,
            dmd.main,
            "--teacher",
            str(tmp_path / "run"),
            "--output_dir",
            str(tmp_path / "no"),
        )


def test_measures_of_tasks_know_right_from_wrong(tmp_path, world_small, monkeypatch):
    """A sampler that returns the truth has hole error near the autoencoder's and IoU near 1; one that returns another item does not."""
    from models.worlds import load_world
    from models.worlds.measures import balanced_labels

    world = load_world("shapes")
    label = balanced_labels(24, 6)
    truth = world.space.to_latents(world.data(24, 779, label)[0])
    calls = []

    def oracle(net, z, label, context=None, calls=None, **settings):
        order.append(0)
        calls.append(1)
        return (
            truth if len(order) == 1 else truth.roll(1, 0)
        )  # asked with the right context, then with the neighbour's

    for task in ("inpaint", "semantic"):
        order = []
        monkeypatch.setattr(latent_fm, "sample", oracle)
        latent_fm.main([*TINY, *world_small, "--task", task, "--output_dir", str(tmp_path / task)])
        row = {r["name"]: r for r in report_of(tmp_path / task)["results"]}["teacher"]
        if task == "inpaint":
            assert (
                row["hole_mse"] < 0.03 < row["mean_fill"] < row["shuffled"]
                and row["known_error"] == 0
                and row["known_mse_before"] < 0.02
            )
        else:
            assert row["iou"] > 0.8 and row["iou_shuffled"] < 0.6 and row["accuracy"] == 1
    assert not calls


def test_pixel_and_other_spaces_on_the_world(tmp_path, world_small):
    """identity: pixels at equal network; another PCA: measured through its own decoder, and not taken for the world's latents."""
    for name, flags, shape, reads in (
        ("pixels", ["--autoencoder", "identity", "--latent_norm", "none"], (3, 32, 32), "shapes"),
        ("pca8", ["--pca_channels", "8"], (8, 8, 8), None),
        ("channel", ["--latent_norm", "channel"], (12, 8, 8), None),
    ):
        latent_fm.main(
            [
                *TINY,
                *world_small,
                *flags,
                "--patch_size",
                "8" if name == "pixels" else "2",
                "--output_dir",
                str(tmp_path / name),
            ]
        )
        net, config = load_network(str(tmp_path / name / "student"))
        assert net.latent_shape == shape and config["world"] == reads
        rows = {r["name"]: r for r in report_of(tmp_path / name)["results"]}
        assert (
            ("reconstruction" in rows)
            == (name != "pixels")
            == (tmp_path / name / "autoencoder").is_dir()
        )


# ---- folders of images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, flags",
    [("class", ["--hflip"]), ("uncond", []), ("inpaint", ["--hflip"]), ("semantic", ["--hflip"])],
)
def test_folder_through_a_vae(tmp_path, folder, task, flags):
    """240 PNGs end to end: latents cached in one file, with mirrored ones, read in every step; pictures decoded; --sample finds VAE and data again."""
    if task == "semantic":
        flags = [*flags, "--maps", str(folder / "maps")]
    latent_fm.main(
        [
            *TINY,
            "--data",
            str(folder / "images"),
            "--autoencoder",
            str(folder / "vae"),
            "--task",
            task,
            *flags,
            "--cache_latents",
            str(tmp_path / "latents.safetensors"),
            "--latent_norm",
            "channel",
            "--output_dir",
            str(tmp_path / "run"),
        ]
    )
    cached = load_file(tmp_path / "latents.safetensors")
    assert (
        cached["mean"].shape == (240, 1 + ("--hflip" in flags), 4, 4, 4)
        and (cached["std"] > 0).all()
    )
    about = json.loads((tmp_path / "run" / "autoencoder" / "latents.json").read_text())
    assert about["autoencoder"] == str(folder / "vae") and len(about["std"]) == 4
    z = load_space(str(tmp_path / "run" / "autoencoder")).normed(
        cached["mean"][:, 0], cached["std"][:, 0]
    )
    total = z[0].var((0, 2, 3)) + z[1].square().mean((0, 2, 3))
    assert (total - 1).abs().max() < 0.01  # unit variance of what is sampled, not only of its mean
    net, _ = load_network(str(tmp_path / "run" / "student"))
    assert net.latent_shape == (4, 4, 4)
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.size[0] == 20 * (32 * 3 + 2)
    latent_fm.main(["--sample", str(tmp_path / "run"), "--output_dir", str(tmp_path / "again")])
    if task == "inpaint":
        assert report_of(tmp_path / "run")["results"][0]["known_error"] == 0


def test_cached_latents_are_those_of_every_step(tmp_path, folder):
    """With and without the cache, and resumed: the same losses; the mirrored item is the encoder's view of the mirrored image."""
    flags = [
        *TINY,
        "--data",
        str(folder / "images"),
        "--autoencoder",
        str(folder / "vae"),
        "--hflip",
        "--train_batch_size",
        "16",
    ]
    for name, more in (
        ("each", []),
        ("cache", ["--cache_latents", str(tmp_path / "c.safetensors")]),
    ):
        latent_fm.main([*flags, *more, "--output_dir", str(tmp_path / name)])
    a, b = (np.array([float(r["loss"]) for r in read_log(tmp_path / n)]) for n in ("each", "cache"))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    x = to_unit(read_image(str(folder / "images" / "left" / "000.png"), 32))[None]
    space = load_space(str(folder / "vae"))
    cached = load_file(tmp_path / "c.safetensors")["mean"][0]
    for view, of in ((cached[0], x), (cached[1], x.flip(-1))):
        torch.testing.assert_close(view, space.own_moments(of)[0][0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(cached[0], cached[1], atol=1e-3)
    latent_fm.main([*flags, "--output_dir", str(tmp_path / "plain"), "--max_train_steps", "1"])


def test_flips_reach_images_and_maps_alike(tmp_path, folder, monkeypatch):
    """Half of the items are mirrored; a mirrored image has the mirrored map."""
    seen, real = [], latent_fm.semantic_context
    encode = latent_fm.LatentSpace.moments
    images = []
    monkeypatch.setattr(
        latent_fm.LatentSpace,
        "moments",
        lambda self, x: images.append(x.clone()) or encode(self, x),
    )
    monkeypatch.setattr(
        latent_fm, "semantic_context", lambda maps, *a: seen.append(maps.clone()) or real(maps, *a)
    )
    latent_fm.main(
        [
            *TINY,
            "--data",
            str(folder / "images"),
            "--task",
            "semantic",
            "--maps",
            str(folder / "maps"),
            "--hflip",
            "--train_batch_size",
            "32",
            "--patch_size",
            "8",
            "--output_dir",
            str(tmp_path / "run"),
        ]
    )
    for x, maps in zip(images[:3], seen[:3]):
        bright = (x - x[:, :, :1, :1]).abs().amax(1) > 0.1
        assert torch.equal(bright, maps > 0)
    sides = torch.cat([(m > 0).float().mean(1).argmax(1) for m in seen[:3]])  # where a shape begins
    classes = torch.cat([m.flatten(1).amax(1) for m in seen[:3]])
    assert (
        len(sides[classes == 1].unique()) > 4 and sides[classes == 1].max() > 12
    )  # a left one that became a right one


def test_paper_networks_and_compile(tmp_path, folder, monkeypatch):
    """--network DiT-B/2 is diffusers' class with velocities and our clock, raw time with --t_scale 1; --compile trains what torch.compile returns."""
    compiled = []
    monkeypatch.setitem(
        latent_fm.PAPER,
        "DiT-B/2",
        dict(
            latent_fm.PAPER["DiT-B/2"], num_layers=1, num_attention_heads=2, attention_head_dim=12
        ),
    )
    monkeypatch.setattr(
        torch, "compile", lambda net: compiled.append(net) or (lambda *a, **k: net(*a, **k))
    )
    for scale, convention in (("1000", "flow"), ("1", "lfm")):
        latent_fm.main(
            [
                *TINY,
                "--data",
                str(folder / "images"),
                "--autoencoder",
                str(folder / "vae"),
                "--network",
                "DiT-B/2",
                "--t_scale",
                scale,
                "--compile",
                "--mixed_precision",
                "bf16",
                "--optimizer",
                "adamw",
                "--output_dir",
                str(tmp_path / scale),
            ]
        )
        net, _ = load_network(str(tmp_path / scale / "student"))
        assert (
            isinstance(net, DiTTransformer2DModel)
            and net.prediction == "flow_v"
            and net.convention == convention
            and net.num_classes == 2
        )
        assert net.proj_out_2.weight.abs().max() > 0
    assert len(compiled) == 2
    args = latent_fm.parse_args(["--data", "x", "--network", "DiT-B/2"])
    assert (args.optimizer, args.learning_rate, args.ema_decay, args.lr_decay_share) == (
        "adamw",
        1e-4,
        0.9999,
        0,
    )
    teacher = load_teacher(str(tmp_path / "1"), ())
    assert teacher.prediction == "flow_v" and teacher.net.latent_shape == (4, 4, 4)


def test_maps_nobody_prepared(tmp_path, folder, capsys):
    """Missing, coloured and misshapen maps are named and their images skipped; palette, 1-bit and 16-bit ones are read as numbers; crops agree."""
    images, maps = tmp_path / "images", tmp_path / "maps"
    images.mkdir(), maps.mkdir()
    plan = np.zeros((32, 40), np.uint8)
    plan[:, 14:] = 3
    for i in range(8):
        Image.new("RGB", (40, 32), (10 * i, 0, 0)).save(images / f"{i}.png")
    Image.fromarray(plan).save(maps / "0.png")
    palette = Image.fromarray(plan)
    palette.putpalette([7, 7, 7] * 256)
    palette.save(maps / "1.png")
    Image.fromarray(plan > 0).save(maps / "2.png")
    Image.fromarray(plan.astype(np.uint16)).save(maps / "3.png")
    Image.fromarray(plan).resize((80, 64), Image.Resampling.NEAREST).save(maps / "4.png")
    Image.new("RGB", (40, 32)).save(maps / "5.png")
    Image.fromarray(plan[:, :32]).save(maps / "6.png")
    x, cond, names = load_data(str(images), (), 16, flat=True, maps=str(maps))
    error = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0].rsplit("/", 1)[1] for line in error] == ["5.png", "6.png", "7.png"]
    assert (
        "mode RGB" in error[0]
        and "32 x 32, its image 40 x 32" in error[1]
        and "FileNotFound" in error[2]
    )
    assert len(x) == 5 and names == ["images"] and not cond["label"].any()
    want = torch.tensor([0] * 5 + [3] * 11, dtype=torch.uint8).expand(16, 16)
    for i in (0, 1, 3, 4):
        assert torch.equal(cond["map"][i], want), i
    assert torch.equal(cond["map"][2], want // 3)


def test_wrong_input(tmp_path, folder, capsys):
    """One line and exit code 2, before any training."""
    images, vae = str(folder / "images"), str(folder / "vae")
    save_file(
        {"x0": torch.zeros(3, 1, 8, 8), "cond.map": torch.zeros(3, 8, 8)},
        tmp_path / "floats.safetensors",
    )
    save_file(
        {"x0": torch.zeros(3, 1, 8, 8), "cond.map": torch.full((3, 8, 8), 255)},
        tmp_path / "none.safetensors",
    )
    save_file({"mean": torch.zeros(1), "std": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    for flags, says in (
        (["--task", "semantic", "--data", images], "needs --maps"),
        (["--task", "semantic", "--data", "glyphs"], "no segmentation maps"),
        (["--maps", images, "--data", images], "goes with --task semantic"),
        (["--task", "semantic", "--data", images, "--maps", "nowhere"], "goes with"),
        (
            ["--task", "semantic", "--data", str(tmp_path / "floats.safetensors")],
            "must hold integers",
        ),
        (["--task", "semantic", "--data", str(tmp_path / "none.safetensors")], "every map is 255"),
        (["--task", "inpaint", "--data", str(tmp_path / "none.safetensors")], "give --data FOLDER"),
        (["--task", "uncond", "--guidance_scale", "2"], "no labels to guide by"),
        (["--task", "inpaint", "--data", "clips"], "wanted images"),
        (["--data", "ring", "--autoencoder", "pca"], "use identity"),
        (["--data", images, "--autoencoder", "nowhere"], "nowhere is not a folder"),
        (["--data", images, "--autoencoder", vae, "--resolution", "12"], "not multiples of 8"),
        (["--data", images, "--autoencoder", "pca", "--pca_channels", "49"], "1 to 48 components"),
        (["--data", images, "--autoencoder", "pca", "--pca_patch", "5"], "divide by it"),
        (["--data", images, "--task", "inpaint", "--network", "DiT-B/2"], "use --network small"),
        (
            ["--data", images, "--autoencoder", vae, "--network", "DiT-B/2", "--t_scale", "7"],
            "--t_scale 1 or 1000",
        ),
        (
            [
                "--data",
                images,
                "--autoencoder",
                vae,
                "--cache_latents",
                str(tmp_path / "other.safetensors"),
            ],
            "was made for other data",
        ),
        (["--guidance_interval", "0.6", "0.5"], "LO must not be above HI"),
        (["--solver", "rk4"], "invalid choice"),
        (["--atol", "0"], "must be >= 1e-08"),
    ):
        error = refusal_of(
            capsys,
            lambda argv: latent_fm.main(argv),
            *TINY,
            "--pool",
            "100",
            *flags,
            "--output_dir",
            str(tmp_path / "run"),
        )
        assert says in error, (flags, error)
    with pytest.raises(UserError, match="no readable image with a map"):
        latent_fm.main(
            [
                *TINY,
                "--task",
                "semantic",
                "--data",
                images,
                "--maps",
                str(tmp_path / "empty"),
                "--output_dir",
                str(tmp_path / "run"),
            ]
        )
    moved = tmp_path / "moved"
    latent_fm.main([*TINY, "--data", images, "--autoencoder", vae, "--output_dir", str(moved)])
    about = json.loads((moved / "autoencoder" / "latents.json").read_text())
    save_json(
        {**about, "autoencoder": str(tmp_path / "gone")},
        str(moved / "autoencoder" / "latents.json"),
    )
    assert "put it back" in refusal_of(
        capsys, latent_fm.main, "--sample", str(moved), "--output_dir", str(tmp_path / "s")
    )
    save_json(
        {**about, "mean": [0.0, 1.0], "std": [1.0, 1.0]},
        str(moved / "autoencoder" / "latents.json"),
    )
    assert "has numbers for 2 channels" in refusal_of(
        capsys, latent_fm.main, "--sample", str(moved), "--output_dir", str(tmp_path / "s")
    )


def test_sampler_flags(tmp_path, world_small):
    """Flags given to --sample win over the saved ones, which win over the defaults; training has the defaults of its data."""
    args = latent_fm.parse_args([])
    assert (
        args.data,
        args.sample_steps,
        args.solver,
        args.guidance_scale,
        args.logit_normal,
        args.autoencoder,
    ) == ("shapes", 8, "heun", 1.5, True, "pca")
    assert latent_fm.parse_args(["--no-logit_normal"]).logit_normal is False
    args = latent_fm.parse_args(["--data", "glyphs"])
    assert (
        args.sample_steps,
        args.logit_normal,
        args.autoencoder,
        args.max_train_steps,
        args.t_scale,
    ) == (32, False, "identity", 8000, 1000.0)
    assert (
        latent_fm.parse_args(["--task", "inpaint"]).guidance_scale == 1
        and latent_fm.parse_args(["--task", "inpaint"]).output_dir
        == "runs/latent_fm-inpaint-shapes"
    )
    latent_fm.main(
        [
            *TINY,
            *world_small,
            "--solver",
            "euler",
            "--sample_steps",
            "3",
            "--guidance_scale",
            "2",
            "--output_dir",
            str(tmp_path / "run"),
        ]
    )
    seen, real = [], latent_fm.finish

    def spy(args, *rest):
        seen.append((args.solver, args.sample_steps, args.guidance_scale, args.task))

    latent_fm.finish = spy
    try:
        latent_fm.main(["--sample", str(tmp_path / "run"), "--output_dir", str(tmp_path / "a")])
        latent_fm.main(
            [
                "--sample",
                str(tmp_path / "run"),
                "--output_dir",
                str(tmp_path / "b"),
                "--solver",
                "heun",
                "--guidance_scale",
                "1.25",
            ]
        )
    finally:
        latent_fm.finish = real
    assert seen == [("euler", 3, 2.0, "class"), ("heun", 3, 1.25, "class")]


def test_loss_falls_towards_its_floor(tmp_path):
    """White unit-variance latents start at 2 and cannot go below pi / 2: a run on noise ends between, near the floor."""
    save_file(
        {"x0": torch.randn(4000, 1, 4, 4, generator=torch.Generator().manual_seed(0))},
        tmp_path / "white.safetensors",
    )
    latent_fm.main(
        [
            "--data",
            str(tmp_path / "white.safetensors"),
            "--task",
            "uncond",
            "--output_dir",
            str(tmp_path / "run"),
            "--max_train_steps",
            "150",
            "--width",
            "32",
            "--depth",
            "1",
            "--sample_steps",
            "1",
            "--lr_warmup_steps",
            "10",
            "--learning_rate",
            "5e-3",
        ]
    )
    loss = [float(r["loss"]) for r in read_log(tmp_path / "run")]
    assert loss[0] == pytest.approx(2, abs=0.15) and math.pi / 2 - 0.08 < np.mean(loss[-30:]) < 1.75


def test_posterior_enters_the_training(tmp_path, folder, monkeypatch):
    """With a VAE the network is trained on mean + std noise, fresh in every step; the same seed draws the same."""
    seen, real = [], latent_fm.flow_matching_loss
    monkeypatch.setattr(
        latent_fm,
        "flow_matching_loss",
        lambda net, x0, *a: seen.append(x0.clone()) or real(net, x0, *a),
    )
    monkeypatch.setattr(latent_fm, "finish", lambda *a: None)
    latent_fm.main(
        [
            *TINY,
            "--data",
            str(folder / "images"),
            "--autoencoder",
            str(folder / "vae"),
            "--output_dir",
            str(tmp_path / "run"),
        ]
    )
    space, x, _, _ = (
        load_space(str(folder / "vae")),
        *read_image_folder(str(folder / "images"), 32)[:3],
    )
    for step, x0 in enumerate(seen):
        draw = Draws(0, step, 0, range(4))
        z, std = space.moments(to_unit(x[draw.integer("item", 240)]))
        torch.testing.assert_close(
            x0, z + std * draw.normal("posterior", (4, 4, 4)), rtol=1e-4, atol=1e-5
        )
        assert (x0 - z).abs().max() > 0.01


def test_measures_use_the_neighbours_condition(tmp_path, world_small, monkeypatch):
    """The second sampling of inpainting sees the contexts rolled by one, from the same noise."""
    seen, real = [], latent_fm.sample

    def spy(net, z, label, context=None, **settings):
        seen.append((z.clone(), context.clone()))
        return real(net, z, label, context=context, **settings)

    monkeypatch.setattr(latent_fm, "sample", spy)
    monkeypatch.setattr(report, "many", lambda draw, n, batch=500: (draw(0, n), 1.0))
    latent_fm.main(
        [*TINY, *world_small, "--task", "inpaint", "--output_dir", str(tmp_path / "run")]
    )
    (z, c), (z_other, c_other) = seen
    assert (
        torch.equal(z, z_other)
        and torch.equal(c_other, c.roll(1, 0))
        and not torch.equal(c_other, c)
        and len(c) == 24
    )
