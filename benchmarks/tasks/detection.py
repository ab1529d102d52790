"""Object detection and instance segmentation with MMDetection: models, pipelines and metric come from its configs."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from adfq.errors import AdfqError
from benchmarks.cells import Cell
from benchmarks.embedded.detectors import COUNTS
from benchmarks.tasks.coco import CheckedImages, CocoSplit
from benchmarks.tasks.data import EMBEDDED
from benchmarks.tasks.mmdet_models import load_detector, mmdetection
from benchmarks.tasks.shared import check_place, choose_images, digest_weights, first_non_finite, one_line, read_batches

#: What is found, by the names that COCO's tools have for it.
KINDS: Mapping[str, str] = {"bbox": "box", "segm": "mask"}

# COCO's summary begins with these.
_AVERAGES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")

_FEATURE_IMAGES = 4


@dataclass(frozen=True)
class Found:
    """An image with what there is and what was found, in COCO's format.

    Attributes:
        image: H×W×3.
        classes: names of the categories.
        ids: of the categories, in the same order.
    """

    image: NDArray[np.uint8]
    classes: Sequence[str]
    ids: Sequence[int]
    truth: Sequence[Mapping[str, Any]]
    found: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Detection:
    """A detector with its train and evaluation split (`benchmarks.tasks.Subject`).

    Attributes:
        model: MMDetection's, with its config as attribute `cfg`.
        preprocessing: the test pipeline and what the model itself does to images.
        workers: how many processes read images for evaluation; 0 reads them in this one.
        results: where to write what was found, in COCO's format: ``RESULTS.bbox.json`` and ``RESULTS.segm.json``.
    """

    model: nn.Module
    weights_digest: str
    preprocessing: Mapping[str, Any]
    train: CocoSplit
    validation: CocoSplit
    workers: int
    results: str | None = None

    def calibration_images(self, count: int, seed: int) -> Tensor:
        """As the pipeline for evaluation gives them, padded to the size of the largest."""
        return self._read(self.train, choose_images(len(self.train.images), count, seed), "reading calibration images")

    def evaluation_images(self, count: int) -> Tensor:
        return self._read(self.validation, range(min(count, len(self.validation.images))), "reading images")

    def forward(self, model: nn.Module, images: Tensor) -> Any:
        """Backbone and neck."""
        detector: Any = model
        return detector.extract_feat(images)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, device: torch.device, limit: int | None, batch_size: int) -> dict[str, float]:
        """COCO's average precisions in percent, ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_small``,
        ``box_ap_medium``, ``box_ap_large``, and ``mask_ap`` … of a model that finds masks. Where no object has that
        size, there is no such metric. ``feature_error_1`` … are ‖F_q - F‖ / ‖F‖ of each of the backbone's outputs over
        the first four images, F being full precision's.

        Raises:
            AdfqError: naming the layer, if the backbone's outputs are not finite; for images that cannot be read;
                where results cannot be written.
        """
        available = len(self.validation.images)
        count = available if limit is None else min(limit, available)
        if count < 1:
            raise AdfqError("there are no images to evaluate on")
        model = model.to(device).eval()
        errors = self._feature_errors(model, device, min(count, _FEATURE_IMAGES), batch_size)
        with TemporaryDirectory() as folder:
            truth = Path(folder, "truth.json")
            self.validation.write_truth(count, truth)
            found = self._detect(model, count, batch_size, truth, self.results or str(Path(folder, "found")))
            metrics = {name: value for kind in found for name, value in _average(kind, truth, found[kind]).items()}
        return {**metrics, **errors, "images": count}

    @torch.inference_mode()
    def find(self, model: nn.Module, device: torch.device, count: int) -> list[Found]:
        """What there is in the first images, and what a model finds there.

        Raises:
            AdfqError: as `evaluate`.
        """
        count = min(count, len(self.validation.images))
        with TemporaryDirectory() as folder:
            file = Path(folder, "truth.json")
            self.validation.write_truth(count, file)
            truth = json.loads(file.read_bytes())
            found = self._detect(model.to(device).eval(), count, 1, file, str(Path(folder, "found")))
        ids = [category["id"] for category in truth["categories"]]
        images = []
        for image in truth["images"]:
            with Image.open(self.validation.folder / image["file_name"]) as opened:
                pixels = np.asarray(opened.convert("RGB"))
            both = (truth["annotations"], list(found.values())[-1])
            items = ([item for item in items if item["image_id"] == image["id"]] for items in both)
            images.append(Found(pixels, self.validation.classes, ids, *items))
        return images

    def _detect(
        self, model: Any, count: int, batch_size: int, truth: Path, prefix: str
    ) -> dict[str, list[dict[str, Any]]]:
        """What a model finds in the first images, in COCO's format, by kind; the files ``PREFIX.KIND.json`` too."""
        from mmdet.evaluation import CocoMetric
        from mmengine.dataset import pseudo_collate

        dataset = self._open(self.validation, range(count))
        with mmdetection():
            # It writes files; averages it would round to three digits.
            metric = CocoMetric(ann_file=str(truth), outfile_prefix=prefix, format_only=True)
        metric.dataset_meta = dataset.dataset.metainfo
        loader = DataLoader(dataset, batch_size, num_workers=min(self.workers, count), collate_fn=pseudo_collate)
        with tqdm(total=count, desc="evaluating", unit="image", delay=2, leave=False, disable=None) as progress:
            for batch in read_batches(loader):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "To copy construct")  # a cascade's masks, in MMDetection's code
                    samples = [sample.to_dict() for sample in model.test_step(batch)]
                metric.process(batch, samples)
                progress.update(len(samples))
        kinds = [kind for kind in KINDS if kind == "bbox" or self.validation.masks]
        try:
            metric.evaluate(count)
            return {kind: json.loads(Path(f"{prefix}.{kind}.json").read_bytes()) for kind in kinds}
        except OSError as error:
            raise AdfqError(f"cannot write {prefix}.{kinds[0]}.json: {error.strerror}") from None

    def _feature_errors(self, model: Any, device: torch.device, count: int, batch_size: int) -> dict[str, float]:
        """By the name of the metric; 0 for the model in full precision itself."""
        reference: Any = self.model.to(device).eval()
        sums: dict[str, list[float]] = {}
        for images in self.evaluation_images(count).to(device).split(batch_size):
            outputs = model.backbone(images)
            if not all(output.isfinite().all() for output in outputs):
                raise AdfqError(f"backbone.{first_non_finite(model.backbone, images)}: the output is not finite")
            expected = reference.backbone(images) if hasattr(model, "quantization") else outputs
            for stage, (output, other) in enumerate(zip(outputs, expected, strict=True), 1):
                total = sums.setdefault(f"feature_error_{stage}", [0.0, 0.0])
                total[0] += float((output.double() - other.double()).square().sum())
                total[1] += float(other.double().square().sum())
        return {name: (error / (norm or 1.0)) ** 0.5 for name, (error, norm) in sums.items()}

    def _read(self, split: CocoSplit, chosen: Sequence[int], label: str) -> Tensor:
        """Images as the model gets them, one batch."""
        dataset = self._open(split, chosen)
        bar = tqdm(range(len(dataset)), desc=label, unit="image", delay=2, leave=False, disable=None)
        inputs = [dataset[index]["inputs"] for index in bar]
        model: Any = self.model
        preprocess = copy.deepcopy(model.data_preprocessor).cpu()
        batch: Tensor = preprocess({"inputs": inputs, "data_samples": None})["inputs"]
        return batch

    def _open(self, split: CocoSplit, chosen: Iterable[int]) -> CheckedImages:
        """The chosen images through the pipeline for evaluation, which does not see what is to be found in them."""
        with TemporaryDirectory() as folder, mmdetection():
            file = Path(folder, "images.json")
            split.write_images(chosen, file)
            return CheckedImages(_build_dataset(self.model.cfg, ann_file=str(file), folder=split.folder))


def describe_detection(metrics: Mapping[str, float]) -> str:
    """The metrics in words."""
    found = ", ".join(f"{kind} AP {metrics[f'{kind}_ap']:.2f}" for kind in KINDS.values() if f"{kind}_ap" in metrics)
    errors = [value for name, value in metrics.items() if name.startswith("feature_error_")]
    off = f"; backbone features off by {', '.join(f'{100 * error:.1f} %' for error in errors)}" if any(errors) else ""
    return f"{found} on {metrics['images']} images{off}"


def load_detection(cell: Cell, results: str | None = None) -> Detection:
    """Loads a cell's model and data.

    Args:
        cell: its model is a name or a config's path, its data ``embedded`` or a folder with COCO's
            ``annotations/instances_{train,val}2017.json`` and ``{train,val}2017/``.
        results: `Detection.results`.

    Raises:
        AdfqError: for what this task does not have, an unusable config, a checkpoint that does not fit, unusable data,
            and results that could not be written.
    """
    _check_supported(cell)
    if results is not None:
        _check_writable(results)
    root = _find_root(cell.data)
    model: Any = load_detector(cell.model, cell.checkpoint)
    loader: Any = model.cfg.get("test_dataloader") or {}
    if loader.get("dataset", {}).get("type") != "CocoDataset":
        raise AdfqError(f"{cell.model} has no 'test_dataloader' with a CocoDataset")
    try:
        with mmdetection():
            classes = _build_dataset(model.cfg, lazy_init=True).metainfo["classes"]
    except Exception as error:  # whatever the pipeline's steps raise
        raise AdfqError(f"{cell.model}: the images' pipeline cannot be used: {one_line(error)}") from None
    for number in _head_classes(model):
        if number != len(classes):
            raise AdfqError(f"{cell.model}: its box head tells {number} classes apart, its data set {len(classes)}")

    def split(name: str) -> CocoSplit:
        return CocoSplit(root / "annotations" / f"instances_{name}.json", root / name, classes, model.with_mask)

    validation = split("val2017")
    if not validation.images:
        raise AdfqError(f"{validation.file} has no images")
    described = {"pipeline": loader.dataset.pipeline, "data_preprocessor": model.cfg.model.data_preprocessor}
    preprocessing = json.loads(json.dumps(described, default=str))
    config = json.dumps({"model": model.cfg.model, **described}, sort_keys=True, default=str)
    # Scenes are so small that processes would not read them faster.
    workers = 0 if cell.data == EMBEDDED else min(os.cpu_count() or 1, 8)
    digest = digest_weights(model, config)
    return Detection(model, digest, preprocessing, split("train2017"), validation, workers, results)


def _build_dataset(config: Any, folder: Path | None = None, **settings: Any) -> Any:
    from mmdet.registry import DATASETS

    dataset = copy.deepcopy(config.test_dataloader.dataset)
    dataset.update(data_root="", data_prefix={"img": str(folder or "")}, test_mode=True, indices=None)
    dataset.update(serialize_data=False, **settings)  # few are opened, often
    return DATASETS.build(dataset)


def _average(kind: str, file: Path, found: list[dict[str, Any]]) -> dict[str, float]:
    """COCO's summary of what was found against the annotations in a file, by the name of the metric."""
    from mmdet.datasets.api_wrappers import COCO, COCOeval
    from mmdet.evaluation import CocoMetric

    if kind == "segm":  # by its mask an object is small or large, which boxes would overrule
        found = [{key: value for key, value in item.items() if key != "bbox"} for item in found]
    with redirect_stdout(StringIO()):
        truth = COCO(str(file))
        evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), kind)
        evaluation.params.maxDets = CocoMetric().proposal_nums
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = zip(_AVERAGES, evaluation.stats, strict=False)
    return {f"{KINDS[kind]}_{name}": 100 * float(value) for name, value in values if value >= 0}


def _head_classes(model: nn.Module) -> list[int]:
    """How many classes the box heads tell apart; a cascade has several heads."""
    named = [(name.split("."), module) for name, module in model.named_modules()]
    heads = [module for name, module in named if "bbox_head" in name[-2:] and name[-1] in ("bbox_head", *"0123456789")]
    return [int(head.num_classes) for head in heads if hasattr(head, "num_classes")]


def _check_supported(cell: Cell) -> None:
    if cell.model_arguments or cell.preprocessing:
        raise AdfqError("a detector and its preprocessing come from its config alone; there are no arguments for them")
    if cell.pretrained:
        raise AdfqError("weights of detectors are not downloaded; give --checkpoint FILE, of a table --checkpoints DIR")


def _check_writable(prefix: str) -> None:
    """Raises AdfqError, before the work, where results cannot be written after it."""
    for kind in KINDS:
        path = Path(f"{prefix}.{kind}.json")
        check_place(path)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise AdfqError(f"cannot write {path}: permission denied")


def _find_root(spec: str) -> Path:
    if spec == EMBEDDED:
        return Path(_draw_scenes(tuple(COUNTS.items())).name)
    root = Path(spec).absolute()
    if root.is_dir():
        return root
    if ":" in spec:
        raise AdfqError(f"cannot read data {spec!r}; write embedded, or the folder of COCO's annotations and images")
    raise AdfqError(f"there is no {'directory ' if root.exists() else ''}{spec}")


@cache  # within a process; the directory goes with it
def _draw_scenes(counts: tuple[tuple[str, int], ...]) -> TemporaryDirectory[str]:
    with mmdetection():
        from benchmarks.embedded.coco import write_coco

        directory = TemporaryDirectory()
        try:
            write_coco(Path(directory.name), dict(counts))
        except OSError as error:
            raise AdfqError(f"cannot write scenes to {directory.name}: {one_line(error)}") from None
    return directory
