"""Cost of a quantized model: seconds, memory, bytes, kept outliers."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adfq.checkpoint import packed_size
from adfq.quantizers import OutlierQuantizer

_REPEATS = 3
_MB = 1e6


@dataclass
class Peak:
    """Peak of the memory in use, above the memory in use before.

    Attributes:
        megabytes: the peak in MB; None if the system does not tell.
    """

    megabytes: float | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the block: the GPU's, or the process's on Linux.

    Args:
        device: device that the block runs on.

    Yields:
        The peak, which is set when the block ends.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.megabytes = (torch.cuda.max_memory_allocated(device) - before) / _MB
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed but kept would be used without being seen
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident("VmRSS")
    except (OSError, StopIteration, AttributeError):
        yield peak
        return
    yield peak
    peak.megabytes = (_resident("VmHWM") - before) / _MB


def _resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def measure_cost(
    model: nn.Module,
    images: Tensor,
    device: torch.device,
    forward: Callable[[nn.Module, Tensor], Any] = nn.Module.__call__,
) -> dict[str, float]:
    """Measure the cost of a model in evaluation.

    Args:
        model: model to measure; moved to the device and put in evaluation mode.
        images: preprocessed, B×C×H×W.
        device: device to run on.
        forward: function that runs the model on images; by default, a call of the model.

    Returns:
        ``forward_seconds`` for these images, the shortest of three times; ``size`` in MB as packed by `adfq.save`, of
        parameters alone in full precision; ``outliers`` in % of the values that per-patch quantizers see, if there are
        any.
    """
    model, images = model.to(device).eval(), images.to(device)
    cost = {"size": packed_size(model) / _MB}
    seen: list[tuple[int, int]] = []
    quantizers = [module for module in model.modules() if isinstance(module, OutlierQuantizer)]
    hooks = [quantizer.register_forward_pre_hook(partial(_count, seen)) for quantizer in quantizers]
    with torch.inference_mode():
        forward(model, images)
        for hook in hooks:
            hook.remove()
        cost["forward_seconds"] = min(time_of(partial(forward, model, images), device) for _ in range(_REPEATS))
    if seen:
        kept, values = map(sum, zip(*seen, strict=True))
        cost["outliers"] = 100 * kept / values
    return cost


def _count(seen: list[tuple[int, int]], quantizer: OutlierQuantizer, inputs: tuple[Any, ...]) -> None:
    seen.append((int(quantizer.outliers(inputs[0]).sum()), inputs[0].numel()))


def time_of(run: Callable[[], Any], device: torch.device) -> float:
    """Return the duration of a call in seconds.

    Args:
        run: function to call.
        device: device that it runs on, which is waited for.
    """
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
