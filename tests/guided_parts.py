"""What lies between a guided teacher and its students of decoupled_dmd.py or tdm.py, taken apart.

    python -m tests.guided_parts runs/decoupled_dmd-glyphs [RUN ...]      # three minutes, one core

    symbol          meaning                                                        shape
    m, C            mean and covariance of a set's features                        (d,), (d, d)
    m_T, C_T        those of the teacher's many-step samples, from the report's noise
    m_0             those of data without guidance; d = m_T - m_0 is where guidance leads

fd_teacher = |m - m_T|^2 + a distance of C and C_T. "kept" is the share (m - m_0) d / d^2 of the way
that the mean has gone, "across" the square of what it has gone beside the way. Two sets of the
same sampler are not 0 apart: the rows "other noise" say how much of a distance is chance. The
teacher's rows start from the report's noise, as the teacher itself does, and share its chance;
students of decoupled_dmd.py, which draw fresh noise between their steps, do not.
"""

import argparse
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import decoupled_dmd  # noqa: E402
import tdm  # noqa: E402
from models.files import UserError, load_json  # noqa: E402
from models.plumbing import report  # noqa: E402
from models.plumbing.run import Run, run_main  # noqa: E402
from models.plumbing.teachers import start_teacher  # noqa: E402
from models.worlds.measures import balanced_labels, frechet_distance  # noqa: E402
from tests.mdt_steps import print_table  # noqa: E402

COLUMNS = "fd_teacher mean covariance kept across".split()


def parts(moments, goal, start):
    """Moments (m, C) of samples, of the guided teacher's and of data -> {column: number}."""
    (m, C), (m_T, C_T), (m_0, _) = moments, goal, start
    way, gone = m_T - m_0, m - m_0
    kept = gone @ way / way.square().sum()
    whole, of_means = frechet_distance(m, C, m_T, C_T), float((m - m_T).square().sum())
    across = float((gone - kept * way).square().sum())
    return dict(zip(COLUMNS, (whole, of_means, whole - of_means, float(kept), across)))


def moments_of(world, x, label):
    """-> mean (d,) and covariance (d, d) of the features of x."""
    means, covariances = world.moments(x, label)
    return means[0], covariances[0]


def students_of(folder, seed):
    """A run of decoupled_dmd.py, or of tdm.py, whose student samples in several numbers of steps.

    -> its conditions, the times of its longest sampler, {title: sampler}.
    """
    grids = load_json(os.path.join(folder, "student", "sampler.json")).get("grids")
    script = tdm if grids else decoupled_dmd
    run = Run(script.parse_args(["--sample", folder, "--seed", str(seed)]), script.__name__)
    student, saved, like = report.load_student(run)
    at, renoise = (run, student.eval(), like), "sde" if saved["rule"] == "renoise" else "ode"
    if grids:
        grids = {int(n): grid for n, grid in grids.items()}
        samplers = tdm.student_samplers(*at, grids, saved["steps_cond"], renoise)
        samplers = {f"{folder}, {n} step(s)": draw for n, draw in samplers.items()}
    else:
        samplers = {folder: decoupled_dmd.student_sampler(*at, saved["times"], renoise)}
    return like.conditions, saved["times"], samplers


@torch.no_grad()
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="+", help="finished runs on one world, alike in seed")
    p.add_argument("--guidance_scale", type=float, help="of the teacher (default: the first run's)")
    p.add_argument("--samples", type=int, default=2000, help="of every row")
    given = p.parse_args(argv)
    about = load_json(os.path.join(given.runs[0], "report.json"))
    own = next(row for row in about["results"] if row["name"] == "teacher")
    scale = given.guidance_scale or own["guidance_scale"]
    flags = ["--teacher", about["teacher"], "--guidance_scale", str(scale)]

    def run_of(*more, seed=about["seed"]):
        return Run(decoupled_dmd.parse_args([*more, "--seed", str(seed)]), "decoupled_dmd")

    run, other = run_of(*flags), run_of(*flags, seed=about["seed"] + 1)
    teacher = start_teacher(run)
    world = teacher.world
    if world is None or len(world.shape) == 1:
        raise UserError(
            f"{given.runs[0]}: its teacher has no world of pictures: give a run on glyphs"
        )
    label = balanced_labels(given.samples, world.num_classes)

    def moments(sampler):
        x, _ = report.many(lambda a, b: sampler(label, a, b), len(label))
        return moments_of(world, x, label)

    students = {}
    for folder in given.runs:
        teacher.conditions, times, samplers = students_of(folder, about["seed"])
        students |= samplers
    few, n = f"teacher, {2 * len(times)} calls", "other noise"
    goal = moments(report.teacher_sampler(run, teacher))
    start = moments_of(world, world.data(len(label), 777, label)[0], label)
    rows = {"data": start, f"teacher, {n}": moments(report.teacher_sampler(other, teacher))}
    for name, at in ((few, run), (f"{few}, {n}", other)):
        rows[name] = moments(report.teacher_sampler(at, teacher, [*times, 0.0], "euler"))
    rows |= {name: moments(sampler) for name, sampler in students.items()}
    table = {name: parts(row, goal, start) for name, row in rows.items()}
    print_table("", COLUMNS, table, ".3g")


if __name__ == "__main__":
    run_main(main)
