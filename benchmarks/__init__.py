"""The benchmark: tables of methods, models and bit-widths, measured and reported.

`make_plan`, `run_plan` and `read_plan` are its Python interface; `Selection` chooses a part of the tables.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.plan import Plan, Selection, make_plan, table_names
    from benchmarks.run.plans import TableResults, read_plan, run_plan

__all__ = ["Plan", "Selection", "TableResults", "make_plan", "read_plan", "run_plan", "table_names"]

_MODULES = {
    "benchmarks.plan": ("Plan", "Selection", "make_plan", "table_names"),
    "benchmarks.run.plans": ("TableResults", "read_plan", "run_plan"),
}


def __getattr__(name: str) -> Any:
    # On demand: a cell or a task is imported without pandas and all that reports need.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'benchmarks' has no attribute {name!r}")
