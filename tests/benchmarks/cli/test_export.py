"""Exporting a saved model and comparing it with the simulation, from end to end on bundled data."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adfq
from benchmarks.cli.main import main
from benchmarks.run.store import ResultStore

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXPORT = ["export", "--data", "bundled"]


@pytest.fixture(scope="module")
def files(make_vit: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By method, a saved model of two blocks; tests/adfq/test_export.py has the bundled ones."""
    folder = tmp_path_factory.mktemp("quantized")
    model = make_vit(img_size=64, num_classes=24)
    for method, options in (("repq_vit", {}), ("adfq_vit", {"iterations": 0})):
        images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        adfq.save(adfq.quantize(model, method, 8, 8, images, **options), folder / method)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.slow
def test_an_exported_model_is_compared(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, file, store = files["repq_vit"], tmp_path / "vit.onnx", tmp_path / "runs"
    command = [*EXPORT, "--quantized", str(saved), "--format", "onnx", "--out", str(file), "--limit", "100"]
    assert main([*command, "--store", str(store)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    size = file.stat().st_size / 1e6
    first, integer, floating, agreement, _, _, _, *rows, _, _ = captured.out.splitlines()
    assert first == f"{file}: {size:.2f} MB"
    assert integer == "12 of 14 products with int8 kernels"
    assert floating.startswith("2 of 14 products stay in float (blocks.0.attn.context and 1 more): logarithmic")
    percents = re.fullmatch(
        r"top-1 agrees with the simulation on ([\d.]+) % of 100 images: ([\d.]+) % simulated, ([\d.]+) % .*", agreement
    )
    assert percents is not None
    assert float(percents[1]) >= 90
    assert abs(float(percents[3]) - float(percents[2])) <= 100 - float(percents[1])
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    sizes = {name: float(size) for name, size, *_ in cells}
    assert list(sizes) == ["float32, torch", "float32, onnxruntime", "simulated, torch", "int8, onnxruntime"]
    assert sizes["int8, onnxruntime"] == round(size, 2)
    assert sizes["simulated, torch"] == round(saved.stat().st_size / 1e6, 2)
    assert sizes["int8, onnxruntime"] < 0.6 * sizes["float32, onnxruntime"]  # the graph is half of so small a file
    assert all(float(time) > 0 for _, _, *times in cells for time in times)
    (kept,) = ResultStore(store).read_exports()
    assert (kept["integer"], kept["products"], list(kept["floating"].values())) == (12, 14, [2])
    assert kept["metrics"]["agreement"] == pytest.approx(float(percents[1]), abs=0.005)
    assert kept["saved"]["size"] == saved.stat().st_size / 1e6
    assert kept["environment"]["onnxruntime"]
    assert kept["config"]["method"] == "repq_vit"


def test_a_model_that_cannot_be_exported_is_kept_with_the_reason(
    files: dict[str, Path], tmp_path: Path, assert_refused: Callable[[Sequence[str], str], None]
) -> None:
    file, store = tmp_path / "vit.onnx", tmp_path / "runs"
    command = [*EXPORT, "--quantized", str(files["adfq_vit"]), "--out", str(file), "--store", str(store)]
    assert_refused(command, "cannot be exported (dynamically shifted")
    (kept,) = ResultStore(store).read_exports()
    assert kept["not_applicable"].startswith("blocks.0.mlp.fc2.input_quantizer cannot be exported (dynamically shifted")
    assert not file.exists()


def test_a_file_that_cannot_be_written_says_nothing_of_the_model(
    files: dict[str, Path],
    tmp_path: Path,
    assert_refused: Callable[[Sequence[str], str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise adfq.AdfqError("cannot write it: disk full")

    monkeypatch.setattr("adfq.export.export_onnx", fail)
    store = tmp_path / "runs"
    command = [*EXPORT, "--quantized", str(files["repq_vit"]), "--out", str(tmp_path / "x"), "--store", str(store)]
    assert_refused(command, "cannot write it: disk full")
    assert ResultStore(store).read_exports() == []


@pytest.mark.slow
def test_an_exported_sam_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("segment_anything")
    from benchmarks.tasks.segmentation.models import load_sam

    sam = load_sam("bundled_sam")
    saved, file = tmp_path / "saved", tmp_path / "sam.onnx"
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    adfq.save(adfq.quantize(sam, "base_ptq", 8, 8, images), saved)
    capsys.readouterr()
    assert main([*EXPORT, "--quantized", str(saved), "--out", str(file), "--limit", "2"]) == 0
    encoder, decoder, integer, *rest = capsys.readouterr().out.splitlines()
    assert encoder.startswith(f"{file}: ")
    assert decoder.startswith(f"{tmp_path / 'sam_decoder.onnx'}: ")
    assert re.fullmatch(r"\d+ of \d+ products with int8 kernels", integer)
    (agreement,) = (line for line in rest if line.startswith("masks"))
    percents = re.fullmatch(
        r"masks have a mean IoU of ([\d.]+) % with the simulation's, over \d+ objects in 2 images; "
        r"with the ground truth ([\d.]+) % simulated, ([\d.]+) % in onnxruntime",
        agreement,
    )
    assert percents is not None
    assert float(percents[1]) > 90
    assert abs(float(percents[2]) - float(percents[3])) < 5
    assert sum(line.startswith("| ") and "onnxruntime" in line for line in rest) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantized", "{repq_vit}"], "required: --out"),
        (["--out", "x"], "required: --quantized"),
        (["--quantized", "{repq_vit}", "--out", "x", "--format", "tflite"], "invalid choice: 'tflite'"),
        (["--quantized", "{repq_vit}", "--out", "x", "--limit", "0"], "'0' is not a positive whole number"),
        (["--quantized", "no", "--out", "x"], "cannot read no: No such file"),
        (["--quantized", "{repq_vit}", "--out", "{repq_vit}"], "--out would replace the quantized model"),
        (["--quantized", "{repq_vit}", "--out", "no/x"], "cannot write no/x: there is no directory no"),
        (["--quantized", "{repq_vit}", "--out", "x", "--store", "/dev/null/x"], "cannot write results to /dev/null/x"),
        (
            ["--quantized", "{adfq_vit}", "--out", "x"],
            "blocks.0.mlp.fc2.input_quantizer cannot be exported (dynamically shifted",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    files: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    assert_refused: Callable[[Sequence[str], str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert_refused([*EXPORT, *(argument.format(**files) for argument in arguments)], message)
    assert list(tmp_path.iterdir()) == []
