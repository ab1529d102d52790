"""Encoders: timm's models by name, without their classifier, and short names for common ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adfq.errors import AdfqError
from benchmarks.bundled.classifiers import CLASSIFIERS
from benchmarks.tasks.classification.models import classifier_names

if TYPE_CHECKING:
    from benchmarks.cell import Cell

#: timm's name and factory arguments, by short name. DINOv2 is trained at 518 pixels and mostly used at 224.
ENCODERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    f"dinov2_{size}": (f"vit_{size}_patch14_dinov2.lvd142m", {"img_size": 224}) for size in ("small", "base", "large")
}


def encoder_names() -> list[str]:
    """Return the names of encoders: short ones, then timm's."""
    return [*ENCODERS, *(name for name in classifier_names() if name not in CLASSIFIERS)]


def resolve_encoder(cell: Cell) -> Cell:
    """Return a cell in timm's terms, without a classifier.

    Args:
        cell: its model is a short name or timm's; its own arguments go before those of the name.

    Raises:
        AdfqError: for a bundled classifier, which is trained for its classes alone.
    """
    if cell.model in CLASSIFIERS:
        raise AdfqError(f"{cell.model} is a classifier: task classification measures it")
    name, arguments = ENCODERS.get(cell.model, (cell.model, {}))
    merged = {"num_classes": 0, **arguments, **dict(cell.model_arguments)}
    return replace(cell, model=name, model_arguments=tuple(sorted(merged.items())))
