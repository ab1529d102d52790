"""Detectors on disk: saved and loaded bit for bit, and no description that builds anything else."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from adfq.adapters import create, describe
from adfq.adapters.mmcv_ops import provide_mmcv_ops
from adfq.registry import methods

mmdet = pytest.importorskip("mmdet")
provide_mmcv_ops()

from mmdet.apis import inference_detector  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.utils import register_all_modules  # noqa: E402
from mmengine.config import Config  # noqa: E402

from adfq.adapters.mmdet_swin import detect_densely  # noqa: E402

CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
BUNDLED = Path(__file__).parents[2] / "benchmarks" / "tasks" / "detection" / "configs"
FORMS = {
    "mask_rcnn": BUNDLED / "mask_rcnn_bundled_swin.py",
    "cascade": BUNDLED / "cascade_mask_rcnn_bundled_swin.py",
    "retinanet": CONFIGS / "swin" / "retinanet_swin-t-p4-w7_fpn_1x_coco.py",
}
SMALL = {
    "embed_dims": 8,
    "depths": [1, 1, 2],
    "num_heads": [1, 2, 2],
    "window_size": 4,
    "strides": (4, 2, 2),
    "out_indices": (0, 1, 2),
    "init_cfg": {"type": "Pretrained", "checkpoint": "https://example.org/weights.pth"},
}


def draw() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def build(form: str) -> Any:
    """A small detector with random weights and its config, as MMDetection's init_detector makes it."""
    register_all_modules(init_default_scope=True)
    config = Config.fromfile(FORMS[form])
    config.model.backbone.update(SMALL)
    config.model.neck.update(in_channels=[8, 16, 32], out_channels=64)
    if form == "retinanet":
        config.model.neck.update(start_level=0, num_outs=5)
        config.model.bbox_head.update(in_channels=64, feat_channels=16)
    detector: Any = MODELS.build(copy.deepcopy(config.model))
    detector.cfg = config
    return detector


@pytest.fixture(scope="module")
def detectors(randomize: Callable[[nn.Module], nn.Module]) -> Mapping[str, Any]:
    return {form: randomize(build(form)) for form in FORMS}


@pytest.mark.parametrize("method", methods()[1:])
def test_every_method_is_saved_and_loaded(
    detectors: Mapping[str, Any], method: str, quick: Mapping[str, Any], comes_back: Callable[..., Any], tmp_path: Path
) -> None:
    quantized = adfq.quantize(detectors["mask_rcnn"], method, 4, 6, draw(), **quick[method])
    comes_back(quantized, tmp_path / "file", detect_densely, draw())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_saved_and_loaded(
    detectors: Mapping[str, Any], form: str, comes_back: Callable[..., Any], tmp_path: Path
) -> None:
    quantized: Any = adfq.quantize(detectors[form], "base_ptq", 4, 6, draw())
    loaded = comes_back(quantized, tmp_path / "file", detect_densely, draw())
    assert loaded.quantization.architecture == quantized.quantization.architecture
    again = tmp_path / "again"
    adfq.save(loaded, again)
    assert again.read_bytes() == (tmp_path / "file").read_bytes()


def test_a_loaded_detector_detects_as_before(
    detectors: Mapping[str, Any], comes_back: Callable[..., Any], tmp_path: Path
) -> None:
    """MMDetection's own inference, by the loaded model's config alone."""
    quantized: Any = adfq.quantize(detectors["mask_rcnn"], "base_ptq", 8, 8, draw())
    loaded = comes_back(quantized, tmp_path / "file", detect_densely, draw())
    data, own = loaded.cfg.test_dataloader.dataset, detectors["mask_rcnn"].cfg.test_dataloader.dataset
    assert data.metainfo.classes == own.metainfo.classes
    assert data.pipeline == own.pipeline
    picture = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    found, expected = (inference_detector(model, picture).pred_instances for model in (loaded, quantized))
    assert len(found) == len(expected) > 0
    assert all(torch.equal(found[name], expected[name]) for name in expected.keys())  # noqa: SIM118 - no mapping


@pytest.mark.parametrize("file", sorted((CONFIGS / "swin").glob("*.py")), ids=lambda file: file.stem)
def test_every_swin_detector_of_mmdetection_is_built_again(file: Path) -> None:
    register_all_modules(init_default_scope=True)
    config = Config.fromfile(file)
    detector: Any = MODELS.build(copy.deepcopy(config.model))
    detector.cfg = config
    built: Any = create(describe(detector))
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == {
        name: tensor.shape for name, tensor in detector.state_dict().items()
    }
    assert "https" not in str(built.cfg)


def test_mutated_files_are_refused(
    detectors: Mapping[str, Any], refuses_mutations: Callable[[Path], None], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    adfq.save(adfq.quantize(detectors["mask_rcnn"], "base_ptq", 4, 4, draw()), file)
    refuses_mutations(file)


MODEL = ("model",)
PIPELINE = ("dataset", "pipeline")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*MODEL, "type"), "os.system", r"names 'os.system' at model\.type"),
        ((*MODEL, "type"), "mmdet.models.MaskRCNN", r"at model\.type"),
        ((*MODEL, "type"), "LAD", r"names 'LAD' at model\.type"),
        ((*MODEL, "type"), {"tuple": ()}, r"at model\.type"),
        ((*MODEL, "type"), None, "cannot build"),
        ((*MODEL, "type"), "CascadeRCNN", "cannot build|is that of a"),
        ((*MODEL, "_scope_"), "this", r"has a setting model\._scope_"),
        ((*MODEL, "init_cfg"), {"type": "Pretrained", "checkpoint": "x"}, r"has a setting model\.init_cfg"),
        ((*MODEL, "backbone", "type"), "ResNet", r"names 'ResNet' at model\.backbone\.type"),
        ((*MODEL, "backbone", "pretrained"), "x", r"a setting model\.backbone\.pretrained"),
        ((*MODEL, "backbone", "depths"), "deep", "cannot build"),
        ((*MODEL, "backbone"), {"foreign": "function"}, r"has a function at model\.backbone"),
        ((*MODEL, "test_cfg", "rcnn", "nms", "type"), "__import__('os')", r"at model\.test_cfg\.rcnn\.nms\.type"),
        ((*MODEL, "unknown"), 1, "cannot build"),
        (MODEL, 3, "cannot build"),
        (PIPELINE, ({"type": "this.Step"},), r"names 'this.Step' at test_dataloader\.dataset\.pipeline\[0\]\.type"),
        (PIPELINE, ({"type": "Albu"},), "names 'Albu'"),
        (PIPELINE, ({"type": "LoadImageFromFile", "backend_args": {}},), r"pipeline\[0\]\.backend_args"),
        (("dataset", "type"), "this.Data", r"at test_dataloader\.dataset\.type"),
        (("dataset", "ann_file"), "x", "no usable test_dataloader"),
        (("dataset", "metainfo"), {"classes": "/etc/passwd"}, "no usable test_dataloader"),
        (("dataset", "metainfo"), "x", "no usable test_dataloader"),
        (("dataset",), (1,), "no usable test_dataloader"),
        (("dataset",), {"type": "CocoDataset"}, "no usable test_dataloader"),
    ],
)
def test_forged_descriptions_are_refused(
    detectors: Mapping[str, Any],
    path: tuple[str, ...],
    value: Any,
    message: str,
    refuses_forgery: Callable[..., None],
) -> None:
    refuses_forgery(detectors["mask_rcnn"], path, value, message)


JUNK = (
    None,
    True,
    -1,
    2,
    1e308,
    "",
    "os.system",
    "/etc/passwd",
    [],
    {},
    (1,),
    {"type": "nms"},
    {"type": ["x"]},
    {"tuple": 1},
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in settings."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


def exchange(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    if isinstance(value, tuple):
        return tuple(exchange(part, path[1:], new) if key == path[0] else part for key, part in enumerate(value))
    return {key: exchange(part, path[1:], new) if key == path[0] else part for key, part in value.items()}


def test_any_other_value_gives_one_line_or_a_detector(detectors: Mapping[str, Any]) -> None:
    described = describe(detectors["mask_rcnn"])
    arguments = dict(described.arguments)
    generator, messages = random.Random(0), []
    for path in generator.sample(list(places(arguments)), 100):
        changed = exchange(arguments, path, generator.choice(JUNK))
        try:
            assert type(create(dataclasses.replace(described, arguments=changed))) is type(detectors["mask_rcnn"])
        except AdfqError as error:
            messages.append(str(error))
    assert 20 < len(messages) < 100
    assert not any("\n" in message for message in messages)


def test_names_of_packages_and_classes_are_kept_by_their_last_part(detectors: Mapping[str, Any]) -> None:
    detector = copy.deepcopy(detectors["mask_rcnn"])
    expected = describe(detector)
    detector.cfg.model.type = type(detector)
    detector.cfg.model.neck.type = "mmdet.FPN"
    assert describe(detector) == expected


def test_a_detector_that_no_file_keeps_is_refused(detectors: Mapping[str, Any], tmp_path: Path) -> None:
    def refuse(detector: Any, message: str) -> None:
        quantized = adfq.quantize(detector, "base_ptq", 8, 8, draw())
        with pytest.raises(AdfqError, match=message):
            adfq.save(quantized, tmp_path / "file")
        assert not list(tmp_path.iterdir())

    detector = copy.deepcopy(detectors["mask_rcnn"])
    detector.roi_head.mask_head.relu = nn.GELU()
    refuse(detector, r"roi_head\.mask_head\.relu becomes ReLU")
    detector = copy.deepcopy(detectors["mask_rcnn"])
    detector.roi_head.test_cfg.score_thr = 0.5
    refuse(detector, "test_cfg becomes")
    detector.cfg.model.backbone.act_cfg = len
    refuse(detector, "a builtin_function_or_method at model.backbone.act_cfg")
    del detector.cfg
    refuse(detector, "only a detector with its config as attribute cfg")
    refuse(detectors["mask_rcnn"].backbone, "only a detector with its config as attribute cfg")
