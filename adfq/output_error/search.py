"""Searches for the quantizers of a layer's two operands by the error of their product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adfq.output_error.grids import (
    CANDIDATES,
    operand_ends,
    patch_embedding_ends,
    positive_ends,
    width_grid,
)
from adfq.output_error.operands import EndsOperand, LogOperand, Operand, Scores, output_scores, self_scores
from adfq.output_error.scores import Score
from adfq.output_error.settings import Settings
from adfq.quantizers.adalog import BASES

_AT_ONCE = 2**17  # values that are quantized at once

_SURVIVORS = 16
_CHILDREN = 8
_FINALISTS = 8  # the best of a grid, which are scored on the fine sample; half as many of each step of a refinement

#: Survivors of AdaLog's search for base and scale, scales that each of them has, steps.
_PAIRS, _PAIR_CHILDREN, _PAIR_STEPS = 32, 4, 5


def errors_of(operand: Operand, score: Score, candidates: Tensor) -> Tensor:
    """Return the score of each candidate, K×G.

    Args:
        operand: operand that the candidates are for.
        score: a score of the operand.
        candidates: K×G×2.
    """
    values = operand.prepare(score.values)
    at_once = max(1, _AT_ONCE // values.numel())
    return torch.cat([score(operand.quantize(values, part)) for part in candidates.split(at_once)])


def _take(candidates: Tensor, indices: Tensor) -> Tensor:
    """Return for each group the candidates with some indices: k×G of K×G×2."""
    return candidates.gather(0, indices[..., None].expand(-1, -1, 2))


def _best(candidates: Tensor, errors: Tensor, count: int) -> Tensor:
    """Return the best candidates of each group, best first."""
    if count == 1:
        return _take(candidates, errors.argmin(0, keepdim=True))
    return _take(candidates, errors.topk(min(count, len(errors)), dim=0, largest=False).indices)


def choose(
    operand: Operand,
    scores: Scores,
    candidates: Tensor,
    refine: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    steps: int = 0,
) -> None:
    """Set an operand to the best of its candidates, refined progressively (FPCS), and of its present setting.

    The best candidate ever seen is kept. The released code keeps the best of the last step, which can be worse.

    Args:
        operand: operand to set.
        scores: its scores.
        candidates: K×G×2.
        refine: function from candidates, their errors and the number of the step to the next candidates.
        steps: number of refinements; 0, the default, for none.
    """
    count = 1 if scores.fine is scores.coarse else _FINALISTS // 2 if steps else _FINALISTS
    errors = errors_of(operand, scores.coarse, candidates)
    finalists = [_best(candidates, errors, count)]
    for step in range(steps):
        assert refine is not None
        candidates = refine(candidates, errors, step)
        errors = errors_of(operand, scores.coarse, candidates)
        finalists.append(_best(candidates, errors, count))
    if operand.present is not None:
        finalists.append(operand.present[None])
    pool = torch.cat(finalists)
    operand.set(_best(pool, errors_of(operand, scores.fine, pool), 1)[0] if len(pool) > 1 else pool[0])


def choose_width(operand: Operand, scores: Scores, grid: tuple[Tensor, Tensor], steps: int) -> None:
    """Set a uniform operand to the best of a grid, with AdaLog's progressive refinement of scales (section FPCS).

    Args:
        operand: operand to set.
        scores: its scores.
        grid: candidates (K×G×2) and the difference of neighbouring scales (G).
        steps: number of refinements.
    """
    candidates, spacing = grid
    offsets = torch.arange(_CHILDREN, device=spacing.device) / (_CHILDREN - 1) - 0.5
    least = torch.full_like(spacing, operand.least).maximum(candidates[..., 0].amin(0) / 100)

    def refine(candidates: Tensor, errors: Tensor, step: int) -> Tensor:
        survivors = _best(candidates, errors, _SURVIVORS)
        moves = offsets[:, None] * spacing * (_CHILDREN - 0.5) ** -step
        scales = (survivors[:, None, :, 0] + moves).maximum(least)
        return torch.stack((scales, survivors[:, None, :, 1].expand_as(scales)), -1).flatten(0, 1)

    choose(operand, scores, candidates, refine, steps)


def search_layer(tokens: Operand, weight: Operand, settings: Settings) -> None:
    """Search for the quantizers of a layer's input and weight: each by itself, then in turn by the output's error.

    Args:
        tokens: input, 1×1×T×C.
        weight: weight, 1×1×R×C, a group for each row.
        settings: settings of the search.
    """
    weights = _width_grid(weight, settings.weight_zero_points(weight.levels), settings)
    choose_width(weight, self_scores(weight), weights, settings.steps)
    if isinstance(tokens, LogOperand):
        _search_log_layer(tokens, weight, weights, settings)
        return
    inputs = _width_grid(tokens, settings.input_zero_points(tokens.levels), settings)
    choose_width(tokens, self_scores(tokens), inputs, settings.steps)
    for _ in range(settings.rounds):
        choose_width(weight, output_scores(weight, tokens), weights, settings.steps)
        choose_width(tokens, output_scores(tokens, weight), inputs, settings.steps)


def search_by_itself(operand: Operand, settings: Settings) -> None:
    """Search for the quantizer of a layer's input by its own error.

    Args:
        operand: input, 1×1×T×C.
        settings: settings of the search.
    """
    grid = _width_grid(operand, settings.input_zero_points(operand.levels), settings)
    choose_width(operand, self_scores(operand), grid, settings.steps)


def search_patch_embedding(tokens: Operand, weight: Operand, settings: Settings) -> None:
    """Search for the quantizer of a weight whose input stays in full precision.

    Args:
        tokens: input, 1×1×T×C.
        weight: weight, 1×1×R×C, a group for each row.
        settings: settings of the search.
    """
    scores = output_scores(weight, tokens)
    if isinstance(weight, EndsOperand):
        lower, upper = patch_embedding_ends(weight.groups)
        choose(weight, scores, torch.stack((lower, upper), -1))
        _search_ends(weight, scores, lower, upper)
    else:
        grid = _width_grid(weight, settings.patch_embedding_zero_points(weight.levels), settings)
        choose_width(weight, scores, grid, settings.steps)


def search_product(left: Operand, right: Operand, settings: Settings) -> None:
    """Search for the quantizers of a matrix product's two operands, in turn by the product's error.

    Args:
        left: E×H×M×C.
        right: E×H×N×C, both as rows.
        settings: settings of the search.
    """
    operands = (left, right)
    grids = [_start_of_operand(operand, settings) for operand in operands]
    if isinstance(left, EndsOperand):
        for operand, other, (ends, _) in zip(operands, operands[::-1], grids, strict=True):
            choose(operand, output_scores(operand, other), ends)
    for _ in range(settings.rounds):
        for operand, other, grid in zip(operands, operands[::-1], grids, strict=True):
            scores = output_scores(operand, other)
            if isinstance(operand, EndsOperand):
                _search_ends(operand, scores, *grid[0].unbind(-1))
            else:
                choose_width(operand, scores, grid, 0 if isinstance(operand, LogOperand) else settings.steps)


def _start_of_operand(operand: Operand, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the candidates of a matrix product's operand, and set it to the last but one."""
    none = operand.values.new_empty(0)
    if isinstance(operand, LogOperand):
        bases = torch.tensor(BASES, device=none.device, dtype=none.dtype)[:, None]
        grid = torch.stack((torch.ones_like(bases), bases), -1), none
    elif isinstance(operand, EndsOperand):
        grid = torch.stack(operand_ends(operand.groups), -1), none
        operand.set(grid[0][-1])  # the code lists one more, which it does not try
        return grid
    else:
        grid = _width_grid(operand, settings.operand_zero_points(operand.levels), settings)
    operand.set(grid[0][-2])
    return grid


def _search_ends(operand: EndsOperand, scores: Scores, lower: Tensor, upper: Tensor) -> None:
    """Search for the lower end of each range at its present upper end, and then the other way round."""
    assert operand.present is not None
    choose(operand, scores, torch.stack((lower, operand.present[:, 1].expand_as(upper)), -1))
    choose(operand, scores, torch.stack((operand.present[:, 0].expand_as(lower), upper), -1))


def _search_log_layer(tokens: LogOperand, weight: Operand, weights: tuple[Tensor, Tensor], settings: Settings) -> None:
    shift = tokens.quantizer.shift
    inner, whole = (end + shift for end in positive_ends(tokens.values, (0.9, 1.0)))
    start = torch.linspace(0, 1, CANDIDATES)[-2]
    scale = torch.lerp(inner, whole, start.to(inner))
    for _ in range(settings.rounds):
        scores = output_scores(tokens, weight)
        _search_log(tokens, scores, inner, whole, scale if tokens.present is None else tokens.present[0, 0])
        choose_width(weight, output_scores(weight, tokens), weights, settings.steps)


def _search_log(tokens: LogOperand, scores: Scores, inner: Tensor, whole: Tensor, scale: Tensor) -> None:
    """Search for base and scale: bases at the present scale, the best ones with other scales, finer scales of these."""
    device = scale.device
    bases = torch.tensor(BASES, device=device, dtype=scale.dtype)
    candidates = torch.stack((scale.expand_as(bases), bases), -1)[:, None]
    errors = errors_of(tokens, scores.coarse, candidates)
    survivors = _best(candidates, errors, CANDIDATES // _SURVIVORS)
    spacing = (whole - inner) / (_SURVIVORS - 1)
    scales = inner + spacing * torch.arange(_SURVIVORS, device=device)
    offsets = torch.arange(_PAIR_CHILDREN, device=device) / (_PAIR_CHILDREN - 1) - 0.5

    def refine(candidates: Tensor, errors: Tensor, step: int) -> Tensor:
        pairs = _best(candidates, errors, _PAIRS)
        moves = offsets[:, None] * spacing * (_PAIR_CHILDREN - 0.5) ** -step
        moved = (pairs[:, None, :, 0] + moves).clamp_(min=torch.finfo(moves.dtype).tiny)
        return torch.stack((moved, pairs[:, None, :, 1].expand_as(moved)), -1).flatten(0, 1)

    pairs = torch.cartesian_prod(survivors[:, 0, 1], scales).flip(-1)[:, None]
    choose(tokens, scores, pairs, refine, _PAIR_STEPS)


def _width_grid(operand: Operand, zero_points: int, settings: Settings) -> tuple[Tensor, Tensor]:
    return width_grid(operand.groups, operand.levels, zero_points, operand.least, settings.released_grid)
