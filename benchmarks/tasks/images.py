"""Reader of images that all tasks and figures share.

An image is turned as its EXIF orientation says, as MMDetection and image viewers do it, unless its annotation states
the size that only the stored pixels have. Grey values of 16 bits keep their upper 8; values of other widths are
refused. Transparency is left out, and the first of several frames counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adfq.errors import AdfqError, one_line

#: Width and height in pixels.
Size = tuple[int, int]

_ORIENTATION = 0x0112  # EXIF's tag

_OPERATIONS: Any = getattr(Image, "Transpose", Image)  # Pillow 9.0 has them in its module

# Pillow's operations by EXIF orientation, and those that undo them.
_TURNS = {
    2: _OPERATIONS.FLIP_LEFT_RIGHT,
    3: _OPERATIONS.ROTATE_180,
    4: _OPERATIONS.FLIP_TOP_BOTTOM,
    5: _OPERATIONS.TRANSPOSE,
    6: _OPERATIONS.ROTATE_270,
    7: _OPERATIONS.TRANSVERSE,
    8: _OPERATIONS.ROTATE_90,
}
_INVERSES = {_OPERATIONS.ROTATE_90: _OPERATIONS.ROTATE_270, _OPERATIONS.ROTATE_270: _OPERATIONS.ROTATE_90}

# Formats and modes that every reader decodes to the same pixels; BMP with 16 bits a pixel is none.
_ORDINARY_FORMATS = ("JPEG", "MPO", "PNG")
_ORDINARY_MODES = ("L", "RGB")


def read_image(path: Path, size: Size | None = None, source: Path | None = None) -> NDArray[np.uint8]:
    """Read an image: H×W×3, red, green, blue.

    Args:
        path: path of the image.
        size: width and height that the annotation states; None, the default, if there is no annotation.
        source: file of the annotation, for error messages; None, the default, for none.

    Raises:
        AdfqError: for a file that cannot be read, and an image of another size.
    """
    with _opened(path) as image:
        _check_size(image, path, size, source)
        return np.asarray(as_rgb(image, size))


def read_unusual(path: Path, size: Size, source: Path) -> NDArray[np.uint8] | None:
    """Read an image that other readers may read otherwise, as `read_image`; return None for an ordinary one.

    An ordinary image is decoded to see that the file is whole. Its pixels are the stored ones: a reader that finds an
    orientation in it all the same is not to follow it.

    Args:
        path: path of the image.
        size: width and height that the annotation states.
        source: file of the annotation, for error messages.

    Raises:
        AdfqError: as `read_image`.
    """
    with _opened(path) as image:
        _check_size(image, path, size, source)
        ordinary = image.format in _ORDINARY_FORMATS and image.mode in _ORDINARY_MODES
        if not ordinary or _orientation(image) in _TURNS:
            return np.asarray(as_rgb(image, size))
        # OpenCV would fill up with grey what a damaged file lacks. At an eighth of its size a JPEG is read in no time.
        image.draft("L", (1, 1))
        image.load()
        return None


def check_size(path: Path, size: Size, source: Path) -> None:
    """Raise AdfqError unless an image has the size that its annotation states; only its header is read.

    Args:
        path: path of the image.
        size: width and height that the annotation states.
        source: file of the annotation.
    """
    with _opened(path) as image:
        _check_size(image, path, size, source)


def as_rgb(image: Image.Image, size: Size | None = None) -> Image.Image:
    """Return an image in mode RGB, turned as its EXIF orientation says.

    Args:
        image: image of Pillow.
        size: width and height that the annotation states; None, the default, if there is no annotation. The stored
            pixels are returned unturned if only they have this size.

    Raises:
        ValueError: for values that cannot be scaled to 8 bits.
    """
    orientation = _orientation(image)
    image.load()
    done = orientation in _TURNS and _orientation(image) not in _TURNS  # as Pillow does it with TIFF
    rgb = _to_8_bits(image)
    if orientation not in _TURNS:
        return rgb
    turn = _TURNS[orientation]
    turned_size = rgb.size if done or orientation < 5 else rgb.size[::-1]
    stored_size = turned_size if orientation < 5 else turned_size[::-1]
    if stored_size == size != turned_size:
        return rgb.transpose(_INVERSES.get(turn, turn)) if done else rgb
    return rgb if done else rgb.transpose(turn)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return a loaded image in mode RGB; Pillow's own conversion would cut grey values above 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        tags = getattr(image, "tag_v2", {})
        bits, inverted = tags.get(258, (16,))[0], tags.get(262) == 0
        if bits != 16 or inverted:
            raise ValueError(f"its grey values have {bits} bits{', and 0 is white' * inverted}")
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its values are numbers of 32 bits, which have no scale")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF data turn nothing
        try:
            return int(image.getexif().get(_ORIENTATION, 1))
        except Exception:  # parsers of many formats
            return 1


def _check_size(image: Image.Image, path: Path, size: Size | None, source: Path | None) -> None:
    if size is None or image.size == size or (image.size == size[::-1] and _orientation(image) in range(5, 9)):
        return
    found, stated = (f"{width}×{height}" for width, height in (image.size, size))
    raise AdfqError(f"{path} has {found} pixels, and {stated} in {source}")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except AdfqError:
        raise
    except Exception as error:  # readers of many formats
        raise AdfqError(f"cannot read {path}: {one_line(error)}") from None
