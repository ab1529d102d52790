"""PTQ4ViT's search against brute force."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.adapters import adapt
from adfq.bits import Bits
from adfq.calibration import CalibrationImages
from adfq.layers import QuantConv2d, QuantLinear, QuantMatMul, QuantWeightLayer
from adfq.method import Run
from adfq.quantizers import TwinGeluQuantizer, UniformQuantizer
from adfq.sites import Network
from baselines.ptq4vit import PTQ4ViT

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
