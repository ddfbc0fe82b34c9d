"""Phased DMD (2510.27684 v3): few-step students as experts, one for each interval of noise levels.

The idea. DMD matches a student of N steps at its final sample. A gradient through all N steps costs
N times the memory. Cutting the rollout short at a random step (DMD2's "stochastic gradient
truncation") trains every step to jump to the data now and then, and diversity and motion fade.
So the noise levels are split into K phases, and one expert after another is trained, from noise to
data. Expert k carries the frozen experts' sample on to the end of its phase, x_s, which is still
noisy, and is matched there: x_s is noised on from level s to t, and the scores of teacher and fake
are compared at x_t. The fake has to learn the score of x_t from samples x_s that are not
alpha x_0 + sigma eps of a known x_0, so regressing eps - x_s would be biased. Eq. 11's target
is not: it is the velocity that belongs to the score of x_t given x_s, whose mean given x_t is the
score of x_t.

    paper                     here          meaning                                      shape
    t_0 > ... > t_N           grid          the student's times, shifted, from 1 to 0    N+1 floats
    s_k                       phase.s, s    end of phase k; scores are taken on (s, 1)   float, (B,)
    G_k                       phase.expert  the network that takes its steps             -
    F_k                       phase.fake    score of the experts' samples                -
    T                         teacher.net   frozen, guided                               -
    j - 1                     k             the student step with a gradient             (B,)
    x_s                       x_s           the experts' sample at the end of the phase  (B, ...)
    x_t                       x_t           x_s noised on, a x_s + b eps                 (B, ...)
    alpha_{t|s}, sigma_{t|s}  a, b          its coefficients (Eq. 2)                     (B,)

Launch.
    laptop      python phased_dmd.py        # clips, 4 steps, 2 phases, seven minutes on two cores
                python phased_dmd.py --teacher ring              # a minute
                python phased_dmd.py --phases 4                  # one step per phase (Table 6)
    baselines   python phased_dmd.py --phases 1                  # DMD with truncation (Fig. 1b)
                python phased_dmd.py --phases 1 --no_truncation  # vanilla few-step DMD (Fig. 1a)
    paper       python phased_dmd.py --dmd_weight paper --taper all --shared_fake \
                    --one_step --fake_update_ratio 5 --ema_decay 0
    torchrun    torchrun --nproc-per-node 8 phased_dmd.py --teacher Wan2.2-T2V-A14B-Diffusers \
                    --prompts prompts.safetensors --mixed_precision bf16 \
                    --fake_lora_rank 64 --sample_shape 16 1 90 160
    sampling    python phased_dmd.py --sample runs/phased_dmd-clips/student

Deviations; reasons in docs/phased_dmd.md. The gradient has DMD's normalised weight. Eq. 13's taper
is left out where s = 0. With several steps in a phase every sample has its own (--one_step: one for
the batch) and the fake is conditioned on it. The first of its R updates sees the samples of the
expert's update before it. Noise levels are spread evenly over a batch, none below .02 in the
student's turn. Full copies, averaged weights, betas and falling rates suit short runs of small
networks.
"""

import gc
import math
import os
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.diffusion import Flow, advance_rows, expand, shift, step_grid, transition, unshift
from models.draws import Draws
from models.files import UserError, load_json
from models.networks import load_network, lora, own_entries, save_network
from models.plumbing import report
from models.plumbing.data import Conditions, in_space_of, try_network
from models.plumbing.dry_run import Network, Turn, dry_run, is_pair
from models.plumbing.film import film_of_scores
from models.plumbing.flags import (
    add_guidance_rescale_flag,
    add_step_flag,
    distillation_parser,
    number,
    paper_values,
    parse,
    refuse,
)
from models.plumbing.run import Run, refuse_output_dir, run_main
from models.plumbing.state import unpack, unpack_optimizer
from models.plumbing.teachers import (
    Teacher,
    average_of,
    describe_adapters,
    freeze_teacher,
    is_small,
    load_adapter,
    load_start,
    network_from,
    read_own_sampler,
    saved_teacher,
    set_clock,
    start_teacher,
    student_folder,
    trainable,
    wrong_base,
)
from models.plumbing.work import work_done
from models.worlds import WORLDS
from models.worlds.measures import energy_distance

# ---- the losses. x_s, eps (B, ...), levels s < t (B,); diffusion: noise schedule and prediction --


def subinterval_target(diffusion, x_s, eps, s, t):
    """What the fake regresses at x_t = a x_s + b eps, so that it learns the score of x_t (Eq. 11).

    The score of x_t given x_s is -eps / b, and its mean given x_t is the score of x_t, whatever the
    law of x_s. Read as noise, that score is (sigma_t / b) eps; read as a clean sample, it is
    x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 b) eps (Eq. 12). Any prediction combines the two.
    For flow it is their difference, Eq. 11:

        [t + (1 - t) s^2 / (1 - s)^2] / b eps - x_s / (1 - s)

    s = 0 gives the usual targets.  -> (B, ...).
    """
    schedule = diffusion.schedule
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    _, b = transition(schedule, s, t)  # (B,)
    y_eps = expand(sigma_t / b, x_s) * eps
    y_x0 = x_s / expand(alpha_s, x_s) - expand(alpha_t * sigma_s**2 / (alpha_s**2 * b), x_s) * eps
    return diffusion.target(y_x0, y_eps, t)


def taper(diffusion, s, t, high=10.0):
    """Eq. 13's weight of Eq. 11's loss, small where t comes near s and the target grows as 1 / b.

    clamp(1 / b^2, 0, high) |b F - b y|^2 = min(1, high b^2) |F - y|^2.  -> (B,).
    """
    b2 = transition(diffusion.schedule, s, t)[1] ** 2
    return (1 / b2).clamp(max=high) * b2


def fake_score_loss(fake, diffusion, x_s, eps, s, t, cond, target=subinterval_target, weight=taper):
    """The fake's loss on detached student samples x_s, noised on to t (Eq. 13).  -> scalar.

    The target is noisy: for flow and data of variance 1 its variance given x_t is 1 + s^2 / (1-s)^2
    at t = 1, and more nearer to s. target, weight: the paper's, or one of the variants below.
    """
    x_s = x_s.detach()
    x_t = diffusion.noise_on(x_s, eps, s, t)
    error = fake(x_t, t, **cond).float() - target(diffusion, x_s, eps, s, t)
    return (weight(diffusion, s, t) * error.square().flatten(1).mean(1)).mean()


def paper_direction(x0, mu_real, mu_fake, diffusion, s, t):
    """g = a (score_fake - score_real), how the KL at t grows with x_s (Eq. 10).  -> (B, ...).

    a = alpha_{t|s} is dx_t/dx_s, and the scores differ by alpha_t (mu_fake - mu_real) / sigma_t^2.
    For flow g = (1 - t)^2 / (t (1 - s)) (v_real - v_fake).
    """
    a, _ = transition(diffusion.schedule, s, t)
    w = a * diffusion.schedule.alpha(t) / diffusion.schedule.sigma(t) ** 2
    return expand(w, mu_real) * (mu_fake - mu_real)


def phased_dmd_loss(
    x_s, x0, teacher, fake, diffusion, eps, s, t, cond, uncond, fake_cond, guidance_scale,
    direction=paper_direction,
):  # fmt: skip
    """The student's distribution matching loss at the end of a phase (Eq. 10).

    -> scalar; g, mu_real, mu_fake (B, ...), constants, for the log.

    Its gradient in x_s, with all else constant, is g / numel(x_s), where g is the paper's direction
    or the normalised one below. x0 (B, ...) is what the student's own last call implies; only the
    normalised direction uses it. teacher and fake are networks, called as net(x_t, t, **cond).
    """
    with torch.no_grad():
        x_t = diffusion.noise_on(x_s, eps, s, t)
        mu_real = diffusion.guided_x0(teacher, x_t, t, cond, uncond, guidance_scale)
        mu_fake = diffusion.x0(fake, x_t, t, **fake_cond)
        g = direction(x0, mu_real, mu_fake, diffusion, s, t)
    return 0.5 * F.mse_loss(x_s, (x_s - g).detach()), g, mu_real, mu_fake


# ---- variants of loss, direction, target and taper -----------------------------------------------


def clean_sample_loss(x0, g):
    """The value of `phased_dmd_loss`, with g sent into the step's clean sample x0.  -> scalar.

    The authors' trainer does that with the normalised direction. A flow step from t_k has x_s =
    x_in - (t_k - s) v and x0 = x_in - t_k v, so that v gets -t_k g in place of -(t_k - s) g: sizes
    1 and .9375 in place of .1667 and .1042 in the first of two phases at shift 5. Where s = 0 both
    are the same.
    """
    return 0.5 * F.mse_loss(x0, (x0 - g).detach())


def normalized_direction(x0, mu_real, mu_fake, diffusion, s, t):
    """DMD's own weight (2311.18828, Eq. 8), the default: all noise levels pull alike.

    g = (mu_fake - mu_real) / mean|x0 - mu_real|, with one mean for each sample.  -> (B, ...).
    """
    error = (x0 - mu_real).abs().flatten(1).mean(1)  # (B,)
    return (mu_fake - mu_real) / expand(error.clamp_min(1e-8), mu_real)


def naive_target(diffusion, x_s, eps, s, t):
    """Ablation: the biased target that takes x_s for clean, eps - x_s for flow (Fig. 2c)."""
    return diffusion.target(x_s, eps, t)


def inner_taper(diffusion, s, t):
    """Eq. 13's weight where s > 0, the default: at s = 0 nothing is singular.  -> (B,)."""
    return torch.where(s > 0, taper(diffusion, s, t), 1.0)


def no_taper(diffusion, s, t):
    """Eq. 11's loss as it stands.  -> (B,)."""
    return torch.ones_like(t)


TARGETS = {"subinterval": subinterval_target, "naive": naive_target}  # by the flags' values
TAPERS = {"all": taper, "inner": inner_taper, "none": no_taper}
DIRECTIONS = {"paper": paper_direction, "normalized": normalized_direction}


# ---- the sampler. experts: one network for each step ---------------------------------------------


def student_step(expert, diffusion, x_in, t, t_next, cond):
    """One Euler step from t, a float or (B,), to t_next.  -> x at t_next, the x0 implied there."""
    x0, eps = diffusion.x0_eps(expert, x_in, t, **cond)
    return diffusion.add_noise(x0, eps, t_next), x0


def rollout(experts, diffusion, x, times, cond):
    """Euler from times[0] to times[-1], len(times) - 1 steps; the i-th is taken by experts[i]."""
    for expert, t, t_next in zip(experts, times[:-1], times[1:]):
        x, _ = student_step(expert, diffusion, x, t, t_next, cond)
    return x


@torch.no_grad()
def sample(experts, diffusion, z, times, cond):
    """The few-step sampler: len(times) calls, no guidance.  z (B, ...) -> x0 (B, ...).

    experts: the network of each step, one for each of times, which are without the final 0. Raises
    ValueError for another number.
    """
    if len(experts) != len(times):
        raise ValueError(f"{len(experts)} experts for {len(times)} steps: give one for each step")
    return rollout(experts, diffusion, z, [*times, 0.0], cond)


# ---- experts and phases --------------------------------------------------------------------------


@dataclass
class Phase:
    """Phase k of K: what is fixed about it, and its networks.

    expert, fake and ema are full networks or lora.Adapted, adapters on the frozen base.
    """

    number: int  # k, from 1
    steps: range  # the student's steps that its expert takes
    s: float  # the noise level at which it ends; teacher and fake are compared on (s, 1)
    u_end: float  # the same level before the shift
    t_min: float  # t is clamped to this: the boundary, if only the high-noise network takes part
    start: int  # its updates are start ... end - 1
    end: int
    base: nn.Module  # the teacher's network in charge of its steps
    init: nn.Module  # what the expert starts from: base, or the network of --student_init
    fake_base: nn.Module  # what the fake starts from: all that is in charge somewhere on (s, 1)
    idle: nn.Module | None  # the teacher's network that is in charge nowhere on (s, 1), if any
    start_adapter: str | None = None  # of base: what the expert begins as (--student_init)
    expert: Any = None  # stays; all below exists while the phase is being trained
    fake: Any = None
    ema: Any = None  # the expert's average, or the expert itself
    optimizer: torch.optim.Optimizer | None = None
    optimizer_fake: torch.optim.Optimizer | None = None
    see_step: bool = False  # whether the fake is conditioned on the student's step


def phase_steps(student_steps, phases):
    """Which of N steps belong to each of K phases, as evenly as possible.  -> K ranges."""
    ends = [round(student_steps * k / phases) for k in range(phases + 1)]
    return [range(first, end) for first, end in zip(ends[:-1], ends[1:])]


def plan_phases(run, teacher):
    """-> the K phases, without networks of their own. Raises UserError."""
    args = run.args
    N, K, updates = args.student_steps, args.phases, args.max_train_steps
    grid, phases = step_grid(N, teacher.shift), []
    for i, steps in enumerate(phase_steps(N, K)):
        base = network_at(teacher, grid[steps.start])
        high = base is not teacher.base and base is teacher.base.high
        phases.append(
            Phase(
                number=i + 1,
                steps=steps,
                s=grid[steps.stop],
                u_end=1 - steps.stop / N,
                t_min=teacher.base.boundary if high else 0.0,
                start=round(updates * i / K),
                end=round(updates * (i + 1) / K),
                base=base,
                init=base,
                fake_base=base if high else teacher.base,
                idle=teacher.base.low if high else None,
            )
        )
    if args.student_init:
        set_starts(run, teacher, phases)
    return phases


def network_at(teacher, t):
    """The base network of a student's step at time t: of two networks one (Wan 2.2)."""
    if not hasattr(teacher.base, "boundary"):
        return teacher.base
    return teacher.base.high if is_high(t, teacher.base.boundary) else teacher.base.low


def is_high(t, boundary):
    """Whether a student's step at t belongs to the high-noise network.

    One at exactly the boundary is not: LightX2V decides by a step's index, and at shift 7 the third
    of four steps, t = .875, is of the low-noise network. The teacher is asked for scores on either
    side by its own rule, t >= boundary.
    """
    return t > boundary + 1e-6


def set_starts(run, teacher, phases):
    """What the experts start from, of --student_init: full experts from a network, else from an
    adapter of their base. Raises UserError."""
    args, loaded = run.args, {}
    previous = args.expert_init == "previous"
    sources = starting_sources(args.student_init, teacher, phases, previous)
    for phase, source in zip(phases, sources):
        if args.lora_rank:
            phase.start_adapter = load_start(args, phase.base, f"expert{phase.number}", source)
            continue
        key = source, id(phase.base)
        if key not in loaded:
            loaded[key] = network_from(run, source, teacher, phase.base)
        phase.init = loaded[key]


def starting_sources(init, teacher, phases, previous=False):
    """--student_init -> for every phase the LoRA file or the folder of a network that is meant.

    init itself, or what a folder has for each: experts of ours, or a pair for two networks under
    LightX2V's or diffusers' names. previous: --expert_init says so. Raises UserError.
    """
    folder, K = student_folder(init), len(phases)
    pairs = {
        "transformer": ["high_noise_model.safetensors", "transformer"],
        "transformer_2": ["low_noise_model.safetensors", "transformer_2"],
    }

    def inside(number, which=None):
        names = [f"expert{number}.safetensors", f"expert{number}", *pairs.get(which, [])]
        paths = [os.path.join(folder, name) for name in names]
        return next((path for path in paths if os.path.exists(path)), None)

    found = [inside(phase.number, side(teacher, phase)) for phase in phases]
    if inside(K + 1) or (any(found) and not all(found)):
        raise UserError(f"--student_init {init} does not have one expert for each of {K} phases")
    if any(found):
        if previous:
            raise UserError(
                f"--expert_init previous: {init} has a network for each expert: leave it out"
            )
        return found
    if hasattr(teacher.base, "boundary"):
        raise UserError(
            f"--student_init {init} is one network, and this teacher has two: give a folder with "
            "high_noise_model.safetensors and low_noise_model.safetensors"
        )
    return [init] * K


def per_step(phases, networks):
    """One network for each phase -> one for each of the student's steps."""
    return [net for phase, net in zip(phases, networks) for _ in phase.steps]


def fake_sees_step(args, phase):
    """Whether the fake is conditioned on the step of the phase that came last (docs/dmd.md)."""
    off = args.no_truncation or args.shared_fake or args.fake_lora_rank
    return len(phase.steps) > 1 and not off and "steps_cond" in phase.fake_base.config


def step_input(k, draw, on):
    """What the fake is conditioned on beside the sample's own condition: the step that made it."""
    return {"steps": k.float().to(draw.device)} if on else {}


# ---- training ------------------------------------------------------------------------------------


def frozen_teacher(run):
    """-> Teacher; its base is the network that experts and fakes are copies of, or adapters on."""
    teacher = start_teacher(run, two_networks=True)
    freeze_teacher(run, teacher)
    teacher.base.gradient_checkpointing = run.args.gradient_checkpointing
    return teacher


def start_phase(run, phases, phase, info, saved):
    """Networks and optimisers of a phase: new ones, or those of the checkpoint.

    Expert and fake start from the teacher. info, saved: see `read_state`.  -> False for a phase
    that was over when the run was interrupted.
    """
    args, n, resumed = run.args, phase.number, info["phase"] + 1
    phase.expert = trainable(run, phase.init, f"expert{n}", args.lora_rank)
    before = phases[: n - 1]
    if args.expert_init == "previous" and before and before[-1].base is phase.base:
        phase.expert.load_state_dict(before[-1].expert.state_dict())
    if saved and n <= resumed:
        unpack(phase.expert, f"expert{n}", saved)
    if n < resumed:
        phase.expert.requires_grad_(False)
        return False
    phase.start = info["phase_start"] if n == resumed else max(info["step"], phase.start)
    phase.see_step, rank = fake_sees_step(args, phase), args.fake_lora_rank
    phase.fake = trainable(run, phase.fake_base, f"fake{n}", rank, phase.see_step)
    phase.ema = average_of(run, phase.expert, f"ema{n}")
    adam = dict(betas=tuple(args.adam_betas), weight_decay=args.weight_decay, fused=True)
    rate, rate_fake = args.learning_rate, args.learning_rate_fake
    phase.optimizer = torch.optim.AdamW(phase.expert.parameters(), lr=rate, **adam)
    phase.optimizer_fake = torch.optim.AdamW(phase.fake.parameters(), lr=rate_fake, **adam)
    if saved and n == resumed:
        unpack(phase.fake, "fake", saved)
        if args.ema_decay and saved.has("ema"):  # else it begins as the expert
            unpack(phase.ema, "ema", saved)
        unpack_optimizer(phase.optimizer, "optimizer", saved)
        unpack_optimizer(phase.optimizer_fake, "optimizer_fake", saved)
    return True


def set_aside(phase, device):
    """Move the network that the phase never calls to the host's memory, "cpu", or back."""
    if phase.idle is not None:
        phase.idle.to(device)


def end_phase(args, phase, device):
    """The expert is frozen, as its average; everything else of the phase is dropped."""
    set_aside(phase, device)
    if args.ema_decay:
        phase.expert.load_state_dict(phase.ema.state_dict())
    phase.expert.requires_grad_(False)
    for net in (phase.fake, phase.ema):
        if net is not phase.expert and isinstance(net, lora.Adapted):
            lora.remove(net.net, net.adapter)
    phase.fake = phase.ema = phase.optimizer = phase.optimizer_fake = None
    gc.collect()  # a fused AdamW and its moments refer to each other


def student_sample(args, draw, phase, experts, teacher, grid, gradient):
    """The experts' sample at the end of the phase (Fig. 1d).

    For every sample a step k of the phase is drawn, which jumps from t_k to s; the steps before it
    are taken in full, without gradient. The steps are spread evenly over a batch, or,
    with --one_step, it shares one. gradient: whether the jump has one.
    -> x_s, the x0 that the jump implies (B, ...), cond, uncond, k (B,) on the CPU.
    """
    (cond, uncond), first = teacher.conditions.draw(draw), phase.steps.start
    k = first + draw.steps(len(phase.steps), args.one_step)
    last = int(k[0]) if args.one_step else phase.steps[-1]  # the same on all ranks

    def step(x, cond, rows):  # these rows, from grid[i] to grid[i + 1]; i: the loop's below
        return student_step(experts[i], teacher.diffusion, x, *grid[i : i + 2], cond)[0]

    with torch.no_grad():
        x_in = rollout(experts, teacher.diffusion, draw.noise("z"), grid[: first + 1], cond)
        for i in range(first, last):
            x_in = advance_rows(x_in, k > i, cond, step)
    t = torch.tensor(grid)[k].to(draw.device)
    with torch.set_grad_enabled(gradient):
        x_s, x0 = student_step(experts[first], teacher.diffusion, x_in, t, phase.s, cond)
    return x_s, x0, cond, uncond, k


def student_sample_all_steps(args, draw, phase, experts, teacher, grid, gradient):
    """Ablation (--no_truncation): all steps of the phase, with gradient through all of them.

    With one phase this is vanilla few-step DMD (Fig. 1a).  -> as student_sample.
    """
    cond, uncond = teacher.conditions.draw(draw)
    k, end = phase.steps.start, phase.steps.stop
    with torch.no_grad():
        x_in = rollout(experts, teacher.diffusion, draw.noise("z"), grid[: k + 1], cond)
    with torch.set_grad_enabled(gradient):
        x = rollout(experts[k:], teacher.diffusion, x_in, grid[k:end], cond)
        x_s, x0 = student_step(experts[-1], teacher.diffusion, x, grid[end - 1], phase.s, cond)
    return x_s, x0, cond, uncond, torch.full((len(draw.rows),), k)


def noise_above(draw, phase, t_low=0.0, t_high=1.0):
    """What x_s is noised on with, to a level t in (s, 1).  -> eps (B, ...), s, t (B,).

    u = unshift(t) is uniform where t is in (s, 1) and in [t_low, t_high] (Fig. 9), except for the
    first thousandth above s > 0, where Eq. 11's target is infinite. Where only a high-noise teacher
    is in charge, t is clamped to its boundary, not drawn again (App. B).
    """
    S = draw.timestep_shift
    u_low = phase.u_end + (1e-3 * (1 - phase.u_end) if phase.s else 0.0)
    u = draw.spread("u", max(u_low, unshift(t_low, S)), unshift(t_high, S))
    t = shift(u, S).clamp_min(phase.t_min)
    return draw.noise("eps"), torch.full_like(t, phase.s), t


def fill_gradients(net):
    """Zeros for missing gradients: one of two networks may have had no rows on this rank."""
    for p in net.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)


def train(args):
    run = Run(args, "phased_dmd")
    teacher = frozen_teacher(run)
    refuse(wrong_flags(args, teacher))
    teacher.conditions = Conditions(args, teacher.base)
    diffusion, scale = teacher.diffusion, args.guidance_scale
    target, weight = TARGETS[args.target], TAPERS[args.taper]
    direction = DIRECTIONS[args.dmd_weight]
    draw_sample = student_sample_all_steps if args.no_truncation else student_sample
    grid = step_grid(args.student_steps, teacher.shift)  # t_0 = 1 > ... > t_N = 0
    phases = plan_phases(run, teacher)
    run.spread_tokens(teacher.net, *(phase.init for phase in phases))
    try_network(teacher.base, teacher, run.device)
    info, saved = read_state(run, phases)
    run.spent, film = info["seconds"], None
    run.open_folder(info["step"])
    report.introduce(run, teacher, teacher.base, describe(args, grid, phases))

    for phase in phases:
        # ---- a new expert and a new fake, both from the teacher; earlier experts are constants
        if not start_phase(run, phases, phase, info, saved):
            continue  # it was over when the run was interrupted
        saved = None  # which closes its files: later phases start afresh
        set_aside(phase, "cpu")
        run.spread_tokens(phase.fake)  # which may be no copy: see with_step_input
        experts = per_step(phases, [p.expert for p in phases[: phase.number]])
        film = film_of_phase(run, phases, phase, teacher, grid, film)
        updates = phase.end - phase.start

        for step in run.steps(max(info["step"], phase.start), phase.end, f"phase {phase.number}"):
            n = step - phase.start  # rates and average start again in every phase
            warmup, decay = run.rate(n, left=(phase.end - step) / updates)
            phase.optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * decay
            phase.optimizer_fake.param_groups[0]["lr"] = args.learning_rate_fake * warmup * decay

            # ---- student: one update of the expert on its own samples; all else is constant
            seen = []
            for draw in run.micro_batches(step, "student", teacher):
                eps, s, t = noise_above(draw, phase, *args.dm_range)
                with run.autocast():
                    how = args, draw, phase, experts, teacher, grid
                    x_s, x0, cond, uncond, k = draw_sample(*how, gradient=True)
                    step_k = step_input(k - phase.steps.start, draw, phase.see_step)
                    at_t = diffusion, eps, s, t, cond, uncond, cond | step_k
                    loss, g, mu_real, mu_fake = phased_dmd_loss(
                        x_s, x0, teacher.net, phase.fake, *at_t, scale, direction
                    )
                    if args.regress == "x0":  # as the authors' trainer; Eq. 10 is of x_s
                        loss = clean_sample_loss(x0, g)
                (loss * run.share).backward()
                run.note(loss_dm=loss, g_dm=(g / g.numel()).norm())
                run.note_scores(mu_real, mu_fake)
                run.note_samples(x_s)
                if args.reuse_samples:  # in the fake's first update, micro-batch by micro-batch
                    seen.append((x_s.detach(), x0.detach(), cond, uncond, k))
            run.update(phase.optimizer, "student")

            # ---- fake score: R updates on samples of the experts
            for inner in range(args.fake_update_ratio):
                for draw in run.micro_batches(step, inner, teacher):
                    eps, s, t = noise_above(draw, phase)
                    with run.autocast():
                        how = args, draw, phase, experts, teacher, grid
                        kept = seen.pop(0) if seen else None
                        x_s, _, cond, _, k = kept or draw_sample(*how, gradient=False)
                        cond = cond | step_input(k - phase.steps.start, draw, phase.see_step)
                        loss = fake_score_loss(
                            phase.fake, diffusion, x_s, eps, s, t, cond, target, weight
                        )
                    (loss * run.share).backward()
                    run.note(loss_fake=loss)
                fill_gradients(phase.fake)
                run.update(phase.optimizer_fake, "fake")
            if args.ema_decay:
                run.update_ema(phase.ema, phase.expert, n)
            film.frame(step, save=step + 1 == phase.end)
            time_to_save = run.end_step(
                step, show=("loss_fake", "loss_dm", "std"), phase=phase.number
            )
            if time_to_save or step + 1 == phase.end:
                save(run, phases, phase, teacher, grid, step)
        end_phase(args, phase, run.device)

    trained = [phase.expert for phase in phases]
    save_student(run, trained, phases, teacher, grid)
    experts, times = per_step(phases, trained), grid[:-1]
    sampler = student_sampler(run, experts, teacher, times)
    more = {}
    if teacher.world:
        more["student"] = {"marginals": marginals(run, experts, teacher, grid)}
    parameters = sum(p.numel() for expert in trained for p in expert.parameters())
    report.finish(run, teacher, times, {"student": (len(times), sampler)}, parameters, more)


def describe(args, grid, phases):
    """The student in one line."""
    at = ", ".join(f"{t:.4g}" for t in grid[:-1])
    ends = ", ".join(f"{phase.s:.4g}" for phase in phases)
    kind = f"adapters of rank {args.lora_rank}" if args.lora_rank else "full networks"
    return (
        f"{args.student_steps} Euler step(s) at t = {at}, {args.phases} phase(s) ending at {ends}; "
        f"experts are {kind}"
    )


# ---- what the run leaves behind ------------------------------------------------------------------


def read_state(run, phases):
    """--resume_from_checkpoint -> its state.json, a SavedState (or None). Raises UserError.

    Beside what every state.json has, phase (from 0) and phase_start, the updates before it.
    """
    info, saved = run.read_state()
    updates = run.args.max_train_steps
    if info is None:
        return {"step": 0, "phase": 0, "phase_start": 0, "seconds": 0.0}, None
    for phase in phases[info["phase"] + 1 :]:
        if phase.end <= info["step"]:
            raise UserError(
                f"the checkpoint is at step {info['step']} in phase {info['phase'] + 1}, and with "
                f"--max_train_steps {updates} phase {phase.number} would end at step "
                f"{phase.end}, without an update: give more"
            )
    return info, saved


def save(run, phases, phase, teacher, grid, step):
    """samples.png, student/ and state/ after this step, on all ranks."""
    set_aside(phase, run.device)  # later experts begin as it
    trained = experts_so_far(phases, phase)
    sampler = sampler_so_far(run, phases, phase, teacher, grid)
    report.save_previews(run, teacher, {f"student, step {step + 1}": sampler})
    save_student(run, trained, phases, teacher, grid)
    things = {f"expert{p.number}": p.expert for p in phases[: phase.number]}
    things |= {"fake": phase.fake} | ({"ema": phase.ema} if run.args.ema_decay else {})
    things |= {"optimizer": phase.optimizer, "optimizer_fake": phase.optimizer_fake}
    run.save_state(step, things, phase=phase.number - 1, phase_start=phase.start)
    set_aside(phase, "cpu")


def experts_so_far(phases, phase):
    """The experts of the phases up to this one, of which the average stands for the expert."""
    return [p.expert for p in phases[: phase.number - 1]] + [phase.ema]


def sampler_so_far(run, phases, phase, teacher, grid):
    """The student's sampler during a phase; for later experts it has the teacher's networks, or
    those of --student_init."""
    later = phases[phase.number :]
    starts = [lora.Adapted(p.init, p.start_adapter) if p.start_adapter else p.init for p in later]
    experts = per_step(phases, experts_so_far(phases, phase) + starts)
    return student_sampler(run, experts, teacher, grid[:-1])


def film_of_phase(run, phases, phase, teacher, grid, film=None):
    """ring.gif: the teacher against the fake of this phase, at a level of its interval (s, 1).

    film: that of the phases before, which goes on. A fake that is conditioned on the step is asked
    for the last one. The film asks for the phase in training whenever it draws, so that nothing of
    a phase outlives it.
    """

    def now():
        return next(p for p in phases if p.fake)

    def sampler(index, first, last):
        return sampler_so_far(run, phases, now(), teacher, grid)(index, first, last)

    def fake(x_t, t, **cond):
        last = len(now().steps) - 1
        steps = {"steps": torch.full_like(t, float(last))} if now().see_step else {}
        return now().fake(x_t, t, **cond, **steps)

    t, names = max(0.4, phase.s + 0.2 * (1 - phase.s)), ("teacher", f"fake {phase.number}")
    film = film or film_of_scores(run, teacher, sampler, fake, t=t, names=names)
    film.t, film.names = t, names
    return film


def save_student(run, trained, phases, teacher, grid):
    """student/: expertK/ in the teacher's own layout, or an adapter's file or folder.

    sampler.json ties them to their steps. trained: the experts so far. All ranks call it.
    """
    args, folder = run.args, os.path.join(run.folder, "student")
    for phase, expert in zip(phases, trained):
        if args.lora_rank and run.main:
            times = " ".join(f"{t:.6g}" for t in grid)
            about = {"expert": f"{phase.number} of {len(phases)}", "times": times}
            report.save_adapter(run, expert, f"expert{phase.number}", **about)
        elif not args.lora_rank:
            path = os.path.join(folder, weights_name(args, phase))
            second = side(teacher, phase) == "transformer_2"
            config = {**(teacher.config_2 if second else teacher.config), **own_entries(expert)}
            dtype = report.save_dtype(run, teacher)
            save_network(expert, config, path, dtype=dtype, write=run.main)
    if not run.main:
        return
    report.save_autoencoder(run, teacher)
    described = [
        {
            "weights": weights_name(args, phase),
            "steps": len(phase.steps),
            "t": [grid[phase.steps.start], phase.s],
            "network": side(teacher, phase),
        }
        for phase in phases
    ]
    more = {"phase_ends": [phase.s for phase in phases], "experts": described}
    more |= describe_adapters(args, teacher)
    if hasattr(teacher.base, "boundary"):
        more["boundary_ratio"] = boundary_between(teacher, grid)
    report.save_sampler(run, teacher, grid[:-1], **more)


def weights_name(args, phase):
    """Where an expert is saved, in student/: a folder, or an adapter's file."""
    name = f"expert{phase.number}"
    return lora.saved_name(phase.init, name) if args.lora_rank else name


def boundary_between(teacher, grid):
    """The boundary_ratio by which t >= boundary_ratio gives every step its own expert.

    It is the teacher's, unless a step is at exactly that; then in the middle of the two steps.
    """
    boundary = teacher.base.boundary
    above = min(t for t in grid if is_high(t, boundary))
    below = max(t for t in grid if not is_high(t, boundary))
    return boundary if below < boundary - 1e-6 else (above + below) / 2


def side(teacher, phase):
    """Which network of a two-network pipeline an expert belongs to; None: the teacher has one."""
    if phase.base is teacher.base:
        return None
    return "transformer" if phase.base is teacher.base.high else "transformer_2"


def student_sampler(run, experts, teacher, times):
    """-> a function (index, first, last) -> samples of the conditions index[first:last]."""

    def draw(index, a, b):
        z = report.evaluation_noise(run, teacher.shape, a, b)("z")
        cond, _ = teacher.conditions.pick(index[a:b], run.device)
        return sample(experts, teacher.diffusion, z, times, cond)

    return draw


@torch.no_grad()
def marginals(run, experts, teacher, grid, n=1000):
    """How far the sampler's states are from the forward process, at every step of the grid.

    -> {t: energy distance of x_t to data noised to t, both averaged to 4 cells an axis}. For
    samples of the right law it is 0 on average. All ranks call it, and each draws all samples.
    """
    index, distances = teacher.conditions.preview(n), {}
    x = report.evaluation_noise(run, teacher.shape, 0, n)("z")
    x0 = teacher.world.data(n, 779, index if teacher.conditions.classes else None)[0]
    x0 = in_space_of(teacher.world, teacher.shape, x0)
    for i, t in enumerate(grid[1:]):
        with run.autocast():
            x = advance(run, experts[i], teacher, x, index, grid[i], t)
        eps = Draws(run.args.seed, "marginals", i, range(n)).normal("eps", teacher.shape)
        distances[f"{t:.4g}"] = energy_distance(
            coarse(x), coarse(teacher.diffusion.add_noise(x0, eps, t))
        )
    return distances


def advance(run, expert, teacher, x, index, t, t_next):
    """All samples one Euler step on, in batches.  x (n, ...) -> (n, ...) on the CPU."""

    def some(a, b):
        cond, _ = teacher.conditions.pick(index[a:b], run.device)
        x_in = x[a:b].to(run.device)
        return rollout([expert], teacher.diffusion, x_in, [t, t_next], cond)

    return report.many(some, len(index))[0]


def coarse(x):
    """Images and videos averaged to 4 cells an axis; points as they are.  -> (n, d)."""
    if x.dim() == 2:
        return x
    pool = {4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}[x.dim()]
    return pool(x, 4).flatten(1)


def load_student(run):
    """--sample -> its experts, one for each step, its sampler.json, a Teacher without networks.

    The latter has the schedule, the sample's shape, the world and the conditions. Raises UserError.
    """
    args = run.args
    folder, saved, schedule, prediction, own_shift = read_own_sampler(args.sample, run.method)
    refuse(wrong_flags_for(args, folder, saved))
    if saved["lora_rank"]:
        networks, world_name = load_adapters(run, folder, saved)
    else:
        paths = [os.path.join(folder, e["weights"]) for e in saved["experts"]]
        loaded = [load_network(path, place=run.place) for path in paths]
        for net, _ in loaded:
            set_clock(net, schedule)
        networks = [net for net, _ in loaded]
        world_name = loaded[0][1].get("world")
    like = Teacher(None, None, folder, schedule, prediction, own_shift, world_name, args.sample)
    like.conditions = Conditions(args, networks[0])
    like.shape = tuple(args.sample_shape or saved["sample_shape"])
    counts = [e["steps"] for e in saved["experts"]]
    experts = [net for net, steps in zip(networks, counts) for _ in range(steps)]
    return experts, saved, like


def load_adapters(run, folder, saved):
    """The saved adapters on the network that they belong on.  -> Adapted, the world's name.

    Raises UserError for a base that they do not fit.
    """
    teacher, networks = saved_teacher(run, saved, two_networks=True), []
    two = hasattr(teacher.base, "boundary")
    for i, e in enumerate(saved["experts"]):
        net = teacher.base
        if two:
            net = {"transformer": net.high, "transformer_2": net.low}.get(e["network"])
        if (e["network"] is None) == two:
            kind = "one network" if two else "two networks"
            given = run.args.teacher or saved["base"]
            raise UserError(
                f"{given} is no teacher of {kind}; the adapters belong on {saved['base']}, name it "
                "with --teacher"
            )
        path = os.path.join(folder, e["weights"])
        networks.append(load_adapter(net, f"expert{i + 1}", path, saved))
    return networks, teacher.world_name


def sample_only(args):
    """--sample FOLDER: load saved experts and their sampler.json, write samples to --output_dir."""
    run = Run(args, "phased_dmd")
    refuse_output_dir(run.folder, sampling=True)
    experts, saved, teacher = load_student(run)
    run.spread_tokens(*experts)
    sampler = student_sampler(run, experts, teacher, saved["times"])
    report.write_samples(run, teacher, sampler, len(experts))


# ---- what an update costs, for --dry_run ---------------------------------------------------------


def cost(args):
    """-> the networks, and the backward passes of one student update (models/plumbing/dry_run.py).

    The networks are those of the last phase, which holds most: the experts before it are there too.
    Calls are the mean over phases, which have equal shares of the updates; later ones make longer
    inputs. Of two networks both give scores in the last phase, and the fake follows both. Of the R
    fake updates the first needs no samples of its own with --reuse_samples.
    """
    pair, rank, number = is_pair(args.teacher), args.lora_rank, args.phases
    trained = f"expert{number}"
    networks = [Network("teacher", "teacher", pair=pair)]
    networks += [Network(f"expert{k}", "frozen", rank, saved=True) for k in range(1, number)]
    networks += [
        Network(trained, "trained", rank, saved=True),
        Network("fake", "trained", args.fake_lora_rank, pair),
    ]
    if args.ema_decay:
        networks.append(Network("ema", "average", rank))
    phases, graph = phase_steps(args.student_steps, number), 1
    before = fmean(steps.start + (len(steps) - 1) / 2 for steps in phases)  # calls for the input
    if args.no_truncation:
        before, graph = fmean(steps.start for steps in phases), max(map(len, phases))
    guided, R = 1 if args.guidance_scale == 1 else 2, args.fake_update_ratio
    make = {trained: (before + graph) * (R - args.reuse_samples) / R}
    calls = {trained: before, "teacher": guided, "fake": 1}
    return networks, [Turn(trained, 1, calls, {trained: graph}), Turn("fake", R, make, {"fake": 1})]


# ---- flags ---------------------------------------------------------------------------------------

PRESETS = {  # the flags' defaults suit small DiTs; what other teachers change of them
    "clips": dict(timestep_shift=2.0),
    "ring": dict(
        max_train_steps=600, learning_rate=5e-4, learning_rate_fake=1e-3, fake_update_ratio=5,
        train_batch_size=256, ema_decay=0.95, adam_betas=[0.0, 0.99], lr_decay_share=0.7,
        timestep_shift=3.0,
    ),
    "released": dict(  # the paper's values, where it gives any
        max_train_steps=800, train_batch_size=1, learning_rate=5e-5, learning_rate_fake=4e-7,
        fake_update_ratio=5, ema_decay=0.0, adam_betas=[0.0, 0.999], weight_decay=0.01,
        lr_warmup_steps=0, lr_decay_share=0.0, lora_rank=64, preview_samples=2, one_step=True,
        gradient_checkpointing=True,
    ),
    # Shift: Table 1, which has 3 for Qwen-Image, as releases.py has. Guidance: LightX2V's
    # phased_dmd configs. Other teachers keep their own of models/plumbing/releases.py.
    "WanTransformer3DModel": dict(timestep_shift=5.0, guidance_scale=4.0),
    **dict.fromkeys(("Wan 2.1 T2V 1.3B", "Wan 2.2 TI2V 5B"), dict(guidance_scale=5.0)),
}  # fmt: skip


def presets(known):
    """PRESETS, where other flags matter too. known: a first reading of the command line."""
    if known.sample:  # teacher, steps and phases are those of the saved student
        small = is_small_student(student_folder(known.sample))
        shown = {} if small else dict(train_batch_size=1, preview_samples=2)
        return {known.sample: dict(teacher=None, student_steps=None, phases=None, **shown)}
    return PRESETS


def is_small_student(folder):
    """Whether a saved student's experts are small networks of ours.

    A folder without a sampler.json is refused later.
    """
    path = os.path.join(folder, "sampler.json")
    base = load_json(path).get("base", "") if os.path.isfile(path) else ""
    known = os.path.exists(base) or base in WORLDS
    return is_small(base if known else os.path.join(folder, "expert1"))


# fmt: off
def parse_args(argv=None):
    p = distillation_parser("Distil a flow or diffusion teacher into few steps, one expert per "
                            "interval of noise (Phased DMD, 2510.27684). A teacher may have two "
                            "networks (Wan 2.2).")
    add_guidance_rescale_flag(p)
    p.set_defaults(teacher="clips", max_train_steps=500, train_batch_size=32, learning_rate=5e-4,
                   learning_rate_fake=2e-3, lr_warmup_steps=20, ema_decay=0.99, preview_samples=18)
    paper_values(p, fake_update_ratio="5", adam_betas="0 .999", weight_decay="not stated",
                 learning_rate="5e-5, of adapters", learning_rate_fake="4e-7", ema_decay="0",
                 lr_decay_share="not stated; here of each phase", lora_rank="64", lora_alpha="8",
                 fake_lora_rank="0")
    add_step_flag(p)
    add = p.method.add_argument
    add("--student_steps", type=number(int, 1), default=4,
        help="N, network calls of the student (paper: 4)")
    add("--phases", type=number(int, 1), default=2,
        help="K, phases that share out the steps and --max_train_steps, one expert each "
        "(paper: 2, and 4 in Table 6; 1 = few-step DMD)")
    add("--dmd_weight", choices=["normalized", "paper"], default="normalized",
        help="weight of the matching gradient: DMD's in x0 space, or Eq. 10 (paper)")
    add("--regress", choices=["x_s", "x0"], default="x_s",
        help="what the matching gradient moves: the sample at the end of the phase (paper, Eq. "
        "10), or the clean sample that its step implies, as the authors' trainer does; the same "
        "where s = 0")
    add("--taper", choices=["inner", "all", "none"], default="inner",
        help="Eq. 13's clamp: in phases with s > 0, in all (paper), or nowhere")
    add("--dm_range", type=number(float, 0, 1), nargs=2, default=[0.02, 1.0], metavar=("LO", "HI"),
        help="bounds of t, after the shift, in the student's loss, within (s, 1) of its phase "
        "(paper: (s, 1); Eq. 10's weight is infinite at 0)")
    add("--expert_init", choices=["teacher", "previous"], default="teacher",
        help="an expert starts from the teacher (paper), or from the expert before it if that is "
        "of the same network")
    add = p.ablations.add_argument
    add("--no_truncation", action="store_true",
        help="gradient through all steps of the phase (paper: off; with --phases 1 vanilla DMD)")
    add("--target", choices=["subinterval", "naive"], default="subinterval",
        help="what the fake regresses: Eq. 11 (paper), or the biased eps - x_s")
    add("--shared_fake", action="store_true",
        help="the fake is not conditioned on the student's step (paper)")
    return parse(p, argv, "phased_dmd", presets, wrong_flags, ignored_flags)


def ignored_flags(a):
    """Flags without effect beside the others: see `flags.unread`."""
    yield "target regress expert_init", a.phases == 1, (
        "with --phases 1 there is one expert, whose interval ends at 0")


def wrong_flags(a, teacher=None):
    """Flags that do not go together: pairs (wrong, why). teacher: None before it is loaded."""
    low, high = a.dm_range
    yield low >= high, f"--dm_range: LO must be below HI, got {low:g} {high:g}"
    if a.sample:  # the rest is about training
        return
    yield a.phases > a.student_steps, (
        f"--phases {a.phases}: every phase needs a step, and there are --student_steps "
        f"{a.student_steps}")
    yield a.max_train_steps < a.phases, (
        f"--max_train_steps {a.max_train_steps} are shared out over --phases {a.phases}: give at "
        "least one step each")
    if teacher is None:
        return
    grid = step_grid(a.student_steps, teacher.shift)
    s = grid[phase_steps(a.student_steps, a.phases)[0].stop]
    s = max(s, getattr(teacher.base, "boundary", 0))  # a high-noise network is not asked below it
    yield high <= s, (
        f"--dm_range {low:g} {high:g}: the first phase takes scores above {s:.4g}; give "
        f"--dm_range {low:g} 1")
    infinite = a.dmd_weight == "paper" and low == 0 and isinstance(teacher.schedule, Flow)
    yield infinite, "--dm_range 0: the weight of --dmd_weight paper is infinite at 0: give LO above"
    if hasattr(teacher.base, "boundary"):
        yield from wrong_steps(a.student_steps, a.phases, grid, teacher.base.boundary)


def wrong_steps(N, K, grid, boundary):
    """The same for a teacher of two networks: steps that leave a phase or a network without one."""
    above, at = [is_high(t, boundary) for t in grid[:-1]], [f"{t:.4g}" for t in grid]
    for steps in phase_steps(N, K):
        first, end = steps.start, steps.stop
        yield above[first] != above[end - 1], (
            f"steps {', '.join(at[first:end])} of one phase lie on both sides of the teacher's "
            f"boundary {boundary:g}: an expert starts from one of its two networks; use "
            + (f"--timestep_shift {fitting_shift(N, K, boundary):g}, or " if K > 1 else "")
            + f"--phases {N}")
    N, K = (N, max(K, 2)) if N > 1 else (4, 2)
    yield all(above), (
        f"all steps {', '.join(at[:-1])} lie above the teacher's boundary {boundary:g}: its "
        f"low-noise network would have none; use --student_steps {N} --phases {K} "
        f"--timestep_shift {fitting_shift(N, K, boundary):g}")


def fitting_shift(N, K, boundary):
    """A shift at which each of K > 1 phases is of one network, and both networks have one.

    It is the paper's 5 where that does it, else the nearest at which a phase ends at the boundary.
    """
    ends = [1 - steps.stop / N for steps in phase_steps(N, K)[:-1]]
    exact = [boundary * (1 - u) / (u * (1 - boundary)) for u in ends]  # shift(u, S) = boundary
    for S in [5.0, *sorted(exact, key=lambda S: abs(math.log(S / 5)))]:
        S = float(f"{S:g}")  # as a message has it
        above = [is_high(t, boundary) for t in step_grid(N, S)[:-1]]
        mixed = any(above[p.start] != above[p.stop - 1] for p in phase_steps(N, K))
        if not mixed and not all(above):
            return S


def wrong_flags_for(a, folder, saved):
    """The same for --sample: flags that do not go with the saved experts. saved: sampler.json."""
    times, lora_rank = saved["times"], saved["lora_rank"]
    own = {"student_steps": len(times), "phases": len(saved["experts"]),
           "timestep_shift": saved["timestep_shift"]}
    at = ", ".join(f"{t:.4g}" for t in times)
    for flag, value in own.items():
        asked = getattr(a, flag)
        if asked is not None:
            yield asked != value, (
                f"--{flag} {asked:g}: these experts were trained for {value:g}, on the steps {at}, "
                f"and know no others; leave --{flag} out")
    for e in saved["experts"]:
        yield not os.path.exists(os.path.join(folder, e["weights"])), (
            f"{folder} lacks {e['weights']}: its training ended before that phase; resume it")
    yield a.teacher and not lora_rank, (
        f"--teacher {a.teacher}: the experts of {folder} are full networks and need none; leave it "
        "out")
    if lora_rank:
        yield from wrong_base(a, folder, saved)
# fmt: on


def main(argv=None):
    args = parse_args(argv)
    if args.sample:
        sample_only(args)
    elif not dry_run(
        args, *cost(args), two_networks=True, check=lambda a, t: refuse(wrong_flags(a, t))
    ):
        train(args)
        work_done(args, *cost(args))


if __name__ == "__main__":
    run_main(main)
