"""Trials on few images tell the cost of many, where cost grows linearly."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.run import rehearsal
from benchmarks.run.rehearsal import Cost, Size, measure, rehearse

CPU = torch.device("cpu")

numbers = st.floats(0, 10)


class Work:
    """Work of linear cost, in batches that shrink in proportion."""

    def __init__(self, fixed: float, batch: float, image: float, iteration: float) -> None:
        self.fixed, self.batch, self.image, self.iteration = fixed, batch, image, iteration
        self.tried: list[Size] = []

    def cost(self, size: Size) -> Cost:
        seconds = self.fixed + self.image * size.images + size.iterations * self.iteration * (1 + size.batch)
        size_in_mb = self.fixed + self.batch * size.batch + self.image * size.images
        return Cost(seconds, size_in_mb, size_in_mb, self.image * size.images, 0.0)

    def run(self, size: Size) -> Cost:
        self.tried.append(size)
        return self.cost(size)


@settings(max_examples=50, deadline=None)
@given(
    numbers,
    numbers,
    numbers,
    numbers,
    st.integers(1, 200),
    st.integers(1, 2000),
    st.integers(0, 3000),
    st.floats(0, 1000),
    st.integers(1, 2),
)
def test_linear_cost_is_found(
    fixed: float,
    batch: float,
    image: float,
    iteration: float,
    whole_batch: int,
    images: int,
    iterations: int,
    seconds: float,
    batches: int,
) -> None:
    work = Work(fixed, batch, image, iteration)
    whole = Size(whole_batch, max(images, batches * whole_batch), iterations)
    found = rehearse(work.run, whole, seconds, CPU, batches)
    assert found == pytest.approx(work.cost(whole), rel=1e-5, abs=1e-5)
    assert all(size.batch <= whole.batch and size.images <= whole.images for size in work.tried)


def test_without_time_the_fewest_trials_are_made() -> None:
    work = Work(1.0, 2.0, 3.0, 4.0)
    rehearse(work.run, Size(32, 1024, 3000), 0.0, CPU, batches=2)
    assert work.tried == [Size(1, 2, 1), Size(2, 4, 1), Size(2, 6, 1), Size(2, 4, 3), Size(1, 2, 3)]


def test_with_time_the_whole_is_tried() -> None:
    work = Work(1.0, 2.0, 3.0, 0.0)
    assert rehearse(work.run, Size(32, 32), 1e6, CPU) == work.cost(Size(32, 32))
    assert work.tried[-1] == Size(32, 32)


def test_a_trial_that_might_not_fit_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "available_memory", lambda device: 100.0)
    monkeypatch.setattr(rehearsal, "resident_memory", lambda device: 0.0)
    work = Work(0.0, 10.0, 0.0, 0.0)
    found = rehearse(work.run, Size(32, 32), 1e6, CPU)
    assert max(size.batch for size in work.tried) == 8
    assert found.memory == pytest.approx(320.0)


def test_the_first_time_does_not_count_where_there_is_time_for_a_second() -> None:
    costs = [Cost(5.0, 15.0, 15.0, 0.0, 0.0), Cost(1.0, 5.0, 5.0, 0.0, 0.0)]
    found = rehearse(lambda size: costs.pop(0), Size(1, 1), 100.0, CPU)
    assert found == Cost(1.0, 5.0, 5.0, 0.0, 0.0)


def test_a_slope_below_0_counts_as_0() -> None:
    found = rehearse(lambda size: Cost(9.0 / size.images, 1.0, 1.0, 0.0, 0.0), Size(2, 100), 0.0, CPU)
    assert found.seconds == 4.5


def test_temporary_files_and_those_to_resume_from_are_told_apart() -> None:
    before = tempfile.gettempdir()

    def work(folder: Path) -> None:
        with tempfile.TemporaryFile(buffering=0) as unnamed:
            unnamed.write(b"x" * 5_000_000)
            folder.mkdir()
            Path(folder, "state").write_bytes(b"x" * 2_000_000)
            torch.ones(25_000_000).sum()
            time.sleep(5 * rehearsal._DISK_INTERVAL)

    resting = rehearsal.resident_memory(CPU)
    cost = measure(work, CPU)
    assert (cost.resume, cost.temporary) == (2.0, 5.0)
    assert 30 < cost.memory - resting < 120  # a process that freed memory before takes it again
    assert cost.host_memory == pytest.approx(cost.memory, rel=0.2)
    assert tempfile.gettempdir() == before
