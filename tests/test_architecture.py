"""Imports point one way: benchmarks → baselines → adfq; no baseline knows another."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file, by absolute name."""
    package = name_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)  # from baselines import repq_vit


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def files_of(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("adfq", ("baselines", "benchmarks", "tests")),
        ("baselines", ("benchmarks", "tests")),
        ("benchmarks", ("tests",)),
    ],
)
def test_imports_point_one_way(package: str, forbidden: tuple[str, ...]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files_of(package)
        for name in imports_of(path)
        if any(within(name, other) for other in forbidden)
    ]
    assert wrong == []


def method_of(path: Path) -> str:
    """The module of a baseline, or the package of one in several files."""
    return ".".join(name_of(path).split(".")[:2])


def test_no_baseline_imports_another() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files_of("baselines")
        for name in imports_of(path)
        if within(name, "baselines") and name != "baselines" and not within(name, method_of(path))
    ]
    assert wrong == []


def test_imports_are_read_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "baselines").mkdir()
    path = tmp_path / "baselines" / "one.py"
    path.write_text(
        "import a.b as c\nfrom . import two\nfrom .three import x\nfrom baselines import four\n"
        "def f():\n    from benchmarks.tasks import y\n"
    )
    found = set(imports_of(path))
    assert {"a.b", "baselines.two", "baselines.three", "baselines.four", "benchmarks.tasks"} <= found


def test_importing_the_core_needs_torch_alone() -> None:
    """timm and the other frameworks are imported when one of their models is at hand."""
    code = "import sys, adfq, adfq.adapters; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "torch" in loaded.split()
    assert {"timm", "torchvision", "mmdet", "segment_anything", "baselines", "benchmarks"} & set(
        loaded.split()
    ) == set()
