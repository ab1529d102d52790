"""Generated pages and the README's numbers are those of the committed records."""

from __future__ import annotations

import csv
import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "write_results.py"))


@pytest.mark.parametrize("name", ["results", "field", "encoders", "mobile-sam", "memory", "deployment"])
def test_a_page_is_written_from_the_records(script: dict[str, Any], name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert script["write_page"](name) == page, "run scripts/write_results.py"


def test_the_picture_is_drawn_from_the_records(script: dict[str, Any]) -> None:
    panels = script["collect_picture"]()
    with Image.open(ROOT / "docs" / "accuracy.png") as picture:
        assert picture.info["Description"] == script["digest_picture"](panels), "run scripts/write_results.py"


def test_the_picture_of_costs_is_drawn_from_the_records(script: dict[str, Any]) -> None:
    _, summary = script["collect_costs"]()
    with Image.open(ROOT / "docs" / "field-cost.png") as picture:
        assert picture.info["Description"] == script["digest_costs"](summary), "run scripts/write_results.py"


def test_another_number_is_another_picture(script: dict[str, Any]) -> None:
    panels = script["collect_picture"]()
    changed = [replace(panels[0], rows=panels[0].rows.assign(mean=panels[0].rows["mean"] + 0.01)), *panels[1:]]
    assert script["digest_picture"](changed) != script["digest_picture"](panels)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130
    assert len(README.split()) <= 1000


def test_the_readme_has_no_table_of_results() -> None:
    tables = [line for line in README.splitlines() if line.startswith("|")]
    assert tables
    assert not any(re.search(r"\d\.\d", line) for line in tables)


def test_the_readme_shows_what_its_command_gave() -> None:
    shown = re.search(
        r"^(\w+), (\w+), (W\d/A\d): top-1 ([\d.]+) %, top-5 ([\d.]+) % on (\d+) images", README, re.MULTILINE
    )
    assert shown is not None
    model, method, bits, top1, top5, images = shown.groups()
    command = (
        f"adfq run classification --model {model} --data bundled --method {method} --bits {bits.replace('/', '')}\n"
    )
    assert command in README
    records = [json.loads(path.read_text()) for path in (ROOT / "results" / "bundled" / "records").glob("*.json")]
    (record,) = (
        record
        for record in records
        if {"model": model, "method": method, "bits": bits, "seed": 0, "calibration_size": 32}.items()
        <= record["config"].items()
    )
    assert record["metrics"] == {"top1": float(top1), "top5": float(top5), "images": int(images)}


def _rows(text: str) -> dict[str, list[str]]:
    tables = (line.strip("|").split("|") for line in text.splitlines() if line.startswith("|"))
    return {label.strip(): [cell.strip() for cell in cells] for label, *cells in tables}


def test_the_costs_on_row_ridges_page_are_those_of_the_bench() -> None:
    page = (ROOT / "docs" / "methods" / "row_ridge.md").read_text(encoding="utf-8")
    shown = _rows(page.split("## Cost\n")[1].split("## Options\n")[0])
    bench = _rows((ROOT / "results" / "bench" / "deit_tiny-cpu-2-threads.md").read_text(encoding="utf-8"))
    header = bench["Method"]
    columns = ("Calibration", "Calibration memory", "Calibration memory in batches", "Optimization iteration")
    places = [header.index(column) for column in columns]
    methods = shown.keys() & bench.keys() - {"Method"}
    assert len(methods) == len(shown) - 2  # but for the header and the line below it
    for method in methods:
        for cell, place in zip(shown[method], places, strict=True):
            measured = bench[method][place]
            assert bool(cell) == bool(measured)
            assert not cell or float(cell) == pytest.approx(float(measured), abs=0.051)


@pytest.mark.parametrize(
    ("section", "models"),
    [
        ("Parts taken out", ["bundled_vit", "bundled_swin", "fashion_vit"]),
        ("On a real encoder", ["dinov2_small"]),
    ],
)
def test_the_parts_on_row_ridges_page_are_those_of_the_file(section: str, models: list[str]) -> None:
    page = (ROOT / "docs" / "methods" / "row_ridge.md").read_text(encoding="utf-8")
    shown = _rows(page.split(f"## {section}\n")[1].split("\n## ")[0])
    frame = pd.read_csv(ROOT / "results" / "real" / "parts.csv")
    digits = {"top1": 2, "knn": 1, "prototypes": 1, "ridge": 1, "error": 1}
    for parts, rows in frame[frame["model"].isin(models)].groupby("parts"):
        cells = []
        for model in models:
            own = rows[rows["model"] == model]
            assert sorted(own["seed"]) == [0, 1, 2]
            measured = own[list(digits)].dropna(axis=1)
            cells += [
                f"{values.mean():.{digits[name]}f} ± {values.std():.{digits[name]}f}"
                for name, values in measured.items()
            ]
        assert shown[f"`{parts}`" if parts not in ("all", "none") else parts] == cells


def test_memory_on_mobile_sam_is_that_of_the_records() -> None:
    with open(ROOT / "results" / "bench" / "calibration.csv", encoding="utf-8", newline="") as stream:
        rows = {row["method"]: row for row in csv.DictReader(stream) if row["model"] == "mobile_sam"}
    records = [json.loads(path.read_text()) for path in (ROOT / "results" / "mobile" / "records").glob("*.json")]
    measured = {record["config"]["method"]: record for record in records}
    assert rows.keys() == measured.keys() - {"full_precision"}
    for method, row in rows.items():
        record = measured[method]
        assert int(row["images"]) == record["config"]["calibration_size"]
        assert int(row["peak_mb"]) == round(record["cost"]["calibration_memory"])
        assert row["commit"] == record["environment"]["commit"]
