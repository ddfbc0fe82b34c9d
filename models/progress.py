"""A progress bar that suits a terminal and a file."""

import contextlib
import os
import sys

from tqdm import tqdm


def progress(items=None, text=None, **more):
    """tqdm over items. In a pipe or a file, where all it writes stays, it writes once a minute."""
    seconds = 0.1 if sys.stderr and sys.stderr.isatty() else 60
    more["disable"] = more.get("disable", False) or sys.stderr is None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            more |= {"ncols": 80, "nrows": 24}  # of containers: tqdm would show nothing
    return tqdm(items, text, mininterval=seconds, maxinterval=max(10, seconds), **more)
