"""Classifiers' checkpoints: timm's other layouts, other sizes, and what timm would pass over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from adfq import AdfqError
from benchmarks.cell import Cell
from benchmarks.tasks.classification.models import create_classifier

State = dict[str, Tensor]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}


def create(model: str, arguments: dict[str, Any], file: Path) -> Any:
    return create_classifier(
        Cell.create(
            task="classification",
            model=model,
            data="none",
            method="full_precision",
            model_arguments=tuple(sorted(arguments.items())),
            checkpoint=str(file),
        )
    )


def draw(model: str, arguments: dict[str, Any]) -> State:
    state = timm.create_model(model, **arguments).state_dict()
    return {name: torch.randn(tensor.shape) for name, tensor in state.items()}


def old_swin(state: State) -> State:
    """The Swin authors' names: merging ends a stage, and buffers are saved."""
    renamed = {name.replace("layers.1.downsample", "layers.0.downsample"): tensor for name, tensor in state.items()}
    renamed = {name.replace("head.fc.", "head."): tensor for name, tensor in renamed.items()}
    return {**renamed, "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)}


def dinov2(state: State) -> State:
    return {**state, "mask_token": torch.zeros(1, 8)}


def flat_patches(state: State) -> State:
    return {**state, "patch_embed.proj.weight": state["patch_embed.proj.weight"].flatten(1)}


@pytest.mark.parametrize(
    ("model", "arguments", "convert"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, old_swin),
        ("vit_tiny_patch16_224", VIT, dinov2),
        ("vit_tiny_patch16_224", VIT, flat_patches),
    ],
)
def test_timms_other_layouts(
    model: str,
    arguments: dict[str, Any],
    convert: Callable[[State], State],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = draw(model, arguments)
    torch.save({"model": {f"module.{name}": t for name, t in convert(state).items()}}, tmp_path / "x.pth")
    loaded = create(model, arguments, tmp_path / "x.pth").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    assert capsys.readouterr() == ("", "")


def test_a_swin_beside_its_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = draw("swin_tiny_patch4_window7_224", SWIN)
    more = {**state, **{f"ema_model.{name}": tensor + 1 for name, tensor in state.items()}}
    torch.save(more, tmp_path / "x.pth")
    loaded = create("swin_tiny_patch4_window7_224", SWIN, tmp_path / "x.pth").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    assert f"has no place for {len(state)} of the weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 48}, "1 weights are interpolated to the model's size (pos_embed from 1×17×8 to 1×37×8)"),
        ({"patch_size": 16}, "2 weights are interpolated to the model's size (pos_embed from 1×17×8 to 1×5×8)"),
        ({"img_size": (48, 16)}, "1 weights are interpolated to the model's size (pos_embed from 1×17×8 to 1×13×8)"),
    ],
)
def test_weights_of_another_size_are_interpolated_and_it_is_said(
    arguments: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(draw("vit_tiny_patch16_224", VIT), tmp_path / "x.pth")
    create("vit_tiny_patch16_224", {**VIT, **arguments}, tmp_path / "x.pth")
    assert capsys.readouterr().err == f"adfq: {tmp_path}/x.pth: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 5}, r"2 have other shapes \(head\.weight is 3×8 and should be 5×8\)"),
        ({"depth": 2}, r"\d+ weights are missing \(blocks\.1\.norm1\.weight for one\)"),
        ({"checkpoint_path": "x.pth"}, "a checkpoint is given as --checkpoint"),
        ({"depth": "deep"}, "cannot create vit_tiny_patch16_224"),
        ({"wings": 2}, "cannot create vit_tiny_patch16_224: .*wings"),
    ],
)
def test_what_does_not_fit(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(draw("vit_tiny_patch16_224", VIT), tmp_path / "x.pth")
    with pytest.raises(AdfqError, match=message) as caught:
        create("vit_tiny_patch16_224", {**VIT, **arguments}, tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


def test_arrays_of_another_layout(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", weight=np.zeros(3))
    with pytest.raises(AdfqError, match=r"checkpoint .*x\.npz does not fit vit_tiny_patch16_224: \S"):
        create("vit_tiny_patch16_224", VIT, tmp_path / "x.npz")
