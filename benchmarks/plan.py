"""Tables as data: the TOML files of ``tables/``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION
from benchmarks.cell import Cell

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


METHOD_LABELS = {
    FULL_PRECISION: "Full precision",
    "base_ptq": "Base PTQ",
    "ptq4vit": "PTQ4ViT",
    "repq_vit": "RepQ-ViT",
    "adfq_vit": "ADFQ-ViT",
}


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
class Row:
    """A method with its options, at every bit-width of the table: its name among the rows, and its heading.

    Attributes:
        arguments: the method's options.
        calibration_size: number of calibration images.
    """

    key: str
    label: str
    method: str
    arguments: Mapping[str, Any]
    calibration_size: int


@dataclass(frozen=True)
class Entry:
    """Where a cell belongs in a table."""

    row: Row
    model: Model
    cell: Cell


@dataclass(frozen=True)
class Table:
    """One profile of one table.

    Attributes:
        name: ``"1"`` to ``"5"``.
        caption: what was measured on what, for the reader of the table.
        metrics: keys in a record's metrics, with the names that stand in headings where there are several.
        bits: that rows are measured at.
        seeds: that each quantized cell is measured with.
        cell_memory: what measuring a cell takes, in GB, of models so small that one core is enough for each; None for
            others, which have the machine for themselves.
        cost: whether what each row costs stands beside its accuracy.
        settings: by method, what all its rows share: ``calibration_size`` and options.
        calibration_size: where the settings have none.
        batch_size: of evaluation, or None where the task decides.
        digits: decimals of a metric, measured or published.
        data: the task's data spec; None where the user gives it.
        published: the ``task`` in published.csv whose numbers stand beside ours, or None.
        full_precision_tolerance: by how much full precision may differ from the published value, or None.
    """

    name: str
    profile: str
    title: str
    caption: str
    task: str
    metrics: Mapping[str, str]
    rows: Sequence[Row]
    bits: Sequence[str]
    models: Sequence[Model]
    calibration_size: int
    batch_size: int | None = None
    digits: int = 2
    seeds: Sequence[int] = (0,)
    cell_memory: float | None = None
    cost: bool = False
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: str | None = None
    published: str | None = None
    full_precision_tolerance: float | None = None

    def row(
        self,
        method: str,
        key: str | None = None,
        label: str | None = None,
        calibration_size: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Row:
        """A row of this table; what is not given comes from the method's settings."""
        shared = dict(self.settings.get(method, {}))
        size = shared.pop("calibration_size", self.calibration_size)
        return Row(
            key or method,
            label or METHOD_LABELS.get(method, method),
            method,
            {**shared, **(arguments or {})},
            size if calibration_size is None else calibration_size,
        )

    def entries(self, **common: Any) -> list[Entry]:
        """The table's cells, model after model, full precision first.

        Args:
            **common: fields that all cells share; ``checkpoint`` may be a function of the model's name.
        """
        checkpoint = common.pop("checkpoint", None)
        entries = []
        for model in self.models:
            fields = {
                "task": self.task,
                "model": model.name,
                "preprocessing": tuple(sorted(model.preprocessing.items())),
                "checkpoint": checkpoint(model.name) if checkpoint else None,
                **common,
            }
            reference = Cell.create(method=FULL_PRECISION, **fields)
            entries.append(Entry(self.row(FULL_PRECISION), model, reference))
            entries += [
                Entry(
                    row,
                    model,
                    Cell.create(
                        method=row.method,
                        method_arguments=tuple(sorted(row.arguments.items())),
                        calibration_size=row.calibration_size,
                        bits=bits,
                        seed=seed,
                        **fields,
                    ),
                )
                for bits in self.bits
                for row in self.rows
                for seed in self.seeds
            ]
        return entries


def table_names(profile: str | None = None) -> list[str]:
    """The tables that there are; of those that have a profile, where one is given.

    Raises:
        AdfqError: for a profile that no table has.
    """
    names = sorted(path.stem for path in _TABLES.glob("*.toml"))
    if profile is None:
        return names
    profiles = {name: _read_table(name)["profiles"] for name in names}
    if chosen := [name for name in names if profile in profiles[name]]:
        return chosen
    known = dict.fromkeys(known for each in profiles.values() for known in each)
    raise AdfqError(f"no table has a profile {profile!r}; there are {', '.join(known)}")


def load_table(name: str, profile: str) -> Table:
    """Reads a table's specification; AdfqError for an unknown table or profile."""
    if name not in table_names():
        raise AdfqError(f"unknown table {name!r}; there are {', '.join(table_names())}")
    spec = _read_table(name)
    profiles = spec.pop("profiles")
    if profile not in profiles:
        raise AdfqError(f"table {name} has no profile {profile!r}; there are {', '.join(profiles)}")
    fields = {**spec, **profiles[profile]}
    rows = [*({"method": method} for method in fields.pop("methods", ())), *fields.pop("rows", ())]
    models = [Model(**{"preprocessing": {}, **model}) for model in fields.pop("models")]
    table = Table(name=name, profile=profile, models=models, rows=(), **fields)
    return replace(table, rows=[table.row(**row) for row in rows])


def _read_table(name: str) -> dict[str, Any]:
    return tomllib.loads((_TABLES / f"{name}.toml").read_text(encoding="utf-8"))


def published_numbers(table: Table) -> pd.DataFrame:
    """The rows of published.csv that belong to a table: model, method, bits, metric, value, verified."""
    rows = pd.read_csv(_TABLES / "published.csv", dtype={"table": str})
    rows = rows[(rows["table"] == table.name) & (rows["task"] == table.published) & rows["metric"].isin(table.metrics)]
    rows = rows.assign(verified=rows["verified"] == "yes")
    return rows[["model", "method", "bits", "metric", "value", "verified"]]
