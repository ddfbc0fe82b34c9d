"""Which of its two steps costs an MDT-dist student its quality: each replaced by the exact one.

    python -m tests.mdt_steps runs/mdt_dist-voxels            # some four minutes on one core
    python -m tests.mdt_steps runs/mdt_dist-voxels --regression 600                # ten and more

The exact average velocity phi*(x_t, t) = (x_t - x_0) / t follows from the teacher's own trajectory
down to x_0, in 25 Euler steps for all of [0, 1]. Two tables: the world's measures of samples whose
first and second step come from the student, from phi* or from the teacher's velocity, all from the
noise of the run's report; and, at noised data, the mean square error of the transport t phi.

--regression teaches a copy of the student phi*(z, 1) directly, by squares on pairs of noise and the
trajectory's end: what such a network can do in the step from pure noise, whatever its objective.
"""

import argparse
import copy
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from mdt_dist import add_noise, conditions_of, parse_args, sample  # noqa: E402
from models.diffusion import expand, step_grid  # noqa: E402
from models.draws import Draws  # noqa: E402
from models.files import UserError, load_json  # noqa: E402
from models.plumbing import report  # noqa: E402
from models.plumbing.run import Run, run_main  # noqa: E402
from models.plumbing.teachers import start_teacher  # noqa: E402
from models.worlds.measures import balanced_labels  # noqa: E402

COLUMNS = "fd patch_swd accuracy diversity connected".split()
TIMES = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0)


def exact(velocity, steps=25):
    """-> phi*(x_t, t, **cond), the average of a velocity field over its own trajectory to 0.

    velocity: as a network, called with one t for the whole batch. steps: Euler steps of [0, 1].
    """

    def phi(x_t, t, **cond):
        grid = torch.linspace(float(t[0]), 0, max(1, round(steps * float(t[0]))) + 1).tolist()
        x = x_t
        for a, b in zip(grid, grid[1:]):
            x = x - (a - b) * velocity(x, torch.full_like(t, a), **cond)
        return (x_t - x) / expand(t, x_t)

    return phi


def regressed(student, velocity, conditions, noise, label, updates, batch=32, rate=5e-4, fine=25):
    """A copy of the student after regression onto phi*(z, 1) on n pairs, its averaged weights.

    noise(a, b) -> z (b - a, ...), of the pairs a to b; label (n,).
    """
    n, star, targets = len(label), exact(velocity, fine), []
    with torch.no_grad():
        for a in range(0, n, 100):
            z = noise(a, min(n, a + 100))
            cond, _ = conditions.pick(label[a : a + 100], z.device)
            targets.append(star(z, z.new_ones(len(z)), **cond))
    z, phi, net = noise(0, n), torch.cat(targets), copy.deepcopy(student)
    optimizer = torch.optim.AdamW(net.requires_grad_(True).parameters(), rate, (0.9, 0.99))
    average, draw = copy.deepcopy(net).requires_grad_(False), torch.Generator().manual_seed(0)
    for step in range(updates):
        falls = min(1, 2 * (updates - step) / updates)  # in the second half
        optimizer.param_groups[0]["lr"] = rate * falls * min(1, (step + 1) / 20)
        i = torch.randint(n, (batch,), generator=draw)
        cond, _ = conditions.pick(label[i], z.device)
        loss = (net(z[i], z.new_ones(batch), **cond) - phi[i]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for mean, now in zip(average.parameters(), net.parameters()):
            mean.lerp_(now.detach(), 0.01)
    return average.eval()


def first_then(first, second):
    """A network that is `first` at t = 1 and `second` below."""
    return lambda x, t, **cond: (first if float(t[0]) == 1 else second)(x, t, **cond)


@torch.no_grad()
def step_rows(student, velocity, noise, label, world, conditions, shift=1.0, fine=25, taught=None):
    """The world's measures for each choice of the two steps.  -> {title: {measure: number}}.

    student, velocity: networks. noise(a, b) -> (b - a, ...), of the samples a to b; label (n,).
    fine: Euler steps of [0, 1] behind what is exact, also below. taught: of `regressed`.
    """
    star, times = exact(velocity, fine), step_grid(2, shift)[:-1]
    nets = {
        "exact in both": star,
        "student in both": student,
        "student, then exact": first_then(student, star),
        "exact, then student": first_then(star, student),
        "student, then the teacher's velocity": first_then(student, velocity),
        "exact, then the teacher's velocity": first_then(star, velocity),
    }
    if taught:
        nets["regression, then exact"] = first_then(taught, star)
    rows = {}
    for title, net in nets.items():

        def drawn(a, b, net=net):
            z = noise(a, b)
            cond, _ = conditions.pick(label[a:b], z.device)
            return sample(net, lambda name: z, times, cond, cond)

        x, _ = report.many(drawn, len(label))
        rows[title] = world.measure(x, label)
    return rows


@torch.no_grad()
def transport_errors(nets, velocity, x0, z, cond, fine=50):
    """Mean square of t (phi - phi*) at noised data.  nets: {name: net} -> {name: {t: error}}."""
    star, errors = exact(velocity, fine), {name: {} for name in nets}
    for t in TIMES:
        at = x0.new_full((len(x0),), t)
        x_t = add_noise(x0, z, at)
        phi = star(x_t, at, **cond)
        for name, net in nets.items():
            errors[name][t] = float((t * (net(x_t, at, **cond) - phi)).square().mean())
    return errors


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", help="a finished run of mdt_dist.py on a world")
    p.add_argument("--samples", type=int, default=2000, help="of the first table")
    p.add_argument("--regression", type=int, default=0, metavar="UPDATES", help="0: none")
    p.add_argument("--pairs", type=int, default=4800, help="of --regression")
    given = p.parse_args(argv)
    about = load_json(os.path.join(given.run, "report.json"))
    flags = ["--seed", str(about["seed"])]
    run = Run(parse_args(["--sample", given.run, *flags]), "mdt_dist")
    student, _, like = report.load_student(run, conditions_of)
    if like.world_name is None:
        raise UserError(f"{given.run}: its samples are of no world: give a run that has one")
    teacher = start_teacher(Run(parse_args(["--teacher", about["teacher"], *flags]), "mdt_dist"))
    world, velocity, student = teacher.world, teacher.net.eval(), student.eval()
    label = balanced_labels(given.samples, world.num_classes)

    def noise(a, b):
        return report.evaluation_noise(run, teacher.shape, a, b)("z")

    taught, nets = None, {"student": student}
    if given.regression:
        pairs = balanced_labels(given.pairs, world.num_classes)

        def fresh(a, b):
            return Draws(1 + about["seed"], "pairs", 0, range(a, b)).normal("z", teacher.shape)

        taught = regressed(student, velocity, like.conditions, fresh, pairs, given.regression)
        nets["regression"] = taught
    at = like.conditions, teacher.shift
    rows = step_rows(student, velocity, noise, label, world, *at, taught=taught)
    shown = [name for name in COLUMNS if name in next(iter(rows.values()))]
    print_table("first and second step", shown, rows, ".3g")
    x0, label = world.data(200, 777, label[:200])
    cond, _ = like.conditions.pick(label, run.device)
    nets["teacher's velocity"] = velocity
    errors = transport_errors(nets, velocity, x0.to(run.device), noise(0, len(x0)), cond)
    print()
    print_table("error at t =", TIMES, errors, ".4f")


def print_table(title, columns, rows, form):
    """A Markdown table of {row: {column: number}}."""
    print(f"| {title} | " + " | ".join(map(str, columns)) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(format(row[c], form) for c in columns) + " |", flush=True)


if __name__ == "__main__":
    run_main(main)
