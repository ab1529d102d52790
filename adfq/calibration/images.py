"""Calibration images, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adfq.calibration.waiting import Waiting, WaitingRoom
from adfq.errors import AdfqError, NonFiniteError


class CalibrationImages:
    """Calibration images in batches, each of which goes through the network at once; they can be read repeatedly.

    Args:
        batches: batches, B×C×H×W each, of any sizes.
        folder: folder for what waits in files, and for finished parts of the calibration; None, the default, for the
            system's temporary one, and for no finished parts.

    Attributes:
        folder: see the argument.
    """

    def __init__(self, batches: Sequence[Tensor | Waiting], folder: Path | None = None) -> None:
        self._batches: list[list[Tensor | Waiting]] = [[batch] for batch in batches]
        self.folder = folder

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Tensor:
        parts = [part if isinstance(part, Tensor) else part.load() for part in self._batches[index]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self._batches)))

    @property
    def sizes(self) -> list[int]:
        """Number of images in each batch."""
        return [sum(part.shape[0] for part in batch) for batch in self._batches]

    def one_of_each_shape(self) -> Iterator[Tensor]:
        """Yield the first image of each shape, 1×C×H×W."""
        parts: dict[torch.Size, Tensor | Waiting] = {}
        for part in (part for batch in self._batches for part in batch):
            parts.setdefault(part.shape[1:], part)
        for part in parts.values():
            image = part.split(1)[0]
            yield image if isinstance(image, Tensor) else image.load()

    def first(self, count: int) -> CalibrationImages:
        """Return the first images, in the batches that they are in.

        Args:
            count: number of images; all where there are fewer.
        """
        found = CalibrationImages([], self.folder)
        for batch in self._batches:
            parts: list[Tensor | Waiting] = []
            for part in batch:
                left = count - len(found) - sum(part.shape[0] for part in parts)
                if left > 0:
                    parts.append(part.split(left)[0])
            if parts:
                found._batches.append(parts)
        return found

    def split(self, size: int) -> CalibrationImages:
        """Return the same images in the same order, in batches of some size whatever the present ones are.

        Args:
            size: number of images in a batch; fewer before an image of another size, and at the end.
        """
        regrouped = CalibrationImages([], self.folder)
        batches = regrouped._batches
        for image in (image for batch in self._batches for part in batch for image in part.split(1)):
            if batches and len(batches[-1]) < size and image.shape == batches[-1][0].shape:
                batches[-1].append(image)
            else:
                batches.append([image])
        return regrouped


def read_images(
    calibration: Iterable[Any] | Tensor | None, size: int | None = None, usual: int = 32, folder: Path | None = None
) -> CalibrationImages:
    """Return calibration images in the batches that they come in.

    Several batches wait in a file, so that memory holds one at a time.

    Args:
        calibration: tensor B×C×H×W, which is one batch, or iterable of such tensors or of tuples that begin with one,
            as a DataLoader of images and labels gives. An iterable is read until there are enough images.
        size: number of images. None, the default, takes a tensor whole, and up to `usual` images from an iterable.
        usual: a method's usual number of images.
        folder: see `CalibrationImages`.

    Raises:
        AdfqError: if there are no images, fewer than `size`, or a size below 1; if something else than floating-point
            tensors comes.
        NonFiniteError: for images that hold NaN or infinity.
    """
    if calibration is None:
        raise AdfqError("calibration images are needed: pass calibration=<tensor or iterable of batches>")
    if not isinstance(calibration, Iterable):
        raise AdfqError(f"calibration must be a tensor or an iterable of batches, got {type(calibration).__name__}")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise AdfqError(f"calibration_size must be a whole number of at least 1, got {size!r}")
    batches: list[Tensor | Waiting] = []
    wanted = size or (None if isinstance(calibration, Tensor) else usual or None)
    found, room = 0, None
    for batch in [calibration] if isinstance(calibration, Tensor) else calibration:
        images = _images_of(batch)
        images = images if wanted is None else images[: wanted - found]
        found += len(images)
        if isinstance(calibration, Tensor) or (found == wanted and not batches):  # there is no other batch
            batches.append(images)
        elif len(images):
            room = room or WaitingRoom(folder)
            batches.append(room.keep(images))
        del batch, images  # not beside the next one
        if wanted is not None and found >= wanted:
            break
    if not found:
        raise AdfqError("there are no calibration images")
    if size is not None and found < size:
        raise AdfqError(f"there are only {found} calibration images for calibration_size={size}")
    return CalibrationImages(batches, folder)


def _images_of(batch: Any) -> Tensor:
    """Return the images of a batch, checked."""
    images: Any = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor) or images.dim() != 4:
        found = f"of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise AdfqError(f"calibration batches must be tensors B×C×H×W, got one {found}")
    if not images.is_floating_point():
        raise AdfqError(
            f"calibration images must be preprocessed as the model's input, in floating point, got {images.dtype}"
        )
    if images.is_meta or images.layout is not torch.strided or images.dtype.itemsize == 1:
        raise AdfqError(
            f"calibration images must be dense values, got {images.dtype}, {images.layout}, {images.device}"
        )
    if images.numel() and not torch.isfinite(torch.stack(images.aminmax())).all():
        raise NonFiniteError("calibration images are not finite (NaN or infinity)")
    return images.detach()
