"""Messages on the terminal."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import pandas as pd
from tqdm import tqdm

_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


def warn(message: str) -> None:
    """Print one line to stderr without tearing a progress bar; inside `collect_warnings`, collect it in place of that.

    Args:
        message: the line, without the program's name.
    """
    collected = _collected.get()
    if collected is None:
        tqdm.write(f"adfq: {message}", file=sys.stderr)
    elif message not in collected:
        collected.append(message)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Yield a list that collects the messages of `warn` and of Python's warnings inside the block, each once.

    Python's own filters decide which warnings there are, but a UserWarning counts each time.
    """
    messages: list[str] = []
    token = _collected.set(messages)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning, append=True)
            warnings.showwarning = lambda message, *_: warn(str(message))
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
