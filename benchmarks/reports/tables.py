"""Rendering a table from its records: Markdown, CSV, LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from adfq.methods import FULL_PRECISION
from benchmarks.cells import Cell
from benchmarks.reports.spec import Table, published_numbers
from benchmarks.results import Record

METHOD_LABELS = {
    FULL_PRECISION: "Full precision",
    "base_ptq": "Base PTQ",
    "ptq4vit": "PTQ4ViT",
    "repq_vit": "RepQ-ViT",
    "adfq_vit": "ADFQ-ViT",
}


def tabulate_results(table: Table, results: Iterable[tuple[Cell, Record]]) -> pd.DataFrame:
    """One row a cell, in the order measured: the table in long form, with numbers as numbers.

    Columns: model, method, bits, the record's metrics, ``delta`` to full precision in points, ``published`` and
    ``verified`` where there is a published number, and what the cell was measured with.
    """
    keys = {model.name: model.key for model in table.models}
    rows = []
    for cell, record in results:
        config = {name: record["config"][name] for name in ("calibration_size", "seed", "data")}
        rows.append(
            {"model": keys[cell.model], "method": cell.method, "bits": cell.bits, **record["metrics"], **config}
        )
    frame = pd.DataFrame(rows)
    reference = frame[frame["method"] == FULL_PRECISION].set_index("model")[table.metric]
    frame["delta"] = frame[table.metric] - frame["model"].map(reference)
    if table.published:
        frame = frame.merge(published_numbers(table), "left", ["model", "method", "bits"])
        frame = frame.rename(columns={"value": "published"})
    return frame


def render(table: Table, frame: pd.DataFrame, style: str) -> str:
    """The table as ``"md"``, ``"csv"`` or ``"latex"`` text, ending in a newline."""
    if style == "csv":
        return str(frame.to_csv(index=False, float_format="%.4f"))
    notes = _notes(table, frame)
    wide = _wide(table, frame)
    if style == "md":
        body = wide.to_markdown(index=False, colalign=["left", "left", *["right"] * len(table.models)])
        heading = f"**Table {table.name}. {table.title}** ({table.profile} profile)"
        return "\n\n".join([heading, table.caption, body, *notes]) + "\n"
    latex = wide.map(_escape).to_latex(
        index=False,
        column_format="ll" + "r" * len(table.models),
        caption=_escape(" ".join([f"{table.title}.", table.caption, *notes])),
        label=f"tab:{table.name}-{table.profile}",
        position="t",
    )
    return str(latex)


def _wide(table: Table, frame: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (method, bits), group in frame.groupby(["method", "bits"], sort=False):
        by_model = {row["model"]: row for row in _rows(group)}
        cells = {model.label: _cell(table, frame, by_model[model.key]) for model in table.models}
        rows.append({"Method": METHOD_LABELS.get(str(method), str(method)), "W/A": bits, **cells})
    return pd.DataFrame(rows)


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _cell(table: Table, frame: pd.DataFrame, row: Mapping[str, Any]) -> str:
    ours = f"{row[table.metric]:.2f}"
    if not table.published:
        return ours if row["method"] == FULL_PRECISION else f"{ours} ({row['delta']:+.2f})"
    if not _counts(table, frame, row):
        ours += "‡"
    if pd.isna(row["published"]):
        return ours
    return f"{ours} / {row['published']:.2f}{'' if row['verified'] else '†'}"


def _counts(table: Table, frame: pd.DataFrame, row: Mapping[str, Any]) -> bool:
    """Whether full precision of the row's model agrees with the published number."""
    if table.full_precision_tolerance is None or row["method"] == FULL_PRECISION:
        return True
    reference = frame[(frame["model"] == row["model"]) & (frame["method"] == FULL_PRECISION)]
    if reference.empty:
        return False
    difference = (reference[table.metric] - reference["published"]).abs().iloc[0]
    return bool(difference <= table.full_precision_tolerance)


def _notes(table: Table, frame: pd.DataFrame) -> list[str]:
    sizes = sorted(set(frame["calibration_size"]) - {0})
    seeds = sorted(set(frame.loc[frame["method"] != FULL_PRECISION, "seed"]))
    images = " or ".join(str(count) for count in sorted(set(frame["images"])))
    notes = [f"Measured on {images} images of {', '.join(sorted(set(frame['data'])))}"]
    if sizes:
        notes[0] += f", calibrated on {' or '.join(map(str, sizes))}, seed {' and '.join(map(str, seeds))}"
    notes[0] += "."
    if table.published and not frame.loc[frame["published"].notna(), "verified"].all():
        notes.append("† Quoted from the literature without a source at hand.")
    if not all(_counts(table, frame, row) for row in _rows(frame)):
        notes.append(
            f"‡ Does not count: full precision of this model is missing or differs from the published number by more "
            f"than {table.full_precision_tolerance} points."
        )
    return notes


_LATEX_SPECIALS = {"%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "×": r"$\times$", "†": r"\dag{}", "‡": r"\ddag{}"}


def _escape(text: str) -> str:
    return "".join(_LATEX_SPECIALS.get(character, character) for character in text)


STYLES: Mapping[str, str] = {"md": "md", "csv": "csv", "latex": "tex"}
