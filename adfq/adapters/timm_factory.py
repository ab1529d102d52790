"""Description and construction of a model, for all of timm's families."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import nn

from adfq.adapters import Architecture, build_error, qualified_name
from adfq.errors import AdfqError


def is_present(layer: nn.Module) -> bool:
    """Return True for a layer that is not replaced by nn.Identity."""
    return not isinstance(layer, nn.Identity)


def hidden_ratio(hidden: int, width: int) -> float:
    """Return the factor that timm multiplies `width` with, and truncates, to get `hidden`.

    Args:
        hidden: number of an MLP's hidden channels.
        width: number of its input channels.
    """
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def timm_names(*modules: str, refused: Sequence[str] = ()) -> list[str]:
    """Return timm's names of models.

    Args:
        *modules: modules of ``timm.models``.
        refused: patterns of names to leave out; none by default.
    """
    return [name for module in modules for name in timm.list_models(module=module, exclude_filters=refused)]


def describe_timm(model: Any, family: str, arguments: Mapping[str, Any]) -> Architecture:
    """Describe a model by a family's own arguments and those that all of timm's families have.

    Args:
        model: timm's model, not adapted.
        family: qualified name of the supported class.
        arguments: the family's own arguments.
    """
    size = tuple(model.patch_embed.img_size)
    channels = model.in_chans if hasattr(model, "in_chans") else model.patch_embed.proj.weight.shape[1]
    shared = {
        "img_size": size,
        "patch_size": tuple(model.patch_embed.patch_size),
        "in_chans": channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool if hasattr(model, "global_pool") else model.head.global_pool.pool_type,
    }
    return Architecture(
        family, qualified_name(type(model)), _name(model), {**shared, **arguments}, (channels, size[0], size[1])
    )


def create_timm(architecture: Architecture, family: type[nn.Module], *others: type[nn.Module]) -> nn.Module:
    """Build a model through timm's factory, or from its class if the factory has no name for it.

    Args:
        architecture: from `describe_timm`.
        family: supported class.
        *others: subclasses that may be built too.

    Raises:
        AdfqError: for an unknown class, name or argument, and for a name that gives another class.
    """
    name, arguments = architecture.name, dict(architecture.arguments)
    unknown = sorted(arguments.keys() - inspect.signature(family).parameters.keys())
    if unknown:  # pretrained and checkpoint_path would be such; they are not part of an architecture
        raise AdfqError(f"a {family.__name__} has no argument {unknown[0]!r}")
    classes = {qualified_name(cls): cls for cls in (family, *others)}
    if name is None and architecture.cls not in classes:
        raise AdfqError(f"there is no way to build a {architecture.cls} that is not one of timm's named models")
    if name is not None and not timm.is_model(name):
        raise AdfqError(f"timm {timm.__version__} has no model {name!r}")
    try:
        model = classes[architecture.cls](**arguments) if name is None else timm.create_model(name, **arguments)
    except Exception as error:  # whatever a constructor makes of its arguments
        raise build_error(name or architecture.cls, error) from None
    if qualified_name(type(model)) != architecture.cls:
        raise AdfqError(f"{name} is a {qualified_name(type(model))}, not a {architecture.cls}")
    return model


def _name(model: nn.Module) -> str | None:
    """Return timm's name of the model, with its tag if there is one, because mean and std can depend on it."""
    known = getattr(model, "pretrained_cfg", None)
    if not isinstance(known, dict) or not timm.is_model(known.get("architecture") or ""):
        return None
    name: str = known["architecture"]
    tagged = f"{name}.{known.get('tag')}"
    return tagged if timm.is_model_pretrained(tagged) else name
