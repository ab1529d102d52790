"""Segment Anything models by name, with checkpoints in the official layouts."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adfq import AdfqError
from benchmarks.bundled.sams import CHECKPOINT

pytest.importorskip("segment_anything")

from benchmarks.tasks.segmentation.models import create_mobile_sam, load_sam, sam_names

State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    return load_file(CHECKPOINT)


def test_there_are_those_of_the_paper_and_small_ones() -> None:
    assert sam_names() == ["bundled_sam", "mobile_sam", "vit_b", "vit_l", "vit_h"]


def test_the_bundled_model_has_its_weights(state: State) -> None:
    sam = load_sam("bundled_sam")
    assert not sam.training
    assert sam.state_dict().keys() == state.keys()
    for name, tensor in sam.state_dict().items():
        assert torch.equal(tensor, state[name].float()), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_in_the_official_layout(suffix: str, state: State, tmp_path: Path) -> None:
    changed = {name: tensor + 1 for name, tensor in state.items()}
    file = tmp_path / f"sam{suffix}"
    save_file(changed, file) if suffix == ".safetensors" else torch.save(changed, file)
    for name, tensor in load_sam("bundled_sam", str(file)).state_dict().items():
        assert torch.equal(tensor, changed[name].float()), name


def test_without_a_checkpoint_weights_are_random(capsys: pytest.CaptureFixture[str]) -> None:
    load_sam("mobile_sam")
    assert "mobile_sam has random weights (there is no checkpoint)" in capsys.readouterr().err


def _cut(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("mask_decoder.iou_")}


def _widen(state: State) -> State:
    return {
        name: torch.cat([tensor, tensor]) if "blocks.0.mlp.lin1" in name else tensor for name, tensor in state.items()
    }


def _spoil(state: State) -> State:
    return {**state, "image_encoder.pos_embed": torch.full_like(state["image_encoder.pos_embed"], torch.nan)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_cut, r"7 weights are missing \(mask_decoder\.iou_token\.weight for one\)"),
        (_widen, r"2 have other shapes \(image_encoder\.blocks\.0\.mlp\.lin1\.weight is 256×64 and should be 128×64\)"),
        (_spoil, r"image_encoder\.pos_embed is not finite"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    change: Callable[[State], State], message: str, state: State, tmp_path: Path
) -> None:
    file = str(tmp_path / "sam.pth")
    torch.save(change(state), file)
    with pytest.raises(AdfqError, match=rf"checkpoint .*sam\.pth does not fit bundled_sam: {message}"):
        load_sam("bundled_sam", file)


def test_a_checkpoint_of_another_sam(tmp_path: Path) -> None:
    with pytest.raises(AdfqError, match=r"does not fit mobile_sam: \d+ weights are missing .* \d+ have other shapes"):
        load_sam("mobile_sam", str(CHECKPOINT))
    file = str(tmp_path / "mobile.pth")
    torch.save(create_mobile_sam().state_dict(), file)
    with pytest.raises(AdfqError, match=r"does not fit vit_b: \d+ weights are missing"):
        load_sam("vit_b", file)


def test_a_training_checkpoint_with_more_weights(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {**state, "mask_decoder.hq_token.weight": torch.zeros(1, 64)}
    file = str(tmp_path / "sam.pth")
    torch.save({"model": {f"module.{name}": tensor for name, tensor in more.items()}, "optimizer": {}}, file)
    for name, tensor in load_sam("bundled_sam", file).state_dict().items():
        assert torch.equal(tensor, state[name].float()), name
    expected = (
        f"bundled_sam has no place for 1 of the weights in {file} (mask_decoder.hq_token.weight for one); left out"
    )
    assert capsys.readouterr().err == f"adfq: {expected}\n"


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "sam.pth")
    torch.save(_Code(), file)
    with pytest.raises(AdfqError, match="is not a file of weights alone, and code in it is never run"):
        load_sam("bundled_sam", file)
    assert "run" not in capsys.readouterr().out.split()


def test_missing_and_damaged_files(state: State, tmp_path: Path) -> None:
    with pytest.raises(AdfqError, match=r"there is no checkpoint no\.pth"):
        load_sam("bundled_sam", "no.pth")
    for suffix in (".pth", ".safetensors"):
        file = tmp_path / f"sam{suffix}"
        save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
        file.write_bytes(file.read_bytes()[:100_000])
        with pytest.raises(AdfqError, match=rf"cannot read checkpoint .*\{suffix}"):
            load_sam("bundled_sam", str(file))


def test_an_unknown_model() -> None:
    with pytest.raises(AdfqError, match="unknown model 'vit_x'; close to it are vit_"):
        load_sam("vit_x")


def test_without_segment_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("segment_anything"):
            raise ImportError(f"No module named {name!r}")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for name in [name for name in sys.modules if name.startswith("segment_anything")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(AdfqError, match=r"pip install 'adfq\[segmentation\]'"):
        load_sam("vit_b")
