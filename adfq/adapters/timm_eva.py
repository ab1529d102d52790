"""Adapter of timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder and other ViTs with rotary positions."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionRope, GluMlp, SwiGLU
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from adfq.adapters import Architecture, replace, replace_attention
from adfq.adapters.timm_factory import create_timm, describe_timm, hidden_ratio, is_present, timm_names
from adfq.adapters.timm_parts import adapt_end, adapt_mlp, fuse_bias, pair_attention
from adfq.errors import AdfqError
from adfq.layers import QuantLinear, QuantMatMul
from adfq.plain import keeps_forward
from adfq.sites import Network

_SEPARATE = ("q_proj", "k_proj", "v_proj")


class QuantEvaAttention(nn.Module):
    """timm's EvaAttention or AttentionRope with its two matrix products made explicit, in place of fused attention.

    Input and output B×N×C. A bias that timm puts together at run time becomes that of the fused projection.

    Args:
        attention: module to replace, whose weights are shared.
        role: site role of the layers that read the input.

    Attributes:
        shared_arguments: keyword arguments that are the same for all images.
    """

    shared_arguments = ("rope", "attn_mask")

    def __init__(self, attention: Any, role: str) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.key_groups = getattr(attention, "num_kv_groups", 1)  # timm 1.0.28 has none
        self.num_prefix_tokens, self.rotate_half = attention.num_prefix_tokens, attention.rotate_half
        self.qkv: nn.Module | None = None
        self.q_proj: nn.Module | None = None
        self.k_proj: nn.Module | None = None
        self.v_proj: nn.Module | None = None
        if attention.qkv is None:
            self.q_proj, self.k_proj, self.v_proj = (
                QuantLinear(getattr(attention, name), role, parts=1) for name in _SEPARATE
            )
        else:
            fused = fuse_bias(attention) if isinstance(attention, EvaAttention) else attention.qkv
            self.qkv = QuantLinear(fused, role, parts=3)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.scores = QuantMatMul(("query", "key"), transpose_right=True)
        self.softmax = nn.Softmax(dim=-1)
        self.attn_drop = attention.attn_drop
        self.context = QuantMatMul(("probs", "value"))
        self.norm = attention.norm
        self.gate = None if attention.gate is None else QuantLinear(attention.gate, role, parts=1)
        self.proj = QuantLinear(attention.proj, "proj")
        self.proj_drop = attention.proj_drop

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return attention of tokens to each other: B×N×C.

        Args:
            x: B×N×C.
            rope: sines and cosines of the rotary positions, N×2D without prefix tokens, with leading dimensions that
                broadcast to B×heads; None, the default, for none.
            attn_mask: mask of pairs of tokens; None, the default, for none.
            is_causal: True to mask later tokens; False by default.
        """
        query, key, value = self._project(x)
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = self._rotate(query, rope).type_as(value), self._rotate(key, rope).type_as(value)
        if self.key_groups > 1:
            key, value = (heads.repeat_interleave(self.key_groups, dim=1) for heads in (key, value))
        scores = self.scores(query, key).mul_(self.scale)
        scores = maybe_add_mask(scores, resolve_self_attn_mask(x.shape[1], scores, attn_mask, is_causal))
        probs = self.softmax(scores)
        del scores  # as large as what is still to come
        context = self.norm(self.context(self.attn_drop(probs), value).transpose(1, 2).flatten(2))
        if self.gate is not None:
            context = context * self.gate(x).sigmoid()
        output: Tensor = self.proj_drop(self.proj(context))
        return output

    def _project(self, x: Tensor) -> list[Tensor]:
        """Return queries, keys and values, each B×heads×N×D."""
        if self.qkv is not None:
            heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
            return list(heads.permute(2, 0, 3, 1, 4).unbind(0))
        assert self.q_proj is not None and self.k_proj is not None and self.v_proj is not None  # noqa: PT018
        keys = self.num_heads // self.key_groups
        pairs = ((self.q_proj, self.num_heads), (self.k_proj, keys), (self.v_proj, keys))
        return [projection(x).unflatten(-1, (heads, -1)).transpose(1, 2) for projection, heads in pairs]

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        prefix, patches = x.tensor_split([self.num_prefix_tokens], dim=2)
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=self.rotate_half)], dim=2)


def adapt(model: nn.Module) -> Network:
    """Adapt a model, see `adfq.adapters.adapt`.

    Args:
        model: timm's Eva.

    Raises:
        AdfqError: for a block of another kind than timm's.
    """
    replace(model, "patch_embed.proj", "patch_embed")
    norms: dict[str, nn.LayerNorm] = {}
    units, trunk = ["patch_embed"], ["patch_embed"]
    for index, block in enumerate(model.get_submodule("blocks").children()):
        name = f"blocks.{index}"
        if not isinstance(block, (EvaBlock, EvaBlockPostNorm)):
            raise AdfqError(f"{name}: cannot quantize a {type(block).__name__}, which is no block of timm's Eva")
        attention: Any = block.attn
        roles = ("residual", "residual") if isinstance(block, EvaBlockPostNorm) else ("qkv", "fc1")
        before = (block.norm1, block.norm2) if keeps_forward(block, EvaBlock) else (None, None)
        linears = [layer for layer in ("qkv", *_SEPARATE, "gate", "proj") if getattr(attention, layer) is not None]
        kind = AttentionRope if isinstance(attention, AttentionRope) else EvaAttention
        replace_attention(model, f"{name}.attn", kind, partial(QuantEvaAttention, role=roles[0]), linears)
        pair_attention(model, f"{name}.attn", norms, before[0])
        adapt_mlp(model, f"{name}.mlp", roles[1], norms, before[1])
        units += [f"{name}.attn", f"{name}.mlp"]
        trunk.append(name)
    units += adapt_end(model, norms)
    return Network(model, norms, tuple(units), trunk=tuple(trunk))


def model_names() -> list[str]:
    """Return timm's names of the models that `adapt` takes."""
    return timm_names("eva")


def describe(model: Eva, family: str) -> Architecture:
    """Describe a model, see `adfq.adapters.describe`.

    Args:
        model: timm's Eva, not adapted.
        family: qualified name of the supported class.
    """
    arguments: dict[str, Any] = {
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "class_token": model.cls_token is not None,
        "num_reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "no_embed_class": model.no_embed_class,
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_pre_transformer_norm": is_present(model.norm_pre),
        "use_post_transformer_norm": is_present(model.norm),
        "use_fc_norm": is_present(model.fc_norm),
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
        "head_init_scale": model.head_init_scale,
        **_describe_rope(model.rope),
    }
    for block in model.blocks[:1]:
        arguments |= _describe_block(block, model.embed_dim)
    attentions: list[Any] = [block.attn for block in model.blocks]
    heads = tuple(getattr(attention, "num_kv_heads", None) for attention in attentions)
    if None not in heads and not arguments.get("use_post_norm"):
        arguments["num_kv_heads"] = heads
    if model.attn_pool is not None:
        arguments["attn_pool_num_heads"] = model.attn_pool.num_heads
        arguments["attn_pool_mlp_ratio"] = hidden_ratio(len(model.attn_pool.mlp.fc1.weight), model.embed_dim)
    known = inspect.signature(Eva).parameters  # older versions of timm have fewer
    return describe_timm(model, family, {name: value for name, value in arguments.items() if name in known})


def _describe_block(block: Any, width: int) -> dict[str, Any]:
    attention, mlp = block.attn, block.mlp
    first = attention.q_proj if attention.qkv is None else attention.qkv
    gammas = [getattr(block, name, None) is not None for name in ("gamma_1", "gamma_2")]
    return {
        "num_heads": attention.num_heads,
        "attn_type": "rope" if isinstance(attention, AttentionRope) else "eva",
        "qkv_fused": attention.qkv is not None,
        "qkv_bias": first.bias is not None or getattr(attention, "q_bias", None) is not None,
        "qk_norm": is_present(attention.q_norm),
        "scale_attn_inner": is_present(attention.norm),
        "rope_rotate_half": attention.rotate_half,
        "use_post_norm": isinstance(block, EvaBlockPostNorm),
        "init_values": 1.0 if gammas[0] else None,  # any will do, the scales are weights
        "attn_only_layer_scale": gammas == [True, False],
        "mlp_ratio": hidden_ratio(mlp.fc2.weight.shape[1], width),
        "scale_mlp": is_present(mlp.norm),
        "swiglu_mlp": isinstance(mlp, (GluMlp, SwiGLU)),
        "swiglu_align_to": int(isinstance(mlp, SwiGLU)),  # 1 keeps the width, and 0 may make a GluMlp
    }


_ROPES = {
    "RotaryEmbedding": "base",
    "RotaryEmbeddingCat": "cat",
    "RotaryEmbeddingMixed": "mixed",
    "RotaryEmbeddingDinoV3": "dinov3",
    "RotaryEmbeddingMRope": "mrope",
}


def _describe_rope(rope: Any) -> dict[str, Any]:
    if rope is None:
        return {"use_rot_pos_emb": False}
    described: dict[str, Any] = {"use_rot_pos_emb": True, "rope_type": _ROPES.get(type(rope).__name__)}
    for name in ("temperature", "grid_offset", "grid_indexing", "shift_coords", "jitter_coords", "rescale_coords"):
        if hasattr(rope, name):
            described[f"rope_{name}"] = getattr(rope, name)
    if hasattr(rope, "mrope_section"):
        described["rope_mrope_section"] = tuple(rope.mrope_section)
    reference = getattr(rope, "ref_feat_shape", None)
    described["ref_feat_shape"] = None if reference is None else tuple(reference)
    return described


def create(architecture: Architecture) -> nn.Module:
    """Build a model, see `adfq.adapters.create`.

    Args:
        architecture: from `describe`.

    Raises:
        AdfqError: for a description that cannot be built.
    """
    return create_timm(architecture, Eva)
