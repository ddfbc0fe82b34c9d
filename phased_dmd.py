"""Phased DMD (arXiv 2510.27684 v3): few-step students as experts, one per interval of noise, each trained where it works.

The idea. A student of N Euler steps trained by DMD is matched at its last sample x_0 only. Gradients through all N steps cost N times
the memory; cutting the rollout short at a random step ("stochastic gradient truncation", DMD2) makes every step a one-step generator
now and then, and diversity and motion fade. So split the noise levels into K phases and train one expert after another, from noise
to data: expert k takes the frozen experts' sample and carries it to the end of its phase, x_s with s = s_k > 0, a noisy sample, and is
matched there: x_s is noised on, from s to t, and teacher and fake score are compared at x_t. The fake must learn the score of x_t from
samples x_s that are no alpha x_0 + sigma eps of anything; regressing eps - x_s would be biased. Eq. 11's target is not: it is the
velocity that the *conditional* score of x_t given x_s stands for, and its mean given x_t is the right one.

    paper               here                  meaning                                                              shape
    t_0=1 > ... > t_N=0 times                 the student's steps (without the final 0), shifted                   N floats
    s_k                 s                     end of phase k; scores are taken on (s_k, 1)                         float
    G_k, phi_k          expert                the network that takes the steps of phase k                          -
    F_k, theta_k        fake                  score of what the experts make, started from the teacher each phase  -
    T                   teacher.net           frozen, guided                                                       -
    x_s                 x_s                   the student's sample at the end of the phase                         (B, ...)
    x_t                 x_t = a x_s + b eps   noised on; a = alpha_{t|s}, b = sigma_{t|s} (Eq. 2)                  (B, ...)
    w_{t|s}             --dmd_weight          weight of the matching gradient (Eq. 10)                             (B, 1, ...)

Launch.
    laptop      python phased_dmd.py                             # clips, 4 steps in 2 phases, under five minutes on two cores
                python phased_dmd.py --teacher ring              # seconds
                python phased_dmd.py --phases 4                  # one step per phase: best and longest (Table 6)
    baselines   python phased_dmd.py --phases 1                  # few-step DMD with stochastic gradient truncation (Fig. 1b)
                python phased_dmd.py --phases 1 --no_truncation  # vanilla few-step DMD, gradient through all steps (Fig. 1a)
                python phased_dmd.py --target naive              # the biased fake score target (Fig. 2c)
    one GPU     python phased_dmd.py --teacher Wan2.1-T2V-1.3B-Diffusers --prompts prompts.safetensors --mixed_precision bf16
    one node    torchrun --nproc-per-node 8 phased_dmd.py --teacher Wan2.2-T2V-A14B-Diffusers --prompts prompts.safetensors \
                    --mixed_precision bf16 --gradient_checkpointing --fake_lora_rank 64
    many nodes  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 phased_dmd.py ...
    sampling    python phased_dmd.py --sample runs/phased_dmd-clips/student

Deviations, and why. The default weight of the matching gradient is DMD's normalised one in x0 space (the authors' own trainer does that, and
Eq. 10's (1-t)^2 mutes the high noise that Sec. C.2 asks for); --dmd_weight paper is Eq. 10. Eq. 13's taper is left out where s = 0:
nothing is singular there (--taper all is the letter). A phase of several steps has one fake for all of them in the paper; ours is told
the step where the network has such an input, see docs/dmd.md (--shared_fake is the paper's). Noise levels keep 2 % off both ends of the
interval in the student's turn, and are spread evenly over a batch. EMA, momentum and falling rates are flags that keep the default run short.
"""
import copy
import datetime
import os
import sys
import time
import types

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from models import io, lora, report
from models.diffusion import add_noise, expand, from_x0_eps, guided_x0, noise_on, ode_step, predict_x0, predict_x0_eps, shift, step_grid, transition
from models.toy import WORLDS, energy_distance, load_world

# ---- the method --------------------------------------------------------------------------------------------------


def subinterval_target(kind, schedule, x_s, eps, s, t):
    """What the fake score regresses at x_t = a x_s + b eps, so that its optimum is the score of x_t (Eq. 11 for flow, Eq. 12 for x0).

    The conditional score -eps / b has the score of x_t as its mean given x_t. Written as noise it is sigma_t / b eps, as a clean sample
    x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 b) eps; any prediction is a combination of the two (for flow their difference, Eq. 11).
    s = 0 gives (x_0, eps), the usual targets. x_s, eps (B, ...), s < t (B,) -> (B, ...); kind as in models/diffusion.py.
    """
    alpha_s, sigma_s, alpha_t, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
    _, b = transition(schedule, s, t)  # (B,)
    y_eps = expand(sigma_t / b, x_s) * eps
    y_x0 = x_s / expand(alpha_s, x_s) - expand(alpha_t * sigma_s**2 / (alpha_s**2 * b), x_s) * eps
    return from_x0_eps(kind, y_x0, y_eps, alpha_t, sigma_t)


def naive_target(kind, schedule, x_s, eps, s, t):
    """The biased ablation (Fig. 2c): x_s taken for clean, eps - x_s for flow. Same arguments and shapes as subinterval_target."""
    return from_x0_eps(kind, x_s, eps, schedule.alpha(t), schedule.sigma(t))


def taper(schedule, s, t, high=10.0):
    """Eq. 13's weight: clamp(1 / b^2, 0, 10) |b F - b y|^2 = min(1, 10 b^2) |F - y|^2. y grows as 1 / b when t comes near s.  (B,)."""
    b2 = transition(schedule, s, t)[1] ** 2
    return (1 / b2).clamp(max=high) * b2


def fake_score_loss(fake, schedule, kind, x_s, eps, s, t, cond, target=subinterval_target, tapered=True):
    """Loss of the fake score on detached student samples x_s, noised on to t (Eq. 13; untapered and s = 0: Eq. 8).

    The target is noisy: at t = 1 its variance is 1 + s^2 / (1-s)^2 for flow and data of variance 1, and more nearer to s.
    x_s, eps (B, ...), s, t (B,) -> scalar.
    """
    x_t = noise_on(schedule, x_s, eps, s, t)
    error = (fake(x_t, t, **cond).float() - target(kind, schedule, x_s, eps, s, t)).square().flatten(1).mean(1)  # (B,)
    return (taper(schedule, s, t) * error).mean() if tapered else error.mean()


@torch.no_grad()
def distribution_matching_gradient(x0_student, x0_real, x0_fake, schedule, s, t, weight="normalized"):
    """Direction in x_s in which the KL of noised student and noised data grows (Eq. 10).

    "paper": a (s_fake - s_real) with a = alpha_{t|s} = dx_t/dx_s, once, and s_fake - s_real = alpha_t (x0_fake - x0_real) / sigma_t^2;
    for flow (1-t)^2 / (t (1-s)) (v_real - v_fake). "normalized": (x0_fake - x0_real) / mean|x0_student - x0_real| per sample, as DMD's
    Eq. 8, with the x0 that the student's own last call implies. Tensors (B, ...), s, t (B,) -> (B, ...), without gradient.
    """
    if weight == "paper":
        a, _ = transition(schedule, s, t)
        return expand(a * schedule.alpha(t) / schedule.sigma(t) ** 2, x0_real) * (x0_fake - x0_real)
    error = (x0_student - x0_real).abs().flatten(1).mean(1)  # (B,)
    return (x0_fake - x0_real) / expand(error.clamp_min(1e-8), x0_real)


def distribution_matching_loss(x_s, g):
    """A loss whose gradient in x_s is g / numel(x_s); its value only says how large g is.  -> scalar."""
    return 0.5 * F.mse_loss(x_s, (x_s - g).detach())


def phase_ends(student_steps, phases):
    """How many of the N steps are done at the end of each of K phases: 4, 2 -> [2, 4]; as even as can be.  -> K increasing ints."""
    return [round(student_steps * (k + 1) / phases) for k in range(phases)]


# ---- the sampler ---------------------------------------------------------------------------------------------------


def student_step(expert, schedule, kind, x_t, t, t_next, cond):
    """One Euler step x_t -> x_{t_next}, and the x0 that the expert implies. t, t_next floats; both (B, ...)."""
    x0, eps = predict_x0_eps(expert, schedule, kind, x_t, x_t.new_full((len(x_t),), t), **cond)
    return ode_step(schedule, x0, eps, x_t.new_full((len(x_t),), t_next)), x0


def rollout(experts, schedule, kind, x, times, cond):
    """Euler from times[0] to times[-1], the i-th of the len(times) - 1 steps by experts[i].  x (B, ...) -> (B, ...)."""
    for expert, t, t_next in zip(experts, times[:-1], times[1:]):
        x, _ = student_step(expert, schedule, kind, x, t, t_next, cond)
    return x


@torch.no_grad()
def sample(experts, schedule, kind, z, times, cond):
    """The few-step sampler: len(times) calls, each by the expert of its step, no guidance.  z (B, ...) -> x0 (B, ...)."""
    return rollout(experts, schedule, kind, z, times + [0.0], cond)


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


class Expert:
    """One network of the student (or the fake): a full copy, or an adapter of that name on the shared frozen base."""

    def __init__(self, net, adapter=None):
        self.net, self.adapter = net, adapter

    def __call__(self, x, t, **cond):
        return self.net(x, t, **cond, **({"adapter": self.adapter} if self.adapter else {}))

    def parameters(self):
        return lora.parameters(self.net, self.adapter) if self.adapter else list(self.net.parameters())

    def requires_grad_(self, on):
        for p in self.parameters():
            p.requires_grad_(on)

    def state_dict(self):
        return lora.state_dict(self.net, self.adapter) if self.adapter else self.net.state_dict()

    def load_state_dict(self, tensors):
        lora.load_state_dict(self.net, self.adapter, tensors) if self.adapter else self.net.load_state_dict(tensors)


def load_base(args, device):
    """-> teacher namespace; its .base is the network that experts and fakes are copies of, or adapters on."""
    teacher = io.start_teacher(args, WORLDS, two_networks=True)
    io.freeze_teacher(args, teacher, device)
    teacher.base.gradient_checkpointing = args.gradient_checkpointing
    return teacher


def network_at(teacher, times):
    """The base network that takes these steps: of two networks the one in charge of them all.  Raises UserError."""
    if not hasattr(teacher.base, "boundary"):
        return teacher.base
    sides = {t >= teacher.base.boundary for t in times}
    if len(sides) == 2:
        raise io.UserError(f"steps {', '.join(f'{t:.4g}' for t in times)} of one phase lie on both sides of the teacher's boundary {teacher.base.boundary:g}: "
                           "an expert starts from one of its two networks; use --timestep_shift 5 or more --phases")
    return teacher.base.high if sides == {True} else teacher.base.low


def trainable_copy(args, net, name, rank, told=False):
    """A full copy of net in float32 (of its bfloat16 weights, where it has those), or an adapter of that name on it.
    told: the copy also takes `steps`.  -> Expert."""
    if rank:
        torch.manual_seed(io.stable_hash(args.seed, name))
        lora.add(net, name, rank, args.lora_alpha)
        return Expert(net, name)
    new = copy.deepcopy(net).float()
    for adapter in lora.names(new):
        lora.remove(new, adapter)
    if told:
        new = io.told_steps(new)
    new.requires_grad_(True).gradient_checkpointing = args.gradient_checkpointing
    return Expert(new)


def tells_step(args, net, steps_in_phase):
    """Whether the fake, a network like net, is told which of a phase's steps was the last before its sample."""
    return steps_in_phase > 1 and not (args.no_truncation or args.shared_fake or args.fake_lora_rank) and "steps_cond" in net.config


def train(args):
    rank, world_size, device = start_ranks()
    main_rank, B = rank == 0, args.train_batch_size
    if args.phases > args.student_steps:
        raise io.UserError(f"--phases {args.phases}: every phase needs a step, and there are --student_steps {args.student_steps}")
    if args.max_train_steps < args.phases:
        raise io.UserError(f"--max_train_steps {args.max_train_steps} are shared out over --phases {args.phases}: give at least one step each")
    teacher = load_base(args, device)
    schedule, kind, shape = teacher.schedule, teacher.prediction, tuple(args.sample_shape or teacher.base.latent_shape)
    world = load_world(teacher.world_name) if teacher.world_name in WORLDS else None
    conditions = io.Conditions(args, teacher.base)
    grid, ends = step_grid(args.student_steps, teacher.shift), phase_ends(args.student_steps, args.phases)
    times, starts = grid[:-1], [0] + ends[:-1]  # phase k takes the steps starts[k] ... ends[k] - 1
    phase_of = [k for k in range(args.phases) for _ in range(starts[k], ends[k])]  # of each step
    bases = [network_at(teacher, times[a:b]) for a, b in zip(starts, ends)]  # what expert k starts from
    if hasattr(teacher.base, "boundary") and bases[-1] is teacher.base.high:
        raise io.UserError(f"all steps {', '.join(f'{t:.4g}' for t in times)} lie above the teacher's boundary {teacher.base.boundary:g}: its low-noise network "
                           "would have none; use more --student_steps or a smaller --timestep_shift")
    inits = bases
    if args.student_init:
        if args.lora_rank:
            raise io.UserError("--student_init starts full experts, not adapters: give --lora_rank 0 with it")
        if hasattr(teacher.base, "boundary"):
            raise io.UserError("--student_init is one network, and this teacher has two: leave it out")
        inits = [io.load_student_init(args.student_init, teacher.base).to(device)] * args.phases
    last_update = [round(args.max_train_steps * (k + 1) / args.phases) for k in range(args.phases)]  # of each phase
    io.try_network(teacher.base, conditions, shape, device)

    start, info, state = 0, {"phase": 0, "phase_start": 0, "seconds": 0.0}, io.find_state(args.output_dir, args.resume_from_checkpoint)
    if state:
        info, tensors = io.load_json(os.path.join(state, "state.json")), io.load_tensors(os.path.join(state, "state.safetensors"))
        io.check_same_flags(info, args)
        start = info["step"]
        for k in range(info["phase"] + 1, args.phases):
            if last_update[k] <= start:
                raise io.UserError(f"the checkpoint is at step {start} in phase {info['phase'] + 1}, and with --max_train_steps {args.max_train_steps} phase {k + 1} "
                                   f"would end at step {last_update[k]}, without an update: give more")
    if main_rank:
        io.prepare_output_dir(args.output_dir, args.resume_from_checkpoint)
    mean_over_ranks(0.0)  # nobody goes on before the folder is ready
    log = io.Log(args.output_dir, start) if main_rank else None
    if main_rank:
        parameters = sum(p.numel() for p in lora.base_state_dict(teacher.base).values())
        print(f"teacher {args.teacher}: {type(teacher.base).__name__}, {parameters:,} parameters, predicts {kind}, "
              f"{schedule.describe()}, shift {teacher.shift:g}, guidance {args.guidance_scale:g}; {device} x {world_size}\n"
              f"student: {args.student_steps} Euler step(s) at t = {', '.join(f'{t:.4g}' for t in times)}, "
              f"{args.phases} phase(s) ending at {', '.join(f'{grid[e]:.4g}' for e in ends)}; "
              + (f"experts are adapters of rank {args.lora_rank}" if args.lora_rank else "experts are full networks"))

    rates = args.learning_rate, args.learning_rate_fake
    began, spent_before = time.time(), info["seconds"]
    lap, steps = io.Stopwatch(device), tqdm(initial=start, total=args.max_train_steps, disable=not main_rank)
    experts = []  # one per phase, trained in this order; frozen once their phase is over
    for k in range(args.phases):
        # ---- start of phase k: a new expert and a new fake, both from the teacher; the experts before it are constants
        s, u_end, in_phase = grid[ends[k]], 1 - ends[k] / args.student_steps, ends[k] - starts[k]
        boundary = teacher.base.boundary if bases[k] is not teacher.base and bases[k] is teacher.base.high else 0.0
        expert = trainable_copy(args, inits[k], f"expert{k + 1}", args.lora_rank)
        if args.expert_init == "previous" and k and bases[k] is bases[k - 1]:
            expert.load_state_dict(experts[-1].state_dict())
        experts.append(expert)
        if state and k <= info["phase"]:
            io.unpack_module(expert, f"expert{k + 1}", tensors)
        if state and k < info["phase"]:
            expert.requires_grad_(False)
            continue
        fake_base = bases[k] if boundary else teacher.base  # all networks that are in charge somewhere on (s, 1)
        tells = tells_step(args, fake_base, in_phase)
        fake = trainable_copy(args, fake_base, f"fake{k + 1}", args.fake_lora_rank, tells)
        ema = expert
        if args.ema_decay:
            ema = trainable_copy(args, bases[k], f"ema{k + 1}", args.lora_rank)
            ema.load_state_dict(expert.state_dict())
            ema.requires_grad_(False)
        adam = dict(betas=tuple(args.adam_betas), weight_decay=args.weight_decay, fused=True)
        optimizer = torch.optim.AdamW(expert.parameters(), lr=args.learning_rate, **adam)
        optimizer_fake = torch.optim.AdamW(fake.parameters(), lr=args.learning_rate_fake, **adam)
        phase_start = max(start, last_update[k - 1]) if k else 0
        if state and k == info["phase"]:
            phase_start = info["phase_start"]
            io.unpack_module(fake, "fake", tensors)
            if args.ema_decay:
                io.unpack_module(ema, "ema", tensors)
            io.unpack_optimizer(optimizer, "optimizer", tensors), io.unpack_optimizer(optimizer_fake, "optimizer_fake", tensors)
        by_step = [experts[p] for p in phase_of[:ends[k]]]  # who takes each step so far

        def student_sample(draw, gradient):
            """The experts' sample at the end of phase k. With truncation a step j of the phase is drawn, the same on all ranks, and
            jumps from t_j to s; only this call has a gradient.  -> x_s, x0 of the last call (B, ...), cond, uncond, what the fake is told."""
            z, (cond, uncond) = draw.normal("z", shape), conditions.draw(draw, device)
            first = starts[k] if args.no_truncation else starts[k] + draw.agreed("k", in_phase)
            with torch.no_grad():
                x_t = rollout(by_step, schedule, kind, z, times[:first + 1], cond)
            with torch.set_grad_enabled(gradient):
                path = grid[first:ends[k]] if args.no_truncation else [grid[first]]  # the steps with gradient; the last ends at s
                x_t = rollout(by_step[first:], schedule, kind, x_t, path, cond)
                x_s, x0 = student_step(expert, schedule, kind, x_t, path[-1], s, cond)
            return x_s, x0, cond, uncond, {"steps": z.new_full((B,), float(first - starts[k]))} if tells else {}

        def noise_level(draw, low, high):
            """t in (s, 1): u uniform over that share [low, high] of the raw interval (u_end, 1), shifted, and clamped (not redrawn) to where
            a high-noise teacher is in charge.  -> (B,)."""
            t = shift(u_end + (1 - u_end) * draw.spread("u", low, high), teacher.shift)
            return t.clamp_min(boundary)

        def save(done):
            """Preview, student/ and state/. A function of its own, so that nothing here keeps the phase's networks alive."""
            so_far = experts[:k] + [ema]
            by_all = [so_far[p] if p <= k else Expert(inits[p]) for p in phase_of]  # not trained yet: where they start
            sampler = student_sampler(args, by_all, teacher, conditions, shape, times, device)
            report.save_samples(args.output_dir, [(f"student, step {done}", report.preview(args, world, conditions, sampler))], world)
            save_student(args, so_far, teacher, bases, grid, ends, shape)
            tensors = {**io.pack_module(fake, "fake"), **(io.pack_module(ema, "ema") if args.ema_decay else {}),
                       **io.pack_optimizer(optimizer, "optimizer"), **io.pack_optimizer(optimizer_fake, "optimizer_fake")}
            for i, e in enumerate(experts):
                tensors |= io.pack_module(e, f"expert{i + 1}")
            io.save_state(args.output_dir, done, tensors, {"flags": io.flags_to_save(args), "phase": k, "phase_start": phase_start,
                                                           "seconds": spent_before + time.time() - began})

        for step in range(max(start, phase_start), last_update[k]):
            warmup = min(1.0, (step - phase_start + 1) / max(1, args.lr_warmup_steps))
            decay = min(1.0, (last_update[k] - step) / (last_update[k] - phase_start) / max(args.lr_decay_share, 1e-9))
            optimizer.param_groups[0]["lr"], optimizer_fake.param_groups[0]["lr"] = (r * warmup * decay for r in rates)
            lap.restart()
            sums = dict.fromkeys(("loss_dm", "loss_fake", "g_dm", "mean", "std"), 0.0)
            share = 1 / args.gradient_accumulation_steps

            # ---- fake score: R updates, each on fresh samples of the experts
            for inner in range(args.fake_update_ratio):
                fake_loss = 0.0
                for micro in range(args.gradient_accumulation_steps):
                    row = (micro * world_size + rank) * B
                    draw = io.Draws(args.seed, step, inner, range(row, row + B), device)
                    t, eps = noise_level(draw, 1e-3 if s else 0.0, 1.0), draw.normal("eps", shape)
                    lap("data")
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                        x_s, _, cond, _, told = student_sample(draw, gradient=False)
                        lap("student")
                        loss = fake_score_loss(fake, schedule, kind, x_s, eps, torch.full_like(t, s), t, {**cond, **told},
                                               naive_target if args.target == "naive" else subinterval_target,
                                               args.taper == "all" or args.taper == "inner" and s > 0)
                    (loss * share).backward()
                    fake_loss += loss.detach() * share
                    sums["loss_fake"] += loss.item() * share / args.fake_update_ratio
                for p in fake.parameters():
                    if p.grad is None:  # of two networks one may have had no row here, and have had some on another rank
                        p.grad = torch.zeros_like(p)
                norm_fake = update([optimizer_fake], args.max_grad_norm, "fake-score", fake_loss)
                lap("fake")

            # ---- student: one update of expert k on its own samples; all other networks are constants
            student_loss = 0.0
            for micro in range(args.gradient_accumulation_steps):
                row = (micro * world_size + rank) * B
                draw = io.Draws(args.seed, step, "student", range(row, row + B), device)
                t, eps = noise_level(draw, *args.dm_range), draw.normal("eps", shape)
                lap("data")
                with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                    x_s, x0, cond, uncond, told = student_sample(draw, gradient=True)
                    lap("student")
                    with torch.no_grad():
                        x_t = noise_on(schedule, x_s, eps, torch.full_like(t, s), t)
                        x0_real = guided_x0(teacher.net, schedule, kind, x_t, t, cond, uncond, args.guidance_scale)
                        lap("teacher")
                        x0_fake = predict_x0(fake, schedule, kind, x_t, t, **cond, **told)
                        lap("fake")
                        g = distribution_matching_gradient(x0, x0_real, x0_fake, schedule, torch.full_like(t, s), t, args.dmd_weight)
                    loss = distribution_matching_loss(x_s, g)
                (loss * share).backward()
                student_loss += loss.detach() * share
                for name, value in (("loss_dm", loss * share), ("g_dm", (g / g.numel() * share).norm()), ("mean", x_s.mean() * share),
                                    ("std", x_s.square().mean() * share)):  # std below
                    sums[name] += value.item()
            norm = update([optimizer], args.max_grad_norm, "student", student_loss)
            if args.ema_decay:
                n = step - phase_start
                update_ema(ema, expert, min(args.ema_decay, (1 + n) / (4 + n)))  # warm-up: a window of n / 3
            lap("student")

            done = step + 1
            sums = dict(zip(sums, mean_over_ranks(*sums.values())))
            sums["std"] = max(0.0, sums["std"] - sums["mean"] ** 2) ** 0.5  # of all ranks' samples together
            steps.update()
            if main_rank:
                log.write({"step": done, "phase": k + 1, **sums, "norm_student": norm, "norm_fake": norm_fake,
                           **lap.columns(), "peak_memory_mb": io.peak_memory_mb(device)})
                steps.set_postfix(phase=k + 1, fake=f"{sums['loss_fake']:.3f}", dm=f"{sums['loss_dm']:.3f}", std=f"{sums['std']:.3f}", refresh=False)
            if main_rank and (done % args.checkpointing_steps == 0 or done == last_update[k]):
                save(done)
        # ---- end of phase k: its expert is frozen, as its average; fake and average are dropped
        if args.ema_decay:
            expert.load_state_dict(ema.state_dict())
        expert.requires_grad_(False)
        if fake.adapter:
            lora.remove(fake.net, fake.adapter)
        if ema is not expert and ema.adapter:
            lora.remove(ema.net, ema.adapter)
        fake = ema = optimizer = optimizer_fake = None
    steps.close()
    if main_rank:
        save_student(args, experts, teacher, bases, grid, ends, shape)
        by_all = [experts[p] for p in phase_of]
        sampler = student_sampler(args, by_all, teacher, conditions, shape, times, device)
        extra = {"student": {"marginals": marginals(args, by_all, teacher, world, conditions, shape, grid, device)}} if world else {}
        report.finish(args, "phased_dmd", teacher, world, conditions, shape, times, {"student": (len(times), sampler)},
                      sum(p.numel() for e in experts for p in e.parameters()), spent_before + time.time() - began, device, extra)
    mean_over_ranks(0.0)


# ---- what the run leaves behind ------------------------------------------------------------------------------------


def save_student(args, experts, teacher, bases, grid, ends, shape):
    """student/: expertK/ in the teacher's own config and layout, or expertK.safetensors as an adapter file; and sampler.json, which ties them
    to their step grid. Experts of later phases are not there yet."""
    folder, described = os.path.join(args.output_dir, "student"), []
    os.makedirs(folder, exist_ok=True)
    for k, end in enumerate(ends):
        name = f"expert{k + 1}" + (".safetensors" if args.lora_rank else "")
        side = None if bases[k] is teacher.base else "transformer" if bases[k] is teacher.base.high else "transformer_2"
        described.append({"weights": name, "steps": end - (ends[k - 1] if k else 0), "t": [grid[ends[k - 1] if k else 0], grid[end]], "network": side})
        if k >= len(experts):
            continue  # not trained yet
        if args.lora_rank:
            lora.save(experts[k].net, experts[k].adapter, os.path.join(folder, name),
                      {"method": "phased_dmd", "expert": f"{k + 1} of {len(ends)}", "times": " ".join(f"{t:.6g}" for t in grid)})
        else:
            io.save_network(experts[k].net, teacher.config if side != "transformer_2" else teacher.config_2, os.path.join(folder, name))
    io.save_json({"method": "phased_dmd", "prediction": teacher.prediction, "schedule": io.describe_schedule(teacher.schedule), "times": grid[:-1],
                  "timestep_shift": teacher.shift, "rule": "euler", "guidance_scale": 1.0, "sample_shape": list(shape),
                  "phase_ends": [grid[e] for e in ends], "experts": described, "lora_rank": args.lora_rank,
                  "base": args.teacher if args.teacher in WORLDS else os.path.abspath(args.teacher), "seed": args.seed},
                 os.path.join(folder, "sampler.json"))


def student_sampler(args, experts, teacher, conditions, shape, times, device):
    """-> a function (index, first, last) -> those student samples, of the conditions index[first:last]. experts: one per step."""
    return lambda index, a, b: sample(experts, teacher.schedule, teacher.prediction, report.evaluation_noise(args, shape, device, a, b), times,
                                      conditions.pick(index[a:b], device)[0])


@torch.no_grad()
def marginals(args, experts, teacher, world, conditions, shape, grid, device, n=1000):
    """How far the sampler's states are from the forward process: {t: energy distance of x_t to data noised to t}, coarse-grained to 4 cells an
    axis, for every step of the grid. For samples of the right law it is 0 on average."""
    def coarse(x):
        return {4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}[x.dim()](x, 4).flatten(1) if x.dim() > 2 else x

    index, out = conditions.preview(n), {}
    x = report.evaluation_noise(args, shape, device, 0, n)
    x0, _ = world.data(n, 779, index)
    for i, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        x, _ = report.many(lambda a, b: rollout(experts[i:i + 1], teacher.schedule, teacher.prediction, x[a:b].to(device), [t, t_next],
                                                conditions.pick(index[a:b], device)[0]), n)
        eps = io.Draws(args.seed, "marginals", i, range(n)).normal("eps", shape)
        level = torch.full((n,), t_next)
        out[f"{t_next:.4g}"] = energy_distance(coarse(x), coarse(add_noise(teacher.schedule, x0, eps, level)))
    return out


def load_student(args, device):
    """--sample -> the saved experts, one per step, their sampler.json, schedule and prediction, and the world's name.  Raises UserError."""
    folder, sampler, schedule, kind, timestep_shift = io.read_own_sampler(args.sample, "phased_dmd")
    times, described = sampler["times"], sampler["experts"]
    for flag, asked, has in (("student_steps", args.student_steps, len(times)), ("phases", args.phases, len(described)),
                             ("timestep_shift", args.timestep_shift, timestep_shift)):
        if asked is not None and asked != has:
            raise io.UserError(f"--{flag} {asked:g}: these experts were trained for {has:g}, on the steps {', '.join(f'{t:.4g}' for t in times)}, "
                               f"and know no others; leave --{flag} out")
    missing = [e["weights"] for e in described if not os.path.exists(os.path.join(folder, e["weights"]))]
    if missing:
        raise io.UserError(f"{folder} lacks {missing[0]}: its training ended before that phase; resume it")
    if args.teacher and not sampler["lora_rank"]:
        raise io.UserError(f"--teacher {args.teacher}: the experts of {folder} are full networks and need none; leave it out")
    if sampler["lora_rank"] and not args.teacher and sampler["base"] not in WORLDS and not os.path.isdir(sampler["base"]):
        raise io.UserError(f"the adapters of {folder} belong on {sampler['base']}, which is not there: name that teacher with --teacher")
    args.teacher = args.teacher or sampler["base"]
    experts = []
    if not sampler["lora_rank"]:
        for e in described:
            net, config = io.load_network(os.path.join(folder, e["weights"]))
            experts += [Expert(net.to(device))] * e["steps"]
        return experts, sampler, types.SimpleNamespace(schedule=schedule, prediction=kind), config.get("world")
    # the run's seed: it is that of the network that stands for a closed-form teacher
    teacher = load_base(types.SimpleNamespace(**{**vars(args), "seed": sampler["seed"]}), device)
    for k, e in enumerate(described):
        try:
            if (e["network"] is None) == hasattr(teacher.base, "boundary"):
                raise ValueError(f"{args.teacher} is no teacher of {'one network' if e['network'] is None else 'two networks'}")
            net = teacher.base if e["network"] is None else teacher.base.high if e["network"] == "transformer" else teacher.base.low
            lora.load(net, f"expert{k + 1}", os.path.join(folder, e["weights"]))
        except ValueError as error:
            raise io.UserError(f"{error}; the adapters belong on {sampler['base']}, name it with --teacher") from None
        experts += [Expert(net, f"expert{k + 1}")] * e["steps"]
    return experts, sampler, types.SimpleNamespace(schedule=schedule, prediction=kind), teacher.world_name


def sample_only(args):
    """--sample FOLDER: load the saved experts, read their sampler.json, write samples.png (GIF for videos) and latents to --output_dir."""
    _, _, device = start_ranks()
    io.refuse_output_dir(args.output_dir, sampling=True)
    experts, sampler, teacher, world_name = load_student(args, device)
    conditions, shape = io.Conditions(args, experts[0].net), tuple(args.sample_shape or sampler["sample_shape"])
    world = load_world(world_name) if world_name in WORLDS else None
    draw = student_sampler(args, experts, teacher, conditions, shape, sampler["times"], device)
    report.write_samples(args, world, conditions, shape, draw, len(experts), device)


# ---- flags ---------------------------------------------------------------------------------------------------------

# The flags' defaults suit small DiTs. What each kind of teacher changes of them; released models have the paper's values where it gives any.
CLIPS = dict(timestep_shift=2.0)  # other small teachers: their own shift
RING = dict(max_train_steps=600, learning_rate=5e-4, learning_rate_fake=1e-3, fake_update_ratio=5, train_batch_size=256, ema_decay=0.95,
            adam_betas=[0.0, 0.99], lr_decay_share=0.7, timestep_shift=3.0)
RELEASED = dict(max_train_steps=800, train_batch_size=1, learning_rate=5e-5, learning_rate_fake=4e-7, fake_update_ratio=5, guidance_scale=4.0,
                ema_decay=0.0, adam_betas=[0.0, 0.999], weight_decay=0.01, lr_warmup_steps=0, lr_decay_share=0.0, lora_rank=64, timestep_shift=5.0,
                preview_samples=2)


def is_small_student(folder):
    """Whether a saved student's experts are small networks of ours; a folder without a sampler.json is refused later."""
    path = os.path.join(folder, "sampler.json")
    base = io.load_json(path).get("base", "") if os.path.isfile(path) else ""
    return io.is_small(base if os.path.exists(base) or base in WORLDS else os.path.join(folder, "expert1"), WORLDS)


def parse_args(argv=None):
    p = io.Parser(description="Distil a flow or diffusion teacher into few steps, one expert per interval of noise (Phased DMD, 2510.27684). Defaults shown "
                  "are those of the given --teacher: clips, ring, other small networks of ours, or a released model.")
    io.add_run_flags(p)
    p.set_defaults(max_train_steps=500, train_batch_size=32, learning_rate=5e-4, lr_warmup_steps=20, ema_decay=0.99)
    p.add_argument("--teacher", default=None, help="clips, glyphs, voxels, ring, a component folder, a pipeline root with model_index.json (two networks as well: "
                   "Wan 2.2), or a run folder of ours")
    p.add_argument("--student_init", default=None, metavar="FOLDER", help="start the experts from this network instead of from the teacher")
    p.add_argument("--prompts", default=None, metavar="FILE", help="safetensors with cond.NAME (N, ...) and uncond.NAME (1, ...), for text teachers")
    p.add_argument("--sample_shape", type=io.number(int, 1), nargs="+", default=None, help="C H W or C T H W of a sample (default: the network's)")
    p.add_argument("--student_steps", type=io.number(int, 1), default=None, help="N, network calls of the student (paper: 4)")
    p.add_argument("--phases", type=io.number(int, 1), default=None, help="K, phases that share out the steps and --max_train_steps, one expert each "
                   "(paper: 2, and 4 in Table 6; 1 = few-step DMD)")
    p.add_argument("--no_truncation", action="store_true", help="take all steps of the phase, gradient through all (paper: off; with --phases 1: vanilla DMD)")
    p.add_argument("--target", choices=["subinterval", "naive"], default="subinterval", help="fake score target: Eq. 11 (paper), or the biased eps - x_s")
    p.add_argument("--taper", choices=["inner", "all", "none"], default="inner", help="Eq. 13's clamp: in phases with s > 0, in all (paper), or nowhere")
    p.add_argument("--dmd_weight", choices=["normalized", "paper"], default="normalized", help="weight of the matching gradient: DMD's in x0 space, or Eq. 10")
    p.add_argument("--dm_range", type=io.number(float, 0, 1), nargs=2, default=[0.02, 0.98], metavar=("LO", "HI"),
                   help="share of the raw interval (u of s, 1) that the matching gradient draws from (paper: not stated)")
    p.add_argument("--expert_init", choices=["teacher", "previous"], default="teacher", help="where an expert starts (paper: teacher), or at the "
                   "expert before it, if of the same network")
    p.add_argument("--shared_fake", action="store_true", help="do not tell the fake which step of the phase came last (paper)")
    p.add_argument("--lora_rank", type=io.number(int, 0), default=0, help="rank of the experts' adapters (paper: 64); 0 = full copies, which want a "
                   "far smaller learning rate")
    p.add_argument("--lora_alpha", type=io.number(float, above=0), default=8.0, help="alpha of all adapters, scale alpha / rank (paper: 8)")
    p.add_argument("--fake_lora_rank", type=io.number(int, 0), default=0, help="rank of the fake's adapter, to save memory; it is not told the step "
                   "and wants the adapters' learning rate; 0 = a full copy (paper)")
    p.add_argument("--learning_rate_fake", type=io.number(float, above=0), default=2e-3, help="AdamW learning rate of the fake score (paper: 4e-7)")
    p.add_argument("--lr_decay_share", type=io.number(float, 0, 1), default=1.0, help="last share of each phase with both rates falling linearly to 0 "
                   "(paper: not stated; 0 = constant)")
    p.add_argument("--fake_update_ratio", type=io.number(int, 1), default=2, help="R, fake updates per student update (paper: 5)")
    p.add_argument("--adam_betas", type=io.number(float, 0, 0.99999), nargs=2, default=[0.8, 0.99], help="AdamW betas (paper: 0 .999)")
    p.add_argument("--weight_decay", type=io.number(float, 0), default=0.0, help="AdamW weight decay (paper: not stated)")
    p.add_argument("--teacher_steps", type=io.number(int, 0), default=32, help="Heun steps of the many-step teacher; 0 leaves it out")
    p.add_argument("--preview_samples", type=io.number(int, 1), default=18, help="columns of samples.png")
    p.add_argument("--remeasure_teacher", action="store_true", help="measure the many-step teacher again instead of copying its row")
    argv = sys.argv[1:] if argv is None else argv
    known = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    if known.sample:  # steps, phases and teacher come from the student
        p.set_defaults(**({} if is_small_student(io.student_folder(known.sample)) else dict(train_batch_size=1, preview_samples=2)))
    else:
        p.set_defaults(teacher="clips", student_steps=4, phases=2)
        start = known.teacher or "clips"
        p.set_defaults(**(CLIPS if start == "clips" else RING if start == "ring" else {} if io.is_small(start, WORLDS) else RELEASED))
        if known.fake_lora_rank and not io.is_small(start, WORLDS):
            p.set_defaults(learning_rate_fake=RELEASED["learning_rate"])  # adapters move far less than full weights at one rate
    args = p.parse_args(argv)
    if args.dm_range[0] >= args.dm_range[1]:
        p.error(f"argument --dm_range: LO must be below HI, got {args.dm_range[0]} {args.dm_range[1]}")
    if args.output_dir is None:
        args.output_dir = io.default_output_dir("phased_dmd", args.teacher, args.sample)
    return args


def main(argv=None):
    args = parse_args(argv)
    sample_only(args) if args.sample else train(args)


if __name__ == "__main__":
    io.run(main)
