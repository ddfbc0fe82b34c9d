"""One table of finished runs: what their students are worth, beside their teachers.

    python -m tests.one_table default=runs/dmd-0,runs/dmd-1,runs/dmd-2 paper=runs/paper-0 ...

A title, and the runs that differ in their seed alone: their report.json is read. Each number of
steps that a student was sampled in is a row, with the values of the runs in the order given, and
with the minutes of the fastest. "ratio" is the student's fd by that of the teacher in full, the
mean over runs. A guided teacher is another distribution than the data: there it is the student's
distance to that teacher by that of the teacher's own few steps.
"""

import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from models.files import UserError, load_json  # noqa: E402
from models.plumbing.run import run_main  # noqa: E402

COLUMNS = "fd fd_teacher patch_swd accuracy diversity motion connected".split()
HEAD = ["script", "flags", "calls", "teacher in full: fd (calls)", "teacher in as many steps: fd"]
HEAD += ["its fd_teacher", *COLUMNS, "ratio", "minutes"]


def rows_of(report):
    """-> the teacher's row in full or {}, {calls: (row, the teacher's of as many steps or {})}

    latent_fm.py has no student: every way of sampling what it trained is a row.
    """
    rows = {row["name"]: row for row in report["results"]}
    students = {name: row for name, row in rows.items() if name.startswith("student")}
    if not students:
        apart = ("data", "reconstruction")
        return {}, {row["nfe"]: (row, {}) for name, row in rows.items() if name not in apart}
    full, few = rows.get("teacher", {}), {}
    guided = 2 if full.get("guidance_scale", 1) != 1 else 1  # calls of a step
    for name, row in rows.items():
        if name.startswith("teacher_"):
            few[row["nfe"] // guided] = row
    return full, {row["nfe"]: (row, few.get(row["nfe"], {})) for row in students.values()}


def ratio(full, student, few):
    """As above; None where there is nothing to compare with."""
    if full.get("guidance_scale", 1) != 1:
        return student["fd_teacher"] / few["fd_teacher"] if few else None
    return student["fd"] / full["fd"] if full else None


def values(rows, name):
    """The values of the runs as text, once if they are one; "" where no run has any."""
    found = [f"{row[name]:.3g}" for row in rows if name in row]
    return ", ".join(found if len(set(found)) > 1 else found[:1])


def lines_of(title, folders):
    """The table's rows of these runs. Raises UserError for runs that are not one row."""
    reports = [load_json(os.path.join(folder, "report.json")) for folder in folders]
    if len({(r["method"], r["teacher"], r["steps"]) for r in reports}) > 1:
        raise UserError(f"{title}: runs of other scripts, teachers or lengths are not one row")
    found = [rows_of(report) for report in reports]
    full = [row for row, _ in found]
    minutes = f"{min(report['seconds'] for report in reports) / 60:.1f}"
    for calls in found[0][1]:
        students, few = zip(*(rows[calls] for _, rows in found))
        ratios = [r for r in map(ratio, full, students, few) if r is not None]
        of_full = f"{values(full[:1], 'fd')} ({full[0]['nfe']})" if full[0] else ""
        cells = [f"`{reports[0]['method']}.py`", title, f"{calls:g}", of_full]
        cells += [values(few, "fd"), values(few, "fd_teacher")]
        cells += [values(students, name) for name in COLUMNS]
        cells += [f"{statistics.mean(ratios):.2f}" if ratios else "", minutes]
        yield "| " + " | ".join(cells) + " |"
        minutes = ""


def main(argv=None):
    given = sys.argv[1:] if argv is None else argv
    if not given or any("=" not in word for word in given):
        raise UserError("give TITLE=RUN or TITLE=RUN,RUN,RUN, once or more")
    lines = [line for word in given for line in lines_of(*titled(word))]
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    print("\n".join(lines))


def titled(word):
    title, _, folders = word.partition("=")
    return title, folders.split(",")


if __name__ == "__main__":
    run_main(main)
