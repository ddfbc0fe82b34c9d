"""Inputs that were thought up, not reported, of the kinds that public reports are of.

Each was tried before anything was mended; docs/trust.md says how many failed. A case is a few lines
that make the input from good files; what the code has to say of it stands beside it.
"""

import errno
import importlib
import json
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    quiet,
    refusal_of,
    save_tiny_pixart,
    save_tiny_teacher,
    save_tiny_vp_teacher,
    save_tiny_wan,
    small_dit,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from test_resume import flags_of

import dmd
import latent_fm
import linvideo
import mdt_dist
import phased_dmd
import tdm
from models import convert, decode, encode, files, metrics
from models import pairs as pairing
from models.files import UserError, load_json, open_tensors, save_json, save_tensors
from models.networks import WEIGHTS, lora, network_config, save_network
from models.networks.autoencoders import AutoencoderKL, PatchPCA
from models.networks.dit_imagenet import DIT_B_2, DiTTransformer2DModel, to_official
from models.networks.latent_space import LatentSpace, load_space
from models.networks.ring_mlp import RingMLP
from models.plumbing import loading, state
from models.plumbing.data import Bank, Prompts, load_data, load_real_data
from models.plumbing.flags import wrong_output
from models.plumbing.image_sets import begin_set, open_images
from models.plumbing.images import files_below
from models.plumbing.latents import LatentCache, Posteriors
from models.plumbing.loading import open_pictures
from models.plumbing.report import load_student
from models.plumbing.run import Log, Run, own_device, run_main, take_output_dir
from models.plumbing.schedulers import read_scheduler
from models.plumbing.sets import open_set
from models.plumbing.state import folder_fingerprint, inputs_of
from models.plumbing.teachers import base_fingerprint, merge_lora
from models.progress import progress
from models.text_encoders import ask
from models.worlds import load_world

SHORT = "--max_train_steps 1 --train_batch_size 2".split()


def picture(path, grey=0, size=8):
    """A grey BMP or PNG; BMPs of one size have one length."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (grey, grey, grey)).save(path)


@pytest.fixture(autouse=True)
def no_samples(monkeypatch):
    quiet(monkeypatch)
    monkeypatch.setattr(latent_fm, "finish", lambda *a, **k: None)


def refusal(capsys, out, *flags, script=dmd):
    """The line in which a run of one update ends before it begins."""
    return refusal_of(capsys, script.main, *SHORT, "--output_dir", str(out), *flags)


def edit(path, **entries):
    save_json({**load_json(str(path)), **entries}, str(path))


# ---- a saved thing is trusted though what it depends on changed ----------------------------------


def teacher_scheduler(root):
    save_tiny_vp_teacher(root)
    yield SimpleNamespace(teacher=str(root / "transformer"))
    edit(root / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")


def teacher_config(root):
    save_tiny_wan(root, boundary=0.9)
    yield SimpleNamespace(teacher=str(root))
    edit(root / "model_index.json", boundary_ratio=0.8)


def teacher_lora(root):
    files = [str(root / f"{name}.safetensors") for name in "ab"]
    for path in files:
        save_file({"x": torch.zeros(4)}, path)
    yield SimpleNamespace(teacher="ring", teacher_lora=files)
    save_file({"x": torch.ones(4)}, files[1])


def a_picture(root):
    for name in "abc":
        picture(root / "data" / name / "x.bmp")
    (root / "data" / "a" / "y.bmp").symlink_to("nowhere")  # which is skipped
    yield SimpleNamespace(teacher="ring", data=str(root / "data"))
    picture(root / "data" / "b" / "x.bmp", 90)


def labels_of_pictures(root):
    for name in "ab":
        picture(root / "data" / f"{name}.bmp")
    path = root / "data" / "dataset.json"
    path.write_text(json.dumps({"labels": [["a.bmp", 0], ["b.bmp", 1]]}))
    yield SimpleNamespace(data=str(root / "data"))
    path.write_text(json.dumps({"labels": [["a.bmp", 1], ["b.bmp", 0]]}))


def prompts(root):
    files = [root / f"p-{i}.safetensors" for i in range(2)]
    for path in files:
        save_file({"x": torch.zeros(4)}, path)
    (root / "p").mkdir()
    yield SimpleNamespace(teacher="ring", prompts=shards(root / "p.safetensors", files))
    save_file({"x": torch.ones(4)}, files[1])


def shards(name, files):
    """An index of these files of prompts.  -> the path that --prompts takes"""
    about = [{"file": path.name, "rows": 1, "bytes": path.stat().st_size} for path in files]
    save_json({"shards": about}, f"{name}.index.json")
    return str(name)


def maps(root):
    picture(root / "data" / "x.bmp")
    picture(root / "maps" / "x.png")
    yield SimpleNamespace(data=str(root / "data"), maps=str(root / "maps"))
    picture(root / "maps" / "x.png", 1)


def an_autoencoder(root):
    space(root / "vae")
    yield SimpleNamespace(data="glyphs", autoencoder=str(root / "vae"))
    edit(root / "vae" / "config.json", scaling_factor=0.5)


@pytest.mark.parametrize(
    "changed",
    [
        teacher_scheduler,
        teacher_config,
        teacher_lora,
        a_picture,
        labels_of_pictures,
        prompts,
        maps,
        an_autoencoder,
    ],
)
def test_a_resumed_run_notices(tmp_path, changed):
    """What a run reads has other content: its fingerprint is another one, elsewhere the same."""
    steps = changed(tmp_path / "x")
    (tmp_path / "x").mkdir()
    args = next(steps)
    before = inputs_of(args)
    shutil.copytree(tmp_path / "x", tmp_path / "y", symlinks=True)
    there = {k: json.loads(json.dumps(v).replace("/x", "/y")) for k, v in vars(args).items()}
    assert inputs_of(SimpleNamespace(**there)) == before
    next(steps, None)
    assert inputs_of(args) != before


TINY_VAE = dict(block_out_channels=[4, 4], layers_per_block=1, norm_num_groups=2,
                down_block_types=["DownEncoderBlock2D"] * 2,
                up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip


def space(folder, **changes):
    torch.manual_seed(0)
    vae = AutoencoderKL(**{**TINY_VAE, **changes})
    save_network(vae, network_config(vae), str(folder))


def pca(folder, seed):
    torch.manual_seed(seed)
    some = torch.randn(50, 3, 8, 8)
    LatentSpace(PatchPCA(3, 2, 4).fit(some)).save(str(folder))


def about_encoder(folder):
    args = latent_fm.parse_args(["--data", "glyphs", "--autoencoder", str(folder)])
    return latent_fm.describe_encoder(args, load_space(str(folder)))


def test_cached_latents_of_another_scaling(tmp_path):
    """Latents are cached after the autoencoder's own scaling, which is in its config alone."""
    space(tmp_path / "vae")
    before = about_encoder(tmp_path / "vae")
    edit(tmp_path / "vae" / "config.json", scaling_factor=0.5)
    assert about_encoder(tmp_path / "vae") != before


def test_cached_latents_of_another_run_under_one_name(tmp_path):
    """The autoencoder that a run left, and that a new run replaced."""
    pca(tmp_path / "autoencoder", 0)
    before = about_encoder(tmp_path / "autoencoder")
    pca(tmp_path / "autoencoder", 1)
    assert about_encoder(tmp_path / "autoencoder") != before


def bank_with(tmp_path, **tensors):
    bank = Bank(str(tmp_path / "bank"), {"seed": 0}, 4, 2, create=True)
    for part in range(2):
        good = {"index": torch.arange(2), "x": torch.zeros(2, 3, 1, 4)}
        bank.write(part, {**good, "v": good["x"], **tensors})
    return bank


def test_a_bank_whose_description_is_lost(tmp_path):
    """Its files would be taken for those of any teacher."""
    bank_with(tmp_path)
    (tmp_path / "bank" / "bank.json").unlink()
    with pytest.raises(UserError, match="bank.json"):
        Bank(str(tmp_path / "bank"), {"seed": 1}, 4, 2, create=True)


def cache_with(folder, moments):
    cache = LatentCache(str(folder), len(moments), {"pixels": "x"})
    cache.begin()
    save_tensors({"moments": moments}, cache.path(0))
    return cache


def test_cached_latents_whose_description_is_lost(tmp_path):
    cache = cache_with(tmp_path / "cache", torch.zeros(3, 1, 2, 1, 2, 2))
    (tmp_path / "cache" / "cache.json").unlink()
    with pytest.raises(UserError, match="cache.json"):
        cache.begin()


def test_pictures_that_change_places(tmp_path):
    """Of one size and with one time, as an archive that is made reproducible unpacks them: what
    the index knows of them no longer holds."""
    for name, grey in (("a", 10), ("b", 200)):
        picture(tmp_path / "data" / f"{name}.bmp", grey)
        os.utime(tmp_path / "data" / f"{name}.bmp", (1, 1))
    index = str(tmp_path / "index.safetensors")
    before = open_pictures(str(tmp_path / "data"), 8, True, index=index)[0].sum
    a, b = (tmp_path / "data" / f"{name}.bmp" for name in "ab")
    a.rename(tmp_path / "c"), b.rename(a), (tmp_path / "c").rename(b)
    assert open_pictures(str(tmp_path / "data"), 8, True, index=index)[0].sum != before


def test_one_prompt_of_many_is_another(tmp_path):
    """The fingerprint of a bank's prompts sees each of them."""
    path = tmp_path / "p.safetensors"
    tensors = {"cond.text": torch.randn(100, 2, 4), "uncond.text": torch.zeros(1, 2, 4)}
    save_file(tensors, path)
    before = Prompts(str(path), ("text",), {}).fingerprint()
    tensors["cond.text"][2] += 1
    save_file(tensors, path)
    assert Prompts(str(path), ("text",), {}).fingerprint() != before


def test_adapters_of_a_teacher_that_is_another_now(tmp_path, capsys):
    """A student that is adapters names its teacher, whose files may be others by then."""
    teacher = save_tiny_teacher(tmp_path / "teacher")
    out = str(tmp_path / "run")
    dmd.main([*SHORT, "--teacher", teacher, "--lora_rank", "2", "--output_dir", out])
    moved, path = shutil.copytree(teacher, tmp_path / "moved"), Path(teacher) / WEIGHTS
    save_file({k: v + 0.1 for k, v in load_file(path).items()}, path)
    sampled = ["--sample", out, "--output_dir", str(tmp_path / "samples")]
    error = refusal_of(capsys, dmd.main, *sampled)
    assert "not the teacher" in error and teacher in error
    again = dmd.parse_args([*sampled, "--teacher", str(moved)])  # as it advises
    assert load_student(Run(again, "dmd"))[0].adapter == "student"


# ---- a name means two things ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pca", "identity"])
def test_a_folder_called_like_an_autoencoder(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    space(tmp_path / name)
    picture(tmp_path / "data" / "a" / "x.png")
    flags = ["--data", "data", "--resolution", "8", "--autoencoder", name]
    error = refusal(capsys, "run", *flags, script=latent_fm)
    assert f"./{name}" in error


def test_prompts_as_a_file_and_as_shards(tmp_path):
    """p.safetensors beside p.safetensors.index.json: which of them was meant?"""
    path = tmp_path / "p.safetensors"
    save_file({"cond.text": torch.zeros(3, 2, 4), "uncond.text": torch.zeros(1, 2, 4)}, path)
    entry = {"file": "p-00001-of-00001.safetensors", "rows": 3, "bytes": path.stat().st_size}
    shutil.copy(path, tmp_path / entry["file"])
    save_json({"shards": [entry]}, str(path) + ".index.json")
    with pytest.raises(UserError, match="index.json"):
        Prompts(str(path), ("text",), {})


def test_a_picture_with_two_classes(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    rows = [["a.png", 0], ["b.png", 1], ["a.png", 1]]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": rows}))
    with pytest.raises(UserError, match="a.png.* twice"):
        load_data(str(tmp_path), 8)


def test_two_pictures_of_one_key_in_a_tar(tmp_path):
    """KEY.jpg and KEY.mask.png are one row of webdataset: masks are no training pictures."""
    for name in ("0.png", "0.mask.png", "1.png", "1.mask.png"):
        picture(tmp_path / name)
    with tarfile.open(tmp_path / "d.tar", "w") as file:
        for path in sorted(tmp_path.glob("*.png")):
            file.add(path, path.name)
    with pytest.raises(UserError, match="0.mask.png"):
        load_data(str(tmp_path / "d.tar"), 8, flat=True)


def test_two_pictures_with_one_map(tmp_path):
    """x.jpg and x.png would share maps/x.png."""
    for path in ("data/x.png", "data/x.bmp", "maps/x.png"):
        picture(tmp_path / path)
    Image.new("L", (8, 8)).save(tmp_path / "maps" / "x.png")
    with pytest.raises(UserError, match="x.bmp and .*x.png"):
        load_data(str(tmp_path / "data"), 8, flat=True, maps=str(tmp_path / "maps"))


@pytest.mark.parametrize("inside", ["", "sub"])
def test_data_in_the_folder_that_a_run_would_rename(tmp_path, capsys, inside):
    """The run would move its own data away and end at the next picture."""
    data = tmp_path / "both" / inside
    for name in "ab":
        picture(data / name / "x.png")
    flags = ["--data", str(data), "--resolution", "8"]
    error = refusal(capsys, tmp_path / "both", *flags, script=latent_fm)
    assert "--output_dir" in error and "--data" in error
    latent_fm.parse_args([*flags, "--output_dir", str(tmp_path / "another")])


READ = "data maps map_names prompts teacher autoencoder teacher_lora student_init fake_init init "
READ += "bank dinov2"


@pytest.mark.parametrize("flag", READ.split())
def test_whatever_a_run_reads_may_lie_in_no_folder_that_it_renames(tmp_path, flag):
    """Nor the cache that it makes; a resumed run and a saved student rename nothing."""
    inside = tmp_path / "run" / "x"
    inside.mkdir(parents=True)
    none = dict(sample=None, resume_from_checkpoint=None, dry_run=None, samples=None)
    none |= dict(format=None, labels=None, output_dir=str(tmp_path / "run"))

    def refused(**flags):
        return [why for wrong, why in wrong_output(SimpleNamespace(**{**none, **flags}))
                if wrong]  # fmt: skip

    value = [str(inside)] if flag == "teacher_lora" else str(inside)
    (why,) = refused(**{flag: value})
    assert why.startswith(f"--{flag} {inside} is in --output_dir") and "another --out" in why
    assert not refused(**{flag: value}, resume_from_checkpoint="latest")
    assert not refused(**{flag: value}, sample="s")
    assert not refused(**{flag: str(inside / "gone")})
    (why,) = refused(cache_latents=str(inside / "gone"))
    assert why.startswith("--cache_latents")


def test_a_path_that_the_shell_left_as_it_is(monkeypatch):
    """--output_dir=~/x: bash replaces no ~ there, and a folder of that name would be made here."""
    args = dmd.parse_args(["--teacher", "ring", "--output_dir=~/x"])
    assert args.output_dir == os.path.expanduser("~/x")


@pytest.mark.parametrize("flag", ["data", "student_init", "resume_from_checkpoint", "prompts"])
def test_an_empty_value(capsys, tmp_path, flag):
    """A variable of the shell that is not set: the flag would be as if left out."""
    error = refusal(capsys, tmp_path / "run", "--teacher", "ring", f"--{flag}", "")
    assert f"--{flag} is empty" in error


# ---- values are converted in silence -------------------------------------------------------------


def test_a_quantised_adapter(tmp_path):
    net = small_dit()
    lora.add(net, "a", 2, 2.0)
    path = str(tmp_path / "l.safetensors")
    lora.save(net, "a", path)
    save_file({k: (100 * v).to(torch.int8) for k, v in load_file(path).items()}, path)
    with pytest.raises(UserError, match="integers"):
        merge_lora(small_dit(), path, "--teacher_lora")


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("text", lambda v: (100 * v).to(torch.int8), "cond.text is I8"),
        ("mask", lambda v: -10000.0 * (~v).float(), "cond.mask"),
        ("mask", lambda v: v[:, :-1].clone(), "mask"),
    ],
    ids=["integers for features", "a mask to be added", "a mask of another length"],
)
def test_prompts_of_another_sort(tmp_path, capsys, name, value, says):
    flags, path = save_tiny_pixart(tmp_path, 512), tmp_path / "prompts.safetensors"
    tensors = load_file(path)
    for of in ("cond", "uncond"):
        tensors[f"{of}.{name}"] = value(tensors[f"{of}.{name}"])
    save_file(tensors, path)
    assert says in refusal(capsys, tmp_path / "run", *flags, script=tdm)


@pytest.mark.parametrize(
    "x0, says",
    [
        (255 * torch.rand(8, 3, 8, 8), "x0 goes from"),
        (torch.rand(8, 3, 8, 8), "x0 goes from"),
        (torch.rand(8, 8, 8, 3) * 2 - 1, "(8, 8, 8, 3)"),
        (torch.randint(0, 255, (8, 4, 8, 8), dtype=torch.uint8), "bytes (U8)"),
    ],
    ids=["floats to 255", "floats from 0 to 1", "channels last", "latents as bytes"],
)
def test_pixels_of_another_sort(tmp_path, capsys, x0, says):
    save_file({"x0": x0}, tmp_path / "d.safetensors")
    flags = ["--task", "uncond", "--data", str(tmp_path / "d.safetensors")]
    assert says in refusal(capsys, tmp_path / "run", *flags, script=latent_fm)


def test_pixels_to_255_for_a_distillation(tmp_path, capsys):
    """The real samples of a GAN."""
    teacher = save_tiny_teacher(tmp_path / "teacher")
    data = {"x0": 255 * torch.rand(8, 1, 4, 4), "cond.label": torch.arange(8) % 3}
    save_file(data, tmp_path / "d.safetensors")
    flags = ["--teacher", teacher, "--gan_weight", "1", "--data", str(tmp_path / "d.safetensors")]
    assert "x0 goes from" in refusal(capsys, tmp_path / "run", *flags)


def posteriors(folder, **wrong):
    """Three .npy of mean and standard deviation, with a wrong third one."""
    space(folder / "vae")
    (folder / "data").mkdir()
    for name in "abc":
        moments = np.abs(np.random.default_rng(0).normal(size=(8, 4, 4))).astype(np.float32)
        np.save(folder / "data" / f"{name}.npy", wrong.get(name, lambda m: m)(moments))
    return Posteriors(str(folder / "data"), str(folder / "vae"), flat=True)


def negative(m):
    return m - 5 * (np.arange(8) > 3)[:, None, None].astype(np.float32)


def not_finite(m):
    m[2, 1, 1] = np.nan
    return m


@pytest.mark.parametrize(
    "wrong, says",
    [
        (negative, "c.npy.*standard deviation"),
        (not_finite, "c.npy.*not finite"),
        (lambda m: m[:, :2], "c.npy.*like the first"),
    ],
    ids=["log variances", "not finite", "another shape"],
)
def test_latents_made_elsewhere_one_of_which_is_wrong(tmp_path, wrong, says):
    """Every file is looked at before training."""
    with pytest.raises(UserError, match=says):
        posteriors(tmp_path, c=wrong)


# ---- files of the wrong level or sort ------------------------------------------------------------


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "test", "validation")])
def test_splits_are_no_classes(tmp_path, names):
    for name in names:
        for kind in ("cat", "dog"):
            picture(tmp_path / "data" / name / kind / "x.png")
    with pytest.raises(UserError, match="(?i)train.*give .*data/train$"):
        load_data(str(tmp_path / "data"), 8)


def test_classes_that_are_called_so_stay_classes(tmp_path):
    """Pictures of trains and of tests."""
    for name in ("train", "test"):
        picture(tmp_path / "data" / name / "x.png")
    assert load_data(str(tmp_path / "data"), 8)[2] == ["test", "train"]


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_text("a red cube\na blue cube\n"), "models.encode"),
    ],
    ids=["a folder", "a text"],
)
def test_prompts_that_are_not_encoded(tmp_path, capsys, make, says):
    flags = save_tiny_wan(tmp_path / "wan")
    path = tmp_path / "prompts.txt"
    make(path)
    assert says in refusal(capsys, tmp_path / "run", *flags, "--prompts", str(path))


def test_a_file_of_weights_for_a_teacher(tmp_path, capsys):
    """Its folder is wanted, and is named."""
    folder = save_tiny_teacher(tmp_path / "teacher")
    error = refusal(capsys, tmp_path / "run", "--teacher", f"{folder}/{WEIGHTS}")
    assert f"give {folder}" in error


def test_a_folder_of_the_hubs_cache(tmp_path, capsys):
    """models--NAME has the checkpoint in snapshots/HASH."""
    inside = tmp_path / "models--x" / "snapshots" / "0123"
    save_tiny_vp_teacher(inside)
    (inside / "model_index.json").write_text("{}")
    error = refusal(capsys, tmp_path / "run", "--teacher", str(tmp_path / "models--x"))
    assert f"give {inside}" in error


@pytest.mark.parametrize("at", ["", "state"])
def test_a_run_for_a_state(tmp_path, capsys, at):
    """--resume_from_checkpoint RUN: the newest state in it is named."""
    state = tmp_path / "run" / "state" / "step-0000004"
    state.mkdir(parents=True)
    save_json({}, str(state / "state.json"))
    given = str(tmp_path / "run" / at).rstrip("/")
    resumed = ["--teacher", "ring", "--resume_from_checkpoint", given]
    error = refusal(capsys, tmp_path / "new", *resumed, script=tdm)
    assert f"give {state}" in error


def test_a_state_of_another_script(tmp_path, capsys):
    flags = ["--teacher", "ring", "--train_batch_size", "4"]
    dmd.main([*SHORT, *flags, "--output_dir", str(tmp_path / "run")])
    state = str(tmp_path / "run" / "state" / "step-0000001")
    again = [*flags, "--resume_from_checkpoint", state, "--max_train_steps", "2"]
    error = refusal(capsys, tmp_path / "new", *again, script=tdm)
    assert "of dmd.py" in error and "tdm.py" in error


def test_a_pickle_of_pefts(tmp_path, capsys):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_model.bin").write_bytes(b"PK")
    teacher = save_tiny_teacher(tmp_path / "teacher")
    flags = ["--teacher", teacher, "--teacher_lora", str(tmp_path / "peft")]
    assert "pickles can run code" in refusal(capsys, tmp_path / "run", *flags)


@pytest.mark.parametrize("what", ["bank", "cache"])
def test_a_folder_of_something_else(tmp_path, what):
    """Latents or trajectories are not written between somebody's pictures."""
    picture(tmp_path / "photos" / "x.png")
    with pytest.raises(UserError, match="photos.*name another"):
        if what == "bank":
            Bank(str(tmp_path / "photos"), {}, 4, 2, create=True)
        else:
            LatentCache(str(tmp_path / "photos"), 3, {}).begin()


# ---- only the first row is probed ----------------------------------------------------------------

X = torch.zeros(2, 3, 1, 4)
X[1, 2] = torch.nan


@pytest.mark.parametrize(
    "tensors, says",
    [
        (dict(x=X), "00000.safetensors has numbers in x that are not"),
        (dict(index=torch.tensor([0, 9])), "00000.safetensors.*index"),
        (dict(index=torch.tensor([0.5, 1.0])), "00000.safetensors"),
    ],
    ids=["not finite", "a prompt that is not there", "half a prompt"],
)
def test_a_bank_with_a_wrong_row(tmp_path, tensors, says):
    with pytest.raises(UserError, match=says):
        bank_with(tmp_path, **tensors).open(5)


def test_cached_latents_with_a_wrong_row(tmp_path):
    moments = torch.zeros(3, 1, 2, 1, 2, 2).half()
    moments[2, 0, 1] = torch.nan
    with pytest.raises(UserError, match="00000.safetensors.*not finite"):
        cache_with(tmp_path / "cache", moments).open()


# ---- the environment decides, and the remedy is not the cause ------------------------------------


def test_a_clock_that_is_set_back(tmp_path, monkeypatch):
    """--max_minutes and the seconds of a run are not measured by the clock of the day."""
    run = Run(dmd.parse_args(["--teacher", "ring", "--max_minutes", "1"]), "dmd")
    run.began = run.started
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 86400)
    assert run.seconds() >= 0
    monkeypatch.setattr(time, "time", lambda: real() + 86400)
    assert run.wants_to_stop()[0] == 0


def test_the_seconds_of_a_resumed_run_are_of_all_its_parts(tmp_path):
    flags = ["--teacher", "ring", "--output_dir", str(tmp_path), "--train_batch_size", "2"]
    dmd.main([*flags, "--max_train_steps", "1"])
    state = next((tmp_path / "state").rglob("state.json"))
    assert 0 < load_json(str(state))["seconds"] < 100
    edit(state, seconds=1000.0)
    dmd.main([*flags, "--max_train_steps", "2", "--resume_from_checkpoint", "latest"])
    later = max((tmp_path / "state").rglob("state.json"), key=lambda p: p.stat().st_mtime_ns)
    assert 1000 < load_json(str(later))["seconds"] < 1100


NUMBERS = ["EROFS", "EACCES", "EIO", "ESTALE", "ENOTCONN", "EMFILE", "ENFILE"]


@pytest.mark.parametrize("name", NUMBERS)
def test_what_a_disk_says_in_one_line(capsys, monkeypatch, name):
    """A disk that is gone or read-only, or too many open files: the last whole state is named."""
    monkeypatch.setattr(Run, "current", None)

    def main():
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "x/state")

    with pytest.raises(SystemExit) as end:
        run_main(main)
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1 and "no state is saved yet" in error


@pytest.mark.parametrize("what", [KeyboardInterrupt, MemoryError, OSError(errno.ENOSPC, "full")])
def test_what_ends_a_command_names_no_flags_of_training(capsys, what):
    """models.encode and its like have no states: they say how they are gone on with."""

    def main():
        raise what

    with pytest.raises(SystemExit):
        run_main(main, "the same command goes on")
    said = capsys.readouterr().err
    assert (
        said.endswith("; the same command goes on\n") and "--" not in said and "state" not in said
    )


def test_a_card_that_this_torch_was_not_built_for(monkeypatch):
    """It is named, with the way to the CPU."""

    def refuse(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "get_device_name": lambda device: "Tesla P100",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "ones", refuse)
    with pytest.raises(UserError, match="Tesla P100 cannot be used .*no kernel image.*: set CUDA"):
        own_device(0)


def test_no_memory_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(Run, "current", None)

    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    with pytest.raises(SystemExit) as end:
        run_main(main)
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1
    assert "--gradient_checkpointing" in error and "--train_batch_size" in error


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(2)}, path)

    def refused(*args, **more):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files, "safe_open", refused)
    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(UserError, match="Permission denied.*chmod"):
        open_tensors(str(path))


def test_a_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    """The one in which a run is started."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    error = refusal(capsys, "run", "--teacher", "ring")
    assert "current folder" in error


def test_without_a_standard_error(monkeypatch):
    """As `2>&-` and services of Windows start programs."""
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress(range(3), "x")) == [0, 1, 2]
    with pytest.raises(SystemExit) as end:
        run_main(lambda: (_ for _ in ()).throw(UserError("x")))
    assert end.value.code == 2


# ---- what lies there is not what it seems --------------------------------------------------------


def test_links_to_folders_are_followed_once(tmp_path):
    """Class folders may be links, into the set itself and in a circle too; real ones come first."""
    for name in ("set/z/1.png", "else/deep/2.png", "set/z/sub/3.png"):
        picture(tmp_path / name)
    for link, to in {"a": "z", "else": "../else", "circle": ".", "z/sub/up": "../.."}.items():
        (tmp_path / "set" / link).symlink_to(to)
    found = [os.path.relpath(p, tmp_path / "set") for p in files_below(str(tmp_path / "set"))]
    assert found == ["z/1.png", "z/sub/3.png", "else/deep/2.png"]
    before = folder_fingerprint(str(tmp_path / "set"))
    picture(tmp_path / "else/deep/2.png", 90)
    assert folder_fingerprint(str(tmp_path / "set")) != before


@pytest.mark.parametrize("name", [".DS_Store", "z/Thumbs.db", "z/._1.png"])
def test_what_a_file_browser_leaves_is_no_other_data(tmp_path, name):
    picture(tmp_path / "z" / "1.png")
    before = folder_fingerprint(str(tmp_path))
    (tmp_path / name).write_bytes(b"x")
    assert folder_fingerprint(str(tmp_path)) == before


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_a_disk_that_does_not_answer_is_not_the_pictures_fault(monkeypatch, tmp_path, number):
    """The set would lose the picture for good: the index keeps what was skipped."""
    for name in "abc":
        picture(tmp_path / "data" / name / "x.png")
    how, real = (str(tmp_path / "data"), 8), loading.look_at

    def look_at(source, name, *rest):
        if name.startswith("b"):
            raise OSError(number, os.strerror(number), name)
        return real(source, name, *rest)

    with monkeypatch.context() as m:
        m.setattr(loading, "look_at", look_at)
        with pytest.raises(OSError, match=os.strerror(number)):
            load_data(*how, index=str(tmp_path / "index.safetensors"))
    assert len(load_data(*how, index=str(tmp_path / "index.safetensors"))[0]) == 3


def test_an_index_keeps_names_of_any_bytes(tmp_path):
    """Keys of an LMDB may hold NUL; names of files may be no UTF-8."""
    names = ["a\0b", "c", os.fsdecode(b"caf\xe9.png")]
    none = dict(places=torch.zeros(3, 4), label=torch.zeros(3), sums=torch.zeros(3))
    found = loading.Found(names, classes=[], sides=torch.zeros(4), most=-1, skipped=[], **none)
    found.save(str(tmp_path / "i"), "stamp")
    assert loading.load_found(str(tmp_path / "i"), "stamp").names == names


def test_a_cache_of_latents_that_became_shorter(tmp_path):
    cache = LatentCache(str(tmp_path / "c"), 4, {})
    cache.begin()
    save_tensors({"moments": torch.ones(4, 1, 2, 4, 8, 8).half()}, cache.path(0))
    cache.open()
    os.truncate(cache.path(0), os.path.getsize(cache.path(0)) - 100)
    assert len(cache.rows(torch.tensor([0, 2]), None, "cpu")[0]) == 2
    with pytest.raises(UserError, match="has become shorter"):
        cache.rows(torch.tensor([3]), None, "cpu")


def test_classes_without_latents_get_no_number(tmp_path):
    """Folders of .npy are numbered as those of pictures are."""
    space(tmp_path / "vae", latent_channels=4)
    for name in ("a", "c"):
        (tmp_path / "data" / name).mkdir(parents=True)
        np.save(tmp_path / "data" / name / "x.npy", np.ones((8, 2, 2), np.float32))
    for name in ("b", "d"):  # nothing in them
        (tmp_path / "data" / name).mkdir()
    found = Posteriors(str(tmp_path / "data"), str(tmp_path / "vae"), flat=False)
    assert found.label.tolist() == [0, 1] and found.classes == ["a", "c"]


def test_maps_of_an_npz(tmp_path):
    """Its pictures have names by number, and no file of their own to open."""
    np.savez(tmp_path / "s.npz", np.zeros((3, 8, 8, 3), np.uint8))
    source = open_set(str(tmp_path / "s.npz"), flat=True)
    for name, _ in source.members():
        picture(tmp_path / "maps" / f"{os.path.splitext(name)[0]}.png", 1)
    for path in (tmp_path / "maps").iterdir():
        Image.open(path).convert("L").save(path)
    x, _, _, maps = open_pictures(str(tmp_path / "s.npz"), 8, True, maps=str(tmp_path / "maps"))
    assert len(x) == 3 and maps[torch.arange(3)].eq(1).all()


def test_a_colon_in_a_name(tmp_path):
    """A time of day is a name; a drive of Windows leads out of the folder."""
    assert files.path_inside("set", "12:30.png", "x") == os.path.join("set", "12:30.png")
    for name in ("c:x.png", "C:/x.png", "../x"):
        with pytest.raises(UserError, match="which is not in set"):
            files.path_inside("set", name, "x")


def test_classes_in_names_of_no_files(tmp_path, capsys):
    np.savez(tmp_path / "s.npz", np.zeros((3, 8, 8, 3), np.uint8), np.arange(3))
    flags = ["--data", str(tmp_path / "s.npz"), "--resolution", "8", "--class_in_name"]
    error = refusal(capsys, tmp_path / "run", *flags, script=latent_fm)
    assert "--class_in_name is for files with names of pictures" in error


def test_images_that_are_of_no_set(tmp_path, capsys):
    """--samples would take them for its own, and draw nothing."""
    run = Run(dmd.parse_args(["--teacher", "ring", "--output_dir", str(tmp_path)]), "dmd")
    for name in ("samples.npz", "000000.png"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=f"has images, such as {name}"):
            begin_set(run, str(tmp_path), {"a": 1})
        (tmp_path / name).unlink()
    (tmp_path / "samples.png").write_bytes(b"x")  # of --sample without --samples
    begin_set(run, str(tmp_path), {"a": 1})
    (tmp_path / "000000.png").write_bytes(b"x")
    begin_set(run, str(tmp_path), {"a": 1})


def test_a_folder_that_was_deleted_meanwhile(tmp_path):
    """The old run's, in the first update of the new one: nothing is left to be renamed."""
    (tmp_path / "run.starting" / "state").mkdir(parents=True)
    take_output_dir(str(tmp_path / "run.starting"), str(tmp_path / "run"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_full_disk_leaves_no_temporary_file(monkeypatch, tmp_path):
    """Nor does the folder of a state stay, whose state.json found no room."""

    def full(*a):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            save_tensors({"x": torch.ones(4)}, str(tmp_path / "x"))
        m.setattr(files, "put_in_place", lambda f, *a: full())
        with pytest.raises(OSError, match="No space"):
            save_tensors({"x": torch.ones(4)}, str(tmp_path / "y"))
    assert not list(tmp_path.glob("x*"))
    monkeypatch.setattr(state, "save_json", full)
    with pytest.raises(OSError, match="No space"):
        state.save_state(str(tmp_path / "run"), 1, {}, {"world_size": 1})
    assert not list((tmp_path / "run" / "state").iterdir())


def test_a_log_that_begins_with_blank_lines(tmp_path):
    """As a power cut leaves it: NULs that are taken out."""
    (tmp_path / "log.csv").write_text("\0\0\n\n1,2\n")
    log = Log(str(tmp_path), 5)
    log.write({"step": 6, "loss": 0.5})
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss", "6,0.5"]


def test_a_state_without_seconds(tmp_path):
    save_json({"flags": {"train_batch_size": 1, "gradient_accumulation_steps": 1}, "step": 1},
              str(tmp_path / "state.json"))  # fmt: skip
    assert state.read_info(str(tmp_path))["seconds"] == 0


@pytest.mark.parametrize("value", ["0.1", [0.1], 2, -1])
def test_a_damaged_end_of_a_shift(tmp_path, value):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": value}
    save_json(config, str(tmp_path / "scheduler_config.json"))
    with pytest.raises(UserError, match="scheduler_config.json.*shift_terminal"):
        read_scheduler(str(tmp_path))
    save_json({**config, "shift_terminal": 0.1}, str(tmp_path / "scheduler_config.json"))
    read_scheduler(str(tmp_path))


def test_adapters_on_a_world_with_another_file(tmp_path):
    """The file of --teacher_lora decides what a world's adapters belong on."""
    save_file({"x": torch.zeros(4)}, tmp_path / "a.safetensors")
    args = SimpleNamespace(teacher="glyphs", teacher_lora=[str(tmp_path / "a.safetensors")])
    before = base_fingerprint(args)
    save_file({"x": torch.ones(4)}, tmp_path / "a.safetensors")
    assert before and base_fingerprint(args) != before
    assert base_fingerprint(SimpleNamespace(teacher="glyphs", teacher_lora=None)) is None


def test_a_teacher_of_prompts_and_data_with_labels(tmp_path):
    """Its network has no number of classes: the line names what it takes."""
    tensors = {"x0": torch.zeros(4, 4, 2, 4, 6), "cond.text": torch.zeros(4, 5, 8)}
    tensors |= {"uncond.text": torch.zeros(1, 5, 8), "cond.label": torch.arange(4)}
    save_file(tensors, tmp_path / "d.safetensors")
    base = SimpleNamespace(cond_names=("text",))
    teacher = SimpleNamespace(base=base, shape=(4, 2, 4, 6), config={}, world=None, folder=None)
    with pytest.raises(UserError, match="the teacher takes"):
        load_real_data(SimpleNamespace(data=str(tmp_path / "d.safetensors"), seed=0), teacher)


# ---- commands beside the scripts -----------------------------------------------------------------


def test_an_output_that_is_a_folder(tmp_path, capsys):
    """Said before anything is computed."""
    np.savez(tmp_path / "a.npz", np.zeros((3, 8, 8, 3), np.uint8))
    (tmp_path / "p.txt").write_text("a cat")
    same = ["--samples", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "a.npz")]
    error = refusal_of(capsys, metrics.main, *same, "--output", str(tmp_path))
    assert "is a folder: name a file" in error
    metrics.main([*same, "--output", str(tmp_path / "new" / "x.json")])
    assert (tmp_path / "new" / "x.json").is_file()
    flags = ["--teacher", "x", "--prompts_txt", str(tmp_path / "p.txt"), "--output", str(tmp_path)]
    assert "is a folder: name a new file" in refusal_of(capsys, encode.main, *flags)


def test_an_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    """The same command is given again, and no half folder is taken for a teacher."""
    net = DiTTransformer2DModel(**{**DIT_B_2, "num_layers": 1, "num_attention_heads": 2,
                                   "attention_head_dim": 12})  # fmt: skip
    save_tensors(to_official(net), str(tmp_path / "d.safetensors"))
    output = tmp_path / "deep" / "out"
    flags = ["--input", str(tmp_path / "d.safetensors"), "--output", str(output)]
    flags += ["--num_attention_heads", "2"]

    def stop(*a):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(convert, "sampler_of", stop)
        with pytest.raises(KeyboardInterrupt):
            convert.main(flags)
    assert not list(output.parent.iterdir())
    convert.main(flags)
    assert (output / "model_index.json").is_file() and len(list(output.parent.iterdir())) == 1
    back = ["--export", str(output), "--output", str(tmp_path / "there" / "o.safetensors")]
    convert.main(back)


def test_flags_of_convert_without_a_choice(tmp_path, capsys):
    net = DiTTransformer2DModel(**{**DIT_B_2, "num_layers": 1})
    save_tensors(to_official(net), str(tmp_path / "d.safetensors"))
    flags = ["--input", str(tmp_path / "d.safetensors"), "--output", str(tmp_path / "out")]
    for idle in (["--sample_size", "64"], ["--new_attention_order"]):
        error = refusal_of(capsys, convert.main, *flags, *idle)
        assert f"{idle[0]}: the weights of" in error and "leave it out" in error
    convert.main(flags)


def test_an_encoder_that_overflows():
    encode.refuse_overflow(torch.ones(2, 3), "x")
    with pytest.raises(UserError, match="not finite, in torch.float16: save its weights in"):
        encode.refuse_overflow(torch.tensor([1.0, float("inf")]).half(), "x")


@pytest.mark.parametrize("fps, hundredths", [(16, 100), (24, 100), (30, 80), (50, 48), (7, 343)])
def test_gifs_of_any_rate(tmp_path, fps, hundredths):
    """A GIF counts in hundredths of a second: its frames last as long as the video, all in all."""
    n = round(hundredths * fps / 100)
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 8, 8) * 5
    decode.save_picture(pixels, tmp_path / "v.gif", fps)
    with Image.open(tmp_path / "v.gif") as gif:
        lasts = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            lasts.append(gif.info["duration"])
    assert len(lasts) == n and sum(lasts) == pytest.approx(1000 * n / fps, abs=10)
    args = SimpleNamespace(fps=60.0, format=None, teacher="x")
    with pytest.raises(UserError, match="GIFs have at most 50"):
        decode.check_flags(args, videos=True)


def test_a_sheet_of_previews_is_no_sample(tmp_path):
    """models.decode writes beside the samples.png of the run that made the latents."""
    for name in ("000.png", "001.png", "samples.png"):
        picture(tmp_path / name)
    assert open_images(str(tmp_path), "--samples").n == 3
    save_json({}, str(tmp_path / "decoded.json"))
    assert open_images(str(tmp_path), "--samples").n == 2


def test_notes_of_a_killed_process(tmp_path):
    """A line that ends within a letter is not read."""
    path = str(tmp_path / "d.safetensors")
    with pytest.raises(KeyboardInterrupt):
        with pairing.RowWriter(path, {}) as file:
            file.add("x", torch.float32, (3, 2))
            file.note("é")
            raise KeyboardInterrupt
    notes = tmp_path / "d.safetensors.partial" / "notes"
    notes.write_bytes(notes.read_bytes() + "é".encode()[:1])
    with pytest.raises(KeyboardInterrupt):
        with pairing.RowWriter(path, {}) as file:
            assert file.notes == ["é"]
            raise KeyboardInterrupt


@pytest.mark.parametrize("name, most", [("Lumina2Pipeline", 299), ("ZImagePipeline", 1504)])
def test_more_tokens_than_the_network_has_places(tmp_path, name, most):
    save_json({"_class_name": name}, str(tmp_path / "model_index.json"))
    assert ask(str(tmp_path), max_length=most).max_length == most
    with pytest.raises(UserError, match=f"takes at most {most} tokens"):
        ask(str(tmp_path), max_length=most + 1)


# ---- flags that would mean nothing ---------------------------------------------------------------


def test_a_network_of_points_has_no_sizes(tmp_path, capsys):
    for flags in ("--network DiT-L/2", "--width 256", "--t_scale 1000"):
        given = ["--data", "ring", *flags.split(), "--output_dir", str(tmp_path / "run")]
        error = refusal_of(capsys, latent_fm.main, *given)
        assert f"{flags.split()[0]}: points have a small network" in error


def test_guidance_of_a_saved_network_without_a_null_label(tmp_path, capsys):
    """Trained with --label_dropout 0: the difference to its null label is a random direction."""
    run, out = tmp_path / "run", tmp_path / "samples"
    flags = "--data ring --pool 100 --max_train_steps 1 --train_batch_size 2 --label_dropout"
    for share, refused in (("0", True), ("0.1", False)):
        latent_fm.main([*flags.split(), share, "--output_dir", str(run)])
        given = ["--sample", str(run), "--output_dir", str(out), "--guidance_scale", "3"]
        if refused:
            error = refusal_of(capsys, latent_fm.main, *given)
            assert "trained with every label" in error and "give --guidance_scale 1" in error
            latent_fm.main([*given[:-1], "1"])
        else:
            latent_fm.main(given)


def test_a_student_of_phases_takes_a_step_in_each(monkeypatch, tmp_path, capsys):
    run, calls = tmp_path / "run", []
    monkeypatch.setattr(mdt_dist.report, "write_samples", lambda *a: calls.append(a[-1]))
    mdt_dist.main(flags_of("mdt_dist", tmp_path, "--arm", "vm", "--phases", "2"))
    assert load_json(str(run / "student" / "sampler.json"))["phases"] == 2
    given = ["--sample", str(run), "--output_dir", str(tmp_path / "s"), "--student_steps"]
    error = refusal_of(capsys, mdt_dist.main, *given, "1")
    assert "--student_steps 1: this student has 2 phases" in error
    mdt_dist.main([*given, "2"])
    mdt_dist.main(given[:-1])
    assert calls == [2, 2]


def test_one_expert_has_no_other_before_it(tmp_path, capsys):
    for flag in ("--target naive", "--regress x0", "--expert_init previous"):
        given = ["--teacher", "ring", "--phases", "1", *flag.split()]
        error = refusal_of(capsys, phased_dmd.main, *given, "--output_dir", str(tmp_path / "run"))
        assert f"{flag.split()[0]}: with --phases 1 there is one expert" in error


def test_experts_that_are_given_start_from_nothing_else(tmp_path):
    for n in (1, 2):
        (tmp_path / "experts" / f"expert{n}").mkdir(parents=True)
    phases = [SimpleNamespace(number=n, base=None) for n in (1, 2)]
    teacher = SimpleNamespace(base=None)
    found = phased_dmd.starting_sources(str(tmp_path / "experts"), teacher, phases)
    assert [os.path.basename(path) for path in found] == ["expert1", "expert2"]
    with pytest.raises(UserError, match="--expert_init previous: .* has a network for each"):
        phased_dmd.starting_sources(str(tmp_path / "experts"), teacher, phases, previous=True)


def test_layers_that_no_update_selects_are_named(tmp_path, capsys):
    flags = "--max_train_steps 1 --train_batch_size 2 --bank_size 2 --bank_batch 2 "
    flags += "--teacher_steps 0 --sampling_steps 4 --teacher "
    flags += save_tiny_teacher(tmp_path / "teacher")
    linvideo.main([*flags.split(), "--output_dir", str(tmp_path / "run")])
    assert "note: no update selects layers" in capsys.readouterr().out
    linvideo.main([*flags.split(), "--select", "0", "--output_dir", str(tmp_path / "run")])
    assert "no update selects" not in capsys.readouterr().out


@pytest.mark.parametrize("state", ["part", "step", "jump", "rollout"])
def test_a_step_of_linvideo_never_leads_up_in_noise(tmp_path, capsys, state):
    flags = ["--teacher", save_tiny_teacher(tmp_path / "t"), "--objective", "adm", "--state", state]
    flags += ["--bank_size", "2", "--min_time", "0.4"]
    error = refusal(capsys, tmp_path / "run", *flags, script=linvideo)
    assert "would lead up in noise: give less" in error


# ---- a network without classes, on a world -------------------------------------------------------


@pytest.mark.parametrize("name", ["ring", "glyphs", "clips", "voxels"])
def test_measures_of_samples_without_labels(name):
    """Data of all classes in any order are good, and nothing is said of labels."""
    world = load_world(name)
    x, label = world.data(600, 5)
    found = world.measure(x, None)
    assert not {"accuracy", "log_p", "diversity", "iou"} & found.keys()
    assert found["fd"] == pytest.approx(world.measure(x, label)["fd"], abs=20)
    assert found["fd"] < 0.05 * world.measure(x[label == 0], None)["fd"]
    assert len(world.moments(x, None)[0]) == 1


def test_a_teacher_without_classes_is_distilled_to_its_report(monkeypatch, tmp_path):
    """A world's own measures ask for labels, which such a network does not know."""
    monkeypatch.undo()
    net = RingMLP(num_classes=0, world="ring")
    save_network(net, network_config(net), str(tmp_path / "teacher"))
    flags = "--max_train_steps 1 --train_batch_size 4 --teacher_steps 2 --preview_samples 2"
    given = ["--teacher", str(tmp_path / "teacher"), *flags.split(), "--output_dir"]
    dmd.main([*given, str(tmp_path / "run")])
    rows = {r["name"]: r for r in load_json(str(tmp_path / "run" / "report.json"))["results"]}
    assert rows["data"]["fd"] < 50 < rows["student"]["fd"] and "accuracy" not in rows["student"]
    assert rows["student"]["fd_teacher"] >= 0


IDLE = [
    ("dmd", "--shared_fake", "the student has one step"),
    ("dmd", "--renoise ode", "the student has one step"),
    ("dmd", "--student_input real", "the student has one step"),
    ("dmd", "--student_steps 2 --shared_fake --fake_lora_rank 2", "an adapter does not know"),
    ("decoupled_dmd", "--shared_fake --fake_lora_rank 2", "an adapter does not know"),
    ("mdt_dist", "--arm vd --vm_weight 2", "there is no velocity matching"),
    ("mdt_dist", "--tangent_warmup 5", "the derivative has its full weight"),
    ("mdt_dist", "--derivative jvp --dt 0.1", "the derivative is exact"),
    ("latent_fm", "--lr_decay_share 0 --lr_schedule cosine", "rates do not fall"),
    ("latent_fm", "--data glyphs --pca_patch 2", "there is no PCA"),
]


@pytest.mark.parametrize("script, flags, why", IDLE)
def test_flags_that_nothing_reads(tmp_path, capsys, script, flags, why):
    module = importlib.import_module(script)
    given = [*flags.split(), "--output_dir", str(tmp_path / "run")]
    assert why in refusal_of(capsys, module.main, *given)
