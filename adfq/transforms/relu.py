"""MLPs with ReLU in the place of GELU, which have the same function only after a reconstruction."""

from __future__ import annotations

from torch import nn

from adfq.errors import AdfqError
from adfq.layers import QuantLinear
from adfq.sites import Network

_GELUS = ("GELU", "GELUTanh")  # torch's, and timm's of the same name


class SubstituteReLU(nn.ReLU):
    """A ReLU in the place of an MLP's GELU; a saved model names the MLPs that have one."""


def gelu_mlps(network: Network) -> tuple[str, ...]:
    """Return the names of the MLPs of two linear layers with a GELU between.

    Args:
        network: an adapted model.
    """
    parents = {name.rpartition(".")[0] for name, layer in network.weight_layers() if layer.role == "fc2"}
    names = (name for name, _ in network.model.named_modules() if name in parents)
    return tuple(name for name in names if is_gelu_mlp(network.model.get_submodule(name)))


def is_gelu_mlp(module: nn.Module) -> bool:
    """Return True for an MLP of two linear layers with a GELU between.

    Args:
        module: a module of an adapted model.
    """
    linears = [child for child in module.children() if isinstance(child, QuantLinear)]
    return len(linears) == 2 and type(getattr(module, "act", None)).__name__ in _GELUS


def linears_of(mlp: nn.Module) -> tuple[QuantLinear, QuantLinear]:
    """Return the two linear layers of an MLP.

    Args:
        mlp: one of `gelu_mlps`, before or after the substitution.
    """
    first, last = (child for child in mlp.children() if isinstance(child, QuantLinear))
    return first, last


def substitute_relu(model: nn.Module, name: str) -> None:
    """Put ReLU in the place of an MLP's GELU.

    Args:
        model: an adapted model.
        name: name of the MLP.

    Raises:
        AdfqError: for a module that is no such MLP.
    """
    found = dict(model.named_modules()).get(name)
    if found is None or not is_gelu_mlp(found):
        raise AdfqError(f"{name} is no MLP with a GELU")
    found.act = SubstituteReLU()
    linears_of(found)[1].role = "relu"


def substituted(model: nn.Module) -> list[str]:
    """Return the names of the MLPs that have ReLU in the place of GELU.

    Args:
        model: any model.
    """
    return [name.rpartition(".")[0] for name, module in model.named_modules() if isinstance(module, SubstituteReLU)]
