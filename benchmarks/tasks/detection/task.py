"""Object detection and instance segmentation with MMDetection, whose configs give models, pipelines and metric."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from adfq.errors import AdfqError, NonFiniteError, one_line
from benchmarks.bundled import BUNDLED
from benchmarks.tasks.coco import (
    KINDS,
    CocoSplit,
    average_precisions,
    check_results,
    digest_splits,
    find_root,
)
from benchmarks.tasks.detection.images import CheckedImages
from benchmarks.tasks.detection.models import load_detector, mmdetection
from benchmarks.tasks.shared import (
    Stopwatch,
    choose_images,
    count_workers,
    create_loader,
    digest_weights,
    first_non_finite,
    read_batches,
    read_images,
)

if TYPE_CHECKING:
    from benchmarks.cell import Cell

_FEATURE_IMAGES = 4


@dataclass(frozen=True)
class Found:
    """Image with ground truth and detections, in COCO's format.

    Attributes:
        image: H×W×3, red, green, blue.
        classes: names of the categories.
        ids: ids of the categories, in the same order.
        truth: annotations.
        found: detections.
    """

    image: NDArray[np.uint8]
    classes: Sequence[str]
    ids: Sequence[int]
    truth: Sequence[Mapping[str, Any]]
    found: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Detection:
    """Detector with its train and evaluation split (`benchmarks.tasks.Subject`).

    Attributes:
        model: MMDetection's detector, with its config as attribute `cfg`.
        weights_digest: SHA-256 of the weights and the config.
        preprocessing: test pipeline, and the model's own preprocessing.
        train: split to calibrate on; None for a model that is calibrated already.
        validation: split to evaluate on.
        workers: largest number of processes that read images for evaluation; 0 reads in this process.
        results: prefix of the files ``RESULTS.bbox.json`` and ``RESULTS.segm.json`` that detections are written to, in
            COCO's format; None, the default, for none.
    """

    model: nn.Module
    weights_digest: str
    preprocessing: Mapping[str, Any]
    train: CocoSplit | None
    validation: CocoSplit
    workers: int
    results: str | None = None

    @property
    def data_digests(self) -> Mapping[str, Any]:
        """Number of evaluation images, and SHA-256 of each split's annotations."""
        return digest_splits(self.train, self.validation)

    def calibration_batches(self, count: int, seed: int, batch_size: int | None = None) -> Iterator[Tensor]:
        """Return batches of images of the train split, B×3×H×W, each read when it is asked for.

        They are preprocessed by the pipeline for evaluation, and padded to the size of the largest of their batch.

        Args:
            count: number of images.
            seed: seed of their choice.
            batch_size: images a batch, fewer in the last one; None, the default, for all in one.

        Raises:
            AdfqError: for more images than there are, and images that cannot be read.
        """
        if self.train is None:
            raise AdfqError("a model that is quantized already has no calibration images")
        chosen = choose_images(len(self.train.images), count, seed)
        return self._read(self.train, chosen, "reading calibration images", batch_size)

    def evaluation_images(self, count: int) -> Tensor:
        """Return the first evaluation images, padded to the size of the largest: B×3×H×W with B at most `count`."""
        return next(self._read(self.validation, range(min(count, len(self.validation.images))), "reading images"))

    def infer(self, model: nn.Module, images: Tensor) -> Any:
        """Run backbone and neck.

        Args:
            model: the detector or its quantized twin.
            images: B×3×H×W.
        """
        detector: Any = model
        return detector.extract_feat(images)

    @torch.inference_mode()
    def evaluate(
        self,
        model: nn.Module,
        device: torch.device,
        limit: int | None,
        batch_size: int,
        loading: Stopwatch | None = None,
    ) -> dict[str, float]:
        """Return COCO's average precisions in percent, and feature errors.

        Average precisions are ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_small``, ``box_ap_medium`` and
        ``box_ap_large``, and ``mask_ap`` … of a model that predicts masks. A size that no object has gives no metric.
        ``feature_error_1`` … are ‖F_q - F‖ / ‖F‖ of each of the backbone's outputs over the first four images, with F
        that of full precision. ``images`` is the number of images.

        Args:
            model: the detector or its quantized twin.
            device: device to run on.
            limit: largest number of images; None for all.
            batch_size: images a batch.
            loading: stopwatch of the time spent waiting for images; None, the default, for none.

        Raises:
            NonFiniteError: if the backbone's outputs hold NaN or infinity; the message names the layer.
            AdfqError: for images that cannot be read, and results that cannot be written.
        """
        truth = self.validation.read_truth(limit)
        count = len(truth["images"])
        model = model.to(device).eval()
        loading = loading or Stopwatch()
        with loading:
            images = self.evaluation_images(min(count, _FEATURE_IMAGES))
        errors = self._feature_errors(model, images.to(device), batch_size)
        found = self._detect(model, truth, device, batch_size, loading, self.results)
        averages = [average_precisions(kind, truth, items) for kind, items in found.items()]
        return {name: value for metrics in (*averages, errors) for name, value in metrics.items()} | {"images": count}

    @torch.inference_mode()
    def find(self, model: nn.Module, device: torch.device, count: int) -> list[Found]:
        """Return the first images with ground truth and detections.

        Args:
            model: the detector or its quantized twin.
            device: device to run on.
            count: largest number of images.

        Raises:
            AdfqError: as `evaluate`.
        """
        truth = self.validation.read_truth(count)
        found = self._detect(model.to(device).eval(), truth, device, 1, Stopwatch())
        classes = [category["name"] for category in truth["categories"]]
        ids = [category["id"] for category in truth["categories"]]
        images = []
        for image in truth["images"]:
            both = (truth["annotations"], list(found.values())[-1])
            items = ([item for item in items if item["image_id"] == image["id"]] for items in both)
            images.append(Found(self.validation.read_pixels(image), classes, ids, *items))
        return images

    def _detect(
        self,
        model: Any,
        truth: Mapping[str, Any],
        device: torch.device,
        batch_size: int,
        loading: Stopwatch,
        results: str | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        """Return the detections in the truth's images, which are the first ones, in COCO's format and by kind."""
        from mmdet.evaluation import CocoMetric
        from mmengine.dataset import pseudo_collate

        count = len(truth["images"])
        dataset = self._open(self.validation, range(count))
        with TemporaryDirectory() as folder:
            file, prefix = Path(folder, "truth.json"), results or str(Path(folder, "found"))
            file.write_text(json.dumps({**truth, "annotations": []}), encoding="utf-8")
            with mmdetection():
                # It writes files; averages it would round to three digits.
                metric = CocoMetric(ann_file=str(file), outfile_prefix=prefix, format_only=True)
            metric.dataset_meta = dataset.dataset.metainfo
            loader = create_loader(dataset, batch_size, self.workers, device, collate_fn=pseudo_collate)
            with tqdm(total=count, desc="evaluating", unit="image", delay=2, leave=False, disable=None) as progress:
                for batch in read_batches(loader, loading):
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", "To copy construct")  # a cascade's masks, in its own code
                        samples = [sample.to_dict() for sample in model.test_step(batch)]
                    metric.process(batch, samples)
                    progress.update(len(samples))
            kinds = [kind for kind in KINDS if kind == "bbox" or self.validation.masks]
            try:
                metric.evaluate(count)
                return {kind: json.loads(Path(f"{prefix}.{kind}.json").read_bytes()) for kind in kinds}
            except OSError as error:
                raise AdfqError(f"cannot write {prefix}.{kinds[0]}.json: {error.strerror}") from None

    def _feature_errors(self, model: Any, images: Tensor, batch_size: int) -> dict[str, float]:
        """Return feature errors by the name of the metric; 0 for the model in full precision itself.

        A quantized model from a file has none, since full precision is not at hand, but its outputs are checked.
        """
        reference: Any = None if hasattr(self.model, "quantization") else self.model.to(images.device).eval()
        sums: dict[str, list[float]] = {}
        for batch in images.split(batch_size):
            outputs = model.backbone(batch)
            if not all(output.isfinite().all() for output in outputs):
                raise NonFiniteError(f"backbone.{first_non_finite(model.backbone, batch)}: the output is not finite")
            if reference is None:
                continue
            expected = reference.backbone(batch) if hasattr(model, "quantization") else outputs
            for stage, (output, other) in enumerate(zip(outputs, expected, strict=True), 1):
                total = sums.setdefault(f"feature_error_{stage}", [0.0, 0.0])
                total[0] += float((output.double() - other.double()).square().sum())
                total[1] += float(other.double().square().sum())
        return {name: (error / (norm or 1.0)) ** 0.5 for name, (error, norm) in sums.items()}

    def _read(
        self, split: CocoSplit, chosen: Sequence[int], label: str, batch_size: int | None = None
    ) -> Iterator[Tensor]:
        """Return batches of images as the model takes them, each read when it is asked for."""
        dataset = self._open(split, chosen)
        model: Any = self.model
        preprocess = copy.deepcopy(model.data_preprocessor).cpu()

        def collate(inputs: list[Tensor]) -> Tensor:
            batch: Tensor = preprocess({"inputs": inputs, "data_samples": None})["inputs"]
            return batch

        images = read_images(range(len(dataset)), lambda index: dataset[index]["inputs"], batch_size, label)
        return map(collate, images)

    def _open(self, split: CocoSplit, chosen: Iterable[int]) -> CheckedImages:
        """Open the chosen images with the pipeline for evaluation, which does not see their annotations."""
        with TemporaryDirectory() as folder, mmdetection():
            file = Path(folder, "images.json")
            split.write_images(chosen, file)
            return CheckedImages(_build_dataset(self.model.cfg, ann_file=str(file), folder=split.folder), split.file)


def load_detection(cell: Cell, results: str | None = None) -> Detection:
    """Load a cell's model and data.

    Args:
        cell: its model is a name or a config's path; its data are ``bundled`` or a folder with COCO's
            ``annotations/instances_{train,val}2017.json`` and ``{train,val}2017/``.
        results: prefix of the files for detections; None, the default, for none.

    Raises:
        AdfqError: for settings that this task does not have, an unusable config, a checkpoint that does not fit,
            unusable data, and results that could not be written.
    """
    _check_supported(cell)
    name = cell.location.file("model", cell.model)
    return _open(cell, name, partial(load_detector, name, cell.location.checkpoint), True, results)


def attach_detection(cell: Cell, model: nn.Module, results: str | None = None) -> Detection:
    """Return a quantized detector with its evaluation data; no train split is needed.

    Args:
        cell: cell of the file that the model is from.
        model: from `adfq.load`.
        results: prefix of the files for detections; None, the default, for none.

    Raises:
        AdfqError: for a detector without a test pipeline for COCO, other preprocessing than its own, unusable data, and
            results that could not be written.
    """
    _check_supported(cell)
    return _open(cell, str(cell.location.checkpoint), lambda: model, False, results)


def _open(cell: Cell, name: str, load: Callable[[], nn.Module], calibrated: bool, results: str | None) -> Detection:
    """Return a model, loaded once the data are there, with a cell's data; `name` is the model's in messages."""
    if results is not None:
        check_results(results, KINDS)
    root = find_root(cell.location.data)
    model: Any = load()
    loader: Any = model.cfg.get("test_dataloader") or {}
    if loader.get("dataset", {}).get("type") != "CocoDataset":
        raise AdfqError(f"{name} has no 'test_dataloader' with a CocoDataset")
    try:
        with mmdetection():
            classes = _build_dataset(model.cfg, lazy_init=True).metainfo["classes"]
    except Exception as error:  # whatever the pipeline's steps raise
        raise AdfqError(f"{name}: the images' pipeline cannot be used: {one_line(error)}") from None
    for number in _head_classes(model):
        if number != len(classes):
            raise AdfqError(f"{name}: its box head tells {number} classes apart, its data set {len(classes)}")

    def split(name: str) -> CocoSplit:
        return CocoSplit(root / "annotations" / f"instances_{name}.json", root / name, classes, model.with_mask)

    validation = split("val2017")
    if not validation.images:
        raise AdfqError(f"{validation.file} has no images")
    validation.check(cell.limit)  # before the work
    described = {"pipeline": loader.dataset.pipeline, "data_preprocessor": model.cfg.model.data_preprocessor}
    preprocessing = json.loads(json.dumps(described, default=str))
    config = json.dumps({"model": model.cfg.model, **described}, sort_keys=True, default=str)
    # Scenes are so small that processes would not read them faster.
    workers = 0 if cell.location.data == BUNDLED else count_workers()
    digest = digest_weights(model, config)
    train = split("train2017") if calibrated else None
    return Detection(model, digest, preprocessing, train, validation, workers, results)


def _build_dataset(config: Any, folder: Path | None = None, **settings: Any) -> Any:
    from mmdet.registry import DATASETS

    dataset = copy.deepcopy(config.test_dataloader.dataset)
    dataset.update(data_root="", data_prefix={"img": str(folder or "")}, test_mode=True, indices=None)
    dataset.update(serialize_data=False, **settings)  # few are opened, often
    return DATASETS.build(dataset)


def _head_classes(model: nn.Module) -> list[int]:
    """Return the number of classes of each box head; a cascade has several heads."""
    named = [(name.split("."), module) for name, module in model.named_modules()]
    heads = [module for name, module in named if "bbox_head" in name[-2:] and name[-1] in ("bbox_head", *"0123456789")]
    return [int(head.num_classes) for head in heads if hasattr(head, "num_classes")]


def _check_supported(cell: Cell) -> None:
    if cell.model_arguments or cell.preprocessing:
        raise AdfqError("a detector and its preprocessing come from its config alone; there are no arguments for them")
    if cell.pretrained:
        raise AdfqError("weights of detectors are not downloaded; give --checkpoint FILE, of a table --checkpoints DIR")
