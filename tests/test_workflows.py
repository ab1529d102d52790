"""GitHub's workflows run the repository's own commands."""

from __future__ import annotations

import re
import shlex
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.cli.main import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}


def jobs() -> list[Any]:
    return [job for workflow in WORKFLOWS.values() for job in workflow["jobs"].values()]


def commands() -> list[str]:
    return [step["run"] for job in jobs() for step in job["steps"] if "run" in step]


def test_tests_run_on_push_and_regression_at_night() -> None:
    # YAML 1.1 reads the key "on" as true.
    assert set(WORKFLOWS["tests"][True]) == {"push", "pull_request"}
    assert set(WORKFLOWS["nightly"][True]) == {"schedule", "workflow_dispatch"}


def test_every_environment_is_one_of_tox() -> None:
    tox = ConfigParser()
    tox.read(ROOT / "tox.ini")
    wanted = [name for command in commands() for name in re.findall(r"tox run -e (\S+)", command)]
    assert sorted(wanted) == ["lowest", "regress", "tests"]
    assert {f"testenv:{name}" for name in wanted} <= set(tox.sections())


def test_tests_are_the_readme_s_command() -> None:
    (command,) = [command for command in commands() if "-e tests" in command]
    assert command in (ROOT / "README.md").read_text().splitlines()


def test_every_supported_python_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert WORKFLOWS["tests"]["jobs"]["tests"]["strategy"]["matrix"]["python"] == versions
    assert project["requires-python"] == f">={versions[0]}"


def test_the_lowest_versions_are_tested_with_the_lowest_python() -> None:
    steps = WORKFLOWS["tests"]["jobs"]["lowest"]["steps"]
    (python,) = [step["with"]["python-version"] for step in steps if "with" in step]
    tox = ConfigParser()
    tox.read(ROOT / "tox.ini")
    assert tox["testenv:lowest"]["base_python"] == f"python{python}"
    assert python == WORKFLOWS["tests"]["jobs"]["tests"]["strategy"]["matrix"]["python"][0]


def test_the_site_is_built_with_the_extra_s_packages() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    install, build = (step["run"] for step in WORKFLOWS["tests"]["jobs"]["docs"]["steps"] if "run" in step)
    assert shlex.split(install)[3:] == ["install", "-c", "constraints.txt", *extras["docs"]]
    assert build == "mkdocs build --strict"


def test_the_nightly_options_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as the folder of committed results, which is not there."""
    (command,) = [command for command in commands() if "-e regress" in command]
    options = shlex.split(command.partition(" -- ")[2])
    assert main(["regress", *options, "--against", str(tmp_path / "missing")]) == 2
    assert "there are no records in" in capsys.readouterr().err


def test_every_job_has_a_time_limit() -> None:
    assert all(job["timeout-minutes"] > 0 for job in jobs())


def test_what_was_measured_is_kept_after_a_failure_too() -> None:
    (upload,) = [step for job in jobs() for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert upload["if"] == "always()"
    (command,) = [command for command in commands() if "-e regress" in command]
    options = shlex.split(command)
    assert options[options.index("--junit") + 1].startswith(upload["with"]["path"])
