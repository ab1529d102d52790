"""Options that several commands share, and the values that they give."""

from __future__ import annotations

import argparse
import ast
from dataclasses import fields
from pathlib import Path
from typing import Any

from adfq.errors import AdfqError
from benchmarks.bundled import BUNDLED
from benchmarks.cell import Cell
from benchmarks.plan import RECORDED, Selection, task_arguments
from benchmarks.tasks import find_task, task_names

#: The owner of `add_parser`; argparse has no public name for it.
Commands = Any
Parser = argparse.ArgumentParser

#: Help of --data.
DATA_HELP = "bundled; folder:ROOT or torch/NAME:ROOT, as timm names them; for detection and segmentation COCO's folder"


def add_table(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the cells of tables, named after the fields of `Selection`."""
    parser.add_argument(
        "--profile", default=BUNDLED, help="bundled (default), full (the paper's data and models), or another one"
    )
    parser.add_argument("--data", metavar="SPEC", help="data, as for 'adfq run', of tables without data of their own")
    _add_data_name(parser)
    _add_class_map(parser)
    _add_head_images(parser)
    parser.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="files MODEL.safetensors, .pth, .pt, .bin or .npz"
    )
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="columns, by key or name (default: all)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="methods, or rows by their key (default: all)")
    parser.add_argument("--also", nargs="+", metavar="METHOD", help="methods beside the table's own, or --methods")
    parser.add_argument("--bits", nargs="+", metavar="W4A4", help="bit-widths (default: the table's own)")
    parser.add_argument(
        "--seeds",
        type=_seed,
        nargs="+",
        metavar="N",
        help=f"seeds of calibration images and methods; {RECORDED} for those of the committed results (default: 0)",
    )


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide a cell, named after its fields; None where not given."""
    parser.add_argument("task", choices=task_names())
    add_model(parser)
    parser.add_argument("--data", required=True, metavar="SPEC", help=DATA_HELP)
    _add_data_name(parser)
    _add_class_map(parser)
    _add_head(parser)
    add_prompts(parser)
    add_method(parser)


def _add_data_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-name", metavar="NAME", help="name of the data set in records (default: that of its folder)"
    )


def _add_class_map(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--class-map",
        metavar="FILE",
        help="names of class folders in the order of the model's classes: text, or JSON (default: natural order)",
    )


def _add_head(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--head", choices=["knn", "prototypes", "ridge"], help="head of an encoder (default: all three)"
    )
    parser.add_argument(
        "--features",
        choices=["class", "mean", "both"],
        help="token or patches that give features (default: the model's)",
    )
    _add_head_images(parser)


def _add_head_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--head-images", type=positive, metavar="N", help="training images that make an encoder's head (default: all)"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of a task's model and of its preprocessing."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model", help="a bundled model, one with an adapter of timm's or MMDetection's, a SAM; 'adfq list models'"
    )
    model.add_argument("--config", metavar="FILE", help="MMDetection's config of a detector")
    parser.add_argument(
        "--model-arg",
        dest="model_arguments",
        type=pair,
        nargs="+",
        action="extend",
        metavar="K=V",
        help="arguments of timm's factory",
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="local weights: safetensors, PyTorch (weights only), npz; package:NAME"
    )
    parser.add_argument(
        "--pretrained", action="store_true", default=None, help="download timm's weights where there is no checkpoint"
    )
    parser.add_argument(
        "--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="channels and pixels (default: the model's)"
    )
    parser.add_argument("--mean", type=_floats, metavar="M,M,M", help="mean a channel (default: the model's)")
    parser.add_argument(
        "--std", type=_floats, metavar="S,S,S", help="standard deviation a channel (default: the model's)"
    )
    parser.add_argument("--crop-pct", type=float, help="share of the shorter side that is kept (default: the model's)")
    parser.add_argument(
        "--interpolation",
        choices=["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"],
        help="filter for resizing (default: the model's)",
    )


def add_method(parser: argparse.ArgumentParser) -> None:
    """Add the options of the method."""
    parser.add_argument(
        "--encoder-only", action="store_true", default=None, help="quantize the image encoder alone (segmentation)"
    )
    parser.add_argument("--method", help="method of 'adfq list methods'")
    parser.add_argument(
        "--method-arg",
        dest="method_arguments",
        type=pair,
        nargs="+",
        action="extend",
        metavar="K=V",
        help="options of the method, on its page in docs/methods",
    )
    parser.add_argument("--bits", help="weights and activations, 2 to 8 each (default: W4A4)")
    add_seed(parser)


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add --seed."""
    parser.add_argument("--seed", type=int, help="seed of calibration images and method (default: 0)")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add --prompts."""
    parser.add_argument(
        "--prompts",
        metavar="boxes|points|FILE",
        help="boxes (default) or points of the ground truth, or a file of a detector's COCO results (segmentation)",
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of calibration and evaluation."""
    add_calibration(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="evaluate on the first N images only")
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="images a batch in evaluation (default: 100; detection, segmentation: 1)",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the options of calibration."""
    add_calibration_size(parser)
    parser.add_argument(
        "--calibration-batch-size",
        type=positive,
        metavar="N",
        help="images in one pass of calibration (default of a table: its own, or all; else 32, in detection and "
        "segmentation 1, of bundled data all)",
    )
    add_device(parser)


def add_calibration_size(parser: argparse.ArgumentParser) -> None:
    """Add --calibration-size."""
    parser.add_argument("--calibration-size", type=int, metavar="N", help="number of calibration images")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 …")


def check_options(options: argparse.Namespace) -> None:
    """Raise AdfqError for options of another task."""
    own = find_task(options.task)
    tasks = map(find_task, task_names())
    for name in sorted({name for task in tasks for name in (*task.options, *task.arguments)}):
        if getattr(options, name, None) is not None and name not in (*own.options, *own.arguments):
            raise AdfqError(f"{options.task} has no --{name.replace('_', '-')}")


def create_cell(options: argparse.Namespace) -> Cell:
    """Return the cell that the options of `add_experiment` choose.

    Raises:
        AdfqError: without a model or method, and for what `Cell.create` refuses.
    """
    chosen = cell_fields(options)
    missing = [f"--{name}" for name in ("model", "method") if name not in chosen]
    if missing:
        command = options.command
        raise AdfqError(f"the following arguments are required: {', '.join(missing)} (see adfq {command} --help)")
    return Cell.create(**{"calibration_batch_size": calibration_batch_size(options.task, options.data), **chosen})


def calibration_batch_size(task: str, data: str) -> int | None:
    """Return the number of images in one pass of calibration where nothing says another one; None for all.

    Args:
        task: name of the task.
        data: data set specification. Bundled models are so small that all images are calibrated on at once.
    """
    return None if data == BUNDLED else find_task(task).calibration_batch_size


def cell_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a cell that the options give, for `Cell.create`."""
    given: dict[str, Any] = {field.name: getattr(options, field.name, None) for field in fields(Cell)}
    task = find_task(options.task)
    given["model"] = options.config or options.model
    given["batch_size"] = given["batch_size"] or task.batch_size
    given["data_name"] = getattr(options, "data_name", None)
    given["task_arguments"] = task_arguments(task, _task_options(options))
    names = ("input_size", "mean", "std", "crop_pct", "interpolation")
    given["preprocessing"] = [(name, getattr(options, name)) for name in names if getattr(options, name) is not None]
    for name in ("model_arguments", "method_arguments", "preprocessing"):
        if given[name] is not None:
            given[name] = tuple(sorted(dict(given[name]).items()))  # the last of an option given twice counts
    return {name: value for name, value in given.items() if value is not None}


def select(options: argparse.Namespace) -> Selection:
    """Return the selection that the options of `add_table` and `add_common` make.

    Raises:
        AdfqError: for numbers beside ``recorded`` in ``--seeds``.
    """
    given = {field.name: getattr(options, field.name, None) for field in fields(Selection)}
    seeds = given["seeds"] or ()
    if RECORDED in seeds:
        if len(seeds) > 1:
            raise AdfqError(f"--seeds takes numbers, or {RECORDED} alone")
        given["seeds"] = RECORDED
    given["task_arguments"] = _task_options(options)
    return Selection(**{name: value for name, value in given.items() if value is not None})


_TASK_OPTIONS = ("class_map", "encoder_only", "features", "head", "head_images", "prompts")


def _task_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the given options that one task alone has and that decide results."""
    given = {name: getattr(options, name, None) for name in _TASK_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def pair(text: str) -> tuple[str, Any]:
    """Return key and value of ``KEY=VALUE``, for argparse; a value that is no Python literal is text."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return key, value


def _seed(text: str) -> int | str:
    if text == RECORDED:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor {RECORDED!r}") from None


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.5,0.5,0.5") from None


def positive(text: str) -> int:
    """Return a whole number from 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
