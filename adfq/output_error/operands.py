"""The two operands of a layer or matrix product, with the quantizers that are being searched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adfq.output_error.grids import between
from adfq.output_error.scores import LowRankScore, OutputScore, Score, SelfScore, Shape, groups_of
from adfq.quantizers import AdaLogQuantizer
from adfq.quantizers.adalog import BASES

# Sizes of samples, in values. Every candidate is tried on the coarse sample and the best on the fine one. Operands up
# to the exact size are not sampled. A group has at least an eighth.
_EXACT = 2**16
_COARSE = 2**14
_FINE = 2**17

_ENTRIES = 8  # images or windows in a coarse sample
_FINE_ENTRIES = 128  # in a fine one
_OTHERS = 96  # rows of the other operand in a coarse sample
_EXACT_PRODUCT = 2**22  # multiplications for a candidate; weights with more are tried by a score of low rank first
_RANK = 32

_SMALLEST = 1e-15


@dataclass(frozen=True)
class Scores:
    """A score for all candidates, and one for the best of these.

    Attributes:
        coarse: score on a small sample, or an approximate one.
        fine: score on a large sample; the same object where there is no need for two.
    """

    coarse: Score
    fine: Score


class Operand:
    """An operand in full precision, and its present quantized values.

    Args:
        values: E×H×n×C.
        shape: shape of the groups that share a scale (`adfq.output_error.scores`).
        levels: number of codes, 2^bits.
        least: least scale.

    Attributes:
        quantized: present quantized values, the shape of `values`; full precision before there are any.
        scale: present scale, G; empty before there is one.
        zero_point: present zero point, G.
        present: present candidate, G×2; None before there is one.
    """

    def __init__(self, values: Tensor, shape: Shape, levels: int, least: float = 0.0) -> None:
        self.values, self.shape, self.levels, self.least = values, tuple(shape), levels, least
        self.quantized = values
        self.scale = self.zero_point = values.new_empty(0)
        self.present: Tensor | None = None

    @property
    def is_by_row(self) -> bool:
        """True if each row is a group, as in a weight."""
        return self.shape[2] > 1

    @property
    def groups(self) -> Tensor:
        """The values as G×n."""
        return groups_of(self.values, self.shape)

    def prepare(self, values: Tensor) -> Tensor:
        """Return values in the form that `quantize` takes.

        Args:
            values: the operand's values, or a sample of them, E×H×n×C.
        """
        return values

    def quantize(self, values: Tensor, candidates: Tensor) -> Tensor:
        """Return values quantized with each of some candidates, E×H×K×n×C in a new tensor.

        Args:
            values: from `prepare`.
            candidates: scale and zero point of each group, K×G×2.
        """
        scale, zero_point = (part.reshape(-1, *self.shape).movedim(0, 2) for part in candidates.unbind(-1))
        steps = torch.div(values[:, :, None], scale).round_()
        # Two passes fewer than codes, and half the time of clamp with tensors.
        torch.minimum(steps, self.levels - 1 - zero_point, out=steps)
        return torch.maximum(steps, -zero_point, out=steps).mul_(scale)

    def set(self, candidate: Tensor) -> None:
        """Set scale and zero point, and quantize the values.

        Args:
            candidate: scale and zero point of each group, G×2.
        """
        self.present = candidate
        self.scale, self.zero_point = candidate.unbind(-1)
        self.quantized = self.quantize(self.values, candidate[None])[:, :, 0]


class EndsOperand(Operand):
    """A uniform operand whose candidates are the lower and upper ends of ranges, G×2; see `Operand`."""

    def quantize(self, values: Tensor, candidates: Tensor) -> Tensor:
        """Return quantized values, see `Operand.quantize`."""
        return super().quantize(values, between(candidates, self.levels))

    def set(self, candidate: Tensor) -> None:
        """Set the ends, see `Operand.set`."""
        super().set(candidate)
        self.scale, self.zero_point = between(candidate, self.levels).unbind(-1)


class LogOperand(Operand):
    """An operand that an `AdaLogQuantizer` quantizes; its candidates are scale and q, 1×2.

    Args:
        values: E×H×n×C.
        quantizer: the quantizer, which is set too.
    """

    def __init__(self, values: Tensor, quantizer: AdaLogQuantizer) -> None:
        super().__init__(values, (1, 1, 1, 1), quantizer.levels)
        self.quantizer = quantizer
        self._tables, self._per_octave = quantizer.level_table(torch.tensor(BASES, device=values.device))

    def prepare(self, values: Tensor) -> Tensor:
        """Return the logarithms of shifted values, see `Operand.prepare`."""
        return (values + self.quantizer.shift).clamp_(min=_SMALLEST).log2_()

    def quantize(self, values: Tensor, candidates: Tensor) -> Tensor:
        """Return quantized values, see `Operand.quantize`."""
        scale, q = candidates.unbind(-1)
        bases = q[:, 0].long() - BASES[0]
        codes = (scale.log2()[..., None] - values[:, :, None]).mul_(self._per_octave[bases, None, None]).round_()
        firsts = (self.levels + 1) * torch.arange(len(q), device=q.device)
        codes = codes.clamp_(0, self.levels).add_(firsts[:, None, None]).int()
        levels = self._tables[bases] * scale - self.quantizer.shift
        return levels.flatten().index_select(0, codes.flatten()).reshape(codes.shape)

    def set(self, candidate: Tensor) -> None:
        """Set scale and base, see `Operand.set`."""
        self.present = candidate
        self.quantizer.scale, self.quantizer.q = candidate[0, 0].clone(), candidate[0, 1].long()
        self.quantized = self.quantizer(self.values)


def self_scores(operand: Operand) -> Scores:
    """Return the scores of an operand by its own error.

    Args:
        operand: the operand that is searched.
    """
    if operand.is_by_row or operand.values.numel() <= _EXACT:
        score = SelfScore(operand.values, operand.shape)
        return Scores(score, score)
    coarse, fine = (
        SelfScore(_thin(operand.values, *_sizes(operand, size, most)), operand.shape)
        for size, most in ((_COARSE, _ENTRIES), (_FINE, _FINE_ENTRIES))
    )
    return Scores(coarse, fine)


def output_scores(operand: Operand, other: Operand) -> Scores:
    """Return the scores of an operand by the error of its product with the other one as that is quantized now.

    Args:
        operand: the operand that is searched, E×H×n×C.
        other: the other operand, E×H×m×C.
    """
    if operand.is_by_row or operand.values.numel() <= _EXACT:
        fine = OutputScore(operand.values, operand.shape, other.values, other.quantized)
        if not fine.squared and operand.values.numel() * operand.values.shape[-1] > _EXACT_PRODUCT:
            return Scores(LowRankScore(fine, _RANK), fine)
        return Scores(fine, fine)
    scores = []
    for size, most, others in ((_COARSE, _ENTRIES, _OTHERS), (_FINE, _FINE_ENTRIES, None)):
        entries, rows = _sizes(operand, size, most)
        pair = (_thin(values, entries, others) for values in (other.values, other.quantized))
        scores.append(OutputScore(_thin(operand.values, entries, rows), operand.shape, *pair))
    return Scores(*scores)


def _sizes(operand: Operand, size: int, most: int) -> tuple[int, int]:
    """Return the number of entries, up to some, and of rows in a sample of so many values."""
    entries, heads, _, channels = operand.values.shape
    entries = min(entries, most)
    groups = operand.shape[1]
    return entries, max(1, max(size, groups * size // 8) // (entries * heads * channels))


def _thin(values: Tensor, entries: int, rows: int | None) -> Tensor:
    """Return entries and rows at equal distances; None for all rows."""
    values = values[_places(len(values), entries, values.device)] if entries < len(values) else values
    if rows is None or rows >= values.shape[2]:
        return values
    return values[:, :, _places(values.shape[2], rows, values.device)]


def _places(count: int, wanted: int, device: torch.device) -> Tensor:
    """Return places at distances that are equal but for a random part, the same in each call."""
    generator = torch.Generator().manual_seed(count)
    places = (torch.arange(wanted) + torch.rand(wanted, generator=generator)) * (count / wanted)
    return places.long().clamp_(max=count - 1).to(device)
