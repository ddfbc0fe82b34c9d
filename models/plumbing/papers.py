"""What each method's paper prescribes per teacher: one table, by script and release.

    settings("tdm", "SDXL base 1.0")     # {flag: default}, the strongest of a script's defaults
    print(help_of("tdm"))                # the rows of a script, as --help ends with them

`releases.py` has what a teacher wants of every method. docs/teachers.md is made from both tables.
Batches are of all ranks together, so that no flag can have them for a default: give
--gradient_accumulation_steps. A GAN needs --data.
"""

import textwrap
from dataclasses import dataclass, field

PIXART_ALPHA = tuple(f"PixArt-alpha {size}" for size in (256, 512, 1024))
IMAGENET = ("DiT-XL/2 256", "DiT-XL/2 512", "SiT", "LFM ImageNet")


@dataclass(frozen=True)
class Row:
    """A method's row for some teachers.

    teachers  names of releases
    source    where the values are from; nothing of it is this repository's
    settings  {flag: default} that differs from what the script has for released teachers
    batch     of one update, all ranks together
    gan       the student's weight; None: the method has no GAN, or the paper none for this teacher
    unstated  flags whose defaults are this repository's: the source says nothing of them, or what
              is in the note
    note      in words, what else the source has
    """

    teachers: tuple
    source: str
    settings: dict = field(default_factory=dict)
    batch: str = "not stated"
    gan: str | None = None
    unstated: tuple = ()
    note: str = ""


RATES = ("learning_rate", "learning_rate_fake")
ADAPTERS = "adapters: rank 64, alpha 8"
PAPERS = {
    "dmd": (
        Row(
            ("SDXL base 1.0",),
            "DMD2 2405.14867, App. F, and its scripts",
            dict(guidance_scale=8.0),
            batch="128",
            gan="5e-3",
            note="20,000 updates of the fake. One step: --student_times 0.4 (index 399), 25,000 of "
            "them, after 2,000 updates on 10,000 pairs at 1e-5. Adapters: rank 64, alpha 8, rates "
            "5e-5, 16,000",
        ),
        Row(
            ("Stable Diffusion 1.5",),
            "DMD2 2405.14867, App. F, and its scripts",
            dict(
                learning_rate=1e-5,
                learning_rate_fake=1e-5,
                fake_update_ratio=10,
                lr_warmup_steps=50,
                guidance_scale=1.75,
                student_steps=1,
            ),
            batch="2048",
            gan="none, then 1e-3",
            note="40,000 updates of the fake, then 5,000 at 5e-7 with the GAN. DMD 2311.18828: "
            "rates 1e-5, R 1, --regression_weight 0.25, 20,000 updates of batch 2304, guidance 3; "
            "also with 8",
        ),
        Row(
            IMAGENET,
            "DMD2 2405.14867, App. F, for EDM on ImageNet 64 x 64",
            batch="280",
            gan="3e-3",
            unstated=("guidance_scale", "max_train_steps"),
            note="no guidance there. 410,000 updates of the fake without a GAN, then 150,000 at "
            "5e-7 with it; or 200,000 with it",
        ),
        Row(
            ("EDM ImageNet 64",),
            "DMD2 2405.14867, App. F",
            dict(learning_rate=2e-6, learning_rate_fake=2e-6, lr_warmup_steps=100, student_steps=1),
            batch="280",
            gan="3e-3",
            unstated=("max_train_steps",),
            note="410,000 updates of the fake without a GAN, then 150,000 at 5e-7 with it; or "
            "200,000 with it",
        ),
        Row(
            PIXART_ALPHA,
            "DMD2 2405.14867, for SDXL",
            batch="128",
            unstated=("student_steps", "guidance_scale", "max_train_steps", *RATES),
            note="the paper has no PixArt",
        ),
        Row(
            ("Wan 2.1 T2V 1.3B",),
            "Self-Forcing 2506.08009, its configs",
            batch="64",
            unstated=("guidance_scale", "max_train_steps"),
            note="it guides a teacher of 14B with 4 (its 3), here the 1.3B is its own",
        ),
    ),
    "phased_dmd": (
        Row(
            ("Wan 2.1 T2V 14B",),
            "Phased DMD 2510.27684, its experiments and Table 1",
            dict(guidance_scale=5.0),
            batch="64",
            unstated=("guidance_scale", "max_train_steps"),
            note=f"{ADAPTERS}, the fake in full; 2 phases. Guidance: LightX2V's config",
        ),
        Row(
            ("Wan 2.2 T2V A14B",),
            "Phased DMD 2510.27684, its experiments and Table 1",
            batch="64",
            unstated=("guidance_scale", "max_train_steps"),
            note=f"{ADAPTERS}, the fake in full; 2 phases, or 4 (Table 6). Guidance: LightX2V's "
            "config",
        ),
        Row(
            ("Qwen-Image",),
            "Phased DMD 2510.27684, its experiments and Table 1",
            batch="64",
            unstated=("guidance_scale", "max_train_steps"),
            note=f"{ADAPTERS}, the fake in full; 2 phases",
        ),
    ),
    "decoupled_dmd": (
        Row(
            ("SDXL base 1.0",),
            "Decoupled DMD 2511.22677, Table 2: DMD2's recipe, but for the schedule",
            dict(
                learning_rate=5e-7,
                learning_rate_fake=5e-7,
                lr_warmup_steps=100,
                guidance_scale=8.0,
                max_train_steps=4000,
            ),
            batch="128",
            gan="5e-3",
        ),
        Row(
            ("Lumina-Image 2.0",),
            "Decoupled DMD 2511.22677, Table 1",
            unstated=("guidance_scale", "fake_update_ratio", "max_train_steps", *RATES),
        ),
        Row(
            ("Z-Image",),
            "Z-Image 2511.22699, and its authors in the issues of its repository",
            unstated=("guidance_scale", "fake_update_ratio", "max_train_steps", *RATES),
        ),
    ),
    "tdm": (
        Row(
            ("Stable Diffusion 1.5",),
            "TDM 2503.06674, App. D",
            dict(max_train_steps=3000, guidance_scale=3.5),
            batch="256",
            note="--student_steps 1 2 4 (TDM-unify): 20,000 updates",
        ),
        Row(
            ("SDXL base 1.0",),
            "TDM 2503.06674, App. D",
            dict(
                max_train_steps=1000,
                learning_rate=1e-6,
                learning_rate_fake=5e-6,
                guidance_scale=8.0,
            ),
            batch="64",
            note="1,000 updates at 512 x 512, then 1,000 at 1024 x 1024 with a fresh fake",
        ),
        Row(PIXART_ALPHA, "TDM 2503.06674, App. D", dict(guidance_scale=3.5), batch="32"),
        Row(
            ("CogVideoX-2B",),
            "TDM 2503.06674, Table 4: the result alone",
            unstated=("guidance_scale", "timestep_shift", "max_train_steps", *RATES),
            note="its authors sample their student at the indices 999, 856, 665 and 399 "
            "(--timestep_shift 2), and find it better than at the pipeline's own, which are the "
            "default here: diffusers has no scheduler for the others",
        ),
    ),
    "linvideo": (
        Row(
            ("Wan 2.1 T2V 1.3B",),
            "LinVideo 2510.08318, its experiments",
            dict(target_layers=16),
            unstated=("guidance_scale", "sampling_steps", "learning_rate"),
            note="50,000 states. In 4 steps: 2,000 updates of DMD2, whose values are not stated",
        ),
        Row(
            ("Wan 2.1 T2V 14B",),
            "LinVideo 2510.08318, its experiments",
            dict(target_layers=22),
            unstated=("guidance_scale", "sampling_steps", "learning_rate"),
            note="50,000 states",
        ),
    ),
    "mdt_dist": (
        Row(
            ("TRELLIS image structure",),
            "MDT-dist 2509.04406, Sec. 5, and its configs",
            batch="256",
            unstated=("student_guidance",),
        ),
        Row(
            ("TRELLIS image latents",),
            "MDT-dist 2509.04406, Sec. 5, and its configs",
            batch="256",
            unstated=("student_guidance",),
        ),
    ),
}


def row_of(method, release):
    """The row of a script for the teacher of this name, or None."""
    rows = PAPERS.get(method, ())
    return next((row for row in rows if release in row.teachers), None)


def settings(method, release):
    """What a script's paper prescribes for a release, {flag: default}."""
    row = row_of(method, release)
    return row.settings if row else {}


def help_of(method):
    """The rows of a script in words, what they change and what no flag has; "" without any."""
    lines = []
    for row in PAPERS.get(method, ()):
        name = ", ".join(row.teachers)
        changed = [f"--{flag} {value:g}" for flag, value in row.settings.items()]
        more = [f"batch {row.batch}", *([f"GAN {row.gan}"] if row.gan else []), row.source]
        text = f"{name}: {'; '.join([' '.join(changed), *more] if changed else more)}"
        lines += textwrap.wrap(text, 96, initial_indent="  ", subsequent_indent="      ")
    head = "released teachers, with what their rows change (docs/teachers.md has all values):"
    return "\n".join([head, *lines]) if lines else ""
