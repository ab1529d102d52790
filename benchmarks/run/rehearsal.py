"""Cost of a piece of work on many images, from trials on few: nothing is assumed but that it grows linearly."""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from benchmarks.run.cost import peak_memory, time_of

_MB = 1e6

# Iterations of an optimization that all trials have, and numbers of those that some have more.
_FEWER, _MORE = 1, (2, 10)

_GROWTH = 4  # of a batch from one trial to the next

_DISK_INTERVAL = 0.02  # seconds between two looks at a folder

_MEMORY_SHARE = 0.8  # of the available memory that a trial may be expected to take


class Size(NamedTuple):
    """Size of a piece of work.

    Attributes:
        batch: images in the largest batch.
        images: images in all.
        iterations: iterations of an optimization; 0, the default, for none.
    """

    batch: int
    images: int
    iterations: int = 0


class Cost(NamedTuple):
    """Cost of a piece of work; memory is above that in use before, and NaN where the system does not tell.

    Attributes:
        seconds: duration.
        memory: peak memory of the device, in MB.
        host_memory: peak memory of the process, in MB; the same as `memory` on a CPU.
        resume: peak size of the folder for an interrupted optimization, in MB.
        temporary: peak size of temporary files, in MB.
    """

    seconds: float
    memory: float
    host_memory: float
    resume: float
    temporary: float


class _Tried(Protocol):
    """Cost of a trial: with as few images as it can have, and as few iterations, unless they are given."""

    def __call__(self, batch: int, images: int = ..., iterations: int = ...) -> NDArray[np.float64]: ...


def rehearse(
    run: Callable[[Size], Cost], whole: Size, seconds: float, device: torch.device, batches: int = 1
) -> Cost:
    """Return the cost of a piece of work, carried on from trials on fewer images.

    Batches grow, each time by a factor of 4, until trials have taken `seconds`, until the next one might not fit, or up
    to the whole batch. The last two sizes tell the cost of an image in a batch. A trial of more batches tells that of
    an image beside the batch, and one of more iterations that of an iteration. Slopes below 0 count as 0.

    Args:
        run: function from a size to its measured cost.
        whole: size to carry the cost on to.
        seconds: time for the trials. The fewest that tell all slopes are made even if they take longer.
        device: device that the work runs on.
        batches: number of batches that a trial has at least, for work that goes another way with a single one.
    """
    trials: dict[Size, NDArray[np.float64]] = {}
    fewer = min(_FEWER, whole.iterations)

    def tried(batch: int, images: int = 0, iterations: int = fewer) -> NDArray[np.float64]:
        size = Size(batch, images or batches * batch, iterations)
        if size not in trials:
            trials[size] = np.array(run(size))
        return trials[size]

    once = tried(1)  # slow, and with memory that libraries take but once
    if once[0] < seconds / 8:
        trials.clear()
    batch, previous = _grow(tried, whole.batch, seconds, device)
    base, smallest = tried(batch), tried(1)
    in_batch = _slope(base, tried(previous), batch - previous)
    found = base + in_batch * (whole.batch - batch)
    if whole.images > batches * whole.batch:
        image = (in_batch if batch > previous else base)[0] / batches
        more = batches * batch + max(batch, int(seconds / 2 / max(image, 1e-3)))
        more = min(whole.images, more)
        beside = _slope(tried(batch, more), base, more - batches * batch)
        found += beside * (whole.images - batches * whole.batch)
    found[1:] += np.maximum(once - smallest, 0.0)[1:]
    if whole.iterations > fewer:
        iteration, slope = _iteration(tried, batch, fewer, seconds), 0.0
        if batch < whole.batch:
            slope = max(0.0, iteration - _iteration(tried, previous, fewer, seconds)) / (batch - previous)
        found[0] += (whole.iterations - fewer) * (iteration + slope * (whole.batch - batch))
    return Cost(*found.tolist())


def _grow(tried: _Tried, largest: int, seconds: float, device: torch.device) -> tuple[int, int]:
    """Return the largest batch that was tried, and the one before it; both are 1 where the whole batch is."""
    batch = previous = 1
    spent = tried(1)[0]
    for following in _sizes(largest):
        if batch > 1:
            now = tried(batch)
            expected = now + (now - tried(previous)) * (following - batch) / (batch - previous)
            grows = following / batch  # memory may begin to grow behind what does not depend on images
            if spent + expected[0] > seconds or grows * now[1] > _MEMORY_SHARE * available_memory(device):
                break
        batch, previous = following, batch
        spent += tried(batch)[0]
    return batch, previous


def _sizes(largest: int) -> list[int]:
    """Return sizes of batches above 1 that grow to the largest by a factor of 4."""
    sizes = []
    while largest > 1:
        sizes.append(largest)
        largest = math.ceil(largest / _GROWTH)
    return sizes[::-1]


def _slope(more: NDArray[np.float64], less: NDArray[np.float64], images: int) -> NDArray[np.float64]:
    return np.maximum(more - less, 0.0) / max(images, 1)  # NaN stays


def _iteration(tried: _Tried, batch: int, fewer: int, seconds: float) -> float:
    """Return the seconds of an iteration, with batches in proportion to the largest."""
    base, each = tried(batch)[0], 0.0
    for more in _MORE:
        each = max(0.0, float(tried(batch, iterations=fewer + more)[0] - base)) / more
        if more * each > base / 2 or _MORE[-1] * each > seconds / 4:  # above what times differ by anyway
            break
    return each


def available_memory(device: torch.device) -> float:
    """Return the memory that is free, in MB: the GPU's, or this machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / _MB
    return psutil.virtual_memory().available / _MB


def resident_memory(device: torch.device) -> float:
    """Return the memory that this process has on a device, in MB."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / _MB
    return psutil.Process().memory_info().rss / _MB


def measure(work: Callable[[Path], Any], device: torch.device) -> Cost:
    """Return the cost of a call.

    Args:
        work: function of a folder to resume from, which is deleted afterwards with Python's temporary files.
        device: device that it runs on.
    """
    with tempfile.TemporaryDirectory() as name:
        resume, temporary = (Path(name, part) for part in ("resume", "temporary"))
        temporary.mkdir()
        with _temporary_files_in(temporary), _peak_sizes(resume, temporary) as sizes:
            with peak_memory(torch.device("cpu")) as host, peak_memory(device) as peak:
                seconds = time_of(lambda: work(resume), device)
    memory, host_memory = (math.nan if each.megabytes is None else each.megabytes for each in (peak, host))
    return Cost(seconds, memory, host_memory, *sizes)


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def _peak_sizes(*folders: Path) -> Iterator[Sequence[float]]:
    """Yield a list that gets the peak size in MB of each folder's files inside the block."""
    found, done = [0.0 for _ in folders], threading.Event()

    def watch() -> None:
        while True:
            for index, folder in enumerate(folders):
                found[index] = max(found[index], _size_of(folder))
            if done.wait(_DISK_INTERVAL):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def _size_of(folder: Path) -> float:
    """Return the size in MB of a folder's files, with those that this process has open but that have no name."""
    sizes: dict[tuple[int, int], int] = {}
    for file in (*folder.rglob("*"), *Path("/proc/self/fd").glob("*")):
        with suppress(OSError):  # gone meanwhile
            if file.is_relative_to(folder) or os.readlink(file).startswith(f"{folder}/"):
                status = file.stat()
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values()) / _MB
