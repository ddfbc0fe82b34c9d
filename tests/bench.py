"""Seconds per student step of a script's default run, split into student, fake, teacher and data.

    python -m tests.bench dmd [--steps 30] [-- any flags of dmd.py]

Runs the script itself in a temporary folder, drops the first five steps, and prints mean and standard deviation of the
columns that every run writes to log.csv. Compare two commits in one sitting, as a ratio.
"""

import argparse
import csv
import importlib
import os
import sys
import tempfile

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Flags after -- go to the script."
    )
    p.add_argument(
        "method", choices=["dmd", "phased_dmd", "decoupled_dmd", "tdm"], help="which script"
    )
    p.add_argument(
        "--steps", type=int, default=30, help="student steps measured, after 5 that are not"
    )
    argv = sys.argv[1:] + ["--"]  # what comes after the first "--" is for the script
    args, flags_given = p.parse_args(argv[: argv.index("--")]), argv[argv.index("--") + 1 : -1]
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "run")
        script = importlib.import_module(args.method)
        flags = [
            "--output_dir",
            out,
            "--max_train_steps",
            str(args.steps + 5),
            "--checkpointing_steps",
            "1000000",
            *flags_given,
        ]
        script.train(script.parse_args(flags))
        with open(os.path.join(out, "log.csv"), newline="") as f:
            rows = list(csv.DictReader(f))[5:]
    columns = [c for c in rows[0] if c.endswith("_s")]
    seconds = torch.tensor(
        [[float(r[c]) for c in columns] for r in rows], dtype=torch.float64
    )  # (steps, parts)
    total = seconds.sum(1)
    print(
        f"\n{args.method} {' '.join(flags_given)}: {len(rows)} steps, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for name, s in [*zip((c[:-2] for c in columns), seconds.T), ("total", total)]:
        print(
            f"{name:8s} {s.mean():8.4f} s/step  +- {s.std():.4f}   {100 * s.mean() / total.mean():5.1f} %"
        )


if __name__ == "__main__":
    main()
