"""Giving freed memory back to the operating system, so that a process holds little more than its tensors.

The C allocator of Linux serves requests below a threshold from one heap, where what is freed stays in the process and
holes between tensors of many sizes add up. The threshold grows by itself up to 32 MiB, which is above most tensors of
a training step. To map every tensor by itself would be the other extreme: each then begins with cleared pages, which
takes a quarter of a step's time. So large ones are mapped, and the heap's free pages are given back where what is held
has just changed (a block has run, a gradient is gone) and the process has grown by much since the last time.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from pintpot.core.units import MiB

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""``M_TRIM_THRESHOLD`` and ``M_MMAP_THRESHOLD`` of ``mallopt(3)``."""

_GROWTH = 64 * MiB
"""What the process may grow by before free pages are looked for."""

_KEPT_AT_THE_END = 256 * MiB
"""What may be free at the end of the heap in the meantime."""

_STATM = Path("/proc/self/statm")
_least = -1
"""The resident bytes after free pages were given back; negative where they never are."""


def return_freed_memory(threshold_bytes: int = 20 * MiB) -> bool:
    """Map each allocation from a size on by itself, and let ``give_back`` work; for the rest of the process.

    Args:
        threshold_bytes: the smallest allocation that is mapped by itself, and unmapped when it is freed.

    Returns:
        Whether the allocator has these settings (that of the GNU C library does).
    """
    global _least
    mallopt = getattr(_library(), "mallopt", None)
    if mallopt is None or not _STATM.exists():
        return False
    done = bool(mallopt(_MMAP_THRESHOLD, threshold_bytes)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT_AT_THE_END))
    _least = 0 if done else -1
    return done


def give_back() -> None:
    """Give the heap's free pages back, if the process has grown by much; nothing before ``return_freed_memory``."""
    global _least
    if _least < 0:
        return
    resident = _resident()
    if resident > _least + _GROWTH:
        _library().malloc_trim(0)
        resident = _resident()
        _least = resident
    _least = min(_least, resident)


def _resident() -> int:
    return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGESIZE")


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
