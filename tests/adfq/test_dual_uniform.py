"""The uniform weight quantizer with a second grid for outlier columns."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from adfq import AdfqError
from adfq.quantizers import DualUniformQuantizer
from adfq.quantizers.dual_uniform import outlier_columns
from adfq.ranges import find_range


def make_weight(rows: int = 60, columns: int = 24) -> Tensor:
    weight = torch.randn(rows, columns)
    weight[:, [3, 20]] *= 8
    return weight


def test_columns_that_most_rows_flag_are_outliers() -> None:
    weight = make_weight()
    weight[4], weight[5] = weight[4].abs(), 0  # rows without negative values, and without any
    flags: Counter[int] = Counter()  # counts as often come in the order of their first flag
    for row in weight.numpy():
        high = np.percentile(row[row > 0], 99) if (row > 0).any() else np.inf
        low = np.percentile(row[row < 0], 1) if (row < 0).any() else -np.inf
        flags.update(np.flatnonzero((row > high) | (row < low)).tolist())
    expected = [column for column, _ in flags.most_common()]
    assert set(expected[:2]) == {3, 20}
    assert outlier_columns(weight, 2).tolist() == expected[:2]
    assert outlier_columns(weight, 24).tolist() == expected


def test_each_kind_of_column_has_the_grid_of_its_own_values() -> None:
    weight = make_weight()
    quantizer = DualUniformQuantizer(4).calibrate(weight)
    mask = quantizer.is_outlier
    assert mask.sum() == 3
    for kind, chosen in enumerate((~mask, mask)):
        scale, zero_point = find_range("percentile10", weight[:, chosen], 16)
        assert torch.equal(quantizer.scale[:, kind], scale)
        assert torch.equal(quantizer.zero_point[:, kind], zero_point)
    y = quantizer(weight)
    codes = quantizer.encode(y)
    assert codes.max() <= 15
    assert torch.equal(quantizer.decode(codes), y)
    single = DualUniformQuantizer(4, 0.0).calibrate(weight)
    assert not single.is_outlier.any()
    assert (y - weight).norm() < 0.7 * (single(weight) - weight).norm()
    assert torch.equal(quantizer(weight.reshape(60, 6, 2, 2)), y.reshape(60, 6, 2, 2))


def test_few_columns_or_rows() -> None:
    for shape in ((100, 2), (5, 8), (1, 1)):
        weight = torch.randn(shape)
        quantizer = DualUniformQuantizer(8, 0.5).calibrate(weight)
        assert quantizer.is_outlier.sum() < shape[1]
        assert (quantizer(weight) - weight).abs().max() < 0.1


def test_gradients_pass_inside_the_range() -> None:
    weight = make_weight().requires_grad_()
    DualUniformQuantizer(8).calibrate(weight)(weight).sum().backward()
    assert weight.grad is not None
    assert set(weight.grad.unique().tolist()) <= {0.0, 1.0}
    assert weight.grad.mean() > 0.9


def test_mistakes() -> None:
    with pytest.raises(AdfqError, match="outlier_share must be from 0 to 1"):
        DualUniformQuantizer(4, 1.5)
    with pytest.raises(AdfqError, match="a weight has an output and an input channel"):
        DualUniformQuantizer(4).calibrate(torch.randn(3))
