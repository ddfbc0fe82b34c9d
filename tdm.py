"""TDM, trajectory distribution matching (arXiv 2503.06674 v2): one student that samples deterministically in K = 1, 2 or 4 steps.

The idea. Trajectory distillation (consistency models and kin) makes a student follow the teacher's ODE instance by instance, which is hard;
distribution matching (DMD) looks at the last sample only, and makes few-step students sample with fresh noise at every step. TDM matches
distributions along the student's own deterministic trajectory: wherever a step of the student lands, at level s, the samples there shall have
the teacher's distribution at level s. So noise the landing point x_s on, to a level tau between s and the level t the step came from, and move
x_s along the difference of teacher and fake score there. The sub-intervals (s, t) of the K steps are disjoint: each level tau belongs to one
step, and one fake score can serve all steps. With K told to student and fake, one network learns several step counts at once.

    paper                     here                    meaning                                                              shape
    t_K=T > ... > t_0 = 0     grid                    the student's levels, counted from the noise here: grid[0] = 1       K + 1 floats
    x_{t_{i+1}}               x_t                     input of one step, made by the steps before                          (B, ...)
    x-hat_{t_i} = f_theta     x0                      the clean prediction of that step                                    (B, ...)
    x_{t_i}                   x_s                     where the step lands: alpha_s x0 + sigma_s eps-hat, eps-hat from x_t (B, ...)
    x_tau                     x_tau = a x_s + b eps   noised on inside the step's own interval, a = alpha_tau / alpha_s    (B, ...)
    f_phi, f_psi              x0_real, x0_fake        teacher (guided) and fake, as x0, at x_tau                           (B, ...)
    K                         steps                   told to student and fake                                             (B,)

Launch.
    laptop      python tdm.py                                    # glyphs, K = 1, 2 and 4 in one student, under four minutes on two cores
                python tdm.py --teacher ring                     # seconds
                python tdm.py --student_steps 4                  # four steps only
    one GPU     python tdm.py --teacher PixArt-XL-2-512x512 --prompts prompts.safetensors --mixed_precision bf16
    one node    torchrun --nproc-per-node 8 tdm.py (the same flags; --train_batch_size is per rank)
    many nodes  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 tdm.py ...
    ablations   python tdm.py --untold                           # Tab. 5: K is told to nobody
                python tdm.py --loss l2                          # Tab. 5: no surrogate metric
                python tdm.py --fake_noise fresh                 # Tab. 5: no importance sampling
                python tdm.py --match clean                      # Tab. 7: match x0 instead of x_s
                python tdm.py --renoise sde                      # stochastic trajectory
    sampling    python tdm.py --sample runs/tdm-glyphs/student --student_steps 2

Deviations, and why. (K, step) are drawn for each sample of a batch; its rollout ends at its own step. Fake updates see fresh samples (the demo
reuses the student's). The scores' difference enters as that of their x0, and x0 is regressed, as in the demo; --regress x_s is the paper's. The
demo's importance weight is a tempered ratio and nearly 1; with it the fake is not the score of what it sees and only the last step is unbiased
(docs/tdm.md); --fake_target exact is. Levels are uniform before the teacher's shift. One step, the furthest from the teacher, has two turns. EMA,
momentum and falling rates are flags that keep the default run short.
"""
import copy
import datetime
import os
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from models import io, report
from models.diffusion import expand, from_x0_eps, guided_x0, noise_on, ode_step, predict_x0, predict_x0_eps, shift, step_grid, to_x0_eps, transition
from models.toy import WORLDS, load_world

# ---- the method --------------------------------------------------------------------------------------------------


def student_step(student, schedule, kind, x_t, t, s, cond, noise=None):
    """One step of the trajectory, t -> s: DDIM, which is Euler for flow. t, s (B,): rows may be at different steps.
    noise: stochastic instead, x_s = alpha_s x0 + sigma_s noise.  x_t (B, ...) -> x_s, x0 (B, ...)."""
    x0, eps = predict_x0_eps(student, schedule, kind, x_t, t, **cond)
    return ode_step(schedule, x0, eps if noise is None else noise, s), x0


def step_slope(schedule, t, s, renoise="ode"):
    """dx_s / dx0 of a step with x_t fixed, A = alpha_s - sigma_s alpha_t / sigma_t > 0 (flow: (t - s) / t); alpha_s with fresh noise.  (B,) -> (B,)."""
    return schedule.alpha(s) - (schedule.sigma(s) * schedule.alpha(t) / schedule.sigma(t) if renoise == "ode" else 0)


def importance_weight(schedule, x_tau, x0, eps, tau):
    """q(x_tau | x0) / q(x_tau | x_s), which lets a fake that is trained at noised-on x_s count as one trained at noised x0 (Sec. 4.1).

    As the demo has it: the densities of the noise, per dimension, without their normalisers: exp((mean eps^2 - mean eps_mix^2) / 2) where
    x_tau = alpha x0 + sigma eps_mix. 1 where s = 0.  (B, ...), tau (B,) -> (B,).
    """
    _, eps_mix = to_x0_eps(x0, "x0", x_tau, schedule.alpha(tau), schedule.sigma(tau))
    return torch.exp((eps.square().flatten(1).mean(1) - eps_mix.square().flatten(1).mean(1)) / 2)


def fake_score_loss(fake, schedule, kind, x_s, x0, eps, s, tau, cond, target="importance", weight="network", max_snr=5.0):
    """Loss of the fake score on detached student samples, at x_tau = a x_s + b eps.

    "importance" (Eq. 7 and the demo): denoise towards the student's own x0, weighted by importance_weight. Its optimum is E[x0 | x_tau],
    which is the score's only where s = 0. weight "network": in the space the network predicts, as its teacher was trained; "snr": in x0,
    times min(SNR, 5), the demo's. "exact": denoising score matching of the bridge, times (b / sigma_tau)^2 against its noise; the optimum is
    the score of x_tau at every step. weight "snr": of eps, |b / sigma_tau eps_psi - eps|^2.  x_s, x0, eps (B, ...), s, tau (B,) -> scalar.
    """
    x_tau, alpha, sigma = noise_on(schedule, x_s, eps, s, tau), schedule.alpha(tau), schedule.sigma(tau)
    prediction = fake(x_tau, tau, **cond).to(x_tau.dtype)
    x0_fake, eps_fake = to_x0_eps(prediction, kind, x_tau, alpha, sigma)
    if target == "exact":  # the pair (x0, eps) that stands for the score -eps / b of q(x_tau | x_s), both times r = b / sigma_tau <= 1
        r = expand(transition(schedule, s, tau)[1] / sigma, eps)
        if weight == "snr":
            return (r * eps_fake - eps).square().mean()
        alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
        r_x0 = r * x_s / expand(alpha_s, x_s) - expand(alpha * sigma_s**2 / (alpha_s**2 * sigma), eps) * eps
        return (r * prediction - from_x0_eps(kind, r_x0, eps, alpha, sigma)).square().mean()
    importance = importance_weight(schedule, x_tau, x0, eps, tau)  # (B,)
    if weight == "snr":
        return (importance * ((alpha / sigma) ** 2).clamp(max=max_snr) * (x0_fake - x0).square().flatten(1).mean(1)).mean()
    eps_mix = to_x0_eps(x0, "x0", x_tau, alpha, sigma)[1]
    return (importance * (prediction - from_x0_eps(kind, x0, eps_mix, alpha, sigma)).square().flatten(1).mean(1)).mean()


def trajectory_matching_loss(x0, x0_real, x0_fake, loss="pseudo_huber", slope=None):
    """Pulls x0 towards sg(x0) + x0_real - x0_fake, the sample corrected by the difference of the scores (Eq. 6 and 11).

    slope (B,): A = dx_s / dx0, to regress x_s as the paper prints it: x_s minus sg(x_s + A (x0_real - x0_fake)) is A times the same residual r, so
    steps that move x_s little weigh little. None: of x0, as the demo has it.
    "pseudo_huber" (Eq. 11): sqrt(|r|^2 + c^2) - c per sample, c = .00054 sqrt(d): a gradient of norm at most 1 (or A), whatever the level.
    "l2": r^2 / 2 (Tab. 5, without the surrogate). "demo": always of x0, sqrt(r^2 + 1e-6) - 1e-3 per element, over mean|x0 - x0_real|.
    x0, x0_real, x0_fake (B, ...) -> scalar; the gradient reaches x0 alone.
    """
    r = x0 - (x0 + (x0_real - x0_fake)).detach()  # exactly 0 where the two agree
    if loss == "demo":
        error = (x0 - x0_real).detach().abs().flatten(1).mean(1).clamp_min(1e-8)  # (B,)
        return (((r.square() + 1e-6).sqrt() - 1e-3) / expand(error, r)).mean()
    r = r if slope is None else expand(slope, r) * r
    if loss == "l2":
        return 0.5 * r.square().mean()
    c = 0.00054 * r[0].numel() ** 0.5
    return ((r.square().flatten(1).sum(1) + c**2).sqrt() - c).mean()


# ---- the sampler ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(student, schedule, kind, z, grid, cond, fresh=None):
    """len(grid) - 1 calls, no guidance, deterministic; fresh: index of the step -> noise, for the stochastic ablation.  z (B, ...) -> x0 (B, ...)."""
    x = z
    for i, (t, s) in enumerate(zip(grid[:-1], grid[1:])):
        x, _ = student_step(student, schedule, kind, x, z.new_full((len(z),), t), z.new_full((len(z),), s), cond, fresh(i) if fresh else None)
    return x


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


def tells_steps(args, net):
    """Whether student and fake, networks like net, are told K.  Raises UserError where several K need it and the network has no such input."""
    if len(set(args.student_steps)) == 1 or args.untold:
        return False
    if "steps_cond" not in net.config:
        raise io.UserError(f"--student_steps {' '.join(map(str, args.student_steps))}: a {type(net).__name__} has no input that could tell it their number: give "
                           "one, or --untold (a penalty in Tab. 5)")
    return True


def train(args):
    rank, world_size, device = start_ranks()
    main_rank, B, turns = rank == 0, args.train_batch_size, args.student_steps  # a count named twice has two turns
    teacher, student, fake = io.load_networks(args, WORLDS, device, lambda net: (tells_steps(args, net),) * 2)
    tells = tells_steps(args, teacher.base)
    schedule, kind, shape = teacher.schedule, teacher.prediction, tuple(args.sample_shape or teacher.base.latent_shape)
    world = load_world(teacher.world_name) if teacher.world_name in WORLDS else None
    conditions = io.Conditions(args, teacher.base)
    grids = {n: step_grid(n, teacher.shift) for n in turns}  # 1 = grid[0] > ... > grid[n] = 0
    io.try_network(teacher.base, conditions, shape, device)
    ema = copy.deepcopy(student).requires_grad_(False).eval() if args.ema_decay else student
    adam = dict(betas=tuple(args.adam_betas), weight_decay=args.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, **adam)
    optimizer_fake = torch.optim.AdamW(fake.parameters(), lr=args.learning_rate_fake, **adam)

    modules = {"student": student, "fake": fake, **({"ema": ema} if args.ema_decay else {})}
    optimizers = {"optimizer": optimizer, "optimizer_fake": optimizer_fake}
    start, spent_before = io.resume(args, modules, optimizers)
    if main_rank:
        io.prepare_output_dir(args.output_dir, args.resume_from_checkpoint)
    mean_over_ranks(0.0)  # nobody goes on before the folder is ready
    log = io.Log(args.output_dir, start) if main_rank else None
    if main_rank:
        print(f"teacher {args.teacher}: {type(student).__name__}, {sum(p.numel() for p in student.parameters()):,} parameters, predicts {kind}, "
              f"{schedule.describe()}, shift {teacher.shift:g}, guidance {args.guidance_scale:g}; {device} x {world_size}\n"
              f"student: {' or '.join(map(str, grids))} step(s){', told which' if tells else ''}, {args.renoise}; the longest at t = "
              + ", ".join(f"{t:.4g}" for t in grids[max(grids)][:-1]))

    def student_input(draw):
        """For every sample its K, one step of that trajectory, and that step's input, reached by the student's own steps without gradient.
        -> x_t (B, ...), t, s, lower and upper raw level of the step (B,), cond of student and fake, of teacher, uncond."""
        z, (cond, uncond) = draw.normal("z", shape), conditions.draw(draw, device)
        of = (torch.tensor(draw.rows, device=device) + draw.agreed("steps", len(turns))) % len(turns)  # whose turn it is, in rotation
        steps = torch.tensor(turns, device=device)[of]  # (B,)
        j = torch.minimum((draw.uniform("j") * steps).long(), steps - 1)  # which step, 0 = from noise
        told = {**cond, "steps": steps.float()} if tells else cond
        table = torch.tensor([grids[n] + [0.0] * (max(turns) - n) for n in turns], device=device)  # (turns, longest + 1)
        x_t = z.clone()
        with torch.no_grad():
            for i in range(int(j.max())):
                rows = j > i  # those not yet at their own step
                some = {k: v[rows] for k, v in told.items()}
                noise = draw.normal(f"renoise{i}", shape)[rows] if args.renoise == "sde" else None
                x_t[rows], _ = student_step(student, schedule, kind, x_t[rows], table[of[rows], i], table[of[rows], i + 1], some, noise)
        return x_t, table[of, j], table[of, j + 1], 1 - (j + 1) / steps, 1 - j / steps, told, cond, uncond

    def noise_level(draw, s, low, high):
        """tau, uniform in the raw interval of its step, or up to pure noise, 2 % of it kept off both ends, and at least s.  -> (B,)."""
        high = high if args.tau_range == "segment" else torch.ones_like(high)
        return torch.maximum(shift(low + (high - low) * draw.spread("u", 0.02, 0.98), teacher.shift), s)

    def landing(draw, x_t, t, s, told):
        """The student's step from x_t, and what is matched of it: x_s, or with --match clean its x0.  -> x_m (B, ...), its level (B,), x0."""
        noise = draw.normal("renoise", shape) if args.renoise == "sde" else None
        x_s, x0 = student_step(student, schedule, kind, x_t, t, s, told, noise)
        return (x0, torch.zeros_like(s), x0) if args.match == "clean" else (x_s, s, x0)

    began = time.time()
    lap, progress = io.Stopwatch(device), tqdm(range(start, args.max_train_steps), initial=start, total=args.max_train_steps, disable=not main_rank)
    for step in progress:
        warmup = min(1.0, (step + 1) / max(1, args.lr_warmup_steps))
        decay = min(1.0, (1 - step / args.max_train_steps) / max(args.lr_decay_share, 1e-9))
        for opt, lr in ((optimizer, args.learning_rate), (optimizer_fake, args.learning_rate_fake)):
            for group in opt.param_groups:
                group["lr"] = lr * warmup * decay
        lap.restart()
        sums = dict.fromkeys(("loss", "loss_fake", "g", "mean", "std"), 0.0)
        share = 1 / args.gradient_accumulation_steps

        # ---- fake score: R updates, each on fresh samples of the current student
        for inner in range(args.fake_update_ratio):
            fake_loss = 0.0
            for micro in range(args.gradient_accumulation_steps):
                row = (micro * world_size + rank) * B
                draw = io.Draws(args.seed, step, inner, range(row, row + B), device)
                lap("data")
                with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                    with torch.no_grad():  # no gradient into the student here
                        x_t, t, s, low, high, told, _, _ = student_input(draw)
                        x_m, level, x0 = landing(draw, x_t, t, s, told)
                    tau, eps = noise_level(draw, s, low, high), draw.normal("eps", shape)
                    if args.fake_noise == "fresh":  # ablation: noised x0, and used at noised-on x_s all the same
                        x_m, level = x0, torch.zeros_like(s)
                    lap("student")
                    loss = fake_score_loss(fake, schedule, kind, x_m, x0, eps, level, tau, told, args.fake_target, args.fake_weight)
                (loss * share).backward()
                fake_loss += loss.detach() * share
                sums["loss_fake"] += loss.item() * share / args.fake_update_ratio
            norm_fake = update([optimizer_fake], args.max_grad_norm, "fake-score", fake_loss)
            lap("fake")

        # ---- student: one update on its own samples; teacher and fake are constants
        student_loss = 0.0
        for micro in range(args.gradient_accumulation_steps):
            row = (micro * world_size + rank) * B
            draw = io.Draws(args.seed, step, "student", range(row, row + B), device)
            lap("data")
            with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                x_t, t, s, low, high, told, cond, uncond = student_input(draw)
                x_m, level, x0 = landing(draw, x_t, t, s, told)  # the one call with gradient
                tau, eps = noise_level(draw, s, low, high), draw.normal("eps", shape)
                lap("student")
                with torch.no_grad():
                    x_tau = noise_on(schedule, x_m, eps, level, tau)
                    x0_real = guided_x0(teacher.net, schedule, kind, x_tau, tau, cond, uncond, args.guidance_scale)
                    lap("teacher")
                    x0_fake = predict_x0(fake, schedule, kind, x_tau, tau, **told)
                    lap("fake")
                slope = step_slope(schedule, t, s, args.renoise) if args.regress == "x_s" and args.match == "noisy" else None
                loss = trajectory_matching_loss(x0, x0_real, x0_fake, args.loss, slope)
            (loss * share).backward()
            student_loss += loss.detach() * share
            for name, value in (("loss", loss * share), ("g", (x0_fake - x0_real).square().mean() * share),
                                ("mean", x0.mean() * share), ("std", x0.square().mean() * share)):  # g, std below
                sums[name] += value.item()
        norm = update([optimizer], args.max_grad_norm, "student", student_loss)
        if args.ema_decay:
            update_ema(ema, student, min(args.ema_decay, (1 + step) / (4 + step)))  # warm-up: a window of step / 3
        lap("student")

        done = step + 1
        sums = dict(zip(sums, mean_over_ranks(*sums.values())))
        sums["g"] **= 0.5
        sums["std"] = max(0.0, sums["std"] - sums["mean"] ** 2) ** 0.5  # of all ranks' samples together
        if main_rank:
            log.write({"step": done, **sums, "norm_student": norm, "norm_fake": norm_fake, **lap.columns(), "peak_memory_mb": io.peak_memory_mb(device)})
            progress.set_postfix(fake=f"{sums['loss_fake']:.3f}", loss=f"{sums['loss']:.3f}", std=f"{sums['std']:.3f}", refresh=False)
        if main_rank and (done % args.checkpointing_steps == 0 or done == args.max_train_steps):
            samplers = student_samplers(args, ema, teacher, conditions, shape, grids, tells, device)
            report.save_samples(args.output_dir, [(f"{n} step(s), update {done}", report.preview(args, world, conditions, f)) for n, f in samplers.items()], world)
            save_student(args, ema, teacher, grids, tells, shape)
            io.save_for_resume(args, done, modules, optimizers, spent_before + time.time() - began)
    if main_rank:
        if start >= args.max_train_steps:  # a finished run is written out again, perhaps to another folder
            save_student(args, ema, teacher, grids, tells, shape)
        samplers, longest = student_samplers(args, ema.eval(), teacher, conditions, shape, grids, tells, device), max(grids)
        students = {"student" if n == longest else f"student_{n}": (n, f) for n, f in samplers.items()}
        report.finish(args, "tdm", teacher, world, conditions, shape, grids[longest][:-1], students, sum(p.numel() for p in ema.parameters()),
                      spent_before + time.time() - began, device)
    mean_over_ranks(0.0)


# ---- what the run leaves behind ------------------------------------------------------------------------------------


def save_student(args, net, teacher, grids, tells, shape):
    """student/ as every script's; a student that is told K has that input in its config, and sampler.json has every K's grid."""
    report.save_student(args, "tdm", net, teacher, grids[max(grids)][:-1], shape, {"steps_cond": True} if tells else {},
                        grids={str(n): grid for n, grid in grids.items()}, told_steps=tells)


def student_samplers(args, student, teacher, conditions, shape, grids, tells, device):
    """-> {K: function (index, first, last) -> those student samples in K steps, of the conditions index[first:last]}."""
    def sampler(n):
        def draw(index, a, b):
            cond = conditions.pick(index[a:b], device)[0]
            if tells:
                cond["steps"] = torch.full((b - a,), float(n), device=device)
            fresh = (lambda i: report.evaluation_noise(args, shape, device, a, b, f"renoise{i}")) if args.renoise == "sde" else None
            return sample(student, teacher.schedule, teacher.prediction, report.evaluation_noise(args, shape, device, a, b), grids[n], cond, fresh)
        return draw
    return {n: sampler(n) for n in sorted(grids, reverse=True)}


def sample_only(args):
    """--sample FOLDER: load a saved student, read its sampler.json, write samples.png (GIF for videos) and latents to --output_dir. Its longest
    step count, or the one that --student_steps names."""
    _, _, device = start_ranks()
    net, sampler, teacher, world, conditions, shape = report.load_student(args, "tdm", device)
    grids = {int(n): grid for n, grid in sampler["grids"].items()}
    n = (args.student_steps or [max(grids)])[0]
    if n not in grids or len(args.student_steps or [n]) > 1:
        raise io.UserError(f"--student_steps {' '.join(map(str, args.student_steps))}: this student was trained for {', '.join(map(str, sorted(grids)))}: name one")
    args.renoise = "sde" if sampler["rule"] == "renoise" else "ode"
    draw = student_samplers(args, net, teacher, conditions, shape, {n: grids[n]}, sampler["told_steps"], device)[n]
    report.write_samples(args, world, conditions, shape, draw, n, device)


# ---- flags ---------------------------------------------------------------------------------------------------------

# The flags' defaults suit small DiTs. What each kind of teacher changes of them; released models have the paper's values for PixArt-alpha.
GLYPHS = dict(timestep_shift=2.0)  # other small teachers: their own shift
RING = dict(max_train_steps=600, learning_rate=5e-4, learning_rate_fake=1e-3, train_batch_size=256, ema_decay=0.95, adam_betas=[0.0, 0.99], lr_decay_share=0.7)
RELEASED = dict(max_train_steps=500, train_batch_size=1, learning_rate=2e-6, learning_rate_fake=2e-5, fake_update_ratio=1, guidance_scale=3.5,
                ema_decay=0.0, adam_betas=[0.0, 0.999], max_grad_norm=1.0, lr_warmup_steps=0, lr_decay_share=0.0, student_steps=[4], preview_samples=2)


def parse_args(argv=None):
    p = io.Parser(description="Distil a flow or diffusion teacher into a student of 1, 2 and 4 deterministic steps (TDM, 2503.06674). Defaults shown are those of "
                  "the given --teacher: glyphs, ring, other small networks of ours, or a released model.")
    io.add_run_flags(p)
    p.set_defaults(max_train_steps=900, learning_rate=1.2e-3, lr_warmup_steps=20, ema_decay=0.995)
    p.add_argument("--teacher", default="glyphs", help="ring, glyphs, a component folder, a pipeline root with model_index.json, or a run folder of ours")
    p.add_argument("--student_init", default=None, metavar="FOLDER", help="start the student here instead of from the teacher")
    p.add_argument("--prompts", default=None, metavar="FILE", help="safetensors with cond.NAME (N, ...) and uncond.NAME (1, ...), for text teachers")
    p.add_argument("--sample_shape", type=io.number(int, 1), nargs="+", default=None, help="C H W or C T H W of a sample (default: the network's)")
    p.add_argument("--student_steps", type=io.number(int, 1), nargs="+", default=[1, 1, 2, 4], help="K, the step counts of the student (paper: 4, or 1 2 4 in one); "
                   "they take turns over a batch, one that is named twice has two")
    p.add_argument("--untold", action="store_true", help="ablation: tell K neither to student nor to fake (Tab. 5)")
    p.add_argument("--tau_range", choices=["segment", "to_noise"], default="segment", help="noise levels of a step: its own interval (paper), or up to pure noise")
    p.add_argument("--match", choices=["noisy", "clean"], default="noisy", help="match x_s where the step lands (paper), or its x0 (Tab. 7)")
    p.add_argument("--fake_target", choices=["importance", "exact"], default="importance", help="fake score: the step's x0 with importance weights (paper), or "
                   "exact denoising of the bridge")
    p.add_argument("--fake_weight", choices=["network", "snr"], default="network", help="of the importance target: in the space the network predicts, or x0 times "
                   "min(SNR, 5) (demo)")
    p.add_argument("--fake_noise", choices=["bridge", "fresh"], default="bridge", help="what the fake sees: x_s noised on (paper), or x0 noised afresh (Tab. 5, without "
                   "importance sampling)")
    p.add_argument("--loss", choices=["pseudo_huber", "demo", "l2"], default="pseudo_huber", help="Eq. 11 per sample (paper), squares (Tab. 5), or per "
                   "element over DMD's normaliser (demo)")
    p.add_argument("--regress", choices=["x0", "x_s"], default="x0", help="what the loss moves: the step's x0 (demo), or x_s where it lands (paper), which "
                   "gives early steps less weight")
    p.add_argument("--renoise", choices=["ode", "sde"], default="ode", help="between student steps: the noise it implies (paper), or fresh noise")
    p.add_argument("--learning_rate_fake", type=io.number(float, above=0), default=1.6e-3, help="AdamW learning rate of the fake score (paper: 2e-5, ten times "
                   "the student's)")
    p.add_argument("--lr_decay_share", type=io.number(float, 0, 1), default=1.0, help="last share of the run with both rates falling linearly to 0 "
                   "(paper: 0, constant)")
    p.add_argument("--fake_update_ratio", type=io.number(int, 1), default=2, help="R, fake updates per student update (paper: 1)")
    p.add_argument("--adam_betas", type=io.number(float, 0, 0.99999), nargs=2, default=[0.8, 0.99], help="AdamW betas (paper: 0 .999)")
    p.add_argument("--weight_decay", type=io.number(float, 0), default=0.0, help="AdamW weight decay (paper: not stated; demo: .01)")
    p.add_argument("--teacher_steps", type=io.number(int, 0), default=32, help="Heun steps of the many-step teacher; 0 leaves it out")
    p.add_argument("--preview_samples", type=io.number(int, 1), default=20, help="columns of samples.png")
    p.add_argument("--remeasure_teacher", action="store_true", help="measure the many-step teacher again instead of copying its row")
    argv = sys.argv[1:] if argv is None else argv
    known = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    start = known.sample or known.teacher
    p.set_defaults(**(GLYPHS if start == "glyphs" else RING if start == "ring" else {} if io.is_small(start, WORLDS) else RELEASED))
    if known.sample:
        p.set_defaults(student_steps=None)  # the saved student's own
    args = p.parse_args(argv)
    if args.match == "clean" and args.fake_noise == "fresh":
        p.error("argument --fake_noise: with --match clean the fake sees x0 noised afresh in any case; leave it out")
    if args.output_dir is None:
        args.output_dir = io.default_output_dir("tdm", args.teacher, args.sample)
    return args


def main(argv=None):
    args = parse_args(argv)
    sample_only(args) if args.sample else train(args)


if __name__ == "__main__":
    io.run(main)
