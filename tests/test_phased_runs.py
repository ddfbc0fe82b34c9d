"""phased_dmd.py's runs: who is trained on what in every phase, equality with dmd.py, adapters, Wan 2.2, ranks, crashes, refusals, outputs."""
import copy
import types

import pytest
import torch

import dmd
import phased_dmd
from helpers import perturbed, quiet, ring_network, small_dit
from models import io, lora
from models.diffusion import expand, step_grid, unshift
from models.toy import RingTeacher


# ---- the training loop -------------------------------------------------------------------------------------------


class Diary:
    """What a run of phased_dmd.main did: networks as they were made, and in order its turns (calls of the student, what fake and student
    were given) and its updates (gradients before clipping, and all networks of the phase as they were then)."""

    def __init__(self, monkeypatch):
        self.made, self.calls, self.turns, self.updates = {}, [], [], []
        quiet(monkeypatch, phased_dmd)
        monkeypatch.setattr(phased_dmd, "marginals", lambda *a: None)
        for name, spy in (("load_base", self.on_base), ("trainable_copy", self.on_copy), ("student_step", self.on_step), ("update", self.on_update),
                          ("fake_score_loss", self.on_fake_loss), ("guided_x0", self.on_guided), ("predict_x0", self.on_predict),
                          ("distribution_matching_gradient", self.on_gradient)):
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
        self.calls.append(types.SimpleNamespace(who=name, t=t, t_next=t_next, gradient=torch.is_grad_enabled(), x_t=x_t, x=x, cond=cond))
        return x, x0

    def turn(self, **what):
        self.turns.append(types.SimpleNamespace(phase=self.phase, calls=self.calls, **what))
        self.calls = []

    def on_fake_loss(self, real, fake, schedule, kind, x_s, eps, s, t, cond, target, tapered):
        assert fake is self.made[f"fake{self.phase}"] and not x_s.requires_grad
        self.turn(who="fake", x_s=x_s, eps=eps, s=s, t=t, cond=cond, target=target, tapered=tapered)
        return real(fake, schedule, kind, x_s, eps, s, t, cond, target, tapered)

    def on_guided(self, real, net, schedule, kind, x_t, t, cond, uncond, scale):
        self.teacher_saw = types.SimpleNamespace(net=net, x_t=x_t, t=t, cond=cond, uncond=uncond, scale=scale)
        return real(net, schedule, kind, x_t, t, cond, uncond, scale)

    def on_predict(self, real, net, schedule, kind, x_t, t, **cond):
        self.fake_saw = types.SimpleNamespace(net=net, x_t=x_t, t=t, cond=cond)
        return real(net, schedule, kind, x_t, t, **cond)

    def on_gradient(self, real, x0, x0_real, x0_fake, schedule, s, t, weight):
        self.turn(who="student", s=s, t=t, weight=weight, x_s=self.calls[-1].x, teacher=self.teacher_saw, fake=self.fake_saw)
        return real(x0, x0_real, x0_fake, schedule, s, t, weight)

    def on_update(self, real, optimizers, max_norm, what, loss):
        (optimizer,) = optimizers
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        now = {n: e for n, e in self.made.items() if n.startswith("expert") or n == f"fake{self.phase}" or n == f"ema{self.phase}"}
        nets = [self.teacher.net, self.teacher.base, *(e.net for e in now.values())]
        self.updates.append(types.SimpleNamespace(
            what=what, phase=self.phase, rate=optimizer.param_groups[0]["lr"], gradients=[p.grad.clone() for p in parameters],
            trains=next(n for n, e in now.items() if list(map(id, e.parameters())) == list(map(id, parameters))),
            strangers=[p for net in nets for p in net.parameters() if p.grad is not None and not any(p is q for q in parameters)],
            nets={n: {k: v.clone() for k, v in e.state_dict().items()} for n, e in now.items()}))
        self.updates[-1].norm = real(optimizers, max_norm, what, loss)
        return self.updates[-1].norm

    def at(self, update, name):
        """A full network of that name as it was at an update."""
        net = copy.deepcopy(self.made[name].net).requires_grad_(True)
        net.load_state_dict(update.nets[name])
        return net


def run(monkeypatch, folder, *flags):
    """A short quiet run on the ring: 4 steps in 2 phases, shift 3, 2 updates a phase with 2 fake updates each, 8 samples a batch."""
    diary = Diary(monkeypatch)
    phased_dmd.main(["--teacher", "ring", "--output_dir", str(folder), "--max_train_steps", "4", "--train_batch_size", "8", "--fake_update_ratio", "2",
                     "--checkpointing_steps", "1000", "--max_grad_norm", "1e9", *flags])
    return diary


def save_dit(folder, **changes):
    """A tiny DiT with noise on every weight as a --teacher folder, with the flags for a run on it."""
    net = perturbed(small_dit(dim=32, depth=2, **changes))
    io.save_network(net, io.network_config(net), str(folder))
    return ["--teacher", str(folder)]


def in_phases(steps=4, phases=2, shifted=3.0):
    """The student's grid, and for every phase the slice of steps it takes: [1, .9, .75, .5, 0], [(0, 2), (2, 4)]."""
    ends = {(4, 1): [4], (4, 2): [2, 4], (4, 4): [1, 2, 3, 4], (3, 2): [2, 3]}[steps, phases]
    return step_grid(steps, shifted), list(zip([0, *ends], ends))


KINDS_OF_EXPERTS = [[], ["--lora_rank", "2"], ["--fake_lora_rank", "2"], ["--lora_rank", "2", "--fake_lora_rank", "3"]]


@pytest.mark.parametrize("flags", KINDS_OF_EXPERTS, ids=" ".join)
@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_turns_and_who_has_gradients(monkeypatch, tmp_path, flags, ema):
    """In every phase R fake updates, then one of its own expert, whatever is an adapter. Nothing else has a gradient, ever; expert 1 is the same
    to the bit all through phase 2, namely its average; the teacher is the same to the bit at the end, without adapters but the experts'."""
    flags = [*save_dit(tmp_path / "teacher"), "--fake_update_ratio", "3", "--ema_decay", ema, *flags]
    diary = run(monkeypatch, tmp_path / "run", *flags)
    assert [(u.what, u.trains) for u in diary.updates] == [(what, f"{name}{k}") for k in (1, 1, 2, 2) for what, name in
                                                           [("fake-score", "fake")] * 3 + [("student", "expert")]]
    assert all(not u.strangers and len(u.gradients) == len(u.nets[u.trains]) for u in diary.updates)
    assert all(any(g.any() for g in u.gradients) for u in diary.updates)
    phase_1, phase_2 = ([u for u in diary.updates if u.phase == k] for k in (1, 2))
    before, after = phase_1[-1].nets["expert1"], diary.made["expert1"].state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in after)
    for u in phase_2:
        assert all(torch.equal(u.nets["expert1"][k], after[k]) for k in after)
    assert not any(p.requires_grad for e in ("expert1", "expert2") for p in diary.made[e].parameters())
    base = lora.base_state_dict(diary.teacher.base)
    assert base.keys() == diary.teacher_before.keys() and all(torch.equal(v, diary.teacher_before[k]) for k, v in base.items())
    assert lora.names(diary.teacher.base) == (["expert1", "expert2"] if "--lora_rank" in flags else [])


@pytest.mark.parametrize("init", ["teacher", "previous"])
@pytest.mark.parametrize("flags", KINDS_OF_EXPERTS[:2], ids=" ".join)
def test_what_a_phase_starts_from(monkeypatch, tmp_path, init, flags):
    """Every phase has a new fake, which is the teacher's function whatever step it is told, and a new expert: the teacher's function too, or with
    --expert_init previous the weights of the expert before. Its average starts where it does."""
    diary = run(monkeypatch, tmp_path / "run", *save_dit(tmp_path / "teacher"), "--expert_init", init, "--ema_decay", "0.9", *flags)
    net = io.load_network(str(tmp_path / "teacher"))[0]
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
            assert all(not v.any() for key, v in start.items() if key.endswith(".B")) and any(v.any() for key, v in start.items() if key.endswith(".A"))
        else:
            assert all(torch.equal(start[key], v) for key, v in net.state_dict().items())
    assert first[0].nets["expert1"].keys() == first[1].nets["expert2"].keys()
    last = [u for u in diary.updates if u.phase == 1][-1].nets["fake1"]  # it had moved away from the teacher
    assert any(not torch.equal(last[key], v) for key, v in first[0].nets["fake1"].items())


def calls_of_a_turn(turn, first, steps, phases, no_truncation=False):
    """[(expert, t, t_next, with gradient)] that a turn of this phase must have made for a sample whose last step, or first one with gradient,
    is the first-th of the grid."""
    grid, slices = in_phases(steps, phases)
    (_, end), student = slices[turn.phase - 1], turn.who == "student"
    before = [(f"expert{next(k for k, (_, e) in enumerate(slices) if i < e) + 1}", grid[i], grid[i + 1], False) for i in range(first)]
    last = [(grid[i], grid[i + 1]) for i in range(first, end)] if no_truncation else [(grid[first], grid[end])]
    return before + [(f"expert{turn.phase}", a, b, student) for a, b in last]


@pytest.mark.parametrize("steps, phases, flags", [
    (4, 2, []), (4, 4, []), (3, 2, []), (4, 1, []), (4, 1, ["--no_truncation"]), (4, 2, ["--no_truncation"])])
def test_samples_are_the_experts_own(monkeypatch, tmp_path, steps, phases, flags):
    """Fake and student train on the same samples: noise, all steps of the frozen experts, some of the phase's own, and a last one that jumps to
    the phase's end s. One call of a student's update is recorded, or with --no_truncation all of the phase (N with one phase); none of
    a fake's. The last step j stays in its phase and takes all values there; with a step per phase nothing is left to chance."""
    diary = run(monkeypatch, tmp_path, "--student_steps", str(steps), "--phases", str(phases), "--max_train_steps", "12", *flags)
    last = [set() for _ in range(phases)]
    slices = in_phases(steps, phases)[1]
    assert [turn.who for turn in diary.turns] == ["fake", "fake", "student"] * 12
    for i, turn in enumerate(diary.turns):
        begin, end = slices[turn.phase - 1]
        first = begin if flags else len(turn.calls) - 1
        assert begin <= first < end
        last[turn.phase - 1].add(first - begin)
        assert [(c.who, c.t, c.t_next, c.gradient) for c in turn.calls] == calls_of_a_turn(turn, first, steps, phases, bool(flags))
        recorded = [c for c in turn.calls if c.x.requires_grad]
        assert len(recorded) == (0 if turn.who == "fake" else end - begin if flags else 1)
        draw = io.Draws(0, i // 3, "student" if turn.who == "student" else i % 3, range(8))
        z, label = draw.normal("z", (2,)), draw.integer("cond", 4)
        for call, x in zip(turn.calls, [z, *(c.x for c in turn.calls)]):  # each call goes on from the one before, under one label
            assert torch.equal(call.x_t, x) and torch.equal(call.cond["label"], label) and set(call.cond) == {"label"}
        assert torch.equal(turn.x_s, turn.calls[-1].x)
    assert last == [{0} if flags else set(range(e - b)) for b, e in slices]


@pytest.mark.parametrize("phases", [1, 2, 4])
def test_noise_levels(monkeypatch, tmp_path, phases):
    """Scores are taken on (s, 1), nested: raw u in (u_end, 1), all of it for the fake, the --dm_range share of it for the student, evenly.
    Teacher, guided, and fake, not guided, see x_t = a x_s + b eps with the x_s, and the s, of that phase."""
    diary = run(monkeypatch, tmp_path, "--phases", str(phases), "--max_train_steps", "16", "--train_batch_size", "16", "--dm_range", "0.3", "0.6",
                "--fake_update_ratio", "1", "--guidance_scale", "2")
    grid, slices = in_phases(4, phases)
    for k, (_, end) in enumerate(slices, start=1):
        s, u_end = grid[end], 1 - end / 4
        for who in ("fake", "student"):
            turns = [(i, turn) for i, turn in enumerate(diary.turns) if turn.phase == k and turn.who == who]
            share = (unshift(torch.cat([turn.t for _, turn in turns]).double(), 3) - u_end) / (1 - u_end)
            low, high = (0.3, 0.6) if who == "student" else (1e-3 if s else 0.0, 1.0)
            assert low - 1e-5 < share.min() < low + 0.05 and high - 0.05 < share.max() < high + 1e-5
            assert abs(share.mean() - (low + high) / 2) < 0.04 and len(share) == 16 * 16 // phases
            for i, turn in turns:
                assert torch.equal(turn.s, torch.full((16,), s)) and (turn.t > turn.s).all()
                eps = io.Draws(0, i // 2, "student" if who == "student" else 0, range(16)).normal("eps", (2,))
                if who == "fake":
                    assert torch.equal(turn.eps, eps)
                    continue
                a = (1 - turn.t) / (1 - s)
                x_t = a[:, None] * turn.x_s + (turn.t**2 - (a * s) ** 2).sqrt()[:, None] * eps
                for saw in (turn.teacher, turn.fake):
                    torch.testing.assert_close(saw.x_t, x_t, rtol=1e-4, atol=1e-5)
                    assert torch.equal(saw.t, turn.t) and not saw.x_t.requires_grad
                assert turn.teacher.net is diary.teacher.net and turn.fake.net is diary.made[f"fake{k}"] and turn.teacher.scale == 2
                assert torch.equal(turn.teacher.cond["label"], turn.calls[0].cond["label"]) and (turn.teacher.uncond["label"] == 4).all()
                assert torch.equal(turn.fake.cond["label"], turn.calls[0].cond["label"])


def expected_gradients(diary, update, step, inner, phases, flags):
    """The gradients of an update written out once more from its draws and the networks as they were."""
    (grid, slices), k = in_phases(4, phases), update.phase
    (begin, end), student = slices[k - 1], update.what == "student"
    s, u_end = grid[end], 1 - end / 4
    nets = {name: diary.at(update, name) for name in update.nets}
    draw = io.Draws(0, step, "student" if student else inner, range(8))
    x, eps, label = draw.normal("z", (2,)), draw.normal("eps", (2,)), draw.integer("cond", 4)
    truncated = "--no_truncation" not in flags
    first = begin + draw.agreed("k", end - begin) if truncated else begin

    def step_of(name, x, t, t_next):
        v = nets[name](x, torch.full((8,), t), label)
        return x + (t_next - t) * v, x - t * v
    with torch.no_grad():
        for i in range(first):
            x, _ = step_of(f"expert{next(k for k, (_, e) in enumerate(slices) if i < e) + 1}", x, grid[i], grid[i + 1])
    with torch.set_grad_enabled(student):
        for i in range(first, first + 1 if truncated else end):
            x, x0 = step_of(f"expert{k}", x, grid[i], s if truncated else grid[i + 1])
    u = draw.spread("u", 0.02, 0.98) if student else draw.spread("u", 1e-3 if s else 0.0, 1.0)
    u = u_end + (1 - u_end) * u
    t = 3 * u / (1 + 2 * u)
    a = (1 - t) / (1 - s)
    b = (t**2 - (a * s) ** 2).sqrt()
    x_t = (expand(a, x) * x + expand(b, x) * eps).detach()
    told = {} if "--shared_fake" in flags or not truncated or end - begin == 1 else {"steps": torch.full((8,), float(first - begin))}
    v_fake = nets[f"fake{k}"](x_t, t, label, **told)
    if not student:
        y = eps - x if "naive" in flags else expand((t + (1 - t) * s**2 / (1 - s) ** 2) / b, x) * eps - x / (1 - s)
        weight = (10 * b**2).clamp_max(1) if "all" in flags or s and "none" not in flags else torch.ones(8)
        loss = (weight * (v_fake - y).square().mean(1)).mean()
        return torch.autograd.grad(loss, list(nets[f"fake{k}"].parameters()))
    v_real = RingTeacher()(x_t, t, label)
    if "paper" in flags:
        g = expand((1 - t) ** 2 / (t * (1 - s)), x) * (v_real - v_fake)
    else:
        x0_real = x_t - expand(t, x) * v_real
        g = expand(t, x) * (v_real - v_fake) / (x0 - x0_real).abs().mean(1, keepdim=True)
    return torch.autograd.grad((g.detach() * x).sum() / x.numel(), list(nets[f"expert{k}"].parameters()))


@pytest.mark.parametrize("phases, flags", [
    (2, []), (2, ["--target", "naive"]), (2, ["--taper", "all"]), (2, ["--taper", "none"]), (2, ["--dmd_weight", "paper"]), (2, ["--shared_fake"]),
    (2, ["--no_truncation"]), (1, ["--no_truncation"]), (1, []), (4, [])], ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_gradients_in_the_loop(monkeypatch, tmp_path, phases, flags):
    """What reaches the weights of fake (Eq. 11, 13) and expert (Eq. 10) in every update of a real run, each flag with the formula it stands for."""
    diary = run(monkeypatch, tmp_path, "--phases", str(phases), *flags)
    assert len(diary.updates) == 12
    for i, update in enumerate(diary.updates):
        want = expected_gradients(diary, update, i // 3, i % 3, phases, flags)
        scale = torch.stack([g.norm() for g in want]).norm()
        difference = torch.stack([(a - b).norm() for a, b in zip(update.gradients, want)]).norm()
        assert len(want) == len(update.gradients) and scale > 1e-4 and difference < 1e-4 * scale, (i, difference / scale)
    turns = [turn for turn in diary.turns if turn.who == "fake"]
    told = "--shared_fake" not in flags and "--no_truncation" not in flags and phases < 4
    assert all(("steps" in turn.cond) == told for turn in turns)
    assert io.load_network(str(tmp_path / "student" / "expert1"))[1]["steps_cond"] is False


def test_rates_and_averages_start_again_in_every_phase(monkeypatch, tmp_path):
    """Warm-up and decay of both rates, and the window of the average, are those of a phase of its own; each expert is frozen as its average."""
    diary = run(monkeypatch, tmp_path, "--max_train_steps", "8", "--fake_update_ratio", "1", "--lr_warmup_steps", "2", "--lr_decay_share", "0.5",
                "--learning_rate", "1e-2", "--learning_rate_fake", "3e-2", "--ema_decay", "0.3")
    for what, rate in (("student", 1e-2), ("fake-score", 3e-2)):
        assert [u.rate for u in diary.updates if u.what == what] == pytest.approx([rate * f for f in (0.5, 1, 1, 0.5)] * 2)
    for k in (1, 2):
        updates = [u for u in diary.updates if u.what == "student" and u.phase == k]
        nets = [u.nets[f"expert{k}"] for u in updates]  # before each update, so also after the one before
        ema = nets[0]
        for decay, now, seen in zip((0.25, 0.3, 0.3), nets[1:], [u.nets[f"ema{k}"] for u in updates[1:]]):
            ema = {key: decay * v + (1 - decay) * now[key] for key, v in ema.items()}
            for key, v in ema.items():
                torch.testing.assert_close(seen[key], v, rtol=1e-5, atol=1e-6)
        saved = io.load_network(str(tmp_path / "student" / f"expert{k}"))[0].state_dict()
        assert all(torch.equal(v, saved[key]) for key, v in diary.made[f"ema{k}"].state_dict().items())
        assert all(torch.equal(v, saved[key]) for key, v in diary.made[f"expert{k}"].state_dict().items())


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
        diaries.append(run(monkeypatch, tmp_path / precision, *flags, "--mixed_precision", precision))
        monkeypatch.undo()
    for a, b in zip(*(d.updates[:3] for d in diaries)):
        norm = torch.stack([g.norm() for g in a.gradients]).norm()
        assert torch.stack([(g - h).norm() for g, h in zip(a.gradients, b.gradients)]).norm() < 0.4 * norm
    for update in diaries[1].updates:
        assert all(g.dtype == torch.float32 for g in update.gradients) and sum(bool(g.any()) for g in update.gradients) >= len(update.gradients) / 2


# ---- equality with dmd.py ------------------------------------------------------------------------------------------


def first_gradients(monkeypatch, script, folder, *flags):
    """The gradients, before clipping, of a run's updates in order, each as one vector: R of the fake, then the student's, and so on."""
    quiet(monkeypatch, script)
    if script is phased_dmd:
        monkeypatch.setattr(phased_dmd, "marginals", lambda *a: None)
    seen, real = [], torch.nn.utils.clip_grad_norm_

    def on_clip(parameters, max_norm):
        seen.append(torch.cat([p.grad.flatten() for p in parameters]))
        return real(parameters, max_norm)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", on_clip)
    script.main(["--teacher", "ring", "--output_dir", str(folder), "--max_train_steps", "3", "--train_batch_size", "8", "--fake_update_ratio", "2",
                 "--timestep_shift", "3", "--seed", "5", "--guidance_scale", "1.5", *flags])
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
    assert difference(want[0], got[0]) < 1e-5 and all(difference(a, b) < 1e-3 for a, b in zip(want, got))
    assert difference(want[2], got[2]) < 2e-5
    if steps > 1:
        vanilla = first_gradients(monkeypatch, phased_dmd, tmp_path / "vanilla", *both, "--phases", "1", "--no_truncation")
        sde = first_gradients(monkeypatch, dmd, tmp_path / "sde", *both)
        print([f"{difference(a, b):.1e}" for a, b in zip(want, got)])
        assert max(difference(want[i], vanilla[i]) for i in (2, 5, 8)) > 0.1 and max(difference(want[i], sde[i]) for i in (0, 1, 3, 4)) > 0.1
