"""Rendering a table from its records: Markdown, CSV, LaTeX."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd

from adfq.method import FULL_PRECISION
from benchmarks.plan import METHOD_LABELS, Entry, Model, Table, published_numbers
from benchmarks.run.console import markdown_table
from benchmarks.run.store import Record

#: What a row costs: key in the record, heading, how it is printed.
COSTS = (
    ("calibration_seconds", "Calibration, s", "{:.1f}"),
    ("relative_forward", "Forward, × full precision", "{:.2f}"),
    ("outliers", "Kept outliers, %", "{:.3f}"),
    ("size", "Size, MB", "{:.2f}"),
    ("calibration_memory", "Calibration memory, MB", "{:.0f}"),
)


def tabulate_results(table: Table, results: Iterable[tuple[Entry, Record | None]]) -> pd.DataFrame:
    """One row a cell, in the order measured: the table in long form, with numbers as numbers.

    Columns: row and its label, model, method, bits, ``failed`` (there is no record, and every number is NaN), the
    record's metrics and costs, ``delta`` to full precision in
    points, ``relative_forward`` (seconds over full precision's), ``published`` and ``verified`` where there is a
    published number, and what the cell was measured with. A table of several metrics has a column of each, and a
    difference and a published number to each of them: ``box_ap``, ``delta_box_ap``, ``published_box_ap`` … A metric
    that a record has not is NaN.
    """
    rows = []
    for entry, record in results:
        config = {name: entry.cell.config[name] for name in ("calibration_size", "seed", "data")}
        names = {"row": entry.row.key, "label": entry.row.label, "model": entry.model.key}
        what = {"method": entry.cell.method, "bits": entry.cell.bits, "failed": record is None}
        measured = {} if record is None else {**record["metrics"], **record.get("cost", {})}
        rows.append({**names, **what, **measured, **config})
    frame = pd.DataFrame(rows)
    for metric in table.metrics:
        if metric not in frame:
            frame[metric] = math.nan
    reference = frame[frame["method"] == FULL_PRECISION].set_index("model")
    for metric in table.metrics:
        frame[_column(table, "delta", metric)] = frame[metric] - frame["model"].map(reference[metric])
    if "forward_seconds" in frame:
        frame["relative_forward"] = frame["forward_seconds"] / frame["model"].map(reference["forward_seconds"])
    if table.published:
        numbers = published_numbers(table)
        for metric in table.metrics:
            of_metric = numbers[numbers["metric"] == metric].drop(columns="metric")
            names = {"value": _column(table, "published", metric), "verified": _column(table, "verified", metric)}
            frame = frame.merge(of_metric.rename(columns=names), "left", ["model", "method", "bits"])
    return frame


def _column(table: Table, name: str, metric: str) -> str:
    return name if len(table.metrics) == 1 else f"{name}_{metric}"


def render(table: Table, frame: pd.DataFrame, style: str) -> str:
    """The table as ``"md"``, ``"csv"`` or ``"latex"`` text, ending in a newline."""
    if style == "csv":
        return str(frame.to_csv(index=False, float_format="%.4f"))
    summary = summarize(table, frame)
    remarks = notes(table, frame, summary)
    if style == "md":
        wide = _wide(table, summary, "**{}**".format)
        body = markdown_table(wide, names=2)
        heading = f"**Table {table.name}. {table.title}** ({table.profile} profile)"
        return "\n\n".join([heading, table.caption, body, *remarks]) + "\n"
    wide = _wide(table, summary, r"\textbf{{{}}}".format, escape_latex)
    if len(table.metrics) > 1 and not table.cost:  # a model's name stands once, above its metrics
        metrics = [(model.label, name) for model in table.models for name in table.metrics.values()]
        headings = [("", "Method"), ("", "W/A"), *metrics]
        wide.columns = pd.MultiIndex.from_tuples([tuple(map(escape_latex, heading)) for heading in headings])
    latex = wide.to_latex(
        index=False,
        column_format="ll" + "r" * (wide.shape[1] - 2),
        caption=escape_latex(" ".join([f"{table.title}.", table.caption, *remarks])),
        label=f"tab:{table.name}-{table.profile}",
        position="t",
        multicolumn_format="c",
    )
    return str(latex)


def summarize(table: Table, frame: pd.DataFrame) -> pd.DataFrame:
    """Over seeds: one row for each metric, row, bit-width and model, in the order of the table.

    Columns: mean, std (of the sample; NaN for a single seed), delta and costs (means), published, verified, and
    ``best``: whether the mean is ahead of each other one at that bit-width and model by more than the spread, which is
    √(s₁² + s₂²) of the two.
    """
    groups = frame.groupby(["row", "bits", "model"], sort=False, as_index=False)
    shared = {name: (name, "first") for name in ("label", "method")} | {"failed": ("failed", "any")}
    shared |= {key: (key, "mean") for key, _, _ in COSTS if key in frame}
    parts = []
    for metric in table.metrics:
        aggregates = {"mean": (metric, "mean"), "std": (metric, "std")}
        for name, how in (("delta", "mean"), ("published", "first"), ("verified", "first")):
            if (column := _column(table, name, metric)) in frame:
                aggregates[name] = (column, how)
        parts.append(groups.agg(**aggregates, **shared).assign(metric=metric))
    summary = pd.concat(parts, ignore_index=True)
    summary["best"] = False
    quantized = summary[summary["method"] != FULL_PRECISION].dropna(subset="mean")
    for _, group in quantized.groupby(["metric", "bits", "model"]):
        best, *others = group.sort_values("mean", ascending=False)[["mean", "std"]].itertuples(name=None)
        # False for single seeds, whose spread is not known.
        ahead = [best[1] - mean > math.hypot(best[2], std) for _, mean, std in others]
        summary.loc[best[0], "best"] = bool(ahead) and all(ahead)
    return summary


def _wide(
    table: Table, summary: pd.DataFrame, emphasize: Callable[[str], str], escape: Callable[[str], str] = str
) -> pd.DataFrame:
    lines = []
    for (_, bits), group in summary.groupby(["row", "bits"], sort=False):
        cells = {(row["model"], row["metric"]): row for row in as_rows(group)}
        line = {"Method": escape(group["label"].iloc[0]), "W/A": bits}
        for model in table.models:
            for metric, name in table.metrics.items():
                row = cells[model.key, metric]
                text = escape(_cell(table, summary, row))
                heading = model.label if len(table.metrics) == 1 else f"{model.label}, {name}"
                line[escape(heading)] = emphasize(text) if row["best"] else text
            if table.cost:
                line |= {escape(heading): text for heading, text in _costs(table, model, row).items()}
        lines.append(line)
    return pd.DataFrame(lines)


def _costs(table: Table, model: Model, row: Mapping[str, Any]) -> dict[str, str]:
    of_model = "" if len(table.models) == 1 else f"{model.label}: "
    values = {heading: (row.get(key), style) for key, heading, style in COSTS}
    return {
        f"{of_model}{heading}": "" if pd.isna(value) else style.format(value)
        for heading, (value, style) in values.items()
    }


def as_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame's rows, by the names of its columns."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _cell(table: Table, summary: pd.DataFrame, row: Mapping[str, Any]) -> str:
    if pd.isna(row["mean"]):
        return "failed" if row["failed"] else ""
    number = f".{table.digits}f"
    ours = f"{row['mean']:{number}}" + ("" if pd.isna(row["std"]) else f" ± {row['std']:{number}}")
    if not table.published:
        return ours if row["method"] == FULL_PRECISION else f"{ours} ({row['delta']:+{number}})"
    if not counts(table, summary, row):
        ours += "‡"
    if pd.isna(row["published"]):
        return ours
    mark = "" if row["verified"] else "†"
    difference = round(row["mean"] - row["published"], table.digits) + 0.0  # not -0.0
    return f"{ours} / {row['published']:{number}}{mark} ({difference:+{number}})"


def counts(table: Table, summary: pd.DataFrame, row: Mapping[str, Any]) -> bool:
    """Whether full precision of the row's model agrees with the published number, in the row's metric."""
    if table.full_precision_tolerance is None or row["method"] == FULL_PRECISION or pd.isna(row["mean"]):
        return True
    of_model = (summary["model"] == row["model"]) & (summary["metric"] == row["metric"])
    reference = summary[of_model & (summary["method"] == FULL_PRECISION)]
    # Rounded, for 46.1 - 46.0 is a little more than 0.1.
    difference = (reference["mean"] - reference["published"]).abs().round(6)
    return bool((difference <= table.full_precision_tolerance).any())


def notes(table: Table, frame: pd.DataFrame, summary: pd.DataFrame) -> list[str]:
    """What the reader of a table must know, a sentence or a few each: images, seeds, failed cells, † and ‡."""
    images = _any_of(frame["images"].dropna().astype(int)) if "images" in frame else "no"
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
    if frame["failed"].any():
        failed = frame[frame["failed"]].drop_duplicates(["label", "bits", "model", "seed"])
        cells = [f"{row['label']} {row['bits']} of {row['model']}, seed {row['seed']}" for row in as_rows(failed)]
        notes.append(f"Failed, and left out of every number: {'; '.join(cells)}.")
    if table.published and not summary.dropna(subset=["mean", "published"])["verified"].all():
        notes.append("† Quoted from the literature without a source at hand.")
    if not all(counts(table, summary, row) for row in as_rows(summary)):
        notes.append(
            f"‡ Does not count: full precision of this model is missing or differs from the published number by more "
            f"than {table.full_precision_tolerance} points."
        )
    return notes


def _any_of(numbers: pd.Series[int]) -> str:
    return " or ".join(map(str, sorted(set(numbers))))


_LATEX = {character: f"\\{character}" for character in "%&_#${}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
_LATEX |= {"×": r"$\times$", "±": r"$\pm$", "√": r"$\surd$", "−": "$-$", "α": r"$\alpha$", "∞": r"$\infty$"}
_LATEX |= {"†": r"$\dagger$", "‡": r"$\ddagger$", "₁": "$_1$", "₂": "$_2$", "²": "$^2$"}


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(character, character) for character in text)


STYLES: Mapping[str, str] = {"md": "md", "csv": "csv", "latex": "tex"}
