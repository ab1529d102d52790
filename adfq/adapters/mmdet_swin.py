"""Adapter of MMDetection's SwinTransformer, and of any of its detectors with that backbone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace as replace_fields
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.adapters import pair, replace, replace_attention
from adfq.adapters.mmcv_ops import provide_mmcv_ops
from adfq.adapters.mmdet_factory import create as create
from adfq.adapters.mmdet_factory import describe as describe
from adfq.adapters.multihead_attention import QuantMultiheadAttention, can_replace
from adfq.adapters.window_attention import QuantWindowAttention, heads_of_windows
from adfq.errors import AdfqError
from adfq.plain import check_plain, keeps_forward
from adfq.sites import Network
from adfq.streams import Stream

provide_mmcv_ops()

from mmdet.models.backbones.swin import (  # noqa: E402
    FFN,
    ShiftWindowMSA,
    SwinBlock,
    SwinBlockSequence,
    SwinTransformer,
    WindowMSA,
)
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead  # noqa: E402
from mmdet.models.detectors.base import BaseDetector  # noqa: E402
from mmdet.models.layers import PatchMerging  # noqa: E402
from mmdet.models.roi_heads.bbox_heads.bbox_head import BBoxHead  # noqa: E402
from mmdet.models.roi_heads.cascade_roi_head import CascadeRoIHead  # noqa: E402
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import FCNMaskHead  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.bbox import bbox2roi  # noqa: E402

_MASKS = 100  # proposals whose masks are predicted; as many as a single stage does of its own accord


class QuantShiftWindowAttention(ShiftWindowMSA):  # type: ignore[misc]
    """MMDetection's ShiftWindowMSA with a quantizable attention and a value for padding.

    Input and output B×(H·W)×C. Windows that the feature map does not fill are padded.

    Args:
        attention: module to replace, whose parameters are shared; its inner attention is a `QuantWindowAttention`.

    Attributes:
        padding: C, the padding's tokens; 0 until a method transforms the input.
    """

    padding: Tensor

    def __init__(self, attention: ShiftWindowMSA) -> None:
        BaseModule.__init__(self)
        self.window_size, self.shift_size, self.drop = attention.window_size, attention.shift_size, attention.drop
        self.w_msa = attention.w_msa
        self.register_buffer("padding", attention.w_msa.qkv.weight.new_zeros(attention.w_msa.qkv.in_features))

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Return attention within shifted windows: B×(H·W)×C.

        Args:
            query: B×(H·W)×C.
            hw_shape: H and W in tokens.
        """
        batch, _, channels = query.shape
        height, width = hw_shape
        size, shift = self.window_size, self.shift_size
        margins = (0, 0, 0, -width % size, 0, -height % size)
        padded = F.pad(query.view(batch, height, width, channels), margins)
        inside = padded.new_ones(height, width, 1)
        padded = padded + (1 - F.pad(inside, margins)) * self.padding
        shifted = padded.roll((-shift, -shift), (1, 2))
        windows = self.window_partition(shifted).flatten(1, 2)
        windows = self.w_msa(windows, self._mask(padded) if shift else None)
        merged = self.window_reverse(windows.unflatten(1, (size, size)), *padded.shape[1:3])
        output = merged.roll((shift, shift), (1, 2))[:, :height, :width]
        dropped: Tensor = self.drop(output.reshape(batch, height * width, channels))
        return dropped

    def _mask(self, padded: Tensor) -> Tensor:
        """Return a mask to add to scores, windows×N×N, that separates tokens brought together by the shift."""
        regions = padded.new_zeros(1, *padded.shape[1:3], 1)
        for start in (-self.window_size, -self.shift_size):
            regions[:, start:] += 3
            regions[:, :, start:] += 1
        regions = self.window_partition(regions).flatten(1)
        mask: Tensor = (regions[:, None] != regions[:, :, None]).to(padded.dtype) * -100.0
        return mask


def adapt(model: nn.Module) -> Network:
    """Adapt a backbone or detector, see `adfq.adapters.adapt`.

    In a detector every linear and convolution layer of neck and heads is quantized too, as in RepQ-ViT's code.
    Transposed convolutions stay in floating point, there and here. So does the sampling of deformable attention, and a
    MultiheadAttention with extra keys, which is reported.

    Args:
        model: MMDetection's SwinTransformer or a detector with that backbone.

    Raises:
        AdfqError: for a detector with another backbone, and a feed-forward network of other than two layers.
    """
    if not isinstance(model, BaseDetector):
        return _adapt_backbone(model, "")
    if not isinstance(model.backbone, SwinTransformer):
        raise AdfqError(f"cannot quantize a detector whose backbone is a {type(model.backbone).__name__}, not Swin")
    network = _adapt_backbone(model, "backbone.")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention) and can_replace(module):
            replace_attention(model, name, nn.MultiheadAttention, QuantMultiheadAttention, ("out_proj",))
    inside = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    )  # such an attention reads its output layer's weight itself
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith(inside):
            replace(model, name, "neck" if name.startswith("neck.") else "head", fixed_positions=False)
    return replace_fields(network, forward_all=detect_densely)


def _adapt_backbone(model: nn.Module, prefix: str) -> Network:
    replace(model, f"{prefix}patch_embed.projection", "patch_embed", fixed_positions=False)
    norms: dict[str, nn.LayerNorm] = {}
    paddings: dict[str, Tensor] = {}
    modules, trunk = [f"{prefix}patch_embed.projection"], [f"{prefix}patch_embed"]
    for name, module in list(model.named_modules()):
        if not name.startswith(prefix):
            continue
        if isinstance(module, PatchMerging):
            replace(model, f"{name}.reduction", "reduction", fixed_positions=False)
            modules.append(f"{name}.reduction")
            trunk.append(name)
            if keeps_forward(module, PatchMerging):
                pair(norms, f"{name}.reduction", module.norm)
        elif isinstance(module, SwinBlock):
            check_plain(module.attn, ShiftWindowMSA, f"{name}.attn")
            replace_attention(model, f"{name}.attn.w_msa", WindowMSA, QuantWindowAttention)
            attention: Any = QuantShiftWindowAttention(module.attn)
            model.set_submodule(f"{name}.attn", attention)
            if len(module.ffn.layers) != 3:
                raise AdfqError(f"{name}.ffn: cannot quantize an FFN with other than two layers")
            replace(model, f"{name}.ffn.layers.0.0", "fc1", fixed_positions=False)
            replace(model, f"{name}.ffn.layers.1", "fc2", fixed_positions=False)
            modules += [f"{name}.attn", f"{name}.ffn.layers"]
            trunk.append(name)
            if keeps_forward(module, SwinBlock) and keeps_forward(module.ffn, FFN):
                pair(norms, f"{name}.attn.w_msa.qkv", module.norm1)
                pair(norms, f"{name}.ffn.layers.0.0", module.norm2)
            paddings[f"{name}.attn.w_msa.qkv"] = attention.padding
    stages: Any = model.get_submodule(f"{prefix}stages")
    ends = [f"{prefix}stages.{index}.blocks.{len(stage.blocks) - 1}" for index, stage in enumerate(stages)]
    backbone = model.get_submodule(prefix.rstrip("."))
    found = [_stream_of_stage(backbone, index, stage) for index, stage in enumerate(stages)]
    return Network(
        model,
        norms,
        tuple(modules),
        input_paddings=paddings,
        trunk=tuple(trunk),
        trunk_outputs=tuple(ends[:-1]),
        heads=heads_of_windows(model),
        streams=tuple(stream.within(prefix) for stream in found if isinstance(stream, Stream)),
        unrotated={
            f"{prefix}stages.{index}": stream for index, stream in enumerate(found) if not isinstance(stream, Stream)
        },
    )


def _stream_of_stage(backbone: Any, index: int, stage: Any) -> Stream | str:
    """Return the residual stream of a stage, whose output leaves through a norm, or why it cannot be rotated."""
    if not index:
        return "the stream begins with the patch embedding, whose output is normalized"
    own = [(backbone, SwinTransformer), (stage, SwinBlockSequence), *((block, SwinBlock) for block in stage.blocks)]
    own += [(block.ffn, FFN) for block in stage.blocks]
    merged = [backbone.stages[index - 1].downsample, *filter(None, [stage.downsample])]
    for module, cls in [*own, *((merging, PatchMerging) for merging in merged)]:
        if type(module) is not cls or not keeps_forward(module, cls):
            return f"a {type(module).__name__} may read the stream its own way"
    if not all(isinstance(block.ffn.gamma2, nn.Identity) and block.ffn.add_identity for block in stage.blocks):
        return "an FFN scales its output"
    name = f"stages.{index}"
    writers, norms = {f"stages.{index - 1}.downsample.reduction": ""}, dict[str, tuple[str, ...]]()
    for number in range(len(stage.blocks)):
        part = f"{name}.blocks.{number}"
        writers |= {f"{part}.attn.w_msa.proj": "", f"{part}.ffn.layers.1": ""}
        norms |= {f"{part}.norm1": (f"{part}.attn.w_msa.qkv",), f"{part}.norm2": (f"{part}.ffn.layers.0.0",)}
    if stage.downsample is not None:
        norms[f"{name}.downsample.norm"] = (f"{name}.downsample.reduction",)
    if index in backbone.out_indices:
        norms[f"norm{index}"] = ()
    merging = (f"{name}.downsample.norm",) if stage.downsample is not None else ()
    return Stream(name, backbone.num_features[index], writers, norms, interleaved=merging)


def detect_densely(model: Any, images: Tensor) -> list[Tensor]:
    """Run images through every layer of a detector, even if it detects nothing.

    Args:
        model: a detector; the second of two stages works on the proposals of the first.
        images: B×3×H×W, preprocessed.

    Returns:
        Outputs of the layers before any decision: class logits, box deltas, mask logits.
    """
    size = tuple(images.shape[-2:])
    shapes = {"img_shape": size, "ori_shape": size, "pad_shape": size, "batch_input_shape": size}
    samples = [DetDataSample(metainfo={**shapes, "scale_factor": (1.0, 1.0), "img_id": 0}) for _ in images]
    outputs: list[Any] = []
    result: Any = None
    # The detector's own output lacks region proposals and the stages of a cascade.
    heads = [module for module in model.modules() if isinstance(module, (BaseDenseHead, BBoxHead, FCNMaskHead))]
    proposing = _proposing_branches(model)
    hooks = [head.register_forward_hook(lambda _, __, output: outputs.append(output)) for head in (*heads, *proposing)]
    try:
        if isinstance(getattr(model, "roi_head", None), CascadeRoIHead):
            _run_cascade(model, images, samples)
        else:
            result = model(images, samples, mode="tensor")
    finally:
        for hook in hooks:
            hook.remove()
    return list(_tensors([outputs, result] if proposing else outputs or result))


def _proposing_branches(model: Any) -> list[nn.Module]:
    """Return the layers by which a two-stage transformer chooses its queries; they are in no output."""
    if not getattr(model, "as_two_stage", False):
        return []
    return [branches[-1] for branches in (model.bbox_head.cls_branches, model.bbox_head.reg_branches)]


def _run_cascade(model: Any, images: Tensor, samples: list[DetDataSample]) -> None:
    """Run the detector's own forward pass without masks of every proposal by every stage, which take long."""
    features = model.extract_feat(images)
    proposals = [found.bboxes for found in model.rpn_head.predict(features, samples, rescale=False)]
    metas = [sample.metainfo for sample in samples]
    counts = tuple(len(boxes) for boxes in proposals)
    rois, *_ = model.roi_head._refine_roi(features, bbox2roi(proposals), metas, counts)
    if model.with_mask:
        for stage in range(model.roi_head.num_stages):
            model.roi_head._mask_forward(stage, features, torch.cat(rois)[:_MASKS])


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (list, tuple)):
        for part in outputs:
            yield from _tensors(part)
