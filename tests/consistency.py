"""Consistency distillation (2303.01469), the baseline that TDM is compared with: it takes tdm.py's flags and leaves the same report.json.

Neighbouring points of one teacher trajectory shall be mapped to the same x0: f(x_t, t) is regressed onto f_ema(x_s, s), where x_t is noised data and
x_s one teacher step from it. In x0 form f(x, 0) = x holds by itself for a flow network. Needs data, which TDM does not.
"""

import copy
import os
import sys
import time
import types

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tdm  # noqa: E402
from models.diffusion import add_noise, guided_x0, ode_step, predict_x0, shift, to_x0_eps  # noqa: E402
from models.draws import Draws  # noqa: E402
from models.plumbing import report  # noqa: E402
from models.plumbing.data import Conditions, load_data, to_unit  # noqa: E402
from models.plumbing.run import prepare_output_dir, run_main  # noqa: E402
from models.plumbing.teachers import freeze_teacher, start_teacher  # noqa: E402
from models.worlds import load_world  # noqa: E402

LEVELS = 40  # of the teacher's trajectory


def train(args):
    device = torch.device("cpu")
    teacher = start_teacher(args)
    student = copy.deepcopy(teacher.base)
    ema = copy.deepcopy(student).requires_grad_(False)
    freeze_teacher(args, teacher, device)
    schedule, kind, world, conditions = (
        teacher.schedule,
        teacher.prediction,
        load_world(teacher.world_name),
        Conditions(args, teacher.base),
    )
    shape, grids = (
        tuple(teacher.base.latent_shape),
        {n: tdm.step_grid(n, teacher.shift) for n in args.student_steps},
    )
    data, data_cond, _ = load_data(args.teacher, shape[-1], seed=args.seed)
    student.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=args.learning_rate,
        betas=tuple(args.adam_betas),
        weight_decay=0.0,
        fused=True,
    )
    prepare_output_dir(args.output_dir, None)
    began = time.time()
    for step in tqdm(range(args.max_train_steps)):
        for group in optimizer.param_groups:
            group["lr"] = (
                args.learning_rate
                * min(1.0, (step + 1) / max(1, args.lr_warmup_steps))
                * (1 - step / args.max_train_steps)
            )
        draw = Draws(args.seed, step, "student", range(args.train_batch_size))
        i = draw.integer("data", len(data))
        x0, cond = to_unit(data[i]), {k: v[i] for k, v in data_cond.items()}
        _, uncond = conditions.pick(cond["label"], device)
        n = draw.integer("level", LEVELS) + 1.0  # of 1 ... LEVELS
        t, s = shift(n / LEVELS, teacher.shift), shift((n - 1) / LEVELS, teacher.shift)
        x_t = add_noise(schedule, x0, draw.normal("eps", shape), t)
        with torch.no_grad():
            x0_real = guided_x0(
                teacher.net, schedule, kind, x_t, t, cond, uncond, args.guidance_scale
            )
            x_s = ode_step(
                schedule,
                x0_real,
                to_x0_eps(x0_real, "x0", x_t, schedule.alpha(t), schedule.sigma(t))[1],
                s,
            )
            target = predict_x0(ema, schedule, kind, x_s, s, **cond)
        x0_student = predict_x0(student, schedule, kind, x_t, t, **cond)
        loss = tdm.trajectory_matching_loss(
            x0_student, target, x0_student.detach(), "pseudo_huber"
        )  # of x0_student - target
        loss.backward()
        tdm.update([optimizer], args.max_grad_norm, "consistency", loss)
        tdm.update_ema(ema, student, min(args.ema_decay or 0.95, (1 + step) / (4 + step)))
    students = {}
    for rule, suffix in (("ode", ""), ("sde", "_sde")):
        with_rule = types.SimpleNamespace(**{**vars(args), "renoise": rule})
        for k, f in tdm.student_samplers(
            with_rule, ema, teacher, conditions, shape, grids, False, device
        ).items():
            students["student" if k == max(grids) and rule == "ode" else f"student_{k}{suffix}"] = (
                k,
                f,
            )
    report.finish(
        args,
        "consistency",
        teacher,
        world,
        conditions,
        shape,
        grids[max(grids)][:-1],
        students,
        sum(p.numel() for p in ema.parameters()),
        time.time() - began,
        device,
    )


def main(argv=None):
    train(tdm.parse_args(argv))


if __name__ == "__main__":
    run_main(main)
