"""linvideo.py's runs: every update's gradients from the draws and the bank alone, the selection and its end, rates, averages, resume, ranks, outputs, what dmd.py
makes of a student, refusals."""

import copy
import json
import sys
import types

import pytest
import torch
from helpers import Diary as DmdDiary
from helpers import (
    assert_bit_equal,
    assert_two_ranks_are_one_process,
    perturbed,
    quiet,
    read_log,
    refusal_of,
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
from models.networks.wan import WanTransformer3DModel
from models.pictures import tile
from models.plumbing import report
from models.plumbing.data import Conditions
from models.plumbing.run import run_main
from models.plumbing.teachers import start_teacher

SHIFT, K, BANK = 2.0, 5, 10
FEW = [
    "--max_train_steps",
    "3",
    "--selection_share",
    "0.67",
    "--train_batch_size",
    "8",
    "--bank_size",
    str(BANK),
    "--bank_batch",
    "4",
    "--sampling_steps",
    str(K),
    "--timestep_shift",
    str(SHIFT),
    "--min_time",
    "0.15",
    "--checkpointing_steps",
    "1000",
    "--max_grad_norm",
    "1e9",
    "--lr_warmup_steps",
    "0",
    "--ema_decay",
    "0",
    "--state",
    "part",
    "--weight",
    "eq13",
    "--objective",
    "adm",
    "--alpha",
    "4",
    "2",
    "--r_init",
    "0.8",
    "--learning_rate",
    "1e-3",
    "--learning_rate_r",
    "0.02",
    "--selection_weight",
    "0.05",
    "--teacher_steps",
    "2",
    "--preview_samples",
    "3",
]
GUIDED = ["--guidance_scale", "2.5", "--uncond_share", "0.4"]


def save_dit(folder, depth=4, **changes):
    """A tiny DiT with noise on every weight, 4 tokens, 3 classes -> its folder."""
    torch.manual_seed(0)
    net = perturbed(
        DiT(
            **{
                **dict(size=(4, 4), patch=(2, 2), channels=1, dim=32, depth=depth, num_classes=3),
                **changes,
            }
        ),
        std=0.2,
    )
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
    """What a run of linvideo.main did: its networks; at every update what it was, the networks and all gradients then, the rates, and the calls of networks since
    the update before."""

    def __init__(self, monkeypatch):
        self.updates, self.calls, self.student, self.teacher, self.critic, self.trajectories = (
            [],
            [],
            None,
            None,
            None,
            0,
        )
        quiet(monkeypatch)
        for module, name in (
            (linvideo, "mix_attention"),
            (linvideo, "freeze_teacher"),
            (linvideo, "flow_matching_loss"),
            (linvideo, "update"),
            (linvideo, "trajectory"),
        ):
            real = getattr(module, name)
            monkeypatch.setattr(
                module,
                name,
                lambda *args, real=real, name=name: getattr(self, "on_" + name)(real, *args),
            )

    def watch(self, who, net):
        setattr(self, who, net)
        net.register_forward_hook(
            lambda it, xt, cond, out: (
                it is getattr(self, who)
                and self.calls.append(
                    types.SimpleNamespace(
                        who=who, x=xt[0].detach(), t=xt[1], graph=torch.is_grad_enabled(), cond=cond
                    )
                )
                or None
            ),
            with_kwargs=True,
        )

    def on_mix_attention(self, real, net, *rest):
        self.watch("student", net)
        return real(net, *rest)

    def on_freeze_teacher(self, real, args, teacher, device):
        self.watch("teacher", teacher.net)
        return real(args, teacher, device)

    def on_flow_matching_loss(self, real, net, x0, *rest):
        assert not x0.requires_grad
        if self.critic is None:
            self.watch("critic", net)
        return real(net, x0, *rest)

    def on_trajectory(self, real, *args):
        self.trajectories += 1
        return real(*args)

    def on_update(self, real, optimizers, max_norm, what, loss):
        nets = {who: net for who in ("student", "critic", "teacher") if (net := getattr(self, who))}
        self.updates.append(
            types.SimpleNamespace(
                what=what,
                calls=self.calls,
                groups=[
                    [g["lr"], g["weight_decay"], [p for p in g["params"]]]
                    for o in optimizers
                    for g in o.param_groups
                ],
                nets={who: copy.deepcopy(net) for who, net in nets.items()},
                grads={
                    who: {
                        k: None if p.grad is None else p.grad.clone()
                        for k, p in net.named_parameters()
                    }
                    for who, net in nets.items()
                },
            )
        )
        self.calls = []
        return real(optimizers, max_norm, what, loss)

    def of(self, what):
        return [u for u in self.updates if u.what == what]


def run(monkeypatch, folder, *flags):
    diary = Diary(monkeypatch)
    linvideo.main(["--output_dir", str(folder), *FEW, *flags])
    return diary


def read_bank(folder):
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {k: torch.cat([f[k] for f in files]) for k in files[0]}


# ---- every update once more ----------------------------------------------------------------------------------------------


class Update:
    """A micro-batch of an update from its draws, in other words than linvideo.py's."""

    def __init__(self, args, bank, draw):
        self.args, self.bank, self.draw, self.B = args, bank, draw, len(draw.rows)
        self.grid = torch.tensor([shift(1 - i / K, SHIFT) for i in range(K + 1)])

    def state(self):
        a, adm = self.args, self.args.objective.startswith("adm")
        last = K - 1 if adm and a.state in ("step", "rollout") else K
        i = (self.draw.spread("state") * last).floor().long().clamp(max=last - 1)
        row = self.draw.integer("trajectory", BANK)
        x, v, label = (
            self.bank["x"][row, i].float(),
            self.bank["v"][row, i].float(),
            self.bank["index"][row].clone(),
        )
        if a.guidance_scale != 1:
            none = self.draw.uniform("drop") < a.uncond_share
            label[none] = 3
            v[none] = self.bank["v_uncond"][row, i].float()[none]
        return i, x, v, label

    def roll_out(self, student, times, label):
        x, scale = self.draw.normal("z", (1, 4, 4)), self.args.guidance_scale
        with torch.no_grad():
            for t, s in zip(times[:-1], times[1:]):
                at = torch.full((self.B,), float(t))
                v = student(x, at, label=label)
                if scale != 1:
                    none = student(x, at, label=torch.full_like(label, 3))
                    v = none + scale * (v - none)
                x = x + (float(s) - float(t)) * v
        return x

    def x_hat(self, student):
        """-> x_hat, its time, labels."""
        if self.args.state == "rollout":
            i, label = (
                torch.full((self.B,), 1 + self.draw.agreed("i", K - 2)),
                self.draw.integer("cond", 3),
            )
            x = self.roll_out(student, self.grid[: int(i[0]) + 1], label)
        else:
            i, x, _, label = self.state()
        t, s = self.grid[i], self.grid[i + 1]
        if self.args.state == "part":
            s = t - self.args.part * self.draw.uniform("part") * (t - s)
        if self.args.state == "jump":
            s = shift((1 - i / K) * self.draw.uniform("jump"), SHIFT)
        s = s if self.args.state == "rollout" else s.clamp(min=self.args.min_time)
        return x - expand(t - s, x) * student(x, t, label=label), s, label

    def student_loss(self, student, teacher, critic):
        """-> loss with the right gradient and value, mean square of g."""
        a = self.args
        if a.objective == "mse":
            i, x, v, label = self.state()
            g = student(x, self.grid[i], label=label) - v
            return g.square().mean() / 2, g.detach().square().mean()
        if a.objective == "dmd":
            i, x, _, label = self.state()
            x0 = x - expand(self.grid[i], x) * student(x, self.grid[i], label=label)
            t, eps = (
                shift(self.draw.uniform("u", 0.02, 0.98), SHIFT),
                self.draw.normal("eps", (1, 4, 4)),
            )
            at = expand(t, x)
            with torch.no_grad():
                x_t = (1 - at) * x0 + at * eps
                real, fake = (x_t - at * net(x_t, t, label=label) for net in (teacher, critic))
                g = (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)
            return self.surrogate(x0, g)
        x, s, label = self.x_hat(student)
        with torch.no_grad():
            at = expand(s, x)
            v, own = (
                teacher(x, s, label=label),
                (student if critic is None else critic)(x, s, label=label),
            )
            g = {"eq13": (-(x + (1 - at) * own) + (x + (1 - at) * v)) / at, "unit": v - own}.get(
                a.weight
            )
            if a.weight == "dmd":
                g = at * (v - own) / (at * (v - own)).abs().mean((1, 2, 3), keepdim=True)
        loss, square = self.surrogate(x, g)
        if a.regression_weight:
            i, x, v, label = self.state()
            loss = (
                loss
                + a.regression_weight
                * (student(x, self.grid[i], label=label) - v).square().mean()
                / 2
            )
        return loss, square

    @staticmethod
    def surrogate(x, g):
        return (x * g).mean() - (x * g).mean().detach() + g.square().mean() / 2, g.square().mean()

    def critic_loss(self, student, critic):
        with torch.no_grad():
            if self.args.objective == "dmd":
                i, x, _, label = self.state()
                x0 = x - expand(self.grid[i], x) * student(x, self.grid[i], label=label)
            else:
                label = self.draw.integer("cond", 3)
                x0 = self.roll_out(student, step_grid(self.args.critic_steps, SHIFT), label)
        t, eps = (
            shift(self.draw.uniform("u", 0.02, 0.98), SHIFT),
            self.draw.normal("eps", (1, 4, 4)),
        )
        x_t = x0 + expand(t, x0) * (eps - x0)
        return (critic(x_t, t, label=label) - eps + x0).square().mean()


def assert_gradients(got, loss, net):
    parameters = dict(net.named_parameters())
    want = torch.autograd.grad(
        loss, [p for p in parameters.values() if p.requires_grad], allow_unused=True
    )
    want = dict(zip([k for k, p in parameters.items() if p.requires_grad], want))
    norm = torch.stack([w.norm() for w in want.values() if w is not None]).norm()
    assert norm > 1e-4
    for k, p in parameters.items():
        if want.get(k) is None:
            assert got[k] is None or not got[k].any(), k
        else:
            torch.testing.assert_close(
                got[k], want[k], rtol=2e-3, atol=float(2e-5 * norm), msg=lambda m: f"{k}: {m}"
            )
    return norm


CASES = [
    [],
    ["--part", "0.3"],
    ["--state", "step", "--regression_weight", "0.5"],
    [*GUIDED, "--regression_weight", "2"],
    ["--state", "step"],
    ["--state", "jump"],
    ["--state", "rollout"],
    ["--weight", "unit"],
    ["--weight", "dmd"],
    ["--objective", "mse", "--state", "step"],
    ["--objective", "adm_critic", "--critic_steps", "3"],
    ["--objective", "dmd"],
    GUIDED,
    [*GUIDED, "--objective", "mse"],
    [*GUIDED, "--state", "rollout"],
    [*GUIDED, "--objective", "adm_critic", "--state", "step", "--critic_steps", "3"],
    [*GUIDED, "--objective", "dmd"],
    ["--no_regularizer", "--gradient_accumulation_steps", "2", "--seed", "3"],
    ["--objective", "dmd", "--gradient_accumulation_steps", "2", "--fake_update_ratio", "2"],
    ["--feature_map", "elu"],
    ["--feature_map", "relu"],
    ["--feature_map", "softmax"],
    ["--select", "3", "0"],
    ["--select", "last", "--objective", "mse"],
]


@pytest.mark.parametrize("flags", CASES, ids=" ".join)
def test_gradients_and_calls(monkeypatch, tmp_path, flags):
    """Every update of critic and student from the draws and the bank's files alone, with the pull of count and regulariser on r while layers are selected and
    exactly two linear ones after; the log's columns; and who is called, how often, with a graph or not."""
    diary = run(monkeypatch, tmp_path / "run", "--teacher", save_dit(tmp_path / "teacher"), *flags)
    args = linvideo.parse_args(["--teacher", str(tmp_path / "teacher"), *FEW, *flags])
    bank, rows, teacher = (
        read_bank(tmp_path / "run" / "bank"),
        read_log(tmp_path / "run"),
        load_network(str(tmp_path / "teacher"))[0],
    )
    micro, selected, has_critic = (
        args.gradient_accumulation_steps,
        args.select == ["learned"],
        args.objective in ("adm_critic", "dmd"),
    )
    assert [u.what for u in diary.updates] == (
        ["critic"] * args.fake_update_ratio * has_critic + ["student"]
    ) * 3
    draws = lambda step, inner: [
        Draws(args.seed, step, inner, range(m * 8, m * 8 + 8)) for m in range(micro)
    ]  # noqa: E731
    for step, u in enumerate(diary.of("student")):
        critics = diary.of("critic")[
            step * args.fake_update_ratio : (step + 1) * args.fake_update_ratio
        ]
        fake = 0.0
        for inner, c in enumerate(critics):
            net = c.nets["critic"]
            loss = (
                sum(
                    Update(args, bank, draw).critic_loss(c.nets["student"], net)
                    for draw in draws(step, inner)
                )
                / micro
            )
            assert_gradients(c.grads["critic"], loss, net)
            assert all(g is None for who in ("student", "teacher") for g in c.grads[who].values())
            fake += loss.item() / len(critics)
        student, critic = u.nets["student"], u.nets.get("critic")
        losses, squares = zip(
            *(
                Update(args, bank, draw).student_loss(student, teacher, critic)
                for draw in draws(step, "student")
            )
        )
        loss, selecting, mixed = (
            sum(losses) / micro,
            selected and step < 2,
            [place.attend for place in student.self_attentions],
        )
        log = {k: float(v) for k, v in rows[step].items()}
        want = {
            "step": step + 1,
            "loss": loss.item(),
            "g": (sum(squares) / micro).sqrt().item(),
            "loss_fake": fake,
        }
        if selecting:
            r, alpha = torch.stack([m.r for m in mixed]), 4.0 - 2.0 * step
            pulls = [
                torch.autograd.grad(loss, [m.r for m in mixed], retain_graph=True),
                0.05 * -2 * (int((r < 0.5).sum()) - 2) * torch.ones(4),
                0.05 * -2 * alpha * (2 * r - 1).sign() * (2 * r - 1).abs() ** (alpha - 1),
            ]
            want |= {
                name: torch.as_tensor(p).norm().item()
                for name, p in zip(("r_objective", "r_constraint", "r_regularizer"), pulls)
            }
            pull = pulls[1] + (0 if args.no_regularizer else pulls[2])
            loss = loss + (pull.detach() * r).sum()
        else:
            want |= dict.fromkeys(("r_objective", "r_constraint", "r_regularizer"), 0.0)
            assert sorted(m.r.item() for m in mixed) == [0, 0, 1, 1] and all(
                m.only and m.r.grad is None for m in mixed
            )
        want["norm_student"] = assert_gradients(u.grads["student"], loss, student).item()
        assert {k: log[k] for k in want} == pytest.approx(want, rel=1e-3, abs=1e-6)
        after = (
            diary.of("student")[step + 1].nets["student"]
            if step == 0
            else diary.student
            if step == 2
            else None
        )
        if after:
            assert [log[f"r_{i}"] for i in range(4)] == pytest.approx(
                [place.attend.r.item() for place in after.self_attentions], abs=1e-5
            )

        # who was called: once with a graph, once more for its own score; the teacher never for regression
        calls, times = (
            {who: [c for c in u.calls if c.who == who] for who in ("student", "teacher", "critic")},
            1 if args.guidance_scale == 1 else 2,
        )
        i = int(args.state == "rollout") * (1 + draws(step, "student")[0].agreed("i", K - 2))
        self_score = args.objective == "adm"
        check = (
            2 * 32 if selected and step == 2 and not has_critic else 0
        )  # the velocity error before and after the end of the selection
        assert len(calls["student"]) == micro * (times * i + 1 + self_score) + check
        assert len(calls["critic"]) == micro * has_critic
        made = (
            3 * K * times + 1 if step == 0 and not has_critic else 0
        )  # the bank's three files, and a trial
        assert len(calls["teacher"]) == micro * (args.objective != "mse") + made
        assert [c.graph for c in calls["student"]].count(True) == micro and not any(
            c.graph for c in calls["teacher"] + calls["critic"]
        )
        if args.objective.startswith("adm"):
            score = calls["critic" if has_critic else "student"][-1]
            assert torch.equal(score.x, calls["teacher"][-1].x) and torch.equal(
                score.t, calls["teacher"][-1].t
            )
            assert score.t.min() >= 0.15 - 1e-7
        assert all(
            g is None
            for who in ("teacher", "critic")
            if who in u.grads
            for g in u.grads[who].values()
        )
    assert set(rows[0]) == {
        "step",
        "loss",
        "loss_fake",
        "g",
        "norm_student",
        "r_objective",
        "r_constraint",
        "r_regularizer",
        "r_0",
        "r_1",
        "r_2",
        "r_3",
        "data_s",
        "student_s",
        "fake_s",
        "teacher_s",
        "peak_memory_mb",
    }
    linear = load_json(str(tmp_path / "run" / "student" / "config.json"))["linear_layers"]
    assert linear == [i for i in range(4) if float(rows[2][f"r_{i}"]) == 0] and len(linear) == 2
    assert selected or linear == ([2, 3] if "last" in flags else [0, 3])
    assert (tmp_path / "run" / "selection.json").exists() == selected
    assert_bit_equal(dict(diary.teacher.state_dict()), load_file(tmp_path / "teacher" / WEIGHTS))
    assert not {p.data_ptr() for p in diary.teacher.parameters()} & {
        p.data_ptr() for p in diary.student.parameters()
    }
    if not selected:
        assert all(
            p.requires_grad is False for m in diary.student.self_attentions for p in (m.attend.r,)
        )


@pytest.mark.parametrize("flags", [[], GUIDED], ids=" ".join)
def test_bank_is_the_teachers_trajectories(monkeypatch, tmp_path, flags):
    """Row by row: noise and label from the row's own draws, all Euler steps, in half precision; bank.json says with what it was made."""
    diary = run(
        monkeypatch,
        tmp_path / "run",
        "--teacher",
        save_dit(tmp_path / "teacher"),
        "--max_train_steps",
        "1",
        "--seed",
        "4",
        *flags,
    )
    teacher, bank = diary.teacher, read_bank(tmp_path / "run" / "bank")
    assert [p.name for p in sorted((tmp_path / "run" / "bank").iterdir())] == [
        "00000.safetensors",
        "00001.safetensors",
        "00002.safetensors",
        "bank.json",
    ]
    assert {k: v.dtype for k, v in bank.items()} == {
        "index": torch.int64,
        **{k: torch.float16 for k in ("x", "v", *(["v_uncond"] if flags else []))},
    }
    draw = Draws(4, "bank", 0, range(BANK))
    x, label = draw.normal("z", (1, 4, 4)), draw.integer("cond", 3)
    assert torch.equal(bank["index"], label)
    for i in range(K):
        t, s = (shift(1 - j / K, SHIFT) for j in (i, i + 1))
        with torch.no_grad():
            v, none = (
                teacher(x, torch.full((BANK,), t), label=y) for y in (label, torch.full((BANK,), 3))
            )
        for name, want in (("x", x), ("v", v), *([("v_uncond", none)] if flags else [])):
            torch.testing.assert_close(bank[name][:, i].float(), want, rtol=2e-3, atol=2e-3)
        x = x + (s - t) * (none + 2.5 * (v - none) if flags else v)
    about = load_json(str(tmp_path / "run" / "bank" / "bank.json"))
    assert about == {
        "teacher": weights_hash(str(tmp_path / "teacher")),
        "trajectories": BANK,
        "grid": step_grid(K, SHIFT),
        "seed": 4,
        "shape": [1, 4, 4],
        "guidance_scale": 2.5 if flags else 1.0,
        "batch": 4,
        "prompts": None,
    }


# ---- the selection --------------------------------------------------------------------------------------------------------


def selection_run(monkeypatch, folder, *flags):
    return run(
        monkeypatch,
        folder,
        "--max_train_steps",
        "24",
        "--selection_share",
        "0.92",
        "--selection_weight",
        "1",
        "--learning_rate_r",
        "0.05",
        *flags,
    )


def test_r_moves_before_the_layers_are_fixed(monkeypatch, tmp_path, capsys):
    """From 0.9 with alpha's start at the number of linear layers: by then layers crossed one half; exactly `target` with the smallest r end linear; selection.json
    has what was before. The same with a start at one where the target is above alpha; where it is below, none ever leaves, which is said. Alpha's own start is 2 to 4."""
    teacher = save_dit(tmp_path / "teacher", depth=6)
    for init, alpha, target, moves in (
        ("0.9", ["4", "2"], 4, True),
        ("1", ["3.5", "2"], 4, True),
        ("1", ["20", "8"], 4, False),
        ("0.9", None, 2, True),
        ("0.9", None, 5, True),
        ("0.9", None, 1, False),
        ("0.7", None, 1, True),
    ):
        capsys.readouterr()
        with monkeypatch.context() as m:
            if alpha is None:  # the default
                m.setattr(
                    sys.modules[__name__],
                    "FEW",
                    [
                        f
                        for i, f in enumerate(FEW)
                        if not FEW.index("--alpha") <= i <= FEW.index("--alpha") + 2
                    ],
                )
            diary = selection_run(
                m,
                tmp_path / "run",
                "--teacher",
                teacher,
                "--r_init",
                init,
                *(["--alpha", *alpha] if alpha else []),
                "--target_layers",
                str(target),
            )
        assert ("the regulariser holds every r at 1" in capsys.readouterr().out) == (not moves)
        rows = [[float(row[f"r_{i}"]) for i in range(6)] for row in read_log(tmp_path / "run")]
        found = load_json(str(tmp_path / "run" / "selection.json"))
        assert found["update"] == 22 and found["r"] == pytest.approx(rows[21], abs=1e-5)
        assert all(0 <= x <= 1 for row in rows for x in row)
        assert found["linear_by_rounding"] == sum(x < 0.5 for x in found["r"]) and found[
            "undecided"
        ] == sum(0.1 < x < 0.9 for x in found["r"])
        assert (min(map(min, rows[:22])) < 0.5) == moves and (moves or found["r"] == [1.0] * 6)
        assert (
            found["linear_layers"]
            == sorted(sorted(range(6), key=lambda i: found["r"][i])[:target])
            == [i for i in range(6) if rows[-1][i] == 0]
        )
        assert all(
            row == rows[-1] and set(row) <= {0, 1} and row.count(0) == target for row in rows[22:]
        )
        assert found["velocity_error_before"] != found["velocity_error_after"]
        assert [m.attend.only for m in diary.student.self_attentions] == [
            "linear" if i in found["linear_layers"] else "softmax" for i in range(6)
        ]


def test_velocity_error_of_the_selection(monkeypatch, tmp_path):
    """Mean square over the bank's states, by the first 256 rows' draws, of the student as it was and as it is fixed."""
    diary = run(
        monkeypatch,
        tmp_path / "run",
        "--teacher",
        save_dit(tmp_path / "teacher"),
        "--train_batch_size",
        "64",
    )
    args = linvideo.parse_args(["--teacher", str(tmp_path / "teacher"), *FEW])
    bank, found = (
        read_bank(tmp_path / "run" / "bank"),
        load_json(str(tmp_path / "run" / "selection.json")),
    )
    fixed = diary.of("student")[2].nets["student"]
    mixed = copy.deepcopy(fixed)
    for i, place in enumerate(mixed.self_attentions):
        place.attend.only = None
        place.attend.r.fill_(found["r"][i])
    at = Update(args, bank, Draws(0, "check", 0, range(256)))
    i, x, v, label = at.state()
    for net, name in ((mixed, "velocity_error_before"), (fixed, "velocity_error_after")):
        with torch.no_grad():
            assert found[name] == pytest.approx(
                (net(x, at.grid[i], label=label) - v).square().mean().item(), rel=1e-3
            )


def test_end_of_the_selection(monkeypatch, tmp_path):
    """It ends before update share * steps, at the latest before the last one, at the earliest before the first; with given layers it never runs."""
    teacher = save_dit(tmp_path / "teacher")
    for share, steps, first_fixed in (("0", 3, 0), ("0.5", 4, 2), ("1", 3, 2), ("0.67", 1, 0)):
        with monkeypatch.context() as m:
            diary = run(
                m,
                tmp_path / "run",
                "--teacher",
                teacher,
                "--selection_share",
                share,
                "--max_train_steps",
                str(steps),
            )
        fixed = [
            all(p.attend.only for p in u.nets["student"].self_attentions)
            for u in diary.of("student")
        ]
        assert fixed == [step >= first_fixed for step in range(steps)]


# ---- rates, averages, precision -----------------------------------------------------------------------------------------------


def test_rates_and_groups(monkeypatch, tmp_path):
    """Warm-up for all; the last share of the run falls to 0, but r's; features have the network's rate while layers are selected (5 updates of 8); decay of weights
    for the network's alone."""
    flags = [
        "--max_train_steps",
        "8",
        "--lr_warmup_steps",
        "2",
        "--lr_decay_share",
        "0.5",
        "--learning_rate",
        "1e-3",
        "--learning_rate_features",
        "2e-3",
        "--learning_rate_r",
        "2e-3",
        "--learning_rate_fake",
        "4e-3",
        "--weight_decay",
        "0.1",
        "--objective",
        "adm_critic",
        "--critic_steps",
        "1",
        "--train_batch_size",
        "2",
    ]
    diary = run(monkeypatch, tmp_path / "run", "--teacher", save_dit(tmp_path / "teacher"), *flags)
    names = {id(p): k for k, p in diary.student.named_parameters()}
    for step, (u, c) in enumerate(zip(diary.of("student"), diary.of("critic"))):
        warm, fall = min(1, (step + 1) / 2), min(1, (8 - step) / 4)
        assert [g[0] for g in u.groups] == pytest.approx(
            [1e-3 * warm * fall, (1e-3 if step < 5 else 2e-3) * warm * fall, 2e-3 * warm]
        )
        assert (
            [g[1] for g in u.groups] == [0.1, 0, 0]
            and [g[1] for g in c.groups] == [0.1]
            and [g[0] for g in c.groups] == pytest.approx([4e-3 * warm * fall])
        )
        groups = [{names[id(p)] for p in g[2]} for g in u.groups]
        assert groups[2] == {f"blocks.{i}.attend.r" for i in range(4)} and groups[1] == {
            f"blocks.{i}.attend.linear.w_{x}" for i in range(4) for x in "qk"
        }
        assert groups[0] == set(names.values()) - groups[1] - groups[2] and sum(
            len(g[2]) for g in u.groups
        ) == len(names)
        assert {id(p) for p in c.groups[0][2]} == {id(p) for p in diary.critic.parameters()}


def test_average_of_the_weights(monkeypatch, tmp_path):
    """--ema_decay: what is saved is the average with its warm-up, weights and features, in the layers that the student itself has chosen."""
    diary = run(
        monkeypatch,
        tmp_path / "run",
        "--teacher",
        save_dit(tmp_path / "teacher"),
        "--ema_decay",
        "0.6",
        "--max_train_steps",
        "5",
        "--learning_rate",
        "1e-2",
        "--learning_rate_features",
        "0.05",
    )
    states = [u.nets["student"].state_dict() for u in diary.of("student")] + [
        diary.student.state_dict()
    ]
    average = {k: v.clone() for k, v in states[0].items()}
    for step, now in enumerate(states[1:]):
        decay = min(0.6, (1 + step) / (4 + step))
        average = {k: decay * average[k] + (1 - decay) * now[k] for k in average}
    saved = load_file(tmp_path / "run" / "student" / WEIGHTS)
    linear = load_json(str(tmp_path / "run" / "student" / "config.json"))["linear_layers"]
    assert linear == load_json(str(tmp_path / "run" / "selection.json"))["linear_layers"]
    assert sorted(k for k in saved if ".attend." in k) == [
        f"blocks.{i}.attend.w_{x}" for i in linear for x in "kq"
    ]
    for k, v in saved.items():
        torch.testing.assert_close(v, average[k.replace(".attend.", ".attend.linear.")])
    assert not torch.allclose(saved["final.weight"], states[-1]["final.weight"], rtol=1e-3)
    net, config = load_network(str(tmp_path / "run" / "student"))
    assert config["feature_map"] == "hedgehog" and isinstance(
        net.blocks[linear[0]].attend, LinearAttention
    )


def test_gradient_checkpointing_changes_nothing(monkeypatch, tmp_path):
    teacher, runs = save_dit(tmp_path / "teacher"), []
    for name, flags in (("a", []), ("b", ["--gradient_checkpointing"])):
        with monkeypatch.context() as m:
            runs.append(run(m, tmp_path / name, "--teacher", teacher, *flags))
    assert runs[1].student.gradient_checkpointing and not runs[0].student.gradient_checkpointing
    for a, b in zip(runs[0].updates, runs[1].updates):
        for k, g in a.grads["student"].items():
            assert g is b.grads["student"][k] is None or torch.allclose(
                g, b.grads["student"][k], rtol=1e-4, atol=1e-7
            ), k


@pytest.mark.parametrize("kind", ["dit", "wan"])
def test_low_precision(monkeypatch, tmp_path, kind):
    """Under bf16 autocast, bank included: gradients in float32 of all weights, r and features; those of an unselected run up to rounding."""
    teacher = (
        wan_flags(tmp_path / "teacher")
        if kind == "wan"
        else ["--teacher", save_dit(tmp_path / "teacher")]
    )
    runs = []
    for precision in ("no", "bf16"):
        with monkeypatch.context() as m:
            runs.append(
                run(
                    m,
                    tmp_path / precision,
                    *teacher,
                    "--target_layers",
                    "1",
                    "--mixed_precision",
                    precision,
                    "--guidance_scale",
                    "2",
                    "--objective",
                    "mse",
                )
            )
    a, b = (r.updates[0].grads["student"] for r in runs)
    norm = torch.stack([g.norm() for g in a.values()]).norm()
    assert (
        all(g.dtype == torch.float32 for g in b.values())
        and 1e-4 * norm < torch.stack([(a[k] - b[k]).norm() for k in a]).norm() < 0.3 * norm
    )
    assert all(float(v) == float(v) for row in read_log(tmp_path / "bf16") for v in row.values())


# ---- resume -------------------------------------------------------------------------------------------------------------------

RESUMED = [
    "--max_train_steps",
    "6",
    "--checkpointing_steps",
    "2",
    "--selection_share",
    "0.5",
    "--ema_decay",
    "0.7",
    "--gradient_accumulation_steps",
    "2",
    "--train_batch_size",
    "2",
    *GUIDED,
]


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "flags",
    [[], ["--objective", "adm_critic", "--critic_steps", "2"], ["--select", "2"]],
    ids=" ".join,
)
def test_an_interrupted_run_is_the_uninterrupted_one(monkeypatch, tmp_path, capsys, flags):
    """Stopped while layers are selected and after, bit for bit; the bank is not made again; flags that alter the loss are refused by name."""
    flags = ["--teacher", save_dit(tmp_path / "teacher"), *RESUMED, *flags]
    with monkeypatch.context() as m:
        run(m, tmp_path / "whole", *flags)
    student = lambda diary: len(diary.of("student"))  # noqa: E731
    for stop, saved in ((3, 2), (5, 4)):  # the selection ends before the fourth update
        with monkeypatch.context() as m:
            diary = Diary(m)
            real = linvideo.update

            def killed(*args):
                if args[2] == "student" and student(diary) == stop - 1:
                    raise Killed
                return real(*args)

            m.setattr(linvideo, "update", killed)
            with pytest.raises(Killed):
                linvideo.main(["--output_dir", str(tmp_path / "run"), *FEW, *flags])
            assert student(diary) == stop - 1 and diary.trajectories == 3
        assert (
            sorted(p.name for p in (tmp_path / "run" / "state").iterdir())[-1]
            == f"step-{saved:07d}"
        )
        if stop == 3:
            for changed, name in (
                (["--state", "jump"], "--state was 'part' and is 'jump'"),
                (["--bank_size", "11"], "--bank_size"),
                (["--r_init", "0.7"], "--r_init"),
                (["--select", "first"], "--select"),
                (["--learning_rate_r", "0.5"], "--learning_rate_r"),
            ):
                refused = refusal_of(
                    capsys,
                    linvideo.main,
                    "--output_dir",
                    str(tmp_path / "run"),
                    *FEW,
                    *flags,
                    "--resume_from_checkpoint",
                    "latest",
                    *changed,
                )
                assert "cannot resume with other flags" in refused and name in refused
        with monkeypatch.context() as m:
            diary = run(m, tmp_path / "run", *flags, "--resume_from_checkpoint", "latest")
            assert diary.trajectories == 0 and student(diary) == 6 - saved
        assert_bit_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
        assert without_time(read_log(tmp_path / "run")) == without_time(
            read_log(tmp_path / "whole")
        )
        if "--select" not in flags:
            assert load_json(str(tmp_path / "run" / "selection.json")) == load_json(
                str(tmp_path / "whole" / "selection.json")
            )


def test_resume_of_finished_and_shortened_runs(monkeypatch, tmp_path):
    """A finished run is written out again, also elsewhere, without a bank; a longer one goes on with its layers; one that ends where it was stopped, in the midst
    of its selection, has as many linear layers as was said."""
    flags = ["--teacher", save_dit(tmp_path / "teacher"), *RESUMED]
    with monkeypatch.context() as m:
        run(m, tmp_path / "run", *flags)
    first, chosen = (
        weights(tmp_path / "run"),
        load_json(str(tmp_path / "run" / "student" / "config.json")),
    )
    for where in ("run", "elsewhere"):
        with monkeypatch.context() as m:
            diary = run(
                m,
                tmp_path / where,
                *flags,
                "--resume_from_checkpoint",
                str(tmp_path / "run" / "state" / "step-0000006"),
            )
        assert not diary.updates and not diary.trajectories
        assert_bit_equal(
            load_file(tmp_path / where / "student" / WEIGHTS),
            {k[len(WEIGHTS) + 9 :]: v for k, v in first.items() if k.startswith("student")},
        )
        assert load_json(str(tmp_path / where / "student" / "config.json")) == chosen and (
            tmp_path / where / "r.png"
        ).exists() == (where == "run")
    with monkeypatch.context() as m:
        diary = run(
            m,
            tmp_path / "run",
            *flags,
            "--resume_from_checkpoint",
            "latest",
            "--max_train_steps",
            "20",
        )
    assert len(diary.updates) == 14 and all(
        all(p.attend.only for p in u.nets["student"].self_attentions) for u in diary.updates
    )
    assert load_json(str(tmp_path / "run" / "student" / "config.json")) == chosen
    with monkeypatch.context() as m:
        diary = Diary(m)
        real = linvideo.update

        def killed(*args):
            if len(diary.updates) == 4:
                raise Killed
            return real(*args)

        m.setattr(linvideo, "update", killed)
        with pytest.raises(Killed):
            linvideo.main(
                ["--output_dir", str(tmp_path / "cut"), *FEW, *flags, "--max_train_steps", "12"]
            )
    with monkeypatch.context() as m:
        diary = run(
            m,
            tmp_path / "cut",
            *flags,
            "--resume_from_checkpoint",
            "latest",
            "--max_train_steps",
            "4",
        )
    assert (
        not diary.updates
        and len(load_json(str(tmp_path / "cut" / "student" / "config.json"))["linear_layers"]) == 2
    )


def test_nan_stops_the_run(monkeypatch, tmp_path, capsys):
    """Exit code 1, one line, the last checkpoint as it was; the run goes on from there."""
    flags = [
        "--output_dir",
        str(tmp_path / "run"),
        *FEW,
        "--teacher",
        save_dit(tmp_path / "teacher"),
        "--max_train_steps",
        "6",
        "--checkpointing_steps",
        "2",
    ]
    real, calls = linvideo.matching_loss, []
    with monkeypatch.context() as m:
        quiet(m)
        m.setattr(
            linvideo,
            "matching_loss",
            lambda x, g: calls.append(0) or real(x, g * (float("nan") if len(calls) == 5 else 1)),
        )
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: linvideo.main(flags))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and error.startswith(
        "error: student loss or gradient is not finite"
    )
    assert [p.name for p in sorted((tmp_path / "run" / "state").iterdir())] == [
        "step-0000002",
        "step-0000004",
    ]
    with monkeypatch.context() as m:
        quiet(m)
        linvideo.main([*flags, "--resume_from_checkpoint", "latest"])
        linvideo.main([*flags, "--output_dir", str(tmp_path / "whole")])
    assert_bit_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


# ---- the bank on disk ------------------------------------------------------------------------------------------------------------


def test_banks_are_shared_and_others_refused(monkeypatch, tmp_path, capsys):
    """A bank serves every objective; with other flags, another teacher, or prompts it is refused before training; a missing file is made again, a broken one
    is named."""
    teacher, bank = save_dit(tmp_path / "teacher"), tmp_path / "bank"
    flags = [
        "--output_dir",
        str(tmp_path / "run"),
        *FEW,
        "--max_train_steps",
        "1",
        "--bank",
        str(bank),
        "--teacher",
        teacher,
    ]
    quiet(monkeypatch)
    linvideo.main(flags)
    before = {p.name: p.read_bytes() for p in bank.iterdir()}
    (bank / "00001.safetensors").unlink()
    linvideo.main([*flags, "--objective", "mse"])
    assert {p.name: p.read_bytes() for p in bank.iterdir()} == before and not (
        tmp_path / "run" / "bank"
    ).exists()
    other = save_dit(tmp_path / "other", channels=1, depth=2)
    for changed, name in (
        (["--seed", "1"], "seed"),
        (["--guidance_scale", "2"], "guidance_scale"),
        (["--sampling_steps", "4"], "grid"),
        (["--timestep_shift", "1"], "grid"),
        (["--bank_size", "9"], "trajectories"),
        (["--bank_batch", "5"], "batch"),
        (["--teacher", other], "teacher"),
    ):
        assert f"was made with another {name}: name another folder" in refusal_of(
            capsys, linvideo.main, *flags, *changed
        )
    for broken in (before["00002.safetensors"][:-8], b"", before["00000.safetensors"]):
        (bank / "00002.safetensors").write_bytes(broken)
        assert "00002.safetensors is " in refusal_of(capsys, linvideo.main, *flags)
    (bank / "bank.json").write_text("{")
    assert "not readable JSON" in refusal_of(capsys, linvideo.main, *flags)


def test_bank_of_other_prompts(monkeypatch, tmp_path, capsys):
    quiet(monkeypatch)
    flags = [
        "--output_dir",
        str(tmp_path / "run"),
        *FEW,
        *wan_flags(tmp_path / "wan"),
        "--max_train_steps",
        "1",
        "--bank",
        str(tmp_path / "bank"),
    ]
    linvideo.main(flags), linvideo.main(flags)
    path = tmp_path / "wan" / "prompts.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    for changed in (
        {"cond.text": tensors["cond.text"][:4].contiguous()},
        {"cond.text": tensors["cond.text"].flip(0)},
        {"uncond.text": -tensors["uncond.text"]},
    ):
        save_file({**tensors, **changed}, path)
        assert "was made with another prompts" in refusal_of(capsys, linvideo.main, *flags)


# ---- refusals --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--target_layers", "0"], "--target_layers: must be >= 1"),
        (["--target_layers", "5"], "--target_layers 5: this network has 4 self-attention layer(s)"),
        (["--select", "4"], "different layers of 0 to 3"),
        (["--select", "1", "1"], "different layers of 0 to 3"),
        (["--select", "deepest"], "--select deepest: give one of"),
        (["--select", "first", "1"], "--select first 1"),
        (
            ["--select", "0", "1", "2", "--target_layers", "2"],
            "names 3 layer(s), --target_layers says 2",
        ),
        (["--feature_map", "none"], "--feature_map"),
        (
            ["--state", "rollout", "--sampling_steps", "2"],
            "rollout needs --sampling_steps of at least 3",
        ),
        (["--objective", "mse", "--regression_weight", "1"], "--regression_weight: is for"),
        (["--state", "rollout", "--regression_weight", "1"], "not --state rollout"),
        (["--part", "0"], "--part"),
        (["--alpha", "4"], "--alpha"),
        (["--alpha", "4", "1"], "must be > 1"),
        (["--min_time", "0"], "--min_time"),
        (["--r_init", "1.1"], "--r_init"),
        (["--objective", "gan"], "--objective"),
        (["--sample_shape", "1", "6", "6"], "DiT expects x of shape"),
        (["--prompts", "x.safetensors"], "takes class labels"),
        (["--teacher", "ring"], "a RingMLP has no self-attention that can be replaced"),
        (["--teacher", "VP"], "predicts eps; the score of Eq. 13 is a flow's"),
        (["--teacher", "LINEAR"], "has linear attention already"),
        (["--teacher", "nowhere"], "neither an embedded world"),
        (["--resume_from_checkpoint", "nowhere"], "no state.json there"),
        (["--sample", "TEACHER"], "sampler.json does not exist"),
    ],
)
def test_wrong_input(monkeypatch, tmp_path, capsys, flags, says):
    """One line, exit code 2, nothing written."""
    quiet(monkeypatch)
    names = {"TEACHER": save_dit(tmp_path / "teacher")}
    if "VP" in flags:
        names["VP"] = save_tiny_vp_teacher(tmp_path / "vp")
    if "LINEAR" in flags:
        names["LINEAR"] = save_dit(tmp_path / "linear", linear_layers=[1])
    flags = [
        *([] if "--teacher" in flags else ["--teacher", names["TEACHER"]]),
        *(names.get(f, f) for f in flags),
    ]
    assert says in refusal_of(
        capsys, linvideo.main, *FEW, "--output_dir", str(tmp_path / "run"), *flags
    )
    assert not (tmp_path / "run").exists()


# ---- outputs ---------------------------------------------------------------------------------------------------------------------


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


def euler(net, z, label, grid, scale):
    with torch.no_grad():
        for t, s in zip(grid[:-1], grid[1:]):
            at = torch.full((len(z),), t)
            v, none = net(z, at, label=label), net(z, at, label=torch.full_like(label, 3))
            z = z + (s - t) * (none + scale * (v - none))
    return z


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_outputs_of_a_run(monkeypatch, tmp_path, scale):
    """What a run with a world leaves: rows of student and student_4 with their calls, the student's own figures, config and sampler, pictures; --sample draws
    the same. (On 200 samples, not 2,000.)"""
    many = report.many
    for module in (linvideo, report):
        monkeypatch.setattr(module, "load_world", lambda name: World())
    monkeypatch.setattr(report, "balanced_labels", lambda n, classes: torch.arange(200) % 3)
    monkeypatch.setattr(report, "many", lambda draw, n, batch=500: many(draw, min(n, 200), batch))
    teacher = save_dit(tmp_path / "teacher", world="clips", class_names=World.class_names)
    flags = [
        "--output_dir",
        str(tmp_path / "run"),
        *FEW,
        "--teacher",
        teacher,
        "--teacher_steps",
        "0",
        "--guidance_scale",
        str(scale),
    ]
    linvideo.main(flags)
    out, times = tmp_path / "run", 1 if scale == 1 else 2
    assert {p.name for p in out.iterdir()} == {
        "student",
        "state",
        "bank",
        "samples.png",
        "log.csv",
        "report.json",
        "selection.json",
        "r.png",
    }
    assert {p.name for p in (out / "student").iterdir()} == {"config.json", "sampler.json", WEIGHTS}
    written, found = load_json(str(out / "report.json")), load_json(str(out / "selection.json"))
    rows = {r["name"]: r for r in written["results"]}
    assert {name: r["nfe"] for name, r in rows.items()} == {
        "data": 0,
        "teacher_same_steps": K * times,
        "student": K * times,
        "student_4": 4 * times,
    }
    assert written["method"] == "linvideo" and written["steps"] == 3
    config = load_json(str(out / "student" / "config.json"))
    assert config == {
        **load_json(teacher + "/config.json"),
        "linear_layers": found["linear_layers"],
        "feature_map": "hedgehog",
    }
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
    net = load_network(str(out / "student"))[0]
    assert (
        written["params"] == sum(p.numel() for p in net.parameters())
        and sum(isinstance(m, LinearAttention) for m in net.modules()) == 2
    )

    z, label, frozen = (
        Draws(0, "evaluation", 0, range(200)).normal("z", (1, 4, 4)),
        torch.arange(200) % 3,
        load_network(teacher)[0],
    )
    own, coarse = (euler(n, z, label, step_grid(K, SHIFT), scale) for n in (net, frozen))
    assert rows["student"]["paired_mse"] == pytest.approx(
        (own - coarse).square().mean().item(), rel=1e-3
    )
    assert {k: rows["student"][k] for k in found} == found and "paired_mse" not in rows["student_4"]
    for name, n, steps in (
        ("student", net, K),
        ("student_4", net, 4),
        ("teacher_same_steps", frozen, K),
    ):
        assert rows[name]["fd"] == pytest.approx(
            euler(n, z, label, step_grid(steps, SHIFT), scale).square().mean().item(), rel=1e-3
        )

    image, rs = (
        Image.open(out / "r.png").convert("RGB"),
        [[float(row[f"r_{i}"]) for i in range(4)] for row in read_log(out)],
    )
    for i in range(4):
        for u, x in (
            (0, 72),
            (1, 70 + 360),
            (2, 70 + 718),
        ):  # three updates, a third of the width each
            r, (red, green, blue) = rs[u][i], image.getpixel((x, 22 * i + 10))
            far = abs(2 * r - 1)
            want = [
                255 * (1 - far) + far * c for c in ((200, 60, 50) if r > 0.5 else (40, 90, 190))
            ]
            assert [red, green, blue] == pytest.approx(want, abs=2)
    linvideo.main(
        ["--sample", str(out), "--preview_samples", "7", "--output_dir", str(tmp_path / "samples")]
    )
    x = load_file(tmp_path / "samples" / "samples.safetensors")["x0"]
    torch.testing.assert_close(
        x, euler(net, z[:7], torch.arange(7) % 3, step_grid(K, SHIFT), scale), rtol=1e-4, atol=1e-4
    )
    assert (tmp_path / "samples" / "samples.png").is_file()


def test_wan_student_from_end_to_end(tmp_path):
    """No world: pictures, a GIF and latents; config with diffusers' own keys and ours; guidance kept; what --sample draws is what the run showed."""
    flags = [
        *FEW,
        *wan_flags(tmp_path / "wan"),
        "--guidance_scale",
        "2",
        "--target_layers",
        "1",
        "--checkpointing_steps",
        "2",
        "--ema_decay",
        "0.5",
    ]
    linvideo.main(["--output_dir", str(tmp_path / "run"), *flags])
    teacher = json.loads((tmp_path / "wan" / "transformer" / "config.json").read_text())
    student, config = load_network(str(tmp_path / "run" / "student"))
    assert {
        k: v for k, v in config.items() if k not in ("linear_layers", "feature_map")
    } == teacher and len(config["linear_layers"]) == 1
    assert isinstance(student, WanTransformer3DModel) and isinstance(
        student.blocks[config["linear_layers"][0]].attn1.attend, LinearAttention
    )
    assert load_json(str(tmp_path / "run" / "student" / "sampler.json"))["guidance_scale"] == 2
    assert load_json(str(tmp_path / "run" / "report.json"))["results"] == []
    assert Image.open(tmp_path / "run" / "samples.gif").n_frames == 2 and set(
        read_bank(tmp_path / "run" / "bank")
    ) == {"index", "x", "v", "v_uncond"}
    linvideo.main(
        [
            "--sample",
            str(tmp_path / "run"),
            "--prompts",
            str(tmp_path / "wan" / "prompts.safetensors"),
            "--preview_samples",
            "2",
            "--output_dir",
            str(tmp_path / "samples"),
        ]
    )
    ours, again = (
        load_file(tmp_path / d / "samples.safetensors")["x0"] for d in ("run", "samples")
    )
    assert ours.shape == (2, 4, 2, 4, 6)
    torch.testing.assert_close(ours, again, rtol=1e-4, atol=1e-4)


def test_dmd_goes_on_from_a_student(monkeypatch, tmp_path, capsys):
    """dmd.py --student_init: the student starts as this one with its linear layers and ends with them; the fake is the teacher with softmax attention."""
    teacher = save_tiny_teacher(tmp_path / "teacher")
    with monkeypatch.context() as m:
        run(m, tmp_path / "run", "--teacher", teacher, "--target_layers", "1")
    with monkeypatch.context() as m:
        diary, start = DmdDiary(m, dmd), {}
        watch = diary.watch
        diary.watch = lambda *nets: (
            start.update(
                student=copy.deepcopy(nets[1].state_dict()),
                fake=copy.deepcopy(nets[2].state_dict()),
            )
            or watch(*nets)
        )
        dmd.main(
            [
                "--teacher",
                teacher,
                "--student_init",
                str(tmp_path / "run" / "student"),
                "--student_steps",
                "4",
                "--max_train_steps",
                "2",
                "--train_batch_size",
                "4",
                "--fake_update_ratio",
                "1",
                "--output_dir",
                str(tmp_path / "dmd"),
            ]
        )
    assert_bit_equal(start["student"], load_file(tmp_path / "run" / "student" / WEIGHTS))
    assert_bit_equal(
        {k: v for k, v in start["fake"].items() if not k.startswith("steps.")},
        load_file(tmp_path / "teacher" / WEIGHTS),
    )
    assert not any(isinstance(m, LinearAttention) for m in diary.fake.modules())
    one, two = (load_json(str(tmp_path / d / "student" / "config.json")) for d in ("run", "dmd"))
    assert one == two and len(two["linear_layers"]) == 1
    net = load_network(str(tmp_path / "dmd" / "student"))[0]
    w_q = f"blocks.{two['linear_layers'][0]}.attend.w_q"
    assert isinstance(
        net.blocks[two["linear_layers"][0]].attend, LinearAttention
    ) and not torch.equal(net.state_dict()[w_q], start["student"][w_q])
    quiet(monkeypatch)
    wrong = save_dit(tmp_path / "wrong", depth=3, linear_layers=[0])
    assert "does not have the shapes" in refusal_of(
        capsys,
        dmd.main,
        "--teacher",
        teacher,
        "--student_init",
        wrong,
        "--output_dir",
        str(tmp_path / "none"),
    )


# ---- ranks -------------------------------------------------------------------------------------------------------------------------


def test_two_ranks_are_one_process_with_twice_the_batch(monkeypatch, tmp_path):
    """Each makes its share of the bank; gradients and the log are those of one process with all rows."""
    flags = [*FEW, *wan_flags(tmp_path / "wan"), "--guidance_scale", "2", "--target_layers", "1"]
    with monkeypatch.context() as m:
        quiet(m)
        assert_two_ranks_are_one_process(m, tmp_path, linvideo, flags, least=1e-4)
    banks = [read_bank(tmp_path / d / "bank") for d in ("one", "two")]
    for k, v in banks[0].items():
        torch.testing.assert_close(v, banks[1][k], rtol=2e-3, atol=2e-3)
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        for name in ("loss", "g", "norm_student", "r_0", "r_1"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=2e-3, abs=1e-5), (
                a["step"],
                name,
            )
    assert (tmp_path / "two" / "samples.png").is_file() and (tmp_path / "two" / "r.png").is_file()
    assert [
        load_json(str(tmp_path / d / "student" / "config.json"))["linear_layers"]
        for d in ("one", "two")
    ][0]
    assert (
        len({str(load_json(str(tmp_path / d / "student" / "config.json"))) for d in ("one", "two")})
        == 1
    )


def test_ranks_share_the_bank_whatever_is_there(monkeypatch, tmp_path):
    """A rank's files depend on their numbers alone: another rank that is ahead, or a resumed run, leaves none out."""
    teacher = save_dit(tmp_path / "teacher")
    args = linvideo.parse_args(
        [*FEW, "--teacher", teacher, "--bank_batch", "1", "--output_dir", str(tmp_path / "run")]
    )
    net = start_teacher(args, linvideo.WORLDS)
    make = lambda rank: linvideo.make_bank(
        args,
        net,
        Conditions(args, net.base),
        (1, 4, 4),
        step_grid(K, SHIFT),
        rank,
        3,
        torch.device("cpu"),
    )  # noqa: E731
    for rank in (1, 0):
        (tmp_path / "run" / "bank").mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError, match="does not exist"):
            make(rank)
    assert sorted(int(p.stem) for p in (tmp_path / "run" / "bank").glob("*.safetensors")) == [
        i for i in range(BANK) if i % 3 < 2
    ]
    assert len(make(2).files) == BANK
