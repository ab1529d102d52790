"""timm's PoolingVisionTransformer (PiT): an example of an adapter in a package of its own."""

from typing import Any

import timm
from timm.models.pit import PoolingVisionTransformer
from torch import nn

from adfq.adapters import Architecture, replace
from adfq.adapters.timm_factory import create_timm, describe_timm
from adfq.adapters.timm_vit import adapt_block
from adfq.sites import Network


def adapt(model: nn.Module) -> Network:
    """Replace, in place, the layers that methods quantize; pooling layers stay in full precision."""
    replace(model, "patch_embed.conv", "patch_embed")
    norms: dict[str, nn.LayerNorm] = {}
    units = ["patch_embed"]
    for stage, transformer in enumerate(model.get_submodule("transformers").children()):
        for index in range(len(transformer.get_submodule("blocks"))):
            units += adapt_block(model, f"transformers.{stage}.blocks.{index}", norms)
    for head in ("head", "head_dist"):  # head_dist belongs to distilled models
        if isinstance(getattr(model, head), nn.Linear):
            replace(model, head, "head")
            units.append(head)
    return Network(model, norms, tuple(units), excluded=("transformers.*.pool.*",))


def describe(model: Any, family: str) -> Architecture:
    """Return the architecture of a model that `adapt` has not changed."""
    arguments = {
        "stride": model.patch_embed.conv.stride[0],
        "base_dims": tuple(model.base_dims),
        "heads": tuple(model.heads),
        "depth": tuple(len(transformer.blocks) for transformer in model.transformers),
        "mlp_ratio": model.transformers[0].blocks[0].mlp.fc1.out_features / (model.base_dims[0] * model.heads[0]),
        "distilled": model.head_dist is not None,
    }
    return describe_timm(model, family, arguments)


def create(architecture: Architecture) -> nn.Module:
    """Return a model of that architecture with random weights."""
    return create_timm(architecture, PoolingVisionTransformer)


def model_names() -> list[str]:
    """Return timm's names of the models that `adapt` takes."""
    return list(timm.list_models(module="pit"))
