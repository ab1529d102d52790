"""Classification images and classifiers that ship with the project."""

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
    """Classifier that ships with the project.

    Attributes:
        architecture: timm's name of the architecture.
        arguments: keyword arguments of timm's factory.
        weights: name of the file with the weights in `WEIGHTS`.
        preprocessing: preprocessing in training, in the terms of timm's `resolve_data_config`.
    """

    architecture: str
    arguments: Mapping[str, Any]
    weights: str
    preprocessing: Mapping[str, Any]

    @property
    def checkpoint(self) -> Path:
        """Path of the weights."""
        return WEIGHTS / self.weights

    def create(self, checkpoint: Path | None = None) -> nn.Module:
        """Build the model through timm's factory.

        Args:
            checkpoint: file with the weights; None, the default, for random ones.
        """
        import timm

        model: nn.Module = timm.create_model(self.architecture, checkpoint_path=str(checkpoint or ""), **self.arguments)
        return model


_PREPROCESSING = {"mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
_COMMON = {"img_size": IMAGE_SIZE, "num_classes": len(CATEGORIES)}

# Deep and narrow models have many layers for errors to add up in, as real ones have.
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
    """Data set of scenes with one object each, as pairs (image, category); images are drawn on access.

    Args:
        split: ``"train"`` or ``"validation"``.
        transform: applied to the PIL image, as in torchvision's data sets; None, the default, for none.
        tilt: greatest angle of the objects in radians, see `draw_scene`.
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
    """Return images augmented without a change of category: mirrored, with exchanged colours, moved by up to 4 pixels.

    Args:
        images: N×3×H×W. The whole batch is transformed alike; batches differ.
        generator: source of randomness.
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
