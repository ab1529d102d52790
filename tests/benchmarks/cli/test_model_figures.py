"""Figures of a model's layers and of what a table costs, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from benchmarks.cli.figure.results import COSTS
from benchmarks.cli.main import main
from benchmarks.report.figures import accuracy_cost, distributions, outliers, reconstruction, residuals, sensitivity

ROOT = Path(__file__).resolve().parents[3]

Refuse = Callable[[Sequence[str], str], None]
FEW = ["--calibration-size", "2"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Frames that are drawn, in the order of drawing."""
    seen: list[Any] = []
    for module in (distributions, outliers, reconstruction, residuals, sensitivity, accuracy_cost):
        name = f"draw_{module.__name__.rpartition('.')[2]}"

        def spy(draw: Callable[..., None], *given: Any) -> None:
            seen.append(next(item for item in given if isinstance(item, pd.DataFrame)))
            draw(*given)

        monkeypatch.setattr(module, name, partial(spy, getattr(module, name)))
    return seen


def draw(kind: str, folder: Path, *options: str) -> None:
    file = folder / f"{kind}.png"
    assert main(["figure", kind, *options, "--out", str(file)]) == 0
    with Image.open(file) as image:
        image.load()
    assert sorted(folder.glob(f"{kind}*")) == [file]


@pytest.mark.slow
def test_figures_of_the_bundled_vit(tmp_path: Path, drawn: list[Any]) -> None:
    draw("distributions", tmp_path, *FEW)
    thresholds = ["iterations=0", "qkv_threshold=1.0", "fc1_threshold=2"]
    draw("outliers", tmp_path, *FEW, "--images", "2", "--method-arg", *thresholds)
    draw("reconstruction", tmp_path, *FEW, "--method-arg", "iterations=1")
    draw("residuals", tmp_path, *FEW)
    draw("sensitivity", tmp_path, *FEW, "--images", "2", "--methods", "base_ptq", "adfq_vit")
    activations, kept, errors, magnitudes, parts = drawn
    assert len(activations) == 36
    assert set(kept["threshold"]) == {1.0, 2}
    assert (kept["percent"] > 0).any()
    assert len(errors) == 26
    assert len(magnitudes) == 24
    assert set(parts["method"]) == {"Base PTQ", "ADFQ-ViT"}


def test_reconstruction_from_a_record(
    tmp_path: Path, drawn: list[Any], assert_refused: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    record, other = tmp_path / "record.json", tmp_path / "other.json"
    modules = {"head": {"before": 1.0, "after": 0.5, "kept": True}}
    record.write_text(json.dumps({"report": {"modules": modules}}))
    draw("reconstruction", tmp_path, "--record", str(record))
    assert capsys.readouterr().out == f"{tmp_path / 'reconstruction.png'}\n"
    assert drawn[0].to_dict("records") == [{"module": "head", **modules["head"]}]
    command = ["figure", "reconstruction", "--out", str(tmp_path / "figure.svg"), "--record"]
    assert_refused([*command, str(record), "--bits", "W3A3"], "what bits would say is in the record")
    assert_refused([*command, str(tmp_path / "none.json")], "none.json: No such file")
    for text, message in (("{", "not a record"), ("{}", "not a record"), ('{"report": {}}', "no module was optimized")):
        other.write_text(text)
        assert_refused([*command, str(other)], message)


@pytest.mark.slow
def test_accuracy_over_cost(tmp_path: Path, drawn: list[Any], assert_refused: Refuse) -> None:
    options = ["--methods", "base_ptq", "--limit", "20", "--store", str(tmp_path / "runs"), *FEW, "--costs", "size"]
    command = ["figure", "accuracy-cost", *options, "--out", str(tmp_path / "nothing.png")]
    assert_refused(command, "there are no records in")  # nothing is measured without being asked for
    draw("accuracy-cost", tmp_path, *options, "--measure", "--jobs", "1")
    assert len(list((tmp_path / "runs" / "records").glob("*.json"))) == 2
    draw("accuracy-cost", tmp_path, *options)
    for frame in drawn:
        assert list(frame["method"]) == ["full_precision", "base_ptq"]
    assert set(COSTS) == set(accuracy_cost.COSTS)


def test_accuracy_over_bit_widths(tmp_path: Path) -> None:
    draw("accuracy-bits", tmp_path, "--table", "1", "2", "3", "--store", str(ROOT / "results" / "bundled"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distributions", "--model", "embeded_vit"], "unknown model 'embeded_vit'; close to it"),
        (["distributions", "--encoder-only"], "unrecognized arguments: --encoder-only"),
        (["distributions", "--data", "folder:/nowhere"], "required: --model"),
        (["distributions", "--config", "swin.py"], "classification has no --config"),
        (["distributions", "--calibration-size", "0"], "at least one calibration image"),
        (["outliers", "--method", "base_ptq"], "base_ptq has no quantizer that keeps outliers"),
        (["outliers", "--method", "full_precision"], "full_precision has no"),
        (["outliers", "--method-arg", "ppoq=False"], "ppoq=False"),
        (["outliers", "--bits", "W9A9"], "9"),
        (["sensitivity", "--methods", "base"], "unknown method 'base'"),
        (["sensitivity", "--bits", "W9A9"], "9"),
        (["reconstruction", "--method", "repq_vit"], "repq_vit optimizes no modules"),
        (["reconstruction", "--method", "full_precision"], "full_precision optimizes no modules"),
        (["reconstruction", "--method-arg", "iterations=0"], "adfq_vit optimizes no modules in 0 iterations"),
        (["accuracy-cost", "--table", "9"], "unknown table '9'"),
        (["accuracy-cost", "--jobs", "2"], "nothing is measured without --measure: add it, or leave --jobs out"),
        (["accuracy-bits", "--table", "4", "--store", str(ROOT / "results" / "bundled")], "at several bit-widths"),
        (["accuracy-cost", "--costs", "money"], "invalid choice: 'money'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, assert_refused: Refuse
) -> None:
    assert_refused(["figure", *arguments, "--out", str(tmp_path / "figure.png")], message)


@pytest.mark.parametrize(
    "kind", ["distributions", "outliers", "reconstruction", "residuals", "sensitivity", "accuracy-cost"]
)
def test_files_are_checked_before_the_work(kind: str, tmp_path: Path, assert_refused: Refuse) -> None:
    assert_refused(["figure", kind, "--out", str(tmp_path / "figure.pdf")], "figures are .png or .svg")
    assert_refused(["figure", kind, "--out", str(tmp_path / "none" / "figure.png")], "there is no directory")
