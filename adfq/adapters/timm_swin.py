"""Adapter of timm's SwinTransformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import Mlp, to_2tuple
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import nn

from adfq.adapters import Architecture, pair, replace, replace_attention
from adfq.adapters.timm_factory import create_timm, describe_timm, timm_names
from adfq.adapters.timm_streams import streams_of_swin
from adfq.adapters.window_attention import QuantWindowAttention, heads_of_windows
from adfq.plain import keeps_forward
from adfq.sites import Network


def adapt(model: nn.Module) -> Network:
    """Adapt a model, see `adfq.adapters.adapt`.

    Args:
        model: timm's SwinTransformer.
    """
    replace(model, "patch_embed.proj", "patch_embed")
    norms: dict[str, nn.LayerNorm] = {}
    modules, trunk = ["patch_embed"], ["patch_embed"]
    for name, module in list(model.named_modules()):
        if isinstance(module, PatchMerging):
            replace(model, f"{name}.reduction", "reduction")
            modules.append(name)
            trunk.append(name)
            if keeps_forward(module, PatchMerging):
                pair(norms, f"{name}.reduction", module.norm)
        elif isinstance(module, SwinTransformerBlock):
            replace_attention(model, f"{name}.attn", WindowAttention, QuantWindowAttention)
            replace(model, f"{name}.mlp.fc1", "fc1")
            replace(model, f"{name}.mlp.fc2", "fc2")
            modules += [f"{name}.attn", f"{name}.mlp"]
            trunk.append(name)
            if not keeps_forward(module, SwinTransformerBlock):
                continue
            # Windows that the input does not fill are padded with zeros after the norm; those are not its output.
            if not any(
                size % window
                for size, window in zip(to_2tuple(module.input_resolution), module.window_size, strict=True)
            ):
                pair(norms, f"{name}.attn.qkv", module.norm1)
            if keeps_forward(module.mlp, Mlp) and not module.mlp._forward_pre_hooks:
                pair(norms, f"{name}.mlp.fc1", module.norm2)
    if isinstance(model.get_submodule("head.fc"), nn.Linear):
        replace(model, "head.fc", "head")
        modules.append("head.fc")
    streams, unrotated = streams_of_swin(model)
    return Network(
        model,
        norms,
        tuple(modules),
        trunk=tuple(trunk),
        streams=streams,
        heads=heads_of_windows(model),
        unrotated=unrotated,
    )


def model_names() -> list[str]:
    """Return timm's names of the models that `adapt` takes."""
    return timm_names("swin_transformer")


def describe(model: SwinTransformer, family: str) -> Architecture:
    """Describe a model, see `adfq.adapters.describe`.

    Args:
        model: timm's SwinTransformer, not adapted.
        family: qualified name of the supported class.
    """
    stages: list[Any] = [stage.get_submodule("blocks.0") for stage in model.layers]
    arguments: dict[str, Any] = {
        "embed_dim": model.embed_dim,
        "depths": tuple(stage.depth for stage in model.layers),
        "num_heads": tuple(block.attn.num_heads for block in stages),
        "head_dim": tuple(len(block.attn.qkv.weight) // 3 // block.attn.num_heads for block in stages),
        "window_size": window_sizes(stages, [block.input_resolution for block in stages]),
        "mlp_ratio": tuple(block.mlp_ratio for block in stages),
        "qkv_bias": stages[0].attn.qkv.bias is not None,
        "always_partition": stages[0].always_partition,
        "strict_img_size": model.patch_embed.strict_img_size,
    }
    return describe_timm(model, family, arguments)


def create(architecture: Architecture) -> nn.Module:
    """Build a model, see `adfq.adapters.create`.

    Args:
        architecture: from `describe`.

    Raises:
        AdfqError: for a description that cannot be built.
    """
    return create_timm(architecture, SwinTransformer)


def window_sizes(blocks: Sequence[Any], resolutions: Sequence[Any]) -> Any:
    """Return timm's argument for window sizes: one for all stages where timm makes theirs of it, else one for each.

    timm takes several only from 1.0.31 on.

    Args:
        blocks: a block of each stage.
        resolutions: height and width, or one number for both, of each stage's feature map.
    """
    windows = [tuple(block.window_size) for block in blocks]
    largest = tuple(map(max, zip(*windows, strict=True)))
    for block, window, resolution in zip(blocks, windows, resolutions, strict=True):
        # timm cuts a window to the stage's resolution, unless it always partitions.
        cut = tuple(map(min, largest, to_2tuple(resolution)))
        if window != (largest if block.always_partition else cut):
            return tuple(windows)
    return largest
