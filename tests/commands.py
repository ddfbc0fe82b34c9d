"""Every command in a code block of README and docs: is it right, and how long does it take?

    python -m tests.commands                  # lists them, with what docs/commands.md knows
    python -m tests.commands --measure ring   # runs those with "ring" in them that can run here,
                                              # one after the other, and writes their times down
    python -m tests.commands --begin          # runs the beginning of each that trains for minutes
                                              # and writes down what the whole of it would take

`tests/test_commands.py` runs those of a few seconds, and with `--commands` all below 90; what needs
weights or files of one's own can only be parsed, which it does for each.
"""

import argparse
import csv
import importlib
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time

from tests import orderings

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = ["README.md"]
for folder in ("docs", "docs/results"):
    PAGES += sorted(f"{folder}/{f}" for f in os.listdir(f"{ROOT}/{folder}") if f.endswith(".md"))
TABLE = os.path.join(ROOT, "docs", "commands.md")
NEEDS = (  # what only the reader has: weights, files, GPUs
    r"Wan2|Z-Image|PixArt|TRELLIS|SiT|DiT-|LFM|FOLDER|FILE|MAPS|RUN|NAME|torchrun|prompts|latents\b"
    r"|\.safetensors|photos|renders|venv|http|bench_linear_attention|gpu_figures|mdt_speed|\.\.\."
    r"|pytest|<<|<\(|\$"
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

    None for what takes seconds: the ring, samples of a student, help. Of tests.orderings how many
    runs it makes.
    """
    slow = r"docs\.draw --wrong|tests\.(claims|side_by_side|bench|real_set)"
    slow += r"|latent_fm\.py --sample"
    if "tests.orderings" in command:
        args, _ = orderings.parse_args(shlex.split(command)[3:])
        methods = orderings.METHODS[args.script]
        runs = {methods[name].of or name for name in args.methods or methods}
        return f"{len(args.seeds) * len(runs)} runs"
    if re.search(slow, command):
        return "minutes"
    script = re.match(r"python (\w+)\.py", command)
    if not script or re.search(r"ring|--sample |--help", command):
        return None
    return f"python {script[1]}.py"


def times(unit=""):
    """docs/commands.md -> {command: seconds}; with unit=" min" those of `begin` in minutes."""
    if not os.path.isfile(TABLE):
        return {}
    with open(TABLE) as f:
        rows = re.findall(rf"^\| `([^`]+)` \| ([\d.]+){unit} \|", f.read(), re.M)
    return {command: float(number) for command, number in rows}


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


def begin(command, folder, updates=12, limit=400):
    """Run a training as written, but into runs/begun, until it has made some updates; end it.

    -> minutes of its whole training: the median update's seconds times --max_train_steps. Raises
    RuntimeError for a command that fails or does not get so far in `limit` seconds.
    """
    words = [*shlex.split(command), "--output_dir", "runs/begun"]
    script = importlib.import_module(words[1].removesuffix(".py"))
    args = script.parse_args(words[2:])
    log = os.path.join(folder, args.output_dir, "log.csv")
    shutil.rmtree(os.path.dirname(log), ignore_errors=True)
    output, deadline = os.path.join(folder, "begin.txt"), time.monotonic() + limit
    with open(output, "w") as f:
        run = subprocess.Popen([sys.executable, *words[1:]], cwd=folder, stdout=f, stderr=f)
        while run.poll() is None and len(rows_of(log)) < updates:
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
    ended = run.poll()
    run.kill()
    run.wait()
    seconds = [float(row["seconds"]) for row in rows_of(log)]
    if ended or len(seconds) < updates:
        with open(output) as f:
            raise RuntimeError(f"{command}: {len(seconds)} updates, {f.read()[-300:]}")
    return statistics.median(seconds) * args.max_train_steps / 60


def rows_of(log):
    """The rows of a log.csv that may not be there yet, or not to its last line."""
    if not os.path.isfile(log):
        return []
    with open(log) as f:
        return [row for row in csv.DictReader(f) if row.get("seconds")]


def write(known, begun=None):
    """docs/commands.md with these times: {command: seconds}, and of `begin` {command: minutes}."""
    found, begun = commands(), times(" min") if begun is None else begun

    def pages(command):
        return ", ".join(os.path.basename(p) for p in dict.fromkeys(found[command]))

    measured = sorted((seconds, command) for command, seconds in known.items() if command in found)
    others = [c for c in found if not own(c) and c not in known and long(c)]
    parts = sorted((begun[c], c) for c in others if c in begun)
    others = [c for c in others if c not in begun]
    with open(TABLE, "w") as f:
        print(HEAD, file=f)
        for seconds, command in measured:
            print(f"| `{command}` | {seconds:.0f} | {pages(command)} |", file=f)
        print(BEGUN, file=f)
        for minutes, command in parts:
            print(f"| `{command}` | {minutes:.1f} min | {pages(command)} |", file=f)
        print(OTHERS, file=f)
        for command in sorted(others, key=lambda c: (long(c), c)):
            print(f"| `{command}` | `{long(command)}` | {pages(command)} |", file=f)


HEAD = """# How long the commands of these pages take

Seconds, everything included, on one thread of an AMD EPYC server whose other core was at work
(`OMP_NUM_THREADS=1 python -m tests.commands --measure`), the default runs on both cores of an idle
one. Those of `docs.tour`, `docs.draw --wrong`, `tests.bench`, `tests.claims` and `latent_fm.py
--sample`, and the runs of 200 updates, are seconds of the processor on one thread.
`python -m pytest tests/test_commands.py --commands` runs those below 90.

| command | seconds | pages |
|---|---|---|"""
BEGUN = """
Begun as written and ended after twelve updates (`OMP_NUM_THREADS=1 python -m tests.commands
--begin`): the median update's time, on one thread, times the number of updates. Banks, teachers'
rows and the measuring at the end come on top, one to three minutes. Rows of `latent_fm.py` and
`linvideo.py` are of a slower machine beside other work: for the work itself see
[speed](results/speed.md#work-and-minutes-of-the-default-runs).

| command | training | pages |
|---|---|---|"""
OTHERS = """
Not run as written, only parsed: they take as long as the command beside them, minutes, or as long
as so many runs (on the ring some 50 s each, of 250 updates on glyphs some 3 minutes).

| command | compare | pages |
|---|---|---|"""


def begin_all(part, folder):
    """Begin every long command with `part` in it that has no time yet, and write the times down."""
    known, begun = times(), times(" min")
    for command in commands():
        trains = (long(command) or "").startswith("python")
        if part in command and trains and not own(command) and command not in {**known, **begun}:
            try:
                begun[command] = begin(command, folder)
            except RuntimeError as error:
                print(error, flush=True)
                continue
            print(f"{begun[command]:6.1f} min  {command}", flush=True)
            write(known, begun)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs="?", const="", help="run those that have this in them")
    parser.add_argument("--long", action="store_true", help="those that take minutes, too")
    parser.add_argument(
        "--begin", nargs="?", const="", help="begin the long ones with this in them"
    )
    parser.add_argument("--folder", default=ROOT, help="where to run them: a copy of the project")
    parser.add_argument("--limit", type=float, help="stop a command after so many seconds")
    args = parser.parse_args()
    known = times()
    if args.begin is not None:
        begin_all(args.begin, args.folder)
        return
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
