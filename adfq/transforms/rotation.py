"""Rotations of all residual streams and heads of a network."""

from __future__ import annotations

from adfq.sites import Network
from adfq.transforms.heads import heads_problem, random_head_rotations, rotate_heads
from adfq.transforms.orthogonal import mean_keeping_rotation
from adfq.transforms.streams import rotate_stream, stream_problem


def rotate(network: Network, streams: bool = True, heads: bool = True, centre: bool = True) -> dict[str, str]:
    """Rotate a network in place by random Hadamard matrices; it computes the same in full precision.

    Args:
        network: an adapted model without quantizers.
        streams: True, the default, rotates the residual streams.
        heads: True, the default, rotates queries and keys, and values, of each head.
        centre: see `adfq.transforms.streams.rotate_stream`.

    Returns:
        The reason for each part that stays as it is, by name.
    """
    left = dict(network.unrotated)
    for stream in network.streams if streams else ():
        if problem := stream_problem(network, stream):
            left[stream.name] = problem
        else:
            rotate_stream(network, stream, mean_keeping_rotation(stream.width), centre)
    for attention in network.heads if heads else ():
        if problem := heads_problem(network, attention):
            left[attention.name] = problem
        else:
            rotate_heads(network, attention, *random_head_rotations(network, attention))
            if partial := "; ".join(filter(None, (attention.query_key, attention.value))):
                left[attention.name] = partial
    if not network.streams and not network.unrotated:
        left[""] = f"the adapter of {type(network.model).__name__} does not tell its residual stream"
    return left
