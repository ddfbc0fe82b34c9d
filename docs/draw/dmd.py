"""Pictures of docs/dmd.md."""

from docs.draw.svg import Canvas


def draw(folder):
    diagram().save(f"{folder}/dmd-diagram")


def diagram():
    """One update of the student, and one of the fake score."""
    c = Canvas(900, 400)
    c.text(24, 30, "Student's update: its sample is noised, and two scores say where to move it.")
    c.box("z", 60, 120, "noise z", "noise")
    c.box("student", 190, 120, "student G", "student")
    c.box("x", 320, 120, "x = G(z)")
    c.box("x_t", 470, 120, "x_t = α_t x + σ_t ε")
    c.box("teacher", 660, 75, "teacher μ_{real}", "teacher")
    c.box("fake", 660, 165, "fake μ_{fake}", "fake")
    c.box("g", 830, 120, "g ∝ μ_{fake} − μ_{real}", "gradient")
    c.arrow("z", "student")
    c.arrow("student", "x")
    c.arrow("x", "x_t", stopped=True)
    c.arrow("x_t", "teacher")
    c.arrow("x_t", "fake")
    c.arrow("teacher", "g")
    c.arrow("fake", "g")
    c.arrow("g", "x", "g enters x, and from there G only", "gradient", via=[(830, 220), (320, 220)])
    c.arrow((296, 138), (218, 138), "", "gradient")
    c.text(24, 282, "Fake's update, R times before it: learn to denoise what G makes now.")
    c.box("x2", 320, 340, "x, detached")
    c.box("x_t2", 470, 340, "x_t")
    c.box("fake2", 660, 340, "fake", "fake")
    c.box("l2", 830, 340, "|fake − x|^2", "loss")
    c.arrow("x2", "x_t2")
    c.arrow("x_t2", "fake2")
    c.arrow("fake2", "l2")
    c.arrow("l2", "fake2", "", "gradient", via=[(830, 380), (660, 380)])
    return c
