"""The ``adfq`` command."""

from __future__ import annotations

import argparse
import ast
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import adfq
from adfq.errors import AdfqError
from adfq.methods import FULL_PRECISION
from benchmarks.cells import Cell
from benchmarks.console import warn
from benchmarks.reports.spec import Model, load_table, table_names
from benchmarks.reports.tables import STYLES, render, tabulate_results
from benchmarks.results import ResultStore
from benchmarks.runner import resolve_device, run_cell, run_cells
from benchmarks.tasks import load_subject
from benchmarks.tasks.classification import model_names

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|table|list")

    run = commands.add_parser("run", help="measure one method on one model")
    run.set_defaults(action=_run)
    run.add_argument("task", choices=["classification"])
    run.add_argument("--model", required=True, help="an embedded model or any of timm's; 'adfq list models'")
    run.add_argument(
        "--model-arg", type=_pair, nargs="+", action="extend", default=[], metavar="K=V", help="for timm's factory"
    )
    run.add_argument("--checkpoint", metavar="FILE", help="local weights: safetensors, PyTorch (weights only), npz")
    run.add_argument("--pretrained", action="store_true", help="download timm's weights where there is no checkpoint")
    run.add_argument(
        "--data", required=True, metavar="SPEC", help="embedded, folder:ROOT or torch/NAME:ROOT, as timm names them"
    )
    run.add_argument("--method", required=True, help="'adfq list methods'")
    run.add_argument("--method-arg", type=_pair, nargs="+", action="extend", default=[], metavar="K=V")
    run.add_argument("--bits", default="W4A4", help="weights and activations, 2 to 8 each (default: W4A4)")
    run.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"))
    run.add_argument("--mean", type=_floats, metavar="M,M,M")
    run.add_argument("--std", type=_floats, metavar="S,S,S")
    run.add_argument("--crop-pct", type=float)
    run.add_argument("--interpolation", choices=["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
    run.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")
    _add_common(run)
    run.set_defaults(calibration_size=32)

    table = commands.add_parser("table", help="measure and print a table of the paper")
    table.set_defaults(action=_table)
    table.add_argument("name", help="'adfq list tables'")
    table.add_argument("--profile", default="embedded", help="embedded (default), or full: the paper's data and models")
    table.add_argument("--data", metavar="SPEC", help="in the full profile, folder:/path/to/imagenet")
    table.add_argument("--checkpoints", type=Path, metavar="DIR", help="files MODEL.safetensors, .pth, .bin or .npz")
    table.add_argument("--models", nargs="+", metavar="MODEL")
    table.add_argument("--methods", nargs="+", metavar="METHOD")
    table.add_argument("--bits", nargs="+", metavar="W4A4")
    table.add_argument("--format", choices=STYLES, default="md")
    table.add_argument(
        "--out", type=Path, default=Path("runs"), metavar="DIR", help="records and the table (default: runs)"
    )
    _add_common(table)

    listing = commands.add_parser("list", help="list what there is")
    listing.set_defaults(action=_list)
    listing.add_argument("what", choices=["models", "methods", "tables"])
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calibration-size", type=int, metavar="N", help="calibration images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=_positive, metavar="N", help="evaluate on the first N images only")
    parser.add_argument("--batch-size", type=_positive, default=100, metavar="N")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 …")


def _run(options: argparse.Namespace) -> None:
    overrides = {
        key: getattr(options, key)
        for key in ("input_size", "mean", "std", "crop_pct", "interpolation")
        if getattr(options, key) is not None
    }
    device = resolve_device(options.device)
    cell = Cell.create(
        task=options.task,
        model=options.model,
        data=options.data,
        method=options.method,
        bits=options.bits,
        model_arguments=tuple(sorted(options.model_arg)),
        checkpoint=options.checkpoint,
        pretrained=options.pretrained,
        method_arguments=tuple(sorted(options.method_arg)),
        preprocessing=tuple(sorted(overrides.items())),
        calibration_size=options.calibration_size,
        seed=options.seed,
        limit=options.limit,
        batch_size=options.batch_size,
    )
    record = run_cell(cell, load_subject(cell), device)
    if options.json:
        print(json.dumps(record))
        return
    metrics, timing = record["metrics"], record["timing"]
    print(
        f"{cell.model}, {cell.method}, {cell.bits}: top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} % "
        f"on {metrics['images']} images (calibration {timing['calibration']:.1f} s, "
        f"evaluation {timing['evaluation']:.1f} s)"
    )


def _table(options: argparse.Namespace) -> None:
    table = load_table(options.name, options.profile)
    if options.models:
        known = {name: model for model in table.models for name in (model.key, model.name)}
        table = replace(table, models=[_choose_model(name, known) for name in options.models])
    if options.methods:
        # Full precision is what differences are taken to, and what tells whether a model is the published one.
        quantized = [method for method in options.methods if method != FULL_PRECISION]
        table = replace(table, methods=[FULL_PRECISION, *quantized])
    if options.bits:
        table = replace(table, bits=options.bits)
    data = options.data or table.data
    if data is None:
        raise AdfqError(f"the {table.profile} profile needs --data, folder:/path/to/imagenet for example")
    device = resolve_device(options.device)
    cells = table.cells(
        data=data,
        pretrained=table.data is None and options.checkpoints is None,
        checkpoint=(lambda name: _find_checkpoint(options.checkpoints, name)) if options.checkpoints else None,
        calibration_size=table.calibration_size if options.calibration_size is None else options.calibration_size,
        seed=options.seed,
        limit=options.limit,
        batch_size=options.batch_size,
    )
    store = ResultStore(options.out)
    frame = tabulate_results(table, run_cells(cells, store, device))
    text = render(table, frame, options.format)
    path = options.out / f"table{table.name}-{table.profile}.{STYLES[options.format]}"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AdfqError(f"cannot write {path}: {error.strerror}") from None
    print(text, end="")


def _list(options: argparse.Namespace) -> None:
    lists = {"models": model_names, "methods": adfq.methods, "tables": table_names}
    print("\n".join(lists[options.what]()))


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
