"""PTQ4ViT's samples: their size, and that they are unbiased."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baselines.ptq4vit.samples import Sample, draw, energies


def taking(values: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda chosen: (values[chosen],)


def sampled(size: int, found: Tensor, passes: int) -> Sample:
    """A sample of the items 0, 1, 2 …, which come in several batches."""
    sample = Sample(size)
    values = torch.arange(len(found))
    for energy, part in zip(found.chunk(passes), values.chunk(passes), strict=True):
        sample.add(energy, taking(part))
    return sample


@settings(max_examples=30, deadline=None, derandomize=True)
@given(tokens=st.integers(2, 64), images=st.integers(2, 16), rows=st.integers(8, 64), seed=st.integers(0, 10**6))
def test_rows_are_drawn_from_all_tokens_and_images(tokens: int, images: int, rows: int, seed: int) -> None:
    """Between neighbouring draws lies a multiple of an image's tokens; all rows are alike."""
    torch.manual_seed(seed)
    total = tokens * images * rows
    distinct = 0
    for _ in range(40):
        chosen, probabilities = draw(torch.ones(total, dtype=torch.float64), rows)
        torch.testing.assert_close(probabilities, torch.full_like(probabilities, rows / total))
        assert (chosen // (tokens * images)).tolist() == list(range(rows))
        distinct += len((chosen % tokens).unique())
    assert distinct > 40 * 1.5


def test_few_items_are_all_drawn() -> None:
    chosen, probabilities = draw(torch.rand(3, 5, dtype=torch.float64), 8)
    assert chosen.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert (probabilities == 1).all()


@pytest.mark.parametrize("large", [0, 1, 3, 4])
def test_large_items_are_certain_and_others_are_drawn_by_mass(large: int) -> None:
    mass = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.float64).repeat(2000, 1)
    mass[:, 1 : 1 + large] = 1e6
    chosen, probabilities = draw(mass, 4)
    drawn = torch.zeros_like(mass).scatter_(1, chosen, 1)
    assert chosen.shape == (2000, 4)
    assert (drawn.sum(1) == 4).all()  # without replacement
    assert (drawn[:, 1 : 1 + large] == 1).all()
    if large < 4:
        rest = mass[0].clone()
        rest[1 : 1 + large] = 0
        expected = rest / rest.sum() * (4 - large)
        expected[1 : 1 + large] = 1
        torch.testing.assert_close(probabilities, expected[chosen])
        assert (drawn.mean(0) - expected).abs().max() < 0.04


@pytest.mark.parametrize("passes", [1, 6])
def test_every_item_weighs_one_on_average(passes: int) -> None:
    found = torch.rand(12, 2, dtype=torch.float64) + 0.1
    found[5] *= 10
    draws, counts = 800, torch.zeros(12, dtype=torch.float64)
    for _ in range(draws):
        sample = sampled(4, found, passes)
        (items,), weights = sample.thin(4)
        assert len(items.unique()) == len(sample) == 4
        counts[items] += weights
    assert (counts / draws - 1).abs().max() < 0.2


def test_an_item_with_most_of_the_mass_stays() -> None:
    found = torch.full((200, 2), 1e-3, dtype=torch.float64)
    found[7] = 1000
    for _ in range(20):
        (items,), weights = sampled(5, found, 50).thin(5)
        assert weights[items == 7].tolist() == [1]


def test_items_without_mass_are_drawn_only_where_there_are_no_others() -> None:
    found = torch.zeros(40, 2, dtype=torch.float64)
    found[[3, 30]] = 1
    for passes in (1, 8):
        (items,), weights = sampled(5, found, passes).thin(5)
        assert len(items) == 5
        assert weights[(items == 3) | (items == 30)].tolist() == [1, 1]


@pytest.mark.parametrize("passes", [1, 2, 30])
def test_a_sample_holds_everything_as_long_as_there_is_room(passes: int) -> None:
    sample = sampled(30, torch.rand(30, 2, dtype=torch.float64), passes)
    (items,), weights = sample.thin(30)
    assert items.tolist() == list(range(30))
    assert (weights == 1).all()


def test_items_come_from_all_batches_alike() -> None:
    """Equal batches have equal numbers of items, but for rounding, however early they came."""
    for _ in range(20):
        (items,), _ = sampled(64, torch.ones(640, 2, dtype=torch.float64), 8).thin(64)
        assert (torch.bincount(items // 80, minlength=8) - 8).abs().max() <= 4


def test_values_of_different_sizes_are_filled_with_zeros() -> None:
    sample = Sample(4)
    for size in (2, 5, 3):
        sample.add(torch.ones(1, 2, dtype=torch.float64), taking(torch.full((1, size, size), float(size))))
    (values,), _ = sample.thin(4)
    assert values.shape == (3, 5, 5)
    for value, size in zip(values, (2, 5, 3), strict=True):
        assert (value[:size, :size] == size).all()
        assert value.sum() == size**3


def test_energies_do_not_underflow() -> None:
    gradient = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    for factor in (1.0, 1e-30):
        found = energies(torch.tensor([2.0, 10.0]), gradient * factor)
        torch.testing.assert_close(found / factor**2, torch.tensor([[5.0, 10.0], [9.0, 90.0]]).double())
