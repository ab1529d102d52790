"""One reader: an image has the same pixels in whatever form it is stored, and what has no clear pixels is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from adfq import AdfqError
from benchmarks.tasks.images import as_rgb, check_size, read_image, read_unusual

SOURCE = Path("instances.json")
#: Rotations and flips that a camera's orientation asks for, and that a writer undoes.
STORED = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: np.swapaxes(pixels, 0, 1),
    6: lambda pixels: np.rot90(pixels, 1),
    7: lambda pixels: np.rot90(np.swapaxes(pixels, 0, 1), 2),
    8: lambda pixels: np.rot90(pixels, -1),
}


def picture(height: int = 20, width: int = 30) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def save(pixels: NDArray[Any], file: Path, orientation: int | None = None) -> Path:
    """Write the pixels as they are stored where they are to be turned."""
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
        pixels = STORED[orientation](pixels)
    more: dict[str, Any] = {"lossless": True} if file.suffix == ".webp" else {}
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, exif=exif, **more)
    return file


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
@pytest.mark.parametrize("shape", [(20, 30), (25, 25)])
def test_an_orientation_turns_the_image(orientation: int, suffix: str, shape: tuple[int, int], tmp_path: Path) -> None:
    pixels = picture(*shape)
    file = save(pixels, tmp_path / f"image.{suffix}", orientation)
    size = (shape[1], shape[0])
    check_size(file, size, SOURCE)
    for found in (read_image(file), read_image(file, size, SOURCE), np.asarray(as_rgb(Image.open(file)))):
        assert np.array_equal(found, pixels)
    unusual = read_unusual(file, size, SOURCE)
    assert (unusual is None) == (orientation == 1 and suffix == "png")
    assert unusual is None or np.array_equal(unusual, pixels)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_the_annotation_decides_where_only_the_stored_size_fits(orientation: int, suffix: str, tmp_path: Path) -> None:
    pixels = picture()
    file = save(pixels, tmp_path / f"image.{suffix}", orientation)
    check_size(file, (20, 30), SOURCE)
    assert np.array_equal(read_image(file, (20, 30), SOURCE), STORED[orientation](pixels))


def test_damaged_or_unknown_orientations_turn_nothing(tmp_path: Path) -> None:
    pixels = picture()
    for number, exif in enumerate(
        (b"Exif\0\0MM\0*\0\0\0\1", b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x09\0\0\0")
    ):
        file = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(file, exif=exif)
        assert np.array_equal(read_image(file), pixels)


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    file = save(picture(), tmp_path / "image.png", 3)
    for read in (check_size, read_image, read_unusual):
        with pytest.raises(AdfqError, match=r"image\.png has 30×20 pixels, and 20×30 in instances\.json$"):
            read(file, (20, 30), SOURCE)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_to_8(mode: str, suffix: str, tmp_path: Path) -> None:
    grey = picture()[..., 0]
    wide = (grey.astype(np.uint16) << 8) | np.arange(30, dtype=np.uint16)
    file = tmp_path / f"image.{suffix}"
    if suffix == "tif" and mode == "I;16B":
        Image.frombytes("I;16B", (30, 20), wide.astype(">u2").tobytes()).save(file)
    else:
        Image.fromarray(wide).save(file)
    for found in (read_image(file), read_unusual(file, (30, 20), SOURCE)):
        assert found is not None
        assert np.array_equal(found, np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "PA", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_converted(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(picture())
    image.putalpha(Image.fromarray(picture()[..., 0]))
    image = (image if mode in ("LA", "RGBA") else image.convert("RGB").convert("P" if mode == "PA" else mode)).convert(
        mode
    )
    assert np.array_equal(np.asarray(as_rgb(image)), np.asarray(image.convert("RGB")))


def test_the_first_frame_counts(tmp_path: Path) -> None:
    first, second = (Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200))
    for suffix in ("gif", "png", "webp", "tif", "mpo"):
        file = tmp_path / f"image.{suffix}"
        more: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
        first.save(file, save_all=True, append_images=[second], **more)
        assert read_image(file).mean() == pytest.approx(10, abs=1)


@pytest.mark.parametrize("masks", [(), (0xF800, 0x07E0, 0x001F)])  # 5, 5 and 5 bits a colour; 5, 6 and 5
def test_readers_scale_16_bit_bmp_otherwise(masks: tuple[int, ...], tmp_path: Path) -> None:
    width, body = 30, np.random.default_rng(0).integers(0, 256, 20 * 60, np.uint8).tobytes()
    start = 54 + 4 * len(masks)
    head = struct.pack("<2sIII", b"BM", start + len(body), 0, start)
    info = struct.pack("<IiiHHIIiiII", 40, width, 20, 1, 16, 3 if masks else 0, len(body), 0, 0, 0, 0)
    file = tmp_path / "image.bmp"
    file.write_bytes(head + info + struct.pack(f"<{len(masks)}I", *masks) + body)
    found = read_unusual(file, (width, 20), SOURCE)
    assert found is not None
    assert np.array_equal(found, np.asarray(Image.open(file).convert("RGB")))


def test_values_without_a_scale_are_refused(tmp_path: Path) -> None:
    for number, values in enumerate((np.zeros((8, 8), np.float32), np.zeros((8, 8), np.int32))):
        file = tmp_path / f"{number}.tif"
        Image.fromarray(values).save(file)
        with pytest.raises(AdfqError, match=rf"^cannot read .*{number}\.tif: its values are numbers of 32 bits"):
            read_image(file)
    file = tmp_path / "white.tif"
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(file, tiffinfo={262: 0})
    content = file.read_bytes()
    with Image.open(file) as image:
        inverted = getattr(image, "tag_v2")[262] == 0  # noqa: B009  # of TIFF alone
    if not inverted:  # Pillow writes its own
        at = content.index(b"\x06\x01\x03\x00\x01\x00\x00\x00\x01")
        file.write_bytes(content[: at + 8] + b"\0" + content[at + 9 :])
    with pytest.raises(AdfqError, match="its grey values have 16 bits, and 0 is white"):
        read_image(file)


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    file = save(picture(), tmp_path / "image.png")
    file.rename(tmp_path / "image.JPG")
    assert np.array_equal(read_image(tmp_path / "image.JPG"), picture())


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_images(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(content)
    for read in (check_size, read_image, read_unusual):
        with pytest.raises(AdfqError, match=f"^cannot read {file}: ") as caught:
            read(file, (20, 30), SOURCE)
        assert "\n" not in str(caught.value)
    with pytest.raises(AdfqError, match=r"^cannot read "):
        read_image(tmp_path)
