"""A cell is a value: equal experiments are equal, and the id follows the configuration alone."""

from __future__ import annotations

import pytest

from adfq import AdfqError
from benchmarks.cell import Cell

FIELDS = {"task": "classification", "model": "bundled_vit", "data": "bundled"}


def test_spelling_of_bits_does_not_make_another_experiment() -> None:
    cells = {Cell.create(method="base_ptq", bits=bits, **FIELDS) for bits in ("W4A4", "W4/A4", "w4a4")}
    assert len(cells) == 1


def test_full_precision_is_one_experiment_whatever_would_be_quantized() -> None:
    first = Cell.create(method="full_precision", bits="W3A3", seed=1, calibration_size=16, **FIELDS)
    second = Cell.create(method="full_precision", **FIELDS)
    assert first == second
    assert first.bits == "W32/A32"


def test_the_id_is_stable_and_tells_configurations_apart() -> None:
    cell = Cell.create(method="base_ptq", **FIELDS)
    # Records of earlier runs are found by it: changing how it is made orphans them all.
    assert cell.id == "9ed3e2bcd331d1a7"
    others = [
        Cell.create(method="base_ptq", **{**FIELDS, **change})
        for change in ({"seed": 1}, {"limit": 5}, {"method_arguments": (("range", "mse"),)}, {"checkpoint": "x.pth"})
    ]
    assert len({cell.id, *(other.id for other in others)}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "unknown"}, "there are full_precision, adfq_vit, base_ptq"),
        ({"method": "base_ptq", "bits": "4"}, "write W4A4"),
        ({"method": "base_ptq", "bits": "W4A9"}, "from 2 to 8"),
        ({"method": "base_ptq", "method_arguments": (("colour", 1),)}, "it has range"),
        ({"method": "full_precision", "method_arguments": (("range", "mse"),)}, "it has none"),
    ],
)
def test_mistakes_say_what_there_is(change: dict[str, object], message: str) -> None:
    with pytest.raises(AdfqError, match=message):
        Cell.create(**{**FIELDS, **change})
