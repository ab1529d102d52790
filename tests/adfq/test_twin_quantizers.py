"""PTQ4ViT's twin uniform quantizers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adfq import AdfqError
from adfq.quantizers import Quantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer
from adfq.quantizers.twin import GELU_DEPTH, SPLITS

quick = settings(max_examples=40, deadline=None, derandomize=True)
bit_widths = st.integers(2, 8)
splits = st.sampled_from(SPLITS)

MAKE: dict[str, Callable[[int], Quantizer]] = {"softmax": TwinSoftmaxQuantizer, "gelu": TwinGeluQuantizer}
both = pytest.mark.parametrize("kind", MAKE)


def sample(kind: str, seed: int = 0) -> Tensor:
    x = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(seed))
    return x.mul(3).softmax(-1) if kind == "softmax" else nn.functional.gelu(x)


def with_split(bits: int, split: float, released: bool = False) -> TwinSoftmaxQuantizer:
    quantizer = TwinSoftmaxQuantizer(bits, released)
    quantizer.scale = torch.tensor(split / quantizer.steps)
    return quantizer


def with_scale(bits: int, scale: float) -> TwinGeluQuantizer:
    quantizer = TwinGeluQuantizer(bits)
    quantizer.scale = torch.tensor(scale)
    return quantizer


# --- after softmax --------------------------------------------------------------------------------------------------

unit_interval = torch.cat([torch.linspace(0, 1, 3001), torch.logspace(-9, 0, 1001)]).sort().values


@quick
@given(bits=bit_widths, split=splits, released=st.booleans())
def test_softmax_values_are_on_a_fine_and_a_coarse_grid(bits: int, split: float, released: bool) -> None:
    steps = 2 ** (bits - 1) - 1
    fine = (unit_interval.clamp(0, split).double() * steps / split).round() * split / steps
    coarse = (unit_interval.clamp(split, 1).double() * steps).round() / steps
    apart = torch.where(unit_interval <= split, fine, coarse.clamp(min=split))
    y = with_split(bits, split, released)(unit_interval).double()
    off = ~torch.isclose(y, fine + coarse if released else apart, rtol=1e-5, atol=1e-9)
    assert off.float().mean() <= 2e-3  # on a rounding boundary


@quick
@given(bits=bit_widths, split=splits, released=st.booleans())
def test_softmax_levels_number_at_most_two_to_the_bits_and_keep_the_order(
    bits: int, split: float, released: bool
) -> None:
    y = with_split(bits, split, released)(torch.cat([torch.tensor([-1.0]), unit_interval, torch.tensor([2.0])]))
    assert len(y.unique()) <= 2**bits
    assert y.diff().min() >= 0


@quick
@given(bits=bit_widths, split=splits, released=st.booleans())
def test_softmax_range(bits: int, split: float, released: bool) -> None:
    quantizer = with_split(bits, split, released)
    assert float(quantizer.split) == pytest.approx(split)
    low, high = quantizer(torch.tensor([-5.0, 5.0])).tolist()
    assert low == quantizer(torch.zeros(1))
    assert high == quantizer(torch.ones(1)) == pytest.approx(1 + split if released else 1)


@quick
@given(bits=bit_widths, split=splits)
def test_softmax_is_idempotent_and_off_by_half_a_step_at_most(bits: int, split: float) -> None:
    quantizer = with_split(bits, split)
    once = quantizer(unit_interval)
    torch.testing.assert_close(quantizer(once), once, rtol=0, atol=0)
    step = torch.where(unit_interval <= split, split / quantizer.steps, 1 / quantizer.steps)
    assert ((once - unit_interval).abs() <= 0.501 * step).all()


def test_softmax_calibration_takes_the_split_with_the_smallest_mean_squared_error() -> None:
    x = sample("softmax")
    errors = [float((with_split(4, split)(x) - x).square().mean()) for split in SPLITS]
    quantizer = TwinSoftmaxQuantizer(4).calibrate(x)
    assert float(quantizer.split) == pytest.approx(SPLITS[errors.index(min(errors))])


@pytest.mark.parametrize("value", [-0.01, 1.01])
def test_softmax_calibration_outside_its_range(value: float) -> None:
    with pytest.raises(AdfqError, match="from 0 to 1"):
        TwinSoftmaxQuantizer(4).calibrate(torch.tensor([0.5, value]))


def test_softmax_gradient_passes_inside_and_is_cut_outside() -> None:
    x = torch.tensor([-0.1, 0.0, 0.01, 1 / 16, 0.5, 1.0, 1.1], requires_grad=True)
    with_split(4, 1 / 16)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


# --- after GELU -----------------------------------------------------------------------------------------------------


@quick
@given(bits=bit_widths, scale=st.floats(1e-3, 10))
def test_gelu_has_a_grid_for_each_sign(bits: int, scale: float) -> None:
    quantizer, half = with_scale(bits, scale), 2 ** (bits - 1)
    extent = max(scale * half, GELU_DEPTH)
    x = torch.cat([torch.linspace(-extent, extent, 3001), torch.linspace(-GELU_DEPTH, 0, 1001)]).sort().values
    y = quantizer(x)
    assert len(y.unique()) <= 2**bits
    assert y.diff().min() >= 0
    assert (y[x >= 0] >= 0).all()
    assert (y[x <= 0] <= 0).all()
    torch.testing.assert_close(y.max(), torch.tensor(scale * (half - 1)))
    torch.testing.assert_close(y.min(), torch.tensor(-GELU_DEPTH))
    torch.testing.assert_close(quantizer(y), y, rtol=0, atol=0)


@quick
@given(bits=bit_widths, scale=st.floats(1e-3, 10))
def test_gelu_error_is_at_most_half_a_step_of_its_sign(bits: int, scale: float) -> None:
    quantizer, half = with_scale(bits, scale), 2 ** (bits - 1)
    above, below = torch.linspace(0, scale * (half - 1), 501), torch.linspace(-GELU_DEPTH, 0, 501)
    assert (quantizer(above) - above).abs().max() <= 0.501 * scale
    assert (quantizer(below) - below).abs().max() <= 0.501 * quantizer.negative_scale


def test_gelu_gradient_passes_inside_and_is_cut_outside() -> None:
    quantizer = with_scale(3, 0.5)  # -0.17 … 0 and 0 … 1.5, and half a step
    x = torch.tensor([-0.3, -0.18, -0.17, -0.01, 0.0, 0.2, 1.5, 1.7, 1.8], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("x", [torch.zeros(5), torch.tensor([-0.1, -0.05])])
def test_gelu_calibration_with_nothing_above_zero(x: Tensor) -> None:
    quantizer = TwinGeluQuantizer(4).calibrate(x)
    assert (quantizer(x) - x).abs().max() <= 0.501 * quantizer.negative_scale


# --- both -----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_valid_bit_width(kind: str, bits: int) -> None:
    x = sample(kind)
    quantizer = MAKE[kind](bits).calibrate(x)
    assert quantizer.scale.shape == ()
    assert (quantizer(x) - x).norm() < 0.6 * x.norm()


@both
@pytest.mark.parametrize("bits", [1, 9, 4.0, "4", None, True])
def test_other_bit_widths_are_refused(kind: str, bits: int) -> None:
    with pytest.raises(AdfqError, match=r"from 2 to 8"):
        MAKE[kind](bits)


@both
def test_more_bits_err_less(kind: str) -> None:
    x = sample(kind)
    errors = [float((MAKE[kind](bits).calibrate(x)(x) - x).square().mean()) for bits in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2]


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_quantized_as_single(kind: str, dtype: torch.dtype) -> None:
    quantizer, x = MAKE[kind](4).calibrate(sample(kind)), sample(kind, seed=1).to(dtype)
    y = quantizer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), quantizer(x.float()), rtol=torch.finfo(dtype).eps, atol=1e-7)


@both
def test_values_are_the_same_with_and_without_gradients(kind: str) -> None:
    x = sample(kind)
    quantizer = MAKE[kind](4).calibrate(x)
    with torch.no_grad():
        expected = quantizer(x)
    assert torch.equal(quantizer(x.clone().requires_grad_()), expected)


@both
def test_a_state_dict_restores_the_values(kind: str) -> None:
    original, x = MAKE[kind](4).calibrate(sample(kind)), sample(kind, seed=1)
    restored = MAKE[kind](4)
    restored.load_state_dict(original.state_dict())
    assert torch.equal(restored(x), original(x))
