"""Tensors that wait in files until they are needed again."""

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
        return AdfqError(
            f"cannot write to {self.folder}: {error.strerror}; calibration in batches keeps activations there"
        )
