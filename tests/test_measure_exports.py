"""scripts/measure_exports.py quantizes, exports and keeps each comparison, and quantizes nothing twice."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.run.store import ResultStore

SCRIPT = Path(__file__).parents[1] / "scripts" / "measure_exports.py"

Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """A function that runs the script on the bundled ViT and few methods, with its records below tmp_path."""

    def run(methods: tuple[str, ...], *options: str) -> dict[str, Any]:
        names: dict[str, Any] = runpy.run_path(str(SCRIPT))["main"].__globals__
        names |= {"ROOT": tmp_path, "BUNDLED": {"bundled_vit": "classification"}, "methods": lambda: methods}
        arguments = ["--files", str(tmp_path / "files"), "--images", "8", *options]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        names["main"]()
        store = ResultStore(tmp_path / "results" / "bundled")
        return {record["config"]["method"]: record for record in store.read_exports()}

    return run


@pytest.mark.slow
def test_an_exported_and_a_refused_model_are_kept(measure: Measure, tmp_path: Path) -> None:
    found = measure(("full_precision", "base_ptq", "adfq_vit"))
    assert set(found) == {"base_ptq", "adfq_vit"}
    assert found["base_ptq"]["metrics"]["images"] == 8
    assert found["base_ptq"]["products"] == 74
    assert "not_applicable" not in found["base_ptq"]
    assert "cannot be exported" in found["adfq_vit"]["not_applicable"]
    for record in found.values():
        assert (record["config"]["bits"], record["config"]["calibration_size"]) == ("W8/A8", 32)
    assert dict(found["adfq_vit"]["config"]["method_arguments"])["iterations"] == 0
    assert not (tmp_path / "results" / "real").exists()


def test_a_quantized_model_is_not_quantized_again(measure: Measure, tmp_path: Path) -> None:
    assert measure(("adfq_vit",), "--quantize-only") == {}
    pytest.importorskip("onnxscript")  # to export
    file = tmp_path / "files" / "bundled_vit-adfq_vit.safetensors"
    written = file.stat().st_mtime_ns
    assert "cannot be exported" in measure(("adfq_vit",))["adfq_vit"]["not_applicable"]
    assert file.stat().st_mtime_ns == written
