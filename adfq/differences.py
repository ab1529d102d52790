"""Comparison of two models by their modules, without the values of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from numpy.random import RandomState
from torch import Tensor, nn

from adfq.adapters import qualified_name
from adfq.quantizers import Quantizer

# Attributes that decide no output of a model in evaluation mode: nn.Module's own, notes about the model, choices of
# training and initialization, the past of timm's Swin (_ref_…), and MMDetection's config and initialization.
# fused_attn follows from the machine.
_WITHOUT_EFFECT = frozenset(vars(nn.Module())) | {
    "pretrained_cfg",
    "pretrained_model_args",
    "default_cfg",
    "_model_args",
    "feature_info",
    "quantization",
    "grad_checkpointing",
    "weight_init_mode",
    "fix_init",
    "init_values",
    "_ref_window_sizes",
    "_ref_grid_size",
    "fused_attn",
    "cfg",
    "dataset_meta",
    "init_cfg",
    "_is_init",
    "_params_init_info",
}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")

# Modules that return their input in evaluation mode; timm makes nn.Identity of them at a rate of 0.
_INACTIVE = {
    "torch.nn.modules.linear.Identity",
    "timm.layers.drop.DropPath",
    "timm.layers.patch_dropout.PatchDropout",
}


def first_difference(original: nn.Module, rebuilt: nn.Module) -> str | None:
    """Return the first difference of two models' modules as a phrase; None for models that compute the same.

    Compared are names, types, attributes and buffers outside of the state dict. Parts that act in training alone do not
    count, and neither do weights.

    Args:
        original: model as it should be.
        rebuilt: model to compare with it.
    """
    return _compare(original, rebuilt, set())


def _compare(original: nn.Module, rebuilt: nn.Module, seen: set[tuple[int, int]]) -> str | None:
    seen.add((id(original), id(rebuilt)))
    others = dict(rebuilt.named_modules(remove_duplicate=False))
    modules = dict(original.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        shown = name or "the model"
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return f"{shown} has a forward hook, which no file keeps"
        other = others.get(name)
        if other is None:
            if not _is_inactive(module):
                return f"{shown}, a {type(module).__name__}, is missing"
        elif problem := _compare_module(shown, module, other, seen):
            return problem
    for name in others.keys() - modules.keys():
        if not _is_inactive(others[name]):
            return f"{name}, a {type(others[name]).__name__}, is added"
    return None


def _compare_module(name: str, module: nn.Module, other: nn.Module, seen: set[tuple[int, int]]) -> str | None:
    if _is_inactive(module) and _is_inactive(other):
        return None
    found, wanted = (f"{type(each).__name__}({each.extra_repr()})" for each in (other, module))
    if type(module) is not type(other) or found != wanted:
        return f"{name} becomes {found} in place of {wanted}"
    if isinstance(module, nn.Sequential) and list(module._modules) != list(other._modules):
        return f"{name} has its parts in another order"
    own, others = _attributes(module), _attributes(other)
    for key in sorted(own.keys() | others.keys()):
        if key not in own or key not in others:
            return f"{name}.{key} is {'added' if key in others else 'missing'}"
        if not _same(own[key], others[key], seen):
            return f"{name}.{key} becomes {_show(others[key])} in place of {_show(own[key])}"
    return None


def _is_inactive(module: nn.Module) -> bool:
    cls = type(module)  # a subclass may do anything
    inactive = cls.__module__ == "torch.nn.modules.dropout" or qualified_name(cls) in _INACTIVE
    return inactive and "forward" not in vars(module)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes, and its buffers that are not in the state dict.

    A quantizer's private ones are notes of its calibration: its arguments and its state decide the output.
    """
    values = {key: value for key, value in vars(module).items() if key not in _WITHOUT_EFFECT}
    values |= {key: module._buffers[key] for key in module._non_persistent_buffers_set}
    private = isinstance(module, Quantizer)
    return {key: value for key, value in values.items() if not (private and key.startswith("_"))}


def _same(a: Any, b: Any, seen: set[tuple[int, int]]) -> bool:
    """Return True for equal values; a list is like a tuple, NaN like NaN, a function like another with its code."""
    if a is b or (id(a), id(b)) in seen:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(*pair, seen) for pair in zip(a, b, strict=True))
    if isinstance(a, (bool, int, float, complex)) and isinstance(b, (bool, int, float, complex)):
        return a == b or (a != a and b != b)
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(value, b[key], seen) for key, value in a.items())
    if isinstance(a, nn.Module):
        state = (dict(a.state_dict()), dict(b.state_dict()))
        return _compare(a, b, seen) is None and _same(*state, seen)
    return _same_object(a, b, seen | {(id(a), id(b))})


def _same_object(a: Any, b: Any, seen: set[tuple[int, int]]) -> bool:
    """Compare values of one type that is neither a number nor a collection."""
    if isinstance(a, FunctionType):
        return a.__code__ == b.__code__ and _same(_bound_values(a), _bound_values(b), seen)
    if isinstance(a, MethodType):
        return a.__func__ is b.__func__ and type(a.__self__) is type(b.__self__)
    if isinstance(a, RandomState):  # MMDetection's samplers draw from one, in training
        return True
    if isinstance(a, partial):
        return _same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), seen)
    try:
        if bool(a == b):
            return True
    except Exception:  # an array compares element by element, other types as they like
        return False
    return hasattr(a, "__dict__") and not isinstance(a, type) and _same(vars(a), vars(b), seen)


def _bound_values(function: FunctionType) -> Sequence[Any]:
    closed = tuple(cell.cell_contents for cell in function.__closure__ or ())
    return closed, function.__defaults__, function.__kwdefaults__


def _show(value: Any, length: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= length else f"{text[:length]} …"
