"""What is measured of a model beside its accuracy."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import adfq
from benchmarks.run.cost import measure_cost, peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_peak_memory_is_what_was_used_in_between_even_again() -> None:
    for _ in range(3):
        with peak_memory(CPU) as peak:
            torch.ones(40, 1_000_000).sum()
        assert peak.megabytes == pytest.approx(160, rel=0.1)


def test_cost_of_a_quantized_model(make_vit: Any, make_images: Any, quick: Mapping[str, dict[str, Any]]) -> None:
    model, images = make_vit(), make_images(4)
    full = measure_cost(model, images, CPU)
    assert full["size"] == pytest.approx(sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6)
    assert "outliers" not in full
    options = quick["adfq_vit"] | {"qkv_threshold": 1.0, "fc1_threshold": 1.0}
    cost = measure_cost(adfq.quantize(model, "adfq_vit", 4, 4, images, **options), images, CPU)
    assert full["size"] / 6 < cost["size"] < full["size"] / 3
    assert 5 < cost["outliers"] < 60
    assert cost["forward_seconds"] > 0
