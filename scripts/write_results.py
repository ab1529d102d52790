"""Writer of docs/results.md and other pages, and of pictures, from results/: python scripts/write_results.py.

Every number in a table of the pages comes from a record, or from a file of scripts/explain_encoders.py. The prose is
scripts/*.md.jinja.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from adfq.errors import AdfqError
from adfq.method import FULL_PRECISION
from adfq.registry import method_label
from benchmarks.bundled import BUNDLED
from benchmarks.plan import RECORDED, Selection, Table, load_table, make_plan
from benchmarks.report.exports import COLUMNS, reasons_of, tabulate_exports
from benchmarks.report.figures import style
from benchmarks.report.figures.accuracy_bits import Panel, collect_panels, plot_accuracy_bits
from benchmarks.report.figures.accuracy_cost import plot_accuracy_cost
from benchmarks.report.tables import published_numbers, summarize
from benchmarks.run.console import markdown_table
from benchmarks.run.plans import TableResults, read_plan, read_records
from benchmarks.run.store import Record, ResultStore

ROOT = Path(__file__).resolve().parents[1]
STORES = ROOT / "results"  # a folder for each profile
PAGES = ("results", "field", "encoders", "mobile-sam", "memory", "deployment")


def write_page(name: str) -> str:
    """Return the text of a page of docs/.

    Args:
        name: one of `PAGES`.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    options: dict[str, Any] = dict.fromkeys(("keep_trailing_newline", "trim_blocks", "lstrip_blocks"), True)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **options)
    given: dict[str, Any] = {"table": _render_table, "machine": _describe_machine}
    if name == "encoders":
        given |= {
            "sensitivity": _tabulate_sensitivity,
            "components": _tabulate_components(),
            "ranges": _tabulate_ranges(),
            "facts": _collect_facts(),
            "oneshot": _tabulate_oneshot,
        }
    if name == "field":
        given |= {"published": _tabulate_published, "top1": _tabulate_top1}
    if name == "mobile-sam":
        given |= _describe_mobile()
    if name == "memory":
        given |= _tabulate_memory()
    if name == "deployment":
        given |= _tabulate_exports()
    return environment.get_template(f"{name}.md.jinja").render(**given)


def _render_table(name: str, profile: str = BUNDLED, **selection: Any) -> str:
    """Return a table, or the part that a selection has, with its caption and notes as Markdown, below a heading."""
    (results,) = _read([name], profile, **selection)
    _, _, rest = results.render().partition("\n\n")
    return f"## {results.table.heading}\n\n{rest}"


def collect_picture() -> list[Panel]:
    """Return the panels of docs/accuracy.png: the models of tables 1 to 3."""
    return collect_panels((each.table, summarize(each.table, each.to_frame())) for each in _read(["1", "2", "3"]))


def digest_picture(panels: list[Panel]) -> str:
    """Return a digest of every number in a picture, which the picture carries as its description."""
    columns = ["label", "bits", "mean", "std"]
    text = "".join(panel.title + panel.rows[columns].to_csv(index=False, float_format="%.4f") for panel in panels)
    return hashlib.sha256(text.encode()).hexdigest()


def collect_costs() -> tuple[Table, pd.DataFrame]:
    """Return table field and its summary, which docs/field-cost.png shows."""
    (results,) = _read(["field"])
    return results.table, summarize(results.table, results.to_frame())


def digest_costs(summary: pd.DataFrame) -> str:
    """Return a digest of every number in docs/field-cost.png."""
    columns = ["label", "bits", "model", "mean", "std", "calibration_seconds"]
    return hashlib.sha256(summary[columns].to_csv(index=False, float_format="%.4f").encode()).hexdigest()


def _tabulate_published(bits: str) -> str:
    """Return the published numbers of table field's methods at a bit-width as Markdown."""
    table = load_table("field", "full")
    numbers = published_numbers(table).query("bits == @bits")
    marks = numbers["evidence"].map({"seen": "", "quoted": "†"})
    texts = numbers.assign(text=numbers["value"].map("{:.2f}".format) + marks).pivot(
        index="row", columns="model", values="text"
    )
    labels = {row.key: row.label for row in table.rows if row.key in texts.index}
    wide = texts.loc[list(labels), [model.key for model in table.models]].fillna("–")
    wide = wide.set_axis([model.label for model in table.models], axis=1).rename(labels).rename_axis("Method")
    return markdown_table(wide.reset_index())


def _tabulate_top1(name: str, column: str) -> dict[str, str]:
    """Return the accuracies of a file as Markdown, those in full precision, and the commits that they are of.

    Args:
        name: name of the file.
        column: name of its column whose values are the columns here.
    """
    frame = _read_file(name)
    full = frame["method"] == FULL_PRECISION
    grouped = frame[~full].groupby(["method", column])[["top1"]]
    # One model has one accuracy in full precision, whatever the bit-width of the column.
    references = frame[full].set_index(column)["top1"].reindex(frame[column].unique()).ffill().bfill()
    difference = grouped.mean().sub(references, axis=0, level=1).map(" ({:+.2f})".format)
    texts = (_format_means(grouped, 2) + difference)["top1"].unstack()
    table = load_table("field")
    rows = [row for row in table.rows if row.key in texts.index]
    wide = texts.loc[[row.key for row in rows], list(dict.fromkeys(frame[~full][column]))].fillna("–")
    wide = wide.rename(columns={model.key: model.label for model in table.models})
    wide.insert(0, "Method", [row.label for row in rows])
    reference = ", ".join(frame[full]["top1"].map("{:.2f}".format))
    commits = ", ".join(frame["commit"].str[:7].drop_duplicates())
    return {"table": markdown_table(wide), "reference": reference, "commits": commits}


def _format_means(grouped: Any, digits: int) -> pd.DataFrame:
    """Return means as texts, with ± standard deviation for groups of several."""
    spread = grouped.std().map(lambda value: "" if pd.isna(value) else f" ± {value:.{digits}f}")
    means: pd.DataFrame = grouped.mean().map(f"{{:.{digits}f}}".format)
    return means + spread


def _tabulate_oneshot(bits: str) -> str:
    """Return the accuracies at a bit-width on images of 400 classes as Markdown."""
    frame = _read_file("oneshot")
    columns = {"knn": "k-NN", "prototypes": "prototypes", "ridge": "ridge", "feature_error": "feature error"}
    grouped = frame[frame["bits"].isin(["W32/A32", bits])].groupby("method")
    texts = _format_means(grouped[list(columns)], 1)
    labels = {FULL_PRECISION: "Full precision"} | {row.key: row.label for row in load_table("field").rows}
    keys = [key for key in labels if key in texts.index]
    wide = texts.loc[keys].rename(labels).rename(columns=columns)
    wide.insert(0, "images", grouped["calibration_images"].first()[keys].astype(str).to_list())
    return markdown_table(wide.rename_axis("Method").reset_index())


def _tabulate_sensitivity(bits: str) -> str:
    """Return the errors of parts at a bit-width as Markdown."""
    frame = _read_file("sensitivity")
    chosen = frame[frame["bits"] == bits].pivot(index="part", columns="method", values="error")
    order = [frame[name].drop_duplicates() for name in ("part", "method")]
    texts = chosen.loc[order[0], order[1]].map("{:.1f}".format).replace("nan", "–")
    return str(texts.rename_axis("quantized").to_markdown(disable_numparse=True, stralign="right"))


def _tabulate_memory() -> dict[str, str]:
    """Return the peaks of scripts/measure_memory.py before and now, as Markdown, and the two commits."""
    file = STORES / "bench" / "calibration.csv"
    frame = pd.read_csv(file, keep_default_na=False, na_values={"seconds": ""})
    keys = ["model", "size", "method", "arguments", "images", "batch"]
    old = frame["commit"] == frame["commit"].iloc[0]
    halves = [
        rows.drop_duplicates(keys, keep="last").set_index(keys)[["peak_mb", "seconds"]]
        for rows in (frame[old], frame[~old])
    ]
    wide = halves[0].merge(halves[1], "outer", keys, suffixes=(", before", ", now")).reset_index().sort_values(keys)
    for column in wide.columns[len(keys) :]:
        wide[column] = wide[column].map(lambda value: "–" if pd.isna(value) else f"{value:,.0f}")
    wide["method"] = [
        f"{method_label(method)} ({text})" if text else method_label(method)
        for method, text in zip(wide["method"], wide["arguments"], strict=True)
    ]
    wide = wide.drop(columns="arguments").rename(
        columns=lambda name: name.replace("peak_mb", "MB").replace("seconds", "s")
    )
    table = str(wide.to_markdown(index=False, disable_numparse=True))
    before, now = (", ".join(rows["commit"].str[:7].drop_duplicates()) for rows in (frame[old], frame[~old]))
    return {"before": before, "now": now, "table": table}


def _describe_mobile() -> dict[str, Any]:
    """Return the methods that are measured in the mobile profile of table 3, and the largest memory of their cells."""
    records = read_records(STORES / "mobile")
    methods = [row.key for row in load_table("3", "mobile").rows if row.key in {r["config"]["method"] for r in records}]
    memory = max(record["cost"]["calibration_memory"] for record in records)
    return {"methods": methods, "memory": f"{memory:,.0f}"}


def _tabulate_exports() -> dict[str, Any]:
    """Return the tables of exported models as Markdown, and what the text says of them."""
    bundled, real = (ResultStore(STORES / name, create=False).read_exports() for name in (BUNDLED, "real"))

    def images_of(records: list[Record]) -> dict[str, int]:
        return {
            record["config"]["data"]: int(record["metrics"]["images"])
            for record in records
            if "agreement" in record.get("metrics", ())
        }

    processor, threads, version = _settings_of([*bundled, *real], "processor", "threads", "onnxruntime")
    return {
        "bundled": markdown_table(tabulate_exports(bundled)),
        "real": markdown_table(tabulate_exports(real)),
        "reasons": reasons_of(bundled),
        "real_reasons": reasons_of(real),
        "images": images_of(bundled).get(BUNDLED),
        "counts": sorted(images_of(real).items()),
        "meanings": COLUMNS,
        "machine": f"Measured on an {processor}, {threads} thread, with onnxruntime {version}.",
    }


def _tabulate_ranges() -> str:
    """Return the errors of fc2 in ranges with and without clipping as Markdown."""
    frame = _read_file("ranges")
    frame["fc2"] = frame["quantizer"] + ", range of " + frame["range"].replace("percentile", "percentiles")
    wide = frame.pivot(index="fc2", columns="bits", values="error").loc[frame["fc2"].drop_duplicates()]
    return str(wide.rename(columns="{} bits".format).to_markdown(floatfmt=".1f"))


def _tabulate_components() -> str:
    """Return the errors of subsets of ADFQ-ViT's quantizers as Markdown."""
    frame = _read_file("components")
    frame["quantizers"] = [
        " + ".join(name.upper() for name in ("ppoq", "slq") if row[name]) or "uniform ones in their places"
        for _, row in frame.iterrows()
    ]
    wide = frame.pivot(index="quantizers", columns="bits", values="error").loc[frame["quantizers"].drop_duplicates()]
    return str(wide[frame["bits"].drop_duplicates()].to_markdown(floatfmt=".1f"))


def _collect_facts() -> dict[str, Any]:
    """Return numbers of outliers and of the residual stream that the text names."""
    outliers, residuals, normed = map(_read_file, ("outliers", "residuals", "distributions"))
    optimized = next(
        record["metrics"]["feature_error"]
        for record in read_records(STORES / "real")
        if (record["config"]["method"], record["config"]["bits"]) == ("adfq_vit", "W4/A4")
    )
    last = residuals.iloc[-2]  # in front of the last attention
    return {
        "least": outliers["percent"].min(),
        "most": outliers["percent"].max(),
        "qkv": outliers[outliers["role"] == "qkv"]["percent"].mean(),
        "fc1": outliers[outliers["role"] == "fc1"]["percent"].mean(),
        "optimized": optimized,
        "channel": last["channel"],
        "images": last["images"],
        "largest": last["largest"],
        "ratio": last["largest"] / last["median"],
        "behind": normed[["min", "max"]].abs().to_numpy().max(),
        "bulk": normed[["p1", "p99"]].abs().to_numpy().max(),
    }


def _read_file(name: str) -> pd.DataFrame:
    """Return a file of measurements whose images or models are not those of the bundled profile."""
    return pd.read_csv(STORES / "real" / f"{name}.csv")


def _read(names: list[str], profile: str = BUNDLED, **selection: Any) -> list[TableResults]:
    """Return tables with all recorded seeds; AdfqError where a cell has no record."""
    store = STORES / profile
    chosen = Selection(profile, seeds=RECORDED, **selection)
    tables = read_plan(make_plan(names, chosen, check_files=False), store)
    for results in tables:
        if results.count("measured") < len(results.results):
            raise AdfqError(f"{store} has no record of some cells of table {results.table.name}")
    return tables


def _settings_of(records: list[Record], *keys: str) -> list[str]:
    """Return settings of the environments of records as texts; several of a kind are joined by "or"."""
    return [" or ".join(sorted({str(record["environment"][key]) for record in records})) for key in keys]


def _describe_machine(profile: str = BUNDLED) -> str:
    """Return a sentence on the hardware and versions that the records name."""
    keys = ("processor", "cores", "python", "torch", "timm")
    processor, cores, python, torch, timm = _settings_of(read_records(STORES / profile), *keys)
    return (
        f"They were measured on {cores} cores of an {processor}, with Python {python}, torch {torch} and timm {timm}."
    )


def main() -> None:
    """Write the pages and the picture."""
    for name in PAGES:
        (ROOT / "docs" / f"{name}.md").write_text(write_page(name), encoding="utf-8")
    panels = collect_picture()
    metadata = {"Description": digest_picture(panels)}
    style.save(plot_accuracy_bits(panels), ROOT / "docs" / "accuracy.png", metadata=metadata)
    table, summary = collect_costs()
    metadata = {"Description": digest_costs(summary)}
    style.save(plot_accuracy_cost(table, summary, ["calibration"]), ROOT / "docs" / "field-cost.png", metadata=metadata)


if __name__ == "__main__":
    main()
