"""mdt_dist.py's loop: the first gradient from the draws alone for every arm and switch, what a run leaves, resume, samples, refusals, both stages of TRELLIS on
two ranks. The formulas themselves are tested in test_mdt_math.py.
"""

import json

import pytest
import torch
from helpers import (
    assert_bit_equal,
    assert_two_ranks_are_one_process,
    perturbed,
    read_log,
    refusal_of,
    ring_network,
    save_tiny_teacher,
    save_tiny_vp_teacher,
    weights,
)
from safetensors.torch import load_file, save_file
from test_trellis import CLASSES, points, save_root

import mdt_dist
from models.diffusion import expand, shift, step_grid
from models.draws import Draws
from models.files import load_json
from models.networks import WEIGHTS, load_network, network_config, save_network
from models.networks.trellis import SLatFlowModel, SparseStructureFlowModel
from models.plumbing import teachers
from models.plumbing.teachers import freeze_teacher, load_teacher

B, N, SEED = 5, 7, 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of a teacher and of another student, and a data file -> flags of a run."""
    root = tmp_path_factory.mktemp("mdt")
    teacher = save_tiny_teacher(root / "teacher")
    other = perturbed(load_network(teacher)[0], seed=5, std=0.05)
    save_network(other, network_config(other), str(root / "other"))
    g = torch.Generator().manual_seed(3)
    save_file(
        {"x0": torch.randn(N, 1, 4, 4, generator=g), "cond.label": torch.arange(N) % 3},
        str(root / "data.safetensors"),
    )
    return root, [
        "--teacher",
        teacher,
        "--student_init",
        str(root / "other"),
        "--data",
        str(root / "data.safetensors"),
        "--train_batch_size",
        str(B),
        "--seed",
        str(SEED),
        "--max_train_steps",
        "1",
        "--teacher_steps",
        "3",
        "--preview_samples",
        "3",
        "--lr_warmup_steps",
        "0",
        "--max_grad_norm",
        "1e9",
        "--ema_decay",
        "0",
    ]


# ---- the first gradient ------------------------------------------------------------------------------------------------


def reference_loss(
    teacher,
    student,
    data,
    draw,
    arm="mdt",
    dt=0.01,
    c=0.1,
    jvp=False,
    guidance=(1, 1),
    shared=False,
    uniform=False,
    w="code",
    phases=1,
    time_shift=1.0,
):
    """The loss of one update, row by row, from the draws.  -> scalar, mean squared residual of each term."""
    index = draw.integer("data", N)
    x0, label, lowest = data["x0"][index], data["cond.label"][index], 1e-3 if jvp else dt
    name_t = lambda name: draw.spread(name) if uniform else torch.sigmoid(1 + draw.normal(name, ()))  # noqa: E731
    times = {name: lowest + (1 - lowest) * shift(name_t(name), time_shift) for name in ("t", "t2")}
    z, z1, z2 = (draw.normal(name, (1, 4, 4)) for name in ("z", "z1", "z2"))
    if shared:
        times["t2"], z2 = times["t"], z

    def call(net, x, t, y):
        return net(x[None], t[None], label=y[None])[0]

    def guided(x, t, y, scale):
        cond, uncond = call(teacher, x, t, y), call(teacher, x, t, torch.tensor(3))
        return cond if scale == 1 else (1 + (scale - 1)) * cond - (scale - 1) * uncond

    def derivative(x, t, v, y):
        if jvp:  # by central differences, which do not know of jvp
            h = 1e-4
            return (call(student, x + h * v, t + h, y) - call(student, x - h * v, t - h, y)) / (
                2 * h
            )
        return (call(student, x, t, y) - call(student, x - dt * v, t - dt, y)) / dt

    def tamed(d):
        return (
            d
            if c is None
            else d / (d.square().mean().sqrt() + 0.1)
            if c == "rms"
            else d / (d.norm() + c)
        )

    losses, squares = [], {"vm": [], "vd": []}
    for i in range(B):
        loss, y, t, t2 = 0.0, label[i], times["t"][i], times["t2"][i]
        if arm != "vd":
            x_t = (1 - t) * x0[i] + t * z[i]
            with torch.no_grad():
                v = guided(x_t, t, y, guidance[0])
                s, length = t - dt, t - int((t - dt) * phases) / phases
                d = derivative(x_t, t, v, y)
                below = x_t - dt * v - (s - (t - length)) * call(student, x_t - dt * v, s, y)
            phi = call(student, x_t, t, y)
            if arm == "cm":
                loss, r = (x_t - length * phi - below).square().mean(), phi - v
            elif arm == "scm":
                r = (phi - v).detach()  # the derivative's part starts at zero
                loss = (
                    (phi * tamed_rms(r)).mean()
                    + 0.5 * tamed_rms(r).square().mean()
                    - (phi.detach() * tamed_rms(r)).mean()
                )
            else:
                r = phi - (v - length * tamed(d))
                loss = r.square().mean()
            squares["vm"].append(r.detach().square().mean())
        if arm in ("mdt", "vd"):
            phi_z = call(student, z1[i], torch.tensor(1.0), y)
            with torch.no_grad():
                x_t = (1 - t2) * (z1[i] - phi_z) + t2 * z2[i]
                v = guided(x_t, t2, y, guidance[1])
                r = call(student, x_t, t2, y) + t2 * tamed(derivative(x_t, t2, v, y)) - v
                weight = {"code": 2.0, "paper": 1 - t2, "kl": (1 - t2) ** 2 / t2}[w]
            loss = (
                loss
                + (weight * r * (phi_z - phi_z.detach())).mean()
                + weight / 2 * r.square().mean()
            )
            squares["vd"].append(r.square().mean())
        losses.append(loss)
    return torch.stack(losses).mean(), {
        k: torch.stack(v).mean() if v else torch.tensor(0.0) for k, v in squares.items()
    }


def tamed_rms(r):
    return r / (r.square().mean().sqrt() + 0.1)


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
]


@pytest.mark.parametrize(
    "flags, means", CASES, ids=[" ".join(flags) or "default" for flags, _ in CASES]
)
def test_first_gradient_is_that_of_the_draws(monkeypatch, tmp_path, tiny, flags, means):
    """Every weight's gradient before clipping, and log.csv's losses; the teacher gets none and is not moved."""
    root, base = tiny
    grads, real = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda parameters, *a: (
            grads.append([p.grad.clone() for p in parameters]) or real(parameters, *a)
        ),
    )
    monkeypatch.setattr(mdt_dist, "finish", lambda *a: None)
    taught, real_freeze = [], freeze_teacher
    monkeypatch.setattr(
        mdt_dist,
        "freeze_teacher",
        lambda args, teacher, device: (
            real_freeze(args, teacher, device) or taught.append(teacher.net)
        ),
    )
    mdt_dist.main(
        [
            *base,
            "--d_norm",
            "0.1",
            "--dt",
            "0.01",
            "--t_law",
            "logit_normal",
            "--vd_weight",
            "code",
            *flags,
            "--output_dir",
            str(tmp_path / "run"),
        ]
    )
    teacher, student = (load_network(str(root / name))[0] for name in ("teacher", "other"))
    draw = Draws(SEED, 0, "student", range(B))
    loss, squares = reference_loss(
        teacher, student, load_file(root / "data.safetensors"), draw, **means
    )
    want = torch.autograd.grad(loss, list(student.parameters()))
    largest = max(v.abs().max() for v in want)
    loose = 20 if means.get("jvp") else 1
    assert largest > 1e-3 and len(grads) == 1
    for a, b in zip(grads[0], want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 * loose, atol=float(1e-3 * loose * largest))
    (row,) = [{name: float(v) for name, v in row.items()} for row in read_log(tmp_path / "run")]
    assert row["loss_vm"] + row["loss_vd"] == pytest.approx(float(loss.detach()), rel=0.01 * loose)
    assert {k: row[f"r_{k}"] ** 2 for k in squares} == pytest.approx(
        {k: float(v) for k, v in squares.items()}, rel=0.01 * loose, abs=1e-9
    )
    assert not any(p.requires_grad or p.grad is not None for p in taught[0].parameters())
    assert_bit_equal(dict(taught[0].state_dict()), load_file(root / "teacher" / WEIGHTS))


def test_times_stay_where_a_point_below_exists(monkeypatch, tmp_path):
    """t in [dt, 1], spread over all of it by either law; the difference never asks for a negative time."""
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    monkeypatch.setattr(mdt_dist, "finish", lambda *a: None)
    for law in ("logit_normal", "uniform"):
        seen, real = [], mdt_dist.time_derivative
        with monkeypatch.context() as m:
            m.setattr(
                mdt_dist,
                "time_derivative",
                lambda student, x_t, t, *a: seen.append(t) or real(student, x_t, t, *a),
            )
            mdt_dist.main(
                [
                    "--teacher",
                    "ring",
                    "--dt",
                    "0.2",
                    "--t_law",
                    law,
                    "--arm",
                    "vm",
                    "--train_batch_size",
                    "500",
                    "--max_train_steps",
                    "2",
                    "--output_dir",
                    str(tmp_path / law),
                ]
            )
        t = torch.cat(seen)
        assert 0.2 <= t.min() < 0.35 and 0.95 < t.max() <= 1
        u = (t - 0.2) / 0.8
        want = (
            0.5
            if law == "uniform"
            else torch.sigmoid(
                1 + torch.randn(100_000, generator=torch.Generator().manual_seed(0))
            ).mean()
        )
        assert abs(u.mean() - want) < 0.03


# ---- what a run leaves, resume, samples ----------------------------------------------------------------------------------


@pytest.fixture
def ring(monkeypatch):
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    return [
        "--teacher",
        "ring",
        "--train_batch_size",
        "16",
        "--lr_decay_share",
        "0",
        "--teacher_steps",
        "3",
        "--checkpointing_steps",
        "2",
    ]


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
    """Rows of both step counts and of the teacher; their samples are mdt_dist.sample's of the saved student, which --sample draws again in either count."""
    mdt_dist.main([*ring, *flags, "--max_train_steps", "3", "--output_dir", str(tmp_path / "run")])
    guided, r = "--student_guidance" in flags, load_json(str(tmp_path / "run" / "report.json"))
    calls = 2 if guided else 1
    assert {row["name"]: row["nfe"] for row in r["results"]} == {
        "data": 0,
        "teacher": 3,
        "teacher_same_steps": 2,
        "student": 2 * calls,
        "student_1": calls,
        "teacher_1": 1,
    }
    assert (
        r["method"] == "mdt_dist" and r["steps"] == 3 and all("fd" in row for row in r["results"])
    )
    assert all(
        row["paired_mse"] > 0 for row in r["results"] if row["name"] not in ("data", "teacher")
    )
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "log.csv",
        "report.json",
        "samples.png",
        "state",
        "student",
    ]
    log = read_log(tmp_path / "run")
    assert [row["step"] for row in log] == ["1", "2", "3"] and {
        "loss_vm",
        "loss_vd",
        "r_vm",
        "r_vd",
        "norm_student",
    } < set(log[0])
    time_shift = 3.0 if "3" in flags else 1.0
    sampler = load_json(str(tmp_path / "run" / "student" / "sampler.json"))
    assert sampler == {
        "method": "mdt_dist",
        "prediction": "flow_v",
        "schedule": {"type": "flow"},
        "times": step_grid(2, time_shift)[:-1],
        "timestep_shift": time_shift,
        "rule": "renoise" if "sde" in flags else "euler",
        "guidance_scale": 2.0 if guided else 1.0,
        "sample_shape": [2],
    }
    student, draw, label = (
        load_network(str(tmp_path / "run" / "student"))[0],
        Draws(0, "evaluation", 0, range(400)),
        torch.arange(400) % 4,
    )
    for steps in ([], ["--student_steps", "1"]):
        mdt_dist.main(
            ["--sample", str(tmp_path / "run"), *steps, "--output_dir", str(tmp_path / "samples")]
        )
        fresh = (lambda i: draw.normal(f"renoise{i}", (2,))) if "sde" in flags else None
        want = mdt_dist.sample(
            student,
            draw.normal("z", (2,)),
            step_grid(1 if steps else 2, time_shift),
            {"label": label},
            {"label": torch.full((400,), 4)},
            2.0 if guided else 1.0,
            fresh,
        )
        torch.testing.assert_close(
            load_file(tmp_path / "samples" / "samples.safetensors")["x0"],
            want,
            rtol=1e-4,
            atol=1e-5,
        )
        assert want.std() > 0.1


def test_resume_is_the_unbroken_run(tmp_path, ring):
    flags = [*ring, "--ema_decay", "0.5", "--output_dir"]
    mdt_dist.main([*flags, str(tmp_path / "whole"), "--max_train_steps", "4"])
    mdt_dist.main([*flags, str(tmp_path / "broken"), "--max_train_steps", "2"])
    mdt_dist.main(
        [
            *flags,
            str(tmp_path / "broken"),
            "--max_train_steps",
            "4",
            "--resume_from_checkpoint",
            "latest",
        ]
    )
    assert_bit_equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    without = [
        {k: v for k, v in row.items() if not k.endswith("_s") and k != "peak_memory_mb"}
        for f in ("whole", "broken")
        for row in read_log(tmp_path / f)
    ]
    assert without[:4] == without[4:]
    before = weights(tmp_path / "broken")
    mdt_dist.main(
        [
            *flags,
            str(tmp_path / "broken"),
            "--max_train_steps",
            "4",
            "--resume_from_checkpoint",
            "latest",
        ]
    )  # finished: written out again
    assert_bit_equal(before, weights(tmp_path / "broken"))


# ---- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--phases", "2"], "--phases: mdt leads from noise to data in one phase"),
        (["--arm", "cm", "--derivative", "jvp"], "cm takes differences by definition"),
        (["--d_norm", "L2"], "argument --d_norm"),
        (["--d_norm", "-1"], "argument --d_norm"),
        (["--dt", "0"], "argument --dt"),
        (["--arm", "none"], "argument --arm"),
        (["--student_steps", "0"], "argument --student_steps"),
        (["--data", "MISSING.safetensors"], "MISSING.safetensors does not exist"),
        (["--data", "WIDE"], "items are (1, 4, 6)"),
        (["--data", "CLASSES"], "labels from 0 to 3, the teacher has classes 0 to 2"),
        (["--teacher", "VP"], "predicts eps"),
        (["--teacher", "SS"], "needs FILE.safetensors with x0 and cond.tokens"),
        (["--teacher", "SLAT"], "with coords, feats, offsets and cond.tokens"),
        (["--teacher", "SS", "--data", "POINTS"], "points of a grid, which are not welcome here"),
        (["--teacher", "SLAT", "--data", "DENSE"], "works on points"),
        (["--sample", "RUN", "--data", "DENSE", "--student_steps", "2"], "not readable"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_wrong_input_is_one_line_before_any_training(tmp_path, capsys, tiny, flags, message):
    root, base = tiny
    tokens = torch.randn(2, 5, 10)
    save_file(
        {"x0": torch.randn(4, 1, 4, 6), "cond.label": torch.arange(4) % 3}, str(tmp_path / "WIDE")
    )
    save_file(
        {"x0": torch.randn(4, 1, 4, 4), "cond.label": torch.arange(4)}, str(tmp_path / "CLASSES")
    )
    save_file({"x0": torch.randn(2, 3, 8, 8, 8), "cond.tokens": tokens}, str(tmp_path / "DENSE"))
    save_file(
        {
            "coords": points((4, 6), 4)[:, 1:].contiguous(),
            "feats": torch.randn(10, 3),
            "offsets": torch.tensor([0, 4, 10]),
            "cond.tokens": tokens,
        },
        str(tmp_path / "POINTS"),
    )
    for name in ("WIDE", "CLASSES", "DENSE", "POINTS"):
        (tmp_path / name).rename(tmp_path / f"{name}.safetensors")
    paths = {
        name: str(tmp_path / f"{name}.safetensors")
        for name in ("WIDE", "CLASSES", "DENSE", "POINTS")
    }
    if "VP" in flags:
        paths["VP"] = save_tiny_vp_teacher(tmp_path / "vp")
    if "SS" in flags or "SLAT" in flags:
        saved = save_root(
            tmp_path, {cls: CLASSES[cls] for cls in (SparseStructureFlowModel, SLatFlowModel)}
        )
        paths |= {"SS": saved[SparseStructureFlowModel], "SLAT": saved[SLatFlowModel]}
        base = ["--teacher_steps", "0"]
    paths["RUN"] = str(tmp_path / "nothing")
    error = refusal_of(
        capsys,
        mdt_dist.main,
        *base,
        *[paths.get(f, f) for f in flags],
        "--output_dir",
        str(tmp_path / "run"),
    )
    assert message in error or "RUN" in flags and "nothing" in error, error
    assert not (tmp_path / "run").exists()


# ---- both stages of TRELLIS ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls", [SparseStructureFlowModel, SLatFlowModel], ids=["structure", "slat"]
)
def test_both_stages_on_two_ranks(monkeypatch, tmp_path, cls):
    """Two gloo ranks make one process's gradients of twice the batch (samples of like size); student/ is in TRELLIS's layout, a teacher again, and --sample
    draws the run's samples from it, with the points of --data."""
    teacher, sparse, g = (
        save_root(tmp_path, {cls: CLASSES[cls]})[cls],
        cls is SLatFlowModel,
        torch.Generator().manual_seed(0),
    )
    x0 = {"x0": torch.randn(4, 3, 4, 4, 4, generator=g)}
    if sparse:
        x0 = {
            "coords": points((6,) * 4, 8)[:, 1:].int().contiguous(),
            "feats": torch.randn(24, 3, generator=g),
            "offsets": torch.arange(0, 25, 6),
        }
    save_file(
        {**x0, "cond.tokens": torch.randn(4, 5, 10, generator=g).half()},
        str(tmp_path / "data.safetensors"),
    )
    flags = [
        "--teacher",
        teacher,
        "--data",
        str(tmp_path / "data.safetensors"),
        "--max_train_steps",
        "2",
        "--teacher_steps",
        "2",
        "--preview_samples",
        "3",
        "--learning_rate",
        "1e-4",
        "--lr_warmup_steps",
        "0",
        "--guidance_vm",
        "3",
        "--guidance_vd",
        "4",
        "--max_grad_norm",
        "1e9",
    ]
    with monkeypatch.context() as m:
        assert_two_ranks_are_one_process(m, tmp_path, mdt_dist, flags, least=1e-3)
    folder, config = tmp_path / "two" / "student", json.loads(open(teacher + ".json").read())
    name = config["name"]
    assert sorted(p.name for p in folder.iterdir()) == [
        f"{name}.json",
        f"{name}.safetensors",
        "sampler.json",
    ]
    assert json.loads((folder / f"{name}.json").read_text()) == config
    sampler = load_json(str(folder / "sampler.json"))
    assert (sampler["guidance_scale"], sampler["times"], sampler["rule"]) == (
        6.0,
        [1.0, 0.5],
        "euler",
    )
    student, start = load_network(str(folder))[0], load_network(teacher)[0]
    assert all(
        torch.equal(v, start.state_dict()[k]) == (k == "pos_emb")
        for k, v in student.state_dict().items()
    )
    assert isinstance(load_teacher(str(tmp_path / "two"), ()).net, cls)

    stored = load_file(tmp_path / "two" / "samples.safetensors")
    mdt_dist.main(
        [
            "--sample",
            str(tmp_path / "two"),
            "--data",
            str(tmp_path / "data.safetensors"),
            "--preview_samples",
            "3",
            "--output_dir",
            str(tmp_path / "drawn"),
        ]
    )
    drawn = load_file(tmp_path / "drawn" / "samples.safetensors")
    assert drawn.keys() == stored.keys() == ({"coords", "feats", "offsets"} if sparse else {"x0"})
    for k, v in stored.items():
        torch.testing.assert_close(drawn[k], v, rtol=1e-3, atol=1e-3)
    if sparse:
        assert (
            torch.equal(stored["coords"], x0["coords"][:18])
            and stored["offsets"].tolist() == [0, 6, 12, 18]
            and stored["feats"].std() > 0.1
        )
    assert (tmp_path / "two" / "samples.png").is_file() is not sparse and (
        tmp_path / "two" / "report.json"
    ).is_file()


def test_points_and_the_full_grid_train_alike(monkeypatch, tmp_path, tiny):
    """A dense network given points of the whole grid makes the dense run's loss: times, noises, norms and means reach points as they reach voxels."""
    x, t = torch.randn(2, 3, 2, 2, 2), torch.tensor([0.3, 0.8])
    coords = torch.cartesian_prod(torch.arange(2), *[torch.arange(2)] * 3)
    flat = lambda a: a.movedim(1, -1)[coords.unbind(1)]  # noqa: E731
    dense = lambda x, t: (x * expand(t, x)).sin()  # noqa: E731
    points_net = lambda x, t, coords: (x * t[coords[:, 0]][:, None]).sin()  # noqa: E731
    v = torch.randn_like(x)
    d, d_points = (
        mdt_dist.time_derivative(dense, x, t, v, {}, 0.01),
        mdt_dist.time_derivative(points_net, flat(x), t, flat(v), {"coords": coords}, 0.01),
    )
    torch.testing.assert_close(d_points, flat(d), rtol=1e-3, atol=1e-3)
    for dt in (0.01, None):
        exact = mdt_dist.time_derivative(points_net, flat(x), t, flat(v), {"coords": coords}, dt)
        torch.testing.assert_close(
            exact, flat(mdt_dist.time_derivative(dense, x, t, v, {}, dt)), rtol=1e-3, atol=1e-3
        )
