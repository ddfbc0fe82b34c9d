"""MDT-dist, marginal-data transport distillation (2509.04406 v1): 3-D flows in one or two steps.

The idea. Read the student's output phi(x_t, t) as the average velocity of the teacher's ODE from t
down to 0, so that one call lands on the data: x_0 = x_t - t phi(x_t, t). The integral that would
define phi is out of reach, but its derivative is not: along the teacher's trajectory, d(t phi)/dt =
phi + t dphi/dt must equal the teacher's velocity v. Velocity matching (VM) regresses phi onto
v - t dphi/dt at noised data; a finite difference along v gives the derivative. Velocity
distillation (VD) also trains the student on its own one-step samples: it noises a sample to t and
moves it by the difference between u = phi + t dphi/dt and v, as if u were the velocity of the
student's own distribution. There are two networks in all: no critic, no GAN, no target network.

    paper                 here            meaning                                         shape
    x_t = (1-t) x + t z   x_t, x0, z      the flow's path from data x to noise z, t = 1   (B, ...)
    phi_theta             student, phi    average velocity from t down to 0               (B, ...)
    v_pre                 teacher, v      the teacher's velocity, guided                  (B, ...)
    dphi/dt               d               derivative along the teacher's trajectory       (B, ...)
    u_theta - v_pre       residual, r     phi + t d - v                                   (B, ...)
    x', z', z''           x, z1, z2       the one-step sample of z', noised with z''      (B, ...)
    Delta t               dt              step of the finite difference                   float

A sparse batch (TRELLIS's second stage) has one row for each point, (M, C), and coords (M, 4) in
cond: the point's sample, x, y, z. Everything else is the same.

Launch.
    laptop      python mdt_dist.py              # voxels, a student for 1 and 2 steps, five minutes
    paper       python mdt_dist.py --t_law uniform --vd_weight paper --slow_clock 1000 \
                    --guidance_vd 1
    code        python mdt_dist.py --d_norm 0.1 --shared_noise --t_law logit_normal \
                    --slow_clock 1000 --guidance_vd 1                  # as released
    baselines   python mdt_dist.py --arm cm     # consistency distillation; scm: in continuous time
    torchrun    torchrun --nproc-per-node 8 mdt_dist.py --data latents.safetensors \
                    --teacher TRELLIS-image-large/ckpts/ss_flow_img_dit_L_16l8_fp16 \
                    --mixed_precision bf16 --gradient_accumulation_steps 4     # batch 256
    sampling    python mdt_dist.py --sample runs/mdt_dist-voxels/student --student_steps 1

Deviations; the reasons are in docs/mdt_dist.md. By default VD has weight 2, as in the released
code, and the voxels' student sees a slow clock (ours) and its teacher in VD at guidance 2; t is
uniform, and t and noise are drawn for each loss, as in Alg. 1. Released teachers get the code's
logit-normal t and its d_norm. Guidance scale = 1 + the paper's w. sigma_min is 0. Averaged
weights, betas and falling rates suit short runs. --slow_clock, --renoise sde, --d_norm rms and
--derivative jvp are ours.
"""

import os

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.diffusion import Flow, expand, guide, logit_normal, shift, sinusoid, step_grid, unshift
from models.files import UserError, save_json, save_tensors
from models.image_tokens import DINOV2
from models.networks import config_class
from models.networks.trellis import pipeline_entry
from models.plumbing import report
from models.plumbing.data import (
    Conditions,
    DataConditions,
    load_conditions,
    load_paired_data,
    load_places,
    ragged,
    to_unit,
    try_network,
)
from models.plumbing.dry_run import Network, Turn, dry_run
from models.plumbing.film import Film
from models.plumbing.flags import distillation_parser, number, paper_values, parse, refuse
from models.plumbing.releases import TRELLIS_SAMPLES
from models.plumbing.run import Run, run_main
from models.plumbing.teachers import average_of, freeze_teacher, new_student, start_teacher
from models.plumbing.work import work_done
from models.shards import own_rows, rows_in, whole_tensor
from models.trellis_data import is_trellis_set, open_trellis_set

# ---- the losses. x0, z (B, ...), or (M, C) with coords (M, 4) in cond; t (B,) in [dt, 1] ---------


def velocity_matching(
    student, teacher, x0, z, t, cond, uncond, guidance_scale, dt=0.01, d_norm=None, edge=0.0
):
    """Velocity matching at noised data (Eq. 13 and 14, Alg. 1).  -> scalar, residual u - v.

    The mean of |phi - sg(v - t dphi/dt)|^2 over all elements. Its gradient comes from phi(x_t, t)
    alone. Networks are called as net(x_t, t, **cond). d_norm and edge are not the paper's: see
    `normalised` and `edge_of`.
    """
    coords = cond.get("coords")
    x_t = add_noise(x0, z, t, coords)
    phi = student(x_t, t, **cond).to(x_t.dtype)  # the one call with gradient
    with torch.no_grad():
        v = velocity(teacher, x_t, t, cond, uncond, guidance_scale)
        d = time_derivative(student, x_t, t, v, cond, dt, phi)
        d = normalised(d, len(t), coords, d_norm)
        target = v - per_element(t - edge, d, coords) * d
    return (phi - target).square().mean(), phi.detach() - target


def velocity_distillation(
    student, teacher, z1, z2, t, cond, uncond, guidance_scale, dt=0.01, d_norm=None, weight="paper"
):
    """Velocity distillation at the student's samples (Eq. 15 to 17, Alg. 1).  -> scalar, residual.

    The residual r = u - v, at the one-step sample x = z1 - phi(z1, 1) noised to t with z2, is a
    constant. The loss is the mean of w r^2 / 2; its gradient in phi(z1, 1), the only one, is
    w r / numel, with w = 1 - t in the paper: see `distillation_weight`. d_norm: see `normalised`.
    """
    coords = cond.get("coords")
    phi_z = student(z1, torch.ones_like(t), **cond).to(z1.dtype)  # the one call with gradient
    with torch.no_grad():
        x = z1 - phi_z
        x_t = add_noise(x, z2, t, coords)
        v = velocity(teacher, x_t, t, cond, uncond, guidance_scale)
        with without_autocast(x_t):  # the derivative is a difference of these outputs
            phi = student(x_t, t, **cond).to(x_t.dtype)
            d = time_derivative(student, x_t, t, v, cond, dt, phi)
        d = normalised(d, len(t), coords, d_norm)
        residual = phi + per_element(t, d, coords) * d - v
        w = per_element(distillation_weight(t, weight), residual, coords)
    return (w / 2 * (residual + phi_z - phi_z.detach()).square()).mean(), residual


@torch.no_grad()
def time_derivative(student, x_t, t, v, cond, dt, phi=None):
    """dphi/dt along the trajectory of velocity v: a backward difference (Eq. 14).  -> (B, ...).

    [phi(x_t, t) - phi(x_t - dt v, t - dt)] / dt, without gradient and in float32: the rounding of
    bfloat16 divided by dt is as large as the derivative. phi: the student's output at (x_t, t),
    where it is known; under autocast it is computed again. dt None: the exact derivative instead.
    """
    if torch.is_autocast_enabled(x_t.device.type):
        phi = None
    with without_autocast(x_t):
        if dt is None:
            return exact_derivative(student, x_t, t, v, cond)
        phi = student(x_t, t, **cond).to(x_t.dtype) if phi is None else phi.detach()
        return (phi - student(x_t - dt * v, t - dt, **cond).to(x_t.dtype)) / dt


def without_autocast(x):
    """A context without autocast on x's device: networks compute in the dtype of their weights."""
    return torch.autocast(x.device.type, enabled=False)


def velocity(net, x_t, t, cond, uncond, guidance_scale):
    """A network's velocity under guidance: two calls, one when guidance is off.  -> (B, ...)."""
    v = net(x_t, t, **cond).to(x_t.dtype)
    if guidance_scale == 1:
        return v
    return guide(v, net(x_t, t, **uncond).to(x_t.dtype), guidance_scale)


def add_noise(x0, z, t, coords=None):
    """x_t = (1 - t) x0 + t z, with one t for each sample.  x0, z (B, ...) or (M, C), t (B,)."""
    t = per_element(t, x0, coords)
    return (1 - t) * x0 + t * z


def per_element(a, x, coords=None):
    """One number for each sample, viewed so that it broadcasts against the samples' elements.

    a (B,) -> (B, 1, ...) for x (B, ...); (M, 1) for points x (M, C) with coords (M, 4).
    """
    return expand(a, x) if coords is None else a[coords[:, 0]][:, None]


# ---- variants of the two losses: the released code's and ours ------------------------------------


def normalised(d, samples, coords=None, d_norm=0.1):
    """The derivative divided by its norm + d_norm, sample by sample.  d (B, ...) or (M, C).

    The released code does this with d_norm = .1, so that |t d| < 1 over the whole sample, whatever
    its size. None: d as it is (the paper). "rms": over the root mean square + .1, which does not
    depend on the size (ours).
    """
    if d_norm is None:
        return d
    norm, elements = sample_norm(d, samples, coords)
    if d_norm == "rms":
        norm, d_norm = norm / elements.sqrt(), 0.1
    return d / per_element(norm + d_norm, d, coords)


def sample_norm(x, samples, coords=None):
    """Euclidean norm of each whole sample, and the number of its elements.

    x (B, ...), or (M, C) with coords (M, 4); samples: B.  -> (B,), (B,).
    """
    if coords is None:
        return x.flatten(1).norm(dim=1), x.new_full((samples,), float(x[0].numel()))
    place, zeros = coords[:, 0], x.new_zeros(samples)
    squares = zeros.index_add(0, place, x.square().sum(1))
    return squares.sqrt(), zeros.index_add(0, place, x.new_full((len(x),), float(x.shape[1])))


def distillation_weight(t, kind):
    """w(t) of velocity distillation.  t (B,) -> (B,).

    "paper": 1 - t (Eq. 17). "code": 2, as released. "kl": (1 - t)^2 / t, that of the KL divergence
    in Eq. 15.
    """
    return {"paper": 1 - t, "code": torch.full_like(t, 2.0), "kl": (1 - t) ** 2 / t}[kind]


@torch.no_grad()
def exact_derivative(student, x_t, t, v, cond):
    """dphi/dt along v by forward-mode differentiation, the limit of Eq. 14.  -> (B, ...)."""

    def phi(x, s):
        return student(x, s, **cond).to(x.dtype)

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
        return torch.func.jvp(phi, (x_t, t), (v, torch.ones_like(t)))[1]


def edge_of(s, phases, timestep_shift=1.0):
    """Lower end of the phase that s is in; 0 with one.  s (B,) -> (B,).

    The phases are the steps of a sampler of as many: equal in raw time. In multi-phase distillation
    the transport from t leads to this edge instead of to the data, and only that sampler applies.
    """
    u = unshift(s, timestep_shift)
    return shift((u * phases).clamp(0, phases - 1e-6).floor() / phases, timestep_shift)


def slow_clock(student, t_scale, seed, updates=1500):
    """Let the student see t_scale t where its teacher sees 1000 t. Call it before training.

    Within Delta t = .01 the sinusoids of 1000 t turn by 10 radians, and Eq. 14's difference is
    mostly theirs. So the two layers that embed t, which a DiT calls `time`, are trained by Adam to
    give for slow sinusoids what they gave for fast ones. They depend on t alone: no network is
    called, and the student stays the function that it was within a few per cent of its velocity.
    Not in the paper; sCM (2410.11081) changes its teacher in a similar way.
    """
    old = [whole_tensor(p).cpu() for p in student.time.parameters()]
    new = [p.clone().requires_grad_() for p in old]
    adam, draw = torch.optim.Adam(new), torch.Generator().manual_seed(seed)

    def embedding(layers, t, scale):  # t (256,) -> (256, cond_dim)
        h = F.linear(sinusoid(t * (scale / 1000), layers[0].shape[1]), *layers[:2])
        return F.linear(F.silu(h), *layers[2:])

    for i in range(updates):
        t = (torch.arange(256) + torch.rand(256, generator=draw)) / 256
        error = embedding(new, t, t_scale) - embedding(old, t, student.t_scale)
        adam.param_groups[0]["lr"] = 2e-3 * (1 - i / updates)
        adam.zero_grad()
        error.square().mean().backward()
        adam.step()
    for p, value in zip(student.time.parameters(), new, strict=True):
        own_rows(p).copy_(rows_in(p, value.detach()))
    student.t_scale = student.config["t_scale"] = t_scale


# ---- the paper's baselines -----------------------------------------------------------------------


def consistency_distillation(
    student, teacher, x0, z, t, cond, uncond, guidance_scale, dt=0.01, edge=0.0
):
    """Consistency distillation (2303.01469) with f = x_t - (t - edge) phi.  -> scalar, phi - v.

    The mean of |f(x_t, t) - sg f(x_s, s)|^2, where x_s = x_t - dt v at s = t - dt is a little
    further down the teacher's trajectory. Its gradient is (t - edge) dt times that of velocity
    matching, if the latter's difference is the product rule's.
    """
    coords, s = cond.get("coords"), t - dt
    x_t = add_noise(x0, z, t, coords)
    phi = student(x_t, t, **cond).to(x_t.dtype)  # the one call with gradient
    with torch.no_grad():
        v = velocity(teacher, x_t, t, cond, uncond, guidance_scale)
        x_s = x_t - dt * v
        phi_s = student(x_s, s, **cond).to(x_t.dtype)
        f_s = x_s - per_element(s - edge, phi_s, coords) * phi_s
    f_t = x_t - per_element(t - edge, phi, coords) * phi
    return (f_t - f_s).square().mean(), phi.detach() - v


def continuous_consistency(
    student, teacher, x0, z, t, cond, uncond, guidance_scale, dt=None, ramp=1.0
):
    """sCM (2410.11081), consistency distillation in continuous time.  -> scalar, tangent.

    The tangent phi - v + ramp t dphi/dt, a constant, is divided by its root mean square + .1; the
    gradient in phi is what remains. ramp: grows from 0 to 1 early in training. dt: see
    `time_derivative`.
    """
    coords = cond.get("coords")
    x_t = add_noise(x0, z, t, coords)
    phi = student(x_t, t, **cond).to(x_t.dtype)  # the one call with gradient
    with torch.no_grad():
        v = velocity(teacher, x_t, t, cond, uncond, guidance_scale)
        d = time_derivative(student, x_t, t, v, cond, dt, phi)
        tangent = phi - v + ramp * per_element(t, d, coords) * d
        g = normalised(tangent, len(t), coords, "rms")
    return 0.5 * (phi - phi.detach() + g).square().mean(), tangent


# ---- the sampler ---------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    student, noise, times, cond, uncond, guidance_scale=1.0, renoise="ode", guided=(0.0, 1.0)
):
    """The few-step sampler, from noise("z") at times[0] = 1: Euler with the average velocity.

    A step from t to s is x_s = x_t - (t - s) phi(x_t, t); the last one leads to 0. renoise "sde":
    x_s is the predicted sample noised afresh with noise("renoise<i>") instead (not in the paper).
    guided: the lowest and highest t with guidance; there a step takes two calls, elsewhere one.
    noise: name -> (B, ...) or (M, C).  -> x0. The ODE of a teacher is sampled like this too.
    """
    x, coords = noise("z"), cond.get("coords")
    samples = len(x) if coords is None else int(coords[:, 0].max()) + 1
    for i, (t, s) in enumerate(zip(times, [*times[1:], 0.0])):
        scale = guidance_scale if is_guided(t, guided) else 1
        phi = velocity(student, x, x.new_full((samples,), t), cond, uncond, scale)
        if renoise == "sde" and s > 0:
            x = (1 - s) * (x - t * phi) + s * noise(f"renoise{i}")
        else:
            x = x - (t - s) * phi
    return x


def is_guided(t, ends):
    """Whether a time of a grid is within these two, up to its rounding."""
    return ends[0] - 1e-6 <= t <= ends[1] + 1e-6


# ---- training ------------------------------------------------------------------------------------


def from_data(draw, data, data_cond, teacher):
    """Samples of --data with their conditions, for this batch.

    -> x0 (B, ...), or of a sparse teacher (M, C); cond, uncond; noise, a function of a name that
    draws noise of x0's shape.
    """
    index = draw.integer("data", len(data))
    cond = {name: rows_of(draw, rows, index) for name, rows in data_cond.items()}
    if "label" in cond:
        uncond = {"label": torch.full_like(cond["label"], teacher.base.num_classes)}
    else:
        uncond = teacher.conditions.unconditional(cond)
    if not is_sparse(teacher.base):
        return draw.to_device(to_unit(data[index])), cond, uncond, draw.noise
    x0, coords = data[index]
    counts = coords[:, 0].bincount(minlength=len(index)).tolist()  # on the CPU: nothing waits
    at = {"coords": draw.to_device(coords)}

    def noise(name):
        return draw.points(name, counts, x0.shape[1])

    return draw.to_device(x0), {**cond, **at}, {**uncond, **at}, noise


def rows_of(draw, rows, index):
    """Conditions of these items of --data, on the device.  Views are drawn, others stored."""
    return rows.drawn(draw, index) if hasattr(rows, "drawn") else draw.to_device(rows[index])


def load_items(run, teacher):
    """--data, or the world's own: what velocity matching noises, and its conditions.

    A folder of TRELLIS-500K's layout is one for its two stages.  -> see load_paired_data. Raises
    UserError.
    """
    args, net = run.args, teacher.base
    if is_trellis_set(args.data) and hasattr(net, "stage"):
        encoder = args.dinov2 or DINOV2
        return open_trellis_set(args.data, net, args.teacher, encoder, run.device, run.say)
    return load_paired_data(args, teacher, is_sparse(net))


def is_sparse(net):
    """Whether a network's samples are points of a grid."""
    return getattr(net, "sparse", False)


def draw_times(args, draw, name):
    """Times in [dt, 1], so that the point below each exists.  -> (B,).

    The sigmoid of N(1, 1) (released code) or uniform (Alg. 1), then shifted like the teacher's.
    """
    lowest = difference_step(args) or 1e-3
    if args.t_law == "uniform":
        u = draw.spread(name)
    else:
        u = logit_normal(draw.normal(name, ()), 1.0, 1.0)
    return lowest + (1 - lowest) * shift(u, draw.timestep_shift)


def difference_step(args):
    """Step of the finite difference, None for the exact derivative."""
    return args.dt if args.derivative == "difference" else None


def matching(args, student, teacher, x0, z, t, cond, uncond, step):
    """--arm's loss at noised data: velocity matching or a baseline.  -> scalar, residual."""
    at = student, teacher.net, x0, z, t, cond, uncond, args.guidance_vm
    # both points of a difference lie in one phase; the exact derivative has one
    exact = args.arm == "vm" and args.derivative == "jvp"
    edge = edge_of(t if exact else t - args.dt, args.phases, teacher.shift)
    if args.arm == "cm":
        return consistency_distillation(*at, args.dt, edge)
    if args.arm == "scm":
        ramp = min(1.0, step / args.tangent_warmup) if args.tangent_warmup else 1.0
        return continuous_consistency(*at, difference_step(args), ramp)
    return velocity_matching(*at, difference_step(args), args.d_norm, edge)


def distillation(args, student, teacher, z1, z2, t, cond, uncond):
    """Velocity distillation as the flags have it.  -> scalar, residual."""
    at = student, teacher.net, z1, z2, t, cond, uncond, args.guidance_vd
    return velocity_distillation(*at, difference_step(args), args.d_norm, args.vd_weight)


def train(args):
    run = Run(args, "mdt_dist")
    # An adapter's base stays in float32: the derivative is a difference of its outputs.
    in_bf16 = not args.lora_rank
    teacher = start_teacher(run, in_bf16=in_bf16)
    refuse(wrong_flags(args, teacher))
    data, data_cond = load_items(run, teacher)
    if "label" in teacher.base.cond_names:
        teacher.conditions = Conditions(args, teacher.base)
    else:
        teacher.conditions = DataConditions(data, data_cond, args.data, teacher.base)
    student = new_student(run, teacher)
    freeze_teacher(run, teacher, in_bf16=in_bf16)
    if args.slow_clock and args.slow_clock != student.t_scale:
        slow_clock(student, args.slow_clock, args.seed)
    run.spread_tokens(teacher.net, student)
    try_network(teacher.base, teacher, run.device)
    ema = average_of(run, student)
    adam = dict(betas=tuple(args.adam_betas), weight_decay=args.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, **adam)
    state = {"ema": ema} if args.ema_decay else {}
    run.start(student=student, **state, optimizer=optimizer)  # resumed, where that is asked for
    times = step_grid(max(args.student_steps), teacher.shift)[:-1]
    introduce(run, teacher, len(data))
    film = film_of_velocities(run, teacher, student, ema)

    for step in run.steps():
        warmup, decay = run.rate(step)
        optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * decay
        for draw in run.micro_batches(step, "student", teacher):
            x0, cond, uncond, noise = from_data(draw, data, data_cond, teacher)
            t, z = draw_times(args, draw, "t"), noise("z")
            if "coords" in cond:  # memory and time grow with them
                run.note(points=len(x0) / len(t))
            # The gradients of both terms add up (Eq. 18). A backward pass for each, at once, keeps
            # the activations of one network call where their sum would keep those of two.
            if args.arm != "vd":
                with run.autocast():
                    loss, r = matching(args, student, teacher, x0, z, t, cond, uncond, step)
                (args.vm_weight * loss * run.share).backward()
                run.note(loss_vm=loss)
                run.note_rms(r_vm=r)
            if args.arm in ("mdt", "vd"):
                z1, z2, t2 = noise("z1"), z, t
                if not args.shared_noise:  # a noise and a time of its own (Alg. 1)
                    z2, t2 = noise("z2"), draw_times(args, draw, "t2")
                with run.autocast():
                    loss, r = distillation(args, student, teacher, z1, z2, t2, cond, uncond)
                (args.vd_loss_weight * loss * run.share).backward()
                run.note(loss_vd=loss)
                run.note_rms(r_vd=r)
        run.update(optimizer, "student")
        if args.ema_decay:
            run.update_ema(ema, student, step, args.ema_start)
        film.frame(step)
        if run.end_step(step, show=("loss_vm", "loss_vd")):  # True: time to save
            save_previews(run, teacher, ema, step + 1)
            save_student(run, teacher, ema, times)
            run.save(step)
    if run.first >= args.max_train_steps:  # a finished run is written out again, perhaps elsewhere
        save_student(run, teacher, ema, times)
    finish(run, teacher, ema.eval(), times)


# ---- what the run leaves behind ------------------------------------------------------------------


def introduce(run, teacher, samples):
    """Print who is distilled into what, and from how many samples of data."""
    args = run.args
    steps = " or ".join(map(str, args.student_steps))
    text = f"{args.arm}, d_norm {args.d_norm}, {args.derivative}, {samples:,} samples of data, "
    text += f"guidance {args.guidance_vm:g} and {args.guidance_vd:g}, sampled in {steps} step(s)"
    report.introduce(run, teacher, teacher.base, text)


def film_of_velocities(run, teacher, student, ema):
    """ring.gif: the teacher's velocity against the student's u, and the average's samples.

    The arrows lead from x_t along -v and -u, towards data; u - v, the residual of both losses, is
    where velocity distillation moves samples. They are drawn in the fewest steps asked for.
    """
    args, dt = run.args, difference_step(run.args)

    def x0(v, x_t, t):  # over alpha = 1 - t: a film draws alpha * this - x_t, which is -t v
        return (x_t - expand(t, x_t) * v) / expand(1 - t, x_t)

    def real(x_t, t, cond, uncond):
        return x0(velocity(teacher.net, x_t, t, cond, uncond, args.guidance_vd), x_t, t)

    def fake(x_t, t, cond, uncond):
        v = velocity(teacher.net, x_t, t, cond, uncond, args.guidance_vd)
        phi = student(x_t, t, **cond)
        d = time_derivative(student, x_t, t, v, cond, dt, phi)
        return x0(phi + expand(t, x_t) * normalised(d, len(t), None, args.d_norm), x_t, t)

    sampler = student_samplers(run, ema, teacher)[min(args.student_steps)]
    return Film(run, teacher, sampler, real, fake, names=("teacher -v", "student -u"))


def sampler_of(run, net, teacher, times, guidance_scale, renoise="ode", guided=(0.0, 1.0)):
    """-> a function (index, first, last) -> net's samples of the conditions index[first:last]."""

    def draw(index, a, b):
        cond, uncond = teacher.conditions.pick(index[a:b], run.device)
        noise = report.evaluation_noise(run, teacher.shape, a, b, cond.get("coords"))
        return sample(net, noise, times, cond, uncond, guidance_scale, renoise, guided)

    return draw


def student_samplers(run, student, teacher):
    """Samplers of all step counts in --student_steps, the longest first.  -> {steps: sampler}."""
    args = run.args
    samplers = {}
    for steps in sorted(set(args.student_steps), reverse=True):
        times, scale = step_grid(steps, teacher.shift)[:-1], args.student_guidance
        samplers[steps] = sampler_of(run, student, teacher, times, scale, args.renoise)
    return samplers


def teacher_sampler(run, teacher):
    """The teacher in --teacher_steps Euler steps, as its authors sample it.  -> calls, sampler."""
    args = run.args
    s = teacher.shift if args.teacher_shift is None else args.teacher_shift
    times, guided = step_grid(max(1, args.teacher_steps), s)[:-1], args.teacher_guidance_interval
    twice = 0 if args.guidance_scale == 1 else sum(is_guided(t, guided) for t in times)
    sampler = sampler_of(run, teacher.net, teacher, times, args.guidance_scale, guided=guided)
    return len(times) + twice, sampler


def save_student(run, teacher, student, times):
    """student/, and in a student of TRELLIS pipeline_entry.json, by which TRELLIS samples it."""
    scale, folder = run.args.student_guidance, os.path.join(run.folder, "student")
    phases = {"phases": run.args.phases} if run.args.phases > 1 else {}
    report.save_student(run, teacher, student, times, guidance_scale=scale, **phases)
    whole = not run.args.lora_rank  # TRELLIS reads no adapters
    if run.main and whole and hasattr(student, "stage") and run.args.renoise == "ode":
        path = os.path.join(os.path.abspath(folder), config_class(teacher.config))
        entry = pipeline_entry(student, path, len(times), teacher.shift, scale)
        save_json(entry, os.path.join(folder, "pipeline_entry.json"))


def save_previews(run, teacher, student, update):
    """samples.png in the middle of a run; there is no picture of points."""
    if not is_sparse(student):
        samplers = student_samplers(run, student, teacher).items()
        rows = {f"{steps} step(s), update {update}": sampler for steps, sampler in samplers}
        report.save_previews(run, teacher, rows)


def save_points(run, teacher, sampler):
    """samples.safetensors of a sparse student: coords, feats, offsets, as --data has them.

    The points are those of the first --preview_samples samples of --data. All ranks call it, and
    each draws these few samples; rank 0 writes them.  -> their features (M, C) on the CPU
    """
    index = teacher.conditions.preview(run.args.preview_samples)
    x, coords = draw_points(run, sampler, index), teacher.conditions.points.places(index)
    if run.main:
        os.makedirs(run.folder, exist_ok=True)
        path = os.path.join(run.folder, "samples.safetensors")
        save_tensors(ragged(x, coords), path)
        print(f"samples: {path}")
    return x


def draw_points(run, sampler, index):
    """Samples of a network of points, --train_batch_size at a time.  index (n,) -> (M, C), CPU."""
    n, B = len(index), run.B
    with run.autocast():
        parts = [sampler(index, a, min(n, a + B)).float().cpu() for a in range(0, n, B)]
    return torch.cat(parts)


def calls_per_step(guidance_scale):
    """Network calls of a sampling step."""
    return 1 if guidance_scale == 1 else 2


def finish(run, teacher, student, times):
    """report.json and samples: every step count of the student, and the teacher by Euler in as few.

    Of sparse samples there is no picture. All ranks call it.
    """
    args, longest = run.args, len(times)
    parameters = sum(p.numel() for p in student.parameters())
    samplers = student_samplers(run, student, teacher)
    if is_sparse(student):
        finish_points(run, teacher, samplers, parameters)
        return
    calls = calls_per_step(args.student_guidance)
    students = {"student": (longest * calls, samplers.pop(longest))}
    students |= {f"student_{n}": (n * calls, sampler) for n, sampler in samplers.items()}
    for n in args.student_steps:
        if n != longest:
            sampler = report.teacher_sampler(run, teacher, step_grid(n, teacher.shift), "euler")
            students[f"teacher_{n}"] = n * calls_per_step(args.guidance_scale), sampler
    own_way = args.teacher_shift is not None or args.teacher_guidance_interval != [0.0, 1.0]
    fine = teacher_sampler(run, teacher) if own_way else None
    extra = {}
    if teacher.world and args.teacher_steps:
        extra = transport_errors(run, teacher, students, times, fine)
    report.finish(run, teacher, times, students, parameters, extra, "euler", fine)


def finish_points(run, teacher, students, parameters):
    """report.json and samples.safetensors of a sparse student.  students: {steps: sampler}.

    paired_mse is the mean square distance to the many-step teacher's features of the same noise, of
    the student and of the teacher in as few steps. All ranks call it.
    """
    args, longest, drawn, calls = run.args, max(students), {}, {}
    index = teacher.conditions.preview(args.preview_samples)
    if args.teacher_steps:
        calls["teacher"], sampler = teacher_sampler(run, teacher)
        drawn["teacher"] = draw_points(run, sampler, index)
    for n in sorted(students, reverse=True) if args.teacher_steps else ():
        name, times = few_steps("teacher", n, longest), step_grid(n, teacher.shift)[:-1]
        coarse = sampler_of(run, teacher.net, teacher, times, args.guidance_scale)
        drawn[name] = draw_points(run, coarse, index)
        calls[name] = n * calls_per_step(args.guidance_scale)
    for n, sampler in students.items():
        name = few_steps("student", n, longest)
        if n == longest:
            drawn[name] = save_points(run, teacher, sampler)
        else:
            drawn[name] = draw_points(run, sampler, index)
        calls[name] = n * calls_per_step(args.student_guidance)
    results = [{"name": name, "nfe": calls[name], "samples": len(index)} for name in drawn]
    for row in results if args.teacher_steps else []:
        if row["name"] != "teacher":
            row["paired_mse"] = float((drawn[row["name"]] - drawn["teacher"]).square().mean())
    if run.main:
        report.save_report(run, args.teacher, parameters, results)
        report.print_table(results)
    run.wait_for_all()


def few_steps(who, steps, longest):
    """The name of a row of report.json."""
    if steps != longest:
        return f"{who}_{steps}"
    return "student" if who == "student" else "teacher_same_steps"


def transport_errors(run, teacher, students, times, fine):
    """paired_mse of each row, over 200 samples: the transport error (Eq. 10 at t = 1).

    It is the mean square distance to the many-step teacher's sample of the same noise. students:
    {row name: (calls, sampler)}; fine: the same of that teacher, None: --teacher_steps of its own
    grid.  -> {row name: {"paired_mse": float}} on rank 0, {} on the others.
    """
    index = teacher.conditions.preview(200)

    def drawn(sampler):
        n = len(index)
        return report.many_on_all_ranks(run, lambda a, b: sampler(index, a, b), n, teacher.shape)[0]

    ends = drawn(fine[1] if fine else report.teacher_sampler(run, teacher, None, "euler"))
    samplers = {name: sampler for name, (_, sampler) in students.items()}
    samplers["teacher_same_steps"] = report.teacher_sampler(run, teacher, [*times, 0.0], "euler")
    samples = {name: drawn(sampler) for name, sampler in samplers.items()}
    if not run.main:
        return {}
    return {name: {"paired_mse": float((x - ends).square().mean())} for name, x in samples.items()}


def conditions_of(args, net):
    """Conditions of --sample: classes or, for a network without them, the rows of --prompts.

    What models.encode writes will do; without --prompts they are those of --data. A network of
    points is sampled at the points of --data. Raises UserError.
    """
    if "label" in net.cond_names:
        return Conditions(args, net)
    flag, source = ("prompts", args.prompts) if args.prompts else ("data", args.data)
    if not is_sparse(net):
        return load_conditions(source, net, flag)
    places = load_places(args.data, tuple(args.sample_shape or net.latent_shape)[-1])
    return load_conditions(source, net, flag, places)


def sample_only(args):
    """--sample FOLDER: load a saved student and its sampler.json, write samples to --output_dir.

    In the first of --student_steps, or else in as many steps as sampler.json has.
    """
    run = Run(args, "mdt_dist")
    student, saved, teacher = report.load_student(run, conditions_of)
    steps = args.student_steps[0] if args.student_steps else len(saved["times"])
    if steps != saved.get("phases", steps):  # a step leads to the end of its phase, not to data
        raise UserError(
            f"--student_steps {steps}: this student has {saved['phases']} phases, each of which "
            "takes a step: leave it out"
        )
    times, scale = step_grid(steps, teacher.shift)[:-1], saved["guidance_scale"]
    renoise = "sde" if saved["rule"] == "renoise" else "ode"
    sampler = sampler_of(run, student, teacher, times, scale, renoise)
    try_network(student, teacher, run.device)
    if is_sparse(student):
        if args.samples:
            raise UserError("--samples: it writes images, and these are points: leave it out")
        save_points(run, teacher, sampler)
    else:
        report.write_samples(run, teacher, sampler, steps * calls_per_step(scale))


# ---- what an update costs, for --dry_run ---------------------------------------------------------


def cost(args):
    """-> the networks, and the backward passes of one student update (models/plumbing/dry_run.py).

    Velocity matching (or a baseline) and velocity distillation are a backward pass each.
    """
    rank = args.lora_rank
    networks = [Network("teacher", "teacher"), Network("student", "trained", rank, saved=True)]
    if args.ema_decay:
        networks.append(Network("ema", "average", rank))
    of_vm, of_vd = (1 if w == 1 else 2 for w in (args.guidance_vm, args.guidance_vd))
    exact = args.derivative == "jvp"  # one call in forward mode, about two
    # Eq. 14 has two points, of which the first is known already, except under bf16
    of_vm_d = 2 if exact or args.mixed_precision == "bf16" else 1
    of_vm_d = 1 if args.arm == "cm" else of_vm_d
    turns = []
    if args.arm != "vd":
        turns.append(Turn("student", 1, {"teacher": of_vm, "student": of_vm_d}, {"student": 1}))
    if args.arm in ("mdt", "vd"):
        turns.append(Turn("student", 1, {"teacher": of_vd, "student": 2 + exact}, {"student": 1}))
    return networks, turns


# ---- flags ---------------------------------------------------------------------------------------

PRESETS = {  # the flags' defaults suit small networks; what other teachers change of them
    "voxels": dict(
        max_train_steps=300, learning_rate=1.2e-4, slow_clock=20.0, guidance_vd=2.0,
    ),
    "ring": dict(
        max_train_steps=400, train_batch_size=128, learning_rate=3e-4, vd_weight="paper",
    ),
    # the paper's values, and where its released code has others, the code's
    "released": dict(
        max_train_steps=6000, train_batch_size=8, learning_rate=4e-8, d_norm=0.1,
        t_law="logit_normal", guidance_vm=41.0,
        guidance_vd=101.0, ema_decay=0.9999, ema_start=1, adam_betas=[0.9, 0.999],
        max_grad_norm=1.0, lr_warmup_steps=0, lr_decay_share=0.0, student_guidance=6.0,
        guidance_scale=6.0, timestep_shift=1.0, preview_samples=4, gradient_checkpointing=True,
    ),
    # the two stages of TRELLIS, whatever their tokens' width; the second's previews in the released
    # code have w = .1
    "SparseStructureFlowModel": dict(max_train_steps=6000, learning_rate=4e-8, **TRELLIS_SAMPLES),
    "SLatFlowModel": dict(
        max_train_steps=4000, learning_rate=1e-8, student_guidance=1.1, **TRELLIS_SAMPLES
    ),
    "TRELLIS text structure": dict(student_guidance=8.5),  # as TRELLIS samples it; not the paper's
}  # fmt: skip


def presets(known):
    """PRESETS, where other flags matter too. known: a first reading of the command line."""
    kept = {**PRESETS["voxels"], "slow_clock": None}  # adapters leave the embedding of t as it is
    return {**PRESETS, "voxels": kept} if known.lora_rank else PRESETS


def norm_kind(text):
    """argparse type of --d_norm: none (None), rms or a positive constant."""
    if text == "none":
        return None
    return text if text == "rms" else number(float, above=0)(text)


# fmt: off
def parse_args(argv=None):
    p = distillation_parser("Distil a 3-D flow teacher into one that samples in one or two steps "
                            "(MDT-dist, 2509.04406).", fake_score=False)
    p.set_defaults(teacher="voxels", max_train_steps=120, train_batch_size=32, learning_rate=1e-4,
                   lr_warmup_steps=20, ema_decay=0.99, lr_decay_share=0.5, adam_betas=[0.9, 0.99],
                   teacher_steps=25)
    paper_values(p, learning_rate="4e-8, TRELLIS's second stage 1e-8", weight_decay="0",
                 max_train_steps="6000, second stage 4000", lr_decay_share="0",
                 train_batch_size="256 in all", adam_betas="torch's .9 .999", ema_decay=".9999",
                 teacher_steps="25, by Euler")
    p.optimiser.add_argument(
        "--ema_start", type=number(int, 1), default=4,
        help="the average's decay at update n is at most n / (n + START - 1), so that it soon "
        "forgets the teacher's weights; 1 = --ema_decay from the first update (code)")
    add = p.method.add_argument
    add("--student_steps", type=number(int, 1), nargs="+", default=None,
        help="step counts that are measured; training is the same (paper: 1 and 2). None: 1 and 2, "
        "or with --sample the saved student's own")
    add("--data", default=None, help="x0 of velocity matching: a world, or FILE.safetensors with "
        "x0, or coords, feats and offsets, and cond.*, or a folder as TRELLIS-500K (default: the "
        "world's); with --sample the points of TRELLIS's second stage, coords and offsets")
    add("--dinov2", default=None, metavar="FOLDER", help="encoder of the views in such a folder, "
        f"folder or name (None: {DINOV2})")
    add("--arm", choices=["mdt", "vm", "vd", "cm", "scm"], default="mdt",
        help="velocity matching + distillation (paper), one of the two, or a baseline: "
        "consistency distillation, or its continuous-time form")
    add("--dt", type=number(float, 1e-5, 0.5), default=0.01,
        help="step of the finite difference, and of cm (paper: .01)")
    add("--t_law", choices=["logit_normal", "uniform"], default="uniform",
        help="distribution of t: sigmoid(1 + normal) (code), or uniform (paper, Alg. 1)")
    add("--slow_clock", type=number(float, above=0), default=None, metavar="SCALE",
        help="before training refit the student's time embedding to sinusoids of SCALE t, the "
        "teacher's are of 1000 t, so that the difference over dt is not theirs (paper: no)")
    add("--vd_weight", choices=["code", "paper", "kl"], default="code",
        help="weight w(t) of velocity distillation: 2 (released code), 1 - t (paper, Eq. 17), or "
        "(1 - t)^2 / t (the KL of Eq. 15)")
    add("--d_norm", type=norm_kind, default="none", metavar="C|rms|none",
        help="the derivative as it is (none, paper), over its norm + C per sample (code: .1), or "
        "over its root mean square + .1")
    add("--vm_weight", type=number(float, 0), default=1.0,
        help="weight of velocity matching, or of the baseline, in the sum (paper: 1)")
    add("--vd_loss_weight", type=number(float, 0), default=1.0,
        help="lambda, weight of velocity distillation in the sum (Eq. 18; paper: 1)")
    add("--guidance_vm", type=number(float, 0), default=1.0,
        help="the teacher's guidance in velocity matching (paper: w = 40, here 41)")
    add("--guidance_vd", type=number(float, 0), default=1.0,
        help="the teacher's guidance in velocity distillation (paper: w = 100, here 101)")
    add("--student_guidance", type=number(float, 0), default=1.0,
        help="guidance of the student's samples, two calls a step (TRELLIS: w = 5, here 6; the "
        "released code's previews: w = 3 and, in the second stage, .1, here 4 and 1.1)")
    add_further_flags(p)
    args = parse(p, argv, "mdt_dist", presets, wrong_flags, ignored_flags)
    if not (args.student_steps or args.sample):
        args.student_steps = [1, 2] if args.phases == 1 else [args.phases]
    return args


def add_further_flags(p):
    """Flags of the teacher's row, and ablations."""
    add = p.shown.add_argument
    add("--teacher_shift", type=number(float, above=0), default=None, metavar="S",
        help="timestep shift of the many-step teacher's grid alone (TRELLIS: 3); None: "
        "--timestep_shift")
    add("--teacher_guidance_interval", type=number(float, 0, 1), nargs=2, default=[0.0, 1.0],
        metavar=("LOW", "HIGH"), help="the many-step teacher is guided for t within these "
        "(TRELLIS: .5 1)")
    add = p.ablations.add_argument
    add("--derivative", choices=["difference", "jvp"], default="difference",
        help="how phi is differentiated along the trajectory: by Eq. 14 (paper), or exactly")
    add("--shared_noise", action="store_true",
        help="both losses at the same t and noise (code) instead of fresh ones (Alg. 1)")
    add("--phases", type=number(int, 1), default=1, help="for vm and cm: the transport ends at the "
        "lower end of t's phase (multi-phase; paper: 1)")
    add("--tangent_warmup", type=number(int, 0), default=100,
        help="for scm: updates over which the derivative's part grows to its full weight")
    add("--renoise", choices=["ode", "sde"], default="ode",
        help="between student steps: Euler (paper), or fresh noise on the predicted sample (ours)")
# fmt: on


def ignored_flags(a):
    """Flags of the loss that --arm leaves out: see `flags.unread`. Films read --guidance_vd."""
    why = f"--arm {a.arm} has no velocity distillation, mdt and vd have"
    yield "vd_weight vd_loss_weight shared_noise", a.arm not in ("mdt", "vd"), why
    yield "vm_weight guidance_vm", a.arm == "vd", "there is no velocity matching"
    yield "tangent_warmup", a.arm != "scm", "the derivative has its full weight from the start"
    yield "dt", a.derivative == "jvp" and a.arm != "cm", "the derivative is exact"


# fmt: off
def wrong_flags(a, teacher=None):
    """Flags that do not go together: pairs (wrong, why). teacher: None before it is loaded."""
    prediction = teacher.prediction if teacher else "flow_v"
    is_flow = not teacher or (isinstance(teacher.schedule, Flow) and prediction == "flow_v")
    in_one = a.arm not in ("vm", "cm")
    yield a.prompts and not a.sample, ("--prompts: conditions come with --data here, as cond.*; "
                                       "it is for --sample")
    learns = (a.arm != "vd" and a.vm_weight) or (a.arm in ("mdt", "vd") and a.vd_loss_weight)
    yield not learns, ("nothing is left to learn from: give --vm_weight or --vd_loss_weight above "
                       "0, the one that --arm has")
    yield a.dinov2 and not is_trellis_set(a.data), ("--dinov2: it is for --data FOLDER in "
                                                    "TRELLIS-500K's layout: leave it out")
    low, high = a.teacher_guidance_interval
    yield low > high, (f"argument --teacher_guidance_interval: {low:g} is above {high:g}; give the "
                       "lower end first")
    yield a.phases > 1 and in_one, (f"argument --phases: {a.arm} leads from noise to data in one "
                                    "phase; more are for --arm vm and cm")
    other = a.phases > 1 and not a.sample and a.student_steps not in (None, [a.phases])
    yield other, (f"--student_steps {' '.join(map(str, a.student_steps or []))}: of {a.phases} "
                  f"phases each takes a step: give {a.phases}, or leave it out")
    yield a.phases > 1 and a.renoise == "sde", ("--renoise sde: with --phases a step leads to the "
                                                "end of its phase, not to a sample: leave it out")
    yield a.arm == "cm" and a.derivative == "jvp", (
        "argument --derivative: cm takes differences by definition; its continuous-time form is "
        "--arm scm")
    slow, clock = a.slow_clock and teacher, teacher and hasattr(teacher.base, "t_scale")
    yield a.slow_clock and a.lora_rank, ("--slow_clock: adapters leave the embedding of t as it "
                                         "is: leave out --slow_clock or --lora_rank")
    yield slow and not clock, ("--slow_clock: only a DiT of this project keeps the scale of its "
                               f"clock, not {slow and type(teacher.base).__name__}: leave it out")
    yield not is_flow, (f"--teacher {a.teacher} predicts {prediction}; a flow's transport is "
                        "distilled here: give one that predicts its velocity")
# fmt: on


def main(argv=None):
    args = parse_args(argv)
    if args.sample:
        sample_only(args)
    elif not dry_run(args, *cost(args), check=lambda a, t: refuse(wrong_flags(a, t))):
        train(args)
        work_done(args, *cost(args))


if __name__ == "__main__":
    run_main(main)
