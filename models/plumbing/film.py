"""ring.gif: what the networks of a method say on a grid, and where the student's samples go.

Only the world `ring` is plane enough to be drawn. Each frame has four panels: the samples of all
classes; the arrows of the teacher and of the network that is compared with it, both of one class at
one noise level; and their difference, which is what moves the samples.
"""

import io
import os

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from models.diffusion import expand
from models.draws import Draws
from models.files import atomic_write
from models.plumbing.report import preview
from models.worlds.ring import COLOURS as CLASSES

FRAMES, SIDE, REACH = 40, 232, 1.6  # pictures of a film, pixels of a panel, the plane's half width
FILM_LEVEL = 0.4  # noise level of the arrows
INK, FAINT, BLUE, PURPLE, ORANGE = "#282c34", "#b0bed0", "#2f6fb0", "#8f5aa0", "#d9642a"


class Film:
    """Collects a frame every now and then and writes ring.gif whenever the run saves.

    mu_real, mu_fake: functions (x_t (B, 2), t (B,), cond, uncond) -> E[x0 | x_t] (B, 2), of the
    teacher and of the network it is compared with; they are called anew for every frame. t: the
    noise level of the arrows. names: what the two are called in the picture. Other worlds than
    ring, and --preview_every 0, make no film. A resumed run goes on with the frames it has.
    terms: the functions are two parts of what moves a sample instead, drawn as they are, and the
    fourth panel is the sum of those that this pair of bools says are on. larger: how many times as
    long a difference is drawn.
    """

    def __init__(
        self,
        run,
        teacher,
        sampler,
        mu_real,
        mu_fake,
        t=FILM_LEVEL,
        names=("teacher", "fake"),
        terms=None,
        larger=1,
    ):
        self.run, self.teacher, self.sampler = run, teacher, sampler
        self.mus, self.t, self.names, self.frames = (mu_real, mu_fake), t, names, []
        self.terms, self.larger = terms, larger
        self.on = teacher.world_name == "ring" and run.args.preview_every != 0
        self.every = max(1, run.args.max_train_steps // FRAMES)
        if self.on and run.first and run.main and os.path.isfile(self.path):
            self.frames = earlier_frames(self.path, run.first, self.every)
        empty = self.on and run.main and not self.frames  # also of a run resumed without its file
        if self.on and any(run.mean_over_ranks(float(empty))):  # all ranks draw, or none
            self.take(run.first)

    @property
    def path(self):
        """The file, which moves with the run's folder (`Run.settle`)."""
        return os.path.join(self.run.folder, "ring.gif")

    def frame(self, step, save=False):
        """After update `step`: a frame if one is due, and the file if the run saves now.

        save: it does so for a reason of its own; being asked to stop is another.
        """
        done, args = step + 1, self.run.args
        if not self.on:
            return
        if done % self.every == 0:
            self.take(done)
        last = done == args.max_train_steps
        save |= bool(self.run.wants_to_stop()[0])
        if self.run.main and (save or last or done % args.checkpointing_steps == 0):
            write_gif(self.path, self.frames, self.every)

    @torch.no_grad()
    def take(self, done):
        """Draw one frame. Every rank computes it, rank 0 keeps it."""
        x = preview(self.run, self.teacher, self.sampler)
        grid = torch.linspace(-1.4, 1.4, 13)
        x_t = torch.cartesian_prod(grid, grid).to(self.run.device)  # (169, 2)
        t = torch.full((len(x_t),), self.t, device=x_t.device)
        cond, uncond = self.teacher.conditions.pick(torch.zeros(len(x_t)).long(), x_t.device)
        real, fake = (mu(x_t, t, cond, uncond).float() for mu in self.mus)
        if not self.run.main:
            return
        schedule = self.teacher.schedule
        alpha, sigma = (expand(f(t), x_t) for f in (schedule.alpha, schedule.sigma))
        one = x[self.teacher.conditions.preview(len(x)) == 0]  # the samples of class 0
        eps = Draws(0, "film", 0, range(len(one))).normal("eps", one.shape[1:])
        noised = alpha[:1].cpu() * one + sigma[:1].cpu() * eps  # all at one t
        first = Image.fromarray(self.teacher.world.picture(x, SIDE))
        panels = [(f"samples of all classes, step {done}", first)]
        of = f"t = {self.t:g}"
        if self.teacher.conditions.count > 1:  # a network without labels speaks of all modes
            of = f"class {self.teacher.world.class_names[0]}, {of}"
        for name, mu, colour in zip(self.names, (real, fake), (BLUE, PURPLE)):
            by = mu if self.terms else 0.3 * (alpha * mu - x_t)  # the score times sigma^2
            panels.append((f"{name}, {of}", arrows(x_t, by, noised, colour)))
        by, name = self.larger * alpha * (real - fake), "their difference, larger"
        if self.terms:
            by, name = self.terms[0] * real + self.terms[1] * fake, "their sum"
        panels.append((name, arrows(x_t, by, noised, ORANGE)))
        self.frames.append(beside(panels))


def film_of_scores(run, teacher, sampler, fake, step=None, **more):
    """The film of a method with a fake score: the guided teacher's x0 against the fake's.

    With --no_fake_score, or regression alone, the fake is not trained: mu_fake = x_t / alpha, a
    score of nothing, stands for it. step: the student step that a fake is conditioned on, None for
    one that is not. more: of Film.
    """
    diffusion, scale, args = teacher.diffusion, run.args.guidance_scale, run.args
    unread = not (getattr(args, "dm_weight", 1) or getattr(args, "gan_weight", 0))
    if unread or getattr(args, "no_fake_score", False):
        fake, more["names"] = None, ("teacher", "no fake")

    def mu_real(x_t, t, cond, uncond):
        return diffusion.guided_x0(teacher.net, x_t, t, cond, uncond, scale)

    def mu_fake(x_t, t, cond, uncond):
        if fake is None:
            return x_t / expand(teacher.schedule.alpha(t), x_t)
        steps = {} if step is None else {"steps": torch.full_like(t, float(step))}
        return diffusion.x0(fake, x_t, t, **cond, **steps)

    return Film(run, teacher, sampler, mu_real, mu_fake, **more)


def arrows(start, by, dots, colour):
    """A panel: arrows from start (n, 2) by (n, 2), over dots (m, 2).  -> a Pillow image."""
    scale, zoom = SIDE / (2 * REACH), 3  # drawn three times as large, then made smaller: smooth
    image = Image.new("RGB", (SIDE * zoom, SIDE * zoom), "white")
    draw = ImageDraw.Draw(image)

    def pixels(points):
        flip = torch.tensor([1.0, -1.0])
        return ((points.float().cpu() * flip + REACH) * scale * zoom).tolist()

    for x, y in pixels(dots):
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=FAINT)
    length = by.norm(dim=1, keepdim=True).clamp_min(1e-6)
    by = by * (length.clamp_max(0.4) / length)  # long ones are cut, so that none hides the others
    for (x, y), (to_x, to_y) in zip(pixels(start), pixels(start + by)):
        dx, dy = to_x - x, to_y - y
        if dx * dx + dy * dy < 4:
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)
            continue
        draw.line([x, y, to_x, to_y], fill=colour, width=4)
        back = min(14.0, 0.6 * (dx * dx + dy * dy) ** 0.5) / (dx * dx + dy * dy) ** 0.5
        left = to_x - back * (dx - 0.5 * dy), to_y - back * (dy + 0.5 * dx)
        right = to_x - back * (dx + 0.5 * dy), to_y - back * (dy - 0.5 * dx)
        draw.polygon([(to_x, to_y), left, right], fill=colour)
    return image.resize((SIDE, SIDE), Image.LANCZOS)


def beside(panels):
    """[(text, image), ...] side by side, each text above its image.  -> a Pillow image."""
    bar, font = 18, ImageFont.load_default()
    sheet = Image.new("RGB", (len(panels) * (SIDE + 4) - 4, SIDE + bar), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (text, image) in enumerate(panels):
        left = i * (SIDE + 4)
        draw.text((left + 6, 3), text, fill=INK, font=font)
        sheet.paste(image, (left, bar))
        draw.rectangle([left, bar, left + SIDE - 1, bar + SIDE - 1], outline=FAINT)
    return sheet


def write_gif(path, frames, every, ms=150, pause=2000):
    """An endlessly looping GIF; the last frame stays for a while.

    every: updates between two frames, kept as the file's comment. ms, pause: milliseconds.
    """
    colours = palette([INK, FAINT, BLUE, PURPLE, ORANGE, *CLASSES])
    small = [in_palette(f, colours) for f in frames]
    data = io.BytesIO()
    shown = [ms] * (len(small) - 1) + [pause]
    how = dict(save_all=True, append_images=small[1:], duration=shown, loop=0, optimize=True)
    small[0].save(data, "GIF", comment=b"every %d" % every, **how)
    atomic_write(path, data.getvalue())


def palette(colours, tints=7):
    """These colours in `tints` shades towards white, as a Pillow image that has them as palette.

    Left to itself each frame would choose other ones, and the classes' colours would flicker.
    """
    shades = [255, 255, 255]
    for rgb in (ImageColor.getrgb(c) for c in colours):
        for i in range(tints):
            shades += [round(255 + (c - 255) * (i + 1) / tints) for c in rgb]
    image = Image.new("P", (1, 1))
    image.putpalette(shades)
    return image


def in_palette(frame, colours):
    """A frame in the nearest colours of a palette. One that has no others stays as it is.

    Pillow's own `quantize` looks colours up by their upper bits, so that a film that is read and
    written again would change.
    """
    pixels = np.asarray(frame.convert("RGB")).reshape(-1, 3).astype(np.int64)
    found, place = np.unique(pixels @ [65536, 256, 1], return_inverse=True)
    rgb = np.stack([found >> 16, found >> 8 & 255, found & 255], 1)
    shades = np.array(colours.getpalette()).reshape(-1, 3)
    nearest = ((rgb[:, None] - shades) ** 2).sum(2).argmin(1).astype(np.uint8)
    image = Image.frombytes("P", frame.size, nearest[place.reshape(-1)].tobytes())
    image.putpalette(colours.getpalette())
    return image


def read_gif(path):
    """The frames of a GIF as RGB images."""
    frames = []
    with Image.open(path) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(gif.convert("RGB"))
    return frames


def earlier_frames(path, first, every):
    """The frames that a run which is resumed after `first` updates goes on with.

    A run that was made longer has its frames further apart, so only some of the film's stay.
    """
    with Image.open(path) as gif:
        before = int(gif.info.get("comment", b"every 1").split()[1])
    frames = read_gif(path)
    wanted = sorted({round(i * every / before) for i in range(1 + first // every)})
    return [frames[i] for i in wanted if i < len(frames)]
