"""Every headline claim of the papers, measured here, with a verdict computed from the numbers.

    python -m tests.claims --quick                 # at most twenty minutes, on one thread
    python -m tests.claims                         # three hours: all worlds
    python -m tests.claims --paper tdm --quick     # one paper; the other rows stay as they are
    python -m tests.claims --write                 # measures nothing, writes both files anew

A claim (tests/claimed.py has the list) is an inequality, left < right, between two measured numbers
for each seed, or for each case of a closed form. The rule is one for all of them:

    reproduced       left <= right / 1.05 for every seed or case
    not reproduced   left >= right * 1.05 for every seed or case
    unclear          anything else

Every finished measurement is a file in runs/claims and is not repeated, so a killed command goes on
where it was; remove that folder after a change of the code. All is written to
docs/results/claims.md and docs/results/claims.json; what was never measured is "not run" there. On
one thread the same seeds give the same numbers.
"""

import argparse
import os
import sys
import time
from dataclasses import asdict

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
from claimed import CLAIMS, PAPERS, SETTINGS  # noqa: E402

from models.files import UserError, atomic_write, load_json, save_json  # noqa: E402
from models.plumbing.run import run_main  # noqa: E402

MARGIN = 1.05
KINDS = ("reproduced", "not reproduced", "unclear", "not run")
FILES = [os.path.join(ROOT, "docs", "results", f"claims.{end}") for end in ("md", "json")]


class NotRun(Exception):
    """A measurement that is not stored and was not asked for."""


class Store:
    """Finished measurements, one JSON file each.

    folder: where; measuring: whether to make those that are missing. A key says how a number is
    measured, run length and seed included. seconds: {key: processor time that it took}, of all that
    were read; keys: those read since it was emptied.
    """

    def __init__(self, folder, measuring=True):
        self.folder, self.measuring, self.seconds, self.keys = folder, measuring, {}, []

    def get(self, key, measure):
        """What measure() returned when it was called for this key.  -> its dict. Raises NotRun."""
        path = os.path.join(self.folder, f"{key}.json")
        if not os.path.isfile(path):
            if not self.measuring:
                raise NotRun(key)
            began = time.process_time()
            numbers = measure()
            os.makedirs(self.folder, exist_ok=True)
            save_json({"seconds": time.process_time() - began, "numbers": numbers}, path)
        stored = load_json(path)
        self.seconds[key] = stored["seconds"]
        self.keys.append(key)
        return stored["numbers"]


def verdict(pairs):
    """The rule, on [(left, right), ...] of a claim left < right.  -> str."""
    if not pairs:
        return "not run"
    if all(left <= right / MARGIN for left, right in pairs):
        return "reproduced"
    if all(left >= right * MARGIN for left, right in pairs):
        return "not reproduced"
    return "unclear"


def row_of(claim, store, seeds, known):
    """-> the claim's fields with its numbers.

    pairs and verdict; from: the measurements; seconds: what those took that no row before counts.
    known: {id: an earlier row}; its numbers stand where its measurements are stored no more.
    """
    row = {k: v for k, v in asdict(claim).items() if k != "measure"}
    before, store.keys = sum(store.seconds.values()), []
    try:
        pairs = [[float(v) for v in pair] for pair in claim.measure(store, seeds)]
        seconds = round(sum(store.seconds.values()) - before, 1)
        found = {"pairs": pairs, "from": store.keys, "seconds": seconds}
    except NotRun as missing:
        found = known.get(claim.id, {})
        if str(missing) not in found.get("from", ()):  # also where it was measured otherwise
            found = {"pairs": [], "from": [], "seconds": 0.0}
    row |= {name: found[name] for name in ("pairs", "from", "seconds")}
    return {**row, "verdict": verdict(row["pairs"])}


def rows_of(claims, store, seeds, asked, known):
    """All rows, measured where asked(claim) says so, or read from the store."""
    rows = []
    for claim in claims:
        store.measuring = asked(claim)
        rows.append(row_of(claim, store, seeds, known))
        print(f"{rows[-1]['verdict']:15} {claim.id}", flush=True)
    return rows


# ---- the page ------------------------------------------------------------------------------------

HEAD = """# Every claim, with its verdict

Written by the first of these commands, which the others go on from, beside
[claims.json](claims.json) with the same; how each claim is measured is in
[`tests/claimed.py`](../../tests/claimed.py).

```bash
python -m tests.claims --quick                 # at most twenty minutes
python -m tests.claims                         # three hours: all worlds
python -m tests.claims --paper tdm --quick     # one paper
```

**The rule.** A claim is an inequality, left < right, for each seed or each case of a closed form.
*Reproduced*: left <= right / 1.05 for every one. *Not reproduced*: left >= right * 1.05 for every
one. *Unclear*: anything else. *Not run*: the numbers have never been measured. Three seeds that
mean nothing fall on one given side once in eight times, and these are small worlds and short runs:
a verdict is about them, and not about the paper's models. A closed form has no seeds; there an
error that ought to be zero is compared with a bound. "Equal student updates" means the same
student, rates and seeds as well. Beside what does not come out, or not surely, stands in italics
the reason that was found.

**Lengths** are short, for time, and were chosen before the verdicts, with one exception: MDT-dist's
runs on the ring had 150 updates, where mdt-vd was not reproduced (fd 28.6, 14.9, 45.5 against
20.8, 13.7, 41.6), and have their default, 400, since.
"""


def cells(row):
    """A row of the page's table."""
    pairs = ", ".join(f"{left:.3g} vs {right:.3g}" for left, right in row["pairs"])
    measured = f"{row['numbers']}: {pairs}" if pairs else row["numbers"]
    doubt = row["why"] and row["verdict"] in ("not reproduced", "unclear")
    says = row["says"] + (f" *{row['why']}*" if doubt else "")
    parts = row["id"], says, row["source"], row["refuted"], row["equal"], measured
    escaped = [part.replace("|", "\\|").replace("<", "&lt;") for part in parts]
    return "| " + " | ".join((*escaped, f"**{row['verdict']}**")) + " |"


def page(table):
    """The whole of claims.md, from what claims.json holds."""
    rows = table["claims"]
    minutes = sum(row["seconds"] for row in rows) / 60
    about = f"Seeds {', '.join(map(str, table['seeds']))}, torch {table['torch']}, one thread: "
    about += f"{minutes:.1f} minutes of processor time for all numbers below."
    flags = "; ".join(f"{where} `{flags}`" for where, flags in table["settings"].items())
    lines = [
        HEAD,
        about,
        "",
        f"Flags of all runs: {flags}.",
        "",
        f"| paper | {' | '.join(KINDS)} |",
        "|---" * 5 + "|",
    ]
    groups = {paper: [row for row in rows if row["paper"] == paper] for paper in table["papers"]}
    for name, group in [*groups.items(), ("all", rows)]:
        counts = [sum(row["verdict"] == kind for row in group) for kind in KINDS]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    for paper, group in groups.items():
        lines += ["", f"## {paper}", "", f"{table['papers'][paper]}.", ""]
        lines += ["| claim | what it says | source | refuted by | equal | measured | verdict |"]
        lines += ["|---" * 7 + "|", *map(cells, group)]
    return "\n".join(lines) + "\n"


def known_rows(path):
    """{id: row} of an earlier claims.json."""
    table = load_json(path) if os.path.isfile(path) else {}
    return {row["id"]: row for row in table.get("claims", ())}


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--paper", default=None, help=f"only this one's: {', '.join(PAPERS)}")
    p.add_argument("--quick", action="store_true", help="only closed forms and runs of seconds")
    p.add_argument("--write", action="store_true", help="measure nothing, write the files anew")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run for each")
    p.add_argument("--output_dir", default="runs/claims", help="where finished measurements are")
    args = p.parse_args(argv)
    if args.paper not in (None, *PAPERS):
        raise UserError(f"--paper {args.paper} is none of {', '.join(PAPERS)}: give one of these")
    return args


def main(argv=None, files=FILES, claims=CLAIMS):
    args = parse_args(argv)
    torch.set_num_threads(1)

    def asked(claim):
        return not args.write and args.paper in (None, claim.paper) and claim.quick >= args.quick

    known = known_rows(files[1])
    rows = rows_of(claims, Store(args.output_dir), args.seeds, asked, known)
    settings = {f"{script}.py on {world}": flags for (script, world), flags in SETTINGS.items()}
    table = {"margin": MARGIN, "seeds": args.seeds, "torch": torch.__version__, "papers": PAPERS}
    table |= {"settings": settings, "claims": rows}
    save_json(table, files[1])
    atomic_write(files[0], page(table).encode())


if __name__ == "__main__":
    run_main(main)
