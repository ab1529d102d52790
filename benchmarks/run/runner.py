"""Measures a cell."""

from __future__ import annotations

import hashlib
import inspect
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import PIL
import psutil
import timm
import torch
import torchvision
from torch import nn

import adfq
from adfq.bits import Bits
from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION
from adfq.registry import find_method
from benchmarks.cell import Cell
from benchmarks.run.cost import measure_cost, peak_memory
from benchmarks.run.store import Record
from benchmarks.tasks import TASKS, Subject, find_task
from benchmarks.tasks.shared import Stopwatch

_COST_IMAGES = 32

# mmcv without compiled operators, and builds of it for versions of torch that the original does not cover.
_DISTRIBUTIONS = {"mmcv": ("mmcv", "mmcv-lite", "onedl-mmcv")}


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


def run_cell(cell: Cell, subject: Subject, device: torch.device, resume: Path | None = None) -> Record:
    """Quantizes and evaluates; the record is that of `evaluate_model`, with what quantizing has cost.

    Args:
        resume: `adfq.quantize`.
    """
    model, cost = quantize_model(cell, subject, device, resume)
    return evaluate_model(cell, subject, model, device, cost)


def quantize_model(
    cell: Cell, subject: Subject, device: torch.device, resume: Path | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The subject's model, quantized as the cell has it, and what that took, without reading images:
    ``calibration_seconds``, and ``calibration_memory`` in MB.
    """
    model = subject.model.to(device)
    arguments: dict[str, Any] = {"seed": cell.seed, **dict(cell.method_arguments)}
    if cell.method != FULL_PRECISION:
        bits = Bits.parse(cell.bits)
        arguments |= {"weight_bits": bits.weight, "activation_bits": bits.activation}
        arguments["calibration"] = subject.calibration_images(cell.calibration_size, cell.seed)
    start = time.perf_counter()
    with peak_memory(device) as peak:
        quantized = adfq.quantize(model, cell.method, resume=resume, **arguments)
    return quantized, {
        "calibration_seconds": time.perf_counter() - start,
        "calibration_memory": peak.megabytes,
    }


def evaluate_model(
    cell: Cell, subject: Subject, model: nn.Module, device: torch.device, cost: Mapping[str, Any] | None = None
) -> Record:
    """Evaluates a cell's model.

    Args:
        cost: of quantizing the model; None for one that was saved.

    Returns:
        The record: ``config``, ``metrics``, ``timing``, ``cost`` (`benchmarks.run.cost`, and ``evaluation_memory`` in
        MB), ``report`` of the method, ``environment``, ``provenance``, ``finished``. ``timing`` is in seconds:
        ``calibration``, ``evaluation``, and ``loading``, which is what evaluation has waited for images.
    """
    cost = {"calibration_seconds": 0.0} if cost is None else cost
    evaluation, loading = Stopwatch(), Stopwatch()
    with evaluation, peak_memory(device) as peak:
        metrics = subject.evaluate(model, device, cell.limit, cell.batch_size, loading)
    quantization = getattr(model, "quantization", None)
    # A detector does not take more images at once than it evaluates.
    images = subject.evaluation_images(min(_COST_IMAGES, cell.batch_size))
    return {
        "config": cell.config,
        "metrics": metrics,
        "timing": {
            "calibration": cost["calibration_seconds"],
            "evaluation": evaluation.seconds,
            "loading": loading.seconds,
        },
        "cost": {**cost, "evaluation_memory": peak.megabytes, **measure_cost(model, images, device, subject.forward)},
        "report": {} if quantization is None else quantization.report,
        "environment": environment(device),
        "provenance": provenance(cell, subject),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Where a result was measured."""
    return {
        "adfq": adfq.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        **{name: _version(name) for task in TASKS.values() for name in task.libraries},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def provenance(cell: Cell, subject: Subject) -> dict[str, Any]:
    """What a result depends on beside its cell: code, weights, data, libraries that compute."""
    return {
        "code": code_digest(),
        **_foreign_method(cell.method),
        "weights": subject.weights_digest,
        "data": dict(subject.data_digests),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        **{name: _version(name) for name in find_task(cell.task).libraries},
    }


def _version(name: str) -> str | None:
    for distribution in _DISTRIBUTIONS.get(name, (name,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


@cache
def _foreign_method(name: str) -> dict[str, str]:
    """SHA-256 of the source of a method that is none of ours."""
    module = None if name == FULL_PRECISION else inspect.getmodule(find_method(name))
    if module is None or module.__file__ is None or module.__name__.partition(".")[0] in ("adfq", "baselines"):
        return {}
    file = Path(module.__file__)
    sources = file.parent.rglob("*.py") if "." in module.__name__ else [file]
    return {"method": _digest_sources(sources)}


def _digest_sources(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _commit() -> str | None:
    """The commit of the code that runs, ``-dirty`` if it is not just that; None where it is no repository."""
    root = Path(str(adfq.__file__)).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root.resolve():  # an environment within somebody's repository
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def code_digest() -> str:
    """SHA-256 of the source files that decide results: core, baselines, tasks and bundled data."""
    import baselines
    import benchmarks.bundled
    import benchmarks.tasks

    packages = (adfq, baselines, benchmarks.tasks, benchmarks.bundled)
    return _digest_sources(path for package in packages for path in Path(str(package.__file__)).parent.rglob("*.py"))
