"""`adfq bench` measures what it says, method by method; how fast anything is, no test asserts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.cli.main import main
from benchmarks.studies import speed
from benchmarks.studies.speed import benchmark, render
from benchmarks.tasks.shared import count_workers

SMALL = ["bench", "--model", "bundled_vit", "--images", "2", "--repeats", "1"]


def test_methods_are_measured_against_full_precision(capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["full_precision", "base_ptq", "adfq_vit", "base_ptq"]
    assert main([*SMALL, "--bits", "W6A6", "--methods", *methods, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["model"], found["bits"], found["images"], found["repeats"]) == ("bundled_vit", "W6A6", 2, 1)
    assert found["full_precision"]["forward"] > 0
    assert found["full_precision"]["training"] > 0
    assert found["full_precision"]["images_per_second"] == pytest.approx(2 / found["full_precision"]["forward"])
    assert found["data"] == "bundled"
    assert "loading" not in found  # scenes are drawn
    assert list(found["methods"]) == ["base_ptq", "adfq_vit"]
    memory = {"calibration_memory", "batched_memory", "forward_memory"}  # which not every system tells
    assert set(found["methods"]["base_ptq"]) - memory == {"calibration", "batched", "forward"}
    assert set(found["methods"]["adfq_vit"]) - memory == {"calibration", "batched", "forward", "iteration"}
    assert all(math.isfinite(value) for values in found["methods"].values() for value in values.values())
    assert found["environment"]["threads"] == torch.get_num_threads()


def test_what_is_printed_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--methods", "base_ptq"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("**bundled_vit**, W4A4, 2 images")
    row = next(line for line in lines if "Base PTQ" in line)
    heading = next(line for line in lines if line.startswith("| Method"))
    assert "Optimization iteration" not in heading  # which only ADFQ-ViT has
    assert float(row.split("|")[2]) > 0


def test_loading_is_measured_apart_from_the_model(
    pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bench", "--model", "vit_tiny_patch16_224", "--data", f"folder:{pictures}", "--methods", "base_ptq"]
    command += ["--images", "2", "--repeats", "1"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["data"] == f"folder:{pictures}"
    assert found["loading"]["workers"] == count_workers()
    assert found["loading"]["images_per_second"] > 0
    monkeypatch.setattr(speed, "benchmark", lambda *_: found)
    assert main(command) == 0
    said = rf"^{count_workers()} processes read and preprocess \d+ images/s, of which full precision takes \d+\.$"
    assert re.search(said, capsys.readouterr().out, re.MULTILINE)


def test_medians_are_multiples_of_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    medians = [9, *(value for full, quantized in ((1, 3), (2, 5), (4, 100)) for value in (full, quantized))]
    seconds = iter([value for median in medians for value in (1000, median, 0)])  # three passes in a row
    costs = iter(
        [
            {"calibration_seconds": value, "calibration_memory": None}
            for value in (99.0, 90.0, 8.0, 16.0, 6.0, 18.0, 7.0, 17.0)
        ]
    )
    monkeypatch.setattr(speed, "time_of", lambda *_: float(next(seconds)))
    monkeypatch.setattr(speed, "quantize_model", lambda *_: (nn.Identity(), next(costs)))
    found = benchmark("bundled_vit", ["base_ptq"], "W4A4", 1, 3, torch.device("cpu"))
    assert found["full_precision"]["forward"] == 2
    values = found["methods"]["base_ptq"]
    assert (values["calibration"], values["batched"], values["forward"]) == (3.5, 8.5, 2.5)
    assert "| Base PTQ " in render(found)


def test_an_iteration_is_what_more_iterations_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def quantize(cell: speed.Cell, *_: object) -> tuple[nn.Module, dict[str, float | None]]:
        asked.append(dict(cell.method_arguments))
        seconds = {0: 2.0, 5: 10.0, 7: 16.0}[dict(cell.method_arguments)["iterations"]]
        return nn.Identity(), {"calibration_seconds": seconds, "calibration_memory": None}

    monkeypatch.setattr(speed, "time_of", lambda *_: 1.5)
    monkeypatch.setattr(speed, "quantize_model", quantize)
    found = benchmark("bundled_vit", ["adfq_vit"], "W4A4", 2, 1, torch.device("cpu"))
    assert found["methods"]["adfq_vit"]["iteration"] == 2.0  # 3 seconds each, where 1.5 are one training pass
    assert [arguments.get("optimize_batch_size") for arguments in asked] == [None] * 4 + [2, 2]  # memory first


@pytest.mark.parametrize(
    ("method", "further"), [("aphq_vit", {"mlp_iterations": 1}), ("adalog", {"reconstruct": True}), ("qdrop", {})]
)
def test_an_iteration_is_one_of_the_blocks_reconstruction(
    method: str, further: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def quantize(cell: speed.Cell, *_: object) -> tuple[nn.Module, dict[str, float | None]]:
        asked.append(dict(cell.method_arguments))
        return nn.Identity(), {"calibration_seconds": float(len(asked)), "calibration_memory": None}

    monkeypatch.setattr(speed, "quantize_model", quantize)
    benchmark("bundled_vit", [method], "W4A4", 2, 1, torch.device("cpu"))
    expected = [{"iterations": number, "optimize_batch_size": 2, **further} for number in (5, 7)]
    assert asked == [{"iterations": 0}] * 4 + expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "resnet"], "unknown model 'resnet'"),
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--methods", "full_precision"], "nothing to compare with"),
        (["--bits", "W1A4"], "bits must be"),
        (["--images", "0"], "not a positive whole number"),
        (["--device", "abacus"], "cannot use device 'abacus'"),
        (["--data", "folder"], "write bundled, folder:ROOT or torch/NAME:ROOT"),
        (["--model", "deit_tiny_patch16_224", "--data", "folder:/no/such/place"], "there is no /no/such/place"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], says: str, assert_refused: Callable[[Sequence[str], str], None]
) -> None:
    assert_refused([*SMALL, *arguments], says)
