"""``adfq describe``: what a method does with each site of a model."""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace

from adfq.adapters import adapt
from adfq.method import FULL_PRECISION
from adfq.reconstruction import OptimizingMethod
from adfq.registry import find_method
from benchmarks.cli.options import Commands, add_calibration, add_experiment, check_options, create_cell
from benchmarks.report import sites
from benchmarks.run.runner import quantize_model, resolve_device
from benchmarks.tasks import load_subject


def add(commands: Commands) -> None:
    describe = commands.add_parser("describe", help="list what a method does with each site of a model")
    describe.set_defaults(action=_describe)
    add_experiment(describe)
    describe.add_argument("--format", choices=sites.STYLES, default="md")
    add_calibration(describe)
    describe.set_defaults(calibration_size=1)


def _describe(options: argparse.Namespace) -> None:
    check_options(options)
    cell = create_cell(options)
    quantized = cell.method != FULL_PRECISION
    if quantized and issubclass(find_method(cell.method), OptimizingMethod):
        # Optimization takes long and changes no site.
        arguments = {"iterations": 0, **dict(cell.method_arguments)}
        cell = replace(cell, method_arguments=tuple(sorted(arguments.items())))
    device = resolve_device(options.device)
    subject = load_subject(cell)
    model, _ = quantize_model(cell, subject, device)
    network = adapt(copy.deepcopy(subject.model)) if quantized else None
    print(sites.render_sites(sites.tabulate_sites(model, network), options.format), end="")
