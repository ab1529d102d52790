"""Operators with two quantized operands: linear layer, convolution, matrix product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.errors import AdfqError
from adfq.plain import check_plain
from adfq.quantizers import Quantizer


class QuantWeightLayer(nn.Module, ABC):
    """Layer with a quantizable input and weight; it computes what the replaced layer did until quantizers are attached.

    Args:
        layer: layer to replace, whose parameters are shared.
        role: site role (`adfq.sites.ROLES`) of input and weight.
        fixed_positions: True, the default, if all inputs have the same token positions; False where they depend on the
            image's size.
        parts: number of projections whose weights are stacked along the output channels, such as 3 for queries, keys
            and values. None, the default, for 3 in the role ``qkv`` and 1 in others.

    Attributes:
        replaces: class of the layers that it replaces.
        role: site role of input and weight.
        fixed_positions: see the argument.
        parts: number of projections whose weights are stacked.
        weight: weight of the replaced layer, in full precision until `freeze`.
        bias: bias of the replaced layer, always in full precision; None for none.
        input_quantizer: a `Quantizer`, or nn.Identity for full precision.
        weight_quantizer: a `Quantizer`, or nn.Identity for full precision.
        learned_weight: quantized values that replace those of `weight_quantizer` until `freeze`; None for none.
        frozen: True once `weight` itself holds quantized values.

    Raises:
        AdfqError: for a layer that computes something else than its class does.
    """

    replaces: ClassVar[type[nn.Module]]
    weight: nn.Parameter
    bias: nn.Parameter | None
    learned_weight: Tensor | None

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, role: str, fixed_positions: bool = True, parts: int | None = None
    ) -> None:
        super().__init__()
        check_plain(layer, self.replaces)
        self.role = role
        self.parts = parts or (3 if role == "qkv" else 1)
        self.fixed_positions = fixed_positions
        self.weight = cast(nn.Parameter, layer.weight)
        self.bias = cast("nn.Parameter | None", layer.bias)
        self.input_quantizer: nn.Module = nn.Identity()
        self.weight_quantizer: nn.Module = nn.Identity()
        self.register_buffer("learned_weight", None, persistent=False)
        self.frozen = False

    def find_weight_range(self) -> None:
        """Calibrate the weight's quantizer; `forward` computes with quantized values from then on.

        Raises:
            NonFiniteError: for a weight that holds NaN or infinity.
        """
        if isinstance(self.weight_quantizer, Quantizer):
            self.weight_quantizer.calibrate(self.weight)
            self.frozen = False

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """Return the weight that `forward` uses: learned, quantized or full precision, the shape of `weight`."""
        if self.learned_weight is not None:
            return self.learned_weight
        quantizer = self.weight_quantizer
        if self.frozen or not isinstance(quantizer, Quantizer) or not quantizer.is_calibrated:
            return self.weight
        # Quantization in each of the few passes before the model is frozen costs less than the memory of all quantized
        # weights beside the full-precision ones.
        quantized: Tensor = quantizer(self.weight)
        return quantized

    def freeze(self) -> None:
        """Replace the weight by its quantized values for good; the full-precision weight is gone."""
        quantized = self.effective_weight()
        if quantized is not self.weight:
            self.weight, self.learned_weight = nn.Parameter(quantized, requires_grad=False), None
        self.frozen = True

    @torch.no_grad()
    def is_on_grid(self) -> bool:
        """Return False if the weight has left its quantizer's grid since `freeze`, as training makes it.

        A weight that was cast is on the grid of its dtype. A quantizer without codes has no grid to tell.
        """
        quantizer = self.weight_quantizer
        if not self.frozen or not isinstance(quantizer, Quantizer):
            return True
        try:
            values = quantizer.decode(quantizer.encode(self.weight))
        except NotImplementedError:
            return True
        limits = torch.finfo(self.weight.dtype if self.weight.dtype.itemsize < 4 else torch.float32)
        tolerance = limits.eps * (values.abs() + limits.tiny)
        return bool(((self.weight - values).abs() <= tolerance).all())

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for the quantized input and weight.

        Args:
            x: input of the replaced layer.
        """
        return self._apply_weight(self.input_quantizer(x), self.effective_weight())

    @abstractmethod
    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the layer's own operation with the given weight."""

    def extra_repr(self) -> str:
        """Return shape and role for the module's representation."""
        return f"{tuple(self.weight.shape)}, role={self.role!r}"


class QuantLinear(QuantWeightLayer):
    """Quantizable nn.Linear: inputs … × in, weight out × in.

    Args:
        layer: linear layer to replace, whose parameters are shared.
        role: see `QuantWeightLayer`.
        fixed_positions: see `QuantWeightLayer`.
        parts: see `QuantWeightLayer`.

    Attributes:
        in_features: number of input channels.
        out_features: number of output channels.
    """

    replaces = nn.Linear

    def __init__(self, layer: nn.Linear, role: str, fixed_positions: bool = True, parts: int | None = None) -> None:
        super().__init__(layer, role, fixed_positions, parts)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class QuantConv2d(QuantWeightLayer):
    """Quantizable nn.Conv2d with zero padding: inputs B×in×H×W, weight out×in×height×width.

    Args:
        layer: convolution to replace, whose parameters are shared.
        role: see `QuantWeightLayer`.
        fixed_positions: see `QuantWeightLayer`.

    Attributes:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: height and width in pixels.
        stride: vertical and horizontal, in pixels.
        padding: vertical and horizontal, in pixels, or ``"valid"`` or ``"same"``.
        dilation: vertical and horizontal, in pixels.
        groups: number of groups of channels.
        padding_mode: ``"zeros"``.

    Raises:
        AdfqError: for another padding mode.
    """

    replaces = nn.Conv2d

    def __init__(self, layer: nn.Conv2d, role: str, fixed_positions: bool = True) -> None:
        super().__init__(layer, role, fixed_positions)
        if layer.padding_mode != "zeros":
            raise AdfqError(f"cannot quantize a convolution with padding mode {layer.padding_mode!r}")
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode = layer.padding, layer.padding_mode

    def _apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class QuantMatMul(nn.Module):
    """Matrix product of two quantizable operands: left @ right, or left @ rightᵀ.

    The right operand is quantized before it is transposed, so that its last dimension is its channels.

    Args:
        roles: site roles of the two operands.
        transpose_right: True for left @ rightᵀ; False by default.

    Attributes:
        roles: site roles of the two operands.
        left_quantizer: a `Quantizer`, or nn.Identity for full precision.
        right_quantizer: a `Quantizer`, or nn.Identity for full precision.
    """

    def __init__(self, roles: tuple[str, str], transpose_right: bool = False) -> None:
        super().__init__()
        self.roles = roles
        self.transpose_right = transpose_right
        self.left_quantizer: nn.Module = nn.Identity()
        self.right_quantizer: nn.Module = nn.Identity()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the product of the quantized operands.

        Args:
            left: … × n × k.
            right: … × k × m; … × m × k if it is transposed.
        """
        left, right = self.left_quantizer(left), self.right_quantizer(right)
        return left @ (right.transpose(-2, -1) if self.transpose_right else right)

    def extra_repr(self) -> str:
        """Return roles for the module's representation."""
        return f"roles={self.roles!r}"
