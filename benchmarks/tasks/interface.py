"""Interface of a task: its functions and properties, and the subjects that it loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from benchmarks.run.correct import Correct
    from benchmarks.tasks.shared import Stopwatch


class Subject(Protocol):
    """Model with its data; in full precision, unless it comes from `benchmarks.tasks.load_quantized`."""

    @property
    def model(self) -> nn.Module:
        """Model to quantize or to evaluate."""

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """Everything that the task does to images before the model, of JSON's types."""

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the loaded weights."""

    @property
    def data_digests(self) -> Mapping[str, Any]:
        """Number of evaluation ``images``, and SHA-256 of the names of each split's images, by split."""

    def calibration_batches(self, count: int, seed: int, batch_size: int | None = None) -> Iterator[Tensor]:
        """Return batches of preprocessed images of the train split, B×C×H×W, each read when it is asked for.

        Args:
            count: number of images.
            seed: seed of their choice.
            batch_size: images a batch, fewer in the last one; None, the default, for all in one.

        Raises:
            AdfqError: for more images than there are, before any is read, and for images that cannot be read.
        """

    def evaluation_images(self, count: int) -> Tensor:
        """Return the first images of the evaluation split, preprocessed: B×C×H×W with B at most `count`."""

    def infer(self, model: nn.Module, images: Tensor) -> Any:
        """Run the part of a model that is timed.

        Args:
            model: the subject's model or its quantized twin.
            images: preprocessed, B×C×H×W.
        """

    def evaluate(
        self,
        model: nn.Module,
        device: torch.device,
        limit: int | None,
        batch_size: int,
        loading: Stopwatch | None = None,
    ) -> dict[str, float]:
        """Return metrics of a model on the evaluation split, and the number of ``images``.

        Args:
            model: the subject's model or its quantized twin.
            device: device to run on.
            limit: largest number of images; None for all.
            batch_size: images a batch.
            loading: stopwatch of the time spent waiting for images; None, the default, for none.
        """


@runtime_checkable
class JudgesImages(Protocol):
    """Subject that judges each evaluation image by itself: a metric of it is the share of images that are right."""

    def evaluate_images(
        self,
        model: nn.Module,
        device: torch.device,
        limit: int | None,
        batch_size: int,
        loading: Stopwatch | None = None,
    ) -> tuple[dict[str, float], Correct]:
        """Return what `Subject.evaluate` does, and for some metrics which images are right.

        Args:
            model: the subject's model or its quantized twin.
            device: device to run on.
            limit: largest number of images; None for all.
            batch_size: images a batch.
            loading: stopwatch of the time spent waiting for images; None, the default, for none.
        """


@dataclass(frozen=True)
class Task:
    """Functions and properties of a task.

    Attributes:
        load: function from a cell to its model and data; a task with ``results`` among its options takes these too.
        attach: function from a cell and a quantized model to the model with the cell's data; a task with ``results``
            among its options takes these too. The cell's preprocessing is complete, unless models bring it; nothing is
            calibrated. None if quantized models cannot be saved and loaded.
        model_names: function that returns the names of models.
        describe: function from metrics to a phrase.
        main_metrics: metrics that results are compared by.
        data: example of a user's data.
        batch_size: default number of images a batch in evaluation.
        calibration_batch_size: number of images in one pass of calibration where the user's own data are calibrated on
            and nothing says another one.
        other_metrics: further metrics that a table may have.
        options: options of the command line that not every task has.
        arguments: those options that decide results (`Cell.task_arguments`), with their defaults.
        libraries: libraries that compute beside torch and timm.
        downloads: whether weights are downloaded where a cell is pretrained.
        own_preprocessing: whether a model brings its preprocessing, which no option changes.
    """

    load: Callable[..., Subject]
    attach: Callable[..., Subject] | None
    model_names: Callable[[], list[str]]
    describe: Callable[[Mapping[str, float]], str]
    main_metrics: tuple[str, ...]
    data: str
    batch_size: int
    calibration_batch_size: int = 32
    other_metrics: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    downloads: bool = False
    own_preprocessing: bool = False
