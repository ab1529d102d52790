"""The result store: one JSON file for each measured cell."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from adfq.errors import AdfqError
from benchmarks.cells import Cell
from benchmarks.console import warn

Record = dict[str, Any]


class ResultStore:
    """Records under DIRECTORY/records, written whole or not at all.

    A record counts only for the code, weights and library versions that it was measured with (its
    ``provenance``): a number in a table is one that the present code gives.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records = directory / "records"
        try:
            self.records.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AdfqError(f"cannot write results to {directory}: {error.strerror}") from None

    def get(self, cell: Cell, provenance: dict[str, Any]) -> Record | None:
        """The record of a cell, or None where there is none of this provenance. A damaged one is set aside."""
        path = self._path(cell)
        try:
            record: Record = json.loads(path.read_text(encoding="utf-8"))
            config, found = record["config"], record["provenance"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            aside = path.with_suffix(".damaged")
            os.replace(path, aside)
            warn(f"the record {path} is damaged; it is now {aside.name} and its cell runs again")
            return None
        return record if config == cell.config and found == provenance else None

    def put(self, cell: Cell, record: Record) -> None:
        """Writes a record; readers see the old one or the new one, never a part.

        Raises:
            AdfqError: if it cannot be written.
        """
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(
                "w", dir=self.records, suffix=".part", delete=False, encoding="utf-8"
            ) as file:
                temporary = file.name
                json.dump(record, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path(cell))
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            raise AdfqError(f"cannot write a record to {self.records}: {error.strerror}") from None

    def unfinished(self, cell: Cell) -> Path:
        """Where a cell's method may keep what it has finished, until the cell has a record."""
        return self.directory / "unfinished" / cell.id

    def _path(self, cell: Cell) -> Path:
        return self.records / f"{cell.id}.json"
