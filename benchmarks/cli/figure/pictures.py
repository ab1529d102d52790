"""``adfq figure detections`` and ``masks``: what a table's methods find in images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from adfq.method import FULL_PRECISION
from benchmarks.cli.options import Parser, add_calibration, add_prompts, add_table, positive, select
from benchmarks.plan import choose_part, load_table, make_plan

#: The table whose methods are compared in pictures of that kind.
_TABLES = {"detections": "2", "masks": "3"}


def add_kinds(add_kind: Callable[..., Parser]) -> None:
    """Add both kinds."""
    for name, table in _TABLES.items():
        pictures = add_kind(name, _draw_pictures, f"{name} of table {table}'s methods, side by side")
        pictures.add_argument("--images", type=positive, default=3, metavar="N", help="the first N (default: 3)")
        add_table(pictures)
        if name == "masks":
            add_prompts(pictures)
        add_calibration(pictures)


def _draw_pictures(options: argparse.Namespace) -> None:
    from benchmarks.report.figures import pictures, style  # matplotlib takes its time
    from benchmarks.run.runner import quantize_model, resolve_device
    from benchmarks.tasks import load_subject

    style.check_file(options.file)
    compare = {"detections": pictures.compare_detections, "masks": pictures.compare_masks}[options.kind]
    selection = select(options)
    table = choose_part(load_table(_TABLES[options.kind], selection.profile), selection)
    # One column a method: the first of whatever there are several of.
    bits = (selection.bits or ["W4/A4"])[:1]
    first = replace(selection, models=[table.models[0].key], bits=bits, seeds=table.seeds[:1])
    (planned,) = make_plan([table.name], first).tables
    device = resolve_device(options.device)
    columns: dict[str, Any] = {}
    subject: Any = load_subject(planned.entries[0].cell)
    for entry in planned.entries:
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
