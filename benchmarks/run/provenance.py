"""Provenance of a record: code, weights, data and libraries; and the machine that measured it."""

from __future__ import annotations

import platform
import subprocess
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
from adfq.adapters import family_of, find_adapter
from adfq.method import FULL_PRECISION
from adfq.registry import find_method
from benchmarks.cell import Cell
from benchmarks.run.sources import digest_sources
from benchmarks.tasks import Subject, find_task

# mmcv without compiled operators, and builds of it for versions of torch that the original does not cover.
_DISTRIBUTIONS = {"mmcv": ("mmcv", "mmcv-lite", "onedl-mmcv")}


def provenance(cell: Cell, subject: Subject) -> dict[str, Any]:
    """Return everything beside its configuration that decides a cell's result.

    Args:
        cell: the experiment.
        subject: the cell's model and data.

    Returns:
        ``code`` (`code_digest`), ``weights`` and ``data`` (digests), versions of libraries by name.
    """
    return {
        "code": code_digest(cell, subject.model),
        "weights": subject.weights_digest,
        "data": dict(subject.data_digests),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        **{name: library_version(name) for name in find_task(cell.task).libraries},
    }


def code_digest(cell: Cell, model: nn.Module) -> str:
    """Return SHA-256 of the code that can change a cell's result (`benchmarks.run.sources`).

    Counted are the modules of its measurements, of its task, of its method and of its model's adapter, and all that
    they import.

    Args:
        cell: task and method.
        model: the subject's model; it decides the adapter.
    """
    roots = ["benchmarks.run.measuring", find_task(cell.task).load.__module__]
    if cell.method != FULL_PRECISION:
        roots += [find_method(cell.method).__module__, find_adapter(family_of(model)).__name__]
    return digest_sources(tuple(roots))


def environment(device: torch.device, task: str | None = None) -> dict[str, Any]:
    """Return the machine, its device, and versions of code and libraries, for a record.

    Args:
        device: device of the model.
        task: task whose libraries count too; None, the default, for none.
    """
    return {
        "adfq": adfq.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        **({} if task is None else {name: library_version(name) for name in find_task(task).libraries}),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def library_version(name: str) -> str | None:
    """Return the version of an installed library; None where it is not installed.

    Args:
        name: one of `benchmarks.tasks.Task.libraries`.
    """
    for distribution in _DISTRIBUTIONS.get(name, (name,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


@cache
def _commit() -> str | None:
    """Return the commit of the running code, with ``-dirty`` if files differ from it; None outside a repository."""
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
