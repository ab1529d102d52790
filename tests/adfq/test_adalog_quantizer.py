"""AdaLog's quantizer against its released code, and the properties of its codes, gradients and shift."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adfq import AdfqError
from adfq.layers import QuantLinear
from adfq.quantizers import AdaLogQuantizer, UniformQuantizer
from adfq.quantizers.twin import GELU_DEPTH
from adfq.transforms.shift import fold_shift

LoadGolden = Callable[[str], dict[str, Tensor]]


def make(bits: int, q: int, scale: float = 1.0, shift: float = 0.0) -> AdaLogQuantizer:
    quantizer = AdaLogQuantizer(bits, shift)
    quantizer.scale, quantizer.q = torch.tensor(scale), torch.tensor(q)
    return quantizer


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_golden_levels_and_values(bits: int, load_golden: LoadGolden) -> None:
    vectors = load_golden("adalog_quantizers_31.npz")
    cases = [key.split("/")[1] for key in vectors if key.startswith(f"adalog/w{bits}") and key.endswith("/q")]
    assert cases
    for case in cases:
        found = {key.split("/")[2]: value for key, value in vectors.items() if key.startswith(f"adalog/{case}/")}
        quantizer = make(bits, int(found["q"]))
        table, _ = quantizer.level_table(quantizer.q)
        torch.testing.assert_close(quantizer(vectors["data/probs"]), found["y"], rtol=1e-6, atol=1e-9)
        assert torch.equal(found["exponent_table"].long(), torch.arange(2**bits) * quantizer.q // 37)
        torch.testing.assert_close(table[:-1], torch.exp2(-found["exponent_table"]) * found["fraction_table"])
        if "y_training" in found:
            quantizer.training_form = True
            torch.testing.assert_close(quantizer(vectors["data/probs"]), found["y_training"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("q", [15, 37, 61])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_golden_shift_and_gradients(bits: int, q: int, load_golden: LoadGolden) -> None:
    vectors, case = load_golden("adalog_quantizers_31.npz"), f"shift_adalog/w{bits}_q{q}"
    assert float(vectors[f"{case}/shift"]) == pytest.approx(GELU_DEPTH)
    quantizer = make(bits, q, float(vectors[f"{case}/scale"]), GELU_DEPTH)
    x = vectors["data/gelu"].clone().requires_grad_()
    torch.testing.assert_close(quantizer(x), vectors[f"{case}/y"], rtol=1e-6, atol=1e-7)
    quantizer.training_form = True
    quantizer.scale = nn.Parameter(quantizer.scale)
    y = quantizer(x)
    torch.testing.assert_close(y, vectors[f"{case}/y_training"], rtol=1e-6, atol=1e-7)
    y.backward(vectors[f"{case}/grad_y"])
    torch.testing.assert_close(x.grad, vectors[f"{case}/grad_x"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.scale.grad[None], vectors[f"{case}/grad_scale"], rtol=1e-5, atol=1e-5)
    quantizer.folded, quantizer.training_form = True, False
    torch.testing.assert_close(quantizer(x), vectors[f"{case}/y_shifted"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("q", [10, 37, 137])
def test_zeros_stay_zeros_and_have_no_gradient(q: int) -> None:
    x = torch.tensor([0.0, 1e-30, 0.3, 1.0, 2.0], requires_grad=True)
    for training_form in (False, True):
        quantizer = make(4, q)
        quantizer.training_form = training_form
        values = quantizer(x)
        assert values.isfinite().all()
        assert float(values.detach()[0]) < 1e-10
        (gradient,) = torch.autograd.grad(values.sum(), x)
        assert gradient.isfinite().all()
        assert gradient[0] == gradient[4] == 0
    assert quantizer(torch.empty(0)).shape == (0,)


@pytest.mark.parametrize("shift", [0.0, GELU_DEPTH])
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_codes_are_the_quantizer(bits: int, shift: float) -> None:
    quantizer = make(bits, 23, 0.7, shift)
    x = torch.linspace(-shift, 1, 400)
    codes = quantizer.encode(x)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) == min(2**bits, 80)  # the smallest ratio is 1e-15, of code 80
    assert torch.equal(quantizer.decode(codes), quantizer(x))
    with pytest.raises(NotImplementedError, match="8 bits"):
        make(8, 23).encode(x)


def test_calibration_by_itself_finds_a_base() -> None:
    x = torch.rand(2000) ** 4
    quantizer = AdaLogQuantizer(4).calibrate(x)
    assert float(quantizer.scale) == float(x.max())
    error = (quantizer(x) - x).square().mean()
    for q in (10, 20, 37, 90):
        other = make(4, q, float(quantizer.scale))
        assert error <= (other(x) - x).square().mean()
    with pytest.raises(AdfqError, match="below -0"):
        AdaLogQuantizer(4).calibrate(x - 0.1)
    assert "base 2^(" in quantizer.describe()


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_folding_the_shift_leaves_the_layer_as_it_was(bias: bool) -> None:
    layer = QuantLinear(nn.Linear(48, 24, bias=bias), "fc2")
    layer.weight_quantizer = UniformQuantizer(4, "row")
    layer.find_weight_range()
    layer.input_quantizer = make(4, 30, 2.0, GELU_DEPTH)
    x = nn.functional.gelu(torch.randn(5, 48))
    expected = layer(x)
    fold_shift(layer)
    assert float(layer.input_quantizer(x).min()) >= 0
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    once = copy.deepcopy(layer.bias)
    fold_shift(layer)
    assert torch.equal(layer.bias, once)
