"""The base class of quantizers, and the gradients that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from adfq.bits import check_bits
from adfq.errors import AdfqError, NonFiniteError
from adfq.statistics import Everything, Search, Statistic, search_at_once


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, quantized: Tensor, inside: Tensor) -> Tensor:
    """Return `quantized` with the gradient of `x` inside the range and no gradient outside (Bengio et al., 2013).

    The gradient is not that of clamp, which is 0 at the ends of the range themselves.

    Args:
        x: full-precision values of any shape.
        quantized: quantized values, the shape of `x`.
        inside: bool, the shape of `x`; True for values that the range does not cut off.
    """
    result: Tensor = _StraightThrough.apply(torch.where(inside, x, x.detach()), quantized.detach())
    return result


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, ratio: Tensor, values: Tensor, inside: Tensor, through: bool
    ) -> Tensor:
        rounding = values.addcmul(ratio, inside, value=-1) if through else values
        ctx.save_for_backward(rounding if ctx.needs_input_grad[1] else None, inside)
        ctx.through = through
        ctx.scale_shape = scale.shape
        return values * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        per_step, inside = ctx.saved_tensors
        to_x = gradients[0] * inside if ctx.needs_input_grad[0] and ctx.through else None
        to_scale = None if per_step is None else (gradients[0] * per_step).sum_to_size(ctx.scale_shape)
        return to_x, to_scale, None, None, None, None


def rescale(
    x: Tensor, scale: Tensor, ratio: Tensor, values: Tensor, inside: Tensor, straight_through: bool = True
) -> Tensor:
    """Return values·scale with the gradients of learned step size quantization (Esser et al., 2020).

    The gradient with respect to `x` is 1 inside the range and 0 outside. The gradient with respect to `scale` is values
    - ratio inside the range and values outside.

    Args:
        x: float32 values to quantize, any shape.
        scale: step size; broadcasts against `x`.
        ratio: x/scale; the shape of `x`, without gradient.
        values: `ratio` on the grid, in steps; the shape of `x`, without gradient.
        inside: 1.0 inside the range and 0.0 outside; the shape of `x`.
        straight_through: True, the default, for these gradients. False for those of the rounding itself: none with
            respect to `x`, and values with respect to `scale`.
    """
    result: Tensor = _Rescale.apply(x, scale, ratio, values, inside, straight_through)
    return result


class Quantizer(nn.Module, ABC):
    """Simulated quantization: each value becomes the nearest representable one.

    `calibrate` sets the buffers from a tensor; `forward` is a pure function from then on. Computation and buffers are
    float32 whatever the input's dtype, because a scale in half precision would move every code. The result has the
    input's dtype. Gradients pass straight through the rounding and are 0 outside the range.

    Args:
        bits: bit-width, 2 to 8.

    Attributes:
        bits: bit-width, 2 to 8.
        scale: float32 step size, shaped to broadcast against the input; empty before calibration.
        straight_through: True, the default, for gradients that pass through the rounding; see `rescale`.
        pinned: True while calibration images come in batches: a parameter of the tensor at hand is then that of all
            calibration images, so that batches do not matter.

    Raises:
        AdfqError: for another bit-width.
    """

    scale: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        self.straight_through = True
        self.pinned = False
        self.register_buffer("scale", torch.empty(0))

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return int(2**self.bits)

    @property
    def is_calibrated(self) -> bool:
        """True once the buffers are set."""
        return self.scale.numel() > 0

    @property
    def has_range(self) -> Tensor:
        """Mask of the scales that come from data: bool, the shape of `scale`.

        The others are placeholders of groups without a value other than 0. A statistic over scales leaves them out.
        """
        return torch.ones_like(self.scale, dtype=torch.bool)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> Self:
        """Set the buffers from a tensor of typical inputs, and return the quantizer.

        Args:
            x: inputs of any shape and floating-point dtype.

        Raises:
            AdfqError: if `x` is empty, or not of a shape or sign that the quantizer takes.
            NonFiniteError: if `x` holds NaN or infinity.
        """
        for statistic in self.search():
            self.observe(statistic, x, 1.0)
        return self

    def search(self) -> Search[None]:
        """Return a search that sets the buffers when it ends; `observe` shows inputs to each of its statistics."""
        return self._search() if type(self)._find_range is Quantizer._find_range else self._gather()

    def observe(self, statistic: Statistic, x: Tensor, share: float) -> None:
        """Show typical inputs to a statistic.

        Args:
            statistic: statistic of `search`.
            x: inputs of any shape and floating-point dtype.
            share: their share in all inputs.

        Raises:
            AdfqError: see `calibrate`.
            NonFiniteError: see `calibrate`.
        """
        if x.numel() == 0:
            raise AdfqError("cannot calibrate on an empty tensor")
        if not torch.isfinite(torch.stack(x.aminmax())).all():  # one pass, and no tensor of its size
            raise NonFiniteError("cannot calibrate on values that are not finite (NaN or infinity)")
        x = x.detach().float()
        statistic.update(x if isinstance(statistic, Everything) else self._groups(x), share)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized values of `x`, in its shape and dtype.

        Args:
            x: tensor of the calibrated shape, up to dimensions that share a scale.

        Raises:
            RuntimeError: before calibration.
        """
        if not self.is_calibrated:
            raise RuntimeError(f"{type(self).__name__} is used before it is calibrated")
        if not x.numel():  # it has no minimum
            return x
        return self._quantize(x.float()).to(x.dtype)

    def _groups(self, x: Tensor) -> Tensor:
        """Return a finite float32 tensor as the values that statistics are of, G×n; a single group by default."""
        return x.reshape(1, -1)

    def _search(self) -> Search[None]:
        """Yield the statistics of `_groups` that the buffers need, and set these.

        A quantizer has this function, for calibration in bounded memory, or `_find_range`.
        """
        raise NotImplementedError
        yield

    def _find_range(self, x: Tensor) -> None:
        """Set the buffers from a finite float32 tensor of all inputs."""
        search_at_once(self._search(), self._groups(x))

    def _gather(self) -> Search[None]:
        yield (inputs := Everything())
        self._find_range(torch.cat(inputs.parts))

    @abstractmethod
    def _quantize(self, x: Tensor) -> Tensor:
        """Quantize a float32 tensor."""

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of `x`: uint8, the shape of `x`.

        Args:
            x: values of any floating-point dtype, quantized or not.

        Raises:
            NotImplementedError: for a quantizer without integer codes.
        """
        raise NotImplementedError(f"{type(self).__name__} has no integer codes")

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of codes: float32, the shape of `codes`.

        Args:
            codes: uint8, from `encode`.

        Raises:
            NotImplementedError: for a quantizer without integer codes.
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
        """Return the kind of quantizer and its parameters as one phrase."""
        return f"{type(self).__name__}, {self.bits} bits"

    def extra_repr(self) -> str:
        """Return the constructor's arguments for the module's representation."""
        return f"bits={self.bits}"
