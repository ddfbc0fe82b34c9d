"""What latent_fm.py reads: classes of images, how they become squares, caches, maps, rows."""

import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, read_log, refusal_of
from PIL import Image
from safetensors.torch import save_file

import latent_fm
from models.draws import Draws
from models.files import UserError, open_tensors
from models.networks import save_network
from models.networks.autoencoders import AutoencoderKL
from models.networks.dit import DiT
from models.plumbing.data import Prompts, Rows, load_data, load_real_data
from models.plumbing.images import read_image, to_square
from models.plumbing.latents import Posteriors, is_posteriors
from models.plumbing.run import Run
from models.plumbing.training_data import mirror_classes
from models.worlds import load_world

TINY = """--max_train_steps 2 --train_batch_size 4 --width 32 --depth 1 --cond_dim 16
    --sample_steps 1 --resolution 8""".split()


def paint(path, colour, size=(8, 8)):
    """A PNG of one colour, a grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour,) * 3).save(path)


def greys(x):
    """The grey values of images (N, 3, H, W) of one colour each."""
    return x[torch.arange(len(x))][:, 0, 0, 0].tolist()


def refused(capsys, folder, task="class"):
    flags = ["--data", str(folder), "--task", task, "--output_dir", str(folder) + "-run"]
    return refusal_of(capsys, latent_fm.main, *TINY, *flags)


# ---- whose class an image has --------------------------------------------------------------------


@pytest.fixture
def described(tmp_path):
    """Eight images in two shards, as EDM's dataset_tool names them, and their true classes."""
    folder, labels = tmp_path / "edm", [0, 1, 2, 1, 0, 2, 1, 0]
    names = [f"{i // 4:05d}/img{i:08d}.png" for i in range(8)]
    for i, name in enumerate(names):
        paint(folder / name, 10 * i)
    (folder / "dataset.json").write_text(json.dumps({"labels": [*zip(names, labels)]}))
    return folder, labels


def test_labels_of_dataset_json_are_read(described):
    """Not the number of the shard, which these images would have by their folder."""
    folder, labels = described
    x, cond, names = load_data(str(folder), 8)
    assert greys(x) == [10 * i for i in range(8)]
    assert cond["label"].tolist() == labels and names == ["0", "1", "2"]
    x, _, _ = load_data(str(folder), 8, flat=True)
    assert greys(x) == [10 * i for i in range(8)]


@pytest.mark.parametrize(
    "labels, says",
    [
        (None, "has no labels"),
        ([["00000/img00000000.png", [0.0, 1.0]]], "class numbers from 0 on"),
        ([["00000/gone.png", 0]], "1 are not there"),
        ([["00000/img00000000.png", 2]], "must use every class"),
    ],
)
def test_wrong_labels_of_dataset_json(described, capsys, labels, says):
    folder, _ = described
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert says in refused(capsys, folder)


def test_null_labels_train_without_classes(described, capsys):
    """What the refusal advises works."""
    folder, _ = described
    (folder / "dataset.json").write_text(json.dumps({"labels": None}))
    assert "--task uncond" in refused(capsys, folder)
    flags = ["--data", str(folder), "--task", "uncond", "--output_dir", str(folder) + "-run"]
    latent_fm.main([*TINY, *flags])


def test_shards_are_no_classes(tmp_path, capsys):
    """FFHQ's images1024x1024/00000 ... 69000 are one set. Folders with other names are classes."""
    for i in range(4):
        paint(tmp_path / "ffhq" / f"{1000 * i:05d}" / f"{1000 * i:05d}.png", 10 * i)
        paint(tmp_path / "named" / f"c{1000 * i:05d}" / "x.png", 10 * i)
    line = refused(capsys, tmp_path / "ffhq")
    assert "00000" in line and "--task uncond" in line and "put a letter before" in line
    x, _, _ = load_data(str(tmp_path / "ffhq"), 8, flat=True)
    assert greys(x) == [0, 10, 20, 30]
    assert load_data(str(tmp_path / "named"), 8)[1]["label"].tolist() == [0, 1, 2, 3]


@pytest.fixture
def stray(tmp_path):
    """Five images beside a subfolder with a single one, a text file and a hidden folder."""
    folder = tmp_path / "emoji"
    for i in range(5):
        paint(folder / f"{i}.png", 10 * i)
    paint(folder / "thumbs" / "t.png", 200)
    paint(folder / ".cache" / "h.png", 250)
    (folder / "LICENSE.txt").write_text("free")
    return folder


def test_all_images_without_classes_and_a_word_with(stray, capsys):
    x, cond, _ = load_data(str(stray), 8, flat=True)
    assert greys(x) == [0, 10, 20, 30, 40, 200] and not cond["label"].any()
    line = refused(capsys, stray)
    assert "5 images, such as 0.png" in line and "thumbs" in line and "--task uncond" in line
    for path in stray.glob("*.png"):
        shutil.move(path, stray / "thumbs")  # the other advice
    assert load_data(str(stray), 8)[1]["label"].tolist() == [0] * 6


def test_real_data_of_a_teacher_without_classes(stray, tmp_path):
    """dmd.py's --data for it: all images, with the null label. A teacher of classes refuses."""
    args = SimpleNamespace(data=str(stray), seed=0)
    net = DiT(size=(8, 8), patch=(4, 4), dim=32, depth=1, num_classes=0)
    teacher = SimpleNamespace(world=None, base=net, shape=(3, 8, 8), config={}, folder=None)
    x, cond = load_real_data(args, teacher)
    assert len(x) == 6 and cond["label"].tolist() == [0] * 6
    teacher.base = DiT(size=(8, 8), patch=(4, 4), dim=32, depth=1, num_classes=1)
    with pytest.raises(UserError, match="5 images, such as 0.png"):
        load_real_data(args, teacher)


# ---- pixels of more than 8 bits ------------------------------------------------------------------


def test_float_and_deep_images(tmp_path, capsys):
    """Floats in [0, 1] and in [0, 255], 16 bits; what cannot be placed is skipped with its name."""
    folder = tmp_path / "deep" / "a"
    folder.mkdir(parents=True)
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    broken = ramp.copy()
    broken[0, 0] = np.nan
    for name, values in {
        "0-unit": ramp.astype(np.float32),
        "1-bytes": (255 * ramp).astype(np.float32),
        "2-deep": (65535 * ramp).round().astype(np.uint16),
        "3-wide": (65535 * ramp).astype(np.float32),
        "4-nan": broken.astype(np.float32),
        "5-twelve": (4095 * ramp).round().astype(np.uint16),
        "6-negative": (ramp - 0.5).astype(np.float32),
    }.items():
        Image.fromarray(values).save(folder / f"{name}.tif")
    x, _, _ = load_data(str(tmp_path / "deep"), 8)
    lines = capsys.readouterr().err.splitlines()
    assert len(x) == 4
    want = (255 * ramp).round()
    for image in x:
        assert np.abs(image.numpy() - want).max() <= 1
    assert [line.split("/")[-1].split(".tif")[0] for line in lines] == [
        "4-nan",
        "5-twelve",
        "6-negative",
    ]
    assert "not finite" in lines[0] and "scale them" in lines[1] and "-0.5 to 0.5" in lines[2]


# ---- how an image becomes a square ---------------------------------------------------------------


def halved(a):
    """The mean of 2 x 2 pixels, first of columns, rounded half up, then of rows, as Pillow does.

    (H, W) -> (H / 2, W / 2)
    """
    a = np.floor(a.reshape(a.shape[0], -1, 2).mean(2) + 0.5)
    return np.floor(a.reshape(-1, 2, a.shape[1]).mean(1) + 0.5)


def test_adm_crop_of_powers_of_two_is_the_mean(tmp_path):
    """64 x 96 at 16: two halvings, no interpolation, columns 4 to 20 of 24. Lanczos differs."""
    a = np.random.default_rng(0).integers(0, 256, (64, 96)).astype(np.uint8)
    Image.fromarray(a).save(tmp_path / "a.png")
    x = read_image(str(tmp_path / "a.png"), 16, "adm")[0].numpy()
    np.testing.assert_array_equal(x, halved(halved(a))[:, 4:20])
    assert (read_image(str(tmp_path / "a.png"), 16)[0].numpy() != x).mean() > 0.9


@pytest.mark.parametrize("width, height", [(500, 375), (71, 41), (40, 256), (32, 33)])
def test_sides_and_offsets_are_those_of_guided_diffusion_and_torchvision(width, height):
    """Where the cut lies, found on a picture whose colour says where a pixel is.

    guided-diffusion: round(side * scale), then (side - size) // 2. torchvision: int(size * long /
    short), then round half to even of (side - size) / 2.
    """
    size = 32
    a = np.stack(np.meshgrid(np.arange(width) % 256, np.arange(height) % 256), -1).astype(np.uint8)
    image = Image.fromarray(np.dstack([a, a[..., :1]]))
    box = image
    while min(box.size) >= 64:
        box = box.resize((box.width // 2, box.height // 2), Image.Resampling.BOX)
    w, h = (round(side * (size / min(box.size))) for side in box.size)
    top, left = (h - size) // 2, (w - size) // 2
    want = np.asarray(box.resize((w, h), Image.Resampling.BICUBIC))
    got = np.asarray(to_square(image, size, "adm"))
    np.testing.assert_array_equal(got, want[top : top + size, left : left + size])
    short, long = min(width, height), max(width, height)
    new = int(size * long / short)
    w, h = (size, new) if width <= height else (new, size)
    top, left = int(round((h - size) / 2.0)), int(round((w - size) / 2.0))
    want = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))
    got = np.asarray(to_square(image, size, "bilinear"))
    np.testing.assert_array_equal(got, want[top : top + size, left : left + size])


def test_the_papers_networks_read_images_as_adm_does(tmp_path):
    """The flag reaches the pixels, and sampler.json tells it to those who read more of the data."""
    assert latent_fm.parse_args(["--data", "x", "--network", "DiT-B/2"]).crop == "adm"
    assert latent_fm.parse_args(["--data", "x"]).crop == "lanczos"
    rng = np.random.default_rng(0)
    for i in range(2):
        (tmp_path / "d" / str(i)).mkdir(parents=True)
        a = rng.integers(0, 256, (16, 24, 3)).astype(np.uint8)
        Image.fromarray(a).save(tmp_path / "d" / str(i) / "x.png")
    for crop in ("lanczos", "adm"):
        args = latent_fm.parse_args([*TINY, "--data", str(tmp_path / "d"), "--crop", crop])
        x = latent_fm.load_training_data(args, None).x[0]
        assert torch.equal(x, read_image(str(tmp_path / "d" / "0" / "x.png"), 8, crop))
    out = ["--crop", "adm", "--output_dir", str(tmp_path / "run")]
    latent_fm.main([*TINY, "--data", str(tmp_path / "d"), *out])
    teacher = SimpleNamespace(world=None, config={}, folder=str(tmp_path / "run" / "student"))
    teacher.base, teacher.shape = DiT(size=(8, 8), patch=(4, 4), num_classes=2), (3, 8, 8)
    data, _ = load_real_data(SimpleNamespace(data=str(tmp_path / "d"), seed=0), teacher)
    assert torch.equal(data[0], x)


# ---- caches of latents ---------------------------------------------------------------------------


@pytest.fixture
def two_classes(tmp_path):
    folder = tmp_path / "data"
    for name, grey in (("black", 0), ("white", 255)):
        for i in range(3):
            paint(folder / name / f"{i}.png", abs(grey - i))
    return folder


def cached_run(folder, tmp_path, *more):
    flags = ["--autoencoder", "pca", "--cache_latents", str(tmp_path / "latents")]
    out = ["--output_dir", str(tmp_path / "run")]
    return [*TINY, "--data", str(folder), *flags, *more, *out]


def rename_class(folder):
    (folder / "black").rename(folder / "zblack")


def replace_image(folder):
    paint(folder / "white" / "1.png", 90)


def swap_names(folder):
    (folder / "white" / "1.png").rename(folder / "white" / "x.png")
    (folder / "white" / "2.png").rename(folder / "white" / "1.png")
    (folder / "white" / "x.png").rename(folder / "white" / "2.png")


@pytest.mark.parametrize("change", [rename_class, replace_image, swap_names])
def test_stale_caches_are_refused(two_classes, tmp_path, capsys, change):
    """Same names of flags and the same number of images, but other pixels or another order.

    The advice works. A copy of the folder, whose times differ, is the same data.
    """
    latent_fm.main(cached_run(two_classes, tmp_path))
    shutil.copytree(two_classes, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "white" / "1.png", (1, 1))
    latent_fm.main(cached_run(tmp_path / "copy", tmp_path))
    change(two_classes)
    line = refusal_of(capsys, latent_fm.main, *cached_run(two_classes, tmp_path))
    assert re.search("was made with other .*pixels: name another folder, or remove this", line)
    shutil.rmtree(tmp_path / "latents")
    latent_fm.main(cached_run(two_classes, tmp_path))


def test_caches_of_other_flags_say_which(two_classes, tmp_path, capsys):
    latent_fm.main(cached_run(two_classes, tmp_path))
    line = refusal_of(capsys, latent_fm.main, *cached_run(two_classes, tmp_path, "--hflip"))
    assert "was made with other hflip:" in line


# ---- latents that were made elsewhere ------------------------------------------------------------


@pytest.mark.parametrize("name", [".DS_Store", "README.md", "a/.DS_Store", "a/._0.npy"])
def test_other_files_among_latents(tmp_path, name):
    """What macOS leaves beside files, and a text, make no folder of latents one of pictures."""
    config = dict(latent_channels=4, block_out_channels=[8], norm_num_groups=4)
    config |= dict(down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"])
    vae = AutoencoderKL(**config)
    save_network(vae, {"_class_name": "AutoencoderKL", **vae.config}, str(tmp_path / "vae"))
    for i in range(4):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.full((8, 2, 2), i, np.float32))
    (tmp_path / "data" / name).write_bytes(b"what no latent begins with")
    assert is_posteriors(str(tmp_path / "data"))
    found = Posteriors(str(tmp_path / "data"), str(tmp_path / "vae"), flat=False)
    assert len(found) == 4 and found.classes == ["a", "b"]
    assert Posteriors.shape_of_one(str(tmp_path / "data"), "vae") == (4, 2, 2)


def test_latents_among_pictures(two_classes):
    """What comes first says what a folder has."""
    (two_classes / "white" / "features.npy").write_bytes(b"")
    assert not is_posteriors(str(two_classes))


# ---- maps in a mirror ----------------------------------------------------------------------------


def test_mirror_classes():
    """CelebAMask-HQ's names, and others people use; a side without the other is refused."""
    names = ["background", "l_brow", "r_brow", "Left-Arm", "right-arm", "skin", "lip", "u_lip"]
    mirror = mirror_classes(names)
    assert mirror[:8].tolist() == [0, 2, 1, 4, 3, 5, 6, 7]
    assert torch.equal(mirror[8:], torch.arange(8, 256))
    assert torch.equal(mirror[mirror], torch.arange(256))
    with pytest.raises(UserError, match="'ear_l' has no 'ear_r'"):
        mirror_classes(["ear_l", "ear"])
    assert mirror_classes(["other", "skin", "other"])[:3].tolist() == [0, 1, 2]
    assert torch.equal(mirror_classes([f"c{k}" for k in range(300)]), torch.arange(256))


def test_mirrored_maps_have_the_classes_of_the_mirror():
    """A left eye on the left becomes a right eye on the right. 255, no class, stays."""
    maps = torch.tensor([[[1, 0, 255, 3]]], dtype=torch.uint8).expand(2, 1, 4)
    mirror = mirror_classes(["skin", "l_eye", "r_eye", "nose"])
    out = latent_fm.mirrored_maps(maps, torch.tensor([True, False]), mirror)
    assert out.tolist() == [[[3, 255, 0, 2]], [[1, 0, 255, 3]]] and out.dtype == maps.dtype
    assert latent_fm.mirrored_maps(maps, None, None) is maps


@pytest.fixture
def faces(tmp_path):
    """Images whose left half is class 1, l_eye, and their maps."""
    for i in range(4):
        paint(tmp_path / "faces" / f"{i}.png", 50 * i)
        (tmp_path / "maps").mkdir(exist_ok=True)
        numbers = np.zeros((8, 8), np.uint8)
        numbers[:, :4] = 1
        numbers[0, 0] = 2
        Image.fromarray(numbers).save(tmp_path / "maps" / f"{i}.png")
    (tmp_path / "names.json").write_text('["skin", "l_eye", "r_eye"]')
    return tmp_path


def test_hflip_with_maps_exchanges_sides_or_refuses(faces, capsys, monkeypatch):
    """The mirrored items of a run have class 2 on the right, not class 1."""
    seen, real = [], latent_fm.semantic_context

    def on_map(maps, *rest):
        seen.append(maps.clone())
        return real(maps, *rest)

    monkeypatch.setattr(latent_fm, "semantic_context", on_map)
    flags = ["--task", "semantic", "--data", faces / "faces", "--maps", faces / "maps"]
    flags = [*TINY, *map(str, flags), "--train_batch_size", "32"]
    out = ["--output_dir", str(faces / "run")]
    line = refusal_of(capsys, latent_fm.main, *flags, "--hflip", *out)
    assert "exchanges left and right classes: give --map_names FILE" in line
    names = ["--map_names", str(faces / "names.json")]
    latent_fm.main([*flags, "--hflip", *names, *out])
    mirrored = seen[0][:, 1, 7] != 0
    assert 4 < mirrored.sum() < 28
    assert (seen[0][mirrored][:, 1, 4:] == 2).all() and (seen[0][mirrored][:, 0, 7] == 1).all()
    assert (seen[0][~mirrored][:, 1, :4] == 1).all()
    (faces / "names.json").write_text('["skin", "l_eye"]')
    line = refusal_of(capsys, latent_fm.main, *flags, "--hflip", *names, *out)
    assert "names 2 classes, and the maps have 3" in line
    assert "has an effect only with" in refusal_of(capsys, latent_fm.main, *flags, *names, *out)


# ---- rows of a file ------------------------------------------------------------------------------


def test_float16_rows_are_read_under_autocast(tmp_path):
    """torch.cat of float16 is an error under autocast on the CPU."""
    text = torch.arange(12.0).reshape(3, 4).half()
    save_file({"cond.text": text, "uncond.text": text[:1].clone()}, tmp_path / "p.safetensors")
    prompts = Prompts(str(tmp_path / "p.safetensors"), ["text"], {"text": 4})
    with torch.autocast("cpu", torch.bfloat16):
        rows = prompts.rows(torch.tensor([2, 0]), "cpu")["text"]
    assert rows.dtype == torch.float32 and torch.equal(rows, text[[2, 0]].float())


def test_rows_that_are_not_finite_are_named(tmp_path):
    """Before any training in a file of usual size, and in a huge one when the row is drawn."""
    text = torch.zeros(70, 4)
    text[67, 1] = float("nan")
    path = str(tmp_path / "p.safetensors")
    save_file({"cond.text": text, "uncond.text": text[:1].clone()}, path)
    with pytest.raises(UserError, match=r"p.safetensors: row 67 of cond.text has numbers that are"):
        Prompts(path, ["text"], {"text": 4})
    rows = Rows(open_tensors(path), "cond.text", path).check(most=100)
    with pytest.raises(UserError, match="row 67 of cond.text"):
        rows[torch.tensor([3, 67])]
    save_file({"x0": text[:, :, None, None], "cond.label": torch.zeros(70).long()}, path)
    with pytest.raises(UserError, match="row 67 of x0"):
        load_data(path)
    save_file({"cond.text": text[:3].clone(), "uncond.text": text[67:68].clone()}, path)
    with pytest.raises(UserError, match="row 0 of uncond.text"):
        Prompts(path, ["text"], {"text": 4})


# ---- the optimiser of the paper ------------------------------------------------------------------


def test_cosine_is_torchs_schedule_to_a_floor():
    """FFHQ's: from 2e-4 along half a cosine to 1e-5, compared at whole epochs."""
    args = SimpleNamespace(learning_rate=2e-4, lr_final=1e-5, lr_schedule="cosine")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-5)
    for epoch in range(11):
        ours = args.learning_rate * latent_fm.lr_decay(args, 1 - epoch / 10)
        assert math.isclose(ours, schedule.get_last_lr()[0], rel_tol=1e-9)
        optimizer.step()
        schedule.step()


def test_linear_fall_is_as_it_was():
    args = SimpleNamespace(learning_rate=2e-4, lr_final=0.0, lr_schedule="linear")
    assert [latent_fm.lr_decay(args, left) for left in (1, 0.25, 0)] == [1, 0.25, 0]


def logged_rates(tmp_path, *flags):
    world = ["--data", "glyphs", "--pool", "100", "--max_train_steps", "4"]
    out = ["--lr_warmup_steps", "0", "--output_dir", str(tmp_path / "run")]
    latent_fm.main([*TINY, *world, *flags, *out])
    return [float(row["lr"]) for row in read_log(tmp_path / "run")]


def test_schedules_reach_the_optimiser(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_fm, "finish", lambda *a: None)
    flags = "--learning_rate 1e-3 --lr_schedule cosine --lr_final 1e-4".split()
    want = [1e-4 + 9e-4 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    np.testing.assert_allclose(logged_rates(tmp_path, *flags), want, rtol=1e-5)
    assert logged_rates(tmp_path, "--learning_rate", "1e-3", "--lr_decay_share", "0") == [1e-3] * 4


def test_the_papers_optimiser():
    """betas .9 and .999, no clipping, no decay of weights, a constant rate, for its networks."""
    args = latent_fm.parse_args(["--data", "x", "--network", "DiT-L/2"])
    assert args.adam_betas == [0.9, 0.999] and args.max_grad_norm == 0 == args.weight_decay
    (adam,), _ = latent_fm.build_optimizers(args, torch.nn.Linear(2, 2))
    assert tuple(adam.param_groups[0]["betas"]) == (0.9, 0.999)
    small = latent_fm.parse_args([])
    assert (small.adam_betas, small.max_grad_norm) == ([0.9, 0.99], 1.0)


@pytest.mark.parametrize("limit, length", [(0, 20.0), (0.5, 0.5), (100, 20.0)])
def test_max_grad_norm_0_is_off(tmp_path, limit, length):
    args = SimpleNamespace(
        max_grad_norm=limit, output_dir=str(tmp_path), train_batch_size=1,
        gradient_accumulation_steps=1, mixed_precision="no", sequence_ranks=1,
    )  # fmt: skip
    run, p = Run(args, "x"), torch.zeros(4, requires_grad=True)
    p.grad = torch.full((4,), 10.0)
    run.update(torch.optim.SGD([p], lr=1.0), "net")
    assert math.isclose(float(p.detach().norm()), length, rel_tol=1e-5)
    assert math.isclose(float(run.sums["norm_net"]), 20.0)


def test_worlds_need_no_names_for_a_mirror():
    """The classes of shapes' maps have no sides."""
    args = latent_fm.parse_args(["--task", "semantic", "--hflip", "--pool", "100"])
    data = latent_fm.load_training_data(args, load_world("shapes"))
    assert torch.equal(data.map_mirror, torch.arange(256))
    draw, space = Draws(0, 0, 0, range(4), "cpu"), load_world("shapes").space
    draw.shape = load_world("shapes").latent_shape
    _, cond = latent_fm.training_batch(args, draw, data, space, None)
    assert cond["context"].shape == (4, data.map_classes, 8, 8)


# (rank's batch, rate, share in which it falls, floor, crop) of each launch line, by its data set
PAPER_RUNS = {
    "FOLDER": (160, 1e-4, 0, 0, "adm"),
    "imagenet/train": (160, 1e-4, 0, 0, "adm"),
    "ffhq256": (32, 2e-4, 1, 1e-5, "adm"),
    "celeba256": (32, 2e-4, 0, 0, "adm"),
    "church": (48, 1e-4, 0, 0, "bilinear"),
    "bedroom": (32, 1e-4, 0, 0, "bilinear"),
}


def test_launch_lines_of_the_papers_data_sets():
    """Those of docs/latent_fm.md parse, and say what the official scripts do."""
    page = (ROOT / "docs" / "latent_fm.md").read_text()
    lines = page.replace("\\\n", " ").splitlines()
    lines = [line.split() for line in lines if "latent_fm.py" in line and "--t_scale" in line]
    lines = [words for words in lines if not any("ADM" in word for word in words)]
    found = {}
    for words in lines:
        args = latent_fm.parse_args(words[words.index("latent_fm.py") + 1 :])
        shown = args.train_batch_size, args.learning_rate, args.lr_decay_share, args.lr_final
        found[args.data] = (*shown, args.crop)
        assert args.lr_schedule == "cosine" and args.adam_betas == [0.9, 0.999]
        assert (args.max_grad_norm, args.weight_decay, args.ema_decay) == (0, 0, 0)
        assert args.hflip and args.t_scale == 1 and args.solver == "dopri5"
        classes = args.data in ("FOLDER", "imagenet/train")
        assert args.task == ("class" if classes else "uncond")
        assert args.network == ("DiT-B/2" if classes else "DiT-L/2")
    assert found == PAPER_RUNS
