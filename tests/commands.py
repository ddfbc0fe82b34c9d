"""Every command in a code block of README and docs: is it right, and how long does it take?

    python -m tests.commands                  # lists them, with what docs/commands.md knows
    python -m tests.commands --measure ring   # runs those with "ring" in them that can run here,
                                              # one after the other, and writes their times down

`tests/test_commands.py` runs those of a few seconds, and with `--commands` all below 90; what needs
weights or files of one's own can only be parsed, which it does for each.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = ["README.md"]
for folder in ("docs", "docs/results"):
    PAGES += sorted(f"{folder}/{f}" for f in os.listdir(f"{ROOT}/{folder}") if f.endswith(".md"))
TABLE = os.path.join(ROOT, "docs", "commands.md")
NEEDS = (  # what only the reader has: weights, files, GPUs
    r"Wan2|Z-Image|PixArt|TRELLIS|SiT|DiT-|LFM|FOLDER|FILE|MAPS|RUN|NAME|torchrun|prompts|latents\b"
    r"|\.safetensors|photos|renders|venv|http|bench_linear_attention|mdt_speed|\.\.\.|pytest"
    r"|<<|<\(|\$"
)


def blocks(page):
    """The fenced blocks of a page that are meant for a shell -> texts."""
    with open(os.path.join(ROOT, page)) as f:
        found = re.findall(r"^```(\w*)\n(.*?)^```", f.read(), re.M | re.S)
    return [text for language, text in found if language in ("", "bash", "sh")]


def commands():
    """-> {command, on one line and without its comment: [pages it stands on]}."""
    found = {}
    for page in PAGES:
        for text in blocks(page):
            lines = re.sub(r"\\\n\s*", "", text).splitlines()
            for line in lines:
                line = re.sub(r"\s+#.*", "", line).strip()
                if re.match(r"(python3?|torchrun|diff|pip) ", line):
                    found.setdefault(line, []).append(page)
    return found


def own(command):
    """Whether it needs something that is not here."""
    return bool(re.search(NEEDS, command))


def long(command):
    """The default run that a command takes about as long as: a training on glyphs, clips, ...

    None for what takes seconds: the ring, samples of a student, help.
    """
    if re.search(r"docs\.draw --wrong|tests\.(orderings|bench)|latent_fm\.py --sample", command):
        return "minutes"
    script = re.match(r"python (\w+)\.py", command)
    if not script or re.search(r"ring|--sample |--help", command):
        return None
    return f"python {script[1]}.py"


def times():
    """docs/commands.md -> {command: seconds}."""
    if not os.path.isfile(TABLE):
        return {}
    with open(TABLE) as f:
        rows = re.findall(r"^\| `([^`]+)` \| ([\d.]+) \|", f.read(), re.M)
    return {command: float(seconds) for command, seconds in rows}


def execute(command, folder, threads=None, limit=None):
    """Run a command in a copy of the project, `folder`.  -> seconds, finished process."""
    first, *rest = shlex.split(command)
    first = sys.executable if first.startswith("python") else first
    env = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    began = time.perf_counter()
    done = subprocess.run(
        [first, *rest], cwd=folder, env=env, timeout=limit, capture_output=True, text=True
    )
    return time.perf_counter() - began, done


def write(known):
    """docs/commands.md with these times, {command: seconds}."""
    found = commands()

    def pages(command):
        return ", ".join(os.path.basename(p) for p in dict.fromkeys(found[command]))

    measured = sorted((seconds, command) for command, seconds in known.items() if command in found)
    others = [c for c in found if not own(c) and c not in known and long(c)]
    with open(TABLE, "w") as f:
        print(HEAD, file=f)
        for seconds, command in measured:
            print(f"| `{command}` | {seconds:.0f} | {pages(command)} |", file=f)
        print(OTHERS, file=f)
        for command in sorted(others, key=lambda c: (long(c), c)):
            print(f"| `{command}` | `{long(command)}` | {pages(command)} |", file=f)


HEAD = """# How long the commands of these pages take

Seconds, everything included, on one thread of an AMD EPYC server whose other core was at work
(`OMP_NUM_THREADS=1 python -m tests.commands --measure`), the default runs on both cores of an idle
one. `python -m pytest tests/test_commands.py --commands` runs those below 90.

| command | seconds | pages |
|---|---|---|"""
OTHERS = """
Not run to their end as written; they train as many steps as the default run beside them, at one to
three times its cost a step. Their flags are parsed by a test.

| command | compare | pages |
|---|---|---|"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs="?", const="", help="run those that have this in them")
    parser.add_argument("--long", action="store_true", help="those that take minutes, too")
    parser.add_argument("--folder", default=ROOT, help="where to run them: a copy of the project")
    parser.add_argument("--limit", type=float, help="stop a command after so many seconds")
    args = parser.parse_args()
    known = times()
    for command, pages in commands().items():
        if own(command):
            print(f"   own  {command}")
        elif (
            args.measure is None
            or args.measure not in command
            or command in known
            or (long(command) and not args.long)
        ):
            print(f"{known.get(command, -1):6.0f}  {command}   ({', '.join(pages)})")
        else:
            try:
                seconds, done = execute(command, args.folder, limit=args.limit)
            except subprocess.TimeoutExpired:
                print(f"  long  {command}", flush=True)
                continue
            print(f"{seconds:6.0f}  {command}  exit {done.returncode}", flush=True)
            if done.returncode and not command.startswith("diff "):  # 1: they differ
                print(done.stderr[-500:])
                continue
            known[command] = seconds
            write(known)


if __name__ == "__main__":
    main()
