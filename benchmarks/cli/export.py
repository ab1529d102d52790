"""``adfq export``: writes a quantized model in a form that others run."""

from __future__ import annotations

import argparse
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.cli.options import DATA_HELP, Commands, positive

# The task whose quantized models can be saved.
_TASK = "classification"


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

    from adfq.export import check_installed, export_onnx
    from benchmarks.run.provenance import environment
    from benchmarks.studies.deployment import compare, render
    from benchmarks.tasks import find_task, load_quantized
    from benchmarks.tasks.shared import check_place

    check_installed()
    file = options.out
    check_place(file)
    batch_size = find_task(_TASK).batch_size
    _, subject = load_quantized(options.quantized, task=_TASK, data=options.data, batch_size=batch_size)
    exported = export_onnx(subject.model, file)
    found = compare(Path(options.quantized), file, subject, options.limit, batch_size)
    total = len(exported.integer) + len(exported.floating)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB, {found['integer']} of {total} products with int8 kernels")
    floating = defaultdict(list)
    for name, reason in exported.floating.items():
        floating[reason].append(name)
    for reason, names in floating.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"{len(names)} of {total} products stay in float ({names[0]}{others}): {reason}")
    print(
        f"top-1 agrees with the simulation on {found['agreement']:.2f} % of {found['images']} images: "
        f"{found['simulated']:.2f} % simulated, {found['exported']:.2f} % in onnxruntime\n"
    )
    print(render(found["models"]))
    where = environment(torch.device("cpu"))
    print(
        f"Medians of milliseconds. {where['processor']}, {where['threads']} threads; torch {where['torch']}, "
        f"onnxruntime {version('onnxruntime')}, adfq at {where['commit']}."
    )
