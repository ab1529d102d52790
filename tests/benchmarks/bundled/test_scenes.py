"""Scenes are named by their seeds, and their labels, boxes and masks agree with each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.bundled.scenes import CATEGORIES, SHAPES, TEXTURES, draw_scene


def test_a_seed_names_a_scene() -> None:
    first, again, other = draw_scene((0, 7)), draw_scene((0, 7)), draw_scene((0, 8))
    assert np.array_equal(first.image, again.image)
    assert [item.category for item in first.objects] == [item.category for item in again.objects]
    assert not np.array_equal(first.image, other.image)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([32, 64, 96]), most=st.integers(1, 6))
def test_labels_boxes_and_masks_agree(seed: int, size: int, most: int) -> None:
    scene = draw_scene(seed, size=size, max_objects=most, radius=(0.1, 0.3))
    assert scene.image.shape == (size, size, 3)
    assert scene.image.dtype == np.uint8
    assert len(scene.objects) <= most
    covered = np.zeros((size, size), int)
    for item in scene.objects:
        assert 0 <= item.category < len(CATEGORIES)
        x0, y0, x1, y1 = item.box
        assert item.mask[y0:y1, x0:x1].sum() == item.mask.sum() > 0
        assert item.mask[y0].any()
        assert item.mask[y1 - 1].any()
        assert item.mask[:, x0].any()
        assert item.mask[:, x1 - 1].any()
        covered += item.mask
    assert covered.max(initial=0) <= 1, "what is hidden by a nearer object belongs to that one"


def test_an_object_stands_out_from_what_is_behind_it() -> None:
    difference = []
    for seed in range(40):
        scene = draw_scene(seed)
        mask = scene.objects[0].mask
        difference.append(scene.image[mask].mean() - scene.image[~mask].mean())
    assert np.mean(difference) > 10


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fit_their_radius_and_are_not_trifles(name: str) -> None:
    ys, xs = np.mgrid[-1.5:1.5:300j, -1.5:1.5:300j].astype(np.float32)
    inside = SHAPES[name](xs, ys)
    assert not inside[np.hypot(xs, ys) > 1.05].any()
    assert 0.15 < inside.mean() * 9 / np.pi < 1


@pytest.mark.parametrize("name", TEXTURES)
def test_textures_repeat(name: str) -> None:
    v, u = np.mgrid[0:2:100j, 0:2:100j].astype(np.float32)
    values = TEXTURES[name](u, v)
    assert np.array_equal(values, TEXTURES[name](u + 1, v + 1))
    assert values.any() != (name == "plain")
