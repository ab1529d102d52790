"""Graphs other than classifiers: Segment Anything in two files, MMDetection's backbones, and their metadata."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError, export_onnx
from adfq.adapters.mmcv_ops import provide_mmcv_ops
from adfq.differences import first_difference
from adfq.export.graphs import FeatureMaps, graphs_of, image_graph
from adfq.export.metadata import describe_graph
from adfq.export.trace import trace
from benchmarks.studies.deployment import OnnxModel

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Randomize = Callable[[nn.Module], nn.Module]
SIZE, WIDTH = 32, 16
SWIN_SIZE = (20, 28)  # 5×7 tokens, which windows of 4×4 do not fill


def make_sam(kind: str) -> nn.Module:
    pytest.importorskip("segment_anything")
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    from adfq.adapters.mobile_sam import MobileSamEncoder

    shape = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "out_chans": WIDTH}
    encoder: Any = (
        ImageEncoderViT(**shape, norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=3)
        if kind == "vit"
        else MobileSamEncoder(SIZE, (8, 16, 16, 24), (1, 1, 1, 1), (2, 2, 2, 3), (3, 3, 3, 3), WIDTH)
    )
    side = SIZE // (8 if kind == "vit" else 16)
    transformer = TwoWayTransformer(depth=1, embedding_dim=WIDTH, num_heads=2, mlp_dim=32)
    decoder = MaskDecoder(transformer_dim=WIDTH, transformer=transformer, iou_head_hidden_dim=WIDTH)
    return Sam(encoder, PromptEncoder(WIDTH, (side, side), (SIZE, SIZE), mask_in_chans=8), decoder)


@pytest.fixture
def swin(randomize: Randomize) -> nn.Module:
    pytest.importorskip("mmdet")
    provide_mmcv_ops()
    from mmdet.models.backbones.swin import SwinTransformer

    shape = {"embed_dims": 24, "depths": [2], "num_heads": [2], "window_size": 4, "strides": (4,), "out_indices": (0,)}
    return randomize(SwinTransformer(**shape))


def metadata(model: OnnxModel) -> Any:
    return json.loads(model.session.get_modelmeta().custom_metadata_map["adfq"])


def distance(found: Any, expected: Tensor) -> float:
    return float((torch.as_tensor(found) - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("vit", "base_ptq"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("tiny_vit", "row_ridge"), ("vit", "repq_vit")]),
    ],
)
@torch.no_grad()
def test_segment_anything_is_two_files(kind: str, method: str, randomize: Randomize, tmp_path: Path) -> None:
    images = torch.randn(3, 3, SIZE, SIZE)
    model: Any = adfq.quantize(randomize(make_sam(kind)), method, 4, 8, images)
    exported = export_onnx(model, tmp_path / "sam.onnx")
    encoder, decoder = (OnnxModel(tmp_path / name) for name in ("sam.onnx", "sam_decoder.onnx"))
    assert {path.name for path in tmp_path.iterdir()} == {"sam.onnx", "sam_decoder.onnx"}
    assert any(name.startswith("mask_decoder.") for name in exported.integer)
    assert "image_encoder.neck.2" in exported.floating  # its windows overlap

    embeddings = model.image_encoder(images)
    (found,) = encoder.session.run(["embeddings"], {"images": images.numpy()})
    assert distance(found, embeddings) < 0.05
    box, point = torch.tensor([[4.0, 8.0, 20.0, 25.0]]), torch.tensor([[[20.0, 10.0]]])
    prompts: list[tuple[Mapping[str, Any], Tensor, list[float]]] = [
        ({"points": None, "boxes": box.repeat(2, 1)}, box.reshape(1, 2, 2).repeat(2, 1, 1), [2, 3]),
        ({"points": (point, torch.ones(1, 1)), "boxes": None}, torch.cat([point, torch.zeros(1, 1, 2)], 1), [1, -1]),
        (
            {"points": (point, torch.zeros(1, 1)), "boxes": box},
            torch.cat([point, box.reshape(1, 2, 2)], 1),
            [0, 2, 3],
        ),
    ]
    for keywords, coordinates, labels in prompts:
        sparse, dense = model.prompt_encoder(**keywords, masks=None)
        expected = model.mask_decoder.predict_masks(embeddings[:1], model.prompt_encoder.get_dense_pe(), sparse, dense)
        inputs = {
            "embeddings": embeddings[:1].numpy(),
            "point_coords": coordinates.numpy(),
            "point_labels": np.array([labels] * len(coordinates), np.float32),
        }
        for output, other in zip(decoder.session.run(["masks", "iou"], inputs), expected, strict=True):
            assert output.shape == other.shape
            assert distance(output, other) < 0.05

    described = metadata(encoder)
    assert {**described, "preprocessing": None} == {
        "method": method,
        "bits": "W4/A8",
        "kind": "image_encoder",
        "preprocessing": None,
    }
    assert described["preprocessing"] == metadata(decoder)["preprocessing"]
    assert described["preprocessing"]["size"] == SIZE
    assert described["preprocessing"]["std"] == pytest.approx([58.395, 57.12, 57.375])
    assert metadata(decoder)["kind"] == "mask_decoder"


@torch.no_grad()
def test_a_backbone_takes_any_number_of_images_of_one_size(swin: nn.Module, tmp_path: Path) -> None:
    images = torch.randn(3, 3, *SWIN_SIZE)
    model = adfq.quantize(swin, "base_ptq", 8, 8, images)
    with pytest.raises(AdfqError, match="images of any size: give input_size"):
        export_onnx(model, tmp_path / "file")
    for size in ((0, 20), (20, 20, 20), (20.0, 20), (True, 20)):
        with pytest.raises(AdfqError, match="input_size is height and width in pixels"):
            export_onnx(model, tmp_path / "file", input_size=size)  # type: ignore[arg-type]
    export_onnx(model, tmp_path / "file", input_size=SWIN_SIZE)
    runtime = OnnxModel(tmp_path / "file")
    for some in (images[:1], images):
        outputs = runtime.session.run(["features_0"], {"images": some.numpy()})
        assert [distance(*pair) for pair in zip(outputs, model(some), strict=True)] == pytest.approx([0], abs=0.05)
    assert metadata(runtime)["kind"] == "backbone"
    assert metadata(runtime)["preprocessing"] == {"input_size": [3, *SWIN_SIZE]}


def test_the_graph_of_a_backbone_leaves_the_model_as_it_is(swin: nn.Module) -> None:
    before = copy.deepcopy(swin)
    (graph,) = graphs_of(swin, (3, *SWIN_SIZE))
    assert first_difference(before, swin) is None
    parameters = zip(graph.module.parameters(), swin.parameters(), strict=True)
    assert all(one is other for one, other in parameters)


def test_a_fixed_number_of_images_is_no_silent_limit(swin: nn.Module) -> None:
    """MMDetection's own division of shapes holds for the example's number of images alone."""
    with pytest.raises(AdfqError, match=r"cannot trace this FeatureMaps: .*batch"):
        trace(image_graph("backbone", FeatureMaps(swin), (3, *SWIN_SIZE), "features_0"))


def test_arguments_of_other_models_are_refused(
    make_vit: Callable[..., nn.Module], randomize: Randomize, tmp_path: Path
) -> None:
    vit = adfq.quantize(make_vit(depth=1), "base_ptq", 8, 8, torch.randn(2, 3, 32, 32))
    sam = adfq.quantize(randomize(make_sam("vit")), "base_ptq", 8, 8, torch.randn(2, 3, SIZE, SIZE))
    file = tmp_path / "file"
    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (vit, {"input_size": (32, 32)}, r"takes images of 32×32 alone; leave out input_size"),
        (vit, {"decoder": "x"}, r"a VisionTransformer has no mask decoder to write to x"),
        (sam, {"input_size": (16, 16)}, r"takes images of 32×32 alone"),
        (sam, {"decoder": file}, r"need two files; both are"),
    ]
    for model, arguments, message in cases:
        with pytest.raises(AdfqError, match=message):
            export_onnx(model, file, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_tells_its_preprocessing(make_vit: Callable[..., nn.Module], tmp_path: Path) -> None:
    model: Any = adfq.quantize(make_vit(depth=1), "base_ptq", 8, 8, torch.randn(2, 3, 32, 32))
    assert json.loads(describe_graph(model, "classifier", (3, 32, 32))) == {
        "method": "base_ptq",
        "bits": "W8/A8",
        "kind": "classifier",
    }
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 0.9, "input_size": (3, 64, 64)}
    export_onnx(model, tmp_path / "configured")
    found = metadata(OnnxModel(tmp_path / "configured"))["preprocessing"]
    assert found["mean"] == [0.5] * 3
    assert found["crop_pct"] == 0.9
    assert found["input_size"] == [3, 32, 32]
