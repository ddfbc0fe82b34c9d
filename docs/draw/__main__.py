"""Draws the pictures of docs/figures anew.

    python -m docs.draw [METHOD ...]             diagrams and curves, at once
    python -m docs.draw --wrong [METHOD ...]     what well-known wrong variants do: short trainings

Every module of this folder but svg, logs and thumbs has the pictures of one page: functions
draw(folder) and wrong(folder).
"""

import importlib
import os
import pkgutil
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
APART = ("svg", "logs", "thumbs", "__main__")
PAGES = [m.name for m in pkgutil.iter_modules([HERE]) if m.name not in APART]


def main(names, folder, kind="draw"):
    for name in names or PAGES:
        getattr(importlib.import_module(f"docs.draw.{name}"), kind)(folder)


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name != "--wrong"]
    kind = "wrong" if "--wrong" in sys.argv else "draw"
    main(names, os.path.join(os.path.dirname(HERE), "figures"), kind)
