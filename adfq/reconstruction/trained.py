"""Parts of a unit that an optimization trains: roundings, step sizes, weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adfq.layers import QuantMatMul, QuantWeightLayer
from adfq.quantizers import Quantizer, UniformQuantizer
from adfq.quantizers.adaround import AdaRound
from adfq.reconstruction.unit import Unit

_WARM_UP = 0.2  # share of the iterations before rounding is regularized
_BETA = (20.0, 2.0)  # the regularizer's exponent, from and to
_MIN_STEP = 1e-2  # a learned step size never falls below this share of the calibrated one
_MAX_RATE = 1e-2  # nor is its learning rate above this share of it: steps at 8 bits are small


class Trained:
    """A part of a unit that an optimization trains.

    Attributes:
        optimizer: its optimizer.
    """

    optimizer: torch.optim.Optimizer

    def before(self) -> None:
        """Put the present state into the unit, so that gradients reach the parameters."""

    def after(self) -> None:
        """Follow a step of the optimizer: schedules and limits."""

    def penalty(self, progress: float) -> Tensor | None:
        """Return a term of the loss, or None.

        Args:
            progress: share of the iterations that are done, 0 to 1.
        """
        return None

    def settle(self) -> None:
        """Put the present state into the unit as it is without the optimization."""

    def finish(self) -> None:
        """Leave the unit without gradients."""


class Roundings(Trained):
    """Roundings of weights (AdaRound, Nagel et al., 2020), with the regularizer that drives them to a decision.

    Args:
        unit: the unit; weights without a calibrated uniform quantizer are left out.
        rate: learning rate of α (Adam).
        weight: weight of the regularizer.
    """

    def __init__(self, unit: Unit, rate: float, weight: float) -> None:
        self.weight = weight
        self.roundings: list[tuple[QuantWeightLayer, AdaRound]] = [
            (layer, AdaRound(layer.weight, layer.weight_quantizer))
            for layer in unit.layers.values()
            if isinstance(layer.weight_quantizer, UniformQuantizer)
        ]
        if self.roundings:
            self.optimizer = torch.optim.Adam([rounding.alpha for _, rounding in self.roundings], rate, fused=True)

    def __bool__(self) -> bool:
        return bool(self.roundings)

    def before(self) -> None:
        """Put soft roundings into the unit."""
        for layer, rounding in self.roundings:
            layer.learned_weight = rounding.soft().to(layer.weight.dtype)

    def penalty(self, progress: float) -> Tensor | None:
        """Return the regularizer, or None while the optimization warms up."""
        if progress < _WARM_UP:
            return None
        start, end = _BETA
        beta = start + (end - start) * (progress - _WARM_UP) / (1 - _WARM_UP)
        terms = [self.weight * rounding.regularizer(beta) for _, rounding in self.roundings]
        return torch.stack(terms).sum()

    def settle(self) -> None:
        """Put hard roundings into the unit."""
        for layer, rounding in self.roundings:
            layer.learned_weight = rounding.hard().to(layer.weight.dtype)


class Steps(Trained):
    """Step sizes of activations (Esser et al., 2020), by Adam with a cosine schedule to 0.

    Args:
        unit: the unit.
        rate: learning rate, limited to a hundredth of the step size.
        iterations: length of the schedule.
        products: False leaves the operands of matrix products as calibrated; True by default.
        relative: True for a rate in units of each quantizer's mean step size; False by default.
    """

    def __init__(self, unit: Unit, rate: float, iterations: int, products: bool = True, relative: bool = False) -> None:
        self.quantizers = learned_quantizers(unit, products)
        self.steps = [quantizer.scale for quantizer in self.quantizers]
        self.smallest = [_MIN_STEP * step for step in self.steps]
        means = [mean_step(quantizer) for quantizer in self.quantizers]
        rates = [min(rate * mean if relative else rate, _MAX_RATE * mean) for mean in means]
        groups = [{"params": [step], "lr": rate} for step, rate in zip(self.steps, rates, strict=True)]
        if groups:
            self.optimizer = torch.optim.Adam(groups, fused=True)
            self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, iterations)
        for step in self.steps:
            step.requires_grad_(True)

    def __bool__(self) -> bool:
        return bool(self.steps)

    def after(self) -> None:
        """Lower the rate, and keep step sizes away from 0."""
        self.decay.step()
        for step, limit in zip(self.steps, self.smallest, strict=True):
            step.clamp_(min=limit)

    def settle(self) -> None:
        """Leave the unit as it is: step sizes are the quantizers' own."""

    def finish(self) -> None:
        """Take the gradients off the step sizes."""
        for step in self.steps:
            step.requires_grad_(False)


class Weights(Trained):
    """Weights and biases themselves, straight through the rounding, by Adam with a cosine schedule to 0.

    A weight whose quantizer is not calibrated is trained in full precision. Parameters in half precision follow copies
    in float32, which are what is trained.

    Args:
        unit: the unit.
        rate: learning rate.
        iterations: length of the schedule.
        relative: True for a rate in units of the mean step size of each layer's weight; False by default.
    """

    def __init__(self, unit: Unit, rate: float, iterations: int, relative: bool = False) -> None:
        self.layers = list(unit.layers.values())
        self.copies: list[tuple[nn.Parameter, Tensor]] = []
        groups = []
        for name, layer in unit.layers.items():
            own = [(kind, found) for kind in ("weight", "bias") if (found := getattr(layer, kind)) is not None]
            unit.trained.update((f"{name}.{kind}" if name else kind, parameter) for kind, parameter in own)
            quantizer = layer.weight_quantizer
            unit_of_rate = mean_step(quantizer) if relative and isinstance(quantizer, Quantizer) else 1.0
            groups.append({"params": [self._precise(parameter) for _, parameter in own], "lr": rate * unit_of_rate})
        self.parameters = list(unit.trained.values())
        if self.parameters:
            self.optimizer = torch.optim.Adam(groups, rate, fused=True)
            self.optimizer.register_step_pre_hook(self._take_gradients)
            self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, iterations)
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def __bool__(self) -> bool:
        return bool(self.parameters)

    def before(self) -> None:
        """Put quantized weights into the unit."""
        for layer in self.layers:
            quantizer = layer.weight_quantizer
            calibrated = isinstance(quantizer, Quantizer) and quantizer.is_calibrated
            layer.learned_weight = quantizer(layer.weight) if calibrated else layer.weight.view_as(layer.weight)

    def after(self) -> None:
        """Lower the rate, and put what was trained in float32 into the unit."""
        self.decay.step()
        for parameter, precise in self.copies:
            parameter.copy_(precise)

    def _precise(self, parameter: nn.Parameter) -> Tensor:
        """Return what stands for a parameter in the optimization: a copy of one in half precision."""
        # There, Adam divides by squares of gradients that underflow, and steps are less than the weight's last digit.
        if parameter.dtype.itemsize >= 4:
            return parameter
        self.copies.append((parameter, parameter.detach().float()))
        return self.copies[-1][1]

    def _take_gradients(self, *_: Any) -> None:
        for parameter, precise in self.copies:
            precise.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    def settle(self) -> None:
        """Let the quantizers round the weights again."""
        for layer in self.layers:
            layer.learned_weight = None

    def finish(self) -> None:
        """Take the gradients off the parameters."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)


def learned_quantizers(unit: Unit, products: bool = True) -> list[Quantizer]:
    """Return the activation quantizers of a unit whose step sizes can be learned.

    Args:
        unit: the unit.
        products: False for those of layers with a weight alone; True by default.
    """
    modules: list[nn.Module] = [] if products else list(unit.module.modules())
    fixed = [
        operand
        for module in modules
        if isinstance(module, QuantMatMul)
        for operand in (module.left_quantizer, module.right_quantizer)
    ]
    return [quantizer for quantizer in unit.quantizers.values() if not any(quantizer is other for other in fixed)]


def mean_step(quantizer: Quantizer) -> float:
    """Return the mean step size of the groups with a range, or of all without any.

    Args:
        quantizer: calibrated quantizer.
    """
    ranged = quantizer.has_range
    steps = quantizer.scale if ranged.all() or not ranged.any() else quantizer.scale[ranged]
    return steps.mean().item()
