"""The loss of features behind the full-precision rest of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from adfq.reconstruction import Batch, SuffixFeature, Unit

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]
WalkUnits = Callable[..., Iterator[Unit]]


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """The inputs of the heads side by side; the output without any."""
    found: list[Tensor] = []
    heads = [model.get_submodule(name) for name, _ in model.named_modules() if name in ("head", "head_dist", "head.fc")]
    linears = [head for head in heads if isinstance(head, nn.Linear)]
    hooks = [head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])) for head in linears]
    with torch.no_grad():
        output: Tensor = model(images)
    for hook in hooks:
        hook.remove()
    return torch.cat(found, -1) if found else output


@pytest.mark.parametrize("kind", ["vit", "distilled", "features", "swin"])
def test_the_feature_of_any_images_is_that_before_the_head(
    kind: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages, walk_units: WalkUnits
) -> None:
    makers: dict[str, Callable[[], nn.Module]] = {
        "vit": make_vit,
        "distilled": lambda: make_vit(VisionTransformerDistilled),
        "features": lambda: make_vit(num_classes=0),
        "swin": make_swin,
    }
    model, images = makers[kind](), make_images(5)
    expected = features_of(model, images)
    names = ("patch_embed", "layers.0.blocks.1", "layers.1.downsample", "layers.1.blocks.0")
    names = names if kind == "swin" else ("patch_embed", "blocks.0", "blocks.1")
    units = list(walk_units(model, images, names, 3))
    assert [unit.name for unit in units] == list(names)
    for unit in walk_units(model, images, names, 3):
        chosen = torch.tensor([4, 0, 2, 1])  # more than a batch of the walk holds, and in another order
        batch = Batch(unit.examples[0], chosen)
        feature = unit.feature(batch, unit.targets(batch))
        assert feature is not None
        torch.testing.assert_close(feature, expected[chosen], rtol=1e-4, atol=1e-5)


def test_a_unit_inside_a_block_has_no_feature(
    make_vit: MakeModel, make_images: MakeImages, walk_units: WalkUnits
) -> None:
    for unit in walk_units(make_vit(), make_images(3), ("blocks.0.mlp", "head")):
        loss = SuffixFeature(unit, 2.0)
        assert not loss.features
        batch = Batch(unit.examples[0], torch.tensor([1, 2]))
        wanted = unit.targets(batch)
        assert float(loss(wanted + 0.1, batch)) == pytest.approx(2.0)
        assert float(loss(wanted + 0.2, batch)) == pytest.approx(8.0, rel=1e-4)


def test_terms_are_relative_to_their_first_values_and_have_gradients(
    make_vit: MakeModel, make_images: MakeImages, walk_units: WalkUnits
) -> None:
    (unit,) = walk_units(make_vit(), make_images(4), ("blocks.0",))
    loss, batch = SuffixFeature(unit, 3.0), Batch(unit.examples[0], torch.tensor([3, 1]))
    target = unit.targets(batch)
    error = 0.01 * torch.randn_like(target)
    assert float(loss(target + error, batch)) == pytest.approx(4.0)
    assert float(loss(target, batch)) < 1e-6
    first = [float(term) for term in loss.first]
    assert first == pytest.approx([float(term) for term in loss.terms(target + error, batch)])
    assert first[0] == pytest.approx(float(error.square().mean()))
    # The same error in all channels of a token vanishes in LayerNorm: the unit's own error sees it, the feature not.
    local, feature = loss.terms(target + 0.5, batch)
    assert float(local) == pytest.approx(0.25, rel=1e-4)
    assert float(feature) < 1e-9
    with torch.enable_grad():
        output = (target + error).requires_grad_()
        loss.terms(output, batch)[1].backward()
    assert output.grad is not None
    assert output.grad.abs().sum() > 0
