"""What all quantizers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from adfq.errors import AdfqError, NonFiniteError

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


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, ratio: Tensor, values: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(values.addcmul(ratio, inside, value=-1) if ctx.needs_input_grad[1] else None, inside)
        ctx.scale_shape = scale.shape
        return values * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        per_step, inside = ctx.saved_tensors
        to_x = gradients[0] * inside if ctx.needs_input_grad[0] else None
        to_scale = None if per_step is None else (gradients[0] * per_step).sum_to_size(ctx.scale_shape)
        return to_x, to_scale, None, None, None


def rescale(x: Tensor, scale: Tensor, ratio: Tensor, values: Tensor, inside: Tensor) -> Tensor:
    """values·scale, where `values` is the quantized `ratio` = x/scale, with the gradients of learned step size
    quantization (Esser et al., 2020).

    The gradient to x is 1 inside the range and 0 outside; that to the scale is values - ratio inside, values outside.

    Args:
        x: float32; what is quantized.
        scale: broadcasts against `x`.
        ratio, values: the shape of `x`, without gradients.
        inside: 1.0 or 0.0, the shape of `x`.
    """
    result: Tensor = _Rescale.apply(x, scale, ratio, values, inside)
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
            AdfqError: if the tensor is empty.
            NonFiniteError: if it has values that are not finite.
        """
        if x.numel() == 0:
            raise AdfqError("cannot calibrate on an empty tensor")
        if not torch.isfinite(torch.stack(x.aminmax())).all():  # one pass, and no tensor of its size
            raise NonFiniteError("cannot calibrate on values that are not finite (NaN or infinity)")
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

    def encode(self, x: Tensor) -> Tensor:
        """The codes that stand for the quantized `x`: uint8, the shape of `x`; `decode` turns them into its values.

        Raises:
            NotImplementedError: for a quantizer whose values no integer codes stand for.
        """
        raise NotImplementedError(f"{type(self).__name__} has no integer codes")

    def decode(self, codes: Tensor) -> Tensor:
        """The values of codes: float32, the shape of `codes`.

        Raises:
            NotImplementedError: for a quantizer whose values no integer codes stand for.
        """
        raise NotImplementedError(f"{type(self).__name__} has no integer codes")

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

    def describe(self) -> str:
        """What it is, in a phrase for readers."""
        return f"{type(self).__name__}, {self.bits} bits"

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
