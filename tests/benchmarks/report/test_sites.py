"""A model's sites are told in words, and counted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from io import StringIO

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from adfq import quantize
from adfq.adapters import adapt
from adfq.quantizers import (
    LogQuantizer,
    PerPatchOutlierQuantizer,
    Quantizer,
    RunTimePatchOutlierQuantizer,
    ShiftLogQuantizer,
    TwinGeluQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
)
from benchmarks.report.sites import render_sites, summarize_sites, tabulate_sites

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]


class Doubling(Quantizer):
    """Another package's."""

    def _find_range(self, x: Tensor) -> None:
        self.scale = torch.ones(())

    def _quantize(self, x: Tensor) -> Tensor:
        return 2 * x


PHRASES = {
    "uniform, 4 bits, per tensor": UniformQuantizer(4),
    "uniform, 3 bits, per row": UniformQuantizer(3, "row", "percentile"),
    "logarithmic, 4 bits, base 2": LogQuantizer(4, 2.0),
    "dynamically shifted logarithmic, 4 bits, base 1.414": ShiftLogQuantizer(4),
    "statically shifted logarithmic, 4 bits, base 1.414": ShiftLogQuantizer(4, shift="static"),
    "per-patch outlier, 6 bits, threshold 5": PerPatchOutlierQuantizer(6, 5.0),
    "per-patch outlier, 4 bits, threshold 2.5 (ranges at run time)": RunTimePatchOutlierQuantizer(4, 2.5),
    "twin uniform for softmax, 4 bits": TwinSoftmaxQuantizer(4),
    "twin uniform for softmax, 4 bits, sum of both grids": TwinSoftmaxQuantizer(4, released=True),
    "twin uniform for GELU, 8 bits": TwinGeluQuantizer(8),
    "Doubling, 2 bits": Doubling(2),
}


@pytest.mark.parametrize("phrase", PHRASES)
def test_quantizers_in_words(phrase: str) -> None:
    quantizer = PHRASES[phrase]
    assert quantizer.describe() == phrase
    assert quantizer.calibrate(torch.rand(2, 3, 4)).describe() == phrase


def test_rows_that_share_scales() -> None:
    quantizer = UniformQuantizer(4, "row").calibrate(torch.rand(6, 5))
    quantizer.scale = torch.tensor([1.0, 2, 3]).repeat_interleave(2)[:, None]
    assert quantizer.describe() == "uniform, 4 bits, per row (3 distinct)"


def find(frame: pd.DataFrame, name: str) -> list[object]:
    (row,) = frame[frame["name"] == name].to_numpy().tolist()
    return row[1:]


def test_layers_and_products_of_a_quantized_model(make_vit: MakeModel, make_images: MakeImages) -> None:
    model = quantize(make_vit(depth=1), "ptq4vit", 4, 6, make_images(), rounds=1)
    frame = tabulate_sites(model, None)
    assert list(frame["name"]) == [
        *("patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.scores", "blocks.0.attn.context"),
        *("blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head"),
    ]
    uniform = "uniform, 6 bits, per tensor"
    twin = "twin uniform for softmax, 6 bits"
    shape = tuple(model.get_parameter("patch_embed.proj.weight").shape)
    assert find(frame, "patch_embed.proj") == ["patch_embed", shape, "uniform, 4 bits, per row", "full precision"]
    assert find(frame, "blocks.0.attn.context") == ["probs, value", (), "", f"{twin}; {uniform}"]
    assert find(frame, "head")[2:] == ["uniform, 4 bits, per tensor", uniform]
    assert summarize_sites(frame) == "6 of 6 layers' weights quantized, 100.0 % of their values"


def test_layers_that_are_left_out_come_last_with_the_reason(make_vit: MakeModel, make_images: MakeImages) -> None:
    model = make_vit(depth=1)
    parts = {
        "tokens": nn.Embedding(3, 7),
        "up": nn.ConvTranspose2d(2, 3, 4),
        "spare": nn.Linear(2, 3),
        "prompts": nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)),
    }
    for name, part in parts.items():
        model.add_module(name, part)
    before = tabulate_sites(model, None)
    assert set(before["weight"]) == set(before["input"]) == {"full precision"}
    assert summarize_sites(before) == "0 of 10 layers' weights quantized, 0.0 % of their values"

    network = replace(adapt(copy.deepcopy(model)), excluded=("prompts.*",))
    with pytest.warns(UserWarning, match="no rule"):
        model = quantize(model, "base_ptq", 4, 4, make_images())
    frame = tabulate_sites(model, network)
    assert list(frame["name"])[-4:] == ["tokens", "up", "spare", "prompts.0"]
    left_out = {
        "tokens": ((3, 7), "methods quantize no Embedding"),
        "up": ((2, 3, 4, 4), "methods quantize no ConvTranspose2d"),
        "spare": ((3, 2), "there is no rule for it"),
        "prompts.0": ((4, 5), "every method leaves out this part"),
    }
    for name, (shape, reason) in left_out.items():
        assert find(frame, name) == ["", shape, f"full precision: {reason}", "full precision"]
    layers = [parameter.numel() for name, parameter in model.named_parameters() if name.endswith("proj.weight")]
    layers += [model.get_parameter(f"blocks.0.{name}.weight").numel() for name in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    quantized = sum(layers) + model.get_parameter("head.weight").numel()
    share = 100 * quantized / (quantized + 21 + 96 + 6 + 20)
    assert summarize_sites(frame) == f"6 of 10 layers' weights quantized, {share:.1f} % of their values"


def test_both_styles_say_the_same(make_vit: MakeModel, make_images: MakeImages) -> None:
    frame = tabulate_sites(quantize(make_vit(depth=1), "base_ptq", 4, 4, make_images()), None)
    read = pd.read_csv(StringIO(render_sites(frame, "csv"))).fillna("")
    text = render_sites(frame, "md")
    heading, _, *rows, empty, summary = text.splitlines()
    assert [cell.strip() for cell in heading.split("|")[1:4]] == ["Layer or product", "Role", "Weight"]
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows] == read.to_numpy().tolist()
    assert read["shape"][0] == "48×3×8×8"
    assert (empty, summary) == ("", summarize_sites(frame))
    assert text.endswith("\n")
