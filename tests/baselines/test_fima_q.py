"""FIMA-Q against released code, and its scales of tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from adfq.adapters import adapt
from adfq.bits import Bits
from adfq.calibration import CalibrationImages
from adfq.method import Run
from adfq.transforms.positions import spread_scales
from baselines.fima_q import FIMAQ

LoadGolden = Callable[[str], dict[str, Tensor]]
MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:optimization made these modules no better")


@pytest.mark.parametrize("bits", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_reconstruction_is_as_good_as_that_of_released_code(load_golden: LoadGolden, bits: int) -> None:
    data, expected = load_golden("repq_e2e_vit_21.npz"), load_golden("fimaq_e2e_vit_31.npz")
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    model.load_state_dict({key[6:]: value for key, value in data.items() if key.startswith("state/")})
    method = FIMAQ(iterations=300, optimize_batch_size=16, released_grid=True)
    found = adfq.quantize(model.eval(), method, bits, bits, data["calib"])
    with torch.no_grad():
        errors = [(found(data[k]) - model(data[k])).norm() / model(data[k]).norm() for k in ("test", "calib")]
    assert torch.stack(errors).mean() <= 1.15 * expected[f"error_w{bits}a{bits}_blocks_dplr"].mean()


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_scales_are_spread_without_a_change_of_values(
    kind: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages
) -> None:
    model, images = {"vit": make_vit, "swin": make_swin}[kind](), make_images(4)
    network = adapt(copy.deepcopy(model))
    run = Run(CalibrationImages([images]))
    FIMAQ(iterations=0).apply(network, run, Bits(4, 4))
    with torch.no_grad():
        before = network.model(images)
        spread_scales(network, run.images)
        assert torch.equal(network.model(images), before)
    attention = next(module for name, module in network.model.named_modules() if name.endswith("blocks.0.attn"))
    heads = attention.scores.left_quantizer.scale.shape[1]
    tokens = attention.qkv.input_quantizer.scale.shape[1]
    assert tokens > 1
    assert attention.scores.left_quantizer.scale.shape == (1, heads, tokens, 1)
    assert attention.scores.right_quantizer.scale.shape == (1, heads, tokens, 1)
    width = attention.context.right_quantizer.scale.shape[-1]
    assert attention.context.right_quantizer.scale.shape == (1, heads, 1, width)
    assert width > 1


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_token_scales_are_learned_apart_and_saved(
    kind: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    model, images = {"vit": make_vit, "swin": make_swin}[kind](), make_images(8)
    method = FIMAQ(iterations=4, rank=2, optimize_batch_size=4, step_learning_rate=1e-2)
    found = adfq.quantize(model, method, 4, 4, images)
    scales = [module.qkv.input_quantizer.scale for module in found.modules() if hasattr(module, "qkv")]
    assert any(scale.unique().numel() > 1 for scale in scales)
    adfq.save(found, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(adfq.load(tmp_path / "model.safetensors")(images), found(images))


def test_images_of_two_sizes_have_the_squared_error(make_swin: MakeModel) -> None:
    from timm.models.swin_transformer import SwinTransformer

    arguments: dict[str, Any] = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 3}
    model = SwinTransformer(
        img_size=16, patch_size=2, window_size=4, strict_img_size=False, dynamic_img_size=True, **arguments
    )
    batches = [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 32)]
    found = adfq.quantize(model.eval(), FIMAQ(iterations=2, optimize_batch_size=2), 4, 4, batches, calibration_size=4)
    assert all(torch.isfinite(found(images)).all() for images in batches)


def test_a_rank_of_nothing_is_one_clear_line() -> None:
    with pytest.raises(AdfqError, match="rank"):
        FIMAQ(rank=0)
