"""tdm.py's loop: the gradients of fake and student from the draws alone, and who is called.

Also its samples and report by step count, VP teachers, and refusals. What its runs share with the
other scripts' is tested for all in test_dmd_math.py and test_runs.py.
"""

import types

import pytest
import torch
from helpers import (
    PIXART_SCHEDULER,
    Diary,
    alone,
    assert_bit_equal,
    one_step,
    perturbed,
    quiet,
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
from models.diffusion import VP, Diffusion, Flow, expand, shift, step_grid, unshift
from models.draws import Draws
from models.files import load_json, save_json
from models.networks import WEIGHTS, load_network, network_config, save_network
from models.networks.pixart import PIXART_512, PIXART_1024
from models.plumbing import report, teachers
from models.plumbing.film import read_gif
from models.plumbing.teachers import read_own_sampler, with_step_input
from models.worlds.ring import RingTeacher

SHIFT = 3.0
BASE = f"--timestep_shift {SHIFT} --guidance_scale 2.5 --loss pseudo_huber".split()
FLOW_V = Diffusion(Flow(), "flow_v")


# ---- an update written out -----------------------------------------------------------------------


def split(net, schedule, x_t, t, **cond):
    """x0 and eps of a network that predicts flow's velocity, or eps under VP."""
    a, s, out = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t), net(x_t, t, **cond)
    if isinstance(schedule, Flow):
        return x_t - s * out, x_t + a * out
    return (x_t - s * out) / a, out


def mixed(schedule, x0, eps, t):
    """alpha_t x0 + sigma_t eps."""
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * eps


def between(schedule, x, eps, s, t):
    """A sample at level s noised on to t."""
    a = schedule.alpha(t) / schedule.alpha(s)
    b = (schedule.sigma(t) ** 2 - (a * schedule.sigma(s)) ** 2).clamp_min(0).sqrt()
    return expand(a, x) * x + expand(b, x) * eps


def drawn(draw, counts):
    """K, in turn over the rows, and the step k of each."""
    offset = draw.agreed("steps", len(counts))
    K = torch.tensor([counts[(row + offset) % len(counts)] for row in draw.rows])
    return K, (draw.uniform("j") * K).long()


def row_of(student, schedule, draw, noise_draw, shape, i, K, k, cond, how):
    """The trajectory of row i alone, up to where its step k of K lands.  -> dict of (1, ...).

    draw: of the trajectory; noise_draw: of the level above it and the noise there.
    """
    grid = [shift(torch.tensor([1 - n / K]), SHIFT) for n in range(K + 1)]
    x_s = draw.normal("z", shape)[i : i + 1]
    for n in range(k + 1):
        x, noise = split(student, schedule, x_s.detach(), grid[n], **cond)
        if how.sde:
            noise = draw.normal(f"renoise{n}" if n < k else "renoise", shape)[i : i + 1]
        x_s = mixed(schedule, x, noise, grid[n + 1])
    t, s = grid[k], grid[k + 1]
    top = torch.ones(1) if how.to_noise == "all" or how.to_noise == "last" and k == K - 1 else t
    low, high = (unshift(v, SHIFT) for v in (0.98 * s + 0.02 * top, 0.02 * s + 0.98 * top))
    tau = shift(low + (high - low) * noise_draw.spread("u")[i : i + 1], SHIFT)
    assert s < tau < top
    slope = torch.ones(1)
    if how.by_x_s:
        slope = schedule.alpha(s)
        if not how.sde:
            slope = slope - schedule.sigma(s) * schedule.alpha(t) / schedule.sigma(t)
    if how.clean or how.fresh:
        x_s, s = x, torch.zeros(1)
    eps = noise_draw.normal("eps", shape)[i : i + 1]
    x_tau = between(schedule, x_s, eps, s, tau).detach()
    return dict(x=x, x_s=x_s, s=s, slope=slope, tau=tau, eps=eps, x_tau=x_tau)


HOW = dict(counts=(1, 1, 2, 4), see_K=True, sde=False, clean=False, fresh=False)
HOW |= dict(to_noise=None, by_x_s=False, see_k=True)


def trajectories(student, schedule, draw, noise_draw, shape, classes, **how):
    """Every row by itself, from the draws alone. how: what the flags mean, see HOW.

    -> K, k, label, cond of the student, fake_cond, and of row_of: x, what is matched (x_s at level
    s), slope, x_tau, tau, eps.
    """
    how = types.SimpleNamespace(**{**HOW, **how})
    K, k = drawn(draw, how.counts)
    cond = {"label": draw.integer("cond", classes)}
    if how.see_K:
        cond["steps"] = K.float()
    fake_cond = dict(cond)
    if how.see_k:  # K + k (max K + 1), or k (K + 1) with one K
        own = K if how.see_K else torch.zeros_like(K)
        fake_cond["steps"] = torch.stack([own, k * (max(how.counts) + 1)]).sum(0).float()
    rows = []
    for i, (n, step) in enumerate(zip(K.tolist(), k.tolist())):
        alone = {name: v[i : i + 1] for name, v in cond.items()}
        draws = draw, noise_draw
        rows.append(row_of(student, schedule, *draws, shape, i, n, step, alone, how))
    at = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    conds = dict(label=cond["label"], cond=cond, fake_cond=fake_cond)
    return types.SimpleNamespace(K=K, k=k, **conds, **at)


def fake_loss(fake, schedule, at, exact=False, snr=False):
    """The fake's loss at these trajectories, as --fake_target and --fake_weight mean it."""
    a, sigma = expand(schedule.alpha(at.tau), at.x), expand(schedule.sigma(at.tau), at.x)
    x0, eps = split(fake, schedule, at.x_tau, at.tau, **at.fake_cond)
    flow, x = isinstance(schedule, Flow), at.x.detach()
    if exact:
        ratio = expand(schedule.sigma(at.s) / schedule.alpha(at.s), x)
        b = (sigma**2 - (a * ratio) ** 2).sqrt()
        error = b / sigma * eps - at.eps
        # flow's velocity is off by 1 / alpha of that
        return (error / a if flow and not snr else error).square().mean()
    mix = (at.x_tau - a * x) / sigma
    weight = ((at.eps.square().flatten(1).mean(1) - mix.square().flatten(1).mean(1)) / 2).exp()
    if snr:
        error = (a / sigma).clamp(max=5**0.5) * (x0 - x)
    elif flow:
        error = (eps - x0) - (mix - x)
    else:
        error = eps - mix
    return (expand(weight, error) * error.square()).mean()


def student_loss(teacher, fake, schedule, at, null, scale, loss):
    """-> loss, its gradient in x, mu_real, mu_fake."""
    with torch.no_grad():
        labels = at.label, torch.full_like(at.label, null)
        real, uncond = (split(teacher, schedule, at.x_tau, at.tau, label=y)[0] for y in labels)
        real = uncond + scale * (real - uncond)
        guess = split(fake, schedule, at.x_tau, at.tau, **at.fake_cond)[0]
    g = guess - real
    A = expand(at.slope, g)
    if loss == "l2":
        return (A * g).square().mean() / 2, A**2 * g / g.numel(), real, guess
    if loss == "demo":
        root = (g.square() + 1e-6).sqrt()
        error = expand((at.x.detach() - real).abs().flatten(1).mean(1), g)
        return ((root - 1e-3) / error).mean(), g / root / error / g.numel(), real, guess
    c = 0.00054 * g[0].numel() ** 0.5
    norm = ((A * g).square().flatten(1).sum(1) + c**2).sqrt()
    return (norm - c).mean(), A**2 * g / expand(norm, g) / len(g), real, guess


def setting(tmp_path, flags):
    """-> the flags with a folder for VP, a teacher, its schedule, sample shape and classes."""
    if "VP" not in flags:
        return flags, RingTeacher(), Flow(), (2,), 4
    folder = save_tiny_vp_teacher(tmp_path / "vp")
    schedule, teacher = VP("scaled_linear", 0.00085, 0.012), load_network(folder)[0]
    return flags.replace("VP", folder), teacher, schedule, (1, 4, 4), 3


CASES = {  # flags: what they mean for trajectories, for the losses
    "--teacher ring": ({}, {}),
    "--student_steps 4": (dict(counts=[4], see_K=False), {}),
    "--student_steps 3 2": (dict(counts=[3, 2]), {}),
    "--shared_fake": (dict(see_k=False), {}),
    "--no_steps_cond": (dict(see_K=False, see_k=False), {}),
    "--regress x_s": (dict(by_x_s=True), {}),
    "--regress x_s --loss l2": (dict(by_x_s=True), dict(loss="l2")),
    "--regress x_s --renoise sde": (dict(by_x_s=True, sde=True), {}),
    "--loss l2": ({}, dict(loss="l2")),
    "--loss demo": ({}, dict(loss="demo")),
    "--renoise sde": (dict(sde=True), {}),
    "--match clean": (dict(clean=True), {}),
    "--tau_range to_noise": (dict(to_noise="all"), {}),
    "--tau_range to_noise --no_steps_cond": (dict(to_noise="all", see_K=False, see_k=False), {}),
    "--tau_range last_to_noise": (dict(to_noise="last"), {}),
    "--tau_range last_to_noise --student_steps 3": (
        dict(to_noise="last", counts=[3], see_K=False),
        {},
    ),
    "--no-reuse_samples": ({}, dict(reuse=False)),
    "--guidance_scale 1": ({}, dict(scale=1)),
    "--fake_noise fresh": ({}, dict(fresh=True)),
    "--fake_target exact": ({}, dict(exact=True)),
    "--fake_weight snr": ({}, dict(snr=True)),
    "--fake_target exact --fake_weight snr": ({}, dict(exact=True, snr=True)),
    "--teacher VP": (dict(by_x_s=True), {}),  # it predicts noise
    "--teacher VP --loss l2": (dict(by_x_s=True), dict(loss="l2")),
    "--teacher VP --loss demo": ({}, dict(loss="demo")),
    "--teacher VP --fake_target exact --match clean": (dict(clean=True), dict(exact=True)),
    "--teacher VP --renoise sde": (dict(by_x_s=True, sde=True), {}),
    "--teacher VP --regress x0": ({}, {}),
}


@pytest.mark.parametrize("flags", CASES)
def test_gradients_and_calls(monkeypatch, tmp_path, flags):
    """The first update of student and fake once more, from the draws alone, and log.csv's row.

    The fake sees the landings of the student's update, by the weights that it had then. And who is
    called, how often, on which rows, and what it is conditioned on.
    """
    path, means = CASES[flags]
    flags, teacher, schedule, shape, classes = setting(tmp_path, flags)
    scale, loss_kind = means.get("scale", 2.5), means.get("loss", "pseudo_huber")
    monkeypatch.setattr(  # the layer that takes K is zero at first, and would hide everything
        teachers, "with_step_input", lambda *a: perturbed(with_step_input(*a), seed=1)
    )
    folder = tmp_path / "run"
    own = f"{flags} --seed 2 --ema_decay 0".split()
    diary = one_step(monkeypatch, tdm, folder, *BASE, *own)
    reuse, paths = means.get("reuse", True), {}
    for what, inner in (("fake", 0), ("student", "student")):
        nets, grads = diary.at[what]
        fresh = means.get("fresh", False) and what == "fake"
        made_by, draw = nets["student"], Draws(2, 0, inner, range(8))
        path_draw = draw
        if what == "fake" and reuse:
            made_by, path_draw = diary.at["student"][0]["student"], Draws(2, 0, "student", range(8))
        at_draw = path_draw, draw, shape, classes
        paths[what] = at = trajectories(made_by, schedule, *at_draw, fresh=fresh, **path)
        if what == "fake":
            which = means.get("exact", False), means.get("snr", False)
            loss_fake = fake_loss(nets["fake"], schedule, at, *which)
            want = torch.autograd.grad(loss_fake, list(nets["fake"].parameters()))
        else:
            at_tau = schedule, at, classes, scale, loss_kind
            loss, of_x, real, guess = student_loss(teacher, nets["fake"], *at_tau)
            want = torch.autograd.grad((at.x * of_x).sum(), list(nets["student"].parameters()))
        largest = max(v.abs().max().item() for v in want)
        for a, b in zip(grads[what], want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 * largest)
        assert largest > 1e-3
    g, (flat_real, flat_guess) = guess - real, (v.flatten(1) for v in (real, guess))
    gap = (flat_guess - flat_real).norm(dim=1) / flat_real.norm(dim=1)
    columns = {
        "loss": loss,
        "loss_fake": loss_fake.detach(),
        "g": g.square().mean().sqrt(),
        "dm_cos": torch.cosine_similarity(flat_real, flat_guess).mean(),
        "dm_rel_gap": gap.mean(),
        "mean": at.x.detach().mean(),
        "std": at.x.detach().std(correction=0),
        "norm_student": torch.stack([v.norm() for v in want]).norm(),
    }
    (row,) = read_log(folder)
    want = {name: float(v) for name, v in columns.items()}
    assert {name: float(row[name]) for name in columns} == pytest.approx(want, rel=1e-3)
    assert {*columns, "norm_fake", "step", "seconds", "peak_memory_mb"} == set(row)
    for what, calls in zip(("student", "fake"), diary.turns):
        turn = what == "student", what == "fake" and reuse
        check_calls(calls, paths[what], *turn, 1 if scale == 1 else 2, classes)


def check_calls(calls, at, student_turn, reuse, guided, null):
    """Who was called in a turn, how often, where, on which rows, conditioned on what."""
    by = {
        who: [c for c in calls if c.who == who and c.x_t.any()]  # zeros: the trial before training
        for who in ("student", "teacher", "fake")
    }
    counts = {who: len(of_it) for who, of_it in by.items()}
    last = int(at.k.max())
    made = 0 if reuse else last + 1
    assert counts == {"student": made, "teacher": student_turn * guided, "fake": 1}
    for i, call in enumerate(by["student"]):
        # a sample's trajectory ends at its own step; then all take theirs together
        rows = at.k > i if i < last else at.k >= 0
        assert torch.equal(call.label, at.label[rows])
        assert call.graph == (student_turn and i == last)
        steps = at.cond.get("steps")
        assert call.steps is None if steps is None else torch.equal(call.steps, steps[rows])
    (fake,) = by["fake"]
    assert fake.graph != student_turn and not any(c.graph for c in by["teacher"])
    for call in [fake, *by["teacher"]]:
        torch.testing.assert_close(call.x_t, at.x_tau, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(call.t, at.tau)
    steps = at.fake_cond.get("steps")
    assert fake.steps is None if steps is None else torch.equal(fake.steps, steps)
    assert all(c.steps is None for c in by["teacher"])
    assert torch.equal(fake.label, at.label)
    if student_turn:
        labels = [at.label.tolist(), [null] * len(at.label)]
        assert [c.label.tolist() for c in by["teacher"]] == labels[:guided]


@pytest.mark.parametrize("tau_range", ["segment", "to_noise", "last_to_noise"])
def test_every_step_of_every_count_and_its_levels(monkeypatch, tmp_path, tau_range):
    """Over a run all (K, step) occur, K as often as it is named and steps alike.

    A step's levels lie in its own interval, or reach up to noise, all steps' or the last one's, and
    fill it; none is below where the step lands. Where they overlap the fake is conditioned on a
    number for every (K, step), else on K. The fake's updates leave no gradient in the student, the
    student's none in the fake, neither any in the teacher.
    """
    flags = f"--tau_range {tau_range} --fake_update_ratio 2".split()
    diary = ring_run(monkeypatch, tdm, tmp_path, *BASE, *flags, steps=12, batch=24)
    assert diary.updates == ["student", "fake", "fake"] * 12
    for what, has in zip(diary.updates, diary.grads):
        of_student = what == "student"
        assert (has["fake"], has["student"], has["teacher"]) == (not of_student, of_student, False)
        assert has["student_all"] or not of_student
    u, last = {}, None  # raw levels tau by (K, step)
    for i, calls in enumerate(diary.turns[:-1]):
        (fake,) = [c for c in calls if c.who == "fake"]
        made = [c for c in calls if c.who == "student"]
        assert bool(made) == (i % 3 != 1)  # the fake's first turn has the landings of the student's
        last = made[-1] if made else last
        step = (last.steps * (1 - unshift(last.t, SHIFT))).round()
        number = last.steps + 5 * step
        torch.testing.assert_close(fake.steps, number)
        assert all(torch.equal(c.t, fake.t) for c in calls if c.who == "teacher")
        raw = unshift(last.t, SHIFT), unshift(fake.t, SHIFT)
        for K, t, tau in zip(last.steps.int().tolist(), *(v.tolist() for v in raw)):
            u.setdefault((K, round(K * (1 - t))), []).append(tau)
    assert set(u) == {(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)}
    n, turns = sum(map(len, u.values())), {1: 2, 2: 1, 4: 1}
    for (K, k), found in u.items():
        up = tau_range == "to_noise" or tau_range == "last_to_noise" and k == K - 1
        low, high = 1 - (k + 1) / K, 1.0 if up else 1 - k / K
        width = high - low
        assert low < min(found) < low + 0.1 * width
        assert high - 0.1 * width < max(found) < high
        assert abs(sum(found) / len(found) - (low + high) / 2) < 0.12 * width
        assert len(found) / n == pytest.approx(turns[K] / 4 / K, abs=0.04)


def test_start_of_a_student_that_is_conditioned_on_K(monkeypatch, tmp_path):
    """Student and fake with an input for K start as the teacher's function, whatever K is.

    With --student_init the student starts there, the fake at the teacher.
    """
    teacher = save_tiny_teacher(tmp_path / "teacher")
    other = load_network(save_tiny_teacher(tmp_path / "other"))[0]
    save_network(perturbed(other, seed=5), network_config(other), str(tmp_path / "other"))
    x, t, label = torch.randn(3, 1, 4, 4), torch.tensor([0.2, 0.6, 1.0]), torch.arange(3)
    for name, flags in (("teacher", []), ("other", ["--student_init", str(tmp_path / "other")])):
        with monkeypatch.context() as m:
            diary = one_step(m, tdm, tmp_path / "run", "--teacher", teacher, *flags)
        nets = diary.at["student"][0]
        for net, start in ((nets["student"], str(tmp_path / name)), (nets["fake"], teacher)):
            got = net(x, t, label, steps=torch.tensor([1.0, 2, 4]))
            assert torch.equal(got, load_network(start)[0](x, t, label))
        assert not any(p.requires_grad for p in diary.teacher.net.parameters())
        kept = load_file(tmp_path / "teacher" / WEIGHTS)
        assert_bit_equal(dict(diary.teacher.net.state_dict()), kept)


def norms_by_step(monkeypatch, folder, flags):
    """Norm of a student's gradient in the first update of a run, all of whose rows are at step k.

    k = 0 ... 3 of four. The student, and the fake with it, are a little off the teacher.
    """
    norms = []
    for k in range(4):

        def at_step_k(real, draw, name, *args, k=k):
            if name == "j":
                return torch.full((len(draw.rows),), (k + 0.5) / 4)
            return real(draw, name, *args)

        with monkeypatch.context() as m:
            diary = Diary(m, tdm)
            diary.wrap(m, Draws, "uniform", at_step_k)
            for name in ("new_student", "trainable"):
                diary.wrap(m, tdm, name, lambda real, *a: perturbed(real(*a), 7, 0.02))
            short = "--max_train_steps 1 --train_batch_size 16 --fake_update_ratio 1"
            out = ["--output_dir", str(folder / str(k))]
            tdm.main([*flags, *short.split(), "--student_steps", "4", *out])
        assert diary.updates[0] == "student"
        norms.append(diary.norms[0])
    return norms


@pytest.mark.parametrize("teacher", ["ring", "glyphs", "clips", "pixart", "wan"])
def test_no_step_of_four_drowns_the_others(monkeypatch, tmp_path, teacher):
    """With a teacher's default flags the four steps' gradients are within a factor of 10.

    Regressing x, PixArt's first step would have more than 100 times its last one's.
    """
    flags = ["--teacher", teacher]
    if teacher == "pixart":
        flags = [*save_tiny_pixart(tmp_path, 512), "--guidance_scale", "3.5"]
    if teacher == "wan":
        flags = save_tiny_wan(tmp_path)
    norms = norms_by_step(monkeypatch, tmp_path / "by-default", flags)
    assert max(norms) < 10 * min(norms)
    if teacher == "pixart":
        of_x = norms_by_step(monkeypatch, tmp_path / "x", [*flags, "--regress", "x0"])
        assert of_x[0] > 100 * of_x[3]


# ---- samples, by step count ----------------------------------------------------------------------


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("more", [[], ["--no_steps_cond"]])
def test_names_of_before(monkeypatch, tmp_path, capsys, more):
    """Runs that know --no_steps_cond as --untold are gone on with, and their students sampled."""
    quiet(monkeypatch)
    out = tmp_path / "run"
    flags = ["--teacher", save_tiny_teacher(tmp_path / "teacher"), "--output_dir", str(out), *more]
    flags += "--train_batch_size 2 --student_steps 1 2 --teacher_steps 0 --max_train_steps".split()
    tdm.main([*flags, "1"])
    path = out / "state" / "step-0000001" / "state.json"
    info = load_json(str(path))
    info["flags"]["untold"] = info["flags"].pop("no_steps_cond")
    save_json(info, str(path))
    capsys.readouterr()
    tdm.main([*flags, "2", "--resume_from_checkpoint", "latest"])
    assert " was " not in capsys.readouterr().out
    path = out / "student" / "sampler.json"
    sampler = load_json(str(path))
    sampler["told_steps"] = sampler.pop("steps_cond")
    save_json(sampler, str(path))
    assert teachers.read_sampler(str(out / "student"))[0]["steps_cond"] is (not more)


@pytest.mark.parametrize("flags", ["--ema_decay 0.5", "--renoise sde", "--no_steps_cond"])
def test_samples_and_report_by_step_count(monkeypatch, tmp_path, capsys, flags):
    """A row for each K with its calls, whose samples are tdm.sample of the saved student.

    That is over K's own grid and conditioned on K; --sample draws them again.
    """
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    seen, pictures, saved, real_finish = {}, [], [], report.finish
    real_save, real_student = report.save_samples, report.save_student

    def on_finish(run, teacher, times, students, *rest):
        seen.update(times=times, students=students)
        return real_finish(run, teacher, times, students, *rest)

    def on_save(folder, rows, world):
        pictures.append(rows)
        return real_save(folder, rows, world)

    def on_student(*args, **more):
        real_student(*args, **more)
        saved.append(load_network(str(out / "student"))[0])

    monkeypatch.setattr(report, "finish", on_finish)
    monkeypatch.setattr(report, "save_student", on_student)
    monkeypatch.setattr(report, "save_samples", on_save)
    out, again = tmp_path / "run", tmp_path / "samples"
    short = f"""--teacher ring --output_dir {out} --max_train_steps 4 --train_batch_size 16
        --teacher_steps 0 --timestep_shift {SHIFT} --lr_decay_share 0 --checkpointing_steps 2"""
    tdm.main([*short.split(), *flags.split()])
    see_K, sde = "--no_steps_cond" not in flags, "sde" in flags
    rows = {r["name"]: r["nfe"] for r in load_json(str(out / "report.json"))["results"]}
    steps = {"teacher_same_steps": 4, "student": 4, "student_2": 2, "student_1": 1}
    assert rows == {"data": 0, **steps}
    assert seen["times"] == step_grid(4, SHIFT)[:-1]
    assert load_json(str(out / "student" / "sampler.json")) == {
        "method": "tdm",
        "prediction": "flow_v",
        "schedule": {"type": "flow"},
        "times": step_grid(4, SHIFT)[:-1],
        "timestep_shift": SHIFT,
        "rule": "renoise" if sde else "euler",
        "guidance_scale": 1.0,
        "sample_shape": [2],
        "steps_cond": see_K,
        "grids": {str(n): step_grid(n, SHIFT) for n in (1, 2, 4)},
    }
    student, config = load_network(str(out / "student"))
    assert config["steps_cond"] is see_K
    pairs = zip(student.hidden.parameters(), ring_network(0).hidden.parameters())
    assert any(not torch.equal(a, b) for a, b in pairs)  # it has learnt something

    draw, label = Draws(0, "evaluation", 0, range(400), shape=(2,)), torch.arange(400) % 4
    samples, early = {}, {}  # of the finished student, of the one that was saved at update 2
    for n in (1, 2, 4):
        cond = {"label": label}
        if see_K:
            cond["steps"] = torch.full((400,), float(n))
        how = step_grid(n, SHIFT), cond, "sde" if sde else "ode"
        samples[n] = tdm.sample(student, FLOW_V, draw.noise, *how)
        early[n] = tdm.sample(saved[0], FLOW_V, draw.noise, *how)
        calls, sampler = seen["students"]["student" if n == 4 else f"student_{n}"]
        assert calls == n
        close(torch.cat([sampler(label, 0, 100), sampler(label, 100, 400)]), samples[n])
        for more in [f"--student_steps {n}"] + [""] * (n == 4):  # the longest is the default
            tdm.main(f"--sample {out} --output_dir {again} {more}".split())
            close(load_file(again / "samples.safetensors")["x0"], samples[n])
    at_end = [(text, x) for text, x in pictures[1] if text.startswith("student")]
    assert [text for text, _ in at_end] == [f"student, {n} call(s)" for n in (4, 2, 1)]
    assert [text for text, _ in pictures[0]] == [f"{n} step(s), update 2" for n in (4, 2, 1)]
    for rows, want in ((pictures[0], early), (at_end, samples)):  # while training, and at the end
        for n, (_, x) in zip((4, 2, 1), rows):
            close(x, want[n])
    assert not torch.allclose(early[4], samples[4], rtol=0.01)
    for counts in ("3", "1 2"):
        none = f"--sample {out} --output_dir {tmp_path / 'none'} --student_steps {counts}"
        says = f"--student_steps {counts}: this student has 1, 2, 4: name one of them"
        assert says in refusal_of(capsys, tdm.main, *none.split())


@pytest.mark.parametrize("renoise", ["ode", "sde"])
def test_sampler_is_ddim_conditioned_on_its_count(renoise):
    """Step by step by hand, n calls for n steps; with "sde" fresh noise instead of the implied."""
    net, calls = perturbed(with_step_input(alone(), ring_network(0))), []
    net.register_forward_hook(lambda *a: calls.append(0))
    z, half = torch.randn(5, 2), torch.full((5,), 0.75)
    cond = {"label": torch.arange(5) % 4, "steps": torch.full((5,), 2.0)}
    noises = {"z": z, "renoise0": torch.full((5, 2), 1.0), "renoise1": torch.full((5, 2), 2.0)}
    x0, eps = split(net, Flow(), z, torch.ones(5), **cond)
    x = 0.25 * x0 + 0.75 * (noises["renoise0"] if renoise == "sde" else eps)
    want = split(net, Flow(), x, half, **cond)[0]
    calls.clear()
    got = tdm.sample(net, FLOW_V, noises.get, [1.0, 0.75, 0.0], cond, renoise)
    torch.testing.assert_close(got, want)
    assert len(calls) == 2


def test_a_first_step_below_noise(tmp_path):
    """--max_time .9: the grids begin there, in training, in sampler.json and for --sample."""
    out, again = tmp_path / "run", tmp_path / "samples"
    short = f"""--teacher ring --output_dir {out} --max_train_steps 2 --train_batch_size 16
        --teacher_steps 0 --timestep_shift {SHIFT} --student_steps 1 2 --ema_decay 0"""
    tdm.main([*short.split(), "--max_time", "0.9"])
    saved = load_json(str(out / "student" / "sampler.json"))
    top = 0.9 / (0.9 + SHIFT * 0.1)  # in raw time
    half = SHIFT * top / 2 / (1 + (SHIFT - 1) * top / 2)
    assert saved["times"] == pytest.approx([0.9, half])
    assert saved["grids"] == {"1": [0.9, 0.0], "2": pytest.approx([0.9, half, 0.0])}
    student, _ = load_network(str(out / "student"))
    z, label = Draws(0, "evaluation", 0, range(400)).normal("z", (2,)), torch.arange(400) % 4
    cond = {"label": label, "steps": torch.ones(400)}
    with torch.no_grad():
        want = split(student, Flow(), z, torch.full((400,), 0.9), **cond)[0]
    tdm.main(f"--sample {out} --output_dir {again} --student_steps 1".split())
    close(load_file(again / "samples.safetensors")["x0"], want)


FILMS = [("", 4 + 2 * 5), ("--shared_fake", 4), ("--student_steps 2", 3)]
FILMS += [("--no_steps_cond", None)]
FILMS += [("--tau_range last_to_noise", 4 + 3 * 5)]  # the fake of the last step


@pytest.mark.parametrize("flags, step", FILMS)
def test_ring_film(monkeypatch, tmp_path, flags, step):
    """ring.gif shows the longest count, and the fake as it speaks of that count.

    It has a frame at the start and one for each update of a short run, also of a resumed one.
    """
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    asked, real = [], tdm.film_of_scores

    def spy(run, teacher, sampler, fake, step):
        asked.append(step)
        return real(run, teacher, sampler, fake, step)

    monkeypatch.setattr(tdm, "film_of_scores", spy)
    short = "--teacher ring --train_batch_size 16 --teacher_steps 0 --lr_decay_share 0"
    for name, more in (
        ("whole", ["--max_train_steps 4"]),
        ("broken", ["--max_train_steps 2", "--max_train_steps 4 --resume_from_checkpoint latest"]),
    ):
        for part in more:
            tdm.main(f"{short} --output_dir {tmp_path / name} {flags} {part}".split())
        assert len(read_gif(tmp_path / name / "ring.gif")) == 5
    assert asked == [step] * 3


# ---- other teachers, refusals --------------------------------------------------------------------


def test_several_counts_need_an_input_for_them(monkeypatch, tmp_path, capsys):
    """A network that cannot be conditioned on K is refused, unless it need not be."""
    short = f"--output_dir {tmp_path / 'run'} --max_train_steps 1 --student_steps 1 2"
    flags = [*save_tiny_wan(tmp_path), *short.split()]
    says = "--student_steps 1 2: a WanTransformer3DModel has no input that could be conditioned on"
    assert f"{says} their number" in refusal_of(capsys, tdm.main, *flags)
    assert not (tmp_path / "run").exists()
    diary = Diary(monkeypatch, tdm)
    tdm.main([*flags, "--no_steps_cond", "--train_batch_size", "3", "--max_train_steps", "2"])
    first = diary.updates.index("student", 1)  # at the very first the fake is the teacher
    assert diary.norms[1] > 0 and diary.norms[first] > 0
    assert not any(c.steps is not None for calls in diary.turns for c in calls)


def test_settings_of_released_teachers(tmp_path):
    """PixArt-alpha has the paper's guidance 3.5, others their own; the rest is the paper's."""

    def args_of(config, scheduler):
        for name, text in (
            ("transformer/config", config),
            ("scheduler/scheduler_config", scheduler),
        ):
            path = tmp_path / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            save_json(text, str(path))
        args = tdm.parse_args(["--teacher", str(tmp_path / "transformer")])
        rates = args.learning_rate, args.learning_rate_fake
        assert (*rates, args.max_train_steps, args.student_steps) == (2e-6, 2e-5, 500, [4])
        assert (args.adam_betas, args.max_grad_norm, args.fake_update_ratio) == ([0.0, 0.999], 1, 1)
        return args

    for config in (PIXART_512, PIXART_1024):
        pixart = {"_class_name": "PixArtTransformer2DModel", **config}
        assert args_of(pixart, PIXART_SCHEDULER).guidance_scale == 3.5
        lcm = {**PIXART_SCHEDULER, "_class_name": "LCMScheduler"}
        assert args_of(pixart, lcm).guidance_scale == 1.0  # it has guidance in its weights
    wan = {"_class_name": "WanTransformer3DModel", "num_layers": 30, "num_attention_heads": 12}
    wan = args_of({**wan, "in_channels": 16}, {"_class_name": "UniPCMultistepScheduler"})
    assert (wan.guidance_scale, wan.timestep_shift) == (5.0, 5.0)


@pytest.mark.parametrize("kind", ["vp", "pixart"])
def test_vp_teachers_from_end_to_end(tmp_path, kind):
    """Teachers that predict eps under VP, and what their runs leave.

    student/ records an input for K where it has one, the schedule is in sampler.json, --sample
    draws the run's samples, and those are DDIM's. PixArt's student loads in diffusers.
    """
    see_K, out, again = kind == "vp", tmp_path / "run", tmp_path / "samples"
    if see_K:
        folder, prompts = save_tiny_vp_teacher(tmp_path / "teacher"), []
        more = "--student_steps 1 2 --teacher_steps 2 --preview_samples 2"
        flags = ["--teacher", folder, *more.split()]
        config_file = tmp_path / "teacher" / "transformer" / "config.json"
    else:
        flags = save_tiny_pixart(tmp_path, 512)
        prompts = flags[2:4]
        config_file = tmp_path / "transformer" / "config.json"
    tdm.main([*flags, *f"--output_dir {out} --max_train_steps 3 --train_batch_size 3".split()])
    student, config = load_network(str(out / "student"))
    changes = {"steps_cond": True} if see_K else {}
    assert config == {**load_json(str(config_file)), **changes}
    _, sampler, schedule, prediction, _ = read_own_sampler(str(out), "tdm")
    assert prediction == "eps" and isinstance(schedule, VP)
    assert sampler["times"] == [1.0, 0.5] and sampler["steps_cond"] is see_K
    tdm.main([*f"--sample {out} --output_dir {again} --preview_samples 2".split(), *prompts])
    x = load_file(out / "samples.safetensors")["x0"]
    close(load_file(again / "samples.safetensors")["x0"], x)
    if see_K:
        cond = {"label": torch.arange(2), "steps": torch.full((2,), 2.0)}
    else:
        rows = load_file(tmp_path / "prompts.safetensors")
        cond = {name: rows[f"cond.{name}"][:2] for name in ("text", "mask")}
    z = Draws(0, "evaluation", 0, range(2)).normal("z", x.shape[1:])
    half = torch.full((2,), 0.5)
    with torch.no_grad():
        x0, eps = split(student, schedule, z, torch.ones(2), **cond)
        want = split(student, schedule, mixed(schedule, x0, eps, half), half, **cond)[0]
    torch.testing.assert_close(x, want, rtol=1e-3, atol=1e-3)
    if not see_K:
        diffusers = pytest.importorskip("diffusers")
        theirs = diffusers.PixArtTransformer2DModel.from_pretrained(out / "student")
        assert_bit_equal(dict(theirs.state_dict()), dict(student.state_dict()))


@pytest.mark.parametrize("counts", [[4], [1, 2, 4]])
def test_paper_launch_lines_have_the_paper_s_ratio_of_rates(counts):
    """With one update of the fake for each of the student's, at ten times its rate.

    At the default's rates the last of four steps drifts to black.
    """
    lines = [v for v in tdm.__doc__.splitlines() if v.strip().startswith("paper") and "tdm.py" in v]
    flags = [v.split("tdm.py ")[1].split("#")[0].split() for v in lines]
    (args,) = [a for a in map(tdm.parse_args, flags) if a.student_steps == counts]
    assert args.learning_rate_fake == pytest.approx(10 * args.learning_rate)
    assert (args.fake_update_ratio, args.shared_fake, args.regress) == (1, True, "x_s")
    assert (args.fake_target, args.loss, args.tau_range) == (
        "importance",
        "pseudo_huber",
        "segment",
    )


@pytest.mark.parametrize(
    "flags, rate, rate_fake",
    [
        ("", 1.2e-3, 1.6e-3),
        ("--preset long", 4e-4, 2e-3),
        ("--preset long --teacher ring", 5e-4, 1e-3),
        ("--preset long --learning_rate 1e-3", 1e-3, 2e-3),
    ],
)
def test_a_long_run_has_lower_rates(flags, rate, rate_fake):
    """At the default's four steps stay at fd 3.0 on glyphs, at these they come to 2.1."""
    args = tdm.parse_args(flags.split())
    assert (args.learning_rate, args.learning_rate_fake) == (rate, rate_fake)


@pytest.mark.parametrize(
    "flags, mixed",
    [
        ("--tau_range to_noise --shared_fake", True),
        ("--tau_range last_to_noise --fake_lora_rank 2", True),
        ("--tau_range to_noise", False),
        ("--tau_range to_noise --shared_fake --student_steps 1", False),
        ("--shared_fake", False),
    ],
)
def test_a_fake_that_mixes_up_steps_is_said(flags, mixed):
    """Intervals that overlap need a fake that knows the step; released networks' cannot."""
    args = tdm.parse_args(["--student_steps", "4", *flags.split()])
    net = types.SimpleNamespace(config={"steps_cond": False})
    see = tdm.sees_K(args, net), tdm.fake_sees_step(args, net)
    grids = {n: tdm.trajectory(n, 1.0) for n in args.student_steps}
    assert ("learns their mixture" in tdm.describe(args, grids, see)) == mixed
