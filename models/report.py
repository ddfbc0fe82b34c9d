"""What a distillation run shows at its end: samples.png (and .gif), report.json, and the table of its rows.

All rows start from the same noise. Measures exist for the embedded worlds only; a folder without a world gets pictures and latents.
"""
import json
import os
import time
import types

import torch

from models import io
from models.diffusion import ode_calls, sample_teacher, step_grid
from models.latent_space import space_beside
from models.toy import WORLDS, balanced_labels, load_world, moments_distance


def many(draw_samples, n, batch=500):
    """Run draw_samples(first, last) over n samples in batches.  -> (n, ...) on the CPU, ms per sample."""
    began = time.perf_counter()
    x = torch.cat([draw_samples(i, min(n, i + batch)).float().cpu() for i in range(0, n, batch)])
    return x, 1000 * (time.perf_counter() - began) / n


def evaluation_noise(args, shape, device, first, last, name="z", coords=None):
    """The noise that every row of samples.png and report.json starts from.  (last - first, *shape), or for points (M, shape[0])."""
    draw = io.Draws(args.seed, "evaluation", 0, range(first, last), device)
    return draw.normal(name, shape) if coords is None else draw.points(name, coords[:, 0].bincount().tolist(), shape[0])


def preview(args, world, conditions, sampler):
    """The samples that samples.png shows, of sampler(index, first, last).  -> (n, ...) on the CPU."""
    index = conditions.preview(400 if world and world.name == "ring" else args.preview_samples)
    return many(lambda a, b: sampler(index, a, b), len(index), args.train_batch_size)[0]


def save_samples(folder, rows, world):
    """samples.png, and samples.gif for videos.  rows: [(text, samples (n, ...)), ...]."""
    io.save_grid(os.path.join(folder, "samples.png"), [(text, io.picture(x, world)) for text, x in rows])
    if rows[0][1].dim() == 5 and getattr(world, "video", True):
        io.save_gif(os.path.join(folder, "samples.gif"), rows, world)


def decoded(rows, student):
    """Rows of latents, [(text, (n, ...)), ...], as pixels where the network of folder `student` (None: a closed form) has an autoencoder beside it."""
    space = space_beside(student) if student else None
    return [(text, torch.cat([space.to_pixels(z) for z in x.float().split(8)])) for text, x in rows] if space else rows


def save_student(args, method, net, teacher, times, shape, changes=None, **more):
    """student/: the teacher's own layout and config, with what a student of ours changes of it, plus sampler.json, with more entries if given.
    A latent teacher's autoencoder/ comes along."""
    folder = os.path.join(args.output_dir, "student")
    space = space_beside(teacher.folder) if teacher.folder else None
    if space:
        space.save(os.path.join(args.output_dir, "autoencoder"))
    linear = {k: net.config[k] for k in ("linear_layers", "feature_map") if k in net.config}
    io.save_network(net, {**teacher.config, **linear, **(changes or {})}, folder)
    io.save_json({"method": method, "prediction": teacher.prediction, "schedule": io.describe_schedule(teacher.schedule), "times": times,
                  "timestep_shift": teacher.shift, "rule": "renoise" if getattr(args, "renoise", "ode") == "sde" else "euler", "guidance_scale": 1.0,
                  "sample_shape": list(shape), **more},
                 os.path.join(folder, "sampler.json"))


def load_student(args, method, device, conditions_of=io.Conditions):
    """--sample FOLDER -> one saved network on the device, its sampler.json, a namespace with its schedule and prediction, and world, conditions,
    which are conditions_of(args, network), and sample shape.  Raises UserError."""
    folder, sampler, schedule, kind, _ = io.read_own_sampler(args.sample, method)
    net, config = io.load_network(folder)
    io.refuse_output_dir(args.output_dir, sampling=True)
    conditions, shape = conditions_of(args, net), tuple(args.sample_shape or sampler.get("sample_shape") or net.latent_shape)
    world = load_world(config["world"]) if config.get("world") in WORLDS else None
    return net.to(device).eval(), sampler, types.SimpleNamespace(schedule=schedule, prediction=kind), world, conditions, shape


def write_samples(args, world, conditions, shape, sampler, calls, device):
    """What --sample leaves: samples.png (GIF for videos) and the latents, of sampler(index, first, last).  Raises UserError."""
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            x = preview(args, world, conditions, sampler)
    except ValueError as e:
        raise io.UserError(f"--sample_shape {' '.join(map(str, shape))}: {e}") from None
    os.makedirs(args.output_dir, exist_ok=True)
    rows = [(f"student, {calls} call(s)", x)]
    save_samples(args.output_dir, rows if world else decoded(rows, io.student_folder(args.sample)), world)
    io.save_tensors({"x0": x}, os.path.join(args.output_dir, "samples.safetensors"))
    print(f"samples: {os.path.join(args.output_dir, 'samples.png')}")


def teacher_sampler(args, teacher, conditions, shape, device, grid=None, solver="heun"):
    """-> a function (index, first, last) -> those samples of the guided teacher, over the many steps of --teacher_steps or another grid."""
    grid = grid or step_grid(max(1, args.teacher_steps), teacher.shift)
    return lambda index, a, b: sample_teacher(teacher.net, teacher.schedule, teacher.prediction, evaluation_noise(args, shape, device, a, b), grid,
                                              *conditions.pick(index[a:b], device), args.guidance_scale, solver)


@torch.no_grad()
def finish(args, method, teacher, world, conditions, shape, times, students, params, seconds, device, extra=None, solver="heun"):
    """Write samples.png and report.json: data, many-step teacher (by this solver), teacher at the student's steps (by Euler), student.

    times: the student's step grid without its final 0. students: {name: (network calls, sampler(index, first, last))}, each a row, called "student"
    and "student_...". extra: {row name: further entries of that row of the report}.
    """
    scale, guided = args.guidance_scale, 1 if args.guidance_scale == 1 else 2
    fine, fine_calls = teacher_sampler(args, teacher, conditions, shape, device, None, solver), guided * ode_calls(args.teacher_steps, solver)
    coarse = teacher_sampler(args, teacher, conditions, shape, device, times + [0.0], "euler")
    rows = {"teacher_same_steps": (guided * len(times), coarse), **students}
    results = []
    if world:
        label = balanced_labels(2000, world.num_classes)
        results.append({"name": "data", "nfe": 0, **world.measure(*world.data(2000, 777, label))})
        if args.teacher_steps:
            row, moments = measured_teacher(args, teacher, world, label, lambda: many(lambda a, b: fine(label, a, b), 2000), f"{solver}{args.teacher_steps}",
                                            {"name": "teacher", "nfe": fine_calls, "guidance_scale": scale})
            results.append(row)
        for name, (nfe, sampler) in rows.items():
            draw = lambda: many(lambda a, b: sampler(label, a, b), 2000)  # noqa: E731, B023
            if name == "teacher_same_steps" and len(times) > 8:  # worth being stored as well
                row, own = measured_teacher(args, teacher, world, label, draw, f"euler{len(times)}", {"name": name, "nfe": nfe})
            else:
                x, ms = draw()
                row, own = {"name": name, "nfe": nfe, "ms_per_sample": ms, **world.measure(x, label)}, world.moments(x, label)
            results.append({**row, **(extra or {}).get(name, {})})
            if args.teacher_steps:
                results[-1]["fd_teacher"] = moments_distance(own, moments)
        for r in results:
            r["fd_excess"] = r["fd"] - results[0]["fd"]
    x_student = preview(args, world, conditions, students["student"][1])
    pictured = [("data", world.data(len(x_student), 778, conditions.preview(len(x_student)))[0])] if world else []
    if args.teacher_steps:
        pictured += [(f"teacher, {fine_calls} calls", preview(args, world, conditions, fine)),
                     (f"teacher, {guided * len(times)} call(s)", preview(args, world, conditions, coarse))]
    for name, (nfe, sampler) in students.items():
        pictured.append((f"{name.split('_')[0]}, {nfe} call(s)", x_student if name == "student" else preview(args, world, conditions, sampler)))
    save_samples(args.output_dir, pictured if world else decoded(pictured, teacher.folder), world)
    if not world:
        io.save_tensors({"x0": x_student}, os.path.join(args.output_dir, "samples.safetensors"))  # latents for a decoder
    save_report(args.output_dir, args, method, args.teacher, params, seconds, device, results)
    io.print_table(results)
    print(f"samples: {os.path.join(args.output_dir, 'samples.png')}")


def save_report(folder, args, method, teacher, params, seconds, device, results, **more):
    """report.json: what was run, what it cost, and the rows that were measured. more: further entries of what was run."""
    io.save_json({"method": method, "teacher": teacher, **more, "seed": args.seed, "steps": args.max_train_steps, "seconds": seconds,
                  "peak_memory_mb": io.peak_memory_mb(device), "params": params, "results": results}, os.path.join(folder, "report.json"))


def measured_teacher(args, teacher, world, label, draw_samples, sampler, row):
    """The row and sample moments of a teacher in many steps: measured once, stored beside the teacher, copied afterwards."""
    key = f"{sampler}-shift{teacher.shift:g}-guidance{args.guidance_scale:g}"
    path = teacher.folder and os.path.join(teacher.folder, "measured", f"{io.weights_hash(teacher.folder)}-{key}.safetensors")
    if path and os.path.isfile(path) and not args.remeasure_teacher:
        with io.open_tensors(path) as f:
            return {**json.loads(f.metadata()["row"]), "copied": True}, (f.get_tensor("mean"), f.get_tensor("cov"))
    x, ms = draw_samples()
    mean, cov = world.moments(x, label)
    row = {**row, "ms_per_sample": ms, **world.measure(x, label)}
    if path and os.access(teacher.folder, os.W_OK):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        io.save_tensors({"mean": mean, "cov": cov}, path, {"row": json.dumps(row)})
    return row, (mean, cov)
