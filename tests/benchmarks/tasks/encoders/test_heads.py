"""Heads in closed form agree with their definitions, written once more and slowly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.tasks.encoders.heads import HEADS, NEIGHBOURS, SHRINKAGE, TEMPERATURE, nearest_neighbours, prototypes


def draw(seed: int, count: int, classes: int, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Features, N×6, around a centre for each class, and labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, 6, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize("head", HEADS)
def test_separate_classes_are_told_apart(head: str) -> None:
    train, labels = draw(0, 90, 5, spread=0.01)
    features, expected = draw(1, 40, 5, spread=0.01)
    assert torch.equal(HEADS[head](train, labels, features, 5), expected)


@pytest.mark.parametrize("head", HEADS)
def test_the_order_of_training_images_does_not_matter(head: str) -> None:
    train, labels = draw(0, 60, 4)
    features, _ = draw(1, 30, 4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    given = HEADS[head](train, labels, features, 4)
    assert torch.equal(given, HEADS[head](train[order], labels[order], features, 4))
    assert torch.equal(given, HEADS[head](train, labels, features, 9))  # classes without images are never predicted


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 40))
def test_votes_of_neighbours(seed: int, count: int) -> None:
    train, labels = draw(seed, count, 4)
    features, _ = draw(seed + 1, 5, 4)
    predicted = nearest_neighbours(train, labels, features, 4)
    for feature, got in zip(features, predicted.tolist(), strict=True):
        cosines = [float(feature @ each / (feature.norm() * each.norm())) for each in train]
        nearest = sorted(range(count), key=lambda index: -cosines[index])[:NEIGHBOURS]
        votes = [0.0] * 4
        for index in nearest:
            votes[int(labels[index])] += math.exp(cosines[index] / TEMPERATURE)
        assert votes[got] == pytest.approx(max(votes))


def test_prototypes_are_means_of_whitened_features() -> None:
    train, labels = draw(3, 50, 3, spread=1.0)
    features, _ = draw(4, 40, 3, spread=1.0)
    centred = train - train.mean(0)
    covariance = centred.T @ centred / 50
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.trace() / 6 * torch.eye(6)
    inverse = torch.linalg.inv(covariance)
    means = torch.stack([centred[labels == label].mean(0) for label in range(3)])
    lengths = torch.einsum("kc,cd,kd->k", means, inverse, means).sqrt()
    scores = (features - train.mean(0)) @ inverse @ means.T / lengths
    assert torch.equal(prototypes(train, labels, features, 3), scores.argmax(1))


def test_features_without_any_variance_are_no_error() -> None:
    same, labels = torch.ones(6, 4, dtype=torch.float64), torch.arange(6) % 2
    for head in HEADS.values():
        assert head(same, labels, same, 2).shape == (6,)
