"""Writer of results/bench/calibration.csv: peak memory of calibration by model, method, and number of images.

python scripts/measure_memory.py MODEL METHOD IMAGES BATCH [--data SPEC] [--checkpoint FILE] [--method-arg NAME=N …]

One call measures one row, in a process of its own, and adds it to the file. A classifier has random weights and images;
Segment Anything has images of a COCO folder, and random weights without a checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adfq.api import quantize
from adfq.bits import Bits
from benchmarks.run.allocator import freed_memory_given_back
from benchmarks.run.cost import peak_memory
from benchmarks.run.provenance import environment

FILE = Path(__file__).resolve().parents[1] / "results" / "bench" / "calibration.csv"
COLUMNS = ("commit", "model", "size", "method", "arguments", "images", "batch", "peak_mb", "seconds", "threads")


def open_classifier(name: str) -> tuple[nn.Module, int, Iterator[Tensor]]:
    """Return a classifier with random weights, the side of its images in pixels, and such images one by one."""
    import timm

    model = timm.create_model(name).eval()
    side = model.pretrained_cfg["input_size"][-1]
    generator = torch.Generator().manual_seed(1)
    return model, side, iter(lambda: torch.randn(1, 3, side, side, generator=generator), None)


def open_sam(name: str, data: str, checkpoint: str | None) -> tuple[nn.Module, int, Iterator[Tensor]]:
    """Return a model of Segment Anything, the side of its images in pixels, and training images one by one."""
    from benchmarks.cell import Cell
    from benchmarks.tasks import load_subject

    file = checkpoint or _random_checkpoint(name)
    cell = Cell.create(task="segmentation", model=name, data=data, checkpoint=file, method="full_precision")
    subject: Any = load_subject(cell)
    return subject.model, 1024, subject.calibration_batches(len(subject.train.images), 0, 1)


def _random_checkpoint(name: str) -> str:
    import tempfile

    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    file = Path(tempfile.mkdtemp()) / f"{name}.pt"
    torch.save(sam_model_registry[name]().state_dict(), file)
    return str(file)


def main() -> None:
    """Measure a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("method")
    parser.add_argument("images", type=int)
    parser.add_argument("batch", type=int)
    parser.add_argument("--data")
    parser.add_argument("--checkpoint")
    parser.add_argument("--bits", default="W4A4")
    parser.add_argument("--method-arg", nargs="*", default=[])
    parser.add_argument("--file", type=Path, default=FILE)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    classifier = asked.data is None
    model, side, images = (
        open_classifier(asked.model) if classifier else open_sam(asked.model, asked.data, asked.checkpoint)
    )
    arguments = {name: int(value) for name, _, value in (text.partition("=") for text in asked.method_arg)}
    bits = Bits.parse(asked.bits)

    def batches() -> Iterator[Tensor]:
        for start in range(0, asked.images, asked.batch):
            yield torch.cat([next(images) for _ in range(min(asked.batch, asked.images - start))])

    with freed_memory_given_back(), peak_memory(torch.device("cpu")) as peak:
        start = time.perf_counter()
        quantize(
            model,
            asked.method,
            bits.weight,
            bits.activation,
            calibration=batches(),
            calibration_size=asked.images,
            **arguments,
        )
        seconds = time.perf_counter() - start
    row = (
        *(environment(torch.device("cpu"))["commit"], asked.model, side, asked.method, " ".join(asked.method_arg)),
        *(asked.images, asked.batch, round(peak.megabytes or 0), round(seconds), torch.get_num_threads()),
    )
    is_new = not asked.file.exists()
    with open(asked.file, "a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow(row)
    print(*row)


if __name__ == "__main__":
    main()
