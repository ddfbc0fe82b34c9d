"""Pictures of docs/linvideo.md."""

import contextlib
import copy
import functools
import os
import tempfile
from unittest import mock

from docs.draw.logs import read
from docs.draw.svg import Canvas


def draw(folder):
    diagram().save(f"{folder}/linvideo-diagram")
    curves().save(f"{folder}/linvideo-curves")


def curves():
    """The velocities' gap where a run is healthy and where it runs away; r free and r tied."""
    c = Canvas(900, 270)
    c.chart(
        *(56, 40, 236, 180, "gap between velocities"),
        [
            ("healthy", read("linvideo-healthy", "dm_rel_gap")),
            ("whole steps", read("linvideo-sick-steps", "dm_rel_gap"), "wrong"),
        ],
        low=0.01,
        high=10000,
        log=True,
    )
    for x, title, name in (
        (350, "r of each layer, healthy", "linvideo-healthy"),
        (644, "r, constraint 100 times as heavy", "linvideo-sick-weight"),
    ):
        r = [(f"r_{i}", read(name, f"r_{i}")) for i in range(4)]
        c.chart(x, 40, 236, 180, title, r, low=0, high=1)
    return c


def diagram():
    """A layer while it is a mixture, regression on the bank, and distribution matching."""
    c = Canvas(900, 500)
    layer(c)
    regression(c)
    matching(c)
    return c


def layer(c):
    """Two kinds of attention and their weight r, and what pulls on it."""
    c.text(24, 28, "While layers are selected, each of them computes both kinds of attention.")
    c.box("qkv", 60, 90, "q, k, v", width=60)
    c.box("softmax", 235, 62, "softmax attention", "student", width=160)
    c.box("linear", 235, 118, "linear attention, W", "student", width=160)
    c.box("mix", 450, 90, "r softmax + (1 − r) linear", width=176)
    c.box("r", 645, 90, "r of this layer", "student")
    for kind in ("softmax", "linear"):
        c.arrow("qkv", kind)
        c.arrow(kind, "mix")
    c.arrow("r", "mix")
    for y, pull in ((58, "objective"), (90, "(count − target)^2"), (122, "regulariser")):
        c.text(780, y + 5, pull, "gradient")
        c.arrow((774, y), (714, 90 + (y - 90) / 4), "", "gradient")
    c.text(24, 168, "In the end those with the smallest r stay linear, the others softmax.")


def regression(c):
    """Eq. 7 on the bank of states."""
    c.text(24, 212, "Regression, at states of the teacher's sampler (the default).")
    c.box("z", 55, 270, "noise z", "noise", width=60)
    c.box("sampler", 190, 270, "teacher's sampler", "teacher")
    c.box("bank", 355, 270, "bank: x_t, v_t", width=90)
    c.box("s1", 530, 270, "student", "student")
    c.box("l1", 730, 270, "|v̂_t − v_t|^2", "loss", width=110)
    c.arrow("z", "sampler")
    c.arrow("sampler", "bank")
    c.arrow("bank", "s1", "x_t")
    c.arrow("s1", "l1", "v̂_t")
    c.arrow("bank", "l1", "v_t", via=[(355, 312), (730, 312)], at=0.5)
    c.arrow("l1", "s1", "into weights, W and r", "gradient", via=[(730, 232), (530, 232)])


def matching(c):
    """Eq. 11 to 13: one step of the student, then two scores."""
    c.text(24, 352, "Distribution matching, at states of the student's own (the paper's).")
    c.box("x", 55, 415, "x_t, t", width=50)
    c.box("s2", 170, 415, "student", "student")
    c.box("x_hat", 370, 415, "x̂ = x_t + (s − t) v̂_t", width=160)
    c.box("t2", 600, 385, "teacher v", "teacher", width=130)
    c.box("s3", 600, 445, "student v̂", "student", width=130)
    c.box("g", 800, 415, "g ∝ v − v̂", "gradient")
    c.arrow("x", "s2")
    c.arrow("s2", "x_hat", "v̂_t")
    for score in ("t2", "s3"):
        c.arrow("x_hat", score, stopped=True)
        c.arrow(score, "g")
    c.arrow(
        *("g", "x_hat", "into x̂, and from there into the first call only", "gradient"),
        via=[(800, 486), (370, 486)],
    )
    c.arrow((286, 430), (208, 430), "", "gradient")


# ---- well-known wrong variants, on the ring ------------------------------------------------------

ALL, AT_ONCE = "--select 0 1 2 3", "--max_train_steps 1"
ATTENTION = "kernels.linear_attention.linear_attention"
VARIANTS = {  # title: flags, and what of the code is replaced
    "replaced, untrained": (f"{ALL} {AT_ONCE}", {}),
    "every feature one": (f"{ALL} {AT_ONCE}", {ATTENTION: "mean_of_values"}),
    "no division by d": (f"{ALL} {AT_ONCE}", {ATTENTION: "without_normaliser"}),
    "right, 200 updates": (f"{ALL} --max_train_steps 200", {}),
    "other sign of g": (
        f"{ALL} --max_train_steps 200 --learning_rate 1e-4 --objective adm --state part "
        "--weight eq13",
        {"linvideo.adm_loss": "other_sign"},
    ),
    "whole steps, unit weight": (
        f"{ALL} --max_train_steps 120 --objective adm --state step --weight unit",
        {},
    ),
    "few-step DMD loss": (f"{ALL} --max_train_steps 120 --objective dmd", {}),
}


def without_normaliser(q, k, v, feature_map, w_q, w_k, share=None):
    """Linear attention whose weights do not sum to one."""
    import torch

    from kernels.linear_attention import features

    phi_q, phi_k = features(q, feature_map, w_q), features(k, feature_map, w_k)
    S = torch.einsum("bnhf,bnhd->bhfd", phi_k, v)
    return torch.einsum("bnhf,bhfd->bnhd", phi_q, S)


def mean_of_values(q, k, v, feature_map, w_q, w_k, share=None):
    """Linear attention with the same weight for every key."""
    return v.mean(1, keepdim=True).expand_as(v)


def other_sign(student, teacher, x_t, t, s, cond):
    """adm_loss with g = (1 - s) / s (v_hat - v)."""
    import torch

    import linvideo
    from models.diffusion import expand

    x_hat = x_t + expand(s - t, x_t) * linvideo.velocity(student, x_t, t, cond)
    with torch.no_grad():
        v = linvideo.velocity(teacher, x_hat, s, cond)
        v_hat = linvideo.velocity(student, x_hat, s, cond)
        g = expand((1 - s) / s, x_hat) * (v_hat - v)
    return linvideo.matching_loss(x_hat, g), g, v, v_hat


def samples_of(flags, replaced, fitted, folder):
    """Train on the ring with functions replaced.  -> samples (n, 2) of student and teacher, fd."""
    import linvideo
    from models.plumbing import report, teachers
    from models.worlds.measures import balanced_labels

    found = {}

    def finish(run, teacher, net, grid):
        label = balanced_labels(2000, 4)
        for who, network in (("student", net), ("teacher", teacher.net)):
            draw = functools.partial(linvideo.student_sampler(run, network, teacher, grid), label)
            x = report.many(draw, 2000)[0]
            found[who] = x[:400], teacher.world.measure(x, label)["fd"]

    bank, out = os.path.join(folder, "bank"), os.path.join(folder, "run")
    argv = ["--teacher", "ring", "--bank", bank, "--output_dir", out, "--preview_every", "0"]
    with contextlib.ExitStack() as stack:
        patches = {name: globals()[own] for name, own in replaced.items()}
        patches["linvideo.finish"] = finish
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
        fit = mock.patch.object(teachers, "fit_ring_transformer", lambda *a: copy.deepcopy(fitted))
        stack.enter_context(fit)
        linvideo.main([*argv, *flags.split()])
    return found


def wrong(folder):
    """linvideo-wrong.png: samples of the teacher, of the right run and of wrong ones."""
    from PIL import Image

    from models.plumbing.film import SIDE, beside
    from models.worlds.ring import Ring, RingTeacher, fit_ring_transformer

    fitted, panels = fit_ring_transformer(RingTeacher()), []
    with tempfile.TemporaryDirectory() as work:
        for title, (flags, replaced) in VARIANTS.items():
            found = samples_of(flags, replaced, fitted, work)
            titles = {"student": title} if panels else {"teacher": "teacher", "student": title}
            for who, text in titles.items():
                x, fd = found[who]
                panels.append((f"{text}, fd {fd:.3g}", x))
    drawn = [(title, Image.fromarray(Ring().picture(x, SIDE))) for title, x in panels]
    rows = [beside(drawn[:4]), beside(drawn[4:])]
    sheet = Image.new("RGB", (rows[0].width, 2 * rows[0].height + 6), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * (row.height + 6)))
    sheet.save(f"{folder}/linvideo-wrong.png")
