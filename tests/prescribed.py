"""The tables of README and docs/teachers.md, from models/plumbing/releases.py and papers.py.

`python -m tests.pages --write` writes them, and a test finds a page that has others. A number is
what a script takes where nothing else is given: it comes from its `parse_args`, with a folder that
has the release's config and no weights.
"""

import functools
import importlib
import tempfile

from models.plumbing.flags import as_text
from models.plumbing.papers import PAPERS, row_of
from models.plumbing.releases import RELEASES
from tests.folders import CONFIGS, save_config

# Column: flag, in the table of a method.
COLUMNS = {
    "steps": "student_steps",
    "guidance": "guidance_scale",
    "shift": "timestep_shift",
    "rate": "learning_rate",
    "rate of the fake": "learning_rate_fake",
    "R": "fake_update_ratio",
    "updates": "max_train_steps",
    "linear layers": "target_layers",
}
OWN = {  # of one method
    "guidance": {"mdt_dist": ("guidance_vm", "guidance_vd")},
    "steps": {"linvideo": ("sampling_steps",)},
    "rate of the fake": {"linvideo": ()},
    "R": {"linvideo": ()},
}
# README's rows: what they are called, which releases they are, what they need.
FRONT = (
    ("Wan 2.1 1.3B, 14B", ("Wan 2.1 T2V 1.3B", "Wan 2.1 T2V 14B"), "1.3B: one 80 GB GPU"),
    (
        "Wan 2.2 A14B",
        ("Wan 2.2 T2V A14B",),
        "with adapters one 80 GB GPU for frames, two for videos; sixteen with a full fake",
    ),
    ("Z-Image", ("Z-Image",), "four 80 GB GPUs, one with adapters"),
    ("Qwen-Image", ("Qwen-Image",), "one 80 GB GPU with adapters, eight with a full fake"),
    ("Lumina-Image 2.0", ("Lumina-Image 2.0",), "two 80 GB GPUs, one with adapters"),
    ("Stable Diffusion 1.5, SDXL", ("Stable Diffusion 1.5", "SDXL base 1.0"), "one 80 GB GPU"),
    ("PixArt-alpha", ("PixArt-alpha 512", "PixArt-alpha 1024"), "one GPU, 18 GB"),
    (
        "DiT, SiT, LFM (ImageNet)",
        ("DiT-XL/2 256", "DiT-XL/2 512", "SiT", "LFM ImageNet"),
        "one GPU or more; weights through `models.convert`",
    ),
    ("CogVideoX-2B", ("CogVideoX-2B",), "one 80 GB GPU"),
    (
        "TRELLIS, both stages",
        ("TRELLIS image structure", "TRELLIS image latents"),
        "latents and image tokens of your own shapes",
    ),
)


def table(head, rows):
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def front():
    """README's table: which scripts have a row for a teacher."""
    rows = []
    for name, releases, needs in FRONT:
        scripts = [m for m in PAPERS if any(row_of(m, release) for release in releases)]
        links = ", ".join(f"[`{m}.py`](docs/{m}.md#launch)" for m in scripts)
        rows.append([name, links, needs])
    return table(["teacher", "scripts whose papers have it, with commands", "what it needs"], rows)


def common():
    """What a release wants of every method."""
    rows, releases = [], {r.name: r for r in RELEASES}  # some have two configs
    for r in releases.values():
        settings = dict(r.settings)
        guidance, shift = settings.pop("guidance_scale"), settings.pop("timestep_shift", None)
        shift = "the script's" if shift is None else as_text(shift)
        more = ", ".join(f"`--{flag} {as_text(value)}`" for flag, value in settings.items())
        name = f"{r.name} (distilled)" if r.distilled else r.name
        rows.append([name, as_text(guidance), shift, more, r.source])
    return table(["teacher", "guidance", "shift", "more", "source"], rows)


@functools.cache
def arguments(method, release):
    """What a script takes for a release, as its parse_args has it."""
    script = importlib.import_module(method)
    with tempfile.TemporaryDirectory() as folder:
        return vars(script.parse_args(["--teacher", save_config(release, f"{folder}/teacher")]))


def of_method(method):
    """The rows of a script: defaults, and what is none."""
    head, rows = ["teacher", *COLUMNS, "batch", "GAN", "source and notes"], []
    for row in PAPERS[method]:
        args = arguments(method, next(name for name in row.teachers if name in CONFIGS))
        line = [", ".join(row.teachers)]
        for column, flag in COLUMNS.items():
            flags = OWN.get(column, {}).get(method, (flag,))
            known = [f for f in flags if args.get(f) is not None]
            texts = [as_text(args[f]) for f in known]
            line.append(f"({texts[0]})" if set(known) & set(row.unstated) else ", ".join(texts))
        source = f"{row.source}; {row.note}".removesuffix("; ")
        rows.append([*line, row.batch, row.gan or "", source])
    kept = [i for i, name in enumerate(head) if any(line[i] for line in rows)]
    return table([head[i] for i in kept], [[line[i] for i in kept] for line in rows])


@functools.cache
def block(name):
    """The text between the marks of a page: "front", "common" or a script's name."""
    named = {"front": front, "common": common}
    return named[name]() if name in named else of_method(name)
