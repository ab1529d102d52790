"""The architectures of the paper's tables at their full size, with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import adfq
from benchmarks.cli.main import main
from benchmarks.plan import load_table

#: The smallest of each family, for every method.
SMALL = ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]

#: The others, for the methods of the paper: every method would take hours.
LARGE = [
    "deit_small_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
]
PAPER = [row.method for row in load_table("1").rows]

#: Options on the command line with which full-size models take no hours.
_QUICK = {
    **{key: ["iterations=1", "optimize_batch_size=1"] for key in ("adfq_vit", "fima_q", "iasvit", "qdrop")},
    **{key: ["iterations=1", "mlp_iterations=1", "optimize_batch_size=1"] for key in ("aphq_vit", "glf_q")},
    "adalog": ["rounds=1"],
    "ptq4vit": ["rounds=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_methods_quantize_and_run(name: str, quick: Mapping[str, dict[str, Any]]) -> None:
    model = timm.create_model(name).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(images)
        for method in adfq.methods() if name in SMALL else PAPER:
            logits = adfq.quantize(model, method, 8, 8, images, **quick[method])(images)
            assert torch.isfinite(logits).all()
            # Uniform quantizers come close at 8 bits; shift-log's levels are √2 apart at any bit-width.
            if method != "adfq_vit":
                assert (logits - expected).norm() <= 0.3 * expected.norm(), method


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in adfq.methods() if name != adfq.methods()[0]])
def test_every_method_quantizes_a_detector_on_real_images(
    method: str, real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mmdet")
    from benchmarks.tasks.detection.models import build_detector, open_config

    torch.manual_seed(0)
    state = build_detector(open_config("mask_rcnn_swin_tiny")).state_dict()
    torch.save({"meta": {"epoch": 36}, "state_dict": state}, tmp_path / "mask_rcnn_swin_tiny.pth")
    model = ["--model", "mask_rcnn_swin_tiny", "--checkpoint", str(tmp_path / "mask_rcnn_swin_tiny.pth")]
    options = _QUICK.get(method)
    command = ["run", "detection", *model, "--data", str(real_data / "coco"), "--method", method, "--bits", "W4A4"]
    further = ["--calibration-size", "1", "--limit", "1", *(["--method-arg", *options] if options else [])]
    assert main([*command, *further, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["images"] == 1
    errors = [metrics[f"feature_error_{stage}"] for stage in range(1, 5)]
    print(f"{method}: backbone features off by {errors}")  # for -rP
    assert all(0 < error < 1 for error in errors), errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [*(("mobile_sam", method) for method in adfq.methods()), *(("vit_b", method) for method in PAPER)],
)
def test_methods_quantize_sam_on_a_real_image(
    name: str, method: str, real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("segment_anything")
    from segment_anything import sam_model_registry

    file = real_data / "sam" / "mobile_sam.pt"
    if name == "vit_b":
        torch.manual_seed(0)
        file = tmp_path / "vit_b.pth"
        torch.save(sam_model_registry["vit_b"]().state_dict(), file)
    model = ["--model", name, "--checkpoint", str(file), "--data", str(real_data / "coco")]
    options = _QUICK.get(method)
    further = ["--calibration-size", "1", "--limit", "1", *(["--method-arg", *options] if options else [])]
    assert main(["run", "segmentation", *model, "--method", method, *further, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    print(f"{method}: {metrics}")  # for -rP
    assert metrics["images"] == 1
    assert metrics["instances"] > 1
    assert 0 <= metrics["mean_iou"] < 100


@pytest.mark.slow
@pytest.mark.parametrize(("method", "least"), [("full_precision", 70.0), ("adfq_vit", 60.0)])
def test_mobile_sam_on_real_images(
    method: str, least: float, real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("segment_anything")
    checkpoint = str(real_data / "sam" / "mobile_sam.pt")
    model = ["--model", "mobile_sam", "--checkpoint", checkpoint, "--data", str(real_data / "coco")]
    further = ["--calibration-size", "2", "--limit", "8", "--bits", "W6A6"]
    options = ["--method-arg", "iterations=0"] if method == "adfq_vit" else []
    assert main(["run", "segmentation", *model, "--method", method, *further, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["mean_iou"] > least


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_optimization_at_full_size(name: str) -> None:
    model = timm.create_model(name).eval()
    images = torch.randn(8, 3, 224, 224)
    options = {"iterations": 8, "optimize_batch_size": 4, "rounding_learning_rate": 0.1, "step_learning_rate": 1e-2}
    with torch.no_grad():
        optimized = adfq.quantize(model, "adfq_vit", 4, 4, images, **options)
        assert torch.isfinite(optimized(images)).all()
    modules = optimized.quantization.report["modules"].values()  # type: ignore[union-attr]
    assert sum(module["kept"] for module in modules) > len(modules) / 2
    assert all(module["after"] < module["before"] for module in modules if module["kept"])


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's layout with one picture a class."""
    root = tmp_path_factory.mktemp("imagenet")
    picture = Image.effect_noise((256, 240), 80).convert("RGB")
    for split in ("train", "val"):
        for index in range(1000):
            folder = root / split / f"n{index:08d}"
            folder.mkdir(parents=True)
            picture.save(folder / "picture.jpg")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("key", ["deit_tiny", "swin_tiny"])
def test_the_full_profile_reads_imagenets_layout_and_local_weights(
    key: str, imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(model.name for model in load_table("1", "full").models if model.key == key)
    torch.save({"model": timm.create_model(name).state_dict()}, tmp_path / f"{name}.pth")
    command = ["table", "1", "--profile", "full", "--data", f"folder:{imagenet}", "--checkpoints", str(tmp_path)]
    small = ["--models", key, "--methods", "base_ptq", "repq_vit", "--bits", "W4A4", "--limit", "4"]
    assert main([*command, *small, "--calibration-size", "2", "--store", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "Measured on 4 images" in text
    assert "‡ Does not count" in text  # random weights are not the published model
