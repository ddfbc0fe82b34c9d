"""Every method that makes few-step students, on one teacher, at equal network calls in training.

    python -m tests.side_by_side glyphs --write              # tables, pictures, the page
    python -m tests.side_by_side ring --methods dmd2 tdm --steps 1 --calls 200000
    python -m tests.side_by_side glyphs --finished           # what is there; trains nothing

What is counted is samples x calls of a network, whichever network it is: 1 for a forward call, 2
more where its weights get a gradient, 1 more where only its input does, 1 more where it carries a
forward-mode derivative, and half of all that for a call that ends at the middle features. One real
update of every script is counted so, by hooks, and what a script does before its first (DMD's pairs
of noise and sample). --calls then gives each its number of updates. The run itself is counted, too.

All have the teacher, the timestep shift, the noise and the labels of a seed in common, and each its
script's own rates, batch and averages for that world. Where a method trains one student for all
step counts (MDT-dist, consistency distillation, MeanFlow) it is one run; the others have a run of
their own for each. Finished runs are read, not repeated.
"""

import contextlib
import importlib
import io
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from models.files import UserError, load_json, open_tensors, save_json, save_tensors  # noqa: E402
from models.pictures import save_grid  # noqa: E402
from models.plumbing import report  # noqa: E402
from models.plumbing.film import Film  # noqa: E402
from models.plumbing.flags import Parser, number  # noqa: E402
from models.plumbing.run import Run, run_main  # noqa: E402
from models.worlds import load_world  # noqa: E402
from models.worlds.measures import balanced_labels  # noqa: E402
from tests.orderings import AT, row_named, run, span  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGE = os.path.join(ROOT, "docs", "results", "side_by_side.md")
FIGURES = os.path.join(ROOT, "docs", "figures")

# ---- what is compared ----------------------------------------------------------------------------

STEPS = (1, 2, 4)
BUDGETS = {"ring": 1_000_000, "glyphs": 100_000, "clips": 60_000}  # --calls
SHIFTS = {"ring": 1, "glyphs": 2, "clips": 2}  # --timestep_shift of all methods alike
SEVERAL = "--student_steps 1 2 4"

# fmt: off
RUNS = {  # name: script, its flags
    "dmd-1": (
        "dmd", "--fake_update_ratio 1 --learning_rate 6e-4 --regression_weight 0.25 "
        "--regression_pairs 256",
    ),
    **{f"dmd2-{n}": ("dmd", f"--student_steps {n}") for n in STEPS},
    **{f"phased-{n}": ("phased_dmd", f"--student_steps {n} --phases 2") for n in (2, 4)},
    **{f"decoupled-{n}": ("decoupled_dmd", f"--student_steps {n}") for n in STEPS},
    **{f"tdm-{n}": ("tdm", f"--student_steps {n}") for n in STEPS},
    "mdt": ("mdt_dist", f"{SEVERAL} --teacher_steps 0"),
    "cd": ("tests.consistency", SEVERAL),
    "meanflow": ("tests.meanflow", SEVERAL),
}
# fmt: on
OF_WORLD = {  # flags of a script on a world that has no row of its own in the script's PRESETS
    ("mdt_dist", "glyphs"): "--slow_clock 20 --learning_rate 1.2e-4",
    ("mdt_dist", "clips"): "--slow_clock 20 --learning_rate 1.2e-4",
}
PAIRS = "its regression is onto pairs of noise and sample, so it has one step"
ONE_PHASE = "one step is one phase, which is DMD2"


@dataclass
class Row:
    """One line of the tables.

    title      of the line
    at         {steps: the run that it is read from and its row of report.json, or why none is}
    trained    False for the teacher, which the run only measures
    """

    title: str
    at: dict
    trained: bool = True


def each(name, row="student"):
    """A run for each step count."""
    return {n: (f"{name}-{n}", row) for n in STEPS}


ROWS = {
    "teacher-full": Row("teacher in full", each("dmd2", "teacher"), False),
    "teacher": Row("teacher, as many steps", each("dmd2", "teacher_same_steps"), False),
    "dmd": Row("DMD (v1, 256 pairs)", {1: ("dmd-1", "student"), 2: PAIRS, 4: PAIRS}),
    "dmd2": Row("DMD2, without its GAN", each("dmd2")),
    "phased": Row("Phased DMD, 2 phases", {**each("phased"), 1: ONE_PHASE}),
    "tdm": Row("TDM", each("tdm")),
    "mdt": Row("MDT-dist (sees data)", {n: ("mdt", AT[n]) for n in STEPS}),
    "cd": Row(
        "consistency distillation, fresh noise between steps (sees data)",
        {n: ("cd", AT[1] if n == 1 else f"student_{n}_sde") for n in STEPS},
    ),
    "meanflow": Row("MeanFlow (sees data)", {n: ("meanflow", AT[n]) for n in STEPS}),
    "guided-full": Row("teacher in full, guidance 3", each("decoupled", "teacher"), False),
    "guided": Row(
        "teacher, as many steps, guidance 3", each("decoupled", "teacher_same_steps"), False
    ),
    "decoupled": Row("Decoupled DMD, guidance 3", each("decoupled")),
}

# ---- counting ------------------------------------------------------------------------------------


class Calls:
    """Samples x calls of networks, of everything between start and stop; see the file's head."""

    def __init__(self):
        self.total, self.on = 0.0, False

    def start(self):
        self.total, self.on = 0.0, True

    def stop(self):
        self.on = False

    def __call__(self, module, inputs, output):  # as a forward hook of all modules
        if self.on and hasattr(module, "prediction") and hasattr(module, "cond_names"):
            self.total += price(module, inputs[0], output)


def price(net, x, output):
    """What a call net(x, ...) counts for."""
    passes = 1
    if forward_ad.unpack_dual(x).tangent is not None:
        passes += 1
    if torch.is_grad_enabled():
        if any(p.requires_grad for p in net.parameters()):
            passes += 2
        elif x.requires_grad:
            passes += 1
    return len(x) * passes * (1 if output.shape == x.shape else 0.5)  # middle features


class Enough(BaseException):
    """Ends a script after the updates that are counted."""


@contextlib.contextmanager
def watched(calls, last=None):
    """Inside, a script's training is counted, from the opening of its folder to its last update.

    Pictures in the middle of the run, which call networks too, are left out. last: a function that
    is called after the last update.
    """
    open_folder, end_step, film = Run.open_folder, Run.end_step, Film.__init__

    def filmed(*args, **more):  # the ring's film asks for scores as it begins
        on, calls.on = calls.on, False
        film(*args, **more)
        calls.on = on

    def opened(run, first):
        open_folder(run, first)
        calls.start()

    def ended(run, step, *args, **more):
        due = end_step(run, step, *args, **more)
        if step + 1 == run.args.max_train_steps:
            calls.stop()
            if last:
                last()
        return due

    hook = register_module_forward_hook(calls)
    with (
        mock.patch.object(Run, "open_folder", opened),
        mock.patch.object(Run, "end_step", ended),
        mock.patch.object(Film, "__init__", filmed),
        mock.patch.object(Film, "frame", lambda *args, **more: None),
        mock.patch.object(report, "save_previews", lambda *args: None),
    ):
        try:
            yield
        finally:
            hook.remove()


def calls_of(script_name, world, flags):
    """Run the script for one update, and for one of each phase of phased_dmd.py.

    -> what comes before the first update; an update, on average over the phases.
    """
    calls, marks, steps = Calls(), [], Run.steps
    script, updates = importlib.import_module(script_name), 1
    if script_name == "phased_dmd":
        updates = script.parse_args(["--teacher", world, *flags]).phases

    def stop():
        marks.append(calls.total)
        raise Enough

    def first(run, *args):
        marks.append(calls.total)
        return steps(run, *args)

    with tempfile.TemporaryDirectory() as folder:
        out = ["--output_dir", os.path.join(folder, "run"), "--max_train_steps", str(updates)]
        with (
            watched(calls, stop),
            mock.patch.object(Run, "steps", first),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.suppress(Enough),
        ):
            script.main(["--teacher", world, *flags, *out])
    return marks[0], (marks[-1] - marks[0]) / updates


# ---- runs ----------------------------------------------------------------------------------------


def folder_of(args, name, seed):
    return os.path.join(args.output_dir, f"{args.world}-{name}-{seed}-{args.calls}")


def flags_of(world, name):
    """The script of a run, and its flags but seed and length."""
    script, flags = RUNS[name]
    flags = f"{flags} {OF_WORLD.get((script, world), '')} --timestep_shift {SHIFTS[world]}"
    return script, flags.split()


def updates_of(args, name):
    """How many updates --calls are worth to a run. The count is kept in the output folder.

    Raises UserError for a budget that ends before the second update.
    """
    script, flags = flags_of(args.world, name)
    path = os.path.join(args.output_dir, f"{args.world}-{name}-update.json")
    known = load_json(path) if os.path.isfile(path) else {}
    if known.get("flags") != flags:
        before, update = calls_of(script, args.world, flags)
        known = {"flags": flags, "before": before, "update": update}
        os.makedirs(args.output_dir, exist_ok=True)
        save_json(known, path)
    updates = int((args.calls - known["before"]) / known["update"])
    if updates < 2:
        need = int(known["before"] + 2 * known["update"]) + 1
        raise UserError(
            f"--calls {args.calls}: {name} needs {need} for two updates: give --calls {need} or "
            "more, or leave its row out of --methods"
        )
    return updates


@contextlib.contextmanager
def kept(world, calls):
    """Inside, a script also leaves side_by_side.json (calls, updates, processor seconds of its
    training) and the samples of every row of its report that the picture shows."""
    number = 400 if world == "ring" else load_world(world).num_classes
    measured, save, shown = report.measured_teacher, report.save_report, {}
    began = time.process_time()
    spent = []

    def also_shown(run, teacher, label, sampler, key, row):
        shown[row["name"]] = sampler(label, 0, number).float().cpu()
        return measured(run, teacher, label, sampler, key, row)

    def save_both(run, *args, **more):  # before report.json, which says that all is there
        save_tensors(shown, os.path.join(run.folder, "shown.safetensors"))
        more_of_it = {"calls": calls.total, "updates": run.args.max_train_steps}
        more_of_it["seconds"] = spent[0] - began
        save_json(more_of_it, os.path.join(run.folder, "side_by_side.json"))
        save(run, *args, **more)

    with (
        watched(calls, lambda: spent.append(time.process_time())),
        mock.patch.object(report, "measured_teacher", also_shown),
        mock.patch.object(report, "save_report", save_both),
    ):
        yield


def trained(args, name, seed):
    """A run's report.json and side_by_side.json; None where it is not there with --finished."""
    out = folder_of(args, name, seed)
    if not os.path.isfile(os.path.join(out, "report.json")):
        if args.finished:
            return None
        script, flags = flags_of(args.world, name)
        flags += ["--seed", str(seed), "--max_train_steps", str(updates_of(args, name))]
        print(f"{name}, seed {seed}: {flags[-1]} updates", flush=True)
        with kept(args.world, Calls()):
            run(script, args.world, flags, out, curves=False)
    return load_json(f"{out}/report.json"), load_json(f"{out}/side_by_side.json")


def cells_of(args, row, n):
    """One line's cells of every seed.  -> list of {column: value}; "not run"; or why there is none.

    A run that is missing for one of the seeds is missing.
    """
    if isinstance(row.at[n], str):
        return row.at[n]
    (name, entry), cells = row.at[n], []
    for seed in args.seeds:
        found = trained(args, name, seed)
        if not found:
            return NOT_RUN
        measured = row_named(found[0], entry)
        of_seed = {c: measured[c] for c in MEASURES if c in measured}
        if row.trained:
            of_seed |= {"updates": found[1]["updates"], "seconds": found[1]["seconds"]}
        cells.append({"calls": measured["nfe"], **of_seed})
    return cells


# ---- the tables and the picture ------------------------------------------------------------------

NOT_RUN = "not run"
MEASURES = ("fd", "fd_teacher", "patch_swd", "accuracy", "diversity", "motion")
COLUMNS = ("calls", *MEASURES, "updates", "seconds")


def text_of(values):
    """A cell: the value of one seed, mean and range of several; whole numbers stay whole."""
    if len(set(values)) == 1 and values[0] % 1 == 0:
        return f"{values[0]:.0f}"
    return span(values) if len(values) > 1 else f"{values[0]:.3g}"


def table(n, lines):
    """Markdown. lines: {row name: what `cells_of` gives}."""
    measured = [cells for cells in lines.values() if not isinstance(cells, str)]
    columns = [c for c in COLUMNS if any(c in cells[0] for cells in measured)] or ["calls", "fd"]
    text = [f"| {n} step{'s' * (n > 1)} | {' | '.join(columns)} |", "|---" * (len(columns) + 1)]
    text[1] += "|"
    for name, cells in lines.items():
        if isinstance(cells, str):
            shown = [NOT_RUN if cells == NOT_RUN else "-", *[""] * (len(columns) - 1)]
        else:
            shown = [text_of([c[k] for c in cells]) if k in cells[0] else "" for k in columns]
        text.append(f"| {ROWS[name].title} | {' | '.join(shown)} |")
    why = {c: ROWS[m].title for m, c in lines.items() if isinstance(c, str) and c != NOT_RUN}
    text += [f"\n{title}: - because {reason}." for reason, title in why.items()]
    return "\n".join(text)


def training_calls(args):
    """Smallest and largest number of calls that the finished runs of these tables had, or None."""
    names = {row.at[n][0] for row in map(ROWS.get, args.methods) for n in args.steps
             if row.trained and not isinstance(row.at[n], str)}  # fmt: skip
    paths = [f"{folder_of(args, name, s)}/side_by_side.json" for name in names for s in args.seeds]
    counts = [load_json(path)["calls"] for path in paths if os.path.isfile(path)]
    return (min(counts), max(counts)) if counts else None


def shown_samples(args, row, n):
    """The samples of a line that the picture shows, of the first seed, or None."""
    if isinstance(row.at[n], str):
        return None
    name, entry = row.at[n]
    path = os.path.join(folder_of(args, name, args.seeds[0]), "shown.safetensors")
    if not os.path.isfile(path):
        return None
    with open_tensors(path) as f:
        return f.get_tensor(entry)


def picture(args, path):
    """One line of samples for each method, a block for each step count, same noise and labels."""
    world, lines = load_world(args.world), []
    for name in args.methods:
        blocks = [shown_samples(args, ROWS[name], n) for n in args.steps]
        if any(x is not None for x in blocks):
            lines.append((ROWS[name].title, blocks))
    if not lines:
        return
    number = len(next(x for x in lines[0][1] if x is not None))
    data = world.data(number, 778, balanced_labels(number, world.num_classes))[0]
    blank = np.full_like(world.picture(data), 255)
    gap = np.full_like(blank[:, :12], 255)

    def beside(blocks):
        parts = [blank if x is None else world.picture(x) for x in blocks]
        return np.concatenate([a for part in parts for a in (part, gap)], 1)

    steps = " | ".join(f"{n} step{'s' * (n > 1)}" for n in args.steps)
    rows = [("data", beside([data]))] + [(f"{title}: {steps}", beside(b)) for title, b in lines]
    save_grid(path, rows)


def section(args, tables):
    """What the page has on this world, without its markers."""
    seeds, counts = " ".join(map(str, args.seeds)), training_calls(args)
    words = f"## {args.world.capitalize()}\n\n```bash\npython -m tests.side_by_side {args.world} "
    words += f"--seeds {seeds} --calls {args.calls} --write\n```\n\n"
    if counts:
        words += f"The runs counted {counts[0]:,.0f} to {counts[1]:,.0f} calls in training.\n\n"
    figure = f"../figures/side_by_side-{args.world}.png"
    words += "\n\n".join(tables) + f"\n\n![Samples of the same noise and labels]({figure})\n"
    return words


def write(args, tables, page=None, figures=None):
    """This world's part of the page, and its picture."""
    page, figures = page or PAGE, figures or FIGURES
    first, last = (f"<!-- tests/side_by_side.py: {args.world}{end} -->" for end in ("", ", end"))
    with open(page) as f:
        text = f.read()
    part = f"{first}\n\n{section(args, tables)}\n{last}"
    if first in text:
        before, rest = text.split(first)
        text = before + part + rest.split(last)[1]
    else:
        text = f"{text.rstrip()}\n\n{part}\n"
    with open(page, "w") as f:
        f.write(text)
    picture(args, os.path.join(figures, f"side_by_side-{args.world}.png"))


def parse_args(argv=None):
    p = Parser(
        description=__doc__.splitlines()[0], usage="python -m tests.side_by_side WORLD [flags]"
    )
    p.add_argument("world", choices=list(BUDGETS), help="the embedded teacher")
    add = p.run.add_argument
    add("--methods", nargs="+", choices=list(ROWS), default=list(ROWS), help="which lines")
    add("--steps", nargs="+", type=int, choices=STEPS, default=list(STEPS), help="which tables")
    add("--seeds", nargs="+", type=int, default=[0], help="one run of each method per seed")
    add("--calls", type=number(int, 1), default=None, help="samples x network calls in training of "
        f"every run (None: {', '.join(f'{w} {n}' for w, n in BUDGETS.items())})")  # fmt: skip
    add("--output_dir", default="runs/side_by_side", help="folder of the runs; those already "
        "finished there are read, not repeated")  # fmt: skip
    add("--finished", action="store_true", help="train nothing: the other lines say so")
    add("--write", action="store_true", help="also write this world's part of the page in docs/")
    args = p.parse_args(argv)
    args.calls = args.calls or BUDGETS[args.world]
    return args


def main(argv=None):
    args, tables = parse_args(argv), []
    for n in args.steps:
        tables.append(table(n, {name: cells_of(args, ROWS[name], n) for name in args.methods}))
    print("\n\n".join(tables))
    if args.write:
        write(args, tables)


if __name__ == "__main__":
    run_main(main)
