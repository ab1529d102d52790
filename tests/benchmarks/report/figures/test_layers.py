"""Figures of layers and modules: the numbers are right, and all that is written can be read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import adfq
from adfq import AdfqError
from adfq.bits import Bits
from adfq.registry import create_method
from benchmarks.report.figures.distributions import (
    PERCENTILES,
    collect_distributions,
    draw_distributions,
    plot_distributions,
)
from benchmarks.report.figures.outliers import collect_outliers, draw_outliers, keeps_outliers, plot_outliers
from benchmarks.report.figures.reconstruction import (
    collect_reconstruction,
    draw_reconstruction,
    plot_reconstruction,
)
from benchmarks.report.figures.style import POINTS, name_sites


def assert_readable(figure: Figure) -> None:
    """All text is large enough and within the canvas; names of rows do not touch."""
    figure.draw_without_rendering()
    whole = figure.get_tightbbox()
    assert whole.x0 >= 0
    assert whole.y0 >= 0
    assert whole.x1 <= figure.get_figwidth()
    assert whole.y1 <= figure.get_figheight()
    for axes in figure.axes:
        names = axes.get_yticklabels()
        assert min(text.get_fontsize() for text in (*names, *axes.get_xticklabels(), axes.xaxis.label)) >= POINTS
        boxes = sorted((name.get_window_extent() for name in names), key=lambda box: box.y0)
        assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))


def frame_of(blocks: int, scale: float = 1.0) -> pd.DataFrame:
    """Distributions of so many blocks."""
    rows = []
    for block in range(blocks):
        for role, layer in (("qkv", "attn.qkv"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")):
            ends = np.array([-4, -2, -0.5, 0, 0.5, 2, 4]) * [scale, 1, 1, 1, 1, 1, scale]
            kind = "post-GELU" if role == "fc2" else "post-LayerNorm"
            name = f"image_encoder.layers.2.blocks.{block}.{layer}"
            rows.append({"layer": name, "role": role, "kind": kind, **dict(zip(PERCENTILES, ends, strict=True))})
    return pd.DataFrame(rows)


def test_percentiles_are_those_of_what_layers_take_in(make_vit: Any, make_images: Any) -> None:
    model, images = make_vit(), make_images(3)
    state = copy.deepcopy(model.state_dict())
    frame = collect_distributions(model, images)
    seen = {}
    layers = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    with torch.no_grad():
        model(images)
    assert list(frame["layer"]) == layers
    assert list(frame["kind"]) == ["post-LayerNorm", "post-LayerNorm", "post-GELU"] * 2
    for row in frame.to_dict("records"):
        wanted = np.percentile(seen[row["layer"]].numpy(), list(PERCENTILES.values()))
        assert np.allclose([row[name] for name in PERCENTILES], wanted, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_swins_patch_merging_is_behind_a_norm_and_in_the_order_of_the_network(make_swin: Any, make_images: Any) -> None:
    roles = list(collect_distributions(make_swin(), make_images(2))["role"])
    assert roles == ["qkv", "fc1", "fc2"] * 2 + ["reduction"] + ["qkv", "fc1", "fc2"] * 2


def test_activations_that_are_not_finite_are_named(make_vit: Any, make_images: Any) -> None:
    with pytest.raises(AdfqError, match=r"blocks\.0\.attn\.qkv: the activations are not finite"):
        collect_distributions(make_vit(), make_images(1) * torch.nan)


@pytest.mark.parametrize("blocks", [1, 12, 32])
@pytest.mark.parametrize(("scale", "axis"), [(1, "linear"), (100, "symlog")])
def test_distributions_of_few_and_many_layers(blocks: int, scale: float, axis: str) -> None:
    frame = frame_of(blocks, scale)
    figure = plot_distributions(frame)
    assert_readable(figure)
    assert [axes.get_xscale() for axes in figure.axes] == [axis] * 2
    assert [len(axes.get_yticks()) for axes in figure.axes] == [2 * blocks, blocks]
    boxes = figure.axes[0].patches
    assert {box.get_x() for box in boxes} == {-0.5}  # type: ignore[attr-defined]
    if axis == "symlog":  # the box is wide enough to be seen
        start, end = figure.axes[0].transData.transform([(-0.5, 0), (0.5, 0)])[:, 0]
        assert end - start > 0.1 * figure.axes[0].bbox.width


def test_outliers_are_counted_layer_by_layer(
    make_vit: Any, make_images: Any, quick: Mapping[str, dict[str, Any]]
) -> None:
    images = make_images(4)
    options = quick["adfq_vit"] | {"qkv_threshold": 1.0, "fc1_threshold": 1.5}
    model = adfq.quantize(make_vit(), "adfq_vit", 4, 4, images, **options)
    frame = collect_outliers(model, images)
    in_parts = collect_outliers(model, images, lambda model, images: [model(part) for part in images.split(1)])
    seen = {}
    for name in frame["layer"]:
        quantizer = model.get_submodule(f"{name}.input_quantizer")
        quantizer.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    with torch.no_grad():
        model(images)
    assert list(frame["role"]) == ["qkv", "fc1"] * 2
    assert list(frame["threshold"]) == [1.0, 1.5] * 2
    for row in frame.to_dict("records"):
        values = seen[row["layer"]].numpy()
        assert row["percent"] == pytest.approx(100 * (np.abs(values) > row["threshold"]).mean())
    assert (frame["percent"] > 0).all()
    assert list(in_parts["values"]) == list(frame["values"])
    assert np.allclose(in_parts["kept"], frame["kept"], rtol=0.02)
    figure = plot_outliers(frame)
    assert_readable(figure)
    bars = sorted(figure.axes[0].patches, key=lambda bar: bar.get_y())  # type: ignore[attr-defined]
    assert np.allclose([bar.get_width() for bar in bars], frame["percent"])  # type: ignore[attr-defined]
    assert len({bar.get_hatch() for bar in bars}) == 2  # told apart without colour


def test_no_outliers_are_zeros_and_words(tmp_path: Path) -> None:
    names = [f"blocks.{block}.attn.qkv" for block in range(3)]
    frame = pd.DataFrame({"layer": names, "role": "qkv", "threshold": 5.0, "values": 9, "kept": 0, "percent": 0.0})
    figure = plot_outliers(frame)
    assert_readable(figure)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0"] * 3
    assert axes.get_title() == "No value is beyond the thresholds"
    draw_outliers(frame, tmp_path / "zeros.png")
    with Image.open(tmp_path / "zeros.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("method", "arguments", "keeps"),
    [
        ("adfq_vit", {}, True),
        ("base_ptq", {}, False),
        ("full_precision", {}, False),
        ("adfq_vit", {"ppoq": False}, False),
    ],
)
def test_a_recipe_says_whether_outliers_are_kept(
    method: str, arguments: dict[str, Any], keeps: bool, make_vit: Any
) -> None:
    model = make_vit()
    names = [name for name, _ in model.named_modules()]
    assert keeps_outliers(model, create_method(method, arguments), Bits(4, 4)) == keeps
    assert [name for name, _ in model.named_modules()] == names


def test_what_was_not_kept_has_a_mark_of_its_own() -> None:
    name = "mask_decoder.transformer.layers.{}.cross_attn_token_to_image"
    modules = {name.format(index): {"before": 1.0, "after": 0.1, "kept": True} for index in range(30)}
    kept = collect_reconstruction({"modules": modules})
    worse = collect_reconstruction({"modules": modules | {name.format(3): {"before": 1, "after": 2, "kept": False}}})
    labels = []
    for frame in (kept, worse):
        figure = plot_reconstruction(frame)
        assert_readable(figure)
        (axes,) = figure.axes
        assert axes.get_xscale() == "log"
        labels.append([marks.get_label() for marks in axes.collections if not str(marks.get_label()).startswith("_")])
    assert labels[0] == ["calibrated", "optimized"]
    assert labels[1] == [*labels[0], "optimized, no better: stays as calibrated"]
    *_, after, marks = axes.collections
    assert np.asarray(marks.get_offsets()).tolist() == [[2.0, 3.0]]
    assert len(after.get_offsets()) == 29
    for report in ({}, {"modules": {}}):
        with pytest.raises(AdfqError, match="no module was optimized"):
            collect_reconstruction(report)


def test_files_are_what_their_names_say(tmp_path: Path) -> None:
    modules = collect_reconstruction({"modules": {"head": {"before": 1.0, "after": 0.1, "kept": True}}})
    for index, suffix in enumerate((".svg", ".png")):
        files = [tmp_path / f"{name}{suffix}" for name in ("distributions", "reconstruction")]
        draw_distributions(frame_of(1), files[0])
        draw_reconstruction(modules, files[1])
        for file in files:
            if index == 0:
                assert ElementTree.parse(file).getroot().tag.endswith("}svg")
            else:
                with Image.open(file) as image:
                    assert image.format == "PNG"
                    image.load()


def test_names_of_sites_are_short_but_never_the_same() -> None:
    layers = ["blocks.0.attn.qkv", "backbone.stages.2.blocks.0.ffn.layers.0.0", "head", "blocks.1.a", "blocks.1.b"]
    short = name_sites(layers, ["qkv", "fc1", "head", "fc2", "fc2"])
    assert short == ["blocks.0 qkv", "backbone.stages.2.blocks.0 fc1", "head", "blocks.1.a", "blocks.1.b"]
