"""Where a transformer is quantized, and what a method puts there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

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
    "fc2",  # post-GELU; convolutions behind a GELU too
    "relu",  # the second layer of an MLP with ReLU
    "conv",  # any other convolution of TinyViT
    "in_proj",  # separate projections to queries, keys and values: LayerNorm's output and positions
    "reduction",  # Swin's patch merging, post-LayerNorm
    "neck",  # a detector's feature pyramid; behind SAM's image encoder
    "head",  # a classifier's; every layer of a detector's heads and of those of SAM's mask decoder
)

POST_NORM_ROLES = ("qkv", "fc1", "reduction")

MakeQuantizer = Callable[[], Quantizer | None]


@dataclass(frozen=True)
class Recipe:
    """Which quantizer goes to which site; None in place of a quantizer leaves the site in full precision.

    Attributes:
        activation, weight: make the quantizer of every site that is not named below.
        activations, weights: by site role.
        run_time: by site role, for activations without fixed token positions; goes before `activations`.
    """

    activation: MakeQuantizer
    weight: MakeQuantizer
    activations: Mapping[str, MakeQuantizer] = field(default_factory=dict)
    weights: Mapping[str, MakeQuantizer] = field(default_factory=dict)
    run_time: Mapping[str, MakeQuantizer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted({*self.activations, *self.weights, *self.run_time} - set(ROLES))
        if unknown:
            raise AdfqError(f"unknown site role {unknown[0]!r}; there are {', '.join(ROLES)}")

    def for_activation(self, role: str, fixed_positions: bool = True) -> nn.Module:
        make = self.activations.get(role, self.activation)
        return (make if fixed_positions else self.run_time.get(role, make))() or nn.Identity()

    def for_weight(self, role: str) -> nn.Module:
        return self.weights.get(role, self.weight)() or nn.Identity()


@dataclass(frozen=True)
class Network:
    """A model whose quantizable operators have been made explicit by an adapter.

    Attributes:
        model: computes what the original did, until quantizers are attached.
        norms: for the name of a linear layer, the LayerNorm whose output nothing else reads: the pairs whose
            scales can be exchanged (RepQ-ViT).
        paddings: for the name of such a layer, what stands for 0 (C) where its input is padded behind the norm.
        modules: names of the parts that are optimized together (`adfq.reconstruction`): patch embedding, attentions,
            MLPs, patch mergings, heads. Each gives one tensor; an nn.Softmax in it tells its attention scores.
        resume: a folder in which a long optimization leaves finished modules, and finds them again; None for none.
        report: what a method has to say of its work, by subject; JSON's types.
        floating_point: names of linear and convolution layers that the adapter has no rule for.
        trunk: takes images through all the `modules`, where that is less than `forward`.
        forward: takes images through every layer of the model, where the model itself wants more than images.
        kept: names of parts that all methods leave in full precision.
    """

    model: nn.Module
    norms: Mapping[str, nn.LayerNorm]
    modules: tuple[str, ...] = ()
    floating_point: tuple[str, ...] = ()
    resume: Path | None = None
    report: dict[str, Any] = field(default_factory=dict)
    paddings: Mapping[str, Tensor] = field(default_factory=dict)
    trunk: Callable[[Tensor], Any] | None = None
    forward: Callable[[Tensor], Any] | None = None
    kept: tuple[str, ...] = ()

    def run(self, images: Tensor) -> Any:
        """What the model makes of images B×C×H×W, which are moved to its device and dtype."""
        return (self.forward or self.model)(self.place(images))

    def place(self, images: Tensor) -> Tensor:
        """The images on the model's device and in its dtype."""
        parameter = next(self.model.parameters())
        return images.to(parameter.device, parameter.dtype)

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
            layer.input_quantizer = recipe.for_activation(layer.role, layer.fixed_positions)
            layer.weight_quantizer = recipe.for_weight(layer.role)
        for _, matmul in self.matmuls():
            matmul.left_quantizer, matmul.right_quantizer = map(recipe.for_activation, matmul.roles)

    def activation_quantizers(self, within: str = "") -> Iterator[tuple[str, str, Quantizer]]:
        """(name, role, quantizer) of every quantized activation, or of those within the named part of the model."""
        for name, owner, attribute, role in self._activation_sites():
            quantizer = getattr(owner, attribute)
            if isinstance(quantizer, Quantizer) and f"{name}.".startswith(f"{within}." if within else ""):
                yield f"{name}.{attribute}", role, quantizer

    def _activation_sites(self) -> Iterator[tuple[str, nn.Module, str, str]]:
        for name, layer in self.weight_layers():
            yield name, layer, "input_quantizer", layer.role
        for name, matmul in self.matmuls():
            yield name, matmul, "left_quantizer", matmul.roles[0]
            yield name, matmul, "right_quantizer", matmul.roles[1]

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Within it, the model computes as if it had no quantizers."""
        sites = [(owner, attribute, getattr(owner, attribute)) for _, owner, attribute, _ in self._activation_sites()]
        weights = [(layer, layer.weight_quantizer, layer.learned_weight) for _, layer in self.weight_layers()]
        try:
            for owner, attribute, _ in sites:
                setattr(owner, attribute, nn.Identity())
            for layer, _, _ in weights:
                layer.weight_quantizer, layer.learned_weight = nn.Identity(), None
            yield
        finally:
            for owner, attribute, quantizer in sites:
                setattr(owner, attribute, quantizer)
            for layer, quantizer, weight in weights:
                layer.weight_quantizer, layer.learned_weight = quantizer, weight
