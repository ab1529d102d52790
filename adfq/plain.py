"""The check that a module computes exactly what its class does, before another one takes its place."""

from __future__ import annotations

import re
from functools import cache
from types import FunctionType, NoneType
from typing import Any, cast

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from adfq.errors import AdfqError

#: Subclasses, by qualified name, whose forward computes the same as their base's.
_SAME = frozenset(
    {
        "mmcv.cnn.bricks.wrappers.Conv2d",
        "mmcv.cnn.bricks.wrappers.Linear",
        "timm.layers.linear.Linear",
        "timm.layers.norm.LayerNorm",
        "timm.layers.norm.LayerNormFp32",
    }
)

#: nn.Module's attribute of an instance that `compile` sets: it computes what the class does.
_COMPILED = "_compiled_call_impl"

#: Names of methods that forward does not call.
_WITHOUT_EFFECT = re.compile(r"__\w+__|_?init_\w+|reset_\w+|set_\w+|extra_repr|no_weight_decay")

#: Methods, beside forward, by which a subclass or instance could compute something else.
_METHODS = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")


def check_plain(module: Any, cls: type[nn.Module], name: str = "") -> None:
    """Raise AdfqError unless a module computes exactly what a class's forward does with the module's parameters.

    Args:
        module: module that is to be replaced.
        cls: class whose forward the replacement computes.
        name: name of the module for the message; ``""``, the default, for none.

    Raises:
        AdfqError: for another class, a forward of its own, hooks, and parameters that are computed (parametrizations,
            weight norm, pruning).
    """
    if problem := problem_of(module, cls):
        raise AdfqError(f"{f'{name}: ' if name else ''}cannot quantize {problem}; merge it into a plain {cls.__name__}")


def problem_of(module: Any, cls: type[nn.Module]) -> str | None:
    """Return the reason why a module may not compute what a class's forward does; None for none.

    Args:
        module: any module.
        cls: class.
    """
    kind = type(module).__name__
    if not isinstance(module, cls):
        return f"a {kind} in place of a {cls.__name__}"
    computed = [key for key in ("weight", "bias") if _is_computed(module, cls, key)]
    if is_parametrized(module):
        computed += cast(Any, module.parametrizations)
    if computed:
        return f"a {kind} whose {computed[0]} is computed when it is read (parametrization, weight norm, pruning, LoRA)"
    if not keeps_forward(module, cls):
        return f"a {kind} with a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"a {kind} with forward hooks"
    return None


def keeps_forward(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Return True if a module's forward is that of one of some classes, whatever hooks there are.

    Args:
        module: any module.
        *classes: classes.
    """
    if any(callable(value) and hasattr(type(module), key) for key, value in vars(module).items() if key != _COMPILED):
        return False
    for cls in classes:
        if isinstance(module, cls) and all(
            getattr(type(module), method, None) is getattr(cls, method, None) for method in _methods_of(cast(Any, cls))
        ):
            owner: Any = next(base for base in type(module).__mro__ if "forward" in vars(base))
            return owner.forward is cls.forward or f"{owner.__module__}.{owner.__qualname__}" in _SAME
    return False


@cache
def _methods_of(cls: Any) -> tuple[str, ...]:
    """Return the names of the methods and properties of a class that can change its forward's result."""
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    kinds = (FunctionType, property, staticmethod, classmethod)
    own = {name for base in bases for name, value in vars(base).items() if isinstance(value, kinds)}
    return (*_METHODS, *sorted(name for name in own if name != "forward" and not _WITHOUT_EFFECT.fullmatch(name)))


def _is_computed(module: nn.Module, cls: type[nn.Module], key: str) -> bool:
    """Return True if an attribute, which modules of the class have as a parameter, is something else."""
    if not issubclass(cls, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)):
        return False
    if key not in module._parameters or hasattr(type(module), key):
        return True
    # A subclass of nn.Parameter, or one around another tensor class, computes its own way.
    allowed = (
        (nn.Parameter,) if key == "weight" and issubclass(cls, (nn.Linear, nn.Conv2d)) else (nn.Parameter, NoneType)
    )
    return type(module._parameters[key]) not in allowed
