"""The way from a model to a quantized one, and ADFQ-ViT itself."""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST

from adfq import AdfqError, export_onnx, methods, quantize, registry, requantize, save
from adfq.adapters import adapt
from adfq.adfq_vit import ADFQViT
from adfq.bits import Bits
from adfq.calibration import CalibrationImages
from adfq.checkpoint import packed_size
from adfq.layers import QuantWeightLayer
from adfq.method import Method, Run
from adfq.quantizers import LogQuantizer, PerPatchOutlierQuantizer, Quantizer, ShiftLogQuantizer, UniformQuantizer
from adfq.sites import Network, Recipe, check_weights, sites_of

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]
Quick = Mapping[str, dict[str, Any]]

QUANTIZING = ["adfq_vit", "base_ptq", "repq_vit"]
every_method = pytest.mark.parametrize("method", ["full_precision", *QUANTIZING])
quantizing_methods = pytest.mark.parametrize("method", QUANTIZING)


@torch.no_grad()
def relative_error(model: nn.Module, reference: nn.Module, images: Tensor) -> float:
    expected = reference(images)
    return float((model(images) - expected).norm() / expected.norm())


# --- what holds of every method -------------------------------------------------------------------------------------


def test_methods_are_listed() -> None:
    assert methods()[0] == "full_precision"
    assert set(QUANTIZING) <= set(methods())
    assert len(set(methods())) == len(methods())


@every_method
def test_the_given_model_is_left_untouched(
    method: str, quick: Quick, make_vit: MakeModel, make_images: MakeImages
) -> None:
    model, images = make_vit().train(), make_images()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    expected = model(images)
    quantized = quantize(model, method, calibration=images, **quick[method])
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(model(images), expected)
    shared = {id(parameter) for parameter in model.parameters()} & {id(p) for p in quantized.parameters()}
    assert shared == set()
    assert all(parameter.requires_grad for parameter in model.parameters())


@every_method
def test_the_quantized_model_does_not_change_with_the_given_one_nor_the_other_way(
    method: str, quick: Quick, make_vit: MakeModel, make_images: MakeImages
) -> None:
    model, images = make_vit(), make_images()
    quantized, again = (quantize(model, method, calibration=images, **quick[method]) for _ in range(2))
    expected, state = quantized(images), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(quantized(images), expected)


@every_method
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_the_result_is_in_evaluation_mode(
    method: str, quick: Quick, family: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages
) -> None:
    model = make_vit() if family == "vit" else make_swin()
    quantized = quantize(model.train(), method, calibration=make_images(), **quick[method])
    assert [name for name, module in quantized.named_modules() if module.training] == []


@quantizing_methods
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_error_grows_as_bits_fall(
    method: str, quick: Quick, family: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages
) -> None:
    model = make_vit() if family == "vit" else make_swin()
    images, others = make_images(8), make_images(8, seed=2)
    errors = [
        relative_error(quantize(model, method, bits, bits, images, **quick[method]), model, others)
        for bits in (8, 6, 4, 2)
    ]
    # ADFQ-ViT's logarithm keeps its coarse top levels at 8 bits.
    assert errors[0] < (0.15 if method == "adfq_vit" else 0.1)
    assert errors == sorted(errors)
    assert errors[-1] > 0.5


@quantizing_methods
def test_weights_and_activations_have_their_own_bits(
    method: str, quick: Quick, make_vit: MakeModel, make_images: MakeImages
) -> None:
    model, images = make_vit(), make_images(8)
    few_weight, few_activation, many = (
        quantize(model, method, *bits, calibration=images, **quick[method]) for bits in ((3, 8), (8, 3), (8, 8))
    )
    layer = few_weight.get_submodule("blocks.0.attn.proj")
    assert max(len(row.unique()) for row in layer.weight) <= 8
    assert layer.input_quantizer.bits == 8
    layer = few_activation.get_submodule("blocks.0.attn.proj")
    assert min(len(row.unique()) for row in layer.weight) > 8
    assert layer.input_quantizer.bits == 3
    for worse in (few_weight, few_activation):
        assert relative_error(worse, model, images) > 1.5 * relative_error(many, model, images)


@quantizing_methods
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_every_site_is_quantized_and_weights_once_and_for_all(
    method: str, quick: Quick, family: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages
) -> None:
    model = make_vit() if family == "vit" else make_swin()
    quantized = quantize(model, method, 4, 4, make_images(), **quick[method])
    network = Network(quantized)
    layers = list(network.weight_layers())
    sites = len(layers) + 2 * len(list(network.matmuls()))
    assert len(list(network.activation_quantizers())) == sites
    for name, layer in layers:
        assert layer.frozen
        assert layer.learned_weight is None
        assert not layer.weight.requires_grad, name
        assert all(len(row.unique()) <= 16 for row in layer.weight.flatten(1)), name

    used: list[str] = []
    for name, module in quantized.named_modules():
        if isinstance(module, Quantizer):
            module.register_forward_hook(lambda module, inputs, output, name=name: used.append(name))
    quantized(make_images(seed=2))
    assert len(used) == len(set(used)) == sites
    assert not any(name.endswith("weight_quantizer") for name in used)


@quantizing_methods
def test_image_by_image_and_in_a_batch(method: str, quick: Quick, make_vit: MakeModel, make_images: MakeImages) -> None:
    options = quick[method] | ({"shift": "static"} if method == "adfq_vit" else {})
    quantized = quantize(make_vit(), method, 6, 6, make_images(8), **options)
    images = make_images(3, seed=2)
    with torch.no_grad():
        alone = torch.cat([quantized(image[None]) for image in images])
        # Sums in another order flip single codes; another image in the batch must change no more.
        assert float((quantized(images) - alone).norm() / alone.norm()) < 0.02


@quantizing_methods
def test_two_runs_give_the_same_bits(method: str, quick: Quick, make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(), make_images()
    first, second = (quantize(model, method, calibration=images, **quick[method]) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert torch.equal(first(images), second(images))


@quantizing_methods
def test_batches_are_calibrated_together(
    method: str, quick: Quick, make_vit: MakeModel, make_images: MakeImages
) -> None:
    model, images = make_vit(), make_images(6)
    whole = quantize(model, method, calibration=images, **quick[method])
    in_batches = quantize(model, method, calibration=[(batch, None) for batch in images.split(4)], **quick[method])
    assert torch.equal(whole(images), in_batches(images))


@quantizing_methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_models_in_half_precision(
    method: str,
    quick: Quick,
    dtype: torch.dtype,
    family: str,
    make_vit: MakeModel,
    make_swin: MakeModel,
    make_images: MakeImages,
) -> None:
    single = make_vit() if family == "vit" else make_swin()
    images = make_images(8)
    quantized = quantize(single, method, 6, 6, images, **quick[method])
    half = make_vit() if family == "vit" else make_swin()
    quantized_half = quantize(half.to(dtype), method, 6, 6, images, **quick[method])
    with torch.no_grad():
        logits = quantized_half(images.to(dtype))
        assert logits.dtype == dtype
        assert float((logits.float() - quantized(images)).norm() / quantized(images).norm()) < 0.25


@quantizing_methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantized_model_can_be_cast(
    method: str, quick: Quick, dtype: torch.dtype, make_vit: MakeModel, make_images: MakeImages
) -> None:
    images = make_images(8)
    quantized = quantize(make_vit(), method, 6, 6, images, **quick[method])
    with torch.no_grad():
        expected = quantized(images)
        logits = quantized.to(dtype)(images.to(dtype))
    assert logits.dtype == dtype
    assert float((logits.float() - expected).norm() / expected.norm()) < 0.25


def test_the_state_dict_of_a_quantized_model_restores_it(make_swin: MakeModel, make_images: MakeImages) -> None:
    images, others = make_images(), make_images(seed=2)
    original = quantize(make_swin(), calibration=images, iterations=0)
    copy = quantize(make_swin(window_size=4), calibration=others, iterations=0)
    assert not torch.equal(copy(others), original(others))
    copy.load_state_dict(original.state_dict())
    assert torch.equal(copy(others), original(others))


# --- random numbers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noisy(Method):
    label = "Noisy"

    amount: float = 1.0

    def recipe(self, bits: Bits) -> Recipe:
        return Recipe(activation=lambda: None, weight=lambda: None)

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        network.model.get_parameter("head.bias").data += self.amount * torch.randn(10)


class NoisyEntryPoint:
    """A method of somebody else's that draws random numbers."""

    name = "noisy"

    value = f"{__name__}:Noisy"

    def load(self) -> type[Method]:
        return Noisy


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> str:
    def entry_points(**selection: str) -> list[Any]:
        others = list(importlib.metadata.entry_points(**selection))
        return [*others, NoisyEntryPoint()] if selection.get("name") in (None, "noisy") else others

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return "noisy"


def test_another_packages_method_is_found(noisy: str, make_vit: MakeModel, make_images: MakeImages) -> None:
    assert noisy in methods()
    assert set(QUANTIZING) < set(methods())
    model = make_vit()
    unchanged = quantize(model, noisy, calibration=make_images(), amount=0.0)
    assert torch.equal(unchanged.head.bias, model.head.bias)
    with pytest.raises(AdfqError, match="no option 'strength'; it has amount"):
        quantize(model, noisy, calibration=make_images(), strength=2)


def test_the_seed_decides_what_is_drawn(noisy: str, make_vit: MakeModel, make_images: MakeImages) -> None:
    biases = [quantize(make_vit(), noisy, calibration=make_images(), seed=seed).head.bias for seed in (7, 7, 8)]
    assert torch.equal(biases[0], biases[1])
    assert not torch.allclose(biases[0], biases[2])


@pytest.mark.parametrize("method", ["noisy", *QUANTIZING])
def test_the_global_generators_are_left_as_they_were(
    method: str, quick: Quick, noisy: str, make_vit: MakeModel, make_images: MakeImages
) -> None:
    model, images = make_vit(), make_images()
    state, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    quantize(model, method, calibration=images, seed=3, **quick[method])
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpys)


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_an_unknown_method_lists_those_that_exist(make_vit: MakeModel, make_images: MakeImages) -> None:
    with pytest.raises(AdfqError, match="unknown method 'adfq'") as error:
        quantize(make_vit(), "adfq", calibration=make_images())
    assert all(name in str(error.value) for name in methods())


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("adfq_vit", "it has qkv_threshold, fc1_threshold, log_base, shift, patch_embed_bits"),
        ("base_ptq", "it has range"),
        ("repq_vit", "it has none"),
        ("full_precision", "it has none"),
    ],
)
def test_an_unknown_option_lists_those_that_exist(
    method: str, says: str, make_vit: MakeModel, make_images: MakeImages
) -> None:
    with pytest.raises(AdfqError, match=rf"method {method} has no option 'alpha'; {says}"):
        quantize(make_vit(), method, calibration=make_images(), alpha=5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weight_bits": 1}, "from 2 to 8, got 1"),
        ({"activation_bits": 9}, "from 2 to 8, got 9"),
        ({"weight_bits": "4"}, "from 2 to 8, got '4'"),
        ({"patch_embed_bits": 16}, "from 2 to 8, got 16"),
        ({"qkv_threshold": 0}, "threshold"),
        ({"log_base": 1}, "base"),
        ({"shift": "never"}, "dynamic, static"),
        ({"method": "base_ptq", "range": "entropy"}, "minmax, percentile, percentile9, percentile10, mse"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], says: str, make_vit: MakeModel, make_images: MakeImages) -> None:
    with pytest.raises(AdfqError, match=says):
        quantize(make_vit(), calibration=make_images(), **options)


@quantizing_methods
def test_calibration_images_are_needed(method: str, make_vit: MakeModel) -> None:
    with pytest.raises(AdfqError, match="calibration images are needed"):
        quantize(make_vit(), method)


@quantizing_methods
def test_activations_that_are_not_finite_name_their_site(
    method: str, quick: Quick, make_vit: MakeModel, make_images: MakeImages
) -> None:
    model = make_vit()
    model.get_submodule("blocks.1.norm1").bias.data[0] = float("inf")
    with pytest.raises(AdfqError, match=r"blocks\.1\.attn\.qkv\.input_quantizer: .*not finite"):
        quantize(model, method, calibration=make_images(), **quick[method])


def test_layers_without_a_rule_are_warned_of(make_vit: MakeModel, make_images: MakeImages) -> None:
    model = make_vit()
    model.decoder = nn.Sequential(nn.Linear(3, 2), nn.Conv2d(2, 2, 1))
    with pytest.warns(UserWarning, match=r"full precision: decoder\.0, decoder\.1") as caught:
        quantize(model, calibration=make_images(), iterations=0)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(make_vit(), calibration=make_images(), iterations=0)


@pytest.mark.parametrize(
    ("text", "weight", "activation", "printed"),
    [("W4A4", 4, 4, "W4/A4"), ("W4/A8", 4, 8, "W4/A8"), ("w6/a3", 6, 3, "W6/A3")],
)
def test_bits_are_read_and_written(text: str, weight: int, activation: int, printed: str) -> None:
    bits = Bits.parse(text)
    assert bits == Bits(weight, activation)
    assert str(bits) == printed
    assert Bits.parse(printed) == bits


@pytest.mark.parametrize("text", ["", "4", "W4", "A4W4", "W4A4 ", "W4A", "W4.0A4", "W-4A4", "W4A4A4"])
def test_bits_that_cannot_be_read(text: str) -> None:
    with pytest.raises(AdfqError, match="W4A4"):
        Bits.parse(text)


@pytest.mark.parametrize("text", ["W1A4", "W4A9", "W32A32", "W0A4"])
def test_bits_out_of_range(text: str) -> None:
    with pytest.raises(AdfqError, match="from 2 to 8"):
        Bits.parse(text)


# --- full precision -------------------------------------------------------------------------------------------------


def test_full_precision_is_a_copy(make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit().train(), make_images()
    same = quantize(model, "full_precision")
    assert same is not model
    assert torch.equal(same(images), model.eval()(images))
    same.head.weight.data.zero_()
    assert model.head.weight.abs().sum() > 0


def test_full_precision_takes_any_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    x = torch.randn(2, 3)
    assert torch.equal(quantize(model, "full_precision")(x), model(x))


# --- ADFQ-ViT -------------------------------------------------------------------------------------------------------


def test_adfq_vit_is_the_default(make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(), make_images()
    default = quantize(model, calibration=images, iterations=0)
    assert torch.equal(default(images), quantize(model, "adfq_vit", 4, 4, images, iterations=0)(images))


def test_adfq_vits_quantizers(make_swin: MakeModel, make_images: MakeImages) -> None:
    options = {"qkv_threshold": 1.5, "fc1_threshold": 2.5, "log_base": 2.0, "shift": "static", "patch_embed_bits": 7}
    quantized = quantize(make_swin(), "adfq_vit", 5, 3, make_images(), iterations=0, **options)
    found = {site.role: site.quantizer for site in sites_of(quantized) if not site.is_weight}
    kinds = {role: type(quantizer) for role, quantizer in found.items()}
    assert kinds == {
        **dict.fromkeys(("patch_embed", "proj", "head", "query", "key", "value"), UniformQuantizer),
        **dict.fromkeys(("qkv", "fc1", "reduction"), PerPatchOutlierQuantizer),
        "probs": LogQuantizer,
        "fc2": ShiftLogQuantizer,
    }
    assert {role: quantizer.bits for role, quantizer in found.items() if quantizer.bits != 3} == {"patch_embed": 7}
    assert [found[role].threshold for role in ("qkv", "reduction", "fc1")] == [1.5, 1.5, 2.5]
    assert (found["fc2"].base, found["fc2"].shift) == (2.0, "static")
    assert found["probs"].base == 2**0.5
    assert {found[role].range for role in ("query", "key", "value")} == {"mse"}
    assert {found[role].range for role in ("patch_embed", "proj", "head")} == {"percentile"}
    for layer in quantized.modules():
        if isinstance(layer, QuantWeightLayer):
            assert (layer.weight_quantizer.bits, layer.weight_quantizer.granularity) == (5, "row")


@pytest.mark.parametrize(
    "options", [{"qkv_threshold": 1.0}, {"fc1_threshold": 1.0}, {"log_base": 2.0}, {"patch_embed_bits": 3}]
)
def test_adfq_vits_options_have_an_effect(
    options: dict[str, Any], make_vit: MakeModel, make_images: MakeImages
) -> None:
    model, images = make_vit(), make_images()
    plain, changed = (quantize(model, calibration=images, iterations=0, **chosen) for chosen in ({}, options))
    assert relative_error(changed, plain, images) > 1e-3


def test_a_static_shift_is_the_dynamic_one_on_the_calibration_images(
    make_vit: MakeModel, make_images: MakeImages
) -> None:
    model, images, others = make_vit(), make_images(), make_images(seed=2)
    for block in model.get_submodule("blocks"):
        block.mlp.fc1.bias.data += 4.0  # beyond GELU's own minimum, which nearly every image reaches
    dynamic, static = (
        quantize(model, calibration=images, iterations=0, shift=shift) for shift in ("dynamic", "static")
    )
    assert torch.equal(dynamic(images), static(images))
    assert relative_error(static, dynamic, others) > 1e-3


def golden_vit(make_vit: MakeModel, vectors: dict[str, Tensor]) -> nn.Module:
    model = make_vit()
    model.load_state_dict({key.removeprefix("state/"): v for key, v in vectors.items() if key.startswith("state/")})
    torch.testing.assert_close(model(vectors["test"]), vectors["fp_logits"], rtol=1e-4, atol=1e-4)
    return model


@pytest.mark.parametrize("bits", [4, 6])
def test_golden_adfq_vit(bits: int, make_vit: MakeModel, load_golden: Callable[[str], dict[str, Tensor]]) -> None:
    shared, vectors = load_golden("repq_e2e_vit_21.npz"), load_golden("adfq_e2e_vit_21.npz")
    model = golden_vit(make_vit, shared)
    # The released code quantizes the input image like everything else.
    options = {"fc1_threshold": 2.5, "patch_embed_bits": bits}
    quantized = quantize(model, "adfq_vit", bits, bits, shared["calib"], iterations=0, **options)
    expected = vectors[f"logits_w{bits}a{bits}"]
    with torch.no_grad():
        error = (quantized(shared["test"]) - expected).norm() / expected.norm()
        assert error <= 2e-2
        # And nearer by far than quantization moved it.
        assert error < 0.5 * relative_error(quantized, model, shared["test"])


@pytest.mark.parametrize("bits", [4, 6])
def test_golden_adfq_vits_scales(
    bits: int, make_vit: MakeModel, load_golden: Callable[[str], dict[str, Tensor]]
) -> None:
    shared, vectors = load_golden("repq_e2e_vit_21.npz"), load_golden("adfq_e2e_vit_21.npz")
    network = adapt(golden_vit(make_vit, shared))
    method = ADFQViT(fc1_threshold=2.5, patch_embed_bits=bits, iterations=0)
    method.apply(network, Run(CalibrationImages([shared["calib"]])), Bits(bits, bits))
    compared = 0
    for name, layer in network.weight_layers():
        expected = vectors[f"w{bits}a{bits}/model.{name}/act_scale"]
        # Codes flipped in earlier layers move later scales a little.
        torch.testing.assert_close(layer.input_quantizer.scale, expected, rtol=2e-2, atol=0, msg=f"{name}: {{}}".format)
        compared += 1
    assert compared == 10


# --- a trained model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@quantizing_methods
def test_a_trained_model_keeps_its_accuracy(method: str, quick: Quick, real_data: Path) -> None:
    folder = real_data / "fashion_mnist"
    model = timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10},
        **{"embed_dim": 128, "depth": 6, "num_heads": 4, "mlp_ratio": 2},
        norm_layer=nn.LayerNorm,
    )
    model.load_state_dict(torch.load(folder / "vit_d128_L6_h4_p4_timm.pth", weights_only=True))
    model.eval()

    train, test = (FashionMNIST(str(folder), train=train) for train in (True, False))
    calibration = train.data[:32, None] / 127.5 - 1
    images, labels = test.data[:500, None] / 127.5 - 1, test.targets[:500]

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        return float((model(images).argmax(1) == labels).float().mean())

    full = accuracy(model)
    assert full > 0.88
    assert accuracy(quantize(model, method, 8, 8, calibration, **quick[method])) > full - 0.015
    assert accuracy(quantize(model, method, 4, 4, calibration, **quick[method])) > full - 0.05
    assert accuracy(quantize(model, method, 2, 2, calibration, **quick[method])) < full - 0.15


# --- the caller's modes ---------------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize(
    ("method", "options"),
    [("ptq4vit", {"rounds": 1}), ("adfq_vit", {"iterations": 2, "optimize_batch_size": 2})],
)
def test_the_callers_modes_change_nothing(
    method: str, options: dict[str, Any], make_vit: MakeModel, make_images: MakeImages
) -> None:
    model, images = make_vit(depth=1), make_images(2)
    expected = quantize(model, method, 4, 4, images, **options).state_dict()
    for mode, entered in MODES.items():
        with entered():
            found = quantize(model, method, 4, 4, images, **options)
        for name, tensor in found.state_dict().items():
            assert not tensor.is_inference(), (mode, name)
            assert torch.equal(tensor, expected[name]), (mode, name)
        found(images.clone().requires_grad_()).sum().backward()


def test_a_model_and_images_made_in_inference_mode(make_vit: MakeModel, make_images: MakeImages) -> None:
    with torch.inference_mode():
        model, images = make_vit(depth=1), make_images(4)
        found = quantize(model, "adfq_vit", 4, 4, images, iterations=1)
    found(make_images(2).requires_grad_()).sum().backward()
    assert not any(tensor.is_inference() for tensor in found.state_dict().values())


@pytest.mark.parametrize("method", [*QUANTIZING, "ptq4vit"])
def test_an_empty_batch_gives_an_empty_output(
    method: str, make_vit: MakeModel, make_images: MakeImages, quick: Mapping[str, dict[str, Any]]
) -> None:
    quantized = quantize(make_vit(depth=1), method, 4, 4, make_images(2), **quick[method])
    assert quantized(make_images(0)).shape == (0, 10)


# --- weights that change after quantization -------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*QUANTIZING, "ptq4vit"])
@pytest.mark.parametrize("bits", [2, 8])
def test_trained_weights_are_told_from_quantized_ones(
    method: str, bits: int, make_vit: MakeModel, make_images: MakeImages, quick: Mapping[str, dict[str, Any]]
) -> None:
    quantized = quantize(make_vit(depth=1), method, bits, bits, make_images(2), **quick[method])
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        check_weights(copy.deepcopy(quantized).to(dtype))
    check_weights(quantized)
    layer = quantized.get_submodule("blocks.0.attn.qkv")
    before = layer.weight.clone()
    layer.weight.requires_grad_(True)
    torch.optim.SGD([layer.weight], 1e-6).step(lambda: quantized(make_images(2)).square().sum().backward())
    assert not torch.equal(layer.weight, before)
    with pytest.raises(AdfqError, match=r"blocks\.0\.attn\.qkv\.weight was changed after quantization"):
        check_weights(quantized)
    assert torch.equal(requantize(quantized).get_parameter("blocks.0.attn.qkv.weight"), before)  # the steps were small
    check_weights(quantized)


def test_nothing_is_written_of_trained_weights(make_vit: MakeModel, make_images: MakeImages, tmp_path: Path) -> None:
    quantized = quantize(make_vit(depth=1), "base_ptq", 8, 8, make_images(2))
    quantized.get_parameter("head.weight").data.mul_(1.01)
    for write in (save, export_onnx):
        with pytest.raises(AdfqError, match=r"head\.weight was changed after quantization"):
            write(quantized, tmp_path / "file")
    with pytest.raises(AdfqError, match=r"head\.weight was changed after quantization"):
        packed_size(quantized)
    assert not list(tmp_path.iterdir())
    with pytest.raises(AdfqError, match="only a model that"):
        requantize(make_vit())
