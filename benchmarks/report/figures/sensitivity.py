"""Error of a model's output with one kind of site quantized at a time, method by method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from adfq.adapters import adapt
from adfq.calibration import CalibrationImages, check_input
from adfq.errors import AdfqError
from adfq.method import Bits, Method, Run
from adfq.sites import Network, Site, sites_of
from benchmarks.report.figures import style

#: Parts beside the roles of activations.
WEIGHTS, ACTIVATIONS, ALL = "weights", "all activations", "weights and activations"


def collect_sensitivity(
    model: nn.Module,
    methods: Mapping[str, Method],
    bits: Bits,
    calibration: Tensor,
    images: Tensor,
    infer: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Return the error of a model's output with some sites quantized and all others in full precision.

    Each method is calibrated once for the whole model; then the quantizers of other sites are taken away.

    Args:
        model: in full precision, on the device to run on; it is left untouched.
        methods: methods by label.
        bits: bit-widths of weights and activations.
        calibration: images to calibrate on, B×C×H×W.
        images: images to measure on, B×C×H×W.
        infer: function from a model and images to its output, B×…; by default, a call of the model.
        batch_size: images a batch.

    Returns:
        One row a method and part: ``method``; ``part``, a role of activations, `WEIGHTS`, `ACTIVATIONS` or `ALL`;
        ``error``, the mean over images of the output's relative error in percent.

    Raises:
        AdfqError: for a model without an adapter, and a method that cannot be applied to it.
    """
    rows = []
    for label, method in methods.items():
        network = adapt(copy.deepcopy(model).eval())
        if reason := method.supports(network):
            raise AdfqError(f"{label}: {reason}")
        run = Run(CalibrationImages([calibration]))
        check_input(network, run.images)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            method.apply(network, run, bits)
        with network.full_precision():
            reference = _run(network, images, infer, batch_size)
        for part, keep in _parts(network).items():
            error = _error_with(network, keep, reference, images, infer, batch_size)
            rows.append({"method": label, "part": part, "error": error})
    return pd.DataFrame(rows)


def _parts(network: Network) -> dict[str, Callable[[Site], bool]]:
    activations = [site for site in sites_of(network.model) if not site.is_weight and site.quantizer]
    return {
        WEIGHTS: lambda site: site.is_weight,
        **{role: partial(_is_activation, role=role) for role in dict.fromkeys(site.role for site in activations)},
        ACTIVATIONS: lambda site: not site.is_weight,
        ALL: lambda site: True,
    }


def _is_activation(site: Site, role: str) -> bool:
    return not site.is_weight and site.role == role


@torch.no_grad()
def _error_with(
    network: Network, keep: Callable[[Site], bool], reference: Tensor, images: Tensor, infer: Any, batch_size: int
) -> float:
    taken = [(site, site.quantizer) for site in sites_of(network.model) if not keep(site)]
    for site, _ in taken:
        site.attach(None)
    try:
        output = _run(network, images, infer, batch_size)
    finally:
        for site, quantizer in taken:
            site.attach(quantizer)
    return relative_error(output, reference)


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Return the mean over images of an output's relative error in percent.

    Args:
        output: B×C.
        reference: B×C, in full precision.
    """
    return 100 * float(((output - reference).norm(dim=1) / reference.norm(dim=1)).mean())


@torch.no_grad()
def _run(network: Network, images: Tensor, infer: Callable[[nn.Module, Tensor], Tensor], batch_size: int) -> Tensor:
    outputs = (infer(network.model, network.place(batch)) for batch in images.split(batch_size))
    return torch.cat([output.float().flatten(1) for output in outputs])


def draw_sensitivity(frame: pd.DataFrame, file: Path) -> None:
    """Draw errors of `collect_sensitivity`, and write them.

    Args:
        frame: from `collect_sensitivity`.
        file: path to write, ``.png`` or ``.svg``.

    Raises:
        AdfqError: for another kind of file, or one that cannot be written.
    """
    style.save(plot_sensitivity(frame), file)


def plot_sensitivity(frame: pd.DataFrame) -> Figure:
    """Return a figure with a row for each part and a point for each method.

    Args:
        frame: from `collect_sensitivity`.
    """
    parts, methods = list(dict.fromkeys(frame["part"])), list(dict.fromkeys(frame["method"]))
    figure = style.make_figure(0.75 * style.PAGE_WIDTH, style.rows_height(2 * len(parts)), layout="constrained")
    axes = figure.subplots()
    for index, method in enumerate(methods):
        errors = frame[frame["method"] == method].set_index("part")["error"]
        places = np.arange(len(parts)) + (index - (len(methods) - 1) / 2) * 0.8 / len(methods)
        values = errors.reindex(parts)
        axes.barh(places, values, 0.8 / len(methods), color=style.COLORS[index % len(style.COLORS)], label=method)
    style.list_rows(axes, parts)
    axes.set_xscale("log")
    axes.set_xlabel("relative error of the output, %, with this part alone quantized")
    style.dress(axes)
    figure.legend(loc="outside lower center", ncols=4, fontsize=style.POINTS, frameon=False)
    return figure
