"""The loss of GLF-Q: the error of the network's feature, through the full-precision rest, beside the unit's own."""

from __future__ import annotations

import torch
from torch import Tensor

from adfq.errors import NotApplicableError
from adfq.reconstruction.losses import Loss
from adfq.reconstruction.unit import Batch, Unit, size_index

_LEAST = 1e-12  # first values are at least this


class SuffixFeature(Loss):
    """G/G₁ + λ·Λ/Λ₁, with the mean squared errors G of the feature and Λ of the unit's output (arXiv 2609.34564).

    The feature is that before the classifier: the unit's quantized output goes through the rest of the network in full
    precision. G₁ and Λ₁ are the values on the first images, those of the calibrated unit. A unit without a feature
    (`adfq.reconstruction.Unit.feature`) has λ·Λ/Λ₁ alone: a unit inside a block, or in a detector.

    Args:
        unit: the unit.
        weight: λ.

    Attributes:
        features: features in full precision for each size of images (B×…), on the host; empty without any.
    """

    def __init__(self, unit: Unit, weight: float) -> None:
        super().__init__(unit)
        self.weight = weight
        self.first: list[Tensor] = []
        self.features = self._features()

    @torch.no_grad()
    def _features(self) -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0) for _ in self.unit.examples]
        for batch in self.unit.batches(torch.arange(len(self.unit.places))):
            feature = self.unit.feature(batch, self.unit.targets(batch))
            if feature is None:
                return []
            index = size_index(self.unit, batch)
            if not found[index].numel():
                found[index] = torch.empty(batch.examples.count, *feature.shape[1:], dtype=feature.dtype)
            found[index][batch.chosen] = feature.to(found[index].device)
        return found

    def terms(self, output: Tensor, batch: Batch) -> list[Tensor]:
        """Return Λ, and G if there is a feature.

        Args:
            output: the unit's output.
            batch: the images that it is of.
        """
        target = self.unit.targets(batch)
        terms = [(output.float() - target.float()).square().mean()]
        if self.features:
            feature = self.unit.feature(batch, output.to(target.dtype))
            assert feature is not None
            if output.requires_grad and not feature.requires_grad:
                raise NotApplicableError("the method needs a gradient, and the model's output has none")
            wanted = self.features[size_index(self.unit, batch)][batch.chosen].to(feature.device)
            terms.append((feature.float() - wanted.float()).square().mean())
        return terms

    def error(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the loss; see `Loss.error`."""
        terms = self.terms(output, batch)
        if not self.first:
            self.first = [term.detach().clamp(min=_LEAST) for term in terms]
        local, *feature = (term / first for term, first in zip(terms, self.first, strict=True))
        return sum(feature, start=self.weight * local)
