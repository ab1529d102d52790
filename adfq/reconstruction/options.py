"""Options of the optimization of units, declared once for all methods that have one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from adfq.errors import AdfqError
from adfq.method import Method

_LARGEST = sys.float_info.max
_LARGEST_BATCH = 2**31 - 1  # torch's sizes overflow above 63 bits; so many images have no room anyway


def check_number(options: Any, name: str, highest: float = _LARGEST, positive: bool = False) -> None:
    """Raise AdfqError unless an option is a number from 0 to a bound.

    Args:
        options: object with the option as attribute.
        name: name of the option.
        highest: the bound; the largest finite number by default.
        positive: True to refuse 0 too; False by default.
    """
    value = getattr(options, name)
    if not isinstance(value, (int, float)) or not 0 <= value <= highest or (positive and not value):
        bounds = "above 0" if positive else "of at least 0" if highest == _LARGEST else f"from 0 to {highest}"
        raise AdfqError(f"{name} must be a finite number {bounds}, got {value!r}")


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of every optimization.

    Attributes:
        iterations: iterations for each unit; 0 leaves it calibrated.
        optimize_batch_size: images in an iteration.
        held_back: share of the images that is not optimized on and decides when to stop and which state is kept.
        autocast: True to run units in bfloat16.

    Raises:
        AdfqError: for a value out of range.
    """

    iterations: int = 3000
    optimize_batch_size: int = 32
    held_back: float = 0.0
    autocast: bool = False

    def __post_init__(self) -> None:
        for name, lowest in (("iterations", 0), ("optimize_batch_size", 1)):
            if not isinstance(value := getattr(self, name), int) or value < lowest:
                raise AdfqError(f"{name} must be a whole number of at least {lowest}, got {value!r}")
        if self.optimize_batch_size > _LARGEST_BATCH:
            raise AdfqError(f"optimize_batch_size must be at most {_LARGEST_BATCH}, got {self.optimize_batch_size}")
        check_number(self, "held_back", 0.5)


@dataclass(frozen=True)
class RoundingOptions(OptimizerOptions):
    """Options of an optimization of roundings and step sizes.

    Attributes:
        mix_probability: probability that an element of a unit's input is the quantized network's and not full
            precision's.
        drop_probability: probability that an element of an activation in the unit is not quantized in an iteration.
        rounding_weight: weight of the regularizer that drives roundings to a decision.
        rounding_learning_rate: learning rate of AdaRound's α (Adam); 0 keeps weights rounded to nearest.
        step_learning_rate: learning rate of activation step sizes (Adam, cosine to 0), limited to a hundredth of the
            step size; 0 keeps the calibrated ones.
    """

    mix_probability: float = 0.5
    drop_probability: float = 0.0
    rounding_weight: float = 0.01
    rounding_learning_rate: float = 3e-3
    step_learning_rate: float = 4e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mix_probability", "drop_probability"):
            check_number(self, name, 1.0)
        for name in ("rounding_weight", "rounding_learning_rate", "step_learning_rate"):
            check_number(self, name)


@dataclass(frozen=True)
class OptimizingMethod(OptimizerOptions, Method):
    """Method that reconstructs units after calibration; ``iterations=0`` leaves them calibrated."""


@dataclass(frozen=True)
class RoundingMethod(RoundingOptions, OptimizingMethod):
    """Method that learns roundings and step sizes unit after unit."""

    @property
    def trains(self) -> str:
        """Learned parts: roundings and step sizes, but for those of learning rate 0; none without iterations."""
        rates = {"roundings": self.rounding_learning_rate, "step sizes": self.step_learning_rate}
        return ", ".join(name for name, rate in rates.items() if rate and self.iterations)
