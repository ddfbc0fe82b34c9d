"""Decoupled DMD (2511.22677 v1): CFG augmentation is the engine, distribution matching the shield.

The idea. In practice DMD of text-to-image teachers guides the real score and not the fake one.
Then the gradient is two things at once: the matching of distributions that DMD is named for,
conditional real score minus fake score, and a second term without any fake score, (alpha - 1) times
(conditional minus unconditional real score). The paper takes the sum apart. The second term, CFG
augmentation (CA), is what turns a many-step teacher into a few-step student: it climbs log p(c |
x), fast, and on its own without end, until colours and noise run away. The first, distribution
matching (DM), converts less well, but pulls back whatever real samples do not have; a penalty on
mean and variance, or a GAN, can stand in for it, less well. Apart, each term can have its own noise
level: CA adds content of its level, so it is needed only at cleaner levels than the student's
input; DM must see faults of all sizes, so it draws from all levels.

    paper             here               meaning                                          shape
    t = 0 noise       u_k = 1            raw time: here 1 is noise, 0 data; t = shift(u)      float
    t_1 < ... < t_N   times              the student's steps, u = 1, (N-1)/N, ..., 1/N   N floats
    z_t               x_in               input of step k, made by the steps before it     (B, ...)
    x = G(z_t)        x                  the student's sample, read as x0                 (B, ...)
    tau_DM, tau_CA    t_dm, t_ca         noise levels of the two terms                    (B,)
    s_real, s_fake    mu_real, mu_fake   their x0 at x_dm; at x_ca mu_cond and mu_uncond   (B, ...)
    alpha             alpha              guidance scale; 1 leaves DM alone                float
    -Delta_DM, _CA    g_dm, g_ca         gradients in x; their sum is DMD's (Eq. 6)       (B, ...)

Launch.
    laptop      python decoupled_dmd.py                    # glyphs, four steps, six minutes
                python decoupled_dmd.py --teacher ring     # a minute
    paper       python decoupled_dmd.py --shared_fake --one_step --fake_update_ratio 5
    ablations   python decoupled_dmd.py --schedule shared    # DMD; also full, constrained (Table 1)
                python decoupled_dmd.py --no_dm       # CA alone: sharp, then runs away (Fig. 2)
    torchrun    torchrun --nproc-per-node 8 decoupled_dmd.py --teacher Z-Image \
                    --prompts prompts.safetensors --mixed_precision bf16 \
                    --gradient_accumulation_steps 16
    sampling    python decoupled_dmd.py --sample runs/decoupled_dmd-glyphs/student

Deviations; the reasons are in docs/decoupled_dmd.md. Scores are written as x0 predictions. Released
teachers get a normaliser, "branch". Every sample has a step of its own (--one_step: one for the
batch), and the fake is conditioned on it (--shared_fake: the paper's, which is not). Of the fake's
R updates the first sees the samples of the student's update.
"""

import torch
import torch.nn.functional as F

from models.diffusion import advance_rows, expand, guide, step_grid
from models.draws import stable_hash
from models.networks.gan import GanHead
from models.plumbing import report
from models.plumbing.data import Conditions, in_space_of, real_batches, try_network
from models.plumbing.dry_run import Network, Turn, dry_run
from models.plumbing.film import Film
from models.plumbing.flags import (
    add_picture_flags,
    add_step_flag,
    distillation_parser,
    number,
    paper_values,
    parse,
    refuse,
)
from models.plumbing.run import Run, run_main
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
# x, eps (B, ...); t (B,) floats in [0, 1], 0 = data, 1 = noise. diffusion: a Diffusion(schedule,
# prediction) of models/diffusion.py; schedule has alpha(t) and sigma(t), and the prediction ("eps",
# "flow_v" = eps - x0, ...) is that of student, teacher and fake. Networks are called as
# net(x_t, t, **cond) and return a tensor like x_t; cond, uncond, fake_cond: dicts, {} for none.


def decoupled_dmd_loss(x, teacher, fake, diffusion, at_dm, at_ca, cond, uncond, fake_cond, alpha):
    """The student's loss (Alg. 1, lambda = 1).

    -> scalar; g_dm, g_ca, mu_real, mu_fake (B, ...), constants: the last two for the log.

    Its gradient in x, with all else constant, is (g_dm + g_ca) / numel(x), where

        g_dm = mu_fake(x_dm) - mu_real(x_dm)                                                 (Eq. 6)
        g_ca = (alpha - 1) (mu_uncond(x_ca) - mu_cond(x_ca))

    at_dm and at_ca are pairs (eps, t): noise and noise level of the two terms. With the same pair
    for both this is DMD's gradient with a guided teacher, without its normaliser.
    """
    (eps_dm, t_dm), (eps_ca, t_ca) = at_dm, at_ca
    with torch.no_grad():
        x_dm, x_ca = diffusion.add_noise(x, eps_dm, t_dm), diffusion.add_noise(x, eps_ca, t_ca)
        mu_real = mu_cond = diffusion.x0(teacher, x_dm, t_dm, **cond)
        mu_fake = diffusion.x0(fake, x_dm, t_dm, **fake_cond)
        g_dm = mu_fake - mu_real
        if at_ca is not at_dm:
            mu_cond = diffusion.x0(teacher, x_ca, t_ca, **cond)
        mu_uncond = diffusion.x0(teacher, x_ca, t_ca, **uncond)
        g_ca = (alpha - 1) * (mu_uncond - mu_cond)
        g = g_dm + g_ca
    return 0.5 * F.mse_loss(x, (x - g).detach()), g_dm, g_ca, mu_real, mu_fake


def noise_ranges(levels, u_k, dm_range, ca_range):
    """Where u_DM and u_CA are drawn from, for a student's input at raw time u_k (Sec. 4.3).

    levels: that of --schedule. "shared" draws once for both (DMD), "full" twice, "constrained"
    bounds both to u <= u_k, "hybrid" (the proposal) only CA. u <= u_k is "cleaner than the input",
    the paper's tau in [t, 1]; the bound is set before the shift. A range wholly above u_k shrinks
    to that point. -> (lo, hi) of DM, (lo, hi) of CA
    """
    if levels == "constrained":
        dm_range = min(dm_range[0], u_k), min(dm_range[1], u_k)
    if levels in ("constrained", "hybrid"):
        ca_range = min(ca_range[0], u_k), min(ca_range[1], u_k)
    return dm_range, ca_range


def fake_score_loss(fake, diffusion, x, eps, t, cond):
    """Denoising loss on detached student samples (Alg. 1).  -> scalar.

    At all noise levels, conditional, never guided; in the space the network predicts, which is the
    weighting most teachers were trained with.
    """
    x = x.detach()
    x_t = diffusion.add_noise(x, eps, t)
    return F.mse_loss(fake(x_t, t, **cond).float(), diffusion.target(x, eps, t))


def image_moments(x):
    """Mean and variance over all values of each image.  x (B, ...) -> (B,), (B,).

    Points have no inside: for x (B, 2) the batch is the image, -> (1,), (1,).
    """
    values = x.flatten(1) if x.dim() > 2 else x.flatten()[None]
    variance, mean = torch.var_mean(values, dim=1, correction=0)
    return mean, variance


def mean_variance_loss(x, mean, variance):
    """The shield without a network (Eq. 7), a mean over images of a KL divergence:

    KL(N(m_i, v_i) || N(mean, variance)); m_i and v_i are those of image i.
    x (B, ...); mean, variance floats -> scalar.
    """
    m, v = image_moments(x)  # (B,), (B,)
    v = v.clamp_min(1e-8)
    return (0.5 * ((v + (m - mean) ** 2) / variance - 1 - torch.log(v / variance))).mean()


def gan_logit(fake, head, diffusion, x, eps, t, cond):
    """Real or fake? Read from the fake's middle features of the noised sample (DMD2, 4.3).

    fake(..., return_features=True) returns these features (B, tokens, width) instead of a
    prediction.  -> (B,).
    """
    x_t = diffusion.add_noise(x, eps, t)  # noise makes real and fake overlap
    return head(fake(x_t, t, return_features=True, **cond).float())


def discriminator_loss(logit_real, logit_fake):
    """Trains the head and the fake's first half (DMD2, Eq. 4, non-saturating).  -> scalar."""
    return F.softplus(logit_fake).mean() + F.softplus(-logit_real).mean()


def discriminator_loss_on(fake, head, diffusion, x, noise, cond, x_real, noise_real, cond_real):
    """The discriminator's loss on student samples x and real ones.  -> scalar.

    noise, noise_real: pairs (eps, t), drawn apart.
    """
    logit_fake = gan_logit(fake, head, diffusion, x.detach(), *noise, cond)
    logit_real = gan_logit(fake, head, diffusion, x_real, *noise_real, cond_real)
    return discriminator_loss(logit_real, logit_fake)


def generator_loss(logit_fake):
    """The student's GAN loss, on the gan_logit of its samples (DMD2, Eq. 4).  -> scalar.

    The gradient passes through fake and head into x, and reaches their weights too: freeze both
    before, as `train` does, or drop their gradients before their next update.
    """
    return F.softplus(-logit_fake).mean()


# ---- ablations of the student's loss -------------------------------------------------------------


def ablated_loss(x, teacher, fake, diffusion, at_dm, at_ca, cond, uncond, fake_cond, alpha, terms):
    """`decoupled_dmd_loss` with a term off, or with a normaliser. terms: see `Terms`.

    -> scalar; g_dm, g_ca, mu_real, mu_fake. The gradient of a term that is off is 0, or, with an
    observer, what it would have been; where nothing sees the fake, mu_fake is mu_real.
    """
    (eps_dm, t_dm), (eps_ca, t_ca) = at_dm, at_ca
    with torch.no_grad():
        x_dm, x_ca = diffusion.add_noise(x, eps_dm, t_dm), diffusion.add_noise(x, eps_ca, t_ca)
        mu_real = mu_fake = mu_guided = mu_cond = mu_uncond = x  # so a term that is off is 0
        if terms.sees_dm or terms.normalizer == "shared":
            mu_real = mu_fake = mu_guided = diffusion.x0(teacher, x_dm, t_dm, **cond)
        if terms.sees_dm:
            mu_fake = diffusion.x0(fake, x_dm, t_dm, **fake_cond)
        one_level = at_ca is at_dm and mu_real is not x  # what is known there is not computed again
        if terms.ca:
            mu_cond = mu_real if one_level else diffusion.x0(teacher, x_ca, t_ca, **cond)
            mu_uncond = diffusion.x0(teacher, x_ca, t_ca, **uncond)
        if terms.normalizer == "shared" and alpha != 1:
            known = one_level and terms.ca
            mu_null = mu_uncond if known else diffusion.x0(teacher, x_dm, t_dm, **uncond)
            mu_guided = guide(mu_real, mu_null, alpha)
        g_dm, g_ca = mu_fake - mu_real, (alpha - 1) * (mu_uncond - mu_cond)
        by_dm = {"none": None, "branch": mu_real, "shared": mu_guided}[terms.normalizer]
        by_ca = {"none": None, "branch": mu_cond, "shared": mu_guided}[terms.normalizer]
        g_dm, g_ca = normalised(g_dm, x, by_dm), normalised(g_ca, x, by_ca)
        g = g_dm + g_ca if terms.dm else g_ca
    return 0.5 * F.mse_loss(x, (x - g).detach()), g_dm, g_ca, mu_real, mu_fake


def normalised(g, x, mu):
    """g over mean |x - mu|, one mean for each sample; mu None: as it is (paper).  (B, ...)."""
    if mu is None:
        return g
    error = (x - mu).abs().flatten(1).mean(1)  # (B,)
    return g / expand(error.clamp_min(1e-8), x)


class Terms:
    """Which terms are on, and what they are divided by.

    normalizer "none": nothing (paper); "branch": each term by the mean |x - conditional x0| of its
    own level; "shared": both by the mean |x - guided x0| at DM's level, which is DMD's Eq. 8.
    """

    def __init__(self, args):
        self.dm = not args.no_dm
        self.ca = not args.no_ca and args.ca_weight > 0 and args.guidance_scale != 1
        self.sees_dm = self.dm or args.observer  # whether DM's gradient is computed
        self.needs_fake = self.sees_dm or args.gan_weight > 0
        self.normalizer = args.normalizer
        self.as_in_paper = self.dm and self.ca and self.normalizer == "none"


# ---- the sampler ---------------------------------------------------------------------------------


def rollout(student, diffusion, noise, times, cond, renoise, k=None):
    """From noise("z") at times[0] to the student's input at times[-1]: len(times) - 1 calls.

    times: without the final 0.
    renoise "sde": fresh noise after step i, noise("renoise<i>") (DMD2, Sec. 4.4); "ode": the noise
    that the student implies, an Euler step. k (B,) on the CPU: row b stops at times[k[b]].
    noise: name -> (B, ...).  -> (B, ...)
    """

    def step(x_in, cond, rows):  # these rows, from times[i] to times[i + 1]; i: the loop's below
        x, eps = diffusion.x0_eps(student, x_in, times[i], **cond)
        if renoise == "sde":
            eps = noise(f"renoise{i}")[rows.to(x.device)]
        return diffusion.add_noise(x, eps, times[i + 1])

    x_in = noise("z")
    k = torch.full((len(x_in),), len(times) - 1) if k is None else k
    for i in range(len(times) - 1):
        x_in = advance_rows(x_in, k > i, cond, step)
    return x_in


@torch.no_grad()
def sample(student, diffusion, noise, times, cond, renoise="sde"):
    """The few-step sampler: len(times) calls, no guidance, no noise after the last.  -> x."""
    x_in = rollout(student, diffusion, noise, times, cond, renoise)
    return diffusion.x0(student, x_in, times[-1], **cond)


# ---- training ------------------------------------------------------------------------------------


def student_input(args, draw, student, teacher, times):
    """A step k for every sample, and its input, made by the student's own steps (Alg. 1).

    The steps are spread evenly over a batch, or, with --one_step, it shares one.
    -> k (B,) on the CPU, t (B,) where that step begins, x_in (B, ...), cond, uncond.
    """
    k = draw.steps(len(times), args.one_step)
    t, (cond, uncond) = torch.tensor(times)[k].to(draw.device), teacher.conditions.draw(draw)
    reached = times[: k[0] + 1] if args.one_step else times  # the same on all ranks
    with torch.no_grad():
        x_in = rollout(student, teacher.diffusion, draw.noise, reached, cond, args.renoise, k)
    return k, t, x_in, cond, uncond


def fresh_samples(args, draw, student, teacher, times):
    """Samples of the current student for its fake.  -> x (B, ...) without gradient, k, cond."""
    k, t, x_in, cond, _ = student_input(args, draw, student, teacher, times)
    with torch.no_grad():
        return teacher.diffusion.x0(student, x_in, t, **cond), k, cond


def fake_sees_step(args, net):
    """Whether the fake, a network like net, is conditioned on the student's step (docs/dmd.md)."""
    off = args.shared_fake or args.fake_lora_rank  # adapters lack the layer that the step enters by
    return args.student_steps > 1 and not off and "steps_cond" in net.config


def new_head(run, student, teacher):
    """The discriminator's head, for the middle features of a network like the student."""
    features = try_network(student, teacher, run.device, return_features=True)  # (1, tokens, width)
    torch.manual_seed(stable_hash(run.args.seed, "head"))
    return run.place(GanHead(features.shape[-1]), whole=run.args.fake_lora_rank > 0)


def requires_grad(parameters, on):
    """Let these get gradients, or not."""
    for p in parameters:
        p.requires_grad_(on)


def step_input(k, draw, on):
    """The fake's further condition: k, the student step that made the sample."""
    return {"steps": k.float().to(draw.device)} if on else {}


def draw_levels(args, draw, k):
    """Noise and noise level for DM and for CA at the student's step k (B,) of each row (Eq. 8).

    With --schedule shared both terms read one draw, as in DMD.  -> two pairs (eps, t).
    """
    N, how = args.student_steps, (args.dm_range, args.ca_range)
    ranges = torch.tensor([noise_ranges(args.schedule, 1 - i / N, *how) for i in range(N)])
    range_dm, range_ca = ranges[k].unbind(1)  # (B, 2) each: lo, hi
    at_dm = draw.eps_t("", *range_dm.unbind(1))
    at_ca = at_dm if args.schedule == "shared" else draw.eps_t("_ca", *range_ca.unbind(1))
    return at_dm, at_ca


def note_gradients(run, x, g_dm, g_ca, terms):
    """What the two terms, and all others together (g_rest), send into x; after backward()."""
    n = x.numel()
    g = g_dm + g_ca if terms.dm else g_ca
    cos = F.cosine_similarity(g_dm.flatten(1), g_ca.flatten(1)).mean()
    run.note(g_dm=(g_dm / n).norm(), g_ca=(g_ca / n).norm(), cos_dm_ca=cos)
    run.note(g_rest=(x.grad / run.share - g / n).norm())


def describe(args, times, terms, see_step):
    """The student's steps and what it learns from, in words."""
    on = {"DM": terms.dm, "CA": terms.ca, "GAN": args.gan_weight}
    on["mean-variance KL"] = args.mean_variance_weight
    names = " + ".join(name for name, weight in on.items() if weight)
    fake = "conditioned on the step" if see_step else "not conditioned on the step"
    return (
        f"{report.steps_at(times)}, {args.renoise}; {names}, noise levels {args.schedule}, "
        f"normalizer {args.normalizer}; the fake is {fake}"
    )


def train(args):
    run = Run(args, "decoupled_dmd")
    teacher = start_teacher(run)
    refuse(wrong_flags(args, teacher.world))
    teacher.conditions = Conditions(args, teacher.base)
    diffusion, terms = teacher.diffusion, Terms(args)
    alpha = 1 + args.ca_weight * (args.guidance_scale - 1)
    times = step_grid(args.student_steps, teacher.shift)[:-1]  # t_1 > ... > t_N, shifted
    see_step = fake_sees_step(args, teacher.base)
    student = new_student(run, teacher)
    fake = trainable(run, teacher.base, "fake", args.fake_lora_rank, see_step)
    freeze_teacher(run, teacher)
    run.spread_tokens(teacher.net, student, fake)
    teacher.real = real_batches(args, teacher, run.device) if args.gan_weight else None
    head = new_head(run, student, teacher)
    ema = average_of(run, student)
    adam = dict(betas=tuple(args.adam_betas), weight_decay=args.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, **adam)
    critic = [*fake.parameters(), *head.parameters()]  # the discriminator: fake and a head on it
    optimizer_fake = torch.optim.AdamW(critic, lr=args.learning_rate_fake, **adam)
    networks = dict(student=student, fake=fake, head=head, ema=ema)
    run.start(**networks, optimizer=optimizer, optimizer_fake=optimizer_fake)  # resumed, if asked
    moments = mean_variance_target(args, teacher.world, teacher.shape)
    sampler = student_sampler(run, ema, teacher, times, args.renoise)
    report.introduce(run, teacher, teacher.base, describe(args, times, terms, see_step))
    at = times if see_step else None
    film = film_of_terms(run, teacher, sampler, fake, alpha, terms, at)

    for step in run.steps():
        warmup, decay = run.rate(step)
        optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * decay
        optimizer_fake.param_groups[0]["lr"] = args.learning_rate_fake * warmup * decay

        # ---- student: one update on its own samples; teacher, fake and head are constants
        requires_grad(critic, False)
        seen = []
        for draw in run.micro_batches(step, "student", teacher):
            with run.autocast():
                k, t_k, x_in, cond, uncond = student_input(args, draw, student, teacher, times)
                x = diffusion.x0(student, x_in, t_k, **cond)  # the one call with gradient
                x.retain_grad()  # for the log
                fake_cond = {**cond, **step_input(k, draw, see_step)}
                at_t = diffusion, *draw_levels(args, draw, k), cond, uncond, fake_cond, alpha
                if terms.as_in_paper:
                    loss, g_dm, g_ca, *mu = decoupled_dmd_loss(x, teacher.net, fake, *at_t)
                else:
                    loss, g_dm, g_ca, *mu = ablated_loss(x, teacher.net, fake, *at_t, terms)
                run.note(loss_dm_ca=loss)
                if terms.sees_dm:
                    run.note_scores(*mu)  # mu_real, mu_fake
                if args.mean_variance_weight:
                    loss_mean_variance = mean_variance_loss(x, *moments)
                    loss = loss + args.mean_variance_weight * loss_mean_variance
                    run.note(loss_mean_variance=loss_mean_variance)
                if args.gan_weight:
                    logit = gan_logit(fake, head, diffusion, x, *draw.eps_t("_gan"), fake_cond)
                    loss_gan = generator_loss(logit)
                    loss = loss + args.gan_weight * loss_gan
                    run.note(loss_gan=loss_gan)
            (loss * run.share).backward()
            note_gradients(run, x, g_dm, g_ca, terms)
            run.note_samples(x)
            if args.reuse_samples:  # in the fake's first update, micro-batch by micro-batch
                seen.append((x.detach(), k, cond))
        run.update(optimizer, "student")
        requires_grad(critic, True)

        # ---- fake score and discriminator: R updates on samples of the current student
        for inner in range(args.fake_update_ratio if terms.needs_fake else 0):
            for draw in run.micro_batches(step, inner, teacher):
                with run.autocast():
                    kept = seen.pop(0) if seen else None
                    x, k, cond = kept or fresh_samples(args, draw, student, teacher, times)
                    step_k = step_input(k, draw, see_step)
                    fake_cond = {**cond, **step_k}
                    loss = fake_score_loss(fake, diffusion, x, *draw.eps_t(), fake_cond)
                (loss * run.share).backward()
                run.note(loss_fake=loss)
                if args.gan_weight:  # losses add up; a pass for each keeps one graph at a time
                    with run.autocast():
                        x_real, cond_real = teacher.real(draw, "real_gan")
                        fakes = x, draw.eps_t("_gan_fake"), fake_cond
                        reals = x_real, draw.eps_t("_gan_real"), {**cond_real, **step_k}
                        loss_d = discriminator_loss_on(fake, head, diffusion, *fakes, *reals)
                    (args.gan_weight_d * loss_d * run.share).backward()
                    run.note(loss_d=loss_d)
            run.update(optimizer_fake, "fake")
        if args.ema_decay:
            run.update_ema(ema, student, step)
        film.frame(step)
        if run.end_step(step, show=("loss_fake", "g_ca", "std")):  # True: time to save
            report.save_previews(run, teacher, {f"student, step {step + 1}": sampler})
            report.save_student(run, teacher, ema, times)
            run.save(step)
    if run.first >= args.max_train_steps:  # a finished run is written out again, perhaps elsewhere
        report.save_student(run, teacher, ema, times)
    parameters = sum(p.numel() for p in ema.eval().parameters())
    report.finish(
        run, teacher, times, {"student": (len(times), sampler)}, parameters, real=teacher.real
    )


def mean_variance_target(args, world, shape=None):
    """Eq. 7's targets: as given, or the averages over a world's images of their mean and variance.

    shape: of a sample, which tells whether images are a world's pixels or its latents.
    -> floats; the paper's, for SDXL's latents, are .075 and .81.
    """
    if args.mean_variance_target or not args.mean_variance_weight:
        return args.mean_variance_target
    m, v = image_moments(in_space_of(world, shape, world.data(2000, 776)[0]))
    return m.mean().item(), v.mean().item()


# ---- what the run leaves behind ------------------------------------------------------------------


def film_of_terms(run, teacher, sampler, fake, alpha, terms, times=None, t=0.4):
    """ring.gif: half of how CA, DM and both move a sample noised to level t.

    A term that is off is drawn as nothing; DM that only looks on is drawn, and not in the sum.
    times: of the student's steps, for a fake that is conditioned on the step: it is asked about the
    last one whose CA reaches up to t.
    """
    diffusion = teacher.diffusion
    step = sum(t_k >= t for t_k in times) - 1 if times else None
    on = {"CA": terms.ca, "DM": terms.dm}
    names = {name: name if is_on else f"{name} (off)" for name, is_on in on.items()}
    if terms.sees_dm and not terms.dm:
        names["DM"] = "DM (looks on)"

    def ca(x_t, t, cond, uncond):
        if not terms.ca:
            return torch.zeros_like(x_t)
        mu_cond, mu_uncond = (diffusion.x0(teacher.net, x_t, t, **c) for c in (cond, uncond))
        return 0.5 * (alpha - 1) * (mu_cond - mu_uncond)

    def dm(x_t, t, cond, uncond):
        if not terms.sees_dm:
            return torch.zeros_like(x_t)
        steps = {} if step is None else {"steps": torch.full_like(t, float(step))}
        mu_fake = diffusion.x0(fake, x_t, t, **cond, **steps)
        return 0.5 * (diffusion.x0(teacher.net, x_t, t, **cond) - mu_fake)

    return Film(run, teacher, sampler, ca, dm, t, tuple(names.values()), terms=tuple(on.values()))


def student_sampler(run, student, teacher, times, renoise):
    """-> a function (index, first, last) -> samples of the conditions index[first:last]."""

    def samples(index, first, last):
        noise = report.evaluation_noise(run, teacher.shape, first, last)
        cond, _ = teacher.conditions.pick(index[first:last], run.device)
        return sample(student, teacher.diffusion, noise, times, cond, renoise)

    return samples


def sample_only(args):
    """--sample FOLDER: load a saved student and its sampler.json, write samples to --output_dir."""
    run = Run(args, "decoupled_dmd")
    student, saved, teacher = report.load_student(run)
    renoise = "sde" if saved["rule"] == "renoise" else "ode"
    sampler = student_sampler(run, student, teacher, saved["times"], renoise)
    report.write_samples(run, teacher, sampler, len(saved["times"]))


# ---- what an update costs, for --dry_run ---------------------------------------------------------


def cost(args):
    """-> the networks, and the backward passes of one student update (models/plumbing/dry_run.py).

    A GAN logit is half a call of the fake. The averages are over the student's steps, and over the
    R fake updates, of which the first needs no samples of its own with --reuse_samples.
    """
    rank, rank_fake = args.lora_rank, args.fake_lora_rank
    networks = [
        Network("teacher", "teacher"),
        Network("student", "trained", rank, saved=True),
        Network("fake", "trained", rank_fake),
    ]
    if args.ema_decay:
        networks.append(Network("ema", "average", rank))
    before = (args.student_steps - 1) / 2  # the student's calls that make its input
    terms, gan, turns = Terms(args), 0.5 * (args.gan_weight > 0), []
    if terms.needs_fake:
        graphs = {"fake": 1 + 2 * gan}  # denoising, D on samples and on data
        R = args.fake_update_ratio
        make = {"student": (before + 1) * (R - args.reuse_samples) / R}
        turns.append(Turn("fake", R, make, graphs))
    # calls of the teacher: at DM's level, at CA's, and without condition at DM's for its normaliser
    guided = args.normalizer == "shared"
    at_dm = terms.sees_dm or guided
    one_level = args.schedule == "shared" and at_dm
    at_ca = (1 if one_level else 2) if terms.ca else 0
    null = guided and args.ca_weight * (args.guidance_scale - 1) != 0
    null = null and not (one_level and terms.ca)
    calls = {"student": before, "teacher": at_dm + at_ca + null, "fake": int(terms.sees_dm)}
    return networks, [Turn("student", 1, calls, {"student": 1, "fake": gan}), *turns]


# ---- flags ---------------------------------------------------------------------------------------

PRESETS = {  # the flags' defaults suit small DiTs; what other teachers change of them
    "glyphs": dict(timestep_shift=2.0),
    "ring": dict(
        max_train_steps=400, learning_rate=5e-4, learning_rate_fake=1e-3, fake_update_ratio=5,
        train_batch_size=256, ema_decay=0.95, adam_betas=[0.0, 0.99], lr_decay_share=0.7,
    ),
    "released": dict(
        max_train_steps=1000, learning_rate=1e-6, learning_rate_fake=1e-5, fake_update_ratio=5,
        train_batch_size=1, ema_decay=0.0, adam_betas=[0.9, 0.999], weight_decay=0.01,
        lr_warmup_steps=0, lr_decay_share=0.0, student_steps=4, guidance_scale=4.0, one_step=True,
        preview_samples=2, normalizer="branch", gradient_checkpointing=True,
    ),
    "ZImageTransformer2DModel": dict(student_steps=8),  # Turbo's; shift 3, alpha 5: releases.py
}  # fmt: skip


# fmt: off
def parse_args(argv=None):
    p = distillation_parser("Distil a guided teacher into few steps, CFG augmentation and "
                            "distribution matching apart (Decoupled DMD, 2511.22677).")
    p.set_defaults(max_train_steps=600, learning_rate=8e-4, lr_warmup_steps=20, ema_decay=0.995,
                   guidance_scale=3.0)
    paper_values(p, fake_update_ratio="5, DMD2's", adam_betas=".9 .999", weight_decay=".01",
                 lr_decay_share="0", learning_rate_fake="5e-7, both")
    add_step_flag(p)
    add = p.method.add_argument
    add("--student_steps", type=number(int, 1), default=4,
        help="N, network calls of the student (paper: 4; Z-Image-Turbo: 8)")
    add("--renoise", choices=["sde", "ode"], default="sde",
        help="between student steps: fresh noise (DMD2), or Euler (as Z-Image-Turbo samples)")
    add("--schedule", choices=["shared", "full", "constrained", "hybrid"], default="hybrid",
        help="noise levels of DM and CA: one draw (DMD), two, both below the student's input, or "
        "only CA below it (paper: hybrid)")
    add("--normalizer", choices=["none", "shared", "branch"], default="none",
        help="gradients as they are (paper), over DMD's mean|x - guided x0|, or each over its own "
        "mean|x - conditional x0| (as the authors are reported to do)")
    add("--ca_range", type=number(float, 0, 1), nargs=2, default=None, metavar=("LO", "HI"),
        help="u ~ U[LO, HI] of CA, before the schedule's bound and before the shift (default and "
        "paper: 0 1; the paper's [0, .05] is .95 1 here)")
    add("--ca_weight", type=number(float, 0), default=1.0,
        help="factor of CFG augmentation, on alpha - 1 (paper: 1)")
    add("--dm_range", type=number(float, 0, 1), nargs=2, default=[0.0, 1.0], metavar=("LO", "HI"),
        help="the same of DM, before the shift (paper: 0 1)")
    add("--mean_variance_weight", type=number(float, 0), default=0.0,
        help="weight of Eq. 7's KL on each image's mean and variance (paper: not stated); 0 = off")
    add("--mean_variance_target", type=float, nargs=2, default=None, metavar=("MEAN", "VAR"),
        help="its targets (paper, SDXL latents: .075 .81; default: measured on the world's data)")
    add("--data", default=None, help="real samples for the GAN: a world, pictures (folder, "
        "zip, tars, ... as latent_fm.py takes them), or FILE.safetensors with x0 and cond.* "
        "(default: the world's)")
    add_picture_flags(p)
    add("--gan_weight", type=number(float, 0), default=0.0,
        help="the student's GAN weight (paper: not stated; DMD2: 5e-3); 0 = off")
    add("--gan_weight_d", type=number(float, 0), default=1e-2,
        help="the discriminator's weight in the fake's loss (DMD2: 1e-2)")
    add = p.ablations.add_argument
    add("--shared_fake", action="store_true",
        help="the fake is not conditioned on the student's step (paper)")
    add("--no_ca", action="store_true", help="distribution matching alone")
    add("--no_dm", action="store_true",
        help="CFG augmentation alone, or with Eq. 7 or a GAN for a shield")
    add("--observer", action="store_true", help="with --no_dm: train the fake all the same and "
        "log what DM would have done (paper, Sec. 4.2)")
    args = parse(p, argv, "decoupled_dmd", PRESETS, wrong_flags, ignored_flags)
    args.ca_range = args.ca_range or (args.dm_range if args.schedule == "shared" else [0.0, 1.0])
    return args


def ignored_flags(a):
    """Flags without effect beside the others: see `flags.unread`. Those of a term that is off may
    be given, as its weight may change on resume."""
    yield "shared_fake", a.fake_lora_rank > 0, "an adapter does not know the step anyway"


def wrong_flags(a, world="not known yet"):
    """Flags that do not go together: pairs (wrong, why). world: the teacher's, None without one."""
    on, last = Terms(a), 1 / a.student_steps  # last: raw time of the student's last step
    ca_range = a.ca_range or [0.0, 1.0]
    for flag, (lo, hi) in (("dm_range", a.dm_range), ("ca_range", ca_range)):
        yield lo >= hi, f"--{flag}: LO must be below HI, got {lo:g} {hi:g}"
    two_levels = a.schedule == "shared" and a.ca_range not in (None, a.dm_range)
    why = "--ca_range: --schedule shared draws one level for both terms, from --dm_range"
    yield two_levels, why
    dm_bounded = on.sees_dm and a.schedule == "constrained"
    ca_bounded = on.ca and a.schedule in ("constrained", "hybrid")
    why = f"--schedule {a.schedule} keeps the last of {a.student_steps} steps below {last:g}"
    why += ": use --schedule full, or a range that starts lower"
    yield dm_bounded and a.dm_range[0] >= last, f"--dm_range starts at {a.dm_range[0]:g}, and {why}"
    yield ca_bounded and ca_range[0] >= last, f"--ca_range starts at {ca_range[0]:g}, and {why}"
    nothing = not (on.dm or on.ca or a.gan_weight)
    yield nothing, ("nothing is left to learn from: leave out --no_dm or --no_ca, give "
                    "--guidance_scale above 1 and --ca_weight above 0, or --gan_weight")
    yield a.no_dm and on.ca and a.guidance_scale < 1, (
        f"--guidance_scale {a.guidance_scale:g} turns CA's sign, and with --no_dm the student "
        "leaves its class: give one above 1")
    alone = a.observer and not a.no_dm
    yield alone, "--observer looks on where DM is off: give --no_dm with it, or leave it out"
    unused = a.data and not a.gan_weight
    yield unused, "--data is for the GAN: set --gan_weight, or leave --data out"
    missing = a.gan_weight and not (a.data or world)
    yield missing, ("--gan_weight needs data: give --data FOLDER or FILE.safetensors, or "
                    "--gan_weight 0")
    yield a.gan_weight and not a.gan_weight_d, ("--gan_weight_d 0 leaves the GAN's head untrained: "
                                                "give it, or --gan_weight 0")
    variance = (a.mean_variance_target or [0, 1])[1]
    yield variance <= 0, f"--mean_variance_target: VAR must be > 0, got {variance:g}"
    missing = a.mean_variance_weight and not (a.mean_variance_target or world)
    yield missing, ("--mean_variance_weight needs --mean_variance_target MEAN VAR, the averages "
                    "over real latents (paper, SDXL: 0.075 0.81)")
# fmt: on


def main(argv=None):
    args = parse_args(argv)
    if args.sample:
        sample_only(args)
    elif not dry_run(args, *cost(args), check=lambda a, t: refuse(wrong_flags(a, t.world))):
        train(args)
        work_done(args, *cost(args))


if __name__ == "__main__":
    run_main(main)
