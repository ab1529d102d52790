"""Saved and exported models as rows: size, agreement, products on integers, latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from adfq.registry import method_label, methods
from benchmarks.run.records import Record

_FLOAT, _EXPORTED = "float32, onnxruntime", "int8, onnxruntime"

#: Headings, with their meaning.
COLUMNS: Mapping[str, str] = {
    "Model": "",
    "Method": "",
    "W/A": "bit-widths of weights and activations",
    "Saved, MB": "file of `adfq quantize`, with its share of the weights in float32",
    "Exported, MB": "ONNX files",
    "In int8": "products that onnxruntime runs on integers, of all",
    "Agreement": "with the simulation: images with the same top-1 class, mean IoU of both masks, or the largest "
    "relative error of the features",
    "Measured": "top-1 or mean IoU with the ground truth in %, simulated → in onnxruntime",
    "ms": "median of milliseconds an image, one at a time: float32 → int8, both in onnxruntime; of Segment Anything "
    "that of the image encoder, of detectors that of the backbone",
}


def tabulate_exports(found: Sequence[Record]) -> pd.DataFrame:
    """Return a row for each exported model, and for each that cannot be exported, with the columns of `COLUMNS`.

    Args:
        found: from `benchmarks.run.store.ResultStore.read_exports`.
    """
    order = {name: index for index, name in enumerate(methods())}
    ranked = sorted(found, key=lambda record: _rank(record["config"], order))
    return pd.DataFrame([_row(record) for record in ranked], columns=list(COLUMNS))


def reasons_of(found: Sequence[Record]) -> dict[str, list[str]]:
    """Return the reasons why products stay in float, and why models cannot be exported, with the methods' labels.

    Args:
        found: see `tabulate_exports`.
    """
    reasons: dict[str, list[str]] = {}
    for record in sorted(found, key=lambda record: method_label(record["config"]["method"])):
        label = method_label(record["config"]["method"])
        for reason in [record["not_applicable"]] if "not_applicable" in record else record.get("floating", {}):
            if label not in reasons.setdefault(reason, []):
                reasons[reason].append(label)
    return reasons


def _rank(config: Mapping[str, Any], order: Mapping[str, int]) -> tuple[Any, ...]:
    return config["task"], config["model"], config["data"], config["bits"], order.get(config["method"], len(order))


def _row(record: Record) -> dict[str, str]:
    config, saved = record["config"], record["saved"]
    row = {
        "Model": f"{config['model']}, {config['data']}",
        "Method": method_label(config["method"]),
        "W/A": config["bits"],
        "Saved, MB": f"{saved['size']:.2f} ({saved['share']:.1f} %)",
    }
    if "not_applicable" in record:
        return {**dict.fromkeys(COLUMNS, "–"), **row, "Exported, MB": "no"}
    models, metrics = record["models"], record["metrics"]
    ends = " → ".join(f"{models[name]['1']:.1f}" for name in (_FLOAT, _EXPORTED))
    return row | {
        "Exported, MB": f"{models[_EXPORTED]['size']:.2f}",
        "In int8": f"{record['integer']} of {record['products']}",
        "Agreement": _agreement(metrics),
        "Measured": f"{metrics['simulated']:.2f} → {metrics['exported']:.2f}" if "simulated" in metrics else "–",
        "ms": ends,
    }


def _agreement(metrics: Mapping[str, float]) -> str:
    if "agreement" in metrics:
        kind = "IoU" if "instances" in metrics else "same top-1"
        return f"{metrics['agreement']:.2f} % {kind}"
    return f"{max(value for name, value in metrics.items() if name.startswith('error_')):.2f} % error"
