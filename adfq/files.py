"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adfq.errors import AdfqError


def as_path(file: Any) -> Path:
    """Return a path.

    Args:
        file: text or path.

    Raises:
        AdfqError: for anything else, and for a text that no file can be named by.
    """
    try:
        if "\0" not in os.fspath(file):
            return Path(file)
    except TypeError:
        pass
    raise AdfqError(f"a path is needed, got {file!r}")


@contextmanager
def replacing(file: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that takes the name of `file` when the block ends without an error.

    Args:
        file: path to write, or to replace.

    Raises:
        AdfqError: for a file that cannot be written.
    """
    path = as_path(file)
    # A file beside the target can take its place in one step.
    temporary = path.parent / f"{path.name}.{secrets.token_hex(4)}.part"
    try:
        if path.is_dir():
            raise AdfqError(f"cannot write {file}: it is a directory")
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise AdfqError(f"cannot write {file}: {error.strerror}") from None
    finally:
        with suppress(OSError):  # after a success it is gone
            temporary.unlink()
