"""Options that several commands share, and what they choose."""

from __future__ import annotations

import argparse
import ast
import shlex
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION
from benchmarks.cell import Arguments, Cell
from benchmarks.plan import Entry, Model, Row, Table
from benchmarks.tasks import Task, find_task, task_names

#: What `add_parser` belongs to.
Commands = Any
Parser = argparse.ArgumentParser

#: Of --data.
DATA_HELP = "bundled; folder:ROOT or torch/NAME:ROOT, as timm names them; of detection, segmentation COCO's folder"

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")


def add_table(parser: argparse.ArgumentParser) -> None:
    """What chooses a table's cells."""
    parser.add_argument("--profile", default="bundled", help="bundled (default), or full: the paper's data and models")
    parser.add_argument("--data", metavar="SPEC", help="in the full profile, as for 'adfq run'")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="files MODEL.safetensors, .pth, .bin or .npz")
    parser.add_argument("--models", nargs="+", metavar="MODEL")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="methods, or rows by their key in tables/*.toml")
    parser.add_argument("--also", nargs="+", metavar="METHOD", help="methods beside the table's own, or --methods")
    parser.add_argument("--bits", nargs="+", metavar="W4A4")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="of calibration images and methods")


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """What decides a cell, named after its fields; what is not given is None."""
    parser.add_argument("task", choices=task_names())
    add_model(parser)
    parser.add_argument("--data", required=True, metavar="SPEC", help=DATA_HELP)
    add_prompts(parser)
    add_method(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """A task's model, and what is done to images for it."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="an bundled model, any of timm's or MMDetection's, a SAM; 'adfq list models'")
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
    parser.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"))
    parser.add_argument("--mean", type=_floats, metavar="M,M,M")
    parser.add_argument("--std", type=_floats, metavar="S,S,S")
    parser.add_argument("--crop-pct", type=float)
    parser.add_argument("--interpolation", choices=["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])


def add_method(parser: argparse.ArgumentParser) -> None:
    """What quantizes the model."""
    parser.add_argument(
        "--encoder-only", action="store_true", default=None, help="of segmentation: quantize the image encoder alone"
    )
    parser.add_argument("--method", help="'adfq list methods'")
    parser.add_argument("--method-arg", dest="method_arguments", type=_pair, nargs="+", action="extend", metavar="K=V")
    parser.add_argument("--bits", help="weights and activations, 2 to 8 each (default: W4A4)")
    add_seed(parser)


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, help="of calibration images and method (default: 0)")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        metavar="boxes|points|FILE",
        help="of segmentation: the ground truth's boxes (default) or points, or a detector's results, as COCO has them",
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    add_calibration(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="evaluate on the first N images only")
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="of evaluation (default: 100; of detection, segmentation 1)"
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calibration-size", type=int, metavar="N", help="calibration images")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 …")


def check_options(options: argparse.Namespace) -> None:
    """Raises AdfqError for options that another task than this one has."""
    own = find_task(options.task)
    tasks = map(find_task, task_names())
    for name in sorted({name for task in tasks for name in (*task.options, *task.arguments)}):
        if getattr(options, name, None) is not None and name not in (*own.options, *own.arguments):
            raise AdfqError(f"{options.task} has no --{name.replace('_', '-')}")


def create_cell(options: argparse.Namespace) -> Cell:
    options.model = options.config or options.model
    missing = [f"--{name}" for name in ("model", "method") if getattr(options, name) is None]
    if missing:
        command = options.command
        raise AdfqError(f"the following arguments are required: {', '.join(missing)} (see adfq {command} --help)")
    return Cell.create(**cell_fields(options))


def command_line(cell: Cell) -> str:
    """The ``adfq run`` that measures a cell, quoted for a shell: the inverse of `create_cell`."""
    task = find_task(cell.task)
    location = cell.location
    words: list[Any] = ["adfq", "run", cell.task, "--model", location.file("model", cell.model)]
    words += _pairs("--model-arg", cell.model_arguments)
    if location.checkpoint is not None:
        words += ["--checkpoint", location.checkpoint]
    if cell.pretrained:
        words.append("--pretrained")
    words += ["--data", location.data]
    arguments = [(name, location.file(name, value)) for name, value in cell.task_arguments]
    for name, value in (*arguments, *cell.preprocessing):
        words.append(f"--{name.replace('_', '-')}")
        if name == "input_size":
            words += value
        elif name in ("mean", "std"):
            words.append(",".join(map(repr, value)))
        elif value is not True:
            words.append(value)
    words += ["--method", cell.method, *_pairs("--method-arg", cell.method_arguments)]
    if cell.method != FULL_PRECISION:
        words += ["--bits", cell.bits.replace("/", ""), "--seed", cell.seed]
        words += ["--calibration-size", cell.calibration_size]
    if cell.limit is not None:
        words += ["--limit", cell.limit]
    if cell.batch_size != task.batch_size:
        words += ["--batch-size", cell.batch_size]
    return shlex.join(map(str, words))


def _pairs(option: str, arguments: Arguments) -> list[str]:
    """An option's words that `_pair` reads as these arguments."""
    words = []
    for key, value in arguments:
        word = f"{key}={value}"
        read = _pair(word)[1]
        if read != value or type(read) is not type(value):
            literal = repr(value)  # of a string, its quotes: without them it would be read as something else
            if not isinstance(value, str):
                literal = literal.replace("inf", "1e999")  # which is infinity to Python, and "inf" is a name
            word = f"{key}={literal}"
        words.append(word)
    return [option, *words] if words else []


def cell_fields(options: argparse.Namespace) -> dict[str, Any]:
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


def choose_part(table: Table, options: argparse.Namespace) -> Table:
    """The part of a table that the options ask for."""
    if options.models:
        known = {name: model for model in table.models for name in (model.key, model.name)}
        table = replace(table, models=[_choose_model(name, known) for name in options.models])
    rows = _choose_rows(table, options.methods) if options.methods else list(table.rows)
    if options.also:
        there = {row.key for row in rows}
        rows += [row for row in _choose_rows(table, dict.fromkeys(options.also)) if row.key not in there]
    table = replace(table, rows=rows)
    if options.calibration_size is not None:  # goes before what the methods of the table have
        table = replace(table, rows=[replace(row, calibration_size=options.calibration_size) for row in table.rows])
    if options.bits:
        table = replace(table, bits=options.bits)
    if options.seeds:
        table = replace(table, seeds=list(dict.fromkeys(options.seeds)))
    return table


def table_entries(table: Table, options: argparse.Namespace) -> list[Entry]:
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


def _choose_model(name: str, known: dict[str, Model]) -> Model:
    if name not in known:
        raise AdfqError(f"unknown model {name!r}; there are {', '.join(known)}")
    return known[name]


def _choose_rows(table: Table, names: Iterable[str]) -> list[Row]:
    """The table's rows by their names; any other method makes a row of its own."""
    known = {row.key: row for row in table.rows}
    # Full precision is always there: differences are taken to it, and it tells whether a model is the published one.
    return [known.get(name) or table.row(name) for name in names if name != FULL_PRECISION]


def _find_checkpoint(directory: Path, model: str) -> str:
    for suffix in CHECKPOINT_SUFFIXES:
        path = directory / f"{model}{suffix}"
        if path.is_file():
            return str(path)
    raise AdfqError(f"there is no {directory / model}.safetensors (nor {', '.join(CHECKPOINT_SUFFIXES[1:])})")


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.5,0.5,0.5") from None


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
