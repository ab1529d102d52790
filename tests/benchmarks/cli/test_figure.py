"""Figures of masks from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from benchmarks.bundled import sams
from benchmarks.cli.main import main
from benchmarks.report.figures import pictures
from benchmarks.report.figures.pictures import Detections
from benchmarks.tasks import coco

pytest.importorskip("segment_anything")
FIGURE = ["figure", "masks", "--methods", "base_ptq", "--images", "2", "--calibration-size", "1"]


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with random weights; there are few images."""
    monkeypatch.setattr(coco, "COUNTS", {"train2017": 1, "val2017": 3})
    save_file(sams.create_bundled_sam().state_dict(), tmp_path / "bundled_sam.safetensors")
    return str(tmp_path)


@pytest.mark.parametrize("prompts", [None, "boxes", "points", "FILE"])
def test_a_figure_of_masks(
    prompts: str | None, checkpoints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, Sequence[Detections]] = {}
    draw = pictures.draw_detections

    def spy(images: Sequence[object], columns: dict[str, Sequence[Detections]], *rest: object) -> None:
        shown.update(columns)
        draw(images, columns, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures, "draw_detections", spy)
    if prompts == "FILE":
        prompts = str(tmp_path / "found.bbox.json")
        boxes = [{"image_id": image, "category_id": 1, "bbox": [9, 9, 20, 20], "score": 0.9} for image in (1, 2)]
        Path(prompts).write_text(json.dumps(boxes))
    file = tmp_path / "masks.png"
    chosen = [] if prompts is None else ["--prompts", prompts]
    assert main([*FIGURE, *chosen, "--checkpoints", checkpoints, "--out", str(file)]) == 0
    with Image.open(file) as image:
        assert image.width > image.height * 0.9  # two or three columns, two rows
    by_file = prompts is not None and prompts.endswith(".json")
    assert list(shown) == [*([] if by_file else ["Ground truth"]), "Full precision", "Base PTQ, W4/A4"]
    assert {column[0].points for column in shown.values()} == {prompts == "points"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*FIGURE, "--prompts", "none.json"], "there are no prompts none.json; give boxes, points or a file"),
        ([*FIGURE, "--models", "sam"], "unknown model 'sam'; there are bundled_sam"),
        (["figure", "detections", "--prompts", "boxes"], "unrecognized arguments: --prompts boxes"),
        (["figure", "curves"], "argument kind: invalid choice: 'curves'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, checkpoints: str, assert_refused: Callable[[Sequence[str], str], None]
) -> None:
    file = str(Path(checkpoints) / "masks.png")
    assert_refused([*arguments, "--checkpoints", checkpoints, "--out", file], message)
