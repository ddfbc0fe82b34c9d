"""Trajectory distribution matching, TDM (2503.06674 v2): deterministic few-step students.

The idea. Trajectory distillation (consistency models and their kin) makes a student follow the
teacher's ODE sample by sample, which is hard; distribution matching (DMD) looks at clean samples
only, and its few-step students need fresh noise at every step. TDM matches distributions along the
student's own deterministic trajectory: wherever a step of the student lands, at level s, its
samples should have the teacher's distribution at that level. So noise the landing point x_s on, to
a level tau between s and the level t where the step began, and move x_s along the difference of
teacher and fake score there. The intervals (s, t) of the K steps are disjoint: each level tau
belongs to one step, and one fake score serves all steps. With student and fake conditioned on K,
one network learns several step counts at once.

    paper                   here       meaning                                             shape
    t_K=T > ... > t_0 = 0   grid       the student's levels, from the noise: grid[0] = T   K + 1
    t_{i+1}, t_i            t, s       where step k = K - 1 - i begins, and where it lands (B,)
    x_{t_{i+1}}             x_in       its input, made by the steps before it              (B, ...)
    x-hat_{t_i} = f_theta   x          its clean prediction                                (B, ...)
    x_{t_i}                 x_s        where it lands: alpha_s x + sigma_s eps-hat         (B, ...)
    x_tau                   x_tau      x_s noised on, within the step's own interval       (B, ...)
    f_phi, f_psi            mu_real, mu_fake   x0 as guided teacher and fake read it from x_tau

Launch.
    laptop      python tdm.py                       # glyphs, K = 1, 2 and 4 in one student, minutes
                python tdm.py --teacher ring        # a minute
    paper       python tdm.py --student_steps 4 --shared_fake --regress x_s \
                    --fake_update_ratio 1 --learning_rate 2e-4 --learning_rate_fake 2e-3
    paper, K    python tdm.py --student_steps 1 2 4 --shared_fake --regress x_s \
                    --fake_update_ratio 1 --learning_rate 2e-4 --learning_rate_fake 2e-3  # Eq. 8
    ablations   python tdm.py --no_steps_cond       # Tab. 5: nobody is conditioned on K
                python tdm.py --loss l2             # Tab. 5: no surrogate metric
    torchrun    torchrun --nproc-per-node 8 tdm.py --teacher PixArt-XL-2-512x512 \
                    --prompts prompts.safetensors --gradient_accumulation_steps 4 \
                    --mixed_precision bf16
    sampling    python tdm.py --sample runs/tdm-glyphs/student --student_steps 2

Deviations; the reasons are in docs/tdm.md. x_s is regressed, as in the paper, where the network
predicts noise; elsewhere x, as in the authors' demo (--regress). Eq. 7's target biases the fake at
every step but the last; --fake_target exact does not. It is conditioned on the step, too
(--shared_fake: on K alone). The rows of a batch have the K in turn, half of them K = 1. tau keeps
2 % of its interval off both ends. The fake has R updates, and from the second on fresh samples; its
gradient is clipped. Optimiser settings and averages suit short runs.
"""

from dataclasses import dataclass

import torch

from models.diffusion import (
    advance_rows,
    expand,
    from_x0_eps,
    ode_step,
    shift,
    to_x0_eps,
    transition,
    unshift,
)
from models.files import UserError
from models.plumbing import report
from models.plumbing.data import Conditions, try_network
from models.plumbing.dry_run import Network, Turn, dry_run
from models.plumbing.film import FILM_LEVEL, film_of_scores
from models.plumbing.flags import (
    add_guidance_rescale_flag,
    distillation_parser,
    number,
    paper_values,
    parse,
    refuse,
)
from models.plumbing.run import Run, run_main
from models.plumbing.sharding import largest_over_ranks
from models.plumbing.teachers import (
    average_of,
    freeze_teacher,
    new_student,
    start_teacher,
    trainable,
)
from models.plumbing.work import work_done

# ---- the losses ----------------------------------------------------------------------------------
#
# x, x_s, eps (B, ...); s < tau < t (B,) floats in [0, 1], 0 = data, 1 = noise: the student's step
# goes from t to s, and tau is drawn in between. diffusion: a Diffusion(schedule, prediction) of
# models/diffusion.py; the prediction ("eps", "flow_v" = eps - x0, ...) is that of student, teacher
# and fake. Networks are called as net(x_t, t, **cond); cond, uncond, fake_cond: dicts, {} for none.


def tdm_loss(
    x_s, teacher, fake, diffusion, eps, s, tau, cond, uncond, fake_cond, guidance_scale, slope
):
    """The student's loss (Eq. 6 and 11).

    -> scalar; g = mu_fake - mu_real, mu_real, mu_fake (B, ...), constants, for the log.

    x_s, where the student's step lands, is noised on from s to tau and moves by the difference of
    the two scores there, written as x0, times A = dx_s / dx = slope (B,): as far as it would move
    if the step had predicted x + mu_real - mu_fake instead of x.

        r = x_s - sg(x_s + A (mu_real(x_tau) - mu_fake(x_tau)))
        loss = sqrt(|r|^2 + c^2) - c,    c = .00054 sqrt(d)

    with one norm for each sample, so that its gradient in x_s is at most 1, whatever the level.
    x_s comes from `student_step` with its graph, slope from `step_slope` with that step's t and s.
    Where the network does not predict noise x is regressed instead: `tdm_loss_variant`.
    """
    with torch.no_grad():
        x_tau = diffusion.noise_on(x_s, eps, s, tau)
        mu_real = diffusion.guided_x0(teacher, x_tau, tau, cond, uncond, guidance_scale)
        mu_fake = diffusion.x0(fake, x_tau, tau, **fake_cond)
    r = x_s - (x_s + expand(slope, x_s) * (mu_real - mu_fake)).detach()
    c = 0.00054 * r[0].numel() ** 0.5
    loss = ((r.square().flatten(1).sum(1) + c**2).sqrt() - c).mean()
    return loss, mu_fake - mu_real, mu_real, mu_fake


def step_slope(schedule, t, s, renoise="ode"):
    """A = dx_s / dx of a step from t to s with its input fixed; positive.  (B,) -> (B,).

    alpha_s - sigma_s alpha_t / sigma_t (flow: (t - s) / t); with fresh noise alpha_s.
    """
    if renoise == "sde":
        return schedule.alpha(s)
    return schedule.alpha(s) - schedule.sigma(s) * schedule.alpha(t) / schedule.sigma(t)


def fake_score_loss(fake, diffusion, x, x_s, eps, s, tau, cond):
    """Loss of the fake score on detached student samples, x_s noised on to tau (Eq. 7).  -> scalar.

    It denoises towards the student's own x, weighted by `importance_weight`, in the space that the
    network predicts. Its optimum is close to E[x | x_tau], which gives the score of x_tau only
    where s = 0: before the last step the noise in x_s is the student's own, not fresh.
    `exact_fake_loss` is unbiased at every step: the one to copy unless you want the paper's.
    """
    x, x_s = x.detach(), x_s.detach()
    x_tau, alpha, sigma = at_level(diffusion, x_s, eps, s, tau)
    prediction = fake(x_tau, tau, **cond).to(x_tau.dtype)
    eps_mix = to_x0_eps(x, "x0", x_tau, alpha, sigma)[1]  # x_tau = alpha x + sigma eps_mix
    target = from_x0_eps(diffusion.prediction, x, eps_mix, alpha, sigma)
    error = (prediction - target).square().flatten(1).mean(1)  # (B,)
    return (importance_weight(eps, eps_mix) * error).mean()


def importance_weight(eps, eps_mix):
    """q(x_tau | x) / q(x_tau | x_s), tempered as in the authors' demo (Sec. 4.1).  -> (B,).

    It should let a fake that is trained at noised-on x_s count as one trained at noised x. The
    densities of the noise are taken per dimension, without normalisers: exp((mean eps^2 - mean
    eps_mix^2) / 2), where x_tau = alpha x + sigma eps_mix. It is 1 where s = 0.
    """
    return torch.exp((mean_square(eps) - mean_square(eps_mix)) / 2)


def mean_square(x):
    """Mean over each sample's elements.  (B, ...) -> (B,)."""
    return x.square().flatten(1).mean(1)


def at_level(diffusion, x_s, eps, s, tau):
    """x_s noised on to tau, and the schedule there.  -> x_tau (B, ...), alpha, sigma (B,)."""
    x_tau = diffusion.noise_on(x_s, eps, s, tau)
    return x_tau, diffusion.schedule.alpha(tau), diffusion.schedule.sigma(tau)


# ---- variants and ablations of the losses --------------------------------------------------------


def tdm_loss_variant(
    x, x_s, teacher, fake, diffusion, eps, s, tau, cond, uncond, fake_cond, guidance_scale, **how
):
    """`tdm_loss` with another regression: how is that of `trajectory_matching_loss`.

    -> scalar; g, mu_real, mu_fake (B, ...), as `tdm_loss`.
    """
    with torch.no_grad():
        x_tau = diffusion.noise_on(x_s, eps, s, tau)
        mu_real = diffusion.guided_x0(teacher, x_tau, tau, cond, uncond, guidance_scale)
        mu_fake = diffusion.x0(fake, x_tau, tau, **fake_cond)
    loss = trajectory_matching_loss(x, mu_real, mu_fake, **how)
    return loss, mu_fake - mu_real, mu_real, mu_fake


def trajectory_matching_loss(x, mu_real, mu_fake, loss="pseudo_huber", slope=None):
    """Pulls x towards sg(x + mu_real - mu_fake).  -> scalar; the gradient reaches x alone.

    slope (B,): A = dx_s / dx, to regress x_s as in `tdm_loss`; steps that move x_s little then
    weigh little. None: x itself is regressed, as in the authors' demo.
    loss "pseudo_huber": Eq. 11. "l2": r^2 / 2 (Tab. 5, without the surrogate). "demo": always of x,
    sqrt(r^2 + 1e-6) - 1e-3 per element, over the sample's mean |x - mu_real|.
    """
    r = x - (x + (mu_real - mu_fake)).detach()  # exactly 0 where the two agree
    if loss == "demo":
        error = (x - mu_real).detach().abs().flatten(1).mean(1).clamp_min(1e-8)  # (B,)
        return (((r.square() + 1e-6).sqrt() - 1e-3) / expand(error, r)).mean()
    if slope is not None:
        r = expand(slope, r) * r
    if loss == "l2":
        return 0.5 * r.square().mean()
    c = 0.00054 * r[0].numel() ** 0.5
    return ((r.square().flatten(1).sum(1) + c**2).sqrt() - c).mean()


def snr_fake_loss(fake, diffusion, x, x_s, eps, s, tau, cond, max_snr=5.0):
    """`fake_score_loss` in x0, times min(SNR, 5), as the demo weights it.  -> scalar."""
    x, x_s = x.detach(), x_s.detach()
    x_tau, alpha, sigma = at_level(diffusion, x_s, eps, s, tau)
    x0_fake = diffusion.x0(fake, x_tau, tau, **cond)
    eps_mix = to_x0_eps(x, "x0", x_tau, alpha, sigma)[1]
    importance, snr = importance_weight(eps, eps_mix), (alpha / sigma) ** 2
    return (importance * snr.clamp(max=max_snr) * mean_square(x0_fake - x)).mean()


def exact_fake_loss(fake, diffusion, x_s, eps, s, tau, cond):
    """Denoising score matching of x_tau given x_s: unbiased at every step.  -> scalar.

    x_tau = a x_s + b eps has the conditional score -eps / b. The pair (x0, eps) with that score,

        (sigma_tau / b) eps   and   x_s / alpha_s - alpha_tau sigma_s^2 / (alpha_s^2 b) eps,

    is regressed in the space that the network predicts, times ratio = b / sigma_tau <= 1, because b
    goes to 0 where tau meets s.
    """
    x_s = x_s.detach()
    x_tau, alpha, sigma = at_level(diffusion, x_s, eps, s, tau)
    prediction = fake(x_tau, tau, **cond).to(x_tau.dtype)
    _, b = transition(diffusion.schedule, s, tau)
    ratio = expand(b / sigma, eps)
    alpha_s, sigma_s = diffusion.schedule.alpha(s), diffusion.schedule.sigma(s)
    x0_part = ratio * x_s / expand(alpha_s, x_s)
    x0_part = x0_part - expand(alpha * sigma_s**2 / (alpha_s**2 * sigma), eps) * eps
    target = from_x0_eps(diffusion.prediction, x0_part, eps, alpha, sigma)
    return (ratio * prediction - target).square().mean()


def exact_fake_loss_of_eps(fake, diffusion, x_s, eps, s, tau, cond):
    """`exact_fake_loss` in the noise, |b / sigma_tau eps_fake - eps|^2.  -> scalar."""
    x_s = x_s.detach()
    x_tau, _, sigma = at_level(diffusion, x_s, eps, s, tau)
    _, eps_fake = diffusion.x0_eps(fake, x_tau, tau, **cond)
    _, b = transition(diffusion.schedule, s, tau)
    return (expand(b / sigma, eps) * eps_fake - eps).square().mean()


# ---- the sampler ---------------------------------------------------------------------------------


def trajectory(K, timestep_shift, T=1.0):
    """The student's levels T = t_K > ... > t_0 = 0 (Eq. 8).  -> K + 1 floats, from T to 0.

    They are uniform in raw time; T, in (0, 1], is a level after the shift.
    """
    u_T = shift(T, 1 / timestep_shift)  # unshift, in the form that leaves T = 1 exactly 1
    return [T] + [shift(u_T * (1 - i / K), timestep_shift) for i in range(1, K + 1)]


def student_step(student, diffusion, x_in, t, s, cond, noise=None):
    """One step of the trajectory, t -> s: DDIM, which is Euler for flow.

    -> x_s, where it lands, and x, its clean prediction, in this order; both (B, ...).

    t, s (B,): rows may be at different steps. noise: stochastic instead, x_s = alpha_s x + sigma_s
    noise.
    """
    x, eps = diffusion.x0_eps(student, x_in, t, **cond)
    return ode_step(diffusion.schedule, x, eps if noise is None else noise, s), x


@torch.no_grad()
def sample(student, diffusion, noise, grid, cond, renoise="ode"):
    """The few-step sampler: len(grid) - 1 calls, no guidance, deterministic.  -> x0 (B, ...).

    grid: T > ... > 0, with the final 0, as `trajectory` gives it; standard normal noise is taken
    for x at T. noise: name -> (B, ...). renoise "sde": fresh noise after step i,
    noise("renoise<i>") (ablation).
    """
    x_in = noise("z")
    for i, (t, s) in enumerate(zip(grid[:-1], grid[1:])):
        fresh = noise(f"renoise{i}") if renoise == "sde" else None
        levels = x_in.new_full((len(x_in),), t), x_in.new_full((len(x_in),), s)
        x_in, _ = student_step(student, diffusion, x_in, *levels, cond, fresh)
    return x_in


# ---- training ------------------------------------------------------------------------------------


def sees_K(args, net):
    """Whether student and fake, networks like net, are conditioned on K. Raises UserError."""
    if len(set(args.student_steps)) == 1 or args.no_steps_cond:
        return False
    if "steps_cond" not in net.config:
        counts = " ".join(map(str, args.student_steps))
        raise UserError(
            f"--student_steps {counts}: a {type(net).__name__} has no input that could be "
            "conditioned on their number: give one, or --no_steps_cond (a penalty in Tab. 5)"
        )
    return True


def fake_sees_step(args, net):
    """Whether the fake, a network like net, is conditioned on the step k of the trajectory too."""
    off = args.shared_fake or args.no_steps_cond
    off = off or args.fake_lora_rank  # adapters have no layer for it
    return not off and "steps_cond" in net.config


@dataclass
class Segment:
    """One step of the trajectory, a different one for every sample of a batch.

    It goes from x_in (B, ...) at level t (B,) to level s (B,). conds: the condition and the
    unconditional one, of the teacher; student_cond and fake_cond: theirs.
    """

    x_in: torch.Tensor
    t: torch.Tensor
    s: torch.Tensor
    conds: tuple
    student_cond: dict
    fake_cond: dict


def draw_segments(args, draw, student, teacher, grids, see):
    """A K and a step k for every sample; its input is made by the student's own steps.  -> Segment.

    The rows have the counts of --student_steps in turn; one that is named twice has twice as many.
    see: whether student and fake are conditioned on K, and the fake on k too.
    """
    counts = torch.tensor(args.student_steps)
    K = counts[(torch.tensor(draw.rows) + draw.agreed("steps", len(counts))) % len(counts)]
    k = torch.minimum((draw.on_cpu().uniform("j") * K).long(), K - 1)  # 0 = from noise
    x_in, (cond, uncond) = draw.noise("z"), teacher.conditions.draw(draw)
    student_cond = {**cond, "steps": K.float().to(draw.device)} if see[0] else cond
    with torch.no_grad():  # no gradient through the steps before
        for i in range(int(largest_over_ranks(k.max(), draw.device))):  # ranks make the same calls
            fresh = draw.noise(f"renoise{i}") if args.renoise == "sde" else None
            # the rows that are not yet at their own step
            x_in = advance(student, teacher, x_in, k > i, grids, K, i, student_cond, fresh)
    t, s = levels(grids, K, k, draw.device)
    steps = fake_steps_input(grids, K, k, see)
    fake_cond = {**cond, "steps": steps.float().to(draw.device)} if any(see) else cond
    return Segment(x_in, t, s, (cond, uncond), student_cond, fake_cond)


def fake_steps_input(grids, K, k, see):
    """The fake's input `steps`: a different number for every K, or for every pair of K and k.

    K, k: ints, or tensors of them. see: as for `draw_segments`.
    """
    on_K, on_k = see
    return on_K * K + on_k * k * (max(grids) + 1)


def levels(grids, K, k, device):
    """Where step k of a trajectory of K steps begins and ends.  K, k (B,) ints -> t, s (B,)."""
    ends = [grids[n][i : i + 2] for n, i in zip(K.tolist(), k.tolist())]
    return torch.tensor(ends).to(device).unbind(1)


def advance(student, teacher, x_in, chosen, grids, K, i, cond, fresh):
    """The i-th step of the chosen rows, each on the grid of its own K; the others stay.

    -> (B, ...).
    """

    def step(x, cond, rows):
        t, s = levels(grids, K[rows], torch.full_like(rows, i).minimum(K[rows] - 1), x.device)
        noise = None if fresh is None else fresh[rows.to(x.device)]
        return student_step(student, teacher.diffusion, x, t, s, cond, noise)[0]

    return advance_rows(x_in, chosen, cond, step)


def noise_level(args, draw, teacher, segment):
    """tau, uniform in raw time over the step's own interval (s, t), 2 % of it off both ends.  (B,).

    The interval and its 2 % are in t, after the shift: in raw time 2 % would be the cleanest 9 % of
    a single step under shift 5. --tau_range to_noise: up to the largest level T instead, of
    every step; last_to_noise: of the last, which lands at 0.
    """
    s, high = segment.s, segment.t
    if args.tau_range != "segment":
        to_noise = (s == 0) | (args.tau_range == "to_noise")
        high = torch.where(to_noise, torch.full_like(s, args.max_time), high)
    margin = 0.02 * (high - s)
    low, high = unshift(s + margin, teacher.shift), unshift(high - margin, teacher.shift)
    return shift(low + (high - low) * draw.spread("u"), teacher.shift)


def step_of_level(args, grid, tau):
    """k, the last step of a trajectory whose landings are noised to the level tau."""
    if args.tau_range == "segment":
        return next(k for k, s in enumerate(grid[1:]) if s < tau)
    return len(grid) - 2  # the step that lands at 0 sees every level


def landing(args, draw, student, teacher, segment):
    """The student's step, and the sample that is matched: x_s, or with --match clean x.

    -> x_s (B, ...), its level (B,), x.
    """
    noise = draw.noise("renoise") if args.renoise == "sde" else None
    where = segment.x_in, segment.t, segment.s, segment.student_cond
    x_s, x = student_step(student, teacher.diffusion, *where, noise)
    if args.match == "clean":
        return x, torch.zeros_like(segment.s), x
    return x_s, segment.s, x


def fresh_landing(args, draw, student, teacher, grids, see):
    """A step of new samples, for the fake alone.  -> Segment, x_s (B, ...), its level (B,), x."""
    with torch.no_grad():
        segment = draw_segments(args, draw, student, teacher, grids, see)
        return segment, *landing(args, draw, student, teacher, segment)


def regresses_x_s(args, prediction):
    """Whether the loss moves x_s, where the step lands (paper), or the step's x (demo).

    --regress, or by what networks predict, so that no step drowns the others: Eq. 11 pulls every
    sample with strength 1. Predicted noise moves x by sigma / alpha, for PixArt 157 at t = 1 and
    .95 at t = .25, so that regressing x would train the first step alone; it moves x_s by 8.1 to
    .95. A predicted x or velocity moves x by .25 to 1 in four steps, but x_s up to 19 times less at
    the first than at the last.
    """
    if args.match == "clean":  # what is matched is x
        return False
    if args.regress is None:
        return prediction in ("eps", "score")
    return args.regress == "x_s"


def chosen_fake_loss(args, fake, diffusion, x, x_s, eps, s, tau, cond):
    """The fake's loss that --fake_target, --fake_weight and --fake_noise ask for.  -> scalar."""
    if args.fake_noise == "fresh":  # ablation: noised x, and used at noised-on x_s all the same
        x_s, s = x, torch.zeros_like(s)
    at_tau = x_s, eps, s, tau, cond
    if args.fake_target == "exact":
        of_eps = args.fake_weight == "snr"
        loss = exact_fake_loss_of_eps if of_eps else exact_fake_loss
        return loss(fake, diffusion, *at_tau)
    loss = snr_fake_loss if args.fake_weight == "snr" else fake_score_loss
    return loss(fake, diffusion, x, *at_tau)


def train(args):
    run = Run(args, "tdm")
    teacher = start_teacher(run)
    teacher.conditions = Conditions(args, teacher.base)
    diffusion, scale = teacher.diffusion, args.guidance_scale
    # T = grid[0] > ... > 0 for every K
    grids = {n: trajectory(n, teacher.shift, args.max_time) for n in args.student_steps}
    see_K, of_x_s = sees_K(args, teacher.base), regresses_x_s(args, teacher.prediction)
    see = see_K, fake_sees_step(args, teacher.base)
    student = new_student(run, teacher, see_K)
    fake = trainable(run, teacher.base, "fake", args.fake_lora_rank, any(see))
    freeze_teacher(run, teacher)
    run.spread_tokens(teacher.net, student, fake)
    try_network(teacher.base, teacher, run.device)
    ema = average_of(run, student)
    adam = dict(betas=tuple(args.adam_betas), weight_decay=args.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, **adam)
    optimizer_fake = torch.optim.AdamW(fake.parameters(), lr=args.learning_rate_fake, **adam)
    networks = dict(student=student, fake=fake, ema=ema)
    run.start(**networks, optimizer=optimizer, optimizer_fake=optimizer_fake)  # resumed, if asked
    samplers = student_samplers(run, ema, teacher, grids, see_K, args.renoise)
    report.introduce(run, teacher, teacher.base, describe(args, grids, see))
    longest = max(grids)
    k = step_of_level(args, grids[longest], FILM_LEVEL)
    steps_k = fake_steps_input(grids, longest, k, see) if any(see) else None
    film = film_of_scores(run, teacher, samplers[longest], fake, steps_k)

    for step in run.steps():
        warmup, decay = run.rate(step)
        optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * decay
        optimizer_fake.param_groups[0]["lr"] = args.learning_rate_fake * warmup * decay

        # ---- student: one update on its own samples; teacher and fake are constants
        seen = []
        for draw in run.micro_batches(step, "student", teacher):
            with run.autocast():
                segment = draw_segments(args, draw, student, teacher, grids, see)
                x_s, s, x = landing(args, draw, student, teacher, segment)  # the one with gradient
                tau, eps = noise_level(args, draw, teacher, segment), draw.noise("eps")
                conds = *segment.conds, segment.fake_cond
                at_tau = diffusion, eps, s, tau, *conds, scale
                slope = None  # x is regressed, where it is not x_s
                if of_x_s:
                    slope = step_slope(teacher.schedule, segment.t, s, args.renoise)
                if of_x_s and args.loss == "pseudo_huber":
                    loss, g, *mu = tdm_loss(x_s, teacher.net, fake, *at_tau, slope)
                else:
                    how = dict(loss=args.loss, slope=slope)
                    loss, g, *mu = tdm_loss_variant(x, x_s, teacher.net, fake, *at_tau, **how)
            (loss * run.share).backward()
            run.note(loss=loss)
            run.note_rms(g=g)
            run.note_scores(*mu)  # mu_real, mu_fake
            run.note_samples(x)
            if args.reuse_samples:  # in the fake's first update, micro-batch by micro-batch
                seen.append((segment, x_s.detach(), s, x.detach()))
        run.update(optimizer, "student")

        # ---- fake score: R updates on landings of the student
        for inner in range(args.fake_update_ratio):
            for draw in run.micro_batches(step, inner, teacher):
                with run.autocast():
                    kept = seen.pop(0) if seen else None
                    segment, x_s, s, x = kept or fresh_landing(
                        args, draw, student, teacher, grids, see
                    )
                    tau, eps = noise_level(args, draw, teacher, segment), draw.noise("eps")
                    at_tau = x_s, eps, s, tau, segment.fake_cond
                    loss = chosen_fake_loss(args, fake, diffusion, x, *at_tau)
                (loss * run.share).backward()
                run.note(loss_fake=loss)
            run.update(optimizer_fake, "fake")
        if args.ema_decay:
            run.update_ema(ema, student, step)
        film.frame(step)
        if run.end_step(step, show=("loss_fake", "loss", "std")):  # True: time to save
            rows = {f"{n} step(s), update {step + 1}": f for n, f in samplers.items()}
            report.save_previews(run, teacher, rows)
            save_student(run, teacher, ema, grids, see_K)
            run.save(step)
    if run.first >= args.max_train_steps:  # a finished run is written out again, perhaps elsewhere
        save_student(run, teacher, ema, grids, see_K)
    parameters = sum(p.numel() for p in ema.eval().parameters())
    students = {f"student_{n}": (n, f) for n, f in samplers.items() if n != longest}
    students = {"student": (longest, samplers[longest]), **students}
    report.finish(run, teacher, grids[longest][:-1], students, parameters)


# ---- what the run leaves behind ------------------------------------------------------------------


def describe(args, grids, see):
    """The student's step counts in words, and a note where its fake mixes up steps."""
    counts, (see_K, see_k) = " or ".join(map(str, grids)), see
    on_K = ", conditioned on which" if see_K else ""
    times = ", ".join(f"{t:.4g}" for t in grids[max(grids)][:-1])
    mixed = args.tau_range != "segment" and max(grids) > 1 and not see_k
    note = (
        f"; note: with --tau_range {args.tau_range} the steps' intervals overlap, and this fake, "
    )
    note += "which is not conditioned on the step, learns their mixture"
    about = f"{counts} step(s){on_K}, {args.renoise}; the longest at t = {times}"
    return about + note if mixed else about


def save_student(run, teacher, net, grids, see_K):
    """student/ as in every script; sampler.json also has the grid of every K.

    A student that is conditioned on K has that input in its config.
    """
    changes = {"steps_cond": True} if see_K else {}
    more = dict(grids={str(n): g for n, g in grids.items()}, steps_cond=see_K)
    report.save_student(run, teacher, net, grids[max(grids)][:-1], changes, **more)


def student_samplers(run, student, teacher, grids, see_K, renoise):
    """-> {K: a function (index, first, last) -> student samples in K steps}, the longest first."""

    def sampler(n):
        def samples(index, first, last):
            noise = report.evaluation_noise(run, teacher.shape, first, last)
            cond, _ = teacher.conditions.pick(index[first:last], run.device)
            if see_K:
                cond["steps"] = torch.full((last - first,), float(n), device=run.device)
            return sample(student, teacher.diffusion, noise, grids[n], cond, renoise)

        return samples

    return {n: sampler(n) for n in sorted(grids, reverse=True)}


def sample_only(args):
    """--sample FOLDER: load a saved student and its sampler.json, write samples to --output_dir.

    In its longest step count, or in the one that --student_steps names. Raises UserError.
    """
    run = Run(args, "tdm")
    student, saved, teacher = report.load_student(run)
    grids = {int(n): grid for n, grid in saved["grids"].items()}
    asked = args.student_steps or [max(grids)]
    if len(asked) > 1 or asked[0] not in grids:
        counts = " ".join(map(str, asked))
        trained = ", ".join(map(str, sorted(grids)))
        raise UserError(f"--student_steps {counts}: this student has {trained}: name one of them")
    renoise = "sde" if saved["rule"] == "renoise" else "ode"
    grid = {asked[0]: grids[asked[0]]}
    samplers = student_samplers(run, student, teacher, grid, saved["steps_cond"], renoise)
    report.write_samples(run, teacher, samplers[asked[0]], asked[0])


# ---- what an update costs, for --dry_run ---------------------------------------------------------


def cost(args):
    """-> the networks, and the backward passes of one student update (models/plumbing/dry_run.py).

    The averages are over the student's step counts and their steps, and over the R fake updates, of
    which the first needs no samples of its own with --reuse_samples.
    """
    rank, rank_fake = args.lora_rank, args.fake_lora_rank
    networks = [
        Network("teacher", "teacher"),
        Network("student", "trained", rank, saved=True),
        Network("fake", "trained", rank_fake),
    ]
    if args.ema_decay:
        networks.append(Network("ema", "average", rank))
    # the student's calls that make its input
    before = sum((K - 1) / 2 for K in args.student_steps) / len(args.student_steps)
    R = args.fake_update_ratio
    make = {"student": (before + 1) * (R - args.reuse_samples) / R}
    guided = 1 if args.guidance_scale == 1 else 2
    calls = {"student": before, "teacher": guided, "fake": 1}
    return networks, [Turn("student", 1, calls, {"student": 1}), Turn("fake", R, make, {"fake": 1})]


# ---- flags ---------------------------------------------------------------------------------------

PRESETS = {  # the flags' defaults suit small DiTs; released: the paper's for PixArt-alpha, but
    # for one sample a rank and micro-batch (give --gradient_accumulation_steps for its batch of 32)
    "glyphs": dict(timestep_shift=2.0),
    "ring": dict(
        max_train_steps=600, learning_rate=5e-4, learning_rate_fake=1e-3, train_batch_size=256,
        ema_decay=0.95, adam_betas=[0.0, 0.99], lr_decay_share=0.7,
    ),
    "released": dict(
        max_train_steps=500, learning_rate=2e-6, learning_rate_fake=2e-5, fake_update_ratio=1,
        train_batch_size=1, ema_decay=0.0, adam_betas=[0.0, 0.999], max_grad_norm=1.0,
        lr_warmup_steps=0, lr_decay_share=0.0, student_steps=[4], preview_samples=2,
        gradient_checkpointing=True,
    ),
    "sample": dict(student_steps=None),
}  # fmt: skip


LONG_RUN = dict(learning_rate=4e-4, learning_rate_fake=2e-3)  # of small DiTs with --preset long


def presets(known):
    """PRESETS, where other flags matter too. known: a first reading of the command line."""
    if known.preset != "long":
        return PRESETS
    return {**PRESETS, "glyphs": {**PRESETS["glyphs"], **LONG_RUN}, "small": LONG_RUN}


# fmt: off
def parse_args(argv=None):
    p = distillation_parser("Distil a flow or diffusion teacher into a student of 1, 2 and 4 "
                            "deterministic steps (TDM, 2503.06674).")
    add_guidance_rescale_flag(p)
    p.set_defaults(max_train_steps=900, learning_rate=1.2e-3, lr_warmup_steps=20, ema_decay=0.995)
    paper_values(p, fake_update_ratio="1", adam_betas="0 .999", weight_decay="demo: .01",
                 lr_decay_share="not said", learning_rate_fake="2e-5, ten times the student's")
    add = p.method.add_argument
    add("--student_steps", type=number(int, 1), nargs="+", default=[1, 1, 2, 4],
        help="K, the student's step counts (paper: 4, or 1 2 4 in one); they take turns over a "
        "batch, one that is named twice has two")
    add("--max_time", type=number(float, high=1, above=0), default=1.0, metavar="T",
        help="t where the first step begins, after the shift (paper: 1; demo: .9)")
    add("--tau_range", choices=["segment", "to_noise", "last_to_noise"], default="segment",
        help="noise levels of a step: its own interval (paper), or up to T, for all or the last")
    add("--fake_target", choices=["importance", "exact"], default="importance",
        help="what the fake learns: the step's x with importance weights (paper), or exact "
        "denoising of x_s noised on")
    add("--fake_weight", choices=["network", "snr"], default="network",
        help="weight of the fake's loss: in the space of the prediction, or x0 times min(SNR, 5) "
        "(demo); with --fake_target exact snr is the noise's, |b / sigma_tau eps_fake - eps|^2")
    add("--loss", choices=["pseudo_huber", "demo", "l2"], default="pseudo_huber",
        help="Eq. 11 per sample (paper), per element and normalised (demo), or squares (Tab. 5)")
    add("--regress", choices=["x0", "x_s"], default=None, help="what the loss moves: the step's x "
        "(demo), or x_s where it lands (paper); None: x_s if the network predicts noise, where x "
        "would train the first step alone, else x0")
    add = p.ablations.add_argument
    add("--shared_fake", action="store_true",
        help="the fake is not conditioned on the step, only on K (paper)")
    add("--no_steps_cond", action="store_true",
        help="condition neither student nor fake on K (Tab. 5), nor the fake on the step: to be "
        "compared with --shared_fake")
    add("--match", choices=["noisy", "clean"], default="noisy",
        help="match x_s where the step lands (paper), or its x (Tab. 7)")
    add("--fake_noise", choices=["bridge", "fresh"], default="bridge",
        help="what the fake sees: x_s noised on (paper), or x noised afresh (Tab. 5, without "
        "importance sampling)")
    add("--renoise", choices=["ode", "sde"], default="ode",
        help="between student steps: the noise that the step implies (paper), or fresh noise")
    return parse(p, argv, "tdm", presets, wrong_flags)


def wrong_flags(a):
    """Flags that do not go together: pairs (wrong, why)."""
    clean, x_s = a.match == "clean", a.regress == "x_s"
    both = clean and a.fake_noise == "fresh"
    yield both, "--fake_noise: with --match clean the fake sees noised x anyway; leave it out"
    yield x_s and clean, "--regress x_s: with --match clean x itself is matched; leave it out"
    yield x_s and a.loss == "demo", "--regress x_s: --loss demo is of x; leave one of them out"
    counts = a.student_steps or []  # None with --sample
    several, listed = len(set(counts)) > 1 and not a.no_steps_cond, " ".join(map(str, counts))
    for flag in ("lora_rank", "fake_lora_rank"):
        yield several and getattr(a, flag), (
            f"--{flag}: an adapter cannot be conditioned on the number of steps, and there are "
            f"several, --student_steps {listed}: give one of them, or --no_steps_cond (a penalty "
            "in Tab. 5)")
# fmt: on


def main(argv=None):
    args = parse_args(argv)

    def check(args, teacher):
        refuse(wrong_flags(args))
        sees_K(args, teacher.base)

    if args.sample:
        sample_only(args)
    elif not dry_run(args, *cost(args), check=check):
        train(args)
        work_done(args, *cost(args))


if __name__ == "__main__":
    run_main(main)
