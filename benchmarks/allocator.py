"""How the C library hands out memory for tensors on a CPU."""

from __future__ import annotations

import ctypes

# Of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_FREED = 2**30  # bytes that a process keeps at most beside what it uses
_LARGE = 2**28  # tensors of so many bytes are still given back, lest they leave holes that nothing fits into


def keep_freed_memory() -> None:
    """Has this process keep the memory of freed tensors for the next ones.

    glibc gives tensors above 32 MB back to the system, and the end of its heap. The same pages are then fetched anew
    for each layer, which takes a third of a quantized model's forward pass. Where the C library is another one,
    nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGE)
    mallopt(_TRIM_THRESHOLD, _FREED)
