"""Layers that compute something else than their type does are refused by name, or keep their function."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Linear as TimmLinear
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from adfq import AdfqError, quantize
from adfq.adapters import adapt
from adfq.layers import QuantConv2d, QuantLinear
from adfq.plain import check_plain

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]


class LoRALinear(nn.Linear):
    """Adds a low-rank part to a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.down, self.up = nn.Linear(linear.in_features, 2), nn.Linear(2, linear.out_features)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.up(self.down(input))


class Wrapped(nn.Module):
    """Shows a linear layer's parameters, but computes something else."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("linear",) else getattr(super().__getattr__("linear"), name)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().__getattr__("linear")(x)


class Computed(nn.Linear):
    """Computes its weight when it is read."""

    @property
    def weight(self) -> Tensor:
        return 2 * self._parameters["weight"]  # type: ignore[return-value, operator]

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        self.register_parameter("weight", value)


class Renamed(nn.Linear):
    """Computes what its base does."""


def hooked(linear: nn.Linear, before: bool) -> nn.Linear:
    if before:
        linear.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    else:
        linear.register_forward_hook(lambda _, __, output: 2 * output)
    return linear


def patched(linear: nn.Linear) -> nn.Linear:
    linear.forward = types.MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), linear)  # type: ignore[method-assign]
    return linear


def called(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = type("Called", (nn.Linear,), {"__call__": lambda self, x: 2 * nn.Linear.__call__(self, x)})
    return linear


def pruned(linear: nn.Linear) -> nn.Linear:
    prune.random_unstructured(linear, "weight", 0.5)
    return linear


def computed(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = Computed
    return linear


def old_weight_norm(linear: nn.Linear) -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weight_norm(linear)


OTHERS: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "LoRA": (LoRALinear, "a LoRALinear with a forward of its own"),
    "wrapper": (Wrapped, "a Wrapped in place of a Linear"),
    "pre-hook": (partial(hooked, before=True), "with forward hooks"),
    "hook": (partial(hooked, before=False), "with forward hooks"),
    "patched forward": (patched, "with a forward of its own"),
    "own call": (called, "with a forward of its own"),
    "pruning": (pruned, "weight is computed"),
    "weight norm": (parametrizations.weight_norm, "weight is computed"),
    "old weight norm": (old_weight_norm, "weight is computed"),
    "spectral norm": (parametrizations.spectral_norm, "weight is computed"),
    "old spectral norm": (spectral_norm, "weight is computed"),
    "property": (computed, "weight is computed"),
}
PLACES = ["blocks.1.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "blocks.0.mlp.fc2"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", OTHERS)
def test_a_layer_that_computes_something_else(kind: str, place: str, make_vit: MakeModel) -> None:
    change, says = OTHERS[kind]
    model = make_vit()
    layer = model.get_submodule(place)
    images = torch.randn(1, 3, 32, 32)
    before = model(images)
    model.set_submodule(place, change(layer))
    assert kind == "LoRA" or kind.endswith("weight norm") or not torch.equal(model(images), before)
    with pytest.raises(AdfqError, match=rf"^{place}: cannot quantize .*{says}.*; merge it into a plain Linear$"):
        adapt(model)


@pytest.mark.parametrize("place", ["blocks.0.attn", "layers.0.blocks.1.attn", "layers.0.blocks.1.attn.softmax"])
def test_hooks_of_what_is_replaced_around_layers(place: str, make_vit: MakeModel, make_swin: MakeModel) -> None:
    model = (make_vit if place.startswith("blocks") else make_swin)()
    model.get_submodule(place).register_forward_hook(lambda _, __, output: 2 * output)
    with pytest.raises(AdfqError, match=rf"^{place}: cannot quantize .* with forward hooks"):
        adapt(model)


def test_a_convolution_that_computes_something_else(make_vit: MakeModel) -> None:
    model = make_vit()
    model.get_submodule("patch_embed.proj").register_forward_hook(lambda _, __, output: 2 * output)
    with pytest.raises(AdfqError, match=r"^patch_embed\.proj: cannot quantize a Conv2d with forward hooks"):
        adapt(model)
    own = type("Own", (nn.Conv2d,), {"_conv_forward": lambda self, x, weight, bias: x})
    with pytest.raises(AdfqError, match="a Own with a forward of its own"):
        QuantConv2d(own(3, 4, 1), "conv")


@given(
    name=st.from_regex(r"[A-Z][a-z]{0,8}", fullmatch=True),
    depth=st.integers(0, 3),
    factor=st.floats(-2, 2),
    method=st.sampled_from(["forward", "__call__", "_call_impl", "__getattr__"]),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_subclass_with_a_forward_of_its_own_is_refused(name: str, depth: int, factor: float, method: str) -> None:
    def own(self: nn.Linear, *arguments: Any) -> Any:
        inherited = getattr(nn.Linear, method)(self, *arguments)
        return factor * inherited if isinstance(inherited, Tensor) else inherited

    cls: Any = type(name, (nn.Linear,), {method: own})
    for index in range(depth):
        cls = type(f"{name}{index}", (cls,), {})
    with pytest.raises(AdfqError, match=f"cannot quantize a {cls.__name__} with a forward of its own"):
        QuantLinear(cls(3, 2), "head")


@pytest.mark.parametrize("cls", [nn.Linear, Renamed, TimmLinear, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_subclasses_that_compute_the_same(cls: Callable[..., Any]) -> None:
    layer, x = cls(6, 5), torch.randn(2, 6)
    found = QuantLinear(layer, "head")
    assert torch.equal(found(x), layer(x))
    assert (found.in_features, found.out_features) == (6, 5)


def test_subclasses_of_mmcv_that_compute_the_same() -> None:
    wrappers = pytest.importorskip("mmcv.cnn.bricks.wrappers")
    check_plain(wrappers.Linear(3, 2), nn.Linear)
    check_plain(wrappers.Conv2d(3, 2, 1), nn.Conv2d)


# --- norms ----------------------------------------------------------------------------------------------------------


class Softened(nn.LayerNorm):
    """Computes something else than a LayerNorm of its weight and bias."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


class TwoReaders(Block):
    """Reads a norm's output twice."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn(normed) + normed
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


def soften(model: nn.Module) -> None:
    model.get_submodule("blocks.0.norm1").__class__ = Softened


def hook_norm(model: nn.Module) -> None:
    model.get_submodule("blocks.0.norm1").register_forward_hook(lambda _, __, output: output.tanh())


def share_norm(model: nn.Module) -> None:
    model.get_submodule("blocks.1").norm1 = model.get_submodule("blocks.0.norm1")


def tie_norms(model: nn.Module) -> None:
    model.get_submodule("blocks.1.norm1").weight = model.get_parameter("blocks.0.norm1.weight")


def tie_linears(model: nn.Module) -> None:
    model.get_submodule("blocks.1.mlp.fc1").weight = model.get_parameter("blocks.0.mlp.fc1.weight")


def share_mlp(model: nn.Module) -> None:
    model.get_submodule("blocks.1").mlp = model.get_submodule("blocks.0.mlp")


def hook_mlp(model: nn.Module) -> None:
    model.get_submodule("blocks.0.mlp").register_forward_pre_hook(lambda _, inputs: (inputs[0].tanh(),))


def read_twice(model: nn.Module) -> None:
    model.get_submodule("blocks.0").__class__ = TwoReaders


def patch_block(model: nn.Module) -> None:
    block: Any = model.get_submodule("blocks.0")
    block.forward = types.MethodType(TwoReaders.forward, block)


@pytest.mark.parametrize(
    "change",
    [soften, hook_norm, share_norm, tie_norms, tie_linears, share_mlp, hook_mlp, read_twice, patch_block],
)
@torch.no_grad()
def test_norms_are_folded_only_where_the_function_stays(
    change: Callable[[nn.Module], None], make_vit: MakeModel, make_images: MakeImages
) -> None:
    model, images = make_vit(), make_images(4)
    change(model)
    expected = model(images)
    quantized = quantize(model, "repq_vit", 8, 8, images)
    assert (quantized(images) - expected).norm() < 0.1 * expected.norm()
    assert not [name for name, module in quantized.named_modules() if isinstance(module, nn.Linear)]
