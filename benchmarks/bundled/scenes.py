"""Seeded generator of labelled scenes, which are the data that ship with the project.

A scene is a cluttered 1/f background with textured shapes on it, partly hidden by each other and by thin occluders,
under uneven light, blurred and noisy like a cheap camera's picture. Everything is drawn from one ``numpy`` generator,
so that a seed names a scene. Category = shape × texture: neither the outline nor the surface alone decides it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Array = NDArray[np.float32]

TILT = 0.35  # radians, 20°
SUPERSAMPLING = 2  # scenes are drawn at twice their size and averaged down: smooth edges


def _disk(x: Array, y: Array) -> NDArray[np.bool_]:
    return np.hypot(x, y) < 0.85


def _square(x: Array, y: Array) -> NDArray[np.bool_]:
    return np.maximum(abs(x), abs(y)) < 0.72


def _triangle(x: Array, y: Array) -> NDArray[np.bool_]:
    half_plane = -y
    for angle in (math.pi / 6, 5 * math.pi / 6):
        half_plane = np.maximum(half_plane, x * math.cos(angle) + y * math.sin(angle))
    return half_plane < 0.5


def _star(x: Array, y: Array) -> NDArray[np.bool_]:
    # Fold the plane onto one half of one of the five points; there the star is one half plane.
    sector = math.pi / 5
    folded = abs((np.arctan2(y, x) + sector) % (2 * sector) - sector)
    radius, inner = np.hypot(x, y), 0.45
    edge_x, edge_y = inner * math.cos(sector) - 1, inner * math.sin(sector)
    return edge_x * radius * np.sin(folded) - edge_y * (radius * np.cos(folded) - 1) > 0


def _cross(x: Array, y: Array) -> NDArray[np.bool_]:
    return (np.minimum(abs(x), abs(y)) < 0.28) & (np.maximum(abs(x), abs(y)) < 0.92)


def _ring(x: Array, y: Array) -> NDArray[np.bool_]:
    radius = np.hypot(x, y)
    return (radius > 0.5) & (radius < 0.92)


def _plain(u: Array, v: Array) -> NDArray[np.bool_]:
    return np.zeros_like(u, dtype=bool)


def _stripes(u: Array, v: Array) -> NDArray[np.bool_]:
    return u % 1 < 0.5


def _checker(u: Array, v: Array) -> NDArray[np.bool_]:
    return np.not_equal(u % 1 < 0.5, v % 1 < 0.5)


def _dots(u: Array, v: Array) -> NDArray[np.bool_]:
    dots: NDArray[np.bool_] = np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.32
    return dots


# Shapes live in the unit disk; textures have period 1 and are True for the second colour.
SHAPES: dict[str, Callable[[Array, Array], NDArray[np.bool_]]] = {
    "disk": _disk,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
TEXTURES: dict[str, Callable[[Array, Array], NDArray[np.bool_]]] = {
    "plain": _plain,
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
}
CATEGORIES: tuple[str, ...] = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)


@dataclass(frozen=True)
class SceneObject:
    """Object of a scene.

    Attributes:
        category: index into `CATEGORIES`.
        mask: visible pixels, H×W.
    """

    category: int
    mask: NDArray[np.bool_]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Bounds of the visible pixels as (x0, y0, x1, y1), the upper ends exclusive."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class Scene:
    """Picture with labelled objects.

    Attributes:
        image: H×W×3, red, green, blue.
        objects: visible objects, the farthest first.
    """

    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]


def draw_scene(
    seed: int | Sequence[int],
    size: int = 64,
    max_objects: int = 1,
    radius: tuple[float, float] = (0.26, 0.46),
    tilt: float = TILT,
) -> Scene:
    """Draw one scene.

    Args:
        seed: name of the scene; a sequence such as (data set, split, index) works too.
        size: height and width in pixels.
        max_objects: largest number of objects, which is drawn from 1 on; a single object stands near the centre.
        radius: smallest and largest object radius as a fraction of `size`.
        tilt: greatest angle of an object in radians.
    """
    rng = np.random.default_rng(seed)
    side = size * SUPERSAMPLING
    ys, xs = np.mgrid[0:side, 0:side].astype(np.float32) / side

    canvas = _background(rng, size).repeat(SUPERSAMPLING, 0).repeat(SUPERSAMPLING, 1)
    for _ in range(rng.integers(2, 6)):
        _paint(canvas, _bar(rng, xs, ys), rng.uniform(0.1, 0.7, 3), opacity=rng.uniform(0.2, 0.7))

    count = int(rng.integers(1, max_objects + 1))
    spread = 0.1 if max_objects == 1 else 0.4
    categories: list[int] = []
    masks: list[NDArray[np.bool_]] = []
    for _ in range(count):
        category = int(rng.integers(len(CATEGORIES)))
        mask = _paint_object(rng, canvas, xs, ys, category, rng.uniform(*radius), spread, tilt)
        for farther in masks:
            farther &= ~mask
        categories.append(category)
        masks.append(mask)
    for _ in range(rng.integers(0, 3)):
        bar = _bar(rng, xs, ys)
        _paint(canvas, bar, rng.random(3), opacity=1.0)
        for mask in masks:
            mask &= ~bar

    image = _develop(rng, canvas, xs, ys)
    visible = [_shrink(mask.astype(np.float32)) > 0.5 for mask in masks]  # a pixel has at most one owner
    objects = tuple(
        SceneObject(category, mask) for category, mask in zip(categories, visible, strict=True) if mask.any()
    )
    return Scene(image, objects)


def _background(rng: np.random.Generator, size: int) -> Array:
    """Draw coloured 1/f noise, which has the spectrum of natural pictures: size×size×3, 0 to 1."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]).astype(np.float32)
    frequency[0, 0] = 1.0
    noise = rng.standard_normal((3, size, size), dtype=np.float32)
    field = np.fft.irfft2(np.fft.rfft2(noise) / frequency ** rng.uniform(0.8, 1.3), s=(size, size))
    field -= field.mean((1, 2), keepdims=True)
    field /= field.std((1, 2), keepdims=True)
    shared = rng.uniform(0.3, 0.9)  # share of the variation that is common to the three colours: greyness
    field = shared * field[:1] + (1 - shared) * field
    level = rng.uniform(0.15, 0.45, (3, 1, 1)).astype(np.float32)
    return np.clip(level + rng.uniform(0.05, 0.15) * field, 0, 1).transpose(1, 2, 0).astype(np.float32)


def _bar(rng: np.random.Generator, xs: Array, ys: Array) -> NDArray[np.bool_]:
    """Draw a thin bar across part of the picture: clutter behind the objects, an occluder before them."""
    angle, x, y = rng.uniform(0, math.pi), rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9)
    along = (xs - x) * math.cos(angle) + (ys - y) * math.sin(angle)
    across = (ys - y) * math.cos(angle) - (xs - x) * math.sin(angle)
    return (abs(along) < rng.uniform(0.1, 0.4)) & (abs(across) < rng.uniform(0.01, 0.04))


def _paint(canvas: Array, where: NDArray[np.bool_], color: NDArray[np.float64], opacity: float) -> None:
    pixels, chosen = canvas.reshape(-1, 3), np.flatnonzero(where)
    before = pixels[chosen]
    pixels[chosen] = before + opacity * (color.astype(np.float32) - before)


def _paint_object(
    rng: np.random.Generator,
    canvas: Array,
    xs: Array,
    ys: Array,
    category: int,
    radius: float,
    spread: float,
    tilt: float,
) -> NDArray[np.bool_]:
    shape = list(SHAPES.values())[category // len(TEXTURES)]
    texture = list(TEXTURES.values())[category % len(TEXTURES)]
    x, y = 0.5 + rng.uniform(-spread, spread), 0.5 + rng.uniform(-spread, spread)
    angle, aspect = rng.uniform(-tilt, tilt), rng.uniform(0.8, 1.25)
    along = ((xs - x) * math.cos(angle) + (ys - y) * math.sin(angle)) / (radius * aspect**0.5)
    across = ((ys - y) * math.cos(angle) - (xs - x) * math.sin(angle)) / (radius / aspect**0.5)
    mask = shape(along, across)

    period, twist = rng.uniform(0.4, 0.75), rng.uniform(0, math.pi)
    u = (along * math.cos(twist) + across * math.sin(twist)) / period + rng.random()
    v = (across * math.cos(twist) - along * math.sin(twist)) / period + rng.random()
    # Objects are mostly brighter than what is behind them, and the second colour is a darker tint of the first.
    color = rng.uniform(0.45, 0.95, 3)
    _paint(canvas, mask, color, opacity=1.0)
    _paint(canvas, mask & texture(u, v), color * rng.uniform(0.3, 0.75), opacity=1.0)
    return mask


def _shrink(values: Array) -> Array:
    # In this order numpy adds up, too; its mean over axes that are not neighbours takes five times as long.
    steps = range(SUPERSAMPLING)
    parts = [values[row::SUPERSAMPLING, column::SUPERSAMPLING] for row in steps for column in steps]
    total: Array = np.add(parts[0], parts[1])
    for part in parts[2:]:
        total += part
    means: Array = np.divide(total, np.float32(len(parts)))
    return means


def _develop(rng: np.random.Generator, canvas: Array, xs: Array, ys: Array) -> NDArray[np.uint8]:
    """Add light from one side, a little blur and sensor noise."""
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.5)
    light = 1 + strength * ((xs - 0.5) * math.cos(angle) + (ys - 0.5) * math.sin(angle)) * 2
    picture = _shrink(np.clip(canvas * light[..., None], 0, 1))
    blurred = Image.fromarray((picture * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9)))
    grain = rng.uniform(2, 14) * rng.standard_normal(picture.shape, dtype=np.float32)
    noisy = np.asarray(blurred, np.float32) + grain
    return np.clip(noisy + 0.5, 0, 255).astype(np.uint8)
