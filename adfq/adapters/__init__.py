"""Adapters: one file an architecture family. Each makes a model's matrix products explicit and names its sites."""

from __future__ import annotations

import importlib

from torch import nn

from adfq.errors import AdfqError
from adfq.layers import QuantConv2d, QuantLinear
from adfq.sites import Network

# By qualified class name, so that a framework is imported only when one of its models is at hand.
_ADAPTERS = {
    "timm.models.vision_transformer.VisionTransformer": "adfq.adapters.timm_vit",
    "timm.models.swin_transformer.SwinTransformer": "adfq.adapters.timm_swin",
}


def adapt(model: nn.Module) -> Network:
    """Replaces, in place, the layers that methods quantize by their quantizable twins.

    Args:
        model: an instance of a supported class or of a subclass of one.

    Raises:
        AdfqError: for a model of another family, or one with a kind of attention that is not covered.
    """
    for cls in type(model).__mro__:
        module = _ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if module:
            network: Network = importlib.import_module(module).adapt(model)
            model.train(model.training)  # the new layers too
            return Network(network.model, network.norms, _left_over(model))
    families = ", ".join(name.rsplit(".", 1)[1] for name in _ADAPTERS)
    raise AdfqError(f"cannot quantize a {type(model).__name__}; supported are {families} of timm")


def _left_over(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)))


def pair(norms: dict[str, nn.LayerNorm], linear: str, norm: nn.Module | None) -> None:
    """Records that the layer `linear` alone reads what `norm` gives; only LayerNorms can be paired."""
    if isinstance(norm, nn.LayerNorm):
        norms[linear] = norm


def replace(model: nn.Module, name: str, role: str) -> None:
    """Replaces the linear or convolution layer `name` of `model` by its quantizable twin."""
    layer = model.get_submodule(name)
    if isinstance(layer, nn.Linear):
        model.set_submodule(name, QuantLinear(layer, role))
    elif isinstance(layer, nn.Conv2d):
        model.set_submodule(name, QuantConv2d(layer, role))
    else:
        raise AdfqError(f"{name}: cannot quantize a {type(layer).__name__}")
