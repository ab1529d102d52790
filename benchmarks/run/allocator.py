"""Settings of the C library's allocator for tensors on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_FREED = 2**30  # bytes that a process keeps at most beside what it uses
_LARGE = 2**28  # tensors of so many bytes are still given back, lest they leave holes that nothing fits into
_SMALL = 2**16


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors in this process for the next ones.

    glibc gives tensors above 32 MB, and the end of its heap, back to the system. The same pages are then fetched anew
    for each layer, which takes a third of a quantized model's forward pass. Another C library is left as it is.
    """
    _set_thresholds(_LARGE, _FREED)


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """Give freed memory back at once inside the block, so that peak memory is the memory in need; keep it afterwards.

    Tensors have pages of their own meanwhile, without the holes of a heap, whose size differs from run to run.
    """
    _set_thresholds(_SMALL, _SMALL)
    try:
        yield
    finally:
        keep_freed_memory()


def _set_thresholds(large: int, freed: int) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, large)
    mallopt(_TRIM_THRESHOLD, freed)
