"""Where a run writes, is started and is read: folders, states, temporary files, lost readers."""

import errno
import os
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import helpers
import pytest
import torch
from forks import launch
from helpers import before_update, ended, quiet, read_log, refusal_of, save_tiny_teacher
from torch import nn

import dmd
import linvideo
from models import files
from models.files import TensorWriter, UserError, replacing, save_json
from models.plumbing import run as plumbing
from models.plumbing.run import place_among_ranks
from models.plumbing.state import complete_states, find_state, save_state


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(autouse=True)
def no_samples(monkeypatch):
    quiet(monkeypatch)


def flags_for(teacher, out, *more):
    return helpers.flags_for(teacher, out, "--checkpointing_steps", "2", *more)


def saved_steps(out):
    return sorted(p.name for p in (out / "state").iterdir() if p.is_dir())


# ---- the states of a run that was resumed from an earlier one ------------------------------------


def not_finite(run):
    run.note(loss=float("nan"))


def test_latest_is_the_state_that_a_run_saved_last(monkeypatch, teacher, tmp_path, capsys):
    """Resumed from step 4 of 6, and stopped at 5: `latest` is 5, not the 6 of before."""
    out = tmp_path / "run"
    assert ended(flags_for(teacher, out)) == 0
    assert saved_steps(out) == ["step-0000004", "step-0000006"]
    flags = flags_for(teacher, out, "--learning_rate", "1e-5", "--resume_from_checkpoint")
    with monkeypatch.context() as m:
        before_update(m, 4, lambda run: os.kill(os.getpid(), signal.SIGTERM))
        assert ended([*flags, str(out / "state" / "step-0000004")]) == 0
    assert "after update 5; step-0000005 is intact: go on with --resume" in capsys.readouterr().out
    assert saved_steps(out) == ["step-0000004", "step-0000005"]
    assert ended([*flags, "latest"]) == 0
    assert len(read_log(out)) == 6 and saved_steps(out) == ["step-0000005", "step-0000006"]


@pytest.mark.parametrize("update", [5, 6])
def test_advice_names_no_state_of_an_abandoned_branch(
    monkeypatch, teacher, tmp_path, capsys, update
):
    """Before the first update the later states are still there, and not what to go on with."""
    out = tmp_path / "run"
    assert ended(flags_for(teacher, out, "--max_train_steps", "8")) == 0
    before = saved_steps(out)
    assert before == ["step-0000006", "step-0000008"]
    shutil.copytree(out / "state" / "step-0000006", out / "state" / "step-0000004")
    info = files.load_json(str(out / "state" / "step-0000004" / "state.json"))
    save_json({**info, "step": 4}, str(out / "state" / "step-0000004" / "state.json"))
    earlier = str(out / "state" / "step-0000004")
    flags = flags_for(teacher, out, "--max_train_steps", "8", "--checkpointing_steps", "100")
    before_update(monkeypatch, update - 1, not_finite)
    assert ended([*flags, "--resume_from_checkpoint", earlier]) == 1
    error = capsys.readouterr().err
    if update == 5:
        assert f"{earlier} is intact: resume with --resume_from_checkpoint {earlier} " in error
        assert saved_steps(out) == ["step-0000004", *before]
    else:
        assert "step-0000004 is intact: resume with --resume_from_checkpoint latest " in error
        assert saved_steps(out) == ["step-0000004"]


@pytest.mark.parametrize("update", [5, 6])
def test_what_ends_a_resumed_run_names_its_own_state(
    monkeypatch, teacher, tmp_path, capsys, update
):
    """The same for Ctrl-C, a full disk and no memory, which go by `newest_state`."""
    out = tmp_path / "run"
    assert ended(flags_for(teacher, out)) == 0
    earlier = str(out / "state" / "step-0000004")
    flags = flags_for(teacher, out, "--resume_from_checkpoint", earlier)

    def no_memory(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    before_update(monkeypatch, update - 1, no_memory)
    assert ended([*flags, "--checkpointing_steps", "100"]) == 1
    name, how = (earlier, earlier) if update == 5 else ("step-0000004", "latest")
    said = f"{name} is intact: go on with --resume_from_checkpoint {how}\n"
    assert capsys.readouterr().err.endswith(said)


def test_the_last_states_stay_until_there_is_another(teacher, tmp_path, monkeypatch):
    """Resumed from a copy, with no earlier state beside it: a kill must leave something."""
    out = tmp_path / "run"
    assert ended(flags_for(teacher, out)) == 0
    kept = shutil.move(out / "state" / "step-0000004", out / "state" / "step-0000004-good")
    flags = flags_for(teacher, out, "--resume_from_checkpoint", str(kept))
    with monkeypatch.context() as m:
        before_update(m, 5, not_finite)
        assert ended([*flags, "--checkpointing_steps", "100"]) == 1
    assert saved_steps(out) == ["step-0000004-good", "step-0000006"]
    with monkeypatch.context() as m:
        before_update(m, 4, lambda run: os.kill(os.getpid(), signal.SIGTERM))
        assert ended(flags) == 0
    assert saved_steps(out) == ["step-0000004-good", "step-0000005"]


# ---- which states count --------------------------------------------------------------------------


def saved(folder, step):
    save_state(str(folder), step, {"net": nn.Linear(1, 1)}, {"world_size": 1})


def test_a_state_that_was_half_deleted_is_none(monkeypatch, tmp_path):
    """A kill while an old one, or the one of this step, is being deleted."""
    for step in (1, 2):
        saved(tmp_path, step)
    real = shutil.rmtree

    def killed(path, *args, **more):
        if os.path.isdir(path):
            os.remove(os.path.join(path, "state.safetensors"))
            raise KeyboardInterrupt
        return real(path, *args, **more)

    for step, left in ((3, [2, 3]), (3, [2])):
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(shutil, "rmtree", killed)
            saved(tmp_path, step)
        assert complete_states(str(tmp_path)) == [f"step-{n:07d}" for n in left]
        for junk in (tmp_path / "state").glob(".tmp-*"):
            real(junk)
    os.remove(tmp_path / "state" / "step-0000002" / "state.json")
    assert complete_states(str(tmp_path)) == []


def test_what_a_user_keeps_is_neither_deleted_nor_latest(tmp_path):
    """cp -r step-0000002 step-0000002-good"""
    saved(tmp_path, 2)
    root = tmp_path / "state"
    kept = "step-0000002-good", "step-0000009.bak", "step-best"
    for name in kept:
        shutil.copytree(root / "step-0000002", root / name)
    for step in (3, 4, 5):
        saved(tmp_path, step)
    assert complete_states(str(tmp_path)) == ["step-0000004", "step-0000005"]
    assert find_state(str(tmp_path), "latest") == str(root / "step-0000005")
    assert {p.name for p in root.iterdir()} == {*kept, "step-0000004", "step-0000005"}


def test_ten_million_updates(tmp_path):
    """Numbers of more digits come last."""
    for step in (9_999_998, 9_999_999, 10_000_000, 10_000_001):
        saved(tmp_path, step)
    assert complete_states(str(tmp_path)) == ["step-10000000", "step-10000001"]


def test_two_containers_with_one_process_number(monkeypatch, tmp_path):
    """Each writes a temporary file of its own."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = str(tmp_path / "x")
    with replacing(path) as a, replacing(path) as b:
        a.write(b"first")
        b.write(b"second")
        assert len(list(tmp_path.glob("x.tmp-1*"))) == 2
    assert Path(path).read_bytes() == b"first"
    about = {"a": (torch.float32, (1,))}
    with TensorWriter(path, about) as a, TensorWriter(path, about) as b:
        for file in (a, b):
            file.write("a", torch.ones(1))
        assert len(list(tmp_path.glob("x.tmp-1*"))) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# ---- the output folder ---------------------------------------------------------------------------


def test_latest_without_a_state_does_not_write_over_a_run(teacher, tmp_path, capsys):
    """state/ was deleted to save room."""
    out, flags = tmp_path / "run", flags_for(teacher, tmp_path / "run")
    assert ended(flags) == 0
    shutil.rmtree(out / "state")
    log = (out / "log.csv").read_text()
    student = (out / "student" / "diffusion_pytorch_model.safetensors").read_bytes()
    resumed = ["--resume_from_checkpoint", "latest", "--max_train_steps", "2"]
    assert ended([*flags, *resumed, "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert "starting fresh" in said and f"{out} existed and is now {out}.1" in said
    assert (tmp_path / "run.1" / "log.csv").read_text() == log
    kept = tmp_path / "run.1" / "student" / "diffusion_pytorch_model.safetensors"
    assert kept.read_bytes() == student and len(read_log(out)) == 2


def test_a_start_that_was_killed_before_its_first_save_keeps_what_it_made(teacher, tmp_path):
    """A bank takes long."""
    (tmp_path / "run" / "bank").mkdir(parents=True)
    (tmp_path / "run" / "bank" / "bank.json").write_text("{}")
    (tmp_path / "run" / "log.csv").write_text("step\n1\n")
    assert ended(flags_for(teacher, tmp_path / "run", "--resume_from_checkpoint", "latest")) == 0
    assert (tmp_path / "run" / "bank" / "bank.json").exists()
    assert not (tmp_path / "run.1").exists()


def test_a_state_from_elsewhere_does_not_delete_the_states_of_another_run(teacher, tmp_path):
    """Whose log.csv is gone."""
    assert ended(flags_for(teacher, tmp_path / "a", "--max_train_steps", "4")) == 0
    assert ended(flags_for(teacher, tmp_path / "b")) == 0
    os.remove(tmp_path / "b" / "log.csv")
    state = ["--resume_from_checkpoint", str(tmp_path / "a" / "state" / "step-0000004")]
    assert ended(flags_for(teacher, tmp_path / "b", *state)) == 0
    assert saved_steps(tmp_path / "b.1") == ["step-0000004", "step-0000006"]


@pytest.fixture
def mounted(monkeypatch, tmp_path):
    """tmp_path/run looks like a mount point, which the system does not rename."""
    mount, real = str(tmp_path / "run"), os.rename

    def rename(old, new, **more):
        if os.path.normpath(old) == mount:
            raise OSError(errno.EBUSY, "Device or resource busy", old)
        return real(old, new, **more)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os.path, "ismount", lambda path: os.path.normpath(path) == mount)
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_an_empty_mount_point_is_written_to(teacher, mounted):
    """Of a file system of its own, which has lost+found, or of a Mac."""
    (mounted / "lost+found").mkdir()
    (mounted / ".DS_Store").touch()
    assert ended(flags_for(teacher, mounted)) == 0
    assert (mounted / "report.json").exists() or (mounted / "student").is_dir()
    assert [p.name for p in mounted.parent.iterdir()] == ["run"]
    assert ended([*flags_for(teacher, mounted), "--resume_from_checkpoint", "latest"]) == 0


def test_a_mount_point_with_a_run_is_refused_before_training(teacher, mounted, capsys):
    """And the advice works: a folder in it."""
    assert ended(flags_for(teacher, mounted)) == 0
    error = refusal_of(capsys, dmd.main, *flags_for(teacher, mounted))
    assert "is a mount point and cannot be renamed: name a folder in it" in error
    assert [p.name for p in mounted.parent.iterdir()] == ["run"]
    assert ended(flags_for(teacher, mounted / "new")) == 0


@pytest.mark.parametrize("name", ["EBUSY", "EXDEV", "EPERM", "EACCES"])
def test_a_folder_that_cannot_be_renamed(monkeypatch, teacher, tmp_path, capsys, name):
    """As on overlays, and where it is another user's: one line, and nothing is lost."""
    out, real = tmp_path / "run", os.rename
    assert ended(flags_for(teacher, out)) == 0

    def rename(old, new, **more):
        if os.path.normpath(old) == str(out):
            raise OSError(getattr(errno, name), "no", old)
        return real(old, new, **more)

    monkeypatch.setattr(os, "rename", rename)
    assert ended(flags_for(teacher, out)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --output_dir {out} has files of another run, and cannot be re")
    assert error.endswith("(no): name another")
    assert len(read_log(out)) == 6 and not (tmp_path / "run.1").exists()
    assert ended(flags_for(teacher, tmp_path / "other")) == 0


def test_the_new_runs_folder_cannot_be_renamed(monkeypatch, teacher, tmp_path, capsys):
    """Then the earlier one has its name again."""
    out, real = tmp_path / "run", os.rename
    assert ended(flags_for(teacher, out)) == 0

    def rename(old, new, **more):
        if str(old).endswith(".starting"):
            raise OSError(errno.EACCES, "no", old)
        return real(old, new, **more)

    monkeypatch.setattr(os, "rename", rename)
    assert ended(flags_for(teacher, out)) == 2
    assert "cannot be renamed (no)" in capsys.readouterr().err.splitlines()[-1]
    assert len(read_log(out)) == 6 and not (tmp_path / "run.1").exists()


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_link_to_a_folder(teacher, tmp_path, slash):
    """A run on another disk, by a link: the earlier one is renamed there, and the link stays."""
    (tmp_path / "home").mkdir()
    (tmp_path / "scratch").mkdir()
    link = tmp_path / "home" / "run"
    link.symlink_to(tmp_path / "scratch" / "x", target_is_directory=True)  # there is none yet
    for _ in range(2):
        assert ended(flags_for(teacher, f"{link}{slash}")) == 0
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["run"] and link.is_symlink()
    assert {p.name for p in (tmp_path / "scratch").iterdir()} == {"x", "x.1"}
    assert len(read_log(link)) == 6


def test_a_drive_that_is_not_there(monkeypatch):
    """On Windows it has no folder above it that exists."""
    calls = []

    def dirname(path):
        calls.append(path)
        assert len(calls) < 100, "it goes on for ever"
        return "Z:\\"

    monkeypatch.setattr(os.path, "abspath", lambda path: path)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    monkeypatch.setattr(os.path, "dirname", dirname)
    with pytest.raises(UserError, match=re.escape("Z:\\ is not a folder that can be written to")):
        plumbing.refuse_output_dir("Z:\\runs\\x")
    monkeypatch.setattr(linvideo, "bytes_of_trajectory", lambda args, teacher: 1)
    run = types.SimpleNamespace(args=None, say=print)
    with pytest.raises(UserError, match="where 0.0 MB are free: lower"):
        linvideo.announce(run, None, "Z:\\bank", 2, "teacher", "lower")


# ---- nobody reads what a run prints --------------------------------------------------------------


def pipe(kind):
    """-> what closes the reading end, the writing end."""
    return os.pipe() if kind == "pipe" else os.openpty()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize("update", [None, 2])
def test_a_run_goes_on_when_nobody_reads_it(monkeypatch, teacher, tmp_path, kind, update):
    """A connection dropped, or `tee` has ended, before the first line or in the middle."""
    reads, writes = pipe(kind)
    kept = [os.dup(fd) for fd in (1, 2)]
    if update is None:
        os.close(reads)
    else:
        before_update(monkeypatch, update, lambda run: os.close(reads))
    try:
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(writes, fd)
            monkeypatch.setattr(sys, name, open(fd, "w", buffering=1, closefd=False))
        code = ended(flags_for(teacher, tmp_path / "run"))
        print("more", flush=True)
    finally:
        for fd, old in zip((1, 2), kept):
            os.dup2(old, fd)
        os.close(writes)
    assert code == 0 and len(read_log(tmp_path / "run")) == 6
    assert saved_steps(tmp_path / "run") == ["step-0000004", "step-0000006"]


# ---- ranks ---------------------------------------------------------------------------------------

ONE_RANK_FAILS = """
import os
from models.files import UserError
from models.plumbing.run import run_main
def main():
    if os.environ["RANK"] in "{ranks}":
        raise UserError("no such file")
run_main(main)
"""


@pytest.mark.parametrize("ranks, says", [("1", "error (rank 1): no such file\n")])
def test_what_one_rank_alone_meets_is_said(tmp_path, ranks, says):
    """tests/test_runs.py has the other case, in which both raise and one speaks."""
    (tmp_path / "fails.py").write_text(ONE_RANK_FAILS.format(ranks=ranks))
    done = launch(tmp_path / "fails.py", ranks=2)
    assert done.returncode == 2 and done.stderr == says


LARGEST = """
import os
import torch.distributed as dist
from models.plumbing.run import run_main
from models.plumbing.sharding import largest_over_ranks
def main():
    assert largest_over_ranks(-3) == -3
    dist.init_process_group("gloo")
    print(largest_over_ranks([-5, -2, -7][int(os.environ["RANK"])]))
    dist.barrier()
run_main(main)
"""


def test_the_largest_over_ranks_is_known_to_all(tmp_path):
    (tmp_path / "largest.py").write_text(LARGEST)
    done = launch(tmp_path / "largest.py", ranks=3)
    assert done.returncode == 0 and done.stdout.count("-2.0") == 3, done


@pytest.mark.parametrize("name", ["PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_tasks_of_other_mpirun(name):
    """MPICH's and Intel's, and MVAPICH's."""
    with pytest.raises(UserError, match=f"{name}=4: each of these tasks would train a run"):
        place_among_ranks({name: "4"})
    assert place_among_ranks({name: "1"}) == (0, 1, 0)
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", name: "4"}
    assert place_among_ranks(ranks) == (3, 4, 1)


@pytest.mark.parametrize("left", ["3", "x"])
def test_a_local_rank_that_was_left_in_a_shell(left):
    """It alone moves no run to another GPU."""
    assert place_among_ranks({"LOCAL_RANK": left}) == (0, 1, 0)
    assert place_among_ranks({"LOCAL_RANK": left, "WORLD_SIZE": "1"}) == (0, 1, 0)
    assert place_among_ranks({"LOCAL_WORLD_SIZE": left}) == (0, 1, 0)


def test_a_plan_takes_no_ranks_of_a_node_that_were_left_in_a_shell(monkeypatch, teacher, capsys):
    """Eight ranks are one node, whatever LOCAL_WORLD_SIZE was before."""
    flags = flags_for(teacher, "runs/none", "--dry_run", "8")
    plans = []
    for left in (None, "2", "x"):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if left:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", left)
        assert ended(flags) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1] == plans[2] and "teacher" in plans[0]


def test_names_that_no_disk_takes(teacher, tmp_path, capsys):
    """255 bytes are the most; a run that is set aside gets a longer one."""
    for name in ("a" * 241, "\u00e9" * 121):
        where = str(tmp_path / name / "x")
        says = refusal_of(capsys, dmd.main, "--teacher", teacher, "--output_dir", where)
        assert "--output_dir has a name of 24" in says
        with pytest.raises(UserError, match="a name of 24"):
            plumbing.refuse_output_dir(where, sampling=True)
    assert ended(flags_for(teacher, tmp_path / ("a" * 240))) == 0
