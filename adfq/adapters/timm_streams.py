"""Residual streams and heads of timm's ViT and Swin, for rotations (`adfq.streams`)."""

from __future__ import annotations

from typing import Any

from timm.layers import ClassifierHead, GluMlp, Mlp, PatchEmbed, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, SwinTransformerStage
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import nn

from adfq.adapters.timm_factory import is_present
from adfq.layers import QuantLinear
from adfq.plain import keeps_forward
from adfq.streams import Heads, Stream

_LINEAR_POOLS = ("", "token", "avg")  # these commute with a linear map of channels
_TOKENS = ("cls_token", "reg_token", "dist_token", "pos_embed")


def stream_of_vit(model: Any) -> Stream | str:
    """Return the residual stream of a VisionTransformer, or the reason why it cannot be rotated.

    Args:
        model: timm's VisionTransformer with quantizable layers.
    """
    if not _is_exactly(model, VisionTransformer, VisionTransformerDistilled):
        return f"a {type(model).__name__} may read the stream its own way"
    embed = model.patch_embed
    if not _is_exactly(embed, PatchEmbed) or is_present(embed.norm) or is_present(model.norm_pre):
        return "the stream begins with a norm, or with something else than a PatchEmbed"
    writers, norms = {"patch_embed.proj": ""}, dict[str, tuple[str, ...]]()
    for index, block in enumerate(model.blocks):
        name = f"blocks.{index}"
        if not _is_exactly(block, Block):
            return f"{name} is a {type(block).__name__}"
        if not _is_exactly(block.mlp, Mlp, GluMlp, SwiGLU):
            return f"{name}.mlp is a {type(block.mlp).__name__}"
        for scale, writer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            module = getattr(block, scale)
            if is_present(module) and not _is_exactly(module, LayerScale):
                return f"{name}.{scale} is a {type(module).__name__}"
            writers[f"{name}.{writer}"] = f"{name}.{scale}.gamma" if is_present(module) else ""
        norms[f"{name}.norm1"] = _children(block.attn, f"{name}.attn", "qkv", "gate")
        norms[f"{name}.norm2"] = _children(block.mlp, f"{name}.mlp", "fc1", "fc1_g", "fc1_x")
    pooled = model.attn_pool is None and model.global_pool in _LINEAR_POOLS
    if is_present(model.norm):
        end, folds = "norm", pooled and not is_present(model.fc_norm)
    elif is_present(model.fc_norm) and pooled:
        end, folds = "fc_norm", True
    else:
        return "behind the blocks the stream is read without a norm"
    norms[end] = _children(model, "", "head", "head_dist") if folds else ()
    tokens = tuple(name for name in _TOKENS if getattr(model, name, None) is not None)
    return Stream("blocks", model.embed_dim, writers, norms, tokens=tokens)


def heads_of_vit(model: Any) -> tuple[Heads, ...]:
    """Return the heads of a VisionTransformer's attentions.

    Args:
        model: timm's VisionTransformer with quantizable attentions.
    """
    attentions = ((name, module) for name, module in model.named_modules() if name.startswith("blocks."))
    return tuple(_heads(name, module) for name, module in attentions if hasattr(module, "k_norm"))


def _heads(name: str, attention: Any) -> Heads:
    normed = is_present(attention.q_norm) or is_present(attention.k_norm)
    changed = is_present(attention.norm) or attention.gate is not None
    return Heads(
        name,
        f"{name}.qkv",
        f"{name}.proj",
        attention.num_heads,
        "a norm follows queries and keys" if normed else "",
        "a norm or gate follows the heads" if changed else "",
    )


def streams_of_swin(model: Any) -> tuple[tuple[Stream, ...], dict[str, str]]:
    """Return the residual streams of a SwinTransformer's stages, and by name the reasons why others cannot be rotated.

    Args:
        model: timm's SwinTransformer with quantizable layers.
    """
    if not _is_exactly(model, SwinTransformer):
        return (), {"layers": f"a {type(model).__name__} may read the streams its own way"}
    streams, unrotated = [], {"layers.0": "the stream is the output of a LayerNorm"}
    for index, stage in enumerate(model.layers):
        found = _stream_of_stage(model, index, stage)
        if isinstance(found, str):
            unrotated[f"layers.{index}"] = found
        elif index:
            streams.append(found)
    return tuple(streams), unrotated


def _stream_of_stage(model: Any, index: int, stage: Any) -> Stream | str:
    name = f"layers.{index}"
    if not _is_exactly(stage, SwinTransformerStage):
        return f"{name} is a {type(stage).__name__}"
    if model.patch_embed.strict_img_size is False:
        return "images of any size may pad windows with zeros behind a norm"
    writers, norms = {f"{name}.downsample.reduction": ""}, dict[str, tuple[str, ...]]()
    for number, block in enumerate(stage.blocks):
        part = f"{name}.blocks.{number}"
        if not _is_exactly(block, SwinTransformerBlock) or not _is_exactly(block.mlp, Mlp):
            return f"{part} is a {type(block).__name__} with a {type(block.mlp).__name__}"
        sides = zip(block.input_resolution, block.window_size, strict=True)
        if any(resolution % window for resolution, window in sides):
            return f"windows of {part} are padded with zeros behind a norm"
        writers |= {f"{part}.attn.proj": "", f"{part}.mlp.fc2": ""}
        norms |= {f"{part}.norm1": (f"{part}.attn.qkv",), f"{part}.norm2": (f"{part}.mlp.fc1",)}
    if index + 1 < len(model.layers):
        merging = model.layers[index + 1].downsample
        if not _is_exactly(merging, PatchMerging):
            return f"behind {name} is a {type(merging).__name__}"
        norms[f"layers.{index + 1}.downsample.norm"] = (f"layers.{index + 1}.downsample.reduction",)
    elif is_present(model.norm):
        folds = _is_exactly(model.head, ClassifierHead) and model.head.global_pool.pool_type in _LINEAR_POOLS
        norms["norm"] = _children(model.head, "head", "fc") if folds else ()
    else:
        return "behind the blocks the stream is read without a norm"
    return Stream(name, stage.blocks[0].dim, writers, norms)


def _is_exactly(module: Any, *classes: type[nn.Module]) -> bool:
    """Return True for an instance of a class itself, whose methods are the class's."""
    return type(module) in classes and keeps_forward(module, *classes)


def _children(module: nn.Module, name: str, *children: str) -> tuple[str, ...]:
    """Return the names of the quantizable linear layers among some children of a module."""
    found = (child for child in children if isinstance(getattr(module, child, None), QuantLinear))
    return tuple(f"{name}.{child}".lstrip(".") for child in found)
