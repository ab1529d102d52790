"""timm's SwinTransformer."""

from __future__ import annotations

from typing import Any, cast

from timm.layers import to_2tuple
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from adfq.adapters import Architecture, pair, replace
from adfq.adapters.timm_factory import create_timm, describe_timm
from adfq.layers import QuantLinear, QuantMatMul
from adfq.sites import Network


class QuantWindowAttention(nn.Module):
    """timm's WindowAttention with its two matrix products made explicit.

    Input and output (windows·B)×N×C, N tokens a window; the mask windows×N×N keeps shifted windows apart.
    """

    relative_position_index: Tensor

    def __init__(self, attention: WindowAttention) -> None:
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
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        scores = self.scores(query * self.scale, key) + bias
        if mask is not None:
            windows = scores.view(-1, len(mask), self.num_heads, tokens, tokens) + mask[:, None]
            scores = windows.view(-1, self.num_heads, tokens, tokens)
        context = self.context(self.attn_drop(self.softmax(scores)), value)
        output: Tensor = self.proj_drop(self.proj(context.transpose(1, 2).reshape(batch, tokens, -1)))
        return output


def adapt(model: nn.Module) -> Network:
    """See `adfq.adapters.adapt`."""
    replace(model, "patch_embed.proj", "patch_embed")
    norms: dict[str, nn.LayerNorm] = {}
    modules = ["patch_embed"]
    for name, module in list(model.named_modules()):
        if isinstance(module, PatchMerging):
            replace(model, f"{name}.reduction", "reduction")
            modules.append(name)
            pair(norms, f"{name}.reduction", module.norm)
        elif isinstance(module, SwinTransformerBlock):
            model.set_submodule(f"{name}.attn", QuantWindowAttention(module.attn))
            replace(model, f"{name}.mlp.fc1", "fc1")
            replace(model, f"{name}.mlp.fc2", "fc2")
            modules += [f"{name}.attn", f"{name}.mlp"]
            # Windows that the input does not fill are padded with zeros after the norm; those are not its output.
            if not any(
                size % window
                for size, window in zip(to_2tuple(module.input_resolution), module.window_size, strict=True)
            ):
                pair(norms, f"{name}.attn.qkv", module.norm1)
            pair(norms, f"{name}.mlp.fc1", module.norm2)
    if isinstance(model.get_submodule("head.fc"), nn.Linear):
        replace(model, "head.fc", "head")
        modules.append("head.fc")
    return Network(model, norms, tuple(modules))


def describe(model: SwinTransformer, family: str) -> Architecture:
    """See `adfq.adapters.describe`."""
    stages: list[Any] = [stage.get_submodule("blocks.0") for stage in model.layers]
    arguments: dict[str, Any] = {
        "embed_dim": model.embed_dim,
        "depths": tuple(stage.depth for stage in model.layers),
        "num_heads": tuple(block.attn.num_heads for block in stages),
        "head_dim": tuple(len(block.attn.qkv.weight) // 3 // block.attn.num_heads for block in stages),
        "window_size": _unless_alike([tuple(block.window_size) for block in stages]),
        "mlp_ratio": tuple(block.mlp_ratio for block in stages),
        "qkv_bias": stages[0].attn.qkv.bias is not None,
        "always_partition": stages[0].always_partition,
        "strict_img_size": model.patch_embed.strict_img_size,
    }
    return describe_timm(model, family, arguments)


def create(architecture: Architecture) -> nn.Module:
    """See `adfq.adapters.create`."""
    return create_timm(architecture, SwinTransformer)


def _unless_alike(values: list[Any]) -> Any:
    # Not every version of timm takes a window for each stage.
    return values[0] if len(set(values)) == 1 else tuple(values)
