"""Fixtures for the tests of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
