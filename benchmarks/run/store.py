"""Store of results, with one JSON file for each measured cell."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from adfq.errors import AdfqError
from benchmarks.cell import Cell
from benchmarks.run.console import warn

Record = dict[str, Any]


class ResultStore:
    """Store of records under DIRECTORY/records, written whole and never overwritten by another measurement.

    A record counts only for the code, data, weights and library versions that it was measured with, its ``provenance``:
    a number in a table is one that the present code gives. Records of other provenance stay beside it.

    Cells that could not be measured are under DIRECTORY/failures, until they can. Running cells are locked under
    DIRECTORY/locks, by the operating system: a process that is killed leaves nothing locked.

    Args:
        directory: folder of the store; created if missing.

    Raises:
        AdfqError: if the folder cannot be written to.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records, self.failures, self.locks = (directory / name for name in ("records", "failures", "locks"))
        try:
            for folder in (self.records, self.failures, self.locks):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AdfqError(f"cannot write results to {directory}: {error.strerror}") from None

    def lock(self, cell: Cell) -> FileLock | None:
        """Lock a cell for this process, until the lock is released; return None while another process has it.

        Args:
            cell: cell to measure.

        Raises:
            AdfqError: if the store cannot be written to.
        """
        lock = FileLock(self.locks / f"{cell.id}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        except OSError as error:
            raise AdfqError(f"cannot write results to {self.directory}: {error.strerror}") from None
        return lock

    def known(self, cell: Cell) -> list[Record]:
        """Return all records of a cell, of any provenance; a damaged one is set aside."""
        return [record for _, record in self._read(f"{cell.id}*.json") if record["config"] == cell.config]

    def get(self, cell: Cell, provenance: Mapping[str, Any]) -> Record | None:
        """Return the record of a cell with the given provenance; None if there is none."""
        return next((record for record in self.known(cell) if record["provenance"] == provenance), None)

    def put(self, cell: Cell, record: Record) -> None:
        """Write a record, and delete the cell's failure.

        Args:
            cell: measured cell, locked by this process.
            record: its record.

        Raises:
            AdfqError: if the record cannot be written.
        """
        digest = hashlib.sha256(json.dumps(record["provenance"], sort_keys=True).encode()).hexdigest()[:8]
        self._write(self.records / f"{cell.id}-{digest}.json", record)
        (self.failures / f"{cell.id}.json").unlink(missing_ok=True)

    def put_failure(self, cell: Cell, failure: Mapping[str, Any]) -> None:
        """Write the reason why a cell could not be measured.

        Args:
            cell: cell, locked by this process.
            failure: the reason, see `Failure.record`.

        Raises:
            AdfqError: if the failure cannot be written.
        """
        self._write(self.failures / f"{cell.id}.json", {"config": cell.config, **failure})

    def unfinished(self, cell: Cell) -> Path:
        """Return the folder for finished parts of a cell's method, which lasts until the cell has a record."""
        return self.directory / "unfinished" / cell.id

    def tabulate(self) -> pd.DataFrame:
        """Return a row for every record and failure, in the order they were finished.

        Columns: ``id``, ``status`` ("measured" or "failed"), the fields of ``config`` (arguments as ``key=value …``),
        the metrics, costs as ``cost.…``, versions and hardware as ``environment.…``, and ``finished``.
        """
        rows = [_row(path, record) for path, record in self._read("*.json")]
        for path in sorted(self.failures.glob("*.json")):
            failure = json.loads(path.read_text(encoding="utf-8"))
            rows.append({**_row(path, failure), "status": "failed", "error": failure["error"]})
        frame = pd.DataFrame(rows, columns=None if rows else ["id", "status", "finished"])
        return frame.sort_values("finished", kind="stable", ignore_index=True)

    def find(self, identity: str) -> list[Record]:
        """Return the records and failures whose id begins with `identity`."""
        files = [*sorted(self.records.glob("*.json")), *sorted(self.failures.glob("*.json"))]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.stem.startswith(identity)]

    def _read(self, pattern: str) -> Iterator[tuple[Path, Record]]:
        for path in sorted(self.records.glob(pattern)):
            try:
                record: Record = json.loads(path.read_text(encoding="utf-8"))
                if not all(isinstance(record[key], dict) for key in ("config", "provenance", "metrics")):
                    raise TypeError
            except FileNotFoundError:  # set aside by another process
                continue
            except (ValueError, KeyError, TypeError):
                aside = path.with_suffix(".damaged")
                os.replace(path, aside)
                warn(f"the record {path} is damaged; it is now {aside.name} and its cell runs again")
                continue
            yield path, record

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        # No two processes write for one cell, so that what a killed one has left is overwritten.
        part = path.with_suffix(".part")
        try:
            with open(part, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise AdfqError(f"cannot write a record to {path.parent}: {error.strerror}") from None


def _row(path: Path, record: Record) -> dict[str, Any]:
    config = {
        name: " ".join(f"{key}={item}" for key, item in value) if isinstance(value, list) else value
        for name, value in record["config"].items()
    }
    nested = {
        f"{kind}.{name}": value
        for kind in ("cost", "environment")
        for name, value in record.get(kind, {}).items()
        if not isinstance(value, dict)
    }
    return {
        "id": path.stem,
        "status": "measured",
        **config,
        **record.get("metrics", {}),
        **nested,
        "finished": record.get("finished"),
    }
