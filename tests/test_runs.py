"""Runs as a user starts them: wrong input, crashes, resume, ranks, and what a run leaves behind."""

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    ENV,
    ROOT,
    SUICIDAL,
    TINY_WAN,
    assert_bit_equal,
    assert_two_ranks_are_one_process,
    each,
    perturbed,
    read_log,
    refusal_of,
    save_tiny_pixart,
    save_tiny_teacher,
    save_tiny_wan,
    save_tiny_z_image,
    weights,
    without_time,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import decoupled_dmd
import dmd
import tdm
from models.diffusion import Flow
from models.draws import Draws
from models.files import UserError, save_json
from models.networks import INDEX, WEIGHTS, load_network, network_config, save_network
from models.networks.dit import DiT
from models.networks.wan import WanTransformer3DModel
from models.plumbing.run import run_main
from models.plumbing.teachers import load_networks, read_scheduler

SHORT = [
    "--max_train_steps",
    "6",
    "--train_batch_size",
    "4",
    "--teacher_steps",
    "2",
    "--preview_samples",
    "3",
    "--checkpointing_steps",
    "2",
]


# ---- wrong input: one line, exit code 2, before any training ----------------------------------------------------------


def refusal(capsys, out, *flags, script=dmd):
    """The same for a short run; nothing may have been written to --output_dir."""
    error = refusal_of(capsys, script.main, *SHORT, "--output_dir", str(out), *flags)
    assert not out.exists() or not any(out.rglob("*.safetensors"))
    return error


def break_teacher(folder, how):
    """Damage a good teacher folder in one way."""
    path, config = folder / WEIGHTS, folder / "config.json"
    tensors = {
        k: v.clone() for k, v in load_file(path).items()
    }  # load_file maps the file that is about to be overwritten
    name = "blocks.1.qkv.weight"
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
        config.write_text(
            json.dumps({**json.loads(config.read_text()), "_class_name": "UNet2DModel"})
        )
    elif how == "unknown argument":
        config.write_text(json.dumps({**json.loads(config.read_text()), "frobnicate": 3}))
    elif how == "impossible width":
        config.write_text(json.dumps({**json.loads(config.read_text()), "dim": 33}))
    elif how == "index without its shard":
        path.unlink()
        (folder / INDEX).write_text(
            json.dumps(
                {
                    "metadata": {},
                    "weight_map": {k: "model-00001-of-00001.safetensors" for k in tensors},
                }
            )
        )
    elif how == "index of another shard":
        (folder / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": {"elsewhere": WEIGHTS}})
        )
    elif how == "index is a list":
        (folder / INDEX).write_text("[]")


@pytest.mark.parametrize(
    "how, says",
    [
        ("truncated", "is truncated or not a safetensors file"),
        ("truncated header", "is truncated or not a safetensors file"),
        ("missing key", "lacks 'blocks.1.qkv.weight'"),
        ("extra key", "has 'blocks.7.qkv.weight', which"),
        ("wrong shape", "has shape (95, 32), config.json asks for (96, 32)"),
        ("pickle", "pickles can run code and are never loaded"),
        ("pickle under the right name", "is a pickle"),
        ("zip pickle under the right name", "is a pickle"),
        ("no weights", f"has no {WEIGHTS}"),
        ("no config", "has no config.json"),
        ("config is not JSON", "is not readable JSON"),
        ("config is a list", "is not a JSON object"),
        ("unknown class", "unknown network class 'UNet2DModel'"),
        ("unknown argument", "frobnicate"),
        ("impossible width", "must be a multiple of 32"),
        ("index without its shard", "does not exist"),
        ("index of another shard", "lacks 'elsewhere'"),
        ("index is a list", "is not a JSON object"),
    ],
)
def test_broken_teacher_folders(tmp_path, capsys, how, says):
    save_tiny_teacher(tmp_path / "teacher")
    break_teacher(tmp_path / "teacher", how)
    assert says in refusal(capsys, tmp_path / "run", "--teacher", str(tmp_path / "teacher"))


WRONG = [
    (["--max_train_steps", "-3"], "--max_train_steps: must be >= 1, got -3"),
    (["--student_steps", "0"], "--student_steps"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    (["--max_train", "3"], "unrecognized arguments: --max_train 3"),
    (["--learning_rate", "nan"], "--learning_rate"),
    (["--learning_rate", "fast"], "'fast' is not a number"),
    (["--learning_rate", "inf"], "--learning_rate"),
    (["--train_batch_size", "2.5"], "'2.5' is not an integer"),
    (["--dm_range", "0.9", "0.1"], "LO must be below HI"),
    (["--teacher", "nowhere"], "neither an embedded world"),
    (["--teacher", "EMPTY"], "the folder is empty"),
    (["--resume_from_checkpoint", "nowhere"], "no state.json there"),
    (["--gan_weight", "0.1"], "data: give --data FOLDER"),
    (["--gan_weight", "0.1", "--data", "ring"], "--data"),
    (["--data", "nowhere", "--gan_weight", "0.1"], "--data nowhere"),
    (["--prompts", "x.safetensors"], "takes class labels, not prompts"),
    (["--sample_shape", "1", "8", "8"], "DiT expects x of shape"),
    (["--output_dir", "FILE"], "is not a folder"),
    (["--output_dir", "FILE/run"], "is not a folder"),
    (["--output_dir", "."], "holds the current folder"),
    (["--data", "nowhere"], "leave --data out"),
    (["--seed", "1" + 30 * "0"], "--seed"),
    (["--sample", "TEACHER"], "sampler.json does not exist"),
    (["--student_init", "OTHER"], "does not have the shapes"),
]
WRONG_DMD = [
    (["--regression_weight", "1", "--teacher_steps", "0"], "--teacher_steps"),
    (["--regression_weight", "1", "--student_steps", "2"], "--student_steps 1"),
    (["--no_fake_score", "--gan_weight", "0.1", "--data", "nowhere"], "use --gan_weight 0"),
]


WRONG_TDM = [
    case for case in WRONG if not {"--dm_range", "--data", "--gan_weight"} & set(case[0])
] + [(["--match", "clean", "--fake_noise", "fresh"], "--fake_noise: with --match clean")]


@pytest.mark.parametrize(
    "script, flags, says",
    [
        (script, *case)
        for script, cases in ((dmd, WRONG + WRONG_DMD), (decoupled_dmd, WRONG), (tdm, WRONG_TDM))
        for case in cases
    ],
)
def test_wrong_flags(tmp_path, capsys, script, flags, says):
    teacher = save_tiny_teacher(tmp_path / "teacher")
    other = DiT(size=(8, 8), patch=(4, 4), channels=1, dim=32, depth=1, num_classes=3)
    save_network(other, network_config(other), str(tmp_path / "other"))
    (tmp_path / "empty").mkdir(), (tmp_path / "file").write_text("")
    names = {
        "EMPTY": str(tmp_path / "empty"),
        "FILE": str(tmp_path / "file"),
        "TEACHER": teacher,
        "OTHER": str(tmp_path / "other"),
    }
    flags = [
        f.replace("FILE", names["FILE"]) if f.startswith("FILE") else names.get(f, f) for f in flags
    ]
    assert says in refusal(
        capsys,
        tmp_path / "run",
        *([] if "--teacher" in flags else ["--teacher", teacher]),
        *flags,
        script=script,
    )


@pytest.mark.parametrize(
    "how, says",
    [
        ("absent", "needs --prompts"),
        ("missing file", "does not exist"),
        ("wrong width", "are 12 wide (unconditional 12), the teacher takes 16"),
        ("no uncond", "lacks 'uncond.text'"),
        ("empty", "with N >= 1"),
        ("no features", "text has shape"),
        ("junk", "is truncated or not a safetensors file"),
    ],
)
def test_wrong_prompts(tmp_path, capsys, how, says):
    flags = save_tiny_wan(tmp_path, width=12 if how == "wrong width" else 16)
    path = tmp_path / "prompts.safetensors"
    tensors = {
        k: v.clone() for k, v in load_file(path).items()
    }  # load_file maps the file that is about to be overwritten
    if how == "absent":
        del flags[flags.index("--prompts") : flags.index("--prompts") + 2]
    elif how == "missing file":
        path.unlink()
    elif how == "no uncond":
        save_file({"cond.text": tensors["cond.text"]}, path)
    elif how == "empty":
        save_file({"cond.text": torch.zeros(0, 6, 16), "uncond.text": tensors["uncond.text"]}, path)
    elif how == "no features":
        save_file({"cond.text": torch.zeros(5, 16), "uncond.text": torch.zeros(1, 16)}, path)
    elif how == "junk":
        path.write_bytes(b"x" * 200)
    assert says in refusal(capsys, tmp_path / "run", *flags)


def test_wrong_scheduler_and_two_networks(tmp_path, capsys):
    flags = save_tiny_wan(tmp_path)
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.write_text(
        json.dumps(
            {
                "_class_name": "DDIMScheduler",
                "beta_schedule": "squaredcos_cap_v2",
                "prediction_type": "epsilon",
            }
        )
    )
    assert "'squaredcos_cap_v2' is not supported" in refusal(capsys, tmp_path / "run", *flags)
    scheduler.write_text(
        json.dumps(
            {
                "_class_name": "DDIMScheduler",
                "beta_schedule": "linear",
                "beta_start": 1e-4,
                "beta_end": 0.02,
                "prediction_type": "epsilon",
                "rescale_betas_zero_snr": True,
            }
        )
    )
    assert "zero terminal SNR" in refusal(capsys, tmp_path / "run", *flags)
    scheduler.write_text(
        json.dumps(
            {
                "_class_name": "DDIMScheduler",
                "beta_schedule": "linear",
                "prediction_type": "epsilon",
            }
        )
    )
    assert "lacks beta_start or beta_end" in refusal(capsys, tmp_path / "run", *flags)
    (tmp_path / "transformer_2").mkdir()
    assert "two-network teacher" in refusal(capsys, tmp_path / "run", *flags)


def test_schedulers_that_are_understood(tmp_path):
    """What diffusers writes for Wan (UniPC with flow sigmas, flow match Euler) and for eps and v models."""

    def read(**config):
        save_json(config, str(tmp_path / "scheduler_config.json"))
        return read_scheduler(str(tmp_path))

    schedule, kind, own_shift = read(
        _class_name="UniPCMultistepScheduler",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    )
    assert isinstance(schedule, Flow) and (kind, own_shift) == ("flow_v", 3.0)
    assert read(_class_name="FlowMatchEulerDiscreteScheduler")[1:] == ("flow_v", 1.0)
    betas = dict(
        _class_name="DDIMScheduler",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
    )
    assert read(**betas, prediction_type="epsilon")[1:] == ("eps", None)
    schedule, kind, _ = read(**betas, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert (
        kind == "vp_v"
        and schedule.zero_snr
        and float(schedule.alpha(torch.tensor(1.0))) == pytest.approx(0, abs=1e-6)
    )


@pytest.mark.parametrize(
    "shape, cond, says",
    [
        ((1, 4, 4), {"label": [0, 1, 3, 2]}, "labels from 0 to 3, the teacher has classes 0 to 2"),
        ((1, 4, 4), {"label": [0, -1, 1, 2]}, "labels from -1"),
        ((1, 4, 5), {"label": [0, 1, 0, 2]}, "items are (1, 4, 5)"),
        ((1, 4, 4), {}, "with [], the teacher takes (1, 4, 4) with ['label']"),
    ],
)
def test_data_that_is_not_the_teachers(tmp_path, capsys, shape, cond, says):
    """Label K is the null label: GAN data under it, or beyond, would train without a word. Other shapes and conditions are refused too."""
    teacher, path = save_tiny_teacher(tmp_path / "teacher"), tmp_path / "data.safetensors"
    save_file(
        {
            "x0": torch.randn(4, *shape),
            **{f"cond.{name}": torch.tensor(v) for name, v in cond.items()},
        },
        path,
    )
    assert says in refusal(
        capsys, tmp_path / "run", "--teacher", teacher, "--gan_weight", "0.1", "--data", str(path)
    )


def test_image_folder_with_other_classes_than_the_teachers(tmp_path, capsys):
    net = DiT(
        size=(4, 4),
        patch=(2, 2),
        channels=3,
        dim=32,
        depth=1,
        num_classes=2,
        class_names=["x", "y"],
    )
    save_network(net, network_config(net), str(tmp_path / "teacher"))
    for name in ("w", "x", "y"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), "red").save(tmp_path / "data" / name / "a.png")
    flags = [
        "--teacher",
        str(tmp_path / "teacher"),
        "--gan_weight",
        "0.1",
        "--data",
        str(tmp_path / "data"),
    ]
    assert "its classes are w, x, y, the teacher's x, y" in refusal(
        capsys, tmp_path / "run", *flags
    )
    (tmp_path / "data" / "w" / "a.png").unlink()  # an empty class folder is no class
    dmd.main([*SHORT, "--output_dir", str(tmp_path / "run"), *flags])
    assert (tmp_path / "run" / "report.json").exists()


def test_exit_code_from_the_shell(tmp_path):
    """The same in a real process: code 2, one line on stderr, nothing written; --help works for every script."""
    run = lambda *a: subprocess.run(
        [sys.executable, *a], capture_output=True, text=True, cwd=tmp_path, env=ENV
    )  # noqa: E731
    bad = run(str(ROOT / "dmd.py"), "--teacher", "nowhere")
    assert (
        bad.returncode == 2
        and bad.stderr.count("\n") == 1
        and bad.stderr.startswith("error: --teacher nowhere")
    )
    assert list(tmp_path.iterdir()) == []
    for script in ("dmd.py", "latent_fm.py"):
        text = run(str(ROOT / script), "--help")
        assert (
            text.returncode == 0
            and "--max_train_steps" in text.stdout
            and "(default: " in text.stdout
        )


# ---- a loss that is not finite: exit code 1, the last checkpoint intact ------------------------------------------------


@each
def test_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch, script):
    teacher, out, calls = save_tiny_teacher(tmp_path / "teacher"), tmp_path / "run", []
    name = "trajectory_matching_loss" if script is tdm else "distribution_matching_loss"
    real = getattr(script, name)

    def poisoned(x, g, *rest):
        calls.append(0)
        return real(x, g * (float("nan") if len(calls) == 5 else 1), *rest)

    flags = [*SHORT, "--teacher", teacher, "--output_dir", str(out)]
    with monkeypatch.context() as m:
        m.setattr(script, name, poisoned)
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: script.main(flags))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and error.startswith(
        "error: student loss or gradient is not finite"
    )
    assert [p.name for p in sorted((out / "state").iterdir())] == ["step-0000002", "step-0000004"]
    assert not (out / "report.json").exists()
    script.main([*flags, "--resume_from_checkpoint", "latest"])  # the remedy that the line names
    script.main([*SHORT, "--teacher", teacher, "--output_dir", str(tmp_path / "whole")])
    assert_bit_equal(weights(out), weights(tmp_path / "whole"))


# ---- crash and resume --------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=[dmd, decoupled_dmd, tdm], ids=lambda script: script.__name__
)
def unbroken(request, tmp_path_factory):
    """-> script, flags of a short run with everything that has state (GAN, EMA, two steps, accumulation), its final tensors and its log."""
    script = request.param
    root = tmp_path_factory.mktemp("unbroken")
    teacher = save_tiny_teacher(root / "teacher")
    save_file(
        {
            "x0": torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
            "cond.label": torch.arange(20) % 3,
        },
        root / "data.safetensors",
    )
    more = (
        ["--student_steps", "1", "2"]
        if script is tdm
        else [
            "--student_steps",
            "2",
            "--data",
            str(root / "data.safetensors"),
            "--gan_weight",
            "0.1",
        ]
    )
    flags = [
        *SHORT,
        "--teacher",
        teacher,
        *more,
        "--gradient_accumulation_steps",
        "2",
        "--lr_decay_share",
        "0",
    ]
    script.main([*flags, "--output_dir", str(root / "run")])
    return script, flags, weights(root / "run"), read_log(root / "run")


# The first save is 6 files and the rename that makes it count, replace 8; fsync 5 is inside its student/, 15 right after the rename, 24 in the second.
@pytest.mark.parametrize(
    "unbroken, call, n",
    [
        *(
            (dmd, *at)
            for at in (
                ("fsync", 2),
                ("fsync", 5),
                ("replace", 6),
                ("replace", 7),
                ("replace", 8),
                ("fsync", 15),
                ("fsync", 24),
            )
        ),
        (decoupled_dmd, "fsync", 24),
        (tdm, "fsync", 24),
    ],
    indirect=["unbroken"],
)
def test_kill_during_a_save(unbroken, tmp_path, call, n):
    """SIGKILL between any two steps of a save; the next start finds the last whole checkpoint, or none, and ends bit-equal."""
    script, flags, final, log = unbroken
    flags = [*flags, "--output_dir", str(tmp_path / "run")]
    dead = subprocess.run(
        [sys.executable, "-c", SUICIDAL, script.__name__, call, "", str(n), *flags],
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    script.main([*flags, "--resume_from_checkpoint", "latest"])
    assert_bit_equal(weights(tmp_path / "run"), final)
    assert without_time(read_log(tmp_path / "run")) == without_time(log)
    assert not list(
        (tmp_path / "run").rglob("*.tmp-*")
    )  # half-written files of the dead run are swept


@pytest.mark.parametrize("unbroken", [dmd], indirect=True)
def test_kill_during_training(unbroken, tmp_path):
    """SIGKILL from outside while steps go by, then resume, then a longer run: as if unbroken."""
    script, flags, final, _ = unbroken
    flags = [*flags, "--output_dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / f"{script.__name__}.py"),
            *flags,
            "--max_train_steps",
            "100000",
        ],
        env=ENV,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, end = tmp_path / "run" / "log.csv", time.time() + 120
    while time.time() < end and not (log.is_file() and log.read_text().count("\n") > 4):
        time.sleep(0.01)
    process.kill(), process.wait()
    assert log.read_text().count("\n") > 4
    state = sorted((tmp_path / "run" / "state").glob("step-*"))
    step = json.loads((state[-1] / "state.json").read_text())["step"]
    script.main(
        [*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", str(max(step, 6))]
    )
    if step <= 6:
        assert_bit_equal(weights(tmp_path / "run"), final)
    script.main(
        [
            *flags,
            "--output_dir",
            str(tmp_path / "whole"),
            "--max_train_steps",
            str(max(step, 6) + 3),
        ]
    )
    script.main(
        [*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", str(max(step, 6) + 3)]
    )
    assert_bit_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_what_resume_refuses_and_repeats(unbroken, tmp_path, capsys):
    script, flags, final, _ = unbroken
    flags = [*flags, "--output_dir", str(tmp_path / "run")]
    script.main(
        [*flags, "--resume_from_checkpoint", "latest"]
    )  # nothing there: starts fresh and says so
    assert "starting fresh" in capsys.readouterr().out
    (tmp_path / "run" / "samples.png").unlink()
    script.main(
        [*flags, "--resume_from_checkpoint", str(tmp_path / "run" / "state" / "step-0000006")]
    )  # finished: writes its outputs again
    assert (tmp_path / "run" / "samples.png").is_file()
    assert_bit_equal(weights(tmp_path / "run"), final)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(
            lambda: script.main(
                [
                    *flags,
                    "--resume_from_checkpoint",
                    "latest",
                    "--learning_rate",
                    "1e-5",
                    "--seed",
                    "3",
                ]
            )
        )
    error = capsys.readouterr().err
    was = script.parse_args(flags).learning_rate
    assert (
        stop.value.code == 2
        and f"--learning_rate was {was} and is 1e-05; --seed was 0 and is 3" in error
    )
    (tmp_path / "run" / "state" / "step-0000006" / "state.safetensors").write_bytes(b"junk")
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: script.main([*flags, "--resume_from_checkpoint", "latest"]))
    assert (
        stop.value.code == 2 and "is truncated or not a safetensors file" in capsys.readouterr().err
    )
    script.main([*flags, "--max_train_steps", "1"])  # without the flag nothing is overwritten
    assert (tmp_path / "run.1" / "report.json").is_file() and len(read_log(tmp_path / "run")) == 1


# ---- what a run leaves -------------------------------------------------------------------------------------------------


@each
def test_outputs_of_a_run(tmp_path, script):
    """student/ has the teacher's own config and layout, and --sample draws the same pictures in a new process."""
    teacher, out = save_tiny_teacher(tmp_path / "teacher"), tmp_path / "run"
    script.main(
        [
            *SHORT,
            "--teacher",
            teacher,
            "--output_dir",
            str(out),
            "--student_steps",
            "2",
            "--renoise",
            "ode",
        ]
    )
    assert {p.name for p in out.iterdir()} == {
        "student",
        "state",
        "samples.png",
        "samples.safetensors",
        "log.csv",
        "report.json",
    }
    assert json.loads((out / "student" / "config.json").read_text()) == json.loads(
        Path(teacher, "config.json").read_text()
    )
    sampler = json.loads((out / "student" / "sampler.json").read_text())
    assert (
        sampler["times"] == [1.0, 0.5]
        and sampler["rule"] == "euler"
        and sampler["method"] == script.__name__
        and sampler["guidance_scale"] == 1.0
    )
    report = json.loads((out / "report.json").read_text())
    assert (
        report["steps"] == 6
        and report["results"] == []
        and report["params"] == sum(v.numel() for v in load_file(Path(teacher) / WEIGHTS).values())
    )
    rows = read_log(out)
    assert [int(r["step"]) for r in rows] == list(range(1, 7)) and all(
        float(v) == float(v) for r in rows for v in r.values()
    )
    fresh = subprocess.run(
        [
            sys.executable,
            str(ROOT / f"{script.__name__}.py"),
            "--sample",
            "run/student",
            "--preview_samples",
            "3",
        ],
        capture_output=True,
        text=True,
        env=ENV,
        cwd=tmp_path,
    )
    assert fresh.returncode == 0, fresh.stderr
    x = load_file(tmp_path / "runs" / "run-samples" / "samples.safetensors")["x0"]
    assert x.shape == (3, 1, 4, 4) and (tmp_path / "runs" / "run-samples" / "samples.png").is_file()
    student = load_network(str(out / "student"))[0]
    draw = Draws(0, "evaluation", 0, range(3))
    label = {"label": torch.arange(3)}
    want = script.sample(
        student,
        Flow(),
        "flow_v",
        draw.normal("z", (1, 4, 4)),
        *(([1.0, 0.5, 0.0], label) if script is tdm else ([1.0, 0.5], label, "ode")),
    )
    torch.testing.assert_close(x, want)


def test_student_of_a_run_is_a_teacher_and_a_start(tmp_path):
    """--teacher and --student_init take a run folder of ours; the fake starts at the teacher all the same."""
    teacher = save_tiny_teacher(tmp_path / "teacher")
    dmd.main([*SHORT, "--teacher", teacher, "--output_dir", str(tmp_path / "one")])
    dmd.main(
        [
            *SHORT,
            "--teacher",
            str(tmp_path / "one"),
            "--student_init",
            str(tmp_path / "one"),
            "--output_dir",
            str(tmp_path / "two"),
            "--max_train_steps",
            "1",
        ]
    )
    one, two = (load_file(tmp_path / d / "student" / WEIGHTS) for d in ("one", "two"))
    assert one.keys() == two.keys()
    args = dmd.parse_args(
        ["--teacher", teacher, "--student_init", str(tmp_path / "one"), "--gradient_checkpointing"]
    )
    _, student, fake = load_networks(args, dmd.WORLDS, torch.device("cpu"))
    (
        assert_bit_equal(student.state_dict(), one),
        assert_bit_equal(fake.state_dict(), load_file(Path(teacher) / WEIGHTS)),
    )
    assert student.gradient_checkpointing and fake.gradient_checkpointing


def test_sharded_checkpoints(tmp_path):
    """Above the shard size weights are split with an index, as diffusers does, and read back equal; our index loads there too."""
    torch.manual_seed(0)
    net = perturbed(WanTransformer3DModel(**TINY_WAN))
    config = {"_class_name": "WanTransformer3DModel", **net.config}
    save_network(net, config, str(tmp_path / "net"), shard_bytes=20000)
    assert (
        len(list((tmp_path / "net").glob("*-of-*.safetensors"))) > 2
        and not (tmp_path / "net" / WEIGHTS).exists()
    )
    assert_bit_equal(load_network(str(tmp_path / "net"))[0].state_dict(), net.state_dict())
    diffusers = pytest.importorskip("diffusers")
    assert_bit_equal(
        dict(diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "net").state_dict()),
        dict(net.state_dict()),
    )
    save_network(net, config, str(tmp_path / "net"))  # one file now: the old index must not win
    assert [p.name for p in sorted((tmp_path / "net").iterdir())] == ["config.json", WEIGHTS]


# ---- Wan, one process and two ------------------------------------------------------------------------------------------


@each
def test_two_ranks_are_one_process_with_twice_the_batch(monkeypatch, tmp_path, script):
    (tmp_path / "teacher").mkdir()
    teacher = {
        dmd: save_tiny_wan,
        decoupled_dmd: save_tiny_z_image,
        tdm: lambda root: [*save_tiny_pixart(root, 512), "--student_steps", "4"],
    }[script]
    flags = [*teacher(tmp_path / "teacher"), "--max_train_steps", "4", "--fake_update_ratio", "5"]
    with (
        monkeypatch.context() as m
    ):  # of four times five fake updates and the student's, the first six
        assert 24 == assert_two_ranks_are_one_process(
            m,
            tmp_path,
            script,
            flags,
            least=1e-4,
            first=6,
            within=lambda call: 1e-5 if call in (1, 6) else 1e-4,
        )
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two")):
        for loss in (
            "loss_fake",
            "mean",
            "std",
            *(name for name in a if name.startswith("loss_dm")),
        ):
            assert float(a[loss]) == pytest.approx(float(b[loss]), rel=1e-4, abs=1e-6), (
                a["step"],
                loss,
            )
    assert len(read_log(tmp_path / "two")) == 4
    assert (tmp_path / "two" / "samples.png").is_file() and (
        tmp_path / "two" / "student" / "sampler.json"
    ).is_file()


def test_wrong_input_under_torchrun_is_one_line(tmp_path):
    """Both ranks stop, one speaks."""
    ranks = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "dmd.py"),
    ]
    done = subprocess.run(
        [*ranks, "--teacher", "nowhere"],
        capture_output=True,
        text=True,
        env=ENV,
        cwd=tmp_path,
        timeout=120,
    )
    assert (
        done.returncode != 0
        and sum("neither an embedded world" in line for line in done.stderr.splitlines()) == 1
    )


def test_existing_folder_named_with_a_slash_is_renamed(tmp_path):
    teacher, out = save_tiny_teacher(tmp_path / "teacher"), str(tmp_path / "run") + "/"
    for _ in range(2):
        dmd.main([*SHORT, "--teacher", teacher, "--output_dir", out])
    assert (tmp_path / "run.1" / "report.json").exists() and (
        tmp_path / "run" / "report.json"
    ).exists()


@each
def test_resume_beyond_the_end_and_into_another_folder(tmp_path, capsys, script):
    """A shorter run than the checkpoint is refused; a finished checkpoint given by path is written out whole elsewhere."""
    flags, out = [*SHORT, "--teacher", save_tiny_teacher(tmp_path / "teacher")], tmp_path / "run"
    script.main([*flags, "--output_dir", str(out)])
    with pytest.raises(UserError, match="beyond --max_train_steps 5"):
        script.main(
            [
                *flags,
                "--output_dir",
                str(out),
                "--max_train_steps",
                "5",
                "--resume_from_checkpoint",
                "latest",
            ]
        )
    script.main(
        [
            *flags,
            "--output_dir",
            str(tmp_path / "new"),
            "--resume_from_checkpoint",
            str(out / "state" / "step-0000006"),
        ]
    )
    assert_bit_equal(
        load_file(out / "student" / WEIGHTS), load_file(tmp_path / "new" / "student" / WEIGHTS)
    )


@each
def test_samples_of_another_shape(tmp_path, capsys, script):
    """A student trained at --sample_shape is sampled at it, one batch at a time, as the run itself showed; videos also leave a GIF.
    Samples never replace those of a run."""
    flags = save_tiny_wan(tmp_path)
    script.main([*SHORT, *flags, "--output_dir", str(tmp_path / "run")])
    prompts = flags[flags.index("--prompts") :][:2]
    sampling = [
        "--sample",
        str(tmp_path / "run"),
        *prompts,
        "--preview_samples",
        "2",
        "--train_batch_size",
        "1",
    ]
    script.main([*sampling, "--output_dir", str(tmp_path / "samples")])
    ours, again = (
        load_file(tmp_path / d / "samples.safetensors")["x0"] for d in ("run", "samples")
    )
    assert ours.shape == (2, 4, 2, 4, 6)
    torch.testing.assert_close(ours, again, rtol=1e-4, atol=1e-5)
    for folder in ("run", "samples"):
        assert Image.open(tmp_path / folder / "samples.gif").n_frames == 2
    assert "is a run with samples of its own" in refusal_of(
        capsys, script.main, *sampling, "--output_dir", str(tmp_path / "run")
    )
    assert "channels" in refusal_of(
        capsys,
        script.main,
        *sampling,
        "--output_dir",
        str(tmp_path / "s2"),
        "--sample_shape",
        "3",
        "2",
        "4",
        "6",
    )
