"""Scores against the errors that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adfq.output_error import operands
from adfq.output_error.operands import LogOperand, Operand, output_scores, self_scores
from adfq.output_error.scores import LowRankScore, OutputScore, SelfScore, low_rank
from adfq.output_error.search import errors_of
from adfq.quantizers import AdaLogQuantizer, UniformQuantizer

SHAPES = {"tensor": (1, 1, 1, 1), "row": (1, 1, 5, 1), "head": (1, 3, 1, 1)}


def direct(values: Tensor, quantized: Tensor, other: Tensor, other_quantized: Tensor, shape: tuple[int, ...]) -> Tensor:
    error = (quantized @ other_quantized[:, :, None].mT - (values @ other.mT)[:, :, None]).double().square()
    kept = [place for place, size in zip((0, 1, 3), shape, strict=False) if size > 1]
    return error.sum([place for place in (0, 1, 3, 4) if place not in kept], keepdim=True).movedim(2, 0).flatten(1)


@pytest.mark.parametrize("others", [4, 40], ids=["few", "many"])
@pytest.mark.parametrize("kind", SHAPES)
def test_output_scores_differ_as_the_output_errors_do(kind: str, others: int) -> None:
    entries, heads = (1, 1) if kind == "row" else (2, 3)
    values, other = torch.randn(entries, heads, 5, 8), torch.randn(entries, heads, others, 8)
    quantized = values[:, :, None] + 0.1 * torch.randn(entries, heads, 6, 5, 8)
    other_quantized = other + 0.1 * torch.randn_like(other)
    score = OutputScore(values, SHAPES[kind], other, other_quantized)
    assert score.squared == (others == 4)
    found = score(quantized.clone())
    expected = direct(values, quantized, other, other_quantized, SHAPES[kind])
    assert found.shape == expected.shape
    torch.testing.assert_close(found - found[:1], (expected - expected[:1]).float(), rtol=1e-3, atol=1e-3)


@given(st.sampled_from([(1, 1, 1, 1), (1, 1, 5, 1), (1, 3, 1, 1), (1, 1, 1, 8)]), st.integers(0, 100))
@settings(max_examples=12, deadline=None)
def test_self_scores_are_squared_errors(shape: tuple[int, ...], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 3, 5, 8, generator=random)
    quantized = values[:, :, None] + torch.randn(2, 3, 4, 5, 8, generator=random)
    expected = torch.stack([(quantized[:, :, k] - values).square().sum_to_size(shape).flatten() for k in range(4)])
    torch.testing.assert_close(SelfScore(values, shape)(quantized.clone()), expected)


def test_a_score_of_low_rank_ranks_like_the_exact_one() -> None:
    tokens = torch.randn(400, 64) @ torch.randn(64, 64) * torch.logspace(0, -2, 64)
    weight = torch.randn(1, 1, 10, 64)
    exact = OutputScore(weight, (1, 1, 10, 1), tokens[None, None], tokens[None, None])
    rough = LowRankScore(exact, 16)
    quantized = torch.stack([UniformQuantizer(bits, "row").calibrate(weight[0, 0])(weight) for bits in (3, 4, 5, 6)], 2)
    found, expected = rough(quantized.clone()), exact(quantized.clone())
    assert ((found - expected).abs() < 0.3 * expected).all()
    factor, rest = low_rank(exact.factor[0, 0], 16)
    assert (rest >= 0).all()
    torch.testing.assert_close((factor @ factor.mT).diagonal() + rest, exact.factor[0, 0].diagonal())


@pytest.mark.parametrize("kind", ["uniform", "logarithmic"])
def test_candidates_are_quantized_as_the_quantizer_does(kind: str) -> None:
    values = torch.rand(2, 3, 5, 8)
    if kind == "uniform":
        quantizer: UniformQuantizer | AdaLogQuantizer = UniformQuantizer(4, "head").calibrate(values)
        operand = Operand(values, (1, 3, 1, 1), 16)
        candidate = torch.stack((quantizer.scale.flatten(), quantizer.zero_point.flatten()), -1)
    else:
        quantizer = AdaLogQuantizer(4, 0.17).calibrate(values)
        operand = LogOperand(values, AdaLogQuantizer(4, 0.17))
        candidate = torch.stack((quantizer.scale, quantizer.q.float()))[None]
    found = operand.quantize(operand.prepare(values), candidate.expand(3, -1, -1))
    torch.testing.assert_close(found[:, :, 1], quantizer(values))
    operand.set(candidate)
    torch.testing.assert_close(operand.quantized, quantizer(values))


def test_samples_rank_candidates_like_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(12, 2, 80, 16), torch.randn(12, 2, 80, 16)
    candidates = torch.tensor([[0.05, 8], [0.3, 8], [1.0, 8]])[:, None].expand(-1, 2, -1)
    orders = []
    for exact in (2**30, 1):
        monkeypatch.setattr(operands, "_EXACT", exact)
        left, right = Operand(query, (1, 2, 1, 1), 16), Operand(key, (1, 2, 1, 1), 16)
        right.set(candidates[1])
        scores = [output_scores(left, right), self_scores(left)]
        assert all((pair.coarse is pair.fine) == (exact > 1) for pair in scores)
        orders.append([errors_of(left, part, candidates).argsort(0) for pair in scores for part in vars(pair).values()])
    for everything, sample in zip(*orders, strict=True):
        assert torch.equal(everything, sample)
