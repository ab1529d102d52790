"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adfq.errors import AdfqError


@contextmanager
def replacing(file: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that takes the name of `file` when the block ends without an error.

    Args:
        file: path to write, or to replace.

    Raises:
        AdfqError: for a file that cannot be written.
    """
    path = Path(file)
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
