"""timm's Eva: adapted, it computes what it did; its roles and norms are the right ones; it comes back from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm
from timm.models.eva import Eva, EvaBlock
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from adfq.adapters import adapt, timm_eva
from adfq.bits import Bits
from adfq.calibration import CalibrationImages
from adfq.method import Run
from adfq.quantizers import UniformQuantizer
from adfq.sites import Network, Recipe
from baselines.repq_vit import RepQViT

Randomize = Callable[[nn.Module], nn.Module]
METHODS = adfq.methods()[1:]

ROPE: dict[str, Any] = {"use_rot_pos_emb": True}
CASES: dict[str, dict[str, Any]] = {
    "EVA": {"init_values": 0.5},
    "EVA without biases": {"qkv_bias": False, "global_pool": "token", "use_abs_pos_emb": False},
    "EVA-02": {
        **ROPE,
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "mlp_ratio": 2.36,
        "ref_feat_shape": (6, 5),
    },
    "EVA-02, small": {**ROPE, "swiglu_mlp": True, "rope_grid_offset": 1.0, "rope_grid_indexing": "xy"},
    "post-norm": {"use_post_norm": True, "scale_mlp": True, "img_size": (32, 16)},
    "DINOv3": {
        **ROPE,
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "rope_temperature": 100.0,
        "swiglu_mlp": True,
        "swiglu_align_to": 8,
        "num_reg_tokens": 3,
        "no_embed_class": True,
        "dynamic_img_size": True,
        "use_fc_norm": False,
        "init_values": 0.5,
        "num_classes": 0,
    },
    "mixed": {**ROPE, "rope_type": "mixed", "attn_type": "rope", "class_token": False, "dynamic_img_pad": True},
    "PE": {
        **ROPE,
        "attn_type": "rope",
        "use_pre_transformer_norm": True,
        "global_pool": "map",
        "attn_pool_num_heads": 2,
        "attn_pool_mlp_ratio": 3.0,
    },
    "grouped queries": {
        **ROPE,
        "attn_type": "rope",
        "qkv_fused": False,
        "qk_norm": True,
        "num_kv_heads": (1, 3),
        "init_values": 0.5,
        "attn_only_layer_scale": True,
    },
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def make(randomize: Randomize) -> Callable[..., nn.Module]:
    def build(case: str, **changes: Any) -> nn.Module:
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
        return randomize(Eva(**(shape | CASES[case] | changes)))

    return build


def images_of(model: Any) -> Tensor:
    return torch.randn(4, 3, *model.patch_embed.img_size)


def roles_of(network: Network) -> dict[str, str]:
    """Return role by name of the layers outside of the second block."""
    return {name: layer.role for name, layer in network.weight_layers() if not name.startswith("blocks.1")}


@every_case
@torch.no_grad()
def test_an_adapted_model_computes_what_it_did(case: str, make: Callable[..., nn.Module]) -> None:
    model = make(case)
    images = images_of(model)
    expected = model(images)
    assert expected.std() > 0.1
    network = adapt(model)
    assert network.unsupported == ()
    torch.testing.assert_close(network.model(images), expected, rtol=1e-5, atol=1e-5)


@every_case
@torch.no_grad()
def test_reparameterization_leaves_the_full_precision_function_as_it_was(
    case: str, make: Callable[..., nn.Module]
) -> None:
    model = make(case)
    images = images_of(model)
    expected = model(images)
    network = adapt(model)
    RepQViT().apply(network, Run(CalibrationImages([images])), Bits(4, 4))
    for names in _readers(network).values():  # one range for all readers of a norm
        quantizers = [network.model.get_submodule(f"{name}.input_quantizer") for name in names]
        assert {type(found) for found in quantizers} == {UniformQuantizer}
        assert len({float(found.scale) for found in quantizers}) == 1
    network.attach(Recipe(activation=lambda: None, weight=lambda: None))
    torch.testing.assert_close(network.model(images), expected, rtol=1e-5, atol=1e-5)


def _readers(network: Network) -> dict[nn.LayerNorm, list[str]]:
    readers: dict[nn.LayerNorm, list[str]] = {}
    for name, norm in network.input_norms.items():
        readers.setdefault(norm, []).append(name)
    return readers


@every_case
def test_the_architecture_is_told_from_the_model(case: str, make: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = make(case)
    images = images_of(model)
    quantized = adfq.quantize(model, "repq_vit", calibration=images)  # changes norms, adds biases
    adfq.save(quantized, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(adfq.load(tmp_path / "model")(images), quantized(images))


@pytest.mark.parametrize(
    "name",
    [
        "eva02_tiny_patch14_224",
        "eva02_enormous_patch14_clip_224",
        "vit_small_plus_patch16_dinov3",
        "vit_small_patch16_rope_mixed_ape_224",
        "vit_pe_core_tiny_patch16_384",
    ],
)
def test_models_of_timms_registry(name: str, randomize: Randomize, tmp_path: Path) -> None:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 7}
    model, images = randomize(timm.create_model(name, **shape)), torch.randn(4, 3, 32, 32)
    assert name in timm_eva.model_names()
    quantized = adfq.quantize(model, "base_ptq", 8, 8, calibration=images)
    adfq.save(quantized, tmp_path / "model")
    with torch.no_grad():
        expected, found = model(images), quantized(images)
        assert (found - expected).norm() < 0.1 * expected.norm()
        assert torch.equal(adfq.load(tmp_path / "model")(images), found)


def test_what_its_description_does_not_tell_is_refused(make: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = make("EVA", norm_layer=partial(LayerNorm, eps=1e-2))
    quantized = adfq.quantize(model, "base_ptq", calibration=images_of(model))
    with pytest.raises(AdfqError, match=r"cannot be rebuilt from its description: .*norm1 .*0\.01"):
        adfq.save(quantized, tmp_path / "model")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["EVA-02", "post-norm", "PE"])
def test_every_method_quantizes_it(
    case: str, method: str, quick: Mapping[str, dict[str, Any]], make: Callable[..., nn.Module]
) -> None:
    model = make(case, depth=1)
    images = images_of(model)
    quantized = adfq.quantize(model, method, 4, 4, calibration=images, **quick[method])
    with torch.no_grad():
        expected, found = model(images), quantized(images)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < expected.norm()


ENDS = {"patch_embed.proj": "patch_embed", "head": "head"}


@pytest.mark.parametrize(
    ("case", "roles"),
    [
        ("EVA", {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}),
        (
            "EVA-02",
            {
                **dict.fromkeys(("attn.q_proj", "attn.k_proj", "attn.v_proj"), "qkv"),
                "attn.proj": "proj",
                **dict.fromkeys(("mlp.fc1_g", "mlp.fc1_x"), "fc1"),
                "mlp.fc2": "gated",
            },
        ),
        ("EVA-02, small", {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "fc1", "mlp.fc2": "gated"}),
        ("post-norm", {"attn.qkv": "residual", "attn.proj": "proj", "mlp.fc1": "residual", "mlp.fc2": "hidden"}),
    ],
)
def test_roles(case: str, roles: dict[str, str], make: Callable[..., nn.Module]) -> None:
    network = adapt(make(case))
    assert roles_of(network) == ENDS | {f"blocks.0.{name}": role for name, role in roles.items()}
    assert [product.roles for _, product in network.matmuls()] == [("query", "key"), ("probs", "value")] * 2


def test_norms_have_all_their_readers(make: Callable[..., nn.Module]) -> None:
    network = adapt(make("EVA-02"))
    block = network.model.get_submodule("blocks.0")
    readers = _readers(network)
    assert readers[block.norm1] == [f"blocks.0.attn.{part}_proj" for part in "qkv"]
    assert readers[block.norm2] == ["blocks.0.mlp.fc1_g", "blocks.0.mlp.fc1_x"]
    assert len(readers) == 4
    assert adapt(make("post-norm")).input_norms == {}


def test_a_norm_with_a_reader_of_its_own_is_left_out(make: Callable[..., nn.Module]) -> None:
    class Skipping(EvaBlock):
        def forward(self, x: Tensor, rope: Tensor | None = None, **_: Any) -> Tensor:
            return super().forward(x, rope) + self.norm1(x)  # type: ignore[no-any-return]

    model = make("EVA")
    model.get_submodule("blocks.0").__class__ = Skipping
    assert set(adapt(model).input_norms) == {"blocks.1.attn.qkv", "blocks.1.mlp.fc1"}


def test_ptq4vit_has_a_scale_for_each_projection(make: Callable[..., nn.Module]) -> None:
    def scales(case: str) -> dict[str, int]:
        quantized = adfq.quantize(
            make(case, depth=1), "ptq4vit", calibration=torch.randn(2, 3, 32, 32), search="mse", rounds=1
        )
        layers = Network(quantized).weight_layers()
        return {name: layer.weight_quantizer.scale.unique().numel() for name, layer in layers}

    assert scales("EVA-02")["blocks.0.attn.q_proj"] == 1
    fused = scales("PE")
    names = ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "attn_pool.q", "attn_pool.kv")
    assert [fused[name] for name in names] == [3, 1, 1, 2]


def test_positions_are_no_rows_of_the_optimization(make: Callable[..., nn.Module]) -> None:
    """Eight images, in full precision and quantized, are as many rows as there are patches."""
    model, images = make("EVA-02, small", depth=1), torch.randn(8, 3, 32, 32)
    quantized = adfq.quantize(model, "adfq_vit", 8, 8, images, iterations=2, optimize_batch_size=4)
    with torch.no_grad():
        expected = model(images)
        assert (quantized(images) - expected).norm() < 0.1 * expected.norm()


def test_another_kind_of_block(make: Callable[..., nn.Module]) -> None:
    model = make("EVA")
    model.get_submodule("blocks")[0] = nn.Identity()
    with pytest.raises(AdfqError, match=r"blocks\.0: cannot quantize a Identity"):
        adapt(model)
