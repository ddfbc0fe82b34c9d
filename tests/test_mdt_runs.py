"""mdt_dist.py's loop: gradients from the draws, what a run leaves, resume, samples, refusals.

The first gradient of every arm and switch is computed again from the draws alone. Both stages of
TRELLIS are run (on two ranks in test_released_pairs.py). The formulas themselves are tested in
test_mdt_math.py.
"""

import copy
import json
import re
import types

import pytest
import torch
from helpers import (
    ROOT,
    assert_bit_equal,
    perturbed,
    read_log,
    refusal_of,
    ring_network,
    save_tiny_teacher,
    save_tiny_vp_teacher,
    weights,
)
from safetensors.torch import load_file, save_file
from test_trellis import CLASSES, points, save_root, save_text_root, save_tiny_clip, trellis_euler

import mdt_dist
from models import encode
from models.diffusion import expand, shift, step_grid
from models.draws import Draws
from models.files import UserError, load_json
from models.networks import WEIGHTS, load_network, network_config, save_network
from models.networks.trellis import SLatFlowModel, SparseStructureFlowModel
from models.plumbing import film, teachers
from models.plumbing.run import Run
from models.plumbing.teachers import freeze_teacher, load_teacher
from models.worlds import load_world

B, N, SEED = 5, 7, 2
# the launch line's
PAPER = "--t_law uniform --vd_weight paper --slow_clock 1000 --guidance_vd 1".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of a teacher and of another student, and a data file -> flags of a run."""
    root = tmp_path_factory.mktemp("mdt")
    teacher = save_tiny_teacher(root / "teacher")
    other = perturbed(load_network(teacher)[0], seed=5, std=0.05)
    save_network(other, network_config(other), str(root / "other"))
    x0 = torch.randn(N, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    data = str(root / "data.safetensors")
    save_file({"x0": x0, "cond.label": torch.arange(N) % 3}, data)
    flags = f"--teacher {teacher} --student_init {root / 'other'} --data {data} --seed {SEED} "
    flags += f"--train_batch_size {B} --max_train_steps 1 --teacher_steps 3 --preview_samples 3 "
    return root, (flags + "--lr_warmup_steps 0 --max_grad_norm 1e9 --ema_decay 0").split()


# ---- the first gradient --------------------------------------------------------------------------


class Reference:
    """The loss of one update, row by row, from the draws alone; the flags' meanings in words."""

    def __init__(
        self, teacher, student, draw, arm="mdt", dt=0.01, c=0.1, jvp=False, guidance=(1, 1),
        shared=False, uniform=False, w="code", phases=1, time_shift=1.0, weights=(1.0, 1.0),
    ):  # fmt: skip
        self.weights = weights
        self.teacher, self.student, self.draw, self.arm, self.dt = teacher, student, draw, arm, dt
        self.c, self.jvp, self.guidance, self.shared = c, jvp, guidance, shared
        self.uniform, self.w, self.phases, self.time_shift = uniform, w, phases, time_shift

    def times(self, name):
        lowest = 1e-3 if self.jvp else self.dt
        if self.uniform:
            u = self.draw.spread(name)
        else:
            u = torch.sigmoid(1 + self.draw.normal(name, ()))
        return lowest + (1 - lowest) * shift(u, self.time_shift)

    def call(self, net, x, t, y):
        return net(x[None], t[None], label=y[None])[0]

    def guided(self, x, t, y, scale):
        cond = self.call(self.teacher, x, t, y)
        uncond = self.call(self.teacher, x, t, torch.tensor(3))
        return cond if scale == 1 else (1 + (scale - 1)) * cond - (scale - 1) * uncond

    def derivative(self, x, t, v, y):
        above, h = t, self.dt
        if self.jvp:  # by central differences, which do not know of jvp
            x, above, h = x + 1e-4 * v, t + 1e-4, 2e-4
        below = self.call(self.student, x - h * v, above - h, y)
        d = (self.call(self.student, x, above, y) - below) / h
        if self.c is None:
            return d
        return rms_normalised(d) if self.c == "rms" else d / (d.norm() + self.c)

    def matching(self, x0, z, t, y):
        """-> loss, residual."""
        x_t, dt = (1 - t) * x0 + t * z, self.dt
        with torch.no_grad():
            v = self.guided(x_t, t, y, self.guidance[0])
            s, length = t - dt, t - int((t - dt) * self.phases) / self.phases
            d = self.derivative(x_t, t, v, y)
            phi_s = self.call(self.student, x_t - dt * v, s, y)
            below = x_t - dt * v - (s - (t - length)) * phi_s
        phi = self.call(self.student, x_t, t, y)
        if self.arm == "cm":
            return (x_t - length * phi - below).square().mean(), phi - v
        if self.arm == "scm":
            r = (phi - v).detach()  # the derivative's part starts at zero
            g = rms_normalised(r)
            return (phi * g).mean() + 0.5 * g.square().mean() - (phi.detach() * g).mean(), r
        r = phi - (v - length * d)
        return r.square().mean(), r

    def distillation(self, z1, z2, t, y):
        """-> loss, residual."""
        phi_z = self.call(self.student, z1, torch.tensor(1.0), y)
        with torch.no_grad():
            x_t = (1 - t) * (z1 - phi_z) + t * z2
            v = self.guided(x_t, t, y, self.guidance[1])
            r = self.call(self.student, x_t, t, y) + t * self.derivative(x_t, t, v, y) - v
            weight = {"code": 2.0, "paper": 1 - t, "kl": (1 - t) ** 2 / t}[self.w]
        value = weight / 2 * r.square().mean()
        return (weight * r * (phi_z - phi_z.detach())).mean() + value, r

    def loss(self, data):
        """-> scalar, {term: its loss}, {term: mean squared residual}."""
        index = self.draw.integer("data", N)
        x0, label = data["x0"][index], data["cond.label"][index]
        t, t2 = self.times("t"), self.times("t2")
        z, z1, z2 = (self.draw.normal(name, (1, 4, 4)) for name in ("z", "z1", "z2"))
        if self.shared:
            t2, z2 = t, z
        terms = {}
        if self.arm != "vd":
            terms["vm"] = [self.matching(x0[i], z[i], t[i], label[i]) for i in range(B)]
        if self.arm in ("mdt", "vd"):
            terms["vd"] = [self.distillation(z1[i], z2[i], t2[i], label[i]) for i in range(B)]
        losses = {k: torch.stack([loss for loss, _ in term]).mean() for k, term in terms.items()}
        weighted = {"vm": self.weights[0], "vd": self.weights[1]}
        total = sum(weighted[k] * loss for k, loss in losses.items())
        return (
            total,
            {k: float(loss.detach()) for k, loss in losses.items()},
            {
                name: float(torch.stack([r.detach() for _, r in term]).square().mean())
                for name, term in terms.items()
            },
        )


def rms_normalised(r):
    return r / (r.square().mean().sqrt() + 0.1)


# fmt: off
CASES = [
    ([], {}),
    (["--arm", "vm"], dict(arm="vm")),
    (["--arm", "vd"], dict(arm="vd")),
    (["--arm", "cm"], dict(arm="cm")),
    (["--arm", "scm"], dict(arm="scm")),
    (["--d_norm", "none"], dict(c=None)),
    (["--d_norm", "rms"], dict(c="rms")),
    (["--d_norm", "0.5", "--dt", "0.03"], dict(c=0.5, dt=0.03)),
    (["--derivative", "jvp", "--d_norm", "none"], dict(jvp=True, c=None)),
    (["--vd_weight", "paper"], dict(w="paper")),
    (["--vd_weight", "kl"], dict(w="kl")),
    (["--guidance_vm", "41", "--guidance_vd", "101"], dict(guidance=(41, 101))),
    (["--shared_noise"], dict(shared=True)),
    (["--t_law", "uniform", "--timestep_shift", "3"], dict(uniform=True, time_shift=3.0)),
    (["--arm", "vm", "--phases", "3"], dict(arm="vm", phases=3)),
    (["--arm", "cm", "--phases", "2", "--dt", "0.4"], dict(arm="cm", phases=2, dt=0.4)),
    (["--d_norm", "none", *PAPER], dict(c=None, uniform=True, w="paper")),
    (["--vm_weight", "0.5", "--vd_loss_weight", "3"], dict(weights=(0.5, 3.0))),
]
# fmt: on


@pytest.mark.parametrize(
    "flags, means", CASES, ids=[" ".join(flags) or "default" for flags, _ in CASES]
)
def test_first_gradient_is_that_of_the_draws(monkeypatch, tmp_path, tiny, flags, means):
    """Every weight's gradient before clipping, and log.csv's losses.

    The teacher gets no gradient and is not moved.
    """
    root, base = tiny
    grads, frozen, real_update = [], [], Run.update

    def update(run, optimizers, what):
        parameters = optimizers.param_groups[0]["params"]
        grads.append([p.grad.clone() for p in parameters])
        real_update(run, optimizers, what)

    def freeze(run, teacher, **how):
        freeze_teacher(run, teacher, **how)
        frozen.append(teacher.net)

    monkeypatch.setattr(Run, "update", update)
    monkeypatch.setattr(mdt_dist, "freeze_teacher", freeze)
    monkeypatch.setattr(mdt_dist, "finish", lambda *a: None)
    fixed = "--d_norm 0.1 --t_law logit_normal".split()
    fixed += [] if "jvp" in flags else ["--dt", "0.01"]
    if not {"vm", "cm", "scm"} & {*flags}:
        fixed += ["--vd_weight", "code"]
    mdt_dist.main([*base, *fixed, *flags, "--output_dir", str(tmp_path / "run")])
    teacher, student = (load_network(str(root / name))[0] for name in ("teacher", "other"))
    reference = Reference(teacher, student, Draws(SEED, 0, "student", range(B)), **means)
    loss, terms, squares = reference.loss(load_file(root / "data.safetensors"))
    want = torch.autograd.grad(loss, list(student.parameters()))
    largest = max(v.abs().max() for v in want)
    loose = 20 if means.get("jvp") else 1
    assert largest > 1e-3 and len(grads) == 1
    for a, b in zip(grads[0], want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 * loose, atol=float(1e-3 * loose * largest))
    (row,) = [{name: float(v) for name, v in row.items()} for row in read_log(tmp_path / "run")]
    losses = {name: v for name, v in row.items() if name.startswith("loss_")}
    # unweighted; no column of a term that is off
    assert losses == pytest.approx({f"loss_{k}": v for k, v in terms.items()}, rel=0.01 * loose)
    residuals = {name[2:]: v**2 for name, v in row.items() if name.startswith("r_")}
    assert residuals == pytest.approx(squares, rel=0.01 * loose, abs=1e-9)
    assert not any(p.requires_grad or p.grad is not None for p in frozen[0].parameters())
    assert_bit_equal(dict(frozen[0].state_dict()), load_file(root / "teacher" / WEIGHTS))


def test_the_derivatives_part_of_scm_grows(monkeypatch):
    """From nothing to all of it over --tangent_warmup updates."""
    seen, teacher = [], types.SimpleNamespace(net=None, shift=1.0)
    monkeypatch.setattr(mdt_dist, "continuous_consistency", lambda *a: seen.append(a[-1]))
    args = mdt_dist.parse_args(["--arm", "scm", "--tangent_warmup", "20"])
    for step in (0, 5, 20, 30):
        at = torch.zeros(1), torch.zeros(1), torch.ones(1), {}, {}
        mdt_dist.matching(args, None, teacher, *at, step)
    assert seen == [0, 0.25, 1, 1]


def test_paper_launch_line_is_the_paper_s_algorithm():
    """The docstring's `paper` line has the flags that are tested above as Alg. 1 with Eq. 17."""
    (line,) = [v for v in mdt_dist.__doc__.splitlines() if v.startswith("    paper       python")]
    assert line.split("mdt_dist.py ")[1].split() == PAPER
    args = mdt_dist.parse_args(PAPER)
    assert (args.arm, args.derivative, args.dt, args.phases) == ("mdt", "difference", 0.01, 1)
    assert args.slow_clock == load_teacher("voxels").net.t_scale
    assert (args.vm_weight, args.vd_loss_weight, args.renoise) == (1, 1, "ode")
    assert args.t_law == "uniform"
    assert not args.shared_noise and args.d_norm is None and args.student_steps == [1, 2]


def test_times_stay_where_a_point_below_exists(monkeypatch, tmp_path):
    """t in [dt, 1], spread over all of it by either law; no time is ever negative."""
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    monkeypatch.setattr(mdt_dist, "finish", lambda *a: None)
    normals = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    means = {"uniform": 0.5, "logit_normal": torch.sigmoid(1 + normals).mean()}
    base = "--teacher ring --dt 0.2 --arm vm --train_batch_size 500 --max_train_steps 2 "
    base = (base + "--preview_every 0").split()  # no film, which would ask at a time of its own
    real = mdt_dist.time_derivative
    for law, want in means.items():
        seen = []

        def spy(student, x_t, t, *rest, seen=seen):
            seen.append(t)
            return real(student, x_t, t, *rest)

        monkeypatch.setattr(mdt_dist, "time_derivative", spy)
        mdt_dist.main([*base, "--t_law", law, "--output_dir", str(tmp_path / law)])
        t = torch.cat(seen)
        assert 0.2 <= t.min() < 0.35 and 0.95 < t.max() <= 1
        assert abs(((t - 0.2) / 0.8).mean() - want) < 0.03


# ---- the student's clock -------------------------------------------------------------------------


def test_a_slow_clock_keeps_the_student_and_calms_its_derivative():
    """The student of a shipped teacher is the same function of t, up to a few per cent, and the
    exact derivative is no longer that of the fast sinusoids."""
    teacher = load_teacher("voxels").net.eval()
    student = copy.deepcopy(teacher)
    mdt_dist.slow_clock(student, 20.0, seed=0)
    assert student.t_scale == student.config["t_scale"] == 20 and teacher.t_scale == 1000
    x0, label = load_world("voxels").data(4, 1)
    z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([0.3, 0.5, 0.7, 0.9]), {"label": label}
    x = mdt_dist.add_noise(x0, z, t)
    with torch.no_grad():
        v, phi = teacher(x, t, **cond), student(x, t, **cond)
    assert (phi - v).square().mean() < 0.05**2 * v.square().mean()
    fast, slow = (mdt_dist.time_derivative(net, x, t, v, cond, None) for net in (teacher, student))
    assert slow.square().mean() < 0.6**2 * fast.square().mean()


def test_a_saved_student_keeps_its_clock(monkeypatch, tmp_path, tiny, capsys):
    """In its config, and so in its samples; a run that goes on does not fit it again."""
    fits, real = [], mdt_dist.slow_clock

    def few(student, t_scale, seed):
        fits.append(t_scale)
        real(student, t_scale, seed, updates=20)

    monkeypatch.setattr(mdt_dist, "slow_clock", few)
    _, flags = tiny
    run = [*flags, "--output_dir", str(tmp_path / "run"), "--slow_clock", "20"]
    mdt_dist.main(run)
    student, config = load_network(str(tmp_path / "run" / "student"))
    assert config["t_scale"] == 20 == student.t_scale and fits == [20]
    at = flags.index("--student_init")
    init = [*flags[:at], "--student_init", str(tmp_path / "run"), *flags[at + 2 :]]
    mdt_dist.main([*init, "--output_dir", str(tmp_path / "next"), "--slow_clock", "20"])
    assert fits == [20]
    again, config = load_network(str(tmp_path / "next" / "student"))
    assert config["t_scale"] == 20
    mdt_dist.main([*flags, "--output_dir", str(tmp_path / "fast"), "--slow_clock", "1000"])
    assert fits == [20]
    assert "t_scale" not in load_json(str(tmp_path / "fast" / "student" / "config.json"))


# ---- what a run leaves, resume, samples ----------------------------------------------------------


@pytest.fixture
def ring(monkeypatch):
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    flags = "--teacher ring --train_batch_size 16 --lr_decay_share 0 --teacher_steps 3 "
    return (flags + "--checkpointing_steps 2").split()


@pytest.mark.parametrize(
    "flags",
    [
        ["--ema_decay", "0.5"],
        ["--renoise", "sde", "--timestep_shift", "3"],
        ["--student_guidance", "2", "--arm", "vm"],
    ],
    ids=" ".join,
)
def test_what_a_run_leaves(tmp_path, ring, flags):
    """Rows of both step counts and of the teacher.

    Their samples are mdt_dist.sample's of the saved student, which --sample draws again in either
    count.
    """
    run = tmp_path / "run"
    mdt_dist.main([*ring, *flags, "--max_train_steps", "3", "--output_dir", str(run)])
    guided, r = "--student_guidance" in flags, load_json(str(run / "report.json"))
    calls, scale = (2, 2.0) if guided else (1, 1.0)
    teacher = {"data": 0, "teacher": 3, "teacher_same_steps": 2, "teacher_1": 1}
    rows = {row["name"]: row for row in r["results"]}
    assert {name: row["nfe"] for name, row in rows.items()} == {
        **teacher, "student": 2 * calls, "student_1": calls,
    }  # fmt: skip
    assert r["method"] == "mdt_dist" and r["steps"] == 3
    assert all("fd" in row for row in rows.values())
    assert all(rows[name]["paired_mse"] > 0 for name in set(rows) - {"data", "teacher"})
    left = ["log.csv", "report.json", "ring.gif", "samples.png", "state", "student"]
    assert sorted(p.name for p in run.iterdir()) == left
    log = read_log(run)
    terms = {"loss_vm", "r_vm"} if guided else {"loss_vm", "loss_vd", "r_vm", "r_vd"}
    assert [row["step"] for row in log] == ["1", "2", "3"]
    assert set(log[0]) == {"step", *terms, "norm_student", "seconds", "peak_memory_mb"}
    time_shift = 3.0 if "3" in flags else 1.0
    assert load_json(str(run / "student" / "sampler.json")) == {
        "method": "mdt_dist",
        "prediction": "flow_v",
        "schedule": {"type": "flow"},
        "times": step_grid(2, time_shift)[:-1],
        "timestep_shift": time_shift,
        "rule": "renoise" if "sde" in flags else "euler",
        "guidance_scale": scale,
        "sample_shape": [2],
    }
    student, draw = load_network(str(run / "student"))[0], Draws(0, "evaluation", 0, range(400))
    conds = {"label": torch.arange(400) % 4}, {"label": torch.full((400,), 4)}
    for steps in ([], ["--student_steps", "1"]):
        samples = tmp_path / "samples"
        mdt_dist.main(["--sample", str(run), *steps, "--output_dir", str(samples)])
        times = step_grid(1 if steps else 2, time_shift)[:-1]
        rule = "sde" if "sde" in flags else "ode"
        noise = lambda name: draw.normal(name, (2,))  # noqa: E731
        want = mdt_dist.sample(student, noise, times, *conds, scale, rule)
        got = load_file(samples / "samples.safetensors")["x0"]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert want.std() > 0.1


def test_film_of_a_short_run(tmp_path, ring):
    """ring.gif: -t v of the teacher and -t u of the student at t = .4, here with d_norm .1."""
    shown, take = [], film.Film.take

    def spy(self, done):
        x_t = torch.tensor([[0.3, -0.2], [1.0, 0.5]])
        t, cond = torch.full((2,), 0.4), {"label": torch.zeros(2).long()}
        arrows = [0.6 * mu(x_t, t, cond, cond) - x_t for mu in self.mus]
        student = copy.deepcopy(self.run.state["student"])
        shown.append((self.teacher.net, student, x_t, t, cond, arrows))
        take(self, done)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(film.Film, "take", spy)
        flags = "--max_train_steps 3 --d_norm 0.1 --learning_rate 1e-2 --lr_warmup_steps 0"
        mdt_dist.main([*ring, *flags.split(), "--output_dir", str(tmp_path)])
    assert len(film.read_gif(tmp_path / "ring.gif")) == len(shown) == 4
    for teacher, student, x_t, t, cond, (real, fake) in shown:
        v, phi = teacher(x_t, t, **cond), student(x_t, t, **cond)
        d = (phi - student(x_t - 0.01 * v, t - 0.01, **cond)) / 0.01
        u = phi + 0.4 * d / (d.norm(dim=1, keepdim=True) + 0.1)
        torch.testing.assert_close(real, -0.4 * v, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fake, -0.4 * u, rtol=1e-3, atol=1e-4)
    assert (shown[0][-1][1] - shown[-1][-1][1]).abs().max() > 1e-3  # the student has moved


def test_resume_is_the_unbroken_run(tmp_path, ring):
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def run(folder, steps, *more):
        flags = ["--ema_decay", "0.5", "--max_train_steps", steps, "--output_dir", str(folder)]
        mdt_dist.main([*ring, *flags, *more])

    run(whole, "4")
    run(broken, "2")
    run(broken, "4", "--resume_from_checkpoint", "latest")
    assert_bit_equal(weights(whole), weights(broken))
    frames = [film.read_gif(folder / "ring.gif") for folder in (whole, broken)]
    assert len(frames[0]) == len(frames[1]) == 5
    rows = {
        folder: [
            {k: v for k, v in row.items() if k not in ("seconds", "peak_memory_mb")}
            for row in read_log(folder)
        ]
        for folder in (whole, broken)
    }
    assert len(rows[whole]) == 4 and rows[whole] == rows[broken]
    before = weights(broken)
    run(broken, "4", "--resume_from_checkpoint", "latest")  # finished: written out again
    assert_bit_equal(before, weights(broken))


# ---- refusals ------------------------------------------------------------------------------------


# fmt: off
REFUSED = [
    ("--slow_clock 20 --lora_rank 2", "adapters leave the embedding of t as it is"),
    ("--slow_clock 20 --teacher ring", "only a DiT of this project keeps the scale of its clock"),
    ("--phases 2", "--phases: mdt leads from noise to data in one phase"),
    ("--arm cm --derivative jvp", "cm takes differences by definition"),
    ("--prompts FILE", "--prompts: conditions come with --data"),
    ("--teacher_guidance_interval 1 0.5", "1 is above 0.5; give the lower end first"),
    ("--d_norm L2", "argument --d_norm"),
    ("--d_norm -1", "argument --d_norm"),
    ("--dt 0", "argument --dt"),
    ("--arm none", "argument --arm"),
    ("--student_steps 0", "argument --student_steps"),
    ("--data MISSING.safetensors", "MISSING.safetensors does not exist"),
    ("--data WIDE", "items are (1, 4, 6)"),
    ("--data CLASSES", "labels from 0 to 3, the teacher has classes 0 to 2"),
    ("--teacher VP", "predicts eps"),
    ("--teacher SS", "needs FILE.safetensors with x0 and cond.tokens"),
    ("--teacher SLAT", "with coords, feats, offsets and cond.tokens"),
    ("--teacher SS --data POINTS", "points of a grid, which are not welcome here"),
    ("--teacher SLAT --data DENSE", "works on points"),
    ("--sample RUN --data DENSE --student_steps 2", "nothing/sampler.json does not exist"),
]
# fmt: on


@pytest.mark.parametrize("flags, message", REFUSED, ids=[flags for flags, _ in REFUSED])
def test_wrong_input_is_one_line_before_any_training(tmp_path, capsys, tiny, flags, message):
    (_, base), tokens, flags = tiny, torch.randn(2, 5, 10), flags.split()
    label = torch.arange(4)
    ragged = {
        "coords": points((4, 6), 4)[:, 1:].contiguous(),
        "feats": torch.randn(10, 3),
        "offsets": torch.tensor([0, 4, 10]),
    }
    files = {
        "WIDE": {"x0": torch.randn(4, 1, 4, 6), "cond.label": label % 3},
        "CLASSES": {"x0": torch.randn(4, 1, 4, 4), "cond.label": label},
        "DENSE": {"x0": torch.randn(2, 3, 8, 8, 8), "cond.tokens": tokens},
        "POINTS": {**ragged, "cond.tokens": tokens},
    }
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in files}
    for name, tensors in files.items():
        save_file(tensors, paths[name])
    if "VP" in flags:
        paths["VP"] = save_tiny_vp_teacher(tmp_path / "vp")
    if "SS" in flags or "SLAT" in flags:
        classes = SparseStructureFlowModel, SLatFlowModel
        saved = save_root(tmp_path, {cls: CLASSES[cls] for cls in classes})
        paths |= {"SS": saved[SparseStructureFlowModel], "SLAT": saved[SLatFlowModel]}
        base = ["--teacher_steps", "0"]
    paths["RUN"] = str(tmp_path / "nothing")
    base = [] if "--sample" in flags else base
    flags = [*base, *[paths.get(f, f) for f in flags], "--output_dir", str(tmp_path / "run")]
    error = refusal_of(capsys, mdt_dist.main, *flags)
    assert message in error, error
    assert not (tmp_path / "run").exists()


# ---- what TRELLIS's two stages and its text models need ------------------------------------------


STAGES = pytest.mark.parametrize(
    "cls", [SparseStructureFlowModel, SLatFlowModel], ids=["structure", "slat"]
)


def stage_data(cls, tokens, seed=0):
    """Tensors of --data for a tiny network of this stage, one item for each row of tokens."""
    g, n = torch.Generator().manual_seed(seed), len(tokens)
    if cls is SparseStructureFlowModel:
        return {"x0": torch.randn(n, 3, 4, 4, 4, generator=g), "cond.tokens": tokens}
    return {
        "coords": points((6,) * n, 8)[:, 1:].int().contiguous(),
        "feats": torch.randn(6 * n, 3, generator=g),
        "offsets": torch.arange(0, 6 * n + 1, 6),
        "cond.tokens": tokens,
    }


def stage_run(teacher, data, folder, *more):
    """Two updates of a tiny network of TRELLIS, as far from the teacher as such updates go."""
    flags = f"--teacher {teacher} --data {data} --output_dir {folder} --max_train_steps 2 "
    flags += "--train_batch_size 2 --preview_samples 3 --learning_rate 1e-3 --ema_decay 0"
    mdt_dist.main([*flags.split(), *more])


def test_each_stage_of_trellis_gets_its_own_settings(tmp_path):
    """The paper's rates and lengths (Sec. 5); how TRELLIS's pipeline.json samples the teacher."""
    both = dict(train_batch_size=8, d_norm=0.1, guidance_vm=41, guidance_vd=101, ema_decay=0.9999)
    both |= dict(timestep_shift=1.0, ema_start=1, teacher_shift=3.0, lr_decay_share=0)
    stages = {
        SparseStructureFlowModel: dict(learning_rate=4e-8, max_train_steps=6000),
        SLatFlowModel: dict(learning_rate=1e-8, max_train_steps=4000),
    }
    guidance = {1024: (6.0, 6.0), 768: (8.5, 8.5), 10: (6.0, 6.0)}  # image, text, unknown
    for width, (teacher, structure) in guidance.items():
        (tmp_path / str(width)).mkdir()
        configs = {cls: {**CLASSES[cls], "cond_channels": width} for cls in stages}
        paths = save_root(tmp_path / str(width), configs)
        for cls, want in stages.items():
            args = mdt_dist.parse_args(["--teacher", paths[cls]])
            student = structure if cls is SparseStructureFlowModel else 1.1
            want = {**both, **want, "guidance_scale": teacher, "student_guidance": student}
            assert {name: getattr(args, name) for name in want} == want
            assert args.teacher_guidance_interval == [0.5, 1.0]
            args = mdt_dist.parse_args(["--teacher", paths[cls], "--learning_rate", "1e-5"])
            assert args.learning_rate == 1e-5


@STAGES
def test_trellis_samples_a_student_as_it_is_meant_to_be(monkeypatch, tmp_path, cls):
    """student/pipeline_entry.json, put into pipeline.json as docs/mdt_dist.md says, gives the
    run's samples.

    The Euler sampler of TRELLIS is emulated. With pipeline.json's own rescale_t, 3, the student
    would be called at t = .75 instead of at .5. The teacher's row is sampled with pipeline.json's
    own params: 25 steps, of which 19 are guided.
    """
    root, data = tmp_path / "TRELLIS-image-large", str(tmp_path / "data.safetensors")
    root.mkdir()
    teacher = save_root(root, {cls: CLASSES[cls]})[cls]
    tokens = torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(1))
    tensors = stage_data(cls, tokens)
    save_file(tensors, data)
    shown, real = {}, mdt_dist.report.save_samples

    def spy(folder, rows, world):
        shown.update(rows)
        real(folder, rows, world)

    monkeypatch.setattr(mdt_dist.report, "save_samples", spy)
    run = tmp_path / "runs" / "mdt_dist-ss_flow_img_dit_L_16l8_fp16"
    stage_run(teacher, data, run)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "mdt_dist.md").read_text()
    (lines,) = re.findall(r"```python\n(import json\n.*?)```", page, re.S)
    exec(lines, {})
    stage = "sparse_structure" if cls is SparseStructureFlowModel else "slat"
    pipeline = load_json(str(root / "pipeline.json"))["args"]
    path, params = pipeline["models"][f"{stage}_flow_model"], pipeline[f"{stage}_sampler"]["params"]
    sampler = load_json(str(run / "student" / "sampler.json"))
    times = [shift(1 - i / params["steps"], params["rescale_t"]) for i in range(params["steps"])]
    assert times == sampler["times"] == [1.0, 0.5]
    assert 1 + params["cfg_strength"] == sampler["guidance_scale"] > 1

    draw, cond = Draws(0, "evaluation", 0, range(3)), {"tokens": tokens[:3]}
    if cls is SLatFlowModel:
        coords = torch.cat(
            [torch.arange(3).repeat_interleave(6)[:, None], tensors["coords"][:18]], 1
        )
        noise, cond = draw.points("z", [6] * 3, 3), {**cond, "coords": coords}
    else:
        noise = draw.normal("z", (3, 4, 4, 4))
    uncond = {**cond, "tokens": torch.zeros(3, 5, 10)}
    student, _ = load_network(path)
    stored = load_file(run / "samples.safetensors")
    stored = stored["feats" if cls is SLatFlowModel else "x0"]
    got, calls = trellis_euler(student, noise, cond, uncond, **params)
    torch.testing.assert_close(got, stored, rtol=1e-5, atol=1e-5)
    assert calls == 4
    own, _ = trellis_euler(student, noise, cond, uncond, **{**params, "rescale_t": 3.0})
    assert (own - stored).abs().max() > 1e-2
    before, _ = trellis_euler(load_network(teacher)[0], noise, cond, uncond, **params)
    assert (before - stored).abs().max() > 1e-2

    if cls is SparseStructureFlowModel:
        pipeline = dict(steps=25, cfg_strength=5.0, cfg_interval=[0.5, 1.0], rescale_t=3.0)
        args = load_network(teacher)[0], noise, cond, uncond
        want, calls = trellis_euler(*args, **pipeline)
        assert calls == 25 + 19
        torch.testing.assert_close(shown["teacher, 44 calls"], want, rtol=1e-4, atol=1e-4)
        for wrong in (dict(rescale_t=1.0), dict(cfg_interval=[0.0, 1.0])):
            other, _ = trellis_euler(*args, **{**pipeline, **wrong})
            assert (other - want).abs().max() > 1e-2


def test_a_student_that_trellis_cannot_sample_has_no_entry(tmp_path):
    """--renoise sde is no Euler sampler; TRELLIS would sample another distribution."""
    cls, data = SparseStructureFlowModel, str(tmp_path / "data.safetensors")
    save_file(stage_data(cls, torch.randn(4, 5, 10)), data)
    flags = "--renoise", "sde", "--teacher_steps", "0"
    stage_run(save_root(tmp_path, {cls: CLASSES[cls]})[cls], data, tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "student" / "pipeline_entry.json").exists()


def calls_of(monkeypatch, cls):
    """-> a list that gets the tokens of every call of a network of this class."""
    seen, real = [], cls.forward

    def forward(net, x, t, tokens, *args, **more):
        seen.append(tokens.detach().clone())
        return real(net, x, t, tokens, *args, **more)

    monkeypatch.setattr(cls, "forward", forward)
    return seen


@STAGES
def test_text_models_are_guided_away_from_the_empty_prompt(monkeypatch, tmp_path, capsys, cls):
    """Every unconditional call has the file's uncond.tokens, and none has zeros.

    A file without them is refused, and what the message says to do helps. Tokens of images keep
    zeros, where the file has no others.
    """
    clip, data = save_tiny_clip(tmp_path / "clip"), str(tmp_path / "data.safetensors")
    path = save_text_root(tmp_path, clip, [cls])[cls]
    (tmp_path / "p.txt").write_text("a cat\na dog\na cat runs\nfast\n")
    tokens = str(tmp_path / "tokens.safetensors")
    encode.main(
        ["--teacher", str(tmp_path), "--prompts_txt", str(tmp_path / "p.txt"), "--output", tokens]
    )
    stored = load_file(tokens)
    without = stage_data(cls, stored["cond.tokens"])
    save_file(without, data)
    flags = ["--teacher", path, "--data", data, "--output_dir", str(tmp_path / "run")]
    error = refusal_of(capsys, mdt_dist.main, *flags)
    assert "no uncond.tokens (1, 77, 768)" in error and "--prompts_txt FILE writes it" in error
    assert not (tmp_path / "run").exists()

    save_file({**without, "uncond.tokens": stored["uncond.tokens"]}, data)
    seen = calls_of(monkeypatch, cls)
    with monkeypatch.context() as m:
        for after in ("finish", "save_previews"):
            m.setattr(mdt_dist, after, lambda *args: None)
        stage_run(path, data, tmp_path / "run")
    null = stored["uncond.tokens"].float()
    unconditional = [bool((v == null).all()) for v in seen]
    # one call before training; in an update the teacher's two in either loss, and the student's
    assert len(seen) == 1 + 2 * (2 + 2 + 2 + 3)
    assert sum(unconditional) == 2 * 2 and not any((v == 0).all() for v in seen)
    seen.clear()
    flags = f"--sample {tmp_path / 'run'} --data {data} --output_dir {tmp_path / 'drawn'}"
    mdt_dist.main(flags.split())
    assert any((v == null).all() for v in seen) and not any((v == 0).all() for v in seen)


def test_unconditional_tokens_of_another_length_are_refused(tmp_path, capsys):
    cls, data = SparseStructureFlowModel, str(tmp_path / "data.safetensors")
    teacher = save_root(tmp_path, {cls: CLASSES[cls]})[cls]
    tensors = stage_data(cls, torch.randn(4, 5, 10))
    save_file({**tensors, "uncond.tokens": torch.zeros(1, 4, 10)}, data)
    flags = ["--teacher", teacher, "--data", data, "--output_dir", str(tmp_path / "run")]
    error = refusal_of(capsys, mdt_dist.main, *flags)
    assert "uncond.tokens is (1, 4, 10) and cond.tokens (4, 5, 10); give uncond.tokens" in error
    assert not (tmp_path / "run").exists()


def test_a_structure_is_sampled_from_the_tokens_of_images(tmp_path, capsys):
    """--sample needs no x0: the file that models.encode writes will do. Wrong ones are refused."""
    cls, data = SparseStructureFlowModel, str(tmp_path / "data.safetensors")
    teacher = save_root(tmp_path, {cls: CLASSES[cls]})[cls]
    tokens = torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(0))
    save_file(stage_data(cls, tokens), data)
    stage_run(teacher, data, tmp_path / "run", "--teacher_steps", "0")
    files = {
        "encoded": {"cond.tokens": tokens.half(), "uncond.tokens": torch.zeros(1, 5, 10).half()},
        "tokens": {"cond.tokens": tokens},
        "latents": {"x0": torch.randn(4, 3, 4, 4, 4)},
        "wide": {"cond.tokens": torch.randn(4, 5, 9)},
        "none": {"cond.tokens": torch.randn(0, 5, 10)},
        "flat": {"cond.tokens": torch.randn(4, 10)},
    }
    flags = ["--sample", str(tmp_path / "run"), "--preview_samples", "3"]
    drawn = {}
    for name, tensors in files.items():
        save_file(tensors, str(tmp_path / f"{name}.safetensors"))
    for name in ("data", "encoded", "tokens"):
        flag = "--prompts" if name == "tokens" else "--data"
        source = [flag, str(tmp_path / f"{name}.safetensors")]
        mdt_dist.main([*flags, *source, "--output_dir", str(tmp_path / name)])
        drawn[name] = load_file(tmp_path / name / "samples.safetensors")["x0"]
        assert drawn[name].shape == (3, 3, 4, 4, 4)
    assert torch.equal(drawn["data"], drawn["tokens"])
    torch.testing.assert_close(drawn["encoded"], drawn["tokens"], rtol=1e-2, atol=1e-2)
    refused = {
        "latents": "no cond.tokens with at least one row, as python -m models.encode writes it; it",
        "none": "no cond.tokens with at least one row",
        "wide": "tokens has shape (1, 5, 9); pass (B, L, 10)",
        "flat": "tokens has shape (1, 10); pass (B, L, 10)",
    }
    for name, message in refused.items():
        flag = "--data" if name in ("none", "flat") else "--prompts"
        source = [flag, str(tmp_path / f"{name}.safetensors")]
        output = ["--output_dir", str(tmp_path / "refused")]
        error = refusal_of(capsys, mdt_dist.main, *flags, *source, *output)
        assert message in error and (flag in error or "tokens has shape" in error)
    for source in ([], ["--data", str(tmp_path)]):
        error = refusal_of(capsys, mdt_dist.main, *flags, *source, *output)
        assert "is sampled from FILE.safetensors with cond.tokens" in error
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("start", [1, 4])
def test_the_average_forgets_the_teacher_or_does_not(monkeypatch, tmp_path, ring, start):
    """--ema_start 1 has --ema_decay from the first update, as the released code; 4 a warm-up."""
    moves, real = [], Run.update_ema

    def spy(run, ema, net, *args):
        moves.append([torch.cat([p.flatten() for p in m.parameters()]) for m in (ema, net)])
        real(run, ema, net, *args)

    monkeypatch.setattr(Run, "update_ema", spy)
    flags = f"--max_train_steps 3 --ema_decay 0.9 --ema_start {start} --output_dir {tmp_path}/run"
    mdt_dist.main([*ring, *flags.split()])
    average = moves[0][0]
    for n, (_, net) in enumerate(moves, 1):
        decay = 0.9 if start == 1 else n / (n + 3)
        average = decay * average + (1 - decay) * net
    saved = load_network(str(tmp_path / "run" / "student"))[0]
    got = torch.cat([p.flatten() for p in saved.parameters()])
    torch.testing.assert_close(got, average, rtol=1e-5, atol=1e-6)


def test_each_loss_is_differentiated_at_once(monkeypatch, tmp_path, tiny):
    """The first loss's graph is gone when the second is computed: half the activations."""
    real, found = mdt_dist.distillation, []

    def spy(args, student, *rest):
        found.append([p.grad is not None for p in student.parameters()])
        return real(args, student, *rest)

    monkeypatch.setattr(mdt_dist, "distillation", spy)
    monkeypatch.setattr(mdt_dist, "finish", lambda *a: None)
    mdt_dist.main([*tiny[1], "--output_dir", str(tmp_path / "run")])
    assert len(found) == 1 and all(found[0])


# ---- both stages of TRELLIS ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls", [SparseStructureFlowModel, SLatFlowModel], ids=["structure", "slat"]
)
def test_both_stages(tmp_path, cls):
    """student/ is in TRELLIS's layout and a teacher again; --sample draws the run's samples from
    it, with the points of --data.
    """
    teacher, sparse = save_root(tmp_path, {cls: CLASSES[cls]})[cls], cls is SLatFlowModel
    g, data = torch.Generator().manual_seed(0), str(tmp_path / "data.safetensors")
    x0 = {"x0": torch.randn(4, 3, 4, 4, 4, generator=g)}
    if sparse:
        x0 = {
            "coords": points((6,) * 4, 8)[:, 1:].int().contiguous(),
            "feats": torch.randn(24, 3, generator=g),
            "offsets": torch.arange(0, 25, 6),
        }
    save_file({**x0, "cond.tokens": torch.randn(4, 5, 10, generator=g).half()}, data)
    flags = f"--teacher {teacher} --data {data} --max_train_steps 2 --teacher_steps 2 "
    flags += "--preview_samples 3 --learning_rate 1e-4 --lr_warmup_steps 0 --max_grad_norm 1e9 "
    flags += "--guidance_vm 3 --guidance_vd 4 --ema_decay 0.5"
    run, folder = tmp_path / "run", tmp_path / "run" / "student"
    mdt_dist.main([*flags.split(), "--train_batch_size", "2", "--output_dir", str(run)])
    with open(teacher + ".json") as f:
        config = json.load(f)
    name = config["name"]
    left = [f"{name}.json", f"{name}.safetensors", "pipeline_entry.json", "sampler.json"]
    assert sorted(p.name for p in folder.iterdir()) == left
    assert json.loads((folder / f"{name}.json").read_text()) == config
    sampler = load_json(str(folder / "sampler.json"))
    assert (sampler["guidance_scale"], sampler["times"]) == (1.1 if sparse else 6.0, [1.0, 0.5])
    assert sampler["rule"] == "euler"
    student, start = load_network(str(folder))[0], load_network(teacher)[0].state_dict()
    for k, v in student.state_dict().items():
        assert torch.equal(v, start[k]) == (k == "pos_emb"), k
    assert isinstance(load_teacher(str(run)).net, cls)

    stored, drawn = load_file(run / "samples.safetensors"), tmp_path / "drawn"
    flags = f"--sample {run} --data {data} --preview_samples 3 --output_dir {drawn}"
    mdt_dist.main(flags.split())
    drawn = load_file(drawn / "samples.safetensors")
    assert drawn.keys() == stored.keys() == ({"coords", "feats", "offsets"} if sparse else {"x0"})
    for k, v in stored.items():
        torch.testing.assert_close(drawn[k], v, rtol=1e-3, atol=1e-3)
    if sparse:
        places_alone(tmp_path, run, data, stored)
        assert torch.equal(stored["coords"], x0["coords"][:18])
        assert stored["offsets"].tolist() == [0, 6, 12, 18] and stored["feats"].std() > 0.1
    assert (run / "samples.png").is_file() is not sparse
    assert (run / "report.json").is_file()


def places_alone(tmp_path, run, data, stored):
    """Points without features, and the tokens from --prompts, give the same samples. What does not
    belong together is refused."""
    tensors, paths = load_file(data), {}
    files = {
        "points": {k: tensors[k] for k in ("coords", "offsets")},
        "tokens": {"cond.tokens": tensors["cond.tokens"]},
    }
    for name, found in files.items():
        paths[name] = str(tmp_path / f"{name}.safetensors")
        save_file(found, paths[name])
    flags = ["--sample", str(run), "--preview_samples", "3", "--output_dir"]
    at = ["--data", paths["points"], "--prompts"]
    mdt_dist.main([*flags, str(tmp_path / "drawn at"), *at, paths["tokens"]])
    drawn = load_file(tmp_path / "drawn at" / "samples.safetensors")
    torch.testing.assert_close(drawn["feats"], stored["feats"], rtol=1e-3, atol=1e-3)
    refused = {
        (*at[:-1],): "--data " + paths["points"] + ": no cond.tokens with at least one row",
        ("--data", paths["tokens"]): "no coords and offsets, as python -m models.meshes",
        ("--prompts", paths["tokens"]): "is sampled at those of FILE.safetensors",
        (*at, paths["tokens"], "--samples", "4"): "these are points: leave it out",
    }
    for more, message in refused.items():
        with pytest.raises(UserError, match=re.escape(message)):
            mdt_dist.main([*flags, str(tmp_path / "refused"), *more])
    assert not (tmp_path / "refused").exists()


def test_points_and_the_full_grid_train_alike():
    """A dense network given the points of the whole grid has the dense derivative at them.

    Times, noises, norms and means reach points as they reach voxels: test_mdt_math.py has the
    losses.
    """
    x, t = torch.randn(2, 3, 2, 2, 2), torch.tensor([0.3, 0.8])
    coords = torch.cartesian_prod(torch.arange(2), *[torch.arange(2)] * 3)
    flat = lambda a: a.movedim(1, -1)[coords.unbind(1)]  # noqa: E731
    dense = lambda x, t: (x * expand(t, x)).sin()  # noqa: E731
    points_net = lambda x, t, coords: (x * t[coords[:, 0]][:, None]).sin()  # noqa: E731
    v = torch.randn_like(x)
    for dt in (0.01, None):
        d = mdt_dist.time_derivative(dense, x, t, v, {}, dt)
        at_points = flat(x), t, flat(v), {"coords": coords}, dt
        d_points = mdt_dist.time_derivative(points_net, *at_points)
        torch.testing.assert_close(d_points, flat(d), rtol=1e-3, atol=1e-3)
