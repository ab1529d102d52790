"""Activation functions with factors of their channels: the function, and models with them in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from adfq.adapters import adapt
from adfq.transforms.activations import ScaledActivation, scale_activation, scaled_activations

MakeModel = Callable[..., nn.Module]


@torch.no_grad()
def test_outputs_are_divided_channel_by_channel(make_vit: MakeModel) -> None:
    model = adapt(make_vit()).model
    mlp = model.get_submodule("blocks.1.mlp")
    before = mlp.get_submodule("act")
    x = torch.randn(2, 5, mlp.get_submodule("fc2").get_parameter("weight").shape[1])
    scaled = scale_activation(model, "blocks.1.mlp")
    assert torch.equal(scaled(x), before(x))
    scaled.ratio.copy_(torch.rand_like(scaled.ratio) + 0.5)
    torch.testing.assert_close(scaled(x) * scaled.ratio, before(x))
    assert scaled_activations(model) == ["blocks.1.mlp"]


@pytest.mark.parametrize("name", ["blocks.0.attn", "blocks.0.mlp.fc1", "nowhere", "blocks.1.mlp"])
def test_what_has_no_gelu_is_refused(name: str, make_vit: MakeModel) -> None:
    model = adapt(make_vit()).model
    scale_activation(model, "blocks.1.mlp")
    with pytest.raises(AdfqError, match=f"{name} is no MLP with a GELU"):
        scale_activation(model, name)


def test_factors_are_saved(
    make_vit: MakeModel, make_images: Callable[..., Tensor], comes_back: MakeModel, tmp_path: Path
) -> None:
    images = make_images()
    saved = adfq.quantize(make_vit(), "row_ridge", 4, 4, images)
    loaded = comes_back(saved, tmp_path / "model.safetensors", nn.Module.__call__, images)
    names = scaled_activations(saved)
    assert names == scaled_activations(loaded)
    assert len(names) == 2
    for name in names:
        before, after = (model.get_submodule(f"{name}.act") for model in (saved, loaded))
        assert isinstance(before, ScaledActivation)
        assert isinstance(after, ScaledActivation)
        assert torch.equal(after.ratio, before.ratio)
        assert before.ratio.unique().numel() > 10
