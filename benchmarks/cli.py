"""The ``adfq`` command."""

from __future__ import annotations

import argparse
import ast
import copy
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import adfq
from adfq.adapters import adapt
from adfq.errors import AdfqError
from adfq.methods import FULL_PRECISION, load_method
from benchmarks.cells import Arguments, Cell
from benchmarks.console import warn
from benchmarks.reports import sites
from benchmarks.reports.spec import Entry, Model, Row, Table, load_table, table_names
from benchmarks.reports.tables import STYLES, render, tabulate_results
from benchmarks.results import ResultStore
from benchmarks.runner import evaluate_model, quantize_model, resolve_device, run_cell, run_cells
from benchmarks.tasks import TASKS, Task, check_saved, find_task, load_quantized, load_subject, save_quantized
from benchmarks.tasks.shared import check_place

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")

#: What --quantized has from its file, by option.
_IN_QUANTIZED_FILE = {
    "--model": "model",
    "--model-arg": "model_arguments",
    "--checkpoint": "checkpoint",
    "--pretrained": "pretrained",
    "--method": "method",
    "--method-arg": "method_arguments",
    "--bits": "bits",
    "--calibration-size": "calibration_size",
    "--seed": "seed",
}

#: Kinds of figures, and the table whose methods they compare.
_FIGURES = {"detections": "2", "masks": "3"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AdfqError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 2 for the user's mistakes, 130 when interrupted."""
    for library in ("timm", "huggingface_hub"):  # what matters of their warnings comes as our own errors
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_: warn(str(message))
    try:
        options = _parser().parse_args(arguments)
        action: Callable[[argparse.Namespace], None] = options.action
        action(options)
    except AdfqError as error:
        print(f"adfq: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("adfq: interrupted; finished cells are recorded", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with | head
        sys.stderr.close()
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="adfq", description="Post-training quantization of vision transformers, measured.")
    parser.add_argument("--version", action="version", version=f"adfq {adfq.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|quantize|describe|table|figure|list")

    run = commands.add_parser("run", help="measure one method on one model")
    run.set_defaults(action=_run)
    _add_experiment(run)
    run.add_argument(
        "--quantized", metavar="FILE", help="measure what 'adfq quantize' has saved, in place of --model …"
    )
    run.add_argument(
        "--results",
        metavar="PREFIX",
        help="of detection: write PREFIX.bbox.json and PREFIX.segm.json, as COCO has them; of segmentation the latter",
    )
    run.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")
    _add_common(run)

    quantize = commands.add_parser("quantize", help="quantize a model and save it")
    quantize.set_defaults(action=_quantize)
    _add_experiment(quantize)
    quantize.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    _add_calibration(quantize)

    describe = commands.add_parser("describe", help="list what a method does with each site of a model")
    describe.set_defaults(action=_describe)
    _add_experiment(describe)
    describe.add_argument("--format", choices=sites.STYLES, default="md")
    _add_calibration(describe)
    describe.set_defaults(calibration_size=1)

    table = commands.add_parser("table", help="measure and print tables of the paper")
    table.set_defaults(action=_tables)
    table.add_argument("names", nargs="+", metavar="NAME", help="'adfq list tables'")
    table.add_argument("--format", choices=STYLES, default="md")
    table.add_argument(
        "--out", type=Path, default=Path("runs"), metavar="DIR", help="records and the table (default: runs)"
    )
    table.add_argument(
        "--jobs", type=_positive, metavar="N", help="cells at once (default: 1; one a core where models are small)"
    )
    _add_table(table)
    _add_common(table)

    figure = commands.add_parser("figure", help="draw what a table's methods find, side by side")
    figure.set_defaults(action=_figure)
    figure.add_argument("kind", choices=_FIGURES)
    figure.add_argument("--images", type=_positive, default=3, metavar="N", help="the first N (default: 3)")
    figure.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG or SVG to write")
    _add_table(figure)
    _add_prompts(figure)
    _add_calibration(figure)

    listing = commands.add_parser("list", help="list what there is")
    listing.set_defaults(action=_list)
    listing.add_argument("what", choices=["models", "methods", "tables"])
    return parser


def _add_table(parser: argparse.ArgumentParser) -> None:
    """What chooses a table's cells."""
    parser.add_argument(
        "--profile", default="embedded", help="embedded (default), or full: the paper's data and models"
    )
    parser.add_argument("--data", metavar="SPEC", help="in the full profile, as for 'adfq run'")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="files MODEL.safetensors, .pth, .bin or .npz")
    parser.add_argument("--models", nargs="+", metavar="MODEL")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="methods, or rows by their key in tables/*.toml")
    parser.add_argument("--bits", nargs="+", metavar="W4A4")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="of calibration images and methods")


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    """What decides a cell, named after its fields; what is not given is None."""
    parser.add_argument("task", choices=TASKS)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="an embedded model, any of timm's or MMDetection's, a SAM; 'adfq list models'")
    model.add_argument("--config", metavar="FILE", help="of detection: MMDetection's config of the model")
    parser.add_argument(
        "--model-arg",
        dest="model_arguments",
        type=_pair,
        nargs="+",
        action="extend",
        metavar="K=V",
        help="for timm's factory",
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="local weights: safetensors, PyTorch (weights only), npz")
    parser.add_argument(
        "--pretrained", action="store_true", default=None, help="download timm's weights where there is no checkpoint"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="SPEC",
        help="embedded; folder:ROOT or torch/NAME:ROOT, as timm names them; of detection, segmentation COCO's folder",
    )
    _add_prompts(parser)
    parser.add_argument(
        "--encoder-only", action="store_true", default=None, help="of segmentation: quantize the image encoder alone"
    )
    parser.add_argument("--method", help="'adfq list methods'")
    parser.add_argument("--method-arg", dest="method_arguments", type=_pair, nargs="+", action="extend", metavar="K=V")
    parser.add_argument("--bits", help="weights and activations, 2 to 8 each (default: W4A4)")
    parser.add_argument("--seed", type=int, help="of calibration images and method (default: 0)")
    parser.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"))
    parser.add_argument("--mean", type=_floats, metavar="M,M,M")
    parser.add_argument("--std", type=_floats, metavar="S,S,S")
    parser.add_argument("--crop-pct", type=float)
    parser.add_argument("--interpolation", choices=["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        metavar="boxes|points|FILE",
        help="of segmentation: the ground truth's boxes (default) or points, or a detector's results, as COCO has them",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_calibration(parser)
    parser.add_argument("--limit", type=_positive, metavar="N", help="evaluate on the first N images only")
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="of evaluation (default: 100; of detection, segmentation 1)"
    )


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calibration-size", type=int, metavar="N", help="calibration images")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 …")


def _run(options: argparse.Namespace) -> None:
    _check_options(options)
    device = resolve_device(options.device)
    if options.quantized:
        check_saved(options.task)
        given = [option for option, name in _IN_QUANTIZED_FILE.items() if getattr(options, name) is not None]
        if given:
            raise AdfqError(f"what {', '.join(given)} would say is in the file given with --quantized; leave it out")
        cell, subject = load_quantized(options.quantized, **_cell_fields(options))
        record = evaluate_model(cell, subject, subject.model, device)
    else:
        cell = _create_cell(options)
        record = run_cell(cell, load_subject(cell, options.results), device)
    if options.json:
        print(json.dumps(record))
        return
    said, timing = find_task(cell.task).describe(record["metrics"]), record["timing"]
    print(
        f"{cell.model}, {cell.method}, {cell.bits}: {said} "
        f"(calibration {timing['calibration']:.1f} s, evaluation {timing['evaluation']:.1f} s)"
    )


def _quantize(options: argparse.Namespace) -> None:
    check_saved(options.task)
    _check_options(options)
    cell, file = _create_cell(options), options.out
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


def _describe(options: argparse.Namespace) -> None:
    _check_options(options)
    cell = _create_cell(options)
    quantized = cell.method != FULL_PRECISION
    if quantized and "iterations" in signature(load_method(cell.method)).parameters:
        # Optimization takes long and changes no site.
        arguments = {"iterations": 0, **dict(cell.method_arguments)}
        cell = replace(cell, method_arguments=tuple(sorted(arguments.items())))
    device = resolve_device(options.device)
    subject = load_subject(cell)
    model, _ = quantize_model(cell, subject, device)
    network = adapt(copy.deepcopy(subject.model)) if quantized else None
    print(sites.render_sites(sites.tabulate_sites(model, network), options.format), end="")


def _check_options(options: argparse.Namespace) -> None:
    """Raises AdfqError for options that another task than this one has."""
    own = find_task(options.task)
    for name in sorted({name for task in TASKS.values() for name in (*task.options, *task.arguments)}):
        if getattr(options, name, None) is not None and name not in (*own.options, *own.arguments):
            raise AdfqError(f"{options.task} has no --{name.replace('_', '-')}")


def _create_cell(options: argparse.Namespace) -> Cell:
    options.model = options.config or options.model
    missing = [f"--{name}" for name in ("model", "method") if getattr(options, name) is None]
    if missing:
        command = options.command
        raise AdfqError(f"the following arguments are required: {', '.join(missing)} (see adfq {command} --help)")
    return Cell.create(**_cell_fields(options))


def _cell_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a cell that the options give."""
    given: dict[str, Any] = {field.name: getattr(options, field.name, None) for field in fields(Cell)}
    task = find_task(options.task)
    given["batch_size"] = given["batch_size"] or task.batch_size
    given["task_arguments"] = _task_arguments(options, task)
    names = ("input_size", "mean", "std", "crop_pct", "interpolation")
    given["preprocessing"] = [(name, getattr(options, name)) for name in names if getattr(options, name) is not None]
    for name in ("model_arguments", "method_arguments", "preprocessing"):
        if given[name] is not None:
            given[name] = tuple(sorted(dict(given[name]).items()))  # of an option given twice, the last counts
    return {name: value for name, value in given.items() if value is not None}


def _task_arguments(options: argparse.Namespace, task: Task) -> Arguments:
    chosen = {name: getattr(options, name, None) for name in task.arguments}
    return tuple(sorted((name, value) for name, value in chosen.items() if value not in (None, task.arguments[name])))


def _tables(options: argparse.Namespace) -> None:
    tables = [_choose(load_table(name, options.profile), options) for name in options.names]
    if options.data and len({table.task for table in tables}) > 1:
        raise AdfqError("tables of different tasks need different data: regenerate them one after the other")
    device = resolve_device(options.device)
    every = [(table, _entries(table, options)) for table in tables]
    for table, entries in every:
        jobs = options.jobs or (1 if device.type == "cuda" else table.jobs)
        results = run_cells([entry.cell for entry in entries], ResultStore(options.out), device, jobs)
        records = (record for _, record in results)
        frame = tabulate_results(table, zip(entries, records, strict=True))
        text = render(table, frame, options.format)
        path = options.out / f"table{table.name}-{table.profile}.{STYLES[options.format]}"
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise AdfqError(f"cannot write {path}: {error.strerror}") from None
        print(text, end="" if table is tables[-1] else "\n")


def _choose(table: Table, options: argparse.Namespace) -> Table:
    """The part of a table that the options ask for."""
    if options.models:
        known = {name: model for model in table.models for name in (model.key, model.name)}
        table = replace(table, models=[_choose_model(name, known) for name in options.models])
    if options.methods:
        table = replace(table, rows=_choose_rows(table, options.methods))
    if options.calibration_size is not None:  # goes before what the methods of the table have
        table = replace(table, rows=[replace(row, calibration_size=options.calibration_size) for row in table.rows])
    if options.bits:
        table = replace(table, bits=options.bits)
    if options.seeds:
        table = replace(table, seeds=list(dict.fromkeys(options.seeds)))
    return table


def _entries(table: Table, options: argparse.Namespace) -> list[Entry]:
    task, data = find_task(table.task), options.data or table.data
    if data is None:
        raise AdfqError(f"the {table.profile} profile needs --data, {task.data} for example")
    given = vars(options)
    return table.entries(
        data=data,
        pretrained=table.data is None and options.checkpoints is None,
        checkpoint=(lambda name: _find_checkpoint(options.checkpoints, name)) if options.checkpoints else None,
        limit=given.get("limit"),
        batch_size=given.get("batch_size") or table.batch_size or task.batch_size,
        task_arguments=_task_arguments(options, task),
    )


def _figure(options: argparse.Namespace) -> None:
    from benchmarks.reports import figures  # matplotlib takes its time

    figures.check_file(options.out)
    compare = {"detections": figures.compare_detections, "masks": figures.compare_masks}[options.kind]
    table = _choose(load_table(_FIGURES[options.kind], options.profile), options)
    options.task = table.task
    _check_options(options)
    # One column a method: the first of whatever there are several of.
    table = replace(table, models=table.models[:1], bits=(options.bits or ["W4/A4"])[:1], seeds=table.seeds[:1])
    device = resolve_device(options.device)
    columns: dict[str, Any] = {}
    entries = _entries(table, options)
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


def _list(options: argparse.Namespace) -> None:
    models = [name for task in TASKS.values() for name in task.model_names()]
    lists = {"models": models, "methods": adfq.methods(), "tables": table_names()}
    print("\n".join(lists[options.what]))


def _find_checkpoint(directory: Path, model: str) -> str:
    for suffix in CHECKPOINT_SUFFIXES:
        path = directory / f"{model}{suffix}"
        if path.is_file():
            return str(path)
    raise AdfqError(f"there is no {directory / model}.safetensors (nor {', '.join(CHECKPOINT_SUFFIXES[1:])})")


def _choose_model(name: str, known: dict[str, Model]) -> Model:
    if name not in known:
        raise AdfqError(f"unknown model {name!r}; there are {', '.join(known)}")
    return known[name]


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _choose_rows(table: Table, names: Sequence[str]) -> list[Row]:
    """The table's rows by their names; any other method makes a row of its own."""
    known = {row.key: row for row in table.rows}
    # Full precision is always there: differences are taken to it, and it tells whether a model is the published one.
    return [known.get(name) or table.row(name) for name in names if name != FULL_PRECISION]


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.5,0.5,0.5") from None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
