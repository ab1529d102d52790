"""The uniform quantizer with a real zero point: levels, searches, gradients, state."""

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
from adfq.quantizers import AffineUniformQuantizer, UniformQuantizer
from adfq.quantizers.affine_uniform import ZEROS

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31 - 1)
widths = st.integers(2, 8)
kinds = st.sampled_from(["tensor", "row", "channel"])


def draw(seed: int, *shape: int, skewed: bool = False) -> Tensor:
    """Rows of different sizes, with tails; skewed ones lie above -0.3."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * (1 + torch.rand(shape[0], *[1] * (len(shape) - 1))) ** 3
    return x.exp() / 4 - 0.3 if skewed else x


def levels_of(quantizer: UniformQuantizer) -> Tensor:
    """Return the values of all codes of a quantizer with one scale."""
    return quantizer.decode(torch.arange(quantizer.levels, dtype=torch.uint8))


@few
@given(seeds, widths)
def test_levels_in_the_middle_lie_symmetrically_about_a_0_that_is_none_of_them(seed: int, bits: int) -> None:
    quantizer = AffineUniformQuantizer(bits).calibrate(draw(seed, 5, 40))
    levels = levels_of(quantizer)
    assert torch.equal(levels, -levels.flip(0))
    assert torch.equal(levels.abs().min(), quantizer.scale / 2)
    assert torch.equal(quantizer(levels), levels)


@few
@given(seeds, st.integers(2, 6), kinds)
def test_a_shared_zero_point_is_one_for_all_groups(seed: int, bits: int, granularity: str) -> None:
    quantizer = AffineUniformQuantizer(bits, granularity, "shared").calibrate(draw(seed, 5, 40, skewed=True))
    assert quantizer.zero_point.shape == quantizer.scale.shape
    assert quantizer.zero_point.unique().numel() == 1


@few
@given(seeds, st.integers(2, 6), kinds, st.booleans())
def test_a_shared_zero_point_has_no_more_error_than_the_middle(
    seed: int, bits: int, granularity: str, skewed: bool
) -> None:
    x = draw(seed, 6, 80, skewed=skewed)
    errors = {
        zero: (AffineUniformQuantizer(bits, granularity, zero).calibrate(x)(x) - x).abs().pow(2.4).sum()
        for zero in ("shared", "middle")
    }
    # The zero point is chosen before step sizes are refined, which may help the middle by a little more.
    assert errors["shared"] <= 1.1 * errors["middle"]
    if skewed and granularity == "tensor" and bits <= 4:
        assert errors["shared"] < 0.9 * errors["middle"]


@few
@given(seeds, kinds, st.sampled_from(ZEROS))
def test_the_error_falls_with_the_bits(seed: int, granularity: str, zero: str) -> None:
    x = draw(seed, 6, 80)
    errors = [
        float((AffineUniformQuantizer(bits, granularity, zero).calibrate(x)(x) - x).norm()) for bits in (2, 3, 4, 6, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_normal_values_have_the_best_symmetric_step() -> None:
    x = torch.randn(20000)
    for bits, error in ((3, 0.0374), (4, 0.01154)):
        found, squares = AffineUniformQuantizer(bits), UniformQuantizer(bits, "tensor", "mse")
        off, other = ((quantizer.calibrate(x)(x) - x).abs() for quantizer in (found, squares))
        assert off.square().mean() < 1.15 * error
        assert off.pow(2.5).mean() < other.pow(2.5).mean()  # what it minimizes


@few
@given(seeds, kinds, st.sampled_from(ZEROS))
def test_batches_are_as_the_whole(seed: int, granularity: str, zero: str) -> None:
    x = draw(seed, 8, 6, 5).double()
    x, parts = (x, x.split([1, 3, 4])) if granularity != "row" else (x, x.split([2, 4], 1))
    whole = AffineUniformQuantizer(3, granularity, zero).calibrate(x)
    in_batches = AffineUniformQuantizer(3, granularity, zero)
    for statistic in in_batches.search():
        for part in parts:
            in_batches.observe(statistic, part, part.numel() / x.numel())
    assert torch.equal(in_batches.scale, whole.scale)
    assert torch.equal(in_batches.zero_point, whole.zero_point)


@pytest.mark.parametrize("zero", ZEROS)
def test_a_group_of_zeros_is_a_placeholder_and_keeps_them(zero: str) -> None:
    x = draw(0, 4, 30).abs()
    x[2] = 0
    quantizer = AffineUniformQuantizer(3, "row", zero).calibrate(x)
    assert quantizer.has_range.flatten().tolist() == [True, True, False, True]
    assert quantizer.scale[2] == 1
    assert not quantizer(x)[2].any()
    assert not AffineUniformQuantizer(3, zero=zero).calibrate(torch.zeros(5))(torch.zeros(5)).any()


@few
@given(seeds, widths, kinds, st.sampled_from(ZEROS))
def test_decoded_codes_are_bit_for_bit_the_values(seed: int, bits: int, granularity: str, zero: str) -> None:
    x = draw(seed, 6, 30)
    quantizer = AffineUniformQuantizer(bits, granularity, zero).calibrate(x)
    y = quantizer(2 * x)  # beyond the range too
    codes = quantizer.encode(2 * x)
    assert codes.dtype == torch.uint8
    assert codes.max() <= quantizer.levels - 1
    assert torch.equal(quantizer.decode(codes), y)
    assert torch.equal(quantizer.encode(y), codes)
    with torch.no_grad():
        assert torch.equal(quantizer(2 * x), y)


def test_gradients_are_those_of_learned_step_sizes() -> None:
    x = draw(3, 5, 60)
    quantizer = AffineUniformQuantizer(3, "row").calibrate(x)
    quantizer.scale = (0.5 * quantizer.scale).requires_grad_()  # cuts values off on both sides
    x.requires_grad_()
    y = quantizer(x)
    weight = torch.randn_like(y)
    to_x, to_scale = torch.autograd.grad(y, (x, quantizer.scale), weight)
    scale = quantizer.scale.detach()
    codes = (x / scale + 3.5).round().detach()
    inside = (codes >= 0) & (codes <= 7)
    assert 0 < inside.float().mean() < 1
    assert torch.equal(to_x, weight * inside)
    steps = codes.clamp(0, 7) - 3.5 - torch.where(inside, x / scale, 0.0).detach()
    torch.testing.assert_close(to_scale, (weight * steps).sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [("tensor", ()), ("patch", (1, 3, 5, 1)), ("head", (1, 3, 1, 1)), ("head_channel", (1, 3, 1, 4))],
)
def test_operands_of_attention_have_scales_of_heads_positions_or_channels(
    granularity: str, shape: tuple[int, ...]
) -> None:
    x = draw(0, 2, 3, 5, 4)
    quantizer = AffineUniformQuantizer(4, granularity).calibrate(x)
    assert quantizer.scale.shape == quantizer.zero_point.shape == shape
    if granularity == "head_channel":
        alone = AffineUniformQuantizer(4).calibrate(x[:, 1, :, 2])
        torch.testing.assert_close(quantizer.scale[0, 1, 0, 2], alone.scale)


def test_each_column_of_a_head_needs_four_dimensions() -> None:
    with pytest.raises(AdfqError, match=r"'head_channel' does not fit a tensor of shape \(2, 3, 4\)"):
        AffineUniformQuantizer(4, "head_channel").calibrate(torch.randn(2, 3, 4))


def test_another_number_of_positions_is_refused() -> None:
    quantizer = AffineUniformQuantizer(4, "patch", "shared").calibrate(torch.randn(2, 5, 4))
    with pytest.raises(AdfqError, match=r"calibrated for \(5,\) token positions, got \(1,\)"):
        quantizer(torch.randn(2, 1, 4))


def test_saved_and_loaded_it_is_the_same(
    make_vit: Callable[..., nn.Module],
    make_images: Callable[..., Tensor],
    comes_back: Callable[..., nn.Module],
    tmp_path: Path,
) -> None:
    images = make_images()
    saved = adfq.quantize(make_vit(depth=1), "row_ridge", 3, 3, images)
    loaded = comes_back(saved, tmp_path / "model.safetensors", nn.Module.__call__, images)
    names = [name for name, module in saved.named_modules() if isinstance(module, AffineUniformQuantizer)]
    assert names
    for name in names:
        before, after = saved.get_submodule(name), loaded.get_submodule(name)
        assert isinstance(before, AffineUniformQuantizer)
        assert isinstance(after, AffineUniformQuantizer)
        assert (after.bits, after.granularity, after.zero) == (before.bits, before.granularity, before.zero), name
        assert torch.equal(after.scale, before.scale)
        assert torch.equal(after.zero_point, before.zero_point)


def test_a_higher_exponent_cuts_off_less() -> None:
    x = draw(0, 2000)
    steps = [float(AffineUniformQuantizer(4, exponent=exponent).calibrate(x).scale) for exponent in (2.0, 4.0, 8.0)]
    assert steps == sorted(steps)
    assert steps[0] < 0.9 * steps[2]


def test_an_unknown_zero_point_is_refused() -> None:
    with pytest.raises(AdfqError, match="unknown zero point 'highest'; there are middle, shared"):
        AffineUniformQuantizer(4, zero="highest")
    assert "zero point shared" in AffineUniformQuantizer(4, zero="shared").calibrate(torch.randn(9)).describe()
    assert "zero='shared', exponent=2.5" in repr(AffineUniformQuantizer(4, zero="shared"))
