"""Tracing of models to ONNX graphs."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from adfq.errors import AdfqError
from adfq.export.products import IntegerLayer
from adfq.export.storage import OPSET, store_in_four_bits

INPUT, OUTPUT = "images", "logits"

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # a terminal's colours


def trace(model: nn.Module, input_size: tuple[int, ...]) -> Any:
    """Trace a model to ONNX with any number of images.

    Codes of an `IntegerLayer` that fit four bits are stored in these.

    Args:
        model: model on the CPU, float32, in evaluation mode.
        input_size: shape of an image: channels, height and width in pixels.

    Returns:
        A torch.onnx.ONNXProgram.

    Raises:
        AdfqError: for a model that torch cannot trace.
    """
    narrow = [
        f"{name}.codes" for name, layer in model.named_modules() if isinstance(layer, IntegerLayer) and layer.is_narrow
    ]
    images = torch.zeros(2, *input_size)  # from one image torch would conclude that there is always one
    try:
        with torch.no_grad(), _quiet():
            # torch.export, since the exporter that traces Python takes a batch of two for granted.
            program: Any = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
                opset_version=OPSET if narrow else None,
            )
    except Exception as error:  # whatever a model's code raises on tensors without values
        # torch's own message, coloured, only says which of its steps failed.
        reason = next((line for line in str(error.__cause__ or error).splitlines() if line.strip()), repr(error))
        raise AdfqError(f"cannot trace this {type(model).__name__}: {_ESCAPES.sub('', reason)}") from None
    graph = program.model.graph
    # Metadata names the lines of Python that all comes from, in more bytes than the weights of a small model.
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for part in (graph, *graph, *values):
        part.metadata_props.clear()
    store_in_four_bits(program, narrow)
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warnings about its own code and other packages, which are nothing to our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
