"""MMDetection's models: configs by name or file, checkpoints in two layouts."""

from __future__ import annotations

import copy
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

from torch import Tensor, nn

from adfq.adapters.mmcv_ops import provide_mmcv_ops
from adfq.errors import AdfqError, one_line
from benchmarks.bundled.detectors import CONFIG_FOLDER, DETECTORS
from benchmarks.run.console import warn
from benchmarks.tasks.checkpoints import check_present, load_weights
from benchmarks.tasks.shared import unknown_model

#: Config files by model name: MMDetection's own, and further ones.
CONFIGS: Mapping[str, str] = {
    "mask_rcnn_swin_tiny": "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py",
    "mask_rcnn_swin_small": "mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py",
    "cascade_mask_rcnn_swin_tiny": str(CONFIG_FOLDER / "cascade_mask_rcnn_swin_tiny.py"),
    "cascade_mask_rcnn_swin_small": str(CONFIG_FOLDER / "cascade_mask_rcnn_swin_small.py"),
}


def detector_names() -> list[str]:
    """Return the names of detectors: bundled ones, then those on COCO."""
    return [*DETECTORS, *CONFIGS]


@contextmanager
def mmdetection() -> Iterator[None]:
    """Set MMDetection up for use, and keep its messages and those of its imports from stdout and stderr.

    Raises:
        AdfqError: if MMDetection is not installed or does not work with the installed mmcv.
    """
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            provide_mmcv_ops()
            import cv2
            from mmdet.utils import register_all_modules
            from mmengine.logging import MMLogger

            register_all_modules(init_default_scope=True)
        except ImportError as error:
            raise AdfqError(f"detection needs MMDetection: pip install 'adfq[detection]' ({one_line(error)})") from None
        except AssertionError as error:  # it does not work with every version of mmcv
            raise AdfqError(f"MMDetection cannot be used: {one_line(error)}") from None
        MMLogger.get_current_instance().setLevel(logging.ERROR)
        cv2.setNumThreads(0)  # processes that read images would wait for threads that stayed in this one
        yield


def open_config(name: str) -> Any:
    """Read an mmengine config.

    Args:
        name: a model of `detector_names`, ``mmdet::PATH`` for one of MMDetection's own configs, or a file. A config
            file is a program, and is run.

    Raises:
        AdfqError: for a config that is not there or cannot be read.
    """
    with mmdetection():
        from mmengine.config import Config
        from mmengine.hub import get_config

        place = str(DETECTORS[name].config) if name in DETECTORS else CONFIGS.get(name, name)
        packaged = place.startswith("mmdet::")
        if not packaged and not os.path.isfile(place):
            raise _unknown(name)
        try:
            return get_config(place) if packaged else Config.fromfile(place)
        except Exception as error:  # a program can raise anything
            raise AdfqError(f"cannot read config {name}: {one_line(error)}") from None


def build_detector(config: Any) -> nn.Module:
    """Build the model of a config with random weights; nothing is downloaded.

    Args:
        config: from `open_config`.
    """
    with mmdetection():
        from mmdet.registry import MODELS
        from mmengine.model import revert_sync_batchnorm

        # MMDetection writes into the settings that it builds from.
        model: nn.Module = revert_sync_batchnorm(MODELS.build(copy.deepcopy(config.model)))
    return model


def load_detector(name: str, checkpoint: str | None = None) -> nn.Module:
    """Build a detector and load its weights.

    Args:
        name: model or config, see `open_config`.
        checkpoint: file of `benchmarks.tasks.checkpoints.read_weights` in the layout of MMDetection 3 or of the Swin
            authors' MMDetection 2. None, the default, takes the bundled weights of a bundled model and random ones for
            others.

    Returns:
        The model in evaluation mode, with its config as attribute `cfg`.

    Raises:
        AdfqError: for a config or checkpoint that cannot be used, and a backbone that cannot be quantized.
    """
    config = open_config(name)
    if checkpoint is None and name in DETECTORS:
        checkpoint = str(DETECTORS[name].checkpoint)
    check_present(checkpoint)
    if "model" not in config:
        raise AdfqError(f"{name} is not the config of a detector: it has no 'model'")
    try:
        model: Any = build_detector(config)
    except Exception as error:  # whatever the model's parts raise
        raise AdfqError(f"cannot create the model of {name}: {one_line(error)}") from None
    _check_backbone(name, model)
    model.cfg = config
    if checkpoint is not None:
        load_weights(model, checkpoint, name, convert_layout)
    else:
        warn(f"{name} has random weights (there is no checkpoint)")
    detector: nn.Module = model.eval()
    return detector


def convert_backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone's weights in the Swin authors' names and order under MMDetection's.

    Args:
        state: weights by name, without prefix.
    """
    with mmdetection():
        from mmdet.models.backbones.swin import swin_converter

        converted: dict[str, Tensor] = swin_converter(dict(state))
    return {name.removeprefix("backbone."): tensor for name, tensor in converted.items()}


def convert_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a detector's weights under MMDetection 3's names.

    Args:
        state: weights by name, in that layout or in that of the Swin authors' MMDetection 2.
    """
    if not any(name.startswith("backbone.layers.") for name in state):
        return state
    backbone = {name for name in state if name.startswith("backbone.")}
    converted = convert_backbone({name.removeprefix("backbone."): state[name] for name in backbone})
    rest = {name: tensor for name, tensor in state.items() if name not in backbone}
    return rest | {f"backbone.{name}": tensor for name, tensor in converted.items()}


def _check_backbone(name: str, model: nn.Module) -> None:
    from mmdet.models.backbones.swin import SwinTransformer

    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, SwinTransformer):
        found = "it has none" if backbone is None else f"it is a {type(backbone).__name__}"
        raise AdfqError(f"{name}: the backbone has to be MMDetection's SwinTransformer; {found}")


def _unknown(name: str) -> AdfqError:
    if re.search(r"[/\\]|\.(py|json|ya?ml)$", name):
        return AdfqError(f"there is no config {name}")
    return unknown_model(name, detector_names())
