"""What all quantizers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from adfq.errors import AdfqError

MIN_BITS, MAX_BITS = 2, 8


def check_bits(bits: int) -> int:
    """Returns `bits`; raises AdfqError unless it is a whole number from 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise AdfqError(f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}, got {bits!r}")
    return bits


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, quantized: Tensor, inside: Tensor) -> Tensor:
    """The values of `quantized` with the gradient of `x` where it is `inside` the range, and none elsewhere.

    (Bengio et al., 2013.) Not clamp's own gradient: that is 0 at the ends of the range themselves.
    """
    result: Tensor = _StraightThrough.apply(torch.where(inside, x, x.detach()), quantized.detach())
    return result


class Quantizer(nn.Module, ABC):
    """Simulated quantization: values go in, the nearest representable values come out.

    `calibrate` looks at a tensor and sets the buffers; from then on `forward` is a pure function. Computation
    and buffers are float32 whatever the input's dtype (a scale in half precision would move every code), and
    the result has the input's dtype. Gradients pass straight through the rounding and are cut outside the range.

    Attributes:
        bits: bit-width, 2 to 8.
        scale: float32 step size, shaped to broadcast against the input; empty before calibration.
    """

    scale: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        self.register_buffer("scale", torch.empty(0))

    @property
    def levels(self) -> int:
        """The number of codes, 2^bits."""
        return int(2**self.bits)

    @property
    def is_calibrated(self) -> bool:
        return self.scale.numel() > 0

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> Self:
        """Sets the buffers from a tensor of typical inputs and returns the quantizer.

        Raises:
            AdfqError: if the tensor is empty or has values that are not finite.
        """
        if x.numel() == 0:
            raise AdfqError("cannot calibrate on an empty tensor")
        if not torch.isfinite(x).all():
            raise AdfqError("cannot calibrate on values that are not finite (NaN or infinity)")
        self._find_range(x.detach().float())
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Returns the quantized `x`: same shape and dtype.

        Raises:
            RuntimeError: before calibration.
        """
        if not self.is_calibrated:
            raise RuntimeError(f"{type(self).__name__} is used before it is calibrated")
        return self._quantize(x.float()).to(x.dtype)

    @abstractmethod
    def _find_range(self, x: Tensor) -> None:
        """Sets the buffers from a finite float32 tensor."""

    @abstractmethod
    def _quantize(self, x: Tensor) -> Tensor:
        """Quantizes a float32 tensor."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # model.half() and model.bfloat16() cast every buffer; these move with the model but stay float32.
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            before = kept[name]
            if moved is not None and before is not None and moved.dtype != before.dtype:
                self._buffers[name] = before.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # Buffers have no shape before calibration: take the shape of what is loaded.
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            if buffer is not None and loaded is not None:
                self._buffers[name] = torch.empty_like(loaded, dtype=buffer.dtype, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
