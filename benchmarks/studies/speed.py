"""Speed of quantization and of quantized models, in multiples of full precision."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION
from adfq.reconstruction import OptimizingMethod
from adfq.registry import find_method, method_label
from benchmarks.bundled.classifiers import CLASSIFIERS
from benchmarks.cell import Cell
from benchmarks.run.allocator import freed_memory_given_back
from benchmarks.run.console import markdown_table
from benchmarks.run.cost import peak_memory, time_of
from benchmarks.run.measuring import quantize_model
from benchmarks.tasks import Subject
from benchmarks.tasks.classification.data import BUNDLED, count_classes
from benchmarks.tasks.classification.task import Classification, load_classification
from benchmarks.tasks.shared import read_batches

# Rounds of loading, with a batch from each process.
_ROUNDS = 4

# Number of forward passes whose median counts: the first ones fetch memory that calibration has given back.
_PASSES = 3

# Batches of calibration in batches.
_BATCHES = 4

# An iteration is what a run of more iterations takes longer than one of fewer.
# Both have all five pairs that FIMA-Q takes in a whole optimization.
_FEWER, _MORE = 5, 7

_COLUMNS = {
    "calibration": "Calibration",
    "batched": "Calibration in batches",
    "forward": "Quantized forward",
    "iteration": "Optimization iteration",
    "calibration_memory": "Calibration memory",
    "batched_memory": "Calibration memory in batches",
    "forward_memory": "Forward memory",
}


def benchmark(
    model: str,
    methods: Sequence[str],
    bits: str,
    images: int,
    repeats: int,
    device: torch.device,
    data: str = BUNDLED,
) -> dict[str, Any]:
    """Measure methods on one model, in turn and repeatedly, in this process.

    A model that does not ship has random weights, and as many classes as the data. An optimizing method is measured
    without its optimization, and one iteration of that apart: over all modules, with all images, as a multiple of one
    pass of the whole model forwards and backwards.

    Args:
        model: name of a classifier, see `adfq run classification`.
        methods: names of methods.
        bits: bit-widths of all methods, such as ``"W4/A4"``.
        images: number of images in calibration, in each forward pass, and in a batch that is loaded.
        repeats: repetitions of everything but memory, which is measured once, before.
        device: device to run on.
        data: spec of the data, see `adfq run classification`; bundled by default.

    Returns:
        ``full_precision``: medians of ``forward`` and ``training`` (forwards and backwards) in seconds, of
        ``images_per_second`` forwards, and of ``forward_memory`` in MB, None if the system does not tell; ``methods``:
        by name, medians of ``calibration`` on all images at once, of ``batched``, that in four batches, and of
        ``forward`` as multiples of full precision's forward, of ``iteration`` as a multiple of its training for
        optimizing methods, of ``calibration_memory``, ``batched_memory`` and ``forward_memory`` as multiples of its
        memory; ``loading``, for data that are not drawn: the median of ``images_per_second`` that
        evaluation could have, and ``workers``, the number of processes that read and preprocess.

    Raises:
        AdfqError: for unknown models and methods, unreadable bits, unusable data, and models that cannot be quantized.
    """
    classes = None if model in CLASSIFIERS else count_classes(data)
    arguments = () if classes is None else (("num_classes", classes),)
    create = partial(Cell.create, task="classification", model=model, model_arguments=arguments, data=data, bits=bits)
    cells = [
        create(method=method, calibration_size=images, method_arguments=_arguments(method, iterations=0))
        for method in methods
        if method != FULL_PRECISION
    ]
    if not cells:
        raise AdfqError("there is nothing to compare with full precision: give other methods")
    subject = load_classification(create(method=FULL_PRECISION))
    run = _Run(subject, images, device)
    with freed_memory_given_back():
        run.measure_memory(cells)
    rates = []
    with tqdm(total=repeats * len(cells), desc="bench", unit="method", disable=None) as bar:
        for _ in range(repeats):
            if data != BUNDLED:
                rates.append(_loading_rate(subject, images, device))
            for cell in cells:
                run.measure(cell)
                bar.update()
    found = run.summarize()
    if rates:
        found["loading"] = {"images_per_second": statistics.median(rates), "workers": subject.workers}
    return found


def _loading_rate(subject: Classification, batch_size: int, device: torch.device) -> float:
    """Return the images a second that evaluation loads if no model holds it up."""
    # Processes read a batch each, all at a time: batches come in rounds, from the first of one to that of another.
    batches = _ROUNDS * subject.workers
    available = len(subject.validation)
    chosen = [index % available for index in range((1 + batches) * batch_size)]
    loaded = read_batches(subject.create_loader(chosen, batch_size, device))
    next(loaded)  # the start of the processes
    # Not to the end, where the processes are waited for.
    return batches * batch_size / time_of(partial(deque, islice(loaded, batches), maxlen=0), device)


def _arguments(method: str, iterations: int) -> tuple[tuple[str, Any], ...]:
    return (("iterations", iterations),) if _optimizes(method) else ()


def _in_batches(cell: Cell) -> Cell:
    return replace(cell, calibration_batch_size=math.ceil(cell.calibration_size / _BATCHES))


def _optimizes(method: str) -> bool:
    return issubclass(find_method(method), OptimizingMethod)


class _Run:
    def __init__(self, subject: Subject, images: int, device: torch.device) -> None:
        self.subject, self.device = subject, device
        self.images = next(subject.calibration_batches(images, seed=0)).to(device)
        self.full: dict[str, list[float]] = defaultdict(list)
        self.methods: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._forward(subject.model.to(device))  # the first pass is slow

    def measure_memory(self, cells: Iterable[Cell]) -> None:
        """Measure the peak memory of full precision and of each method."""
        self._keep_memory(self.full, self.subject.model)
        for cell in cells:
            found = self.methods[cell.method]
            for key, asked in (("batched_memory", _in_batches(cell)), ("calibration_memory", cell)):
                model, cost = quantize_model(asked, self.subject, self.device)
                if cost["calibration_memory"] is not None:
                    found[key].append(cost["calibration_memory"])
            self._keep_memory(found, model)

    def _keep_memory(self, found: dict[str, list[float]], model: nn.Module) -> None:
        with torch.inference_mode(), peak_memory(self.device) as peak:
            self.subject.infer(model, self.images)
        if peak.megabytes is not None:
            found["forward_memory"].append(peak.megabytes)

    def measure(self, cell: Cell) -> None:
        """Time full precision, and right after it a method."""
        found = self.methods[cell.method]
        self.full["forward"].append(self._forward(self.subject.model))
        model, cost = quantize_model(cell, self.subject, self.device)
        found["calibration"].append(cost["calibration_seconds"])
        _, cost = quantize_model(_in_batches(cell), self.subject, self.device)
        found["batched"].append(cost["calibration_seconds"])
        found["forward"].append(self._forward(model))
        if _optimizes(cell.method):
            self.full["training"].append(time_of(self._train, self.device))
            found["iteration"].append(self._iteration(cell))

    def _forward(self, model: nn.Module) -> float:
        forward = partial(self.subject.infer, model, self.images)
        with torch.inference_mode():
            return statistics.median(time_of(forward, self.device) for _ in range(_PASSES))

    def _train(self) -> None:
        model: nn.Module = self.subject.model
        model.requires_grad_(True)
        self.subject.infer(model, self.images).square().mean().backward()
        model.zero_grad()

    def _iteration(self, cell: Cell) -> float:
        options = find_method(cell.method).options()
        further: dict[str, Any] = {name: 1 for name in options if name.endswith("_iterations")}  # those of MLPs
        if "reconstruct" in options:
            further["reconstruct"] = True
        further["optimize_batch_size"] = len(self.images)
        seconds: dict[int, float] = {}
        for iterations in (_FEWER, _MORE):
            arguments = (*_arguments(cell.method, iterations), *further.items())
            _, cost = quantize_model(replace(cell, method_arguments=arguments), self.subject, self.device)
            seconds[iterations] = cost["calibration_seconds"]
        return (seconds[_MORE] - seconds[_FEWER]) / (_MORE - _FEWER)

    def summarize(self) -> dict[str, Any]:
        full = {key: statistics.median(values) for key, values in self.full.items()}
        full["images_per_second"] = len(self.images) / full["forward"]
        memory = full.get("forward_memory", math.nan)
        unit = {
            "calibration": full["forward"],
            "batched": full["forward"],
            "forward": full["forward"],
            "iteration": full.get("training", math.nan),
            "calibration_memory": memory,
            "batched_memory": memory,
            "forward_memory": memory,
        }
        return {
            "full_precision": full,
            "methods": {
                method: {key: statistics.median(values) / unit[key] for key, values in found.items() if unit[key] > 0}
                for method, found in self.methods.items()
            },
        }


def render(found: dict[str, Any]) -> str:
    """Return the findings of `benchmark` as Markdown, which ends in a newline.

    Args:
        found: from `benchmark`.
    """
    rows = []
    for method, values in found["methods"].items():
        cells = {title: f"{values[key]:.2f}" if key in values else "" for key, title in _COLUMNS.items()}
        rows.append({"Method": method_label(method), **cells})
    frame = pd.DataFrame(rows)
    return markdown_table(frame.loc[:, (frame != "").any()]) + "\n"
