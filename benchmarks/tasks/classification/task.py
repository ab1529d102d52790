"""Image classification with timm, whose factories give models, preprocessing and data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from adfq.errors import AdfqError, NonFiniteError
from benchmarks.bundled import BUNDLED
from benchmarks.tasks.classification.data import CheckedDataset, open_splits
from benchmarks.tasks.classification.models import create_classifier, resolve_bundled
from benchmarks.tasks.classification.preprocessing import MODES, resolve_preprocessing
from benchmarks.tasks.shared import (
    Stopwatch,
    choose_images,
    count_workers,
    create_loader,
    digest_file,
    digest_weights,
    first_non_finite,
    read_batches,
    read_images,
)

if TYPE_CHECKING:
    from benchmarks.cell import Cell
    from benchmarks.run.correct import Correct


@dataclass(frozen=True)
class Classification:
    """Classifier with its train and evaluation split (`benchmarks.tasks.Subject`).

    Attributes:
        model: timm's classifier.
        weights_digest: SHA-256 of the weights.
        preprocessing: timm's data configuration, complete.
        train: split to calibrate on; None for a quantized model.
        validation: split to evaluate on.
        workers: largest number of processes that read images for evaluation; 0 reads in this process.
        class_map: file with the labels of class folders; None, the default, for the natural order of their names.
    """

    model: nn.Module
    weights_digest: str
    preprocessing: Mapping[str, Any]
    train: CheckedDataset | None
    validation: CheckedDataset
    workers: int
    class_map: str | None = None

    @property
    def data_digests(self) -> Mapping[str, Any]:
        """Number of evaluation images, and SHA-256 of each split's names and of the class map."""
        digests = {"images": len(self.validation), "validation": self.validation.digest}
        if self.class_map is not None:
            digests["class_map"] = digest_file(Path(self.class_map))
        return digests if self.train is None else {**digests, "train": self.train.digest}

    def calibration_batches(self, count: int, seed: int, batch_size: int | None = None) -> Iterator[Tensor]:
        """Return batches of preprocessed images of the train split, B×C×H×W, each read when it is asked for.

        Args:
            count: number of images.
            seed: seed of their choice.
            batch_size: images a batch, fewer in the last one; None, the default, for all in one.

        Raises:
            AdfqError: for a quantized model, more images than there are, and images that cannot be read.
        """
        train = self.train
        if train is None:
            raise AdfqError("a quantized model is not calibrated again")
        chosen = choose_images(len(train), count, seed)
        images = read_images(chosen, lambda index: train[index][0], batch_size, "reading calibration images")
        return map(torch.stack, images)

    def evaluation_images(self, count: int) -> Tensor:
        """Return the first evaluation images, preprocessed: B×C×H×W with B at most `count`."""
        available = len(self.validation)
        return torch.stack([self.validation[index][0] for index in range(min(count, available))])

    def infer(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return logits, B×classes.

        Args:
            model: the classifier or its quantized twin.
            images: B×C×H×W.
        """
        logits: Tensor = model(images)
        return logits

    def create_loader(self, chosen: Sequence[int], batch_size: int, device: torch.device) -> Any:
        """Create a loader of evaluation images: batches of images, B×C×H×W, and labels, B.

        Args:
            chosen: indices of the images, in the order to read.
            batch_size: images a batch.
            device: device that the batches go to.
        """
        return create_loader(Subset(self.validation, chosen), batch_size, self.workers, device)

    def evaluate(
        self,
        model: nn.Module,
        device: torch.device,
        limit: int | None,
        batch_size: int,
        loading: Stopwatch | None = None,
    ) -> dict[str, float]:
        """Return the metrics of `evaluate_images`."""
        return self.evaluate_images(model, device, limit, batch_size, loading)[0]

    @torch.inference_mode()
    def evaluate_images(
        self,
        model: nn.Module,
        device: torch.device,
        limit: int | None,
        batch_size: int,
        loading: Stopwatch | None = None,
    ) -> tuple[dict[str, float], Correct]:
        """Return metrics, and by ``top1`` which images are right.

        The metrics are ``top1`` and ``top5`` accuracy in percent, and the number of ``images``.

        Args:
            model: the classifier or its quantized twin.
            device: device to run on.
            limit: largest number of images; None for all.
            batch_size: images a batch.
            loading: stopwatch of the time spent waiting for images; None, the default, for none.

        Raises:
            NonFiniteError: if logits hold NaN or infinity; the message names the layer.
            AdfqError: for images that cannot be read.
        """
        images = len(self.validation)
        count = images if limit is None else min(limit, images)
        if count < 1:
            raise AdfqError("there are no images to evaluate on")
        loader = self.create_loader(range(count), batch_size, device)
        model = model.to(device).eval()
        top1 = top5 = 0.0
        right = []
        with tqdm(total=count, desc="evaluating", unit="image", delay=2, leave=False, disable=None) as progress:
            for batch, labels in read_batches(loader, loading):
                batch, labels = batch.to(device), labels.to(device)
                logits = model(batch)
                if not torch.isfinite(logits).all():
                    raise NonFiniteError(f"{first_non_finite(model, batch)}: the output is not finite")
                hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
                top1 += _percent(hits[:, 0]) * len(labels)
                top5 += _percent(hits) * len(labels)
                right.append(hits[:, 0].cpu().numpy())
                progress.update(len(labels))
        return {"top1": top1 / count, "top5": top5 / count, "images": count}, {"top1": np.concatenate(right)}


def _percent(hits: Tensor) -> float:
    """Return hits in percent of images, rounded to float32 as `timm.utils.accuracy` does."""
    return float(hits.float().sum() * 100.0 / len(hits))


def load_classification(cell: Cell) -> Classification:
    """Load a cell's model and data.

    Args:
        cell: its model is a name of `classifier_names`; its data are a spec of `open_splits`.

    Raises:
        AdfqError: for an unknown model or unusable arguments, a checkpoint that does not fit, and unusable data.
    """
    cell = resolve_bundled(cell)
    model = create_classifier(cell)
    return Classification(**open_images(cell, model, _count_classes(cell, model), calibrated=True))


def attach_classification(cell: Cell, model: nn.Module) -> Classification:
    """Return a quantized model with its evaluation data; no train split is needed.

    Args:
        cell: cell with the complete preprocessing of `Classification.preprocessing`; its model is for messages alone.
        model: from `adfq.load`.

    Raises:
        AdfqError: for unusable data or preprocessing.
    """
    return Classification(**open_images(cell, model, _count_classes(cell, model), calibrated=False))


def open_images(cell: Cell, model: Any, classes: int | None, calibrated: bool) -> dict[str, Any]:
    """Open a model's images.

    Args:
        cell: data, class map and preprocessing.
        model: timm's model.
        classes: number of classes that the data must have; None for any.
        calibrated: whether the train split is opened.

    Returns:
        The fields of `Classification`.

    Raises:
        AdfqError: for unusable data or preprocessing.
    """
    try:
        config = resolve_preprocessing(cell, model)
        transform = create_transform(**config, is_training=False)
    except (AttributeError, KeyError, TypeError):  # a saved model's notes may be anybody's
        raise AdfqError(f"{cell.location.checkpoint or cell.model}: its preprocessing is not timm's") from None
    mode = MODES[config["input_size"][0]]

    class_map = dict(cell.task_arguments).get("class_map")
    if not isinstance(class_map, str | None):
        raise AdfqError(f"class_map must be the path of a file, got {class_map!r}")
    if class_map is not None:
        class_map = cell.location.file("class_map", class_map)
    opened = open_splits(cell.location.data, classes, class_map, calibrated)
    train = None if opened[0] is None else CheckedDataset(opened[0], mode, transform)
    validation = CheckedDataset(opened[1], mode, transform)
    # Scenes are drawn once and kept, which only works within one process.
    workers = 0 if cell.location.data == BUNDLED else count_workers()
    return {
        "model": model.eval(),
        "weights_digest": digest_weights(model),
        "preprocessing": config,
        "train": train,
        "validation": validation,
        "workers": workers,
        "class_map": class_map,
    }


def _count_classes(cell: Cell, model: Any) -> int:
    if getattr(model, "num_classes", 0) < 1:
        raise AdfqError(f"{cell.model} is an encoder without a classifier: 'adfq run encoders' measures its features")
    return int(model.num_classes)
