"""APHQ-ViT (CVPR 2025, arXiv 2504.02508): ReLU in MLPs, blocks reconstructed under an importance of each element."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from adfq.bits import Bits
from adfq.errors import AdfqError
from adfq.method import Run
from adfq.output_error import APHQ, Settings, calibrate_by_output_error
from adfq.reconstruction import (
    Batch,
    Composition,
    Divergence,
    Loss,
    OptimizerOptions,
    RoundingMethod,
    Unit,
    Weights,
    optimize_units,
    roundings_and_steps,
)
from adfq.reconstruction.fisher import Normalized, WeightedError, fisher_diagonal
from adfq.reconstruction.unit import size_index
from adfq.sites import Network, Recipe
from adfq.transforms.relu import gelu_mlps, linears_of, substitute_relu

_TEMPERATURE = 20.0
_VALUES = 2**22  # behind GELU, on which a percentile is taken


@dataclass(frozen=True)
class APHQViT(RoundingMethod):
    """APHQ-ViT: MLP reconstruction with ReLU, calibration by output errors, block reconstruction by importance.

    MLPs of two linear layers get ReLU in the place of GELU, and are trained in full precision to give the original
    one's outputs, also where the activation is clipped (section "MLP reconstruction"). Uniform quantizers, per head in
    matrix products, are searched for each layer's output. Blocks are reconstructed with an error that is weighted by
    each element's importance, mixed inputs and dropped quantization. With 0 iterations of blocks the model is
    calibrated alone, and keeps GELU.

    The importance is the diagonal of the Fisher information, which the paper's average perturbation Hessian stands for.
    The released code adds the same ε to all channels, which LayerNorm takes out again: its importance is rounding
    noise, and is not reproduced.

    Attributes:
        relu: False keeps GELU.
        mlp_iterations: iterations of each MLP's reconstruction.
        mlp_learning_rate: its learning rate (Adam, cosine to 0).
        labels: labels drawn of each image for the importance; as many as there are classes, or more, give it exactly.
        power: exponent of the importance; 1, or ½ for what the released noise amounts to.
        released_grid: True for the released code's candidates above 4 bits.

    Raises:
        AdfqError: for a value out of range.
    """

    label = "APHQ-ViT"
    paper = "arXiv 2504.02508"
    calibration_size = 1024

    relu: bool = True
    mlp_iterations: int = 20000
    mlp_learning_rate: float = 4e-5
    labels: int = 4
    power: float = 1.0
    released_grid: bool = False
    iterations: int = 20000
    drop_probability: float = 0.5
    rounding_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels < 1 or self.mlp_iterations < 0 or not self.power > 0:
            raise AdfqError("labels must be at least 1, mlp_iterations at least 0, power above 0")

    @property
    def trains(self) -> str:
        """Weights of MLPs beside roundings and step sizes; see `adfq.method.Method.trains`."""
        mlps = "weights of MLPs" if self.relu and self.mlp_iterations and self.iterations else ""
        return ", ".join(filter(None, (mlps, super().trains)))

    @property
    def trained_iterations(self) -> int:
        """Iterations of an MLP and of its block together."""
        return self.iterations + (self.mlp_iterations if self.relu and self.iterations else 0)

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        return self._settings().recipe(bits)

    def _settings(self) -> Settings:
        return replace(APHQ, released_grid=self.released_grid)

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        teacher = copy.deepcopy(network)
        if self.relu and self.iterations:
            reconstruct_mlps(network, teacher, run, bits, self)
        calibrate_by_output_error(network, run, bits, self._settings())
        if self.iterations:
            composition = Composition(
                losses=self._losses,
                trained=roundings_and_steps(self),
                mix_probability=self.mix_probability,
                drop_probability=self.drop_probability,
            )
            results = optimize_units(network, run, self, composition, teacher)
            run.report["modules"] = {name: asdict(result) for name, result in results.items()}

    def _losses(self, unit: Unit) -> Sequence[Loss]:
        if unit.is_head:
            return [Normalized(Divergence(unit))]
        importance = [found.pow(self.power) for found in fisher_diagonal(unit, _TEMPERATURE, self.labels)]
        return [Normalized(WeightedError(unit, importance))]


def reconstruct_mlps(network: Network, teacher: Network, run: Run, bits: Bits, options: APHQViT) -> None:
    """Put ReLU in the place of GELU, and train each MLP to give the original one's outputs on the original's inputs.

    Args:
        network: network without quantizers, changed in place.
        teacher: a copy of it, which stays as it is.
        run: calibration images, and the folder to resume from.
        bits: bit-widths; at 3 bits and below activations are clipped at the 99th percentile of the values above 0, else
            at the 98th.
        options: iterations, learning rate, batch size, labels.
    """
    names = gelu_mlps(network)
    for name in names:
        substitute_relu(network.model, name)
    if not options.mlp_iterations or not names:
        return
    fraction = 0.99 if bits.activation <= 3 else 0.98
    composition = Composition(
        losses=lambda unit: [_ClippedError(unit, teacher, fraction, options)],
        trained=lambda unit: [Weights(unit, options.mlp_learning_rate, options.mlp_iterations)],
        units=lambda _: names,
        mix_probability=0.0,
        keeps_all=True,
        stage="mlps.",
    )
    settings = OptimizerOptions(options.mlp_iterations, options.optimize_batch_size, autocast=options.autocast)
    results = optimize_units(network, run, settings, composition, teacher)
    run.report["mlps"] = {name: asdict(result) for name, result in results.items()}


class _ClippedError(Loss):
    """The weighted error of an MLP's output, and twice that with its inner activation clipped from above."""

    def __init__(self, unit: Unit, teacher: Network, fraction: float, options: APHQViT) -> None:
        super().__init__(unit)
        importance = fisher_diagonal(unit, _TEMPERATURE, options.labels)
        self.importance = [normalized(found) for found in importance]
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
        return mlp_error(output, target, self.importance[size_index(self.unit, batch)])


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
        importance: …×C.
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
