"""Rotations of the heads of an attention, which its layers absorb (GLF-Q, arXiv 2609.34564)."""

from __future__ import annotations

import torch
from torch import Tensor

from adfq.errors import AdfqError
from adfq.sites import Network
from adfq.streams import Heads
from adfq.transforms.orthogonal import random_rotation
from adfq.transforms.shared import shared_parameter, weight_layer


def heads_problem(network: Network, heads: Heads) -> str | None:
    """Return the reason why no head of an attention can be rotated; None where one of its products can.

    Args:
        network: an adapted model.
        heads: heads of an attention of it.
    """
    if heads.query_key and heads.value:
        return f"{heads.query_key}; {heads.value}"
    return shared_parameter(network.model, [*heads.parameters, *heads.positions])


@torch.no_grad()
def rotate_heads(network: Network, heads: Heads, query_key: Tensor | None = None, value: Tensor | None = None) -> None:
    """Rotate queries and keys, and values, of each head, in place; the attention computes the same.

    Queries q and keys k become q·R and k·R, values v become v·R, and the rows of the output layer that read them Rᵀ·W.
    Relative positions are rotated as keys are. Weights are multiplied in double precision.

    Args:
        network: an adapted model without quantizers.
        heads: heads of an attention of it.
        query_key: orthogonal matrices of queries and keys, heads×d×d; the same for all heads where there are relative
            positions. None, the default, leaves them as they are.
        value: orthogonal matrices of values, heads×d×d; None, the default, leaves them as they are.

    Raises:
        AdfqError: for matrices of another shape, and for heads that cannot be rotated so.
    """
    qkv, proj = weight_layer(network.model, heads.qkv), weight_layer(network.model, heads.proj)
    size = len(qkv.weight) // (3 * heads.count)
    for matrices, reason in ((query_key, heads.query_key), (value, heads.value)):
        if matrices is not None and reason:
            raise AdfqError(f"{heads.name}: {reason}")
        if matrices is not None and matrices.shape != (heads.count, size, size):
            raise AdfqError(f"{heads.name}: rotations must be {heads.count}×{size}×{size}, got {tuple(matrices.shape)}")
    if query_key is not None and heads.positions and not torch.equal(query_key, query_key[:1].expand_as(query_key)):
        raise AdfqError(f"{heads.name}: relative positions need the same rotation in all heads")
    keep = torch.eye(size, dtype=torch.float64).expand(heads.count, size, size)
    scores, values = (keep if matrices is None else matrices.double() for matrices in (query_key, value))
    rotations = torch.stack([scores, scores, values]).to(qkv.weight.device)
    weight = qkv.weight.double().view(3, heads.count, size, -1)
    qkv.weight.copy_((rotations.transpose(2, 3) @ weight).view(qkv.weight.shape))
    if qkv.bias is not None:
        bias = qkv.bias.double().view(3, heads.count, 1, size)
        qkv.bias.copy_((bias @ rotations).flatten())
    output = proj.weight.double().unflatten(1, (heads.count, 1, size))
    proj.weight.copy_((output @ rotations[2]).flatten(1))
    if query_key is not None:
        for name in heads.positions:
            parameter = network.model.get_parameter(name)
            parameter.copy_(parameter.double() @ rotations[0, 0])


def random_head_rotations(network: Network, heads: Heads) -> tuple[Tensor | None, Tensor | None]:
    """Return random rotations for `rotate_heads`: of queries and keys, and of values; None where there can be none.

    Args:
        network: an adapted model.
        heads: heads of an attention of it.
    """
    size = len(weight_layer(network.model, heads.qkv).weight) // (3 * heads.count)
    shared = random_rotation(size).expand(heads.count, size, size) if heads.positions else None
    query_key = torch.stack([random_rotation(size) for _ in range(heads.count)]) if shared is None else shared
    value = torch.stack([random_rotation(size) for _ in range(heads.count)])
    return None if heads.query_key else query_key, None if heads.value else value
