"""Methods by name: the entry points of the group ``adfq.methods``, in any installed package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from importlib.metadata import entry_points
from typing import Any

from adfq.errors import AdfqError
from adfq.installed import find_point, find_points
from adfq.method import FULL_PRECISION, Method

ENTRY_POINT_GROUP = "adfq.methods"


def methods() -> tuple[str, ...]:
    """Return the names of all installed methods, ``full_precision`` first."""
    names = {point.name for point in find_points(entry_points, ENTRY_POINT_GROUP)} - {FULL_PRECISION}
    return FULL_PRECISION, *sorted(names)


def find_method(name: str) -> type[Method]:
    """Return the class of a method.

    Args:
        name: the name of its entry point.

    Raises:
        AdfqError: for a name that no installed package has, listing those that exist; for an entry point that is no
            `Method`.
    """
    point = find_point(entry_points, ENTRY_POINT_GROUP, name)
    if point is None:
        raise AdfqError(f"unknown method {name!r}; there are {', '.join(methods())}")
    method = point.load()
    if not (isinstance(method, type) and issubclass(method, Method) and is_dataclass(method)):
        raise AdfqError(f"method {name}: {point.value} is not a dataclass that derives from adfq.method.Method")
    return method


def create_method(name: str, options: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> Method:
    """Return a method with options.

    Args:
        name: the name of its entry point.
        options: values by option; the others have their defaults.

    Raises:
        AdfqError: for an unknown method or option, and for a value of another type than the option's default.
    """
    cls, chosen = find_method(name), dict(options)
    known = cls.options()
    for option in chosen:
        if option not in known:
            there_are = f"it has {', '.join(known)}" if known else "it has none"
            raise AdfqError(f"method {name} has no option {option!r}; {there_are}")
    return cls(**chosen)


def method_name(method: Method) -> str:
    """Return the name of a method's entry point; module and class for one that has none."""
    cls = type(method)
    place = f"{cls.__module__}:{cls.__qualname__}"
    return next((point.name for point in find_points(entry_points, ENTRY_POINT_GROUP) if point.value == place), place)


def method_label(name: str) -> str:
    """Return the label of a method in tables and figures; the name itself for one that is not installed."""
    try:
        return find_method(name).label
    except AdfqError:
        return name
