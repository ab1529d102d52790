"""``adfq figure``: draws what a table's methods find, what they have to cope with, and what they cost."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from adfq.bits import Bits
from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION
from adfq.registry import create_method
from benchmarks.cell import Cell
from benchmarks.cli.measure import add_measuring, measure_tables
from benchmarks.cli.options import (
    DATA_HELP,
    Commands,
    Parser,
    add_calibration,
    add_method,
    add_model,
    add_prompts,
    add_seed,
    add_table,
    check_options,
    choose_part,
    create_cell,
    positive,
    table_entries,
)
from benchmarks.plan import load_table
from benchmarks.report.tables import summarize, tabulate_results
from benchmarks.run.runner import quantize_model, resolve_device
from benchmarks.tasks import Subject, load_subject, task_names
from benchmarks.tasks.classification.data import BUNDLED

#: The table whose methods are compared in pictures of that kind.
_PICTURES = {"detections": "2", "masks": "3"}
#: The table that has a task's bundled models and their methods' settings.
_TABLES = {"classification": "1", "detection": "2", "segmentation": "3"}
_METHOD = "adfq_vit"
#: Names of `benchmarks.report.figures.accuracy_cost.COSTS`.
_COSTS = ("forward", "size", "calibration")


def add(commands: Commands) -> None:
    figure = commands.add_parser("figure", help="draw what methods find, what they cope with, and what they cost")
    kinds = figure.add_subparsers(dest="kind", required=True)

    def add_kind(name: str, action: Callable[[argparse.Namespace], int | None], text: str) -> Parser:
        kind: Parser = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        kind.set_defaults(action=action)
        kind.add_argument("--out", dest="file", type=Path, required=True, metavar="FILE", help="PNG or SVG to write")
        return kind

    for name, table in _PICTURES.items():
        pictures = add_kind(name, _draw_pictures, f"{name} of table {table}'s methods, side by side")
        pictures.add_argument("--images", type=positive, default=3, metavar="N", help="the first N (default: 3)")
        add_table(pictures)
        if name == "masks":
            add_prompts(pictures)
        add_calibration(pictures)

    distributions = add_kind(
        "distributions", _draw_distributions, "activations after LayerNorm and GELU, layer by layer, in full precision"
    )
    _add_subject(distributions)
    distributions.set_defaults(method=FULL_PRECISION)
    add_seed(distributions)
    add_calibration(distributions)

    outliers = add_kind("outliers", _draw_outliers, "the share of outliers that ADFQ-ViT keeps, layer by layer")
    _add_subject(outliers)
    add_method(outliers)
    add_calibration(outliers)
    outliers.add_argument(
        "--images", type=positive, default=32, metavar="N", help="count in the first N for evaluation (default: 32)"
    )

    reconstruction = add_kind(
        "reconstruction", _draw_reconstruction, "errors before and after ADFQ-ViT's optimization, module by module"
    )
    reconstruction.add_argument(
        "--record", type=Path, metavar="FILE", help="a measured cell's, in place of quantizing TASK's --model …"
    )
    _add_subject(reconstruction)
    add_method(reconstruction)
    add_calibration(reconstruction)

    cost = add_kind("accuracy-cost", _draw_accuracy_cost, "a table's accuracies over what they cost")
    cost.add_argument("--table", default="5", metavar="NAME", help="'adfq list tables' (default: 5)")
    cost.add_argument("--costs", nargs="+", choices=_COSTS, default=_COSTS, help="a panel each (default: all)")
    add_measuring(cost, out="runs", option="--runs")


def _add_subject(parser: Parser) -> None:
    """A task, its model and data; `_choose_cell` says what is not given."""
    parser.add_argument("task", choices=task_names(), nargs="?", help="default: classification")
    add_model(parser)
    parser.add_argument("--data", metavar="SPEC", help=f"{DATA_HELP} (default: bundled)")


def _choose_cell(options: argparse.Namespace) -> Cell:
    """The cell that the options choose; on bundled data, what they leave open is as in the bundled tables."""
    options.task = options.task or next(iter(_TABLES))
    options.data = options.data or BUNDLED
    options.method = options.method or _METHOD
    check_options(options)
    if options.data == BUNDLED:
        table = load_table(_TABLES[options.task], BUNDLED)
        settings = table.row(options.method)
        options.model = options.config or options.model or table.models[0].name
        if options.method != FULL_PRECISION:
            options.method_arguments = [*settings.arguments.items(), *(options.method_arguments or ())]
        if options.calibration_size is None:
            options.calibration_size = settings.calibration_size
    return create_cell(options)


def _quantize(cell: Cell, subject: Subject, options: argparse.Namespace) -> nn.Module:
    """As `adfq quantize` does, which goes on where it was interrupted."""
    unfinished = options.file.with_name(f"{options.file.name}.unfinished")
    model, _ = quantize_model(cell, subject, resolve_device(options.device), unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)
    return model


def _draw_distributions(options: argparse.Namespace) -> None:
    from benchmarks.report.figures import distributions, style  # matplotlib takes its time

    style.check_file(options.file)
    cell = _choose_cell(options)
    device = resolve_device(options.device)
    subject = load_subject(cell)
    size = Cell.calibration_size if options.calibration_size is None else options.calibration_size
    images = subject.calibration_images(size, options.seed or 0)
    frame = distributions.collect_distributions(subject.model.to(device), images)
    distributions.draw_distributions(frame, options.file)
    print(options.file)


def _draw_outliers(options: argparse.Namespace) -> None:
    from benchmarks.report.figures import outliers, style

    style.check_file(options.file)
    cell = _choose_cell(options)
    device = resolve_device(options.device)
    subject = load_subject(cell)
    outliers.check_outliers(subject.model, cell.method, Bits.parse(options.bits or "W4A4"), dict(cell.method_arguments))
    model = _quantize(cell, subject, options)

    def forward(model: nn.Module, images: Any) -> None:
        for batch in images.split(cell.batch_size):
            subject.forward(model, batch)

    images = subject.evaluation_images(options.images).to(device)
    outliers.draw_outliers(outliers.collect_outliers(model, images, forward), options.file)
    print(options.file)


def _draw_reconstruction(options: argparse.Namespace) -> None:
    from benchmarks.report.figures import reconstruction, style

    style.check_file(options.file)
    report = _read_report(options) if options.record else _optimize(options)
    reconstruction.draw_reconstruction(reconstruction.collect_reconstruction(report), options.file)
    print(options.file)


def _read_report(options: argparse.Namespace) -> dict[str, Any]:
    own = ("command", "kind", "action", "file", "record", "device")
    given = [name for name, value in vars(options).items() if name not in own and value is not None]
    if given:
        raise AdfqError(f"what {', '.join(given)} would say is in the record given with --record; leave it out")
    try:
        report: dict[str, Any] = json.loads(options.record.read_text(encoding="utf-8"))["report"]
    except OSError as error:
        raise AdfqError(f"cannot read {options.record}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise AdfqError(f"{options.record} is not a record of a measured cell") from None
    return report


def _optimize(options: argparse.Namespace) -> dict[str, Any]:
    cell = _choose_cell(options)
    iterations = None
    if cell.method != FULL_PRECISION:
        iterations = getattr(create_method(cell.method, cell.method_arguments), "iterations", None)
    if not iterations:
        raise AdfqError(f"{cell.method} optimizes no modules{'' if iterations is None else ' in 0 iterations'}")
    model: Any = _quantize(cell, load_subject(cell), options)
    return dict(model.quantization.report)


def _draw_accuracy_cost(options: argparse.Namespace) -> int:
    from benchmarks.report.figures import accuracy_cost, style

    style.check_file(options.file)
    first = choose_part(load_table(options.table, options.profile), options).models[0]
    options.models = [first.key]
    ((table, results),) = measure_tables([options.table], options)
    summary = summarize(table, tabulate_results(table, results))
    accuracy_cost.draw_accuracy_cost(table, summary, options.file, options.costs)
    print(options.file)
    return int(any(record is None for _, record in results))


def _draw_pictures(options: argparse.Namespace) -> None:
    from benchmarks.report.figures import pictures, style

    style.check_file(options.file)
    compare = {"detections": pictures.compare_detections, "masks": pictures.compare_masks}[options.kind]
    table = choose_part(load_table(_PICTURES[options.kind], options.profile), options)
    # One column a method: the first of whatever there are several of.
    table = replace(table, models=table.models[:1], bits=(options.bits or ["W4/A4"])[:1], seeds=table.seeds[:1])
    device = resolve_device(options.device)
    columns: dict[str, Any] = {}
    entries = table_entries(table, options)
    subject: Any = load_subject(entries[0].cell)
    for entry in entries:
        model, _ = quantize_model(entry.cell, subject, device)
        images = subject.find(model, device, options.images)
        truth, found = zip(*map(compare, images), strict=True)
        if None not in truth:
            columns.setdefault("Ground truth", truth)
        heading = entry.row.label if entry.cell.method == FULL_PRECISION else f"{entry.row.label}, {entry.cell.bits}"
        columns[heading] = found
    names = getattr(images[0], "classes", None)
    pictures.draw_detections([image.image for image in images], columns, names, options.file)
    print(options.file)
