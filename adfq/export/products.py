"""Products of integers in the place of those of simulated values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.export.forms import Grid, NumeratorGrid, convert_quantizer
from adfq.layers import QuantConv2d, QuantLinear, QuantMatMul, QuantWeightLayer
from adfq.quantizers import (
    AdaLogQuantizer,
    DualUniformQuantizer,
    LogQuantizer,
    NumeratorQuantizer,
    OutlierQuantizer,
    ShiftUniformLogQuantizer,
    TwinGeluQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
)
from adfq.sites import Network

_NARROW = 4  # bits
_BLOCKS = 16, 256  # least and largest block of MatMulNBits

_LOGARITHMIC = (
    "logarithmic levels are no multiples of one step, so that no integers stand for them; "
    "they are computed by float operators"
)
_TWO_STEPS = "an operand has two steps in one tensor, and an integer product has one step for each operand"
_TWO_GRIDS = "outlier columns of the weight have a grid of their own, and all in a sum of integers have one"
_OUTLIERS = "outliers stay in float, so that no integers stand for them"
_SEVERAL_GRIDS = "integers are summed up in a product before they are scaled, so that all in a sum have one grid"
_FULL_PRECISION = "an operand is not quantized"
_OVERLAPPING = "windows of the convolution overlap, and integer convolutions have one zero point for all channels"

#: Reasons of products in float, by class of quantizer; the first class that a quantizer is an instance of counts.
_FLOATING: Mapping[type[nn.Module], str] = {
    LogQuantizer: _LOGARITHMIC,
    AdaLogQuantizer: _LOGARITHMIC,
    ShiftUniformLogQuantizer: _LOGARITHMIC,
    TwinSoftmaxQuantizer: _TWO_STEPS,
    TwinGeluQuantizer: _TWO_STEPS,
    DualUniformQuantizer: _TWO_GRIDS,
    OutlierQuantizer: _OUTLIERS,
    NumeratorQuantizer: _SEVERAL_GRIDS,  # but for the left operand of a product
}


@dataclass(frozen=True)
class Exported:
    """Products of an exported model, by the type that they are computed in.

    Products are those with a weight, and the two of each attention.

    Attributes:
        integer: names of the products of integers.
        floating: names of the products in floating point, with the reason.
    """

    integer: tuple[str, ...]
    floating: Mapping[str, str]


def convert(model: nn.Module) -> Exported:
    """Replace, in place, every product by one that is traced to ONNX's operators."""
    network = Network(model)
    integer, floating = [], {}
    for name, layer in list(network.weight_layers()):
        reason = _why_float(layer.input_quantizer, layer.weight_quantizer)
        if reason is None and not _has_one_grid(layer.input_quantizer, None if layer.weight.dim() > 2 else -1):
            reason = _SEVERAL_GRIDS
        if reason is None and isinstance(layer, QuantConv2d) and not _is_patchwise(layer):
            reason = _OVERLAPPING
        if reason is None:
            integer.append(name)
            model.set_submodule(name, IntegerLayer(layer))
        else:
            floating[name] = reason
            if isinstance(layer, QuantLinear) and _is_narrow(layer):
                model.set_submodule(name, NarrowLinear(layer))
            else:
                layer.input_quantizer = convert_quantizer(layer.input_quantizer)
    for name, product in list(network.matmuls()):
        operands = product.left_quantizer, product.right_quantizer
        summed = [(operands[0], -1), (operands[1], -1 if product.transpose_right else -2)]
        if isinstance(operands[0], NumeratorQuantizer):  # each of its rows has one grid
            summed = summed[1:]
        reason = _why_float(*(quantizer for quantizer, _ in summed))
        if reason is None and not all(_has_one_grid(*pair) for pair in summed):
            reason = _SEVERAL_GRIDS
        if reason is None:
            integer.append(name)
            model.set_submodule(name, IntegerProduct(product))
        else:
            floating[name] = reason
            product.left_quantizer, product.right_quantizer = map(convert_quantizer, operands)
    return Exported(tuple(integer), floating)


def _why_float(*operands: nn.Module) -> str | None:
    """Return why quantizers of these kinds make a product one in float; None for integers."""
    for quantizer in operands:
        reason = next((reason for cls, reason in _FLOATING.items() if isinstance(quantizer, cls)), None)
        if reason is not None:
            return reason
    return None if all(isinstance(quantizer, UniformQuantizer) for quantizer in operands) else _FULL_PRECISION


def _has_one_grid(quantizer: nn.Module, summed: int | None) -> bool:
    """Return True if all values that a product adds up have one scale, and all of them one zero point.

    Args:
        quantizer: uniform quantizer of an activation.
        summed: dimension that the product sums over; None for the several ones of a convolution.
    """
    assert isinstance(quantizer, UniformQuantizer)
    if quantizer.scale.numel() == 1:
        return True
    return summed is not None and quantizer.scale.shape[summed] == 1 and quantizer.zero_point.unique().numel() == 1


def _is_narrow(layer: QuantWeightLayer) -> bool:
    """Return True for a uniform weight of at most four bits."""
    quantizer = layer.weight_quantizer
    return isinstance(quantizer, UniformQuantizer) and quantizer.bits <= _NARROW


def _is_patchwise(layer: QuantConv2d) -> bool:
    """Return True for a convolution that sees every pixel once, as a patch embedding does."""
    size = tuple(layer.weight.shape[2:])
    unpadded = layer.padding in ("valid", (0, 0))
    return unpadded and layer.stride == size and layer.groups == 1 and tuple(layer.dilation) == (1, 1)


class IntegerProduct(nn.Module):
    """`QuantMatMul` of two uniformly quantized operands; the left one can be a softmax's numerators.

    With a and b the parts that integers stand for and α and β the offsets, (a + α)(b + β) = ab + α·(column sums of b +
    β) + (row sums of a)·β. A row of numerators has its largest value as a factor behind the product, and its remainder
    times the mean of the right operand's rows is added.
    """

    def __init__(self, product: QuantMatMul) -> None:
        super().__init__()
        assert isinstance(product.right_quantizer, UniformQuantizer)
        left = product.left_quantizer
        assert isinstance(left, (UniformQuantizer, NumeratorQuantizer))
        self.left = NumeratorGrid(left) if isinstance(left, NumeratorQuantizer) else Grid(left)
        self.right = Grid(product.right_quantizer)
        self.transpose_right = product.transpose_right
        if self.transpose_right and self.right.factor is not None:
            self.right.factor = self.right.factor.transpose(-2, -1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the product of the quantized operands."""
        # The operand is transposed before it is quantized: nothing may stand between the product and its operands.
        right = right.transpose(-2, -1) if self.transpose_right else right
        numerators = isinstance(self.left, NumeratorGrid)
        if numerators:
            highest, total = left.amax(-1, keepdim=True), left.sum(-1, keepdim=True)
            left = left / highest
        left, right = (
            grid.dequantize(grid.quantize(operand)) for grid, operand in ((self.left, left), (self.right, right))
        )
        output = left @ right
        if self.right.offset is not None:
            output = output + left.sum(-1, keepdim=True) * self.right.offset
            right = right + self.right.offset
        if self.left.offset is not None:
            output = output + right.sum(-2, keepdim=True) * self.left.offset
        if numerators:
            remainder = total - left.sum(-1, keepdim=True) * highest
            output = output * highest + remainder * right.mean(-2, keepdim=True)
        for factor in (self.left.factor, self.right.factor):
            output = output if factor is None else output * factor
        return output


class IntegerLayer(nn.Module):
    """Linear layer, or convolution that sees every pixel once, with uniformly quantized input and weight.

    Such a convolution becomes a linear layer on patches, because onnxruntime's integer convolution has one zero point
    for all output channels.

    Attributes:
        is_narrow: True for codes of at most four bits.
    """

    codes: Tensor
    bias: Tensor
    shift: Tensor | None

    def __init__(self, layer: QuantWeightLayer) -> None:
        super().__init__()
        assert isinstance(layer.input_quantizer, UniformQuantizer)
        assert isinstance(layer.weight_quantizer, UniformQuantizer)
        self.input, self.weight = Grid(layer.input_quantizer), Grid(layer.weight_quantizer, signed=True)
        self.patch = tuple(layer.weight.shape[2:])
        self.is_narrow = _is_narrow(layer)
        weight = layer.weight.detach()
        codes = self.weight.shift_codes(layer.weight_quantizer.encode(weight))
        self.register_buffer("codes", codes.flatten(1).T.contiguous())
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        shift = None
        if self.input.offset is not None:  # see IntegerProduct; this part of it is known already
            shift = weight.flatten(1).sum(1) * self.input.offset
        if shift is not None and self.input.factor is None:
            bias, shift = bias + shift, None
        self.register_buffer("bias", bias)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for the quantized input and weight."""
        if self.patch:
            height, width = self.patch
            rows, columns = x.shape[2] // height, x.shape[3] // width
            patches = x[:, :, : rows * height, : columns * width].unflatten(3, (columns, width))
            x = patches.unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        x = self.input.dequantize(self.input.quantize(x))
        # onnxruntime would make a Gemm from a matrix and a bias, and runs that on integers only if the bias has codes.
        output = (x[None] @ self.weight.dequantize(self.codes))[0]
        if self.input.factor is None:
            output = output + self.bias
        if self.weight.offset is not None:
            output = output + x.sum(-1, keepdim=True) * self.weight.offset
        if self.input.factor is not None:
            output = (output if self.shift is None else output + self.shift) * self.input.factor + self.bias
        return output.permute(0, 3, 1, 2) if self.patch else output


class NarrowLinear(nn.Module):
    """Linear layer with a float input and a uniform weight of at most four bits, in onnxruntime's MatMulNBits.

    onnxruntime makes this operator itself from a float input and a weight in INT4, but not behind a
    `DequantizeLinear`. It also rounds such inputs to eight bits again, which the accuracy level here forbids.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    offset: Tensor | None

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        assert isinstance(layer.weight_quantizer, UniformQuantizer)
        self.input = convert_quantizer(layer.input_quantizer)
        self.shape = rows, columns = tuple(layer.weight.shape)
        least, largest = _BLOCKS
        self.block = min(max(columns & -columns, least), largest)  # the largest that leaves no gap
        blocks = -(-columns // self.block)
        grid = Grid(layer.weight_quantizer, signed=True)
        codes = grid.shift_codes(layer.weight_quantizer.encode(layer.weight.detach())) + 2 ** (_NARROW - 1)
        zero_point = (grid.zero_point + 2 ** (_NARROW - 1)).expand(rows)[:, None].expand(-1, blocks)
        codes = F.pad(codes, (0, blocks * self.block - columns))
        self.register_buffer("codes", _pack(codes).unflatten(1, (blocks, -1)))
        self.register_buffer("scale", grid.scale.expand(rows)[:, None].expand(-1, blocks).flatten().contiguous())
        self.register_buffer("zero_point", _pack(F.pad(zero_point, (0, blocks % 2))).flatten())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.register_buffer("offset", grid.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for the quantized input and weight."""
        x = self.input(x)
        rows, columns = self.shape
        sizes: dict[str, Any] = {
            "N": rows,
            "K": columns,
            "bits": _NARROW,
            "block_size": self.block,
            "accuracy_level": 1,
        }  # float32
        output: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            [x, self.codes, self.scale, self.zero_point],
            sizes,
            dtype=torch.float32,
            shape=(*x.shape[:-1], rows),
            version=1,
        )
        if self.offset is not None:
            output = output + x.sum(-1, keepdim=True) * self.offset
        return output if self.bias is None else output + self.bias


def _pack(codes: Tensor) -> Tensor:
    """Return two codes from 0 to 15 a byte along the last dimension, the first in the low bits."""
    low, high = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    packed: Tensor = low + high * 2**_NARROW
    return packed
