"""Bit-widths."""

from __future__ import annotations

import re
from dataclasses import dataclass

from adfq.errors import AdfqError

MIN_BITS, MAX_BITS = 2, 8


def check_bits(bits: int) -> int:
    """Return `bits`.

    Args:
        bits: a bit-width.

    Raises:
        AdfqError: unless it is a whole number from 2 to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise AdfqError(f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}, got {bits!r}")
    return bits


@dataclass(frozen=True)
class Bits:
    """Bit-widths of weights and activations, each 2 to 8.

    Attributes:
        weight: bit-width of weights.
        activation: bit-width of activations.

    Raises:
        AdfqError: for another bit-width.
    """

    weight: int
    activation: int

    def __post_init__(self) -> None:
        check_bits(self.weight)
        check_bits(self.activation)

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Return the bit-widths that a text names.

        Args:
            text: ``W4A4`` or ``W4/A4``, in either case.

        Raises:
            AdfqError: for any other text, and for bit-widths outside 2 to 8.
        """
        match = re.fullmatch(r"W(\d+)/?A(\d+)", text, re.IGNORECASE)
        if match is None:
            raise AdfqError(f"cannot read bits {text!r}; write W4A4 (weights 2 to 8 bits, activations 2 to 8 bits)")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"W{self.weight}/A{self.activation}"
