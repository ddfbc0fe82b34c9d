"""The orderings that a paper claims, on an embedded world: same student, same number of student updates, several seeds.

    python -m tests.orderings phased_dmd ring --seeds 0 1 2
    python -m tests.orderings phased_dmd clips --methods vanilla truncated phased-2 phased-4 -- --max_train_steps 300
    python -m tests.orderings decoupled_dmd glyphs --plot docs/decoupled-glyphs.png -- --max_train_steps 300
    python -m tests.orderings tdm ring
    python -m tests.orderings mdt_dist ring

Runs the script for each method and seed, reads the report.json it leaves, and prints one Markdown table: mean and range over the seeds of
every measure of the student's row, and minutes. phased_dmd: also the energy distances x 1000 of its intermediate samples x_t to noised data.
decoupled_dmd: also, of 500 samples at eight points of the run, log p(c | x) ("sharpness"), distance to the guided teacher, mean and standard
deviation of all values; the table has the last of them, and std(3/4), to show what still moves; --plot draws the curves.
tdm: some rows are another script's runs, or another row's student sampled in another way; "hit" is the share within three standard deviations of a mode.
"""

import argparse
import importlib
import math
import os
import statistics
import sys

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from models.diffusion import step_grid  # noqa: E402
from models.files import load_json, save_json  # noqa: E402
from models.networks import load_network  # noqa: E402
from models.plumbing import report  # noqa: E402
from models.plumbing.data import Conditions  # noqa: E402
from models.plumbing.teachers import read_sampler  # noqa: E402
from models.worlds import load_world  # noqa: E402
from models.worlds.measures import balanced_labels, moments_distance  # noqa: E402

FOUR, UNIFIED = ["--student_steps", "4"], ["--student_steps", "1", "2", "4"]
GIVEN, ADM, UNIT = (
    ["--select", "0", "2", "6", "7"],
    ["--objective", "adm", "--learning_rate", "1e-4"],
    ["--weight", "unit"],
)  # linvideo
FOUR_DMD = [*FOUR, "--timestep_shift", "2", "--max_train_steps", "300"]  # of a clips teacher
# name: (title, flags, and for tdm: another script; the method whose run it reads; the row of its report, or how its student is sampled anew;
# factor of the updates; early: a twentieth of the updates, rates constant)
METHODS = {
    "phased_dmd": {
        "vanilla": (
            "vanilla DMD, gradient through all steps (Fig. 1a)",
            ["--phases", "1", "--no_truncation"],
        ),
        "truncated": ("DMD with truncation (Fig. 1b)", ["--phases", "1", "--shared_fake"]),
        "truncated-told": ("the same, fake told the step", ["--phases", "1"]),
        "phased-2": (
            "phased, 2 phases, truncation inside (Fig. 1d)",
            ["--phases", "2", "--shared_fake"],
        ),
        "phased-2-told": ("the same, fake told the step (our default)", ["--phases", "2"]),
        "phased-4": ("phased, 4 phases (Fig. 1c)", ["--phases", "4"]),
        "phased-4-naive": (
            "the same with the naive target",
            ["--phases", "4", "--target", "naive"],
        ),
    },
    "decoupled_dmd": {
        "ca": ("CA alone", ["--no_dm"]),
        "dm": ("DM alone", ["--no_ca"]),
        "shared": ("CA + DM, shared (DMD)", ["--schedule", "shared"]),
        "full": ("CA + DM, full", ["--schedule", "full"]),
        "constrained": ("CA + DM, constrained", ["--schedule", "constrained"]),
        "hybrid": ("CA + DM, hybrid (the paper's)", ["--schedule", "hybrid"]),
        "shared-untold": (
            "shared, fake not told the step",
            ["--schedule", "shared", "--shared_fake"],
        ),
        "full-untold": ("full, fake not told the step", ["--schedule", "full", "--shared_fake"]),
        "constrained-untold": (
            "constrained, fake not told the step",
            ["--schedule", "constrained", "--shared_fake"],
        ),
        "hybrid-untold": (
            "hybrid, fake not told the step",
            ["--schedule", "hybrid", "--shared_fake"],
        ),
        "ca-mean-variance": (
            "CA + mean-variance KL (Eq. 7)",
            ["--no_dm", "--mean_variance_weight", "1"],
        ),
        "ca-gan": ("CA + GAN", ["--no_dm", "--gan_weight", "0.1"]),
        "ca-noisy": (
            "CA alone, u in (.95, 1)",
            ["--no_dm", "--schedule", "full", "--ca_range", "0.95", "1"],
        ),
        "ca-half": (
            "CA alone, u in (.5, 1)",
            ["--no_dm", "--schedule", "full", "--ca_range", "0.5", "1"],
        ),
        "ca-clean": (
            "CA alone, u in (0, .3)",
            ["--no_dm", "--schedule", "full", "--ca_range", "0", "0.3"],
        ),
    },
    "tdm": {
        "teacher-4": ("teacher, 4 Euler steps", FOUR, dict(of="tdm-4", row="teacher_same_steps")),
        "tdm-4": ("TDM, 4 steps", FOUR),
        "tdm-4-sto": (
            "the same student, sampled with fresh noise",
            FOUR,
            dict(of="tdm-4", renoise="sde"),
        ),
        "dmd-4": (
            "DMD2, 4 steps (fake told the step)",
            ["--student_steps", "4"],
            dict(script="dmd"),
        ),
        "dmd-4-untold": (
            "DMD2, 4 steps (fake untold, paper)",
            ["--student_steps", "4", "--shared_fake"],
            dict(script="dmd"),
        ),
        "cd-4": (
            "consistency distillation, equal updates, deterministic",
            FOUR,
            dict(script="tests.consistency"),
        ),
        "cd-4-sto": (
            "the same, sampled with fresh noise (its own way)",
            FOUR,
            dict(script="tests.consistency", of="cd-4", row="student_4_sde"),
        ),
        "cd-4-calls": (
            "consistency distillation, equal network calls, deterministic",
            FOUR,
            dict(script="tests.consistency", longer=3.5),
        ),
        "cd-4-calls-sto": (
            "the same, sampled with fresh noise",
            FOUR,
            dict(script="tests.consistency", longer=3.5, of="cd-4-calls", row="student_4_sde"),
        ),
        "clean": ("match x0 instead of x_s (Tab. 7)", [*FOUR, "--match", "clean"]),
        "no-is": ("without importance sampling (Tab. 5)", [*FOUR, "--fake_noise", "fresh"]),
        "exact": ("exact target of the fake", [*FOUR, "--fake_target", "exact"]),
        "to-noise": ("levels of a step up to pure noise", [*FOUR, "--tau_range", "to_noise"]),
        "x_s": ("regress x_s instead of x0 (as printed)", [*FOUR, "--regress", "x_s"]),
        "demo": ("the demo's loss, per element", [*FOUR, "--loss", "demo"]),
        "l2": ("squares (Tab. 5)", [*FOUR, "--loss", "l2"]),
        **{
            f"only4-at-{n}": (
                f"trained for 4 steps, sampled in {n}",
                FOUR,
                dict(of="tdm-4", steps=n),
            )
            for n in (2, 1)
        },
        **{
            f"told-at-{n}": (
                f"K = 1, 2, 4, told (Eq. 8), in {n}",
                UNIFIED,
                dict(of="told", row=row),
            )
            for n, row in ((4, "student"), (2, "student_2"), (1, "student_1"))
        },
        **{
            f"untold-at-{n}": (
                f"K = 1, 2, 4, untold (Tab. 5), in {n}",
                [*UNIFIED, "--untold"],
                dict(of="untold", row=row),
            )
            for n, row in ((4, "student"), (2, "student_2"), (1, "student_1"))
        },
        "early-tdm": ("TDM, first 5 % of the updates (Fig. 9)", FOUR, dict(early=True)),
        "early-clean": ("the same, match x0", [*FOUR, "--match", "clean"], dict(early=True)),
        "early-dmd": (
            "DMD2, first 5 % (fake told the step)",
            ["--student_steps", "4"],
            dict(script="dmd", early=True),
        ),
        "early-dmd-untold": (
            "DMD2, first 5 % (fake untold)",
            ["--student_steps", "4", "--shared_fake"],
            dict(script="dmd", early=True),
        ),
    },
    "linvideo": {
        "teacher": ("teacher", [], dict(of="learned", row="teacher_same_steps")),
        "learned": ("learned (the paper's)", []),
        "first": ("first layers", ["--select", "first"]),
        "last": ("last layers", ["--select", "last"]),
        "uniform": ("every other layer", ["--select", "uniform"]),
        "random": ("random layers", ["--select", "random"]),
        "fixed": ("the learned layers, fixed from the start", [], dict(layers_of="learned")),
        "no-reg": ("learned, without the regulariser (Tab. 3)", ["--no_regularizer"]),
        "mse": ("MSE (Eq. 7), given layers as in the next rows", GIVEN),
        "mse-time": ("MSE, 1.7 times the updates: ADM's time", GIVEN, dict(longer=1.7)),
        "adm": ("ADM (Eq. 11 to 13), part of a step", [*GIVEN, *ADM]),
        "adm-unit": ("ADM without the weight (1 - t) / t", [*GIVEN, *ADM, *UNIT]),
        "adm-step": ("ADM, whole steps", [*GIVEN, *ADM, *UNIT, "--state", "step"]),
        "adm-jump": ("ADM, jumps", [*GIVEN, *ADM, *UNIT, "--state", "jump"]),
        "adm-rollout": (
            "ADM, the student's own trajectory",
            [*GIVEN, *ADM, *UNIT, "--state", "rollout"],
        ),
        "adm-mse": (
            "ADM with MSE beside it, the rate of MSE",
            [*GIVEN, "--objective", "adm", *UNIT, "--regression_weight", "1"],
        ),
        "adm-critic": (
            "ADM with a trained critic",
            [*GIVEN, *ADM, *UNIT, "--objective", "adm_critic"],
        ),
        "dmd": ("few-step DMD loss (Tab. 4)", [*GIVEN, *ADM, "--objective", "dmd"]),
        **{f"target-{n}": (f"{n} layers", ["--target_layers", str(n)]) for n in (2, 6, 8)},
        **{
            f"map-{m}": (f"given layers, feature map {m}", [*GIVEN, "--feature_map", m])
            for m in ("softmax", "elu", "relu")
        },
        "two-stage": (
            "two stages: learned, then dmd.py in 4 steps",
            FOUR_DMD,
            dict(script="dmd", init="learned"),
        ),
        "dmd-only": ("dmd.py in 4 steps, softmax attention", FOUR_DMD, dict(script="dmd")),
        "joint": (
            "one stage: the row of DMD's loss, sampled in 4 steps",
            [*GIVEN, *ADM, "--objective", "dmd"],
            dict(of="dmd", row="student_4"),
        ),
    },
}
MDT = {  # of mdt_dist.py: (title, flags, options as above); each is measured in two steps and in one. VM + VD makes 7 network calls an update, the others 3
    "mdt": ("VM + VD", []),
    "vm": ("VM", ["--arm", "vm"]),
    "vd": ("VD", ["--arm", "vd"]),
    "cm": ("consistency distillation, equal updates", ["--arm", "cm"]),
    "cm-calls": ("consistency distillation, equal calls", ["--arm", "cm"], dict(longer=7 / 3)),
    "scm": ("sCM, equal updates", ["--arm", "scm"]),
    "scm-calls": ("sCM, equal calls", ["--arm", "scm"], dict(longer=7 / 3)),
    **{
        f"{arm}-{c}": (f"{title}, d_norm {c}", ["--arm", arm, "--d_norm", c])
        for arm, title in (("mdt", "VM + VD"), ("vm", "VM"))
        for c in ("0.1", "rms")
    },
}
STEPS = {"": ("2 steps", "student"), "-at-1": ("1 step", "student_1")}
METHODS["mdt_dist"] = {
    "teacher": ("teacher, 2 steps", [], dict(of="mdt", row="teacher_same_steps")),
    "teacher-at-1": ("teacher, 1 step", [], dict(of="mdt", row="teacher_1")),
    **{
        name + end: (f"{title}, {steps}", flags, {**dict(*options), "of": name, "row": row})
        for name, (title, flags, *options) in MDT.items()
        for end, (steps, row) in STEPS.items()
    },
}
POINTS = 8  # of a curve


def measure_as_it_saves(script, curve):
    """Make a script's saves also measure 500 samples of the student they save, into the list `curve`.  -> a function that undoes it."""
    real, guided = report.save_student, []

    def save(args, method, net, teacher, times, shape):
        real(args, method, net, teacher, times, shape)
        world, conditions, device = (
            load_world(args.teacher),
            Conditions(args, net),
            next(net.parameters()).device,
        )
        label = balanced_labels(500, world.num_classes)
        sampler = script.student_sampler(args, net, teacher, conditions, shape, times, device)
        x, _ = report.many(lambda a, b: sampler(label, a, b), len(label))
        if not guided:
            draw = report.teacher_sampler(args, teacher, conditions, shape, device)
            guided.append(
                world.moments(report.many(lambda a, b: draw(label, a, b), len(label))[0], label)
            )
        curve.append(
            {
                "log_p": world.measure(x, label)["log_p"],
                "fd_teacher": moments_distance(world.moments(x, label), guided[0]),
                "mean": float(x.mean()),
                "std": float(x.std()),
            }
        )

    report.save_student = save
    return lambda: setattr(report, "save_student", real)


def run(script_name, world, flags, out):
    """One run, or what an earlier one left in `out`  -> its report.json, and its curve or None."""
    script, curve = importlib.import_module(script_name), []
    if not os.path.isfile(os.path.join(out, "report.json")):
        undo = (
            measure_as_it_saves(script, curve) if script_name == "decoupled_dmd" else lambda: None
        )
        try:
            argv = ["--teacher", world, "--output_dir", out, *flags]
            if script_name == "decoupled_dmd":
                argv += [
                    "--checkpointing_steps",
                    str(max(1, script.parse_args(argv).max_train_steps // POINTS)),
                ]
            script.main(argv)
        finally:
            undo()
        save_json({"points": curve}, os.path.join(out, "curve.json"))
    return load_json(os.path.join(out, "report.json")), load_json(os.path.join(out, "curve.json"))[
        "points"
    ][:POINTS]


def hit(x):
    """Share of ring samples within three standard deviations of a mode."""
    exact = load_world("ring").exact
    return float(
        (torch.cdist(x.double(), exact.means).min(1).values <= 3 * exact.std).double().mean()
    )


def sampled(out, world, seed, steps=None, renoise="ode"):
    """The student that a run of tdm.py (or dmd.py) left, sampled anew in `steps` steps by Euler or with fresh noise.  -> 2,000 samples, labels."""
    tdm = importlib.import_module("tdm")
    net, config = load_network(os.path.join(out, "student"))
    sampler, schedule, kind, timestep_shift = read_sampler(os.path.join(out, "student"))
    args = argparse.Namespace(seed=seed, renoise=renoise)
    label, n = balanced_labels(2000, load_world(world).num_classes), steps or len(sampler["times"])
    teacher = argparse.Namespace(schedule=schedule, prediction=kind)
    draw = tdm.student_samplers(
        args,
        net,
        teacher,
        Conditions(argparse.Namespace(prompts=None), net),
        tuple(net.latent_shape),
        {n: step_grid(n, timestep_shift)},
        sampler.get("told_steps", False),
        torch.device("cpu"),
    )[n]
    return report.many(lambda a, b: draw(label, a, b), len(label))[0], label


def tdm_row(result, out, world, seed, options):
    """The row of one method: of the report, or of its student sampled anew; on the ring with "hit"."""
    name = options.get("row", "student")
    row = dict(next(r for r in result["results"] if r["name"] == name))
    if "steps" in options or "renoise" in options:
        x, label = sampled(out, world, seed, options.get("steps"), options.get("renoise", "ode"))
        row = load_world(world).measure(x, label)
    elif world == "ring" and name == "student" and os.path.isdir(os.path.join(out, "student")):
        x, _ = sampled(out, world, seed, renoise="sde" if result["method"] == "dmd" else "ode")
    else:
        x = None
    return row | ({"hit": hit(x)} if world == "ring" and x is not None else {})


def plot(path, curves, zoom=2):
    """curves: {title: [curve of a seed, ...]} -> PNG, one panel a measure, one colour a method, one line a seed; the vertical axes end
    one interquartile range beyond the quartiles of all points."""
    names, width, height, gap = ["log_p", "fd_teacher", "mean", "std"], 250, 230, 56
    image = Image.new(
        "RGB",
        (zoom * (gap + len(names) * (width + gap)), zoom * (height + 60 + 16 * len(curves))),
        "white",
    )
    pen, colours = (
        ImageDraw.Draw(image),
        [
            (31, 119, 180),
            (214, 69, 65),
            (46, 139, 87),
            (150, 90, 160),
            (230, 150, 20),
            (90, 90, 90),
            (0, 170, 180),
            (200, 80, 160),
        ],
    )

    def text(x, y, words, fill=(40, 40, 40), anchor="la"):
        pen.text((zoom * x, zoom * y), words, fill, ImageFont.load_default(zoom * 12), anchor)

    for panel, name in enumerate(names):
        log = name in ("fd_teacher", "std")
        scale = lambda v: math.log10(max(v, 1e-9)) if log else v  # noqa: E731, B023
        values = torch.tensor(
            [scale(p[name]) for seeds in curves.values() for c in seeds for p in c]
        )
        q1, q3 = (values.quantile(q).item() for q in (0.25, 0.75))
        low, high = (
            max(values.min().item(), 2 * q1 - q3) - 1e-3,
            min(values.max().item(), 2 * q3 - q1) + 1e-3,
        )  # what runs away leaves the panel
        left = gap + panel * (width + gap)
        pen.rectangle(
            [zoom * left, zoom * 24, zoom * (left + width), zoom * (24 + height)],
            outline=(150, 150, 150),
        )
        title = {
            "log_p": "log p(c | x)",
            "fd_teacher": "fd to the guided teacher (log)",
            "mean": "mean",
            "std": "standard deviation (log)",
        }[name]
        text(left + width / 2, 6, title, anchor="ma")
        for y, v, anchor in ((24, high, "ra"), (24 + height, low, "rd")):
            text(left - 4, y, f"{10**v if log else v:.3g}", anchor=anchor)
        for colour, seeds in zip(colours, curves.values()):
            for c in seeds:
                heights = [(high - min(high, max(low, scale(p[name])))) / (high - low) for p in c]
                at = [
                    (zoom * (left + width * (i + 1) / len(c)), zoom * (24 + height * h))
                    for i, h in enumerate(heights)
                ]
                pen.line(at, colour, zoom)
    for row, (title, colour) in enumerate(zip(curves, colours)):
        pen.line(
            [
                zoom * gap,
                zoom * (height + 50 + 16 * row),
                zoom * (gap + 30),
                zoom * (height + 50 + 16 * row),
            ],
            colour,
            2 * zoom,
        )
        text(gap + 38, height + 43 + 16 * row, title)
    text(
        gap + 4 * (width + gap) - gap,
        height + 28,
        "student updates, an eighth of the run a point",
        anchor="ra",
    )
    image.save(path, optimize=True)


def main():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Flags after -- go to the script."
    )
    p.add_argument("script", choices=list(METHODS), help="whose orderings")
    p.add_argument(
        "world", choices=["ring", "glyphs", "clips", "voxels"], help="the embedded teacher"
    )
    p.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each method per seed"
    )
    p.add_argument(
        "--methods", nargs="+", default=None, help="which rows of the table; default: all"
    )
    p.add_argument(
        "--output_dir",
        default="runs/orderings",
        help="folder of the runs; those already finished there are read, not repeated",
    )
    p.add_argument(
        "--plot",
        default=None,
        metavar="PNG",
        help="decoupled_dmd: the curves of the first eight methods asked for",
    )
    argv = sys.argv[1:] + ["--"]  # what comes after the first "--" is for the script
    args, flags_given = p.parse_args(argv[: argv.index("--")]), argv[argv.index("--") + 1 : -1]
    methods = {name: (*entry, {})[:3] for name, entry in METHODS[args.script].items()}
    for name in args.methods or ():
        if name not in methods:
            p.error(f"argument --methods: {name!r} is none of {', '.join(methods)}")
    table, curves = [], {}
    for method in args.methods or methods:
        title, flags, options = methods[method]
        rows, minutes = [], []
        for seed in args.seeds:
            script, flags = options.get("script", args.script), [*methods[method][1], *flags_given]
            folder = lambda name: os.path.join(
                args.output_dir,
                f"{args.script}-{args.world}-{name}-{seed}{''.join(flags_given).replace('--', '-')}",
            )  # noqa: E731, B023
            out = folder(options.get("of", method))
            if (
                args.script == "tdm" or "longer" in options
            ):  # the same number of updates, whichever script's default that is
                updates = (
                    importlib.import_module(args.script)
                    .parse_args(["--teacher", args.world, *flags_given])
                    .max_train_steps
                )
                updates = (
                    updates // 20
                    if options.get("early")
                    else int(updates * options.get("longer", 1))
                )
                flags += [
                    "--max_train_steps",
                    str(updates),
                    *(["--lr_decay_share", "0"] if options.get("early") else []),
                ]
            if "layers_of" in options:
                flags += [
                    "--select",
                    *map(
                        str,
                        load_json(
                            os.path.join(folder(options["layers_of"]), "student", "config.json")
                        )["linear_layers"],
                    ),
                ]
            if script == "dmd" and args.script == "linvideo":  # second stage: dmd.py's own flags
                flags = methods[method][1] + (
                    ["--student_init", folder(options["init"])] if "init" in options else []
                )
            result, curve = run(script, args.world, ["--seed", str(seed), *flags], out)
            row = (
                tdm_row(result, out, args.world, seed, options)
                if args.script == "tdm"
                else next(
                    r for r in result["results"] if r["name"] == options.get("row", "student")
                )
            )
            minutes.append(result["seconds"] / 60)
            rows.append(
                {
                    **{f"x_{t}": 1000 * v for t, v in row.get("marginals", {}).items()},
                    **{
                        k: row[k]
                        for k in (
                            "fd",
                            "fd_teacher",
                            "patch_swd",
                            "accuracy",
                            "log_p",
                            "diversity",
                            "motion",
                            "moving",
                            "hit",
                            "iou",
                            "connected",
                            "paired_mse",
                            "undecided",
                            "velocity_error_before",
                            "velocity_error_after",
                        )
                        if k in row
                    },
                }
            )
            if curve:
                curves.setdefault(title, []).append(curve)
                rows[-1] |= {
                    "mean": curve[-1]["mean"],
                    "std": curve[-1]["std"],
                    "std(3/4)": curve[len(curve) * 3 // 4 - 1]["std"],
                }
        table.append((title, rows, minutes))
    columns = list(dict.fromkeys(c for _, rows, _ in table for c in rows[0]))
    print("\n| method | " + " | ".join(columns) + " | min |\n|" + "---|" * (len(columns) + 2))
    for title, rows, minutes in table:
        cells = [
            f"{statistics.mean(r[c] for r in rows):.3g} ({min(r[c] for r in rows):.3g}-{max(r[c] for r in rows):.3g})"
            if c in rows[0]
            else ""
            for c in columns
        ]
        print(f"| {title} | " + " | ".join(cells) + f" | {statistics.mean(minutes):.1f} |")
    if args.plot:
        plot(args.plot, dict(list(curves.items())[:8]))


if __name__ == "__main__":
    main()
