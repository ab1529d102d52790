"""Store of results, with one JSON file for each measured cell."""

from __future__ import annotations

import glob
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
from benchmarks.run.records import (
    EXPORT_SCHEMA,
    SCHEMA,
    DamagedRecordError,
    NewerRecordError,
    Record,
    read_export,
    read_record,
)


class ResultStore:
    """Store of records under DIRECTORY/records, written whole and never overwritten by another measurement.

    A record counts only for the code, data, weights and library versions that it was measured with, its ``provenance``:
    a number in a table is one that the present code gives. Records of other provenance stay beside it. So do those of
    another schema: older ones are read, newer ones are left alone.

    Comparisons of exported models are under DIRECTORY/exports, one for each cell.

    Cells that could not be measured are under DIRECTORY/failures, until they can. Running cells are locked under
    DIRECTORY/locks, by the operating system: a process that is killed leaves nothing locked.

    Args:
        directory: folder of the store.
        create: whether to create the folder if it is missing; False is for reading, and writes nothing.

    Raises:
        AdfqError: if the folder cannot be written to; with `create` False, if it has no records.
    """

    def __init__(self, directory: Path, create: bool = True) -> None:
        self.directory = directory
        self._newer = False
        self.records, self.failures, self.locks = (directory / name for name in ("records", "failures", "locks"))
        self.exports = directory / "exports"
        if not create:
            if not self.records.is_dir() and not self.exports.is_dir():
                raise AdfqError(f"there are no records in {directory}")
            return
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
        return self.lock_id(cell.id, 0)

    def lock_id(self, identity: str, patience: float = -1) -> FileLock | None:
        """Lock the cell with that id for this process; return None if another process keeps it.

        Args:
            identity: `Cell.id`.
            patience: seconds to wait for another process; -1, the default, waits until it is done.

        Raises:
            AdfqError: if the store cannot be written to.
        """
        lock = FileLock(self.locks / f"{identity}.lock", thread_local=False)
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            return None
        except OSError as error:
            raise AdfqError(f"cannot write results to {self.directory}: {error.strerror}") from None
        return lock

    def known(self, cell: Cell, set_aside: bool = True) -> list[Record]:
        """Return all records of a cell, of any provenance.

        Args:
            cell: the cell.
            set_aside: whether a damaged record is renamed; False leaves it where it is.
        """
        found = self.read(f"{cell.id}*.json", set_aside)
        return [record for _, record in found if record["config"] == cell.config]

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
        self.write(self._place(cell.id, record["provenance"]), {**record, "schema": SCHEMA})
        (self.failures / f"{cell.id}.json").unlink(missing_ok=True)

    def put_failure(self, cell: Cell, failure: Mapping[str, Any]) -> None:
        """Write the reason why a cell could not be measured.

        Args:
            cell: cell, locked by this process.
            failure: the reason, see `Failure.record`.

        Raises:
            AdfqError: if the failure cannot be written.
        """
        self.write(self.failures / f"{cell.id}.json", {"schema": SCHEMA, "config": cell.config, **failure})

    def put_export(self, identity: str, comparison: Mapping[str, Any]) -> None:
        """Write the comparison of a cell's exported model, in place of an earlier one.

        Args:
            identity: `Cell.id` of the quantized cell.
            comparison: ``config`` of the cell; ``saved``, ``metrics``, ``models`` and more, or ``saved`` and
                ``not_applicable``, the reason why the model cannot be exported.

        Raises:
            AdfqError: if it cannot be written.
        """
        lock = self.lock_id(identity)
        assert lock is not None  # it waits
        try:
            self.exports.mkdir(exist_ok=True)
            self.write(self.exports / f"{identity}.json", {**comparison, "schema": EXPORT_SCHEMA})
        except OSError as error:
            raise AdfqError(f"cannot write to {self.exports}: {error.strerror}") from None
        finally:
            lock.release()

    def read_exports(self) -> list[Record]:
        """Return the comparisons of exported models; a line on stderr tells of a file that is damaged or newer."""
        found = []
        for path in sorted(self.exports.glob("*.json")):
            try:
                found.append(read_export(path))
            except FileNotFoundError:
                continue
            except NewerRecordError as error:
                warn(f"{error}; it is left out")
            except DamagedRecordError:
                warn(f"the comparison {path} is damaged; it is left out")
        return found

    def unfinished(self, cell: Cell) -> Path:
        """Return the folder for finished parts of a cell's method, which lasts until the cell has a record."""
        return self.directory / "unfinished" / cell.id

    def tabulate(self) -> pd.DataFrame:
        """Return a row for every record and failure, in the order they were finished.

        Columns: ``id``, ``status`` ("measured", "n/a" or "failed"), ``error`` (the reason of the latter two), the
        fields of ``config`` (arguments as ``key=value …``), the metrics, costs as ``cost.…``, versions and hardware as
        ``environment.…``, and ``finished``.
        """
        rows = [_row(path, record) for path, record in self.read("*.json")]
        rows += [_row(path, failure) for path, failure in self._read_failures("*.json")]
        frame = pd.DataFrame(rows, columns=None if rows else ["id", "status", "finished"])
        return frame.sort_values("finished", kind="stable", ignore_index=True)

    def find(self, identity: str) -> list[Record]:
        """Return the records and failures whose id begins with `identity`."""
        if not identity or os.path.basename(identity) != identity:
            return []
        pattern = f"{glob.escape(identity)}*.json"
        return [found for _, found in (*self.read(pattern), *self._read_failures(pattern))]

    def read(self, pattern: str, set_aside: bool = False) -> Iterator[tuple[Path, Record]]:
        """Yield records with their files; a line on stderr tells of damaged ones, and once of those of a newer schema.

        Args:
            pattern: glob pattern of the files' names.
            set_aside: whether a damaged record is renamed; False, the default, leaves it where it is.
        """
        for path in sorted(self.records.glob(pattern)):
            try:
                yield path, read_record(path)
            except FileNotFoundError:  # set aside by another process
                continue
            except NewerRecordError as error:
                if not self._newer:
                    warn(f"{error}; records of newer schemas are left alone")
                self._newer = True
            except DamagedRecordError:
                if set_aside:
                    aside = path.with_suffix(".damaged")
                    os.replace(path, aside)
                    warn(f"the record {path} is damaged; it is now {aside.name} and its cell runs again")
                else:
                    warn(f"the record {path} is damaged; it is left out")

    def read_failures(self) -> list[Record]:
        """Return the failures of all cells that could not be measured."""
        return [failure for _, failure in self._read_failures("*.json")]

    def _read_failures(self, pattern: str) -> Iterator[tuple[Path, Record]]:
        for path in sorted(self.failures.glob(pattern)):
            with suppress(FileNotFoundError, ValueError):  # measured meanwhile, or cut off
                failure = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(failure, dict) and {"config", "error"} <= failure.keys():
                    yield path, failure

    def _place(self, identity: str, provenance: Mapping[str, Any]) -> Path:
        """Return the file of a record, which no record of another schema has."""
        digest = hashlib.sha256(json.dumps([SCHEMA, provenance], sort_keys=True).encode()).hexdigest()[:8]
        path = self.records / f"{identity}-{digest}.json"
        while _schema_of(path) not in (None, SCHEMA):
            path = path.with_stem(f"{path.stem}-{SCHEMA}")
        return path

    def write(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write a file of the store whole or not at all.

        Args:
            path: the file; its cell is locked by this process.
            content: made of JSON's types.

        Raises:
            AdfqError: if it cannot be written.
        """
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


def _schema_of(path: Path) -> int | None:
    """Return the schema of a record; None where there is no readable one."""
    try:
        schema: int = json.loads(path.read_text(encoding="utf-8")).get("schema", 1)
    except (OSError, ValueError, AttributeError):
        return None
    return schema


def _row(path: Path, record: Record) -> dict[str, Any]:
    config = {
        name: " ".join(f"{key}={item}" for key, item in value) if isinstance(value, list) else value
        for name, value in record["config"].items()
    }
    nested = {
        f"{kind}.{name}": value
        for kind in ("cost", "environment")
        for name, value in (record.get(kind) or {}).items()
        if not isinstance(value, dict)
    }
    status = "failed" if "error" in record else "n/a" if "not_applicable" in record else "measured"
    reason = record.get("error", record.get("not_applicable"))
    return {
        "id": path.stem,
        "status": status,
        **config,
        **record.get("metrics", {}),
        **nested,
        "finished": record.get("finished"),
        **({} if reason is None else {"error": reason}),
    }
