"""The orderings that a paper claims, on an embedded world: same student, same number of student updates, several seeds.

    python -m tests.orderings phased_dmd ring --seeds 0 1 2
    python -m tests.orderings phased_dmd clips --methods vanilla truncated phased-2 phased-4 -- --max_train_steps 300
    python -m tests.orderings decoupled_dmd glyphs --plot docs/decoupled-glyphs.png -- --max_train_steps 300

Runs the script for each method and seed, reads the report.json it leaves, and prints one Markdown table: mean and range over the seeds of
every measure of the student's row, and minutes. phased_dmd: also the energy distances x 1000 of its intermediate samples x_t to noised data.
decoupled_dmd: also, of 500 samples at eight points of the run, log p(c | x) ("sharpness"), distance to the guided teacher, mean and standard
deviation of all values; the table has the last of them, and std(3/4), to show what still moves; --plot draws the curves.
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
from models import io, report  # noqa: E402
from models.toy import balanced_labels, load_world, moments_distance  # noqa: E402

METHODS = {
    "phased_dmd": {
        "vanilla": ("vanilla DMD, gradient through all steps (Fig. 1a)", ["--phases", "1", "--no_truncation"]),
        "truncated": ("DMD with truncation (Fig. 1b)", ["--phases", "1", "--shared_fake"]),
        "truncated-told": ("the same, fake told the step", ["--phases", "1"]),
        "phased-2": ("phased, 2 phases, truncation inside (Fig. 1d)", ["--phases", "2", "--shared_fake"]),
        "phased-2-told": ("the same, fake told the step (our default)", ["--phases", "2"]),
        "phased-4": ("phased, 4 phases (Fig. 1c)", ["--phases", "4"]),
        "phased-4-naive": ("the same with the naive target", ["--phases", "4", "--target", "naive"]),
    },
    "decoupled_dmd": {
        "ca": ("CA alone", ["--no_dm"]),
        "dm": ("DM alone", ["--no_ca"]),
        "shared": ("CA + DM, shared (DMD)", ["--schedule", "shared"]),
        "full": ("CA + DM, full", ["--schedule", "full"]),
        "constrained": ("CA + DM, constrained", ["--schedule", "constrained"]),
        "hybrid": ("CA + DM, hybrid (the paper's)", ["--schedule", "hybrid"]),
        "shared-untold": ("shared, fake not told the step", ["--schedule", "shared", "--shared_fake"]),
        "full-untold": ("full, fake not told the step", ["--schedule", "full", "--shared_fake"]),
        "constrained-untold": ("constrained, fake not told the step", ["--schedule", "constrained", "--shared_fake"]),
        "hybrid-untold": ("hybrid, fake not told the step", ["--schedule", "hybrid", "--shared_fake"]),
        "ca-mean-variance": ("CA + mean-variance KL (Eq. 7)", ["--no_dm", "--mean_variance_weight", "1"]),
        "ca-gan": ("CA + GAN", ["--no_dm", "--gan_weight", "0.1"]),
        "ca-noisy": ("CA alone, u in (.95, 1)", ["--no_dm", "--schedule", "full", "--ca_range", "0.95", "1"]),
        "ca-half": ("CA alone, u in (.5, 1)", ["--no_dm", "--schedule", "full", "--ca_range", "0.5", "1"]),
        "ca-clean": ("CA alone, u in (0, .3)", ["--no_dm", "--schedule", "full", "--ca_range", "0", "0.3"]),
    },
}
POINTS = 8  # of a curve


def measure_as_it_saves(script, curve):
    """Make a script's saves also measure 500 samples of the student they save, into the list `curve`.  -> a function that undoes it."""
    real, guided = report.save_student, []

    def save(args, method, net, teacher, times, shape):
        real(args, method, net, teacher, times, shape)
        world, conditions, device = load_world(args.teacher), io.Conditions(args, net), next(net.parameters()).device
        label = balanced_labels(500, world.num_classes)
        sampler = script.student_sampler(args, net, teacher, conditions, shape, times, device)
        x, _ = report.many(lambda a, b: sampler(label, a, b), len(label))
        if not guided:
            draw = report.teacher_sampler(args, teacher, conditions, shape, device)
            guided.append(world.moments(report.many(lambda a, b: draw(label, a, b), len(label))[0], label))
        curve.append({"log_p": world.measure(x, label)["log_p"], "fd_teacher": moments_distance(world.moments(x, label), guided[0]),
                      "mean": float(x.mean()), "std": float(x.std())})
    report.save_student = save
    return lambda: setattr(report, "save_student", real)


def run(script_name, world, flags, out):
    """One run, or what an earlier one left in `out`  -> its report.json, and its curve or None."""
    script, curve = importlib.import_module(script_name), []
    if not os.path.isfile(os.path.join(out, "report.json")):
        undo = measure_as_it_saves(script, curve) if script_name == "decoupled_dmd" else lambda: None
        try:
            argv = ["--teacher", world, "--output_dir", out, *flags]
            if script_name == "decoupled_dmd":
                argv += ["--checkpointing_steps", str(max(1, script.parse_args(argv).max_train_steps // POINTS))]
            script.main(argv)
        finally:
            undo()
        io.save_json({"points": curve}, os.path.join(out, "curve.json"))
    return io.load_json(os.path.join(out, "report.json")), io.load_json(os.path.join(out, "curve.json"))["points"][:POINTS]


def plot(path, curves, zoom=2):
    """curves: {title: [curve of a seed, ...]} -> PNG, one panel a measure, one colour a method, one line a seed; the vertical axes end
    one interquartile range beyond the quartiles of all points."""
    names, width, height, gap = ["log_p", "fd_teacher", "mean", "std"], 250, 230, 56
    image = Image.new("RGB", (zoom * (gap + len(names) * (width + gap)), zoom * (height + 60 + 16 * len(curves))), "white")
    pen, colours = ImageDraw.Draw(image), [(31, 119, 180), (214, 69, 65), (46, 139, 87), (150, 90, 160), (230, 150, 20), (90, 90, 90), (0, 170, 180), (200, 80, 160)]

    def text(x, y, words, fill=(40, 40, 40), anchor="la"):
        pen.text((zoom * x, zoom * y), words, fill, ImageFont.load_default(zoom * 12), anchor)

    for panel, name in enumerate(names):
        log = name in ("fd_teacher", "std")
        scale = lambda v: math.log10(max(v, 1e-9)) if log else v  # noqa: E731, B023
        values = torch.tensor([scale(p[name]) for seeds in curves.values() for c in seeds for p in c])
        q1, q3 = (values.quantile(q).item() for q in (0.25, 0.75))
        low, high = max(values.min().item(), 2 * q1 - q3) - 1e-3, min(values.max().item(), 2 * q3 - q1) + 1e-3  # what runs away leaves the panel
        left = gap + panel * (width + gap)
        pen.rectangle([zoom * left, zoom * 24, zoom * (left + width), zoom * (24 + height)], outline=(150, 150, 150))
        title = {"log_p": "log p(c | x)", "fd_teacher": "fd to the guided teacher (log)", "mean": "mean", "std": "standard deviation (log)"}[name]
        text(left + width / 2, 6, title, anchor="ma")
        for y, v, anchor in ((24, high, "ra"), (24 + height, low, "rd")):
            text(left - 4, y, f"{10**v if log else v:.3g}", anchor=anchor)
        for colour, seeds in zip(colours, curves.values()):
            for c in seeds:
                heights = [(high - min(high, max(low, scale(p[name])))) / (high - low) for p in c]
                at = [(zoom * (left + width * (i + 1) / len(c)), zoom * (24 + height * h)) for i, h in enumerate(heights)]
                pen.line(at, colour, zoom)
    for row, (title, colour) in enumerate(zip(curves, colours)):
        pen.line([zoom * gap, zoom * (height + 50 + 16 * row), zoom * (gap + 30), zoom * (height + 50 + 16 * row)], colour, 2 * zoom)
        text(gap + 38, height + 43 + 16 * row, title)
    text(gap + 4 * (width + gap) - gap, height + 28, "student updates, an eighth of the run a point", anchor="ra")
    image.save(path, optimize=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Flags after -- go to the script.")
    p.add_argument("script", choices=list(METHODS), help="whose orderings")
    p.add_argument("world", choices=["ring", "glyphs", "clips", "voxels"], help="the embedded teacher")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each method per seed")
    p.add_argument("--methods", nargs="+", default=None, help="which rows of the table; default: all")
    p.add_argument("--output_dir", default="runs/orderings", help="folder of the runs; those already finished there are read, not repeated")
    p.add_argument("--plot", default=None, metavar="PNG", help="decoupled_dmd: the curves of the first eight methods asked for")
    argv = sys.argv[1:] + ["--"]  # what comes after the first "--" is for the script
    args, flags_given = p.parse_args(argv[:argv.index("--")]), argv[argv.index("--") + 1:-1]
    methods = METHODS[args.script]
    for name in args.methods or ():
        if name not in methods:
            p.error(f"argument --methods: {name!r} is none of {', '.join(methods)}")
    table, curves = [], {}
    for method in args.methods or methods:
        title, flags = methods[method]
        rows, minutes = [], []
        for seed in args.seeds:
            out = os.path.join(args.output_dir, f"{args.script}-{args.world}-{method}-{seed}{''.join(flags_given).replace('--', '-')}")
            result, curve = run(args.script, args.world, ["--seed", str(seed), *flags, *flags_given], out)
            row = next(r for r in result["results"] if r["name"] == "student")
            minutes.append(result["seconds"] / 60)
            rows.append({**{f"x_{t}": 1000 * v for t, v in row.get("marginals", {}).items()},
                         **{k: row[k] for k in ("fd", "fd_teacher", "patch_swd", "accuracy", "log_p", "diversity", "motion", "moving") if k in row}})
            if curve:
                curves.setdefault(title, []).append(curve)
                rows[-1] |= {"mean": curve[-1]["mean"], "std": curve[-1]["std"], "std(3/4)": curve[len(curve) * 3 // 4 - 1]["std"]}
        table.append((title, rows, minutes))
    columns = list(table[0][1][0])
    print("\n| method | " + " | ".join(columns) + " | min |\n|" + "---|" * (len(columns) + 2))
    for title, rows, minutes in table:
        cells = [f"{statistics.mean(r[c] for r in rows):.3g} ({min(r[c] for r in rows):.3g}-{max(r[c] for r in rows):.3g})" for c in columns]
        print(f"| {title} | " + " | ".join(cells) + f" | {statistics.mean(minutes):.1f} |")
    if args.plot:
        plot(args.plot, dict(list(curves.items())[:8]))


if __name__ == "__main__":
    main()
