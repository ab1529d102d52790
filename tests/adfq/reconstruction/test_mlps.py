"""MLPs with ReLU against released code of APHQ-ViT."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adfq.adapters import adapt
from adfq.calibration import CalibrationImages
from adfq.method import Run
from adfq.reconstruction import OptimizerOptions
from adfq.reconstruction.fisher import fisher_diagonal
from adfq.reconstruction.mlps import mlp_error, normalized, positive_percentile, reconstruct_mlps

LoadGolden = Callable[[str], dict[str, Tensor]]


def test_mlp_reconstruction_is_as_good_as_that_of_released_code(golden_vit: nn.Module, load_golden: LoadGolden) -> None:
    data, expected = load_golden("repq_e2e_vit_21.npz"), load_golden("aphq_e2e_vit_31.npz")
    network = adapt(copy.deepcopy(golden_vit))
    teacher = copy.deepcopy(network)
    options, run = OptimizerOptions(300, 16), Run(CalibrationImages([data["calib"]]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reconstruct_mlps(
            network, teacher, run, options, 4e-5, 0.99, lambda unit: fisher_diagonal(unit, temperature=20.0, labels=4)
        )
    with torch.no_grad():
        wanted = golden_vit(data["calib"])
        assert (network.model(data["calib"]) - wanted).norm() / wanted.norm() <= 1.1 * expected["error_w3a3_relu_fp"][1]
        torch.testing.assert_close(teacher.model(data["calib"]), wanted, rtol=1e-4, atol=1e-5)


def test_the_loss_of_mlps_is_that_of_released_code(load_golden: LoadGolden) -> None:
    case = {key.removeprefix("mlp_loss/"): value.float() for key, value in load_golden("aphq_losses_31.npz").items()}
    importance = normalized(case["hessian"])
    torch.testing.assert_close(importance, case["hessian_normalized"], rtol=1e-5, atol=0)
    terms = [mlp_error(case[key], case["target"], importance[0]) for key in ("pred", "quantized")]
    torch.testing.assert_close(terms[0] + 2 * terms[1], case["loss"], rtol=1e-5, atol=0)


def test_percentiles_are_those_of_released_code(load_golden: LoadGolden) -> None:
    case = load_golden("aphq_losses_31.npz")
    for fraction, value in zip(case["positive_percentile/fraction"], case["positive_percentile/value"], strict=True):
        found = positive_percentile(case["positive_percentile/x"], float(fraction))
        torch.testing.assert_close(found, value.float(), rtol=1e-6, atol=0)
    assert positive_percentile(-torch.ones(3), 0.9) == torch.inf
