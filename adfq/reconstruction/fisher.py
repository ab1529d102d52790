"""Losses that weigh the error of a unit's output by its effect on the network's output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from adfq.errors import NotApplicableError
from adfq.reconstruction.losses import Loss, divergence
from adfq.reconstruction.unit import Batch, Unit, size_index

_ROUNDING = 1e-6  # a spread below this share of the values is that of rounding


def output_divergence(outputs: Any, reference: Any, temperature: float) -> Tensor:
    """Return the divergence of a network's outputs from those of full precision, mean over images.

    It is KL(softmax(reference/τ) ‖ softmax(outputs/τ)) for logits. Other outputs, such as a detector's, count as means
    of Gaussians, each with the variance of its tensor.

    Args:
        outputs: logits B×K, or any nesting of tensors.
        reference: outputs of full precision, of the same shape.
        temperature: τ.
    """
    found, wanted = output_tensors(outputs), output_tensors(reference)
    if are_logits(wanted):
        return divergence(found[0], wanted[0], temperature)
    terms = [
        ((output.float() - target.float()) / spread).square().sum() / (2 * len(target))
        for output, target in zip(found, wanted, strict=True)
        if (spread := output_spread(target)) is not None
    ]
    return torch.stack(terms).sum()


def output_tensors(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors in a network's output.

    Args:
        outputs: any nesting of tensors.
    """
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def check_gradient(outputs: list[Tensor], reference: list[Tensor]) -> None:
    """Raise NotApplicableError unless a network's outputs have a gradient that `output_divergence` can take.

    Args:
        outputs: from `output_tensors`.
        reference: the same in full precision.
    """
    pairs = [(output, target) for output, target in zip(outputs, reference, strict=True) if output.requires_grad]
    if not pairs:
        raise NotApplicableError("the method needs a gradient, and the model's output has none")
    if not are_logits(reference) and all(output_spread(target) is None for _, target in pairs):
        raise NotApplicableError("the method needs a gradient of outputs that vary, and all values of each are equal")


def are_logits(outputs: list[Tensor]) -> bool:
    """Return True for a single output of images × classes.

    Args:
        outputs: from `output_tensors`.
    """
    return len(outputs) == 1 and outputs[0].dim() == 2


def output_spread(output: Tensor) -> Tensor | None:
    """Return the standard deviation of an output, None for one that is constant up to rounding.

    Args:
        output: any shape.
    """
    values = output.detach().float()
    spread = values.std(correction=0)
    return spread if spread > _ROUNDING * values.abs().amax() else None


def fisher_diagonal(unit: Unit, temperature: float, labels: int) -> list[Tensor]:
    """Return the diagonal of the Fisher information at a unit's output in full precision, mean over images.

    For logits it is E_k[(∂ log p_k/∂O)²] with p = softmax(logits/τ). It is the diagonal of the Hessian of the
    divergence at its minimum. The expectation is exact, or over some labels of each image that are drawn from p.
    Other outputs count as in `output_divergence`.

    Args:
        unit: the unit, with the rest of its network.
        temperature: τ.
        labels: number of labels of each image; as many as there are classes, or more, for the exact diagonal.

    Returns:
        The diagonal for each size of images, in the shape of an image's output (k×…).
    """
    assert unit.rest is not None
    totals = [torch.zeros(examples.targets.shape[1:], device=unit.device) for examples in unit.examples]
    for index, batch in unit.rest_batches():
        leaf = unit.targets(batch).float().requires_grad_()
        total = totals[size_index(unit, batch)]
        with torch.enable_grad():
            outputs = output_tensors(unit.rest(index, leaf.to(batch.examples.targets.dtype)))
        check_gradient(outputs, outputs)
        for function, weights in _log_probabilities(outputs, temperature, labels):
            with torch.enable_grad():
                value = function()
            (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
            squared = gradient.square().unflatten(0, (len(batch.chosen), -1))
            total += (squared * weights.reshape(-1, *[1] * (squared.dim() - 1))).sum(0)
    return [total / examples.count for total, examples in zip(totals, unit.examples, strict=True)]


def _log_probabilities(outputs: list[Tensor], temperature: float, labels: int) -> Iterator[tuple[Any, Tensor]]:
    """Yield functions that give log-probabilities, summed over images, and the weight of each image's square."""
    one = torch.ones(1, device=outputs[0].device)
    if not are_logits(outputs):
        for _ in range(labels):
            noise = [(torch.randn_like(output.float()), output_spread(output)) for output in outputs]
            yield (
                lambda noise=noise: torch.stack(
                    [
                        (output.float() * drawn / spread).sum()
                        for output, (drawn, spread) in zip(outputs, noise, strict=True)
                        if spread is not None
                    ]
                ).sum(),
                one / labels,
            )
        return
    probabilities = (outputs[0].detach().float() / temperature).softmax(-1)
    if labels >= probabilities.shape[1]:
        chosen = torch.arange(probabilities.shape[1], device=one.device).expand_as(probabilities)
        weights = probabilities
    else:
        chosen = torch.multinomial(probabilities, labels, replacement=True)
        weights = torch.full_like(chosen, 1 / labels, dtype=torch.float32)
    for label, weight in zip(chosen.unbind(1), weights.unbind(1), strict=True):
        yield (
            lambda label=label: (outputs[0].float() / temperature).log_softmax(-1).gather(1, label[:, None]).sum(),
            weight,
        )


class Normalized(Loss):
    """A loss in parts of its first value.

    Args:
        loss: the loss.
        factor: the first value; 2 by default, as the loss of APHQ-ViT has it.
    """

    def __init__(self, loss: Loss, factor: float = 2.0) -> None:
        super().__init__(loss.unit)
        self.loss, self.factor = loss, factor
        self.first: Tensor | None = None

    def __call__(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the loss; see `Loss.__call__`."""
        value = self.loss(output, batch)
        if self.first is None:
            self.first = value.detach()
        return self.factor * value / self.first.clamp(min=torch.finfo(value.dtype).tiny)

    def error(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the error of the loss itself; see `Loss.error`."""
        return self.loss.error(output, batch)


class WeightedError(Loss):
    """The squared error of a unit's output, each element weighted by its importance, mean over all.

    Args:
        unit: the unit.
        importance: importance for each size of images, in the shape of an image's output (k×…).
    """

    def __init__(self, unit: Unit, importance: list[Tensor]) -> None:
        super().__init__(unit)
        self.importance = importance

    def error(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the weighted error; see `Loss.error`."""
        error = (output.float() - self.unit.targets(batch).float()).square()
        weighted: Tensor = error.unflatten(0, (len(batch.chosen), -1)) * self.importance[size_index(self.unit, batch)]
        return weighted.mean()


class LowRankFisher(Loss):
    """FIMA-Q's loss: a Fisher information that is a diagonal plus a matrix of low rank (arXiv 2506.11543).

    Its k pairs are a gradient of the divergence at the unit's quantized output and the error there, both as mean
    magnitudes over images. They are taken at k times during the optimization. For the magnitude δ of an error, G and D
    the pairs' gradients and errors (k×n), the terms are ℓ₁ = mean δGᵀ(DDᵀ)⁻¹Gδᵀ and ℓ₂ = mean δ²Ḡ. Each is in parts of
    its value after the latest pair.

    Args:
        unit: the unit, with the rest of its network, and images of one size.
        rank: number of pairs k.
        temperature: temperature of the divergence.
        damping: share of the mean of its diagonal that is added to DDᵀ's, which is nearly singular; 1e-6 by default.
    """

    def __init__(self, unit: Unit, rank: int, temperature: float, damping: float = 1e-6) -> None:
        super().__init__(unit)
        self.rank, self.temperature, self.damping = rank, temperature, damping
        self.gradients = self.errors = torch.empty(0)
        self.inverse = torch.empty(0)
        self.first: tuple[Tensor, Tensor] | None = None

    def update(self, progress: float) -> None:
        """Take a pair when it is due; see `Loss.update`."""
        if len(self.gradients) < min(self.rank, int(progress * self.rank) + 1):
            self.add(*self.pair())

    @torch.no_grad()
    def pair(self) -> tuple[Tensor, Tensor]:
        """Return the gradient and the error of the unit as it is, with all other units in full precision, n each."""
        unit = self.unit
        assert unit.rest is not None
        gradients = errors = torch.zeros((), device=unit.device)
        for index, batch in unit.rest_batches():
            images, targets = len(batch.chosen), unit.targets(batch)
            output = unit.forward(batch, batch.examples.inputs).detach()
            reference = unit.rest(index, targets)
            with torch.enable_grad():
                leaf = output.float().requires_grad_()
                outputs = unit.rest(index, leaf.to(output.dtype))
                check_gradient(output_tensors(outputs), output_tensors(reference))
                loss = images * output_divergence(outputs, reference, self.temperature)
            (gradient,) = torch.autograd.grad(loss, leaf)
            gradients = gradients + gradient.abs().reshape(images, -1).sum(0)
            errors = errors + (output.float() - targets.float()).abs().reshape(images, -1).sum(0)
        return gradients / len(unit.places), errors / len(unit.places)

    def add(self, gradient: Tensor, error: Tensor) -> None:
        """Add a pair, and count from here what the first values are.

        Args:
            gradient: mean magnitude of the gradient, n.
            error: mean magnitude of the error, n.
        """
        self.gradients = torch.cat([self.gradients.to(gradient).reshape(-1, len(gradient)), gradient[None]])
        self.errors = torch.cat([self.errors.to(error).reshape(-1, len(error)), error[None]])
        products = self.errors.double() @ self.errors.double().T
        added = self.damping * products.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        inverse = torch.linalg.pinv(products + added * torch.eye(len(products), device=products.device), hermitian=True)
        self.inverse, self.first = inverse.float(), None

    def terms(self, error: Tensor) -> tuple[Tensor, Tensor]:
        """Return ℓ₁ and ℓ₂.

        Args:
            error: magnitudes of the error, B×n.
        """
        along = error @ self.gradients.T
        return (along @ self.inverse * along).sum(1).mean(), (error.square() * self.gradients.mean(0)).mean()

    def __call__(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the loss; see `Loss.__call__`."""
        error = (output.float() - self.unit.targets(batch).float()).abs().reshape(len(batch.chosen), -1)
        terms = self.terms(error)
        if self.first is None:
            self.first = terms[0].detach(), terms[1].detach()
        tiny = torch.finfo(error.dtype).tiny
        return terms[0] / self.first[0].clamp(min=tiny) + terms[1] / self.first[1].clamp(min=tiny)
