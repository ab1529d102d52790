"""Range searches against loops that read like the formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor

import adfq.parts
import adfq.statistics
from adfq.quantizers import LogQuantizer
from adfq.ranges import PERCENTILES, RANGES, fake_quantize, find_range
from adfq.statistics import Errors, Histograms, MinMax, Quantiles


def quantiles(values: Tensor, fractions: tuple[float, ...], upper: bool) -> Tensor:
    statistic = Quantiles(fractions, upper)
    statistic.update(values, 1.0)
    return statistic.result()


quick = settings(max_examples=40, deadline=None, derandomize=True)


def heavy_tailed(rows: int, count: int, seed: int) -> Tensor:
    """Values whose extremes lie far out, so that percentiles differ from the extremes and from each other."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, count, generator=generator)
    return values * torch.randn(rows, count, generator=generator).mul_(0.8).exp_() + 0.3


# Older versions have ranks in single precision: the last digits of a percentile are other ones.
exact_torch = pytest.mark.skipif(Version(torch.__version__) < Version("2.14"), reason="torch.quantile is not exact")


def quantize_literally(x: Tensor, scale: Tensor, zero_point: Tensor | float, levels: int) -> Tensor:
    codes = torch.clamp(torch.round(x / scale) + zero_point, 0, levels - 1)
    return scale * (codes - zero_point)


@exact_torch
@pytest.mark.parametrize("upper", [True, False])
@quick
@given(rows=st.integers(1, 5), count=st.integers(1, 5000), seed=st.integers(0, 10**6))
def test_quantiles_are_torchs_bit_for_bit(upper: bool, rows: int, count: int, seed: int) -> None:
    values = heavy_tailed(rows, count, seed)
    fractions = PERCENTILES if upper else tuple(1 - p for p in PERCENTILES)
    expected = torch.stack([torch.quantile(values, fraction, dim=1) for fraction in fractions])
    torch.testing.assert_close(quantiles(values, fractions, upper=upper), expected, rtol=0, atol=0)


@quick
@given(rows=st.integers(1, 3), count=st.integers(1000, 5000), kinds=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_quantiles_of_values_that_repeat(rows: int, count: int, kinds: int, seed: int) -> None:
    values = torch.randint(kinds, (rows, count), generator=torch.Generator().manual_seed(seed)).float()
    expected = torch.stack([torch.quantile(values, p, dim=1) for p in (0.99, *PERCENTILES)])
    assert torch.equal(quantiles(values, (0.99, *PERCENTILES), upper=True), expected)


@pytest.mark.parametrize("part", [7, 100, 1000])
@pytest.mark.parametrize(("rows", "count"), [(1, 999), (13, 77)])
@pytest.mark.parametrize("exponent", [2.0, 2.4])
def test_mean_errors_in_parts_are_those_of_the_whole(
    part: int, rows: int, count: int, exponent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adfq.parts, "_PART", part)
    values, scales = heavy_tailed(rows, count, seed=5), torch.rand(2, rows, 1) + 0.1
    candidates = [lambda part, rows, scale=scale: (part / scale[rows]).round() * scale[rows] for scale in scales]
    expected = ((values / scales).round() * scales - values).double().abs().pow(exponent).mean(-1)
    (errors := Errors(candidates, exponent)).update(values, 1.0)
    torch.testing.assert_close(errors.result(), expected, rtol=1e-5, atol=0)


@exact_torch
def test_quantiles_of_a_large_tensor() -> None:
    values = heavy_tailed(1, 1_500_000, seed=3)
    for p in PERCENTILES:
        assert quantiles(values, (p,), upper=True).item() == torch.quantile(values, p).item()
        assert quantiles(values, (1 - p,), upper=False).item() == torch.quantile(values, 1 - p).item()


def test_quantiles_of_more_values_than_single_precision_counts() -> None:
    count = 2**24 + 4000
    values = torch.arange(count, dtype=torch.float32)[None]
    for p in (0.999, 0.99999):
        # 0.999 itself is rounded to single precision; the rank may be off by no more than that.
        assert quantiles(values, (p,), upper=True).item() == pytest.approx(p * (count - 1), abs=2)
        assert quantiles(values, (1 - p,), upper=False).item() == pytest.approx((1 - p) * (count - 1), abs=2)


@exact_torch
@pytest.mark.parametrize("bits", [2, 4, 8])
@quick
@given(rows=st.integers(1, 4), count=st.integers(2, 4000), seed=st.integers(0, 10**6))
def test_percentile_search_takes_the_best_candidate(bits: int, rows: int, count: int, seed: int) -> None:
    values, levels = heavy_tailed(rows, count, seed), 2**bits
    scales, zero_points = find_range("percentile", values, levels)
    assert scales.shape == zero_points.shape == (rows,)
    for row, scale, zero_point in zip(values, scales, zero_points, strict=True):
        candidates, errors = [], []
        for p in (0.999, 0.9999, 0.99999):
            lower, upper = torch.quantile(row, 1 - p), torch.quantile(row, p)
            s = (upper - lower) / (levels - 1)
            z = torch.round(-lower / s)
            candidates.append((s.item(), z.item()))
            errors.append(torch.mean((row - quantize_literally(row, s, z, levels)) ** 2).item())
        found = (scale.item(), zero_point.item())
        assert found in candidates
        # Sums in another order may rank candidates that are as good as equal the other way round.
        assert errors[candidates.index(found)] <= min(errors) * (1 + 1e-5)


@pytest.mark.parametrize(("bits", "index"), [(4, 0), (6, 1), (8, 2)])
def test_percentile_search_clips_less_the_more_codes_there_are(bits: int, index: int) -> None:
    values = heavy_tailed(40, 30_000, seed=5)
    scales, _ = find_range("percentile", values, 2**bits)
    extents = [torch.quantile(values, p, dim=1) - torch.quantile(values, 1 - p, dim=1) for p in PERCENTILES]
    chosen = (scales - torch.stack(extents) / (2**bits - 1)).abs().argmin(0)
    assert chosen.median() == index


def mse_candidates(row: Tensor, levels: int) -> list[tuple[Tensor, list[int]]]:
    lowest, highest = min(row.min().item(), 0.0), max(row.max().item(), 0.0)
    if lowest == 0:
        zero_points = [0]
    elif highest == 0:
        zero_points = [levels - 1]
    else:
        zero_points = list(range(levels))
    return [(torch.tensor((highest - lowest) * i / 100 / (levels - 1)), zero_points) for i in range(1, 101)]


def mse_error(row: Tensor, scale: Tensor, zero_point: Tensor | float, levels: int) -> float:
    return float((row - quantize_literally(row, scale, zero_point, levels)).abs().pow(2.4).mean())


def best_mse_error(row: Tensor, levels: int) -> float:
    """Brute force: every width with every zero point."""
    best = float("inf")
    for scale, zero_points in mse_candidates(row, levels):
        for zero_point in zero_points:
            best = min(best, mse_error(row, scale, zero_point, levels))
    return best


def shaped(kind: str, count: int, seed: int) -> Tensor:
    values = heavy_tailed(1, count, seed)[0]
    return {"two-sided": values, "positive": values.abs(), "negative": -values.abs(), "skewed": values.exp() - 0.1}[
        kind
    ]


KINDS = ["two-sided", "positive", "negative", "skewed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "count"), [(2, 2048), (3, 700), (4, 60), (4, 2048)])
def test_mse_search_of_few_values_is_exhaustive(kind: str, bits: int, count: int) -> None:
    row, levels = shaped(kind, count, seed=bits), 2**bits
    (scale,), (zero_point,) = find_range("mse", row[None], levels)
    assert mse_error(row, scale, zero_point, levels) == pytest.approx(best_mse_error(row, levels), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "count"), [(4, 2049), (4, 20_000), (6, 300), (6, 5000), (8, 150)])
def test_mse_search_of_many_values_or_levels_is_nearly_exhaustive(kind: str, bits: int, count: int) -> None:
    row, levels = shaped(kind, count, seed=bits), 2**bits
    (scale,), (zero_point,) = find_range("mse", row[None], levels)
    assert mse_error(row, scale, zero_point, levels) <= 1.01 * best_mse_error(row, levels)


@pytest.mark.parametrize("count", [500, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_search_stays_on_the_grid(kind: str, count: int) -> None:
    row = shaped(kind, count, seed=11)
    (scale,), (zero_point,) = find_range("mse", row[None], 16)
    fitting = [zs for s, zs in mse_candidates(row, 16) if s.item() == pytest.approx(scale.item(), rel=1e-5)]
    assert len(fitting) == 1
    assert zero_point.item() in fitting[0]


def test_mse_search_treats_rows_apart() -> None:
    rows = torch.stack([shaped(kind, 3000, seed=7) for kind in KINDS])
    together = torch.stack(find_range("mse", rows, 16), dim=1)
    alone = torch.cat([torch.stack(find_range("mse", row[None], 16), dim=1) for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 7, 3000])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-6, 4096.0])
@pytest.mark.parametrize("search", RANGES)
def test_constant_groups_are_represented(search: str, value: float, count: int) -> None:
    values = torch.full((2, count), value)
    scale, zero_point = find_range(search, values, 16)
    assert (scale > 0).all()
    torch.testing.assert_close(
        fake_quantize(values, scale[:, None], zero_point[:, None], 16), values, rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize("search", RANGES)
def test_a_dead_channel_does_not_disturb_the_others(search: str) -> None:
    live = heavy_tailed(1, 500, seed=1)
    together = find_range(search, torch.cat([torch.zeros(1, 500), live]), 16)
    alone = find_range(search, live, 16)
    for both, one in zip(together, alone, strict=True):
        assert torch.isfinite(both).all()
        assert both[1] == one[0]


@given(exponent=st.integers(-20, 20), count=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_percentiles_of_nearly_empty_rows_give_way_to_the_extremes(exponent: int, count: int, seed: int) -> None:
    """A range is that of the values in any unit; a placeholder of 1 would be right in one unit only."""
    values = torch.zeros(1, 400_000)
    random = torch.Generator().manual_seed(seed)
    values[0, torch.randperm(400_000, generator=random)[:count]] = torch.randn(count, generator=random)
    scale, zero_point = find_range("percentile", values, 16)
    scaled, same = find_range("percentile", values * 2.0**exponent, 16)
    assert (scaled, same) == (scale * 2.0**exponent, zero_point)
    assert scale <= (values.max() - values.min()) / 15


@pytest.mark.parametrize("search", RANGES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_sided_data_spends_no_code_on_the_other_side(search: str, bits: int) -> None:
    levels = 2**bits
    values = heavy_tailed(1, 1500, seed=2).abs()
    for sign in (1, -1):
        (scale,), (zero_point,) = find_range(search, sign * values, levels)
        ends = scale * torch.tensor([0 - zero_point, levels - 1 - zero_point])
        beyond = ends.min() if sign == 1 else ends.max()
        assert abs(beyond) <= scale  # percentiles of |x| begin a little off 0


@pytest.mark.parametrize("extent", [1e-39, 1e-30])
@pytest.mark.parametrize("search", RANGES)
def test_groups_of_next_to_no_extent(search: str, extent: float) -> None:
    """Such as an all-zero channel with one denormal in it."""
    values = torch.zeros(1, 3000)
    values[0, 0] = extent
    scale, zero_point = find_range(search, values, 16)
    result = fake_quantize(values, scale[:, None], zero_point[:, None], 16)
    assert (result - values).abs().max() <= extent


def test_fake_quantize_leaves_its_argument_alone() -> None:
    x = torch.linspace(-1, 1, 9)
    before = x.clone()
    assert not torch.equal(fake_quantize(x, torch.tensor(0.3), torch.tensor(2.0), 4), before)
    assert torch.equal(x, before)


@pytest.mark.parametrize("search", ["percentile", "mse", "logarithmic"])
@pytest.mark.parametrize("channels", [2, 3, 5])
def test_of_very_many_values_every_channel_counts(search: str, channels: int) -> None:
    """Values in a channel that a stride would pass over are the largest by far."""
    positions = 2**23 // channels + 7

    def find(values: Tensor) -> Tensor:
        if search == "logarithmic":
            return LogQuantizer(4).calibrate(values.abs()).scale
        return torch.stack([part[0] for part in find_range(search, values, 16)])

    few = torch.randn(positions // 4096, channels, generator=torch.Generator().manual_seed(channels))
    few[:, -1] *= 10
    many = few.repeat(positions // len(few) + 1, 1)
    # A repeated distribution has the same quantiles and errors, up to their interpolation and the order of sums.
    torch.testing.assert_close(find(many.reshape(1, -1)), find(few.repeat(64, 1).reshape(1, -1)), rtol=1e-3, atol=0)


def test_a_histogram_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values = heavy_tailed(1, 60_000, 0)
    (extremes := MinMax()).update(values, 1.0)

    def histogram() -> tuple[Tensor, Tensor | None]:
        (statistic := Histograms(extremes)).update(values, 1.0)
        return statistic.result(0)

    whole = histogram()
    monkeypatch.setattr(adfq.statistics, "_HISTOGRAM_PART", 7_000)
    torch.testing.assert_close(histogram(), whole, rtol=1e-6, atol=0)
