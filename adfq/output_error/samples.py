"""Samples of constant size of what a layer or matrix product reads, drawn evenly over images and tokens."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.errors import AdfqError, NonFiniteError
from adfq.layers import QuantConv2d, QuantMatMul, QuantWeightLayer

# Everything is kept where it is no more than this.
_TOKENS = 4096  # rows of a layer with a weight
_VALUES = 2**24  # values of both operands of a matrix product
_LEFT_ROWS = 256  # rows of one's left operand


@dataclass
class Sample:
    """A sample of an operator's inputs.

    Attributes:
        operator: the layer or matrix product.
        values: tokens (1×1×T×C), or the left and the right operand.
    """

    operator: QuantWeightLayer | QuantMatMul
    values: tuple[Tensor, ...]


class Sampler:
    """A sample of an operator's inputs, which it takes while the network runs.

    A layer's input becomes tokens, 1×1×T×C; a convolution's tokens are the patches that it reads. The operands of a
    matrix product become rows, E×H×M×C and E×H×N×C. Operators that are used several times in a pass have no sample, nor
    have those whose operands are not those of a linear layer, a patch embedding, or attention with heads.

    Args:
        name: name of the operator, for messages.
        operator: a layer or matrix product.
    """

    def __init__(self, name: str, operator: QuantWeightLayer | QuantMatMul) -> None:
        self.name, self.operator = name, operator
        self._fits = True
        self._parts: list[tuple[Tensor, ...]] = []
        self._share, self._uses = 1.0, 0
        self._generator = torch.Generator().manual_seed(0)

    @property
    def sample(self) -> Sample | None:
        """The sample; None if the operator was not used, or cannot be searched.

        Raises:
            AdfqError: for matrices whose size depends on that of the image, and images of several sizes.
        """
        if not self._parts:
            return None
        along = 0 if isinstance(self.operator, QuantMatMul) else 2
        operands = list(zip(*self._parts, strict=True))
        if along == 0 and any(len({part.shape[1:] for part in parts}) > 1 for parts in operands):
            raise AdfqError(f"{self.name}: cannot calibrate on images of several sizes; give images of one size")
        return Sample(self.operator, tuple(torch.cat(parts, along) for parts in operands))

    def begin(self, share: float) -> None:
        """Prepare for a batch.

        Args:
            share: the batch's share of all images.
        """
        self._share, self._uses = share, 0

    @torch.no_grad()
    def observe(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Draw from the inputs of a forward pass, as a forward pre-hook."""
        self._uses += 1
        self._fits &= self._uses == 1
        drawn = self._draw_finite(*inputs) if self._fits else None
        shapes = [tuple(part.shape[1:2] + part.shape[3:]) for part in drawn or ()]
        if drawn is None or any(not part.numel() for part in drawn) or (self._parts and shapes != self._shapes):
            self._fits, self._parts = False, []
            return
        self._shapes = shapes
        self._parts.append(drawn)

    _shapes: list[tuple[int, ...]]

    def _draw_finite(self, *inputs: Tensor) -> tuple[Tensor, ...] | None:
        if any(operand.numel() and not torch.isfinite(torch.stack(operand.aminmax())).all() for operand in inputs):
            raise NonFiniteError(f"{self.name}: cannot calibrate on values that are not finite (NaN or infinity)")
        return self._draw(*inputs)

    def _draw(self, *inputs: Tensor) -> tuple[Tensor, ...] | None:
        """Return the batch's part of the sample; None for inputs that do not fit."""
        if isinstance(self.operator, QuantMatMul):
            return self._draw_matrices(self.operator, *inputs)
        x = _patches(self.operator, inputs[0]) if isinstance(self.operator, QuantConv2d) else inputs[0]
        if x is None or x.dim() < 2:
            return None
        x = x.flatten(0, -2)
        return (x[self._places(len(x), _TOKENS)].float()[None, None],)

    def _draw_matrices(self, product: QuantMatMul, left: Tensor, right: Tensor) -> tuple[Tensor, ...] | None:
        if left.dim() != 4 or left.shape[:2] != right.shape[:2]:
            return None
        right = right if product.transpose_right else right.mT
        rows = min(left.shape[2], _LEFT_ROWS)
        size = left.shape[1] * (rows * left.shape[3] + right.shape[2:].numel())
        chosen = self._places(len(left), max(1, _VALUES // max(1, size)))
        left, right = left[chosen].float(), right[chosen].float()
        if rows < left.shape[2]:
            places = torch.stack([self._places(left.shape[2], rows, 1.0) for _ in chosen]).to(left.device)
            left = left.gather(2, places[:, None, :, None].expand(-1, left.shape[1], -1, left.shape[3]))
        return left, right.contiguous()

    def _places(self, count: int, wanted: int, share: float | None = None) -> Tensor:
        """Return places at distances that are equal but for a random part, so many for all images."""
        wanted = min(count, math.ceil(wanted * (self._share if share is None else share)))
        if wanted == count:
            return torch.arange(count)
        places = (torch.arange(wanted) + torch.rand(wanted, generator=self._generator)) * (count / wanted)
        return places.long().clamp_(max=count - 1)


def _patches(layer: QuantConv2d, x: Tensor) -> Tensor | None:
    """Return the patches that a patch embedding reads, B×T×(C·height·width); None for another convolution."""
    if layer.role != "patch_embed" or layer.groups != 1 or isinstance(layer.padding, str):
        return None
    with suppress(RuntimeError):
        return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
    return None
