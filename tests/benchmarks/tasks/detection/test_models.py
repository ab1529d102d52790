"""MMDetection's models: configs that are read, checkpoints in every layout, and none that runs code."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from adfq import AdfqError
from benchmarks.bundled.detectors import DETECTORS
from benchmarks.tasks.detection import models as mmdet_models
from benchmarks.tasks.detection.models import (
    build_detector,
    convert_backbone,
    detector_names,
    load_detector,
    mmdetection,
    open_config,
)

pytest.importorskip("mmengine")
MASK = str(DETECTORS["bundled_mask_rcnn"].config)
CASCADE = str(DETECTORS["bundled_cascade_mask_rcnn"].config)

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def make_state(randomize: Callable[..., nn.Module]) -> Callable[[str], State]:
    """Makes seeded weights of a config's model."""

    def make(config: str) -> State:
        return dict(randomize(build_detector(open_config(config))).state_dict())

    return make


@pytest.fixture(scope="module")
def mask_state(make_state: Callable[[str], State]) -> State:
    return make_state(MASK)


@pytest.fixture
def state(mask_state: State) -> State:
    """Weights of the bundled Mask R-CNN, for a test to alter."""
    return {name: tensor.clone() for name, tensor in mask_state.items()}


def check_loaded(model: nn.Module, state: State) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def authors_layout(state: State) -> State:
    """Weights under the names, and in the order, of the Swin authors' MMDetection 2."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("backbone."):
            for ours, theirs in (
                ("stages.", "layers."),
                ("attn.w_msa.", "attn."),
                ("ffn.layers.0.0.", "mlp.fc1."),
                ("ffn.layers.1.", "mlp.fc2."),
                ("patch_embed.projection", "patch_embed.proj"),
            ):
                name = name.replace(ours, theirs)
            if "downsample" in name:  # four patches in another order, and their channels together
                groups = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)
                tensor = groups[..., [0, 2, 1, 3], :].flatten(-2)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("name", detector_names())
def test_every_name_has_a_config_of_a_swin_detector(name: str) -> None:
    config = open_config(name)
    assert config.model.backbone.type == "SwinTransformer"
    heads = config.model.roi_head.bbox_head
    heads = heads if isinstance(heads, list) else [heads]
    assert len(heads) == (3 if "cascade" in name else 1)
    assert {head.num_classes for head in heads} == {24 if "bundled" in name else 80}


def test_configs_come_from_mmdetection_and_from_files() -> None:
    packaged = open_config("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py")
    assert packaged.model == open_config("mask_rcnn_swin_tiny").model
    assert open_config(MASK).model == open_config("bundled_mask_rcnn").model


def test_the_authors_cascade_has_their_heads() -> None:
    state = build_detector(open_config("cascade_mask_rcnn_swin_tiny")).state_dict()
    # As in their file of Swin-T: four convolutions with normalization, one fully connected layer, a box for each class.
    assert state["roi_head.bbox_head.2.shared_convs.3.bn.running_var"].shape == (256,)
    assert state["roi_head.bbox_head.0.shared_fcs.0.weight"].shape == (1024, 256 * 7 * 7)
    assert state["roi_head.bbox_head.1.fc_reg.weight"].shape == (320, 1024)
    assert state["roi_head.mask_head.2.conv_logits.weight"].shape == (80, 256, 1, 1)
    assert state["backbone.norm3.weight"].shape == (768,)


def test_nothing_is_initialized_or_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with mmdetection():
        from mmdet.models.backbones.swin import SwinTransformer
        from mmengine.runner import CheckpointLoader
    for cls, name in ((SwinTransformer, "init_weights"), (CheckpointLoader, "load_checkpoint")):
        monkeypatch.setattr(cls, name, lambda *_, **__: pytest.fail("weights were initialized"))
    model: Any = load_detector("mask_rcnn_swin_tiny")
    assert "https" in model.cfg.model.backbone.init_cfg.checkpoint


def test_a_model_has_its_config_as_it_was_read(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = load_detector(MASK)
    assert not model.training
    assert model.cfg.model == open_config(MASK).model  # which building would alter
    assert copy.deepcopy(model).cfg.model == model.cfg.model
    assert capsys.readouterr() == ("", f"adfq: {MASK} has random weights (there is no checkpoint)\n")


@pytest.mark.parametrize("layout", ["safetensors", "pth", "bare pth", "module", "authors", "authors' module"])
def test_layouts(layout: str, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / ("weights.safetensors" if layout == "safetensors" else "weights.pth")
    content = authors_layout(state) if "authors" in layout else state
    if "authors" in layout:
        assert "backbone.layers.0.blocks.0.mlp.fc1.weight" in content
    if "module" in layout:
        content = {f"module.{name}": tensor for name, tensor in content.items()}
    if layout == "safetensors":
        save_file(content, file)
    else:
        torch.save(content if layout == "bare pth" else {"meta": {"epoch": 36}, "state_dict": content}, file)
    check_loaded(load_detector(MASK, str(file)), state)
    assert capsys.readouterr() == ("", "")


def test_the_authors_layout_of_a_cascade_and_harmless_buffers(
    make_state: Callable[[str], State], tmp_path: Path
) -> None:
    state = make_state(CASCADE)
    file = tmp_path / "cascade.pth"
    content = authors_layout(state)
    dropped = [name for name in content if name.endswith(("num_batches_tracked", "relative_position_index"))]
    assert {name.rpartition(".")[2] for name in dropped} == {"num_batches_tracked", "relative_position_index"}
    content = {name: tensor for name, tensor in content.items() if name not in dropped}
    content["backbone.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)  # the classifiers' files have them
    torch.save({"state_dict": content}, file)
    check_loaded(load_detector(CASCADE, str(file)), state)


def test_weights_are_widened(state: State, tmp_path: Path) -> None:
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(halves, tmp_path / "halves.safetensors")
    model = load_detector(MASK, str(tmp_path / "halves.safetensors"))
    check_loaded(model, {name: tensor.to(state[name].dtype) for name, tensor in halves.items()})


def test_the_authors_weights_compute_what_timm_computes(randomize: Callable[..., nn.Module]) -> None:
    """timm's Swin is the authors' but for the place of patch merging: there it begins a stage, here it ends one."""
    with mmdetection():
        from mmdet.models.backbones.swin import SwinTransformer
    # Resolutions 32, 16, 8: no window is cut, and each is smaller than its stage.
    timm = randomize(TimmSwin(img_size=128, embed_dim=24, depths=(2, 2, 2), num_heads=(2, 3, 4), window_size=4))
    authors = {}
    for name, tensor in {**timm.state_dict(), **dict(timm.named_buffers())}.items():  # the authors save buffers too
        if "downsample" in name:
            _, stage, rest = name.split(".", 2)
            name = f"layers.{int(stage) - 1}.{rest}"
        authors[name] = tensor
    backbone = SwinTransformer(
        embed_dims=24, depths=(2, 2, 2), num_heads=(2, 3, 4), window_size=4, strides=(4, 2, 2), out_indices=(0, 1, 2)
    )
    converted = convert_backbone(authors)
    own = backbone.state_dict()
    indices = [name for name in own if name.endswith("relative_position_index")]
    assert len(indices) == 6
    assert all(torch.equal(converted[name], own[name]) for name in indices)
    result = backbone.load_state_dict(converted, strict=False)
    assert all(name.startswith("norm") for name in result.missing_keys)  # one a stage, of detectors alone
    assert set(result.unexpected_keys) <= {"norm.weight", "norm.bias"} | {
        name for name in converted if name.endswith("attn_mask")
    }
    backbone.eval()
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        expected = timm.forward_intermediates(images, intermediates_only=True)
        found = backbone(images)
    for ours, theirs in zip(found, expected, strict=True):
        normalized = layer_norm(theirs.movedim(1, -1), theirs.shape[1:2])
        assert torch.allclose(ours.movedim(1, -1), normalized, atol=1e-4)


def training_checkpoint(state: State) -> dict[str, Any]:
    with mmdetection():
        from mmengine.logging import HistoryBuffer

    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    history = HistoryBuffer([1.5, 1.25], [1, 1])
    history.smooth = HistoryBuffer.mean  # a method of a class; older versions keep such
    return {
        "meta": {"epoch": 12, "cfg": "model = dict()", "dataset_meta": {"classes": ("cat",)}, "best": np.float64(0.5)},
        "state_dict": state,
        "message_hub": {"log_scalars": {"train/loss": history}, "runtime_info": {"iter": np.int64(7)}},
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [{"last_step": 3, "_get_lr_called": True}],
    }


def test_training_checkpoints_load_without_their_history(state: State, tmp_path: Path) -> None:
    content, file = training_checkpoint(state), tmp_path / "epoch_12.pth"
    allowed = set(torch.serialization.get_safe_globals())
    torch.save(content, file)
    check_loaded(load_detector(MASK, str(file)), state)
    # The same from a machine with numpy 1, or with numpy 2 where this one has 1: the module has another name.
    torch.save(content, file, _use_new_zipfile_serialization=False)
    names = [b"numpy._core.multiarray", b"numpy.core.multiarray"]
    here, there = names if names[0] in file.read_bytes() else reversed(names)
    other = file.read_bytes().replace(here, there)
    assert other != file.read_bytes()
    file.write_bytes(other)
    check_loaded(load_detector(MASK, str(file)), state)
    assert set(torch.serialization.get_safe_globals()) == allowed  # for other files nothing more than before


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_not_run(state: State, tmp_path: Path) -> None:
    file, trace = tmp_path / "evil.pth", tmp_path / "was-run"
    for content in ({"state_dict": _Payload(trace)}, {"state_dict": state, "message_hub": _Payload(trace)}):
        torch.save(content, file)
        with pytest.raises(AdfqError, match="code in it is never run"):
            load_detector(MASK, str(file))
        assert not trace.exists()


def _shrink(state: State) -> None:
    state["roi_head.bbox_head.fc_cls.weight"] = torch.zeros(3, 192)


def _confuse(state: State) -> None:
    state["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"].zero_()


def _break(state: State) -> None:
    state["neck.lateral_convs.0.conv.bias"][0] = float("nan")


def _rename(state: State) -> None:
    state["head.weight"] = state.pop("backbone.norm2.weight")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_shrink, r"1 have other shapes \(roi_head.bbox_head.fc_cls.weight is 3×192 and should be 25×192\)"),
        (_rename, r"1 weights are missing \(backbone.norm2.weight for one\), 1 are not the model's \(head.weight"),
        (_confuse, "stages.0.blocks.0.attn.w_msa.relative_position_index is another"),
        (_break, "neck.lateral_convs.0.conv.bias is not finite"),
    ],
)
def test_another_detectors_checkpoint_says_what_does_not_fit(
    damage: Callable[[State], None], message: str, state: State, tmp_path: Path
) -> None:
    damage(state)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(AdfqError, match=message) as caught:
        load_detector(MASK, str(tmp_path / "other.safetensors"))
    assert str(caught.value).startswith(f"checkpoint {tmp_path}/other.safetensors does not fit {MASK}: ")
    assert "\n" not in str(caught.value)


def test_a_cascade_is_no_mask_rcnn(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "mask.safetensors")
    with pytest.raises(AdfqError, match=r"does not fit .*: \d+ weights are missing .*, \d+ are not the model's"):
        load_detector(CASCADE, str(tmp_path / "mask.safetensors"))


def test_a_missing_checkpoint() -> None:
    with pytest.raises(AdfqError, match=r"there is no checkpoint no\.pth"):
        load_detector(MASK, "no.pth")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(", "cannot read config .*broken.py: .*was never closed"),
        ("raise ValueError('two\\nlines')", "cannot read config .*broken.py: two lines"),
        ("_base_ = './nowhere.py'", "cannot read config .*broken.py: .*nowhere.py"),
        ("backbone = 3", "it has no 'model'"),
        ("model = dict(type='Rocket')", "cannot create the model of .*Rocket is not in the mmdet::model registry"),
        ("_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'", "MMDetection's SwinTransformer; it is a ResN"),
    ],
)
def test_configs_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(AdfqError, match=message) as caught:
        load_detector(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mask_rcnn_swin_tin", "unknown model 'mask_rcnn_swin_tin'; close to it are mask_rcnn_swin_tiny"),
        ("qqq", "unknown model 'qqq'; 'adfq list models' lists all"),
        ("configs/no.py", "there is no config configs/no.py"),
        ("mmdet::swin/no.py", "cannot read config mmdet::swin/no.py: "),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(AdfqError, match=message):
        load_detector(name)


def test_without_mmdetection_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmdet.utils", None)
    with pytest.raises(AdfqError, match=r"detection needs MMDetection: pip install 'adfq\[detection\]'"):
        open_config(MASK)

    def refuse() -> None:
        raise AssertionError("MMCV==9 is used but incompatible.")

    monkeypatch.setattr(mmdet_models, "provide_mmcv_ops", refuse)
    with pytest.raises(AdfqError, match="MMDetection cannot be used: MMCV==9 is used but incompatible"):
        open_config(MASK)
