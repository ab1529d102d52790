"""Observers of a network's layers, which keep the samples of PTQ4ViT's search."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.errors import AdfqError, NonFiniteError
from adfq.layers import QuantConv2d, QuantMatMul, QuantWeightLayer
from adfq.quantizers import TwinGeluQuantizer, UniformQuantizer
from adfq.quantizers.twin import GELU_DEPTH
from baselines.ptq4vit.samples import Sample, draw, energies
from baselines.ptq4vit.search import Operand, Product


class Size(NamedTuple):
    """Size of a sample that scales are searched on.

    Attributes:
        rows: number of rows of a layer with a weight.
        matrices: number of matrices of a batched product.
        matrix_rows: number of rows of each of these.
    """

    rows: int
    matrices: int
    matrix_rows: int


# Every candidate is tried on the coarse sample, a part of the fine one, and the best on the fine one. The scale found
# is the best on everything for most layers, and within a few percent of its score for the others. Matrices differ more
# than a matrix's rows, of which few have most of the gradient.
COARSE = Size(rows=128, matrices=32, matrix_rows=8)
FINE = Size(rows=2048, matrices=96, matrix_rows=16)

_LOBE = 1.01 * GELU_DEPTH  # in half precision, GELU's own values lie a little lower


def check_finite(name: str, values: Tensor) -> None:
    """Raise NonFiniteError if values hold NaN or infinity.

    Args:
        name: subject of the message.
        values: any shape.
    """
    if not torch.isfinite(values).all():
        raise NonFiniteError(f"{name}: values are not finite (NaN or infinity)")


class Observer:
    """Observer of a layer while the model runs, which keeps a sample for the search.

    A layer is seen as products left @ rightᵀ of P×M×inner and P×N×inner. For a layer with a weight, P is 1 (the number
    of groups of a convolution), left the weight and right the tokens. For a matrix product, P is images × heads (Swin:
    windows × heads), left the queries or probabilities, right the keys or values.

    The sample is one of rows for a layer with a weight, and one of matrices, each with a sample of its rows, for a
    matrix product. Its size does not depend on the number of images.

    Args:
        name: the layer's name, for messages.
        layer: layer to observe.
        weighted: True waits for the gradient at the output; False lets all errors weigh the same.
    """

    def __init__(self, name: str, layer: QuantWeightLayer | QuantMatMul, weighted: bool) -> None:
        self.name, self.layer, self.weighted = name, layer, weighted
        self.largest: list[Tensor] = []
        self.lowest = math.inf
        self.sample = Sample(FINE.matrices if isinstance(layer, QuantMatMul) else FINE.rows)

    def observe(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Observe a forward pass of the layer, as a forward hook, and return its output."""
        for operand in inputs:
            check_finite(self.name, operand)
        if not self.weighted:
            self.keep(inputs, output.new_ones(()).expand_as(output))
        elif output.requires_grad:
            if output._is_view() and getattr(self.layer, "role", None) == "head":
                output = output.clone()  # detectors change it in place, and a view would lose its hook by that
            waiting = [inputs]  # the graph has the hook as long as it lives, but operands only until they are used
            output.register_hook(lambda gradient: self.keep(waiting.pop(), gradient))
        return output

    @torch.no_grad()
    def keep(self, inputs: tuple[Tensor, ...], gradient: Tensor) -> None:
        """Draw the sample anew from the present one and a batch.

        Args:
            inputs: operands of the layer.
            gradient: gradient at its output, in that one's shape.
        """
        check_finite(f"gradient at {self.name}", gradient)
        largest = [operand.abs().max().float() for operand in inputs]
        self.largest = list(map(torch.maximum, self.largest or largest, largest))
        if getattr(self.layer, "role", None) == "fc2":
            self.lowest = min(self.lowest, float(inputs[0].min()))
        x, gradient = inputs[0].float(), gradient.float()
        if isinstance(self.layer, QuantMatMul):
            self._keep_matrices(*(operand.flatten(0, -3) for operand in (x, inputs[1], gradient)))
        else:
            choose, sizes, gradient = _as_rows(self.layer, x, gradient)
            self.sample.add(energies(sizes, gradient), lambda rows: (choose(rows), gradient[rows]))

    def _keep_matrices(self, x: Tensor, other: Tensor, gradient: Tensor) -> None:
        found = energies(x.square().sum(-1), gradient)

        def take(which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return *self._draw_rows(x, gradient, found, which, FINE.matrix_rows), other[which].float()

        self.sample.add(found.sum(1), take)

    def _draw_rows(
        self, x: Tensor, gradient: Tensor, found: Tensor, which: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Return rows of matrices, and of the gradient with the square root of their weights."""
        chosen, probabilities = draw(self.sample.mass(found[which]), count)
        which = which[:, None]
        return x[which, chosen], gradient[which, chosen] * probabilities.rsqrt().float()[..., None]

    def check_lobe(self) -> None:
        """Put a uniform quantizer in the place of the twin one for inputs that lie below GELU's negative lobe.

        Other activation functions have a deeper one: SiLU. The twin quantizer would clip there.
        """
        quantizer = self.layer.input_quantizer if isinstance(self.layer, QuantWeightLayer) else None
        if isinstance(quantizer, TwinGeluQuantizer) and self.lowest < -_LOBE:
            self.layer.input_quantizer = UniformQuantizer(quantizer.bits)

    def product(self, size: Size) -> Product:
        """Return the layer's product on the sample, or on a part of it.

        Args:
            size: `COARSE` or `FINE`.

        Raises:
            AdfqError: for a layer that no image went through.
        """
        if not len(self.sample):
            raise AdfqError(f"{self.name} saw no calibration data: the model does not use this layer")
        largest = [operand.reshape(1) for operand in self.largest]
        if isinstance(self.layer, QuantMatMul):
            return self._matrix_product(self.layer, largest, size)
        return self._weight_product(self.layer, largest[0], size.rows)

    def _matrix_product(self, layer: QuantMatMul, largest: list[Tensor], size: Size) -> Product:
        (x, gradient, other), weights = self.sample.thin(size.matrices)
        found = energies(x.square().sum(-1), gradient)
        x, gradient = self._draw_rows(x, gradient, found, torch.arange(len(x), device=x.device), size.matrix_rows)
        left = Operand(x, layer.left_quantizer, largest[0])
        as_rows = None if layer.transpose_right else partial(torch.transpose, dim0=-2, dim1=-1)
        right = Operand(other, layer.right_quantizer, largest[1], as_rows)
        return Product(left, right, gradient * weights.sqrt().float()[:, None, None])

    def _weight_product(self, layer: QuantWeightLayer, largest: Tensor, rows: int) -> Product:
        (x, gradient), weights = self.sample.thin(rows)
        gradient = gradient * weights.sqrt().float()[:, None]
        weight = layer.weight.detach().float()
        products = layer.groups if isinstance(layer, QuantConv2d) else 1
        groups = len(weight) if layer.role == "patch_embed" else layer.parts
        groups = groups if products == 1 else 1
        maxima = weight.reshape(groups, -1).abs().amax(1)
        as_rows = partial(torch.reshape, shape=(products, len(weight) // products, -1))
        left = Operand(weight, layer.weight_quantizer, maxima, as_rows)
        x, gradient = (values.unflatten(1, (products, -1)).transpose(0, 1) for values in (x, gradient))
        return Product(left, Operand(x, layer.input_quantizer, largest), gradient.mT.contiguous())


def _as_rows(layer: QuantWeightLayer, x: Tensor, gradient: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """Return a layer's input as rows×inner, and the gradient at its output as rows×columns.

    A row of a convolution is a position of its output: the patch that all groups read there, one after the other.

    Returns:
        A function from indices of rows to rows of the input, the squared norms of all rows, and the gradient.
    """
    if not isinstance(layer, QuantConv2d):
        x = x.flatten(0, -2)
        return lambda rows: x[rows], x.square().sum(-1), gradient.flatten(0, -2)
    # Not all patches: those of a depthwise convolution, whose input is the largest, take many times its room.
    sizes = _lay_out(layer, x.square().sum(1, keepdim=True)).sum(1)
    return partial(_choose_patches, layer, x), sizes.flatten(), gradient.movedim(1, -1).flatten(0, -2)


def _lay_out(layer: QuantConv2d, x: Tensor) -> Tensor:
    """Return the pixels under the kernel at each position of a convolution's output.

    B×1×H×W becomes B×kernel×H'×W'.
    """
    # A convolution with the unit matrix lays out the patches, whatever stride and padding.
    kernel = layer.weight.shape[2:]
    unit = torch.eye(kernel.numel(), dtype=x.dtype, device=x.device).reshape(-1, 1, *kernel)
    return F.conv2d(x, unit, None, layer.stride, layer.padding, layer.dilation)


def _choose_patches(layer: QuantConv2d, x: Tensor, rows: Tensor) -> Tensor:
    """Return the patches (rows×(C·kernel)) under the kernel at chosen positions of all images' outputs."""
    # Pixels by number, 0 for padding; exact in double precision, also where a GPU rounds convolutions.
    numbers = torch.arange(1, x[0, 0].numel() + 1, dtype=torch.float64, device=x.device)
    pixels = _lay_out(layer, numbers.reshape(1, 1, *x.shape[2:])).long().flatten(2)
    image, position = rows // pixels.shape[-1], rows % pixels.shape[-1]
    pixels = pixels[0, :, position].T.unsqueeze(1)
    channels = torch.arange(x.shape[1], device=x.device)[:, None]
    values = x.flatten(2)[image[:, None, None], channels, pixels - 1]
    return (values * (pixels > 0)).flatten(1)
