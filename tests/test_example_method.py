"""The example of a method of one's own, installed as others would install it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq.quantizers import UniformQuantizer
from benchmarks.cli.main import main
from benchmarks.tasks import coco

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "pow2_channels"
NAME, LABEL = "pow2_channels", "Pow2-Channels"
SMALL = ["--bits", "W4A4", "--seeds", "0", "--calibration-size", "2", "--jobs", "0"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that the package has been installed in."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "target"))
    shutil.copytree(EXAMPLE, source, dirs_exist_ok=True)  # building leaves files beside the source
    command = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", *command, str(source)], check=True, capture_output=True)
    return target


@pytest.fixture
def at_hand(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is one of this process."""
    monkeypatch.syspath_prepend(str(installed))


def test_it_takes_at_most_sixty_lines_of_python() -> None:
    assert sum(len(file.read_text().splitlines()) for file in EXAMPLE.rglob("*.py")) <= 60


def test_it_is_listed_once_it_is_installed(installed: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(installed), str(ROOT)])
    command = [sys.executable, "-m", "benchmarks.cli", "list", "methods"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert NAME in done.stdout.split()


@pytest.mark.usefixtures("at_hand")
@pytest.mark.parametrize("choice", [["--methods", "base_ptq", NAME], ["--methods", "base_ptq", "--also", NAME]])
def test_it_stands_in_table_1(choice: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["table", "1", *choice, "--models", "bundled_vit", *SMALL, "--limit", "20", "--store", str(tmp_path)]
    assert main(command) == 0
    assert _methods(capsys.readouterr().out) == ["Full precision", "Base PTQ", LABEL]


@pytest.mark.usefixtures("at_hand")
@pytest.mark.parametrize(
    ("table", "library"), [("2", "mmdet"), ("3", "segment_anything"), ("4", "timm"), ("5", "timm")]
)
def test_it_stands_in_every_other_table(
    table: str, library: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    monkeypatch.setattr(coco, "COUNTS", {"train2017": 2, "val2017": 2})
    models = {"2": ["--models", "bundled_mask_rcnn"]}.get(table, [])
    first = {"4": "none"}.get(table, "base_ptq")
    command = ["table", table, "--methods", first, "--also", NAME, *models, *SMALL, "--limit", "2"]
    assert main([*command, "--store", str(tmp_path)]) == 0
    methods = _methods(capsys.readouterr().out)
    assert methods[0] == "Full precision"
    assert methods[-1] == LABEL
    assert len(methods) == 3


def _methods(table: str) -> list[str]:
    """The first column of a Markdown table."""
    return [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]


@pytest.mark.usefixtures("at_hand")
def test_scales_are_powers_of_two_apart(make_vit: Callable[..., nn.Module], make_images: Callable[..., Tensor]) -> None:
    quantized = adfq.quantize(make_vit(), NAME, 4, 4, make_images(8), shifts=2)
    scales = [layer.input_quantizer.scale for layer in _layers(quantized, "qkv", "fc1")]
    assert len(scales) == 4
    for scale in scales:
        steps = (scale.amax() / scale).log2()
        assert set(steps.flatten().tolist()) <= {0.0, 1.0, 2.0}
        assert len(steps.unique()) > 1
    assert all(layer.input_quantizer.scale.numel() == 1 for layer in _layers(quantized, "proj", "fc2"))


@pytest.mark.usefixtures("at_hand")
def test_no_range_is_narrower_than_was_found(make_images: Callable[..., Tensor]) -> None:
    from pow2_channels import PowerOfTwoChannelQuantizer  # type: ignore[import-not-found]

    x = make_images().flatten(2).transpose(1, 2) * torch.tensor([0.5, 1.0, 7.0])
    found = UniformQuantizer(4, "channel", "percentile").calibrate(x).scale
    coarse = PowerOfTwoChannelQuantizer(4, 3).calibrate(x)
    assert (coarse.scale >= found * (1 - 1e-6)).all()
    assert (coarse.scale < found * 2).all()
    assert (PowerOfTwoChannelQuantizer(4, 0).calibrate(x).scale == found.amax()).all()
    assert (coarse(x) - x).square().mean() < 0.02 * x.square().mean()


def _layers(model: nn.Module, *roles: str) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "role", None) in roles]
