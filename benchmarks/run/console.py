"""Words to the person at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import pandas as pd
from tqdm import tqdm

_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


def warn(message: str) -> None:
    """One line on stderr that does not tear a progress bar."""
    tqdm.write(f"adfq: {message}", file=sys.stderr)
    collected = _collected.get()
    if collected is not None and message not in collected:
        collected.append(message)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """The messages that `warn` says within it, each once."""
    messages: list[str] = []
    token = _collected.set(messages)
    try:
        yield messages
    finally:
        _collected.reset(token)


def markdown_table(frame: pd.DataFrame, names: int = 1) -> str:
    """A frame of text as Markdown: the first columns, which hold names, to the left, all others to the right."""
    alignment = [*["left"] * names, *["right"] * (frame.shape[1] - names)]
    return str(frame.to_markdown(index=False, disable_numparse=True, colalign=alignment))
