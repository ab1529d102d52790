"""The example of an adapter of one's own: an architecture from outside is quantized, saved and listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from adfq.adapters import adapt
from adfq.sites import sites_of
from benchmarks.cli.main import main

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "pit_adapter"

# No model of another example is as small, and timm's smallest PiT takes a second.
SHAPE = {"base_dims": (16, 16), "depth": (1, 1), "heads": (2, 4), "num_classes": 5}


@pytest.fixture
def at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package as if it were installed."""
    information = tmp_path / "pit_adapter-0.1.0.dist-info"
    information.mkdir()
    (tmp_path / "pit_adapter.py").write_text((EXAMPLE / "pit_adapter.py").read_text())
    text = (EXAMPLE / "pyproject.toml").read_text()
    section = text.partition('[project.entry-points."adfq.adapters"]\n')[2].partition("\n\n")[0].replace('"', "")
    (information / "entry_points.txt").write_text(f"[adfq.adapters]\n{section}\n")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: pit-adapter\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def make_pit() -> nn.Module:
    return timm.create_model("pit_ti_224", **SHAPE).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 224, 224)


def test_without_it_the_architecture_is_refused() -> None:
    with pytest.raises(AdfqError, match="cannot quantize a PoolingVisionTransformer"):
        adapt(make_pit())


@pytest.mark.usefixtures("at_hand")
def test_the_adapted_model_computes_the_same(images: Tensor) -> None:
    model = make_pit()
    with torch.no_grad():
        expected = model(images)
        network = adapt(model)
        torch.testing.assert_close(network.model(images), expected, rtol=1e-4, atol=1e-5)
    assert network.unsupported == ()
    assert network.is_excluded("transformers.1.pool.conv")
    assert len(network.input_norms) == 4
    assert {"qkv", "fc2", "head", "patch_embed"} <= {site.role for site in sites_of(network.model)}


@pytest.mark.usefixtures("at_hand")
@pytest.mark.parametrize("method", ["repq_vit", "adfq_vit"])
def test_it_is_quantized_and_saved(method: str, images: Tensor, tmp_path: Path) -> None:
    options = {"iterations": 1, "optimize_batch_size": 2} if method == "adfq_vit" else {}
    quantized = adfq.quantize(make_pit(), method, 4, 4, images, **options)
    adfq.save(quantized, tmp_path / "pit.safetensors")
    with torch.no_grad():
        assert torch.equal(adfq.load(tmp_path / "pit.safetensors")(images), quantized(images))


@pytest.mark.usefixtures("at_hand")
def test_its_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "models"]) == 0
    assert "pit_ti_224" in capsys.readouterr().out.split()
