"""Quantized models as ONNX files in which integers are multiplied with integers.

Files are in QDQ form (ONNX operator specification): `QuantizeLinear` and `DequantizeLinear` enclose the values that
quantization simulates. onnxruntime recognizes a product whose operands both come out of a `DequantizeLinear` and runs
it on codes. This module makes every product such a one, as far as its quantizers allow it.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adfq.api import Quantization
from adfq.errors import AdfqError
from adfq.files import replacing
from adfq.layers import QuantConv2d, QuantMatMul, QuantWeightLayer
from adfq.quantizers import (
    AffineUniformQuantizer,
    LogQuantizer,
    OutlierQuantizer,
    Quantizer,
    ShiftLogQuantizer,
    ShiftUniformLogQuantizer,
    TwinGeluQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
)
from adfq.sites import Network, Site, check_weights, sites_of
from adfq.transforms.positions import has_columns

INPUT, OUTPUT = "images", "logits"

_BITS = 8
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # a terminal's colours
_LARGEST = 2**31 - 1  # bytes: protobuf's limit, and ONNX files are written in it

_GRIDS = "it has two steps in one tensor, and an integer product has one for each operand"

#: Reasons why quantizers have no form in ONNX; the first class that a quantizer is an instance of counts.
_REFUSED: Mapping[type[nn.Module], str] = {
    OutlierQuantizer: "its outliers stay in float and its ranges differ from patch to patch, "
    "and an integer product has codes alone, with one scale for each operand",
    ShiftLogQuantizer: "it is shifted by the minimum of what else is in the batch, and powers of a base, shifted, are "
    "no multiples of a step",
    ShiftUniformLogQuantizer: "powers of two, shifted, are no multiples of a step",
    TwinSoftmaxQuantizer: _GRIDS,
    TwinGeluQuantizer: _GRIDS,
}

_LOGARITHMIC = (
    "logarithmic levels are no multiples of one step, so that no integers stand for them; "
    "they are computed by float operators"
)
_FULL_PRECISION = "an operand is not quantized"
_OVERLAPPING = "windows of the convolution overlap, and integer convolutions have one zero point for all channels"


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


def export_onnx(model: nn.Module, file: str | os.PathLike[str]) -> Exported:
    """Write a quantized model to one ONNX file in QDQ form.

    The input ``images`` is float32, B×C×H×W with any B; the output ``logits`` is float32, B×classes. Activations become
    uint8 at run time, with one scale each. Weights are stored as int8, also at fewer bits, with a scale and zero point
    for each output channel. Layers that a method leaves in full precision stay float32.

    Args:
        model: model from `adfq.quantize` or `adfq.load`; not changed.
        file: path to write, or to replace.

    Returns:
        Names of the integer and the floating-point products.

    Raises:
        AdfqError: for a model that is not from `adfq.quantize`, is no classifier, cannot be traced or is larger than 2
            GB; for weights that were trained after quantization (`adfq.requantize`); for quantizers without a form in
            ONNX and activations of other than 8 bits, with the name of the first site; without the extra ``onnx``; for
            a file that cannot be written.
    """
    quantization = getattr(model, "quantization", None)
    if not isinstance(quantization, Quantization):
        raise AdfqError("only a model that adfq.quantize has quantized can be exported")
    if min(quantization.architecture.input_size) < 1:  # those of detectors and of Segment Anything
        raise AdfqError(
            f"a {type(model).__name__} cannot be exported: only classifiers can, which have one size of images"
        )
    check_weights(model)
    _check_exportable(model)
    check_installed()
    model = copy.deepcopy(model).cpu().float().eval()
    exported = _convert(model)
    with replacing(file) as temporary:
        temporary.write_bytes(_serialize(model, quantization.architecture.input_size))
    return exported


def check_installed() -> None:
    """Raise AdfqError unless the extra ``onnx`` is installed."""
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(package)
    except ImportError as error:
        raise AdfqError(f"exporting needs {error.name}: pip install 'adfq[onnx]'") from None


def trace(model: nn.Module, input_size: tuple[int, int, int]) -> Any:
    """Trace a model to ONNX with any number of images.

    Args:
        model: model on the CPU, float32, in evaluation mode.
        input_size: channels, height and width in pixels.

    Returns:
        A torch.onnx.ONNXProgram.

    Raises:
        AdfqError: for a model that torch cannot trace.
    """
    images = torch.zeros(2, *input_size)  # from one image torch would conclude that there is always one
    try:
        with torch.no_grad(), _quiet():
            # torch.export, since the exporter that traces Python takes a batch of two for granted.
            program: Any = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:  # whatever a model's code raises on tensors without values
        # torch's own message, coloured, only says which of its steps failed.
        reason = next((line for line in str(error.__cause__ or error).splitlines() if line.strip()), repr(error))
        raise AdfqError(f"cannot trace this {type(model).__name__}: {_ESCAPES.sub('', reason)}") from None
    graph = program.model.graph
    # Metadata names the lines of Python that all comes from, in more bytes than the weights of a small model.
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for part in (graph, *graph, *values):
        part.metadata_props.clear()
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warnings about its own code and other packages, which are nothing to our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _serialize(model: nn.Module, input_size: tuple[int, int, int]) -> bytes:
    if sum(tensor.nbytes for tensor in model.state_dict().values()) > _LARGEST:
        raise AdfqError("the model is larger than 2 GB, which is the most that one ONNX file can hold")
    content: bytes = trace(model, input_size).model_proto.SerializeToString()
    return content


def _check_exportable(model: nn.Module) -> None:
    network = Network(model)
    for site in sites_of(model):
        quantizer = site.quantizer
        if site.is_weight or quantizer is None:
            continue
        problem = next((reason for cls, reason in _REFUSED.items() if isinstance(quantizer, cls)), None)
        if problem is None and not isinstance(quantizer, LogQuantizer):
            problem = _problem_of_uniform(site, quantizer)
        if problem is not None:
            raise AdfqError(f"{site.name} cannot be exported ({quantizer.describe()}): {problem}")
    for name, layer in network.weight_layers():
        weight = layer.weight_quantizer
        by_row = isinstance(weight, UniformQuantizer) and weight.scale.numel() in (1, len(layer.weight))
        if not by_row and isinstance(weight, Quantizer):
            raise AdfqError(f"{name}.weight_quantizer cannot be exported ({weight.describe()}): only uniform ones can")


def _problem_of_uniform(site: Site, quantizer: Quantizer) -> str | None:
    if not isinstance(quantizer, UniformQuantizer):
        return "ONNX has no operator for it"
    if quantizer.scale.numel() != 1:
        summed = -2 if has_columns(site) else -1
        convolution = isinstance(site.operator, QuantConv2d)
        if convolution or quantizer.scale.shape[summed] != 1 or quantizer.zero_point.unique().numel() != 1:
            return "integers are summed up in a product before they are scaled, so that all in a sum have one grid"
    if quantizer.bits != _BITS:
        return (
            f"integer kernels take {_BITS} bits, and fewer would not make them faster; quantize activations to {_BITS}"
        )
    return None


def _convert(model: nn.Module) -> Exported:
    """Replace, in place, every product by one that is traced to ONNX's operators."""
    network = Network(model)
    integer, floating = [], {}
    for name, layer in list(network.weight_layers()):
        reason = _why_float((layer.input_quantizer, layer.weight_quantizer))
        if reason is None and isinstance(layer, QuantConv2d) and not _is_patchwise(layer):
            reason = _OVERLAPPING
        if reason is None:
            integer.append(name)
            model.set_submodule(name, _IntegerLayer(layer))
        else:
            floating[name] = reason
            layer.input_quantizer = _convert_quantizer(layer.input_quantizer)
    for name, product in list(network.matmuls()):
        operands = product.left_quantizer, product.right_quantizer
        reason = _why_float(operands)
        if reason is None:
            integer.append(name)
            model.set_submodule(name, _IntegerProduct(product))
        else:
            floating[name] = reason
            product.left_quantizer, product.right_quantizer = map(_convert_quantizer, operands)
    return Exported(tuple(integer), floating)


def _why_float(operands: tuple[nn.Module, nn.Module]) -> str | None:
    if any(isinstance(quantizer, LogQuantizer) for quantizer in operands):
        return _LOGARITHMIC
    return None if all(isinstance(quantizer, UniformQuantizer) for quantizer in operands) else _FULL_PRECISION


def _is_patchwise(layer: QuantConv2d) -> bool:
    """Return True for a convolution that sees every pixel once, as a patch embedding does."""
    size = tuple(layer.weight.shape[2:])
    unpadded = layer.padding in ("valid", (0, 0))
    return unpadded and layer.stride == size and layer.groups == 1 and tuple(layer.dilation) == (1, 1)


def _convert_quantizer(quantizer: nn.Module) -> nn.Module:
    if isinstance(quantizer, UniformQuantizer):
        return _QuantizeDequantize(quantizer)
    return _Logarithmic(quantizer) if isinstance(quantizer, LogQuantizer) else quantizer


class _Grid(nn.Module):
    """Grid of a `UniformQuantizer` in ONNX's form, with a zero point that is a code.

    Values are scale·(q - zero_point) + offset. The offset is 0 unless the range leaves out 0, as that of probabilities
    that are all large can, or the quantizer's zero point is no whole number. An activation with several scales is
    divided by them before, and has a scale of 1 in ONNX: they are factors of the product's output.

    Args:
        quantizer: calibrated uniform quantizer.
        signed: True for int8 codes around 0, as kernels want weights; False, the default, for uint8. x86 multiplies
            uint8 with int8 (VNNI) in half the time of two uint8.

    Attributes:
        scale: float32, the shape of the quantizer's scale without dimensions of 1.
        zero_point: uint8 or int8, the shape of `scale`.
        offset: float32, the shape of `scale`; None for 0.
        factor: float32, the scales that an activation is divided by, which broadcast against it; None for one scale.
    """

    factor: Tensor | None
    scale: Tensor
    zero_point: Tensor
    offset: Tensor | None

    def __init__(self, quantizer: UniformQuantizer, signed: bool = False) -> None:
        super().__init__()
        self.shift, self.dtype = (quantizer.levels // 2, torch.int8) if signed else (0, torch.uint8)
        # RepQ-ViT's zero point is a mean of whole numbers. Steps are counted from 0 on either way, so that rounding it
        # changes only the values at the ends of the range that are cut off, by less than a step.
        several = not signed and quantizer.scale.numel() > 1
        self.register_buffer("factor", quantizer.scale.clone() if several else None)
        wanted, scale = quantizer.zero_point.squeeze(), quantizer.scale.squeeze()
        if several:
            wanted, scale = wanted.flatten()[0], torch.ones(())
        if not isinstance(quantizer, AffineUniformQuantizer):
            wanted = wanted.round()
        zero_point = wanted.round().clamp(0, quantizer.levels - 1)
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", self.shift_codes(zero_point))
        # onnxruntime cannot read a file in which weights share a zero point, which is 0 where there is none.
        self.without_zero_point = signed and not self.zero_point.any()
        offset = scale * (zero_point - wanted)
        self.register_buffer("offset", offset if offset.any() else None)

    def shift_codes(self, codes: Tensor) -> Tensor:
        """Return the quantizer's codes in ONNX's type."""
        return (codes.int() - self.shift).to(self.dtype)

    def quantize(self, x: Tensor) -> Tensor:
        """Return the codes of `x`, by ONNX's operator."""
        x = x if self.factor is None else x / self.factor
        operands = [x if self.offset is None else x - self.offset, self.scale, self.zero_point]
        codes: Tensor = torch.onnx.ops.symbolic("QuantizeLinear", operands, dtype=self.dtype, shape=x.shape)
        return codes

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of codes without the offset; several scales belong to the last dimension."""
        operands = [codes, self.scale, *([] if self.without_zero_point else [self.zero_point])]
        values: Tensor = torch.onnx.ops.symbolic(
            "DequantizeLinear", operands, {"axis": codes.dim() - 1}, dtype=torch.float32, shape=codes.shape
        )
        return values


class _QuantizeDequantize(nn.Module):
    """Uniform quantizer of an activation outside of integer products."""

    def __init__(self, quantizer: UniformQuantizer) -> None:
        super().__init__()
        self.grid = _Grid(quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized values of `x`."""
        values = self.grid.dequantize(self.grid.quantize(x))
        values = values if self.grid.offset is None else values + self.grid.offset
        return values if self.grid.factor is None else values * self.grid.factor


class _Logarithmic(nn.Module):
    """`LogQuantizer` in operators with vectorized kernels in onnxruntime, which has none for powers of 2."""

    scale: Tensor

    def __init__(self, quantizer: LogQuantizer) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.clone())
        self.levels, self.step = quantizer.levels, math.log(quantizer.base)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized values of `x`."""
        codes = ((x / self.scale).clamp(0, 1).log() * (-1 / self.step)).round()
        # Log 0 is beyond every code.
        return torch.where(codes < self.levels, (codes * -self.step).exp() * self.scale, 0.0)


class _IntegerProduct(nn.Module):
    """`QuantMatMul` of two uniformly quantized operands.

    With a and b the parts that integers stand for and α and β the offsets, (a + α)(b + β) = ab + α·(column sums of b +
    β) + (row sums of a)·β.
    """

    def __init__(self, product: QuantMatMul) -> None:
        super().__init__()
        assert isinstance(product.left_quantizer, UniformQuantizer)
        assert isinstance(product.right_quantizer, UniformQuantizer)
        self.left, self.right = _Grid(product.left_quantizer), _Grid(product.right_quantizer)
        self.transpose_right = product.transpose_right
        if self.transpose_right and self.right.factor is not None:
            self.right.factor = self.right.factor.transpose(-2, -1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the product of the quantized operands."""
        # The operand is transposed before it is quantized: nothing may stand between the product and its operands.
        right = right.transpose(-2, -1) if self.transpose_right else right
        left, right = (
            grid.dequantize(grid.quantize(operand)) for grid, operand in ((self.left, left), (self.right, right))
        )
        output = left @ right
        if self.right.offset is not None:
            output = output + left.sum(-1, keepdim=True) * self.right.offset
            right = right + self.right.offset
        if self.left.offset is not None:
            output = output + right.sum(-2, keepdim=True) * self.left.offset
        for factor in (self.left.factor, self.right.factor):
            output = output if factor is None else output * factor
        return output


class _IntegerLayer(nn.Module):
    """Linear layer, or convolution that sees every pixel once, with uniformly quantized input and weight.

    Such a convolution becomes a linear layer on patches, because onnxruntime's integer convolution has one zero point
    for all output channels.
    """

    codes: Tensor
    bias: Tensor
    shift: Tensor | None

    def __init__(self, layer: QuantWeightLayer) -> None:
        super().__init__()
        assert isinstance(layer.input_quantizer, UniformQuantizer)
        assert isinstance(layer.weight_quantizer, UniformQuantizer)
        self.input, self.weight = _Grid(layer.input_quantizer), _Grid(layer.weight_quantizer, signed=True)
        self.patch = tuple(layer.weight.shape[2:])
        weight = layer.weight.detach()
        codes = self.weight.shift_codes(layer.weight_quantizer.encode(weight))
        self.register_buffer("codes", codes.flatten(1).T.contiguous())
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        shift = None
        if self.input.offset is not None:  # see _IntegerProduct; this part of it is known already
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
