"""``adfq figure distributions``, ``residuals``, ``outliers``, ``sensitivity``, ``reconstruction``: a model's layers."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION, Bits
from adfq.registry import create_method, find_method
from benchmarks.bundled import BUNDLED
from benchmarks.cell import Cell
from benchmarks.cli.options import (
    DATA_HELP,
    Parser,
    add_calibration,
    add_calibration_size,
    add_device,
    add_method,
    add_model,
    add_seed,
    cell_fields,
    check_options,
    create_cell,
    positive,
)
from benchmarks.plan import first_table
from benchmarks.tasks import task_names

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.tasks import Subject

_TASK, _METHOD = "classification", "adfq_vit"


def add_kinds(add_kind: Callable[..., Parser]) -> None:
    """Add the kinds."""
    distributions = add_kind(
        "distributions", _draw_distributions, "activations after LayerNorm and GELU, layer by layer, in full precision"
    )
    _add_full_precision(distributions)

    residuals = add_kind(
        "residuals", _draw_residuals, "largest and usual magnitudes in the residual stream, in full precision"
    )
    _add_full_precision(residuals)

    sensitivity = add_kind(
        "sensitivity", _draw_sensitivity, "error of the output with one kind of site quantized at a time"
    )
    _add_full_precision(sensitivity)
    sensitivity.add_argument("--methods", nargs="+", metavar="METHOD", help="default: those of the tables, calibrated")
    sensitivity.add_argument("--bits", help="weights and activations, 2 to 8 each (default: W4A4)")
    sensitivity.add_argument(
        "--images", type=positive, default=32, metavar="N", help="measure on the first N for evaluation (default: 32)"
    )

    outliers = add_kind("outliers", _draw_outliers, "the share of outliers that ADFQ-ViT keeps, layer by layer")
    _add_subject(outliers)
    add_method(outliers)
    add_calibration(outliers)
    outliers.add_argument(
        "--images", type=positive, default=32, metavar="N", help="count in the first N for evaluation (default: 32)"
    )

    reconstruction = add_kind(
        "reconstruction", _draw_reconstruction, "errors before and after optimization, module by module"
    )
    reconstruction.add_argument(
        "--record", metavar="FILE", help="a measured cell's, in place of quantizing TASK's --model …"
    )
    _add_subject(reconstruction)
    add_method(reconstruction)
    add_calibration(reconstruction)


def _add_full_precision(parser: Parser) -> None:
    """Add the options of a figure that looks at a model in full precision, at all images at once."""
    _add_subject(parser)
    parser.set_defaults(method=FULL_PRECISION)
    add_seed(parser)
    add_calibration_size(parser)
    add_device(parser)


def _add_subject(parser: Parser) -> None:
    """Add a task, its model and data; `_choose_cell` has the defaults."""
    parser.add_argument("task", choices=task_names(), nargs="?", help=f"default: {_TASK}")
    add_model(parser)
    parser.add_argument("--data", metavar="SPEC", help=f"{DATA_HELP} (default: {BUNDLED})")


def _choose_cell(options: argparse.Namespace) -> Cell:
    """Return the cell that the options choose; on bundled data, the rest is as in the task's first table on them."""
    given = {"task": options.task or _TASK, "data": options.data or BUNDLED, "method": options.method or _METHOD}
    chosen = argparse.Namespace(**{**vars(options), **given})
    check_options(chosen)
    if chosen.data != BUNDLED:
        return create_cell(chosen)
    fields = cell_fields(chosen)
    table = first_table(chosen.task)
    row, model = table.row(chosen.method), table.models[0]
    if "model" not in fields:
        fields |= {"model": model.name, "model_arguments": tuple(sorted(model.arguments.items()))}
        fields.setdefault("checkpoint", model.checkpoint)
    if chosen.method != FULL_PRECISION:
        arguments = {**row.arguments, **dict(fields.get("method_arguments", ()))}
        fields["method_arguments"] = tuple(sorted(arguments.items()))
    fields.setdefault("calibration_size", row.calibration_size)
    fields.setdefault("calibration_batch_size", row.calibration_batch_size)
    return Cell.create(**fields)


def _quantize(cell: Cell, subject: Subject, options: argparse.Namespace) -> nn.Module:
    """Quantize as `adfq quantize` does, which goes on where it was interrupted."""
    from benchmarks.run.runner import quantize_model, resolve_device

    unfinished = options.file.with_name(f"{options.file.name}.unfinished")
    model, _ = quantize_model(cell, subject, resolve_device(options.device), unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)
    return model


def _draw_distributions(options: argparse.Namespace) -> None:
    from benchmarks.report.figures import distributions, style  # matplotlib takes its time

    style.check_file(options.file)
    subject, images = _open(_choose_cell(options), options)
    distributions.draw_distributions(distributions.collect_distributions(subject.model, images), options.file)
    print(options.file)


def _draw_residuals(options: argparse.Namespace) -> None:
    from benchmarks.report.figures import residuals, style

    style.check_file(options.file)
    subject, images = _open(_choose_cell(options), options)
    residuals.draw_residuals(residuals.collect_residuals(subject.model, images), options.file)
    print(options.file)


def _draw_sensitivity(options: argparse.Namespace) -> None:
    from adfq.reconstruction import OptimizingMethod
    from benchmarks.report.figures import sensitivity, style

    style.check_file(options.file)
    cell = _choose_cell(options)
    bits = Bits.parse(options.bits or "W4A4")
    methods = {}
    for name in options.methods or dict.fromkeys(row.method for row in first_table(cell.task).rows):
        kind = find_method(name)
        method = create_method(name, {"iterations": 0} if issubclass(kind, OptimizingMethod) else {})
        methods[kind.label] = method
    subject, calibration = _open(cell, options)
    images = subject.evaluation_images(options.images)
    frame = sensitivity.collect_sensitivity(subject.model, methods, bits, calibration, images, subject.infer)
    sensitivity.draw_sensitivity(frame, options.file)
    print(options.file)


def _open(cell: Cell, options: argparse.Namespace) -> tuple[Subject, Any]:
    """Return a cell's subject, on its device, and calibration images."""
    from benchmarks.run.runner import resolve_device
    from benchmarks.tasks import load_subject

    device = resolve_device(options.device)
    subject = load_subject(cell)
    subject.model.to(device)
    size = Cell.calibration_size if options.calibration_size is None else options.calibration_size
    return subject, next(subject.calibration_batches(size, options.seed or 0))


def _draw_outliers(options: argparse.Namespace) -> None:
    from benchmarks.report.figures import outliers, style
    from benchmarks.run.runner import resolve_device
    from benchmarks.tasks import load_subject

    style.check_file(options.file)
    cell = _choose_cell(options)
    device = resolve_device(options.device)
    bits = Bits.parse(options.bits or "W4A4")
    subject = load_subject(cell)
    if not outliers.keeps_outliers(subject.model, create_method(cell.method, cell.method_arguments), bits):
        given = "".join(f", {name}={value}" for name, value in cell.method_arguments)
        raise AdfqError(f"{cell.method}{given} has no quantizer that keeps outliers")
    model = _quantize(cell, subject, options)

    def forward(model: nn.Module, images: Any) -> None:
        for batch in images.split(cell.batch_size):
            subject.infer(model, batch)

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
        with open(options.record, encoding="utf-8") as file:
            report: dict[str, Any] = json.load(file)["report"]
    except OSError as error:
        raise AdfqError(f"cannot read {options.record}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise AdfqError(f"{options.record} is not a record of a measured cell") from None
    return report


def _optimize(options: argparse.Namespace) -> dict[str, Any]:
    from adfq.reconstruction import OptimizingMethod
    from benchmarks.tasks import load_subject

    cell = _choose_cell(options)
    method = create_method(cell.method, cell.method_arguments)
    if not isinstance(method, OptimizingMethod):
        raise AdfqError(f"{cell.method} optimizes no modules")
    if not method.iterations:
        raise AdfqError(f"{cell.method} optimizes no modules in 0 iterations")
    model: Any = _quantize(cell, load_subject(cell), options)
    return dict(model.quantization.report)
