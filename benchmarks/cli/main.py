"""The ``adfq`` command."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

import adfq
from adfq.errors import AdfqError
from benchmarks.cli import bench, describe, export, figure, listing, quantize, regress, report, results, run, table
from benchmarks.run.allocator import keep_freed_memory
from benchmarks.run.console import warn

#: Modules whose `add` adds a command's parser, in the order of the help; its default ``action`` runs the command.
COMMANDS = (run, quantize, export, describe, table, report, regress, figure, bench, results, listing)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AdfqError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    for library in ("timm", "huggingface_hub"):  # their warnings that matter come as our own errors
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_: warn(str(message))
    keep_freed_memory()
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        _check_empty(arguments)
        options = _parser().parse_args(arguments)
        action: Callable[[argparse.Namespace], int | None] = options.action
        return action(options) or 0
    except AdfqError as error:
        print(f"adfq: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("adfq: interrupted; finished cells are recorded", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with | head
        sys.stderr.close()
        return 0


def _check_empty(arguments: Sequence[str]) -> None:
    """Raise AdfqError for an empty word, as a shell gives for a variable that is not set."""
    for before, word in zip(("adfq", *arguments), arguments, strict=False):
        if not word or (word.startswith("--") and word.endswith("=")):
            raise AdfqError(f"there is an empty text after {word.removesuffix('=') or before}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="adfq", description="Post-training quantization of vision transformers, measured.")
    parser.add_argument("--version", action="version", version=f"adfq {adfq.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add(commands)
    commands.metavar = "|".join(commands.choices)
    return parser
