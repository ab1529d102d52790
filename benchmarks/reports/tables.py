"""Rendering a table from its records: Markdown, CSV, LaTeX."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd

from adfq.methods import FULL_PRECISION
from benchmarks.reports.spec import METHOD_LABELS, Entry, Model, Table, published_numbers
from benchmarks.results import Record

#: What a row costs: key in the record, heading, how it is printed.
COSTS = (
    ("calibration_seconds", "Calibration, s", "{:.1f}"),
    ("relative_forward", "Forward, × full precision", "{:.2f}"),
    ("outliers", "Kept outliers, %", "{:.3f}"),
    ("size", "Size, MB", "{:.2f}"),
    ("calibration_memory", "Calibration memory, MB", "{:.0f}"),
)


def tabulate_results(table: Table, results: Iterable[tuple[Entry, Record]]) -> pd.DataFrame:
    """One row a cell, in the order measured: the table in long form, with numbers as numbers.

    Columns: row and its label, model, method, bits, the record's metrics and costs, ``delta`` to full precision in
    points, ``relative_forward`` (seconds over full precision's), ``published`` and ``verified`` where there is a
    published number, and what the cell was measured with.
    """
    rows = []
    for entry, record in results:
        config = {name: record["config"][name] for name in ("calibration_size", "seed", "data")}
        names = {"row": entry.row.key, "label": entry.row.label, "model": entry.model.key}
        what = {"method": entry.cell.method, "bits": entry.cell.bits}
        rows.append({**names, **what, **record["metrics"], **record.get("cost", {}), **config})
    frame = pd.DataFrame(rows)
    reference = frame[frame["method"] == FULL_PRECISION].set_index("model")
    frame["delta"] = frame[table.metric] - frame["model"].map(reference[table.metric])
    if "forward_seconds" in frame:
        frame["relative_forward"] = frame["forward_seconds"] / frame["model"].map(reference["forward_seconds"])
    if table.published:
        frame = frame.merge(published_numbers(table), "left", ["model", "method", "bits"])
        frame = frame.rename(columns={"value": "published"})
    return frame


def render(table: Table, frame: pd.DataFrame, style: str) -> str:
    """The table as ``"md"``, ``"csv"`` or ``"latex"`` text, ending in a newline."""
    if style == "csv":
        return str(frame.to_csv(index=False, float_format="%.4f"))
    summary = summarize(table, frame)
    notes = _notes(table, frame, summary)
    if style == "md":
        wide = _wide(table, summary, "**{}**".format)
        alignment = ["left", "left", *["right"] * (wide.shape[1] - 2)]
        body = wide.to_markdown(index=False, disable_numparse=True, colalign=alignment)
        heading = f"**Table {table.name}. {table.title}** ({table.profile} profile)"
        return "\n\n".join([heading, table.caption, body, *notes]) + "\n"
    wide = _wide(table, summary, r"\textbf{{{}}}".format)
    latex = (
        wide.rename(columns=_escape)
        .map(_escape)
        .to_latex(
            index=False,
            column_format="ll" + "r" * (wide.shape[1] - 2),
            caption=_escape(" ".join([f"{table.title}.", table.caption, *notes])),
            label=f"tab:{table.name}-{table.profile}",
            position="t",
        )
    )
    return str(latex)


def summarize(table: Table, frame: pd.DataFrame) -> pd.DataFrame:
    """Over seeds: one row for each row, bit-width and model, in the order of the table.

    Columns: mean, std (of the sample; NaN for a single seed), delta and costs (means), published, verified, and
    ``best``: whether the mean is ahead of each other one at that bit-width and model by more than the spread, which is
    √(s₁² + s₂²) of the two.
    """
    costs = {key: (key, "mean") for key, _, _ in COSTS if key in frame}
    firsts = {name: (name, "first") for name in ("label", "method", "published", "verified") if name in frame}
    summary = frame.groupby(["row", "bits", "model"], sort=False, as_index=False).agg(
        mean=(table.metric, "mean"), std=(table.metric, "std"), delta=("delta", "mean"), **costs, **firsts
    )
    summary["best"] = False
    quantized = summary[summary["method"] != FULL_PRECISION]
    for _, group in quantized.groupby(["bits", "model"]):
        best, *others = group.sort_values("mean", ascending=False)[["mean", "std"]].itertuples(name=None)
        # False for single seeds, whose spread is not known.
        ahead = [best[1] - mean > math.hypot(best[2], std) for _, mean, std in others]
        summary.loc[best[0], "best"] = bool(ahead) and all(ahead)
    return summary


def _wide(table: Table, summary: pd.DataFrame, emphasize: Callable[[str], str]) -> pd.DataFrame:
    lines = []
    for (_, bits), group in summary.groupby(["row", "bits"], sort=False):
        by_model = {row["model"]: row for row in _rows(group)}
        line = {"Method": group["label"].iloc[0], "W/A": bits}
        for model in table.models:
            row = by_model[model.key]
            text = _cell(table, summary, row)
            line[model.label] = emphasize(text) if row["best"] else text
            if table.cost:
                line |= _costs(table, model, row)
        lines.append(line)
    return pd.DataFrame(lines)


def _costs(table: Table, model: Model, row: Mapping[str, Any]) -> dict[str, str]:
    of_model = "" if len(table.models) == 1 else f"{model.label}: "
    values = {heading: (row.get(key), style) for key, heading, style in COSTS}
    return {
        f"{of_model}{heading}": "" if pd.isna(value) else style.format(value)
        for heading, (value, style) in values.items()
    }


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _cell(table: Table, summary: pd.DataFrame, row: Mapping[str, Any]) -> str:
    ours = f"{row['mean']:.2f}" + ("" if pd.isna(row["std"]) else f" ± {row['std']:.2f}")
    if not table.published:
        return ours if row["method"] == FULL_PRECISION else f"{ours} ({row['delta']:+.2f})"
    if not _counts(table, summary, row):
        ours += "‡"
    if pd.isna(row["published"]):
        return ours
    return f"{ours} / {row['published']:.2f}{'' if row['verified'] else '†'}"


def _counts(table: Table, summary: pd.DataFrame, row: Mapping[str, Any]) -> bool:
    """Whether full precision of the row's model agrees with the published number."""
    if table.full_precision_tolerance is None or row["method"] == FULL_PRECISION:
        return True
    reference = summary[(summary["model"] == row["model"]) & (summary["method"] == FULL_PRECISION)]
    difference = (reference["mean"] - reference["published"]).abs()
    return bool((difference <= table.full_precision_tolerance).any())


def _notes(table: Table, frame: pd.DataFrame, summary: pd.DataFrame) -> list[str]:
    images = _any_of(frame["images"])
    measured = f"Measured on {images} images of {', '.join(sorted(set(frame['data'])))}"
    quantized = frame[frame["method"] != FULL_PRECISION]
    if not quantized.empty:
        sizes: dict[str, list[str]] = {}
        for method, group in quantized.groupby("method", sort=False):
            sizes.setdefault(_any_of(group["calibration_size"]), []).append(METHOD_LABELS.get(str(method), str(method)))
        for_whom = len(sizes) > 1
        measured += ", calibrated on " + " and ".join(
            f"{size} ({', '.join(labels)})" if for_whom else size for size, labels in sizes.items()
        )
        seeds = sorted(set(quantized["seed"]))
        if len(seeds) == 1:
            measured += f", seed {seeds[0]}"
    notes = [f"{measured}."]
    if not quantized.empty and len(seeds) > 1:
        notes.append(
            f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))} (choice of calibration images, and "
            "random numbers of the method). Bold: ahead of each other one at that bit-width by more than the spread, "
            "√(s₁² + s₂²) of the two."
        )
    if table.published and not frame.loc[frame["published"].notna(), "verified"].all():
        notes.append("† Quoted from the literature without a source at hand.")
    if not all(_counts(table, summary, row) for row in _rows(summary)):
        notes.append(
            f"‡ Does not count: full precision of this model is missing or differs from the published number by more "
            f"than {table.full_precision_tolerance} points."
        )
    return notes


def _any_of(numbers: pd.Series[int]) -> str:
    return " or ".join(map(str, sorted(set(numbers))))


_LATEX = {"%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "×": r"$\times$", "±": r"$\pm$", "√": r"$\surd$"}
_LATEX |= {"†": r"\dag{}", "‡": r"\ddag{}", "₁": "$_1$", "₂": "$_2$", "²": "$^2$", "α": r"$\alpha$", "∞": r"$\infty$"}


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


STYLES: Mapping[str, str] = {"md": "md", "csv": "csv", "latex": "tex"}
