"""--lora_rank and --fake_lora_rank: all that is trained are adapters on the teacher's network.

Each script runs a few updates on tiny networks. What the adapters themselves compute, and their
files, is in test_lora.py.
"""

import copy

import pytest
import torch

import decoupled_dmd
import dmd
import tdm
from models.networks import lora
from models.plumbing.run import Run
from tests.helpers import quiet, ring_flags

FAKE = "--lora_rank 2 --fake_lora_rank 2 "
SCRIPTS = {
    "dmd": (dmd, FAKE + "--student_steps 2 --gan_weight 0.1"),
    "decoupled_dmd": (decoupled_dmd, FAKE + "--student_steps 2 --gan_weight 0.1"),
    "tdm": (tdm, FAKE + "--student_steps 2"),
}
every = pytest.mark.parametrize("name", SCRIPTS)


class Watch:
    """A run's networks, and the base as it was before training."""

    def __init__(self, monkeypatch, script):
        real = Run.start

        def start(run, **state):
            real(run, **state)
            self.state = state
            self.base = state["student"].net
            self.before = copy.deepcopy(lora.base_state_dict(self.base))
            self.began = {
                n: copy.deepcopy(m.state_dict())
                for n, m in state.items()
                if not isinstance(m, torch.optim.Optimizer)
            }

        monkeypatch.setattr(Run, "start", start)


def run(monkeypatch, name, folder, *flags, steps=3):
    """A short quiet run on the ring -> its Watch."""
    quiet(monkeypatch)
    script, own = SCRIPTS[name]
    watch = Watch(monkeypatch, script)
    script.main(ring_flags(folder, steps, 8, *own.split(), "--ema_decay", "0.9", *flags))
    return watch


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@every
def test_only_adapters_change(name, tmp_path, monkeypatch):
    """The base stays bit-equal; student, fake, average and head move, and nothing else is trained.

    What is trained has rank (in + out) numbers for each of the three hidden layers.
    """
    watch = run(monkeypatch, name, tmp_path / "run")
    assert equal(lora.base_state_dict(watch.base), watch.before)
    assert not any(p.requires_grad for p in lora.base_parameters(watch.base).values())
    student, ema = watch.state["student"], watch.state["ema"]
    for who, began in watch.began.items():
        assert not equal(watch.state[who].state_dict(), began), who
    assert not equal(student.state_dict(), ema.state_dict())
    for who in ("student", "fake"):
        assert isinstance(watch.state[who], lora.Adapted)
        assert watch.state[who].net is watch.base
        assert sum(p.numel() for p in watch.state[who].parameters()) == 3 * 2 * (32 + 32)
    trained = {id(p) for g in watch.state["optimizer"].param_groups for p in g["params"]}
    assert trained == {id(p) for p in student.parameters()}
