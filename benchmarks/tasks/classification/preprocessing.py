"""Preprocessing of a classifier's images, checked against the model before images are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.data import resolve_data_config
from torch import nn

from adfq.errors import AdfqError
from benchmarks.tasks.shared import one_line

if TYPE_CHECKING:
    from benchmarks.cell import Cell

#: PIL's modes by the number of channels.
MODES = {1: "L", 3: "RGB"}


def resolve_preprocessing(cell: Cell, model: Any) -> dict[str, Any]:
    """Return timm's data configuration of a model, with the cell's own entries before the model's.

    Args:
        cell: its model arguments and preprocessing.
        model: classifier, which is run on one empty image of the size.

    Raises:
        AdfqError: for entries that are not timm's, and a size of images that the model does not take.
    """
    given = dict(cell.preprocessing)
    _check_entries(given)
    try:
        config: dict[str, Any] = resolve_data_config({**_size_of(dict(cell.model_arguments)), **given}, model=model)
    except AssertionError:  # the other values have been looked at
        raise AdfqError("mean and std need one value, or one for each input channel") from None
    size = config["input_size"]
    if size[0] not in MODES:
        raise AdfqError(f"images have 1 or 3 channels, the model has {size[0]}")
    if not len(config["mean"]) == len(config["std"]) == size[0]:
        raise AdfqError(f"the model's mean and std do not fit {size[0]} channels; give them")
    _check_size(model, cell.model, size)
    return config


def _size_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the images' size as a model's arguments give it, in timm's terms for data."""
    known: dict[str, Any] = {key: arguments[key] for key in ("in_chans", "img_size") if key in arguments}
    size = known.get("img_size")
    if isinstance(size, Sequence) and not isinstance(size, str):  # timm's data have a square size alone
        return {"input_size": (known.get("in_chans", 3), *size)}
    return known


def _check_entries(given: dict[str, Any]) -> None:
    size, share = given.get("input_size"), given.get("crop_pct")
    if size is not None and not (
        isinstance(size, Sequence) and len(size) == 3 and all(isinstance(number, int) and number > 0 for number in size)
    ):
        raise AdfqError(f"the size of images is channels, height and width, whole numbers from 1; it is {size}")
    if share is not None and not 0 < share <= 1:
        raise AdfqError(f"the share of the shorter side that is kept is above 0 and at most 1; it is {share}")
    if not all(0 < deviation < float("inf") for deviation in given.get("std", ())):
        raise AdfqError(f"standard deviations are above 0; they are {given['std']}")


def _check_size(model: nn.Module, name: str, size: Sequence[int]) -> None:
    parameter = next(model.parameters())
    try:
        with torch.no_grad():
            output = model.eval()(torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype))
    except Exception as error:  # an AssertionError of timm's, or whatever a layer raises
        shown = "×".join(map(str, size))
        raise AdfqError(f"{name} does not take images of {shown}: {one_line(error)}") from None
    if output.dim() != 2:
        shown = "×".join(map(str, output.shape[1:]))
        raise AdfqError(f"{name} is no classifier: its output for an image is {shown}, and not one logit a class")
