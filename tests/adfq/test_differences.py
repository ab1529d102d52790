"""Models that compute something else are told apart, those that compute the same are not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from adfq.differences import first_difference
from adfq.quantizers import UniformQuantizer


class Doubling(nn.Dropout):
    """A dropout by name alone."""

    def forward(self, x: Any) -> Any:
        return 2 * x


def make(**changes: Any) -> Any:
    arguments: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
    return VisionTransformer(**{**arguments, "num_classes": 3, **changes}).eval()


@pytest.fixture(scope="module")
def original() -> Any:
    return make()


def scaled(factor: float) -> Callable[[Any], Any]:
    return lambda x: x * factor


def set_attributes(name: str, **values: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = model.get_submodule(name)
        for key, value in values.items():
            setattr(module, key, value)

    return change


def hook(model: Any) -> None:
    model.blocks[0].norm1.register_forward_hook(lambda *_: None)


def pre_hook(model: Any) -> None:
    model.blocks[0].register_forward_pre_hook(lambda *_: None)


def own_forward(model: Any) -> None:
    model.pos_drop.forward = MethodType(lambda self, x: x + 1, model.pos_drop)


def buffer(model: Any) -> None:
    model.norm.register_buffer("mask", torch.ones(2), persistent=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_attributes("blocks.0.mlp", act=nn.GELU("tanh")), r"blocks\.0\.mlp\.act becomes GELU.*'none'.*'tanh'"),
        (set_attributes("blocks.0.mlp", act=nn.ReLU()), r"blocks\.0\.mlp\.act becomes GELU\(.*\) in place of ReLU\(\)"),
        (set_attributes("norm", eps=0.5), r"norm becomes LayerNorm\(.*eps=1e-06.*eps=0\.5"),
        (set_attributes("", global_pool="avg"), r"the model\.global_pool becomes 'token' in place of 'avg'"),
        (set_attributes("", pool_include_prefix=True), r"pool_include_prefix becomes False in place of True"),
        (set_attributes("patch_embed", dynamic_img_pad=True), r"patch_embed\.dynamic_img_pad becomes False"),
        (set_attributes("blocks.0.attn", scale=0.1), r"blocks\.0\.attn\.scale becomes 0\.5"),
        (set_attributes("blocks.0.attn", extra=1), r"blocks\.0\.attn\.extra is missing"),
        (set_attributes("", norm_pre=nn.LayerNorm(8)), r"norm_pre becomes Identity\(\) in place of LayerNorm"),
        (set_attributes("", more=nn.Linear(2, 2)), r"more, a Linear, is missing"),
        (set_attributes("", head_drop=Doubling()), r"head_drop becomes Dropout\(.*\) in place of Doubling"),
        (hook, r"blocks\.0\.norm1 has a forward hook"),
        (pre_hook, r"blocks\.0 has a forward hook"),
        (own_forward, r"pos_drop\.forward is missing"),
        (buffer, r"norm\.mask is missing"),
    ],
)
def test_what_computes_otherwise_is_named(change: Callable[[Any], None], message: str, original: Any) -> None:
    other = copy.deepcopy(original)
    change(other)
    found = first_difference(other, original)
    assert found is not None
    assert re.search(message, found), found
    if "hook" not in message:  # those of the rebuilt model are nobody's
        assert first_difference(original, other) is not None


def test_the_order_of_a_sequence_counts(original: Any) -> None:
    one, two = make(depth=2), make(depth=2)
    assert first_difference(one, two) is None
    two.blocks._modules = dict(reversed(two.blocks._modules.items()))
    assert first_difference(one, two) == "blocks has its parts in another order"


@pytest.mark.parametrize(
    "change",
    [
        set_attributes("blocks.0", drop_path1=DropPath(0.3)),
        set_attributes("", head_drop=nn.Identity(), pos_drop=nn.Dropout(0.7)),
        set_attributes("", pretrained_cfg={"mean": 1}, feature_info=[], grad_checkpointing=True),
        set_attributes("patch_embed", img_size=[16, 16]),  # a list for a tuple
    ],
)
def test_what_computes_the_same_is_no_difference(change: Callable[[Any], None], original: Any) -> None:
    other = copy.deepcopy(original)
    change(other)
    with torch.no_grad():
        other.head.weight.add_(1)  # weights are not compared
    assert first_difference(original, other) is None
    assert first_difference(other, original) is None


@pytest.mark.parametrize(
    ("value", "same", "another"),
    [
        (scaled(2), scaled(2), scaled(3)),
        (partial(F.gelu, approximate="tanh"), partial(F.gelu, approximate="tanh"), partial(F.gelu)),
        (F.gelu, F.gelu, F.relu),
        (float("nan"), float("nan"), 0.0),
        (torch.ones(2), torch.ones(2), torch.zeros(2)),
        ({"a": [1, 2]}, {"a": (1, 2)}, {"a": [1]}),
        ([nn.GELU()], [nn.GELU()], [nn.GELU("tanh")]),
        (torch.float16, torch.float16, torch.float32),
        (True, True, None),
    ],
)
def test_values_of_attributes(value: Any, same: Any, another: Any, original: Any) -> None:
    one, two, three = (copy.copy(original) for _ in range(3))
    one.value, two.value, three.value = value, same, another
    assert first_difference(one, two) is None
    assert "the model.value becomes" in str(first_difference(one, three))


def test_a_quantizers_settings_count_and_notes_of_its_calibration_do_not() -> None:
    one, two, three = (nn.Sequential(UniformQuantizer(bits)) for bits in (4, 4, 5))
    one[0].register_buffer("_seen", torch.ones(1), persistent=False)
    assert first_difference(one, two) is None
    assert first_difference(one, three) is not None


def test_an_attribute_that_leads_back_to_the_model_ends(original: Any) -> None:
    one, two = copy.deepcopy(original), copy.deepcopy(original)
    for model in (one, two):
        model.blocks[0].whole = [model]
    assert first_difference(one, two) is None
