"""Settings of the process that a server under load wants; for the command line, not for a program that embeds us."""

import ctypes
import gc
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_SWITCH_S = 0.0005
"""A worker thread in Python code keeps the event loop waiting for so long at most; the default is 5 ms."""
_KEEP_BYTES = 32 << 20
_MMAP_BYTES = 8 << 20
_ARENAS = 2
"""Of the allocator: each worker thread would otherwise keep what it once needed for itself."""


def tune_process() -> None:
    """Keep freed memory for the next request.

    Every large write has pages of its own; given back to the kernel and faulted in again each time they took
    17 % of the event loop's time (1 MiB writes, perf).
    """
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_ARENA_MAX, _ARENAS)
