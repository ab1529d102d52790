"""Quantizers against golden vectors, and what holds of them whatever the data."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adfq.parts
from adfq import AdfqError
from adfq.quantizers import (
    LogQuantizer,
    PerPatchOutlierQuantizer,
    Quantizer,
    RunTimePatchOutlierQuantizer,
    ShiftLogQuantizer,
    TwinGeluQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
)

quick = settings(max_examples=40, deadline=None, derandomize=True)

MakeQuantizer = Callable[[int], Quantizer]

MAKE: dict[str, MakeQuantizer] = {
    "uniform tensor minmax": lambda bits: UniformQuantizer(bits),
    "uniform channel percentile": lambda bits: UniformQuantizer(bits, "channel", "percentile"),
    "uniform row minmax": lambda bits: UniformQuantizer(bits, "row"),
    "uniform patch percentile": lambda bits: UniformQuantizer(bits, "patch", "percentile"),
    "uniform tensor mse": lambda bits: UniformQuantizer(bits, range="mse"),
    "per patch": lambda bits: PerPatchOutlierQuantizer(bits, 1.5),
    "per patch at run time": lambda bits: RunTimePatchOutlierQuantizer(bits, 1.5),
    "log": lambda bits: LogQuantizer(bits),
    "log base 2": lambda bits: LogQuantizer(bits, 2.0),
    "shift log dynamic": lambda bits: ShiftLogQuantizer(bits),
    "shift log static": lambda bits: ShiftLogQuantizer(bits, shift="static"),
}
every_quantizer = pytest.mark.parametrize("kind", MAKE)


def sample(kind: str, batch: int = 4, seed: int = 0) -> Tensor:
    """Typical inputs of the quantizer, B×N×C."""
    x = torch.randn(batch, 9, 12, generator=torch.Generator().manual_seed(seed))
    return x.mul(2).softmax(-1) if kind in ("log", "log base 2") else x


def calibrated(kind: str, bits: int = 4) -> Quantizer:
    return MAKE[kind](bits).calibrate(sample(kind))


# --- golden vectors -------------------------------------------------------------------------------------------------


def assert_matches(quantizer: Quantizer, case: dict[str, Tensor]) -> None:
    """Values agree to 1e-5, but for at most 0.1 % that lie on a rounding boundary and may differ by one step."""
    y, expected = quantizer(case["x"]), case["y"]
    assert y.shape == expected.shape
    off = ~torch.isclose(y, expected, rtol=1e-5, atol=1e-6)
    assert off.float().mean() <= 1e-3
    if off.any():
        levels = torch.cat([y.flatten(), expected.flatten()]).unique()
        step = levels.diff().max() if isinstance(quantizer, LogQuantizer) else quantizer.scale.max()
        assert (y - expected)[off].abs().max() <= 1.001 * step


def case_of(vectors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    found = {key.rpartition("/")[2]: value for key, value in vectors.items() if key.rpartition("/")[0] == name}
    assert found, f"no golden vectors {name}"
    return found


def assert_calibrates_like(quantizer: Quantizer, case: dict[str, Tensor]) -> None:
    quantizer.calibrate(case["x"])
    torch.testing.assert_close(quantizer.scale, case["scale"], rtol=1e-5, atol=0)
    if isinstance(quantizer, UniformQuantizer):
        torch.testing.assert_close(quantizer.zero_point, case["zero_point"], rtol=0, atol=0)
    assert_matches(quantizer, case)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("uniform_tensor_percentile", "tensor"),
        ("uniform_lastdim_percentile", "channel"),
        ("uniform_outchannel_percentile", "row"),
    ],
)
def test_golden_uniform_percentile(
    load_golden: Callable[[str], dict[str, Tensor]], name: str, granularity: str, bits: int
) -> None:
    case = case_of(load_golden("repq_quantizers_11.npz"), f"{name}/w{bits}")
    assert_calibrates_like(UniformQuantizer(bits, granularity, "percentile"), case)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_golden_log(load_golden: Callable[[str], dict[str, Tensor]], bits: int) -> None:
    assert_calibrates_like(LogQuantizer(bits), case_of(load_golden("repq_quantizers_11.npz"), f"log_sqrt2/w{bits}"))


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("side", ["one", "two"])
def test_golden_uniform_mse(load_golden: Callable[[str], dict[str, Tensor]], side: str, bits: int) -> None:
    case = case_of(load_golden("adfq_quantizers_11.npz"), f"uniform_mse_{side}_sided/w{bits}")
    assert_calibrates_like(UniformQuantizer(bits, range="mse"), case)


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("threshold", [2, 5, 10])
def test_golden_per_patch_outlier(load_golden: Callable[[str], dict[str, Tensor]], threshold: int, bits: int) -> None:
    vectors = load_golden("adfq_quantizers_11.npz")
    name = f"per_patch_outlier/w{bits}_alpha{threshold}"
    quantizer = PerPatchOutlierQuantizer(bits, threshold)
    assert_calibrates_like(quantizer, case_of(vectors, name))
    assert_matches(quantizer, case_of(vectors, f"{name}_second"))


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_golden_shift_log(load_golden: Callable[[str], dict[str, Tensor]], bits: int) -> None:
    vectors = load_golden("adfq_quantizers_11.npz")
    quantizer = ShiftLogQuantizer(bits)
    assert_calibrates_like(quantizer, case_of(vectors, f"shift_log_sqrt2/w{bits}"))
    assert_matches(quantizer, case_of(vectors, f"shift_log_sqrt2/w{bits}_second"))


# --- uniform --------------------------------------------------------------------------------------------------------

# Hundredths, so that the extent of a sample is never lost beside its offset.
values = st.lists(st.integers(-10_000, 10_000), min_size=1, max_size=60).map(lambda ns: torch.tensor(ns) / 100)
bit_widths = st.integers(2, 8)


@quick
@given(x=values, other=values, bits=bit_widths)
def test_uniform_is_idempotent(x: Tensor, other: Tensor, bits: int) -> None:
    quantizer = UniformQuantizer(bits).calibrate(x)
    once = quantizer(other)
    torch.testing.assert_close(quantizer(once), once, rtol=0, atol=0)


@quick
@given(x=values, bits=bit_widths)
def test_uniform_error_is_at_most_half_a_step_within_the_minmax_range(x: Tensor, bits: int) -> None:
    quantizer = UniformQuantizer(bits).calibrate(x)
    inside = torch.linspace(float(x.min()), float(x.max()), 301)
    for data in (x, inside):
        assert (quantizer(data) - data).abs().max() <= 0.5 * quantizer.scale + 1e-4


@quick
@given(x=values, bits=bit_widths)
def test_uniform_range_grows_no_wider_than_the_data(x: Tensor, bits: int) -> None:
    assume(x.max() > x.min())
    quantizer = UniformQuantizer(bits).calibrate(x)
    reached = quantizer(torch.tensor([-1e6, 1e6]))
    assert float(reached[1] - reached[0]) == pytest.approx(float(x.max() - x.min()), rel=1e-4)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "row", "patch"])
def test_granularity_is_what_shares_a_range(granularity: str) -> None:
    x = torch.randn(3, 5, 7)
    parts = {
        "tensor": [(...,)],
        "channel": [(..., slice(i, i + 1)) for i in range(7)],
        "row": [(slice(i, i + 1),) for i in range(3)],
        "patch": [(slice(None), slice(i, i + 1)) for i in range(5)],
    }[granularity]
    whole = UniformQuantizer(3, granularity).calibrate(x)
    assert whole.scale.numel() == len(parts)
    for part in parts:
        alone = UniformQuantizer(3).calibrate(x[part])
        torch.testing.assert_close(whole(x)[part], alone(x[part]), rtol=0, atol=0)


def test_heads_have_a_range_each_and_patches_of_windows_share_it() -> None:
    x = torch.randn(6, 3, 5, 4) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    for range in ("minmax", "percentile", "mse"):
        quantizer = UniformQuantizer(4, "head", range).calibrate(x)
        assert quantizer.scale.shape == quantizer.zero_point.shape == (1, 3, 1, 1)
        for head in (0, 1, 2):
            alone = UniformQuantizer(4, range=range).calibrate(x[:, head])
            torch.testing.assert_close(quantizer(x[:2])[:, head], alone(x[:2, head]), rtol=0, atol=0)
        assert torch.equal(quantizer.decode(quantizer.encode(x)), quantizer(x))


def test_patches_of_a_map_have_a_range_for_each_position() -> None:
    x = torch.randn(2, 3, 4, 6)
    quantizer = UniformQuantizer(4, "patch").calibrate(x)
    assert quantizer.scale.shape == (1, 3, 4, 1)
    alone = UniformQuantizer(4).calibrate(x[:, 2, 1])
    torch.testing.assert_close(quantizer(x)[:, 2, 1], alone(x[:, 2, 1]), rtol=0, atol=0)


@pytest.mark.parametrize("calibrated_with", [1, 5])
@pytest.mark.parametrize(
    "make",
    [lambda: UniformQuantizer(4, "patch"), lambda: PerPatchOutlierQuantizer(4, 2.0)],
    ids=["uniform", "per patch"],
)
def test_another_number_of_tokens_is_refused(make: Callable[[], Quantizer], calibrated_with: int) -> None:
    quantizer = make().calibrate(torch.randn(2, calibrated_with, 8))
    quantizer(torch.randn(7, calibrated_with, 8))  # another batch size is fine
    with pytest.raises(AdfqError, match=rf"\({calibrated_with},\).*\(6,\)"):
        quantizer(torch.randn(2, 6, 8))
    with pytest.raises(AdfqError):
        quantizer(torch.randn(2, calibrated_with, calibrated_with, 8))


@pytest.mark.parametrize(
    ("granularity", "shape"), [("patch", (4, 5)), ("channel", (4,)), ("row", (4,)), ("head", (4, 5, 6))]
)
def test_a_granularity_that_does_not_fit_the_shape(granularity: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(AdfqError, match=granularity):
        UniformQuantizer(4, granularity).calibrate(torch.randn(shape))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: UniformQuantizer(4, "token"), "tensor, channel, row, patch"),
        (lambda: UniformQuantizer(4, range="entropy"), "minmax, percentile, percentile9, percentile10, mse"),
        (lambda: ShiftLogQuantizer(4, shift="frozen"), "dynamic, static"),
        (lambda: LogQuantizer(4, 1.0), "base"),
        (lambda: LogQuantizer(4, 3.0), "must be 2 or √2"),
        (lambda: LogQuantizer(4, float("nan")), "base"),
        (lambda: PerPatchOutlierQuantizer(4, 0.0), "threshold"),
        (lambda: PerPatchOutlierQuantizer(4, float("nan")), "threshold"),
    ],
)
def test_arguments_that_do_not_exist(make: Callable[[], Quantizer], says: str) -> None:
    with pytest.raises(AdfqError, match=says):
        make()


# --- logarithmic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [2.0, 2**0.5])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_log_error_is_at_most_half_a_step_of_the_logarithm(base: float, bits: int) -> None:
    quantizer = LogQuantizer(bits, base).calibrate(torch.rand(1000))
    smallest = quantizer.scale * base ** -(2.0**bits - 1)
    if smallest < 1e-37:
        smallest = torch.tensor(1e-37)
    x = torch.logspace(float(smallest.log10()), float(quantizer.scale.log10()), 2000).clamp(max=float(quantizer.scale))
    steps = (quantizer(x) / x).double().log2() / np.log2(base)
    assert steps.abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("base", [2.0, 2**0.5])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_log_takes_the_nearer_level_on_either_side_of_the_middle_between_two(base: float, bits: int) -> None:
    quantizer = LogQuantizer(bits, base)
    quantizer.scale = torch.tensor(1.0)
    codes = torch.arange(min(quantizer.levels, 120 if base == 2 else 240), dtype=torch.float64)
    # In double precision, and 10⁻⁷ away from it, where a float32 of about this size next differs.
    middles = base ** -(codes + 0.5)
    for factor, offset in ((1 - 1.5e-7, 1), (1 + 1.5e-7, 0)):
        expected = base ** -(codes + offset)
        expected[codes + offset >= quantizer.levels] = 0
        found = quantizer((middles * factor).float()).double()
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("base", [2.0, 2**0.5])
@pytest.mark.parametrize("gradients", [False, True])
def test_what_log_quantizers_are_given_that_is_no_number_does_not_become_one(base: float, gradients: bool) -> None:
    nan = torch.tensor([math.nan, -math.nan, 0.5])
    for quantizer in (LogQuantizer(4, base), ShiftLogQuantizer(4, base, "static"), ShiftLogQuantizer(4, base)):
        quantizer.calibrate(torch.rand(100))
        with torch.set_grad_enabled(gradients):
            assert quantizer(nan).isfinite().tolist()[:2] == [False, False]


def test_log_gives_zero_beyond_its_last_code_and_the_largest_level_above_its_range() -> None:
    quantizer = LogQuantizer(2, 2.0).calibrate(torch.linspace(0, 1, 100_000))
    top = quantizer.scale
    torch.testing.assert_close(
        quantizer(torch.stack([0 * top, top / 20, top / 8, top / 4, top / 2, top, 2 * top])) / top,
        torch.tensor([0, 0, 1 / 8, 1 / 4, 1 / 2, 1, 1]),
    )


def test_log_calibration_of_negative_values() -> None:
    with pytest.raises(AdfqError, match="negative"):
        LogQuantizer(4).calibrate(torch.tensor([0.5, -1e-3]))


@pytest.mark.parametrize("make", [LogQuantizer, ShiftLogQuantizer])
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_log_of_constant_values(make: type[LogQuantizer], value: float) -> None:
    x = torch.full((3, 4), value)
    torch.testing.assert_close(make(4).calibrate(x)(x), x, rtol=1e-5, atol=2e-6)


def test_log_of_nearly_empty_values_still_represents_the_largest() -> None:
    x = torch.zeros(10_000)
    x[17] = 0.5
    quantizer = LogQuantizer(4).calibrate(x)
    assert quantizer(x)[17] > 0.1
    assert (quantizer(x)[:17] == 0).all()


def test_shift_log_reaches_the_negative_lobe() -> None:
    x = nn.functional.gelu(torch.randn(4, 50, 60))
    for shift in ("dynamic", "static"):
        y = ShiftLogQuantizer(6, shift=shift).calibrate(x)(x)
        lobe = x < -0.1
        assert (y - x)[lobe].abs().max() < 0.02
        assert y.min() == pytest.approx(float(x.min()), abs=1e-5)


def test_a_static_shift_makes_an_image_independent_of_its_neighbours() -> None:
    x = torch.randn(6, 9, 12)
    x[3] -= 10  # moves the batch's minimum
    static = ShiftLogQuantizer(4, shift="static").calibrate(torch.randn(6, 9, 12))
    dynamic = ShiftLogQuantizer(4).calibrate(torch.randn(6, 9, 12))
    torch.testing.assert_close(static(x)[:2], static(x[:2]), rtol=0, atol=0)
    assert not torch.allclose(dynamic(x)[:2], dynamic(x[:2]))


def test_a_static_shift_takes_values_below_its_minimum_as_the_minimum() -> None:
    quantizer = ShiftLogQuantizer(4, shift="static").calibrate(torch.randn(500).clamp_(min=-1))
    torch.testing.assert_close(quantizer(torch.tensor([-1.0, -5.0])), torch.tensor([-1.0, -1.0]), rtol=1e-5, atol=0)


# --- per patch ------------------------------------------------------------------------------------------------------


@quick
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 4), threshold=st.sampled_from([0.5, 1.0, 2.0]))
def test_outliers_are_kept_exactly_and_the_rest_is_quantized(seed: int, bits: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 6, 40, generator=generator)
    x[0, 0, :3] = torch.tensor([threshold, -threshold, 50.0])  # the threshold itself is no outlier
    quantizer = PerPatchOutlierQuantizer(bits, threshold).calibrate(x)
    y = quantizer(x)
    kept = quantizer.outliers(x)
    assert torch.equal(kept, x.abs() > threshold)
    assert torch.equal(y[kept], x[kept])
    for token in range(6):
        assert len(y[:, token][~kept[:, token]].unique()) <= 2**bits
    assert (y[~kept] != x[~kept]).float().mean() > 0.9


def test_outliers_do_not_widen_the_range() -> None:
    x = torch.randn(4, 5, 32).clamp_(-2, 2)
    spiked = x.clone()
    spiked[0, :, 0] = 1000.0
    x[0, :, 0] = 0.0
    plain, ours = (PerPatchOutlierQuantizer(4, 3.0).calibrate(t) for t in (x, spiked))
    torch.testing.assert_close(ours.scale, plain.scale, rtol=0, atol=0)


@quick
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 4), tokens=st.integers(1, 9))
def test_a_range_taken_at_run_time_is_that_of_the_patch_alone(seed: int, bits: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, tokens, 40, generator=generator) * 10 ** torch.randn(3, tokens, 1, generator=generator)
    x[0, 0, :3] = torch.tensor([20.0, -20.0, 500.0])  # the threshold itself is no outlier
    quantizer = RunTimePatchOutlierQuantizer(bits, 20.0).calibrate(torch.randn(1, 2, 40))
    y, kept = quantizer(x), quantizer.outliers(x)
    assert torch.equal(y[kept], x[kept])
    for image in range(3):
        for token in range(tokens):
            rest = x[image, token].masked_fill(kept[image, token], 0.0)
            plain = UniformQuantizer(bits).calibrate(rest)
            torch.testing.assert_close(y[image, token][~kept[image, token]], plain(rest)[~kept[image, token]])


# --- all quantizers -------------------------------------------------------------------------------------------------


@every_quantizer
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_valid_bit_width(kind: str, bits: int) -> None:
    quantizer = calibrated(kind, bits)
    assert quantizer.bits == bits
    assert quantizer.levels == 2**bits
    assert torch.isfinite(quantizer(sample(kind))).all()


@every_quantizer
@pytest.mark.parametrize("bits", [1, 0, -4, 9, 16, 4.0, "4", None, True])
def test_other_bit_widths_are_refused(kind: str, bits: int) -> None:
    with pytest.raises(AdfqError, match=r"from 2 to 8"):
        MAKE[kind](bits)


@pytest.mark.parametrize(
    "kind", ["uniform tensor minmax", "uniform tensor mse", "log", "log base 2", "shift log static"]
)
@quick
@given(seed=st.integers(0, 10**6), bits=bit_widths)
def test_there_are_at_most_two_to_the_bits_values(kind: str, seed: int, bits: int) -> None:
    quantizer = MAKE[kind](bits).calibrate(sample(kind, seed=seed))
    everything = torch.linspace(-5, 5, 4001)
    small = torch.logspace(-30, 0, 2001)
    # The logarithm has 2^bits codes and 0 besides.
    assert len(quantizer(torch.cat([everything, small])).unique()) <= 2**bits + isinstance(quantizer, LogQuantizer)


@pytest.mark.parametrize(
    "kind", ["uniform tensor minmax", "uniform tensor mse", "log", "log base 2", "shift log static"]
)
@quick
@given(seed=st.integers(0, 10**6), bits=bit_widths)
def test_order_is_kept(kind: str, seed: int, bits: int) -> None:
    quantizer = MAKE[kind](bits).calibrate(sample(kind, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.randn(500, generator=generator) * 3, torch.rand(500, generator=generator) ** 4]).sort().values
    assert quantizer(x).diff().min() >= 0


@every_quantizer
def test_more_bits_err_less(kind: str) -> None:
    x = sample(kind)
    errors = [float((MAKE[kind](bits).calibrate(x)(x) - x).square().mean()) for bits in (2, 4, 8)]
    assert errors[0] > errors[1]
    assert errors[1] >= errors[2]  # more codes of a logarithm are smaller ones: its coarse top levels stay


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_quantized_as_single(kind: str, dtype: torch.dtype) -> None:
    quantizer = calibrated(kind)
    x = sample(kind, seed=1).to(dtype)
    y = quantizer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), quantizer(x.float()), rtol=torch.finfo(dtype).eps, atol=1e-7)


@every_quantizer
def test_calibration_in_half_precision_gives_single_precision_buffers(kind: str) -> None:
    x = sample(kind).bfloat16()
    half, single = MAKE[kind](4).calibrate(x), MAKE[kind](4).calibrate(x.float())
    for (name, buffer), expected in zip(half.named_buffers(), single.buffers(), strict=True):
        assert buffer.dtype == expected.dtype, name
        assert buffer.dtype in (torch.float32, torch.bool), name
        assert torch.equal(buffer, expected), name


@every_quantizer
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_buffers_stay_single_precision_when_the_model_is_cast(kind: str, cast: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), calibrated(kind))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    getattr(model, cast)()
    assert model[0].weight.dtype != torch.float32
    for name, buffer in model.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert buffer.dtype in (torch.float32, torch.bool), name
        assert torch.equal(buffer, before[name]), name


@every_quantizer
def test_a_state_dict_restores_an_uncalibrated_quantizer(kind: str) -> None:
    original, x = calibrated(kind), sample(kind, seed=1)
    model = nn.Sequential(MAKE[kind](4))
    assert not model[0].is_calibrated
    model.load_state_dict(nn.Sequential(original).state_dict())
    assert model[0].is_calibrated
    assert torch.equal(model(x), original(x))


def test_a_state_dict_replaces_another_shape() -> None:
    quantizer = UniformQuantizer(4, "channel").calibrate(torch.randn(5, 3))
    other = UniformQuantizer(4, "channel").calibrate(torch.randn(5, 7))
    quantizer.load_state_dict(other.state_dict())
    x = torch.randn(5, 7)
    assert torch.equal(quantizer(x), other(x))


@every_quantizer
def test_calibrating_again_forgets_the_first_time(kind: str) -> None:
    x = sample(kind, seed=1)
    again = calibrated(kind).calibrate(0.1 * x)
    fresh = MAKE[kind](4).calibrate(0.1 * x)
    assert torch.equal(again(x), fresh(x))
    if kind != "per patch at run time":  # which learns nothing in calibration
        assert not torch.equal(again(x), calibrated(kind)(x))


@every_quantizer
def test_forward_changes_nothing(kind: str) -> None:
    quantizer, x = calibrated(kind), sample(kind, seed=1)
    buffers, before = {name: b.clone() for name, b in quantizer.named_buffers()}, x.clone()
    first = quantizer(x)
    quantizer(3 * x)
    assert torch.equal(quantizer(x), first)
    assert torch.equal(x, before)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in quantizer.named_buffers())


@every_quantizer
def test_forward_before_calibration(kind: str) -> None:
    with pytest.raises(RuntimeError, match="before it is calibrated"):
        MAKE[kind](4)(sample(kind))


@every_quantizer
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_calibration_on_values_that_are_not_finite(kind: str, value: float) -> None:
    quantizer, x = MAKE[kind](4), sample(kind)
    x[1, 2, 3] = value
    with pytest.raises(AdfqError, match="not finite"):
        quantizer.calibrate(x)
    assert not quantizer.is_calibrated


@every_quantizer
def test_calibration_on_nothing(kind: str) -> None:
    with pytest.raises(AdfqError, match="empty"):
        MAKE[kind](4).calibrate(torch.empty(0, 9, 12))


# --- gradients ------------------------------------------------------------------------------------------------------


@every_quantizer
def test_values_do_not_depend_on_gradients_being_recorded(kind: str) -> None:
    quantizer, x = calibrated(kind), sample(kind, seed=1)
    with torch.no_grad():
        without = quantizer(x)
    assert torch.equal(quantizer(x), without)
    recorded = quantizer(x.clone().requires_grad_())
    assert recorded.requires_grad
    assert torch.equal(recorded.detach(), without)


def gradient_of(quantizer: Quantizer, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(
    ("quantizer", "inside", "outside"),
    [
        (UniformQuantizer(2), (-0.99, 1.99), [(-9, -1.6), (2.6, 9)]),
        (UniformQuantizer(4), (-0.99, 1.99), [(-9, -1.2), (2.2, 9)]),
        (UniformQuantizer(4, range="mse"), (-0.8, 1.8), [(-9, -1.2), (2.2, 9)]),
        (LogQuantizer(4), (1e-6, 1.9), [(-9, -0.1), (2.1, 9)]),
        (ShiftLogQuantizer(4, shift="static"), (-0.99, 1.9), [(-9, -1.1), (2.1, 9)]),
    ],
    ids=["uniform 2 bits", "uniform 4 bits", "uniform mse", "log", "shift log"],
)
def test_gradients_pass_inside_the_range_only(
    quantizer: Quantizer, inside: tuple[float, float], outside: list[tuple[float, float]]
) -> None:
    quantizer.calibrate(torch.linspace(0 if type(quantizer) is LogQuantizer else -1, 2, 20_000))
    torch.testing.assert_close(gradient_of(quantizer, torch.linspace(*inside, 500)), torch.ones(500))
    for ends in outside:
        assert torch.equal(gradient_of(quantizer, torch.linspace(*ends, 500)), torch.zeros(500))


def test_gradients_pass_through_outliers() -> None:
    quantizer = PerPatchOutlierQuantizer(4, 2.0).calibrate(torch.randn(8, 3, 100))
    x = torch.full((1, 3, 4), 0.1)
    x[..., 0], x[..., 1] = 7.0, -7.0
    torch.testing.assert_close(gradient_of(quantizer, x), torch.ones(1, 3, 4))


@every_quantizer
def test_gradients_are_finite_everywhere(kind: str) -> None:
    quantizer = calibrated(kind)
    x = torch.randn(4, 9, 12) * 10
    x[0], x[1, :, ::2] = 0.0, 0.0
    assert torch.isfinite(gradient_of(quantizer, x)).all()


# --- integer codes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@given(bits=st.integers(2, 8), seed=st.integers(0, 2**32), offset=st.floats(-1, 1))
@quick
def test_codes_give_the_quantized_values_bit_for_bit(dtype: torch.dtype, bits: int, seed: int, offset: float) -> None:
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.02 * offset
    quantizer = UniformQuantizer(bits, "row").calibrate(weight)
    quantized = quantizer(weight)
    for values in (weight, quantized, quantized.to(dtype if bits < 8 else torch.float16)):
        codes = quantizer.encode(values)
        assert codes.dtype == torch.uint8
        assert int(codes.max()) < 2**bits
        assert torch.equal(quantizer.decode(codes), quantized)


def test_logarithmic_quantizers_have_no_integer_codes() -> None:
    quantizer = calibrated("log")
    with pytest.raises(NotImplementedError, match="LogQuantizer has no integer codes"):
        quantizer.encode(torch.ones(2))
    with pytest.raises(NotImplementedError, match="LogQuantizer has no integer codes"):
        quantizer.decode(torch.ones(2, dtype=torch.uint8))


# --- accelerators ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every_quantizer
def test_cuda_agrees_with_the_cpu(kind: str) -> None:
    x = sample(kind)
    on_cpu, on_gpu = MAKE[kind](4).calibrate(x), MAKE[kind](4).calibrate(x.cuda())
    assert on_gpu.scale.is_cuda
    moved = MAKE[kind](4).calibrate(x).cuda()
    for other in (on_gpu, moved):
        torch.testing.assert_close(other.scale.cpu(), on_cpu.scale, rtol=1e-5, atol=0)
        # Division rounds alike, logarithms need not: a value on a boundary may take the neighbouring code.
        off = ~torch.isclose(other(x.cuda()).cpu(), on_cpu(x), rtol=1e-4, atol=1e-5)
        assert off.float().mean() <= 1e-2


# --- in parts -------------------------------------------------------------------------------------------------------


TWINS = {"twin softmax": TwinSoftmaxQuantizer, "twin gelu": TwinGeluQuantizer}


@pytest.mark.parametrize("kind", [*MAKE, *TWINS])
@pytest.mark.parametrize("size", [1, 150])
def test_large_tensors_are_quantized_in_parts_to_the_same_bits(
    kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = sample("log" if kind == "twin softmax" else kind, batch=7)
    quantizer = {**MAKE, **TWINS}[kind](4).calibrate(x)
    with torch.no_grad():
        whole = quantizer(x)
        monkeypatch.setattr(adfq.parts, "_PART", size)
        assert torch.equal(quantizer(x), whole)
        assert torch.equal(quantizer(x.transpose(0, 1).contiguous().transpose(0, 1)), whole)


@pytest.mark.parametrize(
    "quantizer",
    [
        UniformQuantizer(4),
        LogQuantizer(4),
        ShiftLogQuantizer(4),
        ShiftLogQuantizer(4, shift="static"),
        TwinGeluQuantizer(4),
        TwinSoftmaxQuantizer(4),
        PerPatchOutlierQuantizer(4, 5.0),
        RunTimePatchOutlierQuantizer(4, 5.0),
    ],
    ids=lambda quantizer: quantizer.describe(),
)
@pytest.mark.parametrize("gradient", [True, False])
def test_an_empty_batch_stays_empty(quantizer: Quantizer, gradient: bool) -> None:
    quantizer.calibrate(torch.rand(2, 3, 4))
    with torch.set_grad_enabled(gradient):
        assert quantizer(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
