"""Adapter of timm's two implementations of Swin Transformer V2: SwinTransformerV2 and SwinTransformerV2Cr."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block, WindowAttention
from timm.models.swin_transformer_v2_cr import PatchMerging as NormFirstMerging
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr, SwinTransformerV2CrBlock, WindowMultiHeadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.adapters import Architecture, pair, qualified_name, replace, replace_attention
from adfq.adapters.timm_factory import create_timm, describe_timm, hidden_ratio, is_present, timm_names
from adfq.adapters.timm_swin import window_sizes
from adfq.layers import QuantLinear, QuantMatMul
from adfq.plain import keeps_forward
from adfq.sites import Network


class QuantCosineAttention(nn.Module):
    """timm's WindowAttention of Swin V2 with its two matrix products made explicit.

    Normalized queries and keys are the operands of the first product. Logit scale and position bias are applied to the
    product in full precision.

    Input and output (windows·B)×N×C with N tokens a window.

    Args:
        attention: module to replace, whose parameters are shared.

    Attributes:
        shared_arguments: keyword arguments that are the same for all images.
    """

    shared_arguments = ("mask",)
    k_bias: Tensor | None
    relative_coords_table: Tensor
    relative_position_index: Tensor

    def __init__(self, attention: WindowAttention) -> None:
        super().__init__()
        self.cpb_mlp = attention.cpb_mlp
        self._share(attention)
        self.q_bias, self.v_bias = attention.q_bias, attention.v_bias
        for name in ("k_bias", "relative_coords_table", "relative_position_index"):
            self.register_buffer(name, cast("Tensor | None", getattr(attention, name)), persistent=False)

    def _share(self, attention: WindowAttention | WindowMultiHeadAttention) -> None:
        """Take over the parts that both of timm's implementations have."""
        self.num_heads = attention.num_heads
        self.logit_scale = attention.logit_scale
        self.qkv = QuantLinear(attention.qkv, "residual", parts=3)
        self.scores = QuantMatMul(("query", "key"), transpose_right=True)
        self.softmax = nn.Softmax(dim=-1)
        self.attn_drop = attention.attn_drop
        self.context = QuantMatMul(("probs", "value"))
        self.proj = QuantLinear(attention.proj, "proj")
        self.proj_drop = attention.proj_drop

    def _project(self, x: Tensor) -> Tensor:
        """Return queries, keys and values side by side: (windows·B)×N×3C."""
        qkv: Tensor = self.qkv(x)
        return qkv if self.k_bias is None else qkv + torch.cat((self.q_bias, self.k_bias, self.v_bias))

    def _position_bias(self) -> Tensor:
        """Return the bias of each pair of positions: heads×N×N."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * torch.sigmoid(table[self.relative_position_index]).permute(2, 0, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return attention within each window: (windows·B)×N×C.

        Args:
            x: (windows·B)×N×C.
            mask: windows×N×N, added to scores, which keeps parts of shifted windows apart; None, the default, for none.
        """
        batch, tokens, _ = x.shape
        qkv = self._project(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scale = self.logit_scale.clamp(max=math.log(100)).exp().view(-1, 1, 1)
        scores = self.scores(F.normalize(query, dim=-1), F.normalize(key, dim=-1)) * scale + self._position_bias()
        if mask is not None:
            scores = scores.unflatten(0, (-1, len(mask))) + mask[:, None]
            scores = scores.flatten(0, 1)
        probs = self.softmax(scores)
        del scores  # as large as what is still to come
        context = self.context(self.attn_drop(probs), value)
        output: Tensor = self.proj_drop(self.proj(context.transpose(1, 2).reshape(batch, tokens, -1)))
        return output


class QuantCrCosineAttention(QuantCosineAttention):
    """timm's WindowMultiHeadAttention of SwinTransformerV2Cr, which has another position bias.

    Args:
        attention: module to replace, whose parameters are shared.
    """

    relative_coordinates_log: Tensor

    def __init__(self, attention: WindowMultiHeadAttention) -> None:
        nn.Module.__init__(self)
        self._share(attention)
        self.meta_mlp = attention.meta_mlp
        self.k_bias = None
        self.register_buffer(
            "relative_coordinates_log", cast(Tensor, attention.relative_coordinates_log), persistent=False
        )

    def _position_bias(self) -> Tensor:
        bias: Tensor = self.meta_mlp(self.relative_coordinates_log)
        return bias.t().reshape(self.num_heads, math.isqrt(len(bias)), -1)


#: Attention and its replacement, by the class of blocks.
_ATTENTIONS: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    SwinTransformerV2Block: (WindowAttention, QuantCosineAttention),
    SwinTransformerV2CrBlock: (WindowMultiHeadAttention, QuantCrCosineAttention),
}


def adapt(model: nn.Module) -> Network:
    """Adapt a model, see `adfq.adapters.adapt`.

    The MLPs of position biases depend on no image and stay in full precision.

    Args:
        model: timm's SwinTransformerV2 or SwinTransformerV2Cr.
    """
    replace(model, "patch_embed.proj", "patch_embed")
    norms: dict[str, nn.LayerNorm] = {}
    modules, trunk = ["patch_embed"], ["patch_embed"]
    for name, module in list(model.named_modules()):
        if isinstance(module, (SwinTransformerV2Block, SwinTransformerV2CrBlock)):
            kind = SwinTransformerV2Block if isinstance(module, SwinTransformerV2Block) else SwinTransformerV2CrBlock
            attention, replacement = _ATTENTIONS[kind]
            replace_attention(model, f"{name}.attn", attention, replacement)
            replace(model, f"{name}.mlp.fc1", "residual")
            replace(model, f"{name}.mlp.fc2", "fc2")
            modules += [f"{name}.attn", f"{name}.mlp"]
            trunk.append(name)
        elif name.endswith(".downsample") and is_present(module):
            norm_first = keeps_forward(module, NormFirstMerging)
            replace(model, f"{name}.reduction", "reduction" if norm_first else "residual")
            modules.append(name)
            trunk.append(name)
            if norm_first:
                pair(norms, f"{name}.reduction", module.get_submodule("norm"))
    if isinstance(model.get_submodule("head.fc"), nn.Linear):
        replace(model, "head.fc", "head")
        modules.append("head.fc")
    excluded = ("*.attn.cpb_mlp.*", "*.attn.meta_mlp.*")
    return Network(model, norms, tuple(modules), trunk=tuple(trunk), excluded=excluded)


def model_names() -> list[str]:
    """Return timm's names of the models that `adapt` takes."""
    return timm_names("swin_transformer_v2", "swin_transformer_v2_cr")


def describe(model: Any, family: str) -> Architecture:
    """Describe a model, see `adfq.adapters.describe`.

    Args:
        model: timm's SwinTransformerV2 or SwinTransformerV2Cr, not adapted.
        family: qualified name of the supported class.
    """
    stages = [list(stage.blocks) for stage in (model.layers if hasattr(model, "layers") else model.stages)]
    first: list[Any] = [blocks[0] for blocks in stages]
    arguments: dict[str, Any] = {
        "embed_dim": first[0].dim,
        "depths": tuple(map(len, stages)),
        "num_heads": tuple(block.attn.num_heads for block in first),
        "always_partition": first[0].always_partition,
        "strict_img_size": model.patch_embed.strict_img_size,
        "mlp_ratio": hidden_ratio(len(first[0].mlp.fc1.weight), first[0].dim),
    }
    if isinstance(model, SwinTransformerV2):
        arguments["window_size"] = window_sizes(first, [block.input_resolution for block in first])
        arguments["qkv_bias"] = first[0].attn.q_bias is not None
        arguments["pretrained_window_sizes"] = tuple(block.attn.pretrained_window_size for block in first)
    else:
        arguments["patch_size"] = model.patch_size  # a number, or one for each direction
        arguments["window_size"] = window_sizes(first, [block.feat_size for block in first])
        arguments |= _extra_norms([[is_present(block.norm3) for block in blocks] for blocks in stages])
    return describe_timm(model, family, arguments)


def create(architecture: Architecture) -> nn.Module:
    """Build a model, see `adfq.adapters.create`.

    Args:
        architecture: from `describe`.

    Raises:
        AdfqError: for a description that cannot be built.
    """
    families = {qualified_name(cls): cls for cls in (SwinTransformerV2, SwinTransformerV2Cr)}
    return create_timm(architecture, families[architecture.family])


def _extra_norms(stages: list[list[bool]]) -> dict[str, Any]:
    """Return the arguments of timm that give blocks a third norm.

    Args:
        stages: truth values by block, by stage.
    """
    *others, last = stages
    at_end = bool(others) and all(blocks[-1] for blocks in others)
    for period in range(max(map(len, stages)) + 1):
        expected = [[period > 0 and (index + 1) % period == 0 for index in range(len(blocks))] for blocks in stages]
        for blocks in expected if at_end else expected[-1:]:
            blocks[-1] = True
        if expected == [*others, last]:
            return {"extra_norm_period": period, "extra_norm_stage": at_end}
    return {}
