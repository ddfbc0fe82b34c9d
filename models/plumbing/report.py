"""What a run shows and saves: samples.png (and .gif), student/, report.json, a table.

A sampler is a function (index, first, last) -> samples first ... last - 1, of the conditions
index[first:last]. All rows start from the same noise; that of a stored teacher is seed 0's. Worlds
measure 2,000 samples; of a teacher without a world the few that samples.png shows are compared with
--data and with the many-step teacher's, and latents are written too. `write_images` makes sets for
models/metrics.py.

All ranks call `save_previews`, `finish` and `write_samples`: they share out the samples, in the
precision that networks train in, and rank 0 writes.
"""

import json
import os
import time

import torch
import torch.distributed as dist

from models.diffusion import ode_calls, step_grid
from models.draws import Draws
from models.files import UserError, fingerprint, open_tensors, save_json, save_tensors
from models.networks import load_network, lora, own_entries, save_network
from models.networks.latent_space import space_beside
from models.pictures import picture, save_gif, save_grid
from models.plumbing.data import Conditions
from models.plumbing.flags import refuse
from models.plumbing.image_sets import write_set
from models.plumbing.images import files_below
from models.plumbing.run import peak_memory_mb, refuse_output_dir
from models.plumbing.teachers import (
    Teacher,
    describe_adapters,
    describe_schedule,
    load_adapter,
    read_own_sampler,
    saved_teacher,
    scheduler_config,
    set_clock,
    student_folder,
    wrong_base,
)
from models.worlds.measures import balanced_labels, compared, moments_distance


def many(draw_samples, n, batch=500):
    """draw_samples(first, last) over n samples in batches.  -> (n, ...) on the CPU, ms a sample."""
    began = time.perf_counter()
    x = torch.cat([draw_samples(i, min(n, i + batch)).float().cpu() for i in range(0, n, batch)])
    return x, 1000 * (time.perf_counter() - began) / n


def many_on_all_ranks(run, draw_samples, n, shape, batch=500):
    """The same samples, of which every part of the run makes a share: consecutive rows, under
    autocast.

    All ranks call their networks equally often, as networks that are shared out over them need: one
    that has fewer rows draws some that are not used. shape: of one sample.  -> (n, ...) on the CPU
    of rank 0, None on the others; milliseconds that this rank took for one sample.
    """
    share = [n // run.parts + (part < n % run.parts) for part in range(run.parts)]
    first, own = sum(share[: run.part]), share[run.part]
    first = min(first, n - 1)

    def rows(a, b):  # of this rank's share, or one that is not used
        a, b = (min(a, own), min(b, own)) if a < own else (0, 1)
        return draw_samples(first + a, first + b)

    with run.autocast(), torch.no_grad():
        x, ms = many(rows, share[0], batch)
    x = x[:own]
    if run.world_size == 1:
        return x, ms
    made = torch.zeros(share[0], *shape, device=run.device)  # the shares of all ranks as long
    made[: len(x)] = x.to(run.device)
    ranks = [torch.empty_like(made) for _ in range(run.world_size)] if run.main else None
    dist.gather(made, ranks)
    if not run.main:
        return None, ms
    parts = ranks[:: run.world_size // run.parts]  # the ranks of one part have the same samples
    return torch.cat([x[:m].cpu() for x, m in zip(parts, share)]), ms


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
    """The samples that samples.png shows.  -> (n, ...) on the CPU of rank 0, elsewhere None."""
    columns = 400 if teacher.world_name == "ring" else run.args.preview_samples
    index = teacher.conditions.preview(columns)
    return many_on_all_ranks(
        run, lambda a, b: sampler(index, a, b), len(index), teacher.shape, run.B
    )[0]


def save_samples(folder, rows, world):
    """samples.png, and samples.gif for videos.  rows: [(text, samples (n, ...)), ...]."""
    save_grid(os.path.join(folder, "samples.png"), [(text, picture(x, world)) for text, x in rows])
    if rows[0][1].dim() == 5 and getattr(world, "video", True):
        save_gif(os.path.join(folder, "samples.gif"), rows, world)


def save_previews(run, teacher, samplers):
    """samples.png in the middle of a run, {text: sampler}, as often as --preview_every says.

    It is called when the run saves, on all ranks. The run's end has a picture of its own, and one
    that was asked to stop draws none.
    """
    every, done = run.args.preview_every, run.step + 1
    before = max(0, done - run.args.checkpointing_steps)  # the last save, or a little earlier
    due = every is None or (every and done // every > before // every)
    if not due or run.stopping or done == run.args.max_train_steps:
        return
    rows = [(text, preview(run, teacher, sampler)) for text, sampler in samplers.items()]
    if run.main:
        save_samples(run.folder, rows, teacher.world)


@torch.no_grad()
def decoded(rows, student, device="cpu"):
    """Rows of latents, [(text, (n, ...)), ...], as pixels if the network has an autoencoder.

    student: the network's folder, None for a closed form.
    """
    space = space_beside(student) if student else None
    if space is None:
        return rows
    space = space.to(device)

    def pixels(x):
        return torch.cat([space.to_pixels(z.to(device)).cpu() for z in x.float().split(8)])

    return [(text, pixels(x)) for text, x in rows]


# ---- student/ ------------------------------------------------------------------------------------


def save_student(run, teacher, net, times, changes=None, **more):
    """student/: the teacher's own layout and config, plus sampler.json and scheduler/.

    All ranks call it, and rank 0 writes. Of an Adapted it is the adapter alone, and sampler.json
    names the network that it belongs on. changes: entries of the config that differ from the
    teacher's. more: further entries of sampler.json. A latent teacher's autoencoder/ comes along.
    """
    folder = os.path.join(run.folder, "student")
    adapted = isinstance(net, lora.Adapted)
    if not adapted:
        config = {**teacher.config, **own_entries(net), **(changes or {})}
        save_network(net, config, folder, dtype=save_dtype(run, teacher), write=run.main)
    if not run.main:
        return
    save_autoencoder(run, teacher)
    if adapted:
        weights = save_adapter(run, net, "adapter")
        more = {"weights": weights, **describe_adapters(run.args, teacher), **more}
    save_sampler(run, teacher, times, net.net if adapted else net, **more)


def save_autoencoder(run, teacher):
    """autoencoder/ of a latent teacher beside student/, so that its samples can be decoded."""
    space = space_beside(teacher.folder) if teacher.folder else None
    if space:
        space.save(os.path.join(run.folder, "autoencoder"))


def save_dtype(run, teacher):
    """--save_dtype, or what the teacher's own files suggest.  None: as the student is trained."""
    asked = run.args.save_dtype or ("bf16" if teacher.stored_in_bf16 else "float32")
    return torch.bfloat16 if asked == "bf16" else None


LORA_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}  # --lora_dtype


def save_adapter(run, net, name, **about):
    """student/NAME.safetensors, or NAME/ for peft, of an Adapted.  -> that file's name.

    about: {str: str} for the header.
    """
    saved = lora.saved_name(net.net, name)
    path = os.path.join(run.folder, "student", saved)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save = lora.save_peft if lora.is_for_peft(net.net) else lora.save
    about = {**about, "method": run.method}
    save(net.net, net.adapter, path, about, LORA_DTYPES[run.args.lora_dtype])
    return saved


def save_sampler(run, teacher, times, net=None, **more):
    """student/sampler.json: how the student samples, and scheduler/, which says so to diffusers.

    net: the student's network, if it is not the teacher's architecture.
    """
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
    folder = os.path.join(run.folder, "student")
    save_json(sampler, os.path.join(folder, "sampler.json"))
    scheduler = scheduler_config(net or teacher.base, teacher.schedule, sampler)
    if scheduler:
        os.makedirs(os.path.join(folder, "scheduler"), exist_ok=True)
        save_json(scheduler, os.path.join(folder, "scheduler", "scheduler_config.json"))


def load_student(run, conditions_of=Conditions):
    """--sample FOLDER -> its network on the device, its sampler.json, and a Teacher without
    networks. Adapters come on the network that they belong on.

    The latter has the schedule, the sample's shape, the world, and conditions: conditions_of(args,
    net). Raises UserError.
    """
    args = run.args
    folder, sampler, schedule, prediction, shift = read_own_sampler(args.sample, run.method)
    refuse_output_dir(run.folder, sampling=True)
    if sampler.get("lora_rank"):
        refuse(wrong_base(args, folder, sampler))
        base = saved_teacher(run, sampler)
        run.spread_tokens(base.base)
        path = os.path.join(folder, sampler["weights"])
        net = load_adapter(base.base, "student", path, sampler)
        config, world_name = base.config, base.world_name
    else:
        for flag in ("teacher", "teacher_lora"):
            if getattr(args, flag):
                raise UserError(
                    f"--{flag}: the student in --sample {args.sample} is a whole network: leave it "
                    "out"
                )
        net, config = load_network(folder, place=run.place)
        run.spread_tokens(net)
        set_clock(net, schedule)
        world_name = config.get("world")
    like = Teacher(None, config, folder, schedule, prediction, shift, world_name, args.sample)
    like.conditions = conditions_of(args, net)
    like.shape = tuple(args.sample_shape or sampler.get("sample_shape") or net.latent_shape)
    return net, sampler, like


def write_samples(run, teacher, sampler, calls):
    """What --sample leaves: samples.png, for videos a GIF too, and latents; with --samples a set of
    images. Raises UserError.

    All ranks call it.
    """
    try:
        if run.args.samples:
            return write_images(run, teacher, sampler, calls)
        x = preview(run, teacher, sampler)
    except ValueError as e:
        raise UserError(f"--sample_shape {' '.join(map(str, teacher.shape))}: {e}") from None
    if not run.main:
        return
    os.makedirs(run.folder, exist_ok=True)
    rows = [(f"student, {calls} call(s)", x)]
    if not teacher.world:
        rows = decoded(rows, student_folder(run.args.sample), run.device)
    save_samples(run.folder, rows, teacher.world)
    save_tensors({"x0": x}, os.path.join(run.folder, "samples.safetensors"))
    print(f"samples: {os.path.join(run.folder, 'samples.png')}")


def write_images(run, teacher, sampler, calls):
    """--samples N of a student, decoded by its run's autoencoder where it has one.

    All ranks call it. Raises UserError.
    """
    args, world, folder = run.args, teacher.world, student_folder(run.args.sample)
    space = None if world else space_beside(folder)
    shape = getattr(world, "shape", teacher.shape)
    if space:
        space, shape = space.to(run.device), space.pixel_shape(teacher.shape)
    refuse_no_images(shape, "--preview_samples N writes N of them to samples.safetensors")
    index = chosen_labels(args, teacher.conditions.count)

    def draw(first, last):
        x = sampler(index, first, last).float()
        with torch.autocast(run.device.type, enabled=False):  # the autoencoder in float32
            if world:
                return world.pixels(x) if hasattr(world, "pixels") else x
            return space.to_pixels(x) if space else x

    prompts = teacher.conditions.prompts
    label = None if prompts or not teacher.conditions.classes else index
    about = {"prompts": prompts and prompts.fingerprint(), "sample_shape": list(teacher.shape)}
    about |= made_with(args, folder, space)
    write_set(run, draw, args.samples, label, calls=calls, **about)


def refuse_no_images(shape, instead):
    """Raises UserError for samples of a shape that are no images. instead: what remains."""
    wrong = len(shape) != 3 or shape[0] not in (1, 3)
    what = f"samples are {tuple(shape)}, which are no images"
    refuse([(wrong, f"--samples: {what}: leave it out; {instead}")])


def chosen_labels(args, count):
    """--labels for --samples: which of `count` classes or prompts each image gets.  (N,) int64"""
    if args.labels == "random":
        return Draws(args.seed, "labels", 0, range(args.samples)).integer("label", count)
    return balanced_labels(args.samples, count)


def made_with(args, folder, space=None):
    """What a set of images depends on besides the sampler: entries of its set.json.

    space: the latent space that decodes them, or None.
    """
    return {
        **({"autoencoder": space.digest()} if space else {}),
        "student": fingerprint(files_below(folder)),
        "seed": args.seed,
        "labels": args.labels or "balanced",
        "mixed_precision": args.mixed_precision,
    }


# ---- the end of a run ----------------------------------------------------------------------------


def steps_at(times):
    """A student's grid in words."""
    return f"{len(times)} step(s) at t = {', '.join(f'{t:.4g}' for t in times)}"


def introduce(run, teacher, net, student):
    """Print who is distilled into what. student: the second line, after "student: ".

    Before that, what the teacher's release prescribes and what is wrong with it (`flags.parse`).
    """
    parameters = sum(p.numel() for p in lora.base_parameters(net).values())
    settings = getattr(run.args, "settings", "")
    rescaled = f" rescaled by {teacher.over}" if teacher.over else ""
    if settings:
        run.say(settings)
    run.say(
        f"teacher {run.args.teacher}: {type(net).__name__}, {parameters:,} parameters, predicts "
        f"{teacher.prediction}, {teacher.schedule.describe()}, shift {teacher.shift:g}, guidance "
        f"{run.args.guidance_scale:g}{rescaled}; {run.describe_ranks()}\nstudent: {student}"
    )


def teacher_sampler(run, teacher, grid=None, solver="heun"):
    """The guided teacher's sampler, over --teacher_steps steps or another grid."""
    grid = grid or teacher.grid(max(1, run.args.teacher_steps))

    def draw(index, a, b):
        z = evaluation_noise(run, teacher.shape, a, b)("z")
        cond, uncond = teacher.conditions.pick(index[a:b], run.device)
        scale = run.args.guidance_scale
        return teacher.diffusion.sample(teacher.net, z, grid, cond, uncond, scale, solver)

    return draw


@torch.no_grad()
def finish(run, teacher, times, students, params, extra=None, solver="heun", fine=None, real=None):
    """Write samples.png and report.json. All ranks call it, and leave it together.

    Rows: data, many-step teacher (by this solver), teacher at the student's steps (by Euler),
    students. times: the student's step grid without its final 0. students: {name: (network calls,
    sampler)}, called "student" and "student_...". extra: {row name: further entries of that row of
    the report}, needed on rank 0. fine: (network calls, sampler) of a many-step teacher that is
    sampled in another way than over --teacher_steps of its own grid. real: batches of --data, as
    real_batches makes them, which samples are compared with where there is no world.
    """
    guided = 1 if run.args.guidance_scale == 1 else 2
    key = None if fine else f"{solver}{run.args.teacher_steps}"
    calls = guided * ode_calls(run.args.teacher_steps, solver)
    teachers = {"teacher": fine or (calls, teacher_sampler(run, teacher, None, solver))}
    coarse = guided * len(times), teacher_sampler(run, teacher, times + [0.0], "euler")
    results = []
    if teacher.world:
        rows = {"teacher_same_steps": coarse, **students}
        own_grid = [*times, 0.0] == step_grid(len(times), teacher.shift)
        worth_it = own_grid and len(times) > 8  # enough steps to be worth storing
        alike = f"euler{len(times)}" if worth_it else None
        results = measure(run, teacher, *teachers["teacher"], rows, alike, extra or {}, key)
    teachers["teacher_"] = coarse
    teachers = teachers if run.args.teacher_steps else {}
    shown = show(run, teacher, teachers, students, real)
    if run.main and not teacher.world:
        results = measure_shown(shown, {**teachers, **students}, extra or {})
    if run.main:
        save_report(run, run.args.teacher, params, results)
        print_table(results)
        print(f"samples: {os.path.join(run.folder, 'samples.png')}")
    run.wait_for_all()


def measure(run, teacher, calls, fine, rows, alike, extra, key):
    """The rows of report.json for a world: 2,000 samples each, all from the same noise.

    A stored teacher's is seed 0's. With another seed fd_teacher has in it by how much two sets of
    2,000 samples differ: --remeasure_teacher takes the run's own noise.

    fine, calls: sampler of the many-step teacher and its network calls. key: see measured_teacher,
    alike: that of the row teacher_same_steps. Ranks other than 0 get rows without numbers.
    """
    world, results, moments = teacher.world, [], None
    label = balanced_labels(2000, world.num_classes)
    if run.main:
        x = world.data(2000, 777, label)[0]
        measures = world.measure(x, label if teacher.conditions.classes else None)
        results.append({"name": "data", "nfe": 0, **measures})
    if run.args.teacher_steps:
        row = {"name": "teacher", "nfe": calls, "guidance_scale": run.args.guidance_scale}
        row, moments = measured_teacher(run, teacher, label, fine, key, row)
        results.append(row)
    for name, (nfe, sampler) in rows.items():
        row = {"name": name, "nfe": nfe}
        key = alike if name == "teacher_same_steps" else None
        row, own = measured_teacher(run, teacher, label, sampler, key, row)
        row |= extra.get(name, {})
        if moments:
            row["fd_teacher"] = moments_distance(own, moments)
        results.append(row)
    for r in results if run.main else []:
        r["fd_excess"] = r["fd"] - results[0]["fd"]
    return results


def measured(run, teacher, label, sampler, row):
    """-> the row with the measures of these samples, and the samples' moments; only on rank 0."""
    world, n, index = teacher.world, len(label), label
    if not teacher.conditions.classes:
        index, label = torch.zeros_like(label), None
    x, ms = many_on_all_ranks(run, lambda a, b: sampler(index, a, b), n, teacher.shape)
    if not run.main:
        return row, None
    return {**row, "ms_per_sample": ms, **world.measure(x, label)}, world.moments(x, label)


def measured_teacher(run, teacher, label, sampler, key, row):
    """The same for a teacher in many steps: a run of seed 0 stores it beside it, others copy it.

    Where nothing is stored, and with --remeasure_teacher, it is of the run's own noise. key: how it
    is sampled, in a word; None: nothing is stored.
    """
    folder, scale = teacher.folder, run.args.guidance_scale
    if not (folder and key):
        return measured(run, teacher, label, sampler, row)
    precision = "-bf16" if run.args.mixed_precision == "bf16" else ""
    rescaled = f"-rescaled-{teacher.over}" if teacher.over else ""
    name = f"{teacher.fingerprint()}-{key}-shift{teacher.shift:g}-guidance{scale:g}"
    name += rescaled + precision
    path = os.path.join(folder, "measured", f"{name}.safetensors")
    known = run.main and os.path.isfile(path) and not run.args.remeasure_teacher
    if any(run.mean_over_ranks(float(known))):  # as rank 0 sees it
        if not run.main:
            return row, None
        with open_tensors(path) as f:
            stored = json.loads(f.metadata()["row"])
            return {**stored, **row, "copied": True}, (f.get_tensor("mean"), f.get_tensor("cov"))
    row, moments = measured(run, teacher, label, sampler, row)
    if run.main and run.args.seed == 0:
        tensors = dict(zip(("mean", "cov"), moments))
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            save_tensors(tensors, path, {"row": json.dumps(row)})
        except OSError as e:  # another user's folder, or a full disk: the next run measures again
            run.say(f"the teacher's measures are not kept beside the teacher ({e})")
    return row, moments


def measure_shown(shown, calls, extra):
    """The rows of report.json where no world measures: of the samples that samples.png shows.

    Those of one place start from the same noise, so that paired_mse is a distance of sample to
    sample. shown: what `show` returns; calls: {name: (network calls, sampler)}; extra: see finish.
    """
    data, fine, results = shown.get("data"), shown.get("teacher"), []
    for name, x in shown.items():
        row = {"name": ROWS.get(name, name), "nfe": calls[name][0] if name in calls else 0}
        row["samples"] = len(x)
        if data is not None and name != "data":
            row |= compared(x, data)
        if fine is not None and name not in ("data", "teacher"):
            row["paired_mse"] = float((x - fine).square().mean())
            row |= {f"{what}_teacher": value for what, value in compared(x, fine).items()}
        results.append(row | extra.get(name, {}))
    return results if data is not None or fine is not None else []


ROWS = {"teacher_": "teacher_same_steps"}  # what a row of samples.png is called in report.json


def show(run, teacher, teachers, students, real=None):
    """samples.png: data where there is some, then teachers and students, {name: (calls, sampler)}.

    Without a world the student's latents are written too, for a decoder. real: see finish; its rows
    are drawn at random.  -> {name: samples (n, ...), decoded where they can be} on rank 0, else {}
    """
    everybody = [*teachers.items(), *students.items()]
    drawn = {name: preview(run, teacher, sampler) for name, (_, sampler) in everybody}
    if not run.main:
        return {}
    x, rows = drawn["student"], []
    if real and not teacher.world:
        draw = Draws(run.args.seed, "report", 0, range(len(x)), run.device)
        rows.append(("data", real(draw, "data")[0].float().cpu()))
    if teacher.world:
        index = teacher.conditions.preview(len(x)) if teacher.conditions.classes else None
        rows.append(("data", teacher.world.data(len(x), 778, index)[0]))
    for name, (calls, _) in everybody:
        plural = "calls" if name == "teacher" else "call(s)"
        rows.append((f"{name.split('_')[0]}, {calls} {plural}", drawn[name]))
    if not teacher.world:
        rows = decoded(rows, teacher.folder, run.device)
        save_tensors({"x0": x}, os.path.join(run.folder, "samples.safetensors"))
    save_samples(run.folder, rows, teacher.world)
    names = ["data"] * (len(rows) - len(everybody)) + [name for name, _ in everybody]
    return {name: x for name, (_, x) in zip(names, rows, strict=True)}


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
        "changes": run.changes,  # of flags, where the run was resumed with others
        "params": params,
        "results": results,
    }
    save_json(report, os.path.join(run.folder, "report.json"))


COLUMNS = (
    "name nfe samples fd fd_excess fd_teacher paired_mse patch_swd patch_swd_teacher accuracy "
    "diversity diversity_teacher motion moving hole_mse "
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
