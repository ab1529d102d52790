"""Tasks are found in any installed package, and are loaded when they are asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adfq import AdfqError
from benchmarks.tasks import find_task, task_names

ROOT = Path(__file__).resolve().parents[3]

OUTSIDE = """
from benchmarks.tasks import Task

def load(cell): ...

TASK = Task(load, None, lambda: ["theirs"], str, main_metrics=("depth",), data="/x", batch_size=4)
THING = object()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs a package whose entry point in the group of tasks, named ``outside``, has the given value."""

    def install(value: str) -> None:
        information = tmp_path / "outside-1.0.dist-info"
        information.mkdir()
        (tmp_path / "outside_task.py").write_text(OUTSIDE)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[adfq.tasks]\noutside = {value}\n")
        monkeypatch.syspath_prepend(tmp_path)
        find_task.cache_clear()
        monkeypatch.delitem(sys.modules, "outside_task", raising=False)

    return install


def test_tasks_and_commands_are_found_without_the_libraries_that_compute() -> None:
    code = (
        "import sys, benchmarks.cli.main, benchmarks.tasks as t; names = t.task_names(); "
        "[t.find_task(name) for name in names]; "
        "print(*names, *{'torch', 'timm', 'mmdet', 'matplotlib'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.split() == ["classification", "detection", "encoders", "segmentation"]


def test_a_task_from_outside_is_found(install: Callable[[str], None]) -> None:
    assert "outside" not in task_names()
    install("outside_task:TASK")
    assert "outside" in task_names()
    assert find_task("outside").model_names() == ["theirs"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("outside_task:THING", "task outside: outside_task:THING is not a benchmarks.tasks.Task"),
        ("outside_task:NONE", "task outside: outside_task:NONE cannot be imported"),
        ("none_task:TASK", "task outside: none_task:TASK cannot be imported: No module named 'none_task'"),
    ],
)
def test_what_is_no_task_is_one_clear_line(install: Callable[[str], None], value: str, message: str) -> None:
    install(value)
    with pytest.raises(AdfqError, match=message):
        find_task("outside")


def test_an_unknown_task_says_which_there_are() -> None:
    with pytest.raises(
        AdfqError, match="unknown task 'poetry'; there are classification, detection, encoders, segmentation"
    ):
        find_task("poetry")


def test_every_task_has_its_page() -> None:
    for name in task_names():
        page = ROOT / "benchmarks" / "tasks" / name / "README.md"
        assert 5 < len(page.read_text().splitlines()) <= 30
