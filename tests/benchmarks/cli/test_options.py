"""A cell's command line measures that very cell."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cell import Cell
from benchmarks.cli import run, table
from benchmarks.cli.command_line import command_line
from benchmarks.cli.options import check_options, create_cell, select
from benchmarks.plan import make_plan, table_names

pytestmark = pytest.mark.usefixtures("methods_read_once")


@pytest.fixture(scope="session")
def parse() -> Callable[[list[str]], argparse.Namespace]:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")
    for command in (run, table):
        command.add(commands)
    return parser.parse_args


def cell_of(line: str, parse: Callable[[list[str]], argparse.Namespace]) -> Cell:
    program, *words = shlex.split(line)
    assert program == "adfq"
    options = parse(words)
    check_options(options)
    return create_cell(options)


@pytest.mark.parametrize(
    "more",
    [[], ["--limit", "50", "--calibration-size", "4", "--calibration-batch-size", "3", "--batch-size", "7"]],
)
@pytest.mark.parametrize("profile", ["bundled", "full", "mobile"])
def test_every_cell_of_every_table(
    profile: str, more: list[str], parse: Callable[[list[str]], argparse.Namespace]
) -> None:
    data = [] if profile == "bundled" else ["--data", "folder:/data/image net"]
    for name in table_names(profile):
        options = parse(["table", name, "--profile", profile, *data, *more])
        (planned,) = make_plan(options.names, select(options), check_files=False).tables
        for entry in planned.entries:
            if more and entry.row.method != "full_precision":
                assert entry.cell.calibration_batch_size == 3
            again = cell_of(command_line(entry.cell), parse)
            assert (again, again.id, again.location) == (entry.cell, entry.cell.id, entry.cell.location)


@pytest.mark.parametrize(
    "fields",
    [
        {"checkpoint": "it's here.pth", "model_arguments": (("img_size", 28), ("name", "a b"), ("norm", "None"))},
        {"method_arguments": (("range", "minmax"),), "model_arguments": (("eps", math.inf),), "pretrained": True},
        {"preprocessing": (("crop_pct", 0.9), ("input_size", [3, 28, 28]), ("mean", (0.5, 0.1)), ("std", (1.0, 2.0)))},
        {"preprocessing": (("interpolation", "bilinear"),), "batch_size": 1, "seed": 3, "bits": "W3/A8"},
        {"task": "detection", "model": "configs/mine.py", "batch_size": 1},
        {"data": "folder:/data/2012", "data_name": "imagenet"},
        {"calibration_batch_size": 8},
        {"data": "folder:/data/2012", "calibration_size": 64},  # at once, which is not the default
        {"data": "folder:/data/2012", "calibration_size": 64, "calibration_batch_size": 32},
        {"data": "folder:/data/2012", "task_arguments": (("class_map", "lists/names.txt"),)},
        {
            "task": "detection",
            "model": "mask_rcnn_swin_tiny",
            "checkpoint": "a/b.pth",
            "data": "/c/coco",
            "batch_size": 1,
        },
        {
            "task": "segmentation",
            "task_arguments": (("encoder_only", True), ("prompts", "detections/found.json")),
            "batch_size": 2,
        },
    ],
)
def test_every_field_of_a_cell(fields: dict[str, Any], parse: Callable[[list[str]], argparse.Namespace]) -> None:
    cell = Cell.create(**{"task": "classification", "model": "m", "data": "bundled", "method": "base_ptq"} | fields)
    again = cell_of(command_line(cell), parse)
    assert (again, again.location) == (cell, cell.location)


@pytest.mark.parametrize(
    ("task", "data", "given", "found"),
    [
        ("classification", "bundled", [], None),
        ("classification", "folder:x", [], 32),
        ("encoders", "folder:x", [], 32),
        ("detection", "x", [], 1),
        ("segmentation", "x", [], 1),
        ("detection", "x", ["--calibration-batch-size", "3"], 3),
        ("detection", "x", ["--calibration-batch-size", "64"], None),
        ("segmentation", "bundled", ["--calibration-batch-size", "3"], 3),
    ],
)
def test_images_in_one_pass_of_calibration(
    task: str, data: str, given: list[str], found: int | None, parse: Callable[[list[str]], argparse.Namespace]
) -> None:
    words = ["run", task, "--model", "m", "--data", data, "--method", "base_ptq", "--calibration-size", "64", *given]
    assert create_cell(parse(words)).calibration_batch_size == found


def test_what_a_shell_reads(parse: Callable[[list[str]], argparse.Namespace]) -> None:
    cell = Cell.create(
        task="classification", model="m", data="folder:/my data", method="repq_vit", bits="W4A4", limit=9
    )
    assert command_line(cell) == (
        "adfq run classification --model m --data 'folder:/my data' --method repq_vit --bits W4A4 --seed 0 "
        "--calibration-size 32 --limit 9"
    )


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=8),
    st.lists(st.integers(), max_size=3),
)


@given(value=values)
def test_any_value_of_an_option(value: Any, parse: Callable[[list[str]], argparse.Namespace]) -> None:
    cell = Cell.create(task="classification", model="m", data="x", method="base_ptq", model_arguments=(("k", value),))
    again = cell_of(command_line(cell), parse)
    assert again.config == cell.config
    assert type(again.model_arguments[0][1]) is type(cell.model_arguments[0][1])
