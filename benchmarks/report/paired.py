"""Paired comparison of methods on the same images and seeds: bootstrap intervals of their differences."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.run.correct import unpack_correct

#: Number of bootstrap resamples, and the confidence of intervals in %.
RESAMPLES, CONFIDENCE = 2000, 95

_SEED = 0
_CHUNK = 1_000_000  # largest number of images drawn at once


class Interval(NamedTuple):
    """Interval of a difference, in points."""

    low: float
    high: float


def stack_correct(cells: pd.DataFrame, metric: str) -> NDArray[np.bool_] | None:
    """Return which images the rows of a column got right.

    Args:
        cells: measured cells of one bit-width and model (`benchmarks.report.tables.tabulate_results`).
        metric: key of the metric.

    Returns:
        Rows × seeds × images, rows in the order of `cells` and seeds in ascending order; None unless there are several
        seeds, the same for all rows, each with the bits of the same images.
    """
    stacks: list[list[Any]] = []
    seeds = set()
    for _, row in cells.groupby("row", sort=False):
        of_seeds = row.sort_values("seed").to_dict("records")
        seeds.add(tuple(cell["seed"] for cell in of_seeds))
        stacks.append([unpack_correct({"metrics": cell, "correct": cell["correct"]}).get(metric) for cell in of_seeds])
    every = [bits for stack in stacks for bits in stack]
    if len(seeds) != 1 or len(seeds.pop()) < 2 or any(bits is None for bits in every):
        return None
    if cells["evaluated"].nunique(dropna=False) > 1 or len({len(bits) for bits in every}) > 1:
        return None
    return np.array(stacks)


def resample(correct: NDArray[np.bool_], resamples: int = RESAMPLES) -> NDArray[np.float64]:
    """Return accuracies of rows in bootstrap resamples of images and seeds, the same ones for all rows.

    Images and seeds are drawn with replacement, each as many as there are, independently of each other.

    Args:
        correct: rows × seeds × images.
        resamples: number of resamples.

    Returns:
        Accuracies in %, resamples × rows; always the same for the same `correct`.
    """
    return _resample(np.packbits(correct).tobytes(), correct.shape, resamples)


@lru_cache(maxsize=256)  # a report has each table as a page, in Markdown, in LaTeX and in figures
def _resample(packed: bytes, shape: tuple[int, int, int], resamples: int) -> NDArray[np.float64]:
    rows, seeds, images = shape
    correct = np.unpackbits(np.frombuffer(packed, np.uint8), count=rows * seeds * images)
    # Whole numbers below 2^53: exact, so that equal bits have a difference of exactly 0.
    bits = correct.reshape(rows * seeds, images).T.astype(float)
    generator = np.random.default_rng(_SEED)
    drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    hits = np.empty((resamples, rows))
    step = max(1, _CHUNK // images)
    for start in range(0, resamples, step):
        part = drawn_seeds[start : start + step]
        drawn = generator.integers(images, size=(len(part), images)) + images * np.arange(len(part))[:, None]
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)
        hits[start : start + step] = np.einsum("brs,bs->br", (times @ bits).reshape(len(part), rows, seeds), part)
    accuracies: NDArray[np.float64] = 100 * hits / (seeds * images)
    accuracies.flags.writeable = False
    return accuracies


def interval(accuracies: NDArray[np.float64], others: NDArray[np.float64]) -> Interval:
    """Return the interval of the difference between two rows.

    Args:
        accuracies: those of a row in resamples (`resample`), in %.
        others: those of another row in the same resamples.
    """
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(accuracies - others, [tail, 100 - tail])
    return Interval(float(low), float(high))
