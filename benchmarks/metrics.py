"""Metrics and costs as data: tables, the page, figures and the regression check read what they are from here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adfq.errors import AdfqError


@dataclass(frozen=True)
class Metric:
    """A number of a record.

    Attributes:
        key: its name in a record's ``metrics`` or ``cost``.
        label: its name in headings.
        unit: behind the label; empty for a plain number.
        more_is_better: the direction that is an improvement.
        digits: decimals in tables.
    """

    key: str
    label: str
    unit: str = ""
    more_is_better: bool = True
    digits: int = 2

    @property
    def heading(self) -> str:
        """The label and, where there is one, the unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def format(self, value: float) -> str:
        """Return a value with the metric's decimals."""
        return f"{value:.{self.digits}f}"

    def gain(self, before: float, now: float) -> float:
        """Return by how much `now` is better than `before`; negative where it is worse."""
        return now - before if self.more_is_better else before - now


def _by_key(metrics: Iterable[Metric]) -> dict[str, Metric]:
    return {metric.key: metric for metric in metrics}


#: Accuracies, by key. A metric that is added here can stand in any table.
METRICS: Mapping[str, Metric] = _by_key(
    [
        Metric("top1", "top-1", "%"),
        Metric("top5", "top-5", "%"),
        Metric("box_ap", "box AP", "%"),
        Metric("mask_ap", "mask AP", "%"),
        Metric("mean_iou", "mean IoU", "%"),
        Metric("knn_top1", "k-NN top-1", "%"),
        Metric("prototypes_top1", "prototypes top-1", "%"),
        Metric("ridge_top1", "ridge top-1", "%"),
        Metric("feature_error", "feature error", "%", more_is_better=False),
        Metric("feature_cosine", "feature cosine", digits=4),
    ]
)

#: Costs of a row, by key, in the order of their columns. ``relative_forward`` is derived from ``forward_seconds``.
COSTS: Mapping[str, Metric] = _by_key(
    [
        Metric("calibration_seconds", "Calibration", "s", more_is_better=False, digits=1),
        Metric("relative_forward", "Forward", "× full precision", more_is_better=False),
        Metric("outliers", "Kept outliers", "%", more_is_better=False, digits=3),
        Metric("size", "Size", "MB", more_is_better=False),
        Metric("calibration_memory", "Calibration memory", "MB", more_is_better=False, digits=0),
    ]
)


def find_metric(key: str) -> Metric:
    """Return the metric of that key.

    Raises:
        AdfqError: for an unknown key.
    """
    if key not in METRICS:
        raise AdfqError(f"unknown metric {key!r}; there are {', '.join(METRICS)}")
    return METRICS[key]
