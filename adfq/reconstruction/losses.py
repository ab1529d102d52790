"""Losses of a unit's reconstruction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from adfq.calibration.walk import Enough
from adfq.reconstruction.unit import Batch, Unit
from adfq.sites import full_precision


class Loss:
    """The squared error of a unit's output, summed over tokens, mean over the rest; subclasses have others.

    Tokens are the positions of an image; channels in the output of a convolution.

    Args:
        unit: the unit.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def update(self, progress: float) -> None:
        """Prepare for an iteration, for which the unit has its present state.

        Args:
            progress: share of the iterations that are done, 0 to 1.
        """

    def watching(self, batch: Batch) -> AbstractContextManager[None]:
        """Return a context around the unit's forward pass.

        Args:
            batch: images of the pass.
        """
        return nullcontext()

    def __call__(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the loss.

        Args:
            output: the unit's output.
            batch: the images that it is of.
        """
        return self.error(output, batch)

    def error(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the reconstruction error, which decides on the better of two states.

        Args:
            output: the unit's output.
            batch: the images that it is of.
        """
        error = (output.float() - self.unit.targets(batch).float()).square()
        if error.dim() > 3 and not self.unit.channels_first:
            error = error.flatten(1, -2)
        return error.sum(1).mean()


class Divergence(Loss):
    """KL(softmax(full precision) ‖ softmax(quantized)) of a classifier's logits, mean over images."""

    def error(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the divergence; see `Loss.error`."""
        return divergence(output, self.unit.targets(batch))


def divergence(output: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(softmax(target/τ) ‖ softmax(output/τ)), mean over images.

    Args:
        output: logits, B×K.
        target: logits of full precision, B×K.
        temperature: τ; 1 by default.
    """
    found, wanted = ((logits.float() / temperature).log_softmax(-1) for logits in (output, target))
    return nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)


class AttentionScores(Loss):
    """KL(full precision ‖ quantized) of a unit's attention scores but for a constant (ADFQ-ViT, equation of AMO).

    It is summed over queries, mean over heads and rows.

    Args:
        unit: the unit; every nn.Softmax in it marks scores.
        weight: factor.
        temperature: temperature of both distributions.
        released: True for the released code's form: KL(quantized ‖ full precision) of a softmax over heads of
            probabilities, mean over rows.
    """

    def __init__(self, unit: Unit, weight: float, temperature: float, released: bool = False) -> None:
        super().__init__(unit)
        self.weight, self.temperature, self.released = weight, temperature, released
        softmaxes = [module for module in unit.module.modules() if isinstance(module, nn.Softmax)]
        self.softmaxes = softmaxes if weight else []

    @contextmanager
    def scores(self, alone: bool = False) -> Iterator[list[Tensor]]:
        """Collect the input of every softmax of the unit inside the block.

        Args:
            alone: True ends the pass after the last one; False by default.
        """
        found: list[Tensor] = []

        def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])
            if alone and len(found) == len(self.softmaxes):
                raise Enough

        hooks = [softmax.register_forward_pre_hook(collect) for softmax in self.softmaxes]
        try:
            yield found
        except Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def target_scores(self, batch: Batch) -> list[Tensor]:
        """Return the distributions of attention in full precision, which memory has no room for of all images.

        Args:
            batch: the images.
        """
        if not self.softmaxes:
            return []
        with full_precision(self.unit.sites), self.scores(alone=True) as found:
            self.unit.forward(batch, batch.examples.inputs)
        return [self.distribution(score) for score in found]

    def distribution(self, scores: Tensor) -> Tensor:
        """Return scores as distributions.

        Args:
            scores: B×heads×queries×keys.
        """
        if self.released:
            return (scores.float().softmax(-1) / self.temperature).softmax(1)
        return (scores.float() / self.temperature).softmax(-1)

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Collect attention scores; see `Loss.watching`."""
        self.wanted = self.target_scores(batch)
        with self.scores() as self.found:
            yield

    def __call__(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the divergence of the scores of the pass that was watched; see `Loss.__call__`."""
        total = output.new_zeros((), dtype=torch.float32)
        for score, target in zip(self.found, self.wanted, strict=True):
            total = total + self.weight * self.divergence(score, target)
        return total

    def divergence(self, scores: Tensor, target: Tensor) -> Tensor:
        """Return the divergence of one softmax.

        Args:
            scores: input of the softmax, B×heads×queries×keys.
            target: from `target_scores`.
        """
        if self.released:
            logarithm = (scores.float().softmax(-1) / self.temperature).log_softmax(1)
            return (logarithm.exp() * (logarithm - target.log())).sum() / len(scores)
        logarithm = (scores.float() / self.temperature).log_softmax(-1)
        return -(target * logarithm).sum() / math.prod(scores.shape[:2])
