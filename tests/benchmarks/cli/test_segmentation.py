"""Segmentation from the command line: what is printed, what is recorded, one line for each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("segment_anything")
pytest.importorskip("pycocotools")

from benchmarks.bundled.sams import create_bundled_sam
from benchmarks.cell import Cell
from benchmarks.cli.main import main
from benchmarks.run.executors.local import InProcess
from benchmarks.run.scheduler import run_cells
from benchmarks.run.store import ResultStore

RUN = ["run", "segmentation", "--model", "bundled_sam", "--data", "bundled", "--method"]
TABLE = """
title = "Zero-shot segmentation"
task = "segmentation"
metrics = ["mean_iou", "mask_ap"]
methods = ["base_ptq"]

[profiles.bundled]
caption = "Mean IoU and mask AP in %."
data = "bundled"
bits = ["W4/A4"]
calibration_size = 2

[[profiles.bundled.models]]
key = "bundled_sam"
label = "Bundled SAM"
name = "bundled_sam"
"""


pytestmark = pytest.mark.usefixtures("few_scenes")


@pytest.fixture(scope="module")
def weights(randomize: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "bundled_sam.safetensors"
    save_file(randomize(create_bundled_sam()).state_dict(), file)
    return file


def test_a_sam_is_measured(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*RUN, "full_precision", "--checkpoint", str(weights), "--limit", "2"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    assert captured.out.startswith("bundled_sam, full_precision, W32/A32: mean IoU ")
    assert " instances in 2 images (calibration " in captured.out

    assert main([*command, "--results", str(tmp_path / "found"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["batch_size"] == 1
    assert "task_arguments" not in record["config"]
    assert record["metrics"]["images"] == 2
    assert record["cost"]["forward_seconds"] > 0
    assert 0 < record["timing"]["loading"] < record["timing"]["evaluation"]
    assert all(record[kind]["segment_anything"] for kind in ("environment", "provenance"))
    assert [file.name for file in tmp_path.iterdir()] == ["found.segm.json"]


def test_a_saved_sam_is_measured_like_the_run_that_quantizes(
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    assert_refused: Callable[[Sequence[str], str], None],
) -> None:
    experiment = [*RUN[1:], "base_ptq", "--checkpoint", str(weights), "--calibration-size", "2"]
    few = ["--limit", "2", "--json"]
    file = str(tmp_path / "sam.safetensors")
    assert main(["run", *experiment, *few]) == 0
    direct = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["quantize", *experiment, "--out", file]) == 0
    capsys.readouterr()
    read = ["run", "segmentation", "--quantized", file, "--data", "bundled"]
    assert main([*read, *few, "--results", str(tmp_path / "found")]) == 0
    saved = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert saved["metrics"] == direct["metrics"]
    assert (tmp_path / "found.segm.json").is_file()
    assert_refused([*read, "--encoder-only"], "the file decides which part is quantized; leave --encoder-only out")
    assert_refused([*read, "--mean", "0,0,0"], "there are no arguments for it")
    for other in ("classification", "encoders", "detection"):
        assert_refused(["run", other, *read[2:]], f"a Sam is a model for segmentation, not for {other}")
    assert main(["quantize", *experiment, "--encoder-only", "--out", file]) == 0
    capsys.readouterr()
    assert_refused(read, "a ImageEncoderViT predicts no masks; quantize the whole model")


def test_a_quantized_sam_is_measured(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*RUN, "base_ptq", "--checkpoint", str(weights), "--limit", "1", "--calibration-size", "2", "--json"]
    sizes = []
    for more in ([], ["--encoder-only"]):
        assert main([*command, *more]) == 0
        record = json.loads(capsys.readouterr().out)
        assert 0 <= record["metrics"]["mean_iou"] <= 100
        sizes.append(record["cost"]["size"])
    assert sizes[1] < sizes[0] < 4.5


def test_options_of_the_task_belong_to_the_cell(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*RUN, "full_precision", "--checkpoint", str(weights), "--limit", "1", "--json"]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps([{"image_id": 0, "category_id": 1, "bbox": [20, 20, 30, 30], "score": 0.5}]))
    configs = []
    for more in (
        [],
        ["--prompts", "boxes"],
        ["--prompts", "points", "--encoder-only"],
        ["--prompts", str(file)],
    ):
        assert main([*command, *more]) == 0
        configs.append(json.loads(capsys.readouterr().out)["config"])
    assert configs[0] == configs[1]
    given = [config.get("task_arguments") for config in configs[1:]]
    assert given == [None, [["encoder_only", True], ["prompts", "points"]], [["prompts", file.name]]]


def test_a_cell_without_options_of_its_task_is_the_one_it_was() -> None:
    fields = {"task": "classification", "model": "bundled_vit", "data": "bundled", "method": "base_ptq"}
    assert "task_arguments" not in Cell.create(**fields).config
    assert Cell.create(**fields).id != Cell.create(**fields, task_arguments=(("prompts", "points"),)).id


def test_cells_that_ask_differently_do_not_share_what_they_ask(weights: Path, tmp_path: Path) -> None:
    fields = {"task": "segmentation", "model": "bundled_sam", "checkpoint": str(weights), "data": "bundled"}
    cells = [
        Cell.create(**fields, method="full_precision", limit=1, task_arguments=arguments)
        for arguments in ((), (("prompts", "points"),))
    ]
    executor = InProcess(torch.device("cpu"))
    both = dict(run_cells(cells, ResultStore(tmp_path / "both"), executor))
    alone = dict(run_cells(cells[1:], ResultStore(tmp_path / "alone"), executor))
    assert both[cells[0]]["metrics"] != both[cells[1]]["metrics"] == alone[cells[1]]["metrics"]


def test_a_table_asks_by_boxes(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "9.toml"
    table.write_text(TABLE)
    out = ["--store", str(tmp_path / "runs"), "--checkpoints", str(weights.parent), "--limit", "1", "--jobs", "0"]
    assert main(["table", str(table), *out]) == 0
    text = capsys.readouterr().out
    assert "Bundled SAM, mean IoU" in text
    assert "Bundled SAM, mask AP" in text
    records = [json.loads(file.read_text()) for file in (tmp_path / "runs" / "records").iterdir()]
    assert [record["config"].get("task_arguments") for record in records] == [None, None]


def test_the_models_have_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "models"]) == 0
    assert {"bundled_sam", "mobile_sam", "vit_b", "vit_l", "vit_h"} <= set(capsys.readouterr().out.split())


FULL = [*RUN, "full_precision"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*FULL, "--prompts", "no.json"], "there are no prompts no.json; give boxes, points or a file"),
        ([*FULL, "--prompts", "broken.json"], "cannot read prompts broken.json: "),
        ([*FULL, "--prompts", "other.json"], "other.json has a box in image 99, which the data do not have"),
        (
            [*FULL, "--prompts", "outside.json"],
            "outside.json: 1 of 1 boxes are left out: 1 empty or outside their image",
        ),
        ([*FULL, "--prompts", "last.json", "--limit", "1"], "last.json has no box in the first 1 images of "),
        ([*FULL, "--prompts"], "argument --prompts: expected one argument"),
        (["run", "segmentation", "--config", "x.py", *FULL[4:]], "segmentation has no --config"),
        ([*FULL, "--results", "no/x"], "cannot write no/x.segm.json: there is no directory no"),
        ([*FULL, "--model-arg", "depth=3"], "there are no arguments for it"),
        ([*FULL, "--mean", "0,0,0"], "there are no arguments for it"),
        ([*FULL, "--pretrained"], "weights of bundled_sam are not downloaded; give --checkpoint"),
        ([*FULL, "--data", "no"], "there is no no"),
        ([*FULL, "--data", "."], "instances_val2017.json, with COCO's annotations of "),
        ([*FULL, "--model", "bundled_san"], "unknown model 'bundled_san'; close to it are bundled_sam"),
        (["run", "segmentation", "--quantized", "x", "--data", "bundled"], "cannot read x: No such file"),
        (["quantize", *RUN[1:], "base_ptq", "--out", "no/x"], "cannot write no/x: there is no directory no"),
        (["run", "classification", *FULL[2:], "--prompts", "boxes"], "classification has no --prompts"),
        (["run", "detection", *FULL[2:], "--encoder-only"], "detection has no --encoder-only"),
        (["quantize", "classification", *FULL[2:], "--prompts", "boxes", "--out", "x"], "has no --prompts"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    assert_refused: Callable[[Sequence[str], str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    box = {"image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5], "score": 0.5}
    Path("broken.json").write_text("[")
    Path("other.json").write_text(json.dumps([{**box, "image_id": 99}]))
    Path("outside.json").write_text(json.dumps([{**box, "bbox": [97, 0, 5, 5]}]))
    Path("last.json").write_text(json.dumps([{**box, "image_id": 2}]))
    monkeypatch.setattr("benchmarks.tasks.segmentation.task.load_sam", _load_random)
    assert_refused(arguments, message)
    assert len(list(tmp_path.iterdir())) == 4


def _load_random(name: str, checkpoint: str | None) -> nn.Module:
    """Stands for `load_sam`, whose own mistakes have their own tests, where the shipped weights are not needed."""
    from benchmarks.tasks.segmentation.models import load_sam

    return create_bundled_sam() if name == "bundled_sam" else load_sam(name, checkpoint)
