"""Graphs that models are exported as: a classifier, an image encoder, a decoder of masks, a backbone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adfq.adapters import copy_around_tensors, family_of
from adfq.errors import AdfqError

IMAGES = "images"

_SAM = "segment_anything.modeling.sam.Sam"
_ENCODERS = ("segment_anything.modeling.image_encoder.ImageEncoderViT", "adfq.adapters.mobile_sam.MobileSamEncoder")
_BACKBONE = "mmdet.models.backbones.swin.SwinTransformer"
_DETECTOR = "mmdet.models.detectors.base.BaseDetector"


@dataclass(frozen=True)
class Graph:
    """Part of a model that becomes one ONNX file.

    Attributes:
        kind: ``"classifier"``, ``"encoder"`` (one vector an image), ``"image_encoder"`` or ``"mask_decoder"`` of
            Segment Anything, or ``"backbone"``.
        module: the part, on the CPU, float32, in evaluation mode.
        inputs: an example of each input by name. Dimensions without a fixed size are 2 or more in it, because torch
            takes 1 for a fixed size.
        outputs: names of the outputs.
        dynamic: names of the dimensions without a fixed size, by input and index.
    """

    kind: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]


class FeatureMaps(nn.Module):
    """Backbone whose feature maps are a tuple.

    Args:
        backbone: module with a list or tuple of feature maps as output.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return feature maps.

        Args:
            images: B×3×H×W.
        """
        return tuple(self.backbone(images))


class PromptedDecoder(nn.Module):
    """Prompt encoder and mask decoder of Segment Anything, for prompts of one image.

    Args:
        sam: segment_anything's Sam, whose parameters are shared.
    """

    positions: Tensor

    def __init__(self, sam: Any) -> None:
        super().__init__()
        from segment_anything.utils.onnx import SamOnnxModel

        rest = copy.copy(sam)
        rest._modules = dict(sam._modules)
        self.prompts = SamOnnxModel(rest, return_single_mask=False)
        # Every module is here by one name, and all are run: initializers have these names.
        del self.prompts.mask_decoder, rest.image_encoder
        with torch.no_grad():
            self.register_buffer("positions", sam.prompt_encoder.get_dense_pe())

    def forward(self, embeddings: Tensor, point_coords: Tensor, point_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mask logits, P×M×4h×4w, and predicted IoU, P×M.

        Args:
            embeddings: 1×C×h×w, of the image.
            point_coords: P×N×2: x, y in pixels of the image encoder's input.
            point_labels: P×N: 0 for background, 1 for the object, 2 and 3 for a box's upper left and lower right
                corner, -1 for padding.
        """
        # segment_anything's own pass, since that of the adapter, which takes prompts of several images, fixes P.
        dense = self.prompts.model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        masks, iou = self.prompts.model.mask_decoder.predict_masks(
            image_embeddings=embeddings,
            image_pe=self.positions,
            sparse_prompt_embeddings=self.prompts._embed_points(point_coords, point_labels),
            dense_prompt_embeddings=dense,
        )
        return masks, iou


def exported_part(model: nn.Module) -> nn.Module:
    """Return the part of a model that is exported: the backbone of a detector, all of others.

    Args:
        model: quantized model.
    """
    return model.get_submodule("backbone") if family_of(model) == _DETECTOR else model


def image_graph(kind: str, module: nn.Module, input_size: tuple[int, ...], *outputs: str) -> Graph:
    """Return a graph with the input ``images`` alone, any number of them.

    Args:
        kind: see `Graph`.
        module: see `Graph`.
        input_size: shape of an image: channels, height and width in pixels.
        *outputs: names of the outputs.
    """
    return Graph(kind, module, {IMAGES: torch.zeros(2, *input_size)}, outputs, {IMAGES: {0: "batch"}})


def graphs_of(model: nn.Module, input_size: tuple[int, int, int]) -> list[Graph]:
    """Return the graphs of a model.

    Args:
        model: part from `exported_part`, on the CPU, float32, in evaluation mode.
        input_size: channels, height and width in pixels, from `resolve_size`.
    """
    family = family_of(model)
    if family == _SAM:
        encoder: Any = model.get_submodule("image_encoder")
        return [image_graph("image_encoder", encoder, input_size, "embeddings"), _decoder_of(model)]
    if family in _ENCODERS:
        return [image_graph("image_encoder", model, input_size, "embeddings")]
    if family == _BACKBONE:
        backbone: Any = copy_around_tensors(model)  # the caller's stays as it is
        for module in backbone.modules():
            if hasattr(module, "window_reverse"):
                module.window_reverse = partial(_merge_windows, module.window_size)
        names = (f"features_{index}" for index in range(len(backbone.out_indices)))
        return [image_graph("backbone", FeatureMaps(backbone), input_size, *names)]
    kind = "classifier" if getattr(model, "num_classes", 0) else "encoder"
    return [image_graph(kind, model, input_size, "logits")]


def _merge_windows(size: int, windows: Tensor, height: int, width: int) -> Tensor:
    """Return MMDetection's `ShiftWindowMSA.window_reverse`, whose division in float fixes the number of images."""
    rows, columns = height // size, width // size
    grid: Tensor = windows.unflatten(0, (-1, rows, columns))
    return grid.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def _decoder_of(sam: Any) -> Graph:
    height, width = sam.prompt_encoder.image_embedding_size
    embeddings = torch.zeros(1, sam.prompt_encoder.embed_dim, height, width)
    inputs = {"embeddings": embeddings, "point_coords": torch.zeros(3, 2, 2), "point_labels": torch.ones(3, 2)}
    axes = {0: "prompts", 1: "points"}
    return Graph(
        "mask_decoder",
        PromptedDecoder(sam),
        inputs,
        ("masks", "iou"),
        {"embeddings": {}, "point_coords": axes, "point_labels": axes},
    )


def resolve_size(
    model: nn.Module, described: tuple[int, int, int], wanted: tuple[int, int] | None
) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a model is exported for.

    Args:
        model: part from `exported_part`.
        described: size of the model's `Architecture`.
        wanted: height and width in pixels; None to take the model's own.

    Raises:
        AdfqError: for a size of a model that has its own, for one that is missing or unusable, and for a model of an
            unknown kind.
    """
    family, part = family_of(model), type(model).__name__
    if family == _BACKBONE:
        if wanted is None:
            raise AdfqError(
                f"a {part} takes images of any size: give input_size, the height and width to export it for"
            )
        numbers = all(type(number) is int and 1 <= number <= 2**16 for number in wanted)
        if len(wanted) != 2 or not numbers:
            raise AdfqError(f"input_size is height and width in pixels, whole numbers from 1; it is {wanted}")
        return 3, *wanted
    if family == _SAM or family in _ENCODERS:
        encoder: Any = model.get_submodule("image_encoder") if family == _SAM else model
        side = getattr(encoder, "img_size", 0)
        described = 3, side, side
    elif not family.startswith("timm."):
        raise AdfqError(f"a {part} cannot be exported: there is no ONNX graph for {family}")
    if wanted is not None:
        raise AdfqError(f"a {part} takes images of {described[1]}×{described[2]} alone; leave out input_size")
    return described


def has_decoder(model: nn.Module) -> bool:
    """Return True for a model with a mask decoder, which has a file of its own.

    Args:
        model: quantized model.
    """
    return family_of(model) == _SAM
