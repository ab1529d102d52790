"""The shipped classifiers are what their description says: trained, small, and hard enough to tell methods apart."""

from __future__ import annotations

import pytest
import torch

import adfq
from benchmarks.bundled.classifiers import CLASSIFIERS, SPLIT_SIZES, SceneClassification, augment
from benchmarks.cell import Cell
from benchmarks.tasks.classification.task import Classification, load_classification

CPU = torch.device("cpu")


@pytest.fixture(params=CLASSIFIERS)
def subject(request: pytest.FixtureRequest) -> Classification:
    fields = {"task": "classification", "data": "bundled", "method": "full_precision"}
    return load_classification(Cell.create(model=request.param, **fields))


def test_weights_are_small(subject: Classification) -> None:
    files = [classifier.checkpoint for classifier in CLASSIFIERS.values()]
    assert all(path.suffix == ".safetensors" and path.stat().st_size <= 6e6 for path in files)


@pytest.mark.slow
def test_full_precision_is_good_but_not_perfect_and_base_ptq_suffers(subject: Classification) -> None:
    # On 1,000 of the 2,000 images the standard error is about 1 point; the bounds of the whole set are 85 and 97.
    full = subject.evaluate(subject.model, CPU, 1000, 100)["top1"]
    assert 84 <= full <= 98
    quantized = adfq.quantize(subject.model, "base_ptq", 3, 3, next(subject.calibration_batches(32, 0)))
    assert subject.evaluate(quantized, CPU, 1000, 100)["top1"] <= full - 8


def test_train_and_validation_are_different_scenes() -> None:
    train, validation = SceneClassification("train"), SceneClassification("validation")
    assert (len(train), len(validation)) == (SPLIT_SIZES["train"], SPLIT_SIZES["validation"])
    assert train[0][0].tobytes() != validation[0][0].tobytes()
    with pytest.raises(IndexError):
        validation[len(validation)]


def test_augmentation_keeps_shape_and_range_and_follows_its_generator() -> None:
    images = torch.rand(4, 3, 64, 64)
    first, again, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == images.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.unique().tolist()) <= set(images.unique().tolist())
