"""Operators of mmcv on top of torchvision, for installations without compiled ones.

MMDetection imports ``mmcv._ext``, a C++ extension that has to be compiled for each version of torch. Swin detectors
need three of its operators, and torchvision has these.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchvision.ops import nms as box_nms
from torchvision.ops import roi_align

_EXTENSION = "mmcv._ext"


def provide_mmcv_ops() -> None:
    """Make ``import mmdet`` work without compiled operators; to be called before it.

    Compiled operators are used if they are installed.
    """
    if _EXTENSION in sys.modules or importlib.util.find_spec(_EXTENSION) is not None:
        return
    module: Any = importlib.util.module_from_spec(ModuleSpec(_EXTENSION, None))
    for operator in (nms, roi_align_forward, roi_align_backward):
        setattr(module, operator.__name__, operator)
    module.__getattr__ = _missing
    sys.modules[_EXTENSION] = module


def _missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def operator(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"mmcv's operator {name!r} is not covered without compiled operators; install mmcv with them, "
            "or onedl-mmcv, in place of mmcv-lite"
        )

    return operator


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return indices of the boxes that non-maximum suppression keeps, highest score first.

    Args:
        boxes: N×4 in pixels: x0, y0, x1, y1.
        scores: N.
        iou_threshold: IoU with a better box above which a box is dropped.
        offset: 1 if a box ends after its last pixel's left edge, so that its width is x1 - x0 + 1; 0 otherwise.
    """
    kept: Tensor = box_nms(boxes + boxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)
    return kept


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the features of each RoI to `output`.

    Args:
        input: features, N×C×H×W.
        rois: K×5: index into N, x0, y0, x1, y1 in pixels of the image.
        output: K×C×height×width; overwritten.
        argmax_y: without effect.
        argmax_x: without effect.
        aligned_height: height of the output in bins.
        aligned_width: width of the output in bins.
        spatial_scale: pixels of the features for each pixel of the image.
        sampling_ratio: samples along each side of a bin; 0 for as many as it has pixels.
        pool_mode: 1 for the mean of the samples, which is all that is covered.
        aligned: True to shift RoIs by half a pixel.

    Raises:
        NotImplementedError: for another `pool_mode`.
    """
    if pool_mode != 1:
        _missing("roi_align_forward with pool_mode='max'")()
    size = (aligned_height, aligned_width)
    # torchvision has no kernels for half precision on a CPU.
    output.copy_(roi_align(input.float(), rois.float(), size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of `roi_align_forward` with respect to its input to `grad_input`.

    Args:
        grad_output: K×C×height×width.
        rois: see `roi_align_forward`.
        argmax_y: without effect.
        argmax_x: without effect.
        grad_input: N×C×H×W; overwritten.
        aligned_height: see `roi_align_forward`.
        aligned_width: see `roi_align_forward`.
        spatial_scale: see `roi_align_forward`.
        sampling_ratio: see `roi_align_forward`.
        pool_mode: see `roi_align_forward`.
        aligned: see `roi_align_forward`.

    Raises:
        NotImplementedError: for another `pool_mode`.
    """
    if pool_mode != 1:
        _missing("roi_align_backward with pool_mode='max'")()
    gradient = torch.ops.torchvision._roi_align_backward(
        grad_output.float(),
        rois.float(),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input.copy_(gradient)
