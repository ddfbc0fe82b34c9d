"""docs/scale.md's table: how many 80 GB GPUs a released teacher and a method take.

    python -m tests.scale                      # prints the table, a few minutes
    python -m tests.scale --write              # puts it into docs/scale.md

Every row is what `--dry_run` says: the smallest of 1, 2, 4, ... GPUs on which the run fits, with
the script's released defaults and one sample a rank (TRELLIS: the stated number).
"""

import argparse
import importlib
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from models.plumbing.dry_run import GB, Plan, teacher_network  # noqa: E402
from tests.folders import save_config  # noqa: E402

PAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs", "scale.md")
MEMORY, COUNTS = 80, (1, 2, 4, 8, 16, 32, 64)
ADAPTERS = "--lora_rank 64 --fake_lora_rank 64"


@dataclass(frozen=True)
class Row:
    """release: of tests/folders.py; folder: how its folder is called; sample: in words; flags: of
    the run; adapters: further ones for adapters."""

    release: str
    folder: str
    sample: str
    script: str
    flags: str
    adapters: str = ADAPTERS

    def command(self, gpus=1):
        """As one would type it, with full networks."""
        run = f"torchrun --nproc-per-node {gpus} {self.script}.py" if gpus > 1 else ""
        run = run or f"python {self.script}.py"
        return f"{run} --teacher {self.folder} {self.flags}"


WAN_1B, WAN_22 = "Wan2.1-T2V-1.3B-Diffusers", "Wan2.2-T2V-A14B-Diffusers"
WAN_5B = "Wan2.2-TI2V-5B-Diffusers"
TEXT = "--prompts prompts.safetensors --mixed_precision bf16"
TRELLIS = "TRELLIS-image-large/ckpts"
VIDEO, IMAGE = "81 frames of 480 x 832", "1 frame of 720 x 1280"
AT_480P, AT_720P = "--sample_shape 16 21 60 104", "--sample_shape 16 1 90 160"
AT_1328 = "--sample_shape 16 166 166"
ROWS = [
    Row("Wan 2.1 T2V 1.3B", WAN_1B, VIDEO, "dmd", f"{TEXT} {AT_480P}"),
    Row("Wan 2.1 T2V 1.3B", WAN_1B, VIDEO, "phased_dmd", f"{TEXT} {AT_480P}"),
    Row(
        *("Wan 2.1 T2V 1.3B", WAN_1B, VIDEO, "linvideo"),
        *(f"{TEXT} {AT_480P} --target_layers 16", "--lora_rank 64"),
    ),
    Row("Wan 2.2 T2V A14B", WAN_22, IMAGE, "phased_dmd", f"{TEXT} {AT_720P}"),
    Row("Wan 2.2 T2V A14B", WAN_22, VIDEO, "phased_dmd", f"{TEXT} {AT_480P}"),
    Row("Wan 2.2 TI2V 5B", WAN_5B, "121 frames of 704 x 1280", "dmd", TEXT),
    Row("CogVideoX-2B", "CogVideoX-2b", "49 frames of 480 x 720", "tdm", TEXT),
    Row("Z-Image", "Z-Image", "1024 x 1024", "decoupled_dmd", TEXT),
    Row("Qwen-Image", "Qwen-Image", "1328 x 1328", "phased_dmd", f"{TEXT} {AT_1328}"),
    Row("Lumina-Image 2.0", "Lumina-Image-2.0", "1024 x 1024", "decoupled_dmd", TEXT),
    Row("SDXL base 1.0", "stable-diffusion-xl-base-1.0", "1024 x 1024", "dmd", TEXT),
    Row("Stable Diffusion 1.5", "stable-diffusion-v1-5", "512 x 512", "dmd", TEXT),
    Row("PixArt-alpha 512", "PixArt-XL-2-512x512", "512 x 512", "tdm", TEXT),
    Row("DiT-XL/2 256", "DiT-XL-2", "256 x 256", "dmd", "--mixed_precision bf16"),
    Row("SiT-XL/2 256", "SiT-XL-2", "256 x 256", "dmd", "--mixed_precision bf16"),
    Row(
        *("TRELLIS image structure", f"{TRELLIS}/ss_flow_img_dit_L_16l8_fp16", "8 structures"),
        *("mdt_dist", "--data latents.safetensors --mixed_precision bf16", "--lora_rank 64"),
    ),
    Row(
        *("TRELLIS image latents", f"{TRELLIS}/slat_flow_img_dit_L_64l8p2_fp16"),
        *("8 x 20,000 points", "mdt_dist"),
        *("--data slat.safetensors --mixed_precision bf16", "--lora_rank 64"),
    ),
]


def parse(script, flags):
    """Flags of a script -> namespace."""
    return importlib.import_module(script).parse_args(shlex.split(flags))


def smallest(row, folder, adapters=False):
    """-> the smallest number of GPUs and the Plan there; the largest number's plan with None."""
    flags = [w for w in shlex.split(row.flags)]
    for name in ("--prompts", "--data"):
        if name in flags:  # there is no such file here: lengths are those of the pipelines
            del flags[flags.index(name) : flags.index(name) + 2]
    asked = ["--teacher", folder, *flags, *(shlex.split(row.adapters) if adapters else [])]
    args = parse(row.script, shlex.join(asked))
    module, measured = importlib.import_module(row.script), {}
    net, parts = teacher_network(args), module.cost(args)
    for count in COUNTS:
        args.shard_ranks = count
        plan = Plan(args, net, *parts, count, "cuda", measured)
        if plan.fits(MEMORY * GB):
            return count, plan
    return None, plan


def cell(count, plan):
    """What a cell of the table says."""
    if count is None:
        return f"more than {COUNTS[-1]} ({plan.peak() / GB:.0f} GB each)"
    return f"**{count}**, {plan.peak() / GB:.0f} GB, {plan.seconds(plan.args.device_tflops):.3g} s"


def table():
    """-> lines of Markdown: the table, and the commands."""
    lines = ["| teacher | a sample | script | full | adapters |", "|---|---|---|---|---|"]
    commands = ["```bash"]
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            teacher = save_config(row.release, os.path.join(folder, "teacher"))
            full = smallest(row, teacher)
            small = smallest(row, teacher, adapters=True)
        name = f"{row.release} | {row.sample} | `{row.script}.py`"
        lines.append(f"| {name} | {cell(*full)} | {cell(*small)}, with `{row.adapters}` |")
        commands.append(row.command(full[0] or small[0] or COUNTS[-1]))
        print(lines[-1], flush=True)
    return [*lines, "", *commands, "```"]


def write(lines):
    """Replace what is between the two marks of docs/scale.md."""
    with open(PAGE) as f:
        before, rest = f.read().split("<!-- table -->\n")
        after = rest.split("<!-- end of table -->\n")[1]
    text = "\n".join(lines)
    with open(PAGE, "w") as f:
        f.write(f"{before}<!-- table -->\n{text}\n<!-- end of table -->\n{after}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--write", action="store_true", help="put the table into docs/scale.md")
    args, lines = p.parse_args(argv), table()
    if args.write:
        write(lines)


if __name__ == "__main__":
    main()
