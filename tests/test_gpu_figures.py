"""tests/gpu_figures.py, as far as a machine without a GPU goes."""

import subprocess
import sys

import gpu_figures
import linvideo_speed
import pytest
import torch
from helpers import ENV, ROOT

from kernels import bench_linear_attention
from models.files import save_json


def figures(forward, step, ahead):
    """What the benchmark writes, with these floors, and lengths from which SDPA is behind."""
    rows = [dict(method="sdpa flash", N=gpu_figures.LENGTH, forward_floors=1.0, step_floors=1.0)]
    rows += [
        dict(method="triton", N=N, forward_floors=forward + worse, step_floors=step + worse)
        for N, worse in ((1024, 9.0), (gpu_figures.LENGTH, 0.0))
    ]
    crossover = [
        dict(method=method, H=12, what=what, N=N)
        for method, worse in (("triton", 0), ("torch", 10**6))
        for what, N in zip(("forward", "forward + backward"), ahead)
    ]
    return dict(rows=rows, crossover=crossover)


def test_verdicts():
    """The kernels' own rows at the one length, beside their targets."""
    met = [v[3] for v in gpu_figures.verdicts("hedgehog", figures(1.7, 2.2, (2048, 1024)))]
    assert met == [True] * 4
    found = gpu_figures.verdicts("hedgehog", figures(1.71, 2.3, (4096, None)))
    assert [v[1:] for v in found] == [
        (1.71, 1.7, False),
        (2.3, 2.2, False),
        (4096, 2048, False),
        (None, 2048, False),
    ]
    found = gpu_figures.verdicts("elu", figures(1.4, 1.5, (None, None)))
    assert [v[3] for v in found] == [True, False]
    nothing = gpu_figures.verdicts("softmax", dict(rows=[], crossover=[]))
    assert [v[1:] for v in nothing] == [(None, 1.4, False)] * 2


def test_parts_are_commands_that_exist(monkeypatch, tmp_path):
    """The benchmark takes its flags on a GPU; together the parts fit in a quarter of an hour."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for part in gpu_figures.PARTS:
        python, m, module, *flags = gpu_figures.command(part, tmp_path)
        assert (python, m) == (sys.executable, "-m")
        if module == gpu_figures.BENCH:
            args = bench_linear_attention.parse_args(flags)
            assert args.graph and args.device == "cuda" and args.json.endswith(f"{part}.json")
        if module == "tests.linvideo_speed":
            assert linvideo_speed.parse_args(flags).layers == 4
    assert set(gpu_figures.FLOORS) <= set(gpu_figures.PARTS)
    assert sum(limit for _, limit in gpu_figures.PARTS.values()) <= 13 * 60


def test_selections_find_tests():
    """The two selections of pytest name tests that there are."""
    for part in ("cases", "errors"):
        flags = gpu_figures.PARTS[part][0].split()
        words = [sys.executable, "-m", *flags, "--collect-only", "-n", "0"]
        done = subprocess.run(words, cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0 and "on_a_gpu" in done.stdout, done.stdout[-2000:]
        assert ("test_long_sequences_on_a_gpu" in done.stdout) == (part == "errors")


def test_a_part_that_fails_or_hangs_is_said(monkeypatch, tmp_path, capsys):
    """Its output is kept, and the next part runs."""
    parts = {"bad": ("calendar 9 9 9 9", 30), "slow": ("http.server 0", 1), "good": ("this", 30)}
    monkeypatch.setattr(gpu_figures, "PARTS", parts)
    assert [gpu_figures.run(part, tmp_path) for part in parts] == [False, False, True]
    said = capsys.readouterr().out
    assert "slow: exit code -9, ended after 1 s" in said and "Zen of Python" in said
    assert "Zen of Python" in (tmp_path / "good.log").read_text()


def test_without_a_gpu_it_ends_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as e:
        gpu_figures.main([])
    assert e.value.code == 2 and "no CUDA device here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_figures.ops, "INTERPRET", True)
    with pytest.raises(SystemExit) as e:
        gpu_figures.main([])
    assert e.value.code == 2 and "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_the_table_and_the_exit_code(capsys, monkeypatch, tmp_path):
    """Parts are pretended: one misses a target, one fails, and both are said."""

    def run(part, folder):
        figure = figures(1.0, 2.3 if part == "hedgehog" else 1.0, (1024, 1024))
        save_json(figure, f"{folder}/{part}.json")
        return part != "elu"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(gpu_figures.ops, "triton", True)
    monkeypatch.setattr(gpu_figures, "run", run)
    flags = ["--output_dir", str(tmp_path / "new")]
    assert gpu_figures.main([*flags, "--only", "softmax"]) == 0
    assert gpu_figures.main([*flags, "--only", "softmax", "hedgehog", "elu"]) == 1
    said = capsys.readouterr().out
    assert "| hedgehog, step, floors at 32,760 tokens | 2.3 | 2.2 | not met |" in said
    assert "| hedgehog, forward, floors at 32,760 tokens | 1 | 1.7 | met |" in said
    assert said.rstrip().endswith("new: elu") and "| elu" not in said
