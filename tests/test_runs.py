"""Runs as a user starts them: wrong input, crashes, resume, ranks, and what a run leaves behind."""

import json
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import launch
from helpers import (
    ENV,
    ROOT,
    TINY_WAN,
    alone,
    assert_bit_equal,
    each,
    killed,
    perturbed,
    read_log,
    refusal_of,
    save_tiny_teacher,
    save_tiny_wan,
    weights,
    without_time,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import decoupled_dmd
import dmd
import tdm
from models.diffusion import Diffusion, Flow
from models.draws import Draws
from models.files import UserError, save_json
from models.networks import INDEX, WEIGHTS, load_network, network_config, save_network
from models.networks.dit import DiT
from models.networks.wan import WanTransformer3DModel
from models.plumbing.run import Run, run_main
from models.plumbing.teachers import read_scheduler, start_teacher, starting_network, trainable

TINY_DIT = dict(size=(4, 4), patch=(2, 2), channels=1, dim=32, depth=2, num_classes=3)
SHORT = """--max_train_steps 6 --train_batch_size 4 --teacher_steps 2 --preview_samples 3
    --checkpointing_steps 2""".split()


# ---- wrong input: one line, exit code 2, before any training -------------------------------------


def refusal(capsys, out, *flags, script=dmd):
    """The same for a short run; nothing may have been written to --output_dir."""
    error = refusal_of(capsys, script.main, *SHORT, "--output_dir", str(out), *flags)
    assert not out.exists() or not any(out.rglob("*.safetensors"))
    return error


def copy_of_tensors(path):
    """Copies, since load_file maps the file, which may be about to be overwritten."""
    return {k: v.clone() for k, v in load_file(path).items()}


def break_teacher(folder, how):
    """Damage a good teacher folder in one way."""
    path, config, index = folder / WEIGHTS, folder / "config.json", folder / INDEX
    tensors, name = copy_of_tensors(path), "blocks.1.qkv.weight"

    def change_config(**entries):
        config.write_text(json.dumps({**json.loads(config.read_text()), **entries}))

    def write_index(weight_map):
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "truncated header":
        path.write_bytes(path.read_bytes()[:50])
    elif how == "missing key":
        save_file({k: v for k, v in tensors.items() if k != name}, path)
    elif how == "extra key":
        save_file({**tensors, "blocks.7.qkv.weight": torch.zeros(1)}, path)
    elif how == "wrong shape":
        save_file({**tensors, name: tensors[name][:-1].contiguous()}, path)
    elif how == "pickle":
        path.unlink()
        torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    elif how == "pickle under the right name":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif how == "zip pickle under the right name":
        torch.save(tensors, path)
    elif how == "no weights":
        path.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "config is not JSON":
        config.write_text("{")
    elif how == "config is a list":
        config.write_text("[]")
    elif how == "unknown class":
        change_config(_class_name="UNet2DModel")
    elif how == "unknown argument":
        change_config(frobnicate=3)
    elif how == "impossible width":
        change_config(dim=33)
    elif how == "index without its shard":
        path.unlink()
        write_index(dict.fromkeys(tensors, "model-00001-of-00001.safetensors"))
    elif how == "index of another shard":
        write_index({"elsewhere": WEIGHTS})
    elif how == "index is a list":
        index.write_text("[]")
    else:
        raise ValueError(how)


BROKEN_TEACHERS = {
    "truncated": "is truncated or not a safetensors file",
    "truncated header": "is truncated or not a safetensors file",
    "missing key": "lacks 'blocks.1.qkv.weight'",
    "extra key": "has 'blocks.7.qkv.weight', which",
    "wrong shape": "has shape (95, 32), config.json asks for (96, 32)",
    "pickle": "pickles can run code and are never loaded",
    "pickle under the right name": "is a pickle",
    "zip pickle under the right name": "is a pickle",
    "no weights": f"has no {WEIGHTS}",
    "no config": "has no config.json",
    "config is not JSON": "is not readable JSON",
    "config is a list": "is not a JSON object",
    "unknown class": "unknown network class 'UNet2DModel'",
    "unknown argument": "frobnicate",
    "impossible width": "must be a multiple of 32",
    "index without its shard": "does not exist",
    "index of another shard": "lacks 'elsewhere'",
    "index is a list": "is not a JSON object",
}


@pytest.mark.parametrize("how, says", BROKEN_TEACHERS.items(), ids=BROKEN_TEACHERS)
def test_broken_teacher_folders(tmp_path, capsys, how, says):
    save_tiny_teacher(tmp_path / "teacher")
    break_teacher(tmp_path / "teacher", how)
    assert says in refusal(capsys, tmp_path / "run", "--teacher", str(tmp_path / "teacher"))


# TEACHER, OTHER, EMPTY and FILE stand for paths that test_wrong_flags makes.
WRONG = [
    ("--max_train_steps -3", "--max_train_steps: must be >= 1, got -3"),
    ("--student_steps 0", "--student_steps"),
    ("--frobnicate", "unrecognized arguments: --frobnicate"),
    ("--max_train 3", "unrecognized arguments: --max_train 3"),
    ("--learning_rate nan", "--learning_rate"),
    ("--learning_rate fast", "'fast' is not a number"),
    ("--learning_rate inf", "--learning_rate"),
    ("--train_batch_size 2.5", "'2.5' is not an integer"),
    ("--dm_range 0.9 0.1", "--dm_range: LO must be below HI"),
    ("--teacher nowhere", "neither an embedded world"),
    ("--teacher EMPTY", "the folder is empty"),
    ("--resume_from_checkpoint nowhere", "no state.json there"),
    ("--gan_weight 0.1", "data: give --data FOLDER"),
    ("--gan_weight 0.1 --data ring", "--data"),
    ("--data nowhere --gan_weight 0.1", "--data nowhere"),
    ("--prompts x.safetensors", "takes class labels, not prompts"),
    ("--sample_shape 1 8 8", "DiT expects x of shape"),
    ("--output_dir FILE", "is not a folder"),
    ("--output_dir FILE/run", "is not a folder"),
    ("--output_dir .", "holds the current folder"),
    ("--data nowhere", "set --gan_weight, or leave --data out"),
    ("--seed 1" + 30 * "0", "--seed"),
    ("--sample TEACHER", "sampler.json does not exist"),
    ("--student_init OTHER", "does not have the shapes"),
]
WRONG_DMD = [
    ("--regression_weight 1 --teacher_steps 0", "give --teacher_steps of at least 1"),
    ("--regression_weight 1 --student_steps 2", "use --student_steps 1"),
    (
        "--no_fake_score --gan_weight 0.1 --data nowhere",
        "--no_fake_score leaves the GAN's head untrained, it sits on the fake score: "
        "use --gan_weight 0",
    ),
    (
        "--student_input real --student_steps 2",
        "--gan_weight and --student_input real need data: give --data FOLDER",
    ),
    ("--student_input real --data nowhere", "--student_input real with several steps"),
]
NOT_OF_TDM = {"--dm_range", "--data", "--gan_weight"}
WRONG_TDM = [
    *(case for case in WRONG if not NOT_OF_TDM & set(case[0].split())),
    ("--match clean --fake_noise fresh", "--fake_noise: with --match clean"),
    ("--match clean --regress x_s", "--regress x_s: with --match clean x itself is matched"),
    ("--loss demo --regress x_s", "--regress x_s: --loss demo is of x; leave one of them out"),
    ("--max_time 0", "--max_time: must be > 0 and <= 1"),
]
WRONG_BY_SCRIPT = {dmd: WRONG + WRONG_DMD, decoupled_dmd: WRONG, tdm: WRONG_TDM}


@pytest.mark.parametrize(
    "script, flags, says",
    [(script, *case) for script, cases in WRONG_BY_SCRIPT.items() for case in cases],
)
def test_wrong_flags(tmp_path, capsys, script, flags, says):
    teacher = save_tiny_teacher(tmp_path / "teacher")
    other = DiT(size=(8, 8), patch=(4, 4), channels=1, dim=32, depth=1, num_classes=3)
    save_network(other, network_config(other), str(tmp_path / "other"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("TEACHER", "OTHER", "EMPTY", "FILE"):
        flags = flags.replace(name, str(tmp_path / name.lower()))
    if "--teacher " not in flags:
        flags += f" --teacher {teacher}"
    assert says in refusal(capsys, tmp_path / "run", *flags.split(), script=script)


WRONG_PROMPTS = {
    "absent": "needs --prompts",
    "missing file": "does not exist",
    "wrong width": "are 12 wide (unconditional 12), the teacher takes 16",
    "no uncond": "lacks 'uncond.text'",
    "empty": "with N >= 1",
    "no features": "text has shape",
    "junk": "is truncated or not a safetensors file",
}


@pytest.mark.parametrize("how, says", WRONG_PROMPTS.items(), ids=WRONG_PROMPTS)
def test_wrong_prompts(tmp_path, capsys, how, says):
    flags = save_tiny_wan(tmp_path, width=12 if how == "wrong width" else 16)
    path = tmp_path / "prompts.safetensors"
    tensors = copy_of_tensors(path)
    if how == "absent":
        at = flags.index("--prompts")
        del flags[at : at + 2]
    elif how == "missing file":
        path.unlink()
    elif how == "no uncond":
        save_file({"cond.text": tensors["cond.text"]}, path)
    elif how == "empty":
        nothing = torch.zeros(0, 6, 16)
        save_file({"cond.text": nothing, "uncond.text": tensors["uncond.text"]}, path)
    elif how == "no features":
        save_file({"cond.text": torch.zeros(5, 16), "uncond.text": torch.zeros(1, 16)}, path)
    elif how == "junk":
        path.write_bytes(b"x" * 200)
    assert says in refusal(capsys, tmp_path / "run", *flags)


def test_wrong_scheduler_and_two_networks(tmp_path, capsys):
    flags = save_tiny_wan(tmp_path)
    base = dict(_class_name="DDIMScheduler", prediction_type="epsilon")
    ends = dict(beta_start=1e-4, beta_end=0.02)
    for config, says in (
        (dict(beta_schedule="squaredcos_cap_v2"), "'squaredcos_cap_v2' is not supported"),
        (dict(beta_schedule="linear", **ends, rescale_betas_zero_snr=True), "zero terminal SNR"),
        (dict(beta_schedule="linear"), "lacks beta_start or beta_end"),
    ):
        save_json({**base, **config}, str(tmp_path / "scheduler" / "scheduler_config.json"))
        assert says in refusal(capsys, tmp_path / "run", *flags)
    (tmp_path / "transformer_2").mkdir()
    assert "two-network teacher" in refusal(capsys, tmp_path / "run", *flags)


def test_schedulers_that_are_understood(tmp_path):
    """What diffusers writes for Wan (UniPC with flow sigmas, flow match), eps and v models."""

    def read(name, **config):
        config["_class_name"] = name
        save_json(config, str(tmp_path / "scheduler_config.json"))
        return read_scheduler(str(tmp_path))

    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    schedule, kind, own_shift = read("UniPCMultistepScheduler", **flow)
    assert isinstance(schedule, Flow) and (kind, own_shift) == ("flow_v", 3.0)
    assert read("FlowMatchEulerDiscreteScheduler")[1:] == ("flow_v", 1.0)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert read("DDIMScheduler", **betas, prediction_type="epsilon")[1:] == ("eps", None)
    zero_snr = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    schedule, kind, _ = read("DDIMScheduler", **betas, **zero_snr)
    assert kind == "vp_v" and schedule.zero_snr
    assert float(schedule.alpha(torch.tensor(1.0))) == pytest.approx(0, abs=1e-6)


WRONG_DATA = [
    ((1, 4, 4), [0, 1, 3, 2], "labels from 0 to 3, the teacher has classes 0 to 2"),
    ((1, 4, 4), [0, -1, 1, 2], "labels from -1"),
    ((1, 4, 5), [0, 1, 0, 2], "items are (1, 4, 5)"),
    ((1, 4, 4), None, "with [], the teacher takes (1, 4, 4) with ['label']"),
]


@pytest.mark.parametrize("shape, label, says", WRONG_DATA)
def test_data_that_is_not_the_teachers(tmp_path, capsys, shape, label, says):
    """Label K is the null label: GAN data under it, or beyond, would train without a word.

    Other shapes and conditions are refused too.
    """
    teacher, path = save_tiny_teacher(tmp_path / "teacher"), tmp_path / "data.safetensors"
    cond = {} if label is None else {"cond.label": torch.tensor(label)}
    save_file({"x0": torch.randn(4, *shape), **cond}, path)
    flags = f"--teacher {teacher} --gan_weight 0.1 --data {path}"
    assert says in refusal(capsys, tmp_path / "run", *flags.split())


def test_image_folder_with_other_classes_than_the_teachers(tmp_path, capsys):
    size = dict(size=(4, 4), patch=(2, 2), channels=3, dim=32, depth=1)
    net = DiT(**size, num_classes=2, class_names=["x", "y"])
    save_network(net, network_config(net), str(tmp_path / "teacher"))
    for name in ("w", "x", "y"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), "red").save(tmp_path / "data" / name / "a.png")
    flags = f"--teacher {tmp_path}/teacher --gan_weight 0.1 --data {tmp_path}/data".split()
    says = "its classes are w, x, y, the teacher's x, y"
    assert says in refusal(capsys, tmp_path / "run", *flags)
    (tmp_path / "data" / "w" / "a.png").unlink()  # an empty class folder is no class
    dmd.main([*SHORT, "--output_dir", str(tmp_path / "run"), *flags])
    assert (tmp_path / "run" / "report.json").exists()


def test_exit_code_from_the_shell(tmp_path):
    """The same in a real process: code 2, one line on stderr, nothing written.

    --help works for every script.
    """

    def run(script, *flags):
        return launch(ROOT / script, flags, cwd=tmp_path)

    bad = run("dmd.py", "--teacher", "nowhere")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
    assert bad.stderr.startswith("error: --teacher nowhere")
    assert list(tmp_path.iterdir()) == []
    for script in ("dmd.py", "latent_fm.py"):
        text = run(script, "--help")
        assert text.returncode == 0
        assert "--max_train_steps" in text.stdout and "(default: " in text.stdout


# ---- a loss that is not finite: exit code 1, the last checkpoint intact --------------------------

STUDENT_LOSS = {  # its name, its column in log.csv, and flags with which the script calls it
    dmd: ("dmd_loss", "loss_dm", []),
    decoupled_dmd: ("decoupled_dmd_loss", "loss_dm_ca", []),
    tdm: ("tdm_loss", "loss", ["--regress", "x_s"]),
}


@each
@pytest.mark.parametrize("turn", ["student", "fake"])
def test_nan_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path, capsys, monkeypatch, script, turn
):
    """In the fifth update a loss is nan: the line names it, and a resumed run is as if unbroken."""
    (name, column, more), poisoned_call = STUDENT_LOSS[script], 5
    if turn == "fake":
        name, column, poisoned_call = "fake_score_loss", "loss_fake", 10  # two a step
    teacher, out, calls = save_tiny_teacher(tmp_path / "teacher"), tmp_path / "run", []
    real, short = getattr(script, name), [*SHORT, "--teacher", teacher, *more]

    def poisoned(*args):
        calls.append(0)
        loss = real(*args)
        if len(calls) != poisoned_call:
            return loss
        return loss * float("nan") if turn == "fake" else (loss[0] * float("nan"), *loss[1:])

    flags = [*short, "--output_dir", str(out)]
    with monkeypatch.context() as m:
        m.setattr(script, name, poisoned)
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: script.main(flags))
    error = capsys.readouterr().err.splitlines()[-1]
    # what went wrong first is named first: a broken student spoils its fake's next samples too
    assert stop.value.code == 1 and error.startswith("error: not finite at update 5: ")
    named = re.findall(r"(\w+) = nan", error)
    assert named[0] == column and f"norm_{turn}" in named
    assert "; step-0000004 is intact: resume with --resume_from_checkpoint latest --learn" in error
    states = [p.name for p in sorted((out / "state").iterdir())]
    assert states == ["step-0000002", "step-0000004"]
    assert not (out / "report.json").exists() and len(read_log(out)) == 4
    script.main(
        [*flags, "--resume_from_checkpoint", "latest"]
    )  # from the checkpoint that the line names
    script.main([*short, "--output_dir", str(tmp_path / "whole")])
    assert_bit_equal(weights(out), weights(tmp_path / "whole"))


# ---- crash and resume ----------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=[dmd, decoupled_dmd, tdm], ids=lambda script: script.__name__
)
def unbroken(request, tmp_path_factory):
    """A short run with everything that has state: GAN, EMA, two steps, accumulation.

    -> script, flags, its final tensors and its log.
    """
    script = request.param
    root = tmp_path_factory.mktemp("unbroken")
    teacher = save_tiny_teacher(root / "teacher")
    x0 = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    save_file({"x0": x0, "cond.label": torch.arange(20) % 3}, root / "data.safetensors")
    more = f"--student_steps 2 --data {root}/data.safetensors --gan_weight 0.1"
    if script is tdm:
        more = "--student_steps 1 2"
    more += f" --teacher {teacher} --gradient_accumulation_steps 2 --lr_decay_share 0"
    flags = [*SHORT, *more.split()]
    script.main([*flags, "--output_dir", str(root / "run")])
    return script, flags, weights(root / "run"), read_log(root / "run")


# The first save is 6 files and the rename that makes it count, replace 8; fsync 5 is inside its
# student/, 15 right after the rename, 24 in the second save.
KILLS = [(dmd, "fsync", n) for n in (2, 5, 15, 24)] + [(dmd, "replace", n) for n in (6, 7, 8)]
KILLS += [(decoupled_dmd, "fsync", 24), (tdm, "fsync", 24)]


@pytest.mark.parametrize("unbroken, call, n", KILLS, indirect=["unbroken"])
def test_kill_during_a_save(unbroken, tmp_path, call, n):
    """SIGKILL between any two steps of a save.

    The next start finds the last whole checkpoint, or none, and ends bit-equal.
    """
    script, flags, final, log = unbroken
    flags = [*flags, "--output_dir", str(tmp_path / "run")]
    killed(tmp_path, script.__name__, call, "", n, *flags)
    script.main([*flags, "--resume_from_checkpoint", "latest"])
    assert_bit_equal(weights(tmp_path / "run"), final)
    assert without_time(read_log(tmp_path / "run")) == without_time(log)
    # half-written files of the dead run are swept
    assert not list((tmp_path / "run").rglob("*.tmp-*"))


@pytest.mark.parametrize("unbroken", [dmd], indirect=True)
def test_kill_during_training(unbroken, tmp_path):
    """SIGKILL from outside while steps go by, then resume, then a longer run: as if unbroken."""
    script, flags, final, _ = unbroken
    flags = [*flags, "--output_dir", str(tmp_path / "run")]
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *flags]
    command += ["--max_train_steps", "100000"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, env=ENV, cwd=tmp_path, **quiet)
    log, end = tmp_path / "run" / "log.csv", time.time() + 120
    while time.time() < end and not (log.is_file() and log.read_text().count("\n") > 4):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert log.read_text().count("\n") > 4
    state = sorted((tmp_path / "run" / "state").glob("step-*"))
    step = json.loads((state[-1] / "state.json").read_text())["step"]
    resumed, end = [*flags, "--resume_from_checkpoint", "latest"], max(step, 6)
    script.main([*resumed, "--max_train_steps", str(end)])
    if step <= 6:
        assert_bit_equal(weights(tmp_path / "run"), final)
    longer = ["--max_train_steps", str(end + 3)]
    script.main([*flags, "--output_dir", str(tmp_path / "whole"), *longer])
    script.main([*resumed, *longer])
    assert_bit_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_what_resume_refuses_and_repeats(unbroken, tmp_path, capsys):
    script, flags, final, _ = unbroken
    flags = [*flags, "--output_dir", str(tmp_path / "run")]
    resumed = [*flags, "--resume_from_checkpoint", "latest"]
    script.main(resumed)  # nothing there: starts fresh and says so
    assert "starting fresh" in capsys.readouterr().out
    (tmp_path / "run" / "samples.png").unlink()
    last = tmp_path / "run" / "state" / "step-0000006"
    script.main([*flags, "--resume_from_checkpoint", str(last)])  # finished: writes outputs again
    assert (tmp_path / "run" / "samples.png").is_file()
    assert_bit_equal(weights(tmp_path / "run"), final)
    other = "--learning_rate 1e-5 --seed 3 --renoise ode".split()  # rates may change
    error = refusal_of(capsys, script.main, *resumed, *other)
    was = script.parse_args(flags).renoise
    changed = [] if was == "ode" else [f"--renoise was {was!r} and is 'ode'"]
    changed = "; ".join([*changed, "--seed was 0 and is 3"])
    assert f"cannot resume with other flags: {changed}. Give the old values" in error
    (last / "state.safetensors").write_bytes(b"junk")
    error = refusal_of(capsys, script.main, *resumed)
    assert "is truncated or not a safetensors file" in error
    script.main([*flags, "--max_train_steps", "1"])  # without the flag nothing is overwritten
    assert (tmp_path / "run.1" / "report.json").is_file()
    assert len(read_log(tmp_path / "run")) == 1


# ---- what a run leaves ---------------------------------------------------------------------------


@each
def test_outputs_of_a_run(tmp_path, script):
    """student/ has the teacher's own config and layout.

    --sample draws the same pictures in a new process.
    """
    teacher, out = save_tiny_teacher(tmp_path / "teacher"), tmp_path / "run"
    flags = f"--teacher {teacher} --output_dir {out} --student_steps 2 --renoise ode"
    script.main([*SHORT, *flags.split()])
    left = {"student", "state", "samples.png", "samples.safetensors", "log.csv", "report.json"}
    assert {p.name for p in out.iterdir()} == left
    of_teacher, of_student = (
        json.loads(Path(folder, "config.json").read_text()) for folder in (teacher, out / "student")
    )
    assert of_student == of_teacher
    sampler = json.loads((out / "student" / "sampler.json").read_text())
    want = dict(times=[1.0, 0.5], rule="euler", method=script.__name__, guidance_scale=1.0)
    assert {k: sampler[k] for k in want} == want
    report = json.loads((out / "report.json").read_text())
    parameters = sum(v.numel() for v in load_file(Path(teacher) / WEIGHTS).values())
    assert (report["steps"], report["params"]) == (6, parameters)
    # without a world there is only the teacher to compare with
    names = [row["name"] for row in report["results"]]
    assert names == ["teacher", "teacher_same_steps", "student"]
    assert "paired_mse" in report["results"][-1] and "fd" not in report["results"][-1]
    rows = read_log(out)
    assert [int(r["step"]) for r in rows] == list(range(1, 7))
    assert all(float(v) == float(v) for r in rows for v in r.values())
    assert {"loss_fake", "norm_fake", "norm_student", "mean", "std", "seconds"} < set(rows[0])
    assert not any(name.endswith("_s") for name in rows[0])  # one clock for the whole step
    flags = ["--sample", "run/student", "--preview_samples", "3"]
    fresh = launch(ROOT / f"{script.__name__}.py", flags, cwd=tmp_path)
    assert fresh.returncode == 0, fresh.stderr
    samples = tmp_path / "runs" / "run-samples"
    x = load_file(samples / "samples.safetensors")["x0"]
    assert x.shape == (3, 1, 4, 4) and (samples / "samples.png").is_file()
    student, draw = load_network(str(out / "student"))[0], Draws(0, "evaluation", 0, range(3))
    grid, label = [1.0, 0.5, 0.0] if script is tdm else [1.0, 0.5], {"label": torch.arange(3)}

    def noise(name):
        return draw.normal(name, (1, 4, 4))

    want = script.sample(student, Diffusion(Flow(), "flow_v"), noise, grid, label, "ode")
    torch.testing.assert_close(x, want)


def test_student_of_a_run_is_a_teacher_and_a_start(tmp_path):
    """--teacher and --student_init take a run folder of ours; the fake starts at the teacher."""
    teacher, one = save_tiny_teacher(tmp_path / "teacher"), tmp_path / "one"
    dmd.main([*SHORT, "--teacher", teacher, "--output_dir", str(one)])
    flags = f"--teacher {one} --student_init {one} --output_dir {tmp_path}/two --max_train_steps 1"
    dmd.main([*SHORT, *flags.split()])
    of_one, of_two = (load_file(tmp_path / d / "student" / WEIGHTS) for d in ("one", "two"))
    assert of_one.keys() == of_two.keys()
    flags = f"--teacher {teacher} --student_init {one} --gradient_checkpointing"
    args = dmd.parse_args(flags.split())
    loaded = start_teacher(alone(args))
    student, fake = (
        trainable(alone(args), net, "student")
        for net in (starting_network(alone(args), loaded), loaded.base)
    )
    assert_bit_equal(student.state_dict(), of_one)
    assert_bit_equal(fake.state_dict(), load_file(Path(teacher) / WEIGHTS))
    assert student.gradient_checkpointing and fake.gradient_checkpointing
    assert not loaded.base.gradient_checkpointing  # the teacher's own graph is never built


def test_sharded_checkpoints(tmp_path):
    """Above the shard size weights are split with an index, as diffusers does.

    They are read back equal, and our index loads there too.
    """
    torch.manual_seed(0)
    net, folder = perturbed(WanTransformer3DModel(**TINY_WAN)), tmp_path / "net"
    config = {"_class_name": "WanTransformer3DModel", **net.config}
    save_network(net, config, str(folder), shard_bytes=20000)
    assert len(list(folder.glob("*-of-*.safetensors"))) > 2 and not (folder / WEIGHTS).exists()
    assert_bit_equal(load_network(str(folder))[0].state_dict(), net.state_dict())
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder)
    assert_bit_equal(dict(theirs.state_dict()), dict(net.state_dict()))
    save_network(net, config, str(folder))  # one file now: the old index must not win
    assert [p.name for p in sorted(folder.iterdir())] == ["config.json", WEIGHTS]


def run_of(*flags):
    """A Run with dmd.py's flags, in which nothing is trained."""
    return Run(dmd.parse_args([*SHORT, *flags]), "dmd")


@pytest.mark.parametrize("rollout", [True, False])
def test_a_call_without_gradient_costs_the_next_one_none(rollout):
    """A rollout under no_grad and the call with gradient share one autocast, as in every script.

    The cache of bfloat16 weights is off: with it, torch 2.10 and older leave weights without
    gradient that the rollout used first.
    """
    run, net = run_of("--mixed_precision", "bf16"), DiT(**TINY_DIT)
    perturbed(net)
    x, t = torch.randn(2, 1, 4, 4), torch.rand(2)
    with run.autocast():
        assert not torch.is_autocast_cache_enabled()
        if rollout:
            with torch.no_grad():
                x = net(x, t, label=torch.arange(2))
        y = net(x, t, label=torch.arange(2))
        y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert torch.is_autocast_cache_enabled() and not torch.is_autocast_enabled("cpu")


def test_how_far_apart_the_scores_are():
    """dm_cos and dm_rel_gap of hand-made predictions, averaged over samples."""
    run, real = run_of(), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    run.note_scores(real, torch.tensor([[-4.0, 3.0], [0.0, 3.0]]))  # a right angle; half as far on
    assert run.sums["dm_cos"] == pytest.approx((0 + 1) / 2)
    assert run.sums["dm_rel_gap"] == pytest.approx((2**0.5 + 0.5) / 2)
    run.sums, run.counts = {}, {}
    run.note_scores(real[:, None], real[:, None].bfloat16())
    assert run.sums["dm_cos"] == pytest.approx(1) and run.sums["dm_rel_gap"] == 0
    run.note_scores(0 * real, real)  # nothing to divide by
    assert run.sums["dm_rel_gap"] < float("inf")


# ---- ranks and folders ---------------------------------------------------------------------------


def test_wrong_input_under_torchrun_is_one_line(tmp_path):
    """Both ranks stop, one speaks."""
    ranks = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    command = [sys.executable, *ranks, str(ROOT / "dmd.py"), "--teacher", "nowhere"]
    output = dict(capture_output=True, text=True)
    done = subprocess.run(command, env=ENV, cwd=tmp_path, timeout=600, **output)
    assert done.returncode != 0
    assert sum("neither an embedded world" in line for line in done.stderr.splitlines()) == 1


def test_existing_folder_named_with_a_slash_is_renamed(tmp_path):
    teacher, out = save_tiny_teacher(tmp_path / "teacher"), str(tmp_path / "run") + "/"
    for _ in range(2):
        dmd.main([*SHORT, "--teacher", teacher, "--output_dir", out])
    assert (tmp_path / "run.1" / "report.json").exists()
    assert (tmp_path / "run" / "report.json").exists()


@each
def test_resume_beyond_the_end_and_into_another_folder(tmp_path, script):
    """A shorter run than the checkpoint is refused.

    A finished checkpoint that is given by its path is written out whole elsewhere.
    """
    flags, out = [*SHORT, "--teacher", save_tiny_teacher(tmp_path / "teacher")], tmp_path / "run"
    script.main([*flags, "--output_dir", str(out)])
    shorter = f"--output_dir {out} --max_train_steps 5 --resume_from_checkpoint latest"
    with pytest.raises(UserError, match="beyond --max_train_steps 5"):
        script.main([*flags, *shorter.split()])
    last = out / "state" / "step-0000006"
    elsewhere = f"--output_dir {tmp_path}/new --resume_from_checkpoint {last}"
    script.main([*flags, *elsewhere.split()])
    old, new = (load_file(folder / "student" / WEIGHTS) for folder in (out, tmp_path / "new"))
    assert_bit_equal(old, new)


@each
def test_samples_of_another_shape(tmp_path, capsys, script):
    """A student trained at --sample_shape is sampled at it, as the run itself showed.

    So it is one batch at a time. Videos also leave a GIF. Samples never replace those of a run.
    """
    flags = save_tiny_wan(tmp_path)
    script.main([*SHORT, *flags, "--output_dir", str(tmp_path / "run")])
    prompts = flags[flags.index("--prompts") + 1]
    sampling = f"""--sample {tmp_path}/run --prompts {prompts} --preview_samples 2
        --train_batch_size 1""".split()
    script.main([*sampling, "--output_dir", str(tmp_path / "samples")])
    ours, again = (
        load_file(tmp_path / d / "samples.safetensors")["x0"] for d in ("run", "samples")
    )
    assert ours.shape == (2, 4, 2, 4, 6)
    torch.testing.assert_close(ours, again, rtol=1e-4, atol=1e-5)
    for folder in ("run", "samples"):
        assert Image.open(tmp_path / folder / "samples.gif").n_frames == 2
    error = refusal_of(capsys, script.main, *sampling, "--output_dir", str(tmp_path / "run"))
    assert "is a run with samples of its own" in error
    wrong = f"--output_dir {tmp_path}/s2 --sample_shape 3 2 4 6".split()
    assert "channels" in refusal_of(capsys, script.main, *sampling, *wrong)
