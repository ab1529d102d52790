"""Adapted Swin V2 models, both of timm's implementations, compute what they did, with roles of post-norm models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import Tensor, nn
from torch.nn import functional as F

import adfq
from adfq.adapters import adapt, create, describe, timm_swin_v2

MakeImages = Callable[..., Tensor]

CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "plain": (SwinTransformerV2, {}),
    "windows of pretraining, no biases": (
        SwinTransformerV2,
        {"pretrained_window_sizes": (6, 3), "qkv_bias": False, "mlp_ratio": 3.3},
    ),
    "odd maps": (SwinTransformerV2, {"img_size": 36, "window_size": 7}),
    "any image size": (SwinTransformerV2, {"strict_img_size": False, "always_partition": True, "num_classes": 0}),
    "Cr: plain": (SwinTransformerV2Cr, {}),
    "Cr: odd maps, norm after every second block": (
        SwinTransformerV2Cr,
        {"img_size": 36, "window_size": 7, "depths": (3, 1), "extra_norm_period": 2},
    ),
    "Cr: norm after stages": (SwinTransformerV2Cr, {"extra_norm_stage": True, "num_classes": 0}),
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def make(randomize: Callable[[nn.Module], nn.Module]) -> Callable[[str], nn.Module]:
    def build(case: str) -> nn.Module:
        cls, changes = CASES[case]
        shape = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
        arguments = shape | {"window_size": 4, "num_classes": 10} | changes
        return randomize(cls(**arguments))

    return build


def images_for(case: str, make_images: MakeImages) -> Tensor:
    return make_images(size=CASES[case][1].get("img_size", 32))


@every_case
def test_an_adapted_model_computes_what_it_did(
    case: str, make: Callable[[str], nn.Module], make_images: MakeImages
) -> None:
    model, images = make(case), images_for(case, make_images)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(images)
        network = adapt(model)
        actual = network.model(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    after = network.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@every_case
def test_a_description_builds_the_same_model(
    case: str, make: Callable[[str], nn.Module], make_images: MakeImages
) -> None:
    model, images = make(case), images_for(case, make_images)
    twin = create(describe(model)).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(images), model(images))


def test_windows_are_shifted_and_masked_in_these_tests(make: Callable[[str], nn.Module]) -> None:
    for case, stages in (("plain", "layers"), ("Cr: plain", "stages")):
        blocks = [block for stage in make(case).get_submodule(stages) for block in stage.blocks]
        assert [block.attn_mask is not None for block in blocks] == [False, True, False, True]


@pytest.mark.parametrize(("case", "merging"), [("plain", "residual"), ("Cr: plain", "reduction")])
def test_roles_are_those_of_a_post_norm_model(case: str, merging: str, make: Callable[[str], nn.Module]) -> None:
    """Nothing is post-LayerNorm but the patch merging of SwinTransformerV2Cr, whose norm comes first."""
    network = adapt(make(case))
    roles = Counter(layer.role for _, layer in network.weight_layers())
    assert roles == Counter(patch_embed=1, residual=8, proj=4, fc2=4, head=1) + Counter([merging])
    assert Counter(matmul.roles for _, matmul in network.matmuls()) == {("query", "key"): 4, ("probs", "value"): 4}
    assert list(network.input_norms) == (["stages.1.downsample.reduction"] if merging == "reduction" else [])


def test_mlps_of_position_biases_are_left_out_openly(make: Callable[[str], nn.Module]) -> None:
    for case in ("plain", "Cr: plain"):
        network = adapt(make(case))
        left = [name for name, module in network.model.named_modules() if isinstance(module, nn.Linear)]
        assert len(left) == 8
        assert all(network.is_excluded(name) for name in left)
        assert network.unsupported == ()


def test_operands_of_scores_are_normalized(make: Callable[[str], nn.Module], make_images: MakeImages) -> None:
    model = make("plain")
    matmuls = [matmul for _, matmul in adapt(model).matmuls() if matmul.roles == ("query", "key")]
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for matmul in matmuls:
        matmul.register_forward_pre_hook(seen.__setitem__)
    model(make_images())
    for operand in (operand for matmul in matmuls for operand in seen[matmul]):
        torch.testing.assert_close(operand, F.normalize(operand, dim=-1))


@pytest.mark.parametrize("case", ["plain", "Cr: plain"])
def test_every_method_quantizes(
    case: str,
    make: Callable[[str], nn.Module],
    make_images: MakeImages,
    quick: Mapping[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    model, images = make(case), make_images(2)
    with torch.no_grad():
        expected = model(images)
        for method in adfq.methods():
            quantized = adfq.quantize(model, method, 4, 4, images, **quick[method])
            logits = quantized(images)
            if method == "full_precision":
                assert torch.equal(logits, expected)
                continue
            assert 0 < (logits - expected).norm() < 0.7 * expected.norm(), method  # random weights
            if method != "adfq_vit":
                continue
            adfq.save(quantized, tmp_path / "model.safetensors")
            assert torch.equal(adfq.load(tmp_path / "model.safetensors")(images), logits)


def test_optimization_reconstructs_every_unit(make: Callable[[str], nn.Module], make_images: MakeImages) -> None:
    options = {"iterations": 4, "optimize_batch_size": 4, "rounding_learning_rate": 0.1, "step_learning_rate": 1e-2}
    quantized: Any = adfq.quantize(make("plain"), "adfq_vit", 4, 4, make_images(), **options)
    modules = quantized.quantization.report["modules"]
    assert set(modules) == set(adapt(make("plain")).units)
    assert sum(module["kept"] for module in modules.values()) > len(modules) / 2


def test_names_of_timm() -> None:
    expected = timm.list_models(module="swin_transformer_v2") + timm.list_models(module="swin_transformer_v2_cr")
    assert timm_swin_v2.model_names() == expected
    assert "swinv2_tiny_window8_256" in expected
