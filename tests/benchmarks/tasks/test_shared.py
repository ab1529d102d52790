"""Images are read by as many processes as there are cores to use, and what they are waited for is known."""

from __future__ import annotations

import hashlib
import os
import time
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.tasks.shared import (
    Stopwatch,
    count_workers,
    create_loader,
    digest_names,
    read_batches,
    read_images,
    timed,
)

CPU = torch.device("cpu")


class Slow(Dataset[Tensor]):
    """Four images that take their time."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(0.02)
        return torch.full((3, 2, 2), float(index))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not bind processes to cores")
def test_there_is_a_worker_for_each_core_that_may_be_used() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert count_workers() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= count_workers() <= len(allowed)


def test_a_process_that_has_a_share_of_the_cores_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert count_workers() == 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on fewer cores
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 4), (2, 2), (3, 2), (9, 1), (None, 4)])
def test_no_worker_is_without_a_batch(batch_size: int | None, workers: int) -> None:
    assert create_loader(Slow(), batch_size, 8, CPU).num_workers == workers
    assert create_loader(Slow(), batch_size, 0, CPU).num_workers == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_images_come_in_order(workers: int) -> None:
    batches = read_batches(create_loader(Slow(), 2, workers, CPU))
    assert [batch[:, 0, 0, 0].tolist() for batch in batches] == [[0, 1], [2, 3]]
    images = read_batches(create_loader(Slow(), None, workers, CPU))
    assert [image[0, 0, 0].item() for image in images] == [0, 1, 2, 3]


def test_waiting_is_what_reading_takes_and_nothing_else() -> None:
    whole, loading, model = Stopwatch(), Stopwatch(), Stopwatch()
    with whole:
        for _ in read_batches(create_loader(Slow(), 2, 0, CPU), loading):
            with model:
                time.sleep(0.05)
    assert loading.seconds >= 4 * 0.02
    assert model.seconds >= 2 * 0.05
    assert loading.seconds + model.seconds <= whole.seconds


@pytest.mark.parametrize(("batch_size", "sizes"), [(None, [5]), (1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_images_are_read_when_their_batch_is_asked_for(batch_size: int | None, sizes: list[int]) -> None:
    read: list[int] = []

    def note(index: int) -> int:
        read.append(index)
        return index

    seen = []
    for batch in read_images([7, 3, 5, 1, 9], note, batch_size):
        seen += batch
        assert read == seen  # and none of the batches to come
        assert len(batch) == sizes.pop(0)
    assert (seen, sizes) == ([7, 3, 5, 1, 9], [])


def test_a_batch_is_gone_before_the_next_one_is_read() -> None:
    earlier: list[weakref.ref[Tensor]] = []

    def read(index: int) -> Tensor:
        assert not any(batch() is not None for batch in earlier)
        return torch.full((3,), float(index))

    batches = timed(map(torch.stack, read_images(range(4), read, 1)), Stopwatch())
    for _ in range(4):
        earlier.append(weakref.ref(next(batches)))
    assert next(batches, None) is None


def test_names_are_digested_as_the_bytes_that_they_are() -> None:
    assert digest_names([os.fsdecode(b"c\xff/0.png"), "ä"]) == hashlib.sha256(b"c\xff/0.png\n\xc3\xa4\n").hexdigest()
