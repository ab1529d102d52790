"""Adapters, one file an architecture family, which make a model's matrix products explicit and name its sites."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from importlib.metadata import entry_points
from typing import Any, Protocol, cast

from torch import nn

from adfq.errors import AdfqError, one_line
from adfq.installed import find_point, find_points
from adfq.layers import QuantConv2d, QuantLinear
from adfq.plain import check_plain, problem_of
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
        arguments: keyword arguments of factory or class: numbers, strings, truth values, None, and tuples and mappings
            of them.
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
        AdfqError: for a model of another family, for a kind of attention that is not covered, and for a part in place
            of another that the adapter does not know.
    """
    adapter = find_adapter(family_of(model))
    _separate(model, {model})
    for module in model.modules():
        if getattr(module, "grad_checkpointing", False):
            module.grad_checkpointing = cast(Any, False)  # checkpoints run parts again, unseen by what looks at them
    with _odd_parts(model):
        network = adapter.adapt(model)
    model.train(model.training)  # the new layers too
    return replace_fields(network, unsupported=_find_unsupported(network), input_norms=_unshared_norms(network))


def describe(model: nn.Module) -> Architecture:
    """Describe a model that `adapt` has not changed yet.

    Arguments that cannot be told from the model keep their defaults, so that `create` may build another one.

    Args:
        model: instance of a supported class or of a subclass of one.

    Raises:
        AdfqError: for a model without an adapter, and for a part in place of another that the adapter does not know.
    """
    family = family_of(model)
    adapter = find_adapter(family)
    with _odd_parts(model):
        return adapter.describe(model, family)


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


@contextmanager
def _odd_parts(model: nn.Module) -> Iterator[None]:
    """Raise AdfqError for what an adapter does not find in a model whose parts were replaced."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise AdfqError(
            f"cannot quantize this {type(model).__name__}, a part of which was replaced: {one_line(error)}"
        ) from error


def build_error(what: str, error: Exception) -> AdfqError:
    """Return the error for a description that a constructor does not take.

    Args:
        what: name of what was to be built.
        error: the constructor's error.
    """
    return AdfqError(f"cannot build {what}: {one_line(error)}")


def copy_around_tensors(module: nn.Module) -> nn.Module:
    """Return a copy of a module that has the same parameters and buffers, not copies of these.

    Args:
        module: any module.
    """
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def qualified_name(cls: type) -> str:
    """Return module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def families() -> tuple[str, ...]:
    """Return the qualified names of the classes that have an adapter, in any installed package."""
    return tuple(sorted({point.name for point in find_points(entry_points, ENTRY_POINT_GROUP)}))


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
    point = find_point(entry_points, ENTRY_POINT_GROUP, family)
    if point is None:
        raise AdfqError(f"there is no adapter for {family!r}")
    try:
        adapter: Adapter = point.load()
    except ImportError as error:
        raise AdfqError(f"the adapter for {family} cannot be imported: {error}") from None
    return adapter


def _separate(module: nn.Module, seen: set[nn.Module]) -> None:
    """Give a module in several places, such as a head of all decoder layers, a copy in each, with shared parameters."""
    for name, child in module._modules.items():
        if child is None or (child in seen and next(child.parameters(), None) is None):
            continue
        if child in seen:
            module._modules[name] = child = copy_around_tensors(child)
        seen.add(child)
        _separate(child, seen)


def _unshared_norms(network: Network) -> dict[str, nn.LayerNorm]:
    """Return the norms whose parameters nothing else has: scales that move into a shared one would move twice."""
    uses = Counter(id(parameter) for _, parameter in network.model.named_parameters(remove_duplicate=False))
    return {
        name: norm
        for name, norm in network.input_norms.items()
        if all(uses[id(parameter)] == 1 for parameter in norm.parameters())
    }


def _find_unsupported(network: Network) -> tuple[str, ...]:
    layers = (name for name, module in network.model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    return tuple(name for name in layers if not network.is_excluded(name))


def pair(norms: dict[str, nn.LayerNorm], linear: str, norm: nn.Module | None) -> None:
    """Record that `linear` reads a norm's output, and nothing else does but linear layers that are recorded too.

    Only a LayerNorm that computes as its class does is paired, since its weight and bias must scale its output.

    Args:
        norms: LayerNorms by the name of a reader; the pair is added.
        linear: name of the linear layer.
        norm: module before the layer; None for none.
    """
    if isinstance(norm, nn.LayerNorm) and problem_of(norm, nn.LayerNorm) is None:
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
        AdfqError: for a layer of another kind, and one that computes something else than its class does.
    """
    layer = model.get_submodule(name)
    twin = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    check_plain(layer, twin.replaces, name)
    try:
        model.set_submodule(name, twin(layer, role, fixed_positions))  # type: ignore[arg-type]
    except AdfqError as error:
        raise AdfqError(f"{name}: {error}") from None


def replace_attention(
    model: nn.Module,
    name: str,
    cls: type[nn.Module],
    make: Callable[[Any], nn.Module],
    linears: Sequence[str] = ("qkv", "proj"),
) -> nn.Module:
    """Replace an attention by one with explicit matrix products, and return that.

    Args:
        model: model with the attention.
        name: name of the attention.
        cls: class whose forward the replacement computes.
        make: function from the attention to its replacement.
        linears: names of the attention's linear layers, which are replaced too.

    Raises:
        AdfqError: for an attention, linear layer or softmax that computes something else than its class does.
    """
    attention = model.get_submodule(name)
    check_plain(attention, cls, name)
    for linear in linears:
        check_plain(getattr(attention, linear), nn.Linear, f"{name}.{linear}")
    softmax = getattr(attention, "softmax", None)
    if softmax is not None:
        check_plain(softmax, nn.Softmax, f"{name}.softmax")
    replacement = make(attention)
    model.set_submodule(name, replacement)
    return replacement
