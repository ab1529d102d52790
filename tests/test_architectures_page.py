"""Every name of timm is quantized, computing what it did, or refused in one line; docs/architectures.md says which."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import adfq
from adfq import AdfqError
from adfq.adapters import adapt, create, describe, families, find_adapter
from adfq.layers import QuantLinear

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "write_architectures.py"))


@pytest.fixture(scope="module")
def faults() -> dict[str, str]:
    """Filled by the survey: what is wrong with a model that is not refused, by its name."""
    return {}


@pytest.fixture(scope="module")
def outcomes(script: dict[str, Any], faults: dict[str, str], randomize: Callable[[nn.Module], nn.Module]) -> list[Any]:
    def check(variant: Any, model: nn.Module) -> None:
        if fault := fault_of(randomize(model)):
            faults[variant.name] = fault

    outcomes: list[Any] = script["survey"](check)
    return outcomes


def fault_of(model: Any) -> str:
    """Return what is wrong with an adapted or rebuilt model; empty for nothing. A refusal is raised."""
    images = torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    architecture, state = describe(model), model.state_dict()
    with torch.no_grad():
        expected = model(images)
        network = adapt(model)
        difference = (network.model(images) - expected).abs().max() / expected.std()
        if not difference < 1e-4 or expected.std() < 0.05:
            return f"computes something else: {difference}"
        if network.unsupported:
            return f"left in full precision: {network.unsupported}"
        try:
            twin = create(architecture).eval()
            twin.load_state_dict(state)
        except (AdfqError, RuntimeError) as error:
            return f"cannot be rebuilt: {error}"
        return "" if torch.equal(twin(images), expected) else "is rebuilt as another model"


def test_every_name_is_quantized_or_refused(outcomes: list[Any], faults: dict[str, str]) -> None:
    assert sorted(outcome.variant.name for outcome in outcomes) == sorted(timm.list_models())
    assert faults == {}
    assert sum(outcome.reason is None for outcome in outcomes) > 200


def test_the_names_that_are_listed_are_those_that_are_quantized(outcomes: list[Any]) -> None:
    adapters = {find_adapter(name).__name__: find_adapter(name) for name in families() if name.startswith("timm.")}
    listed = [name for adapter in adapters.values() for name in adapter.model_names()]  # type: ignore[attr-defined]
    assert sorted(listed) == sorted(outcome.variant.name for outcome in outcomes if outcome.reason is None)


def test_every_refusal_is_one_line_that_names_a_class(outcomes: list[Any]) -> None:
    for outcome in outcomes:
        assert outcome.reason is None or "\n" not in outcome.reason
        if outcome.variant.family is None:
            assert outcome.reason.startswith(f"cannot quantize a {outcome.variant.cls.__name__}; supported are ")


@pytest.mark.parametrize(
    ("module", "name", "says"),
    [
        ("vision_transformer", "vit_pwee_patch16_reg1_gap_256", r"blocks\.0: cannot quantize a ParallelScalingBlock"),
        ("vitamin", "vitamin_small_224", "patch_embed: cannot quantize a HybridEmbed, a MbConvStages between"),
    ],
)
def test_quantize_says_the_same(module: str, name: str, says: str, script: dict[str, Any]) -> None:
    model = script["find_variant"](name, module).build()
    with pytest.raises(AdfqError, match=says):
        adfq.quantize(model, "base_ptq", calibration=torch.zeros(1, 3, 32, 32))


def test_a_model_that_computes_something_else_is_found(
    make_vit: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fault_of(make_vit()) == ""
    forward = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: 1.001 * forward(self, x))
    assert fault_of(make_vit()).startswith("computes something else")


def test_the_page_is_written_from_the_survey(script: dict[str, Any], outcomes: list[Any]) -> None:
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    if f"timm {timm.__version__} has " not in page:
        pytest.skip(f"the page is about another timm than {timm.__version__}")
    assert script["render_page"](outcomes) == page, "run scripts/write_architectures.py"
