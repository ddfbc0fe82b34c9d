"""Memory that a run on a CPU has freed stays with the process, for its next update.

The C library gives freed memory back to the system and gets it again, page by page and filled with
zeros, at the next update: some 10,000 page faults for one of `python dmd.py`, a twentieth of its
processor time (docs/results/speed.md).
"""

import ctypes
import os

# Of glibc's malloc.h: the first argument of mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**25  # bytes, the most that M_MMAP_THRESHOLD takes; larger blocks still come and go


def keep_freed_memory():
    """Let glibc keep what is freed. Elsewhere, or where the environment says what malloc is to do,
    nothing changes.  -> whether it does"""
    if os.name != "posix" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
