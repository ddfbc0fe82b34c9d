"""phased_dmd.py's runs: who is trained on what in every phase, and what a run leaves.

Also equality with dmd.py, adapters, Wan 2.2, ranks, crashes, refusals.
"""

import copy
import json
import math
import os
import shutil
import types
import weakref

import numpy as np
import pytest
import torch
from forks import launch
from helpers import (
    alone,
    assert_bit_equal,
    killed,
    perturbed,
    quiet,
    read_log,
    refusal_of,
    ring_network,
    save_tiny_pixart,
    save_tiny_wan,
    small_dit,
    weights,
    without_time,
)
from PIL import Image
from released import pixart_noise
from safetensors.torch import load_file, save_file

import dmd
import latent_fm
import phased_dmd
from models.diffusion import Diffusion, Flow, expand, shift, step_grid, unshift
from models.draws import Draws
from models.files import load_json, open_tensors, save_json
from models.networks import WEIGHTS, load_network, lora, network_config, save_network, weights_hash
from models.networks.wan import WAN_1_3B, WAN_14B, WAN_A14B, WanTransformer3DModel, WanTwoNetworks
from models.plumbing import run as plumbing_run
from models.plumbing import teachers
from models.plumbing.data import Conditions
from models.plumbing.film import Film
from models.plumbing.run import Run
from models.worlds import load_world
from models.worlds.measures import energy_distance
from models.worlds.ring import RingTeacher

WORLDS_TEACHER = load_world("clips").teacher_folder()

# ---- the training loop ---------------------------------------------------------------------------


def norm_of(gradients):
    return torch.stack([g.norm() for g in gradients]).norm()


class Diary:
    """What a run of phased_dmd.main did.

    made: the networks by name, as they were made. turns, in order: the calls of the student, and
    what fake and student were given. updates, in order: gradients before clipping, and all networks
    of the phase as they were then.
    """

    def __init__(self, monkeypatch):
        self.made, self.calls, self.turns, self.updates = {}, [], [], []
        quiet(monkeypatch)
        monkeypatch.setattr(phased_dmd, "marginals", lambda *a: None)
        for owner, name, spy in (
            (phased_dmd, "frozen_teacher", self.on_teacher),
            (phased_dmd, "trainable", self.on_made),
            (phased_dmd, "average_of", self.on_made),
            (phased_dmd, "student_step", self.on_step),
            (phased_dmd, "fake_score_loss", self.on_fake_loss),
            (phased_dmd, "phased_dmd_loss", self.on_student_loss),
            (Diffusion, "guided_x0", self.on_guided),
            (Diffusion, "x0", self.on_x0),
            (Run, "update", self.on_update),
        ):
            self.wrap(monkeypatch, owner, name, spy)

    @staticmethod
    def wrap(monkeypatch, owner, name, before):
        """Replace owner.name: before(real, *args, **kwargs) is called instead of real."""
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            return before(real, *args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    @property
    def phase(self):
        return sum(name.startswith("expert") for name in self.made)

    def on_teacher(self, real, *args):
        self.teacher = real(*args)
        self.teacher_before = {k: v.clone() for k, v in self.teacher.base.state_dict().items()}
        return self.teacher

    def on_made(self, real, args, net, name, *rest):
        made = real(args, net, name, *rest)
        if made is not net:  # an average that is off is the expert itself
            self.made[name] = made
        return made

    def on_step(self, real, expert, diffusion, x_in, t, t_next, cond):
        x, x0 = real(expert, diffusion, x_in, t, t_next, cond)
        at = t if isinstance(t, float) else float(t[0])  # the same for all rows with --one_step
        who = next(n for n, e in self.made.items() if e is expert)
        call = dict(who=who, t=round(at, 6), t_next=round(t_next, 6), of_rows=t)
        call |= dict(gradient=torch.is_grad_enabled(), x_in=x_in, x=x, x0=x0, cond=cond)
        self.calls.append(types.SimpleNamespace(**call))
        return x, x0

    def turn(self, **what):
        self.turns.append(types.SimpleNamespace(phase=self.phase, calls=self.calls, **what))
        self.calls = []

    def on_fake_loss(self, real, fake, diffusion, x_s, eps, s, t, cond, target, weight):
        assert fake is self.made[f"fake{self.phase}"] and not x_s.requires_grad
        what = dict(x_s=x_s, eps=eps, s=s, t=t, cond=cond, target=target, weight=weight)
        self.turn(who="fake", **what)
        return real(fake, diffusion, x_s, eps, s, t, cond, target, weight)

    def on_guided(self, real, diffusion, net, x_t, t, cond, uncond, scale):
        saw = dict(net=net, x_t=x_t, t=t, cond=cond, uncond=uncond, scale=scale)
        self.teacher_saw = types.SimpleNamespace(**saw)
        return real(diffusion, net, x_t, t, cond, uncond, scale)

    def on_x0(self, real, diffusion, net, x_t, t, **cond):
        self.fake_saw = types.SimpleNamespace(net=net, x_t=x_t, t=t, cond=cond)
        return real(diffusion, net, x_t, t, **cond)

    def on_student_loss(self, real, x_s, x0, teacher, fake, diffusion, eps, s, t, *rest):
        assert x_s is self.calls[-1].x and x0 is self.calls[-1].x0
        loss, g, *mu = real(x_s, x0, teacher, fake, diffusion, eps, s, t, *rest)
        assert not any(v.requires_grad for v in (g, *mu))
        saw = dict(teacher=self.teacher_saw, fake=self.fake_saw)
        self.turn(who="student", s=s, t=t, direction=rest[-1], x_s=x_s, mu=mu, **saw)
        return loss, g, *mu

    def on_update(self, real, run, optimizer, what):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        of_phase = (f"fake{self.phase}", f"ema{self.phase}")
        now = {n: e for n, e in self.made.items() if n.startswith("expert") or n in of_phase}
        nets = [self.teacher.net, self.teacher.base, *(getattr(e, "net", e) for e in now.values())]
        ids = [id(p) for p in parameters]
        update = types.SimpleNamespace(
            what=what,
            phase=self.phase,
            rate=optimizer.param_groups[0]["lr"],
            gradients=[p.grad.clone() for p in parameters],
            trains=next(n for n, e in now.items() if [id(p) for p in e.parameters()] == ids),
            strangers=[
                p
                for net in nets
                for p in net.parameters()
                if p.grad is not None and id(p) not in ids
            ],
            nets={n: {k: v.clone() for k, v in e.state_dict().items()} for n, e in now.items()},
        )
        update.norm = float(norm_of(update.gradients))
        self.updates.append(update)
        real(run, optimizer, what)
        update.after = {k: v.clone() for k, v in now[update.trains].state_dict().items()}

    def at(self, update, name):
        """A full network of that name as it was at an update."""
        net = copy.deepcopy(self.made[name]).requires_grad_(True)
        net.load_state_dict(update.nets[name])
        return net


RUN = (
    "--teacher ring --max_train_steps 4 --train_batch_size 8 --fake_update_ratio 2 "
    "--checkpointing_steps 1000 --max_grad_norm 1e9 --preview_every 0 --one_step"
).split()


def run(monkeypatch, folder, *flags, diary=None):
    """A short quiet run on the ring: 4 steps in 2 phases, shift 3, batch 8.

    2 updates a phase, with 2 fake updates each.
    """
    diary = diary or Diary(monkeypatch)
    phased_dmd.main([*RUN, "--output_dir", str(folder), *flags])
    return diary


def save_dit(folder, **changes):
    """A tiny DiT with noise on every weight as a --teacher folder, with the flags for a run."""
    net = perturbed(small_dit(dim=32, depth=2, **changes))
    save_network(net, network_config(net), str(folder))
    return ["--teacher", str(folder)]


def in_phases(steps=4, phases=2, shifted=3.0):
    """The student's grid, and for every phase the slice of steps it takes.

    The defaults: [1, .9, .75, .5, 0], [(0, 2), (2, 4)].
    """
    ends = {(4, 1): [4], (4, 2): [2, 4], (4, 4): [1, 2, 3, 4], (3, 2): [2, 3]}[steps, phases]
    return step_grid(steps, shifted), list(zip([0, *ends], ends))


KINDS_OF_EXPERTS = [
    [],
    ["--lora_rank", "2"],
    ["--fake_lora_rank", "2"],
    ["--lora_rank", "2", "--fake_lora_rank", "3"],
]


def order_of_updates(fakes, phases=(1, 1, 2, 2)):
    """[(what, whom)] of a run with two student updates a phase and so many of the fake."""
    return [
        (what, f"{name}{k}")
        for k in phases
        for what, name in [("student", "expert")] + [("fake", "fake")] * fakes
    ]


@pytest.mark.parametrize("flags", KINDS_OF_EXPERTS, ids=" ".join)
@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_turns_and_who_has_gradients(monkeypatch, tmp_path, flags, ema):
    """In every phase one update of its own expert, then R of the fake, whatever is an adapter.

    Nothing else has a gradient, ever. Expert 1 is the same to the bit all through phase 2, namely
    its average. The teacher is the same to the bit at the end, without adapters but the experts'.
    """
    own = [*save_dit(tmp_path / "teacher"), "--fake_update_ratio", "3", "--ema_decay", ema, *flags]
    own += ["--guidance_scale", "2"]  # without it the first gradient is 0: the fake is the teacher
    diary = run(monkeypatch, tmp_path / "run", *own)
    assert [(u.what, u.trains) for u in diary.updates] == order_of_updates(3)
    assert all(not u.strangers for u in diary.updates)
    assert all(len(u.gradients) == len(u.nets[u.trains]) for u in diary.updates)
    assert all(any(g.any() for g in u.gradients) for u in diary.updates)
    phase_1, phase_2 = ([u for u in diary.updates if u.phase == k] for k in (1, 2))
    last = [u for u in phase_1 if u.what == "student"][-1]
    before, after = last.nets["expert1"], diary.made["expert1"].state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in after)
    for u in phase_2:
        assert all(torch.equal(u.nets["expert1"][k], after[k]) for k in after)
    for name in ("expert1", "expert2"):
        assert not any(p.requires_grad for p in diary.made[name].parameters())
    assert_bit_equal(dict(lora.base_state_dict(diary.teacher.base)), diary.teacher_before)
    left = ["expert1", "expert2"] if "--lora_rank" in flags else []
    assert lora.names(diary.teacher.base) == left


@pytest.mark.parametrize("init", ["teacher", "previous"])
@pytest.mark.parametrize("flags", KINDS_OF_EXPERTS[:2], ids=" ".join)
def test_what_a_phase_starts_from(monkeypatch, tmp_path, init, flags):
    """Every phase has a new fake, which is the teacher's function at every step it may be given.

    And a new expert: the teacher's function too, or with --expert_init previous the weights of the
    expert before. Its average starts where it does.
    """
    teacher = save_dit(tmp_path / "teacher")
    own = [*teacher, "--expert_init", init, "--ema_decay", "0.9", *flags]
    diary = run(monkeypatch, tmp_path / "run", *own)
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
            assert not any(v.any() for key, v in start.items() if key.endswith(".B"))
            assert any(v.any() for key, v in start.items() if key.endswith(".A"))
        else:
            assert all(torch.equal(start[key], v) for key, v in net.state_dict().items())
    assert first[0].nets["expert1"].keys() == first[1].nets["expert2"].keys()
    last = [u for u in diary.updates if u.phase == 1][-1].nets["fake1"]
    # it had moved away from the teacher
    assert any(not torch.equal(last[key], v) for key, v in first[0].nets["fake1"].items())


def expert_of(i, slices):
    """Name of the expert that takes the i-th step."""
    return f"expert{next(k for k, (_, end) in enumerate(slices) if i < end) + 1}"


def calls_of_a_turn(turn, first, steps, phases, no_truncation=False):
    """[(expert, t, t_next, with gradient)] that a turn of this phase must have made.

    first: number of the sample's last step or, without truncation, of its first with gradient.
    """
    grid, slices = in_phases(steps, phases)
    grid = [round(t, 6) for t in grid]
    (_, end), student = slices[turn.phase - 1], turn.who == "student"
    before = [(expert_of(i, slices), grid[i], grid[i + 1], False) for i in range(first)]
    last = [(grid[first], grid[end])]
    if no_truncation:
        last = [(grid[i], grid[i + 1]) for i in range(first, end)]
    return before + [(f"expert{turn.phase}", a, b, student) for a, b in last]


def test_student_init(monkeypatch, tmp_path, capsys):
    """--student_init: every expert starts at that network, the fakes at the teacher.

    It is refused for adapters and for other shapes.
    """
    flags = save_dit(tmp_path / "teacher")
    other = perturbed(small_dit(dim=32, depth=2), seed=7)
    save_network(other, network_config(other), str(tmp_path / "other"))
    given = ["--student_init", str(tmp_path / "other")]
    diary = run(monkeypatch, tmp_path / "run", *flags, *given)
    for k in (1, 2):
        first = next(u for u in diary.updates if u.phase == k)
        assert_bit_equal(first.nets[f"expert{k}"], dict(other.state_dict()))
        assert_bit_equal(first.nets[f"ema{k}"], dict(other.state_dict()))
        fake = {n: v for n, v in first.nets[f"fake{k}"].items() if not n.startswith("steps.")}
        assert_bit_equal(fake, diary.teacher_before)
    monkeypatch.undo()
    # A folder with an expert for each phase, as a run of this script leaves it.
    third = perturbed(small_dit(dim=32, depth=2), seed=8)
    for k, net in enumerate((third, other), start=1):
        save_network(net, network_config(net), str(tmp_path / "old" / "student" / f"expert{k}"))
    diary = run(monkeypatch, tmp_path / "again", *flags, "--student_init", str(tmp_path / "old"))
    for k, net in enumerate((third, other), start=1):
        first = next(u for u in diary.updates if u.phase == k)
        assert_bit_equal(first.nets[f"expert{k}"], dict(net.state_dict()))
    monkeypatch.undo()
    flags += ["--output_dir", str(tmp_path / "no")]
    for phases in ("1", "4"):
        own = ["--student_init", str(tmp_path / "old"), "--phases", phases]
        says = refusal_of(capsys, phased_dmd.main, *flags, *own)
        assert f"does not have one expert for each of {phases} phases" in says
    says = refusal_of(capsys, phased_dmd.main, *flags, *given, "--lora_rank", "4")
    assert "starts full networks, not adapters: give --lora_rank 0" in says
    wrong = small_dit(dim=64, depth=2)
    save_network(wrong, network_config(wrong), str(tmp_path / "wrong"))
    given = ["--student_init", str(tmp_path / "wrong")]
    assert "does not have the shapes" in refusal_of(capsys, phased_dmd.main, *flags, *given)
    assert not (tmp_path / "no").exists()


def save_adapter(net, path, rank=2, seed=3, **more):
    """A LoRA file with an effect on a copy of net -> net with it, as a function."""
    net = copy.deepcopy(net)
    torch.manual_seed(seed)
    lora.add(net, "own", rank, alpha=3, **more)
    with torch.no_grad():
        for p in lora.parameters(net, "own"):
            p += 0.2 * torch.randn(p.shape)
    path.parent.mkdir(exist_ok=True, parents=True)
    lora.save(net, "own", str(path))
    return lora.Adapted(net, "own")


def adapter_on(net, name, rank):
    """A new adapter as a run has them."""
    lora.add(net, name, rank, alpha=8.0)
    return lora.Adapted(net, name)


@pytest.mark.parametrize("rank", ["0", "2", "5"])
def test_experts_begin_as_a_lora_file(monkeypatch, tmp_path, capsys, rank):
    """--student_init FILE: full experts are the teacher with the file merged in, adapters of at
    least the file's rank begin as it; the fakes begin as the teacher. What is shown of later phases
    on the way begins so too."""
    flags, folder = save_dit(tmp_path / "teacher"), tmp_path / "run"
    net = load_network(str(tmp_path / "teacher"))[0]
    file = tmp_path / "start.safetensors"
    start, shown = save_adapter(net, file), []
    diary = Diary(monkeypatch)

    def on_sampler(real, run, experts, *rest):
        with torch.no_grad():
            shown.append([expert(x, t, label=label) for expert in experts])
        return real(run, experts, *rest)

    x, t, label = torch.randn(6, 2, 6, 4), torch.linspace(0.1, 1, 6), torch.arange(6) % 4
    diary.wrap(monkeypatch, phased_dmd, "student_sampler", on_sampler)
    own = ["--student_init", str(file), "--lora_rank", rank]
    run(monkeypatch, folder, *flags, *own, diary=diary)
    with torch.no_grad():
        want, bare = start(x, t, label=label), net(x, t, label=label)
        assert (want - bare).abs().max() > 1e-2
        torch.testing.assert_close(shown[0][2], want, rtol=1e-4, atol=1e-5)
        for k in (1, 2):
            update = next(u for u in diary.updates if u.phase == k)
            if rank == "0":
                began = diary.at(update, f"expert{k}")
            else:
                began = adapter_on(net, f"b{k}", int(rank))
                began.load_state_dict(update.nets[f"expert{k}"])
            torch.testing.assert_close(began(x, t, label=label), want, rtol=1e-4, atol=1e-5)
            assert torch.equal(diary.at(update, f"fake{k}")(x, t, label), bare)
    left = ["expert1", "expert2"] if rank != "0" else []
    assert lora.names(diary.teacher.base) == left
    assert_bit_equal(dict(lora.base_state_dict(diary.teacher.base)), diary.teacher_before)
    monkeypatch.undo()
    out = ["--output_dir", str(tmp_path / "no")]
    says = refusal_of(capsys, phased_dmd.main, *flags, *out, *own[:2], "--lora_rank", "1")
    assert "has rank 2: give --lora_rank 2" in says
    tensors = load_file(file) | {"transformer.nowhere.lora_A.weight": torch.zeros(1, 1)}
    save_file(tensors, file)
    says = refusal_of(capsys, phased_dmd.main, *flags, *out, *own)
    assert f"--student_init: {file} has 'transformer.nowhere.lora_A.weight'" in says
    says = refusal_of(capsys, phased_dmd.main, *flags, *out, "--student_init", "no.safetensors")
    assert "no.safetensors does not exist" in says and not (tmp_path / "no").exists()


def test_a_linear_student_is_saved_as_one(monkeypatch, tmp_path):
    """Experts that start from a network with linear attention have it in their config, so that
    --sample, and dmd.py, load the network that was trained."""
    flags = save_dit(tmp_path / "teacher")
    linear = perturbed(small_dit(dim=32, depth=2, linear_layers=[1]), seed=7)
    save_network(linear, network_config(linear), str(tmp_path / "linear"))
    own = [*SHORT, "--student_init", str(tmp_path / "linear"), "--ema_decay", "0.5"]
    phased_dmd.main([*flags, *own, "--output_dir", str(tmp_path / "run")])
    for k in (1, 2):
        net, config = load_network(str(tmp_path / "run" / "student" / f"expert{k}"))
        assert config["linear_layers"] == [1] and config["feature_map"] == "hedgehog"
        assert net.state_dict().keys() == linear.state_dict().keys()
    out = ["--output_dir", str(tmp_path / "samples"), "--preview_samples", "3"]
    phased_dmd.main(["--sample", str(tmp_path / "run"), *out, "--train_batch_size", "4"])
    ours, again = (
        load_file(tmp_path / name / "samples.safetensors")["x0"] for name in ("run", "samples")
    )
    torch.testing.assert_close(ours, again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", ["0", "2"])
def test_a_teacher_with_a_lora_file(monkeypatch, tmp_path, capsys, rank):
    """--teacher_lora FILES: the sum of the files is the teacher, of which experts and fakes are
    copies or adapters, and --sample puts adapters on the same sum again."""
    flags, folder = save_dit(tmp_path / "teacher"), tmp_path / "run"
    net = load_network(str(tmp_path / "teacher"))[0]
    files = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    for i, path in enumerate(files):
        save_adapter(net, tmp_path / f"{i}.safetensors", seed=3 + i)
        lora.merge_file(net, path)
    own = ["--teacher_lora", *files, "--lora_rank", rank]
    diary = Diary(monkeypatch)
    run(monkeypatch, folder, *flags, *own, diary=diary)
    for key, v in net.state_dict().items():
        torch.testing.assert_close(diary.teacher_before[key], v, rtol=1e-5, atol=1e-6)
    first = next(u for u in diary.updates if u.phase == 2)
    fake = {n: v for n, v in first.nets["fake2"].items() if not n.startswith("steps.")}
    assert_bit_equal(fake, diary.teacher_before)
    bare = load_network(str(tmp_path / "teacher"))[0]
    assert any(not torch.equal(v, fake[k]) for k, v in bare.state_dict().items())
    monkeypatch.undo()
    sampler = load_json(str(folder / "student" / "sampler.json"))
    assert sampler.get("teacher_lora", []) == files
    if rank != "0":
        args = phased_dmd.parse_args(["--sample", str(folder)])
        experts = phased_dmd.load_student(Run(args, "phased_dmd"))[0]
        for key, v in lora.base_state_dict(experts[0].net).items():
            torch.testing.assert_close(v, diary.teacher_before[key], rtol=0, atol=0)
    out = ["--output_dir", str(tmp_path / "no")]
    says = refusal_of(capsys, phased_dmd.main, "--teacher", "ring", *out, *own)
    assert "--teacher_lora: ring is a closed form without weights: leave it out" in says
    says = refusal_of(capsys, phased_dmd.main, *flags, *out, "--teacher_lora", "nowhere")
    assert "--teacher_lora nowhere: neither a .safetensors file nor a folder of peft's" in says


def test_a_teachers_row_is_that_of_its_weights(tmp_path):
    """What was measured of a teacher is stored under its weights, the LoRA files among them."""
    for name in ("one", "two"):
        net = load_network(WORLDS_TEACHER)[0]
        save_adapter(net, tmp_path / f"{name}.safetensors", seed=len(name) + (name == "two"))
    marks = set()
    for files in ([], ["one"], ["two"], ["one", "two"], ["two", "one"]):
        paths = [str(tmp_path / f"{name}.safetensors") for name in files]
        own = ["--teacher", "clips", *(["--teacher_lora", *paths] if paths else [])]
        teacher = teachers.start_teacher(alone(phased_dmd.parse_args(own)))
        marks.add(teacher.fingerprint())
        assert bool(files) == (teacher.fingerprint() != weights_hash(WORLDS_TEACHER))
    assert len(marks) == 5


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
    """Fake and student train on the same samples: the fake's first update on the student's own.

    The second makes new ones in the same way: noise, all steps of the frozen experts, some of the
    phase's own, and a last one that jumps to the phase's end s. One call of a student's update is
    recorded, or with --no_truncation all of the phase (N with one phase); none of a fake's. The
    last step stays in its phase and takes all values there; with a step per phase nothing is left
    to chance.
    """
    own = f"--student_steps {steps} --phases {phases} --max_train_steps 12".split()
    diary = run(monkeypatch, tmp_path, *own, *flags)
    last = [set() for _ in range(phases)]
    slices = in_phases(steps, phases)[1]
    assert [turn.who for turn in diary.turns] == ["student", "fake", "fake"] * 12
    for i, turn in enumerate(diary.turns):
        if i % 3 == 1:
            made = diary.turns[i - 1]
            assert not turn.calls and torch.equal(turn.x_s, made.x_s)
            assert torch.equal(turn.cond["label"], made.calls[0].cond["label"])
            assert not (turn.eps == diary.turns[i + 1].eps).any()
            continue
        begin, end = slices[turn.phase - 1]
        first = begin if flags else len(turn.calls) - 1
        assert begin <= first < end
        last[turn.phase - 1].add(first - begin)
        made = [(c.who, c.t, c.t_next, c.gradient) for c in turn.calls]
        assert made == calls_of_a_turn(turn, first, steps, phases, bool(flags))
        recorded = [c for c in turn.calls if c.x.requires_grad]
        assert len(recorded) == (0 if turn.who == "fake" else end - begin if flags else 1)
        draw = Draws(0, i // 3, "student" if turn.who == "student" else 1, range(8))
        z, label = draw.normal("z", (2,)), draw.integer("cond", 4)
        for call, x in zip(turn.calls, [z, *(c.x for c in turn.calls)]):
            assert torch.equal(call.x_in, x)  # each call goes on from the one before
            assert torch.equal(call.cond["label"], label) and set(call.cond) == {"label"}
        assert torch.equal(turn.x_s, turn.calls[-1].x)
    assert last == [{0} if flags else set(range(e - b)) for b, e in slices]


def test_a_batch_has_all_steps_of_the_phase(monkeypatch, tmp_path):
    """Two steps a phase, batch 8: four samples jump from each, at its own time, and the fake is
    conditioned on the step of every sample."""
    diary, (grid, slices) = run(monkeypatch, tmp_path, "--no-one_step"), in_phases()
    for turn in (t for t in diary.turns if t.calls):
        begin, end = slices[turn.phase - 1]
        t = turn.calls[-1].of_rows
        own = [t.isclose(torch.tensor(float(grid[i]))) for i in range(begin, end)]
        assert [int(rows.sum()) for rows in own] == [4, 4]
        assert turn.calls[-2].x_in.shape[0] == 4  # those that take the phase's first step in full
        if turn.who == "fake":
            assert torch.equal(turn.cond["steps"], own[1].float())


@pytest.mark.parametrize("phases", [1, 2, 4])
def test_noise_levels(monkeypatch, tmp_path, phases):
    """Scores are taken on (s, 1), nested: raw u in (u_end, 1), evenly.

    All of it for the fake, for the student what of it has t in --dm_range. Teacher, guided, and
    fake, not guided, see x_t = a x_s + b eps with the x_s, and the s, of that phase.
    """
    own = (
        f"--phases {phases} --max_train_steps 16 --train_batch_size 16 --dm_range 0.3 0.96 "
        "--fake_update_ratio 1 --guidance_scale 2"
    )
    diary = run(monkeypatch, tmp_path, *own.split())
    grid, slices = in_phases(4, phases)
    for k, (_, end) in enumerate(slices, start=1):
        s, u_end = grid[end], 1 - end / 4
        for who in ("fake", "student"):
            own = [(i, d) for i, d in enumerate(diary.turns) if (d.phase, d.who) == (k, who)]
            u = unshift(torch.cat([turn.t for _, turn in own]).double(), 3)
            low, high = u_end + (1e-3 * (1 - u_end) if s else 0.0), 1.0
            if who == "student":
                low, high = max(low, unshift(0.3, 3)), unshift(0.96, 3)
            share = (u - low) / (high - low)
            assert -1e-5 < share.min() < 0.05 and 0.95 < share.max() < 1 + 1e-5
            assert abs(share.mean() - 0.5) < 0.04 and len(share) == 16 * 16 // phases
            for i, turn in own:
                assert torch.equal(turn.s, torch.full((16,), s)) and (turn.t > turn.s).all()
                draw = Draws(0, i // 2, "student" if who == "student" else 0, range(16))
                eps = draw.normal("eps", (2,))
                if who == "fake":
                    assert torch.equal(turn.eps, eps)
                    continue
                a = (1 - turn.t) / (1 - s)
                x_t = a[:, None] * turn.x_s + (turn.t**2 - (a * s) ** 2).sqrt()[:, None] * eps
                for saw in (turn.teacher, turn.fake):
                    torch.testing.assert_close(saw.x_t, x_t, rtol=1e-4, atol=1e-5)
                    assert torch.equal(saw.t, turn.t) and not saw.x_t.requires_grad
                assert turn.teacher.net is diary.teacher.net and turn.teacher.scale == 2
                assert turn.fake.net is diary.made[f"fake{k}"]
                label = turn.calls[0].cond["label"]
                assert torch.equal(turn.teacher.cond["label"], label)
                assert (turn.teacher.uncond["label"] == 4).all()
                assert torch.equal(turn.fake.cond["label"], label)


def expected_gradients(diary, i, phases, flags):
    """The gradients of the i-th update, written out once more, with R = 2.

    From its draws and the networks as they were. The samples of the first fake update are those of
    the student's update before it, by its weights and draws.
    """
    step, turn, update = i // 3, i % 3, diary.updates[i]
    (grid, slices), k = in_phases(4, phases), update.phase
    (begin, end), student = slices[k - 1], update.what == "student"
    s, u_end = grid[end], 1 - end / 4
    reused = turn == 1 and "--no-reuse_samples" not in flags
    made = diary.updates[i - 1] if reused else update
    nets = {name: diary.at(made, name) for name in made.nets}
    nets[f"fake{k}"] = diary.at(update, f"fake{k}")
    draw = Draws(0, step, "student" if student else turn - 1, range(8))
    path = Draws(0, step, "student", range(8)) if reused else draw
    x, eps, label = path.normal("z", (2,)), draw.normal("eps", (2,)), path.integer("cond", 4)
    truncated = "--no_truncation" not in flags
    first = begin + path.agreed("k", end - begin) if truncated else begin

    def step_of(name, x, t, t_next):
        v = nets[name](x, torch.full((8,), t), label)
        return x + (t_next - t) * v, x - t * v

    with torch.no_grad():
        for i in range(first):
            x, _ = step_of(expert_of(i, slices), x, grid[i], grid[i + 1])
    with torch.set_grad_enabled(student):
        for i in range(first, first + 1 if truncated else end):
            x, x0 = step_of(f"expert{k}", x, grid[i], s if truncated else grid[i + 1])
    low = u_end + 1e-3 * (1 - u_end) if s else 0.0
    u = draw.spread("u", max(low, 0.02 / (3 - 2 * 0.02)) if student else low, 1.0)
    t = 3 * u / (1 + 2 * u)
    a = (1 - t) / (1 - s)
    b = (t**2 - (a * s) ** 2).sqrt()
    x_t = (expand(a, x) * x + expand(b, x) * eps).detach()
    shared = "--shared_fake" in flags or not truncated or end - begin == 1
    step_k = {} if shared else {"steps": torch.full((8,), float(first - begin))}
    v_fake = nets[f"fake{k}"](x_t, t, label, **step_k)
    if not student:
        y = expand((t + (1 - t) * s**2 / (1 - s) ** 2) / b, x) * eps - x / (1 - s)
        if "naive" in flags:
            y = eps - x
        tapered = "all" in flags or s and "none" not in flags
        weight = (10 * b**2).clamp_max(1) if tapered else torch.ones(8)
        loss = (weight * (v_fake - y).square().mean(1)).mean()
        return torch.autograd.grad(loss, list(nets[f"fake{k}"].parameters()))
    v_real = RingTeacher()(x_t, t, label)
    if "paper" in flags:
        g = expand((1 - t) ** 2 / (t * (1 - s)), x) * (v_real - v_fake)
    else:
        x0_real = x_t - expand(t, x) * v_real
        g = expand(t, x) * (v_real - v_fake) / (x0 - x0_real).abs().mean(1, keepdim=True)
    parameters = list(nets[f"expert{k}"].parameters())
    moved = x0 if "x0" in flags else x
    return torch.autograd.grad((g.detach() * moved).sum() / x.numel(), parameters)


@pytest.mark.parametrize(
    "phases, flags",
    [
        (2, []),
        (2, ["--target", "naive"]),
        (2, ["--taper", "all"]),
        (2, ["--taper", "none"]),
        (2, ["--dmd_weight", "paper"]),
        (2, ["--regress", "x0"]),
        (2, ["--shared_fake"]),
        (2, ["--no-reuse_samples"]),
        (2, ["--no_truncation"]),
        (1, ["--no_truncation"]),
        (1, []),
        (4, []),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_gradients_in_the_loop(monkeypatch, tmp_path, phases, flags):
    """What reaches the weights of fake (Eq. 11, 13) and expert (Eq. 10) in every update.

    In a real run, each flag with the formula it stands for.
    """
    diary = run(monkeypatch, tmp_path, "--phases", str(phases), *flags)
    assert len(diary.updates) == 12
    for i, update in enumerate(diary.updates):
        want = expected_gradients(diary, i, phases, flags)
        assert len(want) == len(update.gradients)
        error = norm_of([a - b for a, b in zip(update.gradients, want)])
        assert norm_of(want) > 1e-4 and error < 1e-4 * norm_of(want), (i, error / norm_of(want))
    sees = "--shared_fake" not in flags and "--no_truncation" not in flags and phases < 4
    for turn in diary.turns:
        cond = turn.cond if turn.who == "fake" else turn.fake.cond
        assert ("steps" in cond) == sees
    assert load_network(str(tmp_path / "student" / "expert1"))[1]["steps_cond"] is False


def test_scores_are_logged(monkeypatch, tmp_path):
    """dm_cos and dm_rel_gap of log.csv: teacher against fake, at the student's own samples."""
    diary = run(monkeypatch, tmp_path, "--phases", "2")
    turns, rows = [t for t in diary.turns if t.who == "student"], read_log(tmp_path)
    for turn, row in zip(turns, rows, strict=True):
        real, fake = turn.mu
        cosine = torch.nn.functional.cosine_similarity(real, fake).mean()
        gap = ((fake - real).norm(dim=1) / real.norm(dim=1)).mean()
        assert float(row["dm_cos"]) == pytest.approx(float(cosine), rel=1e-4)
        assert float(row["dm_rel_gap"]) == pytest.approx(float(gap), rel=1e-4)


@pytest.mark.parametrize("flags", KINDS_OF_EXPERTS[:2], ids=" ".join)
def test_rates_and_averages_start_again_in_every_phase(monkeypatch, tmp_path, flags):
    """Warm-up and decay of both rates, and the window of the average, are those of a phase.

    Each expert is frozen, and saved, as its average, (1 + n) / (4 + n) wide at first. So is what is
    saved and shown on the way, where later phases are still the teacher's.
    """
    saved, shown = [], []

    def name_of(expert):
        known = next((n for n, e in diary.made.items() if e is expert), None)
        return known or ("teacher" if expert is diary.teacher.base else None)

    def on_save(real, run, trained, *rest):
        saved.append([name_of(expert) for expert in trained])
        return real(run, trained, *rest)

    def on_sampler(real, run, experts, *rest):
        shown.append([name_of(expert) for expert in experts])
        return real(run, experts, *rest)

    diary = Diary(monkeypatch)
    diary.wrap(monkeypatch, phased_dmd, "save_student", on_save)
    diary.wrap(monkeypatch, phased_dmd, "student_sampler", on_sampler)
    own = (
        "--max_train_steps 8 --fake_update_ratio 1 --lr_warmup_steps 2 --lr_decay_share 0.5 "
        "--learning_rate 1e-2 --learning_rate_fake 3e-2 --ema_decay 0.3"
    )
    run(monkeypatch, tmp_path, *own.split(), *flags, diary=diary)
    assert saved == [["ema1"], ["expert1", "ema2"], ["expert1", "expert2"]]
    assert shown == [
        ["ema1", "ema1", "teacher", "teacher"],
        ["expert1", "expert1", "ema2", "ema2"],
        ["expert1", "expert1", "expert2", "expert2"],
    ]
    for what, rate in (("student", 1e-2), ("fake", 3e-2)):
        rates = [u.rate for u in diary.updates if u.what == what]
        assert rates == pytest.approx([rate * f for f in (0.5, 1, 1, 0.5)] * 2)
    for k in (1, 2):
        updates = [u for u in diary.updates if u.what == "student" and u.phase == k]
        want = updates[0].nets[f"expert{k}"]
        for decay, update in zip((0.25, 0.3, 0.3, 0.3), updates):
            want = {key: decay * v + (1 - decay) * update.after[key] for key, v in want.items()}
        frozen = diary.made[f"expert{k}"].state_dict()
        assert all(not torch.equal(v, updates[-1].after[key]) for key, v in frozen.items())
        for key, v in want.items():
            torch.testing.assert_close(frozen[key], v, rtol=1e-5, atol=1e-6)
        path = tmp_path / "student" / f"expert{k}"
        if flags:  # alpha / rank = 4 is multiplied into the file's B
            lora.load(net := ring_network(), "saved", f"{path}.safetensors")
            frozen = {key: 4 * v if key.endswith(".B") else v for key, v in frozen.items()}
            on_disk = lora.state_dict(net, "saved")
        else:
            on_disk = load_network(str(path))[0].state_dict()
        assert_bit_equal(dict(on_disk), dict(frozen))


def test_accumulation_is_a_larger_batch(monkeypatch, tmp_path):
    """Two micro-batches of 8 are one batch of 16: same rows, same gradients, same log."""
    one = run(monkeypatch, tmp_path / "one", "--train_batch_size", "16")
    monkeypatch.undo()
    two = run(monkeypatch, tmp_path / "two", "--gradient_accumulation_steps", "2")
    assert [u.norm for u in one.updates] == pytest.approx([u.norm for u in two.updates], rel=1e-3)
    assert len(one.updates) == len(two.updates) == 12 and 2 * len(one.turns) == len(two.turns)
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    norms = [u.norm for u in one.updates if u.what == "student"]
    for a, b, norm in zip(*logs, norms, strict=True):
        assert float(a["norm_student"]) == pytest.approx(norm, rel=1e-4)
        for name in ("loss_fake", "loss_dm", "mean", "std", "norm_fake", "norm_student"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("flags", KINDS_OF_EXPERTS[:2], ids=" ".join)
def test_low_precision(monkeypatch, tmp_path, flags):
    """Under autocast every weight of the expert still gets its gradient.

    Also where weights were cast in the rollout without gradient before; and it is float32's up to
    rounding (of two scores that are still close, so generously).
    """
    flags = [*save_dit(tmp_path / "teacher"), "--max_grad_norm", "1e9", *flags]
    flags += ["--guidance_scale", "2"]  # without it the first gradient is 0
    diaries = []
    for precision in ("no", "bf16"):
        own = [*flags, "--mixed_precision", precision]
        diaries.append(run(monkeypatch, tmp_path / precision, *own))
        monkeypatch.undo()
    for a, b in zip(*(d.updates[:3] for d in diaries)):
        error = norm_of([g - h for g, h in zip(a.gradients, b.gradients)])
        assert 1e-3 * norm_of(a.gradients) < error < 0.4 * norm_of(a.gradients)
    for update in diaries[1].updates:
        assert all(g.dtype == torch.float32 for g in update.gradients)
        assert sum(bool(g.any()) for g in update.gradients) >= len(update.gradients) / 2


# ---- equality with dmd.py ------------------------------------------------------------------------


def first_gradients(monkeypatch, script, folder, *flags):
    """The gradients, before clipping, of a run's updates in order, each as one vector.

    The student's, then R of the fake, and so on.
    """
    quiet(monkeypatch)
    if script is phased_dmd:
        monkeypatch.setattr(phased_dmd, "marginals", lambda *a: None)
    seen, real = [], plumbing_run.clip

    def on_clip(parameters, max_norm):
        seen.append(torch.cat([p.grad.flatten() for p in parameters]))
        return real(parameters, max_norm)

    monkeypatch.setattr(plumbing_run, "clip", on_clip)
    own = (
        "--teacher ring --max_train_steps 3 --train_batch_size 8 --fake_update_ratio 2 "
        "--timestep_shift 3 --seed 5 --guidance_scale 1.5 --preview_every 0"
    )
    script.main([*own.split(), "--output_dir", str(folder), *flags])
    monkeypatch.undo()
    return seen


def difference(a, b):
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("steps, shared", [(1, False), (3, False), (3, True), (4, True)])
def test_one_phase_is_dmd(monkeypatch, tmp_path, steps, shared):
    """With one phase the script is dmd.py with Euler rollouts, draw by draw.

    The same gradients of fake and student, first and later. The gradient through all steps is
    another, and so is DMD2's own re-noising rollout.
    """
    both = ["--student_steps", str(steps), *(["--shared_fake"] if shared else [])]
    one = [*both, "--phases", "1", "--dm_range", "0.02", "0.98"]  # dmd.py's range of t
    euler = ["--renoise", "ode"] if steps > 1 else []
    want = first_gradients(monkeypatch, dmd, tmp_path / "dmd", *both, *euler)
    got = first_gradients(monkeypatch, phased_dmd, tmp_path / "phased", *one)
    assert len(want) == len(got) == 9
    assert difference(want[0], got[0]) < 2e-5 and difference(want[1], got[1]) < 1e-5
    assert all(difference(a, b) < 1e-3 for a, b in zip(want, got))
    if steps > 1:
        folder = tmp_path / "vanilla"
        vanilla = first_gradients(monkeypatch, phased_dmd, folder, *one, "--no_truncation")
        sde = first_gradients(monkeypatch, dmd, tmp_path / "sde", *both)
        assert max(difference(want[i], vanilla[i]) for i in (0, 3, 6)) > 0.1
        assert max(difference(want[i], sde[i]) for i in (1, 2, 4, 5)) > 0.1


# ---- what a run leaves ---------------------------------------------------------------------------

SHORT = (
    "--max_train_steps 6 --train_batch_size 4 --teacher_steps 2 --preview_samples 3 "
    "--checkpointing_steps 2 --lr_decay_share 0 --lr_warmup_steps 0"
).split()
# images (2, 6, 4), and videos (2, 4, 4, 4)
TEACHERS = {"full": dict(), "lora": dict(size=(4, 4, 4), patch=(2, 2, 2))}
EXPERTS = {
    "full": "--ema_decay 0.5".split(),
    "lora": "--ema_decay 0.5 --lora_rank 2 --fake_lora_rank 2 --lora_alpha 3".split(),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two whole runs of 6 updates: full experts, adapters on a teacher of videos.

    -> {kind: namespace(flags, folder, teacher)}.
    """
    out = {}
    for kind in EXPERTS:
        root = tmp_path_factory.mktemp(kind)
        flags = [*SHORT, *save_dit(root / "teacher", **TEACHERS[kind]), *EXPERTS[kind]]
        phased_dmd.main([*flags, "--output_dir", str(root / "run")])
        run = dict(flags=flags, folder=root / "run", teacher=root / "teacher")
        out[kind] = types.SimpleNamespace(**run)
    return out


both_kinds = pytest.mark.parametrize("kind", list(EXPERTS))


@both_kinds
def test_files_of_a_run(finished, kind):
    """student/ has an expert per phase, and sampler.json, which ties them to their grid.

    Experts are networks in the teacher's own layout, or adapter files. The log names the phase.
    Without a world the report has no rows and the samples are kept as latents; videos leave a GIF.
    """
    folder = finished[kind].folder
    names = ["expert1", "expert2"]
    if kind == "lora":
        names = [f"{name}.safetensors" for name in names]
    assert sorted(p.name for p in (folder / "student").iterdir()) == [*names, "sampler.json"]
    outputs = {"student", "state", "samples.png", "samples.safetensors", "log.csv", "report.json"}
    outputs |= {"samples.gif"} if kind == "lora" else set()
    assert {p.name for p in folder.iterdir()} == outputs
    sampler = load_json(str(folder / "student" / "sampler.json"))
    assert sampler["times"] == [1.0, 0.75, 0.5, 0.25] and sampler["phase_ends"] == [0.5, 0.0]
    assert sampler["timestep_shift"] == 1
    assert [(e["weights"], e["steps"], e["t"], e["network"]) for e in sampler["experts"]] == [
        (names[0], 2, [1.0, 0.5], None),
        (names[1], 2, [0.5, 0.0], None),
    ]
    assert (sampler["method"], sampler["rule"]) == ("phased_dmd", "euler")
    assert (sampler["guidance_scale"], sampler["prediction"]) == (1.0, "flow_v")
    net = load_network(str(finished[kind].teacher))[0]
    size = sum(p.numel() for p in net.parameters())
    if kind == "lora":
        size = sum(v.numel() for v in load_file(folder / "student" / names[0]).values())
        with open_tensors(str(folder / "student" / names[1])) as f:
            header = f.metadata()
        assert (header["rank"], header["alpha"], header["expert"]) == ("2", "2", "2 of 2")
        assert header["trained_alpha"] == "3"
        assert header["times"] == "1 0.75 0.5 0.25 0"
        assert Image.open(folder / "samples.gif").n_frames == 4
    else:
        ours = (folder / "student" / names[0] / "config.json").read_text()
        assert json.loads(ours) == json.loads((finished[kind].teacher / "config.json").read_text())
    report = load_json(str(folder / "report.json"))
    assert report["method"] == "phased_dmd" and report["params"] == 2 * size
    assert [r["name"] for r in report["results"]] == ["teacher", "teacher_same_steps", "student"]
    assert report["steps"] == 6
    assert load_file(folder / "samples.safetensors")["x0"].shape == (3, *net.latent_shape)
    assert Image.open(folder / "samples.png").size[0] > 10
    log = read_log(folder)
    assert [(int(r["step"]), int(r["phase"])) for r in log] == [
        (step + 1, 1 if step < 3 else 2) for step in range(6)
    ]
    columns = "step phase loss_dm g_dm dm_cos dm_rel_gap mean std norm_student loss_fake norm_fake"
    columns = columns.split()
    assert list(log[0]) == [*columns, "seconds", "peak_memory_mb"]
    assert all(float(v) == float(v) for r in log for v in r.values())


def saved_experts(folder, *bases):
    """The two experts of a run as functions of x, t and condition.

    Adapters are put on copies of these networks, one for both or one each.
    """
    if (folder / "student" / "expert1").is_dir():
        return tuple(load_network(str(folder / "student" / f"expert{k}"))[0] for k in (1, 2))
    nets = [copy.deepcopy(bases[0]), copy.deepcopy(bases[-1])]
    for k, net in enumerate(nets, start=1):
        lora.load(net, f"expert{k}", str(folder / "student" / f"expert{k}.safetensors"))
    return tuple(lora.Adapted(net, f"expert{k}") for k, net in enumerate(nets, start=1))


def flow_sample(experts, z, times, cond):
    return phased_dmd.sample(experts, Diffusion(Flow(), "flow_v"), z, times, cond)


SAMPLING = """
import sys
import torch
torch.set_num_threads(1)
import phased_dmd
for run in sys.argv[1:]:
    flags = ["--preview_samples", "3", "--train_batch_size", "4"]
    phased_dmd.main(["--sample", run, "--output_dir", run + "-samples", *flags])
"""


def test_sampling_in_a_new_process(finished, tmp_path):
    """--sample needs the student, and for adapters the teacher's folder.

    Another process draws what the run showed of its experts.
    """
    runs = {kind: shutil.copytree(finished[kind].folder, tmp_path / kind) for kind in EXPERTS}
    (tmp_path / "sampling.py").write_text(SAMPLING)
    fresh = launch(tmp_path / "sampling.py", runs.values(), cwd=tmp_path)
    assert fresh.returncode == 0, fresh.stderr
    for kind, folder in runs.items():
        samples = tmp_path / f"{kind}-samples"
        ours, again = (load_file(path / "samples.safetensors")["x0"] for path in (folder, samples))
        torch.testing.assert_close(ours, again, rtol=1e-4, atol=1e-5)
        assert (samples / "samples.png").is_file()
        assert (samples / "samples.gif").is_file() == (kind == "lora")
        net = load_network(str(finished[kind].teacher))[0]
        trained = saved_experts(folder, net)
        z = Draws(0, "evaluation", 0, range(3)).normal("z", net.latent_shape)
        times, cond = [1.0, 0.75, 0.5, 0.25], {"label": torch.arange(3)}
        for one, two in ((net, net), (trained[0], net), (net, trained[1]), trained):
            x = flow_sample([one, one, two, two], z, times, cond)  # each matters, in its steps
            assert ((x - ours).abs().max() < 1e-4) == ((one, two) == trained)


def test_report_and_marginals_of_a_world(monkeypatch, tmp_path):
    """report.json's rows: calls counted with guidance, and the student's marginals.

    Those are for every step of its grid how far its states are from noised data.
    """
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    own = (
        "--teacher ring --max_train_steps 2 --train_batch_size 8 --teacher_steps 4 "
        "--guidance_scale 2 --fake_update_ratio 1 --lora_rank 2 --seed 3"
    )
    phased_dmd.main([*own.split(), "--output_dir", str(tmp_path / "run")])
    report = load_json(str(tmp_path / "run" / "report.json"))
    rows = {r["name"]: r for r in report["results"]}
    calls = {"data": 0, "teacher": 14, "teacher_same_steps": 8, "student": 4}
    assert {n: r["nfe"] for n, r in rows.items()} == calls
    measures = "fd fd_excess fd_teacher patch_swd accuracy diversity ms_per_sample".split()
    assert set(measures) <= set(rows["student"])
    marginals = rows["student"]["marginals"]
    assert list(marginals) == ["0.9", "0.75", "0.5", "0"]
    assert not any("marginals" in rows[n] for n in ("data", "teacher"))
    assert marginals["0"] > 0.03 > marginals["0.9"] > 0  # untrained, and nearly noise
    assert not (tmp_path / "run" / "samples.safetensors").exists()
    # --sample fits the network that the adapters belong on again, from the run's seed, while --seed
    # is that of the noise
    out = ["--output_dir", str(tmp_path / "samples"), "--seed", "4"]
    phased_dmd.main(["--sample", str(tmp_path / "run"), *out])
    one, two = saved_experts(tmp_path / "run", ring_network(3))
    z = Draws(4, "evaluation", 0, range(400)).normal("z", (2,))
    cond = {"label": torch.arange(400) % 4}
    x = flow_sample([one, one, two, two], z, step_grid(4, 3.0)[:-1], cond)
    again = load_file(tmp_path / "samples" / "samples.safetensors")["x0"]
    torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2,), (2, 8, 8), (1, 8, 8, 8)])
def test_marginals_are_energy_distances_to_noised_data(shape):
    """Of the sampler's own states, step by step, to data of the same labels, noised.

    Images and videos in 4 cells an axis. The networks run in the precision that they train in.
    """
    autocast = []

    def velocity(scale):
        def net(x, t, label):
            autocast.append(torch.is_autocast_enabled("cpu"))
            return scale * x + 0 * expand(t, x)

        return net

    data = torch.randn(64, *shape, generator=torch.Generator().manual_seed(1))
    world = types.SimpleNamespace(data=lambda n, seed, index: (data[:n], index))
    run = Run(phased_dmd.parse_args(["--seed", "3", "--mixed_precision", "bf16"]), "phased_dmd")
    teacher = types.SimpleNamespace(
        diffusion=Diffusion(Flow(), "flow_v"),
        conditions=Conditions(types.SimpleNamespace(prompts=None), ring_network()),
        world=world,
        shape=shape,
    )
    grid, scales = [1.0, 0.75, 0.5, 0.0], (0.5, 1.5, 1.0)
    got = phased_dmd.marginals(run, list(map(velocity, scales)), teacher, grid, n=64)
    x = Draws(3, "evaluation", 0, range(64)).normal("z", shape)
    for i, (scale, t_next) in enumerate(zip(scales, grid[1:])):
        x = x + (t_next - grid[i]) * scale * x
        eps = Draws(3, "marginals", i, range(64)).normal("eps", shape)
        a, b = x, (1 - t_next) * data + t_next * eps
        for axis in range(2, len(shape) + 1):  # pairs of neighbours, 8 -> 4
            a, b = (v.unflatten(axis, (4, 2)).mean(axis + 1) for v in (a, b))
        want = energy_distance(a.flatten(1), b.flatten(1))
        assert got[f"{t_next:g}"] == pytest.approx(want, rel=1e-4)
    assert len(got) == 3 and autocast == [True] * 3


def test_film_of_the_ring(monkeypatch, tmp_path):
    """ring.gif: a frame at the start and after every update of a run of six, of the teacher and
    the fake of the phase in training, at a level within its (s, 1). A run that stopped in its
    second phase goes on from the state at the end of the first, and ends with as many frames.
    """
    quiet(monkeypatch)
    monkeypatch.setattr(phased_dmd, "marginals", lambda *a: None)
    made, taken, stop = {}, [], [4]

    def on_trainable(real, run, net, name, *rest):
        made[name] = real(run, net, name, *rest)
        return made[name]

    def on_take(real, film, done):
        number = 1 if done <= 3 else 2
        s, fake = {1: 0.75, 2: 0.0}[number], made[f"fake{number}"]
        assert s < film.t < 1 and film.names == ("teacher", f"fake {number}")
        x, t, label = torch.randn(6, 2), torch.full((6,), film.t), torch.arange(6) % 4
        cond, flow = {"label": label}, Diffusion(Flow(), "flow_v")
        shown = [mu(x, t, cond, {}) for mu in film.mus]
        assert torch.equal(shown[0], flow.x0(RingTeacher(), x, t, **cond))
        assert torch.equal(shown[1], flow.x0(fake, x, t, **cond, steps=torch.ones(6)))
        taken.append(done)
        return real(film, done)

    def on_end_step(real, run, step, **more):
        if step in stop:
            raise InterruptedError
        return real(run, step, **more)

    Diary.wrap(monkeypatch, phased_dmd, "trainable", on_trainable)
    Diary.wrap(monkeypatch, Film, "take", on_take)
    Diary.wrap(monkeypatch, Run, "end_step", on_end_step)
    own = "--max_train_steps 6 --train_batch_size 8 --fake_update_ratio 1".split()
    own = ["--teacher", "ring", *own, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(InterruptedError):
        phased_dmd.main(own)
    assert Image.open(tmp_path / "run" / "ring.gif").n_frames == 4  # it was saved after the third
    stop.clear()
    phased_dmd.main([*own, "--resume_from_checkpoint", "latest"])
    assert taken == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    assert Image.open(tmp_path / "run" / "ring.gif").n_frames == 7


def test_sampling_with_another_table_of_betas(monkeypatch, tmp_path):
    """Experts of a network whose clock counts betas (PixArt) have the teacher's number of them,
    also when --sample loads them again. With the class's own number the samples are others."""
    (tmp_path / "pixart").mkdir()
    flags = save_tiny_pixart(tmp_path / "pixart", 512)
    scheduler = tmp_path / "pixart" / "scheduler" / "scheduler_config.json"
    save_json({**load_json(str(scheduler)), "num_train_timesteps": 500}, str(scheduler))
    own = "--student_steps 2 --max_train_steps 2 --fake_update_ratio 1 --preview_samples 2".split()
    own += ["--lora_rank", "0", "--output_dir", str(tmp_path / "run")]
    phased_dmd.main([*flags, *SHORT, *own])
    ours = load_file(tmp_path / "run" / "samples.safetensors")["x0"]

    def sampled(name):
        out = ["--output_dir", str(tmp_path / name), "--preview_samples", "2"]
        phased_dmd.main(["--sample", str(tmp_path / "run"), *flags[2:4], *out])
        return load_file(tmp_path / name / "samples.safetensors")["x0"]

    torch.testing.assert_close(sampled("again"), ours, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(phased_dmd, "set_clock", lambda net, schedule: None)
    assert (sampled("other clock") - ours).norm() > 1e-2 * ours.norm()


# ---- what is refused -----------------------------------------------------------------------------


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
            "--student_steps 8",
            "--student_steps 8: these experts were trained for 4, on the steps 1, 0.75, 0.5, 0.25",
        ),
        ("--phases 1", "--phases 1: these experts were trained for 2"),
        ("--timestep_shift 3", "--timestep_shift 3: these experts were trained for 1"),
    ],
)
def test_sampler_refuses_another_grid(finished, tmp_path, capsys, kind, flags, says):
    """Experts know the steps they were trained at and no others."""
    given = ["--sample", str(finished[kind].folder), *flags.split()]
    assert says in refusal(capsys, tmp_path / "out", *given)


@both_kinds
def test_sampler_takes_its_own_grid(finished, tmp_path, kind):
    """Naming the grid that the experts have is no error."""
    own = "--student_steps 4 --phases 2 --timestep_shift 1 --preview_samples 1".split()
    out = ["--output_dir", str(tmp_path / "out")]
    phased_dmd.main(["--sample", str(finished[kind].folder), *own, *out])
    assert (tmp_path / "out" / "samples.png").is_file()


@both_kinds
def test_unfinished_and_foreign_students_are_refused(finished, tmp_path, capsys, kind):
    """One line each for an expert that is missing or damaged, and for adapters on another base.

    Also for students of other scripts, ours given to them, an --output_dir that is a run, and a
    shape the network does not take.
    """
    run = shutil.copytree(finished[kind].folder, tmp_path / "run")
    student, out = run / "student", tmp_path / "out"
    sample = ["--sample", str(run)]
    says = refusal_of(capsys, phased_dmd.main, *sample, "--output_dir", str(run))
    assert "is a run with samples of its own" in says
    says = refusal(capsys, out, *sample, "--sample_shape", "1", "4", "4")
    assert "--sample_shape 1 4 4" in says
    says = refusal_of(capsys, dmd.main, *sample, "--output_dir", str(out))
    assert "was made by phased_dmd: sample it with python phased_dmd.py --sample" in says
    if kind == "lora":
        other = perturbed(small_dit(dim=64, depth=2, **TEACHERS[kind]))
        save_network(other, network_config(other), str(tmp_path / "other"))
        says = refusal(capsys, out, *sample, "--teacher", str(tmp_path / "other"))
        assert f"the adapters belong on {finished[kind].teacher} as it was, name that" in says
        says = refusal(capsys, out, *sample, "--teacher", str(tmp_path / "moved"))
        assert "neither an embedded world" in says
    else:
        says = refusal(capsys, out, *sample, "--teacher", "ring")
        assert "are full networks and need none" in says
    last = student / ("expert2" if kind == "full" else "expert2.safetensors")
    weights_file = last / WEIGHTS if kind == "full" else last
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    assert "is truncated or not a safetensors file" in refusal(capsys, out, *sample)
    if kind == "full":
        shutil.rmtree(last)
    else:
        last.unlink()
    says = refusal(capsys, out, *sample)
    assert f"lacks {last.name}: its training ended before that phase; resume it" in says
    sampler = load_json(str(student / "sampler.json"))
    save_json({**sampler, "method": "dmd"}, str(student / "sampler.json"))
    says = refusal(capsys, out, *sample)
    assert "was made by dmd: sample it with python dmd.py --sample" in says


def test_adapters_whose_base_is_gone(finished, tmp_path, capsys):
    """--sample names the teacher that adapters need, where its folder is no longer there."""
    run = shutil.copytree(finished["lora"].folder, tmp_path / "run")
    sampler = load_json(str(run / "student" / "sampler.json"))
    save_json({**sampler, "base": "/gone"}, str(run / "student" / "sampler.json"))
    says = refusal(capsys, tmp_path / "out", "--sample", str(run))
    assert "belong on /gone, which is not there: name that teacher with --teacher" in says
    given = ["--teacher", str(finished["lora"].teacher), "--preview_samples", "1"]
    out = ["--output_dir", str(tmp_path / "out")]
    phased_dmd.main(["--sample", str(run), *given, *out])
    assert (tmp_path / "out" / "samples.png").is_file()


def test_adapters_of_one_network_and_of_two(tmp_path, capsys):
    """Adapters of a single network are refused on a two-network teacher, and the other way round.

    In words.
    """
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    two = save_tiny_wan(tmp_path / "two", boundary=0.875)
    one = save_tiny_wan(tmp_path / "one")
    own = "--student_steps 4 --max_train_steps 2 --fake_update_ratio 1 --lora_rank 2".split()
    for name, flags, other, kind in (
        ("a", two, tmp_path / "one", "two networks"),
        ("b", one, tmp_path / "two", "one network"),
    ):
        phased_dmd.main([*flags, *own, "--output_dir", str(tmp_path / name)])
        path = str(tmp_path / name / "student" / "sampler.json")
        sampler = load_json(path)
        del sampler["base_fingerprint"]  # as in older runs; it would name other weights first
        save_json(sampler, path)
        sample = ["--sample", str(tmp_path / name), *two[2:4], "--teacher", str(other)]
        says = refusal(capsys, tmp_path / "out", *sample)
        assert "belong on" in says and "NoneType" not in says and kind in says


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--phases 5", "--phases 5: every phase needs a step, and there are --student_steps 4"),
        (
            "--phases 4 --max_train_steps 3",
            "--max_train_steps 3 are shared out over --phases 4: give at least one step each",
        ),
        ("--phases 0", "--phases: must be >= 1"),
        ("--dm_range 0.9 0.1", "LO must be below HI"),
        ("--dm_range 0.02 0.4", "the first phase takes scores above 0.5; give --dm_range 0.02 1"),
        ("--target biased", "--target"),
        ("--lora_rank -1", "--lora_rank: must be >= 0"),
        ("--lora_alpha 0", "--lora_alpha: must be > 0"),
        ("--prompts x.safetensors", "takes class labels, not prompts"),
        ("--sample_shape 1 8 8", "DiT expects x of shape"),
        ("--teacher nowhere", "neither an embedded world"),
        ("--teacher ring --sample_shape 3", "RingMLP expects points (B, 2)"),
        ("--resume_from_checkpoint nowhere", "no state.json there"),
        ("--renoise ode", "unrecognized arguments: --renoise ode"),
        ("--sample TEACHER", "sampler.json does not exist"),
        ("--sample nowhere", "sampler.json does not exist"),
    ],
)
def test_wrong_flags(tmp_path, capsys, flags, says):
    """One line and exit code 2 before anything is written."""
    teacher = save_dit(tmp_path / "teacher")
    flags = [teacher[1] if f == "TEACHER" else f for f in flags.split()]
    given = [] if "--teacher" in flags else teacher
    short = [] if "--sample" in flags else SHORT
    assert says in refusal(capsys, tmp_path / "run", *short, *given, *flags)


def edit_index(root, **changes):
    index = load_json(str(root / "model_index.json"))
    index = {k: v for k, v in {**index, **changes}.items() if v is not None}
    save_json(index, str(root / "model_index.json"))


@pytest.mark.parametrize(
    "flags, damage, says",
    [
        ("--phases 1", None, "of one phase lie on both sides of the teacher's boundary 0.875"),
        ("--phases 1", None, "starts from one of its two networks; use --phases 4"),
        (
            "--timestep_shift 12",
            None,
            "steps 0.9231, 0.8 of one phase lie on both sides of the teacher's boundary 0.875",
        ),
        ("--timestep_shift 12", None, "use --timestep_shift 5, or --phases 4"),
        # The step above the boundary and the one at it are of two networks.
        ("--timestep_shift 7 --phases 1", None, "steps 1, 0.9545, 0.875, 0.7 of one phase"),
        ("--timestep_shift 1", None, "steps 1, 0.75 of one phase"),
        ("--student_steps 5", None, "steps 0.8824, 0.7692, 0.5556"),
        (
            "",
            lambda root: (root / "prompts.safetensors").unlink(),
            "prompts.safetensors does not exist",
        ),
        ("", lambda root: (root / "transformer_2" / WEIGHTS).unlink(), "transformer_2 has no"),
        (
            "",
            lambda root: (root / "transformer_2" / "config.json").write_text("{"),
            "is not readable JSON",
        ),
        (
            "",
            lambda root: shutil.rmtree(root / "transformer"),
            "transformer_2/ but no transformer/",
        ),
        ("", lambda root: edit_index(root, boundary_ratio=None), "boundary_ratio is None"),
    ],
)
def test_wrong_two_network_teachers(tmp_path, capsys, flags, damage, says):
    """A grid whose phase straddles the boundary, and roots that are not whole.

    One line and exit code 2 before anything is written.
    """
    given = save_tiny_wan(tmp_path, boundary=0.875)
    if damage:
        damage(tmp_path)
    own = [*given, *SHORT, "--student_steps", "4", *flags.split()]
    assert says in refusal(capsys, tmp_path / "run", *own)


def test_a_network_without_steps_is_refused(tmp_path, capsys):
    """With every step above the boundary the low-noise network would have no expert.

    And no level below it would ever be matched. One starting network for two is refused too.
    """
    given = [*save_tiny_wan(tmp_path, boundary=0.875), *SHORT]
    says = refusal(
        capsys, tmp_path / "run", *given, "--student_steps", "2", "--timestep_shift", "8"
    )
    assert "all steps 1, 0.8889 lie above the teacher's boundary 0.875" in says
    assert "use --student_steps 2 --phases 2 --timestep_shift 5" in says
    own = ["--student_steps", "4", "--lora_rank", "0"]
    own += ["--student_init", str(tmp_path / "transformer")]
    assert "this teacher has two" in refusal(capsys, tmp_path / "run", *given, *own)


def refused_steps(steps, phases, shifted, boundary):
    """What wrong_flags says about the steps of a student of two networks, or None."""
    teacher = types.SimpleNamespace(
        shift=shifted, base=types.SimpleNamespace(boundary=boundary, high=None, low=None)
    )
    args = phased_dmd.parse_args([f"--student_steps={steps}", f"--phases={phases}"])
    return next((why for wrong, why in phased_dmd.wrong_flags(args, teacher) if wrong), None)


def test_advice_about_phases_works_when_followed():
    """Each remedy that a refusal names, followed, is accepted: for every number of steps and
    phases, boundaries of Wan 2.2 and others, and shifts on a fine grid."""
    seen = {"both sides": 0, "all steps": 0}
    for steps in range(1, 9):
        for phases in range(1, steps + 1):
            for boundary in (0.875, 0.9, 0.5, 0.3):
                for shifted in (1, 2, 3, 5, 7, 8, 12, 30):
                    says = refused_steps(steps, phases, shifted, boundary)
                    if not says:
                        continue
                    seen[next(kind for kind in seen if kind in says)] += 1
                    for remedy in says.split("; use ")[1].split("network would")[-1].split(", or "):
                        now = {"student_steps": steps, "phases": phases, "timestep_shift": shifted}
                        words = remedy.split("--")[1:]
                        assert words, says
                        for flag, value in (word.split() for word in words):
                            assert flag in now
                            now[flag] = float(value)
                        asked = int(now["student_steps"]), int(now["phases"])
                        after = refused_steps(*asked, now["timestep_shift"], boundary)
                        assert after is None, (says, remedy, after)
    assert min(seen.values()) > 20, seen


def test_defaults_of_released_teachers(tmp_path):
    """A released teacher has the paper's values; an adapter as fake the adapters' rate.

    Sampling its student goes one video at a time, and takes teacher, steps and phases from it.
    """
    root, parse = tmp_path / "wan", phased_dmd.parse_args
    args = parse(wan_flags(root, 0.875)[:4])
    assert (args.learning_rate, args.learning_rate_fake) == (5e-5, 4e-7)
    assert (args.lora_rank, args.lora_alpha, args.fake_update_ratio) == (64, 8, 5)
    assert (args.adam_betas, args.timestep_shift) == ([0.0, 0.999], 5.0)
    assert args.guidance_scale == 4.0  # Wan's; other teachers have their own
    for config, names, scale in (
        (WAN_1_3B, ["transformer"], 5.0),
        (WAN_14B, ["transformer"], 5.0),
        (WAN_A14B, ["transformer", "transformer_2"], 4.0),
    ):
        where = tmp_path / f"{len(names)} {config['num_layers']}"
        for name in names:
            (where / name).mkdir(parents=True)
            about = {"_class_name": "WanTransformer3DModel", **config}
            save_json(about, str(where / name / "config.json"))
        save_json({"_class_name": "WanPipeline"}, str(where / "model_index.json"))
        wan = parse(["--teacher", str(where), "--prompts", "p"])
        assert (wan.timestep_shift, wan.guidance_scale) == (5.0, scale)
    (tmp_path / "pixart").mkdir()
    other = parse(save_tiny_pixart(tmp_path / "pixart", 512)[:4])
    assert (other.timestep_shift, other.guidance_scale) == (None, 1.0)
    assert (other.lora_rank, other.fake_update_ratio) == (64, 5)
    assert (args.student_steps, args.phases, args.train_batch_size) == (4, 2, 1)
    fake = ["--fake_lora_rank", "4"]
    assert parse(["--teacher", str(root), *fake]).learning_rate_fake == 5e-5
    assert parse(fake).learning_rate_fake == parse([]).learning_rate_fake
    (tmp_path / "student").mkdir()
    for base, batch in ((str(root), 1), ("ring", parse([]).train_batch_size)):
        save_json({"base": base}, str(tmp_path / "student" / "sampler.json"))
        args = parse(["--sample", str(tmp_path)])
        assert args.train_batch_size == batch
        saved = (args.teacher, args.student_steps, args.phases, args.timestep_shift)
        assert saved == (None, None, None, None)


@pytest.mark.parametrize("prediction, zero_snr", [("epsilon", False), ("v_prediction", True)])
def test_vp_teachers(monkeypatch, tmp_path, prediction, zero_snr):
    """A teacher with a VP schedule, up to t = 1 where alpha may be 0.

    The fake regresses the teacher's own prediction, and all stays finite.
    """
    flags = save_dit(tmp_path / "teacher" / "student")
    scheduler = tmp_path / "teacher" / "student" / "scheduler"
    scheduler.mkdir()
    config = dict(_class_name="DDIMScheduler", beta_schedule="scaled_linear", beta_start=0.00085)
    config |= dict(beta_end=0.012, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    save_json(config, str(scheduler / "scheduler_config.json"))
    own = [*flags, "--dm_range", "0", "1", "--dmd_weight", "paper"]
    diary = run(monkeypatch, tmp_path / "run", *own)
    diffusion = diary.teacher.diffusion
    assert diffusion.prediction == {"epsilon": "eps", "v_prediction": "vp_v"}[prediction]
    assert diffusion.schedule.zero_snr == zero_snr
    assert all(torch.isfinite(g).all() for u in diary.updates for g in u.gradients)
    assert len(diary.updates) == 12
    turn = next(t for t in diary.turns if t.who == "fake")
    at = turn.x_s, turn.eps, turn.s, turn.t
    want, x_t = phased_dmd.subinterval_target(diffusion, *at), diffusion.noise_on(*at)
    weight = phased_dmd.taper(diffusion, turn.s, turn.t)
    update = diary.updates[1]
    fake = diary.at(update, "fake1")
    error = fake(x_t, turn.t, **turn.cond) - want
    loss = (weight * error.square().flatten(1).mean(1)).mean()
    expected = torch.autograd.grad(loss, list(fake.parameters()))
    for a, b in zip(update.gradients, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_nothing_of_a_phase_outlives_it(monkeypatch, tmp_path):
    """In phase 2, also right after a save in phase 1, the first fake and average are gone.

    No tensor of them, or of the fake's optimizer, is alive.
    """
    quiet(monkeypatch)
    monkeypatch.setattr(phased_dmd, "marginals", lambda *a: None)
    watched, alive = [], []

    def on_made(real, args, net, name, *rest):
        new = real(args, net, name, *rest)
        if name in ("fake1", "ema1"):
            watched.extend(weakref.ref(p) for p in new.parameters())
        return new

    def on_update(real, run, optimizer, what):
        real(run, optimizer, what)
        if len(alive) == 1:  # the second update, the first of the first fake
            watched.extend(weakref.ref(s["exp_avg"]) for s in optimizer.state.values())
        alive.append(sum(r() is not None for r in watched))

    for name in ("trainable", "average_of"):
        Diary.wrap(monkeypatch, phased_dmd, name, on_made)
    Diary.wrap(monkeypatch, Run, "update", on_update)
    own = (
        "--teacher ring --max_train_steps 4 --train_batch_size 4 --fake_update_ratio 2 "
        "--checkpointing_steps 3"
    )
    phased_dmd.main([*own.split(), "--output_dir", str(tmp_path)])
    assert len(alive) == 12 and alive[0] > 0 and alive[5] > 0 and alive[6:] == [0] * 6, alive


def test_a_resumed_run_closes_the_state_that_it_has_read(monkeypatch, tmp_path):
    """A state that is replaced by later ones takes room on the disk as long as it is open."""
    quiet(monkeypatch)
    monkeypatch.setattr(phased_dmd, "marginals", lambda *a: None)
    own = "--teacher ring --train_batch_size 4 --fake_update_ratio 1 --checkpointing_steps 2"
    own = [*own.split(), "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        phased_dmd.main([*own, "--max_train_steps", "4", "--max_minutes", "1e-9"])
    read, open_now = [], []

    def on_read(real, run, phases):
        info, saved = real(run, phases)
        read.append(weakref.ref(saved))
        return info, saved

    def on_update(real, run, optimizer, what):
        open_now.append(read[0]() is not None)
        real(run, optimizer, what)

    Diary.wrap(monkeypatch, phased_dmd, "read_state", on_read)
    Diary.wrap(monkeypatch, Run, "update", on_update)
    phased_dmd.main([*own, "--max_train_steps", "4", "--resume_from_checkpoint", "latest"])
    assert len(open_now) == 6 and not any(open_now)


def test_text_teachers_need_prompts(tmp_path, capsys):
    """Without --prompts there is nothing to train on."""
    says = refusal(capsys, tmp_path / "run", *save_tiny_wan(tmp_path)[:2])
    assert "needs --prompts FILE.safetensors" in says


# ---- Wan 2.2: two networks -----------------------------------------------------------------------


def wan_flags(root, boundary=None):
    """A tiny Wan pipeline root, one network or two, with flags for a short run on it.

    4 steps in 2 phases, shift 5.
    """
    root.mkdir()
    own = (
        "--student_steps 4 --max_train_steps 4 --fake_update_ratio 2 --preview_samples 2 "
        "--learning_rate 1e-2 --learning_rate_fake 1e-3 --max_grad_norm 1e9"
    )
    return [*save_tiny_wan(root, boundary=boundary), *SHORT, *own.split()]


FULL, ADAPTERS = ["--lora_rank", "0"], ["--lora_rank", "2", "--fake_lora_rank", "2"]


@pytest.mark.parametrize("batch", [4, 1])
@pytest.mark.parametrize("flags", [FULL, ADAPTERS], ids=["full", "lora"])
def test_each_phase_of_two_networks(monkeypatch, tmp_path, flags, batch):
    """Phase 1 has the high-noise network alone as start of expert and fake.

    Its noise levels are clamped to the boundary, not drawn again. Phase 2 starts from the low-noise
    network, and its fake is both networks, each trained on the levels it is in charge of: where a
    batch has none of them, its gradient is zero, not absent, for other ranks may have some.
    """
    diary = Diary(monkeypatch)
    own = ["--output_dir", str(tmp_path / "run"), "--train_batch_size", str(batch), *flags]
    phased_dmd.main([*wan_flags(tmp_path / "wan", 0.875), *own])
    names = ("transformer", "transformer_2")
    high, low = (load_network(str(tmp_path / "wan" / name))[0] for name in names)
    first = [next(u for u in diary.updates if u.phase == k) for k in (1, 2)]
    base = diary.teacher.base
    assert isinstance(base, WanTwoNetworks) and base is diary.teacher.net
    if flags is FULL:
        both = WanTwoNetworks(high, low, 0.875)
        for k, name, start in (
            (1, "expert1", high),
            (1, "fake1", high),
            (2, "expert2", low),
            (2, "fake2", both),
        ):
            assert_bit_equal(first[k - 1].nets[name], dict(start.state_dict()))
    else:
        nets = [diary.made[n].net for n in ("expert1", "fake1", "expert2", "fake2")]
        assert nets == [base.high, base.high, base.low, base]
        assert lora.names(base.high) == ["expert1"] and lora.names(base.low) == ["expert2"]
    assert [(u.what, u.trains) for u in diary.updates] == order_of_updates(2)
    grid, at_boundary, seen = step_grid(4, 5.0), 0, [[], []]
    for i, turn in enumerate(diary.turns):
        draw = Draws(0, i // 3, "student" if turn.who == "student" else i % 3 - 1, range(batch))
        s, u_end, clamp = (grid[2], 0.5, 0.875) if turn.phase == 1 else (0.0, 0.0, 0.0)
        low = u_end + 1e-3 * (1 - u_end) if s else 0.0
        low = max(low, unshift(0.02, 5.0)) if turn.who == "student" else low
        t = shift(draw.spread("u", low, 1.0), 5.0).clamp_min(clamp)
        assert torch.equal(turn.s, torch.full((batch,), s))
        torch.testing.assert_close(turn.t, t, rtol=1e-6, atol=0)
        at_boundary += int((turn.t == 0.875).sum())
        seen[turn.phase - 1].append(turn.t)
    assert batch == 1 or 0 < at_boundary < 24 and torch.cat(seen[0]).min() == 0.875
    turns = [t for t in diary.turns if t.who == "fake"]
    updates = [u for u in diary.updates if u.what == "fake"]
    for turn, update in zip(turns, updates, strict=True):
        names, above = list(update.nets[update.trains]), turn.t >= 0.875
        for side, trained in (("high.", bool(above.any())), ("low.", bool((~above).any()))):
            gradients = zip(names, update.gradients)
            mine = [bool(g.any()) for name, g in gradients if name.startswith(side)]
            assert update.phase == 1 and not mine or any(mine) == trained
    assert (torch.cat(seen[1]) >= 0.875).any() and (torch.cat(seen[1]) < 0.875).any()
    assert_bit_equal(dict(lora.base_state_dict(base)), diary.teacher_before)


def test_a_step_at_the_boundary(monkeypatch, tmp_path):
    """Shift 7, LightX2V's training configuration: the steps are 1, .9545 | .875, .7, and the third,
    at exactly the boundary, is the low-noise network's, as by its index there.

    So expert 1 starts from the high-noise network and expert 2 from the low-noise one. Phase 1 ends
    at the boundary: its levels need no clamp. Scores come from the network of diffusers' rule,
    t >= boundary, of teacher and fake alike.
    """
    diary = Diary(monkeypatch)
    own = ["--output_dir", str(tmp_path / "run"), "--timestep_shift", "7", *FULL]
    phased_dmd.main([*wan_flags(tmp_path / "wan", 0.875), *own])
    names = ("transformer", "transformer_2")
    high, low = (load_network(str(tmp_path / "wan" / name))[0] for name in names)
    first = [next(u for u in diary.updates if u.phase == k) for k in (1, 2)]
    assert_bit_equal(first[0].nets["expert1"], dict(high.state_dict()))
    assert_bit_equal(first[0].nets["fake1"], dict(high.state_dict()))
    assert_bit_equal(first[1].nets["expert2"], dict(low.state_dict()))
    assert_bit_equal(first[1].nets["fake2"], dict(WanTwoNetworks(high, low, 0.875).state_dict()))
    steps = {(c.who, round(c.t, 4)) for turn in diary.turns for c in turn.calls}
    assert steps == {("expert1", 1), ("expert1", 0.9545), ("expert2", 0.875), ("expert2", 0.7)}
    levels = [torch.cat([t.t for t in diary.turns if t.phase == k]) for k in (1, 2)]
    assert (levels[0] > 0.875).all()  # none of them at it
    assert (levels[1] < 0.875).any() and (levels[1] >= 0.875).any()
    sampler = load_json(str(tmp_path / "run" / "student" / "sampler.json"))
    assert [e["network"] for e in sampler["experts"]] == list(names)
    assert sampler["phase_ends"] == [0.875, 0.0]
    assert 0.875 < sampler["boundary_ratio"] < 0.9545


@pytest.mark.parametrize("rank", ["0", "4"])
def test_experts_begin_as_a_pair_of_lora_files(monkeypatch, tmp_path, capsys, rank):
    """--student_init FOLDER with high_noise_model and low_noise_model, as Wan2.2-Lightning is
    published: lora_down, lora_up, alpha. Each expert begins as its own, on its network."""
    flags = wan_flags(tmp_path / "wan", 0.875)
    names = ("transformer", "transformer_2")
    bases = [load_network(str(tmp_path / "wan" / name))[0] for name in names]
    folder, starts = tmp_path / "Lightning", []
    for net, name in zip(bases, ("high_noise_model", "low_noise_model")):
        path = folder / f"{name}.safetensors"
        starts.append(save_adapter(net, path, seed=len(name)))
        tensors = {}
        for key, v in load_file(path).items():
            key = key.removeprefix("diffusion_model.").replace("lora_A", "lora_down")
            tensors[key.replace("lora_B", "lora_up")] = v
            if key.endswith("lora_down.weight"):
                tensors[key.replace("lora_down.weight", "alpha")] = torch.tensor(2.0 * len(v))
        save_file(tensors, path)
    for start in starts:  # whose alpha is twice the rank now
        for a in lora.adapters(start.net, "own").values():
            a.scale *= 2
    diary = Diary(monkeypatch)
    own = ["--student_init", str(folder), "--lora_rank", rank, "--fake_lora_rank", "2"]
    phased_dmd.main([*flags, *own, "--output_dir", str(tmp_path / "run")])
    x, text = torch.randn(2, 4, 2, 4, 6), torch.randn(2, 6, 16)
    t = torch.tensor([0.3, 0.9])
    for k, (net, start) in enumerate(zip(bases, starts), start=1):
        update = next(u for u in diary.updates if u.phase == k)
        if rank == "0":
            began = diary.at(update, f"expert{k}")
        else:
            began = adapter_on(net, "began", int(rank))
            began.load_state_dict(update.nets[f"expert{k}"])
        with torch.no_grad():
            want = start(x, t, text=text)
            torch.testing.assert_close(began(x, t, text=text), want, rtol=1e-4, atol=1e-4)
            assert (net(x, t, text=text) - want).abs().max() > 1e-2
    monkeypatch.undo()
    (folder / "low_noise_model.safetensors").rename(tmp_path / "one.safetensors")
    out = ["--output_dir", str(tmp_path / "no")]
    says = refusal_of(capsys, phased_dmd.main, *flags, *own, *out)
    assert "does not have one expert for each of 2 phases" in says
    own[1] = str(tmp_path / "one.safetensors")
    says = refusal_of(capsys, phased_dmd.main, *flags, *own, *out)
    assert "is one network, and this teacher has two: give a folder with high_noise_model" in says


def test_lora_files_of_a_teacher_with_two_networks(tmp_path, capsys):
    """--teacher_lora HIGH LOW: each on its own network. One file is refused."""
    flags, files = wan_flags(tmp_path / "wan", 0.875), []
    names, args = ("transformer", "transformer_2"), phased_dmd.parse_args(flags)
    bases = [load_network(str(tmp_path / "wan" / name))[0] for name in names]
    for i, net in enumerate(bases):
        files.append(str(tmp_path / f"{i}.safetensors"))
        save_adapter(net, tmp_path / f"{i}.safetensors", seed=i)
        lora.merge_file(net, files[-1])
    args.teacher_lora = files
    teacher = teachers.start_teacher(alone(args), two_networks=True)
    for net, side in zip(bases, (teacher.net.high, teacher.net.low)):
        assert_bit_equal(dict(net.state_dict()), dict(side.state_dict()))
    assert teacher.loras == tuple(files)
    own = ["--teacher_lora", files[0], "--output_dir", str(tmp_path / "no")]
    says = refusal_of(capsys, phased_dmd.main, *flags, *own)
    assert "has two networks, for high and for low noise: give a file for each" in says


def test_the_low_noise_network_waits_on_the_host_in_the_first_phase(tmp_path, monkeypatch):
    """There nothing is asked of it but what previews start later experts from, and for a preview
    it comes back; in the second phase it is there."""
    flags, log, where = wan_flags(tmp_path / "wan", 0.875), [], {}
    quiet(monkeypatch)
    real_set, real_forward = phased_dmd.set_aside, WanTransformer3DModel.forward

    def set_aside(phase, device):
        real_set(phase, device)
        if phase.idle is not None:
            where[phase.idle] = str(device) == "cpu" and not isinstance(device, torch.device)
            log.append((phase.number, where[phase.idle]))

    def forward(net, *args, **kwargs):
        assert not where.get(net)
        return real_forward(net, *args, **kwargs)

    monkeypatch.setattr(phased_dmd, "set_aside", set_aside)
    monkeypatch.setattr(WanTransformer3DModel, "forward", forward)
    phased_dmd.main([*flags, "--output_dir", str(tmp_path / "run")])
    assert log[0] == (1, True) and log[-1] == (1, False) and len(where) == 1
    assert (1, False) in log[1:-1]  # for a preview, or a student that is saved


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_adapters_of_pixart_are_for_peft(tmp_path, dtype):
    """Networks that no pipeline of diffusers loads adapters into leave folders of peft's, which
    --sample reads again. --lora_dtype bf16 halves them and changes little."""
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    (tmp_path / "pixart").mkdir()
    flags = save_tiny_pixart(tmp_path / "pixart", 512)
    own = (
        "--student_steps 2 --max_train_steps 4 --fake_update_ratio 1 --lora_rank 3 --lora_alpha 2 "
        f"--learning_rate 1e-2 --fake_lora_rank 2 --lora_dtype {dtype} --preview_samples 2"
    )
    folder = tmp_path / "run"
    phased_dmd.main([*flags, *SHORT, *own.split(), "--output_dir", str(folder)])
    students = sorted(p.name for p in (folder / "student").iterdir())
    assert students[:2] == ["expert1", "expert2"] and "expert1.safetensors" not in students
    base = load_network(str(tmp_path / "pixart" / "transformer"))[0]
    g = torch.Generator().manual_seed(5)
    call = dict(x=torch.randn(2, 4, 4, 6, generator=g), t=torch.tensor([0.3, 0.9]))
    call |= dict(text=torch.randn(2, 9, 16, generator=g), mask=torch.ones(2, 9, dtype=torch.bool))
    for k in (1, 2):
        path = folder / "student" / f"expert{k}"
        stored = load_file(path / "adapter_model.safetensors")
        assert {str(v.dtype) for v in stored.values()} == {
            {"float32": "torch.float32", "bf16": "torch.bfloat16"}[dtype]
        }
        theirs = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "pixart/transformer")
        theirs = peft.PeftModel.from_pretrained(theirs, path)
        lora.load(base, f"e{k}", lora.adapter_file(str(path)))
        with torch.no_grad():
            ours = base(**call, adapter=f"e{k}")
            assert (pixart_noise(theirs, **call) - ours).abs().max() <= 1e-5
            assert (base(**call) - ours).abs().max() > 1e-3
    out = ["--output_dir", str(tmp_path / "samples"), "--preview_samples", "2"]
    phased_dmd.main(["--sample", str(folder), *flags[2:4], *out, "--train_batch_size", "4"])
    paths = (folder, tmp_path / "samples")
    x, again = (load_file(path / "samples.safetensors")["x0"] for path in paths)
    close = 1e-4 if dtype == "float32" else 0.05
    torch.testing.assert_close(x, again, rtol=close, atol=close)


def test_previous_expert_of_the_same_network(monkeypatch, tmp_path):
    """With --expert_init previous and four phases, experts 2 and 4 go on from 1 and 3.

    Expert 3 cannot: it starts from the other network.
    """
    diary = Diary(monkeypatch)
    own = "--phases 4 --expert_init previous --lora_rank 0 --fake_update_ratio 1".split()
    out = ["--output_dir", str(tmp_path / "run")]
    phased_dmd.main([*wan_flags(tmp_path / "wan", 0.875), *own, *out])
    first = [next(u for u in diary.updates if u.phase == k).nets for k in (1, 2, 3, 4)]
    low = load_network(str(tmp_path / "wan" / "transformer_2"))[0]
    assert_bit_equal(first[1]["expert2"], first[1]["expert1"])
    assert_bit_equal(first[2]["expert3"], dict(low.state_dict()))
    assert_bit_equal(first[3]["expert4"], first[3]["expert3"])
    assert any(not torch.equal(first[3]["expert4"][k], v) for k, v in first[2]["expert3"].items())


@pytest.mark.parametrize("rank", ["0", "4"])
def test_experts_of_wan_22_in_diffusers(tmp_path, rank):
    """Full experts are components of diffusers; adapters load into its WanPipeline.

    Into transformer and transformer_2, with the same velocities as ours. --sample finds each
    adapter's network again.
    """
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    flags, root, folder = wan_flags(tmp_path / "wan", 0.875), tmp_path / "wan", tmp_path / "run"
    out = ["--output_dir", str(folder), "--lora_rank", rank, "--fake_update_ratio", "1"]
    phased_dmd.main([*flags, *out])
    names, student = ("transformer", "transformer_2"), folder / "student"
    sampler = load_json(str(student / "sampler.json"))
    assert [e["network"] for e in sampler["experts"]] == list(names)
    assert sampler["phase_ends"] == pytest.approx([5 / 6, 0])
    bases = [load_network(str(root / name))[0] for name in names]
    theirs = []
    for k, name in enumerate(names, start=1):
        where = root / name if rank == "4" else student / f"expert{k}"
        theirs.append(diffusers.WanTransformer3DModel.from_pretrained(where).eval())
    if rank == "4":
        parts = dict(zip(names, theirs), tokenizer=None, text_encoder=None, vae=None)
        pipe = diffusers.WanPipeline(**parts, scheduler=None, boundary_ratio=0.875)
        for k, more in ((1, {}), (2, {"load_into_transformer_2": True})):
            path = str(student / f"expert{k}.safetensors")
            pipe.load_lora_weights(path, adapter_name="ours", **more)
    else:
        for k, name in enumerate(names, start=1):
            config = json.loads((student / f"expert{k}" / "config.json").read_text())
            assert config == json.loads((root / name / "config.json").read_text())
    g = torch.Generator().manual_seed(5)
    x, text = torch.randn(2, 4, 2, 4, 6, generator=g), torch.randn(2, 6, 16, generator=g)
    t = torch.tensor([0.3, 0.9])
    for ours, base, other in zip(saved_experts(folder, *bases), bases, theirs):
        with torch.no_grad():
            a, bare = ours(x, t, text=text), base(x, t, text=text)
            b = other(x, 1000 * t, text, return_dict=False)[0]
        assert (a - b).abs().max() <= 1e-5 < 1e-3 < (a - bare).abs().max()
    out = ["--output_dir", str(tmp_path / "samples"), "--preview_samples", "2"]
    phased_dmd.main(["--sample", str(folder), *flags[2:4], *out, "--train_batch_size", "4"])
    paths = (folder, tmp_path / "samples")
    x, again = (load_file(path / "samples.safetensors")["x0"] for path in paths)
    torch.testing.assert_close(x, again, rtol=1e-4, atol=1e-5)


def test_steps_in_diffusers_pipeline(tmp_path):
    """Which scheduler of diffusers takes our steps: DPMSolverMultistepScheduler of order 1.

    With flow sigmas (its clock is whole numbers, hence a few per cent on random networks).
    FlowMatchEulerDiscreteScheduler, whose grid ends elsewhere, is the wrong one; given our times it
    is exact. At shift 7, where one of them is at the boundary, the pipeline needs the
    boundary_ratio of sampler.json: by its own it would give that step to the high-noise expert.
    """
    diffusers = pytest.importorskip("diffusers")
    save_tiny_wan(tmp_path, boundary=0.875)
    names, g = ("transformer", "transformer_2"), torch.Generator().manual_seed(0)
    z, text = torch.randn(2, 4, 2, 4, 6, generator=g), torch.randn(2, 6, 16, generator=g)
    high, low = (load_network(str(tmp_path / n))[0] for n in names)

    def error(scheduler, shifted=5.0, boundary=0.875):
        ours = flow_sample([high, high, low, low], z, step_grid(4, shifted)[:-1], {"text": text})
        load = diffusers.WanTransformer3DModel.from_pretrained
        parts = {n: load(tmp_path / n).eval() for n in names}
        parts |= dict(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler)
        pipe = diffusers.WanPipeline(**parts, boundary_ratio=boundary)
        pipe.set_progress_bar_config(disable=True)
        given = dict(prompt_embeds=text, latents=z.clone(), num_inference_steps=4)
        size = dict(height=32, width=48, num_frames=5)
        x = pipe(**given, **size, guidance_scale=1.0, output_type="latent")
        return float((x.frames - ours).norm() / ours.norm())

    def right(shifted):
        kind = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shifted)
        return diffusers.DPMSolverMultistepScheduler(solver_order=1, **kind)

    wrong = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    assert error(right(5)) < 0.05 < 0.1 < error(wrong)
    teacher = types.SimpleNamespace(base=types.SimpleNamespace(boundary=0.875))
    assert phased_dmd.boundary_between(teacher, step_grid(4, 5.0)) == 0.875
    grid = step_grid(4, 7.0)

    class OurSteps(diffusers.FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps, device=None):
            super().set_timesteps(sigmas=grid[:-1], device=device)

    between = phased_dmd.boundary_between(teacher, grid)
    assert error(OurSteps(), 7.0, between) < 1e-4 < 0.05 < error(OurSteps(), 7.0)


# ---- crash and resume ----------------------------------------------------------------------------

# Saves are made after updates 2, 3 (the end of phase 1), 4 and 6. What each run dies at, one after
# the other, each resuming where the last one died:
DEATHS = {
    # before anything is saved; in phase 2, with its first expert half written
    "full": [("step-0000002", 1), ("expert2", 2)],
    # at the change of phase, expert 1 written but no state; at the very end
    "lora": [("step-0000003", 1), ("step-0000006", 1)],
}


@both_kinds
def test_kills_and_resumes(finished, tmp_path, kind):
    """SIGKILL in phase 1, at the change of phase, in phase 2.

    Each start goes on from the last whole checkpoint, and the end is the same to the bit.
    """
    run, want = tmp_path / "run", finished[kind].folder
    flags = [*finished[kind].flags, "--output_dir", str(run), "--resume_from_checkpoint", "latest"]
    for text, n in DEATHS[kind]:
        killed(tmp_path, "phased_dmd", "replace", text, n, *flags)
    phased_dmd.main(flags)
    assert_bit_equal(weights(run), weights(want))
    assert without_time(read_log(run)) == without_time(read_log(want))
    samples = "samples.safetensors"
    assert_bit_equal(load_file(run / samples), load_file(want / samples))
    assert not list(run.rglob("*.tmp-*"))


@both_kinds
def test_finished_runs_resume(finished, tmp_path, capsys, kind):
    """A finished run writes its outputs again, and goes on in its last phase with more steps.

    Expert 1 stays as it is. Other flags are refused.
    """
    run = shutil.copytree(finished[kind].folder, tmp_path / "run")
    flags = [*finished[kind].flags, "--output_dir", str(run), "--resume_from_checkpoint", "latest"]
    before, samples = weights(run), "samples.safetensors"
    shutil.rmtree(run / "student")
    for name in ("samples.png", samples, "report.json"):
        (run / name).unlink()
    phased_dmd.main(flags)
    assert_bit_equal(weights(run), before)
    assert {p.name for p in run.iterdir()} == {p.name for p in finished[kind].folder.iterdir()}
    assert_bit_equal(load_file(run / samples), load_file(finished[kind].folder / samples))
    capsys.readouterr()
    other = "--phases 4 --lora_alpha 5 --target naive".split()
    says = refusal_of(capsys, phased_dmd.main, *flags, *other)
    assert "--lora_alpha was" in says
    assert "--phases was 2 and is 4; --target was 'subinterval' and is 'naive'" in says
    says = refusal_of(capsys, phased_dmd.main, *flags, "--max_train_steps", "5")
    assert "beyond --max_train_steps 5" in says
    phased_dmd.main([*flags, "--max_train_steps", "8"])
    assert load_json(str(run / "state" / "step-0000008" / "state.json"))["phase_start"] == 3
    assert [(r["step"], r["phase"]) for r in read_log(run)] == [
        (str(i + 1), "1" if i < 3 else "2") for i in range(8)
    ]
    after = weights(run)
    for key, v in before.items():
        if "expert1" in key:
            assert torch.equal(v, after[key])
    moved = [not torch.equal(v, after[k]) for k, v in before.items() if "student/expert2" in k]
    assert any(moved)


@both_kinds
def test_resume_from_phase_1_with_other_lengths(finished, tmp_path, capsys, kind):
    """From a checkpoint of phase 1 with more steps that phase goes on first, as if planned so.

    Back to fewer, student/ is again that of the shorter run, not a mixture. So few that a phase
    would have no update are refused.
    """
    run = tmp_path / "run"
    flags = [*finished[kind].flags, "--output_dir", str(run)]
    shorter = [*flags, "--max_train_steps", "4"]
    phased_dmd.main(shorter)  # phase 1 ends at update 2
    short = weights(run)
    state = shutil.copytree(run / "state" / "step-0000002", tmp_path / "step-0000002")
    resume = ["--resume_from_checkpoint", str(state)]
    phased_dmd.main([*flags, *resume])
    assert_bit_equal(weights(run), weights(finished[kind].folder))
    says = refusal_of(capsys, phased_dmd.main, *flags, *resume, "--max_train_steps", "2")
    assert "--max_train_steps 2" in says and "phase 2" in says
    shutil.rmtree(run / "state")
    phased_dmd.main([*shorter, *resume])
    assert_bit_equal(weights(run), short)


def test_a_latent_teacher_of_a_world(tmp_path):
    """To the end: distances to latents, and an autoencoder that makes images of samples."""
    teacher, run, images = (str(tmp_path / name) for name in ("teacher", "run", "images"))
    small = "--data shapes --pool 200 --max_train_steps 1 --width 32 --depth 1 --train_batch_size 8"
    latent_fm.main([*small.split(), "--output_dir", teacher])
    few = "--max_train_steps 2 --train_batch_size 4 --teacher_steps 1 --preview_samples 2"
    phased_dmd.main(["--teacher", teacher, *few.split(), "--output_dir", run])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = {row["name"]: row for row in report["results"]}
    assert all(math.isfinite(d) for d in rows["student"]["marginals"].values())
    phased_dmd.main(["--sample", run, "--samples", "3", "--output_dir", images])
    assert np.load(os.path.join(images, "samples.npz"))["arr_0"].shape == (3, 32, 32, 3)
