"""MDT-dist, marginal-data transport distillation (arXiv 2509.04406 v1): few-step 3-D flows, dense voxels and TRELLIS's two stages.

The idea. Read the student's output at (x_t, t) as the average velocity of the teacher's ODE from t down to 0, so that one call lands on the data:
x_0 = x_t - t phi(x_t, t). The integral over the trajectory that would define phi is out of reach, but its derivative is not: along the trajectory
d(t phi)/dt = phi + t dphi/dt must equal the teacher's velocity. Velocity matching (VM) regresses phi onto v - t dphi/dt at noised data, the
derivative taken by a finite difference along the teacher's velocity. Velocity distillation (VD) also moves the student's one-step samples: where a
sample, noised to t, has u = phi + t dphi/dt different from the teacher's v, it is moved by that difference, as if u were the velocity of the
student's own distribution. Two networks in all: no critic, no GAN, no target network.

    paper                here                meaning                                                                          shape
    x_t = (1-t) x + t z  x_t, x0, z          flow path, t = 1 noise                                                           (B, ...) or (M, C)
    phi_theta            student(x_t, t)     average velocity from t down to 0                                                (B, ...)
    v_pre                v                   teacher's velocity, guided in training                                           (B, ...)
    dphi/dt              d                   total derivative along the teacher's trajectory, no gradient                     (B, ...)
    u_theta              phi + t d           velocity that the student implies                                                (B, ...)
    x', z', z''          x_fake, z1, z2      one-step sample from z', noised with z''                                         (B, ...)
    Delta t              dt                  step of the finite difference, .01 in the paper                                  float

Sparse samples (TRELLIS's second stage) are rows of one tensor (M, C) with coords (M, 4), place in the batch first; everything else is the same.

Launch.
    laptop      python mdt_dist.py                               # voxels, 1 and 2 steps, under five minutes on two cores
                python mdt_dist.py --arm vm                      # velocity matching alone
    one GPU     python mdt_dist.py --teacher TRELLIS-image-large/ckpts/ss_flow_img_dit_L_16l8_fp16 --data latents.safetensors --mixed_precision bf16
    one node    torchrun --nproc-per-node 8 mdt_dist.py (the same flags; --train_batch_size is per rank)
    many nodes  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 mdt_dist.py ...
    2nd stage   the same with ckpts/slat_flow_img_dit_L_64l8p2_fp16 and a --data file of coords, feats, offsets
    baselines   python mdt_dist.py --arm cm                      # consistency distillation; --arm scm: its continuous-time form; --arm vd
    ablations   python mdt_dist.py --d_norm 0.1                  # with the switch that the paper does not mention, as in the released code
                python mdt_dist.py --derivative jvp              # exact derivative instead of Eq. 14
    sampling    python mdt_dist.py --sample runs/mdt_dist-voxels/student --student_steps 1

Deviations, and why. The released code divides dphi/dt by its norm + .1 over a whole sample, which the paper does not say and which decides the result:
--d_norm, .1 for released models, none for small teachers, which move far in few updates (docs/mdt_dist.md). Guidance is uncond + scale (cond - uncond); the paper's w
of the form (1 + w) cond - w uncond is scale = 1 + w. VM and VD draw their own times and noises, as in Alg. 1 (the code shares them: --shared_noise).
sigma_min (1e-5) is 0. --renoise between steps, and the rms norm, are extras.
"""
import copy
import datetime
import os
import sys
import time
import types

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from models import io, report
from models.diffusion import Flow, expand, guide, logit_normal, shift, step_grid
from models.toy import WORLDS, load_world

# ---- the method --------------------------------------------------------------------------------------------------


def per_element(a, x, coords=None):
    """a (B,), one number a sample, viewed so that it broadcasts against x (B, ...), or for sparse x (M, C) taken at every point: (M, 1)."""
    return expand(a, x) if coords is None else a[coords[:, 0]][:, None]


def sample_norm(x, samples, coords=None):
    """Euclidean norm of every whole sample, and the number of its elements.  x (B, ...) or (M, C) -> (B,), (B,)."""
    if coords is None:
        return x.flatten(1).norm(dim=1), x.new_full((samples,), float(x[0].numel()))
    squares = torch.zeros(samples, device=x.device, dtype=x.dtype).index_add_(0, coords[:, 0], x.square().sum(1))
    return squares.sqrt(), coords[:, 0].bincount(minlength=samples).to(x) * x.shape[1]


def velocity(net, x_t, t, cond, uncond, guidance_scale):
    """The teacher's velocity under guidance: two calls, one when guidance is off.  x_t (B, ...), t (B,) -> (B, ...)."""
    v = net(x_t, t, **cond).to(x_t.dtype)
    return v if guidance_scale == 1 else guide(v, net(x_t, t, **uncond).to(x_t.dtype), guidance_scale)


@torch.no_grad()
def time_derivative(student, x_t, t, v, cond, dt, phi=None):
    """dphi/dt along the trajectory of velocity v: [phi(x_t, t) - phi(x_t - dt v, t - dt)] / dt (Eq. 14); dt None: exactly, by forward-mode
    differentiation. phi: the student's output at (x_t, t) if it is known. No gradient.  x_t, v (B, ...), t (B,) -> (B, ...)."""
    if dt is None:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
            return torch.func.jvp(lambda x, s: student(x, s, **cond).to(x.dtype), (x_t, t), (v, torch.ones_like(t)))[1]
    phi = student(x_t, t, **cond).to(x_t.dtype) if phi is None else phi.detach()
    return (phi - student(x_t - dt * v, t - dt, **cond).to(x_t.dtype)) / dt


def normalised(d, samples, coords=None, d_norm=0.1):
    """The code's d_norm, per sample: d / (|d| + .1), so that |t d| < 1 over the whole sample, whatever its size. "rms": over the root mean
    square + .1, the same for every size (ours). None: d (the paper).  (B, ...) -> (B, ...)."""
    if d_norm is None:
        return d
    norm, elements = sample_norm(d, samples, coords)
    if d_norm == "rms":
        norm, d_norm = norm / elements.sqrt(), 0.1
    return d / per_element(norm + d_norm, d, coords)


def velocity_matching_loss(phi, v, d, t, coords=None):
    """|phi - sg(v - t d)|^2, mean over elements (Eq. 13 with Alg. 1's stop-gradient).  phi, v, d (B, ...), t (B,), the length of the transport."""
    return (phi - (v - per_element(t, d, coords) * d).detach()).square().mean()


def velocity_distillation_loss(phi_z, residual, t, coords=None, weight="code"):
    """Gradient w r on the one-step sample's phi(z', 1), r = u - v at the noised sample, a constant (Eq. 15 to 17). Value: mean r^2, weighted.

    w = 2 ("code"), 1 - t ("paper", Eq. 17) or (1 - t)^2 / t ("kl", which the KL of Eq. 15 has).  phi_z, residual (B, ...), t (B,) -> scalar.
    """
    w = {"code": torch.full_like(t, 2.0), "paper": 1 - t, "kl": (1 - t) ** 2 / t}[weight]
    return (per_element(w / 2, residual, coords) * (residual.detach() + phi_z - phi_z.detach()).square()).mean()


def consistency_loss(x_t, phi, x_s, phi_s, t, s, edge, coords=None):
    """Consistency distillation with f = x - (t - edge) phi: |f(x_t, t) - sg f(x_s, s)|^2, x_s = x_t - (t - s) v a little further down the
    teacher's trajectory. Its gradient is t dt times velocity matching's, with the product rule's derivative.  All (B, ...), t, s, edge (B,)."""
    f_t = x_t - per_element(t - edge, phi, coords) * phi
    f_s = x_s - per_element(s - edge, phi_s, coords) * phi_s
    return (f_t - f_s.detach()).square().mean()


# ---- the sampler ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(student, z, grid, cond, uncond, guidance_scale=1.0, fresh=None):
    """Euler with the average velocity: x_s = x_t - (t - s) phi(x_t, t). fresh: index of the step -> noise, to which the clean prediction is noised
    instead (exact for the exact transport, where Euler inflates; not in the paper).  z (B, ...), the same for sparse -> x0."""
    x, coords = z, cond.get("coords")
    samples = len(z) if coords is None else int(coords[:, 0].max()) + 1
    for i, (t, s) in enumerate(zip(grid[:-1], grid[1:])):
        phi = velocity(student, x, z.new_full((samples,), t), cond, uncond, guidance_scale)
        x = x - (t - s) * phi if fresh is None or s == 0 else (1 - s) * (x - t * phi) + s * fresh(i)
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


def train(args):
    rank, world_size, device = start_ranks()
    main_rank, B = rank == 0, args.train_batch_size
    teacher = io.start_teacher(args, WORLDS)
    if not isinstance(teacher.schedule, Flow) or teacher.prediction != "flow_v":
        raise io.UserError(f"--teacher {args.teacher} predicts {teacher.prediction}; a flow's transport is distilled here: give one that predicts its velocity")
    sparse = getattr(teacher.base, "sparse", False)
    student = copy.deepcopy(io.load_student_init(args.student_init, teacher.base) if args.student_init else teacher.base)
    student.to(device).requires_grad_(True).train()
    student.gradient_checkpointing = args.gradient_checkpointing
    io.freeze_teacher(args, teacher, device)
    shape = tuple(args.sample_shape or teacher.base.latent_shape)
    world = load_world(teacher.world_name) if teacher.world_name in WORLDS else None
    data, data_cond = io.load_paired_data(args, WORLDS, world, teacher, shape, sparse)
    conditions = io.Conditions(args, teacher.base) if "label" in teacher.base.cond_names else io.DataConditions(data, data_cond)
    io.try_network(teacher.base, conditions, shape, device)
    ema = copy.deepcopy(student).requires_grad_(False).eval() if args.ema_decay else student
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, betas=tuple(args.adam_betas), weight_decay=args.weight_decay, fused=True)
    modules, optimizers = {"student": student, **({"ema": ema} if args.ema_decay else {})}, {"optimizer": optimizer}
    start, spent_before = io.resume(args, modules, optimizers)
    if main_rank:
        io.prepare_output_dir(args.output_dir, args.resume_from_checkpoint)
    mean_over_ranks(0.0)  # nobody goes on before the folder is ready
    log = io.Log(args.output_dir, start) if main_rank else None
    if main_rank:
        print(f"teacher {args.teacher}: {type(student).__name__}, {sum(p.numel() for p in student.parameters()):,} parameters, {len(data):,} samples of data; "
              f"{device} x {world_size}\nstudent: {args.arm}, d_norm {args.d_norm}, {args.derivative}, guidance {args.guidance_vm:g} and {args.guidance_vd:g}, "
              f"sampled in {' or '.join(map(str, args.student_steps))} step(s)")
    dt = args.dt if args.derivative == "difference" else None
    lowest = dt or 1e-3  # of t: the point below it must exist

    def time_of(draw, name):
        """t in [lowest, 1]: logit-normal with mean 1 and deviation 1 (code), or uniform (Alg. 1), before the shift.  (B,)."""
        u = draw.spread(name) if args.t_law == "uniform" else logit_normal(draw.normal(name, ()), 1.0, 1.0)
        return lowest + (1 - lowest) * shift(u, teacher.shift)

    def from_data(draw):
        """-> x0, one noise for each name, coords or None, cond, uncond."""
        index = draw.integer("data", len(data))
        x0 = data[index]
        x0, coords = (a.to(device) for a in x0) if sparse else (io.to_unit(x0).to(device), None)
        cond = {k: v[index].to(device) for k, v in data_cond.items()}
        uncond = {k: torch.full_like(v, teacher.base.num_classes) if k == "label" else torch.zeros_like(v) for k, v in cond.items()}
        at = {"coords": coords} if sparse else {}
        counts = coords[:, 0].bincount(minlength=B).tolist() if sparse else None
        noise = lambda name: draw.points(name, counts, x0.shape[1]) if sparse else draw.normal(name, tuple(x0.shape[1:]))  # noqa: E731
        return x0, noise, coords, {**cond, **at}, {**uncond, **at}

    def edge_of(s):
        """Lower end of the phase that s is in, of --phases equal ones: what the transport leads to.  (B,) -> (B,)."""
        return (s * args.phases).clamp(0, args.phases - 1e-6).floor() / args.phases

    def matching(x0, z, coords, t, cond, uncond, ramp):
        """--arm's loss at noised data.  -> loss, residual u - v (B, ...) for the log."""
        at = lambda a: per_element(a, x0, coords)  # noqa: E731
        x_t = (1 - at(t)) * x0 + at(t) * z
        with torch.no_grad():
            v = velocity(teacher.net, x_t, t, cond, uncond, args.guidance_vm)
        lap("teacher")
        phi = student(x_t, t, **cond).to(x_t.dtype)  # the call with gradient
        edge = edge_of(t - args.dt)  # of cm and vm; sCM has one phase
        if args.arm == "cm":
            x_s = x_t - args.dt * v
            with torch.no_grad():
                phi_s = student(x_s, t - args.dt, **cond).to(x_t.dtype)
            return consistency_loss(x_t, phi, x_s, phi_s, t, t - args.dt, edge, coords), phi.detach() - v
        d = time_derivative(student, x_t, t, v, cond, dt, phi)
        if args.arm == "scm":  # the tangent, its part with d warmed up, normalised as a whole (2410.11081)
            r = phi.detach() - v + ramp * at(t) * d
            return 0.5 * (phi - phi.detach() + normalised(r, B, coords, "rms")).square().mean(), r
        d = normalised(d, B, coords, args.d_norm)
        return velocity_matching_loss(phi, v, d, t - edge, coords), phi.detach() - v + at(t - edge) * d

    def distillation(z1, z2, coords, t, cond, uncond):
        """Velocity distillation at the student's own one-step samples.  -> loss, residual u - v."""
        one, at = torch.ones_like(t), lambda a: per_element(a, z1, coords)
        phi_z = student(z1, one, **cond).to(z1.dtype)  # the call with gradient
        x_fake = (z1 - phi_z).detach()
        with torch.no_grad():
            x_t = (1 - at(t)) * x_fake + at(t) * z2
            v = velocity(teacher.net, x_t, t, cond, uncond, args.guidance_vd)
            lap("teacher")
            phi = student(x_t, t, **cond).to(x_t.dtype)
            d = normalised(time_derivative(student, x_t, t, v, cond, dt, phi), B, coords, args.d_norm)
            residual = phi + at(t) * d - v
        return velocity_distillation_loss(phi_z, residual, t, coords, args.vd_weight), residual

    began = time.time()
    lap, progress = io.Stopwatch(device), tqdm(range(start, args.max_train_steps), initial=start, total=args.max_train_steps, disable=not main_rank)
    for step in progress:
        warmup = min(1.0, (step + 1) / max(1, args.lr_warmup_steps))
        decay = min(1.0, (1 - step / args.max_train_steps) / max(args.lr_decay_share, 1e-9))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warmup * decay
        lap.restart()
        sums, total, share = dict.fromkeys(("loss_vm", "loss_vd", "r_vm", "r_vd"), 0.0), 0.0, 1 / args.gradient_accumulation_steps
        for micro in range(args.gradient_accumulation_steps):
            row = (micro * world_size + rank) * B
            draw = io.Draws(args.seed, step, "student", range(row, row + B), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                x0, noise, coords, cond, uncond = from_data(draw)
                lap("data")
                t, z = time_of(draw, "t"), noise("z")
                loss, parts = 0.0, {}
                if args.arm != "vd":
                    parts["vm"] = matching(x0, z, coords, t, cond, uncond, min(1.0, step / max(1, args.tangent_warmup)))
                if args.arm in ("mdt", "vd"):
                    t2, z2 = (t, z) if args.shared_noise else (time_of(draw, "t2"), noise("z2"))
                    parts["vd"] = distillation(noise("z1"), z2, coords, t2, cond, uncond)
                for name, weight in (("vm", args.vm_weight), ("vd", args.vd_loss_weight)):
                    if name in parts:
                        loss = loss + weight * parts[name][0]
                        sums[f"loss_{name}"] += parts[name][0].item() * share
                        sums[f"r_{name}"] += parts[name][1].square().mean().item() * share
            (loss * share).backward()
            total += loss.detach() * share
        norm = update([optimizer], args.max_grad_norm, "student", total)
        if args.ema_decay:
            update_ema(ema, student, min(args.ema_decay, (1 + step) / (4 + step)))  # warm-up: a window of step / 3
        lap("student")

        done = step + 1
        sums = dict(zip(sums, mean_over_ranks(*sums.values())))
        for name in ("r_vm", "r_vd"):
            sums[name] **= 0.5
        if main_rank:
            log.write({"step": done, **sums, "norm_student": norm, **lap.columns(), "peak_memory_mb": io.peak_memory_mb(device)})
            progress.set_postfix(vm=f"{sums['loss_vm']:.4f}", vd=f"{sums['loss_vd']:.4f}", refresh=False)
        if main_rank and (done % args.checkpointing_steps == 0 or done == args.max_train_steps):
            samplers = student_samplers(args, ema, conditions, shape, teacher.shift, device)
            if not sparse:
                report.save_samples(args.output_dir, [(f"{n} step(s), update {done}", report.preview(args, world, conditions, f)) for n, f in samplers.items()], world)
            save_student(args, ema, teacher, shape)
            io.save_for_resume(args, done, modules, optimizers, spent_before + time.time() - began)
    if main_rank:
        if start >= args.max_train_steps:  # a finished run is written out again, perhaps to another folder
            save_student(args, ema, teacher, shape)
        finish(args, teacher, ema.eval(), world, conditions, shape, sparse, spent_before + time.time() - began, device)
    mean_over_ranks(0.0)


# ---- what the run leaves behind ------------------------------------------------------------------------------------


def save_student(args, net, teacher, shape):
    """student/ as every script's, with the grid of its longest step count."""
    report.save_student(args, "mdt_dist", net, teacher, step_grid(max(args.student_steps), teacher.shift)[:-1], shape, guidance_scale=args.student_guidance)


def student_samplers(args, net, conditions, shape, timestep_shift, device):
    """-> {steps: function (index, first, last) -> those student samples of the conditions index[first:last]}."""
    def sampler(n):
        grid = step_grid(n, timestep_shift)

        def draw(index, a, b):
            cond, uncond = conditions.pick(index[a:b], device)
            noise = lambda name: report.evaluation_noise(args, shape, device, a, b, name, cond.get("coords"))  # noqa: E731
            return sample(net, noise("z"), grid, cond, uncond, args.student_guidance, (lambda i: noise(f"renoise{i}")) if args.renoise == "sde" else None)
        return draw
    return {n: sampler(n) for n in sorted(set(args.student_steps), reverse=True)}


def finish(args, teacher, net, world, conditions, shape, sparse, seconds, device):
    """report.json and samples: the student's step counts, the teacher by Euler in the same and in --teacher_steps; paired_mse is the distance to the latter's
    sample from the same noise, which is the transport error (Eq. 10 at t = 1). Sparse samples are only written: no picture, no measures."""
    calls, params, longest = 1 if args.student_guidance == 1 else 2, sum(p.numel() for p in net.parameters()), max(args.student_steps)
    samplers = student_samplers(args, net, conditions, shape, teacher.shift, device)
    if sparse:
        save_points(args, conditions, samplers[longest])
        report.save_report(args.output_dir, args, "mdt_dist", args.teacher, params, seconds, device, [])
        return
    guided = 1 if args.guidance_scale == 1 else 2
    euler = {n: report.teacher_sampler(args, teacher, conditions, shape, device, step_grid(n, teacher.shift), "euler") for n in args.student_steps}
    students = {"student" if n == longest else f"student_{n}": (n * calls, f) for n, f in samplers.items()}
    students |= {f"teacher_{n}": (n * guided, f) for n, f in euler.items() if n != longest}
    extra = {}
    if world and args.teacher_steps:
        index, fine = conditions.preview(200), report.teacher_sampler(args, teacher, conditions, shape, device, None, "euler")
        ends = report.many(lambda a, b: fine(index, a, b), len(index))[0]
        for name, (_, f) in [*students.items(), ("teacher_same_steps", (0, euler[longest]))]:
            extra[name] = {"paired_mse": float((report.many(lambda a, b: f(index, a, b), len(index))[0] - ends).square().mean())}  # noqa: B023
    report.finish(args, "mdt_dist", teacher, world, conditions, shape, step_grid(longest, teacher.shift)[:-1], students, params, seconds, device, extra, "euler")


def save_points(args, conditions, sampler):
    """samples.safetensors: coords, feats, offsets as in --data, of its first --preview_samples rows."""
    index = conditions.preview(args.preview_samples)
    x = sampler(index, 0, len(index)).cpu()
    io.save_tensors(io.ragged(x, conditions.pick(index, "cpu")[0]["coords"]), os.path.join(args.output_dir, "samples.safetensors"))


def what_to_sample(args, net):
    """Conditions of --sample: classes, or for a network without them the rows of --data, with their points where it is sparse."""
    if "label" in net.cond_names:
        return io.Conditions(args, net)
    like, shape = types.SimpleNamespace(base=net, config=net.config), tuple(args.sample_shape or net.latent_shape)
    return io.DataConditions(*io.load_paired_data(args, WORLDS, None, like, shape, getattr(net, "sparse", False)))


def sample_only(args):
    """--sample FOLDER: load a saved student, read its sampler.json, write samples.png and latents to --output_dir, in --student_steps steps."""
    _, _, device = start_ranks()
    net, sampler, _, world, conditions, shape = report.load_student(args, "mdt_dist", device, what_to_sample)
    n = (args.student_steps or [len(sampler["times"])])[0]
    args.student_steps, args.student_guidance, args.renoise = [n], sampler["guidance_scale"], "sde" if sampler["rule"] == "renoise" else "ode"
    draw = student_samplers(args, net, conditions, shape, sampler["timestep_shift"], device)[n]
    if getattr(net, "sparse", False):
        os.makedirs(args.output_dir, exist_ok=True)
        save_points(args, conditions, draw)
    else:
        report.write_samples(args, world, conditions, shape, draw, n * (1 if args.student_guidance == 1 else 2), device)


# ---- flags ---------------------------------------------------------------------------------------------------------

# The flags' defaults suit the voxels teacher. What released models change of them: the paper's values, and those of its published configuration.
RELEASED = dict(max_train_steps=6000, train_batch_size=8, learning_rate=4e-8, d_norm=0.1, guidance_vm=41.0, guidance_vd=101.0, ema_decay=0.9999,
                adam_betas=[0.9, 0.999], max_grad_norm=1.0, lr_warmup_steps=0, lr_decay_share=0.0, student_guidance=6.0, guidance_scale=6.0,
                timestep_shift=1.0, preview_samples=4)


def norm_kind(text):
    """argparse type of --d_norm: none, rms or a constant."""
    return None if text == "none" else text if text == "rms" else io.number(float, above=0)(text)


def parse_args(argv=None):
    p = io.Parser(description="Distil a 3-D flow teacher into one that samples in one or two steps (MDT-dist, 2509.04406). Defaults shown are those of the given "
                  "--teacher: voxels and other small networks of ours, or a released model.")
    io.add_run_flags(p)
    p.set_defaults(max_train_steps=120, train_batch_size=32, learning_rate=1e-4, lr_warmup_steps=20, ema_decay=0.99, prompts=None)
    p.add_argument("--teacher", default="voxels", help="voxels or another world, a component folder or TRELLIS's DIR/NAME, or a run folder of ours")
    p.add_argument("--student_init", default=None, metavar="FOLDER", help="start the student here instead of from the teacher")
    p.add_argument("--data", default=None, help="x0 of velocity matching: a world, or FILE.safetensors (x0 or coords, feats, offsets; cond.*); default: "
                   "the world's")
    p.add_argument("--sample_shape", type=io.number(int, 1), nargs="+", default=None, help="C X Y Z of a sample (default: the network's)")
    p.add_argument("--student_steps", type=io.number(int, 1), nargs="+", default=[1, 2], help="step counts that are measured; training is the same (paper: 1 and 2)")
    p.add_argument("--arm", choices=["mdt", "vm", "vd", "cm", "scm"], default="mdt", help="velocity matching + distillation (paper), one of them, or the baselines "
                   "consistency distillation and its continuous-time form")
    p.add_argument("--d_norm", type=norm_kind, default="none", metavar="C|rms|none", help="derivative over its norm + C per sample (code: .1), over its root mean "
                   "square + .1, or none: as it is (paper)")
    p.add_argument("--derivative", choices=["difference", "jvp"], default="difference", help="of phi along the trajectory: Eq. 14, or exact")
    p.add_argument("--dt", type=io.number(float, 1e-5, 0.5), default=0.01, help="step of the difference, and of cm (paper: .01)")
    p.add_argument("--vd_weight", choices=["code", "paper", "kl"], default="code", help="2 (released code), 1 - t (Eq. 17), or (1 - t)^2 / t (the KL of Eq. 15)")
    p.add_argument("--vm_weight", type=io.number(float, 0), default=1.0, help="of velocity matching, or of the baseline, in the sum (paper: 1)")
    p.add_argument("--vd_loss_weight", type=io.number(float, 0), default=1.0, help="lambda of velocity distillation in the sum, Eq. 18 (paper: 1)")
    p.add_argument("--t_law", choices=["logit_normal", "uniform"], default="logit_normal", help="of t: sigmoid(1 + normal) (code), or uniform (Alg. 1)")
    p.add_argument("--shared_noise", action="store_true", help="both losses at the same t and noise (code) instead of fresh ones (Alg. 1)")
    p.add_argument("--guidance_vm", type=io.number(float, 0), default=1.0, help="teacher's guidance in velocity matching (paper: w = 40, here 41)")
    p.add_argument("--guidance_vd", type=io.number(float, 0), default=1.0, help="teacher's guidance in velocity distillation (paper: w = 100, here 101)")
    p.add_argument("--student_guidance", type=io.number(float, 0), default=1.0, help="guidance of the student's samples (TRELLIS: w = 5, here 6, two calls a step)")
    p.add_argument("--phases", type=io.number(int, 1), default=1, help="of vm and cm: the transport ends at the lower end of t's phase (multi-phase; paper: 1)")
    p.add_argument("--tangent_warmup", type=io.number(int, 0), default=100, help="of scm: updates over which the derivative's part grows to its weight")
    p.add_argument("--renoise", choices=["ode", "sde"], default="ode", help="between steps: Euler (paper), or the clean prediction noised afresh (ours)")
    p.add_argument("--lr_decay_share", type=io.number(float, 0, 1), default=0.5, help="last share of the run with the rate falling linearly to 0 (paper: 0, constant)")
    p.add_argument("--adam_betas", type=io.number(float, 0, 0.99999), nargs=2, default=[0.9, 0.99], help="AdamW betas (paper: torch's .9 .999)")
    p.add_argument("--weight_decay", type=io.number(float, 0), default=0.0, help="AdamW weight decay (paper: 0)")
    p.add_argument("--teacher_steps", type=io.number(int, 0), default=25, help="Euler steps of the many-step teacher; 0 leaves it out (paper: 25)")
    p.add_argument("--preview_samples", type=io.number(int, 1), default=20, help="columns of samples.png")
    p.add_argument("--remeasure_teacher", action="store_true", help="measure the many-step teacher again instead of copying its row")
    argv = sys.argv[1:] if argv is None else argv
    known = p.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    p.set_defaults(**({} if io.is_small(known.sample or known.teacher, WORLDS) else RELEASED))
    if known.sample:
        p.set_defaults(student_steps=None)  # the saved student's own
    args = p.parse_args(argv)
    if args.phases > 1 and args.arm not in ("vm", "cm"):
        p.error(f"argument --phases: {args.arm} leads from noise to data in one phase; more are for --arm vm and cm")
    if args.arm == "cm" and args.derivative == "jvp":
        p.error("argument --derivative: cm takes differences by definition; its continuous-time form is --arm scm")
    if args.output_dir is None:
        args.output_dir = io.default_output_dir("mdt_dist", args.teacher, args.sample)
    return args


def main(argv=None):
    args = parse_args(argv)
    sample_only(args) if args.sample else train(args)


if __name__ == "__main__":
    io.run(main)
