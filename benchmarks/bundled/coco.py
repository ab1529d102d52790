"""Scenes with several objects as a data set in COCO's format.

python -m benchmarks.bundled.coco DIRECTORY --train 12000 --val 200
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from benchmarks.bundled.scenes import CATEGORIES, Scene, draw_scene

IMAGE_SIZE = 96
MAX_OBJECTS = 3
RADIUS = (0.17, 0.30)  # the classifiers' objects, in pixels
MIN_PIXELS = 64  # objects with fewer visible pixels cannot be told apart; they count as COCO's crowds do, neither way

#: Names of the splits, which are those of COCO's folders and files.
SPLITS = ("train2017", "val2017")


def write_coco(root: Path, counts: Mapping[str, int]) -> None:
    """Draw scenes and write them as ``ROOT/SPLIT/*.png`` and ``ROOT/annotations/instances_SPLIT.json``.

    Args:
        root: folder of the data set; created if missing.
        counts: number of images by split of `SPLITS`. A larger data set begins with the images of a smaller one.
    """
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        (root / split).mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in tqdm(range(count), desc=f"drawing {split}", unit="image", delay=2, leave=False, disable=None):
            # The third number keeps these scenes apart from those of classification.
            scene = draw_scene((SPLITS.index(split), index, 1), IMAGE_SIZE, MAX_OBJECTS, RADIUS)
            name = f"{index:06d}.png"
            Image.fromarray(scene.image).save(root / split / name)
            images.append({"id": index, "file_name": name, "height": IMAGE_SIZE, "width": IMAGE_SIZE})
            annotations += _annotate(scene, index, len(annotations))
        categories = [{"id": index, "name": name} for index, name in enumerate(CATEGORIES, 1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _annotate(scene: Scene, image: int, first: int) -> list[dict[str, Any]]:
    annotations = []
    for number, found in enumerate(scene.objects, first + 1):
        x0, y0, x1, y1 = found.box
        annotations.append(
            {
                "id": number,
                "image_id": image,
                "category_id": found.category + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(found.mask.sum()),
                "iscrowd": int(found.mask.sum() < MIN_PIXELS),
                "segmentation": encode_mask(found.mask),
            }
        )
    return annotations


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Return a mask as COCO's compressed run lengths, of JSON's types.

    Args:
        mask: H×W.
    """
    encoded: dict[str, Any] = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Writes scenes as a data set in COCO's format.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train", type=int, default=12_000)
    parser.add_argument("--val", type=int, default=200)
    arguments = parser.parse_args()
    write_coco(arguments.directory, {"train2017": arguments.train, "val2017": arguments.val})


if __name__ == "__main__":
    main()
