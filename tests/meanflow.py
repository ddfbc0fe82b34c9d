"""MeanFlow (2505.13447) as a distillation, a baseline of `tests/side_by_side.py`.

It takes the flags of tdm.py and leaves the same report.json:

    python -m tests.meanflow --teacher ring

A student learns the average velocity u(x_t, r, t) of the teacher's trajectory from t down to r, so
that one call leads there: x_r = x_t - (t - r) u. The derivative of that by t is the MeanFlow
identity (Eq. 6), which needs no integral:

    u(x_t, r, t) = v(x_t, t) - (t - r) du/dt

with du/dt along the trajectory, one product with the network's Jacobian (Eq. 8). The paper trains
from data, where v is eps - x0. Here v is the teacher's velocity at noised data, which consistency
distillation (`tests/consistency.py`) and velocity matching (`mdt_dist.py`) are given too: the three
differ in their losses. `mean_flow_loss` takes either v. t and r are uniform, then shifted like the
teacher's times; the paper's law is logit-normal and seldom near the t = 1 and r = 0 that a single
step asks for, which a run of few updates has no time for.
"""

import functools
import os
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tdm  # noqa: E402
from mdt_dist import add_noise, slow_clock, velocity  # noqa: E402
from models.diffusion import expand, shift, sinusoid, step_grid  # noqa: E402
from models.plumbing import report, teachers  # noqa: E402
from models.plumbing.data import Conditions, load_data, to_unit  # noqa: E402
from models.plumbing.run import Run, run_main  # noqa: E402

APART = 0.75  # share of rows with r < t; at r = t the loss is that of flow matching (paper: 0.25)
CLOCK = 20.0  # the network's sinusoids are of CLOCK t instead of 1000 t: see `slow_down`
INTERVAL = 10.0  # what the network is given of t - r: its sinusoids are of numbers from 0 to this


def slow_down(student, seed):
    """Refit what embeds t to slow sinusoids.  -> what t is to be multiplied with for this network.

    Those of 1000 t, with which teachers are trained, leave in du/dt little but themselves: on the
    ring it is off by three times its size, and afterwards by a fifth.
    """
    if hasattr(student, "t_scale"):
        slow_clock(student, CLOCK, seed)
        return 1.0
    t, size = (torch.arange(1000) + 0.5) / 1000, student.time.in_features
    fast, slow = (sinusoid(c * t, size, max_period=1000.0) for c in (1.0, CLOCK / 1000))
    wanted, ridge = fast @ student.time.weight.detach().T, 0.01 * torch.eye(size)
    weight = torch.linalg.solve((slow.T @ slow + ridge).double(), (slow.T @ wanted).double())
    student.time.weight.data.copy_(weight.T)
    return CLOCK / 1000


def average_velocity(student, clock, x_t, r, t, cond):
    """u(x_t, r, t) of a network that is conditioned on t - r by its input `steps`.  -> (B, ...).

    clock: of `slow_down`.
    """
    return student(x_t, clock * t, steps=INTERVAL * (t - r), **cond).to(x_t.dtype)


def mean_flow_target(average, x_t, v, r, t):
    """u, and what the MeanFlow identity makes of it (Eq. 10).  -> u, target, both (B, ...).

    average: a function (x_t, r, t) -> u. x_t, v (B, ...); r <= t (B,). Both come from one call with
    a forward-mode derivative: (v, 0, 1) in (x_t, r, t). The target is a constant.
    """

    def along(x, s):
        return average(x, r, s)

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
        u, slope = torch.func.jvp(along, (x_t, t), (v, torch.ones_like(t)))
    return u, (v - expand(t - r, v) * slope).detach()


def mean_flow_loss(average, x_t, v, r, t, p=1.0, c=1e-3):
    """Mean of w |u - target|^2 with w = 1 / (|u - target|^2 + c)^p, a constant (Eq. 9 and 22).

    -> scalar, |u - target|^2 (B,), a constant, for the log: with p = 1 the first is always about 1.
    Its gradient comes from u alone.
    """
    u, target = mean_flow_target(average, x_t, v, r, t)
    error = (u - target).square().flatten(1).sum(1)  # (B,)
    return (error / (error.detach() + c) ** p).mean(), error.detach()


def draw_times(draw):
    """Two times in [0, 1], r <= t, of which APART of the rows have r < t.  -> r, t (B,)."""
    a, b = (shift(draw.spread(name), draw.timestep_shift) for name in ("t", "r"))
    t = torch.maximum(a, b)
    return torch.where(draw.spread("apart") < APART, torch.minimum(a, b), t), t


@torch.no_grad()
def sample(average, z, grid):
    """From noise over a grid 1 > ... > 0, a call for each interval.  z (B, ...) -> x0.

    average: a function (x_t, r, t) -> u.
    """
    x = z
    for t, r in zip(grid[:-1], grid[1:]):
        t, r = x.new_full((len(x),), t), x.new_full((len(x),), r)
        x = x - expand(t - r, x) * average(x, r, t)
    return x


def sampler_of(run, student, clock, teacher, grid):
    """-> a function (index, first, last) -> samples of the conditions index[first:last]."""

    def draw(index, a, b):
        z = report.evaluation_noise(run, teacher.shape, a, b)("z")
        cond, _ = teacher.conditions.pick(index[a:b], run.device)
        return sample(functools.partial(average_velocity, student, clock, cond=cond), z, grid)

    return draw


def train(args):
    run = Run(args, "meanflow")
    teacher = teachers.start_teacher(run)
    teacher.conditions = Conditions(args, teacher.base)
    student = teachers.new_student(run, teacher, step_input=True)
    teachers.freeze_teacher(run, teacher)
    clock = slow_down(student, args.seed)
    ema = teachers.average_of(run, student)
    data, data_cond, _ = load_data(args.teacher, teacher.shape[-1], seed=args.seed)
    adam = dict(betas=tuple(args.adam_betas), weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, **adam)
    run.start(student=student, ema=ema, optimizer=optimizer)

    for step in run.steps():
        warmup, decay = run.rate(step)
        optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * decay
        for draw in run.micro_batches(step, "student", teacher):
            i = draw.integer("data", len(data))
            x0, z = to_unit(data[i]).to(run.device), draw.noise("z")
            cond, uncond = teacher.conditions.pick(data_cond["label"][i], run.device)
            r, t = draw_times(draw)
            x_t = add_noise(x0, z, t)
            with torch.no_grad():
                v = velocity(teacher.net, x_t, t, cond, uncond, args.guidance_scale)
            average = functools.partial(average_velocity, student, clock, cond=cond)
            loss, error = mean_flow_loss(average, x_t, v, r, t)
            (loss * run.share).backward()
            run.note(loss=loss, error=error.mean())
        run.update(optimizer, "student")
        if args.ema_decay:
            run.update_ema(ema, student, step)
        if run.end_step(step, show=("error",)):
            run.save(step)

    grids, students = {n: step_grid(n, teacher.shift) for n in args.student_steps}, {}
    for n in sorted(grids, reverse=True):
        name = f"student_{n}" if students else "student"
        students[name] = n, sampler_of(run, ema.eval(), clock, teacher, grids[n])
    parameters = sum(p.numel() for p in ema.parameters())
    report.finish(run, teacher, grids[max(grids)][:-1], students, parameters)


def main(argv=None):
    train(tdm.parse_args(argv))


if __name__ == "__main__":
    run_main(main)
