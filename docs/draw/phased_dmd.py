"""Pictures of docs/phased_dmd.md."""

from docs.draw import logs
from docs.draw.svg import Canvas


def draw(folder):
    diagram().save(f"{folder}/phased_dmd-diagram")
    curves().save(f"{folder}/phased_dmd-curves")


def diagram():
    """The phases on the axis of noise levels; one update of an expert, and one of its fake."""
    c = Canvas(900, 470)
    head = "Four steps at shift 5 in two phases: each expert is matched at the end s of its own, "
    c.text(24, 26, head + "on all levels t above it.")
    x = [90, 270, 450, 630, 810]  # of the steps, evenly spaced before the shift
    for i, (left, right) in enumerate(zip(x[:-1], x[1:])):
        c.arrow((left + 4, 66), (right - 4, 66), "", "student")
        if i % 2 == 0:
            c.text(right, 54, f"expert {1 + i // 2}", "student", "middle", 14)
    levels = ["t = 1, noise", ".9375", "s_1 = .8333", ".625", "s_2 = 0, data"]
    for place, level in zip(x, levels):
        c.text(place, 87, level, None, "middle", 12)
    c.arrow((x[2], 116), (x[0], 116), "fake 1 and teacher: t in (s_1, 1)", "fake", off=-8)
    c.arrow((x[4], 142), (x[0], 142), "fake 2 and teacher: t in (0, 1)", "fake")

    c.text(
        24, 178, "Update of expert k: its sample at the end of its phase is noised on from s to t."
    )
    c.box("z", 45, 255, "noise z", "noise")
    c.box("frozen", 163, 255, "experts 1 … k−1\nfrozen", "student", width=128)
    c.box("expert", 308, 255, "expert k\nlast step", "student", width=86)
    c.box("x_s", 415, 255, "x_s")
    c.box("x_t", 545, 255, "x_t = a x_s + b ε", width=104)
    c.box("teacher", 690, 212, "teacher μ_{real}", "teacher", width=112)
    c.box("fake", 690, 298, "fake k μ_{fake}", "fake", width=112)
    c.box("g", 826, 255, "g ∝ μ_{fake} − μ_{real}", "gradient", width=130)
    c.arrow("z", "frozen")
    c.arrow("frozen", "expert", stopped=True)
    c.arrow("expert", "x_s")
    c.arrow("x_s", "x_t", stopped=True)
    c.arrow("x_t", "teacher")
    c.arrow("x_t", "fake")
    c.arrow("teacher", "g")
    c.arrow("fake", "g")
    c.arrow("g", "x_s", "", "gradient", via=[(826, 342), (415, 342)])
    c.text(428, 334, "g enters x_s, and from there expert k only", "gradient")
    c.arrow((392, 268), (355, 268), "", "gradient")

    c.text(24, 384, "Fake's update, R times after it: learn the score of x_t from x_s alone.")
    c.box("x_s2", 163, 430, "x_s, detached")
    c.box("x_t2", 308, 430, "x_t")
    c.box("fake2", 430, 430, "fake k", "fake")
    c.box("l2", 690, 430, "min(1, 10 b^2) |fake − y|^2", "loss", width=190)
    c.arrow("x_s2", "x_t2")
    c.arrow("x_t2", "fake2")
    c.arrow((472, 424), (591, 424))
    c.arrow((591, 438), (472, 438), "", "gradient")
    c.text(690, 396, "y = [t + (1 − t) s^2 / (1 − s)^2] ε / b − x_s / (1 − s)", "loss", "middle")
    return c


RUNS = [  # colour, name in the picture, docs/figures/logs/phased_dmd-NAME.csv
    ("student", "healthy", "healthy"),
    ("wrong", "naive target", "naive"),
    ("gradient", "fake too slow", "slow-fake"),
    ("noise", "rate too high", "high-rate"),
]


def curves():
    """log.csv of a healthy run and of three sick ones, on the ring."""
    c = Canvas(900, 250)
    columns = [
        ("std", "std of x_s", dict(low=0.2, high=2.2)),
        ("loss_dm", "loss_{dm}", dict(low=0.003, high=3000, log=True)),
        ("loss_fake", "loss_{fake}", dict(low=0.2, high=2000, log=True)),
    ]
    for i, (column, title, ends) in enumerate(columns):
        series = [
            (name, logs.smooth(logs.read(f"phased_dmd-{run}", column), 5), colour)
            for colour, name, run in RUNS
        ]
        c.chart(50 + 300 * i, 34, 235, 180, title, series, **ends)
    return c


# ---- what wrong variants do ----------------------------------------------------------------------

SIDE, REACH, LEFT, TOP = 180, 2.2, 86, 28  # pixels of a panel; half the width of the plane


def wrong(folder):
    """phased_dmd-wrong.png: the ring's samples on their way, by the right run and by wrong ones."""
    import contextlib
    import tempfile
    from unittest import mock

    import phased_dmd
    from models import diffusion

    def forgets_a(schedule, s, t):
        a, _ = transition(schedule, s, t)
        return a, (schedule.sigma(t) ** 2 - schedule.sigma(s) ** 2).sqrt()

    def without_fake(x0, mu_real, mu_fake, *rest):
        return phased_dmd.normalized_direction(x0, mu_real, x0, *rest)

    transition, columns = diffusion.transition, [data()]
    for title, flags, patches in [
        ("right run", "", []),
        ("naive target", "--target naive", []),
        (
            "kernel without a",
            "",
            [mock.patch.object(m, "transition", forgets_a) for m in (diffusion, phased_dmd)],
        ),
        ("no phases", "--phases 1 --shared_fake", []),
        ("no fake", "", [mock.patch.dict(phased_dmd.DIRECTIONS, normalized=without_fake)]),
    ]:
        with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            given = "--teacher ring --fake_update_ratio 2 --preview_every 0 --teacher_steps 0"
            phased_dmd.main([*given.split(), "--output_dir", f"{out}/run", *flags.split()])
            columns.append((title, *states(f"{out}/run")))
    panels(columns).save(f"{folder}/phased_dmd-wrong.png", optimize=True)


def data(n=500):
    """-> a title, data noised to the levels of the picture, no distances."""
    import torch

    from models.diffusion import Flow, add_noise
    from models.worlds import load_world

    x0, _ = load_world("ring").data(n, 5, torch.arange(n) % 4)
    eps = torch.randn(n, 2, generator=torch.Generator().manual_seed(5))
    levels = {t: add_noise(Flow(), x0, eps, torch.full((n,), t)) for t in (0.75, 0.5, 0.0)}
    return "data, noised", levels, {}


def states(folder, n=500):
    """A saved student's samples on their way.  -> {t: (n, 2)}, {t: energy distance to data}."""
    import torch

    import phased_dmd
    from models.files import load_json
    from models.plumbing.report import evaluation_noise
    from models.plumbing.run import Run

    run = Run(phased_dmd.parse_args(["--sample", folder]), "phased_dmd")
    experts, saved, teacher = phased_dmd.load_student(run)
    x, grid, found = evaluation_noise(run, (2,), 0, n)("z"), [*saved["times"], 0.0], {}
    with torch.no_grad():
        for i, expert in enumerate(experts):
            cond = {"label": torch.arange(n) % 4}
            x = phased_dmd.rollout([expert], teacher.diffusion, x, grid[i : i + 2], cond)
            found[grid[i + 1]] = x
    rows = {r["name"]: r for r in load_json(f"{folder}/report.json")["results"]}
    marginals = rows["student"]["marginals"]
    return found, {float(t): v for t, v in marginals.items()}


def panels(columns):
    """[(title, {t: (n, 2)}, {t: distance}), ...] beside one another, levels below one another."""
    from PIL import Image, ImageDraw, ImageFont

    from models.worlds.ring import COLOURS

    words = {0.75: "t = 0.75,\nend of\nphase 1", 0.5: "t = 0.5,\ninside\nphase 2", 0.0: "samples"}
    zoom, font = 3, ImageFont.load_default(39)
    width, height = LEFT + len(columns) * (SIDE + 6), TOP + len(words) * (SIDE + 6)
    sheet = Image.new("RGB", (zoom * width, zoom * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, points, distances) in enumerate(columns):
        left = LEFT + i * (SIDE + 6)
        pen.multiline_text((zoom * left, zoom * 6), title, "#282c34", font)
        for j, (t, text) in enumerate(words.items()):
            top = TOP + j * (SIDE + 6)
            pen.multiline_text((zoom * 6, zoom * (top + 60)), text, "#282c34", font)
            box = [left, top, left + SIDE, top + SIDE]
            pen.rectangle([zoom * v for v in box], outline="#b0bed0", width=zoom)
            inside = points[t].clamp(-REACH, REACH) * (SIDE / 2 / REACH)
            for k, (x, y) in enumerate(inside.tolist()):
                x, y = zoom * (left + SIDE / 2 + x), zoom * (top + SIDE / 2 - y)
                pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=COLOURS[k % len(COLOURS)])
            if t in distances:
                off = f"{max(0.0, 1000 * distances[t]):.0f}"
                pen.text((zoom * (left + 6), zoom * (top + 4)), off, "#282c34", font)
    small = sheet.resize((width, height), Image.LANCZOS)
    return small.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
