"""Entry points of the installed packages, read once for a search path."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import EntryPoint


def find_points(lookup: Callable[..., Iterable[EntryPoint]], group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group.

    Args:
        lookup: `importlib.metadata.entry_points`.
        group: name of the group.
    """
    return _read(lookup, tuple(sys.path), group)


def find_point(lookup: Callable[..., Iterable[EntryPoint]], group: str, name: str) -> EntryPoint | None:
    """Return an entry point by its name; None where no package has one.

    Args:
        lookup: see `find_points`.
        group: name of the group.
        name: name of the entry point.
    """
    return next((point for point in find_points(lookup, group) if point.name == name), None)


@cache
def _read(lookup: Callable[..., Iterable[EntryPoint]], path: tuple[str, ...], group: str) -> tuple[EntryPoint, ...]:
    # Going through all installed packages takes milliseconds; quantizing, saving and loading ask several times each. A
    # package that is installed while the process runs comes with another search path, or is unknown.
    return tuple(lookup(group=group))
