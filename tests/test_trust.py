"""What a run promises when it is killed, stopped, started twice or fed what nobody foresaw.

docs/trust.md says which test shows which promise.
"""

import ast
import contextlib
import csv
import errno
import functools
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import fuzz
import pytest
import torch
from forks import launch
from helpers import (
    ENV,
    ROOT,
    assert_bit_equal,
    before_update,
    ended,
    flags_for,
    quiet,
    read_log,
    refusal_of,
    save_tiny_teacher,
    weights,
    without_time,
)
from safetensors.torch import save_file

import dmd
from models.files import TensorWriter, UserError, fsync_folder, replacing
from models.plumbing import run as plumbing
from models.plumbing.run import Log, Run, place_among_ranks, run_main

SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(autouse=True)
def no_samples(monkeypatch):
    quiet(monkeypatch)


# ---- a run that is asked to stop -----------------------------------------------------------------


@pytest.fixture
def no_nohup():
    """SIGHUP counts, also where these tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


ENDS = [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)]


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.parametrize("number, code", ENDS)
def test_a_signal_ends_a_run_after_its_update(monkeypatch, teacher, tmp_path, capsys, number, code):
    """With a state, where none was due; resumed, it is as if unbroken; handlers are as before."""
    handlers = [signal.getsignal(n) for n, _ in ENDS]
    flags = flags_for(teacher, tmp_path / "run")
    with monkeypatch.context() as m:
        before_update(m, 2, lambda run: os.kill(os.getpid(), number))
        assert ended(flags) == code
    said = capsys.readouterr().out
    assert "stopped after update 3; step-0000003 is intact: go on with --resume_from_che" in said
    assert [signal.getsignal(n) for n, _ in ENDS] == handlers
    assert len(read_log(tmp_path / "run")) == 3
    assert ended([*flags, "--resume_from_checkpoint", "latest"]) == 0
    assert ended(flags_for(teacher, tmp_path / "whole")) == 0
    assert_bit_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    logs = [without_time(read_log(tmp_path / name)) for name in ("run", "whole")]
    assert logs[0] == logs[1]


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
def test_a_closed_terminal_ends_a_run_well(monkeypatch, teacher, tmp_path):
    """Its window is gone: SIGHUP comes, and every later write to it fails."""
    master, slave = os.openpty()
    kept = [os.dup(fd) for fd in (1, 2)]

    def close(run):
        os.close(master)
        os.kill(os.getpid(), signal.SIGHUP)

    before_update(monkeypatch, 2, close)
    try:
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(slave, fd)
            monkeypatch.setattr(sys, name, open(fd, "w", closefd=False))
        code = ended(flags_for(teacher, tmp_path / "run"))
    finally:
        for fd, old in zip((1, 2), kept):
            os.dup2(old, fd)
    assert code == 0
    assert os.listdir(tmp_path / "run" / "state") == ["step-0000003"]


def test_nohup_keeps_a_run_going(monkeypatch, teacher, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before_update(monkeypatch, 2, lambda run: os.kill(os.getpid(), signal.SIGHUP))
        assert ended(flags_for(teacher, tmp_path / "run")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(read_log(tmp_path / "run")) == 6


def test_a_second_signal_ends_it_at_once(monkeypatch, teacher, tmp_path):
    """But not one that comes with the first, as from a terminal and from torchrun."""
    codes = []

    def twice(run):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not codes
        run.asked_at -= 2
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(plumbing.os, "_exit", codes.append)
    before_update(monkeypatch, 1, twice)
    assert ended(flags_for(teacher, tmp_path / "run")) == 0
    assert codes == [130]


def test_a_time_limit_ends_a_run_well(monkeypatch, teacher, tmp_path):
    """--max_minutes may change on resume, and counts from the start of the process."""
    flags = flags_for(teacher, tmp_path / "run")
    with monkeypatch.context() as m:
        before_update(m, 0, lambda run: setattr(run, "started", run.started - 30))
        before_update(m, 1, lambda run: setattr(run, "started", run.started - 31))
        assert ended([*flags, "--max_minutes", "1"]) == 0
    assert len(read_log(tmp_path / "run")) == 2  # half a minute is none
    assert ended([*flags, "--resume_from_checkpoint", "latest", "--max_minutes", "60"]) == 0
    assert len(read_log(tmp_path / "run")) == 6


def test_all_ranks_stop_together(teacher, tmp_path):
    """One rank alone was asked: the mean over ranks says so to the others, in the same update."""
    run = Run(dmd.parse_args(flags_for(teacher, tmp_path / "run")), "dmd")
    run.open_folder(0)
    for others, stops, code in (
        ((0.0, 0.0), False, 0),
        ((0.5, 0.0), True, 0),
        ((0.5, 0.5), True, 130),
    ):
        run.sums, run.counts, run.clock = {"loss": 1.0}, {"loss": 1}, 0.0
        run.bar = types.SimpleNamespace(set_postfix=lambda *a, **k: None)
        run.mean_over_ranks = lambda *values, o=others: [*values[:-2], *o]
        assert run.end_step(0) == stops and run.stopping == stops and run.exit_code == code


def test_ctrl_c_before_training_is_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 130 and capsys.readouterr().err.count("\n") == 1


# ---- the folder of an earlier run ----------------------------------------------------------------


def snapshot(folder):
    return {
        str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("ends", ["nan", "before"])
def test_an_earlier_run_stays_until_the_first_update_is_done(
    monkeypatch, teacher, tmp_path, capsys, ends
):
    """A loss that is not finite in it, or a failure before it: nothing has been touched."""
    out = tmp_path / "run"
    assert ended(flags_for(teacher, out)) == 0
    before = snapshot(out)
    flags = flags_for(teacher, out, "--regression_weight", "0.25", "--teacher_steps", "1")
    flags += ["--student_steps", "1", "--regression_pairs", "4"]
    with monkeypatch.context() as m:
        if ends == "nan":
            before_update(m, 0, lambda run: run.note(loss=float("nan")))
        else:
            m.setattr(Run, "micro_batches", lambda *a: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            assert ended(flags) == 1
    assert snapshot(out) == before and not (tmp_path / "run.1").exists()
    assert "intact" not in capsys.readouterr().err  # that state is of another run
    assert (tmp_path / "run.starting" / "state" / "pairs.safetensors").exists()
    assert ended(flags) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"run", "run.1"}
    moved = {k.replace("/run/", "/run.1/"): v for k, v in before.items()}
    assert snapshot(tmp_path / "run.1") == moved
    assert (out / "state" / "pairs.safetensors").exists() and len(read_log(out)) == 6


def test_a_resumed_run_changes_nothing_before_its_first_update(monkeypatch, teacher, tmp_path):
    """Resumed from an earlier state, it cuts its log only then."""
    out = tmp_path / "run"
    flags = flags_for(teacher, out, "--checkpointing_steps", "3")
    assert ended(flags) == 0
    before = snapshot(out)
    again = [*flags, "--resume_from_checkpoint", str(out / "state" / "step-0000003")]
    with monkeypatch.context() as m:
        before_update(m, 3, lambda run: run.note(loss=float("nan")))
        assert ended(again) == 1
    assert snapshot(out) == before
    assert ended(again) == 0
    assert len(read_log(out)) == 6 and not (tmp_path / "run.1").exists()


def test_a_state_of_another_folder_does_not_write_over_a_run(teacher, tmp_path):
    assert ended(flags_for(teacher, tmp_path / "a")) == 0
    assert ended(flags_for(teacher, tmp_path / "b", "--seed", "3")) == 0
    before = snapshot(tmp_path / "b")
    state = ["--resume_from_checkpoint", str(tmp_path / "a" / "state" / "step-0000004")]
    assert ended(flags_for(teacher, tmp_path / "b", *state)) == 0
    moved = {k.replace("/b/", "/b.1/"): v for k, v in before.items()}
    assert snapshot(tmp_path / "b.1") == moved and len(read_log(tmp_path / "b")) == 2


def test_two_runs_in_one_folder(monkeypatch, teacher, tmp_path, capsys):
    """The one that was there first ends in a line when the other takes the folder."""
    flags = flags_for(teacher, tmp_path / "run")

    def other(run):
        with monkeypatch.context() as m:
            m.setattr(Run, "end_step", real)
            assert ended(flags) == 0

    real = Run.end_step
    before_update(monkeypatch, 1, other)
    assert ended(flags) == 1
    assert "another one has taken its folder" in capsys.readouterr().err
    assert len(read_log(tmp_path / "run")) == 6 and len(read_log(tmp_path / "run.1")) == 1


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder that cannot be written to")
def test_an_output_folder_that_cannot_be_made(teacher, capsys):
    """Though its permissions say that it can, to root."""
    error = refusal_of(capsys, dmd.main, *flags_for(teacher, "/proc/run"))
    assert "--output_dir" in error


# ---- inputs that changed, or moved, while a run was interrupted ----------------------------------


def data_file(path, seed=0, middle=0.0):
    x0 = torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    x0[1000:1100] += middle
    save_file({"x0": x0, "cond.label": torch.arange(2000) % 3}, path)
    return str(path)


def test_a_run_goes_on_with_the_inputs_it_began_with(teacher, tmp_path, capsys):
    """Other content under the same name is refused, the same content elsewhere is not."""
    own, data = shutil.copytree(teacher, tmp_path / "own"), data_file(tmp_path / "d.safetensors")
    flags, gan = flags_for(str(own), tmp_path / "run"), ["--gan_weight", "0.1", "--data"]
    assert ended([*flags, *gan, data]) == 0
    flags += ["--resume_from_checkpoint", "latest", "--max_train_steps", "7"]
    state = ["--resume_from_checkpoint", str(tmp_path / "run" / "state" / "step-0000006")]
    data_file(tmp_path / "d.safetensors", middle=1e-3)
    error = refusal_of(capsys, dmd.main, *flags, *gan, data)
    assert f"--data {data}: these are not the files that the run began with" in error
    assert ended(flags) == 0  # it is not read then
    moved = data_file(tmp_path / "moved.safetensors")
    elsewhere = str(tmp_path / "elsewhere")
    own.rename(elsewhere)
    again = [*flags, *gan, moved, "--teacher", elsewhere, *state]
    assert ended(again) == 0
    weights = next(Path(elsewhere).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    assert "--teacher" in refusal_of(capsys, dmd.main, *again)


def test_ranks_go_on_with_inputs_that_were_moved(tmp_path):
    """Rank 0 alone reads them, and all know that they are the same."""
    teacher = Path(save_tiny_teacher(tmp_path / "teacher"))
    data, gan = data_file(tmp_path / "d.safetensors"), ["--gan_weight", "0.1", "--data"]
    more = ["--train_batch_size", "2", "--preview_samples", "2", "--max_train_steps"]
    flags = flags_for(str(teacher), tmp_path / "run", *more, "2", *gan, data)
    assert launch(ROOT / "dmd.py", flags, ranks=2).returncode == 0
    moved, elsewhere = str(tmp_path / "moved.safetensors"), str(tmp_path / "elsewhere")
    os.rename(data, moved)
    teacher.rename(elsewhere)
    flags = flags_for(elsewhere, tmp_path / "run", *more, "3", *gan, moved)
    flags += ["--resume_from_checkpoint", "latest"]
    done = launch(ROOT / "dmd.py", flags, ranks=2)
    assert done.returncode == 0, done.stderr[-1000:]
    assert f"--data was {data} and is {moved} from update 3 on" in done.stdout
    data_file(moved, middle=1e-3)
    done = launch(ROOT / "dmd.py", [*flags, "--max_train_steps", "4"], ranks=2)
    assert done.returncode == 2
    assert "error: --data" in done.stderr and "(rank 1)" not in done.stderr


# ---- a full disk ---------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_the_run_goes_on(monkeypatch, teacher, tmp_path, capsys):
    """While its second state is written; nothing half-written is left, and the first is whole."""
    flags = flags_for(teacher, tmp_path / "run", "--checkpointing_steps", "2")
    real, paths = TensorWriter.write, set()

    def full(self, name, value):
        if "state.safetensors" in str(self.path):
            paths.add(self.path)
        if len(paths) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, name, value)

    with monkeypatch.context() as m:
        m.setattr(TensorWriter, "write", full)
        assert ended(flags) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the disk is full ") and "make room; step-0000002" in error
    assert sorted(p.name for p in (tmp_path / "run" / "state").iterdir()) == ["step-0000002"]
    assert not list((tmp_path / "run").rglob("*tmp*"))
    assert ended([*flags, "--resume_from_checkpoint", "latest"]) == 0
    assert ended(flags_for(teacher, tmp_path / "whole", "--checkpointing_steps", "2")) == 0
    assert_bit_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("how", ["write", "flush"])
def test_a_file_that_does_not_get_onto_the_disk_is_removed(monkeypatch, tmp_path, how):
    """And the old one is still there: `replacing` and TensorWriter alike."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    writers = [
        lambda path: replacing(path),
        lambda path: TensorWriter(path, {"a": (torch.float32, (2,))}),
    ]
    for n, writer in enumerate(writers):
        path = str(tmp_path / f"{n}")
        Path(path).write_text("old")
        with monkeypatch.context() as m, pytest.raises(OSError):
            with writer(path) as file:
                if how == "write":
                    full()
                if isinstance(file, TensorWriter):
                    file.write("a", torch.zeros(2))
                m.setattr(os, "fsync", full)
        assert Path(path).read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


# ---- log.csv and the progress bar of long runs ---------------------------------------------------


def test_a_long_log_is_cut_and_widened_row_by_row(tmp_path, monkeypatch):
    """However long it is, no more than a buffer of it is in memory; wrong lines go."""
    rows = 20000
    with open(tmp_path / "log.csv", "w") as f:
        f.write("step,a,seconds\n")
        f.writelines(f"{i},0.123456,1\n" for i in range(1, rows + 1))
        f.write("\0\0\0\n20001,0.1")
    tracemalloc.start()
    log = Log(str(tmp_path), rows - 5)
    log.write({"step": rows - 4, "a": 1.0, "b": 2.0, "seconds": 1.0})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400_000, peak  # the file itself has as much, lists of its rows ten times that
    with open(tmp_path / "log.csv", newline="") as f:
        found = list(csv.reader(f))
    assert found[0] == ["step", "a", "seconds", "b"] and found[-1] == ["19996", "1", "1", "2"]
    assert len(found) == rows - 3 and found[-2] == ["19995", "0.123456", "1", ""]


def test_a_progress_bar_in_a_pipe_writes_once_a_minute(monkeypatch):
    """On a terminal ten times a second."""
    for terminal, seconds in ((True, 0.1), (False, 60)):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        bar = plumbing.progress(range(3), "x")
        assert bar.mininterval == seconds and bar.maxinterval >= max(10, seconds)
        list(bar)
    assert len(re.findall(r"x: ", stream.getvalue())) <= 2  # at its start and at its end


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
def test_a_terminal_of_no_width_has_a_bar_too(monkeypatch):
    """Such are those of containers; tqdm takes their width for a wish to see nothing."""
    master, slave = os.openpty()  # 0 x 0
    with open(slave, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        list(plumbing.progress(range(3), "x"))
    said = b""
    with contextlib.suppress(OSError):  # at its end; a terminal may hand on what it got in parts
        while part := os.read(master, 4096):
            said += part
    os.close(master)
    assert b"3/3" in said


def test_no_other_progress_bar():
    """Every long loop of a run uses that one."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "models").rglob("*.py")]:
        own = path.name == "progress.py"
        assert len(re.findall(r"\btqdm\(", path.read_text())) == own, path.name


# ---- where a run is started ----------------------------------------------------------------------

ENVIRONMENTS = [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 alone, which torchrun sets with others"),
    ({"RANK": "1"}, "RANK=1 alone"),
    ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one, which is no number"),
    ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0, which is no number"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE=x, which is no"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0"),
    ({"SLURM_STEP_NUM_TASKS": "4"}, "each of these tasks would train a run of its own"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "each of these tasks would train a run of its own"),
]


@pytest.mark.parametrize("environ, says", ENVIRONMENTS, ids=lambda e: str(e)[:40])
def test_environments_that_are_no_torchrun(environ, says):
    with pytest.raises(UserError, match=re.escape(says)):
        place_among_ranks(environ)


def test_environments_that_are_fine():
    assert place_among_ranks({}) == (0, 1, 0)
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert place_among_ranks(ranks) == (3, 4, 1)
    for alone in ({"WORLD_SIZE": "1"}, {"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}):
        assert place_among_ranks(alone) == (0, 1, 0)


def test_ranks_that_cannot_meet(monkeypatch, teacher, tmp_path, capsys):
    """A port that is taken, in one line."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        there = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for name, value in there.items():
            monkeypatch.setenv(name, value)
        error = refusal_of(capsys, dmd.main, *flags_for(teacher, tmp_path / "run"))
    assert f"the ranks cannot meet at 127.0.0.1:{port}" in error


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="rank 2 of this node has no GPU, there are 2"):
        plumbing.own_device(2)


def test_names_that_the_terminal_cannot_show(monkeypatch, capsysbinary):
    """A folder with letters of another alphabet is no reason to end a run."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    run_main(lambda: print("runs/\u00fc\udcff"))
    stream.flush()
    assert stream.buffer.getvalue() == b"runs/\\xfc\\udcff\n"


def test_installed_packages_do_not_hide_ours(tmp_path):
    """Packages called kernels (Hugging Face has one), tests, ... may be there: ours come first."""
    for name in ("kernels", "models", "tests", "docs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    env = {**ENV, "PYTHONPATH": str(tmp_path)}
    modules = "models.convert", "tests.orderings", "docs.tour", "docs.draw"
    for command in (["linvideo.py", "--help"], *(["-m", name, "--help"] for name in modules)):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-500:]


def test_transformers_finds_hugging_faces_kernels(tmp_path):
    """Where that is installed; what of ours was imported before goes on, and without it ours is."""
    (tmp_path / "transformers.py").write_text("from kernels import CUDAProperties\n")
    code = """
import sys, kernels.linear_attention as ours
from models.libraries import require
for _ in range(2):
    require("transformers")
assert sys.modules["kernels"].__file__.startswith(sys.argv[1])
assert ours.linear_attention
"""
    env = {**ENV, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    for installed in (False, True):
        if installed:
            (tmp_path / "kernels").mkdir()
            (tmp_path / "kernels" / "__init__.py").write_text("from .parts import CUDAProperties\n")
            (tmp_path / "kernels" / "parts.py").write_text("CUDAProperties = 1\n")
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert (done.returncode == 0) == installed, done.stderr
    # and where it lacks something itself, ours stays
    (tmp_path / "kernels" / "parts.py").write_text("import nowhere_installed\n")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "cannot import name 'CUDAProperties' from 'kernels'" in done.stderr


@pytest.mark.parametrize("tool", ["encode", "decode", "convert", "metrics", "meshes", "worlds"])
def test_commands_run_without_docstrings(tool):
    """python -OO leaves them out."""
    command = [sys.executable, "-OO", "-m", f"models.{tool}", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and "--" in done.stdout, done.stderr[-500:]


# ---- faults --------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("script", ["dmd", "phased_dmd"])
def test_faults_at_random(script):
    """Two minutes of `python -m tests.faults`."""
    command = [sys.executable, "-m", "tests.faults", "--minutes", "1", script]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


# ---- platforms -----------------------------------------------------------------------------------

PYTHON = [p for room in ("models", "kernels", "tests") for p in (ROOT / room).rglob("*.py")]
PYTHON += [ROOT / f"{script}.py" for script in SCRIPTS]


@functools.cache
def tree(path):
    return ast.parse(path.read_text(), feature_version=(3, 10))


def test_python_versions():
    """Every file is valid in 3.10 and in what runs the tests."""
    for path in PYTHON:
        tree(path)
    with pytest.raises(SyntaxError):
        ast.parse("try:\n    pass\nexcept* ValueError:\n    pass", feature_version=(3, 10))


def top_level_imports(path):
    """Modules that a file needs to be imported, less what stands in a try."""
    for node in tree(path).body:
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


POSIX = """fork forkpty getuid geteuid getgid setsid setpgid killpg getpgid uname sysconf statvfs
    mkfifo mknod chown lchown getloadavg sched_getaffinity sched_setaffinity posix_fadvise
    posix_fallocate pread pwrite sendfile O_DIRECT O_DIRECTORY SIGKILL SIGALRM SIGHUP SIGUSR1
    SIGUSR2 SIGCHLD SIGPIPE SIGCONT alarm setitimer pause AF_UNIX tzset""".split()


def test_nothing_of_one_system_is_needed():
    """Neither modules of POSIX nor Triton; no function, signal or flag that Windows lacks."""
    posix = {"resource", "fcntl", "pwd", "grp", "termios", "pty", "posix", "crypt", "syslog"}
    for path in [p for p in PYTHON if "tests" not in p.relative_to(ROOT).parts]:
        wanted = posix | {"winreg", "msvcrt", "triton"}
        assert wanted.isdisjoint(top_level_imports(path)), path.name
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and node.attr in POSIX:
                of = getattr(node.value, "id", "")
                assert of not in ("os", "signal", "time", "socket"), (path.name, node.lineno)


def test_systems_without_resource_and_without_flushing_of_folders(monkeypatch, tmp_path):
    """As on Windows."""
    monkeypatch.setattr(plumbing, "resource", None)
    assert plumbing.peak_memory_mb("cpu") == 0

    def refused(*args):
        raise PermissionError

    monkeypatch.setattr(os, "open", refused)
    fsync_folder(str(tmp_path))


# ---- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", fuzz.LOADERS)
def test_damaged_files(loader):
    """A sample of `python -m tests.fuzz`: refused or read."""
    assert not fuzz.fuzz(loader, 8)["faults"]


# ---- security ------------------------------------------------------------------------------------

NEVER = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


def test_no_pickle_no_shell_and_no_code_from_files():
    """What could run code that a file brings along is called nowhere outside the tests."""
    for path in [p for p in PYTHON if "tests" not in p.relative_to(ROOT).parts]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                assert NEVER.isdisjoint(a.name.split(".")[0] for a in node.names), path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in NEVER, path  # from . import
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            wrong = {"eval", "exec", "compile", "os.system", "os.popen", "torch.load", "torch.save"}
            assert name not in wrong, (path.name, node.lineno, name)
            keys = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert keys.get("shell") != "True" and keys.get("allow_pickle") != "True", path
            assert keys.get("trust_remote_code") != "True", path
