"""Comparison of an exported model in onnxruntime with the simulation: agreement, size, speed."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from adfq.adapters import create
from adfq.api import Quantization
from adfq.export.graphs import IMAGES, graphs_of
from adfq.export.trace import trace
from benchmarks.run.console import markdown_table
from benchmarks.run.cost import time_of
from benchmarks.tasks import Subject

#: Operators of onnxruntime that multiply codes.
INTEGER_OPERATORS = ("MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QLinearConv", "QGemm")

#: Operators of onnxruntime that multiply floats with weights of four bits.
NARROW_OPERATORS = ("MatMulNBits",)

_REPEATS = 5
_BATCHES = (1, 8)
_CPU = torch.device("cpu")


class OnnxModel(nn.Module):
    """ONNX file in onnxruntime, on as many threads of the CPU as torch uses.

    Args:
        file: path of a model with one float32 input and one float32 output.
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

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, B×classes.

        Args:
            images: B×C×H×W, float32.
        """
        (logits,) = self.session.run(None, {IMAGES: images.numpy()})
        return torch.from_numpy(logits)


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


def compare(saved: Path, file: Path, subject: Subject, limit: int, batch_size: int) -> dict[str, Any]:
    """Compare an exported model with the simulation and with full precision.

    Args:
        saved: file that the subject's model was loaded from.
        file: the model's ONNX file.
        subject: the quantized model with its data.
        limit: number of evaluation images, the first ones.
        batch_size: images a batch.

    Returns:
        ``images``; in percent of them, ``agreement`` of both top-1 predictions, and ``simulated`` and ``exported``
        top-1; ``integer``, the number of products on integers; ``models``: by name, ``size`` in MB, and by batch size
        the median of milliseconds an image.

    Raises:
        AdfqError: for images that cannot be read.
    """
    model, exported = subject.model, OnnxModel(file)
    simulated, metrics = _predict(model, subject, limit, batch_size)
    predicted, exported_metrics = _predict(exported, subject, limit, batch_size)
    # A file holds no float weights any more, and size and time do not depend on which ones these are.
    architecture = cast(Quantization, model.quantization).architecture
    full = create(architecture).eval()
    with TemporaryDirectory() as folder:
        trace(graphs_of(full, architecture.input_size)[0]).save(Path(folder) / "full.onnx")
        size = sum(part.stat().st_size for part in Path(folder).iterdir())
        runtime = OnnxModel(Path(folder) / "full.onnx")
    parameters = 4 * sum(parameter.numel() for parameter in full.parameters())
    models: dict[str, tuple[nn.Module, float]] = {
        "float32, torch": (full, parameters),
        "float32, onnxruntime": (runtime, size),
        "simulated, torch": (model, saved.stat().st_size),
        "int8, onnxruntime": (exported, file.stat().st_size),
    }
    milliseconds = _measure({name: model for name, (model, _) in models.items()}, subject)
    return {
        "images": metrics["images"],
        "agreement": 100 * float((simulated == predicted).double().mean()),
        "simulated": metrics["top1"],
        "exported": exported_metrics["top1"],
        "integer": count_integer_products(file),
        "models": {name: {"size": size / 1e6, **milliseconds[name]} for name, (_, size) in models.items()},
    }


def _predict(model: nn.Module, subject: Subject, limit: int, batch_size: int) -> tuple[Tensor, Mapping[str, float]]:
    """Return the class of each image, and the task's metrics."""
    predicted: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, logits: predicted.append(logits.argmax(1)))
    metrics = subject.evaluate(model, _CPU, limit, batch_size)
    hook.remove()
    return torch.cat(predicted), metrics


@torch.inference_mode()
def _measure(models: Mapping[str, nn.Module], subject: Subject) -> dict[str, dict[int, float]]:
    """Time the models in turn, so that other work of the machine meets each of them."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for count in _BATCHES:
        images = subject.evaluation_images(1).expand(count, -1, -1, -1).contiguous()
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
    """Return the ``models`` of `compare` as Markdown, which ends in a newline.

    Args:
        models: size and times by name.
    """
    rows = [
        {
            "": name,
            "size (MB)": f"{values['size']:.2f}",
            **{f"ms an image, {count} at once": f"{values[count]:.2f}" for count in _BATCHES},
        }
        for name, values in models.items()
    ]
    return markdown_table(pd.DataFrame(rows)) + "\n"
