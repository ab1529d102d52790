"""Table of a method's quantizers at the sites of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from torch import nn

from adfq.layers import QuantMatMul, QuantWeightLayer
from adfq.quantizers import Quantizer
from adfq.sites import Network

STYLES = ("md", "csv")

_FULL = "full precision"
_HEADINGS = {
    "name": "Layer or product",
    "role": "Role",
    "shape": "Weight",
    "weight": "Weight quantizer",
    "input": "Input quantizer",
}


@dataclass(frozen=True)
class _Site:
    name: str
    role: str
    shape: tuple[int, ...]
    weight: str
    input: str


def tabulate_sites(model: nn.Module, network: Network | None) -> pd.DataFrame:
    """Return one row for each quantizable layer or matrix product, and then for each layer that the adapter leaves out.

    Rows are in the order of registration. A layer that is left out is any other module with a weight of two or more
    dimensions.

    Columns: ``name``; ``role``, a product's those of its operands; ``shape`` of the weight, a tuple, empty for a
    product; ``weight`` and ``input``, their quantizers, or ``"full precision"``, with the reason for a layer that is
    left out.

    Args:
        model: model, quantized or not.
        network: the adapted model, which knows the reasons; None for a model that no method has seen.
    """
    sites, others = [], []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, QuantWeightLayer):
            quantizers = _describe(module.weight_quantizer), _describe(module.input_quantizer)
            sites.append(_Site(name, module.role, tuple(module.weight.shape), *quantizers))
        elif isinstance(module, QuantMatMul):
            operands = f"{_describe(module.left_quantizer)}; {_describe(module.right_quantizer)}"
            sites.append(_Site(name, ", ".join(module.roles), (), "", operands))
        elif weight is not None and weight.dim() > 1:
            reason = "" if network is None else f": {_reason(name, module, network)}"
            others.append(_Site(name, "", tuple(weight.shape), f"{_FULL}{reason}", _FULL))
    return pd.DataFrame(sites + others)


def _describe(quantizer: nn.Module) -> str:
    return quantizer.describe() if isinstance(quantizer, Quantizer) else _FULL


def _reason(name: str, module: nn.Module, network: Network) -> str:
    if network.is_excluded(name):
        return "every method leaves out this part"
    if name in network.unsupported:
        return "there is no rule for it"
    return f"methods quantize no {type(module).__name__}"


def summarize_sites(frame: pd.DataFrame) -> str:
    """Return one line with the share of layers and weights in `tabulate_sites` that are quantized."""
    layers = frame[frame["shape"].map(bool)]
    sizes = layers["shape"].map(math.prod)
    quantized = ~layers["weight"].str.startswith(_FULL)
    share = sizes[quantized].sum() / sizes.sum()
    return f"{quantized.sum()} of {len(layers)} layers' weights quantized, {100 * share:.1f} % of their values"


def render_sites(frame: pd.DataFrame, style: str) -> str:
    """Return the table as text that ends in a newline.

    Args:
        frame: from `tabulate_sites`.
        style: ``"csv"``, or ``"md"`` for Markdown with the summary as its last line.
    """
    shown = frame.assign(shape=frame["shape"].map(lambda shape: "×".join(map(str, shape))))
    if style == "csv":
        return str(shown.to_csv(index=False))
    body = shown.rename(columns=_HEADINGS).to_markdown(index=False, disable_numparse=True)
    return f"{body}\n\n{summarize_sites(frame)}\n"
