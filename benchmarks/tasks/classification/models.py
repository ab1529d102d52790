"""Classifiers: timm's models by name, with checkpoints in the layouts that timm reads, and bundled ones."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adfq.adapters import families, find_adapter
from adfq.errors import AdfqError, one_line
from benchmarks.bundled.classifiers import CLASSIFIERS
from benchmarks.run.console import warn
from benchmarks.tasks.checkpoints import check_present, format_shape, load_weights, misfit, warn_of_left_out
from benchmarks.tasks.shared import unknown_model

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
    checkpoint = cell.location.checkpoint
    return replace(
        cell,
        model=shipped.architecture,
        model_arguments=tuple({**shipped.arguments, **dict(cell.model_arguments)}.items()),
        location=replace(cell.location, checkpoint=str(shipped.checkpoint) if checkpoint is None else checkpoint),
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
    if not hasattr(model, "num_classes"):  # features_only gives a model's stages
        raise AdfqError(f"cannot create {name}: with these arguments it is a {type(model).__name__}, and no classifier")
    if checkpoint and checkpoint.lower().endswith(".npz"):
        _load_arrays(model, checkpoint, name)
    elif checkpoint:
        load_weights(model, checkpoint, name, _conversion(model, checkpoint))
    elif not cell.pretrained:
        warn(f"{name} has random weights (neither a checkpoint nor pretrained weights)")
    return model


class _Copies(TorchFunctionMode):
    """Collector of the tensors that code copies into a model: a copy would broadcast another shape.

    Attributes:
        state: the tensors by the names of those that they are copied to.
        interpolates: whether any tensor has been interpolated.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
        self.state: dict[str, Tensor] = {}
        self.interpolates = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and id(args[0]) in self._names:
            self.state[self._names[id(args[0])]] = args[1]
            return args[0]
        self.interpolates |= func is nn.functional.interpolate
        return func(*args, **(kwargs or {}))


class _Archive(io.FileIO):
    """File that notes the places it is read from, which tell the arrays of an archive that are read."""

    def __init__(self, file: str) -> None:
        super().__init__(file)
        self.places: set[int] = set()

    def __repr__(self) -> str:
        return repr(self.name)

    def seek(self, place: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_SET:
            self.places.add(place)
        return super().seek(place, whence)


def _load_arrays(model: Any, file: str, name: str) -> None:
    """Load a file of numpy arrays in the layout of the ViT authors' JAX code; timm passes over misfits."""
    copies = _Copies(model)
    left = []
    try:
        with _Archive(file) as archive, copies:
            model.load_pretrained(archive)
        with np.load(file) as arrays:
            for key, member in zip(arrays.files, arrays.zip.infolist(), strict=True):
                if member.header_offset not in archive.places:
                    left.append(key)
                    continue
                array = arrays[key]
                _check_array(key, array, model)
                if "/encoderblock/" in key and len(array) > len(model.blocks):  # all blocks' in one
                    left.append(key)
    except Exception as error:  # a damaged file can raise anything
        raise AdfqError(f"checkpoint {file} does not fit {name}: {one_line(error)}") from None
    if problem := misfit({**copies.state, **dict.fromkeys(left, torch.empty(0))}, model.state_dict()):
        raise AdfqError(f"checkpoint {file} does not fit {name}: {problem}")
    if left:
        warn_of_left_out(name, file, left)
    if copies.interpolates:
        warn(f"{file}: weights are interpolated to the model's size")
    model.load_state_dict(copies.state, strict=False)


def _check_array(key: str, array: NDArray[Any], model: Any) -> None:
    """Raise ValueError for values that are no floats, and for other heads than the model's, whose weights they fit."""
    if array.dtype.kind != "f":
        raise ValueError(f"{key} is of {array.dtype}, whose values need a scale")
    if "/encoderblock" in key and key.endswith("/query/kernel") and array.shape[-2] != model.blocks[0].attn.num_heads:
        raise ValueError(f"{key} has {array.shape[-2]} heads and should have {model.blocks[0].attn.num_heads}")


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
