"""Parts that timm's families have in common: MLPs, attention pooling, projections with separate biases."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionPoolLatent, AttentionPoolPrr, GluMlp, Mlp, SwiGLU
from timm.layers.activations import GELU, GELUTanh, QuickGELU, Swish
from timm.layers.attention import maybe_add_mask
from torch import Tensor, nn

from adfq.adapters import pair, replace, replace_attention
from adfq.adapters.multihead_attention import linear_of
from adfq.adapters.timm_factory import is_present
from adfq.layers import QuantLinear, QuantMatMul
from adfq.plain import keeps_forward

_GELUS = (nn.GELU, nn.SiLU, GELU, GELUTanh, QuickGELU, Swish)
_RELUS = (nn.ReLU, nn.ReLU6)

#: Names of the linear layers that read an attention's input.
_READERS = ("qkv", "q_proj", "k_proj", "v_proj", "gate")


def adapt_end(model: nn.Module, norms: dict[str, nn.LayerNorm]) -> list[str]:
    """Replace attention pooling and heads in place, and return the names of these units.

    Args:
        model: model whose blocks are adapted.
        norms: LayerNorms by the name of a reader; that of attention pooling is added.

    Raises:
        AdfqError: for an attention pooling that computes its own way.
    """
    units = []
    pool = getattr(model, "attn_pool", None)
    if isinstance(pool, AttentionPoolLatent):
        linears = [name for name in ("q", "kv", "proj") if is_present(getattr(pool, name))]
        replace_attention(model, "attn_pool", AttentionPoolLatent, QuantAttentionPool, linears)
        if pool.mlp is not None:
            adapt_mlp(model, "attn_pool.mlp", "fc1" if is_present(pool.norm) else "residual", norms, pool.norm)
        units.append("attn_pool")
    elif isinstance(pool, AttentionPoolPrr):
        replace_attention(model, "attn_pool", AttentionPoolPrr, QuantPatchRefinement, ())
        units.append("attn_pool")
    for head in ("head", "head_dist"):  # the second one is distilled DeiT's
        if isinstance(getattr(model, head, None), nn.Linear):
            replace(model, head, "head")
            units.append(head)
    return units


def adapt_mlp(model: nn.Module, name: str, role: str, norms: dict[str, nn.LayerNorm], norm: nn.Module | None) -> None:
    """Replace the linear layers of an MLP in place.

    Args:
        model: model with the MLP.
        name: name of the MLP: timm's Mlp, GluMlp or SwiGLU.
        role: site role of its first layers.
        norms: LayerNorms by the name of a reader; the MLP's is added.
        norm: module before the MLP that nothing else reads; None for none.

    Raises:
        AdfqError: for a layer that computes something else than its class does.
    """
    mlp = model.get_submodule(name)
    first = ("fc1_g", "fc1_x") if isinstance(mlp, SwiGLU) else ("fc1",)
    last = _role_of_last(mlp)
    for layer in first:
        replace(model, f"{name}.{layer}", role)
    replace(model, f"{name}.fc2", last)
    # A forward of its own, or a hook, may read or change the norm's output.
    if keeps_forward(mlp, Mlp, GluMlp, SwiGLU) and not mlp._forward_pre_hooks:
        for layer in first:
            pair(norms, f"{name}.{layer}", norm)


def _role_of_last(mlp: Any) -> str:
    if isinstance(mlp, (GluMlp, SwiGLU)):
        return "gated"
    if is_present(mlp.norm):
        return "hidden"
    return "fc2" if keeps_forward(mlp.act, *_GELUS) else "relu" if keeps_forward(mlp.act, *_RELUS) else "hidden"


def pair_attention(model: nn.Module, name: str, norms: dict[str, nn.LayerNorm], norm: nn.Module | None) -> None:
    """Record that a norm's output is read by an attention's projections alone.

    Args:
        model: model with the attention.
        name: name of the attention, already replaced.
        norms: LayerNorms by the name of a reader; the attention's is added.
        norm: module before the attention that nothing else reads; None for none.
    """
    attention = model.get_submodule(name)
    for reader in _READERS:
        if getattr(attention, reader, None) is not None:
            pair(norms, f"{name}.{reader}", norm)


def fuse_bias(attention: Any) -> nn.Linear:
    """Return the projection to queries, keys and values with the bias that timm puts together at run time.

    Args:
        attention: timm's EvaAttention or BEiT's Attention with a fused projection, whose weight is shared.
    """
    if attention.q_bias is None:
        projection: nn.Linear = attention.qkv
        return projection
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias)).detach()
    return linear_of(attention.qkv.weight, nn.Parameter(bias, attention.q_bias.requires_grad))


class QuantAttentionPool(nn.Module):
    """timm's AttentionPoolLatent with its two matrix products made explicit; its MLP is replaced by `adapt_mlp`.

    Input B×N×C; output B×C, or B×latents×C without pooling of the latents.

    Args:
        attention: module to replace, whose parameters are shared.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = attention.num_heads, attention.head_dim, attention.scale
        self.pool, self.pos_embed, self.latent = attention.pool, attention.pos_embed, attention.latent
        self.q = QuantLinear(attention.q, "in_proj") if is_present(attention.q) else attention.q
        self.kv = QuantLinear(attention.kv, "in_proj", parts=2)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.scores = QuantMatMul(("query", "key"), transpose_right=True)
        self.softmax = nn.Softmax(dim=-1)
        self.context = QuantMatMul(("probs", "value"))
        self.proj = QuantLinear(attention.proj, "proj") if is_present(attention.proj) else attention.proj
        self.proj_drop, self.norm, self.mlp = attention.proj_drop, attention.norm, attention.mlp

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Return attention of the latents to the tokens, pooled.

        Args:
            x: B×N×C.
            attn_mask: added to scores; None, the default, for none.
        """
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        latents = self.q(self.latent.expand(x.shape[0], -1, -1))
        query = latents.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        key, value = self.kv(x).unflatten(-1, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.scores(self.q_norm(query), self.k_norm(key)).mul_(self.scale)
        context = self.context(self.softmax(maybe_add_mask(scores, attn_mask)), value)
        x = self.proj_drop(self.proj(context.transpose(1, 2).flatten(2)))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return _pooled(x, self.pool)


class QuantPatchRefinement(nn.Module):
    """timm's AttentionPoolPrr, attention without projections, with its two matrix products made explicit.

    Input B×N×C; output B×C.

    Args:
        attention: module to replace.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.scale, self.pool = attention.num_heads, attention.scale, attention.pool
        self.pre_norm = attention.pre_norm
        self.scores = QuantMatMul(("query", "key"), transpose_right=True)
        self.softmax = nn.Softmax(dim=-1)
        self.context = QuantMatMul(("probs", "value"))
        self.post_norm = attention.post_norm

    def forward(self, x: Tensor) -> Tensor:
        """Return attention of tokens to each other, pooled: B×C.

        Args:
            x: B×N×C.
        """
        heads = self.pre_norm(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        context = self.context(self.softmax(self.scores(heads, heads).mul_(self.scale)), heads)
        return _pooled(self.post_norm(context.transpose(1, 2).flatten(2)), self.pool)


def _pooled(x: Tensor, pool: str) -> Tensor:
    if pool == "token":
        return x[:, 0]
    return x.mean(1) if pool == "avg" else x
