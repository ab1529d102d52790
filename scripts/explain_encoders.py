"""Measurement of why methods lose accuracy on a real encoder, site by site: python scripts/explain_encoders.py.

Writes the tables of results/real/*.csv and the pictures docs/encoders-*.png; scripts/write_results.py makes the page of
them.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import adfq
from adfq.adfq_vit import ADFQViT
from adfq.bits import Bits
from adfq.registry import find_method
from benchmarks.cell import Cell
from benchmarks.plan import load_table
from benchmarks.report.figures.distributions import collect_distributions, draw_distributions
from benchmarks.report.figures.outliers import collect_outliers, draw_outliers
from benchmarks.report.figures.residuals import collect_residuals, draw_residuals
from benchmarks.report.figures.sensitivity import collect_sensitivity, draw_sensitivity
from benchmarks.tasks import load_subject

ROOT = Path(__file__).resolve().parents[1]
TABLES, PICTURES = ROOT / "results" / "real", ROOT / "docs"
BITS = (Bits(4, 4), Bits(8, 8))
#: PPOQ, SLQ, AMO: all subsets of the first two, AMO alone, and all three.
SUBSETS = (
    *itertools.product((False, True), (False, True), (False,)),
    (False, False, True),
    (True, True, True),
)
IMAGES = 32  # to calibrate on, and as many others to measure on


def main() -> None:
    """Measure, and write tables and pictures."""
    TABLES.mkdir(parents=True, exist_ok=True)
    table = load_table("encoders", "real")
    cell: Cell = table.entries(data=table.data)[0].cell
    subject: Any = load_subject(cell)
    calibration, images = subject.calibration_images(IMAGES, 0), subject.evaluation_images(IMAGES)

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

    settings = dict(table.settings["adfq_vit"])
    settings.pop("calibration_size")
    _write(_ablate(subject.model, settings, calibration, images), "components")


def _ablate(
    model: torch.nn.Module, settings: dict[str, Any], calibration: torch.Tensor, images: torch.Tensor
) -> pd.DataFrame:
    """Return the error of the output, %, of subsets of ADFQ-ViT's components at the first of `BITS`."""
    rows = []
    for ppoq, slq, amo in SUBSETS:
        method = ADFQViT(ppoq=ppoq, slq=slq, **(settings if amo else {"iterations": 0}))
        quantized = adfq.quantize(model, method, BITS[0].weight, BITS[0].activation, calibration=calibration)
        with torch.inference_mode():
            output, reference = quantized(images), model(images)
        error = (output - reference).norm(dim=1) / reference.norm(dim=1)
        rows.append({"ppoq": ppoq, "slq": slq, "amo": amo, "error": 100 * float(error.mean())})
    return pd.DataFrame(rows)


def _write(frame: pd.DataFrame, name: str) -> None:
    frame.to_csv(TABLES / f"{name}.csv", index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
