"""Messages on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import pandas as pd
from tqdm import tqdm

_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


def warn(message: str) -> None:
    """Print one line to stderr without tearing a progress bar.

    Args:
        message: the line, without the program's name.
    """
    tqdm.write(f"adfq: {message}", file=sys.stderr)
    collected = _collected.get()
    if collected is not None and message not in collected:
        collected.append(message)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Yield a list that collects the messages of `warn` inside the block, each once."""
    messages: list[str] = []
    token = _collected.set(messages)
    try:
        yield messages
    finally:
        _collected.reset(token)


def markdown_table(frame: pd.DataFrame, names: int = 1) -> str:
    """Return a frame of text as Markdown.

    Args:
        frame: text, with column names.
        names: number of the first columns that are aligned to the left; others are aligned to the right. 1 by default.
    """
    alignment = [*["left"] * names, *["right"] * (frame.shape[1] - names)]
    return str(frame.to_markdown(index=False, disable_numparse=True, colalign=alignment))
