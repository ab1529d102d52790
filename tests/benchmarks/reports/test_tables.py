"""Tables say what was measured, and mark what does not count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm

from adfq import AdfqError, methods
from benchmarks.cells import Cell
from benchmarks.embedded.classifiers import CLASSIFIERS
from benchmarks.reports.spec import Table, load_table, published_numbers, table_names
from benchmarks.reports.tables import render, tabulate_results
from benchmarks.results import Record

Results = list[tuple[Cell, Record]]


def measure(table: Table, top1: dict[tuple[str, str, str], float]) -> Results:
    """Results as if measured; model keys, methods and bits name them."""
    keys = {model.name: model.key for model in table.models}
    results: Results = []
    for cell in table.cells(data="somewhere"):
        value = top1.get((keys[cell.model], cell.method, cell.bits), 50.0)
        metrics: dict[str, Any] = {"top1": value, "top5": 99.0, "images": 123}
        results.append((cell, {"config": cell.config, "metrics": metrics}))
    return results


@pytest.fixture
def embedded() -> Table:
    return replace(load_table("1", "embedded"), bits=["W4/A4"])


@pytest.fixture
def full() -> Table:
    table = load_table("1", "full")
    return replace(table, bits=["W4/A4"], models=[m for m in table.models if m.key in ("vit_small", "deit_tiny")])


@pytest.mark.parametrize("profile", ["embedded", "full"])
def test_specifications_name_things_that_exist(profile: str) -> None:
    for name in table_names():
        table = load_table(name, profile)
        assert set(table.methods) <= set(methods())
        assert len({cell.id for cell in table.cells(data="x")}) == len(table.models) * (
            1 + len(table.bits) * (len(table.methods) - 1)
        )
        for model in table.models:
            assert model.name in CLASSIFIERS or timm.models.is_model(model.name)
            assert model.name in CLASSIFIERS or timm.get_pretrained_cfg(model.name, allow_unregistered=False)


def test_published_numbers_belong_to_models_of_the_table() -> None:
    table = load_table("1", "full")
    numbers = published_numbers(table)
    assert set(numbers["model"]) == {model.key for model in table.models}
    row = numbers[(numbers["model"] == "deit_tiny") & (numbers["method"] == "repq_vit") & (numbers["bits"] == "W4/A4")]
    assert row["value"].item() == 57.43
    assert bool(row["verified"].item())


def test_unknown_tables_and_profiles_say_what_there_is() -> None:
    with pytest.raises(AdfqError, match="there are 1"):
        load_table("0", "embedded")
    with pytest.raises(AdfqError, match="there are embedded, full"):
        load_table("1", "paper")


def test_embedded_cells_show_the_difference_to_full_precision(embedded: Table) -> None:
    top1 = {
        ("embedded_vit", "full_precision", "W32/A32"): 91.0,
        ("embedded_vit", "base_ptq", "W4/A4"): 88.5,
        ("embedded_vit", "repq_vit", "W4/A4"): 91.25,
    }
    text = render(embedded, tabulate_results(embedded, measure(embedded, top1)), "md")
    assert "91.00 |" in text
    assert "88.50 (-2.50)" in text
    assert "91.25 (+0.25)" in text
    assert "embedded profile" in text
    assert "Measured on 123 images of somewhere, calibrated on 32, seed 0." in text
    assert "ImageNet" not in text.replace("not ImageNet", "")


def test_published_numbers_stand_beside_ours_and_unverified_ones_are_marked(full: Table) -> None:
    top1 = {
        ("vit_small", "full_precision", "W32/A32"): 81.39,
        ("deit_tiny", "full_precision", "W32/A32"): 72.15,
        ("vit_small", "repq_vit", "W4/A4"): 64.0,
    }
    text = render(full, tabulate_results(full, measure(full, top1)), "md")
    assert "81.39 / 81.39" in text
    assert "64.00 / 65.05 " in text  # verified
    assert "50.00 / 72.14†" in text  # ADFQ-ViT's ViT-S, quoted without a source
    assert "† Quoted from the literature" in text
    assert "‡" not in text


def test_a_model_that_is_not_the_published_one_does_not_count(full: Table) -> None:
    top1 = {("vit_small", "full_precision", "W32/A32"): 81.2, ("deit_tiny", "full_precision", "W32/A32"): 72.21}
    text = render(full, tabulate_results(full, measure(full, top1)), "md")
    assert "50.00‡ / 65.05" in text
    assert "50.00 / 57.43" in text
    assert "‡ Does not count" in text


def test_numbers_in_csv_are_numbers(embedded: Table) -> None:
    frame = tabulate_results(embedded, measure(embedded, {("embedded_vit", "full_precision", "W32/A32"): 91.0}))
    text = render(embedded, frame, "csv")
    assert text.splitlines()[0] == "model,method,bits,top1,top5,images,calibration_size,seed,data,delta"
    assert text.splitlines()[2] == "embedded_vit,base_ptq,W4/A4,50.0000,99.0000,123,32,0,somewhere,-41.0000"


def test_latex_is_escaped_booktabs(full: Table) -> None:
    text = render(full, tabulate_results(full, measure(full, {})), "latex")
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\caption{", r"\label{tab:1-full}"):
        assert rule in text
    assert "†" not in text
    assert "‡" not in text
    assert r"in \% on" in text
