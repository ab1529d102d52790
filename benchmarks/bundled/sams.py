"""Segment Anything model that ships with the project."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from benchmarks.bundled.classifiers import WEIGHTS
from benchmarks.bundled.coco import IMAGE_SIZE

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

CHECKPOINT = WEIGHTS / "bundled_sam.safetensors"

_PATCH_SIZE = 8
_WIDTH = 64


def create_bundled_sam() -> Sam:
    """Build a SAM for images of the scenes' size, with random weights.

    As in the real one, windows do not fill its feature map.
    """
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    tokens = IMAGE_SIZE // _PATCH_SIZE
    encoder = ImageEncoderViT(
        img_size=IMAGE_SIZE,
        patch_size=_PATCH_SIZE,
        embed_dim=_WIDTH,
        depth=12,
        num_heads=4,
        mlp_ratio=2,
        out_chans=_WIDTH,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=5,
        global_attn_indexes=(2, 5, 8, 11),
    )
    prompt_encoder = PromptEncoder(_WIDTH, (tokens, tokens), (IMAGE_SIZE, IMAGE_SIZE), mask_in_chans=16)
    decoder = MaskDecoder(
        transformer_dim=_WIDTH,
        transformer=TwoWayTransformer(depth=2, embedding_dim=_WIDTH, num_heads=4, mlp_dim=256),
        iou_head_hidden_dim=_WIDTH,
    )
    return Sam(encoder, prompt_encoder, decoder, pixel_mean=[127.5] * 3, pixel_std=[127.5] * 3).eval()
