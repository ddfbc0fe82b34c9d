"""The orderings that Phased DMD (2510.27684) claims, on an embedded world: same student, same number of student updates, several seeds.

    python -m tests.phased_orderings ring --seeds 0 1 2
    python -m tests.phased_orderings clips --methods vanilla truncated phased-2 phased-4 -- --max_train_steps 300

Runs phased_dmd.py for each method and seed, reads the report.json it leaves, and prints one Markdown table: mean and range over the
seeds of every measure of the student's row, the energy distances x 1000 of its intermediate samples x_t to noised data, and minutes.
"""
import argparse
import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import phased_dmd  # noqa: E402
from models import io  # noqa: E402

METHODS = {
    "vanilla": ("vanilla DMD, gradient through all steps (Fig. 1a)", ["--phases", "1", "--no_truncation"]),
    "truncated": ("DMD with truncation (Fig. 1b)", ["--phases", "1", "--shared_fake"]),
    "truncated-told": ("the same, fake told the step", ["--phases", "1"]),
    "phased-2": ("phased, 2 phases, truncation inside (Fig. 1d)", ["--phases", "2", "--shared_fake"]),
    "phased-2-told": ("the same, fake told the step (our default)", ["--phases", "2"]),
    "phased-4": ("phased, 4 phases (Fig. 1c)", ["--phases", "4"]),
    "phased-4-naive": ("the same with the naive target", ["--phases", "4", "--target", "naive"]),
}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Flags after -- go to the script.")
    p.add_argument("world", choices=["ring", "glyphs", "clips"], help="the embedded teacher")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each method per seed")
    p.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="which rows of the table")
    p.add_argument("--output_dir", default="runs/phased_orderings", help="folder of the runs; those already finished there are read, not repeated")
    argv = sys.argv[1:] + ["--"]  # what comes after the first "--" is for the script
    args, flags_given = p.parse_args(argv[:argv.index("--")]), argv[argv.index("--") + 1:-1]
    table = []
    for method in args.methods:
        title, flags = METHODS[method]
        rows, minutes = [], []
        for seed in args.seeds:
            out = os.path.join(args.output_dir, f"{args.world}-{method}-{seed}{''.join(flags_given).replace('--', '-')}")
            if not os.path.isfile(os.path.join(out, "report.json")):
                phased_dmd.main(["--teacher", args.world, "--seed", str(seed), "--output_dir", out, *flags, *flags_given])
            report = io.load_json(os.path.join(out, "report.json"))
            row = next(r for r in report["results"] if r["name"] == "student")
            minutes.append(report["seconds"] / 60)
            rows.append({**{f"x_{t}": 1000 * v for t, v in row["marginals"].items()},
                         **{k: row[k] for k in ("fd", "fd_teacher", "patch_swd", "accuracy", "diversity", "motion", "moving") if k in row}})
        table.append((title, rows, minutes))
    columns = list(table[0][1][0])
    print("\n| method | " + " | ".join(columns) + " | min |\n|" + "---|" * (len(columns) + 2))
    for title, rows, minutes in table:
        cells = [f"{statistics.mean(r[c] for r in rows):.3g} ({min(r[c] for r in rows):.3g}-{max(r[c] for r in rows):.3g})" for c in columns]
        print(f"| {title} | " + " | ".join(cells) + f" | {statistics.mean(minutes):.1f} |")


if __name__ == "__main__":
    main()
