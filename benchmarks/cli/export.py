"""``adfq export``: writes a quantized model in a form that others run."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adfq.errors import AdfqError, NotApplicableError
from benchmarks.cli.options import DATA_HELP, Commands, positive
from benchmarks.run.store import ResultStore


def add(commands: Commands) -> None:
    """Add the command."""
    export = commands.add_parser("export", help="write a quantized model for integer kernels, and measure it there")
    export.set_defaults(action=_export)
    export.add_argument("--quantized", required=True, metavar="FILE", help="file of 'adfq quantize'")
    export.add_argument("--data", required=True, metavar="SPEC", help=f"data to compare on: {DATA_HELP}")
    export.add_argument("--format", choices=["onnx"], default="onnx", help="default: %(default)s, in QDQ form")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")
    export.add_argument(
        "--store", type=Path, metavar="DIR", help="folder of records to keep the comparison in, for 'report'"
    )
    export.add_argument(
        "--limit", type=positive, default=500, metavar="N", help="compare on the first N images (default: %(default)s)"
    )


def _export(options: argparse.Namespace) -> None:
    import torch

    from adfq.export import check_installed, decoder_file, export_onnx, file_size
    from benchmarks.run.provenance import environment
    from benchmarks.run.records import now
    from benchmarks.studies.comparison import compare, kind_of, size_of
    from benchmarks.studies.deployment import render
    from benchmarks.tasks import find_task, load_quantized
    from benchmarks.tasks.shared import check_place

    check_installed()
    file, limit, saved = options.out, options.limit, Path(options.quantized)
    check_place(file)
    if saved.resolve() in (file.resolve(), decoder_file(file).resolve()):
        raise AdfqError(f"--out would replace the quantized model {saved}: give another name")
    store = None if options.store is None else ResultStore(options.store)
    cell, subject = load_quantized(options.quantized, data=options.data)
    kind = kind_of(cell.task)
    where = environment(torch.device("cpu"), cell.task) | {"onnxruntime": version("onnxruntime")}
    size, parameters = saved.stat().st_size, sum(parameter.numel() for parameter in subject.model.parameters())
    kept = {
        "config": cell.config,
        "saved": {"size": size / 1e6, "share": 25 * size / parameters},  # 4 bytes each in float32
        "environment": where,
    }

    def keep(outcome: Mapping[str, Any]) -> None:
        if store is not None:
            store.put_export(cell.id, {**kept, **outcome, "finished": now()})

    try:
        exported = export_onnx(subject.model, file, input_size=size_of(kind, subject, limit))
    except NotApplicableError as error:
        keep({"not_applicable": str(error)})
        raise
    files = [file, decoder_file(file)] if cell.task == "segmentation" else [file]
    found = compare(saved, files, kind, subject, limit, find_task(cell.task).batch_size)
    total = len(exported.integer) + len(exported.floating)
    floating = defaultdict(list)
    for name, reason in exported.floating.items():
        floating[reason].append(name)
    keep({**found, "products": total, "floating": {reason: len(names) for reason, names in floating.items()}})
    for each in files:
        print(f"{each}: {file_size(each) / 1e6:.2f} MB")
    print(f"{found['integer']} of {total} products with int8 kernels")
    for reason, names in floating.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"{len(names)} of {total} products stay in float ({names[0]}{others}): {reason}")
    print(f"{kind.describe(found['metrics'])}\n")
    print(render(found["models"]))
    print(
        f"Medians of milliseconds. {where['processor']}, {where['threads']} threads; torch {where['torch']}, "
        f"onnxruntime {where['onnxruntime']}, adfq at {where['commit']}."
    )
