"""Distributions of activations after LayerNorm and after GELU, layer by layer."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from torch import Tensor, nn

from adfq.adapters import adapt
from adfq.errors import AdfqError
from adfq.layers import QuantWeightLayer
from adfq.sites import POST_NORM_ROLES
from benchmarks.report.figures import style
from benchmarks.report.figures.hooks import input_hooks

#: Percentiles by column.
PERCENTILES = {"min": 0, "p1": 1, "p25": 25, "p50": 50, "p75": 75, "p99": 99, "max": 100}

_KINDS = {**dict.fromkeys(POST_NORM_ROLES, "post-LayerNorm"), "fc2": "post-GELU"}
_TITLES = {"post-LayerNorm": "Post-LayerNorm activations", "post-GELU": "Post-GELU activations"}
_COLOR, _BOX = style.COLORS[4], style.COLORS[1]
# Ratio of the largest value to the bulk from which on a linear axis shows nothing of the bulk.
_LINEAR = 15


def collect_distributions(model: nn.Module, images: Tensor) -> pd.DataFrame:
    """Return percentiles of the inputs of layers behind LayerNorm and GELU, in full precision.

    One forward pass takes all images, and no activation outlives its layer: as much memory as calibration needs. The
    first input of a layer that is used several times counts, as in calibration.

    Args:
        model: model of a family with an adapter; not changed.
        images: B×C×H×W; moved to the model's device and dtype.

    Returns:
        One row a layer, in the order of the forward pass: ``layer``; ``role`` (`adfq.sites.ROLES`); ``kind``,
        ``"post-LayerNorm"`` or ``"post-GELU"``; and the columns of `PERCENTILES`, in the activation's units.

    Raises:
        AdfqError: for a model without adapter or without such layers, and for activations that hold NaN or infinity;
            the message names the layer.
    """
    network = adapt(copy.deepcopy(model).eval())
    rows: dict[str, dict[str, Any]] = {}

    def look(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QuantWeightLayer)
        if name in rows:
            return
        values = inputs[0].detach().float().cpu().numpy().flatten()  # a copy, which may be put in order
        found = np.percentile(values, list(PERCENTILES.values()), overwrite_input=True)
        if not np.isfinite(found).all():
            raise AdfqError(f"{name}: the activations are not finite")
        rows[name] = {"layer": name, "role": layer.role, "kind": _KINDS[layer.role]}
        rows[name] |= zip(PERCENTILES, found.tolist(), strict=True)

    layers = [(name, layer) for name, layer in network.weight_layers() if layer.role in _KINDS]
    with input_hooks((layer, partial(look, name)) for name, layer in layers):
        network.run(images)
    if not rows:
        raise AdfqError("the model has no layers behind LayerNorm or GELU")
    return pd.DataFrame(list(rows.values()))


def draw_distributions(frame: pd.DataFrame, file: Path) -> None:
    """Draw distributions of `collect_distributions`, and write them.

    Args:
        frame: from `collect_distributions`.
        file: path to write, ``.png`` or ``.svg``.

    Raises:
        AdfqError: for another kind of file, or one that cannot be written.
    """
    style.save(plot_distributions(frame), file)


def plot_distributions(frame: pd.DataFrame) -> Figure:
    """Return a figure with a panel for each kind of activations and a row for each layer.

    Args:
        frame: from `collect_distributions`.
    """
    kinds = [kind for kind in _TITLES if (frame["kind"] == kind).any()]
    rows = max(int((frame["kind"] == kind).sum()) for kind in kinds)
    figure = style.make_figure(style.PAGE_WIDTH, style.rows_height(rows), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        _draw(axes, frame[frame["kind"] == kind], rows)
        axes.set_title(_TITLES[kind])
        style.dress(axes)
    handles = [
        Line2D([], [], color=_COLOR, linewidth=0.7, marker="|", markersize=4, label="minimum to maximum"),
        Line2D([], [], color=_COLOR, linewidth=2, label="1st to 99th percentile"),
        Patch(facecolor=_BOX, edgecolor=_COLOR, linewidth=0.6, label="25th to 75th percentile"),
        Line2D([], [], color="black", linestyle="", marker="|", markersize=6, markeredgewidth=1.2, label="median"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=style.POINTS, frameon=False)
    return figure


def _draw(axes: Axes, frame: pd.DataFrame, rows: int) -> None:
    y, height = np.arange(len(frame)), 0.7 * len(frame) / rows  # the same in all panels
    axes.hlines(y, frame["min"], frame["max"], color=_COLOR, linewidth=0.7)
    for end in ("min", "max"):
        axes.plot(frame[end], y, "|", color=_COLOR, markersize=4, markeredgewidth=0.7)
    axes.hlines(y, frame["p1"], frame["p99"], color=_COLOR, linewidth=2)
    axes.barh(
        y, frame["p75"] - frame["p25"], height, frame["p25"], color=_BOX, edgecolor=_COLOR, linewidth=0.6, zorder=2.5
    )
    axes.plot(frame["p50"], y, "|", color="black", markersize=6, markeredgewidth=1.2, zorder=3)
    style.list_rows(axes, style.name_sites(list(frame["layer"]), list(frame["role"])))
    _scale(axes, frame)


def _scale(axes: Axes, frame: pd.DataFrame) -> None:
    """Set a linear axis if it shows the bulk, and one that is logarithmic beyond the bulk otherwise."""
    bulk = float(frame[["p25", "p75"]].abs().max(axis=1).median())
    if not 0 < bulk * _LINEAR < float(frame[["min", "max"]].abs().to_numpy().max()):
        axes.set_xlabel("activation value")
        return
    linear = 10.0 ** round(np.log10(bulk))  # a tick of the axis
    axes.set_xscale("symlog", linthresh=linear)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    axes.set_xlabel(f"activation value\n(logarithmic beyond ±{linear:g})")
