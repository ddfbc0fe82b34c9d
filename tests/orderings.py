"""The orderings that a paper claims, on an embedded world, over several seeds.

    python -m tests.orderings phased_dmd ring --seeds 0 1 2
    python -m tests.orderings phased_dmd clips --methods vanilla phased-4 -- --max_train_steps 300
    python -m tests.orderings decoupled_dmd glyphs --plot curves.png -- --max_train_steps 300
    python -m tests.orderings tdm ring
    python -m tests.orderings mdt_dist ring

Every method has the same student and the same number of student updates, but where its title says
otherwise. The script runs once for each method and seed; the report.json that it leaves is read,
and one Markdown table is printed: mean and range over the seeds of every measure of the student's
row, and minutes.

phased_dmd:     also energy distances x 1000 of its intermediate samples x_t to noised data.
decoupled_dmd:  also, of 500 samples at eight points of the run, log p(c | x) ("sharpness"), the
                distance to the guided teacher, mean and standard deviation of all values. The table
                has the last of them, and std(3/4), to show what still moves; --plot draws curves.
tdm:            some rows are another script's runs, or another row's student sampled in another
                way; "hit" is the share within three standard deviations of a mode.
"""

import argparse
import contextlib
import importlib
import math
import os
import statistics
import sys
from dataclasses import dataclass, replace
from unittest import mock

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from models.diffusion import step_grid  # noqa: E402
from models.files import load_json, save_json  # noqa: E402
from models.plumbing import report  # noqa: E402
from models.plumbing.run import Run  # noqa: E402
from models.worlds import load_world  # noqa: E402
from models.worlds.measures import balanced_labels, moments_distance  # noqa: E402

# ---- the methods that are compared ---------------------------------------------------------------


@dataclass
class Method:
    """One row of a table.

    title, flags      of the row; of the script
    script            another script than the one whose orderings these are
    of, row           the method whose run is read, its own unless given; the row of that report
    steps, renoise    read that run's student instead, sampled anew in so many steps, in this way
    longer            factor of the number of updates
    early             a twentieth of the updates, at constant rates
    layers_of, init   of linvideo: the method whose selected layers are given to this one; the
                      method whose student dmd.py starts from
    """

    title: str
    flags: str = ""
    script: str = ""
    of: str = ""
    row: str = "student"
    steps: int | None = None
    renoise: str = ""
    longer: float = 1
    early: bool = False
    layers_of: str = ""
    init: str = ""


M, FOUR, SEVERAL = Method, "--student_steps 4", "--student_steps 1 2 4"
CD, FRESH = "tests.consistency", "student_4_sde"
GIVEN, LOW = "--select 0 2 6 7", "--learning_rate 1e-4"  # of linvideo
PART = f"{GIVEN} --objective adm --state part"
PRINTED, UNIT = f"{PART} --weight eq13", f"{PART} --weight unit"
FOUR_DMD = f"{FOUR} --timestep_shift 2 --max_train_steps 300"  # of a clips teacher
AT = {4: "student", 2: "student_2", 1: "student_1"}  # steps: row of a report

# fmt: off
PHASED = {
    "vanilla": M("vanilla DMD, gradient through all steps (Fig. 1a)",
                 "--phases 1 --no_truncation"),
    "truncated": M("DMD with truncation (Fig. 1b)", "--phases 1 --shared_fake"),
    "truncated-step": M("the same, fake conditioned on the step", "--phases 1"),
    "phased-2": M("phased, 2 phases, truncation inside (Fig. 1d)", "--phases 2 --shared_fake"),
    "phased-2-step": M("the same, fake conditioned on the step (our default)", "--phases 2"),
    "phased-4": M("phased, 4 phases (Fig. 1c)", "--phases 4"),
    "phased-4-naive": M("the same with the naive target", "--phases 4 --target naive"),
}

DECOUPLED = {
    "ca": M("CA alone", "--no_dm"),
    "dm": M("DM alone", "--no_ca"),
    "shared": M("CA + DM, shared (DMD)", "--schedule shared"),
    "full": M("CA + DM, full", "--schedule full"),
    "constrained": M("CA + DM, constrained", "--schedule constrained"),
    "hybrid": M("CA + DM, hybrid (the paper's)", "--schedule hybrid"),
    **{f"{levels}-no-step": M(f"{levels}, fake not conditioned on the step",
                              f"--schedule {levels} --shared_fake")
       for levels in ("shared", "full", "constrained", "hybrid")},
    "ca-mean-variance": M("CA + mean-variance KL (Eq. 7)", "--no_dm --mean_variance_weight 1"),
    "ca-gan": M("CA + GAN", "--no_dm --gan_weight 0.1"),
    "ca-noisy": M("CA alone, u in (.95, 1)", "--no_dm --schedule full --ca_range 0.95 1"),
    "ca-half": M("CA alone, u in (.5, 1)", "--no_dm --schedule full --ca_range 0.5 1"),
    "ca-clean": M("CA alone, u in (0, .3)", "--no_dm --schedule full --ca_range 0 0.3"),
    "observer": M("CA alone at a tenth of the rate, a fake looks on",
                  "--no_dm --observer --learning_rate 5e-5"),
}

TDM = {
    "teacher-4": M("teacher, 4 Euler steps", FOUR, of="tdm-4", row="teacher_same_steps"),
    "tdm-4": M("TDM, 4 steps", FOUR),
    "tdm-4-sto": M("the same student, sampled with fresh noise", FOUR, of="tdm-4", renoise="sde"),
    "dmd-4": M("DMD2, 4 steps (fake conditioned on the step)", FOUR, script="dmd"),
    "dmd-4-batch": M("the same, one step for a batch", f"{FOUR} --one_step", script="dmd"),
    "dmd-4-no-step": M("the same, the fake not conditioned on the step either (paper)",
                       f"{FOUR} --one_step --shared_fake", script="dmd"),
    "cd-4": M("consistency distillation, equal updates, deterministic", FOUR, script=CD),
    "cd-4-sto": M("the same, sampled with fresh noise (its own way)", FOUR, script=CD, of="cd-4",
                  row=FRESH),
    "cd-4-calls": M("consistency distillation, equal network calls, deterministic", FOUR,
                    script=CD, longer=3.5),
    "cd-4-calls-sto": M("the same, sampled with fresh noise", FOUR, script=CD, longer=3.5,
                        of="cd-4-calls", row=FRESH),
    "clean": M("match x instead of x_s (Tab. 7)", f"{FOUR} --match clean"),
    "no-is": M("without importance sampling (Tab. 5)", f"{FOUR} --fake_noise fresh"),
    "exact": M("exact target of the fake", f"{FOUR} --fake_target exact"),
    "to-noise": M("levels of a step up to pure noise (the fake not conditioned on the step)",
                  f"{FOUR} --tau_range to_noise --shared_fake"),
    "x_s": M("regress x_s instead of x (as printed)", f"{FOUR} --regress x_s"),
    "demo": M("the demo's loss, per element", f"{FOUR} --loss demo"),
    "l2": M("squares (Tab. 5)", f"{FOUR} --loss l2"),
    **{f"only4-at-{n}": M(f"trained for 4 steps, sampled in {n}", FOUR, of="tdm-4", steps=n)
       for n in (2, 1)},
    **{f"with-K-at-{n}": M(f"K = 1, 2, 4, conditioned on K (Eq. 8), in {n}", SEVERAL,
                           of="with-K", row=row) for n, row in AT.items()},
    **{f"without-K-at-{n}": M(f"K = 1, 2, 4, not conditioned on K (Tab. 5), in {n}",
                              f"{SEVERAL} --no_steps_cond", of="without-K", row=row)
       for n, row in AT.items()},
    "early-tdm": M("TDM, first 5 % of the updates (Fig. 9)", FOUR, early=True),
    "early-clean": M("the same, match x", f"{FOUR} --match clean", early=True),
    "early-dmd": M("DMD2, first 5 % (fake conditioned on the step)", FOUR, script="dmd",
                   early=True),
    "early-dmd-no-step": M("DMD2, first 5 % (fake not conditioned on it)",
                           f"{FOUR} --one_step --shared_fake", script="dmd", early=True),
}

LINVIDEO = {
    "teacher": M("teacher", of="learned", row="teacher_same_steps"),
    "learned": M("learned (the paper's)"),
    "first": M("first layers", "--select first"),
    "last": M("last layers", "--select last"),
    "uniform": M("every other layer", "--select uniform"),
    "random": M("random layers", "--select random"),
    "fixed": M("the learned layers, fixed from the start", layers_of="learned"),
    "no-reg": M("learned, without the regulariser (Tab. 3)", "--no_regularizer"),
    "soft": M("learned, the count not rounded", "--count soft"),
    "mse": M("MSE (Eq. 7), given layers as in the next rows, rate 1e-3", GIVEN),
    "mse-low": M("MSE, rate 1e-4", f"{GIVEN} {LOW}"),
    "mse-time": M("MSE, 1.7 times the updates: ADM's time", GIVEN, longer=1.7),
    "adm-policy": M("ADM at the student's own states, 1e-3", f"{GIVEN} --objective adm"),
    "adm-policy-low": M("the same, 1e-4", f"{GIVEN} --objective adm {LOW}"),
    "adm-velocity": M("ADM, part of a step, its length left out of the weight, 1e-3", PART),
    "adm-velocity-low": M("the same, 1e-4", f"{PART} {LOW}"),
    "adm": M("ADM as printed (Eq. 11 to 13), part of a step, 1e-3", PRINTED),
    "adm-low": M("the same, 1e-4", f"{PRINTED} {LOW}"),
    "adm-unit": M("ADM without the weight (1 - t) / t, 1e-3", UNIT),
    "adm-unit-low": M("the same, 1e-4", f"{UNIT} {LOW}"),
    "adm-step": M("the same, whole steps", f"{UNIT} {LOW} --state step"),
    "adm-jump": M("the same, jumps", f"{UNIT} {LOW} --state jump"),
    "adm-rollout": M("the same, a step from the student's own states",
                     f"{UNIT} {LOW} --state rollout"),
    "adm-mse": M("ADM with MSE beside it, 1e-3", f"{UNIT} --regression_weight 1"),
    "adm-critic": M("ADM with a trained critic, 1e-4", f"{UNIT} {LOW} --objective adm_critic"),
    "dmd": M("few-step DMD loss (Tab. 4), 1e-4", f"{GIVEN} {LOW} --objective dmd"),
    **{f"target-{n}": M(f"{n} layers", f"--target_layers {n}") for n in (2, 6, 8)},
    **{f"map-{name}": M(f"given layers, feature map {name}", f"{GIVEN} --feature_map {name}")
       for name in ("softmax", "elu", "relu")},
    "two-stage": M("two stages: learned, then dmd.py in 4 steps", FOUR_DMD, script="dmd",
                   init="learned"),
    "dmd-only": M("dmd.py in 4 steps, softmax attention", FOUR_DMD, script="dmd"),
    "joint": M("one stage: the row of DMD's loss, sampled in 4 steps",
               f"{GIVEN} {LOW} --objective dmd", of="dmd", row="student_4"),
}

DMD = {
    "teacher": M("teacher", of="default", row="teacher"),
    "teacher-at-1": M("teacher, 1 step", of="default", row="teacher_same_steps"),
    "default": M("DMD2 without GAN, 5 updates of the fake", "--fake_update_ratio 5"),
    "one-to-one": M("the same, 1 update of the fake", "--fake_update_ratio 1"),
    "regression": M("DMD v1: 1 update of the fake, with regression",
                    "--fake_update_ratio 1 --regression_weight 0.25"),
    "no-fake": M("the real score alone", "--no_fake_score"),
    "gan": M("DMD2: with GAN", "--fake_update_ratio 5 --gan_weight 0.01"),
    "gan-alone": M("GAN alone", "--fake_update_ratio 5 --gan_weight 0.01 --dm_weight 0"),
    "four": M("4 steps, inputs of the student's own", f"{FOUR} --fake_update_ratio 5"),
    "four-real": M("4 steps, inputs of noised data",
                   f"{FOUR} --fake_update_ratio 5 --student_input real"),
    "teacher-at-4": M("teacher, 4 steps", of="four", row="teacher_same_steps"),
}

# Each is measured in two steps and in one. VM + VD makes 7 network calls an update, the others 3.
ARMS = {
    "mdt": M("VM + VD"),
    "vm": M("VM", "--arm vm"),
    "vd": M("VD", "--arm vd"),
    "cm": M("consistency distillation, equal updates", "--arm cm"),
    "cm-calls": M("consistency distillation, equal calls", "--arm cm", longer=7 / 3),
    "scm": M("sCM, equal updates", "--arm scm"),
    "scm-calls": M("sCM, equal calls", "--arm scm", longer=7 / 3),
    **{f"{arm}-{c}": M(f"{title}, d_norm {c}", f"--arm {arm} --d_norm {c}")
       for arm, title in (("mdt", "VM + VD"), ("vm", "VM")) for c in ("0.1", "rms")},
}
MDT = {
    "teacher": M("teacher, 2 steps", of="mdt", row="teacher_same_steps"),
    "teacher-at-1": M("teacher, 1 step", of="mdt", row="teacher_1"),
    **{f"{name}{end}": replace(arm, title=f"{arm.title}, {steps}", of=name, row=row)
       for name, arm in ARMS.items()
       for end, steps, row in (("", "2 steps", "student"), ("-at-1", "1 step", "student_1"))},
}
# fmt: on
METHODS = {
    "dmd": DMD,
    "phased_dmd": PHASED,
    "decoupled_dmd": DECOUPLED,
    "tdm": TDM,
    "linvideo": LINVIDEO,
    "mdt_dist": MDT,
}
MEASURES = """fd fd_teacher patch_swd accuracy log_p diversity motion moving hit iou connected
    paired_mse undecided velocity_error_before velocity_error_after""".split()

# ---- runs ----------------------------------------------------------------------------------------

POINTS = 8  # of a curve


@contextlib.contextmanager
def measured_saves(script, curve):
    """Inside, saves of decoupled_dmd.py also measure 500 samples of the student, into `curve`."""
    real, guided = report.save_student, []

    def save(run, teacher, net, times):
        real(run, teacher, net, times)
        world = teacher.world
        label = balanced_labels(500, world.num_classes)

        def samples(sampler):
            return report.many(lambda a, b: sampler(label, a, b), len(label))[0]

        x = samples(script.student_sampler(run, net, teacher, times, run.args.renoise))
        if not guided:
            guided.append(world.moments(samples(report.teacher_sampler(run, teacher)), label))
        fd_teacher = moments_distance(world.moments(x, label), guided[0])
        log_p, mean, std = world.measure(x, label)["log_p"], float(x.mean()), float(x.std())
        curve.append({"log_p": log_p, "fd_teacher": fd_teacher, "mean": mean, "std": std})

    with mock.patch.object(report, "save_student", save):
        yield


def run(script_name, world, flags, out, curves=True):
    """One run, or what an earlier one left in `out`.  -> its report.json, and its curve or [].

    curves: whether samples are measured at eight points of a run of decoupled_dmd.py.
    """
    paths = [os.path.join(out, name) for name in ("report.json", "curve.json")]
    if not all(map(os.path.isfile, paths)):
        script, curve = importlib.import_module(script_name), []
        argv, saves = ["--teacher", world, "--output_dir", out, *flags], contextlib.nullcontext()
        if script_name == "decoupled_dmd" and curves:
            every = max(1, script.parse_args(argv).max_train_steps // POINTS)
            argv += ["--checkpointing_steps", str(every)]
            saves = measured_saves(script, curve)
        with saves:
            script.main(argv)
        save_json({"points": curve}, paths[1])
    result, curve = (load_json(path) for path in paths)
    return result, curve["points"][:POINTS]


def hit(x):
    """Share of ring samples within three standard deviations of a mode."""
    exact = load_world("ring").exact
    near = torch.cdist(x.double(), exact.means).min(1).values <= 3 * exact.std
    return float(near.double().mean())


def sampled(out, seed, steps=None, renoise="ode"):
    """The student that a run of tdm.py or dmd.py left, sampled anew.

    In `steps` steps, its own number unless given, by Euler or with fresh noise.  -> 2,000 samples,
    labels.
    """
    tdm = importlib.import_module("tdm")
    method = load_json(os.path.join(out, "student", "sampler.json"))["method"]
    flags = ["--sample", out, "--output_dir", f"{out}-again", "--seed", str(seed)]
    again = Run(importlib.import_module(method).parse_args(flags), method)
    net, saved, teacher = report.load_student(again)
    n, see_K = steps or len(saved["times"]), saved.get("steps_cond", False)
    grids = {n: step_grid(n, teacher.shift)}
    sampler = tdm.student_samplers(again, net, teacher, grids, see_K, renoise)[n]
    label = balanced_labels(2000, teacher.world.num_classes)
    return report.many(lambda a, b: sampler(label, a, b), len(label))[0], label


def tdm_row(result, out, world, seed, method):
    """The row of a method of tdm: of the report, or its student sampled anew; "hit" on the ring."""
    row, x = row_named(result, method.row), None
    if method.steps or method.renoise:
        x, label = sampled(out, seed, method.steps, method.renoise or "ode")
        row = load_world(world).measure(x, label)
    elif world == "ring" and method.row == "student" and os.path.isdir(f"{out}/student"):
        x, _ = sampled(out, seed, renoise="sde" if result["method"] == "dmd" else "ode")
    return {**row, "hit": hit(x)} if world == "ring" and x is not None else row


def row_named(result, name):
    return dict(next(row for row in result["results"] if row["name"] == name))


def flags_of(args, method, given, folder):
    """The flags of a method's run. given: those after "--"; folder: method's name -> its run."""
    flags = method.flags.split()
    if method.script == "dmd" and args.script == "linvideo":  # a second stage, with its own flags
        return [*flags, "--student_init", folder(method.init)] if method.init else flags
    flags += given
    if args.script == "tdm" or method.longer != 1:
        # the same number of updates, whichever script's default that is
        script = importlib.import_module(args.script)
        updates = script.parse_args(["--teacher", args.world, *given]).max_train_steps
        updates = updates // 20 if method.early else int(updates * method.longer)
        flags += ["--max_train_steps", str(updates)]
        if method.early:
            flags += ["--lr_decay_share", "0"]
    if method.layers_of:
        config = load_json(os.path.join(folder(method.layers_of), "student", "config.json"))
        flags += ["--select", *map(str, config["linear_layers"])]
    return flags


def folder_of(args, name, given, seed):
    """Where the run of a method is, or of the one that it reads.  given: flags for the script."""
    joined = "".join(given).replace("--", "-")
    name = METHODS[args.script][name].of or name
    return os.path.join(args.output_dir, f"{args.script}-{args.world}-{name}-{seed}{joined}")


def measured(args, name, given, seed):
    """One method and seed.  -> {column: value}, minutes, its curve or []."""
    method = METHODS[args.script][name]

    def folder(name):
        return folder_of(args, name, given, seed)

    out, script = folder(name), method.script or args.script
    flags = ["--seed", str(seed), *flags_of(args, method, given, folder)]
    result, curve = run(script, args.world, flags, out)
    if args.script == "tdm":
        row = tdm_row(result, out, args.world, seed, method)
    else:
        row = row_named(result, method.row)
    cells = {f"x_{t}": 1000 * v for t, v in row.get("marginals", {}).items()}
    cells |= {name: row[name] for name in MEASURES if name in row}
    if curve:
        last, before = curve[-1], curve[len(curve) * 3 // 4 - 1]
        cells |= {"mean": last["mean"], "std": last["std"], "std(3/4)": before["std"]}
    return cells, result["seconds"] / 60, curve


# ---- the table and the plot ----------------------------------------------------------------------


def span(values):
    """Mean and range as text."""
    return f"{statistics.mean(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def print_table(table):
    """table: [(title, cells of each seed, minutes of each seed), ...]."""
    columns = list(dict.fromkeys(c for _, rows, _ in table for c in rows[0]))
    print(f"\n| method | {' | '.join(columns)} | min |\n|{'---|' * (len(columns) + 2)}")
    for title, rows, minutes in table:
        cells = [span([r[c] for r in rows]) if c in rows[0] else "" for c in columns]
        print(f"| {title} | {' | '.join(cells)} | {statistics.mean(minutes):.1f} |")


COLOURS = [
    (31, 119, 180),
    (214, 69, 65),
    (46, 139, 87),
    (150, 90, 160),
    (230, 150, 20),
    (90, 90, 90),
    (0, 170, 180),
    (200, 80, 160),
]
PANELS = {  # measure of a curve: title, whether on a logarithmic axis
    "log_p": ("log p(c | x)", False),
    "fd_teacher": ("fd to the guided teacher (log)", True),
    "mean": ("mean", False),
    "std": ("standard deviation (log)", True),
}


def axis(values):
    """Lower and upper end: one interquartile range beyond the quartiles; the rest leaves it."""
    q1, q3 = (values.quantile(q).item() for q in (0.25, 0.75))
    low = max(values.min().item(), 2 * q1 - q3) - 1e-3
    return low, min(values.max().item(), 2 * q3 - q1) + 1e-3


def plot(path, curves, zoom=2):
    """curves: {title: [curve of a seed, ...]} -> PNG.

    One panel a measure, one colour a method, one line a seed.
    """
    width, height, gap = 250, 230, 56
    size = gap + len(PANELS) * (width + gap), height + 60 + 16 * len(curves)
    image = Image.new("RGB", tuple(zoom * v for v in size), "white")
    pen = ImageDraw.Draw(image)

    def text(x, y, words, anchor="la"):
        font = ImageFont.load_default(zoom * 12)
        pen.text((zoom * x, zoom * y), words, (40, 40, 40), font, anchor)

    for panel, (name, (title, log)) in enumerate(PANELS.items()):
        left = gap + panel * (width + gap)
        heights = {
            method: [[math.log10(max(p[name], 1e-9)) if log else p[name] for p in c] for c in seeds]
            for method, seeds in curves.items()
        }
        low, high = axis(torch.tensor([v for s in heights.values() for c in s for v in c]))
        frame = left, 24, left + width, 24 + height
        pen.rectangle([zoom * v for v in frame], outline=(150, 150, 150))
        text(left + width / 2, 6, title, anchor="ma")
        for y, v, anchor in ((24, high, "ra"), (24 + height, low, "rd")):
            text(left - 4, y, f"{10**v if log else v:.3g}", anchor=anchor)
        for colour, seeds in zip(COLOURS, heights.values()):
            for c in seeds:
                shares = [(high - min(high, max(low, v))) / (high - low) for v in c]
                steps = [left + width * (i + 1) / len(c) for i in range(len(c))]
                line = [(zoom * x, zoom * (24 + height * y)) for x, y in zip(steps, shares)]
                pen.line(line, colour, zoom)
    for row, (title, colour) in enumerate(zip(curves, COLOURS)):
        y = height + 50 + 16 * row
        pen.line([zoom * v for v in (gap, y, gap + 30, y)], colour, 2 * zoom)
        text(gap + 38, y - 7, title)
    words = "student updates, an eighth of the run a point"
    text(len(PANELS) * (width + gap), height + 28, words, anchor="ra")
    image.save(path, optimize=True)


def parse_args(argv):
    """-> the flags, and those after "--", which go to the script."""
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Flags after -- go to the script."
    )
    add = p.add_argument
    add("script", choices=list(METHODS), help="whose orderings")
    worlds = ["ring", "glyphs", "clips", "voxels"]
    add("world", choices=worlds, help="the embedded teacher")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each method per seed")
    add("--methods", nargs="+", default=None, help="which rows of the table; default: all")
    add(
        "--output_dir",
        default="runs/orderings",
        help="folder of the runs; those already finished there are read, not repeated",
    )
    curves = "decoupled_dmd: the curves of the first eight methods asked for"
    add("--plot", default=None, metavar="PNG", help=curves)
    argv = argv + ["--"]
    end = argv.index("--")
    args, given = p.parse_args(argv[:end]), argv[end + 1 : -1]
    for name in args.methods or ():
        if name not in METHODS[args.script]:
            known = ", ".join(METHODS[args.script])
            p.error(f"argument --methods: {name!r} is none of {known}")
    return args, given


def main(argv=None):
    args, given = parse_args(sys.argv[1:] if argv is None else argv)
    table, curves = [], {}
    for name in args.methods or METHODS[args.script]:
        title = METHODS[args.script][name].title
        cells, minutes, of_seeds = zip(*(measured(args, name, given, s) for s in args.seeds))
        if any(of_seeds):
            curves[title] = list(of_seeds)
        table.append((title, cells, minutes))
    print_table(table)
    if args.plot:
        plot(args.plot, dict(list(curves.items())[:8]))


if __name__ == "__main__":
    main()
