"""Description and construction of Segment Anything's models and of their image encoders."""

from __future__ import annotations

from functools import partial
from typing import Any

from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from adfq.adapters import Architecture, build_error, qualified_name
from adfq.adapters.timm_factory import hidden_ratio
from adfq.errors import AdfqError


def describe(model: Any, family: str) -> Architecture:
    """Describe a model by its modules, see `adfq.adapters.describe`.

    A model with parts of another make gets no arguments, and cannot be created again.

    Args:
        model: segment_anything's Sam, or an image encoder of one.
        family: qualified name of the supported class.
    """
    try:
        arguments = _describe_sam(model) if isinstance(model, Sam) else _describe_encoder(model)
        side = arguments.get("image_encoder", arguments)["img_size"]
    except (AttributeError, IndexError, TypeError, ValueError):  # whatever such parts lack
        arguments, side = {}, 0
    return Architecture(family, qualified_name(type(model)), None, arguments, (3, side, side))


def _describe_sam(sam: Any) -> dict[str, Any]:
    encoder = sam.image_encoder
    return {
        "image_encoder": {"class": type(encoder).__name__, **_describe_encoder(encoder)},
        "prompt_encoder": _describe_prompts(sam.prompt_encoder),
        "mask_decoder": _describe_decoder(sam.mask_decoder),
        "pixel_mean": tuple(sam.pixel_mean.flatten().tolist()),
        "pixel_std": tuple(sam.pixel_std.flatten().tolist()),
    }


def create(architecture: Architecture) -> nn.Module:
    """Build a model from its description, see `adfq.adapters.create`.

    Args:
        architecture: from `describe`, or read from a file.

    Raises:
        AdfqError: for another class than segment_anything's and MobileSAM's, and for arguments that it does not take.
    """
    arguments: dict[str, Any] = dict(architecture.arguments)
    if not arguments:
        raise AdfqError(f"a {architecture.cls} of parts of another make cannot be built from its description")
    whole = architecture.cls == qualified_name(Sam)
    try:
        if not whole:
            return _create_encoder(architecture.cls.rpartition(".")[2], arguments)
        encoder = dict(arguments["image_encoder"])
        decoder = dict(arguments["mask_decoder"])
        transformer = TwoWayTransformer(**decoder.pop("transformer"))
        model: nn.Module = Sam(
            _create_encoder(encoder.pop("class"), encoder),
            PromptEncoder(**arguments["prompt_encoder"]),
            MaskDecoder(transformer=transformer, **decoder),
            list(arguments["pixel_mean"]),
            list(arguments["pixel_std"]),
        )
    except AdfqError:
        raise
    except Exception as error:  # whatever a constructor makes of its arguments
        raise build_error(architecture.cls, error) from None
    return model


def _create_encoder(name: Any, arguments: dict[str, Any]) -> nn.Module:
    from adfq.adapters.mobile_sam import MobileSamEncoder

    if name == MobileSamEncoder.__name__:
        return MobileSamEncoder(**arguments)
    if name != ImageEncoderViT.__name__:
        raise AdfqError(f"there is no way to build an image encoder {name!r}")
    epsilon = arguments.pop("norm_eps")
    encoder: nn.Module = ImageEncoderViT(norm_layer=partial(nn.LayerNorm, eps=epsilon), **arguments)
    return encoder


def _describe_encoder(encoder: Any) -> dict[str, Any]:
    from adfq.adapters.mobile_sam import MobileSamEncoder

    if isinstance(encoder, MobileSamEncoder):
        stages = [list(stage.blocks) for stage in encoder.trunk.stages]
        attended = [stage[0] for stage in stages[1:]]
        return {
            "img_size": encoder.img_size,
            "embed_dims": (stages[0][0].conv1.conv.in_channels, *(block.dim for block in attended)),
            "depths": tuple(map(len, stages)),
            # Those of the first stage, which has convolutions alone, are without effect.
            "num_heads": (1, *(block.attn.num_heads for block in attended)),
            "window_sizes": (1, *(block.window_size for block in attended)),
            "out_chans": encoder.neck[0].out_channels,
        }
    projection, blocks = encoder.patch_embed.proj, list(encoder.blocks)
    width, sizes = projection.out_channels, [block.window_size for block in blocks]
    first = blocks[0]
    return {
        "img_size": encoder.img_size,
        "patch_size": projection.kernel_size[0],
        "in_chans": projection.in_channels,
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": first.attn.num_heads,
        "mlp_ratio": hidden_ratio(first.mlp.lin1.out_features, width),
        "out_chans": encoder.neck[0].out_channels,
        "qkv_bias": first.attn.qkv.bias is not None,
        "norm_eps": first.norm1.eps,
        "use_abs_pos": encoder.pos_embed is not None,
        "use_rel_pos": first.attn.use_rel_pos,
        "window_size": max(sizes),
        "global_attn_indexes": tuple(index for index, size in enumerate(sizes) if not size),
    }


def _describe_prompts(encoder: Any) -> dict[str, Any]:
    return {
        "embed_dim": encoder.embed_dim,
        "image_embedding_size": tuple(encoder.image_embedding_size),
        "input_image_size": tuple(encoder.input_image_size),
        "mask_in_chans": encoder.mask_downscaling[3].out_channels,
    }


def _describe_decoder(decoder: Any) -> dict[str, Any]:
    transformer, head = decoder.transformer, decoder.iou_prediction_head
    last = transformer.final_attn_token_to_image
    return {
        "transformer_dim": decoder.transformer_dim,
        "num_multimask_outputs": decoder.num_multimask_outputs,
        "iou_head_depth": head.num_layers,
        "iou_head_hidden_dim": head.layers[0].out_features,
        "transformer": {
            "depth": transformer.depth,
            "embedding_dim": transformer.embedding_dim,
            "num_heads": transformer.num_heads,
            "mlp_dim": transformer.mlp_dim,
            "attention_downsample_rate": last.embedding_dim // last.internal_dim,
        },
    }
