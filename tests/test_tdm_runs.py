"""tdm.py's loop: the gradients of fake and student from the draws alone, who is called where and told what, samples and report by step count, refusals.

What its runs share with the other scripts' is tested for all in test_dmd_math.py and test_runs.py.
"""

import types

import pytest
import torch
from helpers import (
    Diary,
    assert_bit_equal,
    one_step,
    perturbed,
    read_log,
    refusal_of,
    ring_network,
    ring_run,
    save_tiny_pixart,
    save_tiny_teacher,
    save_tiny_vp_teacher,
    save_tiny_wan,
)
from safetensors.torch import load_file

import tdm
from models.diffusion import VP, Flow, expand, shift, step_grid, unshift
from models.draws import Draws
from models.files import load_json
from models.networks import WEIGHTS, load_network, network_config, save_network
from models.plumbing import report, teachers
from models.plumbing.teachers import read_own_sampler, told_steps
from models.worlds.ring import RingTeacher

SHIFT = 3.0
BASE = ["--timestep_shift", str(SHIFT), "--guidance_scale", "2.5", "--loss", "pseudo_huber"]


def split(net, schedule, x_t, t, **cond):
    """x0 and eps of a network that predicts flow's velocity, or eps under VP."""
    a, s, out = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t), net(x_t, t, **cond)
    return (
        (x_t - s * out, x_t + a * out) if isinstance(schedule, Flow) else ((x_t - s * out) / a, out)
    )


def between(schedule, x, eps, s, t):
    """A sample at level s noised on to t."""
    a = schedule.alpha(t) / schedule.alpha(s)
    return (
        expand(a, x) * x
        + expand((schedule.sigma(t) ** 2 - (a * schedule.sigma(s)) ** 2).clamp_min(0).sqrt(), x)
        * eps
    )


def drawn(draw, counts):
    """K, in turn over the rows, and step of each."""
    K = torch.tensor(
        [counts[(row + draw.agreed("steps", len(counts))) % len(counts)] for row in draw.rows]
    )
    return K, (draw.uniform("j") * K).long()


def trajectories(
    student,
    schedule,
    draw,
    shape,
    classes,
    counts=(1, 1, 2, 4),
    told=True,
    sde=False,
    clean=False,
    fresh=False,
    to_noise=False,
    by_x_s=False,
):
    """One row at a time, from the draws: what is matched (x, at its level), x0, dx/dx0, and x_tau, tau, eps, label, cond of student and fake."""
    K, j = drawn(draw, counts)
    z, eps, label, u = (
        draw.normal("z", shape),
        draw.normal("eps", shape),
        draw.integer("cond", classes),
        draw.spread("u", 0.02, 0.98),
    )
    rows = []
    for i in range(len(z)):
        grid = [shift(torch.tensor([1 - n / K[i].item()]), SHIFT) for n in range(K[i] + 1)]
        cond = {"label": label[i : i + 1], **({"steps": K[i : i + 1].float()} if told else {})}
        x_s = z[i : i + 1]
        for n in range(j[i] + 1):
            x0, noise = split(student, schedule, x_s.detach(), grid[n], **cond)
            if sde:
                noise = draw.normal(f"renoise{n}" if n < j[i] else "renoise", shape)[i : i + 1]
            x_s = (
                expand(schedule.alpha(grid[n + 1]), x0) * x0
                + expand(schedule.sigma(grid[n + 1]), x0) * noise
            )
        low, high = 1 - (j[i] + 1) / K[i], 1.0 if to_noise else 1 - j[i] / K[i]
        tau = shift(low + (high - low) * u[i : i + 1], SHIFT)
        assert grid[j[i] + 1] <= tau < (1.0 if to_noise else grid[j[i]])
        x, level = (x0, torch.zeros(1)) if clean or fresh else (x_s, grid[j[i] + 1])
        t, s = grid[j[i]], grid[j[i] + 1]
        slope = (
            torch.ones(1)
            if clean or not by_x_s
            else schedule.alpha(s)
            - (0 if sde else schedule.sigma(s) * schedule.alpha(t) / schedule.sigma(t))
        )
        rows.append(
            [x, level, x0, between(schedule, x, eps[i : i + 1], level, tau).detach(), tau, slope]
        )
    x, level, x0, x_tau, tau, slope = (torch.cat(v) for v in zip(*rows))
    cond = {"label": label, **({"steps": K.float()} if told else {})}
    return types.SimpleNamespace(
        K=K,
        j=j,
        x=x,
        level=level,
        x0=x0,
        slope=slope,
        x_tau=x_tau,
        tau=tau,
        eps=eps,
        label=label,
        cond=cond,
    )


def fake_loss(fake, schedule, at, exact, snr):
    a, s = expand(schedule.alpha(at.tau), at.x0), expand(schedule.sigma(at.tau), at.x0)
    x0, eps = split(fake, schedule, at.x_tau, at.tau, **at.cond)
    b = (s**2 - (a * expand(schedule.sigma(at.level) / schedule.alpha(at.level), s)) ** 2).sqrt()
    if exact:
        error = b / s * eps - at.eps
        return (
            (error / a if isinstance(schedule, Flow) and not snr else error).square().mean()
        )  # flow's velocity is off by 1 / alpha of that
    mix = (at.x_tau - a * at.x0.detach()) / s
    weight = ((at.eps.square().flatten(1).mean(1) - mix.square().flatten(1).mean(1)) / 2).exp()
    error = ((eps - x0) - (mix - at.x0.detach())) if isinstance(schedule, Flow) else eps - mix
    if snr:
        error = (a / s).clamp(max=5**0.5) * (x0 - at.x0.detach())
    return (expand(weight, error) * error.square()).mean()


CASES = [  # flags, what they mean for trajectories, for the loss
    ([], {}, {}),
    (["--student_steps", "4"], dict(counts=[4], told=False), {}),
    (["--student_steps", "3", "2"], dict(counts=[3, 2]), {}),
    (["--untold"], dict(told=False), {}),
    (["--regress", "x_s"], dict(by_x_s=True), {}),
    (["--regress", "x_s", "--loss", "l2"], dict(by_x_s=True), dict(loss="l2")),
    (["--regress", "x_s", "--loss", "demo"], {}, dict(loss="demo")),
    (["--regress", "x_s", "--renoise", "sde"], dict(by_x_s=True, sde=True), {}),
    (["--regress", "x_s", "--match", "clean"], dict(clean=True), {}),
    (["--loss", "l2"], {}, dict(loss="l2")),
    (["--loss", "demo"], {}, dict(loss="demo")),
    (["--renoise", "sde"], dict(sde=True), {}),
    (["--match", "clean"], dict(clean=True), {}),
    (["--tau_range", "to_noise"], dict(to_noise=True), {}),
    (["--guidance_scale", "1"], {}, dict(scale=1)),
    (["--fake_noise", "fresh"], {}, dict(fresh=True)),
    (["--fake_target", "exact"], {}, dict(exact=True)),
    (["--fake_weight", "snr"], {}, dict(snr=True)),
    (["--fake_target", "exact", "--fake_weight", "snr"], {}, dict(exact=True, snr=True)),
    (["--teacher", "VP"], {}, {}),
    (
        ["--teacher", "VP", "--fake_target", "exact", "--match", "clean"],
        dict(clean=True),
        dict(exact=True),
    ),
    (["--teacher", "VP", "--renoise", "sde"], dict(sde=True), {}),
]


@pytest.mark.parametrize("flags, path, means", CASES, ids=[" ".join(case[0]) for case in CASES])
def test_gradients_and_calls(monkeypatch, tmp_path, flags, path, means):
    """The first update of fake and student once more, from the draws alone; log.csv's row; and who is called, how often, on which rows, told what."""
    folder, schedule, shape, classes, scale, teacher = (
        "ring",
        Flow(),
        (2,),
        4,
        means.get("scale", 2.5),
        RingTeacher(),
    )
    if "VP" in flags:
        folder, schedule, shape, classes = (
            save_tiny_vp_teacher(tmp_path / "vp"),
            VP("scaled_linear", 0.00085, 0.012),
            (1, 4, 4),
            3,
        )
        teacher = load_network(folder)[0]
    real_told = told_steps
    monkeypatch.setattr(
        teachers, "told_steps", lambda net: perturbed(real_told(net), seed=1)
    )  # the new layer is no longer zero
    diary = one_step(
        monkeypatch,
        tdm,
        tmp_path / "run",
        *BASE,
        *[folder if f == "VP" else f for f in flags],
        "--seed",
        "2",
        "--ema_decay",
        "0",
    )
    told, ways = path.get("told", True), {}
    for what, inner in (("fake-score", 0), ("student", "student")):
        nets, grads = diary.at[what]
        draw = Draws(2, 0, inner, range(8))
        ways[what] = at = trajectories(
            nets["student"],
            schedule,
            draw,
            shape,
            classes,
            fresh=means.get("fresh") and what == "fake-score",
            **path,
        )
        if what == "fake-score":
            loss = fake_loss(nets["fake"], schedule, at, means.get("exact"), means.get("snr"))
            want = torch.autograd.grad(loss, list(nets["fake"].parameters()))
        else:
            with torch.no_grad():
                real, uncond = (
                    split(teacher, schedule, at.x_tau, at.tau, label=y)[0]
                    for y in (at.label, torch.full_like(at.label, classes))
                )
                real, fake = (
                    uncond + scale * (real - uncond),
                    split(nets["fake"], schedule, at.x_tau, at.tau, **at.cond)[0],
                )
                g, A = fake - real, expand(at.slope, fake)
                c = 0.00054 * g[0].numel() ** 0.5
                norm = expand(((A * g).square().flatten(1).sum(1) + c**2).sqrt(), g)
                error = expand((at.x0 - real).abs().flatten(1).mean(1), g)
                by = {
                    "pseudo_huber": A**2 * g / norm / 8,
                    "l2": A**2 * g / g.numel(),
                    "demo": g / (g.square() + 1e-6).sqrt() / error / g.numel(),
                }
                by = by[means.get("loss", "pseudo_huber")]
            want = torch.autograd.grad((at.x0 * by).sum(), list(nets["student"].parameters()))
        largest = max(v.abs().max().item() for v in want)
        for a, b in zip(grads[what.split("-")[0]], want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 * largest)
        assert largest > 1e-3
    (row,) = [{name: float(v) for name, v in row.items()} for row in read_log(tmp_path / "run")]
    value = {
        "pseudo_huber": (norm - c).mean(),
        "l2": (A * g).square().mean() / 2,
        "demo": (((g.square() + 1e-6).sqrt() - 1e-3) / error).mean(),
    }
    columns = {
        "loss": value[means.get("loss", "pseudo_huber")],
        "loss_fake": loss.detach(),
        "g": g.square().mean().sqrt(),
        "mean": at.x0.detach().mean(),
        "std": at.x0.detach().std(correction=0),
        "norm_student": torch.stack([v.norm() for v in want]).norm(),
    }
    assert {name: row[name] for name in columns} == pytest.approx(
        {name: float(v) for name, v in columns.items()}, rel=1e-3
    )

    guided = 1 if scale == 1 else 2
    for at, calls, has_teacher in zip(ways.values(), diary.turns, (False, True)):
        by = {
            who: [c for c in calls if c.who == who and c.x_t.any()]
            for who in ("student", "teacher", "fake")
        }  # zeros are the trial before training
        assert {who: len(by[who]) for who in by} == {
            "student": at.j.max() + 1,
            "teacher": has_teacher * guided,
            "fake": 1,
        }
        for i, call in enumerate(
            by["student"]
        ):  # a sample's rollout ends at its own step; then all take theirs together
            rows = at.j > i if i < at.j.max() else at.j >= 0
            assert torch.equal(call.label, at.label[rows]) and call.graph == (
                has_teacher and i == at.j.max()
            )
            assert torch.equal(call.steps, at.K[rows].float()) if told else call.steps is None
        assert [c.graph for c in by["fake"] + by["teacher"]] == [not has_teacher] + [False] * len(
            by["teacher"]
        )
        for call in by["fake"] + by["teacher"]:
            (
                torch.testing.assert_close(call.x_t, at.x_tau, rtol=1e-4, atol=1e-4),
                torch.testing.assert_close(call.t, at.tau),
            )
            assert (
                torch.equal(call.steps, at.K.float())
                if told and call.who == "fake"
                else call.steps is None
            )
        assert torch.equal(by["fake"][0].label, at.label)
        assert (
            not has_teacher
            or [c.label.tolist() for c in by["teacher"]]
            == [at.label.tolist(), [classes] * 8][:guided]
        )


@pytest.mark.parametrize("tau_range", ["segment", "to_noise"])
def test_every_step_of_every_count_and_its_levels(monkeypatch, tmp_path, tau_range):
    """Over a run: all (K, step) occur, K as often as it is named and steps alike; a step's levels lie in its own raw interval, or reach up to noise, and fill it;
    no level is below where the step lands. Fake turns leave no gradient in the student, student turns none in the fake, neither any in the teacher."""
    diary = ring_run(
        monkeypatch,
        tdm,
        tmp_path,
        *BASE,
        "--tau_range",
        tau_range,
        "--fake_update_ratio",
        "2",
        steps=12,
        batch=24,
    )
    assert diary.updates == ([("fake-score", "fake")] * 2 + [("student", "student")]) * 12
    assert all(
        (g["fake"], g["student"], g["teacher"]) == (what != "student", what == "student", False)
        for (what, _), g in zip(diary.updates, diary.grads)
    )
    assert all(
        g["student_all"] for (what, _), g in zip(diary.updates, diary.grads) if what == "student"
    )
    u = {}
    for calls in diary.turns[:-1]:
        (fake,), last = (
            [c for c in calls if c.who == "fake"],
            [c for c in calls if c.who == "student"][-1],
        )
        assert torch.equal(fake.steps, last.steps) and all(
            torch.equal(c.t, fake.t) for c in calls if c.who == "teacher"
        )
        for K, t, tau in zip(
            last.steps.int().tolist(), unshift(last.t, SHIFT), unshift(fake.t, SHIFT)
        ):
            u.setdefault((K, round(K * (1 - t.item()))), []).append(tau.item())
    assert set(u) == {(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)}
    n = sum(map(len, u.values()))
    for (K, j), levels in u.items():
        low, high = 1 - (j + 1) / K, 1.0 if tau_range == "to_noise" else 1 - j / K
        assert (
            low < min(levels) < low + 0.1 * (high - low)
            and high - 0.1 * (high - low) < max(levels) < high
        )
        assert abs(sum(levels) / len(levels) - (low + high) / 2) < 0.12 * (high - low) and len(
            levels
        ) / n == pytest.approx({1: 2, 2: 1, 4: 1}[K] / 4 / K, abs=0.04)


def test_start_of_a_student_that_is_told(monkeypatch, tmp_path):
    """Told K, student and fake start as the teacher's function whatever K; with --student_init the student starts there, the fake at the teacher."""
    teacher, other = (
        save_tiny_teacher(tmp_path / "teacher"),
        load_network(save_tiny_teacher(tmp_path / "other"))[0],
    )
    save_network(perturbed(other, seed=5), network_config(other), str(tmp_path / "other"))
    x, t, label = torch.randn(3, 1, 4, 4), torch.tensor([0.2, 0.6, 1.0]), torch.arange(3)
    for name, flags in (("teacher", []), ("other", ["--student_init", str(tmp_path / "other")])):
        with monkeypatch.context() as m:
            diary = one_step(m, tdm, tmp_path / "run", "--teacher", teacher, *flags)
        nets = diary.at["fake-score"][0]
        for net, start in ((nets["student"], str(tmp_path / name)), (nets["fake"], teacher)):
            assert torch.equal(
                net(x, t, label, steps=torch.tensor([1.0, 2, 4])),
                load_network(start)[0](x, t, label),
            )
        assert not any(p.requires_grad for p in diary.teacher.net.parameters())
        assert_bit_equal(
            dict(diary.teacher.net.state_dict()), load_file(tmp_path / "teacher" / WEIGHTS)
        )


# ---- samples, by step count --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [["--ema_decay", "0.5"], ["--renoise", "sde"], ["--untold"]], ids=" ".join
)
def test_samples_and_report_by_step_count(monkeypatch, tmp_path, capsys, flags):
    """A row for each K with its calls; its samples are tdm.sample of the saved student over K's own grid, told K; --sample draws them again."""
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    seen, pictures, real_finish, real_save = {}, [], report.finish, report.save_samples

    def on_finish(*args):
        seen.update(times=args[6], students=args[7])
        return real_finish(*args)

    monkeypatch.setattr(report, "finish", on_finish)
    monkeypatch.setattr(
        report,
        "save_samples",
        lambda folder, rows, world: pictures.append(rows) or real_save(folder, rows, world),
    )
    tdm.main(
        [
            "--teacher",
            "ring",
            "--output_dir",
            str(tmp_path / "run"),
            "--max_train_steps",
            "4",
            "--train_batch_size",
            "16",
            "--teacher_steps",
            "0",
            "--timestep_shift",
            str(SHIFT),
            "--lr_decay_share",
            "0",
            *flags,
        ]
    )
    told, sde = "--untold" not in flags, "sde" in flags
    rows = {
        r["name"]: r["nfe"] for r in load_json(str(tmp_path / "run" / "report.json"))["results"]
    }
    assert (
        rows == {"data": 0, "teacher_same_steps": 4, "student": 4, "student_2": 2, "student_1": 1}
        and seen["times"] == step_grid(4, SHIFT)[:-1]
    )
    sampler = load_json(str(tmp_path / "run" / "student" / "sampler.json"))
    assert sampler == {
        "method": "tdm",
        "prediction": "flow_v",
        "schedule": {"type": "flow"},
        "times": step_grid(4, SHIFT)[:-1],
        "timestep_shift": SHIFT,
        "rule": "renoise" if sde else "euler",
        "guidance_scale": 1.0,
        "sample_shape": [2],
        "told_steps": told,
        "grids": {str(n): step_grid(n, SHIFT) for n in (1, 2, 4)},
    }
    student, config = load_network(str(tmp_path / "run" / "student"))
    assert config["steps_cond"] is told and any(
        not torch.equal(a, b)
        for a, b in zip(student.hidden.parameters(), ring_network(0).hidden.parameters())
    )
    draw, label, samples = Draws(0, "evaluation", 0, range(400)), torch.arange(400) % 4, {}
    for n in (1, 2, 4):
        cond = {"label": label, **({"steps": torch.full((400,), float(n))} if told else {})}
        fresh = (lambda i: draw.normal(f"renoise{i}", (2,))) if sde else None
        calls, sample = seen["students"]["student" if n == 4 else f"student_{n}"]
        samples[n] = tdm.sample(
            student, Flow(), "flow_v", draw.normal("z", (2,)), step_grid(n, SHIFT), cond, fresh
        )
        torch.testing.assert_close(
            torch.cat([sample(label, 0, 100), sample(label, 100, 400)]),
            samples[n],
            rtol=1e-4,
            atol=1e-5,
        )
        for more in [["--student_steps", str(n)]] + [[]] * (n == 4):
            tdm.main(
                [
                    "--sample",
                    str(tmp_path / "run"),
                    *more,
                    "--output_dir",
                    str(tmp_path / "samples"),
                ]
            )
            torch.testing.assert_close(
                load_file(tmp_path / "samples" / "samples.safetensors")["x0"],
                samples[n],
                rtol=1e-4,
                atol=1e-5,
            )
    at_end = [
        (text.removeprefix("student, "), x) for text, x in pictures[1] if text.startswith("student")
    ]
    assert [text for text, _ in at_end] == ["4 call(s)", "2 call(s)", "1 call(s)"]
    for text, x in pictures[0] + at_end:  # while training, and at the end
        torch.testing.assert_close(x, samples[int(text[0])], rtol=1e-4, atol=1e-5)
    assert [text for text, _ in pictures[0]] == [f"{n} step(s), update 4" for n in (4, 2, 1)]
    for n in (["3"], ["1", "2"]):
        assert (
            f"--student_steps {' '.join(n)}: this student was trained for 1, 2, 4: name one"
            in refusal_of(
                capsys,
                tdm.main,
                "--sample",
                str(tmp_path / "run"),
                "--output_dir",
                str(tmp_path / "none"),
                "--student_steps",
                *n,
            )
        )


def test_sampler_is_ddim_told_its_count():
    """Step by step by hand, n calls for n steps; fresh noise instead of the implied where it is given."""
    net, calls = perturbed(told_steps(ring_network(0))), []
    net.register_forward_hook(lambda *a: calls.append(0))
    z, label, steps = torch.randn(5, 2), torch.arange(5) % 4, torch.full((5,), 2.0)
    for fresh in (None, lambda i: torch.full((5, 2), i + 1.0)):
        x0, eps = split(net, Flow(), z, torch.ones(5), label=label, steps=steps)
        x = 0.25 * x0 + 0.75 * (fresh(0) if fresh else eps)
        want = split(net, Flow(), x, torch.full((5,), 0.75), label=label, steps=steps)[0]
        calls.clear()
        torch.testing.assert_close(
            tdm.sample(
                net, Flow(), "flow_v", z, [1.0, 0.75, 0.0], {"label": label, "steps": steps}, fresh
            ),
            want,
        )
        assert len(calls) == 2


# ---- other teachers, refusals --------------------------------------------------------------------------------------------


def test_several_counts_need_an_input_for_them(monkeypatch, tmp_path, capsys):
    """A network that cannot be told K is refused, unless it need not be."""
    flags = [
        *save_tiny_wan(tmp_path),
        "--output_dir",
        str(tmp_path / "run"),
        "--max_train_steps",
        "1",
        "--student_steps",
        "1",
        "2",
    ]
    assert (
        "--student_steps 1 2: a WanTransformer3DModel has no input that could tell it their number"
        in refusal_of(capsys, tdm.main, *flags)
    )
    assert not (tmp_path / "run").exists()
    diary = Diary(monkeypatch, tdm)
    tdm.main([*flags, "--untold", "--train_batch_size", "3"])
    assert diary.norms[-1] > 0 and not any(
        c.steps is not None for calls in diary.turns for c in calls
    )


@pytest.mark.parametrize("kind", ["vp", "pixart"])
def test_vp_teachers_from_end_to_end(tmp_path, kind):
    """Teachers that predict eps under VP: student/ records its count's input if told, the schedule is in sampler.json, --sample draws the run's samples, and
    those are DDIM's. PixArt's student loads in diffusers."""
    if kind == "vp":
        flags, told = (
            [
                "--teacher",
                save_tiny_vp_teacher(tmp_path / "teacher"),
                "--student_steps",
                "1",
                "2",
                "--teacher_steps",
                "2",
                "--preview_samples",
                "2",
            ],
            True,
        )
    else:
        flags, told = save_tiny_pixart(tmp_path, 512), False
    tdm.main(
        [
            *flags,
            "--output_dir",
            str(tmp_path / "run"),
            "--max_train_steps",
            "2",
            "--train_batch_size",
            "3",
        ]
    )
    student, config = load_network(str(tmp_path / "run" / "student"))
    teacher = load_json(str(tmp_path / ("teacher/" * told) / "transformer" / "config.json"))
    assert config == {**teacher, **({"steps_cond": True} if told else {})}
    _, sampler, schedule, prediction, _ = read_own_sampler(str(tmp_path / "run"), "tdm")
    assert (
        prediction == "eps"
        and isinstance(schedule, VP)
        and sampler["times"] == [1.0, 0.5]
        and sampler["told_steps"] is told
    )
    tdm.main(
        [
            "--sample",
            str(tmp_path / "run"),
            "--output_dir",
            str(tmp_path / "samples"),
            "--preview_samples",
            "2",
            *([] if told else flags[2:4]),
        ]
    )
    x = load_file(tmp_path / "run" / "samples.safetensors")["x0"]
    torch.testing.assert_close(
        load_file(tmp_path / "samples" / "samples.safetensors")["x0"], x, rtol=1e-4, atol=1e-4
    )
    if told:
        cond = {"label": torch.arange(2), "steps": torch.full((2,), 2.0)}
    else:
        prompts = load_file(tmp_path / "prompts.safetensors")
        cond = {name: prompts[f"cond.{name}"][:2] for name in ("text", "mask")}
    x_t, half = Draws(0, "evaluation", 0, range(2)).normal("z", x.shape[1:]), torch.full((2,), 0.5)
    with torch.no_grad():
        x0, eps = split(student, schedule, x_t, torch.ones(2), **cond)
        want = split(
            student,
            schedule,
            expand(schedule.alpha(half), x0) * x0 + expand(schedule.sigma(half), x0) * eps,
            half,
            **cond,
        )[0]
    torch.testing.assert_close(x, want, rtol=1e-3, atol=1e-3)
    if not told:
        diffusers = pytest.importorskip("diffusers")
        theirs = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "run" / "student")
        assert_bit_equal(dict(theirs.state_dict()), dict(student.state_dict()))
