"""Magnitudes in the residual stream, where single tokens of real models hold massive values."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, nn

from adfq.adapters import adapt
from adfq.errors import AdfqError
from benchmarks.report.figures import style
from benchmarks.report.figures.hooks import input_hooks

#: Columns with magnitudes by their label in the figure.
MAGNITUDES = {
    "largest": "largest",
    "second": "second channel of the same token",
    "p99": "99th percentile",
    "median": "median",
}


def collect_residuals(model: nn.Module, images: Tensor) -> pd.DataFrame:
    """Return magnitudes of the inputs of the LayerNorms in front of attentions and MLPs, in full precision.

    Args:
        model: model of a family with an adapter; not changed.
        images: B×C×H×W; moved to the model's device and dtype.

    Returns:
        One row a LayerNorm, in the order of the forward pass: ``layer``, the reader of its output; ``largest``, the
        largest magnitude; ``second``, the next one in the same token, of another channel; ``p99`` and ``median`` of all
        magnitudes; ``token`` and ``channel``, the largest one's indices; ``images``, the share in percent of images
        whose largest magnitude is in that channel.

    Raises:
        AdfqError: for a model without adapter, or without such LayerNorms.
    """
    network = adapt(copy.deepcopy(model).eval())
    rows: dict[str, dict[str, Any]] = {}

    def look(name: str, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name in rows:
            return
        values = inputs[0].detach().float().abs().flatten(1, -2)  # B×N×C
        channels = values.shape[-1]
        best = values.flatten(1).max(1)
        image = int(best.values.argmax())
        token, channel = divmod(int(best.indices[image]), channels)
        largest, second = values[image, token].topk(2).values.tolist()
        ordered = values.flatten().sort().values
        rows[name] = {
            "layer": name,
            "largest": largest,
            "second": second,
            "p99": float(ordered[int(0.99 * (len(ordered) - 1))]),
            "median": float(ordered[len(ordered) // 2]),
            "token": token,
            "channel": channel,
            "images": 100 * float((best.indices % channels == channel).double().mean()),
        }

    readers = {id(norm): (name, norm) for name, norm in reversed(list(network.input_norms.items()))}
    with input_hooks((norm, partial(look, name)) for name, norm in readers.values()):
        network.run(images)
    if not rows:
        raise AdfqError("the model has no LayerNorm in front of attention or MLP")
    return pd.DataFrame(list(rows.values()))


def draw_residuals(frame: pd.DataFrame, file: Path) -> None:
    """Draw magnitudes of `collect_residuals`, and write them.

    Args:
        frame: from `collect_residuals`.
        file: path to write, ``.png`` or ``.svg``.

    Raises:
        AdfqError: for another kind of file, or one that cannot be written.
    """
    style.save(plot_residuals(frame), file)


def plot_residuals(frame: pd.DataFrame) -> Figure:
    """Return a figure with a line for each kind of magnitude over the layers.

    Args:
        frame: from `collect_residuals`.
    """
    figure = style.make_figure(style.PAGE_WIDTH, 0.4 * style.PAGE_WIDTH, layout="constrained")
    axes = figure.subplots()
    for index, (column, label) in enumerate(MAGNITUDES.items()):
        axes.plot(frame[column], marker=".", linewidth=1, color=style.COLORS[index], label=label)
    axes.set_yscale("log")
    names = [
        layer.removeprefix("blocks.").replace(".attn.qkv", " qkv").replace(".mlp.fc1", " fc1")
        for layer in frame["layer"]
    ]
    axes.set_xticks(range(len(frame)), names, rotation=90)
    axes.set_ylabel("magnitude in the residual stream")
    axes.grid(axis="y", color="#D9D9D9", linewidth=0.5)
    style.dress(axes)
    figure.legend(loc="outside lower center", ncols=4, fontsize=style.POINTS, frameon=False)
    return figure
