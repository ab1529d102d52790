"""timm's SwinTransformer."""

from __future__ import annotations

from typing import cast

from timm.layers import to_2tuple
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from adfq.adapters import pair, replace
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
        context = self.context(self.attn_drop(scores.softmax(dim=-1)), value)
        output: Tensor = self.proj_drop(self.proj(context.transpose(1, 2).reshape(batch, tokens, -1)))
        return output


def adapt(model: nn.Module) -> Network:
    """See `adfq.adapters.adapt`."""
    replace(model, "patch_embed.proj", "patch_embed")
    norms: dict[str, nn.LayerNorm] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PatchMerging):
            replace(model, f"{name}.reduction", "reduction")
            pair(norms, f"{name}.reduction", module.norm)
        elif isinstance(module, SwinTransformerBlock):
            model.set_submodule(f"{name}.attn", QuantWindowAttention(module.attn))
            replace(model, f"{name}.mlp.fc1", "fc1")
            replace(model, f"{name}.mlp.fc2", "fc2")
            # Windows that the input does not fill are padded with zeros after the norm; those are not its output.
            if not any(
                size % window
                for size, window in zip(to_2tuple(module.input_resolution), module.window_size, strict=True)
            ):
                pair(norms, f"{name}.attn.qkv", module.norm1)
            pair(norms, f"{name}.mlp.fc1", module.norm2)
    if isinstance(model.get_submodule("head.fc"), nn.Linear):
        replace(model, "head.fc", "head")
    return Network(model, norms)
