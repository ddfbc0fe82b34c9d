"""Decoupled DMD (arXiv 2511.22677 v1): CFG augmentation is the engine, distribution matching the shield.

The idea. Everybody who distils a text-to-image teacher with DMD guides the real score and not the fake one. Then the gradient is two things
at once: the matching of distributions that DMD is named for, conditional real score minus fake score, and a second term that has no fake
score in it, (alpha - 1) times (conditional minus unconditional real score). The paper takes the sum apart. The second term, CFG augmentation
(CA), is what turns a many-step teacher into a few-step student: it climbs log p(c | x), fast, and on its own without end, until colours and
noise run away. The first, distribution matching (DM), cannot do the conversion as well, but pulls back whatever real samples do not have; a
penalty on mean and variance, or a GAN, can stand in for it, worse. Apart, each term can have its own noise level. CA at a level adds content
of that level, so a student whose input is already less noisy needs CA only below it (cleaner); DM must see faults of all sizes, so all levels.

    paper               here                  meaning                                                                    shape
    t = 0 noise, 1 data u = 1 - t             raw time here: 1 noise, 0 data. Turned round once, here; networks see shift(u)   float
    t_1=0 < ... < t_N   times                 the student's steps, u = 1, (N-1)/N, ..., 1/N, shifted                     N floats
    z_t                 x_in                  the student's input at step k, made by its own steps before                (B, ...)
    x = G(z_t)          x                     student sample, read as x0                                                 (B, ...)
    tau_DM, tau_CA      t_dm, t_ca            noise levels of the two terms; tau > t is u < u_k here                     (B,)
    s_real^cond,uncond  x0_cond, x0_uncond    the teacher's x0 with and without the condition (its scores, rescaled)     (B, ...)
    s_fake^cond         x0_fake               the fake's x0, never guided                                                (B, ...)
    alpha               --guidance_scale      uncond + alpha (cond - uncond); 1 leaves DM alone                          float
    -Delta_DM, -Delta_CA  g_dm, g_ca          the two gradients in x; Eq. 6 says that their sum is DMD's                 (B, ...)

Launch.
    laptop      python decoupled_dmd.py                          # glyphs, four steps, under four minutes on two cores
                python decoupled_dmd.py --teacher ring           # seconds
    schedules   python decoupled_dmd.py --schedule shared        # DMD as everybody has it; also: full, constrained (Table 1)
    ablations   python decoupled_dmd.py --no_dm                  # CA alone: sharp at once, then runs away (Fig. 2)
                python decoupled_dmd.py --no_ca                  # DM alone
                python decoupled_dmd.py --no_dm --mean_variance_weight 1   # a shield without a network (Eq. 7)
                python decoupled_dmd.py --no_dm --gan_weight 0.1           # a GAN for a shield
                python decoupled_dmd.py --no_dm --observer       # CA alone, and the fake looks on: what DM would have done (Sec. 4.2)
    one GPU     python decoupled_dmd.py --teacher Z-Image --prompts prompts.safetensors --mixed_precision bf16 --gradient_checkpointing
    one node    torchrun --nproc-per-node 8 decoupled_dmd.py (the same flags; --train_batch_size is per rank)
    many nodes  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 decoupled_dmd.py ...
    sampling    python decoupled_dmd.py --sample runs/decoupled_dmd-glyphs/student

Deviations, and why. The paper writes scores and its Algorithm 1 adds them to an image: they are x0 predictions, here too. It has no
normaliser, nor have the small teachers here; "branch", one for each term, which ports report the authors to use, is for released ones. The
fake is told which step made a sample, where the network has such an input: CA of different strength at different steps otherwise lets early
steps overshoot and late ones fall short, with a mixture that looks right (docs/decoupled_dmd.md; --shared_fake is the paper's). Noise levels
keep 2 % off both ends in the student's turn, as DMD2's do, and are spread evenly over a batch. EMA, momentum and falling rates are flags that
keep the default run short.
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
from models.diffusion import add_noise, expand, from_x0_eps, guide, predict_x0, predict_x0_eps, shift, step_grid
from models.gan import GanHead, discriminator_loss, gan_logit, generator_gan_loss
from models.toy import WORLDS, load_world

# ---- the method --------------------------------------------------------------------------------------------------


def noise_ranges(schedule, u_k, dm_range, ca_range):
    """Where u_DM and u_CA are drawn from when the student's input is at raw time u_k (Sec. 4.3).  -> (lo, hi) of DM, (lo, hi) of CA.

    The bound is set before the shift, as the authors do it: u <= u_k is "cleaner than the input", the paper's tau in [t, 1].
    "shared" draws once for both (DMD), "full" twice, "constrained" bounds both, "hybrid" (the proposal) only CA.
    At the first step u_k = 1 and all but "shared" are the same. A range wholly above u_k shrinks to that point.
    """
    below = lambda r: (min(r[0], u_k), min(r[1], u_k))  # noqa: E731
    return below(dm_range) if schedule == "constrained" else dm_range, below(ca_range) if schedule in ("constrained", "hybrid") else ca_range


@torch.no_grad()
def decoupled_gradients(x, x0_real, x0_fake, x0_cond, x0_uncond, guidance_scale, normalizer="none", x0_guided=None):
    """-Delta_DM and -Delta_CA (Eq. 6): the directions in x that the two terms are walked down against.  -> g_dm, g_ca (B, ...).

    x0_real, x0_fake: teacher (conditional) and fake at DM's noise level; x0_cond, x0_uncond: teacher at CA's. At one level with one noise
    their sum is DMD's gradient with a guided teacher, for any numbers. normalizer, per sample, as mean |x - something|:
    "none": the paper's; "branch": each term by the conditional x0 of its own level; "shared": both by x0_guided, the guided x0 at DM's
    level, which is DMD's Eq. 8. All (B, ...) -> without gradient.
    """
    g_dm, g_ca = x0_fake - x0_real, (guidance_scale - 1) * (x0_uncond - x0_cond)
    if normalizer == "none":
        return g_dm, g_ca
    by_dm, by_ca = (x0_real, x0_cond) if normalizer == "branch" else (x0_guided, x0_guided)
    error = lambda x0: expand((x - x0).abs().flatten(1).mean(1).clamp_min(1e-8), x)  # noqa: E731  (B, 1, ...)
    return g_dm / error(by_dm), g_ca / error(by_ca)


def distribution_matching_loss(x, g):
    """A loss whose gradient in x is g / numel(x); its value only says how large g is (Alg. 1, lambda = 1).  -> scalar."""
    return 0.5 * F.mse_loss(x, (x - g).detach())


def fake_score_loss(fake, schedule, kind, x, eps, t, cond):
    """Denoising loss of the fake score on detached student samples (Alg. 1; conditional, never guided, all noise levels), in the space
    the network predicts, which is the weighting its teacher was trained with.  x, eps (B, ...), t (B,) -> scalar."""
    x_t = add_noise(schedule, x, eps, t)
    target = from_x0_eps(kind, x, eps, schedule.alpha(t), schedule.sigma(t))
    return F.mse_loss(fake(x_t, t, **cond).float(), target)


def image_moments(x):
    """Variance and mean over all values of each image. Points have no inside: for x (B, 2) the batch is the image.  x (B, ...) -> (B,), (B,)."""
    return torch.var_mean(x.flatten(1) if x.dim() > 2 else x.flatten()[None], dim=1, correction=0)


def mean_variance_loss(x, mean, variance):
    """Mean over images of KL(N(m_i, v_i) || N(mean, variance)), m_i and v_i those of image i (Eq. 7): the shield without a network.
    x (B, ...); mean, variance floats -> scalar."""
    v, m = image_moments(x)  # (B,), (B,)
    v = v.clamp_min(1e-8)
    return (0.5 * ((v + (m - mean) ** 2) / variance - 1 - torch.log(v / variance))).mean()


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


def train(args):
    rank, world_size, device = start_ranks()
    main_rank, B = rank == 0, args.train_batch_size
    teacher, student, fake = io.load_networks(args, WORLDS, device)
    schedule, kind, shape = teacher.schedule, teacher.prediction, tuple(args.sample_shape or student.latent_shape)
    world = load_world(teacher.world_name) if teacher.world_name in WORLDS else None
    conditions = io.Conditions(args, student)
    times = step_grid(args.student_steps, teacher.shift)[:-1]  # the student's t_1 > ... > t_N, shifted
    use_dm, use_ca = not args.no_dm, not args.no_ca and args.guidance_scale != 1
    see_dm = use_dm or args.observer  # whether DM's gradient is computed
    needs_fake = see_dm or args.gan_weight > 0
    refuse_flags(args, use_ca, world)
    data = io.load_real_data(args, WORLDS, world, teacher, shape) if args.gan_weight else None
    if args.mean_variance_weight:
        mean, variance = args.mean_variance_target or world_moments(world)
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
    mean_over_ranks(0.0)  # nobody goes on before the folder is ready
    log = io.Log(args.output_dir, start) if main_rank else None
    if main_rank:
        terms = [n for n, on in (("DM", use_dm), ("CA", use_ca), ("mean-variance KL", args.mean_variance_weight), ("GAN", args.gan_weight)) if on]
        print(f"teacher {args.teacher}: {type(student).__name__}, {sum(p.numel() for p in student.parameters()):,} parameters, predicts {kind}, "
              f"{schedule.describe()}, shift {teacher.shift:g}, guidance {args.guidance_scale:g}; {device} x {world_size}\n"
              f"student: {args.student_steps} step(s) at t = {', '.join(f'{t:.4g}' for t in times)}, {args.renoise}; {' + '.join(terms)}, "
              f"noise levels {args.schedule}, normalizer {args.normalizer}; the fake is {'' if io.tells_step(args, student) else 'not '}told the step")

    def real_batch(draw, name):
        """Data rows with their own conditions.  -> x0 (B, ...), cond."""
        i = draw.integer(name, len(data[0]))
        return io.to_unit(data[0][i]).to(device), {k: v[i].to(device) for k, v in data[1].items()}

    def student_input(draw):
        """x_in, t and condition the student is trained at: one step k for all ranks, reached by the student's own rollout without
        gradient (Alg. 1's backward simulation).  -> k, x_in (B, ...), t (B,), cond, uncond, and what else the fake is told."""
        k = draw.agreed("k", args.student_steps)
        z = draw.normal("z", shape)
        t, told = z.new_full((B,), times[k]), {"steps": z.new_full((B,), float(k))} if io.tells_step(args, student) else {}
        cond, uncond = conditions.draw(draw, device)
        with torch.no_grad():
            x_in = rollout(student, schedule, kind, z, times[:k + 1], cond, args.renoise, lambda i: draw.normal(f"renoise{i}", shape))
        return k, x_in, t, cond, uncond, told

    began = time.time()
    lap, steps = io.Stopwatch(device), tqdm(range(start, args.max_train_steps), initial=start, total=args.max_train_steps, disable=not main_rank)
    for step in steps:
        warmup = min(1.0, (step + 1) / max(1, args.lr_warmup_steps))
        decay = min(1.0, (1 - step / args.max_train_steps) / max(args.lr_decay_share, 1e-9))
        for opt, lr in ((optimizer, args.learning_rate), (optimizer_fake, args.learning_rate_fake)):
            for group in opt.param_groups:
                group["lr"] = lr * warmup * decay
        lap.restart()
        sums = dict.fromkeys(("loss_dm_ca", "loss_mean_variance", "loss_fake", "loss_d", "loss_gan", "g_dm", "g_ca", "g_rest", "cos_dm_ca", "mean", "std"), 0.0)
        share = 1 / args.gradient_accumulation_steps

        # ---- fake score: R updates, each on fresh samples of the current student, and the discriminator with it
        for inner in range(args.fake_update_ratio if needs_fake else 0):
            fake_loss = 0.0
            for micro in range(args.gradient_accumulation_steps):
                row = (micro * world_size + rank) * B
                draw = io.Draws(args.seed, step, inner, range(row, row + B), device)
                t, eps = shift(draw.spread("u"), teacher.shift), draw.normal("eps", shape)  # all levels, whatever --schedule says
                lap("data")
                with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                    _, x_in, t_in, cond, _, told = student_input(draw)
                    with torch.no_grad():  # no gradient into the student here
                        x = predict_x0(student, schedule, kind, x_in, t_in, **cond)
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
            lap("data")
            with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                k, x_in, t_in, cond, uncond, told = student_input(draw)
                x = predict_x0(student, schedule, kind, x_in, t_in, **cond)  # the one call with gradient
                x.retain_grad()
                lap("student")
                range_dm, range_ca = noise_ranges(args.schedule, 1 - k / args.student_steps, args.dm_range, args.ca_range)
                t_dm, eps_dm = shift(draw.spread("u", *range_dm), teacher.shift), draw.normal("eps", shape)
                t_ca, eps_ca = t_dm, eps_dm  # "shared"
                if args.schedule != "shared":
                    t_ca, eps_ca = shift(draw.spread("u_ca", *range_ca), teacher.shift), draw.normal("eps_ca", shape)
                lap("data")
                with torch.no_grad():
                    x_dm, x_ca = add_noise(schedule, x, eps_dm, t_dm), add_noise(schedule, x, eps_ca, t_ca)
                    x0_real = x0_cond = x0_uncond = x0_guided = x  # a term that is off has a gradient of zero
                    need_real = see_dm or args.normalizer == "shared"
                    if need_real:
                        x0_real = x0_guided = predict_x0(teacher.net, schedule, kind, x_dm, t_dm, **cond)
                    if use_ca:
                        x0_cond = x0_real if need_real and args.schedule == "shared" else predict_x0(teacher.net, schedule, kind, x_ca, t_ca, **cond)
                        x0_uncond = predict_x0(teacher.net, schedule, kind, x_ca, t_ca, **uncond)
                    if args.normalizer == "shared" and args.guidance_scale != 1:  # DMD's Eq. 8; costs a further call where DM has a level of its own
                        x0_null = x0_uncond if use_ca and args.schedule == "shared" else predict_x0(teacher.net, schedule, kind, x_dm, t_dm, **uncond)
                        x0_guided = guide(x0_real, x0_null, args.guidance_scale)
                    lap("teacher")
                    x0_fake = predict_x0(fake, schedule, kind, x_dm, t_dm, **cond, **told) if see_dm else x0_real
                    lap("fake")
                    g_dm, g_ca = decoupled_gradients(x, x0_real, x0_fake, x0_cond, x0_uncond, args.guidance_scale, args.normalizer, x0_guided)
                    g = g_dm + g_ca if use_dm else g_ca
                loss_dm_ca = distribution_matching_loss(x, g)
                loss = loss_dm_ca
                if args.mean_variance_weight:
                    loss_mean_variance = mean_variance_loss(x, mean, variance)
                    loss = loss + args.mean_variance_weight * loss_mean_variance
                    sums["loss_mean_variance"] += loss_mean_variance.item() * share
                if args.gan_weight:
                    t_g, eps_g = shift(draw.spread("u_gan"), teacher.shift), draw.normal("eps_gan", shape)
                    loss_gan = generator_gan_loss(gan_logit(fake, head, schedule, x, eps_g, t_g, {**cond, **told}))
                    loss = loss + args.gan_weight * loss_gan
                    sums["loss_gan"] += loss_gan.item() * share
            (loss * share).backward()
            student_loss += loss.detach() * share
            n = g.numel() / share  # what a term sends into x is its gradient / n
            for name, value in (("loss_dm_ca", loss_dm_ca * share), ("g_dm", (g_dm / n).norm()), ("g_ca", (g_ca / n).norm()), ("g_rest", (x.grad - g / n).norm()),
                                ("cos_dm_ca", F.cosine_similarity(g_dm.flatten(1), g_ca.flatten(1)).mean() * share),
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
            log.write({"step": done, **sums, "norm_student": norm, "norm_fake": norm_fake if needs_fake else 0.0,
                       **lap.columns(), "peak_memory_mb": io.peak_memory_mb(device)})
            steps.set_postfix(fake=f"{sums['loss_fake']:.3f}", ca=f"{sums['g_ca']:.3f}", mean=f"{sums['mean']:.3f}", std=f"{sums['std']:.3f}", refresh=False)
        if main_rank and (done % args.checkpointing_steps == 0 or done == args.max_train_steps):
            sampler = student_sampler(args, ema, teacher, conditions, shape, times, device)
            report.save_samples(args.output_dir, [(f"student, step {done}", report.preview(args, world, conditions, sampler))], world)
            report.save_student(args, "decoupled_dmd", ema, teacher, times, shape)
            io.save_for_resume(args, done, modules, optimizers, spent_before + time.time() - began)
    if main_rank:
        if start >= args.max_train_steps:  # a finished run is written out again, perhaps to another folder
            report.save_student(args, "decoupled_dmd", ema, teacher, times, shape)
        sampler = student_sampler(args, ema.eval(), teacher, conditions, shape, times, device)
        report.finish(args, "decoupled_dmd", teacher, world, conditions, shape, times, {"student": (len(times), sampler)},
                      sum(p.numel() for p in ema.parameters()), spent_before + time.time() - began, device)
    mean_over_ranks(0.0)


def world_moments(world):
    """Eq. 7's targets where a world has data: mean over images of each image's mean and variance (paper, SDXL latents: .075, .81).  -> floats."""
    v, m = image_moments(world.data(2000, 776)[0])
    return m.mean().item(), v.mean().item()


def refuse_flags(args, use_ca, world):
    """Flags that do not go together.  Raises UserError."""
    last = 1 / args.student_steps  # raw time of the student's last step
    bounded = {"ca_range": use_ca and args.schedule in ("constrained", "hybrid"), "dm_range": (not args.no_dm or args.observer) and args.schedule == "constrained"}
    for flag, lo in (("ca_range", args.ca_range[0]), ("dm_range", args.dm_range[0])):
        if bounded[flag] and lo >= last:
            raise io.UserError(f"--{flag} starts at {lo:g}, and --schedule {args.schedule} keeps the last of {args.student_steps} steps below {last:g}: "
                               "use --schedule full, or a range that starts lower")
    if args.no_dm and not use_ca and not args.gan_weight:
        raise io.UserError("nothing is left to learn from: leave out --no_dm or --no_ca, give --guidance_scale above 1, or --gan_weight")
    if args.observer and not args.no_dm:
        raise io.UserError("--observer lets the fake look on where DM is off: give --no_dm with it, or leave it out")
    if args.data and not args.gan_weight:
        raise io.UserError("--data is for the GAN: set --gan_weight, or leave --data out")
    if args.gan_weight and not (args.data or world):
        raise io.UserError("--gan_weight needs data: give --data FOLDER or FILE.safetensors, or --gan_weight 0")
    if args.mean_variance_weight and not (args.mean_variance_target or world):
        raise io.UserError("--mean_variance_weight needs --mean_variance_target MEAN VARIANCE, the averages over real latents (paper, SDXL: 0.075 0.81)")


# ---- what the run leaves behind ------------------------------------------------------------------------------------


def student_sampler(args, student, teacher, conditions, shape, times, device):
    """-> a function (index, first, last) -> those student samples, of the conditions index[first:last]."""
    return lambda index, a, b: sample(student, teacher.schedule, teacher.prediction, report.evaluation_noise(args, shape, device, a, b), times,
                                      conditions.pick(index[a:b], device)[0], args.renoise,
                                      lambda i: report.evaluation_noise(args, shape, device, a, b, f"renoise{i}"))


def sample_only(args):
    """--sample FOLDER: load a saved student, read its sampler.json, write samples.png (GIF for videos) and latents to --output_dir."""
    _, _, device = start_ranks()
    net, sampler, teacher, world, conditions, shape = report.load_student(args, "decoupled_dmd", device)
    args.renoise = "sde" if sampler["rule"] == "renoise" else "ode"
    draw = student_sampler(args, net, teacher, conditions, shape, sampler["times"], device)
    report.write_samples(args, world, conditions, shape, draw, len(sampler["times"]), device)


# ---- flags ---------------------------------------------------------------------------------------------------------

# The flags' defaults suit small DiTs. What each kind of teacher changes of them; released models want far smaller rates.
GLYPHS = dict(timestep_shift=2.0)  # other small teachers: their own shift
RING = dict(max_train_steps=400, learning_rate=5e-4, learning_rate_fake=1e-3, fake_update_ratio=5, train_batch_size=256, ema_decay=0.95,
            adam_betas=[0.0, 0.99], lr_decay_share=0.7)
RELEASED = dict(max_train_steps=1000, train_batch_size=1, learning_rate=1e-6, learning_rate_fake=1e-5, fake_update_ratio=5, guidance_scale=4.0,
                ema_decay=0.0, adam_betas=[0.0, 0.99], weight_decay=0.01, lr_warmup_steps=0, lr_decay_share=0.0, student_steps=8, preview_samples=2, normalizer="branch")


def parse_args(argv=None):
    p = io.Parser(description="Distil a guided teacher into few steps, CFG augmentation and distribution matching apart (Decoupled DMD, 2511.22677). Defaults "
                  "shown are those of the given --teacher: glyphs, ring, other small networks of ours, or a released model.")
    io.add_run_flags(p)
    p.set_defaults(max_train_steps=600, learning_rate=8e-4, lr_warmup_steps=20, ema_decay=0.995, guidance_scale=3.0)
    p.add_argument("--teacher", default="glyphs", help="ring, glyphs, voxels, a component folder, a pipeline root with model_index.json, or a run folder of ours")
    p.add_argument("--student_init", default=None, metavar="FOLDER", help="start the student here instead of from the teacher")
    p.add_argument("--prompts", default=None, metavar="FILE", help="safetensors with cond.NAME (N, ...) and uncond.NAME (1, ...), for text teachers")
    p.add_argument("--data", default=None, help="real samples for the GAN: a world, an image folder, or FILE.safetensors (x0, cond.*); default: the world's")
    p.add_argument("--sample_shape", type=io.number(int, 1), nargs="+", default=None, help="C H W or C T H W of a sample (default: the network's)")
    p.add_argument("--student_steps", type=io.number(int, 1), default=4, help="N, network calls of the student (paper: 4; Z-Image-Turbo: 8)")
    p.add_argument("--schedule", choices=["shared", "full", "constrained", "hybrid"], default="hybrid", help="noise levels of DM and CA: one draw (DMD), two, both "
                   "below the student's input, or only CA below it (paper: hybrid)")
    p.add_argument("--normalizer", choices=["none", "shared", "branch"], default="none", help="gradients as they are (paper), over DMD's mean|x - guided x0|, "
                   "or each over its own mean|x - conditional x0| (as the authors are reported to)")
    p.add_argument("--no_ca", action="store_true", help="ablation: distribution matching alone")
    p.add_argument("--no_dm", action="store_true", help="ablation: CFG augmentation alone, or with one of the two regularisers below")
    p.add_argument("--observer", action="store_true", help="with --no_dm: train the fake all the same and log what DM would have done (paper, Sec. 4.2)")
    p.add_argument("--mean_variance_weight", type=io.number(float, 0), default=0.0, help="weight of Eq. 7's KL on each image's mean and variance (paper: not "
                   "stated); 0 = off")
    p.add_argument("--mean_variance_target", type=float, nargs=2, default=None, metavar=("MEAN", "VAR"), help="its targets (paper, SDXL latents: .075 .81; "
                   "default: measured on the world's data)")
    p.add_argument("--gan_weight", type=io.number(float, 0), default=0.0, help="student's GAN weight (paper: not stated; DMD2: 5e-3); 0 = off")
    p.add_argument("--gan_weight_d", type=io.number(float, 0), default=1e-2, help="discriminator's weight in the fake's loss (DMD2: 1e-2)")
    p.add_argument("--ca_range", type=io.number(float, 0, 1), nargs=2, default=None, metavar=("LO", "HI"), help="u ~ U[LO, HI] of CA, before the schedule's bound and "
                   "the shift (default: .02 .98; the paper's [0, .05] is .95 1 here)")
    p.add_argument("--dm_range", type=io.number(float, 0, 1), nargs=2, default=[0.02, 0.98], metavar=("LO", "HI"), help="the same of DM (paper: 0 1)")
    p.add_argument("--renoise", choices=["sde", "ode"], default="sde", help="between student steps: fresh noise (DMD2), or Euler (as Z-Image-Turbo samples)")
    p.add_argument("--shared_fake", action="store_true", help="do not tell the fake which step a sample comes from (paper)")
    p.add_argument("--learning_rate_fake", type=io.number(float, above=0), default=1.6e-3, help="AdamW learning rate of fake score and GAN head (paper: 5e-7, both)")
    p.add_argument("--lr_decay_share", type=io.number(float, 0, 1), default=1.0, help="last share of the run with both rates falling linearly to 0 "
                   "(paper: 0, constant)")
    p.add_argument("--fake_update_ratio", type=io.number(int, 1), default=2, help="R, fake updates per student update (paper: 5, DMD2's)")
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
    if args.schedule == "shared" and args.ca_range:
        p.error("argument --ca_range: --schedule shared draws one level for both terms, from --dm_range")
    args.ca_range = args.ca_range or (args.dm_range if args.schedule == "shared" else [0.02, 0.98])
    for flag, (lo, hi) in (("dm_range", args.dm_range), ("ca_range", args.ca_range)):
        if lo >= hi:
            p.error(f"argument --{flag}: LO must be below HI, got {lo} {hi}")
    if args.mean_variance_target and args.mean_variance_target[1] <= 0:
        p.error(f"argument --mean_variance_target: VAR must be > 0, got {args.mean_variance_target[1]}")
    if args.output_dir is None:
        args.output_dir = io.default_output_dir("decoupled_dmd", args.teacher, args.sample)
    return args


def main(argv=None):
    args = parse_args(argv)
    sample_only(args) if args.sample else train(args)


if __name__ == "__main__":
    io.run(main)
