"""Rotated networks compute the same in full precision, or stay as they are with a reason."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.layers import SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import LayerScale, ParallelThingsBlock, VisionTransformer
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from adfq.adapters import adapt
from adfq.method import Run
from adfq.sites import Network
from adfq.transforms.heads import rotate_heads
from adfq.transforms.orthogonal import mean_keeping_rotation, random_rotation
from adfq.transforms.rotation import rotate
from adfq.transforms.streams import mapped_norms, rotate_stream
from baselines.repq_vit import RepQViT

_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
_SWIN = {"img_size": 16, "patch_size": 2, "embed_dim": 12, "depths": (1, 2), "num_heads": (2, 3), "num_classes": 7}


def vit(cls: type[VisionTransformer] = VisionTransformer, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: cls(**(_VIT | changes))


def swin(**changes: Any) -> Callable[[], nn.Module]:
    return lambda: SwinTransformer(**(_SWIN | {"window_size": 4} | changes))


def sam(**changes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from segment_anything.modeling import ImageEncoderViT

        shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "out_chans": 8}
        norm = partial(nn.LayerNorm, eps=1e-6)
        windows = {"use_rel_pos": True, "window_size": 3, "global_attn_indexes": (1,)}
        return ImageEncoderViT(**(shape | windows | changes), norm_layer=norm)

    return make


#: Model, and the number of its streams that are rotated.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ViT": (vit(), 1),
    "ViT, mean pooling": (vit(global_pool="avg"), 1),
    "ViT, no biases": (vit(qkv_bias=False, proj_bias=False), 1),
    "ViT, maximum": (vit(global_pool="max", fc_norm=False, class_token=False), 1),
    "ViT, attention pooling": (vit(global_pool="map"), 1),
    "ViT, features": (vit(num_classes=0, embed_dim=36), 1),
    "DeiT, distilled": (vit(VisionTransformerDistilled), 1),
    "DINOv2": (vit(num_classes=0, init_values=1e-5, reg_tokens=3, no_embed_class=True), 1),
    "DINOv2, SwiGLU": (vit(init_values=1.0, mlp_layer=SwiGLU, dynamic_img_size=True), 1),
    "ViT, norms of queries": (vit(qk_norm=True, scale_attn_norm=True), 1),
    "Swin": (swin(), 1),
    "Swin, features": (swin(num_classes=0, depths=(1, 1, 1), num_heads=(2, 3, 4), img_size=32), 2),
    "SAM": (sam(), 1),
    "SAM, bare": (sam(use_abs_pos=False, use_rel_pos=False, window_size=0), 1),
}


def randomized(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Nothing at its neutral value, and a few channels of the stream 30 times larger than the others."""
    torch.manual_seed(seed)
    model = make().eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data = (0.5 * torch.randn_like(module.weight)).exp() * (torch.rand_like(module.weight) + 0.2)
            module.bias.data = 0.3 * torch.randn_like(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.data = torch.randn_like(module.weight) / math.sqrt(module.weight[0].numel())
            if module.bias is not None:
                module.bias.data = 0.3 * torch.randn_like(module.bias)
            if name.endswith(("proj", "fc2", "lin2", "reduction")):
                module.weight.data[:3] *= 30
        elif isinstance(module, LayerScale):
            module.gamma.data = 0.5 * torch.randn_like(module.gamma)
    for name, parameter in model.named_parameters():
        if name.endswith(("token", "pos_embed")):
            parameter.data.normal_().add_(0.5)
        elif "rel_pos" in name or "relative_position" in name:
            parameter.data.normal_()
    return model


def images_for(model: nn.Module, count: int = 2) -> Tensor:
    side: Any = getattr(model, "img_size", None) or model.patch_embed.img_size[0]  # type: ignore[union-attr, index]
    return torch.randn(count, 3, side, side)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def rotated(model: nn.Module, **options: bool) -> tuple[Network, dict[str, str]]:
    network = adapt(copy.deepcopy(model))
    return network, rotate(network, **options)


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 2**20))
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_output_stays(family: str, seed: int) -> None:
    if family.startswith("SAM"):
        pytest.importorskip("segment_anything")
    make, streams = FAMILIES[family]
    model = randomized(make, seed)
    images = images_for(model)
    with torch.no_grad():
        wanted = model.double()(images.double())
        model.float()
        for centre in (False, True):
            network, _ = rotated(model, centre=centre)
            assert len(network.streams) == streams
            assert relative_error(network.model(images), wanted) < 1e-5
            network, _ = rotated(model.double(), centre=centre)
            assert relative_error(network.model(images.double()), wanted) < 1e-12
            model.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_is_rotated_and_norms_are_bare(family: str) -> None:
    if family.startswith("SAM"):
        pytest.importorskip("segment_anything")
    model = randomized(FAMILIES[family][0], 1).double()
    images, found, wanted = images_for(model).double(), list[Tensor](), list[Tensor]()
    network = adapt(copy.deepcopy(model))
    stream = network.streams[-1]
    rotation = mean_keeping_rotation(stream.width)
    rotate_stream(network, stream, rotation, centre=False)
    last = [norm for norm in stream.norms if norm.endswith("norm2")][-1]  # reads the sum of all writers but one
    norms = [(network.model, found), (adapt(copy.deepcopy(model)).model, wanted)]
    for changed, kept in norms:
        hook = lambda _, inputs, kept=kept: kept.append(inputs[0])  # noqa: E731
        changed.get_submodule(last).register_forward_pre_hook(hook)
        with torch.no_grad():
            changed(images)
    torch.testing.assert_close(found[0], wanted[0] @ rotation, rtol=1e-9, atol=1e-9)
    for name in stream.norms:
        norm = network.model.get_submodule(name)
        norm = norm if isinstance(norm, nn.LayerNorm) else norm.norm
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
    for scale in filter(None, stream.writers.values()):
        assert (network.model.get_parameter(scale) == 1).all()


def test_a_centred_stream_has_no_mean() -> None:
    network, _ = rotated(randomized(FAMILIES["DINOv2"][0], 2).double(), centre=True)
    seen: list[Tensor] = []
    network.model.get_submodule("blocks.1").register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        network.model(images_for(network.model).double())
    assert seen[0].mean(-1).abs().amax() < 1e-10 * seen[0].abs().amax()


@pytest.mark.parametrize(
    ("family", "heads"), [("ViT", True), ("Swin", True), ("SAM", True), ("ViT, norms of queries", False)]
)
def test_queries_keys_and_values_are_rotated(family: str, heads: bool) -> None:
    if family.startswith("SAM"):
        pytest.importorskip("segment_anything")
    model = randomized(FAMILIES[family][0], 3)
    network, left = rotated(model, streams=False)
    for attention in network.heads:
        original = model.get_submodule(attention.qkv)
        same = [
            torch.allclose(*parts)
            for parts in zip(
                network.model.get_submodule(attention.qkv).weight.chunk(3), original.weight.chunk(3), strict=True
            )
        ]
        assert same == [not heads] * 3
        assert (attention.name in left) == (not heads)


@pytest.mark.parametrize("family", ["DINOv2", "Swin", "DeiT, distilled"])
def test_a_saved_model_loads_to_the_same_bits(family: str, tmp_path: Path) -> None:
    class Rotated(RepQViT):
        def apply(self, network: Network, run: Run, bits: adfq.bits.Bits) -> None:
            rotate(network)
            super().apply(network, run, bits)

    model = randomized(FAMILIES[family][0], 4)
    images = images_for(model)
    quantized = adfq.quantize(model, Rotated(), 4, 4, images)
    adfq.save(quantized, tmp_path / "model.safetensors")
    loaded = adfq.load(tmp_path / "model.safetensors")
    assert mapped_norms(loaded) == mapped_norms(quantized) == (["norm"] if family == "DINOv2" else [])
    with torch.no_grad():
        assert torch.equal(loaded(images), quantized(images))


class _OwnPool(VisionTransformer):
    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return x[:, 1]


@pytest.mark.parametrize(
    ("make", "part", "reason"),
    [
        (vit(pre_norm=True), "blocks", "begins with a norm"),
        (vit(block_fn=ParallelThingsBlock), "blocks", "blocks.0 is a ParallelThingsBlock"),
        (vit(global_pool="max", class_token=False), "blocks", "read without a norm"),
        (vit(_OwnPool), "blocks", "_OwnPool"),
        (swin(), "layers.0", "output of a LayerNorm"),
        (swin(img_size=24, always_partition=True), "layers.1", "padded with zeros"),
        (swin(strict_img_size=False), "layers.1", "any size"),
    ],
)
def test_what_cannot_be_rotated_stays_with_a_reason(make: Callable[[], nn.Module], part: str, reason: str) -> None:
    model = randomized(make, 5)
    network, left = rotated(model, heads=False)
    assert reason in left[part]
    images = images_for(model)
    with torch.no_grad():
        assert relative_error(network.model(images), model(images)) < 1e-5


def test_shared_parameters_hooks_and_paddings_of_no_weight_are_reasons() -> None:
    model: Any = randomized(vit(), 6)
    model.blocks[1].mlp.fc2.weight = model.blocks[0].mlp.fc2.weight
    assert "several places" in rotated(model, heads=False)[1]["blocks"]
    model = randomized(vit(), 6)
    model.blocks[0].register_forward_hook(lambda *_: None)
    assert "forward hook" in rotated(model, heads=False)[1]["blocks"]
    pytest.importorskip("segment_anything")
    model = randomized(sam(), 6)
    model.blocks[0].norm1.weight.data[2] = 0
    assert "padded" in rotated(model, heads=False)[1]["blocks"]


def test_unusable_rotations_are_one_clear_line() -> None:
    network = adapt(randomized(vit(), 7))
    with pytest.raises(AdfqError, match="keep the mean"):
        rotate_stream(network, network.streams[0], random_rotation(48))
    with pytest.raises(AdfqError, match="48×48"):
        rotate_stream(network, network.streams[0], mean_keeping_rotation(24))
    with pytest.raises(AdfqError, match="3×16×16"):
        rotate_heads(network, network.heads[0], value=torch.eye(16)[None])
    pytest.importorskip("segment_anything")
    network = adapt(randomized(sam(), 7))
    with pytest.raises(AdfqError, match="same rotation"):
        rotate_heads(network, network.heads[0], torch.stack([random_rotation(8) for _ in range(3)]))
