"""I&S-ViT against the released code, calibrated and trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adfq import quantize
from adfq.adapters import adapt
from adfq.bits import Bits
from adfq.calibration import CalibrationImages
from adfq.method import Run
from adfq.quantizers import ShiftUniformLogQuantizer, UniformQuantizer
from baselines.iasvit import IASViT

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]


@pytest.mark.parametrize("seed", [21, 22])
@pytest.mark.parametrize("bits", [3, 4, 6])
@torch.no_grad()
def test_golden_iasvit(
    bits: int, seed: int, make_vit: MakeModel, load_golden: Callable[[str], dict[str, Tensor]]
) -> None:
    try:
        models, vectors = (load_golden(f"{kind}_e2e_vit_{seed}.npz") for kind in ("repq", "iasvit"))
    except FileNotFoundError:
        pytest.skip("kept aside")
    model = make_vit()
    model.load_state_dict({key.removeprefix("state/"): v for key, v in models.items() if key.startswith("state/")})
    method = IASViT(released=True, iterations=0)

    quantized = quantize(model, method, bits, bits, models["calib"])
    expected = vectors[f"logits_w{bits}a{bits}"]
    assert (quantized(models["test"]) - expected).norm() <= 2e-2 * expected.norm()
    probs = quantized.get_submodule("blocks.1.attn.context").left_quantizer
    assert isinstance(probs, ShiftUniformLogQuantizer)
    assert probs.shift == vectors[f"w{bits}a{bits}/blocks.1.attn.matmul2.probs/shift"]
    head = quantized.get_submodule("head").weight_quantizer
    torch.testing.assert_close(head.scale, vectors[f"w{bits}a{bits}/head/weight_scale"], rtol=1e-4, atol=0.0)

    network = adapt(model)  # the model itself from here on
    method.quantize_activations(network, Run(CalibrationImages([models["calib"]])), Bits(bits, bits))
    expected = vectors[f"stage1_logits_w{bits}a{bits}"]
    assert (network.run(models["test"]) - expected).norm() <= 2e-2 * expected.norm()


def test_ranges_are_found_on_the_first_images(make_swin: MakeModel, make_images: MakeImages) -> None:
    images = make_images(66)
    few, many, batches = (
        quantize(make_swin(), IASViT(iterations=0), 4, 4, calibration, calibration_size=size or len(images))
        for calibration, size in ((images, 64), (images, None), (images.split(33), None))
    )
    assert torch.equal(few(images[:2]), many(images[:2]))
    torch.testing.assert_close(few(images[:2]), batches(images[:2]), rtol=0.0, atol=1.0)
    merging = many.get_submodule("layers.1.downsample.reduction").input_quantizer
    assert isinstance(merging, UniformQuantizer)
    assert merging.scale.shape == ()


@pytest.mark.parametrize("bits", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_training_is_as_good_as_that_of_released_code(
    bits: int, make_vit: MakeModel, load_golden: Callable[[str], dict[str, Tensor]]
) -> None:
    models, vectors = (load_golden(f"{kind}_e2e_vit_21.npz") for kind in ("repq", "iasvit"))
    model = make_vit()
    model.load_state_dict({key.removeprefix("state/"): v for key, v in models.items() if key.startswith("state/")})
    method = IASViT(released=True, iterations=50, optimize_batch_size=16)
    quantized = quantize(model, method, bits, bits, models["calib"])
    with torch.no_grad():
        expected = model(models["test"])
        error = (quantized(models["test"]) - expected).norm()
    assert error <= 1.25 * (vectors[f"logits_w{bits}a{bits}_iter50"] - expected).norm()
    report = quantized.quantization.report  # type: ignore[union-attr]
    assert all(len(report[stage]) == 4 for stage in ("activations", "everything"))


@pytest.mark.filterwarnings("ignore:optimization made these modules no better")
def test_both_stages_are_resumed(make_swin: MakeModel, make_images: MakeImages, tmp_path: Path) -> None:
    images, method = make_images(8), IASViT(iterations=2, optimize_batch_size=4)
    first, again = (quantize(make_swin(), method, 4, 4, images, resume=tmp_path) for _ in range(2))
    assert torch.equal(first(images), again(images))
    stages = {file.name.partition(".")[0] for file in tmp_path.glob("*.safetensors")}
    assert {"activations", "everything"} <= stages
