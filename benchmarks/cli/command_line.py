"""A cell as the command line that measures it."""

from __future__ import annotations

import shlex
from typing import Any

from adfq.method import FULL_PRECISION
from benchmarks.cell import Arguments, Cell, data_set_name
from benchmarks.cli.options import calibration_batch_size, pair
from benchmarks.tasks import find_task


def command_line(cell: Cell) -> str:
    """Return the ``adfq run`` that measures a cell, quoted for a shell: the inverse of `options.create_cell`."""
    task = find_task(cell.task)
    location = cell.location
    words: list[Any] = ["adfq", "run", cell.task, "--model", location.file("model", cell.model)]
    words += _pairs("--model-arg", cell.model_arguments)
    if location.checkpoint is not None:
        words += ["--checkpoint", location.checkpoint]
    if cell.pretrained:
        words.append("--pretrained")
    words += ["--data", location.data]
    if cell.data != data_set_name(location.data):
        words += ["--data-name", cell.data]
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
        batch_size = cell.calibration_batch_size or cell.calibration_size
        usual = calibration_batch_size(cell.task, location.data) or cell.calibration_size
        if batch_size != min(usual, cell.calibration_size):
            words += ["--calibration-batch-size", batch_size]
    if cell.limit is not None:
        words += ["--limit", cell.limit]
    if cell.batch_size != task.batch_size:
        words += ["--batch-size", cell.batch_size]
    return shlex.join(map(str, words))


def _pairs(option: str, arguments: Arguments) -> list[str]:
    """Return an option's words that `pair` reads as these arguments."""
    words = []
    for key, value in arguments:
        word = f"{key}={value}"
        read = pair(word)[1]
        if read != value or type(read) is not type(value):
            literal = repr(value)  # without its quotes a string would be read as something else
            if not isinstance(value, str):
                literal = literal.replace("inf", "1e999")  # Python reads 1e999 as infinity, and "inf" as a name
            word = f"{key}={literal}"
        words.append(word)
    return [option, *words] if words else []
