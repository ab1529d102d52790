"""Encoders without a classifier, judged by classifiers in closed form on their features, and by the features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset
from tqdm import tqdm

from adfq.errors import AdfqError, NonFiniteError
from benchmarks.tasks.classification.data import CheckedDataset
from benchmarks.tasks.classification.models import create_classifier
from benchmarks.tasks.classification.task import Classification, open_images
from benchmarks.tasks.encoders.heads import HEADS
from benchmarks.tasks.encoders.models import resolve_encoder
from benchmarks.tasks.shared import Stopwatch, choose_images, create_loader, first_non_finite, read_batches

if TYPE_CHECKING:
    from benchmarks.cell import Cell
    from benchmarks.run.correct import Correct

#: Values of ``--features`` beside the model's own pooling.
FEATURES = ("class", "mean", "both")


@dataclass(frozen=True)
class Encoder(Classification):
    """Encoder with the images that make its head and those that judge it (`benchmarks.tasks.Subject`).

    Attributes:
        heads: names of `HEADS`.
        features: ``"class"`` for the class token, ``"mean"`` for the mean of the patches, ``"both"`` for one behind the
            other; None, the default, for the model's own pooling.
        head_images: number of training images that the heads are made from, chosen with seed 0; None for all.
        compared: True, the default, where the model's features are the reference of its quantized twin's.
    """

    heads: tuple[str, ...] = tuple(HEADS)
    features: str | None = None
    head_images: int | None = None
    compared: bool = True

    @torch.inference_mode()
    def evaluate_images(
        self,
        model: nn.Module,
        device: torch.device,
        limit: int | None,
        batch_size: int,
        loading: Stopwatch | None = None,
    ) -> tuple[dict[str, float], Correct]:
        """Return the heads' accuracies, the distance of the features from those in full precision, and right images.

        Args:
            model: the encoder or its quantized twin.
            device: device to run on.
            limit: largest number of evaluation images; None for all.
            batch_size: images a batch.
            loading: stopwatch of the time spent waiting for images; None, the default, for none.

        Returns:
            ``knn_top1``, ``prototypes_top1`` and ``ridge_top1`` in percent; ``feature_error``, the mean over images of
            the relative error in percent, and ``feature_cosine``, the mean cosine; the numbers ``images`` and
            ``head_images``. By head, the images that it gets right.

        Raises:
            NonFiniteError: if features hold NaN or infinity; the message names the layer.
            AdfqError: for images that cannot be read.
        """
        assert self.train is not None
        count = len(self.validation) if limit is None else min(limit, len(self.validation))
        if count < 1:
            raise AdfqError("there are no images to evaluate on")
        chosen = list(range(len(self.train)))
        if self.head_images is not None:
            chosen = sorted(choose_images(len(self.train), self.head_images, seed=0))
        models = [model.to(device).eval()]
        train, train_labels = self._read_features(models, self.train, chosen, batch_size, device, loading)
        if self.compared and model is not self.model:
            models.append(self.model.to(device).eval())
        found, labels = self._read_features(models, self.validation, range(count), batch_size, device, loading)

        classes = int(torch.cat([train_labels, labels]).max()) + 1
        metrics: dict[str, float] = {}
        correct: Correct = {}
        for name in self.heads:
            right = HEADS[name](train[0], train_labels, found[0], classes) == labels
            correct[f"{name}_top1"] = right.numpy()
            metrics[f"{name}_top1"] = 100 * float(right.double().mean())
        if self.compared:
            metrics |= _compare(found[0], found[-1])
        return {**metrics, "images": count, "head_images": len(chosen)}, correct

    def _read_features(
        self,
        models: Sequence[nn.Module],
        split: CheckedDataset,
        chosen: Sequence[int],
        batch_size: int,
        device: torch.device,
        loading: Stopwatch | None,
    ) -> tuple[list[Tensor], Tensor]:
        """Return the features of each model, N×C in float64 on the CPU, and labels, N."""
        loader = create_loader(Subset(split, chosen), batch_size, self.workers, device)
        features: list[list[Tensor]] = [[] for _ in models]
        labels = []
        with tqdm(total=len(chosen), desc="features", unit="image", delay=2, leave=False, disable=None) as progress:
            for images, batch_labels in read_batches(loader, loading):
                images = images.to(device)
                for model, parts in zip(models, features, strict=True):
                    part = features_of(model, images, self.features)
                    if not torch.isfinite(part).all():
                        raise NonFiniteError(f"{first_non_finite(model, images)}: the output is not finite")
                    parts.append(part.cpu().double())
                labels.append(batch_labels)
                progress.update(len(batch_labels))
        return [torch.cat(parts) for parts in features], torch.cat(labels)


def features_of(model: Any, images: Tensor, features: str | None) -> Tensor:
    """Return an encoder's features of images, B×C.

    Args:
        model: timm's model without a classifier, or its quantized twin.
        images: B×C×H×W.
        features: see `Encoder`.

    Raises:
        AdfqError: for a class token, or patches, that the model does not have.
    """
    if features is None:
        pooled: Tensor = model(images)
        return pooled
    tokens = model.forward_features(images)
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    if features in ("class", "both") and not (prefix and getattr(model, "cls_token", None) is not None):
        raise AdfqError(f"a {type(model).__name__} without a class token has no features {features!r}; take mean")
    if tokens.dim() == 4:  # height and width before or behind the channels
        tokens = tokens.flatten(1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else tokens.flatten(2).mT
    parts = {"class": tokens[:, :1].flatten(1), "mean": tokens[:, prefix:].mean(1)}
    return torch.cat([parts[name] for name in (("class", "mean") if features == "both" else (features,))], dim=1)


def _compare(features: Tensor, reference: Tensor) -> dict[str, float]:
    error = (features - reference).norm(dim=1) / reference.norm(dim=1)
    return {
        "feature_error": 100 * float(error.mean()),
        "feature_cosine": float(F.cosine_similarity(features, reference).mean()),
    }


def load_encoder(cell: Cell) -> Encoder:
    """Load a cell's encoder and data.

    Args:
        cell: its model is a name of `encoder_names`; its data are a spec of `open_splits`.

    Raises:
        AdfqError: for an unknown model, head or features, unusable arguments, a checkpoint that does not fit, a model
            with a classifier, and unusable data.
    """
    chosen = _choose(cell)
    cell = resolve_encoder(cell)
    return _create(cell, create_classifier(cell), chosen)


def attach_encoder(cell: Cell, model: nn.Module) -> Encoder:
    """Return a quantized encoder with its data; its features are not compared with those in full precision.

    Args:
        cell: cell with the complete preprocessing of `Encoder.preprocessing`; its model is for messages alone.
        model: from `adfq.load`.

    Raises:
        AdfqError: as `load_encoder`.
    """
    return _create(cell, model, {**_choose(cell), "compared": False})


def _create(cell: Cell, model: Any, chosen: Mapping[str, Any]) -> Encoder:
    if getattr(model, "num_classes", 0):
        raise AdfqError(
            f"{cell.model} has a classifier of {model.num_classes} classes: task classification measures it"
        )
    encoder = Encoder(**open_images(cell, model, classes=None, calibrated=True), **chosen)
    assert encoder.train is not None
    if encoder.head_images is not None and encoder.head_images > len(encoder.train):
        raise AdfqError(f"--head-images is {encoder.head_images}, the train split has {len(encoder.train)} images")
    with torch.inference_mode():  # before the work, not behind it
        features_of(model, torch.zeros(1, *encoder.preprocessing["input_size"]), encoder.features)
    return encoder


def _choose(cell: Cell) -> dict[str, Any]:
    given = dict(cell.task_arguments)
    head, features, head_images = (given.get(name) for name in ("head", "features", "head_images"))
    if head is not None and head not in HEADS:
        raise AdfqError(f"unknown head {head!r}; there are {', '.join(HEADS)}")
    if features is not None and features not in FEATURES:
        raise AdfqError(f"unknown features {features!r}; there are {', '.join(FEATURES)}")
    if head_images is not None and (not isinstance(head_images, int) or head_images < 1):
        raise AdfqError(f"the number of head images is a whole number from 1; it is {head_images!r}")
    return {"heads": tuple(HEADS) if head is None else (head,), "features": features, "head_images": head_images}
