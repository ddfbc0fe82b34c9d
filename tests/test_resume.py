"""Resuming with other rates, weights, columns and ranks, and the advice after a loss of nan."""

import importlib
import json
import re
import shlex
import types

import pytest
import torch
from forks import launch
from helpers import (
    SPYING,
    assert_bit_equal,
    each,
    killed,
    quiet,
    read_log,
    refusal_of,
    save_tiny_teacher,
    saved_tensors,
    weights,
    without_time,
)
from safetensors.torch import load_file, save_file

import dmd
import latent_fm
from models.files import UserError
from models.networks import WEIGHTS
from models.plumbing.run import Log, Run, advice_after, run_main
from models.plumbing.state import (
    MAY_CHANGE,
    batch_flags,
    changes_on_resume,
    flags_to_save,
    keep_batch,
)

SHORT = "--max_train_steps 4 --train_batch_size 4 --checkpointing_steps 2 --seed 1".split()
CASES = {  # flags with which every script makes an update of the tiny teacher in no time
    "dmd": "--student_steps 2 --lr_decay_share 0",
    "decoupled_dmd": "--student_steps 2 --lr_decay_share 0",
    "tdm": "--student_steps 1 2 --lr_decay_share 0",
    "phased_dmd": "--student_steps 4 --phases 2 --lr_decay_share 0",
    "linvideo": "--bank_size 8 --bank_batch 4 --sampling_steps 4 --objective adm",
    "mdt_dist": "--teacher ring --lr_decay_share 0",
    "latent_fm": "--data ring --pool 200 --optimizer adamw --lr_warmup_steps 0 --preview_every 0",
}


def flags_of(script, tmp_path, *more):
    """A short run of a script on the tiny teacher in tmp_path/run -> its flags."""
    flags = ["--output_dir", str(tmp_path / "run"), *SHORT]
    if script != "latent_fm":
        flags += "--teacher_steps 1 --preview_samples 2".split()
        flags += ["--teacher", save_tiny_teacher(tmp_path / "teacher")]
    return [*flags, *CASES[script].split(), *more]


@pytest.fixture(autouse=True)
def no_samples_of_latent_fm(monkeypatch):
    """Those at its end, which take longer than its updates."""
    monkeypatch.setattr(latent_fm, "finish", lambda *a, **k: None)


def run(script, flags):
    importlib.import_module(script).main(flags)


def resumed(flags, steps, *more):
    return [*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", str(steps), *more]


def last_state(folder):
    """-> state.json, state.safetensors of a run's last checkpoint."""
    last = sorted((folder / "state").glob("step-*"))[-1]
    info = json.loads((last / "state.json").read_text())
    return info, saved_tensors(last)


# ---- what may change, and what may not -----------------------------------------------------------


def another(value):
    """Another value of a rate, a weight, a count or a schedule."""
    if isinstance(value, str):
        return {"linear": "cosine"}[value]
    return value + 3 if isinstance(value, int) else 0.75 * value


@pytest.mark.parametrize("script", CASES)
def test_what_a_user_may_have_to_change_can_change(monkeypatch, tmp_path, capsys, script):
    """Every flag of MAY_CHANGE that a script has: accepted, printed, and kept in state.json.

    Further resumes keep the list and add to it; one without changes adds nothing.
    """
    quiet(monkeypatch)
    flags = flags_of(script, tmp_path, "--ema_decay", "0.9")
    run(script, flags)
    before = last_state(tmp_path / "run")[0]["flags"]
    idle = {"linvideo": {"learning_rate_fake", "fake_update_ratio"}}.get(script, set())
    names = sorted(n for n in MAY_CHANGE & set(before) - idle if before[n] is not None)
    assert {"learning_rate", "max_grad_norm", "lr_warmup_steps", "ema_decay"} <= set(names)
    values = {n: another(before[n]) for n in names}
    values = {n: v for n, v in values.items() if v != before[n]}  # weights of 0 have other tests
    capsys.readouterr()
    run(script, resumed(flags, 6, *(x for n, v in values.items() for x in (f"--{n}", str(v)))))
    said = [line for line in capsys.readouterr().out.splitlines() if " was " in line]
    wanted = [f"--{n} was {before[n]} and is {v} from update 5 on" for n, v in values.items()]
    assert said == wanted
    info, _ = last_state(tmp_path / "run")
    changes = [
        {"what": f"--{n}", "was": before[n], "is": v, "update": 5} for n, v in values.items()
    ]
    assert info["changes"] == changes and info["step"] == 6
    assert {n: info["flags"][n] for n in values} == values
    given = [x for n, v in values.items() for x in (f"--{n}", str(v))]
    run(script, resumed(flags, 8, *given))
    assert " was " not in capsys.readouterr().out
    assert last_state(tmp_path / "run")[0]["changes"] == changes
    run(script, resumed(flags, 10, *given, "--max_grad_norm", "0.5"))
    clipping = {"what": "--max_grad_norm", "was": values["max_grad_norm"], "is": 0.5, "update": 9}
    assert last_state(tmp_path / "run")[0]["changes"] == [*changes, clipping]
    assert [int(r["step"]) for r in read_log(tmp_path / "run")] == list(range(1, 11))


def test_report_says_what_a_resumed_run_changed(tmp_path):
    """A table of results without its second learning rate could not be made again."""
    flags = flags_of("dmd", tmp_path)
    run("dmd", flags)
    report = tmp_path / "run" / "report.json"
    assert json.loads(report.read_text())["changes"] == []
    was = last_state(tmp_path / "run")[0]["flags"]["learning_rate"]
    run("dmd", resumed(flags, 6, "--learning_rate", "0.125"))
    change = {"what": "--learning_rate", "was": was, "is": 0.125, "update": 5}
    assert json.loads(report.read_text())["changes"] == [change]


def test_what_changes_no_gradient_can_change(monkeypatch, tmp_path, capsys):
    """Without a word: what is shown, how a run samples at its end, what memory it takes."""
    quiet(monkeypatch)
    other = {
        "latent_fm": "--guidance_scale 3 --sample_steps 3 --solver euler "
        "--guidance_interval 0 0.5 --save_fp16",
        "mdt_dist": "--student_guidance 2 --teacher_guidance_interval 0.5 1 --preview_samples 3 "
        "--student_steps 3 1 --guidance_scale 2 --teacher_steps 3",
        "dmd": "--gradient_checkpointing --checkpointing_steps 1 --preview_samples 3",
        "tdm": "--teacher_steps 3",
        "decoupled_dmd": "--preset long",
        "phased_dmd": "--teacher_steps 3",
    }
    for script, more in other.items():
        (tmp_path / script).mkdir()
        flags = flags_of(script, tmp_path / script)
        run(script, flags)
        capsys.readouterr()
        run(script, resumed(flags, 6, *more.split()))
        assert " was " not in capsys.readouterr().out
        assert last_state(tmp_path / script / "run")[0]["changes"] == []


NAMES_THAT_LOOK_LIKE_IT = {  # in some parser, and rightly not in MAY_CHANGE
    "ca_weight": "decoupled_dmd: of the guidance, as --guidance_scale",
    "fake_weight": "tdm: a choice of losses",
    "vd_weight": "mdt_dist: a choice of losses",
    "dmd_weight": "phased_dmd: a choice of losses",
    "weight": "linvideo: a choice of losses",
    "timestep_shift": "the teacher's clock",
}


@pytest.mark.parametrize("script", CASES)
def test_no_rate_and_no_weight_is_forgotten(script):
    """A flag that is called a rate, a weight, a decay or a norm may change, or is named above."""
    for name in vars(importlib.import_module(script).parse_args([])):
        if re.search(r"rate|weight|decay|grad_norm|warmup_steps", name):
            assert name in MAY_CHANGE | set(NAMES_THAT_LOOK_LIKE_IT), name


MUST_STAY = [
    ("dmd", "--seed 3", "--seed was 1 and is 3"),
    ("dmd", "--guidance_scale 2", "--guidance_scale was 1.0 and is 2.0"),
    ("dmd", "--adam_betas 0.5 0.9", "--adam_betas was [0.8, 0.99] and is [0.5, 0.9]"),
    ("dmd", "--mixed_precision bf16 --renoise ode", "--mixed_precision was 'no' and is 'bf16'; --"),
    ("tdm", "--fake_weight snr", "--fake_weight was 'network' and is 'snr'"),
    ("linvideo", "--objective mse", "--objective was 'adm' and is 'mse'"),
    ("mdt_dist", "--dt 0.02", "--dt was 0.01 and is 0.02"),
    ("latent_fm", "--label_dropout 0.2", "--label_dropout was 0.1 and is 0.2"),
    ("phased_dmd", "--taper all", "--taper was 'inner' and is 'all'"),
]


@pytest.mark.parametrize("script, other, says", MUST_STAY)
def test_what_decides_what_is_learned_must_stay(monkeypatch, tmp_path, capsys, script, other, says):
    quiet(monkeypatch)
    flags = flags_of(script, tmp_path)
    run(script, flags)
    main = importlib.import_module(script).main
    rates = "--learning_rate 1e-5".split()  # free, so not in the line
    error = refusal_of(capsys, main, *resumed(flags, 6, *rates, *other.split()))
    assert "cannot resume with other flags: " in error and says in error
    assert "learning_rate" not in error


@each
def test_the_new_rate_is_really_used(monkeypatch, tmp_path, script):
    """At a rate of 1e-30 no weight moves any more; Adam's moments do."""
    quiet(monkeypatch)
    name = script.__name__
    flags = flags_of(name, tmp_path, "--ema_decay", "0")
    run(name, flags)
    _, before = last_state(tmp_path / "run")
    tiny = "--learning_rate 1e-30 --learning_rate_fake 1e-30".split()
    run(name, resumed(flags, 6, *tiny))
    _, after = last_state(tmp_path / "run")
    for k in before:
        assert torch.equal(before[k], after[k]) == (not k.startswith("optimizer")), k


# ---- averages that are switched on or off --------------------------------------------------------


@pytest.mark.parametrize("script", ["dmd", "mdt_dist", "phased_dmd", "latent_fm"])
def test_an_average_can_be_switched_on_and_off(monkeypatch, tmp_path, script):
    """Switched on, it starts as the network; switched off, the network itself is saved again."""
    quiet(monkeypatch)
    flags, out = flags_of(script, tmp_path, "--ema_decay", "0"), tmp_path / "run"
    if script == "phased_dmd":
        flags += "--phases 1".split()
    run(script, flags)
    still = ["--learning_rate", "1e-30"]

    def student():
        found = sorted((out / "student").rglob(WEIGHTS))
        return {k: v.clone() for k, v in load_file(found[0]).items()}

    def averaged():
        _, state = last_state(out)
        name = {"phased_dmd": "expert1", "latent_fm": "net"}.get(script, "student")
        parts = [{k: v for k, v in state.items() if k.startswith(f"{n}.")} for n in ("ema", name)]
        return [{k.split(".", 1)[1]: v for k, v in part.items()} for part in parts]

    first = student()
    run(script, resumed(flags, 6, *still, "--ema_decay", "0.9"))
    ema, net = averaged()
    assert_bit_equal(student(), first)
    assert_bit_equal(ema, net)  # the network stood still, and the average began at it
    run(script, resumed(flags, 8, "--ema_decay", "0.9"))
    ema, net = averaged()
    far = max((ema[k].float() - net[k].float()).abs().max() for k in net)
    assert far > 1e-6  # both move, the average behind
    run(script, resumed(flags, 10, *still, "--ema_decay", "0"))
    _, state = last_state(out)
    ema, net = averaged()
    assert not ema or script == "latent_fm"
    assert_bit_equal({k: net[k] for k in net}, {k: v for k, v in student().items() if k in net})


# ---- two-stage training --------------------------------------------------------------------------


def two_stages(script, tmp_path):
    """-> flags of a run without a GAN, further flags of its second stage."""
    x0 = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    save_file({"x0": x0, "cond.label": torch.arange(20) % 3}, tmp_path / "data.safetensors")
    first = flags_of(script, tmp_path, "--fake_update_ratio", "2")
    second = "--gan_weight 0.1 --gan_weight_d 0.02 --learning_rate 1e-4 --learning_rate_fake 2e-4"
    return first, [*second.split(), "--data", str(tmp_path / "data.safetensors")]


@pytest.mark.parametrize("script", ["dmd", "decoupled_dmd"])
def test_a_gan_is_added_to_a_converged_student(monkeypatch, tmp_path, capsys, script):
    """DMD2's two stages: without a GAN, then with one at lower rates, and real data given only
    then; then without it once more."""
    quiet(monkeypatch)
    out = tmp_path / "run"
    first, second = two_stages(script, tmp_path)
    run(script, first)
    _, state = last_state(out)
    run(script, resumed(first, 6, *second))
    said = capsys.readouterr().out
    assert "--gan_weight was 0.0 and is 0.1 from update 5 on" in said
    assert "--data was None and is " in said
    _, with_gan = last_state(out)
    new = with_gan.keys() - state.keys()  # the head's moments, from its first update on
    assert new and all(re.match(r"optimizer_fake\.\d+\.(step|exp_avg|exp_avg_sq)", k) for k in new)
    assert {float(with_gan[k]) for k in new if k.endswith("step")} == {4}  # two in each of 5 and 6
    assert float(with_gan["optimizer_fake.0.step"]) == 12
    heads = [k for k in state if k.startswith("head.")]
    assert heads and not any(torch.equal(with_gan[k], state[k]) for k in heads)
    rows = read_log(out)
    assert [r["loss_gan"] == "" for r in rows] == [True] * 4 + [False] * 2
    assert all(r["loss_fake"] and r["norm_student"] for r in rows)
    run(script, resumed(first, 8))  # the GAN off again: --data is not asked for
    rows = read_log(out)
    assert [r["loss_gan"] == "" for r in rows] == [True] * 4 + [False] * 2 + [True] * 2


def test_a_resumed_second_stage_is_as_if_unbroken(monkeypatch, tmp_path):
    quiet(monkeypatch)
    ends = []
    for name, stops in (("whole", [8]), ("broken", [6, 8])):
        (tmp_path / name).mkdir()
        first, second = two_stages("dmd", tmp_path / name)
        run("dmd", first)
        for stop in stops:
            run("dmd", resumed(first, stop, *second))
        ends.append(tmp_path / name / "run")
    assert_bit_equal(weights(ends[0]), weights(ends[1]))
    assert without_time(read_log(ends[0])) == without_time(read_log(ends[1]))


def test_the_regression_can_be_added(monkeypatch, tmp_path):
    """Its pairs are made then, and --teacher_steps may be given for them; made once, and again only
    for other steps."""
    quiet(monkeypatch)
    more = "--student_steps 1 --teacher_steps 0 --regression_pairs 8".split()
    flags, out = flags_of("dmd", tmp_path, *more), tmp_path / "run"
    run("dmd", flags)
    assert not (out / "state" / "pairs.safetensors").exists()
    run("dmd", resumed(flags, 6, *"--regression_weight 0.25 --teacher_steps 2".split()))
    assert len(load_file(out / "state" / "pairs.safetensors")["z"]) == 8
    assert [r["loss_regression"] == "" for r in read_log(out)] == [True] * 4 + [False] * 2
    made = load_file(out / "state" / "pairs.safetensors")["y"].clone()
    run("dmd", resumed(flags, 7, *"--regression_weight 0.25 --teacher_steps 2".split()))
    assert torch.equal(load_file(out / "state" / "pairs.safetensors")["y"], made)
    run("dmd", resumed(flags, 8, *"--regression_weight 0 --teacher_steps 2".split()))
    run("dmd", resumed(flags, 9, *"--regression_weight 0.5 --teacher_steps 3".split()))
    assert not torch.equal(load_file(out / "state" / "pairs.safetensors")["y"], made)


# ---- log.csv -------------------------------------------------------------------------------------


def test_columns_that_come_and_go(tmp_path):
    """Earlier rows get empty cells, later ones too where a term is off; no row is lost."""
    log = Log(str(tmp_path))
    for step in (1, 2, 3):
        log.write({"step": step, "a": 0.5, "seconds": 1.0})
    log = Log(str(tmp_path), 2)
    log.write({"step": 3, "b": 2, "a": 0.25, "seconds": 1.0})
    log.write({"step": 4, "seconds": 1.0, "b": 3})
    log = Log(str(tmp_path), 4)
    log.write({"step": 5, "a": 1.0, "c": 1.0, "seconds": 1.0})
    assert (tmp_path / "log.csv").read_text().splitlines() == [
        "step,a,seconds,b,c",
        "1,0.5,1,,",
        "2,0.5,1,,",
        "3,0.25,1,2,",
        "4,,1,3,",
        "5,1,1,,1",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


@pytest.mark.parametrize("call, n", [("fsync", 3), ("replace", 2), ("fsync", 4)])
def test_kill_while_log_csv_gets_new_columns(monkeypatch, tmp_path, call, n):
    """SIGKILL before, during and after the rename that adds them: old or new, whole."""
    quiet(monkeypatch)
    first, second = two_stages("dmd", tmp_path)
    run("dmd", first)
    flags, log = resumed(first, 6, *second), tmp_path / "run" / "log.csv"
    old = log.read_text()
    # fsync is of a number, not a name, and its first two are of the log's opening
    killed(tmp_path, "dmd", call, "" if call == "fsync" else "log.csv", n, *flags)
    left = log.read_text()
    rows = [line.split(",") for line in left.splitlines()]
    assert left == old or (len(rows) >= 5 and {len(r) for r in rows} == {len(rows[0])})
    run("dmd", flags)
    broken = without_time(read_log(tmp_path / "run")), weights(tmp_path / "run")
    (tmp_path / "other").mkdir()
    first, second = two_stages("dmd", tmp_path / "other")
    run("dmd", first)
    run("dmd", resumed(first, 6, *second))
    whole = tmp_path / "other" / "run"
    assert broken[0] == without_time(read_log(whole))
    assert_bit_equal(broken[1], weights(whole))


# ---- other numbers of ranks ----------------------------------------------------------------------


def ranks(script, folder, flags, gradients=None):
    """Run a script on two gloo ranks, in its own processes."""
    (folder / "spy.py").write_text(SPYING.format(script=script))
    env = {"GRADIENTS": str(gradients or folder / "gradients")}
    done = launch(folder / "spy.py", flags, 2, env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def one_process(script, folder, flags, gradients):
    """The same in one process of its own."""
    (folder / "spy.py").write_text(SPYING.format(script=script))
    done = launch(folder / "spy.py", flags, env={"GRADIENTS": str(gradients)})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_resume_on_another_number_of_ranks(tmp_path):
    """Two ranks for two steps, then one: the two ranks' run, if the same samples make an update.

    The same command takes two micro-batches of the ranks' size, bit for bit the same, since halves
    of gradients are added either way; one of twice the size is up to rounding. And back from one
    rank to two.
    """
    flags = flags_of("dmd", tmp_path, "--train_batch_size", "2", "--max_grad_norm", "1e9")
    out = tmp_path / "run"
    ranks("dmd", tmp_path, [*flags, "--max_train_steps", "2"])
    ends, gradients = {}, {}
    parts = {"two": "", "micro": "", "one": "--train_batch_size 4"}
    for name, more in parts.items():
        state = str(out / "state" / "step-0000002")
        go_on = [*flags, "--resume_from_checkpoint", state, "--max_train_steps", "4", *more.split()]
        go_on += ["--output_dir", str(tmp_path / name)]
        begin = ranks if name == "two" else one_process
        said = begin("dmd", tmp_path, go_on, tmp_path / f"{name}.gradients")
        assert ("number of ranks was 2 and is 1 from update 3 on" in said) == (name != "two")
        info, ends[name] = last_state(tmp_path / name)
        assert info["world_size"] == (2 if name == "two" else 1)
        gradients[name] = load_file(f"{tmp_path / name}.gradients.1")
    assert_bit_equal(ends["two"], ends["micro"])
    for i, g in gradients["two"].items():
        torch.testing.assert_close(gradients["one"][i], g, rtol=1e-4, atol=1e-6)
    back = ["--output_dir", str(tmp_path / "micro"), "--resume_from_checkpoint", "latest"]
    said = ranks("dmd", tmp_path, [*flags, *back, "--max_train_steps", "6"])
    assert "number of ranks was 1 and is 2 from update 5 on" in said
    assert "--gradient_accumulation_steps was 2 and is 1 from update 5 on" in said
    info, _ = last_state(tmp_path / "micro")
    assert [c["what"] for c in info["changes"]] == [
        "--gradient_accumulation_steps",
        "number of ranks",
    ] * 2


def saved_on(count, batch, micro_batches):
    """state.json of dmd.py on so many ranks."""
    args = dmd.parse_args(
        f"--train_batch_size {batch} --gradient_accumulation_steps {micro_batches}".split()
    )
    return {"step": 3, "flags": flags_to_save(args), "world_size": count}


@pytest.mark.parametrize("count, batch, micro, now", [(8, 4, 2, 2), (2, 6, 1, 4), (3, 5, 1, 1)])
def test_other_ranks_with_another_batch_are_refused_with_values_that_work(count, batch, micro, now):
    """And those values do work; the micro-batch does not grow, since it may fill the memory."""
    info = saved_on(count, batch, micro)
    same = f"--train_batch_size {batch} --gradient_accumulation_steps {micro}".split()
    with pytest.raises(UserError, match=f"on {now} rank.* resume with ") as refused:
        changes_on_resume(info, dmd.parse_args(same), now)
    works = shlex.split(str(refused.value).split("resume with ")[1])
    args = dmd.parse_args(works)
    assert args.train_batch_size <= batch
    changes = changes_on_resume(info, args, now)
    assert {"what": "number of ranks", "was": count, "is": now, "update": 4} in changes


@pytest.mark.parametrize(
    "count, batch, micro, now, then", [(8, 4, 2, 2, 8), (2, 6, 1, 1, 2), (1, 2, 4, 2, 2)]
)
def test_the_same_command_goes_on_on_another_number_of_ranks(count, batch, micro, now, then):
    """With as many samples an update, by accumulation; and so does it when it is given again."""
    info = saved_on(count, batch, micro)
    command = f"--train_batch_size {batch} --gradient_accumulation_steps {micro}".split()
    args = dmd.parse_args(command)
    keep_batch(info, args, now)
    assert args.gradient_accumulation_steps == then and args.train_batch_size == batch
    changes = changes_on_resume(info, args, now)
    assert {c["what"] for c in changes} == {"--gradient_accumulation_steps", "number of ranks"}
    saved = {"flags": flags_to_save(args), "world_size": now, "step": 3}
    saved["command"] = batch_flags(dmd.parse_args(command))
    for ranks, steps in ((now, then), (count, micro)):
        args = dmd.parse_args(command)
        keep_batch(saved, args, ranks)
        assert args.gradient_accumulation_steps == steps
        changes_on_resume(saved, args, ranks)


def test_another_command_keeps_what_it_says():
    """And is refused if that makes another batch."""
    info = saved_on(2, 4, 1)
    args = dmd.parse_args("--train_batch_size 4 --gradient_accumulation_steps 3".split())
    keep_batch(info, args, 1)
    assert args.gradient_accumulation_steps == 3
    with pytest.raises(UserError, match="updates were of 8 samples"):
        changes_on_resume(info, args, 1)


def test_ranks_that_cannot_share_the_batch():
    info = saved_on(2, 4, 1)
    with pytest.raises(UserError, match="which 3 ranks cannot share: use one of 1, 2, 4, 8$"):
        changes_on_resume(info, dmd.parse_args(["--train_batch_size", "4"]), 3)


def test_samples_of_an_update_are_counted_by_groups():
    """Ranks of one --sequence_ranks group have the same samples; the groups may change."""
    info = saved_on(4, 2, 1)  # 8 samples
    args = dmd.parse_args("--train_batch_size 4 --sequence_ranks 2".split())
    changes = changes_on_resume(info, args, 4)
    assert [c["what"] for c in changes] == ["--sequence_ranks", "--train_batch_size"]
    info["flags"] |= {"sequence_ranks": 2}  # 4 samples
    args = dmd.parse_args("--train_batch_size 2 --sequence_ranks 4".split())
    assert [c["was"] for c in changes_on_resume(info, args, 8)] == [2, 4]
    with pytest.raises(UserError, match="which 12 ranks cannot share: use one of 4, 8, 16$"):
        changes_on_resume(info, args, 12)
    info = saved_on(1, 2, 1)
    del info["flags"]["sequence_ranks"]  # of a run from before there was the flag
    assert changes_on_resume(info, dmd.parse_args(["--train_batch_size", "2"]), 1) == []


def test_another_batch_on_as_many_ranks_is_refused(monkeypatch, tmp_path, capsys):
    """In a run: one line, and what it says works."""
    quiet(monkeypatch)
    flags = flags_of("dmd", tmp_path)
    run("dmd", flags)
    error = refusal_of(capsys, dmd.main, *resumed(flags, 6, "--train_batch_size", "8"))
    advised = "--train_batch_size 4 --gradient_accumulation_steps 1"
    assert f"updates were of 4 samples ({advised.replace(' --g', ', --g')}, 1 rank(s))" in error
    assert error.strip().endswith(f"resume with {advised}")
    run("dmd", resumed(flags, 6, *advised.split()))
    halves = "--train_batch_size 2 --gradient_accumulation_steps 2".split()
    run("dmd", resumed(flags, 8, *halves))
    assert last_state(tmp_path / "run")[0]["step"] == 8


def test_a_state_from_before_ranks_were_recorded(monkeypatch, tmp_path):
    """It goes on as on the ranks that are there."""
    quiet(monkeypatch)
    flags = flags_of("dmd", tmp_path)
    run("dmd", flags)
    last = sorted((tmp_path / "run" / "state").glob("step-*"))[-1] / "state.json"
    info = json.loads(last.read_text())
    last.write_text(json.dumps({k: info[k] for k in ("step", "flags", "seconds")}))
    run("dmd", resumed(flags, 6))
    assert last_state(tmp_path / "run")[0]["changes"] == []


# ---- a loss that is not finite -------------------------------------------------------------------


def poison(monkeypatch, script, update):
    """The gradient of this update is nan as long as --learning_rate is the script's first one."""
    real, rates = Run.end_step, []

    def end_step(self, step, *args, **more):
        rates.append(self.args.learning_rate)
        if step + 1 == update and self.args.learning_rate == rates[0]:
            self.note(loss_of_a_poisoned_step=float("nan"))
        return real(self, step, *args, **more)

    monkeypatch.setattr(Run, "end_step", end_step)


def stop_of(capsys, script, flags):
    """-> the one line of a run that ended in exit code 1."""
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: run(script, flags))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and line.startswith("error: not finite at update ")
    return line


@pytest.mark.parametrize("script", CASES)
def test_the_advice_after_a_nan_is_followed(monkeypatch, tmp_path, capsys, script):
    """The flags that the line names, added to the command: the run goes on from its state."""
    quiet(monkeypatch)
    flags = flags_of(script, tmp_path)
    with monkeypatch.context() as m:
        poison(m, script, 4)
        line = stop_of(capsys, script, flags)
        advice = re.search(r"step-0000002 is intact: resume with (--.*?);", line).group(1)
        assert "--resume_from_checkpoint latest" in advice and "--max_grad_norm" in advice
        assert "if update 4 fails again, look for numbers that are not finite behind" in line
        run(script, [*flags, *shlex.split(advice)])
    changes = last_state(tmp_path / "run")[0]["changes"]
    assert {c["what"]: c["is"] / c["was"] for c in changes} == pytest.approx(
        {flag: 0.5 for flag in advice.split() if flag[:2] == "--" and "resume" not in flag}
    )
    assert {c["update"] for c in changes} == {3}
    assert [int(r["step"]) for r in read_log(tmp_path / "run")] == [1, 2, 3, 4]


def test_the_advice_where_nothing_is_saved_yet(monkeypatch, tmp_path, capsys):
    """It does not speak of a checkpoint, and following it starts the run again."""
    quiet(monkeypatch)
    flags = flags_of("dmd", tmp_path, "--checkpointing_steps", "100")
    with monkeypatch.context() as m:
        poison(m, "dmd", 2)
        line = stop_of(capsys, "dmd", flags)
        assert "intact" not in line and "resume" not in line
        advice = re.search(r"no state is saved yet: start again with (--.*?);", line).group(1)
        run("dmd", [*flags, *shlex.split(advice)])
    assert len(read_log(tmp_path / "run")) == 4
    assert (tmp_path / "run.1").is_dir()


def test_in_the_first_update_the_inputs_come_first(monkeypatch, tmp_path, capsys):
    quiet(monkeypatch)
    first, second = two_stages("dmd", tmp_path)
    poison(monkeypatch, "dmd", 1)
    line = stop_of(capsys, "dmd", [*first, *second])
    looks = "; look for numbers that are not finite behind --data and --teacher, or no state"
    assert looks in line
    args = types.SimpleNamespace(
        output_dir=str(tmp_path / "none"),
        resume_from_checkpoint=None,
        learning_rate=1e-3,
        max_grad_norm=10.0,
        prompts="p.safetensors",
        teacher="t",
    )
    advice = advice_after(0, args, args.output_dir, 0)
    assert advice.startswith("look for numbers that are not finite behind --prompts")


def test_the_advice_names_a_state_that_was_given_by_its_path(monkeypatch, tmp_path, capsys):
    """Resumed into another folder, which has no state yet, `latest` would start afresh."""
    quiet(monkeypatch)
    flags = flags_of("dmd", tmp_path)
    run("dmd", flags)
    state = tmp_path / "run" / "state" / "step-0000004"
    flags += ["--resume_from_checkpoint", str(state), "--max_train_steps", "6"]
    flags += ["--output_dir", str(tmp_path / "elsewhere")]
    with monkeypatch.context() as m:
        poison(m, "dmd", 5)
        line = stop_of(capsys, "dmd", flags)
        advice = re.search(r"is intact: resume with (--.*?);", line).group(1)
        assert shlex.split(advice)[:2] == ["--resume_from_checkpoint", str(state)]
        run("dmd", [*flags, *shlex.split(advice)])
    assert last_state(tmp_path / "elsewhere")[0]["step"] == 6


def test_data_that_is_trained_on_must_stay():
    """dmd.py noises real data for the later steps, without any GAN."""
    flags = "--teacher ring --student_input real --student_steps 2 --data".split()
    args = [dmd.parse_args([*flags, name]) for name in ("a.safetensors", "b.safetensors")]
    info = {"flags": flags_to_save(args[0]), "step": 1, "world_size": 1, "method": "dmd"}
    with pytest.raises(UserError, match="--data was 'a.safetensors' and is 'b.safetensors'"):
        changes_on_resume(info, args[1], 1)
