"""Functions that several tasks use."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from traceback import clear_frames
from typing import Any, TypeVar

import loky
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from adfq.errors import AdfqError

T = TypeVar("T")


def choose_images(available: int, count: int, seed: int) -> list[int]:
    """Choose images of a train split to calibrate on.

    Args:
        available: number of images in the split.
        count: number of images to choose.
        seed: seed of the choice.

    Returns:
        Indices, `count` different ones.

    Raises:
        AdfqError: unless `count` is from 1 to `available`.
    """
    if count < 1:
        raise AdfqError(f"at least one calibration image is needed, {count} were asked for")
    if count > available:
        raise AdfqError(f"{count} calibration images were asked for, the train split has {available}")
    chosen: list[int] = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return chosen


class Stopwatch:
    """Sum of the time spent in all blocks that it is the context of.

    Attributes:
        seconds: the sum so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


def count_workers() -> int:
    """Return the number of processes that read images: one for each core that this process may use.

    Cells that run side by side share the cores.
    """
    return int(loky.cpu_count())


def create_loader(dataset: Any, batch_size: int | None, workers: int, device: torch.device, **options: Any) -> Any:
    """Create a DataLoader that reads in order, ahead of the model.

    Args:
        dataset: a torch data set with a length.
        batch_size: images a batch; None for images one by one.
        workers: largest number of processes that read, each of them whole batches; 0 reads in this process.
        device: device that the batches go to.
        **options: further arguments of DataLoader.
    """
    workers = min(workers, math.ceil(len(dataset) / (batch_size or 1)))
    return DataLoader(dataset, batch_size, num_workers=workers, pin_memory=device.type == "cuda", **options)


def read_batches(loader: DataLoader[Any], loading: Stopwatch | None = None) -> Iterator[Any]:
    """Yield a loader's batches; an AdfqError from one of its processes stays one line.

    Args:
        loader: from `create_loader`.
        loading: stopwatch of the time spent waiting for batches, from the start of the loader's processes to their end;
            None, the default, for none.

    Raises:
        AdfqError: for images that cannot be read.
    """
    try:
        yield from timed(loader, loading or Stopwatch())
    except AdfqError as error:
        clear_frames(error.__traceback__)  # they keep the processes, which take seconds to end when nobody asks them to
        message = str(error).rpartition("AdfqError: ")[2].strip()  # a process wraps its error in a traceback
    else:
        return
    raise AdfqError(message)


def timed(batches: Iterable[T], loading: Stopwatch) -> Iterator[T]:
    """Yield batches.

    Args:
        batches: batches, none of them None.
        loading: stopwatch of the time spent waiting for them.
    """
    with loading:
        waiting = iter(batches)
    while True:
        with loading:
            batch = next(waiting, None)
        if batch is None:
            return
        yield batch
        del batch  # it need not be there while the next one is read


def read_images(
    chosen: Sequence[int], read: Callable[[int], T], batch_size: int | None = None, label: str = "reading images"
) -> Iterator[list[T]]:
    """Yield images in batches, each read when it is asked for, under a progress bar.

    Args:
        chosen: indices of the images.
        read: function from an index to the image.
        batch_size: images a batch, fewer in the last one; None, the default, for all in one.
        label: label of the progress bar.
    """
    bar = tqdm(map(read, chosen), desc=label, total=len(chosen), unit="image", delay=2, leave=False, disable=None)
    images, size = iter(bar), batch_size or len(chosen)
    for end in range(size, len(chosen) + size, size):
        # The last batch is read to the end of the bar, which goes away, since nobody may ask for another batch.
        yield list(islice(images, size if end < len(chosen) else None))


def digest_weights(model: nn.Module, *more: str) -> str:
    """Return SHA-256 of a model's weights and of further texts.

    Args:
        model: model with the weights.
        *more: texts that also decide the model's outputs, a config for example.
    """
    digest = hashlib.sha256()
    for text in more:
        digest.update(text.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_file(file: Path) -> str:
    """Return SHA-256 of a file's content."""
    with open(file, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_names(names: Iterable[str]) -> str:
    """Return SHA-256 of a list of names, in its order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\n".encode("utf-8", "surrogateescape"))  # a file's name need not be UTF-8
    return digest.hexdigest()


def first_non_finite(model: nn.Module, *inputs: Any, **keywords: Any) -> str:
    """Return the name of the first module whose output holds NaN or infinity.

    Args:
        model: model to run.
        *inputs: its positional arguments.
        **keywords: its keyword arguments.
    """
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and not torch.isfinite(output).all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name or "model")) for name, module in model.named_modules()]
    try:
        model(*inputs, **keywords)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "model"


def read_json(file: Path) -> Any:
    """Return the content of a JSON file.

    Args:
        file: path to read.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for one that is not JSON, and an object with a key twice.
        RecursionError: for objects that are nested too deeply.
    """
    return json.loads(file.read_bytes(), object_pairs_hook=_create_object)


def _create_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):  # the last value would count without a word
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"an object has the key {shown(key)} twice")
    return content


def shown(value: Any) -> str:
    """Return a value from JSON in one line of at most 80 characters."""
    return json.dumps(value)[:80]


def unknown_model(name: str, known: Sequence[str]) -> AdfqError:
    """Return an error that names the models with the most similar names.

    Args:
        name: name that was asked for.
        known: names of all models.
    """
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"close to it are {', '.join(close)}; " if close else ""
    return AdfqError(f"unknown model {name!r}; {hint}'adfq list models' lists all")


def check_place(file: Path) -> None:
    """Raise AdfqError, before the work, for a file that is a directory, has none, or cannot be written there."""
    if not file.absolute().parent.is_dir():
        raise AdfqError(f"cannot write {file}: there is no directory {file.parent}")
    if file.is_dir():
        raise AdfqError(f"cannot write {file}: it is a directory")
    try:
        with tempfile.TemporaryFile(dir=file.absolute().parent):
            pass
    except OSError as error:
        raise AdfqError(f"cannot write {file}: {error.strerror}") from None
