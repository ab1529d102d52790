"""Zero-shot segmentation with Segment Anything: a prompt for every object of COCO, scored by its mask."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from adfq.errors import AdfqError
from benchmarks.bundled import BUNDLED
from benchmarks.tasks.annotations import clip_box
from benchmarks.tasks.coco import (
    CocoSplit,
    average_precisions,
    check_results,
    digest_splits,
    find_root,
)
from benchmarks.tasks.masks import cocotools
from benchmarks.tasks.segmentation import ARGUMENTS, BOXES, POINTS, SIZES
from benchmarks.tasks.segmentation.images import ScaledImages, Scene, scale, segment
from benchmarks.tasks.segmentation.models import load_sam
from benchmarks.tasks.segmentation.prompts import (
    Prompts,
    box_prompts,
    point_prompts,
    read_prompts,
)
from benchmarks.tasks.shared import (
    Stopwatch,
    choose_images,
    count_workers,
    create_loader,
    digest_file,
    digest_weights,
    read_batches,
    read_images,
)

if TYPE_CHECKING:
    from benchmarks.cell import Cell


@dataclass(frozen=True)
class Segmented:
    """Image with its prompts, ground truth and predicted masks.

    Attributes:
        image: H×W×3, red, green, blue.
        boxes: N×4 in pixels: x0, y0, x1, y1; None for points.
        points: N×2 in pixels: x, y; None for boxes.
        truth: N×H×W; None for a detector's boxes, which belong to no object.
        masks: N×H×W.
        scores: N scores, the detector's or the model's predicted IoU.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float64] | None
    points: NDArray[np.float64] | None
    truth: NDArray[np.bool_] | None
    masks: NDArray[np.bool_]
    scores: Sequence[float]


@dataclass(frozen=True)
class Segmentation:
    """Segment Anything model with its train and evaluation split (`benchmarks.tasks.Subject`).

    Attributes:
        sam: segment_anything's model.
        weights_digest: SHA-256 of the weights and the preprocessing.
        preprocessing: ``size`` of the longer side in pixels, ``mean`` and ``std`` by channel.
        train: split to calibrate on; None for a quantized model.
        validation: split to evaluate on.
        workers: largest number of processes that read images for evaluation; 0, the default, reads in this process.
        prompts: `BOXES`, the default, or `POINTS` of the ground truth, or the name of a file.
        detected: prompts of the file by the image's id; None, the default, for those of the ground truth.
        encoder_only: True if `model` is the image encoder alone and the rest stays that of `sam`; False by default.
        results: prefix of the file ``RESULTS.segm.json`` that predicted masks are written to, in COCO's format; None,
            the default, for none.
    """

    sam: nn.Module
    weights_digest: str
    preprocessing: Mapping[str, Any]
    train: CocoSplit | None
    validation: CocoSplit
    workers: int = 0
    prompts: str = BOXES
    detected: Mapping[Hashable, Prompts] | None = None
    encoder_only: bool = False
    results: str | None = None

    @property
    def model(self) -> nn.Module:
        """Part of the model that is quantized: the whole, or its image encoder."""
        return self.sam.get_submodule("image_encoder") if self.encoder_only else self.sam

    @property
    def data_digests(self) -> Mapping[str, Any]:
        """Number of evaluation images, and SHA-256 of each split's annotations and of the prompts' file."""
        digests = digest_splits(self.train, self.validation)
        return digests if self.detected is None else {**digests, "prompts": digest_file(Path(self.prompts))}

    def calibration_batches(self, count: int, seed: int, batch_size: int | None = None) -> Iterator[Tensor]:
        """Return batches of images of the train split, B×3×S×S, each read when it is asked for.

        They are scaled, normalized and padded.

        Args:
            count: number of images.
            seed: seed of their choice.
            batch_size: images a batch, fewer in the last one; None, the default, for all in one.

        Raises:
            AdfqError: for a quantized model, more images than there are, and images that cannot be read.
        """
        if self.train is None:
            raise AdfqError("a quantized model is not calibrated again")
        chosen = choose_images(len(self.train.images), count, seed)
        return self._read(self.train, chosen, "reading calibration images", batch_size)

    def evaluation_images(self, count: int) -> Tensor:
        """Return the first evaluation images, scaled, normalized and padded to B×3×S×S with B at most `count`."""
        return next(self._read(self.validation, range(min(count, len(self.validation.images))), "reading images"))

    def infer(self, model: nn.Module, images: Tensor) -> Any:
        """Run the image encoder, which takes nearly all of the time.

        Args:
            model: `Segmentation.model` or its quantized twin.
            images: B×3×S×S.
        """
        return (model if self.encoder_only else model.get_submodule("image_encoder"))(images)

    def check(self, limit: int | None) -> None:
        """Check the ground truth and prompts of the images to evaluate on.

        Args:
            limit: largest number of images; None for all.

        Raises:
            AdfqError: unless `evaluate` could use them.
        """
        self._read_truth(limit)
        self.validation.check(limit)

    @torch.inference_mode()
    def evaluate(
        self,
        model: nn.Module,
        device: torch.device,
        limit: int | None,
        batch_size: int,
        loading: Stopwatch | None = None,
    ) -> dict[str, float]:
        """Return metrics of the predicted masks, in percent; crowds do not count.

        ``mean_iou`` is over all objects; ``mean_iou_small``, ``mean_iou_medium`` and ``mean_iou_large`` are over those
        of that size, if there are any. With prompts of the ground truth, an object's mask is that of its prompt. A
        detector's boxes belong to no object: an object's IoU is that of the best mask in the image, 0 without one.

        ``mask_ap``, ``mask_ap50``, ``mask_ap75``, ``mask_ap_small``, ``mask_ap_medium`` and ``mask_ap_large`` are
        COCO's average precisions. Masks are ranked by the model's predicted IoU, or by the detector's score.

        ``instances`` and ``images`` are the numbers of objects and images.

        Args:
            model: `Segmentation.model` or its quantized twin.
            device: device to run on.
            limit: largest number of images; None for all.
            batch_size: without effect, because images of different sizes are processed one by one.
            loading: stopwatch of the time spent waiting for images; None, the default, for none.

        Raises:
            NonFiniteError: if an output holds NaN or infinity; the message names the module.
            AdfqError: for annotations, images and prompts that cannot be used, and results that cannot be written.
        """
        from benchmarks.bundled.coco import encode_mask

        truth = self._read_truth(limit)
        predictor = self._create_predictor(model, device)
        images = ScaledImages(self.validation, truth["images"], self.preprocessing["size"])
        loader = create_loader(images, None, self.workers, device)
        annotations: list[Mapping[str, Any]] = []
        found: list[dict[str, Any]] = []
        areas: list[float] = []
        ious: list[float] = []
        with tqdm(
            total=len(truth["images"]), desc="evaluating", unit="image", delay=2, leave=False, disable=None
        ) as bar:
            for scene, image in zip(self._scenes(truth), read_batches(loader, loading), strict=True):
                prompts, masks, scores = self._ask(scene), [], []
                if len(prompts):
                    size = scene.image["height"], scene.image["width"]
                    for several, predicted in segment(predictor, image, size, prompts):
                        masks += [encode_mask(mask) for mask in several]
                        scores += predicted
                found += [
                    {"image_id": scene.image["id"], "category_id": category, "segmentation": mask, "score": score}
                    for category, mask, score in zip(prompts.categories, masks, prompts.scores or scores, strict=True)
                ]
                annotations += scene.annotations
                areas += [annotation["area"] for annotation in scene.instances]
                ious += self._compare(masks, scene.rles)
                bar.update()
        if self.results is not None:
            _write_results(found, Path(f"{self.results}.segm.json"))
        averages = average_precisions("segm", {**truth, "annotations": annotations}, found)
        return {**_mean_ious(ious, areas), **averages, "instances": len(areas), "images": len(truth["images"])}

    @torch.inference_mode()
    def find(self, model: nn.Module, device: torch.device, count: int) -> list[Segmented]:
        """Return the first images that have a prompt, with predicted masks.

        Args:
            model: `Segmentation.model` or its quantized twin.
            device: device to run on.
            count: largest number of images.

        Raises:
            AdfqError: as `evaluate`.
        """
        predictor = self._create_predictor(model, device)
        images: list[Segmented] = []
        for scene in self._scenes(self._read_truth(None)):
            prompts = self._ask(scene)
            if not len(prompts):
                continue
            pixels = self.validation.read_pixels(scene.image)
            image = scale(pixels, self.preprocessing["size"])
            masks, scores = zip(*segment(predictor, image, pixels.shape[:2], prompts), strict=True)
            truth = scene.masks if self.detected is None else None
            surest = prompts.scores or [score for several in scores for score in several]
            images.append(Segmented(pixels, prompts.boxes, prompts.points, truth, np.concatenate(masks), surest))
            if len(images) == count:
                break
        return images

    def _read_truth(self, limit: int | None) -> dict[str, Any]:
        truth = self.validation.read_truth(limit)
        if self.detected is not None and not any(image["id"] in self.detected for image in truth["images"]):
            count = len(truth["images"])
            raise AdfqError(f"{self.prompts} has no box in the first {count} images of {self.validation.file}")
        return truth

    def _scenes(self, truth: Mapping[str, Any]) -> Iterator[Scene]:
        """Yield image by image."""
        annotations = defaultdict(list)
        for annotation in truth["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        for image in truth["images"]:
            yield Scene(image, annotations[image["id"]])

    def _ask(self, scene: Scene) -> Prompts:
        """Return a scene's prompts; those of the ground truth are one for each instance."""
        if self.detected is not None:
            return self.detected.get(scene.image["id"], box_prompts([], []))
        categories = [instance["category_id"] for instance in scene.instances]
        if self.prompts == POINTS:
            return point_prompts(scene.masks, categories)
        name = str(self.validation.file)
        boxes = (clip_box(instance["bbox"], scene.image, name) for instance in scene.instances)
        return box_prompts([box for box in boxes if box], categories)  # none is empty, as `check_objects` leaves them

    def _compare(self, found: list[Any], truth: list[Any]) -> list[float]:
        """Return the IoU of each object."""
        if not found or not truth:
            return [0.0] * len(truth)
        ious = cocotools("mask").iou(found, truth, [0] * len(truth))
        each: list[float] = (np.diagonal(ious) if self.detected is None else ious.max(0)).tolist()
        return each

    def _create_predictor(self, model: nn.Module, device: torch.device) -> Any:
        from segment_anything import SamPredictor

        if self.encoder_only:  # the rest, which is shared, is not copied
            whole = copy.copy(self.sam)
            whole._modules = {**self.sam._modules, "image_encoder": model}
            model = whole
        return SamPredictor(model.to(device).eval())

    def _read(
        self, split: CocoSplit, chosen: Sequence[int], label: str, batch_size: int | None = None
    ) -> Iterator[Tensor]:
        """Return batches of images as the image encoder takes them, each read when it is asked for."""
        sam: Any = self.sam
        dataset = ScaledImages(split, [split.images[index] for index in chosen], self.preprocessing["size"])

        def read(index: int) -> Tensor:
            image: Tensor = sam.preprocess(dataset[index].to(sam.device)).cpu()
            return image

        return map(torch.stack, read_images(range(len(dataset)), read, batch_size, label))


def _mean_ious(ious: Sequence[float], areas: Sequence[float]) -> dict[str, float]:
    """Return mean IoUs in percent by the name of the metric."""
    percent = 100 * np.array(ious)
    sizes = np.searchsorted(list(SIZES.values()), areas, side="right") - 1
    by_size = {
        f"mean_iou_{name}": float(percent[sizes == index].mean())
        for index, name in enumerate(SIZES)
        if (sizes == index).any()
    }
    return {"mean_iou": float(percent.mean()), **by_size}


def _write_results(found: Sequence[Mapping[str, Any]], file: Path) -> None:
    try:
        file.write_text(json.dumps(found), encoding="utf-8")
    except OSError as error:
        raise AdfqError(f"cannot write {file}: {error.strerror}") from None


def load_segmentation(cell: Cell, results: str | None = None) -> Segmentation:
    """Load a cell's model and data.

    Args:
        cell: its model is a name of `sam_names`; its data are as in detection, with any categories; its task arguments
            are those of `ARGUMENTS`, with ``prompts`` one of ``boxes``, ``points`` and a file of a detector's results
            in COCO's format.
        results: prefix of the file for predicted masks; None, the default, for none.

    Raises:
        AdfqError: for settings that this task does not have, a checkpoint that does not fit, unusable data or prompts,
            and results that could not be written.
    """
    _check_supported(cell)
    return _open(cell, partial(load_sam, cell.model, cell.location.checkpoint), True, results)


def attach_segmentation(cell: Cell, model: nn.Module, results: str | None = None) -> Segmentation:
    """Return a quantized model with its evaluation data; no train split is needed.

    Args:
        cell: cell of the file that the model is from.
        model: from `adfq.load`.
        results: prefix of the file for predicted masks; None, the default, for none.

    Raises:
        AdfqError: for an image encoder without the rest, other preprocessing than the model's, unusable data or
            prompts, and results that could not be written.
    """
    file = cell.location.checkpoint
    if not hasattr(model, "mask_decoder"):
        raise AdfqError(f"{file}: a {type(model).__name__} predicts no masks; quantize the whole model")
    if dict(cell.task_arguments).get("encoder_only"):
        raise AdfqError(f"{file}: the file decides which part is quantized; leave --encoder-only out")
    _check_supported(cell)
    return _open(cell, lambda: model, False, results)


def _open(cell: Cell, load: Callable[[], Any], calibrated: bool, results: str | None) -> Segmentation:
    """Return a model, loaded once the data are known to be usable, with a cell's data."""
    if results is not None:
        check_results(results, ["segm"])
    root = find_root(cell.location.data)
    arguments = {**ARGUMENTS, **dict(cell.task_arguments)}

    def split(name: str) -> CocoSplit:
        return CocoSplit(root / "annotations" / f"instances_{name}.json", root / name, classes=None, masks=True)

    validation, encoder_only = split("val2017"), arguments["encoder_only"]
    prompts = cell.location.file("prompts", arguments["prompts"])
    if not validation.images:
        raise AdfqError(f"{validation.file} has no images")
    detected = None if prompts in (BOXES, POINTS) else read_prompts(prompts, validation.images, validation.categories)
    sam = load()
    mean, std = (values.flatten().tolist() for values in (sam.pixel_mean, sam.pixel_std))
    preprocessing = {"size": sam.image_encoder.img_size, "mean": mean, "std": std}
    digest = digest_weights(sam, json.dumps(preprocessing))
    workers = 0 if cell.location.data == BUNDLED else count_workers()
    train = split("train2017") if calibrated else None
    subject = Segmentation(
        sam, digest, preprocessing, train, validation, workers, prompts, detected, encoder_only, results
    )
    subject.check(cell.limit)  # before the work
    return subject


def _check_supported(cell: Cell) -> None:
    if cell.model_arguments or cell.preprocessing:
        raise AdfqError(
            "a Segment Anything model has its own preprocessing; there are no arguments for it and the model"
        )
    if cell.pretrained:
        raise AdfqError(
            f"weights of {cell.model} are not downloaded; give --checkpoint FILE, of a table --checkpoints DIR"
        )
    unknown = [name for name, _ in cell.task_arguments if name not in ARGUMENTS]
    if unknown:
        raise AdfqError(f"segmentation has no argument {unknown[0]!r}; it has {', '.join(ARGUMENTS)}")
