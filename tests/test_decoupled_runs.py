"""decoupled_dmd.py's loop: what reaches the student by term, level and switch, and who is called.

Also its equality with dmd.py, its refusals, and VP teachers. What its loop and runs share with
dmd.py's is tested for both in test_dmd_math.py and test_runs.py.
"""

import types

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Diary,
    assert_bit_equal,
    one_step,
    read_log,
    refusal_of,
    ring_flags,
    ring_network,
    ring_run,
    save_tiny_teacher,
    save_tiny_vp_teacher,
)
from PIL import Image
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import decoupled_dmd
import dmd
from models.diffusion import VP, Diffusion, Flow, predict_x0, shift, unshift
from models.draws import Draws
from models.files import load_json
from models.networks import load_network
from models.plumbing import report, teachers
from models.worlds import load_world
from models.worlds.ring import RingTeacher

N, SHIFT = 3, 3.0
# --one_step: one step k for the whole batch, which the draws tell; see also test_levels_of_each_row
BASE = f"--student_steps {N} --timestep_shift {SHIFT} --guidance_scale 2.5 --one_step"


def k_of(seed, step=0, inner="student", steps=N):
    return Draws(seed, step, inner, [0]).agreed("k", steps)


def seed_for(k):
    """A seed whose first student update is at step k."""
    return next(seed for seed in range(99) if k_of(seed) == k)


def x0_of(net, x_t, t, **cond):
    return x_t - t[:, None] * net(x_t, t, **cond)


def written_out(nets, k, **means):
    """The student's first update once more, from the draws alone. means: what the flags mean.

    -> x; g_dm, g_ca as they are without switches; the loss with them; that of the other terms.
    """
    flags = dict(schedule="hybrid", normalizer="branch", alpha=2.5, dm=1, ca=1, renoise="sde")
    flags |= dict(dm_range=(0.0, 1.0), ca_range=(0.0, 1.0), see_step=True)
    flags |= dict(gan=0.0, mean_variance=0.0, target=None)
    a = types.SimpleNamespace(**{**flags, **means})
    draw, teacher = Draws(seed_for(k), 0, "student", range(8)), RingTeacher()
    label, null = {"label": draw.integer("cond", 4)}, {"label": torch.full((8,), 4)}
    steps = {"steps": torch.full((8,), float(k))} if a.see_step else {}
    grid = [torch.full((8,), shift(1 - i / N, SHIFT)) for i in range(N)]
    x_in = draw.normal("z", (2,))
    for i in range(k):
        t, t_next = grid[i][:, None], grid[i + 1][:, None]
        x0 = x0_of(nets["student"], x_in, grid[i], **label).detach()
        eps = (x_in - (1 - t) * x0) / t
        if a.renoise == "sde":
            eps = draw.normal(f"renoise{i}", (2,))
        x_in = (1 - t_next) * x0 + t_next * eps
    x = x0_of(nets["student"], x_in, grid[k], **label)

    def noised(u, eps, lo, hi):
        t = shift(draw.spread(u, lo, hi), SHIFT)
        return ((1 - t[:, None]) * x + t[:, None] * draw.normal(eps, (2,))).detach(), t

    u_k = 1 - k / N
    tops = {"shared": (1, 1), "full": (1, 1), "constrained": (u_k, u_k), "hybrid": (1, u_k)}
    top_dm, top_ca = tops[a.schedule]
    at_dm = at_ca = noised("u", "eps", a.dm_range[0], min(a.dm_range[1], top_dm))
    if a.schedule != "shared":
        at_ca = noised("u_ca", "eps_ca", a.ca_range[0], min(a.ca_range[1], top_ca))
    with torch.no_grad():
        real, real_null = (x0_of(teacher, *at_dm, **c) for c in (label, null))
        fake = x0_of(nets["fake"], *at_dm, **label, **steps)
        cond, uncond = (x0_of(teacher, *at_ca, **c) for c in (label, null))
        guided = real_null + a.alpha * (real - real_null)
        by = {"none": (x + 1, x + 1), "branch": (real, cond), "shared": (guided, guided)}
        by_dm, by_ca = by[a.normalizer]
        g_dm = (fake - real) / (x - by_dm).abs().mean(1, keepdim=True)
        g_ca = (a.alpha - 1) * (uncond - cond) / (x - by_ca).abs().mean(1, keepdim=True)
    rest = x.sum() * 0
    if a.gan:
        t, eps = shift(draw.spread("u_gan"), SHIFT), draw.normal("eps_gan", (2,))
        x_t = (1 - t[:, None]) * x + t[:, None] * eps
        features = nets["fake"](x_t, t, return_features=True, **label, **steps)
        rest = rest + a.gan * F.softplus(-nets["head"](features)).mean()
    if a.mean_variance:  # points have no inside: the batch is the image
        mean, variance = (torch.tensor(v) for v in a.target)
        of_batch = Normal(x.mean(), x.var(correction=0).sqrt())
        rest = rest + a.mean_variance * kl_divergence(of_batch, Normal(mean, variance**0.5))
    loss = (a.dm * g_dm + a.ca * g_ca).mul(x).sum() / x.numel() + rest
    return x, g_dm, g_ca, loss, rest


def ring_moments():
    """Of the ring's data, as the script measures them: mean and variance over all its values."""
    x = load_world("ring").data(2000, 776)[0]
    return float(x.mean()), float(((x - x.mean()) ** 2).mean())


WORLD, GIVEN = ring_moments(), (0.25, 0.5)
# fmt: off
CASES = [  # flags, what they mean for written_out, calls of the teacher and of the fake
    ("--schedule hybrid", {}, 3, 1),
    ("--schedule full", dict(schedule="full"), 3, 1),
    ("--schedule constrained", dict(schedule="constrained"), 3, 1),
    ("--schedule shared", dict(schedule="shared"), 2, 1),
    ("--normalizer none", dict(normalizer="none"), 3, 1),
    ("--normalizer shared", dict(normalizer="shared"), 4, 1),
    ("--schedule shared --normalizer shared", dict(schedule="shared", normalizer="shared"), 2, 1),
    ("--schedule shared --normalizer none", dict(schedule="shared", normalizer="none"), 2, 1),
    ("--schedule shared --dm_range 0.3 0.6", dict(schedule="shared", dm_range=(0.3, 0.6)), 2, 1),
    ("--dm_range 0.3 0.9 --ca_range 0.1 0.5",
     dict(dm_range=(0.3, 0.9), ca_range=(0.1, 0.5)), 3, 1),
    ("--no_ca", dict(ca=0), 1, 1),
    ("--no_ca --normalizer shared", dict(ca=0, normalizer="shared"), 2, 1),
    ("--no_ca --schedule shared --normalizer shared",
     dict(ca=0, schedule="shared", normalizer="shared"), 2, 1),
    ("--guidance_scale 1", dict(alpha=1), 1, 1),
    ("--guidance_scale 1 --normalizer shared", dict(alpha=1, normalizer="shared"), 1, 1),
    ("--ca_weight 0.3", dict(alpha=1.45), 3, 1),
    ("--no_dm", dict(dm=0), 2, 0),
    ("--no_dm --normalizer shared", dict(dm=0, normalizer="shared"), 4, 0),
    ("--no_dm --schedule shared --normalizer shared",
     dict(dm=0, schedule="shared", normalizer="shared"), 2, 0),
    ("--no_dm --schedule shared", dict(dm=0, schedule="shared"), 2, 0),
    ("--no_dm --observer", dict(dm=0), 3, 1),
    ("--shared_fake", dict(see_step=False), 3, 1),
    ("--renoise ode", dict(renoise="ode"), 3, 1),
    ("--gan_weight 0.3", dict(gan=0.3), 3, 2),
    ("--no_dm --no_ca --gan_weight 0.3", dict(dm=0, ca=0, gan=0.3), 0, 1),
    ("--mean_variance_weight 0.7", dict(mean_variance=0.7, target=WORLD), 3, 1),
    ("--no_dm --mean_variance_weight 0.7 --mean_variance_target 0.25 0.5",
     dict(dm=0, mean_variance=0.7, target=GIVEN), 2, 0),
]
# fmt: on


@pytest.mark.parametrize("flags, means, real_calls, fake_calls", CASES, ids=[c[0] for c in CASES])
def test_student_gradient_by_term(monkeypatch, tmp_path, flags, means, real_calls, fake_calls):
    """g_dm + g_ca, each at its own level and with its own noise, reach the student's weights.

    So do the regularisers, at every step k, with the fewest calls of teacher and fake. The
    unconditional label occurs at CA's level alone, or in DMD's normaliser. log.csv has the norms of
    the terms, and no column of a term that is off.
    """
    for k in range(N) if flags.startswith("--schedule") else [2]:
        folder, seed = tmp_path / str(k), ["--seed", str(seed_for(k))]
        with monkeypatch.context() as m:
            given = [*BASE.split(), "--normalizer", "branch", *seed, *flags.split()]
            diary = one_step(m, decoupled_dmd, folder, *given)
        nets, grads = diary.at["student"]
        x, g_dm, g_ca, loss, rest = written_out(nets, k, **means)
        want = torch.autograd.grad(loss, list(nets["student"].parameters()), retain_graph=True)
        for a, b in zip(grads["student"], want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        calls = diary.turns[0]
        of = {who: [c for c in calls if c.who == who] for who in ("teacher", "fake", "student")}
        assert (len(of["teacher"]), len(of["fake"])) == (real_calls, fake_calls)
        assert len(of["student"]) == k + 1
        assert diary.updates == ["student"] + (["fake"] if fake_calls else [])
        guided = means.get("alpha") != 1
        ca_on, one_level = means.get("ca", 1) and guided, means.get("schedule") == "shared"
        by_guided = means.get("normalizer") == "shared" and guided
        nulls = ca_on + (by_guided and not (ca_on and one_level))
        assert sum((c.label == 4).all().item() for c in of["teacher"]) == nulls
        assert not any((c.label == 4).any() for c in [*of["fake"], *of["student"]])
        (row,) = [{name: float(v) for name, v in row.items()} for row in read_log(folder)]
        see_dm = means.get("dm", 1) or "--observer" in flags
        g = means.get("dm", 1) * g_dm + means.get("ca", 1) * g_ca
        columns = {
            "g_dm": see_dm * g_dm.norm() / 16,
            "g_ca": ca_on * g_ca.norm() / 16,
            "g_rest": torch.autograd.grad(rest, x)[0].norm(),
            "mean": x.mean(),
            "std": x.std(correction=0),
            "loss_dm_ca": 0.5 * g.square().mean(),
            "cos_dm_ca": see_dm * ca_on * F.cosine_similarity(g_dm, g_ca).mean(),
            "norm_student": torch.stack([v.norm() for v in want]).norm(),
        }
        columns = {name: float(torch.as_tensor(v).detach()) for name, v in columns.items()}
        got = {name: row[name] for name in columns}
        assert got == pytest.approx(columns, rel=1e-4, abs=2e-6)
        for name, term in (("loss_gan", "gan"), ("loss_mean_variance", "mean_variance")):
            if term in means:
                assert row[name] == pytest.approx(float(rest.detach()) / means[term], rel=1e-4)
            else:
                assert name not in row
        assert ("loss_d" in row) == ("gan" in means)
        assert ("loss_fake" in row) == ("norm_fake" in row) == (fake_calls > 0)


@pytest.mark.parametrize("alpha, gan", [("2.5", "0"), ("1", "0.3")])
def test_one_level_and_one_normalizer_is_dmd(monkeypatch, tmp_path, alpha, gan):
    """--schedule shared --normalizer shared is dmd.py with a guided teacher, over all levels.

    The first gradient is the same, and so are the weights after three updates.
    """
    flags = f"{BASE} --guidance_scale {alpha} --gan_weight {gan} --dm_range 0 1".split()
    first, after = [], []
    for script, more in ((dmd, ""), (decoupled_dmd, "--schedule shared --normalizer shared")):
        folder, given = tmp_path / script.__name__, [*flags, *more.split()]
        with monkeypatch.context() as m:
            _, grads = one_step(m, script, folder / "1", *given).at["student"]
            first.append(grads["student"])
        with monkeypatch.context() as m:
            diary = ring_run(m, script, folder / "3", *given)
        after.append([*diary.student.parameters(), *diary.fake.parameters()])
    for a, b in zip(*first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    for a, b in zip(*after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(after[0], ring_network(0).parameters()))


LEVELS = [("shared", False), ("full", False), ("constrained", False), ("hybrid", False)]
LEVELS += [("hybrid", True)]


@pytest.mark.parametrize("schedule, shared_fake", LEVELS)
def test_levels_and_what_the_fake_is_conditioned_on(monkeypatch, tmp_path, schedule, shared_fake):
    """In the loop, with the GAN: levels of the bounded terms stay below the student's input.

    They keep to u <= u_k before the shift and fill their range. The fake itself is trained at all
    levels. In each of its calls, the discriminator's too, it is conditioned on k, or with
    --shared_fake on nothing; nobody else is.
    """
    diary, fake_times = Diary(monkeypatch, decoupled_dmd), []

    def on_fake_loss(real, fake, diffusion, x, eps, t, cond):
        fake_times.append(unshift(t, SHIFT))
        return real(fake, diffusion, x, eps, t, cond)

    diary.wrap(monkeypatch, decoupled_dmd, "fake_score_loss", on_fake_loss)
    flags = f"{BASE} --fake_update_ratio 1 --gan_weight 0.1 --schedule {schedule}"
    flags += " --dm_range 0.1 0.9" + (" --shared_fake" if shared_fake else "")
    decoupled_dmd.main(ring_flags(tmp_path, 12, 16, *flags.split()))
    ca_range = (0.1, 0.9) if schedule == "shared" else (0.0, 1.0)
    terms = (  # call of the teacher, range, whether u_k bounds it
        (0, (0.1, 0.9), schedule == "constrained"),
        (-1, ca_range, schedule in ("constrained", "hybrid")),
    )
    gaps = []
    for i, calls in enumerate(diary.turns[:-1]):
        of_student, k = i % 2 == 0, k_of(0, i // 2)  # the fake's turn has the student's samples
        for c in calls:
            if c.who == "fake" and not shared_fake:
                assert (c.steps == k).all()
            else:
                assert c.steps is None
        assert len([c for c in calls if c.who == "fake"]) == (2 if of_student else 3)
        real = [c for c in calls if c.who == "teacher"]
        assert bool(real) == of_student
        for call, (lo, hi), bounded in terms if real else ():
            hi = min(hi, 1 - k / N) if bounded else hi
            u = unshift(real[call].t, SHIFT)
            assert lo - 1e-5 < u.min() and u.max() < hi + 1e-5
            gaps += [(u.min() - lo) / (hi - lo), (hi - u.max()) / (hi - lo)]
    assert max(gaps) < 0.2  # 16 levels spread evenly leave no wide gap at either end
    u = torch.cat(fake_times)
    assert {k_of(0, step) for step in range(12)} == {0, 1, 2} and u.min() < 0.05 and u.max() > 0.95


@pytest.mark.parametrize("s", [3, 5, 6])
def test_default_levels_reach_the_clean_end(monkeypatch, tmp_path, s):
    """DM's u ~ U(0, 1) and CA's U(0, u_k), then the shift, as the authors: t from 0 on.

    A range that leaves out 2 % of u would begin at t = .058, .093, .109 with shift 3, 5, 6.
    """
    diary = Diary(monkeypatch, decoupled_dmd)
    flags = f"--student_steps {N} --timestep_shift {s} --guidance_scale 2.5 --fake_update_ratio 1"
    flags += " --one_step"
    decoupled_dmd.main(ring_flags(tmp_path, 6, 256, *flags.split()))
    reached = set()
    for step, calls in enumerate(diary.turns[:-1:2]):
        dm, ca = (c.t for c in [c for c in calls if c.who == "teacher"][:2])
        k = k_of(0, step)
        top = float(shift(1 - k / N, s))
        assert 0 <= dm.min() < s / 256 < 0.03 and 0.99 < dm.max() <= 1
        assert 0 <= ca.min() < s / 256 and 0.97 * top < ca.max() <= top + 1e-6
        reached.add(k)
    assert len(reached) > 1


@pytest.mark.parametrize("schedule", ["shared", "full", "constrained", "hybrid"])
def test_levels_of_each_row(schedule):
    """With a step of its own for every sample each row's bound is that of its own step."""
    args = decoupled_dmd.parse_args(f"--student_steps 4 --schedule {schedule}".split())
    k = torch.arange(400) % 4
    draw = Draws(0, 0, "student", range(400), shape=(2,), timestep_shift=SHIFT)
    at_dm, at_ca = decoupled_dmd.draw_levels(args, draw, k)
    assert (at_dm is at_ca) == (schedule == "shared")
    tops = {"shared": (0, 0), "full": (0, 0), "constrained": (1, 1), "hybrid": (0, 1)}[schedule]
    for (_, t), bounded in zip((at_dm, at_ca), tops, strict=True):
        u = unshift(t, SHIFT)
        for i in range(4):
            top = 1 - i / 4 if bounded else 1.0
            assert u[k == i].min() < 0.03 and 0.96 * top < u[k == i].max() <= top + 1e-6


# ---- who needs the fake --------------------------------------------------------------------------


def test_first_update_is_pure_ca(monkeypatch, tmp_path):
    """As long as the fake is the teacher, whatever the step, DM is 0 and what is left is CA."""
    teacher = save_tiny_teacher(tmp_path / "teacher")
    flags = f"""--teacher {teacher} --max_train_steps 1 --train_batch_size 4
        --gradient_accumulation_steps 2""".split()
    Diary(monkeypatch, decoupled_dmd)
    for schedule in ("shared", "hybrid"):
        folder = str(tmp_path / schedule)
        decoupled_dmd.main([*flags, "--schedule", schedule, "--output_dir", folder])
        (row,) = read_log(folder)
        assert float(row["g_dm"]) < 1e-5 < 1e-3 < float(row["g_ca"])
        assert float(row["g_rest"]) < 1e-6


def test_observer_looks_on(monkeypatch, tmp_path):
    """CA alone: no update and no call of the fake, which stays the teacher.

    An observing fake is trained and DM's gradient logged, and the student is the same to the bit.
    """
    flags, diaries = "--no_dm --shared_fake --fake_update_ratio 2".split(), []
    for name, more in (("alone", []), ("seen", ["--observer"])):
        with monkeypatch.context() as m:
            diaries.append(ring_run(m, decoupled_dmd, tmp_path / name, *flags, *more))
    alone, seen = diaries
    assert alone.updates == ["student"] * 3
    assert not any(c.who == "fake" for calls in alone.turns for c in calls)
    assert seen.updates == ["student", "fake", "fake"] * 3
    assert_bit_equal(dict(alone.fake.state_dict()), dict(ring_network(0).state_dict()))
    moved = zip(seen.fake.hidden.parameters(), alone.fake.hidden.parameters())
    assert not any(torch.equal(a, b) for a, b in moved)
    assert_bit_equal(dict(alone.student.state_dict()), dict(seen.student.state_dict()))
    for a, b in zip(read_log(tmp_path / "alone"), read_log(tmp_path / "seen"), strict=True):
        assert [float(a[name]) for name in ("g_dm", "cos_dm_ca")] == [0.0, 0.0]
        assert not {"loss_fake", "norm_fake"} & set(a)
        assert all(float(b[name]) for name in ("g_dm", "cos_dm_ca", "loss_fake", "norm_fake"))
        assert a["g_ca"] == b["g_ca"] and a["loss_dm_ca"] == b["loss_dm_ca"]


def test_targets_measured_on_a_world():
    """Eq. 7's targets are averages over images of each image's own mean and variance.

    Points have no inside, so all of them are one image.
    """
    generator = torch.Generator().manual_seed(0)
    power = torch.linspace(0.1, 2, 50)[:, None, None, None]
    x = 3 * torch.rand(50, 3, 4, 4, generator=generator) ** power
    args = decoupled_dmd.parse_args("--teacher ring --mean_variance_weight 1".split())
    world = types.SimpleNamespace(data=lambda n, seed: (x, None))
    mean, variance = decoupled_dmd.mean_variance_target(args, world)
    assert mean == pytest.approx(float(x.mean()), rel=1e-5)
    rows = x.flatten(1)
    of_each = rows.square().mean(1) - rows.mean(1).square()
    assert variance == pytest.approx(float(of_each.mean()), rel=1e-4)
    of_ring = decoupled_dmd.mean_variance_target(args, load_world("ring"))
    assert of_ring == pytest.approx(WORLD, rel=1e-5)


def test_targets_of_a_latent_teacher_are_of_latents():
    """On shapes pixels have mean -.49 and variance .22, latents 0 and 1."""
    args = decoupled_dmd.parse_args("--teacher ring --mean_variance_weight 1".split())
    world = load_world("shapes")
    mean, variance = decoupled_dmd.mean_variance_target(args, world, world.latent_shape)
    assert abs(mean) < 0.05 and abs(variance - 1) < 0.1
    mean, variance = decoupled_dmd.mean_variance_target(args, world, world.shape)
    assert abs(mean + 0.49) < 0.05 and variance < 0.3


# ---- ring.gif ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["", "--no_dm", "--student_steps 1"])
def test_ring_leaves_a_film(monkeypatch, tmp_path, flags):
    """A frame before the first update and one after each; a resumed run has as many."""
    monkeypatch.setattr(report, "finish", lambda *a, **k: None)
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    frames = []
    for name, parts in (("whole", [4]), ("resumed", [2, 4])):
        for steps in parts:
            given = ring_flags(tmp_path / name, steps, 8, *flags.split())
            resume = ["--resume_from_checkpoint", "latest"] if steps != parts[0] else []
            decoupled_dmd.main([*given, *resume])
        with Image.open(tmp_path / name / "ring.gif") as gif:
            frames.append(gif.n_frames)
    assert frames == [5, 5]


FILMS = {  # flags: whether CA and DM are drawn, whether they are in the sum, their names
    "": ((1, 1), (True, True), ("CA", "DM")),
    "--ca_weight 2": ((1, 1), (True, True), ("CA", "DM")),
    "--no_ca": ((0, 1), (False, True), ("CA (off)", "DM")),
    "--ca_weight 0": ((0, 1), (False, True), ("CA (off)", "DM")),
    "--no_dm": ((1, 0), (True, False), ("CA", "DM (off)")),
    "--no_dm --observer": ((1, 1), (True, False), ("CA", "DM (looks on)")),
}


@pytest.mark.parametrize("flags", FILMS)
def test_film_shows_minus_the_gradients(monkeypatch, flags):
    """Its arrows are half of -g_ca and -g_dm, of one level, of what is on; so is their sum.

    A fake that is conditioned on the step is asked about the last one whose CA reaches that level.
    """
    shown, diffusion = [], Diffusion(Flow(), "flow_v")
    monkeypatch.setattr(
        decoupled_dmd, "Film", lambda run, teacher, sampler, *a, terms: shown.append((*a, terms))
    )
    args = decoupled_dmd.parse_args(["--guidance_scale", "2.5", *flags.split()])
    alpha, terms = 1 + args.ca_weight * 1.5, decoupled_dmd.Terms(args)
    teacher, asked = types.SimpleNamespace(net=RingTeacher(), diffusion=diffusion), []

    def fake(x_t, t, label, steps=None):
        asked.append(steps)
        return torch.sin(3 * x_t)

    for times in (None, [1.0, 0.75, 0.5, 0.25]):
        decoupled_dmd.film_of_terms(None, teacher, None, fake, alpha, terms, times)
    draw = Draws(0, 0, "film", range(8), shape=(2,))
    x, eps, t = draw.noise("x"), draw.noise("eps"), torch.full((8,), 0.4)
    cond, null = {"label": torch.arange(8) % 4}, {"label": torch.full((8,), 4)}
    conds, x_t = (cond, null, cond), diffusion.add_noise(x, eps, t)
    at_t = (eps, t), (eps, t)
    _, g_dm, g_ca, *_ = decoupled_dmd.decoupled_dmd_loss(
        x, teacher.net, fake, diffusion, *at_t, *conds, alpha
    )
    drawn, summed, names = FILMS[flags]
    for ca, dm, *rest in shown:
        assert rest == [0.4, names, summed]
        torch.testing.assert_close(ca(x_t, t, cond, null), drawn[0] * -g_ca / 2)
        torch.testing.assert_close(dm(x_t, t, cond, null), drawn[1] * -g_dm / 2)
    assert len(asked) == 1 + 2 * drawn[1]
    assert not drawn[1] or asked[1] is None and (asked[2] == 2).all()


# ---- flags ---------------------------------------------------------------------------------------

# fmt: off
REFUSED = [
    ("ring", "--schedule shared --ca_range 0.1 0.5",
     "--ca_range: --schedule shared draws one level for both terms, from --dm_range"),
    ("ring", "--ca_range 0.5 0.5", "--ca_range: LO must be below HI, got 0.5 0.5"),
    ("ring", "--dm_range 0.5 0.1", "--dm_range: LO must be below HI, got 0.5 0.1"),
    ("ring", "--ca_range 0.1 1.2", "--ca_range"),
    ("ring", "--mean_variance_target 0 0", "--mean_variance_target: VAR must be > 0, got 0"),
    ("ring", "--ca_range 0.25 0.9",
     "--ca_range starts at 0.25, and --schedule hybrid keeps the last of 4 steps below 0.25"),
    ("ring", "--ca_range 0.3 0.9 --schedule constrained --student_steps 5",
     "keeps the last of 5 steps below 0.2: use --schedule full, or a range that starts lower"),
    ("ring", "--dm_range 0.3 0.9 --schedule constrained",
     "--dm_range starts at 0.3, and --schedule constrained"),
    ("ring", "--dm_range 0.3 0.9 --schedule constrained --no_dm --observer",
     "--dm_range starts at 0.3, and --schedule constrained"),
    ("ring", "--ca_weight -1", "must be >= 0"),
    ("ring", "--no_dm --no_ca", "nothing is left to learn from: leave out --no_dm or --no_ca"),
    ("ring", "--no_dm --guidance_scale 1", "give --guidance_scale above 1"),
    ("ring", "--no_dm --no_ca --mean_variance_weight 1", "nothing is left to learn from"),
    ("ring", "--no_dm --ca_weight 0", "nothing is left to learn from"),
    ("ring", "--observer", "give --no_dm with it, or leave it out"),
    ("ring", "--data ring", "--data is for the GAN: set --gan_weight, or leave --data out"),
    ("FOLDER", "--gan_weight 0.1", "--gan_weight needs data: give --data FOLDER"),
    ("FOLDER", "--mean_variance_weight 1",
     "--mean_variance_weight needs --mean_variance_target MEAN VAR"),
    ("ring", "--schedule both", "--schedule"),
    ("ring", "--normalizer mean", "--normalizer"),
    ("ring", "--mean_variance_weight -1", "must be >= 0"),
]
ACCEPTED = [
    "--ca_range 0.95 1 --schedule full",
    "--ca_range 0.95 1 --student_steps 1",
    "--ca_range 0.3 0.9 --no_ca",
    "--ca_range 0.3 0.9 --guidance_scale 1",
    "--dm_range 0.3 0.9",
    "--dm_range 0.3 0.9 --schedule constrained --no_dm",
    "--no_dm --no_ca --gan_weight 0.1 --mean_variance_weight 1",
    "--no_dm --guidance_scale 1 --gan_weight 0.1",
    "--no_dm --observer --gan_weight 0.1 --data ring",
    "--ca_range 0.24 0.9",
    "--ca_weight 0",
    "--guidance_scale 0",
    "--schedule shared --dm_range 0.3 0.9",
]
# fmt: on


@pytest.mark.parametrize("teacher, flags, says", REFUSED)
def test_refusals(monkeypatch, tmp_path, capsys, teacher, flags, says):
    """One clear line, exit code 2, before anything is written."""
    Diary(monkeypatch, decoupled_dmd)
    if teacher == "FOLDER":
        teacher = save_tiny_teacher(tmp_path / "teacher")
    given = f"--teacher {teacher} --output_dir {tmp_path}/run {flags}"
    assert says in refusal_of(capsys, decoupled_dmd.main, *given.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ACCEPTED)
def test_flags_that_go_together(monkeypatch, tmp_path, flags):
    """What the refusals must let pass: finite gradients that move the student."""
    diary = ring_run(monkeypatch, decoupled_dmd, tmp_path, *flags.split(), steps=1)
    assert diary.updates[0] == "student" and diary.norms[0] > 1e-4


def test_ranges_by_schedule():
    """CA's own range is not DM's, except where one level is drawn for both."""
    ranges = {"": [0, 1], "--schedule shared": [0.2, 0.7], "--ca_range 0.1 0.9": [0.1, 0.9]}
    for flags, ca_range in ranges.items():
        args = decoupled_dmd.parse_args(f"--dm_range 0.2 0.7 {flags}".split())
        assert args.ca_range == ca_range


# ---- another kind of teacher ---------------------------------------------------------------------


def test_vp_teacher_from_end_to_end(tmp_path, monkeypatch):
    """A teacher that predicts eps under VP: its schedule is in the gradients.

    It is in student/sampler.json and in what --sample draws, too.
    """
    folder, seen = save_tiny_vp_teacher(tmp_path / "vp"), []
    schedule, net = VP("scaled_linear", 0.00085, 0.012), load_network(folder)[0]

    def x0(network, x, u, eps, lo, hi, **cond):
        """As network sees x noised by this row's draws, in formulas of its own."""
        draw = Draws(0, len(seen), "student", range(4))
        t, eps = draw.spread(u, lo, hi), draw.normal(eps, (1, 4, 4))
        a, s = (v[:, None, None, None] for v in (schedule.alpha(t), schedule.sigma(t)))
        x_t = a * x + s * eps
        return (x_t - s * network(x_t, t, **cond)) / a

    real = decoupled_dmd.decoupled_dmd_loss

    def on_loss(x, teacher, fake, diffusion, at_dm, at_ca, cond, uncond, fake_cond, alpha):
        at_t = diffusion, at_dm, at_ca, cond, uncond, fake_cond, alpha
        loss, g_dm, g_ca, *scores = real(x, teacher, fake, *at_t)
        draw = Draws(0, len(seen), "student", range(4))
        k, label = draw.spread_integer("k", 4), draw.integer("cond", 3)
        null, u_k = torch.full((4,), 3), 1 - k / 4  # of every row
        with torch.no_grad():
            at_dm, at_ca = ("u", "eps", 0.0, 1.0), ("u_ca", "eps_ca", 0.0, u_k)
            steps = k.float()
            mu_fake = x0(fake, x, *at_dm, label=label, steps=steps)
            want = mu_fake - x0(net, x, *at_dm, label=label)
            torch.testing.assert_close(g_dm, want, rtol=1e-4, atol=1e-4)
            want = x0(net, x, *at_ca, label=null) - x0(net, x, *at_ca, label=label)
            torch.testing.assert_close(g_ca, 2 * want, rtol=1e-4, atol=1e-4)
        seen.append((g_dm, g_ca))
        return loss, g_dm, g_ca, *scores

    monkeypatch.setattr(decoupled_dmd, "decoupled_dmd_loss", on_loss)
    flags = f"""--teacher {folder} --output_dir {tmp_path}/run --max_train_steps 2
        --train_batch_size 4 --teacher_steps 2 --preview_samples 3"""
    decoupled_dmd.main(flags.split())
    assert len(seen) == 2 and all(g.abs().max() > 1e-3 for g in seen[1])
    sampler = load_json(str(tmp_path / "run" / "student" / "sampler.json"))
    want = dict(method="decoupled_dmd", prediction="eps", rule="renoise", guidance_scale=1.0)
    want["times"] = [1.0, 0.75, 0.5, 0.25]
    assert {k: sampler[k] for k in want} == want
    assert sampler["schedule"]["type"] == "vp" and sampler["schedule"]["beta_end"] == 0.012
    flags = f"""--sample {tmp_path}/run --output_dir {tmp_path}/samples --preview_samples 3
        --train_batch_size 2"""
    decoupled_dmd.main(flags.split())
    again = load_file(tmp_path / "samples" / "samples.safetensors")["x0"]
    shown = load_file(tmp_path / "run" / "samples.safetensors")["x0"]
    torch.testing.assert_close(shown, again, rtol=1e-4, atol=1e-4)
    student = load_network(str(tmp_path / "run" / "student"))[0]
    draw, label = Draws(0, "evaluation", 0, range(3)), torch.arange(3)
    x_t = draw.normal("z", (1, 4, 4))
    with torch.no_grad():
        for i, t in enumerate((1.0, 0.75, 0.5, 0.25)):
            x0 = predict_x0(student, schedule, "eps", x_t, torch.full((3,), t), label=label)
            t_next = torch.full((1,), 0.75 - i / 4)
            fresh = draw.normal(f"renoise{i}", (1, 4, 4))
            x_t = schedule.alpha(t_next) * x0 + schedule.sigma(t_next) * fresh
    torch.testing.assert_close(again, x0, rtol=1e-4, atol=1e-4)
