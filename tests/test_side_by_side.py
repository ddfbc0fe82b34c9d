"""All methods in one table: MeanFlow in closed form, counted calls, the page."""

import functools
import types

import pytest
import torch
from helpers import perturbed
from test_mdt_math import close, gaussian_velocity, marginal, marginal_points, normal

from models.diffusion import expand, step_grid
from models.draws import Draws
from models.files import UserError, save_json, save_tensors
from models.networks.dit import DiT
from tests import meanflow, side_by_side

# ---- MeanFlow ------------------------------------------------------------------------------------

R, T = (torch.tensor(values, dtype=torch.float64) for values in ([0, 0.1, 0.4], [1, 0.3, 0.9]))


def gaussian_average(x, r, t):
    """The average velocity from t down to r where data are Gaussian: the ODE scales deviations."""
    (mean_t, std_t), (mean_r, std_r) = marginal(x, t), marginal(x, r)
    x_r = mean_r + std_r / std_t * (x - mean_t)
    return (x - x_r) / expand(t - r, x)


def test_exact_average_velocity_is_the_fixed_point():
    """Of a Gaussian teacher. With the other sign of the derivative's term it is not, by far."""
    x = marginal_points(T)
    v = gaussian_velocity(x, T)
    u, target = meanflow.mean_flow_target(gaussian_average, x, v, R, T)
    close(u, gaussian_average(x, R, T))
    close(target, u)
    wrong = v + (v - target)  # v + (t - r) du/dt
    assert ((wrong - u).norm(dim=1) > 0.3 * (v - u).norm(dim=1)).all()
    loss, error = meanflow.mean_flow_loss(gaussian_average, x, v, R, T)
    assert loss < 1e-15 and error.max() < 1e-20
    # an error in the velocity alone, or a derivative at fixed x, moves it
    for other in (v + 0.3, 0 * v):
        _, target = meanflow.mean_flow_target(gaussian_average, x, other, R, T)
        assert (target - u).abs().min() > 1e-3


def test_loss_has_the_gradient_of_a_regression_onto_a_constant():
    """2 w (u - target) du, with w = 1 / (|u - target|^2 + c)^p a constant; none through du/dt."""
    x, W = marginal_points(T), normal(7, 7, seed=3).requires_grad_()
    v = gaussian_velocity(x, T)

    def average(x, r, t):
        return torch.tanh(x @ W * expand(t, x)) + expand(r, x)

    for p in (0.0, 1.0):
        loss, error = meanflow.mean_flow_loss(average, x, v, R, T, p)
        got = torch.autograd.grad(loss, W)[0]
        u, target = meanflow.mean_flow_target(average, x, v, R, T)
        assert not target.requires_grad
        close(error, (u - target).detach().square().sum(1))
        w = 1 / (error + 1e-3) ** p
        close(got, torch.autograd.grad(((u - target).square().sum(1) * w).mean(), W)[0])
        assert got.abs().max() > 1e-3


def test_where_both_times_are_one_it_is_flow_matching():
    x, v = marginal_points(T), normal(3, 7, seed=4)
    _, target = meanflow.mean_flow_target(lambda x, r, t: x * expand(t - r, x), x, v, T, T)
    close(target, v)


def test_any_grid_ends_where_the_trajectory_does():
    """With the exact average velocity, from z to mean + std z, of data."""
    z, ends = normal(5, 7, seed=2), []
    for grid in ([1.0, 0.0], step_grid(3, 2.0)):
        ends.append(meanflow.sample(gaussian_average, z, grid))
    mean, std = marginal(z, torch.zeros(5, dtype=torch.float64))
    for end in ends:
        close(end, mean + std * z)


def test_times_are_ordered_and_some_are_one():
    draw = Draws(0, 0, "student", range(400), timestep_shift=2.0)
    r, t = meanflow.draw_times(draw)
    assert ((0 <= r) & (r <= t) & (t <= 1)).all()
    assert float((r < t).float().mean()) == pytest.approx(meanflow.APART, abs=0.01)


def tiny(**more):
    torch.manual_seed(0)
    size = dict(size=(8, 8), patch=(4, 4), channels=1, dim=32, depth=2, num_classes=3)
    return perturbed(DiT(**size, **more), std=0.1)


def test_derivative_passes_through_a_network_and_its_interval():
    """The network's own, by differences; its input `steps` moves with t, since r stands still."""
    net = tiny(steps_cond=True).double()
    x, v, cond = normal(3, 1, 8, 8), normal(3, 1, 8, 8, seed=1), {"label": torch.arange(3)}
    at = functools.partial(meanflow.average_velocity, net, 0.02, cond=cond)
    u, target = meanflow.mean_flow_target(at, x, v, R, T)
    slope, dt = (v - target) / expand(T - R, v), 1e-3
    difference = (u - at(x - dt * v, R, T - dt)) / dt
    assert (slope - difference).norm() < 0.02 * slope.norm()
    still = (u - net(x - dt * v, 0.02 * (T - dt), steps=10 * (T - R), **cond)) / dt
    assert (slope - still).norm() > 0.1 * slope.norm()


# ---- counted calls -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, flags, before, rows",
    [
        # student: 1.5 calls to its input, one with gradients (3), teacher, fake; the fake twice 3,
        # once on the student's samples and once on new ones, 2.5 calls
        ("dmd", "--student_steps 4", 0, 1.5 + 3 + 1 + 1 + 3 + 2.5 + 3),
        # v1: 5 pairs of 2 Heun steps, 3 calls; the regression's own call with gradients
        (
            "dmd",
            "--fake_update_ratio 1 --regression_weight 0.25 --regression_pairs 5 --teacher_steps 2",
            5 * 3,
            3 + 1 + 1 + 3 + 3,
        ),
        # both halves of the guided gradient have a noise of their own: three calls of the teacher
        ("decoupled_dmd", "--student_steps 2", 0, 0.5 + 3 + 3 + 1 + 3 + 1.5 + 3),
    ],
    ids=["dmd2", "dmd v1", "decoupled"],
)
def test_calls_of_an_update_are_what_one_counts_by_hand(script, flags, before, rows):
    flags = [*flags.split(), "--train_batch_size", "4"]
    assert side_by_side.calls_of(script, "glyphs", flags) == (before, 4 * rows)


def test_price_of_a_call():
    """Weights' gradient 2, the input's alone 1, a forward-mode derivative 1, half for features."""
    net, x, t = tiny(), torch.randn(3, 1, 8, 8), torch.rand(3)
    calls = side_by_side.Calls()

    def counted(function):
        handle = side_by_side.register_module_forward_hook(calls)
        calls.start()
        try:
            function()
        finally:
            handle.remove()
        return calls.total / len(x)

    assert counted(lambda: net(x, t)) == 3
    assert counted(lambda: net(x, t, return_features=True)) == 1.5
    with torch.no_grad():
        assert counted(lambda: net(x, t)) == 1
    with meanflow.sdpa_kernel(meanflow.SDPBackend.MATH):
        assert counted(lambda: torch.func.jvp(lambda y: net(y, t), (x,), (x,))) == 4
    net.requires_grad_(False)
    assert counted(lambda: net(x, t)) == 1
    assert counted(lambda: net(x.clone().requires_grad_(), t)) == 2
    calls.stop()
    assert counted(lambda: calls.stop()) == 0


# ---- the table -----------------------------------------------------------------------------------


def finished(folder, name, fd, seed=0, calls=1000):
    """What a finished run leaves, of which its report has the rows of two step counts."""
    out = folder / f"glyphs-{name}-{seed}-{calls}"
    rows = {"teacher": 63, "teacher_same_steps": 4, "student": 4, "student_1": 1}
    results = [
        {"name": row, "nfe": n, "fd": fd + n, "patch_swd": 12.345, "accuracy": 0.5, "diversity": 1}
        for row, n in rows.items()
    ]
    out.mkdir(parents=True)
    save_json({"results": results}, str(out / "report.json"))
    more = {"calls": calls - 10.0 * seed - 5, "updates": 7, "seconds": 61.23}
    save_json(more, str(out / "side_by_side.json"))
    shown = {row: torch.zeros(10, 3, 16, 16) for row in rows}
    save_tensors(shown, str(out / "shown.safetensors"))


def test_table_is_made_from_finished_runs(tmp_path, capsys, monkeypatch):
    """Without training; a mean and a range of several seeds, a dash with its reason, "not run"."""
    runs, page = tmp_path / "runs", tmp_path / "page.md"
    monkeypatch.setattr(side_by_side, "PAGE", str(page))
    monkeypatch.setattr(side_by_side, "FIGURES", str(tmp_path))
    for name, fds in (("dmd2-1", (2, 4)), ("mdt", (7, 9))):
        for seed, fd in enumerate(fds):
            finished(runs, name, fd, seed)
    page.write_text("# A page\n\nWords.\n")
    argv = f"glyphs --finished --write --calls 1000 --output_dir {runs} --seeds 0 1".split()
    argv += ["--steps", "1", "--methods", "teacher", "dmd2", "phased", "tdm", "mdt"]
    for _ in range(2):  # a second time the page's part is replaced
        side_by_side.main(argv)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("| 1 step | calls | fd | patch_swd | accuracy")
        cells = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in lines[2:7]}
        assert cells["DMD2, without its GAN"][:2] == ["4", "7 (6-8)"]
        assert cells["MDT-dist (sees data)"][:2] == ["1", "9 (8-10)"]
        assert cells["MDT-dist (sees data)"][-2:] == ["7", "61.2 (61.2-61.2) |"]
        assert cells["teacher, as many steps"][-2:] == ["", " |"]
        assert cells["TDM"][0] == "not run" and cells["Phased DMD, 2 phases"][0] == "-"
        assert lines[-1] == "Phased DMD, 2 phases: - because one step is one phase, which is DMD2."
        text = page.read_text()
        assert text.startswith("# A page\n\nWords.\n") and text.count("## Glyphs") == 1
        assert "counted 985 to 995 calls" in text and lines[2] in text
        assert (tmp_path / "side_by_side-glyphs.png").stat().st_size > 1000


def test_wrong_input_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        side_by_side.main(["glyphs", "--methods", "nobody"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "'nobody'" in error
    flags = side_by_side.flags_of("glyphs", "dmd-1")[1]
    known = {"flags": flags, "before": 16128, "update": 704}
    save_json(known, str(tmp_path / "glyphs-dmd-1-update.json"))
    args = types.SimpleNamespace(world="glyphs", calls=17000, output_dir=str(tmp_path))
    with pytest.raises(UserError, match="give --calls 17537 or more"):
        side_by_side.updates_of(args, "dmd-1")
    args.calls = 17537
    assert side_by_side.updates_of(args, "dmd-1") == 2
