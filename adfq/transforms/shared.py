"""Look-ups of layers and parameters that several transformations have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from adfq.layers import QuantWeightLayer


def weight_layer(model: nn.Module, name: str) -> QuantWeightLayer:
    """Return a quantizable layer by its name.

    Args:
        model: an adapted model.
        name: name of the layer.
    """
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantWeightLayer)
    return layer


def shared_parameter(model: nn.Module, names: Iterable[str]) -> str | None:
    """Return a sentence that names a parameter in several places of a model; None if there is none among the given.

    Args:
        model: any model.
        names: names of parameters; those that do not exist, such as a missing bias, are passed over.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, parameters.values()))
    for name in names:
        if name in parameters and uses[id(parameters[name])] > 1:
            return f"{name} is used in several places"
    return None
