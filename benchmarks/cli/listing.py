"""``adfq list``: what there is."""

from __future__ import annotations

import argparse

import adfq
from benchmarks.cli.options import Commands
from benchmarks.plan import table_names
from benchmarks.tasks import find_task, task_names


def add(commands: Commands) -> None:
    listing = commands.add_parser("list", help="list what there is")
    listing.set_defaults(action=_list)
    listing.add_argument("what", choices=["models", "methods", "tables"])


def _list(options: argparse.Namespace) -> None:
    models = [name for task in task_names() for name in find_task(task).model_names()]
    lists = {"models": models, "methods": adfq.methods(), "tables": table_names()}
    print("\n".join(lists[options.what]))
