"""MMDetection's Swin and detectors with it: adapted, they compute the same; every method quantizes them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from adfq.adapters import adapt
from adfq.adapters.mmcv_ops import provide_mmcv_ops
from adfq.bits import Bits
from adfq.calibration import CalibrationImages, calibrate_activations
from adfq.layers import QuantMatMul, QuantWeightLayer
from adfq.method import Run
from adfq.quantizers import PerPatchOutlierQuantizer, RunTimePatchOutlierQuantizer
from adfq.registry import create_method, methods
from adfq.sites import Network
from adfq.transforms.rotation import rotate

pytest.importorskip("mmdet")
provide_mmcv_ops()

from mmdet.registry import MODELS  # noqa: E402
from mmdet.utils import register_all_modules  # noqa: E402
from mmengine.config import ConfigDict  # noqa: E402

from adfq.adapters.mmdet_swin import QuantShiftWindowAttention, detect_densely  # noqa: E402

Randomize = Callable[[nn.Module], nn.Module]

SWIN = {
    "type": "SwinTransformer",
    "embed_dims": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "strides": (4, 2),
    "out_indices": (0, 1),
}
HEADS = {"in_channels": 16, "num_classes": 3, "norm_cfg": None}
SIZE = (40, 56)  # 10×14 and 5×7 tokens, which windows of 4×4 do not fill


@pytest.fixture
def swin(randomize: Randomize) -> nn.Module:
    register_all_modules(init_default_scope=True)
    return randomize(MODELS.build(SWIN))


@pytest.fixture(scope="module")
def detectors(randomize: Randomize) -> Mapping[str, nn.Module]:
    """Detectors by kind, which no test alters."""
    register_all_modules(init_default_scope=True)
    return {kind: randomize(build(config)) for kind, config in _configs().items()}


def build(config: dict[str, Any]) -> nn.Module:
    detector: nn.Module = MODELS.build(ConfigDict(config))
    return detector


def _configs() -> dict[str, Any]:
    coder = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [0.1] * 4}
    anchors = {"type": "AnchorGenerator", "scales": [4], "ratios": [1.0], "strides": [4, 8, 16]}
    shared = {
        "data_preprocessor": {"type": "DetDataPreprocessor", "pad_size_divisor": 32},
        "backbone": SWIN,
        "neck": {"type": "FPN", "in_channels": [24, 48], "out_channels": 16, "num_outs": 3},
    }
    extractor = {"type": "SingleRoIExtractor", "out_channels": 16, "featmap_strides": [4, 8]}
    bbox_head = {
        "type": "Shared2FCBBoxHead",
        "in_channels": 16,
        "fc_out_channels": 20,
        "num_classes": 3,
        "bbox_coder": coder,
    }
    mask_head = {"type": "FCNMaskHead", "num_convs": 1, "in_channels": 16, "conv_out_channels": 8, "num_classes": 3}
    roi_head = {
        "type": "StandardRoIHead",
        "bbox_roi_extractor": {**extractor, "roi_layer": {"type": "RoIAlign", "output_size": 7}},
        "bbox_head": bbox_head,
        "mask_roi_extractor": {**extractor, "roi_layer": {"type": "RoIAlign", "output_size": 14}},
        "mask_head": mask_head,
    }
    two_stages = {
        **shared,
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": 16,
            "feat_channels": 16,
            "anchor_generator": anchors,
            "bbox_coder": coder,
        },
        "train_cfg": None,
        "test_cfg": {
            "rpn": {"nms_pre": 50, "max_per_img": 10, "nms": {"type": "nms", "iou_threshold": 0.7}, "min_bbox_size": 0},
            "rcnn": {"score_thr": 0.05, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 5},
        },
    }
    cascade = {**roi_head, "type": "CascadeRoIHead", "num_stages": 2, "stage_loss_weights": [1, 0.5]}
    return {
        "mask_rcnn": {**two_stages, "type": "MaskRCNN", "roi_head": roi_head},
        "cascade": {**two_stages, "type": "CascadeRCNN", "roi_head": {**cascade, "bbox_head": [bbox_head] * 2}},
        "retinanet": {
            **shared,
            "type": "RetinaNet",
            "bbox_head": {
                "type": "RetinaHead",
                "in_channels": 16,
                "feat_channels": 16,
                "stacked_convs": 1,
                "num_classes": 3,
                "anchor_generator": anchors,
                "bbox_coder": coder,
            },
        },
    }


KINDS = list(_configs())
FAST = ("base_ptq", "repq_vit", "adfq_vit", "row_ridge")  # that quantize every kind in the fast suite

#: Methods that leave the input image in full precision.
WITHOUT_IMAGE = ("adalog", "aphq_vit", "erq", "fima_q", "iasvit", "ptq4vit")


@pytest.mark.parametrize("outputs", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("seed", [0, 1])
def test_rotated_streams_give_the_same_outputs(randomize: Randomize, outputs: tuple[int, ...], seed: int) -> None:
    register_all_modules(init_default_scope=True)
    shape = {"depths": [1, 2, 1], "num_heads": [2, 4, 4], "strides": (4, 2, 2), "out_indices": outputs}
    model = randomize(MODELS.build(SWIN | shape), seed)
    for block in (block for stage in model.stages for block in stage.blocks):  # type: ignore[union-attr]
        block.attn.w_msa.proj.weight.data[:2] *= 30
    images = draw(*SIZE).double()
    with torch.no_grad():
        wanted = model.double()(images)
        for double in (True, False):
            network = adapt(copy.deepcopy(model if double else model.float()))
            assert list(rotate(network)) == ["stages.0"]
            assert [stream.name for stream in network.streams] == ["stages.1", "stages.2"]
            for found, output in zip(network.model(images if double else images.float()), wanted, strict=True):
                assert (found - output).norm() / output.norm() < (1e-12 if double else 1e-5)


def test_streams_of_a_detector_are_those_of_its_backbone(detectors: Mapping[str, nn.Module]) -> None:
    detector = detectors["retinanet"]
    images, network = draw(64, 64), adapt(copy.deepcopy(detector))
    left = rotate(network)
    assert list(left) == ["backbone.stages.0"]
    with torch.no_grad():
        pairs = zip(detect_densely(network.model, images), detect_densely(detector, images), strict=True)
        assert all((found - wanted).norm() / wanted.norm() < 1e-5 for found, wanted in pairs)


def draw(*size: int) -> Tensor:
    return torch.randn(2, 3, *(size or SIZE), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(32, 32), SIZE, (13, 30)])
def test_an_adapted_backbone_computes_the_same(swin: nn.Module, size: tuple[int, int]) -> None:
    images = draw(*size)
    adapted = adapt(copy.deepcopy(swin)).model
    with torch.no_grad():
        for expected, found in zip(swin(images), adapted(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_detector_computes_the_same(detectors: Mapping[str, nn.Module], kind: str) -> None:
    detector, images = detectors[kind], draw()
    network = adapt(copy.deepcopy(detector))
    with torch.no_grad():
        expected, found = detect_densely(detector, images), network.run(images)
    assert len(found) == len(expected) >= 6
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def roles(network: Network) -> dict[str, str]:
    return {name: layer.role for name, layer in network.weight_layers()}


def test_the_sites_of_a_detector(detectors: Mapping[str, nn.Module]) -> None:
    detector = copy.deepcopy(detectors["mask_rcnn"])
    wanted = [name for name, module in detector.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    network = adapt(detector)
    found = roles(network)
    assert sorted(found) == sorted(wanted)
    assert network.unsupported == ()
    assert {name.split(".")[0]: role for name, role in found.items() if not name.startswith("backbone.")} == {
        "neck": "neck",
        "rpn_head": "head",
        "roi_head": "head",
    }
    block = "backbone.stages.0.blocks.1"
    of_block = {name.removeprefix(f"{block}."): role for name, role in found.items() if name.startswith(block)}
    assert of_block == {
        "attn.w_msa.qkv": "qkv",
        "attn.w_msa.proj": "proj",
        "ffn.layers.0.0": "fc1",
        "ffn.layers.1": "fc2",
    }
    assert found["backbone.stages.0.downsample.reduction"] == "reduction"
    assert found["backbone.patch_embed.projection"] == "patch_embed"
    assert [matmul.roles for _, matmul in network.matmuls()] == [("query", "key"), ("probs", "value")] * 4
    assert set(network.input_norms) == {name for name, role in found.items() if role in ("qkv", "fc1", "reduction")}


def test_modules_come_in_the_order_of_the_forward_pass(swin: nn.Module) -> None:
    network, called = adapt(swin), []
    for name in network.units:
        network.model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    network.run(draw())
    assert tuple(called) == network.units


@torch.no_grad()
def test_reparameterized_norms_and_padding_compute_the_same(swin: nn.Module) -> None:
    images = draw()
    network = adapt(copy.deepcopy(swin))
    create_method("repq_vit").apply(network, Run(CalibrationImages([images])), Bits(8, 8))
    paddings = [m.padding for m in network.model.modules() if isinstance(m, QuantShiftWindowAttention)]
    assert all(padding.abs().max() > 0.01 for padding in paddings)
    with network.full_precision():
        found = network.run(images)
    for expected, features in zip(swin(images), found, strict=True):
        torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    for padding in paddings:  # what the test above is able to see
        padding.zero_()
    with network.full_precision():
        assert not torch.allclose(network.run(images)[0], swin(images)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(kind, method, marks=[] if kind == "mask_rcnn" or method in FAST else [pytest.mark.slow])
        for kind in KINDS
        for method in methods()[1:]
    ],
)
def test_every_method_quantizes_every_detector(
    detectors: Mapping[str, nn.Module], kind: str, method: str, quick: Mapping[str, Any]
) -> None:
    detector, images = detectors[kind], draw()
    quantized = adfq.quantize(detector, method, 8, 8, images, **quick[method])
    with torch.no_grad():
        for expected, found in zip(detector.backbone(images), quantized.backbone(images), strict=True):
            assert (found - expected).norm() < 0.25 * expected.norm()
        assert all(torch.isfinite(output).all() for output in detect_densely(quantized, draw(64, 32)))  # another size
    left = [
        name for name, layer in quantized.named_modules() if isinstance(layer, QuantWeightLayer) and not _has(layer)
    ]
    assert left == (["backbone.patch_embed.projection"] if method in WITHOUT_IMAGE else [])


def _has(layer: QuantWeightLayer) -> bool:
    return not isinstance(layer.input_quantizer, nn.Identity) and not isinstance(layer.weight_quantizer, nn.Identity)


def test_patches_have_positions_within_a_window_only(swin: nn.Module) -> None:
    quantized = adfq.quantize(swin, "adfq_vit", 4, 4, draw(), iterations=0)
    kinds = {
        name: type(module.input_quantizer)
        for name, module in quantized.named_modules()
        if isinstance(module, QuantWeightLayer) and module.role in ("qkv", "fc1", "reduction")
    }
    assert len(kinds) == 9
    for name, kind in kinds.items():
        assert kind is (PerPatchOutlierQuantizer if name.endswith("qkv") else RunTimePatchOutlierQuantizer)


def test_optimization_of_a_detector(detectors: Mapping[str, nn.Module], tmp_path: Path) -> None:
    options: dict[str, Any] = {"iterations": 20, "optimize_batch_size": 2, "rounding_learning_rate": 4e-2}
    detector, images = detectors["mask_rcnn"], draw()
    quantized = adfq.quantize(detector, "adfq_vit", 3, 3, images, resume=tmp_path, **options)
    results = quantized.quantization.report["modules"]
    assert list(results) == list(adapt(copy.deepcopy(detector)).units)
    assert sum(result["after"] < result["before"] for result in results.values()) > len(results) / 2
    matmuls = [module for module in quantized.modules() if isinstance(module, QuantMatMul)]
    assert all(matmul.left_quantizer.is_calibrated for matmul in matmuls)
    again = adfq.quantize(detector, "adfq_vit", 3, 3, images, resume=tmp_path, **options)
    for one, other in zip(quantized.backbone(images), again.backbone(images), strict=True):
        assert torch.equal(one, other)


def test_what_is_calibrated_stays_calibrated(swin: nn.Module) -> None:
    network = adapt(swin)
    create_method("base_ptq").apply(network, Run(CalibrationImages([draw()])), Bits(4, 4))
    before = {name: quantizer.scale.clone() for name, quantizer in network.activation_quantizers().items()}
    calibrate_activations(network, CalibrationImages([10 * draw()]))
    for name, quantizer in network.activation_quantizers().items():
        assert torch.equal(quantizer.scale, before[name])


def test_another_backbone() -> None:
    register_all_modules(init_default_scope=True)
    config = _configs()["mask_rcnn"]
    resnet = {"type": "ResNet", "depth": 18, "out_indices": (0, 1)}
    detector = build({**config, "backbone": resnet, "neck": {**config["neck"], "in_channels": [64, 128]}})
    with pytest.raises(AdfqError, match="backbone is a ResNet, not Swin"):
        adfq.quantize(detector, "base_ptq", calibration=draw())


def test_a_backbone_alone_cannot_be_saved(swin: nn.Module, tmp_path: Path) -> None:
    quantized = adfq.quantize(swin, "base_ptq", 8, 8, calibration=draw())
    with pytest.raises(AdfqError, match="only a detector with its config as attribute cfg can"):
        adfq.save(quantized, tmp_path / "swin.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_backbone_of_a_detector_is_exported(randomize: Randomize, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    register_all_modules(init_default_scope=True)
    config = _configs()["mask_rcnn"]
    own = {"mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0], "bgr_to_rgb": True}
    backbone = {**SWIN, "depths": [1], "num_heads": [2], "strides": (4,), "out_indices": (0,)}
    changed = {"data_preprocessor": {**config["data_preprocessor"], **own}, "backbone": backbone}
    detector = randomize(build({**config, **changed, "neck": {**config["neck"], "in_channels": [24]}}))
    quantized: Any = adfq.quantize(detector, "base_ptq", 8, 8, calibration=draw())
    exported = adfq.export_onnx(quantized, tmp_path / "swin", input_size=SIZE)
    assert {"patch_embed.projection", "stages.0.blocks.0.attn.w_msa.qkv"} < set(exported.integer)
    session = runtime.InferenceSession(tmp_path / "swin")
    assert [output.name for output in session.get_outputs()] == ["features_0"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["adfq"])["preprocessing"] == {
        "input_size": [3, *SIZE],
        "mean": [1.0, 2.0, 3.0],
        "std": [4.0, 5.0, 6.0],
        "channels": "rgb",
        "pad_size_divisor": 32,
    }


# --- calibration in batches -----------------------------------------------------------------------------------------


def of_several_images() -> Tensor:
    return torch.cat([draw(), 0.7 * draw().flip(-1)])[:3]


def test_batches_give_a_cascade_what_one_batch_gives(
    detectors: Mapping[str, nn.Module], same_in_batches: Callable[..., None], walks: Callable[..., None]
) -> None:
    """The second stage pools features at boxes of the first one."""
    same_in_batches(detectors["cascade"], of_several_images(), "base_ptq", [2, 1])
    walks(detectors["cascade"], draw())


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["backbone", *KINDS])
@pytest.mark.filterwarnings("ignore:optimization made")
def test_batches_of_every_size(
    kind: str,
    setting: str,
    size: int,
    swin: nn.Module,
    detectors: Mapping[str, nn.Module],
    same_in_batches: Callable[..., None],
) -> None:
    same_in_batches({"backbone": swin, **detectors}[kind], of_several_images(), setting, size)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade"])
def test_the_mask_head_alone_depends_on_batches(kind: str, detectors: Mapping[str, nn.Module]) -> None:
    """It sees 100 proposals of a batch; here there are 10 of each image."""
    images = torch.randn(12, 3, *SIZE, generator=torch.Generator().manual_seed(2)).double()
    model = copy.deepcopy(detectors[kind]).double()
    whole, in_batches = (
        adfq.quantize(model, "base_ptq", 4, 4, calibration, calibration_size=12).state_dict()
        for calibration in (images, images.split(4))
    )
    differing = {name for name, tensor in whole.items() if not torch.equal(in_batches[name], tensor)}
    assert differing
    assert all(name.startswith("roi_head.mask_head.") for name in differing)
