"""Rows of samples as PNG and GIF."""

import io

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from models.files import atomic_write

WIDEST = 2560  # pixels of a row of samples; longer ones go on in the next line


def picture(x, world=None, zoom=None):
    """One row of samples as an image (H, W, 3) uint8.

    A world draws its own samples. Without a world, x (n, 3, H, W) is taken as RGB in [-1, 1]; other
    numbers of channels are latents, shown as their first three channels (or one in grey), each
    scaled by its standard deviation. Videos (n, C, T, H, W) become filmstrips of up to five frames.
    zoom: how large a pixel is drawn; None: 3, or 1 where a side has more than 64. A row that is
    wider than WIDEST is broken into lines, between samples where one fits.
    """
    if world is not None:
        return world.picture(x)
    x, together = x.float().cpu(), 1
    if x.dim() == 5:
        frames = torch.linspace(0, x.shape[2] - 1, min(5, x.shape[2])).round().long()
        x = x[:, :, frames].transpose(1, 2).flatten(0, 1)  # (n * up to 5, C, H, W)
        together = len(frames)
    if x.shape[1] != 3:
        x = x[:, :3] if x.shape[1] > 3 else x[:, :1].expand(-1, 3, -1, -1)
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (3 * x.std((0, 2, 3), keepdim=True) + 1e-6)
    zoom = zoom or (1 if max(x.shape[2:]) > 64 else 3)
    fitting = max(1, WIDEST // (x.shape[3] * zoom + 2))
    fitting -= fitting % together if fitting > together else 0
    return lines([tile(part, zoom) for part in x.split(fitting)])


def lines(parts):
    """Rows of tiles (h, w, 3) uint8 below one another, filled up with white.  -> (H, W, 3)."""
    width = max(part.shape[1] for part in parts)
    filled = [((0, 0), (0, width - part.shape[1]), (0, 0)) for part in parts]
    return np.concatenate([np.pad(p, f, constant_values=255) for p, f in zip(parts, filled)])


def tile(x, zoom=3):
    """One row of tiles with white borders one pixel wide.

    Images (n, 1 or 3, H, W) in [-1, 1] -> (H zoom + 2, n (W zoom + 2), 3) uint8.
    """
    levels = ((x.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    tiles = levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    tiles = tiles.repeat(zoom, 1).repeat(zoom, 2)
    tiles = np.pad(tiles, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    return np.concatenate(list(tiles), axis=1)


def sheet(rows):
    """A Pillow image of labelled rows, [(text, (H, W, 3) uint8), ...], each text above its row."""
    font, bar = ImageFont.load_default(), 16
    width = max(a.shape[1] for _, a in rows)
    image = Image.new("RGB", (width, sum(a.shape[0] + bar for _, a in rows)), "white")
    draw, y = ImageDraw.Draw(image), 0
    for text, a in rows:
        draw.text((4, y + 2), text, fill="black", font=font)
        image.paste(Image.fromarray(a), (0, y + bar))
        y += bar + a.shape[0]
    return image


def save_grid(path, rows):
    """Write the sheet of these rows, [(text, (H, W, 3) uint8), ...], as a PNG."""
    data = io.BytesIO()
    sheet(rows).save(data, "PNG")
    atomic_write(path, data.getvalue())


def save_gif(path, rows, world=None, ms=120):
    """Write labelled rows of videos, [(text, (n, C, T, H, W)), ...], as an endlessly looping GIF.

    ms: milliseconds that a frame is shown.
    """
    images = [
        sheet([(text, picture(x[:, :, i : i + 1], world)) for text, x in rows])
        for i in range(rows[0][1].shape[2])
    ]
    data = io.BytesIO()
    images[0].save(data, "GIF", save_all=True, append_images=images[1:], duration=ms, loop=0)
    atomic_write(path, data.getvalue())
