"""Calibration in several batches against calibration in one, interrupted runs, and what waits in files."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq.calibration.activations
from adfq import AdfqError, quantize
from adfq.calibration import CalibrationImages, read_images, waiting
from adfq.calibration.waiting import WaitingRoom, room_for
from adfq.quantizers import Quantizer

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "percentile": ("base_ptq", {}),
    "minmax": ("base_ptq", {"range": "minmax"}),
    "mse": ("base_ptq", {"range": "mse"}),
    "repq_vit": ("repq_vit", {}),
    "adfq_vit, calibrated": ("adfq_vit", {"iterations": 0}),
    "adfq_vit, static shift": ("adfq_vit", {"iterations": 0, "shift": "static"}),
    "adfq_vit, optimized": ("adfq_vit", {"iterations": 4, "optimize_batch_size": 4, "rounding_learning_rate": 0.1}),
}


def state(model: nn.Module) -> dict[str, Tensor]:
    buffers = {
        f"{name}.{key}": buffer
        for name, module in model.named_modules()
        if isinstance(module, Quantizer)
        for key, buffer in module.state_dict().items()
    }
    return {**buffers, **model.state_dict()}


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    found_state, expected_state = state(found), state(expected)
    assert list(found_state) == list(expected_state)
    for name, tensor in expected_state.items():
        # Sums in another order: a choice between candidates could hang on them, but nothing else.
        torch.testing.assert_close(found_state[name], tensor, rtol=1e-6, atol=0, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore:optimization made")
def test_batches_of_any_size_give_what_one_batch_gives(
    setting: str, make_vit: MakeModel, make_images: MakeImages
) -> None:
    method, options = SETTINGS[setting]
    model, images = make_vit(), make_images(14)
    whole = quantize(model, method, 4, 4, images, **options)
    for sizes in ([1] * 14, [7, 7], [5, 8, 1]):
        in_batches = quantize(model, method, 4, 4, list(images.split(sizes)), **options)
        assert_same(in_batches, whole)


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("method", ["repq_vit", "adfq_vit"])
def test_golden_logits_in_batches(
    method: str, size: int, make_vit: MakeModel, load_golden: Callable[[str], dict[str, Tensor]]
) -> None:
    shared = load_golden("repq_e2e_vit_21.npz")
    vectors = shared if method == "repq_vit" else load_golden("adfq_e2e_vit_21.npz")
    model = make_vit()
    model.load_state_dict({key.removeprefix("state/"): v for key, v in shared.items() if key.startswith("state/")})
    options = {"iterations": 0, "fc1_threshold": 2.5, "patch_embed_bits": 4} if method == "adfq_vit" else {}
    quantized = quantize(model, method, 4, 4, list(shared["calib"].split(size)), **options)
    whole = quantize(model, method, 4, 4, shared["calib"], **options)
    for name, tensor in state(whole).items():
        torch.testing.assert_close(state(quantized)[name], tensor, rtol=2e-2, atol=0.2, msg=f"{name}: {{}}".format)
    expected = vectors["logits_w4a4"]
    with torch.no_grad():
        # Products of one image have sums in another order, which flips a code; the batch of all is within 2e-2.
        assert (quantized(shared["test"]) - expected).norm() <= 5e-2 * expected.norm()


# --- interrupted runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("setting", ["repq_vit", "adfq_vit, calibrated"])
def test_an_interrupted_calibration_goes_on(
    setting: str,
    after: int,
    make_vit: MakeModel,
    make_images: MakeImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, options = SETTINGS[setting]
    model, batches = make_vit(), list(make_images(6).split(2))
    whole = quantize(model, method, 4, 4, batches, **options)
    parts: list[str] = []
    calibrate_part = adfq.calibration.activations.calibrate_part

    def interrupted(model: nn.Module, part: Any, *more: Any) -> None:
        if len(parts) == after:
            raise KeyboardInterrupt
        parts.append(part.name)
        calibrate_part(model, part, *more)

    monkeypatch.setattr(adfq.calibration.activations, "calibrate_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, method, 4, 4, batches, resume=tmp_path, **options)
    first, parts[:] = list(parts), ["the rest"] * 100
    resumed = quantize(model, method, 4, 4, batches, resume=tmp_path, **options)
    assert_same(resumed, whole)
    assert not set(first) & set(parts)
    # Other images are another calibration.
    other = quantize(model, method, 4, 4, [2 * batch for batch in batches], resume=tmp_path, **options)
    assert set(first) <= set(parts)
    assert any(not torch.equal(tensor, state(whole)[name]) for name, tensor in state(other).items())


_SCRIPT = """
import sys, timm, torch
from adfq import quantize
torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=48, depth=8, num_classes=10)
quantized = quantize(model, "adfq_vit", calibration=list(torch.randn(40, 3, 64, 64).split(4)), iterations=0,
                     resume=sys.argv[1], calibration_size=40)
torch.save(quantized(torch.ones(1, 3, 64, 64)), sys.argv[2])
"""


@pytest.mark.slow  # three processes
def test_a_killed_calibration_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def start(folder: str, file: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", _SCRIPT, str(tmp_path / folder), str(tmp_path / file)])

    assert start("whole", "whole.pt").wait(300) == 0
    process = start("killed", "killed.pt")
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("killed/ranges.*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.pt").exists()
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("killed/ranges.*.safetensors")}
    assert len(kept) >= 3
    assert start("killed", "killed.pt").wait(300) == 0
    assert kept == {file: file.stat().st_mtime_ns for file in kept}  # none was made anew
    assert torch.equal(*(torch.load(tmp_path / name) for name in ("whole.pt", "killed.pt")))


@pytest.mark.parametrize("method", ["repq_vit", "adfq_vit"])
def test_a_full_disk_is_one_line(
    method: str, make_vit: MakeModel, make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, pwrite = [0], os.pwrite

    def full(descriptor: int, content: Any, offset: int) -> int:
        written[0] += len(content)
        if written[0] > 150_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, content[: len(content) // 2 + 1], offset)  # a system may write less than it is given

    monkeypatch.setattr(os, "pwrite", full)
    message = rf"^cannot write to {tmp_path}: No space left on device; [^\n]*$"
    with pytest.raises(AdfqError, match=message):
        quantize(make_vit(), method, calibration=list(make_images(12).split(3)), resume=tmp_path)
    assert not list(tmp_path.glob("*.part"))


# --- what waits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(3, 4, 5), (), (0, 3)])
def test_tensors_come_back_as_they_went(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    room = WaitingRoom(tmp_path)
    tensors = [torch.randn(shape).mul(10).to(dtype), torch.ones(7, 3).T.to(dtype), torch.zeros(1, 1).expand(4, 5)]
    places = [room.keep(tensor) for tensor in tensors]
    for tensor, place in zip(tensors, places, strict=True):
        assert torch.equal(place.load(), tensor)
        assert place.load().dtype == tensor.dtype
    assert not list(tmp_path.iterdir())  # the file has no name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_rows_wait_in_a_file_and_small_ones_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    small, large = torch.randn(2, 5).to(dtype), torch.randn(3, 2**22 // dtype.itemsize).to(dtype)
    assert isinstance(room_for(small, 4, tmp_path), Tensor)
    rows = room_for(large, 4, tmp_path)
    assert not isinstance(rows, Tensor)
    assert (len(rows), rows.shape, rows.dtype) == (4, (4, large.shape[1]), dtype)
    rows[torch.tensor([3, 0])] = large[:2]
    rows[torch.tensor([1])] = large[2:]
    assert torch.equal(rows[torch.tensor([0, 1, 3, 0])], large[[1, 2, 0, 1]])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adfq_vit", {"iterations": 3, "optimize_batch_size": 4}),
        ("fima_q", {"iterations": 3, "optimize_batch_size": 4}),
        ("row_ridge", {"iterations": 3, "optimize_batch_size": 4, "reconstruct": True}),
    ],
)
@pytest.mark.parametrize("sizes", [[6], [4, 2]])
@pytest.mark.filterwarnings("ignore:optimization made")
def test_an_optimization_from_files_gives_the_same_bits(
    method: str,
    options: dict[str, Any],
    sizes: list[int],
    make_vit: MakeModel,
    make_images: MakeImages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, images = make_vit(), list(make_images(6).split(sizes))
    expected = state(quantize(model, method, calibration=images, **options))
    monkeypatch.setattr(waiting, "_LARGE", 0)
    found = state(quantize(model, method, calibration=images, **options))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_images_are_regrouped_in_order(tmp_path: Path) -> None:
    images = torch.arange(11.0)[:, None, None, None].expand(11, 3, 2, 2)
    for batches in ([images], [images[:4], images[4:5], images[5:]], list(images.split(1))):
        found = read_images(batches, folder=tmp_path).split(4)
        assert (len(found), found.sizes) == (11, [4, 4, 3])
        assert torch.equal(torch.cat(list(found)), images)
    mixed = CalibrationImages([images[:3], images[:3, :, :1], images[3:5]]).split(2)
    assert mixed.sizes == [2, 1, 2, 1, 2]
    assert [tuple(image.shape) for image in mixed.one_of_each_shape()] == [(1, 3, 2, 2), (1, 3, 1, 2)]
