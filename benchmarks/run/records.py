"""Records of cells, as files have them: their schema, and what is done with other ones."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.cell import checkpoint_name, data_set_name, file_name, is_config_file, is_path
from benchmarks.run.correct import unpack_correct

#: Version of the layout of records: 1 had paths in ``config`` and no ``schema``.
SCHEMA = 2

#: Version of the layout of comparisons of exported models.
EXPORT_SCHEMA = 1

Record = dict[str, Any]


class DamagedRecordError(Exception):
    """A file that is no record."""


class NewerRecordError(Exception):
    """A record of a schema that a later version of this project has written."""


def read_record(path: Path) -> Record:
    """Return the record of a file; one of an older schema with its configuration in the present one.

    Raises:
        FileNotFoundError: for a file that is not there.
        DamagedRecordError: for a file that is no record.
        NewerRecordError: for a record of a newer schema.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        schema = record.get("schema", 1)
        if not isinstance(schema, int):
            raise TypeError
        if schema > SCHEMA:
            raise NewerRecordError(f"{path} has schema {schema}, this version writes {SCHEMA}")
        parts = [record["config"], record["provenance"]]
        parts += [record.get("cost", {}), record.get("environment", {})]
        parts += [] if isinstance(record.get("not_applicable"), str) else [record["metrics"]]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError
        unpack_correct(record)
        checked: Record = record if schema == SCHEMA else {**record, "config": _name_files(record["config"])}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedRecordError(path) from None
    return checked


def now() -> str:
    """Return the present time in UTC, in ISO's form to seconds, as records have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_export(path: Path) -> Record:
    """Return the comparison of an exported model that a file has.

    Raises:
        FileNotFoundError: for a file that is not there.
        DamagedRecordError: for a file that is no such comparison.
        NewerRecordError: for a comparison of a newer schema.
    """
    try:
        found: Record = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] > EXPORT_SCHEMA:
            raise NewerRecordError(f"{path} has schema {found['schema']}, this version writes {EXPORT_SCHEMA}")
        parts = [found["config"], found["saved"]]
        parts += [] if isinstance(found.get("not_applicable"), str) else [found["metrics"], found["models"]]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedRecordError(path) from None
    return found


def _name_files(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of schema 1 with names of data and files in place of paths."""
    named = {**config, "data": data_set_name(config["data"])}
    if config.get("checkpoint") is not None:
        named["checkpoint"] = checkpoint_name(config["checkpoint"])
    if is_config_file(config["model"]):
        named["model"] = file_name(config["model"])
    if "task_arguments" in config:
        pairs = [[name, file_name(value) if is_path(value) else value] for name, value in config["task_arguments"]]
        named["task_arguments"] = pairs
    return named
