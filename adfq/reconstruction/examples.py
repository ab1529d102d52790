"""Inputs and targets of a unit for all calibration images, on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adfq.calibration.waiting import Rows, room_for
from adfq.calibration.walk import Call, Part, Walk


@dataclass
class Examples:
    """Inputs and targets of a unit for images of one size, on the host.

    Tensors are B×k×…, with k rows of the unit's input for each image (Swin's windows). Inputs are all tensor arguments
    with as many rows as the first, by position or keyword: cross-attention has three. Keywords in the unit's
    `shared_arguments` are not among them. Those of large images wait in files (`adfq.calibration.waiting.room_for`).

    Attributes:
        call: the unit's arguments for some images; all but the inputs are those of every image.
        inputs: inputs in full precision.
        quantized_inputs: inputs in the quantized network.
        targets: outputs in full precision.
        count: number of images.
    """

    call: Call
    inputs: dict[int | str, Rows]
    quantized_inputs: dict[int | str, Rows]
    targets: Rows = field(default_factory=lambda: torch.empty(0))
    count: int = 0

    def takes(self, call: Call, inputs: Mapping[int | str, Tensor]) -> bool:
        """Return True if a batch with such inputs may join: a mask, say, depends on the images' height and width."""
        known, others = (
            [(key, value) for key, value in _by_key(*arguments) if key not in inputs] for arguments in (self.call, call)
        )
        shapes = [{key: tensor.shape[1:] for key, tensor in tensors.items()} for tensors in (self.inputs, inputs)]
        return shapes[0] == shapes[1] and _is_same(known, others)

    def arguments(self, rows: Mapping[int | str, Tensor]) -> Call:
        """Return the unit's arguments for some rows of its inputs."""
        arguments, keywords = self.call
        changed = {**dict(_by_key(arguments, keywords)), **rows}
        return tuple(changed[index] for index in range(len(arguments))), {key: changed[key] for key in keywords}


def inputs_in(call: Call, images: int, unit: nn.Module) -> dict[int | str, Tensor]:
    """Return the tensors of a call that are the unit's inputs, B×k×….

    Args:
        call: arguments of the unit.
        images: number of images, B.
        unit: the unit.
    """
    # Rotary positions, say, may have as many rows by chance.
    shared = {name for module in unit.modules() for name in getattr(module, "shared_arguments", ())}
    tensors = {key: value for key, value in _by_key(*call) if isinstance(value, Tensor) and key not in shared}
    rows = len(next(iter(tensors.values())))
    return {
        key: tensor.unflatten(0, (images, -1))
        for key, tensor in tensors.items()
        if tensor.dim() and len(tensor) == rows
    }


def collect(
    units: Sequence[nn.Module], walks: Sequence[Walk], parts: Sequence[Part], folder: Path | None = None
) -> tuple[list[Examples], Tensor]:
    """Return a unit's inputs in both versions of the network.

    Args:
        units: the unit in full precision and in the quantized network.
        walks: these two networks' walks.
        parts: their parts at hand.
        folder: folder for inputs that wait in files; None, the default, for the system's temporary one.

    Returns:
        Examples for each size of images, and the place of each image: the index of its examples and that among them,
        N×2.
    """
    examples: list[Examples] = []
    places: list[Tensor] = []
    room = partial(room_for, count=sum(parts[0].sizes), folder=folder)
    for index, (unit, walk, part) in enumerate(zip(units, walks, parts, strict=True)):
        with walk.mode():
            for batch, (images, call) in enumerate(zip(part.sizes, part.calls(unit), strict=True)):
                inputs = inputs_in(call, images, unit)
                if not index:
                    places.append(_place(examples, call, inputs, images, room))
                which, first = places[batch][0].tolist()
                found = examples[which].quantized_inputs if index else examples[which].inputs
                for key, tensor in inputs.items():
                    found[key][torch.arange(first, first + images)] = tensor.cpu()
    return examples, torch.cat(places)


def _place(
    examples: list[Examples],
    call: Call,
    inputs: Mapping[int | str, Tensor],
    images: int,
    room: Callable[[Tensor], Rows],
) -> Tensor:
    """Return the place of a batch's images, among examples with such inputs and the same other arguments."""
    index, fit = next(((i, found) for i, found in enumerate(examples) if found.takes(call, inputs)), (-1, None))
    if fit is None:
        first, second = ({key: room(tensor) for key, tensor in inputs.items()} for _ in range(2))
        index, fit = len(examples), Examples(call, first, second)
        examples.append(fit)
    place = torch.arange(fit.count, fit.count + images)
    fit.count += images
    return torch.stack([torch.full_like(place, index), place], 1)


def _is_same(first: Any, second: Any) -> bool:
    """Return True for equal nested tuples, lists and dictionaries of tensors and anything else."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return _is_same(list(first.items()), list(second.items()))
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(_is_same, first, second))
    return first is second or bool(first == second)


def _by_key(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Iterator[tuple[int | str, Any]]:
    yield from enumerate(arguments)
    yield from keywords.items()
