"""torch's MultiheadAttention, as transformers of detectors have it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.layers import QuantLinear, QuantMatMul


class QuantMultiheadAttention(nn.Module):
    """nn.MultiheadAttention with three separate projections, and with its two matrix products made explicit.

    Args:
        attention: module to replace, whose parameters are shared; one that `can_replace`.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout = attention.embed_dim, attention.num_heads, attention.dropout
        self.batch_first = attention.batch_first
        self.q_proj, self.k_proj, self.v_proj = (
            QuantLinear(part, "in_proj", False) for part in _projections(attention)
        )
        self.scores = QuantMatMul(("query", "key"), transpose_right=True)
        self.softmax = nn.Softmax(dim=-1)
        self.context = QuantMatMul(("probs", "value"))
        self.out_proj = QuantLinear(attention.out_proj, "proj", fixed_positions=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention from queries to keys, and its probabilities; see nn.MultiheadAttention.

        Args:
            query: B×L×C if `batch_first`, else L×B×C; or L×C.
            key: B×S×C or S×B×C; or S×C.
            value: shaped as `key`.
            key_padding_mask: B×S; True, or a value to add to scores, for keys to ignore. None, the default, for none.
            need_weights: False returns None in place of probabilities.
            attn_mask: L×S or (B·heads)×L×S, bool or to add to scores. None, the default, for none.
            average_attn_weights: True, the default, for the mean over heads, B×L×S; False for B×heads×L×S.
            is_causal: hint that `attn_mask` is causal; without effect.
        """
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x[:, None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        if batched and self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        heads = [
            projection(x).unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        ]
        scores = self.scores(heads[0] / math.sqrt(heads[0].shape[-1]), heads[1])
        if attn_mask is not None:
            mask = attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask
            scores = scores + _additive(mask, scores)
        if key_padding_mask is not None:
            scores = scores + _additive(key_padding_mask, scores)[:, None, None]
        probs = F.dropout(self.softmax(scores), self.dropout, self.training)
        del scores  # as large as what is still to come
        output = self.out_proj(self.context(probs, heads[2]).permute(2, 0, 1, 3).flatten(2))
        output = output[:, 0] if not batched else output.transpose(0, 1) if self.batch_first else output
        if not need_weights:
            return output, None
        weights = probs.mean(1) if average_attn_weights else probs
        return output, weights if batched else weights[0]


def can_replace(attention: nn.MultiheadAttention) -> bool:
    """Return False for an attention to extra keys, which are no result of a layer.

    Args:
        attention: module to replace.
    """
    return attention.bias_k is None and attention.bias_v is None and not attention.add_zero_attn


def _projections(attention: nn.MultiheadAttention) -> list[nn.Linear]:
    """Return the three projections as linear layers with parts of the attention's parameters."""
    if attention._qkv_same_embed_dim:
        weights = attention.in_proj_weight.detach().chunk(3)
    else:
        weights = tuple(
            weight.detach() for weight in (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        )
    biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.detach().chunk(3)
    return [
        linear_of(weight, None if bias is None else nn.Parameter(bias))
        for weight, bias in zip(weights, biases, strict=True)
    ]


def linear_of(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """Return a linear layer with given parameters.

    Args:
        weight: out × in; a parameter is shared.
        bias: out; None for none.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    linear.register_parameter("bias", bias)
    return linear


def _additive(mask: Tensor, scores: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(scores.dtype)
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(mask, -math.inf)
