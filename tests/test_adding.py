"""docs/adding.md: its examples run as they stand there. tests/test_networks.py has its network."""

import json
import re
import types

import torch
from helpers import ROOT, read_log, ring_network

from models.plumbing import teachers
from models.worlds.features import FeatureWorld, build_reference


def examples():
    """The fenced Python of the page -> modules, in order: a method, a network, a world."""
    page = (ROOT / "docs" / "adding.md").read_text()
    modules = []
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)):
        module = types.ModuleType(f"example_{i}")
        exec(compile(code, f"docs/adding.md, example {i}", "exec"), module.__dict__)
        modules.append(module)
    assert len(modules) == 3
    return modules


def test_method(tmp_path, monkeypatch):
    """It trains, here from random weights, and what it leaves is complete."""
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    flags = ["--teacher", "ring", "--max_train_steps", "80", "--output_dir", str(tmp_path / "run")]
    examples()[0].main([*flags, "--learning_rate", "1e-2", "--teacher_steps", "4"])
    loss = [float(row["loss"]) for row in read_log(tmp_path / "run")]
    assert len(loss) == 80 and sum(loss[-10:]) < 0.3 * sum(loss[:10])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = {r["name"]: r for r in report["results"]}
    assert rows["student"]["nfe"] == 1 and rows["student"]["accuracy"] > 0.5  # 0.25 is chance
    for name in ("samples.png", "log.csv", "student/config.json", "student/sampler.json", "state"):
        assert (tmp_path / "run" / name).exists()


def test_world():
    """Data are a function of the seed, of the right kind, and all factors show."""
    world = examples()[2].Bars()
    x, label = world.data(400, 3)
    assert isinstance(world, FeatureWorld) and x.shape == (400, *world.shape)
    assert x.dtype == torch.float32 and label.dtype == torch.int64
    assert x.min() >= -1 and x.max() <= 1 and x.std() > 0.3
    assert set(label.tolist()) == set(range(world.num_classes)) == {0, 1}
    again, same = world.data(400, 3)
    assert torch.equal(x, again) and torch.equal(label, same)
    assert not torch.equal(x, world.data(400, 4)[0])
    upright = x[label == 1]
    assert torch.equal(upright, upright[:, :, :1].expand_as(upright))
    assert world.picture(x[:3]).shape == (50, 150, 3)


def test_world_is_measured(tmp_path, monkeypatch):
    """build_reference makes its files, here from few items; `measure` separates data from noise."""
    bars = examples()[2].Bars
    real = bars.data

    def fewer(self, n, seed, label=None):
        return real(self, min(n, 1000), seed, None if label is None else label[:1000])

    monkeypatch.setattr(bars, "data", fewer, raising=False)
    monkeypatch.setattr(bars, "folder", lambda self, name: str(tmp_path / name), raising=False)
    world = bars()
    build_reference(world, steps=30, batch=32, items=500)
    x, label = world.data(300, 5)
    good, bad = world.measure(x, label), world.measure(torch.rand_like(x) * 2 - 1, label)
    assert good["accuracy"] > 0.9 and good["fd"] < 0.1 * bad["fd"]
