"""linvideo.py's runs.

The gradients of every update from the draws and the bank alone, the selection and its end, rates,
averages, resume, ranks, outputs, what dmd.py makes of a student, refusals.
"""

import contextlib
import copy
import gc
import json
import sys
import types
import weakref

import pytest
import torch
from helpers import Diary as DmdDiary
from helpers import (
    alone,
    assert_bit_equal,
    perturbed,
    quiet,
    read_log,
    refusal_of,
    ring_network,
    save_tiny_teacher,
    save_tiny_vp_teacher,
    save_tiny_wan,
    weights,
    without_time,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import dmd
import linvideo
from kernels.linear_attention import LinearAttention
from models.diffusion import expand, shift, step_grid
from models.draws import Draws
from models.files import UserError, load_json
from models.networks import WEIGHTS, load_network, network_config, save_network, weights_hash
from models.networks.dit import DiT
from models.networks.ring_dit import RingDiT
from models.networks.wan import WanTransformer3DModel
from models.pictures import tile
from models.plumbing import report, teachers
from models.plumbing.data import Conditions
from models.plumbing.dry_run import planned
from models.plumbing.film import read_gif
from models.plumbing.run import Run, run_main
from tests import orderings

SHIFT, K, BANK = 2.0, 5, 10
FEW = f"""--max_train_steps 3 --selection_share 0.67 --train_batch_size 8 --bank_size {BANK}
    --bank_batch 4 --sampling_steps {K} --timestep_shift {SHIFT} --min_time 0.15
    --checkpointing_steps 1000 --max_grad_norm 1e9 --lr_warmup_steps 0 --ema_decay 0
    --state part --weight eq13 --objective adm --alpha 4 2 --r_init 0.8 --learning_rate 1e-3
    --learning_rate_r 0.02 --selection_weight 0.05 --teacher_steps 2 --preview_samples 3""".split()
GUIDED = ["--guidance_scale", "2.5", "--uncond_share", "0.4"]
POLICY = "--state policy --weight velocity --own_trajectories 6 --fresh 3 --fresh_every 1"
PULLS = ["r_objective", "r_constraint", "r_regularizer"]
OF_ADM = "--state part --weight eq13 --objective adm".split()
TINY = dict(size=(4, 4), patch=(2, 2), channels=1, dim=32, depth=4, num_classes=3)


def few_for(flags):
    """FEW, without what only adm reads where the flags ask for another objective."""
    other = any(f" --objective {name}" in " ".join(["", *flags]) for name in ("mse", "dmd"))
    at = FEW.index(OF_ADM[0])
    return FEW[:at] + FEW[at + len(OF_ADM) :] if other else FEW


def save_dit(folder, **changes):
    """A tiny DiT with noise on every weight, 4 tokens, 3 classes -> its folder."""
    torch.manual_seed(0)
    net = perturbed(DiT(**{**TINY, **changes}), std=0.2)
    save_network(net, network_config(net), str(folder))
    return str(folder)


def wan_flags(root):
    root.mkdir(exist_ok=True)
    flags = save_tiny_wan(root)
    for name in ("--student_steps", "--learning_rate_fake"):
        at = flags.index(name)
        del flags[at : at + 2]
    return flags


class Diary:
    """What a run of linvideo.main did.

    student, teacher, critic: its networks; `updates`: for every update what it was, the networks
    and all gradients then, the rates, and the calls of networks since the update before; `losses`:
    the names of the losses that were called; `trajectories`: how many files of the bank were made.
    """

    def __init__(self, monkeypatch):
        self.updates, self.calls, self.losses, self.trajectories = [], [], [], 0
        self.student = self.teacher = self.critic = None
        quiet(monkeypatch)
        wrap = DmdDiary.wrap
        wrap(monkeypatch, linvideo, "mix_attention", self.on_mix_attention)
        wrap(monkeypatch, linvideo, "freeze_teacher", self.on_freeze_teacher)
        wrap(monkeypatch, linvideo, "flow_matching_loss", self.on_flow_matching_loss)
        wrap(monkeypatch, linvideo, "trajectory", self.on_trajectory)
        wrap(monkeypatch, Run, "update", self.on_update)
        for name in ("adm_loss", "adm_variant_loss", "regression_loss", "dmd_baseline_loss"):
            wrap(monkeypatch, linvideo, name, self.counted(name))

    def counted(self, name):
        return lambda real, *args: self.losses.append(name) or real(*args)

    def watch(self, who, net):
        setattr(self, who, net)

        def on_call(it, args, cond, output):
            if it is getattr(self, who):  # and not a copy of it
                graph = torch.is_grad_enabled()
                call = dict(who=who, x=args[0].detach(), t=args[1], graph=graph, cond=cond)
                self.calls.append(types.SimpleNamespace(**call))

        net.register_forward_hook(on_call, with_kwargs=True)

    def on_mix_attention(self, real, net, *rest):
        self.watch("student", net)
        return real(net, *rest)

    def on_freeze_teacher(self, real, run, teacher):
        self.watch("teacher", teacher.net)
        return real(run, teacher)

    def on_flow_matching_loss(self, real, net, x0, *rest):
        assert not x0.requires_grad
        if self.critic is None:
            self.watch("critic", net)
        return real(net, x0, *rest)

    def on_trajectory(self, real, *args, **more):
        self.trajectories += not more  # else the student's own
        return real(*args, **more)

    def on_update(self, real, run, optimizer, what):
        names = [who for who in ("student", "critic", "teacher") if getattr(self, who)]
        nets, gradients = {who: getattr(self, who) for who in names}, {}
        for who, net in nets.items():
            named = net.named_parameters()
            gradients[who] = {k: None if p.grad is None else p.grad.clone() for k, p in named}
        groups = [[g["lr"], g["weight_decay"], list(g["params"])] for g in optimizer.param_groups]
        nets = {who: copy.deepcopy(net) for who, net in nets.items()}
        update = dict(what=what, calls=self.calls, groups=groups, nets=nets, grads=gradients)
        self.updates.append(types.SimpleNamespace(**update))
        self.calls = []
        return real(run, optimizer, what)

    def of(self, what):
        return [u for u in self.updates if u.what == what]


def run(monkeypatch, folder, *flags):
    diary = Diary(monkeypatch)
    linvideo.main(["--output_dir", str(folder), *few_for(flags), *flags])
    return diary


def read_bank(folder):
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {k: torch.cat([f[k] for f in files]) for k in files[0]}


# ---- every update once more ----------------------------------------------------------------------


def one_of(bank, row):
    """A trajectory of a bank, {name: (...)}."""
    return {name: tensor[row] for name, tensor in bank.items()}


class Update:
    """A micro-batch of an update from its draws, in other words than linvideo.py's.

    own: the student's trajectories before this update, the first one first, for --state policy.
    """

    def __init__(self, args, bank, draw, own=()):
        self.args, self.bank, self.draw, self.B = args, bank, draw, len(draw.rows)
        self.grid, self.own = torch.tensor([shift(1 - i / K, SHIFT) for i in range(K + 1)]), own

    def trajectories(self):
        """The trajectory of every row: one of the bank, or of the latest of student and bank."""
        if self.args.state != "policy":
            row = self.draw.integer("trajectory", BANK)
            return [one_of(self.bank, r) for r in row]
        endless = [*reversed(self.own), *(one_of(self.bank, r % BANK) for r in range(99))]
        row = self.draw.integer("trajectory", self.args.own_trajectories)
        return [endless[r] for r in row]

    def state(self, every=False):
        a, adm = self.args, self.args.objective.startswith("adm")
        last = K - 1 if adm and a.state in ("part", "step", "rollout") and not every else K
        i = (self.draw.spread("state") * last).floor().long().clamp(max=last - 1)
        rows = self.trajectories()
        x, v = (torch.stack([r[k][j].float() for r, j in zip(rows, i)]) for k in ("x", "v"))
        label = torch.stack([r["index"] for r in rows])
        if a.guidance_scale != 1:
            none = self.draw.uniform("drop") < a.uncond_share
            label[none] = 3
            of_none = torch.stack([r["v_uncond"][j].float() for r, j in zip(rows, i)])
            v[none] = of_none[none]
        return i, x, v, label

    def some_unconditional(self, label):
        """With guidance some rows are asked, and scored, without their condition."""
        if self.args.guidance_scale == 1:
            return label
        return torch.where(self.draw.uniform("drop") < self.args.uncond_share, 3, label)

    def roll_out(self, student, times, label, scale=None):
        """-> states at all of these times. scale: None: --guidance_scale."""
        x, scale = [self.draw.normal("z", (1, 4, 4))], scale or self.args.guidance_scale
        with torch.no_grad():
            for t, s in zip(times[:-1], times[1:]):
                at = torch.full((self.B,), float(t))
                v = student(x[-1], at, label=label)
                if scale != 1:
                    none = student(x[-1], at, label=torch.full_like(label, 3))
                    v = none + scale * (v - none)
                x.append(x[-1] + (float(s) - float(t)) * v)
        return x

    def x_hat(self, student):
        """-> x_hat, its time, labels."""
        if self.args.state == "rollout":
            i = 1 + (self.draw.spread("i") * (K - 2)).floor().long().clamp(max=K - 3)
            label = self.draw.integer("cond", 3)
            x = torch.stack(self.roll_out(student, self.grid, label), 1)[range(self.B), i]
            label = self.some_unconditional(label)
        else:
            i, x, _, label = self.state()
        t, s = self.grid[i], self.grid[i + 1]
        if self.args.state == "part":
            s = t - self.args.part * self.draw.uniform("part") * (t - s)
        if self.args.state == "jump":
            s = shift((1 - i / K) * self.draw.uniform("jump"), SHIFT)
        s = s if self.args.state == "rollout" else s.clamp(min=self.args.min_time)
        v_hat = student(x, t, label=label)
        return v_hat, x - expand(t - s, x) * v_hat, s, label

    def student_loss(self, student, teacher, critic):
        """-> loss with the right gradient and value, mean square of g, both velocities' scores."""
        a = self.args
        if a.objective == "mse" or a.state == "policy":
            i, x, v, label = self.state()
            own = student(x, self.grid[i], label=label)
            g = own - v
            return g.square().mean() / 2, g.detach().square().mean(), *scores(v, own)
        if a.objective == "dmd":
            return self.dmd_loss(student, teacher, critic)
        v_hat, x, s, label = self.x_hat(student)
        with torch.no_grad():
            at, score = expand(s, x), student if critic is None else critic
            v, own = teacher(x, s, label=label), score(x, s, label=label)
            if a.weight == "velocity":
                x, g = v_hat, own - v
            elif a.weight == "dmd":
                g = at * (v - own) / (at * (v - own)).abs().mean((1, 2, 3), keepdim=True)
            elif a.weight == "unit":
                g = v - own
            else:  # the difference of two scores
                g = (-(x + (1 - at) * own) + (x + (1 - at) * v)) / at
        loss, square = self.surrogate(x, g)
        if a.regression_weight:
            i, x_t, v_t, label = self.state()
            error = student(x_t, self.grid[i], label=label) - v_t
            loss = loss + a.regression_weight * error.square().mean() / 2
        return loss, square, *scores(v, own)

    def dmd_loss(self, student, teacher, critic):
        i, x, _, label = self.state()
        x0 = x - expand(self.grid[i], x) * student(x, self.grid[i], label=label)
        t = shift(self.draw.uniform("u", 0.02, 0.98), SHIFT)
        eps, at = self.draw.normal("eps", (1, 4, 4)), expand(t, x)
        with torch.no_grad():
            x_t = (1 - at) * x0 + at * eps
            v, own = (net(x_t, t, label=label) for net in (teacher, critic))
            real, fake = (x_t - at * velocity for velocity in (v, own))
            g = (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)
        return *self.surrogate(x0, g), *scores(v, own)

    @staticmethod
    def surrogate(x, g):
        value = g.square().mean() / 2
        return (x * g).mean() - (x * g).mean().detach() + value, g.square().mean()

    def critic_loss(self, student, critic):
        with torch.no_grad():
            if self.args.objective == "dmd":
                i, x, _, label = self.state()
                x0 = x - expand(self.grid[i], x) * student(x, self.grid[i], label=label)
            else:
                label = self.some_unconditional(self.draw.integer("cond", 3))
                coarse = step_grid(self.args.critic_steps, SHIFT)
                x0 = self.roll_out(student, coarse, label, scale=1)[-1]  # as the teacher's velocity
        t = shift(self.draw.uniform("u", 0.02, 0.98), SHIFT)
        eps = self.draw.normal("eps", (1, 4, 4))
        x_t = x0 + expand(t, x0) * (eps - x0)
        return (critic(x_t, t, label=label) - eps + x0).square().mean()


def scores(v, own):
    """Cosine and relative gap of the student's velocity, or its critic's, and the teacher's."""
    v, own = v.flatten(1), own.detach().flatten(1)
    cosine = (v * own).sum(1) / (v.norm(dim=1) * own.norm(dim=1))
    return cosine.mean(), ((own - v).norm(dim=1) / v.norm(dim=1)).mean()


def assert_gradients(got, loss, net):
    """got {name: gradient or None} is the loss's gradient in net.  -> its norm."""
    parameters = {k: p for k, p in net.named_parameters() if p.requires_grad}
    want = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    want = dict(zip(parameters, want))
    norm = torch.stack([w.norm() for w in want.values() if w is not None]).norm()
    assert norm > 1e-4
    for k, _ in net.named_parameters():
        if want.get(k) is None:
            assert got[k] is None or not got[k].any(), k
        else:
            near = dict(rtol=2e-3, atol=float(2e-5 * norm))
            torch.testing.assert_close(got[k], want[k], **near, msg=lambda m, k=k: f"{k}: {m}")
    return norm


CASES = [
    "",
    "--part 0.3",
    "--state step --regression_weight 0.5",
    "GUIDED --regression_weight 2",
    "--state step",
    "--state jump",
    "--state rollout",
    "--weight unit",
    "--weight dmd",
    "--weight velocity",
    "--weight velocity --state step --regression_weight 0.5",
    "POLICY",
    "POLICY --fresh_every 2 --own_trajectories 4 --gradient_accumulation_steps 2",
    "GUIDED POLICY --selection_share 0",
    "--count soft",
    "--count soft --objective mse",
    "--objective adm_critic --critic_steps 3",
    "--objective dmd",
    "GUIDED",
    "GUIDED --objective mse",
    "GUIDED --state rollout",
    "GUIDED --objective adm_critic --state step --critic_steps 3",
    "--no_regularizer --gradient_accumulation_steps 2 --seed 3",
    "--objective dmd --gradient_accumulation_steps 2 --fake_update_ratio 2",
    "--feature_map elu",
    "--feature_map relu",
    "--feature_map softmax",
    "--select 3 0",
    "--select last --objective mse",
]


class Case:
    """A run of one of the CASES, and what its checks need."""

    def __init__(self, monkeypatch, tmp_path, case):
        flags = case.replace("GUIDED", " ".join(GUIDED)).replace("POLICY", POLICY).split()
        self.folder, self.teacher_folder = tmp_path / "run", save_dit(tmp_path / "teacher")
        self.diary = run(monkeypatch, self.folder, "--teacher", self.teacher_folder, *flags)
        start = ["--teacher", self.teacher_folder, *few_for(flags)]
        self.args = linvideo.parse_args([*start, *flags])
        self.bank, self.rows = read_bank(self.folder / "bank"), read_log(self.folder)
        self.teacher = load_network(self.teacher_folder)[0]
        self.micro = self.args.gradient_accumulation_steps
        self.selected = self.args.select == ["learned"]
        self.end = min(int(3 * self.args.selection_share), 2)
        self.has_critic = self.args.objective in ("adm_critic", "dmd")

    def batches(self, step, inner):
        rows = [range(8 * m, 8 * m + 8) for m in range(self.micro)]
        draws = [Draws(self.args.seed, step, inner, r, total=8 * self.micro) for r in rows]
        return [Update(self.args, self.bank, draw, self.own(step)) for draw in draws]

    def own(self, step):
        """The trajectories that the student has made before this update, each from its number."""
        a, made = self.args, []
        for earlier in range(0, step, a.fresh_every) if a.state == "policy" else ():
            student = self.diary.of("student")[earlier].nets["student"]
            draw = Draws(a.seed, "own", 0, range(len(made), len(made) + a.fresh))
            at, label = Update(a, self.bank, draw), draw.integer("cond", 3)
            x = torch.stack(at.roll_out(student, at.grid, label)[:-1], 1)  # (fresh, K, ...)
            found = {"x": x, **self.teachers_velocities(x, at.grid, label)}
            found = {"index": label, **{name: value.half() for name, value in found.items()}}
            made += [one_of(found, i) for i in range(a.fresh)]
        return made

    def teachers_velocities(self, x, grid, label):
        labels = {"v": label, "v_uncond": torch.full_like(label, 3)}
        with torch.no_grad():
            return {
                name: torch.stack(
                    [self.teacher(x[:, i], grid[i].expand(len(x)), label=y) for i in range(K)], 1
                )
                for name, y in labels.items()
            }

    def check_critic(self, step):
        """-> the critic's loss in this step, a mean over its R updates."""
        ratio, losses = self.args.fake_update_ratio, []
        for inner, c in enumerate(self.diary.of("critic")[step * ratio : (step + 1) * ratio]):
            student, critic = c.nets["student"], c.nets["critic"]
            parts = [batch.critic_loss(student, critic) for batch in self.batches(step, inner)]
            loss = sum(parts) / self.micro
            assert_gradients(c.grads["critic"], loss, critic)
            assert all(g is None for who in ("student", "teacher") for g in c.grads[who].values())
            losses.append(loss.item())
        return sum(losses) / len(losses)

    def check_student(self, step):
        """Gradients and the row of the log."""
        u, a = self.diary.of("student")[step], self.args
        student, critic = u.nets["student"], u.nets.get("critic")
        batches = self.batches(step, "student")
        losses = [batch.student_loss(student, self.teacher, critic) for batch in batches]
        loss, square, *of_v = (sum(values) / self.micro for values in zip(*losses))
        mixed = [place.attend for place in student.self_attentions]
        want = {"step": step + 1, "loss": loss.item(), "g": square.sqrt().item()}
        want |= {name: x.item() for name, x in zip(("dm_cos", "dm_rel_gap"), of_v)}
        if self.has_critic:
            want["loss_fake"] = self.check_critic(step)
        if self.selected and step < self.end:
            r, alpha = torch.stack([m.r for m in mixed]), 4.0 - 2.0 * step
            soft = a.count == "soft"
            count = (1 - r).sum().item() if soft else int((r < 0.5).sum())
            power = (2 * r - 1).sign() * (2 * r - 1).abs() ** (alpha - 1)
            pulls = [
                torch.stack(torch.autograd.grad(loss, [m.r for m in mixed], retain_graph=True)),
                0.05 * -2 * (count - 2) * torch.ones(4),
                0.05 * -2 * alpha * power,
            ]
            want |= {name: pull.norm().item() for name, pull in zip(PULLS, pulls)}
            pull = pulls[1] + (0 if a.no_regularizer else pulls[2])
            loss = loss + (pull.detach() * r).sum()
        else:
            want |= dict.fromkeys(PULLS, 0.0)
            assert sorted(m.r.item() for m in mixed) == [0, 0, 1, 1]
            assert all(m.only and m.r.grad is None for m in mixed)
        want["norm_student"] = assert_gradients(u.grads["student"], loss, student).item()
        log = {k: float(v) for k, v in self.rows[step].items()}
        assert {k: log[k] for k in want} == pytest.approx(want, rel=1e-3, abs=1e-6)
        after = {0: self.diary.of("student")[1].nets["student"], 2: self.diary.student}.get(step)
        if after:
            now = [place.attend.r.item() for place in after.self_attentions]
            assert [log[f"r_{i}"] for i in range(4)] == pytest.approx(now, abs=1e-5)
        others = [u.grads[who] for who in ("teacher", "critic") if who in u.grads]
        assert all(g is None for grads in others for g in grads.values())

    def check_calls(self, step):
        """The student once with a graph, once more for its own score; no teacher in regression."""
        u, a = self.diary.of("student")[step], self.args
        student, teacher, critic = (
            [c for c in u.calls if c.who == who] for who in ("student", "teacher", "critic")
        )
        guided = 1 if a.guidance_scale == 1 else 2
        rolled = K - 1 if a.state == "rollout" else 0
        # the velocity's error before and after the end of the selection
        check = 2 * 32 if self.selected and step == self.end and not self.has_critic else 0
        policy = a.state == "policy"
        fresh = K * guided if policy and step % a.fresh_every == 0 else 0
        own = a.objective == "adm" and not policy
        assert len(student) == self.micro * (guided * rolled + 1 + own) + check + fresh
        assert len(critic) == self.micro * self.has_critic
        # the bank's three files, and a trial
        made = 3 * K * guided + 1 if step == 0 and not self.has_critic else 0
        asked = a.objective != "mse" and not policy
        assert len(teacher) == self.micro * asked + made + fresh
        assert [c.graph for c in student].count(True) == self.micro
        assert not any(c.graph for c in teacher + critic)
        if a.objective.startswith("adm") and not policy:
            score, frozen = (critic if self.has_critic else student)[-1], teacher[-1]
            assert torch.equal(score.x, frozen.x) and torch.equal(score.t, frozen.t)
            assert score.t.min() >= 0.15 - 1e-7


@pytest.mark.parametrize("flags", CASES)
def test_gradients_and_calls(monkeypatch, tmp_path, flags):
    """Every update of critic and student from the draws and the bank's files alone.

    While layers are selected the count and the regulariser pull on r, after that exactly two layers
    are linear. Also the log's columns, who is called, how often, and with a graph or not.
    """
    case = Case(monkeypatch, tmp_path, flags)
    diary, args = case.diary, case.args
    turns = ["critic"] * args.fake_update_ratio * case.has_critic + ["student"]
    assert [u.what for u in diary.updates] == turns * 3
    for step in range(3):
        case.check_student(step)
        case.check_calls(step)
    plain = args.objective == "adm" and args.weight == "eq13" and not args.regression_weight
    names = {"mse": "regression_loss", "dmd": "dmd_baseline_loss"}
    name = names.get(args.objective, "adm_loss" if plain else "adm_variant_loss")
    name = "regression_loss" if args.state == "policy" else name
    assert diary.losses == [name] * 3 * case.micro
    columns = {"step", "loss", "g", "norm_student", *PULLS, "r_0", "r_1", "r_2", "r_3", "seconds"}
    columns |= {"dm_cos", "dm_rel_gap"}
    columns |= {"loss_fake", "norm_critic"} if case.has_critic else set()
    assert set(case.rows[0]) == columns | {"peak_memory_mb"}
    linear = load_json(str(case.folder / "student" / "config.json"))["linear_layers"]
    assert linear == [i for i in range(4) if float(case.rows[2][f"r_{i}"]) == 0]
    assert len(linear) == 2
    assert case.selected or linear == ([2, 3] if "last" in flags else [0, 3])
    assert (case.folder / "selection.json").exists() == case.selected
    assert_bit_equal(dict(diary.teacher.state_dict()), load_file(tmp_path / "teacher" / WEIGHTS))
    of_teacher = {p.data_ptr() for p in diary.teacher.parameters()}
    assert not of_teacher & {p.data_ptr() for p in diary.student.parameters()}
    if not case.selected:
        assert not any(place.attend.r.requires_grad for place in diary.student.self_attentions)


@pytest.mark.parametrize("flags", [[], GUIDED], ids=" ".join)
def test_bank_is_the_teachers_trajectories(monkeypatch, tmp_path, flags):
    """Row by row: noise and label from the row's own draws, all Euler steps, in half precision.

    bank.json says with what it was made.
    """
    folder, bank_folder = save_dit(tmp_path / "teacher"), tmp_path / "run" / "bank"
    short = ["--max_train_steps", "1", "--seed", "4"]
    diary = run(monkeypatch, tmp_path / "run", "--teacher", folder, *short, *flags)
    teacher, bank = diary.teacher, read_bank(bank_folder)
    files = [f"0000{i}.safetensors" for i in range(3)]
    assert [p.name for p in sorted(bank_folder.iterdir())] == [*files, "bank.json"]
    names = ("x", "v", *(["v_uncond"] if flags else []))
    dtypes = {"index": torch.int64, **dict.fromkeys(names, torch.float16)}
    assert {k: v.dtype for k, v in bank.items()} == dtypes
    draw = Draws(4, "bank", 0, range(BANK))
    x, label = draw.normal("z", (1, 4, 4)), draw.integer("cond", 3)
    assert torch.equal(bank["index"], label)
    for i in range(K):
        t, s = (shift(1 - j / K, SHIFT) for j in (i, i + 1))
        at, unconditional = torch.full((BANK,), t), torch.full((BANK,), 3)
        with torch.no_grad():
            v, none = (teacher(x, at, label=y) for y in (label, unconditional))
        for name, want in zip(names, (x, v, none)):
            torch.testing.assert_close(bank[name][:, i].float(), want, rtol=2e-3, atol=2e-3)
        x = x + (s - t) * (none + 2.5 * (v - none) if flags else v)
    assert load_json(str(bank_folder / "bank.json")) == {
        "teacher": weights_hash(folder),
        "trajectories": BANK,
        "grid": step_grid(K, SHIFT),
        "guidance_scale": 2.5 if flags else 1.0,
        "seed": 4,
        "shape": [1, 4, 4],
        "prompts": None,
        "batch": 4,
    }


# ---- the selection -------------------------------------------------------------------------------


def selection_run(monkeypatch, folder, *flags):
    long = ["--max_train_steps", "24", "--selection_share", "0.92"]
    strong = ["--selection_weight", "1", "--learning_rate_r", "0.05"]
    return run(monkeypatch, folder, *long, *strong, *flags)


# r_init, alpha (None: the default, which is 20 2 for one or two layers), target, whether r moves
STARTS = [
    ("0.9", ["4", "2"], 4, True),
    ("1", ["3.5", "2"], 4, True),
    ("1", ["20", "8"], 4, False),
    ("0.9", None, 2, True),
    ("0.9", ["4", "2"], 2, False),
]
MORE_STARTS = [
    ("0.9", None, 5, True),
    ("0.9", None, 1, True),
    ("0.9", ["20", "2"], 2, True),
    ("0.7", None, 1, True),
]
STARTS += [pytest.param(*start, marks=pytest.mark.long) for start in MORE_STARTS]


@pytest.mark.parametrize("init, alpha, target, moves", STARTS)
def test_r_moves_before_the_layers_are_fixed(
    monkeypatch, tmp_path, capsys, init, alpha, target, moves
):
    """By the end of the selection layers have crossed one half, and it is r that decides.

    Exactly `target` layers with the smallest r end linear; selection.json has what was before. From
    r = 1 they move where the target is above alpha; where it is below none ever leaves, which the
    run says. From .9 they leave an alpha of 20 for any target, but not one of 4 for two layers.
    """
    if alpha is None:  # FEW without its alpha
        at = FEW.index("--alpha")
        monkeypatch.setattr(sys.modules[__name__], "FEW", FEW[:at] + FEW[at + 3 :])
    flags = ["--teacher", save_dit(tmp_path / "teacher", depth=6), "--r_init", init]
    flags += ["--alpha", *alpha] if alpha else []
    flags += ["--target_layers", str(target)]
    diary = selection_run(monkeypatch, tmp_path / "run", *flags)
    says = "the regulariser holds every r at 1" in capsys.readouterr().out
    assert says == (not moves)
    log = read_log(tmp_path / "run")
    rows = [[float(row[f"r_{i}"]) for i in range(6)] for row in log]
    found = load_json(str(tmp_path / "run" / "selection.json"))
    assert found["update"] == 22 and found["r"] == pytest.approx(rows[21], abs=1e-5)
    assert all(0 <= x <= 1 for row in rows for x in row)
    assert found["linear_by_rounding"] == sum(x < 0.5 for x in found["r"])
    assert found["undecided"] == sum(0.1 < x < 0.9 for x in found["r"])
    assert (min(map(min, rows[:22])) < 0.5) == moves
    assert moves or found["r"] == [1.0] * 6 or init == "0.9"
    by_r = sorted(range(6), key=lambda i: found["r"][i])
    linear = found["linear_layers"]
    assert linear == sorted(by_r[:target]) == [i for i in range(6) if rows[-1][i] == 0]
    for row in rows[22:]:
        assert row == rows[-1] and set(row) <= {0, 1} and row.count(0) == target
    assert found["velocity_error_before"] != found["velocity_error_after"]
    kinds = ["linear" if i in linear else "softmax" for i in range(6)]
    assert [m.attend.only for m in diary.student.self_attentions] == kinds


def test_velocity_error_of_the_selection(monkeypatch, tmp_path):
    """Mean square over 256 states of the bank, of the student as it was and as it is fixed."""
    folder = save_dit(tmp_path / "teacher")
    diary = run(monkeypatch, tmp_path / "run", "--teacher", folder, "--train_batch_size", "64")
    args = linvideo.parse_args(["--teacher", folder, *FEW])
    bank = read_bank(tmp_path / "run" / "bank")
    found = load_json(str(tmp_path / "run" / "selection.json"))
    fixed = diary.of("student")[2].nets["student"]
    mixed = copy.deepcopy(fixed)
    for i, place in enumerate(mixed.self_attentions):
        place.attend.only = None
        place.attend.r.fill_(found["r"][i])
    at = Update(args, bank, Draws(0, "check", 0, range(256)))
    i, x, v, label = at.state(every=True)
    for net, name in ((mixed, "velocity_error_before"), (fixed, "velocity_error_after")):
        with torch.no_grad():
            error = (net(x, at.grid[i], label=label) - v).square().mean().item()
        assert found[name] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("parts, B", [(1, 64), (2, 64), (3, 50), (5, 64)])
def test_velocity_error_is_of_the_same_states_on_any_ranks(monkeypatch, parts, B):
    """Parts of 256 that end unevenly: every state counts once, whoever has it."""
    seen = []

    def bank_states(args, draw, *_):
        at = 1 + torch.tensor(list(draw.rows))[:, None] / 256
        return at, torch.zeros_like(at), None, None, None

    def velocity(net, x_t, *_):
        seen.append(len(x_t))
        return x_t

    monkeypatch.setattr(linvideo, "bank_states", bank_states)
    monkeypatch.setattr(linvideo, "velocity", velocity)
    total, args = 0, types.SimpleNamespace(seed=0)
    for part in range(parts):
        rank = types.SimpleNamespace(args=args, device="cpu", parts=parts, part=part, B=B)
        rank.autocast, rank.mean_over_ranks = contextlib.nullcontext, lambda x: [float(x)]
        total += linvideo.velocity_error(rank, None, types.SimpleNamespace(shape=(1,)), None, None)
    want = (1 + torch.arange(256) / 256).square().mean()
    assert total / parts == pytest.approx(float(want), rel=1e-5)
    assert len(seen) % parts == 0, "networks that are shared out are called as often on all ranks"


def test_end_of_the_selection(monkeypatch, tmp_path):
    """It ends before update share * steps: at the latest before the last, or before the first."""
    teacher = save_dit(tmp_path / "teacher")
    for share, steps, first_fixed in (("0", 3, 0), ("0.5", 4, 2), ("1", 3, 2), ("0.67", 1, 0)):
        flags = ["--selection_share", share, "--max_train_steps", str(steps)]
        with monkeypatch.context() as m:
            diary = run(m, tmp_path / "run", "--teacher", teacher, *flags)
        students = [u.nets["student"] for u in diary.of("student")]
        fixed = [all(p.attend.only for p in net.self_attentions) for net in students]
        assert fixed == [step >= first_fixed for step in range(steps)]


# ---- rates, averages, precision ------------------------------------------------------------------


def test_rates_and_groups(monkeypatch, tmp_path):
    """Warm-up for all rates; in the last share of the run they fall to 0, but not r's.

    Features have the network's rate while layers are selected (5 updates of 8). Weight decay is for
    the weights of the network alone.
    """
    flags = """--max_train_steps 8 --lr_warmup_steps 2 --lr_decay_share 0.5 --learning_rate 1e-3
        --learning_rate_features 2e-3 --learning_rate_r 2e-3 --learning_rate_fake 4e-3
        --weight_decay 0.1 --objective adm_critic --critic_steps 1 --train_batch_size 2""".split()
    teacher = save_dit(tmp_path / "teacher")
    diary = run(monkeypatch, tmp_path / "run", "--teacher", teacher, *flags)
    names = {id(p): k for k, p in diary.student.named_parameters()}
    r = {f"blocks.{i}.attend.r" for i in range(4)}
    features = {f"blocks.{i}.attend.linear.w_{x}" for i in range(4) for x in "qk"}
    for step, (u, c) in enumerate(zip(diary.of("student"), diary.of("critic"))):
        warm, fall = min(1, (step + 1) / 2), min(1, (8 - step) / 4)
        of_features = 1e-3 if step < 5 else 2e-3
        rates = [1e-3 * warm * fall, of_features * warm * fall, 2e-3 * warm]
        assert [g[0] for g in u.groups] == pytest.approx(rates)
        assert [g[0] for g in c.groups] == pytest.approx([4e-3 * warm * fall])
        assert [g[1] for g in u.groups] == [0.1, 0, 0] and [g[1] for g in c.groups] == [0.1]
        groups = [{names[id(p)] for p in g[2]} for g in u.groups]
        assert groups == [set(names.values()) - features - r, features, r]
        assert sum(len(g[2]) for g in u.groups) == len(names)
        assert {id(p) for p in c.groups[0][2]} == {id(p) for p in diary.critic.parameters()}


def test_average_of_the_weights(monkeypatch, tmp_path):
    """--ema_decay: the average with its warm-up is saved, weights and features.

    Its linear layers are those that the student itself has chosen.
    """
    flags = """--ema_decay 0.6 --max_train_steps 5 --learning_rate 1e-2
        --learning_rate_features 0.05""".split()
    folder = tmp_path / "run"
    diary = run(monkeypatch, folder, "--teacher", save_dit(tmp_path / "teacher"), *flags)
    students = [u.nets["student"] for u in diary.of("student")] + [diary.student]
    states = [net.state_dict() for net in students]
    average = {k: v.clone() for k, v in states[0].items()}
    for step, now in enumerate(states[1:]):
        decay = min(0.6, (1 + step) / (4 + step))
        average = {k: decay * average[k] + (1 - decay) * now[k] for k in average}
    saved = load_file(folder / "student" / WEIGHTS)
    linear = load_json(str(folder / "student" / "config.json"))["linear_layers"]
    assert linear == load_json(str(folder / "selection.json"))["linear_layers"]
    own = [f"blocks.{i}.attend.w_{x}" for i in linear for x in "kq"]
    assert sorted(k for k in saved if ".attend." in k) == own
    for k, v in saved.items():
        torch.testing.assert_close(v, average[k.replace(".attend.", ".attend.linear.")])
    assert not torch.allclose(saved["final.weight"], states[-1]["final.weight"], rtol=1e-3)
    net, config = load_network(str(folder / "student"))
    assert config["feature_map"] == "hedgehog"
    assert isinstance(net.blocks[linear[0]].attend, LinearAttention)


def test_student_init(monkeypatch, tmp_path):
    """The student starts from another network of the teacher's shapes; teacher and critic do not.

    What is saved has that network's weights where the run has not moved them.
    """
    teacher = save_dit(tmp_path / "teacher")
    other = perturbed(load_network(teacher)[0], seed=7)
    save_network(other, network_config(other), str(tmp_path / "other"))
    flags = ["--student_init", str(tmp_path / "other"), "--objective", "adm_critic"]
    diary = run(monkeypatch, tmp_path / "run", "--teacher", teacher, *flags)
    start = diary.updates[0].nets
    mixed = start["student"].state_dict()
    assert all(torch.equal(mixed[k], v) for k, v in other.state_dict().items())
    assert_bit_equal(dict(start["critic"].state_dict()), load_file(f"{teacher}/{WEIGHTS}"))
    assert_bit_equal(dict(diary.teacher.state_dict()), load_file(f"{teacher}/{WEIGHTS}"))


@pytest.mark.parametrize("rank", ["0", "2"])
def test_networks_that_are_needed_once_do_not_stay(monkeypatch, tmp_path, rank):
    """The copy that a save converts, when the next one does, and the network of --student_init."""
    quiet(monkeypatch)
    copies, starts, alive = [], [], []

    def on_convert(real, *args):
        gc.collect()
        alive.append([sum(r() is not None for r in found) for found in (copies, starts)])
        net = real(*args)
        copies.append(weakref.ref(net))
        return net

    def on_start(real, run, teacher):
        net = real(run, teacher)
        if net is not teacher.base:
            starts.append(weakref.ref(net))
        return net

    DmdDiary.wrap(monkeypatch, linvideo, "convert", on_convert)
    DmdDiary.wrap(monkeypatch, linvideo, "starting_network", on_start)
    flags = ["--teacher", save_dit(tmp_path / "teacher"), "--lora_rank", rank]
    if rank == "0":
        flags += ["--student_init", save_dit(tmp_path / "start")]
    more = [*few_for(flags), "--checkpointing_steps", "1", "--output_dir", str(tmp_path / "run")]
    linvideo.main([*flags, *more])
    assert len(starts) == (rank == "0") and alive == [[0, 0]] * 4


@pytest.mark.parametrize("rank", ["0", "2"])
def test_the_copy_of_a_save_is_planned(tmp_path, rank):
    """A whole network also where adapters are trained, since student/ has no adapter."""
    flags = ["--teacher", save_dit(tmp_path / "teacher"), "--lora_rank", rank]
    args = linvideo.parse_args(flags)
    plan = planned(args, *linvideo.cost(args), attention=True)
    assert plan.disk()["student"] == 4 * plan.costs["converted"].parameters
    assert plan.of_save() > 4 * plan.costs["teacher"].parameters


def test_gradient_checkpointing_changes_nothing(monkeypatch, tmp_path):
    teacher, runs = save_dit(tmp_path / "teacher"), []
    for name, flags in (("a", []), ("b", ["--gradient_checkpointing"])):
        with monkeypatch.context() as m:
            runs.append(run(m, tmp_path / name, "--teacher", teacher, *flags))
    assert runs[1].student.gradient_checkpointing and not runs[0].student.gradient_checkpointing
    for a, b in zip(runs[0].updates, runs[1].updates):
        for k, g in a.grads["student"].items():
            other = b.grads["student"][k]
            assert g is other is None or torch.allclose(g, other, rtol=1e-4, atol=1e-7), k


@pytest.mark.parametrize("kind", ["dit", "wan", "policy"])
def test_low_precision(monkeypatch, tmp_path, kind):
    """Under bf16 autocast, bank included, all gradients are float32: of weights, r and features.

    Those of the first update differ from full precision's by rounding only.
    """
    if kind == "wan":
        teacher = wan_flags(tmp_path / "teacher")
    else:
        teacher = ["--teacher", save_dit(tmp_path / "teacher")]
    flags = [*teacher, "--target_layers", "1", "--guidance_scale", "2", "--r_init", "0.5"]
    flags += POLICY.split() if kind == "policy" else ["--objective", "mse"]
    runs = []
    for precision in ("no", "bf16"):
        with monkeypatch.context() as m:
            runs.append(run(m, tmp_path / precision, *flags, "--mixed_precision", precision))
    a, b = (r.updates[0].grads["student"] for r in runs)
    norm = torch.stack([g.norm() for g in a.values()]).norm()
    difference = torch.stack([(a[k] - b[k]).norm() for k in a]).norm()
    assert all(g.dtype == torch.float32 for g in b.values())
    assert 1e-4 * norm < difference < 0.3 * norm
    assert all(float(v) == float(v) for row in read_log(tmp_path / "bf16") for v in row.values())


# ---- resume --------------------------------------------------------------------------------------

RESUMED = (
    """--max_train_steps 6 --checkpointing_steps 2 --selection_share 0.5 --ema_decay 0.7
    --gradient_accumulation_steps 2 --train_batch_size 2""".split()
    + GUIDED
)


class Killed(Exception):
    pass


def killed_run(m, folder, stop, *flags):
    """A run that dies in the student's update number `stop`.  -> its diary."""
    diary = Diary(m)

    def update(real, run, optimizer, what):
        if what == "student" and len(diary.of("student")) == stop - 1:
            raise Killed
        return real(run, optimizer, what)

    DmdDiary.wrap(m, Run, "update", update)
    with pytest.raises(Killed):
        linvideo.main(["--output_dir", str(folder), *few_for(flags), *flags])
    assert len(diary.of("student")) == stop - 1
    return diary


CHANGED = [
    (["--state", "jump", "--weight", "unit"], "--state was "),
    (["--bank_size", "11"], "--bank_size"),
    (["--r_init", "0.7"], "--r_init"),
    (["--select", "first"], "--select"),
    (["--min_time", "0.05"], "--min_time was "),
]
INTERRUPTED = [
    [],
    pytest.param(["--objective", "adm_critic", "--critic_steps", "2"], marks=pytest.mark.long),
    ["--select", "2"],
    [*POLICY.split(), "--checkpointing_steps", "1"],
]


@pytest.mark.parametrize("flags", INTERRUPTED, ids=" ".join)
def test_an_interrupted_run_is_the_uninterrupted_one(monkeypatch, tmp_path, capsys, flags):
    """Stopped while layers are selected and after, bit for bit; the bank is not made again.

    Flags that alter the loss are refused by name.
    """
    flags = ["--teacher", save_dit(tmp_path / "teacher"), *RESUMED, *flags]
    again = [*flags, "--resume_from_checkpoint", "latest"]
    folder, whole = tmp_path / "run", tmp_path / "whole"
    with monkeypatch.context() as m:
        run(m, whole, *flags)
    for stop, saved in ((3, 2), (5, 4)):  # the selection ends before the fourth update
        with monkeypatch.context() as m:
            assert killed_run(m, folder, stop, *flags).trajectories == 3
        states = sorted(p.name for p in (folder / "state").iterdir())
        assert states[-1] == f"step-{saved:07d}"
        for changed, name in CHANGED if stop == 3 else ():
            start = ["--output_dir", str(folder), *FEW, *again]
            refused = refusal_of(capsys, linvideo.main, *start, *changed)
            other = "cannot resume with other flags" in refused and name in refused
            assert other or "it is for --state policy" in refused
        with monkeypatch.context() as m:
            diary = run(m, folder, *again)
        assert diary.trajectories == 0 and len(diary.of("student")) == 6 - saved
        assert_bit_equal(weights(folder), weights(whole))
        assert without_time(read_log(folder)) == without_time(read_log(whole))
        if "--select" not in flags:
            found = [load_json(str(f / "selection.json")) for f in (folder, whole)]
            assert found[0] == found[1]


def test_a_student_of_fewer_features_is_saved_as_it_was_trained(monkeypatch, tmp_path):
    """--feature_dim: the projections of student/ are those of the run, and its config says so."""
    flags = "--teacher", save_dit(tmp_path / "teacher"), "--feature_dim", "4"
    run(monkeypatch, tmp_path / "run", *flags)
    net, config = load_network(str(tmp_path / "run" / "student"))
    widths = {p.shape[-1] for name, p in net.named_parameters() if name.endswith(("w_q", "w_k"))}
    assert widths == {4} and config["feature_dim"] == 4


def test_a_bank_may_move(monkeypatch, tmp_path):
    """A run goes on with its own bank under another name, and makes none."""
    flags, folder = ["--teacher", save_dit(tmp_path / "teacher"), *RESUMED], tmp_path / "run"
    with monkeypatch.context() as m:
        assert killed_run(m, folder, 3, *flags).trajectories == 3
    (folder / "bank").rename(tmp_path / "bank")
    again = [*flags, "--bank", str(tmp_path / "bank"), "--resume_from_checkpoint", "latest"]
    with monkeypatch.context() as m:
        assert run(m, folder, *again).trajectories == 0
    assert not (folder / "bank").exists()


def test_resume_of_a_finished_run(monkeypatch, tmp_path):
    """It is written out again, also elsewhere, without a bank; a longer one keeps its layers."""
    flags, folder = ["--teacher", save_dit(tmp_path / "teacher"), *RESUMED], tmp_path / "run"
    with monkeypatch.context() as m:
        run(m, folder, *flags)
    chosen = load_json(str(folder / "student" / "config.json"))
    first = load_file(folder / "student" / WEIGHTS)
    state = str(folder / "state" / "step-0000006")
    for where in (folder, tmp_path / "elsewhere"):
        with monkeypatch.context() as m:
            diary = run(m, where, *flags, "--resume_from_checkpoint", state)
        assert not diary.updates and not diary.trajectories
        assert_bit_equal(load_file(where / "student" / WEIGHTS), first)
        assert load_json(str(where / "student" / "config.json")) == chosen
        assert (where / "r.png").exists() == (where == folder)
    longer = ["--resume_from_checkpoint", "latest", "--max_train_steps", "20"]
    with monkeypatch.context() as m:
        diary = run(m, folder, *flags, *longer)
    assert len(diary.updates) == 14
    places = [p for u in diary.updates for p in u.nets["student"].self_attentions]
    assert all(place.attend.only for place in places)
    assert load_json(str(folder / "student" / "config.json")) == chosen


def test_a_run_that_ends_while_it_selects(monkeypatch, tmp_path):
    """Shortened to where it was stopped, it has as many linear layers as the flags say."""
    flags, folder = ["--teacher", save_dit(tmp_path / "teacher"), *RESUMED], tmp_path / "cut"
    with monkeypatch.context() as m:
        killed_run(m, folder, 5, *flags, "--max_train_steps", "12")
    shorter = ["--resume_from_checkpoint", "latest", "--max_train_steps", "4"]
    with monkeypatch.context() as m:
        diary = run(m, folder, *flags, *shorter)
    assert not diary.updates
    assert len(load_json(str(folder / "student" / "config.json"))["linear_layers"]) == 2


def test_nan_stops_the_run(monkeypatch, tmp_path, capsys):
    """Exit code 1, one line, the last checkpoint as it was; the run goes on from there."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    flags = [*FEW, "--teacher", save_dit(tmp_path / "teacher")]
    flags += ["--max_train_steps", "6", "--checkpointing_steps", "2", "--output_dir"]
    calls = []

    def broken(real, *args):
        calls.append(0)
        loss, *more = real(*args)
        return loss * (float("nan") if len(calls) == 5 else 1.0), *more

    with monkeypatch.context() as m:
        quiet(m)
        DmdDiary.wrap(m, linvideo, "adm_loss", broken)
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: linvideo.main([*flags, str(folder)]))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and error.startswith("error: not finite at update 5: ")
    assert "loss = nan" in error and "norm_student = nan" in error
    states = [p.name for p in sorted((folder / "state").iterdir())]
    assert states == ["step-0000002", "step-0000004"]
    with monkeypatch.context() as m:
        quiet(m)
        linvideo.main([*flags, str(folder), "--resume_from_checkpoint", "latest"])
        linvideo.main([*flags, str(whole)])
    assert_bit_equal(weights(folder), weights(whole))


# ---- the bank on disk ----------------------------------------------------------------------------

OTHER_BANKS = [
    (["--seed", "1"], "seed"),
    (["--guidance_scale", "2"], "guidance_scale"),
    (["--sampling_steps", "4"], "grid"),
    (["--timestep_shift", "1"], "grid"),
    (["--bank_size", "9"], "trajectories"),
    (["--bank_batch", "5"], "batch"),
]


def test_banks_are_shared_and_others_refused(monkeypatch, tmp_path, capsys):
    """A bank serves every objective; other flags or another teacher are refused before training.

    A missing file is made again, and a broken one is named.
    """
    quiet(monkeypatch)
    bank = tmp_path / "bank"
    flags = ["--output_dir", str(tmp_path / "run"), *FEW, "--max_train_steps", "1"]
    flags += ["--bank", str(bank), "--teacher", save_dit(tmp_path / "teacher")]
    linvideo.main(flags)
    before = {p.name: p.read_bytes() for p in bank.iterdir()}
    (bank / "00001.safetensors").unlink()
    linvideo.main([*flags, "--state", "step"])
    assert {p.name: p.read_bytes() for p in bank.iterdir()} == before
    assert not (tmp_path / "run" / "bank").exists()
    other = save_dit(tmp_path / "other", channels=1, depth=2)
    for changed, name in (*OTHER_BANKS, (["--teacher", other], "teacher")):
        refused = refusal_of(capsys, linvideo.main, *flags, *changed)
        assert f"was made with another {name}: name another folder" in refused
    for broken in (before["00002.safetensors"][:-8], b"", before["00000.safetensors"]):
        (bank / "00002.safetensors").write_bytes(broken)
        assert "00002.safetensors is " in refusal_of(capsys, linvideo.main, *flags)
    (bank / "bank.json").write_text("{")
    assert "not readable JSON" in refusal_of(capsys, linvideo.main, *flags)


def test_bank_of_other_prompts(monkeypatch, tmp_path, capsys):
    quiet(monkeypatch)
    flags = ["--output_dir", str(tmp_path / "run"), *FEW, *wan_flags(tmp_path / "wan")]
    flags += ["--max_train_steps", "1", "--bank", str(tmp_path / "bank")]
    for _ in range(2):
        linvideo.main(flags)
    path = tmp_path / "wan" / "prompts.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    text, none = tensors["cond.text"], tensors["uncond.text"]
    fewer, reordered = {"cond.text": text[:4].contiguous()}, {"cond.text": text.flip(0)}
    for changed in (fewer, reordered, {"uncond.text": -none}):
        save_file({**tensors, **changed}, path)
        assert "was made with another prompts" in refusal_of(capsys, linvideo.main, *flags)


def test_default_size_of_a_released_models_bank(tmp_path):
    """As many trajectories as a run reads states, each once; at most the paper's 50,000 states.

    Where a bank is there it has the size that it has, also for a run of another length.
    """

    def size(*flags, ranks=1):
        args = linvideo.parse_args(["--teacher", "/nowhere/Wan2.1-T2V-1.3B-Diffusers", *flags])
        return linvideo.bank_size(types.SimpleNamespace(args=args, parts=ranks), str(tmp_path))

    assert size() == 3000 / 50 and size(ranks=8) == 480  # batch 1
    assert size(ranks=32) == size("--train_batch_size", "64") == 1000
    assert size("--gradient_accumulation_steps", "4") == 240
    assert size("--sampling_steps", "20", "--max_train_steps", "61") == 4
    assert size("--bank_size", "7", ranks=8) == 7
    assert linvideo.parse_args([]).bank_size == 2560
    (tmp_path / "bank.json").write_text('{"trajectories": 33}')
    assert size(ranks=8) == 33 and size("--bank_size", "7") == 7


def test_a_longer_run_keeps_its_bank(monkeypatch, tmp_path):
    """Without --bank_size a bank has what the first run reads; that one is reused as it is."""
    quiet(monkeypatch)
    flags = ["--teacher", save_dit(tmp_path / "teacher"), "--objective", "mse"]
    few = few_for(flags)
    at = few.index("--bank_size")
    flags += [*few[:at], *few[at + 2 :], "--output_dir", str(tmp_path / "run")]
    real = linvideo.parse_args

    def parse_args(argv):
        args = real(argv)
        args.bank_size = None  # as released teachers have it
        return args

    monkeypatch.setattr(linvideo, "parse_args", parse_args)
    linvideo.main(flags)
    files = sorted((tmp_path / "run" / "bank").glob("*.safetensors"))
    assert load_json(str(tmp_path / "run" / "bank" / "bank.json"))["trajectories"] == 5
    longer = ["--max_train_steps", "5", "--resume_from_checkpoint", "latest"]
    linvideo.main([*flags, *longer])
    assert sorted((tmp_path / "run" / "bank").glob("*.safetensors")) == files
    assert len(read_log(tmp_path / "run")) == 5


def test_disk_that_trajectories_take(monkeypatch, tmp_path, capsys):
    """Said before they are written; refused, with a remedy that works, where it is not there.

    Files are a little larger than that for their headers. What is there already is not counted.
    """
    quiet(monkeypatch)
    flags = ["--output_dir", str(tmp_path / "run"), *FEW, "--max_train_steps", "1"]
    flags += ["--bank", str(tmp_path / "bank"), "--teacher", save_dit(tmp_path / "teacher")]
    flags += GUIDED
    one = 3 * K * 16 * 2  # x, v and v_uncond of 16 float16 numbers each at K states
    free = [0]
    usage = lambda path: types.SimpleNamespace(free=free[0])  # noqa: E731
    monkeypatch.setattr(linvideo.shutil, "disk_usage", usage)
    free[0] = BANK * one - 1
    said = refusal_of(capsys, linvideo.main, *flags)
    assert f"{BANK} trajectories of the teacher take 0.0 MB in {tmp_path / 'bank'}" in said
    assert "lower --bank_size" in said and not list((tmp_path / "bank").glob("*.safetensors"))
    free[0] = 8 * one
    linvideo.main([*flags, "--bank_size", "8"])
    assert "8 trajectories of the teacher take" in capsys.readouterr().out
    written = sum(p.stat().st_size for p in (tmp_path / "bank").glob("*.safetensors"))
    assert 8 * one < written < 8 * one + 2000
    free[0] = 0
    linvideo.main([*flags, "--bank_size", "8"])
    assert "trajectories of the" not in capsys.readouterr().out
    policy = [*flags, "--bank_size", "8", *POLICY.split()]
    said = refusal_of(capsys, linvideo.main, *policy)
    assert "3 trajectories of the student" in said and "lower --own_trajectories, --fresh" in said
    free[0] = 3 * one
    linvideo.main(policy)


# ---- the student's own trajectories --------------------------------------------------------------


def test_old_trajectories_of_the_student_go(monkeypatch, tmp_path, capsys):
    """Those stay that a run needs which is resumed from either checkpoint that is kept.

    Without them it is refused, in a line that says what to do.
    """
    teacher, folder = save_dit(tmp_path / "teacher"), tmp_path / "run"
    flags = ["--teacher", teacher, *POLICY.split(), "--max_train_steps", "12"]
    flags += ["--checkpointing_steps", "2", "--fresh_every", "2", "--own_trajectories", "4"]
    with monkeypatch.context() as m:
        run(m, folder, *flags)
    numbers = sorted(int(p.stem) for p in (folder / "own").iterdir())
    # 3 in each of the updates 0, 2, ... 10; 4 are read, and 3 x (4 / 2 + 2) stay beside them
    assert numbers == list(range(2, 18))
    state, whole = folder / "state" / "step-0000010", weights(folder)
    again = [*flags, "--resume_from_checkpoint", str(state)]
    with monkeypatch.context() as m:
        run(m, folder, *again)
    assert_bit_equal(weights(folder), whole)
    start = ["--output_dir", str(tmp_path / "elsewhere"), *FEW, *again]
    said = refusal_of(capsys, linvideo.main, *start)
    assert "own/00000014.safetensors is not there" in said and "copy" in said
    (folder / "own").rename(tmp_path / "elsewhere" / "own")
    with monkeypatch.context() as m:
        run(m, tmp_path / "elsewhere", *again)
    assert_bit_equal(weights(tmp_path / "elsewhere"), whole)


def test_released_models_get_the_objective_that_measures_best():
    """Regression and the soft count with Wan, as docs and --help say, not Eq. 13 as printed.

    The line marked `paper` is the printed algorithm; what adm takes for x_hat goes by objective.
    """
    wan = linvideo.parse_args(["--teacher", "/nowhere/Wan2.1-T2V-1.3B-Diffusers"])
    small = linvideo.parse_args([])
    assert wan.objective == small.objective == "mse"
    assert (wan.count, wan.selection_weight, wan.alpha) == ("soft", 0.01, None)
    states = {}
    for objective in ("adm", "adm_critic", "mse", "dmd"):
        states[objective] = linvideo.parse_args(["--objective", objective]).state
    assert states == {"adm": "policy", "adm_critic": "part", "mse": "part", "dmd": "part"}
    (line,) = [x for x in linvideo.__doc__.replace("\\\n", " ").splitlines() if "paper  " in x
               and "python" in x]  # fmt: skip
    paper = linvideo.parse_args(line.split("linvideo.py")[1].split())
    assert (paper.objective, paper.weight, paper.count) == ("adm", "eq13", "round")
    assert (paper.selection_weight, paper.alpha, paper.selection_share) == (0.01, [20, 2], 1)
    assert paper.state != "policy"


def test_orderings_compare_objectives_at_equal_rates():
    """Regression and every construction of adm each have a row at either rate."""
    runs = [linvideo.parse_args(m.flags.split()) for m in orderings.LINVIDEO.values()
            if m.script != "dmd"]  # fmt: skip
    given = [a for a in runs if a.select == ["0", "2", "6", "7"] and a.feature_map == "hedgehog"]
    assert {a.learning_rate for a in given if a.objective == "mse"} == {1e-3, 1e-4}
    plain = [a for a in given if a.objective == "adm" and not a.regression_weight]
    found = {(a.state, a.weight, a.learning_rate) for a in plain}
    for kind in (("policy", "velocity"), *(("part", w) for w in ("velocity", "unit", "eq13"))):
        assert {(*kind, rate) for rate in (1e-3, 1e-4)} <= found


# ---- refusals ------------------------------------------------------------------------------------

TOO_MANY = "--target_layers 5: this network has 4 self-attention layer(s)"
WRONG = [
    ("--target_layers 0", "--target_layers: must be >= 1"),
    ("--target_layers 5", TOO_MANY),
    ("--select 4", "different layers of 0 to 3"),
    ("--select 1 1", "different layers of 0 to 3"),
    ("--select deepest", "--select deepest: give one of"),
    ("--select first 1", "--select first 1"),
    ("--select 0 1 2 --target_layers 2", "names 3 layer(s), --target_layers says 2"),
    ("--feature_map none", "--feature_map"),
    ("--feature_dim 0", "--feature_dim: must be >= 1"),
    ("--feature_dim 4 --feature_map elu", "--feature_dim is for --feature_map hedgehog"),
    ("--feature_dim 99", "wider than --teacher"),
    ("--objective mse --state part", "--state part is for --objective adm or adm_critic"),
    ("--objective mse --weight unit", "leave --weight out"),
    ("--reuse_samples", "--reuse_samples"),
    ("--state rollout --sampling_steps 2", "rollout needs --sampling_steps of at least 3"),
    ("--objective mse --regression_weight 1", "--regression_weight is for --objective adm"),
    ("--objective dmd --regression_weight 1", "--regression_weight is for --objective adm"),
    ("--state rollout --regression_weight 1", "not --state rollout"),
    ("--state policy --weight velocity --regression_weight 1", "not --state policy: give --state"),
    ("--state policy --weight eq13", "--weight eq13 is for a step to x_hat"),
    ("--state policy --weight velocity --objective mse", "--state policy is for --objective adm"),
    ("--state policy --weight velocity --objective adm_critic", "leave --state out"),
    ("--fresh 0", "--fresh"),
    ("--count floor", "--count"),
    ("--part 0", "--part"),
    ("--alpha 4", "--alpha"),
    ("--alpha 4 1", "must be > 1"),
    ("--min_time 0", "--min_time"),
    ("--r_init 1.1", "--r_init"),
    ("--objective gan", "--objective"),
    ("--sample_shape 1 6 6", "DiT expects x of shape"),
    ("--prompts x.safetensors", "takes class labels"),
    ("--teacher MLP", "a RingMLP has no self-attention that can be replaced"),
    ("--teacher VP", "predicts eps; the score of Eq. 13 is a flow's"),
    ("--teacher LINEAR", "has linear attention already"),
    ("--student_init LINEAR", "has linear attention already"),
    ("--teacher nowhere", "neither an embedded world"),
    ("--resume_from_checkpoint nowhere", "no state.json there"),
    ("--sample TEACHER", "sampler.json does not exist"),
]


@pytest.mark.parametrize("flags, says", WRONG)
def test_wrong_input(monkeypatch, tmp_path, capsys, flags, says):
    """One line, exit code 2, nothing written."""
    quiet(monkeypatch)
    names = {"TEACHER": save_dit(tmp_path / "teacher")}
    if "VP" in flags:
        names["VP"] = save_tiny_vp_teacher(tmp_path / "vp")
    if "MLP" in flags:
        names["MLP"], net = str(tmp_path / "mlp"), ring_network()
        save_network(net, network_config(net), names["MLP"])
    if "LINEAR" in flags:
        names["LINEAR"] = save_dit(tmp_path / "linear", linear_layers=[1])
    flags = [names.get(f, f) for f in flags.split()]
    if "--teacher" not in flags:
        flags += ["--teacher", names["TEACHER"]]
    few = [] if "--sample" in flags else few_for(flags)
    start = [*few, "--output_dir", str(tmp_path / "run")]
    assert says in refusal_of(capsys, linvideo.main, *start, *flags)
    assert not (tmp_path / "run").exists()


# ---- outputs -------------------------------------------------------------------------------------


class World:
    """An embedded world for a tiny teacher, whose figures are easy to check."""

    name, num_classes, class_names = "clips", 3, ["a", "b", "c"]

    def data(self, n, seed, label):
        return torch.zeros(n, 1, 4, 4), label

    def measure(self, x, label):
        return {"fd": float(x.square().mean()), "accuracy": float(label.float().mean())}

    def moments(self, x, label):
        return None  # asked for also where there is no many-step teacher to compare with

    def picture(self, x):
        return tile(x)


def euler(net, z, label, steps, scale):
    """Guided samples of a network, and in other words than the sampler's."""
    grid = step_grid(steps, SHIFT)
    with torch.no_grad():
        for t, s in zip(grid[:-1], grid[1:]):
            at = torch.full((len(z),), t)
            v, none = net(z, at, label=label), net(z, at, label=torch.full_like(label, 3))
            z = z + (s - t) * (none + scale * (v - none))
    return z


def assert_selection_picture(path, rows):
    """Colours of r.png at three updates, each a third of its width, for rows {r_i: value}."""
    image = Image.open(path).convert("RGB")
    for i in range(4):
        for row, x in zip(rows, (72, 70 + 360, 70 + 718), strict=True):
            r = float(row[f"r_{i}"])
            far, end = abs(2 * r - 1), (200, 60, 50) if r > 0.5 else (40, 90, 190)
            want = [255 * (1 - far) + far * c for c in end]
            assert list(image.getpixel((x, 22 * i + 10))) == pytest.approx(want, abs=2)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_outputs_of_a_run(monkeypatch, tmp_path, scale):
    """What a run with a world leaves, on 200 samples instead of 2,000.

    Rows of student and student_4 with their calls, the student's own figures, config and sampler,
    pictures; --sample draws the same.
    """
    many = report.many
    monkeypatch.setattr(teachers, "load_world", lambda name: World())
    monkeypatch.setattr(report, "balanced_labels", lambda n, classes: torch.arange(200) % 3)
    monkeypatch.setattr(report, "many", lambda draw, n, batch=500: many(draw, min(n, 200), batch))
    teacher = save_dit(tmp_path / "teacher", world="clips", class_names=World.class_names)
    out, calls = tmp_path / "run", 1 if scale == 1 else 2
    flags = ["--teacher_steps", "0", "--guidance_scale", str(scale)]
    linvideo.main(["--output_dir", str(out), *FEW, "--teacher", teacher, *flags])
    folders, files = {"student", "state", "bank"}, {"log.csv", "report.json", "selection.json"}
    assert {p.name for p in out.iterdir()} == {*folders, *files, "samples.png", "r.png"}
    assert {p.name for p in (out / "student").iterdir()} == {"config.json", "sampler.json", WEIGHTS}
    written, found = (load_json(str(out / f"{name}.json")) for name in ("report", "selection"))
    rows = {r["name"]: r for r in written["results"]}
    nfe = {"data": 0, "teacher_same_steps": K * calls, "student": K * calls, "student_4": 4 * calls}
    assert {name: r["nfe"] for name, r in rows.items()} == nfe
    assert written["method"] == "linvideo" and written["steps"] == 3
    config = load_json(str(out / "student" / "config.json"))
    added = {"linear_layers": found["linear_layers"], "feature_map": "hedgehog"}
    assert config == {**load_json(teacher + "/config.json"), **added}
    assert load_json(str(out / "student" / "sampler.json")) == {
        "method": "linvideo",
        "prediction": "flow_v",
        "schedule": {"type": "flow"},
        "times": step_grid(K, SHIFT)[:-1],
        "timestep_shift": SHIFT,
        "rule": "euler",
        "guidance_scale": scale,
        "sample_shape": [1, 4, 4],
    }
    net, frozen = load_network(str(out / "student"))[0], load_network(teacher)[0]
    assert written["params"] == sum(p.numel() for p in net.parameters())
    assert sum(isinstance(m, LinearAttention) for m in net.modules()) == 2

    z = Draws(0, "evaluation", 0, range(200)).normal("z", (1, 4, 4))
    label = torch.arange(200) % 3
    own, coarse = (euler(n, z, label, K, scale) for n in (net, frozen))
    paired = (own - coarse).square().mean().item()
    assert rows["student"]["paired_mse"] == pytest.approx(paired, rel=1e-3)
    assert {k: rows["student"][k] for k in found} == found
    assert "paired_mse" not in rows["student_4"]
    measured = {"student": own, "student_4": euler(net, z, label, 4, scale)}
    for name, x in {**measured, "teacher_same_steps": coarse}.items():
        assert rows[name]["fd"] == pytest.approx(x.square().mean().item(), rel=1e-3)

    assert_selection_picture(out / "r.png", read_log(out))
    samples, seven = tmp_path / "samples", ["--preview_samples", "7"]
    linvideo.main(["--sample", str(out), *seven, "--output_dir", str(samples)])
    x = load_file(samples / "samples.safetensors")["x0"]
    torch.testing.assert_close(x, own[:7], rtol=1e-4, atol=1e-4)
    assert (samples / "samples.png").is_file()


def test_ring_and_its_film(monkeypatch, tmp_path):
    """The teacher is a transformer that is fitted to the closed form, and the student its copy.

    ring.gif has a frame of the start and one of each update, also where the run was interrupted.
    """
    flags, frames = ["--teacher", "ring", "--checkpointing_steps", "2"], {}
    for name, again in (("whole", []), ("cut", ["--resume_from_checkpoint", "latest"])):
        folder = tmp_path / name
        if again:
            with monkeypatch.context() as m:
                killed_run(m, folder, 3, *flags)
            assert len(read_gif(str(folder / "ring.gif"))) == 3
        with monkeypatch.context() as m:
            diary = run(m, folder, *flags, *again)
        frames[name] = read_gif(str(folder / "ring.gif"))
    assert type(diary.teacher) is RingDiT
    assert len(frames["whole"]) == len(frames["cut"]) == 4
    assert all(a.tobytes() == b.tobytes() for a, b in zip(frames["whole"], frames["cut"]))
    assert len({frame.tobytes() for frame in frames["whole"]}) == 4
    assert_bit_equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    net, config = load_network(str(tmp_path / "whole" / "student"))
    assert type(net) is RingDiT and config["world"] == "ring" and len(config["linear_layers"]) == 2
    about = [load_json(str(tmp_path / name / "bank" / "bank.json")) for name in frames]
    assert about[0] == about[1] and len(about[0]["teacher"]) == 16


def test_wan_student_from_end_to_end(tmp_path):
    """No world: pictures, a GIF and latents; diffusers' own keys in the config, and ours.

    Guidance is kept, and what --sample draws is what the run showed.
    """
    flags = [*FEW, *wan_flags(tmp_path / "wan"), "--guidance_scale", "2", "--target_layers", "1"]
    flags += ["--checkpointing_steps", "2", "--ema_decay", "0.5"]
    folder, samples = tmp_path / "run", tmp_path / "samples"
    linvideo.main(["--output_dir", str(folder), *flags])
    teacher = json.loads((tmp_path / "wan" / "transformer" / "config.json").read_text())
    student, config = load_network(str(folder / "student"))
    linear = config["linear_layers"]
    assert config == {**teacher, "linear_layers": linear, "feature_map": "hedgehog"}
    assert len(linear) == 1 and isinstance(student, WanTransformer3DModel)
    assert isinstance(student.blocks[linear[0]].attn1.attend, LinearAttention)
    assert load_json(str(folder / "student" / "sampler.json"))["guidance_scale"] == 2
    rows = load_json(str(folder / "report.json"))["results"]
    names = ["teacher", "teacher_same_steps", "student", "student_4"]
    assert [r["name"] for r in rows] == names and all("paired_mse" in r for r in rows[1:])
    assert Image.open(folder / "samples.gif").n_frames == 2
    assert set(read_bank(folder / "bank")) == {"index", "x", "v", "v_uncond"}
    again = ["--prompts", str(tmp_path / "wan" / "prompts.safetensors"), "--preview_samples", "2"]
    linvideo.main(["--sample", str(folder), *again, "--output_dir", str(samples)])
    ours, drawn = (load_file(d / "samples.safetensors")["x0"] for d in (folder, samples))
    assert ours.shape == (2, 4, 2, 4, 6)
    torch.testing.assert_close(ours, drawn, rtol=1e-4, atol=1e-4)


def test_dmd_goes_on_from_a_student(monkeypatch, tmp_path, capsys):
    """dmd.py --student_init: the student starts as this one and ends with its linear layers.

    The fake is the teacher, with softmax attention.
    """
    teacher, first = save_tiny_teacher(tmp_path / "teacher"), tmp_path / "run"
    with monkeypatch.context() as m:
        run(m, first, "--teacher", teacher, "--target_layers", "1")
    start, flags = {}, ["--teacher", teacher, "--student_init"]
    more = """--student_steps 4 --max_train_steps 2 --train_batch_size 4
        --fake_update_ratio 1""".split()

    def on_start(real, run, **state):
        for name in ("student", "fake"):
            start[name] = copy.deepcopy(state[name].state_dict())
        return real(run, **state)

    with monkeypatch.context() as m:
        diary = DmdDiary(m, dmd)
        DmdDiary.wrap(m, Run, "start", on_start)
        out = ["--output_dir", str(tmp_path / "dmd")]
        dmd.main([*flags, str(first / "student"), *more, *out])
    assert_bit_equal(start["student"], load_file(first / "student" / WEIGHTS))
    without_steps = {k: v for k, v in start["fake"].items() if not k.startswith("steps.")}
    assert_bit_equal(without_steps, load_file(tmp_path / "teacher" / WEIGHTS))
    assert not any(isinstance(m, LinearAttention) for m in diary.fake.modules())
    one, two = (load_json(str(tmp_path / d / "student" / "config.json")) for d in ("run", "dmd"))
    (layer,) = two["linear_layers"]
    assert one == two
    net = load_network(str(tmp_path / "dmd" / "student"))[0]
    w_q = f"blocks.{layer}.attend.w_q"
    assert isinstance(net.blocks[layer].attend, LinearAttention)
    assert not torch.equal(net.state_dict()[w_q], start["student"][w_q])
    quiet(monkeypatch)
    wrong = [*flags, save_dit(tmp_path / "wrong", depth=3, linear_layers=[0])]
    refused = refusal_of(capsys, dmd.main, *wrong, "--output_dir", str(tmp_path / "none"))
    assert "does not have the shapes" in refused


# ---- ranks ---------------------------------------------------------------------------------------


def test_ranks_share_the_bank_whatever_is_there(tmp_path):
    """A rank's files depend on their numbers alone.

    So another rank that is ahead, or a resumed run, leaves none out.
    """
    flags = [*FEW, "--teacher", save_dit(tmp_path / "teacher"), "--bank_batch", "1"]
    args = linvideo.parse_args([*flags, "--output_dir", str(tmp_path / "run")])
    teacher = teachers.start_teacher(alone(args))
    teacher.conditions = Conditions(args, teacher.base)
    bank = tmp_path / "run" / "bank"

    def make(rank):
        one = dict(part=rank, main=rank == 0, parts=3, writes=True, device=torch.device("cpu"))
        one |= dict(args=args, folder=str(tmp_path / "run"), wait_for_all=lambda: None, say=print)
        one["autocast"] = contextlib.nullcontext
        return linvideo.make_bank(types.SimpleNamespace(**one), teacher, step_grid(K, SHIFT))

    for rank in (0, 1):
        bank.mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError, match="does not exist"):
            make(rank)
    made = sorted(int(p.stem) for p in bank.glob("*.safetensors"))
    assert made == [i for i in range(BANK) if i % 3 < 2]
    assert len(make(2).files) == BANK
