"""mmcv's operators on torchvision: against hand-computed cases and torchvision's own gradients."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torchvision.ops import roi_align as torchvision_roi_align

from adfq.adapters import mmcv_ops
from adfq.adapters.mmcv_ops import provide_mmcv_ops

pytest.importorskip("mmcv")
provide_mmcv_ops()

from mmcv.ops import RoIAlign, batched_nms, nms, roi_align  # noqa: E402

ours_only = pytest.mark.skipif(
    getattr(sys.modules.get("mmcv._ext"), "nms", None) is not mmcv_ops.nms, reason="compiled operators are installed"
)


def test_boxes_that_overlap_more_than_the_threshold_are_dropped() -> None:
    # 10×10 boxes, the second moved by 5 (IoU 50/150 = 1/3), the third elsewhere.
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [40, 40, 50, 50]])
    scores = torch.tensor([0.8, 0.9, 0.1])
    kept, indices = nms(boxes, scores, 0.3)
    assert indices.tolist() == [1, 2]
    torch.testing.assert_close(kept, torch.tensor([[5.0, 0, 15, 10, 0.9], [40, 40, 50, 50, 0.1]]))
    assert nms(boxes, scores, 0.34)[1].tolist() == [1, 0, 2]


def test_an_offset_counts_the_last_pixel() -> None:
    # With offset 0: intersection 1·1, union 7, IoU 1/7. With offset 1 sides are 3 and the overlap 2: 4/14 = 2/7.
    boxes, scores = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3]]), torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.2, offset=0)[1].tolist() == [0, 1]
    assert nms(boxes, scores, 0.2, offset=1)[1].tolist() == [0]


def test_classes_do_not_suppress_each_other() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [1, 0, 10, 10]])
    _, kept = batched_nms(
        boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]), {"type": "nms", "iou_threshold": 0.5}
    )
    assert kept.tolist() == [0, 1]


def test_no_boxes() -> None:
    assert len(nms(torch.zeros(0, 4), torch.zeros(0), 0.5)[1]) == 0
    assert RoIAlign(2)(torch.randn(1, 3, 8, 8), torch.zeros(0, 5)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize(("aligned", "columns"), [(True, [0.5, 2.5]), (False, [1.0, 3.0])])
def test_bins_are_sampled_at_their_centres(aligned: bool, columns: list[float]) -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)  # the value is the column
    found = roi_align(ramp, torch.tensor([[0.0, 0, 0, 4, 4]]), 2, 1.0, 1, "avg", aligned)
    torch.testing.assert_close(found, torch.tensor(columns).expand(1, 1, 2, 2))


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_features_and_gradients_are_torchvisions(sampling_ratio: int, aligned: bool) -> None:
    torch.manual_seed(0)
    ours = torch.randn(2, 5, 12, 16, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    rois = torch.tensor([[0, 1.5, 2, 40, 30], [1, 0, 0, 63, 47], [1, 20, 10, 22, 11]])
    y = roi_align(ours, rois, (7, 5), 0.25, sampling_ratio, "avg", aligned)
    expected = torchvision_roi_align(theirs, rois, (7, 5), 0.25, sampling_ratio, aligned)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


@ours_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 8, 8).to(dtype).requires_grad_()
    y = roi_align(x, torch.tensor([[0.0, 0, 0, 6, 6]], dtype=dtype), 2, 1.0, 0, "avg", True)
    y.sum().backward()
    assert y.dtype == dtype
    torch.testing.assert_close(x.grad.float().sum(), torch.tensor(2 * 4.0), rtol=1e-2, atol=0)


@ours_only
def test_an_operator_that_is_not_covered_says_so() -> None:
    from mmcv.ops import soft_nms

    with pytest.raises(NotImplementedError, match=r"'softnms'.*install mmcv with them, or onedl-mmcv"):
        soft_nms(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0.5]))
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        roi_align(torch.randn(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]), 2, 1.0, 0, "max", True)


def test_compiled_operators_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = ModuleType("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", compiled)
    provide_mmcv_ops()
    assert sys.modules["mmcv._ext"] is compiled


def test_a_compiled_extension_that_nobody_has_imported_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mmcv._ext", raising=False)
    monkeypatch.setattr(mmcv_ops.importlib.util, "find_spec", lambda name: object())
    provide_mmcv_ops()
    assert "mmcv._ext" not in sys.modules
