"""The measurements of a cell; the modules imported here are part of every cell's code digest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfq.api import quantize
from adfq.bits import Bits
from adfq.method import FULL_PRECISION
from benchmarks.run.correct import Correct, pack_correct
from benchmarks.run.cost import measure_cost, peak_memory
from benchmarks.tasks.interface import JudgesImages
from benchmarks.tasks.shared import Stopwatch, timed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from benchmarks.cell import Cell
    from benchmarks.tasks import Subject

_COST_IMAGES = 32


def quantize_model(
    cell: Cell, subject: Subject, device: torch.device, resume: Path | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a subject's model, quantized as its cell says, and the cost of quantizing it.

    Args:
        cell: method, bits and calibration.
        subject: model and calibration images.
        device: device of the model.
        resume: folder for an interrupted optimization (`adfq.quantize`); None keeps nothing.

    Returns:
        The model; ``calibration_seconds``, without reading images, and ``calibration_memory`` in MB, with the images.

    Raises:
        AdfqError: the errors of `adfq.quantize`.
    """
    model = subject.model.to(device)
    arguments: dict[str, Any] = {"seed": cell.seed, **dict(cell.method_arguments)}
    loading = Stopwatch()
    if cell.method != FULL_PRECISION:
        bits = Bits.parse(cell.bits)
        arguments |= {"weight_bits": bits.weight, "activation_bits": bits.activation}
        batches = subject.calibration_batches(cell.calibration_size, cell.seed, cell.calibration_batch_size)
        arguments |= {"calibration": timed(batches, loading), "calibration_size": cell.calibration_size}
    start = time.perf_counter()
    with peak_memory(device) as peak:
        quantized = quantize(model, cell.method, resume=resume, **arguments)
    return quantized, {
        "calibration_seconds": time.perf_counter() - start - loading.seconds,
        "calibration_memory": peak.megabytes,
    }


def measure_model(cell: Cell, subject: Subject, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Evaluate a cell's model and measure its cost.

    Args:
        cell: limit and batch size of evaluation.
        subject: evaluation images.
        model: quantized or in full precision.
        device: device of the model.

    Returns:
        ``metrics`` of the task; ``correct`` (`pack_correct`) of a task that judges images by themselves; ``timing`` in
        seconds: ``evaluation``, and ``loading``, the part of it that was spent waiting for images; ``cost``
        (`measure_cost`, and ``evaluation_memory`` in MB); ``report`` of the method.

    Raises:
        AdfqError: the errors of the subject's `evaluate`.
    """
    evaluation, loading = Stopwatch(), Stopwatch()
    correct: Correct = {}
    with evaluation, peak_memory(device) as peak:
        if isinstance(subject, JudgesImages):
            metrics, correct = subject.evaluate_images(model, device, cell.limit, cell.batch_size, loading)
        else:
            metrics = subject.evaluate(model, device, cell.limit, cell.batch_size, loading)
    quantization = getattr(model, "quantization", None)
    # A detector does not take more images at once than it evaluates.
    images = subject.evaluation_images(min(_COST_IMAGES, cell.batch_size))
    return {
        "metrics": metrics,
        **({"correct": pack_correct(correct)} if correct else {}),
        "timing": {"evaluation": evaluation.seconds, "loading": loading.seconds},
        "cost": {"evaluation_memory": peak.megabytes, **measure_cost(model, images, device, subject.infer)},
        "report": {} if quantization is None else quantization.report,
    }
