"""PTQ4ViT: the search against brute force, and the whole against its released code's results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import SwiGLUPacked
from torch import Tensor, nn
from torch.nn import functional as F

from adfq import AdfqError, NotApplicableError, quantize
from adfq.adapters import adapt
from adfq.bits import Bits
from adfq.calibration import CalibrationImages
from adfq.layers import QuantConv2d, QuantLinear, QuantMatMul, QuantWeightLayer
from adfq.method import Run
from adfq.quantizers import Quantizer, TwinGeluQuantizer, TwinSoftmaxQuantizer, UniformQuantizer
from adfq.sites import Network, sites_of
from baselines import ptq4vit as method
from baselines.ptq4vit import PTQ4ViT, sample_rows

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]
Layer = QuantWeightLayer | QuantMatMul


class Captured:
    """Inputs, output and gradient at the output of a layer, over all batches."""

    def __init__(self) -> None:
        self.inputs: list[tuple[Tensor, ...]] = []
        self.outputs: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def hook(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs.append(tuple(x.detach().clone() for x in inputs))
        self.outputs.append(output.detach().clone())
        if output.requires_grad:
            output.register_hook(lambda gradient: self.gradients.append(gradient.clone()))

    def all(self) -> tuple[list[Tensor], Tensor, Tensor]:
        inputs = [torch.cat(parts) for parts in zip(*self.inputs, strict=True)]
        output = torch.cat(self.outputs)
        return inputs, output, torch.cat(self.gradients) if self.gradients else torch.ones_like(output)


@contextmanager
def capturing(network: Network) -> Iterator[dict[str, tuple[Layer, Captured]]]:
    """Looks on while the method runs the model."""
    found: dict[str, tuple[Layer, Captured]] = {
        name: (layer, Captured()) for name, layer in [*network.weight_layers(), *network.matmuls()]
    }
    hooks = [layer.register_forward_hook(captured.hook) for layer, captured in found.values()]
    yield found
    for hook in hooks:
        hook.remove()


# --- the search by brute force --------------------------------------------------------------------------------------

FACTORS = [0.01 + i * 0.0119 for i in range(100)]


def symmetric(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return (x / scale).round().clamp(-half, half - 1) * scale


def twin_gelu(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    fixed = 0.16997124254703522 / half
    return (x / scale).round().clamp(0, half - 1) * scale + (x / fixed).round().clamp(-half, 0) * fixed


def twin_softmax(x: Tensor, split: Tensor, bits: int) -> Tensor:
    steps = 2 ** (bits - 1) - 1
    fine = (x.clamp(torch.zeros(()), split) / (split / steps)).round() * (split / steps)
    coarse = (x.clamp(split, torch.ones(())) * steps).round() / steps
    return torch.where(x <= split, fine, coarse.clamp(min=split))


def brute_force(layer: Layer, captured: Captured, bits: int, rounds: int) -> tuple[Tensor, Tensor | None]:
    """The method as its formulas say: weight (or left) scales by group, then input (or right) scale or split."""
    inputs, output, gradient = captured.all()
    half = 2 ** (bits - 1)

    def score(*operands: Tensor) -> Tensor:
        if isinstance(layer, QuantMatMul):
            result = operands[0] @ (operands[1].mT if layer.transpose_right else operands[1])
        else:
            result = layer._apply_weight(operands[1], operands[0])
        return ((result - output) * gradient).square()

    def whole(values: Tensor) -> Tensor:
        return values.abs().max() / (half - 0.5)

    if isinstance(layer, QuantMatMul):
        left, right = inputs
        is_probs = layer.roles[0] == "probs"
        quantize_left = twin_softmax if is_probs else symmetric
        left_candidates = [torch.tensor(2.0**-i) for i in range(20)] if is_probs else None
        left_candidates = left_candidates or [whole(left) * factor for factor in FACTORS]
        right_candidates = [whole(right) * factor for factor in FACTORS]
        left_scale, right_scale = torch.ones(()), whole(right)
        for _ in range(rounds):
            fixed = symmetric(right, right_scale, bits)
            left_scale = min(left_candidates, key=lambda s: float(score(quantize_left(left, s, bits), fixed).sum()))
            fixed = quantize_left(left, left_scale, bits)
            right_scale = min(right_candidates, key=lambda s: float(score(fixed, symmetric(right, s, bits)).sum()))
        return left_scale / (half - 1 if is_probs else 1), right_scale

    (x,), weight = inputs, layer.weight.detach()
    groups = {"qkv": 3, "patch_embed": len(weight)}.get(layer.role, 1)
    shape = (-1, *[1] * (weight.dim() - 1))
    channels = 1 if isinstance(layer, QuantConv2d) else -1  # the output's dimension
    quantize_input = twin_gelu if layer.role == "fc2" else symmetric
    largest = torch.stack([whole(part) for part in weight.chunk(groups)])
    per_row = len(weight) // groups
    input_scale, weight_scale = whole(x), largest
    for _ in range(rounds):
        fixed = x if layer.role == "patch_embed" else quantize_input(x, input_scale, bits)
        scores = []
        for factor in FACTORS:
            quantized = symmetric(weight, (largest * factor).repeat_interleave(per_row).reshape(shape), bits)
            errors = score(quantized, fixed).movedim(channels, 0).flatten(1).sum(1)
            scores.append(errors.reshape(groups, -1).sum(1))
        weight_scale = largest * torch.tensor(FACTORS)[torch.stack(scores).argmin(0)]
        if layer.role == "patch_embed":
            return weight_scale, None
        fixed = symmetric(weight, weight_scale.repeat_interleave(per_row).reshape(shape), bits)
        candidates = [whole(x) * factor for factor in FACTORS]
        input_scale = min(candidates, key=lambda s: float(score(fixed, quantize_input(x, s, bits)).sum()))
    return weight_scale, input_scale


class OneLayer(nn.Module):
    """Images B×1×H×W, one quantizable operation, and logits from it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.to_logits = nn.Parameter(torch.randn(100, 5))
        if kind == "conv":
            conv = nn.Conv2d(1, 4, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2))
            self.layer: nn.Module = QuantConv2d(conv, "patch_embed")
        elif kind == "grouped":
            self.layer = QuantConv2d(nn.Conv2d(4, 6, 3, padding=(1, 0), groups=2, bias=False), "neck")
        elif kind in ("scores", "context"):
            roles = ("query", "key") if kind == "scores" else ("probs", "value")
            self.layer = QuantMatMul(roles, transpose_right=kind == "scores")
        else:
            self.layer = QuantLinear(nn.Linear(6, 9), kind)
        nn.init.normal_(self.to_logits)

    def forward(self, images: Tensor) -> Tensor:
        x = images[:, 0]
        if self.kind == "conv":
            output = self.layer(images)
        elif self.kind == "grouped":
            output = self.layer(torch.cat([images, images.flip(2), 3 * images, images.flip(3)], 1))
        elif self.kind == "scores":  # two heads
            output = self.layer(torch.stack([x, -2 * x], 1), torch.stack([x.flip(1), x], 1))
        elif self.kind == "context":
            output = self.layer((2 * x @ x.mT).softmax(-1), x)
        else:
            output = self.layer(F.gelu(2 * x) if self.kind == "fc2" else x)
        flat = output.flatten(1)
        return flat @ self.to_logits.repeat(20, 1)[: flat.shape[1]]


@pytest.mark.parametrize("search", ["hessian", "mse"])
@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("kind", ["qkv", "fc2", "proj", "conv", "grouped", "scores", "context"])
def test_the_search_finds_what_brute_force_finds(kind: str, bits: int, search: str) -> None:
    network = Network(OneLayer(kind))
    with capturing(network) as captured:
        PTQ4ViT(search=search, rounds=2, gradient_batch_size=3).apply(
            network, Run(CalibrationImages([torch.randn(5, 1, 7, 6)])), Bits(bits, bits)
        )
    ((layer, seen),) = captured.values()
    assert bool(seen.gradients) == (search == "hessian")
    with torch.no_grad():
        first, second = brute_force(layer, seen, bits, rounds=2)
    if isinstance(layer, QuantMatMul):
        found, other = layer.left_quantizer.scale, layer.right_quantizer.scale
    else:
        found, other = layer.weight_quantizer.scale, getattr(layer.input_quantizer, "scale", None)
        if found.numel() > 1:
            found = found.flatten()[:: found.numel() // len(first)]
    torch.testing.assert_close(found.reshape(first.shape if first.numel() > 1 else ()), first.squeeze())
    if second is None:
        assert isinstance(layer.input_quantizer, nn.Identity)
    else:
        torch.testing.assert_close(other, second)


@pytest.mark.parametrize(("search", "bits"), [("hessian", 4), ("mse", 6)])
@torch.no_grad()
def test_a_sample_finds_scales_that_are_nearly_the_best_on_everything(
    search: str, bits: int, make_vit: MakeModel, make_images: MakeImages
) -> None:
    """Either scale, given the other; the one that was searched first has seen the other's last but one."""
    network = adapt(make_vit(depth=1, patch_size=4))
    with capturing(network) as captured:
        PTQ4ViT(search=search).apply(network, Run(CalibrationImages([make_images(40)])), Bits(bits, bits))
    for name, (layer, seen) in captured.items():
        inputs, output, gradient = seen.all()
        if isinstance(layer, QuantMatMul):
            sides = list(zip((layer.left_quantizer, layer.right_quantizer), inputs, strict=True))
        else:
            sides = [(layer.weight_quantizer, layer.weight), (layer.input_quantizer, *inputs)]
        for quantizer, values in sides:
            # Where one scale serves all; the split has candidates of its own.
            if not isinstance(quantizer, (UniformQuantizer, TwinGeluQuantizer)) or quantizer.scale.numel() > 1:
                continue
            chosen, scores = quantizer.scale, []
            for scale in [chosen, *(values.abs().max() / (2 ** (bits - 1) - 0.5) * factor for factor in FACTORS)]:
                quantizer.scale = scale
                scores.append(float(((layer(*inputs) - output) * gradient).square().sum()))
            quantizer.scale = chosen
            assert scores[0] <= 1.05 * min(scores), name


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 6},
    "depthwise, strided": {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 6, "bias": False},
    "groups": {"kernel_size": (3, 2), "padding": (2, 0), "stride": (1, 3), "dilation": (2, 1), "groups": 2},
    "as large as the input": {"kernel_size": 4, "padding": "same", "dilation": 2, "groups": 3},
    "no groups": {"kernel_size": 3, "padding": 1, "bias": False},
}


@pytest.mark.parametrize("size", [4, 24])  # all positions, and a sample of them
@pytest.mark.parametrize("which", CONVOLUTIONS)
@torch.no_grad()
def test_the_products_of_a_convolution_are_its_output(which: str, size: int) -> None:
    layer = QuantConv2d(nn.Conv2d(6, 12, **CONVOLUTIONS[which]), "neck")
    observer = method._Observer("layer", layer, batches=2, weighted=True)
    outputs = []
    for count in (3, 1):
        images = torch.randn(count, 6, size, size)
        outputs.append(layer._apply_weight(images, layer.weight))
        if layer.bias is not None:
            outputs[-1] -= layer.bias[:, None, None]
        observer.keep((images,), torch.randn_like(outputs[-1]))
    expected = torch.cat([output.movedim(1, -1).flatten(0, 2) for output in outputs])
    product = observer.product((16, 8))
    assert product.target.shape[:2] == (layer.groups, 12 // layer.groups)
    found = product.target.flatten(0, 1).mT
    if len(expected) <= 128:
        torch.testing.assert_close(found, expected)
    else:
        assert len(found) == 128
        torch.testing.assert_close(found, expected[torch.cdist(found, expected).argmin(1)])
        assert len(found.unique(dim=0)) > 100


def test_sampled_scores_are_unbiased() -> None:
    x, gradient, error = torch.randn(6, 40, 5), torch.randn(6, 40, 8).pow(3), torch.rand(6, 40, 8)
    gradient[2] = 0
    expected = (gradient * error).square().sum()
    estimates = []
    for _ in range(300):
        which, rows, weights = sample_rows(x.square().sum(-1), gradient, 3, 10)
        assert which.shape == (3,)
        assert rows.shape == weights.shape == (3, 10)
        assert 2 not in which
        kept = which[:, None], rows
        estimates.append(((gradient * error)[kept].square().sum(-1) * weights).sum())
    assert torch.stack(estimates).mean() == pytest.approx(float(expected), rel=0.05)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(tokens=st.integers(2, 64), images=st.integers(2, 16), rows=st.integers(8, 64), seed=st.integers(0, 10**6))
def test_rows_are_drawn_from_all_tokens_and_images(tokens: int, images: int, rows: int, seed: int) -> None:
    """Between neighbouring draws lies a multiple of an image's tokens; all rows are alike."""
    torch.manual_seed(seed)
    total = tokens * images * rows
    distinct = 0
    for _ in range(40):
        _, chosen, weights = sample_rows(torch.ones(1, total), torch.ones(1, total, 1), 1, rows)
        assert (chosen.diff() >= 0).all()
        torch.testing.assert_close(weights.sum(), torch.tensor(float(total)), rtol=1e-4, atol=0)
        shares = chosen[0] // (tokens * images)
        assert shares.tolist() == list(range(rows))
        distinct += len((chosen[0] % tokens).unique())
    assert distinct > 40 * 1.5


def test_small_layers_are_not_sampled() -> None:
    which, rows, weights = sample_rows(torch.rand(3, 5), torch.randn(3, 5, 2), 3, 8)
    assert which.tolist() == [0, 1, 2]
    assert rows.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert (weights == 1).all()


# --- the method -----------------------------------------------------------------------------------------------------


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
    """In quality, not value: the released code's gradient is rounding noise."""
    vectors = load_golden("repq_e2e_vit_21.npz")
    reference = load_golden("ptq4vit_e2e_vit_21.npz")[f"logits_w{bits}a{bits}"]
    model = make_vit()
    model.load_state_dict({key.removeprefix("state/"): v for key, v in vectors.items() if key.startswith("state/")})
    expected = vectors["fp_logits"]
    logits = quantize(model, "ptq4vit", bits, bits, vectors["calib"], released=released)(vectors["test"])
    assert (logits - expected).norm() <= 1.25 * (reference - expected).norm()


@pytest.mark.slow
@torch.no_grad()
def test_deit_tiny_at_full_size(randomize: Callable[[nn.Module], nn.Module]) -> None:
    model, images = randomize(timm.create_model("deit_tiny_patch16_224")), torch.randn(32, 3, 224, 224)
    expected = model(images[:4])
    logits = quantize(model, "ptq4vit", 8, 8, images)(images[:4])
    assert (logits - expected).norm() <= 0.3 * expected.norm()


def test_an_output_without_spread_has_no_gradient() -> None:
    """Its placeholder of a variance would outweigh all other outputs a million times."""
    varied, constant = torch.randn(2, 5, requires_grad=True), torch.full((2, 3), 0.3, requires_grad=True)
    loss = method._fisher_loss([varied, constant])
    gradients = torch.autograd.grad(loss, [varied, constant], allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1] is None
    with pytest.raises(NotApplicableError, match="outputs that vary"):
        method._fisher_loss([constant])


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
