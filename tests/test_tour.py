"""docs/tour.md: its pictures, what draws them, and the numbers that it states."""

import math
import re

import pytest
import torch
from helpers import ROOT
from PIL import Image, ImageColor

from docs.tour import __main__ as tour
from docs.tour import (
    common,
    decoupled_dmd,
    dmd,
    linvideo,
    mdt_dist,
    phased_dmd,
    plane,
    tdm,
    teacher,
)
from docs.tour.common import DIFFUSION, TEACHER, data, inside, labels, width
from docs.tour.teacher import teacher_states, to_data
from models.networks.ring_dit import RingDiT
from models.networks.ring_mlp import RingMLP
from models.worlds.ring import Ring

PAGE = (ROOT / "docs" / "tour.md").read_text()
PICTURES = ROOT / "docs" / "figures" / "tour"


def pixels(image, colour, apart=40):
    """How many pixels of a picture are nearly of this colour."""
    rgb = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    near = (rgb.reshape(-1, 3).int() - torch.tensor(ImageColor.getrgb(colour))).abs().sum(1)
    return int((near < apart).sum())


# ---- the page ------------------------------------------------------------------------------------


def test_every_idea_has_its_stop():
    """In the page's order: command, picture, what to look for, what breaks it, code, its page."""
    stops = re.split(r"^## \d+\. ", PAGE, flags=re.M)[1:]
    assert len(stops) == len(tour.IDEAS) == 11
    for stop, (idea, (_, kind)) in zip(stops, tour.IDEAS.items()):
        assert f"python -m docs.tour {idea}  " in stop and f"(figures/tour/{idea}.{kind})" in stop
        for part in ("**What to look for.**", "**Try this**", "The method: [", "```python"):
            assert part in stop, (idea, part)
        assert stop.count("```math") <= 1 and len(re.findall(r"^python ", stop, re.M)) == 2


@pytest.mark.parametrize("idea", tour.IDEAS)
def test_kept_picture_can_be_projected(idea):
    """Of panels 300 pixels wide, on white, below 1 MB; films have at least 15 frames."""
    kind = tour.IDEAS[idea][1]
    path = PICTURES / f"{idea}.{kind}"
    assert path.stat().st_size < 2**20
    with Image.open(path) as image:
        assert (image.width + plane.GAP) % (plane.SIDE + plane.GAP) == 0 and image.width < 1600
        assert (kind == "gif") == (getattr(image, "n_frames", 1) >= 15)
        assert pixels(image, "white", 20) > 0.4 * image.width * image.height


def test_type_is_large_and_colours_are_the_diagrams():
    assert plane.TITLE >= 18 and plane.NOTE >= 16 and plane.SIDE >= 300
    image = plane.Plane("title", "note").image()
    assert image.size == (300, 355)
    assert len({plane.BLUE, plane.PURPLE, plane.ORANGE, plane.GREEN, plane.DARK}) == 5


# ---- what is drawn, at tiny sizes ----------------------------------------------------------------

TINY = {  # idea: arguments, columns and rows of panels, colours that have to be there
    "score": ({}, 4, 2, ["BLUE", "DARK"]),
    "few-steps": ({}, 5, 1, ["GREEN", "DARK", "LIGHT"]),
    "arrows": ({"updates": 2}, 4, 1, ["GREEN", "BLUE", "PURPLE"]),
    "collapse": ({"updates": 1, "more": 2}, 3, 1, ["GREEN"]),
    "gan": ({"updates": 1, "second": 1}, 3, 1, ["GREEN", "LIGHT"]),
    "mixture": ({"updates": 1}, 5, 2, ["GREEN", "DARK"]),
    "phases": ({"updates": 1}, 4, 1, ["GREEN", "DARK"]),
    "guidance": ({"updates": 2}, 3, 1, ["GREEN"]),
    "trajectories": ({"updates": 1}, 3, 1, ["GREEN", "BLUE"]),
    "attention": ({"updates": 1}, 4, 1, ["GREEN", "LIGHT"]),
    "transport": ({"updates": 1}, 4, 1, ["GREEN", "BLUE", "RED"]),
}


@pytest.mark.parametrize("idea", tour.IDEAS)
def test_picture_has_its_panels(idea, monkeypatch, tmp_path):
    """Each function draws as many panels as the page shows, also from untrained networks."""

    def untrained(count=2, updates=0):
        return [RingMLP(dim=16, depth=2) for _ in range(count)]

    for module in (dmd, decoupled_dmd, phased_dmd, tdm, mdt_dist):
        monkeypatch.setattr(module, "networks", untrained)
    monkeypatch.setattr(dmd, "RingMLP", lambda **more: RingMLP(dim=16, depth=2, **more))
    monkeypatch.setattr(linvideo, "fit_ring_transformer", lambda *_, **__: RingDiT())
    monkeypatch.setattr(linvideo, "GRID", [1.0, 0.5, 0.0])
    monkeypatch.setattr(plane, "ZOOM", 1)
    for module in (teacher, dmd):
        monkeypatch.setattr(module, "grid", lambda: plane.grid(5))
    torch.manual_seed(0)
    draw, kind = tour.IDEAS[idea]
    how, columns, rows, colours = TINY[idea]
    draw(str(tmp_path / f"a.{kind}"), **how)
    with (
        Image.open(tmp_path / f"a.{kind}") as image,
        Image.open(PICTURES / f"{idea}.{kind}") as kept,
    ):
        assert image.size == kept.size  # the page's picture is of this function
        side, high = plane.SIDE + plane.GAP, 355 + plane.GAP
        assert image.size == (columns * side - plane.GAP, rows * high - plane.GAP)
        if kind == "gif":
            assert image.n_frames == 2 or image.n_frames == 3
        for name in colours:
            assert pixels(image, getattr(plane, name), 100) > 20, name
        for column in range(columns):  # no panel is empty
            box = column * side, (rows - 1) * high + 27, column * side + 300, rows * high - 36
            panel = image.convert("RGB").crop(box)
            assert len(panel.getcolors(2**18)) > 2, column


def test_arrow_points_where_it_should():
    """From the middle to the right and up, in the colour asked for; long ones are cut."""
    panel = plane.Plane("")
    panel.arrows(torch.zeros(1, 2), torch.tensor([[3.0, 3.0]]), plane.ORANGE, longest=0.9)
    big = panel.picture
    half = big.width // 2
    quarter = big.crop((half, 0, big.width, half))
    assert pixels(quarter, plane.ORANGE) > 0.8 * pixels(big, plane.ORANGE) > 100
    far = big.crop((int(half * 1.5), 0, big.width, big.height // 4))
    assert pixels(far, plane.ORANGE) == 0


def test_wrong_idea_and_folder_end_in_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for argv in (["scores"], ["score", "--folder", str(tmp_path / "file")]):
        with pytest.raises(SystemExit) as stopped:
            tour.main(argv)
        assert stopped.value.code == 2
        assert "error: " in capsys.readouterr().err.splitlines()[-1]


# ---- the numbers ---------------------------------------------------------------------------------


def test_discs_hold_the_data():
    """Three deviations in the plane: 1 - exp(-4.5) = 98.9 %; the width of a mode is .10."""
    torch.manual_seed(0)
    x = data(20000)
    assert "98.9 %" in PAGE and round(1 - math.exp(-4.5), 3) == 0.989
    assert abs(inside(x) - 0.989) < 0.004 and abs(width(x) - 0.1) < 0.003
    assert abs(float(x.std()) - ((1 + 2 * 0.01) / 2) ** 0.5) < 0.01  # .71, as in stop 2


@pytest.mark.parametrize("t", [0.05, 0.4, 0.8])
def test_arrows_of_stop_1_are_the_score(t):
    """alpha E[x0 | x_t] - x_t is sigma^2 times the gradient of log p."""
    x_t = plane.grid(5).requires_grad_()
    at = torch.full((len(x_t),), t)
    log_p, _ = TEACHER.posterior(x_t, 1 - at, at)
    (score,) = torch.autograd.grad(log_p.sum(), x_t)
    torch.testing.assert_close(to_data(x_t.detach(), t), t**2 * score, atol=2e-5, rtol=1e-4)


def test_one_step_gives_the_mean():
    """Stop 2: all noises end at the mean of their class, 0; two calls on the class's axis."""
    torch.manual_seed(0)
    z = torch.randn(400, 2)
    assert teacher_states(z, 1)[-1].abs().max() < 1e-5
    shares = [inside(teacher_states(z, calls)[-1]) for calls in (1, 2, 4, 8, 63)]
    assert shares[:3] == sorted(shares[:3]) and shares[0] == 0 and min(shares[3:]) > 0.95
    two = teacher_states(z, 2)[-1][labels(400) == 0]
    assert two[:, 1].abs().max() < 0.05 < two[:, 0].abs().max()
    assert width(teacher_states(z, 8)[-1]) < 0.075 < 0.085 < width(teacher_states(z, 63)[-1])


def pull_without_fake(r, highest, n=150):
    """The mean of (mu_real - x) / |x - mu_real| at x = (r, 0) of class 0: stop 4's arrow there."""
    eps = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    eps, t = torch.cat([eps, -eps]), torch.linspace(0.02, highest, 49)
    t, eps = t.repeat_interleave(2 * n), eps.repeat(49, 1)
    x = torch.tensor([r, 0.0]).expand_as(eps)
    mu = DIFFUSION.x0(TEACHER, DIFFUSION.add_noise(x, eps, t), t, label=torch.zeros(len(t)).long())
    error = (x - mu).abs().mean(1, keepdim=True)
    return float(((mu - x) / error).mean(0)[0])


def test_where_samples_rest_without_the_fake():
    """At all levels in the middle: every radius is pulled inwards. Below .3 at the mode, 1.00."""
    assert "at radius 1.00" in PAGE
    assert all(pull_without_fake(r, 0.98) < 0 for r in (0.05, 0.2, 0.5, 0.8, 1.0, 1.3))
    low = [pull_without_fake(r, 0.3) for r in (0.1, 0.5, 0.95, 0.99, 1.01, 1.3)]
    assert min(low[:4]) > 0 > max(low[4:])


def test_faulty_teacher_is_smaller():
    """Stop 5: radius .6, and its score is exact for that ring."""
    faulty = dmd.faulty_teacher()
    assert (faulty.means.norm(dim=1) - 0.6).abs().max() < 1e-6
    torch.manual_seed(0)
    x = common.teacher_samples(torch.randn(400, 2), 16, faulty)
    assert abs(float(x.norm(dim=1).median()) - 0.6) < 0.03
    assert (Ring().exact.means.norm(dim=1) - 1).abs().max() < 1e-6  # the world's own is not touched


def fixed_spread(target, s=0.5, variance=0.51):
    """Stop 7 for one Gaussian per coordinate: the spread of x_s at which DM's mean pull is 0.

    x_t = a x_s + b eps; each target's mean given x_t is linear, its slope a moment of the targets
    at x_s and eps of variance q and 1, which `phased_dmd` makes here from unit vectors.
    """
    t = torch.linspace(s + 0.02, 0.98, 200).double()
    at = torch.full_like(t, s)
    one, zero = torch.ones(200, 1).double(), torch.zeros(200, 1).double()
    of_x = target(DIFFUSION, one, zero, at, t)[:, 0]  # the target is of_x x_s + of_eps eps
    of_eps = target(DIFFUSION, zero, one, at, t)[:, 0]
    a, b = (1 - t) / (1 - s), (t**2 - ((1 - t) / (1 - s) * s) ** 2).sqrt()
    real = (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)
    low, high = 0.01, 4.0
    for _ in range(50):
        q = (low + high) / 2
        fake = (a * q * of_x + b * of_eps) / (a**2 * q + b**2)
        wider = float((t * (fake - real)).sum()) > 0
        low, high = (q, high) if wider else (low, q)
    return q**0.5


def test_naive_target_is_too_narrow():
    """Stop 7's closed forms, .61 and .45; .61 is the spread of data noised to one half."""
    assert ".61 and .45" in PAGE
    assert round(fixed_spread(phased_dmd.phased_dmd.subinterval_target), 2) == 0.61
    assert round(fixed_spread(phased_dmd.phased_dmd.naive_target), 2) == 0.45
    assert round(((1 - 0.5) ** 2 * 0.51 + 0.5**2) ** 0.5, 2) == 0.61
    assert phased_dmd.MIDDLE == 0.5


def test_augmentation_never_stops():
    """Stop 8: mu_cond - mu_uncond points outwards on the class's axis, however far out."""
    eps = torch.randn(150, 2, generator=torch.Generator().manual_seed(0))
    eps, t = torch.cat([eps, -eps]).repeat(49, 1), torch.linspace(0.02, 0.98, 49)
    t, label = t.repeat_interleave(300), torch.zeros(49 * 300).long()
    for r in (0.1, 1.0, 3.0, 30.0, 1000.0):
        x_t = DIFFUSION.add_noise(torch.tensor([r, 0.0]).expand_as(eps), eps, t)
        mu_cond, mu_uncond = (DIFFUSION.x0(TEACHER, x_t, t, label=k) for k in (label, label + 4))
        assert float((mu_cond - mu_uncond).mean(0)[0]) > 0.01, r


def test_law_of_t_in_stop_11():
    """The sigmoid of N(1, 1) is below one half as often as N(0, 1) is below -1: one in six."""
    torch.manual_seed(0)
    share = float((mdt_dist.mostly_noise(20000) < 0.5).float().mean())
    assert abs(share - 0.5 * math.erfc(1 / 2**0.5)) < 0.015 and "one t in six" in PAGE
    assert abs(float((mdt_dist.uniform(1000) < 0.5).float().mean()) - 0.5) < 0.01


def test_exact_average_velocity_misses_nothing():
    """Stop 11's right panel is 0 for phi = (x_t - x_0) / t along the teacher's own paths."""
    torch.manual_seed(0)
    states = teacher_states(torch.randn(40, 2), 8)

    def phi(x_t, t, label=None):
        place = next(i for i in range(8) if torch.equal(x_t, states[i]))
        return (x_t - states[-1]) / (
            1 - place / 8
        )  # the time that the state has, not the one given

    assert max(mdt_dist.misses(phi, states)) < 1e-5
    assert max(mdt_dist.misses(TEACHER, states)) > 0.3  # the velocity itself is no average


def test_banks_of_stop_10_have_the_teachers_velocities():
    """On-policy means the student's states; the velocities are the teacher's in both banks."""
    torch.manual_seed(0)
    z, student = torch.randn(8, 2), RingMLP()
    own = linvideo.bank_of(TEACHER, z, student)
    torch.testing.assert_close(own["x"][:, 1], z + (linvideo.GRID[1] - 1) * student(
        z, torch.ones(8), label=labels(8)), atol=1e-5, rtol=1e-4)  # fmt: skip
    t = torch.full((8,), linvideo.GRID[3])
    torch.testing.assert_close(own["v"][:, 3], TEACHER(own["x"][:, 3], t, labels(8)))
    assert linvideo.walk(TEACHER, z).shape == (11, 8, 2)
