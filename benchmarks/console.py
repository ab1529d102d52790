"""Words to the person at the terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm


def warn(message: str) -> None:
    """One line on stderr that does not tear a progress bar."""
    tqdm.write(f"adfq: {message}", file=sys.stderr)
