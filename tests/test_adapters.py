"""--lora_rank and --fake_lora_rank: all that is trained are adapters on the teacher's network.

Each script runs a few updates on tiny networks. What the adapters themselves compute, and their
files, is in test_lora.py; experts of several phases are in test_phased_runs.py.
"""

import copy
import importlib
from unittest import mock

import pytest
import torch
from helpers import (
    alone,
    assert_bit_equal,
    perturbed,
    quiet,
    refusal_of,
    ring_flags,
    save_tiny_wan,
    small_dit,
)
from safetensors.torch import load_file

import dmd
import linvideo
import tdm
from models.files import load_json
from models.networks import load_network, lora, network_config, save_network
from models.plumbing import flags as flags_module
from models.plumbing import report, teachers
from models.plumbing.film import Film
from models.plumbing.run import Run

FAKE = "--lora_rank 2 --fake_lora_rank 2 "
SCRIPTS = {  # what a short run of each is given
    "dmd": FAKE + "--student_steps 2 --gan_weight 0.1",
    "decoupled_dmd": FAKE + "--student_steps 2 --gan_weight 0.1",
    "tdm": FAKE + "--student_steps 2",
    "linvideo": FAKE + "--objective adm_critic --bank_size 8 --sampling_steps 4",
    "mdt_dist": "--lora_rank 2",
}
every = pytest.mark.parametrize("name", SCRIPTS)
one_file = pytest.mark.parametrize("name", [n for n in SCRIPTS if n != "linvideo"])


def script_of(name):
    return importlib.import_module(name)


class Watch:
    """A run's networks (state), its base as it was before training, and how they began."""

    def __init__(self, monkeypatch):
        real = Run.start

        def start(run, **state):
            real(run, **state)
            self.state, self.base = state, getattr(state["student"], "net", None)
            self.before = self.base and copy.deepcopy(dict(lora.base_state_dict(self.base)))
            networks = [k for k, v in state.items() if not isinstance(v, torch.optim.Optimizer)]
            self.began = {k: copy.deepcopy(state[k].state_dict()) for k in networks}

        monkeypatch.setattr(Run, "start", start)


def given(name, folder, *flags, steps=3):
    """The command line of a short run."""
    own = SCRIPTS[name].split()
    fixed = ring_flags(folder, steps, 8, *own, "--ema_decay", "0.9", "--lr_decay_share", "0")
    if name == "mdt_dist":
        fixed[fixed.index("--teacher") + 1] = "voxels"
        fixed[fixed.index("--train_batch_size") + 1] = "2"
    return [*fixed, *flags]


def run(monkeypatch, name, folder, *flags, steps=3):
    """A short quiet run -> its Watch."""
    quiet(monkeypatch)
    for what in ("take", "frame"):  # of the film
        monkeypatch.setattr(Film, what, lambda *a, **k: None)
    monkeypatch.setattr(script_of(name), "finish", lambda *a: None, raising=False)
    watch = Watch(monkeypatch)
    script_of(name).main(given(name, folder, *flags, steps=steps))
    return watch


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- what is trained -----------------------------------------------------------------------------


@every
def test_only_adapters_change(name, tmp_path, monkeypatch):
    """The base stays bit-equal. Student, fake, average and head move; nothing else is trained.

    An adapter has rank (in + out) numbers for each layer, and linvideo's student also its linear
    attention and r.
    """
    watch = run(monkeypatch, name, tmp_path / "run")
    base, student, ema = watch.base, watch.state["student"], watch.state["ema"]
    assert_bit_equal(dict(lora.base_state_dict(base)), watch.before)
    assert not any(p.requires_grad or p.grad is not None for p in base_of(base))
    for who, began in watch.began.items():
        assert not equal(watch.state[who].state_dict(), began), who
    assert not equal(student.state_dict(), ema.state_dict())
    assert not any(p.requires_grad for p in ema.parameters())
    layers = [key for key in lora.linears(base) if key.endswith(base.lora_targets)]
    numbers = sum(2 * sum(base.get_submodule(key).weight.shape) for key in layers)
    fake = "critic" if name == "linvideo" else "fake"
    trained = {who: watch.state[who] for who in ("student", fake) if who in watch.state}
    assert len(trained) == (1 if name == "mdt_dist" else 2)
    for who, net in trained.items():
        assert isinstance(net, lora.Adapted) and net.net is base and net.adapter == who
        more = sum(p.numel() for p in net.more.parameters())
        assert sum(p.numel() for p in net.parameters()) == numbers + more
        assert (more > 0) == (name == "linvideo" and who == "student")
        optimizer = watch.state["optimizer" if who == "student" else "optimizer_fake"]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in net.parameters()} == held - {
            id(p) for p in head_of(watch) if who == "fake"
        }


def base_of(net):
    return lora.base_parameters(net).values()


def head_of(watch):
    return watch.state["head"].parameters() if "head" in watch.state else ()


class Spied:
    """A network whose calls are compared with those of another one."""

    def __init__(self, net, calls):
        self.net, self.calls, self.bare = net, calls, None

    def __getattr__(self, name):
        return getattr(self.net, name)

    def __call__(self, x, t, **cond):
        out = self.net(x, t, **cond)
        if self.bare is not None:
            with torch.no_grad():
                self.calls.append(torch.equal(out, self.bare(x, t, **cond)))
        return out


@every
def test_the_teacher_is_called_without_an_adapter(name, tmp_path, monkeypatch):
    """While all adapters have an effect, the teacher is exactly the bare network."""
    script, calls, spied = script_of(name), [], []
    real, real_start = script.freeze_teacher, Run.start

    def freeze(args, teacher, *rest, **more):
        real(args, teacher, *rest, **more)
        teacher.net = Spied(teacher.base, calls)  # on the ring not the closed form
        spied.append(teacher.net)

    def start(run, **state):
        real_start(run, **state)
        spied[0].bare = run.copy_of(state["student"].net).eval()
        with torch.no_grad():
            for who in ("student", "fake", "ema", "critic"):
                for p in state[who].parameters() if who in state else ():
                    p += 0.1

    monkeypatch.setattr(Run, "start", start)
    monkeypatch.setattr(script, "freeze_teacher", freeze)
    run(monkeypatch, name, tmp_path / "run")
    assert len(calls) > 2 and all(calls)


# ---- saving, resuming, sampling ------------------------------------------------------------------


@every
def test_resumed_run_is_bit_equal(name, tmp_path, monkeypatch):
    """Two updates and two more leave the student and the state that four leave."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    once = ("--checkpointing_steps", "2", "--selection_share", "0.5")
    once = once if name == "linvideo" else once[:2]
    monkeypatch.setattr(Run, "seconds", lambda run: 0.0)
    real = Run.end_step

    def stop(run, step, **more):
        if step == 2:
            raise InterruptedError
        return real(run, step, **more)

    with monkeypatch.context() as m:
        run(m, name, whole, *once, steps=4)
    with monkeypatch.context() as m:
        m.setattr(Run, "end_step", stop)
        with pytest.raises(InterruptedError):
            run(m, name, parts, *once, steps=4)
    with monkeypatch.context() as m:
        run(m, name, parts, *once, "--resume_from_checkpoint", "latest", steps=4)
    for path in sorted(whole.rglob("*.safetensors")):
        if "bank" not in path.parts:
            assert_bit_equal(load_file(path), load_file(parts / path.relative_to(whole)))
    assert (parts / "state" / "step-0000004").is_dir()


@one_file
def test_sampling_a_saved_adapter(name, tmp_path, monkeypatch, capsys):
    """--sample puts student/'s adapter on its base again: the same function as the run's average.

    A base that is gone, or another, ends in one line.
    """
    root = tmp_path / "teacher"
    net = perturbed(small_dit(dim=32, depth=2, channels=3))
    flags = []
    if name != "mdt_dist":
        save_network(net, network_config(net), str(root))
        flags = ["--teacher", str(root)]
        if "gan_weight" in SCRIPTS[name]:
            flags += ["--gan_weight", "0"]
    watch = run(monkeypatch, name, tmp_path / "run", *flags)
    student = tmp_path / "run" / "student"
    assert sorted(p.name for p in student.iterdir()) == ["adapter.safetensors", "sampler.json"]
    saved = load_json(str(student / "sampler.json"))
    assert (saved["lora_rank"], saved["seed"], saved["weights"]) == (2, 0, "adapter.safetensors")
    assert saved["base"] == ("voxels" if name == "mdt_dist" else str(root))
    script, out = script_of(name), ["--output_dir", str(tmp_path / "samples")]
    args = script.parse_args(["--sample", str(tmp_path / "run"), *out])
    more = (script.conditions_of,) if name == "mdt_dist" else ()
    again = report.load_student(Run(args, name), *more)[0]
    ema, x = watch.state["ema"], torch.randn(3, *watch.base.latent_shape)
    t, label = torch.tensor([0.2, 0.7, 1.0]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        want = ema(x, t, label=label)
        torch.testing.assert_close(again(x, t, label=label), want, rtol=1e-5, atol=1e-6)
        assert (watch.base(x, t, label=label) - want).abs().max() > 1e-4
    monkeypatch.undo()
    script.main(["--sample", str(tmp_path / "run"), *out, "--preview_samples", "2"])
    assert (tmp_path / "samples" / "samples.png").is_file()
    if name == "mdt_dist":
        return
    root.rename(tmp_path / "moved")
    says = refusal_of(capsys, script.main, "--sample", str(tmp_path / "run"), *out)
    assert f"belong on {root}, which is not there: name that teacher with --teacher" in says
    again = ["--sample", str(tmp_path / "run"), *out, "--teacher"]
    script.main([*again, str(tmp_path / "moved"), "--preview_samples", "2"])
    other = perturbed(small_dit(dim=64, depth=2, channels=3))
    save_network(other, network_config(other), str(tmp_path / "other"))
    says = refusal_of(capsys, script.main, *again, str(tmp_path / "other"))
    assert f"the adapters belong on {root} as it was, name that with --teacher" in says


@pytest.mark.parametrize("rank", [0, 2, 3])
def test_a_student_begins_as_the_adapter_of_a_run(rank, tmp_path, monkeypatch, capsys):
    """--student_init of a run of adapters: as an adapter of at least its rank, or merged.

    The fake begins as the teacher. A network, and a smaller rank, are refused.
    """
    root, net = tmp_path / "teacher", perturbed(small_dit(dim=32, depth=2, channels=3))
    save_network(net, network_config(net), str(root))
    flags = ["--teacher", str(root), "--gan_weight", "0", "--student_steps", "1"]
    before = run(monkeypatch, "dmd", tmp_path / "run", *flags, "--learning_rate", "0.1")
    ema = before.state["ema"]
    flags += ["--student_init", str(tmp_path / "run")]
    new, real_start = {}, Run.start

    def start(run, **state):
        new.update(copy.deepcopy({who: state[who] for who in ("student", "fake")}))
        return real_start(run, **state)

    monkeypatch.setattr(Run, "start", start)
    more = ["--lora_rank", str(rank), "--fake_lora_rank", "2"]
    dmd.main(given("dmd", tmp_path / "again", *flags, *more, steps=1))
    x, t, label = torch.randn(3, 3, 6, 4), torch.tensor([0.2, 0.7, 1.0]), torch.arange(3)
    with torch.no_grad():
        want, bare = ema(x, t, label=label), net(x, t, label=label)
        assert (want - bare).abs().max() > 1e-2
        got = new["student"](x, t, label=label)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert torch.equal(new["fake"](x, t, label=label), bare)
    monkeypatch.undo()
    out = given("dmd", tmp_path / "no", *flags)
    says = refusal_of(capsys, dmd.main, *out, "--lora_rank", "1")
    assert "has rank 2: give --lora_rank 2" in says
    says = refusal_of(capsys, dmd.main, *out, "--student_init", str(root))
    assert "starts full networks, not adapters: give --lora_rank 0" in says
    assert not (tmp_path / "no").exists()


@pytest.mark.long
def test_a_fake_begins_as_the_adapter_of_a_run(tmp_path, monkeypatch, capsys):
    """--fake_init of dmd.py with --fake_lora_rank: the run's fake, of the same rank and alpha."""
    flags = ["--gan_weight", "0", "--student_steps", "1"]
    before = run(monkeypatch, "dmd", tmp_path / "run", *flags)
    want = copy.deepcopy(before.state["fake"].state_dict())
    init = ["--fake_init", str(tmp_path / "run")]
    after = run(monkeypatch, "dmd", tmp_path / "again", *flags, *init, "--lora_rank", "0")
    assert_bit_equal(after.began["fake"], want)
    assert not equal(after.state["fake"].state_dict(), want)
    monkeypatch.undo()
    for other in ("--fake_lora_rank 3", "--lora_alpha 4", "--fake_init RING"):
        if other.endswith("RING"):
            net = small_dit()
            save_network(net, network_config(net), str(tmp_path / "net"))
            other = f"--fake_init {tmp_path / 'net'}"
        given_flags = given("dmd", tmp_path / "no", *flags, *init, *other.split())
        assert "it has no adapter of rank" in refusal_of(capsys, dmd.main, *given_flags)
    full = given("dmd", tmp_path / "no", *flags, *init, "--fake_lora_rank", "0")
    assert "it has no fake of this run's shapes" in refusal_of(capsys, dmd.main, *full)


# ---- linear attention ----------------------------------------------------------------------------


def test_the_merged_student_of_linvideo_is_the_adapted_one(tmp_path, monkeypatch):
    """student/ is one whole network: the adapter is in its weights, its attention is linear.

    The adapted network keeps softmax in all calls but those with the adapter.
    """
    monkeypatch.setattr(linvideo, "finish", lambda *a: None)
    monkeypatch.setitem(SCRIPTS, "linvideo", "--lora_rank 2 --bank_size 8 --sampling_steps 4")
    flags = ["--objective", "mse", "--target_layers", "2", "--learning_rate", "0.03"]
    watch = run(monkeypatch, "linvideo", tmp_path / "run", *flags, steps=6)
    net, config = load_network(str(tmp_path / "run" / "student"))
    assert len(config["linear_layers"]) == 2 and not lora.names(net)
    base, ema = watch.base, watch.state["ema"]
    x, t, label = torch.randn(5, 2), torch.linspace(0.1, 1, 5), torch.arange(5) % 4
    for i, place in enumerate(base.self_attentions):
        kept = place.attends["ema"]
        assert place.attends["student"] is watch.state["student"].more[str(i)] is not kept
        kept.fix(i in config["linear_layers"])
    with torch.no_grad():
        got, bare = net(x, t, label=label), base(x, t, label=label)
        torch.testing.assert_close(got, ema(x, t, label=label), rtol=1e-5, atol=1e-5)
        assert (got - bare).abs().max() > 1e-2
        assert torch.equal(bare, alone().copy_of(base).eval()(x, t, label=label))
    monkeypatch.undo()
    out = ["--output_dir", str(tmp_path / "samples")]
    linvideo.main(["--sample", str(tmp_path / "run"), *out])
    assert (tmp_path / "samples" / "samples.png").is_file()


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SCRIPTS, "phased_dmd"])
def test_rates_of_adapters_on_released_teachers(name, tmp_path):
    """A rank on the command line gives its network the adapters' rate, unless a rate is given too.

    Small networks keep the flags' own defaults.
    """
    save_tiny_wan(tmp_path)
    flags, script = ["--teacher", str(tmp_path)], script_of(name)
    flags += ["--objective", "adm_critic"] if name == "linvideo" else []  # which has a fake
    rate = flags_module.ADAPTER_RATE
    full = script.parse_args(flags)
    student = script.parse_args([*flags, "--lora_rank", "4"])
    assert student.learning_rate == rate and (full.learning_rate < rate or name == "phased_dmd")
    own = [*flags, "--lora_rank", "4", "--learning_rate", "1e-3"]
    assert script.parse_args(own).learning_rate == 1e-3
    ring = ["--teacher", "ring", "--lora_rank", "4"]
    ring += ["--no_steps_cond"] if name == "tdm" else []
    assert script.parse_args(ring).learning_rate > rate
    if name == "mdt_dist":
        return
    fake = script.parse_args([*flags, "--fake_lora_rank", "4"])
    assert fake.learning_rate_fake == rate and fake.learning_rate == full.learning_rate
    assert student.learning_rate_fake == full.learning_rate_fake != rate


def test_several_step_counts_need_full_weights(capsys):
    """tdm.py conditions on the number of steps, for which adapters have no layer."""
    for flag in ("--lora_rank", "--fake_lora_rank"):
        for counts in ([], ["--student_steps", "2", "4"]):
            says = refusal_of(capsys, tdm.main, "--teacher", "ring", flag, "2", *counts)
            assert f"{flag}: an adapter cannot be conditioned on the number of steps" in says
        tdm.parse_args(["--teacher", "ring", flag, "2", "--no_steps_cond"])
        tdm.parse_args(["--teacher", "ring", flag, "2", "--student_steps", "4"])


@pytest.mark.parametrize("name", ["dmd", "decoupled_dmd"])
def test_an_adapter_of_the_fake_is_not_conditioned_on_the_step(name):
    script = script_of(name)
    net = small_dit()
    for rank, sees in (("0", True), ("2", False)):
        flags = f"--teacher ring --student_steps 4 --fake_lora_rank {rank}"
        assert bool(script.fake_sees_step(script.parse_args(flags.split()), net)) == sees


def test_precision_of_base_and_adapters(tmp_path):
    """bfloat16 on a GPU, which the CPU stands for here, is for the base; adapters are float32.

    A full copy that is made before is of the teacher's float32 weights.
    """
    flags = [*save_tiny_wan(tmp_path), "--lora_rank", "2", "--mixed_precision", "bf16"]
    args = dmd.parse_args(flags)
    args.ema_decay, run = 0.9, alone(args)
    teacher = teachers.start_teacher(run)
    exact = copy.deepcopy(dict(teacher.base.state_dict()))
    student = teachers.new_student(run, teacher)
    fake = teachers.trainable(run, teacher.base, "fake")
    run.device = torch.device("cuda")
    with mock.patch.object(torch.nn.Module, "to", lambda net, device: net):
        teachers.freeze_teacher(run, teacher)
    ema = teachers.average_of(run, student)
    assert_bit_equal(dict(fake.state_dict()), exact)
    rounded = {p.dtype for p in lora.base_parameters(teacher.base).values()}
    assert rounded == {torch.bfloat16, torch.float32}  # keep_float32
    for net in (student, ema):
        assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in student.parameters())
