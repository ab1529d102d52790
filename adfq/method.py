"""The interface of a quantization method: options, recipe, application."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from adfq.bits import Bits
from adfq.errors import AdfqError

if TYPE_CHECKING:
    from typing_extensions import Self

    from adfq.calibration import CalibrationImages
    from adfq.sites import Network, Recipe

#: The name of the method that leaves a model as it is.
FULL_PRECISION = "full_precision"

_KINDS: Mapping[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
    str: ((str,), "a text"),
}


@dataclass(frozen=True)
class Run:
    """One application of a method: its inputs beside the network, and its report.

    Attributes:
        images: calibration images in batches; their ``folder`` is that of finished parts, None to keep nothing.
        report: findings of the method by subject, in JSON's types; filled by `Method.apply`.
    """

    images: CalibrationImages
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method(ABC):
    """A post-training quantization method; a subclass is a frozen dataclass whose fields are its options.

    Each option has a default. A method is known by the name of its entry point in the group ``adfq.methods``.

    Attributes:
        label: the name in tables and figures.
        paper: the reference, such as ``"arXiv 2407.02763"``; empty for none.
        calibration_size: the usual number of calibration images.

    Raises:
        AdfqError: for an option of another type than its default.
    """

    label: ClassVar[str]
    paper: ClassVar[str] = ""
    calibration_size: ClassVar[int] = 32

    def __new__(cls, *values: Any, **options: Any) -> Self:
        """Return a method whose options have the types of their defaults, before any code of it relies on these."""
        given = inspect.signature(cls.__init__).bind_partial(None, *values, **options).arguments
        defaults = cls.options()
        for option, value in given.items():
            if option in defaults:
                _check_kind(option, value, defaults[option])
        return super().__new__(cls)

    @property
    def trains(self) -> str:
        """Parts of the network that the method changes to fit its output, such as ``"weights"``; empty for none."""
        return ""

    @property
    def trained_iterations(self) -> int:
        """Iterations that a unit is trained for, of all stages together; those of an option ``iterations`` by default.

        It is 0 for a method that trains nothing, or in closed form.
        """
        return getattr(self, "iterations", 0) if self.trains else 0

    @abstractmethod
    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role.

        Args:
            bits: bit-widths of weights and activations.
        """

    def supports(self, network: Network) -> str | None:
        """Return the reason why the method cannot be applied to a network, or None if it can.

        Args:
            network: an adapted model without quantizers.
        """
        return None

    @abstractmethod
    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place: attach quantizers, quantize weights, calibrate activations.

        Args:
            network: an adapted model without quantizers.
            run: calibration images and report.
            bits: bit-widths of weights and activations.

        Raises:
            AdfqError: for unusable options.
            NonFiniteError: for weights or activations that are not finite.
            NotApplicableError: for a model that the method turns out not to fit.
        """

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Return the options with their defaults, the class's own before inherited ones."""
        own = inspect.get_annotations(cls)
        ordered = sorted(fields(cls), key=lambda option: option.name not in own)
        return {option.name: option.default for option in ordered}


def _check_kind(option: str, value: Any, default: Any) -> None:
    kinds, words = _KINDS.get(type(default), ((object,), ""))
    if not isinstance(value, kinds) or (isinstance(value, bool) and type(default) in (int, float)):
        raise AdfqError(f"{option} must be {words}, got {value!r}")


@dataclass(frozen=True)
class FullPrecision(Method):
    """The model as it is: the reference of every table."""

    label = "Full precision"
    calibration_size = 0

    def recipe(self, bits: Bits) -> Recipe:
        """Return a recipe without quantizers."""
        from adfq.sites import Recipe

        return Recipe(activation=lambda: None, weight=lambda: None)

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Leave the network as it is."""
