"""Detection: COCO's metrics mean what they are called, images are MMDetection's, bad data is one clear line."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from adfq import AdfqError
from benchmarks.bundled.detectors import COUNTS, DETECTORS
from benchmarks.cell import Cell
from benchmarks.run.measuring import quantize_model
from benchmarks.tasks import coco
from benchmarks.tasks.detection import describe_detection
from benchmarks.tasks.detection.models import build_detector, mmdetection, open_config
from benchmarks.tasks.detection.task import Detection, load_detection

pytest.importorskip("mmengine")
CPU = torch.device("cpu")
CONFIG = str(DETECTORS["bundled_mask_rcnn"].config)
SCENES = {"train2017": 5, "val2017": 6}


@pytest.fixture(scope="module", autouse=True)
def _few_scenes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco, "COUNTS", SCENES)
        yield


@pytest.fixture(scope="module")
def weights(randomize: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of the bundled Mask R-CNN that find something everywhere."""
    file = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(randomize(build_detector(open_config(CONFIG))).state_dict(), file)
    return str(file)


@pytest.fixture(scope="module")
def load(weights: str) -> Callable[..., Detection]:
    def load(results: str | None = None, **fields: Any) -> Detection:
        given = {"model": CONFIG, "data": "bundled", "checkpoint": weights, **fields}
        return load_detection(Cell.create(task="detection", method="full_precision", **given), results)

    return load


@pytest.fixture(scope="module")
def subject(load: Callable[..., Detection]) -> Detection:
    """The bundled Mask R-CNN on few scenes, which no test alters."""
    return load()


@pytest.fixture
def root(subject: Detection, tmp_path: Path) -> Path:
    """A copy of the scenes, for a test to alter."""
    return Path(shutil.copytree(subject.validation.folder.parent, tmp_path / "coco"))


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def truth_of(subject: Detection) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(subject.validation.file.read_text())
    return content


def write_config(config: Any, file: Path) -> None:
    """As Config.dump does, which takes seconds to lay out the lines."""
    file.write_text("\n".join(f"{key} = {value!r}" for key, value in config.to_dict().items()))


class FakeDetector:
    """Finds what a function makes of each annotation: (box x0 y0 x1 y1, mask, label, score), or None for nothing.

    Args:
        subject: its model lends everything but what it finds.
    """

    def __init__(self, subject: Detection, answer: Callable[..., tuple[Any, ...] | None]) -> None:
        from pycocotools import mask as rle

        self.seen: list[int] = []
        self.answers: dict[int, list[tuple[Any, ...]]] = {}
        for annotation in truth_of(subject)["annotations"]:
            x, y, width, height = annotation["bbox"]
            mask = rle.decode(annotation["segmentation"]).astype(bool)
            found = answer([x, y, x + width, y + height], mask, annotation["category_id"] - 1, 0.9)
            if found is not None and not annotation["iscrowd"]:
                self.answers.setdefault(annotation["image_id"], []).append(found)
        self.model: Any = copy.deepcopy(subject.model)
        self.model.test_step = self.test_step

    def test_step(self, batch: dict[str, Any]) -> list[Any]:
        from mmengine.structures import InstanceData

        for sample in batch["data_samples"]:
            assert len(sample.gt_instances) == 0  # nothing is given away
            self.seen.append(sample.img_id)
            answers = self.answers.get(sample.img_id)
            boxes, masks, labels, scores = zip(*answers, strict=True) if answers else [[]] * 4
            sample.pred_instances = InstanceData(
                bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                masks=torch.tensor(np.array(masks, dtype=bool).reshape(-1, 96, 96)),
                labels=torch.tensor(labels, dtype=torch.int64),
                scores=torch.tensor(scores),
            )
        return list(batch["data_samples"])


def perfect(*found: Any) -> tuple[Any, ...]:
    return found


def test_the_truth_scores_100_and_is_not_given_away(subject: Detection) -> None:
    fake = FakeDetector(subject, perfect)
    metrics = fake_metrics(subject, fake)
    assert {name for name in metrics if name.startswith("box_")} == {
        # No object is 96 pixels wide: there is no metric of large ones.
        *("box_ap", "box_ap50", "box_ap75", "box_ap_small", "box_ap_medium")
    }
    for kind in ("box", "mask"):
        assert [value for name, value in metrics.items() if name.startswith(kind)] == [pytest.approx(100)] * 5
    assert metrics["images"] == 6
    assert fake.seen == [image["id"] for image in truth_of(subject)["images"]]


def fake_metrics(subject: Detection, fake: FakeDetector, limit: int | None = None) -> dict[str, float]:
    return subject.evaluate(fake.model, CPU, limit, batch_size=4)


def test_boxes_and_masks_are_measured_apart(subject: Detection) -> None:
    shifted = FakeDetector(subject, lambda box, mask, label, score: ([0.0, 0, 3, 3], mask, label, score))
    metrics = fake_metrics(subject, shifted)
    assert (metrics["box_ap"], metrics["mask_ap"]) == (0, pytest.approx(100))
    mistaken = FakeDetector(subject, lambda box, mask, label, score: (box, mask, (label + 1) % 24, score))
    assert fake_metrics(subject, mistaken)["mask_ap"] < 20  # neighbours may stand in for each other by chance


def test_averages_are_mmdetections(subject: Detection, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def blur(box: list[float], mask: Any, label: int, _: float) -> tuple[Any, ...] | None:
        draw = torch.rand(6, generator=generator)
        if draw[5] < 0.2:
            return None
        moved = (torch.tensor(box) + 14 * (draw[:4] - 0.5)).tolist()
        return moved, np.roll(mask, int(5 * draw[0]), 0), label, float(draw[4])

    fake = FakeDetector(subject, blur)
    metrics = fake_metrics(subject, fake)
    with mmdetection():
        from mmdet.evaluation import CocoMetric

        metric = CocoMetric(ann_file=str(subject.validation.file), metric=["bbox", "segm"])
        dataset = subject._open(subject.validation, range(6))
        metric.dataset_meta = dataset.dataset.metainfo
        samples = [dataset[index]["data_samples"] for index in range(6)]
        metric.process({}, [sample.to_dict() for sample in fake.test_step({"data_samples": samples})])
        expected = metric.evaluate(6)
    names = {"ap": "mAP", "ap50": "mAP_50", "ap75": "mAP_75", "ap_small": "mAP_s", "ap_medium": "mAP_m"}
    for ours, theirs in names.items():
        for kind, other in (("box", "bbox"), ("mask", "segm")):
            assert metrics[f"{kind}_{ours}"] == pytest.approx(100 * expected[f"coco/{other}_{theirs}"], abs=0.051)
    assert 5 < metrics["box_ap"] < 80
    assert expected["coco/bbox_mAP_l"] == -1  # what we leave out


def test_a_limit_counts_the_first_images_alone(subject: Detection) -> None:
    fake = FakeDetector(subject, perfect)
    metrics = fake_metrics(subject, fake, limit=2)
    assert (metrics["box_ap"], metrics["mask_ap"], metrics["images"]) == (pytest.approx(100), pytest.approx(100), 2)
    assert fake.seen == [image["id"] for image in truth_of(subject)["images"]][:2]
    assert fake_metrics(subject, fake, limit=1000)["images"] == 6


def test_finding_nothing_is_0(subject: Detection) -> None:
    metrics = fake_metrics(subject, FakeDetector(subject, lambda *_: None))
    found = {name: value for name, value in metrics.items() if "ap" in name}
    assert len(found) == 10
    assert set(found.values()) == {0}


def test_an_evaluation_leaves_files_that_cocos_tools_read(
    load: Callable[..., Detection], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = load(results=str(tmp_path / "found"))
    metrics = subject.evaluate(subject.model, CPU, 3, 2)
    assert capsys.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.bbox.json", "found.segm.json"]
    assert 0 <= metrics["box_ap"] <= 100
    from pycocotools.coco import COCO

    truth = COCO(str(subject.validation.file))
    for kind in ("bbox", "segm"):
        found = truth.loadRes(str(tmp_path / f"found.{kind}.json"))
        assert len(found.anns) > 3
        assert set(found.getImgIds()) == set(truth.getImgIds())
        assert {annotation["image_id"] for annotation in found.anns.values()} == {0, 1, 2}
        assert {annotation["category_id"] for annotation in found.anns.values()} <= set(truth.getCatIds())
    assert found.annToMask(found.anns[1]).shape == (96, 96)


def test_calibration_images_come_from_the_train_split_and_follow_the_seed(subject: Detection) -> None:
    first, again, other = (next(subject.calibration_batches(3, seed)) for seed in (0, 0, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.is_inference()  # gradients are taken of them
    chosen = torch.randperm(5, generator=torch.Generator().manual_seed(0))[:3].tolist()
    assert torch.equal(first, torch.stack([pixels(subject.train.folder / f"{index:06d}.png") for index in chosen]))
    with pytest.raises(AdfqError, match="6 calibration images were asked for, the train split has 5"):
        subject.calibration_batches(6, 0)
    with pytest.raises(AdfqError, match="at least one calibration image"):
        subject.calibration_batches(0, 0)


@pytest.fixture
def odd_sizes(load: Callable[..., Detection], root: Path) -> Detection:
    """A subject whose third calibration image with seed 0 is 40 pixels high, not 96."""
    chosen = torch.randperm(5, generator=torch.Generator().manual_seed(0))[:3].tolist()
    smaller = f"{chosen[2]:06d}.png"
    Image.open(root / "train2017" / smaller).crop((0, 0, 96, 40)).save(root / "train2017" / smaller)
    edit(
        root / "annotations" / "instances_train2017.json",
        lambda content: content["images"][chosen[2]].update(height=40),
    )
    return load(data=str(root))


def test_calibration_batches_are_padded_to_their_own_largest_image(odd_sizes: Detection) -> None:
    subject = odd_sizes
    (together,) = subject.calibration_batches(3, 0)
    pairs, single = list(subject.calibration_batches(3, 0, 2)), list(subject.calibration_batches(3, 0, 1))
    assert together.shape == (3, 3, 96, 96)
    assert [batch.shape for batch in pairs] == [(2, 3, 96, 96), (1, 3, 64, 96)]  # 40 pixels, to whole 32
    assert [batch.shape for batch in single] == [(1, 3, 96, 96), (1, 3, 96, 96), (1, 3, 64, 96)]
    for batches in (pairs, single):
        images = [image for batch in batches for image in batch]
        assert all(
            torch.equal(image, whole[:, : image.shape[1]]) for image, whole in zip(images, together, strict=True)
        )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("base_ptq", ()),
        pytest.param("ptq4vit", (("rounds", 1),), marks=pytest.mark.slow),
        pytest.param("repq_vit", (), marks=pytest.mark.slow),
        pytest.param("adfq_vit", (("iterations", 2), ("optimize_batch_size", 2)), marks=pytest.mark.slow),
    ],
)
def test_images_of_several_sizes_are_calibrated_as_they_are(
    method: str, options: tuple[tuple[str, int], ...], odd_sizes: Detection
) -> None:
    fields = {"task": "detection", "model": "m", "data": "d", "method": method, "method_arguments": options}
    cell = Cell.create(**fields, calibration_size=3, calibration_batch_size=2)
    model: Any = quantize_model(cell, odd_sizes, CPU)[0]
    assert model.quantization.calibration_size == 3
    images = odd_sizes.evaluation_images(1)
    with torch.inference_mode():
        outputs, expected = (each.backbone(images)[-1] for each in (model, odd_sizes.model))
    assert 0 < (outputs - expected).norm() < 0.6 * expected.norm()


def pixels(file: Path) -> Tensor:
    """Return an image as the bundled models' input: 3×H×W, red, green, blue, from -1 to 1."""
    image = np.asarray(Image.open(file).convert("RGB"), np.float32)
    return torch.from_numpy(image).permute(2, 0, 1).sub(127.5).div(127.5)


def test_evaluation_images_are_the_first_and_padded_to_one_size(load: Callable[..., Detection], root: Path) -> None:
    # As wide as the others: half as high, it is padded below, and to whole 32 pixels.
    Image.open(root / "val2017" / "000001.png").crop((0, 0, 96, 40)).save(root / "val2017" / "000001.png")
    edit(root / "annotations" / "instances_val2017.json", lambda content: content["images"][1].update(height=40))
    edit(root / "annotations" / "instances_val2017.json", lambda content: content["annotations"].__delitem__(slice(4)))
    subject = load(data=str(root))
    images = subject.evaluation_images(2)
    assert images.shape == (2, 3, 96, 96)
    assert torch.equal(images[0], pixels(root / "val2017" / "000000.png"))
    assert torch.equal(images[1, :, :40], pixels(root / "val2017" / "000001.png"))
    assert images[1, :, 40:].abs().max() == 0
    assert len(subject.evaluation_images(50)) == 6


def test_images_are_scaled_as_the_config_has_it(load: Callable[..., Detection], tmp_path: Path) -> None:
    config = open_config(CONFIG)
    config.test_dataloader.dataset.pipeline[1].scale = (200, 150)
    write_config(config, tmp_path / "larger.py")
    subject, usual = load(model=str(tmp_path / "larger.py")), load()
    assert subject.evaluation_images(1).shape == (1, 3, 160, 160)
    assert subject.preprocessing["pipeline"][1]["scale"] == [200, 150]
    assert usual.preprocessing["data_preprocessor"]["pad_size_divisor"] == 32
    assert json.loads(json.dumps(usual.preprocessing)) == usual.preprocessing
    assert subject.weights_digest != usual.weights_digest == load().weights_digest


def test_feature_errors_are_of_each_stage_against_full_precision(subject: Detection) -> None:
    assert [subject.evaluate(subject.model, CPU, 1, 1)[f"feature_error_{stage}"] for stage in (1, 2, 3)] == [0, 0, 0]
    changed: Any = copy.deepcopy(subject.model)
    changed.quantization = "as adfq.quantize leaves it"
    with torch.no_grad():  # the norm of a stage's output, which the next stage does not see
        changed.backbone.norm1.weight.mul_(1.25)
        changed.backbone.norm1.bias.mul_(1.25)
    metrics = subject.evaluate(changed, CPU, 5, 2)
    errors = [metrics[f"feature_error_{stage}"] for stage in (1, 2, 3)]
    assert errors == [0, pytest.approx(0.25, rel=1e-4), 0]
    assert "feature_error_4" not in metrics


def test_non_finite_features_name_the_layer(subject: Detection) -> None:
    changed: Any = copy.deepcopy(subject.model)
    with torch.no_grad():
        changed.backbone.stages[1].blocks[0].ffn.layers[1].bias[0] = float("nan")
    with pytest.raises(AdfqError, match=r"backbone\.stages\.1\.blocks\.0\.ffn\.layers\.1: the output is not finite"):
        subject.evaluate(changed, CPU, 1, 1)
    changed.quantization = "as adfq.load leaves it"  # without full precision to compare with
    with pytest.raises(AdfqError, match="the output is not finite"):
        replace(subject, model=changed).evaluate(changed, CPU, 1, 1)


def test_forward_gives_what_the_neck_gives(subject: Detection) -> None:
    levels = subject.infer(subject.model.eval(), subject.evaluation_images(2))
    assert [tuple(level.shape) for level in levels] == [(2, 64, size, size) for size in (24, 12, 6, 3)]


def test_a_model_without_masks_has_no_metrics_of_masks(load: Callable[..., Detection], tmp_path: Path) -> None:
    config = open_config(CONFIG)
    config.model.type = "FasterRCNN"
    config.model.roi_head.update(mask_head=None, mask_roi_extractor=None)
    write_config(config, tmp_path / "boxes.py")
    subject = load(str(tmp_path / "found"), model=str(tmp_path / "boxes.py"), checkpoint=None)
    metrics = subject.evaluate(subject.model, CPU, 3, 2)
    assert "box_ap" in metrics
    assert not [name for name in metrics if "mask" in name]
    assert not (tmp_path / "found.segm.json").exists()
    assert "mask" not in describe_detection(metrics)


def test_metrics_in_words() -> None:
    metrics = {"box_ap": 36.096, "mask_ap": 36.0, "images": 5000, "feature_error_1": 0.031, "feature_error_2": 0.0521}
    words = "box AP 36.10, mask AP 36.00 on 5000 images; backbone features off by 3.1 %, 5.2 %"
    assert describe_detection(metrics) == words
    full = {**metrics, "feature_error_1": 0.0, "feature_error_2": 0.0}
    assert describe_detection(full) == "box AP 36.10, mask AP 36.00 on 5000 images"


def _rename_category(content: dict[str, Any]) -> None:
    content["categories"][3]["name"] = "zebra"


def _without(kind: str, key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content[kind][-1].pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _rename_category,
            "categories of {file} do not match the model's classes: it lacks dots disk, and it has zebra besides",
        ),
        (lambda content: content["categories"].pop(), "do not match the model's classes: it lacks dots ring$"),
        (lambda content: content["categories"].reverse(), "{file} are in another order than the model's classes"),
        (lambda content: content.pop("categories"), "{file} is not a file of COCO's annotations: it has no list 'cat"),
        (_without("images", "file_name"), "{file} is not .* one of its images has no 'file_name'"),
        (_without("annotations", "bbox"), "{file}: annotation [0-9]+: the box null in image 5 is not x, y, width"),
        (_without("annotations", "image_id"), "{file}: annotation [0-9]+ has no 'image_id'"),
        (lambda content: content["images"].append(content["images"][0]), "{file}: images share an id"),
        (lambda content: content["images"].clear(), "{file} has no images"),
        (
            lambda content: content["images"][2].update(file_name="lost.png"),
            "{file} names lost.png, which {folder} does not have",
        ),
    ],
)
def test_annotations_are_checked_before_the_work(
    change: Callable[[dict[str, Any]], Any], message: str, load: Callable[..., Detection], root: Path
) -> None:
    file = root / "annotations" / "instances_val2017.json"
    edit(file, change)
    with pytest.raises(AdfqError, match=message.format(file=file, folder=root / "val2017")) as caught:
        load(data=str(root))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1, 2]", "{\n", '{"images": 3}'])
def test_files_that_are_not_cocos(content: str, load: Callable[..., Detection], root: Path) -> None:
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(content)
    with pytest.raises(AdfqError, match=f"(cannot read {file}|{file} is not a file of COCO's annotations): ") as caught:
        load(data=str(root))
    assert "\n" not in str(caught.value)


def test_missing_files(load: Callable[..., Detection], root: Path) -> None:
    train, val = (root / "annotations" / f"instances_{split}2017.json" for split in ("train", "val"))
    train.unlink()
    subject = load(data=str(root))  # to measure full precision, training images are not needed
    with pytest.raises(AdfqError, match=f"there is no {train}"):
        next(subject.calibration_batches(1, 0))
    shutil.rmtree(root / "val2017")
    with pytest.raises(AdfqError, match=r"names 000000\.png, .*, 000002\.png and 3 more, which .*val2017 does"):
        load(data=str(root))
    val.unlink()
    with pytest.raises(AdfqError, match=f"there is no {val}"):
        load(data=str(root))
    with pytest.raises(AdfqError, match=f"there is no {root}/no$"):
        load(data=f"{root}/no")
    with pytest.raises(AdfqError, match="cannot read data 'folder:x'; write bundled, or the folder"):
        load(data="folder:x")


def test_images_without_objects_cannot_be_measured_on(load: Callable[..., Detection], root: Path) -> None:
    file = root / "annotations" / "instances_val2017.json"
    edit(file, lambda content: content["annotations"].sort(key=lambda item: item["image_id"]))
    edit(file, lambda content: content["annotations"].__delitem__(slice(0, 4)))
    subject = load(data=str(root))
    with pytest.raises(AdfqError, match=f"{file}: there is nothing to be found in its first 1 images"):
        subject.evaluate(subject.model, CPU, 1, 1)
    with pytest.raises(AdfqError, match=f"{file}: there is nothing to be found in its first 1 images"):
        load(data=str(root), limit=1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["png", "jpeg", "text"])
def test_a_broken_image_is_named(damage: str, workers: int, load: Callable[..., Detection], root: Path) -> None:
    subject = replace(load(data=str(root)), workers=workers)
    for split in ("train2017", "val2017"):
        for broken in (root / split).iterdir():
            if damage == "jpeg":  # OpenCV would read it, and fill up with grey
                Image.open(broken).save(broken, "JPEG")
            content = broken.read_bytes()
            broken.write_bytes(b"no image" if damage == "text" else content[: len(content) // 2])
    with pytest.raises(AdfqError, match=f"^cannot read {root}/train2017/00000.\\.png: ") as caught:
        next(subject.calibration_batches(2, 0))
    assert "\n" not in str(caught.value)
    # The first ones are whole, so that it is the evaluation that finds the broken one.
    for number in range(4):
        source = coco._draw_scenes(tuple(SCENES.items())).name
        shutil.copy(f"{source}/val2017/{number:06d}.png", root / "val2017")
    with pytest.raises(AdfqError, match=f"^cannot read {root}/val2017/000004\\.png: ") as caught:
        subject.evaluate(subject.model, CPU, None, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_arguments": (("depth", 3),)}, "come from its config alone"),
        ({"preprocessing": (("crop_pct", 1.0),)}, "come from its config alone"),
        ({"pretrained": True}, "not downloaded; give --checkpoint"),
        ({"checkpoint": ""}, "^--checkpoint is empty$"),
        ({"results": ""}, "^--results is empty$"),
        ({"results": "no/where"}, r"cannot write no/where\.bbox\.json: there is no directory no"),
        ({"results": "taken"}, r"cannot write taken\.segm\.json: it is a directory"),
        ({"checkpoint": "no.pth"}, r"there is no checkpoint no\.pth"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(
    fields: dict[str, Any],
    message: str,
    load: Callable[..., Detection],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.segm.json").mkdir()
    with pytest.raises(AdfqError, match=message):
        load(**fields)


def test_configs_that_do_not_fit_themselves(load: Callable[..., Detection], tmp_path: Path) -> None:
    config = open_config(CONFIG)
    config.test_dataloader.dataset.metainfo.classes = ("cat", "dog")
    write_config(config, tmp_path / "classes.py")
    with pytest.raises(AdfqError, match="its box head tells 24 classes apart, its data set 2"):
        load(model=str(tmp_path / "classes.py"))
    config.test_dataloader.dataset.type = "LVISV1Dataset"
    write_config(config, tmp_path / "lvis.py")
    with pytest.raises(AdfqError, match=r"lvis\.py has no 'test_dataloader' with a CocoDataset"):
        load(model=str(tmp_path / "lvis.py"))
    config = open_config(CONFIG)
    config.test_dataloader.dataset.pipeline[1].wings = 2
    write_config(config, tmp_path / "wings.py")
    with pytest.raises(AdfqError, match=r"wings\.py: the images' pipeline cannot be used: .* argument 'wings'"):
        load(model=str(tmp_path / "wings.py"))
    del config.test_dataloader.dataset.pipeline[1]["wings"]
    config.test_dataloader.dataset.pipeline[1].scale = [96, 96]
    write_config(config, tmp_path / "scale.py")
    subject = load(model=str(tmp_path / "scale.py"))
    with pytest.raises(AdfqError, match=r"000000\.png: the config's pipeline fails: Scale must be a number or tuple"):
        subject.evaluation_images(1)


def test_scenes_are_drawn_once_in_a_process(load: Callable[..., Detection]) -> None:
    assert load().validation == load().validation


def test_other_tasks_need_no_mmdetection() -> None:
    code = (
        "import sys\nfor name in ('mmdet', 'mmcv', 'mmengine', 'pycocotools', 'cv2'): sys.modules[name] = None\n"
        "import adfq\nfrom benchmarks.cell import Cell\nfrom benchmarks.tasks import find_task, load_subject\n"
        "assert 'mask_rcnn_swin_tiny' in find_task('detection').model_names()\n"
        "cell = Cell.create(task='detection', model='mask_rcnn_swin_tiny', data='.', method='full_precision')\n"
        "try:\n    load_subject(cell)\nexcept adfq.AdfqError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("detection needs MMDetection: pip install 'adfq[detection]'")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""


def test_cocos_own_images(real_data: Path, tmp_path: Path) -> None:
    """80 classes, JPEGs of many sizes, the pipeline of MMDetection's config, processes that read."""
    config, coco = open_config(CONFIG), open_config("mask_rcnn_swin_tiny")
    for head in ("bbox_head", "mask_head"):
        config.model.roi_head[head].num_classes = 80
    config.model.data_preprocessor = coco.model.data_preprocessor
    config.test_dataloader = coco.test_dataloader
    config.test_dataloader.dataset.pipeline[1].scale = (333, 200)  # a quarter, to be done in no time
    write_config(config, tmp_path / "coco.py")
    data = real_data / "coco"
    cell = Cell.create(
        task="detection", model=str(tmp_path / "coco.py"), data=str(data), method="full_precision", batch_size=2
    )
    subject = load_detection(cell, str(tmp_path / "found"))
    assert subject.workers > 0
    with torch.no_grad():  # finds persons in every place
        subject.model.roi_head.bbox_head.fc_cls.bias[0] = 4  # type: ignore[union-attr,index,operator]
    metrics = subject.evaluate(subject.model, CPU, 3, 2)
    assert metrics["images"] == 3
    assert {"box_ap", "mask_ap", "box_ap_large", "mask_ap_large"} <= metrics.keys()
    found = json.loads((tmp_path / "found.bbox.json").read_text())
    first = json.loads((data / "annotations" / "instances_val2017.json").read_text())["images"][:3]
    assert {item["image_id"] for item in found} == {image["id"] for image in first}
    assert {item["category_id"] for item in found} == {1}
    images = next(subject.calibration_batches(4, 0))
    assert images.shape[0] == 4
    assert {images.shape[2] % 32, images.shape[3] % 32} == {0}
    assert images.abs().max() < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_what_ships_scores_well(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "COUNTS", COUNTS)
    subject = load_detection(Cell.create(task="detection", model=name, data="bundled", method="full_precision"))
    metrics = subject.evaluate(subject.model, CPU, None, 10)
    assert metrics["images"] == 200
    assert metrics["box_ap"] >= 50
    assert metrics["mask_ap"] >= 50
    assert DETECTORS[name].checkpoint.stat().st_size <= 8e6
