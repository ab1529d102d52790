"""Integer codes of 1 to 8 bits in bytes without gaps."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes packed without gaps, lowest bit first.

    Args:
        codes: uint8, each below 2^bits; any shape, n of them.
        bits: bits a code, 1 to 8.

    Returns:
        Bytes, uint8, ⌈n·bits/8⌉ of them; unused bits of the last one are 0.
    """
    stream = _to_bits(codes.flatten(), bits)
    return _from_bits(nn.functional.pad(stream, (0, -len(stream) % 8)), 8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes that `pack` has packed: uint8, `count`.

    Args:
        packed: uint8, from `pack`.
        bits: bits a code, 1 to 8.
        count: number of codes.
    """
    return _from_bits(_to_bits(packed, 8)[: count * bits], bits)


def _to_bits(values: Tensor, bits: int) -> Tensor:
    return ((values[:, None] >> torch.arange(bits, dtype=torch.uint8, device=values.device)) & 1).flatten()


def _from_bits(stream: Tensor, bits: int) -> Tensor:
    places = torch.arange(bits, dtype=torch.uint8, device=stream.device)
    return (stream.view(-1, bits) << places).sum(1, dtype=torch.uint8)
