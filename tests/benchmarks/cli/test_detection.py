"""Detection from the command line: what is printed, what is recorded, one line for each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks.bundled.detectors import DETECTORS
from benchmarks.cell import Cell
from benchmarks.cli.main import main
from benchmarks.run import runner
from benchmarks.tasks import load_subject
from benchmarks.tasks.detection.models import build_detector, open_config

pytest.importorskip("mmengine")
CONFIG = str(DETECTORS["bundled_mask_rcnn"].config)
RUN = ["run", "detection", "--data", "bundled", "--method", "full_precision"]


pytestmark = pytest.mark.usefixtures("few_scenes")


@pytest.fixture(scope="module")
def weights(randomize: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(randomize(build_detector(open_config(CONFIG))).state_dict(), file)
    return str(file)


def test_a_detector_is_measured(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*RUN, "--config", CONFIG, "--checkpoint", weights, "--limit", "2"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    assert captured.out.startswith(f"{Path(CONFIG).name}, full_precision, W32/A32: box AP ")
    assert " on 2 images (calibration " in captured.out

    assert main([*command, "--results", str(tmp_path / "found"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["model"] == Path(CONFIG).name
    assert record["config"]["batch_size"] == 1
    assert record["metrics"]["images"] == 2
    assert record["metrics"]["feature_error_3"] == 0
    assert record["cost"]["forward_seconds"] > 0
    assert 0 < record["timing"]["loading"] < record["timing"]["evaluation"]
    libraries = {"mmdet", "mmengine", "mmcv"}
    assert all(record[kind][library] for kind in ("environment", "provenance") for library in libraries)
    assert (tmp_path / "found.segm.json").is_file()


def test_a_saved_detector_is_measured_and_exported(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    assert_refused: Callable[[Sequence[str], str], None],
) -> None:
    """The file has the config's pipeline and classes; feature errors would need full precision."""
    config = tmp_path / "shallow.py"
    config.write_text(f"_base_ = [{CONFIG!r}]\nmodel = dict(backbone=dict(depths=[1, 1, 1]))\n")
    experiment = ["detection", "--config", str(config), "--data", "bundled", "--method", "base_ptq"]
    experiment += ["--bits", "W8A8", "--calibration-size", "2"]
    file, few = str(tmp_path / "detector.safetensors"), ["--limit", "4", "--json"]
    assert main(["run", *experiment, *few]) == 0
    direct = json.loads(capsys.readouterr().out)
    assert main(["quantize", *experiment, "--out", file]) == 0
    capsys.readouterr()
    read = ["run", "detection", "--quantized", file, "--data", "bundled"]
    assert main([*read, *few, "--results", str(tmp_path / "found")]) == 0
    saved = json.loads(capsys.readouterr().out)
    errors = {name for name in direct["metrics"] if name.startswith("feature_error")}
    assert len(errors) == 3
    assert saved["metrics"] == {name: value for name, value in direct["metrics"].items() if name not in errors}
    assert (tmp_path / "found.bbox.json").is_file()
    assert main([*read, "--limit", "1"]) == 0
    assert "features" not in capsys.readouterr().out
    assert_refused([*read, "--mean", "0,0,0"], "come from its config alone")
    for other in ("classification", "encoders", "segmentation"):
        assert_refused(["run", other, *read[2:]], f"a MaskRCNN is a model for detection, not for {other}")

    pytest.importorskip("onnxruntime")
    exported = tmp_path / "backbone.onnx"
    assert main(["export", "--quantized", file, "--data", "bundled", "--out", str(exported), "--limit", "2"]) == 0
    text = capsys.readouterr().out
    assert "21 of 21 products with int8 kernels" in text
    assert "(relative error) on 2 images" in text
    assert exported.is_file()


def test_records_of_classification_do_not_depend_on_mmdetection() -> None:
    cell = Cell.create(task="classification", model="bundled_vit", data="bundled", method="full_precision", limit=1)
    record = runner.run_cell(cell, load_subject(cell), torch.device("cpu"))
    assert "mmdet" not in record["environment"]
    libraries = {"torch", "torchvision", "timm", "numpy", "pillow"}
    assert set(record["provenance"]) == {"code", "weights", "data", *libraries}


def test_each_task_has_its_batch_size_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    classification = ["run", "classification", "--model", "bundled_vit", "--data", "bundled", "--limit", "1"]
    assert main([*classification, "--method", "full_precision", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["batch_size"] == 100
    assert main(["list", "models"]) == 0
    names = {"bundled_mask_rcnn", "mask_rcnn_swin_tiny", "cascade_mask_rcnn_swin_small", "deit_tiny_patch16_224"}
    assert names <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (RUN, "required: --model"),
        ([*RUN, "--model", "a", "--config", "b"], "argument --config: not allowed with argument --model"),
        ([*RUN, "--model", "mask_rcnn_swin_tin"], "unknown model 'mask_rcnn_swin_tin'; close to it are mask_rcnn_swin"),
        ([*RUN, "--config", "no.py"], "there is no config no.py"),
        ([*RUN, "--config", "broken.py"], "cannot read config broken.py: "),
        ([*RUN, "--config", CONFIG, "--checkpoint", "no.pth"], "there is no checkpoint no.pth"),
        (
            [*RUN, "--config", CONFIG, "--checkpoint", "broken.py"],
            "broken.py: it is neither safetensors nor a PyTorch file",
        ),
        ([*RUN, "--config", CONFIG, "--mean", "0,0,0"], "come from its config alone"),
        ([*RUN, "--config", CONFIG, "--model-arg", "depth=3"], "come from its config alone"),
        ([*RUN, "--config", CONFIG, "--pretrained"], "give --checkpoint"),
        ([*RUN, "--config", CONFIG, "--results", "no/x"], "cannot write no/x.bbox.json: there is no directory no"),
        ([*RUN, "--config", CONFIG, "--data", "no"], "there is no no"),
        (["run", "detection", "--quantized", "no", "--data", "bundled"], "cannot read no: "),
        (["run", "classification", *RUN[2:], "--config", CONFIG], "classification has no --config"),
        (["run", "classification", *RUN[2:], "--model", "bundled_vit", "--results", "x"], "has no --results"),
        (["run", "captioning", *RUN[2:]], "argument task: invalid choice: 'captioning'"),
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
    Path("broken.py").write_text("model = dict(")
    assert_refused(arguments, message)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.py"]


def test_an_annotation_file_of_other_categories_is_named(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_val2017.json"
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    file.write_text(json.dumps(content))
    assert main([*RUN, "--config", CONFIG, "--checkpoint", weights, "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"adfq: error: categories of {file} do not match the model's classes: it lacks plain disk,")
    assert error.endswith("and 21 more, and it has person besides\n")


SMALL = ["--models", "bundled_mask_rcnn", "--methods", "base_ptq", "--bits", "W4A4", "--calibration-size", "2"]


def test_a_table_has_box_and_mask_ap_and_runs_no_cell_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["table", "2", *SMALL, "--limit", "2", "--jobs", "0", "--store", str(tmp_path)]
    assert main(command) == 0
    text = capsys.readouterr().out
    heading = [column.strip() for column in text.splitlines()[4].split("|")]
    assert heading[3:5] == ["Bundled Mask R-CNN, box AP", "Bundled Mask R-CNN, mask AP"]
    assert "Measured on 2 images of bundled, calibrated on 2, seed 0." in text
    records = {file: file.stat().st_mtime_ns for file in (tmp_path / "records").iterdir()}
    assert len(records) == 2
    assert main(command) == 0
    assert capsys.readouterr().out == text
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "records").iterdir()} == records


def test_tables_of_several_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "table",
        "1",
        "2",
        "--methods",
        "full_precision",
        "--limit",
        "1",
        "--jobs",
        "0",
        "--store",
        str(tmp_path),
    ]
    assert main(command) == 0
    assert capsys.readouterr().out.count("**Table ") == 2
    assert {file.name for file in tmp_path.glob("*.md")} == {"table1-bundled.md", "table2-bundled.md"}
    assert main([*command, "--data", "bundled"]) == 2
    assert "tables of different tasks need different data" in capsys.readouterr().err


def test_a_figure_of_detections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.png"
    assert main(["figure", "detections", *SMALL, "--images", "2", "--out", str(file)]) == 0
    with Image.open(file) as image:
        assert image.width > 1.3 * image.height  # three columns, two rows
    for wrong, message in ((tmp_path / "found.gif", ".png or .svg"), (tmp_path / "no" / "found.png", "no directory")):
        assert main(["figure", "detections", *SMALL, "--out", str(wrong)]) == 2
        assert message in capsys.readouterr().err
