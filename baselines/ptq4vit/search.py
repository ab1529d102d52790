"""PTQ4ViT's search for the scales of a layer's two operands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from adfq.quantizers import Quantizer, TwinSoftmaxQuantizer, UniformQuantizer
from adfq.quantizers.twin import SPLITS

FACTORS = tuple(0.01 + 0.0119 * i for i in range(100))  # candidate scales, in parts of the one that holds every value

_SHORTLIST = 8


class Operand:
    """Side of a product, with its quantizer and the candidates for its scale.

    Args:
        values: operand in the shape that the quantizer meets.
        quantizer: a `Quantizer`, which gets the scale that holds every value, or nn.Identity.
        largest: largest absolute value of each group of rows that shares a scale, G.
        as_rows: function from `values` to P×rows×inner; None, the default, for values in that shape.

    Attributes:
        candidates: candidates for the scale, C×G.
    """

    def __init__(
        self,
        values: Tensor,
        quantizer: nn.Module,
        largest: Tensor,
        as_rows: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.values, self.quantizer, self.as_rows = values, quantizer, as_rows or (lambda values: values)
        whole, factors = torch.where(largest > 0, largest, 1.0), FACTORS
        if isinstance(quantizer, TwinSoftmaxQuantizer):
            whole, factors = torch.full_like(largest, 1 / quantizer.steps), SPLITS
        elif isinstance(quantizer, Quantizer):
            whole = whole / (quantizer.levels / 2 - 0.5)
        self.candidates = torch.tensor(factors, device=whole.device)[:, None] * whole
        self.set_scale(whole)

    def set_scale(self, scale: Tensor) -> None:
        """Set the quantizer's scale for each group.

        Args:
            scale: G.
        """
        if not isinstance(self.quantizer, Quantizer):
            return
        if len(scale) == 1:
            scale = scale[0]
        else:
            rows = len(self.values)
            scale = scale.repeat_interleave(rows // len(scale)).reshape(rows, *[1] * (self.values.dim() - 1))
        self.quantizer.scale = scale
        if isinstance(self.quantizer, UniformQuantizer):
            self.quantizer.zero_point = torch.full_like(scale, self.quantizer.levels // 2)

    def rows(self, quantized: bool) -> Tensor:
        """Return the operand as P×rows×inner.

        Args:
            quantized: True for quantized values, False for full precision.
        """
        return self.as_rows(self.quantizer(self.values) if quantized else self.values)


class Product:
    """Product left @ rightᵀ in full precision, the reference of the two quantized operands.

    Args:
        left: P×M×inner as rows.
        right: P×N×inner as rows.
        gradient: factors of the errors before they are squared, P×M×N.
    """

    def __init__(self, left: Operand, right: Operand, gradient: Tensor) -> None:
        self.operands = (left, right)
        self.target = left.rows(quantized=False) @ right.rows(quantized=False).mT
        largest = gradient.abs().max()
        self.gradient = gradient / largest if largest > 0 else torch.ones_like(gradient)

    def scores(self, index: int, candidates: Tensor) -> Tensor:
        """Return sums of weighted squared errors, C×G, for C×G scales of one operand.

        The product is linear in that operand: the other is quantized once, and a candidate costs one matrix product.

        Args:
            index: 0 for the left operand, 1 for the right one.
            candidates: scales, C×G.
        """
        searched = self.operands[index]
        quantized = [operand.rows(quantized=True) for operand in self.operands]
        scores = []
        for scale in candidates:
            searched.set_scale(scale)
            quantized[index] = searched.rows(quantized=True)
            error = torch.baddbmm(self.target, quantized[0], quantized[1].mT, alpha=-1).mul_(self.gradient)
            # Groups are of rows of a weight, which is the left operand; else there is one.
            scores.append(error.square_().sum((0, 2)).reshape(len(scale), -1).sum(1))
        return torch.stack(scores)


@torch.no_grad()
def search_scales(coarse: Product, fine: Product, rounds: int) -> None:
    """Set the scales of a layer's quantizers, the left one's first, to the candidates with the smallest errors.

    Args:
        coarse: small sample of the layer's product.
        fine: large sample of it, with the same quantizers.
        rounds: number of searches of both operands, in turn.
    """
    searched = [index for index in (0, 1) if isinstance(fine.operands[index].quantizer, Quantizer)]
    chosen: list[Tensor] = []
    for _ in range(rounds if len(searched) > 1 else 1):
        before, chosen = chosen, []
        for index in searched:
            operand = fine.operands[index]
            best = coarse.scores(index, operand.candidates).topk(_SHORTLIST, dim=0, largest=False).indices
            shortlist = operand.candidates.gather(0, best)
            best = fine.scores(index, shortlist).argmin(0, keepdim=True)
            chosen.append(shortlist.gather(0, best)[0])
            operand.set_scale(chosen[-1])
        if before and all(map(torch.equal, before, chosen)):  # as would be all further rounds
            break
