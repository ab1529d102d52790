"""Intervals of paired differences are those of a bootstrap over images and seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from benchmarks.report.paired import interval, resample, stack_correct
from benchmarks.run.correct import pack_correct

BITS = arrays(bool, st.tuples(st.just(2), st.integers(1, 3), st.integers(1, 20)))


@settings(max_examples=20, deadline=None)
@given(BITS)
def test_equal_bits_have_no_difference(bits: NDArray[np.bool_]) -> None:
    accuracies = resample(np.concatenate([bits, bits]), 50)
    assert interval(accuracies[:, 0], accuracies[:, 2]) == (0, 0)
    assert (accuracies >= 0).all()
    assert (accuracies <= 100).all()


@settings(max_examples=20, deadline=None)
@given(BITS)
def test_exchanged_methods_have_the_opposite_interval(bits: NDArray[np.bool_]) -> None:
    accuracies = resample(bits, 50)
    low, high = interval(accuracies[:, 0], accuracies[:, 1])
    assert interval(accuracies[:, 1], accuracies[:, 0]) == pytest.approx((-high, -low))
    difference = 100 * (bits[0].mean() - bits[1].mean())
    if bits.shape[1] == bits.shape[2] == 1:
        assert (low, high) == (difference, difference)


def test_the_interval_is_that_of_resampled_images_and_seeds() -> None:
    generator = np.random.default_rng(1)
    seeds, images = 3, 200
    one = generator.random((seeds, images)) < 0.8
    other = one & (generator.random((seeds, images)) < np.array([[0.99], [0.96], [0.9]]))
    drawn = [
        (one.astype(int) - other)[generator.integers(seeds, size=seeds)][:, generator.integers(images, size=images)]
        for _ in range(4000)
    ]
    low, high = np.percentile([100 * each.mean() for each in drawn], [2.5, 97.5])
    accuracies = resample(np.stack([one, other]))
    assert interval(accuracies[:, 0], accuracies[:, 1]) == pytest.approx((low, high), abs=0.3)
    assert low > 0  # a clear gap
    assert np.array_equal(accuracies, resample(np.stack([one, other])))


def test_a_gap_that_one_seed_does_not_have_may_be_none() -> None:
    right, worse = np.ones((3, 400), bool), np.ones((3, 400), bool)
    worse[1:, :40] = False  # ten points, with two of three seeds
    worse[0], right[0] = True, np.arange(400) >= 4
    accuracies = resample(np.stack([right, worse]))
    low, high = interval(accuracies[:, 0], accuracies[:, 1])
    assert low < 0 < 9 < high


def cells(**changes: Any) -> pd.DataFrame:
    rows = []
    for seed in (1, 0):
        for row in ("two", "one"):
            bits = np.array([row == "one", seed == 1])
            cell = {"row": row, "seed": seed, "evaluated": "a", "top1": 100 * bits.mean(), "images": 2}
            rows.append({**cell, "correct": pack_correct({"top1": bits})})
    rows[3] = {**rows[3], **changes}
    return pd.DataFrame(rows)


def test_bits_are_stacked_by_row_and_seed() -> None:
    correct = stack_correct(cells(), "top1")
    assert correct is not None
    assert correct.tolist() == [[[False, False], [False, True]], [[True, False], [True, True]]]


@pytest.mark.parametrize(
    "changes",
    [
        {"correct": {}},
        {"correct": pack_correct({"top1": np.ones(3, bool)}), "images": 3, "top1": 100.0},
        {"evaluated": "b"},
        {"seed": 2},
    ],
)
def test_other_images_seeds_or_no_bits_are_not_paired(changes: dict[str, Any]) -> None:
    assert stack_correct(cells(**changes), "top1") is None


def test_a_single_seed_is_not_paired() -> None:
    assert stack_correct(cells().query("seed == 1"), "top1") is None
