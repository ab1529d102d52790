"""One experiment as a value."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from adfq.methods import FULL_PRECISION, Bits, check_method

#: What a full-precision cell says of its bits.
FULL_PRECISION_BITS = "W32/A32"

Arguments = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Cell:
    """Everything that decides a result, except the code, the data and the weights themselves.

    Attributes:
        task: ``"classification"``, ``"detection"`` or ``"segmentation"``.
        model: a name that the task knows.
        data: where images come from, in the task's terms.
        method: one of `adfq.methods()`.
        bits: ``"W4/A4"``; ``"W32/A32"`` for full precision.
        model_arguments: keyword arguments of the model's factory, sorted.
        checkpoint: weights file, or None.
        pretrained: download the weights where there is no checkpoint.
        method_arguments: the method's options, sorted.
        preprocessing: overrides of the model's own, sorted.
        task_arguments: options that the task alone has, sorted, as far as they differ from its defaults.
        calibration_size: number of calibration images.
        seed: of their choice, and of the method.
        limit: how many evaluation images at most; None for all.
        batch_size: of evaluation; quantizers with run-time ranges can depend on it.
    """

    task: str
    model: str
    data: str
    method: str
    bits: str = "W4/A4"
    model_arguments: Arguments = ()
    checkpoint: str | None = None
    pretrained: bool = False
    method_arguments: Arguments = ()
    preprocessing: Arguments = ()
    task_arguments: Arguments = ()
    calibration_size: int = 32
    seed: int = 0
    limit: int | None = None
    batch_size: int = 100

    @classmethod
    def create(cls, **fields: Any) -> Cell:
        """A checked cell in its normal form: equal experiments are equal cells.

        Raises:
            AdfqError: for an unknown method or option of one, and for unreadable bits.
        """
        cell = cls(**fields)
        check_method(cell.method, dict(cell.method_arguments))
        if cell.method == FULL_PRECISION:
            return replace(cell, bits=FULL_PRECISION_BITS, calibration_size=0, seed=0)
        return replace(cell, bits=str(Bits.parse(cell.bits)))

    @property
    def config(self) -> dict[str, Any]:
        """The cell as JSON has it."""
        config: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if not self.task_arguments:  # most tasks have none, and records are older than these
            del config["task_arguments"]
        return config

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits that stay the same as long as the configuration does."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]
