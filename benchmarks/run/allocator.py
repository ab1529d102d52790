"""How the C library hands out memory for tensors on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_FREED = 2**30  # bytes that a process keeps at most beside what it uses
_LARGE = 2**28  # tensors of so many bytes are still given back, lest they leave holes that nothing fits into
_SMALL = 2**16


def keep_freed_memory() -> None:
    """Has this process keep the memory of freed tensors for the next ones.

    glibc gives tensors above 32 MB back to the system, and the end of its heap. The same pages are then fetched anew
    for each layer, which takes a third of a quantized model's forward pass. Where the C library is another one,
    nothing happens.
    """
    _set_thresholds(_LARGE, _FREED)


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """Has the process give freed memory back at once, so that what it has at most is what it needs; kept afterwards.

    Tensors have pages of their own meanwhile, and leave no holes that nothing fits into. How large these are differs
    from run to run.
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
