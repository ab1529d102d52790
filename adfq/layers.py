"""Operators with two quantized operands: a linear map or convolution with its weight, a matrix product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.errors import AdfqError
from adfq.quantizers import Quantizer


class QuantWeightLayer(nn.Module, ABC):
    """A layer with a weight; does what the replaced layer did until quantizers are attached.

    Attributes:
        role: the site role (`adfq.sites.ROLES`) of input and weight.
        fixed_positions: whether all inputs have the same token positions; False where the size of the image decides.
        weight, bias: as in the layer that it replaces, in full precision until `freeze`.
        input_quantizer, weight_quantizer: a `Quantizer`, or nn.Identity for full precision.
        learned_weight: until `freeze`, quantized values in place of those that the weight's quantizer gives; or None.
        frozen: whether `weight` itself holds quantized values.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    learned_weight: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, role: str, fixed_positions: bool = True) -> None:
        super().__init__()
        self.role = role
        self.fixed_positions = fixed_positions
        self.weight = cast(nn.Parameter, layer.weight)
        self.bias = cast("nn.Parameter | None", layer.bias)
        self.input_quantizer: nn.Module = nn.Identity()
        self.weight_quantizer: nn.Module = nn.Identity()
        self.register_buffer("learned_weight", None, persistent=False)
        self.frozen = False

    def find_weight_range(self) -> None:
        """Calibrates the weight's quantizer; from then on `forward` computes with quantized values."""
        if isinstance(self.weight_quantizer, Quantizer):
            self.weight_quantizer.calibrate(self.weight)
            self.frozen = False

    @torch.no_grad()
    def quantize_weight(self) -> Tensor:
        """The values that the layer computes with."""
        if self.learned_weight is not None:
            return self.learned_weight
        quantizer = self.weight_quantizer
        if self.frozen or not isinstance(quantizer, Quantizer) or not quantizer.is_calibrated:
            return self.weight
        # Anew in each of the few passes before the model is frozen: that costs less than the memory of all quantized
        # weights beside the full-precision ones.
        quantized: Tensor = quantizer(self.weight)
        return quantized

    def freeze(self) -> None:
        """Makes the quantized weight the weight, once and for all; the full-precision one is gone."""
        quantized = self.quantize_weight()
        if quantized is not self.weight:
            self.weight, self.learned_weight = nn.Parameter(quantized, requires_grad=False), None
        self.frozen = True

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_weight(self.input_quantizer(x), self.quantize_weight())

    @abstractmethod
    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's own operation with the given weight."""

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, role={self.role!r}"


class QuantLinear(QuantWeightLayer):
    """A quantized nn.Linear: inputs … × in, weight out × in."""

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class QuantConv2d(QuantWeightLayer):
    """A quantized nn.Conv2d with zero padding.

    Raises:
        AdfqError: for another padding mode.
    """

    def __init__(self, layer: nn.Conv2d, role: str, fixed_positions: bool = True) -> None:
        super().__init__(layer, role, fixed_positions)
        if layer.padding_mode != "zeros":
            raise AdfqError(f"cannot quantize a convolution with padding mode {layer.padding_mode!r}")
        self.stride, self.padding, self.dilation, self.groups = (
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class QuantMatMul(nn.Module):
    """left @ right, or left @ rightᵀ, with both operands quantized.

    The right operand is quantized before it is transposed, so that its last dimension is its channels.

    Attributes:
        roles: the site roles of the two operands.
        left_quantizer, right_quantizer: a `Quantizer`, or nn.Identity for full precision.
    """

    def __init__(self, roles: tuple[str, str], transpose_right: bool = False) -> None:
        super().__init__()
        self.roles = roles
        self.transpose_right = transpose_right
        self.left_quantizer: nn.Module = nn.Identity()
        self.right_quantizer: nn.Module = nn.Identity()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = self.left_quantizer(left), self.right_quantizer(right)
        return left @ (right.transpose(-2, -1) if self.transpose_right else right)

    def extra_repr(self) -> str:
        return f"roles={self.roles!r}"
