"""Sizes of images and preprocessing are checked against the model before images are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import adfq
from adfq import AdfqError
from benchmarks.cell import Cell
from benchmarks.cli.main import main
from benchmarks.tasks import load_quantized
from benchmarks.tasks.classification.preprocessing import resolve_preprocessing

NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 24}


def resolve(arguments: dict[str, Any], **preprocessing: Any) -> dict[str, Any]:
    arguments = {**TINY, **arguments}
    cell = Cell.create(
        task="classification",
        model=NAME,
        data="none",
        method="full_precision",
        model_arguments=tuple(sorted(arguments.items())),
        preprocessing=tuple(sorted(preprocessing.items())),
    )
    return resolve_preprocessing(cell, timm.create_model(NAME, **arguments))


@pytest.mark.parametrize(
    ("arguments", "preprocessing", "size"),
    [
        ({}, {}, (3, 32, 32)),
        ({"img_size": (48, 32)}, {}, (3, 48, 32)),
        ({"img_size": [16, 64]}, {}, (3, 16, 64)),
        ({"img_size": (48, 32), "in_chans": 1}, {"mean": (0.5,), "std": (0.5,)}, (1, 48, 32)),
        ({"dynamic_img_size": True}, {"input_size": (3, 64, 40)}, (3, 64, 40)),
    ],
)
def test_the_size_is_the_models(
    arguments: dict[str, Any], preprocessing: dict[str, Any], size: tuple[int, ...]
) -> None:
    assert resolve(arguments, **preprocessing)["input_size"] == size


@pytest.mark.parametrize(
    ("arguments", "preprocessing", "message"),
    [
        ({}, {"input_size": (3, 64, 64)}, "take images of 3×64×64: Input height (64) doesn't match model (32)."),
        ({}, {"input_size": (3, 32, 64)}, "take images of 3×32×64: Input width (64) doesn't match model (32)."),
        ({}, {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}, "does not take images of 1×32×32: "),
        (
            {"dynamic_img_size": True},
            {"input_size": (3, 33, 32)},
            "take images of 3×33×32: Input height (33) should be",
        ),
        ({}, {"input_size": (3, 0, 32)}, "whole numbers from 1; it is (3, 0, 32)"),
        ({}, {"input_size": (32, 32)}, "input_size must be channels, height and width"),
        ({}, {"mean": (0.5, 0.5)}, "mean and std need one value, or one for each input channel"),
        ({"img_size": (48, 32)}, {"std": ()}, "mean and std need one value, or one for each input channel"),
        ({}, {"std": (0.5, 0.0, 0.5)}, "std must be a list of finite numbers above 0; it is (0.5, 0.0, 0.5)"),
        ({}, {"std": (0.5, True, 0.5)}, "std must be a list of finite numbers above 0; it is (0.5, True, 0.5)"),
        ({}, {"mean": (float("nan"),)}, "preprocessing: mean must be a list of finite numbers; it is (nan,)"),
        ({}, {"mean": (10**400,)}, "preprocessing: mean must be a list of finite numbers; it is (1000"),
        ({}, {"mean": "abc"}, "preprocessing: mean must be a list of finite numbers; it is 'abc'"),
        ({}, {"mean": 0.5}, "preprocessing: mean must be a list of finite numbers; it is 0.5"),
        ({}, {"crop_pct": True}, "above 0 and at most 1; it is True"),
        ({}, {"crop_pct": "0.9"}, "above 0 and at most 1; it is '0.9'"),
        ({}, {"crop_pct": 1e-7}, "crop_pct 1e-07 resizes images to 320000000 pixels before the crop; at most 10000"),
        ({}, {"crop_mode": "foo"}, "preprocessing: crop_mode must be one of center, squash, border; it is 'foo'"),
        ({}, {"interpolation": "random"}, "box, hamming, lanczos; it is 'random'"),
        ({}, {"crop_pc": 0.3}, "preprocessing has no entry 'crop_pc'; there are input_size, mean, std, crop_pct"),
        ({"features_only": True, "depth": 3}, {}, "is no classifier: its output is a list, and not one logit a class"),
        ({}, {"crop_pct": 0.0}, "above 0 and at most 1; it is 0.0"),
        ({}, {"crop_pct": 1.5}, "above 0 and at most 1; it is 1.5"),
        ({"global_pool": ""}, {}, "is no classifier: its output for an image is 17×24"),
    ],
)
def test_what_the_model_does_not_take(arguments: dict[str, Any], preprocessing: dict[str, Any], message: str) -> None:
    with pytest.raises(AdfqError) as caught:
        resolve(arguments, **preprocessing)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_says_so_before_it_looks_for_images(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"{key}={value}" for key, value in TINY.items()]
    command = ["run", "classification", "--model", NAME, "--model-arg", *arguments, "--data", "folder:/nowhere"]
    assert main([*command, "--method", "full_precision", "--input-size", "3", "64", "64"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert (
        said[-1] == f"adfq: error: {NAME} does not take images of 3×64×64: Input height (64) doesn't match model (32)."
    )


def test_a_model_saved_without_notes_keeps_its_preprocessing(tmp_path: Path) -> None:
    model: Any = timm.create_model(NAME, **TINY)
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "mean": (0.1, 0.2, 0.3),
        "crop_pct": 0.75,
        "interpolation": "nearest",
    }
    adfq.save(adfq.quantize(model, "base_ptq", calibration=torch.randn(2, 3, 32, 32)), tmp_path / "q")
    _, subject = load_quantized(str(tmp_path / "q"), task="classification", data="bundled", batch_size=2)
    kept = {name: subject.preprocessing[name] for name in ("mean", "crop_pct", "interpolation", "input_size")}
    assert kept == {
        "mean": (0.1, 0.2, 0.3),
        "crop_pct": 0.75,
        "interpolation": "nearest",
        "input_size": (3, 32, 32),
    }
