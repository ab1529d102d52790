"""Segmentation: metrics mean what they are called, SAM is asked as its authors do it, bad data is one clear line."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("segment_anything")
pytest.importorskip("pycocotools")

from adfq import AdfqError
from benchmarks.bundled.coco import encode_mask, write_coco
from benchmarks.bundled.sams import create_bundled_sam
from benchmarks.cell import Cell
from benchmarks.tasks import coco
from benchmarks.tasks.segmentation import describe_segmentation
from benchmarks.tasks.segmentation.task import Segmentation, load_segmentation

CPU = torch.device("cpu")
SCENES = {"train2017": 4, "val2017": 3}
Answer = Callable[[int, int], tuple[Any, Any]]
CROWD: Any = {"size": [100, 200], "counts": [0, 20000]}


@pytest.fixture(autouse=True)
def _few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "COUNTS", SCENES)


@pytest.fixture(scope="module")
def weights(randomize: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(randomize(create_bundled_sam()).state_dict(), file)
    return str(file)


@pytest.fixture
def load(weights: str) -> Callable[..., Segmentation]:
    def load(data: Path | str = "bundled", results: str | None = None, **fields: Any) -> Segmentation:
        names = ("prompts", "encoder_only")
        arguments = tuple((name, fields.pop(name)) for name in names if name in fields)
        given = {"model": "bundled_sam", "data": str(data), "checkpoint": weights, **fields}
        cell = Cell.create(task="segmentation", method="full_precision", task_arguments=arguments, **given)
        return load_segmentation(cell, results)

    return load


def rectangle(height: int, width: int, left: int, top: int, right: int, bottom: int) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def polygon(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def annotate(image: int, category: int, segmentation: Any, box: Sequence[float], **more: Any) -> dict[str, Any]:
    fields = {"image_id": image, "category_id": category, "segmentation": segmentation, "bbox": list(box)}
    return {**fields, "area": box[2] * box[3], "iscrowd": 0, **more}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images: 200×100 with a small object, one of medium size and a crowd; 50×50 with none; 128×128 with a large
    object.
    """
    root = tmp_path / "coco"
    sizes = {10: (200, 100), 11: (50, 50), 12: (128, 128)}
    small, medium = rectangle(100, 200, 5, 5, 15, 15), rectangle(100, 200, 50, 50, 90, 90)
    annotations = [
        annotate(12, 3, polygon(5, 5, 105, 105), (5, 5, 100, 100)),
        annotate(10, 1, encode_mask(small), (5, 5, 10, 10)),
        annotate(10, 1, CROWD, (0, 0, 200, 100), iscrowd=1),
        annotate(10, 2, {"size": [100, 200], "counts": lengths(medium)}, (50, 50, 40, 40)),
    ]
    content = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
            for number, (width, height) in sizes.items()
        ],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, 100)],
        "categories": [{"id": number, "name": f"category {number}"} for number in (1, 2, 3)],
    }
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for number, (width, height) in sizes.items():
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / f"{number}.png")
    return root


def lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Run lengths, column by column; the first are outside."""
    flat = np.concatenate([[False], mask.T.ravel(), [not mask[-1, -1]]])
    return np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist()


def edit(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


class FakePredictor:
    """Stands for segment_anything's SamPredictor, with answers that tests choose.

    Attributes:
        answer: gives masks K×H×W and scores K for an image and a prompt, by their numbers in the order of asking.
        asked: what it was asked, by image: batches of (points, labels, boxes, whether for several masks).
    """

    answer: Answer
    asked: list[list[tuple[Any, ...]]]

    def __init__(self, sam: Any) -> None:
        from segment_anything.utils.transforms import ResizeLongestSide

        self.model, self.transform, self.features = sam, ResizeLongestSide(sam.image_encoder.img_size), torch.zeros(1)

    def set_torch_image(self, image: Tensor, size: tuple[int, int]) -> None:
        assert max(image.shape[2:]) == 96
        self.asked.append([])
        self.done = 0

    def predict_torch(self, points: Any, labels: Any, boxes: Any = None, multimask_output: bool = True) -> Any:
        self.asked[-1].append((points, labels, boxes, multimask_output))
        count = len(boxes if points is None else points)
        answers = [type(self).answer(len(self.asked) - 1, self.done + index) for index in range(count)]
        self.done += count
        masks, scores = (torch.from_numpy(np.array(values)) for values in zip(*answers, strict=True))
        return masks, scores, torch.zeros(1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], type[FakePredictor]]:
    def fake(answer: Answer) -> type[FakePredictor]:
        class Predictor(FakePredictor):
            asked: list[list[tuple[Any, ...]]] = []  # noqa: RUF012  # of this test alone

        Predictor.answer = staticmethod(answer)  # type: ignore[method-assign]
        monkeypatch.setattr("segment_anything.SamPredictor", Predictor)
        return Predictor

    return fake


def evaluate(subject: Segmentation, limit: int | None = None) -> dict[str, float]:
    return subject.evaluate(subject.model, CPU, limit, 1)


# IoU ½, 1 and 8000 / 12000.
FOUND = [
    [rectangle(100, 200, 5, 5, 10, 15), rectangle(100, 200, 50, 50, 90, 90)],
    [rectangle(128, 128, 25, 5, 125, 105)],
]
METRICS = {
    "mean_iou": 100 * (0.5 + 1 + 2 / 3) / 3,
    "mean_iou_small": 50,
    "mean_iou_medium": 100,
    "mean_iou_large": 100 * 2 / 3,
    "mask_ap": 100 * (1 + 10 + 4) / 30,  # thresholds from ½ on, by steps of 0.05, that each object reaches
    "mask_ap50": 100,
    "mask_ap75": 100 / 3,
    "mask_ap_small": 10,
    "mask_ap_medium": 100,
    "mask_ap_large": 40,
    "instances": 3,
    "images": 3,
}


def test_metrics_are_those_computed_by_hand(
    load: Callable[..., Segmentation], root: Path, fake: Callable[[Answer], type[FakePredictor]]
) -> None:
    predictor = fake(lambda image, prompt: (FOUND[image][prompt][None], [0.5]))
    assert evaluate(load(root)) == pytest.approx(METRICS)
    (first,), (second,) = predictor.asked  # nothing is asked of the image without objects, nor for the crowd
    points, labels, boxes, several = first
    assert (points, labels, several) == (None, None, False)
    # In the model's frame of 96 pixels.
    assert boxes.tolist() == [pytest.approx([2.4, 2.4, 7.2, 7.2]), pytest.approx([24, 24, 43.2, 43.2])]
    assert second[2].tolist() == [pytest.approx([3.75, 3.75, 78.75, 78.75])]


def test_of_a_points_three_masks_the_one_of_the_best_prediction_counts(
    load: Callable[..., Segmentation], root: Path, fake: Callable[[Answer], type[FakePredictor]]
) -> None:
    def answer(image: int, prompt: int) -> tuple[Any, Any]:
        mask = FOUND[image][prompt]
        masks, scores = [~mask, ~mask, ~mask], [0.1, 0.1, 0.1]
        masks[image + prompt], scores[image + prompt] = mask, 0.2
        return masks, scores

    predictor = fake(answer)
    assert evaluate(load(root, prompts="points")) == pytest.approx(METRICS)
    points, labels, boxes, several = predictor.asked[0][0]
    assert (boxes, several, labels.tolist()) == (None, True, [[1], [1]])
    assert points.tolist() == [[pytest.approx([9 * 0.48] * 2)], [pytest.approx([69 * 0.48] * 2)]]
    assert predictor.asked[1][0][0].tolist() == [[pytest.approx([54 * 0.75] * 2)]]


def test_how_sure_a_mask_is_decides_average_precision(
    load: Callable[..., Segmentation], root: Path, fake: Callable[[Answer], type[FakePredictor]]
) -> None:
    def same_category(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            annotation["category_id"] = 1

    edit(root, same_category)
    edit(root, lambda content: content["annotations"].pop(2))  # in a crowd, mistakes would not count
    nothing = np.zeros((100, 200), bool)
    for scores, expected in (([0.1, 0.9], 50), ([0.9, 0.1], 25)):
        fake(lambda image, prompt, scores=scores: ([[nothing, FOUND[0][1]][prompt]], [scores[prompt]]))
        assert evaluate(load(root), 1)["mask_ap"] == pytest.approx(expected, abs=1)


def test_to_a_detectors_boxes_the_best_mask_of_the_image_counts(
    load: Callable[..., Segmentation],
    root: Path,
    tmp_path: Path,
    fake: Callable[[Answer], type[FakePredictor]],
) -> None:
    file = tmp_path / "boxes.json"
    boxes = [(2, [49, 49, 42, 42], 0.9), (1, [0, 0, 20, 20], 0.25), (2, [150, 50, 80, 20], 0.5)]
    found = [{"image_id": 10, "category_id": kind, "bbox": box, "score": score} for kind, box, score in boxes]
    file.write_text(json.dumps(found))
    masks = [FOUND[0][1], FOUND[0][0], rectangle(100, 200, 5, 5, 8, 15)]
    predictor = fake(lambda image, prompt: (masks[prompt][None], [0.1]))
    subject = load(root, str(tmp_path / "found"), prompts=str(file))
    metrics = evaluate(subject)
    assert metrics["mean_iou"] == pytest.approx(50)  # ½, 1, and 0 where nothing is asked
    assert metrics["mean_iou_large"] == 0
    assert metrics["mask_ap"] == pytest.approx(100 * 11 / 30)
    assert (metrics["instances"], metrics["images"]) == (3, 3)
    assert predictor.asked[0][0][2][2].tolist() == pytest.approx([72, 24, 96, 33.6])  # what lies beyond is cut off
    assert len(predictor.asked) == 1
    written = json.loads((tmp_path / "found.segm.json").read_text())
    assert [item["score"] for item in written] == [0.9, 0.25, 0.5]


def test_prompts_are_asked_sixteen_at_a_time(
    load: Callable[..., Segmentation], root: Path, fake: Callable[[Answer], type[FakePredictor]]
) -> None:
    one = annotate(11, 1, polygon(5, 5, 25, 25), (5, 5, 20, 20))
    edit(root, lambda content: content["annotations"].extend({**one, "id": number} for number in range(200, 220)))
    edit(root, lambda content: content["annotations"].__delitem__(slice(0, 4)))
    mask = rectangle(50, 50, 5, 5, 25, 25)
    predictor = fake(lambda image, prompt: (mask[None] & (prompt != 17), [0.5]))
    assert evaluate(load(root))["mean_iou"] == pytest.approx(95)
    assert [len(boxes) for _, _, boxes, _ in predictor.asked[0]] == [16, 4]


def test_a_limit_counts_the_first_images_alone(
    load: Callable[..., Segmentation], root: Path, fake: Callable[[Answer], type[FakePredictor]]
) -> None:
    fake(lambda image, prompt: (FOUND[image][prompt][None], [0.5]))
    metrics = evaluate(load(root, limit=2), 2)
    assert (metrics["instances"], metrics["images"]) == (2, 2)
    assert metrics["mean_iou"] == pytest.approx(75)
    assert "mean_iou_large" not in metrics
    assert "mask_ap_large" not in metrics


def test_no_form_of_masks_and_no_crowd_makes_a_difference(load: Callable[..., Segmentation], root: Path) -> None:
    expected = evaluate(load(root, prompts="points"))
    squares = [(5, 5, 105, 105), (5, 5, 15, 15), None, (50, 50, 90, 90)]

    def change(content: dict[str, Any]) -> None:
        for annotation, corners in zip(content["annotations"], squares, strict=True):
            if corners:
                annotation["segmentation"] = polygon(*corners)
        crowd = content["annotations"][2]
        content["annotations"] += [{**crowd, "id": 200}, {**crowd, "id": 201, "image_id": 11, "segmentation": empty}]

    empty = {"size": [50, 50], "counts": [2500]}
    edit(root, change)
    found = evaluate(load(root, prompts="points"))
    assert {name: value for name, value in found.items() if "ap" not in name} == {
        name: value for name, value in expected.items() if "ap" not in name
    }


def test_sam_is_asked_as_its_authors_do(load: Callable[..., Segmentation], root: Path) -> None:
    from segment_anything import SamPredictor

    subject = load(root)
    asked: dict[str, list[dict[str, Any]]] = {
        "boxes": [{"box": np.array(box)} for box in ([5, 5, 15, 15], [50, 50, 90, 90], [5, 5, 105, 105])],
        "points": [
            {"point_coords": np.array([point]), "point_labels": np.array([1])} for point in ([9, 9], [69, 69], [54, 54])
        ],
    }
    for kind, several in (("boxes", False), ("points", True)):
        found = load(root, prompts=kind).find(subject.model, CPU, 5)
        assert [image.image.shape for image in found] == [(100, 200, 3), (128, 128, 3)]
        masks = [mask for image in found for mask in image.masks]
        scores = [score for image in found for score in image.scores]
        predictor = SamPredictor(subject.sam)
        for index, prompt in enumerate(asked[kind]):
            predictor.set_image(np.asarray(Image.open(root / "val2017" / ("12.png" if index == 2 else "10.png"))))
            expected, predicted, _ = predictor.predict(**prompt, multimask_output=several)
            best = predicted.argmax()
            assert scores[index] == pytest.approx(float(predicted[best]), rel=1e-3)
            assert (masks[index] == expected[best]).mean() > 0.999
            assert 0.001 < masks[index].mean() < 0.999


def test_what_figures_show(load: Callable[..., Segmentation], root: Path, tmp_path: Path) -> None:
    (only,) = load(root, prompts="points").find(load(root).model, CPU, 1)
    assert np.array_equal(only.image, np.asarray(Image.open(root / "val2017" / "10.png")))
    assert only.boxes is None
    assert only.points is not None
    assert only.points.tolist() == [[9, 9], [69, 69]]
    assert only.truth is not None
    assert only.truth.shape == only.masks.shape == (2, 100, 200)
    assert only.truth.dtype == only.masks.dtype == bool
    assert np.array_equal(only.truth[0], rectangle(100, 200, 5, 5, 15, 15))
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps([{"image_id": 12, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.75}]))
    (only,) = load(root, prompts=str(file)).find(load(root).model, CPU, 3)
    assert only.boxes is not None
    assert (only.boxes.tolist(), only.points, only.truth, list(only.scores)) == ([[1, 2, 4, 6]], None, None, [0.75])
    assert only.masks.shape == (1, 128, 128)


def test_an_evaluation_leaves_a_file_that_cocos_tools_read(
    load: Callable[..., Segmentation], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pycocotools.coco import COCO

    metrics = evaluate(load(root, str(tmp_path / "found")))
    assert capsys.readouterr() == ("", "")
    assert 0 <= metrics["mask_ap"] <= 100
    truth = COCO(str(root / "annotations" / "instances_val2017.json"))
    found = truth.loadRes(str(tmp_path / "found.segm.json"))
    assert [(item["image_id"], item["category_id"]) for item in found.anns.values()] == [(10, 1), (10, 2), (12, 3)]
    assert found.annToMask(found.anns[1]).shape == (100, 200)


def test_the_encoder_alone(load: Callable[..., Segmentation], root: Path) -> None:
    whole, alone = load(root), load(root, encoder_only=True)
    assert alone.model is alone.sam.get_submodule("image_encoder")
    assert whole.model is whole.sam
    assert evaluate(whole) == evaluate(alone)
    images = whole.evaluation_images(1)
    assert torch.equal(whole.infer(whole.model, images), alone.infer(alone.model, images))
    assert whole.infer(whole.model, images).shape == (1, 64, 12, 12)
    changed, given = copy.deepcopy(whole.model), alone.model
    with torch.no_grad():
        changed.image_encoder.blocks[0].mlp.lin2.bias += 3  # type: ignore[union-attr,index,operator]
    expected = evaluate(whole)["mean_iou"]
    found = whole.evaluate(changed, CPU, None, 1)
    assert found == alone.evaluate(changed.get_submodule("image_encoder"), CPU, None, 1)
    assert found["mean_iou"] != expected
    assert alone.sam.image_encoder is given
    assert evaluate(alone)["mean_iou"] == expected


def test_images_are_scaled_normalized_and_padded(load: Callable[..., Segmentation], root: Path) -> None:
    subject = load(root)
    images = subject.evaluation_images(10)
    assert images.shape == (3, 3, 96, 96)
    scaled = np.array(Image.open(root / "val2017" / "10.png").resize((96, 48), Image.Resampling.BILINEAR))
    assert torch.equal(images[0, :, :48], torch.from_numpy(scaled).permute(2, 0, 1).sub(127.5).div(127.5))
    assert images[0, :, 48:].abs().max() == 0
    assert subject.preprocessing == {"size": 96, "mean": [127.5] * 3, "std": [127.5] * 3}
    assert subject.weights_digest == load(root).weights_digest


def test_calibration_images_come_from_the_train_split_and_follow_the_seed(load: Callable[..., Segmentation]) -> None:
    subject = load()
    first, again, other = (next(subject.calibration_batches(3, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.is_inference()  # gradients are taken of them
    chosen = torch.randperm(4, generator=torch.Generator().manual_seed(0))[:3].tolist()
    pictures = [Image.open(subject.train.folder / f"{index:06d}.png") for index in chosen]
    pixels = np.stack([np.asarray(picture, np.float32) for picture in pictures])
    assert torch.equal(first, torch.from_numpy(pixels).permute(0, 3, 1, 2).sub(127.5).div(127.5))
    with pytest.raises(AdfqError, match="5 calibration images were asked for, the train split has 4"):
        subject.calibration_batches(5, 0)
    pair, rest = subject.calibration_batches(3, 0, 2)
    assert torch.equal(torch.cat([pair, rest]), first)


@pytest.mark.parametrize(
    "module",
    [
        "image_encoder.blocks.1.mlp.lin2",
        "mask_decoder.transformer.layers.0.mlp.lin1",
        "mask_decoder.iou_prediction_head.layers.0",
    ],
)
@pytest.mark.parametrize("prompts", ["boxes", "points"])
def test_non_finite_outputs_name_the_module(
    module: str, prompts: str, load: Callable[..., Segmentation], root: Path
) -> None:
    subject = load(root, prompts=prompts)
    changed: Any = copy.deepcopy(subject.model)
    with torch.no_grad():
        changed.get_submodule(module).bias.fill_(float("nan"))
    with pytest.raises(AdfqError, match=f"^{module.replace('.', '[.]')}: the output is not finite"):
        subject.evaluate(changed, CPU, 1, 1)


def test_metrics_in_words() -> None:
    words = "mean IoU 72.22 % (small 50.00, medium 100.00, large 66.67), mask AP 50.00, 3 instances in 3 images"
    assert describe_segmentation(METRICS) == words
    fewer = {name: value for name, value in METRICS.items() if "small" not in name}
    assert "% (medium 100.00, large 66.67), mask" in describe_segmentation(fewer)


def _change(number: int, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["annotations"][number].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change(1, segmentation=[[1, 2, 3]]), "{file}: annotation 101: its mask: a polygon has to be numbers"),
        (
            _change(1, segmentation={"size": [100, 100], "counts": [10000]}),
            "annotation 101: its mask is 100×100 pixels",
        ),
        (_change(2, segmentation={"size": [100, 200], "counts": "0"}), "annotation 102: its mask: its run lengths do"),
        (_change(0, area="large"), "{file}: annotation 100 has no number as its area"),
        (_change(3, bbox=[5, 5, -1, 5]), r"{file}: annotation 103: the box \[5, 5, -1, 5\] in image 10 has a negative"),
        (lambda content: content["images"][0].update(width="200"), "{file}: image 10 has no height and width"),
        (
            lambda content: [annotation.pop("segmentation") for annotation in content["annotations"]],
            r"{file}: there is nothing to be found in its first 3 images \(4 of 4 annotations are left out: 4 without",
        ),
        (
            lambda content: content["annotations"].__delitem__(slice(0, 4)),
            "{file}: there is nothing to be found in its",
        ),
        (lambda content: content["images"].clear(), "{file} has no images"),
        (lambda content: content["images"][2].update(file_name="lost.png"), "{file} names lost.png, which"),
    ],
)
def test_annotations_are_checked_before_the_work(
    change: Callable[[dict[str, Any]], Any], message: str, load: Callable[..., Segmentation], root: Path
) -> None:
    edit(root, change)
    with pytest.raises(AdfqError, match=message.format(file=root / "annotations" / "instances_val2017.json")) as caught:
        load(root)
    assert "\n" not in str(caught.value)


def test_only_what_is_used_is_checked(load: Callable[..., Segmentation], root: Path) -> None:
    edit(root, lambda content: content["annotations"][0].update(segmentation=[[1]]))  # of the last image
    edit(root, lambda content: content["categories"].reverse())
    (root / "val2017" / "12.png").write_bytes(b"")
    assert load(root, limit=2).validation.images
    with pytest.raises(AdfqError, match="annotation 100: its mask: a polygon has"):
        load(root, limit=3)
    edit(root, lambda content: content["annotations"].__delitem__(0))
    with pytest.raises(AdfqError, match=r"^cannot read .*12\.png: "):
        load(root, limit=3)


@pytest.mark.parametrize("damage", ["cut", "text", "other size"])
def test_a_broken_image_is_named(damage: str, load: Callable[..., Segmentation], root: Path) -> None:
    subject = load(root)
    for split in ("train2017", "val2017"):
        file = root / split / "12.png"
        content = file.read_bytes()
        if damage == "other size":
            Image.open(file).crop((0, 0, 128, 64)).save(file)
        else:
            file.write_bytes(b"no image" if damage == "text" else content[: len(content) // 2])
    stated = "{0} has 128×64 pixels, and 128×128 in {1}" if damage == "other size" else "^cannot read {0}: "
    for split, work in (
        ("val2017", lambda: evaluate(subject)),
        ("val2017", lambda: subject.evaluation_images(3)),
        ("train2017", lambda: next(subject.calibration_batches(3, 0))),
        *([] if damage == "cut" else [("val2017", lambda: load(root))]),  # headers are read before the work
    ):
        message = stated.format(root / split / "12.png", root / "annotations" / f"instances_{split}.json")
        with pytest.raises(AdfqError, match=message) as caught:
            work()
        assert "\n" not in str(caught.value)


def test_prompts_of_other_images(load: Callable[..., Segmentation], root: Path, tmp_path: Path) -> None:
    file = tmp_path / "boxes.json"
    box = {"image_id": 12, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.75}
    file.write_text(json.dumps([box]))
    assert load(root, prompts=str(file)).detected
    with pytest.raises(AdfqError, match=f"^{file} has no box in the first 2 images of {root}.*val2017.json$"):
        load(root, prompts=str(file), limit=2)
    file.write_text(json.dumps([{**box, "image_id": 4}]))
    with pytest.raises(AdfqError, match=f"^{file} has a box in image 4, which the data do not have$"):
        load(root, prompts=str(file))
    with pytest.raises(AdfqError, match=r"^there are no prompts point; give boxes, points or"):
        load(root, prompts="point")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_arguments": (("depth", 3),)}, "there are no arguments for it"),
        ({"preprocessing": (("crop_pct", 1.0),)}, "there are no arguments for it"),
        ({"pretrained": True}, "not downloaded; give --checkpoint"),
        ({"checkpoint": ""}, "^--checkpoint is empty$"),
        ({"results": ""}, "^--results is empty$"),
        ({"results": "no/where"}, r"cannot write no/where\.segm\.json: there is no directory no"),
        ({"results": "taken"}, r"cannot write taken\.segm\.json: it is a directory"),
        ({"data": "no"}, "there is no no"),
        ({"data": "."}, "there is no .*instances_val2017.json, with COCO's annotations of "),
        ({"model": "mobile_sam2"}, "unknown model 'mobile_sam2'; close to it are mobile_sam"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(
    fields: dict[str, Any],
    message: str,
    load: Callable[..., Segmentation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.segm.json").mkdir()
    with pytest.raises(AdfqError, match=message):
        load(**fields)


def test_unknown_arguments_are_refused(weights: str) -> None:
    fields = {"task": "segmentation", "model": "bundled_sam", "data": "bundled", "method": "full_precision"}
    with pytest.raises(AdfqError, match="segmentation has no argument 'wings'; it has prompts, encoder_only"):
        load_segmentation(Cell.create(**fields, task_arguments=(("wings", 2),)))


def test_results_that_cannot_be_written_after_all(
    load: Callable[..., Segmentation], root: Path, tmp_path: Path
) -> None:
    subject = load(root, str(tmp_path / "found"))
    (tmp_path / "found.segm.json").mkdir()
    with pytest.raises(AdfqError, match=r"^cannot write .*found\.segm\.json: Is a directory"):
        evaluate(subject)


def test_other_tasks_need_no_library_of_this_one() -> None:
    code = (
        "import sys\nfor name in ('segment_anything', 'pycocotools', 'mmdet'): sys.modules[name] = None\n"
        "import adfq\nfrom benchmarks.cell import Cell\nfrom benchmarks.tasks import find_task, load_subject\n"
        "assert 'mobile_sam' in find_task('segmentation').model_names()\n"
        "cell = Cell.create(task='segmentation', model='mobile_sam', data='bundled', method='full_precision')\n"
        "for name in ('pycocotools', 'segment_anything'):\n"
        "    try:\n        load_subject(cell)\n    except adfq.AdfqError as error:\n        print(error)\n"
        "    del sys.modules[name]\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = result.stdout.splitlines()
    assert "pip install pycocotools" in first
    assert "'adfq[segmentation]'" in second
    assert result.stderr == ""


def test_cocos_own_images(real_data: Path) -> None:
    """JPEGs, polygons, and a published model, which is good at it."""
    fields = {"task": "segmentation", "model": "mobile_sam", "checkpoint": str(real_data / "sam" / "mobile_sam.pt")}
    cell = Cell.create(data=str(real_data / "coco"), method="full_precision", limit=2, **fields)
    subject = load_segmentation(cell)
    metrics = evaluate(subject, 2)
    assert metrics["images"] == 2
    assert metrics["mean_iou"] > 60
    assert next(subject.calibration_batches(1, 0)).shape == (1, 3, 1024, 1024)


def test_other_annotations_or_prompts_have_other_digests(load: Callable[..., Segmentation], tmp_path: Path) -> None:
    write_coco(tmp_path, SCENES)
    first = load(tmp_path).data_digests
    assert first == load(tmp_path).data_digests
    assert first["images"] == SCENES["val2017"]
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text() + " ")
    second = load(tmp_path).data_digests
    assert second["validation"] != first["validation"]
    assert second["train"] == first["train"]
    truth = json.loads(file.read_text())
    item = {**{key: truth["annotations"][0][key] for key in ("image_id", "category_id", "bbox")}, "score": 0.5}
    prompts = tmp_path / "prompts.json"
    digests = []
    for score in (0.5, 0.25):
        prompts.write_text(json.dumps([{**item, "score": score}]))
        digests.append(load(tmp_path, prompts=str(prompts)).data_digests["prompts"])
    assert digests[0] != digests[1]
