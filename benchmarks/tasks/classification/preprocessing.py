"""Preprocessing of a classifier's images, checked against the model before images are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from adfq.errors import AdfqError, one_line

if TYPE_CHECKING:
    from benchmarks.cell import Cell

#: PIL's modes by the number of channels.
MODES = {1: "L", 3: "RGB"}

# Pixels of an image's shorter side when it is resized before the crop: an image of 3:2 then takes 0.5 GB.
_LONGEST = 10_000

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROPS = ("center", "squash", "border")  # timm takes any other word for center


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= torch.finfo(torch.float).max


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_number, value))


# Entries of timm's data configuration: the rule in words, and as a function.
_ENTRIES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "input_size": (
        "must be channels, height and width, whole numbers from 1",
        lambda value: _are_numbers(value) and len(value) == 3 and all(type(n) is int and n > 0 for n in value),
    ),
    "mean": ("must be a list of finite numbers", _are_numbers),
    "std": (
        "must be a list of finite numbers above 0",
        lambda value: _are_numbers(value) and all(n > 0 for n in value),
    ),
    "crop_pct": (
        "is the share of the shorter side that is kept, above 0 and at most 1",
        lambda value: _is_number(value) and 0 < value <= 1,
    ),
    "crop_mode": (f"must be one of {', '.join(_CROPS)}", lambda value: value in _CROPS),
    "interpolation": (f"must be one of {', '.join(_INTERPOLATIONS)}", lambda value: value in _INTERPOLATIONS),
}


def resolve_preprocessing(cell: Cell, model: Any) -> dict[str, Any]:
    """Return timm's data configuration of a model, with the cell's own entries before the model's.

    Args:
        cell: its model arguments and preprocessing.
        model: classifier, which is run on one empty image of the size.

    Raises:
        AdfqError: for entries that are not timm's, and a size of images that the model does not take.
    """
    given = dict(cell.preprocessing)
    for name, value in given.items():
        _check_entry(name, value)
    try:
        config: dict[str, Any] = resolve_data_config({**_size_of(dict(cell.model_arguments)), **given}, model=model)
    except AssertionError:  # the other values have been looked at
        raise AdfqError("mean and std need one value, or one for each input channel") from None
    size = config["input_size"]
    if size[0] not in MODES:
        raise AdfqError(f"images have 1 or 3 channels, the model has {size[0]}")
    if not len(config["mean"]) == len(config["std"]) == size[0]:
        raise AdfqError(f"the model's mean and std do not fit {size[0]} channels; give them")
    longest = max(size[1:]) / config["crop_pct"]
    if longest > _LONGEST:
        share = config["crop_pct"]
        raise AdfqError(f"crop_pct {share} resizes images to {longest:.0f} pixels before the crop; at most {_LONGEST}")
    _check_size(model, cell.model, size)
    return config


def _size_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the images' size as a model's arguments give it, in timm's terms for data."""
    known: dict[str, Any] = {key: arguments[key] for key in ("in_chans", "img_size") if key in arguments}
    size = known.get("img_size")
    if isinstance(size, Sequence) and not isinstance(size, str):  # timm's data have a square size alone
        return {"input_size": (known.get("in_chans", 3), *size)}
    return known


def _check_entry(name: str, value: Any) -> None:
    if name not in _ENTRIES:
        raise AdfqError(f"preprocessing has no entry {name!r}; there are {', '.join(_ENTRIES)}")
    rule, is_kept = _ENTRIES[name]
    if not is_kept(value):
        raise AdfqError(f"preprocessing: {name} {rule}; it is {value!r}")


def _check_size(model: nn.Module, name: str, size: Sequence[int]) -> None:
    parameter = next(model.parameters())
    try:
        with torch.no_grad():
            output = model.eval()(torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype))
    except Exception as error:  # an AssertionError of timm's, or whatever a layer raises
        shown = "×".join(map(str, size))
        raise AdfqError(f"{name} does not take images of {shown}: {one_line(error)}") from None
    if not isinstance(output, Tensor):
        raise AdfqError(f"{name} is no classifier: its output is a {type(output).__name__}, and not one logit a class")
    if output.dim() != 2:
        shown = "×".join(map(str, output.shape[1:]))
        raise AdfqError(f"{name} is no classifier: its output for an image is {shown}, and not one logit a class")
