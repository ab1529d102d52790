"""Sites, the places of quantizers in a transformer, and recipes, the quantizers that a method puts there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from adfq.errors import AdfqError
from adfq.layers import QuantMatMul, QuantWeightLayer
from adfq.quantizers import Quantizer
from adfq.streams import Heads, Stream

#: The parts that a tensor plays in a transformer. A layer's name stands for its input and its weight; the four
#: operands of attention's two matrix products have names of their own.
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
    "gated",  # the last layer of a gated MLP (SwiGLU): the product of two branches, of either sign
    "relu",  # the second layer of an MLP with ReLU
    "hidden",  # the last layer of an MLP behind anything else: another activation function, or a norm
    "residual",  # in post-norm models, the first layer of attention, MLP or patch merging: the residual stream itself
    "conv",  # any other convolution of TinyViT
    "in_proj",  # projections of cross-attention and attention pooling: tokens and positions, or learned queries
    "reduction",  # Swin's patch merging, post-LayerNorm; that of Swin V2 is "residual"
    "neck",  # a detector's feature pyramid; behind SAM's image encoder
    "head",  # a classifier's; every layer of a detector's heads and of those of SAM's mask decoder
)

POST_NORM_ROLES = ("qkv", "fc1", "reduction")

MakeQuantizer = Callable[[], Quantizer | None]


@dataclass(frozen=True)
class Recipe:
    """The quantizer of each site, by role; a factory that returns None leaves the site in full precision.

    Attributes:
        activation: factory for the activations of every role that is not in `activations`.
        weight: factory for the weights of every role that is not in `weights`.
        activations: factories by role.
        weights: factories by role.
        run_time: factories by role for activations without fixed token positions; they go before `activations`.

    Raises:
        AdfqError: for an unknown role.
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

    def quantizer_of(self, site: Site) -> Quantizer | None:
        """Return a new quantizer for a site, not yet calibrated; None for full precision."""
        if site.is_weight:
            return self.weights.get(site.role, self.weight)()
        make = self.activations.get(site.role, self.activation)
        fixed = not isinstance(site.operator, QuantWeightLayer) or site.operator.fixed_positions
        return (make if fixed else self.run_time.get(site.role, make))()


@dataclass(frozen=True)
class Site:
    """The place of a quantizer: an operand of a quantizable operator.

    Attributes:
        name: operator and attribute, such as ``"blocks.0.attn.qkv.input_quantizer"``.
        operator: the layer or matrix product.
        attribute: ``"input_quantizer"``, ``"weight_quantizer"``, ``"left_quantizer"`` or ``"right_quantizer"``.
        role: the operand's role, one of `ROLES`.
    """

    name: str
    operator: QuantWeightLayer | QuantMatMul
    attribute: str
    role: str

    @property
    def is_weight(self) -> bool:
        """True for a weight, False for an activation."""
        return self.attribute == "weight_quantizer"

    @property
    def quantizer(self) -> Quantizer | None:
        """The site's quantizer; None in full precision."""
        found = getattr(self.operator, self.attribute)
        return found if isinstance(found, Quantizer) else None

    def attach(self, quantizer: nn.Module | None) -> None:
        """Give the site a quantizer.

        Args:
            quantizer: None for full precision.
        """
        setattr(self.operator, self.attribute, quantizer or nn.Identity())


_ATTRIBUTES = {
    QuantWeightLayer: ("input_quantizer", "weight_quantizer"),
    QuantMatMul: ("left_quantizer", "right_quantizer"),
}


def operators_of(model: nn.Module) -> Iterator[tuple[str, QuantWeightLayer | QuantMatMul]]:
    """Return name and operator of every quantizable layer and matrix product, in the order of registration."""
    for name, module in model.named_modules():
        if isinstance(module, (QuantWeightLayer, QuantMatMul)):
            yield name, module


def is_within(name: str, part: str) -> bool:
    """Return True if a module belongs to a part of its model.

    Args:
        name: name of the module.
        part: name of the part; ``""`` stands for all of the model.
    """
    return not part or f"{name}.".startswith(f"{part}.")


def sites_of(model: nn.Module, within: str = "") -> Iterator[Site]:
    """Return every site of a model, quantized or not, in the order of registration.

    Args:
        model: an adapted model (`adfq.adapters.adapt`), or one from `adfq.quantize` or `adfq.load`.
        within: the name of a part of the model; ``""``, the default, stands for all of it.
    """
    for name, operator in operators_of(model):
        if not is_within(name, within):
            continue
        if isinstance(operator, QuantMatMul):
            for attribute, role in zip(_ATTRIBUTES[QuantMatMul], operator.roles, strict=True):
                yield Site(f"{name}.{attribute}", operator, attribute, role)
        else:
            for attribute in _ATTRIBUTES[QuantWeightLayer]:
                yield Site(f"{name}.{attribute}", operator, attribute, operator.role)


def check_weights(model: nn.Module) -> None:
    """Raise AdfqError, with the layer's name, if weights were changed after quantization and left their grids.

    Args:
        model: model from `adfq.quantize` or `adfq.load`.
    """
    for name, layer in operators_of(model):
        if isinstance(layer, QuantWeightLayer) and not layer.is_on_grid():
            raise AdfqError(
                f"{name}.weight was changed after quantization (trained?) and is off its grid; "
                "adfq.requantize(model) rounds it to that again"
            )


@dataclass(frozen=True)
class Network:
    """The findings of an adapter: a model with explicit quantizable operators, and how they belong together.

    Attributes:
        model: computes the function of the original model until quantizers are attached.
        input_norms: by the name of a linear layer, the LayerNorm whose output it reads. Layers that share a norm, such
            as separate projections to queries, keys and values, are all there: nothing else reads its output. RepQ-ViT
            moves scales between a norm and its readers.
        input_paddings: by the name of such a layer, the value (C) that pads its input behind the norm.
        units: names of the parts that are reconstructed together (`adfq.reconstruction`): patch embedding, attentions,
            MLPs, patch mergings, heads. Each returns one tensor; an nn.Softmax in it marks its attention scores.
        unsupported: names of linear and convolution layers that the adapter has no rule for.
        excluded: patterns (`fnmatch`) of the names of layers that every method leaves in full precision.
        trunk: names of modules in series, in the order of the forward pass: patch embedding, blocks, patch mergings.
            Later values depend on an earlier module only through the output of the one before them, and through those
            of `trunk_outputs`. Calibration in batches goes from one to the next (`adfq.calibration.walk`).
        trunk_outputs: names of modules of the trunk, beside the last, whose outputs are read behind the trunk.
        forward_all: function from the model and images, which takes these through every layer; None where that is the
            model itself.
        streams: residual streams that can be rotated (`adfq.transforms.rotation`).
        heads: attentions whose heads can be rotated.
        unrotated: by the name of a part with another stream, or other heads, the reason why these cannot be rotated.
    """

    model: nn.Module
    input_norms: Mapping[str, nn.LayerNorm] = field(default_factory=dict)
    units: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    input_paddings: Mapping[str, Tensor] = field(default_factory=dict)
    trunk: tuple[str, ...] = ()
    trunk_outputs: tuple[str, ...] = ()
    forward_all: Callable[[nn.Module, Tensor], Any] | None = None
    excluded: tuple[str, ...] = ()
    streams: tuple[Stream, ...] = ()
    heads: tuple[Heads, ...] = ()
    unrotated: Mapping[str, str] = field(default_factory=dict)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the modules of the trunk that hold several units, such as an attention and an MLP."""
        return tuple(name for name in self.trunk if sum(is_within(unit, name) for unit in self.units) > 1)

    def run(self, images: Tensor) -> Any:
        """Return the model's output.

        Args:
            images: B×C×H×W; moved to the model's device and dtype.
        """
        placed = self.place(images)
        return self.model(placed) if self.forward_all is None else self.forward_all(self.model, placed)

    def place(self, images: Tensor) -> Tensor:
        """Return images on the model's device and in its dtype."""
        parameter = next(self.model.parameters())
        return images.to(parameter.device, parameter.dtype)

    def is_excluded(self, name: str) -> bool:
        """Return True for a layer that every method leaves in full precision.

        Args:
            name: name of the layer.
        """
        return any(fnmatchcase(name, pattern) for pattern in self.excluded)

    def weight_layers(self) -> Iterator[tuple[str, QuantWeightLayer]]:
        """Return name and layer of every quantizable linear and convolution layer, in the order of registration."""
        for name, operator in operators_of(self.model):
            if isinstance(operator, QuantWeightLayer):
                yield name, operator

    def matmuls(self) -> Iterator[tuple[str, QuantMatMul]]:
        """Return name and operator of every quantizable matrix product, in the order of registration."""
        for name, operator in operators_of(self.model):
            if isinstance(operator, QuantMatMul):
                yield name, operator

    def attach(self, recipe: Recipe) -> None:
        """Give every site its quantizer, not yet calibrated.

        Args:
            recipe: the quantizers by role.
        """
        for site in sites_of(self.model):
            site.attach(recipe.quantizer_of(site))

    def activation_quantizers(self, within: str = "") -> dict[str, Quantizer]:
        """Return the quantizer of every quantized activation by the name of its site.

        Args:
            within: the name of a part of the model; ``""``, the default, stands for all of it.
        """
        sites = sites_of(self.model, within)
        return {site.name: site.quantizer for site in sites if not site.is_weight and site.quantizer is not None}

    def full_precision(self) -> AbstractContextManager[None]:
        """Return a context that switches the model's quantizers off."""
        return full_precision(list(sites_of(self.model)))


@contextmanager
def full_precision(sites: Sequence[Site]) -> Iterator[None]:
    """Switch quantizers, and learned weights, off inside the block.

    Args:
        sites: places of the quantizers.
    """
    kept = [(site, getattr(site.operator, site.attribute)) for site in sites]
    layers = [site.operator for site in sites if isinstance(site.operator, QuantWeightLayer) and site.is_weight]
    learned = [(layer, layer.learned_weight) for layer in layers]
    try:
        for site in sites:
            site.attach(None)
        for layer in layers:
            layer.learned_weight = None
        yield
    finally:
        for site, quantizer in kept:
            site.attach(quantizer)
        for layer, weight in learned:
            layer.learned_weight = weight
