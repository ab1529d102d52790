"""Orthogonal matrices of every width in use."""

from __future__ import annotations

import pytest
import torch

from adfq.transforms.orthogonal import hadamard, mean_keeping_rotation, random_rotation

BUILT = (1, 2, 4, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
WIDE = (1024, 1152, 1280, 1408, 1536)
WITHOUT = (3, 6, 50, 92)


@pytest.mark.parametrize("size", BUILT + WIDE)
def test_hadamard_matrices_have_orthogonal_rows_of_ones(size: int) -> None:
    matrix = hadamard(size)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal((matrix.float() @ matrix.float().T), size * torch.eye(size))  # whole numbers, so exact


@pytest.mark.parametrize("size", WITHOUT)
def test_other_sizes_have_no_hadamard_matrix(size: int) -> None:
    assert hadamard(size) is None


@pytest.mark.parametrize("size", [*BUILT, *WITHOUT, 1152])
def test_rotations_are_orthogonal_and_one_keeps_the_mean(size: int) -> None:
    eye, ones = torch.eye(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    kept = mean_keeping_rotation(size)
    for rotation in (random_rotation(size), kept):
        torch.testing.assert_close(rotation @ rotation.T, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(kept @ ones, ones, rtol=0, atol=1e-11)
    torch.testing.assert_close(kept.T @ ones, ones, rtol=0, atol=1e-11)


def test_a_seed_decides_and_channels_are_spread() -> None:
    torch.manual_seed(3)
    first = mean_keeping_rotation(384)
    assert not torch.equal(first, mean_keeping_rotation(384))
    torch.manual_seed(3)
    assert torch.equal(first, mean_keeping_rotation(384))
    assert first.abs().amax() < 2.5 / 384**0.5
