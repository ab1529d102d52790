"""Adapter of segment_anything's Sam, with image encoder and mask decoder quantized, and of its image encoder alone."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.image_encoder import Attention as EncoderAttention
from segment_anything.modeling.image_encoder import (
    Block,
    PatchEmbed,
    add_decomposed_rel_pos,
    window_partition,
    window_unpartition,
)
from segment_anything.modeling.transformer import Attention as DecoderAttention
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.adapters import mobile_sam, pair, replace, replace_attention
from adfq.adapters.mobile_sam import listed
from adfq.adapters.sam_factory import create as create
from adfq.adapters.sam_factory import describe as describe
from adfq.errors import AdfqError
from adfq.layers import QuantLinear, QuantMatMul
from adfq.plain import keeps_forward
from adfq.sites import Network
from adfq.streams import Heads, Stream

#: Number of boxes, and of points, for each image.
_PROMPTS = 2


class QuantEncoderAttention(nn.Module):
    """Attention of SAM's image encoder with its windows, and with its two matrix products made explicit.

    Input and output B×H×W×C. Windows that the feature map does not fill are padded.

    Args:
        attention: module to replace, whose parameters are shared.
        window_size: side of a window in tokens; 0 for attention over everything.

    Attributes:
        window_size: side of a window in tokens; 0 for attention over everything.
        padding: C, the padding's tokens; 0 until a method transforms the input.
    """

    padding: Tensor

    def __init__(self, attention: EncoderAttention, window_size: int) -> None:
        super().__init__()
        self.window_size, self.num_heads, self.scale = window_size, attention.num_heads, attention.scale
        self.qkv = QuantLinear(attention.qkv, "qkv", fixed_positions=window_size > 0)
        self.rel_pos_h = attention.rel_pos_h if attention.use_rel_pos else None
        self.rel_pos_w = attention.rel_pos_w if attention.use_rel_pos else None
        self.scores = QuantMatMul(("query", "key"), transpose_right=True)
        self.softmax = nn.Softmax(dim=-1)
        self.context = QuantMatMul(("probs", "value"))
        self.proj = QuantLinear(attention.proj, "proj")
        self.register_buffer("padding", attention.qkv.weight.new_zeros(attention.qkv.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return attention within windows: B×H×W×C.

        Args:
            x: B×H×W×C.
        """
        if not self.window_size:
            return self._attend(x)
        height, width = x.shape[1:3]
        margins = (0, 0, 0, -width % self.window_size, 0, -height % self.window_size)
        inside = F.pad(x.new_ones(height, width, 1), margins)
        windows, padded = window_partition(F.pad(x, margins) + (1 - inside) * self.padding, self.window_size)
        merged: Tensor = window_unpartition(self._attend(windows), self.window_size, padded, (height, width))
        return merged

    def _attend(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = self.scores(query * self.scale, key)
        if self.rel_pos_h is not None:
            scores = add_decomposed_rel_pos(
                scores.flatten(0, 1), query.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, *[(height, width)] * 2
            ).unflatten(0, (batch, self.num_heads))
        probs = self.softmax(scores)
        del scores  # as large as what is still to come
        context = self.context(probs, value)
        output: Tensor = self.proj(context.transpose(1, 2).reshape(batch, height, width, -1))
        return output


class QuantDecoderAttention(nn.Module):
    """Attention of SAM's mask decoder, to itself or across, with its two matrix products made explicit.

    Queries B×N×C, keys and values B×M×C, output B×N×C.

    Args:
        attention: module to replace, whose parameters are shared.
    """

    def __init__(self, attention: DecoderAttention) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, math.sqrt(attention.internal_dim / attention.num_heads)
        self.q_proj = QuantLinear(attention.q_proj, "in_proj", fixed_positions=False)
        self.k_proj = QuantLinear(attention.k_proj, "in_proj", fixed_positions=False)
        self.v_proj = QuantLinear(attention.v_proj, "in_proj", fixed_positions=False)
        self.scores = QuantMatMul(("query", "key"), transpose_right=True)
        self.softmax = nn.Softmax(dim=-1)
        self.context = QuantMatMul(("probs", "value"))
        self.out_proj = QuantLinear(attention.out_proj, "proj", fixed_positions=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention from queries to keys: B×N×C.

        Args:
            q: queries, B×N×C.
            k: keys, B×M×C.
            v: values, B×M×C.
        """
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        scores = self.scores(query, key) / self.scale
        probs = self.softmax(scores)
        del scores  # as large as what is still to come
        context = self.context(probs, value)
        output: Tensor = self.out_proj(context.transpose(1, 2).flatten(2))
        return output


def adapt(model: nn.Module) -> Network:
    """Adapt a Sam or its image encoder, see `adfq.adapters.adapt`.

    Transposed convolutions and the product of mask tokens and image, whose result is the masks, stay in floating point.

    Args:
        model: segment_anything's Sam or ImageEncoderViT.

    Raises:
        AdfqError: for a Sam with an unknown image encoder.
    """
    if isinstance(model, ImageEncoderViT):
        return _adapt_encoder(model)
    encoder = model.get_submodule("image_encoder")
    if isinstance(encoder, ImageEncoderViT):
        network = _adapt_encoder(encoder)
    elif isinstance(encoder, mobile_sam.MobileSamEncoder):
        network = mobile_sam.adapt(encoder)
    else:
        raise AdfqError(f"cannot quantize a Sam whose image encoder is a {type(encoder).__name__}")
    modules = [f"image_encoder.{name}" for name in network.units] + _adapt_decoder(model)
    return Network(
        model,
        {f"image_encoder.{name}": norm for name, norm in network.input_norms.items()},
        tuple(modules),
        input_paddings={f"image_encoder.{name}": padding for name, padding in network.input_paddings.items()},
        trunk=tuple(f"image_encoder.{name}" for name in network.trunk),
        forward_all=segment_densely,
        excluded=("prompt_encoder.*",),
        streams=tuple(stream.within("image_encoder.") for stream in network.streams),
        heads=tuple(heads.within("image_encoder.") for heads in network.heads),
        unrotated={f"image_encoder.{name}": reason for name, reason in network.unrotated.items()},
    )


def _adapt_encoder(encoder: Any) -> Network:
    replace(encoder, "patch_embed.proj", "patch_embed", fixed_positions=False)
    norms: dict[str, nn.LayerNorm] = {}
    paddings: dict[str, Tensor] = {}
    modules, trunk = ["patch_embed"], ["patch_embed"]
    for index, block in enumerate(encoder.blocks):
        name = f"blocks.{index}"
        if not keeps_forward(block, Block):
            raise AdfqError(f"{name}: cannot quantize a {type(block).__name__} with a forward of its own")
        make = partial(QuantEncoderAttention, window_size=block.window_size)
        replace_attention(encoder, f"{name}.attn", EncoderAttention, make)
        block.window_size = 0  # the attention sees to its windows
        replace(encoder, f"{name}.mlp.lin1", "fc1", fixed_positions=False)
        replace(encoder, f"{name}.mlp.lin2", "fc2", fixed_positions=False)
        modules += [f"{name}.attn", f"{name}.mlp"]
        trunk.append(name)
        pair(norms, f"{name}.attn.qkv", block.norm1)
        if keeps_forward(block.mlp, MLPBlock) and not block.mlp._forward_pre_hooks:
            pair(norms, f"{name}.mlp.lin1", block.norm2)
        paddings[f"{name}.attn.qkv"] = block.attn.padding
    modules.append(neck := mobile_sam.adapt_neck(encoder))
    stream = _stream(encoder)
    return Network(
        encoder,
        norms,
        tuple(modules),
        input_paddings=paddings,
        trunk=(*trunk, neck),
        forward_all=listed,
        streams=() if isinstance(stream, str) else (stream,),
        heads=tuple(_heads(name, block.attn) for name, block in zip(trunk[1:], encoder.blocks, strict=True)),
        unrotated={"blocks": stream} if isinstance(stream, str) else {},
    )


def _stream(encoder: Any) -> Stream | str:
    """Return the residual stream of an encoder, which its neck reads without a norm, or why it cannot be rotated."""
    own = ((encoder, ImageEncoderViT), (encoder.patch_embed, PatchEmbed), *((b.mlp, MLPBlock) for b in encoder.blocks))
    for module, cls in own:
        if type(module) is not cls or not keeps_forward(module, cls):
            return f"a {type(module).__name__} may read the stream its own way"
    names = [f"blocks.{index}" for index in range(len(encoder.blocks))]
    writers = ["patch_embed.proj", *(f"{name}.{layer}" for name in names for layer in ("attn.proj", "mlp.lin2"))]
    norms = {f"{name}.norm1": (f"{name}.attn.qkv",) for name in names}
    norms |= {f"{name}.norm2": (f"{name}.mlp.lin1",) for name in names}
    width = encoder.patch_embed.proj.out_channels
    tokens = () if encoder.pos_embed is None else ("pos_embed",)
    return Stream("blocks", width, dict.fromkeys(writers, ""), norms, ("neck.0",), tokens)


def _heads(block: str, attention: Any) -> Heads:
    positions = () if attention.rel_pos_h is None else (f"{block}.attn.rel_pos_h", f"{block}.attn.rel_pos_w")
    layers = f"{block}.attn.qkv", f"{block}.attn.proj"
    return Heads(f"{block}.attn", *layers, attention.num_heads, positions=positions)


def _adapt_decoder(model: nn.Module) -> list[str]:
    """Replace the layers of the mask decoder, and return the names of its units of reconstruction.

    No LayerNorm is paired: tokens go on with its output, around the next layer.
    """
    modules = []
    for name, module in list(model.get_submodule("mask_decoder").named_modules(prefix="mask_decoder")):
        if isinstance(module, DecoderAttention):
            linears = ("q_proj", "k_proj", "v_proj", "out_proj")
            replace_attention(model, name, DecoderAttention, QuantDecoderAttention, linears)
        elif isinstance(module, TwoWayAttentionBlock):
            replace(model, f"{name}.mlp.lin1", "fc1", fixed_positions=False)
            replace(model, f"{name}.mlp.lin2", "relu", fixed_positions=False)
            parts = ("self_attn", "cross_attn_token_to_image", "mlp", "cross_attn_image_to_token")
            modules += [f"{name}.{part}" for part in parts]
    modules.append("mask_decoder.transformer.final_attn_token_to_image")
    decoder: Any = model.get_submodule("mask_decoder")
    heads = [f"output_hypernetworks_mlps.{index}" for index in range(decoder.num_mask_tokens)]
    for head in (*heads, "iou_prediction_head"):
        for index in range(len(decoder.get_submodule(head).layers)):
            replace(decoder, f"{head}.layers.{index}", "head", fixed_positions=False)
        modules.append(f"mask_decoder.{head}")
    return modules


@torch.no_grad()
def _embed_prompts(sam: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return sparse and dense embeddings of a few boxes and points for each image, an image's prompts side by side.

    Prompts are drawn at random in the part of an image that is not padding, from a seed that is the image's own.
    Weights would be rounded for the prompts at hand if all images had the same ones.
    """
    sparse, dense = [], []
    for image in images:
        filled = image.any(0)
        size = torch.stack([filled.any(0).sum(), filled.any(1).sum()]).cpu()  # width, height
        generator = torch.Generator().manual_seed(int(image.contiguous().view(torch.int32).sum()) % 2**63)
        corners = torch.rand(3 * _PROMPTS, 2, generator=generator) * size
        ends = corners[_PROMPTS:].view(2, _PROMPTS, 2)
        boxes = torch.cat([ends.amin(0), ends.amax(0)], 1).to(image.device)
        points = corners[:_PROMPTS, None].to(image.device)
        labels = torch.ones(points.shape[:2], device=image.device)
        for prompts in ({"points": None, "boxes": boxes}, {"points": (points, labels), "boxes": None}):
            embedded = sam.prompt_encoder(**prompts, masks=None)
            sparse.append(embedded[0])
            dense.append(embedded[1])
    return torch.cat(sparse), torch.cat(dense)


def segment_densely(sam: Any, images: Tensor) -> list[Tensor]:
    """Run images through image encoder and mask decoder, with boxes and points drawn at random.

    Args:
        sam: segment_anything's Sam.
        images: B×3×S×S, preprocessed.

    Returns:
        Mask logits, (4·B)×masks×h×w, and predicted IoU, (4·B)×masks.
    """
    embeddings = sam.image_encoder(images)
    sparse, dense = _embed_prompts(sam, images)
    rows = embeddings.repeat_interleave(len(sparse) // len(images), 0)
    return list(decode(sam.mask_decoder, rows, sam.prompt_encoder.get_dense_pe(), sparse, dense))


def decode(decoder: Any, embeddings: Tensor, positions: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask decoder's predictions for prompts that have an image each.

    Args:
        decoder: segment_anything's MaskDecoder, whose own forward pass takes one image.
        embeddings: P×C×h×w, of the prompts' images.
        positions: 1×C×h×w, the dense positional encoding.
        sparse: P×N×C, embedded points and boxes of the prompts.
        dense: P×C×h×w, embedded masks of the prompts.

    Returns:
        Mask logits, P×masks×4h×4w, and predicted IoU, P×masks, of all masks.
    """
    prompts = len(sparse)
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])[None].expand(prompts, -1, -1)
    states, image = decoder.transformer(
        embeddings + dense, positions.expand(prompts, -1, -1, -1), torch.cat([tokens, sparse], 1)
    )
    upscaled = decoder.output_upscaling(image.mT.reshape(embeddings.shape))
    mask_states = states[:, 1 : 1 + decoder.num_mask_tokens].unbind(1)
    kernels = [mlp(state) for mlp, state in zip(decoder.output_hypernetworks_mlps, mask_states, strict=True)]
    masks = (torch.stack(kernels, 1) @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
    return masks, decoder.iou_prediction_head(states[:, 0])
