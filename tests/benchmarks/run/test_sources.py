"""Code counts for what it computes, and only for the cells that run it."""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.run import sources
from benchmarks.run.sources import digest_sources, find_source, import_closure

ROOT = Path(__file__).resolve().parents[3]

TASK = "benchmarks.tasks.classification"
VIT_CELL = ("benchmarks.run.measuring", TASK, "baselines.base_ptq", "adfq.adapters.timm_vit")
SWIN_CELL = ("benchmarks.run.measuring", TASK, "baselines.base_ptq", "adfq.adapters.timm_swin")
REPQ_CELL = ("benchmarks.run.measuring", TASK, "baselines.repq_vit", "adfq.adapters.timm_vit")


def forget() -> None:
    for function in (digest_sources, find_source, sources._read):
        function.cache_clear()


def digest(*roots: str) -> str:
    forget()
    return digest_sources(roots)


def digests() -> list[str]:
    """The digest of each cell."""
    forget()
    return [digest_sources(cell) for cell in (VIT_CELL, SWIN_CELL, REPQ_CELL)]


@pytest.fixture(scope="module")
def before() -> list[str]:
    """The digest of each cell by the code as it is."""
    return digests()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the packages elsewhere, which is the code that counts."""
    for package in sources.PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    return use(tmp_path, monkeypatch)


def use(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def find_spec(name: str) -> SimpleNamespace | None:
        folder = root / name
        return SimpleNamespace(submodule_search_locations=[str(folder)]) if folder.is_dir() else None

    monkeypatch.setattr(sources, "find_spec", find_spec)
    return root


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


def test_a_checkout_elsewhere_has_the_same_digest(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = digest(*VIT_CELL)
    monkeypatch.undo()
    assert digest(*VIT_CELL) == there


@pytest.mark.parametrize(
    ("file", "counts_for"),
    [
        ("baselines/base_ptq.py", (VIT_CELL, SWIN_CELL)),
        ("baselines/repq_vit.py", (REPQ_CELL,)),
        ("adfq/adapters/timm_vit.py", (VIT_CELL, REPQ_CELL)),
        ("adfq/adapters/timm_swin.py", (SWIN_CELL,)),
        ("adfq/adapters/sam.py", ()),
        ("adfq/quantizers/uniform.py", (VIT_CELL, SWIN_CELL, REPQ_CELL)),
        ("benchmarks/run/measuring.py", (VIT_CELL, SWIN_CELL, REPQ_CELL)),
        ("benchmarks/tasks/classification/data.py", (VIT_CELL, SWIN_CELL, REPQ_CELL)),
        ("benchmarks/bundled/scenes.py", (VIT_CELL, SWIN_CELL, REPQ_CELL)),
        ("benchmarks/tasks/detection/task.py", ()),
        ("benchmarks/run/store.py", ()),
        ("benchmarks/run/provenance.py", ()),
        ("benchmarks/report/tables.py", ()),
        ("benchmarks/cell.py", ()),
    ],
)
def test_a_change_counts_for_the_cells_that_run_it(
    file: str, counts_for: tuple[tuple[str, ...], ...], before: list[str], checkout: Path
) -> None:
    append(checkout / file, "\nCHANGED = 1\n")
    changed = [new != old for new, old in zip(digests(), before, strict=True)]
    assert changed == [cell in counts_for for cell in (VIT_CELL, SWIN_CELL, REPQ_CELL)]


def test_docstrings_comments_and_layout_do_not_count(before: list[str], checkout: Path) -> None:
    for file in checkout.rglob("*.py"):
        code = file.read_text()
        tree = ast.unparse(ast.parse(re.sub(r'^"""', '"""Another word: ', code)))  # other line breaks, no comments
        file.write_text(f"# A comment.\n\n\n{tree}\n")
    assert digests() == before


CODE = """
    class Thing:
        '''A docstring.'''

        size: int = 1
        '''Another.'''

        def method(self, a, b=(1,)):
            return f"{a:{b}} and {a!r}" if a else "1"
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("A docstring.", "Other words.", True),
        ("a, b=(1,)", "a,\n            b=(1,),\n        ", True),
        ("size: int = 1", "size: int = (1)  # one", True),
        ("size: int = 1", 'size: int = "1"', False),
        ("b=(1,)", "b=(1)", False),
        ("b=(1,)", "b=1.0", False),
        ("{a!r}", "{a!s}", False),
        ("{a:{b}}", "{b:{a}}", False),
        (" and ", " or ", False),
        ("if a else", "if b else", False),
        ('else "1"', "else 1", False),
    ],
)
def test_what_a_file_computes_is_what_counts(
    old: str, new: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    file = tmp_path / "theirs" / "__init__.py"
    file.write_text(textwrap.dedent(CODE))
    use(tmp_path, monkeypatch)
    before = digest("theirs")
    file.write_text(textwrap.dedent(CODE.replace(old, new)))
    assert (digest("theirs") == before) is same


def test_the_digest_is_the_same_for_every_version_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Trees of f-strings differ between 3.11 and 3.12; this digest was made by 3.10 to 3.13.
    (tmp_path / "theirs").mkdir()
    code = (
        'x = f"{a!r:>{w}}" + f"{a:}" + f"a{{b" + f"{a = !s:^3}" "u" f"b{{" + f"{a:{{}}}" + "é\\x00" + b"\\xff" * 1.5j'
    )
    (tmp_path / "theirs" / "__init__.py").write_text(code)
    use(tmp_path, monkeypatch)
    assert digest("theirs") == "5e9ed108a39d35c703e885af9e2b715c90798641a7fa25d19956ba5611b951ef"


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """Makes a package of the given files, and returns what a module of it imports."""

    def closure(root: str, **files: str) -> set[str]:
        for name, code in {"__init__": "", **files}.items():
            path = tmp_path.joinpath("theirs", *name.split("__SUB__")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code)
        use(tmp_path, monkeypatch)
        forget()
        return import_closure([root], ["theirs"])

    return closure


def test_imports_of_every_form_count(theirs: Callable[..., set[str]]) -> None:
    found = theirs(
        "theirs.a",
        a="import theirs.b\nfrom . import c\nfrom .d import x\nfrom theirs import e\ndef f():\n    from .g import y\n",
        b="import torch\nfrom theirs.missing import z",
        **dict.fromkeys("cdegh", "from .a import f"),
    )
    assert found == {f"theirs.{name}" for name in "abcdeg"}


def test_imports_for_type_checkers_do_not_count(theirs: Callable[..., set[str]]) -> None:
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B\nelse:\n    from .c import C\n"
    assert theirs("theirs.a", a=code, b="", c="") == {"theirs.a", "theirs.c"}


def test_a_package_counts_where_something_is_imported_from_it(theirs: Callable[..., set[str]]) -> None:
    files = {"__init__": "from theirs.big import NAME", "big": "NAME = 1", "b": ""}
    assert theirs("theirs.a", a="from theirs.b import x", **files) == {"theirs.a", "theirs.b"}
    assert theirs("theirs.a", a="from theirs import NAME", **files) == {"theirs.a", "theirs", "theirs.big"}


def test_a_file_is_read_once_for_all_digests() -> None:
    forget()
    digest_sources(VIT_CELL)
    read = sources._read.cache_info().misses
    assert read == len(import_closure(VIT_CELL, sources.PACKAGES))
    digest_sources(VIT_CELL)
    import_closure(VIT_CELL, sources.PACKAGES)
    assert sources._read.cache_info().misses == read
