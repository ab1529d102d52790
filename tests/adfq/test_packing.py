"""Codes in bytes without gaps."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adfq.packing import pack, unpack


@given(st.integers(2, 8), st.integers(0, 100), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_packing_is_tight_and_reversible(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == (count * bits + 7) // 8
    assert torch.equal(unpack(packed, bits, count), codes)


def test_packing_is_lowest_bit_first() -> None:
    assert pack(torch.tensor([0x3, 0xA], dtype=torch.uint8), 4).tolist() == [0xA3]
    assert pack(torch.tensor([1, 2, 7], dtype=torch.uint8), 3).tolist() == [0b11_010_001, 0b1]
