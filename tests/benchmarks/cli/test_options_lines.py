"""Which part of a table the command line chooses."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from adfq.errors import AdfqError
from benchmarks.cli.options import add_calibration, add_table, choose_part
from benchmarks.plan import Table, load_table


def choose(name: str, *arguments: str) -> Table:
    parser = argparse.ArgumentParser()
    add_table(parser)
    add_calibration(parser)
    return choose_part(load_table(name, "bundled"), parser.parse_args(arguments))


def rows(table: Table) -> list[str]:
    return [row.key for row in table.rows]


def test_methods_stand_beside_a_tables_own() -> None:
    own = rows(choose("4"))
    assert "ppoq" in own
    assert rows(choose("4", "--also", "repq_vit", "base_ptq")) == [*own, "repq_vit", "base_ptq"]
    assert rows(choose("1", "--methods", "adfq_vit", "--also", "base_ptq")) == ["adfq_vit", "base_ptq"]
    assert rows(choose("4", "--methods", "base_ptq", "--also", "ppoq")) == ["base_ptq", "ppoq"]


def test_a_method_beside_a_tables_own_has_the_tables_settings() -> None:
    table = choose("1", "--methods", "base_ptq", "--also", "adfq_vit")
    assert table.rows == choose("1", "--methods", "base_ptq", "adfq_vit").rows
    assert table.rows[1].arguments["iterations"] == 50
    assert choose("4", "--also", "repq_vit", "--calibration-size", "7").rows[-1].calibration_size == 7


def test_no_row_is_there_twice() -> None:
    assert rows(choose("1", "--also", "repq_vit", "full_precision")) == rows(choose("1"))
    assert rows(choose("4", "--also", "base_ptq", "base_ptq", "ppoq")) == [*rows(choose("4")), "base_ptq"]


def test_an_unknown_method_beside_a_tables_own(
    tmp_path: Path, assert_refused: Callable[[Sequence[str], str], None]
) -> None:
    command = ["table", "1", "--models", "bundled_vit", "--also", "magic", "--out", str(tmp_path)]
    assert_refused(command, "unknown method 'magic'; there are full_precision, adfq_vit")


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(AdfqError, match="unknown model 'vgg'"):
        choose("1", "--models", "vgg")
