"""``adfq list``: what there is."""

from __future__ import annotations

import argparse

from adfq.registry import methods
from benchmarks.cli.options import Commands
from benchmarks.plan import table_names
from benchmarks.tasks import find_task, task_names


def add(commands: Commands) -> None:
    """Add the command."""
    listing = commands.add_parser("list", help="list models, methods and tables")
    listing.set_defaults(action=_list)
    listing.add_argument("what", choices=["models", "methods", "tables"])


def _list(options: argparse.Namespace) -> None:
    lists = {"models": _model_names, "methods": methods, "tables": table_names}
    print("\n".join(lists[options.what]()))


def _model_names() -> list[str]:
    return list(dict.fromkeys(name for task in task_names() for name in find_task(task).model_names()))
