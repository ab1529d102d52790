"""Shares of values that outlier-aware quantizers keep in full precision, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, nn

from adfq.adapters import adapt
from adfq.errors import AdfqError
from adfq.layers import QuantWeightLayer
from adfq.method import Bits, Method
from adfq.quantizers import OutlierQuantizer
from adfq.sites import sites_of
from benchmarks.report.figures import style
from benchmarks.report.figures.hooks import input_hooks

_LOOKS = ((style.COLORS[1], ""), (style.COLORS[5], "/////"), (style.COLORS[4], "....."), (style.COLORS[3], "xxxxx"))


def keeps_outliers(model: nn.Module, method: Method, bits: Bits) -> bool:
    """Return whether a method has quantizers that keep outliers of this model.

    Args:
        model: in full precision; it is left untouched.
        method: with its options.
        bits: any.

    Raises:
        AdfqError: for a model without an adapter.
    """
    network, recipe = adapt(copy.deepcopy(model)), method.recipe(bits)
    activations = (site for site in sites_of(network.model) if not site.is_weight)
    return any(isinstance(recipe.quantizer_of(site), OutlierQuantizer) for site in activations)


def collect_outliers(
    model: nn.Module, images: Tensor, forward: Callable[[nn.Module, Tensor], Any] = nn.Module.__call__
) -> pd.DataFrame:
    """Count the values that outlier-aware quantizers keep in full precision.

    Args:
        model: quantized model.
        images: preprocessed, B×C×H×W, on the model's device.
        forward: function that runs the model on images; by default, a call of the model.

    Returns:
        One row a layer, in the order of the forward pass: ``layer``, ``role``, ``threshold``, ``values`` (number of
        values seen), ``kept`` (number of outliers among them), ``percent`` (outliers, % of the values).

    Raises:
        AdfqError: for a model without such quantizers.
    """
    rows: dict[str, dict[str, Any]] = {}

    def count(name: str, role: str, quantizer: OutlierQuantizer, inputs: tuple[Tensor, ...]) -> None:
        first = {"layer": name, "role": role, "threshold": quantizer.threshold, "values": 0, "kept": 0}
        row = rows.setdefault(name, first)
        row["values"] += inputs[0].numel()
        row["kept"] += int(quantizer.outliers(inputs[0]).sum())

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantWeightLayer)]
    hooks = [
        (layer.input_quantizer, partial(count, name, layer.role))
        for name, layer in layers
        if isinstance(layer.input_quantizer, OutlierQuantizer)
    ]
    with input_hooks(hooks):
        forward(model.eval(), images)
    if not rows:
        raise AdfqError("the model has no quantizer that keeps outliers")
    frame = pd.DataFrame(list(rows.values()))
    return frame.assign(percent=100 * frame["kept"] / frame["values"])


def draw_outliers(frame: pd.DataFrame, file: Path) -> None:
    """Draw shares of `collect_outliers`, and write them.

    Args:
        frame: from `collect_outliers`.
        file: path to write, ``.png`` or ``.svg``.

    Raises:
        AdfqError: for another kind of file, or one that cannot be written.
    """
    style.save(plot_outliers(frame), file)


def plot_outliers(frame: pd.DataFrame) -> Figure:
    """Return a figure with a bar and a number for each layer; colour and hatch tell roles and thresholds apart.

    Args:
        frame: from `collect_outliers`.
    """
    figure = style.make_figure(0.75 * style.PAGE_WIDTH, style.rows_height(len(frame)), layout="constrained")
    axes = figure.subplots()
    groups = frame.groupby(["role", "threshold"], sort=False)
    for index, ((role, threshold), rows) in enumerate(groups):
        color, hatch = _LOOKS[index % len(_LOOKS)]
        label = f"{role}: kept beyond ±{threshold:g}"
        places = np.flatnonzero(frame["layer"].isin(rows["layer"]))
        axes.barh(places, rows["percent"], 0.7, color=color, hatch=hatch, edgecolor="black", linewidth=0.5, label=label)
    for place, percent in enumerate(frame["percent"]):
        axes.annotate(
            f"{percent:.2g}" if percent < 10 else f"{percent:.0f}",
            (percent, place),
            (2, 0),
            textcoords="offset points",
            va="center",
            fontsize=style.POINTS,
        )
    style.list_rows(axes, style.name_sites(list(frame["layer"]), list(frame["role"])))
    highest = float(frame["percent"].max())
    axes.set_xlim(0, 1.12 * highest if highest else 1)
    axes.set_xlabel("kept outliers, % of the layer's input values")
    if not highest:
        axes.set_title("No value is beyond the thresholds")
    style.dress(axes)
    figure.legend(loc="outside lower center", ncols=3, fontsize=style.POINTS, frameon=False)
    return figure
