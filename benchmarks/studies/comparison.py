"""Comparison of an exported model in onnxruntime with the simulation: agreement, size, speed."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from adfq.adapters import create
from adfq.api import Quantization
from adfq.errors import AdfqError
from adfq.export import file_size
from adfq.export.graphs import exported_part, graphs_of, resolve_size
from adfq.export.trace import trace
from benchmarks.studies.deployment import OnnxModel, count_integer_products, measure
from benchmarks.tasks import Subject
from benchmarks.tasks.masks import cocotools

_CPU = torch.device("cpu")
_FEATURE_IMAGES = 4

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Kind:
    """Comparison of the models of one task.

    Attributes:
        compare: function from the quantized model, the exported files, the subject, the number of images and the batch
            size to metrics.
        describe: function from metrics to a sentence.
        batches: numbers of images at once that are timed.
        sized: True for models that are exported at the size of the images at hand; False by default.
    """

    compare: Callable[[nn.Module, Sequence[Path], Subject, int, int], Metrics]
    describe: Callable[[Metrics], str]
    batches: tuple[int, ...]
    sized: bool = False


def _compare_classes(model: nn.Module, files: Sequence[Path], subject: Subject, limit: int, batch_size: int) -> Metrics:
    classes, metrics = [], []
    for each in (model, OnnxModel(files[0])):
        predicted: list[Tensor] = []
        hook = each.register_forward_hook(lambda _, __, logits, into=predicted: into.append(logits.argmax(1)))
        metrics.append(subject.evaluate(each, _CPU, limit, batch_size))
        hook.remove()
        classes.append(torch.cat(predicted))
    agreement = 100 * float((classes[0] == classes[1]).double().mean())
    tops = {"simulated": metrics[0]["top1"], "exported": metrics[1]["top1"]}
    return {"images": metrics[0]["images"], "agreement": agreement, **tops}


def _describe_classes(found: Metrics) -> str:
    return (
        f"top-1 agrees with the simulation on {found['agreement']:.2f} % of {found['images']} images: "
        f"{found['simulated']:.2f} % simulated, {found['exported']:.2f} % in onnxruntime"
    )


def _compare_masks(model: nn.Module, files: Sequence[Path], subject: Any, limit: int, batch_size: int) -> Metrics:
    masks, metrics = [], []
    with TemporaryDirectory() as folder:
        writing = dataclasses.replace(subject, results=str(Path(folder, "found")))
        for each in (model, exported_sam(model, *files)):
            metrics.append(writing.evaluate(each, _CPU, limit, batch_size))
            found = json.loads(Path(folder, "found.segm.json").read_bytes())
            masks.append([item["segmentation"] for item in found])
    agreement = 100 * float(np.mean([_iou(*pair) for pair in zip(*masks, strict=True)]))
    ious = {"simulated": metrics[0]["mean_iou"], "exported": metrics[1]["mean_iou"]}
    return {"images": metrics[0]["images"], "instances": len(masks[0]), "agreement": agreement, **ious}


def _iou(mask: Any, other: Any) -> float:
    """Return the IoU of two masks in run lengths; 1 for two empty ones."""
    tools = cocotools("mask")
    return float(tools.iou([mask], [other], [0])[0, 0]) if tools.area([mask, other]).any() else 1.0


def _describe_masks(found: Metrics) -> str:
    return (
        f"masks have a mean IoU of {found['agreement']:.2f} % with the simulation's, over {found['instances']} objects "
        f"in {found['images']} images; with the ground truth {found['simulated']:.2f} % simulated, "
        f"{found['exported']:.2f} % in onnxruntime"
    )


@torch.inference_mode()
def _compare_features(model: nn.Module, files: Sequence[Path], subject: Subject, limit: int, _: int) -> Metrics:
    images = subject.evaluation_images(min(limit, _FEATURE_IMAGES))
    outputs = []
    channels, height, width = images.shape[1:]
    simulated = graphs_of(exported_part(model), (channels, height, width))[0].module
    for each in (simulated, OnnxModel(files[0])):
        found = each(images)
        outputs.append([found] if isinstance(found, Tensor) else list(found))
    errors = (
        100 * float((found - expected).norm() / expected.norm()) for expected, found in zip(*outputs, strict=True)
    )
    return {"images": len(images), **{f"error_{index}": error for index, error in enumerate(errors)}}


def _describe_features(found: Metrics) -> str:
    errors = ", ".join(f"{value:.3f}" for name, value in found.items() if name.startswith("error_"))
    return f"features differ from the simulation's by {errors} % (relative error) on {found['images']} images"


#: Comparisons by the name of the task.
KINDS: Mapping[str, Kind] = {
    "classification": Kind(_compare_classes, _describe_classes, (1, 8)),
    "encoders": Kind(_compare_features, _describe_features, (1, 8)),
    "segmentation": Kind(_compare_masks, _describe_masks, (1,)),
    "detection": Kind(_compare_features, _describe_features, (1,), sized=True),
}


def kind_of(task: str) -> Kind:
    """Return the comparison of a task.

    Args:
        task: name of a task.

    Raises:
        AdfqError: for a task without one.
    """
    if task not in KINDS:
        raise AdfqError(f"models of task {task} cannot be compared with their export; those of {', '.join(KINDS)} can")
    return KINDS[task]


def size_of(kind: Kind, subject: Subject, limit: int) -> tuple[int, int] | None:
    """Return height and width to export a model for; None where the model has its own.

    Args:
        kind: comparison of the subject's task.
        subject: model with its data.
        limit: number of evaluation images, the first ones.
    """
    if not kind.sized:
        return None
    height, width = subject.evaluation_images(min(limit, _FEATURE_IMAGES)).shape[2:]
    return height, width


class _Prompts(nn.Module):
    """Prompt encoder of an exported Sam, whose decoder takes coordinates and labels."""

    def get_dense_pe(self) -> None:
        """Return nothing: the positions are in the decoder's file."""

    def forward(self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: None) -> tuple[Tensor, Tensor]:
        """Return coordinates, P×N×2, and labels, P×N."""
        coordinates, labels = [], []
        if points is not None:
            coordinates.append(points[0])
            labels.append(points[1])
        if boxes is None:
            coordinates.append(torch.zeros_like(coordinates[0][:, :1]))
            labels.append(-torch.ones_like(labels[0][:, :1]))
        else:
            coordinates.append(boxes.reshape(-1, 2, 2))
            labels.append(torch.tensor([2.0, 3.0]).expand(len(boxes), -1))
        return torch.cat(coordinates, 1).float(), torch.cat(labels, 1).float()


class _Decoder(nn.Module):
    """Mask decoder of an exported Sam."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.runtime = OnnxModel(file)

    def forward(self, image_embeddings: Tensor, multimask_output: bool, **prompts: Any) -> tuple[Tensor, Tensor]:
        """Return mask logits and predicted IoU as segment_anything's MaskDecoder does."""
        coordinates, labels = prompts["sparse_prompt_embeddings"], prompts["dense_prompt_embeddings"]
        masks, iou = self.runtime.run(embeddings=image_embeddings, point_coords=coordinates, point_labels=labels)
        chosen = slice(1, None) if multimask_output else slice(1)
        return masks[:, chosen], iou[:, chosen]


def exported_sam(sam: nn.Module, encoder: Path, decoder: Path) -> nn.Module:
    """Return a Sam that runs in onnxruntime, for segment_anything's SamPredictor.

    Args:
        sam: model that was exported.
        encoder: the image encoder's file.
        decoder: the decoder's file.
    """
    images: Any = OnnxModel(encoder)
    images.img_size = cast(Any, sam).image_encoder.img_size
    exported = copy.copy(sam)
    exported._modules = {"image_encoder": images, "prompt_encoder": _Prompts(), "mask_decoder": _Decoder(decoder)}
    return exported


def compare(
    saved: Path, files: Sequence[Path], kind: Kind, subject: Subject, limit: int, batch_size: int
) -> dict[str, Any]:
    """Compare an exported model with the simulation and with full precision.

    Args:
        saved: file that the subject's model was loaded from.
        files: the model's ONNX files.
        kind: comparison of the subject's task.
        subject: the quantized model with its data.
        limit: number of evaluation images, the first ones.
        batch_size: images a batch.

    Returns:
        ``metrics`` of the kind; ``integer``, the number of products on integers; ``models``: by name, ``size`` in MB,
        and by batch size the median of milliseconds an image. That of Segment Anything is the image encoder's.

    Raises:
        AdfqError: for images that cannot be read.
    """
    model = subject.model
    metrics = kind.compare(model, files, subject, limit, batch_size)
    image = subject.evaluation_images(min(limit, _FEATURE_IMAGES) if kind.sized else 1)[:1]
    # A file holds no float weights any more, and size and time do not depend on which ones these are.
    architecture = cast(Quantization, model.quantization).architecture
    full = create(architecture)
    full.eval()
    part = exported_part(full)
    height, width = image.shape[2:]
    size = resolve_size(part, architecture.input_size, (height, width) if kind.sized else None)
    graphs = graphs_of(part, size)
    with TemporaryDirectory() as folder:
        for index, graph in enumerate(graphs):
            trace(graph).save(Path(folder) / f"{index}.onnx")
        total = sum(path.stat().st_size for path in Path(folder).iterdir())
        runtime = OnnxModel(Path(folder) / "0.onnx")
    simulated = graphs_of(exported_part(model), size)[0].module
    sizes = {
        "float32, torch": 4 * sum(parameter.numel() for parameter in part.parameters()),
        "float32, onnxruntime": total,
        "simulated, torch": saved.stat().st_size,
        "int8, onnxruntime": sum(map(file_size, files)),
    }
    models = dict(zip(sizes, (graphs[0].module, runtime, simulated, OnnxModel(files[0])), strict=True))
    milliseconds = measure(models, image, kind.batches)
    return {
        "metrics": metrics,
        "integer": sum(map(count_integer_products, files)),
        "models": {name: {"size": size / 1e6, **milliseconds[name]} for name, size in sizes.items()},
    }
