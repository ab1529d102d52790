"""Measurement of why methods lose accuracy on a real encoder, site by site: python scripts/explain_encoders.py.

Writes the tables of results/real/*.csv and the pictures docs/encoders-*.png; scripts/write_results.py makes the page of
them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import adfq
from adfq.adapters import adapt
from adfq.adfq_vit import ADFQViT
from adfq.bits import Bits
from adfq.calibration import calibrate_activations, read_images
from adfq.quantizers import ShiftLogQuantizer, UniformQuantizer
from adfq.ranges import Ends
from adfq.registry import find_method
from adfq.sites import sites_of
from adfq.statistics import Search
from benchmarks.cell import Cell
from benchmarks.plan import load_table
from benchmarks.report.figures.distributions import collect_distributions, draw_distributions
from benchmarks.report.figures.outliers import collect_outliers, draw_outliers
from benchmarks.report.figures.residuals import collect_residuals, draw_residuals
from benchmarks.report.figures.sensitivity import collect_sensitivity, draw_sensitivity, relative_error
from benchmarks.tasks import load_subject

ROOT = Path(__file__).resolve().parents[1]
TABLES, PICTURES = ROOT / "results" / "real", ROOT / "docs"
BITS = (Bits(4, 4), Bits(8, 8))
IMAGES = 32  # to calibrate on, and as many others to measure on


def main() -> None:
    """Measure, and write tables and pictures."""
    TABLES.mkdir(parents=True, exist_ok=True)
    table = load_table("encoders", "real")
    cell: Cell = table.entries(data=table.data)[0].cell
    subject: Any = load_subject(cell)
    calibration, images = next(subject.calibration_batches(IMAGES, 0)), subject.evaluation_images(IMAGES)

    distributions = collect_distributions(subject.model, calibration)
    draw_distributions(distributions, PICTURES / "encoders-distributions.png")
    _write(distributions[distributions["kind"] == "post-LayerNorm"], "distributions")

    residuals = collect_residuals(subject.model, calibration)
    draw_residuals(residuals, PICTURES / "encoders-residuals.png")
    _write(residuals, "residuals")

    quantized = adfq.quantize(subject.model, ADFQViT(iterations=0), calibration=calibration, seed=0)
    outliers = collect_outliers(quantized, images)
    draw_outliers(outliers, PICTURES / "encoders-outliers.png")
    _write(outliers, "outliers")

    methods = {
        find_method(row.method).label: find_method(row.method)() for row in table.rows if row.method != "adfq_vit"
    }
    methods["ADFQ-ViT, calibrated"] = ADFQViT(iterations=0)
    frames = {bits: collect_sensitivity(subject.model, methods, bits, calibration, images) for bits in BITS}
    draw_sensitivity(frames[BITS[0]], PICTURES / "encoders-sensitivity.png")
    _write(pd.concat([frame.assign(bits=str(bits)) for bits, frame in frames.items()]), "sensitivity")

    _write(_try_ranges(subject.model, calibration, images), "ranges")

    _write(_ablate(subject.model, calibration, images), "components")


class _WholeRange(ShiftLogQuantizer):
    """SLQ that clips no value of the calibration."""

    def _search_scale(self, ends: Ends, shift: Callable[[Tensor], Tensor] = lambda x: x) -> Search[Tensor]:
        yield from ()
        return shift(ends.upper.outermost)[0]


def _try_ranges(model: torch.nn.Module, calibration: torch.Tensor, images: torch.Tensor) -> pd.DataFrame:
    """Return the error of the output, %, with inputs of fc2 alone quantized in ranges with and without clipping."""
    rows = []
    for bits in BITS:
        makers: dict[tuple[str, str], Any] = {
            ("uniform", "percentile"): partial(UniformQuantizer, bits.activation, range="percentile"),
            ("uniform", "all values"): partial(UniformQuantizer, bits.activation, range="minmax"),
            ("SLQ", "percentile"): partial(ShiftLogQuantizer, bits.activation),
            ("SLQ", "all values"): partial(_WholeRange, bits.activation),
        }
        for (quantizer, reach), make in makers.items():
            network = adapt(copy.deepcopy(model).eval())
            for site in sites_of(network.model):
                if site.role == "fc2" and not site.is_weight:
                    site.attach(make())
            calibrate_activations(network, read_images(calibration))
            error = _error(network.model, model, images)
            rows.append({"quantizer": quantizer, "range": reach, "bits": bits.activation, "error": error})
    return pd.DataFrame(rows)


@torch.inference_mode()
def _error(quantized: torch.nn.Module, model: torch.nn.Module, images: torch.Tensor) -> float:
    return relative_error(quantized(images), model(images))


def _ablate(model: torch.nn.Module, calibration: torch.Tensor, images: torch.Tensor) -> pd.DataFrame:
    """Return the error of the output, %, of subsets of ADFQ-ViT's quantizers without optimization."""
    rows = []
    for bits, ppoq, slq in itertools.product(BITS, (False, True), (False, True)):
        method = ADFQViT(ppoq=ppoq, slq=slq, iterations=0)
        quantized = adfq.quantize(model, method, bits.weight, bits.activation, calibration=calibration)
        rows.append({"bits": str(bits), "ppoq": ppoq, "slq": slq, "error": _error(quantized, model, images)})
    return pd.DataFrame(rows)


def _write(frame: pd.DataFrame, name: str) -> None:
    frame.to_csv(TABLES / f"{name}.csv", index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
