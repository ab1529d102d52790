"""Segment Anything models: segment_anything's, MobileSAM, and the one that ships with the project."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from adfq.errors import AdfqError
from benchmarks.run.console import warn
from benchmarks.tasks.checkpoints import check_present, load_weights
from benchmarks.tasks.shared import unknown_model

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


def create_mobile_sam() -> Sam:
    """Build MobileSAM (arXiv 2306.14289) with random weights: SAM's decoder behind a TinyViT."""
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    from adfq.adapters.mobile_sam import MobileSamEncoder

    encoder = MobileSamEncoder()
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048)
    return Sam(
        encoder,
        PromptEncoder(256, (64, 64), (encoder.img_size, encoder.img_size), mask_in_chans=16),
        MaskDecoder(transformer_dim=256, transformer=transformer),
    )


def _create_registered(name: str) -> Sam:
    from segment_anything import sam_model_registry

    return sam_model_registry[name]()


def _create_bundled() -> Sam:
    from benchmarks.bundled.sams import create_bundled_sam

    return create_bundled_sam()


_MODELS: Mapping[str, Callable[[], Sam]] = {
    "bundled_sam": _create_bundled,
    "mobile_sam": create_mobile_sam,
    **{name: partial(_create_registered, name) for name in ("vit_b", "vit_l", "vit_h")},
}


def sam_names() -> list[str]:
    """Return the names of models: the bundled one, then those for images of 1024 pixels."""
    return list(_MODELS)


def load_sam(name: str, checkpoint: str | None = None) -> nn.Module:
    """Build a Segment Anything model and load its weights.

    Args:
        name: one of `sam_names()`.
        checkpoint: file of `benchmarks.tasks.checkpoints.read_weights` in the official layout. None, the default, takes
            the bundled weights of the bundled model and random ones for others.

    Returns:
        segment_anything's Sam in evaluation mode.

    Raises:
        AdfqError: for an unknown model, a missing library, or a checkpoint that cannot be used.
    """
    if name not in _MODELS:
        raise unknown_model(name, sam_names())
    check_present(checkpoint)
    try:
        sam: nn.Module = _MODELS[name]().eval()
    except ImportError as error:
        raise AdfqError(f"segmentation needs segment_anything: pip install 'adfq[segmentation]' ({error})") from None
    if checkpoint is None and name == "bundled_sam":
        from benchmarks.bundled.sams import CHECKPOINT

        checkpoint = str(CHECKPOINT)
    if checkpoint is not None:
        load_weights(sam, checkpoint, name, convert_layout)
    else:
        warn(f"{name} has random weights (there is no checkpoint)")
    return sam


def convert_tiny_vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of MobileSAM's image encoder under the names of `MobileSamEncoder`.

    timm's TinyViT computes the same with the same numbers. Its downsampling begins the second of two stages,
    MobileSAM's ends the first. The classifier's head, which MobileSAM never uses, is left out.

    Args:
        state: weights by name, without prefix.
    """
    converted = {}
    for name, tensor in state.items():
        if name.startswith(("head.", "norm_head.")):
            continue
        name = re.sub(r"^patch_embed\.seq\.0\.", "patch_embed.conv1.", name)
        name = re.sub(r"^patch_embed\.seq\.2\.", "patch_embed.conv2.", name)
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", name)
        name = re.sub(r"^layers\.", "stages.", name)
        name = re.sub(r"\.c\.weight$", ".conv.weight", name)
        converted[name if name.startswith("neck.") else f"trunk.{name}"] = tensor
    return converted


def convert_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's weights under the names of this project's models.

    Args:
        state: weights by name, in that layout or in MobileSAM's.
    """
    prefix = "image_encoder."
    encoder = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not any(name.startswith("layers.") for name in encoder):
        return state
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    return rest | {f"{prefix}{name}": tensor for name, tensor in convert_tiny_vit(encoder).items()}
