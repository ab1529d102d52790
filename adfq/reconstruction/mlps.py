"""Reconstruction of MLPs with ReLU in the place of GELU, in full precision (APHQ-ViT, arXiv 2504.02508)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn

from adfq.method import Run
from adfq.reconstruction.losses import Loss
from adfq.reconstruction.optimizer import Composition, optimize_units
from adfq.reconstruction.options import OptimizerOptions
from adfq.reconstruction.trained import Weights
from adfq.reconstruction.unit import Batch, Unit, size_index
from adfq.sites import Network
from adfq.transforms.relu import gelu_mlps, linears_of, substitute_relu

Importance = Callable[[Unit], list[Tensor]]

_VALUES = 2**22  # behind GELU, on which a percentile is taken


def reconstruct_mlps(
    network: Network,
    teacher: Network,
    run: Run,
    options: OptimizerOptions,
    rate: float,
    fraction: float,
    importance: Importance | None = None,
) -> None:
    """Put ReLU in the place of GELU, and train each MLP to give the original one's outputs on the original's inputs.

    Args:
        network: network without quantizers, changed in place.
        teacher: a copy of it, which stays as it is.
        run: calibration images, and the folder to resume from; outcomes go to its report.
        options: options of the optimization; 0 iterations leave weights as they are.
        rate: learning rate (Adam, cosine to 0).
        fraction: activations are clipped at this part of the original's values above 0, 0 to 1.
        importance: function from an MLP to the weight of each element's error for each size of images (k×…); None, the
            default, for equal weights.
    """
    names = gelu_mlps(network)
    for name in names:
        substitute_relu(network.model, name)
    if not options.iterations or not names:
        return
    composition = Composition(
        losses=lambda unit: [_ClippedError(unit, teacher, fraction, importance)],
        trained=lambda unit: [Weights(unit, rate, options.iterations)],
        units=lambda _: names,
        mix_probability=0.0,
        keeps_all=True,
        stage="mlps.",
    )
    results = optimize_units(network, run, options, composition, teacher)
    run.report["mlps"] = {name: asdict(result) for name, result in results.items()}


class _ClippedError(Loss):
    """The weighted error of an MLP's output, and twice that with its inner activation clipped from above."""

    def __init__(self, unit: Unit, teacher: Network, fraction: float, importance: Importance | None) -> None:
        super().__init__(unit)
        self.importance = [normalized(found) for found in importance(unit)] if importance else None
        self.bound = self._percentile(teacher.model.get_submodule(unit.name), fraction)
        self.last = linears_of(unit.module)[1]
        self.inner: list[Tensor] = []

    def _percentile(self, original: nn.Module, fraction: float) -> Tensor:
        """Return a percentile of the positive values behind the original's GELU, on a part of many."""
        batches = list(self.unit.batches(torch.arange(len(self.unit.places))))
        found: list[Tensor] = []
        for batch in batches:
            arguments, keywords = batch.examples.arguments(self.unit.rows(batch.examples.inputs, batch.chosen))
            with _input_of(linears_of(original)[1]) as inner:
                original.forward(*arguments, **keywords)
            values = inner.pop().flatten()
            found.append(values[:: -(-values.numel() * len(batches) // _VALUES)])
        return positive_percentile(torch.cat(found), fraction)

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Collect the inner activation; see `Loss.watching`."""
        with _input_of(self.last) as self.inner:
            yield

    def __call__(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the loss of the pass that was watched; see `Loss.__call__`."""
        clipped = self.last(self.inner.pop().clamp(max=self.bound))
        return self.error(output, batch) + 2 * self.error(clipped, batch)

    def error(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the weighted error; see `Loss.error`."""
        shape = (len(batch.chosen), -1)
        output, target = (values.float().unflatten(0, shape) for values in (output, self.unit.targets(batch)))
        importance = self.importance[size_index(self.unit, batch)] if self.importance else output.new_ones(())
        return mlp_error(output, target, importance)


def normalized(importance: Tensor) -> Tensor:
    """Return an importance in parts of its root mean square.

    Args:
        importance: any shape.
    """
    size = importance.square().mean().sqrt()
    return importance / size if size > 0 else torch.ones_like(importance)


def mlp_error(output: Tensor, target: Tensor, importance: Tensor) -> Tensor:
    """Return a tenth of the weighted squared error, summed over tokens, mean over images and channels.

    Args:
        output: B×…×C, tokens between.
        target: its output in full precision.
        importance: …×C, or a number.
    """
    return ((output - target).square() * importance).flatten(1, -2).sum(1).mean() / 10


def positive_percentile(values: Tensor, fraction: float) -> Tensor:
    """Return the smallest value that so large a part of the values above 0 does not exceed; infinity without these.

    Args:
        values: any shape.
        fraction: the part, 0 to 1.
    """
    positive = values[values > 0]
    if not positive.numel():
        return values.new_tensor(torch.inf)
    return positive.kthvalue(math.ceil(fraction * positive.numel())).values


@contextmanager
def _input_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of a layer inside the block."""
    found: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        hook.remove()
