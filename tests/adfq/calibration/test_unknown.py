"""Values that are not known yet are followed through choices, and batches may choose differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn

from adfq import AdfqError
from adfq.calibration import CalibrationImages, calibrate_activations
from adfq.calibration.unknown import Trace
from adfq.calibration.walk import Enough, unknown_like
from adfq.layers import QuantLinear
from adfq.quantizers import UniformQuantizer
from adfq.sites import Network, Recipe


@pytest.fixture
def trace() -> Iterator[Trace]:
    with torch.no_grad(), Trace() as trace:
        yield trace


@torch.no_grad()
def test_a_trace_goes_where_nan_does_not() -> None:
    with Trace() as trace:
        known, unknown = torch.randn(4, 5), trace.mark(unknown_like(torch.zeros(4, 5)))
        target, view = (whole := torch.zeros(6, 5))[2:], whole[0]
        target[unknown > 0] = 1.0
        pooled = torchvision.ops.roi_align(known[None, None], trace.mark(torch.zeros(1, 5)), 2)
        chosen = known[unknown[:, 0].topk(2).indices]
        assert known not in trace
        assert known[known > 0] not in trace
    for tensor in (unknown < 0, unknown.argmax(1), chosen, target, whole, view, pooled):
        assert not tensor.isnan().any()
    for tensor in (chosen, target, whole, view, pooled):
        assert tensor in trace


@pytest.mark.parametrize(
    "look",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: torch.ones(2, 2)[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: torchvision.ops.nms(torch.zeros(2, 4), x[0], 0.5),
    ],
)
def test_a_pass_ends_where_its_course_depends_on_unknown_values(look: Callable[[Tensor], object], trace: Trace) -> None:
    look(torch.ones(2, 2))
    with pytest.raises(Enough):
        look(trace.mark(unknown_like(torch.ones(2, 2))))


class Chooser(nn.Module):
    """Computes `second` of the rows that `first` chooses, as a detector's second stage does."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.choose = choose
        self.first, self.second = (QuantLinear(nn.Linear(4, 4), "fc1") for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        rows = images.flatten(2)[..., :4].flatten(0, 1)
        score = self.first(rows)[:, 0]
        chosen: Tensor = self.second(rows[self.choose(score)])
        return chosen


def calibrated(choose: Callable[[Tensor], Tensor], images: Tensor, size: int) -> list[Tensor]:
    torch.manual_seed(0)
    network = Network(Chooser(choose).double())
    network.attach(Recipe(lambda: UniformQuantizer(4), lambda: UniformQuantizer(4, "row")))
    calibrate_activations(network, CalibrationImages(images.split(size)))
    return [quantizer.scale for quantizer in network.activation_quantizers().values()]


@pytest.mark.parametrize("choose", [lambda s: s > 0.1, lambda s: (s > 0.1).nonzero()[:, 0]])
def test_chosen_values_are_those_of_one_batch(choose: Callable[[Tensor], Tensor]) -> None:
    images = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(5)).double()
    for size in (1, 2):
        for found, expected in zip(calibrated(choose, images, size), calibrated(choose, images, 3), strict=True):
            assert torch.equal(found, expected)


def test_a_batch_in_which_nothing_is_chosen() -> None:
    images = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(5)).double()
    images[0] = 0  # the score is that of the bias
    torch.manual_seed(0)
    limit = float(Chooser(abs).double().first.bias[0]) + 1e-6
    for found, expected in zip(
        calibrated(lambda s: s > limit, images, 1), calibrated(lambda s: s > limit, images, 3), strict=True
    ):
        assert torch.equal(found, expected)
    with pytest.raises(AdfqError, match=r"^second\.input_quantizer saw no calibration data"):
        calibrated(lambda s: s > 100, images, 1)
