"""Methods are found by name, asked for their options, and made with checked ones."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError, registry
from adfq.adapters import adapt
from adfq.adfq_vit import ADFQViT
from adfq.bits import Bits
from adfq.errors import NotApplicableError
from adfq.method import FullPrecision, Method, Run
from adfq.reconstruction import OptimizingMethod
from adfq.sites import Network, Recipe, sites_of
from baselines.adalog import AdaLog
from baselines.aphq_vit import APHQViT
from baselines.base_ptq import BasePTQ
from baselines.erq import ERQ
from baselines.fima_q import FIMAQ
from baselines.glf_q import GLFQ
from baselines.gptq import GPTQ
from baselines.iasvit import IASViT
from baselines.ptq4vit import PTQ4ViT
from baselines.qdrop import QDrop
from baselines.repq_vit import RepQViT
from baselines.row_ridge import RowRidge

CLASSES = {
    "full_precision": FullPrecision,
    "adalog": AdaLog,
    "adfq_vit": ADFQViT,
    "aphq_vit": APHQViT,
    "base_ptq": BasePTQ,
    "erq": ERQ,
    "fima_q": FIMAQ,
    "glf_q": GLFQ,
    "gptq": GPTQ,
    "iasvit": IASViT,
    "ptq4vit": PTQ4ViT,
    "qdrop": QDrop,
    "repq_vit": RepQViT,
    "row_ridge": RowRidge,
}


def test_names_lead_to_classes_and_back() -> None:
    assert registry.methods() == tuple(CLASSES)
    for name, cls in CLASSES.items():
        assert registry.find_method(name) is cls
        assert registry.method_name(cls()) == name
        assert registry.method_label(name) == cls.label
    assert registry.method_label("not_installed") == "not_installed"


def test_a_method_tells_what_it_is_before_it_runs() -> None:
    assert [cls.calibration_size for cls in CLASSES.values() if cls.calibration_size != 32] == [0, *[1024] * 6, 128]
    optimizing = {name for name, cls in CLASSES.items() if issubclass(cls, OptimizingMethod)}
    assert optimizing == {"adalog", "adfq_vit", "aphq_vit", "fima_q", "glf_q", "iasvit", "qdrop", "row_ridge"}
    assert {name for name, cls in CLASSES.items() if cls().trained_iterations} == optimizing - {"adalog", "row_ridge"}
    assert AdaLog(reconstruct=True).trains == "roundings, step sizes"
    assert RowRidge().trains == "weights, in closed form"
    assert RowRidge(reconstruct=True).trains == "weights, step sizes"
    assert ADFQViT.paper == "arXiv 2407.02763"
    assert list(PTQ4ViT.options()) == ["search", "rounds", "gradient_batch_size", "released"]
    assert list(ADFQViT.options())[:2] == ["qkv_threshold", "fc1_threshold"]
    with pytest.raises(FrozenInstanceError):
        BasePTQ().range = "mse"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("adfq", {}, "unknown method 'adfq'; there are full_precision, adalog"),
        ("base_ptq", {"ranges": "mse"}, "no option 'ranges'; it has range"),
        ("repq_vit", {"range": "mse"}, "no option 'range'; it has none"),
        ("adfq_vit", {"ppoq": "no"}, "ppoq must be True or False, got 'no'"),
        ("adfq_vit", {"ppoq": 1}, "ppoq must be True or False, got 1"),
        ("adfq_vit", {"qkv_threshold": "high"}, "qkv_threshold must be a number, got 'high'"),
        ("adfq_vit", {"qkv_threshold": True}, "qkv_threshold must be a number, got True"),
        ("ptq4vit", {"rounds": 1.5}, "rounds must be a whole number, got 1.5"),
        ("ptq4vit", {"rounds": True}, "rounds must be a whole number, got True"),
        ("ptq4vit", {"search": None}, "search must be a text, got None"),
        ("ptq4vit", {"rounds": 0}, "rounds and gradient_batch_size must be at least 1"),
        ("ptq4vit", {"search": "best"}, "unknown search 'best'"),
        ("adfq_vit", {"temperature": 0}, "temperature must be above 0"),
    ],
)
def test_mistakes_are_found_before_any_work(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(AdfqError) as error:
        registry.create_method(name, options)
    assert says in str(error.value)


def test_whole_numbers_are_numbers() -> None:
    assert registry.create_method("adfq_vit", {"qkv_threshold": 5}) == ADFQViT()


def test_an_entry_point_that_is_no_method(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("a_function", "os.path:join", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda **_: [point])
    with pytest.raises(AdfqError, match=r"a_function: os\.path:join is not a dataclass that derives from"):
        registry.find_method("a_function")


def test_a_method_is_named_or_given(make_vit: Callable[[], nn.Module], make_images: Callable[..., Tensor]) -> None:
    model, images = make_vit(), make_images()
    named = adfq.quantize(model, "base_ptq", calibration=images, range="mse")
    given = adfq.quantize(model, BasePTQ(range="mse"), calibration=images)
    assert torch.equal(named(images), given(images))
    assert named.quantization == given.quantization  # type: ignore[attr-defined]
    with pytest.raises(AdfqError, match=r"give range to BasePTQ\(…\)"):
        adfq.quantize(model, BasePTQ(), calibration=images, range="mse")
    with pytest.raises(AdfqError, match=r"must be a name or an adfq\.method\.Method, got ABCMeta"):
        adfq.quantize(model, BasePTQ, calibration=images)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Picky(BasePTQ):
    """A method for models without a head."""

    def supports(self, network: Network) -> str | None:
        roles = {site.role for site in sites_of(network.model)}
        return "the model has a head" if "head" in roles else None

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        run.report["sites"] = len(list(sites_of(network.model)))
        super().apply(network, run, bits)


def test_a_method_says_why_it_cannot_be_applied(
    make_vit: Callable[..., nn.Module], make_images: Callable[..., Tensor]
) -> None:
    with pytest.raises(NotApplicableError, match="the model has a head"):
        adfq.quantize(make_vit(), Picky(), calibration=make_images())
    quantized: Any = adfq.quantize(make_vit(num_classes=0), Picky(), calibration=make_images())
    assert quantized.quantization.method == f"{__name__}:Picky"
    assert quantized.quantization.report == {"sites": 26}


@pytest.mark.parametrize("cls", CLASSES.values())
def test_a_recipe_is_what_quantizing_leaves(
    cls: type[Method],
    quick: Mapping[str, dict[str, Any]],
    make_swin: Callable[[], nn.Module],
    make_images: Callable[..., Tensor],
) -> None:
    if cls is FullPrecision:
        sites = sites_of(adapt(make_swin()).model)
        assert all(cls().recipe(Bits(4, 4)).quantizer_of(site) is None for site in sites)
        return
    method = cls(**quick[registry.method_name(cls())])
    recipe = method.recipe(Bits(5, 3))
    assert isinstance(recipe, Recipe)
    for site in sites_of(adfq.quantize(make_swin(), method, 5, 3, make_images(2))):
        expected = recipe.quantizer_of(site)
        assert type(site.quantizer) is type(expected), site.name
        assert (site.quantizer and site.quantizer.bits) == (expected and expected.bits), site.name


def test_importing_methods_needs_no_torch() -> None:
    code = "import sys, adfq, adfq.method, adfq.registry; adfq.methods(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
