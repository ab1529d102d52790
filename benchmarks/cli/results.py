"""``adfq results``: what has been measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from adfq.errors import AdfqError
from benchmarks.cli.options import Commands
from benchmarks.run.store import ResultStore
from benchmarks.tasks import find_task, task_names

_WRITERS: Mapping[str, Callable[..., Any]] = {".csv": pd.DataFrame.to_csv, ".parquet": pd.DataFrame.to_parquet}


def add(commands: Commands) -> None:
    """Add the command to the parser of all commands."""
    results = commands.add_parser("results", help="list, show, export or merge what has been measured")
    kinds = results.add_subparsers(dest="kind", required=True)
    listing = kinds.add_parser("list", help="a line for each record and failure, the newest last")
    listing.set_defaults(action=_list)
    show = kinds.add_parser("show", help="a record in full, as JSON")
    show.set_defaults(action=_show)
    show.add_argument("id", metavar="ID", help="as listed, or its beginning")
    export = kinds.add_parser("export", help="all of them as one table")
    export.set_defaults(action=_export)
    export.add_argument("file", type=Path, metavar="FILE", help=f"{' or '.join(_WRITERS)}")
    merge = kinds.add_parser("merge", help="copy the records of other stores into one")
    merge.set_defaults(action=_merge)
    merge.add_argument("stores", type=Path, nargs="+", metavar="STORE", help="folders with records/*.json")
    for kind in (listing, show, export, merge):
        kind.add_argument("--store", type=Path, default=Path("runs"), metavar="DIR", help="store (default: runs)")


def _list(options: argparse.Namespace) -> None:
    frame = _open(options.store).tabulate()
    tasks = [find_task(task) for task in task_names() if task in set(frame.get("task", ()))]
    metrics = dict.fromkeys(metric for task in tasks for metric in task.main_metrics if metric in frame)
    columns = ["id", "status", "task", "model", "method", "bits", "seed", *metrics, "environment.commit", "finished"]
    frame = frame.reindex(columns=columns).rename(columns={"environment.commit": "commit"})
    frame["commit"] = frame["commit"].str.slice(0, 8)
    for metric in metrics:
        frame[metric] = frame[metric].map("{:.2f}".format, na_action="ignore")
    print(frame.fillna("").to_markdown(index=False, disable_numparse=True))


def _show(options: argparse.Namespace) -> None:
    found = _open(options.store).find(options.id)
    if not found:
        raise AdfqError(f"{options.store} has no record whose id begins with {options.id}; see 'adfq results list'")
    for record in found:
        print(json.dumps(record, indent=1))


def _export(options: argparse.Namespace) -> None:
    from benchmarks.tasks.shared import check_place  # torch takes its time

    writer = _WRITERS.get(options.file.suffix.lower())
    if writer is None:
        raise AdfqError(f"cannot export to {options.file}: exports are {' or '.join(_WRITERS)}")
    check_place(options.file)
    try:
        writer(_open(options.store).tabulate(), options.file, index=False)
    except ImportError:
        raise AdfqError("Parquet needs pyarrow: pip install 'adfq[parquet]'") from None
    except OSError as error:
        raise AdfqError(f"cannot write {options.file}: {error.strerror}") from None
    print(options.file)


def _merge(options: argparse.Namespace) -> None:
    from benchmarks.run.merge import merge_stores

    for folder in options.stores:
        _open(folder)  # before the store is created
    merged = merge_stores(options.stores, ResultStore(options.store))
    print(f"{options.store}: {merged.new} new, {merged.present} already there, {merged.skipped} skipped")


def _open(directory: Path) -> ResultStore:
    return ResultStore(directory, create=False)
