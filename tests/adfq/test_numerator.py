"""The quantizer of a softmax's numerators: levels, sums of rows, gradients, state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from adfq.quantizers import NumeratorQuantizer, UniformQuantizer

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)
widths = st.integers(2, 8)


def draw(seed: int, sharpness: float = 3.0) -> Tensor:
    """Return attention, images×heads×queries×keys."""
    return (sharpness * torch.randn(2, 3, 5, 17, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@few
@given(seeds, widths, st.floats(0, 20))
def test_rows_keep_their_sums_and_are_one_grid_but_for_an_offset(seed: int, bits: int, sharpness: float) -> None:
    x = draw(seed, sharpness)
    y = NumeratorQuantizer(bits).calibrate(x)(x)
    torch.testing.assert_close(y.sum(-1), x.sum(-1))
    codes = (y - y.amin(-1, keepdim=True)) / x.amax(-1, keepdim=True) * (2**bits - 1)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=2e-3)
    assert codes.max() < 2**bits


@few
@given(seeds, widths)
def test_it_is_a_static_grid_of_the_numerators_before_their_sum(seed: int, bits: int) -> None:
    scores = 3 * torch.randn(2, 3, 5, 17, generator=torch.Generator().manual_seed(seed))
    numerators = (scores - scores.amax(-1, keepdim=True)).exp()
    step = 1 / (2**bits - 1)
    rounded = (numerators / step).round() * step
    total = numerators.sum(-1, keepdim=True)
    expected = (rounded + (total - rounded.sum(-1, keepdim=True)) / 17) / total
    probabilities = scores.softmax(-1)
    found = NumeratorQuantizer(bits).calibrate(probabilities)(probabilities)
    assert torch.isclose(found, expected, rtol=1e-4, atol=1e-6).float().mean() > 0.99  # the others are ties


def test_calibration_images_do_not_matter() -> None:
    scales = {float(NumeratorQuantizer(4).calibrate(draw(seed, 5 * seed)).scale) for seed in range(4)}
    assert len(scales) == 1
    assert scales.pop() == pytest.approx(1 / 15)


@few
@given(seeds)
def test_the_error_falls_with_the_bits_and_is_less_than_of_one_step_for_all(seed: int) -> None:
    x = draw(seed)
    errors = [float((NumeratorQuantizer(bits).calibrate(x)(x) - x).norm()) for bits in (2, 3, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < float((UniformQuantizer(4).calibrate(x)(x) - x).norm())


def test_equal_probabilities_stay_and_a_row_of_zeros_too() -> None:
    x = torch.cat((torch.full((1, 4, 8), 1 / 8), torch.zeros(1, 4, 8)))
    torch.testing.assert_close(NumeratorQuantizer(2).calibrate(x)(x), x)


def test_gradients_pass_through() -> None:
    x = draw(0).requires_grad_()
    weight = torch.randn_like(x)
    quantizer = NumeratorQuantizer(4).calibrate(x)
    (gradient,) = torch.autograd.grad(quantizer(x), x, weight)
    assert torch.equal(gradient, weight)


def test_negative_values_are_refused() -> None:
    with pytest.raises(AdfqError, match="cannot quantize negative values as a softmax's numerators"):
        NumeratorQuantizer(4).calibrate(torch.randn(2, 3, 4))


def test_saved_and_loaded_it_is_the_same(
    make_vit: Callable[..., nn.Module],
    make_images: Callable[..., Tensor],
    comes_back: Callable[..., nn.Module],
    tmp_path: Path,
) -> None:
    images = make_images()
    saved = adfq.quantize(make_vit(depth=1), "row_ridge", 3, 3, images)
    loaded = comes_back(saved, tmp_path / "model.safetensors", nn.Module.__call__, images)
    quantizers = [module for module in loaded.modules() if isinstance(module, NumeratorQuantizer)]
    assert [float(quantizer.scale) for quantizer in quantizers] == [pytest.approx(1 / 7)]
