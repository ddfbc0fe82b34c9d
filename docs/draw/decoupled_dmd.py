"""Pictures of docs/decoupled_dmd.md and docs/results/decoupled_dmd.md.

python -m docs.draw.decoupled_dmd runs/orderings     # keeps the curves of tests.orderings' runs
"""

import contextlib
import json
import math
import os
import sys
import tempfile
from unittest import mock

from docs.draw.logs import FOLDER, read, smooth
from docs.draw.svg import Canvas


def draw(folder):
    diagram().save(f"{folder}/decoupled_dmd-diagram")
    curves().save(f"{folder}/decoupled_dmd-curves")
    training().save(f"{folder}/decoupled_dmd-training")
    orderings(RING, RING_AXES).save(f"{folder}/decoupled_dmd-ring-orderings")
    orderings(GLYPHS, GLYPHS_AXES).save(f"{folder}/decoupled_dmd-glyphs-orderings")


def diagram():
    """One update of the student, its gradient in two halves, and one of the fake score."""
    c = Canvas(900, 470)
    c.text(24, 28, "Student's update: two halves of one gradient, each at its own noise level.")
    c.box("x_in", 62, 195, "x_{in} at u_k:\nnoise, or k own\nsteps from it", "noise", 96)
    c.box("student", 185, 195, "student G", "student")
    c.box("x", 280, 195, "x", width=24)
    c.box("x_dm", 402, 110, "x_{dm} = x noised to t_{dm}", width=170)
    c.box("x_ca", 402, 280, "x_{ca} = x noised to t_{ca}", width=170)
    c.box("real", 582, 82, "teacher(x_{dm}, c)", "teacher", 120)
    c.box("fake", 582, 138, "fake(x_{dm}, c)", "fake", 120)
    c.box("cond", 582, 252, "teacher(x_{ca}, c)", "teacher", 120)
    c.box("uncond", 582, 308, "teacher(x_{ca}, ∅)", "teacher", 120)
    c.box("g_dm", 772, 110, "g_{dm} = μ_{fake} − μ_{real}", "gradient", 206)
    c.box("g_ca", 772, 280, "g_{ca} = (α−1) (μ_{uncond} − μ_{cond})", "gradient", 206)
    c.box("g", 772, 195, "g_{dm} + g_{ca}", "gradient", 92)
    c.text(669, 78, "distribution matching (DM)", "gradient")
    c.text(669, 322, "CFG augmentation (CA)", "gradient")
    c.arrow("x_in", "student")
    c.arrow("student", "x")
    c.arrow("x", "x_dm", stopped=True)
    c.arrow("x", "x_ca", stopped=True)
    for term, nets in (("dm", ("real", "fake")), ("ca", ("cond", "uncond"))):
        for net in nets:
            c.arrow(f"x_{term}", net)
            c.arrow(net, f"g_{term}")
        c.arrow(f"g_{term}", "g", "", "gradient")
    c.arrow("g", "x", "the sum enters x, and from there G only", "gradient", at=0.55)
    c.arrow((266, 205), (236, 205), "", "gradient")
    levels(c, 337, 72, 1.0, "u_{dm}: all levels", above=True)
    levels(c, 337, 306, 0.5, "u_{ca}: cleaner than the input")
    c.text(24, 376, "Fake's update, R times after it: learn to denoise what G makes now.")
    c.box("x2", 280, 424, "x, detached")
    c.box("x_t2", 402, 424, "x_t")
    c.box("fake2", 582, 424, "fake(x_t, c)", "fake", 120)
    c.box("l2", 772, 424, "|fake − target|^2", "loss", 140)
    c.arrow("x2", "x_t2")
    c.arrow("x_t2", "fake2", "u: all levels", at=0.5)
    c.arrow("fake2", "l2")
    c.arrow("l2", "fake2", "", "gradient", via=[(772, 458), (582, 458)])
    return c


def levels(c, x, y, top, text, above=False, width=130):
    """The noise axis, 0 (data) to 1 (noise), of which [0, top] is used, and u_k in its middle."""

    def draw(colour, theme):
        shape = f'<rect x="{x}" y="{y}" width="{width}" height="7" fill="{theme["line"]}"/>'
        used = f'<rect x="{x}" y="{y}" width="{top * width:g}" height="7"'
        shape += f'{used} fill="{colour("gradient")}"/>'
        at, ink = x + width / 2, colour("sample")
        return shape + f'<path d="M{at:g} {y - 4} V{y + 11}" stroke="{ink}" stroke-width="2"/>'

    c.shapes.append(draw)
    c.text(x - 6, y + 8, "0", anchor="end", size=11)
    c.text(x + width + 6, y + 8, "1", size=11)
    c.text(x + width / 2, y - 12 if above else y + 40, text, anchor="middle", size=12)
    c.text(x + width / 2, y + 22, "u_k", anchor="middle", size=11)


# ---- curves --------------------------------------------------------------------------------------

RUNS = {  # name of a log: what the picture calls it, its colour
    "healthy": ("healthy: the default", "student"),
    "slow-fake": ("sick: the fake too slow", "fake"),
    "ca-alone": ("sick: CA alone, a tenth of the rate", "wrong"),
}
METHODS = {  # of tests.orderings
    "ca": ("CA alone", "wrong"),
    "dm": ("DM alone", "teacher"),
    "shared": ("CA + DM, shared (DMD)", "fake"),
    "hybrid": ("CA + DM, hybrid (the paper's)", "student"),
    "ca-mean-variance": ("CA + Eq. 7", "gradient"),
}


def beside(prefix, names, charts, width, height=200):
    """Charts side by side, [(column, title, low, high, log), ...], with one legend above.

    width: of the running mean.
    """
    top = 42 + 18 * math.ceil(len(names) / 3)
    c = Canvas(940, top + height + 24)
    for i, (text, kind) in enumerate(names.values()):
        column, row = i % 3, i // 3
        c.text(52 + 300 * column, 24 + 18 * row, f"— {text}", kind)
    for i, (column, title, low, high, log) in enumerate(charts):
        lines = [
            ("", smooth(read(f"{prefix}-{name}", column), width), kind)
            for name, (_, kind) in names.items()
        ]
        c.chart(52 + 308 * i, top, 244, height, title, lines, low, high, log)
    return c


def curves():
    """log.csv of a healthy run on the ring and of two sick ones."""
    charts = [
        ("std", "std of the samples", 0.2, 2.0, False),
        ("loss_fake", "loss of the fake", 0.5, 10, True),
        ("cos_dm_ca", "cosine of DM's gradient and CA's", -0.4, 0.2, False),
    ]
    return beside("decoupled_dmd", RUNS, charts, 9)


def training():
    """What tests.orderings measured during runs at a tenth of the rate, seed 0."""
    charts = [
        ("log_p", "log p(c | x)", -1.1, 0, False),
        ("fd_teacher", "distance to the guided teacher", 3, 1e4, True),
        ("std", "std of the samples", 0.4, 2.0, False),
    ]
    return beside("decoupled_dmd-ordering", METHODS, charts, 1)


def keep(runs):
    """The curves of seed 0 in runs/orderings, as docs/figures/logs: eight points of each run."""
    columns = "log_p", "fd_teacher", "std"
    for name in METHODS:
        with open(f"{runs}/decoupled_dmd-ring-{name}-0-learning_rate5e-5/curve.json") as f:
            points = json.load(f)["points"]
        with open(os.path.join(FOLDER, f"decoupled_dmd-ordering-{name}.csv"), "w") as f:
            print("step", *columns, sep=",", file=f)
            for i, point in enumerate(points):
                print(50 * (i + 1), *(f"{point[c]:.4g}" for c in columns), sep=",", file=f)


# ---- where the methods ended ---------------------------------------------------------------------

# The tables of docs/results/decoupled_dmd.md: method, its colour, and for each axis a value or
# (mean, lowest, highest); None is not shown.
RING_AXES = [  # title, ends, ticks, log, what the guided teacher has
    ("distance to the guided teacher", (3, 2000), (3, 10, 30, 100, 300, 1000), True, None),
    ("log p(c | x)", (-1.15, 0), (-1, -0.5, 0), False, -0.912),
    ("diversity", (0.4, 1.4), (0.5, 1), False, 1.05),
]
RING = [
    ("CA alone", "wrong", 5e11, -0.04, 2000),
    ("CA + mean-variance KL (Eq. 7)", "gradient", (865, 762, 932), -0.984, 0.46),
    ("DM alone", "teacher", (14, 8, 18), -0.988, 0.98),
    ("CA + DM, shared (DMD)", "fake", (78, 73, 83), -0.75, 1.28),
    ("CA + DM, full", "fake", (73, 70, 74), -0.749, 1.28),
    ("CA + DM, constrained", "student", (9.6, 8.5, 12), -0.95, 1.01),
    ("CA + DM, hybrid (the paper's)", "student", (12, 4, 16), -0.932, 1.03),
    ("shared, one fake for all steps", "noise", (76, 58, 109), -0.761, 1.24),
    ("full, one fake for all steps", "noise", (64, 56, 75), -0.765, 1.25),
    ("constrained, one fake for all steps", "noise", (26, 20, 36), -1.01, 0.93),
    ("hybrid, one fake for all steps", "noise", (58, 55, 62), -1.10, 0.84),
]
GLYPHS_AXES = [
    ("distance to the guided teacher", (10, 1000), (10, 30, 100, 300, 1000), True, None),
    ("log p(c | x)", (-2, 0), (-2, -1, 0), False, -0.10),
    ("std (dashed: the data's)", (0.25, 0.55), (0.3, 0.4, 0.5), False, 0.37),
]
GLYPHS = [
    ("CA alone", "wrong", (774, 725, 836), -5.82, 2.6),
    ("CA + GAN", "gradient", (259, 169, 432), -2.86, 0.30),
    ("CA + mean-variance KL (Eq. 7)", "gradient", (138, 128, 152), -0.07, 0.36),
    ("DM alone", "teacher", (27, 24, 30), -0.62, 0.36),
    ("CA + DM, shared (DMD)", "fake", (24, 22, 27), -0.03, 0.48),
    ("CA + DM, full", "fake", (24, 22, 26), -0.03, 0.48),
    ("CA + DM, constrained", "student", (15, 13, 18), -0.06, 0.48),
    ("CA + DM, hybrid (the paper's)", "student", (26, 24, 28), -0.25, 0.37),
    ("hybrid, one fake for all steps", "noise", (97, 90, 107), -1.81, 0.29),
]


def orderings(rows, axes, width=940):
    """A row for each method, an axis for each measure: mean as a dot, range as a bar."""
    c, top, left, step, across = Canvas(width, 78 + 24 * len(rows)), 52, 256, 232, 196
    bottom = top + 24 * len(rows) - 4

    def place(axis, value):
        _, (low, high), _, log, _ = axis
        scale = math.log10 if log else float
        return (scale(value) - scale(low)) / (scale(high) - scale(low)) * across

    def grid(colour, theme):
        shape = ""
        for i, axis in enumerate(axes):
            x, (_, _, marks, _, teacher) = left + step * i, axis
            for value in marks:
                at = x + place(axis, value)
                shape += f'<path d="M{at:.1f} {top - 8} V{bottom}" stroke="{theme["line"]}"/>'
            if teacher is not None:
                at, dash = x + place(axis, teacher), 'stroke-dasharray="4 3"'
                stroke = f'stroke="{colour("teacher")}" {dash}'
                shape += f'<path d="M{at:.1f} {top - 8} V{bottom}" {stroke}/>'
        return shape

    c.shapes.append(grid)
    c.text(left - 18, 24, "dashed: the guided teacher", "teacher", "end")
    for i, axis in enumerate(axes):
        x = left + step * i
        c.text(x, 24, axis[0])
        for value in axis[2]:
            c.text(x + place(axis, value), bottom + 16, f"{value:g}", anchor="middle", size=11)
    for j, (name, kind, *values) in enumerate(rows):
        y = top + 24 * j + 4
        c.text(left - 18, y + 4, name, kind, "end")
        for i, (axis, value) in enumerate(zip(axes, values)):
            if value is None:
                continue
            mean, *ends = value if isinstance(value, tuple) else (value,)
            low, high = axis[1]
            if mean > high:  # out of the picture
                c.text(left + step * i + across + 6, y + 4, f"{mean:g} →", kind, "end")
            elif mean < low:
                c.text(left + step * i - 6, y + 4, f"← {mean:g}", kind)
            else:
                ends = [left + step * i + place(axis, v) for v in ends]
                c.shapes.append(dot(left + step * i + place(axis, mean), y, ends, kind))
    return c


def dot(x, y, ends, kind):
    """A dot at (x, y), over a bar between the two ends, if there are any."""

    def draw(colour, theme):
        bar = f'<path d="M{ends[0]:.1f} {y} H{ends[1]:.1f}" ' if ends else ""
        bar += f'stroke="{colour(kind)}" stroke-width="3"/>' if ends else ""
        return bar + f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="{colour(kind)}"/>'

    return draw


# ---- what wrong variants do ----------------------------------------------------------------------


def wrong(folder):
    """decoupled_dmd-wrong.png: the teacher and seven runs on the ring, 400 samples of each."""
    import torch.nn.functional as F
    from PIL import Image

    import decoupled_dmd

    real = decoupled_dmd.decoupled_dmd_loss

    def loss_of(gradient):
        """The loss with another gradient: (g_dm, g_ca, what real gets) -> g."""

        def loss(x, *args):
            _, g_dm, g_ca, *mu = real(x, *args)
            g = gradient(g_dm, g_ca, x, *args).detach()
            return 0.5 * F.mse_loss(x, (x - g).detach()), g_dm, g_ca, *mu

        return {"decoupled_dmd_loss": loss}

    def guided_twice(g_dm, g_ca, x, teacher, fake, diffusion, at_dm, at_ca, *conds):
        x_dm, (cond, uncond, _, alpha) = diffusion.add_noise(x.detach(), *at_dm), conds
        guided = diffusion.guided_x0(teacher, x_dm, at_dm[1], cond, uncond, alpha)
        return g_dm + diffusion.x0(teacher, x_dm, at_dm[1], **cond) - guided + g_ca

    def noisy_side(levels, u_k, dm_range, ca_range):
        return dm_range, (max(ca_range[0], u_k), ca_range[1])

    runs = [
        ("as it should be (hybrid)", "", {}),
        ("CA's sign turned", "", loss_of(lambda dm, ca, *_: dm - ca)),
        ("CA weighted with alpha", "", loss_of(lambda dm, ca, *_: dm + 1.5 * ca)),
        ("guided teacher in DM, too", "", loss_of(guided_twice)),
        ("CA noisier than the input", "", {"noise_ranges": noisy_side}),
        ("one fake for all steps", "--shared_fake", {}),
        ("CA alone, 40 updates", "--no_dm --max_train_steps 40", {}),
    ]
    panels = []
    for title, flags, changes in runs:
        teacher, student = ring_samples(flags.split(), changes)
        if not panels:
            panels.append(scatter("the guided teacher, 126 calls", teacher))
        panels.append(scatter(title, student))
    side, bar = panels[0].size
    sheet = Image.new("RGB", (4 * side + 12, 2 * bar + 4), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % 4 * (side + 4), i // 4 * (bar + 4)))
    sheet.quantize(64).save(os.path.join(folder, "decoupled_dmd-wrong.png"), optimize=True)


def ring_samples(flags, changes):
    """Train on the ring with functions of decoupled_dmd.py replaced.  -> teacher's, student's."""
    import decoupled_dmd
    from models.plumbing import report

    kept = []

    def finish(run, teacher, times, students, *rest, **more):
        samplers = report.teacher_sampler(run, teacher), students["student"][1]
        kept.extend(report.preview(run, teacher, sampler) for sampler in samplers)

    with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(report, "finish", finish))
        for name, function in changes.items():
            stack.enter_context(mock.patch.object(decoupled_dmd, name, function))
        fixed = ["--teacher", "ring", "--output_dir", out, "--preview_every", "0"]
        decoupled_dmd.main([*fixed, "--max_train_steps", "200", *flags])
    return kept


def scatter(title, x, side=228, reach=2.0):
    """Samples (400, 2), whose classes come in turn, over circles of two standard deviations."""
    from PIL import Image, ImageDraw, ImageFont

    from models.worlds.ring import COLOURS, Ring

    zoom, scale, exact = 3, side / (2 * reach), Ring().exact
    image = Image.new("RGB", (side * zoom, side * zoom), "white")
    pen = ImageDraw.Draw(image)

    def circle(x, y, radius, **how):
        x, y, radius = (zoom * scale * v for v in (x + reach, reach - y, radius))
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], **how)

    for i, (px, py) in enumerate(x.tolist()):
        circle(px, py, 0.026, fill=COLOURS[i % 4])
    for mx, my in exact.means.tolist():
        circle(mx, my, 2 * exact.std, outline="#6e7781", width=3)
    sheet = Image.new("RGB", (side, side + 20), "white")
    sheet.paste(image.resize((side, side), Image.LANCZOS), (0, 20))
    pen = ImageDraw.Draw(sheet)
    pen.rectangle([0, 20, side - 1, side + 19], outline="#b0bed0")
    pen.text((4, 3), title, fill="#282c34", font=ImageFont.load_default(13))
    return sheet


if __name__ == "__main__":
    keep(sys.argv[1])
