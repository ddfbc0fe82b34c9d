"""Pictures of the plane for a projector: one axis range, one set of colours, large type.

    panel = Plane("student, update 100", "in the discs 97%").discs().dots(x)
    save(path, [[panel, other]])                # rows of panels -> PNG
    save_film(path, [[[panel, other]], ...])    # rows for each frame -> GIF

A method that draws returns its panel. Points are tensors (n, 2). The colours are those of the
diagrams: green for samples, blue for the teacher, purple for the fake, orange for what moves a
sample, grey for where the data are.
"""

import os

import torch
from PIL import Image, ImageDraw, ImageFont

from models.plumbing import film
from models.worlds.ring import COLOURS, RingTeacher

SIDE, REACH, GAP, ZOOM = 300, 1.8, 8, 3  # pixels of a panel, half its width in the plane, ...
TITLE, NOTE = 19, 16  # sizes of type, in pixels
BLUE, PURPLE, ORANGE = film.BLUE, film.PURPLE, film.ORANGE  # teacher, fake, what moves a sample
GREEN, RED, LIGHT = COLOURS[2], COLOURS[0], "#e4e9ef"  # samples, what is wrong, where data are
DARK = "#8c9aac"  # noised samples
MEANS, STD = RingTeacher().means.float(), RingTeacher().std
INSIDE = 3 * STD  # radius of a grey disc, in which 98.9 % of a mode's points lie


class Plane:
    """One panel, the square |x|, |y| <= REACH, drawn ZOOM times as large and then made smaller."""

    def __init__(self, title, note=""):
        self.title, self.note = title, note
        self.picture = Image.new("RGB", (SIDE * ZOOM, SIDE * ZOOM), "white")
        self.draw = ImageDraw.Draw(self.picture)

    def pixels(self, points):
        """Points (n, 2) -> [[x, y], ...] of the large picture; far ones are brought nearer."""
        flip = torch.tensor([1.0, -1.0])
        near = points.detach().float().clamp(-9, 9) * flip + REACH
        return (near * (SIDE * ZOOM / (2 * REACH))).tolist()

    def circles(self, points, radius, colour):
        """Filled circles around points; radius in the plane's units."""
        r = radius * SIDE * ZOOM / (2 * REACH)
        for x, y in self.pixels(points):
            self.draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)
        return self

    def discs(self, t=0.0):
        """Where 98.9 % of the data lie, noised to level t: 3 deviations around each mode."""
        std = ((1 - t) ** 2 * STD**2 + t**2) ** 0.5
        return self.circles((1 - t) * MEANS, 3 * std, LIGHT)

    def dots(self, points, colour=GREEN, radius=0.022):
        """Samples."""
        return self.circles(points, radius, colour)

    def paths(self, states, colour, width=4):
        """Lines through states (steps, n, 2), one for each of the n samples."""
        for path in states.transpose(0, 1):
            self.draw.line([tuple(p) for p in self.pixels(path)], fill=colour, width=width)
        return self

    def arrows(self, start, by, colour, longest=0.4):
        """From start (n, 2) by (n, 2). Long ones are cut, so that none hides the others."""
        length = by.norm(dim=1, keepdim=True).clamp_min(1e-9)
        by = by * (length.clamp_max(longest) / length)
        for (x, y), (to_x, to_y) in zip(self.pixels(start), self.pixels(start + by)):
            dx, dy = to_x - x, to_y - y
            long = (dx * dx + dy * dy) ** 0.5
            if long < 4:
                self.draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
                continue
            self.draw.line([x, y, to_x, to_y], fill=colour, width=6)
            back = min(22.0, 0.6 * long) / long
            left = to_x - back * (dx - 0.5 * dy), to_y - back * (dy + 0.5 * dx)
            right = to_x - back * (dx + 0.5 * dy), to_y - back * (dy - 0.5 * dx)
            self.draw.polygon([(to_x, to_y), left, right], fill=colour)
        return self

    def curve(self, values, colour, high, text="", row=0):
        """Values at equal distances from left to right, 0 at the bottom and `high` at the top."""
        bottom, height = SIDE * ZOOM, SIDE * ZOOM
        across = torch.linspace(0, SIDE * ZOOM, len(values)).tolist()
        points = [(x, bottom - height * v / high) for x, v in zip(across, values)]
        self.draw.line(points, fill=colour, width=9)
        font = ImageFont.load_default(NOTE * ZOOM)
        self.draw.text((24, 18 + row * (NOTE + 6) * ZOOM), text, fill=colour, font=font)
        return self

    def image(self):
        """The panel with its title above and its note below."""
        sheet = Image.new("RGB", (SIDE, SIDE + TITLE + NOTE + 20), "white")
        draw = ImageDraw.Draw(sheet)
        draw.text((4, 2), self.title, fill=film.INK, font=ImageFont.load_default(TITLE))
        top = TITLE + 8
        sheet.paste(self.picture.resize((SIDE, SIDE), Image.LANCZOS), (0, top))
        draw.rectangle([0, top, SIDE - 1, top + SIDE - 1], outline=film.FAINT)
        font = ImageFont.load_default(NOTE)
        draw.text((4, top + SIDE + 3), self.note, fill=film.INK, font=font)
        return sheet


def sheet(rows):
    """Rows of panels below one another; None leaves a place empty.  -> a Pillow image."""
    images = [[panel and panel.image() for panel in row] for row in rows]
    width, height = (a + GAP for a in images[0][0].size)
    columns = max(map(len, rows))
    page = Image.new("RGB", (columns * width - GAP, len(rows) * height - GAP), "white")
    for i, row in enumerate(images):
        for k, image in enumerate(row):
            if image:
                page.paste(image, (k * width, i * height))
    return page


def save(path, rows):
    """A PNG of these rows of panels."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    sheet(rows).quantize(128, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


def save_film(path, sheets, ms=250):
    """A GIF of one sheet for each frame; the last one stays for two seconds."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    film.write_gif(path, [sheet(rows) for rows in sheets], every=1, ms=ms)


def grid(points=11, edge=1.6):
    """(points^2, 2) places for arrows."""
    along = torch.linspace(-edge, edge, points)
    return torch.cartesian_prod(along, along)
