"""Muon of models/muon.py: what it computes, and in which precision."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import latent_fm
from models.muon import COEFFICIENTS, Muon, orthogonalise
from models.networks.dit import DiT
from models.plumbing.dry_run import planned
from models.plumbing.run import Run

SHAPES = [(6, 20), (20, 6), (8, 8)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quintic(s, steps=5):
    """What each singular value of a matrix of norm 1 becomes, as a formula."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalise_is_the_formula_on_the_singular_values(shape):
    """In float32 within 1e-5 of the decomposition in float64; bfloat16 is off by more than 1e-3."""
    g = normal(*shape)
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    exact = u @ torch.diag(quintic(s / s.norm())) @ vh
    size = exact.norm()
    assert (orthogonalise(g).double() - exact).norm() < 1e-5 * size
    assert (orthogonalise(g.double()) - exact).norm() < 1e-12 * size
    assert (orthogonalise(g.bfloat16()).double() - exact).norm() > 1e-3 * size
    assert orthogonalise(torch.zeros(shape)).equal(torch.zeros(shape))


def test_singular_values_come_near_one():
    """What the docstring says of five steps; four leave smaller ones behind."""
    s = torch.linspace(0.003, 1, 10001, dtype=torch.float64)
    assert quintic(s).min() > 0.68 and quintic(s).max() < 1.21
    assert quintic(s, 4).min() < 0.68


def pair():
    """The same matrices twice, for ours and for torch's optimiser, which both have these rates."""
    rates = dict(lr=0.05, weight_decay=0.1)
    ours, theirs = ([normal(*s, seed=7).requires_grad_() for s in SHAPES] for _ in range(2))
    return ours, Muon(ours, **rates), theirs, torch.optim.Muon(theirs, **rates)


def update(parameters, optimizer, seed):
    for i, p in enumerate(parameters):
        p.grad = normal(*p.shape, seed=100 * seed + i)
    optimizer.step()


def test_muon_is_torchs_up_to_the_rounding_of_bfloat16():
    """Momentum, Nesterov, decay and the factor of tall matrices, over three updates.

    They agree to 2 % of what three updates change. Decay alone makes up more than 20 % of it.
    """
    ours, optimizer, theirs, reference = pair()
    start = [p.detach().clone() for p in ours]
    for seed in range(3):
        update(ours, optimizer, seed)
        update(theirs, reference, seed)
    for p, q, before in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (q - before).norm()
        assert 3 * 0.05 * 0.1 * before.norm() > 0.2 * (q - before).norm()
    assert {k for s in optimizer.state.values() for k in s} == {"momentum_buffer"}


def test_states_of_torchs_muon_load_into_ours_and_back():
    ours, optimizer, theirs, reference = pair()
    update(theirs, reference, 0)
    optimizer.load_state_dict(reference.state_dict())
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(
            optimizer.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"]
        )
    update(ours, optimizer, 1)
    reference.load_state_dict(optimizer.state_dict())
    assert reference.param_groups[0]["ns_steps"] == 5


class Types(TorchDispatchMode):
    """Which floating types the results of operations have."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.seen.add(x.dtype)
        return out


def test_no_update_on_the_processor_computes_in_bfloat16():
    """Of latent_fm.py's optimisers: most processors only emulate bfloat16, twenty times slower."""
    args = latent_fm.parse_args(["--width", "32", "--depth", "1"])
    net = DiT(size=(4, 4), patch=(2, 2), dim=32, depth=1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizers, _ = latent_fm.build_optimizers(args, net)
    assert len(optimizers) == 2  # Muon and AdamW
    with Types() as types:
        for optimizer in optimizers:
            optimizer.step()
    assert types.seen == {torch.float32}


@pytest.mark.parametrize("name, warned", [("avx2", True), ("avx512_bf16", False), ("bf16", False)])
def test_bfloat16_that_is_only_imitated_is_named(tmp_path, monkeypatch, capsys, name, warned):
    """One line at the start, on a processor without such instructions, if bf16 is asked for."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = SimpleNamespace(
        output_dir=str(tmp_path / "run"),
        train_batch_size=1,
        gradient_accumulation_steps=1,
        sequence_ranks=1,
        max_train_steps=1,
    )
    for precision in ("bf16", "no"):
        args.mixed_precision, args.resume_from_checkpoint = precision, None
        Run(args, "x").open_folder(0)
        told = "no instructions for bfloat16" in capsys.readouterr().out
        assert told == (warned and precision == "bf16")


def test_other_devices_keep_torchs_own(monkeypatch):
    called = []
    monkeypatch.setattr(torch.optim.Muon, "step", lambda self, closure: called.append(self))
    p = torch.nn.Parameter(torch.empty(4, 4, device="meta"))
    optimizer = Muon([p])
    optimizer.step()
    assert called == [optimizer]


def test_dry_run_counts_what_muon_multiplies():
    """The FLOPs that torch counts of one step, on the default run's network; AdamW has none."""
    plans = {}
    for optimizer in ("muon", "adamw"):
        args = latent_fm.parse_args(["--optimizer", optimizer, "--dry_run"])
        plans[optimizer] = planned(args, *latent_fm.cost(args), build=latent_fm.planned_network)
    net = latent_fm.planned_network(args)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    args = latent_fm.parse_args(["--optimizer", "muon"])
    optimizers, _ = latent_fm.build_optimizers(args, net)
    with FlopCounterMode(display=False) as counter:
        for optimizer in optimizers:
            optimizer.step()
    muon = plans["muon"].flops()[0] - plans["adamw"].flops()[0]
    assert muon == counter.get_total_flops() > 0.4 * plans["adamw"].flops()[0]


def test_weights_decay_under_both_optimisers():
    args = latent_fm.parse_args("--optimizer muon --weight_decay 0.3".split())
    net = latent_fm.planned_network(args)
    optimizers, _ = latent_fm.build_optimizers(args, net)
    assert [g["weight_decay"] for o in optimizers for g in o.param_groups] == [0.3, 0.3]


def test_a_closure_is_called_with_gradients():
    """As torch's optimisers do, and those who wrap them (accelerate) ask for."""
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = Muon([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6 and not torch.equal(p, torch.ones(3, 2))
    assert optimizer.step() is None
