"""AdaLog against its released code, and what its reparameterizations must not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from adfq.adapters import adapt
from adfq.bits import Bits
from adfq.calibration import CalibrationImages
from adfq.layers import QuantWeightLayer
from adfq.method import Run
from adfq.quantizers import AdaLogQuantizer, UniformQuantizer
from adfq.sites import Network, Recipe, sites_of
from adfq.transforms.shift import fold_shift
from baselines.adalog import AdaLog

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]
LoadGolden = Callable[[str], dict[str, Tensor]]


def load_state(model: nn.Module, vectors: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict({key.removeprefix("state/"): v for key, v in vectors.items() if key.startswith("state/")})
    return model


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def put_in(network: Network, vectors: dict[str, Tensor], prefix: str) -> None:
    """Set quantizers, norms, weights and biases to those of a file."""
    for key, value in vectors.items():
        if not key.startswith(prefix):
            continue
        name, field = key.removeprefix(prefix).rsplit("/", 1)
        name = name.replace("matmul1", "scores").replace("matmul2", "context")
        module = network.model.get_submodule(name)
        if field in ("weight", "bias"):
            getattr(module, field).copy_(value)
            continue
        side, parameter = field.split("_", 1)
        quantizer = getattr(module, f"{side}_quantizer")
        if side == "weight":
            value = value.reshape(-1, *[1] * (module.weight.dim() - 1))
        elif value.numel() == 1:
            value = value.reshape(())
        setattr(quantizer, parameter, value.long() if parameter == "q" else value)


@pytest.mark.parametrize("bits", [3, 4, 6])
@torch.no_grad()
def test_golden_network_with_the_released_codes_parameters(
    bits: int, make_vit: MakeModel, load_golden: LoadGolden
) -> None:
    vectors = load_golden("adalog_e2e_vit_31.npz")
    model = load_state(make_vit(), base := load_golden("repq_e2e_vit_21.npz"))
    network = adapt(model)
    network.attach(AdaLog().recipe(Bits(bits, bits)))
    put_in(network, vectors, f"w{bits}a{bits}/")
    for _, layer in network.weight_layers():
        fold_shift(layer)
    assert distance(model(base["test"]), vectors[f"logits_w{bits}a{bits}"]) <= 2e-2


@pytest.mark.parametrize("bits", [pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(6, marks=pytest.mark.slow)])
@torch.no_grad()
def test_golden_error_with_its_own_search(bits: int, make_vit: MakeModel, load_golden: LoadGolden) -> None:
    vectors = load_golden("adalog_e2e_vit_31.npz")
    model = load_state(make_vit(), base := load_golden("repq_e2e_vit_21.npz"))
    quantized = adfq.quantize(model, "adalog", bits, bits, base["calib"], released_grid=True)
    errors = [distance(quantized(base[images]), model(base[images])) for images in ("test", "calib")]
    assert sum(errors) <= 1.1 * float(vectors[f"error_w{bits}a{bits}_calibrated"].sum())


@pytest.mark.slow
@torch.no_grad()
def test_golden_swin(make_swin: MakeModel, load_golden: LoadGolden) -> None:
    vectors = load_golden("adalog_e2e_swin_31.npz")
    model = load_state(make_swin(), base := load_golden("repq_e2e_swin_21.npz"))
    quantized = adfq.quantize(model, "adalog", 4, 4, base["calib"][:2])
    expected = distance(vectors["logits_w4a4"], vectors["fp_logits"])
    assert distance(quantized(base["test"]), vectors["fp_logits"]) <= 1.1 * expected


@pytest.fixture
def quantize_in_place() -> Callable[..., Network]:
    """Applies AdaLog with one round to a model at 4 bits."""

    def apply(model: nn.Module, images: Tensor, sizes: int = 99, **options: Any) -> Network:
        network = adapt(model)
        run = Run(CalibrationImages(images.split(sizes)))
        AdaLog(**({"rounds": 1} | options)).apply(network, run, Bits(4, 4))
        return network

    return apply


@pytest.mark.parametrize("family", ["vit", "swin"])
@torch.no_grad()
def test_the_quantizers_of_each_site(
    family: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages, quantize_in_place: Any
) -> None:
    model = make_vit(depth=1) if family == "vit" else make_swin(depths=(1, 1))
    network = quantize_in_place(model, make_images(2))
    for site in sites_of(network.model):
        quantizer = site.quantizer
        if site.is_weight:
            assert isinstance(quantizer, UniformQuantizer)
            assert quantizer.scale.numel() == len(site.operator.weight), site.name
        elif site.role == "patch_embed":
            assert quantizer is None
        elif site.role in ("probs", "fc2"):
            assert isinstance(quantizer, AdaLogQuantizer)
            assert quantizer.scale.shape == ()
            assert quantizer.folded == (site.role == "fc2")
        else:
            assert isinstance(quantizer, UniformQuantizer)
            assert quantizer.granularity == ("head" if site.role in ("query", "key", "value") else "tensor")
            assert (quantizer.zero_point == quantizer.zero_point.round()).all()
    layers = [layer for layer in network.model.modules() if isinstance(layer, QuantWeightLayer)]
    assert all(layer.bias is not None for layer in layers if layer.role in ("reduction", "fc2"))


@torch.no_grad()
def test_reparameterizations_leave_the_full_precision_function_as_it_was(
    make_swin: MakeModel, make_images: MakeImages
) -> None:
    model, images = make_swin(depths=(1, 1)), make_images(1)
    expected = model(images)
    network = adapt(model)
    kept = [(layer, layer.bias) for _, layer in network.weight_layers() if layer.role == "fc2"]
    AdaLog(rounds=1).apply(network, Run(CalibrationImages([images])), Bits(4, 4))
    for layer, bias in kept:
        assert not torch.equal(layer.bias, bias)
        layer.bias = bias
    network.attach(Recipe(activation=lambda: None, weight=lambda: None))
    torch.testing.assert_close(network.model(images), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_batches_give_what_one_batch_gives(
    make_vit: MakeModel, make_images: MakeImages, quantize_in_place: Any
) -> None:
    images = make_images(4)
    whole, parts = (quantize_in_place(make_vit(depth=1).double(), images.double(), size) for size in (4, 3))
    for (name, expected), found in zip(
        whole.activation_quantizers().items(), parts.activation_quantizers().values(), strict=True
    ):
        torch.testing.assert_close(found.scale, expected.scale, msg=name)


@torch.no_grad()
def test_another_activation_function_than_gelu_gets_a_uniform_quantizer(
    make_vit: MakeModel, make_images: MakeImages, quantize_in_place: Any
) -> None:
    network = quantize_in_place(make_vit(depth=1, act_layer=nn.SiLU), make_images(2))
    (quantizer,) = (q for name, q in network.activation_quantizers().items() if "fc2" in name)
    assert isinstance(quantizer, UniformQuantizer)


def test_a_saved_model_comes_back(tmp_path: Any, make_vit: MakeModel, make_images: MakeImages) -> None:
    images = make_images(2)
    quantized = adfq.quantize(make_vit(depth=1), AdaLog(rounds=1), 4, 4, images)
    adfq.save(quantized, tmp_path / "model.safetensors")
    loaded = adfq.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), quantized(images))
    with pytest.raises(AdfqError, match="cannot be exported"):
        adfq.export_onnx(quantized, tmp_path / "model.onnx")


@torch.no_grad()
def test_it_beats_plain_quantization(make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(depth=1), make_images(4)
    expected = model(images)
    ours, plain = (
        distance(adfq.quantize(model, method, 4, 4, images)(images), expected) for method in ("adalog", "base_ptq")
    )
    assert ours < 0.8 * plain


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 6])
@torch.no_grad()
def test_golden_error_after_reconstruction(bits: int, make_vit: MakeModel, load_golden: LoadGolden) -> None:
    vectors = load_golden("adalog_e2e_vit_31.npz")
    model = load_state(make_vit(), base := load_golden("repq_e2e_vit_21.npz"))
    method = AdaLog(reconstruct=True, iterations=300, optimize_batch_size=16, released_grid=True)
    errors = []
    for seed in range(3):  # other random numbers move an error by up to 20 %
        quantized = adfq.quantize(model, method, bits, bits, base["calib"], seed)
        errors += [distance(quantized(base[images]), model(base[images])) for images in ("test", "calib")]
    assert sum(errors) / 3 <= 1.15 * float(vectors[f"error_w{bits}a{bits}_blocks"].sum())


def test_reconstruction_has_exact_powers_only_while_it_lasts(
    make_vit: MakeModel, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    import baselines.adalog

    seen: list[bool] = []
    optimize = baselines.adalog.optimize_units

    def look(network: Network, *arguments: Any) -> Any:
        seen.extend(module.training_form for module in network.model.modules() if isinstance(module, AdaLogQuantizer))
        return optimize(network, *arguments)

    monkeypatch.setattr(baselines.adalog, "optimize_units", look)
    method = AdaLog(reconstruct=True, iterations=2, optimize_batch_size=4, rounds=1)
    quantized = adfq.quantize(make_vit(), method, 4, 4, make_images(4))
    found = [module for module in quantized.modules() if isinstance(module, AdaLogQuantizer)]
    assert len(seen) == len(found) > 0
    assert all(seen)
    assert not any(module.training_form for module in found)
    assert all(module.folded == bool(module.shift) for module in found)
    assert AdaLog().trained_iterations == 0
