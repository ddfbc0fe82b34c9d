"""Pictures of docs/dmd.md."""

from docs.draw.logs import read
from docs.draw.svg import Canvas


def draw(folder):
    diagram().save(f"{folder}/dmd-diagram")
    steps().save(f"{folder}/dmd-steps")
    curves().save(f"{folder}/dmd-curves")


def diagram():
    """One update of the student, and one of the fake score."""
    c = Canvas(900, 425)
    c.text(
        24,
        28,
        "The student's update: two scores at its noised sample say where to move it.",
        "sample",
    )
    c.box("z", 60, 120, "noise z", "noise", 64)
    c.box("student", 175, 120, "student G", "student")
    c.box("x", 300, 120, "x = G(z)", width=70)
    c.box("x_t", 455, 120, "x_t = α_t x + σ_t ε", width=130)
    c.box("eps", 455, 62, "fresh ε, random t", "noise", 120)
    c.box("teacher", 630, 80, "teacher μ_{real}", "teacher", 120)
    c.box("fake", 630, 160, "fake μ_{fake}", "fake", 120)
    c.box("g", 800, 120, "g = (μ_{fake} − μ_{real})\n/ mean of |x − μ_{real}|", "gradient", 170)
    c.arrow("z", "student")
    c.arrow("student", "x")
    c.arrow("x", "x_t", stopped=True)
    c.arrow("eps", "x_t")
    for name in ("teacher", "fake"):
        c.arrow("x_t", name)
        c.arrow(name, "g")
    round_trip = [(800, 212), (300, 212)]
    c.arrow("g", "x", "g, a constant, is what x gets as its gradient", "gradient", round_trip)
    c.arrow((270, 134), (225, 134), "", "gradient")
    c.text(248, 156, "to G", "gradient", "middle", 12)
    c.text(
        24,
        255,
        "The fake's update, R times after it: learn to denoise what the student makes now.",
        "sample",
    )
    c.box("z2", 60, 325, "noise z", "noise", 64)
    c.box("student2", 175, 325, "student G", "student")
    c.box("x2", 300, 325, "x = G(z)", width=70)
    c.box("x_t2", 455, 325, "x_t = α_t x + σ_t ε", width=130)
    c.box("fake2", 630, 325, "fake μ_{fake}", "fake", 120)
    c.box("loss", 800, 325, "| μ_{fake} − x |^2", "loss", 130)
    c.arrow("z2", "student2")
    c.arrow("student2", "x2", stopped=True)
    c.arrow("x2", "x_t2")
    c.arrow("x_t2", "fake2")
    c.arrow("fake2", "loss")
    c.arrow("x2", "loss", "the target", via=[(300, 283), (800, 283)])
    c.arrow("loss", "fake2", "", "gradient", via=[(800, 370), (630, 370)])
    return c.legend(408)


def steps():
    """Backward simulation, and the two turns of the GAN."""
    c = Canvas(900, 470)
    c.text(
        24,
        28,
        "Several steps: the input of step k (here 3) is made by the student's own steps.",
        "sample",
    )
    c.box("z", 50, 100, "noise z", "noise", 60)
    places = (150, 400, 650)
    for i, x in enumerate(places):
        c.box(f"G{i}", x, 100, f"G, at t_{i + 1}", "student", 80)
    for i, x in enumerate((265, 515)):
        c.box(f"x{i}", x, 100, f"x_{{t{i + 2}}}", width=34)
        c.box(f"eps{i}", x, 52, "fresh ε", "noise", 54)
        c.arrow(f"eps{i}", f"x{i}")
        c.arrow(f"G{i}", f"x{i}")
    c.arrow("z", "G0")
    c.arrow("x0", "G1")
    c.arrow("x1", "G2", stopped=True)
    c.box("x", 770, 100, "x", width=24)
    c.arrow("G2", "x")
    c.arrow((850, 114), (786, 114), "", "gradient")
    c.arrow((756, 114), (696, 114), "", "gradient")
    c.text(820, 136, "from g", "gradient", "middle", 12)
    c.text(275, 142, "without gradient: these calls only make the input", None, "middle", 12)
    c.text(650, 142, "the one call with gradient", "student", "middle", 12)
    c.text(
        24,
        192,
        "The GAN: a small head on the fake's middle features tells samples from data.",
        "sample",
    )
    c.box("real", 70, 250, "real x", width=52)
    c.box("own", 70, 330, "student's x", width=88)
    c.box("noised", 240, 290, "each noised,\nown ε and t", width=100)
    c.box("half", 410, 290, "fake, first half", "fake", 130)
    c.box("head", 565, 290, "head", "fake", 62)
    c.box("d", 740, 262, "two logits: real or fake?", "loss", 190)
    c.box("s", 740, 318, "student's logit: real!", "loss", 190)
    for start, end in (("real", "noised"), ("own", "noised"), ("noised", "half"), ("half", "head")):
        c.arrow(start, end)
    c.arrow("head", "d")
    c.arrow("head", "s")
    to_fake = [(740, 222), (565, 222)]
    c.arrow("d", "head", "", "gradient", to_fake)
    c.arrow((565, 222), "half", "", "gradient", [(410, 222)])
    c.text(
        488,
        215,
        "discriminator's turn, x detached: head and first half learn",
        "gradient",
        "middle",
        12,
    )
    c.arrow("s", "own", "", "gradient", [(740, 388), (70, 388)])
    c.text(
        410,
        381,
        "student's turn: through both, which are frozen, into x and on to G",
        "gradient",
        "middle",
        12,
    )
    return c.legend(445, frozen=False)


RUNS = [  # of docs/figures/logs: name of the file, words, colour
    ("healthy", "healthy", "student"),
    ("slow", "fake too slow", "gradient"),
    ("fast", "student too fast", "wrong"),
    ("alone", "no fake score", "noise"),
]


def curves():
    """A healthy run on the ring and three sick ones."""
    c = Canvas(900, 295)
    charts = [
        ("spread of the samples", "std", RUNS, 1.5),
        ("cosine of fake and teacher", "dm_cos", RUNS, 1),
        ("the fake's loss", "loss_fake", RUNS[:3], 3),  # the last run has no fake
    ]
    for i, (title, column, runs, high) in enumerate(charts):
        lines = [("", read(f"dmd-{name}", column), kind) for name, _, kind in runs]
        c.chart(50 + 295 * i, 35, 235, 200, title, lines, 0, high)
    for i, (_, words, kind) in enumerate(RUNS):
        c.text(50 + 200 * i, 280, words, kind)
    return c


# ---- what well-known wrong variants do -----------------------------------------------------------


def wrong(folder):
    """dmd-wrong.png: the samples of right runs on the ring, and of wrong ones.

    A variant is a flag, or a function that replaces one of dmd.py's for the run.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image

    import dmd
    from models.diffusion import expand
    from models.pictures import save_grid
    from models.plumbing.film import beside

    right = dmd.dmd_loss

    def sign(x, *rest):
        _, g, *mu = right(x, *rest)
        return 0.5 * F.mse_loss(x, (x + g).detach()), g, *mu

    def not_stopped(x, *rest):
        _, g, *mu = right(x, *rest)
        return 0.5 * F.mse_loss(x, x - g), g, *mu

    def batch_mean(x, *rest):
        _, _, mu_real, mu_fake = right(x, *rest)
        g = (mu_fake - mu_real) / (x - mu_real).abs().mean()
        return 0.5 * F.mse_loss(x, (x - g).detach()), g.detach(), mu_real, mu_fake

    def with_gradient(x, teacher, fake, diffusion, eps, t, cond, uncond, fake_cond, scale):
        x_t = diffusion.add_noise(x, eps, t)
        mu_real = diffusion.guided_x0(teacher, x_t, t, cond, uncond, scale)
        mu_fake = diffusion.x0(fake, x_t, t, **fake_cond)
        error = (x - mu_real).abs().flatten(1).mean(1)
        g = (mu_fake - mu_real) / expand(error, x)
        return 0.5 * F.mse_loss(x, x - g), g.detach(), mu_real, mu_fake

    def not_detached(x, teacher, fake, diffusion, eps, t, cond, uncond, fake_cond, scale):
        loss, *more = right(x, teacher, fake, diffusion, eps, t, cond, uncond, fake_cond, scale)
        x_t = diffusion.add_noise(x, eps, t)
        fakes = F.mse_loss(fake(x_t, t, **fake_cond), diffusion.target(x, eps, t))
        return loss + fakes, *more

    def guided_fake(x, teacher, fake, diffusion, eps, t, cond, uncond, fake_cond, scale):
        with torch.no_grad():
            x_t = diffusion.add_noise(x, eps, t)
            mu_real = diffusion.guided_x0(teacher, x_t, t, cond, uncond, scale)
            mu_fake = diffusion.guided_x0(fake, x_t, t, fake_cond, uncond, scale)
            error = (x - mu_real).abs().flatten(1).mean(1)
            g = (mu_fake - mu_real) / expand(error, x)
        return 0.5 * F.mse_loss(x, (x - g).detach()), g, mu_real, mu_fake

    guided = "--guidance_scale 3"
    slow = "--fake_update_ratio 1 --learning_rate_fake 2e-6"
    above = [
        ("right", ""),
        ("no fake score", "--no_fake_score"),
        ("sign of g reversed", "", sign),
        ("fake too slow", slow),
        ("right, guidance 3", guided),
    ]
    below = [
        ("target not detached", "", not_stopped),
        ("through the scores", "", with_gradient),
        ("x not detached for fake", "", not_detached),
        ("mean over the batch", "", batch_mean),
        ("guidance 3, fake too", guided, guided_fake),
    ]
    sheet = []
    for text, row in (("400 updates of dmd.py on the ring", above), ("", below)):
        panels = []
        for name, *how in row:
            x, image = ring_samples(*how)
            panels.append((f"{name}: spread {x.std():.2g}", Image.fromarray(image)))
        sheet.append((text, np.asarray(beside(panels))))
    save_grid(f"{folder}/dmd-wrong.png", sheet)


def ring_samples(flags, loss=None):
    """A run on the ring, with another function as dmd_loss.  -> its samples, their picture."""
    import tempfile
    from unittest import mock

    import dmd
    from models.plumbing import film, report

    found = []

    def finish(run, teacher, times, samplers, *rest, **more):
        x = report.preview(run, teacher, samplers["student"][1])
        found[:] = x, teacher.world.picture(x, film.SIDE)

    loss = mock.patch.object(dmd, "dmd_loss", loss or dmd.dmd_loss)
    with tempfile.TemporaryDirectory() as out, loss, mock.patch.object(report, "finish", finish):
        fixed = f"--teacher ring --seed 0 --preview_every 0 --output_dir {out}/run"
        dmd.main([*fixed.split(), *flags.split()])
    return found
