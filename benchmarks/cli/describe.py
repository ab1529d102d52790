"""``adfq describe``: what a method does with each site of a model."""

from __future__ import annotations

import argparse
import copy

from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION, Bits
from adfq.registry import create_method
from benchmarks.cli.options import Commands, add_experiment, check_options, create_cell


def add(commands: Commands) -> None:
    """Add the command."""
    describe = commands.add_parser("describe", help="list what a method does with each site of a model")
    describe.set_defaults(action=_describe)
    add_experiment(describe)
    describe.add_argument("--format", choices=["md", "csv"], default="md", help="default: %(default)s")


def _describe(options: argparse.Namespace) -> None:
    from adfq.adapters import adapt
    from benchmarks.report import sites
    from benchmarks.tasks import load_subject

    check_options(options)
    cell = create_cell(options)
    model = load_subject(cell).model
    if cell.method == FULL_PRECISION:
        frame = sites.tabulate_sites(model, None)
    else:
        method = create_method(cell.method, cell.method_arguments)
        network = adapt(copy.deepcopy(model))
        if reason := method.supports(network):
            raise AdfqError(f"{cell.method} cannot be applied to {cell.model}: {reason}")
        network.attach(method.recipe(Bits.parse(cell.bits)))
        frame = sites.tabulate_sites(network.model, network)
    print(sites.render_sites(frame, options.format), end="")
