"""Stops 3 to 6: DMD's two arrows, without one of them, with a GAN, and in several steps."""

import copy

import torch

import dmd
from docs.tour.common import (
    BATCH,
    DIFFUSION,
    TEACHER,
    adam,
    data,
    labels,
    levels,
    networks,
    noise,
    rate_left,
    step,
    teacher_samples,
    verdict,
)
from docs.tour.plane import BLUE, DARK, MEANS, ORANGE, PURPLE, Plane, grid, save, save_film
from models.diffusion import step_grid
from models.networks.gan import GanHead
from models.networks.ring_mlp import RingMLP
from models.worlds.ring import RingTeacher

UPDATES, FRAMES, RATIO = 300, 20, 5  # of the student; of a film; fake's updates for each
COND = {"label": labels(BATCH)}


def train(
    student, fake, teacher=TEACHER, updates=UPDATES, without_fake=False, see=None, highest=0.98
):
    """DMD (v1, Alg. 2; DMD2's order of updates) on the ring: `dmd.train` without its plumbing.

    see: called as see(update) before every update and after the last. highest: the noisiest level
    at which the scores are compared.
    """
    move, follow = adam(student, 5e-4), adam(fake, 1e-3)
    for update in range(updates):
        left = rate_left(update, updates)
        if see:
            see(update)
        x = DIFFUSION.x0(student, noise(), 1.0, **COND)
        at = DIFFUSION, noise(), levels(0.02, highest), COND, {}
        if without_fake:
            step(move, dmd.dmd_loss_without_fake(x, teacher, *at, 1.0)[0], left)
            continue
        step(move, dmd.dmd_loss(x, teacher, fake, *at, COND, 1.0)[0], left)
        for _ in range(RATIO):
            x = samples(student, noise())
            loss = dmd.fake_score_loss(fake, DIFFUSION, x, noise(), levels(), COND)
            step(follow, loss, left)
    if see:
        see(updates)


@torch.no_grad()
def samples(student, z):
    """One call from noise to samples of all classes.  (n, 2) -> (n, 2)."""
    return DIFFUSION.x0(student, z, 1.0, label=labels(len(z)))


def arrows(path, updates=UPDATES):
    """A film of DMD: samples; the arrows of teacher and fake for one class, their difference."""
    student, fake = networks()
    z, eps, t, sheets = noise(400), noise(400), 0.3, []
    label = torch.zeros(len(grid()), dtype=torch.long)

    @torch.no_grad()
    def see(update):
        if update % max(1, updates // FRAMES):
            return
        x = samples(student, z)
        x_t = DIFFUSION.add_noise(x, eps, t)[labels(400) == 0]
        at = grid()[torch.cdist(grid(), torch.cat([x_t, (1 - t) * MEANS[::4]])).min(1)[0] < 0.35]
        mu_real, mu_fake = (DIFFUSION.x0(n, at, t, label=label[: len(at)]) for n in (TEACHER, fake))
        panels = [Plane(f"student, update {update}", verdict(x)).discs().dots(x)]
        for name, by, colour in (
            ("teacher: to the data", 0.4 * ((1 - t) * mu_real - at), BLUE),
            ("fake: to the student", 0.4 * ((1 - t) * mu_fake - at), PURPLE),
            ("teacher minus fake", mu_real - mu_fake, ORANGE),
        ):
            panel = Plane(name, f"class east-west, t = {t:g}").dots(x_t, DARK)
            panels.append(panel.arrows(at, by, colour))
        sheets.append([panels])

    train(student, fake, updates=updates, see=see)
    save_film(path, sheets)


def collapse(path, updates=240, more=120):
    """A film: DMD makes a student; then it goes on with the fake score, and without."""
    student, fake = networks()
    train(student, fake, updates=updates)
    z, films = noise(400), []
    for without, highest in ((False, 0.98), (True, 0.98), (True, 0.3)):
        net, film = copy.deepcopy(student), []

        def see(update, net=net, film=film):
            if update % max(1, more // 15) == 0:
                film.append((update, samples(net, z)))

        how = dict(updates=more, without_fake=without, see=see, highest=highest)
        train(net, copy.deepcopy(fake), **how)
        films.append(film)
    names = "teacher minus fake", "teacher alone", "alone, t below 0.3"
    sheets = []
    for frame in zip(*films):
        shown = [(f"{name}, +{update}", x) for name, (update, x) in zip(names, frame)]
        sheets.append([[Plane(name, verdict(x)).discs().dots(x) for name, x in shown]])
    save_film(path, sheets)


# ---- the GAN -------------------------------------------------------------------------------------


def gan(path, updates=200, second=200):
    """A teacher with a fault of its own, and a GAN that sees real data: DMD, then DMD with it."""
    faulty, (student, fake) = faulty_teacher(), networks()
    z = noise(400)
    panels = [("the teacher, with a fault", teacher_samples(z, 32, faulty))]
    train(student, fake, faulty, updates)
    panels.append(("DMD copies the fault", samples(student, z)))
    train_with_gan(student, fake, faulty, second)
    panels.append(("DMD and GAN", samples(student, z)))
    save(path, [[Plane(name, radius(x)).discs().dots(x) for name, x in panels]])


def radius(x):
    """The median distance of samples from the middle, which is 1 for data, in words."""
    return f"radius {x.norm(dim=1).median():.2f}"


def faulty_teacher(size=0.6):
    """A teacher whose ring is too small: its score is exact, of the wrong distribution."""
    teacher = RingTeacher()
    teacher.means *= size
    return teacher


def train_with_gan(student, fake, teacher, updates, weight=1.0, weight_d=0.3):
    """DMD2: the fake also tells the student's samples from real ones, by a head on its features."""
    head = GanHead(fake(noise(1), levels(n=1), return_features=True).shape[-1])
    move, follow = adam(student, 5e-4), adam(torch.nn.ModuleList([fake, head]), 1e-3)
    for update in range(updates):
        left = rate_left(update, updates)
        x = DIFFUSION.x0(student, noise(), 1.0, **COND)
        at = DIFFUSION, noise(), levels(0.02, 0.98), COND, {}
        loss = dmd.dmd_loss(x, teacher, fake, *at, COND, 1.0)[0]
        logit = dmd.gan_logit(fake, head, DIFFUSION, x, noise(), levels(), COND)
        step(move, loss + weight * dmd.generator_loss(logit), left)
        for _ in range(RATIO):
            x, real = samples(student, noise()), data(BATCH)
            loss = dmd.fake_score_loss(fake, DIFFUSION, x, noise(), levels(), COND)
            two = (noise(), levels()), COND, real, (noise(), levels()), COND
            loss_d = dmd.discriminator_loss_on(fake, head, DIFFUSION, x, *two)
            step(follow, loss + weight_d * loss_d, left)


# ---- several steps -------------------------------------------------------------------------------

TIMES = step_grid(4)[:-1]  # 1, .75, .5, .25


def mixture(path, updates=UPDATES):
    """Four steps: what each of them is given, what it makes of it, and all four together."""
    student, fake = several_networks()
    train_several(student, fake, updates)
    x_in, above, below, made = noise(400), [], [], []
    cond = {"label": labels(400)}
    for k, t in enumerate(TIMES):
        with torch.no_grad():
            x = DIFFUSION.x0(student, x_in, t, **cond)
        above.append(Plane(f"given to step {k + 1}: t = {t:g}").dots(x_in, DARK))
        made.append(x[100 * k : 100 * (k + 1)])
        below.append(Plane(f"made by step {k + 1}", verdict(x)).discs().dots(x))
        if k < len(TIMES) - 1:
            x_in = DIFFUSION.add_noise(x, noise(400), TIMES[k + 1])
    together = torch.cat(made)
    below.append(Plane("the mixture of all four", verdict(together)).discs().dots(together))
    save(path, [above, below])


def several_networks():
    """A student, and a fake that is conditioned on the step that made a sample."""
    student, start = networks()
    fake = RingMLP(steps_cond=True)
    fake.load_state_dict(start.state_dict(), strict=False)
    return student, fake


def train_several(student, fake, updates):
    """DMD2's backward simulation: a step's input is made by the student's own steps before it."""
    move, follow = adam(student, 5e-4), adam(fake, 1e-3)
    k = torch.arange(BATCH) // TEACHER.num_classes % len(TIMES)  # every step of every class alike
    t_k, fake_cond = torch.tensor(TIMES)[k], {**COND, "steps": k.float()}

    def given():
        with torch.no_grad():
            z = {name: noise() for name in ("z", "renoise0", "renoise1", "renoise2")}
            return dmd.rollout(student, DIFFUSION, z.__getitem__, TIMES, COND, "sde", k)

    for update in range(updates):
        left = rate_left(update, updates)
        x = DIFFUSION.x0(student, given(), t_k, **COND)
        at = DIFFUSION, noise(), levels(0.02, 0.98), COND, {}
        step(move, dmd.dmd_loss(x, TEACHER, fake, *at, fake_cond, 1.0)[0], left)
        for _ in range(RATIO):
            with torch.no_grad():
                x = DIFFUSION.x0(student, given(), t_k, **COND)
            loss = dmd.fake_score_loss(fake, DIFFUSION, x, noise(), levels(), fake_cond)
            step(follow, loss, left)
