"""Tables from records: in long form as a frame, and rendered as Markdown, CSV and LaTeX."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from adfq.method import FULL_PRECISION
from adfq.registry import create_method, method_label
from benchmarks.cell import Cell
from benchmarks.metrics import COSTS, Metric
from benchmarks.plan import TABLES, Entry, Model, Table
from benchmarks.report.paired import CONFIDENCE, RESAMPLES, interval, resample, stack_correct
from benchmarks.run.console import markdown_table
from benchmarks.run.plans import status_of
from benchmarks.run.store import Record

#: Statuses of a row over its seeds, the first that any seed has.
_STATUSES = ("failed", "n/a", "missing", "measured")


def published_numbers(table: Table) -> pd.DataFrame:
    """Return the rows of published.csv that belong to a table: model, row, bits, metric, value, evidence, note.

    ``row`` is the key of a table's row, ``evidence`` ``"seen"`` in the authors' own text or ``"quoted"`` second hand.
    """
    rows = pd.read_csv(TABLES / "published.csv", keep_default_na=False)
    rows = rows[(rows["task"] == table.published) & rows["metric"].isin(table.metrics)]
    return rows[["model", "row", "bits", "metric", "value", "evidence", "note"]]


def tabulate_results(table: Table, results: Iterable[tuple[Entry, Record | None]]) -> pd.DataFrame:
    """Return one row a cell, in the table's order: the table in long form, with numbers as numbers.

    Columns: ``row`` and its ``label``, ``model``, ``method``, ``bits``, ``status`` (`benchmarks.run.plans.status_of`)
    and ``reason`` (of ``"n/a"``), the record's metrics and costs, ``delta`` to full precision in the metric's unit,
    ``relative_forward`` (seconds over full precision's), ``published``, ``evidence`` and ``note`` where there is a
    published number, the cell's ``calibration_size``, ``calibration_batch_size`` (missing for all at once), ``seed``
    and ``data``, and the record's ``code`` digest and ``commit``. ``trains`` is what the method trains
    (`adfq.method.Method.trains`), ``iterations`` in how many iterations a unit. ``correct`` says by metric which
    evaluation images were right (`benchmarks.run.correct`; empty where the record does not say), ``evaluated`` has the
    digests of these images. A table of several metrics has a column of each, and a difference and a published number
    to each of them: ``box_ap``, ``delta_box_ap``, ``published_box_ap`` … A number that was not measured is NaN.
    """
    rows = []
    for entry, outcome in results:
        fields = ("calibration_size", "calibration_batch_size", "seed", "data")
        config = {name: entry.cell.config.get(name) for name in fields}
        names = {"row": entry.row.key, "label": entry.row.label, "model": entry.model.key}
        what = {"method": entry.cell.method, "bits": entry.cell.bits, "status": status_of(outcome)}
        record = outcome or {}
        measured = {**record.get("metrics", {}), **record.get("cost", {})}
        provenance = record.get("provenance") or {}
        evaluated = {name: digest for name, digest in provenance.get("data", {}).items() if name != "train"}
        origin = {
            "reason": record.get("not_applicable"),
            "code": provenance.get("code"),
            "commit": (record.get("environment") or {}).get("commit"),
            "correct": record.get("correct", {}),
            "evaluated": json.dumps(evaluated, sort_keys=True),
        }
        rows.append({**names, **what, **measured, **config, **_training(entry.cell), **origin})
    frame = pd.DataFrame(rows)
    frame["calibration_batch_size"] = frame["calibration_batch_size"].astype("Int64")
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
            names = {"value": "published", "evidence": "evidence", "note": "note"}
            of_metric = of_metric.rename(columns={name: _column(table, to, metric) for name, to in names.items()})
            frame = frame.merge(of_metric, "left", ["model", "row", "bits"])
    return frame


def _training(cell: Cell) -> dict[str, Any]:
    method = create_method(cell.method, cell.method_arguments)
    return {"trains": method.trains, "iterations": method.trained_iterations}


def _column(table: Table, name: str, metric: str) -> str:
    return name if len(table.metrics) == 1 else f"{name}_{metric}"


def render(table: Table, frame: pd.DataFrame, style: str) -> str:
    """Return the table as ``"md"``, ``"csv"`` or ``"latex"`` text, ending in a newline."""
    if style == "csv":
        return str(frame.drop(columns=["correct", "evaluated"]).to_csv(index=False, float_format="%.4f"))
    summary = summarize(table, frame)
    remarks = notes(table, frame, summary)
    if style == "md":
        wide = _wide(table, summary, "**{}**".format)
        body = markdown_table(wide, names=_names(table))
        heading = f"**{table.heading}**" + (f" ({table.profile} profile)" if table.profile else "")
        return "\n\n".join(filter(None, [heading, table.caption, body, *remarks])) + "\n"
    wide = _wide(table, summary, r"\textbf{{{}}}".format, escape_latex)
    if len(table.metrics) > 1 and not (table.cost or table.training):  # a model's name stands once, above its metrics
        metrics = [(model.label, table.metric(key).label) for model in table.models for key in table.metrics]
        headings = [("", "Method"), ("", "W/A"), *metrics]
        wide.columns = pd.MultiIndex.from_tuples([tuple(map(escape_latex, heading)) for heading in headings])
    latex = wide.to_latex(
        index=False,
        column_format="l" * _names(table) + "r" * (wide.shape[1] - _names(table)),
        caption=escape_latex(" ".join([f"{table.title}.", table.caption, *remarks])),
        label=f"tab:{table.name}-{table.profile}".removesuffix("-"),
        position="t",
        multicolumn_format="c",
    )
    return str(latex)


def summarize(table: Table, frame: pd.DataFrame) -> pd.DataFrame:
    """Return means over seeds: one row for each metric, row, bit-width and model, in the order of the table.

    Columns: label, method, calibration_size, trains, iterations, mean, std (of the sample; NaN for a single seed),
    delta and costs (means), published, evidence, note, ``status`` (of all seeds: failed, n/a, missing or measured, the
    first that any has), ``paired`` and ``best``:

    - A column (a bit-width of a model) is ``paired`` if all its records say which images are right, for the same
      several seeds. ``low`` and ``high`` are the ends of the interval of the difference to the best mean
      (`benchmarks.report.paired`), NaN for that one itself. The best mean is ``best`` if every ``high`` is below 0.
    - In another column it is ``best`` if it is better than each other mean by more than the spread, √(s₁² + s₂²) of
      the two.
    """
    ranked = frame.assign(status=frame["status"].map(_STATUSES.index))
    groups = ranked.groupby(["row", "bits", "model"], sort=False, as_index=False)
    same = ("label", "method", "calibration_size", "trains", "iterations")
    shared: dict[str, Any] = {name: (name, "first") for name in same} | {"status": ("status", "min")}
    shared |= {key: (key, "mean") for key in COSTS if key in frame}
    parts = []
    for metric in table.metrics:
        aggregates = {"mean": (metric, "mean"), "std": (metric, "std")}
        for name in ("delta", "published", "evidence", "note"):  # the latter three are the same for all seeds
            how = "mean" if name == "delta" else "first"
            if (column := _column(table, name, metric)) in frame:
                aggregates[name] = (column, how)
        parts.append(groups.agg(**aggregates, **shared).assign(metric=metric))
    summary = pd.concat(parts, ignore_index=True)
    summary["status"] = summary["status"].map(_STATUSES.__getitem__)
    summary = summary.assign(best=False, paired=False, low=math.nan, high=math.nan)
    quantized = summary[summary["method"] != FULL_PRECISION].dropna(subset="mean")
    for (of_metric, bits, model), group in quantized.groupby(["metric", "bits", "model"]):
        key = str(of_metric)
        cells = frame[(frame["bits"] == bits) & (frame["model"] == model) & (frame["method"] != FULL_PRECISION)]
        correct = stack_correct(cells.dropna(subset=[key]), key)
        if correct is None:
            _compare_spreads(summary, group, table.metric(key))
        else:
            _compare_pairs(summary, group, resample(correct))
    return summary


def _compare_spreads(summary: pd.DataFrame, group: pd.DataFrame, quality: Metric) -> None:
    """Mark the best mean of a column in a summary if it is ahead by more than the spread."""
    in_order = group.sort_values("mean", ascending=not quality.more_is_better)
    best, *others = in_order[["mean", "std"]].itertuples(name=None)
    # False for single seeds, whose spread is not known.
    ahead = [quality.gain(mean, best[1]) > math.hypot(best[2], std) for _, mean, std in others]
    summary.loc[best[0], "best"] = bool(ahead) and all(ahead)


def _compare_pairs(summary: pd.DataFrame, group: pd.DataFrame, accuracies: NDArray[np.float64]) -> None:
    """Write a column's intervals into a summary, and mark the best mean if it is ahead in all of them.

    Args:
        summary: the summary of all columns, changed in place.
        group: rows of the column.
        accuracies: resamples × rows.
    """
    best = int(group["mean"].argmax())
    others = [place for place in range(len(group)) if place != best]
    found = [interval(accuracies[:, place], accuracies[:, best]) for place in others]
    summary.loc[group.index, "paired"] = True
    summary.loc[group.index[others], ["low", "high"]] = np.array(found).reshape(-1, 2)
    summary.loc[group.index[best], "best"] = bool(found) and all(each.high < 0 for each in found)


def _wide(
    table: Table, summary: pd.DataFrame, emphasize: Callable[[str], str], escape: Callable[[str], str] = str
) -> pd.DataFrame:
    lines = []
    for (_, bits), group in summary.groupby(["row", "bits"], sort=False):
        cells = {(row["model"], row["metric"]): row for row in as_rows(group)}
        line = {"Method": escape(group["label"].iloc[0]), "W/A": bits}
        if table.training:
            line |= {heading: escape(text) for heading, text in training_texts(as_rows(group)[0]).items()}
        for model in table.models:
            for metric in table.metrics:
                row = cells[model.key, metric]
                text = escape(_cell(table, summary, row))
                heading = model.label if len(table.metrics) == 1 else f"{model.label}, {table.metric(metric).label}"
                line[escape(heading)] = emphasize(text) if row["best"] else text
            if table.cost:
                line |= {escape(heading): text for heading, text in _costs(table, model, row).items()}
        lines.append(line)
    return pd.DataFrame(lines)


def _names(table: Table) -> int:
    """Return the number of first columns that are names."""
    return 3 if table.training else 2


def training_texts(row: Mapping[str, Any]) -> dict[str, str]:
    """Return what a row of `summarize` trains, and its images and iterations, by heading; empty in full precision."""
    if row["method"] == FULL_PRECISION:
        return {"Trained": "", "Images": "", "Iterations": ""}
    iterations = f"{row['iterations']:,}" if row["iterations"] else "–"
    return {"Trained": row["trains"] or "nothing", "Images": f"{row['calibration_size']:,}", "Iterations": iterations}


def _costs(table: Table, model: Model, row: Mapping[str, Any]) -> dict[str, str]:
    of_model = "" if len(table.models) == 1 else f"{model.label}: "
    return {f"{of_model}{cost.heading}": format_cost(row, key) for key, cost in COSTS.items()}


def format_cost(row: Mapping[str, Any], key: str) -> str:
    """Return one of `benchmarks.metrics.COSTS` of a row of `summarize` as text, empty where it was not measured."""
    value = row.get(key)
    return "" if pd.isna(value) else COSTS[key].format(value)


def as_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a frame's rows, by the names of its columns."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _cell(table: Table, summary: pd.DataFrame, row: Mapping[str, Any]) -> str:
    if pd.isna(row["mean"]):
        return unmeasured(row)
    digits = table.metric(row["metric"]).digits
    number = f".{digits}f"
    ours = f"{row['mean']:{number}}" + ("" if pd.isna(row["std"]) else f" ± {row['std']:{number}}")
    if not table.published:
        return ours if row["method"] == FULL_PRECISION else f"{ours} ({row['delta']:+{number}})"
    if not counts(table, summary, row):
        ours += "‡"
    if pd.isna(row["published"]):
        return ours
    mark = "" if row["evidence"] == "seen" else "†"
    difference = round(row["mean"] - row["published"], digits) + 0.0  # not -0.0
    return f"{ours} / {row['published']:{number}}{mark} ({difference:+{number}})"


def unmeasured(row: Mapping[str, Any]) -> str:
    """Return the text of a cell of `summarize` without a number: ``"failed"``, ``"n/a"`` or nothing."""
    return row["status"] if row["status"] in ("failed", "n/a") else ""


def counts(table: Table, summary: pd.DataFrame, row: Mapping[str, Any]) -> bool:
    """Return whether full precision of the row's model agrees with the published number, in the row's metric."""
    if table.full_precision_tolerance is None or row["method"] == FULL_PRECISION or pd.isna(row["mean"]):
        return True
    of_model = (summary["model"] == row["model"]) & (summary["metric"] == row["metric"])
    reference = summary[of_model & (summary["method"] == FULL_PRECISION)]
    # Rounded, for 46.1 - 46.0 is a little more than 0.1.
    difference = (reference["mean"] - reference["published"]).abs().round(6)
    return bool((difference <= table.full_precision_tolerance).any())


def notes(table: Table, frame: pd.DataFrame, summary: pd.DataFrame) -> list[str]:
    """Return the notes below a table, a sentence or a few each.

    They say images, seeds, cells that failed, have no record or no applicable method, mixed code, † and ‡.
    """
    remarks = [_measured_on(table, frame)]
    quantized = frame[frame["method"] != FULL_PRECISION]
    seeds = sorted(set(quantized["seed"]))
    if len(seeds) > 1:
        remarks.append(
            f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))} (choice of calibration images, and "
            f"random numbers of the method). {_meaning_of_bold(summary)}"
        )
    remarks += _unmeasured_cells(frame)
    remarks += _mixed_code(frame)
    if table.published:
        beside = summary.dropna(subset=["mean", "published"])
        if (beside["evidence"] != "seen").any():
            remarks.append("† Quoted second hand, and not seen in the authors' own text.")
        remarks += [f"Published: {note}." for note in beside["note"].unique() if note]
    if not all(counts(table, summary, row) for row in as_rows(summary)):
        remarks.append(
            f"‡ Does not count: full precision of this model is missing or differs from the published number by more "
            f"than {table.full_precision_tolerance} points."
        )
    return remarks


def _meaning_of_bold(summary: pd.DataFrame) -> str:
    by_spread = "ahead of each other one at that bit-width by more than the spread, √(s₁² + s₂²) of the two."
    paired = summary[summary["mean"].notna() & (summary["method"] != FULL_PRECISION)]["paired"]
    if not paired.any():
        return f"Bold: {by_spread}"
    by_interval = (
        f"Bold: ahead of each other one at that bit-width, with 0 outside of the {CONFIDENCE} % interval of the "
        f"difference (bootstrap over images and seeds, {RESAMPLES:,} resamples)"
    )
    return (
        f"{by_interval}."
        if paired.all()
        else f"{by_interval}; where records do not say which images are right, {by_spread}"
    )


def _measured_on(table: Table, frame: pd.DataFrame) -> str:
    images = _any_of(frame["images"].dropna().astype(int)) if "images" in frame else "no"
    measured = f"Measured on {images} images of {', '.join(sorted(set(frame['data'])))}"
    quantized = frame[frame["method"] != FULL_PRECISION]
    if not quantized.empty:
        sizes: dict[str, list[str]] = {}
        # Rows of a table that tells what they train are methods; elsewhere several rows may be settings of one.
        for name, group in quantized.groupby("label" if table.training else "method", sort=False):
            sizes.setdefault(_calibrated_on(group), []).append(str(name) if table.training else method_label(str(name)))
        for_whom = len(sizes) > 1
        measured += ", calibrated on " + " and ".join(
            f"{size} ({', '.join(labels)})" if for_whom else size for size, labels in sizes.items()
        )
        seeds = sorted(set(quantized["seed"]))
        if len(seeds) == 1:
            measured += f", seed {seeds[0]}"
    return f"{measured}."


def _calibrated_on(frame: pd.DataFrame) -> str:
    pairs = frame[["calibration_size", "calibration_batch_size"]].drop_duplicates().sort_values("calibration_size")
    return " or ".join(
        str(size) if pd.isna(batch_size) else f"{size} in batches of {batch_size}"
        for size, batch_size in pairs.itertuples(index=False)
    )


def _unmeasured_cells(frame: pd.DataFrame) -> list[str]:
    """Return notes on cells without numbers: failed, not applicable, not measured."""
    remarks = []
    failed = frame[frame["status"] == "failed"].drop_duplicates(["label", "bits", "model", "seed"])
    if not failed.empty:
        cells = [f"{row['label']} {row['bits']} of {row['model']}, seed {row['seed']}" for row in as_rows(failed)]
        remarks.append(f"Failed, and left out of every number: {'; '.join(cells)}.")
    inapplicable = frame[frame["status"] == "n/a"].drop_duplicates(["label", "model", "reason"])
    if not inapplicable.empty:
        cells = [f"{row['label']} of {row['model']}: {row['reason']}" for row in as_rows(inapplicable)]
        remarks.append(f"n/a, not applicable: {'; '.join(cells)}.")
    missing = int((frame["status"] == "missing").sum())
    if missing:
        verb = "has" if missing == 1 else "have"
        remarks.append(f"{missing} of {len(frame)} cells {verb} no record.")
    return remarks


def _mixed_code(frame: pd.DataFrame) -> list[str]:
    """Return a note on rows whose records, of one model and method, were measured with different code."""
    commits: list[str] = []
    names = []
    for (_, model), group in frame.dropna(subset="code").groupby(["method", "model"], sort=False):
        if group["code"].nunique() > 1:
            names.append(f"{method_label(group['method'].iloc[0])} of {model}")
            commits += [str(commit)[:8] for commit in group["commit"].dropna()]
    if not names:
        return []
    of_commits = f" (commits {', '.join(dict.fromkeys(commits))})" if commits else ""
    return [f"Not all measured with the same code{of_commits}: {'; '.join(names)}."]


def _any_of(numbers: pd.Series[int]) -> str:
    return " or ".join(map(str, sorted(set(numbers))))


_LATEX = {character: f"\\{character}" for character in "%&_#${}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
_LATEX |= {
    "×": r"$\times$",
    "→": r"$\to$",
    "–": "--",
    "±": r"$\pm$",
    "√": r"$\surd$",
    "−": "$-$",
    "α": r"$\alpha$",
    "∞": r"$\infty$",
}
_LATEX |= {"†": r"$\dagger$", "‡": r"$\ddagger$", "₁": "$_1$", "₂": "$_2$", "²": "$^2$"}


def escape_latex(text: str) -> str:
    """Return text as LaTeX prints it."""
    return "".join(_LATEX.get(character, character) for character in text)


STYLES: Mapping[str, str] = {"md": "md", "csv": "csv", "latex": "tex"}
