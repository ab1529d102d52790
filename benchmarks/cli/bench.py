"""``adfq bench``: how fast methods are, in multiples of full precision."""

from __future__ import annotations

import argparse
import json

from adfq.registry import methods
from benchmarks.bundled import BUNDLED
from benchmarks.cli.options import Commands, add_device, positive


def add(commands: Commands) -> None:
    """Add the command."""
    bench = commands.add_parser("bench", help="measure how fast methods are, in multiples of full precision")
    bench.set_defaults(action=_bench)
    bench.add_argument("--model", default="deit_small_patch16_224", help="a classifier (default: %(default)s)")
    bench.add_argument(
        "--data", default=BUNDLED, metavar="SPEC", help="data as for 'adfq run classification' (default: %(default)s)"
    )
    bench.add_argument("--methods", nargs="+", metavar="METHOD", help="methods of 'adfq list methods' (default: all)")
    bench.add_argument("--bits", default="W4A4", help="default: %(default)s")
    bench.add_argument("--images", type=positive, default=32, metavar="N", help="images at once (default: %(default)s)")
    bench.add_argument(
        "--repeats", type=positive, default=3, metavar="N", help="repetitions of everything (default: %(default)s)"
    )
    add_device(bench)
    bench.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")


def _bench(options: argparse.Namespace) -> None:
    from benchmarks.run.provenance import environment
    from benchmarks.run.runner import resolve_device
    from benchmarks.studies.speed import benchmark, render

    device = resolve_device(options.device)
    names = list(dict.fromkeys(options.methods or methods()))
    found = benchmark(options.model, names, options.bits, options.images, options.repeats, device, options.data)
    where = environment(device)
    if options.json:
        asked = {name: getattr(options, name) for name in ("model", "data", "bits", "images", "repeats")}
        print(json.dumps({**asked, **found, "environment": where}))
        return
    full = found["full_precision"]
    print(f"**{options.model}**, {options.bits}, {options.images} images of {options.data}, at once\n")
    print(render(found))
    memory = f" and {full['forward_memory']:.0f} MB" if "forward_memory" in full else ""
    training = f"; forwards and backwards takes {full['training']:.2f} s" if "training" in full else ""
    print(
        f"Times and memory as multiples of full precision's forward pass, which takes {full['forward']:.2f} s{memory}"
        f"{training}. Medians of {options.repeats}. Batches are a quarter of the images. Methods that optimize are "
        f"calibrated without it; an iteration of it, over all modules, is a multiple of one pass of the model "
        f"forwards and backwards.\n"
    )
    if loading := found.get("loading"):
        print(
            f"{loading['workers']} processes read and preprocess {loading['images_per_second']:.0f} images/s, of which "
            f"full precision takes {full['images_per_second']:.0f}.\n"
        )
    print(
        f"{where['processor']}, {where['device']}, {where['threads']} threads; torch {where['torch']}, adfq at "
        f"{where['commit']}."
    )
