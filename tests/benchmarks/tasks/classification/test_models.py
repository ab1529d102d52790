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


def arrays_of(state: State, heads: int = 2, stacked: bool = False, prefix: str = "") -> dict[str, np.ndarray]:
    """The ViT authors' layout of a ViT: an array for each block, or as in Big Vision one of all blocks."""
    dense, norm, attention = ("0", "1", "0") if stacked else ("3", "2", "1")
    w = {key: value.numpy() for key, value in state.items()}
    width = len(w["norm.weight"])
    where = "pos_embedding" if stacked else "Transformer/posembed_input/pos_embedding"
    arrays = {
        "cls": w["cls_token"],
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["patch_embed.proj.bias"],
        where: w["pos_embed"],
        "Transformer/encoder_norm/scale": w["norm.weight"],
        "Transformer/encoder_norm/bias": w["norm.bias"],
        "head/kernel": w["head.weight"].T,
        "head/bias": w["head.bias"],
    }
    blocks = []
    for index in range(sum(key.endswith("norm1.weight") for key in w)):
        b = {
            key.removeprefix(f"blocks.{index}."): value
            for key, value in w.items()
            if key.startswith(f"blocks.{index}.")
        }
        block = {"LayerNorm_0/scale": b["norm1.weight"], "LayerNorm_0/bias": b["norm1.bias"]}
        block |= {f"LayerNorm_{norm}/scale": b["norm2.weight"], f"LayerNorm_{norm}/bias": b["norm2.bias"]}
        for name, weight, bias in zip(
            ("query", "key", "value"), np.split(b["attn.qkv.weight"], 3), np.split(b["attn.qkv.bias"], 3), strict=True
        ):
            block[f"MultiHeadDotProductAttention_{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            block[f"MultiHeadDotProductAttention_{attention}/{name}/bias"] = bias.reshape(heads, -1)
        out = f"MultiHeadDotProductAttention_{attention}/out"
        block[f"{out}/kernel"] = b["attn.proj.weight"].T.reshape(heads, -1, width)
        block[f"{out}/bias"] = b["attn.proj.bias"]
        for layer in (0, 1):
            block[f"MlpBlock_{dense}/Dense_{layer}/kernel"] = b[f"mlp.fc{layer + 1}.weight"].T
            block[f"MlpBlock_{dense}/Dense_{layer}/bias"] = b[f"mlp.fc{layer + 1}.bias"]
        blocks.append(block)
    for key in blocks[0]:
        if stacked:
            arrays[f"Transformer/encoderblock/{key}"] = np.stack([block[key] for block in blocks])
        else:
            arrays |= {f"Transformer/encoderblock_{index}/{key}": block[key] for index, block in enumerate(blocks)}
    return {f"{prefix}{key}": array for key, array in arrays.items()}


@pytest.mark.parametrize(("stacked", "prefix"), [(False, ""), (False, "opt/target/"), (True, ""), (True, "params/")])
def test_arrays_of_the_authors(stacked: bool, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, file = draw("vit_tiny_patch16_224", {**VIT, "depth": 2}), tmp_path / "x.npz"
    np.savez(file, **arrays_of(state, stacked=stacked, prefix=prefix))
    loaded = create("vit_tiny_patch16_224", {**VIT, "depth": 2}, file).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    assert capsys.readouterr() == ("", "")
    # A deeper encoder's other blocks are left out, and a file of another size is interpolated: each is said.
    loaded = create("vit_tiny_patch16_224", {**VIT, "img_size": 48}, file).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items() if name != "pos_embed")
    left = f"{prefix}Transformer/encoderblock{'' if stacked else '_1'}/LayerNorm_0/scale"
    assert capsys.readouterr().err.splitlines() == [
        f"adfq: vit_tiny_patch16_224 has no place for 16 of the weights in {file} ({left} for one); left out",
        f"adfq: {file}: weights are interpolated to the model's size",
    ]


BLOCK = "Transformer/encoderblock_0"


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (
            {},
            {"num_classes": 5},
            "2 weights are missing (head.weight for one), 1 are not the model's (head/kernel for one)",
        ),
        ({"head/kernel": None, "head/bias": None}, {}, "2 weights are missing (head.weight for one)"),
        ({}, {"init_values": 0.1}, "2 weights are missing (blocks.0.ls1.gamma for one)"),
        ({}, {"depth": 2}, "'Transformer/encoderblock_1/LayerNorm_0/scale is not a file in the archive'"),
        ({}, {"num_heads": 4}, f"{BLOCK}/MultiHeadDotProductAttention_1/query/kernel has 2 heads and should have 4"),
        (
            {"Transformer/encoder_norm/scale": np.ones(1, np.float32)},
            {},
            "1 have other shapes (norm.weight is 1 and should be 8)",
        ),
        (
            {f"{BLOCK}/MlpBlock_3/Dense_0/kernel": np.ones((8, 32), np.int8)},
            {},
            f"{BLOCK}/MlpBlock_3/Dense_0/kernel is of int8, whose values need a scale",
        ),
        ({"cls": np.full((1, 1, 8), np.nan, np.float32)}, {}, "cls_token is not finite"),
    ],
)
def test_arrays_that_do_not_fit(
    changes: dict[str, Any], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arrays = {**arrays_of(draw("vit_tiny_patch16_224", VIT)), **changes}
    np.savez(tmp_path / "x.npz", **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(AdfqError) as caught:
        create("vit_tiny_patch16_224", {**VIT, **arguments}, tmp_path / "x.npz")
    assert str(caught.value) == f"checkpoint {tmp_path}/x.npz does not fit vit_tiny_patch16_224: {message}"


def test_a_part_of_a_model_is_no_classifier(tmp_path: Path) -> None:
    torch.save(draw("vit_tiny_patch16_224", VIT), tmp_path / "x.pth")
    message = "^cannot create vit_tiny_patch16_224: with these arguments it is a FeatureGetterNet, and no classifier$"
    with pytest.raises(AdfqError, match=message):
        create("vit_tiny_patch16_224", {**VIT, "depth": 3, "features_only": True}, tmp_path / "x.pth")
