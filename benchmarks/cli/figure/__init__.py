"""``adfq figure``: draws what a table's methods find, what they have to cope with, and what they cost."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.cli.figure import layers, pictures, results
from benchmarks.cli.options import Commands, Parser


def add(commands: Commands) -> None:
    """Add the command with its kinds."""
    figure = commands.add_parser(
        "figure", help="draw detections, masks, activations, outliers, errors, accuracy and cost"
    )
    kinds = figure.add_subparsers(dest="kind", required=True)

    def add_kind(name: str, action: Callable[[argparse.Namespace], int | None], text: str) -> Parser:
        kind: Parser = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        kind.set_defaults(action=action)
        kind.add_argument("--out", dest="file", type=Path, required=True, metavar="FILE", help="PNG or SVG to write")
        return kind

    for group in (results, pictures, layers):
        group.add_kinds(add_kind)
