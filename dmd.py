"""Distribution matching distillation: DMD (arXiv 2311.18828 v4) and DMD2 (arXiv 2405.14867 v2), into 1 to 4 or more steps.

The idea. A teacher needs dozens of network calls to turn noise into a sample; the student shall need one, and it is enough
that its samples have the teacher's distribution, noise by noise they may differ. So minimise the KL divergence between the
two, after both have been noised to a random level t. Its gradient is the difference of two scores at the student's own
noised sample: one from the teacher ("where is data?"), one of the student's own current distribution ("where do I already
put samples?"), which a third network, the fake score, learns by denoising student samples all the while. Without the second
score every sample would run to the nearest mode. DMD steadied this with a regression onto stored teacher ODE samples; DMD2
drops that, trains the fake score several times per student update, adds a GAN on the fake's middle features, and trains
N-step students on their own intermediate states.

    paper             here               meaning                                                         shape
    x = G_theta(z)    x                  student sample, read as x0                                      (B, ...)
    x_t, a_t, s_t     x_t, alpha, sigma  noised student sample x_t = alpha x + sigma eps                 (B, ...)
    mu_real           x0_real            teacher's x0 at x_t, guided                                     (B, ...)
    mu_fake           x0_fake            fake's x0 at x_t, never guided                                  (B, ...)
    w_t (Eq. 8)       1 / MAE            per-sample weight, MAE = mean |x - mu_real|                     (B, 1, ...)
    t_1 > ... > t_N   times              the student's fixed steps, 1 = noise                            N floats
    D                 head(features)     real or fake logit                                              (B,)

Launch.
    laptop      python dmd.py                                    # glyphs, one step, two to three minutes on two cores
                python dmd.py --teacher ring                     # seconds
                python dmd.py --teacher runs/latent_fm-FOLDER    # your own teacher, see latent_fm.py
    one GPU     python dmd.py --teacher Wan2.1-T2V-1.3B-Diffusers --prompts prompts.safetensors --student_steps 4 --mixed_precision bf16
    one node    torchrun --nproc-per-node 8 dmd.py (the same flags; --train_batch_size is per rank)
    many nodes  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 dmd.py ...
    DMD v1      python dmd.py --regression_weight 0.25 --fake_update_ratio 1
    sampling    python dmd.py --sample runs/dmd-glyphs/student

Deviations, and why. The gradient drops the factor alpha_t of Eq. 7, as both papers' pseudo-code and code do. A step is a student
update (official: a critic update), and every fake update sees fresh student samples. The regression loss is L2, not LPIPS (v1
App. I: 2.78 against 2.66 FID; no feature network to download). Noise levels are uniform as in the papers, but spread evenly over
a batch. With several steps the fake is told which one made the sample, where the network has such an input: one fake for all only
pins down the mixture of the steps (docs/dmd.md; --shared_fake is the papers'). EMA, momentum below .9 and falling rates are not
the papers' (flags): they keep the default run short. models/gan.py says what differs in the GAN.
"""
import copy
import datetime
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from models import io, report
from models.diffusion import add_noise, expand, from_x0_eps, guided_x0, predict_x0, predict_x0_eps, sample_teacher, shift, step_grid
from models.gan import GanHead, discriminator_loss, gan_logit, generator_gan_loss
from models.toy import WORLDS, load_world

# ---- the method --------------------------------------------------------------------------------------------------


@torch.no_grad()
def distribution_matching_gradient(x, x0_real, x0_fake):
    """Direction in which the KL grows, dKL/dx up to scale: (mu_fake - mu_real) / mean|x - mu_real| (2311.18828, Eq. 7 and 8).

    s_fake - s_real = alpha (mu_fake - mu_real) / sigma^2, and Eq. 8's w_t divides by the teacher's error on this sample, so that
    all noise levels pull with similar strength. The norm is per sample and of x, not x_t. All arguments (B, ...) -> (B, ...).
    """
    error = (x - x0_real).abs().flatten(1).mean(1)  # (B,)
    return (x0_fake - x0_real) / expand(error.clamp_min(1e-8), x)


def distribution_matching_loss(x, g):
    """A loss whose gradient in x is g / numel(x); its value only says how large g is (2311.18828, Alg. 2).  -> scalar."""
    return 0.5 * F.mse_loss(x, (x - g).detach())


def fake_score_loss(fake, schedule, kind, x, eps, t, cond):
    """Denoising loss of the fake score on detached student samples (2311.18828, Eq. 6), in the space the network predicts, which is
    the weighting its teacher was trained with.  x, eps (B, ...), t (B,) -> scalar."""
    x_t = add_noise(schedule, x, eps, t)
    target = from_x0_eps(kind, x, eps, schedule.alpha(t), schedule.sigma(t))
    return F.mse_loss(fake(x_t, t, **cond).float(), target)


# ---- the sampler ---------------------------------------------------------------------------------------------------


def rollout(student, schedule, kind, z, times, cond, renoise, fresh):
    """From pure noise z at times[0] to the student's input at times[-1]: len(times) - 1 calls.

    renoise "sde": x_{t'} = alpha' x0 + sigma' fresh noise (2405.14867, Sec. 4.4); "ode": Euler, keeping the noise the student implies.
    fresh: index of the step -> noise (B, ...). With one time this is z itself, exactly.
    """
    x_t = z
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        x0, eps = predict_x0_eps(student, schedule, kind, x_t, z.new_full((len(z),), t), **cond)
        x_t = add_noise(schedule, x0, fresh(i) if renoise == "sde" else eps, z.new_full((len(z),), t_next))
    return x_t


@torch.no_grad()
def sample(student, schedule, kind, z, times, cond, renoise="sde", fresh=None):
    """The few-step sampler: len(times) calls, no guidance, no noise after the last.  z (B, ...) -> x0 (B, ...)."""
    fresh = fresh or (lambda i: torch.randn_like(z))
    x_t = rollout(student, schedule, kind, z, times, cond, renoise, fresh)
    return predict_x0(student, schedule, kind, x_t, z.new_full((len(z),), times[-1]), **cond)


# ---- plumbing: identical in every script ---------------------------------------------------------------------------


def start_ranks():
    """-> rank, world_size, device. Under torchrun joins the process group (nccl on GPUs, gloo on the CPU)."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))  # rank 0 may sample for long
    return rank, world_size, device


def mean_over_ranks(*values):
    """Scalars averaged over ranks, as floats; also where ranks wait for one another."""
    v = torch.stack([torch.as_tensor(x).detach().float().cpu() for x in values])
    if dist.is_initialized():
        v = v.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(v)
        v = v.cpu() / dist.get_world_size()
    return v.tolist()


def update(optimizers, max_grad_norm, what, loss):
    """Average gradients over ranks, clip, check that all ranks are finite, step. -> gradient norm before clipping."""
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]
    if dist.is_initialized():
        for p in parameters:  # every rank has the same parameters in the same order; FSDP2 does this in its backward
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if not all(abs(v) < float("inf") for v in mean_over_ranks(loss, norm)):  # NaN compares false; same verdict on all ranks
        raise io.TrainingError(f"{what} loss or gradient is not finite ({float(loss):.4g}, norm {float(norm):.4g}); the last "
                               "checkpoint under state/ is intact; start again with a lower learning rate or max_grad_norm")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(norm)


@torch.no_grad()
def update_ema(ema, net, decay):
    for a, b in zip(ema.parameters(), net.parameters()):
        a.lerp_(b, 1 - decay)


# ---- training ------------------------------------------------------------------------------------------------------


def make_regression_pairs(args, teacher, conditions, shape, device, path):
    """DMD v1's (z_ref, y_ref): teacher ODE samples, made once, kept beside the run (2311.18828, Sec. 3.2).  -> z, y, cond index."""
    if os.path.isfile(path):
        pairs = io.load_tensors(path)
        return pairs["z"], pairs["y"], pairs["index"]
    draw, y = io.Draws(args.seed, "pairs", 0, range(args.regression_pairs)), []
    z, index = draw.normal("z", shape), draw.integer("cond", conditions.prompts.n if conditions.prompts else max(1, conditions.classes))
    for z_part, i_part in zip(tqdm(z.split(args.train_batch_size), desc="teacher pairs"), index.split(args.train_batch_size)):
        cond, uncond = conditions.pick(i_part, device)
        y.append(sample_teacher(teacher.net, teacher.schedule, teacher.prediction, z_part.to(device), step_grid(args.teacher_steps, teacher.shift),
                                cond, uncond, args.guidance_scale, "heun").cpu())
    io.save_tensors({"z": z, "y": torch.cat(y), "index": index}, path)
    return z, torch.cat(y), index


def train(args):
    rank, world_size, device = start_ranks()
    main_rank, B = rank == 0, args.train_batch_size
    teacher, student, fake = io.load_networks(args, WORLDS, device)
    schedule, kind, shape = teacher.schedule, teacher.prediction, tuple(args.sample_shape or student.latent_shape)
    world = load_world(teacher.world_name) if teacher.world_name in WORLDS else None
    conditions = io.Conditions(args, student)
    times = step_grid(args.student_steps, teacher.shift)[:-1]  # the student's t_1 > ... > t_N, shifted
    needs_data = args.gan_weight > 0 or args.student_input == "real" and args.student_steps > 1
    if args.data and not needs_data:
        raise io.UserError("--data is for the GAN or --student_input real with several steps: set --gan_weight, or leave --data out")
    if args.no_fake_score and args.gan_weight:
        raise io.UserError("--no_fake_score leaves the GAN's head untrained, it sits on the fake score: use --gan_weight 0")
    if needs_data and not (args.data or world):
        raise io.UserError("--gan_weight and --student_input real need data: give --data FOLDER or FILE.safetensors, or --gan_weight 0")
    if args.regression_weight and not args.teacher_steps:
        raise io.UserError("--regression_weight needs teacher samples: give --teacher_steps of at least 1")
    if args.regression_weight and args.student_steps > 1:
        raise io.UserError("--regression_weight is DMD v1, a one-step method: use --student_steps 1")
    data, data_cond = io.load_real_data(args, WORLDS, world, teacher, shape) if needs_data else (None, None)
    _, features = io.try_network(student, conditions, shape, device, return_features=True)
    torch.manual_seed(io.stable_hash(args.seed, "head"))
    head = GanHead(features.shape[-1]).to(device)
    ema = copy.deepcopy(student).requires_grad_(False).eval() if args.ema_decay else student
    adam = dict(betas=tuple(args.adam_betas), weight_decay=args.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, **adam)
    optimizer_fake = torch.optim.AdamW([*fake.parameters(), *head.parameters()], lr=args.learning_rate_fake, **adam)

    modules = {"student": student, "fake": fake, "head": head, **({"ema": ema} if args.ema_decay else {})}
    optimizers = {"optimizer": optimizer, "optimizer_fake": optimizer_fake}
    start, spent_before = io.resume(args, modules, optimizers)
    if main_rank:
        io.prepare_output_dir(args.output_dir, args.resume_from_checkpoint)
    pairs_path = os.path.join(args.output_dir, "state", "pairs.safetensors")
    if main_rank and not start and os.path.isfile(pairs_path):
        os.remove(pairs_path)  # of a run that never saved, perhaps with other flags
    mean_over_ranks(0.0)  # nobody goes on before the folder is ready
    log = io.Log(args.output_dir, start) if main_rank else None
    if args.regression_weight:
        if main_rank:
            make_regression_pairs(args, teacher, conditions, shape, device, pairs_path)
        mean_over_ranks(0.0)
        z_ref, y_ref, index_ref = make_regression_pairs(args, teacher, conditions, shape, device, pairs_path)
    if main_rank:
        print(f"teacher {args.teacher}: {type(student).__name__}, {sum(p.numel() for p in student.parameters()):,} parameters, predicts {kind}, "
              f"{schedule.describe()}, shift {teacher.shift:g}, guidance {args.guidance_scale:g}; {device} x {world_size}\n"
              f"student: {args.student_steps} step(s) at t = {', '.join(f'{t:.4g}' for t in times)}, {args.renoise}")

    def real_batch(draw, name):
        """Data rows with their own conditions.  -> x0 (B, ...), cond."""
        i = draw.integer(name, len(data))
        return io.to_unit(data[i]).to(device), {k: v[i].to(device) for k, v in data_cond.items()}

    def student_input(draw):
        """x_t, t and condition the student is trained at: one step k for all ranks, reached by the student's own rollout
        without gradient (2405.14867, Sec. 4.5).  -> x_t (B, ...), t (B,), cond, uncond, and what else the fake is told."""
        k = draw.agreed("k", args.student_steps)
        z = draw.normal("z", shape)
        t, told = z.new_full((B,), times[k]), {"steps": z.new_full((B,), float(k))} if io.tells_step(args, fake) else {}
        cond, uncond = conditions.draw(draw, device)
        if args.student_input == "real" and k > 0:  # ablation: noised data, which the student never meets at test time
            x_real, cond = real_batch(draw, "real_input")
            return add_noise(schedule, x_real, z, t), t, cond, uncond, told
        with torch.no_grad():
            x_t = rollout(student, schedule, kind, z, times[:k + 1], cond, args.renoise, lambda i: draw.normal(f"renoise{i}", shape))
        return x_t, t, cond, uncond, told

    began = time.time()
    lap, steps = io.Stopwatch(device), tqdm(range(start, args.max_train_steps), initial=start, total=args.max_train_steps, disable=not main_rank)
    for step in steps:
        warmup = min(1.0, (step + 1) / max(1, args.lr_warmup_steps))
        decay = min(1.0, (1 - step / args.max_train_steps) / max(args.lr_decay_share, 1e-9))
        for opt, lr in ((optimizer, args.learning_rate), (optimizer_fake, args.learning_rate_fake)):
            for group in opt.param_groups:
                group["lr"] = lr * warmup * decay
        lap.restart()
        sums = dict.fromkeys(("loss_dm", "loss_fake", "loss_d", "loss_gan", "loss_regression", "g_dm", "g_gan", "mean", "std"), 0.0)
        share = 1 / args.gradient_accumulation_steps

        # ---- fake score: R updates, each on fresh samples of the current student, and the discriminator with it
        for inner in range(0 if args.no_fake_score else args.fake_update_ratio):
            fake_loss = 0.0
            for micro in range(args.gradient_accumulation_steps):
                row = (micro * world_size + rank) * B
                draw = io.Draws(args.seed, step, inner, range(row, row + B), device)
                t, eps = shift(draw.spread("u"), teacher.shift), draw.normal("eps", shape)
                lap("data")
                with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                    x_t, t_in, cond, _, told = student_input(draw)
                    with torch.no_grad():  # no gradient into the student here
                        x = predict_x0(student, schedule, kind, x_t, t_in, **cond)
                    lap("student")
                    loss = loss_f = fake_score_loss(fake, schedule, kind, x, eps, t, {**cond, **told})
                    if args.gan_weight:
                        x_real, cond_real = real_batch(draw, "real_gan")
                        t_f, t_r = (shift(draw.spread(n), teacher.shift) for n in ("u_gan_fake", "u_gan_real"))
                        logit_fake = gan_logit(fake, head, schedule, x, draw.normal("eps_gan_fake", shape), t_f, {**cond, **told})
                        logit_real = gan_logit(fake, head, schedule, x_real, draw.normal("eps_gan_real", shape), t_r, {**cond_real, **told})
                        loss_d = discriminator_loss(logit_real, logit_fake)
                        loss = loss_f + args.gan_weight_d * loss_d
                        sums["loss_d"] += loss_d.item() * share / args.fake_update_ratio
                (loss * share).backward()
                fake_loss += loss.detach() * share
                sums["loss_fake"] += loss_f.item() * share / args.fake_update_ratio
            norm_fake = update([optimizer_fake], args.max_grad_norm, "fake-score", fake_loss)
            lap("fake")

        # ---- student: one update on its own samples; teacher, fake and head are constants
        fake.requires_grad_(False), head.requires_grad_(False)
        student_loss = 0.0
        for micro in range(args.gradient_accumulation_steps):
            row = (micro * world_size + rank) * B
            draw = io.Draws(args.seed, step, "student", range(row, row + B), device)
            t, eps = shift(draw.spread("u", *args.dm_range), teacher.shift), draw.normal("eps", shape)
            lap("data")
            with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                x_t, t_in, cond, uncond, told = student_input(draw)
                x = predict_x0(student, schedule, kind, x_t, t_in, **cond)  # the one call with gradient
                x.retain_grad()
                lap("student")
                with torch.no_grad():
                    noised = add_noise(schedule, x, eps, t)
                    x0_real = guided_x0(teacher.net, schedule, kind, noised, t, cond, uncond, args.guidance_scale)
                    lap("teacher")
                    x0_fake = x if args.no_fake_score else predict_x0(fake, schedule, kind, noised, t, **cond, **told)
                    lap("fake")
                    g = distribution_matching_gradient(x, x0_real, x0_fake)
                loss_dm = distribution_matching_loss(x, g)
                loss = loss_dm
                if args.gan_weight:
                    t_g, eps_g = shift(draw.spread("u_gan"), teacher.shift), draw.normal("eps_gan", shape)
                    loss_gan = generator_gan_loss(gan_logit(fake, head, schedule, x, eps_g, t_g, {**cond, **told}))
                    loss = loss + args.gan_weight * loss_gan
                    sums["loss_gan"] += loss_gan.item() * share
                if args.regression_weight:  # its own batch of pairs (2311.18828, Eq. 9)
                    i = draw.integer("pair", len(z_ref))
                    cond_ref, _ = conditions.pick(index_ref[i], device)
                    y = predict_x0(student, schedule, kind, z_ref[i].to(device), t_in, **cond_ref)
                    loss_regression = F.mse_loss(y, y_ref[i].to(device))
                    loss = loss + args.regression_weight * loss_regression
                    sums["loss_regression"] += loss_regression.item() * share
            (loss * share).backward()
            student_loss += loss.detach() * share
            g_dm = g / g.numel() * share  # what the DM term alone sends into x
            for name, value in (("loss_dm", loss_dm * share), ("g_dm", g_dm.norm()), ("g_gan", (x.grad - g_dm).norm()),
                                ("mean", x.mean() * share), ("std", x.square().mean() * share)):  # std below
                sums[name] += value.item()
        norm = update([optimizer], args.max_grad_norm, "student", student_loss)
        fake.requires_grad_(True), head.requires_grad_(True)
        if args.ema_decay:
            update_ema(ema, student, min(args.ema_decay, (1 + step) / (4 + step)))  # warm-up: a window of step / 3
        lap("student")

        done = step + 1
        sums = dict(zip(sums, mean_over_ranks(*sums.values())))
        sums["std"] = max(0.0, sums["std"] - sums["mean"] ** 2) ** 0.5  # of all ranks' samples together
        if main_rank:
            log.write({"step": done, **sums, "norm_student": norm, "norm_fake": 0.0 if args.no_fake_score else norm_fake,
                       **lap.columns(), "peak_memory_mb": io.peak_memory_mb(device)})
            steps.set_postfix(fake=f"{sums['loss_fake']:.3f}", dm=f"{sums['loss_dm']:.3f}", std=f"{sums['std']:.3f}", refresh=False)
        if main_rank and (done % args.checkpointing_steps == 0 or done == args.max_train_steps):
            sampler = student_sampler(args, ema, teacher, conditions, shape, times, device)
            report.save_samples(args.output_dir, [(f"student, step {done}", report.preview(args, world, conditions, sampler))], world)
            report.save_student(args, "dmd", ema, teacher, times, shape)
            io.save_for_resume(args, done, modules, optimizers, spent_before + time.time() - began)
    if main_rank:
        if start >= args.max_train_steps:  # a finished run is written out again, perhaps to another folder
            report.save_student(args, "dmd", ema, teacher, times, shape)
        sampler = student_sampler(args, ema.eval(), teacher, conditions, shape, times, device)
        report.finish(args, "dmd", teacher, world, conditions, shape, times, {"student": (len(times), sampler)},
                      sum(p.numel() for p in ema.parameters()), spent_before + time.time() - began, device)
    mean_over_ranks(0.0)


# ---- what the run leaves behind ------------------------------------------------------------------------------------


def student_sampler(args, student, teacher, conditions, shape, times, device):
    """-> a function (index, first, last) -> those student samples, of the conditions index[first:last]."""
    return lambda index, a, b: sample(student, teacher.schedule, teacher.prediction, report.evaluation_noise(args, shape, device, a, b), times,
                                      conditions.pick(index[a:b], device)[0], args.renoise,
                                      lambda i: report.evaluation_noise(args, shape, device, a, b, f"renoise{i}"))


def sample_only(args):
    """--sample FOLDER: load a saved student, read its sampler.json, write samples.png (GIF for videos) and latents to --output_dir."""
    _, _, device = start_ranks()
    net, sampler, teacher, world, conditions, shape = report.load_student(args, "dmd", device)
    args.renoise = "sde" if sampler["rule"] == "renoise" else "ode"
    draw = student_sampler(args, net, teacher, conditions, shape, sampler["times"], device)
    report.write_samples(args, world, conditions, shape, draw, len(sampler["times"]), device)


# ---- flags ---------------------------------------------------------------------------------------------------------

# The flags' defaults suit small DiTs. What each kind of teacher changes of them; released models want far smaller rates.
GLYPHS = dict(timestep_shift=2.0)  # other small teachers: their own shift
RING = dict(max_train_steps=400, learning_rate=5e-4, learning_rate_fake=1e-3, fake_update_ratio=5, train_batch_size=256, ema_decay=0.95,
            adam_betas=[0.0, 0.99], lr_decay_share=0.7)
RELEASED = dict(max_train_steps=4000, train_batch_size=1, learning_rate=2e-6, learning_rate_fake=4e-7, fake_update_ratio=5, guidance_scale=4.0,
                ema_decay=0.99, adam_betas=[0.0, 0.99], weight_decay=0.01, lr_warmup_steps=0, lr_decay_share=0.0, student_steps=4, preview_samples=2)


def parse_args(argv=None):
    p = io.Parser(description="Distil a diffusion or flow teacher into a few-step student (DMD 2311.18828, DMD2 2405.14867). Defaults shown are those "
                  "of the given --teacher: glyphs, ring, other small networks of ours, or a released model.")
    io.add_run_flags(p)
    p.set_defaults(max_train_steps=760, learning_rate=1.2e-3, lr_warmup_steps=20, ema_decay=0.995)
    p.add_argument("--teacher", default="glyphs", help="ring, glyphs, voxels, a component folder, a pipeline root with model_index.json, or a run folder of ours")
    p.add_argument("--student_init", default=None, metavar="FOLDER", help="start the student here instead of from the teacher")
    p.add_argument("--prompts", default=None, metavar="FILE", help="safetensors with cond.NAME (N, ...) and uncond.NAME (1, ...), for text teachers")
    p.add_argument("--data", default=None, help="real samples for the GAN: a world, an image folder, or FILE.safetensors (x0, cond.*); default: the world's")
    p.add_argument("--sample_shape", type=io.number(int, 1), nargs="+", default=None, help="C H W or C T H W of a sample (default: the network's)")
    p.add_argument("--student_steps", type=io.number(int, 1), default=1, help="N, network calls of the student (paper: 1 or 4)")
    p.add_argument("--renoise", choices=["sde", "ode"], default="sde", help="between student steps: fresh noise (paper), or Euler")
    p.add_argument("--student_input", choices=["backsim", "real"], default="backsim", help="steps > 1 start from the student's own rollout (paper) "
                   "or from noised data (ablation)")
    p.add_argument("--shared_fake", action="store_true", help="ablation for steps > 1: do not tell the fake which step a sample comes from (paper)")
    p.add_argument("--learning_rate_fake", type=io.number(float, above=0), default=1.6e-3, help="AdamW learning rate of fake score and GAN head")
    p.add_argument("--lr_decay_share", type=io.number(float, 0, 1), default=1.0, help="last share of the run with both rates falling linearly to 0 "
                   "(paper: 0, constant)")
    p.add_argument("--fake_update_ratio", type=io.number(int, 1), default=2, help="R, fake updates per student update (paper: 5 to 10; v1: 1)")
    p.add_argument("--no_fake_score", action="store_true", help="ablation: mu_fake = x, the real score alone (collapses)")
    p.add_argument("--gan_weight", type=io.number(float, 0), default=0.0, help="w_G, student's GAN weight (paper: 1e-3 to 5e-3); 0 = off")
    p.add_argument("--gan_weight_d", type=io.number(float, 0), default=1e-2, help="w_D, discriminator's weight in the fake's loss (paper's code: 1e-2)")
    p.add_argument("--regression_weight", type=io.number(float, 0), default=0.0, help="DMD v1's lambda on teacher ODE pairs (paper: 0.25); 0 = off")
    p.add_argument("--regression_pairs", type=io.number(int, 1), default=1000, help="number of teacher ODE pairs for --regression_weight")
    p.add_argument("--dm_range", type=io.number(float, 0, 1), nargs=2, default=[0.02, 0.98], metavar=("LO", "HI"),
                   help="u ~ U[LO, HI] of the matching gradient, before the shift (paper: .02 .98)")
    p.add_argument("--adam_betas", type=io.number(float, 0, 0.99999), nargs=2, default=[0.8, 0.99], help="AdamW betas (paper: .9 .999)")
    p.add_argument("--weight_decay", type=io.number(float, 0), default=0.0, help="AdamW weight decay (paper: .01)")
    p.add_argument("--teacher_steps", type=io.number(int, 0), default=32, help="Heun steps of the many-step teacher; 0 leaves it out")
    p.add_argument("--preview_samples", type=io.number(int, 1), default=20, help="columns of samples.png")
    p.add_argument("--remeasure_teacher", action="store_true", help="measure the many-step teacher again instead of copying its row")
    argv = sys.argv[1:] if argv is None else argv
    known = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    start = known.sample or known.teacher
    p.set_defaults(**(GLYPHS if start == "glyphs" else RING if start == "ring" else {} if io.is_small(start, WORLDS) else RELEASED))
    args = p.parse_args(argv)
    if args.dm_range[0] >= args.dm_range[1]:
        p.error(f"argument --dm_range: LO must be below HI, got {args.dm_range[0]} {args.dm_range[1]}")
    if args.output_dir is None:
        args.output_dir = io.default_output_dir("dmd", args.teacher, args.sample)
    return args


def main(argv=None):
    args = parse_args(argv)
    sample_only(args) if args.sample else train(args)


if __name__ == "__main__":
    io.run(main)
