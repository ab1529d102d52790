"""Fixtures for the tests of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from adfq import registry
from benchmarks.cell import Cell
from benchmarks.cli.main import main
from benchmarks.run.executors import local as executors
from benchmarks.tasks import coco
from benchmarks.tasks.shared import Stopwatch


@pytest.fixture
def assert_refused(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str], str], None]:
    """Checks that a command is refused as the user's mistake: exit code 2, and one line on stderr that says so."""

    def check(arguments: Sequence[str], message: str) -> None:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("adfq: error: ")
        assert captured.err.count("\n") == 1
        assert message in captured.err

    return check


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the bundled scenes two for training and three for validation."""
    monkeypatch.setattr(coco, "COUNTS", {"train2017": 2, "val2017": 3})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder in ImageNet's layout: two classes, with a picture of 40×40 pixels each for training and validation."""
    root = tmp_path / "pictures"
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (root / folder).mkdir(parents=True)
        Image.effect_noise((40, 40), 80).convert("RGB").save(root / folder / "picture.jpg")
    return root


class CountingSubject:
    """A task that costs nothing and counts what is asked of it."""

    weights_digest = "weights"
    data_digests: Mapping[str, Any] = {"images": 7, "validation": "a", "train": "b"}

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.evaluated: list[str] = []
        self.raise_at: dict[int, BaseException] = {}  # instead of being evaluated for the n-th time
        self.asked = 0

    def calibration_batches(self, count: int, seed: int, batch_size: int | None = None) -> Iterator[Tensor]:
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        return iter(images.split(batch_size or count))

    def evaluation_images(self, count: int) -> Tensor:
        return next(self.calibration_batches(2, 0))

    def infer(self, model: nn.Module, images: Tensor) -> Any:
        return model(images)

    def evaluate(
        self, model: nn.Module, device: torch.device, limit: int | None, batch_size: int, loading: Stopwatch
    ) -> dict[str, float]:
        self.asked += 1
        if error := self.raise_at.get(self.asked - 1):
            raise error
        self.evaluated.append(type(model).__name__)
        return {"top1": float(len(self.evaluated)), "images": limit or 7}


@pytest.fixture
def subject(make_vit: Any, monkeypatch: pytest.MonkeyPatch) -> CountingSubject:
    subject = CountingSubject(make_vit())
    monkeypatch.setattr(executors, "load_subject", lambda cell: subject)
    return subject


@pytest.fixture
def cells() -> list[Cell]:
    fields = {"task": "classification", "model": "any", "data": "any", "calibration_size": 2}
    return [Cell.create(method=method, **fields) for method in ("full_precision", "base_ptq", "repq_vit")]


_FAULTS = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from baselines.base_ptq import BasePTQ

@dataclass(frozen=True)
class Slow(BasePTQ):
    label = "slow"
    def apply(self, network, run, bits):
        log = Path(os.environ["FAULT_LOG"])
        with open(log, "a") as file:
            file.write("slow\\\\n")
        while not log.with_name("hurry").exists():
            time.sleep(0.1)
        super().apply(network, run, bits)

@dataclass(frozen=True)
class Killed(BasePTQ):
    label = "killed"
    times: int = 1
    log: str = ""

    def apply(self, network, run, bits):
        with open(self.log, "a") as file:
            file.write("x")
        if Path(self.log).stat().st_size <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        super().apply(network, run, bits)

@dataclass(frozen=True)
class Broken(BasePTQ):
    label = "broken"
    def apply(self, network, run, bits):
        raise MemoryError
"""


@pytest.fixture
def fault_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with methods that take their time (``slow``), die (``killed``) or fail (``broken``), installed."""
    folder = tmp_path / "site"
    information = folder / "faults-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "faults.py").write_text(_FAULTS.replace("\\\\n", "\\n"))
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: faults\nVersion: 1.0\n")
    points = "".join(f"{name.lower()} = faults:{name}\n" for name in ("Slow", "Killed", "Broken"))
    (information / "entry_points.txt").write_text(f"[adfq.methods]\n{points}")
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture(scope="module")
def methods_read_once() -> Iterator[None]:
    """Looks for methods among the installed packages once, which takes milliseconds, not for each of many cells."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", cache(entry_points))
        yield
