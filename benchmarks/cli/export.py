"""``adfq export``: writes a quantized model in a form that others run."""

from __future__ import annotations

import argparse
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.cli.options import DATA_HELP, Commands, positive


def add(commands: Commands) -> None:
    """Add the command."""
    export = commands.add_parser("export", help="write a quantized model for integer kernels, and measure it there")
    export.set_defaults(action=_export)
    export.add_argument("--quantized", required=True, metavar="FILE", help="file of 'adfq quantize'")
    export.add_argument(
        "--data", required=True, metavar="SPEC", help=f"data to compare on: {DATA_HELP.partition('; of')[0]}"
    )
    export.add_argument("--format", choices=["onnx"], default="onnx", help="default: %(default)s, in QDQ form")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")
    export.add_argument(
        "--limit", type=positive, default=500, metavar="N", help="compare on the first N images (default: %(default)s)"
    )


def _export(options: argparse.Namespace) -> None:
    import torch

    from adfq.export import check_installed, decoder_file, export_onnx
    from benchmarks.run.provenance import environment
    from benchmarks.studies.comparison import compare, kind_of, size_of
    from benchmarks.studies.deployment import render
    from benchmarks.tasks import find_task, load_quantized
    from benchmarks.tasks.shared import check_place

    check_installed()
    file, limit = options.out, options.limit
    check_place(file)
    cell, subject = load_quantized(options.quantized, data=options.data)
    kind = kind_of(cell.task)
    exported = export_onnx(subject.model, file, input_size=size_of(kind, subject, limit))
    files = [file, decoder_file(file)] if cell.task == "segmentation" else [file]
    found = compare(Path(options.quantized), files, kind, subject, limit, find_task(cell.task).batch_size)
    total = len(exported.integer) + len(exported.floating)
    for each in files:
        print(f"{each}: {each.stat().st_size / 1e6:.2f} MB")
    print(f"{found['integer']} of {total} products with int8 kernels")
    floating = defaultdict(list)
    for name, reason in exported.floating.items():
        floating[reason].append(name)
    for reason, names in floating.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"{len(names)} of {total} products stay in float ({names[0]}{others}): {reason}")
    print(f"{kind.describe(found['metrics'])}\n")
    print(render(found["models"]))
    where = environment(torch.device("cpu"))
    print(
        f"Medians of milliseconds. {where['processor']}, {where['threads']} threads; torch {where['torch']}, "
        f"onnxruntime {version('onnxruntime')}, adfq at {where['commit']}."
    )
