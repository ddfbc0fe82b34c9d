"""Consistency distillation (2303.01469), the baseline that TDM is compared with.

It takes the flags of tdm.py and leaves the same report.json:

    python -m tests.consistency --teacher ring

A student learns to map neighbouring points of one teacher trajectory to the same x0: f(x_t, t) is
regressed onto f_ema(x_s, s), where x_t is noised data and x_s is one teacher step away from it. In
x0 form a flow network has f(x, 0) = x by construction. This needs data, which TDM does not.
"""

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tdm  # noqa: E402
from models.diffusion import ode_step, shift, step_grid, to_x0_eps  # noqa: E402
from models.plumbing import report, teachers  # noqa: E402
from models.plumbing.data import Conditions, load_data, to_unit  # noqa: E402
from models.plumbing.run import Run, run_main  # noqa: E402

LEVELS = 40  # of the teacher's trajectory


def consistency_loss(student, ema, teacher, x0, eps, t, s, cond, uncond, guidance_scale):
    """Distance of f(x_t, t) from f_ema(x_s, s), as a pseudo-Huber norm of each sample.  -> scalar.

    x0, eps (B, ...); t, s (B,): neighbouring levels, s < t.
    """
    diffusion, schedule = teacher.diffusion, teacher.schedule
    x_t = diffusion.add_noise(x0, eps, t)
    with torch.no_grad():
        mu_real = diffusion.guided_x0(teacher.net, x_t, t, cond, uncond, guidance_scale)
        eps_real = to_x0_eps(mu_real, "x0", x_t, schedule.alpha(t), schedule.sigma(t))[1]
        x_s = ode_step(schedule, mu_real, eps_real, s)
        target = diffusion.x0(ema, x_s, s, **cond)
    x = diffusion.x0(student, x_t, t, **cond)
    return tdm.trajectory_matching_loss(x, target, x.detach())  # its residual is x - target


def train(args):
    run = Run(args, "consistency")
    args.ema_decay = args.ema_decay or 0.95  # the target network is a moving average
    teacher = teachers.start_teacher(run)
    teacher.conditions = Conditions(args, teacher.base)
    student = teachers.trainable(run, teacher.base, "student")
    ema = teachers.average_of(run, student)
    teachers.freeze_teacher(run, teacher)
    grids = {n: step_grid(n, teacher.shift) for n in args.student_steps}
    data, data_cond, _ = load_data(args.teacher, teacher.shape[-1], seed=args.seed)
    adam = dict(betas=tuple(args.adam_betas), weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, **adam)
    run.start(student=student, ema=ema, optimizer=optimizer)

    for step in run.steps():
        warmup, _ = run.rate(step)
        left = 1 - step / args.max_train_steps
        optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * left
        for draw in run.micro_batches(step, "student", teacher):
            i = draw.integer("data", len(data))
            x0 = to_unit(data[i]).to(run.device)
            cond, uncond = teacher.conditions.pick(data_cond["label"][i], run.device)
            n = draw.integer("level", LEVELS).to(run.device) + 1.0  # 1 ... LEVELS
            t, s = shift(n / LEVELS, teacher.shift), shift((n - 1) / LEVELS, teacher.shift)
            at = x0, draw.noise("eps"), t, s, cond, uncond, args.guidance_scale
            loss = consistency_loss(student, ema, teacher, *at)
            (loss * run.share).backward()
            run.note(loss=loss)
        run.update(optimizer, "student")
        run.update_ema(ema, student, step)
        if run.end_step(step, show=("loss",)):
            run.save(step)

    longest, students = max(grids), {}
    for rule, suffix in (("ode", ""), ("sde", "_sde")):
        for k, sampler in tdm.student_samplers(run, ema, teacher, grids, False, rule).items():
            is_main = k == longest and rule == "ode"
            students["student" if is_main else f"student_{k}{suffix}"] = (k, sampler)
    parameters = sum(p.numel() for p in ema.parameters())
    report.finish(run, teacher, grids[longest][:-1], students, parameters)


def main(argv=None):
    train(tdm.parse_args(argv))


if __name__ == "__main__":
    run_main(main)
