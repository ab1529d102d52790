"""Methods on odd models, images and options: the right result, or one clear line."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from adfq.adfq_vit import ADFQViT
from adfq.errors import NotApplicableError
from adfq.export.metadata import describe_graph
from adfq.method import Method
from adfq.registry import create_method
from baselines.adalog import AdaLog
from baselines.aphq_vit import APHQViT
from baselines.base_ptq import BasePTQ
from baselines.fima_q import FIMAQ
from baselines.glf_q import GLFQ
from baselines.ptq4vit import PTQ4ViT
from baselines.qdrop import QDrop
from baselines.row_ridge import RowRidge

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]

SHORT: dict[str, dict[str, Any]] = {
    "aphq_vit": {"iterations": 1, "mlp_iterations": 1},
    "fima_q": {"iterations": 1},
    "glf_q": {"iterations": 1, "mlp_iterations": 1, "rotations": False},  # a forward of its own leaves them out
    "ptq4vit": {"rounds": 1},
    "row_ridge": {"iterations": 1, "reconstruct": True},
}

pytestmark = pytest.mark.filterwarnings("ignore:optimization made these modules no better")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["aphq_vit", "glf_q"])
def test_weights_in_half_precision_are_trained_in_float32(
    name: str, dtype: torch.dtype, make_vit: MakeModel, make_images: MakeImages
) -> None:
    model, images = make_vit(depth=1), make_images()
    options = {"iterations": 1, "mlp_iterations": 20, "mlp_learning_rate": 1e-4, "optimize_batch_size": 2}
    errors = []
    for found in (model, copy.deepcopy(model).to(dtype)):
        quantized: Any = adfq.quantize(found, name, 8, 8, images, **options)
        assert {parameter.dtype for parameter in quantized.parameters()} == {next(found.parameters()).dtype}
        errors.append([outcome["after"] for outcome in quantized.quantization.report["mlps"].values()])
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


class NoGrad(VisionTransformer):
    @torch.no_grad()
    def forward(self, x: Tensor, attn_mask: Any = None) -> Tensor:
        return super().forward(x)


class Inference(VisionTransformer):
    @torch.inference_mode()
    def forward(self, x: Tensor, attn_mask: Any = None) -> Tensor:
        return super().forward(x)


class Label(VisionTransformer):
    def forward(self, x: Tensor, attn_mask: Any = None) -> Any:
        return super().forward(x).argmax(-1)


class Array(VisionTransformer):
    def forward(self, x: Tensor, attn_mask: Any = None) -> Any:
        return super().forward(x).detach().numpy()


class Named(VisionTransformer):
    def forward(self, x: Tensor, attn_mask: Any = None) -> Any:
        return {"logits": super().forward(x), "loss": None}


class Listed(VisionTransformer):
    def forward(self, x: Tensor, attn_mask: Any = None) -> Any:
        return [super().forward(x), None]


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (NoGrad, ["aphq_vit", "fima_q", "glf_q", "ptq4vit", "row_ridge"]),
        (Inference, ["aphq_vit", "fima_q", "glf_q", "ptq4vit", "row_ridge"]),
        (Label, ["aphq_vit", "fima_q", "ptq4vit"]),
        (Array, ["aphq_vit", "fima_q", "ptq4vit"]),
    ],
)
def test_methods_that_need_a_gradient_say_so(
    cls: type[VisionTransformer], names: list[str], make_vit: MakeModel, make_images: MakeImages
) -> None:
    for name in names:
        with pytest.raises(NotApplicableError, match="gradient"):
            adfq.quantize(make_vit(cls, depth=1), name, 8, 8, make_images(), **SHORT[name])


@pytest.mark.parametrize("name", SHORT)
def test_nested_outputs_count_as_their_tensors(name: str, make_vit: MakeModel, make_images: MakeImages) -> None:
    images = make_images()
    plain, named, listed = (
        adfq.quantize(make_vit(cls, depth=1), name, 8, 8, images, **SHORT[name])(images)
        for cls in (VisionTransformer, Named, Listed)
    )
    assert torch.equal(named["logits"], plain)
    assert torch.equal(listed[0], plain)


def test_models_in_inference_mode_can_be_trained(make_vit: MakeModel, make_images: MakeImages) -> None:
    images = make_images()
    plain, odd = (
        adfq.quantize(make_vit(cls, depth=1), "iasvit", 4, 4, images, iterations=2)(images)
        for cls in (VisionTransformer, Inference)
    )
    torch.testing.assert_close(odd, plain)


@pytest.mark.parametrize("sizes", [(32, 48), (48, 32)])
@pytest.mark.parametrize("name", ["adalog", "adfq_vit", "aphq_vit", "fima_q"])
def test_images_of_several_sizes(
    name: str, sizes: tuple[int, int], make_vit: MakeModel, make_images: MakeImages
) -> None:
    images = [make_images(2, size) for size in sizes]
    with pytest.raises(AdfqError, match=r"^blocks\.0\.attn.*give images of one size$"):
        adfq.quantize(make_vit(depth=1, dynamic_img_size=True), name, 4, 4, images, **SHORT.get(name, {}))


@pytest.mark.parametrize(
    ("cls", "options", "says"),
    [
        (PTQ4ViT, {"rounds": "x"}, "rounds must be a whole number, got 'x'"),
        (PTQ4ViT, {"rounds": float("nan")}, "rounds must be a whole number, got nan"),
        (FIMAQ, {"rank": None}, "rank must be a whole number, got None"),
        (APHQViT, {"labels": None}, "labels must be a whole number, got None"),
        (RowRidge, {"local_weight": "x"}, "local_weight must be a number, got 'x'"),
        (QDrop, {"autocast": "x"}, "autocast must be True or False, got 'x'"),
        (QDrop, {"optimize_batch_size": True}, "optimize_batch_size must be a whole number, got True"),
        (ADFQViT, {"qkv_threshold": "x"}, "qkv_threshold must be a number, got 'x'"),
        (BasePTQ, {"range": [1]}, "range must be a text, got [1]"),
        (QDrop, {"optimize_batch_size": 2**70}, f"optimize_batch_size must be at most 2147483647, got {2**70}"),
        (APHQViT, {"mlp_learning_rate": -1}, "mlp_learning_rate must be a finite number of at least 0, got -1"),
        (APHQViT, {"power": float("inf")}, "power must be a finite number above 0, got inf"),
        (GLFQ, {"local_weight": float("inf")}, "local_weight must be a finite number above 0, got inf"),
        (FIMAQ, {"rounding_learning_rate": float("inf")}, "rounding_learning_rate must be a finite number of at least"),
        (AdaLog, {"rounding_weight": float("inf")}, "rounding_weight must be a finite number of at least 0, got inf"),
    ],
)
def test_options_are_checked_alike_in_both_ways(cls: type[Method], options: dict[str, Any], says: str) -> None:
    name = next(name for name in adfq.methods() if type(create_method(name)) is cls)
    for create in (lambda: cls(**options), lambda: create_method(name, options)):
        with pytest.raises(AdfqError) as caught:
            create()
        assert str(caught.value).startswith(says)


@dataclass(frozen=True)
class Own(BasePTQ):
    """A method with a check of its own, and without that of its base class."""

    factor: float = 1.0
    anything: Any = None

    def __post_init__(self) -> None:
        if self.factor < 0:
            raise AdfqError("factor is negative")


def test_options_are_checked_before_a_method_checks_them_itself() -> None:
    with pytest.raises(AdfqError, match="factor must be a number, got 'x'"):
        Own(factor="x")  # type: ignore[arg-type]
    with pytest.raises(AdfqError, match="range must be a text, got 3"):
        Own(3)  # type: ignore[arg-type]
    with pytest.raises(AdfqError, match="factor is negative"):
        Own("mse", -1.0)
    method = Own("mse", 2, anything=[1])
    assert pickle.loads(pickle.dumps(method)) == copy.deepcopy(method) == method
    assert replace(method, factor=3.0).factor == 3.0


def test_preprocessing_in_other_types(make_vit: MakeModel, make_images: MakeImages) -> None:
    model: Any = adfq.quantize(make_vit(depth=1), "base_ptq", 8, 8, make_images())
    model.pretrained_cfg = {"mean": tuple(np.float32([0.5] * 3)), "crop_pct": np.int64(1)}
    found = json.loads(describe_graph(model, "classifier", (3, 32, 32)))["preprocessing"]
    assert (found["mean"], found["crop_pct"]) == ([0.5] * 3, 1)
    for config in ({"crop_pct": float("nan")}, {"mean": np.zeros(3)}, {"interpolation": object()}):
        model.pretrained_cfg = config
        with pytest.raises(AdfqError, match="preprocessing"):
            describe_graph(model, "classifier", (3, 32, 32))
    model.quantization = replace(model.quantization, notes={"preprocessing": {"size": float("nan")}})
    with pytest.raises(AdfqError, match="cannot write the model's preprocessing"):
        describe_graph(model, "classifier", (3, 32, 32))
