"""Pictures of docs/latent_fm.md."""

import contextlib
import os
import tempfile
from unittest import mock

from docs.draw.logs import read
from docs.draw.svg import Canvas


def draw(folder):
    diagram().save(f"{folder}/latent_fm-diagram")
    curves().save(f"{folder}/latent_fm-curves")


def diagram():
    """One update of the network, and how a trained one samples."""
    c = Canvas(900, 445)
    c.text(24, 30, "Training: from a point on the line between a latent and noise, which way?")
    c.box("x", 50, 130, "image x")
    c.box("encoder", 165, 130, "encoder E", "teacher")
    c.box("x0", 275, 130, "x_0")
    c.box("eps", 275, 70, "noise ε", "noise")
    c.box("x_t", 430, 130, "x_t = (1 − t) x_0 + t ε", width=170)
    c.box("t", 430, 70, "t in [0, 1]", "noise")
    c.box("c", 625, 66, "c: label, image with holes, or map", width=250)
    c.box("net", 625, 130, "velocity v_θ(x_t, t, c)", "student", width=170)
    c.box("loss", 815, 130, "|v_θ − (ε − x_0)|^2", "loss", width=140)
    c.arrow("x", "encoder")
    c.arrow("encoder", "x0")
    c.arrow("x0", "x_t")
    c.arrow("eps", "x_t")
    c.arrow("t", "x_t")
    c.arrow("x_t", "net")
    c.arrow("c", "net")
    c.arrow("net", "loss")
    c.arrow("loss", "net", "", "gradient", via=[(815, 185), (625, 185)])
    way = [(815, 205), (275, 205)]
    words = "latents are constants: the encoder is frozen"
    c.arrow("loss", "x0", words, "gradient", via=way, at=0.55, stopped=True, off=16)

    c.text(24, 270, "Sampling: start at noise and integrate the velocity from t = 1 down to t = 0.")
    c.box("z", 50, 345, "noise", "noise")
    c.box("x_s", 140, 345, "x_t")
    c.box("cond", 290, 310, "v_c = v_θ(x_t, t, c)", "student", width=160)
    c.box("uncond", 290, 380, "v_u = v_θ(x_t, t, K)", "student", width=160)
    c.box("v", 480, 345, "v_u + γ (v_c − v_u)", width=140)
    c.box("z0", 625, 345, "x_0")
    c.box("decoder", 725, 345, "decoder D", "teacher")
    c.box("image", 840, 345, "image")
    c.arrow("z", "x_s")
    c.arrow("x_s", "cond")
    c.arrow("x_s", "uncond")
    c.arrow("cond", "v")
    c.arrow("uncond", "v")
    c.arrow("v", "z0", "t = 0")
    c.arrow("v", "x_s", "a step of Euler, Heun or dopri5", via=[(480, 414), (140, 414)], off=16)
    c.arrow("z0", "decoder")
    c.arrow("decoder", "image")
    return c


def curves():
    """Runs on the ring: a healthy one, one that never sees a label, one with too high rates."""
    c = Canvas(900, 270)
    names = {"healthy": "student", "blind": "teacher", "hot": "wrong"}

    def lines(column, which, average=7, cut=1.8):
        """Means of the last points, as a batch of 64 is noisy; each is cut before."""
        series = []
        for name in which:
            points = read(f"latent_fm-{name}", column)
            parts = [points[max(0, i - average) : i] for i in range(1, len(points) + 1)]
            means = [(p[-1][0], sum(min(v, cut) for _, v in p) / len(p)) for p in parts]
            series.append((name, means, names[name]))
        return series

    places = [(50, 40, 235, 190), (350, 40, 235, 190), (650, 40, 235, 190)]
    middle, both = lines("loss_t1", ["healthy", "blind"]), ["healthy", "hot"]
    c.chart(*places[0], "loss, cut at 1.8", lines("loss", names, 3), 0.6, 2.4)
    c.chart(*places[1], "loss at t in [1/4, 1/2]", middle, 0.5, 2)
    c.chart(*places[2], "gradient norm", lines("norm_net", both, 1, 1e12), 0.1, 1e12, True)
    return c


def wrong(folder):
    """latent_fm-wrong.png: eight ways to train on the ring and to sample from it."""
    from PIL import Image

    from models.plumbing.film import beside

    def loss_with(noised, target):
        def loss(net, x0, eps, t, cond):
            x_t = noised(x0, eps, t[:, None])
            error = (net(x_t, t, **cond) - target(x0, eps)).square().mean(1)
            return error.mean(), error.detach()

        return {"flow_matching_loss": loss}

    def line(x0, eps, t):
        return (1 - t) * x0 + t * eps

    def line_reversed(x0, eps, t):
        return t * x0 + (1 - t) * eps

    def raw_clock(net, x, t, label, null, scale):
        return net(x, t / 1000, label=label)

    def x0_into_v(net, x, t, label, null, scale):
        v_c, v_u = net(x, t, label=label), net(x, t, label=label * 0 + null)
        x0_c, x0_u = x - t[:, None] * v_c, x - t[:, None] * v_u
        return v_u + scale * (x0_c - x0_u)

    sign = loss_with(line, lambda x0, eps: x0 - eps)
    other_way = loss_with(line_reversed, lambda x0, eps: x0 - eps)
    right, twice, three = ring_net(), 0.18215, {"gamma": 3}
    panels = [
        panel("right", right),
        panel("target x0 - eps", ring_net(changes=sign)),
        panel("data at t = 1, sampler unchanged", ring_net(changes=other_way)),
        panel("the network's clock 1000 times slow", right, {"guided_velocity": raw_clock}),
        panel("right, gamma = 3", right, **three),
        panel("gamma = 3, labels never dropped", ring_net("--label_dropout 0"), **three),
        panel("x0 guided, used as v, gamma = 3", right, {"guided_velocity": x0_into_v}, **three),
        panel("latents scaled by 0.18215 twice", ring_net(width=twice), width=twice),
    ]
    rows = [beside(panels[:4]), beside(panels[4:])]
    sheet = Image.new("RGB", (rows[0].width, 2 * rows[0].height + 4), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * (row.height + 4)))
    sheet.quantize(64).save(os.path.join(folder, "latent_fm-wrong.png"), optimize=True)


def ring_net(flags="", changes=None, width=1):
    """A network after 1,500 updates on the ring.

    changes: functions of latent_fm.py that are replaced. width: the data are multiplied by it.
    """
    import latent_fm

    kept, load = [], latent_fm.load_training_data

    def load_scaled(args, world):
        data = load(args, world)
        data.x = data.x * width
        return data

    ends = {"load_training_data": load_scaled, "finish": lambda run, net, *_: kept.append(net)}
    with (
        tempfile.TemporaryDirectory() as out,
        mock.patch.multiple(latent_fm, **ends, **(changes or {})),
    ):
        more = f"--data ring --pool 4000 --max_train_steps 1500 --preview_every 0 {flags}"
        latent_fm.main([*more.split(), "--output_dir", out])
    return kept[0]


def panel(text, net, changes=None, gamma=1, width=1, side=232, reach=1.6):
    """400 samples by 32 Heun steps, in the colours of the classes that were asked for.

    changes: functions of latent_fm.py that are replaced.  -> text, a Pillow image.
    """
    import torch
    from PIL import Image, ImageDraw

    import latent_fm
    from models.worlds.measures import balanced_labels
    from models.worlds.ring import COLOURS

    label = balanced_labels(400, 4)
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    with mock.patch.multiple(latent_fm, **(changes or {})) if changes else contextlib.nullcontext():
        x = latent_fm.sample(net, noise, label, 32, gamma) / width
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    for (a, b), k in zip(x.clamp(-reach, reach).tolist(), label.tolist()):
        at = (a + reach) / (2 * reach) * side, (reach - b) / (2 * reach) * side
        draw.ellipse([at[0] - 2, at[1] - 2, at[0] + 2, at[1] + 2], fill=COLOURS[k])
    return text, image
