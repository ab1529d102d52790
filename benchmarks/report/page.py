"""Tables, figures and environment in one report: a page that needs nothing else, Markdown, LaTeX."""

from __future__ import annotations

import base64
import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import pandas as pd

from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION
from benchmarks.cell import Cell
from benchmarks.metrics import COSTS, Metric
from benchmarks.plan import Entry, Table
from benchmarks.report.exports import COLUMNS, reasons_of, tabulate_exports
from benchmarks.report.paired import CONFIDENCE
from benchmarks.report.tables import (
    as_rows,
    counts,
    escape_latex,
    format_cost,
    notes,
    render,
    summarize,
    tabulate_results,
    training_texts,
    unmeasured,
)
from benchmarks.run.plans import TableResults, status_of
from benchmarks.run.store import Record

#: The files of a report, by the templates that they are made of.
_FILES = {"page.html.jinja": "index.html", "page.md.jinja": "report.md", "page.tex.jinja": "report.tex"}

_NAMED = 3  # cells of an environment that are named in text; the page has a list to open

_IMAGE_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}

_TRAINING = ("Trained", "Images", "Iterations")

# Suffixes that LaTeX includes, in order of preference.
_PRINTABLE = (".pdf", ".png")


class Figure(NamedTuple):
    """A picture in a report.

    Attributes:
        title: the heading of its caption.
        text: its content in words, for readers who cannot see it too.
        file: PNG or SVG. LaTeX has no SVG: a PDF or PNG of the same name beside it goes into LaTeX, where there is one.
        opening: whether it stands before the tables.
    """

    title: str
    text: str
    file: Path
    opening: bool = False


class Column(NamedTuple):
    """A column of numbers: a metric of a model, or what it costs.

    Attributes:
        heading: the first line of the heading.
        detail: the second line, or nothing.
        first: the order after the first click: ``"descending"`` where more is better.
    """

    heading: str
    detail: str
    first: str


class Number(NamedTuple):
    """A number in a table as it is read, and as it is sorted.

    Attributes:
        value: None where there is none.
        beside: the comparison: the difference to full precision, or the published number and the difference
            to that.
        best: `summarize`.
        interval: the interval of the difference to the best mean; empty where there is none.
    """

    value: float | None
    text: str
    beside: str = ""
    best: bool = False
    interval: str = ""


class Line(NamedTuple):
    """A row at a bit-width; `bits_value` sorts bit-widths, and `first` begins a new one."""

    label: str
    bits: str
    bits_value: int
    first: bool
    numbers: Sequence[Number]


class Measurement(NamedTuple):
    """One cell.

    Attributes:
        what: its place in the table, in words.
        metrics: the metrics as text; None where there are none.
        status: ``"measured"``, ``"failed"``, ``"n/a"`` or ``"missing"``.
        command: the command line that measures it.
    """

    what: str
    metrics: str | None
    status: str
    command: str


@dataclass(frozen=True)
class Section:
    """Content of one table in a report.

    Attributes:
        table: the table.
        frame: its numbers in long form.
        compared: kind of comparison beside the numbers.
        columns: columns of the rendered table.
        lines: rows of the rendered table.
        notes: sentences below it.
        measurements: its cells.
    """

    table: Table
    frame: pd.DataFrame
    compared: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    notes: Sequence[str]
    measurements: Sequence[Measurement]

    @classmethod
    def create(
        cls, table: Table, results: Sequence[tuple[Entry, Record | None]], command: Callable[[Cell], str]
    ) -> Section:
        """Return the section of a table.

        Args:
            table: the table.
            results: its cells with their outcomes.
            command: function from a cell to the command line that measures it.
        """
        frame = tabulate_results(table, results)
        summary = summarize(table, frame)
        return cls(
            table,
            frame,
            _compared(table, summary),
            _columns(table),
            _lines(table, summary),
            notes(table, frame, summary),
            [
                Measurement(_name(entry), _metrics(table, outcome), status_of(outcome), command(entry.cell))
                for entry, outcome in results
            ],
        )


class Setting(NamedTuple):
    """Something of the environment, with the cells measured in each; the most frequent one first."""

    name: str
    values: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Report:
    """The content of a report, before it is HTML, Markdown or LaTeX.

    Attributes:
        profile: profile of the tables.
        sections: one a table.
        environment: settings of the environment that records were measured in.
        cells: number of cells, each counted once.
        failed: number of cells that could not be measured.
        missing: number of cells without a record.
        finished: first and last day of measuring, in ISO's form; None where nothing was measured.
        exports: rows of saved and exported models, with the columns of `benchmarks.report.exports.COLUMNS`.
        reasons: by reason why products or models stay in float, the methods' labels.
    """

    profile: str
    sections: Sequence[Section]
    environment: Sequence[Setting]
    cells: int
    failed: int
    missing: int
    finished: tuple[str, str] | None
    exports: Sequence[Mapping[str, str]]
    reasons: Mapping[str, Sequence[str]]

    @classmethod
    def create(
        cls,
        measured: Iterable[TableResults | tuple[Table, Sequence[tuple[Entry, Record | None]]]],
        command: Callable[[Cell], str],
        exports: Sequence[Record] = (),
    ) -> Report:
        """Return the report of at least one table.

        Args:
            measured: each table with its cells and their outcomes (`TableResults`).
            command: the command line that measures a cell.
            exports: comparisons of exported models, from `ResultStore.read_exports`; none by default.
        """
        tables = list(measured)
        # Tables share cells.
        every = {
            entry.cell.id: (f"table {table.name}: {_name(entry)}", record)
            for table, results in reversed(tables)  # the first table that has a cell names it
            for entry, record in results
        }
        records = {
            name: record
            for name, record in reversed(every.values())
            if record is not None and status_of(record) == "measured"
        }
        statuses = [status_of(outcome) for _, outcome in every.values()]
        days = sorted(str(record["finished"])[:10] for record in records.values() if record.get("finished"))
        return cls(
            tables[0][0].profile,
            [Section.create(table, results, command) for table, results in tables],
            _settings({name: record.get("environment", {}) for name, record in records.items()}),
            len(every),
            statuses.count("failed"),
            statuses.count("missing"),
            (days[0], days[-1]) if days else None,
            as_rows(tabulate_exports(exports)),
            reasons_of(exports),
        )


def render_report(report: Report, directory: Path, figures: Sequence[Figure] = ()) -> dict[str, str]:
    """Return the report's files as text, by name.

    Args:
        report: its content.
        directory: the files' folder; Markdown and LaTeX name the figures' files relative to it.
        figures: pictures; those that open the report (`Figure.opening`) stand before the tables.

    Returns:
        ``index.html``, which holds the figures and needs nothing else, ``report.md``, ``report.tex``.

    Raises:
        AdfqError: for a figure that cannot be read.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("benchmarks.report"),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

    def relative(file: Path) -> str:
        return Path(os.path.relpath(file, directory)).as_posix()

    environment.filters |= {
        "table": lambda section, style: render(section.table, section.frame, style),
        "data_url": _data_url,
        "printable": _printable,
        "relative": relative,
        "link": lambda file: quote(relative(file)),
        "latex": escape_latex,
        "few": lambda names: "; ".join(names) if len(names) <= _NAMED else f"{len(names)} cells",
        "pipes": lambda text: str(text).replace("|", r"\|"),
    }
    return {
        name: environment.get_template(template).render(report=report, figures=figures, meanings=COLUMNS)
        for template, name in _FILES.items()
    }


def _compared(table: Table, summary: pd.DataFrame) -> str:
    compared = "published, and the difference to that" if table.published else "the difference to full precision"
    if not summary["paired"].any():
        return compared
    return f"{compared}; in brackets the {CONFIDENCE} % interval of the difference to the best mean at that bit-width"


def _columns(table: Table) -> list[Column]:
    columns = [Column(heading, "", "ascending") for heading in _TRAINING] if table.training else []
    for model in table.models:
        for metric in map(table.metric, table.metrics):
            detail = metric.label if len(table.metrics) > 1 else ""
            columns.append(Column(model.label, detail, _first_order(metric)))
        if table.cost:
            of_model = "" if len(table.models) == 1 else model.label
            columns += [Column(cost.heading, of_model, _first_order(cost)) for cost in COSTS.values()]
    return columns


def _first_order(metric: Metric) -> str:
    return "descending" if metric.more_is_better else "ascending"


def _lines(table: Table, summary: pd.DataFrame) -> list[Line]:
    lines: list[Line] = []
    for _, group in summary.groupby(["row", "bits"], sort=False):
        cells = {(row["model"], row["metric"]): row for row in as_rows(group)}
        numbers = _describe_training(as_rows(group)[0]) if table.training else []
        for model in table.models:
            of_model = [cells[model.key, metric] for metric in table.metrics]
            numbers += [_number(table, summary, row) for row in of_model]
            if table.cost:
                numbers += [_cost(of_model[0], key) for key in COSTS]
        label, bits = group["label"].iloc[0], group["bits"].iloc[0]
        weight, activation = map(int, re.findall(r"\d+", bits))
        first = not lines or lines[-1].bits != bits
        lines.append(Line(label, bits, 100 * weight + activation, first, numbers))
    return lines


def _number(table: Table, summary: pd.DataFrame, row: Mapping[str, Any]) -> Number:
    mean, digits = row["mean"], table.metric(row["metric"]).digits
    if pd.isna(mean):
        return Number(None, unmeasured(row))
    text = f"{mean:.{digits}f}" + ("" if pd.isna(row["std"]) else f" ± {row['std']:.{digits}f}")
    beside = ""
    if table.published:
        text += "" if counts(table, summary, row) else "‡"
        if not pd.isna(row["published"]):
            mark, difference = "" if row["evidence"] == "seen" else "†", _signed(mean - row["published"], digits)
            beside = f"{row['published']:.{digits}f}{mark} ({difference})"
    elif row["method"] != FULL_PRECISION and not pd.isna(row["delta"]):
        beside = _signed(row["delta"], digits)
    low, high = (_signed(row[end], digits) for end in ("low", "high"))
    return Number(mean, text, beside, row["best"], "" if pd.isna(row["low"]) else f"[{low}, {high}]")


def _signed(difference: float, digits: int) -> str:
    return f"{difference:+.{digits}f}".replace("-", "−")


def _describe_training(row: Mapping[str, Any]) -> list[Number]:
    texts = training_texts(row)
    values = (None, row["calibration_size"], row["iterations"])
    return [Number(value, texts[heading]) for heading, value in zip(_TRAINING, values, strict=True)]


def _cost(row: Mapping[str, Any], key: str) -> Number:
    text = format_cost(row, key)
    return Number(row[key] if text else None, text)


def _name(entry: Entry) -> str:
    if entry.cell.method == FULL_PRECISION:
        return f"{entry.model.label}, {entry.row.label}"
    return f"{entry.model.label}, {entry.row.label}, {entry.cell.bits}, seed {entry.cell.seed}"


def _metrics(table: Table, outcome: Record | None) -> str | None:
    if status_of(outcome) != "measured" or outcome is None:
        return None
    values = {key: outcome["metrics"][key] for key in table.metrics if key in outcome["metrics"]}
    return ", ".join(f"{table.metric(key).label} {table.metric(key).format(value)}" for key, value in values.items())


def _settings(environments: Mapping[str, Mapping[str, Any]]) -> list[Setting]:
    settings = []
    for name in dict.fromkeys(name for environment in environments.values() for name in environment):
        cells: dict[str, list[str]] = {}
        for cell, environment in environments.items():
            value = environment.get(name)
            text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
            cells.setdefault(text, []).append(cell)
        usual = statistics.mode(text for text, each in cells.items() for _ in each)
        settings.append(Setting(name, sorted(cells.items(), key=lambda item: item[0] != usual)))
    return settings


def _data_url(file: Path) -> str:
    if file.suffix.lower() not in _IMAGE_TYPES:
        raise AdfqError(f"{file} is neither PNG nor SVG")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise AdfqError(f"cannot read {file}: {error.strerror}") from None
    return f"data:{_IMAGE_TYPES[file.suffix.lower()]};base64,{base64.b64encode(data).decode()}"


def _printable(file: Path) -> Path | None:
    if file.suffix.lower() != ".svg":
        return file
    return next((other for suffix in _PRINTABLE if (other := file.with_suffix(suffix)).is_file()), None)
