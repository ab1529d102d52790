"""The classification images and classifiers that ship with the project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.bundled.scenes import CATEGORIES, TILT, draw_scene

IMAGE_SIZE = 64
SPLIT_SIZES: Mapping[str, int] = {"train": 24_000, "validation": 2_000}
WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Classifier:
    """A timm architecture by name and keyword arguments, the file in `WEIGHTS` that holds its weights, and the
    preprocessing that they were trained with, in the terms of timm's `resolve_data_config`."""

    architecture: str
    arguments: Mapping[str, Any]
    weights: str
    preprocessing: Mapping[str, Any]

    @property
    def checkpoint(self) -> Path:
        return WEIGHTS / self.weights

    def create(self, checkpoint: Path | None = None) -> nn.Module:
        """Builds the model through timm's factory, with the given weights or random ones."""
        import timm

        model: nn.Module = timm.create_model(self.architecture, checkpoint_path=str(checkpoint or ""), **self.arguments)
        return model


_PREPROCESSING = {"mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
_COMMON = {"img_size": IMAGE_SIZE, "num_classes": len(CATEGORIES)}

# Deep and narrow, as the real ones look from a quantizer's side: many layers for errors to add up in.
CLASSIFIERS: Mapping[str, Classifier] = {
    "bundled_vit": Classifier(
        "vit_tiny_patch16_224",
        {**_COMMON, "patch_size": 8, "embed_dim": 64, "depth": 12, "num_heads": 4, "mlp_ratio": 2},
        "bundled_vit.safetensors",
        _PREPROCESSING,
    ),
    "bundled_swin": Classifier(
        "swin_tiny_patch4_window7_224",
        {**_COMMON, "patch_size": 4, "window_size": 4, "embed_dim": 32, "depths": (2, 2, 6), "num_heads": (2, 4, 8)},
        "bundled_swin.safetensors",
        _PREPROCESSING,
    ),
}


class SceneClassification(Dataset[tuple[Any, int]]):
    """Scenes with one object each, as (image, category); images are drawn when asked for.

    Args:
        split: ``"train"`` or ``"validation"``.
        transform: applied to the PIL image, as torchvision's data sets do.
        tilt: of the objects, `draw_scene`.
    """

    def __init__(self, split: str, transform: Callable[[Image.Image], Any] | None = None, tilt: float = TILT) -> None:
        self.split = split
        self.transform = transform
        self.tilt = tilt

    def __len__(self) -> int:
        return SPLIT_SIZES[self.split]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        seed = (list(SPLIT_SIZES).index(self.split), index)
        pixels, category = _draw(seed, self.tilt)
        image = Image.fromarray(pixels)
        return (self.transform(image) if self.transform else image), category


@lru_cache(maxsize=4096)  # every method is measured on the same pictures, and drawing costs more than a forward pass
def _draw(seed: tuple[int, int], tilt: float) -> tuple[NDArray[np.uint8], int]:
    scene = draw_scene(seed, size=IMAGE_SIZE, tilt=tilt)
    return scene.image, scene.objects[0].category


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """What never changes a category: mirroring the picture, exchanging its colours, moving it.

    Args:
        images: N×3×H×W. The whole batch is transformed alike; batches differ.
        generator: source of the randomness.
    """

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    images = images[:, torch.randperm(3, generator=generator)]
    if draw(2):
        images = images.flip(3)
    reach = 4
    padded = nn.functional.pad(images, (reach,) * 4, mode="reflect")
    top, left = draw(2 * reach + 1), draw(2 * reach + 1)
    return padded[:, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
