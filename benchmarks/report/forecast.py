"""Forecast of a plan as Markdown."""

from __future__ import annotations

import pandas as pd

from benchmarks.run.console import markdown_table
from benchmarks.run.forecast import Forecast, RowForecast, gigabytes


def render_forecast(forecast: Forecast) -> str:
    """Return a forecast as Markdown: a row by model and method, totals, what will not fit, and notes."""
    frame = pd.DataFrame([_row(row, forecast.device) for row in forecast.rows])
    parts = [markdown_table(frame, names=2), _describe(forecast)]
    if forecast.misfits:
        parts.append("Will not fit:\n\n" + "\n".join(f"- {line}" for line in forecast.misfits))
    if forecast.refusals:
        parts.append("Cannot be measured:\n\n" + "\n".join(f"- {line}" for line in forecast.refusals))
    return "\n\n".join([*parts, *forecast.notes])


def _row(row: RowForecast, device: str) -> dict[str, str]:
    memory = {"Memory": gigabytes(row.memory)}
    if device != "cpu":
        memory = {"GPU memory": gigabytes(row.memory), "Host memory": gigabytes(row.host_memory)}
    disk = row.resume + row.temporary
    state = "n/a" if row.not_applicable else "" if row.seconds is None else duration(row.seconds)
    return {
        "Model": row.model,
        "Method": row.method,
        "Cells": str(row.cells),
        "Measured": str(row.measured),
        "Calibration images": f"{row.calibration_images:,}" if row.cells else "",
        "Evaluation images": f"{row.evaluation_images:,}" if row.evaluation_images else "",
        **memory,
        "Disk": gigabytes(disk) if row.seconds is not None else "",
        "Time a cell": state,
    }


def _describe(forecast: Forecast) -> str:
    where = forecast.environment
    total = forecast.cells + forecast.measured
    jobs = "one at a time" if forecast.jobs == 1 else f"{forecast.jobs} at a time"
    memory = f"{gigabytes(forecast.most('memory', forecast.jobs_a_device))} of memory"
    memory += f" ({gigabytes(forecast.available_memory)} are free)"
    if forecast.device != "cpu":
        memory += f", {gigabytes(forecast.most('host_memory', forecast.jobs))} of memory of the machine"
        memory += f" ({gigabytes(forecast.available_host_memory)} are free)"
    resume, temporary = (forecast.most(name, forecast.jobs) for name in ("resume", "temporary"))
    return (
        f"{total} cells, of which {forecast.measured} are measured and {forecast.cells} would run, {jobs}. They read "
        f"{forecast.calibration_images:,} calibration images and {forecast.evaluation_images:,} evaluation images, and "
        f"take up to {memory}, {gigabytes(resume)} of disk in the store ({gigabytes(forecast.free_resume)} are free), "
        f"{gigabytes(temporary)} of disk for temporary files ({gigabytes(forecast.free_temporary)} are free), and "
        f"{duration(forecast.seconds)} on {where['processor']}, {where['device']}, {where['threads']} threads. "
        f"Tried on a few images in {duration(forecast.took)}."
    )


def duration(seconds: float) -> str:
    """Return a duration in text: ``40 s``, ``5 min``, ``3.2 h``, ``12 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.0f} days"
