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

_DISK_INTERVAL = 0.02  # seconds between two looks at a folder

_MEMORY_SHARE = 0.8  # a trial may be expected to take this share of the available memory


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
    """Cost of a piece of work; memory is NaN where the system does not tell.

    Attributes:
        seconds: duration.
        memory: peak memory on the device, in MB, with what was in use before.
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


def rehearse(run: Callable[[Size], Cost], whole: Size, seconds: float, device: torch.device, batches: int = 1) -> Cost:
    """Return the cost of a piece of work, carried on from trials on fewer images.

    Batches grow up to the whole one, as far as `seconds` and memory allow by what the last trials have cost. The last
    two sizes tell the cost of an image in a batch. A trial of more batches tells that of
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

    resting = resident_memory(device)
    if tried(1)[0] < seconds / 8:  # the first time is a slow one
        trials.clear()
    batch, previous = _grow(tried, whole.batch, seconds, available_memory(device), resting)
    base = tried(batch)
    in_batch = _slope(base, tried(previous), batch - previous)
    found = base + in_batch * (whole.batch - batch)
    if whole.images > batches * whole.batch:
        image = (in_batch if batch > previous else base)[0] / batches
        more = batches * batch + max(batch, int(seconds / 2 / max(image, 1e-3)))
        more = min(whole.images, more)
        beside = _slope(tried(batch, more), base, more - batches * batch)
        found += beside * (whole.images - batches * whole.batch)
    if whole.iterations > fewer:
        iteration, slope = _iteration(tried, batch, fewer, seconds), 0.0
        if batch < whole.batch:
            slope = max(0.0, iteration - _iteration(tried, previous, fewer, seconds)) / (batch - previous)
        found[0] += (whole.iterations - fewer) * (iteration + slope * (whole.batch - batch))
    return Cost(*found.tolist())


def _grow(tried: _Tried, largest: int, seconds: float, available: float, resting: float) -> tuple[int, int]:
    """Return the largest batch that was tried, and the one before it; both are 1 where the whole batch is.

    Args:
        tried: see `_Tried`.
        largest: the whole batch.
        seconds: time for the trials.
        available: free memory, in MB.
        resting: memory in use before all trials, in MB.
    """
    batch, previous = 1, 0
    rest = seconds - tried(1)[0]
    before = np.zeros_like(tried(1))
    while batch < largest:
        now = tried(batch)
        image = max(1e-6, (now[0] - before[0]) / (batch - previous))
        following = batch + min(largest, (rest - now[0]) / image)
        if now[1] > resting:  # it may begin to grow behind what does not depend on images
            following = min(following, _MEMORY_SHARE * available / (now[1] - resting) * batch)
        following = min(largest, int(following))
        if following < 2 * batch and following < largest:
            if batch > 1:
                break
            following = 2
        batch, previous, before = following, batch, now
        rest -= tried(batch)[0]
    return batch, max(previous, 1)


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
        with (
            _temporary_files_in(temporary),
            _peak_sizes(resume, temporary) as sizes,
            peak_memory(torch.device("cpu")) as host,
            peak_memory(device) as peak,
        ):
            before, host_before = resident_memory(device), resident_memory(torch.device("cpu"))
            seconds = time_of(lambda: work(resume), device)
    memory = math.nan if peak.megabytes is None else before + peak.megabytes
    host_memory = math.nan if host.megabytes is None else host_before + host.megabytes
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
