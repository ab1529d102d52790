"""A record says all that a measurement depends on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from adfq import AdfqError
from benchmarks.cell import Cell
from benchmarks.run import runner
from benchmarks.run.console import collect_warnings, warn
from benchmarks.run.provenance import provenance

CPU = torch.device("cpu")


def test_a_record_says_what_was_measured_with_what(subject: Any, cells: list[Cell]) -> None:
    record = runner.run_cell(cells[1], subject, CPU)
    assert record["config"] == cells[1].config
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["memory_gb"] > 0.1
    assert record["provenance"] == provenance(cells[1], subject)
    assert record["provenance"]["data"] == subject.data_digests
    assert set(record["timing"]) == {"calibration", "evaluation", "loading"}
    assert record["cost"]["calibration_seconds"] == record["timing"]["calibration"] > 0
    assert record["cost"]["forward_seconds"] > 0
    assert "outliers" not in record["cost"]  # of per-patch quantizers alone


@pytest.mark.parametrize("batch_size", [None, 1])
def test_seconds_of_calibration_are_without_reading(
    batch_size: int | None, subject: Any, cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, asked = subject.calibration_batches, []

    def read_slowly(*arguments: Any) -> Iterator[torch.Tensor]:
        asked.append(arguments)
        for batch in read(*arguments):
            time.sleep(0.2)
            yield batch

    monkeypatch.setattr(subject, "calibration_batches", read_slowly)
    start = time.perf_counter()
    cell = replace(cells[1], calibration_batch_size=batch_size)
    model, cost = runner.quantize_model(cell, subject, CPU)
    reading = 0.2 * (2 if batch_size else 1)
    assert 0 < cost["calibration_seconds"] <= time.perf_counter() - start - reading
    assert model.quantization.calibration_size == 2
    assert asked == [(2, 0, batch_size)]


def test_unknown_devices_are_one_clear_line() -> None:
    with pytest.raises(AdfqError, match="cannot use device 'abacus'"):
        runner.resolve_device("abacus")
    assert runner.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_clear_line() -> None:
    with pytest.raises(AdfqError, match="cannot use device 'cuda'"):
        runner.resolve_device("cuda")


def test_warnings_are_collected_once_and_only_within(capsys: pytest.CaptureFixture[str]) -> None:
    warn("before")
    with collect_warnings() as messages:
        warn("this")
        warn("this")
    warn("after")
    assert messages == ["this"]
    assert capsys.readouterr().err == "adfq: before\nadfq: after\n"


def test_warnings_of_python_are_collected_each_time_as_far_as_filters_let_them() -> None:
    def complain() -> None:
        warnings.warn("made no better", stacklevel=1)
        warnings.warn("in two years", PendingDeprecationWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.resetwarnings()  # pytest's
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        for _ in range(2):
            with collect_warnings() as messages:
                complain()
                complain()
            assert messages == ["made no better"]
