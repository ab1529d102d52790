"""Attention within windows, which timm's Swin and MMDetection's have in common, down to the names."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from adfq.layers import QuantLinear, QuantMatMul
from adfq.streams import Heads


class QuantWindowAttention(nn.Module):
    """timm's WindowAttention or MMDetection's WindowMSA with its two matrix products made explicit.

    Input and output (windows·B)×N×C with N tokens a window.

    Args:
        attention: module to replace, whose parameters are shared.

    Attributes:
        shared_arguments: keyword arguments that are the same for all images.
    """

    shared_arguments = ("mask",)
    relative_position_index: Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.relative_position_bias_table = attention.relative_position_bias_table
        self.register_buffer(
            "relative_position_index", cast(Tensor, attention.relative_position_index), persistent=False
        )
        self.qkv = QuantLinear(attention.qkv, "qkv")
        self.scores = QuantMatMul(("query", "key"), transpose_right=True)
        self.softmax = nn.Softmax(dim=-1)
        self.attn_drop = attention.attn_drop
        self.context = QuantMatMul(("probs", "value"))
        self.proj = QuantLinear(attention.proj, "proj")
        self.proj_drop = attention.proj_drop

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return attention within each window: (windows·B)×N×C.

        Args:
            x: (windows·B)×N×C.
            mask: windows×N×N, added to scores, which keeps parts of shifted windows apart; None, the default, for none.
        """
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        scores = self.scores(query * self.scale, key) + bias
        if mask is not None:
            scores = scores.unflatten(0, (-1, len(mask))) + mask[:, None]
            scores = scores.flatten(0, 1)
        probs = self.softmax(scores)
        del scores  # as large as what is still to come
        context = self.context(self.attn_drop(probs), value)
        output: Tensor = self.proj_drop(self.proj(context.transpose(1, 2).reshape(batch, tokens, -1)))
        return output


def heads_of_windows(model: nn.Module) -> tuple[Heads, ...]:
    """Return the heads of a model's window attentions.

    Args:
        model: an adapted model.
    """
    return tuple(
        Heads(name, f"{name}.qkv", f"{name}.proj", module.num_heads)
        for name, module in model.named_modules()
        if isinstance(module, QuantWindowAttention)
    )
