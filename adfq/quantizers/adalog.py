"""Adaptive logarithmic quantization (AdaLog, arXiv 2407.12951)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adfq.errors import AdfqError
from adfq.parts import in_parts
from adfq.quantizers.base import Quantizer
from adfq.statistics import Errors, MinMax, Search

#: Denominator of the exponent of the base, 2^(q/37).
RESOLUTION = 37

#: Bases that are searched: numerators of the exponent.
BASES = range(10, 138)

SMALLEST = 1e-15  # ratio to the scale; smaller values count as this one


class _Adaptive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, values: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, values, inside)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, values, inside = ctx.saved_tensors
        to_x = to_scale = None
        if ctx.needs_input_grad[0]:
            to_x = torch.where(inside, gradients[0] * values / torch.where(inside, x, 1), 0)
        if ctx.needs_input_grad[1]:
            to_scale = (gradients[0] * (x > scale)).sum_to_size(scale.shape)
        return to_x, to_scale, None, None


class AdaLogQuantizer(Quantizer):
    """Logarithmic quantizer of base 2^(q/37) with a whole number q: c = round(-log2(x/scale)·37/q), 0 for c ≥ 2^bits.

    Level c is scale·2^-⌊cq/37⌋·T, with T = 2^-((cq mod 37)/37) rounded to 1/(2^(bits+1) - 2), so that hardware needs a
    shift and a small multiplication. With a shift, x + shift is quantized, and the shift subtracted again.

    The gradient with respect to x is x̂/x in the range and 0 outside, where x̂ and x are shifted. That with respect to
    the scale is 1 for values above the scale and 0 for others.

    `calibrate` takes the largest value as scale, and of the bases with q from 10 to 137 the one with the smallest mean
    squared error.

    Args:
        bits: bit-width, 2 to 8.
        shift: added to values before they are quantized: 0, the default, or the depth of GELU's negative lobe.
        folded: True returns x̂ without subtracting the shift again, for a layer whose bias does that
            (`adfq.transforms.shift`); False by default.

    Attributes:
        scale: float32 scalar, the highest level.
        q: int64 scalar, 37 times the binary logarithm of the base.
        training_form: True for exact powers of the base instead of T, as in AdaLog's reconstruction; False by default.

    Raises:
        AdfqError: for another bit-width, and in calibration for values below -shift.
    """

    q: Tensor

    def __init__(self, bits: int, shift: float = 0.0, folded: bool = False) -> None:
        super().__init__(bits)
        self.shift, self.folded = shift, folded
        self.training_form = False
        self.register_buffer("q", torch.empty(0, dtype=torch.long))

    def _search(self) -> Search[None]:
        yield (extremes := MinMax())
        if float(extremes.lowest) < -1.01 * self.shift:  # in half precision, GELU's own values lie a little lower
            raise AdfqError(f"an adaptive logarithmic quantizer takes no values below {-self.shift:.4g}")
        largest = extremes.highest[0] + self.shift
        scale = torch.where(largest > 0, largest, torch.ones_like(largest))
        bases = torch.tensor(BASES, device=scale.device)
        yield (errors := Errors([partial(self._try, scale, q) for q in bases], prepare=lambda x: x + self.shift))
        self.scale, self.q = scale, bases[errors.result()[:, 0].argmin()]

    def _try(self, scale: Tensor, q: Tensor, x: Tensor, _: slice) -> Tensor:
        return self._round(x, torch.empty_like(x), scale, self.level_table(q))

    def level_table(self, q: Tensor, training_form: bool = False) -> tuple[Tensor, Tensor]:
        """Return the levels of codes 0 to 2^bits, in parts of the scale, and the number of codes in an octave.

        Args:
            q: 37 times the binary logarithm of each base, any shape; int64.
            training_form: True for exact powers; False by default.

        Returns:
            Levels (… × (2^bits + 1), the last of them 0) and 37/q, both float32.
        """
        products = q[..., None] * torch.arange(self.levels, device=q.device)
        if training_form:
            levels = torch.exp2(-products / RESOLUTION)
        else:
            steps = 2 * self.levels - 2
            fractions = torch.exp2(-torch.arange(RESOLUTION, device=q.device) / RESOLUTION)
            table = (fractions * steps).round() / steps
            levels = torch.exp2(-(products // RESOLUTION).float()) * table[products % RESOLUTION]
        return nn.functional.pad(levels, (0, 1)), RESOLUTION / q.float()

    def _round(self, x: Tensor, out: Tensor, scale: Tensor, levels: tuple[Tensor, Tensor]) -> Tensor:
        table, per_octave = levels
        codes = self._codes(x, out, scale, per_octave)
        return torch.mul(table[codes], scale, out=out)

    def _codes(self, x: Tensor, out: Tensor, scale: Tensor, per_octave: Tensor) -> Tensor:
        """Return the codes of shifted values, 2^bits for 0: int64.

        Args:
            x: shifted values.
            out: the shape of `x`; overwritten.
            scale: the highest level.
            per_octave: 37/q.
        """
        torch.div(x, scale, out=out).clamp_(SMALLEST, 1).log2_().neg_().mul_(per_octave).round_()
        return out.clamp_(max=self.levels).long()

    def _quantize(self, x: Tensor) -> Tensor:
        shifted = x + self.shift if self.shift else x
        levels = self.level_table(self.q, self.training_form)
        with torch.no_grad():
            values = in_parts(lambda part, out: self._round(part, out, self.scale, levels), shifted)
        if torch.is_grad_enabled():
            inside = (shifted > 0) & (shifted <= self.scale) & (values > 0)
            values = _Adaptive.apply(shifted, self.scale, values, inside)
        return values if self.folded or not self.shift else values - self.shift

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of `x`: uint8, the shape of `x`; 2^bits stands for 0.

        Args:
            x: values before quantization, of any floating-point dtype, without the shift.

        Raises:
            NotImplementedError: at 8 bits, whose 257 codes are more than uint8 has.
        """
        if self.bits > 7:
            raise NotImplementedError("adaptive logarithmic codes of 8 bits do not fit uint8")
        shifted = x.float() + self.shift
        codes = self._codes(shifted, torch.empty_like(shifted), self.scale, RESOLUTION / self.q.float())
        return codes.to(torch.uint8)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of codes, bit for bit the result of `forward`: float32, the shape of `codes`.

        Args:
            codes: uint8, from `encode`.
        """
        values = self.level_table(self.q)[0][codes.long()] * self.scale
        return values if self.folded or not self.shift else values - self.shift

    def describe(self) -> str:
        """Return the kind of quantizer and its parameters as one phrase."""
        base = f"base 2^({int(self.q)}/{RESOLUTION})" if self.is_calibrated else "base not yet found"
        return f"adaptive logarithmic, {self.bits} bits, {base}{', shifted' if self.shift else ''}"

    def extra_repr(self) -> str:
        """Return the constructor's arguments for the module's representation."""
        return f"{super().extra_repr()}, shift={self.shift:.4g}, folded={self.folded}"
