"""Runs cells and records what they give."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import timm
import torch
import torchvision
from torch import nn
from tqdm import tqdm

import adfq
from adfq.errors import AdfqError
from adfq.methods import FULL_PRECISION, Bits
from benchmarks.cells import Cell
from benchmarks.results import Record, ResultStore
from benchmarks.tasks import Subject, load_subject


def resolve_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one.

    Raises:
        AdfqError: for a device that torch does not know or that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise AdfqError(f"cannot use device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def run_cell(cell: Cell, subject: Subject, device: torch.device) -> Record:
    """Quantizes and evaluates; the record is that of `evaluate_model`."""
    model, seconds = quantize_model(cell, subject, device)
    return evaluate_model(cell, subject, model, device, seconds)


def quantize_model(cell: Cell, subject: Subject, device: torch.device) -> tuple[nn.Module, float]:
    """The subject's model, quantized as the cell has it, and the seconds that it took without reading images."""
    model = subject.model.to(device)
    arguments: dict[str, Any] = {"seed": cell.seed, **dict(cell.method_arguments)}
    if cell.method != FULL_PRECISION:
        bits = Bits.parse(cell.bits)
        arguments |= {"weight_bits": bits.weight, "activation_bits": bits.activation}
        arguments["calibration"] = subject.calibration_images(cell.calibration_size, cell.seed)
    start = time.perf_counter()
    quantized = adfq.quantize(model, cell.method, **arguments)
    return quantized, time.perf_counter() - start


def evaluate_model(
    cell: Cell, subject: Subject, model: nn.Module, device: torch.device, calibration_seconds: float = 0.0
) -> Record:
    """Evaluates a cell's model.

    Args:
        calibration_seconds: that quantizing the model has taken; 0 for one that was saved.

    Returns:
        The record: ``config``, ``metrics``, ``timing`` (seconds), ``environment``, ``provenance``, ``finished``.
    """
    start = time.perf_counter()
    metrics = subject.evaluate(model, device, cell.limit, cell.batch_size)
    return {
        "config": cell.config,
        "metrics": metrics,
        "timing": {"calibration": calibration_seconds, "evaluation": time.perf_counter() - start},
        "environment": environment(device),
        "provenance": provenance(subject),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def run_cells(cells: Sequence[Cell], store: ResultStore, device: torch.device) -> Iterator[tuple[Cell, Record]]:
    """Runs what the store does not have yet, and yields every cell's record in the order given.

    Each record is in the store before the next cell starts. Consecutive cells on the same model and data share
    them in memory.
    """
    subject: Subject | None = None
    loaded: tuple[Any, ...] | None = None
    with tqdm(cells, desc="cells", unit="cell", delay=2, disable=None) as progress:
        for cell in progress:
            progress.set_postfix_str(f"{cell.model} {cell.method} {cell.bits}")
            # Everything but method, bits and how they are measured.
            wanted = (
                cell.task,
                cell.model,
                cell.model_arguments,
                cell.checkpoint,
                cell.pretrained,
                cell.data,
                cell.preprocessing,
            )
            if subject is None or loaded != wanted:
                subject, loaded = load_subject(cell), wanted
            record = store.get(cell, provenance(subject))
            if record is None:
                record = run_cell(cell, subject, device)
                store.put(cell, record)
            yield cell, record


def environment(device: torch.device) -> dict[str, Any]:
    """Where a result was measured."""
    return {
        "adfq": adfq.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "threads": torch.get_num_threads(),
    }


def provenance(subject: Subject) -> dict[str, str]:
    """What a result depends on beside its cell: code, weights, libraries that compute."""
    return {
        "code": code_digest(),
        "weights": subject.weights_digest,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


@cache
def code_digest() -> str:
    """SHA-256 of the source files that decide results: core, baselines, tasks and embedded data."""
    import baselines
    import benchmarks.embedded
    import benchmarks.tasks

    digest = hashlib.sha256()
    for package in (adfq, baselines, benchmarks.tasks, benchmarks.embedded):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
