"""Searches of single layers against the released codes of AdaLog and APHQ-ViT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.adapters import adapt
from adfq.bits import Bits
from adfq.calibration import CalibrationImages
from adfq.method import Run
from adfq.output_error import APHQ, Settings, calibrate_by_output_error
from adfq.output_error.grids import LEAST_ACTIVATION_SCALE, width_grid
from adfq.output_error.operands import EndsOperand, LogOperand, Operand
from adfq.output_error.search import search_by_itself, search_layer, search_patch_embedding, search_product
from adfq.quantizers import AdaLogQuantizer
from adfq.quantizers.twin import GELU_DEPTH
from adfq.ranges import fake_quantize

LoadGolden = Callable[[str], dict[str, Tensor]]
Case = dict[str, Tensor]

RELEASED = {"adalog": Settings(released_grid=True), "aphq": replace(APHQ, released_grid=True)}
every_bits = pytest.mark.parametrize("bits", [3, 4, 6])
every_method = pytest.mark.parametrize("method", RELEASED)


@pytest.fixture
def read(load_golden: LoadGolden) -> Callable[[str, str], Case]:
    """Reads the data and one case of a method's file."""

    def read(method: str, case: str) -> Case:
        vectors = load_golden(f"{method}_quantizers_31.npz")
        data = {key.removeprefix("data/"): value for key, value in vectors.items() if key.startswith("data/")}
        prefix = f"{case}/"
        return data | {key.removeprefix(prefix): v for key, v in vectors.items() if key.startswith(prefix)}

    return read


def assert_as_good(found: Tensor, case: Case, expected: Tensor, dims: list[int], method: str) -> None:
    """Compare errors: a search that keeps its best may be better; APHQ-ViT's has no refinement, and is the same."""
    ours = (found - expected).square().mean(dims)
    reference = (case["y"] - expected).square().mean(dims)
    torch.testing.assert_close(reference, case["score"].reshape(reference.shape), rtol=1e-4, atol=1e-9)
    assert (ours.sum() / reference.sum()) <= (1.02 if method == "adalog" else 1.001)


def rows_of(weight: Tensor, bits: int, kind: type[Operand] = Operand) -> Operand:
    return kind(weight.flatten(1)[None, None], (1, 1, len(weight), 1), 2**bits)


def tokens_of(x: Tensor, bits: int) -> Operand:
    return Operand(x.flatten(0, -2)[None, None], (1, 1, 1, 1), 2**bits, LEAST_ACTIVATION_SCALE)


def head_of(x: Tensor, bits: int, method: str) -> Operand:
    kind = EndsOperand if method == "aphq" else Operand
    return kind(x, (1, x.shape[1], 1, 1), 2**bits, LEAST_ACTIVATION_SCALE)


@every_method
@every_bits
def test_candidates(method: str, bits: int, read: Callable[[str, str], Case]) -> None:
    case, settings = read(method, f"candidates/w{bits}"), RELEASED[method]
    weight, x = rows_of(case["proj_weight"], bits), tokens_of(case["proj_x"], bits)
    for kind, operand, zero_points in (
        ("weight", weight, settings.weight_zero_points(2**bits)),
        ("input", x, settings.input_zero_points(2**bits)),
    ):
        grid, _ = width_grid(operand.groups, 2**bits, zero_points, operand.least, released=True)
        for index, name in enumerate(("scale", "zero_point")):
            torch.testing.assert_close(
                grid[..., index].flatten(), case[f"{kind}_{name}"].flatten(), rtol=1e-6, atol=1e-8
            )


@every_method
@every_bits
def test_layer(method: str, bits: int, read: Callable[[str, str], Case]) -> None:
    case = read(method, f"search_proj/w{bits}")
    x, weight = tokens_of(case["proj_x"], bits), rows_of(case["proj_weight"], bits)
    search_layer(x, weight, RELEASED[method])
    found = F.linear(x.quantized[0, 0], weight.quantized[0, 0], case["proj_bias"]).view_as(case["y"])
    expected = F.linear(case["proj_x"], case["proj_weight"], case["proj_bias"])
    assert_as_good(found, case, expected, [0, 1, 2], method)
    if method == "aphq":
        torch.testing.assert_close(found, case["y"], rtol=1e-5, atol=1e-5)


@every_method
@every_bits
def test_layer_behind_gelu(method: str, bits: int, read: Callable[[str, str], Case]) -> None:
    case = read(method, f"search_fc2/w{bits}")
    x, weight = tokens_of(case["gelu"], bits), rows_of(case["fc2_weight"], bits)
    if method == "adalog":
        x = LogOperand(x.values, AdaLogQuantizer(bits, GELU_DEPTH))
    search_layer(x, weight, RELEASED[method])
    found = F.linear(x.quantized[0, 0], weight.quantized[0, 0], case["fc2_bias"]).view_as(case["y"])
    assert_as_good(found, case, F.linear(case["gelu"], case["fc2_weight"], case["fc2_bias"]), [0, 1, 2], method)
    if method == "aphq":
        torch.testing.assert_close(found, case["y"], rtol=1e-5, atol=1e-5)


@every_method
@every_bits
@pytest.mark.parametrize("product", ["query_key", "probs_value"])
def test_product(method: str, bits: int, product: str, read: Callable[[str, str], Case]) -> None:
    case = read(method, f"search_{product}/w{bits}")
    names = product.split("_")
    left, right = case[names[0]], case[names[1]]
    rows = right if names[1] == "key" else right.mT.contiguous()
    operands = head_of(left, bits, method), head_of(rows, bits, method)
    if product == "probs_value" and method == "adalog":
        operands = LogOperand(left, AdaLogQuantizer(bits)), operands[1]
    search_product(*operands, RELEASED[method])
    found = operands[0].quantized @ operands[1].quantized.mT
    assert_as_good(found, case, left @ rows.mT, [0, 2, 3], method)
    if method == "aphq":
        torch.testing.assert_close(found, case["y"], rtol=1e-5, atol=1e-5)


@every_method
@every_bits
def test_patch_embedding(method: str, bits: int, read: Callable[[str, str], Case]) -> None:
    case = read(method, f"search_conv/w{bits}")
    kind = EndsOperand if method == "aphq" else Operand
    weight = rows_of(case["conv_weight"], bits, kind)
    search_patch_embedding(tokens_of(F.unfold(case["images"], 8, stride=8).mT, bits), weight, RELEASED[method])
    quantized = weight.quantized.view_as(case["conv_weight"])
    found, expected = (
        F.conv2d(case["images"], w, case["conv_bias"], stride=8) for w in (quantized, case["conv_weight"])
    )
    assert_as_good(found, case, expected, [0, 2, 3], method)
    if method == "aphq":
        torch.testing.assert_close(found, case["y"], rtol=1e-5, atol=1e-5)


@every_method
@every_bits
def test_channels_before_the_reparameterization(method: str, bits: int, read: Callable[[str, str], Case]) -> None:
    case = read(method, f"search_qkv/w{bits}")
    x = F.layer_norm(case["norm_input"], [24], eps=1e-5)
    x = x * read(method, "data")["norm_weight"] + read(method, "data")["norm_bias"]
    operand = Operand(x.flatten(0, 1)[None, None], (1, 1, 1, 24), 2**bits, LEAST_ACTIVATION_SCALE)
    search_by_itself(operand, RELEASED[method])
    reference = fake_quantize(operand.values, case["channel_scale"], case["channel_zero_point"], 2**bits)
    ours, theirs = ((y - operand.values).square().sum((0, 1, 2)) for y in (operand.quantized, reference))
    assert (ours <= (1.02 if method == "adalog" else 1.0001) * theirs + 1e-9).all()


@pytest.mark.parametrize("bits", [3, 4, 6])
@torch.no_grad()
def test_network(bits: int, make_vit: Callable[..., nn.Module], load_golden: LoadGolden) -> None:
    base, vectors = load_golden("repq_e2e_vit_21.npz"), load_golden("aphq_e2e_vit_31.npz")
    expected = vectors[f"logits_w{bits}a{bits}_calibrated"]

    def distance(noise: float, seed: int = 0) -> float:
        random = torch.Generator().manual_seed(seed)
        model = make_vit()
        model.load_state_dict({key.removeprefix("state/"): v for key, v in base.items() if key.startswith("state/")})
        calibration = base["calib"] * (1 + noise * torch.randn(base["calib"].shape, generator=random))
        run = Run(CalibrationImages([calibration]))
        calibrate_by_output_error(adapt(model), run, Bits(bits, bits), RELEASED["aphq"])
        return float((model(base["test"]) - expected).norm() / expected.norm())

    # Processors round products differently, and one flipped code moves all after it: see test_golden_repq_vit.
    attempts = [(0.0, 0), (1e-7, 2), (1e-7, 4), *((1e-6, seed) for seed in range(20))]
    assert any(distance(*attempt) <= 2e-2 for attempt in attempts)


@torch.no_grad()
def test_swin(make_swin: Callable[..., nn.Module], load_golden: LoadGolden) -> None:
    base, vectors = load_golden("repq_e2e_swin_21.npz"), load_golden("adalog_e2e_swin_31.npz")
    model = make_swin()
    model.load_state_dict({key.removeprefix("state/"): v for key, v in base.items() if key.startswith("state/")})
    calibrate_by_output_error(adapt(model), Run(CalibrationImages([base["calib"][:2]])), Bits(4, 4), RELEASED["aphq"])
    ours, theirs = (logits - vectors["fp_logits"] for logits in (model(base["test"]), vectors["aphq_logits_w4a4"]))
    assert ours.norm() <= 1.1 * theirs.norm()
    # One flipped code moves the logits by 3 % or more.
    assert (ours - theirs).norm() < 0.25 * theirs.norm()
