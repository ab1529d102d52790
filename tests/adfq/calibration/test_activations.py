"""Calibration data in, ranges out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adfq import AdfqError, NonFiniteError, quantize
from adfq.adapters import adapt
from adfq.calibration import CalibrationImages, calibrate_activations, quantize_weights, read_images
from adfq.quantizers import UniformQuantizer
from adfq.sites import Network, Recipe

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]


def ready(model: nn.Module, activations: bool = True) -> Network:
    network = adapt(model)
    network.attach(Recipe(lambda: UniformQuantizer(4) if activations else None, lambda: UniformQuantizer(4, "row")))
    return network


# --- batches --------------------------------------------------------------------------------------------------------


def as_loader(images: Tensor) -> Any:
    return DataLoader(TensorDataset(images, torch.arange(len(images))), batch_size=3)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda images: images,
        lambda images: [images[:2], images[2:]],
        lambda images: (batch for batch in images.split(3)),
        as_loader,
        lambda images: DataLoader(TensorDataset(images), batch_size=2),
        lambda images: [(images[:5], None), [images[5:], torch.zeros(2)]],
        lambda images: [images[:0], images],
    ],
    ids=["tensor", "list", "generator", "loader with labels", "loader without labels", "tuples", "an empty batch"],
)
def test_batches_of_every_kind_come_together_in_order(wrap: Callable[[Tensor], Any], make_images: MakeImages) -> None:
    images = make_images(7)
    assert torch.equal(torch.cat(list(read_images(wrap(images)))), images)


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        (None, "calibration images are needed"),
        ([], "no calibration images"),
        (torch.zeros(0, 3, 8, 8), "no calibration images"),
        ([torch.zeros(0, 3, 8, 8)], "no calibration images"),
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\)"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(2)], r"shape \(2,\)"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2)), r"shape \(2,\)"),
        ([{"image": torch.zeros(2, 3, 8, 8)}], "dict"),
        (["images"], "str"),
        ([()], "tuple"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "floating point, got torch.uint8"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8).long()], "floating point, got torch.int64"),
        (torch.full((2, 3, 8, 8), torch.nan), "not finite"),
        ([torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), torch.inf)], "not finite"),
    ],
)
def test_batches_that_are_of_no_use(batches: Any, says: str) -> None:
    with pytest.raises(AdfqError, match=says):
        read_images(batches)


def endless(images: Tensor, read: list[int]) -> Iterator[tuple[Tensor, None]]:
    for index in itertools.count():
        read.append(index)
        yield images, None


@pytest.mark.parametrize(("size", "batches"), [(None, 4), (1, 1), (3, 1), (4, 2), (7, 3)])
def test_an_iterable_is_read_until_there_are_enough_images(
    size: int | None, batches: int, make_images: MakeImages
) -> None:
    images, read = make_images(3), []
    found = read_images(endless(images, read), size, usual=10)
    assert torch.equal(torch.cat(list(found)), images.repeat(4, 1, 1, 1)[: size or 10])
    assert len(found) == sum(found.sizes) == (size or 10)
    assert len(read) == batches


def test_a_tensor_is_taken_whole_unless_a_size_is_asked_for(make_images: MakeImages) -> None:
    images = make_images(9)
    assert torch.equal(read_images(images, usual=2)[0], images)
    assert torch.equal(read_images(images, 4, usual=2)[0], images[:4])


@pytest.mark.parametrize(
    ("size", "says"),
    [(0, "at least 1, got 0"), (2.5, "got 2.5"), (True, "got True"), (10, "only 9 calibration images")],
)
def test_sizes_that_are_of_no_use(size: Any, says: str, make_images: MakeImages) -> None:
    for calibration in (make_images(9), [make_images(9)]):
        with pytest.raises(AdfqError, match=says):
            read_images(calibration, size)


@pytest.mark.parametrize("shape", [(3, 40, 40), (1, 32, 32), (3, 32, 33), (4, 32, 32)])
def test_images_of_another_shape_than_the_models(
    shape: tuple[int, ...], make_vit: MakeModel, make_swin: MakeModel
) -> None:
    for model in (make_vit(), make_swin()):
        said = f"the model does not take calibration images of {'×'.join(map(str, shape))}: "
        with pytest.raises(AdfqError, match=f"^{said}[^\n]+$"):
            quantize(model, "base_ptq", calibration=torch.randn(2, *shape))
        with pytest.raises(AdfqError, match=f"^{said}[^\n]+$"):
            quantize(model, "base_ptq", calibration=[torch.randn(2, 3, 32, 32), torch.randn(2, *shape)])


def test_an_endless_loader_gives_a_method_its_number_of_images(make_vit: MakeModel, make_images: MakeImages) -> None:
    read: list[int] = []
    quantized: Any = quantize(make_vit(depth=1), "base_ptq", calibration=endless(make_images(8), read))
    assert (quantized.quantization.calibration_size, len(read)) == (32, 4)
    quantized = quantize(make_vit(depth=1), "base_ptq", calibration=endless(make_images(8), read), calibration_size=5)
    assert quantized.quantization.calibration_size == 5


# --- activations ----------------------------------------------------------------------------------------------------


def test_every_quantizer_is_calibrated(make_vit: MakeModel, make_images: MakeImages) -> None:
    network = ready(make_vit())
    calibrate_activations(network, CalibrationImages([make_images()]))
    assert all(quantizer.is_calibrated for quantizer in network.activation_quantizers().values())
    assert torch.isfinite(network.model(make_images(seed=2))).all()


def test_a_quantizer_sees_what_the_quantized_layers_before_it_computed(
    make_vit: MakeModel, make_images: MakeImages
) -> None:
    images = make_images()
    network = ready(make_vit())
    quantize_weights(network)
    calibrate_activations(network, CalibrationImages([images]))
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable[..., None]:
        return lambda module, inputs: seen.update({name: inputs[0]})

    for name, quantizer in network.activation_quantizers().items():
        quantizer.register_forward_pre_hook(look(name))
    network.model(images)
    assert len(seen) == 18
    for name, quantizer in network.activation_quantizers().items():
        again = UniformQuantizer(4).calibrate(seen[name])
        assert torch.equal(again.scale, quantizer.scale), name


def test_calibration_goes_through_the_model_once(make_vit: MakeModel, make_images: MakeImages) -> None:
    network = ready(make_vit())
    passes: list[int] = []
    network.model.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    calibrate_activations(network, CalibrationImages([make_images(4)]))
    assert passes == [4]


def test_calibration_leaves_no_hooks_and_no_graph(make_vit: MakeModel, make_images: MakeImages) -> None:
    network = ready(make_vit())
    calibrate_activations(network, CalibrationImages([make_images()]))
    scales = [quantizer.scale.clone() for quantizer in network.activation_quantizers().values()]
    network.model(10 * make_images(seed=2))  # would calibrate again
    for quantizer, scale in zip(network.activation_quantizers().values(), scales, strict=True):
        assert torch.equal(quantizer.scale, scale)
        assert not quantizer.scale.requires_grad


def test_a_failed_calibration_leaves_no_hooks(make_vit: MakeModel, make_images: MakeImages) -> None:
    network, images = ready(make_vit()), make_images()
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(AdfqError):
        calibrate_activations(network, CalibrationImages([images]))
    with pytest.raises(RuntimeError, match="before it is calibrated"):
        network.model(make_images())


def test_images_go_to_the_models_dtype(make_vit: MakeModel, make_images: MakeImages) -> None:
    network = ready(make_vit().bfloat16())
    calibrate_activations(network, CalibrationImages([make_images()]))
    assert network.model(make_images().bfloat16()).dtype == torch.bfloat16


def test_an_image_that_is_not_finite_is_named(make_vit: MakeModel, make_images: MakeImages) -> None:
    images = make_images()
    images[2, 1, 5, 5] = float("inf")
    with pytest.raises(NonFiniteError, match=r"^patch_embed\.proj\.input_quantizer: .*not finite"):
        calibrate_activations(ready(make_vit()), CalibrationImages([images]))


def test_activations_that_are_not_finite_name_their_site(make_vit: MakeModel, make_images: MakeImages) -> None:
    network = ready(make_vit())
    network.model.get_submodule("blocks.1.norm2").weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"^blocks\.1\.mlp\.fc1\.input_quantizer: .*not finite"):
        calibrate_activations(network, CalibrationImages([make_images()]))


def test_operands_that_are_not_finite_name_their_site(make_vit: MakeModel, make_images: MakeImages) -> None:
    network = ready(make_vit(qk_norm=True))
    network.model.get_submodule("blocks.0.attn.k_norm").weight.data[3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"^blocks\.0\.attn\.scores\.right_quantizer: .*not finite"):
        calibrate_activations(network, CalibrationImages([make_images()]))


@pytest.mark.parametrize("name", ["patch_embed.proj", "blocks.1.attn.qkv", "head"])
def test_weights_that_are_not_finite_name_their_layer(make_vit: MakeModel, name: str) -> None:
    model = make_vit()
    model.get_submodule(name).weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"^{name}\.weight: .*not finite"):
        quantize_weights(ready(model))


class HeadlessVisionTransformer(VisionTransformer):
    """Has a head, and does not use it."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return self.forward_features(x)


def test_a_layer_that_the_model_does_not_use_is_named(make_vit: MakeModel, make_images: MakeImages) -> None:
    with pytest.raises(AdfqError, match=r"^head\.input_quantizer saw no calibration data"):
        calibrate_activations(ready(make_vit(HeadlessVisionTransformer)), CalibrationImages([make_images()]))


def test_weights_alone_can_be_quantized(make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(), make_images()
    plain = model(images)
    network = ready(model, activations=False)
    quantize_weights(network)
    calibrate_activations(network, CalibrationImages([images]))
    assert all(len(layer.effective_weight().unique()) <= len(layer.weight) * 16 for _, layer in network.weight_layers())
    assert not torch.allclose(network.model(images), plain, rtol=1e-2)
