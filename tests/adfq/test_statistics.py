"""Searches over values in parts against the same searches over all values at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adfq.quantizers import (
    AdaLogQuantizer,
    LogQuantizer,
    PerPatchOutlierQuantizer,
    Quantizer,
    RunTimePatchOutlierQuantizer,
    ShiftLogQuantizer,
    TwinGeluQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
)
from adfq.statistics import Quantiles

KINDS: dict[str, tuple[Callable[[], Quantizer], Callable[[Tensor], Tensor]]] = {
    **{
        f"{range}_{granularity}": (
            lambda range=range, granularity=granularity: UniformQuantizer(4, granularity, range),
            lambda x: x,
        )
        for range in ("minmax", "percentile", "mse")
        for granularity in ("tensor", "channel", "patch")
    },
    "head": (lambda: UniformQuantizer(4, "head", "percentile"), lambda x: x.unflatten(-1, (3, 8)).transpose(1, 2)),
    "adaptive_log": (lambda: AdaLogQuantizer(4), lambda x: x.softmax(-1)),
    "logarithmic": (lambda: LogQuantizer(4), lambda x: x.softmax(-1)),
    "shift_log": (lambda: ShiftLogQuantizer(4), torch.nn.functional.gelu),
    "shift_log_static": (lambda: ShiftLogQuantizer(3, shift="static"), torch.nn.functional.gelu),
    "per_patch": (lambda: PerPatchOutlierQuantizer(4, 2.5), lambda x: x),
    "run_time": (lambda: RunTimePatchOutlierQuantizer(4, 2.5), lambda x: x),
    "twin_softmax": (lambda: TwinSoftmaxQuantizer(4), lambda x: x.softmax(-1)),
    "twin_gelu": (lambda: TwinGeluQuantizer(4), torch.nn.functional.gelu),
}


@pytest.mark.parametrize("sizes", [[1] * 14, [7, 7], [14], [1, 13], [9, 4, 1]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_size_give_the_ranges_of_all_at_once(kind: str, sizes: list[int]) -> None:
    create, prepare = KINDS[kind]
    x = torch.randn(14, 40, 24, generator=torch.Generator().manual_seed(3))
    x = prepare(x * torch.randn(14, 40, 24, generator=torch.Generator().manual_seed(4)).exp_())
    whole = create().calibrate(x)
    parts = create()
    for statistic in parts.search():
        for part in x.split(sizes):
            parts.observe(statistic, part, len(part) / 14)
    for name, buffer in whole.named_buffers():
        # Sums in another order: nothing but the choice between candidates hangs on them.
        torch.testing.assert_close(dict(parts.named_buffers())[name], buffer, rtol=0, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    claimed=st.floats(0.01, 1.0),
    groups=st.integers(1, 3),
    upper=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_quantiles_are_exact_or_say_that_they_are_not(
    sizes: list[int], claimed: float, groups: int, upper: bool, seed: int
) -> None:
    """The share that a part claims may be wrong, where images differ in size."""
    values = torch.randn(groups, sum(sizes), generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    fractions = (0.9, 0.99, 0.999) if upper else (0.1, 0.01, 0.001)
    statistic = Quantiles(fractions, upper)
    for part in values.split(sizes, dim=1):
        statistic.update(part, claimed)
    if not statistic.complete:
        statistic = Quantiles(fractions, upper, statistic.count)
        for part in values.split(sizes, dim=1):
            statistic.update(part, claimed)
    assert statistic.complete
    (whole := Quantiles(fractions, upper)).update(values, 1.0)
    torch.testing.assert_close(statistic.result(), whole.result())  # the last digit depends on strides
    expected = torch.quantile(values.double(), torch.tensor(fractions, dtype=torch.float64), dim=1)
    torch.testing.assert_close(whole.result(), expected.float())
    assert torch.equal(statistic.outermost, values.amax(1) if upper else values.amin(1))


def test_quantiles_keep_no_more_than_they_need() -> None:
    statistic = Quantiles((0.999,), upper=True)
    for seed in range(200):
        statistic.update(torch.randn(1, 5000, generator=torch.Generator().manual_seed(seed)), 1 / 200)
        assert statistic._size <= 3 * 1001 + 5000
