"""One cell measured: its record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adfq.errors import AdfqError
from benchmarks.cell import Cell
from benchmarks.run.measuring import measure_model, quantize_model
from benchmarks.run.provenance import environment, provenance
from benchmarks.run.records import SCHEMA, Record, now
from benchmarks.tasks import Subject


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is the GPU where there is one, else the CPU.

    Raises:
        AdfqError: for a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise AdfqError(f"cannot use device {name!r}: {str(error).splitlines()[0]}") from None
    if device.type == "cpu" and device.index:  # torch takes any number
        raise AdfqError(f"cannot use device {name!r}: the CPU is one device")
    return device


def run_cell(cell: Cell, subject: Subject, device: torch.device, resume: Path | None = None) -> Record:
    """Quantize and evaluate a cell's model.

    Args:
        cell: the experiment.
        subject: the cell's model and data.
        device: device of the model.
        resume: folder for an interrupted optimization (`adfq.quantize`); None keeps nothing.

    Returns:
        The record, as `evaluate_model` makes it.

    Raises:
        AdfqError: the errors of `adfq.quantize` and of the subject's `evaluate`.
    """
    model, cost = quantize_model(cell, subject, device, resume)
    return evaluate_model(cell, subject, model, device, cost)


def evaluate_model(
    cell: Cell, subject: Subject, model: nn.Module, device: torch.device, cost: Mapping[str, Any] | None = None
) -> Record:
    """Evaluate a cell's model.

    Args:
        cell: the experiment.
        subject: the cell's data.
        model: quantized or in full precision.
        device: device of the model.
        cost: cost of quantizing the model, from `quantize_model`; None for a model that was loaded from a file.

    Returns:
        The record: ``schema``, ``config``, the fields of `measure_model`, ``environment``, ``provenance``,
        ``finished``; ``timing`` and ``cost`` include those of calibration.

    Raises:
        AdfqError: the errors of the subject's `evaluate`.
    """
    cost = {"calibration_seconds": 0.0} if cost is None else cost
    measured = measure_model(cell, subject, model, device)
    return {
        **measured,
        "timing": {"calibration": cost["calibration_seconds"], **measured["timing"]},
        "cost": {**cost, **measured["cost"]},
        **_describe_circumstances(cell, subject, device),
    }


def record_not_applicable(cell: Cell, subject: Subject, device: torch.device, reason: str) -> Record:
    """Return the record of a cell whose method cannot be applied to its model.

    Args:
        cell: the experiment.
        subject: the cell's model and data.
        device: device that it would be measured on.
        reason: message of the NotApplicableError.

    Returns:
        ``not_applicable``, the reason, in place of measurements; the rest as in `evaluate_model`.
    """
    return {"not_applicable": reason, **_describe_circumstances(cell, subject, device)}


def _describe_circumstances(cell: Cell, subject: Subject, device: torch.device) -> Record:
    return {
        "schema": SCHEMA,
        "config": cell.config,
        "environment": environment(device, cell.task),
        "provenance": provenance(cell, subject),
        "finished": now(),
    }
