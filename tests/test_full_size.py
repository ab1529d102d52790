"""The architectures of the paper's table 1 at their full size, with random weights."""

from __future__ import annotations

import pytest
import timm
import torch

import adfq

MODELS = [
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_method_quantizes_and_runs(name: str) -> None:
    model = timm.create_model(name).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(images)
        for method in adfq.methods():
            logits = adfq.quantize(model, method, 8, 8, calibration=images)(images)
            assert torch.isfinite(logits).all()
            # Uniform quantizers come close at 8 bits; shift-log's levels are √2 apart at any bit-width.
            if method != "adfq_vit":
                assert (logits - expected).norm() <= 0.3 * expected.norm(), method
            assert torch.isfinite(adfq.quantize(model, method, 4, 4, calibration=images)(images)).all()
