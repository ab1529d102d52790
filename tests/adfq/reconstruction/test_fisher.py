"""Losses by Fisher information, against reference code and exact values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adfq.reconstruction import Batch, Loss, Unit
from adfq.reconstruction.examples import Examples
from adfq.reconstruction.fisher import LowRankFisher, Normalized, WeightedError, fisher_diagonal, output_divergence

LoadGolden = Callable[[str], dict[str, Tensor]]
WalkUnits = Callable[..., Iterator[Unit]]
UNITS = ("patch_embed", "blocks.0", "blocks.1")


def unit_with(targets: Tensor) -> tuple[Any, Batch]:
    """A stand-in for a unit with such targets, and the batch of all its images."""
    examples = Examples(((), {}), {}, {}, targets[:, None], len(targets))
    unit = SimpleNamespace(targets=lambda _: targets, examples=[examples], channels_first=False)
    return unit, Batch(examples, torch.arange(len(targets)))


def test_the_exact_diagonal_is_that_of_the_hessian(
    golden_vit: nn.Module, walk_units: WalkUnits, load_golden: LoadGolden
) -> None:
    expected = load_golden("aphq_losses_31.npz")
    images = load_golden("repq_e2e_vit_21.npz")["calib"]
    torch.manual_seed(0)
    for unit in walk_units(golden_vit, images, UNITS):
        wanted = expected[f"exact_diagonal/{unit.name}"].float()
        (exact,) = fisher_diagonal(unit, 20.0, labels=10)
        torch.testing.assert_close(exact, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))
        assert (exact - wanted).norm() < 1e-5 * wanted.norm()
        (sampled,) = fisher_diagonal(unit, 20.0, labels=4)
        correlation = torch.corrcoef(torch.stack([sampled.flatten(), wanted.flatten()]))[0, 1]
        assert correlation > (0.8 if unit.name == "patch_embed" else 0.9)


def test_a_diagonal_does_not_depend_on_batches(
    golden_vit: nn.Module, walk_units: WalkUnits, load_golden: LoadGolden
) -> None:
    images = load_golden("repq_e2e_vit_21.npz")["calib"]
    found = [
        [fisher_diagonal(unit, 20.0, labels=10)[0] for unit in walk_units(golden_vit, images, ("blocks.1.mlp",), size)]
        for size in (16, 3)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 5])
def test_the_low_rank_loss_is_that_of_released_code(rank: int, load_golden: LoadGolden) -> None:
    case = {key.removeprefix("loss/"): value.float() for key, value in load_golden("fimaq_losses_31.npz").items()}
    unit, batch = unit_with(case["target"])
    loss = LowRankFisher(unit, rank, 20.0, damping=0.0)
    for gradient, error in zip(case["gradients"][:rank], case["errors"][:rank], strict=True):
        loss.add(gradient, error)
    values = [loss(case[f"pred{index}"], batch) for index in (1, 2)]
    expected = [case[f"fisher_dplr_k{rank}/loss{index}"] for index in (1, 2)]
    torch.testing.assert_close(torch.stack(values), torch.stack(expected), rtol=1e-5, atol=0)
    assert loss.first is not None
    first = [case[f"fisher_dplr_k{rank}/{term}1"] for term in ("low_rank", "diagonal")]
    torch.testing.assert_close(torch.stack(loss.first), torch.stack(first), rtol=1e-5, atol=0)


def test_pairs_are_those_of_released_code(
    golden_vit: nn.Module, walk_units: WalkUnits, load_golden: LoadGolden
) -> None:
    case = load_golden("fimaq_losses_31.npz")
    images = load_golden("repq_e2e_vit_21.npz")["calib"]
    for unit in walk_units(golden_vit, images, UNITS):
        loss = LowRankFisher(unit, 2, 20.0)
        for index in (1, 2):
            output = case[f"fim/{unit.name}/quantized_output{index}"]
            unit.forward = lambda batch, _, output=output: output[batch.chosen]  # type: ignore[assignment, misc]
            gradient, error = loss.pair()
            # The released code's divergence is a mean over a batch, which all 16 images are here.
            expected = 16 * case[f"fim/{unit.name}/gradients"][index - 1]
            assert (gradient - expected).norm() < 1e-4 * expected.norm()
            torch.testing.assert_close(error, case[f"fim/{unit.name}/errors"][index - 1], rtol=1e-4, atol=1e-6)


def test_pairs_are_taken_when_they_are_due_and_restart_the_loss() -> None:
    unit, batch = unit_with(torch.zeros(2, 3))
    loss = LowRankFisher(unit, 3, 20.0)
    loss.pair = lambda: (torch.rand(3), torch.rand(3))  # type: ignore[method-assign]
    counts, values = [], []
    for iteration in range(9):
        loss.update(iteration / 9)
        counts.append(len(loss.gradients))
        values.append(float(loss(torch.full((2, 3), 1.0 + iteration), batch)))
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [index for index, value in enumerate(values) if abs(value - 2) < 1e-6] == [0, 3, 6]


def test_the_weighted_error_is_normalized_by_its_first_value(load_golden: LoadGolden) -> None:
    case = {key.removeprefix("block_loss/"): value.float() for key, value in load_golden("aphq_losses_31.npz").items()}
    unit, batch = unit_with(case["target"])
    weighted = WeightedError(unit, [case["hessian"]])
    torch.testing.assert_close(weighted(case["pred1"], batch), case["raw1"], rtol=1e-5, atol=0)
    loss = Normalized(weighted)
    values = [loss(case[f"pred{index}"], batch) for index in (1, 2)]
    torch.testing.assert_close(torch.stack(values), torch.stack([case["loss1"], case["loss2"]]), rtol=1e-5, atol=0)
    assert loss.error(case["pred1"], batch) == weighted.error(case["pred1"], batch)


def test_outputs_that_are_no_logits_count_in_their_spread() -> None:
    reference = [torch.randn(4, 3, 5), 100 * torch.randn(4, 2), torch.ones(4, 7)]
    outputs = [value + 0.1 * value.std(correction=0) for value in reference[:2]] + [torch.zeros(4, 7)]
    divergence = output_divergence(outputs, reference, 20.0)
    assert float(divergence) == pytest.approx(0.5 * 0.01 * (15 + 2), rel=1e-4)  # a constant has no spread


def test_the_plain_loss_sums_over_tokens() -> None:
    unit, batch = unit_with(torch.zeros(2, 3, 4))
    assert float(Loss(unit)(torch.ones(2, 3, 4), batch)) == 3.0
