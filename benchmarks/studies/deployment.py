"""Exported models in onnxruntime: their integer products and their speed."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from adfq.export.graphs import IMAGES
from benchmarks.run.console import markdown_table
from benchmarks.run.cost import time_of

#: Operators of onnxruntime that multiply codes.
INTEGER_OPERATORS = ("MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QLinearConv", "QGemm")

#: Operators of onnxruntime that multiply floats with weights of four bits.
NARROW_OPERATORS = ("MatMulNBits",)

_REPEATS = 5
_CPU = torch.device("cpu")


class OnnxModel(nn.Module):
    """ONNX file in onnxruntime, on as many threads of the CPU as torch uses.

    Args:
        file: path of a model.
        optimized: path that onnxruntime writes its optimized model to; empty, the default, for none.
    """

    def __init__(self, file: str | os.PathLike[str], optimized: str | os.PathLike[str] = "") -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.optimized_model_filepath = str(optimized)
        if not _has_vnni():
            # x86 adds up products of uint8 and int8 in 16 bits then, which saturate; so it is slower, but right.
            options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 3  # errors; that what it leaves is for this processor alone is known
        self.session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Return all outputs.

        Args:
            **inputs: inputs by name.
        """
        outputs = self.session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return tuple(map(torch.from_numpy, outputs))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the only output, or all of several.

        Args:
            images: B×C×H×W, float32.
        """
        outputs = self.run(**{IMAGES: images})
        return outputs if len(outputs) > 1 else outputs[0]


def _has_vnni() -> bool:
    """Return True if the processor is known to add up products of uint8 and int8 in 32 bits."""
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not every version of torch tells
    return any(known.get(name, False) for name in ("avx512_vnni", "avx_vnni"))


def count_integer_products(file: str | os.PathLike[str], operators: Sequence[str] = INTEGER_OPERATORS) -> int:
    """Count the products that onnxruntime runs on integers, which it decides when it reads a file.

    Args:
        file: path of an ONNX file.
        operators: operators to count; by default those that multiply codes.
    """
    import onnx

    with TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        OnnxModel(file, optimized)
        return sum(node.op_type in operators for node in onnx.load(optimized).graph.node)


@torch.inference_mode()
def measure(models: Mapping[str, nn.Module], image: Tensor, batches: Sequence[int]) -> dict[str, dict[int, float]]:
    """Time models in turn, so that other work of the machine meets each of them.

    Args:
        models: models by name.
        image: 1×C×H×W, preprocessed.
        batches: numbers of images at once.

    Returns:
        By name and number of images at once, the median of milliseconds an image.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for count in batches:
        images = image.expand(count, -1, -1, -1).contiguous()
        runs: dict[str, Callable[[], Any]] = {name: partial(model, images) for name, model in models.items()}
        seconds: dict[str, list[float]] = defaultdict(list)
        for repeat in range(_REPEATS + 1):
            for name, run in runs.items():
                second = time_of(run, _CPU)
                if repeat:  # the first is slow once only
                    seconds[name].append(second)
        for name, values in seconds.items():
            found[name][count] = 1000 * statistics.median(values) / count
    return found


def render(models: Mapping[str, Mapping[Any, float]]) -> str:
    """Return models as Markdown, which ends in a newline.

    Args:
        models: by name, ``size`` in MB and the times of `measure`.
    """
    rows = [
        {
            "": name,
            "size (MB)": f"{values['size']:.2f}",
            **{f"ms an image, {count} at once": f"{values[count]:.2f}" for count in values if count != "size"},
        }
        for name, values in models.items()
    ]
    return markdown_table(pd.DataFrame(rows)) + "\n"
