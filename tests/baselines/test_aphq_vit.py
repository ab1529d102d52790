"""APHQ-ViT against released code, and each of its parts."""

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
from adfq.transforms.relu import SubstituteReLU, gelu_mlps, substitute_relu
from baselines.aphq_vit import APHQViT

LoadGolden = Callable[[str], dict[str, Tensor]]
MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]

QUICK: dict[str, Any] = {"iterations": 3, "mlp_iterations": 3, "optimize_batch_size": 4}

pytestmark = pytest.mark.filterwarnings("ignore:optimization made these modules no better")


@pytest.fixture
def golden_vit(load_golden: LoadGolden) -> nn.Module:
    file = load_golden("repq_e2e_vit_21.npz")
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    model.load_state_dict({key[6:]: value for key, value in file.items() if key.startswith("state/")})
    return model.eval()


def errors(found: nn.Module, model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """The relative errors of the logits on test and calibration images."""
    with torch.no_grad():
        return torch.stack(
            [(found(data[key]) - model(data[key])).norm() / model(data[key]).norm() for key in ("test", "calib")]
        )


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_reconstruction_is_as_good_as_that_of_released_code(
    golden_vit: nn.Module, load_golden: LoadGolden, bits: int
) -> None:
    data, expected = load_golden("repq_e2e_vit_21.npz"), load_golden("aphq_e2e_vit_31.npz")
    method = APHQViT(iterations=300, mlp_iterations=300, optimize_batch_size=16, released_grid=True)
    found = adfq.quantize(golden_vit, method, bits, bits, data["calib"])
    reference = expected[f"error_w{bits}a{bits}_relu_blocks"].mean()
    assert errors(found, golden_vit, data).mean() <= 1.15 * reference


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_it_runs_is_saved_and_resumed(
    kind: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    model, images = {"vit": make_vit, "swin": make_swin}[kind](), make_images(8)
    found, again = (adfq.quantize(model, APHQViT(**QUICK), 4, 4, images, resume=tmp_path / "kept") for _ in range(2))
    assert set(found.quantization.report["mlps"]) == set(gelu_mlps(adapt(copy.deepcopy(model))))  # type: ignore[union-attr, arg-type]
    adfq.save(found, tmp_path / "model.safetensors")
    loaded = adfq.load(tmp_path / "model.safetensors")
    assert any(isinstance(module, SubstituteReLU) for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded(images), found(images))
        assert torch.equal(again(images), found(images))


def test_gelu_can_stay(make_vit: MakeModel, make_images: MakeImages) -> None:
    found = adfq.quantize(make_vit(), APHQViT(relu=False, **QUICK), 4, 4, make_images(4))
    assert not any(isinstance(module, SubstituteReLU) for module in found.modules())
    assert "mlps" not in found.quantization.report  # type: ignore[operator, union-attr]


def test_a_module_without_gelu_gets_no_relu(make_vit: MakeModel) -> None:
    network = adapt(make_vit())
    substitute_relu(network.model, "blocks.0.mlp")
    for name in ("blocks.0.mlp", "blocks.0.attn", "nowhere"):
        with pytest.raises(AdfqError, match=name):
            substitute_relu(network.model, name)


@pytest.mark.parametrize("options", [{"labels": 0}, {"mlp_iterations": -1}, {"power": 0.0}, {"drop_probability": 2.0}])
def test_bad_options_are_one_clear_line(options: dict[str, Any]) -> None:
    with pytest.raises(AdfqError, match=next(iter(options))):
        APHQViT(**options)
