"""decoupled_dmd.py's loop: what reaches the student by term, level and switch, who is called, equality with dmd.py, refusals, VP teachers.

What its loop and runs share with dmd.py's is tested for both in test_dmd_math.py and test_runs.py.
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
    ring_network,
    ring_run,
    save_tiny_teacher,
    save_tiny_vp_teacher,
)
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import decoupled_dmd
import dmd
from models.diffusion import VP, predict_x0, shift, unshift
from models.draws import Draws
from models.files import load_json
from models.networks import load_network
from models.worlds import load_world
from models.worlds.ring import RingTeacher

N, SHIFT = 3, 3.0
BASE = ["--student_steps", str(N), "--timestep_shift", str(SHIFT), "--guidance_scale", "2.5"]


def k_of(seed, step=0, inner="student", steps=N):
    return Draws(seed, step, inner, [0]).agreed("k", steps)


def seed_for(k):
    """A seed whose first student update is at step k."""
    return next(seed for seed in range(99) if k_of(seed) == k)


def x0_of(net, x_t, t, **cond):
    return x_t - t[:, None] * net(x_t, t, **cond)


def written_out(
    nets,
    k,
    schedule="hybrid",
    normalizer="branch",
    alpha=2.5,
    dm=1,
    ca=1,
    dm_range=(0.02, 0.98),
    ca_range=(0.02, 0.98),
    told=True,
    renoise="sde",
    gan=0.0,
    mean_variance=0.0,
    target=None,
):
    """The student's first update once more, from the draws alone -> x, g_dm, g_ca as they are without switches, and the loss with them and of the rest."""
    draw, teacher = Draws(seed_for(k), 0, "student", range(8)), RingTeacher()
    label, null = {"label": draw.integer("cond", 4)}, {"label": torch.full((8,), 4)}
    steps = {"steps": torch.full((8,), float(k))} if told else {}
    grid = [torch.full((8,), shift(1 - i / N, SHIFT)) for i in range(N)]
    x_in = draw.normal("z", (2,))
    for i in range(k):
        x0 = x0_of(nets["student"], x_in, grid[i], **label).detach()
        eps = (
            draw.normal(f"renoise{i}", (2,))
            if renoise == "sde"
            else (x_in - (1 - grid[i][:, None]) * x0) / grid[i][:, None]
        )
        x_in = (1 - grid[i + 1][:, None]) * x0 + grid[i + 1][:, None] * eps
    x = x0_of(nets["student"], x_in, grid[k], **label)

    def noised(u, eps, lo, hi):
        t = shift(draw.spread(u, lo, hi), SHIFT)
        return ((1 - t[:, None]) * x + t[:, None] * draw.normal(eps, (2,))).detach(), t

    top = {
        "shared": (1, 1),
        "full": (1, 1),
        "constrained": (1 - k / N,) * 2,
        "hybrid": (1, 1 - k / N),
    }[schedule]
    at_dm = noised("u", "eps", dm_range[0], min(dm_range[1], top[0]))
    at_ca = (
        at_dm
        if schedule == "shared"
        else noised("u_ca", "eps_ca", ca_range[0], min(ca_range[1], top[1]))
    )
    with torch.no_grad():
        real, fake, real_null = (
            x0_of(teacher, *at_dm, **label),
            x0_of(nets["fake"], *at_dm, **label, **steps),
            x0_of(teacher, *at_dm, **null),
        )
        cond, uncond = (x0_of(teacher, *at_ca, **c) for c in (label, null))
        by = {
            "none": (x + 1, x + 1),
            "branch": (real, cond),
            "shared": (real_null + alpha * (real - real_null),) * 2,
        }[normalizer]
        g_dm = (fake - real) / (x - by[0]).abs().mean(1, keepdim=True)
        g_ca = (alpha - 1) * (uncond - cond) / (x - by[1]).abs().mean(1, keepdim=True)
    rest = x.sum() * 0
    if gan:
        t, eps = shift(draw.spread("u_gan"), SHIFT), draw.normal("eps_gan", (2,))
        features = nets["fake"](
            (1 - t[:, None]) * x + t[:, None] * eps, t, return_features=True, **label, **steps
        )
        rest = rest + gan * F.softplus(-nets["head"](features)).mean()
    if mean_variance:  # points have no inside: the batch is the image
        mean, variance = target
        rest = rest + mean_variance * kl_divergence(
            Normal(x.mean(), x.var(correction=0).sqrt()),
            Normal(torch.tensor(mean), torch.tensor(variance) ** 0.5),
        )
    return x, g_dm, g_ca, (dm * g_dm + ca * g_ca).mul(x).sum() / x.numel() + rest, rest


def ring_moments():
    """Of the ring's data, as the script measures them: mean and variance over all its values."""
    x = load_world("ring").data(2000, 776)[0]
    return float(x.mean()), float(((x - x.mean()) ** 2).mean())


WORLD, GIVEN = ring_moments(), (0.25, 0.5)
CASES = [  # flags, what that means for written_out, calls of the teacher and of the fake
    (["--schedule", "hybrid"], {}, 3, 1),
    (["--schedule", "full"], dict(schedule="full"), 3, 1),
    (["--schedule", "constrained"], dict(schedule="constrained"), 3, 1),
    (["--schedule", "shared"], dict(schedule="shared"), 2, 1),
    (["--normalizer", "none"], dict(normalizer="none"), 3, 1),
    (["--normalizer", "shared"], dict(normalizer="shared"), 4, 1),
    (
        ["--schedule", "shared", "--normalizer", "shared"],
        dict(schedule="shared", normalizer="shared"),
        2,
        1,
    ),
    (
        ["--schedule", "shared", "--normalizer", "none"],
        dict(schedule="shared", normalizer="none"),
        2,
        1,
    ),
    (
        ["--schedule", "shared", "--dm_range", "0.3", "0.6"],
        dict(schedule="shared", dm_range=(0.3, 0.6)),
        2,
        1,
    ),
    (
        ["--dm_range", "0.3", "0.9", "--ca_range", "0.1", "0.5"],
        dict(dm_range=(0.3, 0.9), ca_range=(0.1, 0.5)),
        3,
        1,
    ),
    (["--no_ca"], dict(ca=0), 1, 1),
    (["--no_ca", "--normalizer", "shared"], dict(ca=0, normalizer="shared"), 2, 1),
    (
        ["--no_ca", "--schedule", "shared", "--normalizer", "shared"],
        dict(ca=0, schedule="shared", normalizer="shared"),
        2,
        1,
    ),
    (["--guidance_scale", "1"], dict(alpha=1), 1, 1),
    (["--guidance_scale", "1", "--normalizer", "shared"], dict(alpha=1, normalizer="shared"), 1, 1),
    (["--no_dm"], dict(dm=0), 2, 0),
    (["--no_dm", "--normalizer", "shared"], dict(dm=0, normalizer="shared"), 4, 0),
    (
        ["--no_dm", "--schedule", "shared", "--normalizer", "shared"],
        dict(dm=0, schedule="shared", normalizer="shared"),
        2,
        0,
    ),
    (["--no_dm", "--schedule", "shared"], dict(dm=0, schedule="shared"), 2, 0),
    (["--no_dm", "--observer"], dict(dm=0), 3, 1),
    (["--shared_fake"], dict(told=False), 3, 1),
    (["--renoise", "ode"], dict(renoise="ode"), 3, 1),
    (["--gan_weight", "0.3"], dict(gan=0.3), 3, 2),
    (["--no_dm", "--no_ca", "--gan_weight", "0.3"], dict(dm=0, ca=0, gan=0.3), 0, 1),
    (["--mean_variance_weight", "0.7"], dict(mean_variance=0.7, target=WORLD), 3, 1),
    (
        ["--no_dm", "--mean_variance_weight", "0.7", "--mean_variance_target", *map(str, GIVEN)],
        dict(dm=0, mean_variance=0.7, target=GIVEN),
        2,
        0,
    ),
]


@pytest.mark.parametrize(
    "flags, means, real_calls, fake_calls", CASES, ids=[" ".join(case[0]) for case in CASES]
)
def test_student_gradient_by_term(monkeypatch, tmp_path, flags, means, real_calls, fake_calls):
    """g_dm + g_ca, each at its own level and with its own noise, and the regularisers reach the student's weights, at every step k; with the fewest
    calls of teacher and fake; the unconditional label only at CA's level (or in DMD's normaliser). log.csv has the norms of the terms."""
    for k in range(N) if flags[0] == "--schedule" else [2]:
        folder = tmp_path / str(k)
        with monkeypatch.context() as m:
            diary = one_step(
                m,
                decoupled_dmd,
                folder,
                *BASE,
                "--normalizer",
                "branch",
                "--seed",
                str(seed_for(k)),
                *flags,
            )
        nets, grads = diary.at["student"]
        x, g_dm, g_ca, loss, rest = written_out(nets, k, **means)
        want = torch.autograd.grad(loss, list(nets["student"].parameters()), retain_graph=True)
        for a, b in zip(grads["student"], want):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        calls = diary.turns[-2]
        real, fake = ([c for c in calls if c.who == who] for who in ("teacher", "fake"))
        assert (
            len(real),
            len(fake),
            len([c for c in calls if c.who == "student" and c.x_t.any()]) - k,
        ) == (real_calls, fake_calls, 1)
        assert (diary.updates[0][0] == "fake-score") == (fake_calls > 0)
        ca_on, at_one_level = (
            means.get("ca", 1) and means.get("alpha") != 1,
            means.get("schedule") == "shared",
        )
        nulls = ca_on + (
            means.get("normalizer") == "shared"
            and means.get("alpha") != 1
            and not (ca_on and at_one_level)
        )
        assert sum((c.label == 4).all().item() for c in real) == nulls
        assert not any((c.label == 4).any() for c in calls if c.who != "teacher")
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
        assert {name: row[name] for name in columns} == pytest.approx(
            {name: float(torch.as_tensor(v).detach()) for name, v in columns.items()},
            rel=1e-4,
            abs=2e-6,
        )
        for name, weight in (
            ("loss_gan", means.get("gan")),
            ("loss_mean_variance", means.get("mean_variance")),
        ):
            assert row[name] == pytest.approx(
                float(rest.detach()) / weight if weight else 0.0, rel=1e-4
            )


@pytest.mark.parametrize("alpha, gan", [("2.5", "0"), ("1", "0.3")])
def test_one_level_and_one_normalizer_is_dmd(monkeypatch, tmp_path, alpha, gan):
    """--schedule shared --normalizer shared is dmd.py with a guided teacher: the same first gradient, and the same weights after three updates."""
    flags = [*BASE, "--guidance_scale", alpha, "--gan_weight", gan]
    first, after = [], []
    for script, more in (
        (dmd, []),
        (decoupled_dmd, ["--schedule", "shared", "--normalizer", "shared"]),
    ):
        with monkeypatch.context() as m:
            first.append(
                one_step(m, script, tmp_path / f"{script.__name__}1", *flags, *more).at["student"][
                    1
                ]["student"]
            )
        with monkeypatch.context() as m:
            diary = ring_run(m, script, tmp_path / f"{script.__name__}3", *flags, *more)
        after.append([*diary.student.parameters(), *diary.fake.parameters()])
    for a, b in zip(*first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    for a, b in zip(*after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(after[0], ring_network(0).parameters()))


@pytest.mark.parametrize(
    "schedule, shared_fake",
    [
        ("shared", False),
        ("full", False),
        ("constrained", False),
        ("hybrid", False),
        ("hybrid", True),
    ],
)
def test_levels_and_what_the_fake_is_told(monkeypatch, tmp_path, schedule, shared_fake):
    """In the loop, with the GAN: levels of the bounded terms stay below the student's input, u <= u_k before the shift, and fill their range; the fake
    itself is trained at all levels; in each of its calls, the discriminator's too, it is told k, or with --shared_fake nothing; nobody else is."""
    diary, fake_times = Diary(monkeypatch, decoupled_dmd), []

    def on_fake_loss(real, fake, schedule, kind, x, eps, t, cond):
        fake_times.append(unshift(t, SHIFT))
        return real(fake, schedule, kind, x, eps, t, cond)

    diary.wrap(monkeypatch, decoupled_dmd, "fake_score_loss", on_fake_loss)
    decoupled_dmd.main(
        [
            "--teacher",
            "ring",
            "--output_dir",
            str(tmp_path),
            "--max_train_steps",
            "12",
            "--train_batch_size",
            "16",
            "--fake_update_ratio",
            "1",
            "--gan_weight",
            "0.1",
            "--schedule",
            schedule,
            "--dm_range",
            "0.1",
            "0.9",
            *BASE,
            *(["--shared_fake"] if shared_fake else []),
        ]
    )
    fill = {"dm": [], "ca": []}
    for i, calls in enumerate(diary.turns[:-1]):
        k = k_of(0, i // 2, "student" if i % 2 else 0)
        for c in calls:
            assert c.steps is None if c.who != "fake" or shared_fake else (c.steps == k).all()
        assert len([c for c in calls if c.who == "fake"]) == (2 if i % 2 else 3)
        real = [c for c in calls if c.who == "teacher"]
        assert not real or i % 2
        for term, call, lo, hi, bounded in (
            ("dm", 0, 0.1, 0.9, schedule == "constrained"),
            ("ca", -1, 0.02, 0.98, schedule in ("constrained", "hybrid")),
        ):
            if not real:
                continue
            lo, hi = (
                (0.1, 0.9) if schedule == "shared" else (lo, min(hi, 1 - k / N) if bounded else hi)
            )
            u = unshift(real[call].t, SHIFT)
            assert lo - 1e-5 < u.min() and u.max() < hi + 1e-5
            fill[term] += [(u.min() - lo) / (hi - lo), (hi - u.max()) / (hi - lo)]
    assert (
        max(fill["dm"] + fill["ca"]) < 0.2
    )  # 16 levels spread evenly leave no wide gap at either end
    u = torch.cat(fake_times)
    assert {k_of(0, step) for step in range(12)} == {0, 1, 2} and u.min() < 0.05 and u.max() > 0.95


# ---- who needs the fake ----------------------------------------------------------------------------------------------


def test_first_update_is_pure_ca(monkeypatch, tmp_path):
    """As long as the fake is the teacher, told the step or not, DM has nothing to say: what is left is CA."""
    flags = [
        "--teacher",
        save_tiny_teacher(tmp_path / "teacher"),
        "--max_train_steps",
        "1",
        "--train_batch_size",
        "4",
        "--learning_rate_fake",
        "1e-20",
        "--gradient_accumulation_steps",
        "2",
    ]
    Diary(monkeypatch, decoupled_dmd)
    for schedule in ("shared", "hybrid"):
        decoupled_dmd.main(
            [*flags, "--schedule", schedule, "--output_dir", str(tmp_path / schedule)]
        )
        (row,) = read_log(tmp_path / schedule)
        assert float(row["g_dm"]) < 1e-5 < 1e-3 < float(row["g_ca"]) and float(row["g_rest"]) < 1e-6


def test_observer_looks_on(monkeypatch, tmp_path):
    """CA alone: no update and no call of the fake, which stays the teacher. An observing fake is trained and DM's gradient logged, and the student
    is the same to the bit."""
    with monkeypatch.context() as m:
        alone = ring_run(
            m,
            decoupled_dmd,
            tmp_path / "alone",
            "--no_dm",
            "--shared_fake",
            "--fake_update_ratio",
            "2",
        )
    with monkeypatch.context() as m:
        seen = ring_run(
            m,
            decoupled_dmd,
            tmp_path / "seen",
            "--no_dm",
            "--shared_fake",
            "--fake_update_ratio",
            "2",
            "--observer",
        )
    assert alone.updates == [("student", "student")] * 3 and not any(
        c.who == "fake" for calls in alone.turns for c in calls
    )
    assert seen.updates == ([("fake-score", "fake")] * 2 + [("student", "student")]) * 3
    assert_bit_equal(dict(alone.fake.state_dict()), dict(ring_network(0).state_dict()))
    assert not any(
        torch.equal(a, b)
        for a, b in zip(seen.fake.hidden.parameters(), alone.fake.hidden.parameters())
    )
    assert_bit_equal(dict(alone.student.state_dict()), dict(seen.student.state_dict()))
    for a, b in zip(read_log(tmp_path / "alone"), read_log(tmp_path / "seen"), strict=True):
        assert [float(a[name]) for name in ("g_dm", "cos_dm_ca", "loss_fake", "norm_fake")] == [
            0.0
        ] * 4
        assert all(float(b[name]) for name in ("g_dm", "cos_dm_ca", "loss_fake", "norm_fake"))
        assert a["g_ca"] == b["g_ca"] and a["loss_dm_ca"] == b["loss_dm_ca"]


def test_targets_measured_on_a_world():
    """Eq. 7's targets are averages over images of each image's own mean and variance; points have no inside, so all of them are one image."""
    x = (
        3
        * torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        ** torch.linspace(0.1, 2, 50)[:, None, None, None]
    )
    mean, variance = decoupled_dmd.world_moments(
        types.SimpleNamespace(data=lambda n, seed: (x, None))
    )
    assert mean == pytest.approx(float(x.mean()), rel=1e-5)
    assert variance == pytest.approx(
        float(x.flatten(1).square().mean(1).sub(x.flatten(1).mean(1).square()).mean()), rel=1e-4
    )
    assert decoupled_dmd.world_moments(load_world("ring")) == pytest.approx(WORLD, rel=1e-5)


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher, flags, says",
    [
        (
            "ring",
            "--schedule shared --ca_range 0.1 0.5",
            "--ca_range: --schedule shared draws one level for both terms",
        ),
        ("ring", "--ca_range 0.5 0.5", "--ca_range: LO must be below HI"),
        ("ring", "--dm_range 0.5 0.1", "--dm_range: LO must be below HI"),
        ("ring", "--ca_range 0.1 1.2", "--ca_range"),
        ("ring", "--mean_variance_target 0 0", "--mean_variance_target: VAR must be > 0"),
        (
            "ring",
            "--ca_range 0.25 0.9",
            "--ca_range starts at 0.25, and --schedule hybrid keeps the last of 4 steps below 0.25",
        ),
        (
            "ring",
            "--ca_range 0.3 0.9 --schedule constrained --student_steps 5",
            "keeps the last of 5 steps below 0.2",
        ),
        (
            "ring",
            "--dm_range 0.3 0.9 --schedule constrained",
            "--dm_range starts at 0.3, and --schedule constrained",
        ),
        (
            "ring",
            "--dm_range 0.3 0.9 --schedule constrained --no_dm --observer",
            "--dm_range starts at 0.3, and --schedule constrained",
        ),
        ("ring", "--no_dm --no_ca", "nothing is left to learn from"),
        ("ring", "--no_dm --guidance_scale 1", "nothing is left to learn from"),
        ("ring", "--no_dm --no_ca --mean_variance_weight 1", "nothing is left to learn from"),
        ("ring", "--observer", "give --no_dm with it"),
        ("ring", "--data ring", "--data is for the GAN: set --gan_weight"),
        ("FOLDER", "--gan_weight 0.1", "--gan_weight needs data"),
        (
            "FOLDER",
            "--mean_variance_weight 1",
            "--mean_variance_weight needs --mean_variance_target MEAN VARIANCE",
        ),
        ("ring", "--schedule both", "--schedule"),
        ("ring", "--normalizer mean", "--normalizer"),
        ("ring", "--mean_variance_weight -1", "must be >= 0"),
    ],
)
def test_refusals(monkeypatch, tmp_path, capsys, teacher, flags, says):
    """One clear line, exit code 2, before anything is written."""
    Diary(monkeypatch, decoupled_dmd)
    teacher = save_tiny_teacher(tmp_path / "teacher") if teacher == "FOLDER" else teacher
    assert says in refusal_of(
        capsys,
        decoupled_dmd.main,
        "--teacher",
        teacher,
        "--output_dir",
        str(tmp_path / "run"),
        *flags.split(),
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    [
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
        "--guidance_scale 0",
    ],
)
def test_flags_that_go_together(monkeypatch, tmp_path, flags):
    """What the refusals must let pass: finite gradients that move the student."""
    diary = ring_run(monkeypatch, decoupled_dmd, tmp_path, *flags.split(), steps=1)
    assert diary.norms[-1] > 1e-4


def test_ranges_by_schedule():
    """CA's own range is not DM's, except where one level is drawn for both."""
    parse = lambda *flags: decoupled_dmd.parse_args(["--dm_range", "0.2", "0.7", *flags])  # noqa: E731
    assert (
        parse().ca_range == [0.02, 0.98]
        and parse("--schedule", "shared").ca_range == [0.2, 0.7]
        and parse("--ca_range", "0", "1").ca_range == [0, 1]
    )


# ---- another kind of teacher -----------------------------------------------------------------------------------------


def test_vp_teacher_from_end_to_end(tmp_path, monkeypatch):
    """A teacher that predicts eps under VP: its schedule in the gradients, in student/sampler.json and in what --sample draws."""
    folder = save_tiny_vp_teacher(tmp_path / "vp")
    flags = [
        "--teacher",
        folder,
        "--output_dir",
        str(tmp_path / "run"),
        "--max_train_steps",
        "2",
        "--train_batch_size",
        "4",
        "--teacher_steps",
        "2",
        "--preview_samples",
        "3",
    ]
    seen, real = [], decoupled_dmd.decoupled_gradients

    def on_gradients(x, x0_real, x0_fake, *rest):
        seen.append((x.detach(), x0_real))
        return real(x, x0_real, x0_fake, *rest)

    monkeypatch.setattr(decoupled_dmd, "decoupled_gradients", on_gradients)
    decoupled_dmd.main(flags)
    schedule, net = VP("scaled_linear", 0.00085, 0.012), load_network(folder)[0]
    draw = Draws(0, 1, "student", range(4))
    t, eps = draw.spread("u", 0.02, 0.98), draw.normal("eps", (1, 4, 4))
    a, s = (v[:, None, None, None] for v in (schedule.alpha(t), schedule.sigma(t)))
    with torch.no_grad():
        x_t = a * seen[1][0] + s * eps
        torch.testing.assert_close(
            seen[1][1], (x_t - s * net(x_t, t, draw.integer("cond", 3))) / a, rtol=1e-4, atol=1e-4
        )
    sampler = load_json(str(tmp_path / "run" / "student" / "sampler.json"))
    assert {k: sampler[k] for k in ("method", "prediction", "times", "rule")} == {
        "method": "decoupled_dmd",
        "prediction": "eps",
        "times": [1.0, 0.75, 0.5, 0.25],
        "rule": "renoise",
    }
    assert (
        sampler["schedule"]["type"] == "vp"
        and sampler["schedule"]["beta_end"] == 0.012
        and sampler["guidance_scale"] == 1.0
    )
    decoupled_dmd.main(
        [
            "--sample",
            str(tmp_path / "run"),
            "--output_dir",
            str(tmp_path / "samples"),
            "--preview_samples",
            "3",
            "--train_batch_size",
            "2",
        ]
    )
    again = load_file(tmp_path / "samples" / "samples.safetensors")["x0"]
    torch.testing.assert_close(
        load_file(tmp_path / "run" / "samples.safetensors")["x0"], again, rtol=1e-4, atol=1e-4
    )
    student, draw = (
        load_network(str(tmp_path / "run" / "student"))[0],
        Draws(0, "evaluation", 0, range(3)),
    )
    label, x_t = torch.arange(3), draw.normal("z", (1, 4, 4))
    with torch.no_grad():
        for i, t in enumerate((1.0, 0.75, 0.5, 0.25)):
            x0 = predict_x0(student, schedule, "eps", x_t, torch.full((3,), t), label=label)
            t_next = torch.full((1,), 0.75 - i / 4)
            x_t = schedule.alpha(t_next) * x0 + schedule.sigma(t_next) * draw.normal(
                f"renoise{i}", (1, 4, 4)
            )
    torch.testing.assert_close(again, x0, rtol=1e-4, atol=1e-4)
