"""Encoders without a classifier are judged by heads on their features, in full precision and quantized alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import adfq
from adfq import AdfqError
from benchmarks.cell import Cell
from benchmarks.cli.main import main
from benchmarks.tasks import load_quantized, load_subject, save_quantized
from benchmarks.tasks.classification.task import load_classification
from benchmarks.tasks.encoders.heads import HEADS
from benchmarks.tasks.encoders.models import ENCODERS, resolve_encoder
from benchmarks.tasks.encoders.task import Encoder, features_of, load_encoder

CPU = torch.device("cpu")
VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 3}
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}


def create_cell(model: str = "vit_tiny_patch16_224", arguments: dict[str, Any] | None = None, **fields: Any) -> Cell:
    fields = {"data": "bundled", "method": "full_precision", "limit": 16, **fields}
    arguments = VIT if arguments is None else arguments
    return Cell.create(task="encoders", model=model, model_arguments=tuple(sorted(arguments.items())), **fields)


@pytest.fixture
def load() -> Callable[..., Encoder]:
    def load(**given: Any) -> Encoder:
        options = {name: given.pop(name) for name in ("head", "features") if name in given}
        return load_encoder(create_cell(task_arguments=tuple(sorted({**options, "head_images": 24}.items())), **given))

    return load


def test_full_precision_is_its_own_reference(load: Callable[..., Encoder]) -> None:
    subject = load()
    metrics, correct = subject.evaluate_images(subject.model, CPU, limit=16, batch_size=10)
    assert {name: 100 * bits.mean() for name, bits in correct.items()}.items() <= metrics.items()
    assert len(correct) == len(HEADS)
    assert metrics["feature_error"] == 0
    assert metrics["feature_cosine"] == pytest.approx(1)
    assert (metrics["images"], metrics["head_images"]) == (16, 24)
    assert {f"{head}_top1" for head in HEADS} < metrics.keys()


def test_accuracy_is_that_of_the_head_on_the_features(load: Callable[..., Encoder]) -> None:
    subject = load(head="ridge")
    metrics = subject.evaluate(subject.model, CPU, limit=16, batch_size=16)
    assert subject.train is not None
    chosen = sorted(torch.randperm(24_000, generator=torch.Generator().manual_seed(0))[:24].tolist())
    with torch.no_grad():
        train, found = (
            subject.model(torch.stack([split[index][0] for index in indices])).double()
            for split, indices in ((subject.train, chosen), (subject.validation, range(16)))
        )
    labels = torch.tensor([subject.train[index][1] for index in chosen])
    hits = HEADS["ridge"](train, labels, found, 24) == torch.tensor(
        [subject.validation[index][1] for index in range(16)]
    )
    assert metrics["ridge_top1"] == pytest.approx(100 * hits.double().mean().item())
    assert "knn_top1" not in metrics


def test_quantized_features_are_compared_with_full_precision(load: Callable[..., Encoder]) -> None:
    subject = load()
    errors = []
    for bits in (8, 3):
        quantized = adfq.quantize(
            subject.model,
            method="base_ptq",
            weight_bits=bits,
            activation_bits=bits,
            calibration=next(subject.calibration_batches(4, 0)),
        )
        metrics = subject.evaluate(quantized, CPU, limit=16, batch_size=16)
        images = torch.stack([subject.validation[index][0] for index in range(16)])
        with torch.no_grad():
            ours, reference = quantized(images).double(), subject.model(images).double()
        error = 100 * ((ours - reference).norm(dim=1) / reference.norm(dim=1)).mean()
        assert metrics["feature_error"] == pytest.approx(error.item(), rel=1e-5)
        errors.append(metrics["feature_error"])
    assert 0 < errors[0] < errors[1]


@pytest.mark.parametrize(
    ("model", "arguments", "prefix"),
    [
        ("vit_tiny_patch16_224", VIT, 1),
        ("vit_small_patch14_reg4_dinov2", {**VIT, "patch_size": 16}, 5),
        ("swin_tiny_patch4_window7_224", SWIN, 0),
        ("vit_base_patch16_siglip_224", VIT, 0),
    ],
)
def test_features_are_the_class_token_or_the_mean_of_the_patches(
    model: str, arguments: dict[str, Any], prefix: int
) -> None:
    encoder = timm.create_model(model, num_classes=0, **arguments).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = encoder.forward_features(images).flatten(1, -2)
        assert torch.equal(features_of(encoder, images, None), encoder(images))
        assert torch.equal(features_of(encoder, images, "mean"), tokens[:, prefix:].mean(1))
        if prefix:
            assert torch.equal(features_of(encoder, images, "class"), tokens[:, 0])
            assert torch.equal(
                features_of(encoder, images, "both"), torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], 1)
            )
        else:
            with pytest.raises(AdfqError, match=r"without a class token has no features 'class'; take mean"):
                features_of(encoder, images, "class")


def test_a_saved_encoder_is_measured_without_full_precision(load: Callable[..., Encoder], tmp_path: Path) -> None:
    subject = load()
    images = next(subject.calibration_batches(4, 0))
    quantized = adfq.quantize(subject.model, method="base_ptq", weight_bits=4, activation_bits=4, calibration=images)
    cell = create_cell(method="base_ptq", task_arguments=(("head_images", 24),))
    save_quantized(quantized, cell, subject, tmp_path / "x.safetensors")
    given = {"task": "encoders", "data": "bundled", "limit": 16, "batch_size": 16}
    _, loaded = load_quantized(str(tmp_path / "x.safetensors"), **given, task_arguments=(("head_images", 24),))
    expected = subject.evaluate(quantized, CPU, limit=16, batch_size=16)
    found = loaded.evaluate(loaded.model, CPU, limit=16, batch_size=16)
    assert found == {key: value for key, value in expected.items() if not key.startswith("feature_")}


def test_short_names() -> None:
    resolved = resolve_encoder(create_cell("dinov2_small", {"img_size": 112}))
    assert resolved.model == "vit_small_patch14_dinov2.lvd142m"
    assert dict(resolved.model_arguments) == {"img_size": 112, "num_classes": 0}
    assert all(timm.is_model(name) for name, _ in ENCODERS.values())


def test_an_encoder_is_no_classifier_and_the_other_way_round() -> None:
    fields = {"model": "vit_tiny_patch16_224", "data": "bundled", "method": "full_precision"}
    encoder = Cell.create(task="classification", model_arguments=tuple({**VIT, "num_classes": 0}.items()), **fields)
    with pytest.raises(AdfqError, match="an encoder without a classifier: 'adfq run encoders'"):
        load_classification(encoder)
    with pytest.raises(AdfqError, match="a classifier of 24 classes: task classification measures it"):
        load_encoder(create_cell(arguments={**VIT, "num_classes": 24}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "svm"}, "unknown head 'svm'; there are knn, prototypes, ridge"),
        ({"features": "all"}, "unknown features 'all'; there are class, mean, both"),
        ({"head_images": 0}, "a whole number from 1; it is 0"),
        ({"head_images": 24_001}, "--head-images is 24001, the train split has 24000 images"),
    ],
)
def test_mistakes_are_found_before_the_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdfqError, match=message):
        load_subject(create_cell(task_arguments=tuple(options.items())))


def test_command_line(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [f"{key}={value}" for key, value in VIT.items()]
    arguments = ["run", "encoders", "--model", "vit_tiny_patch16_224", "--model-arg", *sizes]
    arguments += ["--data", f"folder:{pictures}", "--method", "base_ptq", "--bits", "W8A8", "--calibration-size", "2"]
    assert main([*arguments, "--head", "knn", "--features", "both"]) == 0
    line = capsys.readouterr().out
    assert "k-NN top-1" in line
    assert "feature error" in line
    assert "prototypes" not in line
    assert main(["run", "classification", *arguments[2:], "--head", "knn"]) == 2
    assert "classification has no --head" in capsys.readouterr().err
