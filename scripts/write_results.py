"""Writer of docs/results.md and docs/accuracy.png from the committed records: python scripts/write_results.py.

Every number in a table of the page comes from a record. The prose between the tables is scripts/results.md.jinja.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.plan import load_table
from benchmarks.report.tables import render, tabulate_results
from benchmarks.tasks import find_task

ROOT = Path(__file__).resolve().parents[1]
STORE = ROOT / "results" / "bundled"
PROFILE = "bundled"


def write_page() -> str:
    """Return the text of docs/results.md."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.get_template("results.md.jinja").render(table=_render_table, machine=_describe_machine())


def _render_table(name: str) -> str:
    """Return a table with its caption and notes as Markdown, below a heading of its own."""
    table = load_table(name, PROFILE)
    entries = table.entries(data=table.data, batch_size=table.batch_size or find_task(table.task).batch_size)
    records = _records()
    frame = tabulate_results(table, [(entry, records[_key(entry.cell.config)]) for entry in entries])
    heading, _, rest = render(table, frame, "md").partition("\n\n")
    return f"## Table {name}. {table.title}\n\n{rest}" if heading else ""


def _describe_machine() -> str:
    """Return a sentence on the hardware and versions that the records name."""
    keys = ("processor", "cores", "python", "torch", "timm")
    processor, cores, python, torch, timm = (
        " or ".join(sorted({str(record["environment"][key]) for record in _records().values()})) for key in keys
    )
    return (
        f"They were measured on {cores} cores of an {processor}, with Python {python}, torch {torch} and timm {timm}."
    )


@cache
def _records() -> dict[str, dict[str, Any]]:
    """Return the committed records by their configuration."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((STORE / "records").glob("*.json"))]
    return {_key(record["config"]): record for record in records}


def _key(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def main() -> None:
    """Write the page."""
    (ROOT / "docs" / "results.md").write_text(write_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
