"""``adfq figure``: draws what a table's methods find, side by side."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from adfq.methods import FULL_PRECISION
from benchmarks.commands.options import (
    Commands,
    add_calibration,
    add_prompts,
    add_table,
    check_options,
    choose_part,
    positive,
    table_entries,
)
from benchmarks.reports.spec import load_table
from benchmarks.runner import quantize_model, resolve_device
from benchmarks.tasks import load_subject

#: Kinds of figures, and the table whose methods they compare.
_FIGURES = {"detections": "2", "masks": "3"}


def add(commands: Commands) -> None:
    figure = commands.add_parser("figure", help="draw what a table's methods find, side by side")
    figure.set_defaults(action=_figure)
    figure.add_argument("kind", choices=_FIGURES)
    figure.add_argument("--images", type=positive, default=3, metavar="N", help="the first N (default: 3)")
    figure.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG or SVG to write")
    add_table(figure)
    add_prompts(figure)
    add_calibration(figure)


def _figure(options: argparse.Namespace) -> None:
    from benchmarks.reports import figures  # matplotlib takes its time

    figures.check_file(options.out)
    compare = {"detections": figures.compare_detections, "masks": figures.compare_masks}[options.kind]
    table = choose_part(load_table(_FIGURES[options.kind], options.profile), options)
    options.task = table.task
    check_options(options)
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
    figures.draw_detections([image.image for image in images], columns, names, options.out)
    print(options.out)
