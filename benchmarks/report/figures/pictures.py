"""Detections and masks in images, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from benchmarks.report.figures.style import COLORS, DPI, POINTS, check_file, make_figure, save
from benchmarks.tasks.masks import read_mask

#: Lines of boxes, for labels beyond the number of colours.
_LINES: tuple[Any, ...] = ("-", (0, (3, 1.5)), (0, (1, 1)))
_MASK_OPACITY = 0.35
_GAP = 0.06  # between pictures, in inches

Style = tuple[str, Any]


@dataclass(frozen=True)
class Detections:
    """Detections or ground truth of an image.

    Attributes:
        boxes: N×4 in pixels: x0, y0, x1, y1, the upper ends exclusive.
        labels: N whole numbers that colours tell apart: categories, or prompts.
        scores: N numbers; None, the default, for none.
        masks: N×H×W bool; None, the default, for none.
        points: True for points in place of boxes, with two equal corners each; False by default.
    """

    boxes: NDArray[Any]
    labels: NDArray[Any]
    scores: NDArray[Any] | None = None
    masks: NDArray[np.bool_] | None = None
    points: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def above(self, score: float) -> Detections:
        """Return detections of at least that score, the surest last; all of them if there are no scores."""
        if self.scores is None:
            return self
        order = np.argsort(self.scores, kind="stable")
        kept = order[self.scores[order] >= score]
        masks = None if self.masks is None else self.masks[kept]
        return replace(self, boxes=self.boxes[kept], labels=self.labels[kept], scores=self.scores[kept], masks=masks)


def read_coco(items: Sequence[Mapping[str, Any]], categories: Sequence[int], height: int, width: int) -> Detections:
    """Return annotations or results of one image from COCO's format.

    Args:
        items: entries with ``bbox`` and ``category_id``; all or none with ``score``, and with ``segmentation``.
        categories: category ids; labels are indices into it.
        height: height of the image in pixels.
        width: width of the image in pixels.
    """
    boxes = np.array([item["bbox"] for item in items], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([list(categories).index(item["category_id"]) for item in items], int)
    scores = np.array([item["score"] for item in items]) if items and "score" in items[0] else None
    masks = None
    if items and "segmentation" in items[0]:
        masks = np.array([read_mask(item["segmentation"], height, width) for item in items])
    return Detections(boxes, labels, scores, masks)


def compare_detections(image: Any) -> tuple[Detections, Detections]:
    """Return ground truth and detections of a `benchmarks.tasks.detection.task.Found`."""
    size = image.image.shape[:2]
    return read_coco(image.truth, image.ids, *size), read_coco(image.found, image.ids, *size)


def compare_masks(image: Any) -> tuple[Detections | None, Detections]:
    """Return ground truth, if it is known, and masks of a `benchmarks.tasks.segmentation.task.Segmented`.

    Labels number the prompts. A detector's prompts have its scores.
    """
    points = image.points is not None
    boxes = np.tile(image.points + 0.5, 2) if points else image.boxes  # from the middle of a pixel to its place
    found = Detections(boxes, np.arange(len(boxes)), None, image.masks, points)
    if image.truth is None:
        return None, replace(found, scores=np.array(image.scores))
    return replace(found, masks=image.truth), found


def draw_detections(
    images: Sequence[NDArray[np.uint8]],
    columns: Mapping[str, Sequence[Detections]],
    categories: Sequence[str] | None,
    file: Path,
    *,
    min_score: float = 0.3,
    width: float = 2.0,
) -> None:
    """Draw detections side by side: a row for each image, a column for each model.

    A label has one colour within a row, and the first column's labels come first. Names stand where they hide no other
    name; a name without room is left out, the least sure first.

    Args:
        images: H×W×3, of any sizes.
        columns: detections in each image by heading.
        categories: names by label; None for labels without names.
        file: path to write, ``.png`` or ``.svg``.
        min_score: score below which detections are left out.
        width: width of a picture in inches.

    Raises:
        AdfqError: for another kind of file, or one that cannot be written.
    """
    check_file(file)
    heights = [width * image.shape[0] / image.shape[1] for image in images]
    size = (len(columns) * (width + _GAP) - _GAP, sum(heights) + (len(heights) - 1) * _GAP)
    figure = make_figure(*size)
    bottom = size[1]
    for index, (image, height) in enumerate(zip(images, heights, strict=True)):
        bottom -= height
        row = {heading: found[index].above(min_score) for heading, found in columns.items()}
        styles = _styles(label for found in row.values() for label in found.labels.tolist())
        for column, (heading, found) in enumerate(row.items()):
            left = column * (width + _GAP)
            axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
            _draw(axes, image, found, styles)
            _write_names(axes, found, styles, categories)
            if index == 0:
                axes.set_title(heading, fontsize=POINTS + 1.5, pad=3)
        bottom -= _GAP
    save(figure, file, bbox_inches="tight", pad_inches=_GAP)


def _styles(labels: Iterable[int]) -> dict[int, Style]:
    """Choose colour and line of each label."""
    return {
        label: (COLORS[rank % len(COLORS)], _LINES[rank // len(COLORS) % len(_LINES)])
        for rank, label in enumerate(dict.fromkeys(labels))
    }


def _draw(axes: Axes, image: NDArray[np.uint8], found: Detections, styles: Mapping[int, Style]) -> None:
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    axes.imshow(image, extent=extent)
    if found.masks is not None and len(found):
        layer = np.zeros((height, width, 4))
        for label, mask in zip(found.labels.tolist(), found.masks, strict=True):
            layer[mask] = (*to_rgb(styles[label][0]), _MASK_OPACITY)
        axes.imshow(layer, extent=extent, interpolation="nearest")
        # The centres of pixels, and a margin in which outlines at the image's edge close.
        x, y = np.arange(-0.5, width + 1), np.arange(-0.5, height + 1)
        for label, mask in zip(found.labels.tolist(), found.masks, strict=True):
            if mask.any():
                axes.contour(x, y, np.pad(mask, 1), levels=[0.5], colors=[styles[label][0]], linewidths=0.7)
    # On white, to stand out from any image.
    for label, (x0, y0, x1, y1) in zip(found.labels.tolist(), found.boxes, strict=True):
        if found.points:
            axes.plot(x0, y0, "o", color=styles[label][0], markersize=4.5, markeredgecolor="white")
            continue
        for thickness, (color, line) in ((2.1, ("white", "-")), (1.1, styles[label])):
            box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, snap=False)
            box.set(edgecolor=color, linestyle=line, linewidth=thickness)
            axes.add_patch(box)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()


def _write_names(
    axes: Axes,
    found: Detections,
    styles: Mapping[int, Style],
    categories: Sequence[str] | None,
) -> None:
    if not len(found):
        axes.text(0.5, 0.04, "none", transform=axes.transAxes, ha="center", fontsize=POINTS, **_paper("black"))
    taken: list[Bbox] = []
    for index in reversed(range(len(found))):  # the surest first
        label = int(found.labels[index])
        words = [] if categories is None else [categories[label]]
        words += [] if found.scores is None else [f"{found.scores[index]:.2f}"]
        if not words:
            continue
        name = axes.text(0, 0, " ".join(words), fontsize=POINTS, va="bottom", **_paper(styles[label][0]))
        extent = name.get_window_extent().padded(DPI / 72)  # the paper's margin
        place = _find_room(axes, extent, found.boxes[index], taken)
        if place is None:
            name.remove()
        else:
            taken.append(place)
            x, y = axes.transData.inverted().transform(place.padded(-DPI / 72).p0)
            name.set_position((x, y))


def _paper(color: str) -> dict[str, Any]:
    """Return the background of a name; the padding makes one point on each side."""
    style = {"facecolor": "white", "edgecolor": color, "linewidth": 0.8, "alpha": 0.85}
    return {"bbox": {"boxstyle": f"square,pad={1 / POINTS}", **style}}


def _find_room(axes: Axes, extent: Bbox, box: NDArray[Any], taken: Sequence[Bbox]) -> Bbox | None:
    """Find a place for a name at its box, within the picture: above, below, or inside; None if all are taken."""
    picture = axes.bbox
    (left, top), (right, bottom) = axes.transData.transform(box.reshape(2, 2))
    for y in (top, bottom - extent.height, top - extent.height, bottom):
        for x in (left, right - extent.width):
            inside = min(max(x, picture.x0), picture.x1 - extent.width)
            place = Bbox.from_bounds(inside, y, extent.width, extent.height)
            fits = picture.x0 <= place.x0 and picture.y0 <= place.y0 and place.y1 <= picture.y1
            if fits and not place.count_overlaps(taken):
                return place
    return None
