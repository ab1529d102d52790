"""Stores merged into one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cell import identify
from benchmarks.run.console import warn
from benchmarks.run.records import DamagedRecordError, NewerRecordError, Record, read_export, read_record
from benchmarks.run.store import ResultStore

_Read = Callable[[Path], Record]
_Copy = Callable[[Path, Record, ResultStore], bool]


@dataclass
class Merged:
    """Numbers of records.

    Attributes:
        new: copied.
        present: not copied, for the same cell has a record of the same provenance.
        skipped: damaged, or of a newer schema.

    Comparisons of exported models count like records.
    """

    new: int = 0
    present: int = 0
    skipped: int = 0


def merge_stores(sources: Sequence[Path], store: ResultStore) -> Merged:
    """Copy the records of some stores into another one, which keeps all that it has.

    A record is copied unless its cell has one of the same provenance, and the comparison of an exported model unless
    there is one of that cell. A damaged file, or one of a newer schema, is skipped with a line on stderr. The sources
    are left as they are.

    Args:
        sources: folders of stores.
        store: the store that gets the records.

    Raises:
        AdfqError: for a folder without records, before anything is copied, and if a record cannot be written.
    """
    stores = [ResultStore(source, create=False) for source in sources]
    merged = Merged()
    folders: list[tuple[str, Path, _Read, _Copy]]
    folders = [("record", source.records, read_record, _copy) for source in stores]
    folders += [("comparison", source.exports, read_export, _copy_export) for source in stores]
    for what, folder, read, copy in folders:
        for path in sorted(folder.glob("*.json")):
            try:
                found = read(path)
            except FileNotFoundError:
                continue
            except DamagedRecordError:
                warn(f"the {what} {path} is damaged; it is skipped")
                merged.skipped += 1
            except NewerRecordError as error:
                warn(f"{error}; it is skipped")
                merged.skipped += 1
            else:
                if copy(path, found, store):
                    merged.new += 1
                else:
                    merged.present += 1
    return merged


def _copy_export(path: Path, found: Record, store: ResultStore) -> bool:
    """Copy a comparison's file unless the store has one of that cell; return whether it has not."""
    if (store.exports / path.name).exists():
        return False
    store.put_export(path.stem, found)
    return True


def _copy(path: Path, record: Record, store: ResultStore) -> bool:
    """Copy a record's file unless the store has one of the same cell and provenance; return whether it has not."""
    identity = identify(record["config"])
    lock = store.lock_id(identity)
    assert lock is not None  # it waits
    try:
        beside = [*store.read(f"{identity}*.json"), *store.read(path.name)]
        if any(_key(other) == _key(record) for _, other in beside):
            return False
        place = store.records / path.name
        while place.exists():
            place = place.with_stem(f"{place.stem}-2")
        store.write(place, json.loads(path.read_text(encoding="utf-8")))
    finally:
        lock.release()
    return True


def _key(record: Record) -> tuple[Any, ...]:
    return record["config"], record["provenance"]
