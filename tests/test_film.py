"""models/plumbing/film.py: ring.gif, the film of a run on the ring."""

import pytest
import torch
from helpers import assert_bit_equal, ring_network, save_tiny_teacher, weights
from PIL import Image, ImageColor

import dmd
from models.plumbing import film, report, teachers
from models.plumbing.run import Run, Stopped
from models.worlds.ring import RingTeacher

QUIET = "--teacher_steps 1 --train_batch_size 16 --fake_update_ratio 1".split()


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """Runs on the ring that measure nothing at their end and fit no network at their start."""
    monkeypatch.setattr(report, "finish", lambda *a, **k: None)
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    monkeypatch.setattr(film, "FRAMES", 4)


def run(folder, steps, *flags, teacher="ring"):
    """A short run of dmd.py -> its folder."""
    where = ["--teacher", teacher, "--output_dir", str(folder)]
    dmd.main([*where, "--max_train_steps", str(steps), *QUIET, *flags])
    return folder


def shown_steps(monkeypatch):
    """-> a list that gets the update number of every frame that is taken from now on."""
    taken, real = [], film.Film.take

    def take(self, done):
        taken.append(done)
        real(self, done)

    monkeypatch.setattr(film.Film, "take", take)
    return taken


# ---- frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, taken", [(8, [0, 2, 4, 6, 8]), (2, [0, 1, 2]), (9, [0, 2, 4, 6, 8])]
)
def test_a_frame_every_now_and_then(monkeypatch, tmp_path, steps, taken):
    """The first before any update, and about FRAMES more: each four panels wide, all different."""
    seen = shown_steps(monkeypatch)
    frames = film.read_gif(run(tmp_path / "run", steps) / "ring.gif")
    assert seen == taken and len(frames) == len(taken)
    assert {f.size for f in frames} == {(4 * film.SIDE + 12, film.SIDE + 18)}
    assert len({f.tobytes() for f in frames}) == len(frames)


def test_without_a_fake_score_no_untrained_network_is_shown(monkeypatch, tmp_path):
    """It would be the teacher's copy, and the difference nothing, while samples collapse."""
    mus, real = [], film.Film.__init__

    def spy(self, run, teacher, sampler, mu_real, mu_fake, **more):
        mus.append(mu_fake)
        real(self, run, teacher, sampler, mu_real, mu_fake, **more)

    monkeypatch.setattr(film.Film, "__init__", spy)
    x_t, t = torch.tensor([[0.6, -0.3]]), torch.tensor([0.4])
    label = {"label": torch.tensor([0])}
    for flags in ([], ["--no_fake_score"]):
        run(tmp_path / f"run{len(flags)}", 1, *flags)
    with_fake, without = (mu(x_t, t, label, label) for mu in mus)
    assert torch.allclose(without, x_t / 0.6) and not torch.allclose(with_fake, x_t / 0.6)


def test_a_resumed_run_goes_on_with_the_film(monkeypatch, tmp_path):
    """Killed after its save, it takes later frames again; the film is the unbroken one's."""

    class Killed(Exception):
        pass

    def end_step(self, step, **more):
        if step == 6 and self.first == 0:
            raise Killed
        return real(self, step, **more)

    saves = ["--checkpointing_steps", "5"]
    whole = film.read_gif(run(tmp_path / "whole", 8, *saves) / "ring.gif")
    real = Run.end_step
    seen = shown_steps(monkeypatch)
    with monkeypatch.context() as m:
        m.setattr(Run, "end_step", end_step)
        with pytest.raises(Killed):
            run(tmp_path / "run", 8, *saves)
    assert len(film.read_gif(tmp_path / "run" / "ring.gif")) == 3
    run(tmp_path / "run", 8, *saves, "--resume_from_checkpoint", "latest")
    assert seen == [0, 2, 4, 6, 6, 8]
    got = film.read_gif(tmp_path / "run" / "ring.gif")
    assert len(got) == len(whole) == 5
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, whole))


def test_a_longer_run_keeps_every_other_frame(monkeypatch, tmp_path):
    """With twice the updates the frames are twice as far apart, the earlier ones too."""
    seen = shown_steps(monkeypatch)
    short = film.read_gif(run(tmp_path / "run", 8) / "ring.gif")
    run(tmp_path / "run", 16, "--resume_from_checkpoint", "latest")
    assert seen == [0, 2, 4, 6, 8, 12, 16]
    long = film.read_gif(tmp_path / "run" / "ring.gif")
    assert len(long) == 5
    assert [f.tobytes() for f in long[:3]] == [f.tobytes() for f in short[::2]]


def test_a_run_that_is_stopped_between_saves_writes_its_film(tmp_path):
    """As by SIGTERM or --max_minutes: its state is saved then, and so is what goes with it."""
    with pytest.raises(Stopped):
        run(tmp_path / "run", 8, "--max_minutes", "1e-9")
    assert len(film.read_gif(tmp_path / "run" / "ring.gif")) == 1


def test_a_resumed_run_without_a_film_begins_one(monkeypatch, tmp_path):
    """As where the file was not copied; a save comes before the next frame is due."""
    with pytest.raises(Stopped):
        run(tmp_path / "run", 40, "--max_minutes", "1e-9")
    (tmp_path / "run" / "ring.gif").unlink(missing_ok=True)
    seen = shown_steps(monkeypatch)
    more = ["--checkpointing_steps", "3", "--resume_from_checkpoint", "latest"]
    run(tmp_path / "run", 40, *more)
    assert seen == [1, 10, 20, 30, 40]
    assert len(film.read_gif(tmp_path / "run" / "ring.gif")) == 5


def test_no_previews_no_film(monkeypatch, tmp_path):
    seen = shown_steps(monkeypatch)
    assert not (run(tmp_path / "run", 4, "--preview_every", "0") / "ring.gif").exists()
    assert not seen


def test_other_worlds_have_no_film(monkeypatch, tmp_path):
    """Only the plane can be drawn."""
    seen = shown_steps(monkeypatch)
    folder = run(tmp_path / "run", 2, teacher=save_tiny_teacher(tmp_path / "teacher"))
    assert not (folder / "ring.gif").exists() and not seen


def test_a_film_changes_no_weight(tmp_path):
    """Its samples and calls take nothing from the run's random numbers."""
    a = run(tmp_path / "with", 4)
    b = run(tmp_path / "without", 4, "--preview_every", "0")
    assert (a / "ring.gif").exists()
    assert_bit_equal(weights(a), weights(b))


# ---- what is drawn -------------------------------------------------------------------------------


def test_arrows_are_those_of_teacher_fake_and_difference(monkeypatch, tmp_path):
    """Along sigma^2 times the score, alpha mu - x_t, of class 0 at the film's noise level."""
    drawn, real = [], film.arrows

    def arrows(start, by, dots, colour):
        drawn.append((start, by, dots, colour))
        return real(start, by, dots, colour)

    monkeypatch.setattr(film, "arrows", arrows)
    run(tmp_path / "run", 1)
    assert [colour for *_, colour in drawn[:3]] == [film.BLUE, film.PURPLE, film.ORANGE]
    (x_t, teacher, dots, _), (_, fake, _, _), (_, difference, _, _) = drawn[:3]
    alpha, sigma = torch.full((len(x_t),), 0.6), torch.full((len(x_t),), 0.4)
    mu = RingTeacher().posterior(x_t, alpha, sigma, torch.zeros(len(x_t)).long())[1]
    torch.testing.assert_close(teacher, 0.3 * (0.6 * mu - x_t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(difference, (teacher - fake) / 0.3, rtol=1e-4, atol=1e-4)
    assert difference.norm() > 0.1 and len(x_t) == 169 and 50 < len(dots) < 150


def coloured(image, colour, apart=60):
    """Where an image has a colour, or one that is not far `apart`: rows and columns of pixels."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    pixels = pixels.reshape(image.height, image.width, 3).int()
    near = (pixels - torch.tensor(ImageColor.getrgb(colour))).abs().sum(2) < apart
    return near.nonzero().T


@pytest.mark.parametrize(
    "by, columns, rows",
    [  # a pixel is 3.2 / 232 wide; the origin is at pixel 116, up is towards row 0
        ((0.3, 0.0), (116, 137), (114, 118)),
        ((0.0, 0.3), (114, 118), (95, 116)),
        ((-0.3, 0.0), (95, 116), (114, 118)),
        ((9.0, 0.0), (116, 145), (114, 118)),  # cut to a length of 0.4
        ((0.0, 0.0), (115, 117), (115, 117)),  # a dot
    ],
)
def test_an_arrow_is_drawn_where_it_should_be(by, columns, rows):
    image = film.arrows(torch.zeros(1, 2), torch.tensor([by]), torch.zeros(0, 2), film.ORANGE)
    y, x = coloured(image, film.ORANGE, 300)  # of a thin line: half white
    for found, (low, high) in ((x, columns), (y, rows)):
        assert abs(int(found.min()) - low) <= 2 and abs(int(found.max()) - high) <= 2
    assert image.size == (film.SIDE, film.SIDE)


def test_dots_are_drawn_where_they_should_be():
    """And they lie below the arrows."""
    dots = torch.tensor([[-1.0, 1.0], [0.0, 0.0]])
    image = film.arrows(torch.zeros(1, 2), torch.tensor([[0.3, 0.0]]), dots, film.BLUE)
    y, x = coloured(image, film.FAINT)
    far = x < 100
    assert abs(x[far].float().mean() - 43.5) < 1 and abs(y[far].float().mean() - 43.5) < 1
    y, x = coloured(image, film.BLUE)
    assert ((x - 118).abs() + (y - 116).abs()).min() <= 2


def test_all_frames_have_one_palette(tmp_path):
    """So that no colour flickers: shades of the colours that are drawn with, and no others."""
    path = run(tmp_path / "run", 8) / "ring.gif"
    inks = [film.INK, film.FAINT, film.BLUE, film.PURPLE, film.ORANGE, *film.CLASSES]
    shades = film.palette(inks).getpalette()
    allowed = {tuple(shades[i : i + 3]) for i in range(0, len(shades), 3)}
    assert {ImageColor.getrgb(c) for c in inks} | {(255, 255, 255)} <= allowed
    for frame in film.read_gif(path):
        found = {colour for _, colour in frame.getcolors(10**6)}
        assert found <= allowed and 15 < len(found)
    again = tmp_path / "again.gif"  # what was read is written as it was
    film.write_gif(str(again), film.read_gif(path), 2)
    pairs = zip(film.read_gif(path), film.read_gif(again), strict=True)
    assert all(a.tobytes() == b.tobytes() for a, b in pairs)
    with Image.open(path) as gif:
        assert gif.info["loop"] == 0
