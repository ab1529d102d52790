"""``adfq quantize``: quantizes a model and saves it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION
from benchmarks.cli.options import Commands, add_calibration, add_experiment, check_options, create_cell


def add(commands: Commands) -> None:
    """Add the command."""
    quantize = commands.add_parser("quantize", help="quantize a model and save it")
    quantize.set_defaults(action=_quantize)
    add_experiment(quantize)
    quantize.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    add_calibration(quantize)


def _quantize(options: argparse.Namespace) -> None:
    from benchmarks.run.runner import quantize_model, resolve_device
    from benchmarks.tasks import check_saved, load_subject, save_quantized
    from benchmarks.tasks.shared import check_place

    check_saved(options.task)
    check_options(options)
    cell, file = create_cell(options), options.out
    if cell.method == FULL_PRECISION:
        raise AdfqError("full_precision quantizes nothing that could be saved")
    check_place(file)
    device = resolve_device(options.device)
    subject = load_subject(cell)
    unfinished = file.with_name(f"{file.name}.unfinished")
    model, cost = quantize_model(cell, subject, device, unfinished)
    save_quantized(model, cell, subject, file)
    shutil.rmtree(unfinished, ignore_errors=True)
    size, full = file.stat().st_size, 4 * sum(parameter.numel() for parameter in subject.model.parameters())
    seconds = cost["calibration_seconds"]
    print(f"{file}: {size / 1e6:.2f} MB, {100 * size / full:.1f} % of float32's size, in {seconds:.1f} s")
