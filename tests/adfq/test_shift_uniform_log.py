"""I&S-ViT's quantizers: shift-uniform-log2, and nine percentiles for weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adfq import AdfqError
from adfq.quantizers import ShiftUniformLogQuantizer, UniformQuantizer
from adfq.quantizers.shift_uniform_log import SHIFTS

LoadGolden = Callable[[str], dict[str, Tensor]]


def probabilities(temperature: float = 3.0) -> Tensor:
    return torch.softmax(temperature * torch.randn(2, 3, 9, 9), -1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("released", [False, True])
def test_outputs_are_shifted_powers_of_two(bits: int, released: bool) -> None:
    x = probabilities()
    quantizer = ShiftUniformLogQuantizer(bits, released).calibrate(x)
    y = quantizer(x)
    exponents = (y.double() + quantizer.shift.double()).log2()
    torch.testing.assert_close(exponents, exponents.round(), rtol=0.0, atol=1e-5)
    assert 1 < y.unique().numel() <= min(2**bits + released, 11)
    assert y.unique().numel() <= min(quantizer.highest + 1, 11)
    assert (y - x).abs().mean() < 0.2
    torch.testing.assert_close(quantizer.log_max, (x.max() + quantizer.shift).log2())


def test_of_all_shifts_the_best_is_taken_in_batches_as_in_one() -> None:
    x = probabilities()
    found = ShiftUniformLogQuantizer(3).calibrate(x)
    errors = []
    for shift in SHIFTS:
        logs = (x.double() + shift).log2()
        step = (logs.max() - logs.min()) / 7
        values = ((logs - logs.min()) / step).round() * step + logs.min()
        errors.append(float((2 ** values.round() - shift - x).square().mean()))
    assert found.shift == torch.tensor(SHIFTS[errors.index(min(errors))])
    in_batches = ShiftUniformLogQuantizer(3)
    for statistic in in_batches.search():
        for part in x:
            in_batches.observe(statistic, part, 0.5)
    assert torch.equal(in_batches(x), found(x))


def test_its_state_is_saved_with_it() -> None:
    x = probabilities()
    quantizer = ShiftUniformLogQuantizer(4).calibrate(x)
    other = ShiftUniformLogQuantizer(4)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), quantizer(x))


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_equal_values(value: float) -> None:
    y = ShiftUniformLogQuantizer(4).calibrate(torch.full((5,), value))(torch.tensor([value, 0.9]))
    assert y.isfinite().all()
    assert (y[0] - value).abs() < 0.3


def test_negative_values_are_refused() -> None:
    with pytest.raises(AdfqError, match="takes no negative values"):
        ShiftUniformLogQuantizer(4).calibrate(torch.tensor([-0.1, 0.5]))


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("kind", ["peaky", "flat"])
def test_golden_shift_uniform_log2(kind: str, bits: int, load_golden: LoadGolden) -> None:
    vectors = load_golden("iasvit_quantizers_31.npz")
    key = f"shift_uniform_log2_{kind}/w{bits}/"
    golden = {name.removeprefix(key): value for name, value in vectors.items() if name.startswith(key)}
    x = golden["x"].requires_grad_()
    released = ShiftUniformLogQuantizer(bits, released=True).calibrate(x)
    assert released.shift == golden["shift"]
    for name in ("log_min", "log_max"):
        torch.testing.assert_close(getattr(released, name), golden[name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        sound = ShiftUniformLogQuantizer(bits).calibrate(x)(x)
        assert share_off(released(x), golden["y"]) <= 1e-3
        assert share_off(released(golden["x_second"]), golden["y_second"]) <= 1e-3
    assert share_off(sound, golden["search_y"]) <= 1e-3
    y = released(x)
    assert share_off(y.detach(), golden["y"]) <= 1e-3
    (gradient,) = torch.autograd.grad(y, x, golden["grad_out"])
    assert share_off(gradient, golden["grad_in"], 1e-4) <= 1e-3


def share_off(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> float:
    """Return the share of elements beyond a relative tolerance; a power of two may be one exponent off there."""
    return float(((found - expected).abs() > tolerance * expected.abs() + 1e-7).float().mean())


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_golden_nine_percentiles(bits: int, load_golden: LoadGolden) -> None:
    vectors = load_golden("iasvit_quantizers_31.npz")
    key = f"uniform_outchannel_percentile9/w{bits}/"
    quantizer = UniformQuantizer(bits, "row", "percentile9").calibrate(vectors[f"{key}x"])
    torch.testing.assert_close(quantizer.scale, vectors[f"{key}scale"], rtol=1e-5, atol=0.0)
    assert torch.equal(quantizer.zero_point, vectors[f"{key}zero_point"])
    assert share_off(quantizer(vectors[f"{key}x"]), vectors[f"{key}y"]) <= 1e-3
