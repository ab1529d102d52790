"""The scripts that run exported models without torch: the same results as timm and SamPredictor, errors in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import adfq
from adfq import export_onnx

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SCRIPTS = Path(__file__).resolve().parent.parent / "examples" / "deploy"
Run = Callable[..., subprocess.CompletedProcess[str]]

#: Runs a script where neither torch nor anything of this project can be imported.
ISOLATED = """
import runpy, sys
for name in ("torch", "torchvision", "timm", "adfq", "benchmarks"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def start(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", ISOLATED, str(SCRIPTS / script), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return start


def draw_picture(file: Path, size: tuple[int, int], mode: str = "RGB", orientation: int = 1) -> Path:
    """Save smooth colours, which resizing does not turn into noise."""
    small = np.random.default_rng(1).integers(0, 256, (6, 7, 3), np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(file, quality=95, exif=exif)
    return file


def assert_one_line(found: subprocess.CompletedProcess[str], message: str) -> None:
    assert found.returncode == 1
    assert found.stdout == ""
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(("channels", "pictures"), [(3, [("RGB", 6), ("L", 1)]), (1, [("RGB", 1)])])
def test_classes_are_those_of_timm(
    channels: int,
    pictures: Sequence[tuple[str, int]],
    make_vit: Callable[..., nn.Module],
    run: Run,
    tmp_path: Path,
) -> None:
    from timm.data import create_transform, resolve_model_data_config

    from benchmarks.tasks.images import as_rgb

    model: Any = make_vit(depth=1, in_chans=channels)
    model.pretrained_cfg = {
        "input_size": (channels, 32, 32),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.4, 0.5, 0.6)[:channels],
        "std": (0.2, 0.3, 0.25)[:channels],
    }
    quantized: Any = adfq.quantize(model, "base_ptq", 8, 8, torch.randn(4, channels, 32, 32))
    export_onnx(quantized, tmp_path / "vit.onnx")
    for mode, orientation in pictures:
        picture = draw_picture(tmp_path / "picture.jpg", (97, 61), mode, orientation)
        found = run("classify.py", "vit.onnx", "picture.jpg")
        assert found.returncode == 0, found.stderr
        indices, probabilities = zip(*map(str.split, found.stdout.splitlines()), strict=True)

        with Image.open(picture) as image:
            pixels = as_rgb(image).convert("RGB" if channels == 3 else "L")
        transform: Any = create_transform(**resolve_model_data_config(quantized), is_training=False)
        with torch.no_grad():
            expected = quantized(transform(pixels)[None]).softmax(1)[0]
        assert int(indices[0]) == expected.argmax()
        values = [float(value) for value in probabilities]
        assert values == pytest.approx([float(expected[int(index)]) for index in indices], abs=0.02)
        assert values == sorted(values, reverse=True)

    (tmp_path / "words.jpg").write_text("no picture")
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(tmp_path / "deep.png")
    assert_one_line(run("classify.py", "vit.onnx", "words.jpg"), "cannot identify image file")
    assert_one_line(run("classify.py", "vit.onnx", "deep.png"), "more than 8 bits")


def test_mistakes_are_one_line(make_vit: Callable[..., nn.Module], run: Run, tmp_path: Path) -> None:
    quantized = adfq.quantize(make_vit(depth=1), "base_ptq", 8, 8, torch.randn(2, 3, 32, 32))
    export_onnx(quantized, tmp_path / "plain.onnx")  # its model tells no preprocessing
    cases: list[tuple[Sequence[str], str]] = [
        (("classify.py", "plain.onnx"), "usage: classify.py MODEL.onnx PICTURE"),
        (("classify.py", "no.onnx", "x.jpg"), "no.onnx"),
        (("classify.py", "plain.onnx", "x.jpg"), "plain.onnx is no classifier whose metadata"),
        (("segment.py", "plain.onnx"), "usage: segment.py ENCODER.onnx"),
        (("segment.py", "plain.onnx", "plain.onnx", "x.jpg", *"0123", "y.png"), "is no image_encoder of a whole"),
    ]
    for arguments, message in cases:
        assert_one_line(run(*arguments), message)


def test_masks_are_those_of_sam_predictor(
    randomize: Callable[[nn.Module], nn.Module], run: Run, tmp_path: Path
) -> None:
    pytest.importorskip("segment_anything")
    from segment_anything import SamPredictor
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    from benchmarks.tasks.images import read_image

    norm = partial(nn.LayerNorm, eps=1e-6)
    encoder = ImageEncoderViT(64, 8, embed_dim=24, depth=1, num_heads=3, out_chans=16, norm_layer=norm)
    transformer = TwoWayTransformer(depth=1, embedding_dim=16, num_heads=2, mlp_dim=32)
    decoder = MaskDecoder(transformer_dim=16, transformer=transformer, iou_head_hidden_dim=16)
    sam = randomize(Sam(encoder, PromptEncoder(16, (8, 8), (64, 64), mask_in_chans=8), decoder))
    model: Any = adfq.quantize(sam, "base_ptq", 8, 8, torch.randn(4, 3, 64, 64))
    export_onnx(model, tmp_path / "sam.onnx")
    picture = draw_picture(tmp_path / "picture.jpg", (150, 101), orientation=6)  # upright: 101×150
    box = (20, 30, 80, 130)
    command = ("segment.py", "sam.onnx", "sam_decoder.onnx", picture)
    found = run(*command, *box, "mask.png")
    assert found.returncode == 0, found.stderr

    predictor = SamPredictor(model)
    predictor.set_image(read_image(picture))
    masks, iou, _ = predictor.predict(box=np.array(box), multimask_output=False)
    with Image.open(tmp_path / "mask.png") as image:
        mask = np.asarray(image)
    assert set(np.unique(mask)) == {0, 255}
    assert mask.shape == masks[0].shape == (150, 101)
    assert ((mask > 0) & masks[0]).sum() / ((mask > 0) | masks[0]).sum() > 0.99
    assert float(found.stdout.removeprefix("predicted IoU ")) == pytest.approx(float(iou[0]), abs=0.01)

    for corners in ("80 30 20 130", "20 30 102 130", "nan 30 80 130"):
        assert_one_line(run(*command, *corners.split(), "mask.png"), "0 <= x0 < x1 <= 101 and 0 <= y0 < y1 <= 150")
    assert_one_line(run(*command, "a", "2", "3", "4", "mask.png"), "could not convert string to float")
