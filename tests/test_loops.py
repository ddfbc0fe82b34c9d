"""What the seven training loops have in common: rates, betas, micro-batches, draws, precision.

Each script's own test of its gradients knows its losses; here are the flags that all loops read,
and that a loop could read and not pass on.
"""

import importlib
import types

import pytest
import torch
from helpers import quiet, read_log
from safetensors.torch import load_file, save_file
from test_resume import flags_of

import decoupled_dmd
import dmd
import latent_fm
from models.diffusion import Diffusion, Flow
from models.draws import Draws
from models.plumbing import report
from models.plumbing.run import Run

SCRIPTS = ["dmd", "decoupled_dmd", "tdm", "phased_dmd", "linvideo", "mdt_dist", "latent_fm"]
each = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(autouse=True)
def no_samples(monkeypatch):
    quiet(monkeypatch)
    monkeypatch.setattr(latent_fm, "finish", lambda *a, **k: None)


def watch_updates(monkeypatch, look):
    """look(run, optimizers, what) is called before every update, with gradients not yet clipped."""
    real = Run.update

    def update(run, optimizers, what):
        look(run, optimizers if isinstance(optimizers, list) else [optimizers], what)
        real(run, optimizers, what)

    monkeypatch.setattr(Run, "update", update)


def run(script, tmp_path, *more):
    importlib.import_module(script).main(flags_of(script, tmp_path, *more))


def factor(script, step, steps=6):
    """Warm-up over 3 updates, and a fall over the last half of the run, or of each phase."""
    left = 1 - step / steps
    if script == "phased_dmd":  # whose phases have 3 updates each
        left = 1 - step % 3 / 3
        step %= 3
    return min(1, (step + 1) / 3) * min(1, left / 0.5)


@each
def test_rates_and_betas_of_every_update(monkeypatch, tmp_path, script):
    """Every optimiser follows the schedule; r of linvideo.py has a constant rate."""
    seen = []

    def look(run, optimizers, what):
        groups = [g for optimizer in optimizers for g in optimizer.param_groups]
        seen.append((what, [(g["lr"], g.get("betas"), g["weight_decay"]) for g in groups]))

    watch_updates(monkeypatch, look)
    flags = "--max_train_steps 6 --lr_warmup_steps 3 --lr_decay_share 0.5 --learning_rate 1e-4 "
    flags += "--adam_betas 0.7 0.8 --weight_decay 0.03"
    rates = {"student": 1e-4, "net": 1e-4, "fake": 3e-4}
    if script not in ("linvideo", "mdt_dist", "latent_fm"):
        flags += " --learning_rate_fake 3e-4 --fake_update_ratio 2"
    if script == "latent_fm":
        flags += " --optimizer muon --learning_rate_muon 2e-3"
    run(script, tmp_path, *flags.split())
    counts = {"student": 0, "net": 0, "fake": 0}
    for what, groups in seen:
        step = counts[what] // (2 if what == "fake" else 1)
        counts[what] += 1
        for lr, betas, decay in groups:
            if betas is None:  # Muon has none
                assert lr == pytest.approx(2e-3 * factor(script, step))
                continue
            assert betas == (0.7, 0.8)
            if script == "linvideo":  # W and r have rates of their own: tests/test_linvideo_runs.py
                continue
            assert decay == 0.03 or script == "latent_fm"
            assert lr == pytest.approx(rates[what] * factor(script, step)), (what, step)
    assert {6, 12} >= {n for n in counts.values() if n} and sum(counts.values()) >= 6


TERMS = [(script, more) for script in SCRIPTS for more in ("", "--mixed_precision bf16")] + [
    ("dmd", "--gan_weight 0.1 --data FILE"),
    ("dmd", "--student_steps 1 --teacher_steps 3 --regression_weight 1 --regression_pairs 8"),
    ("dmd", "--student_input real --data FILE"),
    ("decoupled_dmd", "--gan_weight 0.1 --data FILE --schedule full"),
    ("linvideo", "--objective adm_critic"),
    ("mdt_dist", "--vd_loss_weight 0.5"),
]


@pytest.mark.parametrize("script, more", TERMS, ids=lambda text: text or "float32")
def test_two_micro_batches_are_one_of_twice_the_size(monkeypatch, tmp_path, script, more):
    """The same samples are drawn, and the gradient is their mean. In bfloat16 roughly."""
    found, more = [], more.replace("FILE", data_file(tmp_path))

    def look(run, optimizers, what):
        parts = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        found[-1].append(
            (what, [torch.zeros(1) if p.grad is None else p.grad.clone() for p in parts])
        )

    watch_updates(monkeypatch, look)
    for i, size in enumerate(("8 1", "4 2")):
        found.append([])
        (tmp_path / str(i)).mkdir()
        batch = "--train_batch_size {} --gradient_accumulation_steps {}".format(*size.split())
        steps = 2 if script == "phased_dmd" else 1
        flags = f"{batch} --max_train_steps {steps} --lr_warmup_steps 1000 {more}"
        run(script, tmp_path / str(i), *flags.split())
    loose = 0.1 if "bf16" in more else 1e-3
    assert [what for what, _ in found[0]] == [what for what, _ in found[1]]
    for (what, whole), (_, parts) in zip(*found):
        for a, b in zip(whole, parts):
            error, size = (a - b).norm(), a.norm().clamp_min(1e-6)
            assert error <= loose * max(size, 1e-2 * largest(whole)), (what, error, size)


def data_file(folder):
    """Real data of the small teachers' shape and classes.  -> its path"""
    data = {"x0": torch.randn(8, 1, 4, 4), "cond.label": torch.arange(8) % 3}
    save_file(data, folder / "data.safetensors")
    return str(folder / "data.safetensors")


def largest(tensors):
    return max(float(x.norm()) for x in tensors)


DRAWING = [(script, "") for script in SCRIPTS] + [
    ("dmd", "--gan_weight 0.1 --data FILE --gradient_accumulation_steps 2"),
    ("dmd", "--student_input real --data FILE --gan_weight 0.1"),
    ("dmd", "--student_steps 1 --regression_weight 1 --regression_pairs 8"),
    ("decoupled_dmd", "--gan_weight 0.1 --data FILE --schedule full"),
    ("tdm", "--renoise sde"),
    ("phased_dmd", "--phases 1 --no_truncation"),
    ("linvideo", "--state part --guidance_scale 2 --uncond_share 0.5"),
    ("mdt_dist", "--student_steps 2 --t_law logit_normal"),
    ("latent_fm", "--data shapes --pool 100 --hflip --logit_normal"),
    ("latent_fm", "--data shapes --pool 100 --task inpaint"),
]


@pytest.mark.parametrize("script, more", DRAWING, ids=lambda text: text or "plain")
def test_no_two_numbers_of_an_update_are_drawn_by_one_name(monkeypatch, tmp_path, script, more):
    """What is to be independent would be the same, or the one a function of the other."""
    drawn, twice = set(), set()
    real_rows, real_generator = Draws._rows, Draws._generator

    def note(self, *key):
        for row in self.rows if isinstance(self.key[1], int) else ():  # not of fixed samples
            at = (*self.key, *key, row)
            twice.update({at} & drawn)
            drawn.add(at)

    def rows(self, name, *rest):
        note(self, name)
        return real_rows(self, name, *rest)

    def generator(self, *key):
        note(self, *key)
        return real_generator(self, *key)

    monkeypatch.setattr(Draws, "_rows", rows)
    monkeypatch.setattr(Draws, "_generator", generator)
    run(script, tmp_path, *more.replace("FILE", data_file(tmp_path)).split())
    assert drawn and not twice, sorted({at[3] for at in twice})


# ---- what a flag is to reach ---------------------------------------------------------------------


def watch_networks(monkeypatch):
    """-> a list, to which every run adds the networks that it trains."""
    kept, real = [], Run.start

    def start(run, **state):
        others = "head", "ema"
        kept.extend(
            v for k, v in state.items() if isinstance(v, torch.nn.Module) and k not in others
        )
        return real(run, **state)

    monkeypatch.setattr(Run, "start", start)
    return kept


@each
def test_networks_train_under_autocast_and_keep_their_outputs_only(monkeypatch, tmp_path, script):
    """With --mixed_precision bf16 every call that has a graph, and with --gradient_checkpointing
    no trained network keeps its activations."""
    nets, under = watch_networks(monkeypatch), {True: set(), False: set()}
    flags = "--mixed_precision bf16 --gradient_checkpointing --max_train_steps 2"
    training, real = [], Run.micro_batches

    def micro_batches(run, *args):
        training.append(True)
        yield from real(run, *args)
        training.pop()

    def on_call(module, args):
        if training and hasattr(module, "cond_names") and torch.is_grad_enabled():
            under[torch.is_autocast_enabled("cpu")].add(type(module).__name__)

    monkeypatch.setattr(Run, "micro_batches", micro_batches)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(on_call)
    try:
        run(script, tmp_path, *flags.split())
    finally:
        hook.remove()
    assert under[True] and not under[False]
    trained = [net for net in nets if hasattr(net, "gradient_checkpointing")]
    assert all(net.gradient_checkpointing for net in trained)
    assert trained or script in ("mdt_dist", "latent_fm", "phased_dmd")


@each
def test_a_long_run_has_seven_times_the_updates(script):
    parse = importlib.import_module(script).parse_args
    usual, long = (parse(flags).max_train_steps for flags in ([], ["--preset", "long"]))
    assert long == 7 * usual
    assert parse(["--preset", "long", "--max_train_steps", "5"]).max_train_steps == 5


@pytest.mark.parametrize("renoise", ["sde", "ode"])
@pytest.mark.parametrize("script", ["dmd", "decoupled_dmd"])
def test_renoise_reaches_training_and_samples(monkeypatch, tmp_path, script, renoise):
    """The student's input is made as its samples are, in the run and after it."""
    module, seen = importlib.import_module(script), []
    real = module.rollout

    def rollout(student, diffusion, noise, times, cond, how, k=None):
        seen.append((how, k is None))
        return real(student, diffusion, noise, times, cond, how, k)

    monkeypatch.setattr(module, "rollout", rollout)
    run(script, tmp_path, "--renoise", renoise)
    assert (renoise, False) in seen  # in training; samples are not drawn here
    seen.clear()
    where = ["--sample", str(tmp_path / "run" / "student"), "--output_dir", str(tmp_path / "again")]
    monkeypatch.setattr(report, "write_samples", lambda run, t, sampler, n: draw_two(t, sampler))
    module.main([*where, "--preview_samples", "2"])
    assert seen and {how for how, _ in seen} == {renoise}


def draw_two(teacher, sampler):
    index = teacher.conditions.preview(2)
    assert torch.isfinite(sampler(index, 0, 2)).all()


def test_only_the_first_step_of_real_input_starts_from_noise():
    """The other steps of --student_input real start from noised data, at their own times."""
    args = dmd.parse_args("--student_input real --student_steps 2 --data glyphs".split())
    draw, flow = Draws(1, 0, "student", range(8), shape=(3,)), Diffusion(Flow(), "flow_v")
    data = torch.full((8, 3), 5.0)
    conditions = types.SimpleNamespace(draw=lambda draw: ({"label": 0}, {"label": 1}))
    teacher = types.SimpleNamespace(
        conditions=conditions, diffusion=flow, real=lambda draw, name: (data, {"label": 2})
    )
    k, t, x_in, cond, _ = dmd.student_input(args, draw, None, teacher, [1.0, 0.5])
    z = draw.noise("z")
    assert sorted(set(k.tolist())) == [0, 1] and cond == {"label": 2}
    torch.testing.assert_close(x_in[k == 0], z[k == 0])
    torch.testing.assert_close(x_in[k == 1], 0.5 * data[k == 1] + 0.5 * z[k == 1])


def test_regression_is_onto_guided_samples_from_where_the_student_begins(monkeypatch, tmp_path):
    """DMD v1's pairs are the guided teacher's, and the student is asked at its own first time."""
    times, real = [], dmd.regression_loss

    def regression_loss(draw, pairs, student, teacher, t):
        times.append(t)
        kept.update(teacher=teacher)
        return real(draw, pairs, student, teacher, t)

    kept = {}
    monkeypatch.setattr(dmd, "regression_loss", regression_loss)
    more = "--student_times 0.9 --regression_weight 1 --regression_pairs 8 --guidance_scale 3"
    flags = flags_of("dmd", tmp_path, *more.split())
    at = flags.index("--student_steps")
    dmd.main([*flags[:at], *flags[at + 2 :], "--teacher_steps", "3"])
    assert set(times) == {0.9}
    pairs, teacher = load_file(tmp_path / "run" / "state" / "pairs.safetensors"), kept["teacher"]
    cond, uncond = teacher.conditions.pick(pairs["index"], "cpu")
    at = pairs["z"], teacher.grid(3), cond, uncond
    want = teacher.diffusion.sample(teacher.net, *at, 3.0, "heun")
    torch.testing.assert_close(pairs["y"], want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pairs["y"], teacher.diffusion.sample(teacher.net, *at, 1.0, "heun"))


def test_the_log_tells_the_gan_from_the_matching_term(tmp_path):
    """g_gan is what the GAN alone sends into x in a micro-batch: here next to nothing."""
    more = f"--gan_weight 1e-9 --data {data_file(tmp_path)} --gradient_accumulation_steps 2"
    run("dmd", tmp_path, *more.split(), "--max_train_steps", "3")
    last = read_log(tmp_path / "run")[-1]
    assert 0 < float(last["g_gan"]) < 1e-3 * float(last["g_dm"])


def test_the_fake_alone_sees_its_own_condition():
    """Of decoupled_dmd.py's variants, too: the student's step is no condition of the teacher."""
    flow, flags = Diffusion(Flow(), "x0"), "--no_ca --student_steps 2"
    terms = decoupled_dmd.Terms(decoupled_dmd.parse_args(flags.split()))
    x, t = torch.ones(2, 3), torch.full((2,), 0.5)
    at = torch.zeros(2, 3), t

    def fake(x_t, t, steps):
        return x_t * steps[:, None]

    nets = (lambda x_t, t: x_t), fake
    steps = {"steps": torch.tensor([2.0, 4.0])}
    _, g, *_ = decoupled_dmd.ablated_loss(x, *nets, flow, at, at, {}, {}, steps, 3.0, terms)
    torch.testing.assert_close(g, 0.5 * torch.tensor([[1.0], [3.0]]).expand(2, 3))


def test_a_student_that_is_saved_in_half_precision_is_measured_so():
    net = torch.nn.Linear(3, 3)
    args = types.SimpleNamespace(save_fp16=True)
    before = net.weight.clone()
    with torch.no_grad():
        after = latent_fm.as_saved(args, net).weight
    assert torch.equal(after, before.half().float()) and not torch.equal(after, before)


# ---- latent_fm.py's update, from the draws alone -------------------------------------------------

LATENT = {  # flags: what they mean for the loss
    "": {},
    "--logit_normal --timestep_shift 3": dict(normal=True, shift=3.0),
    "--label_dropout 0.7": dict(dropout=0.7),
    "--sigma_min 0.01 --label_dropout 0": dict(sigma_min=0.01, dropout=0.0),
    "--gradient_accumulation_steps 2": {},
}


@pytest.mark.parametrize("flags", LATENT, ids=lambda flags: flags or "default")
def test_the_gradient_of_latent_fm_is_that_of_the_draws(monkeypatch, tmp_path, flags):
    """On the ring, whose points are their own latents: items, labels, noise and times."""
    means, found, before = LATENT[flags], [], []
    dropout, s = means.get("dropout", 0.1), means.get("sigma_min", 0.0)

    def look(run, optimizers, what):
        found.extend(p.grad.clone() for g in optimizers[0].param_groups for p in g["params"])
        before.extend(g["params"] for g in optimizers[0].param_groups)

    watch_updates(monkeypatch, look)
    data, nets = {}, []
    monkeypatch.setattr(latent_fm, "build_optimizers", spy(latent_fm.build_optimizers, nets))
    monkeypatch.setattr(latent_fm, "training_batch", spy(latent_fm.training_batch, data))
    more = f"{flags} --max_train_steps 1 --max_grad_norm 1e9 --learning_rate 1e-30"
    run("latent_fm", tmp_path, *more.split())
    (net,), (items, labels) = nets, data["data"]
    n = 4 * (2 if "accumulation" in flags else 1)
    draw = Draws(1, 0, 0, range(n), shape=(2,))
    i = draw.integer("item", len(items))
    x0, eps = items[i], draw.noise("eps")
    u = torch.sigmoid(draw.normal("u", ())) if means.get("normal") else draw.uniform("u")
    k = means.get("shift", 1.0)
    t = (k * u / (1 + (k - 1) * u))[:, None]
    null = torch.full_like(labels[i], 4)
    label = torch.where(draw.uniform("coin") < dropout, null, labels[i])
    x_t = (1 - t) * x0 + (s + (1 - s) * t) * eps
    losses = (net(x_t, t[:, 0], label=label) - ((1 - s) * eps - x0)).square().mean(1)
    want = torch.autograd.grad(losses.mean(), before[0])
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def spy(real, kept):
    """The function, whose network (of build_optimizers) or data (of training_batch) is kept."""

    def wrapped(*args):
        if isinstance(kept, list):
            kept.append(args[1])
        else:
            kept["data"] = args[2].x, args[2].label
        return real(*args)

    return wrapped
