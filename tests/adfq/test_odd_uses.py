"""Models and calls as people have them: the right model, or one clear error."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from timm.models import swin_transformer, swin_transformer_v2_cr, vision_transformer
from torch import Tensor, nn
from torch.nn.utils import parametrize

import adfq
from adfq import AdfqError

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]


def is_close(quantized: nn.Module, model: nn.Module, images: Tensor) -> bool:
    """Return True if a quantized model's output is within 5 % of full precision's, in norm."""
    with torch.no_grad():
        expected = model(images)
        return bool((quantized(images) - expected).norm() < 0.05 * expected.norm())


class Block(vision_transformer.Block):
    """Named as timm's, as in many forks, but with the stream behind the norm."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        y = self.norm1(x)
        x = y + self.attn(y)
        return x + self.mlp(self.norm2(x))


class BlockWithItsOwnAttention(swin_transformer.SwinTransformerBlock):
    def _attn(self, x: Tensor, *arguments: Any) -> Tensor:
        return super()._attn(x, *arguments) + 3 * x


class AttentionWithItsOwnBias(swin_transformer.WindowAttention):
    def _get_rel_pos_bias(self) -> Tensor:
        return -30 * super()._get_rel_pos_bias()


class AttentionWithItsOwnEncoding(swin_transformer_v2_cr.WindowMultiHeadAttention):
    def _relative_positional_encodings(self) -> Tensor:
        return -30 * super()._relative_positional_encodings()


def turn(model: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Give every module of a class's base the class itself, in place, and return the model."""
    for module in model.modules():
        if type(module) is cls.__bases__[0]:
            module.__class__ = cls
    return model


@pytest.mark.parametrize("method", ["base_ptq", "repq_vit"])
def test_a_class_with_timms_name_is_not_timms(method: str, make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(block_fn=Block), make_images()
    assert is_close(adfq.quantize(model, method, 8, 8, images), model, images)


def test_a_block_that_computes_its_attention_otherwise(make_swin: MakeModel, make_images: MakeImages) -> None:
    model, images = turn(make_swin(), BlockWithItsOwnAttention), make_images()
    assert is_close(adfq.quantize(model, "repq_vit", 8, 8, images), model, images)


def test_an_attention_with_a_bias_of_its_own_is_refused(make_swin: MakeModel, make_images: MakeImages) -> None:
    with pytest.raises(AdfqError, match="AttentionWithItsOwnBias with a forward of its own"):
        adfq.quantize(turn(make_swin(), AttentionWithItsOwnBias), "base_ptq", 8, 8, make_images())


def test_a_method_that_was_set_on_an_instance_is_refused(make_vit: MakeModel, make_images: MakeImages) -> None:
    model: Any = make_vit()
    convolution = model.patch_embed.proj
    convolution._conv_forward = MethodType(
        lambda self, x, weight, bias: nn.functional.conv2d(x, weight.flip(-1), bias, self.stride), convolution
    )
    with pytest.raises(AdfqError, match=r"patch_embed.proj: .* a Conv2d with a forward of its own"):
        adfq.quantize(model, "base_ptq", 8, 8, make_images())


def test_a_compiled_layer_is_the_layer(make_vit: MakeModel, make_images: MakeImages) -> None:
    model: Any = make_vit()
    model.head.compile()
    adfq.quantize(model, "base_ptq", 8, 8, make_images())


class Triple(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


def test_a_parametrized_table_of_an_attention_is_refused(make_swin: MakeModel, make_images: MakeImages) -> None:
    model = make_swin()
    for module in list(model.modules()):
        if isinstance(module, swin_transformer.WindowAttention):
            parametrize.register_parametrization(module, "relative_position_bias_table", Triple())
    with pytest.raises(AdfqError, match="relative_position_bias_table is computed when it is read"):
        adfq.quantize(model, "base_ptq", 8, 8, make_images())


@pytest.mark.parametrize("method", ["fima_q", "row_ridge"])
def test_gradient_checkpointing_changes_nothing(method: str, make_vit: MakeModel, make_images: MakeImages) -> None:
    options: dict[str, Any] = {"iterations": 2, "optimize_batch_size": 2}
    options |= {"reconstruct": True} if method == "row_ridge" else {}
    model: Any = make_vit(depth=1)
    images = make_images(4)
    expected = adfq.quantize(model, method, 4, 4, images, **options)(images)
    model.set_grad_checkpointing(True)
    assert torch.equal(adfq.quantize(model, method, 4, 4, images, **options)(images), expected)


class Labelled(vision_transformer.VisionTransformer):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def _without_head(model: Any) -> Any:
    model.head = nn.Identity()
    return model


def _with_a_kept_activation(model: Any) -> Any:
    model.last = model.head.weight * 2
    return model


def _with_a_lock(model: Any) -> Any:
    model.lock = threading.Lock()
    return model


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda model: None, "model must be an nn.Module, got NoneType"),
        (lambda model: model.state_dict(), "model must be an nn.Module, got OrderedDict"),
        (lambda model: model.to("meta"), "its parameters are on the device meta"),
        (_with_a_kept_activation, "the model cannot be copied: Only Tensors created explicitly"),
        (_with_a_lock, "the model cannot be copied: cannot pickle"),
    ],
)
def test_a_model_that_cannot_be_taken_is_one_line(
    change: Callable[[Any], Any], says: str, make_vit: MakeModel, make_images: MakeImages
) -> None:
    with pytest.raises(AdfqError, match=says) as caught:
        adfq.quantize(change(make_vit()), "base_ptq", 8, 8, make_images())
    assert "\n" not in str(caught.value)


def test_a_replaced_part_is_one_line(make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages) -> None:
    images = make_images()
    with pytest.raises(AdfqError, match="cannot quantize this SwinTransformer, a part of which was replaced"):
        adfq.quantize(_without_head(make_swin()), "base_ptq", 8, 8, images)
    model: Any = make_vit()
    model.__class__ = Labelled
    with pytest.raises(AdfqError, match=r"does not take calibration images of .* missing 1 required positional"):
        adfq.quantize(model, "base_ptq", 8, 8, images)


@pytest.mark.parametrize("seed", ["a", None, [1], float("nan"), 1.5, 2**64])
def test_a_seed_is_a_whole_number(seed: Any, make_vit: MakeModel, make_images: MakeImages) -> None:
    with pytest.raises(AdfqError, match="seed must be a whole number of at most 64 bits"):
        adfq.quantize(make_vit(), "base_ptq", 8, 8, make_images(), seed)


@pytest.mark.parametrize("path", [None, 5, "a\0b"])
def test_a_path_is_a_path(path: Any, make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(), make_images()
    quantized = adfq.quantize(model, "base_ptq", 8, 8, images)
    for use in (lambda: adfq.save(quantized, path), lambda: adfq.load(path), lambda: adfq.export_onnx(quantized, path)):
        with pytest.raises(AdfqError, match="a path is needed"):
            use()
    if path is not None:
        with pytest.raises(AdfqError, match="a path is needed"):
            adfq.quantize(model, "base_ptq", 8, 8, images, resume=path)


def test_a_folder_that_is_not_there_is_told_before_the_work(
    make_vit: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    quantized = adfq.quantize(make_vit(), "base_ptq", 8, 8, make_images())
    with pytest.raises(AdfqError, match="there is no directory"):
        adfq.export_onnx(quantized, tmp_path / "none" / "vit.onnx")


@pytest.mark.parametrize(
    "change", [lambda x: x.to("meta"), lambda x: x.to_sparse(), lambda x: x.to(torch.float8_e4m3fn)]
)
def test_images_without_plain_values_are_refused(change: Any, make_vit: MakeModel, make_images: MakeImages) -> None:
    with pytest.raises(AdfqError, match="calibration images must be dense values"):
        adfq.quantize(make_vit(), "base_ptq", 8, 8, change(make_images()))


def test_modes_of_the_caller_do_not_enter_files(make_swin: MakeModel, make_images: MakeImages, tmp_path: Path) -> None:
    images = make_images()
    quantized = adfq.quantize(make_swin(), "base_ptq", 8, 8, images)
    expected, file = quantized(images), tmp_path / "swin.safetensors"
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.inference_mode():
            adfq.save(quantized, file)
            loaded = adfq.load(file)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(loaded(images.clone().requires_grad_()), expected)


def test_threads_get_what_a_single_call_gets(make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(depth=1), make_images(4)

    def quantize() -> Tensor:
        options: dict[str, Any] = {"iterations": 3, "optimize_batch_size": 2}
        return adfq.quantize(copy.deepcopy(model), "qdrop", 4, 4, images, **options)(images).detach()

    expected, found = quantize(), list[Tensor]()
    threads = [threading.Thread(target=lambda: found.append(quantize())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected) for each in found)
    assert len(found) == 2
