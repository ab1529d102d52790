"""Detectors with torch's MultiheadAttention: adapted, they compute the same; every method quantizes them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq.adapters import adapt
from adfq.adapters.mmcv_ops import provide_mmcv_ops
from adfq.adapters.multihead_attention import QuantMultiheadAttention
from adfq.layers import QuantWeightLayer
from adfq.quantizers import Quantizer

mmdet = pytest.importorskip("mmdet")
provide_mmcv_ops()

from mmdet.registry import MODELS  # noqa: E402
from mmdet.utils import register_all_modules  # noqa: E402
from mmengine.config import Config  # noqa: E402

from adfq.adapters.mmdet_swin import detect_densely  # noqa: E402

CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
SWIN = {
    "type": "SwinTransformer",
    "embed_dims": 24,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 2, 2],
    "window_size": 4,
    "strides": (4, 2, 2, 2),
}

#: MMDetection's own configurations, with the levels of the backbone and the width of the transformer.
KINDS: dict[str, tuple[str, tuple[int, ...], int]] = {
    "DETR": ("detr/detr_r50_8xb2-150e_coco.py", (3,), 32),
    "Deformable DETR": ("deformable_detr/deformable-detr_r50_16xb2-50e_coco.py", (1, 2, 3), 32),
    "DINO": ("dino/dino-5scale_swin-l_8xb2-12e_coco.py", (0, 1, 2, 3), 256),
    "Mask2Former": ("mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py", (0, 1, 2, 3), 32),
}


def shrink(config: Any, width: int) -> None:
    for key, value in list(config.items()):
        if isinstance(value, dict):
            shrink(value, width)
        elif key == "num_layers" and value > 2:
            config[key] = 1
        elif key == "feedforward_channels":
            config[key] = 24
        elif value in (128, 256):  # channels of all kinds
            config[key] = value * width // 256
        elif key == "num_queries":
            config[key] = 5


def build(kind: str) -> nn.Module:
    register_all_modules(init_default_scope=True)
    file, levels, width = KINDS[kind]
    config = Config.fromfile(CONFIGS / file).model
    shrink(config, width)
    config.backbone = {**SWIN, "out_indices": levels}
    channels = [24 * 2**level for level in levels]
    if "neck" in config:
        config.neck.in_channels = channels
    if kind == "Mask2Former":
        config.panoptic_head.in_channels = channels
    if kind == "Deformable DETR":
        config.bbox_head.embed_dims = width
    detector: nn.Module = MODELS.build(config)
    return detector


@pytest.fixture(scope="module")
def detectors(randomize: Callable[[nn.Module], nn.Module]) -> Mapping[str, nn.Module]:
    return {kind: randomize(build(kind)) for kind in KINDS}


def draw() -> Tensor:
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_quantized_and_computes_the_same(detectors: Mapping[str, nn.Module], kind: str) -> None:
    images = draw()
    network = adapt(copy.deepcopy(detectors[kind]))
    with torch.no_grad():
        expected, found = detect_densely(detectors[kind], images), network.run(images)
    assert len(found) == len(expected) >= 2
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    assert network.unsupported == ()
    kinds = [module for module in network.model.modules() if isinstance(module, (nn.Linear, nn.MultiheadAttention))]
    assert kinds == []

    quantized = adfq.quantize(detectors[kind], "repq_vit", 8, 8, images)
    with torch.no_grad():
        outputs = detect_densely(quantized, images)
    assert all(torch.isfinite(output).all() for output in outputs)
    if kind != "DINO":  # queries are another choice of proposals
        for one, other in zip(expected, outputs, strict=True):
            assert (other - one).norm() < 0.3 * one.norm()
    layers = [module for module in quantized.modules() if isinstance(module, QuantWeightLayer)]
    assert all(isinstance(layer.weight_quantizer, Quantizer) for layer in layers)


@pytest.mark.parametrize("kind", ["DETR", "DINO"])
def test_every_layer_has_a_gradient(detectors: Mapping[str, nn.Module], kind: str) -> None:
    """Detectors change outputs of layers in place, and choose queries by layers that are in no output."""
    adfq.quantize(detectors[kind], "ptq4vit", 8, 8, draw(), rounds=1)


# --- the attention --------------------------------------------------------------------------------------------------


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "bool": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(3)},
    "float": {"attn_mask": torch.randn(5, 7)},
    "by head": {"attn_mask": torch.randn(6, 5, 7)},
    "padding": {"key_padding_mask": torch.arange(7).repeat(2, 1) > 4},
    "both": {"attn_mask": torch.randn(5, 7), "key_padding_mask": torch.randn(2, 7)},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 8, "vdim": 4}], ids=str)
def test_attention_computes_what_torchs_does(options: dict[str, Any], masks: str) -> None:
    keywords: dict[str, Any] = MASKS[masks]
    for batch_first, average in itertools.product((True, False), repeat=2):
        attention = nn.MultiheadAttention(12, 3, batch_first=batch_first, **options).eval()
        if attention.in_proj_bias is not None:
            nn.init.normal_(attention.in_proj_bias)
        query, key, value = (
            torch.randn(2, *size) for size in ((5, 12), (7, options.get("kdim", 12)), (7, options.get("vdim", 12)))
        )
        if not batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        ours = QuantMultiheadAttention(attention)
        expected = attention(query, key, value, average_attn_weights=average, **keywords)
        found = ours(query, key, value, average_attn_weights=average, **keywords)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one)
        assert ours(query, key, value, need_weights=False, **keywords)[1] is None


def test_attention_of_one_sequence() -> None:
    attention = nn.MultiheadAttention(12, 3).eval()
    query, key = torch.randn(5, 12), torch.randn(7, 12)
    mask = torch.arange(7) > 4
    for one, other in zip(
        attention(query, key, key, key_padding_mask=mask),
        QuantMultiheadAttention(attention)(query, key, key, key_padding_mask=mask),
        strict=True,
    ):
        torch.testing.assert_close(other, one)


def test_attention_to_extra_keys_stays_and_is_told(detectors: Mapping[str, nn.Module]) -> None:
    detector = copy.deepcopy(detectors["DETR"])
    attention = detector.get_submodule("encoder.layers.0.self_attn")
    attention.attn = nn.MultiheadAttention(32, 8, add_bias_kv=True, batch_first=True).eval()
    with pytest.warns(UserWarning, match=r"left in full precision: encoder\.layers\.0\.self_attn\.attn\.out_proj"):
        adfq.quantize(detector, "base_ptq", 8, 8, draw())


# --- calibration in batches -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:optimization made")
def test_batches_give_what_one_batch_gives(
    kind: str, setting: str, size: int, detectors: Mapping[str, nn.Module], same_in_batches: Callable[..., None]
) -> None:
    """Mask2Former attends to where a mask is, and DINO asks at the best of its proposals."""
    same_in_batches(detectors[kind], torch.cat([draw(), draw().flip(-1), 0.6 * draw().flip(-2)]), setting, size)


@pytest.mark.slow
def test_nothing_runs_again_when_a_later_part_is_at_hand(
    detectors: Mapping[str, nn.Module], walks: Callable[..., None]
) -> None:
    walks(detectors["DETR"], torch.cat([draw(), draw().flip(-1)]))
