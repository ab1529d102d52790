"""Object detection and instance segmentation with MMDetection: models, pipelines and metric come from its configs."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from adfq.errors import AdfqError, NonFiniteError
from benchmarks.bundled import BUNDLED
from benchmarks.cell import Cell
from benchmarks.tasks.coco import (
    KINDS,
    CheckedImages,
    CocoSplit,
    average_precisions,
    check_results,
    digest_splits,
    find_root,
    read_image,
)
from benchmarks.tasks.detection.models import load_detector, mmdetection
from benchmarks.tasks.shared import (
    Stopwatch,
    choose_images,
    count_workers,
    create_loader,
    digest_weights,
    first_non_finite,
    one_line,
    read_batches,
)

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
        workers: how many processes read images for evaluation, at most; 0 reads them in this one.
        results: where to write what was found, in COCO's format: ``RESULTS.bbox.json`` and ``RESULTS.segm.json``.
    """

    model: nn.Module
    weights_digest: str
    preprocessing: Mapping[str, Any]
    train: CocoSplit
    validation: CocoSplit
    workers: int
    results: str | None = None

    @property
    def data_digests(self) -> Mapping[str, Any]:
        return digest_splits(self.train, self.validation)

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
    def evaluate(
        self,
        model: nn.Module,
        device: torch.device,
        limit: int | None,
        batch_size: int,
        loading: Stopwatch | None = None,
    ) -> dict[str, float]:
        """COCO's average precisions in percent, ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_small``,
        ``box_ap_medium``, ``box_ap_large``, and ``mask_ap`` … of a model that finds masks. Where no object has that
        size, there is no such metric. ``feature_error_1`` … are ‖F_q - F‖ / ‖F‖ of each of the backbone's outputs over
        the first four images, F being full precision's.

        Raises:
            NonFiniteError: naming the layer, if the backbone's outputs are not finite.
            AdfqError: for images that cannot be read; where results cannot be written.
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
        """What there is in the first images, and what a model finds there.

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
            images.append(Found(read_image(self.validation.folder / image["file_name"]), classes, ids, *items))
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
        """What a model finds in the truth's images, which are the first ones, in COCO's format, by kind."""
        from mmdet.evaluation import CocoMetric
        from mmengine.dataset import pseudo_collate

        count = len(truth["images"])
        dataset = self._open(self.validation, range(count))
        with TemporaryDirectory() as folder:
            file, prefix = Path(folder, "truth.json"), results or str(Path(folder, "found"))
            file.write_text(json.dumps(truth), encoding="utf-8")
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
        """By the name of the metric; 0 for the model in full precision itself."""
        reference: Any = self.model.to(images.device).eval()
        sums: dict[str, list[float]] = {}
        for batch in images.split(batch_size):
            outputs = model.backbone(batch)
            if not all(output.isfinite().all() for output in outputs):
                raise NonFiniteError(f"backbone.{first_non_finite(model.backbone, batch)}: the output is not finite")
            expected = reference.backbone(batch) if hasattr(model, "quantization") else outputs
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
        cell: its model is a name or a config file, its data ``bundled`` or a folder with COCO's
            ``annotations/instances_{train,val}2017.json`` and ``{train,val}2017/``.
        results: `Detection.results`.

    Raises:
        AdfqError: for what this task does not have, an unusable config, a checkpoint that does not fit, unusable data,
            and results that could not be written.
    """
    _check_supported(cell)
    if results is not None:
        check_results(results, KINDS)
    name = cell.location.file("model", cell.model)
    root = find_root(cell.location.data)
    model: Any = load_detector(name, cell.location.checkpoint)
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
    described = {"pipeline": loader.dataset.pipeline, "data_preprocessor": model.cfg.model.data_preprocessor}
    preprocessing = json.loads(json.dumps(described, default=str))
    config = json.dumps({"model": model.cfg.model, **described}, sort_keys=True, default=str)
    # Scenes are so small that processes would not read them faster.
    workers = 0 if cell.location.data == BUNDLED else count_workers()
    digest = digest_weights(model, config)
    return Detection(model, digest, preprocessing, split("train2017"), validation, workers, results)


def _build_dataset(config: Any, folder: Path | None = None, **settings: Any) -> Any:
    from mmdet.registry import DATASETS

    dataset = copy.deepcopy(config.test_dataloader.dataset)
    dataset.update(data_root="", data_prefix={"img": str(folder or "")}, test_mode=True, indices=None)
    dataset.update(serialize_data=False, **settings)  # few are opened, often
    return DATASETS.build(dataset)


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
