"""I&S-ViT's calibrated part, against the released code."""

from __future__ import annotations

from collections.abc import Callable

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
    method = IASViT(released=True)

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
        quantize(make_swin(), "iasvit", 4, 4, calibration, calibration_size=len(images[:66]) if size is None else size)
        for calibration, size in ((images, 64), (images, None), (images.split(33), None))
    )
    assert torch.equal(few(images[:2]), many(images[:2]))
    torch.testing.assert_close(few(images[:2]), batches(images[:2]), rtol=0.0, atol=1.0)
    merging = many.get_submodule("layers.1.downsample.reduction").input_quantizer
    assert isinstance(merging, UniformQuantizer)
    assert merging.scale.shape == ()
