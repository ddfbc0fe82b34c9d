"""phased_dmd.py's runs: who is trained on what in every phase, equality with dmd.py, adapters, Wan 2.2, ranks, crashes, refusals, outputs."""

import copy
import json
import shutil
import signal
import subprocess
import sys
import types
import weakref

import pytest
import torch
from helpers import (
    ENV,
    SUICIDAL,
    assert_bit_equal,
    assert_two_ranks_are_one_process,
    perturbed,
    quiet,
    read_log,
    refusal_of,
    ring_network,
    save_tiny_wan,
    small_dit,
    weights,
    without_time,
)
from PIL import Image
from safetensors.torch import load_file

import dmd
import phased_dmd
from models.diffusion import Flow, expand, shift, step_grid, unshift
from models.draws import Draws
from models.files import load_json, open_tensors, save_json
from models.networks import WEIGHTS, load_network, lora, network_config, save_network
from models.networks.wan import WanTwoNetworks
from models.plumbing import teachers
from models.plumbing.data import Conditions
from models.worlds.measures import energy_distance
from models.worlds.ring import RingTeacher

# ---- the training loop -------------------------------------------------------------------------------------------


class Diary:
    """What a run of phased_dmd.main did: networks as they were made, and in order its turns (calls of the student, what fake and student
    were given) and its updates (gradients before clipping, and all networks of the phase as they were then)."""

    def __init__(self, monkeypatch):
        self.made, self.calls, self.turns, self.updates = {}, [], [], []
        quiet(monkeypatch)
        monkeypatch.setattr(phased_dmd, "marginals", lambda *a: None)
        for name, spy in (
            ("load_base", self.on_base),
            ("trainable_copy", self.on_copy),
            ("student_step", self.on_step),
            ("update", self.on_update),
            ("fake_score_loss", self.on_fake_loss),
            ("guided_x0", self.on_guided),
            ("predict_x0", self.on_predict),
            ("distribution_matching_gradient", self.on_gradient),
        ):
            self.wrap(monkeypatch, name, spy)

    @staticmethod
    def wrap(monkeypatch, name, before):
        real = getattr(phased_dmd, name)
        monkeypatch.setattr(phased_dmd, name, lambda *args, **kwargs: before(real, *args, **kwargs))

    @property
    def phase(self):
        return sum(name.startswith("expert") for name in self.made)

    def on_base(self, real, *args):
        self.teacher = real(*args)
        self.teacher_before = {k: v.clone() for k, v in self.teacher.base.state_dict().items()}
        return self.teacher

    def on_copy(self, real, args, net, name, *rest):
        self.made[name] = real(args, net, name, *rest)
        return self.made[name]

    def on_step(self, real, expert, schedule, kind, x_t, t, t_next, cond):
        x, x0 = real(expert, schedule, kind, x_t, t, t_next, cond)
        name = next(n for n, e in self.made.items() if e is expert)
        self.calls.append(
            types.SimpleNamespace(
                who=name,
                t=t,
                t_next=t_next,
                gradient=torch.is_grad_enabled(),
                x_t=x_t,
                x=x,
                cond=cond,
            )
        )
        return x, x0

    def turn(self, **what):
        self.turns.append(types.SimpleNamespace(phase=self.phase, calls=self.calls, **what))
        self.calls = []

    def on_fake_loss(self, real, fake, schedule, kind, x_s, eps, s, t, cond, target, tapered):
        assert fake is self.made[f"fake{self.phase}"] and not x_s.requires_grad
        self.turn(who="fake", x_s=x_s, eps=eps, s=s, t=t, cond=cond, target=target, tapered=tapered)
        return real(fake, schedule, kind, x_s, eps, s, t, cond, target, tapered)

    def on_guided(self, real, net, schedule, kind, x_t, t, cond, uncond, scale):
        self.teacher_saw = types.SimpleNamespace(
            net=net, x_t=x_t, t=t, cond=cond, uncond=uncond, scale=scale
        )
        return real(net, schedule, kind, x_t, t, cond, uncond, scale)

    def on_predict(self, real, net, schedule, kind, x_t, t, **cond):
        self.fake_saw = types.SimpleNamespace(net=net, x_t=x_t, t=t, cond=cond)
        return real(net, schedule, kind, x_t, t, **cond)

    def on_gradient(self, real, x0, x0_real, x0_fake, schedule, s, t, weight):
        self.turn(
            who="student",
            s=s,
            t=t,
            weight=weight,
            x_s=self.calls[-1].x,
            teacher=self.teacher_saw,
            fake=self.fake_saw,
        )
        return real(x0, x0_real, x0_fake, schedule, s, t, weight)

    def on_update(self, real, optimizers, max_norm, what, loss):
        (optimizer,) = optimizers
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        now = {
            n: e
            for n, e in self.made.items()
            if n.startswith("expert") or n == f"fake{self.phase}" or n == f"ema{self.phase}"
        }
        nets = [self.teacher.net, self.teacher.base, *(e.net for e in now.values())]
        self.updates.append(
            types.SimpleNamespace(
                what=what,
                phase=self.phase,
                rate=optimizer.param_groups[0]["lr"],
                gradients=[p.grad.clone() for p in parameters],
                trains=next(
                    n
                    for n, e in now.items()
                    if list(map(id, e.parameters())) == list(map(id, parameters))
                ),
                strangers=[
                    p
                    for net in nets
                    for p in net.parameters()
                    if p.grad is not None and not any(p is q for q in parameters)
                ],
                nets={n: {k: v.clone() for k, v in e.state_dict().items()} for n, e in now.items()},
            )
        )
        self.updates[-1].norm = real(optimizers, max_norm, what, loss)
        self.updates[-1].after = {
            k: v.clone() for k, v in now[self.updates[-1].trains].state_dict().items()
        }
        return self.updates[-1].norm

    def at(self, update, name):
        """A full network of that name as it was at an update."""
        net = copy.deepcopy(self.made[name].net).requires_grad_(True)
        net.load_state_dict(update.nets[name])
        return net


def run(monkeypatch, folder, *flags, diary=None):
    """A short quiet run on the ring: 4 steps in 2 phases, shift 3, 2 updates a phase with 2 fake updates each, 8 samples a batch."""
    diary = diary or Diary(monkeypatch)
    phased_dmd.main(
        [
            "--teacher",
            "ring",
            "--output_dir",
            str(folder),
            "--max_train_steps",
            "4",
            "--train_batch_size",
            "8",
            "--fake_update_ratio",
            "2",
            "--checkpointing_steps",
            "1000",
            "--max_grad_norm",
            "1e9",
            *flags,
        ]
    )
    return diary


def save_dit(folder, **changes):
    """A tiny DiT with noise on every weight as a --teacher folder, with the flags for a run on it."""
    net = perturbed(small_dit(dim=32, depth=2, **changes))
    save_network(net, network_config(net), str(folder))
    return ["--teacher", str(folder)]


def in_phases(steps=4, phases=2, shifted=3.0):
    """The student's grid, and for every phase the slice of steps it takes: [1, .9, .75, .5, 0], [(0, 2), (2, 4)]."""
    ends = {(4, 1): [4], (4, 2): [2, 4], (4, 4): [1, 2, 3, 4], (3, 2): [2, 3]}[steps, phases]
    return step_grid(steps, shifted), list(zip([0, *ends], ends))


KINDS_OF_EXPERTS = [
    [],
    ["--lora_rank", "2"],
    ["--fake_lora_rank", "2"],
    ["--lora_rank", "2", "--fake_lora_rank", "3"],
]


@pytest.mark.parametrize("flags", KINDS_OF_EXPERTS, ids=" ".join)
@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_turns_and_who_has_gradients(monkeypatch, tmp_path, flags, ema):
    """In every phase R fake updates, then one of its own expert, whatever is an adapter. Nothing else has a gradient, ever; expert 1 is the same
    to the bit all through phase 2, namely its average; the teacher is the same to the bit at the end, without adapters but the experts'."""
    flags = [
        *save_dit(tmp_path / "teacher"),
        "--fake_update_ratio",
        "3",
        "--ema_decay",
        ema,
        *flags,
    ]
    diary = run(monkeypatch, tmp_path / "run", *flags)
    assert [(u.what, u.trains) for u in diary.updates] == [
        (what, f"{name}{k}")
        for k in (1, 1, 2, 2)
        for what, name in [("fake-score", "fake")] * 3 + [("student", "expert")]
    ]
    assert all(not u.strangers and len(u.gradients) == len(u.nets[u.trains]) for u in diary.updates)
    assert all(any(g.any() for g in u.gradients) for u in diary.updates)
    phase_1, phase_2 = ([u for u in diary.updates if u.phase == k] for k in (1, 2))
    before, after = phase_1[-1].nets["expert1"], diary.made["expert1"].state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in after)
    for u in phase_2:
        assert all(torch.equal(u.nets["expert1"][k], after[k]) for k in after)
    assert not any(
        p.requires_grad for e in ("expert1", "expert2") for p in diary.made[e].parameters()
    )
    base = lora.base_state_dict(diary.teacher.base)
    assert base.keys() == diary.teacher_before.keys() and all(
        torch.equal(v, diary.teacher_before[k]) for k, v in base.items()
    )
    assert lora.names(diary.teacher.base) == (
        ["expert1", "expert2"] if "--lora_rank" in flags else []
    )


@pytest.mark.parametrize("init", ["teacher", "previous"])
@pytest.mark.parametrize("flags", KINDS_OF_EXPERTS[:2], ids=" ".join)
def test_what_a_phase_starts_from(monkeypatch, tmp_path, init, flags):
    """Every phase has a new fake, which is the teacher's function whatever step it is told, and a new expert: the teacher's function too, or with
    --expert_init previous the weights of the expert before. Its average starts where it does."""
    diary = run(
        monkeypatch,
        tmp_path / "run",
        *save_dit(tmp_path / "teacher"),
        "--expert_init",
        init,
        "--ema_decay",
        "0.9",
        *flags,
    )
    net = load_network(str(tmp_path / "teacher"))[0]
    x, t, label = torch.randn(6, 2, 6, 4), torch.linspace(0.1, 1, 6), torch.arange(6) % 4
    first = [next(u for u in diary.updates if u.phase == k) for k in (1, 2)]
    for k, update in zip((1, 2), first):
        fake = diary.at(update, f"fake{k}")
        assert torch.equal(fake(x, t, label, steps=torch.arange(6) % 3), net(x, t, label))
        start = update.nets[f"expert{k}"]
        assert all(torch.equal(start[key], v) for key, v in update.nets[f"ema{k}"].items())
        if k == 2 and init == "previous":
            assert all(torch.equal(start[key], v) for key, v in update.nets["expert1"].items())
        elif flags:
            assert all(not v.any() for key, v in start.items() if key.endswith(".B")) and any(
                v.any() for key, v in start.items() if key.endswith(".A")
            )
        else:
            assert all(torch.equal(start[key], v) for key, v in net.state_dict().items())
    assert first[0].nets["expert1"].keys() == first[1].nets["expert2"].keys()
    last = [u for u in diary.updates if u.phase == 1][-1].nets[
        "fake1"
    ]  # it had moved away from the teacher
    assert any(not torch.equal(last[key], v) for key, v in first[0].nets["fake1"].items())


def calls_of_a_turn(turn, first, steps, phases, no_truncation=False):
    """[(expert, t, t_next, with gradient)] that a turn of this phase must have made for a sample whose last step, or first one with gradient,
    is the first-th of the grid."""
    grid, slices = in_phases(steps, phases)
    (_, end), student = slices[turn.phase - 1], turn.who == "student"
    before = [
        (
            f"expert{next(k for k, (_, e) in enumerate(slices) if i < e) + 1}",
            grid[i],
            grid[i + 1],
            False,
        )
        for i in range(first)
    ]
    last = (
        [(grid[i], grid[i + 1]) for i in range(first, end)]
        if no_truncation
        else [(grid[first], grid[end])]
    )
    return before + [(f"expert{turn.phase}", a, b, student) for a, b in last]


def test_student_init(monkeypatch, tmp_path, capsys):
    """--student_init: every expert starts at that network, the fakes at the teacher; refused for adapters and for other shapes."""
    flags = save_dit(tmp_path / "teacher")
    other = perturbed(small_dit(dim=32, depth=2), seed=7)
    save_network(other, network_config(other), str(tmp_path / "other"))
    diary = run(monkeypatch, tmp_path / "run", *flags, "--student_init", str(tmp_path / "other"))
    for k in (1, 2):
        first = next(u for u in diary.updates if u.phase == k)
        assert_bit_equal(first.nets[f"expert{k}"], dict(other.state_dict()))
        assert_bit_equal(
            {n: v for n, v in first.nets[f"fake{k}"].items() if not n.startswith("steps.")},
            diary.teacher_before,
        )
    monkeypatch.undo()
    refuse = lambda *more: refusal_of(
        capsys, phased_dmd.main, *flags, "--output_dir", str(tmp_path / "no"), *more
    )  # noqa: E731
    assert "starts full experts, not adapters: give --lora_rank 0" in refuse(
        "--student_init", str(tmp_path / "other"), "--lora_rank", "4"
    )
    wrong = small_dit(dim=64, depth=2)
    save_network(wrong, network_config(wrong), str(tmp_path / "wrong"))
    assert "does not have the shapes" in refuse("--student_init", str(tmp_path / "wrong"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "steps, phases, flags",
    [
        (4, 2, []),
        (4, 4, []),
        (3, 2, []),
        (4, 1, []),
        (4, 1, ["--no_truncation"]),
        (4, 2, ["--no_truncation"]),
    ],
)
def test_samples_are_the_experts_own(monkeypatch, tmp_path, steps, phases, flags):
    """Fake and student train on the same samples: noise, all steps of the frozen experts, some of the phase's own, and a last one that jumps to
    the phase's end s. One call of a student's update is recorded, or with --no_truncation all of the phase (N with one phase); none of
    a fake's. The last step j stays in its phase and takes all values there; with a step per phase nothing is left to chance."""
    diary = run(
        monkeypatch,
        tmp_path,
        "--student_steps",
        str(steps),
        "--phases",
        str(phases),
        "--max_train_steps",
        "12",
        *flags,
    )
    last = [set() for _ in range(phases)]
    slices = in_phases(steps, phases)[1]
    assert [turn.who for turn in diary.turns] == ["fake", "fake", "student"] * 12
    for i, turn in enumerate(diary.turns):
        begin, end = slices[turn.phase - 1]
        first = begin if flags else len(turn.calls) - 1
        assert begin <= first < end
        last[turn.phase - 1].add(first - begin)
        assert [(c.who, c.t, c.t_next, c.gradient) for c in turn.calls] == calls_of_a_turn(
            turn, first, steps, phases, bool(flags)
        )
        recorded = [c for c in turn.calls if c.x.requires_grad]
        assert len(recorded) == (0 if turn.who == "fake" else end - begin if flags else 1)
        draw = Draws(0, i // 3, "student" if turn.who == "student" else i % 3, range(8))
        z, label = draw.normal("z", (2,)), draw.integer("cond", 4)
        for call, x in zip(
            turn.calls, [z, *(c.x for c in turn.calls)]
        ):  # each call goes on from the one before, under one label
            assert (
                torch.equal(call.x_t, x)
                and torch.equal(call.cond["label"], label)
                and set(call.cond) == {"label"}
            )
        assert torch.equal(turn.x_s, turn.calls[-1].x)
    assert last == [{0} if flags else set(range(e - b)) for b, e in slices]


@pytest.mark.parametrize("phases", [1, 2, 4])
def test_noise_levels(monkeypatch, tmp_path, phases):
    """Scores are taken on (s, 1), nested: raw u in (u_end, 1), all of it for the fake, the --dm_range share of it for the student, evenly.
    Teacher, guided, and fake, not guided, see x_t = a x_s + b eps with the x_s, and the s, of that phase."""
    diary = run(
        monkeypatch,
        tmp_path,
        "--phases",
        str(phases),
        "--max_train_steps",
        "16",
        "--train_batch_size",
        "16",
        "--dm_range",
        "0.3",
        "0.6",
        "--fake_update_ratio",
        "1",
        "--guidance_scale",
        "2",
    )
    grid, slices = in_phases(4, phases)
    for k, (_, end) in enumerate(slices, start=1):
        s, u_end = grid[end], 1 - end / 4
        for who in ("fake", "student"):
            turns = [
                (i, turn)
                for i, turn in enumerate(diary.turns)
                if turn.phase == k and turn.who == who
            ]
            share = (unshift(torch.cat([turn.t for _, turn in turns]).double(), 3) - u_end) / (
                1 - u_end
            )
            low, high = (0.3, 0.6) if who == "student" else (1e-3 if s else 0.0, 1.0)
            assert low - 1e-5 < share.min() < low + 0.05 and high - 0.05 < share.max() < high + 1e-5
            assert abs(share.mean() - (low + high) / 2) < 0.04 and len(share) == 16 * 16 // phases
            for i, turn in turns:
                assert torch.equal(turn.s, torch.full((16,), s)) and (turn.t > turn.s).all()
                eps = Draws(0, i // 2, "student" if who == "student" else 0, range(16)).normal(
                    "eps", (2,)
                )
                if who == "fake":
                    assert torch.equal(turn.eps, eps)
                    continue
                a = (1 - turn.t) / (1 - s)
                x_t = a[:, None] * turn.x_s + (turn.t**2 - (a * s) ** 2).sqrt()[:, None] * eps
                for saw in (turn.teacher, turn.fake):
                    torch.testing.assert_close(saw.x_t, x_t, rtol=1e-4, atol=1e-5)
                    assert torch.equal(saw.t, turn.t) and not saw.x_t.requires_grad
                assert (
                    turn.teacher.net is diary.teacher.net
                    and turn.fake.net is diary.made[f"fake{k}"]
                    and turn.teacher.scale == 2
                )
                assert (
                    torch.equal(turn.teacher.cond["label"], turn.calls[0].cond["label"])
                    and (turn.teacher.uncond["label"] == 4).all()
                )
                assert torch.equal(turn.fake.cond["label"], turn.calls[0].cond["label"])


def expected_gradients(diary, update, step, inner, phases, flags):
    """The gradients of an update written out once more from its draws and the networks as they were."""
    (grid, slices), k = in_phases(4, phases), update.phase
    (begin, end), student = slices[k - 1], update.what == "student"
    s, u_end = grid[end], 1 - end / 4
    nets = {name: diary.at(update, name) for name in update.nets}
    draw = Draws(0, step, "student" if student else inner, range(8))
    x, eps, label = draw.normal("z", (2,)), draw.normal("eps", (2,)), draw.integer("cond", 4)
    truncated = "--no_truncation" not in flags
    first = begin + draw.agreed("k", end - begin) if truncated else begin

    def step_of(name, x, t, t_next):
        v = nets[name](x, torch.full((8,), t), label)
        return x + (t_next - t) * v, x - t * v

    with torch.no_grad():
        for i in range(first):
            x, _ = step_of(
                f"expert{next(k for k, (_, e) in enumerate(slices) if i < e) + 1}",
                x,
                grid[i],
                grid[i + 1],
            )
    with torch.set_grad_enabled(student):
        for i in range(first, first + 1 if truncated else end):
            x, x0 = step_of(f"expert{k}", x, grid[i], s if truncated else grid[i + 1])
    u = draw.spread("u", 0.02, 0.98) if student else draw.spread("u", 1e-3 if s else 0.0, 1.0)
    u = u_end + (1 - u_end) * u
    t = 3 * u / (1 + 2 * u)
    a = (1 - t) / (1 - s)
    b = (t**2 - (a * s) ** 2).sqrt()
    x_t = (expand(a, x) * x + expand(b, x) * eps).detach()
    told = (
        {}
        if "--shared_fake" in flags or not truncated or end - begin == 1
        else {"steps": torch.full((8,), float(first - begin))}
    )
    v_fake = nets[f"fake{k}"](x_t, t, label, **told)
    if not student:
        y = (
            eps - x
            if "naive" in flags
            else expand((t + (1 - t) * s**2 / (1 - s) ** 2) / b, x) * eps - x / (1 - s)
        )
        weight = (
            (10 * b**2).clamp_max(1)
            if "all" in flags or s and "none" not in flags
            else torch.ones(8)
        )
        loss = (weight * (v_fake - y).square().mean(1)).mean()
        return torch.autograd.grad(loss, list(nets[f"fake{k}"].parameters()))
    v_real = RingTeacher()(x_t, t, label)
    if "paper" in flags:
        g = expand((1 - t) ** 2 / (t * (1 - s)), x) * (v_real - v_fake)
    else:
        x0_real = x_t - expand(t, x) * v_real
        g = expand(t, x) * (v_real - v_fake) / (x0 - x0_real).abs().mean(1, keepdim=True)
    return torch.autograd.grad(
        (g.detach() * x).sum() / x.numel(), list(nets[f"expert{k}"].parameters())
    )


@pytest.mark.parametrize(
    "phases, flags",
    [
        (2, []),
        (2, ["--target", "naive"]),
        (2, ["--taper", "all"]),
        (2, ["--taper", "none"]),
        (2, ["--dmd_weight", "paper"]),
        (2, ["--shared_fake"]),
        (2, ["--no_truncation"]),
        (1, ["--no_truncation"]),
        (1, []),
        (4, []),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_gradients_in_the_loop(monkeypatch, tmp_path, phases, flags):
    """What reaches the weights of fake (Eq. 11, 13) and expert (Eq. 10) in every update of a real run, each flag with the formula it stands for."""
    diary = run(monkeypatch, tmp_path, "--phases", str(phases), *flags)
    assert len(diary.updates) == 12
    for i, update in enumerate(diary.updates):
        want = expected_gradients(diary, update, i // 3, i % 3, phases, flags)
        scale = torch.stack([g.norm() for g in want]).norm()
        difference = torch.stack([(a - b).norm() for a, b in zip(update.gradients, want)]).norm()
        assert len(want) == len(update.gradients) and scale > 1e-4 and difference < 1e-4 * scale, (
            i,
            difference / scale,
        )
    turns = [turn for turn in diary.turns if turn.who == "fake"]
    told = "--shared_fake" not in flags and "--no_truncation" not in flags and phases < 4
    assert all(("steps" in turn.cond) == told for turn in turns)
    assert load_network(str(tmp_path / "student" / "expert1"))[1]["steps_cond"] is False


@pytest.mark.parametrize("flags", KINDS_OF_EXPERTS[:2], ids=" ".join)
def test_rates_and_averages_start_again_in_every_phase(monkeypatch, tmp_path, flags):
    """Warm-up and decay of both rates, and the window of the average, are those of a phase of its own; each expert is frozen, and saved, as its
    average, (1 + n) / (4 + n) wide at first. So is what is saved and shown on the way, where later phases are still the teacher's."""
    saved, shown = [], []

    def names(experts):
        return [
            next(
                (n for n, e in diary.made.items() if e is x),
                "teacher" if x.net is diary.teacher.base and not x.adapter else None,
            )
            for x in experts
        ]

    def on_save(real, args, experts, *rest):
        saved.append(names(experts))
        return real(args, experts, *rest)

    def on_sampler(real, args, experts, *rest):
        shown.append(names(experts))
        return real(args, experts, *rest)

    diary = Diary(monkeypatch)
    (
        diary.wrap(monkeypatch, "save_student", on_save),
        diary.wrap(monkeypatch, "student_sampler", on_sampler),
    )
    run(
        monkeypatch,
        tmp_path,
        "--max_train_steps",
        "8",
        "--fake_update_ratio",
        "1",
        "--lr_warmup_steps",
        "2",
        "--lr_decay_share",
        "0.5",
        "--learning_rate",
        "1e-2",
        "--learning_rate_fake",
        "3e-2",
        "--ema_decay",
        "0.3",
        *flags,
        diary=diary,
    )
    assert saved == [["ema1"], ["expert1", "ema2"], ["expert1", "expert2"]]
    assert shown == [
        ["ema1", "ema1", "teacher", "teacher"],
        ["expert1", "expert1", "ema2", "ema2"],
        ["expert1", "expert1", "expert2", "expert2"],
    ]
    for what, rate in (("student", 1e-2), ("fake-score", 3e-2)):
        assert [u.rate for u in diary.updates if u.what == what] == pytest.approx(
            [rate * f for f in (0.5, 1, 1, 0.5)] * 2
        )
    for k in (1, 2):
        updates = [u for u in diary.updates if u.what == "student" and u.phase == k]
        want = updates[0].nets[f"expert{k}"]
        for decay, update in zip((0.25, 0.3, 0.3, 0.3), updates):
            want = {key: decay * v + (1 - decay) * update.after[key] for key, v in want.items()}
        frozen = diary.made[f"expert{k}"].state_dict()
        assert all(not torch.equal(v, updates[-1].after[key]) for key, v in frozen.items())
        for key, v in want.items():
            torch.testing.assert_close(frozen[key], v, rtol=1e-5, atol=1e-6)
        if flags:  # alpha / rank = 4 is multiplied into the file's B
            lora.load(
                net := ring_network(), "saved", str(tmp_path / "student" / f"expert{k}.safetensors")
            )
            frozen = {key: 4 * v if key.endswith(".B") else v for key, v in frozen.items()}
            saved = lora.state_dict(net, "saved")
        else:
            saved = load_network(str(tmp_path / "student" / f"expert{k}"))[0].state_dict()
        assert saved.keys() == frozen.keys() and all(
            torch.equal(v, saved[key]) for key, v in frozen.items()
        )


def test_accumulation_is_a_larger_batch(monkeypatch, tmp_path):
    """Two micro-batches of 8 are one batch of 16: the same rows are drawn and the same gradients result."""
    one = run(monkeypatch, tmp_path / "one", "--train_batch_size", "16")
    monkeypatch.undo()
    two = run(monkeypatch, tmp_path / "two", "--gradient_accumulation_steps", "2")
    assert [u.norm for u in one.updates] == pytest.approx([u.norm for u in two.updates], rel=1e-3)
    assert len(one.updates) == len(two.updates) == 12 and 2 * len(one.turns) == len(two.turns)


@pytest.mark.parametrize("flags", KINDS_OF_EXPERTS[:2], ids=" ".join)
def test_low_precision(monkeypatch, tmp_path, flags):
    """Under autocast every weight of the expert still gets its gradient, also where weights were cast in the rollout without gradient before,
    and it is float32's up to rounding (of two scores that are still close, so generously)."""
    flags = [*save_dit(tmp_path / "teacher"), "--max_grad_norm", "1e9", *flags]
    diaries = []
    for precision in ("no", "bf16"):
        diaries.append(
            run(monkeypatch, tmp_path / precision, *flags, "--mixed_precision", precision)
        )
        monkeypatch.undo()
    for a, b in zip(*(d.updates[:3] for d in diaries)):
        norm = torch.stack([g.norm() for g in a.gradients]).norm()
        assert (
            1e-3 * norm
            < torch.stack([(g - h).norm() for g, h in zip(a.gradients, b.gradients)]).norm()
            < 0.4 * norm
        )
    for update in diaries[1].updates:
        assert (
            all(g.dtype == torch.float32 for g in update.gradients)
            and sum(bool(g.any()) for g in update.gradients) >= len(update.gradients) / 2
        )


# ---- equality with dmd.py ------------------------------------------------------------------------------------------


def first_gradients(monkeypatch, script, folder, *flags):
    """The gradients, before clipping, of a run's updates in order, each as one vector: R of the fake, then the student's, and so on."""
    quiet(monkeypatch)
    if script is phased_dmd:
        monkeypatch.setattr(phased_dmd, "marginals", lambda *a: None)
    seen, real = [], torch.nn.utils.clip_grad_norm_

    def on_clip(parameters, max_norm):
        seen.append(torch.cat([p.grad.flatten() for p in parameters]))
        return real(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", on_clip)
    script.main(
        [
            "--teacher",
            "ring",
            "--output_dir",
            str(folder),
            "--max_train_steps",
            "3",
            "--train_batch_size",
            "8",
            "--fake_update_ratio",
            "2",
            "--timestep_shift",
            "3",
            "--seed",
            "5",
            "--guidance_scale",
            "1.5",
            *flags,
        ]
    )
    monkeypatch.undo()
    return seen


def difference(a, b):
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("steps, shared", [(1, False), (3, False), (3, True), (4, True)])
def test_one_phase_is_dmd(monkeypatch, tmp_path, steps, shared):
    """With one phase the script is dmd.py with Euler rollouts, draw by draw: the same gradients of fake and student, first and later. The gradient
    through all steps is another, and so is DMD2's own re-noising rollout."""
    both = ["--student_steps", str(steps), *(["--shared_fake"] if shared else [])]
    want = first_gradients(monkeypatch, dmd, tmp_path / "dmd", *both, "--renoise", "ode")
    got = first_gradients(monkeypatch, phased_dmd, tmp_path / "phased", *both, "--phases", "1")
    assert len(want) == len(got) == 9
    assert difference(want[0], got[0]) < 1e-5 and all(
        difference(a, b) < 1e-3 for a, b in zip(want, got)
    )
    assert difference(want[2], got[2]) < 2e-5
    if steps > 1:
        vanilla = first_gradients(
            monkeypatch, phased_dmd, tmp_path / "vanilla", *both, "--phases", "1", "--no_truncation"
        )
        sde = first_gradients(monkeypatch, dmd, tmp_path / "sde", *both)
        assert (
            max(difference(want[i], vanilla[i]) for i in (2, 5, 8)) > 0.1
            and max(difference(want[i], sde[i]) for i in (0, 1, 3, 4)) > 0.1
        )


# ---- what a run leaves -----------------------------------------------------------------------------------------------

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
    "--lr_decay_share",
    "0",
    "--lr_warmup_steps",
    "0",
]
TEACHERS = {
    "full": dict(),
    "lora": dict(size=(4, 4, 4), patch=(2, 2, 2)),
}  # images (2, 6, 4), and videos (2, 4, 4, 4)
EXPERTS = {
    "full": ["--ema_decay", "0.5"],
    "lora": [
        "--ema_decay",
        "0.5",
        "--lora_rank",
        "2",
        "--fake_lora_rank",
        "2",
        "--lora_alpha",
        "3",
    ],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """-> {kind: namespace(flags, folder)} of two whole runs of 6 updates: full experts, adapters on a teacher of videos."""
    out = {}
    for kind in EXPERTS:
        root = tmp_path_factory.mktemp(kind)
        flags = [*SHORT, *save_dit(root / "teacher", **TEACHERS[kind]), *EXPERTS[kind]]
        phased_dmd.main([*flags, "--output_dir", str(root / "run")])
        out[kind] = types.SimpleNamespace(
            flags=flags, folder=root / "run", teacher=root / "teacher"
        )
    return out


both_kinds = pytest.mark.parametrize("kind", list(EXPERTS))


@both_kinds
def test_files_of_a_run(finished, kind):
    """student/ has an expert per phase, as networks in the teacher's own layout or as adapter files, and sampler.json, which ties them to their
    grid; the log tells the phase; without a world the report has no rows and the samples are kept as latents; videos leave a GIF."""
    folder = finished[kind].folder
    names = (
        ["expert1", "expert2"] if kind == "full" else ["expert1.safetensors", "expert2.safetensors"]
    )
    assert sorted(p.name for p in (folder / "student").iterdir()) == [*names, "sampler.json"]
    outputs = {
        "student",
        "state",
        "samples.png",
        "samples.safetensors",
        "log.csv",
        "report.json",
    } | ({"samples.gif"} if kind == "lora" else set())
    assert {p.name for p in folder.iterdir()} == outputs
    sampler = load_json(str(folder / "student" / "sampler.json"))
    assert (
        sampler["times"] == [1.0, 0.75, 0.5, 0.25]
        and sampler["phase_ends"] == [0.5, 0.0]
        and sampler["timestep_shift"] == 1
    )
    assert [(e["weights"], e["steps"], e["t"], e["network"]) for e in sampler["experts"]] == [
        (names[0], 2, [1.0, 0.5], None),
        (names[1], 2, [0.5, 0.0], None),
    ]
    assert (
        sampler["method"],
        sampler["rule"],
        sampler["guidance_scale"],
        sampler["prediction"],
    ) == ("phased_dmd", "euler", 1.0, "flow_v")
    net = load_network(str(finished[kind].teacher))[0]
    size = sum(p.numel() for p in net.parameters())
    if kind == "lora":
        size = sum(v.numel() for v in load_file(folder / "student" / names[0]).values())
        with open_tensors(str(folder / "student" / names[1])) as f:
            header = f.metadata()
        assert (header["rank"], header["alpha"], header["expert"], header["times"]) == (
            "2",
            "3",
            "2 of 2",
            "1 0.75 0.5 0.25 0",
        )
        assert Image.open(folder / "samples.gif").n_frames == 4
    else:
        assert json.loads(
            (folder / "student" / names[0] / "config.json").read_text()
        ) == json.loads((finished[kind].teacher / "config.json").read_text())
    report = load_json(str(folder / "report.json"))
    assert (
        report["method"] == "phased_dmd"
        and report["results"] == []
        and report["params"] == 2 * size
        and report["steps"] == 6
    )
    assert load_file(folder / "samples.safetensors")["x0"].shape == (3, *net.latent_shape)
    assert Image.open(folder / "samples.png").size[0] > 10
    log = read_log(folder)
    assert [(int(r["step"]), int(r["phase"])) for r in log] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
        (6, 2),
    ]
    assert all(float(v) == float(v) for r in log for v in r.values())


def saved_experts(folder, *bases):
    """The two experts of a run, adapters on copies of these networks (one for both, or one each), as functions of x, t and condition."""
    if (folder / "student" / "expert1").is_dir():
        return tuple(load_network(str(folder / "student" / f"expert{k}"))[0] for k in (1, 2))
    nets = [copy.deepcopy(bases[0]), copy.deepcopy(bases[-1])]
    for k, net in enumerate(nets, start=1):
        lora.load(net, f"expert{k}", str(folder / "student" / f"expert{k}.safetensors"))
    return tuple(phased_dmd.Expert(net, f"expert{k}") for k, net in enumerate(nets, start=1))


SAMPLING = """
import sys
import torch
torch.set_num_threads(1)
import phased_dmd
for run in sys.argv[1:]:
    phased_dmd.main(["--sample", run, "--output_dir", run + "-samples", "--preview_samples", "3", "--train_batch_size", "4"])
"""


def test_sampling_in_a_new_process(finished, tmp_path):
    """--sample needs the student, and for adapters the teacher's folder: another process draws what the run showed of its experts."""
    runs = {kind: shutil.copytree(finished[kind].folder, tmp_path / kind) for kind in EXPERTS}
    fresh = subprocess.run(
        [sys.executable, "-c", SAMPLING, *map(str, runs.values())],
        capture_output=True,
        text=True,
        env=ENV,
        cwd=tmp_path,
    )
    assert fresh.returncode == 0, fresh.stderr
    for kind, folder in runs.items():
        ours, again = (
            load_file(f"{path}/samples.safetensors")["x0"] for path in (folder, f"{folder}-samples")
        )
        torch.testing.assert_close(ours, again, rtol=1e-4, atol=1e-5)
        assert (tmp_path / f"{kind}-samples" / "samples.png").is_file() and (
            tmp_path / f"{kind}-samples" / "samples.gif"
        ).is_file() == (kind == "lora")
        net = load_network(str(finished[kind].teacher))[0]
        trained = saved_experts(folder, net)
        z = Draws(0, "evaluation", 0, range(3)).normal("z", net.latent_shape)
        for one, two in (
            (net, net),
            (trained[0], net),
            (net, trained[1]),
            trained,
        ):  # each expert matters, in its steps
            x = phased_dmd.sample(
                [one, one, two, two],
                Flow(),
                "flow_v",
                z,
                [1.0, 0.75, 0.5, 0.25],
                {"label": torch.arange(3)},
            )
            assert ((x - ours).abs().max() < 1e-4) == ((one, two) == trained)


def test_report_and_marginals_of_a_world(monkeypatch, tmp_path):
    """report.json's rows: calls counted with guidance, and the student's has for every step of its grid how far its states are from noised data."""
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    phased_dmd.main(
        [
            "--teacher",
            "ring",
            "--output_dir",
            str(tmp_path / "run"),
            "--max_train_steps",
            "2",
            "--train_batch_size",
            "8",
            "--teacher_steps",
            "4",
            "--guidance_scale",
            "2",
            "--fake_update_ratio",
            "1",
            "--lora_rank",
            "2",
            "--seed",
            "3",
        ]
    )
    report = load_json(str(tmp_path / "run" / "report.json"))
    rows = {r["name"]: r for r in report["results"]}
    assert {n: r["nfe"] for n, r in rows.items()} == {
        "data": 0,
        "teacher": 14,
        "teacher_same_steps": 8,
        "student": 4,
    }
    assert {
        "fd",
        "fd_excess",
        "fd_teacher",
        "patch_swd",
        "accuracy",
        "diversity",
        "ms_per_sample",
    } <= set(rows["student"])
    assert list(rows["student"]["marginals"]) == ["0.9", "0.75", "0.5", "0"] and not any(
        "marginals" in rows[n] for n in ("data", "teacher")
    )
    assert (
        rows["student"]["marginals"]["0"] > 0.03 > rows["student"]["marginals"]["0.9"] > 0
    )  # untrained, and nearly noise
    assert not (tmp_path / "run" / "samples.safetensors").exists()
    # --sample fits the network that the adapters belong on again, from the run's seed, while --seed is that of the noise
    phased_dmd.main(
        [
            "--sample",
            str(tmp_path / "run"),
            "--output_dir",
            str(tmp_path / "samples"),
            "--seed",
            "4",
        ]
    )
    one, two = saved_experts(tmp_path / "run", ring_network(3))
    z = Draws(4, "evaluation", 0, range(400)).normal("z", (2,))
    x = phased_dmd.sample(
        [one, one, two, two],
        Flow(),
        "flow_v",
        z,
        step_grid(4, 3.0)[:-1],
        {"label": torch.arange(400) % 4},
    )
    torch.testing.assert_close(
        load_file(tmp_path / "samples" / "samples.safetensors")["x0"], x, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(2,), (2, 8, 8), (1, 8, 8, 8)])
def test_marginals_are_energy_distances_to_noised_data(shape):
    """Of the sampler's own states, step by step, to data of the same labels noised by the schedule; images and videos in 4 cells an axis."""

    def velocity(scale):
        return lambda x, t, label: scale * x + 0 * expand(t, x)

    data = torch.randn(64, *shape, generator=torch.Generator().manual_seed(1))
    world = types.SimpleNamespace(data=lambda n, seed, index: (data[:n], index))
    args, conditions = (
        types.SimpleNamespace(seed=3),
        Conditions(types.SimpleNamespace(prompts=None), ring_network()),
    )
    teacher = types.SimpleNamespace(schedule=Flow(), prediction="flow_v")
    grid = step_grid(2, 3.0)  # 1, .75, 0
    got = phased_dmd.marginals(
        args, [velocity(0.5), velocity(1.5)], teacher, world, conditions, shape, grid, "cpu", n=64
    )
    x = Draws(3, "evaluation", 0, range(64)).normal("z", shape)
    for i, scale, t_next in ((0, 0.5, 0.75), (1, 1.5, 0.0)):
        x = x + (t_next - grid[i]) * scale * x
        noised = (1 - t_next) * data + t_next * Draws(3, "marginals", i, range(64)).normal(
            "eps", shape
        )
        a, b = x, noised
        for axis in range(2, len(shape) + 1):  # pairs of neighbours, 8 -> 4
            a, b = (v.unflatten(axis, (4, 2)).mean(axis + 1) for v in (a, b))
        assert got[f"{t_next:g}"] == pytest.approx(
            energy_distance(a.flatten(1), b.flatten(1)), rel=1e-4
        )
    assert len(got) == 2


# ---- what is refused -------------------------------------------------------------------------------------------------


def refusal(capsys, out, *flags):
    """The line for a wrong input, and nothing may have been written to --output_dir."""
    error = refusal_of(capsys, phased_dmd.main, *flags, "--output_dir", str(out))
    assert not out.exists()
    return error


@both_kinds
@pytest.mark.parametrize(
    "flags, says",
    [
        (
            ["--student_steps", "8"],
            "--student_steps 8: these experts were trained for 4, on the steps 1, 0.75, 0.5, 0.25",
        ),
        (["--phases", "1"], "--phases 1: these experts were trained for 2"),
        (["--timestep_shift", "3"], "--timestep_shift 3: these experts were trained for 1"),
    ],
)
def test_sampler_refuses_another_grid(finished, tmp_path, capsys, kind, flags, says):
    """Experts know the steps they were trained at and no others."""
    assert says in refusal(capsys, tmp_path / "out", "--sample", str(finished[kind].folder), *flags)


@both_kinds
def test_sampler_takes_its_own_grid(finished, tmp_path, kind):
    """Naming the grid that the experts have is no error."""
    phased_dmd.main(
        [
            "--sample",
            str(finished[kind].folder),
            "--student_steps",
            "4",
            "--phases",
            "2",
            "--timestep_shift",
            "1",
            "--preview_samples",
            "1",
            "--output_dir",
            str(tmp_path / "out"),
        ]
    )
    assert (tmp_path / "out" / "samples.png").is_file()


@both_kinds
def test_unfinished_and_foreign_students_are_refused(finished, tmp_path, capsys, kind):
    """An expert that is missing or damaged, adapters on a base they do not fit, students of other scripts and ours given to them, an --output_dir
    that is a run, a shape the network does not take: one line each."""
    run = shutil.copytree(finished[kind].folder, tmp_path / "run")
    student, out = run / "student", tmp_path / "out"
    assert "is a run with samples of its own" in refusal_of(
        capsys, phased_dmd.main, "--sample", str(run), "--output_dir", str(run)
    )
    assert "--sample_shape 1 4 4" in refusal(
        capsys, out, "--sample", str(run), "--sample_shape", "1", "4", "4"
    )
    says = refusal_of(capsys, dmd.main, "--sample", str(run), "--output_dir", str(out))
    assert "was made by phased_dmd: sample it with python phased_dmd.py --sample" in says
    if kind == "lora":
        other = perturbed(small_dit(dim=64, depth=2, **TEACHERS[kind]))
        save_network(other, network_config(other), str(tmp_path / "other"))
        says = refusal(capsys, out, "--sample", str(run), "--teacher", str(tmp_path / "other"))
        assert (
            "this network takes" in says
            and f"the adapters belong on {finished[kind].teacher}, name it with --teacher" in says
        )
        assert "neither an embedded world" in refusal(
            capsys, out, "--sample", str(run), "--teacher", str(tmp_path / "moved")
        )
    else:
        assert "are full networks and need none" in refusal(
            capsys, out, "--sample", str(run), "--teacher", "ring"
        )
    last = student / ("expert2" if kind == "full" else "expert2.safetensors")
    weights_file = last / WEIGHTS if kind == "full" else last
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    assert "is truncated or not a safetensors file" in refusal(capsys, out, "--sample", str(run))
    shutil.rmtree(last) if kind == "full" else last.unlink()
    assert f"lacks {last.name}: its training ended before that phase; resume it" in refusal(
        capsys, out, "--sample", str(run)
    )
    sampler = load_json(str(student / "sampler.json"))
    save_json({**sampler, "method": "dmd"}, str(student / "sampler.json"))
    assert "was made by dmd: sample it with python dmd.py --sample" in refusal(
        capsys, out, "--sample", str(run)
    )


def test_adapters_of_one_network_and_of_two(finished, tmp_path, capsys):
    """Adapters of a single network are refused on a two-network teacher and the other way round, in words."""
    (tmp_path / "two").mkdir(), (tmp_path / "one").mkdir()
    flags = save_tiny_wan(tmp_path / "two", boundary=0.875)
    one = save_tiny_wan(tmp_path / "one")
    for name, teacher, base in (("a", flags, tmp_path / "one"), ("b", one, tmp_path / "two")):
        phased_dmd.main(
            [
                *teacher,
                "--student_steps",
                "4",
                "--max_train_steps",
                "2",
                "--fake_update_ratio",
                "1",
                "--lora_rank",
                "2",
                "--output_dir",
                str(tmp_path / name),
            ]
        )
        says = refusal(
            capsys,
            tmp_path / "out",
            "--sample",
            str(tmp_path / name),
            *flags[2:4],
            "--teacher",
            str(base),
        )
        assert (
            "belong on" in says
            and "NoneType" not in says
            and ("two networks" if name == "a" else "one network") in says
        )


@pytest.mark.parametrize(
    "flags, says",
    [
        (
            ["--phases", "5"],
            "--phases 5: every phase needs a step, and there are --student_steps 4",
        ),
        (
            ["--phases", "4", "--max_train_steps", "3"],
            "--max_train_steps 3 are shared out over --phases 4",
        ),
        (["--phases", "0"], "--phases: must be >= 1"),
        (["--dm_range", "0.9", "0.1"], "LO must be below HI"),
        (["--target", "biased"], "--target"),
        (["--lora_rank", "-1"], "--lora_rank: must be >= 0"),
        (["--lora_alpha", "0"], "--lora_alpha: must be > 0"),
        (["--prompts", "x.safetensors"], "takes class labels, not prompts"),
        (["--sample_shape", "1", "8", "8"], "DiT expects x of shape"),
        (["--teacher", "nowhere"], "neither an embedded world"),
        (["--teacher", "ring", "--sample_shape", "3"], "RingMLP expects points (B, 2)"),
        (["--resume_from_checkpoint", "nowhere"], "no state.json there"),
        (["--renoise", "ode"], "unrecognized arguments: --renoise ode"),
        (["--sample", "TEACHER"], "sampler.json does not exist"),
        (["--sample", "nowhere"], "sampler.json does not exist"),
    ],
)
def test_wrong_flags(tmp_path, capsys, flags, says):
    """One line and exit code 2 before anything is written."""
    teacher = save_dit(tmp_path / "teacher")
    flags = [teacher[1] if f == "TEACHER" else f for f in flags]
    assert says in refusal(
        capsys, tmp_path / "run", *SHORT, *([] if "--teacher" in flags else teacher), *flags
    )


def edit_index(root, **changes):
    index = load_json(str(root / "model_index.json"))
    save_json(
        {k: v for k, v in {**index, **changes}.items() if v is not None},
        str(root / "model_index.json"),
    )


@pytest.mark.parametrize(
    "flags, damage, says",
    [
        (["--phases", "1"], None, "of one phase lie on both sides of the teacher's boundary 0.875"),
        (
            ["--timestep_shift", "12"],
            None,
            "steps 0.9231, 0.8 of one phase lie on both sides of the teacher's boundary 0.875",
        ),
        (["--timestep_shift", "1"], None, "steps 1, 0.75 of one phase"),
        (["--student_steps", "5"], None, "steps 0.8824, 0.7692, 0.5556"),
        (
            [],
            lambda root: (root / "prompts.safetensors").unlink(),
            "prompts.safetensors does not exist",
        ),
        ([], lambda root: (root / "transformer_2" / WEIGHTS).unlink(), "transformer_2 has no"),
        (
            [],
            lambda root: (root / "transformer_2" / "config.json").write_text("{"),
            "is not readable JSON",
        ),
        (
            [],
            lambda root: shutil.rmtree(root / "transformer"),
            "transformer_2/ but no transformer/",
        ),
        ([], lambda root: edit_index(root, boundary_ratio=None), "boundary_ratio is None"),
    ],
)
def test_wrong_two_network_teachers(tmp_path, capsys, flags, damage, says):
    """A grid whose phase straddles the boundary, and roots that are not whole: one line and exit code 2 before anything is written."""
    given = save_tiny_wan(tmp_path, boundary=0.875)
    if damage:
        damage(tmp_path)
    assert says in refusal(capsys, tmp_path / "run", *given, *SHORT, "--student_steps", "4", *flags)


def test_a_network_without_steps_is_refused(tmp_path, capsys):
    """With every step above the boundary the low-noise network would have no expert, and no level below it would ever be matched."""
    given = save_tiny_wan(tmp_path, boundary=0.875)
    says = refusal(
        capsys, tmp_path / "run", *given, *SHORT, "--student_steps", "2", "--timestep_shift", "8"
    )
    assert "all steps 1, 0.8889 lie above the teacher's boundary 0.875" in says
    assert "this teacher has two" in refusal(
        capsys,
        tmp_path / "run",
        *given,
        *SHORT,
        "--student_steps",
        "4",
        "--lora_rank",
        "0",
        "--student_init",
        str(tmp_path / "transformer"),
    )


def test_defaults_of_released_teachers(tmp_path):
    """A released teacher has the paper's values; an adapter as fake the adapters' rate; sampling its student goes one video at a time."""
    root = tmp_path / "wan"
    args = phased_dmd.parse_args(wan_flags(root, 0.875)[:4])
    assert (
        args.learning_rate,
        args.learning_rate_fake,
        args.lora_rank,
        args.lora_alpha,
        args.fake_update_ratio,
    ) == (5e-5, 4e-7, 64, 8, 5)
    assert (
        args.adam_betas,
        args.timestep_shift,
        args.student_steps,
        args.phases,
        args.train_batch_size,
    ) == ([0.0, 0.999], 5.0, 4, 2, 1)
    assert (
        phased_dmd.parse_args(["--teacher", str(root), "--fake_lora_rank", "4"]).learning_rate_fake
        == 5e-5
    )
    assert (
        phased_dmd.parse_args(["--fake_lora_rank", "4"]).learning_rate_fake
        == phased_dmd.parse_args([]).learning_rate_fake
    )
    for base, batch in ((str(root), 1), ("ring", phased_dmd.parse_args([]).train_batch_size)):
        (tmp_path / "student").mkdir(exist_ok=True)
        save_json({"base": base}, str(tmp_path / "student" / "sampler.json"))
        assert phased_dmd.parse_args(["--sample", str(tmp_path)]).train_batch_size == batch


@pytest.mark.parametrize("prediction, zero_snr", [("epsilon", False), ("v_prediction", True)])
def test_vp_teachers(monkeypatch, tmp_path, prediction, zero_snr):
    """A teacher with a VP schedule, up to t = 1 where alpha may be 0: the fake regresses the teacher's own prediction, and all stays finite."""
    flags = save_dit(tmp_path / "teacher" / "student")
    (tmp_path / "teacher" / "student" / "scheduler").mkdir()
    save_json(
        {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": prediction,
            "rescale_betas_zero_snr": zero_snr,
        },
        str(tmp_path / "teacher" / "student" / "scheduler" / "scheduler_config.json"),
    )
    diary = run(
        monkeypatch, tmp_path / "run", *flags, "--dm_range", "0", "1", "--dmd_weight", "paper"
    )
    assert (
        diary.teacher.prediction == {"epsilon": "eps", "v_prediction": "vp_v"}[prediction]
        and diary.teacher.schedule.zero_snr == zero_snr
    )
    assert (
        all(torch.isfinite(g).all() for u in diary.updates for g in u.gradients)
        and len(diary.updates) == 12
    )
    turn = next(t for t in diary.turns if t.who == "fake")
    want = phased_dmd.subinterval_target(
        diary.teacher.prediction, diary.teacher.schedule, turn.x_s, turn.eps, turn.s, turn.t
    )
    x_t = phased_dmd.noise_on(diary.teacher.schedule, turn.x_s, turn.eps, turn.s, turn.t)
    weight = phased_dmd.taper(diary.teacher.schedule, turn.s, turn.t)
    fake = diary.at(diary.updates[0], "fake1")
    loss = (weight * (fake(x_t, turn.t, **turn.cond) - want).square().flatten(1).mean(1)).mean()
    for a, b in zip(diary.updates[0].gradients, torch.autograd.grad(loss, list(fake.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_nothing_of_a_phase_outlives_it(monkeypatch, tmp_path):
    """In phase 2, also right after a save in phase 1, no tensor of the first fake, its optimizer or the first average is alive."""
    quiet(monkeypatch)
    monkeypatch.setattr(phased_dmd, "marginals", lambda *a: None)
    real_copy, real_update, watched, alive = phased_dmd.trainable_copy, phased_dmd.update, [], []

    def on_copy(args, net, name, *rest):
        new = real_copy(args, net, name, *rest)
        if name in ("fake1", "ema1"):
            watched.extend(weakref.ref(p) for p in new.parameters())
        return new

    def on_update(optimizers, *rest):
        norm = real_update(optimizers, *rest)
        if len(alive) < 6:  # phase 1
            watched.extend(weakref.ref(s["exp_avg"]) for s in optimizers[0].state.values()) if len(
                alive
            ) == 0 else None
        alive.append(sum(r() is not None for r in watched))
        return norm

    (
        monkeypatch.setattr(phased_dmd, "trainable_copy", on_copy),
        monkeypatch.setattr(phased_dmd, "update", on_update),
    )
    phased_dmd.main(
        [
            "--teacher",
            "ring",
            "--output_dir",
            str(tmp_path),
            "--max_train_steps",
            "4",
            "--train_batch_size",
            "4",
            "--fake_update_ratio",
            "2",
            "--checkpointing_steps",
            "3",
        ]
    )
    assert len(alive) == 12 and alive[0] > 0 and alive[5] > 0 and alive[6:] == [0] * 6, alive


def test_text_teachers_need_prompts(tmp_path, capsys):
    """Without --prompts there is nothing to train on."""
    assert "needs --prompts FILE.safetensors" in refusal(
        capsys, tmp_path / "run", *save_tiny_wan(tmp_path)[:2]
    )


# ---- Wan 2.2: two networks -----------------------------------------------------------------------------------------


def wan_flags(root, boundary=None):
    """A tiny Wan pipeline root, one network or two, with flags for a short run on it: 4 steps in 2 phases, shift 5."""
    root.mkdir()
    return [
        *save_tiny_wan(root, boundary=boundary),
        *SHORT,
        "--student_steps",
        "4",
        "--max_train_steps",
        "4",
        "--fake_update_ratio",
        "2",
        "--preview_samples",
        "2",
        "--learning_rate",
        "1e-2",
        "--learning_rate_fake",
        "1e-3",
        "--max_grad_norm",
        "1e9",
    ]


@pytest.mark.parametrize("batch", [4, 1])
@pytest.mark.parametrize(
    "flags",
    [["--lora_rank", "0"], ["--lora_rank", "2", "--fake_lora_rank", "2"]],
    ids=["full", "lora"],
)
def test_each_phase_of_two_networks(monkeypatch, tmp_path, flags, batch):
    """Phase 1 has the high-noise network alone as start of expert and fake, and its noise levels are clamped to the boundary, not drawn again.
    Phase 2 starts from the low-noise network, its fake is both networks, each trained on the levels it is in charge of: where a batch has none
    of them, its gradient is zero, not absent, for other ranks may have some."""
    diary = Diary(monkeypatch)
    phased_dmd.main(
        [
            *wan_flags(tmp_path / "wan", 0.875),
            "--output_dir",
            str(tmp_path / "run"),
            "--train_batch_size",
            str(batch),
            *flags,
        ]
    )
    high, low = (
        load_network(str(tmp_path / "wan" / name))[0] for name in ("transformer", "transformer_2")
    )
    first = [next(u for u in diary.updates if u.phase == k) for k in (1, 2)]
    base = diary.teacher.base
    assert isinstance(base, WanTwoNetworks) and base is diary.teacher.net
    if flags[1] == "0":
        assert_bit_equal(first[0].nets["expert1"], dict(high.state_dict()))
        assert_bit_equal(first[0].nets["fake1"], dict(high.state_dict()))
        assert_bit_equal(first[1].nets["expert2"], dict(low.state_dict()))
        assert_bit_equal(
            first[1].nets["fake2"], dict(WanTwoNetworks(high, low, 0.875).state_dict())
        )
    else:
        assert [diary.made[n].net for n in ("expert1", "fake1", "expert2", "fake2")] == [
            base.high,
            base.high,
            base.low,
            base,
        ]
        assert lora.names(base.high) == ["expert1"] and lora.names(base.low) == ["expert2"]
    assert [(u.what, u.trains) for u in diary.updates] == [
        (what, f"{name}{k}")
        for k in (1, 1, 2, 2)
        for what, name in [("fake-score", "fake")] * 2 + [("student", "expert")]
    ]
    grid, at_boundary, seen = step_grid(4, 5.0), 0, [[], []]
    for i, turn in enumerate(diary.turns):
        draw = Draws(0, i // 3, "student" if turn.who == "student" else i % 3, range(batch))
        s, u_end, clamp = (grid[2], 0.5, 0.875) if turn.phase == 1 else (0.0, 0.0, 0.0)
        u = (
            draw.spread("u", 0.02, 0.98)
            if turn.who == "student"
            else draw.spread("u", 1e-3 if s else 0.0, 1.0)
        )
        assert torch.equal(turn.s, torch.full((batch,), s))
        torch.testing.assert_close(
            turn.t, shift(u_end + (1 - u_end) * u, 5.0).clamp_min(clamp), rtol=1e-6, atol=0
        )
        at_boundary += int((turn.t == 0.875).sum())
        seen[turn.phase - 1].append(turn.t)
    assert batch == 1 or 0 < at_boundary < 24 and torch.cat(seen[0]).min() == 0.875
    for turns, update in zip(
        [t for t in diary.turns if t.who == "fake"],
        [u for u in diary.updates if u.what == "fake-score"],
    ):
        names = list(update.nets[update.trains])
        for side, trained in (
            ("high.", bool((turns.t >= 0.875).any())),
            ("low.", bool((turns.t < 0.875).any())),
        ):
            mine = [
                bool(g.any()) for name, g in zip(names, update.gradients) if name.startswith(side)
            ]
            assert update.phase == 1 and not mine or any(mine) == trained
    assert (torch.cat(seen[1]) >= 0.875).any() and (torch.cat(seen[1]) < 0.875).any()
    assert_bit_equal(dict(lora.base_state_dict(base)), diary.teacher_before)


def test_previous_expert_of_the_same_network(monkeypatch, tmp_path):
    """With --expert_init previous and four phases, experts 2 and 4 go on from 1 and 3; expert 3 cannot, it starts from the other network."""
    diary = Diary(monkeypatch)
    phased_dmd.main(
        [
            *wan_flags(tmp_path / "wan", 0.875),
            "--output_dir",
            str(tmp_path / "run"),
            "--phases",
            "4",
            "--expert_init",
            "previous",
            "--lora_rank",
            "0",
            "--fake_update_ratio",
            "1",
        ]
    )
    first = [next(u for u in diary.updates if u.phase == k).nets for k in (1, 2, 3, 4)]
    assert_bit_equal(first[1]["expert2"], first[1]["expert1"])
    assert_bit_equal(
        first[2]["expert3"],
        dict(load_network(str(tmp_path / "wan" / "transformer_2"))[0].state_dict()),
    )
    assert_bit_equal(first[3]["expert4"], first[3]["expert3"])
    assert any(not torch.equal(first[3]["expert4"][k], v) for k, v in first[2]["expert3"].items())


@pytest.mark.parametrize("rank", ["0", "4"])
def test_experts_of_wan_22_in_diffusers(tmp_path, rank):
    """Full experts are components of diffusers, adapters load into transformer and transformer_2 of its WanPipeline; the same velocities as ours.
    --sample finds each adapter's network again."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    flags, root, folder = wan_flags(tmp_path / "wan", 0.875), tmp_path / "wan", tmp_path / "run"
    phased_dmd.main(
        [*flags, "--output_dir", str(folder), "--lora_rank", rank, "--fake_update_ratio", "1"]
    )
    names = ("transformer", "transformer_2")
    sampler = load_json(str(folder / "student" / "sampler.json"))
    assert [e["network"] for e in sampler["experts"]] == list(names) and sampler[
        "phase_ends"
    ] == pytest.approx([5 / 6, 0])
    bases = [load_network(str(root / name))[0] for name in names]
    theirs = [
        diffusers.WanTransformer3DModel.from_pretrained(
            root / name if rank == "4" else folder / "student" / f"expert{k}"
        ).eval()
        for k, name in enumerate(names, start=1)
    ]
    if rank == "4":
        pipe = diffusers.WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=None,
            transformer=theirs[0],
            transformer_2=theirs[1],
            boundary_ratio=0.875,
        )
        pipe.load_lora_weights(str(folder / "student" / "expert1.safetensors"), adapter_name="ours")
        pipe.load_lora_weights(
            str(folder / "student" / "expert2.safetensors"),
            adapter_name="ours",
            load_into_transformer_2=True,
        )
    else:
        for k, name in enumerate(names, start=1):
            config = json.loads((folder / "student" / f"expert{k}" / "config.json").read_text())
            assert config == json.loads((root / name / "config.json").read_text())
    g = torch.Generator().manual_seed(5)
    x, text, t = (
        torch.randn(2, 4, 2, 4, 6, generator=g),
        torch.randn(2, 6, 16, generator=g),
        torch.tensor([0.3, 0.9]),
    )
    for ours, base, other in zip(saved_experts(folder, *bases), bases, theirs):
        with torch.no_grad():
            a, b, bare = (
                ours(x, t, text=text),
                other(x, 1000 * t, text, return_dict=False)[0],
                base(x, t, text=text),
            )
        assert (a - b).abs().max() <= 1e-5 < 1e-3 < (a - bare).abs().max()
    phased_dmd.main(
        [
            "--sample",
            str(folder),
            *flags[2:4],
            "--output_dir",
            str(tmp_path / "samples"),
            "--preview_samples",
            "2",
            "--train_batch_size",
            "4",
        ]
    )
    x, again = (
        load_file(path / "samples.safetensors")["x0"] for path in (folder, tmp_path / "samples")
    )
    torch.testing.assert_close(x, again, rtol=1e-4, atol=1e-5)


def test_steps_in_diffusers_pipeline(tmp_path):
    """Which scheduler of diffusers takes our steps: DPMSolverMultistepScheduler of order 1 with flow sigmas (its clock is whole numbers, hence a few per
    cent on random networks). FlowMatchEulerDiscreteScheduler, whose grid ends elsewhere, is the wrong one."""
    diffusers = pytest.importorskip("diffusers")
    save_tiny_wan(tmp_path, boundary=0.875)
    names, g = ("transformer", "transformer_2"), torch.Generator().manual_seed(0)
    z, text = torch.randn(2, 4, 2, 4, 6, generator=g), torch.randn(2, 6, 16, generator=g)
    high, low = (load_network(str(tmp_path / n))[0] for n in names)
    ours = phased_dmd.sample(
        [high, high, low, low], Flow(), "flow_v", z, step_grid(4, 5.0)[:-1], {"text": text}
    )

    def error(scheduler):
        pipe = diffusers.WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=scheduler,
            boundary_ratio=0.875,
            **{
                n: diffusers.WanTransformer3DModel.from_pretrained(tmp_path / n).eval()
                for n in names
            },
        )
        pipe.set_progress_bar_config(disable=True)
        x = pipe(
            prompt_embeds=text,
            latents=z.clone(),
            num_inference_steps=4,
            guidance_scale=1.0,
            height=32,
            width=48,
            num_frames=5,
            output_type="latent",
        )
        return float((x.frames - ours).norm() / ours.norm())

    right = diffusers.DPMSolverMultistepScheduler(
        solver_order=1, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5
    )
    assert error(right) < 0.05 < 0.1 < error(diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0))


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "boundary, rank, batch",
    [(None, "4", 2), (0.875, "0", 1)],
    ids=["one network, adapters", "two networks, full"],
)
def test_two_ranks_are_one_process_with_twice_the_batch(
    monkeypatch, tmp_path, boundary, rank, batch
):
    """torchrun with two ranks: in both phases the same averaged gradients of fake and expert, the same log, one set of outputs, and a student
    that --sample draws the run's own samples from. With one sample a rank, the ranks train different ones of two networks."""
    flags = [*wan_flags(tmp_path / "wan", boundary), "--lora_rank", rank]
    with monkeypatch.context() as m:  # in each phase R = 2 fake updates and the student's, twice
        assert 12 == assert_two_ranks_are_one_process(
            m,
            tmp_path,
            phased_dmd,
            flags,
            least=1e-6,
            batch=batch,
            within=lambda call: 1e-4 if call in (1, 7) else 5e-3,
        )
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert a["phase"] == b["phase"]
        for loss in ("loss_fake", "loss_dm", "mean", "std"):
            assert float(a[loss]) == pytest.approx(float(b[loss]), rel=1e-3, abs=1e-6), (
                a["step"],
                loss,
            )
    assert (tmp_path / "two" / "samples.gif").is_file() and (
        tmp_path / "two" / "report.json"
    ).is_file()
    phased_dmd.main(
        [
            "--sample",
            str(tmp_path / "two"),
            *flags[2:4],
            "--output_dir",
            str(tmp_path / "samples"),
            "--preview_samples",
            "2",
            "--train_batch_size",
            str(batch),
        ]
    )
    ours, again, single = (
        load_file(tmp_path / name / "samples.safetensors")["x0"]
        for name in ("two", "samples", "one")
    )
    torch.testing.assert_close(ours, again, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, single, rtol=0.05, atol=0.05)


# ---- crash and resume ------------------------------------------------------------------------------------------------

# Saves are made after updates 2, 3 (the end of phase 1), 4 and 6. What each run dies at, one after the other, each resuming where the last one died:
DEATHS = {
    "full": [
        ("step-0000002", 1),
        ("expert2", 2),
    ],  # before anything is saved; in phase 2, with its first expert half written
    "lora": [("step-0000003", 1), ("step-0000006", 1)],
}  # at the change of phase, expert 1 written but no state; at the very end


@both_kinds
def test_kills_and_resumes(finished, tmp_path, kind):
    """SIGKILL in phase 1, at the change of phase, in phase 2: each start goes on from the last whole checkpoint, and the end is the same to the bit."""
    flags = [
        *finished[kind].flags,
        "--output_dir",
        str(tmp_path / "run"),
        "--resume_from_checkpoint",
        "latest",
    ]
    for text, n in DEATHS[kind]:
        dead = subprocess.run(
            [sys.executable, "-c", SUICIDAL, "phased_dmd", "replace", text, str(n), *flags],
            capture_output=True,
            text=True,
            env=ENV,
        )
        assert dead.returncode == -signal.SIGKILL, dead.stderr
    phased_dmd.main(flags)
    assert_bit_equal(weights(tmp_path / "run"), weights(finished[kind].folder))
    assert without_time(read_log(tmp_path / "run")) == without_time(read_log(finished[kind].folder))
    assert_bit_equal(
        load_file(tmp_path / "run" / "samples.safetensors"),
        load_file(finished[kind].folder / "samples.safetensors"),
    )
    assert not list((tmp_path / "run").rglob("*.tmp-*"))


@both_kinds
def test_finished_runs_resume(finished, tmp_path, capsys, kind):
    """A finished run writes its outputs again, and goes on in its last phase with more steps, expert 1 staying as it is. Other flags are refused."""
    run = shutil.copytree(finished[kind].folder, tmp_path / "run")
    flags = [*finished[kind].flags, "--output_dir", str(run), "--resume_from_checkpoint", "latest"]
    before = weights(run)
    for name in ("samples.png", "samples.safetensors", "report.json", "student"):
        (shutil.rmtree if name == "student" else lambda p: p.unlink())(run / name)
    phased_dmd.main(flags)
    assert_bit_equal(weights(run), before)
    assert {p.name for p in run.iterdir()} == {p.name for p in finished[kind].folder.iterdir()}
    assert_bit_equal(
        load_file(run / "samples.safetensors"),
        load_file(finished[kind].folder / "samples.safetensors"),
    )
    capsys.readouterr()
    says = refusal_of(
        capsys, phased_dmd.main, *flags, "--phases", "4", "--lora_alpha", "5", "--target", "naive"
    )
    assert (
        "--lora_alpha was" in says
        and "--phases was 2 and is 4; --target was 'subinterval' and is 'naive'" in says
    )
    assert "beyond --max_train_steps 5" in refusal_of(
        capsys, phased_dmd.main, *flags, "--max_train_steps", "5"
    )
    phased_dmd.main([*flags, "--max_train_steps", "8"])
    assert load_json(str(run / "state" / "step-0000008" / "state.json"))["phase_start"] == 3
    assert [(r["step"], r["phase"]) for r in read_log(run)] == [
        (str(i + 1), "1" if i < 3 else "2") for i in range(8)
    ]
    after = weights(run)
    for key, v in before.items():
        if "expert1" in key:
            assert torch.equal(v, after[key])
    assert any(
        not torch.equal(v, after[key])
        for key, v in before.items()
        if key.startswith("student/expert2")
    )


@both_kinds
def test_resume_from_phase_1_with_other_lengths(finished, tmp_path, capsys, kind):
    """From a checkpoint of phase 1 with more steps that phase goes on first, as if planned so from the start; back to fewer, student/ is again
    that of the shorter run, not a mixture; so few that a phase would have no update are refused."""
    run, flags = tmp_path / "run", [*finished[kind].flags, "--output_dir", str(tmp_path / "run")]
    phased_dmd.main([*flags, "--max_train_steps", "4"])  # phase 1 ends at update 2
    short = weights(run)
    state = str(shutil.copytree(run / "state" / "step-0000002", tmp_path / "step-0000002"))
    phased_dmd.main([*flags, "--resume_from_checkpoint", state])
    assert_bit_equal(weights(run), weights(finished[kind].folder))
    says = refusal_of(
        capsys, phased_dmd.main, *flags, "--resume_from_checkpoint", state, "--max_train_steps", "2"
    )
    assert "--max_train_steps 2" in says and "phase 2" in says
    shutil.rmtree(run / "state")
    phased_dmd.main([*flags, "--resume_from_checkpoint", state, "--max_train_steps", "4"])
    assert_bit_equal(weights(run), short)
