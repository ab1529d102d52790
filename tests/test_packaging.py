"""The installed package holds the files of the repository."""

from __future__ import annotations

import re
import sys
from importlib.metadata import entry_points
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


# Style, types and the site: checked with the versions of constraints.txt alone.
UNBOUNDED = {
    "latex2mathml",
    "mkdocs-material",
    "mkdocstrings",
    "mypy",
    "pandas-stubs",
    "ruff",
    "types-psutil",
    "types-tqdm",
}


def _dependencies(*groups: str) -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = {"dependencies": PROJECT["project"]["dependencies"]} | extras
    return [Requirement(line) for group in groups or wanted for line in wanted[group]]


def _pins(file: str) -> dict[str, set[Version]]:
    lines = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pins: dict[str, set[Version]] = {}
    for pin in map(Requirement, lines):
        assert re.fullmatch(r"==[^,*]+", str(pin.specifier)), pin
        pins.setdefault(canonicalize_name(pin.name), set()).add(Version(str(pin.specifier)[2:]))
    return pins


def test_every_package_is_listed() -> None:
    folders = {
        path.parent.relative_to(ROOT)
        for name in ("adfq", "baselines", "benchmarks")
        for path in (ROOT / name).rglob("__init__.py")
    }
    listed = set(PROJECT["tool"]["setuptools"]["packages"]) - {"adfq_tables"}
    assert listed == {".".join(folder.parts) for folder in folders}


def test_tables_hold_no_python() -> None:
    assert not list((ROOT / "tables").rglob("*.py"))


def test_committed_results_are_not_installed() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {*setuptools["packages"], *setuptools["package-dir"].values()}
    assert not any(folder.split(".")[0] == "results" for folder in folders)
    assert not list((ROOT / "results").rglob("*.py"))
    assert not any(".." in pattern for patterns in setuptools["package-data"].values() for pattern in patterns)


def test_every_dependency_is_pinned() -> None:
    pins = _pins("constraints.txt")
    assert {canonicalize_name(dependency.name) for dependency in _dependencies()} <= pins.keys()


def test_every_lower_bound_is_tested() -> None:
    core, pins = _dependencies("dependencies"), _pins("constraints-lowest.txt")
    for dependency in _dependencies():
        bounds = [part.version for part in dependency.specifier if part.operator == ">="]
        assert len(bounds) == 1 or dependency.name in UNBOUNDED, f"{dependency} has no lower bound"
        # An extra may ask for more than the core; its bound is then run in an environment of its own.
        raised = dependency not in core and dependency.name in {other.name for other in core}
        if bounds and not raised:
            assert {Version(bounds[0])} == pins[canonicalize_name(dependency.name)], dependency


def test_methods_are_registered_and_load() -> None:
    for point in entry_points(group="adfq.methods"):
        assert callable(point.load())


def test_types_are_installed() -> None:
    for package in ("adfq", "baselines", "benchmarks"):
        assert (ROOT / package / "py.typed").is_file()
        assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][package]


def test_versions_agree() -> None:
    version = PROJECT["project"]["version"]
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version


def test_every_method_s_paper_can_be_cited() -> None:
    cited = set(re.findall(r"eprint\s*= \{([\d.]+)\}", (ROOT / "docs" / "papers.bib").read_text(encoding="utf-8")))
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "methods").glob("*.md"))
    # A page names its method's paper as "[arXiv NUMBER](…)".
    assert set(re.findall(r"\[arXiv ([\d.]+)\]", pages)) <= cited
