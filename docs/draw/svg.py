"""Diagrams and curves as SVG, once for light pages and once for dark ones, with nothing installed.

    c = Canvas(760, 300)
    c.box("student", 40, 100, "student G", kind="student")
    c.arrow("student", "x", "x = G(z)")
    c.save("docs/figures/dmd-diagram")      # ...-light.svg and ...-dark.svg

Coordinates are pixels, x to the right and y down; a box is placed by its middle. The colours mean
the same in every diagram: see KINDS.
"""

import math
import os
from xml.sax.saxutils import escape

THEMES = {  # of GitHub's two pages
    "light": dict(page="#ffffff", ink="#1f2328", faint="#818b98", line="#d1d9e0", panel="#f6f8fa"),
    "dark": dict(page="#0d1117", ink="#e6edf3", faint="#9198a1", line="#3d444d", panel="#151b23"),
}
KINDS = {  # colour of outline and text in light and in dark pages
    "teacher": ("#1f62a8", "#6cb0ff"),  # frozen: dashed outline
    "student": ("#1a7f45", "#4ac26b"),
    "fake": ("#7d479c", "#c297e8"),
    "gradient": ("#c4501b", "#ff9b5e"),  # arrows of gradients, and what they come from
    "noise": ("#6e7781", "#9198a1"),
    "sample": ("#1f2328", "#e6edf3"),  # tensors
    "loss": ("#c4501b", "#ff9b5e"),
    "wrong": ("#cf222e", "#ff7b72"),
}
SERIES = ["student", "teacher", "fake", "gradient", "wrong", "noise"]  # colours of curves
FONT = "-apple-system,BlinkMacSystemFont,'Segoe UI','Noto Sans',Helvetica,Arial,sans-serif"


class Canvas:
    """Collects shapes, in the colours of one theme at a time, when it is saved."""

    def __init__(self, width, height):
        self.width, self.height, self.shapes, self.boxes = width, height, [], {}

    def box(self, name, x, y, text, kind="sample", width=None, height=None):
        """A rounded box around `text` (lines split at newlines), its middle at (x, y).

        A teacher's outline is dashed, as it is frozen; a sample has none, as it is no network.
        """
        lines = text.split("\n")
        width = width or 22 + 7.6 * max(map(len, lines))
        height = height or 18 + 17 * len(lines)
        self.boxes[name] = (x, y, width, height)

        def draw(colour, theme):
            shape = ""
            if kind not in ("sample", "noise"):
                dash = ' stroke-dasharray="6 4"' if kind == "teacher" else ""
                shape = (
                    f'<rect x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" '
                    f'height="{height:.1f}" rx="8" fill="{theme["panel"]}" '
                    f'stroke="{colour(kind)}" stroke-width="1.8"{dash}/>'
                )
            top = y - 17 * (len(lines) - 1) / 2 + 5
            return shape + "".join(
                words(x, top + 17 * i, line, colour(kind), "middle", 14)
                for i, line in enumerate(lines)
            )

        self.shapes.append(draw)

    def text(self, x, y, text, kind=None, anchor="start", size=13):
        """A line of text; kind None: in the page's faint ink."""
        self.shapes.append(
            lambda colour, theme: words(
                x, y, text, colour(kind) if kind else theme["faint"], anchor, size
            )
        )

    def arrow(self, start, end, text="", kind="sample", via=(), at=0.5, stopped=False, off=-7):
        """An arrow from box or point `start` to box or point `end`, through the points `via`.

        kind "gradient": a dashed arrow, a gradient. text stands beside the leg that lies `at` of
        the way, off pixels below it. stopped: a bar across its end, as the gradient stops there.
        """
        points = [self.point(start), *via, self.point(end)]
        points[0] = self.edge(start, points[1])
        points[-1] = self.edge(end, points[-2])
        leg = min(len(points) - 2, int(at * (len(points) - 1)))
        (x0, y0), (x1, y1) = points[leg], points[leg + 1]
        part = at * (len(points) - 1) - leg
        x, y = x0 + part * (x1 - x0), y0 + part * (y1 - y0)

        def draw(colour, theme):
            stroke = colour(kind)
            dash = ' stroke-dasharray="5 4"' if kind == "gradient" else ""
            path = "M" + " L".join(f"{a:.1f} {b:.1f}" for a, b in points)
            shape = (
                f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="1.8"'
                f'{dash} stroke-linejoin="round"/>'
            )
            shape += head(points[-2], points[-1], stroke, stopped)
            if text and abs(y1 - y0) > abs(x1 - x0):  # beside a steep leg
                return shape + words(x + 8, y + 5, text, stroke, "start", 13)
            return shape + (words(x, y + off, text, stroke, "middle", 13) if text else "")

        self.shapes.append(draw)

    def point(self, place):
        """The middle of a box, or a point itself."""
        return self.boxes[place][:2] if isinstance(place, str) else place

    def edge(self, place, towards):
        """Where the line from the middle of a box leaves it, four pixels outside."""
        if not isinstance(place, str):
            return place
        x, y, width, height = self.boxes[place]
        dx, dy = towards[0] - x, towards[1] - y
        to_side = (width / 2 + 4) / abs(dx) if dx else math.inf
        to_top = (height / 2 + 4) / abs(dy) if dy else math.inf
        s = min(to_side, to_top, 1.0)
        return x + s * dx, y + s * dy

    def chart(self, x, y, width, height, title, series, low=None, high=None, log=False, xs="step"):
        """Curves in a frame with its upper left corner at (x, y).

        series: [(name, [(step, value), ...]) or (name, points, kind)]. low, high: ends of the
        value axis. log: in powers of ten. xs: what the horizontal axis counts.
        """
        flat = [v for _, points, *_ in series for _, v in points if math.isfinite(v)]
        low = min(flat) if low is None else low
        high = max(flat) if high is None else high
        first = min(p[0][0] for _, p, *_ in series)
        last = max(p[-1][0] for _, p, *_ in series)
        scale = math.log10 if log else float
        bottom, span = scale(low), scale(high) - scale(low) or 1.0

        def place(step, value):
            inside = min(max(value, low), high)
            across = (step - first) / (last - first or 1)
            return x + across * width, y + height - (scale(inside) - bottom) / span * height

        def draw(colour, theme):
            shape = (
                f'<rect x="{x}" y="{y}" width="{width}" height="{height}" '
                f'fill="{theme["panel"]}" stroke="{theme["line"]}"/>'
            )
            shape += words(x, y - 8, title, theme["ink"], "start", 13)
            for value in ticks(low, high, log):
                to = place(first, value)[1]
                shape += (
                    f'<path d="M{x} {to:.1f} H{x + width}" stroke="{theme["line"]}" fill="none"/>'
                )
                shape += words(x - 6, to + 4, f"{value:g}", theme["faint"], "end", 11)
            for step in (first, last):
                at = place(step, low)[0]
                shape += words(at, y + height + 15, f"{step:g}", theme["faint"], "middle", 11)
            shape += words(x + width / 2, y + height + 15, xs, theme["faint"], "middle", 11)
            for i, (name, points, *own) in enumerate(series):
                stroke = colour(own[0] if own else SERIES[i % len(SERIES)])
                where = [place(s, v) for s, v in points if math.isfinite(v)]
                path = "M" + " L".join(f"{a:.1f} {b:.1f}" for a, b in where)
                shape += f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="1.6"/>'
                shape += words(x + width - 6, y + 16 + 15 * i, name, stroke, "end", 12)
            return shape

        self.shapes.append(draw)

    def legend(self, y, frozen=True):
        """What lines and bars mean, and the dashed outline of a frozen network.  -> the canvas."""
        self.arrow((24, y - 4), (74, y - 4), "", "gradient")
        self.text(84, y, "gradient", None, "start", 12)
        self.arrow((164, y - 4), (204, y - 4), stopped=True)
        self.text(216, y, "no gradient goes back through here", None, "start", 12)
        if frozen:
            self.box("legend", 478, y - 4, "", "teacher", 40, 18)
            self.text(506, y, "frozen", None, "start", 12)
        return self

    def save(self, path):
        """Write path-light.svg and path-dark.svg."""
        for i, (name, theme) in enumerate(THEMES.items()):
            colours = {kind: pair[i] for kind, pair in KINDS.items()}
            body = "\n".join(shape(colours.__getitem__, theme) for shape in self.shapes)
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} '
                f'{self.height}" width="{self.width}" height="{self.height}" '
                f'font-family="{FONT}">\n'
                f'<rect width="100%" height="100%" fill="{theme["page"]}"/>\n{body}\n</svg>\n'
            )
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(f"{path}-{name}.svg", "w") as f:
                f.write(svg)


def words(x, y, text, colour, anchor, size):
    """One line of text. `a_b` and `a_{bc}` become subscripts, `^` superscripts."""
    spans, i = "", 0
    while i < len(text):
        if text[i] in "_^" and i + 1 < len(text) and i:
            sub, i = text[i], i + 1
            end = text.index("}", i) if text[i] == "{" else i
            inside = text[i + 1 : end] if text[i] == "{" else text[i]
            shift = 4 if sub == "_" else -5
            spans += f'<tspan dy="{shift}" font-size="{size * 0.75:g}">{escape(inside)}</tspan>'
            spans += f'<tspan dy="{-shift}">&#8203;</tspan>'
            i = end + 1
        else:
            end = i + 1
            while end < len(text) and text[end] not in "_^":
                end += 1
            spans += escape(text[i:end])
            i = end
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" '
        f'text-anchor="{anchor}" xml:space="preserve">{spans}</text>'
    )


def head(before, end, colour, stopped):
    """The head of an arrow that arrives from `before`; a bar across it where it is stopped."""
    length = math.dist(before, end) or 1.0
    dx, dy = (end[0] - before[0]) / length, (end[1] - before[1]) / length
    if stopped:
        a, b = (end[0] - 8 * dy, end[1] + 8 * dx), (end[0] + 8 * dy, end[1] - 8 * dx)
        bar = f"M{a[0]:.1f} {a[1]:.1f} L{b[0]:.1f} {b[1]:.1f}"
        return f'<path d="{bar}" stroke="{colour}" stroke-width="4"/>'
    left = end[0] - 10 * dx + 5 * dy, end[1] - 10 * dy - 5 * dx
    right = end[0] - 10 * dx - 5 * dy, end[1] - 10 * dy + 5 * dx
    corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in (end, left, right))
    return f'<polygon points="{corners}" fill="{colour}"/>'


def ticks(low, high, log):
    """A few round values between low and high."""
    if log:
        ends = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        return [10.0**k for k in range(ends[0], ends[1] + 1)]
    step = 10.0 ** math.floor(math.log10((high - low or 1.0) / 3))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 4.5)
    return [
        k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]
