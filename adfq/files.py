"""Files that are there whole and usable, or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adfq.errors import AdfqError


@contextmanager
def replacing(file: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to in place of `file`, whose name it takes when all that is done within has gone well.

    Raises:
        AdfqError: for a file that cannot be written.
    """
    path = Path(file)
    # Beside the target, so that it can take its place in one step.
    temporary = path.parent / f"{path.name}.{secrets.token_hex(4)}.part"
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise AdfqError(f"cannot write {file}: {error.strerror}") from None
    finally:
        with suppress(OSError):  # it is gone where all went well
            temporary.unlink()
