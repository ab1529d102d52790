"""ERQ as a whole, against the released code and base PTQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError, quantize
from adfq.layers import QuantWeightLayer
from adfq.quantizers import DualUniformQuantizer
from baselines.erq import ERQ

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]


@pytest.mark.parametrize("seed", [21, 22])
@pytest.mark.parametrize("bits", [3, 4, 6])
@torch.no_grad()
def test_golden_erq(bits: int, seed: int, make_vit: MakeModel, load_golden: Callable[[str], dict[str, Tensor]]) -> None:
    try:
        models, vectors = (load_golden(f"{kind}_e2e_vit_{seed}.npz") for kind in ("repq", "erq"))
    except FileNotFoundError:
        pytest.skip("kept aside")
    model = make_vit()
    model.load_state_dict({key.removeprefix("state/"): v for key, v in models.items() if key.startswith("state/")})
    full = models["fp_logits"]

    def logits(coe: float, noise: float = 0.0, seed: int = 0) -> Tensor:
        random = torch.randn(models["calib"].shape, generator=torch.Generator().manual_seed(seed))
        found: Tensor = quantize(model, ERQ(coe), bits, bits, models["calib"] * (1 + noise * random))(models["test"])
        return found

    key = f"logits_w{bits}a{bits}"
    expected = vectors[key]
    # At 3 bits the range of a projection's input is symmetric: its zero point is 3.5 before it is rounded, up to the
    # last digit, which differs between processors.
    attempts = ((0.0, 0), *((1e-6, seed) for seed in range(20)))
    assert any((logits(10000, *attempt) - expected).norm() <= 2e-2 * expected.norm() for attempt in attempts)
    # Nearly singular: one flipped code moves all after it.
    assert (logits(100) - full).norm() <= 1.15 * (vectors[f"{key}_lambda10"] - full).norm()


@torch.no_grad()
def test_it_beats_repq_vit_in_batches_as_in_one(make_swin: MakeModel, make_images: MakeImages) -> None:
    model, images, test = make_swin().double(), make_images(8).double(), make_images(4, seed=2).double()
    expected = model(test)
    whole = quantize(model, "erq", 3, 6, images, coe=100)
    other = quantize(model, "repq_vit", 3, 6, images)
    assert (whole(test) - expected).norm() < 0.7 * (other(test) - expected).norm()
    in_batches = quantize(model, "erq", 3, 6, images.split(3), coe=100)
    for layer, again in zip(whole.modules(), in_batches.modules(), strict=True):
        if isinstance(layer, QuantWeightLayer):
            assert (layer.weight != again.weight).float().mean() < 0.01


def test_a_quantized_model_is_saved_with_both_grids(
    make_vit: MakeModel, make_images: MakeImages, tmp_path: Any
) -> None:
    quantized = quantize(make_vit(), "erq", 3, 6, make_images())
    layer = quantized.get_submodule("blocks.1.mlp.fc1")
    assert isinstance(layer, QuantWeightLayer)
    assert isinstance(layer.weight_quantizer, DualUniformQuantizer)
    assert layer.weight_quantizer.is_outlier.sum() == 192 // 20
    adfq.save(quantized, tmp_path / "model.safetensors")
    loaded = adfq.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(make_images()), quantized(make_images()))
    assert (tmp_path / "model.safetensors").stat().st_size < 70_000  # weights are packed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"coe": 0.0}, "coe must be a finite number above 0, got 0.0"),
        ({"outlier_share": 2}, "outlier_share must be from 0 to 1, got 2"),
    ],
)
def test_options_are_checked(options: dict[str, Any], says: str) -> None:
    with pytest.raises(AdfqError) as caught:
        ERQ(**options)
    assert says in str(caught.value)
