"""Giving freed memory back to the operating system, so that a process holds little more than its tensors.

The C allocator of Linux serves requests below a threshold from one heap, where what is freed stays in the process and
holes between tensors of many sizes add up. The threshold grows by itself up to 32 MiB, which is above most tensors of
a training step.
"""

from __future__ import annotations

import ctypes

from pintpot.core.units import MiB

_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of ``mallopt(3)``."""


def return_freed_memory(threshold_bytes: int = MiB) -> bool:
    """Map each allocation from a size on by itself, and unmap it when it is freed; for the rest of the process.

    Costs the time of clearing fresh pages for every such tensor.

    Args:
        threshold_bytes: the smallest allocation that is mapped by itself.

    Returns:
        Whether the allocator has this setting (that of the GNU C library does).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, threshold_bytes))
