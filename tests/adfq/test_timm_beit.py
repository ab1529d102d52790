"""timm's Beit: adapted, it computes what it did; its roles and norms are the right ones; it comes back from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.beit import Beit
from torch import nn

import adfq
from adfq import AdfqError
from adfq.adapters import adapt, timm_beit

Randomize = Callable[[nn.Module], nn.Module]

CASES: dict[str, dict[str, Any]] = {
    "BEiT": {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.5},
    "shared bias": {"use_shared_rel_pos_bias": True, "img_size": (32, 16), "global_pool": "token"},
    "both biases": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True, "use_fc_norm": False},
    "SwiGLU": {"swiglu_mlp": True, "scale_mlp": True, "qkv_bias": False, "mlp_ratio": 2.36},
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def make(randomize: Randomize) -> Callable[..., nn.Module]:
    def build(case: str, **changes: Any) -> nn.Module:
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
        return randomize(Beit(**(shape | CASES[case] | changes)))

    return build


@every_case
@torch.no_grad()
def test_an_adapted_model_computes_what_it_did(case: str, make: Callable[..., nn.Module]) -> None:
    model: Any = make(case)
    images = torch.randn(4, 3, *model.patch_embed.img_size)
    expected = model(images)
    assert expected.std() > 0.1
    network = adapt(model)
    assert network.unsupported == ()
    torch.testing.assert_close(network.model(images), expected, rtol=1e-5, atol=1e-5)


@every_case
def test_the_architecture_is_told_from_the_model(case: str, make: Callable[..., nn.Module], tmp_path: Path) -> None:
    model: Any = make(case)
    images = torch.randn(4, 3, *model.patch_embed.img_size)
    quantized = adfq.quantize(model, "repq_vit", calibration=images)  # changes norms, adds biases
    adfq.save(quantized, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(adfq.load(tmp_path / "model")(images), quantized(images))


def test_a_model_of_timms_registry(randomize: Randomize, tmp_path: Path) -> None:
    name, images = "beitv2_base_patch16_224", torch.randn(4, 3, 32, 32)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 7}
    assert name in timm_beit.model_names()
    quantized = adfq.quantize(randomize(timm.create_model(name, **shape)), "base_ptq", calibration=images)
    adfq.save(quantized, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(adfq.load(tmp_path / "model")(images), quantized(images))


@pytest.mark.parametrize("method", adfq.methods()[1:])
def test_every_method_quantizes_it(
    method: str, quick: Mapping[str, dict[str, Any]], make: Callable[..., nn.Module]
) -> None:
    model, images = make("both biases", depth=1), torch.randn(4, 3, 32, 32)
    quantized = adfq.quantize(model, method, 4, 4, calibration=images, **quick[method])
    with torch.no_grad():
        expected, found = model(images), quantized(images)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < expected.norm()


def test_a_shared_bias_is_no_rows_of_the_optimization(make: Callable[..., nn.Module]) -> None:
    """Two images, in full precision and quantized, are as many rows as there are heads."""
    model, images = make("both biases", depth=1, num_heads=4), torch.randn(2, 3, 32, 32)
    quantized = adfq.quantize(model, "adfq_vit", 8, 8, images, iterations=2, optimize_batch_size=1, held_back=0.0)
    with torch.no_grad():
        expected = model(images)
        assert (quantized(images) - expected).norm() < 0.1 * expected.norm()


def test_roles_and_norms(make: Callable[..., nn.Module]) -> None:
    network = adapt(make("SwiGLU"))
    roles = {name: layer.role for name, layer in network.weight_layers() if name.startswith("blocks.0")}
    expected = {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1_g": "fc1", "mlp.fc1_x": "fc1", "mlp.fc2": "gated"}
    assert roles == {f"blocks.0.{name}": role for name, role in expected.items()}
    block = network.model.get_submodule("blocks.0")
    norms = {name: norm for name, norm in network.input_norms.items() if name.startswith("blocks.0")}
    readers = {"attn.qkv": block.norm1, "mlp.fc1_g": block.norm2, "mlp.fc1_x": block.norm2}
    assert norms == {f"blocks.0.{name}": norm for name, norm in readers.items()}


def test_another_kind_of_block(make: Callable[..., nn.Module]) -> None:
    model: Any = make("BEiT")
    model.blocks[0] = nn.Identity()
    with pytest.raises(AdfqError, match=r"blocks\.0: cannot quantize a Identity"):
        adapt(model)
