"""PTQ4ViT: its quantizers, its errors, and the whole against its released code's results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from torch import Tensor, nn

from adfq import AdfqError, NotApplicableError, quantize
from adfq.adapters import adapt
from adfq.bits import Bits
from adfq.calibration import CalibrationImages
from adfq.layers import QuantLinear, QuantMatMul, QuantWeightLayer
from adfq.method import Run
from adfq.quantizers import Quantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from adfq.sites import sites_of
from baselines import ptq4vit as method
from baselines.ptq4vit import PTQ4ViT

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]
Layer = QuantWeightLayer | QuantMatMul


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_what_every_site_gets(family: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages) -> None:
    network = adapt(make_vit() if family == "vit" else make_swin())
    PTQ4ViT(rounds=1).apply(network, Run(CalibrationImages([make_images()])), Bits(4, 6))
    roles = set()
    sites = [site for site in sites_of(network.model) if not site.is_weight and site.quantizer is not None]
    for name, role, quantizer in ((site.name, site.role, site.quantizer) for site in sites):
        twins = {"probs": TwinSoftmaxQuantizer, "fc2": TwinGeluQuantizer}
        assert type(quantizer) is twins.get(role, UniformQuantizer), name
        assert (quantizer.bits, quantizer.scale.shape) == (6, ()), name
        if isinstance(quantizer, UniformQuantizer):
            assert quantizer.zero_point == 32, name
        roles.add(role)
    assert {"qkv", "query", "key", "probs", "value", "proj", "fc1", "fc2", "head"} <= roles
    assert "patch_embed" not in roles
    assert ("reduction" in roles) == (family == "swin")
    for name, layer in network.weight_layers():
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, UniformQuantizer)
        assert (quantizer.bits, quantizer.zero_point.unique().tolist()) == (4, [8]), name
        if layer.role == "qkv":
            assert quantizer.scale.shape == (len(layer.weight), 1)
            assert all(len(part.unique()) == 1 for part in quantizer.scale.chunk(3))
            assert len(quantizer.scale.unique()) == 3
        elif layer.role == "patch_embed":
            assert quantizer.scale.shape == (len(layer.weight), 1, 1, 1)
            assert len(quantizer.scale.unique()) > 10
        else:
            assert quantizer.scale.shape == ()
        codes = layer.effective_weight() / quantizer.scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert -8 <= codes.round().min() <= codes.round().max() <= 7
        assert layer.weight.grad is None
    assert not any(module._forward_hooks for module in network.model.modules())


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT, qk norm, registers, average pooling": ("vit", {"qk_norm": True, "reg_tokens": 2, "global_pool": "avg"}),
    "Swin, padded windows": ("swin", {"img_size": 40, "window_size": 8, "depths": (1, 1)}),
}


@pytest.mark.parametrize("search", ["hessian", "mse"])
@pytest.mark.parametrize("which", MODELS)
@torch.no_grad()
def test_eight_bits_come_close(
    which: str, search: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages
) -> None:
    family, options = MODELS[which]
    model = (make_vit if family == "vit" else make_swin)(**options).requires_grad_(False)
    images = make_images(4, size=options.get("img_size", 32))
    expected = model(images)
    logits = quantize(model, "ptq4vit", 8, 8, images, search=search, rounds=1)(images)
    assert (logits - expected).norm() <= 0.2 * expected.norm()


def scales(model: nn.Module) -> list[Tensor]:
    return [module.scale for module in model.modules() if isinstance(module, Quantizer)]


def test_a_seed_gives_the_same_bits_and_another_seed_others(make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(patch_size=4, depth=1, num_heads=1), make_images(21)  # sampled; the last batch is short
    one, same, other = (scales(quantize(model, "ptq4vit", 4, 4, images, seed=seed, rounds=1)) for seed in (3, 3, 4))
    assert all(map(torch.equal, one, same))
    assert not all(map(torch.equal, one, other))


@pytest.mark.parametrize("search", ["hessian", "mse"])
def test_passes_do_not_matter_where_samples_hold_everything(
    search: str, make_vit: MakeModel, make_images: MakeImages
) -> None:
    model, images = make_vit(depth=1, patch_size=16, num_heads=1), make_images(5)
    one, two, all_ = (
        scales(quantize(model, "ptq4vit", 4, 4, images, search=search, rounds=1, gradient_batch_size=size))
        for size in (1, 2, 5)
    )
    for found in (two, all_):
        for scale, expected in zip(found, one, strict=True):
            torch.testing.assert_close(scale, expected)


def test_the_gradient_counts(make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(depth=1), make_images(8)
    hessian, mse = (quantize(model, "ptq4vit", 4, 4, images, search=search, rounds=1) for search in ("hessian", "mse"))
    assert not all(map(torch.equal, scales(hessian), scales(mse)))


def test_without_any_gradient_every_error_weighs_the_same(make_vit: MakeModel, make_images: MakeImages) -> None:
    small = {"depth": 1, "patch_size": 16}  # nothing is sampled
    model, images = make_vit(**small), make_images(4)
    nn.init.zeros_(model.get_submodule("head").weight)
    blocks = {}
    for search in ("hessian", "mse"):
        network = adapt(make_vit(**small))
        network.model.load_state_dict(model.state_dict())
        PTQ4ViT(search=search, rounds=1).apply(network, Run(CalibrationImages([images])), Bits(4, 4))
        blocks[search] = scales(network.model.get_submodule("blocks"))
    assert all(map(torch.equal, blocks["hessian"], blocks["mse"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype, make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(depth=1), make_images(4)
    found = quantize(model.to(dtype), "ptq4vit", 6, 6, images, rounds=1)
    assert {parameter.dtype for parameter in found.parameters()} == {dtype}
    assert all(scale.dtype == torch.float32 for scale in scales(found))
    assert torch.isfinite(found(images.to(dtype))).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"search": "cosine"}, "hessian, mse"),
        ({"rounds": 0}, "at least 1"),
        ({"gradient_batch_size": 0}, "at least 1"),
        ({"metric": "mse"}, "search, rounds, gradient_batch_size"),
    ],
)
def test_options_that_do_not_exist(
    options: dict[str, Any], says: str, make_vit: MakeModel, make_images: MakeImages
) -> None:
    with pytest.raises(AdfqError, match=says):
        quantize(make_vit(), "ptq4vit", 4, 4, make_images(), **options)


@pytest.mark.parametrize("search", ["hessian", "mse"])
def test_values_that_are_not_finite(search: str, make_vit: MakeModel, make_images: MakeImages) -> None:
    images = make_images()
    images[1, 0, 5, 5] = torch.nan
    with pytest.raises(AdfqError, match="calibration images are not finite"):
        quantize(make_vit(), "ptq4vit", 4, 4, images, search=search)
    model = make_vit()
    model.get_parameter("blocks.1.mlp.fc1.weight").data[2, 3] = torch.inf
    with pytest.raises(AdfqError, match=r"blocks\.1\.mlp\.fc1\.weight: .*not finite"):
        quantize(model, "ptq4vit", 4, 4, make_images(), search=search)
    model = make_vit()
    model.get_parameter("blocks.1.norm2.bias").data[2] = torch.inf
    with pytest.raises(AdfqError, match=r"blocks\.1\.mlp\.fc1: .*not finite"):
        quantize(model, "ptq4vit", 4, 4, make_images(), search=search)


def test_logits_that_are_not_finite(make_vit: MakeModel, make_images: MakeImages) -> None:
    model = make_vit()
    model.get_parameter("head.bias").data[0] = torch.nan
    with pytest.raises(AdfqError, match=r"logits: .*not finite"):
        quantize(model, "ptq4vit", 4, 4, make_images())


@pytest.mark.parametrize("search", ["hessian", "mse"])
def test_a_layer_that_the_model_does_not_use(search: str, make_vit: MakeModel, make_images: MakeImages) -> None:
    network = adapt(make_vit())
    network.model.add_module("spare", QuantLinear(nn.Linear(4, 4), "fc1"))
    with pytest.raises(AdfqError, match="spare saw no calibration data"):
        PTQ4ViT(search=search).apply(network, Run(CalibrationImages([make_images()])), Bits(4, 4))


def test_a_gradient_needs_logits(make_vit: MakeModel, make_images: MakeImages) -> None:
    model = make_vit(global_pool="", num_classes=0, class_token=False)
    with pytest.raises(AdfqError, match=r"\(1, 16, 48\)"):
        quantize(model, "ptq4vit", 4, 4, make_images())
    quantize(model, "ptq4vit", 4, 4, make_images(), search="mse", rounds=1)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("bits", [4, 6, 8])
@torch.no_grad()
def test_golden_ptq4vit(
    bits: int, released: bool, make_vit: MakeModel, load_golden: Callable[[str], dict[str, Tensor]]
) -> None:
    """In quality, not value: the released code's gradient is rounding noise. Labels are few, hence two seeds."""
    vectors = load_golden("repq_e2e_vit_21.npz")
    reference = load_golden("ptq4vit_e2e_vit_21.npz")[f"logits_w{bits}a{bits}"]
    model = make_vit()
    model.load_state_dict({key.removeprefix("state/"): v for key, v in vectors.items() if key.startswith("state/")})
    expected = vectors["fp_logits"]
    distances = []
    for seed in (0, 1):
        quantized = quantize(model, "ptq4vit", bits, bits, vectors["calib"], seed=seed, released=released)
        distances.append(float((quantized(vectors["test"]) - expected).norm()))
    assert sum(distances) / 2 <= 1.25 * float((reference - expected).norm())


@pytest.mark.slow
@torch.no_grad()
def test_deit_tiny_at_full_size(randomize: Callable[[nn.Module], nn.Module]) -> None:
    model, images = randomize(timm.create_model("deit_tiny_patch16_224")), torch.randn(32, 3, 224, 224)
    expected = model(images[:4])
    logits = quantize(model, "ptq4vit", 8, 8, images)(images[:4])
    assert (logits - expected).norm() <= 0.3 * expected.norm()


def test_labels_are_drawn_from_the_prediction() -> None:
    logits = torch.tensor([[0.7, 0.3], [0.2, 0.8], [1e-30, 1.0]]).log().repeat(1000, 1).requires_grad_()
    uniform = torch.rand(3000).tolist()
    (gradient,) = torch.autograd.grad(method._fisher_loss(logits, uniform), logits)
    drawn = (gradient[:, 0] < 0).reshape(1000, 3).float().mean(0)  # a drawn label's logit should grow
    assert drawn[:2].tolist() == pytest.approx([0.7, 0.2], abs=0.04)
    assert drawn[2] == 0


def test_an_output_without_spread_has_no_gradient() -> None:
    """Its placeholder of a variance would outweigh all other outputs a million times."""
    varied, constant = torch.randn(2, 5, requires_grad=True), torch.full((2, 3), 0.3, requires_grad=True)
    loss = method._fisher_loss([varied, constant], [])
    gradients = torch.autograd.grad(loss, [varied, constant], allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1] is None
    with pytest.raises(NotApplicableError, match="outputs that vary"):
        method._fisher_loss([constant, constant], [])


@pytest.mark.parametrize(
    ("options", "role"),
    [
        ({}, "fc2"),
        ({"act_layer": nn.SiLU}, "fc2"),
        ({"act_layer": nn.Tanh}, "hidden"),
        ({"mlp_layer": SwiGLUPacked}, "gated"),
    ],
    ids=["gelu", "silu", "tanh", "swiglu"],
)
def test_only_gelu_has_a_twin_quantizer(
    options: dict[str, Any], role: str, make_vit: MakeModel, make_images: MakeImages
) -> None:
    model, images = make_vit(**options), make_images(8)
    quantized = quantize(model, "ptq4vit", 8, 8, images, rounds=1)
    quantizers = [site.quantizer for site in sites_of(quantized) if site.role == role and not site.is_weight]
    assert {type(found) for found in quantizers} == {UniformQuantizer if options else TwinGeluQuantizer}
    with torch.no_grad():
        expected = model(images)
        assert (quantized(images) - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
def test_frozen_weights_change_nothing(make_vit: MakeModel, make_images: MakeImages) -> None:
    """The queries of attention pooling are not computed from images: their gradient goes back to biases alone."""
    model, images = make_vit(global_pool="map", depth=1), make_images(2)
    expected = quantize(model, "ptq4vit", 4, 4, images, rounds=1)(images)
    found = quantize(model.requires_grad_(False), "ptq4vit", 4, 4, images, rounds=1)
    assert torch.equal(found(images), expected)
    assert not any(parameter.requires_grad for parameter in found.parameters())
