"""Tracing of models to ONNX graphs."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adfq.errors import AdfqError
from adfq.export.graphs import Graph
from adfq.export.products import IntegerLayer
from adfq.export.storage import OPSET, store_in_four_bits

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # a terminal's colours


def trace(graph: Graph) -> Any:
    """Trace a graph to ONNX.

    Codes of an `IntegerLayer` that fit four bits are stored in these.

    Args:
        graph: part of a model, with examples of its inputs.

    Returns:
        A torch.onnx.ONNXProgram.

    Raises:
        AdfqError: for a module that torch cannot trace.
    """
    layers = [(name, layer) for name, layer in graph.module.named_modules() if isinstance(layer, IntegerLayer)]
    narrow = [f"{name}.codes" for name, layer in layers if layer.is_narrow]
    dimensions = {name: torch.export.Dim(name) for axes in graph.dynamic.values() for name in axes.values()}
    shapes = tuple(
        {axis: dimensions[name] for axis, name in graph.dynamic[input_name].items()} for input_name in graph.inputs
    )
    try:
        with torch.no_grad(), _quiet():
            # By torch.export itself: where that fails, the exporter takes the example's sizes for granted, in silence.
            exported = torch.export.export(
                graph.module, tuple(graph.inputs.values()), dynamic_shapes=shapes, strict=False
            )
            program: Any = torch.onnx.export(
                exported,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                verbose=False,
                opset_version=OPSET if narrow else None,
            )
    except Exception as error:  # whatever a model's code raises on tensors without values
        # torch's own message, coloured, only says which of its steps failed.
        reason = next((line for line in str(error.__cause__ or error).splitlines() if line.strip()), repr(error))
        raise AdfqError(f"cannot trace this {type(graph.module).__name__}: {_ESCAPES.sub('', reason)}") from None
    traced = program.model.graph
    # Metadata names the lines of Python that all comes from, in more bytes than the weights of a small model.
    values = [*traced.inputs, *traced.initializers.values(), *(value for node in traced for value in node.outputs)]
    for part in (traced, *traced, *values):
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
