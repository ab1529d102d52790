"""Saved and exported models: kept in a store, copied with it, and shown by a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cell import Cell
from benchmarks.cli.main import main
from benchmarks.plan import Selection, make_plan
from benchmarks.report.exports import COLUMNS, reasons_of, tabulate_exports
from benchmarks.run.store import ResultStore

REASON = "logarithmic levels are no multiples of one step"
REFUSED = "blocks.0 cannot be exported (logarithmic | 8 bits): it is shifted"


def make_cell(method: str, task: str = "classification", model: str = "bundled_vit") -> Cell:
    return Cell.create(
        task=task, model=model, data="bundled", method=method, bits="W8A8", checkpoint="/x/vit.safetensors"
    )


def make_comparison(cell: Cell, metrics: dict[str, float], **more: Any) -> dict[str, Any]:
    sizes = {"float32, torch": 4.0, "float32, onnxruntime": 4.5, "simulated, torch": 1.25, "int8, onnxruntime": 1.5}
    models = {name: {"size": size, 1: 10 * size, 8: size} for name, size in sizes.items()}
    saved = {"size": 1.25, "share": 31.25}
    return {
        "config": cell.config,
        "saved": saved,
        "metrics": metrics,
        "models": models,
        "integer": 60,
        "products": 74,
        **more,
    }


def fill(folder: Path) -> ResultStore:
    """A store with three exported models and one that cannot be."""
    store, classes = ResultStore(folder), {"agreement": 99.5, "simulated": 91.25, "exported": 91.0, "images": 200}
    vit, refused = make_cell("repq_vit"), make_cell("adfq_vit")
    sam, detector = (
        make_cell("base_ptq", "segmentation", "bundled_sam"),
        make_cell("base_ptq", "detection", "a_detector"),
    )
    store.put_export(vit.id, make_comparison(vit, classes, floating={REASON: 14}))
    masks = {"agreement": 97.0, "simulated": 80.25, "exported": 80.5, "images": 8, "instances": 20}
    store.put_export(sam.id, make_comparison(sam, masks))
    store.put_export(detector.id, make_comparison(detector, {"images": 4, "error_0": 0.25, "error_1": 1.5}))
    kept = {"config": refused.config, "saved": {"size": 1.0, "share": 25.0}, "not_applicable": REFUSED}
    store.put_export(refused.id, kept)
    return store


def test_rows_say_size_agreement_and_latency(tmp_path: Path) -> None:
    found = fill(tmp_path).read_exports()
    rows = {(row["Model"], row["Method"]): row for row in tabulate_exports(found).to_dict("records")}
    assert [key[1] for key in rows] == ["ADFQ-ViT", "RepQ-ViT", "Base PTQ", "Base PTQ"]
    assert rows["bundled_vit, bundled", "RepQ-ViT"] == {
        "Model": "bundled_vit, bundled",
        "Method": "RepQ-ViT",
        "W/A": "W8/A8",
        "Saved, MB": "1.25 (31.2 %)",
        "Exported, MB": "1.50",
        "In int8": "60 of 74",
        "Agreement": "99.50 % same top-1",
        "Measured": "91.25 → 91.00",
        "ms": "45.0 → 15.0",
    }
    assert rows["bundled_sam, bundled", "Base PTQ"]["Agreement"] == "97.00 % IoU"
    detector = rows["a_detector, bundled", "Base PTQ"]
    assert (detector["Agreement"], detector["Measured"]) == ("1.50 % error", "–")
    refused = rows["bundled_vit, bundled", "ADFQ-ViT"]
    assert (refused["Saved, MB"], refused["Exported, MB"], refused["ms"]) == ("1.00 (25.0 %)", "no", "–")
    assert reasons_of(found) == {REFUSED: ["ADFQ-ViT"], REASON: ["RepQ-ViT"]}


def test_a_later_comparison_replaces_its_own_cells_alone(tmp_path: Path) -> None:
    store, cell = fill(tmp_path), make_cell("repq_vit")
    store.put_export(cell.id, make_comparison(cell, {"agreement": 1.0, "simulated": 2.0, "exported": 3.0, "images": 4}))
    found = store.read_exports()
    assert len(found) == 4
    (changed,) = (each["metrics"]["agreement"] for each in found if each["config"] == cell.config)
    assert changed == 1.0


def test_damaged_and_newer_files_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = fill(tmp_path)
    files = sorted(store.exports.iterdir())
    newer = json.loads(files[0].read_text()) | {"schema": 99}
    files[0].write_text(json.dumps(newer))
    for file, text in ((files[1], '{"schema": 1'), (files[2], '{"schema": 1, "config": [], "saved": {}}')):
        file.write_text(text)
    assert len(store.read_exports()) == 1
    errors = capsys.readouterr().err
    assert f"{files[0]} has schema 99" in errors
    assert all(f"{file} is damaged; it is left out" in errors for file in files[1:3])


def test_a_merge_copies_comparisons_and_overwrites_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, into = fill(tmp_path / "source"), ResultStore(tmp_path / "into")
    cell = make_cell("repq_vit")
    own = make_comparison(cell, {"agreement": 1.0, "simulated": 2.0, "exported": 3.0, "images": 4})
    into.put_export(cell.id, own)
    (source.exports / "damaged.json").write_text("{")
    command = ["results", "merge", str(source.directory), "--store", str(into.directory)]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{into.directory}: 3 new, 1 already there, 1 skipped\n"
    found = into.read_exports()
    assert len(found) == 4
    assert [each["metrics"]["agreement"] for each in found if each["config"] == cell.config] == [1.0]


def test_a_report_shows_them_where_there_are_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = fill(tmp_path)
    files = [tmp_path / name for name in ("index.html", "report.md", "report.tex")]
    assert main(["report", "1", "--store", str(tmp_path)]) == 0
    page, markdown, latex = (file.read_text() for file in files)
    for text in (page, markdown, latex):
        assert "Saved and exported models" in text
        assert text.count("60 of 74") == 3
    assert all(f'<th scope="col">{name}</th>' in page for name in COLUMNS)
    rows = [line for line in markdown.splitlines() if line.startswith("| bundled_") or line.startswith("| a_")]
    assert {line.count("|") for line in rows} == {len(COLUMNS) + 1}
    assert r"91.25 $\to$ 91.00" in latex
    for file in store.exports.iterdir():
        file.unlink()
    assert main(["report", "1", "--store", str(tmp_path)]) == 2  # nothing is left
    assert "there are no records" in capsys.readouterr().err
    (cell, *_) = make_plan(["1"], Selection(), check_files=False).cells
    store.put(cell, {"config": cell.config, "provenance": {}, "metrics": {"top1": 50.0, "images": 3}})
    assert main(["report", "1", "--store", str(tmp_path)]) == 0
    assert not any("exported models" in file.read_text() for file in files)
