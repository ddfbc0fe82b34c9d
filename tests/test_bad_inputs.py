"""Inputs that nobody foresaw, one line each: what is wrong is named, before any training.

Kinds: numbers that are not finite or of another sort, in any row; names that lead out of a folder;
files of a variant; descriptions that are not what they seem. More tables of wrong input are in
test_runs.py, test_advice.py and the scripts' own tests.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers import (
    refusal_of,
    save_tiny_pixart,
    save_tiny_teacher,
    save_tiny_wan,
    save_tiny_z_image,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dmd
import latent_fm
from models.diffusion import VP, Flow
from models.files import UserError
from models.networks import INDEX, WEIGHTS
from models.plumbing.data import SparseRows, load_data
from models.plumbing.teachers import describe_schedule, read_sampler

SHORT = "--max_train_steps 1 --train_batch_size 2".split()


def refusal(capsys, out, *flags, script=dmd):
    return refusal_of(capsys, script.main, *SHORT, "--output_dir", str(out), *flags)


# ---- prompts -------------------------------------------------------------------------------------

ROOTS = {"z_image": save_tiny_z_image, "wan": save_tiny_wan,
         "pixart": lambda root: save_tiny_pixart(root, 512)}  # fmt: skip
PROMPTS = [  # the teacher, the tensor, the row that is wrong, what is in it, the message
    ("z_image", "uncond.text_mask", 0, False, "row 0 of uncond.text_mask is false everywhere"),
    ("z_image", "cond.text_mask", 3, False, "row 3 of cond.text_mask is false everywhere"),
    ("pixart", "cond.mask", 4, False, "row 4 of cond.mask is false everywhere"),
    ("pixart", "cond.text", 2, float("nan"), "row 2 of cond.text has numbers that are not finite"),
    ("wan", "cond.text", 4, float("inf"), "row 4 of cond.text has numbers that are not finite"),
    ("wan", "uncond.text", 0, -float("inf"), "row 0 of uncond.text has numbers that are not"),
]


@pytest.mark.parametrize("root, name, row, value, says", PROMPTS)
def test_prompts_with_a_wrong_row(tmp_path, capsys, root, name, row, value, says):
    """Every row is looked at, also the unconditional one, not only the first."""
    flags, path = ROOTS[root](tmp_path), tmp_path / "prompts.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    tensors[name][row] = value
    save_file(tensors, path)
    assert says in refusal(capsys, tmp_path / "run", *flags)


# ---- teachers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, capsys, value):
    """The tensor is named, not the learning rate."""
    path = Path(save_tiny_teacher(tmp_path / "teacher")) / WEIGHTS
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    tensors["blocks.1.qkv.weight"][3, 3] = value
    save_file(tensors, path)
    error = refusal(capsys, tmp_path / "run", "--teacher", str(tmp_path / "teacher"))
    assert "'blocks.1.qkv.weight' has numbers that are not finite" in error


VARIANTS = ["diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_only_a_variant_of_the_weights(tmp_path, capsys, name):
    """It is named, and what to call it; with that name it loads."""
    folder = Path(save_tiny_teacher(tmp_path / "teacher"))
    (folder / WEIGHTS).rename(folder / name)
    error = refusal(capsys, tmp_path / "run", "--teacher", str(folder))
    assert f"only a variant ({name})" in error and WEIGHTS in error
    (folder / name).rename(folder / WEIGHTS)
    error = refusal(capsys, tmp_path / "run", "--teacher", str(folder), "--prompts", "x")
    assert "takes class labels" in error


def test_an_index_names_files_of_its_folder_alone(tmp_path, capsys):
    """Whatever path it gives, what is read lies beside it."""
    folder = Path(save_tiny_teacher(tmp_path / "teacher"))
    (folder / WEIGHTS).rename(tmp_path / WEIGHTS)
    names = dict.fromkeys(load_file(tmp_path / WEIGHTS), f"../{WEIGHTS}")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    error = refusal(capsys, tmp_path / "run", "--teacher", str(folder))
    assert "does not exist" in error


# ---- data ----------------------------------------------------------------------------------------

X0 = torch.linspace(-1, 1, 6 * 16).reshape(6, 1, 4, 4)
LABEL = torch.arange(6) % 3
FILES = [
    (X0, LABEL + 0.5, "cond.label is F32 (6,): wanted integers (N,)"),
    (X0, LABEL[:, None], "cond.label is I64 (6, 1): wanted integers (N,)"),
    (X0, LABEL > 0, "cond.label is BOOL (6,): wanted integers (N,)"),
    ((100 * X0).long(), LABEL, "x0 is I64: wanted floats, or bytes (U8)"),
    ((100 * X0).to(torch.int8), LABEL, "x0 is I8: wanted floats, or bytes (U8)"),
    (X0 > 0, LABEL, "x0 is BOOL: wanted floats, or bytes (U8)"),
    (X0.where(torch.arange(6)[:, None, None, None] != 4, torch.nan), LABEL, "row 4 of x0 has"),
    (X0.double().where(X0 < 0.99, 1e300), LABEL, "row 5 of x0 has numbers that are not finite"),
]


@pytest.mark.parametrize("x0, label, says", FILES)
def test_data_files_with_numbers_of_another_sort(tmp_path, x0, label, says):
    """Nothing is converted in silence."""
    path = str(tmp_path / "d.safetensors")
    save_file({"x0": x0, "cond.label": label}, path)
    with pytest.raises(UserError) as error:
        load_data(path)
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["../out.png", "/etc/passwd", "x/../../out.png", "C:/x.png"])
def test_a_dataset_json_that_leads_out_of_its_folder(tmp_path, name):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "out.png")
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"labels": [[name, 0]]}))
    with pytest.raises(UserError, match="which is not in"):
        load_data(str(tmp_path / "data"))


def test_points_with_numbers_that_are_not_finite(tmp_path):
    feats = torch.zeros(5, 2)
    feats[3, 1] = torch.nan
    tensors = {"coords": torch.zeros(5, 3, dtype=torch.int32), "feats": feats}
    save_file({**tensors, "offsets": torch.tensor([0, 2, 5])}, tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="row 3 of feats has numbers that are not finite"):
        SparseRows(safe_open(tmp_path / "d.safetensors", "pt"), "--data d")


@pytest.mark.parametrize("space", ["identity", "pca"])
def test_pixels_of_0_to_255_as_floats(tmp_path, capsys, space):
    """A network would learn them, and every picture of it would be white."""
    path = str(tmp_path / "d.safetensors")
    save_file({"x0": 255 * torch.rand(8, 3, 8, 8)}, path)
    flags = f"--task uncond --data {path} --autoencoder {space}".split()
    error = refusal(capsys, tmp_path / "run", *flags, script=latent_fm)
    assert "x0 goes from" in error and "within [-1, 1]" in error


# ---- sampler.json --------------------------------------------------------------------------------

GOOD = {
    "method": "dmd",
    "prediction": "flow_v",
    "schedule": describe_schedule(Flow()),
    "times": [1.0, 0.5],
    "timestep_shift": 1.0,
    "rule": "euler",
    "sample_shape": [1, 4, 4],
}
TDM = {"method": "tdm", "grids": {"1": [1.0, 0.0], "2": [1.0, 0.5, 0.0]}, "steps_cond": True}
BAD_GRIDS = [
    {},
    {"1": [1.0, 0.0]},  # not that of its times
    {"2": [1.0, 0.5, 0.0], "1": "x"},
    {"2": [1.0, 0.5, 0.0], "3": [1.0, 0.0]},
    {"2": [1.0, 0.5, 0.0], "1": [1.0, 0.5]},
    {"2": [1.0, 0.5, 0.0], "1": [0.0, 1.0]},
    [[1.0, 0.5, 0.0]],
]
SAMPLERS = [
    {"times": [0.5, 1.0]},
    {"times": []},
    {"times": "1"},
    {"times": [float("nan")]},
    {"timestep_shift": 0},
    {"timestep_shift": float("inf")},
    {"prediction": "noise"},
    {"schedule": {"type": "cosine"}},
    {"schedule": "flow"},
    {"schedule": {**describe_schedule(VP("linear", 1e-4, 0.02)), "n": 0}},
    {"schedule": {**describe_schedule(VP("linear", 1e-4, 0.02)), "n": 10**12}},
    {"schedule": {**describe_schedule(VP("linear", 1e-4, 0.02)), "beta_end": 2.0}},
    {"sample_shape": [1, 4, -4]},
    {"sample_shape": [1, 4, 10**12]},
    {"sample_shape": "large"},
    {"method": 3},
    {"rule": None},
    {"lora_rank": "4"},
    {"lora_rank": 4},
    {"lora_rank": 4, "base": "x", "seed": 0, "weights": "../../adapter.safetensors"},
    {"lora_rank": 4, "base": 7, "seed": 0, "weights": "adapter.safetensors"},
    {"lora_rank": 4, "base": "x", "seed": None, "weights": "adapter.safetensors"},
    {"experts": [{"weights": "/etc/passwd", "steps": 2, "network": None}]},
    {"experts": [{"weights": "expert1", "steps": 10**9, "network": None}]},
    {"experts": {}},
    {"experts": [3]},
    {"guidance_scale": "much"},
    {"method": "mdt_dist"},
    {"method": "tdm"},
    *({**TDM, "grids": grids} for grids in BAD_GRIDS),
    {**TDM, "steps_cond": 1},
]


@pytest.mark.parametrize("wrong", SAMPLERS, ids=lambda w: str(w)[:60])
def test_sampler_descriptions(tmp_path, wrong):
    """What a student folder says of itself is checked before anything is made of it."""
    path = tmp_path / "sampler.json"
    path.write_text(json.dumps(GOOD))
    assert read_sampler(str(tmp_path))[0] == GOOD
    path.write_text(json.dumps({**GOOD, **TDM}))
    assert read_sampler(str(tmp_path))[0] == {**GOOD, **TDM}
    path.write_text(json.dumps({**GOOD, **wrong}))
    with pytest.raises(UserError, match="is not a sampler description of ours"):
        read_sampler(str(tmp_path))


# ---- two things of one name ----------------------------------------------------------------------


@pytest.mark.parametrize("flag, script", [("teacher", dmd), ("data", latent_fm)])
def test_a_folder_called_like_a_world(tmp_path, monkeypatch, capsys, flag, script):
    (tmp_path / "ring").mkdir()
    monkeypatch.chdir(tmp_path)
    error = refusal(capsys, tmp_path / "run", f"--{flag}", "ring", script=script)
    assert "that is an embedded world, and a folder here" in error
