"""Candidates: they cover their data, whatever it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adfq.output_error.grids import between, operand_ends, patch_embedding_ends, positive_ends, width_grid


@given(
    st.sampled_from([2, 3, 4, 6, 8]),
    st.sampled_from(["normal", "constant", "zero", "sparse", "positive", "far"]),
    st.booleans(),
    st.integers(1, 128),
)
@settings(max_examples=60, deadline=None)
def test_grids_are_usable_for_any_values(bits: int, kind: str, released: bool, zero_points: int) -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    x = {
        "normal": x,
        "constant": torch.full_like(x, -2.0),
        "zero": torch.zeros_like(x),
        "sparse": x * (torch.arange(50) == 7),
        "positive": x.abs(),
        "far": x + 100,
    }[kind]
    grid, spacing = width_grid(x, 2**bits, zero_points, released=released)
    assert grid.shape[1:] == (3, 2)
    assert len(grid) <= 128
    assert grid.isfinite().all()
    assert (grid[..., 0] > 0).all()
    assert (spacing >= 0).all()
    assert torch.equal(grid[..., 1], grid[..., 1].round())


@pytest.mark.parametrize("sign", [1, -1])
def test_at_6_bits_a_one_sided_tensor_has_all_codes(sign: int) -> None:
    x = sign * torch.rand(1, 1000)
    grid, _ = width_grid(x, 64, 16)
    scale, zero_point = grid[:, 0].T
    codes = (x / scale[:, None]).round() + zero_point[:, None]
    used = codes.clamp(0, 63).amax(1) - codes.clamp(0, 63).amin(1)
    assert (used >= 62).all()
    released, _ = width_grid(x, 64, 16, released=True)
    assert set(released[:, 0, 1].tolist()) == set(range(24, 40))


def test_ends_are_quantiles() -> None:
    x = torch.rand(2, 20001)
    lower, upper = operand_ends(x)
    assert lower.shape == upper.shape == (128, 2)
    torch.testing.assert_close(upper[0], torch.quantile(x, 0.99, dim=1))
    torch.testing.assert_close(lower[0], torch.quantile(x, 1e-5, dim=1), rtol=1e-3, atol=1e-6)
    lower, upper = patch_embedding_ends(x)
    torch.testing.assert_close(upper[-1], torch.quantile(x, 0.9999, dim=1))
    scale, zero_point = between(torch.stack((lower[-1], upper[-1]), -1), 16).unbind(-1)
    torch.testing.assert_close(15 * scale, upper[-1] - lower[-1])
    assert torch.equal(zero_point, zero_point.round())


def test_positive_ends_count_positive_values_alone() -> None:
    values = torch.cat([torch.arange(1, 101.0), -torch.rand(900)])
    assert [float(end) for end in positive_ends(values, (0.9, 1.0))] == [90, 100]
