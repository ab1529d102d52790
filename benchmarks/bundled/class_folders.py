"""Scenes with one object each as class folders, as many as wanted.

python -m benchmarks.bundled.class_folders DIRECTORY --train 24000 --val 20000
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from benchmarks.bundled.classifiers import IMAGE_SIZE
from benchmarks.bundled.scenes import CATEGORIES, draw_scene

#: Names of the splits, which are those of their folders.
SPLITS = ("train", "val")


def write_class_folders(root: Path, counts: Mapping[str, int]) -> None:
    """Draw scenes and write them as ``ROOT/SPLIT/CLASS/*.png``.

    The natural order of the folders is that of the bundled classifiers' classes. A split begins with the images of
    `benchmarks.bundled.classifiers.SceneClassification`.

    Args:
        root: folder of the data set; created if missing.
        counts: number of images by split of `SPLITS`. A larger data set begins with the images of a smaller one.
    """
    for split, count in counts.items():
        folders = [root / split / f"{index:02d}_{name.replace(' ', '_')}" for index, name in enumerate(CATEGORIES)]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for index in tqdm(range(count), desc=f"drawing {split}", unit="image", delay=2, leave=False, disable=None):
            scene = draw_scene((SPLITS.index(split), index), IMAGE_SIZE)
            Image.fromarray(scene.image).save(folders[scene.objects[0].category] / f"{index:06d}.png")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Writes scenes with one object each as class folders.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train", type=int, default=24_000)
    parser.add_argument("--val", type=int, default=2_000)
    arguments = parser.parse_args()
    write_class_folders(arguments.directory, {"train": arguments.train, "val": arguments.val})


if __name__ == "__main__":
    main()
