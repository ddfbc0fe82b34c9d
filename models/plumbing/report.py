"""What a run shows and saves: samples.png (and .gif), student/, report.json, a table.

A sampler is a function (index, first, last) -> samples first ... last - 1, of the conditions
index[first:last]. All rows start from the same noise. Measures exist for the embedded worlds only;
a teacher without a world gets pictures and latents.
"""

import json
import os
import time

import torch

from models.diffusion import ode_calls, step_grid
from models.draws import Draws
from models.files import UserError, open_tensors, save_json, save_tensors
from models.networks import load_network, save_network, weights_hash
from models.networks.latent_space import space_beside
from models.pictures import picture, save_gif, save_grid
from models.plumbing.data import Conditions
from models.plumbing.run import peak_memory_mb, refuse_output_dir
from models.plumbing.teachers import Teacher, describe_schedule, read_own_sampler, student_folder
from models.worlds.measures import balanced_labels, moments_distance


def many(draw_samples, n, batch=500):
    """draw_samples(first, last) over n samples in batches.  -> (n, ...) on the CPU, ms a sample."""
    began = time.perf_counter()
    x = torch.cat([draw_samples(i, min(n, i + batch)).float().cpu() for i in range(0, n, batch)])
    return x, 1000 * (time.perf_counter() - began) / n


def evaluation_noise(run, shape, first, last, coords=None):
    """The noise that every row of samples.png and report.json starts from.

    -> a function name ("z" is the first noise) -> (last - first, *shape), or for the points of a
    sparse batch, coords (M, 4), -> (M, shape[0]).
    """
    draw = Draws(run.args.seed, "evaluation", 0, range(first, last), run.device)

    def noise(name="z"):
        if coords is None:
            return draw.normal(name, shape)
        return draw.points(name, coords[:, 0].bincount().tolist(), shape[0])

    return noise


# ---- pictures ------------------------------------------------------------------------------------


def preview(run, teacher, sampler):
    """The samples that samples.png shows.  -> (n, ...) on the CPU."""
    columns = 400 if teacher.world_name == "ring" else run.args.preview_samples
    index = teacher.conditions.preview(columns)
    return many(lambda a, b: sampler(index, a, b), len(index), run.B)[0]


def save_samples(folder, rows, world):
    """samples.png, and samples.gif for videos.  rows: [(text, samples (n, ...)), ...]."""
    save_grid(os.path.join(folder, "samples.png"), [(text, picture(x, world)) for text, x in rows])
    if rows[0][1].dim() == 5 and getattr(world, "video", True):
        save_gif(os.path.join(folder, "samples.gif"), rows, world)


def save_previews(run, teacher, samplers):
    """samples.png in the middle of a run, {text: sampler}."""
    if run.main:
        rows = [(text, preview(run, teacher, sampler)) for text, sampler in samplers.items()]
        save_samples(run.folder, rows, teacher.world)


def decoded(rows, student):
    """Rows of latents, [(text, (n, ...)), ...], as pixels if the network has an autoencoder.

    student: the network's folder, None for a closed form.
    """
    space = space_beside(student) if student else None
    if space is None:
        return rows
    return [(text, torch.cat([space.to_pixels(z) for z in x.float().split(8)])) for text, x in rows]


# ---- student/ ------------------------------------------------------------------------------------


def save_student(run, teacher, net, times, changes=None, **more):
    """student/: the teacher's own layout and config, plus sampler.json.

    changes: entries of the config that differ from the teacher's. more: further entries of
    sampler.json. A latent teacher's autoencoder/ comes along.
    """
    if not run.main:
        return
    folder = os.path.join(run.folder, "student")
    space = space_beside(teacher.folder) if teacher.folder else None
    if space:
        space.save(os.path.join(run.folder, "autoencoder"))
    linear = {k: net.config[k] for k in ("linear_layers", "feature_map") if k in net.config}
    save_network(net, {**teacher.config, **linear, **(changes or {})}, folder)
    save_sampler(run, teacher, times, **more)


def save_sampler(run, teacher, times, **more):
    """student/sampler.json: how the student samples."""
    renoise = getattr(run.args, "renoise", "ode")
    sampler = {
        "method": run.method,
        "prediction": teacher.prediction,
        "schedule": describe_schedule(teacher.schedule),
        "times": times,
        "timestep_shift": teacher.shift,
        "rule": "renoise" if renoise == "sde" else "euler",
        "guidance_scale": 1.0,
        "sample_shape": list(teacher.shape),
        **more,
    }
    save_json(sampler, os.path.join(run.folder, "student", "sampler.json"))


def load_student(run, conditions_of=Conditions):
    """--sample FOLDER -> its network on the device, its sampler.json, and a Teacher without
    networks.

    The latter has the schedule, the sample's shape, the world, and conditions: conditions_of(args,
    net). Raises UserError.
    """
    args = run.args
    folder, sampler, schedule, prediction, shift = read_own_sampler(args.sample, run.method)
    net, config = load_network(folder)
    refuse_output_dir(run.folder, sampling=True)
    world_name = config.get("world")
    like = Teacher(None, config, folder, schedule, prediction, shift, world_name, args.sample)
    like.conditions = conditions_of(args, net)
    like.shape = tuple(args.sample_shape or sampler.get("sample_shape") or net.latent_shape)
    return net.to(run.device).eval(), sampler, like


def write_samples(run, teacher, sampler, calls):
    """What --sample leaves: samples.png, for videos a GIF too, and latents. Raises UserError."""
    try:
        with run.autocast():
            x = preview(run, teacher, sampler)
    except ValueError as e:
        raise UserError(f"--sample_shape {' '.join(map(str, teacher.shape))}: {e}") from None
    os.makedirs(run.folder, exist_ok=True)
    rows = [(f"student, {calls} call(s)", x)]
    if not teacher.world:
        rows = decoded(rows, student_folder(run.args.sample))
    save_samples(run.folder, rows, teacher.world)
    save_tensors({"x0": x}, os.path.join(run.folder, "samples.safetensors"))
    print(f"samples: {os.path.join(run.folder, 'samples.png')}")


# ---- the end of a run ----------------------------------------------------------------------------


def steps_at(times):
    """A student's grid in words."""
    return f"{len(times)} step(s) at t = {', '.join(f'{t:.4g}' for t in times)}"


def introduce(run, teacher, net, student):
    """Print who is distilled into what. student: the second line, after "student: "."""
    parameters = sum(p.numel() for p in net.parameters())
    run.say(
        f"teacher {run.args.teacher}: {type(net).__name__}, {parameters:,} parameters, predicts "
        f"{teacher.prediction}, {teacher.schedule.describe()}, shift {teacher.shift:g}, guidance "
        f"{run.args.guidance_scale:g}; {run.device} x {run.world_size}\nstudent: {student}"
    )


def teacher_sampler(run, teacher, grid=None, solver="heun"):
    """The guided teacher's sampler, over --teacher_steps steps or another grid."""
    grid = grid or step_grid(max(1, run.args.teacher_steps), teacher.shift)

    def draw(index, a, b):
        z = evaluation_noise(run, teacher.shape, a, b)("z")
        cond, uncond = teacher.conditions.pick(index[a:b], run.device)
        scale = run.args.guidance_scale
        return teacher.diffusion.sample(teacher.net, z, grid, cond, uncond, scale, solver)

    return draw


@torch.no_grad()
def finish(run, teacher, times, students, params, extra=None, solver="heun"):
    """Write samples.png and report.json, on rank 0; the other ranks wait.

    Rows: data, many-step teacher (by this solver), teacher at the student's steps (by Euler),
    students. times: the student's step grid without its final 0. students: {name: (network calls,
    sampler)}, called "student" and "student_...". extra: {row name: further entries of that row of
    the report}.
    """
    if run.main:
        fine = teacher_sampler(run, teacher, None, solver)
        coarse = teacher_sampler(run, teacher, times + [0.0], "euler")
        guided = 1 if run.args.guidance_scale == 1 else 2
        fine_calls = guided * ode_calls(run.args.teacher_steps, solver)
        rows = {"teacher_same_steps": (guided * len(times), coarse), **students}
        results = []
        if teacher.world:
            results = measure(run, teacher, fine, rows, len(times), extra or {}, solver)
        teachers = {"teacher": (fine_calls, fine), "teacher_": (guided * len(times), coarse)}
        show(run, teacher, teachers if run.args.teacher_steps else {}, students)
        save_report(run, run.args.teacher, params, results)
        print_table(results)
        print(f"samples: {os.path.join(run.folder, 'samples.png')}")
    run.wait_for_all()


def measure(run, teacher, fine, rows, steps_alike, extra, solver):
    """The rows of report.json for a world: 2,000 samples each, all from the same noise.

    fine: sampler of the many-step teacher. steps_alike: steps of the row teacher_same_steps.
    """
    world, steps = teacher.world, run.args.teacher_steps
    label = balanced_labels(2000, world.num_classes)
    results = [{"name": "data", "nfe": 0, **world.measure(*world.data(2000, 777, label))}]
    moments = None
    if steps:
        scale = run.args.guidance_scale
        calls = ode_calls(steps, solver) * (1 if scale == 1 else 2)
        row = {"name": "teacher", "nfe": calls, "guidance_scale": scale}
        row, moments = measured_teacher(run, teacher, label, fine, f"{solver}{steps}", row)
        results.append(row)
    for name, (nfe, sampler) in rows.items():
        row = {"name": name, "nfe": nfe}
        if name == "teacher_same_steps" and steps_alike > 8:  # slow enough to be worth storing
            key = f"euler{steps_alike}"
            row, own = measured_teacher(run, teacher, label, sampler, key, row)
        else:
            row, own = measured(world, label, sampler, row)
        row |= extra.get(name, {})
        if moments:
            row["fd_teacher"] = moments_distance(own, moments)
        results.append(row)
    for r in results:
        r["fd_excess"] = r["fd"] - results[0]["fd"]
    return results


def measured(world, label, sampler, row):
    """-> the row with the measures of these samples, and the samples' moments."""
    x, ms = many(lambda a, b: sampler(label, a, b), len(label))
    return {**row, "ms_per_sample": ms, **world.measure(x, label)}, world.moments(x, label)


def measured_teacher(run, teacher, label, sampler, key, row):
    """The same for a teacher in many steps: measured once, stored beside it, then copied."""
    folder, scale = teacher.folder, run.args.guidance_scale
    if not folder:
        return measured(teacher.world, label, sampler, row)
    name = f"{weights_hash(folder)}-{key}-shift{teacher.shift:g}-guidance{scale:g}.safetensors"
    path = os.path.join(folder, "measured", name)
    if os.path.isfile(path) and not run.args.remeasure_teacher:
        with open_tensors(path) as f:
            stored = json.loads(f.metadata()["row"])
            return {**stored, "copied": True}, (f.get_tensor("mean"), f.get_tensor("cov"))
    row, (mean, cov) = measured(teacher.world, label, sampler, row)
    if os.access(folder, os.W_OK):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_tensors({"mean": mean, "cov": cov}, path, {"row": json.dumps(row)})
    return row, (mean, cov)


def show(run, teacher, teachers, students):
    """samples.png: data where there is a world, then teachers and students, {name: (calls,
    sampler)}.

    Without a world the student's latents are written too, for a decoder.
    """
    drawn = {name: preview(run, teacher, sampler) for name, (_, sampler) in students.items()}
    x, rows = drawn["student"], []
    if teacher.world:
        index = teacher.conditions.preview(len(x))
        rows.append(("data", teacher.world.data(len(x), 778, index)[0]))
    for name, (calls, sampler) in teachers.items():
        plural = "calls" if name == "teacher" else "call(s)"
        rows.append((f"teacher, {calls} {plural}", preview(run, teacher, sampler)))
    for name, (calls, _) in students.items():
        rows.append((f"{name.split('_')[0]}, {calls} call(s)", drawn[name]))
    if not teacher.world:
        rows = decoded(rows, teacher.folder)
        save_tensors({"x0": x}, os.path.join(run.folder, "samples.safetensors"))
    save_samples(run.folder, rows, teacher.world)


def save_report(run, teacher, params, results, **more):
    """report.json: what was run, what it cost, the measured rows. more: further entries of the
    first."""
    report = {
        "method": run.method,
        "teacher": teacher,
        **more,
        "seed": run.args.seed,
        "steps": run.args.max_train_steps,
        "seconds": run.seconds(),
        "peak_memory_mb": peak_memory_mb(run.device),
        "params": params,
        "results": results,
    }
    save_json(report, os.path.join(run.folder, "report.json"))


COLUMNS = (
    "name nfe fd fd_excess fd_teacher patch_swd accuracy diversity motion moving hole_mse "
    "mean_fill shuffled known_error iou iou_shuffled connected ms_per_sample"
).split()


def print_table(results):
    """The short table a run ends with: one line for each row of report.json."""
    columns = [c for c in COLUMNS if any(c in r for r in results)]
    table = [columns] + [[cell(r.get(c)) for c in columns] for r in results]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


def cell(value):
    """One entry of the table as text."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
