"""The walk along a trunk: in batches, every family is calibrated to what one batch gives, and nothing runs twice."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from torch import Tensor, nn

import adfq.api
from adfq.adapters import adapt
from adfq.reconstruction.optimizer import Reconstruction
from adfq.sites import Network

Randomize = Callable[[nn.Module], nn.Module]
SameInBatches = Callable[[nn.Module, Tensor, str, "int | list[int]"], None]

VIT: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
SWIN: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": (2, 1),
    "num_heads": (1, 2),
    "window_size": 4,
    "num_classes": 5,
}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ViT": partial(VisionTransformer, **VIT),
    "ViT of parallel blocks": partial(VisionTransformer, **VIT, block_fn=ParallelThingsBlock),
    "ViT with attention pooling": partial(VisionTransformer, **VIT, global_pool="map", class_token=False),
    "ViT of Sequentials": lambda: group_blocks(VisionTransformer(**VIT)),
    "distilled DeiT": partial(VisionTransformerDistilled, **VIT),
    "Swin": partial(SwinTransformer, **SWIN),
    "Swin V2": partial(SwinTransformerV2, **SWIN),
    "Swin V2 Cr": partial(SwinTransformerV2Cr, **SWIN),
    "BEiT": partial(Beit, **VIT, use_shared_rel_pos_bias=True),
    "EVA": partial(Eva, **VIT),
}
OPTIMIZED = ("ViT with attention pooling", "Swin", "EVA")  # in the fast suite


def group_blocks(model: Any) -> nn.Module:
    model.blocks = nn.Sequential(nn.Sequential(*model.blocks))
    grouped: nn.Module = model
    return grouped


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:optimization made")
def test_batches_give_what_one_batch_gives(family: str, randomize: Randomize, same_in_batches: SameInBatches) -> None:
    # As many images as fill the optimization's batches and one more: its windows are as many as a mask has.
    setting = "adfq_vit, optimized" if family in OPTIMIZED else "repq_vit"
    same_in_batches(randomize(FAMILIES[family]()), draw(3, 3, 16, 16), setting, [2, 1])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:optimization made")
def test_batches_of_every_size(
    family: str, setting: str, size: int, randomize: Randomize, same_in_batches: SameInBatches
) -> None:
    same_in_batches(randomize(FAMILIES[family]()), draw(5, 3, 16, 16), setting, size)


@pytest.mark.filterwarnings("ignore:optimization made")
def test_images_of_another_height_and_width_keep_their_own_masks(
    randomize: Randomize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same number of windows, but another shape, moves tokens of other places into a window."""
    model = randomize(SwinTransformer(**SWIN, strict_img_size=False, dynamic_img_size=True))
    batches = [draw(2, 3, 16, 32), draw(2, 3, 32, 16)]
    reference, outputs = adapt(copy.deepcopy(model)).model, []
    unit = "layers.0.blocks.1.attn"
    reference.get_submodule(unit).register_forward_hook(lambda *call: outputs.append(call[-1]))
    with torch.no_grad():
        for images in batches:
            reference(images)
    targets = []
    run = Reconstruction.run

    def look(self: Any, done: Any) -> Any:
        if self.unit.name == unit:
            targets.extend(found.targets.flatten(0, 1) for found in self.unit.examples)
        return run(self, done)

    monkeypatch.setattr(Reconstruction, "run", look)
    adfq.quantize(model, "adfq_vit", 4, 4, batches, ppoq=False, iterations=1, calibration_size=4)
    for found, expected in zip(targets, outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_runs_again_when_a_later_part_is_at_hand(
    family: str, randomize: Randomize, walks: Callable[[nn.Module, Tensor], None]
) -> None:
    walks(randomize(FAMILIES[family]()), draw(2, 3, 16, 16))


class ReadsAnEarlierBlock(VisionTransformer):
    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        outputs = [self._pos_embed(self.patch_embed(x))]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        features: Tensor = self.norm(outputs[1] + outputs[-1])
        return features


class UsesBlocksTwice(VisionTransformer):
    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        features: Tensor = self.norm(self.blocks(self.blocks(self._pos_embed(self.patch_embed(x)))))
        return features


class UsesEachBlockTwice(VisionTransformer):
    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(block(x))
        features: Tensor = self.norm(x)
        return features


class Hooked(VisionTransformer):
    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        self.blocks[1].register_forward_pre_hook(lambda _, inputs: (1.5 * inputs[0],))
        self.blocks[0].register_forward_hook(lambda _, __, output: 0.7 * output)


@pytest.mark.parametrize("cls", [ReadsAnEarlierBlock, UsesBlocksTwice, UsesEachBlockTwice, Hooked])
def test_a_subclass_that_takes_another_way(
    cls: type[VisionTransformer], randomize: Randomize, same_in_batches: SameInBatches
) -> None:
    same_in_batches(randomize(cls(**VIT)), draw(3, 3, 16, 16), "base_ptq", [2, 1])


@pytest.mark.parametrize("trunk", [True, False])
def test_units_need_not_cover_the_model(
    trunk: bool, randomize: Randomize, same_in_batches: SameInBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter from elsewhere may name fewer units, and no trunk."""

    def adapt_with_fewer_units(model: nn.Module) -> Network:
        network = adapt(model)
        units = tuple(name for name in network.units if name not in ("patch_embed", "blocks.0.attn"))
        return replace(network, units=units, trunk=network.trunk if trunk else ())

    monkeypatch.setattr(adfq.api, "adapt", adapt_with_fewer_units)
    same_in_batches(randomize(VisionTransformer(**VIT)), draw(3, 3, 16, 16), "base_ptq", [2, 1])


class Headless(VisionTransformer):
    """Has a head, and does not use it."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.forward_features(x)


def test_a_unit_that_the_model_does_not_use_is_named() -> None:
    with pytest.raises(adfq.AdfqError, match=r"^head\.input_quantizer saw no calibration data"):
        adfq.quantize(Headless(**VIT), "base_ptq", 4, 4, list(draw(2, 3, 16, 16).split(1)))


@pytest.mark.slow
def test_every_name_of_timm(randomize: Randomize, same_in_batches: SameInBatches) -> None:
    survey = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "write_architectures.py"))["survey"]
    faults, walked = {}, []

    def check(variant: Any, model: Any) -> None:
        images = draw(2, 3, *model.patch_embed.img_size)
        walked.append(variant.name)
        assert len(adapt(copy.deepcopy(randomize(model))).trunk) > 2
        try:
            same_in_batches(model, images, "repq_vit", 1)
        except AssertionError as error:
            faults[variant.name] = str(error)

    quantized = [outcome for outcome in survey(check) if outcome.variant.family and outcome.reason is None]
    assert faults == {}
    assert len(quantized) > 200
    assert len(walked) > 50
