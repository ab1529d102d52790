"""Tables as data: the TOML files of ``tables/``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from adfq.errors import AdfqError
from adfq.methods import FULL_PRECISION
from benchmarks.cells import Cell

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _find_tables() -> Path:
    # tables/ of the repository is installed as this package. importlib.resources cannot read one that has no
    # Python file from an editable installation.
    spec = find_spec("adfq_tables")
    locations = spec.submodule_search_locations if spec else None
    return next(Path(path) for path in locations or () if Path(path).is_dir())


_TABLES = _find_tables()


@dataclass(frozen=True)
class Model:
    """A column: its key in published.csv, its heading, and what the task needs to load it."""

    key: str
    label: str
    name: str
    preprocessing: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """One profile of one table.

    Attributes:
        name: ``"1"`` to ``"5"``.
        caption: what was measured on what, for the reader of the table.
        metric: the key in a record's metrics.
        data: the task's data spec; None where the user gives it.
        published: the ``task`` in published.csv whose numbers stand beside ours, or None.
        full_precision_tolerance: by how much full precision may differ from the published value, or None.
    """

    name: str
    profile: str
    title: str
    caption: str
    task: str
    metric: str
    methods: Sequence[str]
    bits: Sequence[str]
    models: Sequence[Model]
    calibration_size: int
    data: str | None = None
    published: str | None = None
    full_precision_tolerance: float | None = None

    def cells(self, **common: Any) -> list[Cell]:
        """The table's cells, model after model, full precision first.

        Args:
            **common: fields that all cells share; ``checkpoint`` may be a function of the model's name.
        """
        checkpoint = common.pop("checkpoint", None)
        cells = []
        for model in self.models:
            fields = {
                "task": self.task,
                "model": model.name,
                "preprocessing": tuple(sorted(model.preprocessing.items())),
                "checkpoint": checkpoint(model.name) if checkpoint else None,
                **common,
            }
            if FULL_PRECISION in self.methods:
                cells.append(Cell.create(method=FULL_PRECISION, **fields))
            cells += [
                Cell.create(method=method, bits=bits, **fields)
                for bits in self.bits
                for method in self.methods
                if method != FULL_PRECISION
            ]
        return cells


def table_names() -> list[str]:
    """The tables that there are."""
    return sorted(path.stem for path in _TABLES.glob("*.toml"))


def load_table(name: str, profile: str) -> Table:
    """Reads a table's specification; AdfqError for an unknown table or profile."""
    if name not in table_names():
        raise AdfqError(f"unknown table {name!r}; there are {', '.join(table_names())}")
    spec = tomllib.loads((_TABLES / f"{name}.toml").read_text(encoding="utf-8"))
    profiles = spec.pop("profiles")
    if profile not in profiles:
        raise AdfqError(f"table {name} has no profile {profile!r}; there are {', '.join(profiles)}")
    fields = {**spec, **profiles[profile]}
    models = [Model(**{"preprocessing": {}, **model}) for model in fields.pop("models")]
    return Table(name=name, profile=profile, models=models, **fields)


def published_numbers(table: Table) -> pd.DataFrame:
    """The rows of published.csv that belong to a table: model, method, bits, value, verified."""
    rows = pd.read_csv(_TABLES / "published.csv", dtype={"table": str})
    rows = rows[(rows["table"] == table.name) & (rows["task"] == table.published) & (rows["metric"] == table.metric)]
    rows = rows.assign(verified=rows["verified"] == "yes")
    return rows[["model", "method", "bits", "value", "verified"]]
