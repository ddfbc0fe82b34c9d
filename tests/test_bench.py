"""tests/bench.py: its parts are those of a step, add up to it, and bear the networks' names."""

import importlib
import time

import pytest
import torch
from helpers import ROOT, ring_network, save_tiny_wan

from models.files import UserError
from models.networks.ring_mlp import RingMLP
from models.plumbing import teachers
from models.plumbing.run import Run
from models.worlds.ring import RingTeacher
from tests import bench

RING = "--teacher ring --train_batch_size 8".split()


@pytest.fixture(autouse=True)
def no_fit(monkeypatch):
    """Runs on the ring start from a network that is fitted to nothing."""
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))


@pytest.fixture
def clock(monkeypatch):
    """bench.now becomes a clock that stands still but for what the test lets take time."""
    seconds = [0.0]
    monkeypatch.setattr(bench, "now", lambda: seconds[0])

    def takes(target, name, cost):
        real = getattr(target, name)

        def slow(*args, **kwargs):
            seconds[0] += cost
            return real(*args, **kwargs)

        monkeypatch.setattr(target, name, slow)

    return takes


def test_every_part_has_its_own_time(clock):
    """dmd.py with a guided teacher and R = 3, on a clock of its own.

    Forward calls, backward passes, steps of optimisers and the moving average each take their time,
    and the table has it in the right row.
    """
    clock(RingTeacher, "forward", 100.0)
    clock(RingMLP, "forward", 10.0)
    clock(torch.autograd, "backward", 1000.0)
    clock(torch.optim.AdamW, "step", 1.0)
    clock(Run, "update_ema", 5.0)
    flags = "--fake_update_ratio 3 --guidance_scale 2 --gradient_accumulation_steps 2".split()
    stopwatch = bench.measure("dmd", 2, [*RING, *flags])
    want = {
        "teacher": 2 * 2 * 100.0,
        "student": (2 * 2 + 2) * 10.0,  # the first of the fake's turns has its samples
        "fake": (2 * 3 + 2) * 10.0,
        "fake update": 3 * (2 * 1000.0 + 1.0),
        "student update": 2 * 1000.0 + 1.0,
        "other": 5.0,
    }
    assert stopwatch.steps == [{**want, "total": sum(want.values())}] * 2
    assert stopwatch.calls == [{"teacher": 4, "student": 6, "fake": 8}] * 2


def test_table_of_dmd_on_the_ring(capsys, monkeypatch):
    """The rows with their names; the parts add up to the total, and that is the log's `seconds`."""
    own, measured, real, real_measure = [], [], Run.end_step, bench.measure

    def end_step(run, *args, **kwargs):
        result = real(run, *args, **kwargs)
        own.append(time.perf_counter() - run.clock)
        return result

    def measure(*args, **how):
        measured.append(real_measure(*args, **how))
        return measured[0]

    monkeypatch.setattr(Run, "end_step", end_step)
    monkeypatch.setattr(bench, "measure", measure)
    before = Run.start, Run.steps, Run.update, Run.end_step, torch.Tensor.backward
    bench.main(["dmd", "--steps", "3", "--", *RING])
    title, head, *rows, work, share = capsys.readouterr().out.strip().splitlines()[-11:]
    assert work.startswith("work: ") and " of a product of matrices" in share
    assert title.startswith("dmd --teacher ring --train_batch_size 8: 3 steps, ")
    assert head.split() == ["s/step", "std", "share", "calls/step"]
    names = ["teacher", "student", "fake", "student update", "fake update", "other", "total"]
    assert [row[:16].strip() for row in rows] == names
    seconds = {name: float(row[16:].split()[0]) for name, row in zip(names, rows)}
    calls = [row.split("%")[1].strip() for row in rows]
    assert calls == ["1", "5", "6", "", "", "", ""]  # R = 5 on the ring
    parts = sum(seconds[name] for name in names[:-1])
    assert seconds["total"] > 0 and abs(parts - seconds["total"]) < 7 * 1e-4  # as printed
    assert len(measured[0].steps) == 3 and len(own) == bench.SKIPPED + 3
    for step, log in zip(measured[0].steps, own[bench.SKIPPED :]):
        assert all(v >= 0 for v in step.values())
        assert sum(step.values()) - step["total"] == pytest.approx(step["total"])
        assert step["total"] == pytest.approx(log, rel=0.2, abs=0.01)
    # nothing stays hooked
    assert before == (Run.start, Run.steps, Run.update, Run.end_step, torch.Tensor.backward)


@pytest.mark.parametrize("rank", [0, 2], ids=["copies", "adapters"])
def test_networks_that_come_with_their_phase(tmp_path, rank):
    """phased_dmd.py in two phases: a call counts for the expert, fake or teacher that was meant.

    That is so whether experts and fakes are copies of the teacher or adapters on it.
    """
    flags = [*save_tiny_wan(tmp_path), "--guidance_scale", "3", "--fake_update_ratio", "2"]
    flags += f"--phases 2 --train_batch_size 2 --lora_rank {rank} --fake_lora_rank {rank}".split()
    stopwatch = bench.measure("phased_dmd", 3, flags)
    assert list(dict.fromkeys(stopwatch.names.values())) == ["teacher", "expert", "fake"]
    parts = {"teacher", "expert", "fake", "fake update", "student update", "other", "total"}
    assert [set(step) for step in stopwatch.steps] == [parts] * 3
    # all three steps are of the second phase, where the first phase's expert makes the input
    assert stopwatch.calls == [{"teacher": 2, "expert": 4, "fake": 3}] * 3
    for step in stopwatch.steps:
        assert all(v >= 0 for v in step.values())
        assert sum(step.values()) == pytest.approx(2 * step["total"])


def test_every_script_is_among_the_choices_and_has_what_is_hooked():
    """Teachers are frozen and phases begin by the names that bench.py looks for."""
    assert sorted(bench.SCRIPTS) == sorted(path.stem for path in ROOT.glob("*.py"))
    for script in bench.SCRIPTS:
        module = importlib.import_module(script)
        assert hasattr(module, "freeze_teacher") == (script != "latent_fm")
        assert hasattr(module, "start_phase") == (script == "phased_dmd")


def test_too_short_a_run_is_refused():
    with pytest.raises(UserError, match="first 5 steps are not measured"):
        bench.measure("dmd", 3, [*RING, "--max_train_steps", "5"])
