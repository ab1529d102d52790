"""Quantized models as ONNX files in which integers are multiplied with integers.

Files are in QDQ form (ONNX operator specification): `QuantizeLinear` and `DequantizeLinear` enclose the values that
quantization simulates. onnxruntime recognizes a product whose operands both come out of a `DequantizeLinear` and runs
it on codes. This package makes every product such a one, as far as its quantizers allow it.
"""

from __future__ import annotations

import copy
import importlib
import os
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from adfq.api import Quantization, ordinary_modes
from adfq.errors import AdfqError
from adfq.export.checks import check_exportable
from adfq.export.graphs import exported_part, graphs_of, has_decoder, resolve_size
from adfq.export.metadata import KEY, describe_graph
from adfq.export.products import Exported, convert
from adfq.export.storage import file_size, writing
from adfq.export.trace import trace
from adfq.files import as_path
from adfq.sites import check_weights

__all__ = ["Exported", "check_installed", "decoder_file", "export_onnx", "file_size"]


def export_onnx(
    model: nn.Module,
    file: str | os.PathLike[str],
    *,
    decoder: str | os.PathLike[str] | None = None,
    input_size: tuple[int, int] | None = None,
) -> Exported:
    """Write a quantized model to one ONNX file in QDQ form, or Segment Anything to two.

    The weights of a graph above 2 GB go to ``FILE.data`` beside its file.

    Activations become uint8 at run time, with one scale each. Weights are stored as int8, and at four bits or fewer as
    int4, with a scale and zero point for each output channel. Layers that a method leaves in full precision stay
    float32. The file's metadata has an entry ``adfq`` (`adfq.export.metadata.describe_graph`).

    Every graph but the decoder has the input ``images``, float32, B×C×H×W with any B. All outputs are float32:

    - a classifier or an encoder of timm: ``logits``, B×classes or B×width;
    - the image encoder of Segment Anything: ``embeddings``, B×C×h×w;
    - MMDetection's SwinTransformer, or the backbone of a detector: ``features_0`` … by stage, B×C×h×w. Neck and heads
      are not exported;
    - the decoder of Segment Anything, from ``embeddings`` (1×C×h×w), ``point_coords`` (P×N×2, in pixels of the image
      encoder's input) and ``point_labels`` (P×N; 0 for background, 1 for the object, 2 and 3 for corners of a box, -1
      for padding, which follows points without a box): ``masks``, logits P×M×4h×4w, and ``iou``, P×M.

    Args:
        model: model from `adfq.quantize` or `adfq.load`; not changed.
        file: path to write, or to replace.
        decoder: path of the decoder's file, for a Sam alone; None, the default, for `decoder_file` of `file`.
        input_size: height and width in pixels, for MMDetection alone; None, the default, for others, which have their
            own.

    Returns:
        Names of the integer and the floating-point products, in the exported part.

    Raises:
        AdfqError: for a model that is not from `adfq.quantize`, has no graph here or cannot be traced; for weights
            that were trained after quantization (`adfq.requantize`); without the extra ``onnx``; for a size or a
            decoder of a model that takes none, and a missing size; for a file that cannot be written.
        NotApplicableError: for quantizers without a form in ONNX and activations of other than 8 bits, with the name of
            the first site.
    """
    quantization = getattr(model, "quantization", None)
    if not isinstance(quantization, Quantization):
        raise AdfqError("only a model that adfq.quantize has quantized can be exported")
    files = _files(model, as_path(file), None if decoder is None else as_path(decoder))
    for path in files:
        if not path.absolute().parent.is_dir():
            raise AdfqError(f"cannot write {path}: there is no directory {path.parent}")
    part = exported_part(model)
    size = resolve_size(part, quantization.architecture.input_size, input_size)
    check_weights(part)
    check_exportable(part)
    check_installed()
    with ordinary_modes():
        part = copy.deepcopy(part).cpu().float()
        part.eval()  # MMDetection's backbones return nothing from it
        exported = convert(part)
        programs = [(trace(graph), describe_graph(model, graph.kind, size)) for graph in graphs_of(part, size)]
    with ExitStack() as stack:  # all files or none
        for path, (program, metadata) in zip(files, programs, strict=True):
            program.model.metadata_props[KEY] = metadata
            stack.enter_context(writing(program, path))
    return exported


def decoder_file(file: str | os.PathLike[str]) -> Path:
    """Return the path beside a Sam's file that its decoder is written to: ``sam_decoder.onnx`` for ``sam.onnx``.

    Args:
        file: path of the image encoder's file.
    """
    path = Path(file)
    return path.with_name(f"{path.stem}_decoder{path.suffix}")


def _files(model: nn.Module, file: Path, decoder: Path | None) -> list[Path]:
    if not has_decoder(model):
        if decoder is not None:
            raise AdfqError(f"a {type(model).__name__} has no mask decoder to write to {decoder}")
        return [file]
    second = decoder_file(file) if decoder is None else decoder
    if second.resolve() == file.resolve():
        raise AdfqError(f"image encoder and decoder need two files; both are {file}")
    return [file, second]


def check_installed() -> None:
    """Raise AdfqError unless the extra ``onnx`` is installed."""
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(package)
    except ImportError as error:
        raise AdfqError(f"exporting needs {error.name}: pip install 'adfq[onnx]'") from None
