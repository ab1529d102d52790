"""Quantizing to a file and measuring the file, from end to end on bundled data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import adfq
from benchmarks.cli.main import main

METHOD = [
    *("--model", "bundled_vit", "--method", "adfq_vit", "--method-arg", "iterations=0", "qkv_threshold=4.0"),
    *("--bits", "W4A5", "--calibration-size", "4", "--calibration-batch-size", "2", "--seed", "3"),
]
QUANTIZE = ["quantize", "classification", "--data", "bundled"]
RUN = ["run", "classification", "--data", "bundled"]
FEW = ["--limit", "30", "--batch-size", "20"]


def measure(arguments: list[str]) -> dict[str, Any]:
    with redirect_stdout(StringIO()) as output:
        assert main([*arguments, "--json"]) == 0
    record: dict[str, Any] = json.loads(output.getvalue())
    return record


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "vit.safetensors"
    assert main([*QUANTIZE, *METHOD, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def saved(file: Path) -> dict[str, Any]:
    """The record of the file."""
    return measure([*RUN, "--quantized", str(file), *FEW])


@pytest.fixture(scope="module")
def unusable(file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a quantized model that cannot be measured."""
    folder = tmp_path_factory.mktemp("unusable")
    (folder / "broken").write_bytes(file.read_bytes()[:1000])
    model = adfq.load(file)
    adfq.save(model, folder / "odd", notes={"preprocessing": {"mean": 3}})
    adfq.save(model, folder / "odder", notes={"preprocessing": "none"})
    adfq.save(model, folder / "oddest", notes={"calibration_batch_size": -1})
    return {path.name: path for path in folder.iterdir()}


def test_a_file_measures_like_the_run_that_quantizes(file: Path, saved: dict[str, Any]) -> None:
    direct = measure([*RUN, *METHOD, *FEW])
    assert saved["metrics"] == direct["metrics"]
    assert saved.keys() == direct.keys()
    assert saved["config"].keys() == direct["config"].keys()
    assert saved["timing"].keys() == direct["timing"].keys()
    for name in ("task", "model", "data", "method", "bits", "calibration_size", "seed", "limit", "batch_size"):
        assert saved["config"][name] == direct["config"][name]
    assert saved["config"]["calibration_batch_size"] == direct["config"]["calibration_batch_size"] == 2
    assert saved["config"]["checkpoint"] == file.stem
    assert ["qkv_threshold", 4.0] in saved["config"]["method_arguments"]
    assert ["fc1_threshold", 10.0] in saved["config"]["method_arguments"]
    assert ["mean", [0.5, 0.5, 0.5]] in saved["config"]["preprocessing"]


def test_quantize_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "swin"
    small = ["--model", "bundled_swin", "--method", "base_ptq", "--calibration-size", "2"]
    assert main([*QUANTIZE, *small, "--out", str(path)]) == 0
    line = capsys.readouterr().out
    size = path.stat().st_size
    assert line.startswith(f"{path}: {size / 1e6:.2f} MB, ")
    assert "% of float32's size, in " in line
    assert line.count("\n") == 1
    assert 0.1 < size / 4 / 1_360_000 < 0.2
    assert main([*RUN, "--quantized", str(path), "--limit", "10"]) == 0
    assert capsys.readouterr().out.startswith("bundled_swin, base_ptq, W4/A4: top-1 ")


def test_preprocessing_is_the_files_unless_given(file: Path, saved: dict[str, Any]) -> None:
    other = measure([*RUN, "--quantized", str(file), *FEW, "--mean", "0.1", "--crop-pct", "0.5"])
    assert ["mean", [0.1]] in other["config"]["preprocessing"]
    assert ["crop_pct", 0.5] in other["config"]["preprocessing"]
    assert ["std", [0.5, 0.5, 0.5]] in other["config"]["preprocessing"]
    assert other["metrics"] != saved["metrics"]


def test_files_saved_in_python_are_measured_as_timm_would(pictures: Path, tmp_path: Path) -> None:
    shutil.rmtree(pictures / "train")  # nothing is calibrated
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
    adfq.save(adfq.quantize(model, "base_ptq", calibration=torch.randn(2, 3, 32, 32)), tmp_path / "model")
    command = ["run", "classification", "--quantized", str(tmp_path / "model"), "--data", f"folder:{pictures}"]
    record = measure(command)
    assert record["config"]["model"] == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert record["metrics"]["images"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*QUANTIZE, *METHOD], "required: --out"),
        ([*QUANTIZE, "--out", "x"], "required: --model, --method"),
        ([*QUANTIZE, "--model", "bundled_vit", "--method", "magic", "--out", "x"], "unknown method 'magic'"),
        ([*QUANTIZE, "--model", "bundled_vit", "--method", "full_precision", "--out", "x"], "nothing that could be"),
        ([*QUANTIZE, *METHOD, "--out", "no/x"], "cannot write no/x: there is no directory no"),
        ([*QUANTIZE, *METHOD, "--out", "."], "cannot write .: it is a directory"),
        ([*QUANTIZE, *METHOD, "--limit", "3", "--out", "x"], "unrecognized arguments: --limit"),
        ([*RUN, "--quantized", "no"], "cannot read no: No such file"),
        ([*RUN, "--quantized", "{broken}"], "not a safetensors file"),
        ([*RUN, "--quantized", "{file}", "--model", "bundled_vit"], "what --model would say is in the file"),
        (
            [*RUN, "--quantized", "{file}", "--model-arg", "a=1", "--pretrained", "--checkpoint", "x"],
            "what --model-arg, --checkpoint, --pretrained would say",
        ),
        (
            [*RUN, "--quantized", "{file}", "--method", "x", "--bits", "W4A5", "--seed", "0"],
            "what --method, --bits, --seed would say",
        ),
        (
            [*RUN, "--quantized", "{file}", "--calibration-batch-size", "1", "--method-arg", "a=1"],
            "what --method-arg, --calibration-batch-size would say",
        ),
        ([*RUN, "--quantized", "{file}", "--mean", "0.5,0.5"], "one value, or one for each input channel"),
        ([*RUN[:2], "--data", "folder:no", "--quantized", "{file}"], "there is no no"),
        ([*RUN, "--quantized", "{odd}"], "preprocessing: mean must be a list of finite numbers; it is 3"),
        ([*RUN, "--quantized", "{odder}"], "its notes have no usable 'preprocessing'"),
        ([*RUN, "--quantized", "{oddest}"], "calibration_batch_size must be a whole number of at least 1, got -1"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    file: Path,
    unusable: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    assert_refused: Callable[[Sequence[str], str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert_refused([argument.format(file=file, **unusable) for argument in arguments], message)
    assert list(tmp_path.iterdir()) == []
