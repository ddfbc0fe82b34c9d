"""Distribution matching distillation: DMD (2311.18828 v4) and DMD2 (2405.14867 v2), 1 to N steps.

The idea. A teacher needs dozens of network calls to turn noise into a sample; the student should
need one. It is enough that its samples have the teacher's distribution. So noise the samples of
both to a random level t and minimise the KL divergence there. Its gradient is a difference of two
scores at the student's own noised sample: the teacher's ("where is data?") and that of the
student's current distribution ("where do I already put samples?"), which a third network, the fake
score, keeps learning. Without the second score the samples collapse onto modes or between them. DMD
steadies this with a regression onto teacher samples; DMD2 drops that, trains the fake score several
times per student update, adds a GAN on the fake's middle features, and trains students of several
steps on states that they reach by themselves.

    paper              here              meaning                                            shape
    x = G(z)           x                 the student's sample, read as x0                   (B, ...)
    x_t                x_t               x noised to a random level t                       (B, ...)
    mu_real, mu_fake   mu_real, mu_fake  x0 as guided teacher and fake read it from x_t     (B, ...)
    t_1 > ... > t_N    times             the student's fixed steps, 1 = noise               N floats
    x_{t_i}            x_in, k           the input of step k, made by the steps before it   (B, ...)
    D                  gan_logit         real or fake?                                      (B,)

Launch.
    laptop      python dmd.py                        # glyphs, one step, five minutes on two cores
                python dmd.py --teacher ring                          # a minute
                python dmd.py --teacher runs/latent_fm-FOLDER         # your own, see latent_fm.py
    paper       python dmd.py --fake_update_ratio 5 --gan_weight 3e-3         # DMD2, one step
                python dmd.py --fake_update_ratio 5 --gan_weight 5e-3 --student_steps 4 \
                    --shared_fake --one_step                               # DMD2, four steps
    paper, v1   python dmd.py --fake_update_ratio 1 --regression_weight 0.25
    two stages  python dmd.py --student_init runs/dmd-glyphs --fake_init runs/dmd-glyphs \
                    --gan_weight 0.3 --gan_weight_d 0.1 --learning_rate 6e-4 \
                    --learning_rate_fake 1.2e-3 --output_dir runs/dmd-glyphs-gan
    torchrun    torchrun --nproc-per-node 8 dmd.py --teacher Wan2.1-T2V-1.3B-Diffusers \
                    --prompts prompts.safetensors --mixed_precision bf16 \
                    --gradient_accumulation_steps 8
    sampling    python dmd.py --sample runs/dmd-glyphs/student

Deviations; the reasons are in docs/dmd.md. The gradient drops Eq. 7's factor alpha_t, as both
papers' pseudo-code does. R fake updates follow each student update; the first reuses its samples,
as in DMD2's code. The regression is L2, not LPIPS; the GAN's head an MLP on tokens. Noise levels
are spread evenly over a batch and have the teacher's shift. With several steps every sample draws
its own step (--one_step: one for the batch, as in DMD2's code), and the fake is conditioned on it
(--shared_fake: not, as in the papers). Optimiser settings and averaged weights suit short runs.
"""

import os

import torch
import torch.nn.functional as F

from models.diffusion import advance_rows, expand, step_grid
from models.draws import Draws, stable_hash
from models.files import UserError, open_tensors, save_tensors
from models.networks import load_network
from models.networks.gan import GanHead
from models.plumbing import report
from models.plumbing.data import Conditions, Rows, real_batches, try_network
from models.plumbing.dry_run import Network, Turn, dry_run
from models.plumbing.film import film_of_scores
from models.plumbing.flags import (
    add_guidance_rescale_flag,
    add_picture_flags,
    add_step_flag,
    distillation_parser,
    number,
    paper_values,
    parse,
    refuse,
)
from models.plumbing.run import Run, run_main
from models.plumbing.state import SavedState, find_state, named_tensors, read_info
from models.plumbing.teachers import (
    average_of,
    freeze_teacher,
    network_folder,
    new_student,
    start_teacher,
    trainable,
)
from models.plumbing.work import work_done
from models.shards import copy_weights

# ---- the losses ----------------------------------------------------------------------------------
#
# x, eps (B, ...); t (B,) floats in [0, 1], 0 = data, 1 = noise. diffusion: a Diffusion(schedule,
# prediction) of models/diffusion.py; schedule has alpha(t) and sigma(t), and the prediction ("eps",
# "flow_v" = eps - x0, ...) is that of student, teacher and fake. Networks are called as
# net(x_t, t, **cond) and return a tensor like x_t; cond, uncond, fake_cond: dicts, {} for none.


def dmd_loss(x, teacher, fake, diffusion, eps, t, cond, uncond, fake_cond, guidance_scale):
    """The student's distribution matching loss (v1, Alg. 2).

    -> scalar; g, mu_real, mu_fake (B, ...), constants, for the log.

    Its gradient in x, with all else constant, is g / numel(x), where

        g = (mu_fake(x_t) - mu_real(x_t)) / mean|x - mu_real(x_t)|                (v1, Eq. 7 and 8)

    with one mean for each sample, so that all noise levels pull with similar strength. t lies in
    [.02, .98] here, in [0, 1] for fake and GAN. guidance_scale 1 is off.
    """
    with torch.no_grad():
        x_t = diffusion.add_noise(x, eps, t)
        mu_real = diffusion.guided_x0(teacher, x_t, t, cond, uncond, guidance_scale)
        mu_fake = diffusion.x0(fake, x_t, t, **fake_cond)
        error = (x - mu_real).abs().flatten(1).mean(1)  # (B,)
        g = (mu_fake - mu_real) / expand(error.clamp_min(1e-8), x)
    return 0.5 * F.mse_loss(x, (x - g).detach()), g, mu_real, mu_fake


def fake_score_loss(fake, diffusion, x, eps, t, cond):
    """Denoising loss on detached student samples (v1, Eq. 6).  -> scalar.

    The error is taken in the space that the network predicts, unweighted, as most teachers
    were trained.
    """
    x = x.detach()
    x_t = diffusion.add_noise(x, eps, t)
    return F.mse_loss(fake(x_t, t, **cond).float(), diffusion.target(x, eps, t))


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


def dmd_loss_without_fake(x, teacher, diffusion, eps, t, cond, uncond, guidance_scale):
    """Ablation: the real score alone, which collapses (v1, Fig. 3), to modes or to the middle.

    Without a fake score, mu_fake would be x_t / alpha_t; its mean over the noise, x, stands for it.
    -> scalar; g, mu_real, mu_fake (B, ...), as `dmd_loss`.
    """
    with torch.no_grad():
        x_t = diffusion.add_noise(x, eps, t)
        mu_real = diffusion.guided_x0(teacher, x_t, t, cond, uncond, guidance_scale)
        error = (x - mu_real).abs().flatten(1).mean(1)  # (B,)
        mu_fake = x.detach()
        g = (mu_fake - mu_real) / expand(error.clamp_min(1e-8), x)
    return 0.5 * F.mse_loss(x, (x - g).detach()), g, mu_real, mu_fake


# ---- the sampler ---------------------------------------------------------------------------------


def rollout(student, diffusion, noise, times, cond, renoise, k=None):
    """From noise("z") at times[0] to the student's input at times[-1]: len(times) - 1 calls.

    times: without the final 0; an eps network needs alpha(times[0]) > 0.
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
    """A step k for every sample, and its input, made by the student's own steps (DMD2, 4.5).

    The steps are spread evenly over a batch, or, with --one_step, it shares one.
    -> k (B,) on the CPU, t (B,) where that step begins, x_in (B, ...), cond, uncond.
    """
    k = draw.steps(len(times), args.one_step)
    t, (cond, uncond) = torch.tensor(times)[k].to(draw.device), teacher.conditions.draw(draw)
    if args.student_input == "real" and len(times) > 1:
        # ablation: noised data, never met at test time
        (x_real, cond), z = teacher.real(draw, "real_input"), draw.noise("z")
        x_in = teacher.diffusion.add_noise(x_real, z, t)
        return k, t, torch.where(expand(k == 0, z).to(z.device), z, x_in), cond, uncond
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
    return count_steps(args) > 1 and not off and "steps_cond" in net.config


def count_steps(args):
    """N, the number of the student's steps."""
    return len(args.student_times) if args.student_times else args.student_steps


def needs_fake(args):
    """Whether anything reads the fake: the matching term as a score, or the GAN for its features.

    It is trained as a score for either, as in the authors' GAN-only runs.
    """
    return args.gan_weight > 0 or (args.dm_weight > 0 and not args.no_fake_score)


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


def train(args):
    run = Run(args, "dmd")
    teacher = start_teacher(run)
    refuse(wrong_flags(args, teacher.world))
    teacher.conditions = Conditions(args, teacher.base)
    diffusion, scale = teacher.diffusion, args.guidance_scale
    times = args.student_times or step_grid(args.student_steps, teacher.shift)[:-1]  # t_1 > ... t_N
    see_step = fake_sees_step(args, teacher.base)
    student = new_student(run, teacher)
    fake = starting_fake(run, teacher, see_step)
    freeze_teacher(run, teacher)
    run.spread_tokens(teacher.net, student, fake)
    teacher.real = real_batches(args, teacher, run.device) if needs_data(args) else None
    head = new_head(run, student, teacher)
    ema = average_of(run, student)
    adam = dict(betas=tuple(args.adam_betas), weight_decay=args.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, **adam)
    critic = [*fake.parameters(), *head.parameters()]  # the discriminator: fake and a head on it
    optimizer_fake = torch.optim.AdamW(critic, lr=args.learning_rate_fake, **adam)
    networks = dict(student=student, fake=fake, head=head, ema=ema)
    run.start(**networks, optimizer=optimizer, optimizer_fake=optimizer_fake)  # resumed, if asked
    pairs = teacher_pairs(run, teacher) if args.regression_weight else None
    sampler = student_sampler(run, ema, teacher, times, args.renoise)
    report.introduce(run, teacher, teacher.base, f"{report.steps_at(times)}, {args.renoise}")
    film = film_of_scores(run, teacher, sampler, fake, len(times) - 1 if see_step else None)

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
                loss = g_dm = x.new_zeros(())  # without a matching term
                if args.dm_weight:
                    at_t = diffusion, *draw.eps_t_within("", *args.dm_range), cond, uncond
                    if args.no_fake_score:
                        loss_dm, g, *mu = dmd_loss_without_fake(x, teacher.net, *at_t, scale)
                    else:
                        loss_dm, g, *mu = dmd_loss(x, teacher.net, fake, *at_t, fake_cond, scale)
                    loss, g_dm = args.dm_weight * loss_dm, args.dm_weight * g / g.numel()
                    run.note(loss_dm=loss_dm, g_dm=g_dm.norm())
                    run.note_scores(*mu)  # mu_real, mu_fake
                if args.gan_weight:
                    logit = gan_logit(fake, head, diffusion, x, *draw.eps_t("_gan"), fake_cond)
                    loss_gan = generator_loss(logit)
                    loss = loss + args.gan_weight * loss_gan
                    run.note(loss_gan=loss_gan)
            if loss.requires_grad:
                (loss * run.share).backward()
            if args.gan_weight:  # g_dm is what the matching term alone sends into x
                run.note(g_gan=(x.grad / run.share - g_dm).norm())
            if pairs:
                add_regression(run, draw, pairs, student, teacher, times[0])
            run.note_samples(x)
            if args.reuse_samples:  # in the fake's first update, micro-batch by micro-batch
                seen.append((x.detach(), k, cond))
        run.update(optimizer, "student")
        requires_grad(critic, True)

        # ---- fake score and discriminator: R updates on samples of the current student
        for inner in range(args.fake_update_ratio if needs_fake(args) else 0):
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
        if run.end_step(step, show=("loss_fake", "loss_dm", "std")):  # True: time to save
            report.save_previews(run, teacher, {f"student, step {step + 1}": sampler})
            report.save_student(run, teacher, ema, times)
            run.save(step)
    if run.first >= args.max_train_steps:  # a finished run is written out again, perhaps elsewhere
        report.save_student(run, teacher, ema, times)
    parameters = sum(p.numel() for p in ema.eval().parameters())
    report.finish(
        run, teacher, times, {"student": (len(times), sampler)}, parameters, real=teacher.real
    )


# ---- training in two stages ----------------------------------------------------------------------


def starting_fake(run, teacher, see_step):
    """The fake score, a copy of the teacher or of what --fake_init names. Raises UserError.

    --fake_init names a network, or a run, whose newest state has a fake that follows its student.
    One that was not conditioned on the student's step starts with that input at zero. An adapter
    starts from the adapter of a run's state.
    """
    args, path, rank = run.args, run.args.fake_init, run.args.fake_lora_rank
    fake = trainable(run, teacher.base, "fake", rank, see_step)
    if not path:
        return fake
    state = find_state(path, "latest")
    if not state and os.path.isfile(os.path.join(network_folder(path), "sampler.json")):
        raise UserError(f"--fake_init {path} is a student, no score: give its run, with its state/")
    own = named_tensors(fake, "fake")
    if state:
        info = read_info(state)
        saved, alpha = SavedState(state, info.get("world_size", 1)), info["flags"].get("lora_alpha")
        shapes = {f"fake.{k}": saved.shape(f"fake.{k}") for k in saved.names("fake")}
    else:
        net, alpha = load_network(network_folder(path), place=run.place)[0], None
        shapes = {k: tuple(v.shape) for k, v in named_tensors(net, "fake").items()}
    missing = {k for k in own if k not in shapes and not k.startswith("fake.steps.")}
    other = missing or any(k not in own or own[k].shape != v for k, v in shapes.items())
    if rank and (other or alpha != args.lora_alpha):
        raise UserError(
            f"--fake_init {path}: it has no adapter of rank {rank} and alpha {args.lora_alpha:g} "
            "for the fake: give the run's --fake_lora_rank and --lora_alpha, or leave --fake_init "
            "out"
        )
    if other:
        raise UserError(
            f"--fake_init {path}: it has no fake of this run's shapes: give a network like the "
            "teacher's, or a run from this teacher with as many student steps or one"
        )
    if state:
        with torch.no_grad():
            for key in shapes:
                saved.fill(key, own[key])
    else:
        copy_weights(fake, net)
    return fake


# ---- DMD v1's regression -------------------------------------------------------------------------


def teacher_pairs(run, teacher):
    """(z, y): teacher ODE samples, made once, kept beside the run (v1, Sec. 3.3).

    -> {"z" (n, ...), "y" (n, ...), "index" (n,): which condition}, read row by row.
    """
    args, path = run.args, os.path.join(run.folder, "state", "pairs.safetensors")
    about = {"teacher_steps": str(args.teacher_steps)}  # may change on resume while the term is off
    there = run.first and os.path.isfile(path)  # a run that never saved has no pairs
    there = there and open_tensors(path).metadata() in (about, None)
    if not any(run.mean_over_ranks(float(run.main and there))):  # as rank 0 finds them
        n = args.regression_pairs
        draw = Draws(args.seed, "pairs", 0, range(n), shape=teacher.shape)
        z, index = draw.noise("z"), teacher.conditions.index(draw)
        grid = teacher.grid(args.teacher_steps)

        def samples(a, b):
            cond, uncond = teacher.conditions.pick(index[a:b], run.device)
            how = cond, uncond, args.guidance_scale, "heun"
            return teacher.diffusion.sample(teacher.net, z[a:b].to(run.device), grid, *how)

        y, _ = report.many_on_all_ranks(run, samples, n, teacher.shape, run.B)
        if run.main:
            save_tensors({"z": z, "y": y, "index": index}, path, about)
    run.wait_for_all()
    file = open_tensors(path)
    return {name: Rows(file, name) for name in ("z", "y", "index")}


def add_regression(run, draw, pairs, student, teacher, t):
    """The regression's own backward pass, which adds to the student's gradient."""
    with run.autocast():
        loss = regression_loss(draw, pairs, student, teacher, t)
    (run.args.regression_weight * loss * run.share).backward()
    run.note(loss_regression=loss)


def regression_loss(draw, pairs, student, teacher, t):
    """L2 onto teacher samples, on a batch of pairs of its own (v1, Eq. 9).  -> scalar."""
    i = draw.integer("pair", len(pairs["z"]))
    cond, _ = teacher.conditions.pick(pairs["index"][i], draw.device)
    z, y = pairs["z"][i].to(draw.device), pairs["y"][i].to(draw.device)
    return F.mse_loss(teacher.diffusion.x0(student, z, t, **cond), y)


# ---- what the run leaves behind ------------------------------------------------------------------


def student_sampler(run, student, teacher, times, renoise):
    """-> a function (index, first, last) -> samples of the conditions index[first:last]."""

    def samples(index, first, last):
        noise = report.evaluation_noise(run, teacher.shape, first, last)
        cond, _ = teacher.conditions.pick(index[first:last], run.device)
        return sample(student, teacher.diffusion, noise, times, cond, renoise)

    return samples


def sample_only(args):
    """--sample FOLDER: load a saved student and its sampler.json, write samples to --output_dir."""
    run = Run(args, "dmd")
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
    # the student's calls that make its input
    before = 0 if args.student_input == "real" else (count_steps(args) - 1) / 2
    guided = 1 if args.guidance_scale == 1 else 2
    gan, turns = 0.5 * (args.gan_weight > 0), []
    if needs_fake(args):
        graphs = {"fake": 1 + 2 * gan}  # denoising, D on samples and on data
        R = args.fake_update_ratio
        make = {"student": (before + 1) * (R - args.reuse_samples) / R}
        turns.append(Turn("fake", R, make, graphs))
    calls, graphs = {"student": before}, {"student": 1 + (args.regression_weight > 0), "fake": gan}
    if args.dm_weight:
        calls |= {"teacher": guided, "fake": not args.no_fake_score}
    return networks, [Turn("student", 1, calls, graphs), *turns]


# ---- flags ---------------------------------------------------------------------------------------

PRESETS = {  # the flags' defaults suit small DiTs; what other teachers change of them
    "glyphs": dict(timestep_shift=2.0),
    "ring": dict(
        max_train_steps=400, learning_rate=5e-4, learning_rate_fake=1e-3, fake_update_ratio=5,
        train_batch_size=256, ema_decay=0.95, adam_betas=[0.0, 0.99], lr_decay_share=0.7,
    ),
    "released": dict(  # Self-Forcing's for Wan 1.3B; shift and guidance are in releases.py
        max_train_steps=4000, learning_rate=2e-6, learning_rate_fake=4e-7, fake_update_ratio=5,
        train_batch_size=1, ema_decay=0.99, adam_betas=[0.0, 0.999], weight_decay=0.01,
        lr_warmup_steps=0, lr_decay_share=0.0, student_steps=4, guidance_scale=4.0, one_step=True,
        preview_samples=2, gradient_checkpointing=True,
    ),
    # DMD2's for its nearest teachers, EDM on ImageNet and SDXL: warm-up over 500 critic updates
    "DiTTransformer2DModel": dict(
        learning_rate=2e-6, learning_rate_fake=2e-6, adam_betas=[0.9, 0.999], ema_decay=0.0,
        lr_warmup_steps=100, student_steps=1,
    ),
    "UNetModel": dict(adam_betas=[0.9, 0.999], ema_decay=0.0),  # EDM's itself
    "PixArtTransformer2DModel": dict(
        learning_rate=5e-7, learning_rate_fake=5e-7, adam_betas=[0.9, 0.999], ema_decay=0.0,
        lr_warmup_steps=100,
    ),
    "UNet2DConditionModel": dict(  # SDXL's; rows of models/plumbing/papers.py are stronger
        learning_rate=5e-7, learning_rate_fake=5e-7, adam_betas=[0.9, 0.999], ema_decay=0.0,
        lr_warmup_steps=100,
    ),
}  # fmt: skip


SEVERAL = dict(learning_rate=4e-4, learning_rate_fake=2e-3)  # of small DiTs in several steps


def presets(known):
    """PRESETS, where other flags matter too. known: a first reading of the command line."""
    if count_steps(known) == 1:
        return PRESETS
    return {**PRESETS, "glyphs": {**PRESETS["glyphs"], **SEVERAL}, "small": SEVERAL}


# fmt: off
def parse_args(argv=None):
    p = distillation_parser("Distil a diffusion or flow teacher into a few-step student "
                            "(DMD 2311.18828, DMD2 2405.14867).")
    add_guidance_rescale_flag(p)
    p.set_defaults(max_train_steps=1100, learning_rate=1.2e-3, lr_warmup_steps=20, ema_decay=0.995)
    paper_values(p, fake_update_ratio="5 to 10; v1: 1", adam_betas=".9 .999", weight_decay=".01",
                 lr_decay_share="0", ema_decay="0")
    add_step_flag(p)
    add = p.method.add_argument
    add("--student_steps", type=number(int, 1), default=1,
        help="N, network calls of the student (paper: 1 or 4)")
    add("--student_times", type=number(float, above=0, high=1), nargs="+", default=None,
        metavar="T", help="these steps instead, in t, after the shift (paper, SDXL in one step: "
        "index 399 of 1000, 0.4)")
    add("--renoise", choices=["sde", "ode"], default="sde",
        help="between student steps: fresh noise (paper), or Euler")
    add("--dm_range", type=number(float, 0, 1), nargs=2, default=[0.02, 0.98], metavar=("LO", "HI"),
        help="t of the student's loss lies in [LO, HI], after the shift (paper: .02 .98)")
    add("--dm_weight", type=number(float, 0), default=1.0,
        help="weight of the matching loss; 0 = off: the GAN or the regression alone (paper: 1)")
    add("--data", default=None, help="real samples for the GAN: a world, pictures (folder, "
        "zip, tars, ... as latent_fm.py takes them), or FILE.safetensors with x0 and cond.* "
        "(default: the world's)")
    add_picture_flags(p)
    add("--gan_weight", type=number(float, 0), default=0.0,
        help="the student's GAN weight (paper: 1e-3 to 5e-3); 0 = off")
    add("--gan_weight_d", type=number(float, 0), default=1e-2,
        help="the discriminator's weight in the fake's loss (paper's code: 1e-2)")
    add("--regression_weight", type=number(float, 0), default=0.0,
        help="lambda of DMD v1's regression onto teacher samples (paper: 0.25); 0 = off")
    add("--regression_pairs", type=number(int, 1), default=1000,
        help="number of teacher samples for it")
    p.run.add_argument("--fake_init", default=None, metavar="FOLDER",
        help="start the fake here instead of from the teacher: a network, or a run, whose newest "
        "state has one")
    add = p.ablations.add_argument
    add("--student_input", choices=["backsim", "real"], default="backsim",
        help="later steps start from the student's own states (paper) or from noised data")
    add("--shared_fake", action="store_true",
        help="the fake is not conditioned on the student's step (paper)")
    add("--no_fake_score", action="store_true", help="the real score alone: collapses")
    return parse(p, argv, "dmd", presets, wrong_flags, ignored_flags)
# fmt: on


def ignored_flags(a):
    """Flags without effect beside the others: see `flags.unread`."""
    other = bool(a.student_times) and len(a.student_times) != a.student_steps
    yield "student_steps", other, f"--student_times says {count_steps(a)} step(s)"
    one = count_steps(a) == 1
    yield "shared_fake renoise one_step", one, "the student has one step"
    yield "student_input", one and not a.data, "the student has one step"
    yield "shared_fake", a.fake_lora_rank > 0, "an adapter does not know the step anyway"


def needs_data(args):
    """Whether real samples take part in training."""
    return args.gan_weight > 0 or (args.student_input == "real" and count_steps(args) > 1)


# fmt: off
def wrong_flags(a, world="not known yet"):
    """Flags that do not go together: pairs (wrong, why). world: the teacher's, None without one."""
    low, high = a.dm_range
    unused = a.data and not needs_data(a)
    missing = needs_data(a) and not (a.data or world)
    v1, times = a.regression_weight, a.student_times or []
    yield low >= high, f"--dm_range: LO must be below HI, got {low:g} {high:g}"
    yield unused, ("--data is for the GAN or --student_input real with several steps: set "
                   "--gan_weight, or leave --data out")
    yield missing, ("--gan_weight and --student_input real need data: give --data FOLDER or "
                    "FILE.safetensors, or --gan_weight 0")
    yield a.no_fake_score and a.gan_weight, ("--no_fake_score leaves the GAN's head untrained, it "
                                             "sits on the fake score: use --gan_weight 0")
    yield a.gan_weight and not a.gan_weight_d, ("--gan_weight_d 0 leaves the GAN's head untrained: "
                                                "give it, or --gan_weight 0")
    yield v1 and not a.teacher_steps, ("--regression_weight needs teacher samples: give "
                                       "--teacher_steps of at least 1")
    several = v1 and count_steps(a) > 1
    yield several, "--regression_weight is DMD v1, a one-step method: use --student_steps 1"
    nothing = not (a.dm_weight or a.gan_weight or v1)
    yield nothing, ("--dm_weight 0 leaves nothing to learn from: give --gan_weight or "
                    "--regression_weight")
    yield a.no_fake_score and not a.dm_weight, ("--no_fake_score is about the matching loss, which "
                                                "--dm_weight 0 takes out: leave one of them out")
    yield a.fake_init and not needs_fake(a), ("--fake_init: nothing reads the fake score here: "
                                              "leave it out")
    rising = any(t <= later for t, later in zip(times, times[1:]))
    yield rising, f"--student_times must descend, got {' '.join(f'{t:g}' for t in times)}"
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
