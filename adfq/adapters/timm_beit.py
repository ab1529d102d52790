"""Adapter of timm's Beit: BEiT and BEiT v2."""

from __future__ import annotations

import inspect
from typing import Any, cast

from timm.layers import SwiGLU
from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn

from adfq.adapters import Architecture, replace, replace_attention
from adfq.adapters.timm_factory import create_timm, describe_timm, hidden_ratio, is_present, timm_names
from adfq.adapters.timm_parts import adapt_end, adapt_mlp, fuse_bias, pair_attention
from adfq.errors import AdfqError
from adfq.layers import QuantLinear, QuantMatMul
from adfq.plain import keeps_forward
from adfq.sites import Network


class QuantBeitAttention(nn.Module):
    """BEiT's Attention with its two matrix products made explicit, in place of fused attention.

    Input and output B×N×C. The bias that timm puts together at run time becomes that of the projection.

    Args:
        attention: module to replace, whose weights are shared.

    Attributes:
        shared_arguments: keyword arguments that are the same for all images.
    """

    shared_arguments = ("shared_rel_pos_bias",)
    relative_position_index: Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.relative_position_bias_table = attention.relative_position_bias_table
        if self.relative_position_bias_table is not None:
            index = cast(Tensor, attention.relative_position_index)
            self.register_buffer("relative_position_index", index, persistent=False)
        self.qkv = QuantLinear(fuse_bias(attention), "qkv")
        self.scores = QuantMatMul(("query", "key"), transpose_right=True)
        self.softmax = nn.Softmax(dim=-1)
        self.attn_drop = attention.attn_drop
        self.context = QuantMatMul(("probs", "value"))
        self.proj = QuantLinear(attention.proj, "proj")
        self.proj_drop = attention.proj_drop

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Return attention of tokens to each other: B×N×C.

        Args:
            x: B×N×C.
            shared_rel_pos_bias: heads×N×N, added to scores; None, the default, for none.
        """
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.scores(query * self.scale, key)
        if self.relative_position_bias_table is not None:
            scores = scores + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if shared_rel_pos_bias is not None:
            scores = scores + shared_rel_pos_bias
        probs = self.softmax(scores)
        del scores  # as large as what is still to come
        context = self.context(self.attn_drop(probs), value)
        output: Tensor = self.proj_drop(self.proj(context.transpose(1, 2).flatten(2)))
        return output


def adapt(model: nn.Module) -> Network:
    """Adapt a model, see `adfq.adapters.adapt`.

    Args:
        model: timm's Beit.

    Raises:
        AdfqError: for a block of another kind than timm's.
    """
    replace(model, "patch_embed.proj", "patch_embed")
    norms: dict[str, nn.LayerNorm] = {}
    units, trunk = ["patch_embed"], ["patch_embed"]
    for index, block in enumerate(model.get_submodule("blocks").children()):
        name = f"blocks.{index}"
        if not isinstance(block, Block):
            raise AdfqError(f"{name}: cannot quantize a {type(block).__name__}, which is no block of timm's Beit")
        before = (block.norm1, block.norm2) if keeps_forward(block, Block) else (None, None)
        replace_attention(model, f"{name}.attn", Attention, QuantBeitAttention)
        pair_attention(model, f"{name}.attn", norms, before[0])
        adapt_mlp(model, f"{name}.mlp", "fc1", norms, before[1])
        units += [f"{name}.attn", f"{name}.mlp"]
        trunk.append(name)
    units += adapt_end(model, norms)
    return Network(model, norms, tuple(units), trunk=tuple(trunk))


def model_names() -> list[str]:
    """Return timm's names of the models that `adapt` takes."""
    return timm_names("beit")


def describe(model: Beit, family: str) -> Architecture:
    """Describe a model, see `adfq.adapters.describe`.

    Args:
        model: timm's Beit, not adapted.
        family: qualified name of the supported class.
    """
    arguments: dict[str, Any] = {
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_shared_rel_pos_bias": model.rel_pos_bias is not None,
        "use_fc_norm": is_present(model.fc_norm),
        "head_init_scale": model.head_init_scale,
    }
    blocks: list[Any] = list(model.blocks)
    for block in blocks[:1]:
        arguments |= {
            "num_heads": block.attn.num_heads,
            "qkv_bias": block.attn.q_bias is not None,
            "use_rel_pos_bias": block.attn.relative_position_bias_table is not None,
            "init_values": None if block.gamma_1 is None else 1.0,  # any will do, the scales are weights
            "mlp_ratio": hidden_ratio(block.mlp.fc2.weight.shape[1], model.embed_dim),
            "scale_mlp": is_present(block.mlp.norm),
            "swiglu_mlp": isinstance(block.mlp, SwiGLU),
        }
    known = inspect.signature(Beit).parameters  # older versions of timm have fewer
    return describe_timm(model, family, {name: value for name, value in arguments.items() if name in known})


def create(architecture: Architecture) -> nn.Module:
    """Build a model, see `adfq.adapters.create`.

    Args:
        architecture: from `describe`.

    Raises:
        AdfqError: for a description that cannot be built.
    """
    return create_timm(architecture, Beit)
