"""Tables say what was measured, and mark what does not count."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm

from adfq import AdfqError, methods
from adfq.registry import create_method
from benchmarks.bundled import BUNDLED
from benchmarks.bundled.classifiers import CLASSIFIERS
from benchmarks.bundled.detectors import DETECTORS
from benchmarks.plan import Entry, Table, load_table, table_names
from benchmarks.report.tables import published_numbers, render, summarize, tabulate_results
from benchmarks.run.correct import pack_correct
from benchmarks.run.store import Record
from benchmarks.tasks.detection.models import CONFIGS
from benchmarks.tasks.encoders.models import ENCODERS
from benchmarks.tasks.segmentation.models import sam_names

Results = list[tuple[Entry, Record]]


def measure(table: Table, values: dict[tuple[str, str, str], Any]) -> Results:
    """Results as if measured; model keys, rows' keys and bits name them. Of a list, each seed has its own value; a
    dictionary has all metrics that there are.
    """
    results: Results = []
    for entry in table.entries(data="somewhere"):
        cell = entry.cell
        value = values.get((entry.model.key, entry.row.key, cell.bits), 50.0)
        found = value if isinstance(value, dict) else dict.fromkeys(table.metrics, value)
        seed = list(table.seeds).index(cell.seed)
        metrics = {metric: each[seed] if isinstance(each, list) else each for metric, each in found.items()}
        metrics |= {"images": 123} if table.task == "detection" else {"top5": 99.0, "images": 123}
        cost = {"calibration_seconds": 2.0, "size": 1.5, "forward_seconds": 3.0 if cell.calibration_size else 2.0}
        if cell.method == "adfq_vit":
            cost["outliers"] = 0.25
        results.append((entry, {"config": cell.config, "metrics": metrics, "cost": cost}))
    return results


def recorded(name: str) -> Table:
    """A table of the bundled profile with the seeds of the committed results."""
    table = load_table(name, "bundled")
    return replace(table, seeds=table.recorded_seeds)


@pytest.fixture
def bundled() -> Table:
    return replace(load_table("1", "bundled"), bits=["W4/A4"], seeds=[0])


@pytest.fixture
def full() -> Table:
    table = load_table("1", "full")
    return replace(table, bits=["W4/A4"], models=[m for m in table.models if m.key in ("vit_small", "deit_tiny")])


@pytest.fixture
def detection() -> Table:
    table = load_table("2", "full")
    chosen = [model for model in table.models if model.key in ("mask_rcnn_swin_tiny", "cascade_mask_rcnn_swin_tiny")]
    return replace(table, bits=["W4/A4"], models=chosen)


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        *((name, profile) for name in table_names(BUNDLED) for profile in (BUNDLED, "full")),
        ("3", "mobile"),
        ("encoders", "real"),
        ("encoders", "folder"),
    ],
)
def test_specifications_name_things_that_exist(name: str, profile: str) -> None:
    table = load_table(name, profile)
    assert {row.method for row in table.rows} <= set(methods())
    entries = table.entries(data="x")
    cells = len(table.models) * (1 + len(table.bits) * len(table.rows) * len(table.seeds))
    assert len({entry.cell.id for entry in entries}) == len(entries) == cells
    assert len({row.key for row in table.rows}) == len({row.label for row in table.rows}) == len(table.rows)
    for model in table.models:
        if table.task == "detection":
            assert model.name in (DETECTORS if profile == "bundled" else CONFIGS)
            continue
        if table.task == "segmentation":
            assert model.name in sam_names()
            assert model.name.startswith("bundled") == (profile == "bundled")
            continue
        if table.task == "encoders":
            assert model.name in ENCODERS
            continue
        assert model.name in CLASSIFIERS or timm.models.is_model(model.name)
        assert model.name in CLASSIFIERS or timm.get_pretrained_cfg(model.name, allow_unregistered=False)


@pytest.mark.parametrize("name", ["1", "2"])
def test_published_numbers_belong_to_models_of_the_table(name: str) -> None:
    table = load_table(name, "full")
    numbers = published_numbers(table)
    assert set(numbers["model"]) == {model.key for model in table.models}
    assert set(numbers["metric"]) == set(table.metrics)
    assert not numbers.duplicated(["model", "row", "bits", "metric"]).any()
    assert set(numbers["evidence"]) == {"seen", "quoted"}
    references = numbers[numbers["row"] == "full_precision"]
    assert len(references) == len(table.models) * len(table.metrics)  # each is held against full_precision_tolerance


def test_every_new_row_of_the_field_has_a_published_number() -> None:
    table = load_table("field", "full")
    published = published_numbers(table)
    keys = {row.key for row in table.rows}
    unpublished = {"base_ptq", "ptq4vit", "row_ridge", "row_ridge_reconstructed"}
    assert keys <= {*unpublished, *published["row"]}
    at_3_bits = set(published[published["bits"] == "W3/A3"]["row"])
    assert at_3_bits == {"qdrop", "iasvit", "adalog", "adalog_reconstructed", "aphq_vit", "fima_q"}
    assert {row.method for row in load_table("1", "full").rows} == {"base_ptq", "ptq4vit", "repq_vit", "adfq_vit"}


def test_published_numbers_are_read_as_written() -> None:
    numbers = published_numbers(load_table("1", "full"))
    row = numbers[(numbers["model"] == "deit_tiny") & (numbers["row"] == "repq_vit") & (numbers["bits"] == "W4/A4")]
    assert (row["value"].item(), row["evidence"].item(), row["note"].item()) == (57.43, "seen", "")


def test_notes_on_published_numbers_say_what_the_numbers_say() -> None:
    numbers = published_numbers(load_table("1", "full"))
    wide = numbers[numbers["bits"] == "W4/A4"].pivot(index="model", columns="row", values="value")
    ahead = wide.index[wide["adalog_reconstructed"] > wide["fima_q"]]
    assert set(ahead) == {"vit_small", "vit_base", "deit_tiny", "swin_small", "swin_base"}
    assert wide["adfq_vit"]["vit_base"] == pytest.approx(wide["repq_vit"]["vit_base"] + 10.23)
    of_qdrop = numbers[(numbers["row"] == "qdrop") & (numbers["bits"] == "W4/A4")]
    assert of_qdrop["value"].iloc[0] == 71.84
    assert "71.84" in of_qdrop["note"].iloc[0]


def test_unknown_tables_and_profiles_say_what_there_is() -> None:
    with pytest.raises(AdfqError, match="there are 1"):
        load_table("0", "bundled")
    with pytest.raises(AdfqError, match="there are bundled, full"):
        load_table("1", "paper")


def test_bundled_cells_show_the_difference_to_full_precision(bundled: Table) -> None:
    top1 = {
        ("bundled_vit", "full_precision", "W32/A32"): 91.0,
        ("bundled_vit", "base_ptq", "W4/A4"): 88.5,
        ("bundled_vit", "repq_vit", "W4/A4"): 91.25,
    }
    text = render(bundled, tabulate_results(bundled, measure(bundled, top1)), "md")
    assert "91.00 |" in text
    assert "88.50 (-2.50)" in text
    assert "91.25 (+0.25)" in text
    assert "bundled profile" in text
    sizes = "32 (Base PTQ, PTQ4ViT, RepQ-ViT) and 128 (ADFQ-ViT)"
    assert f"Measured on 123 images of somewhere, calibrated on {sizes}, seed 0." in text
    assert "ImageNet" not in text.replace("not ImageNet", "")


def test_published_numbers_stand_beside_ours_and_quoted_ones_are_marked(full: Table) -> None:
    top1 = {
        ("vit_small", "full_precision", "W32/A32"): 81.39,
        ("deit_tiny", "full_precision", "W32/A32"): 72.15,
        ("vit_small", "repq_vit", "W4/A4"): 64.0,
    }
    text = render(full, tabulate_results(full, measure(full, top1)), "md")
    assert "81.39 / 81.39 (+0.00)" in text
    assert "64.00 / 65.05 (-1.05)" in text  # seen
    assert "50.00 / 72.14† (-22.14)" in text  # ADFQ-ViT's ViT-S
    assert "† Quoted second hand" in text
    assert "Published:" not in text  # no note belongs to these two models
    assert "‡" not in text


def test_a_model_that_is_not_the_published_one_does_not_count(full: Table) -> None:
    top1 = {("vit_small", "full_precision", "W32/A32"): 81.2, ("deit_tiny", "full_precision", "W32/A32"): 72.21}
    text = render(full, tabulate_results(full, measure(full, top1)), "md")
    assert "50.00‡ / 65.05" in text
    assert "50.00 / 57.43" in text
    assert "‡ Does not count" in text


def test_numbers_in_csv_are_numbers(bundled: Table) -> None:
    frame = tabulate_results(bundled, measure(bundled, {("bundled_vit", "full_precision", "W32/A32"): 91.0}))
    text = render(bundled, frame, "csv")
    numbers = pd.read_csv(io.StringIO(text))
    assert list(numbers["row"][:2]) == ["full_precision", "base_ptq"]
    assert numbers["delta"][1] == -41.0
    assert numbers["relative_forward"][1] == 1.5
    assert (numbers["calibration_size"][1], numbers["seed"][1], numbers["data"][1]) == (32, 0, "somewhere")


def test_batches_of_calibration_are_told(bundled: Table) -> None:
    rows = [replace(row, calibration_size=64 if row.method == "adfq_vit" else 32) for row in bundled.rows]
    table = replace(bundled, rows=[replace(row, calibration_batch_size=32) for row in rows])
    frame = tabulate_results(table, measure(table, {}))
    text = render(table, frame, "md")
    assert "calibrated on 32 (Base PTQ, PTQ4ViT, RepQ-ViT) and 64 in batches of 32 (ADFQ-ViT), seed 0." in text
    numbers = pd.read_csv(io.StringIO(render(table, frame, "csv")), dtype=str)
    sizes = numbers.groupby("method")["calibration_batch_size"].unique()
    assert (sizes["adfq_vit"].tolist(), pd.isna(sizes["base_ptq"]).tolist()) == (["32"], [True])


def test_seeds_become_mean_and_standard_deviation(bundled: Table) -> None:
    table = replace(bundled, seeds=[0, 1, 2])
    top1 = {("bundled_vit", "full_precision", "W32/A32"): 91.0, ("bundled_vit", "base_ptq", "W4/A4"): [80.0, 82, 84]}
    text = render(table, tabulate_results(table, measure(table, top1)), "md")
    assert "82.00 ± 2.00 (-9.00)" in text
    assert "| 91.00 |" in " ".join(text.split())
    assert "Mean ± standard deviation over seeds 0, 1, 2" in text
    assert ", seed " not in text


@pytest.mark.parametrize(
    ("values", "bold"),
    [
        ([70.0, 71.0, 72.0], True),  # ahead by 21, spread 1
        ([52.0, 52.0, 52.0], True),
        ([48.0, 51.0, 54.0], False),  # ahead by 1, spread 3
        ([50.0, 50.0, 50.0], False),  # level
    ],
)
def test_bold_is_what_is_ahead_by_more_than_the_spread(bundled: Table, values: list[float], bold: bool) -> None:
    table = replace(bundled, seeds=[0, 1, 2])
    top1: dict[Any, Any] = {("bundled_vit", "repq_vit", "W4/A4"): values}
    frame = tabulate_results(table, measure(table, top1))
    best = summarize(table, frame).query("best")
    assert list(zip(best["row"], best["model"], strict=True)) == [("repq_vit", "bundled_vit")] * bold
    mean = f"{sum(values) / 3:.2f} ±"
    assert (f"**{mean}" in render(table, frame, "md")) == bold
    assert (rf"\textbf{{{mean[:-1]}$\pm$" in render(table, frame, "latex")) == bold


def test_bold_is_not_what_another_one_may_be_ahead_of(bundled: Table) -> None:
    table = replace(bundled, seeds=[0, 1, 2])
    top1: dict[Any, Any] = {
        ("bundled_vit", "repq_vit", "W4/A4"): [60.0, 60.0, 60.0],
        ("bundled_vit", "base_ptq", "W4/A4"): [59.0, 59.0, 59.0],  # the next one, without any spread
        ("bundled_vit", "ptq4vit", "W4/A4"): [54.0, 58.0, 62.0],  # behind it, but with a large one
    }
    assert not summarize(table, tabulate_results(table, measure(table, top1)))["best"].any()


def with_bits(results: Results, without: str = "") -> Results:
    """Results with bits: of 200 images, the last ones are wrong, as many as top-1 says; not those of a model's row."""
    found = []
    for entry, record in results:
        metrics = {**record["metrics"], "images": 200}
        bits = {"correct": pack_correct({"top1": np.arange(200) < 2 * metrics["top1"]})}
        left_out = f"{entry.model.key}, {entry.row.key}" == without
        found.append((entry, {**record, "metrics": metrics, **({} if left_out else bits)}))
    return found


@pytest.mark.parametrize(("seeds", "bold"), [([57.0, 58.0, 59.0], True), ([49.5, 58.0, 66.5], False)])
def test_bold_excludes_0_where_records_say_which_images_are_right(
    bundled: Table, seeds: list[float], bold: bool
) -> None:
    table = replace(bundled, seeds=[0, 1, 2])
    results = measure(table, {("bundled_vit", "repq_vit", "W4/A4"): seeds})
    frame = tabulate_results(table, with_bits(results))
    summary = summarize(table, frame).query("model == 'bundled_vit' and method != 'full_precision'")
    assert list(summary["paired"]) == [True] * 4
    assert list(summary["best"]) == [row == "repq_vit" and bold for row in summary["row"]]
    for row in summary.to_dict("records"):
        if row["row"] == "repq_vit":
            assert math.isnan(row["low"])
        else:
            assert row["low"] < -8 < row["high"]
            assert (row["high"] < 0) == bold
    text = render(table, frame, "md")
    assert ("**58.00" in text) == bold
    assert "with 0 outside of the 95 % interval" in text
    assert "√(s₁² + s₂²)" not in text
    assert "correct" not in render(table, frame, "csv")

    # A record without bits has the rule of older ones, and the legend says both.
    frame = tabulate_results(table, with_bits(results, without="bundled_vit, base_ptq"))
    assert set(summarize(table, frame).query("paired")["model"]) == {"bundled_swin"}
    text = render(table, frame, "md")
    assert "95 % interval" in text
    assert "where records do not say which images are right, ahead" in text


def test_a_single_seed_has_no_spread_and_no_bold(bundled: Table) -> None:
    top1: dict[Any, Any] = {("bundled_vit", "repq_vit", "W4/A4"): 90.0}
    text = render(bundled, tabulate_results(bundled, measure(bundled, top1)), "md")
    assert "90.00 (+40.00)" in text
    assert "±" not in text
    assert "**90" not in text


def test_rows_of_one_method_differ_by_their_options() -> None:
    table = recorded("4")
    by_key = {row.key: row for row in table.rows}
    components = {
        key: (row.arguments.get("ppoq", True), row.arguments.get("slq", True), row.arguments["iterations"] > 0)
        for key, row in by_key.items()
    }
    subsets = [components[key] for key in list(components)[:8]]
    assert len(set(subsets)) == 8  # every subset of the three components
    assert set(list(components.values())[8:]) == {(True, True, True)}
    top1 = {("bundled_vit", "slq_amo", "W3/A3"): [90.0, 90.0, 91.0]}
    text = render(table, tabulate_results(table, measure(table, top1)), "md")
    assert "| SLQ + AMO |" in " ".join(text.split())


def test_shared_settings_go_into_every_table_alike() -> None:
    tables = {name: load_table(name, "bundled") for name in ("1", "2", "4", "5")}
    rows = {
        name: next(row for row in table.rows if row.key == ("ppoq_slq_amo" if name == "4" else "adfq_vit"))
        for name, table in tables.items()
    }
    assert rows["1"].arguments
    assert all(row.arguments == rows["1"].arguments for row in rows.values())
    # Tables of the same task have the same cells, which are measured once.
    cells = {
        name: {entry.cell.id for entry in tables[name].entries(data="bundled") if entry.row.key == rows[name].key}
        for name in ("1", "4", "5")
    }
    assert cells["4"] == cells["5"]
    assert cells["4"] < cells["1"]


def test_calibration_of_detectors() -> None:
    sizes = {
        profile: {row.key: row.calibration_size for row in load_table("2", profile).rows}
        for profile in ("bundled", "full")
    }
    assert sizes["bundled"] == {"base_ptq": 32, "ptq4vit": 32, "repq_vit": 32, "adfq_vit": 64}
    assert sizes["full"] == {"base_ptq": 32, "ptq4vit": 32, "repq_vit": 1, "adfq_vit": 32}


@pytest.mark.parametrize(
    ("name", "profile", "calibrated"),
    [
        ("1", "full", {"base_ptq": (32, None), "adfq_vit": (1024, 32)}),
        ("2", "full", {"base_ptq": (32, 1), "repq_vit": (1, None), "adfq_vit": (32, 1)}),
        ("3", "full", {"base_ptq": (32, 1), "adfq_vit": (32, 1)}),
        ("3", "mobile", {"base_ptq": (80, 1), "adfq_vit": (80, 1)}),
        ("4", "full", {"adfq_vit": (1024, 32)}),
        ("5", "full", {"base_ptq": (32, None), "adfq_vit": (1024, 32)}),
        ("encoders", "folder", {"base_ptq": (32, None), "adfq_vit": (64, 32)}),
    ],
)
def test_large_models_are_calibrated_in_batches(
    name: str, profile: str, calibrated: dict[str, tuple[int, int | None]]
) -> None:
    cells = reversed([entry.cell for entry in load_table(name, profile).entries(data="somewhere")])
    found = {cell.method: (cell.calibration_size, cell.calibration_batch_size) for cell in cells}
    assert found.items() >= calibrated.items()


def test_bundled_models_are_calibrated_at_once() -> None:
    profiles = [(name, BUNDLED) for name in table_names(BUNDLED)] + [("encoders", "real")]
    rows = [row for name, profile in profiles for row in load_table(name, profile).rows]
    assert {row.calibration_batch_size for row in rows} == {None}  # as their records are


def test_each_model_has_a_column_of_each_metric(detection: Table) -> None:
    values = {
        ("mask_rcnn_swin_tiny", "full_precision", "W32/A32"): {"box_ap": 46.04, "mask_ap": 41.56},
        ("cascade_mask_rcnn_swin_tiny", "full_precision", "W32/A32"): {"box_ap": 50.44, "mask_ap": 43.71},
        ("mask_rcnn_swin_tiny", "repq_vit", "W4/A4"): {"box_ap": 35.96, "mask_ap": 36.21},
        ("mask_rcnn_swin_tiny", "ptq4vit", "W4/A4"): {"box_ap": 6.5, "mask_ap": 6.6},
    }
    text = render(detection, tabulate_results(detection, measure(detection, values)), "md")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    models = ("Mask R-CNN Swin-T", "Cascade Mask R-CNN Swin-T")
    assert rows[0][2:] == [f"{model}, {metric}" for model in models for metric in ("box AP", "mask AP")]
    by_method = {row[0]: row[2:] for row in rows}
    # As published, with one decimal.
    assert by_method["Full precision"] == [f"{number} / {number} (+0.0)" for number in (46.0, 41.6, 50.4, 43.7)]
    assert by_method["RepQ-ViT"] == [
        "36.0 / 36.1 (-0.1)",
        "36.2 / 36.0 (+0.2)",
        "50.0 / 47.0 (+3.0)",
        "50.0 / 41.4 (+8.6)",
    ]
    assert by_method["PTQ4ViT"][:2] == ["6.5 / 6.9† (-0.4)", "6.6"]
    assert "‡" not in text


def test_a_metric_counts_by_its_own_full_precision(detection: Table) -> None:
    values = {
        ("mask_rcnn_swin_tiny", "full_precision", "W32/A32"): {"box_ap": 46.1, "mask_ap": 41.2},  # by 0.1 and 0.4
        ("cascade_mask_rcnn_swin_tiny", "full_precision", "W32/A32"): {"box_ap": 50.4, "mask_ap": 43.7},
    }
    text = render(detection, tabulate_results(detection, measure(detection, values)), "md")
    row = next(line for line in text.splitlines() if line.startswith("| RepQ-ViT"))
    assert [cell.strip() for cell in row.split("|")[3:5]] == ["50.0 / 36.1 (+13.9)", "50.0‡ / 36.0 (+14.0)"]
    assert "more than 0.1 points" in text


def test_differences_are_of_the_same_metric() -> None:
    table = replace(load_table("2", "bundled"), bits=["W4/A4"])
    values = {
        ("bundled_mask_rcnn", "full_precision", "W32/A32"): {"box_ap": 60.0, "mask_ap": 55.0},
        ("bundled_mask_rcnn", "repq_vit", "W4/A4"): {"box_ap": 58.5, "mask_ap": 54.25},
    }
    frame = tabulate_results(table, measure(table, values))
    text = render(table, frame, "md")
    assert "58.50 (-1.50)" in text
    assert "54.25 (-0.75)" in text
    assert "Bundled Cascade Mask R-CNN, mask AP" in text
    assert "bundled profile" in text
    assert "COCO" not in text.replace("COCO's measure", "").replace("not COCO", "")

    numbers = pd.read_csv(io.StringIO(render(table, frame, "csv")))
    row = numbers[(numbers["model"] == "bundled_mask_rcnn") & (numbers["row"] == "repq_vit")].iloc[0]
    assert (row["box_ap"], row["delta_box_ap"], row["mask_ap"], row["delta_mask_ap"]) == (58.5, -1.5, 54.25, -0.75)
    assert len(numbers) == len(table.entries(data="x"))
    assert "delta" not in numbers

    latex = render(table, frame, "latex")
    models = [rf"\multicolumn{{2}}{{c}}{{{model}}}" for model in ("Bundled Mask R-CNN", "Bundled Cascade Mask R-CNN")]
    assert " & ".join(["", *models]) in latex
    assert "Method & W/A & box AP & mask AP & box AP & mask AP" in latex
    assert "54.25 (-0.75)" in latex


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("missing", [("bundled_mask_rcnn",), ("bundled_mask_rcnn", "bundled_cascade_mask_rcnn")])
@pytest.mark.parametrize("published", [None, "coco"])
def test_what_was_not_measured_is_an_empty_cell(missing: tuple[str, ...], published: str | None) -> None:
    table = replace(load_table("2", "bundled"), bits=["W4/A4"], published=published)
    table = replace(table, full_precision_tolerance=0.1 if published else None)
    boxes = {(entry.model.key, entry.row.key, entry.cell.bits): {"box_ap": 40.0} for entry in table.entries(data="x")}
    values = {key: value for key, value in boxes.items() if key[0] in missing}
    frame = tabulate_results(table, measure(table, values))
    text = render(table, frame, "md")
    for line in [line for line in text.splitlines() if line.startswith("|")][2:]:
        cells = [cell.strip() for cell in line.split("|")[3:-1]]
        assert [not cell for cell in cells] == [False, True, False, len(missing) == 2]
    assert "nan" not in text
    assert math.isnan(frame["delta_mask_ap"].iloc[0])


def test_bold_is_one_metrics_matter() -> None:
    table = replace(load_table("2", "bundled"), bits=["W4/A4"], seeds=[0, 1, 2])
    values = {
        ("bundled_mask_rcnn", "repq_vit", "W4/A4"): {"box_ap": [70.0, 71.0, 72.0], "mask_ap": [40.0, 40.0, 40.0]},
        ("bundled_mask_rcnn", "adfq_vit", "W4/A4"): {"box_ap": [60.0, 60.0, 60.0]},  # without masks
    }
    frame = tabulate_results(table, measure(table, values))
    best = summarize(table, frame).query("best")
    assert list(zip(best["row"], best["model"], best["metric"], strict=True)) == [
        ("repq_vit", "bundled_mask_rcnn", "box_ap")
    ]
    assert "**71.00 ± 1.00 (+21.00)**" in render(table, frame, "md")

    values["bundled_mask_rcnn", "repq_vit", "W4/A4"]["mask_ap"] = [60.0, 60.0, 60.0]
    best = summarize(table, tabulate_results(table, measure(table, values))).query("best")
    assert set(best["metric"]) == {"box_ap", "mask_ap"}  # ahead of each that has masks


def test_costs_stand_beside_the_accuracy() -> None:
    table = replace(load_table("5", "bundled"), seeds=[0, 1])
    text = render(table, tabulate_results(table, measure(table, {})), "md")
    header, _, _, base, *_ = [line for line in text.splitlines() if line.startswith("|")]
    assert "Forward, × full precision" in header
    assert [cell.strip() for cell in base.split("|")[4:-1]] == ["2.0", "1.50", "", "1.50", ""]
    adfq = next(line for line in text.splitlines() if line.startswith("| ADFQ-ViT "))
    assert "0.250" in adfq


def test_training_stands_in_each_row() -> None:
    table = replace(load_table("4", "bundled"), training=True, seeds=[0])
    frame = tabulate_results(table, measure(table, {}))
    text = render(table, frame, "md")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0][:5] == ["Method", "W/A", "Trained", "Images", "Iterations"]
    rows = {line[0]: line[2:5] for line in lines}
    assert rows["Full precision"] == ["", "", ""]
    assert rows["PPOQ"] == ["nothing", "128", "–"]
    assert rows["AMO"] == ["roundings, step sizes", "128", "50"]
    assert rows["all, rounding to nearest"][0] == "step sizes"
    assert rows["all, calibrated step sizes"][0] == "roundings"
    assert "Method & W/A & Trained & Images & Iterations & Bundled ViT" in render(table, frame, "latex")
    numbers = pd.read_csv(io.StringIO(render(table, frame, "csv"))).set_index("row")
    assert numbers["iterations"].loc[["ppoq", "amo"]].tolist() == [0, 50]


@pytest.mark.parametrize(
    ("method", "options", "trains", "iterations"),
    [
        ("base_ptq", {}, "", 0),
        ("gptq", {}, "weights, in closed form", 0),
        ("erq", {}, "weights, in closed form", 0),
        ("adalog", {}, "", 0),
        ("adalog", {"reconstruct": True, "iterations": 7}, "roundings, step sizes", 7),
        ("aphq_vit", {"iterations": 7, "mlp_iterations": 5}, "weights of MLPs, roundings, step sizes", 12),
        ("aphq_vit", {"iterations": 7, "relu": False}, "roundings, step sizes", 7),
        ("glf_q", {"iterations": 7, "mlp_iterations": 5}, "weights, step sizes", 12),
        ("glf_q", {"iterations": 7, "relu": False, "step_learning_rate": 0.0}, "weights", 7),
        (
            "glf_q",
            {"iterations": 7, "mlp_iterations": 5, "weight_learning_rate": 0.0},
            "weights of MLPs, step sizes",
            12,
        ),
        ("glf_q", {"iterations": 0}, "", 0),
        ("qdrop", {"iterations": 0}, "", 0),
        ("fima_q", {"iterations": 7, "step_learning_rate": 0.0}, "roundings", 7),
    ],
)
def test_methods_say_what_they_train(method: str, options: dict[str, Any], trains: str, iterations: int) -> None:
    made = create_method(method, options)
    assert (made.trains, made.trained_iterations) == (trains, iterations)


def test_latex_is_escaped_booktabs(full: Table) -> None:
    text = render(full, tabulate_results(full, measure(full, {})), "latex")
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\caption{", r"\label{tab:1-full}"):
        assert rule in text
    assert "†" not in text
    assert "‡" not in text
    assert r"in \% on" in text


def test_no_text_is_taken_for_latex(bundled: Table) -> None:
    models = [replace(model, label=r"50%_{x}^2 ~\y $a$ #1 & <b") for model in bundled.models[:1]]
    table = replace(bundled, models=models, seeds=[0, 1])
    top1: dict[Any, Any] = {("bundled_vit", "repq_vit", "W4/A4"): [90.0, 90.0]}
    text = render(table, tabulate_results(table, measure(table, top1)), "latex")
    label = r"50\%\_\{x\}\textasciicircum{}2 \textasciitilde{}\textbackslash{}y \$a\$ \#1 \& \textless{}b"
    assert f"Method & W/A & {label} \\\\" in text
    assert r"\textbf{90.00 $\pm$ 0.00" in text  # what is ours stays LaTeX
