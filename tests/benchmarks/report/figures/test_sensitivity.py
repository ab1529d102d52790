"""Errors of parts of a model, and magnitudes in its residual stream, are those that their definitions give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import adfq
from adfq import AdfqError
from adfq.bits import Bits
from adfq.registry import create_method
from benchmarks.report.figures.residuals import collect_residuals, plot_residuals
from benchmarks.report.figures.sensitivity import ACTIVATIONS, ALL, WEIGHTS, collect_sensitivity, plot_sensitivity

METHODS = {name: create_method(name, {}) for name in ("base_ptq", "repq_vit")}


def test_errors_of_parts(make_vit: Any, make_images: Any) -> None:
    model, calibration, images = make_vit(), make_images(4), make_images(3)
    state = copy.deepcopy(model.state_dict())
    frame = collect_sensitivity(model, METHODS, Bits(4, 4), calibration, images, batch_size=2)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    for name in METHODS:
        errors = frame[frame["method"] == name].set_index("part")["error"]
        quantized = adfq.quantize(model, method=name, weight_bits=4, activation_bits=4, calibration=calibration)
        with torch.no_grad():
            ours, reference = quantized(images), model(images)
        error = 100 * ((ours - reference).norm(dim=1) / reference.norm(dim=1)).mean()
        assert errors[ALL] == pytest.approx(error.item(), rel=1e-3)
        assert errors[WEIGHTS] > 0
        assert 0 < errors["fc2"] < errors[ACTIVATIONS] * 2
        assert {"qkv", "query", "key", "probs", "value", "proj", "fc1", "fc2", "head"} <= set(errors.index)
    figure = plot_sensitivity(frame)
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(METHODS)


def test_a_site_without_a_quantizer_is_no_part(make_vit: Any, make_images: Any) -> None:
    methods = {"full": create_method("full_precision", {})}
    frame = collect_sensitivity(make_vit(), methods, Bits(4, 4), make_images(2), make_images(2))
    assert list(frame["part"]) == [WEIGHTS, ACTIVATIONS, ALL]
    assert list(frame["error"]) == [0, 0, 0]


def test_a_massive_activation_is_found(make_vit: Any, make_images: Any) -> None:
    model, images = make_vit(), make_images(3)
    with torch.no_grad():
        model.cls_token[..., 5] = 500.0
        model.cls_token[..., 2] = -300.0
    frame = collect_residuals(model, images)
    first = frame.iloc[0]
    assert list(frame["layer"]) == ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.1.mlp.fc1"]
    assert (first["token"], first["channel"], first["images"]) == (0, 5, 100)
    assert first["largest"] == pytest.approx(500, abs=1)
    assert first["second"] == pytest.approx(300, abs=1)
    assert first["median"] < first["p99"] < 5
    plot_residuals(frame).draw_without_rendering()


def test_a_model_without_pre_norms_has_no_such_magnitudes(make_vit: Any, make_images: Any) -> None:
    model = make_vit()
    for block in model.blocks:
        block.norm1, block.norm2 = nn.Identity(), nn.Identity()
    with pytest.raises(AdfqError, match="no LayerNorm in front of attention or MLP"):
        collect_residuals(model, make_images(2))
