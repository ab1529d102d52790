"""Tensors, and rows of tensors, that wait in files until they are needed again."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from adfq.errors import AdfqError

_LARGE = 2**22  # bytes of a row that waits in a file rather than in memory


@dataclass(frozen=True)
class Waiting:
    """A tensor in a file of a `WaitingRoom`.

    Attributes:
        room: the room.
        offset: place in the file, in bytes.
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        device: device that the tensor comes back to.
    """

    room: WaitingRoom
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def load(self) -> Tensor:
        """Return the tensor."""
        return self.room.load(self)

    def split(self, size: int) -> list[Waiting]:
        """Return parts along the first dimension.

        Args:
            size: number of indices of each part, of the last one at most.
        """
        row = self.shape[1:].numel() * self.dtype.itemsize
        return [
            replace(
                self,
                offset=self.offset + start * row,
                shape=torch.Size([min(size, self.shape[0] - start), *self.shape[1:]]),
            )
            for start in range(0, self.shape[0], size)
        ]


class WaitingRoom:
    """A file of tensors, which has no name and is gone with this object, or with the process.

    Files are read and written, not mapped: mapped pages would count as the process's memory.

    Args:
        folder: folder of the file; None, the default, for the system's temporary one (``TMPDIR``).

    Raises:
        AdfqError: for a folder that cannot be written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(folder or tempfile.gettempdir())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._error(error) from None
        finalize(self, self._file.close)
        self._end = 0

    def keep(self, tensor: Tensor) -> Waiting:
        """Write a tensor to the file.

        Args:
            tensor: any shape, dtype and device.

        Raises:
            AdfqError: if the file cannot be written, for example because the disk is full.
        """
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        waiting = Waiting(self, self._end, tensor.shape, tensor.dtype, tensor.device)
        try:
            while len(content):
                written = os.pwrite(self._file.fileno(), content, self._end)
                content, self._end = content[written:], self._end + written
        except OSError as error:
            raise self._error(error) from None
        return waiting

    def load(self, waiting: Waiting) -> Tensor:
        """Read a tensor back.

        Args:
            waiting: from `keep`.
        """
        content = np.empty(waiting.shape.numel() * waiting.dtype.itemsize, np.uint8)
        rest, offset = content.data, waiting.offset
        while len(rest):
            read = os.preadv(self._file.fileno(), [rest], offset)
            rest, offset = rest[read:], offset + read
        flat = torch.from_numpy(content)
        tensor = flat.view(waiting.dtype) if len(flat) else torch.empty(0, dtype=waiting.dtype)
        return tensor.view(waiting.shape).to(waiting.device)

    def _error(self, error: OSError) -> AdfqError:
        return AdfqError(f"cannot write to {self.folder}: {error.strerror}; calibration keeps activations there")


class WaitingRows:
    """Rows of a tensor in a file, which are read and written by index as those of a tensor in memory are.

    A row that is written twice takes room in the file twice.

    Args:
        shape: shape of the tensor, N×….
        dtype: its dtype.
        folder: folder of the file, see `WaitingRoom`.

    Attributes:
        shape: shape of the tensor.
        dtype: its dtype.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, folder: Path | None = None) -> None:
        self.shape, self.dtype = shape, dtype
        self._room = WaitingRoom(folder)
        self._rows: list[Waiting | None] = [None] * shape[0]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        rows = torch.empty(len(index), *self.shape[1:], dtype=self.dtype)
        for row, place in zip(rows, index.tolist(), strict=True):
            waiting = self._rows[place]
            assert waiting is not None
            row.copy_(waiting.load())
        return rows

    def __setitem__(self, index: Tensor, rows: Tensor) -> None:
        for place, row in zip(index.tolist(), rows, strict=True):
            self._rows[place] = self._room.keep(row.cpu())


#: Rows on the host: in memory, or in a file.
Rows = Tensor | WaitingRows


def room_for(rows: Tensor, count: int, folder: Path | None = None) -> Rows:
    """Return room on the host for rows like those of a tensor: in memory, or in a file where a row has 4 MiB or more.

    Room in memory that is never written to takes none.

    Args:
        rows: n×…, n above 0.
        count: number of rows.
        folder: folder of the file, see `WaitingRoom`.

    Raises:
        AdfqError: for a folder that cannot be written.
    """
    shape = torch.Size((count, *rows.shape[1:]))
    if rows[0].nbytes < _LARGE:
        return torch.empty(shape, dtype=rows.dtype)
    return WaitingRows(shape, rows.dtype, folder)
