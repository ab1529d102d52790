"""``adfq run``: measures one method on one model."""

from __future__ import annotations

import argparse
import json

from adfq.errors import AdfqError
from benchmarks.cli.options import Commands, add_common, add_experiment, cell_fields, check_options, create_cell

#: Fields of the cell that are in a file of --quantized, by option.
_IN_QUANTIZED_FILE = {
    "--model": "model",
    "--model-arg": "model_arguments",
    "--checkpoint": "checkpoint",
    "--pretrained": "pretrained",
    "--method": "method",
    "--method-arg": "method_arguments",
    "--bits": "bits",
    "--calibration-size": "calibration_size",
    "--calibration-batch-size": "calibration_batch_size",
    "--seed": "seed",
}


def add(commands: Commands) -> None:
    """Add the command."""
    run = commands.add_parser("run", help="measure one method on one model")
    run.set_defaults(action=_run)
    add_experiment(run)
    run.add_argument("--quantized", metavar="FILE", help="file of 'adfq quantize' to measure, in place of --model …")
    run.add_argument(
        "--results",
        metavar="PREFIX",
        help="write PREFIX.bbox.json (detection) and PREFIX.segm.json (detection, segmentation) in COCO's format",
    )
    run.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")
    add_common(run)


def _run(options: argparse.Namespace) -> None:
    from benchmarks.run.runner import evaluate_model, resolve_device, run_cell
    from benchmarks.tasks import check_saved, find_task, load_quantized, load_subject

    check_options(options)
    device = resolve_device(options.device)
    if options.quantized:
        check_saved(options.task)
        given = [option for option, name in _IN_QUANTIZED_FILE.items() if getattr(options, name) is not None]
        if given:
            raise AdfqError(f"what {', '.join(given)} would say is in the file given with --quantized; leave it out")
        cell, subject = load_quantized(options.quantized, options.results, **cell_fields(options))
        record = evaluate_model(cell, subject, subject.model, device)
    else:
        cell = create_cell(options)
        record = run_cell(cell, load_subject(cell, options.results), device)
    if options.json:
        print(json.dumps(record))
        return
    said, timing = find_task(cell.task).describe(record["metrics"]), record["timing"]
    evaluation, loading = timing["evaluation"], timing["loading"]
    print(
        f"{cell.model}, {cell.method}, {cell.bits}: {said} "
        f"(calibration {timing['calibration']:.1f} s, evaluation {evaluation:.1f} s: "
        f"{record['metrics']['images'] / (evaluation - loading):.1f} images/s through the model, "
        f"{100 * loading / evaluation:.0f} % of the time waiting for images)"
    )
