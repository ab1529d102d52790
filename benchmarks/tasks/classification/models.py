"""Classifiers: timm's models by name, with checkpoints in the layouts that timm reads, and bundled ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import timm
from torch import Tensor, nn

from adfq.adapters import families, find_adapter
from adfq.errors import AdfqError
from benchmarks.bundled.classifiers import CLASSIFIERS
from benchmarks.run.console import warn
from benchmarks.tasks.checkpoints import check_present, format_shape, load_weights
from benchmarks.tasks.shared import one_line, unknown_model

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
    check_present(checkpoint)
    if "checkpoint_path" in dict(cell.model_arguments):
        raise AdfqError("a checkpoint is given as --checkpoint, not as an argument of the model")
    try:
        model = timm.create_model(name, pretrained=cell.pretrained and not checkpoint, **dict(cell.model_arguments))
    except Exception as error:  # whatever the constructor or the hub raises
        raise AdfqError(f"cannot create {name}: {one_line(error)}") from None
    if checkpoint and checkpoint.lower().endswith(".npz"):
        _load_arrays(model, checkpoint, name)
    elif checkpoint:
        load_weights(model, checkpoint, name, _conversion(model, checkpoint))
    elif not cell.pretrained:
        warn(f"{name} has random weights (neither a checkpoint nor pretrained weights)")
    return model


def _load_arrays(model: Any, file: str, name: str) -> None:
    """Load a file of numpy arrays in the layout of the ViT authors' JAX code."""
    try:
        model.load_pretrained(file)
    except Exception as error:  # a damaged file can raise anything
        raise AdfqError(f"checkpoint {file} does not fit {name}: {one_line(error)}") from None
    broken = [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise AdfqError(f"checkpoint {file} does not fit {name}: {broken[0]} is not finite")


def _conversion(model: nn.Module, file: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """Return timm's conversion of a family's other layouts; None for a family without one."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None

    def convert_and_tell(state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = model.state_dict()
        try:
            converted: dict[str, Tensor] = convert(dict(state), model)
        except Exception:
            if not own.keys() <= state.keys():
                raise
            converted = state | convert({key: state[key] for key in own}, model)  # it does not know the others
        resized = [key for key in own if key in state and key in converted and _differ(state[key], converted[key])]
        if resized:
            key = resized[0]
            shapes = f"{key} from {format_shape(state[key])} to {format_shape(converted[key])}"
            warn(f"{file}: {len(resized)} weights are interpolated to the model's size ({shapes})")
        return converted

    return convert_and_tell


def _differ(a: Tensor, b: Tensor) -> bool:
    """Return True for tensors with other values, in whatever shape."""
    return a is not b and (a.numel() != b.numel() or not a.flatten().equal(b.flatten()))
