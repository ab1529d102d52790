"""Class folders of images, on disk or in a tar, as a data set that leaves nothing out without a word."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from posixpath import basename, dirname, join, normpath, splitext
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from adfq.errors import AdfqError, one_line
from benchmarks.run.console import warn
from benchmarks.tasks.shared import read_json

# Formats that Pillow recognizes and never decodes.
_STUBS = ("BUFR", "GRIB", "HDF5", "MPEG")

# Formats whose content tells them apart from any other file.
_CLEAR = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")

# Images that Pillow does not read.
_UNREADABLE = (".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw")


@dataclass(frozen=True, slots=True)
class _File:
    """File of a split.

    Attributes:
        name: path within the split, with slashes.
        place: path on disk of the file, or of the tar that it is in.
        start: offset in the tar in bytes; None for a file on disk.
        size: length in the tar in bytes.
    """

    name: str
    place: str
    start: int | None = None
    size: int = 0

    def open(self) -> Any:
        """Open the file to read bytes."""
        if self.start is None:
            return open(self.place, "rb")
        with open(self.place, "rb") as stream:
            stream.seek(self.start)
            return BytesIO(stream.read(self.size))


class ClassFolders(Dataset[tuple[Image.Image, int]]):
    """Data set of pairs (PIL image, label) from class folders: ``ROOT/CLASS/IMAGE``, or a tar of such folders.

    A name that begins with a dot, and ``__MACOSX``, is no data. Files count by Pillow's extensions, others by their
    content; files that are no images are named in a warning. Classes are in natural order, as timm has them: digits in
    a name count as a number, and upper case counts as lower case.

    Args:
        root: folder or tar.
        class_map: label of each class by name; None, the default, for the places of the names in natural order.

    Attributes:
        names: names of the classes by label.

    Raises:
        AdfqError: without images, for images outside of class folders or in folders of different depth, for images that
            Pillow does not read, for a class that is not in the map, for pipes and for links that lead upwards or
            nowhere, and for a tar that is damaged, cut off, or has links or an image twice.
    """

    def __init__(self, root: Path, class_map: Mapping[str, int] | None = None) -> None:
        self.root = root
        images, others = _list_images(root)
        _check_others(root, others)
        folders = {dirname(file.name) for file in images}
        _check_folders(root, images, folders)
        found = sorted(map(basename, folders), key=lambda name: (natural_key(name), name))
        unknown = [name for name in found if class_map is not None and name not in class_map]
        if unknown:
            raise AdfqError(f"{root} has class folders that are not in the class map: {some(unknown)}")
        labels = class_map or {name: label for label, name in enumerate(found)}
        self.names = sorted(labels, key=lambda name: labels[name])
        self.in_folders = frozenset(found)
        self.samples = [
            (file, labels[basename(dirname(file.name))])
            for file in sorted(images, key=lambda file: (natural_key(file.name), file.name))
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.samples[index]
        return Image.open(file.open()), label

    def filename(self, index: int, absolute: bool = False) -> str:
        """Return a file's path within the split.

        Args:
            index: index of the file.
            absolute: whether the path begins with that of the split; False by default.
        """
        name = self.samples[index][0].name
        return os.path.join(self.root, name) if absolute else name

    def filenames(self) -> list[str]:
        """Return the paths of all files within the split, in order."""
        return [file.name for file, _ in self.samples]


def natural_key(name: str) -> list[Any]:
    """Return a key that sorts names as timm does: digits as numbers, without regard to case."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def visible_folders(root: Path) -> set[str]:
    """Return the names of the folders directly in a folder that may be classes."""
    return {entry.name for entry in os.scandir(root) if entry.is_dir() and _is_visible(entry.name)}


def check_folder(root: str) -> None:
    """Raise AdfqError for a folder that another reader would never come to the end of."""
    for _ in _list_folder(root):
        pass


def read_differences(root: str, read: Iterable[str]) -> str:
    """Return the way in which another reader's list of images differs from `ClassFolders`; empty if it does not.

    Args:
        root: folder of class folders.
        read: paths of the images that the other reader counts.
    """
    ours = {os.path.relpath(file.place, root) for file in _list_images(Path(root))[0]}
    theirs = {os.path.relpath(path, root) for path in read}
    parts = [f"leaves out {some(sorted(ours - theirs))}"] if ours - theirs else []
    parts += [f"counts {some(sorted(theirs - ours))}"] if theirs - ours else []
    return " and ".join(parts)


def read_class_map(file: str) -> dict[str, int]:
    """Read the label of each class.

    Args:
        file: text with one name a line in the order of the labels, or, ending in ``.json``, a list of names or an
            object with a label by name.

    Raises:
        AdfqError: for a file that is missing, of another form, or does not give each label from 0 once.
    """
    if os.path.exists(file) and not os.path.isfile(file):
        raise AdfqError(f"cannot read class map {file}: it is no regular file")
    try:
        if file.lower().endswith(".json"):
            content = read_json(Path(file))
        else:
            content = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise AdfqError(f"there is no class map {file}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdfqError(f"cannot read class map {file}: {one_line(error)}") from None
    if isinstance(content, list):
        while content and content[-1] == "":
            content.pop()
        names, labels = content, list(range(len(content)))
    elif isinstance(content, dict):
        names, labels = list(content), list(content.values())
    else:
        names, labels = [], []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise AdfqError(f"{file} is no class map: it has to be names, or labels by name")
    if not all(type(label) is int for label in labels) or sorted(labels) != list(range(len(labels))):
        raise AdfqError(f"{file} is no class map: its labels are not 0 to {len(labels) - 1}, each once")
    if twice := _twice(names):
        raise AdfqError(f"{file} is no class map: it names {some(twice)} twice")
    return dict(zip(names, labels, strict=True))


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, number in Counter(names).items() if number > 1]


def some(names: Sequence[Any], shown: int = 3) -> str:
    """Return the first of several names, and the number of the others."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(map(str, names[:shown]))}{more}"


def _list_images(root: Path) -> tuple[list[_File], list[str]]:
    """Return the images of a split, and the names of its other files."""
    images: list[_File] = []
    others: list[str] = []
    known = _extensions()
    for file in _list_folder(str(root)) if root.is_dir() else _list_tar(root):
        if splitext(file.name)[1].lower() in known or _is_clear(file):
            images.append(file)
        else:
            others.append(file.name)
    if twice := _twice(file.name for file in images):  # only a tar can have a name twice
        raise AdfqError(f"{root} has {some(twice)} twice; pack it again without old versions of images")
    return images, others


def _list_folder(root: str) -> Iterator[_File]:
    """Yield the files of a folder and of those in it, also behind links."""
    left: list[tuple[str, str, tuple[str, ...]]] = [(root, "", ())]
    try:
        while left:
            place, folder, above = left.pop()
            above = (*above, os.path.realpath(place))
            if above[-1] in above[:-1]:
                raise AdfqError(f"cannot read {place}: it is a link to a folder that it is in")
            with os.scandir(place) as entries:
                visible = [entry for entry in entries if _is_visible(entry.name)]
            for entry in visible:
                name = join(folder, entry.name)
                if entry.is_dir():
                    left.append((entry.path, name, above))
                elif entry.is_file():
                    yield _File(name, entry.path)
                else:  # reading from a pipe would wait without end
                    raise AdfqError(f"cannot read {entry.path}: it is no regular file, or a link to nothing")
    except OSError as error:
        raise AdfqError(f"cannot read {error.filename}: {error.strerror}") from None


def _list_tar(place: Path) -> Iterator[_File]:
    if not place.is_file():
        raise AdfqError(f"cannot read {place}: it is no regular file")
    try:
        with tarfile.open(place, "r:") as tar:
            yield from _list_members(tar, str(place), "", 0)
    except (tarfile.TarError, OSError) as error:
        raise AdfqError(f"cannot read {place}: {one_line(error)}") from None


def _list_members(tar: tarfile.TarFile, place: str, folder: str, start: int) -> Iterator[_File]:
    """Yield the files of a tar; a tar in it counts as the folder of its name."""
    for member in tar:
        name = join(folder, normpath(member.name).lstrip("/"))
        if member.isdir() or not all(map(_is_visible, name.split("/"))):
            continue
        if not member.isfile() or member.issparse():
            raise AdfqError(f"cannot read {name} in {place}: it is a link, a sparse file or no file at all")
        if splitext(name)[1].lower() == ".tar":
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                yield from _list_members(inner, place, splitext(name)[0], start + member.offset_data)
        else:
            yield _File(name, place, start + member.offset_data, member.size)
    _check_end(tar, join(place, folder).rstrip("/"))


def _check_end(tar: Any, place: str) -> None:
    """Raise AdfqError unless only zeros, at least two blocks, follow; tarfile takes a damaged header for the end."""
    tar.fileobj.seek(tar.offset)
    length = 0
    while (block := tar.fileobj.read(1 << 20)) and not block.strip(b"\0"):
        length += len(block)
    if block or length < 2 * tarfile.BLOCKSIZE:
        raise AdfqError(f"cannot read {place}: it is damaged or cut off")


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


@cache
def _extensions() -> frozenset[str]:
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(name for name, kind in known if kind in Image.OPEN and kind not in _STUBS)


def _is_clear(file: _File) -> bool:
    try:
        with file.open() as stream, Image.open(stream, formats=_CLEAR):
            return True
    except Exception:  # readers of many formats
        return False


def _check_others(root: Path, others: Sequence[str]) -> None:
    unreadable = [name for name in others if splitext(name)[1].lower() in _UNREADABLE]
    if unreadable:
        raise AdfqError(f"{root} has images that cannot be read: {some(unreadable)}; convert or remove them")
    if others:
        files = "1 file is no image and does" if len(others) == 1 else f"{len(others)} files are no images and do"
        warn(f"{root}: {files} not count: {some(others)}")


def _check_folders(root: Path, images: Sequence[_File], folders: set[str]) -> None:
    if not images:
        raise AdfqError(f"{root} has no images; expected {root}/CLASS/IMAGE")
    outside = [file.name for file in images if not dirname(file.name)]
    if outside:
        raise AdfqError(f"{root} has images outside of class folders: {some(outside)}")
    if len({dirname(folder) for folder in folders}) > 1:
        depths = {dirname(folder): folder for folder in sorted(folders)}
        raise AdfqError(
            f"{root} has images in folders of several levels, so that classes are not clear: "
            f"{some(list(depths.values()))}"
        )
