"""Draws the pictures of docs/figures anew.

    python -m docs.draw [METHOD ...]             diagrams and curves, at once
    python -m docs.draw --wrong [METHOD ...]     what well-known wrong variants do: short trainings

Every module of this folder but svg, logs and thumbs has the pictures of one page: functions
draw(folder) and wrong(folder).
"""

import argparse
import importlib
import os
import pkgutil

HERE = os.path.dirname(os.path.abspath(__file__))
APART = ("svg", "logs", "thumbs", "__main__")
PAGES = [m.name for m in pkgutil.iter_modules([HERE]) if m.name not in APART]


def main(names, folder, kind="draw"):
    for name in names or PAGES:
        getattr(importlib.import_module(f"docs.draw.{name}"), kind)(folder)


if __name__ == "__main__":
    p = argparse.ArgumentParser(prog="python -m docs.draw", description=__doc__.splitlines()[0])
    p.add_argument(
        "names", nargs="*", choices=[*PAGES, []], metavar="METHOD", help=", ".join(PAGES)
    )
    p.add_argument("--wrong", action="store_true", help="what wrong variants do: short trainings")
    args = p.parse_args()
    main(
        args.names,
        os.path.join(os.path.dirname(HERE), "figures"),
        "wrong" if args.wrong else "draw",
    )
