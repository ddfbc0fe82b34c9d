"""The columns of runs' log.csv that the pages' curves are drawn from, thinned and kept here.

    python -m docs.draw.logs runs/dmd-glyphs dmd-healthy loss_dm loss_fake dm_rel_gap

writes docs/figures/logs/dmd-healthy.csv: 150 points, each the mean of the steps around it.
"""

import csv
import os
import sys

FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "figures/logs")


def keep(run, name, columns, points=150):
    """Thin log.csv of a run folder to `points` rows of these columns."""
    with open(os.path.join(run, "log.csv")) as f:
        rows = list(csv.DictReader(f))
    size = max(1, len(rows) // points)
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    os.makedirs(FOLDER, exist_ok=True)
    with open(os.path.join(FOLDER, f"{name}.csv"), "w") as f:
        print("step", *columns, sep=",", file=f)
        for part in parts:
            given = [[float(r[c]) for r in part if r[c]] for c in columns]
            means = [f"{sum(v) / len(v):.4g}" if v else "" for v in given]
            print(part[-1]["step"], *means, sep=",", file=f)


def read(name, column, along="step"):
    """-> [(step, value), ...] of docs/figures/logs/name.csv, without the empty cells.

    along: the column that is counted in place of steps.
    """
    with open(os.path.join(FOLDER, f"{name}.csv")) as f:
        return [(float(r[along]), float(r[column])) for r in csv.DictReader(f) if r[column]]


def smooth(points, n):
    """[(step, value), ...] with each value the mean of the n around it."""
    parts = [points[max(0, i - n // 2) : i + n // 2 + 1] for i in range(len(points))]
    return [(step, sum(v for _, v in p) / len(p)) for (step, _), p in zip(points, parts)]


if __name__ == "__main__":
    keep(sys.argv[1], sys.argv[2], sys.argv[3:])
