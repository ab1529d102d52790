"""Adapters, one file an architecture family, which make a model's matrix products explicit and name its sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from importlib.metadata import entry_points
from typing import Any, Protocol

from torch import nn

from adfq.errors import AdfqError
from adfq.layers import QuantConv2d, QuantLinear
from adfq.sites import Network

#: Each entry point is named after a class of models and refers to the module of its adapter, so that a framework is
#: imported only for one of its models.
ENTRY_POINT_GROUP = "adfq.adapters"


class Adapter(Protocol):
    """The functions of an adapter's module.

    A module for models of timm may also have ``model_names()``, which returns timm's names of those that it adapts.
    """

    __name__: str

    def adapt(self, model: nn.Module) -> Network:
        """Replace, in place, the layers that methods quantize; see `adapt`."""

    def describe(self, model: Any, family: str) -> Architecture:
        """Describe a model that `adapt` has not changed yet; see `describe`."""

    def create(self, architecture: Architecture) -> nn.Module:
        """Build a model from its description; see `create`."""


@dataclass(frozen=True)
class Architecture:
    """Description of a model without its weights, as far as the model tells it.

    Attributes:
        family: qualified name of the supported class that the model is an instance of.
        cls: qualified name of the model's own class.
        name: name in the family's factory; None for a model that was made from its class.
        arguments: keyword arguments of factory or class: numbers, strings, truth values and tuples of them.
        input_size: channels, height and width in pixels.
    """

    family: str
    cls: str
    name: str | None
    arguments: Mapping[str, Any]
    input_size: tuple[int, int, int]


def adapt(model: nn.Module) -> Network:
    """Replace, in place, the layers that methods quantize by their quantizable twins.

    Args:
        model: instance of a supported class or of a subclass of one.

    Raises:
        AdfqError: for a model of another family, and for a kind of attention that is not covered.
    """
    network = find_adapter(family_of(model)).adapt(model)
    model.train(model.training)  # the new layers too
    return replace_fields(network, unsupported=_find_unsupported(network))


def describe(model: nn.Module) -> Architecture:
    """Describe a model that `adapt` has not changed yet.

    Arguments that cannot be told from the model keep their defaults, so that `create` may build another one.

    Args:
        model: instance of a supported class or of a subclass of one.

    Raises:
        AdfqError: for a model without an adapter.
    """
    family = family_of(model)
    return find_adapter(family).describe(model, family)


def create(architecture: Architecture) -> nn.Module:
    """Build a model from its description, with random weights.

    Descriptions may come from a file that nobody vouches for: only supported classes and names of the family's factory
    are built, and nothing is downloaded.

    Args:
        architecture: from `describe`, or read from a file.

    Raises:
        AdfqError: for a description that cannot be built.
    """
    return find_adapter(architecture.family).create(architecture)


def qualified_name(cls: type) -> str:
    """Return module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def families() -> tuple[str, ...]:
    """Return the qualified names of the classes that have an adapter, in any installed package."""
    return tuple(sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)}))


def family_of(model: nn.Module) -> str:
    """Return the qualified name of the class with an adapter that a model is an instance of.

    Args:
        model: any model.

    Raises:
        AdfqError: for a model without an adapter.
    """
    known = families()
    for name in map(qualified_name, type(model).__mro__):
        if name in known:
            return name
    supported = ", ".join(f"{name.split('.')[0]}'s {name.rsplit('.', 1)[1]}" for name in known)
    raise AdfqError(f"cannot quantize a {type(model).__name__}; supported are {supported}")


def find_adapter(family: str) -> Adapter:
    """Return the adapter of a class of models.

    Args:
        family: the class's qualified name.

    Raises:
        AdfqError: for a class that no installed package has an adapter for, and for one whose framework is missing.
    """
    found = entry_points(group=ENTRY_POINT_GROUP, name=family)
    if not found:
        raise AdfqError(f"there is no adapter for {family!r}")
    try:
        adapter: Adapter = next(iter(found)).load()
    except ImportError as error:
        raise AdfqError(f"the adapter for {family} cannot be imported: {error}") from None
    return adapter


def _find_unsupported(network: Network) -> tuple[str, ...]:
    layers = (name for name, module in network.model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    return tuple(name for name in layers if not network.is_excluded(name))


def pair(norms: dict[str, nn.LayerNorm], linear: str, norm: nn.Module | None) -> None:
    """Record that `linear` is the only reader of a norm's output; only LayerNorms are paired.

    Args:
        norms: LayerNorms by the name of their reader; the pair is added.
        linear: name of the linear layer.
        norm: module before the layer; None for none.
    """
    if isinstance(norm, nn.LayerNorm):
        norms[linear] = norm


def replace(model: nn.Module, name: str, role: str, fixed_positions: bool = True) -> None:
    """Replace a linear or convolution layer by its quantizable twin (`adfq.layers`).

    Args:
        model: model with the layer.
        name: name of the layer.
        role: site role (`adfq.sites.ROLES`) of its input and weight.
        fixed_positions: True, the default, if all inputs have the same token positions; False where they depend on the
            image's size.

    Raises:
        AdfqError: for a layer of another kind.
    """
    layer = model.get_submodule(name)
    if isinstance(layer, nn.Linear):
        model.set_submodule(name, QuantLinear(layer, role, fixed_positions))
    elif isinstance(layer, nn.Conv2d):
        model.set_submodule(name, QuantConv2d(layer, role, fixed_positions))
    else:
        raise AdfqError(f"{name}: cannot quantize a {type(layer).__name__}")
