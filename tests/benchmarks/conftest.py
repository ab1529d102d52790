"""Fixtures for the tests of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

import pytest

from benchmarks.cli import main
from benchmarks.tasks import coco


@pytest.fixture
def assert_refused(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str], str], None]:
    """Checks that a command is refused as the user's mistake: exit code 2, and one line on stderr that says so."""

    def check(arguments: Sequence[str], message: str) -> None:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("adfq: error: ")
        assert captured.err.count("\n") == 1
        assert message in captured.err

    return check


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the embedded scenes two for training and three for validation."""
    monkeypatch.setattr(coco, "COUNTS", {"train2017": 2, "val2017": 3})


@pytest.fixture(scope="module")
def methods_read_once() -> Iterator[None]:
    """Looks for methods among the installed packages once, which takes milliseconds, not for each of many cells."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            import_module("adfq.methods"), "entry_points", cache(entry_points)
        )  # adfq.methods is a function too
        yield
