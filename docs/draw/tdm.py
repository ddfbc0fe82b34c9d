"""Pictures of docs/tdm.md."""

import contextlib
import dataclasses
import json
import tempfile
from unittest import mock

from docs.draw import logs
from docs.draw.svg import Canvas


def draw(folder):
    diagram().save(f"{folder}/tdm-diagram")
    curves().save(f"{folder}/tdm-curves")


# ---- the diagram ---------------------------------------------------------------------------------


POINTS = [70, 265, 460, 655, 850]  # x of the trajectory's states, from the noise on


def diagram():
    """The trajectory with its intervals, and one update of student and fake at its second step."""
    c = Canvas(900, 500)
    c.text(
        *(24, 28),
        "The student's own trajectory, K = 4 deterministic steps. Each is matched in the interval "
        "it has just crossed.",
        "sample",
    )
    for i, x in enumerate(POINTS):
        what = {0: "x_{t4} = z", 4: "x_{t0}"}.get(i, f"x_{{t{4 - i}}}")
        c.box(f"x{i}", x, 66, what, width=62 if i in (0, 4) else 34)
        c.text(
            x, 92, {0: "t_4 = T: noise", 4: "t_0 = 0: data"}.get(i, f"t_{4 - i}"), None, "middle"
        )
    for i, what in enumerate(("without gradient", "the step drawn", "not run", "not run")):
        a, b = POINTS[i : i + 2]
        c.arrow(f"x{i}", f"x{i + 1}", what, "noise" if what == "not run" else "student", at=0.48)
        c.box(f"bar{i}", (a + b) / 2, 120, f"τ of step {i + 1}", "fake", b - a - 8, 26)
    c.text(
        450,
        152,
        "no level τ belongs to two steps, so that one fake score serves them all",
        "fake",
        "middle",
    )
    c.text(
        *(24, 192),
        "The student's update: a step is drawn, and where it lands is compared further up, at τ.",
        "sample",
    )
    c.box("x_in", 60, 270, "x_{in} = x_{t3}", width=78)
    c.box("student", 190, 270, "student(t, K)", "student")
    c.box("x_s", 325, 270, "x_s = x_{t2}", width=76)
    c.box("x_tau", 480, 270, "x_τ = a x_s + b ε", width=120)
    c.box("eps", 480, 222, "fresh ε, random τ", "noise", 120)
    c.box("teacher", 640, 235, "teacher, guided", "teacher", 130)
    c.box("fake", 640, 305, "fake(τ, K)", "fake", 130)
    c.box("g", 805, 270, "μ_{fake} − μ_{real}", "gradient", 120)
    c.arrow("x_in", "student")
    c.arrow("student", "x_s")
    c.arrow("x_s", "x_tau", stopped=True)
    c.arrow("eps", "x_tau")
    for name in ("teacher", "fake"):
        c.arrow("x_tau", name)
        c.arrow(name, "g")
    c.arrow(
        *("g", "x_s", "a pull on x_s, of length 1 at most", "gradient"),
        via=[(805, 348), (325, 348)],
    )
    c.arrow((290, 284), (250, 284), "", "gradient")
    c.arrow((130, 284), (100, 284), "", "gradient", stopped=True)
    c.text(190, 312, "this one call learns", "gradient", "middle", 12)
    c.text(
        *(24, 388),
        "The fake's update, R times after: recover the student's x from its landing, noised on.",
        "sample",
    )
    c.box("x", 325, 428, "x, x_s, detached", width=120)
    c.box("x_tau2", 480, 428, "x_τ", width=30)
    c.box("fake2", 640, 428, "fake(τ, K)", "fake", 130)
    c.box("loss", 805, 428, "w | μ_{fake} − x |^2", "loss", 130)
    c.arrow("x", "x_tau2")
    c.arrow("x_tau2", "fake2")
    c.arrow("fake2", "loss")
    c.arrow("loss", "fake2", "", "gradient", via=[(805, 466), (640, 466)])
    return c.legend(486)


# ---- healthy and sick runs -----------------------------------------------------------------------

RUNS = [  # colour, name in the picture, docs/figures/logs/tdm-NAME.csv
    ("student", "healthy", "healthy"),
    ("gradient", "fake too slow", "slow-fake"),
    ("wrong", "rate too high", "high-rate"),
]


def curves():
    """log.csv of a healthy run and of two sick ones, on the ring."""
    c = Canvas(900, 250)
    columns = [
        ("g", "g: rms of μ_{fake} − μ_{real}", dict(low=0.01, high=10, log=True)),
        ("std", "std of the student's x", dict(low=0, high=2)),
        ("loss_fake", "loss_{fake}", dict(low=0.3, high=30, log=True)),
    ]
    for i, (column, title, ends) in enumerate(columns):
        series = [(name, logs.read(f"tdm-{run}", column), colour) for colour, name, run in RUNS]
        c.chart(50 + 300 * i, 34, 235, 180, title, series, **ends)
    return c


# ---- what well-known wrong variants do -----------------------------------------------------------

SHORT = "--teacher ring --max_train_steps 300 --teacher_steps 0 --preview_every 0 --seed 0"
FOUR, SEVERAL = "--student_steps 4", "--student_steps 1 2 4"


def wrong(folder):
    """tdm-wrong.png: samples of students that were trained with one thing wrong, on the ring."""
    from PIL import Image

    import tdm
    from models.plumbing.film import SIDE, beside
    from models.worlds import load_world

    runs = [  # title, flags, {function of tdm.py: what makes its wrong form of it}, steps shown
        ("right, 4 steps", FOUR, {}, 4),
        ("fake trained at x noised afresh", f"{FOUR} --fake_noise fresh", {}, 4),
        (
            *("every step matched in (0, 1)", f"{FOUR} --match clean"),
            *({"noise_level": in_all_levels}, 4),
        ),
        ("fake's target x_s", FOUR, {"fake_score_loss": towards_x_s}, 4),
        ("weight without sigma_s", FOUR, {"fake_score_loss": without_sigma_s}, 4),
        ("no fake: mu_fake = x", FOUR, {"tdm_loss_variant": without_fake}, 4),
        ("right, K = 1, 2, 4: in 1 step", SEVERAL, {}, 1),
        ("K unknown: in 1 step", f"{SEVERAL} --no_steps_cond", {}, 1),
    ]
    panels = []
    for title, flags, changes, steps in runs:
        x, fd = samples(tdm, flags, changes, steps)
        picture = Image.fromarray(load_world("ring").picture(x, SIDE))
        panels.append((f"{title}, fd {fd:.2g}", picture))
    upper, lower = beside(panels[:4]), beside(panels[4:])
    both = Image.new("RGB", (upper.width, 2 * upper.height), "white")
    both.paste(upper, (0, 0))
    both.paste(lower, (0, upper.height))
    both.save(f"{folder}/tdm-wrong.png", optimize=True)


def samples(tdm, flags, changes, steps):
    """A short run with functions of the script replaced.  -> its samples in so many steps, fd."""
    from models.files import load_tensors

    with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as patches:
        for name, make in changes.items():
            patches.enter_context(mock.patch.object(tdm, name, make(getattr(tdm, name))))
        tdm.main(f"{SHORT} --output_dir {out}/run {flags}".split())
        again = f"--sample {out}/run --output_dir {out}/again --student_steps {steps}"
        tdm.main(again.split())
        with open(f"{out}/run/report.json") as f:
            rows = {row["name"]: row["fd"] for row in json.load(f)["results"]}
        x = load_tensors(f"{out}/again/samples.safetensors")["x0"]
        return x, rows["student_1" if steps == 1 else "student"]


def in_all_levels(noise_level):
    """tau from (0, 1) for every step; with --match clean this is DMD's matching."""

    def wrong_level(args, draw, teacher, segment):
        s, t = 0 * segment.s, 0 * segment.t + 1
        return noise_level(args, draw, teacher, dataclasses.replace(segment, s=s, t=t))

    return wrong_level


def towards_x_s(fake_score_loss):
    """The fake takes the landing for a clean sample."""
    return lambda fake, diffusion, x, x_s, *rest: fake_score_loss(fake, diffusion, x_s, x_s, *rest)


def without_sigma_s(fake_score_loss):
    """The importance weight of (a eps-hat + b eps) / sigma_tau, as once in the authors' demo.

    fake_score_loss asks importance_weight for its weight, which knows eps and the true eps_mix =
    (a sigma_s eps-hat + b eps) / sigma_tau: (eps_mix - b eps / sigma_tau) / sigma_s is the rest.
    """
    import tdm
    from models.diffusion import expand, transition

    def wrong_loss(fake, diffusion, x, x_s, eps, s, tau, cond):
        b = expand(transition(diffusion.schedule, s, tau)[1] / diffusion.schedule.sigma(tau), eps)
        sigma_s = expand(diffusion.schedule.sigma(s), eps)
        weight = tdm.importance_weight

        def wrong_weight(eps, eps_mix):
            rest = (eps_mix - b * eps) / sigma_s.clamp_min(1e-6) * (sigma_s > 0)
            return weight(eps, rest + b * eps)

        with mock.patch.object(tdm, "importance_weight", wrong_weight):
            return fake_score_loss(fake, diffusion, x, x_s, eps, s, tau, cond)

    return wrong_loss


def without_fake(tdm_loss_variant):
    """The student's own x stands for what the fake says."""
    import tdm

    def wrong_loss(x, *rest, **how):
        _, _, mu_real, _ = tdm_loss_variant(x, *rest, **how)
        mu_fake = x.detach()
        loss = tdm.trajectory_matching_loss(x, mu_real, mu_fake, **how)
        return loss, mu_fake - mu_real, mu_real, mu_fake

    return wrong_loss
