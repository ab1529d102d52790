"""Adapter of timm's VisionTransformer: ViT, DeiT (distilled too), and other models of that class."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import Attention, GluMlp, HybridEmbed, Mlp, SwiGLU
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, LayerScale, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from adfq.adapters import Architecture, replace, replace_attention
from adfq.adapters.timm_factory import create_timm, describe_timm, hidden_ratio, is_present, timm_names
from adfq.adapters.timm_parts import adapt_end, adapt_mlp, pair_attention
from adfq.adapters.timm_streams import heads_of_vit, stream_of_vit
from adfq.errors import AdfqError
from adfq.layers import QuantLinear, QuantMatMul
from adfq.plain import keeps_forward
from adfq.sites import Network


class QuantAttention(nn.Module):
    """timm's Attention with its two matrix products made explicit, in place of fused attention.

    Input and output B×N×C.

    Args:
        attention: module to replace, whose parameters are shared.
        role: site role of the layers that read the input; ``"qkv"`` by default.
    """

    def __init__(self, attention: Attention, role: str = "qkv") -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = attention.num_heads, attention.head_dim, attention.scale
        self.qkv = QuantLinear(attention.qkv, role, parts=3)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.scores = QuantMatMul(("query", "key"), transpose_right=True)
        self.softmax = nn.Softmax(dim=-1)
        self.attn_drop = attention.attn_drop
        self.context = QuantMatMul(("probs", "value"))
        self.norm = attention.norm
        self.gate = None if attention.gate is None else QuantLinear(attention.gate, role, parts=1)
        self.proj = QuantLinear(attention.proj, "proj")
        self.proj_drop = attention.proj_drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return attention of tokens to each other: B×N×C.

        Args:
            x: B×N×C.
            attn_mask: mask of pairs of tokens; None, the default, for none.
            is_causal: True to mask later tokens; False by default.
        """
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = self.scores(self.q_norm(query), self.k_norm(key)).mul_(self.scale)
        scores = maybe_add_mask(scores, resolve_self_attn_mask(tokens, scores, attn_mask, is_causal))
        probs = self.softmax(scores)
        del scores  # as large as what is still to come
        context = self.context(self.attn_drop(probs), value)
        context = self.norm(context.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))
        if self.gate is not None:
            context = context * self.gate(x).sigmoid()
        output: Tensor = self.proj_drop(self.proj(context))
        return output


def adapt(model: nn.Module) -> Network:
    """Adapt a model, see `adfq.adapters.adapt`.

    Args:
        model: timm's VisionTransformer.

    Raises:
        AdfqError: for a block with another attention than timm's Attention, and for a hybrid with a convolutional
            network before the patches.
    """
    if isinstance(embed := model.get_submodule("patch_embed"), HybridEmbed):
        network = type(embed.backbone).__name__
        raise AdfqError(f"patch_embed: cannot quantize a HybridEmbed, a {network} between image and patches")
    replace(model, "patch_embed.proj", "patch_embed")
    norms: dict[str, nn.LayerNorm] = {}
    modules = ["patch_embed"]
    for index, block in enumerate(model.get_submodule("blocks").children()):
        name = f"blocks.{index}"
        if not any(isinstance(module, Attention) for module in block.modules()):
            raise AdfqError(
                f"{name}: cannot quantize a {type(block).__name__}, whose attention is not timm's Attention"
            )
        modules += adapt_block(model, name, norms)
    modules += adapt_end(model, norms)
    blocks = (f"blocks.{index}" for index in range(len(model.get_submodule("blocks"))))  # type: ignore[arg-type]
    stream = stream_of_vit(model)
    return Network(
        model,
        norms,
        tuple(modules),
        trunk=("patch_embed", *blocks),
        streams=() if isinstance(stream, str) else (stream,),
        heads=heads_of_vit(model),
        unrotated={"blocks": stream} if isinstance(stream, str) else {},
    )


def adapt_block(model: nn.Module, block_name: str, norms: dict[str, nn.LayerNorm]) -> list[str]:
    """Replace the layers of a block in place, and return the names of its attentions and MLPs.

    Args:
        model: model with the block.
        block_name: name of the block, a timm Block or a variant of it.
        norms: LayerNorms by the name of a reader; those of the block are added.

    Raises:
        AdfqError: for an attention that computes its own way.
    """
    block = model.get_submodule(block_name)
    modules = []
    for relative, module in list(block.named_modules()):
        name = f"{block_name}.{relative}"
        post_norm = isinstance(model.get_submodule(name.rpartition(".")[0]), ResPostBlock)
        if isinstance(module, Attention):
            linears = ("qkv", "proj") if module.gate is None else ("qkv", "proj", "gate")
            make = partial(QuantAttention, role="residual" if post_norm else "qkv")
            replace_attention(model, name, Attention, make, linears)
            pair_attention(model, name, norms, _norm_before(model, name))
        elif isinstance(module, (Mlp, GluMlp, SwiGLU)):
            adapt_mlp(model, name, "residual" if post_norm else "fc1", norms, _norm_before(model, name))
        else:
            continue
        modules.append(name)
    return modules


def _norm_before(model: nn.Module, name: str) -> nn.Module | None:
    """Return the norm right before a sub-block: in timm's Block, and in the Sequentials of its ParallelThingsBlock."""
    parent_name, _, child = name.rpartition(".")
    parent: Any = model.get_submodule(parent_name)
    norm: nn.Module | None = None  # post-norm blocks have none
    if keeps_forward(parent, Block):
        norm = {"attn": parent.norm1, "mlp": parent.norm2}.get(child)
    elif type(parent) is nn.Sequential and keeps_forward(parent, nn.Sequential):
        norm = getattr(parent, "norm", None)
    return norm


# Blocks that compute attention and MLP from one projection, or differential attention.
_OWN_ATTENTION = ("vit_*_xp_*", "vit_dlittle_*", "vit_dpwee_*", "vit_dwee_*", "vit_pwee_*")


def model_names() -> list[str]:
    """Return timm's names of the models that `adapt` takes."""
    return timm_names("vision_transformer", "deit", refused=_OWN_ATTENTION)


def describe(model: VisionTransformer, family: str) -> Architecture:
    """Describe a model, see `adfq.adapters.describe`.

    Args:
        model: timm's VisionTransformer, not adapted.
        family: qualified name of the supported class.
    """
    arguments: dict[str, Any] = {
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "class_token": model.has_class_token,
        "reg_tokens": model.num_reg_tokens,
        "no_embed_class": model.no_embed_class,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "pre_norm": is_present(model.norm_pre),
        "fc_norm": is_present(model.fc_norm),
        "final_norm": is_present(model.norm) or is_present(model.fc_norm),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
    }
    modules = list(model.blocks.modules())
    for attention in (module for module in modules if isinstance(module, Attention)):
        arguments |= {
            "num_heads": attention.num_heads,
            "qkv_bias": attention.qkv.bias is not None,
            "proj_bias": attention.proj.bias is not None,
            "qk_norm": is_present(attention.q_norm),
            "scale_attn_norm": is_present(attention.norm),
        }
        break
    for mlp in (module for module in modules if isinstance(module, (Mlp, GluMlp, SwiGLU))):
        first = mlp.fc1_g if isinstance(mlp, SwiGLU) else mlp.fc1
        arguments["mlp_ratio"] = hidden_ratio(len(first.weight), model.embed_dim)
        arguments["scale_mlp_norm"] = is_present(mlp.norm)
        break
    if any(isinstance(module, LayerScale) for module in modules):
        arguments["init_values"] = 1.0  # any will do, the scales are weights
    return describe_timm(model, family, arguments)


def create(architecture: Architecture) -> nn.Module:
    """Build a model, see `adfq.adapters.create`.

    Args:
        architecture: from `describe`.

    Raises:
        AdfqError: for a description that cannot be built.
    """
    return create_timm(architecture, VisionTransformer, VisionTransformerDistilled)
