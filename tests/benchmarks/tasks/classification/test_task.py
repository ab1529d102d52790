"""Models come through timm's factory, weights without running code, and metrics are what they are called."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import accuracy
from torch import nn

import adfq
from adfq import AdfqError
from benchmarks.cell import Cell
from benchmarks.run.runner import evaluate_model
from benchmarks.tasks.classification.task import Classification, load_classification

CPU = torch.device("cpu")
TINY = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 24}


@pytest.fixture
def load() -> Callable[..., Classification]:
    def load(model: str = "vit_tiny_patch16_224", arguments: dict[str, Any] | None = None, **fields: Any) -> Any:
        arguments = TINY if arguments is None else arguments
        return load_classification(
            Cell.create(
                task="classification",
                model=model,
                data="bundled",
                method="full_precision",
                model_arguments=tuple(sorted(arguments.items())),
                **fields,
            )
        )

    return load


@pytest.fixture
def tiny() -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **TINY)
    return model


def test_top1_and_top5_are_counted_over_all_images(load: Callable[..., Classification]) -> None:
    subject = load()
    # 70 images in batches of 32: the last batch is smaller and must weigh less.
    metrics, correct = subject.evaluate_images(subject.model, CPU, limit=70, batch_size=32)
    assert subject.evaluate(subject.model, CPU, limit=70, batch_size=32) == metrics
    images, labels = zip(*(subject.validation[index] for index in range(70)), strict=True)
    with torch.no_grad():
        logits, truth = subject.model(torch.stack(images)), torch.tensor(labels)
    hits = logits.argsort(1, descending=True) == truth[:, None]
    assert metrics["images"] == 70
    assert metrics["top1"] == pytest.approx(100 * hits[:, 0].sum().item() / 70)
    assert metrics["top5"] == pytest.approx(100 * hits[:, :5].sum().item() / 70)
    assert correct["top1"].tolist() == hits[:, 0].tolist()
    # To the last bit what timm counts, as records have it.
    of_timm = [
        accuracy(part, target, topk=(1, 5)) for part, target in zip(logits.split(32), truth.split(32), strict=True)
    ]
    sums = [sum(float(part[place]) * size for part, size in zip(of_timm, (32, 32, 6), strict=True)) for place in (0, 1)]
    assert [metrics["top1"], metrics["top5"]] == [sums[0] / 70, sums[1] / 70]


def test_slow_images_are_loading_and_not_the_model(load: Callable[..., Classification]) -> None:
    subject = load()

    def slow(image: Any) -> Any:
        time.sleep(0.02)
        return transform(image)

    transform, subject.validation.transform = subject.validation.transform, slow
    cell = Cell.create(task="classification", model="any", data="any", method="full_precision", limit=6, batch_size=4)
    timing = evaluate_model(cell, subject, subject.model, CPU)["timing"]
    assert 6 * 0.02 <= timing["loading"] <= timing["evaluation"]


def test_calibration_images_come_from_the_train_split_and_follow_the_seed(load: Callable[..., Classification]) -> None:
    subject = load()
    first, again, other = (next(subject.calibration_batches(4, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    train = torch.stack(
        [
            subject.train[index][0]
            for index in torch.randperm(24_000, generator=torch.Generator().manual_seed(0))[:4].tolist()
        ]
    )
    assert torch.equal(first, train)
    with pytest.raises(AdfqError, match="24001 calibration images were asked for"):
        subject.calibration_batches(24_001, 0)
    batches = list(subject.calibration_batches(4, 0, 3))
    assert [len(batch) for batch in batches] == [3, 1]
    assert torch.equal(torch.cat(batches), first)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_checkpoints_are_loaded(
    load: Callable[..., Classification], tiny: nn.Module, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": tiny.state_dict()}, path)  # the layout of DeiT's and Swin's official files
    else:
        save_file(tiny.state_dict(), path)
    loaded = load(checkpoint=str(path)).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tiny.state_dict().items())


def test_a_checkpoint_that_does_not_fit_says_which_keys(
    load: Callable[..., Classification], tiny: nn.Module, tmp_path: Path
) -> None:
    state = tiny.state_dict()
    del state["blocks.1.attn.proj.bias"]
    save_file(state, tmp_path / "keys.safetensors")
    with pytest.raises(AdfqError, match=r"does not fit.*blocks\.1\.attn\.proj\.bias"):
        load(checkpoint=str(tmp_path / "keys.safetensors"))
    save_file(tiny.state_dict(), tmp_path / "shapes.safetensors")
    with pytest.raises(AdfqError, match=r"does not fit.*head\.weight"):
        load(arguments={**TINY, "num_classes": 12}, checkpoint=str(tmp_path / "shapes.safetensors"))


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_not_run(load: Callable[..., Classification], tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "was-run"
    torch.save({"state_dict": _Payload(trace)}, path)
    with pytest.raises(AdfqError, match="code in it is never run"):
        load(checkpoint=str(path))
    path.write_bytes(pickle.dumps(_Payload(trace), protocol=2))
    with pytest.raises(AdfqError):
        load(checkpoint=str(path))
    assert not trace.exists()


@pytest.mark.parametrize("method", ["full_precision", "base_ptq"])
def test_non_finite_values_name_the_layer(load: Callable[..., Classification], method: str) -> None:
    subject = load()
    with torch.no_grad():
        subject.model.blocks[1].mlp.fc1.bias[0] = float("nan")

    def measure() -> None:
        model = adfq.quantize(subject.model, method, calibration=next(subject.calibration_batches(2, 0)))
        subject.evaluate(model, CPU, limit=4, batch_size=4)

    with pytest.raises(AdfqError, match=r"blocks\.1\.mlp"):
        measure()


def test_preprocessing_is_timms_with_the_users_overrides(load: Callable[..., Classification]) -> None:
    plain, overridden = load(), load(preprocessing=(("mean", (0.5,)), ("std", (0.25,))))
    # timm's ViT default is mean 0.5 and std 0.5: half the std doubles every value.
    assert torch.allclose(overridden.validation[0][0], 2 * plain.validation[0][0], atol=1e-6)
    grey = load(arguments={**TINY, "in_chans": 1}, preprocessing=(("mean", (0.5,)), ("std", (0.5,))))
    assert grey.validation[0][0].shape == (1, 64, 64)
    assert load(arguments={**TINY, "img_size": 48}).validation[0][0].shape == (3, 48, 48)
    with pytest.raises(AdfqError, match="do not fit 1 channels"):
        load(arguments={**TINY, "in_chans": 1})


def fashion_mnist(real_data: Path, method: str, bits: str, limit: int | None, **options: Any) -> float:
    root = real_data / "fashion_mnist"
    arguments = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 128, "depth": 6, "num_heads": 4}
    cell = Cell.create(
        task="classification",
        model="vit_tiny_patch16_224",
        data=f"torch/fashion_mnist:{root}",
        method=method,
        bits=bits,
        model_arguments=tuple(sorted({**arguments, "num_classes": 10, "mlp_ratio": 2}.items())),
        checkpoint=str(root / "vit_d128_L6_h4_p4_timm.pth"),
        preprocessing=(("crop_pct", 1.0), ("mean", (0.5,)), ("std", (0.5,))),
    )
    subject = load_classification(cell)
    images = next(subject.calibration_batches(32, 0))
    width = int(bits[1])
    quantized = adfq.quantize(subject.model, method, width, width, images, **options)
    return subject.evaluate(quantized, CPU, limit, 100)["top1"]


@pytest.mark.slow
def test_a_trained_vit_reaches_its_accuracy(real_data: Path) -> None:
    assert fashion_mnist(real_data, "full_precision", "W8A8", None) == pytest.approx(90.77, abs=0.05)


@pytest.mark.parametrize("method", ["base_ptq", "repq_vit", "adfq_vit"])
def test_a_trained_vit_survives_quantization_at_6_bits(
    real_data: Path, method: str, quick: Mapping[str, dict[str, Any]]
) -> None:
    # Full precision reaches 91.1 % on these 1,000 images.
    assert fashion_mnist(real_data, method, "W6A6", 1000, **quick[method]) == pytest.approx(91.1, abs=1.5)


def test_a_class_map_that_is_no_file_is_refused(load: Callable[..., Classification]) -> None:
    with pytest.raises(AdfqError, match="class_map must be the path of a file, got 5"):
        load(task_arguments=(("class_map", 5),))
