"""Where a transformer is quantized, and what a method puts there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from adfq.errors import AdfqError
from adfq.layers import QuantMatMul, QuantWeightLayer
from adfq.quantizers import Quantizer

#: The parts that a tensor plays in a transformer, as far as methods tell them apart. Those that name a layer
#: mean its input and its weight; the others are the operands of attention's two matrix products.
ROLES = (
    "patch_embed",  # input image
    "qkv",  # post-LayerNorm
    "query",
    "key",
    "probs",  # post-softmax: a power law in [0, 1]
    "value",
    "proj",
    "fc1",  # post-LayerNorm
    "fc2",  # post-GELU
    "reduction",  # Swin's patch merging, post-LayerNorm
    "head",
)

POST_NORM_ROLES = ("qkv", "fc1", "reduction")

MakeQuantizer = Callable[[], Quantizer | None]


@dataclass(frozen=True)
class Recipe:
    """Which quantizer goes to which site; None in place of a quantizer leaves the site in full precision.

    Attributes:
        activation, weight: make the quantizer of every site that is not named below.
        activations, weights: by site role.
    """

    activation: MakeQuantizer
    weight: MakeQuantizer
    activations: Mapping[str, MakeQuantizer] = field(default_factory=dict)
    weights: Mapping[str, MakeQuantizer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted({*self.activations, *self.weights} - set(ROLES))
        if unknown:
            raise AdfqError(f"unknown site role {unknown[0]!r}; there are {', '.join(ROLES)}")

    def for_activation(self, role: str) -> nn.Module:
        return self.activations.get(role, self.activation)() or nn.Identity()

    def for_weight(self, role: str) -> nn.Module:
        return self.weights.get(role, self.weight)() or nn.Identity()


@dataclass(frozen=True)
class Network:
    """A model whose quantizable operators have been made explicit by an adapter.

    Attributes:
        model: computes what the original did, until quantizers are attached.
        norms: for the name of a linear layer, the LayerNorm whose output nothing else reads: the pairs whose
            scales can be exchanged (RepQ-ViT).
        floating_point: names of linear and convolution layers that the adapter has no rule for.
    """

    model: nn.Module
    norms: Mapping[str, nn.LayerNorm]
    floating_point: tuple[str, ...] = ()

    def weight_layers(self) -> Iterator[tuple[str, QuantWeightLayer]]:
        """Every quantizable linear and convolution layer by name, in the order of registration."""
        for name, module in self.model.named_modules():
            if isinstance(module, QuantWeightLayer):
                yield name, module

    def matmuls(self) -> Iterator[tuple[str, QuantMatMul]]:
        """Every quantizable matrix product by name."""
        for name, module in self.model.named_modules():
            if isinstance(module, QuantMatMul):
                yield name, module

    def attach(self, recipe: Recipe) -> None:
        """Gives every site the quantizers that the recipe has for its role, not yet calibrated."""
        for _, layer in self.weight_layers():
            layer.input_quantizer = recipe.for_activation(layer.role)
            layer.weight_quantizer = recipe.for_weight(layer.role)
        for _, matmul in self.matmuls():
            matmul.left_quantizer, matmul.right_quantizer = map(recipe.for_activation, matmul.roles)

    def activation_quantizers(self) -> Iterator[tuple[str, str, Quantizer]]:
        """(name, role, quantizer) of every quantized activation."""
        for name, layer in self.weight_layers():
            if isinstance(layer.input_quantizer, Quantizer):
                yield f"{name}.input_quantizer", layer.role, layer.input_quantizer
        for name, matmul in self.matmuls():
            for side, role in zip(("left_quantizer", "right_quantizer"), matmul.roles, strict=True):
                quantizer = getattr(matmul, side)
                if isinstance(quantizer, Quantizer):
                    yield f"{name}.{side}", role, quantizer
