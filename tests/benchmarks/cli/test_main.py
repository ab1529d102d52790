"""The command line from end to end on bundled data: output, exit codes, one line for each mistake."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.cli.main import main

RUN = ["run", "classification", "--model", "bundled_swin", "--data", "bundled", "--limit", "20"]
# Without ADFQ-ViT, which a table optimizes.
TABLE = [
    *("table", "1", "--models", "bundled_swin", "--methods", "base_ptq", "repq_vit", "--bits", "W4A4"),
    *("--seeds", "0", "--limit", "20", "--calibration-size", "4", "--jobs", "0"),
]


def test_json_is_all_there_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--method", "base_ptq", "--bits", "W4A4", "--calibration-size", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) >= {"config", "metrics", "timing", "environment"}
    assert 0 < result["timing"]["loading"] < result["timing"]["evaluation"]
    assert result["config"]["bits"] == "W4/A4"
    assert result["config"]["calibration_size"] == 4
    assert result["metrics"]["images"] == 20
    assert 0 <= result["metrics"]["top1"] <= result["metrics"]["top5"] <= 100


def test_run_prints_one_readable_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--method", "full_precision"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("bundled_swin, full_precision, W32/A32: top-1 ")
    assert out.count("\n") == 1
    assert re.search(r"evaluation \S+ s: \S+ images/s through the model, \d+ % of the time waiting for images\)$", out)


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "methods"]) == 0
    assert capsys.readouterr().out.split() == [
        "full_precision",
        "adalog",
        "adfq_vit",
        "aphq_vit",
        "base_ptq",
        "erq",
        "fima_q",
        "glf_q",
        "gptq",
        "iasvit",
        "ptq4vit",
        "qdrop",
        "repq_vit",
        "row_ridge",
    ]
    assert main(["list", "tables"]) == 0
    assert capsys.readouterr().out.split() == ["1", "2", "3", "4", "5", "encoders", "field"]
    assert main(["list", "models"]) == 0
    assert {"bundled_vit", "bundled_swin", "deit_tiny_patch16_224"} <= set(capsys.readouterr().out.split())


def test_a_table_in_every_format_from_one_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*TABLE, "--store", str(tmp_path / "runs"), "--out", str(tmp_path / "new" / "tables")]
    assert main(command) == 0
    markdown = capsys.readouterr().out
    assert (tmp_path / "new" / "tables" / "table1-bundled.md").read_text() == markdown
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "records").iterdir()}
    assert len(times) == 3

    assert main([*command, "--format", "csv"]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(frame["method"]) == ["full_precision", "base_ptq", "repq_vit"]
    assert set(frame["images"]) == {20}
    for top1 in frame["top1"]:
        assert f"{top1:.2f}" in markdown

    assert main([*command, "--format", "latex"]) == 0
    assert r"\toprule" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_methods_are_chosen_beside_full_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TABLE, "--methods", "repq_vit", "--format", "csv", "--store", str(tmp_path)]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(frame["method"]) == ["full_precision", "repq_vit"]
    assert (tmp_path / "table1-bundled.csv").is_file()  # tables go to the store's folder by default


def test_a_dry_run_says_what_a_table_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        *TABLE,
        "--calibration-size",
        "1",
        "--limit",
        "1",
        "--methods",
        "base_ptq",
        "--store",
        str(tmp_path / "no"),
    ]
    assert main([*command, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["cells"], row["measured"]) for row in found["rows"]] == [
        *(("Full precision", 1, 0), ("Base PTQ", 1, 0))
    ]
    assert (found["cells"], found["calibration_images"], found["evaluation_images"]) == (2, 1, 2)
    assert list(tmp_path.iterdir()) == []

    assert main([*command, "--calibration-size", "24001", "--dry-run"]) == 2
    text = capsys.readouterr().out
    assert "2 cells, of which 0 are measured and 2 would run" in text
    assert "- Bundled Swin, Base PTQ: 24001 calibration images were asked for, the train split has 24000" in text


DESCRIBE = ["describe", "classification", "--model", "bundled_vit", "--data", "bundled"]


@pytest.mark.parametrize(
    ("method", "images", "probs"),
    [
        ("base_ptq", "uniform, 8 bits, per tensor", "uniform, 4 bits, per tensor"),
        ("adfq_vit", "uniform, 8 bits, per tensor", "logarithmic, 4 bits, base 1.414"),
        ("ptq4vit", "full precision", "twin uniform for softmax, 4 bits"),
    ],
)
def test_what_a_method_does_with_each_site(
    method: str, images: str, probs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*DESCRIBE, "--method", method, "--bits", "W3A4"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    rows = {cells[1]: cells[2:6] for cells in ([cell.strip() for cell in line.split("|")] for line in lines[2:-2])}
    assert len(rows) == 12 * 6 + 2
    assert rows["patch_embed.proj"] == ["patch_embed", "64×3×8×8", "uniform, 3 bits, per row", images]
    assert rows["blocks.11.attn.context"] == ["probs, value", "", "", f"{probs}; uniform, 4 bits, per tensor"]
    assert lines[-1] == "50 of 50 layers' weights quantized, 100.0 % of their values"
    assert captured.err == ""


def test_what_full_precision_leaves_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DESCRIBE, "--method", "full_precision"]) == 0
    assert capsys.readouterr().out.endswith("\n0 of 50 layers' weights quantized, 0.0 % of their values\n")
    assert main([*DESCRIBE, "--method", "full_precision", "--format", "csv"]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert set(frame["weight"]) == set(frame["input"]) == {"full precision"}


def test_a_description_is_of_the_options_given(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method-arg", "ppoq=False", "slq=False", "--format", "csv"]
    assert main([*DESCRIBE, "--method", "adfq_vit", *options]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert set(frame[frame["role"].isin(["qkv", "fc1", "fc2"])]["input"]) == {"uniform, 4 bits, per tensor"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: run|quantize|export|describe|table|"),
        (["run", "classification", "--data", "bundled"], "required: --model, --method"),
        ([*RUN, "--method", "magic"], "unknown method 'magic'; there are full_precision, adalog"),
        ([*RUN, "--method", "base_ptq", "--bits", "W1A4"], "bits must be a whole number from 2 to 8"),
        ([*RUN, "--method", "base_ptq", "--bits", "four"], "cannot read bits 'four'; write W4A4"),
        ([*RUN, "--method", "base_ptq", "--method-arg", "range"], "'range' is not KEY=VALUE"),
        ([*RUN, "--method", "base_ptq", "--method-arg", "range=huge"], "unknown range 'huge'; there are minmax"),
        ([*RUN, "--method", "base_ptq", "--calibration-size", "0"], "at least one calibration image"),
        ([*RUN, "--method", "base_ptq", "--calibration-size", "24001"], "the train split has 24000"),
        ([*RUN, "--method", "base_ptq", "--model-arg", "wings=2"], "unexpected keyword argument 'wings'"),
        ([*RUN, "--method", "base_ptq", "--limit", "0"], "not a positive whole number"),
        ([*RUN, "--method", "base_ptq", "--mean", "a,b"], "not a list of numbers"),
        ([*RUN, "--method", "base_ptq", "--mean", "0.5,0.5"], "one value, or one for each input channel"),
        ([*RUN, "--method", "base_ptq", "--device", "abacus"], "cannot use device"),
        ([*RUN, "--method", "base_ptq", "--device", "meta"], "cannot use device"),
        ([*RUN, "--method", "base_ptq", "--device", "cpu:7"], "the CPU is one device"),
        ([*RUN, "--method", "base_ptq", "--seed", "9" * 23], "seed must have at most 64 bits"),
        ([*RUN, "--method", "base_ptq", "--checkpoint", ""], "there is an empty text after --checkpoint"),
        ([*RUN, "--method", "base_ptq", "--quantized="], "there is an empty text after --quantized"),
        ([*RUN, "--method", "base_ptq", "--model-arg", f"x={'-' * 5000}1"], "unexpected keyword argument 'x'"),
        ([*RUN, "--method", "base_ptq", "--checkpoint", "missing.pth"], "there is no checkpoint missing.pth"),
        (DESCRIBE, "required: --method (see adfq describe --help)"),
        ([*DESCRIBE, "--method", "magic"], "unknown method 'magic'; there are full_precision, adalog"),
        ([*DESCRIBE, "--method", "base_ptq", "--bits", "W4A9"], "bits must be a whole number from 2 to 8"),
        ([*DESCRIBE, "--method", "base_ptq", "--method-arg", "iterations=0"], "base_ptq has no option 'iterations'"),
        ([*DESCRIBE, "--method", "base_ptq", "--format", "latex"], "argument --format: invalid choice: 'latex'"),
        ([*DESCRIBE, "--method", "base_ptq", "--prompts", "boxes"], "classification has no --prompts"),
        (["table", "9"], "unknown table '9'; there are 1"),
        (["table", "1", "--profile", "huge"], "there are bundled, full"),
        (["table", "1", "--profile", "full"], "needs --data"),
        (["table", "1", "--models", "vgg"], "unknown model 'vgg'; there are bundled_vit, bundled_swin"),
        (["table", "1", "--seeds", "one"], "'one' is neither a whole number nor 'recorded'"),
        (["table", "1", "--seeds", "0", "recorded"], "--seeds takes numbers, or recorded alone"),
        (["table", "1", "--profile", "full", "--data", "folder:nowhere"], "there are no data in nowhere"),
        (["table", "mine.toml"], "cannot read mine.toml: No such file"),
        (["table", "1", "--methods", "magic"], "unknown method 'magic'"),
        (["table", "1", "--dry-run", "--profile", "full"], "needs --data"),
        (["table", "1", "--dry-run", "--executor", "ray"], "tries methods on this machine"),
        (["table", "1", "--json"], "--json is for the forecast of --dry-run"),
        (["table", "1", "--bits", "W9A9"], "from 2 to 8"),
        (
            ["table", "1", "--models", "bundled_swin", "--limit", "1", "--calibration-size", "0", "--jobs", "0"],
            "at least one",
        ),
        (["table", "1", "--profile", "full", "--data", "folder:x", "--checkpoints", "no"], "there is no no/vit_small"),
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
    assert_refused(arguments, message)


def test_unknown_models_are_answered_with_close_ones(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "classification", "--model", "deit_tiny_patch16_22", "--data", "bundled", "--method", "base_ptq"]
    assert main(command) == 2
    assert "deit_tiny_patch16_224" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_image_is_one_line_that_names_it(
    split: str, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = pictures / split / "dog" / "picture.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    model = ["--model", "vit_tiny_patch16_224", "--model-arg", "img_size=32", "depth=1", "num_classes=2"]
    data = ["--data", f"folder:{pictures}", "--calibration-size", "2"]
    assert main(["run", "classification", *model, *data, "--method", "base_ptq"]) == 2
    warning, message, end = capsys.readouterr().err.split("\n")
    assert "random weights" in warning
    assert message.startswith(f"adfq: error: cannot read {broken}: ")
    assert end == ""


def test_an_interrupt_is_said_and_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.tasks.load_subject", interrupt)
    assert main([*RUN, "--method", "full_precision"]) == 130
    assert "interrupted" in capsys.readouterr().err
