"""Pictures of docs/mdt_dist.md."""

import contextlib
import copy
import tempfile
from unittest import mock

from docs.draw.logs import read
from docs.draw.svg import Canvas

# The paper's algorithm on the ring, in a batch and for as long as one-step samples need it.
PAPER = "--teacher ring --t_law uniform --vd_weight paper --train_batch_size 128 "
PAPER += "--learning_rate 3e-4 --max_train_steps 400"


def draw(folder):
    diagram().save(f"{folder}/mdt_dist-diagram")
    curves().save(f"{folder}/mdt_dist-curves")


def diagram():
    """Velocity matching above, velocity distillation below."""
    c = Canvas(900, 450)
    c.text(24, 26, "Velocity matching, at noised data: φ is regressed onto a constant.")
    c.box("data", 66, 130, "data x_0\nnoise z", "noise", width=76)
    c.box("x_t", 215, 130, "x_t = (1−t) x_0 + t z", width=124)
    c.box("student", 400, 88, "student", "student")
    c.box("phi", 545, 88, "φ(x_t, t)", width=60)
    c.box("loss", 800, 88, "|φ − (v − t d)|^2", "loss")
    c.box("teacher", 400, 172, "teacher v", "teacher")
    c.box("below", 545, 172, "x_t − Δt v", width=70)
    c.box("lower", 660, 172, "student", "student")
    c.box("d", 800, 172, "d = (φ − φ_{below}) / Δt", width=140)
    c.arrow("data", "x_t")
    c.arrow("x_t", "student")
    c.arrow("x_t", "teacher")
    c.arrow("student", "phi")
    c.arrow("phi", "loss")
    c.arrow("teacher", "below")
    c.arrow("below", "lower")
    c.arrow("lower", "d")
    c.arrow("d", "loss", stopped=True)
    c.arrow("phi", (738, 156), "", stopped=True)
    c.arrow("loss", "student", "into φ(x_t, t) alone", "gradient", via=[(800, 50), (400, 50)])
    c.text(
        24, 246, "Velocity distillation, at the student's own one-step samples: u plays their fake."
    )
    c.box("z1", 50, 330, "noise z'", "noise")
    c.box("one", 155, 330, "student", "student")
    c.box("x", 290, 330, "x = z' − φ(z', 1)", width=110)
    c.box("x2", 470, 330, "x'_t, with z''", width=84)
    c.box("teacher2", 640, 290, "teacher v", "teacher")
    c.box("u", 640, 372, "student u = φ + t d", "student", width=150)
    c.box("r", 825, 330, "r = u − v", "gradient")
    c.arrow("z1", "one")
    c.arrow("one", "x")
    c.arrow("x", "x2", stopped=True)
    c.arrow("x2", "teacher2")
    c.arrow("x2", "u")
    c.arrow("teacher2", "r")
    c.arrow("u", "r")
    c.arrow("r", "x", "w r, into x and the student", "gradient", via=[(825, 425), (290, 425)])
    c.arrow((262, 352), (190, 352), "", "gradient")
    return c


def curves():
    """Residuals of both losses in one healthy run and three sick ones."""
    c = Canvas(900, 290)
    runs = [("healthy", "healthy", "student"), ("rate", "rate 5e-3", "teacher")]
    runs += [("law", "logit-normal times", "fake"), ("long", "small batches", "wrong")]
    titles = {
        "r_vm": "r_{vm}: rms of u − v, noised data",
        "r_vd": "r_{vd}: at the student's samples",
    }
    for x, (column, title) in zip((50, 490), titles.items()):
        series = [(text, read(f"mdt_dist-{name}", column), kind) for name, text, kind in runs]
        c.chart(x, 40, 380, 210, title, series, low=0, high=12)
    return c


# ---- well-known wrong variants, trained on the ring ----------------------------------------------


def wrong(folder):
    """mdt_dist-wrong.png: one-step samples of the teacher, of the right run, and of wrong ones."""
    from PIL import Image

    import mdt_dist
    from models.plumbing import film, report, teachers

    panels, fit, fitted = [], teachers.fit_ring_network, {}

    def keep(run, teacher, net, text):
        x = report.preview(run, teacher, mdt_dist.student_samplers(run, net, teacher)[1])
        panels.append((text, Image.fromarray(teacher.world.picture(x, film.SIDE))))

    def fit_once(teacher, seed):
        if seed not in fitted:
            fitted[seed] = fit(teacher, seed)
        return copy.deepcopy(fitted[seed])

    for text, replaced in variants(mdt_dist).items():

        def finish(run, teacher, student, times, text=text):
            if not panels:
                keep(run, teacher, teacher.net, "teacher, one step")
            keep(run, teacher, student, text)

        with tempfile.TemporaryDirectory() as run, contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(teachers, "fit_ring_network", fit_once))
            patches.enter_context(mock.patch.multiple(mdt_dist, finish=finish, **replaced))
            mdt_dist.main([*PAPER.split(), "--preview_every", "0", "--output_dir", run])
    rows = [film.beside(panels[i : i + 4]) for i in range(0, len(panels), 4)]
    sheet = Image.new("RGB", (rows[0].width, sum(r.height + 4 for r in rows) - 4), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * (row.height + 4)))
    sheet.quantize(64).save(f"{folder}/mdt_dist-wrong.png", optimize=True)


def variants(m):
    """{what a run is called: {function of mdt_dist.py: what stands in its place}}.  m: mdt_dist."""
    import torch

    derivative = m.time_derivative

    def minus(*args):
        return -derivative(*args)

    def fixed_x(student, x_t, t, v, *rest):
        return derivative(student, x_t, t, 0 * v, *rest)

    def without_t(student, x_t, t, *rest):
        return derivative(student, x_t, t, *rest) / t[:, None]

    def residual(student, teacher, x_t, t, cond, dt):
        """phi, and u - v with the gradient of every call of the student but the lower one."""
        with torch.no_grad():
            v = teacher(x_t, t, **cond)
            below = student(x_t - dt * v, t - dt, **cond)
        phi = student(x_t, t, **cond)
        return phi + t[:, None] * (phi - below) / dt - v

    def through_d(student, teacher, x0, z, t, cond, uncond, scale, dt, *rest):
        r = residual(student, teacher, m.add_noise(x0, z, t), t, cond, dt)
        return r.square().mean(), r.detach()

    def through_x(student, teacher, z1, z2, t, cond, uncond, scale, dt, d_norm, weight):
        x = z1 - student(z1, torch.ones_like(t), **cond)
        r = residual(student, teacher, m.add_noise(x, z2, t), t, cond, dt)
        w = m.distillation_weight(t, weight)[:, None]
        return (w / 2 * r.square()).mean(), r.detach()

    def displacement(student, teacher, x0, z, t, cond, *rest):
        r = student(m.add_noise(x0, z, t), t, **cond) - (z - x0)
        return r.square().mean(), r.detach()

    return {
        "right: the paper's algorithm": {},
        "target v + t d": dict(time_derivative=minus),
        "d at a fixed x_t": dict(time_derivative=fixed_x),
        "target v - d, t forgotten": dict(time_derivative=without_t),
        "VM: gradient through d": dict(velocity_matching=through_d),
        "VD: gradient through r": dict(velocity_distillation=through_x),
        "phi onto z - x0": dict(velocity_matching=displacement),
    }
