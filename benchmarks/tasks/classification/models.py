"""Classifiers: timm's models by name, with checkpoints in the layouts that timm reads, and bundled ones."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import timm
from timm.models import load_checkpoint

from adfq.adapters import families, find_adapter
from adfq.errors import AdfqError
from benchmarks.bundled.classifiers import CLASSIFIERS
from benchmarks.run.console import warn
from benchmarks.tasks.shared import one_line, unknown_model, unreadable_checkpoint

if TYPE_CHECKING:
    from benchmarks.cell import Cell


def classifier_names() -> list[str]:
    """Return the names of classifiers: bundled ones, then timm's that an installed adapter takes."""
    adapters = (find_adapter(family) for family in families() if family.startswith("timm."))
    modules = {id(adapter): adapter for adapter in adapters}.values()
    return [*CLASSIFIERS, *(name for adapter in modules for name in getattr(adapter, "model_names", list)())]


def resolve_bundled(cell: Cell) -> Cell:
    """Return a bundled model's cell in timm's terms, and other cells unchanged."""
    if cell.model not in CLASSIFIERS:
        return cell
    shipped = CLASSIFIERS[cell.model]
    return replace(
        cell,
        model=shipped.architecture,
        model_arguments=tuple({**shipped.arguments, **dict(cell.model_arguments)}.items()),
        location=replace(cell.location, checkpoint=cell.location.checkpoint or str(shipped.checkpoint)),
        preprocessing=tuple({**shipped.preprocessing, **dict(cell.preprocessing)}.items()),
    )


def create_classifier(cell: Cell) -> Any:
    """Build a cell's model and load its weights.

    Args:
        cell: model, arguments of its factory and checkpoint, in timm's terms.

    Returns:
        timm's model.

    Raises:
        AdfqError: for an unknown model or unusable arguments, and a checkpoint that does not fit.
    """
    name, checkpoint = cell.model, cell.location.checkpoint
    if not timm.is_model(name):
        raise unknown_model(name, classifier_names())
    if checkpoint and not os.path.isfile(checkpoint):
        raise AdfqError(f"there is no checkpoint {checkpoint}")
    try:
        model = timm.create_model(name, pretrained=cell.pretrained and not checkpoint, **dict(cell.model_arguments))
    except Exception as error:  # whatever the constructor or the hub raises
        raise AdfqError(f"cannot create {name}: {one_line(error)}") from None
    if checkpoint:
        layouts = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        try:
            load_checkpoint(model, checkpoint, filter_fn=layouts)
        except Exception as error:  # a damaged file can raise anything
            problem = f"checkpoint {checkpoint} does not fit {name}"
            raise unreadable_checkpoint(checkpoint, error, problem) from None
    elif not cell.pretrained:
        warn(f"{name} has random weights (neither a checkpoint nor pretrained weights)")
    return model
